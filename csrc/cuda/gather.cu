// Replaces, for every tile, torch's strided copy_ (and mul_, or add_) of a view of the parameter.
// Below a megabyte of gradients a launch costs more than the copy.
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile_table.h"

namespace shampoo::cuda {
namespace {

template <class Flat>
struct Gather {
  Flat* out;
  Number alpha;
  bool accumulate;
};

template <class Flat>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ TileTable table, Gather<Flat> gather) {
  const DeviceTile& tile = table.find(blockIdx.x);
  const Flat alpha = static_cast<Flat>(gather.alpha.read());
  with_type(tile.data, tile.dtype, [&](auto* data) {
    for_own_elements(tile, [&](DeviceTile::Place place, uint32_t at, auto quad) {
      constexpr int kCount = decltype(quad)::value ? 4 : 1;
      Flat values[kCount] = {}, before[kCount];
      if (alpha != Flat(0)) load(values, data + place.element);  // a NaN times zero would be one
      Flat* to = gather.out + tile.offset + at;
      if (gather.accumulate) {
        load(before, to);
        for (int i = 0; i < kCount; ++i) values[i] = fused(alpha, values[i], before[i]);
      } else {
        for (Flat& value : values) value *= alpha;
      }
      store(to, values);
    });
  });
}

}  // namespace

template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   Number alpha, bool accumulate, Stream stream) {
  const Gather<Flat> gather{out, alpha, accumulate};
  const bool aligned = reinterpret_cast<uintptr_t>(out) % sizeof(Quad<Flat>) == 0;
  for_each_table(tiles, sources, aligned, [&](const TileTable& table, uint32_t chunks) {
    launch(gather_kernel<Flat>, chunks, kThreads, 0, stream, table, gather);
  });
}

template void gather_blocks(float*, const std::vector<Source>&, const std::vector<Tile>&, Number,
                            bool, Stream);
template void gather_blocks(double*, const std::vector<Source>&, const std::vector<Tile>&, Number,
                            bool, Stream);

}  // namespace shampoo::cuda
