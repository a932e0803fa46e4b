// Replaces _foreach_norm(ord=inf) and a stack of its results: one launch for some 280 tensors.
//
// A maximum does not ask in which order elements are read, so a tensor is read in the order of its
// memory: whatever is dense, transposed or channels_last included, is one run. Nor does it ask in
// which order maxima meet: the atomic one of all thread blocks is the same in every run.
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile_table.h"

namespace shampoo::cuda {
namespace {

using DoubleBits = unsigned long long;  // as atomicMax takes them

constexpr int kAxes = 4;                        // of a strip; what has more is cut into several,
constexpr int64_t kLongest = int64_t{1} << 24;  // and so are longer ones: Divisor ends at 2^31
constexpr uint32_t kRun = 32 * kThreads;        // elements of a strip that one thread block reads
constexpr uint32_t kVector = 16;                // bytes that a thread loads at once
constexpr uint32_t kWarps = kThreads / 32;

// A tensor, or a part of one.
struct Strip {
  char* data;
  int64_t stride[kAxes];  // the last axis is the innermost; those in front may have size 1
  Divisor size[kAxes];
  uint32_t numel;
  uint32_t first_chunk;
  uint32_t tensor;
  Dtype dtype;
  bool is_run;  // all its elements are neighbours

  __device__ __forceinline__ int64_t place(uint32_t at) const {
    int64_t element = 0;
#pragma unroll
    for (int axis = kAxes - 1; axis > 0; --axis) {
      const uint32_t outer = size[axis].divide(at);
      element += static_cast<int64_t>(at - outer * size[axis].divisor) * stride[axis];
      at = outer;
    }
    return element + at * stride[0];
  }
};

struct StripTable {
  static constexpr int kStrips = 280;
  Strip strips[kStrips];
  int32_t count;
};
static_assert(sizeof(StripTable) <= 32000, "a launch takes 32764 bytes of arguments");

// The largest magnitude that this thread has seen, as bits without the sign: these are ordered as
// the numbers are, Inf above all of them and NaN above Inf.
template <class Element>
struct Absmax {
  using Bits = std::conditional_t<
      sizeof(Element) == 2, uint16_t,
      std::conditional_t<sizeof(Element) == 4, uint32_t, DoubleBits>>;
  using Wide = std::conditional_t<sizeof(Element) == 8, DoubleBits, uint32_t>;  // of registers
  static constexpr uint32_t kCount = kVector / sizeof(Element);
  static constexpr Wide kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;

  struct alignas(kVector) Vector {
    Bits bits[kCount];
  };

  Wide bits = 0;

  __device__ __forceinline__ void see(Wide other) { bits = max(bits, other & kMagnitude); }

  // Neighbours, wherever they start.
  __device__ __forceinline__ void see_run(const Bits* from, uint32_t count) {
    const auto past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from) % kVector);
    const uint32_t head = min((kVector - past) % kVector / uint32_t(sizeof(Bits)), count);
    const uint32_t vectors = (count - head) / kCount, tail = head + vectors * kCount;
    const auto* body = reinterpret_cast<const Vector*>(from + head);
#pragma unroll 4
    for (uint32_t v = threadIdx.x; v < vectors; v += kThreads) {
      expect_aligned(body + v, kVector);
      const Vector vector = body[v];
#pragma unroll
      for (uint32_t i = 0; i < kCount; ++i) see(vector.bits[i]);
    }
    if (threadIdx.x < head) see(from[threadIdx.x]);
    if (threadIdx.x < count - tail) see(from[tail + threadIdx.x]);
  }

  __device__ __forceinline__ DoubleBits widened() const {
    const auto element = bit_cast<Element>(static_cast<Bits>(bits));
    return bit_cast<DoubleBits>(static_cast<double>(widen(element)));
  }
};

template <class Bits>
__device__ __forceinline__ Bits over_warp(Bits largest) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
}

