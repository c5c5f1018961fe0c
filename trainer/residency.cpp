#include "hestia/trainer/residency.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/files.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/measure.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kResidencyFormat = 1;
constexpr std::int64_t kMassFormat = 2;   // with preserve_mass, which a reader of the first would pass over
constexpr std::int64_t kScopeFormat = 3;  // with a scope, which a reader of the second would
constexpr std::int64_t kRows = 8;
constexpr double kScopeRidge = 1e-2;  // of the mean variance of a logit
constexpr double kSmallestRidge = 1e-12;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Experts of groups that a token leaves out have no logits to tell by.
bool leaves_groups_out(const Architecture& architecture) {
  return architecture.num_groups != architecture.top_groups;
}
constexpr const char* kScopeAndGroups =
    "residency.scope does not go with a model that leaves groups of experts out token by token: the logits that would "
    "tell the kind of text are missing there; leave the scope out";

// A rule that was in the loop belongs to the run: what is asked for now and differs would be ignored.
void check_overrides(const RecipeSource& source, const ResidencyRule& asked, const ResidencyRule& of_run) {
  Problems problems;
  const auto check = [&](const char* key, const auto& now, const auto& then,
                         const char* instead = "serve with another one through evaluate.residency_prior") {
    if (source.is_overridden(key) && now != then) {
      problems.add(
          fmt::format("{}: {} was {} when the run was trained in the loop, and that goes into the bundle, got {}; "
                      "leave it out, or {}",
                      source.location(key), key, then, now, instead));
    }
  };
  const char* const scope_instead = "serve everywhere with evaluate.residency_prior.in_scope=false";
  check("residency.score", residency_score_name(asked.score), residency_score_name(of_run.score));
  check("residency.lambda", asked.lambda, of_run.lambda);
  check("residency.layer_factors", asked.layer_factors, of_run.layer_factors);
  check("residency.always_keep", asked.always_keep, of_run.always_keep);
  check("residency.preserve_mass", asked.preserve_mass, of_run.preserve_mass);
  check("residency.slots", asked.slots, of_run.slots);
  check("residency.policy", asked.policy, of_run.policy);
  const auto listed = [](const ResidencyScope& scope) { return fmt::format("[{}]", fmt::join(scope.domains, ", ")); };
  check("residency.scope.domains", listed(asked.scope), listed(of_run.scope), scope_instead);
  check("residency.scope.elsewhere", asked.scope.elsewhere, of_run.scope.elsewhere, scope_instead);
  check("residency.scope.window", asked.scope.window, of_run.scope.window, scope_instead);
  check("residency.scope.keep", asked.scope.keep, of_run.scope.keep, scope_instead);
  problems.throw_usage_if_any();
}

}  // namespace

ResidencyRule residency_rule(const LoadedRecipe<FinetuneRecipe>& loaded, const Architecture& architecture) {
  const ResidencyOptions& options = loaded.recipe.residency;
  ResidencyRule rule;
  rule.score = *residency_score_from_name(options.score);  // one of the choices of the field
  rule.lambda = options.lambda;
  rule.layer_factors = options.layer_factors;
  rule.always_keep = options.always_keep;
  rule.preserve_mass = options.preserve_mass;
  rule.policy = options.policy;
  rule.scope.domains = options.scope.domains;
  rule.scope.elsewhere = options.scope.elsewhere;
  rule.scope.window = options.scope.window;
  rule.scope.keep = options.scope.keep;
  rule.slots = options.slots > 0 ? options.slots : loaded.recipe.losses.cache_simulation.slots;
  rule.slots = rule.slots > 0 ? rule.slots : std::max<std::int64_t>(1, architecture.num_experts / 4);
  if (rule.slots > architecture.num_experts) {
    const std::string key = options.slots > 0 ? "residency.slots" : "losses.cache_simulation.slots";
    throw UsageError(fmt::format("{}: {} must be at most the model's experts per layer ({}), got {}",
                                 loaded.source.location(key), key, architecture.num_experts, rule.slots));
  }
  for (const std::int64_t slots : options.train_slots) {
    if (slots > architecture.num_experts) {
      throw UsageError(
          fmt::format("{}: residency.train_slots must be at most the model's experts per layer ({}), got {}",
                      loaded.source.location("residency.train_slots"), architecture.num_experts, slots));
    }
  }
  if (!rule.scope.everywhere() && leaves_groups_out(architecture)) {
    throw UsageError(fmt::format("{}: {}", loaded.source.location("residency.scope.domains"), kScopeAndGroups));
  }
  const std::size_t num_layers = architecture.moe_layers().size();
  if (!rule.layer_factors.empty() && rule.layer_factors.size() != num_layers) {
    throw UsageError(fmt::format("{}: residency.layer_factors must have one number per MoE layer ({}), got {}",
                                 loaded.source.location("residency.layer_factors"), num_layers,
                                 rule.layer_factors.size()));
  }
  const std::int64_t annealed = loaded.recipe.train.top_k_annealing.top_k;
  const std::int64_t top_k = annealed > 0 ? std::min(annealed, architecture.top_k) : architecture.top_k;
  if (options.lambda > 0.0 && options.always_keep >= top_k) {
    throw UsageError(
        fmt::format("{}: residency.always_keep must be below the {}experts per token ({}), got {}: the "
                    "prior would have nothing to choose",
                    loaded.source.location("residency.always_keep"), annealed > 0 ? "annealed " : "model's ", top_k,
                    options.always_keep));
  }
  return rule;
}

