// selective_scan backward on a GPU: every dtype, layout and size, 16 states per launch.
//
// A block owns 64 neighbouring channels of one sequence, which share a group of B and of C, and walks its chunks of kStateChunk steps
// from the last to the first; with few channels and rows in the call it has one span of chunks, and the gradient that enters each span
// comes from a pass of its own. Four lanes share a channel, a lane has four of its states. A chunk goes forward once from its saved
// state, leaving the state in shared memory every kRun steps; then backwards in runs: the run is replayed with its states and decays in
// registers, and walked back. So two exponentials per step and state, and no state that leaves the multiprocessor.
//
// Sums over states are made inside the four lanes. Sums over channels are made by the lanes of a warp, then over the warps of
// the block, and go to the workspace once per step and state; a second kernel adds the blocks. Sums over steps (dA and the like) leave
// per span of kSpan steps, and a third kernel adds the spans. Every order depends on the sizes only: the same bits on every run.
#include "common/rows.h"
#include "selective_scan/selective_scan_cuda.cuh"

namespace cobra {
namespace {

constexpr int kStates = 16, kLaneStates = 4, kQuad = kStates / kLaneStates, kWarpSize = 32;
constexpr int kTile = 32, kRun = 8;           // steps staged at once; steps whose states are in registers
constexpr int kSpanChunks = 4;                // that share a partial sum of dA
constexpr int64_t kSpan = kSpanChunks * kStateChunk;
constexpr int kBlockThreads = 256, kCarryThreads = 64;
constexpr int kBlockChannels = kBlockThreads / kQuad, kCarryChannels = kCarryThreads / kQuad, kWarps = kBlockThreads / kWarpSize;
constexpr int kStepPitch = kBlockChannels + 1;            // Fours per step: channels, or steps, side by side meet different banks
constexpr int kOrders = 4;                                // of four states, see lane_state
constexpr int kProjectedPitch = 2 * kOrders * kStates + 4;  // numbers per step: B, then C, in every order
constexpr int kHalf = kTile / 2, kEach = kHalf / kQuad;    // steps loaded at once; (step, channel) pairs of them per thread
constexpr int kChunk = int(kStateChunk), kCheckpoints = kChunk / kRun;
constexpr int kColumns = 2 * kStates;                     // of a step in the workspace: dB, dC
constexpr unsigned kAllLanes = 0xffffffffu;

// --- shared memory, by fours -------------------------------------------------------------------------------------------

// Four numbers of shared memory in one access.
template <class T>
struct Four {
  T v[4];
};
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* from) {
  if constexpr (sizeof(T) == 4) {
    const float4 w = *reinterpret_cast<const float4*>(from);
    return {{w.x, w.y, w.z, w.w}};
  } else {
    return {{from[0], from[1], from[2], from[3]}};
  }
}
template <class T>
__device__ __forceinline__ void store_four(T* to, T a, T b, T c, T d) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
  else
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}
template <class T>
__device__ __forceinline__ void load_two(const T* from, T& a, T& b) {
  if constexpr (sizeof(T) == 4) {
    const float2 w = *reinterpret_cast<const float2*>(from);
    a = w.x, b = w.y;
  } else {
    a = from[0], b = from[1];
  }
}

// --- work and workspace ------------------------------------------------------------------------------------------------

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Spans of a batch row, and the first of a sequence, as state_slots and state_slot count chunks.
COBRA_HOST_DEVICE int64_t span_slots(const SelectiveScanInputs& p) { return p.cu_seqlens ? p.seqlen / kSpan + p.num_seqs : (p.seqlen + kSpan - 1) / kSpan; }
COBRA_HOST_DEVICE int64_t span_slot(const SelectiveScanInputs& p, int64_t begin, int64_t row) { return p.cu_seqlens ? begin / kSpan + row : 0; }

// Rows (of dim numbers) of a span's partial sums: dA, then dB and dC where they are constant, then ddelta_bias and dD.
COBRA_HOST_DEVICE int64_t constant_C_row(const SelectiveScanInputs& p) { return kStates * (1 + p.B_constant); }
COBRA_HOST_DEVICE int64_t channel_row(const SelectiveScanInputs& p) { return kStates * (1 + p.B_constant + p.C_constant); }
COBRA_HOST_DEVICE int64_t span_rows(const SelectiveScanInputs& p) { return channel_row(p) + 2; }

template <class T>
struct Launch {
  SelectiveScanBwdParams p;
  int64_t first_state;  // of kStates, of this launch
  bool last;            // these are the last ones: what is summed over states is complete
  bool along_time;      // neighbouring threads take neighbouring steps, not channels
  bool apart;           // a block has one span, not a sequence
  int64_t run;          // neighbouring channels that share a group of B and of C
  int64_t blocks_per_run, blocks_per_row, items;
  T* projected;  // (batch, blocks_per_row, seqlen, kColumns): dB and dC of a block's channels
  T* spans;      // (batch, span_slots, span_rows, dim)
  T* carry;      // (batch, span_slots, kStates, dim): the gradient that enters a span from behind
  T* sums;       // (batch, seqlen, 3, dim): sums over the states of the launches so far; none when this one has all
};

// A block's channels of one batch row.
struct Channels {
  int64_t first;
  int count;
};
template <class T>
__device__ __forceinline__ Channels channels_of(const Launch<T>& launch, int64_t block, int64_t blocks_per_run, int channels) {
  const int64_t run = block / blocks_per_run, within = block % blocks_per_run * channels, left = launch.run - within;
  return {run * launch.run + within, int(left < channels ? left : channels)};
}
// threadIdx.x and v, each time as if new: what is computed from them is not kept in registers through the recurrence.
__device__ __forceinline__ int thread_again() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return int(threadIdx.x);
#endif
}
__device__ __forceinline__ int again(int v) {
#if defined(__CUDA_ARCH__)
  asm volatile("mov.u32 %0, %0;" : "+r"(v));
#endif
  return v;
}
__device__ __forceinline__ int64_t block_index() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }

// --- half tiles: elements of u, delta, z, dout and their gradients -------------------------------------------------------

template <class T> using Raw = std::conditional_t<sizeof(T) == 8, T, unsigned>;

