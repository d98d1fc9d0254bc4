// selective_scan forward on tensor cores, for 16-bit channel-last tensors and 16 states: README.md, "The tensor-core kernel".
//
// A block owns 32 channels of one sequence, in tiles of 32 tokens. Its eight warps have two roles, one of each kind on every
// scheduler, so that the second fills the issue slots in which the first waits for its exponentials:
//   compute  warp w owns channels 8w .. 8w+7, a lane one channel and four states: lane 4g + q holds states 2q, 2q+1, 8+2q, 9+2q of
//            channel g, which is how mma.m16n8k8 wants its operands. Eight tokens per step; the exponentials and inputs of
//            step k+1 are computed between the recurrences of step k;
//   service  copies tiles in, makes dt and dt u, lays B and C out as fragments, and gates and stores y. A thread owns 2 channels
//            times 4 tokens of a tile.
// They meet once per tile: `ready` says that a tile's inputs are in shared memory, `done` that its y is. Service runs up to two
// tiles ahead and stores one behind. Blocks may share the chains of channels in equal parts (scan_line.h): a chain is then cut
// between two tiles, and compute warp w hands over its channels by flag w of the worker.
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/named_barrier.cuh"
#include "selective_scan/selective_scan_cuda.cuh"

namespace cobra {
namespace {

constexpr int kChannels = 32, kTile = 32, kStep = 8, kSteps = kTile / kStep, kStates = 16;
constexpr int kRole = 128, kThreads = 2 * kRole;  // threads per role, per block
constexpr int kRaw = 4, kReady = 3;               // tiles in flight: as copied, as computed with
enum Barrier { kReadyBarrier = 1, kDoneBarrier = kReadyBarrier + kReady, kServiceBarrier = kDoneBarrier + kReady };

// y sums products of h cut to tf32, always towards 0 and by half a unit of 2^-10 on average over mantissas: this takes the bias out.
constexpr float kTruncation = 1.000338f;

using bf16 = __nv_bfloat16;

COBRA_HOST_DEVICE int64_t tile_count(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// A tile as it lies in memory. Rows of 80 bytes: 16-byte copies and the reads below touch every bank once.
struct alignas(16) RawTile {
  bf16 delta[kTile][40], u[kTile][40], z[kTile][40], BC[kTile][40];
};
// A tile as the compute warps read it; du becomes y. Rows of 36: 16-byte accesses of 8 channels touch every bank once.
struct alignas(16) ReadyTile {
  float dt[kChannels][kTile + 4], du[kChannels][kTile + 4];
  float4 B[kSteps][2][32], C[kSteps][32];  // by lane; B of even and of odd tokens, each number twice: once per half of du
  int irregular;  // this tile's number if its B holds an infinity or a NaN, else a smaller one
};
// What the block is at. In shared memory, so that it costs the compute warps no registers while they scan.
struct Work {
  int worker, items;  // on the line; how many items it began
  bool exists;
  LineItem item;
  int64_t row, channel;  // row of the states; the first of the block's channels
  Sequence sequence;     // or the item's part of it
  int tiles, last_rows;  // tokens of the last tile

  __device__ __forceinline__ int rows(int tile) const { return tile < tiles - 1 ? kTile : last_rows; }
};
struct alignas(16) Shared {
  RawTile raw[kRaw];
  ReadyTile ready[kReady];
  Work work;
};

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t load_pair(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }

// --- service ----------------------------------------------------------------------------------------------------------

// 16-byte pieces of a tile: thread 4r + i copies piece i of row r. Tokens past the end and channels past the last become zeros.
struct TileCopy {
  const SelectiveScanFwdParams& p;
  const bf16 *delta, *u, *z, *BC;
  int row, piece;
  bool active;

  __device__ __forceinline__ TileCopy(const SelectiveScanFwdParams& params, const Work& work, int thread) : p(params), row(thread / 4), piece(thread % 4) {
    const int64_t channel = work.channel + piece * 8, batch = work.sequence.batch, token = work.sequence.begin + row;
    active = channel < p.dim;
    const auto at = [&](const void* base, const SequenceStride& s) {
      return base ? static_cast<const bf16*>(base) + batch * s.batch + token * s.seq + channel : nullptr;
    };
    delta = at(p.delta, p.delta_stride);
    u = at(p.u, p.u_stride);
    z = at(p.z, p.z_stride);
    const ProjectionStride& s = piece < 2 ? p.B_stride : p.C_stride;
    BC = static_cast<const bf16*>(piece < 2 ? p.B : p.C) + batch * s.batch + token * s.seq + piece % 2 * 8;
  }

  // Starts the copies of the next tile, of which `rows` tokens are there.
  __device__ __forceinline__ void operator()(RawTile& tile, int rows) {
    const bool there = row < rows;
    copy_async_16(&tile.delta[row][piece * 8], delta, there && active);
    copy_async_16(&tile.u[row][piece * 8], u, there && active);
    copy_async_16(&tile.BC[row][piece * 8], BC, there);
    delta += p.delta_stride.seq * kTile;
    u += p.u_stride.seq * kTile;
    BC += (piece < 2 ? p.B_stride.seq : p.C_stride.seq) * kTile;
    if (!p.z) return;
    copy_async_16(&tile.z[row][piece * 8], z, there && active);
    z += p.z_stride.seq * kTile;
  }
};

// Lanes of B and C for one step of 8 tokens: the thread's step is its warp. Returns whether B is finite.
__device__ __forceinline__ bool lay_out_projections(const RawTile& raw, ReadyTile& ready, int thread) {
  const int lane = thread % 32, g = lane / 4, q = lane % 4, token = thread / 32 * kStep;
  const bf16 *even = raw.BC[token + 2 * q], *odd = raw.BC[token + 2 * q + 1], *C = raw.BC[token + g] + kStates + 2 * q;
  const float B[4] = {to_float(even[g]), to_float(even[g + 8]), to_float(odd[g]), to_float(odd[g + 8])};
  const uint32_t low = load_pair(C), high = load_pair(C + 8);
  ready.B[thread / 32][0][lane] = make_float4(B[0], B[0], B[1], B[1]);
  ready.B[thread / 32][1][lane] = make_float4(B[2], B[2], B[3], B[3]);
  ready.C[thread / 32][lane] = make_float4(low_half(low), high_half(low), low_half(high), high_half(high));
  return fmaf(B[0], 0.f, fmaf(B[1], 0.f, fmaf(B[2], 0.f, B[3] * 0.f))) == 0.f;
}

__device__ __forceinline__ void serve(const SelectiveScanFwdParams& p, Shared& shared) {
  const Work work = shared.work;
  int thread = int(threadIdx.x) - kRole;
  asm volatile("" : "+r"(thread));  // else the addresses that follow from it are kept in registers from one item to the next, and some spill
  const int lane = thread % 32;
  // 8 lanes in a row have 4 pairs of channels and 2 groups of tokens: their 16-byte accesses touch every bank once.
  const int c = 2 * (lane / 8 * 4 + lane % 4), t = 4 * (thread / 32 * 2 + lane / 4 % 2);
  const int64_t channel = work.channel + c;
  const bool active = channel < p.dim;
  float bias[2], D[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    bias[i] = active ? channel_value(p.delta_bias, p.delta_bias_dtype, p.delta_bias_stride, channel + i, 0.f) : 0.f;
    D[i] = active ? channel_value(p.D, p.D_dtype, p.D_stride, channel + i, 0.f) : 0.f;
  }
  bf16* out = static_cast<bf16*>(p.out) + work.sequence.batch * p.out_stride.batch + (work.sequence.begin + t) * p.out_stride.seq + channel;

  TileCopy copy(p, work, thread);
  const auto load = [&](int tile) {
    if (tile < work.tiles) copy(shared.raw[tile % kRaw], work.rows(tile));
    copy_async_commit();
  };
  // The copies of `tile` are complete on this thread.
  const auto prepare = [&](int tile, int buffer) {
    barrier_sync(kServiceBarrier, kRole);
    const RawTile& raw = shared.raw[tile % kRaw];
    ReadyTile& ready = shared.ready[buffer];
    float dt[2][4], du[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t delta = load_pair(&raw.delta[t + i][c]), u = load_pair(&raw.u[t + i][c]);
      dt[0][i] = low_half(delta) + bias[0];
      dt[1][i] = high_half(delta) + bias[1];
      du[0][i] = low_half(u);
      du[1][i] = high_half(u);
    }
    if (p.delta_softplus) {
#pragma unroll
      for (int i = 0; i < 8; ++i) dt[i / 4][i % 4] = softplus(dt[i / 4][i % 4]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) du[i / 4][i % 4] *= dt[i / 4][i % 4];
    if (tile == work.tiles - 1) {  // past the end: h = 1 h + 0
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (t + i >= work.last_rows) dt[0][i] = dt[1][i] = du[0][i] = du[1][i] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      *reinterpret_cast<float4*>(&ready.dt[c + k][t]) = make_float4(dt[k][0], dt[k][1], dt[k][2], dt[k][3]);
      *reinterpret_cast<float4*>(&ready.du[c + k][t]) = make_float4(du[k][0], du[k][1], du[k][2], du[k][3]);
    }
    if (!lay_out_projections(raw, ready, thread)) atomicMax(&ready.irregular, tile);
    barrier_arrive(kReadyBarrier + buffer, kThreads);
  };
  const auto finish = [&](int tile, int buffer) {
    barrier_sync(kDoneBarrier + buffer, kThreads);
    const RawTile& raw = shared.raw[tile % kRaw];
    const Pack<float, 4> y[2] = {load_pack<float, 4>(&shared.ready[buffer].du[c][t]), load_pack<float, 4>(&shared.ready[buffer].du[c + 1][t])};
    float low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t u = load_pair(&raw.u[t + i][c]);
      low[i] = fmaf(y[0].v[i], kTruncation, D[0] * low_half(u));
      high[i] = fmaf(y[1].v[i], kTruncation, D[1] * high_half(u));
    }
    if (p.z) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t z = load_pair(&raw.z[t + i][c]);
        low[i] *= silu(low_half(z));
        high[i] *= silu(high_half(z));
      }
    }
    const int rows = active ? work.rows(tile) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (t + i < rows) *reinterpret_cast<__nv_bfloat162*>(out + i * p.out_stride.seq) = __floats2bfloat162_rn(low[i], high[i]);
    out += kTile * p.out_stride.seq;
  };

