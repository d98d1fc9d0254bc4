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
constexpr int64_t kStates = 256;   // of B and C staged at a time

// Element of (a0 a1 .. b0 b1 ..) that output lane i takes from two vectors: every other one, from `first` on.
template <class T>
COBRA_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b, int first) {
  typename Vec<T>::Bits pick;
  for (int i = 0; i < Vec<T>::kWidth; ++i) pick[i] = 2 * i + first;
  return __builtin_shuffle(a.v, b.v, pick);
}

// Lane c of the result is the sum of the lanes of v[c]. Destroys v.
template <class T>
COBRA_INLINE Vec<T> sum_each(Vec<T> (&v)[Vec<T>::kWidth]) {
  for (int count = Vec<T>::kWidth; count > 1; count /= 2)
    for (int i = 0; i < count / 2; ++i) v[i] = every_other(v[2 * i], v[2 * i + 1], 0) + every_other(v[2 * i], v[2 * i + 1], 1);
  return v[0];
}

// One tile of channels in compute precision. Lanes beyond the tile's last channel hold zeros.
template <class T>
struct Tile {
  alignas(kVecBytes) T x[kChannels] = {}, dt[kChannels] = {}, dtx[kChannels], y[kChannels], row[kChannels] = {};
};
template <class T>
struct Projections {
  alignas(kVecBytes) T B[kStates], C[kStates];  // zero beyond dstate
};

// How a channel's states and A are read: contiguous fp32 (fp64), contiguous 16-bit, or element by element.
template <class T, class S, bool kContiguous>
struct Along {
  using Pointer = S*;
  static COBRA_INLINE Vec<T> get(const S* p, int64_t n, int64_t left, int64_t stride) {
    if (kContiguous && left >= Vec<T>::kWidth) return load(p + n);
    return load_n(p + n * stride, std::min<int64_t>(left, Vec<T>::kWidth), stride);
  }
  static COBRA_INLINE void set(S* p, Vec<T> h, int64_t n, int64_t left, int64_t stride) {
    if (kContiguous && left >= Vec<T>::kWidth) return store(p + n, h);
    store_n(p + n * stride, h, std::min<int64_t>(left, Vec<T>::kWidth), stride);
  }
};

// h = decay * h + dtx B and y += sum_n C h for the states [0, states) of `channels` channels.
template <class T, class S, class SA, bool kContiguous>
void step_states(S* state, int64_t state_dim, int64_t state_dstate, const SA* A, int64_t A_dim, int64_t A_dstate,
                 const Projections<T>& projections, Tile<T>& tile, int64_t channels, int64_t states) {
  constexpr int kWidth = Vec<T>::kWidth;
  using State = Along<T, S, kContiguous>;
  using Decay = Along<T, SA, kContiguous>;
  const T log2e = T(1.442695040888963407);
  for (int64_t c0 = 0; c0 < channels; c0 += kWidth) {
    Vec<T> sums[kWidth];
    for (int c = 0; c < kWidth; ++c) {
      sums[c] = T(0);
      if (c0 + c >= channels) continue;
      S* const h_row = state + (c0 + c) * state_dim;
      const SA* const A_row = A + (c0 + c) * A_dim;
      const Vec<T> dt = tile.dt[c0 + c] * log2e, dtx = tile.dtx[c0 + c];
      for (int64_t n = 0; n < states; n += kWidth) {
        const Vec<T> decay = exp2(dt * Decay::get(A_row, n, states - n, A_dstate));
        const Vec<T> h = fma(decay, State::get(h_row, n, states - n, state_dstate), dtx * load(projections.B + n));
        State::set(h_row, h, n, states - n, state_dstate);
        sums[c] = fma(h, load(projections.C + n), sums[c]);
      }
    }
    store(tile.y + c0, load(tile.y + c0) + sum_each(sums));
  }
}

