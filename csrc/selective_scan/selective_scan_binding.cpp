// selective_scan_fwd, _fwd_states and _bwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <map>
#include <mutex>
#include <tuple>

#include "common/tensor_args.h"
#include "selective_scan/selective_scan.h"

namespace cobra {
namespace {

SequenceStride sequence_stride(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
ProjectionStride projection_stride(const Tensor& t) {
  if (t.dim() == 2) return {0, t.stride(0), t.stride(1), 0, 1};
  if (t.dim() == 3) return {t.stride(0), 0, t.stride(1), t.stride(2), 1};
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.size(1)};
}
ScanStateStride state_stride(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Fills what forward and backward read.
class Inputs {
 public:
  Inputs(const char* op, SelectiveScanInputs& p, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
         const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens)
      : compute(u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float), op_(op), u_(u), p_(p) {
    STD_TORCH_CHECK(u.dim() == 3, op_, ": u has ", u.dim(), " dims, expected 3");
    STD_TORCH_CHECK(A.dim() == 2 && A.size(1) >= 1, op_, ": A is not (dim, dstate)");
    p.batch = u.size(0);
    p.dim = u.size(1);
    p.seqlen = u.size(2);
    p.dstate = A.size(1);
    p.delta_softplus = delta_softplus;
    p.u = u.const_data_ptr();
    p.u_dtype = dtype_of(u, op_, "u");
    p.u_stride = sequence_stride(u);
    sequence(delta, "delta", p.delta, p.delta_dtype, p.delta_stride);
    if (z) sequence(*z, "z", p.z, p.z_dtype, p.z_stride);
    expect_sizes(A, {p.dim, p.dstate}, op_, "A");
    read(A, "A", p.A, p.A_dtype);
    p.A_stride = {0, A.stride(0), A.stride(1)};
    projection(B, "B", p.B, p.B_dtype, p.B_stride, p.B_constant);
    projection(C, "C", p.C, p.C_dtype, p.C_stride, p.C_constant);
    if (D) channels(*D, "D", p.D, p.D_dtype, p.D_stride);
    if (delta_bias) channels(*delta_bias, "delta_bias", p.delta_bias, p.delta_bias_dtype, p.delta_bias_stride);
    rows = p.batch;
    if (cu_seqlens) {
      STD_TORCH_CHECK(p.batch == 1, op_, ": u has batch ", p.batch, ", expected 1 with cu_seqlens");
      STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op_, ": cu_seqlens is not (num_seqs + 1,)");
      p.cu_seqlens_dtype = index_dtype(op_, *cu_seqlens, u, "cu_seqlens");
      rows = p.num_seqs = cu_seqlens->size(0) - 1;
      p.cu_seqlens = cu_seqlens->const_data_ptr();
      p.cu_seqlens_stride = cu_seqlens->stride(0);
      if (u.is_cpu()) check_boundaries();
    }
    if (initial_state) state(*initial_state, "initial_state", p.initial_state, p.initial_state_dtype, p.initial_state_stride);
  }

  void state(const Tensor& t, const char* name, const void*& data, DType& dtype, ScanStateStride& stride) const {
    expect_sizes(t, {rows, p_.dim, p_.dstate}, op_, name);
    read(t, name, data, dtype);
    stride = state_stride(t);
  }
  // Slots that packed sequences leave unused are 0: an op has no output that differs from run to run.
  Tensor new_states() const {
    const int64_t sizes[] = {p_.batch, state_slots(p_), p_.dstate, p_.dim};
    return p_.cu_seqlens ? torch::stable::new_zeros(u_, sizes, compute) : torch::stable::new_empty(u_, sizes, compute);
  }

  const ScalarType compute;
  int64_t rows;  // of a state

 private:
  void read(const Tensor& t, const char* name, const void*& data, DType& dtype) const {
    expect_compute_dtype(t, u_, op_, name);
    data = t.const_data_ptr();
    dtype = dtype_of(t, op_, name);
  }
  void sequence(const Tensor& t, const char* name, const void*& data, DType& dtype, SequenceStride& stride) const {
    expect_same_sizes(t, u_, op_, name);
    read(t, name, data, dtype);
    stride = sequence_stride(t);
  }
  void channels(const Tensor& t, const char* name, const void*& data, DType& dtype, int64_t& stride) const {
    expect_sizes(t, {p_.dim}, op_, name);
    read(t, name, data, dtype);
    stride = t.stride(0);
  }
  // (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen).
  void projection(const Tensor& t, const char* name, const void*& data, DType& dtype, ProjectionStride& stride, bool& constant) const {
    constant = t.dim() == 2;
    if (constant) {
      expect_sizes(t, {p_.dim, p_.dstate}, op_, name);
    } else if (t.dim() == 3) {
      expect_sizes(t, {p_.batch, p_.dstate, p_.seqlen}, op_, name);
    } else {
      STD_TORCH_CHECK(t.dim() == 4, op_, ": ", name, " has ", t.dim(), " dims, expected 2, 3 or 4");
      expect_sizes(t, {p_.batch, t.size(1), p_.dstate, p_.seqlen}, op_, name);
      STD_TORCH_CHECK(t.size(1) >= 1 && p_.dim % t.size(1) == 0, op_, ": the groups of ", name, " do not divide dim");
    }
    stride = projection_stride(t);
    read(t, name, data, dtype);
  }
  // Boundaries start at 0, never decrease and end inside the sequence; read before anything is written.
  void check_boundaries() const {
    int64_t last = 0;
    for (int64_t i = 0; i <= p_.num_seqs; ++i) {
      const int64_t at = i * p_.cu_seqlens_stride;
      const int64_t value = p_.cu_seqlens_dtype == DType::kInt64 ? static_cast<const int64_t*>(p_.cu_seqlens)[at] : static_cast<const int32_t*>(p_.cu_seqlens)[at];
      STD_TORCH_CHECK(i == 0 ? value == 0 : value >= last, op_, ": cu_seqlens[", i, "] is ", value, ", expected ", i ? "at least " : "", last);
      last = value;
    }
    STD_TORCH_CHECK(last <= p_.seqlen, op_, ": cu_seqlens ends at ", last, ", u has seqlen ", p_.seqlen);
  }

  const char* const op_;
  const Tensor& u_;
  SelectiveScanInputs& p_;
};

struct Forward {
  SelectiveScanFwdParams p{};
  Tensor out, last_state, states;

