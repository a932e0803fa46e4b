// The largest magnitudes of tensors.
#pragma once

#include <vector>

#include "common/tiles.h"

namespace shampoo::cpu {

// out[i] = max |x| of source i, NaN or Inf if it holds one.
void magnitudes(double* out, const std::vector<Source>& sources);

}  // namespace shampoo::cpu
