#include "hestia/trainer/data_source.hpp"

#include <algorithm>
#include <limits>
#include <regex>
#include <set>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/random.hpp"
#include "temporary_folder.hpp"

using namespace hestia;

namespace {

// 40 questions whose answers take some 4,000 bytes, of which a sequence has room for a few words.
DataOptions long_answers(const TemporaryFolder& folder) {
  static const char* const kWords[] = {"seven", "apples", "cost", "each", "day", "half", "of", "them", "and", "river"};
  SplitMix64 random(31);
  std::string lines;
  for (int line = 0; line < 40; ++line) {
    std::string answer;
    while (answer.size() < 4000) {
      answer += std::string(kWords[random.below(std::size(kWords))]) + " ";
    }
    lines += R"({"question": "How many?", "answer": ")" + answer + "\"}\n";
  }
  write_text_atomically(folder.path() / "long.jsonl", lines);
  DataOptions data;
  data.sequence_length = 64;
  data.train = {"long"};
  CorpusOptions corpus;
  corpus.domain = "long";
  corpus.paths = {(folder.path() / "long.jsonl").string()};
  corpus.format = "jsonl";
  corpus.text_field = "answer";
  corpus.prompt_field = "question";
  data.corpora = {corpus};
  return data;
}

}  // namespace

TEST_CASE("a bound on tokens is reached where examples are cut, and not overstepped by more than a sequence") {
  const TemporaryFolder folder;
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(HESTIA_SOURCE_DIR "/checkpoints/tiny");
  DataOptions data = long_answers(folder);
  data.held_out_fraction = 0.1;
  const std::int64_t all = load_training_data(data, *tokenizer, 1).num_tokens();
  REQUIRE(all > 2000);
  for (const std::int64_t bound : {100, 1000, 2000}) {
    data.max_tokens_per_domain = bound;
    const std::int64_t tokens = load_training_data(data, *tokenizer, 2).num_tokens();
    CHECK(tokens >= bound);
    CHECK(tokens < bound + data.sequence_length + 1);
  }
  // A corpus that holds less, whatever the bound.
  for (const std::int64_t bound : {all + 1, std::numeric_limits<std::int64_t>::max()}) {
    data.max_tokens_per_domain = bound;
    CHECK(load_training_data(data, *tokenizer, 1).num_tokens() == all);
  }
  // The corpus's own bound holds: of the first document, the one that reaches it.
  data.max_tokens_per_domain = 1000;
  data.corpora[0].max_bytes = 3000;
  CHECK(load_training_data(data, *tokenizer, 1).sequences.size() == 1);
}

TEST_CASE("where examples that are too long are dropped, a bound on tokens goes on to those that are not") {
  const TemporaryFolder folder;
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(HESTIA_SOURCE_DIR "/checkpoints/tiny");
  DataOptions data = long_answers(folder);
  data.held_out_fraction = 0.1;
  data.corpora[0].overlong = "drop";
  data.max_tokens_per_domain = 8;
  CHECK_THROWS_WITH(load_training_data(data, *tokenizer, 1), Catch::Contains("holds no text"));
  std::string lines = read_text_file(data.corpora[0].paths[0]);
  for (int line = 0; line < 3; ++line) {
    lines += R"({"question": "How many?", "answer": "Seven."})"
             "\n";
  }
  write_text_atomically(data.corpora[0].paths[0], lines);
  const PackedData found = load_training_data(data, *tokenizer, 1);
  CHECK(found.num_tokens() >= 8);
}

