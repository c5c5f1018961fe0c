#include "hestia/trainer/trainer.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <string_view>

#include <fmt/format.h>
#include <torch/cuda.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/trainer/distillation.hpp"
#include "hestia/trainer/measure.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_data;
using hestia::testing::tiny_model;

namespace {

TrainOptions short_run(std::int64_t steps) {
  TrainOptions options;
  options.steps = steps;
  options.rows_per_batch = 2;
  options.learning_rate = 1e-2;
  options.log_every = 1;
  return options;
}

RoutingLossOptions all_losses() {
  RoutingLossOptions losses;
  losses.set_all_weights(0.02);
  losses.cache_simulation.weight = 0.1;
  losses.rank_matching.weight = 0.01;
  losses.reuse.weight = 0.3;
  losses.trust.weight = 0.1;
  losses.load_balance.weight = 0.01;
  return losses;
}

TrainingJob make_job(MoeModel& model, const PackedData& data, const TrainOptions& options,
                     const std::filesystem::path& run_dir) {
  model->keep_reference_routers();
  TrainingJob job;
  job.model = model;
  job.options = options;
  job.losses = make_routing_losses(all_losses(), 8, 2);
  job.train_data = &data;
  job.sequence_length = 24;
  job.seed = 11;
  job.run_dir = run_dir;
  job.resolved_recipe = "recipe_version: 1\n";
  job.quiet = true;
  return job;
}

// The model that a run of this trainable set starts from.
MoeModel model_to_train(const std::string& trainable) {
  MoeModel model = tiny_model();
  if (trainable == "router+lora") {
    create_adapters(model, {4, 8.0}, 21);
  }
  return model;
}

bool same_tensors(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(),
                    [](const torch::Tensor& x, const torch::Tensor& y) { return torch::equal(x, y); });
}

bool same_routers(MoeModel& a, MoeModel& b) {
  return same_tensors(a->routers(), b->routers());
}

}  // namespace

TEST_CASE("the learning rate warms up and falls as the schedule says") {
  TrainOptions options = short_run(10);
  options.warmup_steps = 2;
  CHECK(learning_rate_at(options, 1) == Approx(0.5));
  CHECK(learning_rate_at(options, 2) == Approx(1.0));
  CHECK(learning_rate_at(options, 3) == Approx(1.0));
  CHECK(learning_rate_at(options, 7) == Approx(0.5));
  CHECK(learning_rate_at(options, 10) == Approx(0.125));
  options.schedule = "cosine";
  CHECK(learning_rate_at(options, 7) == Approx(0.5));
  options.final_learning_rate = 0.2;
  CHECK(learning_rate_at(options, 7) == Approx(0.6));
  options.decay_steps = 6;
  CHECK(learning_rate_at(options, 5) == Approx(0.6));
  CHECK(learning_rate_at(options, 7) == Approx(0.2));
  CHECK(learning_rate_at(options, 10) == Approx(0.2));
  options.decay_steps = options.warmup_steps;  // nothing lies between
  CHECK(learning_rate_at(options, 2) == Approx(1.0));
  CHECK(learning_rate_at(options, 3) == Approx(0.2));
  options.schedule = "constant";
  CHECK(learning_rate_at(options, 10) == Approx(1.0));
}

TEST_CASE("only what is in the trainable set moves, and the loss falls") {
  const TemporaryFolder folder;
  const std::string trainable = GENERATE(std::string("router"), std::string("router+lora"));
  MoeModel model = model_to_train(trainable);
  std::vector<torch::Tensor> adapters_before;
  for (const torch::Tensor& tensor : model->adapters()) {
    adapters_before.push_back(tensor.clone());
  }
  const PackedData data = tiny_data(1, 64, 24);
  std::vector<torch::Tensor> before;
  for (const auto& [name, tensor] : model->named_tensors()) {
    before.push_back(tensor.detach().clone());
  }
  TrainOptions options = short_run(30);
  options.trainable = trainable;
  TrainingJob job = make_job(model, data, options, folder.path() / "run");
  std::vector<double> reuse;
  job.on_step = [&](const Json& event) { reuse.push_back(event.at("reuse").get<double>()); };
  train(job);
  std::size_t i = 0;
  for (const auto& [name, tensor] : model->named_tensors()) {
    INFO(name);
    const bool router = name.find("mlp.gate.weight") != std::string::npos;
    CHECK(torch::equal(tensor, before[i++]) == !router);
  }
  REQUIRE(reuse.size() == 30);
  CHECK(reuse[27] + reuse[28] + reuse[29] < reuse[0] + reuse[1] + reuse[2]);
  const std::vector<torch::Tensor> adapters = model->adapters();
  REQUIRE(adapters.size() == (trainable == "router" ? 0 : 2 * 4));
  for (std::size_t place = 0; place < adapters.size(); ++place) {
    CHECK_FALSE(torch::equal(adapters[place], adapters_before[place]));
  }
  for (const torch::Tensor& parameter : model->all_parameters()) {
    CHECK_FALSE(parameter.grad().defined());
  }
}

