// The kernels: raw pointers and sizes, no tensors. Arguments are checked by bindings.cpp.
// Names and meanings are those of kernels/reference.py; kernels pass once over memory that no cache
// holds.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/tiles.h"

namespace shampoo {

// Elements that a thread must have to be worth waking, and of which a temporary stays in L1.
constexpr int64_t kGrain = 32768;
constexpr int64_t kChunk = 1024;

// a * b + c, rounded once where the hardware can; a call into libm elsewhere would be far slower.
inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fused(double a, double b, double c) {
#ifdef FP_FAST_FMA
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// One number for all blocks of a call or, where the blocks have taken different numbers of steps, one
// for each.
struct Numbers {
  double shared = 0.0;
  const double* each = nullptr;

  double of(int64_t block) const { return each ? each[block] : shared; }
};

struct Moments {
  double beta1;
  Numbers correction1;
  double beta2, weight2;
  Numbers correction2;
  double eps;
  bool normalized;

  bool is_shared() const { return !correction1.each && !correction2.each; }
};

struct Move {
  double lr, weight_decay, mu;
  bool nesterov;
};

// Whether bfloat16 parameters are rounded up or down at random, with the mean in between. The
// random number of an element depends on these two and its place in the segment alone.
struct Rounding {
  bool stochastic = false;
  uint64_t seed = 0;
  Numbers step;
};

template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate);

// `grad`, unless it accumulates, `exp_avg`, `exp_avg_sq` and `direction` may be null. A source may be
// `grad` or `direction`, where its blocks lie in their places already.
template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate, const Moments& moments);

// out[i] = max |x| of source i, NaN or Inf if it holds one.
void magnitudes(double* out, const std::vector<Source>& sources);

// The Euclidean norm of a block.
template <class Flat>
Flat block_norm(const Flat* block, int64_t numel);

// `momentum` may be null.
template <class Flat>
void update_blocks(const std::vector<Source>& params, Flat* momentum, const Flat* direction,
                   const Flat* scale, const std::vector<Tile>& tiles, const Move& move,
                   const Rounding& rounding);

}  // namespace shampoo
