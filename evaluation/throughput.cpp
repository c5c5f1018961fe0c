#include "hestia/evaluation/throughput.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include <ATen/Parallel.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/median.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/routing/fold.hpp"
#include "hestia/routing/preload.hpp"
#include "hestia/runtime/decoder.hpp"
#include "hestia/runtime/probe.hpp"
#include "hestia/runtime/replay.hpp"

namespace hestia {

FieldList BenchModelOptions::fields() {
  FieldList list;
  list.add("path", path, "Hugging Face model directory; with random weights only its config.json is read").required();
  list.add("weights", weights, "stored, or random ones made in memory (speed and replay only)", {"stored", "random"});
  list.add("seed", seed, "of random weights", {.low = 0});
  list.add("dtype", dtype, "of all weights but the routers", {"float32", "bfloat16"});
  list.add("device", device, "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one");
  list.add("threads", threads, "CPU threads; 0: all cores", {.low = 0, .high = 1024});
  list.add("pinned_memory", pinned_memory, "most pinned host memory for experts, as 8GiB; empty: all are pinned");
  return list;
}

FieldList BenchOptions::fields() {
  FieldList list;
  list.add("slots", slots, "experts on the device: all, 16 (per layer), total:256 or memory:6GiB");
  list.add("policies", policies, "which expert leaves a full cache", policy_names());
  list.add("expert_formats", expert_formats, "experts in memory: bf16 (as model.dtype says), or packed from bfloat16",
           expert_format_names());
  list.add("gamma", gamma, "discount of the policy gamma", {.low = 0.0, .high = 1.0});
  list.add(
      "fetch", fetch,
      "how misses come: in one kernel with the products, by the copy engine, or in kernels of their own; auto: by size",
      fetch_path_names());
  list.add("prefetch", prefetch, "what the link brings of the next layer while nothing is asked for", prefetch_names());
  list.add("start", start, "slots at the first step; full: all experts, in arms with as many slots",
           {"cold", "prefill", "preload", "full"});
  list.add("batch", batch, "sequences decoded together", {.low = 1, .high = 32});
  list.add("prompt_tokens", prompt_tokens, "random tokens before the first step", {.low = 1});
  list.add("new_tokens", new_tokens, "tokens generated per sequence", {.low = 2});
  list.add("repeats", repeats, "timed rounds, after one that is not", {.low = 1});
  list.add("seed", seed, "of the random prompts", {.low = 0});
  list.add("graph", graph, "capture steps in CUDA graphs");
  list.add("kernels", kernels, "whole steps in the decode kernels where these take the model");
  list.add("start_early", start_early, "decode kernels may start before the one before them ends");
  return list;
}

FieldList BenchReplayOptions::fields() {
  FieldList list;
  list.add("trace", trace, "routing trace of the model's shape whose experts are served; empty: live routing");
  list.add("fold", fold, "lay the trace onto the model's layers and experts (docs/routing.md)");
  return list;
}

FieldList BenchPreloadOptions::fields() {
  FieldList list;
  list.add("file", file, "preferences.h5 that bench.start preload takes experts from");
  list.add("by", by, "which experts: those most used of all, since random prompts call for none",
           preload_choice_names());
  list.add("router", router, "whose statistics", {"baseline", "tuned"});
  return list;
}

FieldList BenchRecipe::fields() {
  FieldList list;
  list.add("task", task, "what the recipe does", {"bench"});
  list.add("output", output, "file for the JSON lines; empty: none");
  list.add_section("model", model.fields(), "what is decoded");
  list.add_section("bench", bench.fields(), "the grid: every combination is an arm");
  list.add_section("replay", replay.fields(), "experts out of a trace");
  list.add_section("preload", preload.fields(), "experts to begin with");
  return list;
}

namespace {

// What of the section `preload` does not go with the rest.
void check_preload(const LoadedRecipe<BenchRecipe>& loaded, Problems& problems) {
  const BenchPreloadOptions& preload = loaded.recipe.preload;
  const std::string& start = loaded.recipe.bench.start;
  if (start != "preload") {
    const BenchPreloadOptions plain;
    const char* const given = !preload.file.empty()            ? "preload.file"
                              : preload.by != plain.by         ? "preload.by"
                              : preload.router != plain.router ? "preload.router"
                                                               : nullptr;
    if (given != nullptr) {
      problems.add(fmt::format("{}: {}: only serves bench.start preload, got {}; take that start, or leave the key out",
                               loaded.source.location(given), given, start));
    }
    return;
  }
  if (preload.file.empty()) {
    problems.add(fmt::format("{}: bench.start: preload needs statistics, got no preload.file; name a preferences.h5",
                             loaded.source.location("bench.start")));
  }
  if (preload.by != "aggregate") {
    problems.add(
        fmt::format("{}: preload.by: must be aggregate, since prompts of a bench are random tokens that call for no "
                    "experts, got {}; hestia generate pre-loads by a prompt",
                    loaded.source.location("preload.by"), preload.by));
  }
}

PreloadSource preload_source(const BenchPreloadOptions& preload) {
  return {preload_choice_from_name(preload.by, "preload.by"), preload.file,
          router_from_name(preload.router, "preload.router")};
}

// Runs `step`; what it complains about begins with the key of the recipe and its place.
template <class Step>
auto with_place(const RecipeSource& source, const char* key, const Step& step) {
  const auto placed = [&](const Error& error) {
    return fmt::format("{}: {}: {}", source.location(key), key, error.what());
  };
  try {
    return step();
  } catch (const UsageError& error) {
    throw UsageError(placed(error));
  } catch (const InputError& error) {
    throw InputError(placed(error));
  } catch (const RunError& error) {
    throw RunError(placed(error));
  }
}

}  // namespace

LoadedRecipe<BenchRecipe> load_bench_recipe(const std::filesystem::path& path,
                                            const std::vector<std::string>& overrides) {
  LoadedRecipe<BenchRecipe> loaded;
  Problems problems;
  loaded.source = read_recipe(path, overrides, loaded.recipe.fields(), problems);
  const BenchOptions& bench = loaded.recipe.bench;
  const auto not_empty = [&](const auto& list, const char* key) {
    if (list.empty()) {
      problems.add(fmt::format("{}: {} must name at least one value, got none", loaded.source.location(key), key));
    }
  };
  not_empty(bench.slots, "bench.slots");
  not_empty(bench.policies, "bench.policies");
  not_empty(bench.fetch, "bench.fetch");
  not_empty(bench.prefetch, "bench.prefetch");
  not_empty(bench.expert_formats, "bench.expert_formats");
  not_empty(bench.batch, "bench.batch");
  not_empty(bench.prompt_tokens, "bench.prompt_tokens");
  not_empty(bench.new_tokens, "bench.new_tokens");
  if (std::find(bench.policies.begin(), bench.policies.end(), "belady") != bench.policies.end()) {
    problems.add(fmt::format("{}: bench.policies: belady knows the future, a decoder does not; take another",
                             loaded.source.location("bench.policies")));
  }
  for (const std::string& format : bench.expert_formats) {
    if (format != "bf16" && loaded.recipe.model.dtype != "bfloat16") {
      problems.add(
          fmt::format("{}: bench.expert_formats: {} is packed from bfloat16, got model.dtype {}; take bfloat16",
                      loaded.source.location("bench.expert_formats"), format, loaded.recipe.model.dtype));
    }
  }
  if (const std::string& pinned = loaded.recipe.model.pinned_memory; !pinned.empty()) {
    try {
      static_cast<void>(parse_pinned_memory(pinned, "model.pinned_memory"));
    } catch (const UsageError& error) {
      problems.add(fmt::format("{}: {}", loaded.source.location("model.pinned_memory"), error.what()));
    }
  }
  check_preload(loaded, problems);
  problems.throw_usage_if_any();
  return loaded;
}

Architecture bench_architecture(const LoadedRecipe<BenchRecipe>& loaded) {
  return with_place(loaded.source, "model.path", [&] { return read_architecture(loaded.recipe.model.path); });
}

void check_bench_lengths(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture) {
  const BenchOptions& bench = loaded.recipe.bench;
  const std::int64_t prompt = *std::max_element(bench.prompt_tokens.begin(), bench.prompt_tokens.end());
  const std::int64_t tokens = *std::max_element(bench.new_tokens.begin(), bench.new_tokens.end());
  if (prompt + tokens > architecture.max_position_embeddings) {
    throw UsageError(fmt::format("{}: bench.new_tokens: the model reaches {} tokens, got a prompt of {} and {} more",
                                 loaded.source.location("bench.new_tokens"), architecture.max_position_embeddings,
                                 prompt, tokens));
  }
}

RoutingTrace bench_trace(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture, std::string& fold) {
  const BenchReplayOptions& replay = loaded.recipe.replay;
  return with_place(loaded.source, "replay.trace", [&] {
    RoutingTrace trace = read_trace(replay.trace);
    if (replay.fold) {
      FoldedTrace folded =
          fold_trace(trace, {static_cast<std::int64_t>(architecture.moe_layers().size()), architecture.num_experts});
      fold = folded.description();
      trace = std::move(folded.trace);
    }
    std::vector<std::int64_t> turns = turns_of(trace);
    if (turns.empty()) {
      throw UsageError(fmt::format("{} has no decode steps", replay.trace));
    }
    const std::vector<std::int64_t>& batch = loaded.recipe.bench.batch;
    const auto rows = static_cast<std::size_t>(*std::max_element(batch.begin(), batch.end()));
    turns.resize(std::min(turns.size(), rows));
    static_cast<void>(replay_of(trace, turns, architecture));
    return trace;
  });
}

std::vector<std::vector<std::uint16_t>> bench_preload(const LoadedRecipe<BenchRecipe>& loaded,
                                                      const Architecture& architecture) {
  if (loaded.recipe.bench.start != "preload") {
    return {};
  }
  const PreloadSource source = preload_source(loaded.recipe.preload);
  return with_place(loaded.source, "preload.file", [&] {
    return read_preload(source.file, source.router, architecture.moe_layers(), architecture.num_experts, "the model");
  });
}

void check_bench_formats(const LoadedRecipe<BenchRecipe>& loaded, const Architecture& architecture) {
  Problems problems;
  for (const std::string& name : loaded.recipe.bench.expert_formats) {
    try {
      static_cast<void>(stored_expert_bytes(architecture, dtype_from_recipe(loaded.recipe.model.dtype),
                                            expert_format_from_name(name)));
    } catch (const UsageError& error) {
      problems.add(
          fmt::format("{}: bench.expert_formats: {}", loaded.source.location("bench.expert_formats"), error.what()));
    }
  }
  problems.throw_usage_if_any();
}

Json prefetch_json(const Decoder& decoder) {
  if (decoder.prefetch() == PrefetchKind::kOff) {
    return {};
  }
  const PrefetchTotals totals = decoder.prefetch_totals();
  return {{"kind", prefetch_name(decoder.prefetch())},
          {"guesses", totals.guesses},
          {"right", totals.right},
          {"useful_bytes", totals.useful_bytes},
          {"wasted_bytes", totals.copied_bytes - totals.useful_bytes}};
}

Json expert_store_json(const ExpertStore& store) {
  return {{"bytes", store.bytes()},
          {"experts", store.num_blobs()},
          {"pinned_bytes", store.pinned_bytes()},
          {"pinned_experts", store.pinned_blobs()},
          {"staging_bytes", store.staging_bytes()}};
}

Json expert_error_json(const ExpertStore& store) {
  if (store.errors().empty()) {
    return {};
  }
  Json layers = Json::array();
  double sum = 0.0;
  double most = 0.0;
  for (const ExpertError& error : store.errors()) {
    const double mean = (error.gate + error.up + error.down) / 3.0;
    sum += mean;
    most = std::max(most, mean);
    layers.push_back({{"gate", error.gate}, {"up", error.up}, {"down", error.down}});
  }
  return {{"mean", sum / static_cast<double>(store.errors().size())}, {"max", most}, {"layers", layers}};
}

double DecodeBound::seconds(const std::vector<std::int64_t>& misses, const std::vector<std::int64_t>& hits) const {
  double seconds = head_bytes / device_rate;
  std::size_t moe_layer = 0;
  for (std::size_t layer = 0; layer < dense_bytes.size(); ++layer) {
    seconds += dense_bytes[layer] / device_rate;
    if (is_moe[layer]) {
      seconds += std::max(static_cast<double>(misses.at(moe_layer)) * expert_bytes / link_rate,
                          static_cast<double>(hits.at(moe_layer)) * expert_bytes / device_rate);
      ++moe_layer;
    }
  }
  return seconds;
}

namespace {

using torch::Tensor;

struct Arm {
  std::string slots, policy;
  std::unique_ptr<Decoder> decoder;
  std::vector<double> rates, first;  // tokens per second, seconds to the first token
  double bound_seconds = 0.0;        // of one round
  std::int64_t steps = 0, requests = 0, hits = 0, loads = 0;
};

DecodeBound bound_of(MoeModel& model, std::int64_t expert_bytes, const ProbedRates& rates) {
  const Architecture& a = model->architecture();
  DecodeBound bound;
  bound.dense_bytes.assign(static_cast<std::size_t>(a.num_layers), 0.0);
  for (std::int64_t layer = 0; layer < a.num_layers; ++layer) {
    bound.is_moe.push_back(a.is_moe_layer(layer));
  }
  const std::vector<TensorSpec> specs = tensor_specs(a);
  const auto tensors = model->named_tensors();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const auto bytes = static_cast<double>(tensors[i].second.nbytes());
    const bool embedding = specs[i].part == TensorPart::kTokenEmbedding;
    if (specs[i].role == TensorRole::kExpert) {
      continue;
    }
    if (specs[i].layer >= 0) {
      bound.dense_bytes[static_cast<std::size_t>(specs[i].layer)] += bytes;
    } else if (!embedding || a.tie_word_embeddings) {
      bound.head_bytes += bytes;  // of the embedding a step reads one row
    }
  }
  bound.expert_bytes = static_cast<double>(expert_bytes);
  bound.link_rate = rates.link_copy;
  bound.device_rate = rates.device_read;
  return bound;
}

CacheStart start_of(const std::string& name) {
  return name == "prefill" ? CacheStart::kPrefill : name == "cold" ? CacheStart::kCold : CacheStart::kPreload;
}

std::string device_name(torch::Device device) {
  if (!device.is_cuda()) {
    return "cpu";
  }
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, device.index()) == cudaSuccess ? std::string(properties.name) : "cuda";
}

