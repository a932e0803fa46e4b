// Replaces the chain of batched products of kernels/reference/minimax.py for small matrices: one block keeps
// one matrix in shared memory and registers for the whole iteration.
//
// T = c0 I + c1 M + c2 Q^2, Q = M or M^2 + b M + d I;  X <- X T;  M <- T^p M. M and T, or Q, lie in
// shared memory as planes of halves (split_fp16.h); X stays in registers, 16 rows a warp, where the
// accumulators of one product are the operand of the next. All products but X T and the first update of
// M compute one of (i, j) and (j, i) and mirror it. It loses to one product a launch as soon as n
// exceeds what a block can hold.
#include <cmath>

#include "cuda/launch.h"
#include "cuda/split_fp16.h"

namespace shampoo::cuda {
namespace {

// As many blocks on a multiprocessor as shared memory admits, if registers do not spill.
template <int kSize>
constexpr int kBlocksPerProcessor = kSize == 32 ? 8 : kSize == 64 ? 3 : 1;

// Of T^p M: p = 2^squarings * applications, so that no product but T T needs a third matrix.
struct Power {
  int p, squarings, applications;
};

template <int kSize>
struct Iteration {
  static constexpr int kStrips = kSize / kTile, kStride = SplitMatrix<kSize>::kStride;
  static constexpr float kUnit = 4096.0f;  // split_scale(1)
  using Own = Accumulators<kOwnTiles<kSize>>;
  using Strip = Accumulators<kStrips>;

  SplitMatrix<kSize> M;  // or R = I - M
  SplitMatrix<kSize> T;  // or its powers
  Strip X;
  float x_bound = 1.0f;
  double* scratch;  // [2, kStrips]

  static constexpr size_t kBytes =
      2 * SplitMatrix<kSize>::kBytes + 2 * kStrips * sizeof(double);

  __device__ __forceinline__ explicit Iteration(char* memory)
      : M{reinterpret_cast<uint16_t*>(memory)},
        T{reinterpret_cast<uint16_t*>(memory + SplitMatrix<kSize>::kBytes)},
        scratch(reinterpret_cast<double*>(memory + 2 * SplitMatrix<kSize>::kBytes)) {}

  // Calls `use(i, j)` for the entries with i <= j, a row at a time.
  template <class Use>
  __device__ __forceinline__ void for_upper(const Use& use) const {
    for (int i = strip(); i < kSize; i += kStrips)
      for (int j = i + lane(); j < kSize; j += 32) use(i, j);
  }

  // The sum, or the largest, of what the threads bring: the same bits whatever else is running.
  template <class Join>
  __device__ __forceinline__ double over_block(double value, double* slots, const Join& join) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if (lane() == 0) slots[strip()] = value;
    __syncthreads();
    value = slots[0];
    for (int i = 1; i < kStrips; ++i) value = join(value, slots[i]);
    return value;
  }

  // out = scale(X) scale(T) X T
  template <int kProducts>
  __device__ __forceinline__ void multiply_rows(Strip& out, float x_scale) const {
    set_zero(out);
#pragma unroll
    for (int k = 0; k < kStrips; ++k) {
      // Two neighbouring 16 x 8 accumulators are the fragment A of one 16 x 16 tile.
      uint32_t a_hi[4], a_lo[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = x_scale * X[k][i / 2][i % 2 * 2];
        const float second = x_scale * X[k][i / 2][i % 2 * 2 + 1];
        a_hi[i] = pack_halves(first, second);
        if constexpr (kProducts == 3)
          a_lo[i] = pack_halves(first - half_to_float(static_cast<uint16_t>(a_hi[i])),
                                second - half_to_float(static_cast<uint16_t>(a_hi[i] >> 16)));
      }
#pragma unroll
      for (int c = 0; c < kStrips; ++c) {
        uint32_t b_hi[4], b_lo[4] = {};
        T.load_b(b_hi, 0, kTile * c, kTile * k);
        if constexpr (kProducts == 3) T.load_b(b_lo, 1, kTile * c, kTile * k);
        multiply_tile<kProducts>(out[c], a_hi, a_lo, b_hi, b_lo);
      }
    }
  }

  // X <- t X + X D, D in the place of T
  template <int kProducts>
  __device__ __forceinline__ void move_root(float t, float bound) {
    const float x_scale = split_scale(x_bound), scale = 1.0f / (x_scale * split_scale(bound));
    Strip product;
    multiply_rows<kProducts>(product, x_scale);
#pragma unroll
    for (int c = 0; c < kStrips; ++c)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float& x = X[c][n / 4][n % 4];
        x = (t == 0.0f ? 0.0f : t * x) + scale * product[c][n / 4][n % 4];
      }
    x_bound *= bound;
  }

