#include <algorithm>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"

namespace hestia::testing {
namespace {

std::vector<std::string> shipped_recipes() {
  std::vector<std::string> recipes;
  for (const auto& entry : std::filesystem::directory_iterator(HESTIA_SOURCE_DIR "/recipes")) {
    if (entry.path().extension() == ".yaml") {
      recipes.push_back("recipes/" + entry.path().filename().string());
    }
  }
  std::sort(recipes.begin(), recipes.end());
  REQUIRE(recipes.size() >= 2);
  return recipes;
}

TEST_CASE("recipes lists what is shipped and prints one of them") {
  const std::vector<std::string> shipped = shipped_recipes();
  const std::vector<std::string> lines = lines_of(done(hestia({"recipes"})));
  REQUIRE(lines.size() == shipped.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    INFO(lines[i]);
    CHECK(lines[i].rfind(shipped[i] + " ", 0) == 0);
    const bool has_task = lines[i].find(" finetune ") != std::string::npos ||
                          lines[i].find(" pretrain ") != std::string::npos ||
                          lines[i].find(" bench ") != std::string::npos;
    CHECK(has_task);
    CHECK(lines[i].size() > shipped[i].size() + 30);  // a summary stands behind
  }
  const std::string quickstart = read_text_file(HESTIA_SOURCE_DIR "/recipes/quickstart.yaml");
  CHECK(done(hestia({"recipes", "quickstart"})) == quickstart);
  CHECK(done(hestia({"recipes", "quickstart.yaml"})) == quickstart);
  // From anywhere.
  const TemporaryFolder folder;
  CHECK(done(hestia({"recipes", "quickstart"}, {folder.path(), {}, {}})) == quickstart);
  check_complaint(hestia({"recipes", "quickstrat"}), 2,
                  {"there is no recipe \"quickstrat\"", "did you mean \"quickstart\"?"});
}

TEST_CASE("every shipped recipe is valid") {
  std::vector<std::string> arguments = shipped_recipes();
  std::string expected;
  for (const std::string& recipe : arguments) {
    expected += recipe + ": OK\n";
  }
  arguments.insert(arguments.begin(), {"validate", "--no-files"});
  const Outcome outcome = hestia(arguments);
  CHECK(done(outcome) == expected);
  CHECK(outcome.err.empty());
}

TEST_CASE("validate reports every mistake of a recipe with its line and the nearest key") {
  const SmallProject project;
  std::string text = SmallProject::kFinetune;
  text = replaced(text, "seed: 8", "seed: eight");
  text = replaced(text, "reuse:", "reuze:");
  text = replaced(text, "steps: 6", "steps: 0");
  text = replaced(text, "policies: [lru, belady]", "policies: [lru, beladi]");
  text = replaced(text, "evaluate: [letters, colours]", "evaluate: [letters, colors]");
  text = replaced(text, "held_out_fraction: 0.3", "held_out_fraction: 1.5");
  project.write("wrong.yaml", text);
  const Outcome outcome = project.run({"validate", "wrong.yaml"});
  check_complaint(outcome, 2,
                  {"wrong.yaml:5: seed must be an integer, got \"eight\"",
                   "wrong.yaml:9: data.held_out_fraction must be above 0 and at most 0.9, got 1.5",
                   "wrong.yaml:11: data.evaluate names the domain \"colors\"", "did you mean \"colours\"?",
                   "wrong.yaml:18: unknown key \"losses.reuze\"; did you mean \"losses.reuse\"?",
                   "wrong.yaml:20: train.steps must be at least 1, got 0",
                   "wrong.yaml:23: evaluate.policies must be one of lru", "got \"beladi\"; did you mean \"belady\"?"});
  CHECK(std::count(outcome.err.begin(), outcome.err.end(), '\n') == 6);
  // The same complaint from the verb that would run it.
  CHECK(project.run({"finetune", "wrong.yaml"}).err == outcome.err);
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs"));
}

TEST_CASE("validate goes on after a wrong recipe and says which are right") {
  const SmallProject project;
  project.write("wrong.yaml", replaced(SmallProject::kPretrain, "top_k: 2", "top_k: 9"));
  project.write("broken.yaml", "recipe_version: 1\ntask: [\n");
  const Outcome outcome = project.run(
      {"validate", "--no-files", "wrong.yaml", "pretrain.yaml", "broken.yaml", "absent.yaml", "finetune.yaml"});
  CHECK(outcome.code == 2);
  CHECK(outcome.out == "pretrain.yaml: OK\nfinetune.yaml: OK\n");
  for (const char* part : {"wrong.yaml:14: architecture.top_k must be between 1 and num_experts (8), got 9",
                           "broken.yaml:3", "not YAML", "absent.yaml: cannot be read"}) {
    CHECK_THAT(outcome.err, Catch::Contains(part));
  }
}

TEST_CASE("a recipe of another version or without one is refused") {
  const SmallProject project;
  project.write("newer.yaml", replaced(SmallProject::kFinetune, "recipe_version: 1", "recipe_version: 2"));
  check_complaint(project.run({"validate", "newer.yaml"}), 2, {"newer.yaml:2: recipe_version must be 1, got \"2\""});
  project.write("none.yaml", replaced(SmallProject::kFinetune, "recipe_version: 1\n", ""));
  check_complaint(project.run({"validate", "none.yaml"}), 2, {"\"recipe_version\" is missing"});
  check_complaint(project.run({"pretrain", "finetune.yaml"}), 2, {"task", "pretrain"});
}

TEST_CASE("overrides change a recipe, and wrong ones are named") {
  const SmallProject project;
  const auto validate = [&](std::vector<std::string> overrides) {
    overrides.insert(overrides.begin(), {"validate", "--no-files", "finetune.yaml"});
    return project.run(overrides);
  };
  CHECK(done(validate({"train.steps=9", "evaluate.slots=[2,4]", "data.corpora.0.paths=[a=b.txt]"})) ==
        "finetune.yaml: OK\n");
  check_complaint(validate({"train.stpes=9", "train.steps=many", "losses.reuse.weight=-1", "evaluate.policies.5=lru"}),
                  2,
                  {"command line: unknown key \"train.stpes\"; did you mean \"train.steps\"?",
                   "command line: train.steps must be an integer, got \"many\"",
                   "command line: losses.reuse.weight must be at least 0, got -1",
                   "command line: evaluate.policies has 2 elements, got the index \"5\""});
  check_complaint(
      validate({"train.warmup_steps=7"}), 2,
      {"train.warmup_steps=7 on the command line: train.warmup_steps must be at most train.steps (6), got 7"});
  check_complaint(validate({"train.decay_steps=7"}), 2,
                  {"train.decay_steps=7 on the command line", "from train.warmup_steps (0) to train.steps (6), got 7"});
  check_complaint(validate({"train.decay_steps=3"}), 2, {"a learning rate of 0; set train.final_learning_rate"});
  CHECK(done(validate({"train.decay_steps=3", "train.final_learning_rate=0.1"})) == "finetune.yaml: OK\n");
  check_complaint(validate({"run_dir=[a"}), 2, {"run_dir=[a", "not YAML"});
  check_complaint(project.run({"finetune", "finetune.yaml", "train.steps"}), 2,
                  {"\"train.steps\" is not an override", "key=value"});
}

TEST_CASE("what a recipe names but nobody has is an input error that says what to do") {
  const SmallProject project;
  for (const char* verb : {"finetune", "validate"}) {
    INFO(verb);
    check_complaint(project.run({verb, "finetune.yaml", "model.path=models/absent"}), 3, {"models/absent"});
  }
  // Weights that are stored in parts are there; what is not is a tokenizer.
  const std::filesystem::path packed = HESTIA_SOURCE_DIR "/tests/parity/goldens/gpt_oss_mxfp4";
  const Outcome parts = project.run({"validate", "finetune.yaml", "model.path=" + packed.string()});
  check_complaint(parts, 3, {"gpt_oss_mxfp4", "tokenizer"});
  CHECK_THAT(parts.err, !Catch::Contains("fetch the checkpoint"));
  // A directory that is none of a model.
  check_complaint(project.run({"finetune", "finetune.yaml", "model.path=letters"}), 3, {"letters", "tokenizer.model"});

  const std::vector<std::string> missing = {"data.corpora.0.paths=[/usr/share/absent/text]",
                                            "data.corpora.0.package=some-text"};
  for (const char* verb : {"pretrain", "validate"}) {
    INFO(verb);
    const Outcome outcome = project.run({verb, "pretrain.yaml", missing[0], missing[1]});
    check_complaint(outcome, 3,
                    {"data.corpora.0.paths", "/usr/share/absent/text", "apt-get install some-text", "elsewhere"});
    // Once, although the domain is trained on and evaluated.
    CHECK(outcome.err.find("nothing matches") == outcome.err.rfind("nothing matches"));
  }
  check_complaint(project.run({"pretrain", "pretrain.yaml", "data.corpora.1.text_field=reply"}), 3,
                  {"colours.jsonl:", "no text field \"reply\"", "data.corpora.1.text_field"});
  // Recipe and files wrong at once: the recipe is what counts.
  const Outcome both = project.run({"validate", "finetune.yaml", "pretrain.yaml", "model.path=absent"});
  CHECK(both.code == 3);
  project.write("wrong.yaml", replaced(SmallProject::kFinetune, "steps: 6", "steps: 0"));
  check_complaint(project.run({"validate", "wrong.yaml", "finetune.yaml"}), 2, {"wrong.yaml:20", "runs/base/model"});
  check_complaint(project.run({"finetune", "absent.yaml"}), 3, {"absent.yaml: cannot be read"});
}

TEST_CASE("a device that is not there is named") {
  const SmallProject project;
  check_complaint(project.run({"pretrain", "pretrain.yaml", "model.device=cuda"}), 2, {"cuda"});
  check_complaint(project.run({"pretrain", "pretrain.yaml", "run_dir=runs/b", "model.device=tpu"}), 2, {"tpu"});
  // Mixtral always renormalises: its config.json could not say otherwise.
  check_complaint(project.run({"pretrain", "pretrain.yaml", "run_dir=runs/c", "architecture.family=mixtral",
                               "architecture.normalise_top_k=false"}),
                  2, {"architecture.normalise_top_k must be true for the family mixtral"});
}

}  // namespace
}  // namespace hestia::testing
