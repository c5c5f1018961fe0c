#include "hestia/data/packing.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>

#include <catch2/catch.hpp>

#include "data_fixtures.hpp"
#include "hestia/core/log.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::completion_of;
using testing::random_characters;
using testing::random_lines;
using testing::small_tokenizer;

constexpr std::int64_t kIgnored = -100;

// One token a byte, with or without <s> and </s>.
class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(std::int32_t bos = 1, std::int32_t eos = 2) : bos_(bos), eos_(eos) {}
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<std::int32_t> ids;
    for (const char c : text) {
      ids.push_back(kSpecial + static_cast<unsigned char>(c));
    }
    return ids;
  }
  [[nodiscard]] std::string decode(const std::vector<std::int32_t>& ids) const override {
    std::string text;
    for (const std::int32_t id : ids) {
      text += id < kSpecial ? "" : std::string(1, static_cast<char>(id - kSpecial));
    }
    return text;
  }
  [[nodiscard]] std::int64_t count_bytes(const std::vector<std::int32_t>& ids) const override {
    return std::count_if(ids.begin(), ids.end(), [](std::int32_t id) { return id >= kSpecial; });
  }
  [[nodiscard]] std::int64_t vocab_size() const override { return kSpecial + 256; }
  [[nodiscard]] std::int32_t token_id(std::string_view name) const override { return name == "<turn>" ? 3 : -1; }
  [[nodiscard]] std::int32_t bos_id() const override { return bos_; }
  [[nodiscard]] std::int32_t eos_id() const override { return eos_; }
  [[nodiscard]] std::int32_t pad_id() const override { return -1; }

 private:
  static constexpr std::int32_t kSpecial = 4;
  std::int32_t bos_;
  std::int32_t eos_;
};

bool same(const TokenSequence& a, const TokenSequence& b) {
  return a.tokens == b.tokens && a.num_prompt_tokens == b.num_prompt_tokens && a.domain == b.domain &&
         a.num_bytes == b.num_bytes && a.completion_mask() == b.completion_mask();
}

bool same(const PackedData& a, const PackedData& b) {
  return a.domains == b.domains &&
         std::equal(a.sequences.begin(), a.sequences.end(), b.sequences.begin(), b.sequences.end(),
                    [](const TokenSequence& x, const TokenSequence& y) { return same(x, y); });
}

bool same(const PackedBatch& a, const PackedBatch& b) {
  return a.num_rows == b.num_rows && a.row_length == b.row_length && a.tokens == b.tokens && a.labels == b.labels &&
         a.sequence_ids == b.sequence_ids && a.positions == b.positions && a.counted == b.counted &&
         a.domains == b.domains && a.num_bytes == b.num_bytes;
}

// The next warnings are expected.
class QuietScope {
 public:
  QuietScope() { set_log_level(LogLevel::kError); }
  QuietScope(const QuietScope&) = delete;
  QuietScope& operator=(const QuietScope&) = delete;
  ~QuietScope() { set_log_level(LogLevel::kInfo); }
};

PackedData tokenized(const std::vector<Document>& documents, const Tokenizer& tokenizer, std::int64_t sequence_length,
                     std::int64_t max_tokens = 0, std::int64_t num_threads = 1) {
  PackedData data;
  tokenize_documents(documents, tokenizer, sequence_length, max_tokens, num_threads, data);
  return data;
}

std::vector<Document> random_documents(SplitMix64& random, int count, std::size_t max_bytes) {
  static const char* const kDomains[] = {"prose", "code", "mail"};
  std::vector<Document> documents;
  for (int i = 0; i < count; ++i) {
    const std::string text = random_characters(random, 1 + random.below(max_bytes / 2));
    documents.push_back({fmt::format("{}", i), kDomains[random.below(3)], "", text});
  }
  return documents;
}

// ---------------------------------------------------------------------------------------------------------------------
// Documents to sequences.

// With and without <s> and </s>.
const std::vector<std::pair<std::int32_t, std::int32_t>> kSpecialIds = {{1, 2}, {-1, 2}, {1, -1}, {-1, -1}};

