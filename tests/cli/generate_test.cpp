#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/routing/preferences.hpp"
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

// What simulate counts of --policy lfu --expert-slots 5 --start prefill.
SimulationCounts counts_of_lfu(const RoutingTrace& trace) {
  SimulationOptions options;
  options.policy = CachePolicyKind::kLfu;
  options.slots = 5;
  options.start = CacheStart::kPrefill;
  return simulate(trace, options);
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
  const SimulationCounts counts = counts_of_lfu(trace);
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

// Statistics of random routing for the shipped model: `num_sequences` of 20 tokens, the first 8 a prompt (or none).
std::string preferences_of_tiny(const TemporaryFolder& folder, std::int64_t num_sequences, std::int64_t num_prompt,
                                const PreferencePredictor* predictor = nullptr) {
  constexpr std::int64_t kLayers = 6;
  constexpr std::int64_t kExperts = 32;
  std::string path = folder.path() / "preferences.h5";
  SplitMix64 random(811);
  const auto routing = [&](std::int64_t id) {
    SequenceRouting sequence;
    sequence.id = id;
    sequence.num_tokens = 20;
    sequence.num_prompt_tokens = num_prompt;
    sequence.num_layers = kLayers;
    sequence.num_experts = kExperts;
    sequence.top_k = 4;
    for (std::int64_t row = 0; row < kLayers * 20; ++row) {
      const auto first = static_cast<std::uint16_t>(random.below(kExperts));
      for (std::uint16_t k = 0; k < 4; ++k) {
        sequence.selected.push_back(static_cast<std::uint16_t>((first + 7 * k) % kExperts));
      }
      sequence.probabilities.insert(sequence.probabilities.end(), kExperts, 1.0F / kExperts);
    }
    return sequence;
  };
  PreferenceWriter writer(path, kLayers, kExperts, {0, 1, 2, 3, 4, 5});
  for (std::int64_t id = 0; id < num_sequences; ++id) {
    writer.add(routing(40 + id), routing(40 + id));
  }
  writer.close(predictor);
  return path;
}

// Of the shipped model's shape; its guess is `bias` [L, E] and, times `weight`, something of the prompt.
PreferencePredictor predictor_of_tiny(const std::vector<float>& bias, float weight) {
  PreferencePredictor predictor;
  predictor.num_layers = 6;
  predictor.num_experts = 32;
  predictor.embedding_size = 256;
  predictor.hidden_size = 3;
  SplitMix64 random(812);
  const auto fill = [&](std::vector<float>& values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(random.uniform()) - 0.5F);
    }
  };
  fill(predictor.hidden_weight, 3 * 256);
  predictor.hidden_bias.assign(3, 1.0F);  // more than what embeddings add: no unit is dead
  fill(predictor.output_weight, 6 * 32 * 3);
  for (float& value : predictor.output_weight) {
    value *= weight;
  }
  predictor.output_bias = bias;
  predictor.embedding = kMeanTokenEmbedding;
  predictor.report.slots = {1};
  predictor.report.best_by_requests = predictor.report.best_by_kl = "predictor";
  return predictor;
}

