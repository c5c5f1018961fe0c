#include "hestia/data/corpus.hpp"

#include <algorithm>
#include <numeric>
#include <regex>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/random.hpp"
#include "source_files.hpp"
#include "templates.hpp"

namespace hestia {

namespace {

constexpr std::string_view kPlaceholder = "{prompt}";
// std::regex recurses once per character: a line of 100 kB would overflow the stack.
constexpr std::size_t kMaxMatchedBytes = 1000;

// Names of fields in the data sets that are about, used where a recipe names none.
const std::vector<std::string> kQuestionFields = {"question", "instruction", "prompt"};
const std::vector<std::string> kContextFields = {"context", "input"};
const std::vector<std::string> kAnswerFields = {"answer", "response", "output", "completion"};
const std::vector<std::string> kMessagesFields = {"messages", "conversations"};

double unit_hash(std::uint64_t seed, std::string_view purpose, std::string_view id) {
  return static_cast<double>(derive_seed(derive_seed(seed, purpose), id) >> 11) * 0x1.0p-53;
}

// Cuts at the last line break before the limit (at the limit when a line is longer), never inside a character.
std::vector<std::string> cut(const std::string& text, std::size_t limit) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (text.size() - begin > limit) {
    const std::size_t line_break = std::string_view(text).substr(begin, limit).rfind('\n');
    std::size_t end = begin + limit;
    if (line_break == std::string_view::npos) {
      while (end > begin + 1 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
        --end;
      }
    } else {
      end = begin + line_break + 1;
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
    std::vector<SourceFile> files =
        find_files({options_.paths, options_.suffixes, options_.package, options_.origin}, recipe_key_);
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
    for_each_line(text, [&](std::int64_t line, std::string_view content) {
      add_json(file, line, content);
      return true;
    });
  }

  // One line of a JSON-lines file, for messages.
  struct Place {
    const std::filesystem::path& path;
    std::int64_t line = 0;
    [[nodiscard]] std::string text() const { return fmt::format("{}:{}", path.string(), line); }
  };

  void add_json(const SourceFile& file, std::int64_t line, std::string_view content) {
    const Place place{file.path, line};
    const Json object = json_object(content, place.text());
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
                                   place.text(), name, quoted_json(list)));
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
                                   place.text(), key, quoted_json(object)));
    }
    const auto part = [&](const char* name, const char* other) {
      const char* present = object.contains(name) ? name : other;
      if (!object.contains(present)) {
        throw InputError(fmt::format("{}: \"{}\" has neither \"{}\" nor \"{}\", got {}; mend this line", place.text(),
                                     key, name, other, quoted_json(object)));
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

  static std::string text_of(const Json& value, const std::string& key, const Place& place) {
    if (!value.is_string()) {
      throw InputError(fmt::format("{}: \"{}\" must be text, got {}; mend or remove this line", place.text(), key,
                                   quoted_json(value)));
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

std::string Document::first_answer() const {
  std::string answer;
  const auto is_answer = [](const Piece& piece) { return piece.completion; };
  const auto first = std::find_if(pieces.begin(), pieces.end(), is_answer);
  std::for_each(first, std::find_if_not(first, pieces.end(), is_answer),
                [&](const Piece& piece) { answer += piece.kind == PieceKind::kText ? piece.text : ""; });
  return answer;
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