class Bench {
 public:
  Bench(const LoadedRecipe<BenchRecipe>& loaded, bool quiet)
      : loaded_(&loaded),
        recipe_(loaded.recipe),
        device_(
            with_place(loaded.source, "model.device", [&] { return device_from_recipe(loaded.recipe.model.device); })),
        quiet_(quiet) {
    if (recipe_.model.threads > 0) {
      at::set_num_threads(static_cast<int>(recipe_.model.threads));
    }
    const Architecture architecture = bench_architecture(loaded);
    check_bench_formats(loaded, architecture);
    check_bench_lengths(loaded, architecture);
    preload_ = bench_preload(loaded, architecture);
    if (!recipe_.replay.trace.empty()) {
      trace_ = bench_trace(loaded, architecture, fold_);
    }
    for (const std::string& name : recipe_.bench.expert_formats) {
      format_ = expert_format_from_name(name);
      for (const std::int64_t batch : recipe_.bench.batch) {
        for (const std::string& slots : recipe_.bench.slots) {
          static_cast<void>(cache_of(architecture, slots, "lru", batch));
        }
      }
    }
  }

  // Calls `emit` with the rows of the arms that took turns once they are measured.
  void run(const std::function<void(const std::vector<Json>&)>& emit) {
    if (recipe_.model.weights == "random" && !trace_) {
      log_warning("weights are random: routing and hit rates say nothing of a trained model; replay a trace");
    }
    if (!device_.is_cuda()) {
      log_warning("no GPU: speeds are the CPU's, without a link there is no bound");
    }
    for (const std::string& name : recipe_.bench.expert_formats) {
      format_ = expert_format_from_name(name);
      offloaded_.reset();  // before the next: one store at a time
      load();
      run_format(emit);
    }
  }

