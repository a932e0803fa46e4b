// Replaces two divisions, a sum, another division, two or three masks, a comparison and a copy of
// numbers of which there is one a block: launches, all of them.
#include "cuda/device.h"
#include "cuda/launch.h"

namespace shampoo::cuda {
namespace {

constexpr uint32_t kThreads = 128;

template <class Flat>
__global__ void __launch_bounds__(kThreads) graft_scale_kernel(GraftScale<Flat> blocks,
                                                               int64_t count) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block < count) blocks.write(block);
}

}  // namespace

template <class Flat>
void graft_scale(const GraftScale<Flat>& blocks, int64_t count, Stream stream) {
  const auto grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  launch(graft_scale_kernel<Flat>, grid, kThreads, 0, stream, blocks, count);
}

template void graft_scale(const GraftScale<float>&, int64_t, Stream);
template void graft_scale(const GraftScale<double>&, int64_t, Stream);

}  // namespace shampoo::cuda