  if (thread < kReady) shared.ready[thread].irregular = -1;
  load(0);
  load(1);
  load(2);
  copy_async_wait<2>();
  if (work.tiles > 0) prepare(0, 0);
  copy_async_wait<1>();
  if (work.tiles > 1) prepare(1, 1);
  int buffer = 2;  // of tile - 1 and of tile + 2
#pragma unroll 1
  for (int tile = 0; tile <= work.tiles; ++tile) {
    if (tile > 0) finish(tile - 1, buffer);
    copy_async_wait<0>();
    if (tile + 2 < work.tiles) prepare(tile + 2, buffer);
    load(tile + 3);  // over tile - 1, which all have finished: they came to prepare's barrier
    buffer = buffer == kReady - 1 ? 0 : buffer + 1;
  }
}

// --- compute ----------------------------------------------------------------------------------------------------------

// h of a lane before a tile, if it is the first of a chunk: for the backward.
template <class State>
__device__ __forceinline__ void save_state(const SelectiveScanFwdParams& p, const Work& work, int tile, int c, const float (&h)[4], State&& state) {
  const Sequence whole = sequence_of(p, work.row);
  const int64_t step = work.sequence.begin - whole.begin + int64_t(tile) * kTile, channel = work.channel + c;
  if (step % kStateChunk || channel >= p.dim) return;
  float* const saved = static_cast<float*>(p.states) + (whole.batch * state_slots(p) + state_slot(p, whole.begin, work.row) + step / kStateChunk) * kStates * p.dim + channel;
#pragma unroll
  for (int n = 0; n < 4; ++n) saved[state(n) * p.dim] = h[n];
}

__device__ __forceinline__ void compute(const SelectiveScanFwdParams& p, Shared& shared) {
  const int thread = int(threadIdx.x), lane = thread % 32, q = lane % 4, c = thread / 4;
  const auto state = [q](int n) { return 2 * q + n % 2 + n / 2 * 8; };
  const int tiles = shared.work.tiles;
  float A[4], h[4];  // A log2 e
  {
    const Work& work = shared.work;
    const int64_t channel = work.channel + c;
    const bool active = channel < p.dim;
    if (work.item.receives) receive_state(line_flag(p.line, work.worker - 1, thread / 32), lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      A[n] = active ? decay_rate(p, channel, state(n)) : 0.f;
      h[n] = !active ? 0.f : work.item.receives ? __ldcg(last_state_of(p, work.row, channel) + state(n)) : initial_state(p, work.row, channel, state(n));
    }
  }

  // Decays and inputs of the step to come: h = decay h + input.
  float decay[kStep][4], input[kStep][4];
  const auto look_ahead = [&](const ReadyTile& ready, int step) {
    const Pack<float, kStep> dt = load_pack<float, kStep>(&ready.dt[c][step * kStep]);
#pragma unroll
    for (int j = 0; j < kStep; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) decay[j][n] = exp2_fast(dt.v[j] * A[n]);

    // dt u B as an outer product of channels and states. A lane has du of tokens 2q and 2q+1, in two parts of 11 bits: k = q is the
    // high one, k = q + 4 the low one, times B of the same token. Rows g and g + 8 take the tokens j and j + 2, so only lanes
    // q = j / 2 and j / 2 + 1 bring something but 0.
    const float2 du = *reinterpret_cast<const float2*>(&ready.du[c][step * kStep + 2 * q]);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float x = odd ? du.y : du.x, high = __uint_as_float(__float_as_uint(x) & 0xffffe000u), low = x - high;
      const float4 B = ready.B[step][odd][lane];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float w0[4] = {0.f, 0.f, 0.f, 0.f}, w1[4] = {0.f, 0.f, 0.f, 0.f};
        const float a0 = q == i ? high : 0.f, a1 = q == i + 1 ? high : 0.f, a2 = q == i ? low : 0.f, a3 = q == i + 1 ? low : 0.f;
        mma_m16n8k8_tf32(w0, a0, a1, a2, a3, B.x, B.y);
        mma_m16n8k8_tf32(w1, a0, a1, a2, a3, B.z, B.w);
        const int j = 2 * i + odd;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          input[j + 2 * k][0] = w0[2 * k];
          input[j + 2 * k][1] = w0[2 * k + 1];
          input[j + 2 * k][2] = w1[2 * k];
          input[j + 2 * k][3] = w1[2 * k + 1];
        }
      }
    }
  };

  // A tile whose B is not finite: 0 B of the other tokens would be NaN in the outer product, and reach into the past. Token by token.
  const auto scan_irregular = [&](const RawTile& raw, ReadyTile& ready) {
#pragma unroll 1
    for (int t = 0; t < kTile; ++t) {
      const float dt = ready.dt[c][t], du = ready.du[c][t];
      float y = 0.f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        h[n] = fmaf(exp2_fast(dt * A[n]), h[n], du * to_float(raw.BC[t][state(n)]));
        y = fmaf(h[n], to_float(raw.BC[t][kStates + state(n)]), y);
      }
      y += __shfl_xor_sync(0xffffffffu, y, 1);
      y += __shfl_xor_sync(0xffffffffu, y, 2);
      __syncwarp();  // du has been read
      if (q == 0) ready.du[c][t] = y * (1.f / kTruncation);
    }
  };

  // The tile, its buffer, and the buffer of the next; after the last tile looking ahead finds anything that is there.
  int tile = 0, buffer = 0, step_on = 0;
  ReadyTile* ready = shared.ready;
  int irregular = -1, next_irregular = -1;  // compared only when the tile's turn comes: the loads have long arrived
  static_assert(kStateChunk % kTile == 0);
  const auto begin = [&] {
    if (p.states) save_state(p, shared.work, tile, c, h, state);
    step_on = 0;
    if (tile + 1 < tiles) {
      step_on = buffer == kReady - 1 ? 1 - kReady : 1;
      barrier_sync(kReadyBarrier + buffer + step_on, kThreads);
      next_irregular = ready[step_on].irregular;
    }
  };
  const auto end = [&] {
    barrier_arrive(kDoneBarrier + buffer, kThreads);
    buffer += step_on;
    ready += step_on;
    irregular = next_irregular;
    ++tile;
  };
  if (tiles > 0) {
    barrier_sync(kReadyBarrier, kThreads);
    irregular = ready->irregular;
  }
  while (tile < tiles) {
    if (irregular == tile) {
      begin();
      scan_irregular(shared.raw[tile % kRaw], *ready);
      end();
      continue;
    }
    look_ahead(*ready, 0);
#pragma unroll 1
    do {
      begin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float a[kStep][4], w[kStep][4], y[2] = {0.f, 0.f};
#pragma unroll
        for (int j = 0; j < kStep; ++j)
#pragma unroll
          for (int n = 0; n < 4; ++n) a[j][n] = decay[j][n], w[j][n] = input[j][n];
        if (step + 1 < kSteps)
          look_ahead(*ready, step + 1);
        else
          look_ahead(ready[step_on], 0);
        // y = C h: rows g and g + 8 are channel g at tokens 2i and 2i + 1, the columns are C of all 8 tokens, and the lanes q = i
        // get the two that belong together.
        const float4 C = ready->C[step][lane];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float first[4], second[4], sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            first[n] = fmaf(a[2 * i][n], h[n], w[2 * i][n]);
            second[n] = h[n] = fmaf(a[2 * i + 1][n], first[n], w[2 * i + 1][n]);
          }
          mma_m16n8k8_tf32(sum, first[0], second[0], first[1], second[1], C.x, C.y);
          mma_m16n8k8_tf32(sum, first[2], second[2], first[3], second[3], C.z, C.w);
          if (q == i) y[0] = sum[0], y[1] = sum[3];
        }
        *reinterpret_cast<float2*>(&ready->du[c][step * kStep + 2 * q]) = make_float2(y[0], y[1]);
      }
      end();
    } while (tile < tiles && irregular != tile);
  }

  const Work& work = shared.work;
  const int64_t channel = work.channel + c;
  if (channel < p.dim) {
    float* const last = last_state_of(p, work.row, channel);
#pragma unroll
    for (int n = 0; n < 4; ++n) last[state(n)] = h[n];
  }
  if (work.item.sends) send_state(line_flag(p.line, work.worker, thread / 32), lane);
}