TEST_CASE("the trainable set is its name's, in a fixed order, and nothing else keeps a gradient") {
  MoeModel model = tiny_model();
  CHECK_THROWS_WITH(select_trainable(model, "router+lora"), Catch::Contains("needs a model with adapters"));
  CHECK_THROWS_WITH(select_trainable(model, "experts"), Catch::Contains("\"experts\""));
  create_adapters(model, {4, 8.0}, 21);
  const auto num_trainable = [&] {
    std::size_t count = 0;
    for (const std::vector<torch::Tensor>& list : {model->all_parameters(), model->adapters()}) {
      for (const torch::Tensor& tensor : list) {
        count += tensor.requires_grad() ? 1 : 0;
      }
    }
    return count;
  };
  const std::vector<torch::Tensor> both = select_trainable(model, "router+lora");
  REQUIRE(both.size() == 2 + 2 * 4);
  CHECK(num_trainable() == both.size());
  CHECK(both[1].is_same(model->routers()[1]));
  CHECK(both[2].is_same(model->adapters()[0]));
  CHECK(both.back().is_same(model->adapters().back()));
  CHECK(select_trainable(model, "all").size() == model->all_parameters().size());
  CHECK(num_trainable() == model->all_parameters().size());
  CHECK(select_trainable(model, "router").size() == 2);
  CHECK(num_trainable() == 2);
}

TEST_CASE("adapters of a bfloat16 model train on float32 masters, whose rounding they are") {
  const TemporaryFolder folder;
  MoeModel model = tiny_model(3, torch::kBFloat16);
  create_adapters(model, {4, 8.0}, 21);
  const PackedData data = tiny_data(1, 64, 24);
  TrainOptions options = short_run(4);
  options.trainable = "router+lora";
  options.learning_rate = 1e-4;  // a hundredth of what bfloat16 keeps of the values in A
  train(make_job(model, data, options, folder.path() / "run"));
  const SafetensorsFile state(folder.path() / "run" / "checkpoints" / "step_4" / "optimizer.safetensors");
  MoeModel start = tiny_model(3, torch::kBFloat16);
  create_adapters(start, {4, 8.0}, 21);
  for (std::size_t i = 0; i < model->adapters().size(); ++i) {
    const torch::Tensor master = to_torch(state.tensor(fmt::format("master.{}", 2 + i)));
    CHECK(master.scalar_type() == torch::kFloat32);
    CHECK(torch::equal(master.to(torch::kBFloat16), model->adapters()[i]));
    CHECK_FALSE(torch::equal(master, start->adapters()[i].to(torch::kFloat32)));
  }
}

TEST_CASE("pretraining moves every parameter and learns the pattern") {
  const TemporaryFolder folder;
  MoeModel model = tiny_model();
  const PackedData data = tiny_data(2, 64, 24);
  std::vector<torch::Tensor> before;
  for (torch::Tensor& parameter : model->all_parameters()) {
    before.push_back(parameter.detach().clone());
  }
  TrainOptions options = short_run(40);
  options.trainable = "all";
  options.weight_decay = 0.01;
  TrainingJob job = make_job(model, data, options, folder.path() / "run");
  std::vector<double> nll;
  job.on_step = [&](const Json& event) { nll.push_back(event.at("nll").get<double>()); };
  train(job);
  const auto after = model->all_parameters();
  for (std::size_t i = 0; i < after.size(); ++i) {
    CHECK_FALSE(torch::equal(after[i], before[i]));
  }
  CHECK(nll.back() < 0.9 * nll.front());
}

TEST_CASE("a resumed run is bit-identical to one that never stopped") {
  const TemporaryFolder folder;
  const std::string trainable = GENERATE(std::string("router"), std::string("router+lora"), std::string("all"));
  // Not at all, before, at, right after and after the interruption at step 3.
  const std::int64_t annealing = GENERATE(0, 2, 3, 4, 6);
  CAPTURE(trainable, annealing);
  const PackedData data = tiny_data(5, 40, 24);
  TrainOptions options = short_run(7);
  options.trainable = trainable;
  options.warmup_steps = 2;
  options.accumulate = 2;
  if (annealing > 0) {
    options.top_k_annealing = {annealing, 1};
  }

  MoeModel whole = model_to_train(trainable);
  train(make_job(whole, data, options, folder.path() / "whole"));

  std::atomic<bool> stop{false};
  MoeModel interrupted = model_to_train(trainable);
  TrainingJob first = make_job(interrupted, data, options, folder.path() / "halves");
  first.stop = &stop;
  first.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 3; };
  CHECK_THROWS_AS(train(first), InterruptedError);
  // What a full disk leaves of a line.
  std::ofstream(folder.path() / "halves" / "metrics.jsonl", std::ios::app) << R"({"event": "st)";

  MoeModel resumed = model_to_train(trainable);
  TrainingJob second = make_job(resumed, data, options, folder.path() / "halves");
  second.resume = true;
  const TrainingResult result = train(second);
  CHECK(result.steps == 7);
  CHECK(same_routers(whole, resumed));
  CHECK(same_tensors(whole->adapters(), resumed->adapters()));
  CHECK(same_tensors(whole->all_parameters(), resumed->all_parameters()));
  CHECK(resumed->architecture().top_k == (annealing > 0 ? 1 : 2));
  // The log reads as one run.
  std::vector<std::int64_t> steps;
  std::vector<std::int64_t> starts;
  read_json_lines(folder.path() / "halves" / "metrics.jsonl", [&](std::int64_t line, const Json& event) {
    if (event.at("event") == "start") {
      starts.push_back(line);
      return;
    }
    const auto step = event.at("step").get<std::int64_t>();
    steps.push_back(step);
    CHECK(event.at("top_k") == (annealing > 0 && step >= annealing ? 1 : 2));
  });
  CHECK(starts == std::vector<std::int64_t>{1});
  CHECK(steps == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6, 7});

  // What the last checkpoint holds, put onto a fresh base, is the tuned model; adapters of another run give way.
  if (trainable != "all") {
    MoeModel loaded = tiny_model();
    create_adapters(loaded, {2, 1.0}, 1);
    load_checkpoint_weights(loaded, folder.path() / "halves" / "checkpoints" / "step_7");
    CHECK(same_routers(whole, loaded));
    CHECK(same_tensors(whole->adapters(), loaded->adapters()));
    CHECK(loaded->architecture().top_k == whole->architecture().top_k);
  }
}

