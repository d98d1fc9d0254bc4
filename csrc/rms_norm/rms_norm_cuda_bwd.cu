// rms_norm backward on a GPU, with the statistics recomputed. Stage 1: block b owns rows [b, b + 1) * rows_per_block; its
// groups (rms_norm_cuda.cuh) take every blockDim.y-th of them, each thread keeps the weight gradients of its channels.
// Stage 2 adds the blocks' gradients. Every sum has one order: the same bits on every run.
//
// With n = (s - mean) * rstd and g = dy * weight:  d(sum) = ds + rstd * (g - [mean(g)] - n * mean(g n));
// dx and dresidual are d(sum), dweight += dy n, dbias += dy. The mean(g) term is LayerNorm's.
#include "rms_norm/rms_norm_cuda.cuh"

namespace cobra {
namespace {

constexpr int kGroupThreads = 128;  // of blocks that hold several groups, each a warp
// Channels a thread, and the threads that still have registers for them. 16 channels of fp32 x, residual, dy and ds at once would spill.
template <class T> constexpr int kMostItems = sizeof(T) == 2 ? 16 : 8;
constexpr int most_threads(int items) { return items == 16 ? 512 : 640; }

struct RowRange {
  int64_t begin;
  int count;
};
__device__ __forceinline__ RowRange rows_of_block(const RmsNormBwdParams& p) {
  const int64_t each = (p.rows + p.row_blocks - 1) / p.row_blocks, begin = int64_t(blockIdx.x) * each, left = p.rows - begin;
  return {begin, left < 0 ? 0 : int(left < each ? left : each)};
}

// Writes the block's row of `partial`, its groups' gradients added in group order. All threads of the block call it.
template <int kWidth, class R, int kItems>
__device__ __forceinline__ void store_block_gradient(const R (&gradient)[kItems], R* shared, R* partial, int dim) {
  if (blockDim.y == 1) return store_items<kWidth>(gradient, partial, dim);
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();  // `shared` may still be in use
#pragma unroll
  for (int i = 0; i < kItems; ++i) shared[i * threads + thread] = gradient[i];
  __syncthreads();
  for (int item = threadIdx.y; item < kItems; item += blockDim.y) {
    R sum = R(0);
    for (int group = 0; group < int(blockDim.y); ++group) sum += shared[item * threads + group * blockDim.x + threadIdx.x];
    const int channel = pack_channel<kWidth>(item / kWidth) + item % kWidth;
    if (channel < dim) partial[channel] = sum;
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(most_threads(kItems), 1) rms_norm_bwd_vector_kernel(const __grid_constant__ RmsNormBwdParams p) {
  constexpr int kWidth = 16 / sizeof(T);
  using R = Real<T>;
  COBRA_SHARED(typename RowSum<R>::Shared, shared);
  COBRA_DYNAMIC_SHARED(R, held);  // kItems per thread: its weights, at the end its gradients
  RowSum<R> sum{shared};
  const R inverse_dim = R(1) / R(p.dim);
  const RowRange rows = rows_of_block(p);
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  const auto held_at = [&](int i) { return (i / 4 * threads + thread) * 4 + i % 4; };  // by fours, neighbour after neighbour
  RawItems<kWidth, kItems, R> weight;
  weight.load(p.weight, p.weight_dtype, 0, int(p.dim));
  weight.for_values(p.weight_dtype, [&](int i, R v) { held[held_at(i)] = v; });
  R dweight[kItems] = {}, dbias[kItems] = {};

#pragma unroll 1
  for (int first = 0; first < rows.count; first += blockDim.y) {
    // Groups past the last row go along with no channels: the barriers need the whole block.
    const bool active = first + int(threadIdx.y) < rows.count;
    const int64_t row = active ? rows.begin + first + threadIdx.y : 0;
    const int dim = active ? int(p.dim) : 0;
    const auto [x_at, residual_at, dy_at, ds_at] = row_offsets(p.shape, row, p.x_stride, p.residual_stride, p.dy_stride, p.ds_stride).of;

    RawItems<kWidth, kItems, R> x, residual, dy, ds;
    x.load(static_cast<const T*>(p.x) + x_at, dim);
    if (p.residual) residual.load(p.residual, p.residual_dtype, residual_at, dim);
    dy.load(static_cast<const T*>(p.dy) + dy_at, dim);
    if (p.ds) ds.load(p.ds, p.ds_dtype, ds_at, dim);

    R n[kItems], g[kItems], gn = R(0);  // n holds s at first
    add_residual<T>(n, x, residual, p.residual, p.residual_dtype);
    const R rstd = center_and_rstd<kWidth>(n, dim, inverse_dim, R(p.eps), p.is_rms_norm, sum);
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
      const auto w = load_pack<R, 4>(held + held_at(i));
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        const R d = dy.template value<T>(j);
        n[j] *= rstd;
        dweight[j] += d * n[j];
        dbias[j] += d;
        g[j] = d * w.v[j - i];
        gn += g[j] * n[j];
      }
    }
    const R mean_gn = sum(gn) * inverse_dim;
    R mean_g = R(0);
    if (!p.is_rms_norm) {
      R total = R(0);
#pragma unroll
      for (int i = 0; i < kItems; ++i) total += g[i];
      mean_g = sum(total) * inverse_dim;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) g[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
    if (p.ds) ds.for_values(p.ds_dtype, [&](int i, R v) { g[i] += v; });
    const auto [dx_at, dresidual_at] = row_offsets(p.shape, row, p.dx_stride, p.dresidual_stride).of;
    store_items<kWidth>(g, static_cast<T*>(p.dx) + dx_at, dim);
    if (p.dresidual) store_items<kWidth>(g, p.dresidual, p.residual_dtype, dresidual_at, dim);
  }

  R* const partial = static_cast<R*>(p.partial) + int64_t(blockIdx.x) * p.dim;
  store_block_gradient<kWidth>(dweight, held, partial, int(p.dim));
  if (p.dbias) store_block_gradient<kWidth>(dbias, held, partial + p.row_blocks * p.dim, int(p.dim));
}

// One group per block. A thread meets the same channels in every row, so it alone adds to their place in `partial`.
template <class R>
__global__ void __launch_bounds__(512, 1) rms_norm_bwd_strided_kernel(const __grid_constant__ RmsNormBwdParams p) {
  COBRA_SHARED(typename RowSum<R>::Shared, shared);
  RowSum<R> sum{shared};
  const R inverse_dim = R(1) / R(p.dim);
  const RowRange rows = rows_of_block(p);
  R* const dweight = static_cast<R*>(p.partial) + int64_t(blockIdx.x) * p.dim;
  R* const dbias = dweight + p.row_blocks * p.dim;
  for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
    dweight[i] = R(0);
    if (p.dbias) dbias[i] = R(0);
  }

  const RowView<R> weight = {p.weight, p.weight_dtype, 0, p.weight_stride};
  for (int64_t row = rows.begin; row < rows.begin + rows.count; ++row) {
    const auto s = row_input<R>(p, row);
    const auto dy = row_view<R>(p.dy, p.x_dtype, p.shape, p.dy_stride, row);
    const auto ds = row_view<R>(p.ds, p.ds_dtype, p.shape, p.ds_stride, row);
    const auto dx = row_view<R>(p.dx, p.x_dtype, p.shape, p.dx_stride, row);
    const auto dresidual = row_view<R>(p.dresidual, p.residual_dtype, p.shape, p.dresidual_stride, row);
    const auto [mean, rstd] = row_statistics(s, p.dim, inverse_dim, R(p.eps), p.is_rms_norm, sum);

    R gn = R(0), g_total = R(0);
    for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
      const R n = (s[i] - mean) * rstd, d = dy[i], g = d * weight[i];
      dweight[i] += d * n;
      if (p.dbias) dbias[i] += d;
      gn += g * n;
      g_total += g;
    }
    const R mean_gn = sum(gn) * inverse_dim, mean_g = p.is_rms_norm ? R(0) : sum(g_total) * inverse_dim;
    for (int64_t i = threadIdx.x; i < p.dim; i += blockDim.x) {
      const R n = (s[i] - mean) * rstd;
      const R d_sum = rstd * (dy[i] * weight[i] - mean_g - n * mean_gn) + (p.ds ? ds[i] : R(0));
      dx.store(i, d_sum);
      if (p.dresidual) dresidual.store(i, d_sum);
    }
  }
}

// Stage 2. A block owns kColumns channels of dweight (blockIdx.y = 0) or dbias (1): kSegments threads each add a run of row blocks.
constexpr int kColumns = 32, kSegments = 32;

template <class R>
__global__ void __launch_bounds__(kColumns* kSegments) rms_norm_bwd_reduce_kernel(const __grid_constant__ RmsNormBwdParams p) {
  COBRA_SHARED(R[kSegments][kColumns], sums);
  const R* const partial = static_cast<const R*>(p.partial) + int64_t(blockIdx.y) * p.row_blocks * p.dim;
  const int64_t each = (p.row_blocks + kSegments - 1) / kSegments;
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < p.dim; first += int64_t(gridDim.x) * kColumns) {
    const int64_t channel = first + threadIdx.x, begin = threadIdx.y * each;
    R sum = R(0);
    if (channel < p.dim) {
#pragma unroll 8
      for (int64_t block = begin; block < begin + each; ++block)
        if (block < p.row_blocks) sum += partial[block * p.dim + channel];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < p.dim) {
      R total = R(0);
      for (int segment = 0; segment < kSegments; ++segment) total += sums[segment][threadIdx.x];
      if (blockIdx.y == 0)
        store_real<R>(p.dweight, p.weight_dtype, channel, total);
      else
        store_real<R>(p.dbias, p.bias_dtype, channel, total);
    }
    __syncthreads();  // before the next round overwrites `sums`
  }
}

