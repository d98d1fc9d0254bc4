// causal_conv1d forward on a GPU. One launch, whose blocks have two kinds of unit: `final` units copy the last width - 1 inputs of every
// sequence, the others compute outputs. Three kernels differ in who owns an output:
//   channel_last   x and y have stride 1 along dim and rows of whole 16-byte packs: a thread owns a pack of neighbouring channels and
//                  walks time, the window slides through its registers; threads of a warp are neighbours in dim;
//   channel_first  x and y have stride 1 along seqlen: a thread owns 8 neighbouring steps, 16-byte aligned wherever its row begins, and
//                  gets the window before them from the neighbouring lane;
//   any            any strides, any width: a thread owns 8 outputs along the slower axis and reads every tap.
// Outputs whose window is not what lies before them in memory (start of a packed sequence, padding, seq_idx) are "special": the first two
// kernels compute them as if they were not, then again, one by one.
#include "causal_conv1d/causal_conv1d_cuda.cuh"

namespace cobra {
namespace {

using Params = CausalConv1dFwdParams;

constexpr int kThreads = 128;
constexpr int kFinalItems = 4;   // elements of final_states per thread
constexpr int kStepsAhead = 3;   // channel_last: rows of x under way while the rows before are computed; 4 need more than 128 registers
constexpr int kMinChunk = 9, kMaxChunk = 36;  // channel_last: steps per thread, a multiple of kStepsAhead
static_assert(kMinChunk >= kMaxTaps - 1);     // all of a window lies before a chunk that is not the first
constexpr int kFirstItems = 8;   // channel_first: steps per thread
constexpr int kFirstLanes = 16;  // channel_first: lanes per row, so that the cost of beginning one is shared by two
constexpr int kFirstRounds = 16; // channel_first: granules per lane
constexpr int kAnyItems = 8;

struct Launch {
  Params p;
  int64_t final_units, units;  // final ones first
  int64_t columns;             // channel_last: blocks side by side along dim; any: along the fast axis
  int64_t slots, chunks;       // channel_last: time chunks of all batch rows, of one; channel_first: of all rows, of one; any: of the slow axis
  int64_t chunk;               // steps (channel_last) or granules (channel_first) of a chunk
  bool equal_alignment;        // channel_first: a 16-byte pack of x is one of y, in every row
};

__device__ __forceinline__ int flat_thread() { return int(threadIdx.y * blockDim.x + threadIdx.x); }

// Is the window of each step of [begin, end) what lies before it in memory, with zeros before step 0? `sequence` is that of `begin`.
__device__ __forceinline__ bool is_plain(const Params& p, int64_t begin, int64_t end, const Sequence& sequence) {
  const bool whole = begin - sequence.start >= p.width - 1 || (sequence.start == 0 && !p.initial_states);
  return !p.seq_idx && sequence.state >= 0 && whole && end <= sequence.end;
}

// Calls f(t, sequence) for the special steps of [begin, end).
template <class F>
__device__ __forceinline__ void for_each_special(const Params& p, int64_t b, int64_t begin, int64_t end, Sequence& sequence, F&& f) {
  find_sequence(p, b, begin, sequence);
  if (is_plain(p, begin, end, sequence)) return;
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    find_sequence(p, b, t, sequence);
    bool special = !is_plain(p, t, t + 1, sequence);
    if (p.seq_idx) {
      const int64_t own = seq_idx_at(p, b, t);
      special = own < 0;
      for (int64_t tap = greatest(t - (p.width - 1), 0); tap < t; ++tap) special = special || seq_idx_at(p, b, tap) != own;
    }
    if (special) f(t, sequence);
  }
}

// One output in fp32, whatever the case.
__device__ __forceinline__ float conv_at(const Params& p, int64_t b, int64_t d, int64_t t, const Sequence& sequence) {
  if (is_padding(p, b, t, sequence)) return 0.f;
  float sum = p.bias ? load_value(p.bias, p.bias_dtype, d * p.bias_stride) : 0.f;
#pragma unroll 1
  for (int64_t w = 0; w < p.width; ++w) {
    const int64_t tap = t - (p.width - 1) + w;
    float v = 0.f;
    if (tap < sequence.start)
      v = before_start(p, sequence.state, d, sequence.start - tap);
    else if (counts(p, b, t, tap))
      v = load_value(p.x, p.x_dtype, at(p.x_stride, b, d, tap));
    sum = fmaf(load_value(p.weight, p.weight_dtype, d * p.weight_dim_stride + w * p.weight_width_stride), v, sum);
  }
  return p.silu ? silu(sum) : sum;
}

// The last width - 1 inputs of every sequence, the initial state included where it is shorter than that.
__device__ __forceinline__ void copy_final_states(const Launch& l, int64_t unit) {
  const Params& p = l.p;
  const int64_t past = p.width - 1, total = (p.cu_seqlens ? p.num_seqs : p.batch) * p.dim * past;
  for (int i = 0; i < kFinalItems; ++i) {
    const int64_t element = (unit * kFinalItems + i) * kThreads + flat_thread();
    if (element >= total) return;
    const auto [channel, column] = divide(element, past);
    const auto [state, d] = divide(channel, p.dim);
    const int64_t end = p.cu_seqlens ? boundary(p, state + 1) : p.seqlen, start = p.cu_seqlens ? least(boundary(p, state), end) : 0;
    const int64_t t = end - past + column;
    const float v = t < start ? before_start(p, state, d, start - t)
                              : load_value(p.x, p.x_dtype, at(p.x_stride, p.cu_seqlens ? 0 : state, d, t));
    store_float(p.final_states, p.x_dtype, element, v);
  }
}

// Calls compute(unit) for the block's units of outputs, and copies final states for the others unless they are `done`.
template <class Compute>
__device__ __forceinline__ void for_each_unit(const Launch& l, Compute&& compute, bool done = false) {
  for (int64_t unit = blockIdx.x; unit < l.units; unit += gridDim.x) {
    if (unit >= l.final_units)
      compute(unit - l.final_units);
    else if (!done)
      copy_final_states(l, unit);
  }
}

// --- channel_last -----------------------------------------------------------------------------------------------------

// Channels per thread: 16 bytes, and 4 where 8 taps of 8 channels would fill the registers.
template <class T, int kTaps>
constexpr int kLastItems = kTaps == kMaxTaps ? 4 : 16 / int(sizeof(T));

// A block owns blockDim.x packs of channels and blockDim.y chunks of time; warps of a block that follow each other in time find the
// window before their chunk in L1.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps == kMambaTaps ? 4 : 3) channel_last_kernel(const __grid_constant__ Launch l) {
  constexpr int kItems = kLastItems<T, kTaps>, kPast = kTaps - 1;
  using Row = Pack<T, kItems>;
  const Params& p = l.p;
  // The thread's channels, batch row and steps in a unit.
  struct Place {
    int64_t d, b, begin;
    int steps;
  };
  const auto place_in = [&](int64_t unit) -> Place {
    const auto [line, column] = divide(unit, l.columns);
    const int64_t d = (column * blockDim.x + threadIdx.x) * kItems, slot = line * blockDim.y + threadIdx.y;
    if (d >= p.dim || slot >= l.slots) return {0, 0, 0, 0};
    const auto [b, chunk] = divide(slot, l.chunks);
    return {d, b, chunk * l.chunk, int(least(l.chunk, p.seqlen - chunk * l.chunk))};
  };

