// The arithmetic of moments and of the direction that they give, element by element: kernels bring
// the elements.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/numbers.h"

namespace shampoo {

// What graft_moments_ takes beside its tensors.
struct MomentNumbers {
  Number beta1, correction1, beta2, weight2, correction2;
  double eps;
  bool normalized;

  bool is_shared() const { return !correction1.is_each && !correction2.is_each; }

  // Whether the host does not know all of them.
  bool is_live() const {
    return beta1.live || correction1.live || beta2.live || weight2.live || correction2.live;
  }
};

// The same as the elements of one block use them.
template <class Flat>
struct MomentCoefficients {
  Flat share1;   // 1 - beta1
  Flat weight1;  // the same, less 1 if `from_gradient`
  Flat correction1, beta2, weight2, scale2, eps;
  bool from_gradient;

  SHAMPOO_HOST_DEVICE static MomentCoefficients of(const MomentNumbers& numbers, int64_t block) {
    const Flat share1 = static_cast<Flat>(1.0 - numbers.beta1.read());
    MomentCoefficients made{share1,
                            share1,
                            static_cast<Flat>(numbers.correction1.read(block)),
                            static_cast<Flat>(numbers.beta2.read()),
                            static_cast<Flat>(numbers.weight2.read()),
                            static_cast<Flat>(1.0 / numbers.correction2.read(block)),
                            static_cast<Flat>(numbers.eps),
                            false};
    // As torch's lerp: from the nearer end, so that a weight of 1 gives exactly the gradient.
    made.from_gradient = made.weight1 >= Flat(0.5);
    if (made.from_gradient) made.weight1 -= Flat(1);
    return made;
  }

  // exp_avg <- beta1 exp_avg + (1 - beta1) grad
  SHAMPOO_HOST_DEVICE Flat average(Flat avg, Flat grad) const {
    return fused(weight1, grad - avg, from_gradient ? grad : avg);
  }
  // The average as it will be when the same gradient comes again, of one that has moved by it. One
  // rounding an operation, as where torch takes them one by one.
  SHAMPOO_HOST_DEVICE Flat ahead(Flat avg, Flat grad) const {
    return product(grad - avg, share1) + avg;
  }
  // exp_avg_sq <- beta2 exp_avg_sq + weight2 grad^2
  SHAMPOO_HOST_DEVICE Flat square(Flat sq, Flat grad) const {
    return fused(weight2 * grad, grad, beta2 * sq);
  }

  // Moves the moments that are there and returns D. `raw` is the gradient, normalized or not.
  SHAMPOO_HOST_DEVICE Flat direction(Flat& avg, bool has_avg, Flat& sq, bool has_sq, Flat grad,
                                     Flat raw) const {
    Flat filtered = grad, divisor = Flat(1);
    if (has_avg) {
      filtered = avg = average(avg, grad);
      divisor = correction1;
    }
    if (has_sq) {
      sq = square(sq, raw);
      divisor *= std::sqrt(sq * scale2) + eps;
    }
    return filtered / divisor;
  }
};

// A gradient of a block of some norm, scaled so that it would be 1; zero if the block is.
template <class Flat>
SHAMPOO_HOST_DEVICE Flat normalize(Flat grad, Flat norm) {
  return norm > Flat(0) ? grad / norm : Flat(0);
}

}  // namespace shampoo
