#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include <nlohmann/json.hpp>

namespace hestia {

/// Ordered JSON: keys keep the order they were written in, so that files diff well.
using Json = nlohmann::ordered_json;

/// Appends one JSON object per line; every line is written in one piece and flushed, so the file is valid after each.
class JsonLinesWriter {
 public:
  /// Opens for append, on a new line where the file ends within one (`truncate` starts afresh). Throws RunError naming
  /// the path.
  explicit JsonLinesWriter(const std::filesystem::path& path, bool truncate = false);
  /// Writes one object. Non-finite numbers become null. Throws RunError when the disk refuses.
  void write(const Json& object);

 private:
  std::filesystem::path path_;
  std::ofstream stream_;
};

/// Calls `visit(line_number, object)` for every non-empty line; line numbers start at 1. Throws InputError with
/// file:line for a line that is not a JSON object.
void read_json_lines(const std::filesystem::path& path,
                     const std::function<void(std::int64_t line_number, const Json& object)>& visit);

/// Parses a whole JSON file. Throws InputError with path, line and column.
[[nodiscard]] Json read_json_file(const std::filesystem::path& path);

}  // namespace hestia
