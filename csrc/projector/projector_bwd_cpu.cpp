// The backward of the projector's passes on a CPU. Threads own (block of rows, column tile) pairs, then column tiles in the second
// stage of the sums, so every element has one owner and every sum one order.
#include "common/cpu_level.h"
#include "projector/projector_cpu.h"

#include <algorithm>
#include <vector>

namespace cobra {
COBRA_DECLARE_LEVELS(projector_gelu_bwd, GeluBwdParams)
COBRA_DECLARE_LEVELS(projector_peg_bwd, PegBwdParams)
}  // namespace cobra

namespace cobra::COBRA_LEVEL {
namespace {

template <class T>
void add_columns(const ColumnSums& all, const Parallel& parallel) {
  const int64_t tiles = (all.channels + kColumns - 1) / kColumns;
  parallel(0, all.sums * tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / tiles, at = item % tiles * kColumns, columns = std::min(kColumns, all.channels - at);
      const ColumnSums::Output& output = all.output[i];
      if (!output.to) continue;
      Columns<T> sum;
      const T* line = static_cast<const T*>(all.partial) + i * all.blocks * all.channels + at;
      for (int64_t block = 0; block < all.blocks; ++block, line += all.channels)
        for (int64_t c = 0; c < columns; ++c) sum.data[c] += line[c];
      store_row(output.to, output.dtype, at * output.stride, output.stride, sum.data, columns);
    }
  });
}

// d of a position of the grid, from the bins that hold it.
template <class T>
COBRA_INLINE void gather(const GeluBwdParams& p, int64_t row, int64_t at, int64_t columns, T* d, T* scratch) {
  const int64_t batch = row / (p.height * p.width), y = row / p.width % p.height, x = row % p.width;
  std::fill_n(d, columns, T(0));
  for (int64_t i = bin_begin(y, p.out_height, p.height); i < bin_end(y, p.out_height, p.height); ++i)
    for (int64_t j = bin_begin(x, p.out_width, p.width); j < bin_end(x, p.out_width, p.width); ++j) {
      const int64_t rows = bin_end(i, p.height, p.out_height) - bin_begin(i, p.height, p.out_height);
      const Vec<T> share = T(1) / T(rows * (bin_end(j, p.width, p.out_width) - bin_begin(j, p.width, p.out_width)));
      load_row(scratch, p.d, p.d_dtype, ((batch * p.out_height + i) * p.out_width + j) * p.cols + at, 1, columns);
      for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) store(d + c, fma(load(scratch + c), share, load(d + c)));
    }
}

template <class T>
void gelu_bwd(const GeluBwdParams& p, const Parallel& parallel) {
  constexpr DType kCompute = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  const int64_t tiles = (p.cols + kColumns - 1) / kColumns, each = (p.rows + p.row_blocks - 1) / p.row_blocks;
  std::vector<T> bias(tiles * kColumns, T(0));
  if (p.bias) load_row(bias.data(), p.bias, p.bias_dtype, 0, p.bias_stride, p.cols);
  parallel(0, p.row_blocks * tiles, 4, [&](int64_t begin, int64_t end) {
    Columns<T> d, z;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / tiles, at = item % tiles * kColumns, columns = std::min(kColumns, p.cols - at);
      Columns<T> sum;
      for (int64_t row = block * each; row < std::min(p.rows, (block + 1) * each); ++row) {
        if (p.pool)
          gather(p, row, at, columns, d.data, z.data);
        else
          load_row(d.data, p.d, p.d_dtype, row_offset(p.shape, p.d_stride, row) + at * p.d_stride.dim, p.d_stride.dim, columns);
        if (p.sums) load_row(z.data, p.sums, kCompute, row * p.cols + at, 1, columns);
        for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) {
          Vec<T> v = load(d.data + c);
          if (p.sums) v *= gelu_slope(load(z.data + c) + load(bias.data() + at + c));
          store(d.data + c, v);
          store(sum.data + c, load(sum.data + c) + v);
        }
        if (p.dz) store_row(p.dz, p.dz_dtype, row * p.cols + at, 1, d.data, columns);
      }
      if (p.dbias) std::copy_n(sum.data, columns, static_cast<T*>(p.partial) + block * p.cols + at);
    }
  });
  if (p.dbias) add_columns<T>(column_sums(p), parallel);
}

