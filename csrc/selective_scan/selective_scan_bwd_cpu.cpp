// The backward of selective_scan on a CPU. As in the forward a lane is a channel; a work item is a block of channels that share a group of
// B and one of C, over a range of sequences. It walks each sequence chunk by chunk from the end: a chunk of kStateChunk steps is replayed
// from the state that the forward saved, a few states at a time, keeping the states and decays of the chunk in L1, and walked back.
// Sums over channels (dB, dC) and over sequences (dA, dD, ddelta_bias, constant dB and dC) are left per item in the workspace and added
// up in order by a second pass. How the work is cut depends on the sizes alone, so the bits depend neither on threads nor on the run.
#include "selective_scan/selective_scan_cpu.h"

namespace cobra {
COBRA_DECLARE_LEVELS(selective_scan_bwd, SelectiveScanBwdParams)

namespace {

// How the work is cut, and where its parts leave their sums in the workspace (in elements).
struct Partition {
  int64_t rows, parts;              // sequences, and the contiguous ranges of them that sums over rows are made of
  int64_t run, block, run_blocks;   // channels of a run (of one group of B and one of C), of a block; blocks of a run
  int64_t blocks, positions;        // in all; of sequences in memory
  int64_t dB, dC, dA, dD, ddelta_bias, size;

  explicit Partition(const SelectiveScanInputs& p) {
    constexpr int64_t kParts = 16, kBlock = 128, kLanes = 16;  // kLanes: of the widest vectors
    rows = p.cu_seqlens ? p.num_seqs : p.batch;
    parts = std::min(rows, kParts);
    run = std::max<int64_t>(1, std::gcd(p.dim / p.B_stride.groups, p.dim / p.C_stride.groups));
    const int64_t runs = p.dim / run;
    block = std::min(kBlock, (run + kLanes - 1) / kLanes * kLanes);
    // Something to share out. Rows do not count: dB and dC of a row must not depend on how many there are.
    while (block > kLanes && runs * ((run + block - 1) / block) < 8) block = (block / 2 + kLanes - 1) / kLanes * kLanes;
    run_blocks = (run + block - 1) / block;
    blocks = runs * run_blocks;
    positions = p.batch * p.seqlen;

    const int64_t per_channel = parts * p.dstate * p.dim, per_position = blocks * p.dstate * positions;
    dB = 0;                                                 // (blocks, dstate, positions), constant: (parts, dstate, dim)
    dC = dB + (p.B_constant ? per_channel : per_position);  // as dB
    dA = dC + (p.C_constant ? per_channel : per_position);  // (parts, dstate, dim)
    dD = dA + per_channel;                                  // (parts, dim)
    ddelta_bias = dD + parts * p.dim;                       // (parts, dim)
    size = ddelta_bias + parts * p.dim;
  }
  // Channels [first, first + count) of a block.
  int64_t first_channel(int64_t at) const { return at / run_blocks * run + at % run_blocks * block; }
  int64_t channels(int64_t at) const { return std::min(block, run - at % run_blocks * block); }
};

}  // namespace
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

// --- a few states of one chunk of channels ------------------------------------------------------------------------------

// Steps forward: y += C h; keeps the state before each step (and after the last) and each decay, [step][state][lane].
template <class T, int S, bool kConstantB, bool kConstantC>
COBRA_INLINE void replay(T* y, T* before, T* decays, const T* h, const T* dt, const T* u, const T* rate, const T* B, const T* C, int64_t steps) {
  constexpr int W = Vec<T>::kWidth;
  const DecayExp2<T> decay;
  Vec<T> state[S], a[S];
  for (int s = 0; s < S; ++s) state[s] = load(h + s * W), a[s] = load(rate + s * W);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<T> step = load(dt + t * W), x = step * load(u + t * W);
    Vec<T> sum = load(y + t * W);
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      const Vec<T> d = decay(step * a[s]);
      store(before + (t * S + s) * W, state[s]);
      store(decays + (t * S + s) * W, d);
      state[s] = fma(d, state[s], projection<T, kConstantB>(B, t, s) * x);
      sum = fma(projection<T, kConstantC>(C, t, s), state[s], sum);
    }
    store(y + t * W, sum);
  }
  for (int s = 0; s < S; ++s) store(before + (steps * S + s) * W, state[s]);
}

