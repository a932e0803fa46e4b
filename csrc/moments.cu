// Replaces lerp_, mul_, addcmul_, sqrt, div and vector_norm over flat moments: eight passes in one.
// Norms are sums of squares in double, of 512 elements by a warp and then of those sums by another,
// in an order that depends on the sizes alone.
#include <algorithm>
#include <type_traits>

#include "boxes.h"
#include "elements.h"
#include "launch.h"
#include "numbers.h"

namespace shampoo::cuda {
namespace {

constexpr uint32_t kPart = 512;  // elements of a block that one warp moves
constexpr uint32_t kWarps = kThreads / 32;

// One row of the table `runs`; chunks and blocks count from the start of the launch.
struct RunBox {
  int64_t start;  // in the segment
  int64_t size;
  uint32_t first_chunk, first_block;
  Divisor parts;  // of a block
};

struct RunTable {
  static constexpr int kRuns = 256;
  RunBox runs[kRuns];
  int32_t count;
  uint32_t chunks, blocks;
  int64_t first_chunk, first_block;  // in the segment

  // The last run that starts at or before `index`.
  template <uint32_t RunBox::*kFirst>
  __device__ __forceinline__ const RunBox& find(uint32_t index) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (runs[middle].*kFirst <= index)
        low = middle;
      else
        high = middle;
    }
    return runs[low];
  }
};
static_assert(sizeof(RunTable) <= 32000, "a launch takes 32764 bytes of arguments");

int64_t parts_of(const Run& run) { return (run.size + kPart - 1) / kPart; }

__device__ __forceinline__ double over_warp(double sum) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// The numbers of Moments as the kernel uses them.
template <class Flat>
struct Weights {
  Flat coefficient, correction1, beta2, weight2, scale2, eps;
  bool from_gradient;

  __host__ __device__ static Weights of(double beta1, double correction1, double beta2,
                                        double weight2, double correction2, double eps) {
    Weights weights{static_cast<Flat>(1.0 - beta1),
                    static_cast<Flat>(correction1),
                    static_cast<Flat>(beta2),
                    static_cast<Flat>(weight2),
                    static_cast<Flat>(1.0 / correction2),
                    static_cast<Flat>(eps),
                    false};
    // As torch's lerp: from the nearer end, so that a weight of 1 gives exactly the gradient.
    weights.from_gradient = weights.coefficient >= Flat(0.5);
    if (weights.from_gradient) weights.coefficient -= Flat(1);
    return weights;
  }

  // exp_avg <- beta1 exp_avg + (1 - beta1) grad
  __device__ __forceinline__ Flat average(Flat avg, Flat value) const {
    return fma(coefficient, value - avg, from_gradient ? value : avg);
  }
  // exp_avg_sq <- beta2 exp_avg_sq + weight2 grad^2
  __device__ __forceinline__ Flat square(Flat sq, Flat value) const {
    return fma(weight2 * value, value, beta2 * sq);
  }
};

template <class Flat>
struct Step {
  Flat *exp_avg, *exp_avg_sq, *direction;
  const Flat* grad;
  const double* lengths;  // of the gradient's blocks, if they are to be normalized
  double* sums;           // [chunks]
  Weights<Flat> weights;
  const Weights<Flat>* live;  // in their place, if not null

  // Moves kCount elements from `at` on. Returns the sum of squares of D.
  template <int kCount>
  __device__ __forceinline__ double move(const Weights<Flat>& weights, int64_t at,
                                         Flat length) const {
    Flat values[kCount], avg[kCount] = {}, sq[kCount] = {};
    load(values, grad + at);
    if (exp_avg) load(avg, exp_avg + at);
    if (exp_avg_sq) load(sq, exp_avg_sq + at);
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Flat raw = !lengths ? values[i] : length > Flat(0) ? values[i] / length : Flat(0);
      Flat divisor = Flat(1);
      if (exp_avg) {
        values[i] = avg[i] = weights.average(avg[i], values[i]);
        divisor = weights.correction1;
      }
      if (exp_avg_sq) {
        sq[i] = weights.square(sq[i], raw);
        divisor *= sqrt(sq[i] * weights.scale2) + weights.eps;
      }
      values[i] /= divisor;
      sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    if (exp_avg) store(exp_avg + at, avg);
    if (exp_avg_sq) store(exp_avg_sq + at, sq);
    if (direction) store(direction + at, values);
    return sum;
  }
};

// One thread for all: the division costs more than a thread of moments_kernel has to spare.
template <class Flat>
__global__ void weights_kernel(Moments moments, Weights<Flat>* to) {
  if (threadIdx.x == 0)
    *to = Weights<Flat>::of(read(moments.beta1), read(moments.correction1), read(moments.beta2),
                            read(moments.weight2), read(moments.correction2), moments.eps);
}

