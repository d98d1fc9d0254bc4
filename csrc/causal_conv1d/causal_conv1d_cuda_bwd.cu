// causal_conv1d backward on a GPU. With p the sum before SiLU, computed again, and g = dL/dp (0 outside a sequence):
//   dx[s] = dfinal_states, where s is among the last width - 1, + sum_r weight[width - 1 - r] g[s + r]
//   dweight[w] = sum_t g[t] x[t - (width - 1) + w],   dbias = sum_t g[t]
// A dx is one chain of multiply-adds, oldest g first, in every kernel. Three kernels differ in who owns a step:
//   channel_last   x, dy and dx have stride 1 along dim and rows of whole packs: a thread owns a pack of neighbouring channels and walks
//                  time; x and g slide through its registers and dx follows width - 1 steps behind;
//   channel_first  they have stride 1 along seqlen: a thread owns granules of 8 neighbouring steps, 16-byte aligned wherever its row begins,
//                  and computes the width - 1 steps of g after them again;
//   any            any strides, any width: a thread owns a channel and a chunk of time and reads every tap.
// A thread sums dweight and dbias of its steps, a block those of its threads, into one row of `partial`; the last kernel adds the rows.
// Which steps make a row, and the order, follow from sizes and layout: the same bits on every run. R: the type of the arithmetic.
#include "causal_conv1d/causal_conv1d_cuda.cuh"

