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

// Time steps computed at once, as many as the registers hold: weights and shared rows are read once for all of them.
constexpr int kConvSteps = kVecBytes == 64 ? 8 : 4;

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

// The columns of an (n, columns) matrix as rows of n in compute precision. For the usual weights, 2 to 4 contiguous columns,
// GCC makes vector loads and shuffles of the loop because kColumns is known.
template <class T, class S, int kColumns>
void split_columns(T* __restrict dst, int64_t dst_stride, const S* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < kColumns; ++j) dst[j * dst_stride + i] = to_float(src[i * kColumns + j]);
}
template <class T, class S>
bool split_columns(T* dst, int64_t dst_stride, const S* src, int64_t columns, int64_t n) {
  switch (columns) {
    case 2: split_columns<T, S, 2>(dst, dst_stride, src, n); return true;
    case 3: split_columns<T, S, 3>(dst, dst_stride, src, n); return true;
    case 4: split_columns<T, S, 4>(dst, dst_stride, src, n); return true;
    default: return false;
  }
}
template <class T>
void load_columns(T* dst, int64_t dst_stride, const void* src, DType dtype, int64_t offset, int64_t row_stride, int64_t column_stride,
                  int64_t columns, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (row_stride == columns && column_stride == 1) {
      const bool done = dtype == DType::kBFloat16 ? split_columns(dst, dst_stride, static_cast<const bf16*>(src) + offset, columns, n)
                        : dtype == DType::kFloat16 ? split_columns(dst, dst_stride, static_cast<const fp16*>(src) + offset, columns, n)
                                                   : split_columns(dst, dst_stride, static_cast<const float*>(src) + offset, columns, n);
      if (done) return;
    }
  }
  for (int64_t j = 0; j < columns; ++j) load_row(dst + j * dst_stride, src, dtype, offset + j * column_stride, row_stride, n);
}

// 16-bit outputs are finished in tiles of this many sums: sums, SiLU and rounding as three short loops. Measured with AVX-512:
// 1.4 ms instead of 2.0 for the same work in one loop.
constexpr int64_t kConvTile = 512;

// y = silu(sums) or sums, rounded to X. n need not be whole vectors, the room behind sums is.
template <class X, class T>
COBRA_INLINE void store_tile(X* y, T* sums, int64_t n, bool silu) {
  if (silu)
    for (int64_t i = 0; i < n; i += Vec<T>::kWidth) store(sums + i, cobra::COBRA_LEVEL::silu(load(sums + i)));
  store_row_as(y, sums, 1, n);
}

// kSteps outputs of `channels` channels from rows[0 .. width - 1 + kSteps): y[s] gets the window that starts at rows[s].
// X and Y are the dtypes in memory, T the one computed in. weight is (width, weight_stride) and, like bias, padded to whole vectors.
// kWidth 0: the width is known at run time only. `x_ahead`, `y_ahead`: elements from the newest rows to those of the next call,
// which are prefetched: a row is too short for the hardware to have learnt it.
template <class X, class T, class Y, int kWidth, int kSteps>
void conv_rows(const X* const* rows, const T* weight, int64_t weight_stride, const T* bias, int64_t width, bool silu,
               int64_t channels, Y* const* y, int64_t x_ahead, int64_t y_ahead) {
  constexpr int kLanes = Vec<T>::kWidth;
  const int64_t taps = kWidth > 0 ? kWidth : width;
  const auto sums_at = [&](int64_t c, auto load_x, auto put) {
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
    for (int s = 0; s < kSteps; ++s) put(s, sum[s]);
  };
  const auto prefetch = [&](int64_t c) {
    for (int s = 0; s < kSteps; ++s) {
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(rows[taps - 1 + s]) + (c + x_ahead) * sizeof(X)), 0);
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(y[s]) + (c + y_ahead) * sizeof(Y)), 1);
    }
  };
  const int64_t whole = channels / kLanes * kLanes, left = channels - whole;
  const auto load_whole = [](const X* p) { return load(p); };
  const auto load_left = [left](const X* p) { return load_n(p, left); };

  if constexpr (std::is_same_v<X, T>) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      prefetch(c);
      sums_at(c, load_whole, [&](int s, Vec<T> sum) { store(y[s] + c, silu ? cobra::COBRA_LEVEL::silu(sum) : sum); });
    }
    if (left > 0)
      sums_at(whole, load_left, [&](int s, Vec<T> sum) { store_n(y[s] + whole, silu ? cobra::COBRA_LEVEL::silu(sum) : sum, left); });
  } else {
    alignas(64) T tile[kSteps][kConvTile];
    for (int64_t begin = 0; begin < channels; begin += kConvTile) {
      const int64_t end = std::min(channels, begin + kConvTile);
      const auto put = [&](int64_t c) { return [&tile, c, begin](int s, Vec<T> sum) { store(tile[s] + c - begin, sum); }; };
      for (int64_t c = begin; c < std::min(end, whole); c += kLanes) {
        prefetch(c);
        sums_at(c, load_whole, put(c));
      }
      if (end > whole) sums_at(whole, load_left, put(whole));
      for (int s = 0; s < kSteps; ++s) store_tile(y[s] + begin, tile[s], end - begin, silu);
    }
  }
}

template <class X, class T, class Y = X>
using ConvRows = void (*)(const X* const* rows, const T* weight, int64_t weight_stride, const T* bias, int64_t width, bool silu,
                          int64_t channels, Y* const* y, int64_t x_ahead, int64_t y_ahead);

// The instance for a width known at run time. kSteps is 1 or kConvSteps.
template <class X, class T, int kSteps>
ConvRows<X, T> conv_rows_for(int64_t width) {
  switch (width) {
    case 1: return conv_rows<X, T, X, 1, kSteps>;
    case 2: return conv_rows<X, T, X, 2, kSteps>;
    case 3: return conv_rows<X, T, X, 3, kSteps>;
    case 4: return conv_rows<X, T, X, 4, kSteps>;
    case 5: return conv_rows<X, T, X, 5, kSteps>;
    case 6: return conv_rows<X, T, X, 6, kSteps>;
    case 7: return conv_rows<X, T, X, 7, kSteps>;
    case 8: return conv_rows<X, T, X, 8, kSteps>;
    default: return conv_rows<X, T, X, 0, kSteps>;
  }
}

}  // namespace cobra::COBRA_LEVEL
