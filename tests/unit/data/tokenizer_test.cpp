#include "hestia/data/tokenizer.hpp"

#include <algorithm>
#include <thread>

#include <catch2/catch.hpp>

#include "data_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_characters;
using testing::random_line;
using testing::random_lines;
using testing::small_tokenizer;
using testing::train_on;
using testing::utf8;

using Ids = std::vector<std::int32_t>;

constexpr std::int32_t kFirstByteToken = 6;  // after the special tokens, the line break and the tab

TEST_CASE("The trained vocabulary has the size and the special ids that the header names") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  CHECK(tokenizer->vocab_size() == 400);
  CHECK(tokenizer->bos_id() == 1);
  CHECK(tokenizer->eos_id() == 2);
  CHECK(tokenizer->pad_id() == 3);
  const Ids special = {0, 1, 2, 3};
  for (const std::string text : {"", "<s>", "</s>", "<pad>", "<unk>", "kalo</s>", "<s> mi"}) {
    for (const std::int32_t id : tokenizer->encode(text)) {
      CHECK(std::find(special.begin(), special.end(), id) == special.end());  // text cannot spell a special token
    }
    CHECK(tokenizer->decode(tokenizer->encode(text)) == text);
  }
}

TEST_CASE("Encoding and decoding keeps every byte") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  const std::vector<std::string> texts = {
      "",
      " ",
      "\n",
      "\t",
      "   three before, two after  ",
      "\n\n\n",
      "\t\tindented\n\t\tagain\n",
      "a\r\nb\rc",
      " \n \t \n",
      "kalo  mi   tur",
      std::string("zero \0 byte", 11),
      "controls \x01\x02\x1b\x7f",
      "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",  // no normalisation
      "\u00a0\u2003\u200b\u3000\ufeff",                            // spaces of other kinds, a byte order mark
      "\u202eright to left\u202c \u0645\u0631\u062d\u0628\u0627",
      "\U0001F600\U0001F468\u200D\U0001F469\u200D\U0001F467\U0001F1EA\U0001F1FA",
      "\ufffd\uffff\U0010ffff\u0080\u07ff\u0800",
  };
  for (const std::string& text : texts) {
    CHECK(tokenizer->decode(tokenizer->encode(text)) == text);
  }
  SplitMix64 random(1);
  for (int i = 0; i < 200; ++i) {
    const std::string text = i % 2 == 0 ? random_characters(random, random.below(60))
                                        : random_lines(random, 50) + random_characters(random, 3) +
                                              std::string(random.below(4), ' ') + random_line(random, 4);
    const Ids ids = tokenizer->encode(text);
    REQUIRE(tokenizer->decode(ids) == text);
    REQUIRE(std::count(ids.begin(), ids.end(), 0) == 0);  // nothing is unknown
  }
}

TEST_CASE("The sign that sentencepiece writes for a space is the one character that changes") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  CHECK(tokenizer->decode(tokenizer->encode("a\u2581b")) == "a b");
  CHECK(tokenizer->decode(tokenizer->encode("a\u2580\u2582b")) == "a\u2580\u2582b");
}

TEST_CASE("Characters that training did not meet become their bytes") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  const std::string grin = "\U0001F600";
  Ids expected;
  for (const char c : grin) {
    expected.push_back(kFirstByteToken + static_cast<unsigned char>(c));
  }
  CHECK(tokenizer->encode(grin) == expected);
}

TEST_CASE("A sentencepiece model reads U+FFFD for each byte that is no UTF-8") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  const std::string sign = "\ufffd";
  // A lone lead byte, a truncated character of two and of three bytes, an overlong one, a surrogate, one beyond
  // U+10FFFF, lone continuations, and bytes that UTF-8 has not.
  for (const std::string broken :
       {"\xe2", "\xe2\x82", "\xf0\x9f\x98", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80\xbf", "\xff\xfe"}) {
    std::string signs;
    for (std::size_t i = 0; i < broken.size(); ++i) {
      signs += sign;
    }
    for (const auto& [before, after] :
         {std::pair("", ""), std::pair("kalo ", ""), std::pair("", " mi"), std::pair("\xc3\xa9", "x\n")}) {
      const Ids ids = tokenizer->encode(before + broken + after);
      REQUIRE(ids == tokenizer->encode(before + signs + after));
      REQUIRE(tokenizer->encode_continuation(before + broken + after) ==
              tokenizer->encode_continuation(before + signs + after));
      REQUIRE(tokenizer->decode(ids) == before + signs + after);
    }
  }
}

