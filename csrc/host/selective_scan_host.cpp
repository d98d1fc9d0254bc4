// selective_scan on numpy arrays. B and C are (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen).
// The caller owns out, last_state and states, which are contiguous (states may be None), and `line`, the zeroed workspace of `line_workers`. `multiprocessors`: of
// the GPU that is emulated. The device "cuda_mma" is the tensor-core kernel, and an error where it does not serve.
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
  m.def("selective_scan_line_items", &line_items);
  m.def("selective_scan_line_workers", &line_workers, py::arg("batch"), py::arg("dim"), py::arg("seqlen"), py::arg("multiprocessors"), py::arg("mma") = false);
  m.def("selective_scan_line_words", &selective_scan_line_words);
});

}  // namespace
}  // namespace cobra::host
