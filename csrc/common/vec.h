// One SIMD vector type for every CPU kernel, on GCC vector extensions. A kernel file is compiled once per instruction set
// with -DCOBRA_LEVEL=scalar|avx2|avx512 and lives in cobra::COBRA_LEVEL, so each level has its own copy of this header.
// "scalar" is the portable level: 128-bit vectors that any target lowers to what it has. fp64 is used at that level only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef COBRA_LEVEL
#error "compile CPU kernels with -DCOBRA_LEVEL=scalar|avx2|avx512"
#endif

namespace cobra::COBRA_LEVEL {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

#define COBRA_INLINE inline __attribute__((always_inline))

// --- 16-bit floats, one element -------------------------------------------------------------------------------------
COBRA_INLINE float to_float(bf16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
COBRA_INLINE float to_float(fp16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  _Float16 v;
  std::memcpy(&v, &h, 2);
  return float(v);
#endif
}
COBRA_INLINE float to_float(float f) { return f; }
COBRA_INLINE double to_float(double f) { return f; }

template <class S> S round_to(float f);
template <> COBRA_INLINE float round_to<float>(float f) { return f; }
template <> COBRA_INLINE bf16 round_to<bf16>(float f) {  // nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <> COBRA_INLINE fp16 round_to<fp16>(float f) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(f, 0))};
#else
  const _Float16 v = _Float16(f);
  fp16 h;
  std::memcpy(&h, &v, 2);
  return h;
#endif
}
template <class S> S round_to(double f);
template <> COBRA_INLINE double round_to<double>(double f) { return f; }

// --- Vec ------------------------------------------------------------------------------------------------------------
template <class T> struct NativeVec;
template <> struct NativeVec<float> {
  typedef float Type __attribute__((vector_size(kVecBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVecBytes)));
};
template <> struct NativeVec<double> {
  typedef double Type __attribute__((vector_size(kVecBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVecBytes)));
};

template <class T>
struct Vec {
  static constexpr int kWidth = kVecBytes / int(sizeof(T));
  using Native = typename NativeVec<T>::Type;
  using Bits = typename NativeVec<T>::Bits;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Native v;

  Vec() = default;
  COBRA_INLINE Vec(Native native) : v(native) {}
  COBRA_INLINE Vec(T x) : v(x - Native{}) {}  // broadcast; x - 0 keeps the sign of -0

  COBRA_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  COBRA_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  COBRA_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  COBRA_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  COBRA_INLINE friend Vec operator-(Vec a) { return -a.v; }
  COBRA_INLINE Vec& operator+=(Vec b) { v += b.v; return *this; }
  COBRA_INLINE Vec& operator*=(Vec b) { v *= b.v; return *this; }
  COBRA_INLINE T operator[](int i) const { return v[i]; }

  // Sum of the lanes, always in the same tree order.
  COBRA_INLINE T sum() const {
    alignas(kVecBytes) T lane[kWidth];
    std::memcpy(lane, &v, kVecBytes);
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

template <class T>
COBRA_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return a.v * b.v + c.v; }  // contracted by -ffp-contract=fast
// A NaN in `a` survives both. The instructions return their second operand when either is NaN; written as a comparison
// they would cost three operations.
template <class T>
COBRA_INLINE Vec<T> max(Vec<T> a, Vec<T> b) { return a.v < b.v ? b.v : a.v; }
template <class T>
COBRA_INLINE Vec<T> min(Vec<T> a, Vec<T> b) { return a.v > b.v ? b.v : a.v; }
#if defined(__AVX512F__)
template <> COBRA_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(b.v, a.v); }
template <> COBRA_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(b.v, a.v); }
#elif defined(__AVX2__)
template <> COBRA_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(b.v, a.v); }
template <> COBRA_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(b.v, a.v); }
#elif defined(__SSE2__)
template <> COBRA_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm_max_ps(b.v, a.v); }
template <> COBRA_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm_min_ps(b.v, a.v); }
#endif
template <class T>
COBRA_INLINE Vec<T> abs(Vec<T> a) {
  using Bits = typename Vec<T>::Bits;
  const Bits sign = (Bits)Vec<T>(T(-0.0)).v;
  return Vec<T>((typename Vec<T>::Native)((Bits)a.v & ~sign));
}

