// Residency-aware routing from outside: a run trained under it, its bundle, and the arms of evaluate.

#include <set>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

// A pretrained model, and loop.yaml, which tunes it in the residency loop; `more`: further keys of that section.
void make_loop(const SmallProject& project, const std::string& more = "") {
  project.pretrain();
  project.write("loop.yaml", replaced(SmallProject::kFinetune, "control:",
                                      "residency: {lambda: 0.3, always_keep: 1, slots: 3, in_loop: true, "
                                      "calibration_tokens: 500" +
                                          more + "}\ncontrol:"));
}

}  // namespace

TEST_CASE("residency in the loop: finetune keeps the rule, export hands it on, evaluate serves every router under it") {
  const SmallProject project;
  make_loop(project);
  check_complaint(project.run({"finetune", "loop.yaml", "residency.always_keep=2"}), 2,
                  {"residency.always_keep=2", "below the model's experts per token (2)"});
  check_complaint(project.run({"finetune", "loop.yaml", "residency.slots=9"}), 2,
                  {"residency.slots", "experts per layer (8), got 9"});
  check_complaint(project.run({"validate", "loop.yaml", "residency.policy=lfu"}), 2,
                  {"residency.policy", "lru", "lfu"});
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned"));
  done(project.run({"finetune", "loop.yaml", "--quiet"}));
  const Json rule = read_json_file(project.path() / "runs/tuned/residency.json");
  CHECK(rule.at("lambda") == 0.3);
  CHECK(rule.at("slots") == 3);
  CHECK(rule.at("logit_range").size() == 2);
  CHECK(rule.at("logit_range").at(0).get<double>() > 0.0);
  CHECK_THAT(rule.at("calibration").get<std::string>(), Catch::Contains("tokens of the training split of letters"));
  // The control is plain tuning.
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/control/residency.json"));
  done(project.run({"export", "loop.yaml", "--quiet"}));
  CHECK(read_json_file(project.path() / "runs/tuned/bundle/manifest.json").at("residency") == rule);
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/bundle"})),
             Catch::Contains("3 slots, lru, residency lambda 0.3, J 1"));
  // The decoder serves under it where there is something to prefer.
  const auto served = [&](std::vector<std::string> more) {
    more.insert(more.begin(),
                {"generate", "--model", "runs/base/model", "--router", "runs/tuned/bundle", "--prompt-tokens", "1,2,3",
                 "--max-tokens", "3", "--ignore-eos", "--device", "cpu", "--json"});
    return Json::parse(done(project.run(more))).at("residency");
  };
  CHECK(served({"--expert-slots", "3"}).at("lambda") == 0.3);
  CHECK(served({}).is_null());
  const Outcome plain_export = project.run({"export", "loop.yaml", "--to", "hf", "--quiet"});
  CHECK(done(plain_export) == "runs/tuned/hf\n");
  CHECK_THAT(plain_export.err, Catch::Contains("warning") && Catch::Contains("lambda 0.3, J 1, 3 slots") &&
                                   Catch::Contains("only --to bundle hands it on"));

  check_complaint(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[0.1]",
                               "evaluate.residency_prior.slots=12"}),
                  2, {"evaluate.residency_prior.slots", "(8), got 12"});
  const std::string table =
      done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[0.6,0.3]",
                        "evaluate.residency_prior.always_keep=[1,0]", "evaluate.policies=[belady]", "--quiet"}));
  CHECK_THAT(table, Catch::Contains("tuned, lambda 0.3, J 1"));
  const Json results = read_json_file(project.path() / "runs/tuned/results.json");
  std::vector<std::string> names;
  for (const Json& arm : results.at("arms")) {
    names.push_back(arm.at("name").get<std::string>());
  }
  std::vector<std::string> expected = {"baseline", "nll control", "tuned"};
  for (const std::string router : {"baseline", "nll control", "tuned"}) {
    for (const std::string prior : {"0.6, J 1", "0.3, J 1", "0.6, J 0", "0.3, J 0"}) {
      expected.push_back(router + ", lambda " + prior);
    }
  }
  CHECK(names == expected);
  for (const Json& arm : results.at("arms")) {
    INFO(arm.at("name"));
    const bool plain = arm.at("name") == arm.at("router");
    CHECK(arm.at("residency").is_null() == plain);
    std::set<std::pair<std::string, int>> cells;
    for (const Json& cell : arm.at("domains").at(0).at("cache")) {
      cells.emplace(cell.at("policy").get<std::string>(), cell.at("slots").get<int>());
    }
    // What the rule is about is there, asked for or not.
    CHECK(cells.count({"lru", 3}) == 1);
    if (!plain) {
      CHECK(arm.at("residency").at("logit_range") == rule.at("logit_range"));
      CHECK(arm.at("residency").at("slots") == 3);
    }
  }
  // The scores side by side, told apart by name and rule.
  check_complaint(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.weight_lambdas=[0.05]"}), 2,
                  {"evaluate.residency_prior.always_keep", "(2), got 2"});
  done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[0.05]",
                    "evaluate.residency_prior.weight_lambdas=[0.05,0.2]", "evaluate.residency_prior.root_lambdas=[0.1]",
                    "evaluate.residency_prior.always_keep=[0]", "--only", "baseline", "--quiet"}));
  names.clear();
  std::vector<std::string> scores;
  const Json both = read_json_file(project.path() / "runs/tuned/results.json");
  for (const Json& arm : both.at("arms")) {
    names.push_back(arm.at("name").get<std::string>());
    scores.push_back(arm.at("residency").is_null() ? "" : arm.at("residency").at("score").get<std::string>());
  }
  CHECK(names == std::vector<std::string>{"baseline", "baseline, lambda 0.05, J 0", "baseline, weight lambda 0.05, J 0",
                                          "baseline, weight lambda 0.2, J 0", "baseline, root lambda 0.1, J 0",
                                          "baseline, lambda 0.3, J 1"});
  CHECK(scores == std::vector<std::string>{"", "logit", "weight", "weight", "root", "logit"});
  // Factors of the layers: 0 routes one plainly, 1 changes nothing.
  check_complaint(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.layer_factors=[1,2,3]"}), 2,
                  {"evaluate.residency_prior.layer_factors", "per MoE layer (2), got 3"});
  const auto figures = [&](const std::string& factors) {
    done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[0.6]",
                      "evaluate.residency_prior.always_keep=[0]", "evaluate.residency_prior.layer_factors=" + factors,
                      "--only", "baseline", "--quiet"}));
    return read_json_file(project.path() / "runs/tuned/results.json").at("arms").at(1);
  };
  const Json uniform = figures("[]");
  const Json ones = figures("[1,1]");
  const Json first_only = figures("[1,0]");
  const Json none = figures("[0,0]");
  CHECK(uniform.at("name") == "baseline, lambda 0.6, J 0");
  CHECK(ones.at("name") == "baseline, lambda 0.6 by layer, J 0");
  CHECK(uniform.at("domains") == ones.at("domains"));
  CHECK(first_only.at("residency").at("layer_factors") == Json{1.0, 0.0});
  const auto loads_of = [](const Json& arm) {
    for (const Json& cell : arm.at("domains").at(0).at("cache")) {
      if (cell.at("policy") == "lru" && cell.at("slots") == 3) {
        return cell.at("loads").get<int>();
      }
    }
    return -1;
  };
  CHECK(loads_of(ones) < loads_of(first_only));
  CHECK(loads_of(first_only) < loads_of(none));
  // Even without a sweep a bundle with a rule is judged under it.
  done(project.run({"evaluate", "loop.yaml", "--quiet"}));
  CHECK(read_json_file(project.path() / "runs/tuned/results.json").at("arms").size() == 6);
  // A run in the loop of weights hands that on.
  done(project.run({"finetune", "loop.yaml", "residency.score=weight", "residency.lambda=0.05",
                    "residency.layer_factors=[0.5,2]", "control.enabled=false", "--overwrite", "--quiet"}));
  CHECK(read_json_file(project.path() / "runs/tuned/residency.json").at("score") == "weight");
  check_complaint(project.run({"export", "loop.yaml", "residency.score=logit", "--quiet"}), 2,
                  {"residency.score was weight when the run was trained in the loop", "got logit"});
  check_complaint(project.run({"export", "loop.yaml", "residency.layer_factors=[1,1]", "--quiet"}), 2,
                  {"residency.layer_factors was [0.5, 2] when the run was trained in the loop", "got [1, 1]"});
  done(project.run({"export", "loop.yaml", "--quiet"}));
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/bundle"})),
             Catch::Contains("3 slots, lru, residency weight lambda 0.05 by layer, J 1") && Catch::Contains("0.5 2"));
  // The bundle's factors hold for a sweep that names none; others are told apart.
  done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.weight_lambdas=[0.2]",
                    "evaluate.residency_prior.always_keep=[1]", "--only", "tuned", "--quiet"}));
  const Json own = read_json_file(project.path() / "runs/tuned/results.json").at("arms");
  REQUIRE(own.size() == 3);
  CHECK(own.at(1).at("name") == "tuned, weight lambda 0.2 by layer, J 1");
  CHECK(own.at(1).at("residency").at("layer_factors") == Json{0.5, 2.0});
  done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.weight_lambdas=[0.05]",
                    "evaluate.residency_prior.always_keep=[1]", "evaluate.residency_prior.layer_factors=[1,1]",
                    "--only", "tuned", "--quiet"}));
  const Json others = read_json_file(project.path() / "runs/tuned/results.json").at("arms");
  REQUIRE(others.size() == 3);
  CHECK(others.at(1).at("name") == "tuned, weight lambda 0.05 by layer, J 1, other factors");
  CHECK(others.at(2).at("name") == "tuned, weight lambda 0.05 by layer, J 1");
  // A fresh plain run leaves nothing of the rule.
  done(project.run({"finetune", "loop.yaml", "residency.in_loop=false", "--overwrite", "--quiet"}));
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/residency.json"));
}

