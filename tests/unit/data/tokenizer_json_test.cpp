// tokenizer.json: against the tokenizers library (goldens/, see make_tokenizer_goldens.py), and what Hestia adds to it.

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include <fmt/format.h>

#include "data/text_pattern.hpp"
#include "data/unicode.hpp"
#include "data_fixtures.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/log.hpp"
#include "hestia/data/tokenizer.hpp"
#include "temporary_folder.hpp"
#include "tokenizer_fuzz.hpp"

namespace hestia::testing {
namespace {

using Ids = std::vector<std::int32_t>;

const std::filesystem::path kGoldens = std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/unit/data/goldens";
constexpr std::uint64_t kBlock = 500;
constexpr std::uint64_t kBlocks = 200;

std::unique_ptr<Tokenizer> golden(const std::string& name) {
  return open_tokenizer(kGoldens / name);
}

void put_number(Sha256& hash, std::uint32_t value) {
  const std::array<std::byte, 4> bytes = {std::byte(value & 0xFFU), std::byte(value >> 8U & 0xFFU),
                                          std::byte(value >> 16U & 0xFFU), std::byte(value >> 24U)};
  hash.update(bytes);
}

// One line of hashes.txt.
std::string block_hashes(const Tokenizer& tokenizer, std::uint64_t block) {
  Sha256 of_ids;
  Sha256 of_texts;
  for (std::uint64_t number = block * kBlock; number < (block + 1) * kBlock; ++number) {
    TokenizerFuzz fuzz(number);
    const Ids ids = tokenizer.encode(fuzz.text());
    put_number(of_ids, static_cast<std::uint32_t>(ids.size()));
    for (const std::int32_t id : ids) {
      put_number(of_ids, static_cast<std::uint32_t>(id));
    }
    for (const Ids& some : {ids, fuzz.ids(tokenizer.vocab_size())}) {
      const std::string text = tokenizer.decode(some);
      put_number(of_texts, static_cast<std::uint32_t>(text.size()));
      of_texts.update(std::as_bytes(std::span(text)));
    }
  }
  return of_ids.hex().substr(0, 16) + " " + of_texts.hex().substr(0, 16);
}

TEST_CASE("Every golden vocabulary encodes and decodes 100000 strings as the libraries do") {
  const auto name = GENERATE(as<std::string>{}, "characters", "characters_fused", "deepseek", "gpt_oss", "metaspace",
                             "mixtral", "olmoe", "phi", "prefix_space", "qwen", "sentencepiece_bpe",
                             "sentencepiece_unknown", "smollm2", "unigram_bytes", "unigram_unknown");
  const auto tokenizer = golden(name);
  const std::string file = name.starts_with("sentencepiece") ? "tokenizer.model" : "tokenizer.json";
  std::ifstream hashes(kGoldens / name / "hashes.txt");
  std::uint64_t block = 0;
  for (std::string expected; std::getline(hashes, expected); ++block) {
    INFO("tests/unit/data/make_tokenizer_goldens.py --expect .../goldens/"
         << name << "/" << file << " --first " << block * kBlock << " --count " << kBlock
         << " | check_tokenizer .../goldens/" << name << "/" << file << "   shows the string");
    REQUIRE(block_hashes(*tokenizer, block) == expected);
  }
  CHECK(block == kBlocks);
}

// ---- Byte-pair encoding as it is defined, without any shortcut: of all pairs the one with the lowest rank is joined.

class PlainBytePairs {
 public:
  explicit PlainBytePairs(const Json& model) {
    for (const auto& [token, id] : model.at("vocab").items()) {
      ids_[token] = id.get<std::int32_t>();
    }
    for (const Json& merge : model.at("merges")) {
      const std::size_t rank = ranks_.size();
      ranks_[{merge.at(0).get<std::string>(), merge.at(1).get<std::string>()}] = rank;
    }
  }
  [[nodiscard]] Ids encode(std::vector<std::string> symbols) const {
    while (true) {
      std::size_t best = ranks_.size();
      std::size_t at = 0;
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
        const auto found = ranks_.find({symbols[i], symbols[i + 1]});
        if (found != ranks_.end() && found->second < best) {
          best = found->second;
          at = i;
        }
      }
      if (best == ranks_.size()) {
        break;
      }
      symbols[at] += symbols[at + 1];
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    Ids ids;
    for (const std::string& symbol : symbols) {
      ids.push_back(ids_.at(symbol));
    }
    return ids;
  }
  [[nodiscard]] bool knows(const std::string& token) const { return ids_.count(token) != 0; }

