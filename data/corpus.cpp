#include "hestia/data/corpus.hpp"

#include <glob.h>
#include <zlib.h>

#include <algorithm>
#include <numeric>
#include <regex>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/random.hpp"
#include "templates.hpp"

namespace hestia {

namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";
constexpr const char* kWildcards = "*?[{";
constexpr std::string_view kPlaceholder = "{prompt}";
// std::regex recurses once per character: a line of 100 kB would overflow the stack.
constexpr std::size_t kMaxMatchedBytes = 1000;

// Names of fields in the data sets that are about, used where a recipe names none.
const std::vector<std::string> kQuestionFields = {"question", "instruction", "prompt"};
const std::vector<std::string> kContextFields = {"context", "input"};
const std::vector<std::string> kAnswerFields = {"answer", "response", "output", "completion"};
const std::vector<std::string> kMessagesFields = {"messages", "conversations"};

struct SourceFile {
  std::filesystem::path path;
  std::string id;  // Path below the folder that the recipe names: the same on every machine.
};

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

std::vector<SourceFile> find_files(const CorpusOptions& options, const std::string& recipe_key) {
  std::vector<SourceFile> files;
  std::set<std::filesystem::path> seen;
  for (const std::string& pattern : options.paths) {
    const std::vector<SourceFile> found = match_files(pattern, options.suffixes);
    for (const SourceFile& file : found) {
      // Under a second id the same text could fall into the other split.
      if (seen.insert(std::filesystem::canonical(file.path)).second) {
        files.push_back(file);
      }
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

std::string read_source(const std::filesystem::path& path) {
  return is_compressed(path) ? inflate_file(path) : read_text_file(path);
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

double unit_hash(std::uint64_t seed, std::string_view purpose, std::string_view id) {
  return static_cast<double>(derive_seed(derive_seed(seed, purpose), id) >> 11) * 0x1.0p-53;
}

// Cuts at the last line break before the limit (at the limit when a line is longer), never inside a character.
std::vector<std::string> cut(const std::string& text, std::size_t limit) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (text.size() - begin > limit) {
    std::size_t end = text.rfind('\n', begin + limit - 1);
    if (end == std::string::npos || end < begin) {
      end = begin + limit;
      while (end > begin + 1 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
        --end;
      }
    } else {
      ++end;
    }
    parts.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  if (begin < text.size()) {
    parts.push_back(text.substr(begin));
  }
  return parts;
}

bool matches_line(std::string_view line, const std::regex& pattern) {
  while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) {
    line.remove_suffix(1);
  }
  const auto flags =
      line.size() > kMaxMatchedBytes ? std::regex_constants::match_not_eol : std::regex_constants::match_default;
  line = line.substr(0, kMaxMatchedBytes);
  return std::regex_search(line.begin(), line.end(), pattern, flags);
}

// Splits at lines that match; pieces below `min_bytes` join their successor.
std::vector<std::string> split_at_lines(const std::string& text, const std::regex& separator, std::size_t min_bytes) {
  std::vector<std::string> pieces(1);
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = std::min(text.find('\n', begin), text.size() - 1) + 1;
    if (pieces.back().size() >= min_bytes && !pieces.back().empty() &&
        matches_line(std::string_view(text).substr(begin, end - begin), separator)) {
      pieces.emplace_back();
    }
    pieces.back().append(text, begin, end - begin);
    begin = end;
  }
  return pieces;
}

class CorpusReader {
 public:
  CorpusReader(const CorpusOptions& options, const SplitOptions& split_options, Split split, std::string recipe_key)
      : options_(options), split_options_(split_options), split_(split), recipe_key_(std::move(recipe_key)) {
    if (!options.separator.empty()) {
      try {
        separator_ = std::regex(options.separator, std::regex::ECMAScript | std::regex::optimize);
      } catch (const std::regex_error&) {
        throw UsageError(fmt::format("{}.separator is not a regular expression, got \"{}\"; mend it", recipe_key_,
                                     options.separator));
      }
    }
    if (!options.prompt_field.empty() && options.prompt_template.find(kPlaceholder) == std::string::npos) {
      throw UsageError(fmt::format("{}.prompt_template must contain {}, got \"{}\"; add it", recipe_key_, kPlaceholder,
                                   options.prompt_template));
    }
  }

  std::vector<Document> run() {
    std::vector<SourceFile> files = find_files(options_, recipe_key_);
    shuffle(files);
    const bool whole_files = options_.format == "text" && options_.separator.empty();
    for (const SourceFile& file : files) {
      if (options_.max_bytes > 0 && bytes_ >= options_.max_bytes) {
        break;
      }
      if (whole_files) {
        if (in_split(file.id)) {
          add_text(file.id, valid_utf8(read_source(file.path)));
        }
      } else if (options_.format == "text") {
        read_separated(file);
      } else {
        read_json(file);
      }
    }
    if (!whole_files) {
      shuffle(documents_);
      trim();
    }
    return std::move(documents_);
  }

 private:
  template <class Item>
  void shuffle(std::vector<Item>& items) const {
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t i = 0; i < items.size(); ++i) {
      order.emplace_back(unit_hash(split_options_.seed, "order", items[i].id), i);
    }
    std::sort(order.begin(), order.end());  // Equal ids (of two folders): as they came.
    std::vector<Item> shuffled;
    shuffled.reserve(items.size());
    for (const auto& [key, index] : order) {
      shuffled.push_back(std::move(items[index]));
    }
    items = std::move(shuffled);
  }

  [[nodiscard]] bool in_split(const std::string& id) const {
    const bool held_out = unit_hash(split_options_.seed, "split", id) < split_options_.held_out_fraction;
    return held_out == (split_ == Split::kHeldOut);
  }

  void add_text(const std::string& id, const std::string& text) {
    if (static_cast<std::int64_t>(text.size()) < options_.min_document_bytes) {
      return;
    }
    add_parts(id, text);
  }

  void add_parts(const std::string& id, const std::string& text) {
    const auto limit = static_cast<std::size_t>(options_.max_document_bytes);
    if (text.size() <= limit) {
      add(Document(id, options_.domain, "", text));
      return;
    }
    std::size_t number = 0;
    for (std::string& part : cut(text, limit)) {
      add(Document(fmt::format("{}#part{}", id, number++), options_.domain, "", std::move(part)));
    }
  }

  void add(Document document) {
    bytes_ += document.num_bytes();
    documents_.push_back(std::move(document));
  }

  void read_separated(const SourceFile& file) {
    std::size_t number = 0;
    for (const std::string& piece : split_at_lines(valid_utf8(read_source(file.path)), separator_,
                                                   static_cast<std::size_t>(options_.min_document_bytes))) {
      const std::string id = fmt::format("{}#{}", file.id, number++);
      if (in_split(id)) {
        add_text(id, piece);
      }
    }
  }

  void read_json(const SourceFile& file) {
    const std::string text = valid_utf8(read_source(file.path));
    std::int64_t line = 0;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find('\n', begin), text.size());
      ++line;
      const std::string_view content = std::string_view(text).substr(begin, end - begin);
      begin = end + 1;
      if (content.find_first_not_of(" \t\r") != std::string_view::npos) {
        add_json(file, line, content);
      }
    }
  }