TEST_CASE("with lambda that grows and slots that take turns, the rule stays, and the control's recipe is one to run") {
  const SmallProject project;
  make_loop(project, ", ramp_steps: 2, train_slots: [2, 5]");
  check_complaint(project.run({"finetune", "loop.yaml", "residency.train_slots=[2,9]"}), 2,
                  {"residency.train_slots", "experts per layer (8), got 9"});
  check_complaint(project.run({"finetune", "loop.yaml", "residency.in_loop=false"}), 2,
                  {"residency.ramp_steps only counts in training", "residency.train_slots only counts in training"});
  done(project.run({"finetune", "loop.yaml", "--quiet"}));
  const Json rule = read_json_file(project.path() / "runs/tuned/residency.json");
  CHECK(rule.at("lambda") == 0.3);
  CHECK(rule.at("slots") == 3);
  for (const std::string recipe : {"runs/tuned/recipe.yaml", "runs/tuned/control/recipe.yaml"}) {
    CHECK(done(project.run({"validate", "--no-files", recipe})) == recipe + ": OK\n");
  }
}

TEST_CASE("a prior needs no training: the arms of a run that never saw one") {
  const SmallProject project;
  project.pretrain();
  done(project.run({"finetune", "finetune.yaml", "control.enabled=false", "--quiet"}));
  done(project.run({"export", "finetune.yaml", "control.enabled=false", "--quiet"}));
  const Json rule = read_json_file(project.path() / "runs/tuned/bundle/manifest.json").at("residency");
  CHECK(rule.at("lambda") == 0.0);
  CHECK(rule.at("slots") == 2);
  const Json results =
      Json::parse(done(project.run({"evaluate", "runs/tuned", "evaluate.residency_prior.lambdas=[1.0]",
                                    "evaluate.residency_prior.always_keep=[0]", "--json", "--quiet"})));
  REQUIRE(results.at("arms").size() == 4);
  const auto loads = [&](std::size_t arm) {
    for (const Json& cell : results.at("arms").at(arm).at("domains").at(0).at("cache")) {
      if (cell.at("policy") == "lru" && cell.at("slots") == 2) {
        return cell.at("loads").get<int>();
      }
    }
    return -1;
  };
  CHECK(results.at("arms").at(2).at("name") == "baseline, lambda 1, J 0");
  CHECK(loads(2) < loads(0));
  CHECK(loads(3) < loads(1));
  CHECK(loads(3) > 0);
  // On what the run was trained on, for a prior to be chosen by.
  const Outcome on_training =
      project.run({"evaluate", "runs/tuned", "evaluate.split=train", "--only", "baseline", "--quiet"});
  CHECK_THAT(done(on_training), Catch::Contains("on training text"));
  const Json training = read_json_file(project.path() / "runs/tuned/results.json");
  CHECK(training.at("split") == "train");
  CHECK(results.at("split") == "held_out");
  CHECK(training.at("arms").at(0).at("domains").at(0).at("nll") !=
        results.at("arms").at(0).at("domains").at(0).at("nll"));
}

