#include <csignal>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/routing/preferences.hpp"

namespace hestia::testing {
namespace {

bool exists(const SmallProject& project, const std::string& name) {
  return std::filesystem::exists(project.path() / name);
}

std::vector<std::string> keys_of(const Json& object) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) {
    keys.push_back(key);
  }
  return keys;
}

TEST_CASE("pretrain leaves a model, its tokenizer and a report") {
  const SmallProject project;
  CHECK(done(project.run({"validate", "pretrain.yaml"})) == "pretrain.yaml: OK\n");
  const Outcome outcome = project.run({"pretrain", "pretrain.yaml"});
  CHECK(done(outcome).empty());
  for (const char* part : {"Recipe\n", "Model\n", "Data\n", "Plan\n", "step 6/6 | loss ", "load_balance", "eval 6/6 | ",
                           "letters ppl ", "colours ppl "}) {
    CHECK_THAT(outcome.err, Catch::Contains(part));
  }
  for (const char* name : {"recipe.yaml", "metrics.jsonl", "report.json", "tokenizer.model", "checkpoints/step_6/DONE",
                           "model/config.json", "model/model.safetensors", "model/tokenizer.model"}) {
    INFO(name);
    CHECK(exists(project, std::string("runs/base/") + name));
  }
  const Json report = read_json_file(project.path() / "runs/base/report.json");
  CHECK(report.at("steps") == 6);
  CHECK(keys_of(report.at("held_out")) == std::vector<std::string>{"letters", "colours"});
  CHECK(report.at("held_out").at("letters").at("bits_per_byte").get<double>() > 0.0);
  CHECK_THAT(done(project.run({"inspect", "runs/base/model"})),
             Catch::Contains("8 per layer, 2 per token") && Catch::Contains(" 320\n"));
  CHECK_THAT(done(project.run({"inspect", "runs/base"})),
             Catch::Contains("pretrain") && Catch::Contains("runs/base/checkpoints/step_6"));
  done(project.run({"logits", "runs/base/model", "--tokens", "1,319", "--output", "out.safetensors"}));
  CHECK(SafetensorsFile(project.path() / "out.safetensors").tensor("router_logits").shape ==
        std::vector<std::int64_t>{2, 2, 8});
  // Not over an earlier run, unless asked to.
  check_complaint(project.run({"pretrain", "pretrain.yaml"}), 2, {"runs/base", "--overwrite"});
  const std::string weights = project.read("runs/base/model/model.safetensors");
  done(project.run({"pretrain", "pretrain.yaml", "--overwrite", "--quiet"}));
  CHECK(project.read("runs/base/model/model.safetensors") == weights);  // the same seed
  // A tuning run in the same folder keeps the model that it tunes, and pretraining the tokenizer that it is given.
  done(project.run(
      {"finetune", "finetune.yaml", "run_dir=runs/base", "control.enabled=false", "--overwrite", "--quiet"}));
  CHECK(project.read("runs/base/model/model.safetensors") == weights);
  check_complaint(
      project.run({"pretrain", "pretrain.yaml", "--overwrite", "tokenizer.path=runs/base/model/tokenizer.model"}), 2,
      {"tokenizer.path lies in the model that --overwrite removes", "copy it first"});
  CHECK(exists(project, "runs/base/model/tokenizer.model"));
  // A run that replaces it and fails leaves no model that could be taken for its own.
  CHECK(project
            .run({"pretrain", "pretrain.yaml", "train.learning_rate=10", "train.clip_norm=0",
                  "losses.load_balance.weight=1e38", "train.steps=40", "--overwrite", "--quiet"})
            .code == 1);
  CHECK_FALSE(exists(project, "runs/base/model"));
  CHECK_FALSE(exists(project, "runs/base/report.json"));
  // What the family cannot do is said before any step.
  check_complaint(project.run({"pretrain", "pretrain.yaml", "architecture.family=phimoe", "train.router_gradient=all",
                               "run_dir=runs/phi", "--quiet"}),
                  2, {"train.router_gradient=all", "train.router_gradient must be chosen for phimoe"});
  CHECK_FALSE(exists(project, "runs/phi/checkpoints"));
}

