// causal_conv1d_update on numpy arrays; x and y are (batch, dim) or (batch, dim, steps). The caller owns y.
#include "causal_conv1d_update/causal_conv1d_update.h"
#include "host/host.h"

namespace cobra::host {
namespace {

CausalConv1dUpdateParams::Stride strides(const py::array& t, const char* name) {
  return {stride_of(t, 0, name), stride_of(t, 1, name), t.ndim() == 3 ? stride_of(t, 2, name) : 0};
}

void update(const std::string& device, const py::array& x, const py::array& state, const py::array& weight, const OptionalArray& bias,
            bool silu, const OptionalArray& cache_seqlens, const OptionalArray& indices, const py::array& y) {
  CausalConv1dUpdateParams p{};
  p.batch = x.shape(0);
  p.dim = x.shape(1);
  p.steps = x.ndim() == 3 ? x.shape(2) : 1;
  p.pool = state.shape(0);
  p.state_len = state.shape(2);
  p.silu = silu;
  p.x = pointer(x);
  p.x_dtype = dtype_of(x, "x");
  p.x_stride = strides(x, "x");
  set_filter(p, weight, bias);
  set_index(cache_seqlens, "cache_seqlens", p.cache_seqlens, p.cache_seqlens_dtype, p.cache_seqlens_stride);
  set_index(indices, "indices", p.indices, p.indices_dtype, p.indices_stride);
  p.y = pointer(y);
  p.y_stride = strides(y, "y");
  p.state = pointer(state);
  p.state_dtype = dtype_of(state, "state");
  p.state_stride = strides(state, "state");
  run(device, p, &causal_conv1d_update_cpu, &causal_conv1d_update_cuda);
}

const Room room([](py::module_& m) { m.def("causal_conv1d_update", &update); });

}  // namespace
}  // namespace cobra::host
