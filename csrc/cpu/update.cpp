// Replaces mul by the scale, mul_, add_ and a strided copy_ for every tile.
#include "cpu/update.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "common/philox.h"
#include "cpu/elements.h"
#include "cpu/grain.h"
#include "cpu/visit_tiles.h"

namespace shampoo::cpu {
namespace {

// Moves `count` weights, in the order of roundings of the reference: scalars and products that
// touch only flat tensors in Flat, the rest in Wide.
template <class Wide, class Flat>
struct Step {
  Flat lr, mu;
  Wide wide_lr, decay, kept;
  bool nesterov;

  explicit Step(const UpdateNumbers& numbers)
      : lr(static_cast<Flat>(numbers.lr.read())),
        mu(static_cast<Flat>(numbers.mu.read())),
        wide_lr(static_cast<Wide>(numbers.lr.read())),
        decay(static_cast<Wide>(numbers.weight_decay.read())),
        kept(static_cast<Wide>(1.0 - numbers.lr.read() * numbers.weight_decay.read())),
        nesterov(numbers.nesterov) {}

  void operator()(Wide* __restrict weight, Flat* __restrict momentum,
                  const Flat* __restrict direction, Flat scale, int64_t count) const {
    // Of zeros where the scale is zero: an Inf times zero is no zero.
    const auto along = [&](int64_t i) { return scale == Flat(0) ? Flat(0) : direction[i] * scale; };
    if (!momentum) {
      for (int64_t i = 0; i < count; ++i)
        weight[i] = weight[i] * kept - static_cast<Wide>(lr * along(i));
    } else if (nesterov) {
      for (int64_t i = 0; i < count; ++i) {
        const Wide step = static_cast<Wide>(along(i)) + decay * weight[i];
        momentum[i] = static_cast<Flat>(static_cast<Wide>(momentum[i] * mu) + step);
        weight[i] -= wide_lr * (step + static_cast<Wide>(mu * momentum[i]));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const Wide step = static_cast<Wide>(along(i)) + decay * weight[i];
        momentum[i] = static_cast<Flat>(static_cast<Wide>(momentum[i] * mu) + step);
        weight[i] -= static_cast<Wide>(lr * momentum[i]);
      }
    }
  }
};

// `place`: of the first element in the segment.
template <class Wide>
void store_randomly(BFloat16* to, const Wide* from, int64_t stride, int64_t place, int64_t count,
                    const Rounding& rounding, int64_t block) {
  const auto drawn = static_cast<uint64_t>(rounding.step.read(block));
  RandomWords random{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = place + i;
    if (i == 0 || at % 4 == 0)
      random = philox(rounding.seed, drawn, static_cast<uint64_t>(at) / 4);
    to[i * stride] = round_stochastically(static_cast<float>(from[i]), random.words[at % 4]);
  }
}

}  // namespace

template <class Flat>
void update_blocks(const std::vector<Source>& params, Flat* momentum, const Flat* direction,
                   const Flat* scale, const std::vector<Tile>& tiles, const UpdateNumbers& numbers,
                   const Rounding& rounding) {
  const int64_t total = tiles.back().ordinal + tiles.back().numel();
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    visit_tiles(
        tiles, params, begin, end,
        [&](const Source& source, int64_t block, int64_t element, int64_t stride, int64_t flat,
            int64_t count) {
          with_type(source, element, [&](auto* weight) {
            using Param = std::remove_pointer_t<decltype(weight)>;
            using Wide = std::conditional_t<std::is_same_v<Param, double>, double, Flat>;
            const Step<Wide, Flat> step(numbers);
            Flat* buffer = momentum ? momentum + flat : nullptr;
            if constexpr (std::is_same_v<Param, Wide>) {
              if (stride == 1) return step(weight, buffer, direction + flat, scale[block], count);
            }
            Wide chunk[kChunk];
            for (int64_t i = 0; i < count; i += kChunk) {
              const int64_t length = std::min(kChunk, count - i);
              load_run(chunk, weight + i * stride, stride, length);
              step(chunk, buffer ? buffer + i : nullptr, direction + flat + i, scale[block],
                   length);
              if constexpr (std::is_same_v<Param, BFloat16>) {
                if (rounding.stochastic) {
                  store_randomly(weight + i * stride, chunk, stride, flat + i, length, rounding,
                                 block);
                  continue;
                }
              }
              store_run(weight + i * stride, chunk, stride, length);
            }
          });
        });
  });
}

template void update_blocks(const std::vector<Source>&, float*, const float*, const float*,
                            const std::vector<Tile>&, const UpdateNumbers&, const Rounding&);
template void update_blocks(const std::vector<Source>&, double*, const double*, const double*,
                            const std::vector<Tile>&, const UpdateNumbers&, const Rounding&);

}  // namespace shampoo::cpu
