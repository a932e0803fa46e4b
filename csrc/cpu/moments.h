// Moments, grafted directions and their norms.
#pragma once

#include <vector>

#include "common/moments.h"
#include "common/tiles.h"

namespace shampoo::cpu {

// `grad`, unless it accumulates, `exp_avg`, `exp_avg_sq`, `direction` and `ahead`, which needs
// `exp_avg`, may be null. A source may be `grad` or `direction`, where its blocks lie in their places
// already.
template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate, const MomentNumbers& numbers, Flat* ahead);

}  // namespace shampoo::cpu
