#include "hestia/model/tensors.hpp"

#include <cstring>

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <torch/cuda.h>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/kernels/gpu_architecture.hpp"

namespace hestia {
namespace {

std::string shape_text(at::IntArrayRef shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// Why Hestia's kernels do not run on a GPU, before each launch says so in the driver's words; empty: they do.
std::string gpu_refusal(int index) {
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    (void)cudaGetLastError();
    return "";
  }
  const std::string refusal =
      gpu_architecture_refusal(compiled_gpu_architectures(), properties.major, properties.minor);
  return refusal.empty() ? "" : fmt::format("GPU {} ({}) {}", index, properties.name, refusal);
}

}  // namespace

torch::Dtype torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return torch::kBool;
    case DType::kU8:
      return torch::kUInt8;
    case DType::kI8:
      return torch::kInt8;
    case DType::kI16:
      return torch::kInt16;
    case DType::kU16:
      return torch::kUInt16;
    case DType::kF16:
      return torch::kFloat16;
    case DType::kBF16:
      return torch::kBFloat16;
    case DType::kI32:
      return torch::kInt32;
    case DType::kU32:
      return torch::kUInt32;
    case DType::kF32:
      return torch::kFloat32;
    case DType::kF64:
      return torch::kFloat64;
    case DType::kI64:
      return torch::kInt64;
    case DType::kU64:
      return torch::kUInt64;
    case DType::kF8E4M3:
      return torch::kFloat8_e4m3fn;
    case DType::kF8E5M2:
      return torch::kFloat8_e5m2;
  }
  throw InputError(fmt::format("safetensors: dtype is not known to LibTorch, got {}; convert the file to F32 or BF16",
                               static_cast<int>(dtype)));
}

DType safetensors_dtype(torch::Dtype dtype) {
  for (const DType candidate :
       {DType::kBool, DType::kU8, DType::kI8, DType::kI16, DType::kU16, DType::kF16, DType::kBF16, DType::kI32,
        DType::kU32, DType::kF32, DType::kF64, DType::kI64, DType::kU64, DType::kF8E4M3, DType::kF8E5M2}) {
    if (torch_dtype(candidate) == dtype) {
      return candidate;
    }
  }
  throw InputError(
      fmt::format("safetensors: the format has no such dtype, got {}; convert the tensor first", c10::toString(dtype)));
}

torch::Dtype dtype_from_recipe(std::string_view name) {
  if (name == "float32") {
    return torch::kFloat32;
  }
  if (name == "bfloat16" || name == "bf16") {
    return torch::kBFloat16;
  }
  if (name == "float64") {
    return torch::kFloat64;
  }
  throw UsageError(
      fmt::format("dtype: is not known, got \"{}\"; use float32, bfloat16 (or bf16) or float64", std::string(name)));
}

torch::Device device_from_recipe(std::string_view name) {
  const auto num_gpus = static_cast<int>(torch::cuda::is_available() ? torch::cuda::device_count() : 0);
  if (name == "cpu") {
    return torch::Device(torch::kCPU);
  }
  if (name == "auto") {
    if (num_gpus == 0) {
      return torch::Device(torch::kCPU);
    }
    const std::string refusal = gpu_refusal(0);
    if (refusal.empty()) {
      return torch::Device(torch::kCUDA, 0);
    }
    log_warning(fmt::format("device: {}; auto takes the CPU", refusal));
    return torch::Device(torch::kCPU);
  }
  int index = -1;
  if (name == "cuda") {
    index = 0;
  } else if (name.starts_with("cuda:") && name.size() > 5 && name.size() < 9 &&
             name.find_first_not_of("0123456789", 5) == std::string_view::npos) {
    index = std::stoi(std::string(name.substr(5)));
  }
  if (index < 0) {
    throw UsageError(fmt::format("device: is not known, got \"{}\"; use auto, cpu, cuda or cuda:N", std::string(name)));
  }
  if (index >= num_gpus) {
    throw UsageError(fmt::format("device: this machine has {} usable GPU{}, got \"{}\"; use {}", num_gpus,
                                 num_gpus == 1 ? "" : "s", std::string(name),
                                 num_gpus == 0 ? "cpu or auto" : fmt::format("cuda:0 to cuda:{}", num_gpus - 1)));
  }
  if (const std::string refusal = gpu_refusal(index); !refusal.empty()) {
    throw UsageError(fmt::format("device: {}", refusal));
  }
  return {torch::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

torch::Tensor to_torch(const TensorView& view) {
  torch::Tensor tensor = torch::empty(view.shape, torch::TensorOptions().dtype(torch_dtype(view.dtype)));
  if (!view.bytes.empty()) {
    std::memcpy(tensor.data_ptr(), view.bytes.data(), view.bytes.size());
  }
  return tensor;
}

void copy_into(const TensorView& view, const torch::Tensor& destination) {
  if (at::IntArrayRef(view.shape) != destination.sizes()) {
    throw InputError(fmt::format("tensor \"{}\": shape must be {}, got {}; is this file of another model?", view.name,
                                 shape_text(destination.sizes()), shape_text(view.shape)));
  }
  const torch::NoGradGuard no_grad;
  if (reinterpret_cast<std::uintptr_t>(view.bytes.data()) % dtype_size(view.dtype) != 0 || view.bytes.empty()) {
    destination.copy_(to_torch(view));  // LibTorch needs elements aligned to their size
    return;
  }
  // from_blob wants a mutable pointer; the tensor is only read, and gone before the mapping is.
  auto* data = const_cast<std::byte*>(view.bytes.data());
  destination.copy_(torch::from_blob(data, view.shape, torch::TensorOptions().dtype(torch_dtype(view.dtype))));
}

void write_tensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
                   const std::vector<std::pair<std::string, std::string>>& metadata) {
  std::vector<torch::Tensor> alive;  // the writer borrows their bytes
  alive.reserve(tensors.size());
  SafetensorsWriter writer;
  for (const auto& [name, tensor] : tensors) {
    alive.push_back(tensor.detach().to(torch::kCPU).contiguous());
    const torch::Tensor& copy = alive.back();
    writer.add(name, safetensors_dtype(copy.scalar_type()), copy.sizes().vec(),
               {static_cast<const std::byte*>(copy.const_data_ptr()), copy.nbytes()});
  }
  for (const auto& [key, value] : metadata) {
    writer.set_metadata(key, value);
  }
  writer.write(path);
}

}  // namespace hestia
