// causal_conv1d backward on a CPU. With p the sum before SiLU, computed again, and g = dL/dp (0 outside a sequence):
//   dx[s] = dfinal_states, where s is among the last width - 1, + sum_r weight[width - 1 - r] g[s + r]
//   dweight[w] = sum_t g[t] x[t - (width - 1) + w],   dbias = sum_t g[t]
// A thread owns (channel block, batch row, time chunk) where channels are neighbours in memory, else (batch row, channel, time chunk),
// and writes that chunk's row of `partial`, which a second pass adds up in order. It computes the width - 1 steps of g after its chunk
// again, so nothing is shared. A dx is one chain of multiply-adds, oldest g first, whatever the path: the cut shows in no bit.
#include "causal_conv1d/causal_conv1d_cpu.h"
#include "common/cpu_level.h"

namespace cobra {
COBRA_DECLARE_LEVELS(causal_conv1d_bwd, CausalConv1dBwdParams)

namespace {

constexpr int64_t kRowsChunk = 128;   // channel_last: time steps of a unit of work, which costs width + 1 rows of `partial`
constexpr int64_t kTimeChunk = 1024;  // channel_first

inline bool is_channel_last(const CausalConv1dBwdParams& p) {
  return p.x_stride.dim == 1 && p.dy_stride.dim == 1 && p.dx_stride.dim == 1 && (p.x_stride.seqlen != 1 || p.seqlen == 1);
}
inline int64_t chunks_of(const CausalConv1dBwdParams& p) {
  const int64_t chunk = is_channel_last(p) ? kRowsChunk : kTimeChunk;
  return (p.seqlen + chunk - 1) / chunk;
}

}  // namespace
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

using Params = CausalConv1dBwdParams;

constexpr int64_t kChannelBlock = 2048;  // the rows of g under way and the sums of dweight stay in L2

template <class T>
COBRA_INLINE Vec<T> silu_gradient(Vec<T> p) {
  const Vec<T> one = T(1), s = sigmoid(p);
  return s * fma(p, one - s, one);
}

// --- channel_last -----------------------------------------------------------------------------------------------------

// kSteps rows of g from rows[0 .. width - 1 + kSteps) of x, as conv_rows walks them, and from as many of dy. Adds to `sums`, (width + 1)
// rows `stride` apart: dweight, then dbias. weight, bias, sums and g are padded to whole vectors.
template <class X, class T, int kWidth, int kSteps>
void gradient_rows(const X* const* rows, const X* const* dy, const T* weight, int64_t stride, const T* bias, int64_t width, bool silu,
                   int64_t channels, T* const* g, T* sums, int64_t x_ahead, int64_t dy_ahead) {
  constexpr int kLanes = Vec<T>::kWidth;
  const int64_t taps = kWidth > 0 ? kWidth : width;
  const auto at = [&](int64_t c, auto load_x) {
    Vec<T> sum[kSteps];
    for (int s = 0; s < kSteps; ++s) sum[s] = load(bias + c);
    const auto finish = [&](Vec<T> p, int s) {
      const Vec<T> d = load_x(dy[s] + c), result = silu ? d * silu_gradient(p) : d;
      store(g[s] + c, result);
      return result;
    };
    const auto add = [&](int64_t row, auto&& term) {
      Vec<T> total = load(sums + row * stride + c);
#pragma GCC unroll 16
      for (int s = 0; s < kSteps; ++s) total = term(s, total);
      store(sums + row * stride + c, total);
    };
    if constexpr (kWidth > 0) {
      Vec<T> window[kWidth - 1 + kSteps];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth - 1 + kSteps; ++r) window[r] = load_x(rows[r] + c);
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) {
        const Vec<T> tap = load(weight + w * stride + c);
#pragma GCC unroll 16
        for (int s = 0; s < kSteps; ++s) sum[s] = fma(tap, window[w + s], sum[s]);
      }
#pragma GCC unroll 16
      for (int s = 0; s < kSteps; ++s) sum[s] = finish(sum[s], s);
#pragma GCC unroll 16
      for (int w = 0; w < kWidth; ++w) add(w, [&](int s, Vec<T> total) { return fma(sum[s], window[w + s], total); });
    } else {
      for (int64_t w = 0; w < width; ++w)
        for (int s = 0; s < kSteps; ++s) sum[s] = fma(load(weight + w * stride + c), load_x(rows[w + s] + c), sum[s]);
      for (int s = 0; s < kSteps; ++s) sum[s] = finish(sum[s], s);
      for (int64_t w = 0; w < width; ++w) add(w, [&](int s, Vec<T> total) { return fma(sum[s], load_x(rows[w + s] + c), total); });
    }
    add(taps, [&](int s, Vec<T> total) { return total + sum[s]; });
  };
  const int64_t whole = channels / kLanes * kLanes, left = channels - whole;
  for (int64_t c = 0; c < whole; c += kLanes) {
    for (int s = 0; s < kSteps; ++s) {
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(rows[taps - 1 + s]) + (c + x_ahead) * sizeof(X)), 0);
      __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(dy[s]) + (c + dy_ahead) * sizeof(X)), 0);
    }
    at(c, [](const X* p) { return load(p); });
  }
  if (left > 0) at(whole, [left](const X* p) { return load_n(p, left); });
}