TEST_CASE("generate pre-loads what statistics, predictor or nearest prompt say, and counts what simulate counts") {
  const TemporaryFolder folder;
  SplitMix64 random(813);
  std::vector<float> bias;
  for (int i = 0; i < 6 * 32; ++i) {
    bias.push_back(static_cast<float>(random.uniform()));
  }
  const Json cold = Json::parse(done(hestia(generate({"--expert-slots", "5"}))));
  CHECK(cold["cache"]["preload"].is_null());
  std::vector<std::vector<std::uint16_t>> first_layers;
  const auto check = [&](const std::string& by, const std::string& prompt, float weight) {
    CAPTURE(by, prompt);
    const PreferencePredictor predictor = predictor_of_tiny(bias, weight);
    const std::string file = preferences_of_tiny(folder, 5, 8, &predictor);
    const std::string trace_file = folder.path() / "trace.csv";
    const Json json = Json::parse(done(hestia(
        {"generate",     "--model", "checkpoints/tiny", "--prompt", prompt,    "--max-tokens", "16",        "--device",
         "cpu",          "--json",  "--expert-slots",   "5",        "--start", "preload",      "--preload", file,
         "--preload-by", by,        "--record",         trace_file})));
    const Json& preload = json["cache"]["preload"];
    CHECK(preload["by"] == by);
    CHECK(preload["file"] == file);
    CHECK(preload["router"] == (by == "predictor" ? "tuned" : "baseline"));
    CHECK(preload["sequence"].is_null() == (by != "nearest"));
    const RoutingTrace trace = read_trace(trace_file);
    SimulationOptions options;
    options.slots = 5;
    options.start = CacheStart::kPreload;
    for (const TraceLayer& layer : trace.layers) {
      options.preload.push_back(layer.preload);
    }
    const SimulationCounts counts = simulate(trace, options);
    CHECK(json["cache"]["requests"] == counts.requests);
    CHECK(json["cache"]["hits"] == counts.hits);
    CHECK(json["cache"]["cold"] == counts.cold);
    CHECK(json["cache"]["loads"] == counts.loads);
    CHECK(json["cache"]["evictions"] == counts.evictions);
    const Json simulated = Json::parse(
        done(hestia({"simulate", trace_file, "--policy", "lru", "--slots", "5", "--start", "preload", "--json"})));
    CHECK(simulated["hits"] == counts.hits);
    first_layers.push_back(options.preload.front());
    if (by == "nearest") {
      const PreferenceReader reader(file);
      const std::vector<std::int64_t> ids = reader.ids();
      const auto place = std::find(ids.begin(), ids.end(), preload["sequence"].get<std::int64_t>()) - ids.begin();
      REQUIRE(place < 5);
      const PreferenceRows row = reader.rows(PreferenceRouter::kBaseline, place, 1);
      CHECK(row.count[options.preload[0][0]] == *std::max_element(row.count.begin(), row.count.begin() + 32));
      CHECK(preload["similarity"].get<double>() > 0.0);
    }
    if (by == "predictor" && weight == 0.0F) {
      for (std::size_t layer = 0; layer < 6; ++layer) {
        for (std::size_t rank = 1; rank < 32; ++rank) {
          const std::size_t at = layer * 32;
          CHECK(bias[at + options.preload[layer][rank - 1]] >= bias[at + options.preload[layer][rank]]);
        }
      }
    }
  };
  check("aggregate", "The kernel", 0.0F);
  check("nearest", "The kernel", 0.0F);
  check("predictor", "The kernel", 0.0F);
  check("predictor", "The kernel", 200.0F);
  check("predictor", "Once upon a time", 200.0F);
  for (std::size_t i = 0; i < first_layers.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      CHECK(first_layers[i] != first_layers[j]);
    }
  }
}

TEST_CASE("generate says what statistics lack for a preload, before it loads a model") {
  const TemporaryFolder folder;
  const std::string file = preferences_of_tiny(folder, 3, 0);
  const auto complains = [&](std::vector<std::string> more, const std::vector<std::string>& parts) {
    more.insert(more.begin(), {"--expert-slots", "4", "--start", "preload", "--preload", file});
    check_complaint(hestia(generate(std::move(more))), 2, parts);
  };
  complains({"--preload-by", "predictor"}, {file, "has no predictor", "export.predictor.enabled=true"});
  complains({"--preload-by", "nearest"}, {file, "no sequence with a prompt", "got 3 sequences"});
  complains({"--preload-by", "nearst"}, {"--preload-by", "\"nearst\"", "did you mean \"nearest\"", "aggregate"});
  complains({"--preload-by", "predictor", "--preload-router", "baseline"}, {"--preload-router", "tuned"});
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

TEST_CASE("a prompt begins with one token of beginning, where the model has one, and keeps what it repeats") {
  const TemporaryFolder folder;
  std::filesystem::copy(HESTIA_SOURCE_DIR "/checkpoints/tiny", folder.path() / "without");
  Json config = read_json_file(folder.path() / "without" / "config.json");
  config["bos_token_id"] = nullptr;
  write_text_atomically(folder.path() / "without" / "config.json", config.dump());
  const auto tokens = [&](const std::string& model, const std::string& prompt) {
    return Json::parse(done(hestia({"generate", "--model", model, "--prompt", prompt, "--max-tokens", "1", "--device",
                                    "cpu", "--json"})))["prompt_tokens"]
        .get<std::int64_t>();
  };
  const std::string without = (folder.path() / "without").string();
  for (const char* prompt : {"The kernel", "\n\n\nThe kernel", "\n\n\n\n"}) {
    INFO(prompt);
    CHECK(tokens(without, prompt) + 1 == tokens("checkpoints/tiny", prompt));
  }
  CHECK(tokens(without, "\n\n\n\n") > tokens(without, "\n\n\n"));
}

TEST_CASE("generate lays a message out as a chat") {
  const Json plain = Json::parse(done(hestia(generate({}))));
  CHECK(plain["chat"].is_null());
  const Json chat = Json::parse(done(hestia(generate({"--chat", "tulu"}))));
  CHECK(chat["chat"] == "tulu");
  CHECK(chat["prompt_tokens"] > plain["prompt_tokens"]);
  CHECK(chat["tokens"] != plain["tokens"]);
  // As the format spells it (docs/recipes.md); no text of it is a token of its own.
  const Json spelt = Json::parse(done(hestia({"generate", "--model", "checkpoints/tiny", "--prompt",
                                              "<|system|>\nBe brief.\n<|user|>\nThe kernel\n<|assistant|>\n",
                                              "--max-tokens", "24", "--device", "cpu", "--json"})));
  const Json system = Json::parse(done(hestia(generate({"--chat", "tulu", "--system", "Be brief."}))));
  CHECK(system["prompt_tokens"] == spelt["prompt_tokens"]);
  CHECK(system["tokens"] == spelt["tokens"]);
  CHECK(system["tokens"] != chat["tokens"]);
}

TEST_CASE("generate says where the experts lie, and that a CPU pins nothing") {
  const Json json = Json::parse(done(hestia(generate({"--expert-slots", "5", "--pinned-memory", "2MiB"}))));
  const Json& store = json["expert_store"];
  CHECK(store["experts"] == 6 * 32);
  CHECK(store["bytes"].get<std::int64_t>() == 6 * 32 * json["expert_bytes"].get<std::int64_t>());
  CHECK(store["pinned_bytes"] == 0);
  CHECK(store["staging_bytes"] == 0);
  REQUIRE(json["warnings"].size() == 1);
  CHECK_THAT(json["warnings"][0].get<std::string>(), Catch::Contains("--pinned-memory"));
  CHECK(json["tokens"] == Json::parse(done(hestia(generate({}))))["tokens"]);
  // Paths that are a GPU's alone.
  const Json guessed = Json::parse(done(hestia(generate({"--expert-slots", "5", "--prefetch", "next-gate"}))));
  CHECK(guessed["cache"]["prefetch"].is_null());
  REQUIRE(guessed["warnings"].size() == 1);
  CHECK_THAT(guessed["warnings"][0].get<std::string>(), Catch::Contains("--prefetch next-gate"));
  CHECK(Json::parse(done(hestia(generate({"--expert-slots", "5", "--fetch", "staged"}))))["cache"]["fetch"] == "waves");
}

TEST_CASE("generate writes the router logits as score reads them") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "logits.safetensors";
  static_cast<void>(done(hestia(generate({"--record-logits", file}))));
  const Json score = Json::parse(done(hestia({"score", file, "--slots", "8", "--json"})));
  CHECK(score.contains("metrics"));
}

