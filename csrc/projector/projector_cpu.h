// What the projector's CPU kernels share: column tiles, GELU and its derivative.
#pragma once
#include "common/vec.h"
#include "projector/projector.h"

namespace cobra::COBRA_LEVEL {
namespace {

constexpr int64_t kColumns = 256;  // of a column tile: 1 KB per row in fp32, long enough for the prefetcher

// Phi(x) and e^(-x^2 / 2), see kPhiTail.
template <class T>
struct Normal {
  Vec<T> phi, bell;
};
COBRA_INLINE Normal<float> normal(Vec<float> x) {
  const Vec<float> a = abs(x), t = Vec<float>(1.0f) / fma(a, Vec<float>(0.3f), Vec<float>(1.0f));
  Vec<float> P = kPhiTail.power[0];
  for (int i = 1; i < 8; ++i) P = fma(P, t, Vec<float>(kPhiTail.power[i]));
  const Vec<float> bell = exp(a * a * Vec<float>(-0.5f)), tail = bell * (t * P);  // Phi(-a)
  return {where_greater(Vec<float>(0.0f), x, tail, Vec<float>(1.0f) - tail), bell};
}
COBRA_INLINE Normal<double> normal(Vec<double> x) {
  return {each_lane(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); }), exp(x * x * Vec<double>(-0.5))};
}
template <class T>
COBRA_INLINE Vec<T> gelu(Vec<T> x) { return x * normal(x).phi; }
// Phi(x) + x Phi'(x), Phi'(x) = e^(-x^2 / 2) / sqrt(2 pi).
template <class T>
COBRA_INLINE Vec<T> gelu_slope(Vec<T> x) {
  const Normal<T> n = normal(x);
  return fma(x * n.bell, Vec<T>(T(0.39894228040143267794)), n.phi);
}

// A value as it would come back from memory of that dtype.
template <class T>
COBRA_INLINE Vec<T> rounded(Vec<T> x, DType dtype) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::kBFloat16) {
      bf16 lanes[Vec<T>::kWidth];
      store(lanes, x);
      return load(lanes);
    }
    if (dtype == DType::kFloat16) {
      fp16 lanes[Vec<T>::kWidth];
      store(lanes, x);
      return load(lanes);
    }
  }
  return x;
}

// `columns` values in compute precision, staged: the tile is kColumns wide and zero beyond.
template <class T>
struct Columns {
  alignas(kVecBytes) T data[kColumns] = {};
};

}  // namespace
}  // namespace cobra::COBRA_LEVEL