TEST_CASE("A document's sequences hold all of its tokens in order, each after its own <s>") {
  SplitMix64 random(1);
  for (const auto& [bos, eos] : kSpecialIds) {
    const ByteTokenizer tokenizer(bos, eos);
    for (int round = 0; round < 60; ++round) {
      const auto length = static_cast<std::int64_t>(2 + random.below(40));
      const std::vector<Document> documents = random_documents(random, 1, 200);
      const PackedData data = tokenized(documents, tokenizer, length);
      std::vector<std::int32_t> expected = tokenizer.encode(completion_of(documents[0]));
      const auto text_size = static_cast<std::int64_t>(expected.size());
      if (eos >= 0) {
        expected.push_back(eos);
      }
      std::vector<std::int32_t> found;
      std::int64_t bytes = 0;
      for (const TokenSequence& sequence : data.sequences) {
        REQUIRE(static_cast<std::int64_t>(sequence.tokens.size()) <= length);
        REQUIRE(sequence.tokens.size() >= 2);
        REQUIRE(sequence.num_prompt_tokens == 0);
        REQUIRE(sequence.domain == 0);
        if (bos >= 0) {
          REQUIRE(sequence.tokens[0] == bos);
        }
        found.insert(found.end(), sequence.tokens.begin() + (bos >= 0 ? 1 : 0), sequence.tokens.end());
        bytes += sequence.num_bytes;
        if (&sequence != &data.sequences.back()) {
          REQUIRE(static_cast<std::int64_t>(sequence.tokens.size()) == length);  // no room is left before the last
        }
      }
      if (bos < 0 && found.size() + 1 == expected.size()) {
        expected.pop_back();  // a last token alone predicts nothing and is predicted by nothing
      }
      REQUIRE(found == expected);
      if (bos >= 0) {
        REQUIRE(bytes == text_size);
      } else {
        // The first token of a sequence is nobody's label.
        const auto labelled = std::count_if(found.begin(), found.end(), [&](std::int32_t id) { return id != eos; });
        REQUIRE(bytes == labelled - static_cast<std::int64_t>(data.sequences.size()));
      }
    }
  }
}

TEST_CASE("</s> ends the document and no other sequence of it") {
  const ByteTokenizer tokenizer;
  const PackedData data = tokenized({{"a", "d", "", std::string(95, 'x')}}, tokenizer, 32);
  REQUIRE(data.sequences.size() == 4);  // 31 + 31 + 31 + 2 letters and </s>
  for (const TokenSequence& sequence : data.sequences) {
    CHECK(std::count(sequence.tokens.begin(), sequence.tokens.end(), 2) ==
          (&sequence == &data.sequences.back() ? 1 : 0));
  }
  CHECK(data.sequences.back().tokens.back() == 2);
  CHECK(data.sequences.back().tokens.size() == 4);
}

TEST_CASE("A prompt is no part of the text that is learnt") {
  const QuietScope quiet;
  SplitMix64 random(3);
  for (const auto& [bos, eos] : kSpecialIds) {
    const ByteTokenizer tokenizer(bos, eos);
    for (int round = 0; round < 60; ++round) {
      const auto length = static_cast<std::int64_t>(4 + random.below(60));
      const std::string prompt = random_characters(random, 1 + random.below(15));
      const std::string answer = random_characters(random, 1 + random.below(15));
      const PackedData data = tokenized({{"a", "d", prompt, answer}}, tokenizer, length);
      REQUIRE(data.sequences.size() == 1);
      const TokenSequence& sequence = data.sequences[0];
      std::vector<std::int32_t> question = tokenizer.encode(prompt);
      std::vector<std::int32_t> expected = tokenizer.encode(answer);
      if (eos >= 0) {
        expected.push_back(eos);
      }
      // What is too long loses the left of its prompt, down to half the length.
      const std::size_t most =
          std::max(static_cast<std::size_t>(length / 2),
                   static_cast<std::size_t>(std::max<std::int64_t>(
                       0, length - (bos >= 0 ? 1 : 0) - static_cast<std::int64_t>(expected.size()))));
      if (question.size() > most) {
        question.erase(question.begin(), question.end() - static_cast<std::ptrdiff_t>(most));
      }
      if (bos >= 0) {
        question.insert(question.begin(), bos);
      }
      expected.insert(expected.begin(), question.begin(), question.end());
      expected.resize(std::min(expected.size(), static_cast<std::size_t>(length)));  // the answer's end is cut
      REQUIRE(sequence.tokens == expected);
      REQUIRE(sequence.num_prompt_tokens == static_cast<std::int64_t>(question.size()));
      const auto learnt =
          static_cast<std::int64_t>(std::count_if(expected.begin() + static_cast<std::ptrdiff_t>(question.size()),
                                                  expected.end(), [&](std::int32_t id) { return id != eos; }));
      REQUIRE(sequence.num_bytes == learnt);
    }
  }
}

TEST_CASE("A sequence that would have no label is not made") {
  const QuietScope quiet;
  const ByteTokenizer tokenizer;
  CHECK(tokenized({{"a", "d", "why", "because"}}, tokenizer, 2).sequences.empty());  // <s> and prompt fill it
  CHECK(tokenized({{"a", "d", "", ""}}, ByteTokenizer(-1, 2), 8).sequences.empty());
  CHECK(tokenized({{"a", "d", "", "x"}}, ByteTokenizer(-1, -1), 8).sequences.empty());
  CHECK(tokenized({{"a", "d", "why", "because"}}, tokenizer, 3).sequences.size() == 1);
}

