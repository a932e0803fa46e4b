// The kernels of the GPU: raw pointers, sizes and a stream. No torch and no CUDA header, so that
// the bindings compile without the toolkit and the kernels without torch. Arguments are checked by
// bindings_cuda.cpp. Every function starts kernels on the current device and waits for nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "common/graft_scale.h"
#include "common/minimax.h"
#include "common/moments.h"
#include "common/numbers.h"
#include "common/tiles.h"
#include "common/update.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace shampoo::cuda {

using Stream = CUstream_st*;

struct MinimaxSchedule {
  static constexpr int kMaxSteps = 16;
  int32_t count;
  int32_t residual;  // of the last of them, fewer than all: in terms of I - M, single products
  MinimaxStep<float> steps[kMaxSteps];
};

constexpr int64_t kMaxRootSize = 128;

// root = (factor + ridge I)^(-1/p), ridge = max(eps, relative_eps ||factor||_S4), for matrices of
// up to kMaxRootSize rows, p > 1. Only the upper triangles of `factor` are read.
//   root    [batch, n, n], bitwise symmetric
//   ridge   [batch]
//   factor  [batch, n, n]
void minimax_small_root(float* root, double* ridge, const float* factor, int64_t n, int64_t batch,
                        int p, double eps, double relative_eps, const MinimaxSchedule& schedule,
                        Stream stream);

// As the functions of the same names in cpu/.
template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   Number alpha, bool accumulate, Stream stream);

void magnitudes(double* out, const std::vector<Source>& sources, Stream stream);

// Doubles of scratch memory that graft_moments needs on the device: for all sums of blocks, as if it
// took one launch, and for the numbers of each, where they are not known on the host.
int64_t moments_scratch(const std::vector<Tile>& tiles, const MomentNumbers& numbers);

template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   Number alpha, bool accumulate, const MomentNumbers& numbers, Flat* ahead,
                   double* scratch, Stream stream);

// One scale for each of `count` blocks, at least one.
template <class Flat>
void graft_scale(const GraftScale<Flat>& blocks, int64_t count, Stream stream);

template <class Flat>
void update_blocks(const std::vector<Source>& params, Flat* momentum, const Flat* direction,
                   const Flat* scale, const std::vector<Tile>& tiles, const UpdateNumbers& numbers,
                   const Rounding& rounding, Stream stream);

}  // namespace shampoo::cuda
