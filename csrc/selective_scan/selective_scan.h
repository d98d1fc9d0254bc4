// selective_scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, out_t = y_t silu(z_t); dt = [softplus](delta + bias).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

struct SequenceStride {  // of a tensor (batch, dim, seqlen), in elements
  int64_t batch, dim, seq;
};
struct ProjectionStride {  // of B or C: (batch, groups, dstate, seqlen), or constant (dim, dstate): `group` is then that of dim
  int64_t batch, group, state, seq;
  int64_t groups;  // channel d reads group d / (dim / groups); 1 when constant
};
struct ScanStateStride {  // of a state (rows, dim, dstate); of A without its row
  int64_t row, dim, state;
};

struct SelectiveScanFwdParams {
  int64_t batch, dim, seqlen, dstate;
  int64_t num_seqs;  // packed sequences of the one batch row; 0 when not packed
  bool delta_softplus, B_constant, C_constant;
  int32_t multiprocessors;  // of the GPU, to choose a schedule; results do not depend on it
  int64_t line_workers;     // share the chains of channels in equal parts (scan_line.h); 0: each chain has a worker

  SequenceStride u_stride, delta_stride, z_stride, out_stride;
  ScanStateStride A_stride, initial_state_stride;
  ProjectionStride B_stride, C_stride;
  int64_t D_stride, delta_bias_stride, cu_seqlens_stride;
  DType u_dtype, delta_dtype, z_dtype, A_dtype, B_dtype, C_dtype, D_dtype, delta_bias_dtype, initial_state_dtype;  // out as u
  DType cu_seqlens_dtype;  // int32 or int64

  const void* u;              // (batch, dim, seqlen)
  const void* delta;          // (batch, dim, seqlen)
  const void* z;              // (batch, dim, seqlen) or null
  const void* A;              // (dim, dstate)
  const void* B;              // (batch, groups, dstate, seqlen) or (dim, dstate)
  const void* C;              // (batch, groups, dstate, seqlen) or (dim, dstate)
  const void* D;              // (dim,) or null
  const void* delta_bias;     // (dim,) or null
  const void* initial_state;  // (batch | num_seqs, dim, dstate) or null
  const void* cu_seqlens;     // (num_seqs + 1,) or null; values already checked
  void* out;                  // (batch, dim, seqlen)
  void* last_state;           // (batch | num_seqs, dim, dstate) contiguous, compute dtype
  unsigned* line;             // selective_scan_line_words(line_workers) words, zeroed once, or null without line_workers
};

void selective_scan_fwd_cpu(const SelectiveScanFwdParams&, const Parallel&);

// `stream` is a cudaStream_t. Returns 0 or the cudaError_t of the launch.
int selective_scan_fwd_cuda(const SelectiveScanFwdParams&, void* stream);

// Multiprocessors of the current GPU; 0 when it cannot be asked.
int32_t gpu_multiprocessors();

// How many workers should share the work of a call whose `multiprocessors` is set; 0 for none. Two launches that may run at the
// same time need workspaces of their own; launches of one stream may share one, every launch leaves it zeroed.
int64_t selective_scan_line_workers(const SelectiveScanFwdParams&);
int64_t selective_scan_line_words(int64_t workers);

// Is a CUDA graph being captured from the stream?
bool gpu_stream_is_captured(void* stream);

}  // namespace cobra