// Which (step, channel) pairs of kHalf steps a thread has: kEach of them, a fixed distance apart.
template <class T, int kThreads>
struct Elements {
  static constexpr int kChannels = kThreads / kQuad;
  bool along_time;
  int first_step, first_channel;
  int64_t batch, position, channel;  // of the first step, of the block's first channel
  unsigned exist;                    // bit j: pair j is inside the sequence and the block

  __device__ __forceinline__ Elements(bool time, int64_t batch, int64_t position, int steps, const Channels& channels)
      : along_time(time), batch(batch), position(position), channel(channels.first), exist(0) {
    const int thread = thread_again();
    first_step = time ? thread % kHalf : thread / kChannels;
    first_channel = time ? thread / kHalf : thread % kChannels;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (step(j) < steps && channel_of(j) < channels.count) exist |= 1u << j;
  }
  __device__ __forceinline__ int step(int j) const { return along_time ? first_step : first_step + j * kQuad; }
  __device__ __forceinline__ int channel_of(int j) const { return along_time ? first_channel + j * (kThreads / kHalf) : first_channel; }
  __device__ __forceinline__ int64_t offset(const SequenceStride& s) const {
    return batch * s.batch + (channel + first_channel) * s.dim + (position + first_step) * s.seq;
  }
  __device__ __forceinline__ int64_t distance(const SequenceStride& s) const { return along_time ? (kThreads / kHalf) * s.dim : kQuad * s.seq; }

  __device__ __forceinline__ void load(Raw<T> (&raw)[kEach], const void* base, DType dtype, const SequenceStride& s) const {
    const int64_t first = offset(s), apart = distance(s);
    const auto elements = [&](auto element) {
      using E = decltype(element);
      const E* at = static_cast<const E*>(base) + first;
      if (exist == (1u << kEach) - 1) {
#pragma unroll
        for (int j = 0; j < kEach; ++j, at += apart) raw[j] = *at;
      } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j, at += apart) raw[j] = exist >> j & 1 ? *at : E(0);
      }
    };
    if constexpr (sizeof(T) == 8)
      elements(T{});
    else if (dtype == DType::kFloat32)
      elements(uint32_t{});
    else
      elements(uint16_t{});
  }
  __device__ __forceinline__ static T value(Raw<T> raw, DType dtype) {
    if constexpr (sizeof(T) == 8)
      return raw;
    else
      return float_of(raw, dtype);
  }
  __device__ __forceinline__ void store(const T (&v)[kEach], void* base, DType dtype, const SequenceStride& s) const {
    const int64_t first = offset(s), apart = distance(s);
    const auto elements = [&](auto element, auto round) {
      auto* at = static_cast<decltype(element)*>(base) + first;
#pragma unroll
      for (int j = 0; j < kEach; ++j, at += apart)
        if (exist >> j & 1) *at = round(v[j]);
    };
    if constexpr (sizeof(T) == 8)
      elements(T{}, [](T x) { return x; });
    else
      with_float_type(dtype, [&](auto t) { elements(t, [](float x) { return round_to<decltype(t)>(x); }); });
  }
};

// Positions after the last packed sequence: the gradients of u, delta and z are 0.
template <class T, int kThreads>
__device__ __forceinline__ void clear_padding(const Launch<T>& launch, const Sequence& sequence, const Channels& channels) {
  const SelectiveScanBwdParams& p = launch.p;
  const T zeros[kEach] = {};
  for (int64_t begin = 0; launch.last && begin < sequence.length; begin += kHalf) {
    const int64_t left = sequence.length - begin;
    const Elements<T, kThreads> own(launch.along_time, sequence.batch, sequence.begin + begin, int(left < kHalf ? left : kHalf), channels);
    own.store(zeros, p.du, p.u_dtype, p.du_stride);
    own.store(zeros, p.ddelta, p.delta_dtype, p.ddelta_stride);
    if (p.dz) own.store(zeros, p.dz, p.z_dtype, p.dz_stride);
  }
}

// --- a lane's states ---------------------------------------------------------------------------------------------------

// Lane 4 c + q of a warp has states of channel c: register i holds state 4 q + (i ^ order), order = c % 4. A sum over four channels
// then exchanges registers 2 and 3, and after that register 1, in every lane: the halving needs no selects.
template <class T>
struct Lane {
  int channel, order, first;  // channel of the block, order of the states, first of the four
  bool active;

  __device__ __forceinline__ explicit Lane(const Channels& channels, int thread = thread_again())
      : channel(thread / kQuad), order(channel % kOrders), first(thread % kQuad * kLaneStates), active(channel < channels.count) {}

  __device__ __forceinline__ int state(int i) const { return first + (i ^ order); }
  __device__ __forceinline__ bool has(const Launch<T>& launch, int i) const { return active && launch.first_state + state(i) < launch.p.dstate; }
  __device__ __forceinline__ void rates(const Launch<T>& launch, int64_t channel, T (&rate)[kLaneStates]) const {
    const SelectiveScanBwdParams& p = launch.p;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) {
      rate[i] = T(0);
      if (!has(launch, i)) continue;
      if constexpr (sizeof(T) == 4)
        rate[i] = decay_rate(p, channel, launch.first_state + state(i));
      else
        rate[i] = load_real<T>(p.A, p.A_dtype, channel * p.A_stride.dim + (launch.first_state + state(i)) * p.A_stride.state) * kLog2<T>;
    }
  }
  // From or to (.., kStates, dim), at the block's first channel of row 0.
  __device__ __forceinline__ void load(const Launch<T>& launch, T (&v)[kLaneStates], const T* from) const {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) v[i] = has(launch, i) ? from[state(i) * launch.p.dim + channel] : T(0);
  }
  __device__ __forceinline__ void store(const Launch<T>& launch, const T (&v)[kLaneStates], T* to) const {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i)
      if (active) to[state(i) * launch.p.dim + channel] = v[i];
  }
  // The gradient after the last step, and where the one before the first step goes.
  __device__ __forceinline__ void load_last(const Launch<T>& launch, int64_t row, int64_t first_channel, T (&g)[kLaneStates]) const {
    const SelectiveScanBwdParams& p = launch.p;
    const ScanStateStride& s = p.dlast_state_stride;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i)
      g[i] = p.dlast_state && has(launch, i) ? load_real<T>(p.dlast_state, p.dlast_state_dtype, row * s.row + (first_channel + channel) * s.dim + (launch.first_state + state(i)) * s.state)
                                             : T(0);
  }
  __device__ __forceinline__ void store_initial(const Launch<T>& launch, int64_t row, int64_t first_channel, const T (&g)[kLaneStates]) const {
    const SelectiveScanBwdParams& p = launch.p;
    const ScanStateStride& s = p.dinitial_state_stride;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i)
      if (p.dinitial_state && has(launch, i))
        store_real<T>(p.dinitial_state, p.initial_state_dtype, row * s.row + (first_channel + channel) * s.dim + (launch.first_state + state(i)) * s.state, g[i]);
  }
};

