// selective_scan forward on a GPU in fp32 arithmetic: every dtype, layout and size.
//
// A warp owns 32 / kLanes channels of one sequence and walks it in tiles of 8 steps; warps never meet. The 16 states of a
// channel are in the registers of kLanes lanes: one where there are channels enough to fill the GPU, four where there are not.
// Of a tile's 8 steps a lane owns 8 / kLanes: it reads delta, u and z of those, finishes their dt and du, and stores their out.
// B and C of the tile lie in the warp's shared memory as fp32. What the next tile needs is on its way while this one is computed.
// More than 16 states are computed 16 at a time for each tile, and wait in last_state.
#include "common/rows.h"
#include "selective_scan/selective_scan_cuda.cuh"

namespace cobra {
namespace {

constexpr int kTile = 8, kChunk = 16, kWarpsPerBlock = 4, kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kProjectionTile = kTile * kChunk;  // floats of B, or of C
constexpr int kConstantPitch = kChunk + 4;       // floats per channel: eight lanes' float4 fall into different banks

COBRA_HOST_DEVICE int shared_floats(int lanes, bool constant) {
  return 4 * kProjectionTile + (constant ? 2 * kConstantPitch * kWarpSize / lanes : 0);  // of a warp: two tiles, each B and C
}

// A tensor (batch, dim, seqlen), and B or C, with strides in bytes.
struct StepsLayout {
  char* base;
  int64_t batch, dim, step;
  DType dtype;
};
struct ProjectionLayout {
  const char* base;
  int64_t batch, group, state, step;
  int64_t group_channels;  // 1 when constant: then `group` is that of a channel
  DType dtype;
  bool constant;
};

struct Launch {
  SelectiveScanFwdParams p;
  StepsLayout delta, u, z, out;
  ProjectionLayout B, C;
  int64_t run;  // neighbouring channels that share a group of B and of C
  int64_t warps_per_run, warps_per_row, warps;
};

// --- elements as they lie in memory ------------------------------------------------------------------------------------

// Words of `raw` hold one element each, 16 or 32 bits, or, if `packed`, are the memory's own words.
template <int kCount>
__device__ __forceinline__ void load_packed(uint32_t (&raw)[kCount], const char* at, bool wide) {
  const auto words = [&](auto count) {
    constexpr int n = decltype(count)::value;
    if constexpr (n % 4 == 0) {
#pragma unroll
      for (int i = 0; i < n; i += 4) {
        const uint4 w = reinterpret_cast<const uint4*>(at)[i / 4];
        raw[i] = w.x, raw[i + 1] = w.y, raw[i + 2] = w.z, raw[i + 3] = w.w;
      }
    } else if constexpr (n == 2) {
      const uint2 w = *reinterpret_cast<const uint2*>(at);
      raw[0] = w.x, raw[1] = w.y;
    } else {
      raw[0] = *reinterpret_cast<const uint32_t*>(at);
    }
  };
  if (wide)
    words(std::integral_constant<int, kCount>{});
  else
    words(std::integral_constant<int, kCount / 2>{});
}

// Elements `stride` bytes apart. Only `count` >= 1 of them exist: the last one stands for the rest.
template <int kCount>
__device__ __forceinline__ void load_scattered(uint32_t (&raw)[kCount], const char* at, int64_t stride, bool wide, int count) {
  const auto elements = [&](auto element) {
    using E = decltype(element);
    if (count >= kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i, at += stride) raw[i] = *reinterpret_cast<const E*>(at);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        raw[i] = *reinterpret_cast<const E*>(at);
        if (i + 1 < count) at += stride;
      }
    }
  };
  if (wide)
    elements(uint32_t{});
  else
    elements(uint16_t{});
}

template <int kCount>
__device__ __forceinline__ void to_floats(float (&v)[kCount], const uint32_t (&raw)[kCount], DType dtype, bool packed) {
  if (dtype == DType::kFloat32) {
    memcpy(v, raw, sizeof(v));
    return;
  }
  uint32_t halves[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) halves[i] = packed ? i % 2 ? raw[i / 2] >> 16 : raw[i / 2] & 0xffff : raw[i];
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = halves[i] << 16;
      memcpy(&v[i], &bits, 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint16_t bits = uint16_t(halves[i]);
      __half half;
      memcpy(&half, &bits, 2);
      v[i] = __half2float(half);
    }
  }
}

