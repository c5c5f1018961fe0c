#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "hestia/architecture/architecture.hpp"

namespace hestia {

/// One key of `config.json` and the field it fills. A key that is absent or null leaves the field's default, unless it
/// is required.
struct ConfigKey {
  const char* key;
  std::variant<std::int64_t Architecture::*, double Architecture::*, bool Architecture::*, std::string Architecture::*,
               std::optional<double> Architecture::*>
      field;
  bool required = false;
};

/// A size that stands in a tensor's shape.
enum class Extent { kVocab, kHidden, kQuery, kKeyValue, kExperts, kExpertHidden };

/// One row of a family's tensor table. `{layer}` and `{expert}` in the pattern are replaced; their presence says how
/// often the tensor occurs.
struct TensorPattern {
  const char* pattern;
  std::vector<Extent> shape;
  TensorRole role;
  TensorPart part;
  bool Architecture::*only_if = nullptr;    ///< Present only when this switch is on.
  bool Architecture::*unless_on = nullptr;  ///< Absent when this switch is on.
};

/// A family of checkpoints as data. Tables are in checkpoint order: before the layers, per layer (an `{expert}` run is
/// written expert by expert), after the layers.
struct Family {
  std::string name;
  std::string model_type;          ///< What `model_type` of config.json says.
  std::string transformers_class;  ///< What `architectures` of config.json says.
  std::vector<ConfigKey> keys;
  std::vector<TensorPattern> before_layers;
  std::vector<TensorPattern> per_layer;
  std::vector<TensorPattern> after_layers;
  double router_aux_loss_coef = 0.0;  ///< Written to config.json for transformers; Hestia does not read it.
  bool query_key_norm = false;
};

/// Allenai's OLMoE (arXiv 2409.02060).
[[nodiscard]] Family olmoe_family();

}  // namespace hestia
