// The contracts of the arguments. Every message names the argument, its value and the bound.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>

namespace shampoo {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// A sum of which one part is not negative, or the largest integer instead of one that wraps around.
inline int64_t sum_up_to_most(int64_t first, int64_t second) {
  return second > 0 && first > kMost - second ? kMost : first + second;
}

inline void check_positive(const char* name, double value) {
  TORCH_CHECK(value > 0.0, "Invalid ", name, "=", value, ". Must be > 0.");
}

// A device as a message names it.
inline std::string place_of(const at::Device& device) {
  return device.is_cpu() ? "the CPU" : device.str();
}

// The memory of a segment, or one number for each of its blocks.
inline void check_flat(const char* name, const at::Tensor& tensor,
                       const at::Device& device = at::kCPU) {
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), ", but this is the ",
              at::DeviceTypeName(device.type()), " kernel. Move it to ", place_of(device), ".");
  TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name,
              " must be one-dimensional and contiguous, got shape ", tensor.sizes(),
              " with strides ", tensor.strides(), ".");
  TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
              " has dtype ", tensor.scalar_type(), ". Must be float32 or float64.");
}

inline void check_same(const char* name, const at::Tensor& tensor, const char* other_name,
                       const at::Tensor& other) {
  check_flat(name, tensor, other.device());
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " has dtype ",
              tensor.scalar_type(), " but ", other_name, " has ", other.scalar_type(),
              ". Both must be the same.");
}

inline void check_length(const char* name, const at::Tensor& tensor, const char* table,
                         int64_t needed) {
  TORCH_CHECK(tensor.numel() >= needed, name, " has ", tensor.numel(), " elements but ", table,
              " describes ", needed, ".");
}

// One of a list of stacks, which a kernel takes as the first of them is.
inline void check_same_dtype(const char* name, at::TensorList stacks, size_t index) {
  TORCH_CHECK(stacks[index].scalar_type() == stacks[0].scalar_type(), name, "[", index,
              "] has dtype ", stacks[index].scalar_type(), " but ", name, "[0] has ",
              stacks[0].scalar_type(), ". All must be the same.");
}

// A number in the memory of a device: 0-d, float64.
inline void check_number(const char* name, const at::Tensor& tensor, const at::Device& device) {
  TORCH_CHECK(tensor.device() == device && tensor.scalar_type() == at::kDouble &&
                  tensor.numel() == 1,
              name, " is ", tensor.scalar_type(), " of shape ", tensor.sizes(), " on ",
              tensor.device(), ". Must be one number, float64 on ", place_of(device), ".");
}

// One number, or one for each of some blocks, in the memory of a device.
inline void check_numbers(const char* name, const at::Tensor& tensor, int64_t blocks,
                          const at::Device& device) {
  if (tensor.dim() == 0) return check_number(name, tensor, device);
  TORCH_CHECK(tensor.device() == device && tensor.scalar_type() == at::kDouble &&
                  tensor.dim() == 1 && tensor.size(0) == blocks && tensor.is_contiguous(),
              name, " is ", tensor.scalar_type(), " of shape ", tensor.sizes(), " on ",
              tensor.device(), ". Must be one number or ", blocks,
              ", one for each block, contiguous float64 on ", place_of(device), ".");
}

// A table of int64 rows, read on the host.
inline void check_table(const char* name, const at::Tensor& table, int64_t least_columns) {
  TORCH_CHECK(table.device().is_cpu(), name, " is on ", table.device(),
              ". Tables are read on the host: keep them on the CPU.");
  TORCH_CHECK(table.scalar_type() == at::kLong, name, " has dtype ", table.scalar_type(),
              ". Must be int64.");
  TORCH_CHECK(table.dim() == 2 && table.is_contiguous() && table.size(1) >= least_columns, name,
              " must be contiguous [rows, columns] with at least ", least_columns,
              " columns, got shape ", table.sizes(), " with strides ", table.strides(), ".");
}

}  // namespace shampoo
