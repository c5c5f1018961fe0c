#include "hestia/routing/preferences.hpp"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <set>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/log.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_experts;

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kExperts = 6;
constexpr std::int64_t kTopK = 2;
constexpr std::int64_t kArraysPerRow = 6;

SequenceRouting random_sequence(SplitMix64& random, std::int64_t id, std::int64_t num_tokens, std::int64_t num_prompt) {
  SequenceRouting sequence;
  sequence.id = id;
  sequence.task = id % 2 == 0 ? "prose" : "code \xC3\xA9";
  sequence.num_prompt_tokens = num_prompt;
  sequence.num_tokens = num_tokens;
  sequence.num_layers = kLayers;
  sequence.num_experts = kExperts;
  sequence.top_k = kTopK;
  for (std::int64_t row = 0; row < kLayers * num_tokens; ++row) {
    const auto chosen = random_experts(random, kExperts, kTopK);
    sequence.selected.insert(sequence.selected.end(), chosen.begin(), chosen.end());
    std::vector<double> values;
    double sum = 0.0;
    for (std::int64_t expert = 0; expert < kExperts; ++expert) {
      values.push_back(std::exp(2.0 * random.uniform()));
      sum += values.back();
    }
    for (const double value : values) {
      sequence.probabilities.push_back(static_cast<float>(value / sum));
    }
  }
  return sequence;
}

std::set<int> served(const SequenceRouting& sequence, std::int64_t layer, std::int64_t token) {
  const auto begin = sequence.selected.begin() + (layer * sequence.num_tokens + token) * kTopK;
  return {begin, begin + kTopK};
}

void check_aggregate(const PreferenceAggregate& aggregate, const std::vector<SequenceRouting>& sequences) {
  REQUIRE(aggregate.num_layers == kLayers);
  REQUIRE(aggregate.num_experts == kExperts);
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    for (std::int64_t e = 0; e < kExperts; ++e) {
      double probability = 0.0;
      std::int64_t tokens = 0;
      std::vector<std::int64_t> both(kExperts, 0);
      std::vector<std::int64_t> follows(kExperts, 0);
      for (const SequenceRouting& sequence : sequences) {
        for (std::int64_t t = sequence.num_prompt_tokens; t < sequence.num_tokens; ++t) {
          const std::set<int> now = served(sequence, layer, t);
          tokens += 1;
          probability += static_cast<double>(
              sequence.probabilities[static_cast<std::size_t>((layer * sequence.num_tokens + t) * kExperts + e)]);
          for (const int f : now) {
            both[static_cast<std::size_t>(f)] += static_cast<std::int64_t>(now.count(static_cast<int>(e)));
            if (t > 0) {
              follows[static_cast<std::size_t>(f)] +=
                  static_cast<std::int64_t>(served(sequence, layer, t - 1).count(static_cast<int>(e)));
            }
          }
        }
      }
      const auto at = static_cast<std::size_t>(layer * kExperts + e);
      CHECK(aggregate.count[at] == both[static_cast<std::size_t>(e)]);
      CHECK(aggregate.mean_probability[at] == Approx(probability / static_cast<double>(tokens)).epsilon(1e-12));
      for (std::size_t f = 0; f < kExperts; ++f) {
        CHECK(aggregate.coactivation[at * kExperts + f] == both[f]);
        CHECK(aggregate.transition[at * kExperts + f] == follows[f]);
      }
    }
  }
}

struct Filled {
  std::vector<SequenceRouting> baseline;
  std::vector<SequenceRouting> tuned;
  PreferenceAggregate aggregates[2];
};

// The smallest chunks and buffers there are: what matters at a hundred thousand sequences matters at twelve then.
PreferenceWriterOptions small_options(std::int64_t max_sequences, std::uint64_t seed) {
  PreferenceWriterOptions options;
  options.max_sequences = max_sequences;
  options.seed = seed;
  options.chunk_bytes = 2 * kLayers * kExperts * 3;                   // three rows
  options.buffer_bytes = 2 * kLayers * kExperts * kArraysPerRow * 3;  // one chunk
  return options;
}

