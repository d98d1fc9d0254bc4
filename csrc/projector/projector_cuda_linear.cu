// A linear layer with bias and GELU on tensor cores. A block owns a tile of 128 x 128 outputs, or one of the `split` parts of
// its depth; each of its four warps owns 64 x 64 of it in 128 registers per lane. Steps of 32 channels of x and weight pass
// through a ring of four stages in shared memory: three are under way while one is multiplied.
//
// The depth is walked segment by segment: a step that reaches beyond its segment is filled with zeros, in x and in the weight, so
// that nothing of the next segment, nor an infinity of it, is touched. Columns beyond the matrix are zeros too; rows beyond it repeat one.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "projector/projector_cuda.cuh"

namespace cobra {
namespace {

constexpr int kThreads = 128, kStages = 4, kWarpRows = 64, kWarpCols = 64;
constexpr int kChunk = 8;                                // elements of a 16-byte copy
constexpr int kChunks = kLinearDepth / kChunk;           // of a row of a stage: 64 bytes
constexpr int kCopyRows = kThreads / kChunks;            // a thread copies every 32nd row of x and of the weight
constexpr int kCopies = kLinearRows / kCopyRows;
constexpr int kStageBytes = (kLinearRows + kLinearCols) * kLinearDepth * 2;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kThreads == kLinearRows && kLinearRows == kLinearCols && kLinearRows * kLinearCols * 4 <= kSharedBytes);

constexpr int kFragmentRows = kWarpRows / 16, kFragmentCols = kWarpCols / 8;
using Sums = float[kFragmentRows][kFragmentCols][4];
using RowTable = const void* [kMaxSegments][kLinearRows];

// Byte of a 16-byte chunk in a stage. Rows of 64 bytes, two to a line of all banks; the chunks of every other line are swapped
// so that 8 rows of one chunk, what a matrix load reads, lie in different banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) { return row * 64 + (chunk ^ row / 2 % 4) * 16; }

// Of the rows or columns from a tile's first one on, those that the tile holds.
__device__ __forceinline__ int in_tile(int64_t left) { return left < kLinearRows ? int(left) : kLinearRows; }

// What one thread copies: chunk threadIdx.x % 4 of rows threadIdx.x / 4 + 32 i of x and of the weight.
template <class T>
struct StepLoader {
  const LinearParams& p;
  const RowTable& table;
  const T* x[kCopies];  // channel 0 of the segment, of each row
  const T* weight;      // channel 0 of the segment, of the first row
  int64_t at;           // the channel to copy next
  int cols_left;        // from this thread's first row of the weight on
  int segment = 0;

  __device__ __forceinline__ StepLoader(const LinearParams& p, const RowTable& table, int64_t tile_col, int64_t step)
      : p(p), table(table) {
    const int first = threadIdx.x / kChunks;
    cols_left = in_tile(p.cols - tile_col) - first;
    weight = static_cast<const T*>(p.weight) + (tile_col + first) * p.weight_stride;
    while (segment < p.segments && step >= steps()) {
      step -= steps();
      weight += p.width[segment++];
    }
    at = step * kLinearDepth + threadIdx.x % kChunks * kChunk;
    if (segment < p.segments) enter();
  }

  __device__ __forceinline__ int64_t steps() const { return (p.width[segment] + kLinearDepth - 1) / kLinearDepth; }

  __device__ __forceinline__ void enter() {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) x[i] = static_cast<const T*>(table[segment][threadIdx.x / kChunks + i * kCopyRows]);
  }

  // The next step into a stage.
  __device__ __forceinline__ void load(char* stage) {
    const bool inside = at < p.width[segment];
    char* const to = stage + chunk_offset(threadIdx.x / kChunks, threadIdx.x % kChunks);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async_16(to + i * kCopyRows * 64, x[i] + at, inside);
      copy_async_16(to + (kLinearRows + i * kCopyRows) * 64, weight + i * kCopyRows * p.weight_stride + at, inside && i * kCopyRows < cols_left);
    }
    at += kLinearDepth;
    if (at - threadIdx.x % kChunks * kChunk >= p.width[segment] && segment + 1 < p.segments) {
      weight += p.width[segment++];
      at = threadIdx.x % kChunks * kChunk;
      enter();
    }
  }
};

