// The factors.
#pragma once

#include <cstdint>

namespace shampoo::cpu {

// factor[b] <- beta factor[b] + weight sum over (x, z) of grad[b, x, i, z] grad[b, x, j, z]
// factor: [count, size, size], grad: [count, before, size, after]
template <class Flat>
void gram_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
              int64_t after, Flat beta, Flat weight);

// The diagonal of the same: factor [count, size]
template <class Flat>
void gram_diagonal_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
                       int64_t after, Flat beta, Flat weight);

}  // namespace shampoo::cpu
