#include "hestia/trainer/residency.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include <ATen/Parallel.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/trainer/measure.hpp"
#include "hestia/trainer/trainer.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_data;
using hestia::testing::tiny_model;

namespace {

ResidencyRule in_loop_rule() {
  ResidencyRule rule;
  rule.lambda = 0.3;
  rule.always_keep = 1;
  rule.slots = 3;
  rule.logit_range = {2.0F, 2.5F};
  return rule;
}

TrainingJob job_in_loop(MoeModel& model, const PackedData& data, const std::filesystem::path& run_dir) {
  at::set_num_threads(1);
  model->keep_reference_routers();
  model->set_selector(std::make_shared<ResidencySelector>(in_loop_rule()));
  RoutingLossOptions losses;
  losses.set_all_weights(0.02);
  TrainingJob job;
  job.model = model;
  job.options.steps = 6;
  job.options.rows_per_batch = 2;
  job.options.learning_rate = 1e-2;
  job.options.log_every = 1;
  job.losses = make_routing_losses(losses, 8, 2);
  job.train_data = &data;
  job.sequence_length = 24;
  job.seed = 11;
  job.run_dir = run_dir;
  job.resolved_recipe = "recipe_version: 1\n";
  job.run_files = {{"residency.json", residency_json(in_loop_rule()).dump() + "\n"}};
  job.quiet = true;
  return job;
}

bool same_routers(MoeModel& a, MoeModel& b) {
  for (std::size_t i = 0; i < a->routers().size(); ++i) {
    if (!torch::equal(a->routers()[i], b->routers()[i])) {
      return false;
    }
  }
  return true;
}

LoadedRecipe<FinetuneRecipe> recipe_with(const TemporaryFolder& folder, const std::string& residency,
                                         const std::vector<std::string>& overrides = {}) {
  const auto path = folder.path() / "recipe.yaml";
  write_text_atomically(path, R"(recipe_version: 1
run_dir: runs/example
model: {path: checkpoints/tiny}
data:
  train: [alpha]
  evaluate: [alpha]
  corpora:
    - {domain: alpha, paths: [a.txt]}
)" + residency);
  return load_finetune_recipe(path, overrides);
}

}  // namespace

TEST_CASE("a run in the residency loop differs from a plain one and resumes bit-identically") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(5, 40, 24);
  MoeModel whole = tiny_model();
  train(job_in_loop(whole, data, folder.path() / "whole"));
  CHECK(read_residency(residency_path(folder.path() / "whole")).logit_range == in_loop_rule().logit_range);

  MoeModel plain = tiny_model();
  TrainingJob without = job_in_loop(plain, data, folder.path() / "plain");
  plain->set_selector(std::make_shared<TopKSelector>());
  train(without);
  CHECK_FALSE(same_routers(whole, plain));

  std::atomic<bool> stop{false};
  MoeModel interrupted = tiny_model();
  TrainingJob first = job_in_loop(interrupted, data, folder.path() / "halves");
  first.stop = &stop;
  first.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 3; };
  CHECK_THROWS_AS(train(first), InterruptedError);
  MoeModel resumed = tiny_model();
  TrainingJob second = job_in_loop(resumed, data, folder.path() / "halves");
  second.resume = true;
  train(second);
  CHECK(same_routers(whole, resumed));

  MoeModel checkpointed = tiny_model();
  checkpointed->set_activation_checkpointing(true);
  train(job_in_loop(checkpointed, data, folder.path() / "checkpointed"));
  for (std::size_t i = 0; i < whole->routers().size(); ++i) {
    CHECK(torch::allclose(whole->routers()[i], checkpointed->routers()[i], 1e-3, 1e-4));
  }
}