namespace cobra {
namespace {

using Params = CausalConv1dBwdParams;

constexpr int kThreads = 128;
constexpr int kStepsAhead = 3;                  // channel_last: rows of x and dy under way while those before are computed
constexpr int kMinChunk = 16, kMaxChunk = 128;  // channel_last: steps per thread
constexpr int kFirstItems = 8;                  // channel_first: steps of a granule
constexpr int kFirstRounds = 16;                // channel_first: granules per lane
constexpr int kAnyChunk = 64;                   // any: steps per thread
constexpr int kStateItems = 4;                  // dinitial_states: elements per thread
constexpr int kColumns = 32, kSegments = 8;     // last kernel: channels per block, runs of rows that are added apart

struct Launch {
  Params p;
  int64_t units;          // blocks' worth of work
  int64_t columns;        // channel_last, any: blocks side by side along dim
  int64_t slots, chunks;  // time chunks of all rows, of one; rows: of the batch (channel_last, any), of batch and dim (channel_first)
  int64_t chunk;          // steps (channel_last, any) or granules (channel_first) of a chunk
};

template <class R>
__device__ __forceinline__ R silu_gradient(R p) {
  const R s = sigmoid(p);
  return s * multiply_add(p, R(1) - s, R(1));
}

// --- one at a time ----------------------------------------------------------------------------------------------------

// The input at step `tap` as step t of the same sequence sees it.
template <class R>
__device__ __forceinline__ R input_at(const Params& p, int64_t b, int64_t d, int64_t t, int64_t tap, const Sequence& sequence) {
  if (tap < sequence.start) return before_start<R>(p, sequence.state, d, sequence.start - tap);
  return counts(p, b, t, tap) ? load_value<R>(p.x, p.x_dtype, at(p.x_stride, b, d, tap)) : R(0);
}

template <class R>
__device__ __forceinline__ R weight_at(const Params& p, int64_t d, int64_t w) {
  return load_value<R>(p.weight, p.weight_dtype, d * p.weight_dim_stride + w * p.weight_width_stride);
}

// g of a step of the sequence, whatever the case.
template <class R>
__device__ __forceinline__ R gradient_at(const Params& p, int64_t b, int64_t d, int64_t t, const Sequence& sequence) {
  const R dy = load_value<R>(p.dy, p.x_dtype, at(p.dy_stride, b, d, t));
  if (!p.silu) return dy;
  R sum = p.bias ? load_value<R>(p.bias, p.bias_dtype, d * p.bias_stride) : R(0);
#pragma unroll 1
  for (int64_t w = 0; w < p.width; ++w) sum = multiply_add(weight_at<R>(p, d, w), input_at<R>(p, b, d, t, t - (p.width - 1) + w, sequence), sum);
  return dy * silu_gradient(sum);
}

// What dfinal_states adds at step s of the sequence, before its start included.
template <class R>
__device__ __forceinline__ R dfinal_at(const Params& p, int64_t d, int64_t s, const Sequence& sequence) {
  const int64_t column = s - (sequence.end - (p.width - 1));
  if (!p.dfinal_states || column < 0) return R(0);
  return load_value<R>(p.dfinal_states, p.x_dtype, at(p.dfinal_states_stride, sequence.state, d, column));
}

// dx of step s, or of one of the width - 1 steps before the start of the sequence.
template <class R>
__device__ __forceinline__ R dx_at(const Params& p, int64_t b, int64_t d, int64_t s, const Sequence& sequence) {
  R sum = dfinal_at<R>(p, d, s, sequence);
#pragma unroll 1
  for (int64_t t = greatest(s, sequence.start); t < least(s + p.width, sequence.end); ++t)
    if (s < sequence.start || counts(p, b, s, t)) sum = multiply_add(weight_at<R>(p, d, p.width - 1 - (t - s)), gradient_at<R>(p, b, d, t, sequence), sum);
  return sum;
}

// dinitial_states: dx of the width - 1 steps before every sequence.
template <class R>
__global__ void __launch_bounds__(kThreads) initial_states_kernel(const __grid_constant__ Launch l) {
  const Params& p = l.p;
  const int64_t past = p.width - 1, total = (p.cu_seqlens ? p.num_seqs : p.batch) * p.dim * past;
  for (int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x; element < total; element += int64_t(gridDim.x) * kThreads) {
    const auto [channel, column] = divide(element, past);
    const auto [state, d] = divide(channel, p.dim);
    Sequence sequence = {state, 0, p.seqlen};
    if (p.cu_seqlens) sequence.end = boundary(p, state + 1), sequence.start = least(boundary(p, state), sequence.end);
    const R v = dx_at<R>(p, p.cu_seqlens ? 0 : state, d, sequence.start - past + column, sequence);
    store_real<R>(p.dinitial_states, p.initial_states_dtype, element, v);
  }
}

// --- channel_last -----------------------------------------------------------------------------------------------------

// Channels per thread: 16 bytes, and 4 where 8 taps of 8 channels would fill the registers.
template <class T, int kTaps>
constexpr int kLastItems = kTaps == kMaxTaps ? 4 : 16 / int(sizeof(T));

// Sums over threadIdx.y, in order, of the channels that a block's threads hold side by side, into one row of `partial`.
template <class R, int kItems, int kTaps>
__device__ __forceinline__ void store_block_sums(const Launch& l, const R (&dweight)[kItems][kTaps], const R (&dbias)[kItems], int64_t row,
                                                 int64_t column) {
  constexpr int kPitch = kThreads + kWarp / kItems;  // so that the items of a thread lie in different banks
  COBRA_SHARED(R[(kTaps + 1) * kItems * kPitch], shared);
  const Params& p = l.p;
  const int lanes = int(blockDim.x), thread = int(threadIdx.y) * lanes + int(threadIdx.x), channels = lanes * kItems;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
#pragma unroll
    for (int w = 0; w < kTaps; ++w) shared[(w * kItems + i) * kPitch + thread] = dweight[i][w];
    shared[(kTaps * kItems + i) * kPitch + thread] = dbias[i];
  }
  __syncthreads();
  const int first = kTaps - int(p.width);
  for (int n = thread; n < (kTaps + 1) * channels; n += kThreads) {
    const int w = n / channels, c = n % channels;
    const int64_t d = column * channels + c;
    if (w < first || d >= p.dim) continue;
    const R* const items = shared + (w * kItems + c % kItems) * kPitch + c / kItems;
    R sum = R(0);
    for (int group = 0; group < int(blockDim.y); ++group) sum += items[group * lanes];
    static_cast<R*>(p.partial)[(row * (p.width + 1) + w - first) * p.dim + d] = sum;
  }
  __syncthreads();  // before the next unit overwrites `shared`
}

// A block owns blockDim.x packs of channels and blockDim.y chunks of time.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, 2) channel_last_bwd_kernel(const __grid_constant__ Launch l) {
  constexpr int kItems = kLastItems<T, kTaps>, kPast = kTaps - 1;
  using R = Real<T>;
  using Row = Words<T, kItems>;
  const Params& p = l.p;
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    const auto [line, column] = divide(unit, l.columns);
    const int64_t d = (column * blockDim.x + threadIdx.x) * kItems, slot = line * blockDim.y + threadIdx.y;
    const bool active = d < p.dim && slot < l.slots;
    R dweight[kItems][kTaps] = {}, dbias[kItems] = {};

