// rms_norm forward on a GPU. A group of threads owns a row at a time (rms_norm_cuda.cuh); blocks take rows in grid order.
#include "rms_norm/rms_norm_cuda.cuh"

namespace cobra {
namespace {

constexpr int kBlockThreads = 128;  // of blocks that hold several short rows
// At most 80 registers where 16 channels per thread are enough, so that three blocks fit a multiprocessor and hide each other's latency.
constexpr int most_threads(int items) { return items <= 16 ? 256 : kMaxRowThreads; }

template <class T, int kItems>
__global__ void __launch_bounds__(most_threads(kItems), kItems <= 16 ? 3 : 1) rms_norm_fwd_vector_kernel(const __grid_constant__ RmsNormFwdParams p) {
  constexpr int kWidth = 16 / sizeof(T);
  COBRA_SHARED(RowSum::Shared, shared);
  RowSum sum{shared};
  const float inverse_dim = 1.f / float(p.dim);

  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < p.rows; first += int64_t(gridDim.x) * blockDim.y) {
    // Groups past the last row go along with no channels: the barriers need the whole block.
    const bool active = first + threadIdx.y < p.rows;
    const int64_t row = active ? first + threadIdx.y : 0, dim = active ? p.dim : 0;

    float s[kItems];
    load_items<kWidth>(s, static_cast<const T*>(p.x) + row_offset(p.shape, p.x_stride, row), dim);
    if (p.residual) {
      float residual[kItems];
      load_items<kWidth>(residual, p.residual, p.residual_dtype, row_offset(p.shape, p.residual_stride, row), dim);
#pragma unroll
      for (int i = 0; i < kItems; ++i) s[i] += residual[i];
    }
    if (p.s) store_items<kWidth>(s, p.s, p.s_dtype, row_offset(p.shape, p.s_stride, row), dim);

    const float rstd = center_and_rstd<kWidth>(s, dim, inverse_dim, float(p.eps), p.is_rms_norm, sum);
    float weight[kItems];
    load_items<kWidth>(weight, p.weight, p.weight_dtype, 0, dim);
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] *= rstd * weight[i];
    if (p.bias) {
      float bias[kItems];
      load_items<kWidth>(bias, p.bias, p.bias_dtype, 0, dim);
#pragma unroll
      for (int i = 0; i < kItems; ++i) s[i] += bias[i];
    }
    store_items<kWidth>(s, static_cast<T*>(p.y) + row_offset(p.shape, p.y_stride, row), dim);
  }
}

__global__ void __launch_bounds__(256, 3) rms_norm_fwd_strided_kernel(const __grid_constant__ RmsNormFwdParams p) {
  COBRA_SHARED(RowSum::Shared, shared);
  RowSum sum{shared};
  const float inverse_dim = 1.f / float(p.dim);

  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < p.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const bool active = first + threadIdx.y < p.rows;
    const int64_t row = active ? first + threadIdx.y : 0, dim = active ? p.dim : 0;

    const RowInput s = row_input(p, row);
    const RowView y = row_view(p.y, p.x_dtype, p.shape, p.y_stride, row);
    const RowView s_out = row_view(p.s, p.s_dtype, p.shape, p.s_stride, row);
    const RowView weight = {p.weight, p.weight_dtype, 0, p.weight_stride}, bias = {p.bias, p.bias_dtype, 0, p.bias_stride};

    const RowStatistics statistics = row_statistics(s, dim, inverse_dim, float(p.eps), p.is_rms_norm, sum);
    for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
      const float v = s[i];
      if (p.s) s_out.store(i, v);
      const float scaled = (v - statistics.mean) * (statistics.rstd * weight[i]);
      y.store(i, p.bias ? scaled + bias[i] : scaled);
    }
  }
}

bool rows_fit_vectors(const RmsNormFwdParams& p) {
  const int width = int(16 / size_of(p.x_dtype));
  return p.dim % width == 0 && p.dim <= int64_t(32) * kMaxRowThreads && rows_are_packed(p.x, p.x_dtype, p.shape, p.x_stride, width) &&
         rows_are_packed(p.residual, p.residual_dtype, p.shape, p.residual_stride, width) &&
         rows_are_packed(p.y, p.x_dtype, p.shape, p.y_stride, width) && rows_are_packed(p.s, p.s_dtype, p.shape, p.s_stride, width) &&
         vector_is_packed(p.weight, p.weight_dtype, p.weight_stride, width) &&
         vector_is_packed(p.bias, p.bias_dtype, p.bias_stride, width);
}

int launch_rows(void (*kernel)(RmsNormFwdParams), const RmsNormFwdParams& p, int threads, void* stream) {
  const int groups = threads < kBlockThreads ? kBlockThreads / threads : 1;
  const int64_t blocks = (p.rows + groups - 1) / groups, most = max_grid_x();
  return launch(kernel, dim3(unsigned(blocks < most ? blocks : most)), dim3(threads, groups), 0, stream, p);
}

}  // namespace

int rms_norm_fwd_cuda(const RmsNormFwdParams& p, void* stream) {
  if (p.rows == 0 || p.dim == 0) return 0;
  if (!rows_fit_vectors(p)) return launch_rows(&rms_norm_fwd_strided_kernel, p, row_threads(p.dim, 4, 256), stream);
  return pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    // A warp per row up to 1024 channels, no barrier; then 16 channels per thread; 32 when that needs more than 256 threads.
    if (p.dim <= 256) return launch_rows(&rms_norm_fwd_vector_kernel<T, 8>, p, kWarp, stream);
    if (p.dim <= 512) return launch_rows(&rms_norm_fwd_vector_kernel<T, 16>, p, kWarp, stream);
    if (p.dim <= 1024) return launch_rows(&rms_norm_fwd_vector_kernel<T, 32>, p, kWarp, stream);
    if (p.dim <= 4096) return launch_rows(&rms_norm_fwd_vector_kernel<T, 16>, p, row_threads(p.dim, 16, most_threads(16)), stream);
    return launch_rows(&rms_norm_fwd_vector_kernel<T, 32>, p, row_threads(p.dim, 32, kMaxRowThreads), stream);
  });
}

}  // namespace cobra
