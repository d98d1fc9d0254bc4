// causal_conv1d: y_t = bias + sum_w weight[:, w] x_{t - width + 1 + w}, then SiLU if asked; depthwise, over (batch, dim, seqlen).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

// What forward and backward read.
struct CausalConv1dInputs {
  int64_t batch, dim, seqlen, width;
  int64_t num_seqs;  // packed sequences of the one batch row; 0: not packed, a sequence is a batch row
  bool silu;

  struct Stride { int64_t batch, dim, seqlen; };  // elements
  Stride x_stride;
  Stride initial_states_stride;  // of (batch | num_seqs, dim, width - 1)
  int64_t weight_dim_stride, weight_width_stride, bias_stride;
  int64_t seq_idx_batch_stride, seq_idx_stride, cu_seqlens_stride;
  DType x_dtype, weight_dtype, bias_dtype, initial_states_dtype, seq_idx_dtype, cu_seqlens_dtype;

  const void* x;               // (batch, dim, seqlen)
  const void* weight;          // (dim, width)
  const void* bias;            // (dim,) or null
  const void* seq_idx;         // (batch, seqlen) or null
  const void* initial_states;  // (batch | num_seqs, dim, width - 1), oldest first, or null
  const void* cu_seqlens;      // (num_seqs + 1,) or null
};

struct CausalConv1dFwdParams : CausalConv1dInputs {  // y and final_states have the dtype of x
  Stride y_stride;
  void* y;             // (batch, dim, seqlen)
  void* final_states;  // (batch | num_seqs, dim, width - 1) contiguous, or null
};

// Gradients. The sum before SiLU is computed again from the inputs; nothing else is saved.
struct CausalConv1dBwdParams : CausalConv1dInputs {  // dy, dfinal_states and dx have the dtype of x
  Stride dy_stride, dx_stride;
  Stride dfinal_states_stride;  // of (batch | num_seqs, dim, width - 1)
  const void* dy;               // (batch, dim, seqlen)
  const void* dfinal_states;    // (batch | num_seqs, dim, width - 1) or null
  void* dx;                     // (batch, dim, seqlen)
  void* dweight;                // (dim, width) contiguous, weight dtype
  void* dbias;                  // (dim,) contiguous, bias dtype, or null
  void* dinitial_states;        // (batch | num_seqs, dim, width - 1) contiguous, its input's dtype, or null
  void* partial;                // (partials, width + 1, dim) workspace in the compute dtype: dweight, then dbias
  int64_t partials;             // causal_conv1d_bwd_partials_*(params)
};

// Pieces of time whose dweight and dbias are summed apart, then over the pieces in order: a function of the problem, so the
// sum has one order on every run. Reads sizes, dtypes, strides and pointers.
int64_t causal_conv1d_bwd_partials_cpu(const CausalConv1dBwdParams&);
int64_t causal_conv1d_bwd_partials_cuda(const CausalConv1dBwdParams&);

void causal_conv1d_fwd_cpu(const CausalConv1dFwdParams&, const Parallel&);
void causal_conv1d_bwd_cpu(const CausalConv1dBwdParams&, const Parallel&);

// `stream` is a cudaStream_t. Return 0 or the cudaError_t of the launch.
int causal_conv1d_fwd_cuda(const CausalConv1dFwdParams&, void* stream);
int causal_conv1d_bwd_cuda(const CausalConv1dBwdParams&, void* stream);

}  // namespace cobra
