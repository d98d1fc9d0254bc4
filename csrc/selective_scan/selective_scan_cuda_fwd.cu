// selective_scan forward on a GPU in fp32 arithmetic: every dtype, layout and size.
//
// A warp owns 32 / kLanes channels of one sequence and walks it in tiles; the warps of a block do not meet. The 16 states of a channel
// are in the registers of kLanes lanes: one where there are channels enough to fill the GPU, four where there are not. A tile's steps
// are shared out to those lanes: each reads delta, u and z of its own ones, finishes their dt and du, and stores their out.
// B and C of the tile lie in the warp's shared memory as fp32. What the next tile needs is on its way while this one is computed.
// More than 16 states are computed 16 at a time for each tile, and wait in last_state.
#include "common/rows.h"
#include "selective_scan/selective_scan_cuda.cuh"

namespace cobra {
namespace {

constexpr int kChunk = 16, kWarpsPerBlock = 4, kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kConstantPitch = kChunk + 4;  // floats per channel: eight lanes' float4 fall into different banks

// Steps of a tile. More of them spread the cost of a tile over a lane's few states.
COBRA_HOST_DEVICE constexpr int tile_steps(int lanes) { return lanes == 1 ? 8 : 16; }

// Of a warp: two tiles, each B and C.
COBRA_HOST_DEVICE int shared_floats(int lanes, bool constant) {
  return 4 * tile_steps(lanes) * kChunk + (constant ? 2 * kConstantPitch * kWarpSize / lanes : 0);
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
  Line line;    // of `warps` chains of tiles; no workers: each warp's chains are its own
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
    } else {
      static_assert(n == 2);
      const uint2 w = *reinterpret_cast<const uint2*>(at);
      raw[0] = w.x, raw[1] = w.y;
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

// 16-bit neighbours at any address, in the two aligned blocks of kCount that hold them, and later their words.
template <int kCount>
__device__ __forceinline__ void load_shifted(uint32_t (&raw)[kCount], const char* at) {
  uint32_t block[2][kCount / 2];
  const char* const aligned = at - reinterpret_cast<uintptr_t>(at) % (2 * kCount);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Pack<uint16_t, kCount> pack = load_pack<uint16_t, kCount>(reinterpret_cast<const uint16_t*>(aligned) + i * kCount);
    memcpy(block[i], &pack, sizeof(pack));
  }
  memcpy(raw, block, sizeof(raw));
}
template <int kCount>
__device__ __forceinline__ void shift_words(uint32_t (&words)[kCount], const uint32_t (&raw)[kCount], const char* at) {
  const int first = int(reinterpret_cast<uintptr_t>(at) % (2 * kCount)) / 2;  // element of the first block
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = raw[i];
#pragma unroll
  for (int words_off = kCount / 4; words_off > 0; words_off /= 2)
#pragma unroll
    for (int i = 0; i + words_off < kCount; ++i)
      if (first / 2 & words_off) words[i] = words[i + words_off];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i)
    if (first & 1) words[i] = words[i] >> 16 | words[i + 1] << 16;
}

// --- u, delta, z, out --------------------------------------------------------------------------------------------------

// How a channel's steps are read. Packed: side by side, tiles aligned, for every lane of the warp. Shifted: 16-bit, side by side.
enum class Access { kScattered, kPacked, kShifted };

// A lane's kOwn steps of the tile that its pointers stand at; `exist` of them are inside the sequence.
template <int kTile, int kOwn>
struct Own {
  int exist;
  bool whole;     // the tile is inside the sequence
  bool followed;  // and so are kOwn steps beyond

  __device__ __forceinline__ Own(int64_t left, int part)
      : exist(left >= kTile ? kOwn : int(left) - part * kOwn), whole(left >= kTile), followed(left >= kTile + kOwn) {}

