// What surrounds the projector's matrix products: bias + GELU, GELU + adaptive average pool, positional encoding (3x3).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

// h = round(gelu(h + bias)), in place.
struct BiasGeluParams {
  int64_t rows, cols;
  int64_t bias_stride;
  DType dtype, bias_dtype;
  DType round_dtype;  // values are rounded to it and stay in `dtype`

  void* h;           // (rows, cols) contiguous
  const void* bias;  // (cols,) or null
};

// pooled[b, i w + j] = round(mean over bin (i, j) of gelu(hidden + bias)); bin i covers floor(i H/h) .. ceil((i+1) H/h).
struct GeluPoolParams {
  int64_t batch, height, width, out_height, out_width, channels;
  int64_t bias_stride;
  DType dtype, bias_dtype, round_dtype;

  const void* hidden;  // (batch, height * width, channels) contiguous
  const void* bias;    // (channels,) or null
  void* pooled;        // (batch, out_height * out_width, channels) contiguous, dtype of hidden
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

// Adaptive bins of `in` positions in `out` parts: they overlap when out does not divide in.
constexpr int64_t bin_begin(int64_t i, int64_t in, int64_t out) { return i * in / out; }
constexpr int64_t bin_end(int64_t i, int64_t in, int64_t out) { return ((i + 1) * in + out - 1) / out; }

void projector_bias_gelu_cpu(const BiasGeluParams&, const Parallel&);
void projector_gelu_pool_cpu(const GeluPoolParams&, const Parallel&);
void projector_peg_cpu(const PegParams&, const Parallel&);

}  // namespace cobra
