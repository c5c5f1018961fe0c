#include "tokenizer_json.hpp"

#include <algorithm>
#include <array>
#include <bitset>
#include <memory>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_depth.hpp"
#include "hestia/core/log.hpp"
#include "json_node.hpp"
#include "normalizers.hpp"
#include "pre_tokenizers.hpp"
#include "subword_models.hpp"
#include "token_decoders.hpp"
#include "unicode.hpp"

namespace hestia {

namespace {

nlohmann::json parse_json(const std::filesystem::path& path) {
  const std::string text = read_text_file(path);
  if (too_deep_json(text)) {
    throw InputError(
        fmt::format("{}: nested more than {} deep; mend the file or fetch it again", path.string(), kDeepestJson));
  }
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    throw InputError(
        fmt::format("{}: not valid JSON at byte {}; mend the file or fetch it again", path.string(), error.byte));
  } catch (const nlohmann::json::out_of_range&) {
    throw InputError(
        fmt::format("{}: holds a number that is out of range; mend the file or fetch it again", path.string()));
  }
}

struct AddedToken {
  std::string content;  // What is looked for in the text.
  std::int32_t id = 0;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
};

bool is_word_character(std::string_view character) {
  static const TextPattern word(R"(\w)", "", Dialect::kRust);
  bool found = false;
  word.for_each_match(character, [&](std::size_t, std::size_t) { found = true; });
  return found;
}

// Finds added tokens in text, from left to right and the longest where several begin.
class AddedTokenFinder {
 public:
  void add(const AddedToken& token) {
    if (token.content.empty()) {
      return;
    }
    const std::size_t first = static_cast<unsigned char>(token.content[0]);
    if (token.content.size() == 1) {
      for (std::size_t second = 0; second < 256; ++second) {
        starts_[first * 256 + second] = true;
      }
    } else {
      starts_[first * 256 + static_cast<unsigned char>(token.content[1])] = true;
    }
    single_bytes_ = single_bytes_ || token.content.size() == 1;
    auto& tokens = by_first_byte_.at(first);
    const auto place = std::find_if(tokens.begin(), tokens.end(), [&](const AddedToken& other) {
      return other.content.size() < token.content.size();
    });
    tokens.insert(place, token);
    empty_ = false;
  }

  // Calls `visit(part, id)` for what covers `text`: id -1 is text without tokens.
  template <typename Visit>
  void for_each_part(std::string_view text, const Visit& visit) const {
    std::size_t done = 0;
    for (std::size_t at = next_start(text, 0); at < text.size();) {
      const AddedToken* token = longest_at(text, at);
      if (token == nullptr) {
        at = next_start(text, at + 1);
        continue;
      }
      std::size_t begin = at;
      std::size_t end = at + token->content.size();
      at = end;
      if (!token->single_word || stands_alone(text, begin, end)) {
        if (token->lstrip) {
          begin = std::max(spaces_before(text, begin), done);
        }
        if (token->rstrip) {
          end = spaces_after(text, end);
        }
        if (done < begin) {
          visit(text.substr(done, begin - done), -1);
        }
        visit(text.substr(begin, end - begin), token->id);
        done = end;
      }
      at = next_start(text, at);
    }
    if (done < text.size()) {
      visit(text.substr(done), -1);
    }
  }

 private:
  [[nodiscard]] std::size_t next_start(std::string_view text, std::size_t at) const {
    if (empty_) {
      return text.size();
    }
    for (; at + 1 < text.size(); ++at) {
      if (starts_[static_cast<unsigned char>(text[at]) * std::size_t{256} + static_cast<unsigned char>(text[at + 1])]) {
        return at;
      }
    }
    return single_bytes_ ? at : text.size();
  }

  [[nodiscard]] const AddedToken* longest_at(std::string_view text, std::size_t at) const {
    const auto& tokens = by_first_byte_.at(static_cast<unsigned char>(text[at]));
    const auto found = std::find_if(tokens.begin(), tokens.end(), [&](const AddedToken& token) {
      return text.substr(at, token.content.size()) == token.content;
    });
    return found == tokens.end() ? nullptr : &*found;
  }

