// Operands of products packed into panels, and one tile of a product of two of them. Sums over the
// depth run in one order, whatever the number of threads.
//
// A panel is kWidth columns of an operand, depth after depth, with zeros beyond the last column. Both
// operands of a tile are read from panels: kWidth columns as vectors, kHeight rows as broadcasts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace shampoo::cpu {

// Of a packed panel: those of a matrix of 256 columns stay in the L2 cache.
template <class Flat>
constexpr int64_t kDepth = 1024 / sizeof(Flat);
constexpr int kVectors = 2;

template <class Flat>
constexpr int64_t kWidth = kVectors * kLanesOf<Flat>;
// As many accumulators as registers allow, and a divisor of every width but the scalar one.
template <class Flat>
constexpr int64_t kHeight = std::min<int64_t>(kVectorBytes == 64 ? 8 : 4, kWidth<Flat>);

// A block as [before, size, after]: the columns of its unfolding are the entries of the middle, its
// depth all of the rest.
struct Unfolding {
  int64_t before, size, after;
  int64_t depth() const { return before * after; }
};

// Depths [start, start + depth) of the columns of one panel; zero beyond the last column.
template <class Flat>
void pack(Flat* panel, const Flat* grad, const Unfolding& shape, int64_t column, int64_t start,
          int64_t depth) {
  constexpr int64_t width = kWidth<Flat>;
  const int64_t columns = std::min(width, shape.size - column);
  if (columns < width) std::fill_n(panel, depth * width, Flat(0));
  if (shape.after == 1) {
    const Flat* from = grad + start * shape.size + column;
    if (columns == width)  // known to the compiler
      for (int64_t k = 0; k < depth; ++k) std::copy_n(from + k * shape.size, width, panel + k * width);
    else
      for (int64_t k = 0; k < depth; ++k)
        std::copy_n(from + k * shape.size, columns, panel + k * width);
    return;
  }
  // A run of depths is contiguous in the gradient; short runs keep the panel's lines in L1.
  for (int64_t k = 0; k < depth;) {
    const int64_t outer = (start + k) / shape.after, inner = (start + k) % shape.after;
    const int64_t run = std::min({depth - k, shape.after - inner, int64_t(16)});
    const Flat* from = grad + (outer * shape.size + column) * shape.after + inner;
    transpose(panel + k * width, width, from, shape.after, columns, run);
    k += run;
  }
}

// Of a tile of a product.
template <class Flat>
using Sums = Flat[kHeight<Flat>][kWidth<Flat>];

// sums[r][c] = sum over the depth of rows[r] * columns[c], both read from packed panels, added to what
// is there if `adds`; zero before the vector `first`. Long sums are added up in pieces of kDepth.
template <int first, bool adds, class Flat>
void multiply(Sums<Flat>& sums, const Flat* rows, const Flat* columns, int64_t depth) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>, lanes = kLanesOf<Flat>;
  for (int64_t start = 0; start < depth; start += kDepth<Flat>) {
    Vector<Flat> total[height][kVectors];
    for (auto& row : total)
      for (auto& vector : row) vector = fill(Flat(0));
    const int64_t end = std::min(depth, start + kDepth<Flat>);
    for (int64_t k = start; k < end; ++k, rows += width, columns += width) {
      Vector<Flat> column[kVectors];
      for (int v = first; v < kVectors; ++v) column[v] = load(columns + v * lanes);
      for (int64_t r = 0; r < height; ++r) {
        const auto row = fill(rows[r]);
        for (int v = first; v < kVectors; ++v) total[r][v] = fused(row, column[v], total[r][v]);
      }
    }
    for (int64_t r = 0; r < height; ++r)
      for (int v = 0; v < kVectors; ++v) {
        Flat* at = &sums[r][v * lanes];
        store(at, start == 0 && !adds ? total[r][v] : fused(fill(Flat(1)), total[r][v], load(at)));
      }
  }
}

}  // namespace shampoo::cpu
