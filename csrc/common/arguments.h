// The arguments of the ops as the kernels take them, checked: on the CPU unless a device is named.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/minimax.h"
#include "common/numbers.h"
#include "common/tiles.h"

namespace shampoo {

inline Source source_of(const char* name, size_t position, const at::Tensor& tensor,
                        const at::Device& device = at::kCPU) {
  TORCH_CHECK(tensor.device() == device && tensor.layout() == at::kStrided, name, "[", position,
              "] is ", tensor.layout(), " on ", tensor.device(), ". Must be strided on ",
              place_of(device), ".");
  Source source;
  source.data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  switch (tensor.scalar_type()) {
    case at::kHalf:
      source.dtype = Dtype::kHalf;
      break;
    case at::kBFloat16:
      source.dtype = Dtype::kBFloat16;
      break;
    case at::kFloat:
      source.dtype = Dtype::kFloat;
      break;
    case at::kDouble:
      source.dtype = Dtype::kDouble;
      break;
    default:
      TORCH_CHECK(false, name, "[", position, "] has dtype ", tensor.scalar_type(),
                  ". Must be float16, bfloat16, float32 or float64.");
  }
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    source.append(tensor.size(dim), tensor.stride(dim));
  return source;
}

inline std::vector<Source> sources_of(const char* name, at::TensorList tensors,
                                      const at::Device& device = at::kCPU) {
  std::vector<Source> sources;
  sources.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    sources.push_back(source_of(name, i, tensors[i], device));
  return sources;
}

// Reads the table and checks that every box lies in its tensor. A table may hold any 64 bits: what
// is compared is never a sum or product that could wrap around.
inline std::vector<Tile> tiles_of(const at::Tensor& table, const char* sources_name,
                                  at::TensorList sources) {
  check_table("tiles", table, 6);
  TORCH_CHECK(table.size(1) % 4 == 2, "tiles has ", table.size(1),
              " columns. Must be 2 + 4 * order.");
  const int64_t order = (table.size(1) - 2) / 4, rows = table.size(0);
  const int64_t* row = static_cast<const int64_t*>(table.const_data_ptr());
  std::vector<Tile> tiles;
  tiles.reserve(rows);
  int64_t blocks = 0, ordinal = 0;
  for (int64_t t = 0; t < rows; ++t, row += table.size(1)) {
    TORCH_CHECK(0 <= row[0] && row[0] < static_cast<int64_t>(sources.size()), "tiles[", t,
                "] names tensor ", row[0], " but ", sources_name, " has ", sources.size(), ".");
    const int64_t *dims = row + 2, *start = dims + order, *grid = start + order,
                  *extent = grid + order;
    const int64_t numel = sources[row[0]].numel();
    int64_t merged = 1;
    for (int64_t mode = 0; mode < order; ++mode) {
      const bool is_inside = dims[mode] > 0 && start[mode] >= 0 && grid[mode] > 0 &&
                             extent[mode] > 0 && start[mode] <= dims[mode] &&
                             grid[mode] <= (dims[mode] - start[mode]) / extent[mode];
      TORCH_CHECK(is_inside, "tiles[", t, "] spans [", start[mode], ", ", start[mode], " + ",
                  grid[mode], " * ", extent[mode], ") in mode ", mode, ". Must lie in [0, ",
                  dims[mode], ").");
      TORCH_CHECK(merged <= numel / dims[mode], "tiles[", t, "] has dims of more than ", numel,
                  " elements, which are those of ", sources_name, "[", row[0], "].");
      merged *= dims[mode];
    }
    TORCH_CHECK(merged == numel, "tiles[", t, "] has dims of ", merged, " elements but ",
                sources_name, "[", row[0], "] has ", numel, ".");
    Tile tile(row, order);
    // Elements of a stride of 0 take no memory: there may be any number of them in all.
    tile.first_block = blocks;
    tile.ordinal = ordinal;
    ordinal = sum_up_to_most(ordinal, tile.numel());
    TORCH_CHECK(ordinal < kMost, "tiles[0] to tiles[", t, "] have ", ordinal,
                " elements or more. Must have fewer.");
    blocks += tile.blocks;
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

// Checks that every block lies in a flat tensor.
inline void check_room(const std::vector<Tile>& tiles, const char* flat_name,
                       const at::Tensor& flat) {
  for (size_t t = 0; t < tiles.size(); ++t) {
    const int64_t start = tiles[t].offset, stop = sum_up_to_most(start, tiles[t].numel());
    TORCH_CHECK(start >= 0 && stop <= flat.numel(), "tiles[", t, "] lies at [", start, ", ", stop,
                ") but ", flat_name, " has ", flat.numel(), " elements.");
  }
}

inline std::vector<Tile> tiles_of(const at::Tensor& table, const char* sources_name,
                                  at::TensorList sources, const char* flat_name,
                                  const at::Tensor& flat) {
  auto tiles = tiles_of(table, sources_name, sources);
  check_room(tiles, flat_name, flat);
  return tiles;
}

template <class Flat>
Flat* pointer(const at::Tensor& tensor) {
  return static_cast<Flat*>(tensor.mutable_data_ptr());
}

template <class Flat>
Flat* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? pointer<Flat>(*tensor) : nullptr;
}

template <class Flat>
const Flat* const_pointer(const at::Tensor& tensor) {
  return static_cast<const Flat*>(tensor.const_data_ptr());
}

template <class Flat>
const Flat* const_pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? const_pointer<Flat>(*tensor) : nullptr;
}

// Calls `use(Flat())` with the C++ type of a flat tensor.
template <class Use>
void with_flat(const at::Tensor& tensor, const Use& use) {
  if (tensor.scalar_type() == at::kDouble)
    use(double());
  else
    use(float());
}

// What graft_moments_ takes beside its table of gradients.
inline std::vector<Tile> moments_of(const std::optional<at::Tensor>& grad,
                                    const std::optional<at::Tensor>& exp_avg,
                                    const std::optional<at::Tensor>& exp_avg_sq,
                                    const std::optional<at::Tensor>& direction,
                                    const at::Tensor& norm, at::TensorList sources,
                                    const at::Tensor& tiles, bool accumulate,
                                    const std::optional<at::Tensor>& ahead,
                                    const at::Device& device = at::kCPU) {
  check_flat("norm", norm, device);
  auto table = tiles_of(tiles, "sources", sources);
  const auto check = [&](const char* name, const std::optional<at::Tensor>& tensor) {
    if (!tensor) return;
    check_same(name, *tensor, "norm", norm);
    check_room(table, name, *tensor);
  };
  check("grad", grad);
  check("exp_avg", exp_avg);
  check("exp_avg_sq", exp_avg_sq);
  check("direction", direction);
  check("ahead", ahead);
  TORCH_CHECK(exp_avg || !ahead, "ahead without an exp_avg to look ahead from. Give one.");
  TORCH_CHECK(grad || !accumulate, "accumulate=True without a grad to add to. Give one.");
  if (!table.empty()) check_length("norm", norm, "tiles", blocks_of(table));
  return table;
}

// What the moments are divided by, for each of some blocks.
inline void check_corrections(const std::optional<at::Tensor>& exp_avg,
                              const std::optional<at::Tensor>& exp_avg_sq,
                              const Number& correction1, const Number& correction2,
                              int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    if (exp_avg) check_positive("correction1", correction1.read(block));
    if (exp_avg_sq) check_positive("correction2", correction2.read(block));
    if (!correction1.is_each && !correction2.is_each) return;
  }
}

