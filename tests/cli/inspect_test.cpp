#include <cstring>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/routing/preferences.hpp"
#include "hestia/routing/trace.hpp"
#include "tests/unit/routing/routing_fixtures.hpp"

namespace hestia::testing {
namespace {

const std::string kSmallModel = HESTIA_SOURCE_DIR "/tests/parity/goldens/hub_plain";

// A safetensors file put together by hand, so that it may be wrong.
std::string safetensors(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t size = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &size, 8);
  file += header;
  SplitMix64 random(5);
  for (std::size_t i = 0; i < data_bytes; ++i) {
    file += static_cast<char>(random.below(256));
  }
  return file;
}

TEST_CASE("inspect tells what a model directory holds") {
  const Outcome outcome = hestia({"inspect", "checkpoints/tiny"});
  const std::string out = done(outcome);
  CHECK(outcome.err.empty());
  CHECK_THAT(out, Catch::Contains("checkpoints/tiny: model directory") && Catch::Contains("olmoe") &&
                      Catch::Contains("32 per layer, 4 per token") && Catch::Contains("6 (6 with experts)") &&
                      Catch::Contains("model.layers.0.mlp.gate.weight"));
  // 22 slots: (16 MiB - 5.1 MiB dense) / (84 KiB x 6 layers)
  CHECK_THAT(done(hestia({"inspect", "checkpoints/tiny", "--memory", "16MiB"})), Catch::Contains("22 of 32 per layer"));
  CHECK_THAT(done(hestia({"inspect", "checkpoints/tiny", "--memory", "16MiB"})),
             Catch::Contains("slots in 16MiB, int4") && Catch::Contains("packed, per expert"));
  CHECK_THAT(done(hestia({"inspect", "checkpoints/tiny", "--memory", "1GiB"})), Catch::Contains("32 of 32 per layer"));
  CHECK_THAT(done(hestia({"inspect", "checkpoints/tiny", "--memory", "5MiB"})), Catch::Contains("do not fit"));
  for (const char* wrong : {"-5GiB", "16 apples", "nan"}) {
    INFO(wrong);
    check_complaint(hestia({"inspect", "checkpoints/tiny", "--memory", wrong}), 2, {"--memory", wrong, "6GiB"});
  }
  check_complaint(hestia({"inspect", "recipes/quickstart.yaml", "--memory", "1GiB"}), 2, {"model directories"});
}

TEST_CASE("inspect tells what a file holds") {
  const TemporaryFolder folder;
  CHECK_THAT(
      done(hestia({"inspect", kSmallModel + "/golden.safetensors"})),
      Catch::Contains("router_logits") && Catch::Contains("F32 [") && Catch::Contains("metadata golden_version"));
  const std::string resolved = done(hestia({"inspect", "recipes/quickstart.yaml"}));
  CHECK_THAT(resolved, Catch::Contains("recipe_version: 1\n") && Catch::Contains("task: finetune\n"));
  // Resolved: defaults stand in it too, and it is a recipe again.
  CHECK_THAT(resolved, Catch::Contains("warmup_steps: 10\n") && Catch::Contains("beta2: 0.999\n"));
  const std::string saved = (folder.path() / "resolved.yaml").string();
  write_text_atomically(saved, resolved);
  CHECK(done(hestia({"inspect", saved})) == resolved);
  CHECK(done(hestia({"validate", "--no-files", saved})) == saved + ": OK\n");

  SplitMix64 random(31);
  const RoutingTrace trace = random_trace(random, TraceShape{});
  for (const char* name : {"trace.csv", "trace.h5"}) {
    const std::string path = (folder.path() / name).string();
    std::string(name) == "trace.csv" ? write_trace_csv(path, trace) : write_trace_hdf5(path, trace);
    CHECK_THAT(done(hestia({"inspect", path})),
               Catch::Contains(path + ": routing trace") && Catch::Contains("12 per layer, 3 per token") &&
                   Catch::Contains("random model") && Catch::Contains(std::to_string(trace.entries.size())));
  }
}

TEST_CASE("inspect reads preference statistics") {
  const TemporaryFolder folder;
  SplitMix64 random(32);
  const std::string path = (folder.path() / "preferences.h5").string();
  PreferenceWriterOptions options;
  options.max_sequences = 3;
  PreferenceWriter writer(path, 2, 6, {0, 1}, options);
  for (std::int64_t id = 0; id < 5; ++id) {
    SequenceRouting routing;
    routing.id = id;
    routing.task = "words";
    routing.num_prompt_tokens = 1;
    routing.num_tokens = 4;
    routing.num_layers = 2;
    routing.num_experts = 6;
    routing.top_k = 2;
    for (int step = 0; step < 2 * 4; ++step) {
      for (const std::uint16_t expert : random_experts(random, 6, 2)) {
        routing.selected.push_back(expert);
        routing.weights.push_back(0.5F);
      }
    }
    for (int i = 0; i < 2 * 4 * 6; ++i) {
      routing.probabilities.push_back(1.0F / 6.0F);
    }
    writer.add(routing, routing);
  }
  writer.close();
  CHECK(lines_of(done(hestia({"inspect", path}))) ==
        std::vector<std::string>{path + ": expert preferences", "  sequences        5", "  kept one by one  3",
                                 "  layers           2", "  experts          6"});
  const std::string whole = read_text_file(path);
  write_text_atomically(path, whole.substr(0, whole.size() / 2));
  check_complaint(hestia({"inspect", path}), 3, {path});
  write_text_atomically(path, "not HDF5 at all\n");
  check_complaint(hestia({"inspect", path}), 3, {path});
}

TEST_CASE("inspect says what it looked for") {
  const TemporaryFolder folder;
  const std::string empty = folder.path().string();
  check_complaint(hestia({"inspect", empty + "/absent"}), 3, {empty + "/absent", "no such file", "check the path"});
  check_complaint(hestia({"inspect", empty}), 3, {empty, "config.json", "manifest.json", "recipe.yaml"});
  write_text_atomically(empty + "/notes.txt", "hello\n");
  check_complaint(hestia({"inspect", empty + "/notes.txt"}), 3,
                  {empty + "/notes.txt:1", "not a routing trace", "hello"});
  write_text_atomically(empty + "/wrong.yaml", "recipe_version: 1\ntask: finetune\nrun_dirr: a\n");
  check_complaint(hestia({"inspect", empty + "/wrong.yaml"}), 2,
                  {"wrong.yaml:3", "run_dirr", "did you mean \"run_dir\"?"});
}

TEST_CASE("a damaged safetensors file is named, with what is wrong in it, by inspect and logits") {
  const TemporaryFolder folder;
  const std::filesystem::path model = folder.path() / "model";
  std::filesystem::create_directories(model);
  std::filesystem::copy_file(kSmallModel + "/config.json", model / "config.json");
  const std::string path = (model / "model.safetensors").string();
  const std::string whole = read_text_file(kSmallModel + "/model.safetensors");
  const std::string header = R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)";
  std::string huge = safetensors("{}", 0);
  huge[7] = '\x10';
  struct Damage {
    std::string content;
    std::string message;
  };
  const std::vector<Damage> damages = {
      {whole.substr(0, whole.size() - 1000), "truncated"},
      {whole.substr(0, 500), "truncated"},
      {"", "not a safetensors file"},
      {huge, "header may take 100000000 bytes at most"},
      {safetensors("{\"a\":", 0), "not valid JSON"},
      {safetensors(header + R"("b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})", 20), "overlap at byte 12"},
      {safetensors(header + R"("b":{"dtype":"F32","shape":[2],"data_offsets":[20,28]}})", 28), "belong to no tensor"},
      {safetensors(header + R"("b":{"dtype":"F33","shape":[2],"data_offsets":[16,24]}})", 24), "dtype, got \"F33\""},
      {safetensors(header + R"("b":{"dtype":"F32","shape":[-2],"data_offsets":[16,24]}})", 24), "not a size, got -2"},
      {safetensors(header + R"("b":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[16,24]}})", 24),
       "overflows"},
  };
  const auto logits = [&] {
    return hestia({"logits", model.string(), "--tokens", "1,2", "--output", (folder.path() / "o").string()});
  };
  for (std::size_t i = 0; i < damages.size(); ++i) {
    INFO(damages[i].message);
    write_text_atomically(path, damages[i].content);
    const Outcome inspected = hestia({"inspect", path});
    check_complaint(inspected, 3, {path, damages[i].message, "fetch or write the file again"});
    if (i % 5 == 0) {  // The same reader: some are enough to see that a model directory leads there too.
      CHECK(logits().err == inspected.err);
    }
  }
  // Whole files that do not belong together.
  write_text_atomically(path, safetensors(R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", 16));
  check_complaint(logits(), 3, {"\"model.embed_tokens.weight\"", "is missing", "\"a\" [2, 2] is not part of"});
  check_complaint(hestia({"inspect", model.string()}), 3, {"\"model.embed_tokens.weight\" is missing"});
  std::filesystem::remove(path);
  check_complaint(hestia({"inspect", model.string()}), 3, {model.string(), "neither model.safetensors nor"});
  write_text_atomically(path, whole);
  done(hestia({"inspect", model.string()}));
  CHECK_FALSE(std::filesystem::exists(folder.path() / "o"));
}

TEST_CASE("a wrong config.json is reported in full") {
  const TemporaryFolder folder;
  const std::string config = read_text_file(kSmallModel + "/config.json");
  const std::string path = (folder.path() / "config.json").string();
  std::filesystem::copy_file(kSmallModel + "/model.safetensors", folder.path() / "model.safetensors");
  write_text_atomically(path, replaced(config, "\"olmoe\"", "\"olmo-next\""));
  check_complaint(hestia({"inspect", folder.path().string()}), 3, {path, "olmo-next", "olmoe"});
  write_text_atomically(path, config.substr(0, config.size() / 2));
  check_complaint(hestia({"inspect", folder.path().string()}), 3, {path + ":", "not valid JSON"});
}

}  // namespace
}  // namespace hestia::testing