PackedData calibration_data(const PackedData& train_data, std::int64_t tokens) {
  PackedData data;
  data.domains = train_data.domains;
  std::vector<std::int64_t> taken(train_data.domains.size(), 0);
  for (const TokenSequence& sequence : train_data.sequences) {
    std::int64_t& of_domain = taken.at(static_cast<std::size_t>(sequence.domain));
    const auto length = static_cast<std::int64_t>(sequence.tokens.size());
    if (of_domain == 0 || of_domain + length <= tokens) {
      data.sequences.push_back(sequence);
      of_domain += length;
    } else {
      of_domain = tokens;  // no shorter one from further on
    }
  }
  return data;
}

void calibrate(ResidencyRule& rule, MoeModel& model, const PackedData& data, std::int64_t sequence_length) {
  rule.logit_range = mean_logit_range(model, pack_for_evaluation(data, -1, kRows, sequence_length));
  for (const float range : rule.logit_range) {
    if (!std::isfinite(range)) {
      throw RunError(
          fmt::format("residency calibration: a router logit is not finite, got a mean range of {}; check the "
                      "model's weights",
                      range));
    }
  }
  if (!rule.scope.everywhere()) {
    fit_scope(rule.scope, model, data, sequence_length);
  }
  rule.calibration =
      fmt::format("{} tokens of the training split of {}", data.num_tokens(), fmt::join(data.domains, ", "));
}

