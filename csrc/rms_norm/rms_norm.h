// rms_norm: y = s * rsqrt(mean(s^2) + eps) * weight (+ bias), s = x + residual. Also LayerNorm (is_rms_norm = false).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace cobra {

struct RmsNormFwdParams {
  int64_t rows, dim;
  RowShape shape;      // leading dims, product = rows
  double eps;
  bool is_rms_norm;    // false: the mean is removed first (LayerNorm, biased variance)

  RowStride x_stride, residual_stride, y_stride, s_stride;
  int64_t weight_stride, bias_stride;
  DType x_dtype, residual_dtype, weight_dtype, bias_dtype, s_dtype;  // y has the dtype of x

  const void* x;         // (rows, dim)
  const void* residual;  // (rows, dim) or null
  const void* weight;    // (dim,)
  const void* bias;      // (dim,) or null
  void* y;               // (rows, dim)
  void* s;               // (rows, dim), or null when the sum is not wanted
};

// Gradients. The statistics are recomputed: the row is in cache or registers anyway, and nothing need be saved.
struct RmsNormBwdParams {
  int64_t rows, dim;
  RowShape shape;
  double eps;
  bool is_rms_norm;

  RowStride x_stride, residual_stride, dy_stride, ds_stride, dx_stride, dresidual_stride;
  int64_t weight_stride;
  DType x_dtype, residual_dtype, weight_dtype, bias_dtype, ds_dtype;  // dy, dx as x; dresidual as residual

  const void* x;         // (rows, dim)
  const void* residual;  // (rows, dim) or null
  const void* weight;    // (dim,)
  const void* dy;        // (rows, dim)
  const void* ds;        // (rows, dim) gradient of the sum, or null
  void* dx;              // (rows, dim)
  void* dresidual;       // (rows, dim) or null
  void* dweight;         // (dim,) contiguous, weight dtype
  void* dbias;           // (dim,) contiguous, bias dtype, or null
  void* partial;         // (2, row_blocks, dim) workspace in the compute dtype: dweight, then dbias (half when dbias is null)
  int64_t row_blocks;    // of the functions below: they depend on the problem alone, so the sum has one order on every run
};

// The row blocks of a backward: rows are summed in their block, then the blocks in order. CPU: one for every 16 rows, 128 at most.
inline int64_t rms_norm_bwd_row_blocks(int64_t rows) {
  const int64_t blocks = (rows + 15) / 16;
  return blocks < 1 ? 1 : blocks > 128 ? 128 : blocks;
}
// GPU: every multiprocessor needs several, a thread block each: one for every 2 turns until there are 512, then one for every 16
// until there are 2048. A turn is one row, or four short ones, which a thread block takes together.
inline int64_t rms_norm_bwd_row_blocks_cuda(int64_t rows, int64_t dim) {
  const int64_t turns = dim <= 512 ? (rows + 3) / 4 : rows, many = (turns + 15) / 16, few = (turns + 1) / 2;
  const int64_t blocks = many > 512 ? many : few > 512 ? 512 : few;
  return blocks < 1 ? 1 : blocks > 2048 ? 2048 : blocks;
}

void rms_norm_fwd_cpu(const RmsNormFwdParams&, const Parallel&);
void rms_norm_bwd_cpu(const RmsNormBwdParams&, const Parallel&);

// `stream` is a cudaStream_t. Return 0 or the cudaError_t of the launch.
int rms_norm_fwd_cuda(const RmsNormFwdParams&, void* stream);
int rms_norm_bwd_cuda(const RmsNormBwdParams&, void* stream);

}  // namespace cobra
