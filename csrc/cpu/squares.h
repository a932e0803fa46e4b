// Sums of squares in float64.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace shampoo {

// Sums of squares run in this many interleaved lanes, so that they vectorise in a fixed order.
constexpr int64_t kLanes = 16;

template <class Flat>
double sum_of_squares(const Flat* values, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = values[i + lane];
      lanes[lane] = fused(value, value, lanes[lane]);
    }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const double value = values[i];
    lanes[lane] = fused(value, value, lanes[lane]);
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace shampoo
