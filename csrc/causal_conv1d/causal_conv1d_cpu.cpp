// causal_conv1d on a CPU. A thread owns (channel block, batch row, time chunk) where channels are neighbours in memory, else
// (batch row, time chunk, channel). It reads the width - 1 steps before its chunk again, so nothing is shared. Outputs whose
// window touches an initial state, and tensors with strides, go through rows in compute precision; the rest reads x and
// writes y directly. Both are the same chain of multiply-adds, so the cut shows in no bit.
#include "causal_conv1d/causal_conv1d_cpu.h"
#include "common/cpu_level.h"

namespace cobra {
COBRA_DECLARE_LEVELS(causal_conv1d_fwd, CausalConv1dFwdParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

using Params = CausalConv1dFwdParams;

constexpr int64_t kChannelBlock = 8192;  // channel_last: long runs along a row of x keep the hardware prefetcher going
constexpr int64_t kRowsChunk = 16;       // channel_last: time steps of a unit of work
constexpr int64_t kTimeChunk = 1024;     // channel_first: time steps of a unit of work

// Channels side by side in x and y: rows of x are read where they lie. X is the dtype of both.
template <class X, class T>
void fwd_channel_last(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  const int64_t blocks = ceil_div(p.dim, kChannelBlock), chunks = ceil_div(p.seqlen, kRowsChunk), past = p.width - 1;
  const int64_t room = whole_vectors(std::min(p.dim, kChannelBlock), Vec<T>::kWidth);
  const auto many = conv_rows_for<X, T, kConvSteps>(p.width), one = conv_rows_for<X, T, 1>(p.width);
  const auto one_staged = conv_rows_for<T, T, 1>(p.width);

  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, room * std::min(p.seqlen, kRowsChunk)));

  parallel(0, blocks * p.batch * chunks, grain, [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> weight(p.width * room), bias(room), staged((p.width + 1) * room);
    const Buffer<X> zeros(room);
    std::vector<const X*> rows(past + kConvSteps);
    std::vector<const T*> staged_rows(p.width);
    for (int64_t w = 0; w < p.width; ++w) staged_rows[w] = staged.data() + w * room;
    T* const staged_y = staged.data() + p.width * room;

    int64_t loaded_block = -1;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t block = unit / (p.batch * chunks), b = unit / chunks % p.batch, chunk = unit % chunks;
      const int64_t d = block * kChannelBlock, channels = std::min(kChannelBlock, p.dim - d);
      if (block != loaded_block) {
        load_columns(weight.data(), room, p.weight, p.weight_dtype, d * p.weight_dim_stride, p.weight_dim_stride, p.weight_width_stride,
                     p.width, channels);
        if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, d * p.bias_stride, p.bias_stride, channels);
        loaded_block = block;
      }
      const auto x_row = [&](int64_t t) { return static_cast<const X*>(p.x) + offset_of(p.x_stride, b, d, t); };
      const auto y_row = [&](int64_t t) { return static_cast<X*>(p.y) + offset_of(p.y_stride, b, d, t); };
      const int64_t chunk_end = std::min(p.seqlen, (chunk + 1) * kRowsChunk);
      for_each_piece(p, starts, b, chunk * kRowsChunk, chunk_end, [&](const Piece& piece) {
        if (piece.state < 0) {
          for (int64_t t = piece.begin; t < piece.end; ++t) std::copy_n(zeros.data(), channels, y_row(t));
          return;
        }
        for (int64_t t = piece.begin; t < piece.end;) {
          if (p.initial_states && t - past < piece.start) {
            for (int64_t w = 0; w < p.width; ++w)
              load_step(p, staged.data() + w * room, piece, b, d, t - past + w, channels);
            one_staged(staged_rows.data(), weight.data(), room, bias.data(), p.width, p.silu, channels, &staged_y, 0, 0);
            store_row(p.y, p.x_dtype, offset_of(p.y_stride, b, d, t), 1, staged_y, channels);
            ++t;
            continue;
          }
          const int64_t steps = !p.seq_idx && piece.end - t >= kConvSteps ? kConvSteps : 1;
          const int64_t sequence = p.seq_idx ? seq_idx_at(p, b, t) : 0;
          for (int64_t r = 0; r < past + steps; ++r) {
            const int64_t tap = t - past + r;
            const bool counts = tap >= piece.start && (!p.seq_idx || seq_idx_at(p, b, tap) == sequence);
            rows[r] = counts ? x_row(tap) : zeros.data();
          }
          X* y[kConvSteps];
          for (int64_t s = 0; s < steps; ++s) y[s] = y_row(t + s);
          if (sequence < 0) {
            std::copy_n(zeros.data(), channels, y[0]);
          } else {
            (steps == 1 ? one : many)(rows.data(), weight.data(), room, bias.data(), p.width, p.silu, channels, y,
                                        steps * p.x_stride.seqlen, steps * p.y_stride.seqlen);
          }
          t += steps;
        }
      });
    }
  });
}