// B or C of the block's group.
template <class T>
struct Projection {
  const void* base;
  DType dtype;
  ProjectionStride stride;
  int64_t first;  // element of state 0 of this launch: of the group, or, when constant, of the block's first channel
  __device__ __forceinline__ Projection(const Launch<T>& launch, const void* base, DType dtype, const ProjectionStride& stride, bool constant, const Sequence& sequence,
                                        int64_t channel)
      : base(base), dtype(dtype), stride(stride),
        first(sequence.batch * stride.batch + (constant ? channel : channel / (launch.p.dim / stride.groups)) * stride.group + sequence.begin * stride.seq +
              launch.first_state * stride.state) {}
  __device__ __forceinline__ T at(int64_t step, int64_t state) const { return load_real<T>(base, dtype, first + step * stride.seq + state * stride.state); }
  __device__ __forceinline__ T constant(int64_t channel, int64_t state) const { return load_real<T>(base, dtype, first + channel * stride.group + state * stride.state); }
};

// --- the gradient that enters each span ----------------------------------------------------------------------------------

// A block walks 16 channels of one sequence backwards with g alone, in the very operations of the kernel below: the same bits.
template <class T>
__global__ void __launch_bounds__(kCarryThreads) selective_scan_bwd_carry_kernel(const __grid_constant__ Launch<T> launch) {
  constexpr int kPitch = kCarryChannels + 1, kStatePitch = kStates + 4;
  COBRA_SHARED(T[kHalf * kPitch * 2], staged);  // dt, dy
  COBRA_SHARED(T[kHalf * kStatePitch], projected);
  const SelectiveScanBwdParams& p = launch.p;
  const int64_t blocks_per_run = (launch.run + kCarryChannels - 1) / kCarryChannels, blocks_per_row = p.dim / launch.run * blocks_per_run;
  const int64_t row = block_index() / blocks_per_row;
  if (row >= (p.cu_seqlens ? p.num_seqs + 1 : p.batch)) return;
  const Channels channels = channels_of(launch, block_index() % blocks_per_row, blocks_per_run, kCarryChannels);
  const Sequence sequence = sequence_of(p, row);
  if (p.cu_seqlens && row == p.num_seqs) return clear_padding<T, kCarryThreads>(launch, sequence, channels);

  const Lane<T> lane(channels);
  const Projection<T> C(launch, p.C, p.C_dtype, p.C_stride, p.C_constant, sequence, channels.first);
  T rate[kLaneStates], g[kLaneStates], constant[kLaneStates];
  lane.rates(launch, channels.first + lane.channel, rate);
  lane.load_last(launch, row, channels.first, g);
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i) constant[i] = p.C_constant && lane.has(launch, i) ? C.constant(lane.channel, lane.state(i)) : T(0);

  Raw<T> raw_delta[kEach], raw_dout[kEach] = {}, raw_z[kEach] = {};
  const auto elements = [&](int64_t begin) {
    const int64_t left = sequence.length - begin;
    return Elements<T, kCarryThreads>(launch.along_time, sequence.batch, sequence.begin + begin, int(left < kHalf ? left : kHalf), channels);
  };
  const auto load = [&](int64_t begin) {
    const auto own = elements(begin);
    own.load(raw_delta, p.delta, p.delta_dtype, p.delta_stride);
    if (p.dout) own.load(raw_dout, p.dout, p.u_dtype, p.dout_stride);
    if (p.z) own.load(raw_z, p.z, p.z_dtype, p.z_stride);
  };
  int64_t begin = (sequence.length - 1) / kHalf * kHalf;
  if (sequence.length > 0) load(begin);
  for (; sequence.length > 0 && begin >= 0; begin -= kHalf) {
    const auto own = elements(begin);
    const int64_t left = sequence.length - begin;
    const int steps = int(left < kHalf ? left : kHalf);
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int channel = own.channel_of(j);
      const bool exists = own.exist >> j & 1;
      const T bias = p.delta_bias && exists ? load_real<T>(p.delta_bias, p.delta_bias_dtype, (channels.first + channel) * p.delta_bias_stride) : T(0);
      T dt = own.value(raw_delta[j], p.delta_dtype) + bias, dy = own.value(raw_dout[j], p.u_dtype);
      if (p.delta_softplus) dt = softplus(dt);
      if (p.z) {
        const T z = own.value(raw_z[j], p.z_dtype);
        dy *= z * sigmoid(z);
      }
      T* const to = staged + (own.step(j) * kPitch + channel) * 2;
      to[0] = exists ? dt : T(0);
      to[1] = exists ? dy : T(0);
    }
    for (int i = threadIdx.x; !p.C_constant && i < kHalf * kStates; i += kCarryThreads) {
      const int step = i % kHalf, state = i / kHalf;
      projected[step * kStatePitch + state] = step < steps && launch.first_state + state < p.dstate ? C.at(begin + step, state) : T(0);
    }
    __syncthreads();
    if (begin > 0) load(begin - kHalf);
    for (int t = steps - 1; t >= 0; --t) {
      T dt, dy;
      load_two(staged + (t * kPitch + lane.channel) * 2, dt, dy);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        g[i] = multiply_add(dy, p.C_constant ? constant[i] : projected[t * kStatePitch + lane.state(i)], g[i]);
        g[i] *= power_of_two(dt * rate[i]);
      }
    }
    if (begin % kSpan == 0 && begin > 0)
      lane.store(launch, g, launch.carry + (sequence.batch * span_slots(p) + span_slot(p, sequence.begin, row) + begin / kSpan - 1) * kStates * p.dim + channels.first);
  }
  lane.store_initial(launch, row, channels.first, g);
}

// --- the backward ------------------------------------------------------------------------------------------------------

