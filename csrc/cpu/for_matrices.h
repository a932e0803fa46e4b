// Stacks of matrices, handed out to threads with memory of their own.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

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

// What a stack asks of a thread that works on one of its matrices.
struct Job {
  int64_t count;    // matrices
  int64_t scratch;  // elements
  int64_t cost;     // products of one matrix, by which the dear ones go first
};

// From so many products on, threads share a matrix of a stack that has fewer than there are threads.
constexpr int64_t kSharedCost = int64_t{1} << 20;

// A matrix of one of many stacks.
struct Place {
  size_t stack;
  int64_t matrix;
};

// Calls `work(place, following, scratch, for_panels)` for every matrix of many stacks. Threads take
// matrices of all of them together, one after another, dear ones first, so that small stacks keep no
// thread waiting. `following` points to what the thread is likely to take next, or is null.
template <class Flat, class Work>
void for_stacks(const std::vector<Job>& jobs, const Work& work) {
  const int64_t threads = at::get_num_threads();
  std::vector<size_t> together;
  for (size_t s = 0; s < jobs.size(); ++s) {
    const bool is_alone = jobs.size() == 1 || threads == 1;
    if (is_alone || (jobs[s].count < threads && jobs[s].cost >= kSharedCost))
      for_matrices<Flat>(jobs[s].count, jobs[s].scratch,
                         [&](int64_t b, Flat* scratch, const auto& for_panels) {
                           const Place place{s, b}, following{s, b + 1};
                           work(place, b + 1 < jobs[s].count ? &following : nullptr, scratch,
                                for_panels);
                         });
    else
      together.push_back(s);
  }
  if (together.empty()) return;
  std::stable_sort(together.begin(), together.end(),
                   [&](size_t a, size_t b) { return jobs[a].cost > jobs[b].cost; });
  std::vector<Place> matrices;
  int64_t most = 0;
  for (const size_t s : together) {
    most = std::max(most, jobs[s].scratch);
    for (int64_t b = 0; b < jobs[s].count; ++b) matrices.push_back({s, b});
  }
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Scratch<Flat> scratch(most);
    for (int64_t thread = begin; thread < end; ++thread)
      for (size_t at = next++; at < matrices.size(); at = next++) {
        // Matrices of one stack take equally long, so that threads take turns. No claim: one that
        // was claimed would wait here while other threads are idle.
        const size_t then = at + threads;
        work(matrices[at], then < matrices.size() ? &matrices[then] : nullptr, scratch.data(),
             [](int64_t panels, const auto& visit) {
               for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
             });
      }
  });
}

}  // namespace shampoo::cpu
