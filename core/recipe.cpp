#include "hestia/core/recipe.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <yaml-cpp/yaml.h>

#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kRecipeVersion = 1;
constexpr const char* kVersionKey = "recipe_version";
constexpr const char* kOnCommandLine = " on the command line";
constexpr double kLargestExactInteger = 9007199254740992.0;  // 2^53

template <class... Visitors>
struct Overloaded : Visitors... {
  using Visitors::operator()...;
};
template <class... Visitors>
Overloaded(Visitors...) -> Overloaded<Visitors...>;

std::string join_key(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

std::string last_part(const std::string& key) {
  const std::size_t dot = key.rfind('.');
  return dot == std::string::npos ? key : key.substr(dot + 1);
}

const Field* find_field(const FieldList& list, std::string_view name) {
  const auto found =
      std::find_if(list.fields().begin(), list.fields().end(), [&](const Field& field) { return field.name == name; });
  return found == list.fields().end() ? nullptr : &*found;
}

// How a YAML node is quoted back to the user.
std::string shown(const YAML::Node& node) {
  if (!node || node.IsNull()) {
    return "nothing";
  }
  if (node.IsScalar()) {
    return fmt::format("\"{}\"", node.Scalar());
  }
  return node.IsSequence() ? "a list" : "a section";
}

bool is_quoted(const YAML::Node& node) {
  return node.Tag() == "!";
}

template <class Number>
bool parse_exactly(std::string_view text, Number& value) {
  if (text.size() > 1 && text.front() == '+' && text[1] != '-') {
    text.remove_prefix(1);
  }
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty();
}

bool parse_integer(const YAML::Node& node, std::int64_t& value) {
  if (!node.IsScalar() || is_quoted(node)) {
    return false;
  }
  if (parse_exactly(std::string_view(node.Scalar()), value)) {
    return true;
  }
  double number = 0.0;
  if (parse_exactly(std::string_view(node.Scalar()), number) && number == std::floor(number) &&
      std::abs(number) <= kLargestExactInteger) {
    value = static_cast<std::int64_t>(number);
    return true;
  }
  return false;
}

bool parse_number(const YAML::Node& node, double& value) {
  return node.IsScalar() && !is_quoted(node) && parse_exactly(std::string_view(node.Scalar()), value) &&
         std::isfinite(value);
}

bool parse_bool(const YAML::Node& node, bool& value) {
  if (!node.IsScalar() || is_quoted(node)) {
    return false;
  }
  const std::string& text = node.Scalar();
  value = text == "true" || text == "yes";
  return value || text == "false" || text == "no";
}

std::string bounds_text(const Bounds& bounds) {
  const bool low = std::isfinite(bounds.low);
  const bool high = std::isfinite(bounds.high);
  if (low && high) {
    return bounds.exclusive_low ? fmt::format("above {} and at most {}", bounds.low, bounds.high)
                                : fmt::format("between {} and {}", bounds.low, bounds.high);
  }
  if (low) {
    return bounds.exclusive_low ? fmt::format("above {}", bounds.low) : fmt::format("at least {}", bounds.low);
  }
  return high ? fmt::format("at most {}", bounds.high) : "";
}

bool inside(const Bounds& bounds, double value) {
  return (bounds.exclusive_low ? value > bounds.low : value >= bounds.low) && value <= bounds.high;
}

bool among(const std::vector<std::string>& choices, const std::string& value) {
  return choices.empty() || std::find(choices.begin(), choices.end(), value) != choices.end();
}

std::string wrong_choice(const std::string& where, const std::string& key, const std::vector<std::string>& choices,
                         const std::string& value) {
  const std::string near = nearest_name(value, choices);
  return fmt::format("{}: {} must be one of {}, got \"{}\"{}", where, key, fmt::join(choices, ", "), value,
                     near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near));
}

// The one document of `text`; null when there is none. Load alone would not look behind the first.
// Column of the first tab that indents line `number`, both counted from 0.
std::optional<int> tab_in_indentation(const std::string& text, int number) {
  std::size_t begin = 0;
  for (int line = 0; line < number && begin != std::string::npos; ++line) {
    begin = text.find('\n', begin);
    begin = begin == std::string::npos ? begin : begin + 1;
  }
  if (begin == std::string::npos) {
    return std::nullopt;
  }
  const std::size_t first = std::min(text.find_first_not_of(" \t", begin), text.size());
  const std::size_t tab = text.find('\t', begin);
  return tab < first ? std::optional<int>(static_cast<int>(tab - begin)) : std::nullopt;
}

