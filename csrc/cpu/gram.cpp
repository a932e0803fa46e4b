// Replaces one baddbmm of an unfolded gradient with its own transpose: half the products, no unfolded
// copy, the moving average in the same pass. The result is bitwise symmetric.
#include "cpu/gram.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/host_device.h"
#include "cpu/for_matrices.h"
#include "cpu/grain.h"
#include "cpu/squares.h"
#include "cpu/symmetric_gemm.h"

namespace shampoo::cpu {

template <class Flat>
void gram_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
              int64_t after, Flat beta, Flat weight) {
  const Unfolding shape{before, size, after};
  const auto layout = Layout<Flat>::rows(size);
  const int64_t panels = layout.count(), numel = before * size * after;
  const int64_t stride = kDepth<Flat> * kWidth<Flat>;
  for_matrices<Flat>(count, panels * stride, [&](int64_t b, Flat* packed,
                                                         const auto& for_panels) {
    Flat* matrix = factor + b * size * size;
    Ahead ahead;
    if (b + 1 < count) ahead.add(grad + (b + 1) * numel, numel).add(matrix + size * size, size * size);
    for (int64_t start = 0; start < shape.depth(); start += kDepth<Flat>) {
      const int64_t depth = std::min(kDepth<Flat>, shape.depth() - start);
      for_panels(panels, [&](int64_t panel) {
        pack(packed + panel * stride, grad + b * numel, shape, panel * kWidth<Flat>, start, depth);
      });
      const Operands<Flat> operands{packed, packed, stride, depth};
      const Polynomial<Flat> average{weight, matrix, start == 0 ? beta : Flat(1)};
      for_panels(panels, [&](int64_t panel) {
        // A panel has as many tiles as its ordinal says; long sums ask in their first piece alone.
        const int64_t before = panel * (panel + 1) / 2, all = panels * (panels + 1) / 2;
        upper_tiles(matrix, layout, panel, operands, average, start + depth == shape.depth(),
                    start == 0 ? ahead.part(before, before + panel + 1, all) : Ahead());
      });
    }
  });
}

// A thread takes columns, never a part of a sum: torch cuts a long sum by the number of threads.
template <class Flat>
void gram_diagonal_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
                       int64_t after, Flat beta, Flat weight) {
  constexpr int64_t kColumns = 64;
  const int64_t pieces = (size + kColumns - 1) / kColumns;
  const int64_t grain = kGrain / (kColumns * before * after) + 1;
  at::parallel_for(0, count * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / pieces, first = piece % pieces * kColumns;
      const int64_t columns = std::min(kColumns, size - first);
      double sums[kColumns] = {};
      for (int64_t x = 0; x < before; ++x) {
        const Flat* row = grad + ((b * before + x) * size + first) * after;
        for (int64_t i = 0; i < columns; ++i) {
          if (after == 1)
            sums[i] = fused(static_cast<double>(row[i]), static_cast<double>(row[i]), sums[i]);
          else
            sums[i] += sum_of_squares(row + i * after, after);
        }
      }
      Flat* entries = factor + b * size + first;
      for (int64_t i = 0; i < columns; ++i)
        entries[i] = fused(weight, static_cast<Flat>(sums[i]), beta * entries[i]);
    }
  });
}

template void gram_ema(float*, const float*, int64_t, int64_t, int64_t, int64_t, float, float);
template void gram_ema(double*, const double*, int64_t, int64_t, int64_t, int64_t, double, double);
template void gram_diagonal_ema(float*, const float*, int64_t, int64_t, int64_t, int64_t, float,
                                float);
template void gram_diagonal_ema(double*, const double*, int64_t, int64_t, int64_t, int64_t, double,
                                double);

}  // namespace shampoo::cpu