// Steps backward: g is the gradient of the state. Adds to ddt (in units of `rate`) what comes through the decay, to dx what comes through dt u,
// and to dA, dB and dC; those of a variable B and C are kept per step, [step][state][lane].
template <class T, int S, bool kConstantB, bool kConstantC>
COBRA_INLINE void walk_back(T* g, T* ddt, T* dx, T* dA, T* dB, T* dC, const T* before, const T* decays, const T* dt, const T* u, const T* dy, const T* rate, const T* B,
                            const T* C, int64_t steps) {
  constexpr int W = Vec<T>::kWidth;
  Vec<T> gradient[S], state[S], sum_A[S], sum_B[S], sum_C[S];
  for (int s = 0; s < S; ++s) {
    gradient[s] = load(g + s * W), state[s] = load(before + (steps * S + s) * W), sum_A[s] = load(dA + s * W);
    if (kConstantB) sum_B[s] = load(dB + s * W);
    if (kConstantC) sum_C[s] = load(dC + s * W);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const Vec<T> step = load(dt + t * W), x = step * load(u + t * W), d = load(dy + t * W);
    Vec<T> through_decay = load(ddt + t * W), through_x = load(dx + t * W);
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      T *const B_step = dB + (t * S + s) * W, *const C_step = dC + (t * S + s) * W;
      if constexpr (kConstantC) sum_C[s] = fma(d, state[s], sum_C[s]);
      else store(C_step, fma(d, state[s], load(C_step)));
      gradient[s] = fma(d, projection<T, kConstantC>(C, t, s), gradient[s]);
      if constexpr (kConstantB) sum_B[s] = fma(gradient[s], x, sum_B[s]);
      else store(B_step, fma(gradient[s], x, load(B_step)));
      through_x = fma(gradient[s], projection<T, kConstantB>(B, t, s), through_x);
      gradient[s] *= load(decays + (t * S + s) * W);
      state[s] = load(before + (t * S + s) * W);
      const Vec<T> exponent = gradient[s] * state[s];
      through_decay = fma(exponent, load(rate + s * W), through_decay);
      sum_A[s] = fma(exponent, step, sum_A[s]);
    }
    store(ddt + t * W, through_decay);
    store(dx + t * W, through_x);
  }
  for (int s = 0; s < S; ++s) {
    store(g + s * W, gradient[s]);
    store(dA + s * W, sum_A[s]);
    if (kConstantB) store(dB + s * W, sum_B[s]);
    if (kConstantC) store(dC + s * W, sum_C[s]);
  }
}

// Lane j of the result is the sum of row[j]'s lanes: halves are exchanged and added until one vector is left.
template <class T, int kHalf = Vec<T>::kWidth / 2>
COBRA_INLINE Vec<T> sum_rows(Vec<T> (&row)[Vec<T>::kWidth]) {
  constexpr int W = Vec<T>::kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    const Vec<T> a = row[i], b = row[i + kHalf];
    row[i] = shuffle(a, b, [](int j) { return j & kHalf ? W + j : j; }) + shuffle(a, b, [](int j) { return j & kHalf ? W + j - kHalf : j + kHalf; });
  }
  if constexpr (kHalf > 1) return sum_rows<T, kHalf / 2>(row);
  return row[0];
}

// --- one item -------------------------------------------------------------------------------------------------------

// One thread's buffers for a block of channels, and the walk over its sequences.
template <class T>
class BlockGradient {
  static constexpr int W = Vec<T>::kWidth, S = std::min(W, 4);  // states at a time
  static constexpr int64_t kSteps = kStateChunk, kChunk = kSteps + 1;  // padded by a step, as in the forward