 private:
  void load() {
    const torch::Dtype dtype = dtype_from_recipe(recipe_.model.dtype);
    offloaded_ =
        recipe_.model.weights == "random"
            ? create_offloaded(read_architecture(recipe_.model.path), dtype, device_,
                               static_cast<std::uint64_t>(recipe_.model.seed), quiet_, format_, {}, pinned_budget())
            : load_offloaded(recipe_.model.path, dtype, device_, quiet_, format_, {}, pinned_budget());
    expert_error_ = expert_error_json(offloaded_->store);
  }

  [[nodiscard]] std::optional<std::int64_t> pinned_budget() const {
    const std::string& text = recipe_.model.pinned_memory;
    return text.empty() ? std::nullopt : std::optional(parse_pinned_memory(text, "model.pinned_memory"));
  }

  void run_format(const std::function<void(const std::vector<Json>&)>& emit) {
    before_ = probe_rates(offloaded_->store, device_);
    for (const std::int64_t batch : recipe_.bench.batch) {
      for (const std::int64_t prompt : recipe_.bench.prompt_tokens) {
        for (const std::int64_t tokens : recipe_.bench.new_tokens) {
          std::vector<Json> rows = run_group(batch, prompt, tokens);
          const ProbedRates after = probe_rates(offloaded_->store, device_);
          for (Json& row : rows) {
            row["rates_after"] = rates_json(after);
            row["warnings"] = degradations();
          }
          emit(rows);
          before_ = after;
        }
      }
    }
  }