YAML::Node load_yaml(const std::string& text) {
  const std::vector<YAML::Node> documents = YAML::LoadAll(text);
  // yaml-cpp overlooks a quote still open at a final line break, and would lose every key after it.
  if (!text.empty() && text.back() == '\n') {
    (void)YAML::LoadAll(text + "#");
  }
  if (documents.size() > 1) {
    throw YAML::ParserException(documents[1].Mark(), "there is a second document");
  }
  return documents.empty() ? YAML::Node() : documents.front();
}

using Locations = std::map<std::string, std::string>;

// Reads YAML nodes into fields; collects problems instead of stopping at them.
class Reader {
 public:
  Reader(std::string file, std::vector<std::string> known_keys, Problems& problems, Locations& locations)
      : file_(std::move(file)), known_keys_(std::move(known_keys)), problems_(problems), locations_(locations) {}

  // Every following node was written on the command line, as `text`.
  void from_command_line(const std::string& text) { command_line_ = text; }

  void section(const YAML::Node& node, const FieldList& list, const std::string& prefix, bool root) {
    if (!node.IsMap()) {
      problems_.add(fmt::format("{}: {} must be a section of \"key: value\" lines, got {}", place(node),
                                root ? "the recipe" : prefix, shown(node)));
      return;
    }
    std::set<std::string> seen;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) {
        problems_.add(fmt::format("{}: a key must be a word, got {}", place(entry.first), shown(entry.first)));
        continue;
      }
      const std::string& name = entry.first.Scalar();
      const std::string key = join_key(prefix, name);
      if (!seen.insert(name).second) {
        problems_.add(fmt::format("{}: the key \"{}\" appears twice; remove one", place(entry.first), key));
        continue;
      }
      if (root && name == kVersionKey) {
        version(entry.second);
        continue;
      }
      const Field* field = find_field(list, name);
      if (field == nullptr) {
        unknown(place(entry.first), key, list, prefix);
        continue;
      }
      located(key, entry.first);
      value(*field, entry.second, key, place(entry.second.IsNull() ? entry.first : entry.second));
    }
    if (root && seen.find(kVersionKey) == seen.end()) {
      problems_.add(fmt::format("{}: the key \"{}\" is missing; add \"{}: {}\"", file_, kVersionKey, kVersionKey,
                                kRecipeVersion));
    }
  }

  // Remembers where `key` was set; what an earlier value of it had set below it is gone.
  void located(const std::string& key, const YAML::Node& node) {
    for (auto entry = locations_.lower_bound(key + "."); entry != locations_.end() && below(entry->first, key);) {
      entry = locations_.erase(entry);
    }
    locations_[key] = command_line_.empty() ? place(node) : command_line_ + kOnCommandLine;
  }

  // After recipe and command line: which required keys did neither set?
  void require(const FieldList& list, const std::string& prefix, const std::string& where) {
    for (const Field& field : list.fields()) {
      const std::string key = join_key(prefix, field.name);
      const auto found = locations_.lower_bound(key + ".");
      const bool set = locations_.count(key) > 0 || (found != locations_.end() && below(found->first, key));
      if (field.required && !set) {
        problems_.add(fmt::format("{}: the key \"{}\" is missing; add it ({})", where, key, field.help));
        continue;
      }
      if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field.target)) {
        require(**nested, key, known_location(key, where));
      } else if (const auto* sections = std::get_if<SectionListRef>(&field.target)) {
        for (std::size_t i = 0; i < sections->size() && set; ++i) {
          const std::string item = fmt::format("{}.{}", key, i);
          require(sections->element(i), item, known_location(item, where));
        }
      }
    }
  }

  void value(const Field& field, const YAML::Node& node, const std::string& key, const std::string& where) {
    if (node.IsNull()) {
      problems_.add(fmt::format("{}: {} has no value; give one{} or remove the key to keep its default", where, key,
                                std::holds_alternative<std::string*>(field.target) ? " (\"\" is an empty text)" : ""));
      return;
    }
    std::visit(Overloaded{
                   [&](bool* target) {
                     bool parsed = false;
                     if (parse_bool(node, parsed)) {
                       *target = parsed;
                     } else {
                       wrong(where, key, "true or false", node);
                     }
                   },
                   [&](std::int64_t* target) { integer(field, node, key, where, *target); },
                   [&](double* target) { number(field, node, key, where, *target); },
                   [&](std::string* target) { text(field, node, key, where, *target); },
                   [&](std::vector<std::int64_t>* target) {
                     elements(node, key, where, "a list of integers", *target,
                              [&](const YAML::Node& item, const std::string& at, std::int64_t& out) {
                                integer(field, item, key, at, out);
                              });
                   },
                   [&](std::vector<double>* target) {
                     elements(node, key, where, "a list of numbers", *target,
                              [&](const YAML::Node& item, const std::string& at, double& out) {
                                number(field, item, key, at, out);
                              });
                   },
                   [&](std::vector<std::string>* target) {
                     elements(node, key, where, "a list of texts", *target,
                              [&](const YAML::Node& item, const std::string& at, std::string& out) {
                                text(field, item, key, at, out);
                              });
                   },
                   [&](const std::shared_ptr<FieldList>& nested) { section(node, *nested, key, false); },
                   [&](const SectionListRef& list) {
                     if (!node.IsSequence()) {
                       wrong(where, key, "a list of sections", node);
                       return;
                     }
                     list.resize(0);
                     list.resize(node.size());
                     for (std::size_t i = 0; i < node.size(); ++i) {
                       const std::string item_key = fmt::format("{}.{}", key, i);
                       located(item_key, node[i]);
                       section(node[i], list.element(i), item_key, false);
                     }
                   },
               },
               field.target);
  }

  void unknown(const std::string& where, const std::string& key, const FieldList& siblings, const std::string& prefix) {
    const std::string near = nearest_key(key, siblings, prefix);
    problems_.add(fmt::format("{}: unknown key \"{}\"; {}", where, key,
                              near.empty() ? "remove it" : fmt::format("did you mean \"{}\"?", near)));
  }

  [[nodiscard]] std::string place(const YAML::Node& node) const {
    return command_line_.empty() ? fmt::format("{}:{}", file_, std::max(node.Mark().line, 0) + 1) : "command line";
  }

  void version(const YAML::Node& node) {
    std::int64_t found = 0;
    if (!parse_integer(node, found) || found != kRecipeVersion) {
      problems_.add(fmt::format("{}: {} must be {}, got {}; this program reads version {} only", place(node),
                                kVersionKey, kRecipeVersion, shown(node), kRecipeVersion));
    }
  }

 private:
  void wrong(const std::string& where, const std::string& key, std::string_view expected, const YAML::Node& node) {
    problems_.add(fmt::format("{}: {} must be {}, got {}", where, key, expected, shown(node)));
  }

  [[nodiscard]] static bool below(const std::string& key, const std::string& section) {
    return key.size() > section.size() && key[section.size()] == '.' && key.compare(0, section.size(), section) == 0;
  }

  [[nodiscard]] std::string known_location(const std::string& key, const std::string& otherwise) const {
    const auto found = locations_.find(key);
    return found == locations_.end() ? otherwise : found->second;
  }

  // The key that was likely meant: a sibling, the same or nearly the same last part elsewhere, or a whole key of nearly
  // the same spelling.
  [[nodiscard]] std::string nearest_key(const std::string& key, const FieldList& siblings,
                                        const std::string& prefix) const {
    const std::string name = key.substr(prefix.empty() ? 0 : prefix.size() + 1);
    std::vector<std::string> names;
    for (const Field& field : siblings.fields()) {
      names.push_back(field.name);
    }
    std::string near = nearest_name(name, names);
    if (!near.empty()) {
      return join_key(prefix, near);
    }
    const std::string leaf = last_part(key);
    std::vector<std::string> leaves;
    std::vector<std::string> same_leaf;
    for (const std::string& known : known_keys_) {
      if (last_part(known) == leaf) {
        same_leaf.push_back(known);
      }
      leaves.push_back(last_part(known));
    }
    if (!same_leaf.empty()) {
      near = nearest_name(key, same_leaf);
      return near.empty() ? same_leaf.front() : near;
    }
    near = nearest_name(key, known_keys_);
    if (!near.empty()) {
      return near;
    }
    near = nearest_name(leaf, leaves);
    return near.empty() ? "" : known_keys_[std::find(leaves.begin(), leaves.end(), near) - leaves.begin()];
  }

  void integer(const Field& field, const YAML::Node& node, const std::string& key, const std::string& where,
               std::int64_t& target) {
    std::int64_t parsed = 0;
    double large = 0.0;
    if (!parse_integer(node, parsed)) {
      const bool whole = parse_number(node, large) && large == std::floor(large);
      wrong(where, key, whole ? "an integer of 64 bits" : "an integer", node);
    } else if (!inside(field.bounds, static_cast<double>(parsed))) {
      problems_.add(fmt::format("{}: {} must be {}, got {}", where, key, bounds_text(field.bounds), parsed));
    } else {
      target = parsed;
    }
  }

  void number(const Field& field, const YAML::Node& node, const std::string& key, const std::string& where,
              double& target) {
    double parsed = 0.0;
    if (!parse_number(node, parsed)) {
      wrong(where, key, "a finite number", node);
    } else if (!inside(field.bounds, parsed)) {
      problems_.add(fmt::format("{}: {} must be {}, got {}", where, key, bounds_text(field.bounds), parsed));
    } else {
      target = parsed;
    }
  }

  void text(const Field& field, const YAML::Node& node, const std::string& key, const std::string& where,
            std::string& target) {
    if (!node.IsScalar()) {
      wrong(where, key, "a text", node);
      return;
    }
    // What stands in for ${...} is known, and checked, later.
    if (node.Scalar().find("${") == std::string::npos && !among(field.choices, node.Scalar())) {
      problems_.add(wrong_choice(where, key, field.choices, node.Scalar()));
      return;
    }
    target = node.Scalar();
  }

  template <class Value, class Parse>
  void elements(const YAML::Node& node, const std::string& key, const std::string& where, std::string_view expected,
                std::vector<Value>& target, const Parse& parse) {
    if (!node.IsSequence()) {
      wrong(where, key, fmt::format("{} in brackets", expected), node);
      return;
    }
    std::vector<Value> values(node.size());
    for (std::size_t i = 0; i < node.size(); ++i) {
      if (node[i].IsNull()) {
        wrong(where, key, expected, node[i]);
        continue;
      }
      parse(node[i], place(node[i]), values[i]);
    }
    target = std::move(values);
  }

  std::string file_;
  std::vector<std::string> known_keys_;
  Problems& problems_;
  Locations& locations_;
  std::string command_line_;
};

