#include "common/cpu_level.h"

#include <atomic>

namespace cobra {

CpuLevel best_cpu_level() {
#if defined(COBRA_X86)
  // __builtin_cpu_supports also asks the operating system whether it saves the registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kScalar;
}

static std::atomic<int> level_in_use{-1};

CpuLevel cpu_level() {
  int level = level_in_use.load(std::memory_order_relaxed);
  if (level < 0) {
    level = int(best_cpu_level());
    level_in_use.store(level, std::memory_order_relaxed);
  }
  return CpuLevel(level);
}

bool set_cpu_level(CpuLevel level) {
  if (int(level) < 0 || int(level) > int(best_cpu_level())) return false;
  level_in_use.store(int(level), std::memory_order_relaxed);
  return true;
}

int64_t vec_bytes(CpuLevel level) { return int64_t(16) << int(level); }

}  // namespace cobra