template <class X, class T>
using GradientRows = void (*)(const X* const* rows, const X* const* dy, const T* weight, int64_t stride, const T* bias, int64_t width,
                              bool silu, int64_t channels, T* const* g, T* sums, int64_t x_ahead, int64_t dy_ahead);

// f(std::integral_constant<int, width>) for the widths that have kernels of their own, 0 for the others.
template <class F>
auto for_width(int64_t width, F&& f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 0>());
  }
}

// The filter of a channel block in compute precision, padded to whole vectors; `reversed`: newest tap first, as dx wants it.
template <class T>
struct ChannelFilter {
  const Buffer<T> weight, reversed, bias;

  ChannelFilter(int64_t width, int64_t room) : weight(width * room), reversed(width * room), bias(room) {}
  void load(const Params& p, int64_t room, int64_t d, int64_t channels) const {
    load_columns(weight.data(), room, p.weight, p.weight_dtype, d * p.weight_dim_stride, p.weight_dim_stride, p.weight_width_stride,
                 p.width, channels);
    for (int64_t w = 0; w < p.width; ++w) std::copy_n(weight.data() + w * room, room, reversed.data() + (p.width - 1 - w) * room);
    if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, d * p.bias_stride, p.bias_stride, channels);
  }
};

// Where dfinal_states reaches step s of its sequence, before the start included: `channels` of it from channel d on, else zeros.
template <class T>
bool load_dfinal(const Params& p, T* dst, const Piece& piece, int64_t d, int64_t s, int64_t channels) {
  const int64_t column = s - (piece.stop - (p.width - 1));
  if (!p.dfinal_states || column < 0) return false;
  load_row(dst, p.dfinal_states, p.x_dtype, offset_of(p.dfinal_states_stride, piece.state, d, column), p.dfinal_states_stride.dim, channels);
  return true;
}