constexpr int kSharedNumbers = kTile * kStepPitch * 4 + kCheckpoints * kBlockThreads * 4 + kTile * kProjectedPitch + 2 * kWarps * kRun * kColumns;

// What a block of the kernel below works on, in shared memory: registers are for the recurrence.
template <class T>
struct Work {
  Sequence sequence;
  Channels channels;
  int64_t row, block;
  T bias[kBlockChannels], D[kBlockChannels], dbias[kBlockChannels], dD[kBlockChannels];
};

template <class T, bool kConstant>
struct Backward {
  const Launch<T>& launch;
  const SelectiveScanBwdParams& p;
  Work<T>& work;
  T* const staged;       // [kTile][kStepPitch] of (dt, dt u, dy, sum_n C h); after its run is walked back (dt, sum_n g B, sum_n e rate, sum_n C h)
  T* const checkpoints;  // [kCheckpoints][kBlockThreads] of four states
  T* const projected;    // [kTile][B, C][order][kStates]; a channel's constant ones in the place of step channel % kTile
  T* const warp_sums;    // [2][kWarps][kRun][kColumns], used in turn
  T rate[kLaneStates], g[kLaneStates], dA[kLaneStates], dB_constant[kLaneStates], dC_constant[kLaneStates];

  __device__ __forceinline__ Backward(const Launch<T>& launch, Work<T>& work, T* shared)
      : launch(launch), p(launch.p), work(work), staged(shared), checkpoints(staged + kTile * kStepPitch * 4),
        projected(checkpoints + kCheckpoints * kBlockThreads * 4), warp_sums(projected + kTile * kProjectedPitch) {
    lane().rates(launch, work.channels.first + lane().channel, rate);
  }

  __device__ __forceinline__ Lane<T> lane() const { return Lane<T>(work.channels); }

