// The arithmetic of the update of parameters, element by element: kernels bring the elements.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/numbers.h"
#include "common/philox.h"

namespace shampoo {

// What update_blocks_ takes beside its tensors.
struct UpdateNumbers {
  Number lr, weight_decay, mu;
  bool nesterov;
};

// The same as the elements use them, in the order of roundings of the reference: scalars and
// products that touch only flat tensors in Flat, the rest in Wide.
template <class Wide, class Flat>
struct UpdateCoefficients {
  Flat lr, mu;
  Wide wide_lr, decay, kept;

  SHAMPOO_HOST_DEVICE static UpdateCoefficients of(const UpdateNumbers& numbers) {
    const double lr = numbers.lr.read(), decay = numbers.weight_decay.read();
    return {static_cast<Flat>(lr), static_cast<Flat>(numbers.mu.read()), static_cast<Wide>(lr),
            static_cast<Wide>(decay), static_cast<Wide>(1.0 - lr * decay)};
  }

  // Moves a weight, and its momentum where there is one. `along` is the scaled direction.
  SHAMPOO_HOST_DEVICE void move(Wide& weight, Flat& momentum, bool has_momentum, bool nesterov,
                                Flat along) const {
    if (!has_momentum) {
      weight = weight * kept - static_cast<Wide>(lr * along);
      return;
    }
    const Wide step = static_cast<Wide>(along) + decay * weight;
    momentum = static_cast<Flat>(static_cast<Wide>(mu * momentum) + step);
    if (nesterov)
      weight -= wide_lr * (step + static_cast<Wide>(mu * momentum));
    else
      weight -= static_cast<Wide>(lr * momentum);
  }
};

// A direction times the scale of its block: zero where that is, since Inf times zero is no zero.
template <class Flat>
SHAMPOO_HOST_DEVICE Flat scaled(Flat direction, Flat scale) {
  return scale == Flat(0) ? Flat(0) : direction * scale;
}

// What the random numbers of one block are drawn by.
struct Draw {
  uint64_t seed, step;

  // Of the four elements of a segment among which `place` is: its own is word place % 4.
  SHAMPOO_HOST_DEVICE RandomWords words(int64_t place) const {
    return philox(seed, step, static_cast<uint64_t>(place) / 4);
  }
};

// Whether bfloat16 parameters are rounded up or down at random, with the mean in between. The
// random number of an element depends on these two and its place in the segment alone.
struct Rounding {
  bool stochastic = false;
  uint64_t seed = 0;
  Number step;

  SHAMPOO_HOST_DEVICE Draw draw(int64_t block) const {
    return {seed, static_cast<uint64_t>(step.read(block))};
  }
};

}  // namespace shampoo
