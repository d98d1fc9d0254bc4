// causal_conv1d_update_fwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <algorithm>
#include <vector>

#include "causal_conv1d_update/causal_conv1d_update.h"
#include "common/tensor_args.h"

namespace cobra {
namespace {

constexpr const char* kOp = "causal_conv1d_update_fwd";

// Every row within the pool and used at most once; read before anything is written.
void check_indices(const CausalConv1dUpdateParams& p) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t row = p.indices_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.indices)[i * p.indices_stride]
                                                         : static_cast<const int32_t*>(p.indices)[i * p.indices_stride];
    STD_TORCH_CHECK(row < p.pool, kOp, ": conv_state_indices[", i, "] is ", row, ", conv_state has ", p.pool, " rows");
    if (row >= 0) rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  STD_TORCH_CHECK(std::adjacent_find(rows.begin(), rows.end()) == rows.end(), kOp, ": conv_state_indices names a row twice");
}

struct Update {
  CausalConv1dUpdateParams p{};
  Tensor y;

  Update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias, bool silu,
         const OptionalTensor& cache_seqlens, const OptionalTensor& indices)
      : y(torch::stable::empty_like(x)) {
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kOp, ": x has ", x.dim(), " dims, expected 2 or 3");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1, kOp, ": weight is not (dim, width >= 1)");
    STD_TORCH_CHECK(conv_state.dim() == 3, kOp, ": conv_state has ", conv_state.dim(), " dims, expected 3");
    p.batch = x.size(0);
    p.dim = x.size(1);
    p.steps = x.dim() == 3 ? x.size(2) : 1;
    p.width = weight.size(1);
    p.pool = conv_state.size(0);
    p.state_len = conv_state.size(2);
    p.silu = silu;
    STD_TORCH_CHECK(p.state_len >= p.width - 1, kOp, ": conv_state has state_len ", p.state_len, ", expected at least ", p.width - 1);
    expect_sizes(conv_state, {indices ? p.pool : p.batch, p.dim, p.state_len}, kOp, "conv_state");
    expect_compute_dtype(conv_state, x, kOp, "conv_state");

    p.x = x.const_data_ptr();
    p.x_dtype = dtype_of(x, kOp, "x");
    p.x_stride = {x.stride(0), x.stride(1), x.dim() == 3 ? x.stride(2) : 0};
    set_filter(p, kOp, x, weight, bias);
    if (cache_seqlens) {
      STD_TORCH_CHECK(p.steps <= p.state_len, kOp, ": x has ", p.steps, " steps, expected at most state_len ", p.state_len);
      expect_sizes(*cache_seqlens, {p.batch}, kOp, "cache_seqlens");
      p.cache_seqlens = cache_seqlens->const_data_ptr();
      p.cache_seqlens_dtype = index_dtype(kOp, *cache_seqlens, x, "cache_seqlens");
      p.cache_seqlens_stride = cache_seqlens->stride(0);
    }
    if (indices) {
      expect_sizes(*indices, {p.batch}, kOp, "conv_state_indices");
      p.indices = indices->const_data_ptr();
      p.indices_dtype = index_dtype(kOp, *indices, x, "conv_state_indices");
      p.indices_stride = indices->stride(0);
      if (indices->is_cpu()) check_indices(p);
    }
    p.state = conv_state.mutable_data_ptr();
    p.state_dtype = dtype_of(conv_state, kOp, "conv_state");
    p.state_stride = {conv_state.stride(0), conv_state.stride(1), conv_state.stride(2)};
    p.y = y.mutable_data_ptr();
    p.y_stride = {y.stride(0), y.stride(1), y.dim() == 3 ? y.stride(2) : 0};
  }
};

CallCounter cpu_calls("causal_conv1d_update", "cpu");

Tensor fwd_cpu(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias, bool silu,
               const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices) {
  Update call(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices);
  causal_conv1d_update_cpu(call.p, kTorchParallel);
  cpu_calls.add();
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) { m.impl("causal_conv1d_update_fwd", TORCH_BOX(&fwd_cpu)); }

#if defined(COBRA_WITH_CUDA)
CallCounter cuda_calls("causal_conv1d_update", "cuda");

Tensor fwd_cuda(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias, bool silu,
                const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Update call(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices);
  check_launch(causal_conv1d_update_cuda(call.p, current_stream(x, kOp)), kOp);
  cuda_calls.add();
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) { m.impl("causal_conv1d_update_fwd", TORCH_BOX(&fwd_cuda)); }
#endif

}  // namespace
}  // namespace cobra
