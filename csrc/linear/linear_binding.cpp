// torch.ops.cobra_kernels.few_rows_linear: what linear.py calls for a step of decoding.
#include "common/tensor_args.h"
#include "linear/linear.h"

namespace cobra {
namespace {

constexpr const char* kOp = "few_rows_linear";

DType float_dtype_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Double, kOp, ": ", name, " is float64, expected float32, bfloat16 or float16");
  return dtype_of(t, kOp, name);
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  FewRowsLinearParams p{};
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x has ", x.dim(), " dims, expected 2");
  p.rows = x.size(0);
  p.in = x.size(1);
  p.x_row_stride = x.stride(0);
  p.x_stride = x.stride(1);
  p.x_dtype = float_dtype_of(x, "x");
  p.x = x.const_data_ptr();

  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": weight has ", weight.dim(), " dims, expected 2");
  p.out = weight.size(0);
  expect_sizes(weight, {p.out, p.in}, kOp, "weight");
  STD_TORCH_CHECK(weight.stride(1) == 1 || p.in <= 1, kOp, ": the columns of weight are not neighbours");
  expect_same_device(weight, x, kOp, "weight");
  p.weight_row_stride = weight.stride(0);
  p.weight_dtype = float_dtype_of(weight, "weight");
  p.weight = weight.const_data_ptr();
  if (bias) {
    expect_sizes(*bias, {p.out}, kOp, "bias");
    expect_same_device(*bias, x, kOp, "bias");
    p.bias_stride = bias->stride(0);
    p.bias_dtype = float_dtype_of(*bias, "bias");
    p.bias = bias->const_data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, {p.rows, p.out}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  few_rows_linear_cpu(p, kTorchParallel);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear)); }

}  // namespace
}  // namespace cobra