TEST_CASE("an untuned bundle: the model's own routers under the recipe's rule, served without any run") {
  const SmallProject project;
  make_loop(project, ", scope: {domains: [letters], window: 8}");
  project.write("loop.yaml", replaced(project.read("loop.yaml"), "train: [letters]", "train: [letters, colours]"));
  check_complaint(project.run({"export", "loop.yaml", "--untuned", "--to", "hf"}), 2, {"--untuned", "--to hf"});
  check_complaint(project.run({"export", "finetune.yaml", "--untuned", "residency.lambda=0"}), 2,
                  {"residency.lambda=0 on the command line", "--untuned", "set it"});
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned"));
  CHECK(done(project.run({"export", "loop.yaml", "--untuned", "--quiet"})) == "runs/tuned/untuned\n");
  const Json manifest = read_json_file(project.path() / "runs/tuned/untuned/manifest.json");
  CHECK(manifest.at("router_hash") == manifest.at("base_router_hash"));
  CHECK_THAT(manifest.at("recipe").get<std::string>(), Catch::Contains("in_loop: true"));
  const auto nll = [&](const char* router) { return manifest.at("metrics").at(router).at("nll").get<double>(); };
  CHECK(nll("tuned") != nll("baseline"));
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/untuned"})),
             Catch::Contains("none: the base model's own") && Catch::Contains("lambda 0.3, for letters"));
  const auto served = [&](const std::string& bundle) {
    const Json result = Json::parse(
        done(project.run({"generate", "--model", "runs/base/model", "--router", bundle, "--prompt-tokens", "1,2,3",
                          "--max-tokens", "6", "--ignore-eos", "--device", "cpu", "--expert-slots", "3", "--json"})));
    CHECK(result.at("residency").at("lambda") == 0.3);
    return result.at("residency").at("scope").at("domains");
  };
  CHECK(served("runs/tuned/untuned") == Json{"letters"});
  // What is measured without a run names no file of one.
  const Outcome no_run = project.run({"evaluate", "loop.yaml", "--only", "baseline", "--quiet"});
  CHECK_THAT(done(no_run), Catch::Contains("baseline, lambda 0.3, for letters"));
  CHECK_THAT(no_run.err, Catch::Contains("runs/tuned/results.json") && !Catch::Contains("metrics.jsonl") &&
                             !Catch::Contains("runs/tuned/checkpoints"));
  // A run of the same recipe begins as if nothing were there, and calibrates the same rule.
  done(project.run({"finetune", "loop.yaml", "--quiet"}));
  const Json rule = read_json_file(project.path() / "runs/tuned/residency.json");
  CHECK(manifest.at("residency").at("scope").at("domains") == rule.at("scope").at("domains"));
  CHECK(manifest.at("residency").at("logit_range") == rule.at("logit_range"));
  CHECK(manifest.at("residency").at("scope").at("weights") == rule.at("scope").at("weights"));
  // The base under the rule, once as a bundle and once as the recipe has it.
  const std::string name = ", lambda 0.3, for letters (elsewhere times 0), J 1";
  const auto measured = [&](const std::string& arm, const std::vector<std::string>& more) {
    std::vector<std::string> words = {"evaluate", "loop.yaml", "--json", "--quiet"};
    words.insert(words.end(), more.begin(), more.end());
    const Json results = Json::parse(done(project.run(words)));
    for (const Json& figures : results.at("arms")) {
      if (figures.at("name") == arm + name) {
        return figures.at("domains");
      }
    }
    FAIL("no arm " << arm << name);
    return Json();
  };
  CHECK(measured("tuned", {"--bundle", "runs/tuned/untuned", "--only", "tuned"}) ==
        measured("baseline", {"--only", "baseline"}));
}

