#include "hestia/trainer/recipes.hpp"

#include <algorithm>
#include <cmath>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/trainer/trainer.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

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

TEST_CASE("a domain that the language-model loss leaves out is there for another term") {
  const TemporaryFolder folder;
  const auto path = write_recipe(folder, kGood);
  const std::vector<std::string> two = {"data.train=[alpha, beta]", "losses.nll.domains=[alpha]"};
  const auto with = [&](const std::vector<std::string>& more) {
    std::vector<std::string> words = two;
    words.insert(words.end(), more.begin(), more.end());
    return load_finetune_recipe(path, words).recipe.nll.domains;
  };
  const std::vector<std::string> alpha = {"alpha"};
  CHECK(with({"losses.logit_distillation.weight=1"}) == alpha);
  CHECK(with({"losses.logit_distillation.weight=1", "losses.logit_distillation.domains=[beta]"}) == alpha);
  CHECK(with({"losses.reuse.weight=0.3", "losses.domains=[beta]"}) == alpha);
  const auto refuses = [&](const std::vector<std::string>& more) {
    CHECK_THROWS_WITH(with(more), Catch::Contains("losses.nll.domains leaves out the domain \"beta\" of data.train") &&
                                      Catch::Contains("or train on the others alone"));
  };
  refuses({"losses.reuse.weight=0.3", "losses.domains=[alpha]"});
  refuses(
      {"losses.logit_distillation.weight=1", "losses.logit_distillation.domains=[alpha]", "losses.domains=[alpha]"});
  // Plain tuning, as of a control, has no other term.
  CHECK(with({"losses.cache_simulation.weight=0"}) == alpha);
  CHECK_THROWS_WITH(load_finetune_recipe(path, {"losses.nll.domains=[alhpa]"}),
                    Catch::Contains("losses.nll.domains names the domain \"alhpa\", which data.train does not name") &&
                        Catch::Contains("did you mean \"alpha\"?") && !Catch::Contains("leaves out"));
}

TEST_CASE("routing terms and distillation name domains that are trained on") {
  const TemporaryFolder folder;
  const auto path = write_recipe(folder, kGood);
  const auto loaded = load_finetune_recipe(path, {"losses.domains=[alpha]", "losses.logit_distillation.domains=[alpha]",
                                                  "losses.logit_distillation.weight=1"});
  CHECK(loaded.recipe.loss_domains == std::vector<std::string>{"alpha"});
  CHECK(loaded.recipe.distillation.domains == std::vector<std::string>{"alpha"});
  CHECK_THROWS_WITH(load_finetune_recipe(path, {"losses.domains=[alhpa]"}),
                    Catch::Contains("losses.domains names the domain \"alhpa\", which data.train does not name") &&
                        Catch::Contains("did you mean \"alpha\"?"));
  CHECK_THROWS_WITH(load_finetune_recipe(path, {"losses.logit_distillation.domains=[alpha, alpha]"}),
                    Catch::Contains("losses.logit_distillation.domains names the domain \"alpha\" twice"));
  for (const char* given :
       {"losses.logit_distillation.domains=[alpha]", "losses.logit_distillation.teacher=/models/x"}) {
    CHECK_THROWS_WITH(load_finetune_recipe(path, {given}),
                      Catch::Contains("does nothing without losses.logit_distillation.weight; set it"));
  }
}

