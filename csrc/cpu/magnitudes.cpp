// Replaces _foreach_norm(ord=inf), which on a CPU takes several times as long as reading once.
#include "cpu/magnitudes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "cpu/absmax.h"
#include "cpu/elements.h"
#include "cpu/grain.h"
#include "cpu/visit_tiles.h"

namespace shampoo::cpu {
namespace {

double absmax(const Half* from, int64_t stride, int64_t count) {
  return widen(Half{absmax_bits<uint16_t>(from, stride, count)});
}
double absmax(const BFloat16* from, int64_t stride, int64_t count) {
  return widen(BFloat16{absmax_bits<uint16_t>(from, stride, count)});
}

// The larger of two magnitudes, NaN above all.
void raise(std::atomic<double>& largest, double value) {
  double before = largest.load(std::memory_order_relaxed);
  while (before == before && !(value <= before) &&
         !largest.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

void magnitudes(double* out, const std::vector<Source>& sources) {
  std::vector<int64_t> first{0};  // a source: the ordinal of its first element; then the total
  for (const Source& source : sources) first.push_back(first.back() + source.numel());
  std::vector<std::atomic<double>> largest(sources.size());
  for (auto& value : largest) value.store(0.0, std::memory_order_relaxed);
  at::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t s = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; s < sources.size() && first[s] < end; ++s) {
      const int64_t from = std::max(begin, first[s]), to = std::min(end, first[s + 1]);
      if (from >= to) continue;
      visit_pieces(sources[s], from - first[s], 0, to - from,
                   [&](int64_t element, int64_t stride, int64_t /*flat*/, int64_t count) {
                     with_type(sources[s], element, [&](const auto* values) {
                       raise(largest[s], absmax(values, stride, count));
                     });
                   });
    }
  });
  std::copy(largest.begin(), largest.end(), out);
}

}  // namespace shampoo::cpu
