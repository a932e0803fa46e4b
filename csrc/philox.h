// Philox4x32-10: four random words for every counter, without any state (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <cstdint>

#include "device.h"

namespace shampoo::cuda {

struct RandomWords {
  uint32_t words[4];

  // words[i] without an index into registers, which would put them into memory.
  __device__ __forceinline__ uint32_t word(int64_t i) const {
    return i < 2 ? (i == 0 ? words[0] : words[1]) : (i == 2 ? words[2] : words[3]);
  }
};

__device__ __forceinline__ RandomWords philox(uint64_t seed, uint64_t high, uint64_t low) {
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
  uint32_t c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    constexpr uint32_t kFirst = 0xd2511f53u, kSecond = 0xcd9e8d57u;
    const uint32_t high0 = __umulhi(kFirst, c0), low0 = kFirst * c0;
    const uint32_t high1 = __umulhi(kSecond, c2), low1 = kSecond * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace shampoo::cuda
