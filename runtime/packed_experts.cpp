#include "packed_experts.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/cuda/CUDAStream.h>
#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/runtime/expert_store.hpp"

namespace hestia {
namespace {

using torch::Tensor;

// Throws UsageError when the integer formats do not hold such experts.
void check_packable(const Architecture& a, torch::Dtype dtype, ExpertFormat format) {
  const std::string_view name = expert_format_name(format);
  if (dtype != torch::kBFloat16) {
    throw UsageError(
        fmt::format("expert format: {} is packed from bfloat16, got a model of {}; use dtype bfloat16, or bf16 experts",
                    name, stored_format_name(dtype, ExpertFormat::kBfloat16)));
  }
  if (a.expert_bias) {
    throw UsageError(fmt::format("expert format: {} holds experts without biases, got those of a {} model; use bf16",
                                 name, a.family));
  }
  const ExpertBlobLayout layout = expert_blob_layout(a, dtype);
  const std::vector<TensorPart> plain = {TensorPart::kExpertGate, TensorPart::kExpertUp, TensorPart::kExpertDown};
  std::vector<TensorPart> parts;
  for (const BlobPart& part : layout.parts) {
    parts.push_back(part.part);
  }
  if (parts != plain) {
    throw UsageError(fmt::format(
        "expert format: {} holds experts with matrices gate, up and down, got those of a {} model; use bf16", name,
        a.family));
  }
  if (a.hidden_size % 8 != 0 || a.expert_intermediate_size % 8 != 0) {
    throw UsageError(fmt::format(
        "expert format: {} holds matrices of sizes that are multiples of 8, got a hidden size of {} and an expert "
        "hidden size of {}; use bf16",
        name, a.hidden_size, a.expert_intermediate_size));
  }
}

// Gives the whole pages of a piece of memory back to the system; it reads as zeros from then on.
void give_back(std::uint8_t* data, std::size_t bytes) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  if (end > first) {
    (void)madvise(data + (first - address), end - first, MADV_DONTNEED);
  }
}

}  // namespace

DecodeExpertsShape packed_shape(const Architecture& architecture, ExpertFormat format) {
  return {.num_tokens = 1,
          .top_k = 1,
          .hidden_size = architecture.hidden_size,
          .expert_hidden_size = architecture.expert_intermediate_size,
          .format = format};
}

std::int64_t stored_expert_bytes(const Architecture& architecture, torch::Dtype dtype, ExpertFormat format) {
  if (format == ExpertFormat::kBfloat16) {
    return static_cast<std::int64_t>(expert_blob_layout(architecture, dtype).bytes);
  }
  check_packable(architecture, dtype, format);
  return static_cast<std::int64_t>(expert_blob(packed_shape(architecture, format)).bytes);
}

std::string stored_format_name(torch::Dtype dtype, ExpertFormat format) {
  if (format == ExpertFormat::kBfloat16 && dtype != torch::kBFloat16) {
    return dtype == torch::kFloat64 ? "float64" : "float32";
  }
  return std::string(expert_format_name(format));
}