// Applies one `key=value` to the field it names.
class OverrideApplier {
 public:
  OverrideApplier(Reader& reader, Problems& problems) : reader_(reader), problems_(problems) {}

  void apply(const std::string& text, const FieldList& root) {
    reader_.from_command_line(text);
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      problems_.add(fmt::format("command line: \"{}\" is not an override; write key=value", text));
      return;
    }
    const std::string key = text.substr(0, equals);
    YAML::Node node;
    try {
      node = load_yaml(text.substr(equals + 1));
    } catch (const YAML::Exception& error) {
      problems_.add(fmt::format("command line: {}: the value is not YAML, {}; put it in quotes ({}='\"...\"')", text,
                                error.msg, key));
      return;
    }
    if (key == kVersionKey) {
      reader_.version(node);
      return;
    }
    descend(key, key, "", node, root);
  }

 private:
  // `rest` is the part of `key` still to resolve below `prefix`.
  void descend(const std::string& key, const std::string& rest, const std::string& prefix, const YAML::Node& node,
               const FieldList& list) {
    const std::size_t dot = rest.find('.');
    const std::string name = rest.substr(0, dot);
    const Field* field = find_field(list, name);
    if (field == nullptr) {
      reader_.unknown("command line", key, list, prefix);
      return;
    }
    const std::string here = join_key(prefix, name);
    if (dot == std::string::npos) {
      reader_.located(here, node);
      reader_.value(*field, node, here, "command line");
      return;
    }
    const std::string below = rest.substr(dot + 1);
    if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field->target)) {
      descend(key, below, here, node, **nested);
    } else if (const auto* sections = std::get_if<SectionListRef>(&field->target)) {
      const std::size_t index_end = below.find('.');
      std::size_t index = 0;
      if (!parse_exactly(std::string_view(below).substr(0, index_end), index) || index > sections->size()) {
        wrong_index(here, sections->size(), below.substr(0, index_end));
        return;
      }
      if (index == sections->size()) {
        sections->resize(index + 1);
      }
      const std::string item = fmt::format("{}.{}", here, index);
      if (index_end == std::string::npos) {
        reader_.located(item, node);
        reader_.section(node, sections->element(index), item, false);
      } else {
        descend(key, below.substr(index_end + 1), item, node, sections->element(index));
      }
    } else if (auto* texts = std::get_if<std::vector<std::string>*>(&field->target)) {
      element(**texts, *field, node, below, here);
    } else if (auto* integers = std::get_if<std::vector<std::int64_t>*>(&field->target)) {
      element(**integers, *field, node, below, here);
    } else if (auto* numbers = std::get_if<std::vector<double>*>(&field->target)) {
      element(**numbers, *field, node, below, here);
    } else {
      reader_.unknown("command line", key, list, prefix);
    }
  }

  template <class Value>
  void element(std::vector<Value>& values, const Field& field, const YAML::Node& node, const std::string& index_text,
               const std::string& here) {
    std::size_t index = 0;
    if (!parse_exactly(std::string_view(index_text), index) || index > values.size()) {
      wrong_index(here, values.size(), index_text);
      return;
    }
    if (index == values.size()) {
      values.emplace_back();
    }
    Field single;
    single.name = field.name;
    single.bounds = field.bounds;
    single.choices = field.choices;
    single.target = &values[index];
    const std::string key = fmt::format("{}.{}", here, index);
    reader_.located(key, node);
    reader_.value(single, node, key, "command line");
  }

  void wrong_index(const std::string& key, std::size_t size, const std::string& index) {
    problems_.add(fmt::format(
        "command line: {} has {} element{}, got the index \"{}\"; {}", key, size, size == 1 ? "" : "s", index,
        size == 0 ? "0 appends the first" : fmt::format("0 to {} replace, {} appends", size - 1, size)));
  }

  Reader& reader_;
  Problems& problems_;
};

