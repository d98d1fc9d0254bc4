// A linear layer with bias and GELU on tensor cores, in two kernels that differ in their instruction and their tile. A block owns a
// tile of outputs, or one of the `split` parts of its depth. Steps of the depth pass through a ring of four stages in shared memory.
//
//   warps       128 x 128, steps of 32 channels, 4 warps of 64 x 64 outputs; any GPU. Three steps are under way while one is multiplied.
//   warpgroups  128 x 256, steps of 64 channels, 2 warpgroups of 64 x 256 outputs, which read shared memory without registers in between;
//               sm_90a. Products run asynchronously, one step behind their issue, so that a stage is free again two steps later.
//
// The depth is walked segment by segment: a step that reaches beyond its segment is filled with zeros, in x and in the weight, so
// that nothing of the next segment, nor an infinity of it, is touched. Columns beyond the matrix are zeros too; rows beyond it repeat one.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"
#include "projector/projector_cuda.cuh"

namespace cobra {
namespace {

constexpr int kStages = kLinearStages;
constexpr int kChunk = 8;  // elements of a 16-byte copy

// A tile's shape, and how its threads copy a step of it.
template <int kRows_, int kCols_, int kDepth_, int kThreads_>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_, kDepth = kDepth_, kThreads = kThreads_;
  static constexpr int kRowBytes = kDepth * 2, kChunks = kDepth / kChunk;  // of a row of a stage
  static constexpr int kCopyRows = kThreads / kChunks;                     // a thread copies one chunk of every kCopyRows-th row
  static constexpr int kCopiesOfX = kRows / kCopyRows, kCopiesOfWeight = kCols / kCopyRows;
  static constexpr int kStageBytes = (kRows + kCols) * kRowBytes;  // rows of x, then of the weight
  static_assert(kCopyRows * kCopiesOfX == kRows && kCopyRows * kCopiesOfWeight == kCols && kThreads >= kRows);
  static_assert(kRows * kCols * 4 <= kStages * kStageBytes);

  // Byte of a chunk in a stage. The chunks of neighbouring rows are swapped so that one chunk of 8 rows, what an instruction reads at
  // once, lies in different banks. Rows of 128 bytes: as the warpgroup's instruction wants it.
  __device__ static __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + (kChunks == 4 ? chunk ^ row / 2 % 4 : chunk ^ row % 8) * 16;
  }
};
using WarpTile = Tile<kWarpTile.rows, kWarpTile.cols, kWarpTile.depth, 128>;
using WarpgroupTile = Tile<kWarpgroupTile.rows, kWarpgroupTile.cols, kWarpgroupTile.depth, 256>;

static_assert(linear_shared_bytes(kWarpTile) == kStages * WarpTile::kStageBytes + kMaxSegments * kWarpTile.rows * int64_t(sizeof(void*)) + 1024);

template <class Tile>
using RowTable = const void* [kMaxSegments][Tile::kRows];

// A block's place in the launch: which tile, which part of its depth.
template <class Tile>
struct Work {
  int64_t row, col;          // first of the tile
  int64_t first, steps;      // of the depth
  int64_t part;              // index in the workspace, or negative: the whole depth

  __device__ __forceinline__ explicit Work(const LinearParams& p) {
    // Neighbouring blocks share columns of the weight, which is read from memory once; x stays in the L2 cache.
    const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows, col_tiles = (p.cols + Tile::kCols - 1) / Tile::kCols;
    const int64_t index = blockIdx.x, left = row_tiles * col_tiles - p.whole_tiles;
    part = index - p.whole_tiles;
    const int64_t tile = part < 0 ? index : p.whole_tiles + part % left;
    row = tile % row_tiles * Tile::kRows;
    col = tile / row_tiles * Tile::kCols;

    int64_t all = 0;
    for (int i = 0; i < p.segments; ++i) all += (p.width[i] + Tile::kDepth - 1) / Tile::kDepth;
    const int64_t parts = part < 0 ? 1 : p.split, own = part < 0 ? 0 : part / left;
    first = all * own / parts;
    steps = all * (own + 1) / parts - first;
  }
};

// Where each row of the tile begins in each segment. Rows beyond the matrix repeat the first: they are computed and not stored.
template <class T, class Tile>
__device__ __forceinline__ void fill_table(const LinearParams& p, RowTable<Tile>& table, int64_t tile_row) {
  if (int(threadIdx.x) >= Tile::kRows) return;
  const int64_t row = tile_row + threadIdx.x < p.rows ? tile_row + threadIdx.x : tile_row;
  for (int i = 0; i < p.segments; ++i)
    table[i][threadIdx.x] = static_cast<const T*>(p.x[i]) + row_offset(p.shape, p.x_stride[i], row);
}

