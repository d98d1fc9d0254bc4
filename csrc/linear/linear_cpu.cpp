// few_rows_linear on a CPU. A thread owns neighbouring rows of the weight and reads each once, from its first byte to its last: one
// stream of memory per core. The rows of x lie beside it in fp32, in the cache. Sums are fp32, rounded once.
#include "common/cpu_level.h"
#include "common/vec.h"
#include "linear/linear.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace cobra {
COBRA_DECLARE_LEVELS(few_rows_linear, FewRowsLinearParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

using Lanes = Vec<float>;
constexpr int kVectors = 2;                          // sums per row of x: enough to hide the latency of an addition behind memory
constexpr int64_t kStep = kVectors * Lanes::kWidth;  // columns at a time
constexpr int kGroup = 4;                            // rows of x that share a read of the weight: 8 sums fit the 16 registers of AVX2
constexpr int64_t kTile = Lanes::kWidth;             // rows of the weight whose sums over lanes are made together
constexpr int64_t kBytesPerThread = 64 << 10;        // of the weight; less is not worth waking a thread

// One row of the weight times kRows rows of x, which lie `pitch` apart and end in zeros; row r's sum is that of the lanes of
// sums[r * kTile]. Its order does not depend on kRows.
template <int kRows, class S>
COBRA_INLINE void dots(const S* weight, const S* tail, const float* x, int64_t pitch, int64_t in, Lanes* sums) {
  Lanes sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = 0.f;
  const auto add = [&](const S* w, const float* at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Lanes values = load(w + v * Lanes::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(values, load(at + r * pitch + v * Lanes::kWidth), sum[r][v]);
    }
  };
  int64_t column = 0;
  for (; column + kStep <= in; column += kStep) add(weight + column, x + column);
  if (column < in) add(tail, x + column);
  for (int r = 0; r < kRows; ++r) sums[r * kTile] = sum[r][0] + sum[r][1];
}

template <class S>
struct Product {
  const FewRowsLinearParams& p;
  const float* x;  // (rows, pitch), the columns beyond `in` zero
  int64_t pitch;

  // kRows rows of y from `row` on, the `count` <= kTile columns of it from `o` on.
  template <int kRows>
  void tile(int64_t row, int64_t o, int64_t count) const {
    const int64_t whole = p.in / kStep * kStep;
    Lanes sums[kRows][kTile];
    S tail[kStep] = {};  // the last columns, where a whole vector would reach beyond the row
    for (int64_t i = 0; i < count; ++i) {
      const S* const weight = static_cast<const S*>(p.weight) + (o + i) * p.weight_row_stride;
      std::copy(weight + whole, weight + p.in, tail);
      dots<kRows>(weight, tail, x + row * pitch, pitch, p.in, &sums[0][i]);
    }
    alignas(kVecBytes) float bias[kTile] = {}, y[kTile];
    if (p.bias) load_row(bias, p.bias, p.bias_dtype, o * p.bias_stride, p.bias_stride, count);
    for (int r = 0; r < kRows; ++r) {
      for (int64_t i = count; i < kTile; ++i) sums[r][i] = 0.f;
      store(y, sum_each(sums[r]) + load(bias));
      store_row(p.y, p.x_dtype, (row + r) * p.out + o, 1, y, count);
    }
  }

  template <int... kRows>
  void tile(int rows, int64_t row, int64_t o, int64_t count, std::integer_sequence<int, kRows...>) const {
    ((rows == kRows + 1 ? tile<kRows + 1>(row, o, count) : void()), ...);
  }

  void operator()(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t row = 0; row < p.rows; row += kGroup)
        tile(int(std::min<int64_t>(kGroup, p.rows - row)), row, t * kTile, std::min(kTile, p.out - t * kTile), std::make_integer_sequence<int, kGroup>());
  }
};

template <class S>
void product(const FewRowsLinearParams& p, const Parallel& parallel) {
  const int64_t pitch = (p.in + kStep - 1) / kStep * kStep, tile_bytes = std::max<int64_t>(1, kTile * p.in * int64_t(sizeof(S)));
  std::vector<float> x(p.rows * pitch, 0.f);
  for (int64_t r = 0; r < p.rows; ++r) load_row(x.data() + r * pitch, p.x, p.x_dtype, r * p.x_row_stride, p.x_stride, p.in);
  parallel(0, (p.out + kTile - 1) / kTile, std::max<int64_t>(1, kBytesPerThread / tile_bytes), Product<S>{p, x.data(), pitch});
}

}  // namespace

void few_rows_linear(const FewRowsLinearParams& p, const Parallel& parallel) {
  switch (p.weight_dtype) {
    case DType::kBFloat16: return product<bf16>(p, parallel);
    case DType::kFloat16: return product<fp16>(p, parallel);
    default: return product<float>(p, parallel);
  }
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launcher, once
namespace cobra {

void few_rows_linear_cpu(const FewRowsLinearParams& p, const Parallel& parallel) { COBRA_AT_LEVEL(few_rows_linear)(p, parallel); }

}  // namespace cobra
#endif
