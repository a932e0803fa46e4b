// Replaces, for every tile, torch's strided copy_ of a gradient, and lerp_, mul_, addcmul_, sqrt, div
// and vector_norm over flat moments, and three more for the average looked ahead: twelve passes in one,
// or two where gradients are normalized.
// Norms are sums of squares in double, of 512 elements by a warp and then of those sums by another,
// in an order that follows the size of a block alone: not its place, its alignment, nor what lies
// beside it.
#include <algorithm>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile_table.h"

namespace shampoo::cuda {
namespace {

constexpr uint32_t kPart = 512;  // elements of a block that one warp moves
constexpr uint32_t kWarps = kThreads / 32;

int64_t parts_of(int64_t block_numel) { return (block_numel + kPart - 1) / kPart; }

// Tiles whose chunks are parts of blocks.
struct PartTable {
  TileTable tiles;
  Divisor parts[TileTable::kTiles];  // of a block
  uint32_t count, blocks;            // parts and blocks of this launch
  int64_t first_block;               // of this launch
};
static_assert(sizeof(PartTable) <= 32000, "a launch takes 32764 bytes of arguments");

__device__ __forceinline__ double over_warp(double sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <class Flat>
struct Step {
  Flat *grad, *exp_avg, *exp_avg_sq, *direction, *ahead;
  Number alpha;
  bool accumulates;     // onto `grad`
  bool is_there;        // in `grad`, gathered already
  const double* norms;  // of the gradient's blocks, if they are to be normalized
  double* sums;         // [parts] of a launch, read by the next one
  MomentCoefficients<Flat> coefficients;
  const MomentCoefficients<Flat>* live;  // in their place, for every block, if not null

  // G of kCount elements, at `from` in their tensor and `at` in the segment.
  template <int kCount, class Element>
  __device__ __forceinline__ void gather(Flat (&values)[kCount], const Element* from, int64_t at,
                                         Flat factor) const {
    if (is_there) return load(values, grad + at);
    if (factor != Flat(0)) load(values, from);  // a NaN times zero would be one
    if (accumulates) {
      Flat before[kCount];
      load(before, grad + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = fused(factor, values[i], before[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] *= factor;
    }
    if (grad) store(grad + at, values);
  }

  // Moves kCount elements and adds the squares of D to `sum`.
  template <int kCount, class Element>
  __device__ __forceinline__ void move(double& sum, const MomentCoefficients<Flat>& by,
                                       const Element* from, int64_t at, Flat factor,
                                       Flat norm) const {
    Flat values[kCount] = {}, avg[kCount] = {}, sq[kCount] = {};
    if (exp_avg) load(avg, exp_avg + at);
    if (exp_avg_sq) load(sq, exp_avg_sq + at);
    gather(values, from, at, factor);
    Flat next[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Flat grad_here = values[i];
      const Flat raw = norms ? normalize(grad_here, norm) : grad_here;
      values[i] = by.direction(avg[i], exp_avg != nullptr, sq[i], exp_avg_sq != nullptr,
                               grad_here, raw);
      next[i] = by.ahead(avg[i], grad_here);
      sum = fused(static_cast<double>(values[i]), static_cast<double>(values[i]), sum);
    }
    if (exp_avg) store(exp_avg + at, avg);
    if (exp_avg_sq) store(exp_avg_sq + at, sq);
    if (direction) store(direction + at, values);
    if (ahead) store(ahead + at, next);
  }
};

// One thread for a block: the division costs more than a thread of moments_kernel has to spare.
template <class Flat>
__global__ void coefficients_kernel(MomentNumbers numbers, int64_t count,
                                    MomentCoefficients<Flat>* to) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block < count) to[block] = MomentCoefficients<Flat>::of(numbers, block);
}

// In double fewer blocks share a multiprocessor: registers would not do for more.
template <class Flat>
__global__ void __launch_bounds__(kThreads, sizeof(Flat) == 4 ? 3 : 2)
    moments_kernel(const __grid_constant__ PartTable table, Step<Flat> step) {
  const uint32_t part = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (part >= table.count) return;
  const int which = last_row(table.tiles.tiles, table.tiles.count, part,
                             [](const DeviceTile& tile) { return tile.first_chunk; });
  const DeviceTile& tile = table.tiles.tiles[which];
  const Divisor& parts = table.parts[which];
  const uint32_t block = parts.divide(part - tile.first_chunk);
  const uint32_t numel = tile.block_numel.divisor, start = block * numel;
  const uint32_t begin = start + (part - tile.first_chunk - block * parts.divisor) * kPart;
  const uint32_t end = min(begin + kPart, start + numel);
  const Flat norm = step.norms ? static_cast<Flat>(step.norms[tile.first_block + block]) : Flat(0);
  const MomentCoefficients<Flat> by =
      step.live ? step.live[tile.first_block + block] : step.coefficients;
  const Flat factor = static_cast<Flat>(step.alpha.read());
  double sum = 0.0;
  with_type(tile.data, tile.dtype, [&](auto* data) {
    // A lane adds up the same elements in the same order either way.
    if (tile.quads) {
#pragma unroll 2
      for (uint32_t at = begin + 4 * lane; at < end; at += 4 * 32)
        step.template move<4>(sum, by, data + tile.place(at).element, tile.offset + at,
                              factor, norm);
    } else {
      for (uint32_t quad = begin + 4 * lane; quad < end; quad += 4 * 32)
#pragma unroll 1
        for (uint32_t at = quad; at < min(quad + 4, end); ++at)
          step.template move<1>(sum, by, data + tile.place(at).element, tile.offset + at,
                                factor, norm);
    }
  });
  sum = over_warp(sum);
  if (lane == 0) step.sums[part] = sum;
}

template <class Norm>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const __grid_constant__ PartTable table, const double* sums, Norm* norm) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (block >= table.blocks) return;
  const int which =
      last_row(table.tiles.tiles, table.tiles.count, block, [&](const DeviceTile& tile) {
        return static_cast<uint32_t>(tile.first_block - table.first_block);
      });
  const DeviceTile& tile = table.tiles.tiles[which];
  const int64_t inside = table.first_block + block - tile.first_block;
  const uint32_t parts = table.parts[which].divisor;
  const double* first = sums + tile.first_chunk + inside * parts;
  double sum = 0.0;
  for (uint32_t part = lane; part < parts; part += 32) sum += first[part];
  sum = over_warp(sum);
  if (lane == 0) norm[table.first_block + block] = static_cast<Norm>(sqrt(sum));
}

std::vector<PartTable> part_tables(const std::vector<Tile>& tiles,
                                   const std::vector<Source>& sources, bool flat_aligned) {
  std::vector<PartTable> tables;
  for (size_t begin = 0; begin < tiles.size(); begin += TileTable::kTiles) {
    const size_t end = std::min(begin + TileTable::kTiles, tiles.size());
    PartTable& table = tables.emplace_back();
    table.first_block = tiles[begin].first_block;
    for (size_t t = begin; t < end; ++t) {
      const Tile& tile = tiles[t];
      DeviceTile& entry = table.tiles.tiles[t - begin] =
          device_tile_of(tile, sources[tile.source], flat_aligned);
      const Divisor& parts = table.parts[t - begin] = Divisor::of(parts_of(tile.block_numel));
      entry.first_chunk = table.count;
      table.count += static_cast<uint32_t>(tile.blocks) * parts.divisor;
      table.blocks += static_cast<uint32_t>(tile.blocks);
    }
    table.tiles.count = static_cast<int32_t>(end - begin);
  }
  return tables;
}

// How many doubles lie in front of the scratch: for each block, its coefficients, if they are made on
// the device.
int64_t coefficients_scratch(const std::vector<Tile>& tiles, const MomentNumbers& numbers) {
  constexpr int64_t kEach = sizeof(MomentCoefficients<double>) / sizeof(double);
  return numbers.is_live() ? kEach * blocks_of(tiles) : 0;
}

}  // namespace

