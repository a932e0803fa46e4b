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

namespace {

template <class Flat>
const Flat* block_of(const Gram<Flat>& stack, int64_t b) {
  return stack.grad + b * stack.before * stack.size * stack.after;
}

template <class Flat>
Flat* matrix_of(const Gram<Flat>& stack, int64_t b) {
  return stack.factor + b * stack.size * stack.size;
}

template <class Flat, class ForPanels>
void gram_ema_of(const Gram<Flat>& stack, int64_t b, Flat* packed, Flat beta, Flat weight,
                 const ForPanels& for_panels) {
  const Unfolding shape{stack.before, stack.size, stack.after};
  const auto layout = Layout<Flat>::rows(stack.size);
  const int64_t panels = layout.count(), stride = kDepth<Flat> * kWidth<Flat>;
  const Flat* block = block_of(stack, b);
  Flat* matrix = matrix_of(stack, b);
  for (int64_t start = 0; start < shape.depth(); start += kDepth<Flat>) {
    const int64_t depth = std::min(kDepth<Flat>, shape.depth() - start);
    for_panels(panels, [&](int64_t panel) {
      pack(packed + panel * stride, block, shape, panel * kWidth<Flat>, start, depth);
    });
    const Operands<Flat> operands{packed, packed, stride, depth};
    const Polynomial<Flat> average{weight, matrix, start == 0 ? beta : Flat(1)};
    for_panels(panels, [&](int64_t panel) {
      upper_tiles(matrix, layout, panel, operands, average, start + depth == shape.depth());
    });
  }
}

// A thread takes columns, never a part of a sum: torch cuts a long sum by the number of threads.
template <class Flat>
void gram_diagonal_ema(const Gram<Flat>& stack, Flat beta, Flat weight) {
  constexpr int64_t kColumns = 64;
  Flat* const factor = stack.factor;
  const Flat* const grad = stack.grad;
  const int64_t before = stack.before, size = stack.size, after = stack.after;
  const int64_t pieces = (size + kColumns - 1) / kColumns;
  const int64_t grain = kGrain / (kColumns * before * after) + 1;
  at::parallel_for(0, stack.count * pieces, grain, [&](int64_t begin, int64_t end) {
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

}  // namespace

template <class Flat>
void gram_ema(const std::vector<Gram<Flat>>& stacks, Flat beta, Flat weight) {
  std::vector<Gram<Flat>> full;
  std::vector<Job> jobs;
  for (const Gram<Flat>& stack : stacks) {
    if (stack.is_diagonal) {
      gram_diagonal_ema(stack, beta, weight);
      continue;
    }
    const int64_t panels = Layout<Flat>::rows(stack.size).count();
    const int64_t products = stack.size * stack.size * stack.before * stack.after;
    jobs.push_back({stack.count, panels * kDepth<Flat> * kWidth<Flat>, products});
    full.push_back(stack);
  }
  for_stacks<Flat>(jobs, [&](const Place& place, Flat* packed, const auto& for_panels) {
    gram_ema_of(full[place.stack], place.matrix, packed, beta, weight, for_panels);
  });
}

template void gram_ema(const std::vector<Gram<float>>&, float, float);
template void gram_ema(const std::vector<Gram<double>>&, double, double);

}  // namespace shampoo::cpu