// sums += x w^T of one step in shared memory.
template <class T>
__device__ __forceinline__ void multiply(Sums& sums, const char* stage, int warp_row, int warp_col) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kLinearDepth / 16; ++k) {
    unsigned a[kFragmentRows][4], b[kFragmentCols][2];
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i)  // tiles: rows 0..7, 8..15, then the same of the next 8 channels
      load_matrices(a[i], stage + chunk_offset(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kFragmentCols; j += 2) {  // tiles: channels 0..7, 8..15, then the same of the next 8 columns
      unsigned tiles[4];
      load_matrices(tiles, stage + chunk_offset(kLinearRows + warp_col + j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      b[j][0] = tiles[0], b[j][1] = tiles[1], b[j + 1][0] = tiles[2], b[j + 1][1] = tiles[3];
    }
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentCols; ++j) mma_m16n8k16<T>(sums[i][j], a[i], b[j]);
  }
}

// Bias, GELU, one rounding, of 4 neighbouring columns of a row.
__device__ __forceinline__ void finish(const LinearParams& p, int64_t row, int64_t col, float4 sum, const float (&bias)[4]) {
  float v[4] = {sum.x + bias[0], sum.y + bias[1], sum.z + bias[2], sum.w + bias[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (p.gelu) v[i] = gelu(v[i]);
  const int64_t offset = row * p.cols + col;
  if (p.cols % 4 == 0) {
    store_floats(p.y, p.dtype, offset, v);
  } else {
    for (int i = 0; i < 4 && col + i < p.cols; ++i) store_float(p.y, p.dtype, offset + i, v[i]);
  }
}

// f(row, column, the 2 neighbouring sums) for what this lane holds of the tile.
template <class F>
__device__ __forceinline__ void for_pairs(const Sums& sums, int warp_row, int warp_col, F&& f) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kFragmentRows; ++i)
#pragma unroll
    for (int j = 0; j < kFragmentCols; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f(warp_row + i * 16 + half * 8 + lane / 4, warp_col + j * 8 + lane % 4 * 2, make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]));
}

// The finished tile, through shared memory: a warp then stores whole rows, and a lane keeps its columns and their bias. Groups of
// 8 columns are swapped from row to row, so that the pairs of 4 rows lie in different banks.
__device__ __forceinline__ void store_tile(const LinearParams& p, const Sums& sums, float* shared, int64_t tile_row, int64_t tile_col, int warp_row,
                                           int warp_col) {
  __syncthreads();  // the last step has been read by every warp
  for_pairs(sums, warp_row, warp_col, [&](int row, int col, float2 pair) {
    *reinterpret_cast<float2*>(shared + row * kLinearCols + (col ^ row % 4 * 8)) = pair;
  });
  __syncthreads();
  const int group = threadIdx.x % kWarp * 4;
  const int64_t col = tile_col + group;
  if (col >= p.cols) return;
  float bias[4];
  load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, col, p.cols);
#pragma unroll 2
  for (int r = threadIdx.x / kWarp; r < kLinearRows && tile_row + r < p.rows; r += kThreads / kWarp)
    finish(p, tile_row + r, col, *reinterpret_cast<const float4*>(shared + r * kLinearCols + (group ^ r % 4 * 8)), bias);
}