  static Json rates_json(const ProbedRates& rates) {
    return {{"link_copy_gb_s", rates.link_copy / 1e9},
            {"link_gather_gb_s", rates.link_gather / 1e9},
            {"device_read_gb_s", rates.device_read / 1e9}};
  }

  [[nodiscard]] std::optional<SlotCacheOptions> cache_of(const Architecture& a, const std::string& slots,
                                                         const std::string& policy, std::int64_t batch) const {
    if (slots == "all") {
      return std::nullopt;
    }
    SlotCacheOptions cache;
    try {
      const torch::Dtype dtype = dtype_from_recipe(recipe_.model.dtype);
      cache.slots = parse_expert_slots(slots, a, stored_expert_bytes(a, dtype, format_), batch * a.top_k);
    } catch (const UsageError& error) {
      throw UsageError(fmt::format("{}: bench.slots: {}", loaded_->source.location("bench.slots"), error.what()));
    }
    if (recipe_.bench.start == "full" && cache.slots.per_layer != a.num_experts) {
      throw UsageError(fmt::format("{}: bench.start: full needs as many slots as experts ({}), got bench.slots {}",
                                   loaded_->source.location("bench.start"), a.num_experts, slots));
    }
    cache.policy = policy_from_name(policy);
    cache.gamma = recipe_.bench.gamma;
    return cache;
  }

