// What surrounds the projector's matrix products on a GPU: memory passes. A block owns a range of channels, kWidth of them per
// thread, 8 or 4 where all rows are aligned for it, else 1; where it must know their bias or filter, it keeps them for its rows.
#include "projector/projector_cuda.cuh"

namespace cobra {
namespace {

constexpr int kThreads = 128, kRowsPerBlock = 8, kPegThreads = 64;

// Work item `index` of a launch: tile of channels fastest, then what the tiles are of.
struct Item {
  int64_t tile, rest;
};
__device__ __forceinline__ Item item(int64_t index, int64_t tiles) { return {index % tiles, index / tiles}; }

// One thread's channels, kRowsPerBlock rows of them.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) projector_bias_gelu_kernel(const __grid_constant__ BiasGeluParams p) {
  const int64_t tiles = (p.cols + kThreads * kWidth - 1) / (kThreads * kWidth), items = tiles * ((p.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    const Item at = item(index, tiles);
    const int64_t col = (at.tile * kThreads + threadIdx.x) * kWidth;
    if (col >= p.cols) continue;
    float bias[kWidth];
    load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, col, p.cols);
    for (int64_t row = at.rest * kRowsPerBlock; row < p.rows && row < (at.rest + 1) * kRowsPerBlock; ++row) {
      float v[kWidth];
      load_reals(v, p.h, p.h_dtype, row * p.cols + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = rounded(gelu(v[i] + bias[i]), p.round_dtype);
      store_reals(p.y, p.y_dtype, row * p.cols + col, v);
    }
  }
}

// One token of the output. A hidden value is read once for each bin that it is in, from the cache after the first time.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) projector_gelu_pool_kernel(const __grid_constant__ GeluPoolParams p) {
  const int64_t tiles = (p.channels + kThreads * kWidth - 1) / (kThreads * kWidth), items = tiles * p.batch * p.out_height * p.out_width;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    const Item at = item(index, tiles);
    const int64_t channel = (at.tile * kThreads + threadIdx.x) * kWidth;
    if (channel >= p.channels) continue;
    const int64_t j = at.rest % p.out_width, i = at.rest / p.out_width % p.out_height, batch = at.rest / p.out_width / p.out_height;
    const int64_t y0 = bin_begin(i, p.height, p.out_height), y1 = bin_end(i, p.height, p.out_height);
    const int64_t x0 = bin_begin(j, p.width, p.out_width), x1 = bin_end(j, p.width, p.out_width);
    float bias[kWidth], sum[kWidth] = {};
    if (p.gelu) load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, channel, p.channels);
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = x0; x < x1; ++x) {
        float v[kWidth];
        load_reals(v, p.hidden, p.dtype, ((batch * p.height + y) * p.width + x) * p.channels + channel);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[c] += p.gelu ? gelu(v[c] + bias[c]) : v[c];
      }
    const float share = 1.f / float((y1 - y0) * (x1 - x0));
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] = rounded(sum[c] * share, p.round_dtype);
    store_reals(p.pooled, p.pooled_dtype, at.rest * p.channels + channel, sum);
  }
}

// One row of the grid from left to right, its three columns of neighbours in registers.
template <int kWidth>
__global__ void __launch_bounds__(kPegThreads) projector_peg_kernel(const __grid_constant__ PegParams p) {
  const int64_t tiles = (p.channels + kPegThreads * kWidth - 1) / (kPegThreads * kWidth), items = tiles * p.batch * p.height;
  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    const Item at = item(index, tiles);
    const int64_t channel = (at.tile * kPegThreads + threadIdx.x) * kWidth, batch = at.rest / p.height, row = at.rest % p.height;
    if (channel >= p.channels) continue;
    float weight[3][3][kWidth], bias[kWidth], near[3][3][kWidth];  // near: column, row
    load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, channel, p.channels);
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int c = 0; c < kWidth; ++c)  // the residual is one more centre tap
          weight[i][j][c] = (i == 1 && j == 1) + load_float(p.weight, p.weight_dtype, (channel + c) * p.weight_stride_channel +
                                                                                      i * p.weight_stride_row + j * p.weight_stride_column);
    const auto token = [&](int64_t y, int64_t x) { return ((batch * p.height + y) * p.width + x) * p.channels + channel; };
    const auto load_column = [&](float (&column)[3][kWidth], int64_t x) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int64_t y = row + i - 1;
        if (x < p.width && y >= 0 && y < p.height) {
          load_reals(column[i], p.p, p.p_dtype, token(y, x));
        } else {
#pragma unroll
          for (int c = 0; c < kWidth; ++c) column[i][c] = 0.f;
        }
      }
    };
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int c = 0; c < kWidth; ++c) near[0][i][c] = 0.f;
    load_column(near[1], 0);
    for (int64_t x = 0; x < p.width; ++x) {
      load_column(near[2], x + 1);
      float v[kWidth];
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        v[c] = bias[c];
#pragma unroll
        for (int i = 0; i < 3; ++i)
#pragma unroll
          for (int j = 0; j < 3; ++j) v[c] = fmaf(near[j][i][c], weight[i][j][c], v[c]);
#pragma unroll
        for (int i = 0; i < 3; ++i) near[0][i][c] = near[1][i][c], near[1][i][c] = near[2][i][c];
      }
      store_reals(p.y, p.y_dtype, token(row, x), v);
    }
  }
}

template <class Params>
int launch_items(void (*kernel)(Params), const Params& p, int64_t channels, int threads, int width, int64_t per_tile, void* stream) {
  const int64_t items = (channels + threads * width - 1) / (threads * width) * per_tile, most = max_grid_x();
  return items == 0 ? 0 : launch(kernel, dim3(unsigned(items < most ? items : most)), dim3(threads), 0, stream, p);
}

}  // namespace

int projector_bias_gelu_cuda(const BiasGeluParams& p, void* stream) {
  const int64_t per_tile = (p.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (p.cols % 8 == 0 && is_aligned(p.h) && is_aligned(p.y)) return launch_items(&projector_bias_gelu_kernel<8>, p, p.cols, kThreads, 8, per_tile, stream);
  return launch_items(&projector_bias_gelu_kernel<1>, p, p.cols, kThreads, 1, per_tile, stream);
}

int projector_gelu_pool_cuda(const GeluPoolParams& p, void* stream) {
  const int64_t per_tile = p.batch * p.out_height * p.out_width;
  if (p.channels % 8 == 0 && is_aligned(p.hidden) && is_aligned(p.pooled))
    return launch_items(&projector_gelu_pool_kernel<8>, p, p.channels, kThreads, 8, per_tile, stream);
  return launch_items(&projector_gelu_pool_kernel<1>, p, p.channels, kThreads, 1, per_tile, stream);
}

int projector_peg_cuda(const PegParams& p, void* stream) {
  if (p.width == 0) return 0;
  const int64_t per_tile = p.batch * p.height;
  if (p.channels % 4 == 0 && is_aligned(p.p) && is_aligned(p.y)) return launch_items(&projector_peg_kernel<4>, p, p.channels, kPegThreads, 4, per_tile, stream);
  return launch_items(&projector_peg_kernel<1>, p, p.channels, kPegThreads, 1, per_tile, stream);
}

}  // namespace cobra
