// A matrix in shared memory as two planes of halves, and products of two such matrices.
//
// value = (hi + lo) / scale, scale a power of two that keeps hi below 2^12: 22 bits of every entry
// that is not tiny beside the largest. Products hi hi + hi lo + lo hi share one accumulator.
//
// A block has one warp for every 16 rows. Its tile map covers a symmetric matrix once: warp w has
// the 16 x 16 tiles (w, w + d mod strips), d = 0 .. strips / 2; where strips / 2 apart they meet,
// the first half of the warps has the tile. Every warp so has the same work within one tile, and
// its rows are those of one fragment A.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace shampoo::cuda {

constexpr int kTile = 16;
constexpr int kPromotion = 64;  // of k; longer sums lose bits where tensor cores truncate

__device__ __forceinline__ int strip() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// Entry e of an accumulator fragment is at (row_of(e), column_of(e)) of its 16 x 8 tile; entries 0
// and 1, 2 and 3 are neighbours.
__device__ __forceinline__ int row_of(int entry) { return lane() / 4 + (entry < 2 ? 0 : 8); }
__device__ __forceinline__ int column_of(int entry) { return lane() % 4 * 2 + entry % 2; }

// The power of two at or above a positive number, as an exponent.
__device__ __forceinline__ int ceil_log2(float value) {
  const unsigned bits = __float_as_uint(value);
  return static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0);
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// The scale of a matrix whose entries are at most `bound`.
__device__ __forceinline__ float split_scale(float bound) {
  return power_of_two(12 - ceil_log2(bound));
}

template <int kSize>
struct SplitMatrix {
  static constexpr int kStrips = kSize / kTile;
  static constexpr int kStride = kSize + 8;  // rows 16 bytes apart modulo 128: no bank conflicts
  static constexpr int kPlane = kSize * kStride;
  static constexpr int kBytes = 2 * kPlane * static_cast<int>(sizeof(uint16_t));
  static_assert(kStrips % 2 == 0, "the tile map needs an even number of strips");

  uint16_t* hi;  // [kSize, kStride], behind it as many of lo

  __device__ __forceinline__ const uint16_t* row(int plane, int i, int j) const {
    return hi + plane * kPlane + i * kStride + j;
  }

  // scale * entry
  __device__ __forceinline__ float scaled(int i, int j) const {
    return half_to_float(*row(0, i, j)) + half_to_float(*row(1, i, j));
  }

  // `scaled` is scale * entry; the entry and its mirror image.
  __device__ __forceinline__ void store(int i, int j, float scaled) const {
    const uint16_t high = float_to_half(scaled);
    const uint16_t low = float_to_half(scaled - half_to_float(high));
    hi[i * kStride + j] = hi[j * kStride + i] = high;
    hi[kPlane + i * kStride + j] = hi[kPlane + j * kStride + i] = low;
  }

  // Rows 16 strip .. of columns k .. k + 15, as fragment A.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int plane, int k) const {
    load_matrices(a, row(plane, kTile * strip() + lane() % 16, k + lane() / 16 * 8));
  }

  // Rows `first` .. `first` + 15 of columns k .. k + 15, as fragments B of two neighbouring tiles:
  // b[0], b[1] of the first, b[2], b[3] of the second. Columns of a symmetric matrix are its rows.
  __device__ __forceinline__ void load_b(uint32_t (&b)[4], int plane, int first, int k) const {
    load_matrices(b, row(plane, first + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2 * 8));
  }

  // The same memory as float32, kSize rows of kStride.
  __device__ __forceinline__ float* as_floats() const { return reinterpret_cast<float*>(hi); }
};

// The tiles of a warp: [tile][half of its columns][entry of the fragment].
template <int kTiles>
using Accumulators = float[kTiles][2][4];

template <int kTiles>
__device__ __forceinline__ void set_zero(Accumulators<kTiles>& tiles) {
#pragma unroll
  for (int d = 0; d < kTiles; ++d)
#pragma unroll
    for (int n = 0; n < 8; ++n) tiles[d][n / 4][n % 4] = 0.0f;
}

