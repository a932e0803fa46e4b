// Replaces a bmm and, for the modes before the last, copies of a stack for every mode. A block goes
// through all of its modes while it is in the cache, and its bits do not depend on where it lies: ranks
// that hold it at other offsets get the same direction, which no BLAS gives.
#include "cpu/precondition.h"

#include <algorithm>
#include <utility>

#include "cpu/for_matrices.h"
#include "cpu/packed_gemm.h"
#include "cpu/squares.h"
#include "cpu/transpose.h"

namespace shampoo::cpu {
namespace {

// Rows that a diagonal is applied to at a time: those of a column of the block share cache lines.
constexpr int64_t kStrip = 16;

// out[r, i] = diagonal[i] blocks[i, r]
template <class Flat, class ForPanels>
void scale_columns(Flat* out, const Flat* block, const Flat* diagonal, int64_t size, int64_t rest,
                   const ForPanels& for_panels) {
  for_panels((rest + kStrip - 1) / kStrip, [&](int64_t strip) {
    const int64_t first = strip * kStrip, last = std::min(rest, first + kStrip);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t r = first; r < last; ++r) out[r * size + i] = diagonal[i] * block[i * rest + r];
  });
}

// out[r, i] = block[i, r]
template <class Flat, class ForPanels>
void move_columns(Flat* out, const Flat* block, int64_t size, int64_t rest,
                  const ForPanels& for_panels) {
  for_panels((rest + kStrip - 1) / kStrip, [&](int64_t strip) {
    const int64_t first = strip * kStrip, last = std::min(rest, first + kStrip);
    transpose(out + first * size, size, block + first, rest, size, last - first);
  });
}

// A mode's product takes the first mode of a block away and appends the result as the last one: after
// all modes, they are in their order again. So every mode is out = block^T root, with the rest of the
// modes as rows, and nothing is ever unfolded.
template <class Flat, class ForPanels>
void precondition_of(const Preconditioned<Flat>& stack, int64_t b, int64_t numel, Flat* scratch,
                     Flat* between, const ForPanels& for_panels) {
  Flat* const result = stack.out + b * numel;
  const Flat* from = stack.grad + b * numel;
  for (size_t mode = 0; mode < stack.roots.size(); ++mode) {
    const Flat* const entries = stack.roots[mode].entries;
    const int64_t size = stack.roots[mode].size, rest = numel / size;
    Flat* to = (stack.roots.size() - mode) % 2 ? result : between;  // the last one is the result
    if (entries == nullptr) {
      move_columns(to, from, size, rest, for_panels);
    } else if (stack.roots[mode].is_diagonal) {
      scale_columns(to, from, entries + b * size, size, rest, for_panels);
    } else {
      pack_panels(scratch, entries + b * size * size, {size, size, 1}, for_panels);
      multiply_columns(to, from, {size, rest, 1}, scratch, size, for_panels);
    }
    from = to;
  }
  stack.norm[b] = block_norm(result, numel);
}

}  // namespace

template <class Flat>
void precondition(const std::vector<Preconditioned<Flat>>& stacks) {
  std::vector<Job> jobs;
  std::vector<std::pair<int64_t, int64_t>> sizes;  // of a block, and of its largest packed root
  for (const Preconditioned<Flat>& stack : stacks) {
    int64_t numel = 1, packed_root = 0, products = 0;
    for (const Root<Flat>& root : stack.roots) {
      numel *= root.size;
      if (root.entries == nullptr || root.is_diagonal) continue;
      packed_root = std::max(packed_root, packed_numel<Flat>(root.size, root.size));
      products += root.size;
    }
    jobs.push_back({stack.count, packed_root + (stack.roots.size() > 1 ? numel : 0),
                    products * numel});
    sizes.emplace_back(numel, packed_root);
  }
  for_stacks<Flat>(jobs, [&](const Place& place, Flat* scratch, const auto& for_panels) {
    const auto& [numel, packed_root] = sizes[place.stack];
    precondition_of(stacks[place.stack], place.matrix, numel, scratch, scratch + packed_root,
                    for_panels);
  });
}

template void precondition(const std::vector<Preconditioned<float>>&);
template void precondition(const std::vector<Preconditioned<double>>&);

}  // namespace shampoo::cpu
