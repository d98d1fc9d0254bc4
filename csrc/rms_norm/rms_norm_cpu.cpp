// rms_norm on a CPU, one row at a time: the pass that reads it from memory stages s = x + residual in L1, in compute precision, and
// adds up the statistics; the next pass writes the result. Threads own rows in the forward and row blocks in the backward.
#include "common/cpu_level.h"
#include "common/vec.h"
#include "rms_norm/rms_norm.h"

#include <algorithm>
#include <vector>

namespace cobra {
COBRA_DECLARE_LEVELS(rms_norm_fwd, RmsNormFwdParams)
COBRA_DECLARE_LEVELS(rms_norm_bwd, RmsNormBwdParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

// The sum of f over the row's vectors in four independent chains, lanes and tail added in a fixed order. The tail, which must
// not read beyond the row, is tail(i, n): n channels from i on, zeros behind them.
template <class T, class F, class Tail>
COBRA_INLINE T reduce_row(int64_t dim, F&& f, Tail&& tail) {
  constexpr int kWidth = Vec<T>::kWidth;
  Vec<T> sum[4] = {T(0), T(0), T(0), T(0)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= dim; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sum[k] += f(i + k * kWidth);
  for (; i + kWidth <= dim; i += kWidth) sum[0] += f(i);
  T total = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
  if (i < dim) total += tail(i, dim - i).sum();
  return total;
}
// The same over rows that are padded with zeros to a whole vector (Row).
template <class T, class F>
COBRA_INLINE T reduce_row(int64_t dim, F&& f) {
  return reduce_row<T>(dim, f, [&](int64_t i, int64_t) { return f(i); });
}

// A row of `dim` channels in compute precision, zero-padded to whole vectors.
template <class T>
struct Row {
  explicit Row(int64_t dim) : storage((dim + Vec<T>::kWidth - 1) / Vec<T>::kWidth * Vec<T>::kWidth, T(0)) {}
  T* data() { return storage.data(); }
  int64_t padded() const { return int64_t(storage.size()); }
  std::vector<T> storage;
};

template <class T>
struct RowStatistics { T mean, rstd; };

// s = x + residual, not rounded, staged and padded with zeros; returns the sum of f(s) over the row. r may be null.
template <class T, class S, class F>
COBRA_INLINE T stage_sum(const S* x, const T* r, T* s, int64_t dim, F&& f) {
  const auto keep = [&](int64_t i, Vec<T> v) { store(s + i, v); return f(v); };
  if (!r) return reduce_row<T>(dim, [&](int64_t i) { return keep(i, load(x + i)); }, [&](int64_t i, int64_t n) { return keep(i, load_n(x + i, n)); });
  return reduce_row<T>(dim, [&](int64_t i) { return keep(i, load(x + i) + load(r + i)); },
                       [&](int64_t i, int64_t n) { return keep(i, load_n(x + i, n) + load_n(r + i, n)); });
}

// A row in compute precision: where it lies, or converted into `staged` if that is another dtype or strided.
template <class T>
COBRA_INLINE const T* compute_row(const void* src, DType dtype, int64_t offset, int64_t stride, T* staged, int64_t dim) {
  constexpr DType kCompute = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  if (dtype == kCompute && stride == 1) return static_cast<const T*>(src) + offset;
  load_row(staged, src, dtype, offset, stride, dim);
  return staged;
}

// Stages the row's sum in s and returns its statistics: y_hat = (s - mean) * rstd, mean 0 for RMSNorm. T is the compute type.
template <class T, class Params>
RowStatistics<T> stage_row(const Params& p, int64_t row, Row<T>& staged, Row<T>& scratch) {
  T* const s = staged.data();
  const T* r = nullptr;
  if (p.residual) r = compute_row(p.residual, p.residual_dtype, row_offset(p.shape, p.residual_stride, row), p.residual_stride.dim, scratch.data(), p.dim);
  const int64_t offset = row_offset(p.shape, p.x_stride, row);
  const auto reduce = [&](auto&& f) {
    if constexpr (std::is_same_v<T, float>) {
      if (p.x_stride.dim == 1 && p.x_dtype == DType::kBFloat16) return stage_sum<T>(static_cast<const bf16*>(p.x) + offset, r, s, p.dim, f);
      if (p.x_stride.dim == 1 && p.x_dtype == DType::kFloat16) return stage_sum<T>(static_cast<const fp16*>(p.x) + offset, r, s, p.dim, f);
    }
    return stage_sum<T>(compute_row(p.x, p.x_dtype, offset, p.x_stride.dim, s, p.dim), r, s, p.dim, f);
  };
  if (p.is_rms_norm) return {T(0), T(1) / std::sqrt(reduce([](Vec<T> v) { return v * v; }) / T(p.dim) + T(p.eps))};
  const T mean = reduce([](Vec<T> v) { return v; }) / T(p.dim);
  std::fill(s + p.dim, s + staged.padded(), mean);  // so that the padding adds nothing to the variance
  const T square = reduce_row<T>(p.dim, [&](int64_t i) { const Vec<T> v = load(s + i) - Vec<T>(mean); return v * v; });
  std::fill(s + p.dim, s + staged.padded(), T(0));
  return {mean, T(1) / std::sqrt(square / T(p.dim) + T(p.eps))};
}

// Writes f(i), the vector of channels from i on, to a row of any dtype and stride; `scratch` is used where it is strided.
template <class T, class F>
COBRA_INLINE void write_row(void* dst, DType dtype, int64_t offset, int64_t stride, T* scratch, int64_t dim, F&& f) {
  const auto write = [&](auto* out) {
    int64_t i = 0;
    for (; i + Vec<T>::kWidth <= dim; i += Vec<T>::kWidth) store(out + i, f(i));
    if (i < dim) store_n(out + i, f(i), dim - i);
  };
  if (stride != 1) {
    write(scratch);
    return store_row(dst, dtype, offset, stride, scratch, dim);
  }
  if constexpr (std::is_same_v<T, double>) {
    write(static_cast<double*>(dst) + offset);
  } else {
    switch (dtype) {
      case DType::kBFloat16: return write(static_cast<bf16*>(dst) + offset);
      case DType::kFloat16: return write(static_cast<fp16*>(dst) + offset);
      default: return write(static_cast<float*>(dst) + offset);
    }
  }
}

template <class T>
void fwd(const RmsNormFwdParams& p, const Parallel& parallel) {
  Row<T> weight(p.dim), bias(p.dim);
  load_row(weight.data(), p.weight, p.weight_dtype, 0, p.weight_stride, p.dim);
  if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, 0, p.bias_stride, p.dim);

  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.dim));
  parallel(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    Row<T> s(p.dim), scratch(p.dim);
    for (int64_t row = begin; row < end; ++row) {
      const auto [mean, rstd] = stage_row(p, row, s, scratch);
      if (p.s) store_row(p.s, p.s_dtype, row_offset(p.shape, p.s_stride, row), p.s_stride.dim, s.data(), p.dim);
      const Vec<T> m = mean, r = rstd;
      write_row(p.y, p.x_dtype, row_offset(p.shape, p.y_stride, row), p.y_stride.dim, scratch.data(), p.dim, [&](int64_t i) {
        return fma((load(s.data() + i) - m) * r, load(weight.data() + i), load(bias.data() + i));
      });
    }
  });
}

