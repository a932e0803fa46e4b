// Symmetric products by tiles: operands packed into panels, tiles on and above the diagonal, the rest
// mirrored. Sums over the depth run in one order, whatever the number of threads.
//
// A panel is kWidth columns of an operand, depth after depth, with zeros beyond the last column. Both
// operands of a tile are read from panels: kWidth columns as vectors, kHeight rows as broadcasts.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/simd.h"

namespace shampoo {

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
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < run; ++r) panel[(k + r) * width + c] = from[c * shape.after + r];
    k += run;
  }
}

// Of a tile of a product.
template <class Flat>
using Sums = Flat[kHeight<Flat>][kWidth<Flat>];

// Column c of the sums becomes row c of `to`.
template <class Flat>
void transpose(Flat* to, int64_t stride, const Sums<Flat>& sums, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < kHeight<Flat>; ++r) to[c * stride + r] = sums[r][c];
}

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
      transpose(out + layout.at(column, row), layout.row, sums, columns);
  }
  if (!mirror) return;
  Flat* corner = out + layout.at(column, column);
  for (int64_t i = 1; i < columns; ++i)
    for (int64_t j = 0; j < i; ++j) corner[i * layout.row + j] = corner[j * layout.row + i];
}

// Memory whose vectors cross no line of the cache; not initialised.
template <class Flat>
class Scratch {
 public:
  explicit Scratch(int64_t numel)
      : memory_(static_cast<Flat*>(::operator new(numel * sizeof(Flat), kLine))) {}
  Flat* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(Flat* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<Flat, Free> memory_;
};

// Calls `work(b, scratch, for_panels)` for every matrix of a stack. With as many matrices as threads
// each takes its own; else threads share one, and `for_panels(panels, visit)` hands out its panels, in
// pairs from both ends since a panel costs as much as it has rows.
template <class Flat, class Work>
void for_matrices(int64_t count, int64_t scratch_numel, const Work& work) {
  if (count >= at::get_num_threads()) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<Flat> scratch(scratch_numel);
      for (int64_t b = begin; b < end; ++b)
        work(b, scratch.data(), [](int64_t panels, const auto& visit) {
          for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
        });
    });
    return;
  }
  const Scratch<Flat> scratch(scratch_numel);
  for (int64_t b = 0; b < count; ++b)
    work(b, scratch.data(), [](int64_t panels, const auto& visit) {
      at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          visit(panel);
          if (panels - 1 - panel != panel) visit(panels - 1 - panel);
        }
      });
    });
}

}  // namespace shampoo
