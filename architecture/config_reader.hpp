#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia {

/// Reads single values of a `config.json`, collecting what is wrong instead of stopping at the first.
class ConfigReader {
 public:
  ConfigReader(const Json& config, std::string subject, Problems& problems)
      : config_(config), subject_(std::move(subject)), problems_(problems) {}

  /// The value of `key`, or nullptr when it is absent or null.
  [[nodiscard]] const Json* find(const char* key) const { return find_in(config_, key); }
  /// Whether `key` stands there, null or not.
  [[nodiscard]] bool has(const char* key) const { return config_.contains(key); }
  [[nodiscard]] static const Json* find_in(const Json& object, const char* key);

  void problem(const std::string& text) { problems_.add(subject_ + ": " + text); }

  /// Sets `out` when `value`, which stands at `key`, has its type; a problem otherwise.
  void read(const char* key, const Json& value, std::int64_t& out);
  void read(const char* key, const Json& value, double& out);
  void read(const char* key, const Json& value, bool& out);
  void read(const char* key, const Json& value, std::string& out);
  void read(const char* key, const Json& value, std::optional<double>& out);
  void read(const char* key, const Json& value, std::vector<std::int64_t>& out);
  void read(const char* key, const Json& value, std::vector<double>& out);
  /// The same for a key that may be absent or null, which leaves `out` as it is.
  template <class Value>
  void read_optional(const char* key, Value& out) {
    if (const Json* value = find(key); value != nullptr) {
      read(key, *value, out);
    }
  }

 private:
  const Json& config_;
  std::string subject_;
  Problems& problems_;
};

/// A value as it stands in messages: long ones (a whole nested object) would bury them.
[[nodiscard]] std::string shown(const Json& value);

}  // namespace hestia
