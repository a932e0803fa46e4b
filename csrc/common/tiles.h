// Where the blocks of a segment lie in the tensors they were cut from. No torch header.
//
// The tables are those of kernels/reference/ops.py: a tile is a grid of equal blocks of one tensor of
// merged shape `dims`. A merged shape is logical: element i of it is element i, row-major, of the
// tensor's own shape, whatever its strides.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"

namespace shampoo {

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

  int64_t numel() const {
    int64_t numel = 1;
    for (const int64_t size : sizes) numel *= size;
    return numel;
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

// How many blocks a table describes.
inline int64_t blocks_of(const std::vector<Tile>& tiles) {
  return tiles.empty() ? 0 : tiles.back().first_block + tiles.back().blocks;
}

}  // namespace shampoo
