// The backward of the projector's passes on a GPU: memory passes that also sum over rows. A block owns a range of channels, kWidth of
// them per thread, of a block of rows, and adds up what its rows give in order; a second kernel adds the blocks in order. No atomics.
// R: the type of the arithmetic (common/cuda_dtype.cuh).
#include "common/reduce.cuh"
#include "projector/projector_cuda.cuh"

namespace cobra {
namespace {

constexpr int kThreads = 128, kPegThreads = 64, kSumColumns = 32, kSegments = 8;

// d of a position of the grid, from the bins that hold it. Int: unsigned where all products of sizes fit 31 bits, else int64_t, whose
// divisions take twice the instructions.
template <class Int, class R, int kWidth>
__device__ __forceinline__ void gather(R (&d)[kWidth], const GeluBwdParams& p, int64_t row, int64_t col) {
  const Int height = Int(p.height), width = Int(p.width), out_height = Int(p.out_height), out_width = Int(p.out_width);
  const auto begin = [](Int i, Int in, Int out) { return i * in / out; };  // bin_begin, bin_end
  const auto end = [](Int i, Int in, Int out) { return ((i + 1) * in + out - 1) / out; };
  const int64_t batch = row / (p.height * p.width);
  const Int position = Int(row - batch * (p.height * p.width)), y = position / width, x = position - y * width;
  const Int i1 = end(y, out_height, height), j0 = begin(x, out_width, width), j1 = end(x, out_width, width);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) d[c] = R(0);
  for (Int i = begin(y, out_height, height); i < i1; ++i) {
    const Int rows = end(i, height, out_height) - begin(i, height, out_height);
    for (Int j = j0; j < j1; ++j) {
      const R share = inverse(R(rows * (end(j, width, out_width) - begin(j, width, out_width))));
      R v[kWidth];
      load_reals(v, p.d, p.d_dtype, (batch * (p.out_height * p.out_width) + i * out_width + j) * p.cols + col);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) d[c] = multiply_add(v[c], share, d[c]);
    }
  }
}

// kAhead rows are loaded before the first is used; one where divisions in 64 bits need the registers.
template <class R, int kWidth, class PoolInt>  // PoolInt: void without a pool
__global__ void __launch_bounds__(kThreads) projector_gelu_bwd_kernel(const __grid_constant__ GeluBwdParams p) {
  constexpr int kAhead = std::is_same_v<PoolInt, int64_t> ? 1 : 2;
  const int64_t tiles = (p.cols + kThreads * kWidth - 1) / (kThreads * kWidth), each = (p.rows + p.row_blocks - 1) / p.row_blocks;
  for (int64_t index = blockIdx.x; index < tiles * p.row_blocks; index += gridDim.x) {
    const int64_t block = index / tiles, col = (index % tiles * kThreads + threadIdx.x) * kWidth;
    if (col >= p.cols) continue;
    R bias[kWidth], sum[kWidth] = {};
    load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, col, p.cols);
    const int64_t begin = block * each, end = begin + each < p.rows ? begin + each : p.rows;
    for (int64_t row = begin; row < end; row += kAhead) {
      R d[kAhead][kWidth], z[kAhead][kWidth];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        if (row + r >= end) break;
        if constexpr (std::is_void_v<PoolInt>)
          load_reals(d[r], p.d, p.d_dtype, row_offset(p.shape, p.d_stride, row + r) + col * p.d_stride.dim);
        else
          gather<PoolInt>(d[r], p, row + r, col);
        if (p.sums) load_reals(z[r], p.sums, DType::kFloat32, (row + r) * p.cols + col);
      }
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        if (row + r >= end) break;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          if (p.sums) d[r][c] *= gelu_slope(z[r][c] + bias[c]);
          sum[c] += d[r][c];
        }
        if (p.dz) store_reals(p.dz, p.dz_dtype, (row + r) * p.cols + col, d[r]);
      }
    }
    if (p.dbias) store_reals(p.partial, DType::kFloat32, block * p.cols + col, sum);
  }
}

