#include "hestia/data/tokenizer.hpp"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <numeric>
#include <unordered_map>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "tokenizer_json.hpp"

namespace hestia {

namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // How pieces spell a space.
const std::string kLineBreak = "\n";

class SentencePieceTokenizer final : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(const std::filesystem::path& path) {
    const std::string bytes = read_text_file(path);
    const auto status = processor_.LoadFromSerializedProto(bytes);
    if (!status.ok() || processor_.GetPieceSize() <= 0) {
      throw InputError(fmt::format("{}: not a sentencepiece model ({}); fetch tokenizer.model again", path.string(),
                                   status.ok() ? "it holds no pieces" : status.ToString()));
    }
    bytes_of_.reserve(static_cast<std::size_t>(processor_.GetPieceSize()));
    for (int id = 0; id < processor_.GetPieceSize(); ++id) {
      bytes_of_.push_back(bytes_of_piece(id));
    }
    // What the vocabulary puts in front of a text shows in front of a line break, which no piece joins to its
    // neighbour.
    lead_ = encode(kLineBreak);
    if (lead_.size() < 2 || decode({lead_.back()}) != kLineBreak) {
      lead_.clear();
    }
  }

  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<int> ids;
    const auto status = processor_.Encode(absl::string_view(text.data(), text.size()), &ids);
    if (!status.ok()) {
      throw RunError(
          fmt::format("tokenizer: the text cannot be encoded, {}; check that it is UTF-8", status.ToString()));
    }
    return {ids.begin(), ids.end()};
  }

  [[nodiscard]] std::vector<std::int32_t> encode_continuation(std::string_view text) const override {
    std::vector<std::int32_t> ids = encode(lead_.empty() ? std::string(text) : kLineBreak + std::string(text));
    if (lead_.empty()) {
      return ids;
    }
    if (ids.size() < lead_.size() || !std::equal(lead_.begin(), lead_.end(), ids.begin())) {
      return encode(text);  // This text begins with a piece that holds a line break.
    }
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(lead_.size()));
    return ids;
  }

  [[nodiscard]] std::string decode(const std::vector<std::int32_t>& ids) const override {
    std::string text;
    const auto status = processor_.Decode(std::vector<int>(ids.begin(), ids.end()), &text);
    if (!status.ok()) {
      throw RunError(fmt::format("tokenizer: the ids cannot be decoded, {}; check that they are below {}",
                                 status.ToString(), vocab_size()));
    }
    return text;
  }

  [[nodiscard]] std::int64_t count_bytes(const std::vector<std::int32_t>& ids) const override {
    return std::accumulate(ids.begin(), ids.end(), std::int64_t{0}, [&](std::int64_t sum, std::int32_t id) {
      return sum + bytes_of_.at(static_cast<std::size_t>(id));
    });
  }

  [[nodiscard]] std::int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  [[nodiscard]] std::int32_t token_id(std::string_view name) const override {
    const int id = processor_.PieceToId(absl::string_view(name.data(), name.size()));  // The unknown token otherwise.
    return processor_.IdToPiece(id) == name ? id : -1;
  }
  [[nodiscard]] std::int32_t bos_id() const override { return processor_.bos_id(); }
  [[nodiscard]] std::int32_t eos_id() const override { return processor_.eos_id(); }
  [[nodiscard]] std::int32_t pad_id() const override { return processor_.pad_id(); }

 private:
  [[nodiscard]] std::int64_t bytes_of_piece(int id) const {
    if (processor_.IsControl(id)) {
      return 0;
    }
    if (processor_.IsByte(id) || processor_.IsUnknown(id)) {
      return 1;
    }
    const std::string& piece = processor_.IdToPiece(id);
    auto bytes = static_cast<std::int64_t>(piece.size());
    for (std::size_t at = piece.find(kSpace); at != std::string::npos; at = piece.find(kSpace, at + kSpace.size())) {
      bytes -= static_cast<std::int64_t>(kSpace.size()) - 1;
    }
    return bytes;
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::vector<std::int64_t> bytes_of_;  // By id.
  std::vector<std::int32_t> lead_;      // A line break with what stands in front of every text; empty: nothing does.
};