// What magnitudes_ takes.
inline void check_magnitudes(const at::Tensor& out, at::TensorList tensors,
                             const at::Device& device = at::kCPU) {
  TORCH_CHECK(out.device() == device && out.dim() == 1 && out.is_contiguous() &&
                  out.scalar_type() == at::kDouble &&
                  out.numel() == static_cast<int64_t>(tensors.size()),
              "out is ", out.scalar_type(), " of shape ", out.sizes(), " on ", out.device(),
              ". Must be contiguous float64 of shape [", tensors.size(), "] on ",
              place_of(device), ".");
  int64_t numel = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].numel() > 0, "tensors[", i, "] is empty. Must have an element.");
    numel = sum_up_to_most(numel, tensors[i].numel());
    TORCH_CHECK(numel < kMost, "tensors[0] to tensors[", i, "] have ", numel,
                " elements or more. Must have fewer.");
  }
}

// What graft_scale_ takes.
inline void check_graft_scale(const at::Tensor& scale, const at::Tensor& norm,
                              const std::optional<at::Tensor>& length,
                              const std::optional<at::Tensor>& is_own,
                              const std::optional<at::Tensor>& accepted,
                              const at::Device& device = at::kCPU) {
  check_flat("scale", scale, device);
  const auto check_count = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.numel() == scale.numel(), name, " has ", tensor.numel(),
                " elements. Must have ", scale.numel(), ", as scale has.");
  };
  check_same("norm", norm, "scale", scale);
  check_count("norm", norm);
  if (length) {
    check_same("length", *length, "scale", scale);
    check_count("length", *length);
  }
  const auto check_flags = [&](const char* name, const at::Tensor& flags) {
    TORCH_CHECK(flags.device() == device && flags.scalar_type() == at::kBool &&
                    flags.is_contiguous(),
                name, " is ", flags.scalar_type(), " with strides ", flags.strides(), " on ",
                flags.device(), ". Must be contiguous Bool on ", place_of(device), ".");
  };
  if (is_own) {
    check_flags("is_own", *is_own);
    check_count("is_own", *is_own);
  }
  if (!accepted) return;
  check_flags("accepted", *accepted);
  TORCH_CHECK(accepted->numel() == 1, "accepted has ", accepted->numel(),
              " elements. Must be one flag.");
}

// What update_blocks_ takes beside its table of parameters.
inline void check_update(const std::optional<at::Tensor>& momentum, const at::Tensor& direction,
                         const at::Tensor& scale, const std::vector<Tile>& table) {
  check_length("scale", scale, "tiles", blocks_of(table));
  if (!momentum) return;
  check_same("momentum", *momentum, "direction", direction);
  check_length("momentum", *momentum, "direction", direction.numel());
}

// The steps of a schedule, at least one.
inline std::vector<MinimaxStep<double>> minimax_steps(at::ArrayRef<double> schedule) {
  constexpr size_t kNumbers = 5;
  TORCH_CHECK(!schedule.empty() && schedule.size() % kNumbers == 0, "schedule has ", schedule.size(),
              " coefficients. Must have five for each step, and a step.");
  std::vector<MinimaxStep<double>> steps;
  for (size_t i = 0; i < schedule.size(); i += kNumbers)
    steps.push_back(
        {schedule[i], schedule[i + 1], schedule[i + 2], schedule[i + 3], schedule[i + 4]});
  return steps;
}

}  // namespace shampoo
