// The projector's own passes on a CPU. Each reads its rows once and writes once; threads own rows (bias_gelu) or column
// tiles of one image (gelu_pool, peg), so every element has one owner.
#include "common/cpu_level.h"
#include "projector/projector_cpu.h"

#include <algorithm>
#include <vector>

namespace cobra {
COBRA_DECLARE_LEVELS(projector_bias_gelu, BiasGeluParams)
COBRA_DECLARE_LEVELS(projector_gelu_pool, GeluPoolParams)
COBRA_DECLARE_LEVELS(projector_peg, PegParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

template <class T>
void bias_gelu(const BiasGeluParams& p, const Parallel& parallel) {
  const int64_t tiles = (p.cols + kColumns - 1) / kColumns;
  std::vector<T> bias(tiles * kColumns, T(0));
  if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, 0, p.bias_stride, p.cols);
  parallel(0, p.rows * tiles, 64, [&](int64_t begin, int64_t end) {
    Columns<T> row;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % tiles * kColumns, columns = std::min(kColumns, p.cols - at), offset = i / tiles * p.cols + at;
      load_row(row.data, p.h, p.h_dtype, offset, 1, columns);
      for (int64_t c = 0; c < columns; c += Vec<T>::kWidth)
        store(row.data + c, rounded(gelu(load(row.data + c) + load(bias.data() + at + c)), p.round_dtype));
      store_row(p.y, p.y_dtype, offset, 1, row.data, columns);
    }
  });
}

// Per column tile: each input row of the grid is activated and pooled along the width once, into a ring that holds as many
// rows as a bin is high; then the rows of a bin are added.
template <class T>
void gelu_pool(const GeluPoolParams& p, const Parallel& parallel) {
  const int64_t tiles = (p.channels + kColumns - 1) / kColumns;
  int64_t ring_rows = 1;
  for (int64_t i = 0; i < p.out_height; ++i)
    ring_rows = std::max(ring_rows, bin_end(i, p.height, p.out_height) - bin_begin(i, p.height, p.out_height));

  parallel(0, p.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> ring(ring_rows * p.out_width * kColumns);  // (ring_rows, out_width, kColumns)
    std::vector<T> active(p.width * kColumns, T(0));          // (width, kColumns): one activated row of the grid
    Columns<T> bias, sum;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / tiles, at = item % tiles * kColumns, columns = std::min(kColumns, p.channels - at);
      if (p.bias) load_row(bias.data, p.bias, p.bias_dtype, at * p.bias_stride, p.bias_stride, columns);

      const auto pool_row_of_grid = [&](int64_t row) {
        for (int64_t x = 0; x < p.width; ++x) {
          T* const value = active.data() + x * kColumns;
          load_row(value, p.hidden, p.dtype, ((batch * p.height + row) * p.width + x) * p.channels + at, 1, columns);
          if (p.gelu)
            for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) store(value + c, gelu(load(value + c) + load(bias.data + c)));
        }
        for (int64_t j = 0; j < p.out_width; ++j) {
          T* const pooled = ring.data() + (row % ring_rows * p.out_width + j) * kColumns;
          const int64_t x0 = bin_begin(j, p.width, p.out_width), x1 = bin_end(j, p.width, p.out_width);
          for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) {
            Vec<T> s = load(active.data() + x0 * kColumns + c);
            for (int64_t x = x0 + 1; x < x1; ++x) s += load(active.data() + x * kColumns + c);
            store(pooled + c, s);
          }
        }
      };

      int64_t next = 0;  // first row of the grid not yet in the ring
      for (int64_t i = 0; i < p.out_height; ++i) {
        const int64_t y0 = bin_begin(i, p.height, p.out_height), y1 = bin_end(i, p.height, p.out_height);
        for (; next < y1; ++next) pool_row_of_grid(next);
        for (int64_t j = 0; j < p.out_width; ++j) {
          const int64_t x0 = bin_begin(j, p.width, p.out_width), x1 = bin_end(j, p.width, p.out_width);
          const Vec<T> count = T((y1 - y0) * (x1 - x0));
          for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) {
            Vec<T> s = T(0);
            for (int64_t y = y0; y < y1; ++y) s += load(ring.data() + (y % ring_rows * p.out_width + j) * kColumns + c);
            store(sum.data + c, rounded(s / count, p.round_dtype));
          }
          store_row(p.pooled, p.pooled_dtype, ((batch * p.out_height + i) * p.out_width + j) * p.channels + at, 1, sum.data, columns);
        }
      }
    }
  });
}

