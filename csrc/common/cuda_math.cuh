// fp32 arithmetic of the kernels, built on the special-function unit: few instructions, errors of an ulp or two.
#pragma once
#include "common/launch.h"

namespace cobra {

template <class T> constexpr T kLog2 = T(1.4426950408889634074);  // of e
template <class T> constexpr T kLn2 = T(0.69314718055994530942);
constexpr float kLog2e = kLog2<float>;

// 2^x to 2^-22, one instruction. 0 where the result would be subnormal; 2^0 is exactly 1; NaN stays.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x to an ulp; 0 where the result would be subnormal.
__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// The same for kernels that are written for a type of arithmetic (Real, cuda_dtype.cuh): exact functions in double.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float power_of_two(float x) { return exp2_fast(x); }
__device__ __forceinline__ float inverse(float x) { return reciprocal_fast(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
#if !defined(__CUDACC__)
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline double power_of_two(double x) { return std::exp2(x); }
inline double inverse(double x) { return 1 / x; }
inline double inverse_root(double x) { return 1 / std::sqrt(x); }
inline double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
#endif
template <class T>
__device__ __forceinline__ T sigmoid(T x) { return inverse(T(1) + power_of_two(-x * kLog2<T>)); }

__device__ __forceinline__ float silu(float x) { return x * reciprocal_fast(1.f + exp2_fast(-x * kLog2e)); }

// log(1 + e^x) = max(x, 0) + log1p(t), t = e^-|x| in (0, 1]. Relative error 2e-7 on both sides of 0, which log2(1 + t) would not
// give for a small t; equal to x above 20, where log1p(t) < 2.1e-9 is less than half an ulp.
__device__ __forceinline__ float softplus(float x) {
  const float a = fminf(fabsf(x), 150.f), scaled = -a * kLog2e;
  const float lost = fmaf(-a, kLog2e, -scaled) - a * 1.92596303e-8f;  // what -a * log2(e) is short of `scaled`, in the exponent
  float t = exp2_fast(scaled);
  t = fmaf(t, lost * 0.693147181f, t);
  float p = 5.23269409e-3f;  // minimax of log1p(t) / t on [0, 1]
  p = fmaf(p, t, -2.95052379e-2f);
  p = fmaf(p, t, 7.82259479e-2f);
  p = fmaf(p, t, -1.36632457e-1f);
  p = fmaf(p, t, 1.91060066e-1f);
  p = fmaf(p, t, -2.48429820e-1f);
  p = fmaf(p, t, 3.33190978e-1f);
  p = fmaf(p, t, -4.99994934e-1f);
  p = fmaf(p, t, 1.f);
  return fmaf(p, t, x < 0.f ? 0.f : x);  // written so that NaN stays
}

}  // namespace cobra