// --- u, delta, z, out --------------------------------------------------------------------------------------------------

// A lane's kOwn steps of the tile that its pointers stand at; `exist` of them are inside the sequence.
template <int kOwn>
struct Own {
  int exist;
  bool whole;  // the tile is inside the sequence

  __device__ __forceinline__ Own(int64_t left, int part) : exist(left >= kTile ? kOwn : int(left) - part * kOwn), whole(left >= kTile) {}

  // `packed`: steps lie side by side, tiles are aligned, for every lane of the warp.
  __device__ __forceinline__ void load(uint32_t (&raw)[kOwn], const char* at, const StepsLayout& s, bool packed) const {
    const bool wide = s.dtype == DType::kFloat32;
    if (whole && packed) return load_packed(raw, at, wide);
    const int count = exist < 1 ? 1 : exist;  // of none, the sequence's last step
    load_scattered(raw, at + (exist - count) * s.step, s.step, wide, count);
  }
  __device__ __forceinline__ void convert(float (&v)[kOwn], const uint32_t (&raw)[kOwn], const StepsLayout& s, bool packed) const {
    to_floats(v, raw, s.dtype, whole && packed);
  }
  __device__ __forceinline__ void store(const float (&v)[kOwn], char* at, const StepsLayout& s, bool packed) const {
    with_float_type(s.dtype, [&](auto t) {
      using T = decltype(t);
      if (whole && packed) {
        Pack<T, kOwn> pack;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) pack.v[j] = round_to<T>(v[j]);
        if constexpr (sizeof(pack) == 4)
          *reinterpret_cast<Pack<T, kOwn>*>(at) = pack;
        else
          store_pack<T, kOwn>(reinterpret_cast<T*>(at), pack);
      } else {
        char* to = at;
#pragma unroll
        for (int j = 0; j < kOwn; ++j, to += s.step)
          if (j < exist) *reinterpret_cast<T*>(to) = round_to<T>(v[j]);
      }
    });
  }
};

// Where the first of a lane's steps lies.
__device__ __forceinline__ char* first_step(const StepsLayout& s, const Sequence& sequence, int64_t channel, int part) {
  return s.base + sequence.batch * s.batch + channel * s.dim + (sequence.begin + part) * s.step;
}
__device__ __forceinline__ bool steps_packed(const StepsLayout& s, const char* sequence_begin) {
  return s.step == (s.dtype == DType::kFloat32 ? 4 : 2) && __all_sync(kAllLanes, reinterpret_cast<uintptr_t>(sequence_begin) % 16 == 0);
}

// --- B and C -----------------------------------------------------------------------------------------------------------

// B or C of the warp's group at the first step of a tile. Variable: 16 states of 8 steps go to shared memory as floats
// [step][state], four elements per lane, neighbours in memory if it can be. Constant: each lane keeps its channel's states.
struct Projection {
  const char* at;
  enum Form { kScattered, kStatesPacked, kStepsPacked } form;

  __device__ __forceinline__ Projection(const ProjectionLayout& s, const Sequence& sequence, int64_t channel) {
    at = s.base + sequence.batch * s.batch + channel / s.group_channels * s.group + sequence.begin * s.step;
    const int64_t size = s.dtype == DType::kFloat32 ? 4 : 2;
    const auto aligned = [&](int64_t stride) { return (reinterpret_cast<uintptr_t>(at) | uint64_t(stride)) % (4 * size) == 0; };
    form = s.state == size && aligned(s.step) ? kStatesPacked : s.step == size && aligned(s.state) ? kStepsPacked : kScattered;
  }

