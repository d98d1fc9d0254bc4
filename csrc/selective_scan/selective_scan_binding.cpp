// selective_scan_fwd of torch.ops.cobra_kernels, for CPU and CUDA tensors.
#include <map>
#include <mutex>
#include <tuple>

#include "common/tensor_args.h"
#include "selective_scan/selective_scan.h"

namespace cobra {
namespace {

constexpr const char* kOp = "selective_scan_fwd";

SequenceStride sequence_stride(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Boundaries start at 0, never decrease and end inside the sequence; read before anything is written.
void check_boundaries(const SelectiveScanFwdParams& p) {
  int64_t last = 0;
  for (int64_t i = 0; i <= p.num_seqs; ++i) {
    const int64_t value = p.cu_seqlens_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.cu_seqlens)[i * p.cu_seqlens_stride]
                                                              : static_cast<const int32_t*>(p.cu_seqlens)[i * p.cu_seqlens_stride];
    STD_TORCH_CHECK(i == 0 ? value == 0 : value >= last, kOp, ": cu_seqlens[", i, "] is ", value, ", expected ", i ? "at least " : "", last);
    last = value;
  }
  STD_TORCH_CHECK(last <= p.seqlen, kOp, ": cu_seqlens ends at ", last, ", u has seqlen ", p.seqlen);
}

struct Forward {
  SelectiveScanFwdParams p{};
  const Tensor& u;
  Tensor out, last_state;

  Forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
          const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
          const OptionalTensor& cu_seqlens)
      : u(u), out(torch::stable::empty_like(u)) {
    STD_TORCH_CHECK(u.dim() == 3, kOp, ": u has ", u.dim(), " dims, expected 3");
    STD_TORCH_CHECK(A.dim() == 2 && A.size(1) >= 1, kOp, ": A is not (dim, dstate)");
    p.batch = u.size(0);
    p.dim = u.size(1);
    p.seqlen = u.size(2);
    p.dstate = A.size(1);
    p.delta_softplus = delta_softplus;
    p.u = u.const_data_ptr();
    p.u_dtype = dtype_of(u, kOp, "u");
    p.u_stride = sequence_stride(u);
    sequence(delta, "delta", p.delta, p.delta_dtype, p.delta_stride);
    if (z) sequence(*z, "z", p.z, p.z_dtype, p.z_stride);
    expect_sizes(A, {p.dim, p.dstate}, kOp, "A");
    read(A, "A", p.A, p.A_dtype);
    p.A_stride = {0, A.stride(0), A.stride(1)};
    projection(B, "B", p.B, p.B_dtype, p.B_stride, p.B_constant);
    projection(C, "C", p.C, p.C_dtype, p.C_stride, p.C_constant);
    if (D) channels(*D, "D", p.D, p.D_dtype, p.D_stride);
    if (delta_bias) channels(*delta_bias, "delta_bias", p.delta_bias, p.delta_bias_dtype, p.delta_bias_stride);
    int64_t rows = p.batch;
    if (cu_seqlens) {
      STD_TORCH_CHECK(p.batch == 1, kOp, ": u has batch ", p.batch, ", expected 1 with cu_seqlens");
      STD_TORCH_CHECK(cu_seqlens->is_cpu() == u.is_cpu(), kOp, ": cu_seqlens is on another device than u");
      STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, kOp, ": cu_seqlens is not (num_seqs + 1,)");
      rows = p.num_seqs = cu_seqlens->size(0) - 1;
      p.cu_seqlens = cu_seqlens->const_data_ptr();
      p.cu_seqlens_stride = cu_seqlens->stride(0);
      p.cu_seqlens_dtype = dtype_of(*cu_seqlens, kOp, "cu_seqlens");
      STD_TORCH_CHECK(p.cu_seqlens_dtype == DType::kInt32 || p.cu_seqlens_dtype == DType::kInt64, kOp, ": cu_seqlens is not int32 or int64");
      if (u.is_cpu()) check_boundaries(p);
    }
    if (initial_state) {
      expect_sizes(*initial_state, {rows, p.dim, p.dstate}, kOp, "initial_state");
      read(*initial_state, "initial_state", p.initial_state, p.initial_state_dtype);
      p.initial_state_stride = {initial_state->stride(0), initial_state->stride(1), initial_state->stride(2)};
    }
    p.out = out.mutable_data_ptr();
    p.out_stride = sequence_stride(out);
    const ScalarType compute = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    last_state = torch::stable::new_empty(u, {rows, p.dim, p.dstate}, compute);
    p.last_state = last_state.mutable_data_ptr();
  }