// As step_states where A is one number per channel (stride 0 along dstate): one exponential per channel.
template <class T, class S, bool kContiguous>
void step_tied(S* state, int64_t state_dim, int64_t state_dstate, const T* decays, const Projections<T>& projections, Tile<T>& tile,
               int64_t channels, int64_t states) {
  constexpr int kWidth = Vec<T>::kWidth;
  using State = Along<T, S, kContiguous>;
  for (int64_t c0 = 0; c0 < channels; c0 += kWidth) {
    Vec<T> sums[kWidth];
    for (int c = 0; c < kWidth; ++c) {
      sums[c] = T(0);
      if (c0 + c >= channels) continue;
      S* const h_row = state + (c0 + c) * state_dim;
      const Vec<T> decay = decays[c0 + c], dtx = tile.dtx[c0 + c];
      for (int64_t n = 0; n < states; n += kWidth) {
        const Vec<T> h = fma(decay, State::get(h_row, n, states - n, state_dstate), dtx * load(projections.B + n));
        State::set(h_row, h, n, states - n, state_dstate);
        sums[c] = fma(h, load(projections.C + n), sums[c]);
      }
    }
    store(tile.y + c0, load(tile.y + c0) + sum_each(sums));
  }
}

template <class T, class F>
COBRA_INLINE void each_vector(F&& f) {
  for (int64_t i = 0; i < kChannels; i += Vec<T>::kWidth) f(i);
}

// f(typed null pointer) for the element type of a tensor.
template <class T, class F>
COBRA_INLINE void with_type(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::kBFloat16: return f(static_cast<bf16*>(nullptr));
      case DType::kFloat16: return f(static_cast<fp16*>(nullptr));
      default: return f(static_cast<float*>(nullptr));
    }
  }
}

int64_t offset(const StateStride& s, int64_t batch, int64_t head, int64_t dim) { return batch * s.batch + head * s.head + dim * s.dim; }

template <class T>
void update_tile(const SelectiveStateUpdateParams& p, int64_t batch, int64_t head, int64_t d0) {
  const int64_t channels = std::min(kChannels, p.dim - d0);
  const int64_t out_at = offset(p.out_stride, batch, head, d0);
  Tile<T> tile;
  const int64_t row = pool_row(p, batch);
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
  const bool tied = p.A_stride.dstate == 0 && p.dstate > 1;
  if (tied) {
    read(tile.row, p.A, p.A_dtype, p.A_stride);
    each_vector<T>([&](int64_t i) { store(tile.row + i, exp(load(tile.dt + i) * load(tile.row + i))); });
  }

  const int64_t group = head / (p.heads / p.groups);
  const bool contiguous = p.state_stride.dstate == 1 && (tied || p.A_stride.dstate == 1);
  Projections<T> projections;
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kStates) {
    const int64_t states = std::min(kStates, p.dstate - n0);
    const int64_t padded = (states + Vec<T>::kWidth - 1) / Vec<T>::kWidth * Vec<T>::kWidth;
    std::fill(projections.B + states, projections.B + padded, T(0));
    std::fill(projections.C + states, projections.C + padded, T(0));
    load_row(projections.B, p.B, p.B_dtype, offset(p.B_stride, batch, group, 0) + n0 * p.B_stride.dstate, p.B_stride.dstate, states);
    load_row(projections.C, p.C, p.C_dtype, offset(p.C_stride, batch, group, 0) + n0 * p.C_stride.dstate, p.C_stride.dstate, states);
    const int64_t state_at = offset(p.state_stride, row, head, d0) + n0 * p.state_stride.dstate;
    const int64_t A_at = offset(p.A_stride, 0, head, d0) + n0 * p.A_stride.dstate;
    with_type<T>(p.state_dtype, [&](auto* state_type) {
      using S = std::remove_pointer_t<decltype(state_type)>;
      S* const state = static_cast<S*>(p.state) + state_at;
      if (tied) {
        const auto step = contiguous ? step_tied<T, S, true> : step_tied<T, S, false>;
        step(state, p.state_stride.dim, p.state_stride.dstate, tile.row, projections, tile, channels, states);
        return;
      }
      with_type<T>(p.A_dtype, [&](auto* A_type) {
        using SA = std::remove_pointer_t<decltype(A_type)>;
        const auto step = contiguous ? step_states<T, S, SA, true> : step_states<T, S, SA, false>;
        step(state, p.state_stride.dim, p.state_stride.dstate, static_cast<const SA*>(p.A) + A_at, p.A_stride.dim, p.A_stride.dstate,
             projections, tile, channels, states);
      });
    });
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
