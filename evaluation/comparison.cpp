#include "hestia/evaluation/comparison.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/shell_word.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/model/static_set.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/routing/agreement.hpp"
#include "hestia/trainer/bundle.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/residency.hpp"
#include "hestia/trainer/trainer.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kResultsFormat = 1;
constexpr const char* kResultsFile = "results.json";
constexpr const char* kAnswersFile = "answers.jsonl";
constexpr const char* kMultipleChoice = "multiple_choice";

// E/8, E/4, E/2 unless the recipe names slots.
std::vector<std::int64_t> slots_of(const EvaluateOptions& options, std::int64_t num_experts) {
  std::vector<std::int64_t> slots = options.slots;
  if (slots.empty()) {
    for (const std::int64_t share : {8, 4, 2}) {
      slots.push_back(std::max<std::int64_t>(1, num_experts / share));
    }
  }
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  if (slots.back() > num_experts) {
    throw UsageError(fmt::format("evaluate.slots must be at most the model's experts per layer ({}), got {}; remove it",
                                 num_experts, slots.back()));
  }
  return slots;
}

std::vector<std::int64_t> segments_of(const EvaluateOptions& options) {
  std::vector<std::int64_t> segments = options.segments;
  std::sort(segments.begin(), segments.end());
  segments.erase(std::unique(segments.begin(), segments.end()), segments.end());
  return segments;
}

