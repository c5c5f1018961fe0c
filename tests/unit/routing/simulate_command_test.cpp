#include <algorithm>
#include <iostream>
#include <set>
#include <sstream>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "cli/commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/routing/fold.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preferences.hpp"
#include "hestia/routing/preload.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_trace;
using testing::recorded_trace;
using testing::TraceShape;

// What `hestia simulate` prints on stdout.
std::string simulate_output(std::vector<std::string> arguments) {
  CLI::App app;
  app.require_subcommand(1);
  add_simulate(app);
  std::ostringstream captured;
  std::streambuf* const before = std::cout.rdbuf(captured.rdbuf());
  // CLI11 takes the arguments from the back.
  arguments.insert(arguments.begin(), "simulate");
  std::reverse(arguments.begin(), arguments.end());
  try {
    app.parse(arguments);
  } catch (...) {
    std::cout.rdbuf(before);
    throw;
  }
  std::cout.rdbuf(before);
  return captured.str();
}

std::vector<Json> json_lines(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(Json::parse(line));
  }
  return lines;
}

std::string trace_file(const TemporaryFolder& folder) {
  SplitMix64 random(91);
  std::string path = (folder.path() / "trace.csv").string();
  write_trace_csv(path, random_trace(random, TraceShape{}));
  return path;
}

TEST_CASE("simulate --json prints one object a line with the counts") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const RoutingTrace trace = read_trace(path);
  const std::vector<Json> lines = json_lines(simulate_output(
      {path, "--policy", "lru,belady", "--policy", "gamma", "--slots", "3,6", "--gamma", "0.5", "--json"}));
  REQUIRE(lines.size() == 6);
  std::size_t i = 0;
  for (const CachePolicyKind policy : {CachePolicyKind::kLru, CachePolicyKind::kBelady, CachePolicyKind::kGamma}) {
    for (const std::int64_t slots : {3, 6}) {
      SimulationOptions options;
      options.policy = policy;
      options.slots = slots;
      options.gamma = 0.5;
      const SimulationCounts counts = simulate(trace, options);
      const Json expected = {{"policy", policy_name(policy)},
                             {"slots", slots},
                             {"start", "cold"},
                             {"requests", counts.requests},
                             {"hits", counts.hits},
                             {"cold", counts.cold},
                             {"loads", counts.loads},
                             {"evictions", counts.evictions},
                             {"hit_rate", counts.hit_rate()}};
      // The text, so that order of keys and every digit of the rate count.
      CHECK(lines[i++].dump() == expected.dump());
    }
  }
}

TEST_CASE("simulate gives the golden integers", "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  const std::vector<Json> lines =
      json_lines(simulate_output({"--policy", "lru,lfu,belady", "--slots", "8,16,32,64", "--json", path->string()}));
  const std::vector<std::int64_t> hits = {15785, 22522, 29757, 33623, 16971, 23748,
                                          30194, 33639, 19165, 27559, 32484, 33771};
  REQUIRE(lines.size() == hits.size());
  for (std::size_t i = 0; i < hits.size(); ++i) {
    CHECK(lines[i].at("hits") == hits[i]);
    CHECK(lines[i].at("requests") == 36864);
    CHECK(lines[i].at("cold") == 3059);
  }
  CHECK_THAT(simulate_output({path->string()}), Catch::Contains("expert overlap    0.379511"));
}

TEST_CASE("the positional trace may follow a list") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  CHECK(simulate_output({"--slots", "4", "--policy", "lru", path}) ==
        simulate_output({path, "--policy=lru", "--slots=4"}));
}

TEST_CASE("the table shows overlap, distinct experts and bytes, and defaults to shares of E") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const std::string text = simulate_output({path});
  CHECK_THAT(text, Catch::Contains("2 MoE layers, 12 experts, top 3") && Catch::Contains("expert overlap") &&
                       Catch::Contains("distinct experts") && Catch::Contains("bytes/token"));
  // 5 lines, a blank one, the head, then 3 policies at 1, 3 and 6 slots.
  CHECK(std::count(text.begin(), text.end(), '\n') == 5 + 1 + 1 + 9);
  // Aligned: every line of the table is as long as its head.
  std::istringstream stream(text.substr(text.find("policy")));
  std::string head;
  std::getline(stream, head);
  for (std::string line; std::getline(stream, line);) {
    CHECK(line.size() == head.size());
  }
  RoutingTrace unknown = read_trace(path);
  for (TraceLayer& layer : unknown.layers) {
    layer.expert_bytes = 0;
  }
  write_trace_csv(path, unknown);
  CHECK_THAT(simulate_output({path}), !Catch::Contains("bytes/token"));
}

