// The preconditioned gradient. Like gram.h, made of torch's own products.
#pragma once

#include <ATen/core/Tensor.h>

namespace shampoo {

void precondition(const at::Tensor& out, const at::Tensor& norm, const at::Tensor& grad,
                  at::TensorList roots);

}  // namespace shampoo