  __device__ __forceinline__ void load(uint32_t (&raw)[kOwn], const char* at, int64_t step, DType dtype, Access access) const {
    const bool wide = dtype == DType::kFloat32;
    if (whole && access == Access::kPacked) return load_packed(raw, at, wide);
    if (followed && access == Access::kShifted) return load_shifted(raw, at);
    const int count = exist < 1 ? 1 : exist;  // of none, the sequence's last step
    load_scattered(raw, at + (exist - count) * step, step, wide, count);
  }
  // `at` may have moved on by whole tiles.
  __device__ __forceinline__ void convert(float (&v)[kOwn], const uint32_t (&raw)[kOwn], const char* at, DType dtype, Access access) const {
    if (followed && access == Access::kShifted) {
      uint32_t words[kOwn];
      shift_words(words, raw, at);
      return to_floats(v, words, dtype, true);
    }
    to_floats(v, raw, dtype, whole && access == Access::kPacked);
  }
  __device__ __forceinline__ void store(const float (&v)[kOwn], char* at, int64_t step, DType dtype, Access access) const {
    with_float_type(dtype, [&](auto t) {
      using T = decltype(t);
      if (whole && access == Access::kPacked) {
        Pack<T, kOwn> pack;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) pack.v[j] = round_to<T>(v[j]);
        store_pack<T, kOwn>(reinterpret_cast<T*>(at), pack);
      } else {
        char* to = at;
#pragma unroll
        for (int j = 0; j < kOwn; ++j, to += step)
          if (j < exist) *reinterpret_cast<T*>(to) = round_to<T>(v[j]);
      }
    });
  }
};

// Where the first of a lane's steps lies.
__device__ __forceinline__ char* first_step(const StepsLayout& s, const Sequence& sequence, int64_t channel, int part) {
  return s.base + sequence.batch * s.batch + channel * s.dim + (sequence.begin + part) * s.step;
}
__device__ __forceinline__ Access access_of(const StepsLayout& s, const char* sequence_begin) {
  const bool packed = s.step == (s.dtype == DType::kFloat32 ? 4 : 2) && __all_sync(kAllLanes, reinterpret_cast<uintptr_t>(sequence_begin) % 16 == 0);
  return packed ? Access::kPacked : Access::kScattered;
}

// --- B and C -----------------------------------------------------------------------------------------------------------

// B or C of the warp's group at the first step of a tile. Variable: 16 states of a tile go to shared memory as floats
// [step][state], kEach elements per lane, neighbours in memory if it can be. Constant: each lane keeps its channel's states.
enum class Form { kScattered, kStatesPacked, kStepsPacked };
template <int kTile>
struct Projection {
  static constexpr int kEach = kTile * kChunk / kWarpSize, kParts = kChunk / kEach;  // lanes that share a step's states
  const char* at;

  __device__ __forceinline__ Projection(const ProjectionLayout& s, const Sequence& sequence, int64_t channel)
      : at(s.base + sequence.batch * s.batch + channel / s.group_channels * s.group + sequence.begin * s.step) {}

  __device__ __forceinline__ Form form(const ProjectionLayout& s) const {
    const int64_t size = s.dtype == DType::kFloat32 ? 4 : 2, bytes = size * kEach < 16 ? size * kEach : 16;
    const auto aligned = [&](int64_t stride) { return (reinterpret_cast<uintptr_t>(at) | uint64_t(stride)) % bytes == 0; };
    return s.state == size && aligned(s.step) ? Form::kStatesPacked : s.step == size && aligned(s.state) ? Form::kStepsPacked : Form::kScattered;
  }

  // `left` steps of the sequence, `states` of the tensor from the tile's first on: what is not there is not read.
  __device__ __forceinline__ void load(uint32_t (&raw)[kEach], const char* from, const ProjectionLayout& s, DType dtype, Form form, int64_t left,
                                       int64_t states, int lane) const {
    const bool wide = dtype == DType::kFloat32, whole = left >= kTile && states >= kChunk;
    if (whole && form == Form::kStepsPacked) return load_packed(raw, from + lane % 2 * kEach * int64_t(wide ? 4 : 2) + lane / 2 * s.state, wide);
    int64_t t = lane / kParts, n = lane % kParts * kEach;
    if (whole && form == Form::kStatesPacked) return load_packed(raw, from + t * s.step + n * (wide ? 4 : 2), wide);
    t = t < left ? t : left - 1;
    n = n < states ? n : states - 1;
    load_scattered(raw, from + t * s.step + n * s.state, s.state, wide, states - n < kEach ? int(states - n) : kEach);
  }
  // What is not there becomes 0.
  __device__ __forceinline__ void store(const uint32_t (&raw)[kEach], float* tile, DType dtype, Form form, int64_t left, int64_t states,
                                        int lane) const {
    const bool whole = left >= kTile && states >= kChunk;
    float v[kEach];
    to_floats(v, raw, dtype, whole && form != Form::kScattered);
    if (whole && form == Form::kStepsPacked) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) tile[(lane % 2 * kEach + i) * kChunk + lane / 2] = v[i];
      return;
    }
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (lane / kParts >= left || lane % kParts * kEach + i >= states) v[i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kEach; i += 4) *reinterpret_cast<float4*>(tile + lane * kEach + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  }
  // A constant's states first .. first + kStates - 1, for this lane alone.
  template <int kStates>
  __device__ __forceinline__ void keep(float* mine, const ProjectionLayout& s, int64_t first, int64_t dstate) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) mine[k] = first + k < dstate ? load_float(at + (first + k) * s.state, s.dtype, 0) : 0.f;
  }
};