TEST_CASE("labels of one domain alone are learned, in the tuned run and in its control") {
  const SmallProject project;
  project.pretrain();
  // Loss and counted NLL of the first step: before anything has moved, both runs are the base model's.
  const auto first_step = [&](const std::string& folder) {
    Json first;
    read_json_lines(project.path() / folder / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "step" && first.is_null()) {
        first = event;
      }
    });
    return first;
  };
  std::vector<std::string> words = {"finetune",
                                    "finetune.yaml",
                                    "data.train=[letters,colours]",
                                    "train.rows_per_batch=6",
                                    "train.steps=1",
                                    "losses.logit_distillation.weight=1",
                                    "--overwrite",
                                    "--quiet"};
  done(project.run(words));
  const Json all = first_step("runs/tuned");
  CHECK(first_step("runs/tuned/control").at("nll") == all.at("nll"));
  words.insert(words.begin() + 2, "losses.nll.domains=[colours]");
  done(project.run(words));
  const Json colours = first_step("runs/tuned");
  CHECK(colours.at("nll") != all.at("nll"));
  CHECK(colours.at("reuse") == all.at("reuse"));
  CHECK(first_step("runs/tuned/control").at("nll") == colours.at("nll"));
  CHECK(done(project.run({"validate", "--no-files", "runs/tuned/control/recipe.yaml"})) ==
        "runs/tuned/control/recipe.yaml: OK\n");
}

