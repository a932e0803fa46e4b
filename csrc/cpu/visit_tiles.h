// Walks over the elements of tiles, in pieces that are runs in the segment.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/tiles.h"

namespace shampoo::cpu {

// Calls `visit(element, stride, flat, count)` for every piece of the logical run [logical, logical
// + count) of a source: `element` and `stride` in elements of its memory, `flat` in the segment.
template <class Visit>
void visit_pieces(const Source& source, int64_t logical, int64_t flat, int64_t count,
                  const Visit& visit) {
  const auto& sizes = source.sizes;
  const auto& strides = source.strides;
  const size_t dims = sizes.size();
  if (dims <= 1) {
    const int64_t stride = dims == 0 ? 1 : strides[0];
    visit(logical * stride, stride, flat, count);
    return;
  }
  while (count > 0) {
    const int64_t inside = logical % sizes[dims - 1];
    int64_t outside = logical / sizes[dims - 1];
    int64_t element = inside * strides[dims - 1];
    for (size_t dim = dims - 1; dim-- > 0; outside /= sizes[dim])
      element += outside % sizes[dim] * strides[dim];
    const int64_t piece = std::min(count, sizes[dims - 1] - inside);
    visit(element, strides[dims - 1], flat, piece);
    logical += piece;
    flat += piece;
    count -= piece;
  }
}

// Walks elements [begin, end) of the tiles, counted through the table, and calls
// `visit(source, block, element, stride, flat, count)` for every piece that is one stride in the
// source and one run in the segment. Pieces never cross the border of a block.
template <class Visit>
void visit_tiles(const std::vector<Tile>& tiles, const std::vector<Source>& sources, int64_t begin,
                 int64_t end, const Visit& visit) {
  auto tile = std::upper_bound(tiles.begin(), tiles.end(), begin,
                               [](int64_t at, const Tile& other) { return at < other.ordinal; });
  std::vector<int64_t> index;
  for (--tile; tile != tiles.end() && tile->ordinal < end; ++tile) {
    const Source& source = sources[tile->source];
    const size_t rows = tile->extent.size() - 1;  // modes above the rows
    const int64_t length = tile->extent[rows];
    int64_t at = std::max<int64_t>(begin - tile->ordinal, 0);
    const int64_t stop = std::min(end - tile->ordinal, tile->numel());
    index.resize(rows);
    while (at < stop) {
      const int64_t block = at / tile->block_numel;
      const int64_t block_stop = std::min(stop, (block + 1) * tile->block_numel);
      int64_t column = at % tile->block_numel % length;
      int64_t row = at % tile->block_numel / length;
      int64_t cell = block;
      int64_t logical = 0;  // of the start of the row
      for (size_t mode = rows + 1; mode-- > 0; cell /= tile->grid[mode]) {
        if (mode < rows) {
          index[mode] = row % tile->extent[mode];
          row /= tile->extent[mode];
          logical += index[mode] * tile->pitch[mode];
        }
        logical += (tile->start[mode] + cell % tile->grid[mode] * tile->extent[mode]) *
                   tile->pitch[mode];
      }
      while (at < block_stop) {
        const int64_t count = std::min(length - column, block_stop - at);
        visit_pieces(source, logical + column, tile->offset + at, count,
                     [&](int64_t element, int64_t stride, int64_t flat, int64_t piece) {
                       visit(source, tile->first_block + block, element, stride, flat, piece);
                     });
        at += count;
        column = 0;
        for (size_t mode = rows; mode-- > 0;) {
          logical += tile->pitch[mode];
          if (++index[mode] < tile->extent[mode]) break;
          logical -= tile->extent[mode] * tile->pitch[mode];
          index[mode] = 0;
        }
      }
    }
  }
}

}  // namespace shampoo::cpu