TEST_CASE("trainable sets, adapters and annealing are checked at their lines") {
  const TemporaryFolder folder;
  const auto with = [&](const std::string& lines) {
    return write_recipe(folder, replaced(kGood, "  steps: 12\n", "  steps: 12\n" + lines));
  };
  const auto loaded = load_finetune_recipe(
      with("  trainable: router+lora\n  lora: {rank: 8, alpha: 4}\n  top_k_annealing: {step: 12, top_k: 1}\n"), {});
  CHECK(loaded.recipe.train.trainable == "router+lora");
  CHECK(loaded.recipe.train.lora.rank == 8);
  CHECK(loaded.recipe.train.lora.alpha == 4.0);
  CHECK(loaded.recipe.train.top_k_annealing.step == 12);
  CHECK(loaded.recipe.train.top_k_annealing.top_k == 1);
  const TrainOptions defaults = load_finetune_recipe(write_recipe(folder, kGood), {}).recipe.train;
  CHECK(defaults.trainable == "router");
  CHECK(defaults.lora.rank == 32);
  CHECK(defaults.lora.alpha == 16.0);
  CHECK(defaults.top_k_annealing.step == 0);
  CHECK(defaults.top_k_annealing.top_k == 0);

  CHECK_THROWS_WITH(load_finetune_recipe(with("  trainable: router+lra\n"), {}),
                    Catch::Contains(":18: train.trainable must be one of router, router+lora, all, got "
                                    "\"router+lra\"; did you mean \"router+lora\"?"));
  CHECK_THROWS_WITH(load_finetune_recipe(with("  lora: {rank: 0, alpha: 0}\n"), {}),
                    Catch::Contains(":18: train.lora.rank must be at least 1, got 0") &&
                        Catch::Contains(":18: train.lora.alpha must be above 0, got 0"));
  CHECK_THROWS_WITH(load_finetune_recipe(with("  top_k_annealing: {step: 13, top_k: 1}\n"), {}),
                    Catch::Contains(":18: train.top_k_annealing.step must be at most train.steps (12), got 13"));
  CHECK_THROWS_WITH(load_finetune_recipe(with("  top_k_annealing: {step: -1, top_k: 1}\n"), {}),
                    Catch::Contains(":18: train.top_k_annealing.step must be at least 0, got -1"));
  for (const char* half : {"{step: 3}", "{top_k: 1}", "{step: 3, top_k: 0}"}) {
    CHECK_THROWS_WITH(load_finetune_recipe(with(std::string("  top_k_annealing: ") + half + "\n"), {}),
                      Catch::Contains(":18: train.top_k_annealing needs a step and a top_k of at least 1"));
  }

  // What only the model can tell.
  Architecture architecture;
  architecture.top_k = 2;
  architecture.hidden_size = 32;
  architecture.expert_intermediate_size = 16;
  const auto misfits = [&](const std::string& lines) {
    const auto recipe = load_finetune_recipe(with(lines), {});
    Problems problems;
    check_train_fits(recipe.recipe.train, recipe.source, architecture, problems);
    return problems.joined();
  };
  CHECK(misfits("  trainable: router+lora\n  lora: {rank: 16}\n  top_k_annealing: {step: 3, top_k: 2}\n").empty());
  CHECK(misfits("  lora: {rank: 17}\n").empty());  // of no use without adapters
  CHECK(misfits("  router_gradient: all\n").empty());
  architecture.expert_bias = true;
  CHECK(misfits("  trainable: all\n").empty());
  CHECK_THAT(misfits("  trainable: router+lora\n  lora: {rank: 16}\n"),
             Catch::Contains(":18: train.trainable must be router or all for"));
  architecture.expert_bias = false;
  CHECK_THAT(
      misfits("  trainable: router+lora\n  lora: {rank: 17}\n  top_k_annealing: {step: 3, top_k: 3}\n"),
      Catch::Contains(":19: train.lora.rank must be at most the rank of the experts' matrices (16), got 17") &&
          Catch::Contains(":20: train.top_k_annealing.top_k must be at most the model's experts per token (2), got 3"));
}

TEST_CASE("a pretraining recipe refuses what needs a base router") {
  const TemporaryFolder folder;
  std::string text = replaced(kGood, "task: finetune", "task: pretrain");
  text = replaced(text, "  path: checkpoints/tiny", "  dtype: float32");
  text = replaced(text, "cache_simulation: {weight: 0.1}", "trust: {weight: 0.1}");
  text = replaced(text, "steps: 12", "steps: 12\n  trainable: all");
  CHECK_THROWS_WITH(load_pretrain_recipe(write_recipe(folder, text), {}),
                    Catch::Contains("losses.trust.weight must be 0"));
  CHECK_THROWS_WITH(
      load_pretrain_recipe(write_recipe(folder, text), {"train.trainable=router+lora", "train.top_k_annealing.step=3",
                                                        "train.top_k_annealing.top_k=5"}),
      Catch::Contains("train.trainable must be \"all\"") &&
          Catch::Contains("train.top_k_annealing.top_k must be at most architecture.top_k (4), got 5"));
  CHECK(recipe_task(folder.path() / "recipe.yaml") == "pretrain");
}

