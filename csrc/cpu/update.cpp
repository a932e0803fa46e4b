// Replaces mul by the scale, mul_, add_ and a strided copy_ for every tile.
#include "cpu/update.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "cpu/elements.h"
#include "cpu/grain.h"
#include "cpu/visit_tiles.h"

namespace shampoo::cpu {
namespace {

// Moves `count` weights of one block.
template <class Wide, class Flat>
void move_weights(Wide* __restrict weight, Flat* __restrict momentum,
                  const Flat* __restrict direction, Flat scale, int64_t count,
                  const UpdateCoefficients<Wide, Flat>& by, bool nesterov) {
  Flat none = Flat(0);
  if (!momentum)
    for (int64_t i = 0; i < count; ++i)
      by.move(weight[i], none, false, false, scaled(direction[i], scale));
  else if (nesterov)
    for (int64_t i = 0; i < count; ++i)
      by.move(weight[i], momentum[i], true, true, scaled(direction[i], scale));
  else
    for (int64_t i = 0; i < count; ++i)
      by.move(weight[i], momentum[i], true, false, scaled(direction[i], scale));
}

// `place`: of the first element in the segment.
template <class Wide>
void store_randomly(BFloat16* to, const Wide* from, int64_t stride, int64_t place, int64_t count,
                    Draw draw) {
  for (int64_t i = 0; i < count;) {
    const RandomWords random = draw.words(place + i);
    for (int64_t word = (place + i) % 4; word < 4 && i < count; ++word, ++i)
      to[i * stride] = round_stochastically(static_cast<float>(from[i]), random.words[word]);
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
            const auto by = UpdateCoefficients<Wide, Flat>::of(numbers);
            Flat* buffer = momentum ? momentum + flat : nullptr;
            if constexpr (std::is_same_v<Param, Wide>) {
              if (stride == 1)
                return move_weights(weight, buffer, direction + flat, scale[block], count, by,
                                    numbers.nesterov);
            }
            Wide chunk[kChunk];
            for (int64_t i = 0; i < count; i += kChunk) {
              const int64_t length = std::min(kChunk, count - i);
              load_run(chunk, weight + i * stride, stride, length);
              move_weights(chunk, buffer ? buffer + i : nullptr, direction + flat + i,
                           scale[block], length, by, numbers.nesterov);
              if constexpr (std::is_same_v<Param, BFloat16>) {
                if (rounding.stochastic) {
                  store_randomly(weight + i * stride, chunk, stride, flat + i, length,
                                 rounding.draw(block));
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
