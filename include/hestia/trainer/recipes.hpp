#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/recipe.hpp"
#include "hestia/data/choice_questions.hpp"
#include "hestia/data/corpus.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia {

/// Section `model`: the checkpoint and how to hold it.
struct ModelOptions {
  std::string path;               ///< Hugging Face directory: config.json, safetensors, a tokeniser.
  std::string dtype = "float32";  ///< Of everything but the routers, which are float32 always.
  std::string device = "auto";    ///< auto | cpu | cuda | cuda:N
  std::int64_t threads = 0;       ///< CPU threads; 0: all cores.
  bool activation_checkpointing = false;
  FieldList fields();
};

/// Section `data`: corpora by domain, which of them train, which are held out for evaluation.
struct DataOptions {
  std::int64_t sequence_length = 256;
  double held_out_fraction = 0.05;
  std::int64_t split_seed = 1;
  std::int64_t max_tokens_per_domain = 0;  ///< Training tokens per domain; 0: all.
  std::vector<std::string> train;          ///< Domains to train on.
  std::vector<double> train_mix;           ///< One weight per training domain; empty: as they come.
  std::vector<std::string> evaluate;  ///< Domains of every evaluation; the first training domain should be among them.
  std::vector<CorpusOptions> corpora;
  FieldList fields();
};

/// Section `train.lora`: adapters on the up and down projections of every routed expert, W' = W + (alpha / rank) B A
/// (model/adapters.hpp). Only used with trainable `router+lora`.
struct LoraOptions {
  std::int64_t rank = 32;
  double alpha = 16.0;
  FieldList fields();
};

/// Section `train.top_k_annealing` (SEER-MoE, arXiv 2404.05089): from optimiser step `step` on, `top_k` experts serve
/// a token instead of the model's K. Both 0: never.
struct TopKAnnealingOptions {
  std::int64_t step = 0;
  std::int64_t top_k = 0;
  FieldList fields();
};

/// Section `train`: the optimiser and the loop.
struct TrainOptions {
  std::string trainable = "router";        ///< router | router+lora | all
  std::string router_gradient = "chosen";  ///< chosen | all: of which experts routers get a gradient.
  LoraOptions lora;
  TopKAnnealingOptions top_k_annealing;
  std::int64_t steps = 100;         ///< 0: not known before the data is read, as many as `epochs` take.
  double epochs = 0.0;              ///< Passes over the training data, instead of `steps`; 0: `steps` counts.
  std::int64_t rows_per_batch = 8;  ///< Rows of `data.sequence_length` tokens in one micro-batch.
  std::int64_t accumulate = 1;      ///< Micro-batches per optimiser step.
  double learning_rate = 1e-3;      ///< Peak.
  std::int64_t warmup_steps = 0;
  double warmup_ratio = 0.0;         ///< Share of the steps, instead of `warmup_steps`; 0: `warmup_steps` counts.
  std::string schedule = "linear";   ///< linear | cosine | constant, after the warm-up.
  std::int64_t decay_steps = 0;      ///< Step at which the decay is over; 0: the last one.
  double final_learning_rate = 0.0;  ///< Share of the peak once the decay is over.
  double weight_decay = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double clip_norm = 1.0;  ///< 0: no clipping.
  std::int64_t log_every = 10;
  std::int64_t evaluate_every = 0;       ///< 0: at the end only.
  std::int64_t evaluate_tokens = 16384;  ///< Held-out tokens per domain in the evaluations of the loop.
  std::int64_t checkpoint_every = 0;     ///< 0: at the end only.
  std::int64_t keep_checkpoints = 2;
  FieldList fields();
};

/// Section `losses.logit_distillation`: KL(base || tuned) of the language-model logits over labelled tokens, so that
/// what the task data do not speak of stays as it was (trainer/distillation.hpp). Costs a forward of the base model.
struct LogitDistillationOptions {
  double weight = 0.0;
  std::string teacher;               ///< Model directory of the same vocabulary and width; empty: the base model.
  std::vector<std::string> domains;  ///< Training domains whose labelled tokens count; empty: all.
  FieldList fields();
};