 private:
  std::map<std::string, std::int32_t> ids_;
  std::map<std::pair<std::string, std::string>, std::size_t> ranks_;
};

TEST_CASE("Joining pairs in long and short texts gives what the definition gives") {
  const auto name = GENERATE(as<std::string>{}, "mixtral", "metaspace");
  const PlainBytePairs plain(read_json_file(kGoldens / name / "tokenizer.json").at("model"));
  const auto tokenizer = golden(name);
  SplitMix64 random(12);
  for (int i = 0; i < 60; ++i) {
    std::string text = "x";
    const std::size_t size = 1 + random.below(i % 3 == 0 ? 700 : 60);
    while (text.size() < size) {
      // Words without spaces as well, so that pieces are long.
      std::string line =
          random.below(2) == 0 ? "f x != y && !z || w == 0x1F: " : "returnNonefigconder{in(e-3,nullWHERE";
      line = line.substr(random.below(line.size()));
      text += line.substr(0, 1 + random.below(line.size()));
    }
    std::vector<std::string> symbols = {"\u2581"};
    for (const char c : text) {
      const std::string symbol = c == ' ' ? "\u2581" : std::string(1, c);
      symbols.push_back(plain.knows(symbol) ? symbol : fmt::format("<0x{:02X}>", static_cast<unsigned char>(c)));
    }
    CAPTURE(text);
    REQUIRE(tokenizer->encode(text) == plain.encode(symbols));
  }
}

TEST_CASE("A text of one letter a million times, and of a million spaces, is encoded and decoded") {
  for (const std::string name : {"smollm2", "qwen", "gpt_oss", "deepseek", "mixtral"}) {
    CAPTURE(name);
    const auto tokenizer = golden(name);
    for (const std::string& text :
         {std::string(1'000'000, 'e'), std::string(1'000'000, ' ') + "x", std::string(1'000'000, '\n')}) {
      REQUIRE(tokenizer->decode(tokenizer->encode(text)) == text);
    }
  }
}

TEST_CASE("Broken UTF-8 reads as U+FFFD for each maximal ill-formed part") {
  const std::vector<std::pair<std::string, std::string>> cases = {{"\xFF", "\uFFFD"},
                                                                  {"a\x80z", "a\uFFFDz"},
                                                                  {"\xE2\x82", "\uFFFD"},
                                                                  {"\xE2\x82x", "\uFFFDx"},
                                                                  {"\xF0\x9F\x98", "\uFFFD"},
                                                                  {"\xF0\x9F\x98\xF0\x9F\x98\x80", "\uFFFD\U0001F600"},
                                                                  {"\xC0\xAF", "\uFFFD\uFFFD"},
                                                                  {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
                                                                  {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
                                                                  {"\xE0\x80\x80", "\uFFFD\uFFFD\uFFFD"},
                                                                  {"\xC3", "\uFFFD"},
                                                                  {"caf\xC3\xA9 \xE9", "caf\u00e9 \uFFFD"}};
  for (const auto& [broken, whole] : cases) {
    CAPTURE(whole);
    CHECK(replace_broken_utf8(broken) == whole);
    CHECK(is_utf8(broken) == (broken == whole));
    CHECK(is_utf8(whole));
    for (const char* name : {"smollm2", "mixtral", "unigram_bytes"}) {
      CHECK(golden(name)->encode(broken) == golden(name)->encode(whole));
    }
  }
}

TEST_CASE("Text that goes on after other text gets nothing in front") {
  for (const std::string name : {"mixtral", "metaspace", "prefix_space"}) {
    CAPTURE(name);
    const auto tokenizer = golden(name);
    const Ids whole = tokenizer->encode("x lo mi");
    const Ids begin = tokenizer->encode("x");
    Ids both = begin;
    const Ids rest = tokenizer->encode_continuation(" lo mi");
    both.insert(both.end(), rest.begin(), rest.end());
    CHECK(tokenizer->decode(both) == tokenizer->decode(whole));
    CHECK(tokenizer->encode_continuation("lo") != tokenizer->encode("lo"));
    CHECK(tokenizer->encode_continuation(" lo") == tokenizer->encode("lo"));
    CHECK(tokenizer->encode_continuation("").empty());
    CHECK(tokenizer->encode("").empty());
  }
  const auto plain = golden("qwen");
  CHECK(plain->encode_continuation("lo mi") == plain->encode("lo mi"));
}

TEST_CASE("Bytes of tokens add up to the text, also where they are cut inside a character") {
  for (const std::string name : {"smollm2", "gpt_oss", "deepseek"}) {
    CAPTURE(name);
    const auto tokenizer = golden(name);
    SplitMix64 random(31);
    for (int i = 0; i < 200; ++i) {
      const std::string text = random_line(random, 4) + random_characters(random, 8);
      const Ids ids = tokenizer->encode(text);
      const auto middle = ids.begin() + static_cast<std::ptrdiff_t>(random.below(ids.size() + 1));
      REQUIRE(tokenizer->count_bytes({ids.begin(), middle}) + tokenizer->count_bytes({middle, ids.end()}) ==
              static_cast<std::int64_t>(text.size()));
    }
    CHECK(tokenizer->count_bytes({tokenizer->token_id("<|end|>")}) == 0);
  }
  // A space in front belongs to the first token of these.
  const auto llama = golden("mixtral");
  const std::string text = "lo mi \u4e00\U0001F600 1";
  CHECK(llama->count_bytes(llama->encode(text)) == static_cast<std::int64_t>(text.size()) + 1);
  CHECK(llama->count_bytes(llama->encode_continuation(text)) == static_cast<std::int64_t>(text.size()));
  CHECK(llama->count_bytes({llama->token_id("<s>"), llama->token_id("</s>")}) == 0);
  CHECK(llama->count_bytes({llama->token_id("<unk>")}) == 1);
  CHECK(llama->count_bytes({llama->token_id("<0xE2>")}) == 1);
}

TEST_CASE("Special tokens are single ids, found in text, and no text") {
  const auto tokenizer = golden("qwen");
  const std::int32_t end = tokenizer->token_id("<|end|>");
  REQUIRE(end >= 0);
  CHECK(tokenizer->token_id("<|ende|>") == -1);
  Ids expected = tokenizer->encode("lo");
  expected.push_back(end);
  const Ids rest = tokenizer->encode("mi");
  expected.insert(expected.end(), rest.begin(), rest.end());
  CHECK(tokenizer->encode("lo<|end|>mi") == expected);
  CHECK(tokenizer->decode(expected) == "lomi");
  CHECK_THROWS_AS(tokenizer->decode({static_cast<std::int32_t>(tokenizer->vocab_size())}), RunError);
  CHECK_THROWS_AS(tokenizer->decode({-1}), RunError);
  CHECK_THROWS_AS(tokenizer->count_bytes({-1}), RunError);
}

TEST_CASE("Several threads get the ids that one gets") {
  const auto tokenizer = golden("olmoe");
  std::vector<Ids> expected;
  for (std::uint64_t i = 0; i < 2000; ++i) {
    expected.push_back(tokenizer->encode(TokenizerFuzz(i).text()));
  }
  std::array<std::uint64_t, 4> equal{};
  std::vector<std::thread> threads;
  for (std::uint64_t& count : equal) {
    threads.emplace_back([&] {
      for (std::uint64_t i = 0; i < expected.size(); ++i) {
        count += tokenizer->encode(TokenizerFuzz(i).text()) == expected[i] ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const std::uint64_t count : equal) {
    CHECK(count == expected.size());
  }
}

// ---- Which tokens begin, end and pad

void copy_golden(const std::string& name, const std::filesystem::path& folder) {
  std::filesystem::copy_file(kGoldens / name / "tokenizer.json", folder / "tokenizer.json",
                             std::filesystem::copy_options::overwrite_existing);
}

TEST_CASE("tokenizer_config.json, then special_tokens_map.json, then config.json name the special tokens") {
  const TemporaryFolder folder;
  copy_golden("qwen", folder.path());
  const auto open = [&] { return open_tokenizer(folder.path()); };
  const std::int32_t end = open()->token_id("<|end|>");
  const std::int32_t user = open()->token_id("<|user|>");
  CHECK(open()->bos_id() == -1);
  CHECK(open()->eos_id() == -1);
  CHECK(open()->pad_id() == -1);
  put_file(folder.path() / "config.json",
           fmt::format(R"({{"bos_token_id": 7, "eos_token_id": [{}, 3], "pad_token_id": null}})", user));
  CHECK(open()->bos_id() == 7);
  CHECK(open()->eos_id() == user);
  CHECK(open()->pad_id() == -1);
  put_file(folder.path() / "special_tokens_map.json", R"({"eos_token": {"content": "<|end|>", "lstrip": false}})");
  CHECK(open()->bos_id() == 7);
  CHECK(open()->eos_id() == end);
  put_file(folder.path() / "tokenizer_config.json",
           R"({"bos_token": null, "eos_token": "<|user|>", "pad_token": "<|end|>"})");
  CHECK(open()->bos_id() == -1);
  CHECK(open()->eos_id() == user);
  CHECK(open()->pad_id() == end);
  put_file(folder.path() / "tokenizer_config.json", R"({"eos_token": "<|no|>"})");
  clear_degradations();
  CHECK(open()->eos_id() == -1);
  REQUIRE(degradations().size() == 1);
  CHECK(contains(degradations()[0], "eos_token \"<|no|>\" is not in the vocabulary"));
  clear_degradations();
  put_file(folder.path() / "tokenizer_config.json", R"({"eos_token": 5})");
  CHECK(error_text<InputError>([&] { (void)open(); }) ==
        (folder.path() / "tokenizer_config.json").string() +
            ": eos_token: must be a text, got number; fetch the file again");
}

TEST_CASE("A directory with both vocabularies uses tokenizer.json") {
  const TemporaryFolder folder;
  const auto sentencepiece = small_tokenizer(folder.path());
  copy_golden("qwen", folder.path());
  CHECK(open_tokenizer(folder.path())->vocab_size() == golden("qwen")->vocab_size());
  CHECK(open_tokenizer(folder.path() / "tokenizer.model")->vocab_size() == sentencepiece->vocab_size());
}

// ---- Errors

// The golden file with `change` made to it, opened.
std::string error_after(const TemporaryFolder& folder, const std::function<void(Json&)>& change) {
  Json json = read_json_file(kGoldens / "smollm2" / "tokenizer.json");
  change(json);
  const std::filesystem::path path = folder.path() / "tokenizer.json";
  put_file(path, json.dump());
  const std::string text = error_text<InputError>([&] { (void)open_tokenizer(path); });
  REQUIRE(text.rfind(path.string() + ": ", 0) == 0);
  return text.substr(path.string().size() + 2);
}

TEST_CASE("A component that Hestia does not read is named with its type and its place") {
  const TemporaryFolder folder;
  const auto error = [&](const std::function<void(Json&)>& change) { return error_after(folder, change); };
  CHECK(contains(error([](Json& json) {
                   json["normalizer"] = {{"type", "Precompiled"}};
                 }),
                 "normalizer: a normalizer of type \"Precompiled\", which Hestia does not read"));
  CHECK(contains(error([](Json& json) {
                   json["pre_tokenizer"]["pretokenizers"][0] = {{"type", "BertPreTokenizer"}};
                 }),
                 "pre_tokenizer.pretokenizers[0]: a pre-tokenizer of type \"BertPreTokenizer\""));
  CHECK(contains(error([](Json& json) {
                   json["decoder"] = {{"type", "WordPiece"}};
                 }),
                 "decoder: a decoder of type \"WordPiece\""));
  CHECK(
      contains(error([](Json& json) { json["model"]["type"] = "WordLevel"; }), "model: a model of type \"WordLevel\""));
  CHECK(contains(error([](Json& json) { json["model"]["continuing_subword_prefix"] = "##"; }),
                 "model: continuing_subword_prefix \"##\""));
  CHECK(contains(error([](Json& json) { json["model"]["end_of_word_suffix"] = "</w>"; }), "end_of_word_suffix"));
  CHECK(contains(error([](Json& json) { json["model"]["dropout"] = 0.1; }), "model: dropout 0.1"));
  CHECK(contains(error([](Json& json) {
                   json["pre_tokenizer"]["pretokenizers"].push_back({{"type", "Whitespace"}});
                 }),
                 "pre_tokenizer.pretokenizers[2]: a step after ByteLevel"));
}

TEST_CASE("A damaged tokenizer.json says what is wrong") {
  const TemporaryFolder folder;
  const auto error = [&](const std::function<void(Json&)>& change) { return error_after(folder, change); };
  CHECK(contains(error([](Json& json) { json.erase("model"); }), "not a tokenizer.json of the tokenizers library"));
  CHECK(contains(error([](Json& json) { json["model"].erase("vocab"); }), "model: \"vocab\" is missing"));
  CHECK(contains(error([](Json& json) { json["model"]["vocab"]["zz"] = 1; }), "have the same id 1"));
  CHECK(contains(error([](Json& json) { json["model"]["vocab"]["zz"] = -4; }), "the id of \"zz\" must be an integer"));
  CHECK(contains(error([](Json& json) { json["model"]["vocab"]["zz"] = 1e9; }), "the id of \"zz\" must be an integer"));
  CHECK(contains(error([](Json& json) {
                   json["model"]["merges"].push_back({"e", "no"});
                 }),
                 "must be two tokens whose concatenation is one, got [\"e\",\"no\"]"));
  CHECK(contains(error([](Json& json) { json["model"]["merges"] = "e r"; }), "model.merges: must be a list"));
  CHECK(contains(error([](Json& json) { json["added_tokens"][0]["id"] = 0; }), "an added token: \"<|end|>\" has id 0"));
  CHECK(contains(error([](Json& json) { json["added_tokens"][0]["special"] = "yes"; }),
                 "special: must be true or false"));
  CHECK(contains(error([](Json& json) {
                   json["pre_tokenizer"] = {
                       {"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}, {"invert", false}};
                 }),
                 "the regular expression \"(a\" does not compile, missing closing parenthesis"));
  put_file(folder.path() / "tokenizer.json", "{\"model\": ");
  CHECK(contains(error_text<InputError>([&] { (void)open_tokenizer(folder.path()); }),
                 "tokenizer.json: not valid JSON at byte 11; mend the file"));
  put_file(folder.path() / "tokenizer.json", "{\"model\": 1e999}");
  CHECK(contains(error_text<InputError>([&] { (void)open_tokenizer(folder.path()); }),
                 "tokenizer.json: holds a number that is out of range"));
  put_file(folder.path() / "tokenizer.json", "[]");
  CHECK(contains(error_text<InputError>([&] { (void)open_tokenizer(folder.path()); }), "not a tokenizer.json"));
}

TEST_CASE("Regular expressions on which PCRE2 and Oniguruma disagree are rewritten or refused") {
  for (const char* refused :
       {R"(\h)", R"(\bx)", R"(\Rx)", R"(a{1,2}+)", R"([a[b]])", R"([a&&b])", R"([^\S\n])", R"(\p{Foo})", R"((?m:a))",
        R"((?x)a)", R"((?<name>a))", R"(\xE9)", R"(\1)", R"([]a])", R"(\pL)", R"(a\)"}) {
    CAPTURE(refused);
    CHECK(contains(error_text<InputError>([&] { (void)TextPattern(refused, "here"); }),
                   "which Hestia does not read as Oniguruma does"));
  }
  const auto matches = [](std::string_view expression, const std::string& text) {
    std::string found;
    TextPattern(expression, "here").for_each_match(text, [&](std::size_t begin, std::size_t end) {
      found += "[" + text.substr(begin, end - begin) + "]";
    });
    return found;
  };
  CHECK(matches(R"(\s)", "a\u180e\u0085\u00a0b") == "[\u0085][\u00a0]");
  CHECK(matches(R"(\w+)", "e\u0301_\u203f-\u24b6") == "[e\u0301_\u203f][\u24b6]");
  CHECK(matches(R"(\s+$)", "a \nb  ") == "[ ][  ]");
  CHECK(matches(R"(^x)", "x\nx x") == "[x][x]");
  CHECK(matches(R"(\p{Han}+)", "\u3001\u4e00\u4e8c\u3042") == "[\u4e00\u4e8c]");
  CHECK(matches(R"(\u4e00|\x{41}|\x42)", "\u4e00AB") == "[\u4e00][A][B]");
  CHECK(matches(R"(x*)", "axb") == "[][x][]");
  CHECK(matches(R"((?i:'s))", "'s'S'\u017f't") == "['s]['S]['\u017f]");
}

}  // namespace
}  // namespace hestia::testing
