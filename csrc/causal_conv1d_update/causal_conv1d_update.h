// causal_conv1d_update: causal_conv1d of a few new steps, the earlier inputs kept in conv_state, which is written in place.
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

struct CausalConv1dUpdateParams {
  int64_t batch, dim, steps, width;
  int64_t pool, state_len;  // conv_state is (pool, dim, state_len); pool = batch without conv_state_indices
  bool silu;

  struct Stride { int64_t batch, dim, step; };  // elements
  Stride x_stride, y_stride, state_stride;
  int64_t weight_dim_stride, weight_width_stride, bias_stride, cache_seqlens_stride, indices_stride;
  DType x_dtype, weight_dtype, bias_dtype, state_dtype, cache_seqlens_dtype, indices_dtype;  // y as x

  const void* x;              // (batch, dim, steps)
  const void* weight;         // (dim, width)
  const void* bias;           // (dim,) or null
  const void* cache_seqlens;  // (batch,): steps seen so far, conv_state is circular; null: it shifts left
  const void* indices;        // (batch,): row of the pool, negative = padding; null: row b
  void* y;                    // (batch, dim, steps)
  void* state;                // (pool, dim, state_len), in place
};

void causal_conv1d_update_cpu(const CausalConv1dUpdateParams&, const Parallel&);

// `stream` is a cudaStream_t. Returns 0 or the cudaError_t of the launch.
int causal_conv1d_update_cuda(const CausalConv1dUpdateParams&, void* stream);

}  // namespace cobra
