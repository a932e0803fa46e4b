// Eigendecompositions. Like gram.h, made of torch's own calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace shampoo {

void eigh(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& stack);

}  // namespace shampoo
