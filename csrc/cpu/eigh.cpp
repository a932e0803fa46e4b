// Replaces linalg_eigh of a stack, which takes one matrix after the other and gives each all threads.
//
// LAPACK gains little from threads at the sizes of factors, so each thread takes matrices of its own.
// It cuts its work by the threads that it may use, and the bits with it: every matrix gets one, even
// when it is alone.
#include "cpu/eigh.h"

#include <ATen/Parallel.h>
#include <ATen/ops/linalg_eigh.h>
#include <c10/util/Exception.h>

#include <limits>
#include <tuple>

// Of MKL, which torch contains where it is the LAPACK. Elsewhere the bits are those of a LAPACK that
// may count the threads.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace shampoo::cpu {
namespace {

// LAPACK on one thread, for calls from this thread.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_;
};

}  // namespace

void eigh(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& stack) {
  at::parallel_for(0, stack.size(0), 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
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

}  // namespace shampoo::cpu
