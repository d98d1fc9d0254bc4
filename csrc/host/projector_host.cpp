// The projector's passes on contiguous numpy arrays. Outputs are the caller's.
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

// `like` gives the dtype that values are rounded to.
void bias_gelu(const py::array& h, const OptionalArray& bias, const py::array& like) {
  BiasGeluParams p{};
  p.rows = h.shape(0);
  p.cols = h.shape(1);
  p.dtype = dtype_of(h, "h");
  p.round_dtype = dtype_of(like, "like");
  p.h = pointer(h);
  set_bias(p, bias);
  const py::gil_scoped_release unlocked;
  projector_bias_gelu_cpu(p, parallel());
}

void gelu_pool(const py::array& hidden, const OptionalArray& bias, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
               const py::array& pooled, const py::array& like) {
  GeluPoolParams p{};
  p.batch = hidden.shape(0);
  p.height = height;
  p.width = width;
  p.out_height = out_height;
  p.out_width = out_width;
  p.channels = hidden.shape(2);
  p.dtype = dtype_of(hidden, "hidden");
  p.round_dtype = dtype_of(like, "like");
  p.hidden = pointer(hidden);
  p.pooled = pointer(pooled);
  set_bias(p, bias);
  const py::gil_scoped_release unlocked;
  projector_gelu_pool_cpu(p, parallel());
}

void peg(const py::array& pooled, const py::array& weight, const OptionalArray& bias, int64_t height, int64_t width, const py::array& y) {
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
  const py::gil_scoped_release unlocked;
  projector_peg_cpu(p, parallel());
}

const Room room([](py::module_& m) {
  m.def("projector_bias_gelu", &bias_gelu);
  m.def("projector_gelu_pool", &gelu_pool);
  m.def("projector_peg", &peg);
});

}  // namespace
}  // namespace cobra::host