// What one thread copies of each step: one chunk of every kCopyRows-th row of x and of the weight.
template <class T, class Tile>
struct StepLoader {
  const LinearParams& p;
  const RowTable<Tile>& table;
  const T* x[Tile::kCopiesOfX];  // channel 0 of the segment, of each row
  const T* weight;               // channel 0 of the segment, of the first row
  int64_t at;                    // the channel to copy next
  int cols_left;                 // from this thread's first row of the weight on
  int segment = 0;

  __device__ __forceinline__ StepLoader(const LinearParams& p, const RowTable<Tile>& table, const Work<Tile>& work) : p(p), table(table) {
    const int first = threadIdx.x / Tile::kChunks;
    cols_left = int(p.cols - work.col < Tile::kCols ? p.cols - work.col : Tile::kCols) - first;
    weight = static_cast<const T*>(p.weight) + (work.col + first) * p.weight_stride;
    int64_t step = work.first;
    while (segment < p.segments && step >= steps()) {
      step -= steps();
      weight += p.width[segment++];
    }
    at = step * Tile::kDepth + threadIdx.x % Tile::kChunks * kChunk;
    if (segment < p.segments) enter();
  }

  __device__ __forceinline__ int64_t steps() const { return (p.width[segment] + Tile::kDepth - 1) / Tile::kDepth; }

  __device__ __forceinline__ void enter() {
#pragma unroll
    for (int i = 0; i < Tile::kCopiesOfX; ++i) x[i] = static_cast<const T*>(table[segment][threadIdx.x / Tile::kChunks + i * Tile::kCopyRows]);
  }

  // The next step into a stage.
  __device__ __forceinline__ void load(char* stage) {
    constexpr int kStep = Tile::kCopyRows * Tile::kRowBytes;
    const bool inside = at < p.width[segment];
    char* const to = stage + Tile::offset(threadIdx.x / Tile::kChunks, threadIdx.x % Tile::kChunks);
#pragma unroll
    for (int i = 0; i < Tile::kCopiesOfX; ++i) copy_async_16(to + i * kStep, x[i] + at, inside);
#pragma unroll
    for (int i = 0; i < Tile::kCopiesOfWeight; ++i)
      copy_async_16(to + Tile::kRows * Tile::kRowBytes + i * kStep, weight + i * Tile::kCopyRows * p.weight_stride + at,
                    inside && i * Tile::kCopyRows < cols_left);
    at += Tile::kDepth;
    if (at - threadIdx.x % Tile::kChunks * kChunk >= p.width[segment] && segment + 1 < p.segments) {
      weight += p.width[segment++];
      at = threadIdx.x % Tile::kChunks * kChunk;
      enter();
    }
  }
};

