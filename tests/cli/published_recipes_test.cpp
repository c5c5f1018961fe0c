#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <set>

#include <fmt/format.h>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/recipes.hpp"
#include "tiny_model.hpp"

namespace hestia::testing {
namespace {

const std::filesystem::path kRecipes = HESTIA_SOURCE_DIR "/recipes";

// Published recipes by the family of their model.
const std::map<std::string, std::vector<std::string>> kPublished = {
    {"olmoe", {"melinoe_olmoe_dolly", "melinoe_olmoe_gsm8k", "combined_olmoe_dolly", "combined_olmoe_gsm8k"}},
    {"phimoe", {"melinoe_phi35moe_dolly", "melinoe_phi35moe_gsm8k"}},
    {"mixtral", {"melinoe_mixtral_dolly", "melinoe_mixtral_gsm8k"}},
    {"deepseek_v2", {"remoe_deepseek_v2_lite_openhermes"}},
    {"qwen2_moe", {"remoe_qwen15_moe_openhermes"}},
};

// Ours, for models of the OLMoE family.
const std::vector<std::string> kOurs = {"held_olmoe_gsm8k", "in_place_olmoe_dolly"};

// What learns to answer: a few words that differ from line to line.
std::string words(SplitMix64& random, std::size_t count) {
  static const char* const kWords[] = {"seven", "apples", "cost", "each", "day", "half", "of", "them", "and", "river"};
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text.append(i == 0 ? "" : " ").append(kWords[random.below(std::size(kWords))]);
  }
  return text;
}

// Small files in the formats of the data sets, with every answer in them.
class SampleData {
 public:
  explicit SampleData(const std::filesystem::path& folder) : folder_(folder) {
    SplitMix64 random(31);
    const std::filesystem::path recorded =
        std::filesystem::path(HESTIA_SOURCE_DIR) / ".." / "shared" / "data" / "gsm8k" / "train.jsonl";
    std::vector<Json> problems;
    if (std::filesystem::exists(recorded)) {
      std::ifstream stream(recorded);
      for (std::string line; problems.size() < kLines && std::getline(stream, line);) {
        problems.push_back(Json::parse(line));
      }
    }
    std::vector<Json> instructions;
    std::vector<Json> conversations;
    while (instructions.size() < kLines) {
      instructions.push_back({{"instruction", words(random, 6) + "?"},
                              {"context", random.below(3) == 0 ? words(random, 20) : ""},
                              {"response", words(random, 3 + random.below(20)) + "."},
                              {"category", "closed_qa"}});
      Json messages = Json::array();
      const std::size_t turns = 1 + random.below(3);
      for (std::size_t turn = 0; turn < turns; ++turn) {
        messages.push_back({{"from", "human"}, {"value", words(random, 8) + "?"}});
        messages.push_back({{"from", "gpt"}, {"value", words(random, 5 + random.below(20)) + "."}});
      }
      conversations.push_back({{"conversations", messages}, {"source", "sample"}});
      if (problems.size() < kLines) {
        problems.push_back({{"question", words(random, 20) + "?"},
                            {"answer", words(random, 20) + "\n#### " + std::to_string(random.below(90))}});
      }
    }
    write("gsm8k", problems);
    write("dolly", instructions);
    write("openhermes", conversations);
    collect("gsm8k", problems, "answer");
    collect("dolly", instructions, "response");
    for (const Json& line : conversations) {
      for (const Json& message : line["conversations"]) {
        texts_.push_back(message["value"]);
        if (message["from"] == "gpt") {
          answers_["openhermes"].insert(message["value"].get<std::string>());
        }
      }
    }
  }
  [[nodiscard]] std::string path(const std::string& domain) const { return (folder_ / (domain + ".jsonl")).string(); }
  [[nodiscard]] const std::set<std::string>& answers(const std::string& domain) const { return answers_.at(domain); }
  [[nodiscard]] const std::vector<std::string>& texts() const { return texts_; }

 private:
  static constexpr std::size_t kLines = 240;

