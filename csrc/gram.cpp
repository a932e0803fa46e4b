// Replaces one baddbmm of an unfolded gradient with its own transpose: half the products, no unfolded
// copy, the moving average in the same pass. The result is bitwise symmetric.
#include "gram.h"

#include "panels.h"

namespace shampoo {

template <class Flat>
void gram_ema(Flat* factor, const Flat* grad, int64_t count, int64_t before, int64_t size,
              int64_t after, Flat beta, Flat weight) {
  const Unfolding shape{before, size, after};
  const auto layout = Layout<Flat>::rows(size);
  const int64_t panels = layout.count(), numel = before * size * after;
  const int64_t stride = kDepth<Flat> * kWidth<Flat>;
  for_matrices<Flat>(count, panels * stride, [&](int64_t b, Flat* packed,
                                                         const auto& for_panels) {
    Flat* matrix = factor + b * size * size;
    for (int64_t start = 0; start < shape.depth(); start += kDepth<Flat>) {
      const int64_t depth = std::min(kDepth<Flat>, shape.depth() - start);
      for_panels(panels, [&](int64_t panel) {
        pack(packed + panel * stride, grad + b * numel, shape, panel * kWidth<Flat>, start, depth);
      });
      const Operands<Flat> operands{packed, packed, stride, depth};
      const Polynomial<Flat> average{weight, matrix, start == 0 ? beta : Flat(1)};
      for_panels(panels, [&](int64_t panel) {
        upper_tiles(matrix, layout, panel, operands, average, start + depth == shape.depth());
      });
    }
  });
}

template void gram_ema(float*, const float*, int64_t, int64_t, int64_t, int64_t, float, float);
template void gram_ema(double*, const double*, int64_t, int64_t, int64_t, int64_t, double, double);

}  // namespace shampoo
