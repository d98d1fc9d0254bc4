// selective_state_update, one step in place: h = exp(dt A) h + dt B x; out = (sum_n C h + D x) * silu(z).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace cobra {

// Strides of a tensor (batch | pool, heads, dim, dstate), in elements; a dim the tensor lacks has stride 0.
struct StateStride { int64_t batch, head, dim, dstate; };

struct SelectiveStateUpdateParams {
  int64_t batch, heads, dim, dstate;  // Mamba-1 is one head per group: head = channel / dim, dim = channels of a group
  int64_t groups;                     // head h reads B and C of group h / (heads / groups)
  int64_t pool;                       // rows of state
  bool dt_softplus;

  StateStride state_stride, x_stride, dt_stride, z_stride, out_stride, A_stride, D_stride, dt_bias_stride;
  StateStride B_stride, C_stride;  // .head: per group
  int64_t indices_stride;
  DType state_dtype, x_dtype, dt_dtype, A_dtype, B_dtype, C_dtype, D_dtype, z_dtype, dt_bias_dtype;  // out has the dtype of x
  DType indices_dtype;

  void* state;          // (pool, heads, dim, dstate), read and written
  const void* x;        // (batch, heads, dim)
  const void* dt;       // (batch, heads, dim)
  const void* A;        // (heads, dim, dstate)
  const void* B;        // (batch, groups, dstate)
  const void* C;        // (batch, groups, dstate)
  const void* D;        // (heads, dim) or null
  const void* z;        // (batch, heads, dim) or null
  const void* dt_bias;  // (heads, dim) or null
  const void* indices;  // (batch,) row of the pool, negative = padding; or null, then row i belongs to batch i
  void* out;            // (batch, heads, dim)
};

// Row of the pool that an index names: -1 for padding; clamped beyond the pool, which gives wrong numbers but no stray access.
COBRA_HOST_DEVICE int64_t pool_row(const SelectiveStateUpdateParams& p, int64_t index) { return index < 0 ? -1 : index < p.pool ? index : p.pool - 1; }
inline int64_t pool_row_of(const SelectiveStateUpdateParams& p, int64_t batch) {
  if (!p.indices) return batch;
  const int64_t at = batch * p.indices_stride;
  return pool_row(p, p.indices_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.indices)[at] : static_cast<const int32_t*>(p.indices)[at]);
}

void selective_state_update_cpu(const SelectiveStateUpdateParams&, const Parallel&);

// `stream` is a cudaStream_t. Returns 0 or the cudaError_t of the launch.
int selective_state_update_cuda(const SelectiveStateUpdateParams&, void* stream);

}  // namespace cobra
