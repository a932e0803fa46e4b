// The launchers of csrc/cuda/launch.h, as built for the host, under Python: pointers are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "common/philox.h"
#include "cuda/launch.h"
#include "emulation.h"

namespace shampoo::cuda {
namespace {

template <class Value>
Value* at(uintptr_t address) {
  return reinterpret_cast<Value*>(address);
}

void minimax_small_root_(uintptr_t root, uintptr_t ridge, uintptr_t factor, int64_t n,
                         int64_t batch, int p, double eps, double relative_eps,
                         const std::vector<std::tuple<float, float, float, float, float>>& steps,
                         int residual) {
  MinimaxSchedule schedule{static_cast<int32_t>(steps.size()), residual, {}};
  for (size_t k = 0; k < steps.size(); ++k) {
    auto& [c0, c1, c2, b, d] = schedule.steps[k];
    std::tie(c0, c1, c2, b, d) = steps[k];
  }
  minimax_small_root(at<float>(root), at<double>(ridge), at<const float>(factor), n, batch, p, eps,
                     relative_eps, schedule, nullptr);
}

// A tensor: address, name of the dtype, sizes, strides.
using Memory =
    std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;

std::vector<Source> sources_of(const std::vector<Memory>& tensors) {
  std::vector<Source> sources;
  for (const auto& [data, dtype, sizes, strides] : tensors) {
    Source& source = sources.emplace_back();
    source.data = at<char>(data);
    source.dtype = dtype == "float16"    ? Dtype::kHalf
                   : dtype == "bfloat16" ? Dtype::kBFloat16
                   : dtype == "float32"  ? Dtype::kFloat
                                         : Dtype::kDouble;
    for (size_t dim = 0; dim < sizes.size(); ++dim) source.append(sizes[dim], strides[dim]);
  }
  return sources;
}

std::vector<Tile> tiles_of(const std::vector<std::vector<int64_t>>& rows) {
  std::vector<Tile> tiles;
  int64_t blocks = 0;
  for (const auto& row : rows) {
    Tile& tile = tiles.emplace_back(row.data(), static_cast<int64_t>(row.size() - 2) / 4);
    tile.first_block = blocks;
    blocks += tile.blocks;
  }
  return tiles;
}

// A number, or the address of one, which stands for the memory of a device; in a list, of one for
// every block.
using Given = std::variant<double, uintptr_t, std::vector<uintptr_t>>;

Number number_of(const Given& given) {
  if (const auto* address = std::get_if<uintptr_t>(&given))
    return Number(at<const double>(*address));
  if (const auto* each = std::get_if<std::vector<uintptr_t>>(&given))
    return Number(at<const double>(each->at(0)), true);
  return std::get<double>(given);
}

// Calls `use(Flat())`.
template <class Use>
void with_flat(bool is_double, const Use& use) {
  if (is_double)
    use(double());
  else
    use(float());
}

void gather_blocks_(uintptr_t out, bool is_double, const std::vector<Memory>& sources,
                    const std::vector<std::vector<int64_t>>& tiles, Given alpha, bool accumulate) {
  with_flat(is_double, [&](auto flat) {
    gather_blocks(at<decltype(flat)>(out), sources_of(sources), tiles_of(tiles), number_of(alpha),
                  accumulate, nullptr);
  });
}

void magnitudes_(uintptr_t out, const std::vector<Memory>& tensors) {
  magnitudes(at<double>(out), sources_of(tensors), nullptr);
}

void graft_moments_(uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t direction,
                    uintptr_t norm, bool is_double, const std::vector<Memory>& sources,
                    const std::vector<std::vector<int64_t>>& rows, Given alpha, bool accumulate,
                    Given beta1, Given correction1, Given beta2, Given weight2, Given correction2,
                    double eps, bool normalized, uintptr_t ahead) {
  const std::vector<Tile> tiles = tiles_of(rows);
  const MomentNumbers numbers{number_of(beta1),   number_of(correction1), number_of(beta2),
                        number_of(weight2), number_of(correction2), eps, normalized};
  std::vector<double> scratch(moments_scratch(tiles, numbers), NAN);
  with_flat(is_double, [&](auto flat) {
    using Flat = decltype(flat);
    graft_moments(at<Flat>(grad), at<Flat>(exp_avg), at<Flat>(exp_avg_sq), at<Flat>(direction),
                  at<Flat>(norm), sources_of(sources), tiles, number_of(alpha), accumulate,
                  numbers, at<Flat>(ahead), scratch.data(), nullptr);
  });
}

void update_blocks_(const std::vector<Memory>& params, uintptr_t momentum, uintptr_t direction,
                    uintptr_t scale, bool is_double,
                    const std::vector<std::vector<int64_t>>& tiles, Given lr, Given weight_decay,
                    Given mu, bool nesterov, bool stochastic, uint64_t seed, Given step) {
  with_flat(is_double, [&](auto flat) {
    using Flat = decltype(flat);
    update_blocks(sources_of(params), at<Flat>(momentum), at<const Flat>(direction),
                  at<const Flat>(scale), tiles_of(tiles),
                  UpdateNumbers{number_of(lr), number_of(weight_decay), number_of(mu), nesterov},
                  Rounding{stochastic, seed, number_of(step)}, nullptr);
  });
}

void graft_scale_(uintptr_t scale, uintptr_t norm, uintptr_t length, uintptr_t is_own,
                  bool is_double, int64_t count, Given correction, bool grafted, double most,
                  uintptr_t accepted) {
  with_flat(is_double, [&](auto flat) {
    using Flat = decltype(flat);
    graft_scale(GraftScale<Flat>{at<Flat>(scale), at<const Flat>(norm), at<const Flat>(length),
                                 at<const bool>(is_own), at<const bool>(accepted),
                                 number_of(correction), grafted, most},
                count, nullptr);
  });
}

std::vector<uint32_t> random_words(uint64_t seed, uint64_t high, uint64_t low) {
  const RandomWords random = philox(seed, high, low);
  return {random.words, random.words + 4};
}

}  // namespace

PYBIND11_MODULE(EMULATION_NAME, module) {
  module.def("set_order", [](bool backward) {
    emulation::order = backward ? emulation::Order::kBackward : emulation::Order::kForward;
  });
  module.def("wide_accesses", [] { return emulation::wide_accesses; });
  module.def("launches", [] { return emulation::launches; });
  module.def("set_dry", [](bool dry) { emulation::dry = dry; });
  module.def("minimax_small_root_", &minimax_small_root_);
  module.def("gather_blocks_", &gather_blocks_);
  module.def("magnitudes_", &magnitudes_);
  module.def("graft_moments_", &graft_moments_);
  module.def("graft_scale_", &graft_scale_);
  module.def("update_blocks_", &update_blocks_);
  module.def("random_words", &random_words);
}

}  // namespace shampoo::cuda