  for_each_unit(l, [&](int64_t unit) {
    const auto [d, b, begin, steps] = place_in(unit);
    if (steps == 0) return;
    const T* x = static_cast<const T*>(p.x) + at(p.x_stride, b, d, begin);
    T* y = static_cast<T*>(p.y) + at(p.y_stride, b, d, begin);

    Words<T, kItems> rows[kStepsAhead] = {};  // under way
#pragma unroll
    for (int s = 0; s < kStepsAhead; ++s)
      if (s < steps) rows[s] = load_words<T, kItems>(x + s * p.x_stride.seqlen);
    float window[kPast + kStepsAhead][kItems];  // inputs of steps t - kPast .. t + kStepsAhead - 1
#pragma unroll
    for (int r = 0; r < kPast; ++r) {
      Words<T, kItems> row{};
      if (begin > 0) row = load_words<T, kItems>(x + (r - kPast) * p.x_stride.seqlen);
#pragma unroll
      for (int i = 0; i < kItems; ++i) window[r][i] = row.value(i);
    }
    x += kStepsAhead * p.x_stride.seqlen;
    const Filter<kItems, kTaps> filter(p, d);

#pragma unroll 1
    for (int t = 0; t < steps; t += kStepsAhead) {
#pragma unroll
      for (int s = 0; s < kStepsAhead; ++s) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) window[kPast + s][i] = rows[s].value(i);
        if (t + s + kStepsAhead < steps) rows[s] = load_words<T, kItems>(x);
        x += p.x_stride.seqlen;
        Row out;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          float sum = filter.bias[i];
#pragma unroll
          for (int w = 0; w < kTaps; ++w)
            if (filter.has(w)) sum = fmaf(filter.weight[i][w], window[s + w][i], sum);
          out.v[i] = round_to<T>(p.silu ? silu(sum) : sum);
        }
        if (t + s < steps) store_pack<T, kItems>(y, out);
        y += p.y_stride.seqlen;
      }
#pragma unroll
      for (int r = 0; r < kPast; ++r)
#pragma unroll
        for (int i = 0; i < kItems; ++i) window[r][i] = window[kStepsAhead + r][i];
    }
  });

  // Special steps in a second walk, which needs no registers while the first runs.
  if (!p.cu_seqlens && !p.seq_idx && !p.initial_states) return;
  for_each_unit(l, [&](int64_t unit) {
    const auto [d, b, begin, steps] = place_in(unit);
    if (steps == 0) return;
    const Filter<kItems, kTaps> filter(p, d);
    Sequence sequence;
    for_each_special(p, b, begin, begin + steps, sequence, [&, d = d, b = b](int64_t t, const Sequence& sequence) {
      const bool padding = is_padding(p, b, t, sequence);
      float sum[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) sum[i] = filter.bias[i];
#pragma unroll
      for (int w = 0; w < kTaps; ++w) {
        const int64_t tap = t - kPast + w;
        if (padding || !filter.has(w)) continue;
        Row row{};
        if (tap >= sequence.start && counts(p, b, t, tap)) row = load_pack<T, kItems>(static_cast<const T*>(p.x) + at(p.x_stride, b, d, tap));
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const float v = tap >= sequence.start ? to_float(row.v[i]) : before_start(p, sequence.state, d + i, sequence.start - tap);
          sum[i] = fmaf(filter.weight[i][w], v, sum[i]);
        }
      }
      Row out{};
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (!padding) out.v[i] = round_to<T>(p.silu ? silu(sum[i]) : sum[i]);
      store_pack<T, kItems>(static_cast<T*>(p.y) + at(p.y_stride, b, d, t), out);
    });
  }, true);
}

