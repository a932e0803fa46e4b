// Elements of the tiles on their way from parameters or gradients into a segment.
#pragma once

#include <algorithm>
#include <vector>

#include "common/host_device.h"
#include "common/tiles.h"
#include "cpu/elements.h"
#include "cpu/grain.h"
#include "cpu/visit_tiles.h"

namespace shampoo::cpu {

template <class Flat>
void gather_blocks(Flat* out, const std::vector<Source>& sources, const std::vector<Tile>& tiles,
                   double alpha, bool accumulate);

// to[i - origin] <- alpha * element (+ to[i - origin]) for elements [begin, end) of the tiles,
// counted through the table; i is an element's place in the segment.
template <class Flat>
void gather_range(Flat* to, int64_t origin, const std::vector<Source>& sources,
                  const std::vector<Tile>& tiles, int64_t begin, int64_t end, double alpha,
                  bool accumulate) {
  const Flat factor = static_cast<Flat>(alpha);
  Flat chunk[kChunk];
  visit_tiles(tiles, sources, begin, end,
              [&](const Source& source, int64_t /*block*/, int64_t element, int64_t stride,
                  int64_t flat, int64_t count) {
                Flat* at = to + (flat - origin);
                if (alpha == 0.0) {  // a NaN times zero would be one
                  if (!accumulate) std::fill_n(at, count, Flat(0));
                  return;
                }
                with_type(source, element, [&](auto* from) {
                  if (!accumulate && alpha == 1.0) {
                    // A segment may be gathered from itself.
                    if (static_cast<const void*>(from) != at) load_run(at, from, stride, count);
                    return;
                  }
                  for (int64_t i = 0; i < count; i += kChunk) {
                    const int64_t length = std::min(kChunk, count - i);
                    load_run(chunk, from + i * stride, stride, length);
                    if (accumulate)
                      for (int64_t j = 0; j < length; ++j)
                        at[i + j] = fused(factor, chunk[j], at[i + j]);
                    else
                      for (int64_t j = 0; j < length; ++j) at[i + j] = factor * chunk[j];
                  }
                });
              });
}

}  // namespace shampoo::cpu