TEST_CASE("finetune, export and evaluate, one after the other") {
  const SmallProject project;
  project.pretrain();
  CHECK(done(project.run({"validate", "finetune.yaml"})) == "finetune.yaml: OK\n");

  // Too early: each says what comes first.
  check_complaint(project.run({"export", "finetune.yaml"}), 2,
                  {"runs/tuned", "0 of 6 steps", "`hestia finetune finetune.yaml`"});
  check_complaint(project.run({"export", "finetune.yaml", "data.evaluate=[letters, colours]"}), 2,
                  {"`hestia finetune finetune.yaml 'data.evaluate=[letters, colours]'`"});
  check_complaint(project.run({"evaluate", "finetune.yaml", "--only", "baseline", "--bundle", "runs/none"}), 2,
                  {"--only baseline measures the model itself, got --bundle"});
  check_complaint(project.run({"evaluate", "finetune.yaml"}), 3,
                  {"runs/tuned/bundle", "no router bundle", "`hestia export finetune.yaml`"});

  const Outcome tuned = project.run({"finetune", "finetune.yaml"});
  CHECK(done(tuned).empty());
  for (const char* part : {"| cache_simulation ", "| rank_matching ", "| reuse ", "| trust ", "step 6/6 | loss ",
                           "control: plain NLL tuning", "letters ppl "}) {
    CHECK_THAT(tuned.err, Catch::Contains(part));
  }
  // The line shows what trains, the file below everything.
  CHECK_THAT(tuned.err, !Catch::Contains("| smooth ") && !Catch::Contains("| load_balance "));
  for (const char* folder : {"runs/tuned/", "runs/tuned/control/"}) {
    INFO(folder);
    for (const char* name : {"recipe.yaml", "metrics.jsonl", "checkpoints/step_6/DONE", "checkpoints/step_6/state.json",
                             "checkpoints/step_6/router.safetensors", "checkpoints/step_6/optimizer.safetensors"}) {
      INFO(name);
      CHECK(exists(project, std::string(folder) + name));
    }
    std::vector<std::int64_t> steps;
    read_json_lines(project.path() / folder / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "step") {
        steps.push_back(event.at("step").get<std::int64_t>());
        for (const char* key : {"loss", "nll", "cache_simulation", "rank_matching", "reuse", "trust", "smooth", "lag",
                                "working_set", "router_entropy", "temporal_dot", "gate_consistency", "chunk_union",
                                "load_balance", "learning_rate", "gradient_norm"}) {
          CHECK(event.contains(key));
        }
      }
    });
    CHECK(steps == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6});
  }
  // The saved recipe is whole, and what was run.
  CHECK(done(project.run({"inspect", "finetune.yaml"})) == project.read("runs/tuned/recipe.yaml"));
  const std::string router = project.read("runs/tuned/checkpoints/step_6/router.safetensors");
  CHECK(router != project.read("runs/tuned/control/checkpoints/step_6/router.safetensors"));

  check_complaint(project.run({"finetune", "finetune.yaml"}), 2,
                  {"runs/tuned: holds a run already (step 6", "--resume", "--overwrite", "run_dir"});
  CHECK_THAT(project.run({"finetune", "finetune.yaml", "--resume"}).err, Catch::Contains("done already"));
  check_complaint(project.run({"export", "finetune.yaml", "--to", "onnx"}), 2,
                  {"--to must be one of bundle, hf", "onnx"});
  check_complaint(project.run({"export", "finetune.yaml", "train.steps=9", "--quiet"}), 2,
                  {"train.steps=9", "the run in runs/tuned is one of 6 steps, got 9", "or runs/tuned in its place"});
  check_complaint(project.run({"evaluate", "finetune.yaml", "train.steps=9", "--checkpoint", "--quiet"}), 2,
                  {"the run in runs/tuned is one of 6 steps, got 9"});

  const Outcome exported = project.run({"export", "finetune.yaml"});
  CHECK(done(exported) == "runs/tuned/bundle\n");
  const Json manifest = read_json_file(project.path() / "runs/tuned/bundle/manifest.json");
  CHECK(keys_of(manifest) == std::vector<std::string>{"kind", "format_version", "model_family", "model_path",
                                                      "architecture", "base_router_hash", "router_hash", "top_k",
                                                      "adapters", "residency", "metrics", "recipe"});
  CHECK(manifest.at("kind") == "hestia router bundle");
  CHECK(manifest.at("format_version") == 2);
  CHECK(manifest.at("model_path") == "runs/base/model");
  CHECK(manifest.at("base_router_hash").get<std::string>().size() == 64);
  CHECK(manifest.at("base_router_hash") != manifest.at("router_hash"));
  CHECK(keys_of(manifest.at("residency")) ==
        std::vector<std::string>{"format_version", "score", "lambda", "layer_factors", "always_keep", "preserve_mass",
                                 "slots", "policy", "calibration", "logit_range", "scope"});
  CHECK(manifest.at("residency").at("slots") == 2);
  CHECK(manifest.at("residency").at("logit_range").size() == 2);
  CHECK(manifest.at("recipe") == project.read("runs/tuned/recipe.yaml"));
  for (const char* arm : {"baseline", "tuned"}) {
    CHECK(manifest.at("metrics").at(arm).at("nll").get<double>() > 0.0);
    CHECK(manifest.at("metrics").at(arm).at("lru_loads_per_token_layer").get<double>() > 0.0);
  }
  CHECK(project.read("runs/tuned/bundle/router.safetensors") == router);
  const SafetensorsFile routers(project.path() / "runs/tuned/bundle/router.safetensors");
  CHECK(routers.names().size() == 2);
  CHECK(routers.tensor("model.layers.1.mlp.gate.weight").dtype == DType::kF32);
  CHECK(routers.tensor("model.layers.1.mlp.gate.weight").shape == std::vector<std::int64_t>{8, 16});
  const PreferenceReader preferences(project.path() / "runs/tuned/bundle/preferences.h5");
  CHECK(preferences.num_sequences_total() >= 9);
  CHECK(preferences.num_stored() == 9);  // export.max_sequences
  CHECK(preferences.layers() == std::vector<std::int64_t>{0, 1});
  CHECK_FALSE(preferences.predictor().has_value());
  const PreferenceAggregate base_preferences = preferences.aggregate(PreferenceRouter::kBaseline);
  const PreferenceAggregate tuned_preferences = preferences.aggregate(PreferenceRouter::kTuned);
  CHECK(base_preferences.count.size() == 2 * 8);
  CHECK(base_preferences.count != tuned_preferences.count);
  // Both routers saw the same tokens.
  CHECK(std::accumulate(base_preferences.count.begin(), base_preferences.count.end(), std::int64_t{0}) ==
        std::accumulate(tuned_preferences.count.begin(), tuned_preferences.count.end(), std::int64_t{0}));
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/bundle"})),
             Catch::Contains("router bundle") && Catch::Contains("2 routers") && Catch::Contains("2 slots, lru") &&
                 Catch::Contains("9 kept one by one"));

  const Outcome evaluated = project.run({"evaluate", "finetune.yaml"});
  const std::string table = done(evaluated);
  for (const char* part : {"domain", "router", "letters*", "colours", "baseline", "nll control", "tuned", "1 slots",
                           "2 slots", "4 slots", "lru", "belady", "loads ", "against plain NLL tuning"}) {
    CHECK_THAT(table, Catch::Contains(part));
  }
  CHECK_THAT(evaluated.err, Catch::Contains("runs/tuned/results.json") && !Catch::Contains("letters*"));
  const std::vector<std::string> lines = lines_of(table);
  REQUIRE(lines.size() > 8);
  for (std::size_t i = 1; i < 8; ++i) {  // the heads, then three arms of two domains
    CHECK(lines[i].size() == lines[0].size());
  }
  Json results = read_json_file(project.path() / "runs/tuned/results.json");
  CHECK(keys_of(results) == std::vector<std::string>{"format_version", "kind", "version", "commit", "machine",
                                                     "command", "device", "seconds", "degradations", "model", "split",
                                                     "bundle", "note", "arms", "delta"});
  CHECK(results.at("command") == "hestia evaluate finetune.yaml");
  CHECK(results.at("degradations").empty());
  REQUIRE(results.at("arms").size() == 3);
  for (const Json& arm : results.at("arms")) {
    REQUIRE(arm.at("domains").size() == 2);
    for (const Json& domain : arm.at("domains")) {
      CHECK(domain.at("cache").size() == 2 * 3);
      CHECK(domain.at("segment_routing_best_performance").size() == 2);
      CHECK(domain.at("segment_cache_hit_rate").size() == 2 * 3);
      for (const char* key : {"kendall_tau", "top_k_agreement"}) {
        CHECK(domain.at(key).is_null() == (arm.at("name") == "baseline"));
        CHECK((domain.at(key).is_null() || (domain.at(key) > 0.5 && domain.at(key) <= 1.0)));
      }
      CHECK(domain.at("tokens").get<std::int64_t>() > 100);
    }
  }
  CHECK(results.at("arms")[0].at("router_hash") == manifest.at("base_router_hash"));
  CHECK(results.at("arms")[2].at("router_hash") == manifest.at("router_hash"));
  CHECK(results.at("arms")[2].at("name") == "tuned");

  // The same again, as JSON, from the run directory, which somebody moved.
  std::filesystem::rename(project.path() / "runs/tuned", project.path() / "runs/moved");
  const Outcome again = project.run({"evaluate", "runs/moved", "evaluate.slots=[2]", "--json", "--quiet"});
  Json printed = Json::parse(done(again));
  CHECK(printed == read_json_file(project.path() / "runs/moved/results.json"));
  CHECK_THAT(printed.at("command").get<std::string>(),
             Catch::Contains("runs/moved/recipe.yaml") && Catch::Contains("'evaluate.slots=[2]'"));
  CHECK_FALSE(exists(project, "runs/tuned"));
  for (std::size_t arm = 0; arm < 3; ++arm) {
    for (std::size_t domain = 0; domain < 2; ++domain) {
      const Json& now = printed.at("arms")[arm].at("domains")[domain];
      const Json& before = results.at("arms")[arm].at("domains")[domain];
      CHECK(now.at("nll") == before.at("nll"));
      CHECK(now.at("cache").size() == 2);
      CHECK(now.at("cache")[0] == before.at("cache")[2]);
    }
  }
  for (const Json& arm : printed.at("arms")) {
    for (const Json& domain : arm.at("domains")) {  // a quarter of the experts, unless the recipe says otherwise
      REQUIRE(domain.at("static_set").size() == 1);
      CHECK(domain.at("static_set")[0].at("experts") == 2);
      CHECK(domain.at("static_set")[0].at("share") < 1.0);
      CHECK(domain.at("static_set")[0].at("perplexity").get<double>() > 1.0);
    }
  }
  CHECK_THAT(table, Catch::Contains("ppl@2"));

  // Letters have no prompts: the predictor wants to be told which tokens are one.
  check_complaint(
      project.run({"export", "runs/moved", "export.predictor.enabled=true", "--quiet"}), 2,
      {"export.predictor.enabled=true on the command line", "no text of data.train has one", "export.prompt_tokens"});
  check_complaint(project.run({"export", "runs/moved", "--output", "predicting", "--quiet", "export.prompt_tokens=8",
                               "export.predictor.enabled=true", "export.predictor.embeddings=none.safetensors"}),
                  3, {"none.safetensors"});
  CHECK_FALSE(exists(project, "predicting"));
  check_complaint(project.run({"export", "runs/moved", "--output", "predicting", "--quiet", "export.prompt_tokens=8",
                               "export.predictor.enabled=true", "export.predictor.slots=[99]"}),
                  2, {"export.predictor.slots=[99] on the command line", "(8)", "got 99"});
  CHECK_FALSE(exists(project, "predicting"));
  CHECK_FALSE(exists(project, "predicting/preferences.h5"));
  CHECK_FALSE(exists(project, "predicting/manifest.json"));
  const Outcome predicting =
      project.run({"export", "runs/moved", "--output", "predicting", "--quiet", "export.prompt_tokens=8",
                   "export.write_prompts=true", "export.predictor.enabled=true", "export.predictor.hidden_size=8"});
  CHECK(done(predicting) == "predicting\n");
  CHECK_THAT(predicting.err, Catch::Contains("Preference predictor") && Catch::Contains("mean_popularity"));
  const Json predictor = read_json_file(project.path() / "predicting/manifest.json").at("predictor");
  CHECK(predictor.at("embedding_size") == 16);
  CHECK(predictor.at("methods").size() == 5);
  CHECK(predictor.at("train_sequences").get<int>() + predictor.at("held_out_sequences").get<int>() +
            predictor.at("left_out_sequences").get<int>() ==
        9);
  const PreferenceReader with_predictor(project.path() / "predicting/preferences.h5");
  REQUIRE(with_predictor.predictor().has_value());
  CHECK(with_predictor.predictor()->report.best_by_requests == predictor.at("best_by_requests").get<std::string>());
  for (const std::int64_t prompt : with_predictor.rows(PreferenceRouter::kTuned, 0, 9).num_prompt_tokens) {
    CHECK((prompt == 8 || prompt == 0));
  }
  std::int64_t prompts = 0;
  read_json_lines(project.path() / "predicting/prompts.jsonl", [&](std::int64_t, const Json& line) {
    CHECK(line.at("task") == "letters");
    CHECK_FALSE(line.at("prompt").get<std::string>().empty());
    prompts += 1;
  });
  CHECK(prompts == predictor.at("train_sequences").get<int>() + predictor.at("held_out_sequences").get<int>());
  CHECK_THAT(done(project.run({"inspect", "predicting"})),
             Catch::Contains("predictor") && Catch::Contains("best at 2"));
  const Json compared = Json::parse(done(project.run(
      {"evaluate", "runs/moved", "--bundle", "predicting", "evaluate.static_set=[]", "--json", "--quiet"})));
  CHECK(compared.at("predictor") == predictor);
  CHECK(compared.at("arms")[0].at("domains")[0].at("static_set").empty());
  // Prompts of an earlier export would give their ids to other sequences.
  CHECK(exists(project, "predicting/prompts.jsonl"));
  done(project.run({"export", "runs/moved", "--output", "predicting", "--quiet", "export.prompt_tokens=6"}));
  CHECK_FALSE(exists(project, "predicting/prompts.jsonl"));

  CHECK(done(project.run({"export", "runs/moved", "--output", "elsewhere", "--quiet"})) == "elsewhere\n");
  CHECK(project.read("elsewhere/router.safetensors") == router);
  check_complaint(project.run({"evaluate", "letters"}), 3, {"letters: not a run directory", "recipe.yaml"});
  for (const char* verb : {"evaluate", "validate"}) {
    check_complaint(project.run({verb, verb == std::string("evaluate") ? "runs/moved" : "finetune.yaml",
                                 "evaluate.slots=[9]", "evaluate.static_set=[1]", "evaluate.residency_prior.slots=12",
                                 "evaluate.residency_prior.lambdas=[0.1]", "evaluate.residency_prior.always_keep=[2]"}),
                    2,
                    {"evaluate.slots=[9] on the command line", "(8), got 9", "evaluate.static_set=[1]", "(2 to 8)",
                     "evaluate.residency_prior.slots=12", "evaluate.residency_prior.always_keep=[2]", "(2), got 2"});
  }

  // Starting afresh leaves nothing of the old run that evaluate could take for the new one's.
  done(project.run(
      {"finetune", "finetune.yaml", "run_dir=runs/moved", "control.enabled=false", "--overwrite", "--quiet"}));
  CHECK_FALSE(exists(project, "runs/moved/bundle"));
  CHECK_FALSE(exists(project, "runs/moved/control"));
  CHECK_FALSE(exists(project, "runs/moved/results.json"));
  CHECK(project.read("runs/moved/checkpoints/step_6/router.safetensors") == router);
}

