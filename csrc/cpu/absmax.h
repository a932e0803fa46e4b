// The largest magnitude of a run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace shampoo::cpu {

// Without the sign, the bits of floating-point numbers are ordered as the numbers are, Inf above all
// of them and NaN above Inf: an integer maximum is exact, loses no NaN and vectorises.
template <class Bits, class Element>
Bits absmax_bits(const Element* from, int64_t stride, int64_t count) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  Bits largest = 0;
  const auto widen = [&](int64_t at) {
    Bits bits;
    std::memcpy(&bits, from + at, sizeof bits);
    largest = std::max<Bits>(largest, bits & kMagnitude);
  };
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) widen(i);
  else
    for (int64_t i = 0; i < count; ++i) widen(i * stride);
  return largest;
}

inline double absmax(const float* from, int64_t stride, int64_t count) {
  return bit_cast<float>(absmax_bits<uint32_t>(from, stride, count));
}
inline double absmax(const double* from, int64_t stride, int64_t count) {
  return bit_cast<double>(absmax_bits<uint64_t>(from, stride, count));
}

}  // namespace shampoo::cpu