Filled fill(const std::filesystem::path& path, std::int64_t num_sequences, const PreferenceWriterOptions& options) {
  SplitMix64 random(81);
  Filled filled;
  PreferenceWriter writer(path, kLayers, kExperts, {1, 3}, options);
  for (std::int64_t i = 0; i < num_sequences; ++i) {
    const auto num_tokens = 3 + static_cast<std::int64_t>(random.below(10));
    const auto num_prompt = static_cast<std::int64_t>(random.below(3));
    filled.baseline.push_back(random_sequence(random, 100 + i, num_tokens, num_prompt));
    filled.tuned.push_back(random_sequence(random, 100 + i, num_tokens, num_prompt));
    writer.add(filled.baseline.back(), filled.tuned.back());
  }
  CHECK(writer.num_sequences() == num_sequences);
  filled.aggregates[0] = writer.aggregate(PreferenceRouter::kBaseline);
  filled.aggregates[1] = writer.aggregate(PreferenceRouter::kTuned);
  writer.close();
  return filled;
}

// What is stored of `sequence`, counted token by token, against row `at` of `rows`.
void check_row(const PreferenceRows& rows, std::size_t at, const SequenceRouting& sequence) {
  CHECK(rows.ids[at] == sequence.id);
  CHECK(rows.tasks[at] == sequence.task);
  CHECK(rows.num_prompt_tokens[at] == sequence.num_prompt_tokens);
  CHECK(rows.num_tokens[at] == sequence.num_tokens);
  std::size_t cell = at * kLayers * kExperts;
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    for (std::int64_t e = 0; e < kExperts; ++e, ++cell) {
      std::int64_t count = 0;
      std::int64_t prompt_count = 0;
      double probability = 0.0;
      for (std::int64_t t = 0; t < sequence.num_tokens; ++t) {
        const bool prompt = t < sequence.num_prompt_tokens;
        (prompt ? prompt_count : count) +=
            static_cast<std::int64_t>(served(sequence, layer, t).count(static_cast<int>(e)));
        probability += prompt ? 0.0
                              : static_cast<double>(sequence.probabilities[static_cast<std::size_t>(
                                    (layer * sequence.num_tokens + t) * kExperts + e)]);
      }
      const auto completion = static_cast<double>(sequence.num_tokens - sequence.num_prompt_tokens);
      CHECK(rows.count[cell] == count);
      CHECK(rows.prompt_count[cell] == prompt_count);
      CHECK(static_cast<double>(rows.mean_probability[cell]) == Approx(probability / completion).epsilon(1e-3));
    }
  }
}

// Algorithm R with nothing clever about it: the ids at each place.
std::vector<std::int64_t> reservoir(std::int64_t num_sequences, std::int64_t max_sequences, std::uint64_t seed) {
  SplitMix64 random(seed);
  std::vector<std::int64_t> ids;
  for (std::int64_t n = 1; n <= num_sequences; ++n) {
    if (static_cast<std::int64_t>(ids.size()) < max_sequences) {
      ids.push_back(99 + n);
      continue;
    }
    const std::uint64_t place = random.below(static_cast<std::uint64_t>(n));
    if (place < ids.size()) {
      ids[place] = 99 + n;
    }
  }
  return ids;
}

std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

TEST_CASE("aggregates cover every sequence whatever the reservoir keeps, and the file gives them back") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  for (const std::int64_t kept : {0, 1, 5, 12, 40}) {
    CAPTURE(kept);
    const Filled filled = fill(path, 12, small_options(kept, 9));
    check_aggregate(filled.aggregates[0], filled.baseline);
    check_aggregate(filled.aggregates[1], filled.tuned);
    const PreferenceReader reader(path);
    CHECK(reader.num_sequences_total() == 12);
    CHECK(reader.layers() == std::vector<std::int64_t>{1, 3});
    CHECK(reader.num_experts() == kExperts);
    CHECK(reader.num_stored() == (kept == 0 ? 12 : std::min<std::int64_t>(kept, 12)));
    CHECK_FALSE(reader.predictor().has_value());
    check_aggregate(reader.aggregate(PreferenceRouter::kBaseline), filled.baseline);
    check_aggregate(reader.aggregate(PreferenceRouter::kTuned), filled.tuned);
  }
}