 public:
  BlockGradient(const SelectiveScanBwdParams& p, const Partition& partition)
      : p_(p),
        partition_(partition),
        workspace_(static_cast<T*>(p.workspace)),
        tile_(partition.block * kChunk),
        per_channel_(partition.block * p.dstate),
        scratch_(8 * tile_ + 4 * per_channel_ + 4 * partition.block + 2 * size_of_projection(p.B_constant) + 2 * size_of_projection(p.C_constant) + 2 * kChunk * S * W) {
    for (T** tile : {&dt_, &u_, &slope_, &dy_, &dgate_, &y_, &ddt_, &dx_}) *tile = scratch_.take(tile_);
    for (T** kept : {&rate_, &h_, &g_, &dA_}) *kept = scratch_.take(per_channel_);
    B_ = scratch_.take(size_of_projection(p.B_constant));
    C_ = scratch_.take(size_of_projection(p.C_constant));
    dB_ = scratch_.take(size_of_projection(p.B_constant));
    dC_ = scratch_.take(size_of_projection(p.C_constant));
    before_ = scratch_.take(kChunk * S * W);
    decays_ = scratch_.take(kChunk * S * W);
    for (T** vector : {&D_, &bias_, &dD_, &dbias_}) *vector = scratch_.take(partition.block);
  }

  void set_block(int64_t block) {
    block_ = block;
    channel_ = partition_.first_channel(block);
    channels_ = partition_.channels(block);
    // The sums over channels include the absent lanes of the last vector: everything there must be 0.
    load_tile(rate_, p_.dstate, state_of(p_.A, p_.A_dtype, p_.A_stride, 0), channels_, p_.dstate);
    // A = -inf, a state that forgets everything, becomes finite: the gradient 0 of its exponent times A is then 0.
    const Vec<T> scale = kRate, lowest = std::numeric_limits<T>::lowest();
    for (int64_t i = 0; i < per_channel_; i += W) store(rate_ + i, max(load(rate_ + i) * scale, lowest));
    if (p_.B_constant) load_constant(B_, p_.B, p_.B_dtype, p_.B_stride);
    if (p_.C_constant) load_constant(C_, p_.C, p_.C_dtype, p_.C_stride);
    std::fill_n(D_, partition_.block, T(0));
    std::fill_n(bias_, partition_.block, T(0));
    if (p_.D) load_row(D_, p_.D, p_.D_dtype, channel_ * p_.D_stride, p_.D_stride, channels_);
    if (p_.delta_bias) load_row(bias_, p_.delta_bias, p_.delta_bias_dtype, channel_ * p_.delta_bias_stride, p_.delta_bias_stride, channels_);
  }

  // The sequences of a part, and its sums over them.
  void run_part(int64_t part) {
    std::fill_n(dA_, per_channel_, T(0));
    std::fill_n(dD_, partition_.block, T(0));
    std::fill_n(dbias_, partition_.block, T(0));
    if (p_.B_constant) std::fill_n(dB_, per_channel_, T(0));
    if (p_.C_constant) std::fill_n(dC_, per_channel_, T(0));
    for (int64_t row = part * partition_.rows / partition_.parts; row < (part + 1) * partition_.rows / partition_.parts; ++row) {
      if (p_.cu_seqlens)
        run(0, row, boundary(p_, row), boundary(p_, row + 1));
      else
        run(row, row, 0, p_.seqlen);
    }
    const auto leave = [&](int64_t where, const T* sums, int64_t states) {
      store_tile({workspace_, kComputeDType<T>, where + part * states * p_.dim + channel_, 1, p_.dim}, sums, states, channels_, states);
    };
    leave(partition_.dA, dA_, p_.dstate);
    leave(partition_.dD, dD_, 1);
    leave(partition_.ddelta_bias, dbias_, 1);
    if (p_.B_constant) leave(partition_.dB, dB_, p_.dstate);
    if (p_.C_constant) leave(partition_.dC, dC_, p_.dstate);
  }

  // du = ddelta = dz = 0 over the padding after the last packed sequence.
  void clear(int64_t begin, int64_t end) {
    std::fill_n(y_, tile_, T(0));
    for (int64_t t = begin; t < end; t += kSteps) {
      const int64_t steps = std::min(kSteps, end - t);
      store_tile(du(0, t), y_, kChunk, channels_, steps);
      store_tile(ddelta(0, t), y_, kChunk, channels_, steps);
      if (p_.dz) store_tile(dz(0, t), y_, kChunk, channels_, steps);
    }
  }

 private:
  static constexpr T kRate = DecayExp2<T>::kScale * T(1.4426950408889634);  // from A to what DecayExp2 takes