TEST_CASE("an interrupted run says so and resumes to the very same routers") {
  const SmallProject project;
  project.pretrain();
  const std::vector<std::string> arguments = {"finetune", "finetune.yaml", "train.steps=150", "control.enabled=false"};
  const auto with = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = arguments;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  done(project.run(with({"run_dir=runs/whole"})));

  Program program(with({"run_dir=runs/halves"}), project.here());
  REQUIRE(program.wait_for_stderr("step   3/150"));
  program.signal(SIGINT);
  const Outcome interrupted = program.finish();
  INFO(interrupted.err);
  CHECK(interrupted.code == 130);
  CHECK(interrupted.out.empty());
  CHECK_THAT(interrupted.err, Catch::Contains("interrupted after step ") &&
                                  Catch::Contains("saved in runs/halves/checkpoints/step_") &&
                                  Catch::Contains("--resume"));
  CHECK_FALSE(exists(project, "runs/halves/checkpoints/step_150"));

  // Neither started again nor exported nor resumed as something else by mistake.
  check_complaint(project.run(with({"run_dir=runs/halves"})), 2, {"holds a run already", "--resume"});
  check_complaint(project.run({"export", "finetune.yaml", "train.steps=150", "run_dir=runs/halves"}), 2,
                  {"of 150 steps", "--resume"});
  check_complaint(project.run(with({"run_dir=runs/halves", "seed=9", "--resume"})), 2,
                  {"the recipe changed", "seed: 8", "seed: 9"});
  check_complaint(project.run(with({"run_dir=runs/none", "--resume"})), 2,
                  {"runs/none", "no checkpoint to resume from", "without --resume"});

  const Outcome resumed = project.run(with({"run_dir=runs/halves", "--resume"}));
  CHECK(done(resumed).empty());
  CHECK_THAT(resumed.err, Catch::Contains("resuming runs/halves at step ") && Catch::Contains("step 150/150"));
  for (const char* name : {"router.safetensors", "optimizer.safetensors", "state.json"}) {
    INFO(name);
    CHECK(project.read(std::string("runs/whole/checkpoints/step_150/") + name) ==
          project.read(std::string("runs/halves/checkpoints/step_150/") + name));
  }
  CHECK(done(project.run(with({"run_dir=runs/halves", "--resume"}))).empty());
  check_complaint(project.run(with({"run_dir=runs/halves", "seed=9", "--resume"})), 2,
                  {"runs/halves", "the recipe changed", "seed: 8", "seed: 9"});
  // The log reads as one run.
  std::vector<std::pair<std::int64_t, double>> losses[2];
  for (int i = 0; i < 2; ++i) {
    read_json_lines(project.path() / (i == 0 ? "runs/whole" : "runs/halves") / "metrics.jsonl",
                    [&](std::int64_t, const Json& event) {
                      if (event.at("event") == "step") {
                        losses[i].emplace_back(event.at("step").get<std::int64_t>(), event.at("loss").get<double>());
                      }
                    });
  }
  CHECK(losses[0].size() == 150);
  CHECK(losses[0] == losses[1]);
}