 private:
  void read(const Tensor& t, const char* name, const void*& data, DType& dtype) {
    expect_compute_dtype(t, u, kOp, name);
    data = t.const_data_ptr();
    dtype = dtype_of(t, kOp, name);
  }
  void sequence(const Tensor& t, const char* name, const void*& data, DType& dtype, SequenceStride& stride) {
    expect_same_sizes(t, u, kOp, name);
    read(t, name, data, dtype);
    stride = sequence_stride(t);
  }
  void channels(const Tensor& t, const char* name, const void*& data, DType& dtype, int64_t& stride) {
    expect_sizes(t, {p.dim}, kOp, name);
    read(t, name, data, dtype);
    stride = t.stride(0);
  }
  // (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen).
  void projection(const Tensor& t, const char* name, const void*& data, DType& dtype, ProjectionStride& stride, bool& constant) {
    constant = t.dim() == 2;
    if (constant) {
      expect_sizes(t, {p.dim, p.dstate}, kOp, name);
      stride = {0, t.stride(0), t.stride(1), 0, 1};
    } else if (t.dim() == 3) {
      expect_sizes(t, {p.batch, p.dstate, p.seqlen}, kOp, name);
      stride = {t.stride(0), 0, t.stride(1), t.stride(2), 1};
    } else {
      STD_TORCH_CHECK(t.dim() == 4, kOp, ": ", name, " has ", t.dim(), " dims, expected 2, 3 or 4");
      expect_sizes(t, {p.batch, t.size(1), p.dstate, p.seqlen}, kOp, name);
      STD_TORCH_CHECK(t.size(1) >= 1 && p.dim % t.size(1) == 0, kOp, ": the groups of ", name, " do not divide dim");
      stride = {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.size(1)};
    }
    read(t, name, data, dtype);
  }
};

using Result = std::tuple<Tensor, Tensor>;

CallCounter fwd_cpu_calls("selective_scan", "cpu");

Result fwd_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
               const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus,
               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  Forward call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  selective_scan_fwd_cpu(call.p, kTorchParallel);
  fwd_cpu_calls.add();
  return {call.out, call.last_state};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CPU, m) { m.impl("selective_scan_fwd", TORCH_BOX(&fwd_cpu)); }

#if defined(COBRA_WITH_CUDA)
CallCounter fwd_cuda_calls("selective_scan", "cuda");

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

Result fwd_cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus, const OptionalTensor& initial_state,
                const OptionalTensor& cu_seqlens) {
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  STD_TORCH_CHECK(u.scalar_type() != ScalarType::Double, kOp, ": u is float64, which the CUDA kernel does not serve");
  Forward call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  call.p.multiprocessors = gpu_multiprocessors();
  void* const stream = current_stream(u, kOp);
  std::optional<Tensor> line;
  if ((call.p.line_workers = selective_scan_line_workers(call.p))) {
    line = line_workspace(u, stream, selective_scan_line_words(call.p.line_workers));
    call.p.line = static_cast<unsigned*>(line->mutable_data_ptr());
  }
  check_launch(selective_scan_fwd_cuda(call.p, stream), kOp);
  fwd_cuda_calls.add();
  return {call.out, call.last_state};
}

STABLE_TORCH_LIBRARY_IMPL(cobra_kernels, CUDA, m) { m.impl("selective_scan_fwd", TORCH_BOX(&fwd_cuda)); }
#endif

}  // namespace
}  // namespace cobra
