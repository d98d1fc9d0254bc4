// rms_norm on a CPU. One row at a time, staged through L1 in compute precision, so any dtype and stride costs one
// conversion; threads own rows in the forward and row blocks in the backward.
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

// f(vector sum over the row) in four independent chains, lanes and tail added in a fixed order.
template <class T, class F>
COBRA_INLINE T reduce_row(int64_t dim, F&& f) {
  constexpr int kWidth = Vec<T>::kWidth;
  Vec<T> sum[4] = {T(0), T(0), T(0), T(0)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= dim; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sum[k] += f(i + k * kWidth);
  for (; i + kWidth <= dim; i += kWidth) sum[0] += f(i);
  T total = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
  if (i < dim) total += f(i).sum();  // rows are padded with zeros to a whole vector (Row)
  return total;
}

// A row of `dim` channels in compute precision, zero-padded to whole vectors.
template <class T>
struct Row {
  explicit Row(int64_t dim) : storage((dim + Vec<T>::kWidth - 1) / Vec<T>::kWidth * Vec<T>::kWidth, T(0)) {}
  T* data() { return storage.data(); }
  int64_t padded() const { return int64_t(storage.size()); }
  std::vector<T> storage;
};

// The row's statistics: y_hat = (s - mean) * rstd. mean is 0 for RMSNorm.
template <class T>
struct RowStatistics { T mean, rstd; };

template <class T>
RowStatistics<T> row_statistics(Row<T>& row, int64_t dim, double eps, bool is_rms_norm) {
  T* const s = row.data();
  if (is_rms_norm) {
    const T square = reduce_row<T>(dim, [&](int64_t i) { const Vec<T> v = load(s + i); return v * v; });
    return {T(0), T(1) / std::sqrt(square / T(dim) + T(eps))};
  }
  const T mean = reduce_row<T>(dim, [&](int64_t i) { return load(s + i); }) / T(dim);
  std::fill(s + dim, s + row.padded(), mean);  // so that the padding adds nothing to the variance
  const T square = reduce_row<T>(dim, [&](int64_t i) { const Vec<T> v = load(s + i) - Vec<T>(mean); return v * v; });
  std::fill(s + dim, s + row.padded(), T(0));
  return {mean, T(1) / std::sqrt(square / T(dim) + T(eps))};
}

// s = x + residual, not rounded.
template <class T, class Params>
COBRA_INLINE void load_sum(const Params& p, int64_t row, T* s, T* scratch) {
  load_row(s, p.x, p.x_dtype, row_offset(p.shape, p.x_stride, row), p.x_stride.dim, p.dim);
  if (!p.residual) return;
  load_row(scratch, p.residual, p.residual_dtype, row_offset(p.shape, p.residual_stride, row), p.residual_stride.dim, p.dim);
  for (int64_t i = 0; i < p.dim; ++i) s[i] += scratch[i];
}

template <class T>
void fwd(const RmsNormFwdParams& p, const Parallel& parallel) {
  Row<T> weight(p.dim), bias(p.dim);
  load_row(weight.data(), p.weight, p.weight_dtype, 0, p.weight_stride, p.dim);
  if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, 0, p.bias_stride, p.dim);

  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.dim));
  parallel(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    Row<T> s(p.dim), y(p.dim);
    for (int64_t row = begin; row < end; ++row) {
      load_sum(p, row, s.data(), y.data());
      if (p.s) store_row(p.s, p.s_dtype, row_offset(p.shape, p.s_stride, row), p.s_stride.dim, s.data(), p.dim);
      const auto [mean, rstd] = row_statistics(s, p.dim, p.eps, p.is_rms_norm);
      for (int64_t i = 0; i < y.padded(); i += Vec<T>::kWidth) {
        const Vec<T> normal = (load(s.data() + i) - Vec<T>(mean)) * Vec<T>(rstd);
        store(y.data() + i, fma(normal, load(weight.data() + i), load(bias.data() + i)));
      }
      store_row(p.y, p.x_dtype, row_offset(p.shape, p.y_stride, row), p.y_stride.dim, y.data(), p.dim);
    }
  });
}

// With n = (s - mean) * rstd and g = dy * weight: ds += rstd * (g - [mean(g)] - n * mean(g n)); dweight += dy n; dbias += dy.
template <class T>
void bwd(const RmsNormBwdParams& p, const Parallel& parallel) {
  Row<T> weight(p.dim);
  load_row(weight.data(), p.weight, p.weight_dtype, 0, p.weight_stride, p.dim);
  T* const partial_dweight = static_cast<T*>(p.partial);                                                // (row_blocks, dim)
  T* const partial_dbias = p.dbias ? partial_dweight + p.row_blocks * p.dim : nullptr;                  // (row_blocks, dim)
  const int64_t rows_per_block = (p.rows + p.row_blocks - 1) / p.row_blocks;

  parallel(0, p.row_blocks, 1, [&](int64_t first_block, int64_t last_block) {
    Row<T> s(p.dim), dy(p.dim), ds(p.dim);
    for (int64_t block = first_block; block < last_block; ++block) {
      T* const dweight = partial_dweight + block * p.dim;
      T* const dbias = partial_dbias ? partial_dbias + block * p.dim : nullptr;
      std::fill_n(dweight, p.dim, T(0));
      if (dbias) std::fill_n(dbias, p.dim, T(0));
      for (int64_t row = block * rows_per_block; row < std::min(p.rows, (block + 1) * rows_per_block); ++row) {
        load_sum(p, row, s.data(), dy.data());
        load_row(dy.data(), p.dy, p.x_dtype, row_offset(p.shape, p.dy_stride, row), p.dy_stride.dim, p.dim);
        const auto [mean, rstd] = row_statistics(s, p.dim, p.eps, p.is_rms_norm);

        // From here `s` holds n.
        for (int64_t i = 0; i < p.dim; ++i) s.data()[i] = (s.data()[i] - mean) * rstd;
        const T mean_gn = reduce_row<T>(p.dim, [&](int64_t i) {
          return load(dy.data() + i) * load(weight.data() + i) * load(s.data() + i);
        }) / T(p.dim);
        const T mean_g = p.is_rms_norm ? T(0) : reduce_row<T>(p.dim, [&](int64_t i) {
          return load(dy.data() + i) * load(weight.data() + i);
        }) / T(p.dim);

        if (p.ds) {
          load_row(ds.data(), p.ds, p.ds_dtype, row_offset(p.shape, p.ds_stride, row), p.ds_stride.dim, p.dim);
        } else {
          std::fill_n(ds.data(), p.dim, T(0));
        }
        for (int64_t i = 0; i < p.dim; ++i) {
          const T g = dy.data()[i] * weight.data()[i], n = s.data()[i];
          dweight[i] += dy.data()[i] * n;
          if (dbias) dbias[i] += dy.data()[i];
          ds.data()[i] += rstd * (g - mean_g - n * mean_gn);
        }
        store_row(p.dx, p.x_dtype, row_offset(p.shape, p.dx_stride, row), p.dx_stride.dim, ds.data(), p.dim);
        if (p.dresidual)
          store_row(p.dresidual, p.residual_dtype, row_offset(p.shape, p.dresidual_stride, row), p.dresidual_stride.dim,
                    ds.data(), p.dim);
      }
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
