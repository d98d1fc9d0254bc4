// causal_conv1d on numpy arrays. Outputs are the caller's arrays; states, weights' gradients and the workspace are contiguous.
#include "causal_conv1d/causal_conv1d.h"
#include "host/host.h"

namespace cobra::host {
namespace {

CausalConv1dInputs::Stride strides(const py::array& t, const char* name) {
  return {stride_of(t, 0, name), stride_of(t, 1, name), stride_of(t, 2, name)};
}

void set_inputs(CausalConv1dInputs& p, const py::array& x, const py::array& weight, const OptionalArray& bias, const OptionalArray& seq_idx,
                const OptionalArray& initial_states, bool silu, const OptionalArray& cu_seqlens) {
  p.batch = x.shape(0);
  p.dim = x.shape(1);
  p.seqlen = x.shape(2);
  p.silu = silu;
  p.x = pointer(x);
  p.x_dtype = dtype_of(x, "x");
  p.x_stride = strides(x, "x");
  set_filter(p, weight, bias);
  if (seq_idx) {
    p.seq_idx = pointer(*seq_idx);
    p.seq_idx_dtype = dtype_of(*seq_idx, "seq_idx");
    p.seq_idx_batch_stride = stride_of(*seq_idx, 0, "seq_idx");
    p.seq_idx_stride = stride_of(*seq_idx, 1, "seq_idx");
  }
  if (initial_states) {
    p.initial_states = pointer(*initial_states);
    p.initial_states_dtype = dtype_of(*initial_states, "initial_states");
    p.initial_states_stride = strides(*initial_states, "initial_states");
  }
  if (cu_seqlens) p.num_seqs = cu_seqlens->shape(0) - 1;
  set_index(cu_seqlens, "cu_seqlens", p.cu_seqlens, p.cu_seqlens_dtype, p.cu_seqlens_stride);
}

void forward(const std::string& device, const py::array& x, const py::array& weight, const OptionalArray& bias, const OptionalArray& seq_idx,
             const OptionalArray& initial_states, bool silu, const OptionalArray& cu_seqlens, const py::array& y,
             const OptionalArray& final_states) {
  CausalConv1dFwdParams p{};
  set_inputs(p, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens);
  p.y = pointer(y);
  p.y_stride = strides(y, "y");
  if (final_states) p.final_states = pointer(*final_states);
  run(device, p, &causal_conv1d_fwd_cpu, &causal_conv1d_fwd_cuda);
}

// make_partial(rows) gives the workspace, (rows, width + 1, dim) in the compute dtype: only the launcher knows how many rows it wants.
void backward(const std::string& device, const py::array& dy, const OptionalArray& dfinal_states, const py::array& x, const py::array& weight,
              const OptionalArray& bias, const OptionalArray& seq_idx, const OptionalArray& initial_states, bool silu,
              const OptionalArray& cu_seqlens, const py::array& dx, const py::array& dweight, const OptionalArray& dbias,
              const OptionalArray& dinitial_states, const py::function& make_partial) {
  CausalConv1dBwdParams p{};
  set_inputs(p, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens);
  p.dy = pointer(dy);
  p.dy_stride = strides(dy, "dy");
  if (dfinal_states) {
    p.dfinal_states = pointer(*dfinal_states);
    p.dfinal_states_stride = strides(*dfinal_states, "dfinal_states");
  }
  p.dx = pointer(dx);
  p.dx_stride = strides(dx, "dx");
  p.dweight = pointer(dweight);
  if (dbias) p.dbias = pointer(*dbias);
  if (dinitial_states) p.dinitial_states = pointer(*dinitial_states);
  p.partials = device == "cpu" ? causal_conv1d_bwd_partials_cpu(p) : causal_conv1d_bwd_partials_cuda(p);
  const py::array partial = make_partial(p.partials);
  if (partial.size() != p.partials * (p.width + 1) * p.dim) throw std::invalid_argument("partial has another size");
  p.partial = pointer(partial);
  run(device, p, &causal_conv1d_bwd_cpu, &causal_conv1d_bwd_cuda);
}

const Room room([](py::module_& m) {
  m.def("causal_conv1d", &forward);
  m.def("causal_conv1d_bwd", &backward);
});

}  // namespace
}  // namespace cobra::host