  // One line of a JSON-lines file, for messages.
  struct Place {
    const std::filesystem::path& path;
    std::int64_t line = 0;
    [[nodiscard]] std::string text() const { return fmt::format("{}:{}", path.string(), line); }
  };

  void add_json(const SourceFile& file, std::int64_t line, std::string_view content) {
    const Place place{file.path, line};
    const Json object = Json::parse(content, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) {
      const bool array = content[content.find_first_not_of(" \t\r")] == '[';
      throw InputError(fmt::format("{}: not a JSON object, got \"{}\"; every line must be one JSON object{}",
                                   place.text(), content.substr(0, 60),
                                   array ? " (`jq -c '.[]'` makes lines of an array)" : ""));
    }
    // Wrong lines of either split are told, so that a run does not first meet one at its evaluation.
    const std::string id = fmt::format("{}#{}", file.id, line);
    if (options_.format == "question_answer") {
      add_example(id, question_and_answer(object, place));
    } else if (options_.format == "chat") {
      add_example(id, conversation(object, place));
    } else {
      add_json_text(id, object, place);
    }
  }

  void add_json_text(const std::string& id, const Json& object, const Place& place) {
    const std::string completion = field(object, options_.text_field, {}, "text_field", place);
    const std::string prompt =
        options_.prompt_field.empty() ? "" : field(object, options_.prompt_field, {}, "prompt_field", place);
    if (!in_split(id) || completion.empty()) {
      return;
    }
    if (options_.prompt_field.empty()) {
      add_parts(id, completion);
      return;
    }
    std::string laid_out = options_.prompt_template;
    laid_out.replace(laid_out.find(kPlaceholder), kPlaceholder.size(), prompt);
    add(Document(id, options_.domain, std::move(laid_out), completion));
  }

  void add_example(const std::string& id, std::vector<Message> messages) {
    const bool has_answer = std::any_of(messages.begin(), messages.end(), [](const Message& message) {
      return message.role == Role::kAssistant && !message.content.empty();
    });
    if (!in_split(id) || !has_answer) {
      return;
    }
    if (!options_.system_message.empty() && messages.front().role != Role::kSystem) {
      messages.insert(messages.begin(), {Role::kSystem, options_.system_message});
    }
    Document document;
    document.id = id;
    document.domain = options_.domain;
    render_messages(options_.chat_template, messages, document);
    add(std::move(document));
  }