// Bias, GELU, one rounding, of 4 neighbouring columns of a row.
__device__ __forceinline__ void finish(const LinearParams& p, int64_t row, int64_t col, float4 sum, const float (&bias)[4]) {
  float v[4] = {sum.x + bias[0], sum.y + bias[1], sum.z + bias[2], sum.w + bias[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (p.gelu) v[i] = gelu(v[i]);
  const int64_t offset = row * p.cols + col;
  if (p.cols % 4 == 0) {
    store_reals(p.y, p.y_dtype, offset, v);
  } else {
    for (int i = 0; i < 4 && col + i < p.cols; ++i) store_float(p.y, p.y_dtype, offset + i, v[i]);
  }
}

// The sums of a block, which for_pairs(f) hands over as f(row, column, 2 neighbouring sums). A part goes to the workspace as it is:
// 4 lanes fill a 32-byte sector. A whole tile goes through shared memory, so that warps store whole rows and a lane keeps its
// columns and their bias; groups of 8 columns are swapped from row to row there, so that the pairs of 4 rows lie in different banks.
template <class Tile, class ForPairs>
__device__ __forceinline__ void store_sums(const LinearParams& p, const Work<Tile>& work, float* shared, ForPairs&& for_pairs) {
  if (work.part >= 0) {
    float* const part = static_cast<float*>(p.workspace) + work.part * (Tile::kRows * Tile::kCols);
    for_pairs([&](int row, int col, float2 pair) { *reinterpret_cast<float2*>(part + row * Tile::kCols + col) = pair; });
    return;
  }
  __syncthreads();  // the last step has been read by every warp
  for_pairs([&](int row, int col, float2 pair) { *reinterpret_cast<float2*>(shared + row * Tile::kCols + (col ^ row % 4 * 8)) = pair; });
  __syncthreads();
  constexpr int kGroups = Tile::kCols / 4;
  const int group = threadIdx.x % kGroups * 4;
  const int64_t col = work.col + group;
  if (col >= p.cols) return;
  float bias[4];
  load_bias(bias, p.bias, p.bias_dtype, p.bias_stride, col, p.cols);
#pragma unroll 2
  for (int r = threadIdx.x / kGroups; r < Tile::kRows && work.row + r < p.rows; r += Tile::kThreads / kGroups)
    finish(p, work.row + r, col, *reinterpret_cast<const float4*>(shared + r * Tile::kCols + (group ^ r % 4 * 8)), bias);
}

// --- warps ------------------------------------------------------------------------------------------------------------

constexpr int kWarpRows = 64, kWarpCols = 64, kFragmentRows = kWarpRows / 16, kFragmentCols = kWarpCols / 8;
using Sums = float[kFragmentRows][kFragmentCols][4];

// sums += x w^T of one step in shared memory.
template <class T>
__device__ __forceinline__ void multiply(Sums& sums, const char* stage, int warp_row, int warp_col) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < WarpTile::kDepth / 16; ++k) {
    unsigned a[kFragmentRows][4], b[kFragmentCols][2];
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i)  // matrices: rows 0..7, 8..15, then the same of the next 8 channels
      load_matrices(a[i], stage + WarpTile::offset(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kFragmentCols; j += 2) {  // matrices: channels 0..7, 8..15, then the same of the next 8 columns
      unsigned words[4];
      load_matrices(words, stage + WarpTile::offset(WarpTile::kRows + warp_col + j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      b[j][0] = words[0], b[j][1] = words[1], b[j + 1][0] = words[2], b[j + 1][1] = words[3];
    }
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentCols; ++j) mma_m16n8k16<T>(sums[i][j], a[i], b[j]);
  }
}

template <class T>
__global__ void __launch_bounds__(WarpTile::kThreads, kWarpTile.blocks) projector_linear_warps_kernel(const __grid_constant__ LinearParams p) {
  COBRA_DYNAMIC_SHARED(char, shared);
  COBRA_SHARED(RowTable<WarpTile>, table);
  const Work<WarpTile> work(p);
  fill_table<T, WarpTile>(p, table, work.row);
  __syncthreads();

  StepLoader<T, WarpTile> loader(p, table, work);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < work.steps) loader.load(shared + s * WarpTile::kStageBytes);
    copy_async_commit();
  }
  const int warp = threadIdx.x / kWarp, warp_row = warp % 2 * kWarpRows, warp_col = warp / 2 * kWarpCols;
  Sums sums = {};
  int read = 0, write = kStages - 1;
  for (int64_t step = 0; step < work.steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all; the stage of the step before has been read by all
    if (step + kStages - 1 < work.steps) loader.load(shared + write * WarpTile::kStageBytes);
    copy_async_commit();  // empty at the end, so that the count of groups is the same in every step
    multiply<T>(sums, shared + read * WarpTile::kStageBytes, warp_row, warp_col);
    read = (read + 1) % kStages;
    write = (write + 1) % kStages;
  }

  store_sums(p, work, reinterpret_cast<float*>(shared), [&](auto&& f) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentCols; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(warp_row + i * 16 + half * 8 + lane / 4, warp_col + j * 8 + lane % 4 * 2, make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]));
  });
}