TEST_CASE("stored sequences come back by range and by place, whatever chunks, buffer and reservoir were") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  for (const std::int64_t kept : {0, 2, 7, 23, 31}) {
    for (const bool small : {true, false}) {
      CAPTURE(kept, small);
      PreferenceWriterOptions options = small_options(kept, 11);
      if (!small) {
        options.buffer_bytes = 1 << 20;
      }
      const Filled filled = fill(path, 30, options);
      const PreferenceReader reader(path);
      const std::vector<std::int64_t> expected = reservoir(30, kept == 0 ? 30 : kept, 11);
      CHECK(reader.ids() == expected);
      const std::vector<std::string> tasks = reader.tasks();
      const std::int64_t num_stored = reader.num_stored();
      for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
        const auto& sequences = router == PreferenceRouter::kBaseline ? filled.baseline : filled.tuned;
        const PreferenceRows all = reader.rows(router, 0, num_stored);
        REQUIRE(all.ids == expected);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          check_row(all, i, sequences.at(static_cast<std::size_t>(expected[i] - 100)));
          CHECK(tasks[i] == all.tasks[i]);
        }
        const PreferenceRows part = reader.rows(router, num_stored / 2, 1);
        REQUIRE(part.ids.size() == 1);
        check_row(part, 0, sequences.at(static_cast<std::size_t>(part.ids[0] - 100)));
        const std::vector<std::int64_t> places = {num_stored - 1, 0, num_stored / 3, num_stored - 1};
        const PreferenceRows some = reader.rows(router, places);
        REQUIRE(some.ids.size() == 4);
        for (std::size_t i = 0; i < places.size(); ++i) {
          CHECK(some.ids[i] == expected[static_cast<std::size_t>(places[i])]);
          check_row(some, i, sequences.at(static_cast<std::size_t>(some.ids[i] - 100)));
        }
        CHECK(reader.rows(router, num_stored, 0).count.empty());
        CHECK(reader.rows(router, std::vector<std::int64_t>{}).count.empty());
        CHECK_THROWS_AS(reader.rows(router, num_stored - 1, 2), std::out_of_range);
        CHECK_THROWS_AS(reader.rows(router, std::vector<std::int64_t>{num_stored}), std::out_of_range);
        CHECK_THROWS_AS(reader.rows(router, -1, 1), std::out_of_range);
      }
    }
  }
}

TEST_CASE("a writer gives back what it has stored so far, and goes on") {
  const TemporaryFolder folder;
  SplitMix64 random(86);
  PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {1, 3}, small_options(0, 1));
  std::vector<SequenceRouting> sequences;
  for (std::int64_t id = 0; id < 9; ++id) {
    sequences.push_back(random_sequence(random, id, 6, 2));
    writer.add(sequences.back(), sequences.back());
    // In the middle of a chunk, too.
    const PreferenceRows rows = writer.rows(PreferenceRouter::kTuned, 0, writer.num_stored());
    REQUIRE(rows.ids.size() == sequences.size());
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      check_row(rows, i, sequences[i]);
    }
  }
  writer.close();
  CHECK(PreferenceReader(folder.path() / "p.h5").num_stored() == 9);
  CHECK_THROWS_AS(writer.add(sequences[0], sequences[0]), std::logic_error);
  CHECK_THROWS_AS(writer.close(), std::logic_error);
  CHECK_THROWS_AS(writer.rows(PreferenceRouter::kTuned, 0, 1), std::logic_error);
}

TEST_CASE("a preference file is there whole or not at all") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  SplitMix64 random(87);
  const SequenceRouting sequence = random_sequence(random, 1, 6, 2);
  {
    PreferenceWriter writer(path, kLayers, kExperts, {1, 3}, small_options(0, 1));
    for (int i = 0; i < 20; ++i) {
      writer.add(sequence, sequence);
    }
    CHECK_FALSE(std::filesystem::exists(path));
    CHECK(names_in(folder.path()).size() == 1);
  }
  CHECK(names_in(folder.path()).empty());
  fill(path, 3, small_options(0, 1));
  {
    // The earlier file stands until the new one is whole.
    PreferenceWriter writer(path, kLayers, kExperts, {1, 3}, small_options(0, 1));
    writer.add(sequence, sequence);
    CHECK(PreferenceReader(path).num_stored() == 3);
  }
  CHECK(PreferenceReader(path).num_stored() == 3);
  CHECK(names_in(folder.path()) == std::vector<std::string>{"p.h5"});
  CHECK_THROWS_AS(PreferenceWriter(folder.path() / "none" / "p.h5", kLayers, kExperts, {1, 3}), RunError);
}

