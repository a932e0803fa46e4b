// Elements of the dtypes of parameters: loads and stores of one or of four at a time, as float or
// double.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cuda/device.h"

namespace shampoo::cuda {

using shampoo::widen;

__device__ __forceinline__ float widen(Half value) { return half_to_float(value.bits); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

template <class Wide>
__device__ __forceinline__ void narrow(Half& to, Wide value) {
  to.bits = float_to_half(static_cast<float>(value));
}
template <class Wide>
__device__ __forceinline__ void narrow(BFloat16& to, Wide value) {
  to = round_to_nearest(static_cast<float>(value));
}
template <class Wide>
__device__ __forceinline__ void narrow(float& to, Wide value) {
  to = static_cast<float>(value);
}
template <class Wide>
__device__ __forceinline__ void narrow(double& to, Wide value) {
  to = value;
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
      return use(reinterpret_cast<Half*>(data));
    case Dtype::kBFloat16:
      return use(reinterpret_cast<BFloat16*>(data));
    case Dtype::kFloat:
      return use(reinterpret_cast<float*>(data));
    case Dtype::kDouble:
      return use(reinterpret_cast<double*>(data));
  }
}

}  // namespace shampoo::cuda
