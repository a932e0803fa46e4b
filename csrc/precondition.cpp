// Replaces the products of the reference by the same ones, and its norms, which take longer than
// they need to in float64, by one pass.
#include "precondition.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include "kernels.h"
#include "unfold.h"

namespace shampoo {
namespace {

template <class Flat>
void norms_of(const at::Tensor& norm, const at::Tensor& out) {
  block_norms(static_cast<Flat*>(norm.mutable_data_ptr()),
              static_cast<const Flat*>(out.const_data_ptr()),
              {out.size(0), out.numel() / out.size(0)});
}

}  // namespace

void precondition(const at::Tensor& out, const at::Tensor& norm, const at::Tensor& grad,
                  at::TensorList roots) {
  const int64_t count = grad.size(0), order = grad.dim() - 1;
  at::Tensor blocks = grad;
  for (int64_t mode = 0; mode < order; ++mode) {
    const at::Tensor& root = roots[mode];
    const int64_t size = grad.size(mode + 1);
    const bool last = mode == order - 1;
    if (root.dim() == 2) {
      std::vector<int64_t> shape(order + 1, 1);
      shape[0] = count;
      shape[mode + 1] = size;
      at::Tensor result = last ? out : at::empty_like(blocks);
      at::mul_out(result, blocks, root.view(shape));
      blocks = result;
    } else if (last) {
      at::Tensor result = out.view({count, -1, size});
      at::bmm_out(result, blocks.reshape({count, -1, size}), root);
    } else {
      const at::Tensor product = at::bmm(root, unfold(blocks, mode));
      int64_t before = 1;
      for (int64_t dim = 1; dim <= mode; ++dim) before *= grad.size(dim);
      blocks = product.view({count, size, before, -1}).transpose(1, 2).reshape(grad.sizes());
    }
  }
  if (out.scalar_type() == at::kDouble)
    norms_of<double>(norm, out);
  else
    norms_of<float>(norm, out);
}

}  // namespace shampoo