void fit_scope(ResidencyScope& scope, MoeModel& model, const PackedData& data, std::int64_t sequence_length) {
  const torch::NoGradGuard no_grad;
  const std::size_t num_layers = model->architecture().moe_layers().size();
  const auto options = torch::TensorOptions().dtype(torch::kFloat64).device(model->device());
  // Of each class (inside, outside) and layer: sum of z and of z z^T.
  struct Sums {
    double tokens = 0.0;
    std::vector<torch::Tensor> first;
    std::vector<torch::Tensor> second;
  };
  std::array<Sums, 2> classes;
  const std::int64_t num_experts = model->architecture().num_experts;
  for (Sums& sums : classes) {
    sums.first.assign(num_layers, torch::zeros({num_experts}, options));
    sums.second.assign(num_layers, torch::zeros({num_experts, num_experts}, options));
  }
  const auto is_inside = [&](std::size_t domain) {
    return std::find(scope.domains.begin(), scope.domains.end(), data.domains[domain]) != scope.domains.end();
  };
  // w is told by every other sequence of a domain, b by those in between: what w was told by lies too well.
  std::array<PackedData, 2> halves;
  std::vector<std::int64_t> seen(data.domains.size(), 0);
  halves[0].domains = data.domains;
  halves[1].domains = data.domains;
  for (const TokenSequence& sequence : data.sequences) {
    const std::int64_t number = seen.at(static_cast<std::size_t>(sequence.domain))++;
    halves[static_cast<std::size_t>(number % 2)].sequences.push_back(sequence);
  }
  const auto batches_of = [&](const PackedData& half, std::size_t domain) {
    return pack_for_evaluation(half, static_cast<std::int64_t>(domain), kRows, sequence_length);
  };
  for (std::size_t domain = 0; domain < data.domains.size(); ++domain) {
    Sums& sums = classes[is_inside(domain) ? 1 : 0];
    for (const PackedBatch& batch : batches_of(halves[0], domain)) {
      const TokenBatch on_device = to_device(batch, model->device());
      const torch::Tensor real_T1 = on_device.sequence_ids_BS.reshape({-1, 1}).ge(0).to(torch::kFloat64);
      const ModelOutput output = model->forward(on_device);
      sums.tokens += real_T1.sum().item<double>();
      for (std::size_t layer = 0; layer < num_layers; ++layer) {
        const torch::Tensor z_TE = output.routing[layer].logits_TE.to(torch::kFloat64) * real_T1;
        sums.first[layer] = sums.first[layer] + z_TE.sum(0);
        sums.second[layer] = sums.second[layer] + z_TE.t().matmul(z_TE);
      }
    }
  }
  std::vector<torch::Tensor> weights(num_layers);
  std::vector<double> middles(num_layers);
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    std::array<torch::Tensor, 2> means;
    torch::Tensor within = torch::zeros({num_experts, num_experts}, options);
    for (std::size_t side = 0; side < classes.size(); ++side) {
      const Sums& sums = classes[side];
      means[side] = sums.first[layer] / sums.tokens;
      within = within + 0.5 * (sums.second[layer] / sums.tokens - torch::outer(means[side], means[side]));
    }
    // The ridge makes it solvable where logits depend on each other, and calmer where the text is little.
    const torch::Tensor ridge = kScopeRidge * within.diagonal().mean().clamp_min(kSmallestRidge);
    weights[layer] = torch::linalg_solve(within + torch::eye(num_experts, options) * ridge, means[1] - means[0])
                         .to(torch::kFloat32)
                         .to(torch::kFloat64);  // as they are kept
    middles[layer] = weights[layer].dot(means[1] + means[0]).item<double>() / 2.0;
  }
  // Half-way between both is where evidence changes sides, or nearer to the others, so that `keep` of its own is
  // inside.
  std::vector<std::vector<torch::Tensor>> own(num_layers);
  for (std::size_t domain = 0; domain < data.domains.size(); ++domain) {
    if (!is_inside(domain)) {
      continue;
    }
    for (const PackedBatch& batch : batches_of(halves[seen[domain] > 1 ? 1 : 0], domain)) {
      const TokenBatch on_device = to_device(batch, model->device());
      const torch::Tensor real = on_device.sequence_ids_BS.reshape({-1}).ge(0);
      const torch::Tensor run_begin = run_begin_of_tokens(on_device).to(model->device());
      const ModelOutput output = model->forward(on_device);
      for (std::size_t layer = 0; layer < num_layers; ++layer) {
        const torch::Tensor evidence = scope_evidence(output.routing[layer].logits_TE, weights[layer], -middles[layer]);
        own[layer].push_back(windowed_mean(evidence, run_begin, scope.window).masked_select(real).cpu());
      }
    }
  }
  scope.weights.clear();
  scope.offsets.clear();
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    const torch::Tensor sorted = std::get<0>(torch::cat(own[layer]).sort());
    const auto lowest = static_cast<std::int64_t>((1.0 - scope.keep) * static_cast<double>(sorted.numel()));
    const double edge = std::min(0.0, sorted[std::min(lowest, sorted.numel() - 1)].item<double>());
    const torch::Tensor on_host = weights[layer].to(torch::kFloat32).cpu();
    const float* const first = on_host.const_data_ptr<float>();
    scope.weights.emplace_back(first, first + num_experts);
    // Rounded so that the token at the edge stays inside.
    scope.offsets.push_back(std::nextafter(static_cast<float>(-middles[layer] - edge), kInfinity));
    if (!on_host.isfinite().all().item<bool>() || !std::isfinite(scope.offsets.back())) {
      throw RunError(
          fmt::format("residency scope: the routers' logits of MoE layer {} tell nothing finite about {}; check the "
                      "model's weights, or leave residency.scope out",
                      layer, fmt::join(scope.domains, ", ")));
    }
  }
}

void check_scope(const ResidencyRule& rule, const Architecture& architecture, const std::string& subject) {
  if (rule.scope.everywhere()) {
    return;
  }
  if (leaves_groups_out(architecture)) {
    throw InputError(fmt::format("{}: {}", subject, kScopeAndGroups));
  }
  const std::size_t num_layers = architecture.moe_layers().size();
  const auto num_experts = static_cast<std::size_t>(architecture.num_experts);
  if (rule.scope.weights.size() != num_layers || rule.scope.offsets.size() != num_layers ||
      !std::all_of(rule.scope.weights.begin(), rule.scope.weights.end(),
                   [&](const std::vector<float>& weights) { return weights.size() == num_experts; })) {
    throw InputError(
        fmt::format("{}: the bundle's residency scope is of {} MoE layers of {} experts, the model has {} "
                    "of {}; give the bundle of this model",
                    subject, rule.scope.weights.size(),
                    rule.scope.weights.empty() ? 0 : rule.scope.weights.front().size(), num_layers, num_experts));
  }
}

