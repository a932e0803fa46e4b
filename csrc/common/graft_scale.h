// The arithmetic of the scales of directions, block by block.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/numbers.h"

namespace shampoo {

// What graft_scale_ takes, in the order of roundings of the reference.
template <class Flat>
struct GraftScale {
  Flat* scale;
  const Flat* norm;
  const Flat* length;      // null where all blocks follow the grafted direction
  const bool* is_own;      // null for all
  const bool* accepted;    // one for all blocks; null for yes
  Number correction;
  bool grafted;
  double most;

  SHAMPOO_HOST_DEVICE void write(int64_t block) const {
    Flat found = 1, reach = norm[block];
    if (length && (!is_own || is_own[block])) {
      const double by = correction.read(block);
      const Flat divisor = static_cast<Flat>(by);
      reach = length[block];
      found = grafted ? norm[block] / (reach / divisor + static_cast<Flat>(1e-16)) / divisor
                      : static_cast<Flat>(1.0 / by);
    }
    const bool is_kept = found * reach <= static_cast<Flat>(most) && (!accepted || *accepted);
    scale[block] = is_kept ? found : Flat(0);
  }
};

}  // namespace shampoo
