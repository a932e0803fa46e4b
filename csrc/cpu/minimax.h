// Inverse roots by the coupled iteration of kernels/reference/minimax.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/minimax.h"

namespace shampoo::cpu {

// root[b] <- (factor[b] + ridge[b] I)^(-1/p), ridge[b] <- max(eps, relative_eps |factor[b]|_S4)
// root, factor: [count, size, size], ridge: [count]
template <class Flat>
void minimax_root(Flat* root, double* ridge, const Flat* factor, int64_t count, int64_t size,
                  int64_t p, double eps, double relative_eps,
                  const std::vector<MinimaxStep<double>>& steps);

}  // namespace shampoo::cpu