  // `left` steps of the sequence, `states` of the tensor from the tile's first on: what is not there is not read.
  __device__ __forceinline__ void load(uint32_t (&raw)[4], const char* from, const ProjectionLayout& s, int64_t left, int64_t states, int lane) const {
    const bool wide = s.dtype == DType::kFloat32, whole = left >= kTile && states >= kChunk;
    if (whole && form == kStepsPacked) return load_packed(raw, from + lane % 2 * 4 * s.step + lane / 2 * s.state, wide);
    if (whole && form == kStatesPacked) return load_packed(raw, from + lane / 4 * s.step + lane % 4 * 4 * s.state, wide);
    const int t = lane / 4 < left ? lane / 4 : int(left) - 1, n = lane % 4 * 4 < states ? lane % 4 * 4 : int(states) - 1;
    load_scattered(raw, from + t * s.step + n * s.state, s.state, wide, states - n < 4 ? int(states - n) : 4);
  }
  // What is not there becomes 0.
  __device__ __forceinline__ void store(const uint32_t (&raw)[4], float* tile, const ProjectionLayout& s, int64_t left, int64_t states, int lane) const {
    const bool whole = left >= kTile && states >= kChunk;
    float v[4];
    to_floats(v, raw, s.dtype, whole && form != kScattered);
    if (whole && form == kStepsPacked) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[(lane % 2 * 4 + i) * kChunk + lane / 2] = v[i];
      return;
    }
    if (!whole) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane / 4 >= left || lane % 4 * 4 + i >= states) v[i] = 0.f;
    }
    *reinterpret_cast<float4*>(tile + lane * 4) = make_float4(v[0], v[1], v[2], v[3]);
  }
  // A constant's states first .. first + kStates - 1, for this lane alone.
  template <int kStates>
  __device__ __forceinline__ void keep(float* mine, const ProjectionLayout& s, int64_t first, int64_t dstate) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) mine[k] = first + k < dstate ? load_float(at + (first + k) * s.state, s.dtype, 0) : 0.f;
  }
};

// --- recurrence --------------------------------------------------------------------------------------------------------

// 8 steps of a lane's states: updates h and adds the sum over the chunk's states of C h to y of the lane's own steps. The sum is
// (p0 + p2) + (p1 + p3) with p the sums over four neighbouring states, in whatever lanes they are: same bits.
template <int kLanes>
__device__ __forceinline__ void recur(float (&h)[kChunk / kLanes], const float (&rate)[kChunk / kLanes], const float (&dt)[kTile / kLanes],
                                      const float (&du)[kTile / kLanes], float (&y)[kTile / kLanes], const float* B, int B_step,
                                      const float* C, int C_step, int part) {
  constexpr int kOwn = kTile / kLanes, kQuads = kChunk / kLanes / 4;
  float partial[kQuads], sums[kTile];
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    float step_dt = dt[t % kOwn], step_du = du[t % kOwn];
    if constexpr (kLanes > 1) {
      step_dt = __shfl_sync(kAllLanes, step_dt, t / kOwn, kLanes);
      step_du = __shfl_sync(kAllLanes, step_du, t / kOwn, kLanes);
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float4 B4 = *reinterpret_cast<const float4*>(B + t * B_step + quad * 4), C4 = *reinterpret_cast<const float4*>(C + t * C_step + quad * 4);
      const float Bs[4] = {B4.x, B4.y, B4.z, B4.w}, Cs[4] = {C4.x, C4.y, C4.z, C4.w};
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& state = h[quad * 4 + i];
        state = fmaf(exp2_fast(step_dt * rate[quad * 4 + i]), state, step_du * Bs[i]);
        sum = i ? fmaf(Cs[i], state, sum) : Cs[i] * state;
      }
      partial[quad] = sum;
    }
    if constexpr (kLanes == 1)
      y[t] += (partial[0] + partial[2]) + (partial[1] + partial[3]);
    else
      sums[t] = partial[0];
  }
  if constexpr (kLanes > 1) {
    // Each of the four lanes ends with the sums of its own two steps.
    float half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = sums[i], high = sums[i + 4];
      half[i] = (part & 2 ? high : low) + __shfl_xor_sync(kAllLanes, part & 2 ? low : high, 2);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) y[j] += (part & 1 ? half[j + 2] : half[j]) + __shfl_xor_sync(kAllLanes, part & 1 ? half[j] : half[j + 2], 1);
  }
}