// Hands documents to sentencepiece line by line: a sentence there is a line, and line breaks are symbols of their own.
class LineIterator : public sentencepiece::SentenceIterator {
 public:
  LineIterator(const std::function<bool(std::string&)>& next, std::size_t max_bytes)
      : next_(next), max_bytes_(max_bytes) {
    advance();
  }
  [[nodiscard]] bool done() const override { return done_; }
  void Next() override { advance(); }
  [[nodiscard]] const std::string& value() const override { return line_; }
  [[nodiscard]] sentencepiece::util::Status status() const override { return {}; }

 private:
  void advance() {
    while (true) {
      while (begin_ < document_.size()) {
        const std::size_t end = std::min(document_.find('\n', begin_), document_.size());
        line_ = document_.substr(begin_, std::min(end - begin_, whole_characters()));
        begin_ = end + 1;
        line_.erase(std::remove(line_.begin(), line_.end(), '\0'), line_.end());
        if (!line_.empty()) {
          return;
        }
      }
      begin_ = 0;
      document_.clear();
      if (!next_(document_)) {
        done_ = true;
        return;
      }
    }
  }

  // How many bytes from begin_ on a sentence may have: half a character would teach the replacement character.
  [[nodiscard]] std::size_t whole_characters() const {
    std::size_t size = max_bytes_;
    while (size > 0 && begin_ + size < document_.size() &&
           (static_cast<unsigned char>(document_[begin_ + size]) & 0xC0) == 0x80) {
      --size;
    }
    return size;
  }

  const std::function<bool(std::string&)>& next_;
  std::size_t max_bytes_;
  std::string document_;
  std::string line_;
  std::size_t begin_ = 0;
  bool done_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer(const std::filesystem::path& path) {
  std::filesystem::path file = path;
  if (std::filesystem::is_directory(path)) {
    const std::filesystem::path json = path / "tokenizer.json";
    file = path / "tokenizer.model";
    if (std::filesystem::exists(json)) {
      if (std::filesystem::exists(file)) {
        log_info(fmt::format("{}: tokenizer.json is used; tokenizer.model beside it is not", path.string()));
      }
      file = json;
    }
  }
  if (!std::filesystem::exists(file)) {
    throw InputError(
        fmt::format("{}: there is no tokenizer.json and no tokenizer.model (sentencepiece); give a model "
                    "directory that has one",
                    path.string()));
  }
  if (file.extension() == ".json") {
    return open_json_tokenizer(file);
  }
  return std::make_unique<SentencePieceTokenizer>(file);
}

bool copy_tokenizer(const std::filesystem::path& path, const std::filesystem::path& folder) {
  const auto copy = [&](const std::filesystem::path& from, const char* name) {
    if (std::filesystem::exists(from)) {
      write_text_atomically(folder / name, read_text_file(from));
    }
    return std::filesystem::exists(from);
  };
  bool found = false;
  const bool is_folder = std::filesystem::is_directory(path);
  if (!is_folder) {
    const bool is_json = path.extension() == ".json";
    found = copy(path, is_json ? "tokenizer.json" : "tokenizer.model");
    if (!is_json) {
      return found;
    }
  }
  const std::filesystem::path source = is_folder ? path : path.parent_path();
  if (is_folder) {
    for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}) {
      found = copy(source / name, name) || found;
    }
  }
  for (const char* name :
       {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}) {
    copy(source / name, name);
  }
  return found;
}

void train_tokenizer(const std::function<bool(std::string& sentence)>& next, const TokenizerTraining& options,
                     const std::filesystem::path& path) {
  std::unordered_map<std::string, std::string> arguments = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(options.vocab_size)},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"split_digits", "true"},
      {"character_coverage", "0.9995"},
      // A line is a sentence, so these two never occur inside one; as symbols they cost one token instead of a byte.
      {"user_defined_symbols", "\n,\t"},
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "3"},
      {"input_sentence_size", "0"},
      {"shuffle_input_sentence", "false"},
      {"max_sentence_length", std::to_string(options.max_sentence_bytes)},
      {"num_threads", std::to_string(options.num_threads)},
      {"minloglevel", "2"},
  };
  if (!options.special_tokens.empty()) {
    arguments["control_symbols"] = fmt::format("{}", fmt::join(options.special_tokens, ","));
  }
  LineIterator lines(next, static_cast<std::size_t>(options.max_sentence_bytes));
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &lines, &model);
  if (!status.ok()) {
    throw RunError(fmt::format("tokenizer: training failed, {}; give more text or a smaller vocab_size ({})",
                               status.ToString(), options.vocab_size));
  }
  write_text_atomically(path, model);
}

}  // namespace hestia
