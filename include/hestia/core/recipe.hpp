#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "hestia/core/error.hpp"

namespace hestia {

class FieldList;

/// Closed interval a number must lie in. `exclusive_low` excludes the lower end (for rates that must be positive).
struct Bounds {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool exclusive_low = false;
};

/// A list whose elements are sections (for example `data.train`), type-erased: `resize`, then `element(i)`.
struct SectionListRef {
  std::function<std::size_t()> size;
  std::function<void(std::size_t)> resize;
  std::function<FieldList(std::size_t)> element;
};

/// One field of a recipe struct: its key, where its value lives, what it may hold, one line of help.
/// The pointers refer to the struct that made the list and must not outlive it.
struct Field {
  std::string name;
  std::string help;
  std::variant<bool*, std::int64_t*, double*, std::string*, std::vector<std::int64_t>*, std::vector<double>*,
               std::vector<std::string>*, std::shared_ptr<FieldList>, SectionListRef>
      target;
  Bounds bounds;                     ///< For numbers and lists of numbers (each element).
  std::vector<std::string> choices;  ///< For strings and lists of strings; empty: anything.
  bool required = false;             ///< The key must be present.
};

/// The single description of an options struct. It drives reading, validation, `--help`, printing and saving.
///
///     FieldList TrainOptions::fields() {
///       FieldList list;
///       list.add("steps", steps, "optimiser steps", {.low = 1});
///       list.add("schedule", schedule, "learning-rate decay", {"linear", "cosine", "constant"});
///       return list;
///     }
///
/// Every options struct has a member `FieldList fields()`.
class FieldList {
 public:
  FieldList& add(std::string name, bool& value, std::string help);
  FieldList& add(std::string name, std::int64_t& value, std::string help, Bounds bounds = {});
  FieldList& add(std::string name, double& value, std::string help, Bounds bounds = {});
  FieldList& add(std::string name, std::string& value, std::string help, std::vector<std::string> choices = {});
  FieldList& add(std::string name, std::vector<std::int64_t>& value, std::string help, Bounds bounds = {});
  FieldList& add(std::string name, std::vector<double>& value, std::string help, Bounds bounds = {});
  FieldList& add(std::string name, std::vector<std::string>& value, std::string help,
                 std::vector<std::string> choices = {});
  /// A nested section.
  FieldList& add_section(std::string name, FieldList section, std::string help);
  /// A list of sections; `Item` is default-constructible and has `FieldList fields()`.
  template <class Item>
  FieldList& add_list(std::string name, std::vector<Item>& items, std::string help) {
    return add_field(
        Field{std::move(name),
              std::move(help),
              SectionListRef{[&items] { return items.size(); }, [&items](std::size_t size) { items.resize(size); },
                             [&items](std::size_t i) { return items[i].fields(); }},
              {},
              {},
              false});
  }
  /// Marks the field added last as required.
  FieldList& required();
  [[nodiscard]] const std::vector<Field>& fields() const noexcept { return fields_; }

 private:
  FieldList& add_field(Field field);
  std::vector<Field> fields_;
};

/// Where a recipe's values came from, for messages after reading: `location("train.steps")` gives `recipe.yaml:14`, or
/// `train.steps=0 on the command line`; for a key left at its default, the place of the nearest section around it that
/// is written, or the file name.
class RecipeSource {
 public:
  [[nodiscard]] std::string location(const std::string& key) const;
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  /// True when the recipe or an override sets `key` (a section counts when any key below it is set).
  [[nodiscard]] bool is_set(const std::string& key) const;
  /// True when the value of `key` was written on the command line.
  [[nodiscard]] bool is_overridden(const std::string& key) const;
  /// SHA-256 of the recipe file's bytes.
  [[nodiscard]] const std::string& hash() const noexcept { return hash_; }
  [[nodiscard]] const std::vector<std::string>& overrides() const noexcept { return overrides_; }

 private:
  friend RecipeSource read_recipe(const std::filesystem::path&, const std::vector<std::string>&, const FieldList&,
                                  Problems&);
  friend RecipeSource read_overrides(const std::vector<std::string>&, const FieldList&, Problems&);
  std::filesystem::path path_;
  std::string hash_;
  std::vector<std::string> overrides_;
  std::vector<std::pair<std::string, std::string>> locations_;
};

/// Reads a YAML recipe into the struct behind `fields`, then applies `key=value` overrides (split at the first `=`;
/// dotted keys; list elements by index `data.train.0.path=...`; the value is YAML). Adds to `problems`, with
/// `file:line: `: unknown keys (with the nearest known key), duplicate keys, wrong types, values out of bounds or not
/// among the choices, missing required keys, an absent or unsupported `recipe_version` (must be 1).
/// `${env:NAME}` and `${env:NAME:-default}` inside string values are replaced by the environment; `${key.path}` by
/// another string key of the same recipe; `$${` stands for the characters `${`. Relative paths are left as written.
/// Throws InputError when the file is missing, UsageError with file:line:column when it is not YAML.
[[nodiscard]] RecipeSource read_recipe(const std::filesystem::path& path, const std::vector<std::string>& overrides,
                                       const FieldList& fields, Problems& problems);

/// Overrides alone, for verbs without a recipe: as read_recipe, with the defaults of `fields` in place of a file.
[[nodiscard]] RecipeSource read_overrides(const std::vector<std::string>& overrides, const FieldList& fields,
                                          Problems& problems);

/// The resolved values as YAML, `recipe_version: 1` first, keys in field order; reading it back gives the same values
/// (doubles printed with as many digits as that takes, at most 17).
[[nodiscard]] std::string save_recipe(const FieldList& fields);

/// Help text: one aligned row per dotted key with type, bounds or choices, default (the value held now) and help.
[[nodiscard]] std::string describe_fields(const FieldList& fields);

/// All dotted keys, in order; `N` stands for the index of a list of sections (`data.corpora.N.domain`).
[[nodiscard]] std::vector<std::string> field_keys(const FieldList& fields);

}  // namespace hestia