// Lanes where a > b take `yes`, else `no` (also where either is NaN).
template <class T>
COBRA_INLINE Vec<T> where_greater(Vec<T> a, Vec<T> b, Vec<T> yes, Vec<T> no) { return a.v > b.v ? yes.v : no.v; }

// --- many sums at once ----------------------------------------------------------------------------------------------
// Element of (a0 a1 .. b0 b1 ..) that output lane i takes from two vectors: every other one, from `first` on.
template <class T>
COBRA_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b, int first) {
  typename Vec<T>::Bits pick;
  for (int i = 0; i < Vec<T>::kWidth; ++i) pick[i] = 2 * i + first;
  return __builtin_shuffle(a.v, b.v, pick);
}

// Lane c of the result is the sum of the lanes of v[c]. Destroys v.
template <class T>
COBRA_INLINE Vec<T> sum_each(Vec<T> (&v)[Vec<T>::kWidth]) {
  for (int count = Vec<T>::kWidth; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) v[i] = every_other(v[2 * i], v[2 * i + 1], 0) + every_other(v[2 * i], v[2 * i + 1], 1);
  return v[0];
}

// --- load and store: one conversion each way, unaligned -------------------------------------------------------------
COBRA_INLINE Vec<float> load(const float* p) {
  Vec<float> r;
  std::memcpy(&r.v, p, kVecBytes);
  return r;
}
COBRA_INLINE Vec<double> load(const double* p) {
  Vec<double> r;
  std::memcpy(&r.v, p, kVecBytes);
  return r;
}
COBRA_INLINE Vec<float> load(const bf16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return Vec<float>::Native(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return Vec<float>::Native(_mm256_slli_epi32(wide, 16));
#else
  Vec<float> r;
  for (int i = 0; i < Vec<float>::kWidth; ++i) r.v[i] = to_float(p[i]);
  return r;
#endif
}
COBRA_INLINE Vec<float> load(const fp16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> r;
  for (int i = 0; i < Vec<float>::kWidth; ++i) r.v[i] = to_float(p[i]);
  return r;
#endif
}

COBRA_INLINE void store(float* p, Vec<float> a) { std::memcpy(p, &a.v, kVecBytes); }
COBRA_INLINE void store(double* p, Vec<double> a) { std::memcpy(p, &a.v, kVecBytes); }
COBRA_INLINE void store(bf16* p, Vec<float> a) {
#if defined(__AVX2__)
  const auto bits = (Vec<float>::Bits)a.v;
  const auto rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const auto quiet = bits | 0x400000;
  const auto kept = (((a.v == a.v) ? rounded : quiet) >> 16) & 0xffff;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)kept));
#else
  const __m256i wide = (__m256i)kept;
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
#endif
#else
  for (int i = 0; i < Vec<float>::kWidth; ++i) p[i] = round_to<bf16>(a.v[i]);
#endif
}
COBRA_INLINE void store(fp16* p, Vec<float> a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
#else
  for (int i = 0; i < Vec<float>::kWidth; ++i) p[i] = round_to<fp16>(a.v[i]);
#endif
}

// The first n lanes (0 <= n <= kWidth), elements `stride` apart; lanes beyond n are 0 and nothing beyond n is touched.
template <class S>
COBRA_INLINE auto load_n(const S* p, int64_t n, int64_t stride = 1) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  alignas(kVecBytes) T lane[Vec<T>::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = to_float(p[i * stride]);
  return load(lane);
}
template <class S, class T>
COBRA_INLINE void store_n(S* p, Vec<T> a, int64_t n, int64_t stride = 1) {
  alignas(kVecBytes) T lane[Vec<T>::kWidth];
  store(lane, a);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = round_to<S>(lane[i]);
}

// --- functions ------------------------------------------------------------------------------------------------------
// 2^f for |f| <= 0.5, minimax of degree 6: relative error 6.9e-8 in fp32.
COBRA_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = 0.0001534581201f;
  p = fma(p, f, Vec<float>(0.001339993122f));
  p = fma(p, f, Vec<float>(0.009618488957f));
  p = fma(p, f, Vec<float>(0.05550328777f));
  p = fma(p, f, Vec<float>(0.2402264689f));
  p = fma(p, f, Vec<float>(0.6931472057f));
  return fma(p, f, Vec<float>(1.0f));
}

