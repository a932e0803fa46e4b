// Replaces the chain of batched products: one matrix at a time, whose buffers stay in the cache, in
// panels from the first product to the last, half of every product, the polynomials in the pass that
// writes it.
#include "cpu/minimax.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include "cpu/absmax.h"
#include "cpu/for_matrices.h"
#include "cpu/symmetric_gemm.h"

namespace shampoo::cpu {
namespace {

// Of one matrix. M, X, T, the two operands of a power, or what T is a polynomial of, and what is being
// written.
constexpr int64_t kBuffers = 6;
// The operands and the result of the first update.
constexpr int64_t kWideBuffers = 3;

template <class Flat>
int64_t scratch_bytes(int64_t size) {
  return kBuffers * Layout<Flat>::panels(size).numel() * sizeof(Flat) +
         kWideBuffers * Layout<double>::panels(size).numel() * sizeof(double);
}

// All matrices of the iteration lie in panels. `for_panels(visit)` hands out the panels to threads.
template <class Flat, class ForPanels>
class Iteration {
 public:
  Iteration(std::byte* scratch, int64_t size, const ForPanels& for_panels)
      : layout_(Layout<Flat>::panels(size)),
        wide_(Layout<double>::panels(size)),
        for_panels_(for_panels),
        partial_(layout_.count()) {
    Flat* buffers = reinterpret_cast<Flat*>(scratch);
    for (int64_t i = 0; i < kBuffers; ++i) free_[i] = buffers + i * layout_.numel();
    double* wide = reinterpret_cast<double*>(buffers + kBuffers * layout_.numel());
    for (int64_t i = 0; i < kWideBuffers; ++i) wide_buffers_[i] = wide + i * wide_.numel();
  }

  void operator()(Flat* root, double& ridge, const Flat* factor, int64_t p, double eps,
                  double relative_eps, const std::vector<MinimaxStep<double>>& steps) {
    const double scale = power_of_two(absmax(factor, 1, layout_.size * layout_.size));
    Flat* S = take();  // neither its square nor the norm of that can overflow
    load_divided(S, factor, static_cast<Flat>(scale));
    Flat* X = product(S, S);
    const double norm = std::sqrt(frobenius(X));
    const double relative = relative_eps * norm, absolute = eps / scale;
    const double rho = absolute > relative ? absolute : relative;  // NaN if the norm is
    ridge = rho * scale;
    const double bound = norm + rho;  // >= lambda_max, so the spectrum of M lies in [low, 1]
    const double low = rho / bound;

    X = first_polynomial(X, S, steps[0], bound, low);
    Flat* M = steps.size() > 1 ? first_update(X, p, S, bound, low) : S;
    for (size_t k = 1; k < steps.size(); ++k) {
      Flat* T = polynomial(M, steps[k]);
      Flat* next = product(X, T);
      give(X);
      X = next;
      if (k + 1 < steps.size()) {
        Flat* P = power(T, p, false);
        next = product(P, M);
        give(M);
        M = next;
        if (P != T) give(P);
      }
      give(T);
    }
    store_scaled(root, X, static_cast<Flat>(std::pow(bound * scale, -1.0 / p)));
  }

 private:
  static double power_of_two(double largest) {
    return largest > 0 ? std::ldexp(1.0, std::ilogb(largest)) : 1.0;
  }

  Flat* take() { return free_[--available_]; }
  void give(Flat* spent) { free_[available_++] = spent; }

  Flat* product(const Flat* left, const Flat* right, bool both_orders = false,
                const Polynomial<Flat>& coefficients = {}) {
    Flat* out = take();
    const Operands<Flat> operands{left, right, layout_.panel, layout_.size, both_orders};
    for_panels_(layout_.count(), [&](int64_t panel) {
      upper_tiles(out, layout_, panel, operands, coefficients, true);
    });
    return out;
  }

  // (left right + right left) / 2
  Flat* average(const Flat* left, const Flat* right) {
    return product(left, right, true, {Flat(0.5)});
  }

  // T of step 0, from S^2, which is given up, and S:  M = S / bound + low I
  Flat* first_polynomial(Flat* X, const Flat* S, const MinimaxStep<double>& step, double bound,
                         double low) {
    const auto& [c0, c1, c2, b, d] = step;
    const double square = bound * bound;
    if (!step.is_quartic()) {
      combine(X, c2 / square, S, (c1 + 2 * c2 * low) / bound, c0 + c1 * low + c2 * low * low);
      return X;
    }
    combine(X, 1 / square, S, (b + 2 * low) / bound, d + b * low + low * low);
    Flat* T = product(X, X, false,
                      {static_cast<Flat>(c2), S, static_cast<Flat>(c1 / bound),
                       static_cast<Flat>(c0 + c1 * low)});
    give(X);
    return T;
  }

  // T of a later step: a new buffer.
  Flat* polynomial(Flat* M, const MinimaxStep<double>& step) {
    const Flat c0 = static_cast<Flat>(step.c0), c1 = static_cast<Flat>(step.c1),
               c2 = static_cast<Flat>(step.c2);
    if (c2 == 0) {
      Flat* T = take();
      std::fill_n(T, layout_.numel(), Flat(0));
      combine(T, 0.0, M, step.c1, step.c0);
      return T;
    }
    Flat* Q = M;
    if (step.is_quartic())
      Q = product(M, M, false, {Flat(1), M, static_cast<Flat>(step.b), static_cast<Flat>(step.d)});
    Flat* T = product(Q, Q, false, {c2, M, c1, c0});
    if (Q != M) give(Q);
    return T;
  }

