// rms_norm on numpy arrays. Outputs are the caller's arrays, so that tests choose their layout, filling and guards.
#include "host/host.h"
#include "rms_norm/rms_norm.h"

namespace cobra::host {
namespace {

template <class Params>
Rows set_inputs(Params& p, const py::array& x, const py::array& weight, const OptionalArray& residual, double eps, bool is_rms_norm) {
  Rows rows(x);
  p.rows = rows.count();
  p.dim = rows.dim();
  p.shape = rows.shape();
  p.eps = eps;
  p.is_rms_norm = is_rms_norm;
  p.x = pointer(x);
  p.x_dtype = dtype_of(x, "x");
  rows.add(x, p.x_stride, "x");
  p.weight = pointer(weight);
  p.weight_dtype = dtype_of(weight, "weight");
  p.weight_stride = stride_of(weight, 0, "weight");
  if (residual) {
    p.residual = pointer(*residual);
    p.residual_dtype = dtype_of(*residual, "residual");
    rows.add(*residual, p.residual_stride, "residual");
  }
  return rows;
}

void fwd(const std::string& device, const py::array& x, const py::array& weight, const OptionalArray& bias, const OptionalArray& residual,
         const py::array& y, const OptionalArray& s, double eps, bool is_rms_norm) {
  RmsNormFwdParams p{};
  const Rows rows = set_inputs(p, x, weight, residual, eps, is_rms_norm);
  if (bias) {
    p.bias = pointer(*bias);
    p.bias_dtype = dtype_of(*bias, "bias");
    p.bias_stride = stride_of(*bias, 0, "bias");
  }
  p.y = pointer(y);
  rows.add(y, p.y_stride, "y");
  if (s) {
    p.s = pointer(*s);
    p.s_dtype = dtype_of(*s, "s");
    rows.add(*s, p.s_stride, "s");
  }
  run(device, p, &rms_norm_fwd_cpu, &rms_norm_fwd_cuda);
}

int64_t row_blocks(const std::string& device, int64_t rows, int64_t dim) {
  return device == "cuda" ? rms_norm_bwd_row_blocks_cuda(rows, dim) : rms_norm_bwd_row_blocks(rows);
}

// partial: (2 | 1, row_blocks, dim) in the compute dtype; 2 with dbias.
void bwd(const std::string& device, const py::array& dy, const OptionalArray& ds, const py::array& x, const OptionalArray& residual,
         const py::array& weight, const py::array& dx, const OptionalArray& dresidual, const py::array& dweight,
         const OptionalArray& dbias, const py::array& partial, double eps, bool is_rms_norm) {
  RmsNormBwdParams p{};
  const Rows rows = set_inputs(p, x, weight, residual, eps, is_rms_norm);
  p.dy = pointer(dy);
  rows.add(dy, p.dy_stride, "dy");
  if (ds) {
    p.ds = pointer(*ds);
    p.ds_dtype = dtype_of(*ds, "ds");
    rows.add(*ds, p.ds_stride, "ds");
  }
  p.dx = pointer(dx);
  rows.add(dx, p.dx_stride, "dx");
  if (dresidual) {
    p.dresidual = pointer(*dresidual);
    rows.add(*dresidual, p.dresidual_stride, "dresidual");
  }
  p.dweight = pointer(dweight);
  if (dbias) {
    p.dbias = pointer(*dbias);
    p.bias_dtype = dtype_of(*dbias, "dbias");
  }
  p.row_blocks = row_blocks(device, p.rows, p.dim);
  if (partial.size() != (dbias ? 2 : 1) * p.row_blocks * p.dim) throw std::invalid_argument("partial has another size");
  p.partial = pointer(partial);
  run(device, p, &rms_norm_bwd_cpu, &rms_norm_bwd_cuda);
}

const Room room([](py::module_& m) {
  m.def("rms_norm_fwd", &fwd, py::arg("device"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("y"),
        py::arg("s"), py::arg("eps"), py::arg("is_rms_norm"));
  m.def("rms_norm_bwd", &bwd, py::arg("device"), py::arg("dy"), py::arg("ds"), py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"), py::arg("partial"), py::arg("eps"),
        py::arg("is_rms_norm"));
  m.def("rms_norm_bwd_row_blocks", &row_blocks, py::arg("device"), py::arg("rows"), py::arg("dim"));
});

}  // namespace
}  // namespace cobra::host