// --- channel_first ----------------------------------------------------------------------------------------------------

template <class T>
using Granule = Words<T, kFirstItems>;

// Steps q .. q + 7; `at` points at step q and is 16-byte aligned. Only those of [low, high) are read, the others are 0, or written.
template <class T>
__device__ __forceinline__ Granule<T> load_granule(const T* at, int q, int low, int high) {
  if (q >= low && q + kFirstItems <= high) return load_words<T, kFirstItems>(at);
  Granule<T> granule{};
  if (q < high) {
#pragma unroll
    for (int i = 0; i < kFirstItems; ++i)
      if (q + i >= low && q + i < high) {
        using Bits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>;
        granule.set(i, reinterpret_cast<const Bits*>(at)[i]);
      }
  }
  return granule;
}
template <class T>
__device__ __forceinline__ void store_granule(T* at, int q, int low, int high, const float (&v)[kFirstItems]) {
  if (q >= low && q + kFirstItems <= high) {
    Pack<T, kFirstItems> pack;
#pragma unroll
    for (int i = 0; i < kFirstItems; ++i) pack.v[i] = round_to<T>(v[i]);
    store_pack<T, kFirstItems>(at, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kFirstItems; ++i)
      if (q + i >= low && q + i < high) at[i] = round_to<T>(v[i]);
  }
}

