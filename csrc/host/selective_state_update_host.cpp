// selective_state_update on numpy arrays, Mamba-1 form without groups and multi-head form. The caller owns out.
#include "host/host.h"
#include "selective_state_update/selective_state_update.h"

namespace cobra::host {
namespace {

StateStride strides(const py::array& t, const char* name, bool multi_head, bool has_batch, bool has_dstate) {
  StateStride s{};
  py::ssize_t axis = 0;
  if (has_batch) s.batch = stride_of(t, axis++, name);
  if (multi_head) s.head = stride_of(t, axis++, name);
  s.dim = stride_of(t, axis++, name);
  if (has_dstate) s.dstate = stride_of(t, axis, name);
  return s;
}

void update(const std::string& device, const py::array& state, const py::array& x, const py::array& dt, const py::array& A, const py::array& B, const py::array& C,
            const OptionalArray& D, const OptionalArray& z, const OptionalArray& dt_bias, bool dt_softplus, const OptionalArray& indices,
            const py::array& out) {
  SelectiveStateUpdateParams p{};
  const bool heads = x.ndim() == 3;
  p.batch = x.shape(0);
  p.heads = heads ? x.shape(1) : 1;
  p.dim = x.shape(x.ndim() - 1);
  p.dstate = state.shape(state.ndim() - 1);
  p.groups = heads ? B.shape(1) : 1;
  p.pool = state.shape(0);
  p.dt_softplus = dt_softplus;
  const auto set = [&](const py::array& t, const char* name, auto*& data, DType& dtype, StateStride& stride, bool has_batch, bool has_dstate) {
    data = pointer(t);
    dtype = dtype_of(t, name);
    stride = strides(t, name, heads, has_batch, has_dstate);
  };
  set(state, "state", p.state, p.state_dtype, p.state_stride, true, true);
  set(x, "x", p.x, p.x_dtype, p.x_stride, true, false);
  set(dt, "dt", p.dt, p.dt_dtype, p.dt_stride, true, false);
  set(A, "A", p.A, p.A_dtype, p.A_stride, false, true);
  if (D) set(*D, "D", p.D, p.D_dtype, p.D_stride, false, false);
  if (z) set(*z, "z", p.z, p.z_dtype, p.z_stride, true, false);
  if (dt_bias) set(*dt_bias, "dt_bias", p.dt_bias, p.dt_bias_dtype, p.dt_bias_stride, false, false);
  const auto set_projected = [&](const py::array& t, const char* name, const void*& data, DType& dtype, StateStride& stride) {
    data = pointer(t);
    dtype = dtype_of(t, name);
    stride = {stride_of(t, 0, name), heads ? stride_of(t, 1, name) : 0, 0, stride_of(t, t.ndim() - 1, name)};
  };
  set_projected(B, "B", p.B, p.B_dtype, p.B_stride);
  set_projected(C, "C", p.C, p.C_dtype, p.C_stride);
  set_index(indices, "indices", p.indices, p.indices_dtype, p.indices_stride);
  p.out = pointer(out);
  p.out_stride = strides(out, "out", heads, true, false);
  run(device, p, &selective_state_update_cpu, &selective_state_update_cuda);
}

const Room room([](py::module_& m) { m.def("selective_state_update", &update); });

}  // namespace
}  // namespace cobra::host
