// selective_state_update on a GPU. The state is read and written once, 16 bytes per lane and access; the rest hides behind it.
//
// A block owns neighbouring channels of one head, in kRows batch rows. A team of kLanes neighbouring lanes owns one channel:
// a lane takes 16 bytes of state of every row, kRound states per team and round, so that A is read once for kRows rows and
// kRows loads are under way in each lane. What is per (row, channel) - softplus, skip, gate - is done once: lane q of the team
// prepares and finishes the rows r with r % kLanes == q. B and C of the block's rows lie in shared memory as fp32: their
// dtype, stride and alignment are settled there, and every channel of the block reads them.
//
// The order of every sum depends on dstate and the dtype of the state alone: a row's bits do not depend on its batch.
#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "common/cuda_dtype.cuh"
#include "common/cuda_math.cuh"
#include "selective_state_update/selective_state_update.h"

namespace cobra {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;     // batch rows of a block
constexpr int kRound = 16;   // states that a team takes at a time: Mamba-1's dstate
constexpr int kStage = 128;  // states of B and C in shared memory at a time

template <class S>
struct Team {
  static constexpr int kWidth = 16 / sizeof(S), kLanes = kRound / kWidth;
  static constexpr int kOwnRows = kRows / kLanes;  // that a lane prepares and finishes: lane, lane + kLanes, ..
};

enum class Path {
  kShort,    // Mamba-1's decode step: dstate <= kRound, packed state, packed fp32 A, x, dt, B, C, z of one dtype, offsets below 2^31
  kPacked,   // every row of state is whole packs of 16 bytes
  kStrided,  // anything
};
template <Path kPath>
using Index = std::conditional_t<kPath == Path::kShort, int, int64_t>;

struct UpdateCall {
  SelectiveStateUpdateParams p;
  bool A_packed;                                 // fp32, and whole packs of as many states as a lane takes
  int64_t heads_per_group;
  int64_t first_row, first_head, first_channel;  // of this launch
};

// What a block owns: batch rows from `row` on, channels of `head` from `channel` on. The same for all of its threads.
template <class I>
struct Tile {
  I row, head, channel;

  // Of the element at the r-th row and c-th channel. Only the small terms differ between threads.
  __device__ __forceinline__ I offset(const StateStride& s, int r, int c) const {
    return (row * I(s.batch) + head * I(s.head) + channel * I(s.dim)) + r * I(s.batch) + c * I(s.dim);
  }
};

// Offsets of the pool's rows that the batch rows from `first` on own. Returns a bit for each row that exists and is not padding.
template <class I>
__device__ __forceinline__ unsigned find_rows(I (&offset)[kRows], const SelectiveStateUpdateParams& p, I first) {
  const I left = I(p.batch) - first, stride = I(p.state_stride.batch);
  unsigned rows = left < kRows ? (1u << int(left)) - 1 : (1u << kRows) - 1;
  if (!p.indices) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset[r] = (first + r) * stride;
    return rows;
  }
  int64_t index[kRows];
  const auto load = [&](const auto* indices) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) index[r] = indices[(r < left ? first + r : first) * p.indices_stride];
  };
  if (p.indices_dtype == DType::kInt64) {
    load(static_cast<const int64_t*>(p.indices));
  } else {
    load(static_cast<const int32_t*>(p.indices));
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = pool_row(p, index[r]);
    if (row < 0) rows &= ~(1u << r);
    offset[r] = I(row) * stride;
  }
  return rows;
}

using Projections = float[2][kRows][kStage];  // B, then C
struct alignas(16) AlignedProjections { Projections v; };

// An element on its way: loaded now, converted when it is needed, so that the loads of all tensors are under way at once.
template <class T>
struct Element {
  T raw{};
  __device__ __forceinline__ void load(const void* base, DType, int64_t offset) { raw = static_cast<const T*>(base)[offset]; }
  __device__ __forceinline__ float value(DType) const { return to_float(raw); }
};
template <>
struct Element<void> {  // of a dtype known at run time
  unsigned bits = 0;
  __device__ __forceinline__ void load(const void* base, DType dtype, int64_t offset) { bits = load_bits(base, dtype, offset); }
  __device__ __forceinline__ float value(DType dtype) const { return float_of(bits, dtype); }
};

