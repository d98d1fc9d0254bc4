// What the forward and the backward kernels of causal_conv1d share on a GPU: sequences, inputs before the start of one, alignment.
#pragma once
#include "causal_conv1d/causal_conv1d.h"
#include "common/conv_cuda.cuh"
#include "common/reduce.cuh"

namespace cobra {

using Inputs = CausalConv1dInputs;

__device__ __forceinline__ int64_t at(const Inputs::Stride& stride, int64_t b, int64_t d, int64_t t) {
  return b * stride.batch + d * stride.dim + t * stride.seqlen;
}

// --- sequences --------------------------------------------------------------------------------------------------------

// Steps [start, end) of a batch row; state: their row of the state tensors, -1 in the padding after the last packed sequence.
struct Sequence {
  int64_t state = -1, start = 0, end = 0;
};

// Boundary i of the packed sequences, inside [0, seqlen] whatever cu_seqlens holds.
__device__ __forceinline__ int64_t boundary(const Inputs& p, int64_t i) {
  return least(greatest(load_index(p.cu_seqlens, p.cu_seqlens_dtype, i * p.cu_seqlens_stride), 0), p.seqlen);
}

// Moves on to the sequence of step t; `sequence` is that of an earlier step of batch row b, or empty.
__device__ __forceinline__ void find_sequence(const Inputs& p, int64_t b, int64_t t, Sequence& sequence) {
  if (t < sequence.end) return;
  sequence = {b, 0, p.seqlen};
  if (!p.cu_seqlens) return;
  int64_t low = 0, high = p.num_seqs;  // the first sequence that ends after t: empty ones are passed over
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (boundary(p, middle + 1) > t)
      high = middle;
    else
      low = middle + 1;
  }
  sequence.state = low < p.num_seqs ? low : -1;
  if (low < p.num_seqs) sequence.start = least(boundary(p, low), t), sequence.end = boundary(p, low + 1);
}

__device__ __forceinline__ int64_t seq_idx_at(const Inputs& p, int64_t b, int64_t t) {
  return load_index(p.seq_idx, p.seq_idx_dtype, b * p.seq_idx_batch_stride + t * p.seq_idx_stride);
}

// Is step t padding?
__device__ __forceinline__ bool is_padding(const Inputs& p, int64_t b, int64_t t, const Sequence& sequence) {
  return sequence.state < 0 || (p.seq_idx && seq_idx_at(p, b, t) < 0);
}

// Does x at step `tap` count for step t of the same sequence?
__device__ __forceinline__ bool counts(const Inputs& p, int64_t b, int64_t t, int64_t tap) {
  return !p.seq_idx || seq_idx_at(p, b, tap) == seq_idx_at(p, b, t);
}

// The input `back` >= 1 steps before the start of a sequence: from its initial state, or 0.
template <class R = float>
__device__ __forceinline__ R before_start(const Inputs& p, int64_t state, int64_t d, int64_t back) {
  const int64_t column = p.width - 1 - back;
  return p.initial_states && column >= 0 ? load_value<R>(p.initial_states, p.initial_states_dtype, at(p.initial_states_stride, state, d, column)) : R(0);
}

// --- alignment --------------------------------------------------------------------------------------------------------

// How many elements p lies behind a 16-byte boundary.
template <class T>
__device__ __forceinline__ int behind_alignment(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % (16 / sizeof(T)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Is (b, d, 0) for every b and d, or (b, 0, t) for every b and t, on a boundary of `bytes`? Dims of size 1 do not count.
inline bool rows_are_aligned(const void* base, const Inputs& p, int64_t batch_stride, int64_t row_stride, int64_t rows, int64_t bytes) {
  const int64_t elements = bytes / int64_t(size_of(p.x_dtype));
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && (p.batch == 1 || batch_stride % elements == 0) &&
         (rows == 1 || row_stride % elements == 0);
}

}  // namespace cobra
