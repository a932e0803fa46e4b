// The scales of directions.
#pragma once

#include <cstdint>

#include "common/graft_scale.h"

namespace shampoo::cpu {

// One scale for each of `count` blocks.
template <class Flat>
void graft_scale(const GraftScale<Flat>& blocks, int64_t count) {
  for (int64_t block = 0; block < count; ++block) blocks.write(block);
}

}  // namespace shampoo::cpu
