// Replaces, for every tile, torch's strided copy_ of a gradient, and lerp_, mul_, addcmul_, sqrt, div
// and vector_norm over flat moments, and three more for the average looked ahead: twelve passes in one,
// or two where gradients are normalized.
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

// D of one chunk into `out`. `raw` is the gradient, normalized or not.
template <class Flat>
void move_moments(Flat* __restrict out, Flat* __restrict avg, Flat* __restrict sq, const Flat* grad,
                  const Flat* raw, int64_t count, const MomentCoefficients<Flat>& by) {
  Flat none = Flat(0);
  if (avg && sq)
    for (int64_t i = 0; i < count; ++i)
      out[i] = by.direction(avg[i], true, sq[i], true, grad[i], raw[i]);
  else if (sq)
    for (int64_t i = 0; i < count; ++i)
      out[i] = by.direction(none, false, sq[i], true, grad[i], raw[i]);
  else if (avg)
    for (int64_t i = 0; i < count; ++i)
      out[i] = by.direction(avg[i], true, none, false, grad[i], raw[i]);
  else
    std::copy_n(grad, count, out);
}

}  // namespace

template <class Flat>
void graft_moments(Flat* grad, Flat* exp_avg, Flat* exp_avg_sq, Flat* direction, Flat* norm,
                   const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate, const MomentNumbers& numbers, Flat* ahead) {
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
  const auto shared = MomentCoefficients<Flat>::of(numbers, 0);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    if (!normalized) gather(begin, end);
    alignas(64) Flat space[kChunk], grafted[kChunk], unit[kChunk];
    chunks.visit(begin, end, [&](int64_t chunk, int64_t block, int64_t ordinal, int64_t start,
                                 int64_t count) {
      const Flat* own = gathered(space, ordinal, start, count);
      const Flat* raw = own;
      if (normalized) {
        const Flat of_block = static_cast<Flat>(norms[block]);
        for (int64_t i = 0; i < count; ++i) unit[i] = normalize(own[i], of_block);
        raw = unit;
      }
      const auto by =
          numbers.is_shared() ? shared : MomentCoefficients<Flat>::of(numbers, block);
      move_moments(grafted, exp_avg ? exp_avg + start : nullptr,
                   exp_avg_sq ? exp_avg_sq + start : nullptr, own, raw, count, by);
      if (ahead)
        for (int64_t i = 0; i < count; ++i) ahead[start + i] = by.ahead(exp_avg[start + i], own[i]);
      sums[chunk] = sum_of_squares(grafted, count);
      if (direction) std::copy_n(grafted, count, direction + start);
    });
  });
  chunks.norms(sums, norm);
}

template void graft_moments(float*, float*, float*, float*, float*, const std::vector<Source>&,
                            const std::vector<Tile>&, double, bool, const MomentNumbers&, float*);
template void graft_moments(double*, double*, double*, double*, double*,
                            const std::vector<Source>&, const std::vector<Tile>&, double, bool,
                            const MomentNumbers&, double*);

}  // namespace shampoo::cpu
