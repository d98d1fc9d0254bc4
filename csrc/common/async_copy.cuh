// Asynchronous copies from global into shared memory: started, committed in groups, waited for by group.
#pragma once
#include "common/launch.h"

namespace cobra {

// 16 bytes, both sides aligned, past L1; zeros if not `valid`, and then `from` is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__)
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(valid ? 16 : 0) : "memory");
#elif !defined(__CUDACC__)
  simt::start_copy(to, from, valid ? 16 : 0, valid ? 0 : 16);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  simt::commit_copies();
#endif
}

// Waits for this thread's copies, all but those of the last kPending groups. Others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif !defined(__CUDACC__)
  simt::wait_copies(kPending);
#endif
}

}  // namespace cobra
