// The only file that turns torch tensors into params: pointers, strides, dtypes, and the size checks that keep every access
// inside its tensor whoever calls the op. LibTorch Stable ABI only. The messages users see come from op.py, which checks first.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "common/call_counts.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

#if defined(COBRA_WITH_CUDA)
// Only libtorch_cuda exports it: null on a CPU build of torch, where no CUDA tensor can arrive.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
// Of the static cudart, whose header a binding does not need otherwise; an enum is an int to C.
extern "C" const char* cudaGetErrorName(int);
extern "C" const char* cudaGetErrorString(int);
#endif

namespace cobra {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of a float tensor. float64 is for the CPU alone: a CUDA kernel would take its halves for fp32.
inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double:
      STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " is float64, which no CUDA kernel serves");
      return DType::kFloat64;
    default: STD_TORCH_CHECK(false, op, ": ", name, " is not float32, bfloat16, float16 or float64");
  }
}

// `sizes` is what the kernel will index; a tensor of any other shape is refused.
inline void expect_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), op, ": ", name, " has ", t.dim(), " dims, expected ", sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(t.size(i) == size, op, ": ", name, " has size ", t.size(i), " at dim ", i, ", expected ", size);
    ++i;
  }
}
inline void expect_same_sizes(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == like.dim(), op, ": ", name, " has ", t.dim(), " dims, expected ", like.dim());
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) == like.size(i), op, ": ", name, " has size ", t.size(i), " at dim ", i, ", expected ", like.size(i));
}
inline void expect_same_device(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  const bool same = t.is_cpu() == first.is_cpu() && (t.is_cpu() || t.get_device_index() == first.get_device_index());
  STD_TORCH_CHECK(same, op, ": ", name, " is on another device than the first argument");
}
// One compute type per call: either no tensor is fp64 or every float tensor is.
inline void expect_compute_dtype(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double == (first.scalar_type() == ScalarType::Double), op, ": ", name, " mixes float64 with another dtype");
  expect_same_device(t, first, op, name);
}

// An index tensor: int32 or int64, on the device of x. Its values are not read here.
inline DType index_dtype(const char* op, const Tensor& t, const Tensor& x, const char* name) {
  expect_same_device(t, x, op, name);
  const bool is_long = t.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || t.scalar_type() == ScalarType::Int, op, ": ", name, " is not int32 or int64");
  return is_long ? DType::kInt64 : DType::kInt32;
}

// weight (dim, width) and bias (dim,) of the convolution rooms; p.dim and p.width are set before.
template <class Params>
void set_filter(Params& p, const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  expect_sizes(weight, {p.dim, p.width}, op, "weight");
  expect_compute_dtype(weight, x, op, "weight");
  p.weight = weight.const_data_ptr();
  p.weight_dtype = dtype_of(weight, op, "weight");
  p.weight_dim_stride = weight.stride(0);
  p.weight_width_stride = weight.stride(1);
  if (!bias) return;
  expect_sizes(*bias, {p.dim}, op, "bias");
  expect_compute_dtype(*bias, x, op, "bias");
  p.bias = bias->const_data_ptr();
  p.bias_dtype = dtype_of(*bias, op, "bias");
  p.bias_stride = bias->stride(0);
}

// torch.empty_like(t, dtype=dtype): keeps the layout.
inline Tensor empty_like(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(t), from(std::optional<ScalarType>(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Tensors of one shape (..., dim) as rows (rows.h). Leading dims that are contiguous in all of them are merged.
class RowTensors {
 public:
  explicit RowTensors(const Tensor& like) : like_(like) {
    STD_TORCH_CHECK(like.dim() >= 1, "a tensor with a channel dim is needed");
  }
  void add(const Tensor& t, RowStride* stride) {
    tensors_[count_] = &t;
    strides_[count_++] = stride;
  }
  int64_t dim() const { return like_.size(like_.dim() - 1); }

  // Fills the strides of every tensor added and returns the merged shape. Dims of size 1 do not count.
  RowShape merge() {
    int64_t sizes[kMaxDims], strides[kMaxTensors][kMaxDims];
    int n = 0;
    STD_TORCH_CHECK(like_.dim() <= kMaxDims, "at most ", kMaxDims, " dims are supported, got ", like_.dim());
    for (int64_t d = 0; d + 1 < like_.dim(); ++d) {
      const int64_t size = like_.size(d);
      if (size == 1) continue;
      bool contiguous = n > 0;
      for (int k = 0; k < count_ && contiguous; ++k) contiguous = strides[k][n - 1] == tensors_[k]->stride(d) * size;
      if (contiguous) {
        sizes[n - 1] *= size;
      } else {
        sizes[n++] = size;
      }
      for (int k = 0; k < count_; ++k) strides[k][n - 1] = tensors_[k]->stride(d);
    }
    if (n == 0) {
      sizes[n++] = 1;
      for (int k = 0; k < count_; ++k) strides[k][0] = 0;
    }
    STD_TORCH_CHECK(n <= kMaxRowDims, "at most ", kMaxRowDims, " leading dims that do not merge are supported, got ", n);
    RowShape shape{n, {}};
    for (int i = 0; i < n; ++i) shape.size[i] = sizes[i];
    for (int k = 0; k < count_; ++k) {
      for (int i = 0; i < n; ++i) strides_[k]->row[i] = strides[k][i];
      strides_[k]->dim = tensors_[k]->stride(like_.dim() - 1);
    }
    return shape;
  }

 private:
  static constexpr int kMaxTensors = 8, kMaxDims = 16;
  const Tensor& like_;
  const Tensor* tensors_[kMaxTensors];
  RowStride* strides_[kMaxTensors];
  int count_ = 0;
};

inline int64_t row_count(const RowShape& shape) {
  int64_t rows = 1;
  for (int i = 0; i < shape.ndim; ++i) rows *= shape.size[i];
  return rows;
}

// torch's threads: they follow torch.set_num_threads and survive fork.
inline void run_torch_parallel(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [body, context](int64_t b, int64_t e) { body(b, e, context); });
}
inline constexpr Parallel kTorchParallel{run_torch_parallel};

#if defined(COBRA_WITH_CUDA)
// The current stream of the tensor's device. Never the default stream by accident: no symbol, no launch.
inline void* current_stream(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": a CUDA tensor arrived but this torch exports no CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, op, ": torch gave no CUDA stream");
  return stream;
}
inline void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": the CUDA launch failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status));
}
#endif

}  // namespace cobra
