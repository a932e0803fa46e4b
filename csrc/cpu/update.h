// The step of the parameters.
#pragma once

#include <vector>

#include "common/tiles.h"
#include "common/update.h"

namespace shampoo::cpu {

// `momentum` may be null.
template <class Flat>
void update_blocks(const std::vector<Source>& params, Flat* momentum, const Flat* direction,
                   const Flat* scale, const std::vector<Tile>& tiles, const UpdateNumbers& numbers,
                   const Rounding& rounding);

}  // namespace shampoo::cpu