template <int kSize>
constexpr int kOwnTiles = kSize / kTile / 2 + 1;

// The column of the first entry of tile d of this warp.
template <int kSize>
__device__ __forceinline__ int tile_column(int d) {
  constexpr int kStrips = kSize / kTile;
  const int tile = strip() + d;
  return kTile * (tile < kStrips ? tile : tile - kStrips);
}

// Whether tile d is this warp's: the one halfway round is shared by two warps.
template <int kSize>
__device__ __forceinline__ bool has_tile(int d) {
  constexpr int kHalf = kSize / kTile / 2;
  return d < kHalf || strip() < kHalf;
}

template <int kProducts>
__device__ __forceinline__ void multiply_tile(float (&sum)[2][4], const uint32_t (&a_hi)[4],
                                              const uint32_t (&a_lo)[4], const uint32_t (&b_hi)[4],
                                              const uint32_t (&b_lo)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kProducts == 3) {
      multiply_accumulate(sum[half], a_lo, b_hi[2 * half], b_hi[2 * half + 1]);
      multiply_accumulate(sum[half], a_hi, b_lo[2 * half], b_lo[2 * half + 1]);
    }
    multiply_accumulate(sum[half], a_hi, b_hi[2 * half], b_hi[2 * half + 1]);
  }
}

// sum = scale(A) scale(B) A B, with one product of hi planes or with all three, on kTiles tiles of
// this warp's strip from tile `first_tile` on: its own, or, so that whole strips come of two calls,
// half the strip.
template <int kSize, int kProducts, int kTiles>
__device__ __forceinline__ void multiply(Accumulators<kTiles>& sum, SplitMatrix<kSize> A,
                                         SplitMatrix<kSize> B, int first_tile = 0) {
  const auto accumulate = [&](Accumulators<kTiles>& to, int begin, int end) {
#pragma unroll 1
    for (int k = begin; k < end; k += kTile) {
      uint32_t a_hi[4], a_lo[4] = {};
      A.load_a(a_hi, 0, k);
      if constexpr (kProducts == 3) A.load_a(a_lo, 1, k);
#pragma unroll
      for (int d = 0; d < kTiles; ++d) {
        if (kTiles == kOwnTiles<kSize> && !has_tile<kSize>(d)) continue;
        uint32_t b_hi[4], b_lo[4] = {};
        const int column = tile_column<kSize>(d + first_tile);
        B.load_b(b_hi, 0, column, k);
        if constexpr (kProducts == 3) B.load_b(b_lo, 1, column, k);
        multiply_tile<kProducts>(to[d], a_hi, a_lo, b_hi, b_lo);
      }
    }
  };
  set_zero(sum);
  if constexpr (kSize <= kPromotion) {
    accumulate(sum, 0, kSize);
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < kSize; chunk += kPromotion) {
      Accumulators<kTiles> part;
      set_zero(part);
      accumulate(part, chunk, min(chunk + kPromotion, kSize));
#pragma unroll
      for (int d = 0; d < kTiles; ++d)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[d][i / 4][i % 4] += part[d][i / 4][i % 4];
    }
  }
}

// Calls `use(i, j, entry)` for the entries of this warp's tiles that stand for themselves and their
// mirror images: of a tile on the diagonal, those with i <= j.
template <int kSize, class Own, class Use>
__device__ __forceinline__ void for_own_entries(const Own& tiles, const Use& use) {
#pragma unroll
  for (int d = 0; d < kOwnTiles<kSize>; ++d) {
    if (!has_tile<kSize>(d)) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int i = kTile * strip() + row_of(n % 4);
      const int j = tile_column<kSize>(d) + n / 4 * 8 + column_of(n % 4);
      if (d > 0 || i <= j) use(i, j, tiles[d][n / 4][n % 4]);
    }
  }
}

}  // namespace shampoo::cuda