  void write(const std::string& domain, const std::vector<Json>& lines) const {
    std::string text;
    for (const Json& line : lines) {
      text += line.dump() + "\n";
    }
    write_text_atomically(path(domain), text);
  }
  void collect(const std::string& domain, const std::vector<Json>& lines, const std::string& key) {
    for (const Json& line : lines) {
      answers_[domain].insert(line[key].get<std::string>());
      texts_.push_back(line[key].get<std::string>());
    }
  }

  std::filesystem::path folder_;
  std::map<std::string, std::set<std::string>> answers_;
  std::vector<std::string> texts_;
};

// A random model of the family with a vocabulary that has the tokens of `templates`.
void make_model(const std::string& family, const std::set<std::string>& templates, const SampleData& sample,
                const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  TokenizerTraining training{.vocab_size = 420};
  for (const std::string& name : templates) {
    for (const std::string& token : template_tokens(name)) {
      training.special_tokens.push_back(token);
    }
  }
  std::size_t next = 0;
  train_tokenizer(
      [&](std::string& text) {
        text = next < sample.texts().size() ? sample.texts()[next] : "";
        return next++ < sample.texts().size();
      },
      training, folder / "tokenizer.model");
  const auto tokenizer = open_tokenizer(folder);
  Architecture architecture = tiny_architecture(family);
  architecture.num_experts = 16;
  architecture.expert_intermediate_size = 32;  // room for adapters of rank 32
  architecture.vocab_size = tokenizer->vocab_size();
  architecture.max_position_embeddings = 4096;
  architecture.bos_token_id = tokenizer->bos_id();
  architecture.eos_token_id = tokenizer->eos_id();
  MoeModel model = create_model(architecture, torch::kFloat32, torch::kCPU, 5);
  save_model(model, folder, torch::kBFloat16, 1 << 30);
}

void check_finite(const Json& value, const std::string& name) {
  INFO(name << ": " << value.dump());
  if (value.is_object()) {
    for (const auto& [key, inner] : value.items()) {
      check_finite(inner, name + "." + key);
    }
  } else {
    CHECK((value.is_string() || (value.is_number() && std::isfinite(value.get<double>()))));
  }
}

// What a run of `steps` steps leaves behind.
void check_run(const std::filesystem::path& run_dir, std::int64_t steps, const std::vector<std::string>& terms) {
  INFO(run_dir.string());
  const std::filesystem::path checkpoint = run_dir / "checkpoints" / fmt::format("step_{}", steps);
  for (const std::filesystem::path& name :
       {run_dir / "recipe.yaml", run_dir / "metrics.jsonl", checkpoint / "DONE", checkpoint / "state.json",
        checkpoint / "router.safetensors", checkpoint / "optimizer.safetensors"}) {
    INFO(name.string());
    CHECK(std::filesystem::exists(name));
  }
  std::vector<std::string> events;
  read_json_lines(run_dir / "metrics.jsonl", [&](std::int64_t, const Json& event) {
    events.push_back(event.at("event"));
    check_finite(event, events.back());
    if (events.back() == "start") {
      CHECK(event.at("steps") == steps);
      for (const auto& [domain, figures] : event.at("data").items()) {
        INFO(domain);
        CHECK(figures.at("completion_tokens").get<int>() > 0);
        CHECK(figures.at("completion_tokens").get<int>() < figures.at("tokens").get<int>());
        CHECK(figures.at("examples").get<int>() > 0);
      }
    } else if (events.back() == "step") {
      CHECK(event.at("gradient_norm").get<double>() > 0.0);
      for (const std::string& term : terms) {
        CHECK(event.contains(term));
      }
    } else {
      CHECK(event.at("held_out").size() == 2);
    }
  });
  CHECK(events == std::vector<std::string>{"start", "step", "step", "evaluate"});
}

// Labelled tokens are whole answers with the token that ends them, or what a sequence has room for of one.
void check_masks(const FinetuneRecipe& recipe, const Tokenizer& tokenizer, const SampleData& sample) {
  const PackedData data = load_training_data(recipe.data, tokenizer, 1);
  REQUIRE(data.sequences.size() > 100);
  std::size_t whole = 0;
  for (const PackedBatch& batch : pack_for_evaluation(data, -1, 4, recipe.data.sequence_length)) {
    for (std::size_t at = 0; at < batch.labels.size(); ++at) {
      if (batch.labels[at] < 0 || (at > 0 && batch.labels[at - 1] >= 0)) {
        continue;
      }
      const std::string& domain =
          data.domains.at(static_cast<std::size_t>(batch.domains[static_cast<std::size_t>(batch.sequence_ids[at])]));
      std::vector<std::int32_t> run;
      for (std::size_t t = at; t < batch.labels.size() && batch.labels[t] >= 0; ++t) {
        REQUIRE(batch.counted[t + 1] == 1);
        run.push_back(static_cast<std::int32_t>(batch.labels[t]));
      }
      const bool ended = tokenizer.count_bytes({run.back()}) == 0;
      if (ended) {
        run.pop_back();
      }
      std::string text = tokenizer.decode(run);
      if (!text.empty() && text.front() == ' ') {
        text = text.substr(1);
      }
      const std::set<std::string>& answers = sample.answers(domain);
      INFO("labelled: " << text);
      if (ended) {
        ++whole;
        REQUIRE(answers.count(text) == 1);
      } else {
        REQUIRE(std::any_of(answers.begin(), answers.end(),
                            [&](const std::string& answer) { return answer.rfind(text.substr(0, 40), 0) == 0; }));
      }
    }
  }
  CHECK(whole > data.sequences.size() / 2);
}

void run_two_steps(const std::string& family, const std::string& name, const std::vector<std::string>& more = {},
                   std::size_t least_terms = 2) {
  INFO(name);
  const TemporaryFolder folder;
  const SampleData sample(folder.path());
  const std::string file = (kRecipes / (name + ".yaml")).string();
  const FinetuneRecipe recipe = load_finetune_recipe(file, {}).recipe;
  std::set<std::string> templates;
  // Fewer rows than published: how many there are changes no path.
  std::vector<std::string> overrides = {"model.path=" + (folder.path() / "model").string(),
                                        "model.device=cpu",
                                        "train.steps=2",
                                        "train.rows_per_batch=2",
                                        "train.accumulate=2",
                                        "train.evaluate_tokens=2000"};
  overrides.insert(overrides.end(), more.begin(), more.end());
  for (std::size_t i = 0; i < recipe.data.corpora.size(); ++i) {
    templates.insert(recipe.data.corpora[i].chat_template);
    overrides.push_back(fmt::format("data.corpora.{}.paths=[{}]", i, sample.path(recipe.data.corpora[i].domain)));
  }
  make_model(family, templates, sample, folder.path() / "model");
  const auto run = [&](const std::vector<std::string>& verb) {
    std::vector<std::string> arguments = verb;
    arguments.push_back(file);
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    return done(hestia(arguments, {folder.path(), {}, {}}));
  };
  CHECK(run({"validate"}) == file + ": OK\n");
  const std::filesystem::path model = folder.path() / "model";
  const std::string inspected = done(hestia({"inspect", model.string(), "--memory", "1MiB"}, {folder.path(), {}, {}}));
  for (const std::string& part :
       {family, fmt::format("2 ({} with experts)", read_architecture(model).moe_layers().size()),
        router_name(read_architecture(model), 1), std::string("slots in")}) {
    CHECK_THAT(inspected, Catch::Contains(part));
  }
  (void)run({"finetune", "--quiet"});
  std::vector<std::string> terms;
  for (const WeightedLoss& weighted : make_routing_losses(recipe.losses, 16, 2)) {
    if (weighted.weight > 0.0) {
      terms.emplace_back(weighted.loss->name());
    }
  }
  if (recipe.distillation.weight > 0.0) {
    terms.emplace_back("logit_distillation");
  }
  CHECK(terms.size() >= least_terms);
  const std::filesystem::path run_dir = folder.path() / recipe.run_dir;
  check_run(run_dir, 2, terms);
  REQUIRE(recipe.control.enabled);
  check_run(run_dir / "control", 2, {});
  const FinetuneRecipe saved = load_finetune_recipe(run_dir / "recipe.yaml", {}).recipe;
  CHECK(saved.train.steps == 2);
  check_masks(saved, *open_tokenizer(folder.path() / "model"), sample);
}

TEST_CASE("every published recipe is there, with a header that says what it needs and how it is run") {
  std::set<std::string> expected = {"quickstart", "pretrain_tiny", "residency_tiny", "scope_tiny", "bench_olmoe"};
  std::vector<std::string> with_headers = kOurs;
  for (const auto& [family, names] : kPublished) {
    with_headers.insert(with_headers.end(), names.begin(), names.end());
  }
  expected.insert(with_headers.begin(), with_headers.end());
  std::set<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(kRecipes)) {
    found.insert(entry.path().stem().string());
  }
  CHECK(found == expected);
  for (const std::string& name : with_headers) {
    INFO(name);
    const std::string text = read_text_file(kRecipes / (name + ".yaml"));
    const std::string head = text.substr(0, text.find("recipe_version"));
    CHECK(head.rfind("# ", 0) == 0);
    const FinetuneRecipe recipe = load_finetune_recipe(kRecipes / (name + ".yaml"), {}).recipe;
    CHECK(recipe.run_dir == "runs/" + name);
    const std::string path = fmt::format(" recipes/{}.yaml", name);
    for (const std::string& part :
         std::vector<std::string>{"arXiv", recipe.model.path, fmt::format("hestia validate{}", path),
                                  fmt::format("hestia finetune{}", path), fmt::format("hestia export  {}", path),
                                  fmt::format("hestia evaluate{}", path), "Override one key", "Memory:"}) {
      CHECK_THAT(head, Catch::Contains(part));
    }
    for (const CorpusOptions& corpus : recipe.data.corpora) {
      CHECK_THAT(head, Catch::Contains(corpus.paths.at(0)));
      CHECK_FALSE(corpus.origin.empty());
    }
  }
}