// Channels of the longest row that a block can hold.
template <class T> constexpr int64_t kMostChannels = int64_t(kMostItems<T>) * most_threads(kMostItems<T>);

template <class T>
bool rows_fit_vectors(const RmsNormBwdParams& p) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto packed = [&](const void* base, DType dtype, const RowStride& stride) { return rows_are_packed(base, dtype, p.shape, stride, kWidth); };
  return p.dim % kWidth == 0 && p.dim <= kMostChannels<T> && packed(p.x, p.x_dtype, p.x_stride) &&
         packed(p.residual, p.residual_dtype, p.residual_stride) && packed(p.dy, p.x_dtype, p.dy_stride) &&
         packed(p.ds, p.ds_dtype, p.ds_stride) && packed(p.dx, p.x_dtype, p.dx_stride) &&
         packed(p.dresidual, p.residual_dtype, p.dresidual_stride) && vector_is_packed(p.weight, p.weight_dtype, p.weight_stride, kWidth) &&
         vector_is_packed(p.partial, sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32, 1, kWidth);
}

template <class T, int kItems>
int launch_vector(const RmsNormBwdParams& p, void* stream) {
  const int threads = row_threads(p.dim, kItems, most_threads(kItems)), groups = threads == kWarp ? kGroupThreads / kWarp : 1;
  const size_t held = sizeof(Real<T>) * kItems * threads * groups;
  return launch(&rms_norm_bwd_vector_kernel<T, kItems>, dim3(unsigned(p.row_blocks)), dim3(threads, groups), held, stream, p);
}

