// Barriers 1 to 15 of a block, for some of its warps; 0 is __syncthreads. A barrier opens when `threads` threads have come, by
// either call. Producers arrive and go on, consumers sync: what was written before the one is seen after the other.
#pragma once
#include "common/launch.h"

namespace cobra {

__device__ __forceinline__ void barrier_sync(int id, int threads) {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  simt::named_barrier(id, threads, /*wait_there=*/true);
#endif
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#if defined(__CUDA_ARCH__)
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
  simt::named_barrier(id, threads, /*wait_there=*/false);
#endif
}

}  // namespace cobra
