// causal_conv1d_fwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <tuple>

#include "causal_conv1d/causal_conv1d.h"
#include "common/tensor_args.h"

namespace cobra {
namespace {

constexpr const char* kOp = "causal_conv1d_fwd";

CausalConv1dFwdParams::Stride strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

struct Forward {
  CausalConv1dFwdParams p{};
  Tensor y, final_states;

  Forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
          const OptionalTensor& initial_states, bool return_final_states, bool silu, const OptionalTensor& cu_seqlens)
      : y(torch::stable::empty_like(x)), final_states(torch::stable::new_empty(x, {0})) {
    STD_TORCH_CHECK(x.dim() == 3, kOp, ": x has ", x.dim(), " dims, expected 3");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1, kOp, ": weight is not (dim, width >= 1)");
    p.batch = x.size(0);
    p.dim = x.size(1);
    p.seqlen = x.size(2);
    p.width = weight.size(1);
    p.silu = silu;
    int64_t states = p.batch;

    p.x = x.const_data_ptr();
    p.x_dtype = dtype_of(x, kOp, "x");
    p.x_stride = strides(x);
    set_filter(p, kOp, x, weight, bias);
    if (cu_seqlens) {
      STD_TORCH_CHECK(p.batch == 1, kOp, ": x has batch ", p.batch, ", expected 1 with cu_seqlens");
      STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, kOp, ": cu_seqlens is not (num_seqs + 1,)");
      p.cu_seqlens = cu_seqlens->const_data_ptr();
      p.cu_seqlens_dtype = index_dtype(kOp, *cu_seqlens, x, "cu_seqlens");
      p.cu_seqlens_stride = cu_seqlens->stride(0);
      states = p.num_seqs = cu_seqlens->size(0) - 1;
    }
    if (seq_idx) {
      STD_TORCH_CHECK(!initial_states && !return_final_states && !cu_seqlens, kOp, ": seq_idx excludes states and cu_seqlens");
      expect_sizes(*seq_idx, {p.batch, p.seqlen}, kOp, "seq_idx");
      p.seq_idx = seq_idx->const_data_ptr();
      p.seq_idx_dtype = index_dtype(kOp, *seq_idx, x, "seq_idx");
      p.seq_idx_batch_stride = seq_idx->stride(0);
      p.seq_idx_stride = seq_idx->stride(1);
    }
    if (initial_states) {
      expect_sizes(*initial_states, {states, p.dim, p.width - 1}, kOp, "initial_states");
      expect_compute_dtype(*initial_states, x, kOp, "initial_states");
      p.initial_states = initial_states->const_data_ptr();
      p.initial_states_dtype = dtype_of(*initial_states, kOp, "initial_states");
      p.initial_states_stride = strides(*initial_states);
    }
    p.y = y.mutable_data_ptr();
    p.y_stride = strides(y);
    if (return_final_states) {
      final_states = torch::stable::new_empty(x, {states, p.dim, p.width - 1});
      p.final_states = final_states.mutable_data_ptr();
    }
  }
};

CallCounter fwd_cpu_calls("causal_conv1d", "cpu");

std::tuple<Tensor, Tensor> fwd_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                                   const OptionalTensor& initial_states, bool return_final_states, bool silu,
                                   const OptionalTensor& cu_seqlens) {
  Forward call(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens);
  causal_conv1d_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.y, call.final_states};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) { m.impl("causal_conv1d_fwd", TORCH_BOX(&fwd_cpu)); }

#if defined(COBRA_WITH_CUDA)
CallCounter fwd_cuda_calls("causal_conv1d", "cuda");

std::tuple<Tensor, Tensor> fwd_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                                    const OptionalTensor& initial_states, bool return_final_states, bool silu,
                                    const OptionalTensor& cu_seqlens) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forward call(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens);
  check_launch(causal_conv1d_fwd_cuda(call.p, current_stream(x, kOp)), kOp);
  fwd_cuda_calls.add();
  return {call.y, call.final_states};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) { m.impl("causal_conv1d_fwd", TORCH_BOX(&fwd_cuda)); }
#endif

}  // namespace
}  // namespace cobra
