// few_rows_linear on numpy arrays; the output is the caller's. A GPU has no kernel of its own for it.
#include "host/host.h"
#include "linear/linear.h"

namespace cobra::host {
namespace {

void few_rows_linear(const py::array& x, const py::array& weight, const OptionalArray& bias, const py::array& y) {
  FewRowsLinearParams p{};
  p.rows = x.shape(0);
  p.in = x.shape(1);
  p.out = weight.shape(0);
  p.x = pointer(x);
  p.x_dtype = dtype_of(x, "x");
  p.x_row_stride = stride_of(x, 0, "x");
  p.x_stride = stride_of(x, 1, "x");
  p.weight = pointer(weight);
  p.weight_dtype = dtype_of(weight, "weight");
  p.weight_row_stride = stride_of(weight, 0, "weight");
  if (bias) {
    p.bias = pointer(*bias);
    p.bias_dtype = dtype_of(*bias, "bias");
    p.bias_stride = stride_of(*bias, 0, "bias");
  }
  p.y = pointer(y);
  const py::gil_scoped_release unlocked;
  few_rows_linear_cpu(p, parallel());
}

const Room room([](py::module_& m) { m.def("few_rows_linear", &few_rows_linear); });

}  // namespace
}  // namespace cobra::host
