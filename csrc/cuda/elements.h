// Elements of the dtypes of parameters: loads and stores of one or of four at a time, as float or
// double, and stochastic rounding.
#pragma once

#include <cstdint>

#include "common/tiles.h"
#include "cuda/device.h"

namespace shampoo::cuda {

struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

__device__ __forceinline__ float widen(HalfBits value) { return half_to_float(value.bits); }
__device__ __forceinline__ float widen(BFloat16Bits value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

template <class Wide>
__device__ __forceinline__ void narrow(HalfBits& to, Wide value) {
  to.bits = float_to_half(static_cast<float>(value));
}
// To nearest, ties to even.
template <class Wide>
__device__ __forceinline__ void narrow(BFloat16Bits& to, Wide value) {
  const float single = static_cast<float>(value);
  const uint32_t bits = __float_as_uint(single);
  to.bits = single != single ? 0x7fc0u
                             : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
template <class Wide>
__device__ __forceinline__ void narrow(float& to, Wide value) {
  to = static_cast<float>(value);
}
template <class Wide>
__device__ __forceinline__ void narrow(double& to, Wide value) {
  to = value;
}

// Up with the probability that `random`, 16 bits, is at least the distance to the value above.
__device__ __forceinline__ void narrow(BFloat16Bits& to, float value, uint32_t random) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (finite)
    to.bits = static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16);
  else
    narrow(to, value);
}

template <class Value>
struct alignas(4 * sizeof(Value)) Quad {
  Value values[4];
};

// `to` gets one element, or four neighbours.
template <class To, class From, int kCount>
__device__ __forceinline__ void load(To (&to)[kCount], const From* from) {
  if constexpr (kCount == 4) {
    expect_aligned(from, sizeof(Quad<From>));
    const Quad<From> quad = *reinterpret_cast<const Quad<From>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = static_cast<To>(widen(quad.values[i]));
  } else {
    to[0] = static_cast<To>(widen(*from));
  }
}

template <class To, class From, int kCount>
__device__ __forceinline__ void store(To* to, const From (&from)[kCount]) {
  if constexpr (kCount == 4) {
    expect_aligned(to, sizeof(Quad<To>));
    Quad<To> quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) narrow(quad.values[i], from[i]);
    *reinterpret_cast<Quad<To>*>(to) = quad;
  } else {
    narrow(*to, from[0]);
  }
}

// Calls `use(pointer)` with memory of a dtype under its own type.
template <class Use>
__device__ __forceinline__ void with_type(char* data, Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::kHalf:
      return use(reinterpret_cast<HalfBits*>(data));
    case Dtype::kBFloat16:
      return use(reinterpret_cast<BFloat16Bits*>(data));
    case Dtype::kFloat:
      return use(reinterpret_cast<float*>(data));
    case Dtype::kDouble:
      return use(reinterpret_cast<double*>(data));
  }
}

}  // namespace shampoo::cuda