    if (active) {
      const auto [b, chunk] = divide(slot, l.chunks);
      const Filter<kItems, kTaps, R> filter(p, d);
      const int64_t chunk_end = least((chunk + 1) * l.chunk, p.seqlen);
      const T* const x_row = static_cast<const T*>(p.x) + at(p.x_stride, b, d, 0);
      const T* const dy_row = static_cast<const T*>(p.dy) + at(p.dy_stride, b, d, 0);
      T* const dx_row = static_cast<T*>(p.dx) + at(p.dx_stride, b, d, 0);
      Sequence sequence;

      // A walk over steps [begin, end) of one sequence, or of one value of seq_idx, and on to `stop`, where g reaches no dx of them.
      int64_t end;
#pragma unroll 1
      for (int64_t begin = chunk * l.chunk; begin < chunk_end; begin = end) {
        find_sequence(p, b, begin, sequence);
        end = least(chunk_end, sequence.end);
        int64_t own = 0;
        if (p.seq_idx) {
          own = seq_idx_at(p, b, begin);
          const int64_t most = end;
          for (end = begin + 1; end < most && seq_idx_at(p, b, end) == own;) ++end;
        }
        if (sequence.state < 0 || own < 0) {
#pragma unroll 1
          for (int64_t s = begin; s < end; ++s) store_words<T, kItems>(dx_row + s * p.dx_stride.seqlen, Row{});
          continue;
        }
        // From here on steps count from `begin`. Rows of x and dy outside the sequence are 0, and so is g.
        const int steps = int(end - begin), last = int(least(end + kPast, sequence.end) - begin);
        const auto load_row = [&, b = b](const T* row, int t) {
          Row words{};
          if (t < steps || (t < last && (!p.seq_idx || seq_idx_at(p, b, begin + t) == own))) words = load_words<T, kItems>(row);
          return words;
        };
        const T* x_next = x_row + begin * p.x_stride.seqlen;
        const T* dy_next = dy_row + begin * p.dy_stride.seqlen;
        T* dx_next = dx_row + begin * p.dx_stride.seqlen;
        R x[kPast + kStepsAhead][kItems];  // of steps t - kPast .. t + kStepsAhead - 1
        R g[kPast + kStepsAhead][kItems];
#pragma unroll
        for (int r = 0; r < kPast; ++r) {
          const int64_t t = begin - kPast + r;
          Row row{};
          if (t >= sequence.start && (!p.seq_idx || seq_idx_at(p, b, t) == own)) row = load_words<T, kItems>(x_row + t * p.x_stride.seqlen);
          const bool before = t < sequence.start && p.initial_states;
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            x[r][i] = before ? before_start<R>(p, sequence.state, d + i, sequence.start - t) : row.value(i);
            g[r][i] = R(0);
          }
        }
        Row x_rows[kStepsAhead], dy_rows[kStepsAhead];  // under way
#pragma unroll
        for (int s = 0; s < kStepsAhead; ++s) {
          x_rows[s] = load_row(x_next, s);
          dy_rows[s] = load_row(dy_next, s);
          x_next += p.x_stride.seqlen;
          dy_next += p.dy_stride.seqlen;
        }

#pragma unroll 1
        for (int t = 0; t < steps + kPast; t += kStepsAhead) {
#pragma unroll
          for (int s = 0; s < kStepsAhead; ++s) {
            R dy[kItems];
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
              x[kPast + s][i] = x_rows[s].value(i);
              dy[i] = dy_rows[s].value(i);
            }
            x_rows[s] = load_row(x_next, t + s + kStepsAhead);
            dy_rows[s] = load_row(dy_next, t + s + kStepsAhead);
            x_next += p.x_stride.seqlen;
            dy_next += p.dy_stride.seqlen;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
              R sum = filter.bias[i];
#pragma unroll
              for (int w = 0; w < kTaps; ++w)
                if (filter.has(w)) sum = multiply_add(filter.weight[i][w], x[s + w][i], sum);
              g[kPast + s][i] = p.silu ? dy[i] * silu_gradient(sum) : dy[i];
            }
            if (t + s < steps) {  // later ones belong to the next walk's sums
#pragma unroll
              for (int i = 0; i < kItems; ++i) {
#pragma unroll
                for (int w = 0; w < kTaps; ++w) dweight[i][w] = multiply_add(g[kPast + s][i], x[s + w][i], dweight[i][w]);
                dbias[i] += g[kPast + s][i];
              }
            }
            const int at_step = t + s - kPast;
            if (at_step >= 0) {
              Pack<T, kItems> out;
#pragma unroll
              for (int i = 0; i < kItems; ++i) {
                R sum = R(0);
#pragma unroll
                for (int r = 0; r < kTaps; ++r)
                  if (filter.has(kPast - r)) sum = multiply_add(filter.weight[i][kPast - r], g[s + r][i], sum);
                out.v[i] = round_to<T>(sum);
              }
              if (at_step < steps) store_pack<T, kItems>(dx_next, out);
              dx_next += p.dx_stride.seqlen;
            }
          }
#pragma unroll
          for (int r = 0; r < kPast; ++r)
#pragma unroll
            for (int i = 0; i < kItems; ++i) x[r][i] = x[kStepsAhead + r][i], g[r][i] = g[kStepsAhead + r][i];
        }
        // The few steps that dfinal_states reaches, again: in the loop above they would cost registers.
        if (p.dfinal_states) {
#pragma unroll 1
          for (int64_t s = greatest(begin, sequence.end - (p.width - 1)); s < end; ++s)
#pragma unroll 1
            for (int i = 0; i < kItems; ++i) dx_row[s * p.dx_stride.seqlen + i] = round_to<T>(dx_at<R>(p, b, d + i, s, sequence));
        }
      }
    }
    store_block_sums<R, kItems, kTaps>(l, dweight, dbias, line, column);
  }
}

