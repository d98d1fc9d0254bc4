// The projector's kernels: linear layer + bias + GELU (GPU), and what surrounds the library's matrix products: bias + GELU,
// GELU + adaptive average pool, positional encoding (3x3), and the backward of these three.
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace cobra {

constexpr int kMaxSegments = 4;

// y = round(act(x w^T + bias)), act = gelu or nothing; x is the segments side by side. bf16 or fp16, fp32 sums. GPU only.
// Every base is 16-byte aligned; every row stride, width and the weight's stride are multiples of 8.
struct LinearParams {
  int64_t rows, cols, depth;  // depth: the sum of the widths
  RowShape shape;             // leading dims of x, product = rows
  int segments;               // those that are not empty
  bool gelu;

  int64_t width[kMaxSegments];
  RowStride x_stride[kMaxSegments];  // channels are adjacent
  int64_t weight_stride, bias_stride;
  DType dtype, bias_dtype, y_dtype;  // y_dtype: dtype, or fp32 for sums that are not rounded

  bool warpgroups;      // which kernel: products of warpgroups or of warps
  int64_t whole_tiles;  // of linear_plan: the tiles from here on are summed in `split` parts along the depth
  int split;

  const void* x[kMaxSegments];  // (rows, width)
  const void* weight;           // (cols, depth), rows weight_stride apart
  const void* bias;             // (cols,) or null
  void* y;                      // (rows, cols) contiguous
  void* workspace;              // linear_workspace(p) fp32, or null where split is 1
};

// y = round(gelu(h + bias)); y may be h.
struct BiasGeluParams {
  int64_t rows, cols;
  int64_t bias_stride;
  DType h_dtype, bias_dtype, y_dtype;
  DType round_dtype;  // values are rounded to it, then stored in y_dtype

  const void* h;     // (rows, cols) contiguous
  const void* bias;  // (cols,) or null
  void* y;           // (rows, cols) contiguous
};

// pooled[b, i w + j] = round(mean over bin (i, j) of act(hidden + bias)); bin i covers floor(i H/h) .. ceil((i+1) H/h).
struct GeluPoolParams {
  int64_t batch, height, width, out_height, out_width, channels;
  int64_t bias_stride;
  DType dtype, bias_dtype, pooled_dtype, round_dtype;
  bool gelu;  // false: hidden is pooled as it is, without bias

  const void* hidden;  // (batch, height * width, channels) contiguous
  const void* bias;    // (channels,) or null
  void* pooled;        // (batch, out_height * out_width, channels) contiguous
};

// y = p + bias + depthwise 3x3 of p over the grid, zero padding 1.
struct PegParams {
  int64_t batch, height, width, channels;
  int64_t weight_stride_channel, weight_stride_row, weight_stride_column, bias_stride;
  DType p_dtype, weight_dtype, bias_dtype, y_dtype;

  const void* p;       // (batch, height * width, channels) contiguous
  const void* weight;  // (channels, 1, 3, 3)
  const void* bias;    // (channels,) or null
  void* y;             // (batch, height * width, channels) contiguous
};

// Adaptive bins of `in` positions in `out` parts: they overlap when out does not divide in. The bins that hold position y are
// bin_begin(y, out, in) .. bin_end(y, out, in) - 1: the transposed pool has bins of the same form.
COBRA_HOST_DEVICE constexpr int64_t bin_begin(int64_t i, int64_t in, int64_t out) { return i * in / out; }
COBRA_HOST_DEVICE constexpr int64_t bin_end(int64_t i, int64_t in, int64_t out) { return ((i + 1) * in + out - 1) / out; }

// Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + 0.3 a), for a >= 0, Phi the normal distribution: no cancellation in the negative
// tail, where 1 + erf would lose every digit. Highest power first; relative error of P 1.3e-7 over 0 <= a <= 13.5.
struct PhiTail {
  float power[8];
};
constexpr PhiTail kPhiTail{{0.035932042f, -0.15827717f, 0.20820843f, -0.055395365f, 0.12946992f, 0.0996373f, 0.12079839f, 0.11962639f}};

template <class T> constexpr T kInverseRootTwoPi = T(0.39894228040143267794);

// --- backward ---------------------------------------------------------------------------------------------------------
// Sums over rows have two stages: a block of rows adds its own in order into a line of `partial`, then the lines are added in order.
// How many blocks there are depends on the problem only, so the bits are the same on every run.

constexpr int kMostSums = 11;

inline int64_t sum_blocks(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks < 1 ? 1 : blocks > 128 ? 128 : blocks;
}

// The second stage: output i, channel c = round(sum over the blocks of partial[i, block, c]).
struct ColumnSums {
  int64_t blocks, channels;
  int sums;
  const void* partial;  // (sums, blocks, channels), compute dtype
  struct Output {
    void* to;  // or null: not wanted
    DType dtype;
    int64_t stride;
  } output[kMostSums];
};

// dz = gelu'(sums + bias) d, rounded once; dbias = the sum over the rows of what dz is before it is rounded.
// Without sums there is no GELU: dz = d, the gradient of a last layer. With a pool, d is the gradient of the means, and
// every position of the grid takes its share from each bin that holds it.
struct GeluBwdParams {
  int64_t rows, cols;
  RowShape shape;  // leading dims of d, product = rows; not with a pool
  RowStride d_stride;
  int64_t bias_stride;
  bool pool;
  int64_t height, width, out_height, out_width;  // with a pool: rows = batch * height * width
  DType d_dtype, bias_dtype, dz_dtype, dbias_dtype;

  const void* d;       // (rows, cols); with a pool (batch, out_height * out_width, cols) contiguous
  const void* sums;    // (rows, cols) contiguous, compute dtype, or null
  const void* bias;    // (cols,) or null
  void* dz;            // (rows, cols) contiguous, or null: not wanted
  void* dbias;         // (cols,) contiguous, or null: not wanted
  void* partial;       // (row_blocks, cols), compute dtype, with dbias
  int64_t row_blocks;  // sum_blocks(rows, kGeluBwdRows)
};
constexpr int64_t kGeluBwdRows = 16;

// Of y = p + bias + depthwise 3x3 of p, with p = sums + p_bias, zero outside the grid:
// dp = dy + the 3x3 transposed of dy; dweight[tap] = sum of dy times the p under the tap; dbias = sum of dy; dp_bias = sum of dp.
struct PegBwdParams {
  int64_t batch, height, width, channels;
  int64_t dy_stride_batch, dy_stride_token, dy_stride_channel;
  int64_t weight_stride_channel, weight_stride_row, weight_stride_column, p_bias_stride;
  DType dy_dtype, weight_dtype, p_bias_dtype, dp_dtype, dweight_dtype, dbias_dtype, dp_bias_dtype;

  const void* dy;      // (batch, height * width, channels)
  const void* sums;    // as dy, contiguous, compute dtype; with dweight
  const void* p_bias;  // (channels,) or null
  const void* weight;  // (channels, 1, 3, 3)
  void* dp;            // as dy, contiguous; this and the next three may be null: not wanted
  void* dweight;       // (channels, 1, 3, 3) contiguous
  void* dbias;         // (channels,) contiguous
  void* dp_bias;       // (channels,) contiguous
  void* partial;       // (peg_bwd_sums(p), blocks, channels), compute dtype: of dy, of dp, of the nine taps
  int64_t blocks;      // of rows of the grid: sum_blocks(batch * height, rows_per_block)
};
COBRA_HOST_DEVICE int peg_bwd_sums(const PegBwdParams& p) { return p.dweight ? kMostSums : p.dbias || p.dp_bias ? 2 : 0; }

inline ColumnSums column_sums(const GeluBwdParams& p) { return {p.row_blocks, p.cols, 1, p.partial, {{p.dbias, p.dbias_dtype, 1}}}; }
inline ColumnSums column_sums(const PegBwdParams& p) {
  ColumnSums all{p.blocks, p.channels, peg_bwd_sums(p), p.partial, {{p.dbias, p.dbias_dtype, 1}, {p.dp_bias, p.dp_bias_dtype, 1}}};
  for (int tap = 0; tap < all.sums - 2; ++tap)
    all.output[2 + tap] = {static_cast<char*>(p.dweight) + tap * size_of(p.dweight_dtype), p.dweight_dtype, 9};
  return all;
}

// --- how a GPU shares out a linear layer -----------------------------------------------------------------------------

// What a block owns: rows x cols outputs, summed `depth` channels at a step, through a ring of kLinearStages stages in shared memory.
// Registers let `blocks` of them share a multiprocessor.
struct LinearTile {
  int rows, cols, depth, blocks;
  int part_cost;  // of writing and adding one part of a split depth, in steps: rows * cols sums out and in. An estimate
};
constexpr int kLinearStages = 4;
constexpr LinearTile kWarpTile{128, 128, 32, 2, 14};       // products of warps, on every GPU
constexpr LinearTile kWarpgroupTile{128, 256, 64, 1, 11};  // products of warpgroups, on sm_90a
constexpr const LinearTile& linear_tile(const LinearParams& p) { return p.warpgroups ? kWarpgroupTile : kWarpTile; }

inline int64_t linear_tiles(const LinearParams& p) {
  const LinearTile& tile = linear_tile(p);
  return (p.rows + tile.rows - 1) / tile.rows * ((p.cols + tile.cols - 1) / tile.cols);
}
// Steps along the depth: a step lies in one segment.
inline int64_t linear_steps(const LinearParams& p) {
  int64_t steps = 0;
  for (int i = 0; i < p.segments; ++i) steps += (p.width[i] + linear_tile(p).depth - 1) / linear_tile(p).depth;
  return steps;
}

// Bytes of shared memory of a block: the ring, the table of row offsets, and what the system keeps for itself.
constexpr int64_t linear_shared_bytes(const LinearTile& tile) {
  constexpr int64_t kSystem = 1024;
  return int64_t(kLinearStages) * (tile.rows + tile.cols) * tile.depth * 2 + int64_t(kMaxSegments) * tile.rows * 8 + kSystem;
}
// How many blocks are on the GPU at once. Two of the warps' tiles share the 164 KB of sm_80 or the 228 KB of sm_90 and sm_100;
// the 100 KB of sm_86, sm_89 and sm_120 hold one.
inline int64_t linear_places(const LinearParams& p, int64_t multiprocessors, int64_t shared_bytes_per_multiprocessor) {
  const int64_t fit = shared_bytes_per_multiprocessor / linear_shared_bytes(linear_tile(p)), most = linear_tile(p).blocks;
  return multiprocessors * (fit < 1 ? 1 : fit < most ? fit : most);
}

// Full rounds of tiles are computed whole; the tiles left over, fewer than the GPU has places for, in `split` parts along the
// depth, as many as shorten the last round most. A function of the problem and the GPU: the sums have one order on every run.
inline void linear_plan(LinearParams& p, int64_t places) {
  constexpr int64_t kMostParts = 16, kFewestSteps = 4;
  const int64_t tiles = linear_tiles(p), steps = linear_steps(p), left = tiles % places;
  int64_t best = steps;
  p.whole_tiles = tiles;
  p.split = 1;
  for (int64_t split = 2; left && split <= kMostParts && steps >= split * kFewestSteps; ++split) {
    const int64_t rounds = (left * split + places - 1) / places, cost = rounds * ((steps + split - 1) / split + linear_tile(p).part_cost);
    if (cost >= best) continue;
    best = cost;
    p.whole_tiles = tiles - left;
    p.split = int(split);
  }
}
// Elements of the workspace: one tile for each part.
inline int64_t linear_workspace(const LinearParams& p) {
  return p.split == 1 ? 0 : (linear_tiles(p) - p.whole_tiles) * p.split * linear_tile(p).rows * linear_tile(p).cols;
}

void projector_bias_gelu_cpu(const BiasGeluParams&, const Parallel&);
void projector_gelu_pool_cpu(const GeluPoolParams&, const Parallel&);
void projector_peg_cpu(const PegParams&, const Parallel&);
void projector_gelu_bwd_cpu(const GeluBwdParams&, const Parallel&);
void projector_peg_bwd_cpu(const PegBwdParams&, const Parallel&);

// `stream` is a cudaStream_t. Return 0 or the cudaError_t of the launch.
int projector_linear_cuda(const LinearParams&, void* stream);
int projector_bias_gelu_cuda(const BiasGeluParams&, void* stream);
int projector_gelu_pool_cuda(const GeluPoolParams&, void* stream);
int projector_peg_cuda(const PegParams&, void* stream);
int projector_gelu_bwd_cuda(const GeluBwdParams&, void* stream);
int projector_peg_bwd_cuda(const PegBwdParams&, void* stream);
// Of the current device: its multiprocessors, their shared memory, and whether products of warpgroups run on it.
struct LinearDevice {
  int multiprocessors, shared_bytes_per_multiprocessor;
  bool warpgroups;
};
LinearDevice projector_linear_device_cuda();

}  // namespace cobra