// With n = (s - mean) * rstd and g = dy * weight: ds += rstd * (g - [mean(g)] - n * mean(g n)); dweight += dy n; dbias += dy.
template <class T>
void bwd(const RmsNormBwdParams& p, const Parallel& parallel) {
  constexpr int kWidth = Vec<T>::kWidth;
  Row<T> weight(p.dim), zeros(p.ds ? 0 : p.dim);
  // A row that vectors may run over to the end of its padding: in place only if it has none.
  const auto whole_vectors = [&](const void* src, DType dtype, const RowStride& stride, int64_t row, T* staged) -> const T* {
    const int64_t offset = row_offset(p.shape, stride, row);
    if (p.dim % kWidth == 0) return compute_row(src, dtype, offset, stride.dim, staged, p.dim);
    load_row(staged, src, dtype, offset, stride.dim, p.dim);
    return staged;
  };
  load_row(weight.data(), p.weight, p.weight_dtype, 0, p.weight_stride, p.dim);
  T* const partial_dweight = static_cast<T*>(p.partial);                                                // (row_blocks, dim)
  T* const partial_dbias = p.dbias ? partial_dweight + p.row_blocks * p.dim : nullptr;                  // (row_blocks, dim)
  const int64_t rows_per_block = (p.rows + p.row_blocks - 1) / p.row_blocks;

  parallel(0, p.row_blocks, 1, [&](int64_t first_block, int64_t last_block) {
    Row<T> s(p.dim), scratch(p.dim), d_sum(p.dim);
    for (int64_t block = first_block; block < last_block; ++block) {
      Row<T> dweight(p.dim), dbias(p.dim);
      for (int64_t row = block * rows_per_block; row < std::min(p.rows, (block + 1) * rows_per_block); ++row) {
        const auto [mean, rstd] = stage_row(p, row, s, scratch);
        const T* const dy = whole_vectors(p.dy, p.x_dtype, p.dy_stride, row, scratch.data());
        const T* const ds = p.ds ? whole_vectors(p.ds, p.ds_dtype, p.ds_stride, row, d_sum.data()) : zeros.data();

        const Vec<T> m = mean, r = rstd;
        const auto g = [&](int64_t i) { return load(dy + i) * load(weight.data() + i); };  // 0 in the padding, as dy is
        const Vec<T> mean_gn = reduce_row<T>(p.dim, [&](int64_t i) {
          const Vec<T> n = (load(s.data() + i) - m) * r;
          store(s.data() + i, n);  // from here on s holds n
          return g(i) * n;
        }) / T(p.dim);
        const Vec<T> mean_g = p.is_rms_norm ? T(0) : reduce_row<T>(p.dim, g) / T(p.dim);
        for (int64_t i = 0; i < s.padded(); i += kWidth) {
          const Vec<T> n = load(s.data() + i), d = load(dy + i);
          store(dweight.data() + i, fma(d, n, load(dweight.data() + i)));
          store(dbias.data() + i, load(dbias.data() + i) + d);
          store(d_sum.data() + i, fma(r, g(i) - mean_g - n * mean_gn, load(ds + i)));
        }
        store_row(p.dx, p.x_dtype, row_offset(p.shape, p.dx_stride, row), p.dx_stride.dim, d_sum.data(), p.dim);
        if (p.dresidual)
          store_row(p.dresidual, p.residual_dtype, row_offset(p.shape, p.dresidual_stride, row), p.dresidual_stride.dim,
                    d_sum.data(), p.dim);
      }
      std::copy_n(dweight.data(), p.dim, partial_dweight + block * p.dim);
      if (partial_dbias) std::copy_n(dbias.data(), p.dim, partial_dbias + block * p.dim);
    }
  });

  // Blocks are added in order, so the bits do not depend on the threads.
  parallel(0, p.dim, 1024, [&](int64_t begin, int64_t end) {
    std::vector<T> sum(end - begin);
    const auto reduce = [&](const T* partial, void* out, DType dtype) {
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t block = 0; block < p.row_blocks; ++block)
        for (int64_t i = begin; i < end; ++i) sum[i - begin] += partial[block * p.dim + i];
      store_row(out, dtype, begin, 1, sum.data(), end - begin);
    };
    reduce(partial_dweight, p.dweight, p.weight_dtype);
    if (p.dbias) reduce(partial_dbias, p.dbias, p.bias_dtype);
  });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.x_dtype == DType::kFloat64) return fwd<double>(p, parallel);
#endif
  fwd<float>(p, parallel);
}

void rms_norm_bwd(const RmsNormBwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.x_dtype == DType::kFloat64) return bwd<double>(p, parallel);
#endif
  bwd<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launchers, once: fp64 runs at the scalar level
namespace cobra {

void rms_norm_fwd_cpu(const RmsNormFwdParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::rms_norm_fwd(p, parallel) : COBRA_AT_LEVEL(rms_norm_fwd)(p, parallel);
}
void rms_norm_bwd_cpu(const RmsNormBwdParams& p, const Parallel& parallel) {
  p.x_dtype == DType::kFloat64 ? scalar::rms_norm_bwd(p, parallel) : COBRA_AT_LEVEL(rms_norm_bwd)(p, parallel);
}

}  // namespace cobra
#endif
