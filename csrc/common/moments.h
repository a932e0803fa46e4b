// Moments of gradients and the directions that they give.
#pragma once

#include "common/numbers.h"

namespace shampoo {

// What graft_moments_ takes beside its tensors.
struct MomentNumbers {
  Number beta1, correction1, beta2, weight2, correction2;
  double eps;
  bool normalized;

  bool is_shared() const { return !correction1.is_each && !correction2.is_each; }
};

}  // namespace shampoo
