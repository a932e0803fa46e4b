// Eigendecompositions, by torch's own of one matrix.
#pragma once

#include <ATen/core/Tensor.h>

namespace shampoo::cpu {

void eigh(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& stack);

}  // namespace shampoo::cpu
