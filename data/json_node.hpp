#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace hestia {

/// A value of a `tokenizer.json` with the words that say where it stands. Sorted objects: they hold 200,000 keys.
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {}

  [[nodiscard]] const nlohmann::json& value() const { return *value_; }
  [[nodiscard]] const std::string& where() const { return where_; }
  /// Throws InputError "where: problem".
  [[noreturn]] void fail(std::string_view problem) const;
  /// True when the object holds `key` and it is not null.
  [[nodiscard]] bool has(const char* key) const;
  /// The value of `key`. This and the following throw InputError when it is missing or of another type.
  [[nodiscard]] JsonNode at(const char* key) const;
  [[nodiscard]] std::string text(const char* key) const;
  [[nodiscard]] bool flag(const char* key) const;
  [[nodiscard]] bool flag(const char* key, bool otherwise) const { return has(key) ? flag(key) : otherwise; }
  /// An integer from 0 to 2^31 - 1.
  [[nodiscard]] std::int32_t integer(const char* key) const;
  [[nodiscard]] std::vector<JsonNode> list(const char* key) const;
  /// The text that this value is.
  [[nodiscard]] std::string as_text() const;

 private:
  const nlohmann::json* value_;
  std::string where_;
};

}  // namespace hestia