TEST_CASE("epochs and warmup_ratio stand for steps, the command line before the recipe") {
  const TemporaryFolder folder;
  const auto load = [&](const std::string& train, const std::vector<std::string>& overrides = {}) {
    return load_finetune_recipe(write_recipe(folder, replaced(kGood, "  steps: 12\n", train)), overrides).recipe.train;
  };
  TrainOptions train = load("  epochs: 2.5\n  warmup_ratio: 0.1\n");
  CHECK((train.steps == 0 && train.epochs == 2.5 && train.warmup_steps == 0 && train.warmup_ratio == 0.1));
  train = load("  epochs: 2.5\n  warmup_ratio: 0.03\n", {"train.steps=2"});
  CHECK((train.steps == 2 && train.epochs == 0.0 && train.warmup_steps == 1 && train.warmup_ratio == 0.0));
  train = load("  steps: 100\n  warmup_steps: 9\n", {"train.epochs=3", "train.warmup_ratio=0.5"});
  CHECK((train.steps == 0 && train.epochs == 3.0 && train.warmup_steps == 0 && train.warmup_ratio == 0.5));
  train = load("  steps: 100\n  warmup_ratio: 0.07\n");
  CHECK((train.steps == 100 && train.warmup_steps == 7));  // 0.07 * 100 is a little more than 7
  train = load("  steps: 100\n  warmup_ratio: 0.001\n");
  CHECK(train.warmup_steps == 1);  // rounded up
  train = load("  steps: 100\n  warmup_ratio: 0.5\n", {"train.warmup_steps=0"});
  CHECK((train.steps == 100 && train.warmup_steps == 0 && train.warmup_ratio == 0.0));
  train = load("  steps: 7\n", {"train.epochs=0"});
  CHECK((train.steps == 7 && train.epochs == 0.0));
  train = load("  epochs: 2\n", {"train.steps=0"});
  CHECK((train.steps == 0 && train.epochs == 2.0));
  train = load("  epochs: 2\n", {"train={steps: 8}"});
  CHECK((train.steps == 8 && train.epochs == 0.0));
  CHECK(load("").steps == 100);  // the default

  CHECK_THROWS_WITH(load("  steps: 12\n  epochs: 2\n"),
                    Catch::Contains(":18: train.steps and train.epochs say the same in two ways, got 12 and 2"));
  CHECK_THROWS_WITH(load("", {"train.steps=12", "train.epochs=2"}),
                    Catch::Contains("train.epochs=2 on the command line: train.steps and train.epochs say"));
  CHECK_THROWS_WITH(load("  steps: 12\n  warmup_steps: 1\n  warmup_ratio: 0.1\n"),
                    Catch::Contains(":19: train.warmup_steps and train.warmup_ratio say the same in two ways"));
  CHECK_THROWS_WITH(load("  epochs: 2\n  decay_steps: 5\n"),
                    Catch::Contains(":18: train.decay_steps needs train.steps"));
  CHECK_THROWS_WITH(load("  epochs: -1\n"), Catch::Contains(":17: train.epochs must be between 0 and"));
  CHECK_THROWS_WITH(load("  warmup_ratio: 1.5\n"), Catch::Contains("train.warmup_ratio must be"));
  // What an unresolved recipe saves reads back.
  auto loaded = load_finetune_recipe(write_recipe(folder, replaced(kGood, "steps: 12", "epochs: 3")), {});
  const auto again = load_finetune_recipe(write_recipe(folder, save_recipe(loaded.recipe.fields())), {});
  CHECK((again.recipe.train.epochs == 3.0 && again.recipe.train.steps == 0));
}

