// selective_state_update on a CPU. A thread owns (batch, head, 64 channels): per-channel work (softplus, D, gate) runs across
// channels, the state runs along dstate, where it is contiguous, and the sums over dstate of one vector of channels are
// folded together by a transposing tree. The state passes through registers once: the kernel moves bytes, little else.
#include "common/cpu_level.h"
#include "common/vec.h"
#include "selective_state_update/selective_state_update.h"

#include <algorithm>

namespace cobra {
COBRA_DECLARE_LEVELS(selective_state_update, SelectiveStateUpdateParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

constexpr int64_t kChannels = 64;  // of a tile; a multiple of every vector width
constexpr int64_t kStates = 256;   // along dstate, staged at a time; a multiple of every vector width

// One tile of channels in compute precision. Lanes beyond the tile's last channel hold zeros.
template <class T>
struct Tile {
  alignas(kVecBytes) T x[kChannels] = {}, dt[kChannels] = {}, dtx[kChannels], y[kChannels], row[kChannels] = {};
};

// Rows along dstate in compute precision, zero-padded to whole vectors.
template <class T>
struct Staged {
  static constexpr int kRows = Vec<T>::kWidth;
  alignas(kVecBytes) T data[kRows][kStates];

  void read(int row, const void* src, DType dtype, int64_t offset, int64_t stride, int64_t states) {
    load_row(data[row], src, dtype, offset, stride, states);
    std::fill(data[row] + states, data[row] + (states + kRows - 1) / kRows * kRows, T(0));
  }
};

// h = decay h + dtx B in place; lane c of the result is sum_n C h of channel c, 0 for c >= channels. Whole vectors only.
// kVectors along dstate are known in the common cases, so that B and C stay in registers; 0: `vectors` of them.
// kTied: `A` holds the decay of each channel, one number, instead of its row of A.
template <class T, class S, int kVectors, bool kTied>
Vec<T> step(S* state, int64_t state_dim, const T* A, int64_t A_dim, const T* B, const T* C, const T* dt, const T* dtx, int64_t channels,
            int64_t vectors) {
  constexpr int kWidth = Vec<T>::kWidth;
  const DecayExp2<T> decay_exp2;
  const Vec<T> log2e = T(1.442695040888963407 * DecayExp2<T>::kScale);
  const int64_t states = (kVectors ? kVectors : vectors) * kWidth;
  Vec<T> sums[kWidth];
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<T> dt2 = Vec<T>(dt[c]) * log2e, input = dtx[c];
    Vec<T> sum = T(0);
    for (int64_t n = 0; n < states; n += kWidth) {
      const Vec<T> decay = kTied ? Vec<T>(A[c]) : decay_exp2(dt2 * load(A + c * A_dim + n));
      const Vec<T> h = fma(decay, load(state + c * state_dim + n), input * load(B + n));
      store(state + c * state_dim + n, h);
      sum = fma(h, load(C + n), sum);
    }
    sums[c] = sum;
  }
  for (int64_t c = channels; c < kWidth; ++c) sums[c] = T(0);
  return sum_each(sums);
}

template <class T, class S>
Vec<T> step(bool tied, S* state, int64_t state_dim, const T* A, int64_t A_dim, const T* B, const T* C, const T* dt, const T* dtx,
            int64_t channels, int64_t vectors) {
  const auto run = tied           ? step<T, S, 0, true>
                   : vectors == 1 ? step<T, S, 1, false>
                   : vectors == 2 ? step<T, S, 2, false>
                                  : step<T, S, 0, false>;
  return run(state, state_dim, A, A_dim, B, C, dt, dtx, channels, vectors);
}

template <class T, class F>
COBRA_INLINE void each_vector(F&& f) {
  for (int64_t i = 0; i < kChannels; i += Vec<T>::kWidth) f(i);
}

int64_t offset(const StateStride& s, int64_t batch, int64_t head, int64_t dim) { return batch * s.batch + head * s.head + dim * s.dim; }

// The recurrence of one tile for `states` states from n0 on; tile.y collects sum_n C h. State and A are used where they lie
// when they are whole contiguous vectors (A in the compute type), else through a staged copy.
template <class T>
void step_tile(const SelectiveStateUpdateParams& p, int64_t row, int64_t head, int64_t d0, int64_t channels, int64_t n0, int64_t states,
               bool tied, const T* B, const T* C, Tile<T>& tile) {
  constexpr int kWidth = Vec<T>::kWidth;
  constexpr DType kCompute = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  const int64_t vectors = (states + kWidth - 1) / kWidth;
  const bool whole = states % kWidth == 0;
  const bool state_in_place = whole && p.state_stride.dstate == 1;
  const bool A_in_place = whole && p.A_stride.dstate == 1 && p.A_dtype == kCompute;
  Staged<T> staged_state, staged_A;

  for (int64_t c0 = 0; c0 < channels; c0 += kWidth) {
    const int count = int(std::min<int64_t>(kWidth, channels - c0));
    const int64_t state_at = offset(p.state_stride, row, head, d0 + c0) + n0 * p.state_stride.dstate;
    const int64_t A_at = offset(p.A_stride, 0, head, d0 + c0) + n0 * p.A_stride.dstate;
    const T* A = tile.row + c0;
    int64_t A_dim = 0;
    if (!tied && A_in_place) {
      A = static_cast<const T*>(p.A) + A_at;
      A_dim = p.A_stride.dim;
    } else if (!tied) {
      for (int c = 0; c < count; ++c) staged_A.read(c, p.A, p.A_dtype, A_at + c * p.A_stride.dim, p.A_stride.dstate, states);
      A = staged_A.data[0];
      A_dim = kStates;
    }
    const auto run = [&](auto* state, int64_t state_dim) {
      return step(tied, state, state_dim, A, A_dim, B, C, tile.dt + c0, tile.dtx + c0, count, vectors);
    };
    Vec<T> sums;
    if (!state_in_place) {
      for (int c = 0; c < count; ++c)
        staged_state.read(c, p.state, p.state_dtype, state_at + c * p.state_stride.dim, p.state_stride.dstate, states);
      sums = run(staged_state.data[0], kStates);
      for (int c = 0; c < count; ++c)
        store_row(p.state, p.state_dtype, state_at + c * p.state_stride.dim, p.state_stride.dstate, staged_state.data[c], states);
    } else if (p.state_dtype == kCompute) {
      sums = run(static_cast<T*>(p.state) + state_at, p.state_stride.dim);
    } else if constexpr (std::is_same_v<T, float>) {
      sums = p.state_dtype == DType::kBFloat16 ? run(static_cast<bf16*>(p.state) + state_at, p.state_stride.dim)
                                               : run(static_cast<fp16*>(p.state) + state_at, p.state_stride.dim);
    }
    store(tile.y + c0, load(tile.y + c0) + sums);
  }
}

template <class T>
void update_tile(const SelectiveStateUpdateParams& p, int64_t batch, int64_t head, int64_t d0) {
  const int64_t channels = std::min(kChannels, p.dim - d0);
  const int64_t out_at = offset(p.out_stride, batch, head, d0);
  Tile<T> tile;
  const int64_t row = pool_row_of(p, batch);
  if (row < 0) return store_row(p.out, p.x_dtype, out_at, p.out_stride.dim, tile.x, channels);

  const auto read = [&](T* dst, const void* src, DType dtype, const StateStride& s) {
    load_row(dst, src, dtype, offset(s, batch, head, d0), s.dim, channels);
  };
  read(tile.x, p.x, p.x_dtype, p.x_stride);
  read(tile.dt, p.dt, p.dt_dtype, p.dt_stride);
  if (p.dt_bias) {
    read(tile.row, p.dt_bias, p.dt_bias_dtype, p.dt_bias_stride);
    each_vector<T>([&](int64_t i) { store(tile.dt + i, load(tile.dt + i) + load(tile.row + i)); });
  }
  each_vector<T>([&](int64_t i) {
    const Vec<T> dt = p.dt_softplus ? softplus(load(tile.dt + i)) : load(tile.dt + i);
    store(tile.dt + i, dt);
    store(tile.dtx + i, dt * load(tile.x + i));
    store(tile.y + i, Vec<T>(T(0)));
  });
  const bool tied = p.A_stride.dstate == 0 && p.dstate > 1;  // one A, hence one decay, per channel
  if (tied) {
    read(tile.row, p.A, p.A_dtype, p.A_stride);
    each_vector<T>([&](int64_t i) { store(tile.row + i, exp(load(tile.dt + i) * load(tile.row + i))); });
  }

  const int64_t group = head / (p.heads / p.groups);
  Staged<T> projections;  // row 0: B, row 1: C
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kStates) {
    const int64_t states = std::min(kStates, p.dstate - n0);
    projections.read(0, p.B, p.B_dtype, offset(p.B_stride, batch, group, 0) + n0 * p.B_stride.dstate, p.B_stride.dstate, states);
    projections.read(1, p.C, p.C_dtype, offset(p.C_stride, batch, group, 0) + n0 * p.C_stride.dstate, p.C_stride.dstate, states);
    step_tile(p, row, head, d0, channels, n0, states, tied, projections.data[0], projections.data[1], tile);
  }

