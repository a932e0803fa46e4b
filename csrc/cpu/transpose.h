// Transposes of small pieces in registers: element by element, every one is a load and a store.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace shampoo::cpu {

#if defined(__AVX2__) && defined(__FMA__)  // as simd.h has it

// The side of the squares that `transpose_square` moves; 1 where there is none.
template <class Flat>
constexpr int64_t kSquare = sizeof(Flat) == 4 ? 8 : 4;

// to[c, r] = from[r, c]: pairs of rows are interleaved, then pairs of pairs, then halves are exchanged.
inline void transpose_square(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  __m256 row[8], pair[8], quad[8];
  for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from + r * from_stride);
  for (int r = 0; r < 8; r += 2) {
    pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
    pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
  }
  for (int r = 0; r < 8; r += 4)
    for (int half = 0; half < 2; ++half) {
      const __m256 first = pair[r + half], second = pair[r + 2 + half];
      quad[r + 2 * half] = _mm256_shuffle_ps(first, second, 0x44);
      quad[r + 2 * half + 1] = _mm256_shuffle_ps(first, second, 0xEE);
    }
  for (int c = 0; c < 4; ++c) {
    const __m256 low = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20);
    const __m256 high = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31);
    _mm256_storeu_ps(to + c * to_stride, low);
    _mm256_storeu_ps(to + (4 + c) * to_stride, high);
  }
}

inline void transpose_square(double* to, int64_t to_stride, const double* from,
                             int64_t from_stride) {
  __m256d row[4], pair[4];
  for (int r = 0; r < 4; ++r) row[r] = _mm256_loadu_pd(from + r * from_stride);
  for (int r = 0; r < 4; r += 2) {
    pair[r] = _mm256_unpacklo_pd(row[r], row[r + 1]);
    pair[r + 1] = _mm256_unpackhi_pd(row[r], row[r + 1]);
  }
  for (int c = 0; c < 2; ++c) {
    _mm256_storeu_pd(to + c * to_stride, _mm256_permute2f128_pd(pair[c], pair[2 + c], 0x20));
    _mm256_storeu_pd(to + (2 + c) * to_stride, _mm256_permute2f128_pd(pair[c], pair[2 + c], 0x31));
  }
}

#else

template <class Flat>
constexpr int64_t kSquare = 1;

template <class Flat>
void transpose_square(Flat* to, int64_t, const Flat* from, int64_t) {
  *to = *from;
}

#endif

// to[c, r] = from[r, c]. The two do not overlap.
template <class Flat>
void transpose(Flat* to, int64_t to_stride, const Flat* from, int64_t from_stride, int64_t rows,
               int64_t columns) {
  constexpr int64_t side = kSquare<Flat>;
  for (int64_t c = 0; c < columns; c += side)
    for (int64_t r = 0; r < rows; r += side) {
      Flat* corner = to + c * to_stride + r;
      const Flat* source = from + r * from_stride + c;
      if (r + side <= rows && c + side <= columns) {
        transpose_square(corner, to_stride, source, from_stride);
        continue;
      }
      for (int64_t i = 0; i < std::min(side, columns - c); ++i)
        for (int64_t j = 0; j < std::min(side, rows - r); ++j)
          corner[i * to_stride + j] = source[j * from_stride + i];
    }
}

}  // namespace shampoo::cpu