TEST_CASE("an evaluation that was due when the run was stopped comes when it goes on, and once") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(4, 24, 24);
  TrainOptions options = short_run(5);
  options.evaluate_every = 1;
  std::atomic<bool> stop{false};
  MoeModel model = tiny_model();
  TrainingJob job = make_job(model, data, options, folder.path() / "run");
  job.held_out = &data;
  job.stop = &stop;
  job.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 3; };
  CHECK_THROWS_AS(train(job), InterruptedError);
  const auto evaluations = [&] {
    std::map<std::int64_t, Json> found;
    std::size_t number = 0;
    read_json_lines(folder.path() / "run" / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "evaluate") {
        found[event.at("step").get<std::int64_t>()] = event.at("held_out");
        ++number;
      }
    });
    CHECK(number == found.size());
    return found;
  };
  CHECK(evaluations().size() == 2);
  stop = false;
  MoeModel again = tiny_model();
  TrainingJob rest = make_job(again, data, options, folder.path() / "run");
  rest.held_out = &data;
  rest.resume = true;
  train(rest);
  MoeModel whole = tiny_model();
  TrainingJob never = make_job(whole, data, options, folder.path() / "whole");
  never.held_out = &data;
  train(never);
  std::map<std::int64_t, Json> expected;
  read_json_lines(folder.path() / "whole" / "metrics.jsonl", [&](std::int64_t, const Json& event) {
    if (event.at("event") == "evaluate") {
      expected[event.at("step").get<std::int64_t>()] = event.at("held_out");
    }
  });
  CHECK(expected.size() == 5);
  CHECK(evaluations() == expected);
}

TEST_CASE("a run that is stopped in its last step is a whole run") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(5, 20, 24);
  MoeModel model = tiny_model();
  std::atomic<bool> stop{false};
  TrainingJob job = make_job(model, data, short_run(2), folder.path() / "run");
  job.held_out = &data;
  job.stop = &stop;
  job.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 2; };
  CHECK(train(job).steps == 2);
  Json last;
  read_json_lines(folder.path() / "run" / "metrics.jsonl", [&](std::int64_t, const Json& event) { last = event; });
  CHECK(last.at("event") == "evaluate");
  CHECK(last.at("step") == 2);
}

TEST_CASE("weight decay is for matrices, not for biases that experts have stacked in one tensor") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(5, 20, 24);
  const auto trained = [&](double weight_decay) {
    MoeModel model = create_model(hestia::testing::tiny_architecture("gpt_oss"), torch::kFloat32, torch::kCPU, 3);
    hestia::testing::move_vectors(model);
    {
      const torch::NoGradGuard no_grad;
      for (auto& [name, tensor] : model->named_tensors()) {
        if (tensor.dim() == 2 && name.ends_with("bias")) {
          tensor.add_(0.5);
        }
      }
    }
    TrainOptions options = short_run(1);
    options.trainable = "all";
    options.weight_decay = weight_decay;
    TrainingJob job = make_job(model, data, options, folder.path() / fmt::format("run_{}", weight_decay));
    train(job);
    return model;
  };
  MoeModel plain = trained(0.0);
  MoeModel decayed = trained(0.9);
  std::size_t stacked = 0;
  const auto tensors = plain->named_tensors();
  const auto others = decayed->named_tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, tensor] = tensors[i];
    INFO(name);
    const bool matrix = tensor.dim() >= 2 && !name.ends_with("bias");
    CHECK(torch::equal(tensor, others[i].second) != matrix);
    stacked += tensor.dim() == 2 && !matrix ? 1 : 0;
  }
  CHECK(stacked == 2 * 2);  // of gate with up and of down, in two layers
}

