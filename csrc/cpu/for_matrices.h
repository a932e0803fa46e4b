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

// Calls `work(place, scratch, for_panels)` for every matrix of many stacks. Threads share all of them,
// dear ones first, so that small stacks keep no thread waiting. Of stacks that cost alike a thread takes
// the matrices of one ordinal one after another: those of a square block are made of one gradient, which
// it then has at hand.
template <class Flat, class Work>
void for_stacks(const std::vector<Job>& jobs, const Work& work) {
  const int64_t threads = at::get_num_threads();
  int64_t scratch_numel = 0;
  std::vector<Place> places;
  for (size_t s = 0; s < jobs.size(); ++s) {
    const Job& job = jobs[s];
    const bool is_alone = jobs.size() == 1 || threads == 1;
    if (is_alone || (job.count < threads && job.cost >= kSharedCost)) {
      for_matrices<Flat>(job.count, job.scratch, [&](int64_t b, Flat* scratch, const auto& for_panels) {
        work(Place{s, b}, scratch, for_panels);
      });
      continue;
    }
    scratch_numel = std::max(scratch_numel, job.scratch);
    for (int64_t b = 0; b < job.count; ++b) places.push_back({s, b});
  }
  if (places.empty()) return;
  std::stable_sort(places.begin(), places.end(), [&](const Place& a, const Place& b) {
    const int64_t of_a = jobs[a.stack].cost, of_b = jobs[b.stack].cost;
    return of_a != of_b ? of_a > of_b : a.matrix < b.matrix;
  });
  std::vector<std::vector<Place>> queues(threads);
  for (const Place& place : places) queues[place.matrix % threads].push_back(place);
  std::vector<std::atomic<size_t>> taken(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Scratch<Flat> scratch(scratch_numel);
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t ahead = 0; ahead < threads; ++ahead) {  // who is done helps the others
        const int64_t owner = (thread + ahead) % threads;
        const std::vector<Place>& queue = queues[owner];
        for (size_t at = taken[owner]++; at < queue.size(); at = taken[owner]++)
          work(queue[at], scratch.data(), [](int64_t panels, const auto& visit) {
            for (int64_t panel = 0; panel < panels; ++panel) visit(panel);
          });
      }
  });
}

}  // namespace shampoo::cpu
