// selective_scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, out_t = y_t silu(z_t); dt = [softplus](delta + bias).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

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

// What forward and backward read.
struct SelectiveScanInputs {
  int64_t batch, dim, seqlen, dstate;
  int64_t num_seqs;  // packed sequences of the one batch row; 0 when not packed
  bool delta_softplus, B_constant, C_constant;
  int32_t multiprocessors;  // of the GPU, to choose a schedule; results do not depend on it

  SequenceStride u_stride, delta_stride, z_stride;
  ScanStateStride A_stride, initial_state_stride;
  ProjectionStride B_stride, C_stride;
  int64_t D_stride, delta_bias_stride, cu_seqlens_stride;
  DType u_dtype, delta_dtype, z_dtype, A_dtype, B_dtype, C_dtype, D_dtype, delta_bias_dtype, initial_state_dtype;
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
};

struct SelectiveScanFwdParams : SelectiveScanInputs {
  int64_t line_workers;  // share the chains of channels in equal parts (scan_line.h); 0: each chain has a worker
  SequenceStride out_stride;
  void* out;         // (batch, dim, seqlen), dtype of u
  void* last_state;  // (batch | num_seqs, dim, dstate) contiguous, compute dtype
  void* states;      // (batch, state_slots, dstate, dim) contiguous, compute dtype, or null: the state before each chunk, for the backward
  unsigned* line;    // selective_scan_line_words(line_workers) words, zeroed once, or null without line_workers
};

// The backward starts from a state that the forward saved every kStateChunk steps of a sequence, and replays the steps between.
constexpr int64_t kStateChunk = 64;

// Slots of `states` in a batch row, and the first of a sequence: its chunks follow one another. Packed sequences never share a slot.
COBRA_HOST_DEVICE int64_t state_slots(const SelectiveScanInputs& p) {
  return p.cu_seqlens ? p.seqlen / kStateChunk + p.num_seqs : (p.seqlen + kStateChunk - 1) / kStateChunk;
}
COBRA_HOST_DEVICE int64_t state_slot(const SelectiveScanInputs& p, int64_t begin, int64_t sequence) {
  return p.cu_seqlens ? begin / kStateChunk + sequence : 0;
}

// Gradients, null where the input is absent. Sums over channels (dB, dC) and over batch rows and sequences (dA, dD, ddelta_bias, and
// constant dB, dC) are made in two stages in an order that depends on the sizes only.
struct SelectiveScanBwdParams : SelectiveScanInputs {
  SequenceStride dout_stride, du_stride, ddelta_stride, dz_stride;
  ProjectionStride dB_stride, dC_stride;
  ScanStateStride dA_stride, dlast_state_stride, dinitial_state_stride;
  DType dlast_state_dtype;

  const void* dout;         // (batch, dim, seqlen), dtype of u, or null: zeros
  const void* dlast_state;  // (batch | num_seqs, dim, dstate) or null: zeros
  const void* states;       // what the forward saved
  void* du;                 // (batch, dim, seqlen)
  void* ddelta;             // (batch, dim, seqlen)
  void* dz;                 // (batch, dim, seqlen) or null
  void* dA;                 // (dim, dstate)
  void* dB;                 // as B
  void* dC;                 // as C
  void* dD;                 // (dim,) contiguous or null
  void* ddelta_bias;        // (dim,) contiguous or null
  void* dinitial_state;     // (batch | num_seqs, dim, dstate) or null
  void* workspace;          // selective_scan_bwd_workspace_<backend>(p) elements of the compute dtype, not initialised
};

void selective_scan_fwd_cpu(const SelectiveScanFwdParams&, const Parallel&);
void selective_scan_bwd_cpu(const SelectiveScanBwdParams&, const Parallel&);
int64_t selective_scan_bwd_workspace_cpu(const SelectiveScanBwdParams&);

// `stream` is a cudaStream_t. Return 0 or the cudaError_t of the launch.
int selective_scan_fwd_cuda(const SelectiveScanFwdParams&, void* stream);
int selective_scan_bwd_cuda(const SelectiveScanBwdParams&, void* stream);
int64_t selective_scan_bwd_workspace_cuda(const SelectiveScanBwdParams&);

// Multiprocessors of the current GPU; 0 when it cannot be asked.
int32_t gpu_multiprocessors();

// How many workers should share the work of a call whose `multiprocessors` is set; 0 for none. Two launches that may run at the
// same time need workspaces of their own; launches of one stream may share one, every launch leaves it zeroed.
int64_t selective_scan_line_workers(const SelectiveScanFwdParams&);
int64_t selective_scan_line_words(int64_t workers);

// Is a CUDA graph being captured from the stream?
bool gpu_stream_is_captured(void* stream);

}  // namespace cobra