// --- what is known when the kernel is compiled ---------------------------------------------------------------------------

// Any call.
struct AnyCall {
  static constexpr bool kKnown = false;
  static constexpr Access kAccess = Access::kScattered;
  static constexpr Form kForm = Form::kScattered;
  __device__ __forceinline__ static DType dtype(DType given) { return given; }
};
// u, delta, z, B, C of one dtype, 16 states, variable B and C, and their layout:
enum class Layout {
  kChannelLast,   // channels side by side in u, delta, z; states in B and C, aligned
  kChannelFirst,  // steps side by side in all of them, aligned
  kShifted,       // steps side by side in u, delta, z, 16-bit, at any address: odd lengths, packed sequences
};
template <DType type, Layout layout>
struct KnownCall {
  static constexpr bool kKnown = true;
  static constexpr bool kFirst = layout == Layout::kChannelFirst, kLast = layout == Layout::kChannelLast;
  static constexpr Access kAccess = kFirst ? Access::kPacked : kLast ? Access::kScattered : Access::kShifted;
  static constexpr Form kForm = kFirst ? Form::kStepsPacked : kLast ? Form::kStatesPacked : Form::kScattered;
  __device__ __forceinline__ static DType dtype(DType) { return type; }
};

// --- recurrence --------------------------------------------------------------------------------------------------------

// A tile's steps of a lane's states: updates h and adds the sum over the chunk's states of C h to y of the lane's own steps. The sum is
// (p0 + p2) + (p1 + p3) with p the sums over four neighbouring states, in whatever lanes they are: same bits.
template <int kLanes>
__device__ __forceinline__ void recur(float (&h)[kChunk / kLanes], const float (&rate)[kChunk / kLanes], const float (&dt)[tile_steps(kLanes) / kLanes],
                                      const float (&du)[tile_steps(kLanes) / kLanes], float (&y)[tile_steps(kLanes) / kLanes], const float* B, int B_step,
                                      const float* C, int C_step, int part) {
  constexpr int kTile = tile_steps(kLanes), kOwn = kTile / kLanes, kQuads = kChunk / kLanes / 4;
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
    // Each of the four lanes ends with the sums of its own steps.
    float half[2 * kOwn];
#pragma unroll
    for (int i = 0; i < 2 * kOwn; ++i) {
      const float low = sums[i], high = sums[i + 2 * kOwn];
      half[i] = (part & 2 ? high : low) + __shfl_xor_sync(kAllLanes, part & 2 ? low : high, 2);
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const float low = half[j], high = half[j + kOwn];
      y[j] += (part & 1 ? high : low) + __shfl_xor_sync(kAllLanes, part & 1 ? low : high, 1);
    }
  }
}

// --- kernel ------------------------------------------------------------------------------------------------------------

// A lane's channel and its states.
template <int kLanes>
struct LaneStates {
  static constexpr int kStates = kChunk / kLanes;
  int64_t row, channel, first;  // first state of chunk 0
  float* last;                  // that state in last_state
  bool active;

