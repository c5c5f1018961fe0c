#include "source_files.hpp"

#include <glob.h>
#include <zlib.h>

#include <algorithm>
#include <set>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_depth.hpp"

namespace hestia {

namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";
constexpr const char* kWildcards = "*?[{";

bool ends_with(std::string_view text, std::string_view ending) {
  return text.size() >= ending.size() && text.substr(text.size() - ending.size()) == ending;
}

bool is_compressed(const std::filesystem::path& path) {
  const std::string extension = path.extension().string();
  return extension == ".gz" || extension == ".dz";
}

bool wanted(const std::filesystem::path& path, const std::vector<std::string>& suffixes) {
  std::string name = path.filename().string();
  if (is_compressed(path)) {
    name.resize(name.size() - 3);
  }
  return suffixes.empty() ||
         std::any_of(suffixes.begin(), suffixes.end(), [&](const std::string& s) { return ends_with(name, s); });
}

std::vector<std::string> expand_glob(const std::string& pattern) {
  if (std::filesystem::exists(pattern)) {
    return {pattern};  // A name may hold brackets.
  }
  glob_t matches{};
  std::vector<std::string> paths;
  if (::glob(pattern.c_str(), GLOB_BRACE | GLOB_TILDE, nullptr, &matches) == 0) {
    paths.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
  }
  ::globfree(&matches);
  return paths;
}

// The folder before the first wildcard of a pattern.
std::filesystem::path fixed_folder(const std::string& pattern) {
  const std::string folder = pattern.substr(0, pattern.rfind('/', pattern.find_first_of(kWildcards)) + 1);
  const std::vector<std::string> expanded = expand_glob(folder);  // It may begin with ~.
  return expanded.empty() ? folder : expanded.front();
}

// The files that one entry of `paths` names, with an id each.
std::vector<SourceFile> match_files(const std::string& pattern, const std::vector<std::string>& suffixes) {
  std::vector<SourceFile> files;
  const bool has_wildcard = pattern.find_first_of(kWildcards) != std::string::npos && !std::filesystem::exists(pattern);
  for (const std::filesystem::path path : expand_glob(pattern)) {
    const bool is_folder = std::filesystem::is_directory(path);
    const std::filesystem::path base = has_wildcard ? fixed_folder(pattern) : (is_folder ? path : path.parent_path());
    const auto add = [&](const std::filesystem::path& file) {
      const std::filesystem::path below = file.lexically_relative(base);
      files.push_back({file, (below.empty() ? file : below).string()});
    };
    if (is_folder) {
      // Links to folders are not followed: the same document would come twice.
      for (const auto& entry : std::filesystem::recursive_directory_iterator(
               path, std::filesystem::directory_options::skip_permission_denied)) {
        if (entry.is_regular_file() && !entry.is_symlink() && wanted(entry.path(), suffixes)) {
          add(entry.path());
        }
      }
    } else if (std::filesystem::is_regular_file(path)) {
      add(path);
    }
  }
  return files;
}

std::string inflate_file(const std::filesystem::path& path) {
  gzFile file = ::gzopen(path.c_str(), "rb");
  if (file == nullptr) {
    throw InputError(fmt::format("{}: cannot be opened; check the path and permissions", path.string()));
  }
  ::gzbuffer(file, 1 << 17);
  std::string text;
  std::vector<char> buffer(1 << 18);
  int count = 0;
  while ((count = ::gzread(file, buffer.data(), static_cast<unsigned>(buffer.size()))) > 0) {
    text.append(buffer.data(), static_cast<std::size_t>(count));
  }
  int code = Z_OK;
  std::string reason = ::gzerror(file, &code);
  const bool plain = ::gzdirect(file) == 1;  // zlib hands on what does not begin like gzip data.
  const int closed = ::gzclose_r(file);
  if (count < 0 || code < 0 || closed != Z_OK || plain) {
    const std::string subject = path.string() + ": ";
    reason.erase(0, reason.rfind(subject, 0) == 0 ? subject.size() : 0);
    throw InputError(
        fmt::format("{}damaged gzip data ({}); install or fetch the file again", subject,
                    plain ? "it does not begin like gzip data" : (reason.empty() ? "it ends too early" : reason)));
  }
  return text;
}

// Length of the valid UTF-8 sequence at `position`, 0 when there is none.
std::size_t utf8_length(std::string_view text, std::size_t position) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[position + i]); };
  const unsigned char lead = byte(0);
  std::size_t length = 0;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead < 0x80) {
    return 1;
  }
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    low = lead == 0xE0 ? 0xA0 : 0x80;
    high = lead == 0xED ? 0x9F : 0xBF;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    low = lead == 0xF0 ? 0x90 : 0x80;
    high = lead == 0xF4 ? 0x8F : 0xBF;
  }
  if (length == 0 || position + length > text.size() || byte(1) < low || byte(1) > high) {
    return 0;
  }
  for (std::size_t i = 2; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) {
      return 0;
    }
  }
  return length;
}

}  // namespace

