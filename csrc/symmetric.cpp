// Replaces bmm, baddbmm and the addition to the diagonal: a product of symmetric matrices that commute
// is symmetric, so half of it is enough, and the polynomial costs no pass of its own.
#include "symmetric.h"

#include "panels.h"

namespace shampoo {

template <class Flat>
void symmetric_product(Flat* out, const Flat* left, const Flat* right, const Flat* addend,
                       int64_t count, int64_t size, const Polynomial<Flat>& polynomial) {
  constexpr int64_t width = kWidth<Flat>;
  const Unfolding shape{size, size, 1};  // rows of a symmetric matrix are its columns
  const int64_t panels = (size + width - 1) / width, stride = kDepth<Flat> * width;
  const bool is_square = left == right;
  const auto [alpha, beta, diagonal] = polynomial;
  for_matrices<Flat>(
      count, panels, (is_square ? 1 : 2) * panels * stride,
      [&, alpha = alpha, beta = beta, diagonal = diagonal](int64_t b, Flat* packed,
                                                           const auto& for_panels) {
        const int64_t at = b * size * size;
        Flat* rows = packed;
        Flat* columns = is_square ? packed : packed + panels * stride;
        for (int64_t start = 0; start < size; start += kDepth<Flat>) {
          const int64_t depth = std::min(kDepth<Flat>, size - start);
          for_panels([&](int64_t panel) {
            pack(rows + panel * stride, left + at, shape, panel * width, start, depth);
            if (!is_square)
              pack(columns + panel * stride, right + at, shape, panel * width, start, depth);
          });
          for_panels([&](int64_t panel) {
            for_upper_tiles(rows, columns, panel, size, depth, out + at, start + depth == size,
                            [&](int64_t i, int64_t j, Flat sum) {
                              const int64_t here = at + i * size + j;
                              Flat base = out[here];
                              if (start == 0) {
                                base = addend ? beta * addend[here] : Flat(0);
                                if (i == j) base += diagonal;
                              }
                              return out[here] = fused(alpha, sum, base);
                            });
          });
        }
      });
}

template void symmetric_product(float*, const float*, const float*, const float*, int64_t, int64_t,
                                const Polynomial<float>&);
template void symmetric_product(double*, const double*, const double*, const double*, int64_t,
                                int64_t, const Polynomial<double>&);

}  // namespace shampoo