  // B and C of a tile at step `begin` of the sequence, four states of one step per thread, in the four orders.
  __device__ __forceinline__ void stage_projections(int64_t begin, int steps) {
    const int thread = thread_again(), step = thread % kTile, quad = thread / kTile % kQuad, is_C = thread / kTile / kQuad;
    const bool constant = kConstant && (is_C ? p.C_constant : p.B_constant);
    const Projection<T> from(launch, is_C ? p.C : p.B, is_C ? p.C_dtype : p.B_dtype, is_C ? p.C_stride : p.B_stride, constant, work.sequence, work.channels.first);
    // A constant's channels step and step + kTile take orders 0 and 2 of the place, 1 and 3 stay empty.
    T v[2][kLaneStates];
#pragma unroll
    for (int copy = 0; copy < (kConstant ? 2 : 1); ++copy)
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        const int state = quad * kLaneStates + i, channel = step + copy * kTile;
        const bool exists = launch.first_state + state < p.dstate && (constant ? channel < work.channels.count : step < steps);
        v[copy][i] = !exists ? T(0) : constant ? from.constant(channel, state) : from.at(begin + step, state);
      }
    T* const to = projected + step * kProjectedPitch + is_C * kOrders * kStates + quad * kLaneStates;
    if (constant) {
#pragma unroll
      for (int copy = 0; copy < (kConstant ? 2 : 1); ++copy) {
        const int order = (step + copy * kTile) % kOrders;
#pragma unroll
        for (int i = 0; i < kLaneStates; ++i) to[copy * 2 * kStates + (i ^ order)] = v[copy][i];
      }
      return;
    }
    store_four(to, v[0][0], v[0][1], v[0][2], v[0][3]);
    store_four(to + kStates, v[0][1], v[0][0], v[0][3], v[0][2]);
    store_four(to + 2 * kStates, v[0][2], v[0][3], v[0][0], v[0][1]);
    store_four(to + 3 * kStates, v[0][3], v[0][2], v[0][1], v[0][0]);
  }
  // A lane's four of B (is_C 0) or C at a step of the tile, and where they are for step 0.
  __device__ __forceinline__ const T* projection_of(int thread) const {
    const int channel = thread / kQuad, first = thread % kQuad * kLaneStates;
    return projected + first + (kConstant ? 0 : channel % kOrders * kStates);
  }
  __device__ __forceinline__ Four<T> projection(const T* at, int step, int is_C, int thread) const {
    at += is_C * kOrders * kStates;
    if constexpr (kConstant) {
      const int channel = thread / kQuad;
      if (is_C ? p.C_constant : p.B_constant) return load_four(at + channel % kTile * kProjectedPitch + channel / kTile * 2 * kStates);
      at += channel % kOrders * kStates;
    }
    return load_four(at + step * kProjectedPitch);
  }

  __device__ __forceinline__ void stage(int chunk, int before, int steps) {
    const int64_t begin = again(chunk) * kStateChunk + before;
    __syncthreads();  // what was staged before has been read
    stage_projections(begin, steps);
#pragma unroll 1
    for (int part = 0; part < kTile; part += kHalf) {
      const Elements<T, kBlockThreads> own(launch.along_time, work.sequence.batch, work.sequence.begin + begin + part, steps - part, work.channels);
      Raw<T> raw_delta[kEach], raw_u[kEach], raw_dout[kEach] = {}, raw_z[kEach];
      own.load(raw_delta, p.delta, p.delta_dtype, p.delta_stride);
      own.load(raw_u, p.u, p.u_dtype, p.u_stride);
      if (p.dout) own.load(raw_dout, p.dout, p.u_dtype, p.dout_stride);
      if (p.z) own.load(raw_z, p.z, p.z_dtype, p.z_stride);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const bool exists = own.exist >> j & 1;
        T dt = own.value(raw_delta[j], p.delta_dtype) + work.bias[own.channel_of(j)], dy = own.value(raw_dout[j], p.u_dtype);
        if (p.delta_softplus) dt = softplus(dt);
        if (p.z) {
          const T z = own.value(raw_z[j], p.z_dtype);
          dy *= z * sigmoid(z);
        }
        dt = exists ? dt : T(0);  // after softplus: a step that does not exist keeps the state
        store_four(staged + ((part + own.step(j)) * kStepPitch + own.channel_of(j)) * 4, dt, dt * own.value(raw_u[j], p.u_dtype), exists ? dy : T(0), T(0));
      }
    }
    __syncthreads();
  }

  // A run forward, without a trace.
  __device__ __forceinline__ void advance(T (&h)[kLaneStates], int first) const {
    const int thread = thread_again();
    const T *const at = staged + (first * kStepPitch + thread / kQuad) * 4, *const projections = projection_of(thread) + (kConstant ? 0 : first * kProjectedPitch);
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      T dt, dtu;
      load_two(at + t * kStepPitch * 4, dt, dtu);
      const Four<T> b = projection(projections, kConstant ? first + t : t, 0, thread);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) h[i] = multiply_add(power_of_two(dt * rate[i]), h[i], dtu * b.v[i]);
    }
  }

  // A run forward from its checkpoint, then back. `first`: its first step in the tile; of its steps, `count` exist.
  template <bool kWhole>
  __device__ __forceinline__ void walk_back(int first, int count, const T* checkpoint) {
    T h[kRun][kLaneStates], decay[kRun][kLaneStates];  // after each step
    const int thread = thread_again();
    const bool odd = thread & 1, high = thread & 2, upper = thread & 16;
    T* const at = staged + (first * kStepPitch + thread / kQuad) * 4;
    const T* const projections = projection_of(thread) + (kConstant ? 0 : first * kProjectedPitch);
    const Four<T> start = load_four(checkpoint);
    T y[2];
#pragma unroll
    for (int t = 0; t < kRun; ++t) {
      y[t % 2] = T(0);
      T dt, dtu;
      load_two(at + t * kStepPitch * 4, dt, dtu);
      const Four<T> b = projection(projections, kConstant ? first + t : t, 0, thread);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        decay[t][i] = power_of_two(dt * rate[i]);
        h[t][i] = multiply_add(decay[t][i], t ? h[t - (t > 0)][i] : start.v[i], dtu * b.v[i]);
      }
      if (p.z) {
        const Four<T> c = projection(projections, kConstant ? first + t : t, 1, thread);
#pragma unroll
        for (int i = 0; i < kLaneStates; ++i) y[t % 2] = multiply_add(c.v[i], h[t][i], y[t % 2]);
      }
      if (p.z && t % 2) {  // over the four lanes; the even ones end with the step before
        T sum = (odd ? y[1] : y[0]) + __shfl_xor_sync(kAllLanes, odd ? y[0] : y[1], 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (!high) at[((t - 1 + odd) * kStepPitch) * 4 + 3] = sum;
      }
    }

    T* const column = warp_sums + ((first / kRun % 2 * kWarps + thread / kWarpSize) * kRun) * kColumns + upper * kStates + thread % kQuad * kLaneStates + thread / kQuad % kOrders;
    T gB[2], eA[2];
#pragma unroll
    for (int t = kRun - 1; t >= 0; --t) {
      gB[t % 2] = eA[t % 2] = T(0);
      const Four<T> step = load_four(at + t * kStepPitch * 4), b = projection(projections, kConstant ? first + t : t, 0, thread),
                    c = projection(projections, kConstant ? first + t : t, 1, thread);
      const T dt = step.v[0], dtu = step.v[1], dy = step.v[2];
      const Four<T> start_again = t ? Four<T>{} : load_four(checkpoint);  // not kept: registers are few
      T dB[kLaneStates], dC[kLaneStates];
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        g[i] = multiply_add(dy, c.v[i], g[i]);
        dB[i] = g[i] * dtu;
        dC[i] = dy * h[t][i];
        gB[t % 2] = multiply_add(g[i], b.v[i], gB[t % 2]);
        g[i] *= decay[t][i];
        const T e = kWhole || t < count ? g[i] * (t ? h[t - (t > 0)][i] : start_again.v[i]) : T(0);  // the gradient of the exponent
        dA[i] = multiply_add(e, dt, dA[i]);
        eA[t % 2] = multiply_add(e, rate[i], eA[t % 2]);
        if (kConstant && (kWhole || t < count)) dB_constant[i] += dB[i], dC_constant[i] += dC[i];
      }
      // Over the warp's eight channels. Each lane ends with one of the step's 32 sums.
      const auto over_four = [&](const T (&v)[kLaneStates]) {
        const T low = v[0] + __shfl_xor_sync(kAllLanes, v[2], 8), next = v[1] + __shfl_xor_sync(kAllLanes, v[3], 8);
        return low + __shfl_xor_sync(kAllLanes, next, 4);
      };
      const T sum_B = over_four(dB), sum_C = over_four(dC);
      column[t * kColumns] = (upper ? sum_C : sum_B) + __shfl_xor_sync(kAllLanes, upper ? sum_B : sum_C, 16);
      if (t % 2 == 0) {  // over the four lanes: odd ones end with e rate, the upper two with the later step
        const T early = (odd ? eA[0] : gB[0]) + __shfl_xor_sync(kAllLanes, odd ? gB[0] : eA[0], 1);
        const T late = (odd ? eA[1] : gB[1]) + __shfl_xor_sync(kAllLanes, odd ? gB[1] : eA[1], 1);
        const T sum = (high ? late : early) + __shfl_xor_sync(kAllLanes, high ? early : late, 2);
        __syncwarp();  // the four lanes have read what is overwritten
        at[((t + high) * kStepPitch) * 4 + 1 + odd] = sum;
      }
    }
  }

  // Adds the warps' dB and dC of a run and hands them over. All threads call it.
  __device__ __forceinline__ void store_run(int chunk, int before, int first, int count) {
    static_assert(kRun * kColumns == kBlockThreads);
    __syncthreads();
    const int thread = thread_again();
    const T* const from = warp_sums + first / kRun % 2 * kWarps * kRun * kColumns + thread;
    if (thread / kColumns >= count || (kConstant && !launch.projected)) return;  // not when both are constant
    T sum = from[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += from[warp * kRun * kColumns];
    const int64_t position = work.sequence.begin + again(chunk) * kStateChunk + before + first;
    launch.projected[((work.sequence.batch * launch.blocks_per_row + work.block) * p.seqlen + position) * kColumns + thread] = sum;
  }

  // du, ddelta, dz of a tile from its sums over states.
  __device__ __forceinline__ void finish(int chunk, int before, int steps) {
    const int64_t begin = again(chunk) * kStateChunk + before;
    __syncthreads();
#pragma unroll 1
    for (int part = 0; part < kTile && part < steps; part += kHalf) {
      const Elements<T, kBlockThreads> own(launch.along_time, work.sequence.batch, work.sequence.begin + begin + part, steps - part, work.channels);
      if (launch.sums) add_sums(own, part);
      if (launch.last) finish(own, part);
    }
    if (!launch.last || (!p.dD && !p.ddelta_bias)) return;
    __syncthreads();
    const int channel = thread_again();
    if (channel >= kBlockChannels) return;
    T dbias = T(0), dD = T(0);
#pragma unroll 8
    for (int step = 0; step < steps; ++step) {
      T step_bias, step_D;
      load_two(staged + (step * kStepPitch + channel) * 4, step_bias, step_D);
      dbias += step_bias, dD += step_D;
    }
    work.dbias[channel] += dbias, work.dD[channel] += dD;
  }
  // Sums over the states of the launches before; this launch's are added for the next.
  __device__ __forceinline__ void add_sums(const Elements<T, kBlockThreads>& own, int part) const {
    for (int j = 0; j < kEach; ++j) {
      if (!(own.exist >> j & 1)) continue;
      T* const at = staged + ((part + own.step(j)) * kStepPitch + own.channel_of(j)) * 4;
      T* const others = launch.sums + ((own.batch * p.seqlen + own.position + own.step(j)) * 3) * p.dim + own.channel + own.channel_of(j);
      for (int i = 0; i < 3; ++i) {
        if (launch.first_state > 0) at[1 + i] += others[i * p.dim];
        if (!launch.last) others[i * p.dim] = at[1 + i];
      }
    }
  }
  __device__ __forceinline__ void finish(const Elements<T, kBlockThreads>& own, int part) const {
    Raw<T> raw_delta[kEach], raw_u[kEach], raw_dout[kEach] = {}, raw_z[kEach];
    own.load(raw_delta, p.delta, p.delta_dtype, p.delta_stride);
    own.load(raw_u, p.u, p.u_dtype, p.u_stride);
    if (p.dout) own.load(raw_dout, p.dout, p.u_dtype, p.dout_stride);
    if (p.z) own.load(raw_z, p.z, p.z_dtype, p.z_stride);
    T du[kEach], ddelta[kEach], dz[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const bool exists = own.exist >> j & 1;
      const int channel = own.channel_of(j);
      T* const at = staged + ((part + own.step(j)) * kStepPitch + channel) * 4;
      const Four<T> sums = load_four(at);
      const T dt = sums.v[0], gB = sums.v[1], eA = sums.v[2], y = sums.v[3];
      const T raw = own.value(raw_delta[j], p.delta_dtype) + work.bias[channel], u = own.value(raw_u[j], p.u_dtype);
      const T D = work.D[channel], dout = own.value(raw_dout[j], p.u_dtype);
      T dy = dout;
      if (p.z) {
        const T z = own.value(raw_z[j], p.z_dtype), gate = sigmoid(z);
        dy *= z * gate;
        dz[j] = dout * multiply_add(D, u, y) * gate * multiply_add(z, T(1) - gate, T(1));
      }
      du[j] = multiply_add(dt, gB, D * dy);
      ddelta[j] = multiply_add(u, gB, eA * kLn2<T>);
      if (p.delta_softplus && !(raw > T(20))) ddelta[j] *= sigmoid(raw);
      at[0] = exists ? ddelta[j] : T(0);
      at[1] = exists ? dy * u : T(0);
    }
    own.store(du, p.du, p.u_dtype, p.du_stride);
    own.store(ddelta, p.ddelta, p.delta_dtype, p.ddelta_stride);
    if (p.dz) own.store(dz, p.dz, p.z_dtype, p.dz_stride);
  }

  // Steps of a chunk from one of its steps on, at most `most`.
  __device__ __forceinline__ int steps_left(int chunk, int from, int most) const {
    const int64_t left = work.sequence.length - again(chunk) * kStateChunk - from;
    return left < most ? int(left) : most;
  }

  __device__ __forceinline__ void start_span() {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) dA[i] = dB_constant[i] = dC_constant[i] = T(0);
    const int thread = thread_again();
    if (thread < kBlockChannels) work.dbias[thread] = work.dD[thread] = T(0);
  }
  __device__ __forceinline__ void store_span(int index) {
    const int64_t slot = work.sequence.batch * span_slots(p) + span_slot(p, work.sequence.begin, work.row) + again(index);
    T* const to = launch.spans + slot * span_rows(p) * p.dim + work.channels.first;
    lane().store(launch, dA, to);
    if constexpr (kConstant) {
      if (p.B_constant) lane().store(launch, dB_constant, to + kStates * p.dim);
      if (p.C_constant) lane().store(launch, dC_constant, to + constant_C_row(p) * p.dim);
    }
    const int channel = thread_again();
    if (channel >= work.channels.count) return;
    to[channel_row(p) * p.dim + channel] = work.dbias[channel];
    to[(channel_row(p) + 1) * p.dim + channel] = work.dD[channel];
  }

  // Chunks from `last` to the first of the sequence, or of the span when blocks have one each. A chunk of two tiles takes three turns: the first
  // tile forward, the second one forward and back, the first one back. One counter for both: registers are few.
  __device__ __forceinline__ void walk(int last) {
    constexpr int kTurns = 4;
    const auto checkpoint = [&](int step) { return checkpoints + (step / kRun * kBlockThreads + thread_again()) * 4; };
    T h[kLaneStates];
    start_span();
#pragma unroll 1
    for (int at = last * kTurns;;) {
      const int chunk = at / kTurns, turn = at % kTurns, before = turn % 2 * kTile, two = steps_left(chunk, 0, kChunk) > kTile;
      if (turn == 0) {
        const int64_t slot = work.sequence.batch * state_slots(p) + state_slot(p, work.sequence.begin, work.row) + chunk;
        lane().load(launch, h, static_cast<const T*>(p.states) + (slot * p.dstate + launch.first_state) * p.dim + work.channels.first);
      }
      stage(chunk, before, steps_left(chunk, before, kTile));
      if (turn <= two) {
#pragma unroll 1
        for (int first = 0; first < kTile && steps_left(chunk, before + first, 1) > 0; first += kRun) {
          store_four(checkpoint(before + first), h[0], h[1], h[2], h[3]);
          if (steps_left(chunk, before + first, kRun + 1) > kRun) advance(h, first);
        }
      }
      if (turn >= two) {
#pragma unroll 1
        for (int first = kTile - kRun; first >= 0; first -= kRun) {
          const int count = steps_left(chunk, before + first, kRun);
          if (count <= 0) continue;
          if (count == kRun)
            walk_back<true>(first, count, checkpoint(before + first));
          else
            walk_back<false>(first, count, checkpoint(before + first));
          store_run(chunk, before, first, count);
        }
        finish(chunk, before, steps_left(chunk, before, kTile));
#pragma unroll
        for (int i = 0; i < kLaneStates; ++i) h[i] = T(0);  // not needed again: keeps no registers through the walk
      }
      ++at;
      if (turn < 2 * two) continue;
      at = (chunk - 1) * kTurns;
      if (chunk % kSpanChunks) continue;
      store_span(chunk / kSpanChunks);
      if (launch.apart || chunk == 0) return;
      start_span();
    }
  }
};