  [[nodiscard]] std::vector<Message> question_and_answer(const Json& object, const Place& place) const {
    const std::string question = field(object, options_.question_field, kQuestionFields, "question_field", place);
    const std::string answer = field(object, options_.answer_field, kAnswerFields, "answer_field", place);
    std::string context;
    const std::string name = known_name(object, options_.context_field, kContextFields);
    if (!name.empty() && object.contains(name) && !object.at(name).is_null()) {
      context = text_of(object.at(name), name, place);
    }
    return {{Role::kUser, question, context}, {Role::kAssistant, answer}};
  }

  [[nodiscard]] std::vector<Message> conversation(const Json& object, const Place& place) const {
    const std::string name = known_name(object, options_.messages_field, kMessagesFields);
    if (name.empty() || !object.contains(name)) {
      throw_missing(object, options_.messages_field, kMessagesFields, "list", "messages_field", place);
    }
    const Json& list = object.at(name);
    if (!list.is_array() || list.empty()) {
      throw InputError(fmt::format("{}: \"{}\" must be a list of messages, got {}; mend or remove this line",
                                   place.text(), name, shown(list)));
    }
    std::vector<Message> messages;
    for (std::size_t i = 0; i < list.size(); ++i) {
      messages.push_back(message(list[i], fmt::format("{}.{}", name, i), i == 0, place));
    }
    if (std::none_of(messages.begin(), messages.end(),
                     [](const Message& message) { return message.role == Role::kAssistant; })) {
      throw InputError(fmt::format("{}: \"{}\" has no message of the assistant, got {} messages; remove this line",
                                   place.text(), name, messages.size()));
    }
    return messages;
  }

  // {"role": ..., "content": ...}, or {"from": ..., "value": ...} of ShareGPT.
  [[nodiscard]] static Message message(const Json& object, const std::string& key, bool first, const Place& place) {
    if (!object.is_object()) {
      throw InputError(fmt::format("{}: \"{}\" must be an object with role and content, got {}; mend this line",
                                   place.text(), key, shown(object)));
    }
    const auto part = [&](const char* name, const char* other) {
      const char* present = object.contains(name) ? name : other;
      if (!object.contains(present)) {
        throw InputError(fmt::format("{}: \"{}\" has neither \"{}\" nor \"{}\", got {}; mend this line", place.text(),
                                     key, name, other, shown(object)));
      }
      return text_of(object.at(present), fmt::format("{}.{}", key, present), place);
    };
    const std::string role = part("role", "from");
    Message message;
    message.content = part("content", "value");
    if (role == "assistant" || role == "gpt") {
      message.role = Role::kAssistant;
    } else if (role == "user" || role == "human") {
      message.role = Role::kUser;
    } else if (role == "system" && first) {
      message.role = Role::kSystem;
    } else {
      throw InputError(fmt::format(
          "{}: the role of \"{}\" must be user (human), assistant (gpt) or, in the first message, system, got \"{}\"; "
          "mend or remove this line",
          place.text(), key, role));
    }
    return message;
  }

  // How a JSON value is quoted back to the user.
  static std::string shown(const Json& value) {
    constexpr std::size_t kMost = 60;
    std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (text.size() > kMost) {
      text = valid_utf8(text.substr(0, kMost)) + "...";
    }
    return text;
  }

  static std::string text_of(const Json& value, const std::string& key, const Place& place) {
    if (!value.is_string()) {
      throw InputError(
          fmt::format("{}: \"{}\" must be text, got {}; mend or remove this line", place.text(), key, shown(value)));
    }
    return value.get<std::string>();
  }

  // The field that a recipe names, or else the first known one that this record has; may be empty.
  [[nodiscard]] static std::string known_name(const Json& object, const std::string& name,
                                              const std::vector<std::string>& known) {
    if (!name.empty()) {
      return name;
    }
    const auto found =
        std::find_if(known.begin(), known.end(), [&](const std::string& other) { return object.contains(other); });
    return found == known.end() ? "" : *found;
  }

