// The preconditioned gradient.
#pragma once

#include <cstdint>
#include <vector>

namespace shampoo::cpu {

// One mode of every block: matrices [count, size, size], or diagonals [count, size]; no entries for one
// that stays as it is.
template <class Flat>
struct Root {
  const Flat* entries;
  int64_t size;
  bool is_diagonal;
};

// A stack of blocks. out, grad: [count, d_1 .. d_o], no overlap; roots: one a mode, symmetric
template <class Flat>
struct Preconditioned {
  Flat *out, *norm;
  const Flat* grad;
  int64_t count;
  std::vector<Root<Flat>> roots;
};

// For every stack: out[b] = grad[b] x_1 root_1[b] ... x_o root_o[b], norm[b] = |out[b]|
template <class Flat>
void precondition(const std::vector<Preconditioned<Flat>>& stacks);

}  // namespace shampoo::cpu
