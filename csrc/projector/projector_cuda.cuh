// What the projector's GPU kernels share.
#pragma once
#include "common/cuda_dtype.cuh"
#include "common/cuda_math.cuh"
#include "projector/projector.h"

namespace cobra {

// Phi(x) and e^(-x^2 / 2), see kPhiTail: one exponential, one reciprocal, nine multiply-adds.
struct Normal {
  float phi, bell;
};
__device__ __forceinline__ Normal normal(float x) {
  const float a = fabsf(x), t = reciprocal_fast(fmaf(a, 0.3f, 1.f));
  constexpr PhiTail polynomial = kPhiTail;
  float P = polynomial.power[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) P = fmaf(P, t, polynomial.power[i]);
  const float bell = exp2_fast(a * a * (-0.5f * kLog2e)), tail = bell * (t * P);  // Phi(-a)
  return {x < 0.f ? tail : 1.f - tail, bell};
}
__device__ __forceinline__ float gelu(float x) { return x * normal(x).phi; }
#if !defined(__CUDACC__)
struct NormalInDouble {
  double phi, bell;
};
inline NormalInDouble normal(double x) { return {0.5 * std::erfc(-x * std::sqrt(0.5)), std::exp(-0.5 * x * x)}; }
#endif
// d gelu / dx = Phi(x) + x Phi'(x), Phi'(x) = e^(-x^2 / 2) / sqrt(2 pi).
template <class R>
__device__ __forceinline__ R gelu_slope(R x) {
  const auto n = normal(x);
  return multiply_add(x * n.bell, kInverseRootTwoPi<R>, n.phi);
}

// `v` as it would come back from memory of that dtype.
__device__ __forceinline__ float rounded(float v, DType dtype) {
  with_float_type(dtype, [&](auto t) { v = to_float(round_to<decltype(t)>(v)); });
  return v;
}

// kWidth neighbours of a contiguous tensor in its own dtype; kWidth 1 reads any address, else the base is 16-byte aligned.
template <int kWidth, class R>
__device__ __forceinline__ void load_reals(R (&v)[kWidth], const void* base, DType dtype, int64_t offset) {
  with_type<R>(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (kWidth == 1) {
      v[0] = to_real(static_cast<const T*>(base)[offset]);
    } else {
      const Pack<T, kWidth> pack = load_pack<T, kWidth>(static_cast<const T*>(base) + offset);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = to_real(pack.v[i]);
    }
  });
}
template <int kWidth, class R>
__device__ __forceinline__ void store_reals(void* base, DType dtype, int64_t offset, const R (&v)[kWidth]) {
  with_type<R>(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (kWidth == 1) {
      static_cast<T*>(base)[offset] = round_to<T>(v[0]);
    } else {
      Pack<T, kWidth> pack;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) pack.v[i] = round_to<T>(v[i]);
      store_pack<T, kWidth>(static_cast<T*>(base) + offset, pack);
    }
  });
}

// bias[column ..], 0 without a bias or beyond `cols`.
template <int kWidth, class R>
__device__ __forceinline__ void load_bias(R (&v)[kWidth], const void* bias, DType dtype, int64_t stride, int64_t column, int64_t cols) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] = bias && column + i < cols ? load_real<R>(bias, dtype, (column + i) * stride) : R(0);
}

inline bool is_aligned(const void* base) { return reinterpret_cast<uintptr_t>(base) % 16 == 0; }

}  // namespace cobra