TEST_CASE("Line breaks, tabs and digits are tokens of their own, however often they stand together") {
  const TemporaryFolder folder;
  SplitMix64 random(79);
  std::string often;
  for (int i = 0; i < 300; ++i) {
    often += "\t\t2040 " + random_line(random, 5) + "\n";
  }
  train_on({often}, {.vocab_size = 400}, folder.path() / "tokenizer.model");
  const auto tokenizer = open_tokenizer(folder.path());
  const Ids line_break = tokenizer->encode("\n");
  const Ids tab = tokenizer->encode("\t");
  CHECK(line_break.size() == 1);
  CHECK(tab.size() == 1);
  CHECK(tokenizer->encode("\n\n\t\n") == Ids{line_break[0], line_break[0], tab[0], line_break[0]});
  Ids digits;
  for (const char* digit : {"2", "0", "4", "0"}) {
    const Ids one = tokenizer->encode(digit);
    REQUIRE(one.size() == 1);
    digits.push_back(one[0]);
  }
  CHECK(tokenizer->encode("2040") == digits);
}

TEST_CASE("Training learns its text: common words are few tokens") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  SplitMix64 random(78);
  const std::string text = random_lines(random, 4000);  // of the same kind, not the same
  CHECK(tokenizer->encode(text).size() * 2 < text.size());
}

TEST_CASE("count_bytes says how much text tokens stand for, also inside a character") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  SplitMix64 random(2);
  for (int i = 0; i < 50; ++i) {
    const std::string text = random_lines(random, 40) + random_characters(random, 10) + "  " + random_line(random, 2);
    const Ids ids = tokenizer->encode(text);
    REQUIRE(tokenizer->count_bytes(ids) == static_cast<std::int64_t>(text.size()));
    const auto middle = ids.begin() + static_cast<std::ptrdiff_t>(random.below(ids.size() + 1));
    REQUIRE(tokenizer->count_bytes({ids.begin(), middle}) + tokenizer->count_bytes({middle, ids.end()}) ==
            static_cast<std::int64_t>(text.size()));
  }
  CHECK(tokenizer->count_bytes({}) == 0);
  CHECK(tokenizer->count_bytes({1, 2, 3}) == 0);  // special tokens
  CHECK(tokenizer->count_bytes({0}) == 1);
}

TEST_CASE("The same texts give the same tokenizer file, however they are cut into documents") {
  const TemporaryFolder folder;
  SplitMix64 random(3);
  std::vector<std::string> lines;
  std::string whole;
  for (int i = 0; i < 600; ++i) {
    lines.push_back(random_line(random, 8));
    whole += lines.back();
  }
  const TokenizerTraining options{.vocab_size = 380};
  train_on(lines, options, folder.path() / "a.model");
  train_on(lines, options, folder.path() / "b.model");
  train_on({whole}, options, folder.path() / "c.model");
  const std::string bytes = read_text_file(folder.path() / "a.model");
  CHECK(bytes == read_text_file(folder.path() / "b.model"));
  CHECK(bytes == read_text_file(folder.path() / "c.model"));
  lines.resize(300);
  train_on(lines, options, folder.path() / "d.model");
  CHECK(bytes != read_text_file(folder.path() / "d.model"));
}