__device__ __forceinline__ void clear_padding(const SelectiveScanFwdParams& p, const Work& work) {
  const int64_t channel = work.channel + threadIdx.x % kChannels;
  if (channel >= p.dim) return;
  bf16* const out = static_cast<bf16*>(p.out) + work.sequence.begin * p.out_stride.seq + channel;
  for (int64_t t = threadIdx.x / kChannels; t < work.sequence.length; t += kThreads / kChannels) out[t * p.out_stride.seq] = round_to<bf16>(0.f);
}

struct Launch {
  SelectiveScanFwdParams p;
  BasicLine<int> line;  // of chains of tiles, or of chains of one step, which a block takes whole
};

// The next item of the block's worker.
__device__ __forceinline__ void find_work(const Launch& launch, Work& work) {
  const SelectiveScanFwdParams& p = launch.p;
  work.exists = work.worker < launch.line.workers && launch.line.item(work.worker, work.items++, work.item);
  if (!work.exists) return;
  const int chain = int(work.item.chain), groups = int((p.dim + kChannels - 1) / kChannels);
  work.row = chain / groups;
  work.channel = int64_t(chain % groups) * kChannels;
  work.sequence = sequence_of(p, work.row);
  if (work.item.sends) work.sequence.length = work.item.end * kTile;
  work.sequence.begin += work.item.begin * kTile;
  work.sequence.length -= work.item.begin * kTile;
  work.tiles = int(tile_count(work.sequence.length));
  work.last_rows = int(work.sequence.length - int64_t(work.tiles - 1) * kTile);
}