// Sizes of the static-set test. A layer has to have K experts to choose from.
std::vector<std::int64_t> static_sets_of(const EvaluateOptions& options, const Architecture& architecture) {
  std::vector<std::int64_t> sizes;
  for (const std::int64_t size : options.static_set) {
    sizes.push_back(size > 0 ? size : std::max(architecture.top_k, architecture.num_experts / 4));
    if (sizes.back() < architecture.top_k || sizes.back() > architecture.num_experts) {
      throw UsageError(
          fmt::format("evaluate.static_set must be from the model's experts per token to its experts per layer ({} to "
                      "{}) or 0, got "
                      "{}; remove it",
                      architecture.top_k, architecture.num_experts, size));
    }
  }
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

// Counted selections per layer and expert, [L, E].
void count_selections(const SequenceRouting& routing, std::vector<std::int64_t>& counts) {
  counts.resize(static_cast<std::size_t>(routing.num_layers * routing.num_experts), 0);
  for (std::int64_t layer = 0; layer < routing.num_layers; ++layer) {
    for (std::int64_t token = 0; token < routing.num_tokens; ++token) {
      const std::int64_t row = layer * routing.num_tokens + token;
      for (std::int64_t k = 0; k < routing.top_k && routing.is_counted(token); ++k) {
        const std::uint16_t expert = routing.selected[static_cast<std::size_t>(row * routing.top_k + k)];
        counts[static_cast<std::size_t>(layer * routing.num_experts + expert)] += 1;
      }
    }
  }
}

// Perplexity when every token, of the prompt too, chooses among the experts that the domain used most.
StaticSetFigures measure_static_set(MoeModel& model, const PackedData& held_out,
                                    const std::vector<PackedBatch>& batches, const std::vector<std::int64_t>& counts,
                                    std::int64_t size, const std::function<void(std::int64_t)>& advance) {
  const Architecture& architecture = model->architecture();
  const auto num_layers = static_cast<std::int64_t>(architecture.moe_layers().size());
  StaticSetFigures figures;
  figures.experts = size;
  const auto sets = most_used_experts(counts, num_layers, size);
  std::int64_t inside = 0;
  std::int64_t all = 0;
  for (std::size_t layer = 0; layer < sets.size(); ++layer) {
    const auto begin = counts.begin() + static_cast<std::ptrdiff_t>(layer) * architecture.num_experts;
    all += std::accumulate(begin, begin + architecture.num_experts, std::int64_t{0});
    for (const std::int64_t expert : sets[layer]) {
      inside += begin[expert];
    }
  }
  figures.share = all > 0 ? static_cast<double>(inside) / static_cast<double>(all) : 0.0;
  const std::shared_ptr<Selector> before = model->selector();
  model->set_selector(std::make_shared<StaticSetSelector>(sets, architecture.num_experts));
  try {
    figures.quality = measure(model, held_out, batches, false, {}, advance);
  } catch (...) {
    model->set_selector(before);
    throw;
  }
  model->set_selector(before);
  return figures;
}

// Name of a router served under a rule; what is not the bundle's stands in it.
std::string under_rule(const std::string& router, const ResidencyRule& rule, const ResidencyRule& bundle) {
  const bool other_factors = !bundle.layer_factors.empty() && rule.layer_factors != bundle.layer_factors;
  return fmt::format("{}, {}, J {}{}{}", router, lambda_text(rule), rule.always_keep,
                     rule.slots == bundle.slots ? "" : fmt::format(", C {}", rule.slots),
                     other_factors ? ", other factors" : "");
}

// The bundle's file has what its scope is told by.
Json served_rule_json(const ArmFigures& arm) {
  if (!arm.residency) {
    return {};
  }
  Json rule = residency_json(*arm.residency);
  if (!arm.residency->scope.everywhere()) {
    rule["scope"].erase("weights");
    rule["scope"].erase("offsets");
  }
  return rule;
}

// The rules to serve every router under beside plain Top-K: the recipe's grid, and the one the bundle is meant for.
std::vector<ResidencyRule> residency_rules(const LoadedRecipe<FinetuneRecipe>& loaded, const ResidencyRule& bundle,
                                           const std::filesystem::path& bundle_dir, const Architecture& architecture) {
  const ResidencyPriorOptions& prior = loaded.recipe.evaluate.residency_prior;
  if (bundle.slots < 1 || bundle.slots > architecture.num_experts) {
    throw InputError(
        fmt::format("{}: residency.slots must be from 1 to the model's experts per layer ({}), got {}; "
                    "export the bundle again",
                    (bundle_dir / "manifest.json").string(), architecture.num_experts, bundle.slots));
  }
  check_scope(bundle, architecture, bundle_dir.string());
  std::vector<ResidencyRule> rules;
  const auto add = [&](ResidencyScore score, double lambda, std::int64_t always_keep, std::int64_t slots,
                       const std::vector<double>& factors, const ResidencyScope& scope) {
    const bool known = std::any_of(rules.begin(), rules.end(), [&](const ResidencyRule& rule) {
      return rule.score == score && rule.lambda == lambda && rule.always_keep == always_keep && rule.slots == slots &&
             rule.layer_factors == factors && rule.scope == scope;
    });
    if (!known) {
      rules.push_back(bundle);
      rules.back().score = score;
      rules.back().lambda = lambda;
      rules.back().always_keep = always_keep;
      rules.back().slots = slots;
      rules.back().layer_factors = factors;
      rules.back().scope = scope;
    }
  };
  const std::int64_t slots = prior.slots > 0 ? prior.slots : bundle.slots;
  const std::vector<double>& factors = prior.layer_factors.empty() ? bundle.layer_factors : prior.layer_factors;
  const ResidencyScope scope = prior.in_scope ? bundle.scope : ResidencyScope();
  for (const std::int64_t always_keep : prior.always_keep) {
    for (const double lambda : prior.lambdas) {
      add(ResidencyScore::kLogit, lambda, always_keep, slots, factors, scope);
    }
    for (const double lambda : prior.weight_lambdas) {
      add(ResidencyScore::kWeight, lambda, always_keep, slots, factors, scope);
    }
    for (const double lambda : prior.root_lambdas) {
      add(ResidencyScore::kRoot, lambda, always_keep, slots, factors, scope);
    }
  }
  if (bundle.lambda > 0.0) {
    add(bundle.score, bundle.lambda, bundle.always_keep, bundle.slots, bundle.layer_factors, bundle.scope);
  }
  return rules;
}

// The text that every router is measured on.
PackedData evaluation_data(const FinetuneRecipe& recipe, const Tokenizer& tokenizer, std::int64_t threads) {
  return load_sample(recipe.data, recipe.data.evaluate, tokenizer,
                     recipe.evaluate.split == "train" ? Split::kTrain : Split::kHeldOut,
                     recipe.evaluate.tokens_per_domain, threads);
}

std::int64_t expert_bytes_of(MoeModel& model) {
  return model->architecture().expert_parameters() * static_cast<std::int64_t>(torch::elementSize(model->dtype()));
}

double relative(double value, double reference) {
  return value / reference - 1.0;
}

Json cache_json(const CacheFigures& cache) {
  return {{"policy", cache.policy},
          {"slots", cache.slots},
          {"requests", cache.counts.requests},
          {"hits", cache.counts.hits},
          {"cold", cache.counts.cold},
          {"loads", cache.counts.loads},
          {"evictions", cache.counts.evictions},
          {"hit_rate", cache.counts.hit_rate()},
          {"loads_per_token_layer", cache.loads_per_token_layer},
          {"modelled_bytes_per_token", cache.bytes_per_token}};
}

Json domain_json(const DomainFigures& figures) {
  Json cells = Json::array();
  for (const CacheFigures& cache : figures.cache) {
    cells.push_back(cache_json(cache));
  }
  Json segments = Json::array();
  for (const SegmentFigures& segment : figures.segments) {
    segments.push_back({{"segment", segment.segment_length},
                        {"value", segment.routing.best_performance},
                        {"size_ratio", segment.routing.size_ratio},
                        {"segments", segment.routing.segments}});
  }
  Json segment_caches = Json::array();
  for (const SegmentCacheFigures& cache : figures.segment_caches) {
    segment_caches.push_back({{"segment", cache.segment_length},
                              {"slots", cache.slots},
                              {"value", cache.counts.hit_rate()},
                              {"requests", cache.counts.requests},
                              {"hits", cache.counts.hits}});
  }
  Json static_sets = Json::array();
  for (const StaticSetFigures& set : figures.static_sets) {
    static_sets.push_back(
        {{"experts", set.experts},
         {"share", set.share},
         {"nll", set.quality.nll()},
         {"perplexity", set.quality.perplexity()},
         {"perplexity_against_unrestricted", relative(set.quality.perplexity(), figures.quality.perplexity())}});
  }
  return {{"domain", figures.domain},
          {"tuned_domain", figures.tuned_domain},
          {"sequences", figures.sequences},
          {"tokens", figures.tokens},
          {"nll", figures.quality.nll()},
          {"perplexity", figures.quality.perplexity()},
          {"bits_per_byte", figures.quality.bits_per_byte()},
          {"expert_overlap_ratio", figures.expert_overlap_ratio},
          {"distinct_experts", figures.distinct_experts},
          {"usage_entropy", figures.usage.normalised_entropy},
          {"usage_cv", figures.usage.coefficient_of_variation},
          {"usage_max_share", figures.usage.max_share},
          {"unused_experts", figures.usage.unused_experts},
          {"kendall_tau", figures.kendall_tau},
          {"top_k_agreement", figures.top_k_agreement},
          {"segment_routing_best_performance", segments},
          {"segment_cache_hit_rate", segment_caches},
          {"static_set", static_sets},
          {"cache", cells}};
}

Json number_or_null(double value) {
  return std::isfinite(value) ? Json(value) : Json();
}

Json task_json(const TaskFigures& task) {
  Json json = {{"task", task.name},
               {"kind", task.kind},
               {"count", task.outcomes.size()},
               {"accuracy", task.accuracy()},
               {"standard_error", number_or_null(task.standard_error())}};
  if (task.kind == kMultipleChoice) {
    json["accuracy_by_bytes"] = task.accuracy(true);
    json["standard_error_by_bytes"] = number_or_null(task.standard_error(true));
  }
  return json;
}

// What the tuned router changed, task by task.
Json task_delta_json(const Comparison& comparison) {
  Json delta = Json::array();
  const ArmFigures* tuned = find_arm(comparison, kTunedArm);
  if (tuned == nullptr) {
    return delta;
  }
  for (const TaskFigures& task : tuned->tasks) {
    Json entry = {{"task", task.name}};
    for (const auto& [name, other] : {std::pair("baseline", kBaselineArm), std::pair("control", kControlArm)}) {
      const ArmFigures* arm = find_arm(comparison, other);
      const TaskFigures* before = arm == nullptr ? nullptr : find_task(*arm, task.name);
      for (const bool by_bytes : {false, true}) {
        if (before != nullptr && (!by_bytes || task.kind == kMultipleChoice)) {
          const TaskDifference difference = task_difference(task, *before, by_bytes);
          entry[fmt::format("points{}_against_{}", by_bytes ? "_by_bytes" : "", name)] = {
              {"value", difference.points}, {"standard_error", number_or_null(difference.standard_error)}};
        }
      }
    }
    delta.push_back(entry);
  }
  return delta;
}

// Every answer of every router.
void write_answers(const Comparison& comparison, const std::filesystem::path& path) {
  std::string lines;
  for (const ArmFigures& arm : comparison.arms) {
    for (const TaskFigures& task : arm.tasks) {
      for (const TaskOutcome& outcome : task.outcomes) {
        Json line = {{"arm", arm.name}, {"task", task.name}, {"id", outcome.id}, {"right", outcome.right}};
        if (task.kind == kMultipleChoice) {
          line["right_by_bytes"] = outcome.right_by_bytes;
        }
        line.update(outcome.detail);
        lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
      }
    }
  }
  write_text_atomically(path, lines);
}

// An evaluation may have taken hours, and the next be a part of it: the last one's files stay, as FILE.previous.EXT.
// One that was cut off before it wrote results leaves those of the one before it.
void keep_previous(const std::filesystem::path& run_dir) {
  if (!std::filesystem::exists(run_dir / kResultsFile)) {
    return;
  }
  for (const std::filesystem::path name : {kResultsFile, kAnswersFile}) {
    const std::filesystem::path previous = run_dir / (name.stem().string() + ".previous" + name.extension().string());
    if (std::filesystem::exists(run_dir / name)) {
      std::filesystem::rename(run_dir / name, previous);
    } else {
      std::filesystem::remove(previous);  // of the one before
    }
  }
}

// What the tuned router changed, domain by domain.
Json delta_json(const Comparison& comparison) {
  Json delta = Json::array();
  const ArmFigures* baseline = find_arm(comparison, kBaselineArm);
  const ArmFigures* control = find_arm(comparison, kControlArm);
  const ArmFigures* tuned = find_arm(comparison, kTunedArm);
  if (baseline == nullptr || tuned == nullptr) {
    return delta;
  }
  for (std::size_t i = 0; i < tuned->domains.size(); ++i) {
    const DomainFigures& now = tuned->domains[i];
    const DomainFigures& before = baseline->domains[i];
    Json entry = {{"domain", now.domain},
                  {"perplexity_against_baseline", relative(now.quality.perplexity(), before.quality.perplexity())},
                  {"usage_entropy_against_baseline", now.usage.normalised_entropy / before.usage.normalised_entropy}};
    if (control != nullptr) {
      entry["perplexity_against_control"] =
          relative(now.quality.perplexity(), control->domains[i].quality.perplexity());
    }
    Json loads = Json::array();
    for (const CacheFigures& cache : now.cache) {
      const CacheFigures* old = find_cache(before, cache.policy, cache.slots);
      loads.push_back(
          {{"policy", cache.policy},
           {"slots", cache.slots},
           {"loads_against_baseline", old->counts.loads == 0
                                          ? Json()
                                          : Json(relative(cache.loads_per_token_layer, old->loads_per_token_layer))}});
    }
    entry["loads"] = loads;
    delta.push_back(entry);
  }
  return delta;
}

}  // namespace

