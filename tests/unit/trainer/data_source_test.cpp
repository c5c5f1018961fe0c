#include "hestia/trainer/data_source.hpp"

#include <algorithm>
#include <limits>

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
