// Handing data from one block to another through memory: the writer stores a flag with release, the reader loads it with
// acquire and pauses between tries. A block may only wait for one that has surely started: number blocks by a ticket.
#pragma once
#include "common/launch.h"

namespace cobra {

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#if defined(__CUDA_ARCH__)
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#elif !defined(__CUDACC__)
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#else
  return *p;  // host pass of nvcc, never run
#endif
}

__device__ __forceinline__ void store_release(unsigned* p, unsigned v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#elif !defined(__CUDACC__)
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
#else
  *p = v;  // host pass of nvcc, never run
#endif
}

__device__ __forceinline__ void pause_spin() {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
  __nanosleep(64);
#endif
}

}  // namespace cobra