// Where the shared memory of a multiprocessor holds two blocks, registers should too; for sm_100 nvcc needs a few more than that leaves.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1000)
constexpr int kResidentBlocks = 1;
#else
constexpr int kResidentBlocks = 2;
#endif

template <class T, bool kConstant>
__global__ void __launch_bounds__(kBlockThreads, kConstant ? 1 : kResidentBlocks) selective_scan_bwd_kernel(const __grid_constant__ Launch<T> launch) {
  COBRA_DYNAMIC_SHARED(T, shared);
  const SelectiveScanBwdParams& p = launch.p;
  if (block_index() >= launch.items) return;
  const int64_t block = block_index() % launch.blocks_per_row, place = block_index() / launch.blocks_per_row;
  int64_t row = place, slot = 0;
  if (launch.apart) {
    row = place / span_slots(p), slot = place % span_slots(p);
    if (p.cu_seqlens) {  // the last sequence whose first span is not after the slot
      row = 0;
      for (int64_t above = p.num_seqs; above - row > 1;) {
        const int64_t middle = (row + above) / 2;
        (span_slot(p, sequence_of(p, middle).begin, middle) <= slot ? row : above) = middle;
      }
    }
  }
  const Channels channels = channels_of(launch, block, launch.blocks_per_run, kBlockChannels);
  const Sequence sequence = sequence_of(p, row);
  if (p.cu_seqlens && row == p.num_seqs) return clear_padding<T, kBlockThreads>(launch, sequence, channels);

  COBRA_SHARED(Work<T>, work);
  if (threadIdx.x == 0) work.sequence = sequence, work.channels = channels, work.row = row, work.block = block;
  if (threadIdx.x < kBlockChannels) {
    const bool exists = int(threadIdx.x) < channels.count;
    const int64_t channel = channels.first + threadIdx.x;
    work.bias[threadIdx.x] = p.delta_bias && exists ? load_real<T>(p.delta_bias, p.delta_bias_dtype, channel * p.delta_bias_stride) : T(0);
    work.D[threadIdx.x] = p.D && exists ? load_real<T>(p.D, p.D_dtype, channel * p.D_stride) : T(0);
  }
  __syncthreads();

  Backward<T, kConstant> backward(launch, work, shared);
  const int64_t spans = (sequence.length + kSpan - 1) / kSpan;
  const int64_t alone = slot - span_slot(p, sequence.begin, row);
  if (launch.apart && (alone < 0 || alone >= spans)) return;  // a slot that packed sequences leave unused
  if (!launch.apart || alone == spans - 1)
    backward.lane().load_last(launch, row, channels.first, backward.g);
  else
    backward.lane().load(launch, backward.g, launch.carry + ((sequence.batch * span_slots(p) + slot) * kStates) * p.dim + channels.first);
  const int64_t end = launch.apart && alone < spans - 1 ? (alone + 1) * kSpan : sequence.length;  // of the last step that the block has
  if (end > 0) backward.walk(int((end - 1) / kStateChunk));
  if (!launch.apart) backward.lane().store_initial(launch, work.row, work.channels.first, backward.g);
}

