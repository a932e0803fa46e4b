// The factors. Unlike the other kernels this one is made of torch's own products.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace shampoo {

void gram_ema(const at::Tensor& factor, const at::Tensor& grad, int64_t mode, double beta,
              double weight);

}  // namespace shampoo