ResidencyRule calibrated_rule(const LoadedRecipe<FinetuneRecipe>& loaded, MoeModel& model, const Tokenizer& tokenizer,
                              std::int64_t threads) {
  const FinetuneRecipe& recipe = loaded.recipe;
  ResidencyRule rule = residency_rule(loaded, model->architecture());
  // As many as hold the calibration set whole.
  DataOptions first_part = recipe.data;
  const std::int64_t enough = recipe.residency.calibration_tokens + recipe.data.sequence_length;
  first_part.max_tokens_per_domain =
      first_part.max_tokens_per_domain == 0 ? enough : std::min(enough, first_part.max_tokens_per_domain);
  calibrate(rule, model,
            calibration_data(load_training_data(first_part, tokenizer, threads), recipe.residency.calibration_tokens),
            recipe.data.sequence_length);
  return rule;
}

ResidencyRule rule_of_run(const LoadedRecipe<FinetuneRecipe>& loaded, MoeModel& model, const Tokenizer& tokenizer,
                          std::int64_t threads) {
  const std::filesystem::path saved = residency_path(loaded.recipe.run_dir);
  if (!std::filesystem::exists(saved)) {
    return calibrated_rule(loaded, model, tokenizer, threads);
  }
  ResidencyRule of_run = read_residency(saved);
  check_overrides(loaded.source, residency_rule(loaded, model->architecture()), of_run);
  return of_run;
}

std::string lambda_text(const ResidencyRule& rule) {
  const std::string score =
      rule.score == ResidencyScore::kLogit ? "" : fmt::format("{} ", residency_score_name(rule.score));
  const std::string scope = rule.scope.everywhere()
                                ? ""
                                : fmt::format(", for {} (elsewhere times {:g})", fmt::join(rule.scope.domains, " and "),
                                              rule.scope.elsewhere);
  return fmt::format("{}lambda {:g}{}{}{}", score, rule.lambda, rule.layer_factors.empty() ? "" : " by layer",
                     rule.preserve_mass ? ", mass preserved" : "", scope);
}

namespace {

// The rule to be shown, without the thousands of numbers that a scope is told by.
Json without_scope_numbers(Json rule) {
  if (rule.contains("scope") && rule.at("scope").is_object()) {
    rule["scope"].erase("weights");
    rule["scope"].erase("offsets");
  }
  return rule;
}

Json scope_json(const ResidencyScope& scope) {
  if (scope.everywhere()) {
    return {};
  }
  return {{"domains", scope.domains}, {"elsewhere", scope.elsewhere}, {"window", scope.window},
          {"keep", scope.keep},       {"weights", scope.weights},     {"offsets", scope.offsets}};
}

}  // namespace

Json residency_json(const ResidencyRule& rule) {
  const std::int64_t version = !rule.scope.everywhere() ? kScopeFormat
                               : rule.preserve_mass     ? kMassFormat
                                                        : kResidencyFormat;
  return {{"format_version", version},
          {"score", residency_score_name(rule.score)},
          {"lambda", rule.lambda},
          {"layer_factors", rule.layer_factors},
          {"always_keep", rule.always_keep},
          {"preserve_mass", rule.preserve_mass},
          {"slots", rule.slots},
          {"policy", rule.policy},
          {"calibration", rule.calibration},
          {"logit_range", rule.logit_range},
          {"scope", scope_json(rule.scope)}};
}