// Outputs 0 .. n - 1 of one channel from its inputs x[1 - width .. n - 1]; n is at least a whole vector. The last vector
// overlaps the one before it.
template <class X, class T, int kWidth>
void conv_time(const X* x, int64_t n, const T* weight, T bias, int64_t width, bool silu, X* y) {
  constexpr int64_t kLanes = Vec<T>::kWidth;
  const auto sum_at = [&](int64_t t) {
    const X* const oldest = x + t - (kWidth > 0 ? kWidth - 1 : width - 1);
    Vec<T> sum = bias;
    if constexpr (kWidth > 0) {
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) sum = fma(Vec<T>(weight[w]), load(oldest + w), sum);
    } else {
      for (int64_t w = 0; w < width; ++w) sum = fma(Vec<T>(weight[w]), load(oldest + w), sum);
    }
    return sum;
  };
  if constexpr (std::is_same_v<X, T>) {
    for (int64_t next = 0; next < n; next += kLanes) {
      const int64_t t = std::min(next, n - kLanes);
      const Vec<T> sum = sum_at(t);
      store(y + t, silu ? cobra::COBRA_LEVEL::silu(sum) : sum);
    }
  } else {
    alignas(64) T tile[kConvTile];
    for (int64_t next = 0; next < n; next += kConvTile) {
      const int64_t begin = std::min(next, n - kLanes), count = std::min(kConvTile, n - begin);
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t t = std::min(i, count - kLanes);
        store(tile + t, sum_at(begin + t));
      }
      store_tile(y + begin, tile, count, silu);
    }
  }
}

// The same with seq_idx, over whole vectors: `same` holds one row of `stride` flags per tap, 0 where seq_idx says another
// sequence and, in the row of the newest tap, where it is negative.
template <class T>
void conv_time_seq_idx(const T* x, int64_t n, const T* weight, T bias, int64_t width, bool silu, const T* same, int64_t stride, T* y) {
  const Vec<T> zero = T(0);
  for (int64_t t = 0; t < n; t += Vec<T>::kWidth) {
    Vec<T> sum = bias;
    for (int64_t w = 0; w < width; ++w)
      sum = fma(Vec<T>(weight[w]), where_greater(load(same + w * stride + t), zero, load(x + t + w - (width - 1)), zero), sum);
    if (silu) sum = cobra::COBRA_LEVEL::silu(sum);
    store(y + t, where_greater(load(same + (width - 1) * stride + t), zero, sum, zero));
  }
}

template <class X, class T>
using ConvTime = void (*)(const X* x, int64_t n, const T* weight, T bias, int64_t width, bool silu, X* y);

template <class X, class T>
ConvTime<X, T> conv_time_for(int64_t width) {
  switch (width) {
    case 1: return conv_time<X, T, 1>;
    case 2: return conv_time<X, T, 2>;
    case 3: return conv_time<X, T, 3>;
    case 4: return conv_time<X, T, 4>;
    case 5: return conv_time<X, T, 5>;
    case 6: return conv_time<X, T, 6>;
    case 7: return conv_time<X, T, 7>;
    case 8: return conv_time<X, T, 8>;
    default: return conv_time<X, T, 0>;
  }
}

