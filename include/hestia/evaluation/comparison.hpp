#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/evaluation/task_scores.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/residency.hpp"
#include "hestia/routing/simulator.hpp"
#include "hestia/trainer/measure.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// One (policy, slots) cell of a comparison.
struct CacheFigures {
  std::string policy;
  std::int64_t slots = 0;
  SimulationCounts counts;
  double loads_per_token_layer = 0.0;  ///< loads / (counted tokens * layers)
  double bytes_per_token = 0.0;        ///< loads * bytes of one expert / counted tokens (modelled: no clock)
};

/// The segment cache of one (segment length, slots) cell.
struct SegmentCacheFigures {
  std::int64_t segment_length = 0;  ///< Steps ahead that the cache knows.
  std::int64_t slots = 0;
  SimulationCounts counts;
};

/// Segment routing at one segment length.
struct SegmentFigures {
  std::int64_t segment_length = 0;
  SegmentRouting routing;
};

/// The static-set test at one size: each layer may use only the C experts that it used most on this domain.
struct StaticSetFigures {
  std::int64_t experts = 0;  ///< C
  double share = 0.0;        ///< Of the unrestricted router's selections, how many fall into the set.
  QualityResult quality;     ///< Of the restricted model.
};

/// One router on one domain.
struct DomainFigures {
  std::string domain;
  bool tuned_domain = false;  ///< The recipe trained on it.
  QualityResult quality;
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  double expert_overlap_ratio = 0.0;
  double distinct_experts = 0.0;
  UsageStatistics usage;
  std::vector<CacheFigures> cache;
  std::vector<SegmentFigures> segments;             ///< By segment length.
  std::vector<SegmentCacheFigures> segment_caches;  ///< By segment length, then slots.
  std::vector<StaticSetFigures> static_sets;        ///< By size.
  /// Against the base model's routers on the same hidden states; NaN where that was not measured (the baseline).
  double kendall_tau = std::numeric_limits<double>::quiet_NaN();
  double top_k_agreement = std::numeric_limits<double>::quiet_NaN();
  /// Share of the tokens, over all layers, that were inside the scope of the rule; NaN where the rule has none.
  double scope_share = std::numeric_limits<double>::quiet_NaN();
};

/// One router ("baseline", "nll control", "tuned"), served by plain Top-K or under a residency rule.
struct ArmFigures {
  std::string name;
  std::string router;                      ///< Name of the router; `name` adds the rule.
  std::optional<ResidencyRule> residency;  ///< What it was served under; empty: plain Top-K.
  std::string router_hash;
  std::int64_t top_k = 0;  ///< Experts per token that it was served with.
  bool adapters = false;   ///< The experts had adapters: another expert store than the baseline's.
  std::vector<DomainFigures> domains;
  std::vector<TaskFigures> tasks;  ///< Of `evaluate.tasks`, in that order, those that were measured.
};

/// A whole comparison.
struct Comparison {              // NOLINT(bugprone-exception-escape): the check takes Json's move for one that throws
  std::vector<ArmFigures> arms;  ///< baseline first.
  std::int64_t num_layers = 0;
  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;         ///< Of the base model.
  std::int64_t expert_bytes = 0;  ///< One expert in the dtype the recipe holds it in.
  std::string device;             ///< What the measurement ran on.
  std::string model_path;
  std::string bundle;   ///< Folder the tuned router came from, a bundle or a checkpoint; empty: not measured.
  std::string command;  ///< What was run.
  std::string split = "held_out";  ///< Of `evaluate`: the documents measured.
  Json predictor;                  ///< How the bundle's preference predictor compares; null when it has none.
  double seconds = 0.0;
};

/// The cell of `figures` for a policy and slot count; nullptr when it was not simulated.
[[nodiscard]] const CacheFigures* find_cache(const DomainFigures& figures, const std::string& policy,
                                             std::int64_t slots);
/// The task called `name`; nullptr when the arm was not measured on it.
[[nodiscard]] const TaskFigures* find_task(const ArmFigures& arm, const std::string& name);
/// The arm called `name`; nullptr when the comparison has none.
[[nodiscard]] const ArmFigures* find_arm(const Comparison& comparison, const std::string& name);

inline constexpr const char* kBaselineArm = "baseline";
inline constexpr const char* kControlArm = "nll control";
inline constexpr const char* kTunedArm = "tuned";

/// Measures one router (whatever `model` holds now) on every domain of `held_out`; `against_reference`: its agreement
/// with the routers that `model->keep_reference_routers()` kept too, on the hidden states that the router itself
/// brought about. The static-set test costs one more pass per size. Memory beyond the model's is that of one batch,
/// counts and the trace of one domain.
[[nodiscard]] ArmFigures measure_arm(MoeModel& model, const std::string& name, const PackedData& held_out,
                                     const std::vector<std::string>& tuned_domains, const EvaluateOptions& options,
                                     std::int64_t sequence_length, bool quiet, bool against_reference = false);

/// What the section `evaluate` asks of the model. Throws UsageError, with the places in the recipe: slots above the
/// experts, static sets that cannot serve a token, a prior that leaves nothing to choose.
void check_evaluate_fits(const LoadedRecipe<FinetuneRecipe>& loaded, const Architecture& architecture);

/// Which routers `hestia evaluate` measures.
struct EvaluateTarget {
  std::filesystem::path bundle;  ///< Of the tuned router; empty: bundle/ in the run directory.
  bool checkpoint = false;       ///< The tuned model is the run's last checkpoint instead, with all that was trained.
  std::string only;              ///< kBaselineArm or kTunedArm: that one alone; empty: all there are.
};

/// `hestia evaluate`: baseline, control (when the run has one) and tuned router on the held-out split of
/// `data.evaluate`, or the one that `evaluate.split` names, then each of them under the residency rules of
/// `evaluate.residency_prior` and of the bundle (without one: of the run), and all of them on `evaluate.tasks`;
/// writes run_dir/results.json, with tasks also run_dir/answers.jsonl, keeps those of the evaluation before as
/// results.previous.json and answers.previous.jsonl, and returns the comparison. Throws InputError when the bundle is
/// missing (names the export command), UsageError when the checkpoint is (the run is not finished).
Comparison run_evaluate(const LoadedRecipe<FinetuneRecipe>& loaded, const EvaluateTarget& target, bool quiet);

/// The aligned table that `hestia evaluate` prints.
[[nodiscard]] std::string comparison_table(const Comparison& comparison);
/// The table of tasks that follows it; empty without tasks.
[[nodiscard]] std::string task_table(const Comparison& comparison);
/// Every number, machine, commit, command, degraded modes; format version 1.
[[nodiscard]] Json comparison_json(const Comparison& comparison);

}  // namespace hestia