// --- second stages -----------------------------------------------------------------------------------------------------

constexpr int kProjectionSteps = 8;  // of a block of the kernel below: a warp for each, a lane for each column

// dB and dC of one group: the sum over its channel blocks, in their order.
template <class T>
__global__ void __launch_bounds__(kColumns* kProjectionSteps) selective_scan_bwd_projection_kernel(const __grid_constant__ Launch<T> launch) {
  const SelectiveScanBwdParams& p = launch.p;
  const bool is_C = int(threadIdx.x) / kStates % 2;
  const int64_t tiles = (p.seqlen + kProjectionSteps - 1) / kProjectionSteps, most_groups = p.B_stride.groups > p.C_stride.groups ? p.B_stride.groups : p.C_stride.groups;
  const int64_t tile = block_index() % tiles, group = block_index() / tiles % most_groups, batch = block_index() / tiles / most_groups;
  const int64_t position = tile * kProjectionSteps + threadIdx.x / kColumns, state = launch.first_state + threadIdx.x % kStates;
  const ProjectionStride& s = is_C ? p.dC_stride : p.dB_stride;
  if (batch >= p.batch || position >= p.seqlen || state >= p.dstate || (is_C ? p.C_constant : p.B_constant) || group >= s.groups) return;
  const int64_t blocks = launch.blocks_per_row / s.groups;
  T sum = T(0);
  if (!p.cu_seqlens || position < sequence_of(p, p.num_seqs).begin) {
    const T* from = launch.projected + ((batch * launch.blocks_per_row + group * blocks) * p.seqlen + position) * kColumns + threadIdx.x % kColumns;
#pragma unroll 8
    for (int64_t i = 0; i < blocks; ++i, from += p.seqlen * kColumns) sum += *from;
  }
  store_real<T>(is_C ? p.dC : p.dB, is_C ? p.C_dtype : p.B_dtype, batch * s.batch + group * s.group + state * s.state + position * s.seq, sum);
}

constexpr int kChannelThreads = 128;