// --- channel_first ----------------------------------------------------------------------------------------------------

template <class T>
using Granule = Words<T, kFirstItems>;

// 8 steps from `at` on: those of `mask`, the others are 0. `at` is 16-byte aligned if `aligned`; else, and where steps are missing, only
// those of `wanted` are read, one by one.
template <class T>
__device__ __forceinline__ Granule<T> load_granule(const T* at, unsigned mask, bool aligned, unsigned wanted) {
  if (mask == 0xffu && aligned) return load_words<T, kFirstItems>(at);
  Granule<T> granule{};
#pragma unroll
  for (int i = 0; i < kFirstItems; ++i)
    if (mask & wanted & (1u << i)) {
      using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, Word<T>>;
      granule.set(i, reinterpret_cast<const Bits*>(at)[i]);
    }
  return granule;
}

// Bits `begin` .. `end` - 1 of a mask of `count` bits, whatever the two are.
__device__ __forceinline__ unsigned bits_between(int64_t begin, int64_t end, int count) {
  const int low = int(greatest(least(begin, count), 0)), high = int(greatest(least(end, count), 0));
  return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

// A block owns blockDim.y rows' chunks of time (slots); the blockDim.x lanes of one (a power of two, at most a warp) take a granule each
// and then the next round. Lanes need nothing of each other until the sums at the end.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps == kMaxTaps ? 3 : 4) channel_first_bwd_kernel(const __grid_constant__ Launch l) {
  constexpr int kItems = kFirstItems, kPast = kTaps - 1;
  using R = Real<T>;
  const Params& p = l.p;
  const int lanes = int(blockDim.x), lane = int(threadIdx.x);
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    const int64_t slot = unit * blockDim.y + threadIdx.y;
    const bool active = slot < l.slots;
    const auto [row, chunk] = divide(active ? slot : 0, l.chunks);
    const auto [b, d] = divide(row, p.dim);
    const T* const x_row = static_cast<const T*>(p.x) + at(p.x_stride, b, d, 0);
    const T* const dy_row = static_cast<const T*>(p.dy) + at(p.dy_stride, b, d, 0);
    T* const dx_row = static_cast<T*>(p.dx) + at(p.dx_stride, b, d, 0);
    const int behind = behind_alignment(x_row);
    const bool dy_aligned = behind_alignment(dy_row) == behind, dx_aligned = behind_alignment(dx_row) == behind;
    const Filter<1, kTaps, R> filter(p, d);
    R dweight[kTaps] = {}, dbias = R(0);
    Sequence sequence;

    // No granule begins before -kItems: an inactive slot has none, not even the one that begins `behind` steps before its row.
    const int64_t chunk_end = active ? least((chunk + 1) * l.chunk * kItems - behind, p.seqlen) : -kItems;
#pragma unroll 1
    for (int64_t q = (chunk * l.chunk + lane) * kItems - behind; q < chunk_end; q += lanes * kItems) {  // the step of the granule's bit 0
      unsigned left = bits_between(-q, p.seqlen - q, kItems);  // steps of the row whose sequence is yet to come
#pragma unroll 1
      while (left) {
        const int64_t first = q + __ffs(int(left)) - 1;
        find_sequence(p, b, first, sequence);
        const int64_t own = p.seq_idx ? seq_idx_at(p, b, first) : 0;
        unsigned mine, member = 0;  // steps of the sequence: in the granule; from 8 before to 8 after it
        if (sequence.state < 0 || own < 0) {
          mine = sequence.state < 0 ? left : left & -left;
        } else {
          member = bits_between(sequence.start - q + kItems, sequence.end - q + kItems, 3 * kItems);
          if (p.seq_idx) {
#pragma unroll 1
            for (int j = 0; j < 3 * kItems; ++j)
              if (member & (1u << j) && seq_idx_at(p, b, q - kItems + j) != own) member &= ~(1u << j);
          }
          mine = member >> kItems & 0xffu;
        }
        left &= ~mine;

        R dx[kItems] = {};
        if (member) {
          const T* const at_x = x_row + q;
          const T* const at_dy = dy_row + q;
          constexpr unsigned kNewest = 0xffu & ~((1u << (kItems - kPast)) - 1u), kOldest = (1u << kPast) - 1u;
          const Granule<T> x_before = load_granule(at_x - kItems, member & 0xffu, true, kNewest);
          const Granule<T> x_own = load_granule(at_x, mine, true, 0xffu);
          const Granule<T> x_after = load_granule(at_x + kItems, member >> 2 * kItems, true, kOldest);
          const Granule<T> dy_own = load_granule(at_dy, mine, dy_aligned, 0xffu);
          const Granule<T> dy_after = load_granule(at_dy + kItems, member >> 2 * kItems, dy_aligned, kOldest);
          R x[kItems + 2 * kPast];
#pragma unroll
          for (int j = 0; j < kPast; ++j) {
            x[j] = x_before.value(kItems - kPast + j);
            x[kPast + kItems + j] = x_after.value(j);
          }
#pragma unroll
          for (int i = 0; i < kItems; ++i) x[kPast + i] = x_own.value(i);
          if (p.initial_states) {
#pragma unroll 1
            for (int j = 0; j < kItems + 2 * kPast; ++j) {
              const int64_t back = sequence.start - (q - kPast + j);
              if (back <= 0) break;
              const R v = before_start<R>(p, sequence.state, d, back);
#pragma unroll
              for (int i = 0; i < kItems + 2 * kPast; ++i) x[i] = i == j ? v : x[i];
            }
          }

          R g[kItems + kPast];  // 0 where dy is: outside the sequence
#pragma unroll
          for (int i = 0; i < kItems + kPast; ++i) {
            const R dy = i < kItems ? dy_own.value(i) : dy_after.value(i - kItems);
            R sum = filter.bias[0];
#pragma unroll
            for (int w = 0; w < kTaps; ++w)
              if (filter.has(w)) sum = multiply_add(filter.weight[0][w], x[i + w], sum);
            g[i] = p.silu ? dy * silu_gradient(sum) : dy;
          }
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
#pragma unroll
            for (int w = 0; w < kTaps; ++w) dweight[w] = multiply_add(g[i], x[i + w], dweight[w]);
            dbias += g[i];
          }
          if (p.dfinal_states && q + kItems > sequence.end - (p.width - 1)) {
#pragma unroll 1
            for (int j = 0; j < kItems; ++j) {
              if (!(mine & (1u << j))) continue;
              const R v = dfinal_at<R>(p, d, q + j, sequence);
#pragma unroll
              for (int i = 0; i < kItems; ++i) dx[i] = i == j ? v : dx[i];
            }
          }
#pragma unroll
          for (int i = 0; i < kItems; ++i)
#pragma unroll
            for (int r = 0; r < kTaps; ++r)
              if (filter.has(kPast - r)) dx[i] = multiply_add(filter.weight[0][kPast - r], g[i + r], dx[i]);
        }
        if (mine == 0xffu && dx_aligned) {
          Pack<T, kItems> out;
#pragma unroll
          for (int i = 0; i < kItems; ++i) out.v[i] = round_to<T>(dx[i]);
          store_pack<T, kItems>(dx_row + q, out);
        } else {
#pragma unroll
          for (int i = 0; i < kItems; ++i)
            if (mine & (1u << i)) dx_row[q + i] = round_to<T>(dx[i]);
        }
      }
    }

    R* const partial = static_cast<R*>(p.partial) + (b * l.chunks + chunk) * (p.width + 1) * p.dim + d;
    const int oldest = kTaps - int(p.width);
