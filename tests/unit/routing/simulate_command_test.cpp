#include <algorithm>
#include <iostream>
#include <set>
#include <sstream>

#include <catch2/catch.hpp>

#include "cli/commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/routing/metrics.hpp"
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
  const std::string path = (folder.path() / "trace.csv").string();
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
      const Json expected = {{"policy", policy_name(policy)}, {"slots", slots},
                             {"requests", counts.requests},   {"hits", counts.hits},
                             {"cold", counts.cold},           {"loads", counts.loads},
                             {"evictions", counts.evictions}, {"hit_rate", counts.hit_rate()}};
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
  // 4 lines, a blank one, the head, then 3 policies at 1, 3 and 6 slots.
  CHECK(std::count(text.begin(), text.end(), '\n') == 4 + 1 + 1 + 9);
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
