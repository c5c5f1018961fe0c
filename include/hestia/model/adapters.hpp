#pragma once

// Letters: E experts, R rank. A [R, in] and B [out, R] belong to one expert matrix W [out, in]: W' = W + (alpha / R) B
// A.

#include <cstdint>
#include <filesystem>
#include <string>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// Whether a tensor is an expert matrix that adapters go on: up or down projection.
[[nodiscard]] bool takes_adapters(const TensorSpec& spec);

/// Name of one of an expert matrix's adapters: `...up_proj.weight` and 'A' give `...up_proj.lora_A.weight`, as in PEFT.
/// Throws std::invalid_argument unless the name ends in `.weight`.
[[nodiscard]] std::string adapter_name(const std::string& weight_name, char matrix);

/// Gives every routed expert of `model` adapters that a training starts from: A uniform in +-1/sqrt(in) (PEFT's
/// kaiming_uniform with a = sqrt(5)), one generator per matrix, so that the same seed gives the same values on every
/// device; B zero, so that the forward is the base model's to the bit. Throws as MoeModel's add_adapters does.
void create_adapters(MoeModel& model, const AdapterSettings& settings, std::uint64_t seed);

/// Writes the adapters in the model's dtype, whole or not at all; rank and alpha stand in the file's metadata. Throws
/// std::logic_error when the model has none.
void save_adapters(MoeModel& model, const std::filesystem::path& file);

/// A file that `save_adapters` wrote, mapped and checked against an architecture.
class AdapterFile {
 public:
  /// Throws InputError: not an adapter file, a newer format, a damaged rank or alpha, and every tensor that is missing,
  /// extra, misshapen or of a type that is not a float.
  AdapterFile(const std::filesystem::path& path, const Architecture& architecture);
  [[nodiscard]] const AdapterSettings& settings() const noexcept { return settings_; }
  [[nodiscard]] const SafetensorsFile& tensors() const noexcept { return tensors_; }

 private:
  SafetensorsFile tensors_;
  AdapterSettings settings_;
};

/// Gives `model` the adapters of a file, in place of any it has, frozen, in the model's dtype. Throws InputError as
/// AdapterFile does, and changes nothing then.
void load_adapters(MoeModel& model, const std::filesystem::path& file);

/// W + scale * B A in float32 (float64 for a float64 W), rounded once to W's dtype. weight [out, in], a [R, in],
/// b [out, R], on one device.
[[nodiscard]] torch::Tensor merged_weight(const torch::Tensor& weight, const torch::Tensor& a, const torch::Tensor& b,
                                          double scale);

}  // namespace hestia
