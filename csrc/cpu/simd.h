// Vectors of the widest registers that the file is compiled for. Sums are fused multiply-adds,
// written out because contraction is off everywhere else.
#pragma once

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#include "common/host_device.h"

namespace shampoo::cpu {

using shampoo::fused;  // of vectors of one

#if defined(__AVX512F__)

constexpr int kVectorBytes = 64;

inline __m512 load(const float* at) { return _mm512_loadu_ps(at); }
inline __m512d load(const double* at) { return _mm512_loadu_pd(at); }
inline void store(float* at, __m512 v) { _mm512_storeu_ps(at, v); }
inline void store(double* at, __m512d v) { _mm512_storeu_pd(at, v); }
inline __m512 fill(float x) { return _mm512_set1_ps(x); }
inline __m512d fill(double x) { return _mm512_set1_pd(x); }
inline __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kVectorBytes = 32;

inline __m256 load(const float* at) { return _mm256_loadu_ps(at); }
inline __m256d load(const double* at) { return _mm256_loadu_pd(at); }
inline void store(float* at, __m256 v) { _mm256_storeu_ps(at, v); }
inline void store(double* at, __m256d v) { _mm256_storeu_pd(at, v); }
inline __m256 fill(float x) { return _mm256_set1_ps(x); }
inline __m256d fill(double x) { return _mm256_set1_pd(x); }
inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

#else

constexpr int kVectorBytes = 8;  // one double; two floats are two vectors of one

inline float load(const float* at) { return *at; }
inline double load(const double* at) { return *at; }
inline void store(float* at, float v) { *at = v; }
inline void store(double* at, double v) { *at = v; }
inline float fill(float x) { return x; }
inline double fill(double x) { return x; }

#endif

template <class Flat>
using Vector = decltype(fill(Flat()));

template <class Flat>
constexpr int kLanesOf = kVectorBytes / sizeof(Flat);
#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__FMA__))
template <>
constexpr int kLanesOf<float> = 1;
#endif

}  // namespace shampoo::cpu
