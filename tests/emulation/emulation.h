// What the .cu sources use of CUDA, for a C++ compiler on a machine without a GPU.
//
// Every thread of a block is a fiber, and a block runs alone. A warp runs until all its lanes wait
// at a block barrier; then the next one does. So a missing barrier shows as stale or poisoned
// memory, in at least one of the two orders in which `order` lets warps run. Warp collectives need
// all 32 lanes: the last one to arrive computes. Shared memory starts as NaN, with a fence behind it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct CUstream_st;  // a cudaStream_t points to one; here all of them are null

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

struct Index {
  unsigned x = 0;
};

inline Index thread, block, block_size, grid_size;

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kFence = 4096;
constexpr unsigned char kFenceByte = 0xa5;

enum class Order { kForward, kBackward };
inline Order order = Order::kForward;  // of the warps of a block, and of the blocks of a grid
inline int64_t wide_accesses = 0;  // to several elements at once, since the program started
inline int64_t launches = 0;  // of kernels and of what sets memory to zero, likewise
inline bool dry = false;  // whether launches are counted, and nothing runs

enum class State { kReady, kInCollective, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  State state = State::kReady;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Warp {
  const char* collective = nullptr;  // its name, while lanes wait in it
  int arrived = 0;
  void* operands[kLanes] = {};
};

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes) : bytes_(shared_bytes) {
    if (threads == 0 || threads % kLanes || threads > 1024)
      throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
    fibers_.resize(threads);
    warps_.resize(threads / kLanes);
    memory_.reset(static_cast<char*>(std::aligned_alloc(128, (bytes_ + 127) / 128 * 128 + kFence)));
  }

  char* shared() { return memory_.get(); }

  void run(const std::function<void()>& body) {
    body_ = &body;
    std::memset(memory_.get(), 0xff, bytes_);
    std::memset(memory_.get() + bytes_, kFenceByte, kFence);
    for (Warp& warp : warps_) warp = {};
    for (Fiber& fiber : fibers_) {
      fiber.started = false;
      fiber.state = State::kReady;
    }
    for (bool running = true; running;) {
      for (size_t i = 0; i < warps_.size(); ++i)
        run_warp(order == Order::kForward ? i : warps_.size() - 1 - i);
      size_t waiting = 0;
      for (Fiber& fiber : fibers_) waiting += fiber.state == State::kAtBarrier;
      if (waiting != 0 && waiting != fibers_.size())
        throw std::runtime_error("some threads returned while others wait at a barrier");
      running = waiting != 0;
      for (Fiber& fiber : fibers_)
        if (running) fiber.state = State::kReady;
    }
    for (size_t i = 0; i < kFence; ++i)
      if (static_cast<unsigned char>(memory_[bytes_ + i]) != kFenceByte)
        throw std::runtime_error("written past the end of shared memory");
  }

  void barrier() { wait(State::kAtBarrier); }

  // `compute(operands)` gets what every lane of the warp brought, and writes into it.
  template <class Operand, class Compute>
  void collective(const char* name, Operand& operand, const Compute& compute) {
    Warp& warp = warps_[thread.x / kLanes];
    if (warp.arrived == 0)
      warp.collective = name;
    else if (std::strcmp(warp.collective, name) != 0)
      fail("lanes of one warp in " + std::string(name) + " and " + warp.collective);
    warp.operands[thread.x % kLanes] = &operand;
    if (++warp.arrived < kLanes) return wait(State::kInCollective);
    warp.arrived = 0;
    Operand* operands[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      operands[lane] = static_cast<Operand*>(warp.operands[lane]);
    compute(operands);
    const size_t first = thread.x / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) fibers_[first + lane].state = State::kReady;
  }

  void fail(const std::string& error) {
    error_ = error;
    wait(State::kDone);
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  // Resumes the lanes in turn until all of them are at a barrier or done.
  void run_warp(size_t warp) {
    for (bool moved = true; moved;) {
      moved = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (fibers_[warp * kLanes + lane].state != State::kReady) continue;
        resume(static_cast<unsigned>(warp * kLanes + lane));
        moved = true;
        if (!error_.empty()) throw std::runtime_error(std::exchange(error_, {}));
      }
    }
    if (warps_[warp].arrived != 0)
      throw std::runtime_error(std::string("not all lanes of a warp reach ") +
                               warps_[warp].collective);
  }

  __attribute__((noinline)) void resume(unsigned index) {
    Fiber& fiber = fibers_[index];
    thread.x = index;
    running_ = &fiber;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    entering_ = this;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    Block* self = entering_;
    (*self->body_)();
    self->wait(State::kDone);
  }

  // After the first entry a switch is two jumps: a context switch would cost two system calls.
  __attribute__((noinline)) void wait(State state) {
    Fiber* self = running_;
    self->state = state;
    if (_setjmp(self->resume) == 0) _longjmp(scheduler_, 1);
  }

  inline static Block* entering_ = nullptr;
  size_t bytes_;
  std::unique_ptr<char[], Free> memory_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  const std::function<void()>* body_ = nullptr;
  Fiber* running_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
};