TEST_CASE("in the loop, lambda may grow and slots take turns, evaluations have the rule itself, and resuming goes on") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(5, 40, 24);
  const auto scheduled = [&](MoeModel& model, const std::string& name) {
    TrainingJob job = job_in_loop(model, data, folder.path() / name);
    job.residency = {std::make_shared<ResidencySelector>(in_loop_rule()), in_loop_rule(), 4, {2, 5, 3}};
    model->set_selector(job.residency.selector);
    return job;
  };
  MoeModel whole = tiny_model();
  TrainingJob job = scheduled(whole, "whole");
  std::vector<double> lambdas;
  std::vector<std::int64_t> slots;
  job.on_step = [&](const Json&) {
    lambdas.push_back(job.residency.selector->rule().lambda);
    slots.push_back(job.residency.selector->rule().slots);
  };
  train(job);
  REQUIRE(lambdas.size() == 6);
  for (std::size_t step = 1; step <= 6; ++step) {
    CHECK(lambdas[step - 1] == Approx(0.3 * std::min(1.0, static_cast<double>(step) / 4.0)));
  }
  CHECK(slots == std::vector<std::int64_t>{2, 5, 3, 2, 5, 3});
  CHECK(job.residency.selector->rule().lambda == 0.3);
  CHECK(job.residency.selector->rule().slots == 3);
  MoeModel steady = tiny_model();
  train(job_in_loop(steady, data, folder.path() / "steady"));
  CHECK_FALSE(same_routers(whole, steady));

  std::atomic<bool> stop{false};
  MoeModel interrupted = tiny_model();
  TrainingJob first = scheduled(interrupted, "halves");
  first.stop = &stop;
  first.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 3; };
  CHECK_THROWS_AS(train(first), InterruptedError);
  MoeModel resumed = tiny_model();
  TrainingJob second = scheduled(resumed, "halves");
  second.resume = true;
  train(second);
  CHECK(same_routers(whole, resumed));

  ResidencySelector selector(in_loop_rule());
  ResidencyRule bad = in_loop_rule();
  bad.slots = 0;
  CHECK_THROWS_AS(selector.set_rule(bad), std::invalid_argument);
  CHECK(selector.rule().slots == 3);
}

TEST_CASE("the logit range is the mean over real tokens, from the logits themselves") {
  at::set_num_threads(1);
  MoeModel model = tiny_model();
  const PackedData data = tiny_data(6, 9, 20);
  const double scale = GENERATE(1.0, 1000.0);  // the second far beyond what float32 probabilities can tell apart
  {
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& router : model->routers()) {
      router.mul_(scale);
    }
  }
  ResidencyRule rule;
  calibrate(rule, model, data, 24);
  std::vector<double> sums(2, 0.0);
  double tokens = 0.0;
  const torch::NoGradGuard no_grad;
  for (const TokenSequence& sequence : data.sequences) {
    const auto length = static_cast<std::int64_t>(sequence.tokens.size());
    const torch::Tensor ids =
        torch::tensor(std::vector<std::int64_t>(sequence.tokens.begin(), sequence.tokens.end())).unsqueeze(0);
    const ModelOutput output =
        model->forward({ids, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64)});
    for (std::size_t layer = 0; layer < 2; ++layer) {
      for (std::int64_t t = 0; t < length; ++t) {
        sums[layer] += (output.routing[layer].logits_TE[t].max() - output.routing[layer].logits_TE[t].min())
                           .to(torch::kFloat64)
                           .item<double>();
      }
    }
    tokens += static_cast<double>(length);
  }
  REQUIRE(rule.logit_range.size() == 2);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    CHECK(static_cast<double>(rule.logit_range[layer]) == Approx(sums[layer] / tokens).epsilon(1e-4));
  }
  if (scale > 1.0) {
    CHECK(rule.logit_range[0] > 100.0F);
  }
  CHECK(rule.calibration == std::to_string(data.num_tokens()) + " tokens of the training split of alpha, beta");
}

TEST_CASE("a calibration set holds the leading whole sequences of every domain") {
  PackedData data;
  data.domains = {"alpha", "beta"};
  for (const auto& [domain, length] :
       {std::pair(0, 5), std::pair(1, 30), std::pair(0, 4), std::pair(0, 2), std::pair(1, 3), std::pair(0, 1)}) {
    TokenSequence sequence;
    sequence.domain = domain;
    sequence.tokens.assign(static_cast<std::size_t>(length), 1);
    data.sequences.push_back(sequence);
  }
  const auto lengths = [&](std::int64_t tokens) {
    std::vector<std::size_t> found;
    for (const TokenSequence& sequence : calibration_data(data, tokens).sequences) {
      found.push_back(sequence.tokens.size());
    }
    return found;
  };
  CHECK(lengths(10) == std::vector<std::size_t>{5, 30, 4});  // at least one; nothing after what did not fit
  CHECK(lengths(9) == std::vector<std::size_t>{5, 30, 4});
  CHECK(lengths(100) == std::vector<std::size_t>{5, 30, 4, 2, 3, 1});
}

