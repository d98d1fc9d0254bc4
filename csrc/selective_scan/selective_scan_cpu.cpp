// selective_scan on a CPU. A lane is a channel: one vector carries 4, 8 or 16 channels, and the recurrence over time runs
// in registers, a few states at a time. A work item is one sequence and one block of channels of one group; it walks the
// sequence tile by tile, staged through L1 so that memory is read in wide rows whatever the layout. All
// arithmetic is per channel in a fixed order, so neither tiles, blocks, batch rows nor threads change a bit of the result.
#include "selective_scan/selective_scan_cpu.h"

namespace cobra {
COBRA_DECLARE_LEVELS(selective_scan_fwd, SelectiveScanFwdParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

// What is staged at once. Tiles are padded by a step, so that chunks do not share cache sets.
struct Tile {
  int64_t channels, steps;
  int64_t chunk_steps() const { return steps + 1; }
};
constexpr Tile kChannelLast = {128, 96};   // rows of 512 bytes; longer walks keep states in registers longer
constexpr Tile kChannelFirst = {256, 32};  // rows of two lines, prefetched: more would leave L1 before they are used

// --- the recurrence -------------------------------------------------------------------------------------------------

// S states of one chunk of channels over the steps of a tile: h and the decay rates stay in registers.
template <class T, int S, bool kConstantB, bool kConstantC>
COBRA_INLINE void scan_states(T* y, T* h, const T* dt, const T* dtu, const T* rate, const T* B, const T* C, int64_t steps) {
  constexpr int W = Vec<T>::kWidth;
  const DecayExp2<T> decay;
  Vec<T> state[S], a[S];
  for (int s = 0; s < S; ++s) state[s] = load(h + s * W), a[s] = load(rate + s * W);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<T> step = load(dt + t * W), x = load(dtu + t * W);
    Vec<T> sum = load(y + t * W);
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      state[s] = fma(decay(step * a[s]), state[s], projection<T, kConstantB>(B, t, s) * x);
      sum = fma(projection<T, kConstantC>(C, t, s), state[s], sum);
    }
    store(y + t * W, sum);
  }
  for (int s = 0; s < S; ++s) store(h + s * W, state[s]);
}

// All states of one chunk. B and C are chunks of states (staged with lane = state) or, when constant, like `rate`.
template <class T, bool kConstantB, bool kConstantC>
void scan_chunk(T* y, T* h, const T* dt, const T* dtu, const T* rate, const T* B, const T* C, int64_t dstate, int64_t steps, int64_t chunk_steps) {
  constexpr int W = Vec<T>::kWidth, S = W == 16 ? 8 : std::min(W, 4);  // what the registers hold
  const auto at = [=](const T* p, bool constant, int64_t n) { return constant ? p + n * W : p + n / W * chunk_steps * W + n % W; };
  int64_t n = 0;
  for (; n + S <= dstate; n += S)
    scan_states<T, S, kConstantB, kConstantC>(y, h + n * W, dt, dtu, rate + n * W, at(B, kConstantB, n), at(C, kConstantC, n), steps);
  for (; n < dstate; ++n)
    scan_states<T, 1, kConstantB, kConstantC>(y, h + n * W, dt, dtu, rate + n * W, at(B, kConstantB, n), at(C, kConstantC, n), steps);
}

// One thread's buffers for a block, and the walk over one item.
template <class T>
class BlockScan {
  static constexpr int W = Vec<T>::kWidth;

 public:
  BlockScan(const SelectiveScanFwdParams& p, Tile tile)
      : p_(p),
        steps_(tile.steps),
        chunk_steps_(tile.chunk_steps()),
        tile_(tile.channels * chunk_steps_),
        per_channel_(tile.channels * p.dstate),
        per_step_((p.dstate + W - 1) / W * W * chunk_steps_),
        scratch_(3 * tile_ + 2 * per_channel_ + 2 * tile.channels + size_of_projection(p.B_constant) + size_of_projection(p.C_constant)) {
    dt_ = scratch_.take(tile_);
    dtu_ = scratch_.take(tile_);
    y_ = scratch_.take(tile_);
    rate_ = scratch_.take(per_channel_);
    h_ = scratch_.take(per_channel_);
    B_ = scratch_.take(size_of_projection(p.B_constant));
    C_ = scratch_.take(size_of_projection(p.C_constant));
    D_ = scratch_.take(tile.channels);
    bias_ = scratch_.take(tile.channels);
    chunk_ = p.B_constant ? (p.C_constant ? scan_chunk<T, true, true> : scan_chunk<T, true, false>)
                          : (p.C_constant ? scan_chunk<T, false, true> : scan_chunk<T, false, false>);
  }