TEST_CASE("prefill and seed reach the simulator") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const auto requests = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {path, "--policy", "random", "--slots", "4", "--json"});
    return json_lines(simulate_output(more)).at(0);
  };
  CHECK(requests({"--include-prefill"}).at("requests") > requests({}).at("requests"));
  std::set<std::int64_t> hits;
  for (const std::string seed : {"1", "2", "3", "4", "5", "6"}) {
    hits.insert(requests({"--seed", seed}).at("hits").get<std::int64_t>());
  }
  CHECK(hits.size() > 1);
}

// A preference file for the model layers 1, 3, ...: one sequence of random routing by each router.
std::string preferences_file(const TemporaryFolder& folder, const std::string& name, std::int64_t num_layers,
                             std::int64_t num_experts) {
  SplitMix64 random(92);
  std::string path = (folder.path() / name).string();
  const auto sequence = [&] {
    SequenceRouting routing;
    routing.num_tokens = 30;
    routing.num_layers = num_layers;
    routing.num_experts = num_experts;
    routing.top_k = 3;
    for (std::int64_t row = 0; row < num_layers * routing.num_tokens; ++row) {
      const auto experts = testing::random_experts(random, num_experts, 3);
      routing.selected.insert(routing.selected.end(), experts.begin(), experts.end());
      routing.probabilities.insert(routing.probabilities.end(), static_cast<std::size_t>(num_experts), 0.1F);
    }
    return routing;
  };
  std::vector<std::int64_t> layers;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    layers.push_back(2 * layer + 1);
  }
  PreferenceWriter writer(path, num_layers, num_experts, layers);
  writer.add(sequence(), sequence());
  writer.close();
  return path;
}

TEST_CASE("the start reaches the simulator, and the output names it") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const RoutingTrace trace = read_trace(path);
  const std::string preferences = preferences_file(folder, "preferences.h5", 2, 12);
  const auto output = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {path, "--policy", "lru", "--slots", "3,4,5,6,8"});
    return simulate_output(more);
  };
  // Checks the counts of every line and returns the hits.
  const auto checked_hits = [&](const std::vector<std::string>& arguments, SimulationOptions options) {
    std::vector<std::string> with_json = arguments;
    with_json.emplace_back("--json");
    std::vector<std::int64_t> hits;
    for (const Json& line : json_lines(output(with_json))) {
      options.slots = line.at("slots").get<std::int64_t>();
      const SimulationCounts counts = simulate(trace, options);
      CHECK(line.at("start") == start_name(options.start));
      CHECK(line.contains("preload") == (options.start == CacheStart::kPreload));
      CHECK(line.at("hits") == counts.hits);
      CHECK(line.at("cold") == counts.cold);
      CHECK(line.at("evictions") == counts.evictions);
      hits.push_back(counts.hits);
    }
    CHECK(hits.size() == 5);
    return hits;
  };
  SimulationOptions options;
  std::set<std::vector<std::int64_t>> all_hits = {checked_hits({}, options)};
  CHECK_THAT(output({}), Catch::Contains("start             cold"));
  options.start = CacheStart::kPrefill;
  all_hits.insert(checked_hits({"--start", "prefill"}, options));
  CHECK_THAT(output({"--start", "prefill"}), Catch::Contains("start             prefill"));

  options.start = CacheStart::kPreload;
  for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
    const std::string name(router_name(router));
    options.preload = preload_order(PreferenceReader(preferences).aggregate(router));
    const std::vector<std::string> arguments = {"--start",   "preload",          "--preload",
                                                preferences, "--preload-router", name};
    all_hits.insert(checked_hits(arguments, options));
    std::vector<std::string> with_json = arguments;
    with_json.emplace_back("--json");
    const Json line = json_lines(output(with_json)).at(0);
    CHECK(line.at("preload") == preferences);
    CHECK(line.at("preload_router") == name);
    CHECK_THAT(output(arguments),
               Catch::Contains(fmt::format("preload (most used of the {} router in {})", name, preferences)));
  }
  // Four starts, four results: no flag is dropped. Without --preload-router it is the tuned router.
  CHECK(all_hits.size() == 4);
  CHECK(output({"--start", "preload", "--preload", preferences}) ==
        output({"--start", "preload", "--preload", preferences, "--preload-router", "tuned"}));
}

TEST_CASE("without a file, a start with preload takes what the trace says") {
  const TemporaryFolder folder;
  RoutingTrace trace = read_trace(trace_file(folder));
  SimulationOptions options;
  options.start = CacheStart::kPreload;
  options.slots = 4;
  SplitMix64 random(93);
  for (TraceLayer& layer : trace.layers) {
    layer.preload = testing::random_experts(random, trace.num_experts, 6);
    options.preload.push_back(layer.preload);
  }
  const SimulationCounts counts = simulate(trace, options);
  const std::string csv = (folder.path() / "preloaded.csv").string();
  write_trace_csv(csv, trace);
  const std::vector<std::string> arguments = {csv, "--policy", "lru", "--slots", "4", "--start", "preload"};
  CHECK_THAT(simulate_output(arguments), Catch::Contains("preload (as recorded)"));
  std::vector<std::string> with_json = arguments;
  with_json.emplace_back("--json");
  const Json line = json_lines(simulate_output(with_json)).at(0);
  CHECK(line.at("hits") == counts.hits);
  CHECK(line.at("preload") == csv);
  CHECK(line.at("preload_router").is_null());
  options.start = CacheStart::kCold;
  options.preload.clear();
  CHECK(simulate(trace, options).hits != counts.hits);
}