void visit_strings(const FieldList& list, const std::string& prefix,
                   const std::function<void(const std::string& key, std::string& value, const Field& field)>& visit) {
  for (const Field& field : list.fields()) {
    const std::string key = join_key(prefix, field.name);
    if (const auto* text = std::get_if<std::string*>(&field.target)) {
      visit(key, **text, field);
    } else if (const auto* texts = std::get_if<std::vector<std::string>*>(&field.target)) {
      for (std::size_t i = 0; i < (*texts)->size(); ++i) {
        visit(fmt::format("{}.{}", key, i), (**texts)[i], field);
      }
    } else if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field.target)) {
      visit_strings(**nested, key, visit);
    } else if (const auto* sections = std::get_if<SectionListRef>(&field.target)) {
      for (std::size_t i = 0; i < sections->size(); ++i) {
        visit_strings(sections->element(i), fmt::format("{}.{}", key, i), visit);
      }
    }
  }
}

// Replaces ${env:NAME}, ${env:NAME:-default} and ${key} in every string; $${ stands for a literal ${.
class Interpolator {
 public:
  Interpolator(const FieldList& list, const RecipeSource& source, Problems& problems)
      : source_(source), problems_(problems) {
    visit_strings(list, "", [&](const std::string& key, std::string& value, const Field& field) {
      values_[key] = {&value, field.choices};
    });
  }

