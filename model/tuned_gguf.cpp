#include "hestia/model/tuned_gguf.hpp"

#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "check_tensor.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/architecture/gguf_names.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/gguf.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {
namespace {

namespace fs = std::filesystem;

// Bytes to put into the copy, and where.
using Patches = std::vector<std::pair<std::uint64_t, std::string>>;

std::string bytes_of(const torch::Tensor& tensor) {
  const torch::Tensor whole = tensor.contiguous();
  return {static_cast<const char*>(whole.const_data_ptr()), whole.nbytes()};
}

void check_architecture(const GgufFile& file, const Architecture& architecture, const fs::path& base) {
  const std::string wanted = gguf_architecture(architecture.model_type);
  if (wanted.empty()) {
    throw InputError(fmt::format("{}: models of type \"{}\" have no GGUF form that this program knows; export --to hf",
                                 base.string(), architecture.model_type));
  }
  const std::string found = file.text("general.architecture");
  if (found != wanted) {
    throw InputError(
        fmt::format("{}: general.architecture must be \"{}\" for the {} model in {}, got \"{}\"; give the "
                    "GGUF file of that model",
                    file.path().string(), wanted, architecture.family, base.string(), found));
  }
  if (file.has("split.count") && file.integer("split.count") > 1) {
    throw InputError(fmt::format("{}: one of {} files of a split model; merge them with llama-gguf-split --merge",
                                 file.path().string(), file.integer("split.count")));
  }
  Problems problems;
  const auto check = [&](const char* key, std::int64_t expected) {
    const std::string name = wanted + key;
    const std::int64_t value = file.has(name) ? file.integer(name) : -1;
    if (value != expected) {
      problems.add(fmt::format("{}: metadata \"{}\" must be {} as in {}, got {}; give the GGUF file of that model",
                               file.path().string(), name, expected, base.string(),
                               value < 0 ? "none" : std::to_string(value)));
    }
  };
  check(".block_count", architecture.num_layers);
  check(".embedding_length", architecture.hidden_size);
  check(".expert_count", architecture.num_experts);
  check(".expert_used_count", architecture.top_k);
  problems.throw_input_if_any();
}

const GgufTensor& router_in(const GgufFile& file, const Architecture& architecture, std::int64_t layer) {
  const std::string name = gguf_router_name(layer);
  const std::string subject = fmt::format("{}: tensor \"{}\"", file.path().string(), name);
  if (!file.contains(name)) {
    throw InputError(
        fmt::format("{} is missing, so this is not a layout whose routers can be replaced; convert the "
                    "model again with a current llama.cpp",
                    subject));
  }
  const GgufTensor& tensor = file.tensor(name);
  const std::vector<std::int64_t> shape = {architecture.num_experts, architecture.hidden_size};
  if (tensor.shape != shape) {
    throw InputError(fmt::format("{} must be [{}], got [{}]; give the GGUF file of that model", subject,
                                 fmt::join(shape, ", "), fmt::join(tensor.shape, ", ")));
  }
  if (tensor.type != GgmlType::kF32 && tensor.type != GgmlType::kF16) {
    throw InputError(
        fmt::format("{} must be F32 or F16 to be replaced, got {}; convert the model again, llama.cpp "
                    "keeps routers in F32 unless told otherwise",
                    subject, ggml_type_name(tensor.type)));
  }
  return tensor;
}

// Either file may have been rounded from the other's values.
bool same_router(const torch::Tensor& base, const torch::Tensor& stored) {
  const auto values = torch::kFloat64;
  const torch::Tensor same = (stored.to(base.scalar_type()).to(values) == base.to(values))
                                 .logical_or_(base.to(stored.scalar_type()).to(values) == stored.to(values));
  return same.all().item<bool>();
}

Patches router_patches(const GgufFile& file, const Architecture& architecture, const fs::path& base,
                       const SafetensorsFile& routers) {
  const SafetensorsCheckpoint checkpoint(base);
  const std::vector<std::int64_t> shape = {architecture.num_experts, architecture.hidden_size};
  Patches patches;
  double largest = 0.0;  // of relative rounding errors
  for (const std::int64_t layer : architecture.moe_layers()) {
    const std::string name = router_name(architecture, layer);
    Problems problems;
    check_tensor(base.string(), checkpoint.tensor(name), shape, problems);
    problems.throw_input_if_any();
    const GgufTensor& target = router_in(file, architecture, layer);
    const bool half = target.type == GgmlType::kF16;
    std::vector<float> floats = file.floats(target.name);
    const torch::Tensor stored =
        torch::from_blob(floats.data(), shape, torch::kFloat32).to(half ? torch::kFloat16 : torch::kFloat32);
    if (!same_router(to_torch(checkpoint.tensor(name)), stored)) {
      throw InputError(
          fmt::format("{}: the router of layer {} (\"{}\") is not that of {}; the file was made from "
                      "another base, or its routers were replaced before",
                      file.path().string(), layer, target.name, base.string()));
    }
    const torch::Tensor tuned = to_torch(routers.tensor(name)).to(torch::kFloat32);
    const torch::Tensor written = tuned.to(stored.scalar_type());
    if (!written.isfinite().all().item<bool>()) {
      throw InputError(fmt::format("{}: tensor \"{}\" has values that {} cannot hold; export --to hf",
                                   routers.path().string(), name, ggml_type_name(target.type)));
    }
    if (half) {
      const torch::Tensor error = (written.to(torch::kFloat32) - tuned).abs().max() / tuned.abs().max();
      largest = std::max(largest, error.item<double>());
    }
    patches.emplace_back(target.file_offset, bytes_of(written));
  }
  if (largest > 0.0) {
    log_warning(fmt::format("{}: routers are F16 there, tuned values are rounded (by {:.1e} of the largest at most)",
                            file.path().string(), largest));
  }
  return patches;
}

// The value keeps its type, so that nothing moves.
std::pair<std::uint64_t, std::string> top_k_patch(const GgufFile& file, std::int64_t top_k) {
  const std::string key = file.text("general.architecture") + ".expert_used_count";
  const GgufValue& value = file.value(key);
  std::string bytes(value.bytes.size(), '\0');
  if (bytes.size() < sizeof(std::int64_t) && top_k >= std::int64_t{1} << (8 * bytes.size() - 1)) {
    throw InputError(fmt::format("{}: metadata \"{}\" of type {} cannot hold {} experts; convert the model again",
                                 file.path().string(), key, gguf_value_type_name(value.type), top_k));
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>((top_k >> (8 * i)) & 0xFF);
  }
  return {value.file_offset, bytes};
}

}  // namespace