  static bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
    if (begin > 0) {
      const std::size_t before = code_point_before(text, begin);
      if (is_word_character(text.substr(before, begin - before))) {
        return false;
      }
    }
    return end == text.size() || !is_word_character(text.substr(end, code_point_at(text, end).size));
  }

  static std::size_t spaces_before(std::string_view text, std::size_t at) {
    while (at > 0 && is_white_space(code_point_at(text, code_point_before(text, at)).value)) {
      at = code_point_before(text, at);
    }
    return at;
  }

  static std::size_t spaces_after(std::string_view text, std::size_t at) {
    while (at < text.size() && is_white_space(code_point_at(text, at).value)) {
      at += code_point_at(text, at).size;
    }
    return at;
  }

  bool empty_ = true;
  bool single_bytes_ = false;
  std::bitset<std::size_t{256} * 256> starts_;              // The first two bytes of a token.
  std::array<std::vector<AddedToken>, 256> by_first_byte_;  // Longest first.
};

// Lends what one thread needs while it encodes; there are never more than threads that encode at once.
class ScratchPool {
 public:
  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { pool_.give(std::move(scratch_)); }
    [[nodiscard]] EncodeScratch& scratch() { return *scratch_; }

   private:
    ScratchPool& pool_;
    std::unique_ptr<EncodeScratch> scratch_;
  };

 private:
  std::unique_ptr<EncodeScratch> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<EncodeScratch> scratch = std::move(idle_.back());
        idle_.pop_back();
        return scratch;
      }
      idle_.reserve(++lent_);  // So that giving one back cannot fail.
    }
    return std::make_unique<EncodeScratch>();
  }
  void give(std::unique_ptr<EncodeScratch> scratch) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(scratch));
  }
  std::mutex mutex_;
  std::vector<std::unique_ptr<EncodeScratch>> idle_;
  std::size_t lent_ = 0;
};

class JsonTokenizer final : public Tokenizer {
 public:
  explicit JsonTokenizer(const std::filesystem::path& path) {
    const nlohmann::json json = parse_json(path);
    const JsonNode root(json, fmt::format("{}: tokenizer", path.string()));
    if (!root.has("model")) {
      throw InputError(
          fmt::format("{}: not a tokenizer.json of the tokenizers library (it has no \"model\"); fetch the "
                      "file again",
                      path.string()));
    }
    const auto part = [&](const char* key) {
      return JsonNode(json.at(key), fmt::format("{}: {}", path.string(), key));
    };
    if (root.has("normalizer")) {
      normalizer_ = make_normalizer(part("normalizer"));
    }
    if (root.has("pre_tokenizer")) {
      pre_tokenizer_ = make_pre_tokenizer(part("pre_tokenizer"));
    }
    if (root.has("decoder")) {
      decoder_ = make_token_decoder(part("decoder"));
    }
    model_ = make_subword_model(part("model"), pre_tokenizer_ != nullptr && pre_tokenizer_->byte_level());
    tokens_ = model_->tokens();
    if (root.has("added_tokens")) {
      for (const JsonNode& node : root.list("added_tokens")) {
        add_token(JsonNode(node.value(), fmt::format("{}: an added token", path.string())));
      }
    }
    // By spelling: a vocabulary may hold a special token twice.
    std::transform(tokens_.begin(), tokens_.end(), std::back_inserter(special_),
                   [&](const std::string& token) { return special_names_.count(token) != 0 ? 1 : 0; });
    count_bytes_of_tokens();
    read_special_ids(path.parent_path());
  }

  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const override { return encode(text, true); }
  [[nodiscard]] std::vector<std::int32_t> encode_continuation(std::string_view text) const override {
    return encode(text, false);
  }

  [[nodiscard]] std::string decode(const std::vector<std::int32_t>& ids) const override {
    std::vector<std::string> parts;
    for (const std::int32_t id : ids) {
      const std::size_t at = checked(id);
      if (special_[at] == 0 && !tokens_[at].empty()) {
        parts.push_back(tokens_[at]);
      }
    }
    if (decoder_ == nullptr) {
      return fmt::format("{}", fmt::join(parts, " "));
    }
    std::string text;
    for (const std::string& part : decoder_->apply(std::move(parts))) {
      text += part;
    }
    return text;
  }