// Channels side by side in x, dy and dx. X is the dtype of all three.
template <class X, class T>
void bwd_channel_last(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  const int64_t blocks = ceil_div(p.dim, kChannelBlock), chunks = chunks_of(p), past = p.width - 1, ring_rows = past + 2 * kConvSteps;
  const int64_t room = whole_vectors(std::min(p.dim, kChannelBlock), Vec<T>::kWidth);
  const auto many = for_width(p.width, [](auto w) -> GradientRows<X, T> { return gradient_rows<X, T, w, kConvSteps>; });
  const auto dx_many = for_width(p.width, [](auto w) -> ConvRows<T, T, X> { return conv_rows<T, T, X, w, kConvSteps>; });
  const auto one = gradient_rows<X, T, 0, 1>;  // few steps go one by one: any width serves
  const auto one_staged = gradient_rows<T, T, 0, 1>;
  const auto dx_one = conv_rows<T, T, X, 0, 1>;

  parallel(0, blocks * p.batch * chunks, 1, [&](int64_t first_unit, int64_t last_unit) {
    const ChannelFilter<T> filter(p.width, room);
    const Buffer<T> ring(ring_rows * room), sums((p.width + 1) * room), unwanted((p.width + 1) * room), staged((p.width + 1) * room);
    const Buffer<T> no_g(room), dfinal(room);
    const Buffer<X> no_x(room);
    std::vector<const X*> x_rows(past + kConvSteps);
    std::vector<const T*> g_rows(past + kConvSteps), staged_rows(p.width);
    for (int64_t w = 0; w < p.width; ++w) staged_rows[w] = staged.data() + w * room;
    T* const staged_dy = staged.data() + p.width * room;

    int64_t loaded_block = -1;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t block = unit / (p.batch * chunks), b = unit / chunks % p.batch, chunk = unit % chunks;
      const int64_t d = block * kChannelBlock, channels = std::min(kChannelBlock, p.dim - d);
      if (block != loaded_block) filter.load(p, room, d, channels);
      loaded_block = block;
      std::fill_n(sums.data(), (p.width + 1) * room, T(0));

      const auto x_row = [&](int64_t t) { return static_cast<const X*>(p.x) + offset_of(p.x_stride, b, d, t); };
      const auto dy_row = [&](int64_t t) { return static_cast<const X*>(p.dy) + offset_of(p.dy_stride, b, d, t); };
      const auto dx_row = [&](int64_t t) { return static_cast<X*>(p.dx) + offset_of(p.dx_stride, b, d, t); };
      const auto g_row = [&](int64_t t) { return ring.data() + t % ring_rows * room; };

      // g of `steps` steps from t on; a step at or after `end` belongs to another chunk's sums.
      const auto compute_g = [&](const Piece& piece, int64_t t, int64_t steps) {
        T* g[kConvSteps];
        const X* dy[kConvSteps];
        for (int64_t s = 0; s < steps; ++s) g[s] = g_row(t + s), dy[s] = dy_row(t + s);
        T* const into = t < piece.end ? sums.data() : unwanted.data();
        if (p.initial_states && t - past < piece.start) {
          for (int64_t w = 0; w < p.width; ++w) load_step(p, staged.data() + w * room, piece, b, d, t - past + w, channels);
          load_row(staged_dy, p.dy, p.x_dtype, offset_of(p.dy_stride, b, d, t), 1, channels);
          const T* const staged_dy_row = staged_dy;
          return one_staged(staged_rows.data(), &staged_dy_row, filter.weight.data(), room, filter.bias.data(), p.width, p.silu, channels,
                            g, into, 0, 0);
        }
        const int64_t sequence = p.seq_idx ? seq_idx_at(p, b, t) : 0;
        if (sequence < 0) return;  // padding: its g is never read
        for (int64_t r = 0; r < past + steps; ++r) {
          const int64_t tap = t - past + r;
          const bool counts = tap >= piece.start && (!p.seq_idx || seq_idx_at(p, b, tap) == sequence);
          x_rows[r] = counts ? x_row(tap) : no_x.data();
        }
        (steps == 1 ? one : many)(x_rows.data(), dy, filter.weight.data(), room, filter.bias.data(), p.width, p.silu, channels, g, into,
                                  steps * p.x_stride.seqlen, steps * p.dy_stride.seqlen);
      };
      const auto compute_dx = [&](const Piece& piece, int64_t s, int64_t steps) {
        const int64_t sequence = p.seq_idx ? seq_idx_at(p, b, s) : 0;
        if (sequence < 0) return void(std::copy_n(no_x.data(), channels, dx_row(s)));
        for (int64_t r = 0; r < past + steps; ++r) {
          const int64_t t = s + r;
          g_rows[r] = t < piece.stop && (!p.seq_idx || seq_idx_at(p, b, t) == sequence) ? g_row(t) : no_g.data();
        }
        X* dx[kConvSteps];
        for (int64_t i = 0; i < steps; ++i) dx[i] = dx_row(s + i);
        const T* const first = steps == 1 && load_dfinal(p, dfinal.data(), piece, d, s, channels) ? dfinal.data() : no_g.data();
        (steps == 1 ? dx_one : dx_many)(g_rows.data(), filter.reversed.data(), room, first, p.width, false, channels, dx, 0,
                                        steps * p.dx_stride.seqlen);
      };

      for_each_piece(p, starts, b, chunk * kRowsChunk, std::min(p.seqlen, (chunk + 1) * kRowsChunk), [&](const Piece& piece) {
        if (piece.state < 0) {
          for (int64_t s = piece.begin; s < piece.end; ++s) std::copy_n(no_x.data(), channels, dx_row(s));
          return;
        }
        const int64_t last = std::min(piece.end + past, piece.stop);  // of the steps whose g is wanted
        for (int64_t s = piece.begin, t = piece.begin; s < piece.end;) {
          const bool has_dfinal = p.dfinal_states && s + kConvSteps > piece.stop - past;
          const int64_t steps = !p.seq_idx && !has_dfinal && piece.end - s >= kConvSteps ? kConvSteps : 1;
          while (t < std::min(s + steps + past, last)) {
            const bool plain = !p.seq_idx && (!p.initial_states || t - past >= piece.start);
            const int64_t rows = plain && piece.end - t >= kConvSteps ? kConvSteps : 1;
            compute_g(piece, t, rows);
            t += rows;
          }
          compute_dx(piece, s, steps);
          s += steps;
        }
      });
      for (int64_t w = 0; w <= p.width; ++w)
        std::copy_n(sums.data() + w * room, channels, static_cast<T*>(p.partial) + ((b * chunks + chunk) * (p.width + 1) + w) * p.dim + d);
    }
  });
}

