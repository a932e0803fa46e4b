// Checks the arguments of every op that csrc/ has CUDA kernels for, and starts those on the current
// stream of the tensors' device. Built for a torch with CUDA only.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>

#include "common/arguments.h"
#include "cuda/launch.h"

namespace shampoo {
namespace {

// Makes the device of a tensor the current one, for as long as this lives.
struct OnDeviceOf {
  c10::cuda::CUDAGuard guard;
  cuda::Stream stream;

  explicit OnDeviceOf(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
};

// Numbers of the host go into the arguments of a kernel, those on the device are read by it.
Number number_of(const char*, double number, const at::Tensor&) { return number; }
Number number_of(const char* name, const at::Tensor& number, const at::Tensor& beside) {
  check_number(name, number, beside.device());
  return Number(static_cast<const double*>(number.const_data_ptr()));
}

// The same for numbers of which each of some blocks may have its own.
Number numbers_of(const char*, double number, int64_t, const at::Tensor&) { return number; }
Number numbers_of(const char* name, const at::Tensor& number, int64_t blocks,
                  const at::Tensor& beside) {
  check_numbers(name, number, blocks, beside.device());
  return Number(static_cast<const double*>(number.const_data_ptr()), number.dim() == 1);
}

Number numbers_of(const char* name, const std::optional<at::Tensor>& number, int64_t blocks,
                  const at::Tensor& beside) {
  return number ? numbers_of(name, *number, blocks, beside) : Number(0.0);
}

// Every op twice, with `Scalar` a double or a tensor.
template <class Scalar>
using Given = std::conditional_t<std::is_same_v<Scalar, double>, double, const at::Tensor&>;
template <class Scalar>
using Optional = std::conditional_t<std::is_same_v<Scalar, double>, double,
                                    const std::optional<at::Tensor>&>;

template <class Scalar>
void gather_blocks_(const at::Tensor& out, at::TensorList sources, const at::Tensor& tiles,
                    Given<Scalar> alpha, bool accumulate) {
  check_flat("out", out, out.device());
  const auto table = tiles_of(tiles, "sources", sources, "out", out);
  if (table.empty()) return;
  const auto memory = sources_of("sources", sources, out.device());
  const Number factor = number_of("alpha", alpha, out);
  const OnDeviceOf current(out);
  with_flat(out, [&](auto flat) {
    cuda::gather_blocks(pointer<decltype(flat)>(out), memory, table, factor, accumulate,
                        current.stream);
  });
}

void magnitudes_(const at::Tensor& out, at::TensorList tensors) {
  if (tensors.empty()) return;
  check_magnitudes(out, tensors, tensors[0].device());
  const auto memory = sources_of("tensors", tensors, out.device());
  const OnDeviceOf current(out);
  cuda::magnitudes(pointer<double>(out), memory, current.stream);
}

template <class Scalar>
void graft_moments_(const std::optional<at::Tensor>& grad,
                    const std::optional<at::Tensor>& exp_avg,
                    const std::optional<at::Tensor>& exp_avg_sq,
                    const std::optional<at::Tensor>& direction, const at::Tensor& norm,
                    at::TensorList sources, const at::Tensor& tiles, Given<Scalar> alpha,
                    bool accumulate, Given<Scalar> beta1, Given<Scalar> correction1,
                    Given<Scalar> beta2, Given<Scalar> weight2, Given<Scalar> correction2,
                    double eps, bool normalized, const std::optional<at::Tensor>& ahead) {
  const auto table = moments_of(grad, exp_avg, exp_avg_sq, direction, norm, sources, tiles,
                                accumulate, ahead, norm.device());
  const int64_t blocks = blocks_of(table);
  const Number factor = number_of("alpha", alpha, norm);
  const MomentNumbers numbers{number_of("beta1", beta1, norm),
                              numbers_of("correction1", correction1, blocks, norm),
                              number_of("beta2", beta2, norm),
                              number_of("weight2", weight2, norm),
                              numbers_of("correction2", correction2, blocks, norm),
                              eps,
                              normalized};
  if constexpr (std::is_same_v<Scalar, double>)
    check_corrections(exp_avg, exp_avg_sq, {correction1}, {correction2}, 1);
  if (table.empty()) return;
  const auto memory = sources_of("sources", sources, norm.device());
  const OnDeviceOf current(norm);
  const at::Tensor scratch =
      at::empty({cuda::moments_scratch(table, numbers)}, norm.options().dtype(at::kDouble));
  with_flat(norm, [&](auto flat) {
    using Flat = decltype(flat);
    cuda::graft_moments(pointer<Flat>(grad), pointer<Flat>(exp_avg), pointer<Flat>(exp_avg_sq),
                        pointer<Flat>(direction), pointer<Flat>(norm), memory, table, factor,
                        accumulate, numbers, pointer<Flat>(ahead), pointer<double>(scratch),
                        current.stream);
  });
}

template <class Scalar>
void graft_scale_(const at::Tensor& scale, const at::Tensor& norm,
                  const std::optional<at::Tensor>& length, const std::optional<at::Tensor>& is_own,
                  Given<Scalar> correction, bool grafted, double most,
                  const std::optional<at::Tensor>& accepted) {
  check_graft_scale(scale, norm, length, is_own, accepted, scale.device());
  if constexpr (std::is_same_v<Scalar, double>)
    if (length) check_positive("correction", correction);
  if (scale.numel() == 0) return;
  const Number divisor = numbers_of("correction", correction, scale.numel(), scale);
  const OnDeviceOf current(scale);
  with_flat(scale, [&](auto flat) {
    using Flat = decltype(flat);
    cuda::graft_scale(GraftScale<Flat>{pointer<Flat>(scale), const_pointer<Flat>(norm),
                                       const_pointer<Flat>(length), const_pointer<bool>(is_own),
                                       const_pointer<bool>(accepted), divisor, grafted, most},
                      scale.numel(), current.stream);
  });
}

template <class Scalar>
void update_blocks_(at::TensorList params, const std::optional<at::Tensor>& momentum,
                    const at::Tensor& direction, const at::Tensor& scale, const at::Tensor& tiles,
                    Given<Scalar> lr, Given<Scalar> weight_decay, Given<Scalar> mu, bool nesterov,
                    std::optional<int64_t> seed, Optional<Scalar> step) {
  check_flat("direction", direction, direction.device());
  check_same("scale", scale, "direction", direction);
  const auto table = tiles_of(tiles, "params", params, "direction", direction);
  if (table.empty()) return;
  check_update(momentum, direction, scale, table);
  const auto memory = sources_of("params", params, direction.device());
  const UpdateNumbers numbers{number_of("lr", lr, direction),
                        number_of("weight_decay", weight_decay, direction),
                        number_of("mu", mu, direction), nesterov};
  const Rounding rounding{seed.has_value(), static_cast<uint64_t>(seed.value_or(0)),
                                numbers_of("step", step, blocks_of(table), direction)};
  const OnDeviceOf current(direction);
  with_flat(direction, [&](auto flat) {
    using Flat = decltype(flat);
    cuda::update_blocks(memory, pointer<Flat>(momentum), const_pointer<Flat>(direction),
                        const_pointer<Flat>(scale), table, numbers, rounding, current.stream);
  });
}

void minimax_small_root_(const at::Tensor& root, const at::Tensor& ridge, const at::Tensor& factor,
                         int64_t p, double eps, double relative_eps,
                         at::ArrayRef<double> coefficients) {
  const int64_t n = factor.dim() == 3 ? factor.size(2) : -1;
  TORCH_CHECK(n >= 0 && factor.size(1) == n && n <= cuda::kMaxRootSize, "factor has shape ",
              factor.sizes(), ". Must be [B, n, n] with n <= ", cuda::kMaxRootSize, ".");
  TORCH_CHECK(root.sizes() == factor.sizes() && ridge.dim() == 1 &&
                  ridge.size(0) == factor.size(0),
              "root and ridge have shapes ", root.sizes(), " and ", ridge.sizes(), ". Must be ",
              factor.sizes(), " and [", factor.size(0), "].");
  const auto check = [&](const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
    TORCH_CHECK(tensor.device() == factor.device() && tensor.scalar_type() == dtype &&
                    tensor.is_contiguous(),
                name, " is ", tensor.scalar_type(), " on ", tensor.device(), " with strides ",
                tensor.strides(), ". Must be ", dtype, " on ", factor.device(),
                " and contiguous.");
  };
  check("root", root, at::kFloat);
  check("ridge", ridge, at::kDouble);
  check("factor", factor, at::kFloat);
  constexpr int kMaxPower = std::numeric_limits<int>::max();
  TORCH_CHECK(2 <= p && p <= kMaxPower, "Invalid p=", p, ". Must be >= 2 and <= ", kMaxPower, ".");
  const auto steps = minimax_steps(coefficients);
  constexpr size_t kMaxSteps = cuda::MinimaxSchedule::kMaxSteps;
  TORCH_CHECK(steps.size() <= kMaxSteps, "schedule has ", steps.size(), " steps. Must have at most ",
              kMaxSteps, ".");
  // As many steps in half precision as cost little accuracy: as residual_steps of
  // kernels/triton/minimax_program.py.
  const auto count = static_cast<int32_t>(steps.size());
  int32_t residual = 0;
  while (residual < std::min(p >= 4 ? 2 : 1, count - 1) &&
         !steps[count - 1 - residual].is_quartic())
    ++residual;
  cuda::MinimaxSchedule schedule{count, residual, {}};
  for (size_t k = 0; k < steps.size(); ++k) {
    const auto& [c0, c1, c2, b, d] = steps[k];
    schedule.steps[k] = {static_cast<float>(c0), static_cast<float>(c1), static_cast<float>(c2),
                        static_cast<float>(b), static_cast<float>(d)};
  }
  if (factor.numel() == 0) return;
  const OnDeviceOf current(factor);
  cuda::minimax_small_root(pointer<float>(root), pointer<double>(ridge),
                           const_pointer<float>(factor), n, factor.size(0), static_cast<int>(p),
                           eps, relative_eps, schedule, current.stream);
}

}  // namespace
}  // namespace shampoo

// Names beside those of the ops: shampoo/ops/registry.py decides which calls come here.
TORCH_LIBRARY_IMPL(shampoo, CUDA, m) {
  m.impl("cuda_gather_blocks_", &shampoo::gather_blocks_<double>);
  m.impl("cuda_gather_blocks_.Tensor", &shampoo::gather_blocks_<at::Tensor>);
  m.impl("cuda_magnitudes_", &shampoo::magnitudes_);
  m.impl("cuda_graft_moments_", &shampoo::graft_moments_<double>);
  m.impl("cuda_graft_moments_.Tensor", &shampoo::graft_moments_<at::Tensor>);
  m.impl("cuda_graft_scale_", &shampoo::graft_scale_<double>);
  m.impl("cuda_graft_scale_.Tensor", &shampoo::graft_scale_<at::Tensor>);
  m.impl("cuda_update_blocks_", &shampoo::update_blocks_<double>);
  m.impl("cuda_update_blocks_.Tensor", &shampoo::update_blocks_<at::Tensor>);
  m.impl("cuda_minimax_small_root_", &shampoo::minimax_small_root_);
}
