// The polynomials of kernels/reference/minimax.py.
#pragma once

#include "common/host_device.h"

namespace shampoo {

// One step: T = c0 I + c1 M + c2 Q^2 with Q = M^2 + b M + d I, or Q = M where b = d = 0.
template <class Real>
struct MinimaxStep {
  Real c0, c1, c2, b, d;

  SHAMPOO_HOST_DEVICE bool is_quartic() const { return b != 0 || d != 0; }

  // T of an eigenvalue. Of tabulated steps it is largest at 0, on [0, 1].
  SHAMPOO_HOST_DEVICE Real at(Real m) const {
    const Real q = is_quartic() ? m * m + b * m + d : m;
    return c0 + c1 * m + c2 * q * q;
  }
};

}  // namespace shampoo
