// causal_conv1d_update on a CPU. A thread owns (channel block, batch row): the columns of the state and the new steps become
// rows of channels in L1, the window slides over them, and the state is moved as raw bits. A decode step on the usual state,
// a few contiguous columns per channel, is transposed in registers both ways; other states are walked column by column.
#include "causal_conv1d_update/causal_conv1d_update.h"
#include "common/conv_window.h"
#include "common/cpu_level.h"
#include "common/vec.h"

#include <algorithm>
#include <vector>

namespace cobra {
COBRA_DECLARE_LEVELS(causal_conv1d_update, CausalConv1dUpdateParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

using Params = CausalConv1dUpdateParams;

constexpr int64_t kChannelBlock = 1024;

// One column of `channels` elements, unconverted: what is kept is kept exactly, NaN payloads included. U is the dtype of the
// state, for 16-bit floats their bits: GCC vectorises integers, not structs.
template <class U>
void copy_column(void* dst, int64_t dst_offset, int64_t dst_stride, const void* src, int64_t src_offset, int64_t src_stride, int64_t channels) {
  U* const to = static_cast<U*>(dst) + dst_offset;
  const U* const from = static_cast<const U*>(src) + src_offset;
  for (int64_t c = 0; c < channels; ++c) to[c * dst_stride] = from[c * src_stride];
}

// The state of n channels, kLength contiguous elements each, as kLength columns; and back, one column later. GCC turns both
// into vector loads, stores and shuffles because kLength is known.
template <class U, int kLength>
void split(U* __restrict columns, const void* state, int64_t offset, int64_t n) {
  const U* __restrict from = static_cast<const U*>(state) + offset;
  for (int64_t c = 0; c < n; ++c)
    for (int j = 0; j < kLength; ++j) columns[j * kChannelBlock + c] = from[c * kLength + j];
}
template <class U, int kLength>
void merge_shifted(void* state, int64_t offset, const U* __restrict columns, int64_t n) {
  U* __restrict to = static_cast<U*>(state) + offset;
  for (int64_t c = 0; c < n; ++c)
    for (int j = 0; j < kLength; ++j) to[c * kLength + j] = columns[(j + 1) * kChannelBlock + c];
}

constexpr int kMaxSplit = 4;  // longest state with code of its own: the window of Mamba

template <class U>
struct Transpose {
  decltype(&split<U, 2>) split = nullptr;
  decltype(&merge_shifted<U, 2>) merge_shifted = nullptr;
};
template <class U>
Transpose<U> transpose_for(int64_t length) {
  switch (length) {
    case 2: return {split<U, 2>, merge_shifted<U, 2>};
    case 3: return {split<U, 3>, merge_shifted<U, 3>};
    case kMaxSplit: return {split<U, kMaxSplit>, merge_shifted<U, kMaxSplit>};
    default: return {};
  }
}

int64_t floor_mod(int64_t a, int64_t n) { return (a % n + n) % n; }

// S is the dtype of the state, T the one computed in.
template <class S, class T>
void update(const Params& p, const Parallel& parallel) {
  const int64_t blocks = (p.dim + kChannelBlock - 1) / kChannelBlock;
  const ConvRows<T, T> conv = conv_rows_for<T, T, 1>(p.width);
  using U = std::conditional_t<sizeof(S) == 2, uint16_t, S>;
  const auto copy = copy_column<U>;
  const bool one_step = p.steps == 1 && !p.cache_seqlens && p.state_stride.step == 1 && p.state_stride.dim == p.state_len;
  const Transpose<U> transpose = one_step ? transpose_for<U>(p.state_len) : Transpose<U>{};
  const int64_t past = p.width - 1;
  const int64_t work = std::min(p.dim, kChannelBlock) * (p.state_len + p.steps);  // elements of one unit

  parallel(0, blocks * p.batch, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)), [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> ring(p.width * kChannelBlock), weight(p.width * kChannelBlock), bias(kChannelBlock), y(kChannelBlock);
    const Buffer<T> zeros(kChannelBlock);
    const Buffer<U> columns(transpose.split ? (kMaxSplit + 1) * kChannelBlock : 0);
    std::vector<T*> rows(p.width);  // oldest first
    std::vector<const T*> taps(p.width);
    T* const y_row = y.data();
    for (int64_t r = 0; r < p.width; ++r) rows[r] = ring.data() + r * kChannelBlock;

    int64_t loaded_block = -1;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t block = unit / p.batch, b = unit % p.batch, d = block * kChannelBlock;
      const int64_t channels = std::min(kChannelBlock, p.dim - d);
      const auto x_offset = [&](int64_t s) { return b * p.x_stride.batch + d * p.x_stride.dim + s * p.x_stride.step; };
      const auto store_y = [&](int64_t s, const T* row) {
        store_row(p.y, p.x_dtype, b * p.y_stride.batch + d * p.y_stride.dim + s * p.y_stride.step, p.y_stride.dim, row, channels);
      };

      int64_t slot = p.indices ? load_index(p.indices, p.indices_dtype, b * p.indices_stride) : b;
      slot = std::min(slot, p.pool - 1);  // a bad index gives wrong numbers, not an access outside the pool
      if (slot < 0) {
        for (int64_t s = 0; s < p.steps; ++s) store_y(s, zeros.data());
        continue;
      }
      if (block != loaded_block) {
        load_columns(weight.data(), kChannelBlock, p.weight, p.weight_dtype, d * p.weight_dim_stride, p.weight_dim_stride,
                     p.weight_width_stride, p.width, channels);
        if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, d * p.bias_stride, p.bias_stride, channels);
        loaded_block = block;
      }

      const int64_t state_offset = slot * p.state_stride.batch + d * p.state_stride.dim;
      const int64_t seen = p.cache_seqlens ? load_index(p.cache_seqlens, p.cache_seqlens_dtype, b * p.cache_seqlens_stride) : 0;
      // Column of the state that holds, or will hold, the input `t` steps after the last one seen (t < 0: before).
      const auto column = [&](int64_t t) { return p.cache_seqlens ? floor_mod(floor_mod(seen, p.state_len) + t, p.state_len) : p.state_len + t; };

      // The new column of the state: the same bits where the dtypes agree.
      const auto store_new = [&](void* state, int64_t offset, int64_t stride, int64_t s) {
        if (p.state_dtype == p.x_dtype) {
          copy(state, offset, stride, p.x, x_offset(s), p.x_stride.dim, channels);
        } else {
          load_row(rows[past], p.x, p.x_dtype, x_offset(s), p.x_stride.dim, channels);
          store_row(state, p.state_dtype, offset, stride, rows[past], channels);
        }
      };

      if (transpose.split) {
        transpose.split(columns.data(), p.state, state_offset, channels);
        const U* const window = columns.data() + (p.state_len - past) * kChannelBlock;
        if constexpr (std::is_same_v<S, T>) {
          for (int64_t r = 0; r < p.width; ++r) taps[r] = window + r * kChannelBlock;
        } else {
          for (int64_t r = 0; r < past; ++r) load_row_as(rows[r], reinterpret_cast<const S*>(window + r * kChannelBlock), 1, channels);
          load_row(rows[past], p.x, p.x_dtype, x_offset(0), p.x_stride.dim, channels);
          std::copy(rows.begin(), rows.end(), taps.begin());
        }
        store_new(columns.data(), p.state_len * kChannelBlock, 1, 0);
        transpose.merge_shifted(p.state, state_offset, columns.data(), channels);
        conv(taps.data(), weight.data(), kChannelBlock, bias.data(), p.width, p.silu, channels, &y_row, 0, 0);
        store_y(0, y_row);
        continue;
      }

      for (int64_t r = 0; r < past; ++r)
        load_row(rows[r], p.state, p.state_dtype, state_offset + column(r - past) * p.state_stride.step, p.state_stride.dim, channels);
      const int64_t kept = p.cache_seqlens ? 0 : std::max<int64_t>(0, p.state_len - p.steps);
      for (int64_t j = 0; j < kept; ++j) {
        const int64_t to = state_offset + j * p.state_stride.step;
        copy(p.state, to, p.state_stride.dim, p.state, to + p.steps * p.state_stride.step, p.state_stride.dim, channels);
      }
      for (int64_t s = 0; s < p.steps; ++s) {
        load_row(rows[past], p.x, p.x_dtype, x_offset(s), p.x_stride.dim, channels);
        const int64_t target = p.cache_seqlens ? column(s) : p.state_len - p.steps + s;
        if (target >= 0) store_new(p.state, state_offset + target * p.state_stride.step, p.state_stride.dim, s);
        conv(rows.data(), weight.data(), kChannelBlock, bias.data(), p.width, p.silu, channels, &y_row, 0, 0);
        store_y(s, y_row);
        std::rotate(rows.begin(), rows.begin() + 1, rows.end());
      }
    }
  });
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p, const Parallel& parallel) {
  switch (p.state_dtype) {
#if defined(COBRA_LEVEL_SCALAR)
    case DType::kFloat64: return update<double, double>(p, parallel);
#endif
    case DType::kBFloat16: return update<bf16, float>(p, parallel);
    case DType::kFloat16: return update<fp16, float>(p, parallel);
    default: return update<float, float>(p, parallel);
  }
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void causal_conv1d_update_cpu(const CausalConv1dUpdateParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::causal_conv1d_update(p, parallel) : COBRA_AT_LEVEL(causal_conv1d_update)(p, parallel);
}

}  // namespace cobra
#endif