  // h is the state with `left` steps to go: saved where a chunk of the backward begins.
  __device__ __forceinline__ void save(const SelectiveScanFwdParams& p, const float (&h)[kStates], int64_t chunk, int64_t left) const {
    const Sequence whole = sequence_of(p, row);  // read again here: kept from tile to tile, it would cost registers
    if (unsigned(whole.length - left) % kStateChunk != 0) return;
    const int64_t slot = whole.batch * state_slots(p) + state_slot(p, whole.begin, row) + (whole.length - left) / kStateChunk;
    float* saved = static_cast<float*>(p.states) + (slot * p.dstate + chunk + first) * p.dim + channel;
#pragma unroll
    for (int k = 0; k < kStates; ++k, saved += p.dim)  // one address, so that no register is spilled for it
      if (active && chunk + first + k < p.dstate) *saved = h[k];
  }
  // `begin`: from the initial state; otherwise from last_state.
  __device__ __forceinline__ void load(const SelectiveScanFwdParams& p, float (&h)[kStates], float (&rate)[kStates], int64_t chunk, bool begin) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = chunk + first + k;
      const bool exists = n < p.dstate;
      rate[k] = exists ? decay_rate(p, channel, n) : 0.f;
      h[k] = !exists || !active ? 0.f : begin ? initial_state(p, row, channel, n) : last[chunk + k];
    }
  }
  __device__ __forceinline__ void store(const SelectiveScanFwdParams& p, const float (&h)[kStates], int64_t chunk) const {
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = chunk + first + k;
      if (active && n < p.dstate) last[chunk + k] = h[k];
    }
  }
};

