// C entry points that the benchmarks read with ctypes: exp2 on torch's threads, and on a GPU the floors and probes of roof.h.
#include <vector>

#include "common/tensor_args.h"
#include "roof/roof.h"

#define COBRA_EXPORT extern "C" __attribute__((visibility("default")))

COBRA_EXPORT int64_t cobra_exp2_floor(int64_t blocks) {
  std::vector<float> sums(blocks);
  cobra::exp2_floor_cpu({blocks, sums.data()}, cobra::kTorchParallel);
  return blocks * cobra::kExp2BlockSize;
}

#if defined(COBRA_WITH_CUDA)
// All three launch on `stream` and return a cudaError; the pointers are device memory.
COBRA_EXPORT int cobra_exp2_floor_cuda(int64_t blocks, int64_t iterations, float* sums, int64_t* stopwatch, void* stream) {
  return cobra::exp2_floor_cuda({blocks, iterations, sums, stopwatch}, stream);
}

COBRA_EXPORT int cobra_probe_cuda(int probe, int chains, int warps, int64_t iterations, float* sink, int64_t* clocks, void* stream) {
  return cobra::probe_cuda({static_cast<cobra::Probe>(probe), chains, warps, iterations, sink, clocks}, stream);
}

COBRA_EXPORT int cobra_handover_cuda(int64_t rounds, uint32_t* flags, float* payload, int64_t* stopwatch, void* stream) {
  return cobra::handover_cuda({rounds, flags, payload, stopwatch}, stream);
}
#endif
