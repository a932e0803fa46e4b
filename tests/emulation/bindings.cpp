// The launchers of csrc/launch.h, as built for the host, under Python: pointers are integers.
#include "launch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "emulation.h"

namespace shampoo::cuda {
namespace {

template <class Value>
Value* at(uintptr_t address) {
  return reinterpret_cast<Value*>(address);
}

void small_root_(uintptr_t root, uintptr_t ridge, uintptr_t factor, int64_t n, int64_t batch, int p,
                 double eps, double relative_eps,
                 const std::vector<std::tuple<float, float, float>>& coefficients, int residual) {
  RootSchedule schedule{static_cast<int32_t>(coefficients.size()), residual, {}};
  for (size_t k = 0; k < coefficients.size(); ++k) {
    float(&c)[3] = schedule.coefficients[k];
    std::tie(c[0], c[1], c[2]) = coefficients[k];
  }
  small_root(at<float>(root), at<double>(ridge), at<const float>(factor), n, batch, p, eps,
             relative_eps, schedule, nullptr);
}

}  // namespace

PYBIND11_MODULE(EMULATION_NAME, module) {
  module.def("set_order", [](bool backward) {
    emulation::order = backward ? emulation::Order::kBackward : emulation::Order::kForward;
  });
  module.def("small_root_", &small_root_);
}

}  // namespace shampoo::cuda