template <class Flat>
__global__ void __launch_bounds__(kThreads, 3)
    moments_kernel(const __grid_constant__ RunTable table, Step<Flat> step, bool quads) {
  const uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (chunk >= table.chunks) return;
  const RunBox& run = table.find<&RunBox::first_chunk>(chunk);
  const uint32_t block = run.parts.divide(chunk - run.first_chunk);
  const uint32_t part = chunk - run.first_chunk - block * run.parts.divisor;
  const int64_t start = run.start + block * run.size;
  const int64_t begin = start + static_cast<int64_t>(part) * kPart;
  const int64_t end = min(begin + static_cast<int64_t>(kPart), start + run.size);
  const Flat length =
      step.lengths
          ? static_cast<Flat>(step.lengths[table.first_block + run.first_block + block])
          : Flat(0);
  const Weights<Flat> weights = step.live ? *step.live : step.weights;
  double sum = 0.0;
  if (quads && run.start % 4 == 0 && run.size % 4 == 0) {
#pragma unroll 4
    for (int64_t at = begin + 4 * lane; at < end; at += 4 * 32)
      sum += step.template move<4>(weights, at, length);
  } else {
#pragma unroll 4
    for (int64_t at = begin + lane; at < end; at += 32)
      sum += step.template move<1>(weights, at, length);
  }
  sum = over_warp(sum);
  if (lane == 0) step.sums[table.first_chunk + chunk] = sum;
}

template <class Norm>
__global__ void __launch_bounds__(kThreads)
    lengths_kernel(const __grid_constant__ RunTable table, const double* sums, Norm* norm) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (block >= table.blocks) return;
  const RunBox& run = table.find<&RunBox::first_block>(block);
  const double* parts = sums + table.first_chunk + run.first_chunk +
                        static_cast<int64_t>(block - run.first_block) * run.parts.divisor;
  double sum = 0.0;
  for (uint32_t part = lane; part < run.parts.divisor; part += 32) sum += parts[part];
  sum = over_warp(sum);
  if (lane == 0) norm[table.first_block + block] = static_cast<Norm>(sqrt(sum));
}

// Calls `start(table)` for the launches that cover all runs.
template <class Start>
void for_each_run_table(const std::vector<Run>& runs, const Start& start) {
  RunTable table{};
  int64_t element = 0;
  for (size_t begin = 0; begin < runs.size(); begin += RunTable::kRuns) {
    const size_t end = std::min(begin + RunTable::kRuns, runs.size());
    table.chunks = table.blocks = 0;
    for (size_t r = begin; r < end; ++r) {
      table.runs[r - begin] = {element, runs[r].size, table.chunks, table.blocks,
                               Divisor::of(parts_of(runs[r]))};
      table.chunks += static_cast<uint32_t>(runs[r].count * parts_of(runs[r]));
      table.blocks += static_cast<uint32_t>(runs[r].count);
      element += runs[r].count * runs[r].size;
    }
    table.count = static_cast<int32_t>(end - begin);
    if (table.blocks > 0) start(table);
    table.first_chunk += table.chunks;
    table.first_block += table.blocks;
  }
}

}  // namespace

constexpr int64_t kWeights = sizeof(Weights<double>) / sizeof(double);  // in front of the scratch

int64_t moments_scratch(const std::vector<Run>& runs) {
  int64_t doubles = kWeights;
  for (const Run& run : runs) doubles += run.count * (parts_of(run) + 1);
  return doubles;
}

template <class Flat, class Norm>
void graft_moments(Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Norm* norm, const Flat* grad,
                   const std::vector<Run>& runs, const Moments& moments, double* scratch,
                   Stream stream) {
  int64_t blocks = 0;
  for (const Run& run : runs) blocks += run.count;
  double *lengths = scratch + kWeights, *sums = lengths + blocks;
  const auto move = [&](const Step<Flat>& step, auto* to) {
    const uintptr_t memory =
        reinterpret_cast<uintptr_t>(step.exp_avg) | reinterpret_cast<uintptr_t>(step.exp_avg_sq) |
        reinterpret_cast<uintptr_t>(step.direction) | reinterpret_cast<uintptr_t>(step.grad);
    const bool quads = memory % sizeof(Quad<Flat>) == 0;
    const auto blocks_for = [](uint32_t warps) { return (warps + kWarps - 1) / kWarps; };
    for_each_run_table(runs, [&](const RunTable& table) {
      launch(moments_kernel<Flat>, blocks_for(table.chunks), kThreads, 0, stream, table, step,
             quads);
      launch(lengths_kernel<std::remove_pointer_t<decltype(to)>>, blocks_for(table.blocks),
             kThreads, 0, stream, table, static_cast<const double*>(sums), to);
    });
  };
  Step<Flat> step{};
  step.grad = grad;
  step.sums = sums;
  if (moments.beta1.live) {  // and so are the others
    auto* live = reinterpret_cast<Weights<Flat>*>(scratch);
    launch(weights_kernel<Flat>, 1, 32, 0, stream, moments, live);
    step.live = live;
  } else {
    step.weights = Weights<Flat>::of(moments.beta1.value, moments.correction1.value,
                                     moments.beta2.value, moments.weight2.value,
                                     moments.correction2.value, moments.eps);
  }
  if (moments.normalized && exp_avg_sq) {
    move(step, lengths);  // nothing moves yet: D is the gradient
    step.lengths = lengths;
  }
  step.exp_avg = exp_avg;
  step.exp_avg_sq = exp_avg_sq;
  step.direction = direction;
  move(step, norm);
}

#define INSTANTIATE(Flat, Norm)                                                \
  template void graft_moments(Flat*, Flat*, Flat*, Norm*, const Flat*,         \
                              const std::vector<Run>&, const Moments&, double*, \
                              Stream);
INSTANTIATE(float, float)
INSTANTIATE(float, double)
INSTANTIATE(double, float)
INSTANTIATE(double, double)
#undef INSTANTIATE

}  // namespace shampoo::cuda