TEST_CASE("epochs come to the fewest steps that see the data so often") {
  SplitMix64 random(4);
  for (int round = 0; round < 20; ++round) {
    const PackedData data = testing::tiny_data(random.next(), 30 + static_cast<std::int64_t>(random.below(60)), 32);
    TrainOptions options;
    options.steps = 0;
    options.epochs = 0.3 + 3.0 * random.uniform();
    options.rows_per_batch = static_cast<std::int64_t>(1 + random.below(4));
    options.accumulate = static_cast<std::int64_t>(1 + random.below(3));
    options.warmup_ratio = 0.25;
    const double epochs = options.epochs;
    const std::vector<double> mix = round % 2 == 0 ? std::vector<double>{} : std::vector<double>{0.7, 0.3};
    const std::uint64_t seed = random.next();
    resolve_steps(options, data, mix, 40, seed, {});
    CHECK(options.steps > 0);
    CHECK((options.epochs == 0.0 && options.warmup_ratio == 0.0));
    CHECK(options.warmup_steps == static_cast<std::int64_t>(std::ceil(0.25 * static_cast<double>(options.steps))));
    // Draw as the run does.
    PackedSampler sampler(data, options.rows_per_batch, 40, data_order_seed(seed), mix);
    double tokens = 0.0;
    double before_last = 0.0;
    for (std::int64_t batch = 0; batch < options.steps * options.accumulate; ++batch) {
      if (batch == (options.steps - 1) * options.accumulate) {
        before_last = tokens;
      }
      const PackedBatch drawn = sampler.next();
      tokens += static_cast<double>(
          std::count_if(drawn.sequence_ids.begin(), drawn.sequence_ids.end(), [](std::int64_t id) { return id >= 0; }));
    }
    CHECK(tokens >= epochs * static_cast<double>(data.num_tokens()));
    CHECK(before_last < epochs * static_cast<double>(data.num_tokens()));
    TrainOptions known = options;
    resolve_steps(known, data, mix, 40, seed, {});
    CHECK(known.steps == options.steps);
  }
  TrainOptions wrong;
  wrong.steps = 0;
  wrong.epochs = 1.0;
  wrong.warmup_steps = 1000;
  CHECK_THROWS_WITH(resolve_steps(wrong, testing::tiny_data(1, 20, 32), {}, 32, 1, {}),
                    Catch::Contains("train.warmup_steps must be at most the") && Catch::Contains("got 1000"));
  wrong.warmup_steps = 0;
  wrong.top_k_annealing = {.step = 999, .top_k = 1};
  CHECK_THROWS_WITH(resolve_steps(wrong, testing::tiny_data(1, 20, 32), {}, 32, 1, {}),
                    Catch::Contains("train.top_k_annealing.step must be at most the") && Catch::Contains("got 999"));
  CHECK((wrong.steps == 0 && wrong.epochs == 1.0));
}

TEST_CASE("annealing needs both its keys, with steps as with epochs, and a K that the family has") {
  const TemporaryFolder folder;
  const std::filesystem::path path = write_recipe(folder, kGood);
  for (const char* length : {"train.steps=9", "train.epochs=1"}) {
    CHECK_THROWS_WITH(load_finetune_recipe(path, {length, "train.top_k_annealing.step=2"}),
                      Catch::Contains("needs a step and a top_k") && Catch::Contains("top_k 0"));
    CHECK_THROWS_WITH(load_finetune_recipe(path, {length, "train.top_k_annealing.top_k=2"}),
                      Catch::Contains("needs a step and a top_k") && Catch::Contains("step 0"));
  }
  auto loaded = load_finetune_recipe(path, {"train.top_k_annealing.step=2", "train.top_k_annealing.top_k=1"});
  Architecture architecture = testing::tiny_architecture();
  const auto complaint = [&] {
    Problems problems;
    check_train_fits(loaded.recipe.train, loaded.source, architecture, problems);
    problems.throw_usage_if_any();
  };
  CHECK_NOTHROW(complaint());
  architecture.routing = RoutingKind::kSparsemixer;
  CHECK_NOTHROW(complaint());
  loaded.recipe.train.router_gradient = "all";
  CHECK_THROWS_WITH(complaint(), Catch::Contains("train.router_gradient must be chosen for"));
  loaded.recipe.train.router_gradient = "chosen";
  architecture.fixed_top_k = 2;
  CHECK_THROWS_WITH(complaint(), Catch::Contains("train.top_k_annealing.top_k=1 on the command line") &&
                                     Catch::Contains("2 experts per token and no other number, got 1"));
}

