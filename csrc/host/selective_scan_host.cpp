// selective_scan on numpy arrays. B and C are (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen).
// The caller owns out, last_state and states, which are contiguous (states may be None), and `line`, the zeroed workspace of
// `line_workers`. `multiprocessors`: of the GPU that is emulated. The device "cuda_mma" is the tensor-core kernel, and an error where it does not serve.
#include <cstring>

#include "host/host.h"
#include "selective_scan/scan_line.h"
#include "selective_scan/selective_scan.h"

namespace cobra {  // selective_scan_cuda.cuh
bool mma_serves(const SelectiveScanFwdParams& p);
int selective_scan_fwd_mma(const SelectiveScanFwdParams& p, void* stream);
int64_t mma_line_workers(const SelectiveScanFwdParams& p);
}  // namespace cobra

namespace cobra::host {
namespace {

SequenceStride sequence_stride(const py::array& t, const char* name) { return {stride_of(t, 0, name), stride_of(t, 1, name), stride_of(t, 2, name)}; }
ScanStateStride state_stride(const py::array& t, const char* name) { return {stride_of(t, 0, name), stride_of(t, 1, name), stride_of(t, 2, name)}; }
ProjectionStride projection_stride(const py::array& t, const char* name) {
  const auto s = [&](py::ssize_t axis) { return stride_of(t, axis, name); };
  return t.ndim() == 2 ? ProjectionStride{0, s(0), s(1), 0, 1} : t.ndim() == 3 ? ProjectionStride{s(0), 0, s(1), s(2), 1} : ProjectionStride{s(0), s(1), s(2), s(3), t.shape(1)};
}
void set(const py::array& t, const char* name, const void*& data, DType& dtype) {
  data = pointer(t);
  dtype = dtype_of(t, name);
}

void set_inputs(SelectiveScanInputs& p, const py::array& u, const py::array& delta, const py::array& A, const py::array& B, const py::array& C, const OptionalArray& D,
                const OptionalArray& z, const OptionalArray& delta_bias, bool delta_softplus, const OptionalArray& initial_state, const OptionalArray& cu_seqlens) {
  p.batch = u.shape(0);
  p.dim = u.shape(1);
  p.seqlen = u.shape(2);
  p.dstate = A.shape(1);
  p.delta_softplus = delta_softplus;
  set(u, "u", p.u, p.u_dtype);
  p.u_stride = sequence_stride(u, "u");
  set(delta, "delta", p.delta, p.delta_dtype);
  p.delta_stride = sequence_stride(delta, "delta");
  if (z) {
    set(*z, "z", p.z, p.z_dtype);
    p.z_stride = sequence_stride(*z, "z");
  }
  set(A, "A", p.A, p.A_dtype);
  p.A_stride = {0, stride_of(A, 0, "A"), stride_of(A, 1, "A")};
  set(B, "B", p.B, p.B_dtype);
  p.B_stride = projection_stride(B, "B");
  p.B_constant = B.ndim() == 2;
  set(C, "C", p.C, p.C_dtype);
  p.C_stride = projection_stride(C, "C");
  p.C_constant = C.ndim() == 2;
  if (D) {
    set(*D, "D", p.D, p.D_dtype);
    p.D_stride = stride_of(*D, 0, "D");
  }
  if (delta_bias) {
    set(*delta_bias, "delta_bias", p.delta_bias, p.delta_bias_dtype);
    p.delta_bias_stride = stride_of(*delta_bias, 0, "delta_bias");
  }
  if (initial_state) {
    set(*initial_state, "initial_state", p.initial_state, p.initial_state_dtype);
    p.initial_state_stride = state_stride(*initial_state, "initial_state");
  }
  if (cu_seqlens) p.num_seqs = cu_seqlens->shape(0) - 1;
  set_index(cu_seqlens, "cu_seqlens", p.cu_seqlens, p.cu_seqlens_dtype, p.cu_seqlens_stride);
}

void forward(const std::string& device, const py::array& u, const py::array& delta, const py::array& A, const py::array& B, const py::array& C, const OptionalArray& D,
             const OptionalArray& z, const OptionalArray& delta_bias, bool delta_softplus, const OptionalArray& initial_state, const OptionalArray& cu_seqlens,
             const py::array& out, const py::array& last_state, int multiprocessors, int64_t line_workers, const OptionalArray& line, const OptionalArray& states) {
  SelectiveScanFwdParams p{};
  set_inputs(p, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  p.multiprocessors = multiprocessors;
  p.line_workers = line_workers;
  if (line_workers) {
    if (!line || line->size() < selective_scan_line_words(line_workers)) throw std::invalid_argument("line has another size");
    p.line = static_cast<unsigned*>(pointer(*line));
  }
  p.out = pointer(out);
  p.out_stride = sequence_stride(out, "out");
  p.last_state = pointer(last_state);
  if (states) {
    if (states->size() != p.batch * state_slots(p) * p.dstate * p.dim) throw std::invalid_argument("states has another size");
    p.states = pointer(*states);
  }
  const bool mma = device == "cuda_mma";
  if (mma && !mma_serves(p)) throw std::invalid_argument("the tensor-core kernel does not serve this call");
  run(mma ? "cuda" : device, p, &selective_scan_fwd_cpu, mma ? &selective_scan_fwd_mma : &selective_scan_fwd_cuda);
}

// A backward's workspace, as the binding makes it: of the size that the launcher asks for, not initialised (all NaN), and here between guards.
class Workspace {
 public:
  Workspace(int64_t elements, DType dtype) : bytes_(elements * size_of(dtype)), data_(bytes_ + 2 * kGuard, kFill) {}
  void* data() { return data_.data() + kGuard; }
  void check() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (data_[i] != kFill || data_[kGuard + bytes_ + i] != kFill) throw std::runtime_error("the kernel wrote outside its workspace");
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kFill = 0xff;  // of a float or double: NaN
  size_t bytes_;
  std::vector<uint8_t> data_;
};

// Gradients are the caller's arrays, None where the input is absent. `states` is what the forward saved.
void backward(const std::string& device, const OptionalArray& dout, const OptionalArray& dlast_state, const py::array& u, const py::array& delta, const py::array& A,
              const py::array& B, const py::array& C, const OptionalArray& D, const OptionalArray& z, const OptionalArray& delta_bias, bool delta_softplus,
              const OptionalArray& initial_state, const OptionalArray& cu_seqlens, const py::array& states, const py::array& du, const py::array& ddelta,
              const py::array& dA, const py::array& dB, const py::array& dC, const OptionalArray& dD, const OptionalArray& dz, const OptionalArray& ddelta_bias,
              const OptionalArray& dinitial_state, int multiprocessors) {
  SelectiveScanBwdParams p{};
  set_inputs(p, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  p.multiprocessors = multiprocessors;
  if (dout) {
    p.dout = pointer(*dout);
    p.dout_stride = sequence_stride(*dout, "dout");
  }
  if (dlast_state) {
    set(*dlast_state, "dlast_state", p.dlast_state, p.dlast_state_dtype);
    p.dlast_state_stride = state_stride(*dlast_state, "dlast_state");
  }
  if (states.size() != p.batch * state_slots(p) * p.dstate * p.dim) throw std::invalid_argument("states has another size");
  p.states = pointer(states);
  p.du = pointer(du);
  p.du_stride = sequence_stride(du, "du");
  p.ddelta = pointer(ddelta);
  p.ddelta_stride = sequence_stride(ddelta, "ddelta");
  p.dA = pointer(dA);
  p.dA_stride = {0, stride_of(dA, 0, "dA"), stride_of(dA, 1, "dA")};
  p.dB = pointer(dB);
  p.dB_stride = projection_stride(dB, "dB");
  p.dC = pointer(dC);
  p.dC_stride = projection_stride(dC, "dC");
  if (dz) {
    p.dz = pointer(*dz);
    p.dz_stride = sequence_stride(*dz, "dz");
  }
  if (dD) p.dD = pointer(*dD);
  if (ddelta_bias) p.ddelta_bias = pointer(*ddelta_bias);
  if (dinitial_state) {
    p.dinitial_state = pointer(*dinitial_state);
    p.dinitial_state_stride = state_stride(*dinitial_state, "dinitial_state");
  }
  const int64_t elements = device == "cpu" ? selective_scan_bwd_workspace_cpu(p) : selective_scan_bwd_workspace_cuda(p);
  Workspace workspace(elements, p.u_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  p.workspace = workspace.data();
  run(device, p, &selective_scan_bwd_cpu, &selective_scan_bwd_cuda);
  workspace.check();
}

// (chain, begin, end, receives, sends) of each item of a worker, in its order.
std::vector<std::tuple<int64_t, int64_t, int64_t, bool, bool>> line_items(int64_t chains, int64_t steps, int64_t workers, int64_t worker) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, bool, bool>> items;
  LineItem item;
  for (int64_t i = 0; Line{chains, steps, workers}.item(worker, i, item); ++i)
    items.emplace_back(item.chain, item.begin, item.end, item.receives, item.sends);
  return items;
}

// Of a plain fp32 call on a GPU, or of one that the tensor-core kernel serves.
int64_t line_workers(int64_t batch, int64_t dim, int64_t seqlen, int multiprocessors, bool mma) {
  SelectiveScanFwdParams p{};
  p.batch = batch;
  p.dim = dim;
  p.seqlen = seqlen;
  p.dstate = 16;
  p.B_stride.groups = p.C_stride.groups = 1;
  p.multiprocessors = multiprocessors;
  return mma ? mma_line_workers(p) : selective_scan_line_workers(p);
}

const Room room([](py::module_& m) {
  m.def("selective_scan", &forward, py::arg("device"), py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"),
        py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("initial_state"), py::arg("cu_seqlens"), py::arg("out"), py::arg("last_state"),
        py::arg("multiprocessors"), py::arg("line_workers"), py::arg("line"), py::arg("states") = py::none());
  m.def("selective_scan_bwd", &backward, py::arg("device"), py::arg("dout"), py::arg("dlast_state"), py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"),
        py::arg("D"), py::arg("z"), py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("initial_state"), py::arg("cu_seqlens"), py::arg("states"), py::arg("du"),
        py::arg("ddelta"), py::arg("dA"), py::arg("dB"), py::arg("dC"), py::arg("dD"), py::arg("dz"), py::arg("ddelta_bias"), py::arg("dinitial_state"),
        py::arg("multiprocessors"));
  m.def("selective_scan_line_items", &line_items);
  m.def("selective_scan_line_workers", &line_workers, py::arg("batch"), py::arg("dim"), py::arg("seqlen"), py::arg("multiprocessors"), py::arg("mma") = false);
  m.def("selective_scan_line_words", &selective_scan_line_words);
});

}  // namespace
}  // namespace cobra::host