// Rows of the grid from left to right, as the forward, the three columns of dy around a position in registers. They meet twice: with
// the filter turned round they make its dp, times its p they are its share of the nine taps.
template <class R, int kWidth>
__global__ void __launch_bounds__(kPegThreads) projector_peg_bwd_kernel(const __grid_constant__ PegBwdParams p) {
  const int64_t tiles = (p.channels + kPegThreads * kWidth - 1) / (kPegThreads * kWidth), units = p.batch * p.height;
  const int64_t each = (units + p.blocks - 1) / p.blocks;
  for (int64_t index = blockIdx.x; index < tiles * p.blocks; index += gridDim.x) {
    const int64_t block = index / tiles, channel = (index % tiles * kPegThreads + threadIdx.x) * kWidth;
    if (channel >= p.channels) continue;
    R weight[3][3][kWidth], bias[kWidth];  // weight: of the dy in that row and column around a position
    R of_dy[kWidth] = {}, of_dp[kWidth] = {}, of_tap[3][3][kWidth] = {};
    load_bias(bias, p.p_bias, p.p_bias_dtype, p.p_bias_stride, channel, p.channels);
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int c = 0; c < kWidth; ++c)  // the residual is one more centre tap
          weight[i][j][c] = (i == 1 && j == 1) + load_real<R>(p.weight, p.weight_dtype, (channel + c) * p.weight_stride_channel +
                                                                                       (2 - i) * p.weight_stride_row + (2 - j) * p.weight_stride_column);
    const int64_t last = (block + 1) * each < units ? (block + 1) * each : units;
    for (int64_t unit = block * each; unit < last; ++unit) {
      const int64_t batch = unit / p.height, row = unit % p.height;
      R near[3][3][kWidth];  // column, row
      const auto load_column = [&](R (&column)[3][kWidth], int64_t x) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int64_t y = row + i - 1;
          if (x < p.width && y >= 0 && y < p.height) {
            load_reals(column[i], p.dy, p.dy_dtype, batch * p.dy_stride_batch + (y * p.width + x) * p.dy_stride_token + channel * p.dy_stride_channel);
          } else {
#pragma unroll
            for (int c = 0; c < kWidth; ++c) column[i][c] = R(0);
          }
        }
      };
#pragma unroll
      for (int i = 0; i < 3; ++i)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) near[0][i][c] = R(0);
      load_column(near[1], 0);
      for (int64_t x = 0; x < p.width; ++x) {
        const int64_t offset = (unit * p.width + x) * p.channels + channel;
        R value[kWidth] = {}, dp[kWidth] = {};
        if (p.dweight) load_reals(value, p.sums, DType::kFloat32, offset);
        load_column(near[2], x + 1);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
#pragma unroll
          for (int i = 0; i < 3; ++i)
#pragma unroll
            for (int j = 0; j < 3; ++j) {
              dp[c] = multiply_add(near[j][i][c], weight[i][j][c], dp[c]);
              if (p.dweight) of_tap[2 - i][2 - j][c] = multiply_add(near[j][i][c], value[c] + bias[c], of_tap[2 - i][2 - j][c]);
            }
          of_dy[c] += near[1][1][c];
          of_dp[c] += dp[c];
#pragma unroll
          for (int i = 0; i < 3; ++i) near[0][i][c] = near[1][i][c], near[1][i][c] = near[2][i][c];
        }
        if (p.dp) store_reals(p.dp, p.dp_dtype, offset, dp);
      }
    }
    const auto store_sum = [&](int i, const R (&sum)[kWidth]) {
      store_reals(p.partial, DType::kFloat32, (i * p.blocks + block) * p.channels + channel, sum);
    };
    if (peg_bwd_sums(p) == 0) continue;
    store_sum(0, of_dy);
    store_sum(1, of_dp);
    if (!p.dweight) continue;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) store_sum(2 + tap, of_tap[tap / 3][tap % 3]);
  }
}

