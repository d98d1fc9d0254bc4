// causal_conv1d_fwd and causal_conv1d_bwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <tuple>

#include "causal_conv1d/causal_conv1d.h"
#include "common/tensor_args.h"

namespace cobra {
namespace {

CausalConv1dInputs::Stride strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Fills what forward and backward read; returns how many rows the state tensors have.
int64_t set_inputs(CausalConv1dInputs& p, const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool with_final_states, bool silu,
                   const OptionalTensor& cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": x has ", x.dim(), " dims, expected 3");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 1, op, ": weight is not (dim, width >= 1)");
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.seqlen = x.size(2);
  p.width = weight.size(1);
  p.silu = silu;
  int64_t states = p.batch;

  p.x = x.const_data_ptr();
  p.x_dtype = dtype_of(x, op, "x");
  p.x_stride = strides(x);
  set_filter(p, op, x, weight, bias);
  if (cu_seqlens) {
    STD_TORCH_CHECK(p.batch == 1, op, ": x has batch ", p.batch, ", expected 1 with cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op, ": cu_seqlens is not (num_seqs + 1,)");
    p.cu_seqlens = cu_seqlens->const_data_ptr();
    p.cu_seqlens_dtype = index_dtype(op, *cu_seqlens, x, "cu_seqlens");
    p.cu_seqlens_stride = cu_seqlens->stride(0);
    states = p.num_seqs = cu_seqlens->size(0) - 1;
  }
  if (seq_idx) {
    STD_TORCH_CHECK(!initial_states && !with_final_states && !cu_seqlens, op, ": seq_idx excludes states and cu_seqlens");
    expect_sizes(*seq_idx, {p.batch, p.seqlen}, op, "seq_idx");
    p.seq_idx = seq_idx->const_data_ptr();
    p.seq_idx_dtype = index_dtype(op, *seq_idx, x, "seq_idx");
    p.seq_idx_batch_stride = seq_idx->stride(0);
    p.seq_idx_stride = seq_idx->stride(1);
  }
  if (initial_states) {
    expect_sizes(*initial_states, {states, p.dim, p.width - 1}, op, "initial_states");
    expect_compute_dtype(*initial_states, x, op, "initial_states");
    p.initial_states = initial_states->const_data_ptr();
    p.initial_states_dtype = dtype_of(*initial_states, op, "initial_states");
    p.initial_states_stride = strides(*initial_states);
  }
  return states;
}

struct Forward {
  CausalConv1dFwdParams p{};
  Tensor y, final_states;

  Forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
          const OptionalTensor& initial_states, bool return_final_states, bool silu, const OptionalTensor& cu_seqlens)
      : y(torch::stable::empty_like(x)), final_states(torch::stable::new_empty(x, {0})) {
    const int64_t states =
        set_inputs(p, "causal_conv1d_fwd", x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens);
    p.y = y.mutable_data_ptr();
    p.y_stride = strides(y);
    if (return_final_states) {
      final_states = torch::stable::new_empty(x, {states, p.dim, p.width - 1});
      p.final_states = final_states.mutable_data_ptr();
    }
  }
};

// `partials` counts the rows of the workspace: causal_conv1d_bwd_partials_cpu or _cuda.
struct Backward {
  CausalConv1dBwdParams p{};
  Tensor dx, dweight, dbias, dinitial_states, partial;

  Backward(const Tensor& dy, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
           const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, const OptionalTensor& cu_seqlens,
           int64_t (*partials)(const CausalConv1dBwdParams&))
      : dx(torch::stable::empty_like(x)),
        dbias(torch::stable::new_empty(x, {0})),
        dinitial_states(torch::stable::new_empty(x, {0})) {
    const char* op = "causal_conv1d_bwd";
    const int64_t states = set_inputs(p, op, x, weight, bias, seq_idx, initial_states, dfinal_states.has_value(), silu, cu_seqlens);
    expect_same_sizes(dy, x, op, "dy");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy has another dtype than x");
    expect_compute_dtype(dy, x, op, "dy");
    p.dy = dy.const_data_ptr();
    p.dy_stride = strides(dy);
    if (dfinal_states) {
      expect_sizes(*dfinal_states, {states, p.dim, p.width - 1}, op, "dfinal_states");
      expect_compute_dtype(*dfinal_states, x, op, "dfinal_states");
      STD_TORCH_CHECK(dfinal_states->scalar_type() == x.scalar_type(), op, ": dfinal_states has another dtype than x");
      p.dfinal_states = dfinal_states->const_data_ptr();
      p.dfinal_states_stride = strides(*dfinal_states);
    }
    p.dx = dx.mutable_data_ptr();
    p.dx_stride = strides(dx);
    dweight = torch::stable::new_empty(weight, {p.dim, p.width});
    p.dweight = dweight.mutable_data_ptr();
    if (bias) {
      dbias = torch::stable::new_empty(*bias, {p.dim});
      p.dbias = dbias.mutable_data_ptr();
    }
    if (initial_states) {
      dinitial_states = torch::stable::new_empty(*initial_states, {states, p.dim, p.width - 1});
      p.dinitial_states = dinitial_states.mutable_data_ptr();
    }
    p.partials = partials(p);
    const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    partial = torch::stable::new_empty(x, {p.partials, p.width + 1, p.dim}, compute);
    p.partial = partial.mutable_data_ptr();
  }
};

using ForwardResult = std::tuple<Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

CallCounter fwd_cpu_calls("causal_conv1d", "cpu"), bwd_cpu_calls("causal_conv1d_bwd", "cpu");

ForwardResult fwd_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                      const OptionalTensor& initial_states, bool return_final_states, bool silu, const OptionalTensor& cu_seqlens) {
  Forward call(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens);
  causal_conv1d_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.y, call.final_states};
}

BackwardResult bwd_cpu(const Tensor& dy, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                       const OptionalTensor& cu_seqlens) {
  Backward call(dy, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens, &causal_conv1d_bwd_partials_cpu);
  causal_conv1d_bwd_cpu(call.p, kTorchParallel);
  bwd_cpu_calls.add();
  return {call.dx, call.dweight, call.dbias, call.dinitial_states};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&fwd_cpu));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&bwd_cpu));
}

#if defined(COBRA_WITH_CUDA)
CallCounter fwd_cuda_calls("causal_conv1d", "cuda"), bwd_cuda_calls("causal_conv1d_bwd", "cuda");

ForwardResult fwd_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
                       const OptionalTensor& initial_states, bool return_final_states, bool silu, const OptionalTensor& cu_seqlens) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forward call(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens);
  check_launch(causal_conv1d_fwd_cuda(call.p, current_stream(x, "causal_conv1d_fwd")), "causal_conv1d_fwd");
  fwd_cuda_calls.add();
  return {call.y, call.final_states};
}

BackwardResult bwd_cuda(const Tensor& dy, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                        const OptionalTensor& cu_seqlens) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Backward call(dy, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens, &causal_conv1d_bwd_partials_cuda);
  check_launch(causal_conv1d_bwd_cuda(call.p, current_stream(x, "causal_conv1d_bwd")), "causal_conv1d_bwd");
  bwd_cuda_calls.add();
  return {call.dx, call.dweight, call.dbias, call.dinitial_states};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&fwd_cuda));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&bwd_cuda));
}
#endif

}  // namespace
}  // namespace cobra