// dA, constant dB and dC, ddelta_bias, dD of one channel per thread: the sum over rows and their spans, in their order.
template <class T>
__global__ void __launch_bounds__(kChannelThreads) selective_scan_bwd_channel_kernel(const __grid_constant__ Launch<T> launch) {
  const SelectiveScanBwdParams& p = launch.p;
  const int rows = int(channel_row(p)), row = int(blockIdx.y);
  const bool per_channel = row >= rows, is_D = row > rows;
  const int64_t state = launch.first_state + row % kStates;
  if (per_channel ? !launch.last || !(is_D ? p.dD : p.ddelta_bias) : state >= p.dstate) return;
  for (int64_t channel = int64_t(blockIdx.x) * kChannelThreads + threadIdx.x; channel < p.dim; channel += int64_t(gridDim.x) * kChannelThreads) {
    T sum = T(0);
    for (int64_t sequence_row = 0; sequence_row < (p.cu_seqlens ? p.num_seqs : p.batch); ++sequence_row) {
      const Sequence sequence = sequence_of(p, sequence_row);
      const T* from = launch.spans + ((sequence.batch * span_slots(p) + span_slot(p, sequence.begin, sequence_row)) * span_rows(p) + row) * p.dim + channel;
      for (int64_t begin = 0; begin < sequence.length; begin += kSpan, from += span_rows(p) * p.dim) sum += *from;
    }
    if (per_channel) {
      store_real<T>(is_D ? p.dD : p.ddelta_bias, is_D ? p.D_dtype : p.delta_bias_dtype, channel, sum);
    } else if (row < kStates) {
      store_real<T>(p.dA, p.A_dtype, channel * p.dA_stride.dim + state * p.dA_stride.state, sum);
    } else {
      const bool is_C = row >= constant_C_row(p);
      const ProjectionStride& s = is_C ? p.dC_stride : p.dB_stride;
      store_real<T>(is_C ? p.dC : p.dB, is_C ? p.C_dtype : p.B_dtype, channel * s.group + state * s.state, sum);
    }
  }
}

// --- launches ----------------------------------------------------------------------------------------------------------

template <class T>
Launch<T> plan(const SelectiveScanBwdParams& p) {
  Launch<T> launch{};
  launch.p = p;
  launch.along_time = p.u_stride.seq == 1 && p.u_stride.dim != 1;
  const auto group_size = [&](const ProjectionStride& s, bool constant) { return constant ? p.dim : p.dim / s.groups; };
  launch.run = greatest_common_divisor(group_size(p.B_stride, p.B_constant), group_size(p.C_stride, p.C_constant));
  launch.blocks_per_run = ceil_div(launch.run, kBlockChannels);
  launch.blocks_per_row = p.dim == 0 ? 0 : p.dim / launch.run * launch.blocks_per_run;
  return launch;
}

// Hands out the workspace; returns its size.
template <class T>
int64_t share_out(Launch<T>& launch) {
  const SelectiveScanBwdParams& p = launch.p;
  int64_t used = 0;
  const auto take = [&](T*& part, int64_t size) {
    part = size && p.workspace ? static_cast<T*>(p.workspace) + used : nullptr;
    used += size;
  };
  const int64_t spans = p.batch * span_slots(p);
  take(launch.projected, p.B_constant && p.C_constant ? 0 : p.batch * launch.blocks_per_row * p.seqlen * kColumns);
  take(launch.spans, spans * span_rows(p) * p.dim);
  take(launch.carry, spans * kStates * p.dim);
  take(launch.sums, p.dstate > kStates ? p.batch * p.seqlen * 3 * p.dim : 0);
  return used;
}

template <class T>
int start(void (*kernel)(Launch<T>), int64_t blocks, int threads, size_t bytes, void* stream, const Launch<T>& call) {
  if (blocks == 0) return 0;
  const int64_t most = max_grid_x();
  return launch(kernel, dim3(unsigned(blocks < most ? blocks : most), unsigned(ceil_div(blocks, most))), dim3(threads), bytes, stream, call);
}

template <class T>
int backward(const SelectiveScanBwdParams& p, void* stream) {
  Launch<T> call = plan<T>(p);
  share_out(call);
  const int64_t rows = sequence_count(p) * call.blocks_per_row;
  // Two blocks fit a multiprocessor. With less than two rounds of them, spans of sequences run side by side.
  call.apart = p.seqlen > kSpan && rows < 4 * int64_t(p.multiprocessors) && !(p.cu_seqlens && p.num_seqs == 0);  // padding alone has no spans
  call.items = call.apart ? p.batch * span_slots(p) * call.blocks_per_row : rows;
  const int64_t groups = p.B_stride.groups > p.C_stride.groups ? p.B_stride.groups : p.C_stride.groups;
  const bool constant = p.B_constant || p.C_constant;
  for (call.first_state = 0; call.first_state < p.dstate; call.first_state += kStates) {
    call.last = call.first_state + kStates >= p.dstate;
    if (call.apart) {
      const int64_t blocks = p.dim / call.run * ceil_div(call.run, kCarryChannels) * sequence_count(p);
      if (const int error = start(&selective_scan_bwd_carry_kernel<T>, blocks, kCarryThreads, 0, stream, call)) return error;
    }
    if (const int error = start(constant ? &selective_scan_bwd_kernel<T, true> : &selective_scan_bwd_kernel<T, false>, call.items, kBlockThreads, sizeof(T) * kSharedNumbers, stream, call))
      return error;
    if (!p.B_constant || !p.C_constant) {
      const int64_t blocks = p.batch * groups * ceil_div(p.seqlen, kProjectionSteps);
      if (const int error = start(&selective_scan_bwd_projection_kernel<T>, blocks, kColumns * kProjectionSteps, 0, stream, call)) return error;
    }
    if (p.dim) {
      const int64_t blocks = ceil_div(p.dim, kChannelThreads), most = max_grid_x();
      const dim3 grid(unsigned(blocks < most ? blocks : most), unsigned(channel_row(p) + 2));
      if (const int error = launch(&selective_scan_bwd_channel_kernel<T>, grid, dim3(kChannelThreads), 0, stream, call)) return error;
    }
  }
  return 0;
}

}  // namespace

int64_t selective_scan_bwd_workspace_cuda(const SelectiveScanBwdParams& p) {
  Launch<float> call = plan<float>(p);
  return share_out(call);
}

int selective_scan_bwd_cuda(const SelectiveScanBwdParams& p, void* stream) {
  return pick_arithmetic(p.u_dtype, [&](auto t) { return backward<decltype(t)>(p, stream); });
}

}  // namespace cobra