// --- kernel ------------------------------------------------------------------------------------------------------------

// A lane's channel and its states.
template <int kLanes>
struct LaneStates {
  static constexpr int kStates = kChunk / kLanes;
  int64_t row, channel, first;  // first state of chunk 0
  bool active;

  // `begin`: from the initial state; otherwise from last_state.
  __device__ __forceinline__ void load(const SelectiveScanFwdParams& p, float (&h)[kStates], float (&rate)[kStates], int64_t chunk, bool begin) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = chunk + first + k;
      const bool exists = n < p.dstate;
      rate[k] = exists ? decay_rate(p, channel, n) : 0.f;
      h[k] = !exists || !active ? 0.f : begin ? initial_state(p, row, channel, n) : last_state_of(p, row, channel)[n];
    }
  }
  __device__ __forceinline__ void store(const SelectiveScanFwdParams& p, const float (&h)[kStates], int64_t chunk) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = chunk + first + k;
      if (active && n < p.dstate) last_state_of(p, row, channel)[n] = h[k];
    }
  }
};

template <int kLanes, bool kPlain>
__device__ __forceinline__ void scan_warp(const Launch& launch, float* shared, int64_t warp, int lane) {
  constexpr int kOwn = kTile / kLanes, kStates = kChunk / kLanes, kChannels = kWarpSize / kLanes;
  const SelectiveScanFwdParams& p = launch.p;
  const int part = lane % kLanes;
  const int64_t row = warp / launch.warps_per_row, within = warp % launch.warps_per_row, run = within / launch.warps_per_run;
  const int64_t first_channel = run * launch.run + within % launch.warps_per_run * kChannels, channels_end = (run + 1) * launch.run;
  const bool active = first_channel + lane / kLanes < channels_end;
  const int64_t channel = active ? first_channel + lane / kLanes : channels_end - 1;  // the rest repeat the last one and store nothing
  const Sequence sequence = sequence_of(p, row);
  int64_t left = sequence.length;

  char* out_at = first_step(launch.out, sequence, channel, part * kOwn);
  const bool out_packed = steps_packed(launch.out, out_at - part * kOwn * launch.out.step);
  if (p.cu_seqlens && row == p.num_seqs) {  // padding
    const float zeros[kOwn] = {};
    for (; active && left > 0; left -= kTile, out_at += kTile * launch.out.step) Own<kOwn>(left, part).store(zeros, out_at, launch.out, out_packed);
    return;
  }
  const LaneStates<kLanes> states{row, channel, part * kStates, active};
  const bool chunked = !kPlain && p.dstate > kChunk, B_constant = !kPlain && launch.B.constant, C_constant = !kPlain && launch.C.constant;
  const int64_t dstate = kPlain ? kChunk : p.dstate;
  float h[kStates], rate[kStates];
  for (int64_t chunk = 0; chunk < dstate; chunk += kChunk) {
    states.load(p, h, rate, chunk, true);
    if (chunked || left == 0) states.store(p, h, chunk);
  }
  if (left == 0) return;

  const char *delta_at = first_step(launch.delta, sequence, channel, part * kOwn), *u_at = first_step(launch.u, sequence, channel, part * kOwn),
             *z_at = first_step(launch.z, sequence, channel, part * kOwn);
  const bool delta_packed = steps_packed(launch.delta, delta_at - part * kOwn * launch.delta.step),
             u_packed = steps_packed(launch.u, u_at - part * kOwn * launch.u.step), z_packed = steps_packed(launch.z, z_at - part * kOwn * launch.z.step);
  Projection B(launch.B, sequence, channel), C(launch.C, sequence, channel);
  float* const constant_B = shared + 4 * kProjectionTile + lane / kLanes * kConstantPitch + part * kStates;
  float* const constant_C = constant_B + kConstantPitch * kChannels;
  if (B_constant) B.keep<kStates>(constant_B, launch.B, part * kStates, dstate);
  if (C_constant) C.keep<kStates>(constant_C, launch.C, part * kStates, dstate);
  const float bias = channel_value(p.delta_bias, p.delta_bias_dtype, p.delta_bias_stride, channel, 0.f);
  const float skip = channel_value(p.D, p.D_dtype, p.D_stride, channel, 0.f);

  uint32_t raw_delta[kOwn], raw_u[kOwn], raw_z[kOwn], raw_B[4], raw_C[4];
  {
    const Own<kOwn> own(left, part);
    own.load(raw_delta, delta_at, launch.delta, delta_packed);
    own.load(raw_u, u_at, launch.u, u_packed);
    if (!B_constant) B.load(raw_B, B.at, launch.B, left, dstate, lane);
    if (!C_constant) C.load(raw_C, C.at, launch.C, left, dstate, lane);
  }
  int half = 0;  // of the two tiles of B and C
#pragma unroll 1
  for (; left > 0; left -= kTile) {
    const Own<kOwn> own(left, part);
    const bool last = left <= kTile;
    float dt[kOwn], du[kOwn], y[kOwn];
    own.convert(dt, raw_delta, launch.delta, delta_packed);
    own.convert(du, raw_u, launch.u, u_packed);
    if (p.z) own.load(raw_z, z_at, launch.z, z_packed);
    if (!last) {
      const Own<kOwn> next(left - kTile, part);
      next.load(raw_delta, delta_at += kTile * launch.delta.step, launch.delta, delta_packed);
      next.load(raw_u, u_at += kTile * launch.u.step, launch.u, u_packed);
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) dt[j] += bias;
    if (p.delta_softplus) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) dt[j] = softplus(dt[j]);
    }
    if (!own.whole) {  // steps that do not exist keep the state: exp(0 A) = 1, nothing is added
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (j >= own.exist) dt[j] = du[j] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      y[j] = skip * du[j];
      du[j] *= dt[j];
    }

