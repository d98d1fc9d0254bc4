// The projector's kernels as torch.ops.cobra_kernels.projector_*: what cpu_kernel.py and cuda_kernel.py build the ops from.
#include <tuple>
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
  expect_compute_dtype(y, h, op, "the result");
  p.h = h.const_data_ptr();
  p.y = y.mutable_data_ptr();
  set_bias(p, bias, p.cols, h, op);
  return p;
}

void bias_gelu_in_place_cpu(const Tensor& h, const OptionalTensor& bias, ScalarType round_dtype) {
  projector_bias_gelu_cpu(bias_gelu_params(h, bias, h, round_dtype, "projector_bias_gelu_"), kTorchParallel);
}

Tensor bias_gelu_cpu(const Tensor& h, const OptionalTensor& bias, ScalarType round_dtype, ScalarType dtype) {
  const char* op = "projector_bias_gelu";
  Tensor y = empty_like(h, dtype);
  projector_bias_gelu_cpu(bias_gelu_params(h, bias, y, round_dtype, op), kTorchParallel);
  return y;
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
    expect_compute_dtype(pooled, hidden, op, "the result");
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

// --- backward ---------------------------------------------------------------------------------------------------------

using OptionalDtype = std::optional<ScalarType>;  // of a result; without it the result is not wanted, and an empty tensor is returned

ScalarType compute_dtype(const Tensor& first) { return first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// A result of these sizes, with its pointer and dtype in the params; or an empty tensor and a null pointer.
Tensor make_result(const Tensor& first, const OptionalDtype& dtype, std::initializer_list<int64_t> sizes, void*& data, DType& data_dtype,
                   const char* op, const char* name) {
  if (!dtype) return torch::stable::new_empty(first, {0});
  Tensor result = torch::stable::new_empty(first, sizes, *dtype);
  expect_compute_dtype(result, first, op, name);
  data = result.mutable_data_ptr();
  data_dtype = dtype_of(result, op, name);
  return result;
}

// The sums of a layer before its bias: contiguous, compute dtype.
const void* sums_of(const Tensor& sums, const Tensor& first, const char* op) {
  expect_compute_dtype(sums, first, op, "sums");
  STD_TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == compute_dtype(first), op, ": sums is not contiguous in the compute dtype");
  return sums.const_data_ptr();
}

struct GeluBwd {
  GeluBwdParams p{};
  Tensor dz, dbias, partial;

  // Of rows: d (..., cols) with any strides, sums (rows, cols) or absent.
  GeluBwd(const Tensor& d, const OptionalTensor& sums, const OptionalTensor& bias, const OptionalDtype& dz_dtype, const OptionalDtype& dbias_dtype)
      : dz(d), dbias(d), partial(d) {
    const char* op = "projector_gelu_bwd";
    RowTensors rows(d);
    rows.add(d, &p.d_stride);
    p.shape = rows.merge();
    p.rows = row_count(p.shape);
    p.cols = rows.dim();
    if (sums) expect_sizes(*sums, {p.rows, p.cols}, op, "sums");
    STD_TORCH_CHECK(sums || !bias, op, ": a bias without sums");
    finish(d, sums, bias, dz_dtype, dbias_dtype, op);
  }
  // Of a pool: dpooled (batch, out_height * out_width, cols) contiguous, sums (batch, height * width, cols).
  GeluBwd(const Tensor& dpooled, const Tensor& sums, const OptionalTensor& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
          const OptionalDtype& dz_dtype, const OptionalDtype& dbias_dtype)
      : dz(dpooled), dbias(dpooled), partial(dpooled) {
    const char* op = "projector_gelu_pool_bwd";
    STD_TORCH_CHECK(dpooled.dim() == 3 && dpooled.is_contiguous(), op, ": dpooled is not contiguous (batch, out_height * out_width, channels)");
    STD_TORCH_CHECK(height >= 1 && width >= 1 && out_height >= 1 && out_width >= 1 && dpooled.size(1) == out_height * out_width, op,
                    ": the grid does not fit dpooled");
    p.pool = true;
    p.height = height;
    p.width = width;
    p.out_height = out_height;
    p.out_width = out_width;
    p.rows = dpooled.size(0) * height * width;
    p.cols = dpooled.size(2);
    expect_sizes(sums, {dpooled.size(0), height * width, p.cols}, op, "sums");
    finish(dpooled, sums, bias, dz_dtype, dbias_dtype, op);
  }

 private:
  void finish(const Tensor& d, const OptionalTensor& sums, const OptionalTensor& bias, const OptionalDtype& dz_dtype,
              const OptionalDtype& dbias_dtype, const char* op) {
    p.d = d.const_data_ptr();
    p.d_dtype = dtype_of(d, op, "d");
    if (sums) p.sums = sums_of(*sums, d, op);
    set_bias(p, bias, p.cols, d, op);
    dz = make_result(d, dz_dtype, {p.rows, p.cols}, p.dz, p.dz_dtype, op, "dz_dtype");
    dbias = make_result(d, dbias_dtype, {p.cols}, p.dbias, p.dbias_dtype, op, "dbias_dtype");
    p.row_blocks = sum_blocks(p.rows, kGeluBwdRows);
    partial = torch::stable::new_empty(d, {dbias_dtype ? p.row_blocks : 0, p.cols}, compute_dtype(d));
    p.partial = partial.mutable_data_ptr();
  }
};

struct PegBwd {
  PegBwdParams p{};
  Tensor dp, dweight, dbias, dp_bias, partial;

  PegBwd(const Tensor& dy, const OptionalTensor& sums, const OptionalTensor& p_bias, const Tensor& weight, int64_t height, int64_t width,
         const OptionalDtype& dp_dtype, const OptionalDtype& dweight_dtype, const OptionalDtype& dbias_dtype, const OptionalDtype& dp_bias_dtype,
         int64_t rows_per_block)
      : dp(dy), dweight(dy), dbias(dy), dp_bias(dy), partial(dy) {
    const char* op = "projector_peg_bwd";
    STD_TORCH_CHECK(dy.dim() == 3 && height >= 1 && width >= 1 && dy.size(1) == height * width, op, ": the grid does not fit dy");
    p.batch = dy.size(0);
    p.height = height;
    p.width = width;
    p.channels = dy.size(2);
    p.dy = dy.const_data_ptr();
    p.dy_dtype = dtype_of(dy, op, "dy");
    p.dy_stride_batch = dy.stride(0);
    p.dy_stride_token = dy.stride(1);
    p.dy_stride_channel = dy.stride(2);
    expect_sizes(weight, {p.channels, 1, 3, 3}, op, "weight");
    expect_compute_dtype(weight, dy, op, "weight");
    p.weight = weight.const_data_ptr();
    p.weight_dtype = dtype_of(weight, op, "weight");
    p.weight_stride_channel = weight.stride(0);
    p.weight_stride_row = weight.stride(2);
    p.weight_stride_column = weight.stride(3);
    STD_TORCH_CHECK(sums || !dweight_dtype, op, ": dweight needs the sums of the layer before");
    if (sums) {
      expect_same_sizes(*sums, dy, op, "sums");
      p.sums = sums_of(*sums, dy, op);
    }
    if (p_bias) {
      expect_sizes(*p_bias, {p.channels}, op, "p_bias");
      expect_compute_dtype(*p_bias, dy, op, "p_bias");
      p.p_bias = p_bias->const_data_ptr();
      p.p_bias_dtype = dtype_of(*p_bias, op, "p_bias");
      p.p_bias_stride = p_bias->stride(0);
    }
    dp = make_result(dy, dp_dtype, {p.batch, height * width, p.channels}, p.dp, p.dp_dtype, op, "dp_dtype");
    dweight = make_result(dy, dweight_dtype, {p.channels, 1, 3, 3}, p.dweight, p.dweight_dtype, op, "dweight_dtype");
    dbias = make_result(dy, dbias_dtype, {p.channels}, p.dbias, p.dbias_dtype, op, "dbias_dtype");
    dp_bias = make_result(dy, dp_bias_dtype, {p.channels}, p.dp_bias, p.dp_bias_dtype, op, "dp_bias_dtype");
    p.blocks = sum_blocks(p.batch * height, rows_per_block);
    partial = torch::stable::new_empty(dy, {int64_t(peg_bwd_sums(p)), p.blocks, p.channels}, compute_dtype(dy));
    p.partial = partial.mutable_data_ptr();
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {dp, dweight, dbias, dp_bias}; }
};

using GeluBwdResult = std::tuple<Tensor, Tensor>;
using PegBwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

GeluBwdResult gelu_bwd_cpu(const Tensor& d, const OptionalTensor& sums, const OptionalTensor& bias, const OptionalDtype& dz_dtype,
                           const OptionalDtype& dbias_dtype) {
  GeluBwd call(d, sums, bias, dz_dtype, dbias_dtype);
  projector_gelu_bwd_cpu(call.p, kTorchParallel);
  return {call.dz, call.dbias};
}

GeluBwdResult gelu_pool_bwd_cpu(const Tensor& dpooled, const Tensor& sums, const OptionalTensor& bias, int64_t height, int64_t width,
                                int64_t out_height, int64_t out_width, const OptionalDtype& dz_dtype, const OptionalDtype& dbias_dtype) {
  GeluBwd call(dpooled, sums, bias, height, width, out_height, out_width, dz_dtype, dbias_dtype);
  projector_gelu_bwd_cpu(call.p, kTorchParallel);
  return {call.dz, call.dbias};
}

// A CPU's blocks are whole images: a block stages its filter and writes its sums once.
PegBwdResult peg_bwd_cpu(const Tensor& dy, const OptionalTensor& sums, const OptionalTensor& p_bias, const Tensor& weight, int64_t height,
                         int64_t width, const OptionalDtype& dp_dtype, const OptionalDtype& dweight_dtype, const OptionalDtype& dbias_dtype,
                         const OptionalDtype& dp_bias_dtype) {
  PegBwd call(dy, sums, p_bias, weight, height, width, dp_dtype, dweight_dtype, dbias_dtype, dp_bias_dtype, height);
  projector_peg_bwd_cpu(call.p, kTorchParallel);
  return call.results();
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("projector_bias_gelu_", TORCH_BOX(&bias_gelu_in_place_cpu));
  m.impl("projector_bias_gelu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("projector_gelu_pool", TORCH_BOX(&gelu_pool_cpu));
  m.impl("projector_peg", TORCH_BOX(&peg_cpu));
  m.impl("projector_gelu_bwd", TORCH_BOX(&gelu_bwd_cpu));
  m.impl("projector_gelu_pool_bwd", TORCH_BOX(&gelu_pool_bwd_cpu));
  m.impl("projector_peg_bwd", TORCH_BOX(&peg_bwd_cpu));
}

#if defined(COBRA_WITH_CUDA)
// `warps`: by the kernel of every GPU, even where the warpgroups' runs. dtype: of the result, the weight's or fp32.
Tensor linear_cuda(const std::vector<Tensor>& x, const Tensor& weight, const OptionalTensor& bias, bool gelu, bool warps, const OptionalDtype& dtype) {
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
  Tensor y = torch::stable::new_empty(weight, sizes, dtype);
  p.y = y.mutable_data_ptr();
  p.y_dtype = dtype_of(y, op, "y");
  STD_TORCH_CHECK(p.y_dtype == p.dtype || p.y_dtype == DType::kFloat32, op, ": dtype is neither the weight's nor float32");
  const LinearDevice device = projector_linear_device_cuda();
  p.warpgroups = device.warpgroups && !warps;
  linear_plan(p, linear_places(p, device.multiprocessors, device.shared_bytes_per_multiprocessor));
  Tensor workspace = torch::stable::new_empty(weight, {linear_workspace(p)}, ScalarType::Float);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(projector_linear_cuda(p, current_stream(weight, op)), op);
  return y;
}

Tensor bias_gelu_cuda(const Tensor& h, const OptionalTensor& bias, ScalarType round_dtype, ScalarType dtype) {
  const char* op = "projector_bias_gelu";
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  Tensor y = empty_like(h, dtype);
  check_launch(projector_bias_gelu_cuda(bias_gelu_params(h, bias, y, round_dtype, op), current_stream(h, op)), op);
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

GeluBwdResult gelu_bwd_cuda(const Tensor& d, const OptionalTensor& sums, const OptionalTensor& bias, const OptionalDtype& dz_dtype,
                            const OptionalDtype& dbias_dtype) {
  const char* op = "projector_gelu_bwd";
  const torch::stable::accelerator::DeviceGuard guard(d.get_device_index());
  GeluBwd call(d, sums, bias, dz_dtype, dbias_dtype);
  check_launch(projector_gelu_bwd_cuda(call.p, current_stream(d, op)), op);
  return {call.dz, call.dbias};
}

GeluBwdResult gelu_pool_bwd_cuda(const Tensor& dpooled, const Tensor& sums, const OptionalTensor& bias, int64_t height, int64_t width,
                                 int64_t out_height, int64_t out_width, const OptionalDtype& dz_dtype, const OptionalDtype& dbias_dtype) {
  const char* op = "projector_gelu_pool_bwd";
  const torch::stable::accelerator::DeviceGuard guard(dpooled.get_device_index());
  GeluBwd call(dpooled, sums, bias, height, width, out_height, out_width, dz_dtype, dbias_dtype);
  check_launch(projector_gelu_bwd_cuda(call.p, current_stream(dpooled, op)), op);
  return {call.dz, call.dbias};
}

// A GPU's blocks are rows of the grid, so that one image fills it.
PegBwdResult peg_bwd_cuda(const Tensor& dy, const OptionalTensor& sums, const OptionalTensor& p_bias, const Tensor& weight, int64_t height,
                          int64_t width, const OptionalDtype& dp_dtype, const OptionalDtype& dweight_dtype, const OptionalDtype& dbias_dtype,
                          const OptionalDtype& dp_bias_dtype) {
  const char* op = "projector_peg_bwd";
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  PegBwd call(dy, sums, p_bias, weight, height, width, dp_dtype, dweight_dtype, dbias_dtype, dp_bias_dtype, 1);
  check_launch(projector_peg_bwd_cuda(call.p, current_stream(dy, op)), op);
  return call.results();
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) {
  m.impl("projector_linear", TORCH_BOX(&linear_cuda));
  m.impl("projector_bias_gelu", TORCH_BOX(&bias_gelu_cuda));
  m.impl("projector_pool", TORCH_BOX(&pool_cuda));
  m.impl("projector_peg", TORCH_BOX(&peg_cuda));
  m.impl("projector_gelu_bwd", TORCH_BOX(&gelu_bwd_cuda));
  m.impl("projector_gelu_pool_bwd", TORCH_BOX(&gelu_pool_bwd_cuda));
  m.impl("projector_peg_bwd", TORCH_BOX(&peg_bwd_cuda));
}
#endif

}  // namespace
}  // namespace cobra