// p * 2^n for integral n in [kMinExponent, 128]; the lowest gives 0, 128 infinity, NaN in p or n stays NaN. Results below
// 2^-126 are flushed to 0 except by AVX-512, whose scale instruction rounds them right at no cost.
#if defined(__AVX512F__)
constexpr float kMinExponent = -160.0f;
#else
constexpr float kMinExponent = -127.0f;
#endif
COBRA_INLINE Vec<float> scale2(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p.v, n.v);
#else
  const auto shifted = (Vec<float>::Bits)(n + Vec<float>(12582912.0f + 127.0f)).v;  // 1.5 * 2^23: n + 127 in the low bits
  return p * Vec<float>((Vec<float>::Native)(shifted << 23));
#endif
}

COBRA_INLINE Vec<float> round_nearest(Vec<float> x) {  // |x| < 2^22
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec<float> magic = 12582912.0f;
  return (x + magic) - magic;
#endif
}

// 2^x. Very negative x gives exactly 0, x >= 128 infinity, NaN gives NaN.
COBRA_INLINE Vec<float> exp2(Vec<float> x) {
  x = min(max(x, Vec<float>(kMinExponent)), Vec<float>(128.0f));
  const Vec<float> n = round_nearest(x);
  return scale2(exp2_fraction(x - n), n);
}

// e^x: relative error 1.5e-7 over the whole range, with or without fused multiply-add: n * ln2_high is exact (9 + 8 bits).
COBRA_INLINE Vec<float> exp(Vec<float> x) {
  x = min(max(x, Vec<float>(kMinExponent * 0.693148f)), Vec<float>(88.8f));
  const Vec<float> log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const Vec<float> n = round_nearest(x * log2e);
  const Vec<float> rest = fma(-n, ln2_low, fma(-n, ln2_high, x));
  return scale2(exp2_fraction(rest * log2e), n);
}

// log(1 + z) for z in [0, 1]: 2 atanh(t), t = z / (2 + z), so small z keeps its relative accuracy (4e-9 + rounding).
COBRA_INLINE Vec<float> log1p_unit(Vec<float> z) {
  const Vec<float> t = z / (z + Vec<float>(2.0f)), s = t * t;
  Vec<float> p = 0.281746573f;
  p = fma(p, s, Vec<float>(0.279614188f));
  p = fma(p, s, Vec<float>(0.400248537f));
  p = fma(p, s, Vec<float>(0.666663159f));
  p = fma(p, s, Vec<float>(2.0f));
  return t * p;
}

template <class F>
COBRA_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) x.v[i] = f(x.v[i]);
  return x;
}
COBRA_INLINE Vec<double> exp2(Vec<double> x) { return each_lane(x, [](double v) { return std::exp2(v); }); }
COBRA_INLINE Vec<double> exp(Vec<double> x) { return each_lane(x, [](double v) { return std::exp(v); }); }
COBRA_INLINE Vec<double> log1p_unit(Vec<double> z) { return each_lane(z, [](double v) { return std::log1p(v); }); }

// 2^x for a loop that takes many: 2^x = 2^n 2^(k/kWidth) 2^f with one table of kWidth powers kept in a register, which
// leaves |f| <= 1/(2 kWidth) and a cubic. Fewer operations than exp2, relative error 1.6e-7, and where x is near 0
// the error is in proportion to x, as slow decays need. The argument is x * kScale. Limits and NaN as exp2 for finite x.
template <class T>
struct DecayExp2 {  // no table without a lane permutation: fp64 and the portable level
  static constexpr T kScale = 1;
  COBRA_INLINE Vec<T> operator()(Vec<T> x) const { return exp2(x); }
};
#if defined(__AVX2__)
template <>
struct DecayExp2<float> {
  static constexpr int kWidth = Vec<float>::kWidth;
#if defined(__AVX512F__)
  static constexpr float kScale = 1.0f;
#else
  static constexpr float kScale = kWidth;
#endif
  Vec<float> table;

  COBRA_INLINE DecayExp2() {
    alignas(kVecBytes) float power[kWidth];
    for (int k = 0; k < kWidth; ++k) power[k] = kPower[k * 16 / kWidth];
#if !defined(__AVX512F__)  // the exponent that operator() adds holds k too: take it out here
    for (int k = 0; k < kWidth; ++k) {
      uint32_t bits;
      std::memcpy(&bits, &power[k], 4);
      bits -= uint32_t(k) << 20;
      std::memcpy(&power[k], &bits, 4);
    }
#endif
    table = load(power);
  }

