#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace shampoo {

// mat_k: [B, d_1 .. d_o] -> [B, d_k, rest]; a copy only for a mode in the middle.
inline at::Tensor unfold(const at::Tensor& blocks, int64_t mode) {
  int64_t before = 1, after = 1;
  for (int64_t dim = 1; dim < blocks.dim(); ++dim) {
    if (dim <= mode) before *= blocks.size(dim);
    if (dim > mode + 1) after *= blocks.size(dim);
  }
  const int64_t count = blocks.size(0), size = blocks.size(mode + 1);
  if (after == 1) return blocks.reshape({count, before, size}).transpose(1, 2);
  return blocks.reshape({count, before, size, after}).transpose(1, 2).reshape({count, size, -1});
}

}  // namespace shampoo