  void run() {
    for (const auto& [key, text] : values_) {
      const std::size_t problems_before = problems_.messages().size();
      const bool deferred = text.value->find("${") != std::string::npos;
      resolve(key);
      if (deferred && problems_.messages().size() == problems_before && !among(text.choices, *text.value)) {
        problems_.add(wrong_choice(source_.location(key), key, text.choices, *text.value));
      }
    }
  }

 private:
  void resolve(const std::string& key) {
    if (done_.count(key) > 0) {
      return;
    }
    if (!active_.insert(key).second) {
      problems_.add(
          fmt::format("{}: {} refers to itself through ${{...}}; break the circle", source_.location(key), key));
      done_.insert(key);
      return;
    }
    std::string& value = *values_.at(key).value;
    std::string out;
    std::size_t position = 0;
    while (position < value.size()) {
      if (value.compare(position, 3, "$${") == 0) {
        out += "${";
        position += 3;
        continue;
      }
      if (value.compare(position, 2, "${") != 0) {
        out += value[position++];
        continue;
      }
      const std::size_t end = value.find('}', position);
      if (end == std::string::npos) {
        problems_.add(fmt::format(
            "{}: {} has a \"${{\" without \"}}\"; close it, or write \"$${{\" for the characters themselves",
            source_.location(key), key));
        out += value.substr(position);
        break;
      }
      out += replacement(key, value.substr(position + 2, end - position - 2));
      position = end + 1;
    }
    value = out;
    active_.erase(key);
    done_.insert(key);
  }