__global__ void __launch_bounds__(kThreads, 6)
    magnitudes_kernel(const __grid_constant__ StripTable table, DoubleBits* out) {
  const Strip& strip = row_of(table.strips, table.count, blockIdx.x);
  const uint32_t begin = (blockIdx.x - strip.first_chunk) * kRun;
  const uint32_t end = min(begin + kRun, strip.numel);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  DoubleBits bits = 0;
  with_type(strip.data, strip.dtype, [&](auto* data) {
    Absmax<std::remove_pointer_t<decltype(data)>> largest;
    const auto* from = reinterpret_cast<const typename decltype(largest)::Bits*>(data);
    if (strip.is_run) {
      largest.see_run(from + begin, end - begin);
    } else {
      // Past the end it is the last element once more: loads that hang on no branch go together.
      for (uint32_t at = begin + threadIdx.x; at < end; at += 4 * kThreads)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i)
          largest.see(from[strip.place(min(at + i * kThreads, end - 1))]);
    }
    largest.bits = over_warp(largest.bits);
    bits = largest.widened();
  });
  auto* of_warps = reinterpret_cast<DoubleBits*>(shared_memory());
  if (lane == 0) of_warps[warp] = bits;
  __syncthreads();
  if (warp > 0) return;
  bits = over_warp(lane < kWarps ? of_warps[lane] : 0);
  if (lane == 0) atomicMax(out + strip.tensor, bits);
}

// A tensor in the order of its memory, without the repetitions of expanded dimensions.
Source in_memory_order(const Source& source) {
  std::vector<size_t> order(source.sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return source.strides[a] > source.strides[b]; });
  Source sorted;
  sorted.data = source.data;
  sorted.dtype = source.dtype;
  for (const size_t dim : order)
    if (source.strides[dim] != 0) sorted.append(source.sizes[dim], source.strides[dim]);
  return sorted;
}

// Calls `use(part)` for parts of a source that a strip can hold: halves of its first dimension.
template <class Use>
void for_each_part(const Source& source, const Use& use) {
  if (source.numel() <= kLongest && source.sizes.size() <= kAxes) return use(source);
  const int64_t size = source.sizes[0], stride = source.strides[0];
  for (const int64_t begin : {int64_t{0}, size / 2}) {
    Source half;
    half.data = source.data + begin * stride * itemsize(source.dtype);
    half.dtype = source.dtype;
    half.append(begin == 0 ? size / 2 : size - begin, stride);
    for (size_t dim = 1; dim < source.sizes.size(); ++dim)
      half.append(source.sizes[dim], source.strides[dim]);
    for_each_part(half, use);
  }
}

Strip strip_of(const Source& source) {
  Strip strip{};
  strip.data = source.data;
  strip.numel = static_cast<uint32_t>(source.numel());
  strip.dtype = source.dtype;
  const int dims = static_cast<int>(source.sizes.size()), unused = kAxes - dims;
  strip.is_run = dims == 0 || (dims == 1 && source.strides[0] == 1);
  for (int axis = 0; axis < kAxes; ++axis) {
    strip.size[axis] = Divisor::of(axis < unused ? 1 : source.sizes[axis - unused]);
    strip.stride[axis] = axis < unused ? 0 : source.strides[axis - unused];
  }
  return strip;
}

}  // namespace

void magnitudes(double* out, const std::vector<Source>& sources, Stream stream) {
  set_zero(out, sources.size() * sizeof(double), stream);
  StripTable table;
  uint32_t chunks = 0;
  table.count = 0;
  const auto start = [&] {
    if (table.count > 0)
      launch(magnitudes_kernel, chunks, kThreads, kWarps * sizeof(DoubleBits), stream, table,
             reinterpret_cast<DoubleBits*>(out));
    table.count = 0;
    chunks = 0;
  };
  for (size_t s = 0; s < sources.size(); ++s)
    for_each_part(in_memory_order(sources[s]), [&](const Source& part) {
      Strip& strip = table.strips[table.count++] = strip_of(part);
      strip.tensor = static_cast<uint32_t>(s);
      strip.first_chunk = chunks;
      chunks += (strip.numel + kRun - 1) / kRun;
      if (table.count == StripTable::kStrips) start();
    });
  start();
}

}  // namespace shampoo::cuda
