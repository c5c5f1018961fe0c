#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <torch/types.h>

#include "hestia/core/safetensors.hpp"

namespace hestia {

/// LibTorch dtype of a safetensors dtype. Throws InputError for dtypes LibTorch lacks.
[[nodiscard]] torch::Dtype torch_dtype(DType dtype);
/// Inverse of torch_dtype.
[[nodiscard]] DType safetensors_dtype(torch::Dtype dtype);
/// "float32" or "bfloat16" (also "bf16", "float64") -> dtype. Throws UsageError with the known names.
[[nodiscard]] torch::Dtype dtype_from_recipe(std::string_view name);
/// "cpu", "cuda", "cuda:1", or "auto" (CUDA when there is a GPU that Hestia's kernels are compiled for; a warning says
/// when there is another). Throws UsageError when a GPU is asked for and none is there, or one of another architecture.
[[nodiscard]] torch::Device device_from_recipe(std::string_view name);

/// A copy of a mapped tensor, on the CPU, in its own dtype.
[[nodiscard]] torch::Tensor to_torch(const TensorView& view);
/// Copies a mapped tensor into `destination` (any device and float dtype, same shape), converting on the way.
void copy_into(const TensorView& view, const torch::Tensor& destination);

/// Writes tensors (any device; copied to the CPU) as one safetensors file, whole or not at all.
void write_tensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
                   const std::vector<std::pair<std::string, std::string>>& metadata = {});

}  // namespace hestia