// --- warpgroups -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(WarpgroupTile::kThreads, kWarpgroupTile.blocks)
    projector_linear_warpgroups_kernel(const __grid_constant__ LinearParams p) {
#if COBRA_HAS_WGMMA
  COBRA_DYNAMIC_SHARED(char, unaligned);
  COBRA_SHARED(RowTable<WarpgroupTile>, table);
  char* const shared = unaligned + (kMatrixAlignment - reinterpret_cast<uintptr_t>(unaligned) % kMatrixAlignment) % kMatrixAlignment;
  const Work<WarpgroupTile> work(p);
  fill_table<T, WarpgroupTile>(p, table, work.row);
  __syncthreads();

  constexpr int kAhead = kStages - 2;
  StepLoader<T, WarpgroupTile> loader(p, table, work);
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < work.steps) loader.load(shared + s * WarpgroupTile::kStageBytes);
    copy_async_commit();
  }
  const int warpgroup = threadIdx.x / 128;
  WarpgroupProducts<T> products;
  float sums[128] = {};
  int read = 0, write = kAhead;
  for (int64_t step = 0; step < work.steps; ++step) {
    copy_async_wait<kAhead - 1>();
    fence_for_products();
    __syncthreads();  // this step has arrived for all; the products of the step before the last are done in both warpgroups
    const char* const x = shared + read * WarpgroupTile::kStageBytes;
    products.fence(sums);
#pragma unroll
    for (int k = 0; k < WarpgroupTile::kDepth / 16; ++k)
      products.add(sums, shared_matrix(x + warpgroup * 64 * WarpgroupTile::kRowBytes, k),
                   shared_matrix(x + WarpgroupTile::kRows * WarpgroupTile::kRowBytes, k));
    products.commit();
    if (step + kAhead < work.steps) loader.load(shared + write * WarpgroupTile::kStageBytes);
    copy_async_commit();
    products.template wait<1>();
    read = (read + 1) % kStages;
    write = (write + 1) % kStages;
  }
  products.template wait<0>();
  products.fence(sums);

  store_sums(p, work, reinterpret_cast<float*>(shared), [&](auto&& f) {
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 32; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f(row + half * 8, j * 8 + lane % 4 * 2, make_float2(sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]));
  });
#endif
}

// --- parts ------------------------------------------------------------------------------------------------------------

// Adds the parts of the tiles that have them, in order. A thread owns 4 neighbouring columns of a tile.
constexpr int kPartThreads = 128;
template <class Tile>
__global__ void __launch_bounds__(kPartThreads) projector_linear_parts_kernel(const __grid_constant__ LinearParams p) {
  constexpr int kGroups = Tile::kRows * Tile::kCols / 4, kBlocks = kGroups / kPartThreads;
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows, left = row_tiles * ((p.cols + Tile::kCols - 1) / Tile::kCols) - p.whole_tiles;
  const int64_t local = int64_t(blockIdx.x) / kBlocks, tile = p.whole_tiles + local;
  const int group = int(blockIdx.x % kBlocks) * kPartThreads + int(threadIdx.x);
  const int64_t row = tile % row_tiles * Tile::kRows + group / (Tile::kCols / 4);
  const int64_t col = tile / row_tiles * Tile::kCols + group % (Tile::kCols / 4) * 4;
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

template <class Tile>
int launch_tiles(void (*kernel)(LinearParams), const LinearParams& p, int alignment, void* stream) {
  // A block is 16,384 outputs or more: the largest grid is more than any memory holds.
  const int64_t left = linear_tiles(p) - p.whole_tiles;
  const dim3 grid(unsigned(p.whole_tiles + left * p.split));
  const int error = launch(kernel, grid, dim3(Tile::kThreads), kStages * Tile::kStageBytes + alignment, stream, p);
  if (error || left == 0) return error;
  return launch(&projector_linear_parts_kernel<Tile>, dim3(unsigned(left * (Tile::kRows * Tile::kCols / 4 / kPartThreads))), dim3(kPartThreads), 0, stream, p);
}

}  // namespace

int projector_linear_cuda(const LinearParams& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return 0;
  const auto of_type = [&](auto t) {
    using T = decltype(t);
    if (p.warpgroups) return launch_tiles<WarpgroupTile>(&projector_linear_warpgroups_kernel<T>, p, kMatrixAlignment, stream);
    return launch_tiles<WarpTile>(&projector_linear_warps_kernel<T>, p, 0, stream);
  };
  return p.dtype == DType::kBFloat16 ? of_type(__nv_bfloat16{}) : of_type(__half{});
}

LinearDevice projector_linear_device_cuda() {
  LinearDevice found{1, 0, false};
#if defined(__CUDACC__)
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return {1, 0, false};
  // The code that this GPU runs must come from the sm_90a image: what it compiles itself from the PTX of another is an empty kernel.
  cudaFuncAttributes code{};
  found.warpgroups = major == 9 && cudaFuncGetAttributes(&code, projector_linear_warpgroups_kernel<__half>) == cudaSuccess && code.ptxVersion >= 90;
#endif
  return found;
}

}  // namespace cobra
