// What the forward and the backward kernels of rms_norm share: how threads own a row, and its statistics.
//
// A row belongs to a group of blockDim.x threads, a block holds blockDim.y groups. Two ways to hold it:
//   vector   every tensor has dim stride 1, 16-byte aligned rows, dim a multiple of 16 bytes of x, and the row fits:
//            kItems channels per thread stay in registers, memory is read once;
//   strided  anything else, any dim: channels threadIdx.x, threadIdx.x + blockDim.x, ... are read again for each pass.
// The choice depends on dim and layout only, never on the number of rows: a row's bits do not depend on its batch.
// R: the type of the arithmetic (common/cuda_dtype.cuh).
#pragma once
#include "common/cuda_dtype.cuh"
#include "common/cuda_math.cuh"
#include "common/reduce.cuh"
#include "rms_norm/rms_norm.h"

namespace cobra {

constexpr int kMaxRowThreads = 640;
template <class R> using RowSum = GroupSum<R, kMaxRowThreads / kWarp>;

// --- vector -----------------------------------------------------------------------------------------------------------

// Channel of a pack of this thread: packs of kWidth neighbours, one pack per thread, then the next round.
template <int kWidth>
__device__ __forceinline__ int pack_channel(int pack) {
  return (pack * int(blockDim.x) + int(threadIdx.x)) * kWidth;
}

// The thread's channels of a row as they lie in memory, 0 beyond its `dim` channels. A kernel first loads what it needs of every
// tensor, so that all of it is under way at once, and takes the values afterwards: converting where one loads makes the
// loads of the next tensor wait for those of the first.
template <int kWidth, int kItems, class R = float>
struct RawItems {
  Word<R> words[kItems];  // of 16-bit elements the first half

  // `row` points at channel 0.
  template <class S>
  __device__ __forceinline__ void load(const S* row, int dim) {
    constexpr int kWords = kWidth * int(sizeof(S)) / int(sizeof(Word<R>));  // of a pack
#pragma unroll
    for (int k = 0; k < kItems / kWidth; ++k) {
      const int channel = pack_channel<kWidth>(k);
      Pack<Word<R>, kWords> pack{};
      if (channel < dim) pack = load_pack<Word<R>, kWords>(reinterpret_cast<const Word<R>*>(row + channel));
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[k * kWords + i] = pack.v[i];
    }
  }
  __device__ __forceinline__ void load(const void* base, DType dtype, int64_t offset, int dim) {
    if constexpr (sizeof(R) == 8)
      load(static_cast<const R*>(base) + offset, dim);
    else if (dtype == DType::kFloat32)
      load(static_cast<const float*>(base) + offset, dim);
    else
      load(static_cast<const __half*>(base) + offset, dim);  // or bf16: bits are bits
  }

  template <class S>
  __device__ __forceinline__ R value(int i) const {
    return value_of_word<S>(words[i * int(sizeof(S)) / int(sizeof(Word<R>))], i * int(sizeof(S)) % int(sizeof(Word<R>)));
  }
  // f(i, value) for every item.
  template <class F>
  __device__ __forceinline__ void for_values(DType dtype, F&& f) const {
    with_type<R>(dtype, [&](auto t) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) f(i, value<decltype(t)>(i));
    });
  }
};

// s = x + residual. One loop: x need not lie unpacked in registers beside the residual.
template <class T, class R, int kWidth, int kItems>
__device__ __forceinline__ void add_residual(R (&s)[kItems], const RawItems<kWidth, kItems, R>& x, const RawItems<kWidth, kItems, R>& residual,
                                             bool has_residual, DType dtype) {
  if (has_residual) return residual.for_values(dtype, [&](int i, R v) { s[i] = x.template value<T>(i) + v; });
#pragma unroll
  for (int i = 0; i < kItems; ++i) s[i] = x.template value<T>(i);
}

template <int kWidth, class R, int kItems, class S>
__device__ __forceinline__ void store_items(const R (&v)[kItems], S* row, int dim) {
  constexpr int kWords = kWidth * int(sizeof(S)) / int(sizeof(Word<R>));
#pragma unroll
  for (int k = 0; k < kItems / kWidth; ++k) {
    const int channel = pack_channel<kWidth>(k);
    Pack<Word<R>, kWords> pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) pack.v[i] = word_of<S>(v + k * kWidth + i * int(sizeof(Word<R>)) / int(sizeof(S)));
    if (channel < dim) store_pack(reinterpret_cast<Word<R>*>(row + channel), pack);
  }
}
template <int kWidth, class R, int kItems>
__device__ __forceinline__ void store_items(const R (&v)[kItems], void* base, DType dtype, int64_t offset, int dim) {
  with_type<R>(dtype, [&](auto t) { store_items<kWidth>(v, static_cast<decltype(t)*>(base) + offset, dim); });
}

