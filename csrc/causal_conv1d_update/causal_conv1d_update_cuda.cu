// causal_conv1d_update on a GPU. Two kernels:
//   decode  one step on a shifting state of 3 or 4 contiguous columns in the dtype of x, width 4: a thread owns the states of a few
//           neighbouring channels, whole 16-byte packs, in a few batch rows, and shifts them in registers;
//   any     everything else: a thread owns a (batch row, channel), computes its outputs from state and x, then moves the state.
#include "causal_conv1d_update/causal_conv1d_update.h"
#include "common/conv_cuda.cuh"

namespace cobra {
namespace {

using Params = CausalConv1dUpdateParams;

constexpr int kThreads = 128;

struct Launch {
  Params p;
  int64_t columns, units;  // blocks side by side along dim; all of them
};

// Row of the pool that batch row b owns, negative for padding. Inside the pool whatever the indices hold.
__device__ __forceinline__ int64_t pool_row(const Params& p, int64_t b) {
  return p.indices ? least(load_index(p.indices, p.indices_dtype, b * p.indices_stride), p.pool - 1) : b;
}

// --- decode -----------------------------------------------------------------------------------------------------------

// 4 columns: as many channels as 16 bytes hold, so that lanes side by side touch packs side by side. 3 columns fill packs only every 16
// bytes of x.
template <class T, int kColumns>
constexpr int kItems = kColumns == 4 ? 4 / int(sizeof(T)) : 16 / int(sizeof(T));
// Batch rows per thread: enough that all their loads, under way together, are worth the loads of the filter.
template <int kColumns>
constexpr int kRows = kColumns == 4 ? 4 : 2;

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 4 ? 4 : 3) decode_kernel(const __grid_constant__ Launch l) {
  constexpr int kChannels = kItems<T, kColumns>, kBatch = kRows<kColumns>, kPast = kMambaTaps - 1;
  const Params& p = l.p;
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    const auto [line, column] = divide(unit, l.columns);
    const int64_t d = (column * kThreads + threadIdx.x) * kChannels, first = line * kBatch;
    if (d >= p.dim) continue;

    int64_t row[kBatch];  // of the pool; negative: padding
    Words<T, kChannels> x[kBatch];
    Words<T, kChannels * kColumns> state[kBatch];
    if (p.indices) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) row[r] = pool_row(p, least(first + r, p.batch - 1));  // no branch between the loads
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r) row[r] = first + r >= p.batch ? -1 : p.indices ? row[r] : first + r;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      x[r] = {};
      state[r] = {};
      if (row[r] >= 0) {
        x[r] = load_words<T, kChannels>(static_cast<const T*>(p.x) + (first + r) * p.x_stride.batch + d);
        state[r] = load_words<T, kChannels * kColumns>(static_cast<const T*>(p.state) + row[r] * p.state_stride.batch + d * kColumns);
      }
    }
    const Filter<kChannels, kMambaTaps> filter(p, d);

#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      float y[kChannels];
      Words<T, kChannels> y_words;
      Words<T, kChannels * kColumns> shifted{};
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        float sum = filter.bias[i];
#pragma unroll
        for (int w = 0; w < kPast; ++w) sum = fmaf(filter.weight[i][w], state[r].value(i * kColumns + kColumns - kPast + w), sum);
        sum = fmaf(filter.weight[i][kPast], x[r].value(i), sum);
        y[i] = row[r] < 0 ? 0.f : p.silu ? silu(sum) : sum;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) shifted.set(i * kColumns + j, j + 1 < kColumns ? state[r].bits(i * kColumns + j + 1) : x[r].bits(i));
      }
#pragma unroll
      for (int k = 0; k < kChannels / y_words.kPerWord; ++k) y_words.words[k] = word_of<T>(y + k * y_words.kPerWord);
      if (first + r < p.batch) store_words<T, kChannels>(static_cast<T*>(p.y) + (first + r) * p.y_stride.batch + d, y_words);
      if (row[r] >= 0) store_words<T, kChannels * kColumns>(static_cast<T*>(p.state) + row[r] * p.state_stride.batch + d * kColumns, shifted);
    }
  }
}

// --- any --------------------------------------------------------------------------------------------------------------

// One element of the state: the same bits where the dtypes agree.
__device__ __forceinline__ void store_state(const Params& p, int64_t offset, const void* from, DType dtype, int64_t from_offset) {
  if (dtype != p.state_dtype) return store_float(p.state, p.state_dtype, offset, load_value(from, dtype, from_offset));
  const unsigned bits = load_bits(from, dtype, from_offset);
  if (dtype == DType::kFloat32)
    static_cast<unsigned*>(p.state)[offset] = bits;
  else
    static_cast<unsigned short*>(p.state)[offset] = static_cast<unsigned short>(bits);
}

