// rms_norm backward on a GPU, with the statistics recomputed. Stage 1: block b owns rows [b, b + 1) * rows_per_block; its
// groups (rms_norm_cuda.cuh) take every blockDim.y-th of them, each thread keeps the weight gradients of its channels.
// Stage 2 adds the blocks' gradients. Every sum has one order: the same bits on every run.
//
// With n = (s - mean) * rstd and g = dy * weight:  d(sum) = ds + rstd * (g - [mean(g)] - n * mean(g n));
// dx and dresidual are d(sum), dweight += dy n, dbias += dy. The mean(g) term is LayerNorm's.
#include "rms_norm/rms_norm_cuda.cuh"

namespace cobra {
namespace {

struct RowRange {
  int64_t begin, end;
};
__device__ __forceinline__ RowRange rows_of_block(const RmsNormBwdParams& p) {
  const int64_t each = (p.rows + p.row_blocks - 1) / p.row_blocks, begin = int64_t(blockIdx.x) * each, end = begin + each;
  return {begin, end < p.rows ? end : p.rows};
}

// Adds the groups' gradients in group order and writes the block's row of `partial`. All threads of the block call it.
template <int kWidth, int kItems>
__device__ __forceinline__ void store_block_gradient(const float (&gradient)[kItems], float* shared, float* partial, int64_t dim) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();  // `shared` may still be in use
#pragma unroll
  for (int i = 0; i < kItems; ++i) shared[i * threads + thread] = gradient[i];
  __syncthreads();
  for (int item = threadIdx.y; item < kItems; item += blockDim.y) {
    float sum = 0.f;
    for (int group = 0; group < int(blockDim.y); ++group) sum += shared[item * threads + group * blockDim.x + threadIdx.x];
    const int64_t channel = pack_channel<kWidth>(item / kWidth) + item % kWidth;
    if (channel < dim) partial[channel] = sum;
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kMaxRowThreads, 1) rms_norm_bwd_vector_kernel(const __grid_constant__ RmsNormBwdParams p) {
  constexpr int kWidth = 16 / sizeof(T);
  COBRA_SHARED(RowSum::Shared, shared);
  COBRA_SHARED(float[kItems * kMaxRowThreads], gradients);
  RowSum sum{shared};
  const float inverse_dim = 1.f / float(p.dim);
  const RowRange rows = rows_of_block(p);
  float dweight[kItems] = {}, dbias[kItems] = {};

  for (int64_t first = rows.begin; first < rows.end; first += blockDim.y) {
    // Groups past the last row go along with no channels: the barriers need the whole block.
    const bool active = first + threadIdx.y < rows.end;
    const int64_t row = active ? first + threadIdx.y : 0, dim = active ? p.dim : 0;

    float n[kItems], g[kItems];  // n holds s at first, g holds dy
    load_items<kWidth>(n, static_cast<const T*>(p.x) + row_offset(p.shape, p.x_stride, row), dim);
    load_items<kWidth>(g, static_cast<const T*>(p.dy) + row_offset(p.shape, p.dy_stride, row), dim);
    if (p.residual) {
      float residual[kItems];
      load_items<kWidth>(residual, p.residual, p.residual_dtype, row_offset(p.shape, p.residual_stride, row), dim);
#pragma unroll
      for (int i = 0; i < kItems; ++i) n[i] += residual[i];
    }
    const float rstd = center_and_rstd<kWidth>(n, dim, inverse_dim, float(p.eps), p.is_rms_norm, sum);

    float weight[kItems], gn = 0.f;
    load_items<kWidth>(weight, p.weight, p.weight_dtype, 0, dim);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      n[i] *= rstd;
      dweight[i] += g[i] * n[i];
      dbias[i] += g[i];
      g[i] *= weight[i];
      gn += g[i] * n[i];
    }
    const float mean_gn = sum(gn) * inverse_dim;
    float mean_g = 0.f;
    if (!p.is_rms_norm) {
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kItems; ++i) total += g[i];
      mean_g = sum(total) * inverse_dim;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) g[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
    if (p.ds) {
      float ds[kItems];
      load_items<kWidth>(ds, p.ds, p.ds_dtype, row_offset(p.shape, p.ds_stride, row), dim);
#pragma unroll
      for (int i = 0; i < kItems; ++i) g[i] += ds[i];
    }
    store_items<kWidth>(g, static_cast<T*>(p.dx) + row_offset(p.shape, p.dx_stride, row), dim);
    if (p.dresidual) store_items<kWidth>(g, p.dresidual, p.residual_dtype, row_offset(p.shape, p.dresidual_stride, row), dim);
  }

  float* const partial = static_cast<float*>(p.partial) + int64_t(blockIdx.x) * p.dim;
  store_block_gradient<kWidth>(dweight, gradients, partial, p.dim);
  if (p.dbias) store_block_gradient<kWidth>(dbias, gradients, partial + p.row_blocks * p.dim, p.dim);
}

// One group per block. A thread meets the same channels in every row, so it alone adds to their place in `partial`.
__global__ void __launch_bounds__(kMaxRowThreads, 1) rms_norm_bwd_strided_kernel(const __grid_constant__ RmsNormBwdParams p) {
  COBRA_SHARED(RowSum::Shared, shared);
  RowSum sum{shared};
  const float inverse_dim = 1.f / float(p.dim);
  const RowRange rows = rows_of_block(p);
  float* const dweight = static_cast<float*>(p.partial) + int64_t(blockIdx.x) * p.dim;
  float* const dbias = dweight + p.row_blocks * p.dim;
  for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
    dweight[i] = 0.f;
    if (p.dbias) dbias[i] = 0.f;
  }

