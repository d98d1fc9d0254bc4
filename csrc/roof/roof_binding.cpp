// C entry point that benchmarks/roofline.py reads with ctypes: exp2 of `blocks` x kExp2BlockSize values on torch's threads.
#include <vector>

#include "common/tensor_args.h"
#include "roof/roof.h"

extern "C" __attribute__((visibility("default"))) int64_t cobra_exp2_floor(int64_t blocks) {
  std::vector<float> sums(blocks);
  cobra::exp2_floor_cpu({blocks, sums.data()}, cobra::kTorchParallel);
  return blocks * cobra::kExp2BlockSize;
}