  // Of an arm with all experts resident.
  [[nodiscard]] DecoderOptions options_of(std::int64_t batch, std::int64_t capacity) const {
    DecoderOptions options;
    options.rows = batch;
    options.capacity = capacity;
    options.graph = recipe_.bench.graph;
    options.kernels = recipe_.bench.kernels;
    options.start_early = recipe_.bench.start_early;
    return options;
  }

  void set_start(const Architecture& a, DecoderOptions& options) const {
    options.start = start_of(recipe_.bench.start);
    if (options.start == CacheStart::kPreload && recipe_.bench.start == "preload") {
      options.preload = preload_;
    } else if (options.start == CacheStart::kPreload) {
      std::vector<std::uint16_t> all;
      for (std::int64_t expert = 0; expert < a.num_experts; ++expert) {
        all.push_back(static_cast<std::uint16_t>(expert));
      }
      options.preload.assign(a.moe_layers().size(), all);
    }
  }

  // Measures the arms that take turns: their rows, without what is known only after them.
  std::vector<Json> run_group(std::int64_t batch, std::int64_t prompt_tokens, std::int64_t new_tokens) {
    const Architecture a = offloaded_->model->architecture();
    std::optional<DecodeReplay> replay;
    if (trace_) {
      const std::vector<std::int64_t> turns = turns_of(*trace_);
      std::vector<std::int64_t> rows;
      for (std::int64_t row = 0; row < batch; ++row) {
        rows.push_back(turns[static_cast<std::size_t>(row) % turns.size()]);
      }
      replay = replay_of(*trace_, rows, a);
      replay->again = true;
      if (batch > static_cast<std::int64_t>(turns.size())) {
        // The same sequence in every row would ask for the same experts: each row begins elsewhere in it.
        const std::int64_t steps = replay->steps_LSBK.size(1);
        for (std::int64_t row = 0; row < batch; ++row) {
          const std::int64_t shift =
              row / static_cast<std::int64_t>(turns.size()) * steps * static_cast<std::int64_t>(turns.size()) / batch;
          replay->steps_LSBK.select(2, row).copy_(replay->steps_LSBK.select(2, row).roll(-shift, 1).clone());
        }
      }
    }
    std::vector<Arm> arms;
    for (const std::string& slots : recipe_.bench.slots) {
      for (const std::string& policy : recipe_.bench.policies) {
        for (const std::string& fetch : recipe_.bench.fetch) {
          for (const std::string& prefetch : recipe_.bench.prefetch) {
            const bool first = &policy == &recipe_.bench.policies.front() && &fetch == &recipe_.bench.fetch.front() &&
                               &prefetch == &recipe_.bench.prefetch.front();
            if (slots == "all" && !first) {
              continue;
            }
            DecoderOptions options = options_of(batch, prompt_tokens + new_tokens);
            options.cache = cache_of(a, slots, policy, batch);
            if (options.cache) {
              options.cache->fetch = fetch_path_from_name(fetch);
              options.cache->prefetch = prefetch_from_name(prefetch);
              set_start(a, options);
            }
            Arm arm;
            arm.slots = slots;
            arm.policy = options.cache ? policy : "";
            arm.decoder = std::make_unique<Decoder>(*offloaded_, options);
            arm.decoder->replay(replay);
            arms.push_back(std::move(arm));
          }
        }
      }
    }
    const Tensor prompt = random_prompt(batch, prompt_tokens, a.vocab_size);
    const DecodeBound bound =
        bound_of(offloaded_->model, static_cast<std::int64_t>(offloaded_->store.layout().bytes), before_);
    Progress progress("bench", static_cast<std::int64_t>(arms.size()) * (recipe_.bench.repeats + 1), "rounds", quiet_);
    std::vector<std::vector<std::int64_t>> asked;
    for (Arm& arm : arms) {
      if (arm.decoder->slots().all_resident() && asked.empty()) {
        asked = requests(options_of(batch, prompt_tokens + new_tokens), prompt, new_tokens, replay);
      }
      count_round(arm, prompt, new_tokens, bound, asked);
      progress.advance(1);
    }
    for (std::int64_t repeat = 0; repeat < recipe_.bench.repeats; ++repeat) {
      for (Arm& arm : arms) {
        arm.decoder->begin(prompt);
        arm.decoder->decode(new_tokens - 1);
        const DecodeTimes& times = arm.decoder->times();
        arm.rates.push_back(static_cast<double>(times.steps * batch) / times.step_seconds);
        arm.first.push_back(times.prompt_seconds);
        progress.advance(1);
      }
    }
    progress.finish();
    std::vector<Json> rows;
    rows.reserve(arms.size());
    for (const Arm& arm : arms) {
      rows.push_back(row_of(arm, batch, prompt_tokens, new_tokens, replay));
    }
    return rows;
  }