  // Of B or C, and of its gradient: per channel and state, or per step and state and for S states per lane.
  int64_t size_of_projection(bool constant) const {
    return constant ? per_channel_ : std::max<int64_t>((p_.dstate + W - 1) / W * W * kChunk, kChunk * S * W);
  }

  // Parts of tensors that belong to this block of channels.
  Matrix state_of(const void* data, DType dtype, const ScanStateStride& s, int64_t row) const {
    return {const_cast<void*>(data), dtype, row * s.row + channel_ * s.dim, s.dim, s.state};
  }
  void load_constant(T* dst, const void* data, DType dtype, const ProjectionStride& s) {
    load_tile(dst, p_.dstate, {const_cast<void*>(data), dtype, channel_ * s.group, s.group, s.state}, channels_, p_.dstate);
  }
  void load_variable(T* dst, const void* data, DType dtype, const ProjectionStride& s, int64_t row, int64_t t, int64_t steps) {
    load_tile(dst, kChunk, {const_cast<void*>(data), dtype, row * s.batch + channel_ / (p_.dim / s.groups) * s.group + t * s.seq, s.state, s.seq}, p_.dstate, steps);
  }
  Matrix sequence(const void* data, DType dtype, const SequenceStride& s, int64_t row, int64_t t) const {
    return {const_cast<void*>(data), dtype, row * s.batch + channel_ * s.dim + t * s.seq, s.dim, s.seq};
  }
  Matrix du(int64_t row, int64_t t) const { return sequence(p_.du, p_.u_dtype, p_.du_stride, row, t); }
  Matrix ddelta(int64_t row, int64_t t) const { return sequence(p_.ddelta, p_.delta_dtype, p_.ddelta_stride, row, t); }
  Matrix dz(int64_t row, int64_t t) const { return sequence(p_.dz, p_.z_dtype, p_.dz_stride, row, t); }

  // Steps [begin, end) of batch row `row`, the sequence whose states are `state_row`.
  void run(int64_t row, int64_t state_row, int64_t begin, int64_t end) {
    if (p_.dlast_state)
      load_tile(g_, p_.dstate, state_of(p_.dlast_state, p_.dlast_state_dtype, p_.dlast_state_stride, state_row), channels_, p_.dstate);
    else
      std::fill_n(g_, per_channel_, T(0));
    const int64_t first_slot = row * state_slots(p_) + state_slot(p_, begin, state_row);
    for (int64_t chunk = (end - begin + kSteps - 1) / kSteps - 1; chunk >= 0; --chunk) {
      const int64_t t = begin + chunk * kSteps, slot = first_slot + chunk;
      load_tile(h_, p_.dstate, {const_cast<void*>(p_.states), kComputeDType<T>, slot * p_.dstate * p_.dim + channel_, 1, p_.dim}, channels_, p_.dstate);
      run_chunk(row, t, std::min(kSteps, end - t));
    }
    if (p_.dinitial_state) store_tile(state_of(p_.dinitial_state, p_.initial_state_dtype, p_.dinitial_state_stride, state_row), g_, p_.dstate, channels_, p_.dstate);
  }

  void run_chunk(int64_t row, int64_t t, int64_t steps) {
    load_tile(dt_, kChunk, sequence(p_.delta, p_.delta_dtype, p_.delta_stride, row, t), channels_, steps);
    load_tile(u_, kChunk, sequence(p_.u, p_.u_dtype, p_.u_stride, row, t), channels_, steps);
    if (p_.dout) load_tile(dy_, kChunk, sequence(p_.dout, p_.u_dtype, p_.dout_stride, row, t), channels_, steps);
    if (p_.z) load_tile(y_, kChunk, sequence(p_.z, p_.z_dtype, p_.z_stride, row, t), channels_, steps);
    if (!p_.B_constant) load_variable(B_, p_.B, p_.B_dtype, p_.B_stride, row, t, steps);
    if (!p_.C_constant) load_variable(C_, p_.C, p_.C_dtype, p_.C_stride, row, t, steps);
    for (int64_t c = 0; c * W < channels_; ++c) prepare(c, steps);
    const int64_t position = row * p_.seqlen + t;
    if (p_.B_constant)
      p_.C_constant ? all_states<true, true>(position, steps) : all_states<true, false>(position, steps);
    else
      p_.C_constant ? all_states<false, true>(position, steps) : all_states<false, false>(position, steps);
    for (int64_t c = 0; c * W < channels_; ++c) finish(c, steps);
    store_tile(du(row, t), dx_, kChunk, channels_, steps);
    store_tile(ddelta(row, t), ddt_, kChunk, channels_, steps);
    if (p_.dz) store_tile(dz(row, t), y_, kChunk, channels_, steps);
  }

