// C entry points of the shared object that extension.py reads with ctypes: call counters, instruction-set level, build.
#include <cstring>

#include "common/call_counts.h"
#include "common/cpu_level.h"

#define COBRA_EXPORT extern "C" __attribute__((visibility("default")))

// The i-th counter: its count, or -1 past the end.
COBRA_EXPORT int64_t cobra_call_count(int i, const char** op, const char** backend) {
  for (cobra::CallCounter* c = cobra::CallCounter::first; c; c = c->next)
    if (i-- == 0) {
      *op = c->op;
      *backend = c->backend;
      return c->count.load(std::memory_order_relaxed);
    }
  return -1;
}
COBRA_EXPORT void cobra_reset_call_counts() {
  for (cobra::CallCounter* c = cobra::CallCounter::first; c; c = c->next) c->count.store(0, std::memory_order_relaxed);
}

COBRA_EXPORT int cobra_cpu_level() { return int(cobra::cpu_level()); }
COBRA_EXPORT int cobra_best_cpu_level() { return int(cobra::best_cpu_level()); }
COBRA_EXPORT int cobra_set_cpu_level(int level) { return cobra::set_cpu_level(cobra::CpuLevel(level)) ? 1 : 0; }

// CUDA images in this build, as given to nvcc ("sm_80 sm_90a compute_80"), or "" for a CPU-only build.
#if !defined(COBRA_CUDA_IMAGES)
#define COBRA_CUDA_IMAGES ""
#endif
COBRA_EXPORT const char* cobra_cuda_images() { return COBRA_CUDA_IMAGES; }
