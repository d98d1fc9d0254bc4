// Tensor-core instructions on fragments in registers.
#pragma once
#include "common/cuda_dtype.cuh"

namespace cobra {

// c += A B, A (16, 8) and B (8, 8) in tf32: the 13 low bits of a and b are ignored. Lane 4g + t holds A (g, t), (g+8, t), (g, t+4),
// (g+8, t+4); B (t, g), (t+4, g); c (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). All lanes of the warp call it together.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)),
        "r"(__float_as_uint(b1)));
#elif !defined(__CUDACC__)
  const simt::MmaTf32Operands in{{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  simt::meet(0xffffffffu, &simt::exchange_mma_tf32, &in, c, 0);
#endif
}

// c += A B, A (16, 16) and B (16, 8) in bf16 or fp16, two to a word, fp32 sums. Lane 4g + t holds A (g, 2t), (g, 2t+1) in a[0], the same
// of row g+8 in a[1], of columns + 8 in a[2] and a[3]; B (2t, g), (2t+1, g) in b[0], (2t+8, g), (2t+9, g) in b[1]; c as above.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif !defined(__CUDACC__)
  T halves[12];
  memcpy(halves, a, sizeof a);
  memcpy(halves + 8, b, sizeof b);
  simt::MmaHalfOperands in{{}, {}, {c[0], c[1], c[2], c[3]}};
  for (int i = 0; i < 8; ++i) in.a[i] = to_float(halves[i]);
  for (int i = 0; i < 4; ++i) in.b[i] = to_float(halves[8 + i]);
  simt::meet(0xffffffffu, &simt::exchange_mma_half, &in, c, 0);
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, as mma_m16n8k16 wants them: lane l gives the address of row l % 8 of
// matrix l / 8, 16 bytes, aligned; lane 4g + t receives elements (g, 2t), (g, 2t+1) of each.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("load_matrices: a row is not 16-byte aligned");
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const char* const from = static_cast<const char*>(__shfl_sync(0xffffffffu, row, 8 * i + lane / 4));
    memcpy(&words[i], from + lane % 4 * 4, 4);
  }
#endif
}

}  // namespace cobra