// A file of prompts, and the rest of the command.
std::vector<std::string> generate_all(const std::string& file, std::vector<std::string> more) {
  std::vector<std::string> all = generate({});
  const auto prompt = std::find(all.begin(), all.end(), "--prompt");
  *prompt = "--prompts";
  *(prompt + 1) = file;
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

TEST_CASE("generate runs a file of prompts one after the other, each as it runs alone") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "prompts.jsonl";
  const std::string trace_file = folder.path() / "trace.h5";
  const std::vector<std::string> prompts = {"The kernel", "def read(self, name):\n    return", "A free society is one"};
  write_text_atomically(file, Json({{"prompt", prompts[0]}}).dump() + "\n\n" +
                                  Json({{"id", 41}, {"task", "python"}, {"prompt", prompts[1]}}).dump() + "\n" +
                                  Json({{"prompt", prompts[2]}, {"id", "last"}}).dump() + "\n");
  const std::vector<std::string> served = {"--expert-slots", "5",       "--policy", "lfu",
                                           "--start",        "prefill", "--dtype",  "float32"};
  std::vector<std::string> recorded = served;
  recorded.insert(recorded.end(), {"--record", trace_file, "--record-logits", "--record-logits-sequences", "2"});
  const std::vector<std::string> lines = lines_of(done(hestia(generate_all(file, recorded))));
  REQUIRE(lines.size() == 3);
  const RoutingTrace trace = read_trace(trace_file);
  const SimulationCounts counts = counts_of_lfu(trace);
  std::int64_t requests = 0;
  std::int64_t hits = 0;
  std::int64_t loads = 0;
  std::size_t first_entry = 0;
  std::size_t logged = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    INFO(i);
    const Json json = Json::parse(lines[i]);
    CHECK(json["sequence"] == i);
    CHECK(json["id"] == (i == 0 ? Json() : i == 1 ? Json(41) : Json("last")));
    std::vector<std::string> alone = generate(served);
    *(std::find(alone.begin(), alone.end(), "--prompt") + 1) = prompts[i];
    const Json single = Json::parse(done(hestia(alone)));
    CHECK_FALSE(single.contains("sequence"));
    CHECK(json["tokens"] == single["tokens"]);
    CHECK(json["text"] == single["text"]);
    CHECK(json["prompt_tokens"] == single["prompt_tokens"]);
    for (const char* count : {"requests", "hits", "cold", "loads", "evictions"}) {
      CHECK(json["cache"][count] == single["cache"][count]);
    }
    requests += json["cache"]["requests"].get<std::int64_t>();
    hits += json["cache"]["hits"].get<std::int64_t>();
    loads += json["cache"]["loads"].get<std::int64_t>();
    const std::size_t steps = json["prompt_tokens"].get<std::size_t>() + json["decode_steps"].get<std::size_t>();
    for (std::size_t entry = first_entry; entry < first_entry + 6 * steps; ++entry) {
      REQUIRE(trace.entries.at(entry).sequence == static_cast<std::int64_t>(i));
    }
    first_entry += 6 * steps;
    logged += i < 2 ? 6 * steps * 32 : 0;
  }
  CHECK(first_entry == trace.entries.size());
  CHECK(requests == counts.requests);
  CHECK(hits == counts.hits);
  CHECK(loads == counts.loads);
  CHECK(read_trace_logits(trace_file).size() == logged);

  // Logits as score reads them, by sequence.
  const std::string score_file = folder.path() / "logits.safetensors";
  static_cast<void>(done(hestia(generate_all(file, {"--record-logits", score_file}))));
  const SafetensorsFile logits(score_file);
  CHECK(logits.tensor("router_logits").shape == std::vector<std::int64_t>{6, 3 * 23, 32});
  CHECK(logits.tensor("sequence_ids").shape == std::vector<std::int64_t>{3 * 23});
  CHECK(Json::parse(done(hestia({"score", score_file, "--slots", "8", "--json"}))).contains("metrics"));

  // As text, under a head each.
  std::vector<std::string> texts = generate_all(file, {});
  texts.erase(std::find(texts.begin(), texts.end(), "--json"));
  const Outcome outcome = hestia(texts);
  CHECK_THAT(done(outcome), Catch::StartsWith("--- sequence 0\n") && Catch::Contains("\n--- sequence 1, id 41\n") &&
                                Catch::Contains("\n--- sequence 2, id \"last\"\n"));
  CHECK_THAT(outcome.err, Catch::Contains("72 generated (3 sequences)"));
}

