// Replaces one baddbmm of an unfolded gradient with its own transpose: half the products, because
// only tiles on and above the diagonal are computed and the rest is mirrored; no unfolded copy; the
// moving average in the same pass. The result is bitwise symmetric.
//
// Columns of the unfolded gradient are packed into panels of kWidth, depth after depth, so that
// both operands of a tile are read from the same panels: kWidth columns as vectors, kHeight rows as
// broadcasts. Sums over the depth run in one order, whatever the number of threads.
#include "gram.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace shampoo {
namespace {

constexpr int64_t kDepth = 256;  // of a packed panel: a matrix of 256 stays in the L2 cache
constexpr int kVectors = 2;

template <class Flat>
constexpr int64_t kWidth = kVectors * kLanesOf<Flat>;
// As many accumulators as registers allow, and a divisor of every width but the scalar one.
template <class Flat>
constexpr int64_t kHeight = std::min<int64_t>(kVectorBytes == 64 ? 8 : 4, kWidth<Flat>);

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

// One panel of columns of one factor: tiles from the first row down to the diagonal.
template <class Flat>
void update_panel(Flat* factor, const Flat* packed, int64_t panel, int64_t size, int64_t depth,
                  Flat beta, Flat weight, bool is_last) {
  constexpr int64_t width = kWidth<Flat>, height = kHeight<Flat>;
  const int64_t column = panel * width, columns = std::min(width, size - column);
  alignas(64) Flat sums[height][width];
  for (int64_t row = 0; row < std::min(size, column + columns); row += height) {
    const Flat* rows = packed + row / width * kDepth * width + row % width;
    multiply<Flat>(sums, rows, packed + panel * kDepth * width, depth);
    const int64_t height_here = std::min(height, size - row);
    for (int64_t r = 0; r < height_here; ++r) {
      const int64_t i = row + r;
      Flat* to = factor + i * size + column;
      for (int64_t c = std::max<int64_t>(0, i - column); c < columns; ++c)
        sums[r][c] = to[c] = fused(weight, sums[r][c], beta * to[c]);
    }
    if (!is_last) continue;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t above = std::min(height_here, column + c - row);  // rows above the diagonal
      Flat* to = factor + (column + c) * size + row;
      for (int64_t r = 0; r < above; ++r) to[r] = sums[r][c];
    }
  }
}

}  // namespace

template <class Flat>
void gram_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
              int64_t after, Flat beta, Flat weight) {
  constexpr int64_t width = kWidth<Flat>;
  const Unfolding shape{before, size, after};
  const int64_t panels = (size + width - 1) / width, numel = before * size * after;
  const auto update = [&](int64_t b, Flat* packed, const auto& for_panels) {
    for (int64_t start = 0; start < shape.depth(); start += kDepth) {
      const int64_t depth = std::min(kDepth, shape.depth() - start);
      const bool is_last = start + depth == shape.depth();
      const Flat decay = start == 0 ? beta : Flat(1);
      for_panels([&](int64_t panel) {
        pack(packed + panel * kDepth * width, grad + b * numel, shape, panel * width, start, depth);
      });
      for_panels([&](int64_t panel) {
        update_panel(factor + b * size * size, packed, panel, size, depth, decay, weight, is_last);
      });
    }
  };
  const int64_t packed_numel = panels * kDepth * width;
  if (count >= at::get_num_threads()) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<Flat> packed(packed_numel);
      for (int64_t b = begin; b < end; ++b)
        update(b, packed.data(), [&](const auto& visit) {
          for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
        });
    });
    return;
  }
  // Few large factors: threads share one. A panel costs as much as its rows are many, so each
  // thread takes panels in pairs from both ends.
  std::vector<Flat> packed(packed_numel);
  for (int64_t b = 0; b < count; ++b)
    update(b, packed.data(), [&](const auto& visit) {
      at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          visit(panel);
          if (panels - 1 - panel != panel) visit(panels - 1 - panel);
        }
      });
    });
}

template void gram_ema(float*, const float*, int64_t, int64_t, int64_t, int64_t, float, float);
template void gram_ema(double*, const double*, int64_t, int64_t, int64_t, int64_t, double, double);

}  // namespace shampoo