TEST_CASE("from the annealing step on, K' experts are the K of forward and losses, to the bit") {
  TrainOptions options = short_run(5);
  options.top_k_annealing = {3, 1};
  CHECK(top_k_at(options, 1, 2) == 2);
  CHECK(top_k_at(options, 2, 2) == 2);
  CHECK(top_k_at(options, 3, 2) == 1);
  CHECK(top_k_at(options, 5, 2) == 1);
  CHECK(top_k_at(short_run(5), 5, 2) == 2);

  const PackedData data = tiny_data(5, 40, 24);
  const auto run = [&](MoeModel& model, const TrainOptions& how) {
    const TemporaryFolder folder;
    TrainingJob job = make_job(model, data, how, folder.path() / "run");
    std::vector<Json> events;
    job.on_step = [&](const Json& event) {
      events.push_back(event);
      for (const char* key : {"seconds", "tokens"}) {
        events.back().erase(key);
      }
    };
    train(job);
    return events;
  };
  // Annealed from the first step, a model of K 2 is the one of K 1 that has the same weights.
  options.top_k_annealing.step = 1;
  MoeModel annealed = tiny_model();
  const std::vector<Json> events = run(annealed, options);
  Architecture architecture = hestia::testing::tiny_architecture();
  architecture.top_k = 1;
  MoeModel narrow = create_model(architecture, torch::kFloat32, torch::kCPU, 3);
  CHECK(events == run(narrow, short_run(5)));
  CHECK(same_routers(annealed, narrow));
  // Every term that has K in it is another number than at K 2.
  MoeModel wide = tiny_model();
  const std::vector<Json> unchanged = run(wide, short_run(5));
  for (const char* term : {"cache_simulation", "reuse", "load_balance"}) {
    INFO(term);
    CHECK(std::abs(events[0].at(term).get<double>() - unchanged[0].at(term).get<double>()) > 1e-4);
  }
  // Before the step nothing differs, from it on everything does.
  options.top_k_annealing.step = 3;
  MoeModel later = tiny_model();
  const std::vector<Json> switched = run(later, options);
  CHECK(switched[0] == unchanged[0]);
  CHECK(switched[1] == unchanged[1]);
  CHECK(switched[2].at("top_k") == 1);
  CHECK(switched[2].at("nll") != unchanged[2].at("nll"));
}

TEST_CASE("accumulating micro-batches equals one large batch") {
  const TemporaryFolder folder;
  // One sequence per row, so that both runs see the same rows in the same order.
  PackedData data = tiny_data(9, 16, 24);
  for (TokenSequence& sequence : data.sequences) {
    sequence.tokens.resize(24, 7);
    sequence.domain = 0;
  }
  data.domains = {"alpha"};
  TrainOptions large = short_run(2);
  large.rows_per_batch = 4;
  TrainOptions small = large;
  small.rows_per_batch = 1;
  small.accumulate = 4;
  MoeModel a = tiny_model();
  MoeModel b = tiny_model();
  std::vector<Json> events_a;
  std::vector<Json> events_b;
  TrainingJob job_a = make_job(a, data, large, folder.path() / "large");
  TrainingJob job_b = make_job(b, data, small, folder.path() / "small");
  // Load balance is per micro-batch by definition; every other term must agree.
  RoutingLossOptions losses = all_losses();
  losses.load_balance.weight = 0.0;
  job_a.losses = make_routing_losses(losses, 8, 2);
  job_b.losses = make_routing_losses(losses, 8, 2);
  job_a.on_step = [&](const Json& event) { events_a.push_back(event); };
  job_b.on_step = [&](const Json& event) { events_b.push_back(event); };
  train(job_a);
  train(job_b);
  REQUIRE(events_a.size() == events_b.size());
  std::vector<std::string> names = routing_loss_names();
  REQUIRE(names.back() == "load_balance");
  names.back() = "gradient_norm";
  names.insert(names.end(), {"loss", "nll"});
  for (const std::string& name : names) {
    INFO(name);
    CHECK(events_a[0].at(name).get<double>() == Approx(events_b[0].at(name).get<double>()).epsilon(1e-4));
  }
  const auto routers_a = a->routers();
  const auto routers_b = b->routers();
  for (std::size_t i = 0; i < routers_a.size(); ++i) {
    CHECK(torch::allclose(routers_a[i], routers_b[i], 1e-3, 1e-4));
  }
}

TEST_CASE("a non-finite loss stops the run before the update") {
  const TemporaryFolder folder;
  MoeModel model = tiny_model();
  const PackedData data = tiny_data(4, 16, 24);
  {
    const torch::NoGradGuard no_grad;
    model->routers()[1].index_put_({0, 0}, std::numeric_limits<float>::quiet_NaN());
  }
  const torch::Tensor before = model->routers()[0].detach().clone();
  TrainingJob job = make_job(model, data, short_run(3), folder.path() / "run");
  CHECK_THROWS_WITH(
      train(job), Catch::Contains("step 1") && Catch::Contains("not finite") && Catch::Contains("nothing was updated"));
  CHECK(torch::equal(model->routers()[0], before));
}

