// Symmetric products by tiles: operands packed into panels, tiles on and above the diagonal, the rest
// mirrored. Sums over the depth run in one order, whatever the number of threads.
//
// A panel is kWidth columns of an operand, depth after depth. Both operands of a tile are read from
// panels: kWidth columns as vectors, kHeight rows as broadcasts.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

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
    for (int64_t k = 0; k < depth; ++k)
      std::copy_n(grad + (start + k) * shape.size + column, columns, panel + k * width);
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

// sums[r][c] = sum over the depth of rows[r] * columns[c], both read from packed panels.
template <class Flat>
void multiply(Flat (&sums)[kHeight<Flat>][kWidth<Flat>], const Flat* rows, const Flat* columns,
              int64_t depth) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>, lanes = kLanesOf<Flat>;
  decltype(fill(Flat())) total[height][kVectors];
  for (auto& row : total)
    for (auto& vector : row) vector = fill(Flat(0));
  for (int64_t k = 0; k < depth; ++k, rows += width, columns += width) {
    const auto left = load(columns), right = load(columns + lanes);
    for (int64_t r = 0; r < height; ++r) {
      const auto row = fill(rows[r]);
      total[r][0] = fused(row, left, total[r][0]);
      total[r][1] = fused(row, right, total[r][1]);
    }
  }
  for (int64_t r = 0; r < height; ++r)
    for (int64_t v = 0; v < kVectors; ++v) store(&sums[r][v * lanes], total[r][v]);
}

// Tiles of one panel of columns from the first row down to the diagonal. `entry(i, j, sum)` takes the
// sum of an entry on or above the diagonal and returns what to mirror, which `mirror` says whether to
// do, to `matrix`.
template <class Flat, class Entry>
void for_upper_tiles(const Flat* left, const Flat* right, int64_t panel, int64_t size,
                     int64_t depth, Flat* matrix, bool mirror, const Entry& entry) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>;
  const int64_t column = panel * width, columns = std::min(width, size - column);
  alignas(64) Flat sums[height][width];
  for (int64_t row = 0; row < column + columns; row += height) {
    const Flat* rows = left + row / width * kDepth<Flat> * width + row % width;
    multiply<Flat>(sums, rows, right + panel * kDepth<Flat> * width, depth);
    const int64_t height_here = std::min(height, size - row);
    for (int64_t r = 0; r < height_here; ++r) {
      const int64_t i = row + r;
      for (int64_t c = std::max<int64_t>(0, i - column); c < columns; ++c)
        sums[r][c] = entry(i, column + c, sums[r][c]);
    }
    if (!mirror) continue;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t above = std::min(height_here, column + c - row);  // rows above the diagonal
      Flat* to = matrix + (column + c) * size + row;
      for (int64_t r = 0; r < above; ++r) to[r] = sums[r][c];
    }
  }
}

// Calls `work(b, scratch, for_panels)` for every matrix of a stack. With as many matrices as threads
// each takes its own; else threads share one, and `for_panels(visit)` hands out its panels, in pairs
// from both ends since a panel costs as much as it has rows.
template <class Flat, class Work>
void for_matrices(int64_t count, int64_t panels, int64_t scratch_numel, const Work& work) {
  if (count >= at::get_num_threads()) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<Flat> scratch(scratch_numel);
      for (int64_t b = begin; b < end; ++b)
        work(b, scratch.data(), [&](const auto& visit) {
          for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
        });
    });
    return;
  }
  std::vector<Flat> scratch(scratch_numel);
  for (int64_t b = 0; b < count; ++b)
    work(b, scratch.data(), [&](const auto& visit) {
      at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          visit(panel);
          if (panels - 1 - panel != panel) visit(panels - 1 - panel);
        }
      });
    });
}

}  // namespace shampoo