  // Once for all states: dt and its slope over delta, dy = dout silu(z) and dz / y, y = D u.
  void prepare(int64_t c, int64_t steps) {
    const Vec<T> zero = T(0), one = T(1), bias = load(bias_ + c * W), skip = load(D_ + c * W);
    for (int64_t i = c * kChunk * W; i < (c * kChunk + steps) * W; i += W) {
      const Vec<T> raw = load(dt_ + i) + bias, u = load(u_ + i), dout = p_.dout ? load(dy_ + i) : zero;
      store(dt_ + i, p_.delta_softplus ? softplus(raw) : raw);
      if (p_.delta_softplus) store(slope_ + i, softplus_slope(raw));
      if (p_.z) {
        const Vec<T> z = load(y_ + i), open = sigmoid(z);
        store(dgate_ + i, dout * open * fma(z, one - open, one));
        store(dy_ + i, dout * z * open);
      } else {
        store(dy_ + i, dout);
      }
      store(y_ + i, p_.D ? skip * u : zero);  // 0 * inf is no skip
      store(ddt_ + i, zero);
      store(dx_ + i, zero);
    }
  }
  static COBRA_INLINE Vec<T> softplus_slope(Vec<T> raw) {  // 1 above 20, as softplus: in fp32 it rounds to that
    if constexpr (sizeof(T) == 4) return sigmoid(raw);
    return where_greater(raw, Vec<T>(T(20)), Vec<T>(T(1)), sigmoid(raw));
  }

  template <bool kConstantB, bool kConstantC>
  void all_states(int64_t position, int64_t steps) {
    int64_t n = 0;
    for (; n + S <= p_.dstate; n += S) some_states<S, kConstantB, kConstantC>(n, position, steps);
    for (; n < p_.dstate; ++n) some_states<1, kConstantB, kConstantC>(n, position, steps);
  }

  template <int kStates, bool kConstantB, bool kConstantC>
  void some_states(int64_t n, int64_t position, int64_t steps) {
    if (!kConstantB) std::fill_n(dB_, steps * kStates * W, T(0));
    if (!kConstantC) std::fill_n(dC_, steps * kStates * W, T(0));
    for (int64_t c = 0; c * W < channels_; ++c) {
      const int64_t tile = c * kChunk * W, kept = (c * p_.dstate + n) * W, staged = n / W * kChunk * W + n % W;
      const T *const B = B_ + (kConstantB ? kept : staged), *const C = C_ + (kConstantC ? kept : staged);
      replay<T, kStates, kConstantB, kConstantC>(y_ + tile, before_, decays_, h_ + kept, dt_ + tile, u_ + tile, rate_ + kept, B, C, steps);
      walk_back<T, kStates, kConstantB, kConstantC>(g_ + kept, ddt_ + tile, dx_ + tile, dA_ + kept, dB_ + (kConstantB ? kept : 0), dC_ + (kConstantC ? kept : 0), before_,
                                                    decays_, dt_ + tile, u_ + tile, dy_ + tile, rate_ + kept, B, C, steps);
    }
    if (!kConstantB) leave_sums<kStates>(partition_.dB, dB_, n, position, steps);
    if (!kConstantC) leave_sums<kStates>(partition_.dC, dC_, n, position, steps);
  }

  // The block's sums over channels of `kStates` states, from [step][state][lane] into the workspace.
  template <int kStates>
  void leave_sums(int64_t where, const T* sums, int64_t n, int64_t position, int64_t steps) {
    T* const out = workspace_ + where + (block_ * p_.dstate + n) * partition_.positions + position;
    for (int s = 0; s < kStates; ++s)
      for (int64_t t = 0; t < steps; t += W) {
        Vec<T> row[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) row[j] = t + j < steps ? load(sums + ((t + j) * kStates + s) * W) : Vec<T>(T(0));
        const Vec<T> sum = sum_rows(row);
        if (t + W <= steps)
          store(out + s * partition_.positions + t, sum);
        else
          store_n(out + s * partition_.positions + t, sum, steps - t);
      }
  }

