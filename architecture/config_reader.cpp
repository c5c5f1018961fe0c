#include "config_reader.hpp"

#include <limits>

#include <fmt/format.h>

namespace hestia {
namespace {

bool is_whole(const Json& value) {
  const bool too_large =
      value.is_number_unsigned() &&
      value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  return value.is_number_integer() && !too_large;
}

template <class Value, class Accepts>
bool read_list(const Json& value, std::vector<Value>& out, const Accepts& accepts) {
  if (!value.is_array()) {
    return false;
  }
  std::vector<Value> list;
  for (const Json& item : value) {
    if (!accepts(item)) {
      return false;
    }
    list.push_back(item.get<Value>());
  }
  out = std::move(list);
  return true;
}

}  // namespace

std::string shown(const Json& value) {
  std::string text = value.dump();
  if (text.size() > 80) {
    text = text.substr(0, 77) + "...";
  }
  return text;
}

const Json* ConfigReader::find_in(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

void ConfigReader::read(const char* key, const Json& value, std::int64_t& out) {
  if (!is_whole(value)) {
    problem(fmt::format("\"{}\" must be a whole number, got {}; correct it", key, shown(value)));
    return;
  }
  out = value.get<std::int64_t>();
}

void ConfigReader::read(const char* key, const Json& value, double& out) {
  if (!value.is_number()) {
    problem(fmt::format("\"{}\" must be a number, got {}; correct it", key, shown(value)));
    return;
  }
  out = value.get<double>();
}

void ConfigReader::read(const char* key, const Json& value, bool& out) {
  if (!value.is_boolean()) {
    problem(fmt::format("\"{}\" must be true or false, got {}; correct it", key, shown(value)));
    return;
  }
  out = value.get<bool>();
}

void ConfigReader::read(const char* key, const Json& value, std::string& out) {
  if (!value.is_string()) {
    problem(fmt::format("\"{}\" must be a string, got {}; correct it", key, shown(value)));
    return;
  }
  out = value.get<std::string>();
}

void ConfigReader::read(const char* key, const Json& value, std::optional<double>& out) {
  double number = 0.0;
  const std::size_t before = problems_.messages().size();
  read(key, value, number);
  if (problems_.messages().size() == before) {
    out = number;
  }
}

void ConfigReader::read(const char* key, const Json& value, std::vector<std::int64_t>& out) {
  if (!read_list(value, out, is_whole)) {
    problem(fmt::format("\"{}\" must be a list of whole numbers, got {}; correct it", key, shown(value)));
  }
}

void ConfigReader::read(const char* key, const Json& value, std::vector<double>& out) {
  if (!read_list(value, out, [](const Json& item) { return item.is_number(); })) {
    problem(fmt::format("\"{}\" must be a list of numbers, got {}; correct it", key, shown(value)));
  }
}

}  // namespace hestia