TEST_CASE("a start that does not fit is refused with the value") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const std::string preferences = preferences_file(folder, "preferences.h5", 2, 12);
  CHECK_THROWS_WITH(simulate_output({path, "--start", "prefil"}), Catch::Contains("did you mean \"prefill\"?"));
  CHECK_THROWS_WITH(simulate_output({path, "--start", "preload"}), Catch::Contains("add --preload FILE"));
  CHECK_THROWS_WITH(simulate_output({path, "--preload", preferences}), Catch::Contains("got --start cold"));
  for (const std::string router : {"baseline", "tuned"}) {
    CHECK_THROWS_WITH(simulate_output({path, "--preload-router", router}),
                      Catch::Contains("--preload-router: says whose counts") && Catch::Contains("got " + router));
  }
  CHECK_THROWS_WITH(simulate_output({path, "--start", "prefill", "--include-prefill"}),
                    Catch::Contains("include_prefill"));
  const auto preload = [&](const std::string& file, const std::string& router = "tuned") {
    return simulate_output({path, "--start", "preload", "--preload", file, "--preload-router", router});
  };
  CHECK_THROWS_WITH(preload(preferences, "tunde"), Catch::Contains("did you mean \"tuned\"?"));
  CHECK_THROWS_WITH(preload(preferences_file(folder, "wide.h5", 2, 13)),
                    Catch::Contains("wide.h5 must have the 12 experts of the trace, got 13"));
  CHECK_THROWS_WITH(preload(preferences_file(folder, "deep.h5", 3, 12)),
                    Catch::Contains("2 MoE layers of the trace (1 3), got 3 (1 3 5)"));
  CHECK_THROWS_AS(preload((folder.path() / "none.h5").string()), InputError);
  CHECK_THROWS_AS(preload(path), InputError);
}

TEST_CASE("simulate --fold counts the folded trace and says so") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  const FoldedTrace folded = fold_trace(read_trace(path), {5, 7});
  const std::vector<std::string> arguments = {path, "--fold", "5x7", "--policy", "lru", "--slots", "3"};
  std::vector<std::string> with_json = arguments;
  with_json.emplace_back("--json");
  const Json line = json_lines(simulate_output(with_json)).at(0);
  SimulationOptions options;
  options.slots = 3;
  const SimulationCounts counts = simulate(folded.trace, options);
  CHECK(line.at("requests") == counts.requests);
  CHECK(line.at("hits") == counts.hits);
  CHECK(line.at("fold") == Json{{"from", "2x12"}, {"onto", "5x7"}});
  const std::string table = simulate_output(arguments);
  CHECK_THAT(table, Catch::Contains("folded            2x12 onto 5x7: layer l is l mod 2, expert e is e mod 7; ") &&
                        Catch::Contains("5 MoE layers, 7 experts") && !Catch::Contains("bytes/token"));
  CHECK_THAT(simulate_output({path}), !Catch::Contains("folded"));
  CHECK_FALSE(json_lines(simulate_output({path, "--json"})).at(0).contains("fold"));
  CHECK_THROWS_WITH(simulate_output({path, "--fold", "5"}), Catch::Contains("--fold: must be LxE"));
  // A preload has to fit what is simulated, not what was recorded.
  const std::string preferences = preferences_file(folder, "preferences.h5", 2, 12);
  CHECK_THROWS_WITH(simulate_output({path, "--fold", "2x7", "--start", "preload", "--preload", preferences}),
                    Catch::Contains("7 experts of the trace, got 12"));
}

TEST_CASE("mistakes on the command line print nothing and name the value") {
  const TemporaryFolder folder;
  const std::string path = trace_file(folder);
  CHECK_THROWS_WITH(simulate_output({path, "--policy", "lru,beladdy"}), Catch::Contains("did you mean \"belady\"?"));
  CHECK_THROWS_AS(simulate_output({path, "--slots", "0"}), UsageError);
  CHECK_THROWS_AS(simulate_output({path, "--gamma", "2", "--policy", "gamma"}), UsageError);
  CHECK_THROWS_AS(simulate_output({path, "--slots", "many"}), CLI::ParseError);
  CHECK_THROWS_AS(simulate_output({"--slots", "4"}), CLI::ParseError);
  CHECK_THROWS_AS(simulate_output({(folder.path() / "none.csv").string()}), InputError);
}

}  // namespace
}  // namespace hestia
