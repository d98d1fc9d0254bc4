// exp2 of L1-resident data on every thread: one load, one exp2 and one add per vector. The scan's yardstick (vec.h has the exp2).
#include "common/cpu_level.h"
#include "common/vec.h"
#include "roof/roof.h"

namespace cobra {
COBRA_DECLARE_LEVELS(exp2_floor, Exp2FloorParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {

void exp2_floor(const Exp2FloorParams& p, const Parallel& parallel) {
  constexpr int kWidth = Vec<float>::kWidth;
  parallel(0, p.blocks, 16, [&](int64_t begin, int64_t end) {
    alignas(64) float x[kExp2BlockSize];
    for (int64_t i = 0; i < kExp2BlockSize; ++i) x[i] = float(i) * (-8.0f / kExp2BlockSize);
    for (int64_t block = begin; block < end; ++block) {
      asm volatile("" : : "r"(x) : "memory");  // every block is computed again
      Vec<float> sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int64_t i = 0; i < kExp2BlockSize; i += 4 * kWidth)
        for (int k = 0; k < 4; ++k) sum[k] += exp2(load(x + i + k * kWidth));
      p.sums[block] = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
    }
  });
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once
namespace cobra {

void exp2_floor_cpu(const Exp2FloorParams& p, const Parallel& parallel) { COBRA_AT_LEVEL(exp2_floor)(p, parallel); }

}  // namespace cobra
#endif