  std::string replacement(const std::string& key, const std::string& name) {
    if (name.rfind("env:", 0) == 0) {
      const std::size_t fallback = name.find(":-", 4);
      const std::string variable = name.substr(4, fallback == std::string::npos ? std::string::npos : fallback - 4);
      const char* found = std::getenv(variable.c_str());
      // As in a shell, ":-" also stands in for a variable that is set to nothing.
      if (found != nullptr && (*found != '\0' || fallback == std::string::npos)) {
        return found;
      }
      if (fallback != std::string::npos) {
        return name.substr(fallback + 2);
      }
      problems_.add(fmt::format(
          "{}: {} needs the environment variable {}, which is not set; set it or write ${{env:{}:-default}}",
          source_.location(key), key, variable, variable));
      return "";
    }
    const auto other = values_.find(name);
    if (other == values_.end()) {
      std::vector<std::string> names;
      for (const auto& [known, value] : values_) {
        names.push_back(known);
      }
      const std::string near = nearest_name(name, names);
      problems_.add(fmt::format("{}: {} refers to \"{}\", which is not a text key of this recipe{}",
                                source_.location(key), key, name,
                                near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near)));
      return "";
    }
    resolve(name);
    return *other->second.value;
  }

  const RecipeSource& source_;
  Problems& problems_;
  struct Text {
    std::string* value = nullptr;
    std::vector<std::string> choices;
  };
  std::map<std::string, Text> values_;
  std::set<std::string> done_;
  std::set<std::string> active_;
};

// A string as YAML: plain when nothing in it could be read as something else, double-quoted otherwise.
std::string yaml_text(const std::string& value) {
  std::string escaped;
  for (std::size_t i = 0; i < value.size(); ++i) {
    escaped += value.compare(i, 2, "${") == 0 ? "$$" : std::string(1, value[i]);
  }
  static const std::set<std::string> kWords = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"};
  std::string lower = escaped;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto letter = [](char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '/'; };
  const bool plain = !escaped.empty() && letter(escaped.front()) && kWords.count(lower) == 0 &&
                     std::all_of(escaped.begin(), escaped.end(), [&](char c) {
                       return letter(c) || std::isdigit(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '-';
                     });
  return plain ? escaped : Json(escaped).dump(-1, ' ', false, Json::error_handler_t::replace);
}

template <class Value, class Format>
std::string yaml_list(const std::vector<Value>& values, const Format& format) {
  std::vector<std::string> parts;
  parts.reserve(values.size());
  for (const Value& value : values) {
    parts.push_back(format(value));
  }
  return fmt::format("[{}]", fmt::join(parts, ", "));
}

// A value on one line; empty for sections and lists of sections.
std::string inline_value(const Field& field) {
  return std::visit(Overloaded{
                        [](const bool* value) { return std::string(*value ? "true" : "false"); },
                        [](const std::int64_t* value) { return std::to_string(*value); },
                        [](const double* value) { return fmt::format("{}", *value); },
                        [](const std::string* value) { return yaml_text(*value); },
                        [](const std::vector<std::int64_t>* values) {
                          return yaml_list(*values, [](std::int64_t value) { return std::to_string(value); });
                        },
                        [](const std::vector<double>* values) {
                          return yaml_list(*values, [](double value) { return fmt::format("{}", value); });
                        },
                        [](const std::vector<std::string>* values) { return yaml_list(*values, yaml_text); },
                        [](const std::shared_ptr<FieldList>&) { return std::string(); },
                        [](const SectionListRef&) { return std::string(); },
                    },
                    field.target);
}

void save_fields(const FieldList& list, const std::string& indent, std::string first_indent, std::string& out) {
  for (const Field& field : list.fields()) {
    const std::string& lead = first_indent.empty() ? indent : first_indent;
    if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field.target)) {
      const bool empty = (*nested)->fields().empty();  // "key:" alone would be read as no value
      out += fmt::format("{}{}:{}\n", lead, field.name, empty ? " {}" : "");
      save_fields(**nested, indent + "  ", "", out);
    } else if (const auto* sections = std::get_if<SectionListRef>(&field.target)) {
      if (sections->size() == 0) {
        out += fmt::format("{}{}: []\n", lead, field.name);
      } else {
        out += fmt::format("{}{}:\n", lead, field.name);
        for (std::size_t i = 0; i < sections->size(); ++i) {
          save_fields(sections->element(i), indent + "    ", indent + "  - ", out);
        }
      }
    } else {
      out += fmt::format("{}{}: {}\n", lead, field.name, inline_value(field));
    }
    first_indent.clear();
  }
}

