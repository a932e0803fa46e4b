// Replaces linalg_eigh of a stack, which takes one matrix after the other and gives each all threads.
//
// LAPACK gains little from threads at the sizes of factors, so each thread takes matrices of its own;
// a single matrix still gets them all.
#include "eigen.h"

#include <ATen/Parallel.h>
#include <ATen/ops/linalg_eigh.h>
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>

namespace shampoo {

void eigh(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& stack) {
  at::parallel_for(0, stack.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const at::Tensor matrix_values = values.select(0, i), matrix_vectors = vectors.select(0, i);
      try {
        const auto [own_values, own_vectors] = at::linalg_eigh(stack.select(0, i));
        matrix_values.copy_(own_values);
        matrix_vectors.copy_(own_vectors);
      } catch (const c10::LinAlgError&) {
        matrix_values.fill_(std::numeric_limits<double>::quiet_NaN());
        matrix_vectors.fill_(std::numeric_limits<double>::quiet_NaN());
      }
    }
  });
}

}  // namespace shampoo