// One round of B and C on its way into shared memory: of each row of the block, kRound states from n on. A thread takes kEach
// elements, row threadIdx.x / kRound of B and C seen as one list of rows.
template <class T>
struct Projected {
  static constexpr int kEach = 2 * kRows * kRound / kThreads;
  Element<T> elements[kEach];

  // Rows outside the mask are not read.
  template <class I>
  __device__ __forceinline__ void load(const SelectiveStateUpdateParams& p, const Tile<I>& tile, I group, unsigned rows, I n) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int part = threadIdx.x / kRound + k * (kThreads / kRound), r = part % kRows, i = threadIdx.x % kRound;
      const StateStride& stride = part < kRows ? p.B_stride : p.C_stride;
      const I offset = (tile.row * I(stride.batch) + group * I(stride.head) + n * I(stride.dstate)) + r * I(stride.batch) + i * I(stride.dstate);
      elements[k] = {};
      if ((rows >> r & 1) && i < I(p.dstate) - n) elements[k].load(part < kRows ? p.B : p.C, part < kRows ? p.B_dtype : p.C_dtype, offset);
    }
  }
  __device__ __forceinline__ void store(Projections& shared, const SelectiveStateUpdateParams& p, int at) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int part = threadIdx.x / kRound + k * (kThreads / kRound), r = part % kRows, i = threadIdx.x % kRound;
      shared[part < kRows ? 0 : 1][r][at + i] = elements[k].value(part < kRows ? p.B_dtype : p.C_dtype);
    }
  }
};

// 16 bytes of state as they lie in memory. In 32-bit words: 16-bit values one by one would take a register each.
template <class S>
struct States {
  static constexpr int kWidth = Team<S>::kWidth;
  using Bits = std::conditional_t<sizeof(S) == 4, unsigned, unsigned short>;
  unsigned words[4] = {};

  // `count` of kWidth neighbours, zeros behind them; all or none where the state is packed.
  template <bool kPacked>
  __device__ __forceinline__ void load(const S* p, int count, int64_t stride) {
    if constexpr (kPacked) {
      const uint4 raw = count > 0 ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
      words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const unsigned bits = i < count ? reinterpret_cast<const Bits*>(p)[i * stride] : 0;
        if (i * sizeof(S) % 4 == 0) {
          words[i * sizeof(S) / 4] = bits;
        } else {
          words[i * sizeof(S) / 4] |= bits << 16;
        }
      }
    }
  }
  template <bool kPacked>
  __device__ __forceinline__ void store(S* p, int count, int64_t stride) const {
    if constexpr (kPacked) {
      Pack<unsigned, 4> pack = {{words[0], words[1], words[2], words[3]}};
      if (count > 0) store_pack(reinterpret_cast<unsigned*>(p), pack);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (i < count) reinterpret_cast<Bits*>(p)[i * stride] = Bits(words[i * sizeof(S) / 4] >> i * sizeof(S) % 4 * 8);
    }
  }

  __device__ __forceinline__ void values(float (&v)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = value_of_word<S>(words[i * sizeof(S) / 4], i * sizeof(S) % 4);
  }
  __device__ __forceinline__ void round(const float (&v)[kWidth]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = word_of<S>(v + i * 4 / sizeof(S));
  }
};