  // M <- (T M + M T) / 2, not mirrored: this product decides the accuracy of the root.
  __device__ __forceinline__ void average_update(float scale) {
    constexpr int kHalf = kStrips / 2;
    Accumulators<kHalf> halves[2];
    multiply<kSize, 3, kHalf>(halves[0], T, M, 0);
    multiply<kSize, 3, kHalf>(halves[1], T, M, kHalf);
    __syncthreads();
    float* product = M.as_floats();
    Own own;
#pragma unroll
    for (int d = 0; d < kStrips; ++d)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float value = halves[d / kHalf][d % kHalf][n / 4][n % 4];
        const int i = kTile * strip() + row_of(n % 4);
        const int j = tile_column<kSize>(d) + n / 4 * 8 + column_of(n % 4);
        product[i * kStride + j] = value;
        if (d <= kHalf) own[d][n / 4][n % 4] = value;
      }
    __syncthreads();
#pragma unroll
    for (int d = 0; d <= kHalf; ++d)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int i = kTile * strip() + row_of(n % 4);
        const int j = tile_column<kSize>(d) + n / 4 * 8 + column_of(n % 4);
        own[d][n / 4][n % 4] = 0.5f * (own[d][n / 4][n % 4] + product[j * kStride + i]);
      }
    __syncthreads();
    for_own_entries<kSize>(own, [&](int i, int j, float sum) { M.store(i, j, scale * sum); });
    __syncthreads();
  }

  // T <- T^(2^squarings), whose entries are at most `bound`, in and out.
  __device__ __forceinline__ void square(int squarings, float& bound) {
#pragma unroll 1
    for (int s = 0; s < squarings; ++s) {
      const float from = split_scale(bound), scale = split_scale(bound * bound) / (from * from);
      Own own;
      multiply<kSize, 3>(own, T, T);
      __syncthreads();
      for_own_entries<kSize>(own, [&](int i, int j, float sum) { T.store(i, j, scale * sum); });
      __syncthreads();
      bound *= bound;
    }
  }

  // T <- a M^2 + b M + d I, which is at most `bound`.
  template <int kProducts>
  __device__ __forceinline__ void quadratic(float a, float b, float d, float bound) {
    const float scale = split_scale(bound);
    Own own = {};
    if (a != 0.0f) multiply<kSize, kProducts>(own, M, M);
    for_own_entries<kSize>(own, [&](int i, int j, float sum) {
      const float square = sum / (kUnit * kUnit), m = M.scaled(i, j) / kUnit;
      T.store(i, j, scale * ((i == j ? d : 0.0f) + b * m + a * square));
    });
    __syncthreads();
  }

  // T <- c2 Q^2 + c1 M + c0 I, with Q in the place of T, at most `from`, and T at most `bound`.
  __device__ __forceinline__ void quartic(const MinimaxStep<float>& step, float from, float bound) {
    const float q_scale = split_scale(from), scale = split_scale(bound);
    Own own;
    multiply<kSize, 3>(own, T, T);
    __syncthreads();
    for_own_entries<kSize>(own, [&](int i, int j, float sum) {
      const float square = sum / (q_scale * q_scale), m = M.scaled(i, j) / kUnit;
      T.store(i, j, scale * ((i == j ? step.c0 : 0.0f) + step.c1 * m + step.c2 * square));
    });
    __syncthreads();
  }

  // The largest of a quadratic m^2 + b m + d on [0, 1], which has its bend inside.
  static __device__ __forceinline__ float most_of(float b, float d) {
    return fmaxf(fmaxf(fabsf(d), fabsf(1.0f + b + d)), fabsf(d - 0.25f * b * b));
  }

  // T of one step
  __device__ __forceinline__ void polynomial(const MinimaxStep<float>& step, float bound) {
    if (!step.is_quartic()) return quadratic<3>(step.c2, step.c1, step.c0, bound);
    const float most = most_of(step.b, step.d);
    quadratic<3>(1.0f, step.b, step.d, most);
    quartic(step, most, bound);
  }

  // X <- X T, and unless it is the last step M <- T^p M. In step 0 X and T are given.
  __device__ __forceinline__ void growth_step(int k, const MinimaxStep<float>& step, bool last,
                                              Power power) {
    float bound = step.at(0.0f);
    if (k > 0) {
      polynomial(step, bound);
      move_root<3>(0.0f, bound);
    }
    if (last) return;
    square(power.squarings, bound);
    const float scale = 1.0f / split_scale(bound);
#pragma unroll 1
    for (int a = 0; a < power.applications; ++a) {
      if (k == 0) {
        average_update(scale);
        continue;
      }
      Own own;
      multiply<kSize, 3>(own, T, M);
      __syncthreads();
      for_own_entries<kSize>(own, [&](int i, int j, float sum) { M.store(i, j, scale * sum); });
      __syncthreads();
    }
  }

  // The same of degree 2 by R = I - M and D = T - t I, small at the end: single products suffice.
  __device__ __forceinline__ void residual_step(const MinimaxStep<float>& step, bool last,
                                                Power power) {
    const float t = step.at(1.0f), top = step.at(0.0f), d_scale = split_scale(top);
    quadratic<1>(step.c2, -(step.c1 + 2.0f * step.c2), 0.0f, top);
    move_root<1>(t, top);
    if (last) return;
    Own own;
    // F = D / t, and (I + F)^2 - I = 2 F + F F
    float bound = fmaxf(1.0f, top / t), scale = d_scale * t, t_power = t;
#pragma unroll 1
    for (int s = 0; s < power.squarings; ++s) {
      const float to = split_scale(3.0f * bound * bound);
      multiply<kSize, 1>(own, T, T);
      __syncthreads();
      for_own_entries<kSize>(own, [&](int i, int j, float sum) {
        T.store(i, j, to * (2.0f * (T.scaled(i, j) / scale) + sum / (scale * scale)));
      });
      __syncthreads();
      bound *= bound;
      t_power *= t_power;
      scale = to;
    }
    // M <- t (I + F) M:  R <- (1 - t) I + t (R - F + F R)
#pragma unroll 1
    for (int a = 0; a < power.applications; ++a) {
      multiply<kSize, 1>(own, T, M);
      __syncthreads();
      for_own_entries<kSize>(own, [&](int i, int j, float sum) {
        const float r = M.scaled(i, j) / kUnit - T.scaled(i, j) / scale + sum / (kUnit * scale);
        M.store(i, j, kUnit * ((i == j ? 1.0f - t_power : 0.0f) + t_power * r));
      });
      __syncthreads();
    }
  }

  __device__ void run(float* root, double* ridge, const float* factor, int n, Power power,
                      double eps, double relative_eps, const MinimaxSchedule& schedule) {
    const auto entry = [&](int i, int j) {
      return j < n ? factor[static_cast<int64_t>(i) * n + j] : 0.0f;
    };
    // Neither A^2 nor its norm can overflow after a division by a power of two.
    float largest = 0.0f;
    for_upper([&](int i, int j) { largest = fmaxf(largest, fabsf(entry(i, j))); });
    largest = static_cast<float>(
        over_block(largest, scratch, [](double a, double b) { return fmax(a, b); }));
    const int exponent = largest > 0.0f ? ilogb(static_cast<double>(largest)) : 0;
    const double unit = ldexp(1.0, -exponent);
    const auto scaled_entry = [&](int i, int j) {
      return static_cast<float>(unit * (i < j ? entry(i, j) : entry(j, i)));
    };
    const float s_scale = split_scale(2.0f);
    for_upper([&](int i, int j) { M.store(i, j, s_scale * scaled_entry(i, j)); });
    __syncthreads();

    Own own;
    multiply<kSize, 3>(own, M, M);
    double sum_of_squares = 0.0;
    for_own_entries<kSize>(own, [&](int i, int j, float sum) {
      const double square = sum / (s_scale * s_scale);
      sum_of_squares += (i == j ? 1.0 : 2.0) * square * square;
    });
    sum_of_squares = over_block(sum_of_squares, scratch + kStrips,
                                [](double a, double b) { return a + b; });
    const double norm = sqrt(sqrt(sum_of_squares));
    const double absolute = eps * unit, relative = relative_eps * norm;
    const double rho = absolute > relative ? absolute : relative;  // NaN if the norm is
    const double bound = norm + rho;
    const auto inverse = static_cast<float>(1.0 / bound), low = static_cast<float>(rho / bound);

    // Step 0, written in S and S^2:  M = S / bound + low I
    const MinimaxStep<float>& first = schedule.steps[0];
    const bool is_quartic = first.is_quartic();  // then T is its Q at first
    const float most = most_of(first.b, first.d);
    const float c0 = is_quartic ? first.d : first.c0;
    const float c1 = is_quartic ? first.b : first.c1, c2 = is_quartic ? 1.0f : first.c2;
    x_bound = first.at(0.0f);
    const float start_scale = split_scale(is_quartic ? most : x_bound), t_scale = split_scale(x_bound);
    for_own_entries<kSize>(own, [&](int i, int j, float sum) {
      const float s = inverse * scaled_entry(i, j), square = sum / (s_scale * s_scale);
      const float m = s + (i == j ? low : 0.0f);
      const float m2 = inverse * inverse * square + 2.0f * low * s + (i == j ? low * low : 0.0f);
      T.store(i, j, start_scale * ((i == j ? c0 : 0.0f) + c1 * m + c2 * m2));
      M.store(i, j, kUnit * m);
    });
    __syncthreads();
    if (is_quartic) quartic(first, most, x_bound);
#pragma unroll
    for (int d = 0; d < kStrips; ++d)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        X[d][e / 4][e % 4] = T.scaled(kTile * strip() + row_of(e % 4),
                                      kTile * d + e / 4 * 8 + column_of(e % 4)) /
                             t_scale;
    growth_step(0, first, schedule.count == 1, power);

    const int first_residual = schedule.count - schedule.residual;
#pragma unroll 1
    for (int k = 1; k < first_residual; ++k)
      growth_step(k, schedule.steps[k], k == schedule.count - 1, power);
    if (first_residual < schedule.count) {
      for_own_entries<kSize>(own, [&](int i, int j, float) {
        M.store(i, j, (i == j ? kUnit : 0.0f) - M.scaled(i, j));
      });
      __syncthreads();
    }
#pragma unroll 1
    for (int k = first_residual; k < schedule.count; ++k)
      residual_step(schedule.steps[k], k == schedule.count - 1, power);

    float* rows = M.as_floats();
#pragma unroll
    for (int d = 0; d < kStrips; ++d)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        rows[(kTile * strip() + row_of(e % 4)) * kStride + kTile * d + e / 4 * 8 +
             column_of(e % 4)] = X[d][e / 4][e % 4];
    __syncthreads();
    const auto scale = static_cast<float>(0.5 * pow(ldexp(bound, exponent), -1.0 / power.p));
    for (int i = strip(); i < n; i += kStrips)
      for (int j = lane(); j < n; j += 32)
        root[static_cast<int64_t>(i) * n + j] =
            scale * (rows[i * kStride + j] + rows[j * kStride + i]);
    if (threadIdx.x == 0) *ridge = ldexp(rho, exponent);
  }
};