TEST_CASE("each prompt of a file is pre-loaded for by itself") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "prompts.jsonl";
  write_text_atomically(file, "{\"prompt\": \"The kernel\"}\n{\"prompt\": \"class File:\"}\n");
  SplitMix64 random(817);
  std::vector<float> bias;
  for (int i = 0; i < 6 * 32; ++i) {
    bias.push_back(static_cast<float>(random.uniform()) * 0.01F);
  }
  const PreferencePredictor predictor = predictor_of_tiny(bias, 60.0F);
  const std::string statistics = preferences_of_tiny(folder, 4, 8, &predictor);
  for (const char* by : {"predictor", "nearest"}) {
    INFO(by);
    const std::vector<std::string> preloaded = {"--expert-slots", "5",        "--start",      "preload",
                                                "--preload",      statistics, "--preload-by", by};
    const std::vector<std::string> lines = lines_of(done(hestia(generate_all(file, preloaded))));
    REQUIRE(lines.size() == 2);
    for (const std::size_t i : {0, 1}) {
      std::vector<std::string> alone = generate(preloaded);
      *(std::find(alone.begin(), alone.end(), "--prompt") + 1) = i == 0 ? "The kernel" : "class File:";
      const Json single = Json::parse(done(hestia(alone)));
      CHECK(Json::parse(lines[i])["cache"]["hits"] == single["cache"]["hits"]);
      CHECK(Json::parse(lines[i])["cache"]["preload"] == single["cache"]["preload"]);
    }
    std::vector<std::string> recorded = preloaded;
    recorded.insert(recorded.end(), {"--record", folder.path() / "trace.csv"});
    check_complaint(hestia(generate_all(file, recorded)), 2, {"--record: a trace holds one list", by});
  }
}

TEST_CASE("a file of prompts that cannot be run is refused with its line") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "prompts.jsonl";
  const auto complaint = [&](const std::string& text, int code, const std::vector<std::string>& parts) {
    write_text_atomically(file, text);
    check_complaint(hestia(generate_all(file, {})), code, parts);
  };
  complaint("{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n", 3, {"prompts.jsonl:2", "\"prompt\" must be text, got none"});
  complaint("{\"prompt\": 7}\n", 3, {"prompts.jsonl:1", "\"prompt\" must be text, got 7"});
  complaint("[\"a\"]\n", 3, {"prompts.jsonl:1"});
  complaint("\n", 3, {"prompts.jsonl", "there is no prompt"});
  complaint("{\"prompt\": \"a\"}\n" + Json({{"prompt", std::string(9000, '!')}}).dump() + "\n", 2,
            {"--max-tokens: the model reaches 4096 tokens", "prompts.jsonl:2"});
  write_text_atomically(file, "{\"prompt\": \"a\"}\n");
  check_complaint(hestia(generate_all(file, {"--prompt", "b"})), 2, {"give either --prompt"});
  check_complaint(hestia(generate_all(file, {"--replay", "trace.csv"})), 2, {"--prompts", "--replay"});
  check_complaint(hestia(generate_all(file, {"--record-logits-sequences", "1"})), 2,
                  {"--record-logits-sequences", "add --record-logits"});
}

