// What a .cu file needs besides its kernel: CUDA's headers and launch under nvcc, the emulator (simt/) under a host compiler.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A __shared__ variable of the kernel: COBRA_SHARED(float[32], partial);
#define COBRA_SHARED(type, name) __shared__ std::type_identity_t<type> name
// The launch's dynamic shared memory, 16-byte aligned, as a T*.
#define COBRA_DYNAMIC_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char cobra_dynamic_shared[];     \
  T* const name = reinterpret_cast<T*>(cobra_dynamic_shared)
#else
#include "simt/simt.h"

#define COBRA_SHARED(type, name)  \
  static char name##_shared_tag;  \
  auto& name = *static_cast<std::type_identity_t<type>*>(::simt::shared_array(&name##_shared_tag, sizeof(type)))
#define COBRA_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::current->block->dynamic)
#endif

namespace cobra {

// Largest grid.x of a launch; a kernel whose work may need more loops over its grid.
inline int64_t max_grid_x() {
#if defined(__CUDACC__)
  return (1ll << 31) - 1;
#else
  return simt::options().max_grid_x;
#endif
}

// Starts kernel(params) and returns the cudaError_t of the launch, 0 when it was accepted.
template <class Params>
int launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t dynamic_bytes, void* stream, const std::type_identity_t<Params>& params) {
#if defined(__CUDACC__)
  if (dynamic_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes));
    if (error != cudaSuccess) return int(error);
  }
  kernel<<<grid, block, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return int(cudaGetLastError());
#else
  (void)stream;
  struct Call { void (*kernel)(Params); const Params& params; } call{kernel, params};
  return simt::launch(grid, block, dynamic_bytes, [](const void* c) {
    const Call& self = *static_cast<const Call*>(c);
    self.kernel(self.params);
  }, &call);
#endif
}

}  // namespace cobra