// Two blocks fit a multiprocessor.
__global__ void __launch_bounds__(kThreads, 2) selective_scan_fwd_mma_kernel(const __grid_constant__ Launch launch) {
  COBRA_DYNAMIC_SHARED(Shared, shared);
  const SelectiveScanFwdParams& p = launch.p;
  Work& work = shared->work;
  if (threadIdx.x == 0) {
    work.worker = p.line_workers ? int(take_line_ticket(p.line)) : int(blockIdx.x);
    work.items = 0;
  }
  for (;;) {
    if (threadIdx.x == 0) find_work(launch, work);
    __syncthreads();
    if (!work.exists) break;
    if (p.cu_seqlens && work.row == p.num_seqs)
      clear_padding(p, work);
    else if (threadIdx.x < kRole)
      compute(p, *shared);
    else
      serve(p, *shared);
    __syncthreads();
  }
  if (p.line_workers && threadIdx.x == 0) leave_line(p.line, gridDim.x);
}

int64_t chain_count(const SelectiveScanFwdParams& p) { return (p.dim + kChannels - 1) / kChannels * sequence_count(p); }

// Packed sequences have their lengths on the GPU. Numbers on the line have 31 bits.
bool fits_line(const SelectiveScanFwdParams& p) {
  return !p.cu_seqlens && p.seqlen > 0 && tile_count(p.seqlen) < (1ll << 31) / std::max<int64_t>(chain_count(p), 1);
}

}  // namespace

