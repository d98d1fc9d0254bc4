// What the CUDA kernels of selective_scan share: which positions a row of states scans, how the constants and states of a
// channel are read, and which kernel serves which call. The arithmetic (exp2, softplus, silu) is in common/cuda_math.cuh.
#pragma once
#include "common/cuda_dtype.cuh"
#include "common/cuda_math.cuh"
#include "common/sync.cuh"
#include "selective_scan/scan_line.h"
#include "selective_scan/selective_scan.h"

namespace cobra {

// The tensor-core kernel (selective_scan_cuda_mma.cu). What it serves depends on dtypes, layout, dim and dstate, never on the
// number of rows: a row's bits must not depend on its batch.
bool mma_serves(const SelectiveScanFwdParams& p);
int selective_scan_fwd_mma(const SelectiveScanFwdParams& p, void* stream);
int64_t mma_line_workers(const SelectiveScanFwdParams& p);  // selective_scan_line_workers of what it serves

// Positions begin .. begin + length - 1 of one batch row.
struct Sequence {
  int64_t batch, begin, length;
};

// Row r of the states: batch row r, or packed sequence r. Row num_seqs of a packed call is its padding, which has no state.
// Boundaries are clamped, so a bad one gives wrong numbers, never an access outside a tensor.
__device__ __forceinline__ Sequence sequence_of(const SelectiveScanInputs& p, int64_t row) {
  if (!p.cu_seqlens) return {row, 0, p.seqlen};
  const auto boundary = [&](int64_t i) {
    const int64_t at = i * p.cu_seqlens_stride;
    const int64_t value = p.cu_seqlens_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.cu_seqlens)[at]
                                                              : static_cast<const int32_t*>(p.cu_seqlens)[at];
    return value < 0 ? 0 : value > p.seqlen ? p.seqlen : value;
  };
  const int64_t begin = boundary(row), end = row < p.num_seqs ? boundary(row + 1) : p.seqlen;
  return {0, begin, end > begin ? end - begin : 0};
}

// Rows of work: batch rows, or packed sequences and their padding.
inline int64_t sequence_count(const SelectiveScanInputs& p) { return p.cu_seqlens ? p.num_seqs + 1 : p.batch; }

// exp(dt A) = 2^(dt rate). Finite below, so that a step of dt = 0 keeps the state whatever A is.
__device__ __forceinline__ float decay_rate(const SelectiveScanInputs& p, int64_t channel, int64_t state) {
  const float rate = load_float(p.A, p.A_dtype, channel * p.A_stride.dim + state * p.A_stride.state) * kLog2e;
  return rate < -3.4e38f ? -3.4e38f : rate;
}

__device__ __forceinline__ float initial_state(const SelectiveScanInputs& p, int64_t row, int64_t channel, int64_t state) {
  if (!p.initial_state) return 0.f;
  const ScanStateStride& s = p.initial_state_stride;
  return load_float(p.initial_state, p.initial_state_dtype, row * s.row + channel * s.dim + state * s.state);
}

// h of a channel in last_state (rows, dim, dstate), contiguous fp32.
__device__ __forceinline__ float* last_state_of(const SelectiveScanFwdParams& p, int64_t row, int64_t channel) {
  return static_cast<float*>(p.last_state) + (row * p.dim + channel) * p.dstate;
}

// A parameter (dim,) of a channel, `absent` without the tensor.
__device__ __forceinline__ float channel_value(const void* base, DType dtype, int64_t stride, int64_t channel, float absent) {
  return base ? load_float(base, dtype, channel * stride) : absent;
}

// --- the line's hand-over (scan_line.h) --------------------------------------------------------------------------------
//
// The state travels in last_state, where the first part of a cut chain leaves it and the last part overwrites it. Workspace:
// ticket, workers that finished, then kLineFlags flags per worker. It starts zeroed and every launch leaves it so. Workers take
// tickets as they start: the worker that a part waits for has a smaller ticket, so it is running, and its first item waits for
// nobody. Nothing depends on which blocks are resident.
//
// Order: stores of the state by a warp's lanes -> __syncwarp -> release of the flag by lane 0 -> acquire of it by lane 0 of the
// receiving warp -> __syncwarp -> loads by its lanes. The receiver alone reads a flag and clears it; the next launch of the stream
// starts after this one's end.
constexpr int kLineFlags = 4;  // a worker may be a block whose warps hand over one by one
__device__ __forceinline__ unsigned* line_flag(unsigned* workspace, int64_t worker, int flag) { return workspace + 2 + worker * kLineFlags + flag; }

// By one thread of each worker.
__device__ __forceinline__ int64_t take_line_ticket(unsigned* workspace) { return atomicAdd(&workspace[0], 1u); }
// By one thread of each worker that took a ticket, of `tickets`, after its last item: the last one clears the counters.
__device__ __forceinline__ void leave_line(unsigned* workspace, int64_t tickets) {
  if (atomicAdd(&workspace[1], 1u) + 1 != unsigned(tickets)) return;
  atomicExch(&workspace[0], 0u);
  atomicExch(&workspace[1], 0u);
}

// By whole warps.
__device__ __forceinline__ void send_state(unsigned* flag, int lane) {
  __syncwarp();
  if (lane == 0) store_release(flag, 1u);
}
__device__ __forceinline__ void receive_state(unsigned* flag, int lane) {
  if (lane == 0) {
    while (load_acquire(flag) == 0) pause_spin();
    *flag = 0;
  }
  __syncwarp();
}

}  // namespace cobra
