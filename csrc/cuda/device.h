// What the .cu sources use of the GPU beside plain C++: launches, 16-bit floats, tensor cores.
//
// Where CUDA is not the compiler, the emulation of the tests takes its place: it has the functions
// below, and the built-in names of CUDA that the sources use.
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace shampoo::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Runs a kernel on the current device.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  if (shared_bytes > 48 << 10)  // more needs to be asked for, on every device
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "this GPU has too little shared memory for a kernel");
  kernel<<<blocks, threads, shared_bytes, stream>>>(args...);
  check(cudaGetLastError(), "a kernel did not start");
}

inline void set_zero(void* memory, size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "memory could not be set to zero");
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// A GPU refuses an access that is not aligned; the emulation says which.
__device__ __forceinline__ void expect_aligned(const void*, size_t) {}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four 8 x 8 matrices of halves, a row from each lane: lane 8 i + r has the address of row r of
// matrix i, and gets elements 2 (lane % 4) and the next of row lane / 4 of every matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const uint16_t* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// sum += A B, A 16 x 16 and B 16 x 8 halves.
__device__ __forceinline__ void multiply_accumulate(float (&sum)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace shampoo::cuda

#endif