  // Once for all states: du over dx, ddelta over ddt, dz over y.
  void finish(int64_t c, int64_t steps) {
    const Vec<T> skip = load(D_ + c * W), per_rate = T(1) / kRate;
    Vec<T> sum_D = T(0), sum_bias = T(0);
    for (int64_t i = c * kChunk * W; i < (c * kChunk + steps) * W; i += W) {
      const Vec<T> u = load(u_ + i), dx = load(dx_ + i), dy = load(dy_ + i);
      Vec<T> du = load(dt_ + i) * dx, ddelta = fma(load(ddt_ + i), per_rate, u * dx);
      if (p_.D) du = fma(skip, dy, du);
      if (p_.delta_softplus) ddelta *= load(slope_ + i);
      if (p_.z) store(y_ + i, load(dgate_ + i) * load(y_ + i));
      store(dx_ + i, du);
      store(ddt_ + i, ddelta);
      sum_D = fma(dy, u, sum_D);
      sum_bias += ddelta;
    }
    store(dD_ + c * W, load(dD_ + c * W) + sum_D);
    store(dbias_ + c * W, load(dbias_ + c * W) + sum_bias);
  }

  const SelectiveScanBwdParams& p_;
  const Partition& partition_;
  T* const workspace_;
  const int64_t tile_, per_channel_;
  Scratch<T> scratch_;
  T *dt_, *u_, *slope_, *dy_, *dgate_, *y_, *ddt_, *dx_;  // a tile each: y is z at first, then y, then dz; ddt becomes ddelta, dx du
  T *rate_, *h_, *g_, *dA_;                               // per channel and state: A in the units of DecayExp2, the state before the chunk, its gradient
  T *B_, *C_, *dB_, *dC_;
  T *before_, *decays_;                                   // of the steps of a chunk, S states of one vector of channels
  T *D_, *bias_, *dD_, *dbias_;
  int64_t block_ = 0, channel_ = 0, channels_ = 0;
};

// --- the second pass: sums of what the items left -----------------------------------------------------------------------

// Adds up the parts of a gradient (dim, states) and stores it.
template <class T>
void sum_parts(const SelectiveScanBwdParams& p, const Partition& partition, int64_t where, int64_t states, const Matrix& gradient, const Parallel& parallel) {
  constexpr int64_t kChannels = 64;
  const int64_t tile = kChannels * states, grain = std::max<int64_t>(1, (int64_t(1) << 16) / (tile * std::max<int64_t>(1, partition.parts)));
  parallel(0, (p.dim + kChannels - 1) / kChannels, grain, [&](int64_t first, int64_t last) {
    Scratch<T> scratch(2 * tile);
    T *const sum = scratch.take(tile), *const part_sum = scratch.take(tile);
    for (int64_t channel = first * kChannels; channel < std::min(p.dim, last * kChannels); channel += kChannels) {
      const int64_t channels = std::min(kChannels, p.dim - channel);
      std::fill_n(sum, tile, T(0));
      for (int64_t part = 0; part < partition.parts; ++part) {
        load_tile(part_sum, states, {p.workspace, kComputeDType<T>, where + part * states * p.dim + channel, 1, p.dim}, channels, states);
        for (int64_t i = 0; i < tile; i += Vec<T>::kWidth) store(sum + i, load(sum + i) + load(part_sum + i));
      }
      store_tile({gradient.data, gradient.dtype, gradient.offset + channel * gradient.lane_stride, gradient.lane_stride, gradient.step_stride}, sum, states, channels, states);
    }
  });
}