const CacheFigures* find_cache(const DomainFigures& figures, const std::string& policy, std::int64_t slots) {
  const auto found = std::find_if(figures.cache.begin(), figures.cache.end(), [&](const CacheFigures& cache) {
    return cache.policy == policy && cache.slots == slots;
  });
  return found == figures.cache.end() ? nullptr : &*found;
}

const ArmFigures* find_arm(const Comparison& comparison, const std::string& name) {
  const auto found = std::find_if(comparison.arms.begin(), comparison.arms.end(),
                                  [&](const ArmFigures& arm) { return arm.name == name; });
  return found == comparison.arms.end() ? nullptr : &*found;
}

const TaskFigures* find_task(const ArmFigures& arm, const std::string& name) {
  const auto found =
      std::find_if(arm.tasks.begin(), arm.tasks.end(), [&](const TaskFigures& task) { return task.name == name; });
  return found == arm.tasks.end() ? nullptr : &*found;
}

ArmFigures measure_arm(MoeModel& model, const std::string& name, const PackedData& held_out,
                       const std::vector<std::string>& tuned_domains, const EvaluateOptions& options,
                       std::int64_t sequence_length, bool quiet, bool against_reference) {
  const Architecture& architecture = model->architecture();
  const std::vector<std::int64_t> layers = architecture.moe_layers();
  const auto num_layers = static_cast<std::int64_t>(layers.size());
  const std::vector<std::int64_t> slots = slots_of(options, architecture.num_experts);
  const std::vector<std::int64_t> segments = segments_of(options);
  const std::vector<std::int64_t> static_sets = static_sets_of(options, architecture);
  constexpr std::int64_t kRows = 8;
  ArmFigures arm;
  arm.name = name;
  arm.router = name;
  arm.router_hash = router_hash(model);
  arm.top_k = architecture.top_k;
  arm.adapters = model->adapter_settings().has_value();
  Progress progress(name, held_out.num_tokens() * static_cast<std::int64_t>(1 + static_sets.size()), "tok", quiet);
  const auto advance = [&](std::int64_t tokens) { progress.advance(tokens); };
  for (std::size_t domain = 0; domain < held_out.domains.size(); ++domain) {
    DomainFigures figures;
    figures.domain = held_out.domains[domain];
    figures.tuned_domain = std::find(tuned_domains.begin(), tuned_domains.end(), figures.domain) != tuned_domains.end();
    RoutingMetrics metrics(num_layers, architecture.num_experts, architecture.top_k, layers, expert_bytes_of(model));
    RouterAgreement agreement;
    std::function<void(const SequenceRouting&, const SequenceRouting&)> compare;
    if (against_reference) {
      compare = [&](const SequenceRouting& reference, const SequenceRouting& own) { agreement.add(reference, own); };
    }
    const std::vector<PackedBatch> batches =
        pack_for_evaluation(held_out, static_cast<std::int64_t>(domain), kRows, sequence_length);
    std::vector<std::int64_t> selections;
    const auto scoped = std::dynamic_pointer_cast<ResidencySelector>(model->selector());
    const auto share = [&] { return scoped == nullptr ? std::nullopt : scoped->take_scope_share(); };
    share();  // of what came before
    figures.quality = measure(
        model, held_out, batches, false,
        [&](SequenceRouting&& routing) {
          metrics.add(routing);
          count_selections(routing, selections);
        },
        advance, compare);
    figures.scope_share = share().value_or(figures.scope_share);
    for (const std::int64_t size : static_sets) {
      figures.static_sets.push_back(measure_static_set(model, held_out, batches, selections, size, advance));
    }
    figures.kendall_tau = agreement.kendall_tau();
    figures.top_k_agreement = agreement.top_k_agreement();
    figures.sequences = metrics.num_sequences();
    figures.tokens = metrics.num_counted();
    figures.expert_overlap_ratio = metrics.expert_overlap_ratio();
    figures.distinct_experts = metrics.distinct_experts();
    figures.usage = metrics.usage();
    const double tokens = static_cast<double>(std::max<std::int64_t>(1, figures.tokens));
    for (const std::int64_t count : slots) {
      for (const std::string& policy : options.policies) {
        SimulationOptions simulation;
        simulation.policy = policy_from_name(policy);
        simulation.slots = count;
        simulation.gamma = options.gamma;
        simulation.num_threads = at::get_num_threads();
        CacheFigures cache;
        cache.policy = policy;
        cache.slots = count;
        cache.counts = metrics.simulate(simulation);
        cache.loads_per_token_layer =
            static_cast<double>(cache.counts.loads) / (tokens * static_cast<double>(num_layers));
        cache.bytes_per_token = static_cast<double>(cache.counts.load_bytes) / tokens;
        figures.cache.push_back(std::move(cache));
      }
    }
    for (const std::int64_t segment : segments) {
      figures.segments.push_back({segment, metrics.segment_routing(segment)});
      for (const std::int64_t count : slots) {
        SimulationOptions simulation;
        simulation.slots = count;
        simulation.num_threads = at::get_num_threads();
        figures.segment_caches.push_back({segment, count, metrics.simulate_segment_cache(segment, simulation)});
      }
    }
    arm.domains.push_back(std::move(figures));
  }
  return arm;
}