struct Row {
  std::string key;
  std::string kind;
  std::string value;
  std::string help;
};

std::string kind_of(const Field& field) {
  std::string kind = std::visit(Overloaded{
                                    [](const bool*) { return "true or false"; },
                                    [](const std::int64_t*) { return "integer"; },
                                    [](const double*) { return "number"; },
                                    [](const std::string*) { return "text"; },
                                    [](const std::vector<std::int64_t>*) { return "integers"; },
                                    [](const std::vector<double>*) { return "numbers"; },
                                    [](const std::vector<std::string>*) { return "texts"; },
                                    [](const std::shared_ptr<FieldList>&) { return "section"; },
                                    [](const SectionListRef&) { return "sections"; },
                                },
                                field.target);
  if (!field.choices.empty()) {
    return fmt::format("{}", fmt::join(field.choices, "|"));
  }
  const std::string bounds = bounds_text(field.bounds);
  return bounds.empty() ? kind : kind + " " + bounds;
}

// Visits the first element of a list; of an empty one, an element that lives as long as the visit.
void with_first_element(const SectionListRef& sections, const std::function<void(const FieldList&)>& visit) {
  const bool empty = sections.size() == 0;
  if (empty) {
    sections.resize(1);
  }
  visit(sections.element(0));
  if (empty) {
    sections.resize(0);
  }
}

void describe(const FieldList& list, const std::string& prefix, std::vector<Row>& rows) {
  for (const Field& field : list.fields()) {
    const std::string key = join_key(prefix, field.name);
    if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field.target)) {
      describe(**nested, key, rows);
      continue;
    }
    rows.push_back({key, kind_of(field), field.required ? "required" : inline_value(field), field.help});
    if (const auto* sections = std::get_if<SectionListRef>(&field.target)) {
      with_first_element(*sections, [&](const FieldList& element) { describe(element, key + ".N", rows); });
    }
  }
}

}  // namespace

FieldList& FieldList::add_field(Field field) {
  fields_.push_back(std::move(field));
  return *this;
}

FieldList& FieldList::add(std::string name, bool& value, std::string help) {
  return add_field({std::move(name), std::move(help), &value, {}, {}, false});
}
FieldList& FieldList::add(std::string name, std::int64_t& value, std::string help, Bounds bounds) {
  return add_field({std::move(name), std::move(help), &value, bounds, {}, false});
}
FieldList& FieldList::add(std::string name, double& value, std::string help, Bounds bounds) {
  return add_field({std::move(name), std::move(help), &value, bounds, {}, false});
}
FieldList& FieldList::add(std::string name, std::string& value, std::string help, std::vector<std::string> choices) {
  return add_field({std::move(name), std::move(help), &value, {}, std::move(choices), false});
}
FieldList& FieldList::add(std::string name, std::vector<std::int64_t>& value, std::string help, Bounds bounds) {
  return add_field({std::move(name), std::move(help), &value, bounds, {}, false});
}
FieldList& FieldList::add(std::string name, std::vector<double>& value, std::string help, Bounds bounds) {
  return add_field({std::move(name), std::move(help), &value, bounds, {}, false});
}
FieldList& FieldList::add(std::string name, std::vector<std::string>& value, std::string help,
                          std::vector<std::string> choices) {
  return add_field({std::move(name), std::move(help), &value, {}, std::move(choices), false});
}
FieldList& FieldList::add_section(std::string name, FieldList section, std::string help) {
  return add_field({std::move(name), std::move(help), std::make_shared<FieldList>(std::move(section)), {}, {}, false});
}
FieldList& FieldList::required() {
  fields_.back().required = true;
  return *this;
}

