// Replaces, for every tile, torch's strided copy_ (and mul_, or add_) of a view of the parameter.
#include <ATen/Parallel.h>

#include "dtypes.h"
#include "kernels.h"

namespace shampoo {

template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate) {
  const Flat factor = static_cast<Flat>(alpha);
  const int64_t total = tiles.back().ordinal + tiles.back().numel();
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    Flat chunk[kChunk];
    visit_tiles(tiles, sources, begin, end,
                [&](const Source& source, int64_t /*block*/, int64_t element, int64_t stride,
                    int64_t flat, int64_t count) {
                  Flat* to = out + flat;
                  if (alpha == 0.0) {  // a NaN times zero would be one
                    if (!accumulate) std::fill_n(to, count, Flat(0));
                    return;
                  }
                  with_type(source, element, [&](auto* from) {
                    if (!accumulate && alpha == 1.0) return load_run(to, from, stride, count);
                    for (int64_t i = 0; i < count; i += kChunk) {
                      const int64_t length = std::min(kChunk, count - i);
                      load_run(chunk, from + i * stride, stride, length);
                      if (accumulate)
                        for (int64_t j = 0; j < length; ++j)
                          to[i + j] = fused(factor, chunk[j], to[i + j]);
                      else
                        for (int64_t j = 0; j < length; ++j) to[i + j] = factor * chunk[j];
                    }
                  });
                });
  });
}

template void gather_blocks(float*, const std::vector<Source>&, const std::vector<Tile>&, double,
                            bool);
template void gather_blocks(double*, const std::vector<Source>&, const std::vector<Tile>&, double,
                            bool);

}  // namespace shampoo
