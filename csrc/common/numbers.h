// Numbers of a step.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace shampoo {

// A number that the call brings; or one in the memory of the device that uses it, where it may be
// another whenever a CUDA graph is replayed.
struct Number {
  double value = 0.0;
  const double* live = nullptr;  // if not null, where it lies
  bool is_each = false;          // there, one for every block of a call instead of one for all

  Number(double brought = 0.0) : value(brought) {}
  explicit Number(const double* in_memory, bool one_each = false)
      : live(in_memory), is_each(one_each) {}

  // `block` counts through the table of a call, over all of its launches.
  SHAMPOO_HOST_DEVICE double read(int64_t block = 0) const {
    if (!live) return value;
    return live[is_each ? block : 0];
  }
};

}  // namespace shampoo
