// Sums of squares in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "cpu/grain.h"

namespace shampoo::cpu {

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

// The Euclidean norm of a block.
template <class Flat>
Flat block_norm(const Flat* block, int64_t numel) {
  double sum = 0.0;
  for (int64_t start = 0; start < numel; start += kChunk)
    sum += sum_of_squares(block + start, std::min(kChunk, numel - start));
  return static_cast<Flat>(std::sqrt(sum));
}

}  // namespace shampoo::cpu
