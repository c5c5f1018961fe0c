#include <algorithm>
#include <iostream>
#include <memory>
#include <set>
#include <vector>

#include <fmt/format.h>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/data/choice_questions.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/evaluation/comparison.hpp"
#include "hestia/evaluation/throughput.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/recipes.hpp"
#include "hestia/trainer/residency.hpp"

namespace hestia {

namespace {

// What the checks complained about, each once.
class Complaints {
 public:
  void add(ExitCode code, const std::string& message) {
    const std::vector<std::string>& known = problems_.messages();
    if (std::find(known.begin(), known.end(), message) == known.end()) {
      problems_.add(message);
      wrong_recipe_ = wrong_recipe_ || code == ExitCode::kUsage;
    }
  }
  void add_all(const Complaints& others) {
    for (const std::string& message : others.problems_.messages()) {
      add(others.wrong_recipe_ ? ExitCode::kUsage : ExitCode::kInput, message);
    }
  }
  // Runs one check and keeps what it complains about.
  template <class Check>
  void collect(const Check& check) {
    try {
      check();
    } catch (const Error& error) {
      add(error.exit_code(), error.what());
    }
  }
  [[nodiscard]] bool empty() const { return problems_.empty(); }
  // A recipe to be mended goes before files to be fetched.
  void throw_if_any() const {
    if (wrong_recipe_) {
      problems_.throw_usage_if_any();
    }
    problems_.throw_input_if_any();
  }

 private:
  Problems problems_;
  bool wrong_recipe_ = false;
};

void check_corpora(const DataOptions& data, const std::vector<TaskOptions>& tasks, Complaints& complaints) {
  std::set<std::string> domains(data.train.begin(), data.train.end());
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    if (!tasks[i].domain.empty()) {
      domains.insert(tasks[i].domain);
    } else {
      complaints.collect([&] {
        static_cast<void>(read_choice_questions(tasks[i].choices, tasks[i].limit, fmt::format("evaluate.tasks.{}", i)));
      });
    }
  }
  domains.insert(data.evaluate.begin(), data.evaluate.end());
  for (const std::string& domain : domains) {
    complaints.collect([&] {
      const auto [corpus, key] = find_corpus(data, domain);
      CorpusOptions sample = *corpus;
      sample.max_bytes = 1;
      static_cast<void>(read_corpus(sample, {data.held_out_fraction, static_cast<std::uint64_t>(data.split_seed)},
                                    Split::kTrain, key));
    });
  }
}

void check_model(const LoadedRecipe<FinetuneRecipe>& loaded, Complaints& complaints) {
  const std::string& path = loaded.recipe.model.path;
  complaints.collect([&] {
    const Architecture architecture = read_architecture(path);
    complaints.collect([&] {
      static_cast<void>(
          recipe_losses(loaded.recipe.losses, loaded.source, architecture.num_experts, architecture.top_k));
    });
    complaints.collect([&] {
      Problems problems;
      check_train_fits(loaded.recipe.train, loaded.source, architecture, problems);
      problems.throw_usage_if_any();
    });
    complaints.collect([&] { check_evaluate_fits(loaded, architecture); });
    complaints.collect([&] { static_cast<void>(residency_rule(loaded, architecture)); });
    complaints.collect([&] {
      const SafetensorsCheckpoint checkpoint(path);
      for (const TensorSpec& spec : tensor_specs(architecture)) {
        for (const StoredTensor& part : stored_tensors(architecture, spec, checkpoint)) {
          if (!checkpoint.contains(part.name)) {
            complaints.add(ExitCode::kInput,
                           fmt::format("{}: tensor \"{}\" is missing; fetch the checkpoint again", path, part.name));
          }
        }
      }
    });
  });
  complaints.collect([&] {
    const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(path);
    for (std::size_t i = 0; i < loaded.recipe.data.corpora.size(); ++i) {
      complaints.collect(
          [&] { check_template_tokens(loaded.recipe.data.corpora[i], fmt::format("data.corpora.{}", i), *tokenizer); });
    }
  });
}

void check_recipe(const std::string& path, const std::vector<std::string>& overrides, bool with_files,
                  Complaints& complaints) {
  if (recipe_task(path) == "bench") {
    const auto loaded = load_bench_recipe(path, overrides);
    if (with_files) {
      complaints.collect([&] {
        const Architecture architecture = bench_architecture(loaded);
        complaints.collect([&] { check_bench_formats(loaded, architecture); });
        complaints.collect([&] { check_bench_lengths(loaded, architecture); });
        complaints.collect([&] { static_cast<void>(bench_preload(loaded, architecture)); });
        if (!loaded.recipe.replay.trace.empty()) {
          std::string fold;
          static_cast<void>(bench_trace(loaded, architecture, fold));
        }
      });
    }
    return;
  }
  if (recipe_task(path) == "pretrain") {
    const auto loaded = load_pretrain_recipe(path, overrides);
    const PretrainRecipe& recipe = loaded.recipe;
    complaints.collect([&] {
      static_cast<void>(
          recipe_losses(recipe.losses, loaded.source, recipe.architecture.num_experts, recipe.architecture.top_k));
    });
    if (with_files) {
      if (!recipe.tokenizer.path.empty()) {
        complaints.collect([&] { static_cast<void>(open_tokenizer(recipe.tokenizer.path)); });
      }
      check_corpora(recipe.data, {}, complaints);
    }
    return;
  }
  const auto loaded = load_finetune_recipe(path, overrides);
  if (with_files) {
    check_model(loaded, complaints);
    check_corpora(loaded.recipe.data, loaded.recipe.evaluate.tasks, complaints);
  }
}

struct ValidateArguments {
  std::vector<std::string> recipes;
  bool no_files = false;
  std::string keys;
};

}  // namespace

void add_validate(CLI::App& app) {
  auto arguments = std::make_shared<ValidateArguments>();
  CLI::App* verb = app.add_subcommand("validate", "check recipes, and that the model and text they name are there");
  verb->add_option("recipes", arguments->recipes, "recipes (YAML), and key=value overrides for all of them");
  verb->add_flag("--no-files", arguments->no_files, "check the recipes alone");
  verb->add_option("--help-keys", arguments->keys, "print every key of a recipe kind: finetune, pretrain or bench")
      ->check(CLI::IsMember({"finetune", "pretrain", "bench"}));
  verb->footer("Example: hestia validate recipes/*.yaml");
  verb->callback([arguments] {
    if (!arguments->keys.empty()) {
      std::cout << recipe_keys(arguments->keys);
      return;
    }
    std::vector<std::string> recipes;
    std::vector<std::string> overrides;
    for (const std::string& argument : arguments->recipes) {
      (argument.find('=') == std::string::npos ? recipes : overrides).push_back(argument);
    }
    if (recipes.empty()) {
      throw UsageError("validate: give at least one recipe, got none");
    }
    Complaints all;
    for (const std::string& recipe : recipes) {
      Complaints complaints;
      complaints.collect([&] { check_recipe(recipe, overrides, !arguments->no_files, complaints); });
      if (complaints.empty()) {
        std::cout << recipe << ": OK\n";
      }
      all.add_all(complaints);
    }
    std::cout << std::flush;
    all.throw_if_any();
  });
}

}  // namespace hestia
