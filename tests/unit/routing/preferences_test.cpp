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
#include "hestia/core/log.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_experts;

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kExperts = 6;
constexpr std::int64_t kTopK = 2;

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
  PreferenceRecorder recorder;
};

Filled fill(std::int64_t num_sequences, std::int64_t max_sequences, std::uint64_t seed = 9) {
  SplitMix64 random(81);
  Filled filled{{}, {}, PreferenceRecorder(kLayers, kExperts, {1, 3}, max_sequences, seed)};
  for (std::int64_t i = 0; i < num_sequences; ++i) {
    const auto num_tokens = 3 + static_cast<std::int64_t>(random.below(10));
    const auto num_prompt = static_cast<std::int64_t>(random.below(3));
    filled.baseline.push_back(random_sequence(random, 100 + i, num_tokens, num_prompt));
    filled.tuned.push_back(random_sequence(random, 100 + i, num_tokens, num_prompt));
    filled.recorder.add(filled.baseline.back(), filled.tuned.back());
  }
  return filled;
}

TEST_CASE("aggregates cover every sequence whatever the reservoir keeps") {
  for (const std::int64_t kept : {0, 3, 50}) {
    const Filled filled = fill(12, kept);
    CHECK(filled.recorder.num_sequences() == 12);
    check_aggregate(filled.recorder.aggregate_baseline(), filled.baseline);
    check_aggregate(filled.recorder.aggregate_tuned(), filled.tuned);
  }
}

TEST_CASE("the file gives back aggregates and the kept sequences") {
  const TemporaryFolder folder;
  for (const std::int64_t kept : {0, 5, 12, 40}) {
    const Filled filled = fill(12, kept);
    const std::filesystem::path path = folder.path() / "preferences.h5";
    filled.recorder.write(path);
    const Preferences back = read_preferences(path);
    CHECK(back.num_sequences_total == 12);
    CHECK(back.layers == std::vector<std::int64_t>{1, 3});
    CHECK(back.ids.size() == static_cast<std::size_t>(std::min<std::int64_t>(kept, 12)));
    check_aggregate(back.baseline, filled.baseline);
    check_aggregate(back.tuned, filled.tuned);

    const H5File file = H5File::open(path);
    const auto num_kept = static_cast<std::int64_t>(back.ids.size());
    for (const std::string router : {"baseline", "tuned"}) {
      const std::vector<SequenceRouting>& sequences = router == "baseline" ? filled.baseline : filled.tuned;
      const std::string group = "/routers/" + router;
      REQUIRE(file.shape(group + "/count") == std::vector<std::int64_t>{num_kept, kLayers, kExperts});
      const std::vector<std::int64_t> counts = file.read_ints(group + "/count");
      const std::vector<std::int64_t> prompt_counts = file.read_ints(group + "/prompt_count");
      const std::vector<float> probabilities = file.read_floats(group + "/mean_probability");
      const std::vector<std::int64_t> prompt_tokens = file.read_ints("/sequences/num_prompt_tokens");
      const std::vector<std::int64_t> tokens = file.read_ints("/sequences/num_tokens");
      std::size_t at = 0;
      for (std::size_t s = 0; s < back.ids.size(); ++s) {
        const SequenceRouting& sequence = sequences.at(static_cast<std::size_t>(back.ids[s] - 100));
        CHECK(back.tasks[s] == sequence.task);
        CHECK(prompt_tokens[s] == sequence.num_prompt_tokens);
        CHECK(tokens[s] == sequence.num_tokens);
        for (std::int64_t layer = 0; layer < kLayers; ++layer) {
          for (std::int64_t e = 0; e < kExperts; ++e, ++at) {
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
            CHECK(counts[at] == count);
            CHECK(prompt_counts[at] == prompt_count);
            CHECK(static_cast<double>(probabilities[at]) == Approx(probability / completion).epsilon(1e-3));
          }
        }
      }
    }
  }
}

