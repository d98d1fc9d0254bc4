// causal_conv1d_update on a CPU. A thread owns (channel block, batch row): the columns of the state and the new steps become
// rows of channels in L1, the window slides over them, and the state is moved as raw bits.
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

constexpr int64_t kChannelBlock = 256;

// One column of `channels` elements as bits: what is kept is kept exactly, NaN payloads included.
template <class Bits>
void copy_bits(void* dst, int64_t dst_offset, int64_t dst_stride, const void* src, int64_t src_offset, int64_t src_stride, int64_t channels) {
  Bits* const to = static_cast<Bits*>(dst) + dst_offset;
  const Bits* const from = static_cast<const Bits*>(src) + src_offset;
  for (int64_t c = 0; c < channels; ++c) to[c * dst_stride] = from[c * src_stride];
}
using CopyBits = decltype(&copy_bits<uint16_t>);

CopyBits copy_bits_for(DType dtype) {
  switch (size_of(dtype)) {
    case 2: return copy_bits<uint16_t>;
    case 4: return copy_bits<uint32_t>;
    default: return copy_bits<uint64_t>;
  }
}

int64_t floor_mod(int64_t a, int64_t n) { return (a % n + n) % n; }

template <class T>
void update(const Params& p, const Parallel& parallel) {
  const int64_t blocks = (p.dim + kChannelBlock - 1) / kChannelBlock;
  const ConvRows<T, T> conv = conv_rows_for<T, T, 1>(p.width);
  const CopyBits copy = copy_bits_for(p.state_dtype);
  const int64_t past = p.width - 1;
  const int64_t work = std::min(p.dim, kChannelBlock) * (p.state_len + p.steps);  // elements of one unit

  parallel(0, blocks * p.batch, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)), [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> ring(p.width * kChannelBlock), weight(p.width * kChannelBlock), bias(kChannelBlock), y(kChannelBlock);
    const Buffer<T> zeros(kChannelBlock);
    std::vector<T*> rows(p.width);  // oldest first
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
        for (int64_t w = 0; w < p.width; ++w)
          load_row(weight.data() + w * kChannelBlock, p.weight, p.weight_dtype, d * p.weight_dim_stride + w * p.weight_width_stride,
                   p.weight_dim_stride, channels);
        if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, d * p.bias_stride, p.bias_stride, channels);
        loaded_block = block;
      }

      const int64_t state_offset = slot * p.state_stride.batch + d * p.state_stride.dim;
      const int64_t seen = p.cache_seqlens ? load_index(p.cache_seqlens, p.cache_seqlens_dtype, b * p.cache_seqlens_stride) : 0;
      // Column of the state that holds, or will hold, the input `t` steps after the last one seen (t < 0: before).
      const auto column = [&](int64_t t) { return p.cache_seqlens ? floor_mod(floor_mod(seen, p.state_len) + t, p.state_len) : p.state_len + t; };

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
        if (target >= 0) {
          const int64_t to = state_offset + target * p.state_stride.step;
          if (p.state_dtype == p.x_dtype) {
            copy(p.state, to, p.state_stride.dim, p.x, x_offset(s), p.x_stride.dim, channels);
          } else {
            store_row(p.state, p.state_dtype, to, p.state_stride.dim, rows[past], channels);
          }
        }
        conv(rows.data(), weight.data(), kChannelBlock, bias.data(), p.width, p.silu, channels, &y_row, 0, 0);
        store_y(s, y_row);
        std::rotate(rows.begin(), rows.begin() + 1, rows.end());
      }
    }
  });
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.x_dtype == DType::kFloat64) return update<double>(p, parallel);
#endif
  update<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void causal_conv1d_update_cpu(const CausalConv1dUpdateParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::causal_conv1d_update(p, parallel) : COBRA_AT_LEVEL(causal_conv1d_update)(p, parallel);
}

}  // namespace cobra
#endif