  // T^p by binary powering: a new buffer, or T itself for p = 1. T is left as it is.
  Flat* power(Flat* T, int64_t p, bool is_first) {
    Flat *out = nullptr, *square = T;
    for (;; p >>= 1) {
      if (p & 1) {
        Flat* before = out;
        out = !before ? square : is_first ? average(before, square) : product(before, square);
        if (before && before != T) give(before);
      }
      if (p == 1) break;
      Flat* following = product(square, square);
      if (square != T && square != out) give(square);
      square = following;
    }
    if (square != T && square != out) give(square);
    return out;
  }

  // (T^p M + M T^p) / 2 with M = S / bound + low I, in float64. S is given up.
  Flat* first_update(Flat* T, int64_t p, Flat* S, double bound, double low) {
    Flat* P = power(T, p, true);
    const auto [wide_power, wide_matrix, wide_update] = wide_buffers_;
    widen(wide_power, P);
    widen(wide_matrix, S);
    const Operands<double> operands{wide_power, wide_matrix, wide_.panel, wide_.size, true};
    for_panels_(wide_.count(), [&, update = wide_update, addend = wide_power](int64_t panel) {
      upper_tiles(update, wide_, panel, operands, {0.5 / bound, addend, low}, true);
    });
    narrow(S, wide_update);
    if (P != T) give(P);
    return S;
  }

  void load_divided(Flat* to, const Flat* matrix, Flat scale) {
    for_panels_(layout_.count(), [&](int64_t panel) {
      Flat* at = to + panel * layout_.panel;
      pack(at, matrix, {layout_.size, layout_.size, 1}, panel * layout_.row, 0, layout_.size);
      for (int64_t i = 0; i < layout_.panel; ++i) at[i] /= scale;
    });
  }

  void store_scaled(Flat* matrix, const Flat* from, Flat scale) {
    for_panels_(layout_.count(), [&](int64_t panel) {
      const int64_t column = panel * layout_.row;
      const int64_t columns = std::min(layout_.row, layout_.size - column);
      for (int64_t i = 0; i < layout_.size; ++i) {
        const Flat* at = from + layout_.at(i, column);
        for (int64_t j = 0; j < columns; ++j) matrix[i * layout_.size + column + j] = scale * at[j];
      }
    });
  }

  // X <- a X + b S + d I
  void combine(Flat* X, double a, const Flat* S, double b, double d) {
    const Flat of_X = static_cast<Flat>(a), of_S = static_cast<Flat>(b);
    for_panels_(layout_.count(), [&](int64_t panel) {
      const int64_t start = panel * layout_.panel;
      for (int64_t i = start; i < start + layout_.panel; ++i) X[i] = of_X * X[i] + of_S * S[i];
      const int64_t column = panel * layout_.row;
      for (int64_t j = column; j < std::min(column + layout_.row, layout_.size); ++j)
        X[layout_.at(j, j)] += static_cast<Flat>(d);
    });
  }

  double frobenius(const Flat* X) {
    for_panels_(layout_.count(), [&](int64_t panel) {
      const Flat* at = X + panel * layout_.panel;
      double squares[kWidth<Flat>] = {}, sum = 0;
      for (int64_t i = 0; i < layout_.size; ++i, at += kWidth<Flat>)
        for (int64_t j = 0; j < kWidth<Flat>; ++j)
          squares[j] += static_cast<double>(at[j]) * static_cast<double>(at[j]);
      for (const double square : squares) sum += square;
      partial_[panel] = sum;
    });
    double sum = 0;
    for (const double part : partial_) sum += part;
    return std::sqrt(sum);
  }

  // Between the panels of the two dtypes.
  void widen(double* to, const Flat* from) {
    for_panels_(wide_.count(), [&](int64_t panel) {
      const int64_t column = panel * wide_.row;
      for (int64_t i = 0; i < wide_.size; ++i)
        std::copy_n(from + layout_.at(i, column), wide_.row, to + wide_.at(i, column));
    });
  }
  void narrow(Flat* to, const double* from) {
    for_panels_(wide_.count(), [&](int64_t panel) {
      const int64_t column = panel * wide_.row;
      for (int64_t i = 0; i < wide_.size; ++i)
        std::copy_n(from + wide_.at(i, column), wide_.row, to + layout_.at(i, column));
    });
  }

  const Layout<Flat> layout_;
  const Layout<double> wide_;
  const ForPanels& for_panels_;
  std::array<Flat*, kBuffers> free_;
  std::array<double*, kWideBuffers> wide_buffers_;
  int64_t available_ = kBuffers;
  std::vector<double> partial_;
};

}  // namespace

template <class Flat>
void minimax_root(Flat* root, double* ridge, const Flat* factor, int64_t count, int64_t size,
                  int64_t p, double eps, double relative_eps,
                  const std::vector<MinimaxStep<double>>& steps) {
  for_matrices<std::byte>(
      count, scratch_bytes<Flat>(size),
      [&](int64_t b, std::byte* scratch, const auto& for_panels) {
        const int64_t at = b * size * size;
        Iteration<Flat, std::decay_t<decltype(for_panels)>> iterate(scratch, size, for_panels);
        iterate(root + at, ridge[b], factor + at, p, eps, relative_eps, steps);
      });
}

template void minimax_root(float*, double*, const float*, int64_t, int64_t, int64_t, double, double,
                           const std::vector<MinimaxStep<double>>&);
template void minimax_root(double*, double*, const double*, int64_t, int64_t, int64_t, double,
                           double, const std::vector<MinimaxStep<double>>&);

}  // namespace shampoo::cpu