  // Channels [channel, channel + channels), all of one group of B and one of C.
  void set_channels(int64_t channel, int64_t channels) {
    channel_ = channel;
    channels_ = channels;
    std::fill_n(rate_, per_channel_, T(0));  // absent channels of the last chunk stay at rest
    load_tile(rate_, p_.dstate, state_of(p_.A, p_.A_dtype, p_.A_stride, 0), channels, p_.dstate);
    const Vec<T> scale = DecayExp2<T>::kScale * T(1.4426950408889634);
    for (int64_t i = 0; i < per_channel_; i += W) store(rate_ + i, load(rate_ + i) * scale);
    if (p_.B_constant) load_constant(B_, p_.B, p_.B_dtype, p_.B_stride);
    if (p_.C_constant) load_constant(C_, p_.C, p_.C_dtype, p_.C_stride);
    if (p_.D) load_row(D_, p_.D, p_.D_dtype, channel * p_.D_stride, p_.D_stride, channels);
    if (p_.delta_bias) load_row(bias_, p_.delta_bias, p_.delta_bias_dtype, channel * p_.delta_bias_stride, p_.delta_bias_stride, channels);
  }

  // Steps [begin, end) of batch row `row`, from and to the states of `state_row`.
  void run(int64_t row, int64_t state_row, int64_t begin, int64_t end) {
    if (p_.initial_state) {
      load_tile(h_, p_.dstate, state_of(p_.initial_state, p_.initial_state_dtype, p_.initial_state_stride, state_row), channels_, p_.dstate);
    } else {
      std::fill_n(h_, per_channel_, T(0));
    }
    for (int64_t t = begin; t < end; t += steps_) {
      if (p_.states && (t - begin) % kStateChunk == 0) {
        const int64_t slot = row * state_slots(p_) + state_slot(p_, begin, state_row) + (t - begin) / kStateChunk;
        store_tile({p_.states, kComputeDType<T>, slot * p_.dstate * p_.dim + channel_, 1, p_.dim}, h_, p_.dstate, channels_, p_.dstate);
      }
      const int64_t steps = std::min(steps_, end - t);
      run_tile(row, t, steps, std::min(steps_, end - t - steps));
    }
    store_tile(state_of(p_.last_state, kComputeDType<T>, {p_.dim * p_.dstate, p_.dstate, 1}, state_row), h_, p_.dstate, channels_, p_.dstate);
  }

  // out = 0 over the padding after the last packed sequence.
  void clear(int64_t begin, int64_t end) {
    std::fill_n(y_, tile_, T(0));
    for (int64_t t = begin; t < end; t += steps_) store_tile(out(0, t), y_, chunk_steps_, channels_, std::min(steps_, end - t));
  }

 private:
  int64_t size_of_projection(bool constant) const { return constant ? per_channel_ : per_step_; }

  // Parts of tensors that belong to this block of channels.
  Matrix state_of(const void* data, DType dtype, const ScanStateStride& s, int64_t row) const {
    return {const_cast<void*>(data), dtype, row * s.row + channel_ * s.dim, s.dim, s.state};
  }
  void load_constant(T* dst, const void* data, DType dtype, const ProjectionStride& s) {
    load_tile(dst, p_.dstate, {const_cast<void*>(data), dtype, channel_ * s.group, s.group, s.state}, channels_, p_.dstate);
  }
  void load_variable(T* dst, const void* data, DType dtype, const ProjectionStride& s, int64_t row, int64_t t, int64_t steps) {
    load_tile(dst, chunk_steps_, {const_cast<void*>(data), dtype, row * s.batch + channel_ / (p_.dim / s.groups) * s.group + t * s.seq, s.state, s.seq}, p_.dstate, steps);
  }
  Matrix sequence(const void* data, DType dtype, const SequenceStride& s, int64_t row, int64_t t) const {
    return {const_cast<void*>(data), dtype, row * s.batch + channel_ * s.dim + t * s.seq, s.dim, s.seq};
  }
  Matrix u(int64_t row, int64_t t) const { return sequence(p_.u, p_.u_dtype, p_.u_stride, row, t); }
  Matrix delta(int64_t row, int64_t t) const { return sequence(p_.delta, p_.delta_dtype, p_.delta_stride, row, t); }
  Matrix z(int64_t row, int64_t t) const { return sequence(p_.z, p_.z_dtype, p_.z_stride, row, t); }
  Matrix out(int64_t row, int64_t t) const { return sequence(p_.out, p_.u_dtype, p_.out_stride, row, t); }