#pragma unroll
    for (int w = 0; w <= kTaps; ++w) {
      R sum = w < kTaps ? dweight[w] : dbias;
      for (int flip = lanes / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
      if (lane == 0 && active && w >= oldest) partial[(w - oldest) * p.dim] = sum;
    }
  }
}

// --- any --------------------------------------------------------------------------------------------------------------

// A thread owns a channel and a chunk of time, and so a column of a row of `partial`, where it adds up.
template <class R>
__global__ void __launch_bounds__(kThreads, 4) any_bwd_kernel(const __grid_constant__ Launch l) {
  const Params& p = l.p;
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    const auto [slot, column] = divide(unit, l.columns);
    const int64_t d = column * kThreads + threadIdx.x;
    if (d >= p.dim) continue;
    const auto [b, chunk] = divide(slot, l.chunks);
    R* const partial = static_cast<R*>(p.partial) + slot * (p.width + 1) * p.dim + d;
#pragma unroll 1
    for (int64_t w = 0; w <= p.width; ++w) partial[w * p.dim] = R(0);
    Sequence sequence;
#pragma unroll 1
    for (int64_t t = chunk * l.chunk; t < least((chunk + 1) * l.chunk, p.seqlen); ++t) {
      find_sequence(p, b, t, sequence);
      const bool padding = is_padding(p, b, t, sequence);
      store_real<R>(p.dx, p.x_dtype, at(p.dx_stride, b, d, t), padding ? R(0) : dx_at<R>(p, b, d, t, sequence));
      if (padding) continue;
      const R g = gradient_at<R>(p, b, d, t, sequence);
#pragma unroll 1
      for (int64_t w = 0; w < p.width; ++w)
        partial[w * p.dim] = multiply_add(g, input_at<R>(p, b, d, t, t - (p.width - 1) + w, sequence), partial[w * p.dim]);
      partial[p.width * p.dim] += g;
    }
  }
}