TEST_CASE("a rule with a scope is trained, exported, evaluated and served for the text that it names") {
  const SmallProject project;
  make_loop(project, ", scope: {domains: [letters], elsewhere: 0.25, window: 8, keep: 0.9}");
  check_complaint(project.run({"validate", "loop.yaml"}), 2,
                  {"residency.scope.domains", "must leave a domain of data.train out", "(letters)"});
  check_complaint(project.run({"validate", "loop.yaml", "residency.scope.domains=[lettres]"}), 2,
                  {"residency.scope.domains", "\"lettres\", which data.train does not name", "letters"});
  check_complaint(project.run({"validate", "loop.yaml", "residency.scope.domains=[]"}), 2,
                  {"residency.scope.elsewhere does nothing without residency.scope.domains", "residency.scope.keep"});
  check_complaint(project.run({"validate", "loop.yaml", "residency.scope.elsewhere=1.5"}), 2,
                  {"residency.scope.elsewhere", "1.5"});
  project.write("loop.yaml", replaced(project.read("loop.yaml"), "train: [letters]", "train: [letters, colours]"));
  done(project.run({"finetune", "loop.yaml", "--quiet"}));
  const Json rule = read_json_file(project.path() / "runs/tuned/residency.json");
  CHECK(rule.at("format_version") == 3);
  const Json& scope = rule.at("scope");
  CHECK(scope.at("domains") == Json{"letters"});
  CHECK(scope.at("elsewhere") == 0.25);
  CHECK(scope.at("weights").size() == 2);
  CHECK(scope.at("weights").at(0).size() == 8);
  CHECK(scope.at("offsets").size() == 2);
  check_complaint(project.run({"export", "loop.yaml", "residency.scope.elsewhere=0.5"}), 2,
                  {"residency.scope.elsewhere was 0.25 when the run was trained in the loop", "got 0.5"});
  done(project.run({"export", "loop.yaml", "--quiet"}));
  CHECK(read_json_file(project.path() / "runs/tuned/bundle/manifest.json").at("residency") == rule);
  CHECK_THAT(done(project.run({"inspect", "runs/tuned/bundle"})),
             Catch::Contains("residency lambda 0.3, for letters (elsewhere times 0.25), J 1") &&
                 Catch::Contains("letters, told from the last 8 tokens; elsewhere lambda counts 0.25 times"));
  const std::string table = done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[3]",
                                              "evaluate.residency_prior.always_keep=[0]", "--quiet"}));
  CHECK_THAT(table, Catch::Contains("  scope ") && Catch::Contains("; scope share of tokens and layers"));
  const Json results = read_json_file(project.path() / "runs/tuned/results.json");
  const auto arm_named = [&](const std::string& name) {
    for (const Json& arm : results.at("arms")) {
      if (arm.at("name") == name) {
        return arm;
      }
    }
    FAIL("no arm " << name);
    return Json();
  };
  const Json of_rule = arm_named("tuned, lambda 0.3, for letters (elsewhere times 0.25), J 1");
  CHECK(of_rule.at("domains").at(0).at("scope_share").get<double>() > 0.6);
  CHECK(of_rule.at("domains").at(1).at("scope_share").get<double>() < 0.4);
  CHECK_FALSE(arm_named("tuned").at("domains").at(0).contains("scope_share"));
  CHECK(of_rule.at("residency").at("scope") ==
        Json{{"domains", {"letters"}}, {"elsewhere", 0.25}, {"window", 8}, {"keep", 0.9}});
  // A strong rule: few loads are left where it is meant for, more of them elsewhere.
  const auto share_left = [&](std::size_t domain) {
    const auto loads = [&](const std::string& name) {
      const Json arm = arm_named(name);
      for (const Json& cell : arm.at("domains").at(domain).at("cache")) {
        if (cell.at("policy") == "lru" && cell.at("slots") == 3) {
          return cell.at("loads").get<double>();
        }
      }
      return -1.0;
    };
    return loads("baseline, lambda 3, for letters (elsewhere times 0.25), J 0") / loads("baseline");
  };
  CHECK(share_left(0) < 0.6);
  CHECK(share_left(1) > share_left(0) + 0.1);
  const auto served = [&](const std::string& text) {
    return Json::parse(done(project.run({"generate", "--model", "runs/base/model", "--router", "runs/tuned/bundle",
                                         "--prompt", text, "--max-tokens", "3", "--ignore-eos", "--device", "cpu",
                                         "--expert-slots", "3", "--json"})))
        .at("residency")
        .at("scope");
  };
  const std::string letters =
      project
          .read("letters/" +
                std::filesystem::directory_iterator(project.path() / "letters")->path().filename().string())
          .substr(0, 200);
  const Json of_letters = served(letters);
  CHECK(of_letters.at("domains") == Json{"letters"});
  CHECK(of_letters.at("elsewhere") == 0.25);
  CHECK(of_letters.at("share_of_layers") == 1.0);
  CHECK(served("red? green? blue? red? dark pale vivid dull").at("share_of_layers") < 1.0);
  // Everywhere, for comparison.
  CHECK(Json::parse(done(project.run({"generate", "--model", "runs/base/model", "--router", "runs/tuned/bundle",
                                      "--prompt-tokens", "1,2,3", "--max-tokens", "3", "--ignore-eos", "--device",
                                      "cpu", "--expert-slots", "3", "--residency-everywhere", "--json"})))
            .at("residency")
            .at("scope")
            .is_null());
  check_complaint(project.run({"generate", "--model", "runs/base/model", "--prompt-tokens", "1,2,3", "--expert-slots",
                               "3", "--device", "cpu", "--residency-everywhere"}),
                  2, {"--residency-everywhere: there is no bundle whose rule is for some text alone"});
  check_complaint(project.run({"generate", "--model", "runs/base/model", "--router", "runs/tuned/bundle",
                               "--prompt-tokens", "1,2,3", "--device", "cpu", "--residency-everywhere"}),
                  2, {"--residency-everywhere: is about expert slots", "give --expert-slots"});
  CHECK_THAT(done(project.run({"evaluate", "loop.yaml", "evaluate.residency_prior.lambdas=[0.3]",
                               "evaluate.residency_prior.always_keep=[1]", "evaluate.residency_prior.in_scope=false",
                               "--only", "baseline", "--quiet"})),
             Catch::Contains("baseline, lambda 0.3, J 1") &&
                 Catch::Contains("baseline, lambda 0.3, for letters (elsewhere times 0.25), J 1"));
}