template <int kLanes, class Call>
__device__ __forceinline__ void scan_warp(const Launch& launch, float* shared, const LineItem& item, int64_t worker, int lane) {
  constexpr int kTile = tile_steps(kLanes), kOwn = kTile / kLanes, kStates = kChunk / kLanes, kChannels = kWarpSize / kLanes;
  constexpr int kProjectionTile = kTile * kChunk;  // floats of B, or of C
  const SelectiveScanFwdParams& p = launch.p;
  const int part = lane % kLanes;
  const int64_t row = item.chain / launch.warps_per_row, within = item.chain % launch.warps_per_row, run = within / launch.warps_per_run;
  const int64_t first_channel = run * launch.run + within % launch.warps_per_run * kChannels, channels_end = (run + 1) * launch.run;
  const bool active = first_channel + lane / kLanes < channels_end;
  const int64_t channel = active ? first_channel + lane / kLanes : channels_end - 1;  // the rest repeat the last one and store nothing
  Sequence sequence = sequence_of(p, row);
  sequence.begin += item.begin * kTile;
  sequence.length -= item.begin * kTile;
  int64_t left = sequence.length;
  const int64_t stop = item.sends ? left - (item.end - item.begin) * kTile : 0;  // steps left at the end of this item

  char* out_at = first_step(launch.out, sequence, channel, part * kOwn);
  const auto access = [&](const StepsLayout& s, const char* at) {
    if constexpr (Call::kKnown)
      return Call::kAccess;
    else
      return access_of(s, at - part * kOwn * s.step);
  };
  const Access out_access = access(launch.out, out_at);
  if (p.cu_seqlens && row == p.num_seqs) {  // padding
    const float zeros[kOwn] = {};
    for (; active && left > 0; left -= kTile, out_at += kTile * launch.out.step)
      Own<kTile, kOwn>(left, part).store(zeros, out_at, launch.out.step, Call::dtype(launch.out.dtype), out_access);
    return;
  }
  const LaneStates<kLanes> states{row, channel, part * kStates, last_state_of(p, row, channel) + part * kStates, active};
  const bool chunked = !Call::kKnown && p.dstate > kChunk;
  const bool B_constant = !Call::kKnown && launch.B.constant, C_constant = !Call::kKnown && launch.C.constant;
  const int64_t dstate = Call::kKnown ? kChunk : p.dstate;
  float h[kStates], rate[kStates];
  const auto start = [&] {
    for (int64_t chunk = 0; chunk < dstate; chunk += kChunk) {
      states.load(p, h, rate, chunk, !item.receives);
      if (chunked || left == 0) states.store(p, h, chunk);
    }
  };
  if (left == 0) return start();

  const char *delta_at = first_step(launch.delta, sequence, channel, part * kOwn), *u_at = first_step(launch.u, sequence, channel, part * kOwn),
             *z_at = first_step(launch.z, sequence, channel, part * kOwn);
  const Access delta_access = access(launch.delta, delta_at), u_access = access(launch.u, u_at), z_access = access(launch.z, z_at);
  Projection<kTile> B(launch.B, sequence, channel), C(launch.C, sequence, channel);
  const Form form_B = Call::kKnown ? Call::kForm : B.form(launch.B), form_C = Call::kKnown ? Call::kForm : C.form(launch.C);
  const DType B_dtype = Call::dtype(launch.B.dtype), C_dtype = Call::dtype(launch.C.dtype);
  float* const constant_B = shared + 4 * kProjectionTile + lane / kLanes * kConstantPitch + part * kStates;
  float* const constant_C = constant_B + kConstantPitch * kChannels;
  if (B_constant) B.template keep<kStates>(constant_B, launch.B, part * kStates, dstate);
  if (C_constant) C.template keep<kStates>(constant_C, launch.C, part * kStates, dstate);
  const float bias = channel_value(p.delta_bias, p.delta_bias_dtype, p.delta_bias_stride, channel, 0.f);
  const float skip = channel_value(p.D, p.D_dtype, p.D_stride, channel, 0.f);

  uint32_t raw_delta[kOwn], raw_u[kOwn], raw_z[kOwn], raw_B[Projection<kTile>::kEach], raw_C[Projection<kTile>::kEach];
  {
    const Own<kTile, kOwn> own(left, part);
    own.load(raw_delta, delta_at, launch.delta.step, Call::dtype(launch.delta.dtype), delta_access);
    own.load(raw_u, u_at, launch.u.step, Call::dtype(launch.u.dtype), u_access);
    if (!B_constant) B.load(raw_B, B.at, launch.B, B_dtype, form_B, left, dstate, lane);
    if (!C_constant) C.load(raw_C, C.at, launch.C, C_dtype, form_C, left, dstate, lane);
  }
  if (item.receives) receive_state(line_flag(p.line, worker - 1, 0), lane);
  start();
  int half = 0;  // of the two tiles of B and C
#pragma unroll 1
  for (; left > stop; left -= kTile) {
    const Own<kTile, kOwn> own(left, part);
    const bool last = left - kTile <= stop;
    float dt[kOwn], du[kOwn], y[kOwn];
    own.convert(dt, raw_delta, delta_at, Call::dtype(launch.delta.dtype), delta_access);
    own.convert(du, raw_u, u_at, Call::dtype(launch.u.dtype), u_access);
    if (!last) {
      const Own<kTile, kOwn> next(left - kTile, part);
      next.load(raw_delta, delta_at += kTile * launch.delta.step, launch.delta.step, Call::dtype(launch.delta.dtype), delta_access);
      next.load(raw_u, u_at += kTile * launch.u.step, launch.u.step, Call::dtype(launch.u.dtype), u_access);
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

    if (p.z) own.load(raw_z, z_at, launch.z.step, Call::dtype(launch.z.dtype), z_access);
#pragma unroll 1
    for (int64_t chunk = 0; chunk < dstate; chunk += kChunk) {
      float* const tile_B = shared + half * 2 * kProjectionTile;
      float* const tile_C = tile_B + kProjectionTile;
      half ^= 1;
      // The next tile is this one's next chunk, or the next one's first.
      const bool same = chunk + kChunk < dstate, more = same || !last;
      const int64_t next_chunk = same ? chunk + kChunk : 0, next_left = same ? left : left - kTile;
      if (!B_constant) {
        B.store(raw_B, tile_B, B_dtype, form_B, left, dstate - chunk, lane);
        if (!same) B.at += kTile * launch.B.step;
        if (more) B.load(raw_B, B.at + next_chunk * launch.B.state, launch.B, B_dtype, form_B, next_left, dstate - next_chunk, lane);
      }
      if (!C_constant) {
        C.store(raw_C, tile_C, C_dtype, form_C, left, dstate - chunk, lane);
        if (!same) C.at += kTile * launch.C.step;
        if (more) C.load(raw_C, C.at + next_chunk * launch.C.state, launch.C, C_dtype, form_C, next_left, dstate - next_chunk, lane);
      }
      if (chunked) {
        states.load(p, h, rate, chunk, false);
        if (B_constant) B.template keep<kStates>(constant_B, launch.B, chunk + part * kStates, dstate);
        if (C_constant) C.template keep<kStates>(constant_C, launch.C, chunk + part * kStates, dstate);
      }
      __syncwarp();
      if (p.states) states.save(p, h, chunk, left);
      recur<kLanes>(h, rate, dt, du, y, B_constant ? constant_B : tile_B + part * kStates, B_constant ? 0 : kChunk,
                    C_constant ? constant_C : tile_C + part * kStates, C_constant ? 0 : kChunk, part);
      if (chunked) states.store(p, h, chunk);
    }
    if (p.z) {
      float gate[kOwn];
      own.convert(gate, raw_z, z_at, Call::dtype(launch.z.dtype), z_access);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) y[j] *= silu(gate[j]);
      z_at += kTile * launch.z.step;
    }
    if (active) own.store(y, out_at, launch.out.step, Call::dtype(launch.out.dtype), out_access);
    out_at += kTile * launch.out.step;
  }
  if (!chunked) states.store(p, h, 0);
  if (item.sends) send_state(line_flag(p.line, worker, 0), lane);
}

