// General products by tiles of packed panels. An entry is one sum over the depth in one order: its bits
// depend on the two columns it comes from alone, not on where these lie in memory, on what is computed
// beside them, or on the number of threads. A BLAS promises none of that.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/for_matrices.h"
#include "cpu/packed_panels.h"

namespace shampoo::cpu {

// Of packed rows, per call of `visit`: with the panels that they meet, they stay in the L2 cache.
constexpr int64_t kRowBytes = 1 << 18;

// The elements that the panels of a [depth, size] matrix take.
template <class Flat>
int64_t packed_numel(int64_t depth, int64_t size) {
  return (size + kWidth<Flat> - 1) / kWidth<Flat> * kWidth<Flat> * depth;
}

// Every panel of the columns of an unfolding.
template <class Flat, class ForPanels>
void pack_panels(Flat* panels, const Flat* matrix, const Unfolding& shape,
                 const ForPanels& for_panels) {
  constexpr int64_t width = kWidth<Flat>;
  for_panels((shape.size + width - 1) / width, [&](int64_t panel) {
    pack(panels + panel * width * shape.depth(), matrix, shape, panel * width, 0, shape.depth());
  });
}

// The first rows and columns of the sums of a tile.
template <class Flat>
void store(Flat* to, int64_t stride, const Sums<Flat>& sums, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    if (columns == kWidth<Flat>)  // known to the compiler
      std::copy_n(sums[r], kWidth<Flat>, to);
    else
      std::copy_n(sums[r], columns, to);
  }
}

// out[r, c] = sum over k of left[k, r] right[k, c], with k, r running over depth and size of `shape` and
// c < columns. `right` is packed; `out` is row-major and overlaps neither.
template <class Flat, class ForPanels>
void multiply_columns(Flat* out, const Flat* left, const Unfolding& shape, const Flat* right,
                      int64_t columns, const ForPanels& for_panels) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>;
  const int64_t depth = shape.depth(), panel_numel = depth * width;
  const int64_t panels = (shape.size + width - 1) / width;
  const int64_t fitting = kRowBytes / (panel_numel * static_cast<int64_t>(sizeof(Flat)));
  // `for_panels` hands out pairs: with fewer than two for each thread, one would have nothing to do.
  const int64_t pairs = 2 * at::get_num_threads();
  const int64_t batch = std::max<int64_t>(1, std::min(fitting, (panels + pairs - 1) / pairs));
  for_panels((panels + batch - 1) / batch, [&](int64_t ordinal) {
    const int64_t first = ordinal * batch, last = std::min(panels, first + batch);
    const Scratch<Flat> packed((last - first) * panel_numel);
    for (int64_t panel = first; panel < last; ++panel)
      pack(packed.data() + (panel - first) * panel_numel, left, shape, panel * width, 0, depth);
    const int64_t end = std::min(last * width, shape.size);
    for (int64_t column = 0; column < columns; column += width)
      for (int64_t row = first * width; row < end; row += height) {
        const int64_t at = row - first * width;
        alignas(64) Sums<Flat> sums;
        multiply<0, false>(sums, packed.data() + at / width * panel_numel + at % width,
                           right + column / width * panel_numel, depth);
        store(out + row * columns + column, columns, sums, std::min(height, end - row),
              std::min(width, columns - column));
      }
  });
}

}  // namespace shampoo::cpu
