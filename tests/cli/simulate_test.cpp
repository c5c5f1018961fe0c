#include <algorithm>
#include <deque>
#include <map>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/routing/trace.hpp"
#include "tests/unit/routing/routing_fixtures.hpp"

namespace hestia::testing {
namespace {

std::vector<Json> json_lines(const std::string& text) {
  std::vector<Json> lines;
  for (const std::string& line : lines_of(text)) {
    lines.push_back(Json::parse(line));
  }
  return lines;
}

// LRU by the book: a list of residents, the least recent first.
struct Counts {
  std::int64_t requests = 0;
  std::int64_t hits = 0;
  std::int64_t evictions = 0;
};

Counts count_lru(const RoutingTrace& trace, std::size_t slots) {
  Counts counts;
  std::map<std::pair<std::int64_t, std::int64_t>, std::deque<int>> caches;  // by sequence and layer
  for (const TraceEntry& entry : trace.entries) {
    if (entry.phase != Phase::kDecode) {
      continue;
    }
    std::deque<int>& cache = caches[{entry.sequence, entry.layer}];
    const std::deque<int> before = cache;
    const auto experts = trace.experts_of(entry);
    for (std::size_t rank = experts.size(); rank-- > 0;) {
      const int expert = experts[rank];
      counts.requests += 1;
      counts.hits += std::count(before.begin(), before.end(), expert);
      cache.erase(std::remove(cache.begin(), cache.end(), expert), cache.end());
      cache.push_back(expert);
    }
    while (cache.size() > slots) {
      cache.pop_front();
      counts.evictions += 1;
    }
  }
  return counts;
}

TEST_CASE("simulate gives the golden integers of the recorded trace", "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  const std::vector<Json> lines = json_lines(
      done(hestia({"simulate", path->string(), "--policy", "lru,lfu,belady", "--slots", "8,16,32,64", "--json"})));
  const std::vector<std::string> policies = {"lru", "lfu", "belady"};
  const std::vector<std::int64_t> slots = {8, 16, 32, 64};
  const std::vector<std::int64_t> hits = {15785, 22522, 29757, 33623, 16971, 23748,
                                          30194, 33639, 19165, 27559, 32484, 33771};
  REQUIRE(lines.size() == hits.size());
  for (std::size_t i = 0; i < hits.size(); ++i) {
    INFO(lines[i].dump());
    CHECK(lines[i].at("policy") == policies[i / 4]);
    CHECK(lines[i].at("slots") == slots[i % 4]);
    CHECK(lines[i].at("requests") == 36864);
    CHECK(lines[i].at("cold") == 3059);
    CHECK(lines[i].at("hits") == hits[i]);
    CHECK(lines[i].at("loads") == 36864 - hits[i]);
  }
  CHECK_THAT(done(hestia({"simulate", path->string()})),
             Catch::Contains("expert overlap    0.379511") && Catch::Contains("48 MoE layers, 128 experts, top 6"));
}

TEST_CASE("simulate counts a generated trace as a plain count does, in every form it is stored in") {
  const TemporaryFolder folder;
  SplitMix64 random(77);
  const RoutingTrace trace = random_trace(random, TraceShape{});
  const std::string csv = (folder.path() / "trace.csv").string();
  const std::string hdf5 = (folder.path() / "trace.h5").string();
  write_trace_csv(csv, trace);
  write_trace_hdf5(hdf5, trace);
  const Outcome outcome = hestia({"simulate", csv, "--policy=lru", "--slots", "2,3,5,12", "--json"});
  CHECK(outcome.err.empty());
  const std::vector<Json> lines = json_lines(done(outcome));
  REQUIRE(lines.size() == 4);
  for (const Json& line : lines) {
    INFO(line.dump());
    const Counts counts = count_lru(trace, line.at("slots").get<std::size_t>());
    CHECK(line.at("requests") == counts.requests);
    CHECK(line.at("hits") == counts.hits);
    CHECK(line.at("loads") == counts.requests - counts.hits);
    CHECK(line.at("evictions") == counts.evictions);
    CHECK(line.at("hit_rate").get<double>() ==
          Approx(static_cast<double>(counts.hits) / static_cast<double>(counts.requests)).epsilon(1e-12));
    std::vector<std::string> keys;
    for (const auto& [key, value] : line.items()) {
      keys.push_back(key);
    }
    CHECK(keys == std::vector<std::string>{"policy", "slots", "start", "requests", "hits", "cold", "loads", "evictions",
                                           "hit_rate"});
  }
  CHECK(done(hestia({"simulate", hdf5, "--policy=lru", "--slots", "2,3,5,12", "--json"})) == outcome.out);
}

TEST_CASE("simulate reads llama.cpp's pairs") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "pairs.csv").string();
  // Two layers, four steps, top 2.
  write_text_atomically(
      path, "layer,expert\n0,1\n0,2\n1,0\n1,3\n0,1\n0,3\n1,0\n1,3\n0,2\n0,1\n1,1\n1,2\n0,1\n0,2\n1,3\n1,0\n");
  const std::vector<Json> lines =
      json_lines(done(hestia({"simulate", path, "--policy", "lru", "--slots", "2", "--json"})));
  REQUIRE(lines.size() == 1);
  // Layer 0: {1,2} {1,3} {2,1} {1,2}: 0 + 1 + 1 + 2 hits. Layer 1: {0,3} {0,3} {1,2} {3,0}: 0 + 2 + 0 + 0.
  CHECK(lines[0].at("requests") == 16);
  CHECK(lines[0].at("hits") == 6);
}

