// What the CPU kernels of selective_scan share: tiles of tensors staged through L1 as vectors of lanes, whatever the layout.
#pragma once
#include "common/cpu_level.h"
#include "common/vec.h"
#include "selective_scan/selective_scan.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>
#include <utility>

namespace cobra::COBRA_LEVEL {

// --- staging: a strided matrix in memory <-> chunks of vectors ------------------------------------------------------
// A staged matrix (lanes, steps) is [lane / kWidth][step][lane % kWidth], `chunk_steps` steps apart from chunk to chunk.
// It holds sequences (lane = channel), per-channel parameters and states (step = state), and B, C (lane = state).

struct Matrix {  // in memory; strides in elements
  void* data;
  DType dtype;
  int64_t offset, lane_stride, step_stride;
};

template <class T, class F, size_t... I>
COBRA_INLINE Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b, F index, std::index_sequence<I...>) {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const typename Vec<T>::Bits mask = {Int(index(int(I)))...};
  return __builtin_shuffle(a.v, b.v, mask);
}
// Lane j of the result is lane index(j) of (a, b); `index` is folded to a constant.
template <class T, class F>
COBRA_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, F index) {
  return shuffle_lanes(a, b, index, std::make_index_sequence<Vec<T>::kWidth>());
}

// Swaps the off-diagonal blocks of kBit lanes in each square of two, then of four, until the whole is transposed.
template <int kBit, class T>
COBRA_INLINE void exchange_blocks(Vec<T> (&row)[Vec<T>::kWidth]) {
  constexpr int W = Vec<T>::kWidth;
#pragma GCC unroll 16
  for (int pair = 0; pair < W / 2; ++pair) {
    const int i = pair / kBit * 2 * kBit + pair % kBit;
    const Vec<T> a = row[i], b = row[i + kBit];
    row[i] = shuffle(a, b, [](int j) { return j & kBit ? W + j - kBit : j; });
    row[i + kBit] = shuffle(a, b, [](int j) { return j & kBit ? W + j : j + kBit; });
  }
  if constexpr (2 * kBit < W) exchange_blocks<2 * kBit>(row);
}

// row[i] lane j <-> row[j] lane i, in registers: inside 128 bits by two rounds of unpacking, then 128-bit blocks.
template <class T>
COBRA_INLINE void transpose(Vec<T> (&row)[Vec<T>::kWidth]) {
  constexpr int W = Vec<T>::kWidth;
  constexpr int kBlockLanes = sizeof(T) == 4 ? 4 : 1;
  if constexpr (kBlockLanes == 4) {
    for (int i = 0; i < W; i += 4) {
      const auto low = [](int j) { return j / 4 * 4 + j % 4 / 2 + (j % 2 ? W : 0); };
      const auto high = [](int j) { return j / 4 * 4 + j % 4 / 2 + 2 + (j % 2 ? W : 0); };
      const Vec<T> ab0 = shuffle(row[i], row[i + 1], low), ab1 = shuffle(row[i], row[i + 1], high);
      const Vec<T> cd0 = shuffle(row[i + 2], row[i + 3], low), cd1 = shuffle(row[i + 2], row[i + 3], high);
      const auto low_pair = [](int j) { return j / 4 * 4 + j % 2 + (j % 4 / 2 ? W : 0); };
      const auto high_pair = [](int j) { return j / 4 * 4 + j % 2 + 2 + (j % 4 / 2 ? W : 0); };
      row[i] = shuffle(ab0, cd0, low_pair);
      row[i + 1] = shuffle(ab0, cd0, high_pair);
      row[i + 2] = shuffle(ab1, cd1, low_pair);
      row[i + 3] = shuffle(ab1, cd1, high_pair);
    }
  }
  if constexpr (kBlockLanes < W) exchange_blocks<kBlockLanes>(row);
}

template <class T, class S>
void load_tile_as(T* dst, int64_t chunk_steps, const S* src, int64_t lane_stride, int64_t step_stride, int64_t lanes, int64_t steps) {
  constexpr int W = Vec<T>::kWidth;
  const int64_t chunk_size = chunk_steps * W, whole = lanes / W * W;
  if (lane_stride == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      const S* row = src + t * step_stride;
      T* out = dst + t * W;
#pragma GCC unroll 4
      for (int64_t i = 0; i < whole; i += W, out += chunk_size) store(out, load(row + i));
      if (whole < lanes) store(out, load_n(row + whole, lanes - whole));
    }
    return;
  }
  for (int64_t i = 0; i < lanes; i += W, dst += chunk_size, src += W * lane_stride) {
    const int64_t rows = std::min<int64_t>(W, lanes - i);
    int64_t t = 0;
    if (step_stride == 1 && rows == W)
      for (; t + W <= steps; t += W) {
        Vec<T> row[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) row[j] = load(src + j * lane_stride + t);
        transpose(row);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store(dst + (t + j) * W, row[j]);
      }
    for (; t < steps; ++t) store(dst + t * W, load_n(src + t * step_stride, rows, lane_stride));
  }
}