TEST_CASE("published recipes have the published settings") {
  for (const auto& [family, names] : kPublished) {
    for (const std::string& name : names) {
      INFO(name);
      const FinetuneRecipe recipe = load_finetune_recipe(kRecipes / (name + ".yaml"), {}).recipe;
      const bool dolly = name.find("dolly") != std::string::npos;
      CHECK(recipe.model.dtype == "bfloat16");
      CHECK(recipe.train.clip_norm == 1.0);
      CHECK(recipe.train.schedule == "linear");
      CHECK(recipe.train.trainable == (name.rfind("melinoe", 0) == 0 ? "router+lora" : "router"));
      CHECK(recipe.train.lora.rank == 32);
      CHECK(recipe.train.lora.alpha == 16.0);
      if (name.rfind("remoe", 0) != 0) {
        CHECK(recipe.losses.cache_simulation.weight == (dolly ? 0.5 : 0.05));
        CHECK(recipe.losses.cache_simulation.gamma == 0.9);
        CHECK(recipe.losses.cache_simulation.slots == 0);  // a quarter of the experts
        CHECK(recipe.losses.rank_matching.weight == (dolly ? 0.1 : 0.01));
        CHECK(recipe.losses.rank_matching.margin == 0.1);
        CHECK(recipe.losses.rank_matching.reference == "base_forward");
        CHECK(recipe.data.sequence_length == 512);
        CHECK(recipe.train.epochs == (dolly ? 3.0 : 5.0));
        CHECK(recipe.train.warmup_ratio == 0.03);
      }
      if (name.rfind("melinoe", 0) == 0) {
        CHECK(recipe.train.learning_rate == 1e-5);
        CHECK(recipe.losses.reuse.weight == 0.0);
      } else {
        CHECK(recipe.train.learning_rate == 5e-5);
        CHECK(recipe.losses.trust.weight == 0.45);
        CHECK((recipe.losses.reuse.weight == 0.2 && recipe.losses.reuse.ramp_steps == 400));
        CHECK((recipe.losses.smooth.weight == 0.05 && recipe.losses.smooth.ramp_steps == 800));
        CHECK((recipe.losses.lag.weight == 0.05 && recipe.losses.lag.ramp_steps == 800));
        CHECK((recipe.losses.working_set.weight == 0.01 && recipe.losses.working_set.ramp_steps == 800));
      }
      if (name.rfind("remoe", 0) == 0) {
        CHECK(recipe.losses.cache_simulation.weight == 0.0);
        CHECK((recipe.train.steps == 2000 && recipe.train.warmup_steps == 200));
        CHECK(recipe.data.sequence_length == 2048);
        CHECK(recipe.train.rows_per_batch * recipe.train.accumulate == 8);
      }
    }
  }
}