  [[nodiscard]] std::int64_t count_bytes(const std::vector<std::int32_t>& ids) const override {
    return std::accumulate(ids.begin(), ids.end(), std::int64_t{0},
                           [&](std::int64_t sum, std::int32_t id) { return sum + bytes_of_[checked(id)]; });
  }

  [[nodiscard]] std::int64_t vocab_size() const override { return static_cast<std::int64_t>(tokens_.size()); }
  [[nodiscard]] std::int32_t token_id(std::string_view name) const override {
    const auto added = added_ids_.find(std::string(name));
    return added == added_ids_.end() ? model_->id_of(name) : added->second;
  }
  [[nodiscard]] std::int32_t bos_id() const override { return bos_id_; }
  [[nodiscard]] std::int32_t eos_id() const override { return eos_id_; }
  [[nodiscard]] std::int32_t pad_id() const override { return pad_id_; }

 private:
  [[nodiscard]] std::size_t checked(std::int32_t id) const {
    if (id < 0 || id >= vocab_size()) {
      throw RunError(fmt::format("tokenizer: the ids cannot be decoded, {} is none; check that they are below {}", id,
                                 vocab_size()));
    }
    return static_cast<std::size_t>(id);
  }

  void add_token(const JsonNode& node) {
    AddedToken token{.content = node.text("content"),
                     .id = node.integer("id"),
                     .single_word = node.flag("single_word", false),
                     .lstrip = node.flag("lstrip", false),
                     .rstrip = node.flag("rstrip", false)};
    const bool special = node.flag("special", false);
    const bool normalized = node.flag("normalized", !special);
    const std::int32_t of_model = model_->id_of(token.content);
    if (of_model >= 0 && of_model != token.id) {
      node.fail(fmt::format("\"{}\" has id {}, and {} in the vocabulary; fetch the file again", token.content, token.id,
                            of_model));
    }
    const auto at = static_cast<std::size_t>(token.id);
    // Ids above the vocabulary may leave gaps, but no large ones.
    if (token.content.empty() || at > 2 * tokens_.size() + 1024) {
      node.fail(
          fmt::format("must have a content and an id that follows the vocabulary's, got \"{}\" and {}; fetch the "
                      "file again",
                      token.content, token.id));
    }
    if (at >= tokens_.size()) {
      tokens_.resize(at + 1);
    }
    const std::string name = token.content;
    added_ids_[name] = token.id;
    if (special) {
      special_names_.insert(token.content);
    }
    if (normalized && normalizer_ != nullptr) {
      normalizer_->apply(token.content, true);
    }
    if (!tokens_[at].empty() && tokens_[at] != name && tokens_[at] != token.content) {
      node.fail(fmt::format("\"{}\" has id {}, which is \"{}\" in the vocabulary; fetch the file again", name, token.id,
                            tokens_[at]));
    }
    tokens_[at] = token.content;
    (normalized ? normalized_tokens_ : raw_tokens_).add(token);
  }