bool mma_serves(const SelectiveScanFwdParams& p) {
  const auto aligned = [&](const void* base, int64_t batch_stride, int64_t seq_stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (p.batch == 1 || batch_stride % 8 == 0) && (p.seqlen == 1 || seq_stride % 8 == 0);
  };
  const auto sequence = [&](const void* base, DType dtype, const SequenceStride& s) {
    return dtype == DType::kBFloat16 && s.dim == 1 && aligned(base, s.batch, s.seq);
  };
  const auto projection = [&](const void* base, DType dtype, const ProjectionStride& s, bool constant) {
    return dtype == DType::kBFloat16 && !constant && s.groups == 1 && s.state == 1 && aligned(base, s.batch, s.seq);
  };
  // More blocks than a grid holds would take terabytes of last_state.
  return p.dstate == kStates && p.dim % 8 == 0 && chain_count(p) <= max_grid_x() && sequence(p.u, p.u_dtype, p.u_stride) && sequence(p.delta, p.delta_dtype, p.delta_stride) &&
         (!p.z || sequence(p.z, p.z_dtype, p.z_stride)) && sequence(p.out, p.u_dtype, p.out_stride) &&
         projection(p.B, p.B_dtype, p.B_stride, p.B_constant) && projection(p.C, p.C_dtype, p.C_stride, p.C_constant);
}