  // Experts that each step asks for, [steps, MoE layers]: known when all are resident only by asking a cache.
  [[nodiscard]] std::vector<std::vector<std::int64_t>> requests(const DecoderOptions& like, const Tensor& prompt,
                                                                std::int64_t new_tokens,
                                                                const std::optional<DecodeReplay>& replay) const {
    const Architecture& a = offloaded_->model->architecture();
    if (like.rows == 1) {
      return std::vector<std::vector<std::int64_t>>(static_cast<std::size_t>(new_tokens - 1),
                                                    std::vector<std::int64_t>(a.moe_layers().size(), a.top_k));
    }
    DecoderOptions options = like;
    options.cache.emplace();
    options.cache->slots.per_layer = 1;
    options.start = CacheStart::kCold;
    options.preload.clear();
    Decoder decoder(*offloaded_, options);
    decoder.replay(replay);
    decoder.begin(prompt);
    std::vector<std::vector<std::int64_t>> all;
    std::vector<SlotCacheCounts> last(a.moe_layers().size());
    for (std::int64_t step = 0; step + 1 < new_tokens; ++step) {
      decoder.decode(1);
      const std::vector<SlotCacheCounts> now = decoder.counts();
      all.emplace_back();
      for (std::size_t layer = 0; layer < now.size(); ++layer) {
        all.back().push_back(now[layer].requests - last[layer].requests);
      }
      last = now;
    }
    return all;
  }