TEST_CASE("epochs become steps once the data is read, and every later verb knows them") {
  const SmallProject project;
  project.pretrain();
  std::string text = replaced(SmallProject::kFinetune, "train: {steps: 6,", "train: {epochs: 2, warmup_ratio: 0.5,");
  text = replaced(text, "control: {enabled: true", "control: {enabled: false");
  project.write("epochs.yaml", text);
  CHECK(done(project.run({"validate", "epochs.yaml"})) == "epochs.yaml: OK\n");
  check_complaint(project.run({"export", "epochs.yaml"}), 2, {"the run is not finished (0 of 2 epochs)"});
  done(project.run({"finetune", "epochs.yaml", "--quiet"}));
  std::int64_t steps = 0;
  std::int64_t warmup_steps = 0;
  read_json_lines(project.path() / "runs/tuned/metrics.jsonl", [&](std::int64_t line, const Json& event) {
    if (line == 1) {
      REQUIRE(event.at("event") == "start");
      steps = event.at("steps");
      warmup_steps = event.at("warmup_steps");
      // Two passes, and no step more than they take.
      const double tokens = 2.0 * event.at("data").at("letters").at("tokens").get<double>();
      CHECK(static_cast<double>(steps * 2 * 64) >= tokens);
    }
  });
  REQUIRE(steps > 1);
  CHECK(warmup_steps == (steps + 1) / 2);
  const std::string saved = project.read("runs/tuned/recipe.yaml");
  CHECK_THAT(saved, Catch::Contains("  steps: " + std::to_string(steps) + "\n") && Catch::Contains("  epochs: 0\n"));
  const Outcome again = project.run({"finetune", "epochs.yaml", "--resume"});
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Catch::Contains("all " + std::to_string(steps) + " steps are done already"));
  done(project.run({"export", "epochs.yaml", "--quiet"}));
  done(project.run({"evaluate", "epochs.yaml", "--quiet"}));
  // Other steps are another run.
  check_complaint(project.run({"finetune", "epochs.yaml", "--resume", "train.epochs=3"}), 2, {"the recipe changed"});
}