TEST_CASE("a residency rule survives its file, and a damaged one says what is wrong") {
  const TemporaryFolder folder;
  ResidencyRule rule = in_loop_rule();
  rule.calibration = "some text";
  const auto path = folder.path() / "residency.json";
  const auto write = [&](const std::function<void(Json&)>& change) {
    Json json = residency_json(rule);
    change(json);
    write_text_atomically(path, json.dump());
  };
  write([](Json&) {});
  const ResidencyRule read = read_residency(path);
  CHECK(read.lambda == rule.lambda);
  CHECK(read.always_keep == rule.always_keep);
  CHECK(read.slots == rule.slots);
  CHECK(read.policy == "lru");
  CHECK(read.calibration == "some text");
  CHECK(read.logit_range == rule.logit_range);
  CHECK(read.score == ResidencyScore::kLogit);
  rule.score = ResidencyScore::kWeight;
  write([](Json& json) { CHECK(json.at("score") == "weight"); });
  CHECK(read_residency(path).score == ResidencyScore::kWeight);
  rule.score = ResidencyScore::kRoot;
  write([](Json& json) { CHECK(json.at("score") == "root"); });
  CHECK(read_residency(path).score == ResidencyScore::kRoot);
  CHECK(lambda_text(rule) == "root lambda 0.3");
  rule.score = ResidencyScore::kWeight;
  // What was written before there was a choice.
  write([](Json& json) { json.erase("score"); });
  CHECK(read_residency(path).score == ResidencyScore::kLogit);
  write([](Json& json) { json["score"] = "weights"; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("score must be one of logit, weight, root, got \"weights\""));
  rule.layer_factors = {0.1, 1.75};
  write([](Json&) {});
  CHECK(read_residency(path).layer_factors == rule.layer_factors);
  write([](Json& json) { json.erase("layer_factors"); });
  CHECK(read_residency(path).layer_factors.empty());
  write([](Json& json) { json["layer_factors"] = {1.0, 0.5, 2.0}; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("layer_factors must have one number per MoE layer, as "
                                                          "logit_range has (2), got 3"));
  write([](Json& json) { json["layer_factors"] = {1.0, -0.5}; });
  CHECK_THROWS_WITH(read_residency(path),
                    Catch::Contains("layer_factors") && Catch::Contains("at least 0") && Catch::Contains("-0.5"));
  write([](Json& json) { json["layer_factors"] = "all"; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("\"layer_factors\" has the wrong type, got \"all\""));
  write([](Json& json) {
    json.erase("slots");
    json["lambda"] = "big";
    json["policy"] = "lfu";
  });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("\"slots\" is missing") &&
                                              Catch::Contains("\"lambda\" has the wrong type, got \"big\"") &&
                                              Catch::Contains("policy must be lru, got \"lfu\""));
  write([](Json& json) { json["logit_range"] = {1.0, -2.0}; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("must be finite and at least 0"));
  write([](Json& json) { json["format_version"] = 4; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("format version 4") && Catch::Contains("(1 to 3)"));
  // A program that does not know of it must not pass over it.
  write([](Json& json) { CHECK(json.at("format_version") == 1); });
  CHECK_FALSE(read_residency(path).preserve_mass);
  rule.preserve_mass = true;
  write([](Json& json) { CHECK(json.at("format_version") == 2); });
  CHECK(read_residency(path).preserve_mass);
  CHECK(lambda_text(rule) == "weight lambda 0.3 by layer, mass preserved");
  write([](Json& json) { json.erase("preserve_mass"); });
  CHECK_FALSE(read_residency(path).preserve_mass);
  write([](Json& json) { json["preserve_mass"] = 1.5; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("\"preserve_mass\" has the wrong type, got 1.5"));
}

TEST_CASE("a scope survives the rule's file, and a damaged one says what is wrong") {
  const TemporaryFolder folder;
  ResidencyRule rule = in_loop_rule();
  const auto path = folder.path() / "residency.json";
  const auto write = [&](const std::function<void(Json&)>& change) {
    Json json = residency_json(rule);
    change(json);
    write_text_atomically(path, json.dump());
  };
  write([](Json& json) { CHECK(json.at("scope").is_null()); });
  CHECK(read_residency(path).scope.everywhere());
  write([](Json& json) { json.erase("scope"); });  // what was written before there was one
  CHECK(read_residency(path).scope.everywhere());
  rule.scope.domains = {"python", "kernel"};
  rule.scope.elsewhere = 0.8;
  rule.scope.window = 32;
  rule.scope.keep = 0.9;
  rule.scope.weights = {{0.1F, -2.5F, 1e-7F}, {3.0F, 0.0F, 0.7F}};
  rule.scope.offsets = {0.3F, -0.2F};
  write([](Json& json) { CHECK(json.at("format_version") == 3); });
  CHECK(read_residency(path).scope == rule.scope);
  CHECK(lambda_text(rule) == "lambda 0.3, for python and kernel (elsewhere times 0.8)");
  const auto refused = [&](const std::function<void(Json&)>& change, const std::string& part) {
    write([&](Json& json) { change(json.at("scope")); });
    CHECK_THROWS_WITH(read_residency(path), Catch::Contains(path.string()) && Catch::Contains(part));
  };
  refused([](Json& scope) { scope.erase("window"); }, "scope: key \"window\" is missing");
  refused([](Json& scope) { scope["weights"] = "all"; }, "scope: key \"weights\" has the wrong type");
  refused([](Json& scope) { scope["weights"].erase(0); }, "for each of the 2 MoE layers");
  refused([](Json& scope) { scope["weights"][1].erase(0); }, "as many weights as experts");
  refused([](Json& scope) { scope["offsets"].push_back(1.0); }, "an offset and");
  refused([](Json& scope) { scope["elsewhere"] = 1.5; }, "an elsewhere from 0 to 1");
  refused([](Json& scope) { scope["domains"] = Json::array(); }, "must name domains");
  write([](Json& json) { json["lambda"] = -1.0; });
  CHECK_THROWS_WITH(read_residency(path), Catch::Contains("got {") && !Catch::Contains("weights"));
  refused([](Json& scope) { scope = 7; }, "scope: key \"domains\" is missing");
  Architecture architecture = hestia::testing::tiny_architecture();
  CHECK_THROWS_WITH(
      check_scope(rule, architecture, "bundle"),
      Catch::Contains("bundle: the bundle's residency scope is of 2 MoE layers of 3 experts, the model has 2 "
                      "of 8; give the bundle of this model"));
  architecture.num_experts = 3;
  CHECK_NOTHROW(check_scope(rule, architecture, "bundle"));
  rule.scope.weights[1].push_back(1.0F);
  CHECK_THROWS_AS(check_scope(rule, architecture, "bundle"), InputError);
  rule.scope.weights[1].pop_back();
  architecture.num_groups = 3;
  CHECK_THROWS_WITH(
      check_scope(rule, architecture, "bundle"),
      Catch::Contains("bundle: residency.scope does not go with a model that leaves groups of experts out"));
}

TEST_CASE("a scope is Fisher's discriminant of the routers' logits, and keeps the share of its own text") {
  at::set_num_threads(1);
  MoeModel model = tiny_model();
  // Two kinds of text: small tokens and large ones, with some of the others in between.
  PackedData data;
  data.domains = {"alpha", "beta", "gamma"};
  SplitMix64 random(4);
  for (int i = 0; i < 60; ++i) {
    TokenSequence sequence;
    sequence.domain = i % 3;
    const std::uint64_t first = sequence.domain == 1 ? 20 : 0;
    for (int t = 0; t < 5 + i % 19; ++t) {
      sequence.tokens.push_back(
          static_cast<std::int32_t>(random.uniform() < 0.2 ? random.below(48) : first + random.below(20)));
    }
    data.sequences.push_back(std::move(sequence));
  }
  ResidencyRule rule = in_loop_rule();
  rule.scope.domains = {"beta"};
  rule.scope.window = 4;
  rule.scope.keep = GENERATE(0.5, 0.97);
  rule.logit_range.clear();
  calibrate(rule, model, data, 24);
  REQUIRE(rule.scope.weights.size() == 2);
  const torch::NoGradGuard no_grad;
  const auto logits_of = [&](const TokenSequence& sequence, std::size_t layer) {
    const auto length = static_cast<std::int64_t>(sequence.tokens.size());
    const torch::Tensor ids =
        torch::tensor(std::vector<std::int64_t>(sequence.tokens.begin(), sequence.tokens.end())).unsqueeze(0);
    return model->forward({ids, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64)})
        .routing[layer]
        .logits_TE.to(torch::kFloat64);
  };
  for (std::size_t layer = 0; layer < 2; ++layer) {
    // The definition on all logits at once.
    std::array<std::vector<torch::Tensor>, 2> logits;
    for (std::size_t i = 0; i < data.sequences.size(); ++i) {
      if (i / 3 % 2 == 0) {  // every other one of its domain
        logits[data.sequences[i].domain == 1 ? 1 : 0].push_back(logits_of(data.sequences[i], layer));
      }
    }
    const torch::Tensor outside = torch::cat(logits[0]);
    const torch::Tensor inside = torch::cat(logits[1]);
    const auto covariance = [](const torch::Tensor& z) {
      const torch::Tensor centred = z - z.mean(0);
      return centred.t().matmul(centred) / z.size(0);
    };
    torch::Tensor within = (covariance(outside) + covariance(inside)) / 2;
    within = within + torch::eye(8, torch::kFloat64) * 0.01 * within.diagonal().mean();
    const torch::Tensor expected = torch::linalg_solve(within, inside.mean(0) - outside.mean(0));
    const torch::Tensor found = torch::tensor(rule.scope.weights[layer]).to(torch::kFloat64);
    CHECK(((found - expected).norm() / expected.norm()).item<double>() < 1e-4);
    // The shares that it keeps and lets in.
    double kept = 0.0;
    double let_in = 0.0;
    double own = 0.0;
    double others = 0.0;
    for (std::size_t i = 0; i < data.sequences.size(); ++i) {
      const TokenSequence& sequence = data.sequences[i];
      if (i / 3 % 2 == 0) {
        continue;
      }
      const torch::Tensor z = logits_of(sequence, layer).to(torch::kFloat32).contiguous();
      (sequence.domain == 1 ? own : others) += static_cast<double>(z.size(0));
      const std::int64_t begin = 0;
      const std::int64_t end = z.size(0);
      std::vector<float> strength(static_cast<std::size_t>(end));
      scope_strengths(rule.scope, static_cast<std::int64_t>(layer), z.const_data_ptr<float>(), &begin, &end, 1,
                      strength.data());
      (sequence.domain == 1 ? kept : let_in) += static_cast<double>(std::count(strength.begin(), strength.end(), 1.0F));
    }
    kept /= own;
    let_in /= others;
    CHECK(kept >= rule.scope.keep);
    CHECK(let_in < kept - 0.3);
    if (rule.scope.keep == 0.97) {
      CHECK(kept < 0.99);
    }
  }
}

TEST_CASE("the recipe's residency section is checked with its line") {
  const TemporaryFolder folder;
  Architecture architecture = hestia::testing::tiny_architecture();  // 8 experts, 2 per token
  const auto rule = residency_rule(recipe_with(folder, "residency: {lambda: 0.2, always_keep: 1}\n"), architecture);
  CHECK(rule.lambda == 0.2);
  CHECK(rule.always_keep == 1);
  CHECK(rule.slots == 2);
  CHECK(rule.score == ResidencyScore::kLogit);
  CHECK(residency_rule(recipe_with(folder, "residency: {lambda: 0.05, always_keep: 1, score: weight}\n"), architecture)
            .score == ResidencyScore::kWeight);
  CHECK_THROWS_WITH(recipe_with(folder, "residency:\n  score: weigth\n"),
                    Catch::Contains(":10: residency.score") && Catch::Contains("logit") && Catch::Contains("weight"));
  CHECK_THROWS_WITH(recipe_with(folder, "evaluate:\n  residency_prior: {weight_lambdas: [0.05], always_keep: []}\n"),
                    Catch::Contains("evaluate.residency_prior.always_keep must name at least one value"));
  CHECK(residency_rule(recipe_with(folder, "", {"losses.cache_simulation.slots=5"}), architecture).slots == 5);
  CHECK(residency_rule(recipe_with(folder, "", {"residency.slots=6", "losses.cache_simulation.slots=5"}), architecture)
            .slots == 6);
  CHECK(rule.layer_factors.empty());
  CHECK_FALSE(rule.preserve_mass);
  CHECK(residency_rule(recipe_with(folder, "residency: {always_keep: 1, preserve_mass: true}\n"), architecture)
            .preserve_mass);
  CHECK(residency_rule(recipe_with(folder, "residency: {always_keep: 1, layer_factors: [0, 1.5]}\n"), architecture)
            .layer_factors == std::vector<double>{0.0, 1.5});
  CHECK_THROWS_WITH(
      residency_rule(recipe_with(folder, "residency: {always_keep: 1, layer_factors: [1, 2, 3]}\n"), architecture),
      Catch::Contains(":9: residency.layer_factors must have one number per MoE layer (2), got 3"));
  CHECK_THROWS_WITH(recipe_with(folder, "residency: {layer_factors: [1, -2]}\n"),
                    Catch::Contains(":9: residency.layer_factors") && Catch::Contains("got -2"));
  CHECK_THROWS_WITH(recipe_with(folder, "evaluate:\n  residency_prior: {layer_factors: [-1, 1]}\n"),
                    Catch::Contains(":10: evaluate.residency_prior.layer_factors") && Catch::Contains("got -1"));
  CHECK_THROWS_WITH(recipe_with(folder, "residency:\n  lambda: 0.2\n  policy: lfu\n"),
                    Catch::Contains(":11: residency.policy") && Catch::Contains("lru") && Catch::Contains("lfu"));
  CHECK_THROWS_WITH(recipe_with(folder, "residency:\n  in_loop: true\n"),
                    Catch::Contains("residency.lambda must be above 0 when residency.in_loop is true"));
  CHECK_THROWS_WITH(recipe_with(folder, "residency: {lambda: 0.2, ramp_steps: 5, train_slots: [2, 3]}\n"),
                    Catch::Contains(":9: residency.ramp_steps only counts in training") &&
                        Catch::Contains(":9: residency.train_slots only counts in training"));
  CHECK_THROWS_WITH(
      residency_rule(recipe_with(folder, "residency: {lambda: 0.2, always_keep: 1, in_loop: true, train_slots: [9]}\n"),
                     architecture),
      Catch::Contains(":9: residency.train_slots must be at most the model's experts per layer (8), got 9"));
  CHECK_THROWS_WITH(recipe_with(folder, "residency: {lambda: -0.5}\n"),
                    Catch::Contains(":9: residency.lambda must be") && Catch::Contains("got -0.5"));
  CHECK_THROWS_WITH(recipe_with(folder, "evaluate:\n  residency_prior: {lambdas: [0.1, 0]}\n"),
                    Catch::Contains(":10: evaluate.residency_prior.lambdas") && Catch::Contains("got 0"));
  CHECK_THROWS_WITH(recipe_with(folder, "evaluate:\n  residency_prior: {lambdas: [0.1], always_keep: []}\n"),
                    Catch::Contains("evaluate.residency_prior.always_keep must name at least one value"));
  // What annealing leaves is what the rule chooses from; a rule that is off chooses nothing.
  architecture.top_k = 4;
  const std::vector<std::string> annealing = {"train.top_k_annealing.step=1", "train.top_k_annealing.top_k=2"};
  CHECK_NOTHROW(residency_rule(recipe_with(folder, "residency: {lambda: 0.2, always_keep: 2}\n"), architecture));
  CHECK_THROWS_WITH(
      residency_rule(recipe_with(folder, "residency: {lambda: 0.2, always_keep: 2}\n", annealing), architecture),
      Catch::Contains(":9: residency.always_keep must be below the annealed experts per token (2), got 2"));
  CHECK_NOTHROW(residency_rule(recipe_with(folder, "residency: {always_keep: 4}\n", annealing), architecture));
  architecture.top_k = 2;
  CHECK_THROWS_WITH(residency_rule(recipe_with(folder, "residency: {slots: 9}\n"), architecture),
                    Catch::Contains(":9: residency.slots must be at most the model's experts per layer (8), got 9"));
  CHECK_THROWS_WITH(residency_rule(recipe_with(folder, "residency: {lambda: 0.1, in_loop: true}\n"), architecture),
                    Catch::Contains("residency.always_keep must be below the model's experts per token (2)") &&
                        Catch::Contains("got 2"));
}
