// The exponential floor: how fast this CPU evaluates exp2 when nothing else is in the way. Only the benchmarks call it.
#pragma once
#include "common/parallel.h"

namespace cobra {

inline constexpr int64_t kExp2BlockSize = 4096;  // floats: 16 KB, resident in every L1

struct Exp2FloorParams {
  int64_t blocks;
  float* sums;  // (blocks,) sum of each block's exponentials, so that none can be left out
};

void exp2_floor_cpu(const Exp2FloorParams&, const Parallel&);

}  // namespace cobra