// f(i) for the items that are channels of the row.
template <int kWidth, int kItems, class F>
__device__ __forceinline__ void for_items(int dim, F&& f) {
#pragma unroll
  for (int k = 0; k < kItems / kWidth; ++k)
    if (pack_channel<kWidth>(k) < dim) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) f(k * kWidth + i);
    }
}

// n = (s - mean) * rstd with mean 0 for RMSNorm; s is replaced by s - mean, items beyond the row by 0. Returns rstd.
template <int kWidth, class R, int kItems>
__device__ __forceinline__ R center_and_rstd(R (&s)[kItems], int dim, R inverse_dim, R eps, bool is_rms_norm, RowSum<R>& sum) {
  if (!is_rms_norm) {
    R total = R(0);
#pragma unroll
    for (int i = 0; i < kItems; ++i) total += s[i];
    const R mean = sum(total) * inverse_dim;
    for_items<kWidth, kItems>(dim, [&](int i) { s[i] -= mean; });
  }
  R square = R(0);
#pragma unroll
  for (int i = 0; i < kItems; ++i) square += s[i] * s[i];
  return inverse_root(sum(square) * inverse_dim + eps);
}

// --- strided ----------------------------------------------------------------------------------------------------------

// One row of one tensor, read or written channel by channel.
template <class R>
struct RowView {
  const void* base;
  DType dtype;
  int64_t offset, stride;

  __device__ __forceinline__ R operator[](int64_t channel) const { return load_real<R>(base, dtype, offset + channel * stride); }
  __device__ __forceinline__ void store(int64_t channel, R v) const {
    store_real<R>(const_cast<void*>(base), dtype, offset + channel * stride, v);
  }
};

template <class R>
__device__ __forceinline__ RowView<R> row_view(const void* base, DType dtype, const RowShape& shape, const RowStride& stride, int64_t row) {
  return {base, dtype, base ? row_offset(shape, stride, row) : 0, stride.dim};
}

// s = x + residual of one row, not rounded.
template <class R>
struct RowInput {
  RowView<R> x, residual;
  __device__ __forceinline__ R operator[](int64_t channel) const {
    return residual.base ? x[channel] + residual[channel] : x[channel];
  }
};

template <class R, class Params>
__device__ __forceinline__ RowInput<R> row_input(const Params& p, int64_t row) {
  return {row_view<R>(p.x, p.x_dtype, p.shape, p.x_stride, row), row_view<R>(p.residual, p.residual_dtype, p.shape, p.residual_stride, row)};
}

template <class R>
struct RowStatistics {
  R mean, rstd;
};
template <class R>
__device__ __forceinline__ RowStatistics<R> row_statistics(const RowInput<R>& s, int64_t dim, R inverse_dim, R eps, bool is_rms_norm, RowSum<R>& sum) {
  R mean = R(0);
  if (!is_rms_norm) {
    R total = R(0);
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) total += s[i];
    mean = sum(total) * inverse_dim;
  }
  R square = R(0);
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    const R centered = s[i] - mean;
    square += centered * centered;
  }
  return {mean, inverse_root(sum(square) * inverse_dim + eps)};
}

// --- launch -----------------------------------------------------------------------------------------------------------

// Can the rows of this tensor be read in packs of `width` elements?
inline bool rows_are_packed(const void* base, DType dtype, const RowShape& shape, const RowStride& stride, int width) {
  if (!base) return true;
  const int64_t bytes = int64_t(width) * int64_t(size_of(dtype)), alignment = bytes < 16 ? bytes : 16;
  bool packed = stride.dim == 1 && reinterpret_cast<uintptr_t>(base) % alignment == 0;
  for (int i = 0; i < shape.ndim; ++i) packed = packed && (stride.row[i] * int64_t(size_of(dtype))) % alignment == 0;
  return packed;
}
inline bool vector_is_packed(const void* base, DType dtype, int64_t stride, int width) {
  return rows_are_packed(base, dtype, RowShape{}, RowStride{{}, stride}, width);
}

// Threads per row, in whole warps.
inline int row_threads(int64_t dim, int items, int most) {
  const int64_t threads = (dim + items - 1) / items;
  return threads >= most ? most : int((threads + kWarp - 1) / kWarp) * kWarp;
}

}  // namespace cobra