std::vector<SourceFile> find_files(const SourcePaths& options, const std::string& recipe_key) {
  std::vector<SourceFile> files;
  std::set<std::filesystem::path> seen;
  for (const std::string& pattern : options.paths) {
    std::vector<SourceFile> found;
    try {
      found = match_files(pattern, options.suffixes);
      for (const SourceFile& file : found) {
        // Under a second id the same text could fall into the other split.
        if (seen.insert(std::filesystem::canonical(file.path)).second) {
          files.push_back(file);
        }
      }
    } catch (const std::filesystem::filesystem_error& error) {
      throw InputError(fmt::format("{}.paths: \"{}\" cannot be looked up: {}{}; mend the path or its permissions",
                                   recipe_key, pattern, error.code().message(),
                                   error.path1().empty() ? "" : fmt::format(" ({})", error.path1().string())));
    }
    if (found.empty()) {
      const std::string ending =
          options.suffixes.empty() ? "" : fmt::format(" with names ending in {}", fmt::join(options.suffixes, ", "));
      std::string remedy;
      if (!options.package.empty()) {
        remedy = fmt::format("install the Debian package (apt-get install {}) or ", options.package);
      } else if (!options.origin.empty()) {
        remedy = fmt::format("fetch it from {} or ", options.origin);
      }
      throw InputError(fmt::format("{}.paths: nothing matches \"{}\"{}; {}point {}.paths elsewhere", recipe_key,
                                   pattern, ending, remedy, recipe_key));
    }
  }
  return files;
}

std::string read_source(const std::filesystem::path& path) {
  return is_compressed(path) ? inflate_file(path) : read_text_file(path);
}

std::string valid_utf8(std::string text) {
  std::string mended;
  std::size_t clean = 0;
  for (std::size_t position = 0; position < text.size();) {
    const std::size_t length = utf8_length(text, position);
    if (length > 0) {
      position += length;
      continue;
    }
    mended.append(text, clean, position - clean);
    mended += kReplacementCharacter;
    clean = ++position;
  }
  if (clean == 0) {
    return text;
  }
  mended.append(text, clean, std::string::npos);
  return mended;
}

std::string quoted_json(const Json& value) {
  constexpr std::size_t kMost = 60;
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMost) {
    text = valid_utf8(text.substr(0, kMost)) + "...";
  }
  return text;
}

Json json_object(std::string_view content, const std::string& place) {
  if (too_deep_json(content)) {
    throw InputError(
        fmt::format("{}: nested more than {} deep, got \"{}\"", place, kDeepestJson, content.substr(0, 60)));
  }
  if (content.find('\0') != std::string_view::npos) {  // which would end it for the parser
    throw InputError(fmt::format("{}: holds a zero byte, got \"{}\"; the file is damaged, fetch it again", place,
                                 content.substr(0, std::min<std::size_t>(60, content.find('\0')))));
  }
  Json object = Json::parse(content, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    const bool array = content[content.find_first_not_of(" \t\r")] == '[';
    throw InputError(fmt::format("{}: not a JSON object, got \"{}\"; every line must be one JSON object{}", place,
                                 content.substr(0, 60), array ? " (`jq -c '.[]'` makes lines of an array)" : ""));
  }
  return object;
}

void for_each_line(const std::string& text,
                   const std::function<bool(std::int64_t line, std::string_view content)>& visit) {
  std::int64_t line = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    ++line;
    const std::string_view content = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    if (content.find_first_not_of(" \t\r") != std::string_view::npos && !visit(line, content)) {
      return;
    }
  }
}

}  // namespace hestia