// --- channel_first ----------------------------------------------------------------------------------------------------

// One channel over time, in rows of compute precision. g[0 .. m) holds dy and becomes g; x[1 - width .. m) are the inputs; what lies
// behind, up to a whole vector, is 0. Adds the first n steps to `sums`: dweight, then dbias. kSeqIdx: `same` holds a row of `stride`
// flags per tap, 0 where seq_idx says another sequence and, in the row of the newest tap, where it is negative.
template <class T, int kWidth, bool kSeqIdx>
void gradient_time(const T* x, T* g, int64_t n, int64_t m, const T* weight, T bias, int64_t width, bool silu, Vec<T>* sums, const T* same,
                   int64_t stride) {
  constexpr int64_t kLanes = Vec<T>::kWidth, kMost = kWidth > 0 ? kWidth : 1;
  const int64_t taps = kWidth > 0 ? kWidth : width;
  const Vec<T> zero = T(0);
  const auto tap_at = [&](int64_t t, int64_t w) -> Vec<T> {
    const Vec<T> v = load(x + t + w - (taps - 1));
    if constexpr (kSeqIdx) return where_greater(load(same + w * stride + t), zero, v, zero);
    return v;
  };
  Vec<T> total[kMost + 1], filter[kMost];  // in registers where the width is known: a store to g might change `weight`
  if constexpr (kWidth > 0) {
    for (int w = 0; w <= kWidth; ++w) total[w] = sums[w];
    for (int w = 0; w < kWidth; ++w) filter[w] = weight[w];
  }
  const auto step = [&](int64_t t, int64_t own) {
    Vec<T> sum = bias;
#pragma GCC unroll 16
    for (int64_t w = 0; w < taps; ++w) sum = fma(kWidth > 0 ? filter[w] : Vec<T>(weight[w]), tap_at(t, w), sum);
    Vec<T> result = load(g + t);
    if (silu) result = result * silu_gradient(sum);
    if constexpr (kSeqIdx) result = where_greater(load(same + (taps - 1) * stride + t), zero, result, zero);
    store(g + t, result);
    if (own <= 0) return;
    Vec<T>* const into = kWidth > 0 ? total : sums;
    if (own < kLanes) result = load_n(g + t, own);
#pragma GCC unroll 16
    for (int64_t w = 0; w < taps; ++w) {
      Vec<T> v = tap_at(t, w);
      if (own < kLanes) {  // 0 and not 0 times what another chunk owns
        alignas(64) T lane[kLanes];
        store(lane, v);
        v = load_n(lane, own);
      }
      into[w] = fma(result, v, into[w]);
    }
    into[taps] += result;
  };
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) step(t, kLanes);
  for (; t < m; t += kLanes) step(t, n - t);
  if constexpr (kWidth > 0)
    for (int w = 0; w <= kWidth; ++w) sums[w] = total[w];
}

