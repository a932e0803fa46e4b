// Symmetric products by tiles of packed panels: those on and above the diagonal, the rest mirrored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/packed_panels.h"

namespace shampoo::cpu {

// Where a symmetric matrix lies: entry (i, j) at j / kWidth * panel + i * row + j % kWidth.
template <class Flat>
struct Layout {
  int64_t size, row, panel;

  static Layout rows(int64_t size) { return {size, size, kWidth<Flat>}; }
  static Layout panels(int64_t size) { return {size, kWidth<Flat>, size * kWidth<Flat>}; }

  bool is_padded() const { return row == kWidth<Flat>; }
  int64_t count() const { return (size + kWidth<Flat> - 1) / kWidth<Flat>; }
  int64_t numel() const { return is_padded() ? count() * panel : size * size; }
  int64_t at(int64_t i, int64_t j) const {
    return j / kWidth<Flat> * panel + i * row + j % kWidth<Flat>;
  }
};

template <class Flat>
struct Operands {
  const Flat *left, *right;
  int64_t panel;  // from one panel to the next
  int64_t depth;
  bool both_orders = false;  // left right + right left
};

// alpha product + beta addend + diagonal I; `addend` lies as the result does, and may be it, or null.
template <class Flat>
struct Polynomial {
  Flat alpha = 1;
  const Flat* addend = nullptr;
  Flat beta = 0;
  Flat diagonal = 0;
};

template <int first, class Flat>
void multiply(Sums<Flat>& sums, const Operands<Flat>& operands, int64_t row, int64_t panel) {
  const int64_t rows = row / kWidth<Flat> * operands.panel + row % kWidth<Flat>;
  const int64_t columns = panel * operands.panel;
  multiply<first, false>(sums, operands.left + rows, operands.right + columns, operands.depth);
  if (operands.both_orders)
    multiply<first, true>(sums, operands.right + rows, operands.left + columns, operands.depth);
}

// Tiles of one panel of columns from the first row down to the diagonal, written to `out` and, where
// `mirror` says so, mirrored. What is not mirrored is undefined below the diagonal.
template <class Flat>
void upper_tiles(Flat* out, const Layout<Flat>& layout, int64_t panel,
                 const Operands<Flat>& operands, const Polynomial<Flat>& polynomial, bool mirror) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>, lanes = kLanesOf<Flat>;
  const int64_t column = panel * width, columns = std::min(width, layout.size - column);
  const bool is_whole = columns == width || layout.is_padded();
  const auto alpha = fill(polynomial.alpha), beta = fill(polynomial.beta);
  const auto zero = fill(Flat(0));
  alignas(64) Flat edge[width] = {};  // a row, where the last columns are not there
  for (int64_t row = 0; row < column + columns; row += height) {
    alignas(64) Sums<Flat> sums;
    if (row < column + lanes)
      multiply<0>(sums, operands, row, panel);
    else  // what is left of the diagonal is mirrored
      multiply<1>(sums, operands, row, panel);
    const int64_t rows = std::min(height, layout.size - row), here = layout.at(row, column);
    for (int64_t r = 0; r < rows; ++r) {
      Flat* to = is_whole ? out + here + r * layout.row : edge;
      const Flat* addend = polynomial.addend ? polynomial.addend + here + r * layout.row : nullptr;
      if (addend && !is_whole) addend = std::copy_n(addend, columns, edge) - columns;
      for (int v = 0; v < kVectors; ++v) {
        Flat* sum = &sums[r][v * lanes];
        const auto base = addend ? fused(beta, load(addend + v * lanes), zero) : zero;
        const auto entry = fused(alpha, load(sum), base);
        store(sum, entry);
        store(to + v * lanes, entry);
      }
      if (row + r >= column) {
        const int64_t c = row + r - column;
        to[c] = sums[r][c] += polynomial.diagonal;
      }
      if (!is_whole) std::copy_n(edge, columns, out + here + r * layout.row);
    }
    if (mirror && row < column)
      transpose(out + layout.at(column, row), layout.row, &sums[0][0], width, height, columns);
  }
  if (!mirror) return;
  Flat* corner = out + layout.at(column, column);
  for (int64_t i = 1; i < columns; ++i)
    for (int64_t j = 0; j < i; ++j) corner[i * layout.row + j] = corner[j * layout.row + i];
}

}  // namespace shampoo::cpu
