// The depthwise window of the causal_conv1d rooms, over rows of channels: a row holds x at one time step for
// neighbouring channels. Which rows form a window (earlier steps, a state, zeros) is the caller's.
// Every output is the same chain of multiply-adds, bias first and oldest tap next, so its bits do not depend on the path.
#pragma once
#include "common/vec.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace cobra::COBRA_LEVEL {

// Time steps computed at once: weights and shared rows are read once for all of them.
constexpr int kConvSteps = 4;

// n zeros on a cache line boundary: a vector that straddles two lines costs twice.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
    std::fill_n(data_.get(), n, T(0));
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> data_;
};

// Element `offset` of an int32 or int64 tensor.
COBRA_INLINE int64_t load_index(const void* p, DType dtype, int64_t offset) {
  return dtype == DType::kInt32 ? static_cast<const int32_t*>(p)[offset] : static_cast<const int64_t*>(p)[offset];
}

// kSteps outputs of `channels` channels from rows[0 .. width - 1 + kSteps): y[s] gets the window that starts at rows[s].
// X is the dtype in memory, T the one computed in. weight is (width, weight_stride) and, like bias, padded to whole vectors.
// kWidth 0: the width is known at run time only.
template <class X, class T, int kWidth, int kSteps>
void conv_rows(const X* const* rows, const T* weight, int64_t weight_stride, const T* bias, int64_t width, bool silu,
               int64_t channels, X* const* y) {
  const auto at = [&](int64_t c, auto load_x, auto store_y) {
    Vec<T> sum[kSteps];
    for (int s = 0; s < kSteps; ++s) sum[s] = load(bias + c);
    if constexpr (kWidth > 0) {
      Vec<T> window[kWidth - 1 + kSteps];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth - 1 + kSteps; ++r) window[r] = load_x(rows[r] + c);
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) {
        const Vec<T> tap = load(weight + w * weight_stride + c);
#pragma GCC unroll 16
        for (int s = 0; s < kSteps; ++s) sum[s] = fma(tap, window[w + s], sum[s]);
      }
    } else {
      for (int64_t w = 0; w < width; ++w)
        for (int s = 0; s < kSteps; ++s) sum[s] = fma(load(weight + w * weight_stride + c), load_x(rows[w + s] + c), sum[s]);
    }
#pragma GCC unroll 16
    for (int s = 0; s < kSteps; ++s) store_y(y[s] + c, silu ? cobra::COBRA_LEVEL::silu(sum[s]) : sum[s]);
  };
  int64_t c = 0;
  for (; c + Vec<T>::kWidth <= channels; c += Vec<T>::kWidth)
    at(c, [](const X* p) { return load(p); }, [](X* p, Vec<T> v) { store(p, v); });
  if (const int64_t left = channels - c; left > 0)
    at(c, [left](const X* p) { return load_n(p, left); }, [left](X* p, Vec<T> v) { store_n(p, v, left); });
}

template <class X, class T>
using ConvRows = void (*)(const X* const* rows, const T* weight, int64_t weight_stride, const T* bias, int64_t width, bool silu,
                          int64_t channels, X* const* y);

// The instance for a width known at run time. kSteps is 1 or kConvSteps.
template <class X, class T, int kSteps>
ConvRows<X, T> conv_rows_for(int64_t width) {
  switch (width) {
    case 1: return conv_rows<X, T, 1, kSteps>;
    case 2: return conv_rows<X, T, 2, kSteps>;
    case 3: return conv_rows<X, T, 3, kSteps>;
    case 4: return conv_rows<X, T, 4, kSteps>;
    case 5: return conv_rows<X, T, 5, kSteps>;
    case 6: return conv_rows<X, T, 6, kSteps>;
    case 7: return conv_rows<X, T, 7, kSteps>;
    case 8: return conv_rows<X, T, 8, kSteps>;
    default: return conv_rows<X, T, 0, kSteps>;
  }
}

}  // namespace cobra::COBRA_LEVEL
