// Stacks of matrices, handed out to threads with memory of their own.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <memory>
#include <new>

namespace shampoo::cpu {

// Memory whose vectors cross no line of the cache; not initialised.
template <class Flat>
class Scratch {
 public:
  explicit Scratch(int64_t numel)
      : memory_(static_cast<Flat*>(::operator new(numel * sizeof(Flat), kLine))) {}
  Flat* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(Flat* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<Flat, Free> memory_;
};

// Calls `work(b, scratch, for_panels)` for every matrix of a stack. With as many matrices as threads
// each takes its own; else threads share one, and `for_panels(panels, visit)` hands out its panels, in
// pairs from both ends since a panel costs as much as it has rows.
template <class Flat, class Work>
void for_matrices(int64_t count, int64_t scratch_numel, const Work& work) {
  if (count >= at::get_num_threads()) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<Flat> scratch(scratch_numel);
      for (int64_t b = begin; b < end; ++b)
        work(b, scratch.data(), [](int64_t panels, const auto& visit) {
          for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
        });
    });
    return;
  }
  const Scratch<Flat> scratch(scratch_numel);
  for (int64_t b = 0; b < count; ++b)
    work(b, scratch.data(), [](int64_t panels, const auto& visit) {
      at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          visit(panel);
          if (panels - 1 - panel != panel) visit(panels - 1 - panel);
        }
      });
    });
}

}  // namespace shampoo::cpu