/// Section `losses.nll`: the language-model loss itself, which has no weight.
struct NllOptions {
  std::vector<std::string> domains;  ///< Training domains whose labels count; empty: all.
  FieldList fields();
};

/// Section `control`: plain NLL tuning with the same trainable set, labels (`losses.nll.domains`) and steps, at its own
/// learning rate.
struct ControlOptions {
  bool enabled = false;
  double learning_rate = 1e-3;
  FieldList fields();
};

/// Section `export.predictor`: guesses a prompt's experts (trainer/preference_predictor.hpp). Defaults of the optimiser
/// and sizes: MELINOE, arXiv 2602.11192.
struct PredictorOptions {
  bool enabled = false;
  std::int64_t hidden_size = 1024;
  double learning_rate = 2e-4;  ///< Of SGD.
  double momentum = 0.9;
  std::int64_t batch_size = 16;
  std::int64_t epochs = 10;
  double held_out_fraction = 0.2;  ///< Share of the stored sequences that it is compared on.
  std::vector<std::int64_t>
      slots;                ///< C of the recall figures; empty: E/8, E/4, E/2. That of the bundle is always there.
  bool standardise = true;  ///< Inputs to mean 0 and deviation 1; folded into the first layer afterwards.
  bool start_from_popularity = true;  ///< Output biases start at the log of the mean popularity; else as the weights.
  std::string embeddings;  ///< safetensors file with `ids` and `embeddings`; empty: the model's token embeddings.
  FieldList fields();
};

/// Section `export`.
struct ExportOptions {
  std::int64_t tokens = 32768;        ///< Tokens of the tuned domains that the preference statistics are taken over.
  std::string split = "held_out";     ///< held_out | train
  std::int64_t prompt_tokens = 0;     ///< Leading tokens that are the prompt of a text without one; 0: none.
  std::int64_t max_sequences = 1024;  ///< Bound of the per-sequence part; 0: all.
  bool write_prompts = false;         ///< Also write prompts.jsonl.
  PredictorOptions predictor;
  FieldList fields();
};

/// Section `residency.scope`: where the bonus counts (ResidencyScope).
struct ResidencyScopeOptions {
  std::vector<std::string> domains;  ///< Training domains that the rule is for; empty: it holds everywhere.
  double elsewhere = 0.0;            ///< Times which lambda counts in other text.
  std::int64_t window = 64;          ///< Tokens that a token's own is told from.
  double keep = 0.95;                ///< Share of these domains' text that is to be taken for theirs.
  FieldList fields();
};

/// Section `residency`: residency-aware routing (docs/routing.md), the rule that the bundle is to be served with and,
/// in the loop, trained under.
struct ResidencyOptions {
  std::string score = "logit";  ///< logit (z), weight (u = exp(z - max z)) or root (sqrt(u)).
  double lambda = 0.0;  ///< Of z + lambda * D_avg, u + lambda or sqrt(u) + lambda for residents; 0: plain Top-K.
  std::vector<double> layer_factors;  ///< Of lambda, one per MoE layer; empty: 1 everywhere.
  std::int64_t always_keep = 2;       ///< J, experts chosen by the score alone.
  bool preserve_mass = false;         ///< Scale mixing weights to the sum of plain Top-K's.
  std::int64_t slots = 0;             ///< C; 0: losses.cache_simulation.slots, or E/4.
  std::string policy = "lru";
  bool in_loop = false;                    ///< Route by the rule while training.
  std::int64_t ramp_steps = 0;             ///< Steps over which lambda grows to its value; 0: none.
  std::vector<std::int64_t> train_slots;   ///< C of training steps, in turn; empty: that of the rule.
  std::int64_t calibration_tokens = 8192;  ///< Training tokens per domain behind D_avg and the scope.
  ResidencyScopeOptions scope;
  FieldList fields();
};