std::string RecipeSource::location(const std::string& key) const {
  std::string part = key;
  while (true) {
    for (const auto& [known, where] : locations_) {
      if (known == part) {
        return where;
      }
    }
    const std::size_t dot = part.rfind('.');
    if (dot == std::string::npos) {
      return path_.string();
    }
    part.resize(dot);
  }
}

bool RecipeSource::is_set(const std::string& key) const {
  return std::any_of(locations_.begin(), locations_.end(),
                     [&](const auto& entry) { return entry.first == key || entry.first.rfind(key + ".", 0) == 0; });
}

bool RecipeSource::is_overridden(const std::string& key) const {
  return std::any_of(locations_.begin(), locations_.end(), [&](const auto& entry) {
    return entry.first == key && std::any_of(overrides_.begin(), overrides_.end(), [&](const std::string& text) {
             return entry.second == text + kOnCommandLine;
           });
  });
}

RecipeSource read_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides,
                         const FieldList& fields, Problems& problems) {
  const std::string text = read_text_file(path);
  RecipeSource source;
  source.path_ = path;
  source.overrides_ = overrides;
  source.hash_ = sha256_hex(std::as_bytes(std::span(text)));
  YAML::Node root;
  try {
    root = load_yaml(text);
  } catch (const YAML::Exception& error) {
    const int line = std::max(error.mark.line, 0);
    if (const std::optional<int> column = tab_in_indentation(text, line)) {
      throw UsageError(fmt::format("{}:{}:{}: not YAML, a tab in the indentation; use spaces", path.string(), line + 1,
                                   *column + 1));
    }
    throw UsageError(fmt::format("{}:{}:{}: not YAML, {}; check indentation, quotes and tabs", path.string(), line + 1,
                                 std::max(error.mark.column, 0) + 1, error.msg));
  }
  Locations locations;
  std::vector<std::string> known_keys = field_keys(fields);
  known_keys.emplace_back(kVersionKey);
  Reader reader(path.string(), std::move(known_keys), problems, locations);
  reader.section(root, fields, "", true);
  OverrideApplier applier(reader, problems);
  for (const std::string& override_text : overrides) {
    applier.apply(override_text, fields);
  }
  reader.require(fields, "", path.string());
  source.locations_.assign(locations.begin(), locations.end());
  Interpolator(fields, source, problems).run();
  return source;
}

RecipeSource read_overrides(const std::vector<std::string>& overrides, const FieldList& fields, Problems& problems) {
  RecipeSource source;
  source.path_ = "command line";
  source.overrides_ = overrides;
  Locations locations;
  Reader reader(source.path_.string(), field_keys(fields), problems, locations);
  OverrideApplier applier(reader, problems);
  for (const std::string& override_text : overrides) {
    applier.apply(override_text, fields);
  }
  reader.require(fields, "", source.path_.string());
  source.locations_.assign(locations.begin(), locations.end());
  Interpolator(fields, source, problems).run();
  return source;
}

std::string save_recipe(const FieldList& fields) {
  std::string out = fmt::format("recipe_version: {}\n", kRecipeVersion);
  save_fields(fields, "", "", out);
  return out;
}

std::string describe_fields(const FieldList& fields) {
  std::vector<Row> rows;
  describe(fields, "", rows);
  std::size_t key_width = 0;
  std::size_t kind_width = 0;
  std::size_t value_width = 0;
  for (const Row& row : rows) {
    key_width = std::max(key_width, row.key.size());
    kind_width = std::max(kind_width, row.kind.size());
    value_width = std::max(value_width, row.value.size());
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line = fmt::format("{:<{}}  {:<{}}  {:<{}}  {}", row.key, key_width, row.kind, kind_width, row.value,
                                   value_width, row.help);
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::vector<std::string> field_keys(const FieldList& fields) {
  std::vector<std::string> keys;
  const std::function<void(const FieldList&, const std::string&)> walk = [&](const FieldList& list,
                                                                             const std::string& prefix) {
    for (const Field& field : list.fields()) {
      const std::string key = join_key(prefix, field.name);
      keys.push_back(key);
      if (const auto* nested = std::get_if<std::shared_ptr<FieldList>>(&field.target)) {
        walk(**nested, key);
      } else if (const auto* sections = std::get_if<SectionListRef>(&field.target)) {
        with_first_element(*sections, [&](const FieldList& element) { walk(element, key + ".N"); });
      }
    }
  };
  walk(fields, "");
  return keys;
}

}  // namespace hestia