TEST_CASE("a loss option that does not fit the model is named with its place") {
  const TemporaryFolder folder;
  const auto loaded = load_finetune_recipe(write_recipe(folder, kGood), {"losses.cache_simulation.slots=9"});
  CHECK_THROWS_WITH(
      recipe_losses(loaded.recipe.losses, loaded.source, 8, 2),
      Catch::StartsWith("losses.cache_simulation.slots=9 on the command line: ") && Catch::Contains("got 9"));
}

TEST_CASE("what spans keys of losses and corpora is checked without any file") {
  const TemporaryFolder folder;
  const auto load = [&](const std::string& from, const std::string& to) {
    (void)load_finetune_recipe(write_recipe(folder, replaced(kGood, from, to)), {});
  };
  CHECK_THROWS_WITH(load("cache_simulation: {weight: 0.1}", "lag: {weight: 0.1, lags: [1, 4, 2]}"),
                    Catch::Contains(":15: losses.lag.lags must be a strictly increasing list, got [1, 4, 2]; sort it"));
  CHECK_THROWS_WITH(load("cache_simulation: {weight: 0.1}", "lag: {lags: [2, 2]}"), Catch::Contains("got [2, 2]"));
  CHECK_THROWS_WITH(load("cache_simulation: {weight: 0.1}", "lag: {lags: []}"), Catch::Contains("got []"));
  CHECK_THROWS_WITH(
      load("{domain: beta, paths: [b.txt]}", "{domain: beta, paths: [b.txt], template: chatml}"),
      Catch::Contains(":13: data.corpora.1.template is for format question_answer or chat only, got format text"));
  CHECK_THROWS_WITH(load("{domain: beta, paths: [b.txt]}",
                         "{domain: beta, paths: [b.txt], format: chat, question_field: q, text_field: t}"),
                    Catch::Contains("data.corpora.1.question_field is for format question_answer only") &&
                        Catch::Contains("data.corpora.1.text_field is for format jsonl only, got format chat"));
  CHECK_THROWS_WITH(load("{domain: beta, paths: [b.txt]}",
                         "{domain: beta, paths: [b.txt], format: chat, min_document_bytes: 9, max_document_bytes: 99}"),
                    Catch::Contains("data.corpora.1.min_document_bytes is for format text only") &&
                        Catch::Contains("data.corpora.1.max_document_bytes is for format text or jsonl only"));
  CHECK_THROWS_WITH(
      load("{domain: beta, paths: [b.txt]}", "{domain: beta, paths: [b.txt], format: chat, template: chatlm}"),
      Catch::Contains("data.corpora.1.template must be one of plain") && Catch::Contains("did you mean \"chatml\"?"));
  CHECK_NOTHROW(load("{domain: beta, paths: [b.txt]}",
                     "{domain: beta, paths: [b.txt], format: chat, template: chatml, overlong: drop}"));
}