  void count_bytes_of_tokens() {
    const bool byte_level = decoder_ != nullptr && decoder_->byte_level();
    bytes_of_.reserve(tokens_.size());
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      const std::string& token = tokens_[id];
      const bool unknown = static_cast<std::int32_t>(id) == model_->unknown_id();
      if (!unknown && (special_[id] != 0 || token.empty())) {
        bytes_of_.push_back(0);
      } else if (unknown || (!byte_level && model_->byte_fallback() && value_of_byte_token(token) >= 0)) {
        bytes_of_.push_back(1);
      } else if (byte_level) {
        bytes_of_.push_back(static_cast<std::int64_t>(bytes_of_byte_level(token).size()));
      } else if (decoder_ == nullptr) {
        bytes_of_.push_back(static_cast<std::int64_t>(token.size()));
      } else {
        // Behind another token: the space that decoders take from the front of a text is not what it stands for.
        std::int64_t size = -1;
        for (const std::string& part : decoder_->apply({"x", token})) {
          size += static_cast<std::int64_t>(part.size());
        }
        bytes_of_.push_back(size);
      }
    }
  }

  void read_special_ids(const std::filesystem::path& folder) {
    bos_id_ = special_id(folder, "bos_token");
    eos_id_ = special_id(folder, "eos_token");
    pad_id_ = special_id(folder, "pad_token");
  }

  // The first file that names the token, or says that there is none, decides.
  [[nodiscard]] std::int32_t special_id(const std::filesystem::path& folder, const std::string& key) const {
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
      const std::filesystem::path path = folder / name;
      if (!std::filesystem::exists(path)) {
        continue;
      }
      const nlohmann::json json = parse_json(path);
      if (!json.is_object() || !json.contains(key)) {
        continue;
      }
      const nlohmann::json& value = json.at(key);
      if (value.is_null()) {
        return -1;
      }
      const JsonNode node(value, fmt::format("{}: {}", path.string(), key));
      const std::string content = value.is_object() ? node.text("content") : node.as_text();
      const std::int32_t id = token_id(content);
      if (id < 0) {
        log_warning(
            fmt::format("{}: {} \"{}\" is not in the vocabulary; texts go without it", path.string(), key, content));
      }
      return id;
    }
    const std::filesystem::path path = folder / "config.json";
    if (!std::filesystem::exists(path)) {
      return -1;
    }
    const nlohmann::json json = parse_json(path);
    const std::string id_key = key + "_id";
    if (!json.is_object() || !json.contains(id_key)) {
      return -1;
    }
    const nlohmann::json& value = json.at(id_key);
    const nlohmann::json& first = value.is_array() && !value.empty() ? value.front() : value;
    return first.is_number_unsigned() && first.get<std::uint64_t>() < tokens_.size() ? first.get<std::int32_t>() : -1;
  }

  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, bool prepend) const {
    if (!is_utf8(text)) {
      return encode_valid(replace_broken_utf8(text), prepend);
    }
    return encode_valid(text, prepend);
  }

  [[nodiscard]] std::vector<std::int32_t> encode_valid(std::string_view text, bool prepend) const {
    std::vector<std::int32_t> ids;
    ids.reserve(text.size() / 3);
    ScratchPool::Lease lease(pool_);
    bool first = true;
    raw_tokens_.for_each_part(text, [&](std::string_view part, std::int32_t id) {
      if (id >= 0) {
        ids.push_back(id);
      } else if (normalizer_ == nullptr) {
        encode_normalized(part, first, prepend, lease.scratch(), ids);
      } else {
        std::string normal(part);
        normalizer_->apply(normal, prepend || !first);
        encode_normalized(normal, first, prepend, lease.scratch(), ids);
      }
      first = false;
    });
    return ids;
  }

  void encode_normalized(std::string_view text, bool first, bool prepend, EncodeScratch& scratch,
                         std::vector<std::int32_t>& ids) const {
    normalized_tokens_.for_each_part(text, [&](std::string_view part, std::int32_t id) {
      if (id >= 0) {
        ids.push_back(id);
      } else if (pre_tokenizer_ == nullptr) {
        model_->encode(part, scratch, ids);
      } else {
        pre_tokenizer_->split({part, first, prepend},
                              [&](const TextPiece& piece) { model_->encode(piece.text, scratch, ids); });
      }
      first = false;
    });
  }

  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  std::unique_ptr<SubwordModel> model_;
  std::unique_ptr<TokenDecoder> decoder_;
  AddedTokenFinder raw_tokens_;         // Looked for in the text as it is.
  AddedTokenFinder normalized_tokens_;  // Looked for in normalised text.
  std::unordered_map<std::string, std::int32_t> added_ids_;
  std::unordered_set<std::string> special_names_;
  std::vector<std::string> tokens_;     // Spelling by id; empty: the id is not used.
  std::vector<std::uint8_t> special_;   // By id.
  std::vector<std::int64_t> bytes_of_;  // By id.
  std::int32_t bos_id_ = -1;
  std::int32_t eos_id_ = -1;
  std::int32_t pad_id_ = -1;
  mutable ScratchPool pool_;
};

}  // namespace

std::unique_ptr<Tokenizer> open_json_tokenizer(const std::filesystem::path& path) {
  return std::make_unique<JsonTokenizer>(path);
}

}  // namespace hestia
