#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "hestia/core/json_lines.hpp"
#include "hestia/core/recipe.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/runtime/decoder.hpp"
#include "hestia/runtime/expert_store.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// Section `model` of a bench recipe.
struct BenchModelOptions {
  std::string path;                ///< Hugging Face directory; with random weights only its config.json is read.
  std::string weights = "stored";  ///< stored | random
  std::int64_t seed = 1;           ///< Of random weights.
  std::string dtype = "bfloat16";
  std::string device = "auto";
  std::int64_t threads = 0;  ///< CPU threads; 0: all cores.
  std::string
      pinned_memory;  ///< Most pinned host memory, as `--pinned-memory` takes it; empty: as much as the experts.
  FieldList fields();
};

/// Section `bench`: the grid. Every combination is an arm.
struct BenchOptions {
  std::vector<std::string> slots = {"all", "16", "32"};  ///< `all`, or as `--expert-slots` takes them.
  std::vector<std::string> policies = {"lru"};
  std::vector<std::string> expert_formats = {"bf16"};  ///< As `--expert-format` takes them.
  double gamma = 0.9;
  std::vector<std::string> fetch = {"auto"};    ///< SlotCacheOptions::fetch
  std::vector<std::string> prefetch = {"off"};  ///< SlotCacheOptions::prefetch
  /// cold | prefill | preload, of the section `preload` | full: slots hold every expert, so that every request is a
  /// hit.
  std::string start = "cold";
  std::vector<std::int64_t> batch = {1};
  std::vector<std::int64_t> prompt_tokens = {128};
  std::vector<std::int64_t> new_tokens = {256};
  std::int64_t repeats = 5;
  std::int64_t seed = 1;  ///< Of the random prompts.
  bool graph = true;
  bool kernels = true;      ///< DecoderOptions::kernels
  bool start_early = true;  ///< DecoderOptions::start_early
  FieldList fields();
};

/// Section `replay`: experts out of a trace in place of the router's.
struct BenchReplayOptions {
  std::string trace;  ///< Empty: live routing.
  bool fold = false;  ///< Onto the model's shape.
  FieldList fields();
};

/// Section `preload`: the experts that arms of `bench.start` preload begin with.
struct BenchPreloadOptions {
  std::string file;  ///< preferences.h5
  std::string by = "aggregate";
  std::string router = "baseline";
  FieldList fields();
};

/// Recipe of `hestia bench`.
struct BenchRecipe {
  std::string task = "bench";
  std::string output;  ///< JSON lines, one per arm; empty: stdout only.
  BenchModelOptions model;
  BenchOptions bench;
  BenchReplayOptions replay;
  BenchPreloadOptions preload;
  FieldList fields();
};

/// Reads and checks a bench recipe. Throws UsageError with all problems, each with file:line.
[[nodiscard]] LoadedRecipe<BenchRecipe> load_bench_recipe(const std::filesystem::path& path,
                                                          const std::vector<std::string>& overrides);

/// Architecture of the recipe's model. Throws what reading it throws, with file:line.
[[nodiscard]] Architecture bench_architecture(const LoadedRecipe<BenchRecipe>& loaded);

/// Throws UsageError with file:line when prompt and new tokens are more than the model reaches.
void check_bench_lengths(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture);

/// The trace to replay, folded where that is asked for (`fold` then says how), and known to fit the model in the turns
/// that the largest batch takes. Throws what reading, folding and replay_of throw, UsageError for a trace without
/// decode steps, each with file:line.
[[nodiscard]] RoutingTrace bench_trace(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture,
                                       std::string& fold);

/// The experts that arms of `bench.start` preload begin with, per MoE layer, best first; empty for another start.
/// Throws what read_preload throws, with file:line.
[[nodiscard]] std::vector<std::vector<std::uint16_t>> bench_preload(const LoadedRecipe<BenchRecipe>& loaded,
                                                                    const Architecture& architecture);

/// Throws UsageError with all formats of the grid that do not hold the model's experts, each with file:line.
void check_bench_formats(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture);

/// What packing lost, as results have it: {"mean", "max", "layers": [{"gate", "up", "down"}]}, relative square errors;
/// mean and max are over the MoE layers of the mean of the three. Null when the store is not packed.
[[nodiscard]] Json expert_error_json(const ExpertStore& store);

/// Where the experts lie, as results have it: {"bytes", "experts", "pinned_bytes", "pinned_experts", "staging_bytes"};
/// nothing is pinned for a CPU.
[[nodiscard]] Json expert_store_json(const ExpertStore& store);

/// What a decoder prefetched since its `begin`: `kind`, `guesses`, `right`, `useful_bytes`, `wasted_bytes`; null where
/// it does not. Synchronises.
[[nodiscard]] Json prefetch_json(const Decoder& decoder);

/// Decodes every arm of the grid and returns one object per arm (docs/decoding.md has the fields). One format of the
/// experts after the other, so that one store is held at a time; in it, the arms of one batch and length take turns,
/// after a round that does not count, and rates of link and memory are probed before and after. Once they are measured
/// their rows are added to the recipe's `output`, then given to `on_row` (may be empty): a run that is cut off keeps
/// them. Throws what loading a model and decoding throw; UsageError for a grid that the model does not have.
[[nodiscard]] std::vector<Json> run_bench(const LoadedRecipe<BenchRecipe>& loaded, bool quiet,
                                          const std::function<void(const Json& row)>& on_row = {});

/// The rows as a table.
[[nodiscard]] std::string bench_table(const std::vector<Json>& rows);

/// Least seconds of a decode step (docs/decoding.md, "The bound"): per layer dense bytes at the memory rate and the
/// longer of its missed bytes at the link rate and its hit bytes at the memory rate; then the head. Rates in bytes per
/// second.
struct DecodeBound {
  std::vector<double> dense_bytes;  ///< Of each model layer, routed experts left out.
  std::vector<bool> is_moe;         ///< Of each model layer.
  double head_bytes = 0.0;
  double expert_bytes = 0.0;
  double link_rate = 0.0;
  double device_rate = 0.0;
  /// Of one step; misses and hits: experts of each MoE layer.
  [[nodiscard]] double seconds(const std::vector<std::int64_t>& misses, const std::vector<std::int64_t>& hits) const;
};

}  // namespace hestia