TEST_CASE("the reservoir keeps each sequence with the same chance") {
  const TemporaryFolder folder;
  constexpr int kRuns = 400;
  std::map<std::int64_t, int> kept;
  for (int seed = 0; seed < kRuns; ++seed) {
    // The sampling does not look at the content, so one token is enough.
    SplitMix64 random(82);
    PreferenceRecorder recorder(kLayers, kExperts, {0, 1}, 4, static_cast<std::uint64_t>(seed));
    for (std::int64_t i = 0; i < 16; ++i) {
      const SequenceRouting sequence = random_sequence(random, i, 1, 0);
      recorder.add(sequence, sequence);
    }
    recorder.write(folder.path() / "p.h5");
    const Preferences back = read_preferences(folder.path() / "p.h5");
    CHECK(std::set<std::int64_t>(back.ids.begin(), back.ids.end()).size() == 4);
    for (const std::int64_t id : back.ids) {
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

TEST_CASE("the reservoir of a seed is always the same") {
  const TemporaryFolder folder;
  const auto ids = [&](std::uint64_t seed) {
    fill(30, 5, seed).recorder.write(folder.path() / "p.h5");
    return read_preferences(folder.path() / "p.h5").ids;
  };
  CHECK(ids(1) == ids(1));
  CHECK(ids(1) != ids(2));
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
  PreferenceRecorder recorder(kLayers, kExperts, {0, 1}, 2, 1);
  recorder.add(sequence, sequence);
  set_log_level(LogLevel::kInfo);
  const std::vector<std::string> warnings = degradations();
  REQUIRE(warnings.size() == 1);
  CHECK_THAT(warnings[0], Catch::Contains("more than 65535 times"));
  clear_degradations();
  const TemporaryFolder folder;
  recorder.write(folder.path() / "p.h5");
  CHECK(H5File::open(folder.path() / "p.h5").read_ints("/routers/tuned/count")[4] == 65535);
  CHECK(read_preferences(folder.path() / "p.h5").tuned.count[4] == 66000);
}

TEST_CASE("nothing but prompt gives zeros, not NaN") {
  SplitMix64 random(84);
  const SequenceRouting sequence = random_sequence(random, 1, 4, 4);
  PreferenceRecorder recorder(kLayers, kExperts, {0, 1}, 2, 1);
  recorder.add(sequence, sequence);
  const TemporaryFolder folder;
  recorder.write(folder.path() / "p.h5");
  for (const double value : read_preferences(folder.path() / "p.h5").tuned.mean_probability) {
    CHECK(value == 0.0);
  }
  for (const float value : H5File::open(folder.path() / "p.h5").read_floats("/routers/tuned/mean_probability")) {
    CHECK(value == 0.0F);
  }
}

TEST_CASE("two routers must have seen the same sequence") {
  SplitMix64 random(85);
  PreferenceRecorder recorder(kLayers, kExperts, {0, 1}, 2, 1);
  const SequenceRouting one = random_sequence(random, 1, 4, 1);
  CHECK_THROWS_WITH(recorder.add(one, random_sequence(random, 2, 4, 1)),
                    Catch::Contains("different sequences, 1 of 4"));
  CHECK_THROWS_AS(recorder.add(one, random_sequence(random, 1, 5, 1)), std::invalid_argument);
  CHECK_THROWS_AS(recorder.add(one, random_sequence(random, 1, 4, 0)), std::invalid_argument);
  SequenceRouting bare = one;
  bare.probabilities.clear();
  CHECK_THROWS_WITH(recorder.add(one, bare), Catch::Contains("tuned router") && Catch::Contains("got 16 and 0"));
  SequenceRouting strange = one;
  strange.selected[5] = kExperts;
  CHECK_THROWS_WITH(recorder.add(strange, one), Catch::Contains("expert 6 is not below 6"));
  CHECK(recorder.num_sequences() == 0);
  CHECK_THROWS_AS(PreferenceRecorder(2, 6, {0}, 2, 1), std::invalid_argument);
}

TEST_CASE("damaged preference files are refused with the reason") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "p.h5";
  const auto message = [&] {
    try {
      (void)read_preferences(path);
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
  const auto make = [&](std::int64_t version, std::int64_t experts) {
    H5File file = H5File::create(path);
    file.write_attribute("/", "format", std::string("hestia preferences"));
    file.write_attribute("/", "format_version", version);
    file.write_attribute("/", "layers", std::vector<std::int64_t>{0});
    file.write_attribute("/", "num_experts", experts);
    file.write_attribute("/", "num_sequences_total", std::int64_t{1});
    const std::vector<std::int64_t> numbers(9, 2);
    const std::vector<double> values(9, 0.5);
    const std::vector<std::uint16_t> narrow(9, 1);
    file.write("/sequences/id", H5Type::kInt64, {1}, numbers.data());
    file.write_strings("/sequences/task", {"prose"});
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
}

TEST_CASE("h5py reads what the recorder writes") {
  const std::filesystem::path python = std::filesystem::path(HESTIA_SOURCE_DIR) / "build" / "venv" / "bin" / "python";
  if (!std::filesystem::exists(python)) {
    WARN("SKIPPED: no Python environment at " << python.string());
    return;
  }
  const TemporaryFolder folder;
  const Filled filled = fill(12, 5);
  filled.recorder.write(folder.path() / "preferences.h5");
  std::ofstream(folder.path() / "check.py") << R"(
import sys, h5py, numpy as np
f = h5py.File(sys.argv[1], "r")
assert f.attrs["format_version"] == 1 and f.attrs["format"] == "hestia preferences", dict(f.attrs)
assert f.attrs["producer"].startswith("hestia")
assert list(f.attrs["layers"]) == [1, 3] and f.attrs["num_sequences_total"] == 12
tasks = f["/sequences/task"].asstr()[:]
ids = f["/sequences/id"][:]
assert all(t == ("prose" if i % 2 == 0 else "code \u00e9") for t, i in zip(tasks, ids)), tasks
completion = f["/sequences/num_tokens"][:] - f["/sequences/num_prompt_tokens"][:]
for router in ("baseline", "tuned"):
    g = f["/routers/" + router]
    assert g["count"].dtype == np.uint16 and g["count"].shape == (5, 2, 6)
    assert g["prompt_count"].dtype == np.uint16 and g["mean_probability"].dtype == np.float16
    assert (g["count"][:].sum(-1) == 2 * completion[:, None]).all()
    assert (g["prompt_count"][:].sum(-1) == 2 * f["/sequences/num_prompt_tokens"][:][:, None]).all()
    assert np.allclose(g["mean_probability"][:].astype(np.float64).sum(-1), 1, atol=2e-3)
    a = g["aggregate"]
    assert (np.diagonal(a["coactivation"][:], axis1=1, axis2=2) == a["count"][:]).all()
    assert (a["coactivation"][:] == a["coactivation"][:].transpose(0, 2, 1)).all()
    assert a["transition"].shape == (2, 6, 6) and a["transition"][:].sum() > 0
    assert np.allclose(a["mean_probability"][:].sum(-1), 1, atol=1e-6)
print("ok")
)";
  const std::string command =
      fmt::format("'{}' '{}' '{}' > '{}' 2>&1", python.string(), (folder.path() / "check.py").string(),
                  (folder.path() / "preferences.h5").string(), (folder.path() / "output").string());
  const int status = std::system(command.c_str());
  const std::string output = read_text_file(folder.path() / "output");
  if (output.find("No module named 'h5py'") != std::string::npos) {
    WARN("SKIPPED: the Python environment has no h5py");
    return;
  }
  CAPTURE(output);
  CHECK(status == 0);
  CHECK(output == "ok\n");
}

}  // namespace
}  // namespace hestia
