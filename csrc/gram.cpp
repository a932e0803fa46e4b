// Replaces one baddbmm, which computes both halves of a symmetric matrix, where that pays.
//
// Factors of at least kRows rows are computed in kPanels panels of rows, each from its own diagonal
// block to the right, and the rest is mirrored. Measured against one baddbmm, float32: 1.2 times
// as fast at 512 rows, 1.3 at 1024, within a tenth at 256, slower where gradients are thinner than
// kColumns. There the call of torch stays.
#include "gram.h"

#include <algorithm>

namespace shampoo {
namespace {

constexpr int64_t kRows = 512;
constexpr int64_t kColumns = 256;
constexpr int64_t kPanels = 4;

// mat_k: [B, d_1 .. d_o] -> [B, d_k, rest]; a copy only for a mode in the middle.
at::Tensor unfold(const at::Tensor& blocks, int64_t mode) {
  int64_t before = 1, after = 1;
  for (int64_t dim = 1; dim < blocks.dim(); ++dim) {
    if (dim <= mode) before *= blocks.size(dim);
    if (dim > mode + 1) after *= blocks.size(dim);
  }
  const int64_t count = blocks.size(0), size = blocks.size(mode + 1);
  if (after == 1) return blocks.reshape({count, before, size}).transpose(1, 2);
  return blocks.reshape({count, before, size, after}).transpose(1, 2).reshape({count, size, -1});
}

}  // namespace

void gram_ema(const at::Tensor& factor, const at::Tensor& grad, int64_t mode, double beta,
              double weight) {
  const at::Tensor rows = unfold(grad, mode);
  if (factor.dim() == 2) {
    factor.mul_(beta).add_(rows.square().sum(2), weight);
    return;
  }
  const int64_t size = factor.size(1);
  const bool pays = size >= kRows && rows.size(2) >= kColumns;
  const int64_t height = pays ? (size + kPanels - 1) / kPanels : size;
  for (int64_t top = 0; top < size; top += height) {
    const int64_t bottom = std::min(size, top + height);
    const at::Tensor panel = factor.slice(1, top, bottom);
    const at::Tensor right = panel.slice(2, top);
    right.baddbmm_(rows.slice(1, top, bottom), rows.slice(1, top).transpose(1, 2), beta, weight);
    if (bottom < size)
      factor.slice(1, bottom).slice(2, top, bottom).copy_(panel.slice(2, bottom).transpose(1, 2));
  }
}

}  // namespace shampoo