void check_evaluate_fits(const LoadedRecipe<FinetuneRecipe>& loaded, const Architecture& architecture) {
  const EvaluateOptions& options = loaded.recipe.evaluate;
  const std::int64_t experts = architecture.num_experts;
  Problems problems;
  const auto at_most_all = [&](const char* key, std::int64_t slots) {
    if (slots > experts) {
      problems.add(fmt::format("{}: {} must be at most the model's experts per layer ({}), got {}",
                               loaded.source.location(key), key, experts, slots));
    }
  };
  for (const std::int64_t slots : options.slots) {
    at_most_all("evaluate.slots", slots);
  }
  at_most_all("evaluate.residency_prior.slots", options.residency_prior.slots);
  const std::size_t factors = options.residency_prior.layer_factors.size();
  if (factors != 0 && factors != architecture.moe_layers().size()) {
    problems.add(fmt::format(
        "{}: evaluate.residency_prior.layer_factors must have one number per MoE layer ({}), got {}",
        loaded.source.location("evaluate.residency_prior.layer_factors"), architecture.moe_layers().size(), factors));
  }
  for (const std::int64_t size : options.static_set) {
    if (size != 0 && (size < architecture.top_k || size > experts)) {
      problems.add(
          fmt::format("{}: evaluate.static_set must be from the model's experts per token to its experts per layer "
                      "({} to {}) or 0, got {}",
                      loaded.source.location("evaluate.static_set"), architecture.top_k, experts, size));
    }
  }
  for (const std::int64_t always_keep : options.residency_prior.always_keep) {
    if (options.residency_prior.asks_for_arms() && always_keep >= architecture.top_k) {
      problems.add(
          fmt::format("{}: evaluate.residency_prior.always_keep must be below the model's experts per token "
                      "({}), got {}: the prior would have nothing to choose",
                      loaded.source.location("evaluate.residency_prior.always_keep"), architecture.top_k, always_keep));
    }
  }
  problems.throw_usage_if_any();
}