TEST_CASE("generate puts the router logits of prompt and steps into a packed trace") {
  const TemporaryFolder folder;
  const std::string file = folder.path() / "trace.h5";
  const Json json = Json::parse(done(hestia(generate({"--record", file, "--record-logits"}))));
  CHECK(json["traced"] == true);
  const RoutingTrace trace = read_trace(file);
  const std::vector<float> logits = read_trace_logits(file);
  REQUIRE(logits.size() == trace.entries.size() * 32);
  CHECK(trace.entries.size() ==
        6 * (json["prompt_tokens"].get<std::size_t>() + json["decode_steps"].get<std::size_t>()));
  // The experts chosen are those of the highest logits, whose softmax their weights are; all in half precision.
  for (std::size_t entry = 0; entry < trace.entries.size(); ++entry) {
    const float* z = logits.data() + entry * 32;
    double sum = 0.0;
    for (std::size_t e = 0; e < 32; ++e) {
      sum += std::exp(static_cast<double>(z[e]));
    }
    const auto experts = trace.experts_of(trace.entries[entry]);
    const auto weights = trace.weights_of(trace.entries[entry]);
    for (std::size_t k = 0; k < experts.size(); ++k) {
      REQUIRE(static_cast<double>(weights[k]) ==
              Approx(std::exp(static_cast<double>(z[experts[k]])) / sum).epsilon(0.02));
    }
  }
  static_cast<void>(done(hestia(generate({"--record", file}))));
  CHECK(read_trace_logits(file).empty());
  check_complaint(hestia(generate({"--record", folder.path() / "trace.csv", "--record-logits"})), 2,
                  {"--record-logits", "trace.csv", "FILE.h5"});
  check_complaint(hestia(generate({"--record-logits"})), 2, {"--record-logits", "FILE.h5"});
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
  complains({"--expert-slots", "4", "--start", "prefil"}, {"--start", "prefil", "prefill"});
  complains({"--expert-slots", "4", "--start", "preload"}, {"--start preload", "--preload FILE"});
  complains({"--expert-slots", "4", "--preload", "x.h5"}, {"--preload", "--start cold"});
  complains({"--expert-slots", "4", "--preload-by", "nearest"}, {"--preload-by", "--start cold"});
  complains({"--prompt-tokens", "1,2"}, {"either --prompt TEXT or --prompt-tokens"});
  complains({"--pinned-memory", "8GB/s"}, {"--pinned-memory", "8GiB", "\"8GB/s\""});
  complains({"--pinned-memory", "1KiB"}, {"--pinned-memory", "16.0 KiB", "1.0 KiB"});
  complains({"--chat", "tullu"}, {"--chat", "\"tullu\"", "did you mean \"tulu\"", "chatml", "harmony"});
  complains({"--chat", "chatml"}, {"--chat", "<|im_start|>", "<|im_end|>"});
  complains({"--system", "Be brief."}, {"--system", "--chat"});
  complains({"--temperature", "-1"}, {"--temperature", "-1"});
  complains({"--top-p", "0"}, {"--top-p", "0"});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2"}, {"--residency-prior", "--router"});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2,logit"},
            {"--residency-prior", "--router", "by weight"});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2,weights"},
            {"--residency-prior", "logit, weight or root", "\"0.3,2,weights\""});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2,weight+mas"},
            {"--residency-prior", "+mass", "\"0.3,2,weight+mas\""});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,,weight"}, {"--residency-prior", "\"0.3,,weight\""});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,4,weight"},
            {"--residency-prior", "J must be below the model's experts per token (4), got 4"});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2,weight,1"},
            {"--residency-prior", "per MoE layer (6)", "got 1 in", "\"0.3,2,weight,1\""});
  complains({"--expert-slots", "4", "--residency-prior", "0.3,2,weight,1,1,-1,1,1,1"},
            {"--residency-prior", "\"0.3,2,weight,1,1,-1,1,1,1\""});
  complains({"--fold"}, {"--fold", "--replay"});
  for (const std::vector<std::string>& of_slots :
       std::vector<std::vector<std::string>>{{"--policy", "lfu"},
                                             {"--fetch", "waves"},
                                             {"--prefetch", "off"},
                                             {"--gamma", "0.5"},
                                             {"--start", "prefill"},
                                             {"--preload", "x.h5"},
                                             {"--residency-prior", "0.25,1,weight"}}) {
    complains(of_slots, {of_slots.front() + ": ", "--expert-slots"});
  }
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
  CHECK(prior["residency"] == Json{{"score", "weight"},
                                   {"lambda", 0.2},
                                   {"layer_factors", Json::array()},
                                   {"always_keep", 1},
                                   {"preserve_mass", false},
                                   {"scope", Json()}});
  CHECK(prior["cache"]["loads"] < plain["cache"]["loads"]);
  const Json root = Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", "0.2,1,root"}))));
  CHECK(root["residency"]["score"] == "root");
  CHECK(root["cache"]["loads"] < plain["cache"]["loads"]);
  const Json none = Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", "0,1,weight"}))));
  const auto under = [](const std::string& rule) {
    return Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", rule}))));
  };
  const Json doubled = under("0.1,1,weight,2,2,2,2,2,2");
  CHECK(doubled["residency"]["layer_factors"] == Json{2, 2, 2, 2, 2, 2});
  CHECK(doubled["tokens"] == prior["tokens"]);
  CHECK(doubled["cache"]["loads"] == prior["cache"]["loads"]);
  const Json preserved = under("0.2,1,weight+mass");
  CHECK(preserved["residency"]["preserve_mass"] == true);
  CHECK(under("0.2,1,weight+mass,0,0,0,0,0,0")["tokens"] == plain["tokens"]);
  const Json off = under("0.2,1,weight,0,0,0,0,0,0");
  CHECK(off["tokens"] == plain["tokens"]);
  CHECK(off["cache"]["loads"] == plain["cache"]["loads"]);
  const Json half = under("0.2,1,weight,1,1,1,0,0,0");
  CHECK(half["cache"]["loads"] > prior["cache"]["loads"]);
  CHECK(half["cache"]["loads"] < plain["cache"]["loads"]);
  CHECK(none["residency"].is_null());
  CHECK(none["tokens"] == plain["tokens"]);
  CHECK(none["cache"]["loads"] == plain["cache"]["loads"]);
}