#pragma unroll 1
    for (int64_t chunk = 0; chunk < dstate; chunk += kChunk) {
      float* const tile_B = shared + half * 2 * kProjectionTile;
      float* const tile_C = tile_B + kProjectionTile;
      half ^= 1;
      // The next tile is this one's next chunk, or the next one's first.
      const bool same = chunk + kChunk < dstate;
      const int64_t next_chunk = same ? chunk + kChunk : 0, next_left = same ? left : left - kTile;
      if (!B_constant) {
        B.store(raw_B, tile_B, launch.B, left, dstate - chunk, lane);
        if (!same) B.at += kTile * launch.B.step;
        if (next_left > 0) B.load(raw_B, B.at + next_chunk * launch.B.state, launch.B, next_left, dstate - next_chunk, lane);
      }
      if (!C_constant) {
        C.store(raw_C, tile_C, launch.C, left, dstate - chunk, lane);
        if (!same) C.at += kTile * launch.C.step;
        if (next_left > 0) C.load(raw_C, C.at + next_chunk * launch.C.state, launch.C, next_left, dstate - next_chunk, lane);
      }
      if (chunked) {
        states.load(p, h, rate, chunk, false);
        if (B_constant) B.keep<kStates>(constant_B, launch.B, chunk + part * kStates, dstate);
        if (C_constant) C.keep<kStates>(constant_C, launch.C, chunk + part * kStates, dstate);
      }
      __syncwarp();
      recur<kLanes>(h, rate, dt, du, y, B_constant ? constant_B : tile_B + part * kStates, B_constant ? 0 : kChunk,
                    C_constant ? constant_C : tile_C + part * kStates, C_constant ? 0 : kChunk, part);
      if (chunked) states.store(p, h, chunk);
    }
    if (p.z) {
      float gate[kOwn];
      own.convert(gate, raw_z, launch.z, z_packed);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) y[j] *= silu(gate[j]);
      z_at += kTile * launch.z.step;
    }
    if (active) own.store(y, out_at, launch.out, out_packed);
    out_at += kTile * launch.out.step;
  }
  if (!chunked) states.store(p, h, 0);
}