TEST_CASE("Truncated and dropped examples are counted, and told once per domain") {
  const QuietScope quiet;
  const ByteTokenizer tokenizer;
  const std::string long_text(100, 'x');
  const std::string half(16, 'y');
  const std::vector<Document> documents = {{"a", "d", "why?", "so"},         {"b", "d", "", long_text},
                                           {"c", "d", long_text, "so"},      {"e", "d", "why?", long_text},
                                           {"f", "e", half, "fifteen ltrs"}, {"g", "f", long_text, "so"}};
  clear_degradations();
  PackedData cut = tokenized(documents, tokenizer, 32);
  REQUIRE(cut.examples.size() == 3);
  CHECK((cut.examples[0].read == 3 && cut.examples[0].truncated == 2 && cut.examples[0].dropped == 0));
  CHECK((cut.examples[1].read == 1 && cut.examples[1].truncated == 0 && cut.examples[1].dropped == 0));
  CHECK(degradations() ==
        std::vector<std::string>{
            "domain \"d\": of 3 examples, 2 longer than data.sequence_length (32) were truncated and 0 dropped",
            "domain \"f\": of 1 examples, 1 longer than data.sequence_length (32) were truncated and 0 dropped"});
  // The prompt of `c` keeps what has room beside the whole answer, that of `g` as well.
  CHECK(cut.sequences.back().tokens.size() == 32);
  CHECK(cut.sequences.back().num_prompt_tokens == 29);
  clear_degradations();
  PackedData dropped;
  tokenize_documents(documents, tokenizer, 32, 0, 2, dropped, Overlong::kDrop);
  CHECK((dropped.examples[0].read == 3 && dropped.examples[0].truncated == 0 && dropped.examples[0].dropped == 2));
  CHECK(dropped.examples[2].dropped == 1);
  CHECK(dropped.sequences.size() == cut.sequences.size() - 3);  // plain text is not dropped
  CHECK(degradations().size() == 2);
  // A second call, as for another corpus, tells of its own examples only.
  clear_degradations();
  tokenize_documents({{"h", "d", "why?", "so"}}, tokenizer, 32, 0, 1, dropped, Overlong::kDrop);
  CHECK(dropped.examples[0].read == 4);
  CHECK(degradations().empty());
}

TEST_CASE("Domains are numbered as they come, also over several calls") {
  const ByteTokenizer tokenizer;
  PackedData data;
  tokenize_documents({{"a", "prose", "", "one"}, {"b", "code", "", "two"}, {"c", "prose", "", "three"}}, tokenizer, 16,
                     0, 1, data);
  tokenize_documents({{"d", "mail", "", "four"}, {"e", "code", "", "five"}}, tokenizer, 16, 0, 1, data);
  CHECK(data.domains == std::vector<std::string>{"prose", "code", "mail"});
  std::vector<std::int32_t> domains;
  for (const TokenSequence& sequence : data.sequences) {
    domains.push_back(sequence.domain);
  }
  CHECK(domains == std::vector<std::int32_t>{0, 1, 0, 2, 1});
  CHECK(data.num_tokens() == 3 + 3 + 5 + 4 + 4 + 5 * 2);
}

TEST_CASE("max_tokens keeps the first sequences, as many as it takes, of each call") {
  SplitMix64 random(4);
  const ByteTokenizer tokenizer;
  const std::vector<Document> documents = random_documents(random, 600, 60);  // more than one round of the threads
  const PackedData all = tokenized(documents, tokenizer, 24);
  for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{500}, all.num_tokens() - 1, all.num_tokens() + 1}) {
    PackedData some = tokenized(documents, tokenizer, 24, limit, 2);
    REQUIRE(some.sequences.size() <= all.sequences.size());
    for (std::size_t i = 0; i < some.sequences.size(); ++i) {
      REQUIRE(same(some.sequences[i], all.sequences[i]));
    }
    CHECK((some.num_tokens() >= limit || some.sequences.size() == all.sequences.size()));
    const std::int64_t before = some.num_tokens();
    tokenize_documents(documents, tokenizer, 24, limit, 2, some);
    CHECK(some.num_tokens() == 2 * before);
    some.sequences.resize(some.sequences.size() / 2 - 1);
    CHECK(some.num_tokens() < limit);
  }
}

