// Replaces mul by the scale, mul_, add_ and a strided copy_ for every tile.
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile_table.h"

namespace shampoo::cuda {
namespace {

template <class Flat>
struct Update {
  Flat* momentum;
  const Flat* direction;
  const Flat* scale;
  UpdateNumbers numbers;
  Rounding rounding;
};

// In double fewer blocks share a multiprocessor: registers would not do for more.
template <class Flat>
__global__ void __launch_bounds__(kThreads, sizeof(Flat) == 4 ? 4 : 3)
    update_kernel(const __grid_constant__ TileTable table, Update<Flat> update) {
  const DeviceTile& tile = table.find(blockIdx.x);
  with_type(tile.data, tile.dtype, [&](auto* data) {
    using Param = std::remove_pointer_t<decltype(data)>;
    using Wide = std::conditional_t<std::is_same_v<Param, double>, double, Flat>;
    const auto by = UpdateCoefficients<Wide, Flat>::of(update.numbers);
    for_own_elements(tile, [&](DeviceTile::Place place, uint32_t at, auto quad) {
      constexpr int kCount = decltype(quad)::value ? 4 : 1;
      const int64_t flat = tile.offset + at;
      const Flat scale = update.scale[tile.first_block + place.block];
      Wide weight[kCount];
      Flat direction[kCount], momentum[kCount] = {};
      load(weight, data + place.element);
      load(direction, update.direction + flat);
      if (update.momentum) load(momentum, update.momentum + flat);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        by.move(weight[i], momentum[i], update.momentum != nullptr, update.numbers.nesterov,
                scaled(direction[i], scale));
      if (update.momentum) store(update.momentum + flat, momentum);
      if constexpr (std::is_same_v<Param, BFloat16>) {
        if (update.rounding.stochastic) {
          const RandomWords random =
              update.rounding.draw(tile.first_block + place.block).words(flat);
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            data[place.element + i] =
                round_stochastically(static_cast<float>(weight[i]),
                                     kCount == 4 ? random.words[i] : random.word(flat % 4));
          return;
        }
      }
      store(data + place.element, weight);
    });
  });
}

}  // namespace

template <class Flat>
void update_blocks(const std::vector<Source>& params, Flat* momentum, const Flat* direction,
                   const Flat* scale, const std::vector<Tile>& tiles, const UpdateNumbers& numbers,
                   const Rounding& rounding, Stream stream) {
  const Update<Flat> update{momentum, direction, scale, numbers, rounding};
  const bool aligned = (reinterpret_cast<uintptr_t>(momentum) |
                        reinterpret_cast<uintptr_t>(direction)) % sizeof(Quad<Flat>) == 0;
  for_each_table(tiles, params, aligned, [&](const TileTable& table, uint32_t chunks) {
    launch(update_kernel<Flat>, chunks, kThreads, 0, stream, table, update);
  });
}

template void update_blocks(const std::vector<Source>&, float*, const float*, const float*,
                            const std::vector<Tile>&, const UpdateNumbers&, const Rounding&,
                            Stream);
template void update_blocks(const std::vector<Source>&, double*, const double*, const double*,
                            const std::vector<Tile>&, const UpdateNumbers&, const Rounding&,
                            Stream);

}  // namespace shampoo::cuda