// v[i] = v[i + count] for the lower half of v, 0 <= count < 2 * kStep: by the bits of `count`, so that v stays in registers.
template <int kStep, int kCount>
__device__ __forceinline__ void move_down(float (&v)[kCount], int count) {
  const bool moves = count & kStep;
#pragma unroll
  for (int i = 0; i < kCount - kStep; ++i) v[i] = moves ? v[i + kStep] : v[i];
  if constexpr (kStep > 1) move_down<kStep / 2>(v, count);
}

// A block owns blockDim.y rows' chunks of time (slots); the blockDim.x lanes of one (a power of two, at most 16) take a granule of 8
// steps each, then the granules one round further. Granules begin on 16-byte boundaries of x; those that stick out of a row are read and
// written element by element. Where y is aligned otherwise than x, outputs move between lanes to form aligned granules of y.
template <class T, int kTaps>
__global__ void __launch_bounds__(kThreads, kTaps == kMaxTaps ? 4 : 6) channel_first_kernel(const __grid_constant__ Launch l) {
  constexpr int kItems = kFirstItems, kPast = kTaps - 1;
  const Params& p = l.p;
  const int lanes = int(blockDim.x), lane = int(threadIdx.x);
  const bool last_lane = lane == lanes - 1;
  for_each_unit(l, [&](int64_t unit) {
    // Slots past the last one go along with a row of no steps: shuffles need the whole warp.
    const int64_t slot = unit * blockDim.y + threadIdx.y;
    const bool active = slot < l.slots;
    const auto [row, chunk] = divide(active ? slot : 0, l.chunks);
    const auto [b, d] = divide(row, p.dim);
    const T* const x_row = static_cast<const T*>(p.x) + at(p.x_stride, b, d, 0);
    T* const y_row = static_cast<T*>(p.y) + at(p.y_stride, b, d, 0);
    const int behind = behind_alignment(x_row);
    const int shift = (behind - behind_alignment(y_row)) & (16 / int(sizeof(T)) - 1);  // y's granules begin so many steps after those of x
    const Filter<1, kTaps> filter(p, d);

    // From here on steps count from the first granule of the chunk, step `origin` of the row; [low, high) are those in row and chunk.
    const int64_t origin = chunk * l.chunk * kItems - behind;
    const int low = chunk == 0 ? behind : 0, high = active ? int(least(p.seqlen - origin, l.chunk * kItems)) : 0;
    const int stride = lanes * kItems;
    const bool has_past = p.initial_states && !p.cu_seqlens && active;

    int q = lane * kItems;
    const T* x = x_row + origin + q;
    T* y = y_row + origin + q;
    Granule<T> granule = load_granule(x, q, low, high), ahead = load_granule(x + stride, q + stride, low, high);
    float kept[kPast > 0 ? kPast : 1];  // last lane: the inputs before the round
#pragma unroll
    for (int j = 0; j < kPast; ++j) {
      kept[j] = 0.f;
      if (last_lane && active) {
        if (chunk > 0)
          kept[j] = to_float(x_row[origin + j - kPast]);
        else if (has_past)
          kept[j] = before_start(p, b, d, kPast - j + behind);
      }
    }

    for (int round = 0; __any_sync(0xffffffffu, round < high); round += stride) {  // until every row of the warp is done
      float window[kPast + kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) window[kPast + i] = granule.value(i);
      if (q < low && has_past) {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
          if (i < low) window[kPast + i] = before_start(p, b, d, low - i);
      }
      granule = ahead;
      ahead = load_granule(x + 2 * stride, q + 2 * stride, low, high);
#pragma unroll
      for (int j = 0; j < kPast; ++j) {
        const float mine = window[kItems + j];
        window[j] = __shfl_sync(0xffffffffu, last_lane ? kept[j] : mine, (lane - 1) & (lanes - 1), lanes);
        kept[j] = mine;
      }

      float out[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        float sum = filter.bias[0];
#pragma unroll
        for (int w = 0; w < kTaps; ++w)
          if (filter.has(w)) sum = fmaf(filter.weight[0][w], window[i + w], sum);
        out[i] = p.silu ? silu(sum) : sum;
      }
      if (l.equal_alignment) {
        store_granule(y, q, low, high, out);
      } else {
        float both[2 * kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          both[i] = out[i];
          both[kItems + i] = i + 1 < kItems ? __shfl_down_sync(0xffffffffu, out[i], 1, lanes) : 0.f;
        }
        if (lane == 0) store_granule(y, q, low, q + shift < high ? q + shift : high, out);
        move_down<kItems / 2>(both, shift);
#pragma unroll
        for (int i = 0; i < kItems; ++i) out[i] = both[i];
        store_granule(y + shift, q + shift, low, last_lane && q + kItems < high ? q + kItems : high, out);
      }
      q += stride;
      x += stride;
      y += stride;
    }

    if (p.cu_seqlens || p.seq_idx) {
      __syncwarp();  // a neighbouring lane may have stored this granule
      Sequence sequence;
      for (q = lane * kItems; q < high; q += stride)
        for_each_special(p, b, origin + (q > low ? q : low), origin + (q + kItems < high ? q + kItems : high), sequence,
                         [&, b = b, d = d](int64_t t, const Sequence& sequence) { y_row[t] = round_to<T>(conv_at(p, b, d, t, sequence)); });
    }
  });
}

