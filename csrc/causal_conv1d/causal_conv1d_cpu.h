// What forward and backward share on a CPU: sequences, and inputs before the start of one.
#pragma once
#include "causal_conv1d/causal_conv1d.h"
#include "common/conv_window.h"
#include "common/vec.h"

#include <algorithm>
#include <vector>

namespace cobra::COBRA_LEVEL {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t whole_vectors(int64_t n, int64_t width) { return ceil_div(n, width) * width; }

// First positions of the packed sequences, then the end of the last: made monotone and put inside [0, seqlen], so that a
// bad value gives wrong numbers and not an access outside x. Empty when nothing is packed.
inline std::vector<int64_t> sequence_starts(const CausalConv1dInputs& p) {
  std::vector<int64_t> starts(p.num_seqs > 0 ? p.num_seqs + 1 : 0);
  int64_t at_least = 0;
  for (int64_t i = 0; i < int64_t(starts.size()); ++i)
    starts[i] = at_least = std::clamp(load_index(p.cu_seqlens, p.cu_seqlens_dtype, i * p.cu_seqlens_stride), at_least, p.seqlen);
  return starts;
}

// Part [begin, end) of one sequence, steps [start, stop) of its batch row. state: its row of the state tensors, -1 in the padding
// after the last packed sequence.
struct Piece { int64_t state, start, stop, begin, end; };

// Calls f(Piece) on the pieces of batch row b that lie in [begin, end), in order.
template <class F>
void for_each_piece(const CausalConv1dInputs& p, const std::vector<int64_t>& starts, int64_t b, int64_t begin, int64_t end, F&& f) {
  if (!p.cu_seqlens) return f(Piece{b, 0, p.seqlen, begin, end});
  int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;  // empty ones are passed over
  while (begin < end) {
    if (i < 0 || i == p.num_seqs) return f(Piece{-1, begin, end, begin, end});
    const int64_t stop = std::min(end, starts[i + 1]);
    if (begin < stop) f(Piece{i, starts[i], starts[i + 1], begin, stop});
    begin = stop;
    ++i;
  }
}

// All of the sequence whose states are in row `state`.
inline Piece whole_sequence(const CausalConv1dInputs& p, const std::vector<int64_t>& starts, int64_t state) {
  const int64_t start = p.cu_seqlens ? starts[state] : 0, stop = p.cu_seqlens ? starts[state + 1] : p.seqlen;
  return {state, start, stop, start, stop};
}

inline int64_t offset_of(const CausalConv1dInputs::Stride& stride, int64_t b, int64_t d, int64_t t) {
  return b * stride.batch + d * stride.dim + t * stride.seqlen;
}

// `channels` inputs from channel d on, at time t of the sequence: before its start from the initial state, or 0.
template <class T>
void load_step(const CausalConv1dInputs& p, T* dst, const Piece& piece, int64_t b, int64_t d, int64_t t, int64_t channels) {
  if (t >= piece.start) return load_row(dst, p.x, p.x_dtype, offset_of(p.x_stride, b, d, t), p.x_stride.dim, channels);
  if (!p.initial_states) return void(std::fill_n(dst, channels, T(0)));
  load_row(dst, p.initial_states, p.initial_states_dtype, offset_of(p.initial_states_stride, piece.state, d, p.width - 1 + t - piece.start),
           p.initial_states_stride.dim, channels);
}

inline int64_t seq_idx_at(const CausalConv1dInputs& p, int64_t b, int64_t t) {
  return load_index(p.seq_idx, p.seq_idx_dtype, b * p.seq_idx_batch_stride + t * p.seq_idx_stride);
}

}  // namespace cobra::COBRA_LEVEL
