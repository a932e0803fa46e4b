// Numbers of a step as the kernels of the GPU read them.
#pragma once

#include "cuda/device.h"
#include "cuda/launch.h"

namespace shampoo::cuda {

// `block` counts through the table of a call, over all of its launches.
__device__ __forceinline__ double read(const Number& number, int64_t block = 0) {
  if (!number.live) return number.value;
  return number.live[number.is_each ? block : 0];
}

}  // namespace shampoo::cuda
