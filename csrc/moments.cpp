// Replaces lerp_, mul_, addcmul_, sqrt, div and vector_norm over flat moments: eight passes in one.
#include <ATen/Parallel.h>

#include "kernels.h"
#include "squares.h"

namespace shampoo {
namespace {

// Blocks are cut into chunks of kChunk elements; the cut depends on the sizes alone, so neither do
// the sums on the number of threads.
struct Chunks {
  const std::vector<Run>& runs;
  std::vector<int64_t> first;  // a run: the ordinal of its first chunk; then the total

  explicit Chunks(const std::vector<Run>& all) : runs(all), first{0} {
    for (const Run& run : runs) first.push_back(first.back() + run.count * per_block(run));
  }

  static int64_t per_block(const Run& run) { return (run.size + kChunk - 1) / kChunk; }

  // Calls `visit(chunk, block, start, count)` for the chunks with ordinals [begin, end).
  template <class Visit>
  void visit(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t run_block = 0, run_start = 0;
    for (size_t r = 0; r < runs.size(); ++r) {
      const Run& run = runs[r];
      const int64_t each = per_block(run);
      for (int64_t at = std::max(begin, first[r]); at < std::min(end, first[r + 1]); ++at) {
        const int64_t block = (at - first[r]) / each, part = (at - first[r]) % each;
        visit(at, run_block + block, run_start + block * run.size + part * kChunk,
              std::min(kChunk, run.size - part * kChunk));
      }
      run_block += run.count;
      run_start += run.count * run.size;
    }
  }

  // The norm of every block from the sums of its chunks.
  template <class Norm>
  void lengths(const std::vector<double>& sums, Norm* norm) const {
    for (size_t r = 0, chunk = 0; r < runs.size(); ++r)
      for (int64_t block = 0; block < runs[r].count; ++block) {
        double sum = 0.0;
        for (int64_t part = 0; part < per_block(runs[r]); ++part) sum += sums[chunk++];
        *norm++ = static_cast<Norm>(std::sqrt(sum));
      }
  }
};

template <class Flat>
struct Step {
  Flat coefficient, correction1, beta2, weight2, scale2, eps;
  bool from_gradient;

  explicit Step(const Moments& moments)
      : coefficient(static_cast<Flat>(1.0 - moments.beta1)),
        correction1(static_cast<Flat>(moments.correction1)),
        beta2(static_cast<Flat>(moments.beta2)),
        weight2(static_cast<Flat>(moments.weight2)),
        scale2(static_cast<Flat>(1.0 / moments.correction2)),
        eps(static_cast<Flat>(moments.eps)),
        from_gradient(coefficient >= Flat(0.5)) {
    // As torch's lerp: from the nearer end, so that a weight of 1 gives exactly the gradient.
    if (from_gradient) coefficient -= Flat(1);
  }

  // exp_avg <- beta1 exp_avg + (1 - beta1) grad
  Flat average(Flat avg, Flat grad) const {
    return fused(coefficient, grad - avg, from_gradient ? grad : avg);
  }
  // exp_avg_sq <- beta2 exp_avg_sq + weight2 grad^2
  Flat square(Flat sq, Flat grad) const { return fused(weight2 * grad, grad, beta2 * sq); }
  Flat denominator(Flat sq) const { return std::sqrt(sq * scale2) + eps; }

  // D of one chunk into `out`. `raw` is the gradient, normalized or not.
  void operator()(Flat* __restrict out, Flat* __restrict avg, Flat* __restrict sq, const Flat* grad,
                  const Flat* raw, int64_t count) const {
    if (avg && sq) {
      for (int64_t i = 0; i < count; ++i) {
        const Flat moved = average(avg[i], grad[i]), spread = square(sq[i], raw[i]);
        avg[i] = moved;
        sq[i] = spread;
        out[i] = moved / (correction1 * denominator(spread));
      }
    } else if (sq) {
      for (int64_t i = 0; i < count; ++i) {
        const Flat spread = square(sq[i], raw[i]);
        sq[i] = spread;
        out[i] = grad[i] / denominator(spread);
      }
    } else if (avg) {
      for (int64_t i = 0; i < count; ++i) {
        const Flat moved = average(avg[i], grad[i]);
        avg[i] = moved;
        out[i] = moved / correction1;
      }
    } else {
      std::copy_n(grad, count, out);
    }
  }
};

// The gradient of a chunk, scaled so that its block has norm 1; zero if the block is.
template <class Flat>
void normalize(Flat* out, const Flat* grad, double length, int64_t count) {
  const Flat divisor = static_cast<Flat>(length);
  if (length > 0.0)
    for (int64_t i = 0; i < count; ++i) out[i] = grad[i] / divisor;
  else
    std::fill_n(out, count, Flat(0));
}

}  // namespace

template <class Flat, class Norm>
void graft_moments(Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Norm* norm, const Flat* grad,
                   const std::vector<Run>& runs, const Moments& moments) {
  const Chunks chunks(runs);
  const int64_t total = chunks.first.back(), grain = kGrain / kChunk;
  std::vector<double> sums(total), lengths;
  if (moments.normalized && exp_avg_sq) {
    at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      chunks.visit(begin, end, [&](int64_t chunk, int64_t, int64_t start, int64_t count) {
        sums[chunk] = sum_of_squares(grad + start, count);
      });
    });
    int64_t blocks = 0;
    for (const Run& run : runs) blocks += run.count;
    lengths.resize(blocks);
    chunks.lengths(sums, lengths.data());
  }
  const Step<Flat> step(moments);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    alignas(64) Flat grafted[kChunk], unit[kChunk];
    chunks.visit(begin, end, [&](int64_t chunk, int64_t block, int64_t start, int64_t count) {
      const Flat* raw = grad + start;
      if (!lengths.empty()) {
        normalize(unit, raw, lengths[block], count);
        raw = unit;
      }
      step(grafted, exp_avg ? exp_avg + start : nullptr, exp_avg_sq ? exp_avg_sq + start : nullptr,
           grad + start, raw, count);
      sums[chunk] = sum_of_squares(grafted, count);
      if (direction) std::copy_n(grafted, count, direction + start);
    });
  });
  chunks.lengths(sums, norm);
}

template <class Flat>
void block_norms(Flat* norm, const Flat* blocks, const Run& run) {
  const std::vector<Run> runs{run};
  const Chunks chunks(runs);
  const int64_t total = chunks.first.back();
  std::vector<double> sums(total);
  at::parallel_for(0, total, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    chunks.visit(begin, end, [&](int64_t chunk, int64_t, int64_t start, int64_t count) {
      sums[chunk] = sum_of_squares(blocks + start, count);
    });
  });
  chunks.lengths(sums, norm);
}

template void block_norms(float*, const float*, const Run&);
template void block_norms(double*, const double*, const Run&);

#define INSTANTIATE(Flat, Norm)                                                    \
  template void graft_moments(Flat*, Flat*, Flat*, Norm*, const Flat*,             \
                              const std::vector<Run>&, const Moments&);
INSTANTIATE(float, float)
INSTANTIATE(float, double)
INSTANTIATE(double, float)
INSTANTIATE(double, double)
#undef INSTANTIATE

}  // namespace shampoo