int64_t moments_scratch(const std::vector<Tile>& tiles, const MomentNumbers& numbers) {
  int64_t doubles = coefficients_scratch(tiles, numbers);
  for (const Tile& tile : tiles) doubles += tile.blocks * (parts_of(tile.block_numel) + 1);
  return doubles;
}

template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   Number alpha, bool accumulate, const MomentNumbers& numbers, Flat* ahead,
                   double* scratch, Stream stream) {
  const int64_t blocks = blocks_of(tiles);
  double *norms = scratch + coefficients_scratch(tiles, numbers), *sums = norms + blocks;
  uintptr_t memory = 0;
  for (const Flat* flat : std::vector<const Flat*>{grad, exp_avg, exp_avg_sq, direction, ahead})
    memory |= reinterpret_cast<uintptr_t>(flat);
  // All of them before the first launch: where one cannot be made, nothing has moved.
  const auto tables = part_tables(tiles, sources, memory % sizeof(Quad<Flat>) == 0);
  const auto move = [&](const Step<Flat>& step, auto* to) {
    const auto blocks_for = [](uint32_t warps) { return (warps + kWarps - 1) / kWarps; };
    for (const PartTable& table : tables) {
      launch(moments_kernel<Flat>, blocks_for(table.count), kThreads, 0, stream, table, step);
      launch(norms_kernel<std::remove_pointer_t<decltype(to)>>, blocks_for(table.blocks), kThreads,
             0, stream, table, static_cast<const double*>(sums), to);
    }
  };
  Step<Flat> step{grad, nullptr, nullptr, nullptr, nullptr, alpha, accumulate};
  step.sums = sums;
  if (numbers.is_live()) {
    auto* live = reinterpret_cast<MomentCoefficients<Flat>*>(scratch);
    launch(coefficients_kernel<Flat>, (blocks + kThreads - 1) / kThreads, kThreads, 0, stream,
           numbers, blocks, live);
    step.live = live;
  } else {
    step.coefficients = MomentCoefficients<Flat>::of(numbers, 0);
  }
  if (numbers.normalized && exp_avg_sq) {
    move(step, norms);  // nothing but G moves yet, and D is G
    step.norms = norms;
    step.is_there = grad != nullptr;  // gathering twice would add it twice
  }
  step.exp_avg = exp_avg;
  step.exp_avg_sq = exp_avg_sq;
  step.direction = direction;
  step.ahead = ahead;
  move(step, norm);
}

template void graft_moments(float*, float*, float*, float*, float*, const std::vector<Source>&,
                            const std::vector<Tile>&, Number, bool, const MomentNumbers&, float*,
                            double*, Stream);
template void graft_moments(double*, double*, double*, double*, double*,
                            const std::vector<Source>&, const std::vector<Tile>&, Number, bool,
                            const MomentNumbers&, double*, double*, Stream);

}  // namespace shampoo::cuda
