// What the CUDA kernels of the causal_conv1d rooms share. Every output is one chain of fused multiply-adds, bias first and oldest tap
// next, then SiLU, rounded once: its bits do not depend on the kernel, the layout or the cut into blocks.
#pragma once
#include "common/cuda_dtype.cuh"
#include "common/cuda_math.cuh"
#include "common/rows.h"

namespace cobra {

constexpr int kMaxTaps = 8;  // most taps that are kept in registers

__device__ __forceinline__ int64_t load_index(const void* p, DType dtype, int64_t offset) {
  return dtype == DType::kInt32 ? static_cast<const int32_t*>(p)[offset] : static_cast<const int64_t*>(p)[offset];
}

COBRA_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
COBRA_HOST_DEVICE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// load_float without a branch: these loads are rare, or wait for nothing.
template <class R = float>
__device__ __forceinline__ R load_value(const void* base, DType dtype, int64_t offset) {
  return real_of<R>(load_bits<R>(base, dtype, offset), dtype);
}

// n / d and n % d, n >= 0, d > 0. The compiler's own 64-bit division is a subroutine, and registers are spilled around calls.
struct Divided {
  int64_t quotient, rest;
};
__device__ __forceinline__ Divided divide(int64_t n, int64_t d) {
  if ((n | d) >> 32 == 0) return {unsigned(n) / unsigned(d), unsigned(n) % unsigned(d)};
  Divided result = {0, 0};
#pragma unroll 1
  for (int bit = 62; bit >= 0; --bit) {
    result.rest = result.rest * 2 + (n >> bit & 1);
    const bool fits = result.rest >= d;
    result.rest -= fits ? d : 0;
    result.quotient = result.quotient * 2 + fits;
  }
  return result;
}

// kCount neighbours as the words that they were loaded as. Split into elements at once, each load would wait for the one before.
template <class T, int kCount>
struct Words {
  static constexpr int kPerWord = int(sizeof(Word<T>) / sizeof(T));
  Word<T> words[kCount / kPerWord];

  __device__ __forceinline__ Real<T> value(int i) const { return value_of_word<T>(words[i / kPerWord], i % kPerWord * int(sizeof(T))); }
  __device__ __forceinline__ Word<T> bits(int i) const {
    return kPerWord == 1 ? words[i] : words[i / kPerWord] >> i % kPerWord * 16 & 0xffffu;
  }
  // Of words that are 0 before.
  __device__ __forceinline__ void set(int i, Word<T> bits) { words[i / kPerWord] |= bits << i % kPerWord * 16; }
};
template <class T, int kCount>
__device__ __forceinline__ Words<T, kCount> load_words(const T* p) {
  Words<T, kCount> result;
  if constexpr (sizeof result == 4) {
    result.words[0] = *reinterpret_cast<const unsigned*>(p);
  } else {
    const auto pack = load_pack<T, kCount>(p);
    memcpy(&result, &pack, sizeof result);
  }
  return result;
}
template <class T, int kCount>
__device__ __forceinline__ void store_words(T* p, const Words<T, kCount>& words) {
  if constexpr (sizeof words == 4) {
    *reinterpret_cast<unsigned*>(p) = words.words[0];
  } else {
    Pack<T, kCount> pack;
    memcpy(&pack, &words, sizeof words);
    store_pack<T, kCount>(p, pack);
  }
}

// Kernels for kTaps == kMambaTaps want as many taps, side by side in memory; those for kMaxTaps serve every width up to that.
constexpr int kMambaTaps = 4;
template <class Params>
inline bool filter_is_packed(const Params& p) {
  return p.width == kMambaTaps && p.weight_width_stride == 1 && p.weight_dim_stride == kMambaTaps &&
         reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

// The taps of kItems neighbouring channels from channel d on, a multiple of kItems; newest last. Of kMaxTaps the oldest `first` are missing.
template <int kItems, int kTaps, class R = float>
struct Filter {
  R weight[kItems][kTaps], bias[kItems];
  int first;

  template <class Params>
  __device__ __forceinline__ Filter(const Params& p, int64_t d) : first(kTaps - int(p.width)) {
    Word<R> bits[kItems] = {};
    if (p.bias) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) bits[i] = load_bits<R>(p.bias, p.bias_dtype, (d + i) * p.bias_stride);
    }
    with_type<R>(p.weight_dtype, [&](auto t) { load_weight(p, static_cast<const decltype(t)*>(p.weight) + d * p.weight_dim_stride); });
#pragma unroll
    for (int i = 0; i < kItems; ++i) bias[i] = real_of<R>(bits[i], p.bias_dtype);
  }

  __device__ __forceinline__ bool has(int tap) const { return kTaps == kMambaTaps || tap >= first; }

 private:
  template <class Params, class S>
  __device__ __forceinline__ void load_weight(const Params& p, const S* channel) {
    if constexpr (kTaps == kMambaTaps) {
      const auto taps = load_pack<S, kItems * kTaps>(channel);
#pragma unroll
      for (int i = 0; i < kItems * kTaps; ++i) weight[i / kTaps][i % kTaps] = to_real(taps.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
#pragma unroll
        for (int w = 0; w < kTaps; ++w)
          weight[i][w] = has(w) ? to_real(channel[i * p.weight_dim_stride + (w - first) * p.weight_width_stride]) : R(0);
    }
  }
};

}  // namespace cobra