/// Section `evaluate.residency_prior`: every router also under residency-aware routing, for each lambda of each form
/// and J.
struct ResidencyPriorOptions {
  std::vector<double> lambdas;         ///< By logits; empty: no such arms.
  std::vector<double> weight_lambdas;  ///< By weights; empty: no such arms.
  std::vector<double> root_lambdas;    ///< By roots of weights; empty: no such arms.
  std::vector<double> layer_factors;   ///< Of every lambda, one per MoE layer; empty: the bundle's.
  std::vector<std::int64_t> always_keep = {2};
  std::int64_t slots = 0;  ///< C; 0: the bundle's.
  bool in_scope = true;    ///< For the text of the bundle's scope, where it has one; false: everywhere.
  [[nodiscard]] bool asks_for_arms() const {
    return !lambdas.empty() || !weight_lambdas.empty() || !root_lambdas.empty();
  }
  FieldList fields();
};

/// One entry of `evaluate.tasks`: what `hestia evaluate` has every router answer (docs/recipes.md).
struct TaskOptions {
  std::string name;         ///< Label in every report.
  std::string kind;         ///< exact_match | multiple_choice
  std::int64_t limit = 0;   ///< Examples, from the first on; 0: all.
  std::int64_t batch = 32;  ///< Rows that run together.
  // exact_match: a greedy continuation of each prompt is compared with the answer.
  std::string domain;              ///< Of data.corpora, whatever the lists of `data` name; its documents have prompts.
  std::string split = "held_out";  ///< held_out | train | all: documents of the domain.
  std::int64_t max_new_tokens = 256;
  std::vector<std::string> stop;  ///< Texts that end a continuation beside the end of sequence, not part of it.
  std::string answer_after;       ///< The answer is what follows this on its line; empty: the whole text.
  // multiple_choice: the choice with the highest likelihood counts.
  ChoiceFormat choices;  ///< Keys `paths`, `prompt`, `choices`, `answer` of the entry.
  FieldList fields();
};

/// Section `evaluate`: the comparison of baseline, control and tuned router.
struct EvaluateOptions {
  std::int64_t tokens_per_domain = 16384;
  std::string split = "held_out";   ///< held_out | train: the documents of `data.evaluate` that are measured.
  std::vector<std::int64_t> slots;  ///< Empty: E/8, E/4, E/2.
  std::vector<std::string> policies = {"lru", "lfu", "belady"};
  double gamma = 0.9;                             ///< Of the gamma-cache.
  std::vector<std::int64_t> segments = {16, 64};  ///< Steps per segment of the segment metrics; empty: none.
  std::vector<std::int64_t> static_set = {0};     ///< C of the static-set test; 0: E/4, at least K; empty: none.
  bool agreement = true;                          ///< Compare every router with the base's (CPU time of its own).
  ResidencyPriorOptions residency_prior;
  std::vector<TaskOptions> tasks;
  FieldList fields();
};

/// Recipe of `hestia finetune`, `export` and `evaluate`.
struct FinetuneRecipe {
  std::string task = "finetune";
  std::string run_dir;
  std::int64_t seed = 1;
  ModelOptions model;
  DataOptions data;
  RoutingLossOptions losses;
  std::vector<std::string> loss_domains;  ///< `losses.domains`: whose tokens the routing terms count; empty: all.
  NllOptions nll;                         ///< In the section `losses`.
  LogitDistillationOptions distillation;  ///< In the section `losses`.
  TrainOptions train;
  ResidencyOptions residency;
  ControlOptions control;
  ExportOptions export_options;
  EvaluateOptions evaluate;
  FieldList fields();
};

/// Section `architecture` of a pretraining recipe.
struct ArchitectureOptions {
  std::string family = "olmoe";
  std::int64_t hidden_size = 256;
  std::int64_t expert_intermediate_size = 64;
  std::int64_t num_layers = 6;
  std::int64_t num_attention_heads = 4;
  std::int64_t num_key_value_heads = 4;
  std::int64_t num_experts = 32;
  std::int64_t top_k = 4;
  bool normalise_top_k = false;
  bool tie_word_embeddings = false;
  double rope_theta = 10000.0;
  std::int64_t max_position_embeddings = 4096;
  double initializer_range = 0.02;
  FieldList fields();
};