// Adds up the blocks of each group of a variable dB or dC and stores it; 0 in the padding after packed sequences.
template <class T>
void sum_blocks(const SelectiveScanBwdParams& p, const Partition& partition, int64_t where, void* gradient, DType dtype, const ProjectionStride& stride, const Parallel& parallel) {
  constexpr int64_t W = Vec<T>::kWidth, kSteps = 64;
  const int64_t tiles = (p.seqlen + kSteps - 1) / kSteps, group_blocks = partition.blocks / stride.groups, end = p.cu_seqlens ? boundary(p, p.num_seqs) : p.seqlen;
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / (kSteps * p.dstate * std::max<int64_t>(1, group_blocks)));
  parallel(0, p.batch * stride.groups * tiles, grain, [&](int64_t first, int64_t last) {
    Scratch<T> sum(kSteps * p.dstate);
    T* const sums = sum.take(0);  // staged with time in the lanes: [step / W][state][step % W]
    for (int64_t item = first; item < last; ++item) {
      const int64_t t = item % tiles * kSteps, group = item / tiles % stride.groups, row = item / tiles / stride.groups;
      const int64_t steps = std::min(kSteps, p.seqlen - t), summed = std::clamp<int64_t>(end - t, 0, steps);
      std::fill_n(sums, kSteps * p.dstate, T(0));
      for (int64_t block = group * group_blocks; block < (group + 1) * group_blocks; ++block)
        for (int64_t n = 0; n < p.dstate; ++n) {
          const T* const part = static_cast<const T*>(p.workspace) + where + (block * p.dstate + n) * partition.positions + row * p.seqlen + t;
          for (int64_t i = 0; i < summed; i += W) {
            T* const to = sums + i * p.dstate + n * W;
            store(to, load(to) + (i + W <= summed ? load(part + i) : load_n(part + i, summed - i)));
          }
        }
      store_tile({gradient, dtype, row * stride.batch + group * stride.group + t * stride.seq, stride.seq, stride.state}, sums, p.dstate, steps, p.dstate);
    }
  });
}

template <class T>
void bwd(const SelectiveScanBwdParams& p, const Parallel& parallel) {
  const Partition partition(p);
  // Block by block, so that a thread's share holds all parts; the last item of a block of packed sequences is the padding after them.
  const int64_t block_items = partition.parts + (p.cu_seqlens ? 1 : 0);
  const int64_t item_work = partition.block * p.dstate * (partition.positions / std::max<int64_t>(partition.parts, 1) + 1);
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 17) / item_work);
  parallel(0, partition.blocks * block_items, grain, [&](int64_t first, int64_t last) {
    BlockGradient<T> gradient(p, partition);
    for (int64_t item = first, loaded = -1; item < last; ++item) {
      const int64_t block = item / block_items, part = item % block_items;
      if (block != loaded) gradient.set_block(loaded = block);
      if (part < partition.parts)
        gradient.run_part(part);
      else
        gradient.clear(boundary(p, p.num_seqs), p.seqlen);
    }
  });

  const auto projection = [&](int64_t where, void* gradient, DType dtype, const ProjectionStride& stride, bool constant) {
    if (constant)
      sum_parts<T>(p, partition, where, p.dstate, {gradient, dtype, 0, stride.group, stride.state}, parallel);
    else
      sum_blocks<T>(p, partition, where, gradient, dtype, stride, parallel);
  };
  projection(partition.dB, p.dB, p.B_dtype, p.dB_stride, p.B_constant);
  projection(partition.dC, p.dC, p.C_dtype, p.dC_stride, p.C_constant);
  sum_parts<T>(p, partition, partition.dA, p.dstate, {p.dA, p.A_dtype, 0, p.dA_stride.dim, p.dA_stride.state}, parallel);
  if (p.dD) sum_parts<T>(p, partition, partition.dD, 1, {p.dD, p.D_dtype, 0, 1, 1}, parallel);
  if (p.ddelta_bias) sum_parts<T>(p, partition, partition.ddelta_bias, 1, {p.ddelta_bias, p.delta_bias_dtype, 0, 1, 1}, parallel);
}

}  // namespace

void selective_scan_bwd(const SelectiveScanBwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.u_dtype == DType::kFloat64) return bwd<double>(p, parallel);
#endif
  bwd<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void selective_scan_bwd_cpu(const SelectiveScanBwdParams& p, const Parallel& parallel) {
  p.u_dtype == DType::kFloat64 ? scalar::selective_scan_bwd(p, parallel) : COBRA_AT_LEVEL(selective_scan_bwd)(p, parallel);
}
int64_t selective_scan_bwd_workspace_cpu(const SelectiveScanBwdParams& p) { return Partition(p).size; }

}  // namespace cobra
#endif
