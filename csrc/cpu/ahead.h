// What the next product will read, asked for while this one runs. Products of matrices that fit into
// the L2 cache leave the memory idle, and would then wait for it while the next operands are packed.
#pragma once

#include <array>
#include <cstdint>

namespace shampoo::cpu {

class Ahead {
 public:
  // Adds [data, data + numel), or nothing if it is too long: it would push out what is in use.
  template <class Flat>
  Ahead& add(const Flat* data, int64_t numel) {
    const int64_t bytes = numel * static_cast<int64_t>(sizeof(Flat));
    if (bytes <= kBytes) runs_[count_++] = {reinterpret_cast<const char*>(data), bytes / kLine};
    return *this;
  }

  // The parts [begin, end) of `parts` equal ones.
  Ahead part(int64_t begin, int64_t end, int64_t parts) const {
    Ahead some = *this;
    for (int run = 0; run < count_; ++run) {
      const int64_t first = runs_[run].lines * begin / parts, last = runs_[run].lines * end / parts;
      some.runs_[run] = {runs_[run].at + first * kLine, last - first};
    }
    return some;
  }

  // Asks for one line of everything that has been added.
  void next() {
    for (int run = 0; run < count_; ++run) {
      auto& [at, lines] = runs_[run];
      if (lines-- > 0) prefetch(at);
      at += kLine;
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

  std::array<Run, 2> runs_;
  int count_ = 0;
};

}  // namespace shampoo::cpu