// The second stage. A block owns kSumColumns channels of sum blockIdx.y; kSegments threads each add a run of blocks of rows.
template <class R>
__global__ void __launch_bounds__(kSumColumns* kSegments) projector_column_sums_kernel(const __grid_constant__ ColumnSums p) {
  COBRA_SHARED(R[kSegments][kSumColumns], shared);
  const ColumnSums::Output output = p.output[blockIdx.y];
  if (!output.to) return;
  const R* const partial = static_cast<const R*>(p.partial) + int64_t(blockIdx.y) * p.blocks * p.channels;
  const int64_t each = (p.blocks + kSegments - 1) / kSegments, begin = threadIdx.y * each;
  for (int64_t first = int64_t(blockIdx.x) * kSumColumns; first < p.channels; first += int64_t(gridDim.x) * kSumColumns) {
    const int64_t channel = first + threadIdx.x;
    R sum = R(0);
    if (channel < p.channels) {
#pragma unroll 8
      for (int64_t block = begin; block < begin + each; ++block)
        if (block < p.blocks) sum += partial[block * p.channels + channel];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < p.channels) {
      R total = R(0);
      for (int segment = 0; segment < kSegments; ++segment) total += shared[segment][threadIdx.x];
      store_real<R>(output.to, output.dtype, channel * output.stride, total);
    }
    __syncthreads();  // before the next round overwrites `shared`
  }
}

template <class Params>
int launch_blocks(void (*kernel)(Params), const Params& p, int64_t channels, int threads, int width, int64_t blocks, void* stream) {
  const int64_t items = (channels + threads * width - 1) / (threads * width) * blocks, most = max_grid_x();
  return launch(kernel, dim3(unsigned(items < most ? items : most)), dim3(threads), 0, stream, p);
}
template <class R>
int launch_sums(const ColumnSums& all, void* stream) {
  const int64_t tiles = (all.channels + kSumColumns - 1) / kSumColumns, most = max_grid_x();
  return launch(&projector_column_sums_kernel<R>, dim3(unsigned(tiles < most ? tiles : most), all.sums), dim3(kSumColumns, kSegments), 0, stream, all);
}

template <class R>
int gelu_bwd(const GeluBwdParams& p, void* stream) {
  if (p.cols == 0) return 0;
  bool wide = p.cols % 8 == 0 && is_aligned(p.d) && is_aligned(p.sums) && is_aligned(p.dz) && is_aligned(p.partial);
  if (!p.pool) {
    wide = wide && p.d_stride.dim == 1;
    for (int i = 0; i < p.shape.ndim; ++i) wide = wide && p.d_stride.row[i] % 8 == 0;
  }
  const auto run = [&](auto* kernel, int width) { return launch_blocks(kernel, p, p.cols, kThreads, width, p.row_blocks, stream); };
  // Sizes that are no more than 32767 have products that fit.
  const bool small = p.height < 1 << 15 && p.width < 1 << 15 && p.out_height < 1 << 15 && p.out_width < 1 << 15;
  int error;
  if (!p.pool)
    error = wide ? run(&projector_gelu_bwd_kernel<R, 8, void>, 8) : run(&projector_gelu_bwd_kernel<R, 1, void>, 1);
  else if (small)
    error = wide ? run(&projector_gelu_bwd_kernel<R, 8, unsigned>, 8) : run(&projector_gelu_bwd_kernel<R, 1, unsigned>, 1);
  else
    error = run(&projector_gelu_bwd_kernel<R, 1, int64_t>, 1);
  return error || !p.dbias ? error : launch_sums<R>(column_sums(p), stream);
}

template <class R>
int peg_bwd(const PegBwdParams& p, void* stream) {
  if (p.channels == 0) return 0;
  const bool wide = p.channels % 4 == 0 && is_aligned(p.dy) && is_aligned(p.sums) && is_aligned(p.dp) && is_aligned(p.partial) &&
                    p.dy_stride_channel == 1 && p.dy_stride_token % 4 == 0 && p.dy_stride_batch % 4 == 0;
  const int error = wide ? launch_blocks(&projector_peg_bwd_kernel<R, 4>, p, p.channels, kPegThreads, 4, p.blocks, stream)
                         : launch_blocks(&projector_peg_bwd_kernel<R, 1>, p, p.channels, kPegThreads, 1, p.blocks, stream);
  return error || peg_bwd_sums(p) == 0 ? error : launch_sums<R>(column_sums(p), stream);
}

}  // namespace

int projector_gelu_bwd_cuda(const GeluBwdParams& p, void* stream) {
  return pick_arithmetic(p.d_dtype, [&](auto r) { return gelu_bwd<decltype(r)>(p, stream); });
}

int projector_peg_bwd_cuda(const PegBwdParams& p, void* stream) {
  return pick_arithmetic(p.dy_dtype, [&](auto r) { return peg_bwd<decltype(r)>(p, stream); });
}

}  // namespace cobra
