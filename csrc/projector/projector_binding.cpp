// The projector's kernels as torch.ops.cobra_kernels.projector_*: what cpu_kernel.py and cuda_kernel.py build the ops from.
#include <vector>

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

BiasGeluParams bias_gelu_params(const Tensor& h, const OptionalTensor& bias, const Tensor& y, ScalarType round_dtype, const char* op) {
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), op, ": h is not a contiguous matrix");
  BiasGeluParams p{};
  p.rows = h.size(0);
  p.cols = h.size(1);
  p.h_dtype = dtype_of(h, op, "h");
  p.y_dtype = dtype_of(y, op, "y");
  p.round_dtype = as_dtype(round_dtype, op);
  p.h = h.const_data_ptr();
  p.y = y.mutable_data_ptr();
  set_bias(p, bias, p.cols, h, op);
  return p;
}

void bias_gelu_cpu(const Tensor& h, const OptionalTensor& bias, ScalarType round_dtype) {
  projector_bias_gelu_cpu(bias_gelu_params(h, bias, h, round_dtype, "projector_bias_gelu_"), kTorchParallel);
}

struct GeluPool {
  GeluPoolParams p{};
  Tensor pooled;

  // `gelu`: hidden + bias goes through GELU first; else it is pooled as it is. pooled_dtype: of the result, the dtype of hidden on a CPU.
  GeluPool(const Tensor& hidden, const OptionalTensor& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
           ScalarType pooled_dtype, ScalarType round_dtype, bool gelu, const char* op)
      : pooled(torch::stable::new_empty(hidden, {hidden.size(0), out_height * out_width, hidden.size(2)}, pooled_dtype)) {
    p.batch = hidden.size(0);
    p.height = height;
    p.width = width;
    p.out_height = out_height;
    p.out_width = out_width;
    p.channels = hidden.size(2);
    p.dtype = dtype_of(hidden, op, "hidden");
    p.pooled_dtype = dtype_of(pooled, op, "pooled");
    p.round_dtype = as_dtype(round_dtype, op);
    p.gelu = gelu;
    p.hidden = hidden.const_data_ptr();
    p.pooled = pooled.mutable_data_ptr();
    set_bias(p, bias, p.channels, hidden, op);
  }

  static void check(const Tensor& hidden, int64_t height, int64_t width, int64_t out_height, int64_t out_width, const char* op) {
    STD_TORCH_CHECK(hidden.dim() == 3 && hidden.is_contiguous(), op, ": hidden is not contiguous (batch, height * width, channels)");
    STD_TORCH_CHECK(height >= 1 && width >= 1 && out_height >= 1 && out_width >= 1 && hidden.size(1) == height * width, op,
                    ": the grid does not fit hidden");
  }
};

Tensor gelu_pool_cpu(const Tensor& hidden, const OptionalTensor& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                     ScalarType round_dtype) {
  const char* op = "projector_gelu_pool";
  GeluPool::check(hidden, height, width, out_height, out_width, op);
  GeluPool call(hidden, bias, height, width, out_height, out_width, hidden.scalar_type(), round_dtype, true, op);
  projector_gelu_pool_cpu(call.p, kTorchParallel);
  return call.pooled;
}

struct Peg {
  PegParams p{};
  Tensor y;

  Peg(const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias, int64_t height, int64_t width, ScalarType out_dtype, const char* op)
      : y(torch::stable::new_empty(pooled, {pooled.size(0), height * width, pooled.size(2)}, out_dtype)) {
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
    expect_compute_dtype(y, pooled, op, "out_dtype");
    p.y = y.mutable_data_ptr();
    p.y_dtype = dtype_of(y, op, "y");
  }

  static void check(const Tensor& pooled, int64_t height, int64_t width, const char* op) {
    STD_TORCH_CHECK(pooled.dim() == 3 && pooled.is_contiguous(), op, ": pooled is not contiguous (batch, height * width, channels)");
    STD_TORCH_CHECK(height >= 1 && width >= 1 && pooled.size(1) == height * width, op, ": the grid does not fit pooled");
  }
};

Tensor peg_cpu(const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias, int64_t height, int64_t width, ScalarType out_dtype) {
  Peg::check(pooled, height, width, "projector_peg");
  Peg call(pooled, weight, bias, height, width, out_dtype, "projector_peg");
  projector_peg_cpu(call.p, kTorchParallel);
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("projector_bias_gelu_", TORCH_BOX(&bias_gelu_cpu));
  m.impl("projector_gelu_pool", TORCH_BOX(&gelu_pool_cpu));
  m.impl("projector_peg", TORCH_BOX(&peg_cpu));
}

