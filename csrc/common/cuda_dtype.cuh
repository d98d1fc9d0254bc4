// Elements of CUDA tensors: each in its own dtype in memory, fp32 in registers. A dtype that is only known at run time costs
// one branch per call, the same for every thread, so it needs no template.
//
// The emulator (simt/) also runs backward kernels on elements of double, in double: their formulas, seen without rounding. Such a
// kernel is written for Real, the type of its arithmetic; nvcc never sees it in double. All tensors of a call are double then.
#pragma once
#include "common/dtype.h"
#include "common/launch.h"

namespace cobra {

template <class T> using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;           // of elements of T
template <class T> using Word = std::conditional_t<std::is_same_v<T, double>, uint64_t, unsigned>;  // that holds an element, or two

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ Real<T> to_real(T v) {
  if constexpr (std::is_same_v<T, double>)
    return v;
  else
    return to_float(v);
}

template <class T> __device__ __forceinline__ T round_to(Real<T> v);
template <> __device__ __forceinline__ float round_to<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half round_to<__half>(float v) { return __float2half_rn(v); }

#if !defined(__CUDACC__)
template <> inline double round_to<double>(double v) { return v; }
#endif

// f(T{}) with the C++ type of a float dtype: in a kernel, and to pick a kernel.
template <class F>
__device__ __forceinline__ void with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
    default: return f(float{});
  }
}
template <class F>
inline int pick_by_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
    default: return f(float{});
  }
}

// The same for a call whose arithmetic is in R.
template <class R, class F>
__device__ __forceinline__ void with_type(DType dtype, F&& f) {
  if constexpr (sizeof(R) == 8)
    f(R{});
  else
    with_float_type(dtype, f);
}
template <class R, class F>
inline int pick_by_type(DType dtype, F&& f) {
  if constexpr (sizeof(R) == 8)
    return f(R{});
  else
    return pick_by_float_type(dtype, f);
}
// f(R{}) with the arithmetic of a call on tensors of `dtype`.
template <class F>
inline auto pick_arithmetic(DType dtype, F&& f) {
#if !defined(__CUDACC__)
  if (dtype == DType::kFloat64) return f(double{});
#endif
  return f(float{});
}

__device__ __forceinline__ float load_float(const void* base, DType dtype, int64_t offset) {
  float v;
  with_float_type(dtype, [&](auto t) { v = to_float(static_cast<const decltype(t)*>(base)[offset]); });
  return v;
}
__device__ __forceinline__ void store_float(void* base, DType dtype, int64_t offset, float v) {
  with_float_type(dtype, [=](auto t) { static_cast<decltype(t)*>(base)[offset] = round_to<decltype(t)>(v); });
}

template <class R>
__device__ __forceinline__ R load_real(const void* base, DType dtype, int64_t offset) {
  if constexpr (sizeof(R) == 8)
    return static_cast<const R*>(base)[offset];
  else
    return load_float(base, dtype, offset);
}
template <class R>
__device__ __forceinline__ void store_real(void* base, DType dtype, int64_t offset, R v) {
  if constexpr (sizeof(R) == 8)
    static_cast<R*>(base)[offset] = v;
  else
    store_float(base, dtype, offset, v);
}

// An element as it lies in memory, and its value later. load_float converts where it loads, behind a branch: the loads of several
// tensors then wait for one another. With their bits first and their values afterwards, all are under way at once.
template <class R = float>
__device__ __forceinline__ Word<R> load_bits(const void* base, DType dtype, int64_t offset) {
  if constexpr (sizeof(R) == 8) return static_cast<const uint64_t*>(base)[offset];
  return dtype == DType::kFloat32 ? static_cast<const unsigned*>(base)[offset] : static_cast<const unsigned short*>(base)[offset];
}
__device__ __forceinline__ float float_of(unsigned bits, DType dtype) {
  const unsigned widened = dtype == DType::kBFloat16 ? bits << 16 : bits;
  const unsigned short narrow = static_cast<unsigned short>(bits);
  float v;
  __half h;
  memcpy(&v, &widened, sizeof v);
  memcpy(&h, &narrow, sizeof h);
  return dtype == DType::kFloat16 ? __half2float(h) : v;
}

template <class R>
__device__ __forceinline__ R real_of(Word<R> bits, DType dtype) {
  if constexpr (sizeof(R) == 8) {
    R v;
    memcpy(&v, &bits, sizeof v);
    return v;
  } else {
    return float_of(bits, dtype);
  }
}

// Words that hold one fp32 (in the emulator: one fp64) or two 16-bit values: the value at byte 0 or 2, and the word of the values from
// v[0] on.
template <class T> __device__ __forceinline__ Real<T> value_of_word(Word<T> word, int byte);
template <> __device__ __forceinline__ float value_of_word<float>(unsigned word, int) { return float_of(word, DType::kFloat32); }
template <> __device__ __forceinline__ float value_of_word<__nv_bfloat16>(unsigned word, int byte) {
  return float_of(byte ? word & 0xffff0000u : word << 16, DType::kFloat32);
}
template <> __device__ __forceinline__ float value_of_word<__half>(unsigned word, int byte) {
  return float_of(byte ? word >> 16 : word, DType::kFloat16);
}
template <class T> __device__ __forceinline__ Word<T> word_of(const Real<T>* v);
template <> __device__ __forceinline__ unsigned word_of<float>(const float* v) {
  unsigned word;
  memcpy(&word, v, sizeof word);
  return word;
}
template <> __device__ __forceinline__ unsigned word_of<__nv_bfloat16>(const float* v) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <> __device__ __forceinline__ unsigned word_of<__half>(const float* v) {
  const __half2 pair = __floats2half2_rn(v[0], v[1]);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
#if !defined(__CUDACC__)
template <> inline double value_of_word<double>(uint64_t word, int) { return real_of<double>(word, DType::kFloat64); }
template <> inline uint64_t word_of<double>(const double* v) {
  uint64_t word;
  memcpy(&word, v, sizeof word);
  return word;
}
#endif

// kCount neighbours as they lie in memory, in pieces of at most 16 bytes; aligned to the piece.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T v[kCount];
};
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  Pack<T, kCount> pack;
  constexpr int kBytes = sizeof(T) * kCount;
  if constexpr (kBytes % 16 == 0) {
    uint4 raw[kBytes / 16];
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&pack, raw, kBytes);
  } else {
    static_assert(kBytes == 8);
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    memcpy(&pack, &raw, kBytes);
  }
  return pack;
}
// To global memory. By instruction: nvcc takes a uint4 apart into four stores where it can keep its parts in registers.
template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  constexpr int kBytes = sizeof(T) * kCount;
#if defined(__CUDA_ARCH__)
  unsigned w[kBytes / 4];
  memcpy(w, &pack, kBytes);
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(p) + i), "r"(w[4 * i]), "r"(w[4 * i + 1]),
                   "r"(w[4 * i + 2]), "r"(w[4 * i + 3]) : "memory");
  } else {
    static_assert(kBytes == 8);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
  }
#else
  if constexpr (kBytes % 16 == 0) {
    uint4 raw[kBytes / 16];
    memcpy(raw, &pack, kBytes);
    for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(p)[i] = raw[i];
  } else {
    static_assert(kBytes == 8);
    uint2 raw;
    memcpy(&raw, &pack, kBytes);
    *reinterpret_cast<uint2*>(p) = raw;
  }
#endif
}

}  // namespace cobra
