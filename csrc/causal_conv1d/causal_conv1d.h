// causal_conv1d: y_t = bias + sum_w weight[:, w] x_{t - width + 1 + w}, then SiLU if asked; depthwise, over (batch, dim, seqlen).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

struct CausalConv1dFwdParams {
  int64_t batch, dim, seqlen, width;
  int64_t num_seqs;  // packed sequences of the one batch row; 0: not packed, a sequence is a batch row
  bool silu;

  struct Stride { int64_t batch, dim, seqlen; };  // elements
  Stride x_stride, y_stride;
  Stride initial_states_stride;  // of (batch | num_seqs, dim, width - 1)
  int64_t weight_dim_stride, weight_width_stride, bias_stride;
  int64_t seq_idx_batch_stride, seq_idx_stride, cu_seqlens_stride;
  DType x_dtype, weight_dtype, bias_dtype, initial_states_dtype, seq_idx_dtype, cu_seqlens_dtype;  // y, final_states as x

  const void* x;               // (batch, dim, seqlen)
  const void* weight;          // (dim, width)
  const void* bias;            // (dim,) or null
  const void* seq_idx;         // (batch, seqlen) or null
  const void* initial_states;  // (batch | num_seqs, dim, width - 1), oldest first, or null
  const void* cu_seqlens;      // (num_seqs + 1,) or null
  void* y;                     // (batch, dim, seqlen)
  void* final_states;          // (batch | num_seqs, dim, width - 1) contiguous, or null
};

void causal_conv1d_fwd_cpu(const CausalConv1dFwdParams&, const Parallel&);

// `stream` is a cudaStream_t. Returns 0 or the cudaError_t of the launch.
int causal_conv1d_fwd_cuda(const CausalConv1dFwdParams&, void* stream);

}  // namespace cobra
