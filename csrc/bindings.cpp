// Checks the arguments of every op and hands raw memory to the CPU kernels. The schemas live in
// shampoo/ops/__init__.py, the meanings in kernels/reference/ops.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/arguments.h"
#include "cpu/eigh.h"
#include "cpu/gather.h"
#include "cpu/graft_scale.h"
#include "cpu/gram.h"
#include "cpu/magnitudes.h"
#include "cpu/minimax.h"
#include "cpu/moments.h"
#include "cpu/precondition.h"
#include "cpu/update.h"

namespace shampoo {
namespace {

// A number that an overload `Tensor` takes, read on the host.
double number_of(const char* name, const at::Tensor& tensor) {
  check_number(name, tensor, at::kCPU);
  return *static_cast<const double*>(tensor.const_data_ptr());
}

// Numbers that an overload `Tensor` takes for its blocks, read on the host.
Number numbers_of(const char* name, const at::Tensor& tensor, int64_t blocks) {
  check_numbers(name, tensor, blocks, at::kCPU);
  const double* values = static_cast<const double*>(tensor.const_data_ptr());
  return tensor.dim() == 0 ? Number(*values) : Number(values, true);
}

// Owns contiguous copies of what is not, for kernels to read: one for all modes of a block.
class Packed {
 public:
  const at::Tensor& operator()(const at::Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    auto& found = copies_[tensor.const_data_ptr()];
    for (const auto& [given, copy] : found)
      if (given.sizes() == tensor.sizes() && given.strides() == tensor.strides()) return copy;
    return found.emplace_back(tensor, tensor.contiguous()).second;
  }

