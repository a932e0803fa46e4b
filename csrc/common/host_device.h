// What functions for the CPU and the GPU alike are made of.
#pragma once

#include <cmath>
#include <cstring>

#ifdef __CUDACC__
#define SHAMPOO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SHAMPOO_HOST_DEVICE inline
#endif

namespace shampoo {

// a * b + c, rounded once where the hardware can; a call into libm elsewhere would be far slower.
SHAMPOO_HOST_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDACC__) || defined(FP_FAST_FMAF)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}
SHAMPOO_HOST_DEVICE double fused(double a, double b, double c) {
#if defined(__CUDACC__) || defined(FP_FAST_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// a * b, rounded before anything is added to it: nvcc would fuse the two.
SHAMPOO_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SHAMPOO_HOST_DEVICE double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// As std::bit_cast of C++20.
template <class To, class From>
SHAMPOO_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace shampoo