// Each position of the grid meets the nine dy around it twice: with the filter turned round they make its dp, times its p they are
// its share of the nine taps.
template <class T>
void peg_bwd(const PegBwdParams& p, const Parallel& parallel) {
  constexpr DType kCompute = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
  const int64_t tiles = (p.channels + kColumns - 1) / kColumns, units = p.batch * p.height, each = (units + p.blocks - 1) / p.blocks;
  const int sums = peg_bwd_sums(p);
  parallel(0, p.blocks * tiles, 1, [&](int64_t begin, int64_t end) {
    Columns<T> weight[9], bias, value, dp;            // weight[k]: of neighbour k of dy, row by row, which is tap 8 - k
    std::vector<T> rows(3 * p.width * kColumns);      // (3, width, kColumns): rows y - 1 .. y + 1 of dy, ring
    std::vector<T> sum(kMostSums * kColumns);         // (kMostSums, kColumns)
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / tiles, at = item % tiles * kColumns, columns = std::min(kColumns, p.channels - at);
      for (int64_t tap = 0; tap < 9; ++tap)
        load_row(weight[8 - tap].data, p.weight, p.weight_dtype,
                 at * p.weight_stride_channel + tap / 3 * p.weight_stride_row + tap % 3 * p.weight_stride_column, p.weight_stride_channel, columns);
      for (int64_t c = 0; c < columns; ++c) weight[4].data[c] += T(1);  // the residual is one more centre tap
      if (p.p_bias) load_row(bias.data, p.p_bias, p.p_bias_dtype, at * p.p_bias_stride, p.p_bias_stride, columns);
      std::fill(sum.begin(), sum.end(), T(0));

      const int64_t first = block * each;
      int64_t next = 0;  // first row of the grid not yet staged
      for (int64_t unit = first; unit < std::min(units, first + each); ++unit) {
        const int64_t batch = unit / p.height, y = unit % p.height;
        const auto staged = [&](int64_t y, int64_t x) { return rows.data() + (y % 3 * p.width + x) * kColumns; };
        if (unit == first || y == 0) next = std::max<int64_t>(0, y - 1);
        for (; next < std::min(p.height, y + 2); ++next)
          for (int64_t x = 0; x < p.width; ++x)
            load_row(staged(next, x), p.dy, p.dy_dtype,
                     batch * p.dy_stride_batch + (next * p.width + x) * p.dy_stride_token + at * p.dy_stride_channel, p.dy_stride_channel, columns);

        const int64_t y0 = std::max<int64_t>(0, y - 1), y1 = std::min(p.height, y + 2);
        for (int64_t x = 0; x < p.width; ++x) {
          const int64_t offset = (unit * p.width + x) * p.channels + at;
          const int64_t x0 = std::max<int64_t>(0, x - 1), x1 = std::min(p.width, x + 2);
          if (p.dweight) load_row(value.data, p.sums, kCompute, offset, 1, columns);
          for (int64_t c = 0; c < columns; c += Vec<T>::kWidth) {
            const Vec<T> centre = load(value.data + c) + load(bias.data + c);
            Vec<T> s = T(0);
            for (int64_t iy = y0; iy < y1; ++iy)
              for (int64_t ix = x0; ix < x1; ++ix) {
                const int64_t k = (iy - y + 1) * 3 + ix - x + 1;
                const Vec<T> near = load(staged(iy, ix) + c);
                T* const tap = sum.data() + (10 - k) * kColumns + c;
                s = fma(near, load(weight[k].data + c), s);
                if (p.dweight) store(tap, fma(near, centre, load(tap)));
              }
            store(dp.data + c, s);
            store(sum.data() + c, load(sum.data() + c) + load(staged(y, x) + c));
            store(sum.data() + kColumns + c, load(sum.data() + kColumns + c) + s);
          }
          if (p.dp) store_row(p.dp, p.dp_dtype, offset, 1, dp.data, columns);
        }
      }
      for (int i = 0; i < sums; ++i)
        std::copy_n(sum.data() + i * kColumns, columns, static_cast<T*>(p.partial) + (i * p.blocks + block) * p.channels + at);
    }
  });
  add_columns<T>(column_sums(p), parallel);
}

}  // namespace

void projector_gelu_bwd(const GeluBwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.d_dtype == DType::kFloat64) return gelu_bwd<double>(p, parallel);
#endif
  gelu_bwd<float>(p, parallel);
}

void projector_peg_bwd(const PegBwdParams& p, const Parallel& parallel) {
#if defined(COBRA_LEVEL_SCALAR)
  if (p.dy_dtype == DType::kFloat64) return peg_bwd<double>(p, parallel);
#endif
  peg_bwd<float>(p, parallel);
}

}  // namespace cobra::COBRA_LEVEL

#if defined(COBRA_LEVEL_SCALAR)  // the launchers, once: fp64 runs at the scalar level
namespace cobra {

void projector_gelu_bwd_cpu(const GeluBwdParams& p, const Parallel& parallel) {
  p.d_dtype == DType::kFloat64 ? scalar::projector_gelu_bwd(p, parallel) : COBRA_AT_LEVEL(projector_gelu_bwd)(p, parallel);
}
void projector_peg_bwd_cpu(const PegBwdParams& p, const Parallel& parallel) {
  p.dy_dtype == DType::kFloat64 ? scalar::projector_peg_bwd(p, parallel) : COBRA_AT_LEVEL(projector_peg_bwd)(p, parallel);
}

}  // namespace cobra
#endif