TEST_CASE("tasks of an evaluation read, are saved and read again") {
  const TemporaryFolder folder;
  const std::string text = replaced(kGood, "    - {domain: beta, paths: [b.txt]}\n",
                                    "    - {domain: beta, paths: [b.jsonl], format: question_answer}\n") +
                           R"(evaluate:
  tasks:
    - {name: sums, kind: exact_match, domain: beta, split: all, max_new_tokens: 40, stop: ["\n\n", "Q: \"x\""], answer_after: "####"}
    - {name: doors, kind: multiple_choice, paths: [doors.jsonl], limit: 7, batch: 3}
    - name: doors by hand
      kind: multiple_choice
      paths: [a, b]
      prompt: "{question.stem} {{sic}}\nAnswer:"
      choices: [question.choices.text]
      answer: answerKey
)";
  auto loaded = load_finetune_recipe(write_recipe(folder, text), {"evaluate.tasks.1.limit=9"});
  const std::vector<TaskOptions>& tasks = loaded.recipe.evaluate.tasks;
  REQUIRE(tasks.size() == 3);
  CHECK(tasks[0].kind == "exact_match");
  CHECK(tasks[0].domain == "beta");
  CHECK(tasks[0].stop == std::vector<std::string>{"\n\n", "Q: \"x\""});
  CHECK(tasks[0].answer_after == "####");
  CHECK(tasks[0].batch == 32);
  CHECK(tasks[1].limit == 9);
  CHECK(tasks[1].choices.paths == std::vector<std::string>{"doors.jsonl"});
  CHECK(tasks[2].choices.prompt == "{question.stem} {{sic}}\nAnswer:");
  const std::string saved = save_recipe(loaded.recipe.fields());
  auto again = load_finetune_recipe(write_recipe(folder, saved), {});
  CHECK(save_recipe(again.recipe.fields()) == saved);
  CHECK(again.recipe.evaluate.tasks.at(0).stop == tasks[0].stop);
  CHECK(again.recipe.evaluate.tasks.at(2).choices.choices == tasks[2].choices.choices);
}

TEST_CASE("mistakes in tasks are told at their lines") {
  const TemporaryFolder folder;
  const auto path = write_recipe(folder, replaced(kGood, "    - {domain: beta, paths: [b.txt]}\n",
                                                  R"(    - {domain: beta, paths: [b.jsonl], format: question_answer}
    - {domain: lines, paths: [c.jsonl], format: jsonl}
)") + R"(evaluate:
  tasks:
    - {name: a, kind: exact_mach, domain: beta}
    - {name: b, kind: exact_match, domain: betta}
    - {name: b, kind: exact_match}
    - {name: c, kind: exact_match, domain: alpha}
    - {name: d, kind: exact_match, domain: lines, stop: [""]}
    - {name: e, kind: multiple_choice, answer_after: "####", max_new_tokens: 3}
    - {name: f, kind: exact_match, domain: beta, paths: [x], prompt: "{x}"}
    - {name: g, kind: multiple_choice, paths: [x], prompt: "{x"}
    - {name: h, kind: multiple_choice, paths: [x], promt: "{x}"}
    - {kind: multiple_choice, paths: [x]}
)");
  CHECK_THROWS_WITH(
      load_finetune_recipe(path, {"data.train=[alpha,beta]", "evaluate.tasks.6.split=all"}),
      Catch::Contains(":22: evaluate.tasks.0.kind must be one of exact_match, multiple_choice, got \"exact_mach\"") &&
          Catch::Contains(
              ":23: evaluate.tasks.1.domain names the domain \"betta\", which data.corpora does not define; "
              "did you mean \"beta\"?") &&
          Catch::Contains(":24: evaluate.tasks.2.name repeats \"b\"") &&
          Catch::Contains(":24: evaluate.tasks.2.domain is missing") &&
          Catch::Contains(":25: evaluate.tasks.3.domain must name a domain with prompts and answers, got \"alpha\" of "
                          "plain text (format text)") &&
          Catch::Contains(":26: evaluate.tasks.4.domain must name") && Catch::Contains("jsonl without prompt_field") &&
          Catch::Contains(":26: evaluate.tasks.4.stop must hold texts that are not empty") &&
          Catch::Contains(":27: evaluate.tasks.5.answer_after is for kind exact_match only") &&
          Catch::Contains(":27: evaluate.tasks.5.max_new_tokens is for kind exact_match only") &&
          Catch::Contains(":27: evaluate.tasks.5.paths is missing") &&
          Catch::Contains(":28: evaluate.tasks.6.paths is for kind multiple_choice only") &&
          Catch::Contains(":28: evaluate.tasks.6.prompt is for kind multiple_choice only") &&
          Catch::Contains("evaluate.tasks.6.split must be held_out or train for a domain that data.train names") &&
          Catch::Contains(":29: evaluate.tasks.7.prompt has a { without its }, got \"{x\"") &&
          Catch::Contains("unknown key \"evaluate.tasks.8.promt\"; did you mean \"evaluate.tasks.8.prompt\"?") &&
          Catch::Contains("the key \"evaluate.tasks.9.name\" is missing"));
}