Comparison run_evaluate(const LoadedRecipe<FinetuneRecipe>& loaded, const EvaluateTarget& target, bool quiet) {
  const auto start = std::chrono::steady_clock::now();
  FinetuneRecipe recipe = loaded.recipe;
  if (target.only != kBaselineArm) {
    resolve_steps_from_run(recipe.train, recipe.run_dir, loaded.source);
  }
  at::set_num_threads(static_cast<int>(
      recipe.model.threads > 0
          ? recipe.model.threads
          : std::max<std::int64_t>(1, static_cast<std::int64_t>(std::thread::hardware_concurrency()))));
  const std::filesystem::path run_dir = recipe.run_dir;
  const bool with_baseline = target.only != kTunedArm;
  const bool with_tuned = target.only != kBaselineArm;
  const bool with_bundle = with_tuned && !target.checkpoint;
  // Where the tuned router comes from.
  std::filesystem::path origin;
  if (with_bundle) {
    origin = target.bundle.empty() ? run_dir / "bundle" : target.bundle;
    if (!std::filesystem::exists(origin / "manifest.json")) {
      throw InputError(fmt::format("{}: there is no router bundle; make one with `hestia export {}`", origin.string(),
                                   recipe_words(loaded.source)));
    }
  } else if (with_tuned) {
    const auto latest = latest_checkpoint(run_dir);
    if (!latest || latest->first != recipe.train.steps) {
      throw UsageError(
          fmt::format("{}: --checkpoint needs the finished run, got step {} of {}; finish it with `hestia "
                      "finetune {}{}`",
                      run_dir.string(), latest ? latest->first : 0, recipe.train.steps, recipe_words(loaded.source),
                      latest ? " --resume" : ""));
    }
    origin = latest->second;
  }
  const Architecture architecture = read_architecture(recipe.model.path);
  check_evaluate_fits(loaded, architecture);
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(recipe.model.path);
  std::vector<TaskExamples> tasks;
  for (std::size_t i = 0; i < recipe.evaluate.tasks.size(); ++i) {
    tasks.push_back(load_task(loaded, i, *tokenizer, architecture));
  }
  const PackedData held_out = evaluation_data(recipe, *tokenizer, at::get_num_threads());
  MoeModel model = load_model(recipe.model.path, dtype_from_recipe(recipe.model.dtype),
                              device_from_recipe(recipe.model.device), quiet);
  Comparison comparison;
  comparison.num_layers = static_cast<std::int64_t>(model->architecture().moe_layers().size());
  comparison.num_experts = model->architecture().num_experts;
  comparison.top_k = model->architecture().top_k;
  comparison.expert_bytes = expert_bytes_of(model);
  comparison.device = model->device().str();
  comparison.model_path = recipe.model.path;
  comparison.split = recipe.evaluate.split;
  comparison.bundle = origin.string();
  ResidencyRule served;
  if (!with_bundle) {
    served = rule_of_run(loaded, model, *tokenizer, at::get_num_threads());
  } else {
    // A bundle that is damaged or of another model shows now, not after minutes of measuring the baseline.
    const torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> base;
    for (const torch::Tensor& router : model->routers()) {
      base.push_back(router.clone());
    }
    const BundleManifest manifest = load_bundle(model, origin);
    served = manifest.residency;
    comparison.predictor = manifest.predictor;
    for (std::size_t i = 0; i < base.size(); ++i) {
      model->routers()[i].copy_(base[i]);
    }
    model->remove_adapters();
    model->set_top_k(comparison.top_k);
  }
  const std::vector<ResidencyRule> rules = residency_rules(loaded, served, origin, model->architecture());
  EvaluateOptions options = recipe.evaluate;
  if (!rules.empty()) {
    // What a rule is about is counted in any case.
    options.slots = slots_of(options, comparison.num_experts);
    for (const ResidencyRule& rule : rules) {
      options.slots.push_back(rule.slots);
      if (std::find(options.policies.begin(), options.policies.end(), rule.policy) == options.policies.end()) {
        options.policies.push_back(rule.policy);
      }
    }
  }
  const auto measure_tasks = [&](ArmFigures& figures) {
    for (const TaskExamples& task : tasks) {
      figures.tasks.push_back(
          measure_task(model, *tokenizer, task, fmt::format("{}, {}", figures.name, task.options.name), quiet));
    }
  };
  std::vector<ArmFigures> under_rules;
  const auto arm = [&](const char* name, bool against_baseline = true) {
    comparison.arms.push_back(measure_arm(model, name, held_out, recipe.data.train, options,
                                          recipe.data.sequence_length, quiet, against_baseline && options.agreement));
    measure_tasks(comparison.arms.back());
    EvaluateOptions under_rule_options = options;
    under_rule_options.static_set.clear();  // a selector of its own, which knows no residents
    for (const ResidencyRule& rule : rules) {
      const std::int64_t top_k = model->architecture().top_k;
      if (rule.always_keep >= top_k) {
        log_warning(fmt::format("{}: not measured under {}, J {}: with {} experts per token that is plain Top-K", name,
                                lambda_text(rule), rule.always_keep, top_k));
        continue;
      }
      model->set_selector(std::make_shared<ResidencySelector>(rule));
      under_rules.push_back(measure_arm(model, under_rule(name, rule, served), held_out, recipe.data.train,
                                        under_rule_options, recipe.data.sequence_length, quiet, options.agreement));
      under_rules.back().router = name;
      under_rules.back().residency = rule;
      measure_tasks(under_rules.back());
    }
    model->set_selector(std::make_shared<TopKSelector>());
  };
  if (options.agreement) {
    model->keep_reference_routers();
  }
  if (with_baseline) {
    arm(kBaselineArm, false);
  }
  if (with_bundle) {
    load_bundle(model, origin);
    arm(kTunedArm);
  } else if (with_tuned) {
    load_run_weights(model, origin, recipe.train.trainable);
    arm(kTunedArm);
  }
  const auto control = latest_checkpoint(run_dir / "control");
  if (!target.only.empty()) {
    // One router was asked for.
  } else if (control && control->first == recipe.train.steps) {
    load_run_weights(model, control->second, recipe.train.trainable);
    arm(kControlArm);
    std::swap(comparison.arms[1], comparison.arms[2]);
  } else if (recipe.control.enabled) {
    log_warning(fmt::format("the control run of {} is not finished: the comparison has no control", run_dir.string()));
  }
  for (const ArmFigures& plain : std::vector<ArmFigures>(comparison.arms)) {
    std::copy_if(under_rules.begin(), under_rules.end(), std::back_inserter(comparison.arms),
                 [&](const ArmFigures& figures) { return figures.router == plain.name; });
  }
  comparison.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::filesystem::create_directories(run_dir);
  comparison.command = "hestia evaluate " + recipe_words(loaded.source);
  if (!target.bundle.empty()) {
    comparison.command += fmt::format(" --bundle {}", shell_word(target.bundle.string()));
  }
  if (target.checkpoint) {
    comparison.command += " --checkpoint";
  }
  if (!target.only.empty()) {
    comparison.command += fmt::format(" --only {}", target.only);
  }
  keep_previous(run_dir);
  write_text_atomically(run_dir / kResultsFile, comparison_json(comparison).dump(2) + "\n");
  if (tasks.empty()) {
    std::filesystem::remove(run_dir / kAnswersFile);  // of an evaluation that was cut off
  } else {
    write_answers(comparison, run_dir / kAnswersFile);
  }
  return comparison;
}

