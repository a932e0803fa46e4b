// The dtypes of parameters and gradients.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace shampoo {

enum class Dtype { kHalf, kBFloat16, kFloat, kDouble };

inline int64_t itemsize(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Of half precision the hardware of either side has conversions of its own.
struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

SHAMPOO_HOST_DEVICE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// To nearest, ties to even.
SHAMPOO_HOST_DEVICE BFloat16 round_to_nearest(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

// Up with the probability that `random`, 16 bits, is at least the distance to the value above.
SHAMPOO_HOST_DEVICE BFloat16 round_stochastically(float value, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return round_to_nearest(value);  // NaN or infinite
  return {static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16)};
}

}  // namespace shampoo