TEST_CASE("The number of threads changes nothing") {
  const QuietScope quiet;
  SplitMix64 random(5);
  const ByteTokenizer tokenizer;
  std::vector<Document> documents = random_documents(random, 700, 200);
  for (std::size_t i = 0; i < documents.size(); i += 3) {
    documents[i] = {documents[i].id, documents[i].domain, random_characters(random, 3), completion_of(documents[i])};
  }
  const PackedData one = tokenized(documents, tokenizer, 64);
  CHECK(one.sequences.size() > documents.size());
  for (const std::int64_t threads : {2, 3, 8}) {
    CHECK(same(one, tokenized(documents, tokenizer, 64, 0, threads)));
    CHECK(same(tokenized(documents, tokenizer, 64, 5000, 1), tokenized(documents, tokenizer, 64, 5000, threads)));
  }
}

// Fails for one text.
class FailingTokenizer : public ByteTokenizer {
 public:
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const override {
    if (text == "bad") {
      throw RunError("tokenizer: bad text");
    }
    return ByteTokenizer::encode(text);
  }
};

TEST_CASE("A tokenizer's error reaches the caller from any thread") {
  std::vector<Document> documents(300, Document("a", "d", "", "good"));
  documents[270] = {"b", "d", "", "bad"};
  for (const std::int64_t threads : {1, 4}) {
    CHECK(error_text<RunError>([&] { (void)tokenized(documents, FailingTokenizer(), 16, 0, threads); }) ==
          "tokenizer: bad text");
  }
  CHECK_THROWS_AS(tokenized(documents, ByteTokenizer(), 1), std::invalid_argument);
}

TEST_CASE("Bytes add up to the text also where a sequence ends inside a character") {
  const TemporaryFolder folder;
  const auto tokenizer = small_tokenizer(folder.path());
  SplitMix64 random(6);
  for (std::int64_t length = 5; length < 60; length += 3) {
    // Characters that training did not meet are several tokens each.
    const std::string text = random_characters(random, 40) + "  " + random_lines(random, 80) + "  x " +
                             random_characters(random, 40) + "\n\n";
    const PackedData data = tokenized({{"a", "d", "", text}}, *tokenizer, length);
    CHECK(data.sequences.size() > 1);
    std::int64_t bytes = 0;
    for (const TokenSequence& sequence : data.sequences) {
      bytes += sequence.num_bytes;
    }
    CHECK(bytes == static_cast<std::int64_t>(text.size()));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sequences to batches.

constexpr std::int32_t kFirstMark = 1'000'000;

struct DataShape {
  int num_sequences = 100;
  std::int64_t min_length = 2;
  std::int64_t max_length = 32;
  int num_domains = 3;
  double prompts = 0.3;  ///< Share of sequences with a prompt.
};

// Random sequences; the first token marks which one it is, so that it is known again in a batch.
PackedData random_data(SplitMix64& random, const DataShape& shape) {
  PackedData data;
  for (int i = 0; i < shape.num_domains; ++i) {
    data.domains.push_back(fmt::format("domain {}", i));
  }
  for (int i = 0; i < shape.num_sequences; ++i) {
    TokenSequence sequence;
    const auto length = static_cast<std::size_t>(
        shape.min_length +
        static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(shape.max_length - shape.min_length + 1))));
    sequence.tokens.push_back(kFirstMark + i);
    while (sequence.tokens.size() < length) {
      sequence.tokens.push_back(static_cast<std::int32_t>(1 + random.below(500)));
    }
    if (random.uniform() < shape.prompts) {
      sequence.num_prompt_tokens = static_cast<std::int64_t>(1 + random.below(length - 1));
      const std::int64_t room = static_cast<std::int64_t>(length) - sequence.num_prompt_tokens;
      if (room > 2 && random.uniform() < 0.5) {  // a second question
        const std::int64_t begin = sequence.num_prompt_tokens + 1;
        sequence.later_prompts = {{begin, begin + 1 + static_cast<std::int64_t>(random.below(room - 2))}};
      }
    }
    sequence.domain = static_cast<std::int32_t>(random.below(data.domains.size()));
    sequence.num_bytes = static_cast<std::int64_t>(1 + random.below(99));
    data.sequences.push_back(std::move(sequence));
  }
  return data;
}