// --- the sum of the partial sums --------------------------------------------------------------------------------------

// A block owns kColumns channels of one tap (blockIdx.y; the last is dbias): kSegments threads each add a run of rows.
template <class R>
__global__ void __launch_bounds__(kColumns* kSegments) reduce_kernel(const __grid_constant__ Launch l) {
  COBRA_SHARED(R[kSegments][kColumns], sums);
  const Params& p = l.p;
  const int64_t each = (p.partials + kSegments - 1) / kSegments, begin = threadIdx.y * each, end = least(begin + each, p.partials);
  for (int64_t w = blockIdx.y; w < p.width + (p.dbias ? 1 : 0); w += gridDim.y)
    for (int64_t first = int64_t(blockIdx.x) * kColumns; first < p.dim; first += int64_t(gridDim.x) * kColumns) {
      const int64_t d = first + threadIdx.x;
      R sum = R(0);
      if (d < p.dim) {
#pragma unroll 8
        for (int64_t row = begin; row < end; ++row) sum += static_cast<const R*>(p.partial)[(row * (p.width + 1) + w) * p.dim + d];
      }
      sums[threadIdx.y][threadIdx.x] = sum;
      __syncthreads();
      if (threadIdx.y == 0 && d < p.dim) {
        R total = R(0);
        for (int segment = 0; segment < kSegments; ++segment) total += sums[segment][threadIdx.x];
        if (w < p.width)
          store_real<R>(p.dweight, p.weight_dtype, d * p.width + w, total);
        else
          store_real<R>(p.dbias, p.bias_dtype, d, total);
      }
      __syncthreads();  // before the next round overwrites `sums`
    }
}