ExpertStore ExpertStore::packed(const Architecture& architecture, const ExpertStore& from, ExpertFormat format,
                                bool quiet) {
  if (from.format_ != ExpertFormat::kBfloat16 || format == ExpertFormat::kBfloat16) {
    throw std::invalid_argument("expert store: integers are packed from a store that is not packed");
  }
  check_packable(architecture, from.layout_.dtype, format);
  const DecodeExpertsShape shape = packed_shape(architecture, format);
  ExpertStore store;
  store.format_ = format;
  store.layout_.dtype = torch::kBFloat16;
  store.layout_.bytes = expert_blob(shape).bytes;
  store.take_memory(from.num_blobs(), /*touch=*/false);
  const std::int64_t num_experts = architecture.num_experts;
  const std::vector<std::int64_t> moe_layers = architecture.moe_layers();
  auto* const source = from.blobs_NB_.mutable_data_ptr<std::uint8_t>();
  auto* const target = store.blobs_NB_.mutable_data_ptr<std::uint8_t>();
  constexpr std::int64_t kWorthShowing = std::int64_t{1} << 28;
  Progress progress("pack", from.bytes(), "B", quiet || from.bytes() < kWorthShowing);
  std::vector<ExpertError> of_experts(static_cast<std::size_t>(num_experts));
  for (std::size_t layer = 0; layer < moe_layers.size(); ++layer) {
    at::parallel_for(0, num_experts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t expert = begin; expert < end; ++expert) {
        const std::size_t blob = layer * static_cast<std::size_t>(num_experts) + static_cast<std::size_t>(expert);
        std::uint8_t* const weights = source + blob * from.layout_.bytes;
        const auto matrix = [&](std::size_t part) {
          return reinterpret_cast<const std::uint16_t*>(weights + from.layout_.parts[part].offset);
        };
        try {
          of_experts[static_cast<std::size_t>(expert)] =
              quantise_expert(shape, matrix(0), matrix(1), matrix(2), target + blob * store.layout_.bytes);
        } catch (const InputError& error) {
          throw InputError(fmt::format("layer {}, expert {}: {}", moe_layers[layer], expert, error.what()));
        }
        give_back(weights, from.layout_.bytes);
      }
    });
    ExpertError mean;
    for (const ExpertError& error : of_experts) {
      mean.gate += error.gate;
      mean.up += error.up;
      mean.down += error.down;
    }
    for (double* const error : {&mean.gate, &mean.up, &mean.down}) {
      *error /= static_cast<double>(num_experts);
    }
    store.errors_.push_back(mean);
    progress.advance(num_experts * static_cast<std::int64_t>(from.layout_.bytes));
  }
  progress.finish();
  return store;
}

UnpackedExperts::UnpackedExperts(const Architecture& architecture, ExpertFormat format, std::int64_t count,
                                 torch::Device device)
    : shape_(packed_shape(architecture, format)), count_(count) {
  const ExpertBlobLayout layout = expert_blob_layout(architecture, torch::kBFloat16);
  blobs_NB_ = torch::empty({count, static_cast<std::int64_t>(layout.bytes)},
                           torch::TensorOptions().dtype(torch::kUInt8).device(device));
  experts_ = experts_in_blobs(architecture, layout, blobs_NB_);
}

const ExpertWeights& UnpackedExperts::consecutive(const Tensor& pool_MB, std::int64_t first) {
  unpack(pool_MB.narrow(0, first, count_).const_data_ptr(), nullptr);
  return experts_;
}

const ExpertWeights& UnpackedExperts::listed(const Tensor& pool_MB, const Tensor& blob_N) {
  if (blob_N.numel() != count_ || !blob_N.is_contiguous()) {
    throw std::invalid_argument(fmt::format("unpacked experts: {} at a time, got {}", count_, blob_N.numel()));
  }
  unpack(pool_MB.const_data_ptr(), blob_N.const_data_ptr<std::int32_t>());
  return experts_;
}

void UnpackedExperts::unpack(const void* pool, const std::int32_t* blobs) {
  auto* const out = blobs_NB_.mutable_data_ptr<std::uint8_t>();
  if (blobs_NB_.is_cuda()) {
    dequantise_experts_cuda(shape_, pool, blobs, count_, out,
                            c10::cuda::getCurrentCUDAStream(blobs_NB_.device().index()).stream());
    return;
  }
  const std::size_t from = expert_blob(shape_).bytes;
  const auto to = static_cast<std::size_t>(blobs_NB_.size(1));
  at::parallel_for(0, count_, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t blob = blobs == nullptr ? i : blobs[i];
      dequantise_experts_cpu(shape_, static_cast<const std::uint8_t*>(pool) + static_cast<std::size_t>(blob) * from,
                             nullptr, 1, out + static_cast<std::size_t>(i) * to);
    }
  });
}

}  // namespace hestia