  if (p.D) {
    read(tile.row, p.D, p.D_dtype, p.D_stride);
    each_vector<T>([&](int64_t i) { store(tile.y + i, fma(load(tile.row + i), load(tile.x + i), load(tile.y + i))); });
  }
  if (p.z) {
    read(tile.row, p.z, p.z_dtype, p.z_stride);
    each_vector<T>([&](int64_t i) { store(tile.y + i, load(tile.y + i) * silu(load(tile.row + i))); });
  }
  store_row(p.out, p.x_dtype, out_at, p.out_stride.dim, tile.y, channels);
}

template <class T>
void update(const SelectiveStateUpdateParams& p, const Parallel& parallel) {
  const int64_t tiles = (p.dim + kChannels - 1) / kChannels;
  const int64_t grain = std::max<int64_t>(1, 32768 / (kChannels * p.dstate));
  parallel(0, p.batch * p.heads * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) update_tile<T>(p, i / tiles / p.heads, i / tiles % p.heads, i % tiles * kChannels);
  });
}

}  // namespace

void selective_state_update(const SelectiveStateUpdateParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.x_dtype == DType::kFloat64) return update<double>(p, parallel);
#endif
  update<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once: fp64 runs at the scalar level
namespace cobra {

void selective_state_update_cpu(const SelectiveStateUpdateParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::selective_state_update(p, parallel) : COBRA_AT_LEVEL(selective_state_update)(p, parallel);
}

}  // namespace cobra
#endif