 private:
  // By the address of tensors of one dtype.
  std::unordered_map<const void*, std::vector<std::pair<at::Tensor, at::Tensor>>> copies_;
};

void gather_blocks_(const at::Tensor& out, at::TensorList sources, const at::Tensor& tiles,
                    double alpha, bool accumulate) {
  check_flat("out", out);
  const auto table = tiles_of(tiles, "sources", sources, "out", out);
  if (table.empty()) return;
  const auto memory = sources_of("sources", sources);
  with_flat(out, [&](auto flat) {
    cpu::gather_blocks(pointer<decltype(flat)>(out), memory, table, alpha, accumulate);
  });
}

void gather_blocks_live_(const at::Tensor& out, at::TensorList sources, const at::Tensor& tiles,
                         const at::Tensor& alpha, bool accumulate) {
  gather_blocks_(out, sources, tiles, number_of("alpha", alpha), accumulate);
}

// `numbers_for(blocks)`: those of a table that describes so many.
template <class NumbersFor>
void move_moments(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& exp_avg,
                  const std::optional<at::Tensor>& exp_avg_sq,
                  const std::optional<at::Tensor>& direction, const at::Tensor& norm,
                  at::TensorList sources, const at::Tensor& tiles, double alpha, bool accumulate,
                  const std::optional<at::Tensor>& ahead, const NumbersFor& numbers_for) {
  const auto table =
      moments_of(grad, exp_avg, exp_avg_sq, direction, norm, sources, tiles, accumulate, ahead);
  if (table.empty()) return;
  const int64_t blocks = blocks_of(table);
  const MomentNumbers numbers = numbers_for(blocks);
  check_corrections(exp_avg, exp_avg_sq, numbers.correction1, numbers.correction2, blocks);
  const auto memory = sources_of("sources", sources);
  with_flat(norm, [&](auto flat) {
    using Flat = decltype(flat);
    cpu::graft_moments(pointer<Flat>(grad), pointer<Flat>(exp_avg), pointer<Flat>(exp_avg_sq),
                       pointer<Flat>(direction), pointer<Flat>(norm), memory, table, alpha,
                       accumulate, numbers, pointer<Flat>(ahead));
  });
}

void graft_moments_(const std::optional<at::Tensor>& grad,
                    const std::optional<at::Tensor>& exp_avg,
                    const std::optional<at::Tensor>& exp_avg_sq,
                    const std::optional<at::Tensor>& direction, const at::Tensor& norm,
                    at::TensorList sources, const at::Tensor& tiles, double alpha, bool accumulate,
                    double beta1, double correction1, double beta2, double weight2,
                    double correction2, double eps, bool normalized,
                    const std::optional<at::Tensor>& ahead) {
  move_moments(grad, exp_avg, exp_avg_sq, direction, norm, sources, tiles, alpha, accumulate,
               ahead, [&](int64_t) {
                 return MomentNumbers{beta1,       correction1, beta2,     weight2,
                                      correction2, eps,         normalized};
               });
}

void graft_moments_live_(const std::optional<at::Tensor>& grad,
                         const std::optional<at::Tensor>& exp_avg,
                         const std::optional<at::Tensor>& exp_avg_sq,
                         const std::optional<at::Tensor>& direction, const at::Tensor& norm,
                         at::TensorList sources, const at::Tensor& tiles, const at::Tensor& alpha,
                         bool accumulate, const at::Tensor& beta1, const at::Tensor& correction1,
                         const at::Tensor& beta2, const at::Tensor& weight2,
                         const at::Tensor& correction2, double eps, bool normalized,
                         const std::optional<at::Tensor>& ahead) {
  move_moments(grad, exp_avg, exp_avg_sq, direction, norm, sources, tiles,
               number_of("alpha", alpha), accumulate, ahead, [&](int64_t blocks) {
                 return MomentNumbers{number_of("beta1", beta1),
                                      numbers_of("correction1", correction1, blocks),
                                      number_of("beta2", beta2),
                                      number_of("weight2", weight2),
                                      numbers_of("correction2", correction2, blocks),
                                      eps,
                                      normalized};
               });
}

// `step_for(blocks)`: the counts of a table that describes so many.
template <class StepFor>
void move_weights(at::TensorList params, const std::optional<at::Tensor>& momentum,
                  const at::Tensor& direction, const at::Tensor& scale, const at::Tensor& tiles,
                  const UpdateNumbers& numbers, std::optional<int64_t> seed,
                  const StepFor& step_for) {
  check_flat("direction", direction);
  check_same("scale", scale, "direction", direction);
  const auto table = tiles_of(tiles, "params", params, "direction", direction);
  if (table.empty()) return;
  check_update(momentum, direction, scale, table);
  const auto memory = sources_of("params", params);
  const Rounding rounding{seed.has_value(), static_cast<uint64_t>(seed.value_or(0)),
                          step_for(blocks_of(table))};
  with_flat(direction, [&](auto flat) {
    using Flat = decltype(flat);
    cpu::update_blocks(memory, pointer<Flat>(momentum), const_pointer<Flat>(direction),
                       const_pointer<Flat>(scale), table, numbers, rounding);
  });
}

void update_blocks_(at::TensorList params, const std::optional<at::Tensor>& momentum,
                    const at::Tensor& direction, const at::Tensor& scale, const at::Tensor& tiles,
                    double lr, double weight_decay, double mu, bool nesterov,
                    std::optional<int64_t> seed, double step) {
  move_weights(params, momentum, direction, scale, tiles, {lr, weight_decay, mu, nesterov}, seed,
               [&](int64_t) { return Number(step); });
}

void update_blocks_live_(at::TensorList params, const std::optional<at::Tensor>& momentum,
                         const at::Tensor& direction, const at::Tensor& scale,
                         const at::Tensor& tiles, const at::Tensor& lr,
                         const at::Tensor& weight_decay, const at::Tensor& mu, bool nesterov,
                         std::optional<int64_t> seed, const std::optional<at::Tensor>& step) {
  const UpdateNumbers numbers{number_of("lr", lr), number_of("weight_decay", weight_decay),
                              number_of("mu", mu), nesterov};
  move_weights(params, momentum, direction, scale, tiles, numbers, seed, [&](int64_t blocks) {
    return step ? numbers_of("step", *step, blocks) : Number();
  });
}

// `correction_for(blocks)`: of so many blocks.
template <class CorrectionFor>
void find_scales(const at::Tensor& scale, const at::Tensor& norm,
                 const std::optional<at::Tensor>& length, const std::optional<at::Tensor>& is_own,
                 bool grafted, double most, const std::optional<at::Tensor>& accepted,
                 const CorrectionFor& correction_for) {
  check_graft_scale(scale, norm, length, is_own, accepted);
  const Number correction = correction_for(scale.numel());
  with_flat(scale, [&](auto flat) {
    using Flat = decltype(flat);
    cpu::graft_scale(GraftScale<Flat>{pointer<Flat>(scale), const_pointer<Flat>(norm),
                                      const_pointer<Flat>(length), const_pointer<bool>(is_own),
                                      const_pointer<bool>(accepted), correction, grafted, most},
                     scale.numel());
  });
}

void graft_scale_(const at::Tensor& scale, const at::Tensor& norm,
                  const std::optional<at::Tensor>& length, const std::optional<at::Tensor>& is_own,
                  double correction, bool grafted, double most,
                  const std::optional<at::Tensor>& accepted) {
  if (length) check_positive("correction", correction);
  find_scales(scale, norm, length, is_own, grafted, most, accepted,
              [&](int64_t) { return Number(correction); });
}

void graft_scale_live_(const at::Tensor& scale, const at::Tensor& norm,
                       const std::optional<at::Tensor>& length,
                       const std::optional<at::Tensor>& is_own, const at::Tensor& correction,
                       bool grafted, double most, const std::optional<at::Tensor>& accepted) {
  find_scales(scale, norm, length, is_own, grafted, most, accepted,
              [&](int64_t blocks) { return numbers_of("correction", correction, blocks); });
}

void check_gram(at::TensorList factors, at::TensorList grads, at::IntArrayRef modes, size_t s) {
  const at::Tensor &factor = factors[s], &grad = grads[s];
  const int64_t k = modes[s];
  TORCH_CHECK(0 <= k && k < grad.dim() - 1, "Invalid modes[", s, "]=", k, ". Must be in [0, ",
              grad.dim() - 1, ") for grads[", s, "] of shape ", grad.sizes(), ".");
  const int64_t blocks = grad.size(0), size = grad.size(k + 1);
  const bool diagonal = factor.dim() == 2;
  TORCH_CHECK((diagonal || (factor.dim() == 3 && factor.size(2) == size)) &&
                  factor.size(0) == blocks && factor.size(1) == size,
              "factors[", s, "] has shape ", factor.sizes(), ". Must be [", blocks, ", ", size,
              ", ", size, "], or [", blocks, ", ", size, "] for a diagonal, for mode ", k,
              " of grads[", s, "] of shape ", grad.sizes(), ".");
  TORCH_CHECK(factor.scalar_type() == grad.scalar_type(), "factors[", s, "] has dtype ",
              factor.scalar_type(), " but grads[", s, "] has ", grad.scalar_type(),
              ". Both must be the same.");
  TORCH_CHECK(factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble, "factors[",
              s, "] has dtype ", factor.scalar_type(), ". Must be float32 or float64.");
  TORCH_CHECK(factor.is_contiguous(), "factors[", s, "] of shape ", factor.sizes(),
              " has strides ", factor.strides(), ". Must be contiguous.");
}

void gram_ema_(at::TensorList factors, at::TensorList grads, at::IntArrayRef modes, double beta,
               double weight) {
  TORCH_CHECK(factors.size() == grads.size() && factors.size() == modes.size(), "factors, grads and"
              " modes have ", factors.size(), ", ", grads.size(), " and ", modes.size(),
              " entries. Must have one each for every stack.");
  for (size_t s = 0; s < factors.size(); ++s) {
    check_gram(factors, grads, modes, s);
    check_same_dtype("factors", factors, s);
  }
  if (factors.empty()) return;
  Packed packed;
  with_flat(factors[0], [&](auto flat) {
    using Flat = decltype(flat);
    std::vector<cpu::Gram<Flat>> stacks;
    for (size_t s = 0; s < factors.size(); ++s) {
      const at::Tensor &factor = factors[s], &grad = grads[s];
      if (factor.numel() == 0) continue;
      int64_t before = 1, after = 1;
      for (int64_t mode = 0; mode < modes[s]; ++mode) before *= grad.size(mode + 1);
      for (int64_t mode = modes[s] + 1; mode < grad.dim() - 1; ++mode) after *= grad.size(mode + 1);
      stacks.push_back({pointer<Flat>(factor), const_pointer<Flat>(packed(grad)), grad.size(0),
                        before, grad.size(modes[s] + 1), after, factor.dim() == 2});
    }
    cpu::gram_ema(stacks, static_cast<Flat>(beta), static_cast<Flat>(weight));
  });
}

void gram_ema_live_(at::TensorList factors, at::TensorList grads, at::IntArrayRef modes,
                    const at::Tensor& beta, const at::Tensor& weight) {
  gram_ema_(factors, grads, modes, number_of("beta", beta), number_of("weight", weight));
}

void magnitudes_(const at::Tensor& out, at::TensorList tensors) {
  check_magnitudes(out, tensors);
  cpu::magnitudes(pointer<double>(out), sources_of("tensors", tensors));
}

using Roots = c10::List<std::optional<at::Tensor>>;

// One stack, whose roots begin at `first` among those of all.
void check_precondition(at::TensorList outs, at::TensorList norms, at::TensorList grads,
                        const Roots& roots, size_t s, int64_t first) {
  const at::Tensor &out = outs[s], &norm = norms[s], &grad = grads[s];
  TORCH_CHECK(out.sizes() == grad.sizes() && out.is_contiguous(), "outs[", s, "] has shape ",
              out.sizes(), " with strides ", out.strides(), ". Must be contiguous ", grad.sizes(),
              ", the shape of grads[", s, "].");
  check_flat("norms", norm);
  TORCH_CHECK(norm.numel() == grad.size(0), "norms[", s, "] has ", norm.numel(),
              " elements. Must have ", grad.size(0), ", one for each block of grads[", s, "].");
  const auto check_dtype = [&](const char* name, int64_t index, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.scalar_type() == grad.scalar_type(), name, "[", index, "] has dtype ",
                tensor.scalar_type(), " but grads[", s, "] has ", grad.scalar_type(),
                ". Both must be the same.");
  };
  check_dtype("outs", s, out);
  check_dtype("norms", s, norm);
  for (int64_t mode = 0; mode < grad.dim() - 1; ++mode) {
    const std::optional<at::Tensor> given = roots[first + mode];
    if (!given) continue;
    const at::Tensor& root = *given;
    const int64_t size = grad.size(mode + 1);
    check_dtype("roots", first + mode, root);
    TORCH_CHECK((root.dim() == 2 || (root.dim() == 3 && root.size(2) == size)) &&
                    root.size(0) == grad.size(0) && root.size(1) == size,
                "roots[", first + mode, "] has shape ", root.sizes(), ". Must be [", grad.size(0),
                ", ", size, ", ", size, "], or [", grad.size(0), ", ", size, "] for a diagonal.");
  }
}

void precondition_(at::TensorList outs, at::TensorList norms, at::TensorList grads,
                   const Roots& roots) {
  TORCH_CHECK(outs.size() == grads.size() && norms.size() == grads.size(), "outs, norms and grads"
              " have ", outs.size(), ", ", norms.size(), " and ", grads.size(),
              " entries. Must have one each for every stack.");
  int64_t modes = 0;
  for (const at::Tensor& grad : grads) modes += std::max<int64_t>(grad.dim() - 1, 0);
  TORCH_CHECK(modes == static_cast<int64_t>(roots.size()), "roots has ", roots.size(),
              " tensors. Must have one for each of the ", modes, " modes of grads.");
  int64_t first = 0;
  for (size_t s = 0; s < grads.size(); ++s) {
    check_precondition(outs, norms, grads, roots, s, first);
    check_same_dtype("grads", grads, s);
    first += grads[s].dim() - 1;
  }
  if (grads.empty()) return;
  Packed packed;
  with_flat(grads[0], [&](auto flat) {
    using Flat = decltype(flat);
    std::vector<cpu::Preconditioned<Flat>> stacks;
    int64_t at = 0;
    for (size_t s = 0; s < grads.size(); ++s) {
      const at::Tensor& grad = grads[s];
      const int64_t begin = at;
      at += grad.dim() - 1;
      if (grad.numel() == 0) continue;
      cpu::Preconditioned<Flat> stack{pointer<Flat>(outs[s]), pointer<Flat>(norms[s]),
                                      const_pointer<Flat>(packed(grad)), grad.size(0), {}};
      for (int64_t mode = 0; begin + mode < at; ++mode) {
        const std::optional<at::Tensor> root = roots[begin + mode];
        const Flat* entries = root ? const_pointer<Flat>(packed(*root)) : nullptr;
        stack.roots.push_back({entries, grad.size(mode + 1), root && root->dim() == 2});
      }
      stacks.push_back(std::move(stack));
    }
    cpu::precondition(stacks);
  });
}

void minimax_root_(const at::Tensor& root, const at::Tensor& ridge, const at::Tensor& factor,
                   int64_t p, double eps, double relative_eps, at::ArrayRef<double> schedule) {
  TORCH_CHECK(factor.dim() == 3 && factor.size(1) == factor.size(2), "factor has shape ",
              factor.sizes(), ". Must be [B, n, n].");
  TORCH_CHECK(factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble,
              "factor has dtype ", factor.scalar_type(), ". Must be float32 or float64.");
  TORCH_CHECK(root.sizes() == factor.sizes() && root.is_contiguous() &&
                  root.scalar_type() == factor.scalar_type(),
              "root is ", root.scalar_type(), " of shape ", root.sizes(), " with strides ",
              root.strides(), ". Must be contiguous ", factor.scalar_type(), " of shape ",
              factor.sizes(), ".");
  TORCH_CHECK(ridge.dim() == 1 && ridge.size(0) == factor.size(0) && ridge.is_contiguous() &&
                  ridge.scalar_type() == at::kDouble,
              "ridge is ", ridge.scalar_type(), " of shape ", ridge.sizes(),
              ". Must be contiguous float64 of shape [", factor.size(0), "].");
  TORCH_CHECK(p >= 1, "Invalid p=", p, ". Must be >= 1.");
  const auto steps = minimax_steps(schedule);
  if (factor.numel() == 0) return;
  const at::Tensor packed = factor.contiguous();
  with_flat(factor, [&](auto flat) {
    using Flat = decltype(flat);
    cpu::minimax_root(pointer<Flat>(root), pointer<double>(ridge), const_pointer<Flat>(packed),
                      factor.size(0), factor.size(1), p, eps, relative_eps, steps);
  });
}

void eigh_(const at::Tensor& values, const at::Tensor& vectors, const at::Tensor& stack) {
  TORCH_CHECK(stack.dim() == 3 && stack.size(1) == stack.size(2), "stack has shape ",
              stack.sizes(), ". Must be [B, n, n].");
  TORCH_CHECK(values.sizes() == stack.sizes().slice(0, 2), "values has shape ", values.sizes(),
              ". Must be ", stack.sizes().slice(0, 2), ".");
  TORCH_CHECK(vectors.sizes() == stack.sizes(), "vectors has shape ", vectors.sizes(),
              ". Must be ", stack.sizes(), ".");
  if (stack.numel() == 0) return;
  cpu::eigh(values, vectors, stack);
}

}  // namespace
}  // namespace shampoo

TORCH_LIBRARY_IMPL(shampoo, CPU, m) {
  m.impl("gather_blocks_", &shampoo::gather_blocks_);
  m.impl("graft_moments_", &shampoo::graft_moments_);
  m.impl("graft_scale_", &shampoo::graft_scale_);
  m.impl("magnitudes_", &shampoo::magnitudes_);
  m.impl("gram_ema_", &shampoo::gram_ema_);
  m.impl("precondition_", &shampoo::precondition_);
  m.impl("eigh_", &shampoo::eigh_);
  m.impl("minimax_root_", &shampoo::minimax_root_);
  m.impl("update_blocks_", &shampoo::update_blocks_);
  m.impl("gather_blocks_.Tensor", &shampoo::gather_blocks_live_);
  m.impl("graft_moments_.Tensor", &shampoo::graft_moments_live_);
  m.impl("graft_scale_.Tensor", &shampoo::graft_scale_live_);
  m.impl("gram_ema_.Tensor", &shampoo::gram_ema_live_);
  m.impl("update_blocks_.Tensor", &shampoo::update_blocks_live_);
}