TEST_CASE("a run directory is never overwritten silently") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(4, 16, 24);
  MoeModel model = tiny_model();
  const TrainingJob job = make_job(model, data, short_run(2), folder.path() / "run");
  train(job);
  CHECK_THROWS_WITH(train(job), Catch::Contains("holds a run already") && Catch::Contains("--resume"));
  TrainingJob again = job;
  again.overwrite = true;
  CHECK_NOTHROW(train(again));
  TrainingJob other = job;
  other.resume = true;
  other.resolved_recipe = "recipe_version: 1\nseed: 2\n";
  CHECK_THROWS_WITH(train(other), Catch::Contains("the recipe changed") && Catch::Contains("seed: 2"));
  TrainingJob nothing = job;
  nothing.resume = true;
  nothing.run_dir = folder.path() / "elsewhere";
  CHECK_THROWS_WITH(train(nothing), Catch::Contains("no checkpoint to resume from"));
}

TEST_CASE("a checkpoint counts only when it is complete, and old ones are removed") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(4, 16, 24);
  MoeModel model = tiny_model();
  TrainOptions options = short_run(6);
  options.checkpoint_every = 1;
  options.keep_checkpoints = 2;
  train(make_job(model, data, options, folder.path() / "run"));
  const auto checkpoints = folder.path() / "run" / "checkpoints";
  CHECK(std::filesystem::exists(checkpoints / "step_6" / "DONE"));
  CHECK(std::filesystem::exists(checkpoints / "step_5"));
  CHECK_FALSE(std::filesystem::exists(checkpoints / "step_4"));
  std::filesystem::remove(checkpoints / "step_6" / "DONE");
  REQUIRE(latest_checkpoint(folder.path() / "run"));
  CHECK(latest_checkpoint(folder.path() / "run")->first == 5);
}

TEST_CASE("a checkpoint of another format or with a damaged state is refused before anything changes") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(4, 16, 24);
  MoeModel model = tiny_model();
  TrainOptions options = short_run(4);
  options.checkpoint_every = 2;
  std::atomic<bool> stop{false};
  TrainingJob job = make_job(model, data, options, folder.path() / "run");
  job.stop = &stop;
  job.on_step = [&](const Json& event) { stop = event.at("step").get<std::int64_t>() == 2; };
  CHECK_THROWS_AS(train(job), InterruptedError);
  const auto state_path = folder.path() / "run" / "checkpoints" / "step_2" / "state.json";
  const Json state = read_json_file(state_path);

  const auto [key, value, message] = GENERATE(table<std::string, std::string, std::string>(
      {{"format_version", "2", "state.json: format version 2 is not one this program supports (1); resume with"},
       {"format_version", "\"1\"", "state.json: key \"format_version\" must be a whole number, got \"1\"; remove"},
       {"data_position", "", "state.json: key \"data_position\" must be a whole number, got nothing; remove"}}));
  Json changed = state;
  if (value.empty()) {
    changed.erase(key);
  } else {
    changed[key] = Json::parse(value);
  }
  write_text_atomically(state_path, changed.dump());
  MoeModel resumed = tiny_model();
  MoeModel untouched = tiny_model();
  TrainingJob second = make_job(resumed, data, options, folder.path() / "run");
  second.resume = true;
  CHECK_THROWS_WITH(train(second), Catch::Contains(message));
  CHECK(torch::equal(resumed->routers()[0], untouched->routers()[0]));
}

TEST_CASE("a checkpoint whose K is not of the model is refused, one from before annealing has the base's") {
  const TemporaryFolder folder;
  const PackedData data = tiny_data(4, 16, 24);
  MoeModel model = tiny_model();
  train(make_job(model, data, short_run(1), folder.path() / "run"));
  const auto checkpoint = folder.path() / "run" / "checkpoints" / "step_1";
  Json state = read_json_file(checkpoint / "state.json");
  CHECK(state.at("top_k") == 2);
  state["top_k"] = 9;
  write_text_atomically(checkpoint / "state.json", state.dump());
  MoeModel target = tiny_model();
  MoeModel untouched = tiny_model();
  CHECK_THROWS_WITH(load_checkpoint_weights(target, checkpoint),
                    Catch::Contains("between 1 and the model's 8 experts, got 9"));
  CHECK(same_routers(target, untouched));
  state.erase("top_k");
  write_text_atomically(checkpoint / "state.json", state.dump());
  load_checkpoint_weights(target, checkpoint);
  CHECK(target->architecture().top_k == 2);
  CHECK(same_routers(target, model));
}