// dx[0 .. n) of one channel, over whole vectors, from `first`, which holds dfinal_states or 0, and g[0 .. n - 1 + width).
template <class T, int kWidth, bool kSeqIdx>
void dx_time(const T* first, const T* g, int64_t n, const T* weight, int64_t width, const T* same, int64_t stride, T* dx) {
  const int64_t taps = kWidth > 0 ? kWidth : width;
  const Vec<T> zero = T(0);
  Vec<T> filter[kWidth > 0 ? kWidth : 1];
  if constexpr (kWidth > 0)
    for (int w = 0; w < kWidth; ++w) filter[w] = weight[w];
  for (int64_t s = 0; s < n; s += Vec<T>::kWidth) {
    Vec<T> sum = load(first + s);
#pragma GCC unroll 16
    for (int64_t r = 0; r < taps; ++r) {
      Vec<T> v = load(g + s + r);
      if constexpr (kSeqIdx) v = where_greater(load(same + (taps - 1 - r) * stride + s + r), zero, v, zero);
      sum = fma(kWidth > 0 ? filter[taps - 1 - r] : Vec<T>(weight[taps - 1 - r]), v, sum);
    }
    store(dx + s, sum);
  }
}

template <class T>
struct TimeKernels {
  decltype(&gradient_time<T, 0, false>) gradient;
  decltype(&dx_time<T, 0, false>) dx;
};
template <class T>
TimeKernels<T> time_kernels(int64_t width, bool seq_idx) {
  if (seq_idx) return {gradient_time<T, 0, true>, dx_time<T, 0, true>};
  return for_width(width, [](auto w) { return TimeKernels<T>{gradient_time<T, w, false>, dx_time<T, w, false>}; });
}