// --- launch -----------------------------------------------------------------------------------------------------------

// Which kernel, with what block, and how many rows of `partial` it fills.
struct Plan {
  void (*kernel)(Launch);
  dim3 block;
  Launch l;
  int64_t partials;
};

template <class T, int kTaps>
bool fits_channel_last(const Params& p) {
  constexpr int kItems = kLastItems<T, kTaps>;
  const auto fits = [&](const void* base, const Inputs::Stride& stride) {
    return stride.dim == 1 && rows_are_aligned(base, p, stride.batch, stride.seqlen, p.seqlen, kItems * int64_t(sizeof(T)));
  };
  return p.dim % kItems == 0 && (p.x_stride.seqlen != 1 || p.seqlen == 1) && fits(p.x, p.x_stride) && fits(p.dy, p.dy_stride) &&
         fits(p.dx, p.dx_stride);
}

template <class T, int kTaps>
void plan_channel_last(Plan& plan) {
  Launch& l = plan.l;
  const Params& p = l.p;
  const int64_t packs = p.dim / kLastItems<T, kTaps>;
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  plan.block = dim3(lanes, kThreads / lanes);
  l.columns = ceil_div(packs, lanes);
  // Every chunk computes width - 1 steps again and adds to a row of `partial`; 1600 warps are what 132 multiprocessors hold.
  for (l.chunk = kMaxChunk; l.chunk > kMinChunk && packs * p.batch * ceil_div(p.seqlen, l.chunk) < int64_t(1600) * kWarp;) l.chunk /= 2;
  l.chunks = ceil_div(p.seqlen, l.chunk);
  l.slots = p.batch * l.chunks;
  plan.partials = ceil_div(l.slots, plan.block.y);
  l.units = l.columns * plan.partials;
  plan.kernel = &channel_last_bwd_kernel<T, kTaps>;
}

