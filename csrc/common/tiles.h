// Where the blocks of a segment lie in the tensors they were cut from. No torch header.
//
// The tables are those of kernels/reference.py: a tile is a grid of equal blocks of one tensor of
// merged shape `dims`. A merged shape is logical: element i of it is element i, row-major, of the
// tensor's own shape, whatever its strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace shampoo {

enum class Dtype { kHalf, kBFloat16, kFloat, kDouble };

// A tensor as few dimensions as its strides allow: one, if it is contiguous.
struct Source {
  char* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  // Adds a dimension inside the others, or lengthens the last one where the two join.
  void append(int64_t size, int64_t stride) {
    if (size == 1) return;
    if (!sizes.empty() && strides.back() == size * stride) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
};

// One row of the table `tiles`.
struct Tile {
  int64_t source;
  int64_t offset;           // in the segment, of the first block
  int64_t first_block = 0;  // in the segment
  int64_t ordinal = 0;      // elements of the tiles before this one in the table
  int64_t blocks = 1;
  int64_t block_numel = 1;
  // A mode each, but modes that a block spans whole are folded into the one before them.
  std::vector<int64_t> start, grid, extent;
  std::vector<int64_t> pitch;  // logical distance of neighbours in this mode

  Tile(const int64_t* row, int64_t order) : source(row[0]), offset(row[1]) {
    const int64_t* dims = row + 2;
    const int64_t *starts = dims + order, *grids = starts + order, *extents = grids + order;
    int64_t inner = 1;
    for (int64_t mode = 0; mode < order; ++mode) inner *= dims[mode];
    for (int64_t mode = 0; mode < order; ++mode) {
      inner /= dims[mode];
      blocks *= grids[mode];
      block_numel *= extents[mode];
      if (mode > 0 && extents[mode] == dims[mode]) {
        start.back() *= dims[mode];
        extent.back() *= dims[mode];
        pitch.back() = inner;
      } else {
        start.push_back(starts[mode]);
        grid.push_back(grids[mode]);
        extent.push_back(extents[mode]);
        pitch.push_back(inner);
      }
    }
  }

  int64_t numel() const { return blocks * block_numel; }
};

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

}  // namespace shampoo