TEST_CASE("nothing added makes a file of no sequences") {
  const TemporaryFolder folder;
  fill(folder.path() / "p.h5", 0, small_options(0, 1));
  const PreferenceReader reader(folder.path() / "p.h5");
  CHECK(reader.num_stored() == 0);
  CHECK(reader.num_sequences_total() == 0);
  CHECK(reader.rows(PreferenceRouter::kTuned, 0, 0).ids.empty());
  CHECK(reader.aggregate(PreferenceRouter::kTuned).mean_probability == std::vector<double>(kLayers * kExperts, 0.0));
}

PreferencePredictor random_predictor(SplitMix64& random) {
  PreferencePredictor predictor;
  predictor.num_layers = kLayers;
  predictor.num_experts = kExperts;
  predictor.embedding_size = 5;
  predictor.hidden_size = 7;
  predictor.embedding = "caf\xC3\xA9";
  const auto fill_with = [&](std::vector<float>& values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(4.0 * random.uniform() - 2.0));
    }
  };
  fill_with(predictor.hidden_weight, 35);
  fill_with(predictor.hidden_bias, 7);
  fill_with(predictor.output_weight, kLayers * kExperts * std::int64_t{7});
  fill_with(predictor.output_bias, kLayers * kExperts);
  predictor.report = {
      8,
      3,
      1,
      {1, 3},
      3,
      {{"predictor", 0.25, {0.5, 0.75}, {0.375, 0.625}}, {"mean_popularity", 0.5, {0.25, 0.5}, {0.125, 0.25}}},
      "predictor",
      "mean_popularity"};
  return predictor;
}

TEST_CASE("a predictor comes back from the file as it was, and predicts the same") {
  const TemporaryFolder folder;
  SplitMix64 random(88);
  const PreferencePredictor written = random_predictor(random);
  {
    PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {1, 3});
    PreferencePredictor wrong = written;
    wrong.num_experts = 4;
    CHECK_THROWS_AS(writer.close(&wrong), std::invalid_argument);
    wrong = written;
    wrong.hidden_bias.pop_back();
    CHECK_THROWS_AS(writer.close(&wrong), std::invalid_argument);
    writer.close(&written);
  }
  const auto found = PreferenceReader(folder.path() / "p.h5").predictor();
  REQUIRE(found.has_value());
  const PreferencePredictor& read = found.value();
  CHECK(read.hidden_weight == written.hidden_weight);
  CHECK(read.hidden_bias == written.hidden_bias);
  CHECK(read.output_weight == written.output_weight);
  CHECK(read.output_bias == written.output_bias);
  CHECK(read.embedding == written.embedding);
  CHECK(read.report.num_train == 8);
  CHECK(read.report.num_held_out == 3);
  CHECK(read.report.num_left_out == 1);
  CHECK(read.report.slots == written.report.slots);
  CHECK(read.report.decisive_slots == 3);
  CHECK(read.report.best_by_requests == "predictor");
  CHECK(read.report.best_by_kl == "mean_popularity");
  REQUIRE(read.report.figures.size() == 2);
  CHECK(read.report.figures[1].method == "mean_popularity");
  CHECK(read.report.figures[1].kl == 0.5);
  CHECK(read.report.figures[0].probability_recall == written.report.figures[0].probability_recall);
  CHECK(read.report.figures[1].request_recall == written.report.figures[1].request_recall);
  const std::vector<float> x = {0.5F, -1.0F, 0.25F, 2.0F, -0.75F};
  CHECK(read.predict(x) == written.predict(x));
}

