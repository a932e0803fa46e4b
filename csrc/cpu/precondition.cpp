// Replaces a bmm and, for the modes before the last, copies of a stack for every mode. A block goes
// through all of its modes while it is in the cache, and its bits do not depend on where it lies: ranks
// that hold it at other offsets get the same direction, which no BLAS gives.
#include "cpu/precondition.h"

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

}  // namespace

// A mode's product takes the first mode of a block away and appends the result as the last one: after
// all modes, they are in their order again. So every mode is out = block^T root, with the rest of the
// modes as rows, and nothing is ever unfolded.
template <class Flat>
void precondition(Flat* out, Flat* norm, const Flat* grad, int64_t count,
                  const std::vector<Root<Flat>>& roots) {
  int64_t numel = 1, packed_root = 0;
  for (const Root<Flat>& root : roots) {
    numel *= root.size;
    if (root.entries != nullptr && !root.is_diagonal)
      packed_root = std::max(packed_root, packed_numel<Flat>(root.size, root.size));
  }
  const int64_t between = roots.size() > 1 ? numel : 0;
  for_matrices<Flat>(count, packed_root + between, [&](int64_t b, Flat* scratch,
                                                       const auto& for_panels) {
    Flat *const result = out + b * numel, *const other = scratch + packed_root;
    const Flat* from = grad + b * numel;
    for (size_t mode = 0; mode < roots.size(); ++mode) {
      const auto& [entries, size, is_diagonal] = roots[mode];
      Flat* to = (roots.size() - mode) % 2 ? result : other;  // the last one is the result
      const int64_t rest = numel / size;
      if (entries == nullptr) {
        move_columns(to, from, size, rest, for_panels);
      } else if (is_diagonal) {
        scale_columns(to, from, entries + b * size, size, rest, for_panels);
      } else {
        pack_panels(scratch, entries + b * size * size, {size, size, 1}, for_panels);
        multiply_columns(to, from, {size, rest, 1}, scratch, size, for_panels);
      }
      from = to;
    }
    norm[b] = block_norm(result, numel);
  });
}

template void precondition(float*, float*, const float*, int64_t, const std::vector<Root<float>>&);
template void precondition(double*, double*, const double*, int64_t,
                           const std::vector<Root<double>>&);

}  // namespace shampoo::cpu
