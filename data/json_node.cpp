#include "json_node.hpp"

#include <fmt/format.h>

#include "hestia/core/error.hpp"

namespace hestia {

void JsonNode::fail(std::string_view problem) const {
  throw InputError(fmt::format("{}: {}", where_, problem));
}

bool JsonNode::has(const char* key) const {
  return value_->is_object() && value_->contains(key) && !value_->at(key).is_null();
}

JsonNode JsonNode::at(const char* key) const {
  if (!value_->is_object()) {
    fail(fmt::format("must be an object with \"{}\", got {}; fetch the file again", key, value_->type_name()));
  }
  if (!has(key)) {
    fail(fmt::format("\"{}\" is missing; fetch the file again", key));
  }
  return {value_->at(key), fmt::format("{}.{}", where_, key)};
}

std::string JsonNode::as_text() const {
  if (!value_->is_string()) {
    fail(fmt::format("must be a text, got {}; fetch the file again", value_->type_name()));
  }
  return value_->get<std::string>();
}

std::string JsonNode::text(const char* key) const {
  return at(key).as_text();
}

bool JsonNode::flag(const char* key) const {
  const JsonNode node = at(key);
  if (!node.value().is_boolean()) {
    node.fail(fmt::format("must be true or false, got {}; fetch the file again", node.value().type_name()));
  }
  return node.value().get<bool>();
}

std::int32_t JsonNode::integer(const char* key) const {
  const JsonNode node = at(key);
  if (!node.value().is_number_unsigned() || node.value().get<std::uint64_t>() > INT32_MAX) {
    node.fail(
        fmt::format("must be an integer from 0 to {}, got {}; fetch the file again", INT32_MAX, node.value().dump()));
  }
  return node.value().get<std::int32_t>();
}

std::vector<JsonNode> JsonNode::list(const char* key) const {
  const JsonNode node = at(key);
  if (!node.value().is_array()) {
    node.fail(fmt::format("must be a list, got {}; fetch the file again", node.value().type_name()));
  }
  std::vector<JsonNode> nodes;
  nodes.reserve(node.value().size());
  for (std::size_t i = 0; i < node.value().size(); ++i) {
    nodes.emplace_back(node.value()[i], fmt::format("{}[{}]", node.where(), i));
  }
  return nodes;
}

}  // namespace hestia