TEST_CASE("the chunked loss equals cross-entropy in value and gradient") {
  const std::string family = GENERATE(as<std::string>(), "olmoe", "phimoe");  // without and with a bias of the head
  MoeModel model = create_model(testing::tiny_architecture(family), torch::kFloat32, torch::kCPU, 3);
  testing::move_vectors(model);
  torch::manual_seed(5);
  torch::Tensor hidden = torch::randn({2, 9, 32}).set_requires_grad(true);
  torch::Tensor labels = torch::randint(0, 48, {2, 9});
  labels.index_put_({0, 3}, -100);
  labels.index_put_({1, 8}, -100);
  for (torch::Tensor& parameter : model->all_parameters()) {
    parameter.set_requires_grad(true);
  }
  const torch::Tensor value = nll_sum(model, hidden, labels);
  (value * 0.5).backward();
  const torch::Tensor gradient = hidden.grad().clone();
  std::vector<torch::Tensor> head;
  std::vector<torch::Tensor> head_gradients;
  for (const torch::Tensor& parameter : model->all_parameters()) {
    if (parameter.grad().defined()) {
      head.push_back(parameter);
      head_gradients.push_back(parameter.grad().clone());
      head.back().mutable_grad() = torch::Tensor();
    }
  }
  REQUIRE(head.size() == (family == "phimoe" ? 2 : 1));
  hidden.mutable_grad() = torch::Tensor();
  const torch::Tensor expected = torch::nll_loss(torch::log_softmax(model->head(hidden).reshape({-1, 48}), -1),
                                                 labels.reshape({-1}), {}, at::Reduction::Sum, -100);
  (expected * 0.5).backward();
  CHECK(value.item<double>() == Approx(expected.item<double>()).epsilon(1e-5));
  CHECK(torch::allclose(gradient, hidden.grad(), 1e-4, 1e-6));
  for (std::size_t i = 0; i < head.size(); ++i) {
    CHECK(torch::allclose(head_gradients[i], head[i].grad(), 1e-4, 1e-6));
  }
}

TEST_CASE("measure hands out which tokens of a conversation count") {
  PackedData data = testing::tiny_data(8, 9, 24);
  std::vector<std::vector<std::uint8_t>> masks;
  for (std::size_t i = 0; i < data.sequences.size(); ++i) {
    TokenSequence& sequence = data.sequences[i];
    sequence.tokens.resize(12 + i, 7);
    if (i % 3 > 0) {
      sequence.num_prompt_tokens = 2;
    }
    if (i % 3 > 1) {
      sequence.later_prompts = {{4, 7}, {9, 10}};
    }
    masks.push_back(sequence.completion_mask());
  }
  MoeModel model = testing::tiny_model();
  std::vector<SequenceRouting> seen;
  (void)measure(model, data, pack_for_evaluation(data, -1, 2, 48), false,
                [&](SequenceRouting&& routing) { seen.push_back(std::move(routing)); });
  REQUIRE(seen.size() == masks.size());
  for (const SequenceRouting& routing : seen) {
    const std::vector<std::uint8_t>& mask = masks[static_cast<std::size_t>(routing.id)];
    CHECK(routing.num_tokens == static_cast<std::int64_t>(mask.size()));
    CHECK(routing.counted.empty() == (routing.id % 3 < 2));
    for (std::int64_t token = 0; token < routing.num_tokens; ++token) {
      CHECK(routing.is_counted(token) == (mask[static_cast<std::size_t>(token)] != 0));
    }
  }
}

TEST_CASE("measure reports the same loss as a plain forward and hands out every sequence once") {
  MoeModel model = tiny_model();
  const PackedData data = tiny_data(8, 21, 24);
  const auto batches = pack_for_evaluation(data, -1, 2, 24);
  std::int64_t tokens = 0;
  std::int64_t sequences = 0;
  std::vector<std::int64_t> ids;
  const QualityResult quality = measure(model, data, batches, true, [&](SequenceRouting&& routing) {
    ++sequences;
    tokens += routing.num_tokens;
    ids.push_back(routing.id);
    CHECK(routing.selected.size() == static_cast<std::size_t>(2 * routing.num_tokens * 2));
    CHECK(routing.probabilities.size() == static_cast<std::size_t>(2 * routing.num_tokens * 8));
    CHECK((routing.task == "alpha" || routing.task == "beta"));
  });
  CHECK(sequences == 21);
  CHECK(tokens == data.num_tokens());
  std::sort(ids.begin(), ids.end());
  CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
  CHECK(quality.labels == data.num_tokens() - 21);
  CHECK(quality.bytes == 3 * quality.labels);
  double expected = 0.0;
  const torch::NoGradGuard no_grad;
  for (const TokenSequence& sequence : data.sequences) {
    const auto length = static_cast<std::int64_t>(sequence.tokens.size());
    const torch::Tensor ids_1S =
        torch::tensor(std::vector<std::int64_t>(sequence.tokens.begin(), sequence.tokens.end())).unsqueeze(0);
    const TokenBatch batch{ids_1S, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64)};
    const torch::Tensor logits = model->head(model->forward(batch).hidden_BSD)[0];
    expected += torch::nll_loss(torch::log_softmax(logits.slice(0, 0, length - 1), -1), ids_1S[0].slice(0, 1), {},
                                at::Reduction::Sum)
                    .item<double>();
  }
  CHECK(quality.nll_sum == Approx(expected).epsilon(1e-4));
}

