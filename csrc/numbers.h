// Numbers of a step as the kernels of the GPU read them.
#pragma once

#include "device.h"
#include "launch.h"

namespace shampoo::cuda {

__device__ __forceinline__ double read(const Number& number) {
  return number.live ? *number.live : number.value;
}

}  // namespace shampoo::cuda