ResidencyRule residency_from_json(const Json& json, const std::string& subject, Problems& problems) {
  ResidencyRule rule;
  const auto take = [&](const char* key, auto& value) {
    if (!json.contains(key)) {
      problems.add(fmt::format("{}: key \"{}\" is missing; export the bundle again", subject, key));
      return;
    }
    try {
      json.at(key).get_to(value);
    } catch (const nlohmann::json::exception&) {
      problems.add(fmt::format("{}: key \"{}\" has the wrong type, got {}; export the bundle again", subject, key,
                               json.at(key).dump()));
    }
  };
  if (!json.is_object()) {
    problems.add(fmt::format("{}: must be an object, got {}; export the bundle again", subject, json.dump()));
    return rule;
  }
  // The first bundles hold neither a version of the rule nor its calibration.
  if (json.contains("format_version")) {
    std::int64_t version = 0;
    take("format_version", version);
    if (version < kResidencyFormat || version > kScopeFormat) {
      problems.add(fmt::format("{}: format version {} is not one this program supports ({} to {}); update the program",
                               subject, version, kResidencyFormat, kScopeFormat));
    }
  }
  // Without a score it is the rule by logits, which was the only one.
  if (json.contains("score")) {
    std::string score(residency_score_name(rule.score));
    take("score", score);
    const std::optional<ResidencyScore> known = residency_score_from_name(score);
    if (known) {
      rule.score = *known;
    } else {
      problems.add(fmt::format("{}: score must be one of {}, got \"{}\"; update the program or export the bundle again",
                               subject, fmt::join(residency_score_names(), ", "), score));
    }
  }
  take("lambda", rule.lambda);
  if (json.contains("layer_factors")) {
    take("layer_factors", rule.layer_factors);
  }
  take("always_keep", rule.always_keep);
  if (json.contains("preserve_mass")) {
    take("preserve_mass", rule.preserve_mass);
  }
  take("slots", rule.slots);
  take("policy", rule.policy);
  take("logit_range", rule.logit_range);
  if (json.contains("calibration")) {
    take("calibration", rule.calibration);
  }
  const bool scoped = json.contains("scope") && !json.at("scope").is_null();
  if (scoped) {
    const Json& scope = json.at("scope");
    const auto take_of_scope = [&](const char* key, auto& value) {
      if (!scope.is_object() || !scope.contains(key)) {
        problems.add(fmt::format("{}: scope: key \"{}\" is missing; export the bundle again", subject, key));
        return;
      }
      try {
        scope.at(key).get_to(value);
      } catch (const nlohmann::json::exception&) {
        problems.add(fmt::format("{}: scope: key \"{}\" has the wrong type; export the bundle again", subject, key));
      }
    };
    take_of_scope("domains", rule.scope.domains);
    take_of_scope("elsewhere", rule.scope.elsewhere);
    take_of_scope("window", rule.scope.window);
    take_of_scope("keep", rule.scope.keep);
    take_of_scope("weights", rule.scope.weights);
    take_of_scope("offsets", rule.scope.offsets);
  }
  const auto usable = [](double number) { return number >= 0.0 && std::isfinite(number); };
  if (!usable(rule.lambda) || rule.always_keep < 0 || rule.slots < 0 ||
      !std::all_of(rule.layer_factors.begin(), rule.layer_factors.end(), usable) ||
      !std::all_of(rule.logit_range.begin(), rule.logit_range.end(), usable)) {
    problems.add(
        fmt::format("{}: lambda, layer_factors, always_keep, slots and logit_range must be finite and at least 0, got "
                    "{}; export the bundle again",
                    subject, without_scope_numbers(json).dump()));
  }
  if (!rule.layer_factors.empty() && rule.layer_factors.size() != rule.logit_range.size()) {
    problems.add(
        fmt::format("{}: layer_factors must have one number per MoE layer, as logit_range has ({}), got {}; export the "
                    "bundle again",
                    subject, rule.logit_range.size(), rule.layer_factors.size()));
  }
  const ResidencyScope& scope = rule.scope;
  const auto finite = [](const std::vector<float>& numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](float number) { return std::isfinite(number); });
  };
  const std::size_t experts = scope.weights.empty() ? 0 : scope.weights.front().size();
  if (scoped && (scope.everywhere() || !(scope.elsewhere >= 0.0 && scope.elsewhere <= 1.0) || scope.window < 1 ||
                 scope.weights.size() != rule.logit_range.size() || scope.offsets.size() != rule.logit_range.size() ||
                 experts == 0 || !finite(scope.offsets) ||
                 !std::all_of(scope.weights.begin(), scope.weights.end(), [&](const std::vector<float>& weights) {
                   return weights.size() == experts && finite(weights);
                 }))) {
    problems.add(fmt::format(
        "{}: scope must name domains, with an elsewhere from 0 to 1, a window of at least 1, and for each of "
        "the {} MoE layers an offset and as many weights as experts, all finite; export the bundle again",
        subject, rule.logit_range.size()));
  }
  if (rule.policy != policy_name(CachePolicyKind::kLru)) {
    problems.add(fmt::format("{}: policy must be lru, got \"{}\"; update the program or export the bundle again",
                             subject, rule.policy));
  }
  return rule;
}

std::filesystem::path residency_path(const std::filesystem::path& run_dir) {
  return run_dir / "residency.json";
}

ResidencyRule read_residency(const std::filesystem::path& path) {
  Problems problems;
  ResidencyRule rule = residency_from_json(read_json_file(path), path.string(), problems);
  problems.throw_input_if_any();
  return rule;
}

}  // namespace hestia