template <class T>
void peg(const PegParams& p, const Parallel& parallel) {
  const int64_t tiles = (p.channels + kColumns - 1) / kColumns;
  parallel(0, p.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    Columns<T> weight[9], bias, y;
    std::vector<T> rows(3 * p.width * kColumns, T(0));  // (3, width, kColumns): rows y - 1 .. y + 1 of the grid, ring
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / tiles, at = item % tiles * kColumns, columns = std::min(kColumns, p.channels - at);
      for (int64_t tap = 0; tap < 9; ++tap)
        load_row(weight[tap].data, p.weight, p.weight_dtype,
                 at * p.weight_stride_channel + tap / 3 * p.weight_stride_row + tap % 3 * p.weight_stride_column,
                 p.weight_stride_channel, columns);
      if (p.bias) load_row(bias.data, p.bias, p.bias_dtype, at * p.bias_stride, p.bias_stride, columns);
      for (int64_t c = 0; c < columns; ++c) weight[4].data[c] += T(1);  // the residual is one more centre tap

      const auto token = [&](int64_t y, int64_t x) { return ((batch * p.height + y) * p.width + x) * p.channels + at; };
      const auto staged = [&](int64_t y, int64_t x) { return rows.data() + (y % 3 * p.width + x) * kColumns; };
      int64_t next = 0;
      for (int64_t oy = 0; oy < p.height; ++oy) {
        for (; next < std::min(p.height, oy + 2); ++next)
          for (int64_t x = 0; x < p.width; ++x) load_row(staged(next, x), p.p, p.p_dtype, token(next, x), 1, columns);
        for (int64_t ox = 0; ox < p.width; ++ox) {
          const int64_t y0 = std::max<int64_t>(0, oy - 1), y1 = std::min(p.height, oy + 2);
          const int64_t x0 = std::max<int64_t>(0, ox - 1), x1 = std::min(p.width, ox + 2);
          for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) {
            Vec<T> s = load(bias.data + c);
            for (int64_t iy = y0; iy < y1; ++iy)
              for (int64_t ix = x0; ix < x1; ++ix)
                s = fma(load(staged(iy, ix) + c), load(weight[(iy - oy + 1) * 3 + ix - ox + 1].data + c), s);
            store(y.data + c, s);
          }
          store_row(p.y, p.y_dtype, token(oy, ox), 1, y.data, columns);
        }
      }
    }
  });
}

}  // namespace

void projector_bias_gelu(const BiasGeluParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.h_dtype == DType::kFloat64) return bias_gelu<double>(p, parallel);
#endif
  bias_gelu<float>(p, parallel);
}

void projector_gelu_pool(const GeluPoolParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.dtype == DType::kFloat64) return gelu_pool<double>(p, parallel);
#endif
  gelu_pool<float>(p, parallel);
}

void projector_peg(const PegParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.p_dtype == DType::kFloat64) return peg<double>(p, parallel);
#endif
  peg<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launchers, once: fp64 runs at the scalar level
namespace cobra {

void projector_bias_gelu_cpu(const BiasGeluParams& p, const Parallel& parallel) {
  p.h_dtype == DType::kFloat64 ? scalar::projector_bias_gelu(p, parallel) : COBRA_AT_LEVEL(projector_bias_gelu)(p, parallel);
}
void projector_gelu_pool_cpu(const GeluPoolParams& p, const Parallel& parallel) {
  p.dtype == DType::kFloat64 ? scalar::projector_gelu_pool(p, parallel) : COBRA_AT_LEVEL(projector_gelu_pool)(p, parallel);
}
void projector_peg_cpu(const PegParams& p, const Parallel& parallel) {
  p.p_dtype == DType::kFloat64 ? scalar::projector_peg(p, parallel) : COBRA_AT_LEVEL(projector_peg)(p, parallel);
}

}  // namespace cobra
#endif
