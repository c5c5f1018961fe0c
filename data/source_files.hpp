#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/json_lines.hpp"

namespace hestia {

/// A file of text that a recipe names.
struct SourceFile {
  std::filesystem::path path;
  std::string id;  ///< Path below the folder that the recipe names: the same on every machine.
};

/// Where a recipe says that text is, and what to say when it is not there (see CorpusOptions).
struct SourcePaths {
  std::vector<std::string> paths;
  std::vector<std::string> suffixes{};
  std::string package{};
  std::string origin{};
};

/// All files that match, each once, in the order of `paths`. Throws InputError when nothing matches one of these: names
/// it, where to get it and `recipe_key`.paths.
[[nodiscard]] std::vector<SourceFile> find_files(const SourcePaths& options, const std::string& recipe_key);
/// Bytes of a file, inflated where its name ends in .gz or .dz. Throws InputError, also for damaged gzip data.
[[nodiscard]] std::string read_source(const std::filesystem::path& path);
/// The text with U+FFFD for each byte that is not UTF-8.
[[nodiscard]] std::string valid_utf8(std::string text);

/// How a JSON value is quoted back to the user: its first bytes.
[[nodiscard]] std::string quoted_json(const Json& value);
/// The object that one line of a JSON-lines file holds; `place` is file:line. Throws InputError for anything else.
[[nodiscard]] Json json_object(std::string_view content, const std::string& place);
/// Calls `visit` with number (from 1) and content of every line that is not blank, until it returns false.
void for_each_line(const std::string& text,
                   const std::function<bool(std::int64_t line, std::string_view content)>& visit);

}  // namespace hestia
