// cobra_kernels_host: the CPU launchers and the emulated CUDA launchers (simt/) on numpy arrays, without torch.
// For tests and sanitizers. A room adds itself in host/<op>_host.cpp with one static `Room` and no other edit.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace cobra::host {

namespace py = pybind11;
using OptionalArray = std::optional<py::array>;

// Adds a room's functions when the module is imported.
struct Room {
  explicit Room(void (*add)(py::module_&));
};

// The threads of the next CPU kernel: one, or std::threads (set_threads in Python).
Parallel parallel();

// An array's element type; bf16 travels as uint16, which numpy has.
DType dtype_of(const py::array& array, const char* name);

// Strides in elements. Throws when numpy's byte strides are no multiple of the element.
int64_t stride_of(const py::array& array, py::ssize_t axis, const char* name);

// A writable pointer, for every argument: numpy's read-only flag would only hide a stray write that the tests look for.
inline void* pointer(const py::array& array) { return const_cast<void*>(array.data()); }

// weight (dim, width) and bias (dim,) of a convolution.
template <class Params>
void set_filter(Params& p, const py::array& weight, const OptionalArray& bias) {
  p.width = weight.shape(1);
  p.weight = pointer(weight);
  p.weight_dtype = dtype_of(weight, "weight");
  p.weight_dim_stride = stride_of(weight, 0, "weight");
  p.weight_width_stride = stride_of(weight, 1, "weight");
  if (!bias) return;
  p.bias = pointer(*bias);
  p.bias_dtype = dtype_of(*bias, "bias");
  p.bias_stride = stride_of(*bias, 0, "bias");
}

// A vector of indices, which may be absent.
inline void set_index(const OptionalArray& indices, const char* name, const void*& data, DType& dtype, int64_t& stride) {
  if (!indices) return;
  data = pointer(*indices);
  dtype = dtype_of(*indices, name);
  stride = stride_of(*indices, 0, name);
}

// Collects (..., dim) tensors of one shape as rows (common/rows.h), unmerged, so that tests reach every path.
class Rows {
 public:
  explicit Rows(const py::array& like);
  void add(const py::array& array, RowStride& stride, const char* name) const;
  const RowShape& shape() const { return shape_; }
  int64_t count() const;
  int64_t dim() const { return dim_; }

 private:
  RowShape shape_{};
  int64_t dim_;
};

// Runs a launcher without the GIL. `device` is "cpu" or "cuda"; the latter returns a cudaError_t, which becomes an exception.
template <class Params>
void run(const std::string& device, const Params& params, void (*cpu)(const Params&, const Parallel&), int (*cuda)(const Params&, void*)) {
  int error = 0;
  {
    const py::gil_scoped_release unlocked;
    if (device == "cpu")
      cpu(params, parallel());
    else if (device == "cuda")
      error = cuda(params, nullptr);
    else
      throw std::invalid_argument("device is \"" + device + "\", expected \"cpu\" or \"cuda\"");
  }
  if (error) throw std::runtime_error("launch failed with cudaError_t " + std::to_string(error));
}

}  // namespace cobra::host
