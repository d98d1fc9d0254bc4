// The projector's kernels on numpy arrays: contiguous, but for weights, biases and the features of the linear layer. Outputs are
// the caller's.
#include <tuple>
#include <vector>

#include "host/host.h"
#include "projector/projector.h"

namespace cobra::host {
namespace {

template <class Params>
void set_bias(Params& p, const OptionalArray& bias) {
  if (!bias) return;
  p.bias = pointer(*bias);
  p.bias_dtype = dtype_of(*bias, "bias");
  p.bias_stride = stride_of(*bias, 0, "bias");
}

// (whole_tiles, split, elements of the workspace) of a layer whose segments are `widths` wide.
std::tuple<int64_t, int, int64_t> linear_plan_of(int64_t rows, int64_t cols, const std::vector<int64_t>& widths, int64_t multiprocessors,
                                                 bool warpgroups) {
  LinearParams p{};
  p.rows = rows;
  p.cols = cols;
  p.warpgroups = warpgroups;
  for (const int64_t width : widths) p.width[p.segments++] = width;
  linear_plan(p, multiprocessors);
  return {p.whole_tiles, p.split, linear_workspace(p)};
}

void linear(const std::vector<py::array>& x, const py::array& weight, const OptionalArray& bias, const py::array& y, bool gelu, bool warpgroups,
            int64_t whole_tiles, int split, const OptionalArray& workspace) {
  LinearParams p{};
  p.rows = y.shape(0);
  p.cols = weight.shape(0);
  p.depth = weight.shape(1);
  p.gelu = gelu;
  p.warpgroups = warpgroups;
  for (const py::array& segment : x) {
    const Rows rows(segment);
    p.shape = rows.shape();
    p.width[p.segments] = rows.dim();
    p.x[p.segments] = pointer(segment);
    rows.add(segment, p.x_stride[p.segments++], "x");
  }
  p.dtype = dtype_of(weight, "weight");
  p.weight = pointer(weight);
  p.weight_stride = stride_of(weight, 0, "weight");
  set_bias(p, bias);
  p.y = pointer(y);
  p.whole_tiles = whole_tiles;
  p.split = split;
  if ((workspace ? workspace->size() : 0) != linear_workspace(p)) throw std::invalid_argument("workspace has another size");
  if (workspace) p.workspace = pointer(*workspace);
  run<LinearParams>("cuda", p, nullptr, &projector_linear_cuda);
}

// `like` gives the dtype that values are rounded to.
void bias_gelu(const std::string& device, const py::array& h, const OptionalArray& bias, const py::array& y, const py::array& like) {
  BiasGeluParams p{};
  p.rows = h.shape(0);
  p.cols = h.shape(1);
  p.h_dtype = dtype_of(h, "h");
  p.y_dtype = dtype_of(y, "y");
  p.round_dtype = dtype_of(like, "like");
  p.h = pointer(h);
  p.y = pointer(y);
  set_bias(p, bias);
  run(device, p, &projector_bias_gelu_cpu, &projector_bias_gelu_cuda);
}

void gelu_pool(const std::string& device, const py::array& hidden, const OptionalArray& bias, int64_t height, int64_t width, int64_t out_height,
               int64_t out_width, const py::array& pooled, const py::array& like, bool gelu) {
  GeluPoolParams p{};
  p.batch = hidden.shape(0);
  p.height = height;
  p.width = width;
  p.out_height = out_height;
  p.out_width = out_width;
  p.channels = hidden.shape(2);
  p.dtype = dtype_of(hidden, "hidden");
  p.pooled_dtype = dtype_of(pooled, "pooled");
  p.round_dtype = dtype_of(like, "like");
  p.gelu = gelu;
  p.hidden = pointer(hidden);
  p.pooled = pointer(pooled);
  set_bias(p, bias);
  run(device, p, &projector_gelu_pool_cpu, &projector_gelu_pool_cuda);
}

void peg(const std::string& device, const py::array& pooled, const py::array& weight, const OptionalArray& bias, int64_t height, int64_t width,
         const py::array& y) {
  PegParams p{};
  p.batch = pooled.shape(0);
  p.height = height;
  p.width = width;
  p.channels = pooled.shape(2);
  p.p = pointer(pooled);
  p.p_dtype = dtype_of(pooled, "pooled");
  p.weight = pointer(weight);
  p.weight_dtype = dtype_of(weight, "weight");
  p.weight_stride_channel = stride_of(weight, 0, "weight");
  p.weight_stride_row = stride_of(weight, 2, "weight");
  p.weight_stride_column = stride_of(weight, 3, "weight");
  p.y = pointer(y);
  p.y_dtype = dtype_of(y, "y");
  set_bias(p, bias);
  run(device, p, &projector_peg_cpu, &projector_peg_cuda);
}

const Room room([](py::module_& m) {
  m.def("projector_linear_plan", &linear_plan_of, py::arg("rows"), py::arg("cols"), py::arg("widths"), py::arg("multiprocessors"),
        py::arg("warpgroups"));
  m.def("projector_linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("gelu"), py::arg("warpgroups"),
        py::arg("whole_tiles"), py::arg("split"), py::arg("workspace"));
  m.def("projector_bias_gelu", &bias_gelu, py::arg("device"), py::arg("h"), py::arg("bias"), py::arg("y"), py::arg("like"));
  m.def("projector_gelu_pool", &gelu_pool, py::arg("device"), py::arg("hidden"), py::arg("bias"), py::arg("height"), py::arg("width"),
        py::arg("out_height"), py::arg("out_width"), py::arg("pooled"), py::arg("like"), py::arg("gelu"));
  m.def("projector_peg", &peg, py::arg("device"), py::arg("pooled"), py::arg("weight"), py::arg("bias"), py::arg("height"), py::arg("width"),
        py::arg("y"));
});

}  // namespace
}  // namespace cobra::host