TEST_CASE("the prediction is the softmax of the two layers, written out") {
  SplitMix64 random(89);
  const PreferencePredictor predictor = random_predictor(random);
  const std::vector<float> x = {0.5F, -1.0F, 0.25F, 2.0F, -0.75F};
  const std::vector<float> prediction = predictor.predict(x);
  REQUIRE(prediction.size() == kLayers * kExperts);
  for (std::size_t layer = 0; layer < kLayers; ++layer) {
    std::vector<double> raised;
    double sum = 0.0;
    for (std::size_t e = 0; e < kExperts; ++e) {
      double z = static_cast<double>(predictor.output_bias[layer * kExperts + e]);
      for (std::size_t h = 0; h < 7; ++h) {
        double a = static_cast<double>(predictor.hidden_bias[h]);
        for (std::size_t d = 0; d < 5; ++d) {
          a += static_cast<double>(predictor.hidden_weight[h * 5 + d] * x[d]);
        }
        z += a > 0.0 ? a * static_cast<double>(predictor.output_weight[(layer * kExperts + e) * 7 + h]) : 0.0;
      }
      raised.push_back(std::exp(z));
      sum += raised.back();
    }
    for (std::size_t e = 0; e < kExperts; ++e) {
      CHECK(static_cast<double>(prediction[layer * kExperts + e]) == Approx(raised[e] / sum).epsilon(1e-4));
    }
  }
  CHECK_THROWS_WITH(predictor.predict(std::vector<float>(4, 1.0F)), Catch::Contains("must have 5 values, got 4"));
}

TEST_CASE("top experts come best first, ties to the lower index") {
  const std::vector<float> scores = {0.1F, 0.4F, 0.4F, 0.0F, 0.9F};
  CHECK(top_experts(scores, 3) == std::vector<std::int64_t>{4, 1, 2});
  CHECK(top_experts(scores, 2) == std::vector<std::int64_t>{4, 1});
  CHECK(top_experts(scores, 0).empty());
  CHECK(top_experts(scores, 5) == std::vector<std::int64_t>{4, 1, 2, 0, 3});
  CHECK_THROWS_AS(top_experts(scores, 6), std::invalid_argument);
}

TEST_CASE("the reservoir keeps each sequence with the same chance") {
  const TemporaryFolder folder;
  constexpr int kRuns = 400;
  std::map<std::int64_t, int> kept;
  for (int seed = 0; seed < kRuns; ++seed) {
    // The sampling does not look at the content, so one token is enough.
    SplitMix64 random(82);
    PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {0, 1},
                            small_options(4, static_cast<std::uint64_t>(seed)));
    for (std::int64_t i = 0; i < 16; ++i) {
      const SequenceRouting sequence = random_sequence(random, i, 1, 0);
      writer.add(sequence, sequence);
    }
    const std::vector<std::int64_t> ids = writer.rows(PreferenceRouter::kTuned, 0, writer.num_stored()).ids;
    CHECK(std::set<std::int64_t>(ids.begin(), ids.end()).size() == 4);
    for (const std::int64_t id : ids) {
      kept[id] += 1;
    }
  }
  // 400 draws with chance 1/4: mean 100, standard deviation 8.7; five of them on either side.
  for (std::int64_t id = 0; id < 16; ++id) {
    CAPTURE(id);
    CHECK(kept[id] > 56);
    CHECK(kept[id] < 144);
  }
}

TEST_CASE("counts past 16 bits saturate with a warning") {
  SplitMix64 random(83);
  SequenceRouting sequence = random_sequence(random, 1, 66000, 0);
  for (std::size_t row = 0; row < sequence.selected.size() / 2; ++row) {
    sequence.selected[2 * row] = 4;
    sequence.selected[2 * row + 1] = static_cast<std::uint16_t>(random.below(4));
  }
  clear_degradations();
  set_log_level(LogLevel::kError);
  const TemporaryFolder folder;
  PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {0, 1});
  writer.add(sequence, sequence);
  set_log_level(LogLevel::kInfo);
  const std::vector<std::string> warnings = degradations();
  REQUIRE(warnings.size() == 1);
  CHECK_THAT(warnings[0], Catch::Contains("more than 65535 times"));
  clear_degradations();
  writer.close();
  const PreferenceReader reader(folder.path() / "p.h5");
  CHECK(reader.rows(PreferenceRouter::kTuned, 0, 1).count[4] == 65535);
  CHECK(reader.aggregate(PreferenceRouter::kTuned).count[4] == 66000);
}

TEST_CASE("nothing but prompt gives zeros, not NaN") {
  SplitMix64 random(84);
  const SequenceRouting sequence = random_sequence(random, 1, 4, 4);
  const TemporaryFolder folder;
  PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {0, 1});
  writer.add(sequence, sequence);
  writer.close();
  const PreferenceReader reader(folder.path() / "p.h5");
  for (const double value : reader.aggregate(PreferenceRouter::kTuned).mean_probability) {
    CHECK(value == 0.0);
  }
  for (const float value : reader.rows(PreferenceRouter::kTuned, 0, 1).mean_probability) {
    CHECK(value == 0.0F);
  }
}

