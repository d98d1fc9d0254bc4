// few_rows_linear: y = x weight^T + bias for a few rows of x, as a decode step has them. Its time is that of reading the weight.
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"

namespace cobra {

struct FewRowsLinearParams {
  int64_t rows, in, out;
  int64_t x_row_stride, x_stride, weight_row_stride, bias_stride;  // in elements; the columns of weight are neighbours
  DType x_dtype, weight_dtype, bias_dtype;                         // fp32, bf16 or fp16; y has the dtype of x

  const void* x;       // (rows, in)
  const void* weight;  // (out, in)
  const void* bias;    // (out,) or null
  void* y;             // (rows, out), contiguous
};

void few_rows_linear_cpu(const FewRowsLinearParams&, const Parallel&);

}  // namespace cobra
