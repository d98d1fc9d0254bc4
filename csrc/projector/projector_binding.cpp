// The projector's passes as torch.ops.cobra_kernels.projector_*, for CPU tensors. op.py calls them between matrix products.
#include "common/tensor_args.h"
#include "projector/projector.h"

namespace cobra {
namespace {

DType as_dtype(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, op, ": not a float dtype");
  }
}

// The bias of any pass: (size,) or absent.
template <class Params>
void set_bias(Params& p, const OptionalTensor& bias, int64_t size, const Tensor& first, const char* op) {
  if (!bias) return;
  expect_sizes(*bias, {size}, op, "bias");
  expect_compute_dtype(*bias, first, op, "bias");
  p.bias = bias->const_data_ptr();
  p.bias_dtype = dtype_of(*bias, op, "bias");
  p.bias_stride = bias->stride(0);
}

void bias_gelu_cpu(const Tensor& h, const OptionalTensor& bias, ScalarType round_dtype) {
  const char* op = "projector_bias_gelu_";
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), op, ": h is not a contiguous matrix");
  BiasGeluParams p{};
  p.rows = h.size(0);
  p.cols = h.size(1);
  p.dtype = dtype_of(h, op, "h");
  p.round_dtype = as_dtype(round_dtype, op);
  p.h = h.mutable_data_ptr();
  set_bias(p, bias, p.cols, h, op);
  projector_bias_gelu_cpu(p, kTorchParallel);
}

Tensor gelu_pool_cpu(const Tensor& hidden, const OptionalTensor& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                     ScalarType round_dtype) {
  const char* op = "projector_gelu_pool";
  STD_TORCH_CHECK(hidden.dim() == 3 && hidden.is_contiguous(), op, ": hidden is not contiguous (batch, height * width, channels)");
  STD_TORCH_CHECK(height >= 1 && width >= 1 && out_height >= 1 && out_width >= 1 && hidden.size(1) == height * width, op,
                  ": the grid does not fit hidden");
  GeluPoolParams p{};
  p.batch = hidden.size(0);
  p.height = height;
  p.width = width;
  p.out_height = out_height;
  p.out_width = out_width;
  p.channels = hidden.size(2);
  p.dtype = dtype_of(hidden, op, "hidden");
  p.round_dtype = as_dtype(round_dtype, op);
  p.hidden = hidden.const_data_ptr();
  set_bias(p, bias, p.channels, hidden, op);
  Tensor pooled = torch::stable::new_empty(hidden, {p.batch, out_height * out_width, p.channels});
  p.pooled = pooled.mutable_data_ptr();
  projector_gelu_pool_cpu(p, kTorchParallel);
  return pooled;
}

Tensor peg_cpu(const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias, int64_t height, int64_t width, ScalarType out_dtype) {
  const char* op = "projector_peg";
  STD_TORCH_CHECK(pooled.dim() == 3 && pooled.is_contiguous(), op, ": pooled is not contiguous (batch, height * width, channels)");
  STD_TORCH_CHECK(height >= 1 && width >= 1 && pooled.size(1) == height * width, op, ": the grid does not fit pooled");
  PegParams p{};
  p.batch = pooled.size(0);
  p.height = height;
  p.width = width;
  p.channels = pooled.size(2);
  expect_sizes(weight, {p.channels, 1, 3, 3}, op, "weight");
  expect_compute_dtype(weight, pooled, op, "weight");
  p.p_dtype = dtype_of(pooled, op, "pooled");
  p.p = pooled.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.weight_dtype = dtype_of(weight, op, "weight");
  p.weight_stride_channel = weight.stride(0);
  p.weight_stride_row = weight.stride(2);
  p.weight_stride_column = weight.stride(3);
  set_bias(p, bias, p.channels, pooled, op);
  Tensor y = torch::stable::new_empty(pooled, {p.batch, height * width, p.channels}, out_dtype);
  expect_compute_dtype(y, pooled, op, "out_dtype");
  p.y = y.mutable_data_ptr();
  p.y_dtype = dtype_of(y, op, "y");
  projector_peg_cpu(p, kTorchParallel);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("projector_bias_gelu_", TORCH_BOX(&bias_gelu_cpu));
  m.impl("projector_gelu_pool", TORCH_BOX(&gelu_pool_cpu));
  m.impl("projector_peg", TORCH_BOX(&peg_cpu));
}

}  // namespace
}  // namespace cobra