// Checks every promise of PackedBatch against the data that it was made of; returns the sequences it holds.
std::vector<std::size_t> check_batch(const PackedData& data, const PackedBatch& batch, std::int64_t num_rows,
                                     std::int64_t row_length) {
  REQUIRE(batch.num_rows == num_rows);
  REQUIRE(batch.row_length == row_length);
  const auto size = static_cast<std::size_t>(num_rows * row_length);
  REQUIRE(batch.tokens.size() == size);
  REQUIRE(batch.labels.size() == size);
  REQUIRE(batch.sequence_ids.size() == size);
  REQUIRE(batch.positions.size() == size);
  REQUIRE(batch.counted.size() == size);
  std::vector<std::size_t> indices;
  std::int64_t bytes = 0;
  std::int64_t labels = 0;
  for (std::size_t row = 0; row < static_cast<std::size_t>(num_rows); ++row) {
    const std::size_t end = (row + 1) * static_cast<std::size_t>(row_length);
    std::size_t at = row * static_cast<std::size_t>(row_length);
    while (at < end && batch.sequence_ids[at] != -1) {
      const std::int64_t mark = batch.tokens[at] - kFirstMark;
      REQUIRE(mark >= 0);  // a sequence begins here, nothing of another one
      REQUIRE(mark < static_cast<std::int64_t>(data.sequences.size()));
      const TokenSequence& sequence = data.sequences[static_cast<std::size_t>(mark)];
      const std::size_t length = sequence.tokens.size();
      REQUIRE(at + length <= end);  // never split over two rows
      const auto is_completion = [&](std::size_t t) {
        const auto token = static_cast<std::int64_t>(t);
        return token >= sequence.num_prompt_tokens &&
               std::none_of(sequence.later_prompts.begin(), sequence.later_prompts.end(),
                            [&](const TokenRange& range) { return token >= range.begin && token < range.end; });
      };
      for (std::size_t t = 0; t < length; ++t) {
        const bool has_label = t + 1 < length && is_completion(t + 1);
        REQUIRE(batch.tokens[at + t] == sequence.tokens[t]);
        REQUIRE(batch.sequence_ids[at + t] == static_cast<std::int64_t>(indices.size()));
        REQUIRE(batch.positions[at + t] == static_cast<std::int64_t>(t));
        REQUIRE(batch.counted[at + t] == (is_completion(t) ? 1 : 0));
        REQUIRE(batch.labels[at + t] == (has_label ? sequence.tokens[t + 1] : kIgnored));
        labels += has_label ? 1 : 0;
      }
      REQUIRE(batch.domains.at(indices.size()) == sequence.domain);
      indices.push_back(static_cast<std::size_t>(mark));
      bytes += sequence.num_bytes;
      at += length;
    }
    for (; at < end; ++at) {  // the rest is padding
      REQUIRE(batch.tokens[at] == 0);
      REQUIRE(batch.labels[at] == kIgnored);
      REQUIRE(batch.sequence_ids[at] == -1);
      REQUIRE(batch.positions[at] == 0);
      REQUIRE(batch.counted[at] == 0);
    }
  }
  REQUIRE(batch.domains.size() == indices.size());
  REQUIRE(batch.num_bytes == bytes);
  REQUIRE(batch.num_labels() == labels);
  return indices;
}

TEST_CASE("A batch is laid out as the header says, value by value") {
  PackedData data;
  data.domains = {"a", "b"};
  data.sequences = {{{11, 12, 13, 14}, 2, 1, 7}, {{21, 22}, 0, 0, 5}, {{31, 32, 33}, 0, 1, 3}};
  const auto batches = pack_for_evaluation(data, -1, 2, 7);
  REQUIRE(batches.size() == 1);
  const PackedBatch& batch = batches[0];
  const std::int64_t no = kIgnored;
  CHECK(batch.tokens == std::vector<std::int64_t>{11, 12, 13, 14, 21, 22, 0, 31, 32, 33, 0, 0, 0, 0});
  CHECK(batch.labels == std::vector<std::int64_t>{no, 13, 14, no, 22, no, no, 32, 33, no, no, no, no, no});
  CHECK(batch.sequence_ids == std::vector<std::int64_t>{0, 0, 0, 0, 1, 1, -1, 2, 2, 2, -1, -1, -1, -1});
  CHECK(batch.positions == std::vector<std::int64_t>{0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 0, 0, 0, 0});
  CHECK(batch.counted == std::vector<std::uint8_t>{0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0});
  CHECK(batch.domains == std::vector<std::int32_t>{1, 0, 1});
  CHECK(batch.num_bytes == 15);
  CHECK(batch.num_labels() == 5);
}

TEST_CASE("Nothing of one sequence reaches another, in training and evaluation batches") {
  SplitMix64 random(7);
  for (int round = 0; round < 30; ++round) {
    const PackedData data = random_data(random, {.num_sequences = static_cast<int>(1 + random.below(80))});
    const auto rows = static_cast<std::int64_t>(1 + random.below(5));
    const auto length = static_cast<std::int64_t>(32 + random.below(60));
    PackedSampler sampler(data, rows, length, random.next());
    for (int i = 0; i < 10; ++i) {
      (void)check_batch(data, sampler.next(), rows, length);
    }
  }
}

