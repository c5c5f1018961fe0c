#include "hestia/core/json_lines.hpp"

#include <cerrno>
#include <system_error>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_depth.hpp"

namespace hestia {

namespace {

// Whether a file that is there ends in the middle of a line.
bool ends_within_line(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    return false;
  }
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || file.tellg() <= 0) {
    return false;
  }
  file.seekg(-1, std::ios::end);
  return file.get() != '\n';
}

}  // namespace

JsonLinesWriter::JsonLinesWriter(const std::filesystem::path& path, bool truncate)
    : path_(path), stream_(path, std::ios::binary | (truncate ? std::ios::trunc : std::ios::app)) {
  if (stream_ && !truncate && ends_within_line(path)) {  // a run that was cut off: its line must not take ours with it
    stream_ << '\n' << std::flush;
  }
  if (!stream_) {
    throw RunError(fmt::format("{}: cannot be opened for writing, {}; check the folder and permissions", path.string(),
                               std::system_category().message(errno)));
  }
}

void JsonLinesWriter::write(const Json& object) {
  // A lone surrogate or broken UTF-8 in a value must not end a run: it is replaced. dump() writes non-finite numbers as
  // null.
  stream_ << object.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n' << std::flush;  // in one piece
  if (!stream_) {
    throw RunError(fmt::format("{}: cannot be written; check space and permissions", path_.string()));
  }
}

void read_json_lines(const std::filesystem::path& path,
                     const std::function<void(std::int64_t line_number, const Json& object)>& visit) {
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  std::int64_t line_number = 0;
  std::size_t begin = 0;
  while (begin < text.size()) {
    std::size_t end = text.find('\n', begin);
    end = end == std::string_view::npos ? text.size() : end;
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    if (too_deep_json(line)) {
      throw InputError(fmt::format("{}:{}: nested more than {} deep, got \"{}\"", path.string(), line_number,
                                   kDeepestJson, line.substr(0, 60)));
    }
    if (line.find('\0') != std::string_view::npos) {  // which would end it for the parser
      throw InputError(fmt::format("{}:{}: holds a zero byte; the file is damaged, write or fetch it again",
                                   path.string(), line_number));
    }
    Json object;
    try {
      object = Json::parse(line);
    } catch (const nlohmann::json::exception&) {
      throw InputError(fmt::format("{}:{}: not JSON, got \"{}\"; every line must be one JSON object", path.string(),
                                   line_number, line.substr(0, 60)));
    }
    if (!object.is_object()) {
      throw InputError(fmt::format("{}:{}: not a JSON object, got {}; every line must be one JSON object",
                                   path.string(), line_number, object.type_name()));
    }
    visit(line_number, object);
  }
}

Json read_json_file(const std::filesystem::path& path) {
  const std::string text = read_text_file(path);
  if (too_deep_json(text)) {
    throw InputError(
        fmt::format("{}: nested more than {} deep; mend the file or fetch it again", path.string(), kDeepestJson));
  }
  if (text.find('\0') != std::string::npos) {
    throw InputError(fmt::format("{}: holds a zero byte; mend the file or fetch it again", path.string()));
  }
  try {
    return Json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    std::size_t line = 1;
    std::size_t column = 1;
    for (std::size_t i = 0; i + 1 < error.byte && i < text.size(); ++i) {
      ++column;
      if (text[i] == '\n') {
        ++line;
        column = 1;
      }
    }
    throw InputError(
        fmt::format("{}:{}:{}: not valid JSON; mend the file or fetch it again", path.string(), line, column));
  }
}

}  // namespace hestia
