// Sums over the threads of a row. The order is fixed by the launch shape, so the bits are the same on every run.
#pragma once
#include "common/launch.h"

namespace cobra {

constexpr int kWarp = 32;

// Every lane gets the same bits: in each step both partners add the same two numbers.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2) v += __shfl_xor_sync(0xffffffffu, v, flip);
  return v;
}

// Sums over a group: the threads of a block with the same threadIdx.y. blockDim.x is a multiple of the warp size and
// the whole block calls together. `shared` has two halves of a number per warp, used in turn: a fast warp
// may already write the next sum while a slow one reads this one, and the barrier of the next keeps it from getting further.
template <class T, int kMaxWarps>
struct GroupSum {
  using Shared = T[2][kMaxWarps];
  Shared& shared;
  int half = 0;

  __device__ __forceinline__ T operator()(T v) {
    v = warp_sum(v);
    if (blockDim.x == kWarp) return v;
    const int warps = blockDim.x / kWarp, first = threadIdx.y * warps;
    T* const partial = shared[half] + first;
    half ^= 1;
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = v;
    __syncthreads();
    T sum = partial[0];
    for (int i = 1; i < warps; ++i) sum += partial[i];
    return sum;
  }
};

}  // namespace cobra