Json comparison_json(const Comparison& comparison) {
  Json json;
  json["format_version"] = kResultsFormat;
  json["kind"] = "hestia comparison";
  json["version"] = program_version();
  json["commit"] = program_commit();
  json["machine"] = machine_info();
  json["command"] = comparison.command;
  json["device"] = comparison.device;
  json["seconds"] = comparison.seconds;
  json["degradations"] = degradations();
  json["model"] = {{"path", comparison.model_path},
                   {"layers", comparison.num_layers},
                   {"experts", comparison.num_experts},
                   {"top_k", comparison.top_k},
                   {"expert_bytes", comparison.expert_bytes}};
  json["split"] = comparison.split;
  json["bundle"] = comparison.bundle;
  if (!comparison.predictor.is_null()) {
    json["predictor"] = comparison.predictor;
  }
  json["note"] =
      "loads, hit rates and bytes come from the cache simulation of teacher-forced routing (modelled), not from a "
      "clock";
  json["arms"] = Json::array();
  for (const ArmFigures& arm : comparison.arms) {
    Json domains = Json::array();
    for (const DomainFigures& figures : arm.domains) {
      domains.push_back(domain_json(figures));
      if (std::isfinite(figures.scope_share)) {
        domains.back()["scope_share"] = figures.scope_share;
      }
    }
    json["arms"].push_back({{"name", arm.name},
                            {"router", arm.router},
                            {"router_hash", arm.router_hash},
                            {"top_k", arm.top_k},
                            {"adapters", arm.adapters},
                            {"residency", served_rule_json(arm)},
                            {"domains", domains}});
    if (!arm.tasks.empty()) {
      Json tasks = Json::array();
      for (const TaskFigures& task : arm.tasks) {
        tasks.push_back(task_json(task));
      }
      json["arms"].back()["tasks"] = tasks;
    }
  }
  json["delta"] = delta_json(comparison);
  if (std::any_of(comparison.arms.begin(), comparison.arms.end(),
                  [](const ArmFigures& arm) { return !arm.tasks.empty(); })) {
    json["task_delta"] = task_delta_json(comparison);
  }
  return json;
}

}  // namespace hestia