template <int kLanes, bool kPlain>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, kLanes == 1 ? (kPlain ? 3 : 2) : 4) selective_scan_fwd_kernel(const __grid_constant__ Launch launch) {
  COBRA_DYNAMIC_SHARED(float, shared);
  const int lane = int(threadIdx.x) % kWarpSize, in_block = int(threadIdx.x) / kWarpSize;
  float* const mine = shared + in_block * shared_floats(kLanes, !kPlain);
  for (int64_t warp = int64_t(blockIdx.x) * kWarpsPerBlock + in_block; warp < launch.warps; warp += int64_t(gridDim.x) * kWarpsPerBlock) {
    scan_warp<kLanes, kPlain>(launch, mine, warp, lane);
    __syncwarp();  // before the tiles are written again
  }
}

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

StepsLayout layout(const void* base, DType dtype, const SequenceStride& s) {
  const int64_t size = int64_t(size_of(dtype));
  return {static_cast<char*>(const_cast<void*>(base)), s.batch * size, s.dim * size, s.seq * size, dtype};
}
ProjectionLayout layout(const void* base, DType dtype, const ProjectionStride& s, bool constant, int64_t dim) {
  const int64_t size = int64_t(size_of(dtype));
  return {static_cast<const char*>(base), s.batch * size, s.group * size, s.state * size, s.seq * size, constant ? 1 : dim / s.groups, dtype, constant};
}

// With so many lanes per channel.
Launch plan(const SelectiveScanFwdParams& p, int lanes) {
  Launch launch{p, layout(p.delta, p.delta_dtype, p.delta_stride), layout(p.u, p.u_dtype, p.u_stride), layout(p.z, p.z_dtype, p.z_stride),
                layout(p.out, p.u_dtype, p.out_stride), layout(p.B, p.B_dtype, p.B_stride, p.B_constant, p.dim),
                layout(p.C, p.C_dtype, p.C_stride, p.C_constant, p.dim), 0, 0, 0, 0};
  const auto group_size = [&](const ProjectionLayout& s) { return s.constant ? p.dim : s.group_channels; };
  launch.run = greatest_common_divisor(group_size(launch.B), group_size(launch.C));
  const int64_t channels = kWarpSize / lanes;
  launch.warps_per_run = (launch.run + channels - 1) / channels;
  launch.warps_per_row = launch.warps_per_run * (p.dim / launch.run);
  launch.warps = launch.warps_per_row * sequence_count(p);
  return launch;
}

template <int kLanes, bool kPlain>
int start(const Launch& plan, void* stream) {
  const int64_t blocks = (plan.warps + kWarpsPerBlock - 1) / kWarpsPerBlock, most = max_grid_x();
  const size_t bytes = sizeof(float) * kWarpsPerBlock * shared_floats(kLanes, !kPlain);
  return launch(&selective_scan_fwd_kernel<kLanes, kPlain>, dim3(unsigned(blocks < most ? blocks : most)), dim3(kWarpsPerBlock * kWarpSize), bytes, stream, plan);
}

}  // namespace

int32_t gpu_multiprocessors() {
#if defined(__CUDACC__)
  int device, count;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 0;
  return count;
#else
  return 0;  // the emulator's callers say what they emulate
#endif
}

int selective_scan_fwd_cuda(const SelectiveScanFwdParams& p, void* stream) {
  if (p.dim == 0 || sequence_count(p) == 0) return 0;
  const Launch wide = plan(p, 1);
  const bool plain = p.dstate == kChunk && !p.B_constant && !p.C_constant;
  // One lane per channel needs two warps for each of a multiprocessor's four schedulers to hide its latencies.
  if (wide.warps >= 8 * int64_t(p.multiprocessors)) return plain ? start<1, true>(wide, stream) : start<1, false>(wide, stream);
  const Launch narrow = plan(p, 4);
  return plain ? start<4, true>(narrow, stream) : start<4, false>(narrow, stream);
}

}  // namespace cobra