TEST_CASE("Long lines are cut between characters") {
  const TemporaryFolder folder;
  SplitMix64 random(4);
  std::vector<std::string> texts = {random_lines(random, 20'000)};
  for (int i = 0; i < 200; ++i) {
    // Characters of two bytes: the cut falls inside one in every second text.
    texts.emplace_back(i % 2 == 0 ? "" : "x");
    for (int j = 0; j < 30; ++j) {
      texts.back() += utf8(0xE0 + static_cast<std::uint32_t>(random.below(8)));
    }
  }
  train_on(texts, {.vocab_size = 380, .max_sentence_bytes = 31}, folder.path() / "tokenizer.model");
  const auto tokenizer = open_tokenizer(folder.path());
  // Half a character would have taught the replacement character: as a piece of its own it would be one token.
  CHECK(tokenizer->encode("\ufffd").size() == 3);
  CHECK(tokenizer->encode("\u00e1").size() == 1);
}

TEST_CASE("A tokenizer opens from its folder or its file") {
  const TemporaryFolder folder;
  const auto first = small_tokenizer(folder.path());
  std::filesystem::copy_file(folder.path() / "tokenizer.model", folder.path() / "other name");
  const auto second = open_tokenizer(folder.path() / "other name");
  CHECK(first->encode("kalo mitur") == second->encode("kalo mitur"));
}

TEST_CASE("A missing tokenizer names what was looked for") {
  const TemporaryFolder folder;
  const std::string rest =
      ": there is no tokenizer.json and no tokenizer.model (sentencepiece); give a model directory that has one";
  CHECK(error_text<InputError>([&] { (void)open_tokenizer(folder.path()); }) == folder.path().string() + rest);
  const std::filesystem::path lost = folder.path() / "no" / "tokenizer.model";
  CHECK(error_text<InputError>([&] { (void)open_tokenizer(lost); }) == lost.string() + rest);
}

TEST_CASE("A damaged tokenizer is named with sentencepiece's reason") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "tokenizer.model";
  (void)small_tokenizer(folder.path());
  const std::string good = read_text_file(path);
  SplitMix64 random(5);
  std::string noise(5000, '\0');
  std::generate(noise.begin(), noise.end(), [&] { return static_cast<char>(random.below(256)); });
  const std::vector<std::string> damaged = {
      "", "{\"version\": 1}\n", noise, good.substr(0, good.size() / 2), good.substr(0, 3), good.substr(1)};
  for (const std::string& bytes : damaged) {
    put_file(path, bytes);
    const std::string text = error_text<InputError>([&] { (void)open_tokenizer(folder.path()); });
    CAPTURE(bytes.size());
    CHECK(text.rfind(path.string() + ": not a sentencepiece model (", 0) == 0);
    CHECK(contains(text, "); fetch tokenizer.model again"));
  }
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  CHECK(error_text<InputError>([&] { (void)open_tokenizer(folder.path()); }) ==
        path.string() + ": cannot be read, Is a directory; check the path");
}

TEST_CASE("Training that cannot succeed says why and leaves the old file") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "tokenizer.model";
  put_file(path, "old");
  SplitMix64 random(6);
  const std::vector<std::string> texts = {random_lines(random, 2000)};
  const std::string text = error_text<RunError>([&] { train_on(texts, {.vocab_size = 100'000}, path); });
  CHECK(text.rfind("tokenizer: training failed, ", 0) == 0);
  CHECK(contains(text, "; give more text or a smaller vocab_size (100000)"));
  CHECK(
      contains(error_text<RunError>([&] { train_on({}, {.vocab_size = 400}, path); }), "tokenizer: training failed, "));
  CHECK(contains(error_text<RunError>([&] {
                   train_on({"", "\n\n"}, {.vocab_size = 400}, path);
                 }),
                 "tokenizer: training failed, "));
  CHECK(contains(error_text<RunError>([&] { train_on(texts, {.vocab_size = 100}, path); }),  // 256 bytes do not fit
                 "tokenizer: training failed, "));
  CHECK(read_text_file(path) == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("A tokenizer that cannot be written is a RunError") {
  const TemporaryFolder folder;
  SplitMix64 random(7);
  const std::filesystem::path lost = folder.path() / "no" / "tokenizer.model";
  CHECK(contains(error_text<RunError>([&] { train_on({random_lines(random, 20'000)}, {.vocab_size = 350}, lost); }),
                 lost.string() + ": cannot be written, No such file or directory"));
}

TEST_CASE("Ids outside the vocabulary are refused") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  for (const std::int32_t id : {400, 1'000'000, -1}) {
    const std::string text = error_text<RunError>([&] { (void)tokenizer->decode({10, id}); });
    CHECK(text.rfind("tokenizer: the ids cannot be decoded, ", 0) == 0);
    CHECK(contains(text, "; check that they are below 400"));
  }
}

TEST_CASE("Threads may share a tokenizer") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  SplitMix64 random(8);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 100; ++i) {
    texts.push_back(random_lines(random, 200) + random_characters(random, 5));
    expected.push_back(tokenizer->encode(texts.back()));
  }
  std::vector<std::vector<Ids>> results(3, std::vector<Ids>(texts.size()));
  std::vector<std::thread> threads;
  for (std::vector<Ids>& result : results) {
    threads.emplace_back([&] {
      std::transform(texts.begin(), texts.end(), result.begin(), [&](const std::string& text) {
        return tokenizer->encode(tokenizer->decode(tokenizer->encode(text)));
      });
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const std::vector<Ids>& result : results) {
    CHECK(result == expected);
  }
}

}  // namespace
}  // namespace hestia
