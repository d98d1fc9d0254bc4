// Tensor-core instructions on fragments in registers.
#pragma once
#include "common/launch.h"

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

}  // namespace cobra
