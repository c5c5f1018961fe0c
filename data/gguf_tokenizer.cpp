#include "hestia/data/gguf_tokenizer.hpp"

#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"

namespace hestia {
namespace {

// Numbers of tokenizer.ggml.token_type.
constexpr std::int64_t kControl = 3;
constexpr std::int64_t kUserDefined = 4;

// How text is cut before merges apply.
struct PreTokenizer {
  const char* name;
  const char* pattern;  // nullptr: the pattern of GPT-2, which ByteLevel has built in
  bool single_digits = false;
  bool compose = false;  // normalisation form C first
  bool whole_words = false;
  bool leads = false;  // with the token of beginning where the file does not say, as llama.cpp has it
};

constexpr PreTokenizer kPreTokenizers[] = {
    {"gpt-2", nullptr},
    {"olmo", nullptr, false, true},
    {"smollm", nullptr, true},
    {"starcoder", nullptr, true},
    {"llama-bpe",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     false, false, true, true},
    {"qwen2",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     false, true},
};

InputError refuse(const GgufFile& file, const std::string& what) {
  return InputError(fmt::format("{}: {}; take the tokenizer files from the Hugging Face directory of the model",
                                file.path().string(), what));
}

const PreTokenizer& pre_tokenizer(const GgufFile& file) {
  const std::string name = file.has("tokenizer.ggml.pre") ? file.text("tokenizer.ggml.pre") : "";
  for (const PreTokenizer& entry : kPreTokenizers) {
    if (name == entry.name) {
      return entry;
    }
  }
  throw refuse(file, fmt::format("tokenizer.ggml.pre must be one of {}, got \"{}\"",
                                 fmt::join(known_gguf_pretokenizers(), ", "), name));
}

Json pre_tokenizer_json(const PreTokenizer& kind) {
  Json steps = Json::array();
  if (kind.single_digits) {
    steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
  }
  if (kind.pattern != nullptr) {
    steps.push_back(
        {{"type", "Split"}, {"pattern", {{"Regex", kind.pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  }
  steps.push_back({{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", kind.pattern == nullptr}});
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

// The token called by a metadata key, when there is one that the vocabulary has.
std::optional<std::string> special_token(const GgufFile& file, const std::vector<std::string>& tokens,
                                         const std::string& name) {
  const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
  if (!file.has(key)) {
    return std::nullopt;
  }
  const std::int64_t id = file.integer(key);
  if (id < 0 || id >= static_cast<std::int64_t>(tokens.size())) {
    return std::nullopt;  // as llama.cpp takes it; reading the model has warned of it
  }
  return tokens[static_cast<std::size_t>(id)];
}

Json leading_token(const std::string& token, std::int64_t id) {
  const Json bos = {{"SpecialToken", {{"id", token}, {"type_id", 0}}}};
  const Json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const Json second = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
  return {{"type", "TemplateProcessing"},
          {"single", Json::array({bos, text})},
          {"pair", Json::array({bos, text, second})},
          {"special_tokens", {{token, {{"id", token}, {"ids", Json::array({id})}, {"tokens", Json::array({token})}}}}}};
}

}  // namespace

std::vector<std::string> known_gguf_pretokenizers() {
  std::vector<std::string> names;
  for (const PreTokenizer& entry : kPreTokenizers) {
    names.emplace_back(entry.name);
  }
  return names;
}

Json gguf_tokenizer(const GgufFile& file) {
  if (const std::string model = file.text("tokenizer.ggml.model"); model != "gpt2") {
    throw refuse(file, fmt::format("tokenizer.ggml.model must be \"gpt2\" (byte-level BPE), got \"{}\"", model));
  }
  const PreTokenizer& kind = pre_tokenizer(file);
  const std::vector<std::string> tokens = file.texts("tokenizer.ggml.tokens");
  const std::vector<std::string> merges = file.texts("tokenizer.ggml.merges");
  const std::vector<std::int64_t> types = file.has("tokenizer.ggml.token_type")
                                              ? file.integers("tokenizer.ggml.token_type")
                                              : std::vector<std::int64_t>(tokens.size(), 1);
  if (types.size() != tokens.size()) {
    throw refuse(file, fmt::format("tokenizer.ggml.token_type must have one entry per token ({}), got {}",
                                   tokens.size(), types.size()));
  }
  Json::object_t vocabulary;  // appended to, not looked up: tens of thousands of names
  vocabulary.reserve(tokens.size());
  Json added = Json::array();
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    vocabulary.emplace_back(tokens[id], id);
    if (types[id] == kControl || types[id] == kUserDefined) {
      added.push_back({{"id", id},
                       {"content", tokens[id]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", types[id] == kControl}});
    }
  }
  for (const std::string& merge : merges) {
    const std::size_t space = merge.find(' ');
    if (space == std::string::npos || space == 0 || space + 1 == merge.size() ||
        merge.find(' ', space + 1) != std::string::npos) {
      throw refuse(file, fmt::format("a merge must be two tokens with a space between, got \"{}\"", merge));
    }
  }
  Json post_processor;  // null: none
  const bool says = file.has("tokenizer.ggml.add_bos_token");
  if (says ? file.boolean("tokenizer.ggml.add_bos_token") : kind.leads && special_token(file, tokens, "bos")) {
    const std::optional<std::string> bos = special_token(file, tokens, "bos");
    if (!bos) {
      throw refuse(
          file,
          "tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing or beyond the vocabulary");
    }
    post_processor = leading_token(*bos, file.integer("tokenizer.ggml.bos_token_id"));
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", kind.compose ? Json{{"type", "NFC"}} : Json()},
          {"pre_tokenizer", pre_tokenizer_json(kind)},
          {"post_processor", post_processor},
          {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", kind.whole_words},
            {"vocab", Json(std::move(vocabulary))},
            {"merges", merges}}}};
}

Json gguf_tokenizer_config(const GgufFile& file) {
  const std::vector<std::string> tokens = file.texts("tokenizer.ggml.tokens");
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  for (const auto& [ours, theirs] : {std::pair("bos_token", "bos"), std::pair("eos_token", "eos"),
                                     std::pair("unk_token", "unknown"), std::pair("pad_token", "padding")}) {
    if (const std::optional<std::string> token = special_token(file, tokens, theirs)) {
      config[ours] = *token;
    }
  }
  const std::string architecture = file.text("general.architecture");
  if (const std::string key = architecture + ".context_length"; file.has(key)) {
    config["model_max_length"] = file.integer(key);
  }
  if (file.has("tokenizer.chat_template")) {
    config["chat_template"] = file.text("tokenizer.chat_template");
  }
  return config;
}

void write_gguf_tokenizer(const GgufFile& file, const std::filesystem::path& folder) {
  // Damaged vocabularies may hold bytes that are no UTF-8, which JSON cannot.
  try {
    const std::string tokenizer = gguf_tokenizer(file).dump(2) + "\n";
    const std::string config = gguf_tokenizer_config(file).dump(2) + "\n";
    write_text_atomically(folder / "tokenizer.json", tokenizer);
    write_text_atomically(folder / "tokenizer_config.json", config);
  } catch (const Json::type_error&) {
    throw refuse(file, "the vocabulary or the chat template is not UTF-8");
  }
}

}  // namespace hestia