// A part as it is, row-major: 4 lanes fill a 32-byte sector.
__device__ __forceinline__ void store_part(const Sums& sums, float* part, int warp_row, int warp_col) {
  for_pairs(sums, warp_row, warp_col, [&](int row, int col, float2 pair) { *reinterpret_cast<float2*>(part + row * kLinearCols + col) = pair; });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kLinearBlocksPerMultiprocessor) projector_linear_kernel(const __grid_constant__ LinearParams p) {
  COBRA_DYNAMIC_SHARED(char, shared);
  // Neighbouring blocks share columns of the weight, which is read from memory once; x stays in the L2 cache.
  const int64_t row_tiles = (p.rows + kLinearRows - 1) / kLinearRows, col_tiles = (p.cols + kLinearCols - 1) / kLinearCols;
  const int64_t left = row_tiles * col_tiles - p.whole_tiles, index = blockIdx.x, in_parts = index - p.whole_tiles;
  const bool whole = in_parts < 0;
  const int64_t tile = whole ? index : p.whole_tiles + in_parts % left, part = whole ? 0 : in_parts / left;
  const int64_t tile_row = tile % row_tiles * kLinearRows, tile_col = tile / row_tiles * kLinearCols;

  int64_t steps = 0;
  for (int i = 0; i < p.segments; ++i) steps += (p.width[i] + kLinearDepth - 1) / kLinearDepth;
  const int64_t parts = whole ? 1 : p.split, first = steps * part / parts, count = steps * (part + 1) / parts - first;

  COBRA_SHARED(RowTable, table);
  const int own_row = int(threadIdx.x) < in_tile(p.rows - tile_row) ? int(threadIdx.x) : 0;  // also stands for rows beyond the matrix
  for (int i = 0; i < p.segments; ++i)
    table[i][threadIdx.x] = static_cast<const T*>(p.x[i]) + row_offset(p.shape, p.x_stride[i], tile_row + own_row);
  __syncthreads();

  StepLoader<T> loader(p, table, tile_col, first);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) loader.load(shared + s * kStageBytes);
    copy_async_commit();
  }

  const int warp = threadIdx.x / kWarp, warp_row = warp % 2 * kWarpRows, warp_col = warp / 2 * kWarpCols;
  Sums sums = {};
  int read = 0, write = kStages - 1;
  for (int64_t step = 0; step < count; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; the stage of the step before has been read by all
    if (step + kStages - 1 < count) loader.load(shared + write * kStageBytes);
    copy_async_commit();  // empty at the end, so that the count of groups is the same in every step
    multiply<T>(sums, shared + read * kStageBytes, warp_row, warp_col);
    read = (read + 1) % kStages;
    write = (write + 1) % kStages;
  }

  if (whole)
    store_tile(p, sums, reinterpret_cast<float*>(shared), tile_row, tile_col, warp_row, warp_col);
  else
    store_part(sums, static_cast<float*>(p.workspace) + in_parts * (kLinearRows * kLinearCols), warp_row, warp_col);
}

// Adds the parts of the tiles that have them, in order. A thread owns 4 neighbouring columns of a tile.
constexpr int kGroups = kLinearRows * kLinearCols / 4;
__global__ void __launch_bounds__(kThreads) projector_linear_parts_kernel(const __grid_constant__ LinearParams p) {
  const int64_t row_tiles = (p.rows + kLinearRows - 1) / kLinearRows, left = row_tiles * ((p.cols + kLinearCols - 1) / kLinearCols) - p.whole_tiles;
  const int64_t local = int64_t(blockIdx.x) / (kGroups / kThreads), tile = p.whole_tiles + local;
  const int group = int(blockIdx.x % (kGroups / kThreads)) * kThreads + int(threadIdx.x);
  const int64_t row = tile % row_tiles * kLinearRows + group / (kLinearCols / 4);
  const int64_t col = tile / row_tiles * kLinearCols + group % (kLinearCols / 4) * 4;
  if (row >= p.rows || col >= p.cols) return;

  const float4* part = static_cast<const float4*>(p.workspace) + local * kGroups + group;
  float bias[4];
  load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, col, p.cols);
  float4 sum = *part;
#pragma unroll 4
  for (int i = 1; i < p.split; ++i) {
    const float4 next = part[i * left * kGroups];
    sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
  }
  finish(p, row, col, sum, bias);
}

}  // namespace

int projector_linear_cuda(const LinearParams& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return 0;
  // A block is 16,384 outputs: the largest grid is more than any memory holds.
  const int64_t left = linear_tiles(p.rows, p.cols) - p.whole_tiles;
  const dim3 grid(unsigned(p.whole_tiles + left * p.split));
  const int error = p.dtype == DType::kBFloat16 ? launch(&projector_linear_kernel<__nv_bfloat16>, grid, dim3(kThreads), kSharedBytes, stream, p)
                                                : launch(&projector_linear_kernel<__half>, grid, dim3(kThreads), kSharedBytes, stream, p);
  if (error || left == 0) return error;
  return launch(&projector_linear_parts_kernel, dim3(unsigned(left * (kGroups / kThreads))), dim3(kThreads), 0, stream, p);
}

int multiprocessors_cuda() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) return count;
#endif
  return 1;
}

}  // namespace cobra