TEST_CASE("two routers must have seen the same sequence") {
  SplitMix64 random(85);
  const TemporaryFolder folder;
  PreferenceWriter writer(folder.path() / "p.h5", kLayers, kExperts, {0, 1});
  const SequenceRouting one = random_sequence(random, 1, 4, 1);
  CHECK_THROWS_WITH(writer.add(one, random_sequence(random, 2, 4, 1)), Catch::Contains("different sequences, 1 of 4"));
  CHECK_THROWS_AS(writer.add(one, random_sequence(random, 1, 5, 1)), std::invalid_argument);
  CHECK_THROWS_AS(writer.add(one, random_sequence(random, 1, 4, 0)), std::invalid_argument);
  SequenceRouting bare = one;
  bare.probabilities.clear();
  CHECK_THROWS_WITH(writer.add(one, bare), Catch::Contains("tuned router") && Catch::Contains("got 16 and 0"));
  SequenceRouting strange = one;
  strange.selected[5] = kExperts;
  CHECK_THROWS_WITH(writer.add(strange, one), Catch::Contains("expert 6 is not below 6"));
  CHECK(writer.num_sequences() == 0);
  CHECK(writer.num_stored() == 0);
  CHECK_THROWS_AS(PreferenceWriter(folder.path() / "q.h5", 2, 6, {0}), std::invalid_argument);
  PreferenceWriterOptions options;
  options.deflate_level = 10;
  CHECK_THROWS_AS(PreferenceWriter(folder.path() / "q.h5", 2, 6, {0, 1}, options), std::invalid_argument);
  options = {};
  options.max_sequences = -1;
  CHECK_THROWS_AS(PreferenceWriter(folder.path() / "q.h5", 2, 6, {0, 1}, options), std::invalid_argument);
}

TEST_CASE("damaged preference files are refused with the reason") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  const auto message = [&] {
    try {
      (void)PreferenceReader(path);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(message(), Catch::Contains(path.string()));
  std::ofstream(path) << "not HDF5";
  CHECK_THAT(message(), Catch::Contains(path.string()) && Catch::Contains("HDF5"));
  {
    H5File file = H5File::create(path);
    file.write_attribute("/", "format_version", std::int64_t{1});
    file.close();
  }
  CHECK_THAT(message(), Catch::Contains("not a preferences file"));
  const auto make = [&](std::int64_t version, std::int64_t experts, std::int64_t total = 1) {
    H5File file = H5File::create(path);
    file.write_attribute("/", "format", std::string("hestia preferences"));
    file.write_attribute("/", "format_version", version);
    file.write_attribute("/", "layers", std::vector<std::int64_t>{0});
    file.write_attribute("/", "num_experts", experts);
    file.write_attribute("/", "num_sequences_total", std::int64_t{total > 0 ? 1 : 0});
    const std::vector<std::int64_t> numbers(9, 2);
    const std::vector<double> values(9, 0.5);
    const std::vector<std::uint16_t> narrow(9, 1);
    file.write("/sequences/id", H5Type::kInt64, {1}, numbers.data());
    file.write_strings("/sequences/task", {"prose"});
    file.write("/sequences/num_prompt_tokens", H5Type::kInt64, {1}, numbers.data());
    file.write("/sequences/num_tokens", H5Type::kInt64, {total}, numbers.data());
    for (const std::string group : {"/routers/baseline/", "/routers/tuned/"}) {
      file.write(group + "count", H5Type::kUInt16, {1, 1, 3}, narrow.data());
      file.write(group + "prompt_count", H5Type::kUInt16, {1, 1, 3}, narrow.data());
      file.write(group + "mean_probability", H5Type::kFloat16, {1, 1, 3}, narrow.data());
      file.write(group + "aggregate/count", H5Type::kInt64, {1, 3}, numbers.data());
      file.write(group + "aggregate/mean_probability", H5Type::kFloat64, {1, 3}, values.data());
      file.write(group + "aggregate/coactivation", H5Type::kInt64, {1, 3, 3}, numbers.data());
      file.write(group + "aggregate/transition", H5Type::kInt64, {1, 3, 3}, numbers.data());
    }
    file.close();
  };
  make(1, 3);
  CHECK(message() == "no error");
  make(4, 3);
  CHECK_THAT(message(), Catch::Contains("format version 4 is newer than this program supports (1)"));
  make(1, 5);
  CHECK_THAT(message(), Catch::Contains("must have shape [1, 1, 5], got [1, 1, 3]"));
  make(1, 3, 2);
  CHECK_THAT(message(), Catch::Contains("/sequences/num_tokens must have shape [1], got [2]"));
  make(1, 3, 0);
  CHECK_THAT(message(), Catch::Contains("sequence ids of shape [1] and 0 sequences in all do not match"));
}

TEST_CASE("a damaged predictor is refused with the reason") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  SplitMix64 random(90);
  PreferencePredictor predictor = random_predictor(random);
  predictor.report.figures.pop_back();
  predictor.report.slots = {1, 2, 3};  // the figures have two
  PreferenceWriter writer(path, kLayers, kExperts, {1, 3});
  CHECK_THROWS_WITH(writer.close(&predictor), Catch::Contains("figures of 2 slot counts, got 3 slot counts"));
}