// One channel at a time, its steps side by side in rows that are staged in L1 in compute precision: any dtype and strides.
template <class T>
void bwd_channel_first(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  constexpr int64_t kLanes = Vec<T>::kWidth;
  const int64_t chunks = chunks_of(p), past = p.width - 1, most = std::min(p.seqlen, kTimeChunk);
  const int64_t front = whole_vectors(past, kLanes), room = whole_vectors(most + past, kLanes) + kLanes;
  const auto kernels = time_kernels<T>(p.width, p.seq_idx);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, most));

  parallel(0, p.batch * chunks * p.dim, grain, [&](int64_t first_unit, int64_t last_unit) {
    const Buffer<T> inputs(front + room), g(room + front), dx(room), first(room), weight(p.width), same(p.seq_idx ? p.width * (room + front) : 0);
    std::vector<Vec<T>> sums(p.width + 1, Vec<T>(T(0)));
    T* const x = inputs.data() + front;
    const int64_t stride = room + front;
    int64_t masked_chunk = -1;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      // Along a row, so that the hardware prefetcher follows it from page to page; seq_idx is looked up once per chunk of all channels.
      const int64_t b = unit / (p.dim * chunks), in_batch = unit % (p.dim * chunks);
      const int64_t d = p.seq_idx ? in_batch % p.dim : in_batch / chunks, chunk = p.seq_idx ? in_batch / p.dim : in_batch % chunks;
      const int64_t slot = b * chunks + chunk, chunk_begin = chunk * kTimeChunk, chunk_end = std::min(p.seqlen, chunk_begin + kTimeChunk);
      load_row(weight.data(), p.weight, p.weight_dtype, d * p.weight_dim_stride, p.weight_width_stride, p.width);
      T bias = T(0);
      if (p.bias) load_row(&bias, p.bias, p.bias_dtype, d * p.bias_stride, 1, 1);
      if (p.seq_idx && masked_chunk != slot) {
        for (int64_t t = chunk_begin; t < std::min(p.seqlen, chunk_end + past); ++t) {
          const int64_t sequence = seq_idx_at(p, b, t);
          for (int64_t w = 0; w < past; ++w) {
            const int64_t tap = t - past + w;
            same[w * stride + t - chunk_begin] = tap >= 0 && sequence >= 0 && seq_idx_at(p, b, tap) == sequence;
          }
          same[past * stride + t - chunk_begin] = sequence >= 0;
        }
        masked_chunk = slot;
      }
      std::fill(sums.begin(), sums.end(), Vec<T>(T(0)));
      for_each_piece(p, starts, b, chunk_begin, chunk_end, [&](const Piece& piece) {
        const int64_t n = piece.end - piece.begin;
        if (piece.state < 0) {
          std::fill_n(dx.data(), n, T(0));
        } else {
          const int64_t m = std::min(n + past, piece.stop - piece.begin), padded = whole_vectors(m, kLanes);
          for (int64_t r = 0; r < past; ++r) load_step(p, x - past + r, piece, b, d, piece.begin - past + r, 1);
          load_row(x, p.x, p.x_dtype, offset_of(p.x_stride, b, d, piece.begin), p.x_stride.seqlen, m);
          load_row(g.data(), p.dy, p.x_dtype, offset_of(p.dy_stride, b, d, piece.begin), p.dy_stride.seqlen, m);
          std::fill(x + m, x + padded, T(0));
          std::fill(g.data() + m, g.data() + padded, T(0));
          kernels.gradient(x, g.data(), n, m, weight.data(), bias, p.width, p.silu, sums.data(), same.data(), stride);
          std::fill(g.data() + m, g.data() + std::min(padded + past + kLanes, room + front), T(0));
          const int64_t with_dfinal = p.dfinal_states ? std::max<int64_t>(0, piece.stop - past - piece.begin) : n;
          for (int64_t i = with_dfinal; i < n; ++i) load_dfinal(p, first.data() + i, piece, d, piece.begin + i, 1);
          kernels.dx(first.data(), g.data(), n, weight.data(), p.width, same.data(), stride, dx.data());
          if (with_dfinal < n) std::fill(first.data() + with_dfinal, first.data() + n, T(0));
        }
        store_row(p.dx, p.x_dtype, offset_of(p.dx_stride, b, d, piece.begin), p.dx_stride.seqlen, dx.data(), n);
      });
      for (int64_t w = 0; w <= p.width; ++w) static_cast<T*>(p.partial)[(slot * (p.width + 1) + w) * p.dim + d] = sums[w].sum();
    }
  });
}

// --- initial states, second stage -------------------------------------------------------------------------------------