template <class T, int kTaps>
void plan_channel_first(Plan& plan) {
  Launch& l = plan.l;
  const Params& p = l.p;
  const int64_t behind = rows_are_aligned(p.x, p, p.x_stride.batch, p.x_stride.dim, p.dim, 16) ? 0 : 16 / int64_t(sizeof(T)) - 1;
  const int64_t granules = ceil_div(p.seqlen + behind, kFirstItems);
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < granules) lanes *= 2;
  plan.block = dim3(lanes, kThreads / lanes);
  l.chunk = least(ceil_div(granules, lanes), kFirstRounds) * lanes;
  l.chunks = ceil_div(granules, l.chunk);
  l.slots = p.batch * p.dim * l.chunks;
  plan.partials = p.batch * l.chunks;
  l.units = ceil_div(l.slots, plan.block.y);
  plan.kernel = &channel_first_bwd_kernel<T, kTaps>;
}

template <class R>
void plan_any(Plan& plan) {
  Launch& l = plan.l;
  const Params& p = l.p;
  plan.block = dim3(kThreads);
  l.chunk = kAnyChunk;
  l.chunks = ceil_div(p.seqlen, l.chunk);
  l.slots = plan.partials = p.batch * l.chunks;
  l.columns = ceil_div(p.dim, kThreads);
  l.units = l.columns * l.slots;
  plan.kernel = &any_bwd_kernel<R>;
}

template <class T, int kTaps>
int plan_for_width(Plan& plan) {
  const Params& p = plan.l.p;
  if (fits_channel_last<T, kTaps>(p))
    plan_channel_last<T, kTaps>(plan);
  else if (p.x_stride.seqlen == 1 && p.dy_stride.seqlen == 1 && p.dx_stride.seqlen == 1)
    plan_channel_first<T, kTaps>(plan);
  else
    plan_any<Real<T>>(plan);
  return 0;
}

template <class R>
Plan make_plan(const Params& p) {
  Plan plan{};
  plan.l.p = p;
  if (p.batch * p.dim * p.seqlen == 0) return plan;
  if (p.width > kMaxTaps)
    plan_any<R>(plan);
  else
    pick_by_type<R>(p.x_dtype, [&](auto t) {
      using T = decltype(t);
      return filter_is_packed(p) ? plan_for_width<T, kMambaTaps>(plan) : plan_for_width<T, kMaxTaps>(plan);
    });
  return plan;
}

template <class R>
int backward(const Params& p, void* stream) {
  const Plan plan = make_plan<R>(p);
  const auto blocks = [](int64_t units) { return unsigned(least(units, max_grid_x())); };
  if (plan.l.units > 0)
    if (const int error = launch(plan.kernel, dim3(blocks(plan.l.units)), plan.block, 0, stream, plan.l)) return error;
  const int64_t states = (p.cu_seqlens ? p.num_seqs : p.batch) * p.dim * (p.width - 1);
  if (p.dinitial_states && states > 0)
    if (const int error = launch(&initial_states_kernel<R>, dim3(blocks(ceil_div(states, kThreads * kStateItems))), dim3(kThreads), 0, stream, plan.l))
      return error;
  if (p.dim == 0) return 0;
  const int64_t rows = p.width + (p.dbias ? 1 : 0);
  return launch(&reduce_kernel<R>, dim3(blocks(ceil_div(p.dim, kColumns)), unsigned(least(rows, 65535))), dim3(kColumns, kSegments), 0, stream, plan.l);
}

}  // namespace

int64_t causal_conv1d_bwd_partials_cuda(const CausalConv1dBwdParams& p) {
  return pick_arithmetic(p.x_dtype, [&](auto r) { return make_plan<decltype(r)>(p).partials; });
}

int causal_conv1d_bwd_cuda(const CausalConv1dBwdParams& p, void* stream) {
  return pick_arithmetic(p.x_dtype, [&](auto r) { return backward<decltype(r)>(p, stream); });
}

}  // namespace cobra