// What a block may have without asking, on sm_86, sm_89 and sm_120, and on sm_80.
static_assert(Iteration<64>::kBytes <= 48 << 10 && Iteration<96>::kBytes <= 99 << 10 &&
              Iteration<128>::kBytes <= 163 << 10);

template <int kSize>
__global__ void __launch_bounds__(2 * kSize, kBlocksPerProcessor<kSize>)
    minimax_small_root_kernel(float* root, double* ridge, const float* factor, int n, Power power,
                              double eps, double relative_eps,
                              const __grid_constant__ MinimaxSchedule schedule) {
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * n * n;
  Iteration<kSize> iterate(shared_memory());
  iterate.run(root + matrix, ridge + blockIdx.x, factor + matrix, n, power, eps, relative_eps,
              schedule);
}

}  // namespace

void minimax_small_root(float* root, double* ridge, const float* factor, int64_t n, int64_t batch,
                        int p, double eps, double relative_eps, const MinimaxSchedule& schedule,
                        Stream stream) {
  if (batch == 0 || n == 0) return;
  Power power{p, 0, p};
  for (; power.applications % 2 == 0; power.applications /= 2) ++power.squarings;
  const auto start = [&](auto kernel, int size, size_t bytes) {
    launch(kernel, static_cast<unsigned>(batch), 2 * size, bytes, stream, root, ridge, factor,
           static_cast<int>(n), power, eps, relative_eps, schedule);
  };
  if (n <= 32) return start(minimax_small_root_kernel<32>, 32, Iteration<32>::kBytes);
  if (n <= 64) return start(minimax_small_root_kernel<64>, 64, Iteration<64>::kBytes);
  if (n <= 96) return start(minimax_small_root_kernel<96>, 96, Iteration<96>::kBytes);
  return start(minimax_small_root_kernel<128>, 128, Iteration<128>::kBytes);
}

}  // namespace shampoo::cuda