// A * log2(e) of `count` states.
template <bool kPacked, class I, int kWidth>
__device__ __forceinline__ void load_decay(float (&a)[kWidth], const SelectiveStateUpdateParams& p, I offset, int count) {
  if constexpr (kPacked) {
    Pack<float, kWidth> pack{};
    if (count > 0) pack = load_pack<float, kWidth>(static_cast<const float*>(p.A) + offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = pack.v[i] * kLog2e;
  } else {
    Element<void> elements[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count) elements[i].load(p.A, p.A_dtype, offset + i * I(p.A_stride.dstate));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = elements[i].value(p.A_dtype) * kLog2e;
  }
}

// Sums over the team, by one tree for every row: y[k] becomes the sum of row lane + k * kLanes.
template <int kLanes>
__device__ __forceinline__ void sum_rows(float (&y)[kRows], unsigned lane) {
#pragma unroll
  for (int flip = kLanes / 2, count = kRows / 2; flip > 0; flip /= 2, count /= 2) {
    const bool upper = lane & flip;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const int low = j / flip * 2 * flip + j % flip, high = low + flip;
      const float keep = upper ? y[high] : y[low], give = upper ? y[low] : y[high];
      y[j] = keep + __shfl_xor_sync(0xffffffffu, give, flip);
    }
  }
}

// T: the dtype of x, dt, B, C and z; void where it is known at run time only.
template <class S, class T, Path kPath>
__global__ void __launch_bounds__(kThreads, kPath != Path::kShort ? 3 : sizeof(S) == 4 ? 8 : 5)
    selective_state_update_kernel(const __grid_constant__ UpdateCall call) {
  using I = Index<kPath>;
  constexpr bool kOneRound = kPath == Path::kShort, kPacked = kPath != Path::kStrided;
  constexpr int kWidth = Team<S>::kWidth, kLanes = Team<S>::kLanes, kOwnRows = Team<S>::kOwnRows, kChannels = kThreads / kLanes;
  COBRA_SHARED(AlignedProjections, aligned);
  Projections& shared = aligned.v;
  const SelectiveStateUpdateParams& p = call.p;
  const int c = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Tile<I> tile = {I(call.first_row) + I(blockIdx.z) * kRows, I(call.first_head) + I(blockIdx.y),
                        I(call.first_channel) + I(blockIdx.x) * kChannels};
  const bool in_dim = c < I(p.dim) - tile.channel;

  I row_offset[kRows];  // of the rows of the pool
  const unsigned rows = find_rows(row_offset, p, tile.row), live = in_dim ? rows : 0;
  const I dstate = I(p.dstate), stride = I(p.state_stride.dstate);
  S* const state = static_cast<S*>(p.state);
  const Tile<I> in_pool = {0, tile.head, tile.channel};
  const I first = in_pool.offset(p.state_stride, 0, c) + lane * kWidth * stride;
  // How many of this lane's kWidth states, from n on, there are.
  const auto count_at = [&](I n) {
    const I left = dstate - n - lane * kWidth;
    return left < kWidth ? int(left) : kWidth;
  };

  // All loads first. The state's, by far the most, go ahead.
  States<S> states[kRows];
  const auto load_round = [&](I n) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      states[r].template load<kPacked>(state + (first + row_offset[r] + n * stride), live >> r & 1 ? count_at(n) : 0, stride);
  };
  load_round(0);
  // Channels of one head, and heads of one group, share B and C.
  const I group = call.heads_per_group == 1 ? tile.head : tile.head / I(call.heads_per_group);
  Projected<T> projected;
  projected.load(p, tile, group, rows, I(0));
  Element<void> D, dt_bias;
  if (in_dim && p.D) D.load(p.D, p.D_dtype, tile.offset(p.D_stride, 0, c));
  if (in_dim && p.dt_bias) dt_bias.load(p.dt_bias, p.dt_bias_dtype, tile.offset(p.dt_bias_stride, 0, c));
  Element<T> own_x[kOwnRows], own_dt[kOwnRows], own_z[kOwnRows];