  // The round that is not timed: captures graphs, and reads after every step what it loaded.
  void count_round(Arm& arm, const Tensor& prompt, std::int64_t new_tokens, const DecodeBound& bound,
                   const std::vector<std::vector<std::int64_t>>& requests) const {
    const std::size_t moe_layers = offloaded_->model->architecture().moe_layers().size();
    arm.decoder->begin(prompt);
    std::vector<SlotCacheCounts> last(moe_layers);
    for (std::int64_t step = 0; step + 1 < new_tokens; ++step) {
      arm.decoder->decode(1);
      const std::vector<SlotCacheCounts> now = arm.decoder->counts();
      std::vector<std::int64_t> misses(moe_layers, 0);
      std::vector<std::int64_t> hits(moe_layers, 0);
      for (std::size_t layer = 0; layer < moe_layers; ++layer) {
        if (now.empty()) {
          hits[layer] = requests[static_cast<std::size_t>(step)][layer];
        } else {
          misses[layer] = now[layer].loads - last[layer].loads;
          hits[layer] = now[layer].hits - last[layer].hits;
        }
        arm.loads += misses[layer];
        arm.hits += hits[layer];
        arm.requests += misses[layer] + hits[layer];
      }
      if (!now.empty()) {
        last = now;
      }
      if (bound.device_rate > 0 && bound.link_rate > 0) {  // no link rate: nothing is pinned
        arm.bound_seconds += bound.seconds(misses, hits);
      }
      ++arm.steps;
    }
  }

  [[nodiscard]] Tensor random_prompt(std::int64_t batch, std::int64_t length, std::int64_t vocab_size) const {
    Tensor prompt = torch::empty({batch, length}, torch::kInt64);
    SplitMix64 random(static_cast<std::uint64_t>(recipe_.bench.seed));
    for (std::int64_t i = 0; i < prompt.numel(); ++i) {
      prompt.mutable_data_ptr<std::int64_t>()[i] =
          static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(vocab_size)));
    }
    return prompt;
  }

  [[nodiscard]] Json row_of(const Arm& arm, std::int64_t batch, std::int64_t prompt_tokens, std::int64_t new_tokens,
                            const std::optional<DecodeReplay>& replay) const {
    const Architecture& a = offloaded_->model->architecture();
    const double rate = median(arm.rates);
    const auto per_step = [&](double value) { return value / static_cast<double>(arm.steps); };
    const double bound = arm.bound_seconds > 0 ? static_cast<double>(arm.steps * batch) / arm.bound_seconds : 0.0;
    const auto moe_layers = static_cast<double>(a.moe_layers().size());
    Json row = {
        {"format_version", 1},
        {"model", recipe_.model.path},
        {"weights", recipe_.model.weights},
        {"mode", replay ? "replay" : "live"},
        {"trace", recipe_.replay.trace},
        {"fold", fold_.empty() ? Json() : Json(fold_)},
        {"trace_steps", replay ? Json(replay->steps_LSBK.size(1)) : Json()},
        {"dtype", recipe_.model.dtype},
        {"expert_format", stored_format_name(dtype_from_recipe(recipe_.model.dtype), format_)},
        {"expert_bytes", offloaded_->store.layout().bytes},
        {"expert_error", expert_error_},
        {"expert_store", expert_store_json(offloaded_->store)},
        {"slots", arm.slots},
        {"policy", arm.policy},
        {"start", arm.policy.empty() ? "" : recipe_.bench.start},
        {"preload", arm.policy.empty() || preload_.empty() ? Json() : preload_json(preload_source(recipe_.preload))},
        {"batch", batch},
        {"prompt_tokens", prompt_tokens},
        {"new_tokens", new_tokens},
        {"fetch", arm.policy.empty() ? "" : fetch_path_name(arm.decoder->fetch_path())},
        {"prefetch", prefetch_json(*arm.decoder)},
        {"graph", arm.decoder->in_graphs()},
        {"kernels", arm.decoder->in_kernels()},
        {"start_early", arm.decoder->in_kernels() && recipe_.bench.start_early},
        {"tokens_per_second", rate},
        {"tokens_per_second_low", *std::min_element(arm.rates.begin(), arm.rates.end())},
        {"tokens_per_second_high", *std::max_element(arm.rates.begin(), arm.rates.end())},
        {"repeats", recipe_.bench.repeats},
        {"ttft_seconds", median(arm.first)},
        {"requests_per_step_and_layer", per_step(static_cast<double>(arm.requests)) / moe_layers},
        {"loads_per_step_and_layer", per_step(static_cast<double>(arm.loads)) / moe_layers},
        {"hit_rate", arm.requests == 0 ? 0.0 : static_cast<double>(arm.hits) / static_cast<double>(arm.requests)},
        {"bytes_per_token", per_step(static_cast<double>(arm.loads)) *
                                static_cast<double>(offloaded_->store.layout().bytes) / static_cast<double>(batch)},
        {"slot_bytes", arm.decoder->slots().slot_bytes()},
        {"bound_tokens_per_second", bound > 0 ? Json(bound) : Json()},
        {"share_of_bound", bound > 0 ? Json(rate / bound) : Json()},
        {"rates_before", rates_json(before_)},
        {"device", device_name(device_)},
        {"machine", machine_info()},
        {"program", {{"version", program_version()}, {"commit", program_commit()}}}};
    return row;
  }

  const LoadedRecipe<BenchRecipe>* loaded_;
  const BenchRecipe& recipe_;
  torch::Device device_;
  bool quiet_;
  std::optional<RoutingTrace> trace_;
  std::string fold_;
  std::vector<std::vector<std::uint16_t>> preload_;  // per MoE layer; empty unless arms start with it
  ExpertFormat format_ = ExpertFormat::kBfloat16;
  std::optional<OffloadedModel> offloaded_;
  Json expert_error_;
  ProbedRates before_;
};

}  // namespace

