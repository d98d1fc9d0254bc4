// The instruction-set levels of the CPU kernels and the one in use. A kernel file is compiled once per level (vec.h).
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#define COBRA_X86 1
#endif

namespace cobra {

enum class CpuLevel : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

CpuLevel best_cpu_level();               // what this processor and its operating system can run
CpuLevel cpu_level();                    // in use: the best one unless set
bool set_cpu_level(CpuLevel level);      // false, and nothing changed, if the processor lacks it
int64_t vec_bytes(CpuLevel level);       // bytes per vector

}  // namespace cobra

// COBRA_DECLARE_LEVELS declares fn(const Params&, const Parallel&) at every level, COBRA_AT_LEVEL is the one in use.
#if defined(COBRA_X86)
#define COBRA_DECLARE_LEVELS(fn, Params)                         \
  namespace scalar { void fn(const Params&, const Parallel&); }  \
  namespace avx2 { void fn(const Params&, const Parallel&); }    \
  namespace avx512 { void fn(const Params&, const Parallel&); }
#define COBRA_AT_LEVEL(fn)                            \
  (::cobra::cpu_level() == CpuLevel::kAvx512 ? avx512::fn \
   : ::cobra::cpu_level() == CpuLevel::kAvx2 ? avx2::fn   \
                                             : scalar::fn)
#else
#define COBRA_DECLARE_LEVELS(fn, Params) \
  namespace scalar { void fn(const Params&, const Parallel&); }
#define COBRA_AT_LEVEL(fn) (scalar::fn)
#endif