TEST_CASE("a template needs its tokens in the vocabulary, which pretraining can give it") {
  const SmallProject project;
  const std::vector<std::string> chat = {
      "data.corpora.1={domain: colours, paths: [colours.jsonl], format: "
      "question_answer, template: chatml, text_field: text, prompt_field: ''}",
      "data.train=[colours]"};
  const auto with = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), chat.begin(), chat.end());
    return project.run(arguments);
  };
  project.pretrain();
  for (const char* verb : {"validate", "finetune"}) {
    INFO(verb);
    check_complaint(with({verb, "finetune.yaml"}), 2,
                    {"data.corpora.1.template: the model's vocabulary has no token <|im_start|>, <|im_end|>, which "
                     "\"chatml\" needs; choose the template of this model's family"});
  }
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned"));
  done(project.run({"pretrain", "pretrain.yaml", "--quiet", "--overwrite",
                    "tokenizer.special_tokens=['<|im_start|>', '<|im_end|>']"}));
  CHECK(done(with({"validate", "finetune.yaml"})) == "finetune.yaml: OK\n");
  done(with({"finetune", "finetune.yaml", "--quiet", "control.enabled=false"}));
  done(with({"export", "finetune.yaml", "--quiet"}));
}

TEST_CASE("a model whose directory holds a tokenizer.json is tuned with that vocabulary") {
  const SmallProject project;
  // Byte-level BPE of 600 tokens and two special ones.
  const std::filesystem::path golden = "tests/unit/data/goldens/smollm2/tokenizer.json";
  const std::string vocabulary = read_text_file(std::filesystem::path(HESTIA_SOURCE_DIR) / golden);
  std::filesystem::create_directories(project.path() / "vocabulary");
  project.write("vocabulary/tokenizer.json", vocabulary);
  const std::string special = R"({"pad_token": "<|user|>"})";
  project.write("vocabulary/tokenizer_config.json", special);
  const std::vector<std::string> pretrain = {"pretrain.yaml", "tokenizer.path=vocabulary/tokenizer.json"};
  CHECK(done(project.run({"validate", pretrain[0], pretrain[1]})) == "pretrain.yaml: OK\n");
  done(project.run({"pretrain", pretrain[0], pretrain[1], "--quiet"}));
  CHECK(project.read("runs/base/model/tokenizer.json") == vocabulary);
  CHECK(project.read("runs/base/model/tokenizer_config.json") == special);
  CHECK_FALSE(exists(project, "runs/base/model/tokenizer.model"));
  CHECK_THAT(done(project.run({"inspect", "runs/base/model"})), Catch::Contains(" 602\n"));

  const auto tune = [&](const std::string& name) {
    const std::string run_dir = "run_dir=runs/" + name;
    CHECK(done(project.run({"validate", "finetune.yaml", run_dir, "train.steps=2"})) == "finetune.yaml: OK\n");
    done(project.run({"finetune", "finetune.yaml", run_dir, "train.steps=2", "control.enabled=false", "--quiet"}));
    CHECK(exists(project, "runs/" + name + "/checkpoints/step_2/DONE"));
    std::int64_t tokens = -1;
    std::int64_t steps = 0;
    read_json_lines(project.path() / "runs" / name / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "start") {
        tokens = event.at("data").at("letters").at("tokens").get<std::int64_t>();
      } else if (event.at("event") == "step") {
        CHECK(event.at("nll").get<double>() > 0.0);
        ++steps;
      }
    });
    CHECK(steps == 2);
    return tokens;
  };
  const std::int64_t plain = tune("plain");
  CHECK(plain > 0);
  // With a token for the end of text, every document of the training split has one more.
  project.write("runs/base/model/tokenizer_config.json", R"({"eos_token": "<|end|>"})");
  const std::int64_t ended = tune("ended");
  CHECK(ended > plain);
  CHECK(ended <= plain + 40);

  project.write("runs/base/model/tokenizer.json", vocabulary.substr(0, vocabulary.size() / 2));
  check_complaint(project.run({"finetune", "finetune.yaml", "run_dir=runs/none"}), 3,
                  {"runs/base/model/tokenizer.json", "not valid JSON"});
  std::filesystem::remove(project.path() / "runs/base/model/tokenizer.json");
  check_complaint(project.run({"finetune", "finetune.yaml", "run_dir=runs/none"}), 3,
                  {"runs/base/model", "tokenizer.json", "tokenizer.model"});
  CHECK_FALSE(exists(project, "runs/none"));
}