#if defined(COBRA_WITH_CUDA)
// `warps`: by the kernel of every GPU, even where the warpgroups' runs.
Tensor linear_cuda(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias, bool gelu, bool warps) {
  const char* op = "projector_linear";
  STD_TORCH_CHECK(!x.empty() && x.size() <= size_t(kMaxSegments), op, ": x has ", x.size(), " segments, expected 1 to ", kMaxSegments);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  LinearParams p{};
  p.dtype = dtype_of(weight, op, "weight");
  p.gelu = gelu;
  const auto expect_aligned = [&](const Tensor& t, const char* name) {
    bool aligned = t.dim() >= 1 && (t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1) && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    for (int64_t d = 0; d < t.dim(); ++d) aligned = aligned && (d == t.dim() - 1 ? t.size(d) : t.size(d) == 1 ? 0 : t.stride(d)) % 8 == 0;
    STD_TORCH_CHECK(aligned, op, ": ", name, " does not lie in rows of whole 16-byte pieces");
    STD_TORCH_CHECK((p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && dtype_of(t, op, name) == p.dtype, op, ": ", name,
                    " is not bf16 or fp16, as the weight");
    STD_TORCH_CHECK(!t.is_cpu() && t.get_device_index() == weight.get_device_index(), op, ": ", name, " is on another device than weight");
  };
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x[0].dim(); ++d) sizes.push_back(x[0].size(d));
  RowTensors rows(x[0]);
  for (const Tensor& segment : x) {
    expect_aligned(segment, "x");
    STD_TORCH_CHECK(segment.dim() == x[0].dim(), op, ": the segments of x have different shapes");
    for (size_t d = 0; d < sizes.size(); ++d) STD_TORCH_CHECK(segment.size(d) == sizes[d], op, ": the segments of x have different shapes");
    const int64_t width = segment.size(segment.dim() - 1);
    if (width == 0) continue;
    p.depth += width;
    p.width[p.segments] = width;
    p.x[p.segments] = segment.const_data_ptr();
    rows.add(segment, &p.x_stride[p.segments++]);
  }
  p.shape = rows.merge();
  p.rows = row_count(p.shape);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight is not a matrix");
  p.cols = weight.size(0);
  expect_sizes(weight, {p.cols, p.depth}, op, "weight");
  expect_aligned(weight, "weight");
  p.weight = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  set_bias(p, bias, p.cols, weight, op);
  sizes.push_back(p.cols);
  Tensor y = torch::stable::new_empty(weight, sizes);
  p.y = y.mutable_data_ptr();
  const LinearDevice device = projector_linear_device_cuda();
  p.warpgroups = device.warpgroups && !warps;
  linear_plan(p, device.multiprocessors);
  Tensor workspace = torch::stable::new_empty(weight, {linear_workspace(p)}, ScalarType::Float);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(projector_linear_cuda(p, current_stream(weight, op)), op);
  return y;
}

Tensor bias_gelu_cuda(const Tensor& h, const OptionalTensor& bias, ScalarType dtype) {
  const char* op = "projector_bias_gelu";
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  Tensor y = empty_like(h, dtype);
  check_launch(projector_bias_gelu_cuda(bias_gelu_params(h, bias, y, dtype, op), current_stream(h, op)), op);
  return y;
}

Tensor pool_cuda(const Tensor& hidden, const OptionalTensor& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width, bool gelu,
                 ScalarType dtype) {
  const char* op = "projector_pool";
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  GeluPool::check(hidden, height, width, out_height, out_width, op);
  GeluPool call(hidden, bias, height, width, out_height, out_width, dtype, dtype, gelu, op);
  check_launch(projector_gelu_pool_cuda(call.p, current_stream(hidden, op)), op);
  return call.pooled;
}

Tensor peg_cuda(const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias, int64_t height, int64_t width, ScalarType out_dtype) {
  const torch::stable::accelerator::DeviceGuard guard(pooled.get_device_index());
  Peg::check(pooled, height, width, "projector_peg");
  Peg call(pooled, weight, bias, height, width, out_dtype, "projector_peg");
  check_launch(projector_peg_cuda(call.p, current_stream(pooled, "projector_peg")), "projector_peg");
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) {
  m.impl("projector_linear", TORCH_BOX(&linear_cuda));
  m.impl("projector_bias_gelu", TORCH_BOX(&bias_gelu_cuda));
  m.impl("projector_pool", TORCH_BOX(&pool_cuda));
  m.impl("projector_peg", TORCH_BOX(&peg_cuda));
}
#endif

}  // namespace
}  // namespace cobra
