// causal_conv1d on numpy arrays. The caller owns y and final_states, which is contiguous.
#include "causal_conv1d/causal_conv1d.h"
#include "host/host.h"

namespace cobra::host {
namespace {

CausalConv1dFwdParams::Stride strides(const py::array& t, const char* name) {
  return {stride_of(t, 0, name), stride_of(t, 1, name), stride_of(t, 2, name)};
}

void forward(const std::string& device, const py::array& x, const py::array& weight, const OptionalArray& bias, const OptionalArray& seq_idx,
             const OptionalArray& initial_states, bool silu, const OptionalArray& cu_seqlens, const py::array& y,
             const OptionalArray& final_states) {
  CausalConv1dFwdParams p{};
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
  p.y = pointer(y);
  p.y_stride = strides(y, "y");
  if (final_states) p.final_states = pointer(*final_states);
  run(device, p, &causal_conv1d_fwd_cpu, &causal_conv1d_fwd_cuda);
}

const Room room([](py::module_& m) { m.def("causal_conv1d", &forward); });

}  // namespace
}  // namespace cobra::host
