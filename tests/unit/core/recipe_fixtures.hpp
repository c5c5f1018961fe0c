#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core_fixtures.hpp"
#include "hestia/core/recipe.hpp"
#include "temporary_folder.hpp"

namespace hestia {

/// Options with a field of every kind.
struct Corpus {
  std::string domain;
  std::vector<std::string> paths;
  double share = 1.0;
  FieldList fields() {
    FieldList list;
    list.add("domain", domain, "label in every report").required();
    list.add("paths", paths, "where the text lies");
    list.add("share", share, "part of the text", {.low = 0, .high = 1, .exclusive_low = true});
    return list;
  }
};

struct Options {
  std::string run_dir = "runs/a";
  bool strict = false;
  std::int64_t steps = 120;
  double learning_rate = 5e-3;
  double weight_decay = 0.0;
  std::string schedule = "cosine";
  std::vector<std::int64_t> slots = {4, 8};
  std::vector<double> betas = {0.9, 0.95};
  std::vector<std::string> policies = {"lru"};
  double load_balance = 0.01;
  double reuse = 0.3;
  std::vector<Corpus> corpora;

  FieldList fields() {
    FieldList train;
    train.add("steps", steps, "optimiser steps", {.low = 1, .high = 1e15});
    train.add("learning_rate", learning_rate, "peak learning rate", {.low = 0, .exclusive_low = true});
    train.add("weight_decay", weight_decay, "decay a step", {.low = 0, .high = 1});
    train.add("schedule", schedule, "learning-rate decay", {"linear", "cosine", "constant"});
    train.add("betas", betas, "averages of AdamW", {.low = 0, .high = 1});
    FieldList losses;
    losses.add("load_balance", load_balance, "weight");
    losses.add("reuse", reuse, "weight");
    FieldList cache;
    cache.add("slots", slots, "slots a layer", {.low = 1});
    cache.add("policies", policies, "policies to compare", {"lru", "lfu", "belady"});
    FieldList list;
    list.add("run_dir", run_dir, "folder of the run").required();
    list.add("strict", strict, "refuse degraded modes");
    list.add_section("train", train, "the loop");
    list.add_section("losses", losses, "objectives");
    list.add_section("cache", cache, "simulated caches");
    list.add_list("corpora", corpora, "where the text comes from");
    return list;
  }
};

/// A recipe file in a folder of its own, read into Options.
class RecipeCase {
 public:
  Options options;
  Problems problems;
  RecipeSource source;

  explicit RecipeCase(const std::string& text, const std::vector<std::string>& overrides = {}) {
    put_file(path(), text);
    source = read_recipe(path(), overrides, options.fields(), problems);
  }
  [[nodiscard]] std::filesystem::path path() const { return folder_.path() / "r.yaml"; }
  /// All problems, with the folder taken out.
  [[nodiscard]] std::string told() const { return relative(problems.joined()); }
  [[nodiscard]] std::string relative(std::string text) const {
    const std::string folder = folder_.path().string() + "/";
    for (std::size_t at = 0; (at = text.find(folder)) != std::string::npos;) {
      text.erase(at, folder.size());
    }
    return text;
  }

 private:
  TemporaryFolder folder_;
};

inline const std::string kHead = "recipe_version: 1\nrun_dir: runs/x\n";

}  // namespace hestia
