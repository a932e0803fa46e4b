// The factors.
#pragma once

#include <cstdint>
#include <vector>

namespace shampoo::cpu {

// One mode of a stack of blocks. grad: [count, before, size, after]; factor: [count, size, size], or
// [count, size] if it is a diagonal
template <class Flat>
struct Gram {
  Flat* factor;
  const Flat* grad;
  int64_t count, before, size, after;
  bool is_diagonal;
};

// For every stack: factor[b] <- beta factor[b] + weight sum over (x, z) of grad[b, x, i, z] grad[b, x, j, z]
template <class Flat>
void gram_ema(const std::vector<Gram<Flat>>& stacks, Flat beta, Flat weight);

}  // namespace shampoo::cpu