TEST_CASE("a sample of long documents comes from many of them, and from everywhere in them") {
  const TemporaryFolder folder;
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(HESTIA_SOURCE_DIR "/checkpoints/tiny");
  // 60 documents of some 80 sequences, each of words of its own that say which sequence it is.
  std::string lines;
  for (int document = 0; document < 60; ++document) {
    std::string text;
    for (int word = 0; word < 600; ++word) {
      text += "d" + std::to_string(document) + " w" + std::to_string(word) + " ";
    }
    lines += R"({"text": ")" + text + "\"}\n";
  }
  write_text_atomically(folder.path() / "long.jsonl", lines);
  DataOptions data;
  data.sequence_length = 64;
  data.held_out_fraction = 0.5;
  data.train = {"long"};
  CorpusOptions corpus;
  corpus.domain = "long";
  corpus.paths = {(folder.path() / "long.jsonl").string()};
  corpus.format = "jsonl";
  data.corpora = {corpus};
  const auto texts = [&](const PackedData& sample) {
    std::vector<std::string> found;
    for (const TokenSequence& sequence : sample.sequences) {
      found.push_back(tokenizer->decode(sequence.tokens));
    }
    return found;
  };
  const auto documents = [](const std::vector<std::string>& found) {
    std::set<std::string> names;
    std::set<int> tenths;
    for (const std::string& text : found) {
      std::smatch match;
      REQUIRE(std::regex_search(text, match, std::regex("d([0-9]+) w([0-9]+) ")));
      names.insert(match[1]);
      tenths.insert(std::stoi(match[2]) / 60);
    }
    return std::pair(names.size(), tenths.size());
  };
  constexpr std::int64_t kTokens = 64 * 40;
  for (const Split split : {Split::kHeldOut, Split::kTrain}) {
    const PackedData sample = load_sample(data, {"long"}, *tokenizer, split, kTokens, 1);
    CHECK(sample.num_tokens() >= kTokens);
    CHECK(sample.num_tokens() < kTokens + data.sequence_length);
    const std::vector<std::string> found = texts(sample);
    const auto [names, tenths] = documents(found);
    CHECK(names >= 4);  // the first 40 sequences are of one
    CHECK(tenths >= 8);
    CHECK(std::set<std::string>(found.begin(), found.end()).size() == found.size());
    // The same again, whatever the number of threads.
    CHECK(texts(load_sample(data, {"long"}, *tokenizer, split, kTokens, 2)) == found);
    // Two domains do not disturb each other.
    DataOptions two = data;
    two.corpora.push_back(corpus);
    two.corpora[1].domain = "again";
    const std::vector<std::string> both = texts(load_sample(two, {"again", "long"}, *tokenizer, split, kTokens, 1));
    REQUIRE(both.size() == 2 * found.size());
    CHECK(std::equal(found.begin(), found.end(), both.begin()));
    CHECK(std::equal(found.begin(), found.end(), both.begin() + static_cast<std::ptrdiff_t>(found.size())));
  }
  // All there is, where more is asked for; of the training split no more than is trained on.
  constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();
  const PackedData all = load_sample(data, {"long"}, *tokenizer, Split::kTrain, kAll, 1);
  CHECK(all.num_tokens() == load_training_data(data, *tokenizer, 1).num_tokens());
  data.max_tokens_per_domain = 1000;
  const std::vector<std::string> trained_on = texts(load_training_data(data, *tokenizer, 1));
  CHECK(texts(load_sample(data, {"long"}, *tokenizer, Split::kTrain, kAll, 1)) == trained_on);
  for (const std::string& text : texts(load_sample(data, {"long"}, *tokenizer, Split::kTrain, 300, 1))) {
    CHECK(std::find(trained_on.begin(), trained_on.end(), text) != trained_on.end());
  }
}

TEST_CASE("a sample of examples is the first ones") {
  const TemporaryFolder folder;
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(HESTIA_SOURCE_DIR "/checkpoints/tiny");
  DataOptions data = long_answers(folder);
  data.held_out_fraction = 0.5;
  data.max_tokens_per_domain = 300;
  const PackedData first = load_training_data(data, *tokenizer, 1);
  data.max_tokens_per_domain = 0;
  const PackedData sample = load_sample(data, {"long"}, *tokenizer, Split::kTrain, 300, 1);
  REQUIRE(sample.sequences.size() == first.sequences.size());
  CHECK(sample.sequences.back().tokens == first.sequences.back().tokens);
}