/// Section `tokenizer` of a pretraining recipe.
struct TokenizerOptions {
  std::string path;  ///< An existing tokenizer.model or .json; empty: train one on the training split.
  std::int64_t vocab_size = 4096;
  std::int64_t sample_bytes = 20'000'000;   ///< Text to train it on, shared equally among the domains.
  std::vector<std::string> special_tokens;  ///< Tokens of chat templates that a trained vocabulary gets.
  FieldList fields();
};

/// Section `save` of a pretraining recipe.
struct SaveOptions {
  std::string dtype = "bfloat16";
  std::int64_t max_shard_bytes = 15'000'000;
  FieldList fields();
};

/// Recipe of `hestia pretrain`.
struct PretrainRecipe {
  std::string task = "pretrain";
  std::string run_dir;
  std::int64_t seed = 1;
  ModelOptions model;  ///< `path` is unused.
  ArchitectureOptions architecture;
  TokenizerOptions tokenizer;
  DataOptions data;
  RoutingLossOptions losses;
  TrainOptions train;
  SaveOptions save;
  FieldList fields();
};

/// What kind of recipe a file holds: told by its `task` key (finetune | pretrain | bench).
[[nodiscard]] std::string recipe_task(const std::filesystem::path& path);

/// A recipe with where its values came from.
template <class Recipe>
struct LoadedRecipe {
  Recipe recipe;
  RecipeSource source;
};

/// Reads and checks a fine-tuning recipe: field rules plus what spans fields (domains that exist, mixes that match,
/// slots within E is checked once the model is known). Of `steps` and `epochs`, and of `warmup_steps` and
/// `warmup_ratio`, the one on the command line counts; afterwards at most one of each pair is not 0, and a ratio of
/// known steps is in `warmup_steps`. Throws UsageError with all problems, each with file:line.
[[nodiscard]] LoadedRecipe<FinetuneRecipe> load_finetune_recipe(const std::filesystem::path& path,
                                                                const std::vector<std::string>& overrides);
/// The same for a pretraining recipe.
[[nodiscard]] LoadedRecipe<PretrainRecipe> load_pretrain_recipe(const std::filesystem::path& path,
                                                                const std::vector<std::string>& overrides);

/// Replaces `epochs` and `warmup_ratio` by the steps they come to: the fewest that train on at least `epochs` times the
/// tokens of `data`, in the order that a run with this seed draws them; warm-up steps are rounded up. Changes nothing
/// where the steps are known. Throws UsageError, with the place in the recipe, when warm-up or the step of Top-K
/// annealing lie beyond these steps.
void resolve_steps(TrainOptions& options, const PackedData& data, const std::vector<double>& mix,
                   std::int64_t sequence_length, std::uint64_t seed, const RecipeSource& source);
/// The same from the recipe that the run in `run_dir` saved, for verbs that come after it. Without a saved recipe
/// `steps` stays 0. Throws UsageError, with the place in the recipe, when the run trained another set of parameters.
void resolve_steps_from_run(TrainOptions& options, const std::filesystem::path& run_dir, const RecipeSource& source);
/// What a `train` section asks of the model it is to train: K' at most K and one that the family has, a rank that the
/// experts have room for, routing that has a gradient of all experts where that is asked for. Adds to `problems`, with
/// the place in the recipe.
void check_train_fits(const TrainOptions& train, const RecipeSource& source, const Architecture& architecture,
                      Problems& problems);

/// `make_routing_losses` of a recipe's section `losses`, with the place in the recipe before its messages.
[[nodiscard]] std::vector<WeightedLoss> recipe_losses(const RoutingLossOptions& losses, const RecipeSource& source,
                                                      std::int64_t num_experts, std::int64_t top_k);

/// The corpus options of `domain`, with its recipe key ("data.corpora.2").
[[nodiscard]] std::pair<const CorpusOptions*, std::string> find_corpus(const DataOptions& data,
                                                                       const std::string& domain);

}  // namespace hestia
