// The projector's kernels on numpy arrays: contiguous, but for weights, biases, the features of the linear layer and the gradient that
// arrives. Outputs and workspaces are the caller's.
#include <algorithm>
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

// (whole_tiles, split, elements of the workspace, places) of a layer whose segments are `widths` wide.
std::tuple<int64_t, int, int64_t, int64_t> linear_plan_of(int64_t rows, int64_t cols, const std::vector<int64_t>& widths, int64_t multiprocessors,
                                                          int64_t shared_bytes, bool warpgroups) {
  LinearParams p{};
  p.rows = rows;
  p.cols = cols;
  p.warpgroups = warpgroups;
  for (const int64_t width : widths) p.width[p.segments++] = width;
  const int64_t places = linear_places(p, multiprocessors, shared_bytes);
  linear_plan(p, places);
  return {p.whole_tiles, p.split, linear_workspace(p), places};
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
  p.y_dtype = dtype_of(y, "y");
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

void set_output(const OptionalArray& array, const char* name, void*& data, DType& dtype) {
  if (!array) return;
  data = pointer(*array);
  dtype = dtype_of(*array, name);
}

// d (..., cols) and grid empty, or (batch, tokens, cols) with grid (height, width, out_height, out_width).
void gelu_bwd(const std::string& device, const py::array& d, const OptionalArray& sums, const OptionalArray& bias, const std::vector<int64_t>& grid,
              const OptionalArray& dz, const OptionalArray& dbias, const py::array& partial) {
  GeluBwdParams p{};
  const Rows rows(d);
  p.rows = rows.count();
  p.cols = rows.dim();
  if (grid.empty()) {
    p.shape = rows.shape();
    rows.add(d, p.d_stride, "d");
  } else {
    p.pool = true;
    p.height = grid[0], p.width = grid[1], p.out_height = grid[2], p.out_width = grid[3];
    p.rows = d.shape(0) * p.height * p.width;
  }
  p.d = pointer(d);
  p.d_dtype = dtype_of(d, "d");
  if (sums) p.sums = pointer(*sums);
  set_bias(p, bias);
  set_output(dz, "dz", p.dz, p.dz_dtype);
  set_output(dbias, "dbias", p.dbias, p.dbias_dtype);
  p.row_blocks = sum_blocks(p.rows, kGeluBwdRows);
  if (partial.size() != (dbias ? p.row_blocks * p.cols : 0)) throw std::invalid_argument("partial has another size");
  p.partial = pointer(partial);
  run(device, p, &projector_gelu_bwd_cpu, &projector_gelu_bwd_cuda);
}

void peg_bwd(const std::string& device, const py::array& dy, const OptionalArray& sums, const OptionalArray& p_bias, const py::array& weight,
             int64_t height, int64_t width, const OptionalArray& dp, const OptionalArray& dweight, const OptionalArray& dbias,
             const OptionalArray& dp_bias, const py::array& partial) {
  PegBwdParams p{};
  p.batch = dy.shape(0);
  p.height = height;
  p.width = width;
  p.channels = dy.shape(2);
  p.dy = pointer(dy);
  p.dy_dtype = dtype_of(dy, "dy");
  p.dy_stride_batch = stride_of(dy, 0, "dy");
  p.dy_stride_token = stride_of(dy, 1, "dy");
  p.dy_stride_channel = stride_of(dy, 2, "dy");
  if (sums) p.sums = pointer(*sums);
  if (p_bias) {
    p.p_bias = pointer(*p_bias);
    p.p_bias_dtype = dtype_of(*p_bias, "p_bias");
    p.p_bias_stride = stride_of(*p_bias, 0, "p_bias");
  }
  p.weight = pointer(weight);
  p.weight_dtype = dtype_of(weight, "weight");
  p.weight_stride_channel = stride_of(weight, 0, "weight");
  p.weight_stride_row = stride_of(weight, 2, "weight");
  p.weight_stride_column = stride_of(weight, 3, "weight");
  set_output(dp, "dp", p.dp, p.dp_dtype);
  set_output(dweight, "dweight", p.dweight, p.dweight_dtype);
  set_output(dbias, "dbias", p.dbias, p.dbias_dtype);
  set_output(dp_bias, "dp_bias", p.dp_bias, p.dp_bias_dtype);
  p.blocks = p.channels ? partial.size() / (std::max(peg_bwd_sums(p), 1) * p.channels) : 1;
  p.blocks = std::max<int64_t>(p.blocks, 1);
  if (partial.size() != peg_bwd_sums(p) * p.blocks * p.channels) throw std::invalid_argument("partial has another size");
  p.partial = pointer(partial);
  run(device, p, &projector_peg_bwd_cpu, &projector_peg_bwd_cuda);
}

const Room room([](py::module_& m) {
  m.def("projector_linear_plan", &linear_plan_of, py::arg("rows"), py::arg("cols"), py::arg("widths"), py::arg("multiprocessors"),
        py::arg("shared_bytes"), py::arg("warpgroups"));
  m.def("projector_linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("gelu"), py::arg("warpgroups"),
        py::arg("whole_tiles"), py::arg("split"), py::arg("workspace"));
  m.def("projector_bias_gelu", &bias_gelu, py::arg("device"), py::arg("h"), py::arg("bias"), py::arg("y"), py::arg("like"));
  m.def("projector_gelu_pool", &gelu_pool, py::arg("device"), py::arg("hidden"), py::arg("bias"), py::arg("height"), py::arg("width"),
        py::arg("out_height"), py::arg("out_width"), py::arg("pooled"), py::arg("like"), py::arg("gelu"));
  m.def("projector_peg", &peg, py::arg("device"), py::arg("pooled"), py::arg("weight"), py::arg("bias"), py::arg("height"), py::arg("width"),
        py::arg("y"));
  m.def("projector_sum_blocks", &sum_blocks, py::arg("rows"), py::arg("rows_per_block"));
  m.def("projector_gelu_bwd", &gelu_bwd, py::arg("device"), py::arg("d"), py::arg("sums"), py::arg("bias"), py::arg("grid"), py::arg("dz"),
        py::arg("dbias"), py::arg("partial"));
  m.def("projector_peg_bwd", &peg_bwd, py::arg("device"), py::arg("dy"), py::arg("sums"), py::arg("p_bias"), py::arg("weight"), py::arg("height"),
        py::arg("width"), py::arg("dp"), py::arg("dweight"), py::arg("dbias"), py::arg("dp_bias"), py::arg("partial"));
});

}  // namespace
}  // namespace cobra::host
