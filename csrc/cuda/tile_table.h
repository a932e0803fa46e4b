// The tiles of common/tiles.h in the form in which kernels of the GPU take them.
//
// A table travels in the arguments of a launch, as many tiles at a time as fit into the 32 KB that
// CUDA 12.1 and later allow: no copy to the device, no memory that must outlive the call, and a
// CUDA graph keeps what it was captured with. Gradients are new tensors in every step, so a table
// kept on the device would be copied there again each time. Models of 100 parameters need one or
// two tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/tiles.h"
#include "cuda/device.h"

namespace shampoo::cuda {

// n / divisor for n < 2^31 by a product and a shift.
struct Divisor {
  uint32_t divisor, magic, shift;

  static Divisor of(int64_t divisor) {
    uint32_t shift = 0;
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t above = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    const uint64_t magic = (above << 32) / static_cast<uint64_t>(divisor) + 1;
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, magic) + n) >> shift;
  }
};

constexpr int kMaxModes = 4;
constexpr int kMaxDims = 6;
constexpr uint32_t kThreads = 256;
constexpr uint32_t kChunk = 8 * kThreads;  // elements of a tile that one thread block moves

// One tile: where element `at` of it, counted as in the segment, lies in its tensor.
struct DeviceTile {
  char* data;      // of the tensor; of the first element of the tile, if `dims` is 0
  int64_t offset;  // in the segment
  int64_t first_block;
  uint32_t first_chunk;
  uint32_t numel;
  Divisor block_numel;
  Dtype dtype;
  uint32_t start;  // logical, of the first element; not used if `dims` is 0
  int8_t modes;
  int8_t dims;  // of the tensor; 0 if every mode has one stride in its memory
  bool quads;   // whether four elements at a time are neighbours in both memories, and aligned
  Divisor extent[kMaxModes], grid[kMaxModes];
  int64_t pitch[kMaxModes];  // in the tensor's memory if `dims` is 0, else logical
  Divisor size[kMaxDims];
  int64_t stride[kMaxDims];

  struct Place {
    int64_t element;  // from `data`
    uint32_t block;   // of the tile
  };

  __device__ __forceinline__ Place place(uint32_t at) const {
    const uint32_t block = block_numel.divide(at);
    uint32_t index = at - block * block_numel.divisor, cell = block;
    int64_t element = 0;
#pragma unroll
    for (int mode = kMaxModes - 1; mode >= 0; --mode) {
      if (mode >= modes) continue;
      const uint32_t outer = extent[mode].divide(index), next = grid[mode].divide(cell);
      const uint32_t inside = index - outer * extent[mode].divisor;
      const uint32_t which = cell - next * grid[mode].divisor;
      element += static_cast<int64_t>(which * extent[mode].divisor + inside) * pitch[mode];
      index = outer;
      cell = next;
    }
    if (dims == 0) return {element, block};
    uint32_t logical = start + static_cast<uint32_t>(element);
    element = 0;
    for (int dim = dims - 1; dim >= 0; --dim) {
      const uint32_t outer = size[dim].divide(logical);
      element += static_cast<int64_t>(logical - outer * size[dim].divisor) * stride[dim];
      logical = outer;
    }
    return {element, block};
  }
};

// The last of some rows whose `first(row)` is `index` or less.
template <class Row, class First>
__device__ __forceinline__ int last_row(const Row* rows, int count, uint32_t index,
                                        const First& first) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first(rows[middle]) <= index)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The last of some rows that starts at or before a chunk.
template <class Row>
__device__ __forceinline__ const Row& row_of(const Row* rows, int count, uint32_t chunk) {
  return rows[last_row(rows, count, chunk, [](const Row& row) { return row.first_chunk; })];
}

struct TileTable {
  static constexpr int kTiles = 96;
  DeviceTile tiles[kTiles];
  int32_t count;

  // The tile of a chunk.
  __device__ __forceinline__ const DeviceTile& find(uint32_t chunk) const {
    return row_of(tiles, count, chunk);
  }
};
static_assert(sizeof(TileTable) <= 32000, "a launch takes 32764 bytes of arguments");

// The stride in memory of a mode of `length` indices at logical distance `pitch`, or 0 if it has
// not one only.
inline int64_t stride_of(const Source& source, int64_t pitch, int64_t length) {
  if (source.sizes.empty()) return 1;
  int64_t inner = 1;
  for (size_t dim = source.sizes.size(); dim-- > 0; inner *= source.sizes[dim])
    if (pitch % inner == 0 && pitch * length <= inner * source.sizes[dim])
      return pitch / inner * source.strides[dim];
  return 0;
}