  Forward(const char* op, bool saves_states, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
          const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens)
      : out(torch::stable::empty_like(u)) {
    const Inputs inputs(op, p, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
    p.out = out.mutable_data_ptr();
    p.out_stride = sequence_stride(out);
    last_state = torch::stable::new_empty(u, {inputs.rows, p.dim, p.dstate}, inputs.compute);
    p.last_state = last_state.mutable_data_ptr();
    if (!saves_states) return;
    states = inputs.new_states();
    p.states = states.mutable_data_ptr();
  }
};

struct Backward {
  SelectiveScanBwdParams p{};
  Tensor du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state;
  Tensor workspace;

  // `workspace_size` gives the elements that the kernels of the device want.
  Backward(const char* op, int64_t (*workspace_size)(const SelectiveScanBwdParams&), int32_t multiprocessors, const OptionalTensor& dout, const OptionalTensor& dlast_state,
           const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
           const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const Tensor& states)
      : u_(u) {
    const Inputs inputs(op, p, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
    p.multiprocessors = multiprocessors;
    if (dout) {
      expect_same_sizes(*dout, u, op, "dout");
      expect_compute_dtype(*dout, u, op, "dout");
      STD_TORCH_CHECK(dout->scalar_type() == u.scalar_type(), op, ": dout has another dtype than u");
      p.dout = dout->const_data_ptr();
      p.dout_stride = sequence_stride(*dout);
    }
    if (dlast_state) inputs.state(*dlast_state, "dlast_state", p.dlast_state, p.dlast_state_dtype, p.dlast_state_stride);
    expect_sizes(states, {p.batch, state_slots(p), p.dstate, p.dim}, op, "states");
    STD_TORCH_CHECK(states.scalar_type() == inputs.compute && states.is_contiguous(), op, ": states is not what selective_scan_fwd_states returned");
    expect_compute_dtype(states, u, op, "states");
    p.states = states.const_data_ptr();

    p.du = like(u, du, p.du_stride);
    p.ddelta = like(delta, ddelta, p.ddelta_stride);
    p.dz = z ? like(*z, dz, p.dz_stride) : absent(dz);
    p.dA = empty(dA, A);
    p.dA_stride = {0, dA.stride(0), dA.stride(1)};
    p.dB = empty(dB, B);
    p.dB_stride = projection_stride(dB);
    p.dC = empty(dC, C);
    p.dC_stride = projection_stride(dC);
    p.dD = D ? empty(dD, *D) : absent(dD);
    p.ddelta_bias = delta_bias ? empty(ddelta_bias, *delta_bias) : absent(ddelta_bias);
    p.dinitial_state = initial_state ? empty(dinitial_state, *initial_state) : absent(dinitial_state);
    if (initial_state) p.dinitial_state_stride = state_stride(dinitial_state);
    workspace = torch::stable::new_empty(u, {workspace_size(p)}, inputs.compute);
    p.workspace = workspace.mutable_data_ptr();
  }

 private:
  void* empty(Tensor& gradient, const Tensor& input) {
    gradient = torch::stable::empty_like(input);
    return gradient.mutable_data_ptr();
  }
  void* like(const Tensor& input, Tensor& gradient, SequenceStride& stride) {
    void* const data = empty(gradient, input);
    stride = sequence_stride(gradient);
    return data;
  }
  void* absent(Tensor& gradient) {  // empty, of its own: outputs of an op must not alias
    gradient = torch::stable::new_empty(u_, {0});
    return nullptr;
  }
  const Tensor& u_;
};

using ForwardResult = std::tuple<Tensor, Tensor>;
using StatesResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CallCounter fwd_cpu_calls("selective_scan", "cpu"), bwd_cpu_calls("selective_scan_bwd", "cpu");

ForwardResult fwd_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                      const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  Forward call("selective_scan_fwd", false, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  selective_scan_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.out, call.last_state};
}

StatesResult fwd_states_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                            const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  Forward call("selective_scan_fwd_states", true, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  selective_scan_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.out, call.last_state, call.states};
}

BackwardResult bwd_cpu(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
                       const OptionalTensor& cu_seqlens, const Tensor& states) {
  Backward call("selective_scan_bwd", &selective_scan_bwd_workspace_cpu, 0, dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens,
                states);
  selective_scan_bwd_cpu(call.p, kTorchParallel);
  bwd_cpu_calls.add();
  return {call.du, call.ddelta, call.dA, call.dB, call.dC, call.dD, call.dz, call.ddelta_bias, call.dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&fwd_cpu));
  m.impl("selective_scan_fwd_states", TORCH_BOX(&fwd_states_cpu));
  m.impl("selective_scan_bwd", TORCH_BOX(&bwd_cpu));
}

#if defined(COBRA_WITH_CUDA)
CallCounter fwd_cuda_calls("selective_scan", "cuda"), bwd_cuda_calls("selective_scan_bwd", "cuda");

// The line's workspace: zeroed once per stream and left zeroed by every launch, so that no call pays for it. A captured launch gets one
// of its own, zeroed inside the graph: the graph may run next to the stream that it was captured from.
Tensor line_workspace(const Tensor& u, void* stream, int64_t words) {
  const auto zeros = [&] { return torch::stable::new_zeros(u, {words}, ScalarType::Int); };
  if (gpu_stream_is_captured(stream)) return zeros();
  static std::mutex mutex;
  static auto& workspaces = *new std::map<std::pair<int32_t, void*>, Tensor>;  // never destroyed: the driver may be gone by then
  const std::lock_guard lock(mutex);
  const auto [entry, fresh] = workspaces.try_emplace({u.get_device_index(), stream});
  if (fresh || entry->second.size(0) < words) entry->second = zeros();
  return entry->second;
}

int run_forward(Forward& call, const Tensor& u, void* stream) {
  call.p.multiprocessors = gpu_multiprocessors();
  std::optional<Tensor> line;
  if ((call.p.line_workers = selective_scan_line_workers(call.p))) {
    line = line_workspace(u, stream, selective_scan_line_words(call.p.line_workers));
    call.p.line = static_cast<unsigned*>(line->mutable_data_ptr());
  }
  fwd_cuda_calls.add();
  return selective_scan_fwd_cuda(call.p, stream);
}

ForwardResult fwd_cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                       const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const char* const op = "selective_scan_fwd";
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Forward call(op, false, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  check_launch(run_forward(call, u, current_stream(u, op)), op);
  return {call.out, call.last_state};
}

StatesResult fwd_states_cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                             const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const char* const op = "selective_scan_fwd_states";
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Forward call(op, true, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  check_launch(run_forward(call, u, current_stream(u, op)), op);
  return {call.out, call.last_state, call.states};
}

BackwardResult bwd_cuda(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
                        const OptionalTensor& cu_seqlens, const Tensor& states) {
  const char* const op = "selective_scan_bwd";
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Backward call(op, &selective_scan_bwd_workspace_cuda, gpu_multiprocessors(), dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens,
                states);
  check_launch(selective_scan_bwd_cuda(call.p, current_stream(u, op)), op);
  bwd_cuda_calls.add();
  return {call.du, call.ddelta, call.dA, call.dB, call.dC, call.dD, call.dz, call.ddelta_bias, call.dinitial_state};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&fwd_cuda));
  m.impl("selective_scan_fwd_states", TORCH_BOX(&fwd_states_cuda));
  m.impl("selective_scan_bwd", TORCH_BOX(&bwd_cuda));
}
#endif

}  // namespace
}  // namespace cobra