  // Steps [t, t + steps); the `ahead` steps after them are prefetched.
  void run_tile(int64_t row, int64_t t, int64_t steps, int64_t ahead) {
    load_tile(dt_, chunk_steps_, delta(row, t), channels_, steps);
    load_tile(dtu_, chunk_steps_, u(row, t), channels_, steps);
    if (!p_.B_constant) load_variable(B_, p_.B, p_.B_dtype, p_.B_stride, row, t, steps);
    if (!p_.C_constant) load_variable(C_, p_.C, p_.C_dtype, p_.C_stride, row, t, steps);
    for (int64_t c = 0; c * W < channels_; ++c) {
      T *dt = dt_ + c * chunk_steps_ * W, *dtu = dtu_ + c * chunk_steps_ * W, *y = y_ + c * chunk_steps_ * W;
      prefetch_chunk<T, false>(delta(row, t + steps), c, channels_, ahead);
      prefetch_chunk<T, false>(u(row, t + steps), c, channels_, ahead);
      if (p_.z) prefetch_chunk<T, false>(z(row, t + steps), c, channels_, ahead);
      prefetch_chunk<T, true>(out(row, t), c, channels_, steps);
      const Vec<T> bias = load(bias_ + c * W), skip = load(D_ + c * W);
      for (int64_t i = 0; i < steps * W; i += W) {
        Vec<T> step = load(dt + i) + bias;
        if (p_.delta_softplus) step = softplus(step);
        const Vec<T> u = load(dtu + i);
        store(dt + i, step);
        store(dtu + i, step * u);
        store(y + i, p_.D ? skip * u : Vec<T>(T(0)));  // 0 * inf is no skip
      }
      const int64_t first = c * p_.dstate * W;  // of this chunk in what is kept per channel
      chunk_(y, h_ + first, dt, dtu, rate_ + first, p_.B_constant ? B_ + first : B_, p_.C_constant ? C_ + first : C_, p_.dstate, steps, chunk_steps_);
    }
    if (p_.z) {
      load_tile(dt_, chunk_steps_, z(row, t), channels_, steps);
      for (int64_t c = 0; c * W < channels_; ++c)
        for (int64_t i = c * chunk_steps_ * W; i < (c * chunk_steps_ + steps) * W; i += W) store(y_ + i, load(y_ + i) * silu(load(dt_ + i)));
    }
    store_tile(out(row, t), y_, chunk_steps_, channels_, steps);
  }

  const SelectiveScanFwdParams& p_;
  const int64_t steps_, chunk_steps_, tile_, per_channel_, per_step_;
  Scratch<T> scratch_;
  T *dt_, *dtu_, *y_;      // a tile each: dt (later z), dt * u, y
  T *rate_, *h_;           // per channel and state: A in the units of DecayExp2, and the state
  T *B_, *C_, *D_, *bias_;
  void (*chunk_)(T*, T*, const T*, const T*, const T*, const T*, const T*, int64_t, int64_t, int64_t);
  int64_t channel_ = 0, channels_ = 0;
};

template <class T>
void fwd(const SelectiveScanFwdParams& p, const Parallel& parallel) {
  constexpr int64_t W = Vec<T>::kWidth;
  if (p.batch == 0 || p.dim == 0) return;
  const int64_t rows = p.cu_seqlens ? p.num_seqs : p.batch;

  // Runs of channels that read one group of B and one of C are cut into blocks. Small problems get narrow blocks, so that
  // there is something to share out.
  const int64_t run = std::gcd(p.dim / p.B_stride.groups, p.dim / p.C_stride.groups), runs = p.dim / run;
  Tile tile = p.u_stride.dim == 1 ? kChannelLast : kChannelFirst;
  if (p.states) tile.steps = std::gcd(tile.steps, kStateChunk);  // a tile ends where a state is saved
  int64_t& block = tile.channels;
  block = std::min(block, (run + W - 1) / W * W);
  while (block > W && rows * runs * ((run + block - 1) / block) < 16) block = (block / 2 + W - 1) / W * W;
  const int64_t run_blocks = (run + block - 1) / block;

  // Items are ordered block by block, so that a thread's share holds all lengths of packed sequences. The last item of
  // a block of packed sequences is the padding after them.
  const int64_t block_items = rows + (p.cu_seqlens ? 1 : 0);
  const int64_t item_work = block * p.dstate * (p.batch * p.seqlen / std::max<int64_t>(rows, 1) + 1);
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 18) / item_work);
  parallel(0, runs * run_blocks * block_items, grain, [&](int64_t first, int64_t last) {
    BlockScan<T> scan(p, tile);
    for (int64_t item = first, loaded = -1; item < last; ++item) {
      const int64_t row = item % block_items, at = item / block_items;
      if (at != loaded) {
        const int64_t in_run = at % run_blocks * block;
        scan.set_channels(at / run_blocks * run + in_run, std::min(block, run - in_run));
        loaded = at;
      }
      if (!p.cu_seqlens) {
        scan.run(row, row, 0, p.seqlen);
      } else if (row < p.num_seqs) {
        scan.run(0, row, boundary(p, row), boundary(p, row + 1));
      } else {
        scan.clear(boundary(p, p.num_seqs), p.seqlen);
      }
    }
  });
}

}  // namespace

void selective_scan_fwd(const SelectiveScanFwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.u_dtype == DType::kFloat64) return fwd<double>(p, parallel);
#endif
  fwd<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void selective_scan_fwd_cpu(const SelectiveScanFwdParams& p, const Parallel& parallel) {
  p.u_dtype == DType::kFloat64 ? scalar::selective_scan_fwd(p, parallel) : COBRA_AT_LEVEL(selective_scan_fwd)(p, parallel);
}

}  // namespace cobra
#endif