__global__ void __launch_bounds__(kThreads, 8) any_kernel(const __grid_constant__ Launch l) {
  const Params& p = l.p;
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    const auto [b, column] = divide(unit, l.columns);
    const int64_t d = column * kThreads + threadIdx.x, row = pool_row(p, b);
    if (d >= p.dim) continue;
    const int64_t x = b * p.x_stride.batch + d * p.x_stride.dim, y = b * p.y_stride.batch + d * p.y_stride.dim;
    if (row < 0) {
      for (int64_t s = 0; s < p.steps; ++s) store_float(p.y, p.x_dtype, y + s * p.y_stride.step, 0.f);
      continue;
    }

    const int64_t state = row * p.state_stride.batch + d * p.state_stride.dim;
    int64_t seen = 0;  // modulo state_len
    if (p.cache_seqlens && p.state_len > 0) {
      seen = load_index(p.cache_seqlens, p.cache_seqlens_dtype, b * p.cache_seqlens_stride);
      seen = seen >= 0 ? divide(seen, p.state_len).rest : p.state_len - 1 - divide(-(seen + 1), p.state_len).rest;
    }
    // Offset in the state of the input `t` steps after the last one seen, -state_len <= t; circular: t < state_len.
    const auto state_offset = [&](int64_t t) {
      int64_t column = p.cache_seqlens ? seen + t : p.state_len + t;
      if (p.cache_seqlens) column += column < 0 ? p.state_len : column >= p.state_len ? -p.state_len : 0;
      return state + column * p.state_stride.step;
    };

#pragma unroll 1
    for (int64_t s = 0; s < p.steps; ++s) {
      float sum = p.bias ? load_value(p.bias, p.bias_dtype, d * p.bias_stride) : 0.f;
#pragma unroll 1
      for (int64_t w = 0; w < p.width; ++w) {
        const int64_t t = s - (p.width - 1) + w;
        const float v = t < 0 ? load_value(p.state, p.state_dtype, state_offset(t)) : load_value(p.x, p.x_dtype, x + t * p.x_stride.step);
        sum = fmaf(load_value(p.weight, p.weight_dtype, d * p.weight_dim_stride + w * p.weight_width_stride), v, sum);
      }
      store_float(p.y, p.x_dtype, y + s * p.y_stride.step, p.silu ? silu(sum) : sum);
    }
    if (!p.cache_seqlens)
      for (int64_t j = 0; j < p.state_len - p.steps; ++j)
        store_state(p, state + j * p.state_stride.step, p.state, p.state_dtype, state + (j + p.steps) * p.state_stride.step);
    for (int64_t s = p.cache_seqlens ? 0 : greatest(p.steps - p.state_len, 0); s < p.steps; ++s)
      store_state(p, state_offset(p.cache_seqlens ? s : s - p.steps), p.x, p.x_dtype, x + s * p.x_stride.step);
  }
}

// --- launch -----------------------------------------------------------------------------------------------------------

// Do all rows begin on a boundary of `bytes`? A stride of a single row does not count.
bool rows_are_aligned(const void* base, int64_t rows, int64_t row_stride, DType dtype, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && (rows == 1 || row_stride * int64_t(size_of(dtype)) % bytes == 0);
}

template <class T, int kColumns>
bool fits_decode(const Params& p) {
  constexpr int kChannels = kItems<T, kColumns>, kBytes = kChannels * int(sizeof(T));
  return p.steps == 1 && !p.cache_seqlens && p.state_len == kColumns && p.state_dtype == p.x_dtype && filter_is_packed(p) &&
         p.dim % kChannels == 0 && p.x_stride.dim == 1 && p.y_stride.dim == 1 && p.state_stride.step == 1 && p.state_stride.dim == kColumns &&
         rows_are_aligned(p.x, p.batch, p.x_stride.batch, p.x_dtype, kBytes) &&
         rows_are_aligned(p.y, p.batch, p.y_stride.batch, p.x_dtype, kBytes) &&
         rows_are_aligned(p.state, p.pool, p.state_stride.batch, p.x_dtype, 16);
}

// `channels` and `rows` of the batch belong to a thread.
int start(void (*kernel)(Launch), const Params& p, int channels, int rows, void* stream) {
  const int64_t block = int64_t(kThreads) * channels, columns = (p.dim + block - 1) / block;
  const Launch l{p, columns, columns * ((p.batch + rows - 1) / rows)};
  return launch(kernel, dim3(unsigned(least(l.units, max_grid_x()))), dim3(kThreads), 0, stream, l);
}

}  // namespace

int causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, void* stream) {
  if (p.batch == 0 || p.dim == 0) return 0;
  return pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    if (fits_decode<T, 4>(p)) return start(&decode_kernel<T, 4>, p, kItems<T, 4>, kRows<4>, stream);
    if (fits_decode<T, 3>(p)) return start(&decode_kernel<T, 3>, p, kItems<T, 3>, kRows<3>, stream);
    return start(&any_kernel, p, 1, 1, stream);
  });
}

}  // namespace cobra