TEST_CASE("held concentration: terms on the task, distillation on the rest, in the residency loop") {
  const FinetuneRecipe recipe = load_finetune_recipe(kRecipes / "held_olmoe_gsm8k.yaml", {}).recipe;
  CHECK(recipe.data.train == std::vector<std::string>{"gsm8k", "dolly"});
  CHECK(recipe.data.train_mix == std::vector<double>{1.0, 1.0});
  CHECK(recipe.loss_domains == std::vector<std::string>{"gsm8k"});
  CHECK(recipe.distillation.domains == std::vector<std::string>{"dolly"});
  CHECK(recipe.distillation.weight == 1.0);
  CHECK(recipe.losses.reuse.weight == 0.3);
  CHECK((recipe.residency.in_loop && recipe.residency.lambda == 0.2 && recipe.residency.always_keep == 2));
  CHECK(recipe.train.trainable == "router+lora");
  run_two_steps("olmoe", "held_olmoe_gsm8k", {"residency.always_keep=1"});  // of the random model's 2
}

TEST_CASE("concentration in place: routers in the residency loop, the base as teacher, no routing term") {
  const FinetuneRecipe recipe = load_finetune_recipe(kRecipes / "in_place_olmoe_dolly.yaml", {}).recipe;
  CHECK(recipe.data.train == std::vector<std::string>{"dolly"});
  CHECK(recipe.distillation.domains.empty());
  CHECK(recipe.distillation.weight == 1.0);
  CHECK((recipe.losses.reuse.weight == 0.0 && recipe.losses.cache_simulation.weight == 0.0));
  CHECK((recipe.residency.in_loop && recipe.residency.lambda == 0.25 && recipe.residency.always_keep == 0));
  CHECK(recipe.train.trainable == "router");
  run_two_steps("olmoe", "in_place_olmoe_dolly", {}, 1);
  // The header's command for Dolly alone, with fewer tokens to tell by.
  run_two_steps("olmoe", "in_place_olmoe_dolly",
                {"data.train=[dolly,gsm8k]", "data.train_mix=[1,1]", "losses.nll.domains=[dolly]",
                 "losses.logit_distillation.weight=4", "residency.scope.domains=[dolly]",
                 "residency.scope.elsewhere=0.8", "residency.calibration_tokens=4096"},
                1);
}

TEST_CASE("concentration in scope: one task's text under the rule, general text held to the base") {
  const FinetuneRecipe recipe = load_finetune_recipe(kRecipes / "scope_tiny.yaml", {}).recipe;
  CHECK(recipe.residency.in_loop);
  CHECK(recipe.residency.scope.domains == std::vector<std::string>{"python"});
  CHECK(recipe.residency.scope.elsewhere == 0.8);
  CHECK(recipe.nll.domains == recipe.residency.scope.domains);
  CHECK(recipe.distillation.domains.empty());
  CHECK(recipe.data.train.size() == 3);
  CHECK(recipe.data.train_mix == std::vector<double>{2.0, 1.0, 1.0});
}

TEST_CASE("two steps of the published OLMoE recipes on a random model") {
  for (const std::string& name : kPublished.at("olmoe")) {
    run_two_steps("olmoe", name);
  }
}

TEST_CASE("two steps of the published recipes of other families on random models") {
  for (const auto& [family, names] : kPublished) {
    for (const std::string& name : names) {
      if (family != "olmoe") {
        run_two_steps(family, name);
      }
    }
  }
}

}  // namespace
}  // namespace hestia::testing