TEST_CASE("h5py reads what the writer writes: shapes, types, attributes and every sum") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "preferences.h5";
  SplitMix64 random(91);
  const PreferencePredictor predictor = random_predictor(random);
  PreferenceWriterOptions options = small_options(17, 5);
  const Filled filled = fill(path, 40, options);
  // The same again with a predictor, so that both forms are read.
  PreferenceWriter writer(folder.path() / "with_predictor.h5", kLayers, kExperts, {1, 3}, options);
  for (std::size_t i = 0; i < filled.baseline.size(); ++i) {
    writer.add(filled.baseline[i], filled.tuned[i]);
  }
  writer.close(&predictor);
  // What the file must hold, by this test's own count.
  Json expected;
  expected["ids"] = reservoir(40, 17, 5);
  expected["layers"] = {1, 3};
  for (const char* router : {"baseline", "tuned"}) {
    const auto& sequences = std::string(router) == "baseline" ? filled.baseline : filled.tuned;
    Json counts = Json::array();
    Json prompt_counts = Json::array();
    for (const std::int64_t id : expected["ids"]) {
      std::vector<std::int64_t> uses[2] = {std::vector<std::int64_t>(kLayers * kExperts, 0),
                                           std::vector<std::int64_t>(kLayers * kExperts, 0)};
      const SequenceRouting& sequence = sequences.at(static_cast<std::size_t>(id - 100));
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        for (std::int64_t t = 0; t < sequence.num_tokens; ++t) {
          for (const int expert : served(sequence, layer, t)) {
            uses[t < sequence.num_prompt_tokens ? 1 : 0][static_cast<std::size_t>(layer * kExperts + expert)] += 1;
          }
        }
      }
      counts.push_back(uses[0]);
      prompt_counts.push_back(uses[1]);
    }
    expected[router] = {{"count", counts}, {"prompt_count", prompt_counts}};
  }
  expected["predictor"] = {{"hidden_weight", predictor.hidden_weight}, {"output_bias", predictor.output_bias}};
  write_text_atomically(folder.path() / "expected.json", expected.dump());
  for (const char* name : {"preferences.h5", "with_predictor.h5"}) {
    CAPTURE(name);
    const std::string command =
        fmt::format("'{}' -B '{}/tests/unit/routing/read_preferences.py' '{}' '{}'", HESTIA_PYTHON, HESTIA_SOURCE_DIR,
                    (folder.path() / name).string(), (folder.path() / "expected.json").string());
    CHECK(std::system(command.c_str()) == 0);
  }
  // The check can fail.
  expected["tuned"]["count"][3][7] = expected["tuned"]["count"][3][7].get<int>() + 1;
  write_text_atomically(folder.path() / "expected.json", expected.dump());
  CHECK(std::system(fmt::format("'{}' -B '{}/tests/unit/routing/read_preferences.py' '{}' '{}' 2>/dev/null",
                                HESTIA_PYTHON, HESTIA_SOURCE_DIR, path.string(),
                                (folder.path() / "expected.json").string())
                        .c_str()) != 0);
}

}  // namespace
}  // namespace hestia
