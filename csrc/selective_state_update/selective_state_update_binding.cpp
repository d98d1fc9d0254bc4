// selective_state_update_fwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <algorithm>
#include <vector>

#include "common/tensor_args.h"
#include "selective_state_update/selective_state_update.h"

namespace cobra {
namespace {

constexpr const char* kOp = "selective_state_update_fwd";

// Strides as (batch, heads, dim, dstate). In Mamba-1's form the channels are the dim axis of one tensor dim: a group's
// channels become a head, so its stride is that of `dim_per_head` channels.
struct Layout {
  bool multi_head;
  int64_t dim_per_head;

  StateStride of(const Tensor& t, bool has_batch, bool has_dstate) const {
    StateStride s{};
    int64_t d = 0;
    if (has_batch) s.batch = t.stride(d++);
    if (multi_head) s.head = t.stride(d++);
    s.dim = t.stride(d++);
    if (!multi_head) s.head = s.dim * dim_per_head;
    if (has_dstate) s.dstate = t.stride(d);
    return s;
  }
};

// Every row within the pool and used at most once; read before anything is written.
void check_indices(const SelectiveStateUpdateParams& p) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t row = p.indices_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.indices)[i * p.indices_stride]
                                                         : static_cast<const int32_t*>(p.indices)[i * p.indices_stride];
    STD_TORCH_CHECK(row < p.pool, kOp, ": state_batch_indices[", i, "] is ", row, ", state has ", p.pool, " rows");
    if (row >= 0) rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  STD_TORCH_CHECK(std::adjacent_find(rows.begin(), rows.end()) == rows.end(), kOp, ": state_batch_indices names a row twice");
}

struct Update {
  SelectiveStateUpdateParams p{};
  Tensor out;

  Update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
         const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& indices)
      : out(torch::stable::empty_like(x)) {
    const bool multi_head = x.dim() == 3;
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kOp, ": x has ", x.dim(), " dims, expected 2 or 3");
    STD_TORCH_CHECK(state.dim() == x.dim() + 1, kOp, ": state has ", state.dim(), " dims, expected ", x.dim() + 1);
    p.batch = x.size(0);
    p.dstate = state.size(state.dim() - 1);
    p.pool = state.size(0);
    p.groups = B.dim() == 3 ? B.size(1) : 1;
    p.heads = multi_head ? x.size(1) : p.groups;
    STD_TORCH_CHECK(p.groups >= 1 && (multi_head ? p.heads : x.size(1)) % p.groups == 0, kOp, ": the groups of B do not divide x");
    p.dim = multi_head ? x.size(2) : x.size(1) / p.groups;
    p.dt_softplus = dt_softplus;

    expect_same_sizes(dt, x, kOp, "dt");
    if (z) expect_same_sizes(*z, x, kOp, "z");
    for (int64_t d = 1; d < x.dim(); ++d)
      STD_TORCH_CHECK(state.size(d) == x.size(d), kOp, ": state has size ", state.size(d), " at dim ", d, ", expected ", x.size(d));
    if (!indices) STD_TORCH_CHECK(p.pool == p.batch, kOp, ": state has ", p.pool, " rows, expected ", p.batch);
    if (multi_head) {
      expect_sizes(A, {p.heads, p.dim, p.dstate}, kOp, "A");
      if (D) expect_sizes(*D, {p.heads, p.dim}, kOp, "D");
      if (dt_bias) expect_sizes(*dt_bias, {p.heads, p.dim}, kOp, "dt_bias");
    } else {
      expect_sizes(A, {x.size(1), p.dstate}, kOp, "A");
      if (D) expect_sizes(*D, {x.size(1)}, kOp, "D");
      if (dt_bias) expect_sizes(*dt_bias, {x.size(1)}, kOp, "dt_bias");
    }
    expect_same_sizes(C, B, kOp, "C");
    if (B.dim() == 3) {
      expect_sizes(B, {p.batch, p.groups, p.dstate}, kOp, "B");
    } else {
      expect_sizes(B, {p.batch, p.dstate}, kOp, "B");
    }

    const Layout layout{multi_head, p.dim};
    const auto set = [&](const Tensor& t, const char* name, const void*& pointer, DType& dtype) {
      expect_compute_dtype(t, x, kOp, name);
      pointer = t.const_data_ptr();
      dtype = dtype_of(t, kOp, name);
    };
    set(x, "x", p.x, p.x_dtype);
    p.x_stride = layout.of(x, true, false);
    set(dt, "dt", p.dt, p.dt_dtype);
    p.dt_stride = layout.of(dt, true, false);
    set(A, "A", p.A, p.A_dtype);
    p.A_stride = layout.of(A, false, true);
    set(B, "B", p.B, p.B_dtype);
    p.B_stride = {B.stride(0), B.dim() == 3 ? B.stride(1) : 0, 0, B.stride(B.dim() - 1)};
    set(C, "C", p.C, p.C_dtype);
    p.C_stride = {C.stride(0), C.dim() == 3 ? C.stride(1) : 0, 0, C.stride(C.dim() - 1)};
    if (D) {
      set(*D, "D", p.D, p.D_dtype);
      p.D_stride = layout.of(*D, false, false);
    }
    if (z) {
      set(*z, "z", p.z, p.z_dtype);
      p.z_stride = layout.of(*z, true, false);
    }
    if (dt_bias) {
      set(*dt_bias, "dt_bias", p.dt_bias, p.dt_bias_dtype);
      p.dt_bias_stride = layout.of(*dt_bias, false, false);
    }
    if (indices) {
      expect_sizes(*indices, {p.batch}, kOp, "state_batch_indices");
      p.indices = indices->const_data_ptr();
      p.indices_dtype = index_dtype(kOp, *indices, x, "state_batch_indices");
      p.indices_stride = indices->stride(0);
      if (indices->is_cpu()) check_indices(p);
    }
    expect_compute_dtype(state, x, kOp, "state");
    p.state = state.mutable_data_ptr();
    p.state_dtype = dtype_of(state, kOp, "state");
    p.state_stride = layout.of(state, true, true);
    p.out = out.mutable_data_ptr();
    p.out_stride = layout.of(out, true, false);
  }
};

CallCounter cpu_calls("selective_state_update", "cpu");

Tensor fwd_cpu(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
               const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices) {
  Update call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices);
  selective_state_update_cpu(call.p, kTorchParallel);
  cpu_calls.add();
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) { m.impl("selective_state_update_fwd", TORCH_BOX(&fwd_cpu)); }

#if defined(COBRA_WITH_CUDA)
CallCounter cuda_calls("selective_state_update", "cuda");

Tensor fwd_cuda(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Update call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices);
  check_launch(selective_state_update_cuda(call.p, current_stream(x, kOp)), kOp);
  cuda_calls.add();
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) { m.impl("selective_state_update_fwd", TORCH_BOX(&fwd_cuda)); }
#endif

}  // namespace
}  // namespace cobra