template <class T>
void load_tile(T* dst, int64_t chunk_steps, const Matrix& m, int64_t lanes, int64_t steps) {
  const auto run = [&](auto* src) { load_tile_as(dst, chunk_steps, src + m.offset, m.lane_stride, m.step_stride, lanes, steps); };
  if constexpr (std::is_same_v<T, double>) {
    run(static_cast<const double*>(m.data));
  } else {
    switch (m.dtype) {
      case DType::kBFloat16: return run(static_cast<const bf16*>(m.data));
      case DType::kFloat16: return run(static_cast<const fp16*>(m.data));
      default: return run(static_cast<const float*>(m.data));
    }
  }
}

// Asks for the lines of one chunk of a channel-first tile: rows too short and too far apart for the hardware's prefetchers.
// Channel-last rows are left to them; asking for those cost more than it brought.
template <class T, bool kWrite>
COBRA_INLINE void prefetch_chunk(const Matrix& m, int64_t chunk, int64_t lanes, int64_t steps) {
  if (m.step_stride != 1 || m.lane_stride == 1) return;
  const int64_t size = int64_t(size_of(m.dtype)), first = chunk * Vec<T>::kWidth, last = std::min<int64_t>(first + Vec<T>::kWidth, lanes);
  const char* row = static_cast<const char*>(m.data) + (m.offset + first * m.lane_stride) * size;
  for (int64_t lane = first; lane < last; ++lane, row += m.lane_stride * size)
    for (int64_t byte = 0; byte < steps * size; byte += 64) __builtin_prefetch(row + byte, kWrite);
}

template <class T, class S>
void store_tile_as(S* dst, const T* src, int64_t chunk_steps, int64_t lane_stride, int64_t step_stride, int64_t lanes, int64_t steps) {
  constexpr int W = Vec<T>::kWidth;
  const int64_t chunk_size = chunk_steps * W, whole = lanes / W * W;
  if (lane_stride == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      S* row = dst + t * step_stride;
      const T* in = src + t * W;
#pragma GCC unroll 4
      for (int64_t i = 0; i < whole; i += W, in += chunk_size) store(row + i, load(in));
      if (whole < lanes) store_n(row + whole, load(in), lanes - whole);
    }
    return;
  }
  for (int64_t i = 0; i < lanes; i += W, src += chunk_size, dst += W * lane_stride) {
    const int64_t rows = std::min<int64_t>(W, lanes - i);
    int64_t t = 0;
    if (step_stride == 1 && rows == W)
      for (; t + W <= steps; t += W) {
        Vec<T> row[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) row[j] = load(src + (t + j) * W);
        transpose(row);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) store(dst + j * lane_stride + t, row[j]);
      }
    for (; t < steps; ++t) store_n(dst + t * step_stride, load(src + t * W), rows, lane_stride);
  }
}

template <class T>
void store_tile(const Matrix& m, const T* src, int64_t chunk_steps, int64_t lanes, int64_t steps) {
  const auto run = [&](auto* dst) { store_tile_as(dst + m.offset, src, chunk_steps, m.lane_stride, m.step_stride, lanes, steps); };
  if constexpr (std::is_same_v<T, double>) {
    run(static_cast<double*>(m.data));
  } else {
    switch (m.dtype) {
      case DType::kBFloat16: return run(static_cast<bf16*>(m.data));
      case DType::kFloat16: return run(static_cast<fp16*>(m.data));
      default: return run(static_cast<float*>(m.data));
    }
  }
}

// One B or C of a tile: a broadcast per step and state when variable, a vector per state when constant over time.
template <class T, bool kConstant>
COBRA_INLINE Vec<T> projection(const T* p, int64_t t, int state) {
  constexpr int W = Vec<T>::kWidth;
  if constexpr (kConstant) return load(p + state * W);
  return Vec<T>(p[t * W + state]);
}

// --- problem and memory ---------------------------------------------------------------------------------------------

template <class T>
constexpr DType kComputeDType = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

inline int64_t boundary(const SelectiveScanInputs& p, int64_t i) {
  i *= p.cu_seqlens_stride;
  return p.cu_seqlens_dtype == DType::kInt32 ? static_cast<const int32_t*>(p.cu_seqlens)[i] : static_cast<const int64_t*>(p.cu_seqlens)[i];
}

// Zeroed at the start, 64-byte aligned; its parts are handed out in order.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), std::align_val_t(64)))), next_(data_) {
    std::fill_n(data_, size, T(0));
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t size) { return std::exchange(next_, next_ + size); }

 private:
  T* data_;
  T* next_;
};

}  // namespace cobra::COBRA_LEVEL
