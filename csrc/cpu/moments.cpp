// Replaces, for every tile, torch's strided copy_ of a gradient, and lerp_, mul_, addcmul_, sqrt, div
// and vector_norm over flat moments: nine passes in one, or two where gradients are normalized.
#include "cpu/moments.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/gather.h"
#include "cpu/grain.h"
#include "cpu/squares.h"

namespace shampoo::cpu {
namespace {

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Blocks are cut into chunks of kChunk elements; the cut depends on the sizes alone, so neither do
// the sums on the number of threads.
struct Chunks {
  const std::vector<Tile>& tiles;
  std::vector<int64_t> first;  // a tile: the ordinal of its first chunk; then the total

  explicit Chunks(const std::vector<Tile>& all) : tiles(all), first{0} {
    for (const Tile& tile : tiles)
      first.push_back(first.back() + tile.blocks * chunks_of(tile.block_numel));
  }

  // Elements of the tiles in front of a chunk, counted through the table.
  int64_t ordinal(int64_t chunk) const {
    const size_t t = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
    if (t == tiles.size()) return tiles.back().ordinal + tiles.back().numel();
    const int64_t each = chunks_of(tiles[t].block_numel), at = chunk - first[t];
    return tiles[t].ordinal + at / each * tiles[t].block_numel + at % each * kChunk;
  }

  // Calls `visit(chunk, block, ordinal, start, count)` for chunks [begin, end): `ordinal` counts
  // elements through the table, `start` is a place in the segment.
  template <class Visit>
  void visit(int64_t begin, int64_t end, const Visit& visit) const {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; t < tiles.size() && first[t] < end; ++t) {
      const Tile& tile = tiles[t];
      const int64_t each = chunks_of(tile.block_numel);
      for (int64_t at = std::max(begin, first[t]); at < std::min(end, first[t + 1]); ++at) {
        const int64_t block = (at - first[t]) / each, inside = (at - first[t]) % each * kChunk;
        const int64_t element = block * tile.block_numel + inside;
        visit(at, tile.first_block + block, tile.ordinal + element, tile.offset + element,
              std::min(kChunk, tile.block_numel - inside));
      }
    }
  }

  // The norm of every block from the sums of its chunks.
  template <class Norm>
  void norms(const std::vector<double>& sums, Norm* norm) const {
    auto next = sums.begin();
    for (const Tile& tile : tiles)
      for (int64_t block = 0; block < tile.blocks; ++block) {
        double sum = 0.0;
        for (int64_t part = chunks_of(tile.block_numel); part > 0; --part) sum += *next++;
        *norm++ = static_cast<Norm>(std::sqrt(sum));
      }
  }
};

template <class Flat>
struct Step {
  Flat coefficient, correction1, beta2, weight2, scale2, eps;
  bool from_gradient;

  Step(const MomentNumbers& numbers, int64_t block)
      : coefficient(static_cast<Flat>(1.0 - numbers.beta1.read())),
        correction1(static_cast<Flat>(numbers.correction1.read(block))),
        beta2(static_cast<Flat>(numbers.beta2.read())),
        weight2(static_cast<Flat>(numbers.weight2.read())),
        scale2(static_cast<Flat>(1.0 / numbers.correction2.read(block))),
        eps(static_cast<Flat>(numbers.eps)),
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
void normalize(Flat* out, const Flat* grad, double norm, int64_t count) {
  const Flat divisor = static_cast<Flat>(norm);
  if (norm > 0.0)
    for (int64_t i = 0; i < count; ++i) out[i] = grad[i] / divisor;
  else
    std::fill_n(out, count, Flat(0));
}

}  // namespace

template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate, const MomentNumbers& numbers) {
  const Chunks chunks(tiles);
  const int64_t total = chunks.first.back(), grain = kGrain / kChunk;
  std::vector<double> sums(total), norms;
  // Brings the gradients of chunks [begin, end) to their place, if they have one.
  const auto gather = [&](int64_t begin, int64_t end) {
    if (grad)
      gather_range(grad, 0, sources, tiles, chunks.ordinal(begin), chunks.ordinal(end), alpha,
                   accumulate);
  };
  // The gradient of a chunk: there, or brought to `space`.
  const auto gathered = [&](Flat* space, int64_t ordinal, int64_t start, int64_t count) {
    if (grad) return grad + start;
    gather_range(space, start, sources, tiles, ordinal, ordinal + count, alpha, false);
    return space;
  };
  const bool normalized = numbers.normalized && exp_avg_sq;
  if (normalized) {
    at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      gather(begin, end);
      alignas(64) Flat space[kChunk];
      chunks.visit(begin, end, [&](int64_t chunk, int64_t, int64_t ordinal, int64_t start,
                                   int64_t count) {
        sums[chunk] = sum_of_squares(gathered(space, ordinal, start, count), count);
      });
    });
    norms.resize(blocks_of(tiles));
    chunks.norms(sums, norms.data());
  }
  const Step<Flat> shared(numbers, 0);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    if (!normalized) gather(begin, end);
    alignas(64) Flat space[kChunk], grafted[kChunk], unit[kChunk];
    chunks.visit(begin, end, [&](int64_t chunk, int64_t block, int64_t ordinal, int64_t start,
                                 int64_t count) {
      const Flat* own = gathered(space, ordinal, start, count);
      const Flat* raw = own;
      if (normalized) {
        normalize(unit, own, norms[block], count);
        raw = unit;
      }
      const Step<Flat> step = numbers.is_shared() ? shared : Step<Flat>(numbers, block);
      step(grafted, exp_avg ? exp_avg + start : nullptr, exp_avg_sq ? exp_avg_sq + start : nullptr,
           own, raw, count);
      sums[chunk] = sum_of_squares(grafted, count);
      if (direction) std::copy_n(grafted, count, direction + start);
    });
  });
  chunks.norms(sums, norm);
}

template void graft_moments(float*, float*, float*, float*, float*, const std::vector<Source>&,
                            const std::vector<Tile>&, double, bool, const MomentNumbers&);
template void graft_moments(double*, double*, double*, double*, double*,
                            const std::vector<Source>&, const std::vector<Tile>&, double, bool,
                            const MomentNumbers&);

}  // namespace shampoo::cpu