  const RowView weight = {p.weight, p.weight_dtype, 0, p.weight_stride};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowInput s = row_input(p, row);
    const RowView dy = row_view(p.dy, p.x_dtype, p.shape, p.dy_stride, row);
    const RowView ds = row_view(p.ds, p.ds_dtype, p.shape, p.ds_stride, row);
    const RowView dx = row_view(p.dx, p.x_dtype, p.shape, p.dx_stride, row);
    const RowView dresidual = row_view(p.dresidual, p.residual_dtype, p.shape, p.dresidual_stride, row);
    const auto [mean, rstd] = row_statistics(s, p.dim, inverse_dim, float(p.eps), p.is_rms_norm, sum);

    float gn = 0.f, g_total = 0.f;
    for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
      const float n = (s[i] - mean) * rstd, d = dy[i], g = d * weight[i];
      dweight[i] += d * n;
      if (p.dbias) dbias[i] += d;
      gn += g * n;
      g_total += g;
    }
    const float mean_gn = sum(gn) * inverse_dim, mean_g = p.is_rms_norm ? 0.f : sum(g_total) * inverse_dim;
    for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
      const float n = (s[i] - mean) * rstd;
      const float d_sum = rstd * (dy[i] * weight[i] - mean_g - n * mean_gn) + (p.ds ? ds[i] : 0.f);
      dx.store(i, d_sum);
      if (p.dresidual) dresidual.store(i, d_sum);
    }
  }
}

// Stage 2. A block owns kColumns channels of dweight (blockIdx.y = 0) or dbias (1): kSegments threads each add a run of row blocks.
constexpr int kColumns = 32, kSegments = 8;

__global__ void __launch_bounds__(kColumns* kSegments) rms_norm_bwd_reduce_kernel(const __grid_constant__ RmsNormBwdParams p) {
  COBRA_SHARED(float[kSegments][kColumns], sums);
  const float* const partial = static_cast<const float*>(p.partial) + int64_t(blockIdx.y) * p.row_blocks * p.dim;
  const int64_t each = (p.row_blocks + kSegments - 1) / kSegments;
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < p.dim; first += int64_t(gridDim.x) * kColumns) {
    const int64_t channel = first + threadIdx.x, begin = threadIdx.y * each;
    float sum = 0.f;
    if (channel < p.dim) {
#pragma unroll 8
      for (int64_t block = begin; block < begin + each; ++block)
        if (block < p.row_blocks) sum += partial[block * p.dim + channel];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < p.dim) {
      float total = 0.f;
      for (int segment = 0; segment < kSegments; ++segment) total += sums[segment][threadIdx.x];
      if (blockIdx.y == 0)
        store_float(p.dweight, p.weight_dtype, channel, total);
      else
        store_float(p.dbias, p.bias_dtype, channel, total);
    }
    __syncthreads();  // before the next round overwrites `sums`
  }
}

bool rows_fit_vectors(const RmsNormBwdParams& p) {
  const int width = int(16 / size_of(p.x_dtype));
  const auto packed = [&](const void* base, DType dtype, const RowStride& stride) { return rows_are_packed(base, dtype, p.shape, stride, width); };
  return p.dim % width == 0 && p.dim <= int64_t(16) * kMaxRowThreads && packed(p.x, p.x_dtype, p.x_stride) &&
         packed(p.residual, p.residual_dtype, p.residual_stride) && packed(p.dy, p.x_dtype, p.dy_stride) &&
         packed(p.ds, p.ds_dtype, p.ds_stride) && packed(p.dx, p.x_dtype, p.dx_stride) &&
         packed(p.dresidual, p.residual_dtype, p.dresidual_stride) && vector_is_packed(p.weight, p.weight_dtype, p.weight_stride, width);
}

int launch_stage1(const RmsNormBwdParams& p, void* stream) {
  const dim3 grid(unsigned(p.row_blocks));
  if (!rows_fit_vectors(p)) return launch(&rms_norm_bwd_strided_kernel, grid, dim3(row_threads(p.dim, 4, kMaxRowThreads)), 0, stream, p);
  return pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    const int items = p.dim <= 256 ? 8 : 16, threads = row_threads(p.dim, items, kMaxRowThreads);
    const dim3 block(threads, kMaxRowThreads / threads);
    return launch(items == 8 ? &rms_norm_bwd_vector_kernel<T, 8> : &rms_norm_bwd_vector_kernel<T, 16>, grid, block, 0, stream, p);
  });
}

}  // namespace

int rms_norm_bwd_cuda(const RmsNormBwdParams& p, void* stream) {
  if (p.dim == 0) return 0;
  if (const int error = launch_stage1(p, stream)) return error;
  const int64_t blocks = (p.dim + kColumns - 1) / kColumns, most = max_grid_x();
  const dim3 grid(unsigned(blocks < most ? blocks : most), p.dbias ? 2 : 1);
  return launch(&rms_norm_bwd_reduce_kernel, grid, dim3(kColumns, kSegments), 0, stream, p);
}

}  // namespace cobra
