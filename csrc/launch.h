// The kernels of the GPU: raw pointers, sizes and a stream. No torch and no CUDA header, so that
// the bindings compile without the toolkit and the kernels without torch. Arguments are checked by
// bindings_cuda.cpp. Every function starts kernels on the current device and waits for nothing.
#pragma once

#include <cstdint>

struct CUstream_st;  // a cudaStream_t points to one

namespace shampoo::cuda {

using Stream = CUstream_st*;

// The polynomials of kernels/minimax.py, T = c0 I + c1 M + c2 M^2.
struct RootSchedule {
  static constexpr int kMaxSteps = 16;
  int32_t steps;
  int32_t residual;  // of the last of them, in half precision and in terms of I - M
  float coefficients[kMaxSteps][3];
};

constexpr int64_t kMaxRootSize = 128;

// root = (factor + ridge I)^(-1/p), ridge = max(eps, relative_eps ||factor||_S4), for matrices of
// up to kMaxRootSize rows, p > 1. Only the upper triangles of `factor` are read.
//   root    [batch, n, n], bitwise symmetric
//   ridge   [batch]
//   factor  [batch, n, n]
void small_root(float* root, double* ridge, const float* factor, int64_t n, int64_t batch, int p,
                double eps, double relative_eps, const RootSchedule& schedule, Stream stream);

}  // namespace shampoo::cuda