inline Block* current = nullptr;

inline void launch(unsigned blocks, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  if (blocks == 0) throw std::invalid_argument("a launch of no blocks, which CUDA refuses");
  ++launches;
  if (dry) return;
  Block memory(threads, shared_bytes);
  current = &memory;
  grid_size.x = blocks;
  block_size.x = threads;
  for (unsigned i = 0; i < blocks; ++i) {
    block.x = order == Order::kForward ? i : blocks - 1 - i;
    memory.run(body);
  }
  current = nullptr;
}

inline double half_to_double(uint16_t bits) {
  static const std::vector<double> table = [] {
    std::vector<double> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      double value = exponent == 0    ? std::ldexp(fraction, -24)
                     : exponent < 31  ? std::ldexp(1024 + fraction, exponent - 25)
                     : fraction == 0 ? INFINITY
                                      : NAN;
      values[i] = i >> 15 ? -value : value;
    }
    return values;
  }();
  return table[bits];
}

// A sum as the tensor cores round it: to nearest, or (as measured on some) toward zero.
inline float round_sum(double sum) {
  float rounded = static_cast<float>(sum);
#ifdef EMULATE_TRUNCATION
  if (std::abs(static_cast<double>(rounded)) > std::abs(sum) && std::isfinite(sum))
    rounded = std::nextafter(rounded, 0.0f);
#endif
  return rounded;
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

using std::fma;
using std::max;
using std::min;
using std::sqrt;

inline void __syncthreads() { emulation::current->barrier(); }

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  struct Operand {
    Value in, out;
    unsigned mask;
    int distance;
  } operand{value, value, mask, distance};
  emulation::current->collective("shuffle", operand, [](Operand** lanes) {
    for (int lane = 0; lane < emulation::kLanes; ++lane)
      lanes[lane]->out = lanes[lane ^ lanes[lane]->distance]->in;
  });
  return operand.out;
}

inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address = max(before, value);
  return before;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace shampoo::cuda {

inline char* shared_memory() { return emulation::current->shared(); }

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes,
            ::CUstream_st*, const Args&... args) {
  emulation::launch(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

inline void set_zero(void* memory, size_t bytes, ::CUstream_st*) {
  ++emulation::launches;
  if (!emulation::dry) std::memset(memory, 0, bytes);
}

inline void expect_aligned(const void* address, size_t bytes) {
  ++emulation::wide_accesses;
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    emulation::current->fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

inline float half_to_float(uint16_t bits) {
  return static_cast<float>(emulation::half_to_double(bits));
}

inline uint16_t float_to_half(float value) {  // to nearest, ties to even
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::abs(static_cast<double>(value));
  if (std::isnan(value)) return sign | 0x7e00;
  if (size >= 65520.0) return sign | 0x7c00;
  if (size < 0x1p-14) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24));
  const int exponent = std::ilogb(size);
  const auto fraction = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + fraction);
}

inline uint32_t pack_halves(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

// Four 8 x 8 matrices of halves, a row from each lane: lane 8 i + r has the address of row r of
// matrix i, and gets elements 2 (lane % 4) and the next of row lane / 4 of every matrix.
inline void load_matrices(uint32_t (&fragment)[4], const uint16_t* row) {
  struct Operand {
    const uint16_t* row;
    uint32_t out[4];
  } operand{row, {}};
  expect_aligned(row, 16);
  emulation::current->collective("ldmatrix", operand, [](Operand** lanes) {
    for (int lane = 0; lane < emulation::kLanes; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t* pair = lanes[8 * matrix + lane / 4]->row + 2 * (lane % 4);
        lanes[lane]->out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
  std::memcpy(fragment, operand.out, sizeof fragment);
}

// sum += A B, A 16 x 16 and B 16 x 8 halves: exact products, one rounding.
inline void multiply_accumulate(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operand {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } operand{sum, a, {b0, b1}};
  emulation::current->collective("mma", operand, [](Operand** lanes) {
    double A[16][16], B[16][8];
    for (int lane = 0; lane < emulation::kLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int half = 0; half < 2; ++half) {
        const auto value = [half](uint32_t pair) {
          return emulation::half_to_double(static_cast<uint16_t>(pair >> 16 * half));
        };
        for (int i = 0; i < 4; ++i)
          A[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + half] = value(lanes[lane]->a[i]);
        for (int i = 0; i < 2; ++i) B[2 * q + 8 * i + half][g] = value(lanes[lane]->b[i]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      double sums[8];
      for (int column = 0; column < 8; ++column)
        sums[column] = lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2];
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sums[column] += A[row][k] * B[k][column];
      for (int column = 0; column < 8; ++column)
        lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2] =
            emulation::round_sum(sums[column]);
    }
  });
}

}  // namespace shampoo::cuda
