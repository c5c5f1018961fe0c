#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/routing/simulator.hpp"
#include "hestia/routing/trace.hpp"

namespace hestia::testing {
namespace {

std::vector<std::string> generate(std::vector<std::string> more) {
  std::vector<std::string> all = {"generate",     "--model", "checkpoints/tiny", "--prompt", "The kernel",
                                  "--max-tokens", "24",      "--device",         "cpu",      "--json"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

TEST_CASE("generate says the same with few slots as with all experts, and counts what simulate counts") {
  const TemporaryFolder folder;
  const std::string trace_file = folder.path() / "trace.csv";
  const Json all = Json::parse(done(hestia(generate({}))));
  CHECK(all["cache"].is_null());
  CHECK(all["tokens"].size() == 24);
  CHECK_FALSE(all["text"].get<std::string>().empty());
  const Json few = Json::parse(
      done(hestia(generate({"--expert-slots", "5", "--policy", "lfu", "--start", "prefill", "--record", trace_file}))));
  CHECK(few["tokens"] == all["tokens"]);
  CHECK(few["text"] == all["text"]);
  CHECK(few["traced"] == true);

  const RoutingTrace trace = read_trace(trace_file);
  SimulationOptions options;
  options.policy = CachePolicyKind::kLfu;
  options.slots = 5;
  options.start = CacheStart::kPrefill;
  const SimulationCounts counts = simulate(trace, options);
  CHECK(few["cache"]["fetch"] == "waves");  // on a CPU
  CHECK(few["cache"]["requests"] == counts.requests);
  CHECK(few["cache"]["hits"] == counts.hits);
  CHECK(few["cache"]["cold"] == counts.cold);
  CHECK(few["cache"]["loads"] == counts.loads);
  CHECK(few["cache"]["evictions"] == counts.evictions);
  CHECK(counts.loads > 0);
  CHECK(few["cache"]["bytes_per_token"].get<double>() ==
        Approx(static_cast<double>(counts.load_bytes) / few["decode_steps"].get<double>()));

  // The trace served again, by a model of random weights.
  const Json again = Json::parse(done(hestia(generate({"--random-weights", "3", "--expert-slots", "5", "--policy",
                                                       "lfu", "--start", "prefill", "--replay", trace_file}))));
  CHECK(again["mode"] == "replay");
  CHECK(again["cache"]["hits"] == counts.hits);
  CHECK(again["cache"]["loads"] == counts.loads);
  CHECK(again["warnings"].size() == 2);
}

TEST_CASE("generate decodes packed experts, few or all, to the same tokens, and says what packing lost") {
  const TemporaryFolder folder;
  const std::string trace_file = folder.path() / "trace.csv";
  const Json plain = Json::parse(done(hestia(generate({"--expert-slots", "5", "--record", trace_file}))));
  CHECK(plain["expert_format"] == "bf16");
  CHECK(plain["expert_error"].is_null());
  double smaller = plain["expert_bytes"].get<double>();
  double larger_error = 0.0;
  for (const std::string format : {"int8", "int4"}) {
    INFO(format);
    const Json all = Json::parse(done(hestia(generate({"--expert-format", format}))));
    const Json few = Json::parse(done(hestia(generate({"--expert-format", format, "--expert-slots", "5"}))));
    CHECK(few["tokens"] == all["tokens"]);
    CHECK(few["expert_format"] == format);
    CHECK(few["expert_bytes"].get<double>() < 0.8 * smaller);  // inputs come in groups of 128
    smaller = few["expert_bytes"].get<double>();
    const Json& error = few["expert_error"];
    REQUIRE(error["layers"].size() == 6);
    double sum = 0.0;
    double most = 0.0;
    for (const Json& layer : error["layers"]) {
      const double mean = (layer["gate"].get<double>() + layer["up"].get<double>() + layer["down"].get<double>()) / 3.0;
      sum += mean;
      most = std::max(most, mean);
    }
    CHECK(error["mean"].get<double>() == Approx(sum / 6));
    CHECK(error["max"].get<double>() == Approx(most));
    CHECK(error["mean"].get<double>() > 5 * larger_error);
    larger_error = error["mean"].get<double>();
    // The same experts served: the same counts, fewer bytes.
    const Json again =
        Json::parse(done(hestia(generate({"--expert-format", format, "--expert-slots", "5", "--replay", trace_file}))));
    for (const char* count : {"requests", "hits", "cold", "loads", "evictions"}) {
      CHECK(again["cache"][count] == plain["cache"][count]);
    }
    CHECK(again["cache"]["bytes_per_token"].get<double>() ==
          Approx(plain["cache"]["bytes_per_token"].get<double>() * smaller / plain["expert_bytes"].get<double>()));
  }
  CHECK(larger_error < 0.03);
  const Outcome streamed = hestia({"generate", "--model", "checkpoints/tiny", "--prompt", "The kernel", "--max-tokens",
                                   "3", "--device", "cpu", "--expert-format", "int4-asymmetric"});
  static_cast<void>(done(streamed));
  CHECK_THAT(streamed.err, Catch::Contains("int4-asymmetric, ") && Catch::Contains("relative square error"));
}

TEST_CASE("generate streams text on stdout and keeps its statistics to stderr") {
  const Json json = Json::parse(done(hestia(generate({}))));
  const Outcome streamed = hestia({"generate", "--model", "checkpoints/tiny", "--prompt", "The kernel", "--max-tokens",
                                   "24", "--device", "cpu", "--expert-slots", "total:50"});
  CHECK(done(streamed) == json["text"].get<std::string>() + "\n");
  CHECK_THAT(streamed.err, Catch::Contains("50 slots in one pool") && Catch::Contains("tokens/s"));
}

TEST_CASE("generate writes the router logits as score reads them") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "logits.safetensors";
  static_cast<void>(done(hestia(generate({"--record-logits", file}))));
  const Json score = Json::parse(done(hestia({"score", file, "--slots", "8", "--json"})));
  CHECK(score.contains("metrics"));
}

TEST_CASE("generate draws tokens by its seed") {
  const auto tokens = [](const std::string& seed) {
    return Json::parse(done(hestia(generate({"--temperature", "1.2", "--top-p", "0.95", "--seed", seed}))))["tokens"];
  };
  CHECK(tokens("1") == tokens("1"));
  CHECK(tokens("1") != tokens("2"));
}

TEST_CASE("generate names what is wrong before it loads a model") {
  const auto complains = [](std::vector<std::string> more, const std::vector<std::string>& parts) {
    check_complaint(hestia(generate(std::move(more))), 2, parts);
  };
  complains({"--expert-slots", "40"}, {"--expert-slots", "from 1 to 32", "\"40\""});
  complains({"--expert-slots", "4", "--policy", "lri"}, {"lri", "lru"});
  complains({"--expert-slots", "4", "--policy", "belady"}, {"belady"});
  complains({"--start", "prefil"}, {"--start", "prefil", "prefill"});
  complains({"--start", "preload"}, {"--start preload", "--preload FILE"});
  complains({"--preload", "x.h5"}, {"--preload", "--start cold"});
  complains({"--prompt-tokens", "1,2"}, {"either --prompt TEXT or --prompt-tokens"});
  complains({"--temperature", "-1"}, {"--temperature", "-1"});
  complains({"--top-p", "0"}, {"--top-p", "0"});
  complains({"--residency-prior", "0.3,2"}, {"--residency-prior", "--router"});
  complains({"--residency-prior", "0.3,2,logit"}, {"--residency-prior", "--router", "by weight"});
  complains({"--residency-prior", "0.3,2,weights"}, {"--residency-prior", "logit or weight", "\"0.3,2,weights\""});
  complains({"--residency-prior", "0.3,,weight"}, {"--residency-prior", "\"0.3,,weight\""});
  complains({"--residency-prior", "0.3,2,weight,1"}, {"--residency-prior", "\"0.3,2,weight,1\""});
  complains({"--fold"}, {"--fold", "--replay"});
  complains({"--expert-slots", "4", "--fetch", "copie"}, {"fetch path", "\"copie\"", "did you mean \"copies\""});
  complains({"--expert-format", "int5"}, {"expert format", "\"int5\"", "int4", "bf16"});
  complains({"--expert-format", "int4", "--dtype", "float32"}, {"int4", "float32", "dtype bfloat16"});
  const auto complains_of_tokens = [](const std::string& tokens) {
    check_complaint(hestia({"generate", "--model", "checkpoints/tiny", "--prompt", "x", "--max-tokens", tokens}), 2,
                    {"--max-tokens", tokens});
  };
  complains_of_tokens("0");
  complains_of_tokens("100000");
}

TEST_CASE("a residency prior by weight needs no bundle, and loads less") {
  const Json plain = Json::parse(done(hestia(generate({"--expert-slots", "5"}))));
  CHECK(plain["residency"].is_null());
  const Json prior = Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", "0.2,1,weight"}))));
  CHECK(prior["residency"] == Json{{"score", "weight"}, {"lambda", 0.2}, {"always_keep", 1}});
  CHECK(prior["cache"]["loads"] < plain["cache"]["loads"]);
  const Json none = Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", "0,1,weight"}))));
  CHECK(none["residency"].is_null());
  CHECK(none["tokens"] == plain["tokens"]);
  CHECK(none["cache"]["loads"] == plain["cache"]["loads"]);
}

TEST_CASE("experts that cannot be packed are refused before weights are read, by generate, validate and bench") {
  const TemporaryFolder folder;
  const std::string model = folder.path();
  const std::string config = read_text_file(std::filesystem::path(HESTIA_SOURCE_DIR) / "checkpoints/tiny/config.json");
  write_text_atomically(folder.path() / "config.json",
                        replaced(config, "\"intermediate_size\": 56", "\"intermediate_size\": 60"));
  const std::vector<std::string> reason = {"int8", "multiples of 8", "hidden size of 60", "use bf16"};
  check_complaint(hestia({"generate", "--model", model, "--random-weights", "1", "--prompt-tokens", "1,2", "--device",
                          "cpu", "--expert-format", "int8"}),
                  2, reason);
  const Json plain = Json::parse(done(hestia({"generate", "--model", model, "--random-weights", "1", "--prompt-tokens",
                                              "1,2", "--max-tokens", "2", "--device", "cpu", "--json"})));
  CHECK(plain["tokens"].size() == 2);
  std::vector<std::string> in_recipe = reason;
  in_recipe.insert(in_recipe.end(), {"bench.expert_formats", "int4"});
  for (const char* verb : {"validate", "bench"}) {
    check_complaint(hestia({verb, "recipes/bench_olmoe.yaml", "model.path=" + model, "replay.trace=\"\"",
                            "replay.fold=false", "bench.expert_formats=[bf16,int8,int4]"}),
                    2, in_recipe);
  }
}

TEST_CASE("bench decodes a grid and says the bound's figures where there is a GPU") {
  const TemporaryFolder folder;
  const std::string trace_file = folder.path() / "trace.csv";
  static_cast<void>(done(hestia(generate({"--record", trace_file}))));
  const std::string output = folder.path() / "runs" / "bench.jsonl";
  const std::vector<std::string> arguments = {"bench",
                                              "recipes/bench_olmoe.yaml",
                                              "model.path=checkpoints/tiny",
                                              "model.weights=stored",
                                              "model.device=cpu",
                                              "replay.trace=" + trace_file,
                                              "replay.fold=false",
                                              "bench.slots=[all,\"6\"]",
                                              "bench.policies=[lru,lifo]",
                                              "bench.expert_formats=[bf16,int4]",
                                              "bench.batch=[1,3]",
                                              "bench.prompt_tokens=[4]",
                                              "bench.new_tokens=[9]",
                                              "bench.repeats=1",
                                              "output=" + output};
  std::vector<std::string> as_json = arguments;
  as_json.insert(as_json.begin() + 2, "--json");
  const std::vector<std::string> lines = lines_of(done(hestia(as_json)));
  REQUIRE(lines.size() == 12);  // all, and 6 slots under two policies, for two batches, in two formats
  const Json first = Json::parse(lines[0]);
  CHECK(first["slots"] == "all");
  CHECK(first["mode"] == "replay");
  CHECK(first["loads_per_step_and_layer"] == 0.0);
  CHECK(first["hit_rate"] == 1.0);
  CHECK(first["requests_per_step_and_layer"] == 4.0);
  CHECK(first["share_of_bound"].is_null());  // no link
  CHECK(first["tokens_per_second"].get<double>() > 0.0);
  const Json second = Json::parse(lines[1]);
  CHECK(second["policy"] == "lru");
  SimulationOptions options;
  options.slots = 6;
  RoutingTrace trace = read_trace(trace_file);
  std::vector<TraceEntry> kept;  // the steps that were served
  std::int64_t first_step = -1;
  for (const TraceEntry& entry : trace.entries) {
    if (entry.phase == Phase::kDecode) {
      first_step = first_step < 0 ? entry.step : first_step;
      if (entry.step < first_step + 8) {
        kept.push_back(entry);
      }
    }
  }
  trace.entries = kept;
  const SimulationCounts counts = simulate(trace, options);
  CHECK(second["loads_per_step_and_layer"].get<double>() == Approx(static_cast<double>(counts.loads) / (8 * 6)));
  CHECK(std::filesystem::exists(output));
  const Json batch = Json::parse(lines[3]);
  CHECK(batch["batch"] == 3);
  CHECK(batch["requests_per_step_and_layer"].get<double>() > 4.0);
  // The formats one after the other: the trace's experts, in fewer bytes.
  for (std::size_t i = 0; i < 6; ++i) {
    const Json plain = Json::parse(lines[i]);
    const Json packed = Json::parse(lines[i + 6]);
    CHECK(plain["expert_format"] == "bf16");
    CHECK(plain["expert_error"].is_null());
    CHECK(packed["expert_format"] == "int4");
    CHECK(packed["expert_error"]["layers"].size() == 6);
    for (const char* same : {"slots", "policy", "batch", "loads_per_step_and_layer", "hit_rate"}) {
      CHECK(packed[same] == plain[same]);
    }
    CHECK(packed["bytes_per_token"].get<double>() * plain["expert_bytes"].get<double>() ==
          Approx(plain["bytes_per_token"].get<double>() * packed["expert_bytes"].get<double>()));
    CHECK(packed["expert_bytes"].get<double>() < 0.4 * plain["expert_bytes"].get<double>());
    CHECK(packed.contains("rates_before"));
    CHECK(packed.contains("rates_after"));
    CHECK(plain.contains("rates_after"));
  }
  CHECK_THAT(done(hestia(arguments)), Catch::Contains("tokens/s") && Catch::Contains("lifo"));
}

TEST_CASE("bench refuses a grid that there is not, with the recipe's line") {
  const auto complains = [](std::vector<std::string> more, const std::vector<std::string>& parts) {
    std::vector<std::string> all = {"bench", "recipes/bench_olmoe.yaml", "model.path=checkpoints/tiny",
                                    "replay.trace=\"\"", "replay.fold=false"};
    all.insert(all.end(), more.begin(), more.end());
    check_complaint(hestia(all), 2, parts);
  };
  complains({"bench.slots=[\"99\"]"}, {"bench.slots", "from 1 to 32"});
  complains({"bench.policies=[belady]"}, {"belady"});
  complains({"bench.batch=[]"}, {"bench.batch", "at least one"});
  complains({"bench.start=full", "bench.slots=[\"4\"]"}, {"bench.start", "32"});
  complains({"bench.slot=[all]"}, {"bench.slot", "bench.slots"});
  complains({"bench.expert_formats=[int5]"}, {"bench.expert_formats", "int5", "int4"});
  complains({"bench.expert_formats=[]"}, {"bench.expert_formats", "at least one"});
  complains({"bench.expert_formats=[bf16,int8]", "model.dtype=float32"}, {"bench.expert_formats", "int8", "float32"});
}

}  // namespace
}  // namespace hestia::testing