#pragma unroll
  for (int k = 0; k < kOwnRows; ++k) {
    const int r = lane + k * kLanes;
    if (!(live >> r & 1)) continue;
    own_x[k].load(p.x, p.x_dtype, tile.offset(p.x_stride, r, c));
    own_dt[k].load(p.dt, p.dt_dtype, tile.offset(p.dt_stride, r, c));
    if (p.z) own_z[k].load(p.z, p.z_dtype, tile.offset(p.z_stride, r, c));
  }
  const I A_offset = tile.offset(p.A_stride, 0, c) + lane * kWidth * I(p.A_stride.dstate);
  const auto decay_at = [&](float (&a)[kWidth], I n) {
    const int count = in_dim ? count_at(n) : 0;
    const I offset = A_offset + n * I(p.A_stride.dstate);
    if (kPath == Path::kShort || call.A_packed) {
      load_decay<true>(a, p, offset, count);
    } else {
      load_decay<false>(a, p, offset, count);
    }
  };
  float a[kWidth];
  decay_at(a, 0);

  float x[kOwnRows], dt[kRows], dtx[kRows], y[kRows] = {};
#pragma unroll
  for (int k = 0; k < kOwnRows; ++k) {
    x[k] = own_x[k].value(p.x_dtype);
    float step = own_dt[k].value(p.dt_dtype) + dt_bias.value(p.dt_bias_dtype);
    if (p.dt_softplus) step = softplus(step);
#pragma unroll
    for (int owner = 0; owner < kLanes; ++owner) {
      dt[owner + k * kLanes] = __shfl_sync(0xffffffffu, step, owner, kLanes);
      dtx[owner + k * kLanes] = __shfl_sync(0xffffffffu, step * x[k], owner, kLanes);
    }
  }

#pragma unroll 1
  for (I n = 0;;) {
    const int at = kOneRound ? 0 : int(n % kStage), count = count_at(n);
    if (at == 0) {  // stage B and C of this round and those behind it
      if (!kOneRound && n > 0) __syncthreads();
      projected.store(shared, p, 0);
      if (!kOneRound)
#pragma unroll 1
        for (int i = kRound; i < kStage && i < dstate - n; i += kRound) {
          projected.load(p, tile, group, rows, n + i);
          projected.store(shared, p, i);
        }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto B = load_pack<float, kWidth>(shared[0][r] + at + lane * kWidth);
      const auto C = load_pack<float, kWidth>(shared[1][r] + at + lane * kWidth);
      float h[kWidth];
      states[r].values(h);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        h[i] = fmaf(exp2_fast(dt[r] * a[i]), h[i], dtx[r] * B.v[i]);
        y[r] = fmaf(h[i], C.v[i], y[r]);
      }
      states[r].round(h);
      states[r].template store<kPacked>(state + (first + row_offset[r] + n * stride), live >> r & 1 ? count : 0, stride);
    }
    n += kRound;
    if (kOneRound || n >= dstate) break;
    load_round(n);
    decay_at(a, n);
    if (n % kStage == 0) projected.load(p, tile, group, rows, n);
  }

  sum_rows<kLanes>(y, lane);
#pragma unroll
  for (int k = 0; k < kOwnRows; ++k) {
    const int r = lane + k * kLanes;
    if (!in_dim || r >= I(p.batch) - tile.row) continue;
    float out = fmaf(D.value(p.D_dtype), x[k], y[k]);
    if (p.z) out *= silu(own_z[k].value(p.z_dtype));
    if (!(rows >> r & 1)) out = 0.f;  // padding, whatever it holds
    const I offset = tile.offset(p.out_stride, r, c);
    if constexpr (std::is_void_v<T>) {
      store_float(p.out, p.x_dtype, offset, out);
    } else {
      static_cast<T*>(p.out)[offset] = round_to<T>(out);
    }
  }
}

// Can the rows along dstate be read 16 bytes at a time?
bool is_packed(const void* base, DType dtype, const StateStride& s, int64_t dstate) {
  const int64_t size = int64_t(size_of(dtype));
  return s.dstate == 1 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && (s.batch * size) % 16 == 0 && (s.head * size) % 16 == 0 &&
         (s.dim * size) % 16 == 0 && (dstate * size) % 16 == 0;
}

