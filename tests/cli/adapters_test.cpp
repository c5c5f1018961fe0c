#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia::testing {
namespace {

TEST_CASE("routers with adapters and fewer experts, from recipe to a model directory") {
  const SmallProject project;
  project.pretrain();
  const std::vector<std::string> changes = {"train.trainable=router+lora",
                                            "train.lora.rank=3",
                                            "train.lora.alpha=6",
                                            "train.top_k_annealing.step=4",
                                            "train.top_k_annealing.top_k=1",
                                            "losses.logit_distillation.weight=0.1"};
  const auto with = [&](std::vector<std::string> arguments, const std::vector<std::string>& more = {}) {
    arguments.insert(arguments.end(), changes.begin(), changes.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };

  // The recipe against the model.
  CHECK(done(project.run(with({"validate", "finetune.yaml"}))) == "finetune.yaml: OK\n");
  for (const char* verb : {"validate", "finetune"}) {
    check_complaint(project.run(with({verb, "finetune.yaml"}, {"train.lora.rank=9", "train.top_k_annealing.top_k=3"})),
                    2,
                    {"train.lora.rank=9 on the command line", "at most the rank of the experts' matrices (8), got 9",
                     "at most the model's experts per token (2), got 3"});
  }
  check_complaint(project.run({"finetune", "finetune.yaml", "train.trainable=router_lora"}), 2,
                  {"router, router+lora, all", "did you mean \"router+lora\"?"});

  const Outcome tuned = project.run(with({"finetune", "finetune.yaml"}));
  CHECK(done(tuned).empty());
  for (const char* part : {"router+lora, rank 3, alpha 6", "1 from step 4 on",
                           "step 4: 1 experts per token from here on, 2 before", "| logit_distillation "}) {
    CHECK_THAT(tuned.err, Catch::Contains(part));
  }
  CHECK_THAT(tuned.err, !Catch::Contains("second copy"));
  for (const char* folder : {"runs/tuned/", "runs/tuned/control/"}) {
    INFO(folder);
    const std::filesystem::path checkpoint = project.path() / folder / "checkpoints/step_6";
    CHECK(read_json_file(checkpoint / "state.json").at("top_k") == 1);
    CHECK(SafetensorsFile(checkpoint / "adapters.safetensors").names().size() == 2 * 8 * 2 * 2);
  }
  CHECK(project.read("runs/tuned/checkpoints/step_6/adapters.safetensors") !=
        project.read("runs/tuned/control/checkpoints/step_6/adapters.safetensors"));

  // The bundle.
  CHECK(done(project.run(with({"export", "finetune.yaml", "--quiet"}))) == "runs/tuned/bundle\n");
  const Json manifest = read_json_file(project.path() / "runs/tuned/bundle/manifest.json");
  CHECK(manifest.at("top_k") == 1);
  CHECK(manifest.at("architecture").at("num_experts_per_tok") == 2);
  CHECK(manifest.at("adapters").at("rank") == 3);
  CHECK(manifest.at("adapters").at("alpha") == 6.0);
  CHECK(project.read("runs/tuned/bundle/adapters.safetensors") ==
        project.read("runs/tuned/checkpoints/step_6/adapters.safetensors"));
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/bundle"})),
             Catch::Contains("1, the base model 2") && Catch::Contains("LoRA, rank 3, alpha 6, 64 matrices"));

  // The comparison: the baseline as it was, both others with adapters and one expert.
  const Json results = Json::parse(done(project.run(with({"evaluate", "finetune.yaml", "--quiet", "--json"}))));
  REQUIRE(results.at("arms").size() == 3);
  for (const Json& arm : results.at("arms")) {
    INFO(arm.at("name"));
    const bool baseline = arm.at("name") == "baseline";
    CHECK(arm.at("top_k") == (baseline ? 2 : 1));
    CHECK(arm.at("adapters") == !baseline);
    for (const Json& domain : arm.at("domains")) {
      CHECK(domain.at("cache").at(0).at("requests") ==
            domain.at("tokens").get<std::int64_t>() * 2 * (baseline ? 2 : 1));
    }
  }
  const double apart = results.at("arms").at(2).at("domains").at(0).at("perplexity").get<double>();
  CHECK(apart != results.at("arms").at(0).at("domains").at(0).at("perplexity").get<double>());
  CHECK_THAT(done(project.run(with({"evaluate", "finetune.yaml", "--quiet"}))),
             Catch::Contains("of 2 (baseline), 1 (nll control), 1 (tuned) requested"));

  // The model directory, which is the same model without anything beside it.
  CHECK(done(project.run(with({"export", "finetune.yaml", "--to", "hf", "--quiet"}))) == "runs/tuned/hf\n");
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/hf"})), Catch::Contains("8 per layer, 1 per token"));
  CHECK(project.read("runs/tuned/hf/tokenizer.model") == project.read("runs/base/model/tokenizer.model"));
  check_complaint(project.run(with({"export", "finetune.yaml", "--to", "hf"})), 2, {"runs/tuned/hf: exists already"});

  // Decoded in integers, adapters are merged before experts are packed: what is lost is the same in both.
  const auto packed = [&](const std::vector<std::string>& model) {
    std::vector<std::string> arguments = {
        "generate", "--prompt-tokens", "1,2,3", "--max-tokens",    "4",   "--ignore-eos", "--device", "cpu",
        "--json",   "--expert-slots",  "2",     "--expert-format", "int8"};
    arguments.insert(arguments.end(), model.begin(), model.end());
    return Json::parse(done(project.run(arguments)));
  };
  const Json of_bundle = packed({"--model", "runs/base/model", "--router", "runs/tuned/bundle"});
  CHECK(of_bundle.at("tokens").size() == 4);
  CHECK(of_bundle.at("expert_error").at("mean").get<double>() > 0.0);
  CHECK(packed({"--model", "runs/tuned/hf"}).at("expert_error").at("mean").get<double>() ==
        Approx(of_bundle.at("expert_error").at("mean").get<double>()).epsilon(0.02));
  const std::vector<std::string> one_step = {"model.path=runs/tuned/hf",  "run_dir=runs/again",    "train.steps=1",
                                             "train.learning_rate=1e-12", "control.enabled=false", "--quiet"};
  for (const char* verb : {"finetune", "export", "evaluate"}) {
    std::vector<std::string> arguments = {verb, "finetune.yaml"};
    arguments.insert(arguments.end(), one_step.begin(), one_step.end());
    done(project.run(arguments));
  }
  const Json again = read_json_file(project.path() / "runs/again/results.json");
  CHECK(again.at("arms").at(0).at("top_k") == 1);
  CHECK(again.at("arms").at(0).at("domains").at(0).at("perplexity").get<double>() == Approx(apart).epsilon(1e-4));

  // A fresh start removes what was made from the run before it, once it is known that there will be a run.
  std::filesystem::create_directories(project.path() / "runs/tuned/gguf");
  for (const char* name : {"answers.jsonl", "answers.previous.jsonl", "results.previous.json"}) {
    project.write(std::string("runs/tuned/") + name, "{}\n");
  }
  check_complaint(project.run(with({"finetune", "finetune.yaml", "--overwrite", "--quiet", "residency.lambda=0.1",
                                    "residency.slots=1000", "residency.in_loop=true"})),
                  2, {"residency.slots"});
  for (const char* name : {"control/checkpoints/step_6", "bundle", "hf", "gguf", "results.json", "answers.jsonl"}) {
    INFO(name);
    CHECK(std::filesystem::exists(project.path() / "runs/tuned" / name));
  }
  done(project.run(with({"finetune", "finetune.yaml", "--overwrite", "--quiet"})));
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/gguf"));
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/results.json"));
  for (const char* name : {"answers.jsonl", "answers.previous.jsonl", "results.previous.json"}) {
    CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned" / name));
  }
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/hf"));
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/bundle"));
}

TEST_CASE("what was trained beyond routers and adapters is exported as a whole only") {
  const SmallProject project;
  project.pretrain();
  const std::vector<std::string> all = {"train.trainable=all", "control.enabled=false", "--quiet"};
  const auto with = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), all.begin(), all.end());
    return arguments;
  };
  done(project.run(with({"finetune", "finetune.yaml"})));
  check_complaint(project.run(with({"export", "finetune.yaml"})), 2,
                  {"train.trainable \"all\"", "--to hf", "router or router+lora"});
  CHECK(done(project.run(with({"export", "finetune.yaml", "--to", "hf"}))) == "runs/tuned/hf\n");
  check_complaint(project.run(with({"export", "finetune.yaml", "--to", "hf"})), 2, {"runs/tuned/hf", "remove it"});
  CHECK(done(project.run(with({"export", "finetune.yaml", "--to", "hf", "--output", "runs/copy/"}))) == "runs/copy/\n");
  CHECK(project.read("runs/copy/model.safetensors") == project.read("runs/tuned/hf/model.safetensors"));
  // Without what the run was given on the command line, its routers alone would stand for it.
  for (const std::vector<std::string>& verb :
       std::vector<std::vector<std::string>>{{"export", "finetune.yaml", "--to", "hf", "--output", "runs/hybrid"},
                                             {"export", "finetune.yaml"},
                                             {"evaluate", "finetune.yaml", "--checkpoint"}}) {
    check_complaint(project.run(verb), 2,
                    {"finetune.yaml", "runs/tuned trained with train.trainable \"all\", got \"router\""});
  }
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/hybrid"));
  done(project.run({"evaluate", "runs/tuned", "--checkpoint", "--only", "tuned", "--quiet"}));
  // The directory is the tuned model: a base for another run.
  const auto nll_of = [&](const std::string& run_dir) {
    const Json results = read_json_file(project.path() / run_dir / "results.json");
    return results.at("arms").at(0).at("domains").at(0).at("nll").get<double>();
  };
  done(project.run(with({"evaluate", "finetune.yaml", "--checkpoint", "--only", "tuned"})));
  done(project.run(
      with({"evaluate", "finetune.yaml", "--only", "baseline", "model.path=runs/tuned/hf", "run_dir=runs/whole"})));
  CHECK(nll_of("runs/whole") == nll_of("runs/tuned"));

  // And a teacher: the base, held to it, is not where it is.
  const auto first_step = [&](const std::string& run_dir) {
    Json first;
    read_json_lines(project.path() / run_dir / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "step" && event.at("step") == 1) {
        first = event;
      }
    });
    return first.at("logit_distillation").get<double>();
  };
  const std::string weight = "losses.logit_distillation.weight=1";
  const std::string teacher = "losses.logit_distillation.teacher=runs/tuned/hf";
  done(project.run(with({"finetune", "finetune.yaml", "run_dir=runs/held", weight})));
  done(project.run(with({"finetune", "finetune.yaml", "run_dir=runs/taught", weight, teacher})));
  CHECK(first_step("runs/held") < 1e-6);
  CHECK(first_step("runs/taught") > 1e-4);
  check_complaint(project.run(with({"finetune", "finetune.yaml", "run_dir=runs/refused", weight, teacher,
                                    "losses.rank_matching.reference=base_forward"})),
                  2, {"losses.logit_distillation.teacher", "base_forward"});
}