template <int kLanes, class Call>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, Call::kKnown ? 3 : 2) selective_scan_fwd_kernel(const __grid_constant__ Launch launch) {
  COBRA_DYNAMIC_SHARED(float, shared);
  const int lane = int(threadIdx.x) % kWarpSize, in_block = int(threadIdx.x) / kWarpSize;
  float* const mine = shared + in_block * shared_floats(kLanes, !Call::kKnown);
  const int64_t warp = (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kWarpsPerBlock + in_block;
  const Line& line = launch.line;
  if (kLanes == 1 || !line.workers) {
    if (warp < launch.warps) scan_warp<kLanes, Call>(launch, mine, {warp, 0, 0, false, false}, 0, lane);
    return;
  }
  int64_t worker = lane == 0 ? take_line_ticket(launch.p.line) : 0;
  worker = __shfl_sync(kAllLanes, worker, 0);
  LineItem item;
  for (int64_t i = 0; worker < line.workers && line.item(worker, i, item); ++i) {
    scan_warp<kLanes, Call>(launch, mine, item, worker, lane);
    __syncwarp();  // before the tiles are written again
  }
  if (lane == 0) leave_line(launch.p.line, int64_t(gridDim.x) * gridDim.y * kWarpsPerBlock);
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
                layout(p.C, p.C_dtype, p.C_stride, p.C_constant, p.dim), 0, 0, 0, 0, {}};
  const auto group_size = [&](const ProjectionLayout& s) { return s.constant ? p.dim : s.group_channels; };
  launch.run = greatest_common_divisor(group_size(launch.B), group_size(launch.C));
  const int64_t channels = kWarpSize / lanes;
  launch.warps_per_run = (launch.run + channels - 1) / channels;
  launch.warps_per_row = launch.warps_per_run * (p.dim / launch.run);
  launch.warps = launch.warps_per_row * sequence_count(p);
  if (lanes > 1 && !p.cu_seqlens && p.seqlen > 0)  // packed sequences have their lengths on the GPU
    launch.line = {launch.warps, (p.seqlen + tile_steps(lanes) - 1) / tile_steps(lanes), p.line_workers < launch.warps ? p.line_workers : launch.warps};
  return launch;
}

// One lane per channel needs two warps per scheduler to hide its latencies.
constexpr int kSchedulers = 4;  // of a multiprocessor
int lanes_per_channel(const SelectiveScanFwdParams& p) { return plan(p, 1).warps >= 2 * kSchedulers * int64_t(p.multiprocessors) ? 1 : 4; }