TEST_CASE("a run killed before its first checkpoint is not a dead end") {
  const SmallProject project;
  project.pretrain();
  {
    Program program({"finetune", "finetune.yaml", "train.steps=100000"}, project.here());
    REQUIRE(program.wait_for_stderr("step      1/100000"));
    program.signal(SIGKILL);
    CHECK(program.finish().code == 128 + SIGKILL);
  }
  check_complaint(project.run({"finetune", "finetune.yaml"}), 2, {"runs/tuned", "saved no checkpoint", "--overwrite"});
  check_complaint(project.run({"finetune", "finetune.yaml", "--resume"}), 2, {"no checkpoint", "--overwrite"});
  done(project.run({"finetune", "finetune.yaml", "--overwrite", "--quiet"}));
  // The control alone was killed: --resume finishes it.
  std::filesystem::remove_all(project.path() / "runs/tuned/control/checkpoints");
  const Outcome resumed = project.run({"finetune", "finetune.yaml", "--resume", "--quiet"});
  done(resumed);
  CHECK(exists(project, "runs/tuned/control/checkpoints/step_6/DONE"));
}

TEST_CASE("a learning rate that blows up fails the run, not the machine") {
  const SmallProject project;
  project.pretrain();
  const Outcome outcome = project.run(
      {"finetune", "finetune.yaml", "train.learning_rate=10", "losses.reuse.weight=1e38", "train.steps=40"});
  check_complaint(outcome, 1, {"is not finite", "train.learning_rate", "last checkpoint"});
}

}  // namespace
}  // namespace hestia::testing