// --- any --------------------------------------------------------------------------------------------------------------

template <bool kDimIsFast>
__global__ void __launch_bounds__(kThreads, 8) any_kernel(const __grid_constant__ Launch l) {
  const Params& p = l.p;
  for_each_unit(l, [&](int64_t unit) {
    const int64_t slot = unit * kThreads + flat_thread();
    if (slot >= l.slots) return;
    const auto [line, fast] = divide(slot, l.columns);
    const auto [b, chunk] = divide(line, l.chunks);
    const int64_t first = chunk * kAnyItems;
    const int64_t last = least(first + kAnyItems, kDimIsFast ? p.seqlen : p.dim);
    Sequence sequence;
#pragma unroll 1
    for (int64_t slow = first; slow < last; ++slow) {
      const int64_t d = kDimIsFast ? fast : slow, t = kDimIsFast ? slow : fast;
      find_sequence(p, b, t, sequence);
      store_float(p.y, p.x_dtype, at(p.y_stride, b, d, t), conv_at(p, b, d, t, sequence));
    }
  });
}

// --- launch -----------------------------------------------------------------------------------------------------------

int start(void (*kernel)(Launch), const Launch& l, dim3 block, void* stream) {
  if (l.units == 0) return 0;
  return launch(kernel, dim3(unsigned(least(l.units, max_grid_x()))), block, 0, stream, l);
}

template <class T, int kTaps>
bool fits_channel_last(const Params& p) {
  constexpr int kItems = kLastItems<T, kTaps>;
  constexpr int64_t kBytes = kItems * int64_t(sizeof(T));
  return p.x_stride.dim == 1 && p.y_stride.dim == 1 && p.dim % kItems == 0 && (p.x_stride.seqlen != 1 || p.seqlen == 1) &&
         rows_are_aligned(p.x, p, p.x_stride.batch, p.x_stride.seqlen, p.seqlen, kBytes) &&
         rows_are_aligned(p.y, p, p.y_stride.batch, p.y_stride.seqlen, p.seqlen, kBytes);
}