std::vector<Json> run_bench(const LoadedRecipe<BenchRecipe>& loaded, bool quiet,
                            const std::function<void(const Json& row)>& on_row) {
  Bench bench(loaded, quiet);
  std::optional<JsonLinesWriter> writer;
  if (!loaded.recipe.output.empty()) {
    const std::filesystem::path output = loaded.recipe.output;
    if (output.has_parent_path()) {
      std::error_code said_by_the_writer;
      std::filesystem::create_directories(output.parent_path(), said_by_the_writer);
    }
    with_place(loaded.source, "output", [&] { writer.emplace(output); });
  }
  std::vector<Json> rows;
  bench.run([&](const std::vector<Json>& measured) {
    if (writer) {
      for (const Json& row : measured) {
        writer->write(row);
      }
    }
    if (on_row) {
      std::for_each(measured.begin(), measured.end(), on_row);
    }
    rows.insert(rows.end(), measured.begin(), measured.end());
  });
  return rows;
}

std::string bench_table(const std::vector<Json>& rows) {
  std::string text =
      fmt::format("{:>15} {:>10} {:>7} {:>8} {:>9} {:>5} {:>6} {:>5} {:>9} {:>17} {:>9} {:>8} {:>7} {:>11} {:>7}\n",
                  "experts", "slots", "policy", "fetch", "prefetch", "batch", "prompt", "new", "tokens/s",
                  "(low - high)", "first", "loads/l", "hits", "bytes/token", "bound");
  for (const Json& row : rows) {
    text += fmt::format(
        "{:>15} {:>10} {:>7} {:>8} {:>9} {:>5} {:>6} {:>5} {:>9.1f} {:>17} {:>9} {:>8.3f} {:>6.1f}% {:>11} {:>7}\n",
        row["expert_format"].get<std::string>(), row["slots"].get<std::string>(), row["policy"].get<std::string>(),
        row["fetch"].get<std::string>(), row["prefetch"].is_null() ? "" : row["prefetch"]["kind"].get<std::string>(),
        row["batch"].get<std::int64_t>(), row["prompt_tokens"].get<std::int64_t>(),
        row["new_tokens"].get<std::int64_t>(), row["tokens_per_second"].get<double>(),
        fmt::format("({:.1f} - {:.1f})", row["tokens_per_second_low"].get<double>(),
                    row["tokens_per_second_high"].get<double>()),
        fmt::format("{:.3f} s", row["ttft_seconds"].get<double>()), row["loads_per_step_and_layer"].get<double>(),
        100.0 * row["hit_rate"].get<double>(), format_bytes(row["bytes_per_token"].get<double>()),
        row["share_of_bound"].is_null() ? "-" : fmt::format("{:.1f}%", 100.0 * row["share_of_bound"].get<double>()));
  }
  return text;
}

}  // namespace hestia