  [[noreturn]] void throw_missing(const Json& object, const std::string& name, const std::vector<std::string>& known,
                                  const std::string& kind, const std::string& option, const Place& place) const {
    std::vector<std::string> names;
    for (const auto& [key, value] : object.items()) {
      names.push_back(key);
    }
    throw InputError(
        fmt::format("{}: there is no {} field \"{}\", got {}; set {}.{} to a field of this file", place.text(), kind,
                    name.empty() ? fmt::format("{}", fmt::join(known, "\" or \"")) : name,
                    names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", ")), recipe_key_, option));
  }

  [[nodiscard]] std::string field(const Json& object, const std::string& name, const std::vector<std::string>& known,
                                  const std::string& option, const Place& place) const {
    const std::string present = known_name(object, name, known);
    if (present.empty() || !object.contains(present)) {
      throw_missing(object, name, known, "text", option, place);
    }
    return text_of(object.at(present), present, place);
  }

  // Keeps documents until the byte limit is reached.
  void trim() {
    if (options_.max_bytes == 0) {
      return;
    }
    std::int64_t total = 0;
    std::size_t keep = 0;
    while (keep < documents_.size() && total < options_.max_bytes) {
      total += documents_[keep].num_bytes();
      ++keep;
    }
    documents_.resize(keep);
  }

  const CorpusOptions& options_;
  const SplitOptions& split_options_;
  Split split_;
  std::string recipe_key_;
  std::regex separator_;
  std::vector<Document> documents_;
  std::int64_t bytes_ = 0;
};

}  // namespace

Document::Document(std::string document_id, std::string document_domain, std::string prompt, std::string completion)
    : id(std::move(document_id)), domain(std::move(document_domain)) {
  if (!prompt.empty()) {
    pieces.push_back({PieceKind::kText, std::move(prompt), false});
  }
  if (!completion.empty()) {
    pieces.push_back({PieceKind::kText, std::move(completion), true});
  }
  append_token("", true);
}

void Document::append_text(std::string_view text, bool completion) {
  if (text.empty()) {
    return;
  }
  if (!pieces.empty() && pieces.back().kind == PieceKind::kText && pieces.back().completion == completion) {
    pieces.back().text += text;
  } else {
    pieces.push_back({PieceKind::kText, std::string(text), completion});
  }
}

void Document::append_token(std::string_view name, bool completion) {
  pieces.push_back({name.empty() ? PieceKind::kEndOfSequence : PieceKind::kToken, std::string(name), completion});
}

std::string Document::text() const {
  std::string all;
  for (const Piece& piece : pieces) {
    all += piece.kind == PieceKind::kText ? piece.text : "";
  }
  return all;
}

std::int64_t Document::num_bytes() const {
  return std::accumulate(pieces.begin(), pieces.end(), std::int64_t{0}, [](std::int64_t sum, const Piece& piece) {
    return sum + (piece.kind == PieceKind::kText ? static_cast<std::int64_t>(piece.text.size()) : 0);
  });
}

bool Document::has_prompt() const {
  return std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return !piece.completion; });
}

FieldList CorpusOptions::fields() {
  FieldList list;
  list.add("domain", domain, "label in every report").required();
  list.add("format", format, "plain text, or JSON lines of texts, of questions with answers, of conversations",
           {"text", "jsonl", "question_answer", "chat"});
  list.add("paths", paths, "files, folders (read recursively) or globs; .gz and .dz are inflated").required();
  list.add("suffixes", suffixes, "in folders keep names that end in one of these; empty: all");
  list.add("package", package, "Debian package that provides it, named when it is missing");
  list.add("origin", origin, "where else to get it, named when it is missing");
  list.add("separator", separator, "text: a line matching this regular expression may start a new document");
  list.add("max_bytes", max_bytes, "stop after this much text; 0: all", {.low = 0});
  list.add("min_document_bytes", min_document_bytes,
           "shorter files are left out; shorter separated pieces join the next", {.low = 0});
  list.add("max_document_bytes", max_document_bytes, "longer documents are cut at a line break", {.low = 64});
  list.add("text_field", text_field, "jsonl: the text, or the completion when prompt_field is set");
  list.add("prompt_field", prompt_field, "jsonl: the prompt, never trained on; empty: plain text");
  list.add("prompt_template", prompt_template, "jsonl: {prompt} is replaced by the prompt");
  list.add("question_field", question_field, "question_answer: empty: question, instruction or prompt");
  list.add("context_field", context_field, "question_answer: may be missing in a line; empty: context or input");
  list.add("answer_field", answer_field, "question_answer: empty: answer, response, output or completion");
  list.add("messages_field", messages_field, "chat: empty: messages or conversations");
  list.add("template", chat_template, "question_answer, chat: how turns are laid out", template_names());
  list.add("system_message", system_message, "question_answer, chat: for lines that have none");
  list.add("overlong", overlong, "examples longer than sequence_length: cut them, or leave them out",
           {"truncate", "drop"});
  return list;
}

std::vector<Document> read_corpus(const CorpusOptions& options, const SplitOptions& split_options, Split split,
                                  const std::string& recipe_key) {
  return CorpusReader(options, split_options, split, recipe_key).run();
}

}  // namespace hestia