void write_tuned_gguf(const fs::path& base, const TunedParts& parts, const fs::path& gguf, const fs::path& output) {
  const torch::NoGradGuard no_grad;
  if (parts.adapters) {
    throw UsageError(
        fmt::format("{}: adapters change expert weights, for which a GGUF file has no place, got --to "
                    "gguf; export --to hf, which merges them, and convert that with llama.cpp",
                    parts.adapters->string()));
  }
  if (fs::exists(output)) {
    throw UsageError(fmt::format("{}: exists already; remove it or choose another --output", output.string()));
  }
  const Architecture architecture = read_architecture(base);
  if (parts.top_k < 1 || parts.top_k > architecture.num_experts) {
    throw std::invalid_argument(
        fmt::format("tuned gguf: top_k must be between 1 and {}, got {}", architecture.num_experts, parts.top_k));
  }
  const SafetensorsFile routers(parts.routers);
  Problems problems;
  check_routers(routers, architecture, problems);
  problems.throw_input_if_any();
  const GgufFile file(gguf);
  check_architecture(file, architecture, base);
  Patches patches = router_patches(file, architecture, base, routers);
  if (parts.top_k != architecture.top_k) {
    patches.push_back(top_k_patch(file, parts.top_k));
  }
  std::error_code failure;
  if (output.has_parent_path()) {
    fs::create_directories(output.parent_path(), failure);
  }
  write_file_atomically(output, [&](const fs::path& temporary) {
    fs::copy_file(gguf, temporary);
    // The copy has the original's permissions, which may say read-only.
    fs::permissions(temporary, fs::perms::owner_write, fs::perm_options::add);
    std::fstream stream(temporary, std::ios::binary | std::ios::in | std::ios::out);
    for (const auto& [offset, bytes] : patches) {
      stream.seekp(static_cast<std::streamoff>(offset));
      stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
    stream.close();
    if (!stream) {
      throw RunError(fmt::format("{}: cannot be written; check folder, space and permissions", output.string()));
    }
  });
}

}  // namespace hestia
