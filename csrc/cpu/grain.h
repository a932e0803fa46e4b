// How much work is worth how much.
#pragma once

#include <cstdint>

namespace shampoo::cpu {

// Elements that a thread must have to be worth waking, and of which a temporary stays in L1.
constexpr int64_t kGrain = 32768;
constexpr int64_t kChunk = 1024;

}  // namespace shampoo::cpu
