// What the next product will read, asked for while this one runs. Products of matrices that fit into
// the L2 cache leave the memory idle, and would then wait for it while the next operands are packed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace shampoo::cpu {

struct NoPrefetch {
  static constexpr bool kIsNothing = true;
  NoPrefetch part(int64_t, int64_t, int64_t) const { return {}; }
  void next(int64_t) {}
};

class Prefetch {
 public:
  static constexpr bool kIsNothing = false;

  // Adds [data, data + numel), or nothing if it is too long: it would push out what is in use.
  template <class Flat>
  Prefetch& add(const Flat* data, int64_t numel) {
    const int64_t bytes = numel * static_cast<int64_t>(sizeof(Flat));
    if (bytes <= kBytes) runs_[count_++] = {reinterpret_cast<const char*>(data), bytes / kLine};
    return *this;
  }

  // The parts [begin, end) of `parts` equal ones.
  Prefetch part(int64_t begin, int64_t end, int64_t parts) const {
    Prefetch some = *this;
    for (int run = 0; run < count_; ++run) {
      const int64_t first = runs_[run].lines * begin / parts, last = runs_[run].lines * end / parts;
      some.runs_[run] = {runs_[run].at + first * kLine, last - first};
    }
    return some;
  }

  // Asks for so many lines of everything that has been added.
  void next(int64_t lines) {
    for (int run = 0; run < count_; ++run) {
      auto& [at, left] = runs_[run];
      const int64_t now = std::min(lines, left);
      for (int64_t line = 0; line < now; ++line) prefetch(at + line * kLine);
      at += now * kLine;
      left -= now;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kBytes = 1 << 18;  // a quarter of a common L2 cache
  struct Run {
    const char* at;
    int64_t lines;
  };

  static void prefetch(const char* at) {
#if defined(__GNUC__)
    __builtin_prefetch(at, 0, 2);  // into L2: the panels of the running product need L1
#endif
  }

  std::array<Run, 2> runs_{};
  int count_ = 0;
};

}  // namespace shampoo::cpu
