// Elements of the dtypes of parameters, to and from float or double, in loops that vectorise.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/dtypes.h"
#include "common/tiles.h"

namespace shampoo::cpu {

using shampoo::widen;

inline float widen(Half value) {
#ifdef __F16C__
  return _cvtsh_ss(value.bits);
#else
  return c10::detail::fp16_ieee_to_fp32_value(value.bits);
#endif
}

inline Half narrow(float value) {
#ifdef __F16C__
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  return {c10::detail::fp16_ieee_from_fp32_value(value)};
#endif
}

template <class Wide>
void load_run(Wide* to, const BFloat16* from, int64_t stride, int64_t count) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
}

template <class Wide>
void load_run(Wide* to, const Half* from, int64_t stride, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__  // gcc 12 does not vectorise these conversions
  if constexpr (sizeof(Wide) == sizeof(float))
    if (stride == 1)
      for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                     reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = widen(from[i * stride]);
}

template <class Wide, class From>
void load_run(Wide* to, const From* from, int64_t stride, int64_t count) {
  if (stride == 1 && sizeof(Wide) == sizeof(From))
    std::memcpy(to, from, count * sizeof(Wide));
  else if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Wide>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Wide>(from[i * stride]);
}

template <class Wide>
void store_run(BFloat16* to, const Wide* from, int64_t stride, int64_t count) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = round_to_nearest(static_cast<float>(from[i]));
  else
    for (int64_t i = 0; i < count; ++i)
      to[i * stride] = round_to_nearest(static_cast<float>(from[i]));
}

template <class Wide>
void store_run(Half* to, const Wide* from, int64_t stride, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (sizeof(Wide) == sizeof(float))
    if (stride == 1)
      for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) to[i * stride] = narrow(static_cast<float>(from[i]));
}

template <class Wide, class To>
void store_run(To* to, const Wide* from, int64_t stride, int64_t count) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<To>(from[i]);
}

// Calls `use(pointer)` with the elements of a source under their own type.
template <class Use>
void with_type(const Source& source, int64_t element, const Use& use) {
  char* data = source.data + element * itemsize(source.dtype);
  switch (source.dtype) {
    case Dtype::kHalf:
      return use(reinterpret_cast<Half*>(data));
    case Dtype::kBFloat16:
      return use(reinterpret_cast<BFloat16*>(data));
    case Dtype::kFloat:
      return use(reinterpret_cast<float*>(data));
    case Dtype::kDouble:
      return use(reinterpret_cast<double*>(data));
  }
}

}  // namespace shampoo::cpu