// Are all offsets that a block computes below 2^31, those of its masked rows, channels and states included? A tensor of `rows` x
// heads x dim x dstate, strides of 0 where it has fewer.
bool is_near(const SelectiveStateUpdateParams& p, const StateStride& s, int64_t rows) {
  const auto reach = [](int64_t size, int64_t stride) { return size * std::abs(stride); };
  const int64_t limit = int64_t(1) << 31;
  return std::max({rows, p.heads, p.dim}) < limit / 2 &&
         reach(rows + kRows, s.batch) + reach(p.heads, s.head) + reach(p.dim + kThreads, s.dim) + reach(p.dstate + kRound, s.dstate) < limit;
}

// Is this the short path's call, with T for x, dt, B, C and z?
template <class T>
bool is_short(const UpdateCall& call) {
  const SelectiveStateUpdateParams& p = call.p;
  const DType dtype = std::is_same_v<T, float> ? DType::kFloat32 : std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  const bool one_dtype = p.dt_dtype == dtype && p.B_dtype == dtype && p.C_dtype == dtype && (!p.z || p.z_dtype == dtype);
  if (p.dstate > kRound || !call.A_packed || !one_dtype || !is_near(p, p.state_stride, std::max(p.batch, p.pool))) return false;
  const StateStride* const strides[] = {&p.x_stride, &p.dt_stride, &p.z_stride, &p.out_stride,    &p.A_stride,
                                        &p.B_stride, &p.C_stride,  &p.D_stride, &p.dt_bias_stride};
  return std::all_of(std::begin(strides), std::end(strides), [&](const StateStride* s) { return is_near(p, *s, p.batch); });
}

template <class S>
auto pick_kernel(const UpdateCall& call) {
  const SelectiveStateUpdateParams& p = call.p;
  auto kernel = &selective_state_update_kernel<S, void, Path::kStrided>;
  if (!is_packed(p.state, p.state_dtype, p.state_stride, p.dstate)) return kernel;
  kernel = &selective_state_update_kernel<S, void, Path::kPacked>;
  pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    // A 16-bit state goes with 16-bit inputs of its own kind; other mixtures are rare.
    if constexpr (std::is_same_v<S, float> || std::is_same_v<S, T>)
      if (is_short<T>(call)) kernel = &selective_state_update_kernel<S, T, Path::kShort>;
    return 0;
  });
  return kernel;
}

// One launch, unless a size is beyond what a grid holds.
template <class S>
int launch_update(const SelectiveStateUpdateParams& p, void* stream) {
  const bool A_packed = p.A_dtype == DType::kFloat32 && is_packed(p.A, p.A_dtype, p.A_stride, p.dstate) && p.dstate % Team<S>::kWidth == 0;
  UpdateCall call{p, A_packed, p.heads / p.groups, 0, 0, 0};
  const auto kernel = pick_kernel<S>(call);
  const auto blocks = [](int64_t left, int64_t each, int64_t most) { return unsigned(std::min((left + each - 1) / each, most)); };
  const int64_t channels = kThreads / Team<S>::kLanes, most_x = max_grid_x(), most_yz = std::min<int64_t>(most_x, 65535);
  for (call.first_row = 0; call.first_row < p.batch; call.first_row += most_yz * kRows)
    for (call.first_head = 0; call.first_head < p.heads; call.first_head += most_yz)
      for (call.first_channel = 0; call.first_channel < p.dim; call.first_channel += most_x * channels) {
        const dim3 grid(blocks(p.dim - call.first_channel, channels, most_x), blocks(p.heads - call.first_head, 1, most_yz),
                        blocks(p.batch - call.first_row, kRows, most_yz));
        if (const int error = launch(kernel, grid, dim3(kThreads), 0, stream, call)) return error;
      }
  return 0;
}

}  // namespace

int selective_state_update_cuda(const SelectiveStateUpdateParams& p, void* stream) {
  return pick_by_float_type(p.state_dtype, [&](auto t) { return launch_update<decltype(t)>(p, stream); });
}

}  // namespace cobra