TEST_CASE("generate's statistics name the residency rule that was served") {
  const auto statistics = [](const std::vector<std::string>& more) {
    std::vector<std::string> all = {"generate",     "--model", "checkpoints/tiny", "--prompt", "The kernel",
                                    "--max-tokens", "3",       "--device",         "cpu"};
    all.insert(all.end(), more.begin(), more.end());
    const Outcome outcome = hestia(all);
    static_cast<void>(done(outcome));
    for (const std::string& line : lines_of(outcome.err)) {
      if (line.find("residency") != std::string::npos) {
        return line;
      }
    }
    return std::string("(no line)");
  };
  CHECK_THAT(statistics({"--expert-slots", "5", "--residency-prior", "0.25,1,weight"}),
             Catch::EndsWith("  weight lambda 0.25, J 1"));
  CHECK_THAT(statistics({"--expert-slots", "5", "--residency-prior", "0.25,1,weight+mass"}),
             Catch::EndsWith("  weight lambda 0.25, mass preserved, J 1"));
  CHECK_THAT(statistics({"--expert-slots", "5", "--residency-prior", "0,1,weight"}), Catch::EndsWith("  none"));
  CHECK_THAT(statistics({}), Catch::EndsWith("  none"));
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

TEST_CASE("bench writes the arms that took turns as soon as they are measured, behind what is there") {
  const TemporaryFolder folder;
  const std::string output = folder.path() / "bench.jsonl";
  write_text_atomically(output, "{\"before\":1}\n");
  const std::vector<std::string> arguments = {"bench",
                                              "recipes/bench_olmoe.yaml",
                                              "model.path=checkpoints/tiny",
                                              "model.device=cpu",
                                              "--json",
                                              "replay.trace=\"\"",
                                              "replay.fold=false",
                                              "bench.slots=[all,\"6\"]",
                                              "output=" + output,
                                              "bench.prompt_tokens=[2]",
                                              "bench.repeats=1"};
  const auto run = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = arguments;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  {
    // Arms that end, then arms that would go on for hours.
    Program program(run({"bench.batch=[1,2]", "bench.new_tokens=[3,200]", "bench.repeats=100"}));
    REQUIRE(program.wait_for_stdout("\n"));
    REQUIRE(program.wait_for_stderr("weights are random"));
    program.signal(SIGKILL);
    CHECK(program.finish().code == 128 + SIGKILL);
  }
  std::vector<std::string> lines = lines_of(read_text_file(output));
  REQUIRE(lines.size() == 3);
  CHECK(lines[0] == "{\"before\":1}");
  for (std::size_t arm = 0; arm < 2; ++arm) {
    const Json row = Json::parse(lines[1 + arm]);
    CHECK(row["slots"] == (arm == 0 ? "all" : "6"));
    CHECK(row["batch"] == 1);
    CHECK(row["new_tokens"] == 3);
    CHECK(row.contains("rates_after"));
    CHECK(row["warnings"].size() == 2);  // random weights, no GPU
  }
  CHECK(read_text_file(output).back() == '\n');
  const std::string printed = done(hestia(run({"bench.new_tokens=[3]", "bench.batch=[1]"})));
  lines = lines_of(read_text_file(output));
  REQUIRE(lines.size() == 5);
  CHECK(lines[3] + "\n" + lines[4] + "\n" == printed);
}

TEST_CASE("bench pre-loads what statistics say, and counts what simulate counts") {
  const TemporaryFolder folder;
  const std::string trace_file = folder.path() / "trace.csv";
  static_cast<void>(done(hestia(generate({"--record", trace_file}))));
  const std::string file = preferences_of_tiny(folder, 5, 8);
  const auto bench = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = {"bench",
                                    "recipes/bench_olmoe.yaml",
                                    "--json",
                                    "model.path=checkpoints/tiny",
                                    "model.device=cpu",
                                    "output=\"\"",
                                    "replay.trace=" + trace_file,
                                    "replay.fold=false",
                                    "bench.slots=[all,\"7\",\"total:50\"]",
                                    "bench.policies=[lru,lfu]",
                                    "bench.prompt_tokens=[3]",
                                    "bench.new_tokens=[24]",
                                    "bench.repeats=1"};
    all.insert(all.end(), more.begin(), more.end());
    return lines_of(done(hestia(all)));
  };
  const std::vector<std::string> lines = bench({"bench.start=preload", "preload.file=" + file});
  REQUIRE(lines.size() == 5);
  CHECK(Json::parse(lines[0])["preload"].is_null());  // all resident: there is nothing to begin with
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const Json row = Json::parse(lines[i]);
    CAPTURE(lines[i]);
    CHECK(row["start"] == "preload");
    CHECK(row["preload"] ==
          Json{{"by", "aggregate"}, {"file", file}, {"router", "baseline"}, {"sequence", {}}, {"similarity", {}}});
    if (row["slots"] != "7") {
      CHECK(row["loads_per_step_and_layer"].get<double>() > 0.0);
      continue;
    }
    const Json simulated =
        Json::parse(done(hestia({"simulate", trace_file, "--policy", row["policy"].get<std::string>(), "--slots", "7",
                                 "--start", "preload", "--preload", file, "--preload-router", "baseline", "--json"})));
    CHECK(simulated["loads"].get<std::int64_t>() > 0);
    CHECK(row["loads_per_step_and_layer"].get<double>() ==
          Approx(simulated["loads"].get<double>() / (23 * 6)).epsilon(1e-12));
    CHECK(row["hit_rate"].get<double>() == Approx(simulated["hit_rate"].get<double>()).epsilon(1e-12));
  }
  const Json cold = Json::parse(bench({})[1]);
  CHECK(cold["preload"].is_null());
  CHECK(cold["hit_rate"] != Json::parse(lines[1])["hit_rate"]);
}

