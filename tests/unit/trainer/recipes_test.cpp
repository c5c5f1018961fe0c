#include "hestia/trainer/recipes.hpp"

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "temporary_folder.hpp"

using namespace hestia;

namespace {

constexpr const char* kGood = R"(recipe_version: 1
task: finetune
run_dir: runs/example
seed: 4
model:
  path: checkpoints/tiny
data:
  sequence_length: 64
  train: [alpha]
  evaluate: [alpha, beta]
  corpora:
    - {domain: alpha, paths: [a.txt]}
    - {domain: beta, paths: [b.txt]}
losses:
  cache_simulation: {weight: 0.1}
train:
  steps: 12
  learning_rate: 5e-3
)";

std::filesystem::path write_recipe(const TemporaryFolder& folder, std::string text) {
  const auto path = folder.path() / "recipe.yaml";
  write_text_atomically(path, text);
  return path;
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  text.replace(text.find(from), from.size(), to);
  return text;
}

}  // namespace

TEST_CASE("a fine-tuning recipe reads into its struct, overrides last") {
  const TemporaryFolder folder;
  const auto loaded = load_finetune_recipe(write_recipe(folder, kGood), {"train.steps=20", "losses.reuse.weight=.3"});
  CHECK(loaded.recipe.train.steps == 20);
  CHECK(loaded.recipe.train.learning_rate == 5e-3);
  CHECK(loaded.recipe.losses.cache_simulation.weight == 0.1);
  CHECK(loaded.recipe.losses.reuse.weight == 0.3);
  CHECK(loaded.recipe.data.corpora.at(1).domain == "beta");
  CHECK(recipe_task(folder.path() / "recipe.yaml") == "finetune");
}

TEST_CASE("a resolved recipe reads back to the same values") {
  const TemporaryFolder folder;
  auto loaded = load_finetune_recipe(write_recipe(folder, kGood), {"train.learning_rate=0.1234567890123456789"});
  const std::string saved = save_recipe(loaded.recipe.fields());
  auto again = load_finetune_recipe(write_recipe(folder, saved), {});
  CHECK(save_recipe(again.recipe.fields()) == saved);
  CHECK(again.recipe.train.learning_rate == loaded.recipe.train.learning_rate);
}

TEST_CASE("every problem of a recipe is reported at its line") {
  const TemporaryFolder folder;
  std::string text = replaced(kGood, "cache_simulation:", "cache_simulaton:");
  text = replaced(text, "steps: 12", "steps: 0");
  text = replaced(text, "evaluate: [alpha, beta]", "evaluate: [alpha, betta]");
  const auto path = write_recipe(folder, text);
  CHECK_THROWS_WITH(
      load_finetune_recipe(path, {}),
      Catch::Contains(":15: unknown key \"losses.cache_simulaton\"; did you mean \"losses.cache_simulation\"?") &&
          Catch::Contains(":17: train.steps must be at least 1, got 0") &&
          Catch::Contains(":10: data.evaluate names the domain \"betta\"") &&
          Catch::Contains("did you mean \"beta\"?"));
}

TEST_CASE("a pretraining recipe refuses what needs a base router") {
  const TemporaryFolder folder;
  std::string text = replaced(kGood, "task: finetune", "task: pretrain");
  text = replaced(text, "  path: checkpoints/tiny", "  dtype: float32");
  text = replaced(text, "cache_simulation: {weight: 0.1}", "trust: {weight: 0.1}");
  text = replaced(text, "steps: 12", "steps: 12\n  trainable: all");
  CHECK_THROWS_WITH(load_pretrain_recipe(write_recipe(folder, text), {}),
                    Catch::Contains("losses.trust.weight must be 0"));
  CHECK(recipe_task(folder.path() / "recipe.yaml") == "pretrain");
}
