// rms_norm forward on a GPU. A group of threads owns a row at a time (rms_norm_cuda.cuh); blocks take rows in grid order.
#include "rms_norm/rms_norm_cuda.cuh"

namespace cobra {
namespace {

constexpr int kBlockThreads = 128;  // of blocks that hold several short rows
// Channels a thread at most: 32 of fp32 x, residual and weight at once would spill. Threads of a block, and blocks that a multiprocessor
// must hold: at 16 channels a thread 56 registers (fp32: 64), so that 36 (32) warps are there and their rows under way together; at
// 32 channels 128 registers, 16 warps with as many bytes.
template <class T> constexpr int kMostItems = sizeof(T) == 2 ? 32 : 16;
template <class T> constexpr int most_threads(int items) { return items <= 16 && sizeof(T) == 2 ? 384 : 512; }
template <class T> constexpr int least_blocks(int items) { return items > 16 ? 1 : sizeof(T) == 2 ? 3 : 2; }

struct FwdCall {
  RmsNormFwdParams p;
  int64_t first_row;  // of this launch
  float inverse_dim;
};

// The row of this thread's group. Groups past the last row go along with no channels: the barriers need the whole block.
struct GroupRow {
  int64_t row;
  bool active;
};
__device__ __forceinline__ GroupRow row_of_group(const FwdCall& call) {
  const int64_t row = call.first_row + int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  return row < call.p.rows ? GroupRow{row, true} : GroupRow{0, false};
}

template <class T, int kItems>
__global__ void __launch_bounds__(most_threads<T>(kItems), least_blocks<T>(kItems))
    rms_norm_fwd_vector_kernel(const __grid_constant__ FwdCall call) {
  constexpr int kWidth = 16 / sizeof(T);
  COBRA_SHARED(RowSum<float>::Shared, shared);
  RowSum<float> sum{shared};
  const RmsNormFwdParams& p = call.p;
  const auto [row, active] = row_of_group(call);
  const int dim = active ? int(p.dim) : 0;
  const auto [x_at, residual_at, s_at, y_at] = row_offsets(p.shape, row, p.x_stride, p.residual_stride, p.s_stride, p.y_stride).of;

  RawItems<kWidth, kItems> x, residual, weight;
  x.load(static_cast<const T*>(p.x) + x_at, dim);
  if (p.residual) residual.load(p.residual, p.residual_dtype, residual_at, dim);
  weight.load(p.weight, p.weight_dtype, 0, dim);

  float s[kItems];
  add_residual<T>(s, x, residual, p.residual, p.residual_dtype);
  if (p.s) store_items<kWidth>(s, p.s, p.s_dtype, s_at, dim);

  const float rstd = center_and_rstd<kWidth>(s, dim, call.inverse_dim, float(p.eps), p.is_rms_norm, sum);
  weight.for_values(p.weight_dtype, [&](int i, float v) { s[i] *= rstd * v; });
  if (p.bias) {
    RawItems<kWidth, kItems> bias;
    bias.load(p.bias, p.bias_dtype, 0, dim);
    bias.for_values(p.bias_dtype, [&](int i, float v) { s[i] += v; });
  }
  store_items<kWidth>(s, static_cast<T*>(p.y) + y_at, dim);
}

__global__ void __launch_bounds__(256, 3) rms_norm_fwd_strided_kernel(const __grid_constant__ FwdCall call) {
  COBRA_SHARED(RowSum<float>::Shared, shared);
  RowSum<float> sum{shared};
  const RmsNormFwdParams& p = call.p;
  const auto [row, active] = row_of_group(call);
  const int64_t dim = active ? p.dim : 0;
  const auto [x_at, residual_at, s_at, y_at] = row_offsets(p.shape, row, p.x_stride, p.residual_stride, p.s_stride, p.y_stride).of;

  const RowInput<float> s = {{p.x, p.x_dtype, x_at, p.x_stride.dim}, {p.residual, p.residual_dtype, residual_at, p.residual_stride.dim}};
  const RowView<float> y = {p.y, p.x_dtype, y_at, p.y_stride.dim}, s_out = {p.s, p.s_dtype, s_at, p.s_stride.dim};
  const RowView<float> weight = {p.weight, p.weight_dtype, 0, p.weight_stride}, bias = {p.bias, p.bias_dtype, 0, p.bias_stride};

  const RowStatistics<float> statistics = row_statistics(s, dim, call.inverse_dim, float(p.eps), p.is_rms_norm, sum);
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    const float v = s[i];
    if (p.s) s_out.store(i, v);
    const float scaled = (v - statistics.mean) * (statistics.rstd * weight[i]);
    y.store(i, p.bias ? scaled + bias[i] : scaled);
  }
}

template <class T>
bool rows_fit_vectors(const RmsNormFwdParams& p) {
  constexpr int width = 16 / sizeof(T);
  return p.dim % width == 0 && p.dim <= kMostItems<T> * 512 && rows_are_packed(p.x, p.x_dtype, p.shape, p.x_stride, width) &&
         rows_are_packed(p.residual, p.residual_dtype, p.shape, p.residual_stride, width) &&
         rows_are_packed(p.y, p.x_dtype, p.shape, p.y_stride, width) && rows_are_packed(p.s, p.s_dtype, p.shape, p.s_stride, width) &&
         vector_is_packed(p.weight, p.weight_dtype, p.weight_stride, width) &&
         vector_is_packed(p.bias, p.bias_dtype, p.bias_stride, width);
}

// One launch, unless there are more rows than a grid holds.
int launch_rows(void (*kernel)(FwdCall), const RmsNormFwdParams& p, int threads, void* stream) {
  const int groups = threads < kBlockThreads ? kBlockThreads / threads : 1;
  const int64_t most = max_grid_x();
  for (int64_t first = 0; first < p.rows; first += most * groups) {
    const int64_t blocks = (p.rows - first + groups - 1) / groups;
    const dim3 grid(unsigned(blocks < most ? blocks : most));
    if (const int error = launch(kernel, grid, dim3(threads, groups), 0, stream, FwdCall{p, first, 1.f / float(p.dim)})) return error;
  }
  return 0;
}

}  // namespace

int rms_norm_fwd_cuda(const RmsNormFwdParams& p, void* stream) {
  if (p.rows == 0 || p.dim == 0) return 0;
  return pick_by_float_type(p.x_dtype, [&](auto t) {
    using T = decltype(t);
    if (!rows_fit_vectors<T>(p)) return launch_rows(&rms_norm_fwd_strided_kernel, p, row_threads(p.dim, 4, 256), stream);
    const auto rows_of = [&](auto kernel, int items) { return launch_rows(kernel, p, row_threads(p.dim, items, most_threads<T>(items)), stream); };
    // A warp per row up to 1024 channels (fp32: 512), no barrier; then 16 channels a thread; 32 when those need more threads than a block has.
    constexpr int kMost = kMostItems<T>;
    if (p.dim <= 8 * kWarp) return rows_of(&rms_norm_fwd_vector_kernel<T, 8>, 8);
    if (p.dim > 16 * kWarp && (p.dim <= kMost * kWarp || p.dim > 16 * most_threads<T>(16))) return rows_of(&rms_norm_fwd_vector_kernel<T, kMost>, kMost);
    return rows_of(&rms_norm_fwd_vector_kernel<T, 16>, 16);
  });
}

}  // namespace cobra