// `flat_aligned`: whether the memory of the segment starts where four elements may be moved at once.
inline DeviceTile device_tile_of(const Tile& tile, const Source& source, bool flat_aligned) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const size_t modes = tile.extent.size(), dims = source.sizes.size();
  const int64_t numel = source.numel();
  if (tile.numel() >= kLimit)
    throw std::invalid_argument("a tile has " + std::to_string(tile.numel()) +
                                " elements. Must be < 2^31: cut it into several.");
  if (modes > kMaxModes)
    throw std::invalid_argument("a tile has " + std::to_string(modes) + " modes. Must be <= " +
                                std::to_string(kMaxModes) + ".");
  DeviceTile entry{};
  entry.offset = tile.offset;
  entry.first_block = tile.first_block;
  entry.numel = static_cast<uint32_t>(tile.numel());
  entry.block_numel = Divisor::of(tile.block_numel);
  entry.dtype = source.dtype;
  entry.modes = static_cast<int8_t>(modes);
  bool has_strides = true;
  int64_t first = 0, logical = 0;
  for (size_t mode = 0; mode < modes; ++mode) {
    entry.extent[mode] = Divisor::of(tile.extent[mode]);
    entry.grid[mode] = Divisor::of(tile.grid[mode]);
    const int64_t length = (mode == 0 ? numel : tile.pitch[mode - 1]) / tile.pitch[mode];
    entry.pitch[mode] = stride_of(source, tile.pitch[mode], length);
    has_strides &= entry.pitch[mode] != 0 || length == 1;
    first += tile.start[mode] * entry.pitch[mode];
    logical += tile.start[mode] * tile.pitch[mode];
  }
  if (has_strides) {
    entry.data = source.data + first * itemsize(source.dtype);
    const auto address = reinterpret_cast<uintptr_t>(entry.data);
    entry.quads = flat_aligned && entry.offset % 4 == 0 && tile.extent[modes - 1] % 4 == 0 &&
                  entry.pitch[modes - 1] == 1 && address % (4 * itemsize(source.dtype)) == 0;
    for (size_t mode = 0; mode + 1 < modes; ++mode) entry.quads &= entry.pitch[mode] % 4 == 0;
    return entry;
  }
  if (dims > kMaxDims || numel >= kLimit)
    throw std::invalid_argument(
        "a tensor has " + std::to_string(dims) + " dimensions that do not join and " +
        std::to_string(numel) + " elements. Must be <= " + std::to_string(kMaxDims) +
        " and < 2^31: make it contiguous.");
  entry.data = source.data;
  entry.dims = static_cast<int8_t>(dims);
  entry.start = static_cast<uint32_t>(logical);
  for (size_t dim = 0; dim < dims; ++dim) {
    entry.size[dim] = Divisor::of(source.sizes[dim]);
    entry.stride[dim] = source.strides[dim];
  }
  for (size_t mode = 0; mode < modes; ++mode) entry.pitch[mode] = tile.pitch[mode];
  return entry;
}

// Calls `start(table, chunks)` for the launches that cover all tiles. All tables are made before the
// first launch: where one cannot be, nothing has moved.
template <class Start>
void for_each_table(const std::vector<Tile>& tiles, const std::vector<Source>& sources,
                    bool flat_aligned, const Start& start) {
  std::vector<std::pair<TileTable, uint32_t>> tables;
  for (size_t begin = 0; begin < tiles.size(); begin += TileTable::kTiles) {
    const size_t end = std::min(begin + TileTable::kTiles, tiles.size());
    auto& [table, chunks] = tables.emplace_back();
    for (size_t t = begin; t < end; ++t) {
      DeviceTile& entry = table.tiles[t - begin] =
          device_tile_of(tiles[t], sources[tiles[t].source], flat_aligned);
      entry.first_chunk = chunks;
      chunks += (entry.numel + kChunk - 1) / kChunk;
    }
    table.count = static_cast<int32_t>(end - begin);
  }
  for (const auto& [table, chunks] : tables) start(table, chunks);
}

// Calls `use(place, at, quad)` for the elements of this thread: `at` as in DeviceTile::place;
// `quad` is true if it stands for itself and the three behind it.
template <class Use>
__device__ __forceinline__ void for_own_elements(const DeviceTile& tile, const Use& use) {
  const uint32_t begin = (blockIdx.x - tile.first_chunk) * kChunk;
  const uint32_t end = min(begin + kChunk, tile.numel);
  if (tile.quads) {
#pragma unroll 2
    for (uint32_t at = begin + 4 * threadIdx.x; at < end; at += 4 * kThreads)
      use(tile.place(at), at, std::true_type());
  } else {
#pragma unroll 4
    for (uint32_t at = begin + threadIdx.x; at < end; at += kThreads)
      use(tile.place(at), at, std::false_type());
  }
}

}  // namespace shampoo::cuda