template <class T, int kTaps>
int start_channel_last(Launch& l, void* stream) {
  const Params& p = l.p;
  const int64_t packs = p.dim / kLastItems<T, kTaps>;
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  l.columns = ceil_div(packs, lanes);
  // Long chunks read the window before them less often; 1600 warps are what 132 multiprocessors need to keep memory busy.
  for (l.chunk = kMaxChunk; l.chunk > kMinChunk && packs * p.batch * ceil_div(p.seqlen, l.chunk) < int64_t(1600) * kWarp;) l.chunk /= 2;
  l.chunks = ceil_div(p.seqlen, l.chunk);
  l.slots = p.batch * l.chunks;
  l.units = l.final_units + l.columns * ceil_div(l.slots, kThreads / lanes);
  return start(&channel_last_kernel<T, kTaps>, l, dim3(lanes, kThreads / lanes), stream);
}

template <class T, int kTaps>
int start_channel_first(Launch& l, void* stream) {
  const Params& p = l.p;
  const int64_t behind = rows_are_aligned(p.x, p, p.x_stride.batch, p.x_stride.dim, p.dim, 16) ? 0 : 16 / int64_t(sizeof(T)) - 1;
  const int64_t granules = ceil_div(p.seqlen + behind, kFirstItems);
  unsigned lanes = 1;
  while (lanes < kFirstLanes && lanes < granules) lanes *= 2;
  l.chunk = least(ceil_div(granules, lanes), kFirstRounds) * lanes;
  l.chunks = ceil_div(granules, l.chunk);
  l.slots = p.batch * p.dim * l.chunks;
  l.units = l.final_units + ceil_div(l.slots, kThreads / lanes);
  const int64_t pointer_step = reinterpret_cast<intptr_t>(p.x) - reinterpret_cast<intptr_t>(p.y), elements = 16 / int64_t(sizeof(T));
  l.equal_alignment = pointer_step % 16 == 0 && (p.batch == 1 || (p.x_stride.batch - p.y_stride.batch) % elements == 0) &&
                      (p.dim == 1 || (p.x_stride.dim - p.y_stride.dim) % elements == 0);
  return start(&channel_first_kernel<T, kTaps>, l, dim3(lanes, kThreads / lanes), stream);
}

int start_any(Launch& l, void* stream) {
  const Params& p = l.p;
  const bool dim_is_fast = p.x_stride.dim < p.x_stride.seqlen;
  l.columns = dim_is_fast ? p.dim : p.seqlen;
  l.chunks = ceil_div(dim_is_fast ? p.seqlen : p.dim, kAnyItems);
  l.slots = p.batch * l.columns * l.chunks;
  l.units = l.final_units + ceil_div(l.slots, kThreads);
  return start(dim_is_fast ? &any_kernel<true> : &any_kernel<false>, l, dim3(kThreads), stream);
}

template <class T, int kTaps>
int start_for_width(Launch& l, void* stream) {
  if (fits_channel_last<T, kTaps>(l.p)) return start_channel_last<T, kTaps>(l, stream);
  if (l.p.x_stride.seqlen == 1 && l.p.y_stride.seqlen == 1) return start_channel_first<T, kTaps>(l, stream);
  return start_any(l, stream);
}

}  // namespace

int causal_conv1d_fwd_cuda(const CausalConv1dFwdParams& p, void* stream) {
  Launch l{};
  l.p = p;
  const int64_t states = p.cu_seqlens ? p.num_seqs : p.batch;
  if (p.final_states) l.final_units = ceil_div(states * p.dim * (p.width - 1), kThreads * kFinalItems);
  if (p.width > kMaxTaps || p.batch * p.dim * p.seqlen == 0) return start_any(l, stream);
  return pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    return filter_is_packed(p) ? start_for_width<T, kMambaTaps>(l, stream) : start_for_width<T, kMaxTaps>(l, stream);
  });
}

}  // namespace cobra
