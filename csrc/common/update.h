// The update of parameters.
#pragma once

#include <cstdint>

#include "common/numbers.h"

namespace shampoo {

// What update_blocks_ takes beside its tensors.
struct UpdateNumbers {
  Number lr, weight_decay, mu;
  bool nesterov;
};

// Whether bfloat16 parameters are rounded up or down at random, with the mean in between. The
// random number of an element depends on these two and its place in the segment alone.
struct Rounding {
  bool stochastic = false;
  uint64_t seed = 0;
  Number step;
};

}  // namespace shampoo