  COBRA_INLINE Vec<float> operator()(Vec<float> x) const {
    // Taylor's cubic, its second coefficient moved so that the first term left out costs a sixth: t^2 - 0.828 h^2 t on [0, h^2].
    constexpr double c = 0.69314718055994531 / kScale, h = c * kScale / (2 * kWidth);
    const Vec<float> c1 = float(c), c2 = float(c * c * (0.5 + 0.8284 * h * h / 24)), c3 = float(c * c * c / 6);
#if defined(__AVX512F__)
    const Vec<float> shifted = x + Vec<float>(786432.0f);  // 1.5 * 2^19: 16 n + k in the low bits
    const Vec<float> n = _mm512_roundscale_ps(x.v, 0x40);   // to a sixteenth
    const Vec<float> f = x - n;
    const Vec<float> power = _mm512_permutexvar_ps((__m512i)shifted.v, table.v);
    const Vec<float> q = fma(fma(c3, f, c2), f, c1);
    return _mm512_scalef_ps(fma(power * f, q, power).v, n.v);  // takes floor(n)
#else
    x = min(max(x, Vec<float>(-127.0f * kWidth)), Vec<float>(128.0f * kWidth));
    const Vec<float> magic = 12582912.0f, shifted = x + magic;  // 1.5 * 2^23: 8 n + k in the low bits
    const Vec<float> f = x - (shifted - magic);
    const auto bits = (Vec<float>::Bits)shifted.v;
    const auto power = (Vec<float>::Bits)_mm256_permutevar8x32_ps(table.v, (__m256i)bits) + (bits << 20);
    const Vec<float> q = fma(fma(c3, f, c2), f, c1);
    return Vec<float>((Vec<float>::Native)power) * fma(q, f, Vec<float>(1.0f));
#endif
  }

 private:
  static constexpr float kPower[16] = {  // 2^(k/16)
      1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
      1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
};
#endif

template <class T>
COBRA_INLINE Vec<T> sigmoid(Vec<T> x) { return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x)); }
template <class T>
COBRA_INLINE Vec<T> silu(Vec<T> x) { return x / (Vec<T>(T(1)) + exp(-x)); }
// log(1 + e^x); the identity above 20: in fp64 by rule, in fp32 because what is added is below half an ulp.
template <class T>
COBRA_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> soft = max(x, Vec<T>(T(0))) + log1p_unit(exp(-abs(x)));
  if constexpr (sizeof(T) == 4) return soft;
  return where_greater(x, Vec<T>(T(20)), x, soft);
}

// --- rows of any dtype and stride, staged through compute precision --------------------------------------------------
// T is the compute type (float, or double where every tensor is fp64). n elements, `stride` apart.
template <class T, class S>
COBRA_INLINE void load_row_as(T* dst, const S* src, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + Vec<T>::kWidth <= n; i += Vec<T>::kWidth) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i * stride]);
}
template <class T>
void load_row(T* dst, const void* src, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    load_row_as(dst, static_cast<const double*>(src) + offset, stride, n);
  } else {
    switch (dtype) {
      case DType::kBFloat16: return load_row_as(dst, static_cast<const bf16*>(src) + offset, stride, n);
      case DType::kFloat16: return load_row_as(dst, static_cast<const fp16*>(src) + offset, stride, n);
      default: return load_row_as(dst, static_cast<const float*>(src) + offset, stride, n);
    }
  }
}

template <class T, class S>
COBRA_INLINE void store_row_as(S* dst, const T* src, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + Vec<T>::kWidth <= n; i += Vec<T>::kWidth) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i * stride] = round_to<S>(src[i]);
}
template <class T>
void store_row(void* dst, DType dtype, int64_t offset, int64_t stride, const T* src, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    store_row_as(static_cast<double*>(dst) + offset, src, stride, n);
  } else {
    switch (dtype) {
      case DType::kBFloat16: return store_row_as(static_cast<bf16*>(dst) + offset, src, stride, n);
      case DType::kFloat16: return store_row_as(static_cast<fp16*>(dst) + offset, src, stride, n);
      default: return store_row_as(static_cast<float*>(dst) + offset, src, stride, n);
    }
  }
}

}  // namespace cobra::COBRA_LEVEL
