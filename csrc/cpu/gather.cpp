// Replaces, for every tile, torch's strided copy_ (and mul_, or add_) of a view of the parameter.
#include "cpu/gather.h"

#include <ATen/Parallel.h>

namespace shampoo::cpu {

template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate) {
  const int64_t total = tiles.back().ordinal + tiles.back().numel();
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    gather_range(out, 0, sources, tiles, begin, end, alpha, accumulate);
  });
}

template void gather_blocks(float*, const std::vector<Source>&, const std::vector<Tile>&, double,
                            bool);
template void gather_blocks(double*, const std::vector<Source>&, const std::vector<Tile>&, double,
                            bool);

}  // namespace shampoo::cpu