// Does KnownCall<.., layout> describe the call?
bool is_known(const Launch& call, Layout layout) {
  const SelectiveScanFwdParams& p = call.p;
  const bool first = layout == Layout::kChannelFirst, shifted = layout == Layout::kShifted;
  const int64_t size = int64_t(size_of(p.u_dtype));
  if (p.dstate != kChunk || p.B_constant || p.C_constant || (first && p.cu_seqlens) || (shifted && size != 2)) return false;
  const auto aligned = [](const void* base, std::initializer_list<int64_t> strides) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(base);
    for (const int64_t stride : strides) bits |= uintptr_t(stride);
    return bits % 16 == 0;
  };
  for (const StepsLayout& s : {call.delta, call.u, call.z, call.out})
    if (s.base && (s.dtype != p.u_dtype || (first || shifted ? s.step : s.dim) != size || (first && !aligned(s.base, {s.batch, s.dim}))))
      return false;
  for (const ProjectionLayout& s : {call.B, call.C}) {
    if (s.dtype != p.u_dtype) return false;
    if (!shifted && ((first ? s.step : s.state) != size || !aligned(s.base, {s.batch, s.group, first ? s.state : s.step}))) return false;
  }
  return true;
}

template <int kLanes, class Call>
int start(const Launch& call, void* stream) {
  const int64_t workers = call.line.workers ? call.line.workers : call.warps;
  const int64_t blocks = (workers + kWarpsPerBlock - 1) / kWarpsPerBlock, most = max_grid_x();
  const size_t bytes = sizeof(float) * kWarpsPerBlock * shared_floats(kLanes, !Call::kKnown);
  const dim3 grid(unsigned(blocks < most ? blocks : most), unsigned((blocks + most - 1) / most));
  return launch(&selective_scan_fwd_kernel<kLanes, Call>, grid, dim3(kWarpsPerBlock * kWarpSize), bytes, stream, call);
}

template <int kLanes>
int start(const Launch& call, void* stream) {
  const auto known = [&](auto layout) {
    constexpr Layout value = decltype(layout)::value;
    switch (call.p.u_dtype) {
      case DType::kBFloat16: return start<kLanes, KnownCall<DType::kBFloat16, value>>(call, stream);
      case DType::kFloat16: return start<kLanes, KnownCall<DType::kFloat16, value>>(call, stream);
      default:
        if constexpr (value == Layout::kShifted) return start<kLanes, AnyCall>(call, stream);  // never: 16-bit only
        else return start<kLanes, KnownCall<DType::kFloat32, value>>(call, stream);
    }
  };
  if (is_known(call, Layout::kChannelFirst)) return known(std::integral_constant<Layout, Layout::kChannelFirst>{});
  if (is_known(call, Layout::kChannelLast)) return known(std::integral_constant<Layout, Layout::kChannelLast>{});
  if (is_known(call, Layout::kShifted)) return known(std::integral_constant<Layout, Layout::kShifted>{});
  return start<kLanes, AnyCall>(call, stream);
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

bool gpu_stream_is_captured(void* stream) {
#if defined(__CUDACC__)
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return !cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) && status != cudaStreamCaptureStatusNone;
#else
  return stream != nullptr;  // the emulator has none
#endif
}

int64_t selective_scan_line_workers(const SelectiveScanFwdParams& p) {
  if (mma_serves(p)) return mma_line_workers(p);
  // Packed sequences have their lengths on the GPU; a short chain is not worth a hand-over.
  if (p.dim == 0 || p.cu_seqlens || p.seqlen < 256 || lanes_per_channel(p) == 1) return 0;
  const int64_t chains = plan(p, 4).warps, schedulers = kSchedulers * int64_t(p.multiprocessors);
  if (schedulers == 0 || chains <= schedulers) return 0;
  // Three warps fit a scheduler; more chains than that would come in waves. With fewer, some schedulers run one chain more than the
  // others: when many do, that costs less than one warp fewer for every scheduler (README.md has the model).
  const int64_t each = chains / schedulers < 3 ? chains / schedulers : 3, rest = chains - each * schedulers;
  return rest == 0 || (each < 3 && 3 * rest > each * schedulers) ? 0 : each * schedulers;
}
int64_t selective_scan_line_words(int64_t workers) { return 2 + kLineFlags * workers; }

int selective_scan_fwd_cuda(const SelectiveScanFwdParams& p, void* stream) {
  if (p.dim == 0 || sequence_count(p) == 0) return 0;
  if (mma_serves(p)) return selective_scan_fwd_mma(p, stream);
  return lanes_per_channel(p) == 1 ? start<1>(plan(p, 1), stream) : start<4>(plan(p, 4), stream);
}

}  // namespace cobra
