// The polynomials of kernels/reference/minimax.py.
#pragma once

#include "common/host_device.h"

namespace shampoo {

// One step: T = c0 I + c1 M + c2 S + c4 S^2 with S = (M - shift I)^2. One of degree 2 has neither c4 nor
// a shift. Of coefficients alone, so that an array of them is a list of numbers.
template <class Real>
struct MinimaxStep {
  Real c0, c1, c2, c4, shift;

  // T of an eigenvalue. On [0, 1] it is largest at 0.
  SHAMPOO_HOST_DEVICE Real at(Real m) const {
    const Real square = (m - shift) * (m - shift);
    return c0 + c1 * m + (c2 + c4 * square) * square;
  }
};

}  // namespace shampoo
