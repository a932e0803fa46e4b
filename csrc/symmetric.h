// Products of symmetric matrices that commute.
#pragma once

#include <cstdint>

namespace shampoo {

template <class Flat>
struct Polynomial {
  Flat alpha;     // of the product
  Flat beta;      // of `addend`
  Flat diagonal;  // of the identity
};

// out[b] <- alpha left[b] right[b] + beta addend[b] + diagonal I, all [count, size, size].
// `addend` may be null, or `out`; `left` and `right` may be one, but not `out`.
template <class Flat>
void symmetric_product(Flat* out, const Flat* left, const Flat* right, const Flat* addend,
                       int64_t count, int64_t size, const Polynomial<Flat>& polynomial);

}  // namespace shampoo