TEST_CASE("the decoding document names every key of a bench recipe, of its rows and of what generate prints") {
  const TemporaryFolder folder;
  const std::string file = preferences_of_tiny(folder, 3, 8);
  const std::string text = read_text_file(std::filesystem::path(HESTIA_SOURCE_DIR) / "docs/decoding.md");
  const std::size_t first = text.find("Keys of a bench recipe");
  REQUIRE(first != std::string::npos);
  const std::string tables = text.substr(first, text.find("## Measured") - first);
  const std::size_t rows = tables.find("Each arm is one JSON line");
  const std::size_t object = tables.find("`hestia generate --json`");
  REQUIRE(rows < object);
  REQUIRE(object != std::string::npos);
  const auto named = [](const std::string& part, const std::string& key) {
    CAPTURE(key);
    CHECK(part.find("`" + key + "`") != std::string::npos);
  };
  std::size_t keys = 0;
  for (const std::string& line : lines_of(done(hestia({"validate", "--help-keys", "bench"})))) {
    const std::string key = line.substr(0, line.find(' '));
    if (key.empty() || key == "task" || key == "recipe_version") {
      continue;
    }
    ++keys;
    named(tables.substr(0, rows), key.starts_with("bench.") ? key.substr(6) : key);
  }
  CHECK(keys > 20);
  const Json row =
      Json::parse(lines_of(done(hestia({"bench", "recipes/bench_olmoe.yaml", "--json", "model.path=checkpoints/tiny",
                                        "model.device=cpu", "output=\"\"", "replay.trace=\"\"", "replay.fold=false",
                                        "bench.slots=[\"7\"]", "bench.prompt_tokens=[2]", "bench.new_tokens=[3]",
                                        "bench.repeats=1", "bench.start=preload", "preload.file=" + file})))
                      .at(0));
  const std::string of_rows = tables.substr(rows, object - rows);
  for (const Json& part : {row, row["preload"], row["rates_before"]}) {
    for (const auto& [key, value] : part.items()) {
      named(of_rows, key);
    }
  }
  const Json json = Json::parse(done(hestia(generate({"--expert-slots", "5", "--residency-prior", "0.2,1,weight"}))));
  for (const Json& part : {json, json["cache"], json["residency"]}) {
    for (const auto& [key, value] : part.items()) {
      named(tables.substr(object), key);
    }
  }
}