// dinitial_states: dx of the width - 1 steps before every sequence.
template <class T>
void initial_states_gradient(const Params& p, const std::vector<int64_t>& starts, const Parallel& parallel) {
  const int64_t past = p.width - 1, states = p.cu_seqlens ? p.num_seqs : p.batch, blocks = ceil_div(p.dim, kChannelBlock);
  const int64_t room = whole_vectors(std::min(p.dim, kChannelBlock), Vec<T>::kWidth);
  parallel(0, states * blocks, 1, [&](int64_t first_unit, int64_t last_unit) {
    const ChannelFilter<T> filter(p.width, room);
    const Buffer<T> g(past * room), staged((p.width + 2) * room), unwanted((p.width + 1) * room), no_g(room), dfinal(room);
    T* const dy = staged.data() + p.width * room;
    T* const dx = dy + room;
    std::vector<const T*> rows(p.width);
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t state = unit / blocks, d = unit % blocks * kChannelBlock, channels = std::min(kChannelBlock, p.dim - d);
      const int64_t b = p.cu_seqlens ? 0 : state;
      const Piece whole = whole_sequence(p, starts, state);
      const int64_t steps = std::min(past, whole.stop - whole.start);  // whose window reaches before the start
      filter.load(p, room, d, channels);
      for (int64_t i = 0; i < steps; ++i) {
        for (int64_t w = 0; w < p.width; ++w) {
          load_step(p, staged.data() + w * room, whole, b, d, whole.start + i - past + w, channels);
          rows[w] = staged.data() + w * room;
        }
        load_row(dy, p.dy, p.x_dtype, offset_of(p.dy_stride, b, d, whole.start + i), p.dy_stride.dim, channels);
        const T* const dy_row = dy;
        T* const g_row = g.data() + i * room;
        gradient_rows<T, T, 0, 1>(rows.data(), &dy_row, filter.weight.data(), room, filter.bias.data(), p.width, p.silu, channels, &g_row,
                                  unwanted.data(), 0, 0);
      }
      for (int64_t j = 0; j < past; ++j) {
        for (int64_t r = 0; r < p.width; ++r) {
          const int64_t i = j - past + r;
          rows[r] = i >= 0 && i < steps ? g.data() + i * room : no_g.data();
        }
        const T* const first = load_dfinal(p, dfinal.data(), whole, d, whole.start - past + j, channels) ? dfinal.data() : no_g.data();
        conv_rows<T, T, T, 0, 1>(rows.data(), filter.reversed.data(), room, first, p.width, false, channels, &dx, 0, 0);
        store_row(p.dinitial_states, p.initial_states_dtype, (state * p.dim + d) * past + j, past, dx, channels);
      }
    }
  });
}

// The pieces of time added in order, so the bits do not depend on the threads.
template <class T>
void reduce_partials(const Params& p, const Parallel& parallel) {
  parallel(0, p.dim, 256, [&](int64_t begin, int64_t end) {
    std::vector<T> sum(end - begin);
    for (int64_t w = 0; w <= p.width; ++w) {
      if (w == p.width && !p.dbias) continue;
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t slot = 0; slot < p.partials; ++slot) {
        const T* const partial = static_cast<const T*>(p.partial) + (slot * (p.width + 1) + w) * p.dim;
        for (int64_t d = begin; d < end; ++d) sum[d - begin] += partial[d];
      }
      if (w < p.width)
        store_row(p.dweight, p.weight_dtype, begin * p.width + w, p.width, sum.data(), end - begin);
      else
        store_row(p.dbias, p.bias_dtype, begin, 1, sum.data(), end - begin);
    }
  });
}

template <class X, class T>
void bwd(const Params& p, const Parallel& parallel) {
  const std::vector<int64_t> starts = sequence_starts(p);
  is_channel_last(p) ? bwd_channel_last<X, T>(p, starts, parallel) : bwd_channel_first<T>(p, starts, parallel);
  if (p.dinitial_states) initial_states_gradient<T>(p, starts, parallel);
  reduce_partials<T>(p, parallel);
}

}  // namespace

void causal_conv1d_bwd(const CausalConv1dBwdParams& p, const Parallel& parallel) {
  switch (p.x_dtype) {
#if defined(COBRA_LEVEL_SCALAR)
    case DType::kFloat64: return bwd<double, double>(p, parallel);
#endif
    case DType::kBFloat16: return bwd<bf16, float>(p, parallel);
    case DType::kFloat16: return bwd<fp16, float>(p, parallel);
    default: return bwd<float, float>(p, parallel);
  }
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

int64_t causal_conv1d_bwd_partials_cpu(const CausalConv1dBwdParams& p) { return p.batch * chunks_of(p); }

void causal_conv1d_bwd_cpu(const CausalConv1dBwdParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::causal_conv1d_bwd(p, parallel) : COBRA_AT_LEVEL(causal_conv1d_bwd)(p, parallel);
}

}  // namespace cobra
#endif