TEST_CASE("twenty steps on the GPU follow the CPU", "[gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("SKIPPED: no GPU on this machine");
    return;
  }
  const TemporaryFolder folder;
  TrainOptions options = short_run(20);
  options.trainable = GENERATE(std::string("router"), std::string("router+lora"));
  const PackedData data = tiny_data(12, 64, 24);
  std::vector<double> cpu;
  std::vector<double> gpu;
  MoeModel on_cpu = tiny_model();
  MoeModel on_gpu = tiny_model(3, torch::kFloat32, torch::kCUDA);
  for (MoeModel* model : {&on_cpu, &on_gpu}) {
    create_adapters(*model, {4, 8.0}, 21);
  }
  TrainingJob job_cpu = make_job(on_cpu, data, options, folder.path() / "cpu");
  TrainingJob job_gpu = make_job(on_gpu, data, options, folder.path() / "gpu");
  job_cpu.on_step = [&](const Json& event) { cpu.push_back(event.at("loss").get<double>()); };
  job_gpu.on_step = [&](const Json& event) { gpu.push_back(event.at("loss").get<double>()); };
  train(job_cpu);
  train(job_gpu);
  for (std::size_t i = 0; i < cpu.size(); ++i) {
    INFO("step " << i + 1);
    CHECK(gpu[i] == Approx(cpu[i]).epsilon(1e-4));
  }
}

TEST_CASE("distillation is KL from the base model's next-token distribution, with its gradient") {
  const bool train_head = GENERATE(false, true);
  const Architecture architecture = testing::tiny_architecture(GENERATE(as<std::string>(), "olmoe", "phimoe"));
  MoeModel model = create_model(architecture, torch::kFloat32, torch::kCPU, 1);
  MoeModel base = create_model(architecture, torch::kFloat32, torch::kCPU, 2);
  testing::move_vectors(model);
  select_trainable(model, train_head ? "all" : "router");
  const std::int64_t width = model->architecture().hidden_size;
  torch::manual_seed(3);
  torch::Tensor hidden = torch::randn({2, 5, width}).requires_grad_(true);
  const torch::Tensor base_hidden = torch::randn({2, 5, width});
  torch::Tensor labels = torch::full({2, 5}, -100, torch::kInt64);
  labels[0][1] = 3;
  labels[1][0] = 0;
  labels[1][4] = 7;
  const torch::Tensor value = distillation_sum(model, hidden, base, base_hidden, labels);
  value.backward();
  const torch::Tensor gradient = hidden.grad().clone();
  hidden.mutable_grad() = torch::Tensor();
  std::vector<torch::Tensor> head = {model->head_weight()};
  if (model->head_bias().defined()) {
    head.push_back(model->head_bias());
  }
  std::vector<torch::Tensor> head_gradients;
  for (torch::Tensor& parameter : head) {
    CHECK(parameter.grad().defined() == train_head);
    head_gradients.push_back(parameter.grad());
    parameter.mutable_grad() = torch::Tensor();
  }

  torch::Tensor expected = torch::zeros({});
  for (const auto& [row, column] : std::vector<std::pair<int, int>>{{0, 1}, {1, 0}, {1, 4}}) {
    const torch::Tensor log_p = torch::log_softmax(model->head(hidden[row][column]), 0);
    const torch::Tensor log_base = torch::log_softmax(base->head(base_hidden[row][column]), 0).detach();
    expected = expected + (log_base.exp() * (log_base - log_p)).sum();
  }
  expected.backward();
  CHECK(value.item<double>() == Approx(expected.item<double>()).epsilon(1e-5));
  CHECK(value.item<double>() > 1e-3);
  CHECK(torch::allclose(gradient, hidden.grad(), 1e-4, 1e-6));
  CHECK(gradient.select(1, 2).abs().max().item<double>() == 0.0);
  for (std::size_t i = 0; train_head && i < head.size(); ++i) {
    CHECK(torch::allclose(head_gradients[i], head[i].grad(), 1e-4, 1e-6));
  }
  CHECK(distillation_sum(model, hidden, model, hidden, labels).item<double>() == Approx(0.0).margin(1e-6));
  CHECK_THROWS_AS(distillation_sum(model, hidden, base, base_hidden.narrow(1, 0, 4), labels), std::invalid_argument);
}