// Time steps side by side, one channel at a time, the window by shifted loads. Any other strides too: `direct` is false then
// and every step is staged.
template <class X, class T>
void fwd_channel_first(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  const int64_t chunks = ceil_div(p.seqlen, kTimeChunk), past = p.width - 1;
  const int64_t room = whole_vectors(std::min(p.seqlen, kTimeChunk), Vec<T>::kWidth), front = whole_vectors(past, Vec<T>::kWidth);
  const bool direct = p.x_stride.seqlen == 1 && p.y_stride.seqlen == 1 && !p.seq_idx;
  const auto conv = conv_time_for<X, T>(p.width);
  const auto conv_staged = conv_time_for<T, T>(p.width);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, room));

  parallel(0, p.batch * chunks * p.dim, grain, [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> inputs(front + room), y(room), weight(p.width), same(p.seq_idx ? p.width * room : 0);
    T* const x = inputs.data() + front;
    int64_t masked_chunk = -1;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      // Along a row, so that the hardware prefetcher follows it from page to page; seq_idx is looked up once per chunk of all channels.
      const int64_t b = unit / (p.dim * chunks), in_batch = unit % (p.dim * chunks);
      const int64_t d = p.seq_idx ? in_batch % p.dim : in_batch / chunks, chunk = p.seq_idx ? in_batch / p.dim : in_batch % chunks;
      const int64_t chunk_of_batch = b * chunks + chunk;
      const int64_t chunk_begin = chunk * kTimeChunk, chunk_end = std::min(p.seqlen, chunk_begin + kTimeChunk);
      load_row(weight.data(), p.weight, p.weight_dtype, d * p.weight_dim_stride, p.weight_width_stride, p.width);
      T bias = T(0);
      if (p.bias) load_row(&bias, p.bias, p.bias_dtype, d * p.bias_stride, 1, 1);
      if (p.seq_idx && masked_chunk != chunk_of_batch) {
        for (int64_t t = chunk_begin; t < chunk_end; ++t) {
          const int64_t sequence = seq_idx_at(p, b, t);
          for (int64_t w = 0; w < past; ++w) {
            const int64_t tap = t - past + w;
            same[w * room + t - chunk_begin] = tap >= 0 && seq_idx_at(p, b, tap) == sequence;
          }
          same[past * room + t - chunk_begin] = sequence >= 0;
        }
        masked_chunk = chunk_of_batch;
      }
      for_each_piece(p, starts, b, chunk_begin, chunk_end, [&](const Piece& piece) {
        const int64_t n = piece.end - piece.begin;
        // The first outputs are staged where their window starts before the sequence; all of them when nothing is direct.
        const int64_t before = std::clamp<int64_t>(past - (piece.begin - piece.start), 0, past);
        const int64_t staged = direct && n - before >= Vec<T>::kWidth ? before : n;
        if (piece.state < 0) {
          std::fill_n(y.data(), n, T(0));
        } else if (staged > 0) {
          for (int64_t r = 0; r < past; ++r) load_step(p, x - past + r, piece, b, d, piece.begin - past + r, 1);
          load_row(x, p.x, p.x_dtype, offset_of(p.x_stride, b, d, piece.begin), p.x_stride.seqlen, staged);
          if (p.seq_idx) {
            conv_time_seq_idx(x, staged, weight.data(), bias, p.width, p.silu, same.data(), room, y.data());
          } else {
            conv_staged(x, whole_vectors(staged, Vec<T>::kWidth), weight.data(), bias, p.width, p.silu, y.data());
          }
        }
        store_row(p.y, p.x_dtype, offset_of(p.y_stride, b, d, piece.begin), p.y_stride.seqlen, y.data(), piece.state < 0 ? n : staged);
        if (piece.state >= 0 && staged < n)
          conv(static_cast<const X*>(p.x) + offset_of(p.x_stride, b, d, piece.begin + staged), n - staged, weight.data(), bias, p.width, p.silu,
               static_cast<X*>(p.y) + offset_of(p.y_stride, b, d, piece.begin + staged));
      });
    }
  });
}

// The last width - 1 inputs of every sequence, initial state included where it is shorter than that.
template <class T>
void copy_final_states(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  const int64_t columns = p.width - 1, states = p.cu_seqlens ? p.num_seqs : p.batch, blocks = ceil_div(p.dim, kChannelBlock);
  parallel(0, states * blocks, 4, [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> step(kChannelBlock);
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t state = unit / blocks, d = unit % blocks * kChannelBlock, channels = std::min(kChannelBlock, p.dim - d);
      const Piece whole = whole_sequence(p, starts, state);
      for (int64_t j = 0; j < columns; ++j) {
        load_step(p, step.data(), whole, p.cu_seqlens ? 0 : state, d, whole.end - columns + j, channels);
        store_row(p.final_states, p.x_dtype, (state * p.dim + d) * columns + j, columns, step.data(), channels);
      }
    }
  });
}

template <class X, class T>
void fwd(const Params& p, const Parallel& parallel) {
  const std::vector<int64_t> starts = sequence_starts(p);
  const bool channel_last = p.x_stride.dim == 1 && p.y_stride.dim == 1 && (p.x_stride.seqlen != 1 || p.seqlen == 1);
  channel_last ? fwd_channel_last<X, T>(p, starts, parallel) : fwd_channel_first<X, T>(p, starts, parallel);
  if (p.final_states) copy_final_states<T>(p, starts, parallel);
}

}  // namespace

void causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Parallel& parallel) {
  switch (p.x_dtype) {
#if defined(COBRA_LEVEL_SCALAR)
    case DType::kFloat64: return fwd<double, double>(p, parallel);
#endif
    case DType::kBFloat16: return fwd<bf16, float>(p, parallel);
    case DType::kFloat16: return fwd<fp16, float>(p, parallel);
    default: return fwd<float, float>(p, parallel);
  }
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void causal_conv1d_fwd_cpu(const CausalConv1dFwdParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::causal_conv1d_fwd(p, parallel) : COBRA_AT_LEVEL(causal_conv1d_fwd)(p, parallel);
}

}  // namespace cobra
#endif