TEST_CASE("bench and validate say what a preload lacks, with the recipe's line") {
  const TemporaryFolder folder;
  const std::string file = preferences_of_tiny(folder, 3, 0);
  const std::string missing = folder.path() / "missing.h5";
  const std::string config = read_text_file(std::filesystem::path(HESTIA_SOURCE_DIR) / "checkpoints/tiny/config.json");
  write_text_atomically(folder.path() / "config.json", replaced(config, "\"num_experts\": 32", "\"num_experts\": 16"));
  const auto complains = [&](int code, const std::vector<std::string>& more, const std::vector<std::string>& parts) {
    for (const char* verb : {"bench", "validate"}) {
      std::vector<std::string> all = {verb,
                                      "recipes/bench_olmoe.yaml",
                                      "model.path=checkpoints/tiny",
                                      "replay.trace=\"\"",
                                      "replay.fold=false",
                                      "bench.slots=[\"6\"]"};
      all.insert(all.end(), more.begin(), more.end());
      check_complaint(hestia(all), code, parts);
    }
  };
  const std::string from = "preload.file=" + file;
  complains(2, {"bench.start=preload"}, {"bench.start=preload on the command line", "preload.file", "preferences.h5"});
  complains(3, {"bench.start=preload", "preload.file=" + missing}, {"preload.file=" + missing, "on the command line"});
  complains(2, {from}, {"preload.file", "only serves bench.start preload", "got cold"});
  complains(2, {"preload.router=tuned"}, {"preload.router", "only serves bench.start preload"});
  complains(2, {"preload.by=nearest"}, {"preload.by", "only serves bench.start preload"});
  complains(2, {"bench.start=preload", from, "preload.by=nearest"}, {"preload.by", "random tokens", "got nearest"});
  complains(2, {"bench.start=preload", from, "preload.by=predictor"}, {"preload.by", "got predictor"});
  complains(2, {"bench.start=preload", from, "preload.by=nearst"}, {"preload.by", "nearst", "aggregate"});
  complains(2, {"bench.start=preload", from, "preload.router=base"}, {"preload.router", "base", "tuned"});
  complains(2, {"bench.start=preload", from, "model.path=" + folder.path().string()},
            {"preload.file", file, "16 experts of the model", "got 32"});
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
  complains({"bench.prefetch=[]"}, {"bench.prefetch", "at least one"});
  complains({"bench.start=full", "bench.slots=[\"4\"]"}, {"bench.start", "32"});
  complains({"bench.slot=[all]"}, {"bench.slot", "bench.slots"});
  complains({"bench.expert_formats=[int5]"}, {"bench.expert_formats", "int5", "int4"});
  complains({"bench.expert_formats=[]"}, {"bench.expert_formats", "at least one"});
  complains({"bench.expert_formats=[bf16,int8]", "model.dtype=float32"}, {"bench.expert_formats", "int8", "float32"});
}

TEST_CASE("bench names the recipe's line of what is not there, and leaves nothing behind") {
  const TemporaryFolder folder;
  const std::string recipe = folder.path() / "bench.yaml";
  const auto complains = [&](int code, const std::string& key, const std::string& value,
                             std::vector<std::string> parts) {
    std::map<std::string, std::string> values = {{"output", folder.path() / "runs/bench.jsonl"},
                                                 {"path", "checkpoints/tiny"},
                                                 {"device", "cpu"},
                                                 {"slots", "[all, \"6\"]"},
                                                 {"batch", "[1]"},
                                                 {"new_tokens", "[3]"},
                                                 {"trace", "\"\""}};
    values[key] = value;
    write_text_atomically(
        recipe, "recipe_version: 1\ntask: bench\noutput: " + values["output"] + "\nmodel:\n  path: " + values["path"] +
                    "\n  weights: random\n  device: " + values["device"] + "\nbench:\n  slots: " + values["slots"] +
                    "\n  batch: " + values["batch"] + "\n  new_tokens: " + values["new_tokens"] +
                    "\n  prompt_tokens: [2]\n  repeats: 1\nreplay:\n  trace: " + values["trace"] + "\n");
    const std::map<std::string, int> lines = {{"output", 3}, {"path", 5},        {"device", 7}, {"slots", 9},
                                              {"batch", 10}, {"new_tokens", 11}, {"trace", 15}};
    parts.push_back("bench.yaml:" + std::to_string(lines.at(key)));
    const Outcome outcome = hestia({"bench", recipe});
    CHECK(outcome.code == code);
    CAPTURE(key, value, outcome.err);
    for (const std::string& part : parts) {
      CHECK_THAT(outcome.err, Catch::Contains(part));
    }
    CHECK(outcome.out.empty());
    CHECK_FALSE(std::filesystem::exists(folder.path() / "runs"));
  };
  const std::string missing = folder.path() / "missing";
  complains(3, "trace", missing + ".csv", {"replay.trace", missing, "No such file"});
  complains(3, "path", missing, {"model.path", missing, "No such file"});
  complains(2, "device", "tpu", {"model.device", "tpu"});
  complains(2, "slots", "[\"0\"]", {"bench.slots", "from 1 to 32"});
  complains(2, "slots", "[]", {"bench.slots", "at least one"});
  complains(2, "batch", "[0]", {"bench.batch", "got 0"});
  complains(2, "batch", "[1, 33]", {"bench.batch", "32", "got 33"});
  complains(2, "new_tokens", "[3, 4095]", {"bench.new_tokens", "reaches 4096", "4095 more"});
  complains(1, "output", recipe + "/bench.jsonl", {"output", recipe + "/bench.jsonl", "Not a directory"});
  complains(1, "output", folder.path(), {"output", "Is a directory"});
}

}  // namespace
}  // namespace hestia::testing