template <class R>
int launch_stage1(const RmsNormBwdParams& p, void* stream) {
  return pick_by_type<R>(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    if (!rows_fit_vectors<T>(p))
      return launch(&rms_norm_bwd_strided_kernel<R>, dim3(unsigned(p.row_blocks)), dim3(row_threads(p.dim, 4, 512)), 0, stream, p);
    return p.dim <= 8 * kWarp ? launch_vector<T, 8>(p, stream) : launch_vector<T, kMostItems<T>>(p, stream);
  });
}

template <class R>
int backward(const RmsNormBwdParams& p, void* stream) {
  if (p.dim == 0) return 0;
  if (const int error = launch_stage1<R>(p, stream)) return error;
  const int64_t blocks = (p.dim + kColumns - 1) / kColumns, most = max_grid_x();
  const dim3 grid(unsigned(blocks < most ? blocks : most), p.dbias ? 2 : 1);
  return launch(&rms_norm_bwd_reduce_kernel<R>, grid, dim3(kColumns, kSegments), 0, stream, p);
}

}  // namespace

int rms_norm_bwd_cuda(const RmsNormBwdParams& p, void* stream) {
  return pick_arithmetic(p.x_dtype, [&](auto r) { return backward<decltype(r)>(p, stream); });
}

}  // namespace cobra