TEST_CASE("The end of the pipeline keeps documents apart: text in, batches out") {
  SplitMix64 random(8);
  const ByteTokenizer tokenizer;
  std::vector<Document> documents;
  for (int i = 0; i < 120; ++i) {
    // Each document is written in one letter of its own.
    const std::string text(1 + random.below(70), static_cast<char>('!' + i % 90));
    documents.push_back({fmt::format("{}", i), "d", "", text});
  }
  const PackedData data = tokenized(documents, tokenizer, 32);
  PackedSampler sampler(data, 3, 40, 5);
  for (int i = 0; i < 50; ++i) {
    const PackedBatch batch = sampler.next();
    for (std::size_t at = 0; at < batch.tokens.size(); ++at) {
      if (batch.labels[at] == kIgnored) {
        continue;
      }
      REQUIRE(batch.labels[at] == batch.tokens[at + 1]);
      REQUIRE(batch.sequence_ids[at] == batch.sequence_ids[at + 1]);
      REQUIRE(batch.positions[at] + 1 == batch.positions[at + 1]);
      // Within one document the next letter is the same, or </s>.
      REQUIRE((batch.tokens[at] == 1 || batch.labels[at] == 2 || batch.labels[at] == batch.tokens[at]));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation.

TEST_CASE("Evaluation covers every sequence exactly once, in order over the batches") {
  SplitMix64 random(9);
  for (int round = 0; round < 40; ++round) {
    const PackedData data = random_data(random, {.num_sequences = static_cast<int>(1 + random.below(150))});
    const auto rows = static_cast<std::int64_t>(1 + random.below(6));
    const auto length = static_cast<std::int64_t>(32 + random.below(40));
    for (std::int64_t domain = -1; domain < 3; ++domain) {
      std::vector<std::size_t> expected;
      for (std::size_t i = 0; i < data.sequences.size(); ++i) {
        if (domain == -1 || data.sequences[i].domain == domain) {
          expected.push_back(i);
        }
      }
      std::vector<std::size_t> found;
      const std::vector<PackedBatch> batches = pack_for_evaluation(data, domain, rows, length);
      for (const PackedBatch& batch : batches) {
        REQUIRE(batch.num_rows <= rows);
        REQUIRE((batch.num_rows == rows || &batch == &batches.back()));
        REQUIRE(batch.num_rows > 0);
        REQUIRE(batch.sequence_ids[static_cast<std::size_t>((batch.num_rows - 1) * length)] >= 0);  // no empty row
        std::vector<std::size_t> indices = check_batch(data, batch, batch.num_rows, length);
        std::sort(indices.begin(), indices.end());  // first fit reorders within a batch only
        found.insert(found.end(), indices.begin(), indices.end());
      }
      REQUIRE(found == expected);
    }
  }
}

TEST_CASE("Evaluation of nothing is no batch, of a sequence longer than a row an error") {
  SplitMix64 random(10);
  PackedData data = random_data(random, {.num_sequences = 5, .num_domains = 1});
  data.domains.push_back("empty");
  CHECK(pack_for_evaluation(data, 1, 2, 32).empty());
  CHECK(pack_for_evaluation(PackedData(), -1, 2, 32).empty());
  data.sequences[3].tokens.resize(33, 1);
  CHECK_THROWS_AS(pack_for_evaluation(data, -1, 2, 32), std::invalid_argument);
}

// ---------------------------------------------------------------------------------------------------------------------
// The sampler.

TEST_CASE("Sequences that fill their row come once per epoch, in another order each time") {
  SplitMix64 random(11);
  const PackedData data = random_data(random, {.num_sequences = 60, .min_length = 16, .max_length = 16});
  PackedSampler sampler(data, 5, 32, 3);  // 10 sequences a batch, 6 batches an epoch
  std::vector<std::vector<std::size_t>> epochs;
  for (int epoch = 0; epoch < 5; ++epoch) {
    std::vector<std::size_t> drawn;
    for (int batch = 0; batch < 6; ++batch) {
      const std::vector<std::size_t> indices = check_batch(data, sampler.next(), 5, 32);
      drawn.insert(drawn.end(), indices.begin(), indices.end());
    }
    CHECK(std::find(epochs.begin(), epochs.end(), drawn) == epochs.end());
    CHECK_FALSE(std::is_sorted(drawn.begin(), drawn.end()));
    epochs.push_back(drawn);
    std::sort(drawn.begin(), drawn.end());
    std::vector<std::size_t> every(60);
    std::iota(every.begin(), every.end(), 0);
    CHECK(drawn == every);
  }
}

TEST_CASE("Sequences of any length come equally often, none waits for long") {
  SplitMix64 random(12);
  for (int round = 0; round < 10; ++round) {
    const PackedData data = random_data(random, {.num_sequences = static_cast<int>(40 + random.below(100))});
    const auto rows = static_cast<std::int64_t>(1 + random.below(4));
    PackedSampler sampler(data, rows, 40, random.next());
    std::vector<int> times(data.sequences.size(), 0);
    for (int batch = 0; batch < 400; ++batch) {
      for (const std::size_t index : check_batch(data, sampler.next(), rows, 40)) {
        ++times[index];
      }
      // A sequence that found no room comes in a later batch; up to 16 wait.
      const auto [least, most] = std::minmax_element(times.begin(), times.end());
      REQUIRE(*most - *least <= 2);
    }
    const int most = *std::max_element(times.begin(), times.end());
    CHECK(most > 3);
    // All but the waiting ones were drawn in this epoch or the one before.
    CHECK(std::count_if(times.begin(), times.end(), [&](int n) { return n < most - 1; }) <= 16);
  }
}

TEST_CASE("Rows are well filled") {
  SplitMix64 random(13);
  const PackedData data = random_data(random, {.num_sequences = 300});
  PackedSampler sampler(data, 4, 64, 1);
  std::int64_t padding = 0;
  for (int i = 0; i < 50; ++i) {
    const PackedBatch batch = sampler.next();
    padding += std::count(batch.sequence_ids.begin(), batch.sequence_ids.end(), -1);
  }
  CHECK(static_cast<double>(padding) < 0.05 * 50 * 4 * 64);
}

TEST_CASE("seek(n) is the state after n batches, from any state") {
  SplitMix64 random(14);
  for (int round = 0; round < 25; ++round) {
    const PackedData data = random_data(random, {.num_sequences = static_cast<int>(10 + random.below(60))});
    const auto rows = static_cast<std::int64_t>(1 + random.below(4));
    const auto length = static_cast<std::int64_t>(32 + random.below(40));
    const std::uint64_t seed = random.next();
    const std::vector<double> mix = round % 2 == 0
                                        ? std::vector<double>{}
                                        : std::vector<double>{random.uniform() + 0.1, 1.0, random.uniform() + 0.1};
    std::vector<bool> has(3, false);
    for (const TokenSequence& sequence : data.sequences) {
      has[static_cast<std::size_t>(sequence.domain)] = true;
    }
    if (!mix.empty() && std::count(has.begin(), has.end(), true) < 3) {
      continue;
    }
    PackedSampler straight(data, rows, length, seed, mix);
    std::vector<PackedBatch> batches;
    for (std::int64_t i = 0; i < 40; ++i) {
      REQUIRE(straight.position() == i);
      batches.push_back(straight.next());
    }
    PackedSampler jumping(data, rows, length, seed, mix);
    for (int jump = 0; jump < 6; ++jump) {
      const std::size_t target = random.below(38);
      jumping.seek(static_cast<std::int64_t>(target));  // forwards or backwards
      REQUIRE(jumping.position() == static_cast<std::int64_t>(target));
      REQUIRE(same(jumping.next(), batches[target]));
      REQUIRE(same(jumping.next(), batches[target + 1]));
      REQUIRE(jumping.position() == static_cast<std::int64_t>(target) + 2);
    }
  }
}

TEST_CASE("The same seed gives the same rows, another seed others") {
  SplitMix64 random(15);
  const PackedData data = random_data(random, {.num_sequences = 80});
  for (const std::vector<double>& mix : {std::vector<double>{}, std::vector<double>{1, 2, 3}}) {
    PackedSampler first(data, 2, 48, 42, mix);
    PackedSampler again(data, 2, 48, 42, mix);
    PackedSampler other(data, 2, 48, 43, mix);
    int differing = 0;
    for (int i = 0; i < 30; ++i) {
      const PackedBatch batch = first.next();
      CHECK(same(batch, again.next()));
      differing += same(batch, other.next()) ? 0 : 1;
    }
    CHECK(differing == 30);
  }
}

TEST_CASE("A mix weighs domains by tokens, whatever their sizes") {
  SplitMix64 random(16);
  // Domain 0 has few sequences, domain 2 long ones.
  PackedData data = random_data(random, {.num_sequences = 200, .max_length = 12, .num_domains = 2, .prompts = 0.0});
  for (std::size_t i = 0; i < data.sequences.size(); ++i) {
    data.sequences[i].domain = i < 10 ? 0 : 1;
  }
  data.domains.emplace_back("long");
  for (int i = 0; i < 40; ++i) {
    data.sequences.push_back({std::vector<std::int32_t>(30, 9), 0, 2, 1});
    data.sequences.back().tokens[0] = kFirstMark + 200 + i;
  }
  const std::vector<double> mix = {0.5, 2.0, 1.5};  // need not add up to 1
  PackedSampler sampler(data, 4, 64, 9, mix);
  std::vector<double> tokens(3, 0.0);
  std::vector<std::map<std::size_t, int>> times(3);
  for (int i = 0; i < 500; ++i) {
    for (const std::size_t index : check_batch(data, sampler.next(), 4, 64)) {
      const auto domain = static_cast<std::size_t>(data.sequences[index].domain);
      tokens[domain] += static_cast<double>(data.sequences[index].tokens.size());
      ++times[domain][index];
    }
    if (i >= 20) {
      // Never further off than what waits, 16 sequences, and one being drawn.
      const double total = tokens[0] + tokens[1] + tokens[2];
      for (std::size_t domain = 0; domain < 3; ++domain) {
        REQUIRE(std::abs(tokens[domain] - total * mix[domain] / 4.0) < 17 * 30);
      }
    }
  }
  const double total = tokens[0] + tokens[1] + tokens[2];
  for (std::size_t domain = 0; domain < 3; ++domain) {
    CHECK(tokens[domain] / total == Approx(mix[domain] / 4.0).margin(0.005));
    const auto [least, most] = std::minmax_element(times[domain].begin(), times[domain].end(),
                                                   [](const auto& a, const auto& b) { return a.second < b.second; });
    CHECK(most->second - least->second <= 2);  // every domain has epochs of its own
  }
  CHECK(times[0].size() == 10);
  CHECK(times[1].size() == 190);
  CHECK(times[2].size() == 40);
}

TEST_CASE("Without a mix domains come in proportion to their text") {
  SplitMix64 random(17);
  const PackedData data = random_data(random, {.num_sequences = 200});
  std::vector<double> share(3, 0.0);
  for (const TokenSequence& sequence : data.sequences) {
    share[static_cast<std::size_t>(sequence.domain)] +=
        static_cast<double>(sequence.tokens.size()) / static_cast<double>(data.num_tokens());
  }
  PackedSampler sampler(data, 4, 64, 9);
  std::vector<double> tokens(3, 0.0);
  double total = 0.0;
  for (int i = 0; i < 300; ++i) {
    for (const std::size_t index : check_batch(data, sampler.next(), 4, 64)) {
      const TokenSequence& sequence = data.sequences[index];
      tokens[static_cast<std::size_t>(sequence.domain)] += static_cast<double>(sequence.tokens.size());
      total += static_cast<double>(sequence.tokens.size());
    }
  }
  for (std::size_t domain = 0; domain < 3; ++domain) {
    CHECK(tokens[domain] / total == Approx(share[domain]).margin(0.01));
  }
}

TEST_CASE("A sampler refuses what it cannot draw from") {
  SplitMix64 random(18);
  PackedData data = random_data(random, {.num_sequences = 20, .num_domains = 1});
  CHECK(error_text<RunError>([&] { PackedSampler(PackedData(), 2, 32, 1); }) ==
        "data: there is nothing to train on, got 0 sequences; check data.train and the corpora");
  data.domains.emplace_back("empty");
  CHECK(error_text<RunError>([&] {
          PackedSampler(data, 2, 32, 1, {1.0, 1.0});
        }) == "data: domain \"empty\" has nothing to train on; check its corpus");
  CHECK_NOTHROW(PackedSampler(data, 2, 32, 1));  // without a mix an empty domain is no matter
  CHECK_THROWS_AS(PackedSampler(data, 2, 32, 1, {1.0}), std::invalid_argument);
  CHECK_THROWS_AS(PackedSampler(data, 2, 32, 1, {0.0, 1.0}), std::invalid_argument);
  CHECK_THROWS_AS(PackedSampler(data, 2, 32, 1, {1.0, -1.0}), std::invalid_argument);
  data.sequences[7].tokens.resize(33, 1);
  CHECK_THROWS_AS(PackedSampler(data, 2, 32, 1), std::invalid_argument);
}

TEST_CASE("Fewer sequences than a batch holds repeat within it") {
  SplitMix64 random(19);
  const PackedData data = random_data(random, {.num_sequences = 2, .min_length = 8, .max_length = 8});
  PackedSampler sampler(data, 3, 16, 1);
  for (int i = 0; i < 5; ++i) {
    const std::vector<std::size_t> indices = check_batch(data, sampler.next(), 3, 16);
    CHECK(indices.size() == 6);
    CHECK(std::count(indices.begin(), indices.end(), 0) == 3);
  }
}

}  // namespace
}  // namespace hestia
