// A tensor (..., dim) seen as rows: up to kMaxRowDims leading dims with any strides, so that views are read in place.
// The binding merges leading dims that are contiguous in every tensor of a call; a plain tensor has one.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define COBRA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define COBRA_HOST_DEVICE inline
#endif

namespace cobra {

constexpr int kMaxRowDims = 6;

struct RowShape {
  int32_t ndim;                // leading dims after merging, 1..kMaxRowDims
  int64_t size[kMaxRowDims];   // outermost first
};

struct RowStride {
  int64_t row[kMaxRowDims];  // elements, one per leading dim
  int64_t dim;               // elements between two channels of a row
};

// Offset, in elements, of the first channel of row `row` (row-major over the leading dims).
COBRA_HOST_DEVICE int64_t row_offset(const RowShape& shape, const RowStride& stride, int64_t row) {
  if (shape.ndim == 1) return row * stride.row[0];
  int64_t offset = 0;
  for (int i = shape.ndim - 1; i > 0; --i) {
    offset += (row % shape.size[i]) * stride.row[i];
    row /= shape.size[i];
  }
  return offset + row * stride.row[0];
}

// The same for several tensors at once: one division per leading dim beyond the first, whatever their number.
template <int kTensors>
struct RowOffsets {
  int64_t of[kTensors];
};
template <class... Strides>
COBRA_HOST_DEVICE RowOffsets<sizeof...(Strides)> row_offsets(const RowShape& shape, int64_t row, const Strides&... strides) {
  const RowStride* const stride[] = {&strides...};
  RowOffsets<sizeof...(Strides)> offsets{};
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int i = shape.ndim - 1; i > 0; --i) {
    const int64_t outer = row / shape.size[i], index = row - outer * shape.size[i];
    for (int k = 0; k < int(sizeof...(Strides)); ++k) offsets.of[k] += index * stride[k]->row[i];
    row = outer;
  }
  for (int k = 0; k < int(sizeof...(Strides)); ++k) offsets.of[k] += row * stride[k]->row[0];
  return offsets;
}

}  // namespace cobra
