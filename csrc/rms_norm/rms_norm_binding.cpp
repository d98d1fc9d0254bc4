// rms_norm_fwd and rms_norm_bwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <tuple>

#include "common/tensor_args.h"
#include "rms_norm/rms_norm.h"

namespace cobra {
namespace {

// Fills the part of the params that forward and backward share, and adds x and residual to `rows`.
template <class Params>
void set_inputs(Params& p, RowTensors& rows, const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                double eps, bool is_rms_norm) {
  p.dim = rows.dim();
  p.eps = eps;
  p.is_rms_norm = is_rms_norm;
  expect_sizes(weight, {p.dim}, op, "weight");
  expect_compute_dtype(weight, x, op, "weight");
  p.x = x.const_data_ptr();
  p.x_dtype = dtype_of(x, op, "x");
  p.weight = weight.const_data_ptr();
  p.weight_dtype = dtype_of(weight, op, "weight");
  p.weight_stride = weight.stride(0);
  rows.add(x, &p.x_stride);
  if (residual) {
    expect_same_sizes(*residual, x, op, "residual");
    expect_compute_dtype(*residual, x, op, "residual");
    p.residual = residual->const_data_ptr();
    p.residual_dtype = dtype_of(*residual, op, "residual");
    rows.add(*residual, &p.residual_stride);
  }
}

struct Forward {
  RmsNormFwdParams p{};
  Tensor y, s;

  // s_dtype: dtype of the returned sum; without it the sum is not stored and an empty tensor is returned in its place.
  Forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
          const std::optional<ScalarType>& s_dtype, double eps, bool is_rms_norm)
      : y(torch::stable::empty_like(x)), s(s_dtype ? empty_like(x, *s_dtype) : torch::stable::new_empty(x, {0})) {
    const char* op = "rms_norm_fwd";
    RowTensors rows(x);
    set_inputs(p, rows, op, x, weight, residual, eps, is_rms_norm);
    if (bias) {
      expect_sizes(*bias, {p.dim}, op, "bias");
      expect_compute_dtype(*bias, x, op, "bias");
      p.bias = bias->const_data_ptr();
      p.bias_dtype = dtype_of(*bias, op, "bias");
      p.bias_stride = bias->stride(0);
    }
    p.y = y.mutable_data_ptr();
    rows.add(y, &p.y_stride);
    if (s_dtype) {
      STD_TORCH_CHECK((*s_dtype == ScalarType::Double) == (x.scalar_type() == ScalarType::Double), op, ": s_dtype mixes float64 with another dtype");
      p.s = s.mutable_data_ptr();
      p.s_dtype = dtype_of(s, op, "s");
      rows.add(s, &p.s_stride);
    }
    p.shape = rows.merge();
    p.rows = row_count(p.shape);
  }
};

struct Backward {
  RmsNormBwdParams p{};
  Tensor dx, dresidual, dweight, dbias, partial;

  Backward(const Tensor& dy, const OptionalTensor& ds, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
           const OptionalTensor& residual, double eps, bool is_rms_norm)
      : dx(torch::stable::empty_like(x)),
        dresidual(residual ? torch::stable::empty_like(*residual) : torch::stable::new_empty(x, {0})),
        dweight(torch::stable::new_empty(weight, {weight.size(0)})),
        dbias(bias ? torch::stable::new_empty(*bias, {bias->size(0)}) : torch::stable::new_empty(x, {0})) {
    const char* op = "rms_norm_bwd";
    RowTensors rows(x);
    set_inputs(p, rows, op, x, weight, residual, eps, is_rms_norm);
    expect_same_sizes(dy, x, op, "dy");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy has another dtype than x");
    p.dy = dy.const_data_ptr();
    rows.add(dy, &p.dy_stride);
    if (ds) {
      expect_same_sizes(*ds, x, op, "ds");
      expect_compute_dtype(*ds, x, op, "ds");
      p.ds = ds->const_data_ptr();
      p.ds_dtype = dtype_of(*ds, op, "ds");
      rows.add(*ds, &p.ds_stride);
    }
    p.dx = dx.mutable_data_ptr();
    rows.add(dx, &p.dx_stride);
    if (residual) {
      p.dresidual = dresidual.mutable_data_ptr();
      rows.add(dresidual, &p.dresidual_stride);
    }
    p.shape = rows.merge();
    p.rows = row_count(p.shape);
    p.row_blocks = x.is_cpu() ? rms_norm_bwd_row_blocks(p.rows) : rms_norm_bwd_row_blocks_cuda(p.rows, p.dim);
    const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    partial = torch::stable::new_empty(x, {int64_t(bias ? 2 : 1), p.row_blocks, p.dim}, compute);
    p.partial = partial.mutable_data_ptr();
    p.dweight = dweight.mutable_data_ptr();
    if (bias) {
      expect_sizes(*bias, {p.dim}, op, "bias");
      expect_compute_dtype(*bias, x, op, "bias");
      p.dbias = dbias.mutable_data_ptr();
      p.bias_dtype = dtype_of(*bias, op, "bias");
    }
  }
};

using ForwardResult = std::tuple<Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

CallCounter fwd_cpu_calls("rms_norm", "cpu"), bwd_cpu_calls("rms_norm_bwd", "cpu");

ForwardResult fwd_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      const std::optional<ScalarType>& s_dtype, double eps, bool is_rms_norm) {
  Forward call(x, weight, bias, residual, s_dtype, eps, is_rms_norm);
  rms_norm_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.y, call.s};
}

BackwardResult bwd_cpu(const Tensor& dy, const OptionalTensor& ds, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, double eps, bool is_rms_norm) {
  Backward call(dy, ds, x, weight, bias, residual, eps, is_rms_norm);
  rms_norm_bwd_cpu(call.p, kTorchParallel);
  bwd_cpu_calls.add();
  return {call.dx, call.dresidual, call.dweight, call.dbias};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&bwd_cpu));
}

#if defined(COBRA_WITH_CUDA)
CallCounter fwd_cuda_calls("rms_norm", "cuda"), bwd_cuda_calls("rms_norm_bwd", "cuda");

ForwardResult fwd_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                       const std::optional<ScalarType>& s_dtype, double eps, bool is_rms_norm) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Forward call(x, weight, bias, residual, s_dtype, eps, is_rms_norm);
  check_launch(rms_norm_fwd_cuda(call.p, current_stream(x, "rms_norm_fwd")), "rms_norm_fwd");
  fwd_cuda_calls.add();
  return {call.y, call.s};
}

BackwardResult bwd_cuda(const Tensor& dy, const OptionalTensor& ds, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, double eps, bool is_rms_norm) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Backward call(dy, ds, x, weight, bias, residual, eps, is_rms_norm);
  check_launch(rms_norm_bwd_cuda(call.p, current_stream(x, "rms_norm_bwd")), "rms_norm_bwd");
  bwd_cuda_calls.add();
  return {call.dx, call.dresidual, call.dweight, call.dbias};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&bwd_cuda));
}
#endif

}  // namespace
}  // namespace cobra
