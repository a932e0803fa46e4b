// Checks the arguments of every op and hands raw memory to the CPU kernels. The schemas live in
// shampoo/ops.py, the meanings in kernels/reference.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "arguments.h"
#include "gram.h"

namespace shampoo {
namespace {

void gather_blocks_(const at::Tensor& out, at::TensorList sources, const at::Tensor& tiles,
                    double alpha, bool accumulate) {
  check_flat("out", out);
  const auto table = tiles_of(tiles, "sources", sources, "out", out);
  if (table.empty()) return;
  const auto memory = sources_of("sources", sources);
  with_flat(out, [&](auto flat) {
    gather_blocks(pointer<decltype(flat)>(out), memory, table, alpha, accumulate);
  });
}

void graft_moments_(const std::optional<at::Tensor>& exp_avg,
                    const std::optional<at::Tensor>& exp_avg_sq,
                    const std::optional<at::Tensor>& direction, const at::Tensor& norm,
                    const at::Tensor& grad, const at::Tensor& runs, double beta1,
                    double correction1, double beta2, double weight2, double correction2,
                    double eps, bool normalized) {
  const Moments moments{beta1, correction1, beta2, weight2, correction2, eps, normalized};
  const auto table = runs_of(runs, exp_avg, exp_avg_sq, direction, norm, grad, moments);
  if (table.empty()) return;
  with_flat(grad, [&](auto flat) {
    with_flat(norm, [&](auto length) {
      using Flat = decltype(flat);
      graft_moments(pointer<Flat>(exp_avg), pointer<Flat>(exp_avg_sq), pointer<Flat>(direction),
                    pointer<decltype(length)>(norm), const_pointer<Flat>(grad), table, moments);
    });
  });
}

void update_blocks_(at::TensorList params, const std::optional<at::Tensor>& momentum,
                    const at::Tensor& direction, const at::Tensor& scale, const at::Tensor& tiles,
                    double lr, double weight_decay, double mu, bool nesterov) {
  check_flat("direction", direction);
  check_same("scale", scale, "direction", direction);
  const auto table = tiles_of(tiles, "params", params, "direction", direction);
  if (table.empty()) return;
  check_update(momentum, direction, scale, table);
  const auto memory = sources_of("params", params);
  const Move move{lr, weight_decay, mu, nesterov};
  with_flat(direction, [&](auto flat) {
    using Flat = decltype(flat);
    update_blocks(memory, pointer<Flat>(momentum), const_pointer<Flat>(direction),
                  const_pointer<Flat>(scale), table, move);
  });
}

void gram_ema_(const at::Tensor& factor, const at::Tensor& grad, int64_t k, double beta,
               double weight) {
  TORCH_CHECK(0 <= k && k < grad.dim() - 1, "Invalid k=", k, ". Must be in [0, ",
              grad.dim() - 1, ") for grad of shape ", grad.sizes(), ".");
  const int64_t blocks = grad.size(0), size = grad.size(k + 1);
  const bool diagonal = factor.dim() == 2;
  TORCH_CHECK((diagonal || (factor.dim() == 3 && factor.size(2) == size)) &&
                  factor.size(0) == blocks && factor.size(1) == size,
              "factor has shape ", factor.sizes(), ". Must be [", blocks, ", ", size, ", ", size,
              "], or [", blocks, ", ", size, "] for a diagonal, for mode ", k,
              " of grad of shape ", grad.sizes(), ".");
  TORCH_CHECK(factor.scalar_type() == grad.scalar_type(), "factor has dtype ",
              factor.scalar_type(), " but grad has ", grad.scalar_type(), ". Both must be the same.");
  if (factor.numel() == 0) return;
  gram_ema(factor, grad, k, beta, weight);
}

}  // namespace
}  // namespace shampoo

TORCH_LIBRARY_IMPL(shampoo, CPU, m) {
  m.impl("gather_blocks_", &shampoo::gather_blocks_);
  m.impl("graft_moments_", &shampoo::graft_moments_);
  m.impl("gram_ema_", &shampoo::gram_ema_);
  m.impl("update_blocks_", &shampoo::update_blocks_);
}
