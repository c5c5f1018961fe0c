#pragma once

#include <memory>
#include <string>

#include "json_node.hpp"

namespace hestia {

/// One step that rewrites text before it is split. Thread-safe.
class Normalizer {
 public:
  Normalizer() = default;
  Normalizer(const Normalizer&) = delete;
  Normalizer& operator=(const Normalizer&) = delete;
  virtual ~Normalizer() = default;
  /// Rewrites `text` (valid UTF-8) in place. `prepend`: whether something may be put in front of it.
  virtual void apply(std::string& text, bool prepend) const = 0;
};

/// The normalizer of a `tokenizer.json`. Throws InputError naming a type that Hestia does not know.
[[nodiscard]] std::unique_ptr<Normalizer> make_normalizer(const JsonNode& node);

}  // namespace hestia