TEST_CASE("while routers and adapters train, the kept routers give the base model's forward") {
  const PackedData data = tiny_data(5, 40, 24);
  TrainOptions options = short_run(4);
  options.trainable = GENERATE(std::string("router"), std::string("router+lora"));
  // The base model keeps its K when the tuned one gets another.
  if (GENERATE(false, true)) {
    options.top_k_annealing = {3, 1};
  }
  RoutingLossOptions losses = all_losses();
  losses.rank_matching.reference = "base_forward";
  losses.rank_matching.weight = 0.3;
  const auto run = [&](MoeModel& model, bool second_copy, double distillation, const RoutingLossOptions& terms) {
    const TemporaryFolder folder;
    TrainingJob job = make_job(model, data, options, folder.path() / "run");
    job.losses = make_routing_losses(terms, 8, 2);
    job.distillation_weight = distillation;
    if (second_copy) {
      job.base_model = tiny_model();
    }
    std::vector<Json> events;
    job.on_step = [&](const Json& event) { events.push_back(event); };
    train(job);
    return events;
  };
  MoeModel one = model_to_train(options.trainable);
  MoeModel two = model_to_train(options.trainable);
  const std::vector<Json> kept = run(one, false, 0.5, losses);
  const std::vector<Json> copied = run(two, true, 0.5, losses);
  REQUIRE(kept.size() == 4);
  for (std::size_t step = 0; step < kept.size(); ++step) {
    CHECK(kept[step].at("loss") == copied[step].at("loss"));
    CHECK(kept[step].at("logit_distillation") == copied[step].at("logit_distillation"));
  }
  CHECK(same_routers(one, two));
  CHECK(same_tensors(one->adapters(), two->adapters()));
  CHECK(kept[0].at("logit_distillation").get<double>() == Approx(0.0).margin(1e-6));
  CHECK(kept[3].at("logit_distillation").get<double>() > 1e-6);

  // Before the first update both references are the same; later the base model's hidden states are its own.
  MoeModel current = model_to_train(options.trainable);
  losses.rank_matching.reference = "current_hidden";
  const std::vector<Json> events = run(current, false, 0.0, losses);
  CHECK(events[0].at("rank_matching").get<double>() == Approx(kept[0].at("rank_matching").get<double>()).epsilon(1e-6));
  CHECK(events[3].at("rank_matching").get<double>() != kept[3].at("rank_matching").get<double>());
  CHECK_FALSE(events[0].contains("logit_distillation"));
}

TEST_CASE("the language-model loss, routing terms and distillation count the domains that they are told") {
  const TemporaryFolder folder;
  PackedData data = tiny_data(5, 40, 24);
  data.domains = {"a", "b"};
  for (std::size_t i = 0; i < data.sequences.size(); ++i) {
    data.sequences[i].domain = i % 3 == 0 ? 1 : 0;
  }
  RoutingLossOptions terms;
  terms.reuse.weight = 0.3;
  terms.trust.weight = 0.1;
  TrainOptions options = short_run(1);
  options.rows_per_batch = 4;
  int run = 0;
  // The first step, before anything has moved.
  const auto first_step = [&](const std::vector<std::string>& loss, const std::vector<std::string>& distillation,
                              const std::vector<std::string>& nll = {}) {
    MoeModel model = tiny_model();
    TrainingJob job = make_job(model, data, options, folder.path() / std::to_string(run++));
    job.losses = make_routing_losses(terms, 8, 2);
    job.loss_domains = loss;
    job.nll_domains = nll;
    job.distillation_weight = 0.5;
    job.distillation_domains = distillation;
    job.base_model = tiny_model(77);
    Json step;
    job.on_step = [&](const Json& event) { step = event; };
    train(job);
    step.erase("seconds");
    return step;
  };
  PackedSampler sampler(data, 4, 24, data_order_seed(11));
  const PackedBatch batch = sampler.next();
  double labels[2] = {};
  double counts[2] = {};  // positions with one before them in their sequence
  for (std::size_t i = 0; i < batch.labels.size(); ++i) {
    const std::int64_t id = batch.sequence_ids[i];
    if (id >= 0) {
      const auto domain = static_cast<std::size_t>(batch.domains[static_cast<std::size_t>(id)]);
      labels[domain] += batch.labels[i] >= 0 ? 1.0 : 0.0;
      counts[domain] += batch.counted[i] != 0 && batch.positions[i] > 0 ? 1.0 : 0.0;
    }
  }
  REQUIRE(labels[0] > 0.0);
  REQUIRE(labels[1] > 0.0);
  const Json all = first_step({}, {});
  const Json both = first_step({"b", "a"}, {"a", "b"});
  const Json a = first_step({"a"}, {"a"});
  const Json b = first_step({"b"}, {"b"});
  CHECK(both == all);
  const Json nll_of_a = first_step({}, {}, {"a"});
  const Json nll_of_b = first_step({}, {}, {"b"});
  const auto is_mean = [&](const char* term, const double(&of)[2]) {
    INFO(term);
    const bool nll = std::string_view(term) == "nll";
    const double in_a = (nll ? nll_of_a : a).at(term).get<double>();
    const double in_b = (nll ? nll_of_b : b).at(term).get<double>();
    CHECK(in_a != Approx(in_b).epsilon(1e-4));
    CHECK(all.at(term).get<double>() == Approx((of[0] * in_a + of[1] * in_b) / (of[0] + of[1])).epsilon(1e-4));
  };
  is_mean("logit_distillation", labels);
  is_mean("reuse", counts);
  is_mean("nll", labels);
  CHECK(a.at("nll") == all.at("nll"));
  for (const char* other : {"logit_distillation", "reuse", "trust"}) {
    CHECK(nll_of_a.at(other) == all.at(other));
  }
  CHECK(nll_of_a.at("gradient_norm") != all.at("gradient_norm"));

  // A batch without any of them is a step like another.
  data.sequences.resize(1);
  data.sequences[0].domain = 0;
  const Json none = first_step({"b"}, {"b"}, {"b"});
  CHECK(none.at("nll").get<double>() == 0.0);
  CHECK(none.at("logit_distillation").get<double>() == 0.0);
  CHECK(none.at("reuse").get<double>() == 0.0);
}