TEST_CASE("simulate names what is wrong on its command line") {
  const TemporaryFolder folder;
  SplitMix64 random(78);
  const std::string path = (folder.path() / "trace.csv").string();
  write_trace_csv(path, random_trace(random, TraceShape{}));
  check_complaint(hestia({"simulate", path, "--policy", "lru,beladdy"}), 2, {"beladdy", "did you mean \"belady\"?"});
  check_complaint(hestia({"simulate", path, "--slots", "0"}), 2, {"slots", "at least 1", "got 0"});
  check_complaint(hestia({"simulate", path, "--slots", "few"}), 2, {"--slots", "few"});
  check_complaint(hestia({"simulate", path, "--start", "warm"}), 2, {"start", "warm", "cold, prefill, preload"});
  check_complaint(hestia({"simulate", path, "--start", "preload"}), 2, {"--preload FILE"});
  check_complaint(hestia({"simulate", path, "--start", "preload", "--preload", path}), 3, {path});
  check_complaint(hestia({"simulate", path, "--policy", "gamma", "--gamma", "1.5"}), 2, {"gamma", "[0, 1]", "1.5"});
  check_complaint(hestia({"simulate", (folder.path() / "absent.csv").string()}), 3, {"absent.csv", "check the path"});
  check_complaint(hestia({"simulate", folder.path().string()}), 3, {folder.path().string(), "not a regular file"});
}

// Lines of a valid trace: a header of 4, the columns in line 5, rows from line 6.
std::vector<std::string> good_lines() {
  return {"# route_trace v1",
          "# model=some model n_layer=2 n_expert=4 n_expert_used=2",
          "# layer=0 expert_bytes=100",
          "# layer=1 expert_bytes=100",
          "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
          "0,1,0,0,0,3,0.75,0,100",
          "0,1,0,0,1,1,0.25,0,100",
          "0,1,0,1,0,2,0.5,0,100",
          "0,1,0,1,1,0,0.5,0,100",
          "0,1,1,0,0,3,0.75,1,0",
          "0,1,1,0,1,2,0.25,0,100"};
}

TEST_CASE("a damaged trace is refused with the line that is wrong") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "trace.csv").string();
  struct Damage {
    std::size_t line;  // 1 is the first
    std::string text;  // in its place
    std::string message;
  };
  const std::vector<Damage> damages = {
      {1, "# route_trace v7", "version 7 is newer"},
      {2, "# model=m n_layer=2 n_expert=four n_expert_used=2", "n_expert must be a whole number"},
      {5, "turn,phase,step,layer,expert,weight", "wrong column line"},
      {7, "0,1,0,0,1,1,heavy,0,100", "weight must be a number, got \"heavy\""},
      {7, "0,1,0,0,1,1,0.25", "expected 9 columns"},
      {8, "0,1,0,1,0,4,0.5,0,100", "expert must lie between 0 and 3"},
      {9, "0,1,0,1,1,2,0.5,0,100", "expert 2 of step 0, layer 1 stands already in line 8"},
      {10, "0,1,0,0,0,3,0.75,1,0", "must rise"},
  };
  for (const Damage& damage : damages) {
    std::vector<std::string> lines = good_lines();
    lines[damage.line - 1] = damage.text;
    std::string text;
    for (const std::string& line : lines) {
      text += line + "\n";
    }
    INFO(damage.text);
    write_text_atomically(path, text);
    check_complaint(hestia({"simulate", path}), 3, {path + ":" + std::to_string(damage.line) + ": ", damage.message});
  }
}

TEST_CASE("a truncated trace is refused, the whole one is not") {
  const TemporaryFolder folder;
  std::string text;
  for (const std::string& line : good_lines()) {
    text += line + "\n";
  }
  const std::string path = (folder.path() / "trace.csv").string();
  write_text_atomically(path, text);
  CHECK(json_lines(done(hestia({"simulate", path, "--slots", "2", "--policy", "lru", "--json"}))).at(0).at("hits") ==
        1);
  // In the middle of the last line.
  write_text_atomically(path, text.substr(0, text.size() - 6));
  check_complaint(hestia({"simulate", path}), 3, {path + ":11: ", "cut short"});
  // Between two lines: a step lacks experts, which a recorder may have meant.
  write_text_atomically(path, text.substr(0, text.rfind("0,1,1,0,1")));
  const Outcome short_step = hestia({"simulate", path, "--json"});
  CHECK(short_step.code == 0);
  CHECK_THAT(short_step.err, Catch::Contains("warning: ") && Catch::Contains(path));
  write_text_atomically(path, "");
  check_complaint(hestia({"simulate", path}), 3, {path, "empty"});
  // The packed form.
  SplitMix64 random(79);
  const std::string hdf5 = (folder.path() / "trace.h5").string();
  write_trace_hdf5(hdf5, random_trace(random, TraceShape{}));
  const std::string whole = read_text_file(hdf5);
  write_text_atomically(hdf5, whole.substr(0, whole.size() / 2));
  check_complaint(hestia({"simulate", hdf5}), 3, {hdf5});
}

}  // namespace
}  // namespace hestia::testing