int64_t mma_line_workers(const SelectiveScanFwdParams& p) {
  if (p.multiprocessors == 0 || !fits_line(p) || p.seqlen < 256) return 0;  // a short chain is not worth a hand-over
  const int64_t chains = chain_count(p), alone = p.multiprocessors, pairs = 2 * alone;
  // A multiprocessor with two blocks gives each of them 0.6 of what one has alone (README.md): with less than 1.6 chains for each, sharing
  // them as evenly as one worker can beats two chains for some. With more than two, it beats a last wave that is mostly empty.
  if (chains > alone && 5 * chains < 8 * alone) return alone;
  const int64_t waves = (chains + pairs - 1) / pairs;
  return chains > pairs && 16 * waves * pairs > 17 * chains ? pairs : 0;
}

int selective_scan_fwd_mma(const SelectiveScanFwdParams& p, void* stream) {
  const int64_t chains = chain_count(p);
  if (chains == 0) return 0;
  Launch call{p, {int(chains), 1, int(chains)}};
  if (!fits_line(p)) call.p.line_workers = 0;
  if (call.p.line_workers) call.line = {int(chains), int(tile_count(p.seqlen)), int(std::min(p.line_workers, chains))};
  return launch(&selective_scan_fwd_mma_kernel, dim3(unsigned(call.line.workers)), dim3(kThreads), sizeof(Shared), stream, call);
}

}  // namespace cobra