TEST_CASE("evaluate takes a run from its checkpoint: all parameters, without a bundle, one router alone") {
  const SmallProject project;
  project.pretrain();
  const auto arms_of = [&](const std::string& run_dir) {
    return read_json_file(project.path() / run_dir / "results.json").at("arms");
  };
  check_complaint(project.run({"evaluate", "finetune.yaml", "--checkpoint"}), 2,
                  {"--checkpoint needs the finished run, got step 0 of 6", "hestia finetune finetune.yaml"});
  // The base model needs no run.
  done(project.run({"evaluate", "finetune.yaml", "run_dir=runs/none", "--only", "baseline", "--quiet",
                    "evaluate.residency_prior.lambdas=[0.4]", "evaluate.residency_prior.always_keep=[1]"}));
  const Json alone = arms_of("runs/none");
  REQUIRE(alone.size() == 2);
  CHECK(alone.at(0).at("name") == "baseline");
  CHECK(alone.at(1).at("name") == "baseline, lambda 0.4, J 1");

  const std::vector<std::string> all = {"finetune.yaml", "train.trainable=all", "run_dir=runs/all",
                                        "train.evaluate_tokens=2000", "--quiet"};
  const auto with = [&](const std::string& verb, const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {verb};
    arguments.insert(arguments.end(), all.begin(), all.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  done(project.run(with("finetune", {})));
  CHECK_THAT(done(project.run(with("evaluate", {"--checkpoint"}))), Catch::Contains("nll control"));
  const Json arms = arms_of("runs/all");
  REQUIRE(arms.size() == 3);
  CHECK(arms.at(0).at("domains") == alone.at(0).at("domains"));
  // The training loop measured the same weights on the same text.
  const auto check_measured = [&](const Json& arm, const std::string& run_dir) {
    Json held_out;
    read_json_lines(project.path() / run_dir / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      if (event.at("event") == "evaluate") {
        held_out = event.at("held_out");
      }
    });
    for (const Json& domain : arm.at("domains")) {
      const std::string name = domain.at("domain").get<std::string>();
      const double expected = held_out.at(name).at("nll").get<double>();
      INFO(arm.at("name") << ", " << name);
      CHECK(domain.at("nll").get<double>() == Approx(expected).epsilon(1e-5));
    }
  };
  check_measured(arms.at(1), "runs/all/control");
  check_measured(arms.at(2), "runs/all");
  CHECK(std::abs(arms.at(2).at("domains").at(0).at("nll").get<double>() -
                 arms.at(0).at("domains").at(0).at("nll").get<double>()) > 1e-3);

  // Routers and adapters: the same figures as from the bundle.
  const std::vector<std::string> lora = {"finetune.yaml", "train.trainable=router+lora", "train.lora.rank=2",
                                         "control.enabled=false", "--quiet"};
  const auto run = [&](std::vector<std::string> arguments, const std::vector<std::string>& more = {}) {
    arguments.insert(arguments.end(), lora.begin(), lora.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    return done(project.run(arguments));
  };
  run({"finetune"});
  run({"export"});
  run({"evaluate"});
  const Json from_bundle = arms_of("runs/tuned").at(1);
  CHECK_FALSE(from_bundle.at("domains").at(0).at("kendall_tau").is_null());
  std::filesystem::remove_all(project.path() / "runs/tuned/bundle");
  run({"evaluate"}, {"--checkpoint", "--only", "tuned"});
  REQUIRE(arms_of("runs/tuned").size() == 1);
  CHECK(arms_of("runs/tuned").at(0) == from_bundle);
  run({"evaluate"}, {"--checkpoint", "--only", "tuned", "evaluate.agreement=false"});
  CHECK(arms_of("runs/tuned").at(0).at("domains").at(0).at("kendall_tau").is_null());
}

}  // namespace
}  // namespace hestia::testing
