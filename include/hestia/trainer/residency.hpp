#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "hestia/core/json_lines.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// The rule of the recipe's section `residency` for a model, not calibrated yet (no logit_range): slots 0 become those
/// of losses.cache_simulation, or E/4. Throws UsageError with file:line when slots, also those of training, are more
/// than the experts, when layer_factors are of another number of MoE layers, or when lambda is above 0 and J leaves the
/// rule no choice (always_keep at least K, the annealed one where there is one).
[[nodiscard]] ResidencyRule residency_rule(const LoadedRecipe<FinetuneRecipe>& loaded,
                                           const Architecture& architecture);

/// The calibration set of a recipe: of every training domain the whole sequences among its first `tokens` training
/// tokens, at least one.
[[nodiscard]] PackedData calibration_data(const PackedData& train_data, std::int64_t tokens);

/// Sets rule.logit_range, the mean of max z - min z over all tokens of `data` in every MoE layer, what it was taken
/// over, and where the rule has a scope, its weights (fit_scope). `model` must be the base model: its routers as they
/// are now, its selector as it is set. Throws RunError when a logit is not finite.
void calibrate(ResidencyRule& rule, MoeModel& model, const PackedData& data, std::int64_t sequence_length);

/// Fits the scope's weights and offsets, for its domains, window and keep: in each MoE layer w = (S + r I)^-1 (m_1 -
/// m_0), m_1 and m_0 being the means of z over the tokens of its domains and of all others of `data`, S the mean of the
/// two covariances and r a hundredth of the mean variance (Fisher's linear discriminant), and b such that evidence
/// changes sides half-way between the means or, where less than `keep` of the domains' own tokens would be inside,
/// lower, so that as many are. w is told by every other sequence of each domain, b by the others. `data` must have
/// sequences of domains inside and outside; `model` as for calibrate. Throws RunError when what comes out is not
/// finite.
void fit_scope(ResidencyScope& scope, MoeModel& model, const PackedData& data, std::int64_t sequence_length);

/// Throws InputError, naming `subject`, when the rule has a scope that is of other layers or experts than the model's,
/// or the model leaves groups of experts out.
void check_scope(const ResidencyRule& rule, const Architecture& architecture, const std::string& subject);

/// residency_rule, calibrated on `model`, which must be the base model, over the first training tokens of the recipe,
/// which are read with `threads` threads. Throws UsageError as residency_rule does.
[[nodiscard]] ResidencyRule calibrated_rule(const LoadedRecipe<FinetuneRecipe>& loaded, MoeModel& model,
                                            const Tokenizer& tokenizer, std::int64_t threads);

/// The rule that the routers of the recipe's run are served with: its residency.json, or where there is none
/// calibrated_rule. Throws UsageError when an override asks for another rule than the run was trained under.
[[nodiscard]] ResidencyRule rule_of_run(const LoadedRecipe<FinetuneRecipe>& loaded, MoeModel& model,
                                        const Tokenizer& tokenizer, std::int64_t threads);

/// Form and strength of the rule in words: "lambda 0.3", or "weight lambda 0.05" and "root lambda 0.3" for the others;
/// "lambda 0.3 by layer" where layers have factors, "for python (elsewhere times 0.5)" where it has a scope.
[[nodiscard]] std::string lambda_text(const ResidencyRule& rule);

/// The rule as it stands in `residency.json` of a run directory and under `residency` in a bundle's manifest.
[[nodiscard]] Json residency_json(const ResidencyRule& rule);
/// Its inverse; `subject` names the file in what is added to `problems` (missing keys, wrong types, numbers out of
/// range).
[[nodiscard]] ResidencyRule residency_from_json(const Json& json, const std::string& subject, Problems& problems);
/// Where a run that was trained in the loop keeps its rule.
[[nodiscard]] std::filesystem::path residency_path(const std::filesystem::path& run_dir);
/// Reads residency.json. Throws InputError listing what is wrong.
[[nodiscard]] ResidencyRule read_residency(const std::filesystem::path& path);

}  // namespace hestia
