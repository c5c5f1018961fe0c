#include "hestia/runtime/decoder.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <stdexcept>
#include <utility>

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "fused_step.hpp"
#include "gpu_memory.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_sample.hpp"
#include "hestia/model/key_value_cache.hpp"
#include "hestia/model/residency_selector.hpp"
#include "prefill_executor.hpp"
#include "slot_selectors.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using Clock = std::chrono::steady_clock;

// Keys that a step looks at are counted in these units: one captured graph serves as many steps.
constexpr std::int64_t kVisibleKeys = 256;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

struct Decoder::Impl {
  MoeModel model{nullptr};
  ExpertStore store;
  DecoderOptions options;
  torch::Device device;
  Architecture architecture;
  std::int64_t moe_layers;

  std::shared_ptr<Selector> top_k_selector = std::make_shared<TopKSelector>();
  std::shared_ptr<Selector> step_selector;
  std::shared_ptr<SlotExecutor> slots;
  std::shared_ptr<PrefillExecutor> prefill;
  std::unique_ptr<FusedStep> fused;  // null: steps are the model's own
  std::optional<DecodeReplay> replayed;
  std::vector<Tensor> scope_weights;  // of the rule's scope, float64 [E] of each MoE layer; none: it has none
  Tensor inside_LB;                   // whether the prompt is text of the scope, and
  Tensor strength_LB;                 // times which the rule's bonus counts then

  KeyValueCache cache;
  Rotations rotations;
  // What a step reads and writes, at fixed places.
  Tensor tokens_B1, position_1, step_1, next_B, chosen_BS, logits_BV, seeds_B, sample_workspace;
  Tensor selected_LSBK, weights_LSBK, router_logits_LSBE;
  std::vector<Tensor> prompt_selected, prompt_weights;  // [B, S, K] of each MoE layer, on the CPU
  std::vector<Tensor> prompt_logits;                    // [B, S, E]

  std::map<std::int64_t, std::unique_ptr<at::cuda::CUDAGraph>> graphs;  // by visible keys; null: run once so far
  std::optional<c10::cuda::CUDAStream> stream;
  bool stepped = false;                     // every kernel of a step has been launched before
  std::array<at::cuda::CUDAEvent, 2> ends;  // of the last steps
  std::int64_t prompt_length = 0;
  DecodeTimes times;

  Impl(OffloadedModel offloaded, DecoderOptions wanted)
      : model(offloaded.model),
        store(std::move(offloaded.store)),
        options(std::move(wanted)),
        device(model->device()),
        architecture(model->architecture()),
        moe_layers(static_cast<std::int64_t>(architecture.moe_layers().size())),
        cache(std::max<std::int64_t>(options.capacity, 1)) {
    if (options.rows < 1 || options.capacity < 2) {
      throw std::invalid_argument(
          fmt::format("decoder: needs at least one row and room for two tokens, got {} rows of {}", options.rows,
                      options.capacity));
    }
    if (model->adapter_settings()) {
      throw std::invalid_argument("decoder: adapters must be merged into the store first");
    }
    check_start();
    check_memory();
    slots =
        std::make_shared<SlotExecutor>(architecture, store, device, options.rows, architecture.top_k, options.cache);
    prefill = std::make_shared<PrefillExecutor>(architecture, store, device, slots);
    strength_LB = torch::ones({moe_layers, options.rows}, torch::TensorOptions().dtype(torch::kFloat32).device(device));
    inside_LB = strength_LB.gt(0.0F);
    take_scope();
    choose_selector();
    rotations = model->rotations(options.capacity);
    if (device.is_cuda() && options.kernels) {
      const std::string refusal = fused_step_refusal(model, *slots, options.rows);
      if (refusal.empty()) {
        fused = std::make_unique<FusedStep>(model, cache, slots, rotations, options.rows);
        fused->route_by(options.residency, strength_LB);
        fused->start_early(options.start_early);
      } else {
        log_warning(
            fmt::format("decode kernels do not take this model: {}; steps run slower, through LibTorch", refusal));
      }
    }
    const auto integers = torch::TensorOptions().dtype(torch::kInt64).device(device);
    const auto floats = integers.dtype(torch::kFloat32);
    tokens_B1 = torch::zeros({options.rows, 1}, integers);
    position_1 = torch::zeros({1}, integers);
    step_1 = torch::zeros({1}, integers);
    chosen_BS = torch::zeros({options.rows, options.capacity}, integers);
    logits_BV = torch::zeros({options.rows, architecture.vocab_size}, floats);
    next_B = torch::zeros({options.rows}, integers);
    // Each row draws from a stream of its own.
    Tensor seeds = torch::zeros({options.rows}, torch::kInt64);
    SplitMix64 random(options.sampling.seed);
    for (std::int64_t row = 0; row < options.rows; ++row) {
      seeds[row] = static_cast<std::int64_t>(random.next());
    }
    seeds_B = seeds.to(device);
    if (device.is_cuda()) {
      const DecodeSampleShape shape{.num_tokens = options.rows, .vocabulary = architecture.vocab_size};
      sample_workspace =
          torch::zeros({static_cast<std::int64_t>(decode_sample_workspace(shape)) + 8}, integers.dtype(torch::kUInt8));
    }
    if (options.record) {
      const std::vector<std::int64_t> shape = {moe_layers, options.capacity, options.rows, architecture.top_k};
      selected_LSBK = torch::zeros(shape, integers);
      weights_LSBK = torch::zeros(shape, floats);
    }
    if (options.record_logits) {
      router_logits_LSBE = torch::zeros({moe_layers, options.capacity, options.rows, architecture.num_experts}, floats);
    }
    if (device.is_cuda()) {
      // A capture needs a stream of its own.
      stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
    }
    if (options.cache && options.cache->fetch == FetchPath::kCopies && !copies() &&
        slots->fetch_path() != FetchPath::kStaged) {
      log_warning(
          "the copy engine is not told what to fetch: that takes the decode kernels and, but for one row whose experts "
          "fit the slots, CUDA graphs; kernels fetch the misses, in waves");
    }
    if (options.cache && options.cache->prefetch != PrefetchKind::kOff && !prefetches()) {
      log_warning(
          fmt::format("--prefetch {}: takes a GPU with the decode kernels, one row, slots of each layer's own for all "
                      "experts of a token, not static ones, and --fetch auto or copies; nothing is prefetched",
                      prefetch_name(options.cache->prefetch)));
    }
  }

  // Before anything is taken, so that one message says all of it.
  void check_memory() const {
    if (!device.is_cuda()) {
      return;
    }
    const c10::cuda::CUDAGuard guard(device);
    std::size_t free = 0;
    std::size_t total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
    constexpr std::size_t kAll = 0;  // StatType::AGGREGATE
    const std::int64_t kept = stats.reserved_bytes[kAll].current - stats.allocated_bytes[kAll].current;
    const std::string refusal =
        gpu_memory_refusal(decoder_memory(architecture, store, options.rows, options.capacity, options.cache),
                           static_cast<std::int64_t>(free) + kept);
    if (!refusal.empty()) {
      throw RunError("decoder: " + refusal);
    }
  }

  void check_start() const {
    const bool preloads = options.start == CacheStart::kPreload;
    const int lists = (options.preload.empty() ? 0 : 1) + (options.preload_of_prompt ? 1 : 0);
    if (preloads != (lists == 1)) {
      throw UsageError(preloads ? "--start preload: needs a list of experts to load, got none; give --preload FILE"
                                : "--preload: only serves --start preload");
    }
    if (!options.preload.empty()) {
      check_preload(options.preload);
    }
  }

  void check_preload(const std::vector<std::vector<std::uint16_t>>& preload) const {
    if (static_cast<std::int64_t>(preload.size()) != moe_layers) {
      throw UsageError(
          fmt::format("--preload: must list experts of the model's {} MoE layers, got {}", moe_layers, preload.size()));
    }
    for (const auto& layer : preload) {
      for (const std::uint16_t expert : layer) {
        if (expert >= architecture.num_experts) {
          throw UsageError(
              fmt::format("--preload: an expert must be below {}, got {}", architecture.num_experts, expert));
        }
      }
    }
  }

  // What each layer of the prompt was routed to, [S, B, K]: a replayed trace's where that has it.
  [[nodiscard]] std::vector<Tensor> routing_of_prompt() const {
    if (replayed && !replayed->prompt_SBK.empty()) {
      return replayed->prompt_SBK;
    }
    std::vector<Tensor> selected;
    for (const Tensor& rows : prompt_selected) {
      selected.push_back(rows.transpose(0, 1));
    }
    return selected;
  }

  // The experts to begin with, best first; none unless they are pre-loaded.
  [[nodiscard]] std::vector<std::vector<std::uint16_t>> preload() const {
    if (!options.preload_of_prompt) {
      return options.preload;
    }
    std::vector<Tensor> counts;
    for (const Tensor& selected : routing_of_prompt()) {
      counts.push_back(at::bincount(selected.reshape(-1), {}, architecture.num_experts));
    }
    std::vector<std::vector<std::uint16_t>> chosen = options.preload_of_prompt(torch::stack(counts));
    check_preload(chosen);
    return chosen;
  }

  void take_scope() {
    if (!options.residency || options.residency->scope.everywhere()) {
      return;
    }
    const ResidencyScope& scope = options.residency->scope;
    const auto fits = [this](const std::vector<float>& weights) {
      return static_cast<std::int64_t>(weights.size()) == architecture.num_experts;
    };
    if (static_cast<std::int64_t>(scope.weights.size()) != moe_layers || scope.offsets.size() != scope.weights.size() ||
        !std::all_of(scope.weights.begin(), scope.weights.end(), fits)) {
      throw std::invalid_argument(
          fmt::format("decoder: the residency rule's scope must have an offset and {} weights "
                      "for each of {} MoE layers",
                      architecture.num_experts, moe_layers));
    }
    for (const std::vector<float>& weights : scope.weights) {
      scope_weights.push_back(torch::tensor(weights, torch::kFloat64).to(device));
    }
  }

  // Whether the rule is for this prompt, in each layer and row: what its last tokens say.
  void judge_prompt(const std::vector<RoutingRecord>& routing, std::int64_t length) {
    for (std::size_t layer = 0; layer < scope_weights.size(); ++layer) {
      const ResidencyScope& scope = options.residency->scope;
      const std::int64_t seen = std::min(scope.window, length);
      const Tensor evidence = scope_evidence(routing[layer].logits_TE, scope_weights[layer], scope.offsets[layer]);
      const Tensor inside_B = evidence.view({options.rows, length}).narrow(1, length - seen, seen).sum(1).ge(0);
      inside_LB[static_cast<std::int64_t>(layer)].copy_(inside_B);
      strength_LB[static_cast<std::int64_t>(layer)].copy_(torch::where(inside_B, 1.0, scope.elsewhere));
    }
  }

  void choose_selector() {
    if (replayed) {
      step_selector = std::make_shared<ReplaySelector>(replayed->steps_LSBK, step_1);
    } else if (options.residency && options.residency->lambda > 0) {
      step_selector = std::make_shared<SlotResidencySelector>(*options.residency, slots, strength_LB);
    } else {
      step_selector = top_k_selector;
    }
  }

  // The token that follows logits_BV into next_B.
  void choose() {
    const DecodeSampleShape shape{.num_tokens = options.rows,
                                  .vocabulary = architecture.vocab_size,
                                  .temperature = static_cast<float>(options.sampling.temperature),
                                  .top_p = static_cast<float>(options.sampling.top_p),
                                  .one_step = true};
    const DecodeSampleInputs in{logits_BV.const_data_ptr<float>(),
                                reinterpret_cast<const std::uint64_t*>(seeds_B.const_data_ptr<std::int64_t>()),
                                step_1.const_data_ptr<std::int64_t>()};
    auto* next = next_B.mutable_data_ptr<std::int64_t>();
    if (device.is_cuda()) {
      decode_sample_cuda(shape, in, next, sample_workspace.mutable_data_ptr(),
                         c10::cuda::getCurrentCUDAStream(device.index()).stream());
    } else {
      decode_sample_cpu(shape, in, next);
    }
    const Tensor next_B1 = next_B.unsqueeze(1);
    chosen_BS.index_copy_(1, step_1, next_B1);
    tokens_B1.copy_(next_B1);
  }

  void take_logits(const Tensor& hidden_BSD) {
    const Tensor last = hidden_BSD.narrow(1, hidden_BSD.size(1) - 1, 1);
    logits_BV.copy_(model->head(last).squeeze(1));
  }

  void step(std::int64_t visible) {
    if (fused) {
      fused->run(tokens_B1, position_1, step_1, logits_BV);
      if (options.record) {
        selected_LSBK.index_copy_(1, step_1, fused->selected().to(torch::kInt64).unsqueeze(1));
        weights_LSBK.index_copy_(1, step_1, fused->weights().unsqueeze(1));
      }
      if (options.record_logits) {
        router_logits_LSBE.index_copy_(1, step_1, fused->router_logits().unsqueeze(1));
      }
    } else {
      step_of_model(visible);
    }
    step_1.add_(1);
    position_1.add_(1);
    choose();
  }

  void step_of_model(std::int64_t visible) {
    const ModelOutput output = model->step(tokens_B1, {position_1, rotations, visible}, cache);
    take_logits(output.hidden_BSD);
    for (std::int64_t layer = 0; layer < moe_layers; ++layer) {
      const RoutingRecord& record = output.routing[static_cast<std::size_t>(layer)];
      if (options.record) {
        selected_LSBK[layer].index_copy_(0, step_1, record.selected_TK.unsqueeze(0));
        weights_LSBK[layer].index_copy_(0, step_1, record.weights_TK.to(torch::kFloat32).unsqueeze(0));
      }
      if (options.record_logits) {
        router_logits_LSBE[layer].index_copy_(0, step_1, record.logits_TE.to(torch::kFloat32).unsqueeze(0));
      }
    }
  }

  void step_in_graph(std::int64_t visible) {
    const auto found = graphs.find(visible);
    if (found == graphs.end()) {
      // What is done once (handles, workspaces, loading of kernels) must not be captured.
      step(visible);
      graphs.emplace(visible, nullptr);
      return;
    }
    if (found->second == nullptr) {
      auto graph = std::make_unique<at::cuda::CUDAGraph>();
      graph->capture_begin();
      try {
        step(visible);
      } catch (...) {
        try {
          graph->capture_end();
        } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): what went wrong first counts
        }
        throw;
      }
      graph->capture_end();
      found->second = std::move(graph);
    }
    found->second->replay();
  }

  // The same in every arm that is compared: results may depend on the number of keys looked at. The kernels see for
  // themselves.
  [[nodiscard]] std::int64_t visible_keys() const {
    if (fused) {
      return options.capacity;
    }
    const std::int64_t wanted = (cache.length() + 1 + kVisibleKeys - 1) / kVisibleKeys * kVisibleKeys;
    return std::min(wanted, options.capacity);
  }

  // Steps whose misses the host reads cannot be captured.
  [[nodiscard]] bool in_graphs() const { return stream && options.graph && slots->fetch_path() != FetchPath::kStaged; }

  // Whether the copy engine is told what to fetch. Waves of several rows are many launches, too many to enqueue outside
  // graphs while kernels wait for the host.
  [[nodiscard]] bool copies() const {
    return fused && slots->fetch_path() == FetchPath::kCopies && (slots->fetches_in_one() || in_graphs());
  }

  [[nodiscard]] bool prefetches() const { return fused && slots->prefetch() != PrefetchKind::kOff; }

  void synchronize() const {
    if (stream) {
      stream->synchronize();
    }
  }

  void run_steps(std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t visible = visible_keys();
      at::cuda::CUDAEvent& end = ends[static_cast<std::size_t>(i) % ends.size()];
      if (copies()) {
        if (i >= static_cast<std::int64_t>(ends.size())) {
          end.synchronize();
        }
        if (stepped) {
          slots->wake_copies();
        }
      }
      if (in_graphs()) {
        step_in_graph(visible);
      } else {
        step(visible);
      }
      stepped = true;
      if (copies()) {
        end.record();
      }
      cache.advance(1);
    }
  }

  // The host thread of the copies sleeps again, once no kernel waits for it. What went wrong first is what is told.
  void rest_after_failure() const noexcept {
    try {
      synchronize();
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    }
    try {
      slots->rest_copies();
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    }
  }
};

Decoder::Decoder(OffloadedModel offloaded, DecoderOptions options)
    : impl_(std::make_unique<Impl>(std::move(offloaded), std::move(options))) {}

Decoder::~Decoder() {
  if (impl_->stream) {
    impl_->stream->synchronize();
  }
}

void Decoder::replay(std::optional<DecodeReplay> replay) {
  Impl& impl = *impl_;
  const Architecture& a = impl.architecture;
  if (replay) {
    const Tensor& steps = replay->steps_LSBK;
    if (!steps.defined() || steps.dim() != 4 || steps.size(1) < 1 || steps.scalar_type() != torch::kInt64 ||
        steps.size(0) != impl.moe_layers || steps.size(2) != impl.options.rows || steps.size(3) != a.top_k ||
        (!replay->prompt_SBK.empty() && static_cast<std::int64_t>(replay->prompt_SBK.size()) != impl.moe_layers)) {
      throw std::invalid_argument(fmt::format("replay: must be int64 [{} MoE layers, steps, {} rows, {} experts]",
                                              impl.moe_layers, impl.options.rows, a.top_k));
    }
    if (steps.numel() > 0 &&
        (steps.min().item<std::int64_t>() < 0 || steps.max().item<std::int64_t>() >= a.num_experts)) {
      throw std::invalid_argument(fmt::format("replay: an expert must be between 0 and {}", a.num_experts - 1));
    }
    replay->steps_LSBK = steps.to(impl.device).contiguous();
  }
  impl.replayed = std::move(replay);
  impl.graphs.clear();   // they hold what was served before
  impl.stepped = false;  // and the next step is not in one
  impl.choose_selector();
  if (impl.fused) {
    impl.fused->replay(impl.replayed ? std::optional<Tensor>(impl.replayed->steps_LSBK) : std::nullopt);
  }
}

void Decoder::begin(const torch::Tensor& prompt_BS, std::int64_t sequence) {
  const torch::NoGradGuard no_grad;
  Impl& impl = *impl_;
  if (prompt_BS.dim() != 2 || prompt_BS.size(0) != impl.options.rows || prompt_BS.size(1) < 1 ||
      prompt_BS.size(1) >= impl.options.capacity) {
    throw std::invalid_argument(fmt::format("decoder: prompts must be [{}, S] with S from 1 to {}, got [{}]",
                                            impl.options.rows, impl.options.capacity - 1,
                                            fmt::join(prompt_BS.sizes(), ", ")));
  }
  const c10::cuda::OptionalCUDAStreamGuard on(impl.stream ? std::optional<c10::Stream>(impl.stream->unwrap())
                                                          : std::nullopt);
  if (impl.device.is_cuda()) {
    c10::cuda::device_synchronize();
  }
  const auto started = Clock::now();
  impl.times = {};
  const std::int64_t length = prompt_BS.size(1);
  impl.prompt_length = length;
  impl.cache.clear();
  TokenBatch batch;
  batch.tokens_BS = prompt_BS.to(impl.device);
  batch.positions_BS = torch::arange(length, batch.tokens_BS.options()).unsqueeze(0).expand_as(batch.tokens_BS);
  batch.sequence_ids_BS = torch::zeros_like(batch.tokens_BS);
  impl.model->set_selector(impl.top_k_selector);
  impl.model->set_executor(impl.prefill);
  {
    const ModelOutput output = impl.model->forward(batch, impl.cache);
    impl.take_logits(output.hidden_BSD);
    impl.judge_prompt(output.routing, length);
    const bool needed =
        impl.options.record || impl.options.start == CacheStart::kPrefill || impl.options.preload_of_prompt;
    impl.prompt_selected.clear();
    impl.prompt_weights.clear();
    impl.prompt_logits.clear();
    for (const RoutingRecord& record : output.routing) {
      if (needed) {
        const std::vector<std::int64_t> shape = {impl.options.rows, length, impl.architecture.top_k};
        impl.prompt_selected.push_back(record.selected_TK.view(shape).cpu());
        impl.prompt_weights.push_back(record.weights_TK.to(torch::kFloat32).view(shape).cpu());
      }
      if (impl.options.record_logits) {
        impl.prompt_logits.push_back(record.logits_TE.to(torch::kFloat32)
                                         .view({impl.options.rows, length, impl.architecture.num_experts})
                                         .cpu());
      }
    }
  }
  impl.prefill->release();
  impl.slots->reset(sequence, impl.preload());
  if (impl.options.start == CacheStart::kPrefill) {
    impl.slots->touch(impl.routing_of_prompt());
  }
  impl.step_1.zero_();
  impl.position_1.fill_(length);
  impl.choose();
  impl.synchronize();
  impl.times.prompt_seconds = seconds_since(started);
  impl.model->set_selector(impl.step_selector);
  impl.model->set_executor(impl.slots);
}

void Decoder::decode(std::int64_t count) {
  const torch::NoGradGuard no_grad;
  Impl& impl = *impl_;
  const std::int64_t length = impl.cache.length();
  if (length < 1 || count < 0 || count > impl.options.capacity - length) {
    throw std::invalid_argument(
        fmt::format("decoder: {} steps do not fit behind {} tokens in {}", count, length, impl.options.capacity));
  }
  if (impl.replayed && !impl.replayed->again && impl.times.steps + count > impl.replayed->steps_LSBK.size(1)) {
    throw std::invalid_argument(
        fmt::format("replay: has {} steps, asked for {}", impl.replayed->steps_LSBK.size(1), impl.times.steps + count));
  }
  const RopeSettings& rope = impl.architecture.rope;
  if (rope.type == "longrope" && length <= rope.original_positions && length + count > rope.original_positions) {
    throw RunError(fmt::format(
        "decoder: the sequence grows over {} tokens, where its rope factors change, got {} and {} more; generate fewer "
        "tokens, or give all of them as the prompt",
        rope.original_positions, length, count));
  }
  const c10::cuda::OptionalCUDAStreamGuard on(impl.stream ? std::optional<c10::Stream>(impl.stream->unwrap())
                                                          : std::nullopt);
  const auto started = Clock::now();
  try {
    impl.run_steps(count);
  } catch (...) {
    impl.rest_after_failure();
    throw;
  }
  impl.synchronize();
  impl.slots->rest_copies();
  impl.times.step_seconds += seconds_since(started);
  impl.times.steps += count;
}

torch::Tensor Decoder::tokens() const {
  impl_->synchronize();
  return impl_->chosen_BS.narrow(1, 0, impl_->times.steps + 1).cpu();
}

double Decoder::scope_share() const {
  impl_->synchronize();
  return impl_->inside_LB.to(torch::kFloat64).mean().item<double>();
}

const torch::Tensor& Decoder::logits() const noexcept {
  return impl_->logits_BV;
}

std::vector<SlotCacheCounts> Decoder::counts() const {
  impl_->synchronize();
  return impl_->slots->counts();
}

const DecodeTimes& Decoder::times() const noexcept {
  return impl_->times;
}

SequenceRouting Decoder::recorded(std::int64_t row) const {
  const Impl& impl = *impl_;
  if (!impl.options.record) {
    throw std::logic_error("decoder: routing was not recorded");
  }
  impl.synchronize();
  SequenceRouting routing;
  routing.num_prompt_tokens = impl.prompt_length;
  routing.num_tokens = impl.prompt_length + impl.times.steps;
  routing.num_layers = impl.moe_layers;
  routing.num_experts = impl.architecture.num_experts;
  routing.top_k = impl.architecture.top_k;
  for (std::int64_t layer = 0; layer < impl.moe_layers; ++layer) {
    const auto index = static_cast<std::size_t>(layer);
    const auto of_steps = [&](const Tensor& all) {
      return all[layer].narrow(0, 0, impl.times.steps).select(1, row).cpu();
    };
    const Tensor selected = torch::cat({impl.prompt_selected[index][row], of_steps(impl.selected_LSBK)}).contiguous();
    const Tensor weights = torch::cat({impl.prompt_weights[index][row], of_steps(impl.weights_LSBK)}).contiguous();
    for (std::int64_t i = 0; i < selected.numel(); ++i) {
      routing.selected.push_back(static_cast<std::uint16_t>(selected.const_data_ptr<std::int64_t>()[i]));
      routing.weights.push_back(weights.const_data_ptr<float>()[i]);
    }
  }
  return routing;
}

torch::Tensor Decoder::recorded_logits() const {
  if (!impl_->options.record_logits) {
    throw std::logic_error("decoder: router logits were not recorded");
  }
  impl_->synchronize();
  return impl_->router_logits_LSBE.narrow(1, 0, impl_->times.steps).cpu();
}

torch::Tensor Decoder::recorded_prompt_logits() const {
  if (!impl_->options.record_logits || impl_->prompt_logits.empty()) {
    throw std::logic_error("decoder: router logits of a prompt were not recorded");
  }
  return torch::stack(impl_->prompt_logits).transpose(1, 2).contiguous();
}

const SlotExecutor& Decoder::slots() const noexcept {
  return *impl_->slots;
}

FetchPath Decoder::fetch_path() const noexcept {
  const FetchPath path = impl_->slots->fetch_path();
  const bool serves = path == FetchPath::kCopies ? impl_->copies() : impl_->fused != nullptr;
  return serves || path == FetchPath::kStaged ? path : FetchPath::kWaves;
}

PrefetchKind Decoder::prefetch() const noexcept {
  return impl_->prefetches() ? impl_->slots->prefetch() : PrefetchKind::kOff;
}

PrefetchTotals Decoder::prefetch_totals() const {
  impl_->synchronize();
  return impl_->slots->prefetch_totals();
}

bool Decoder::in_graphs() const noexcept {
  return impl_->in_graphs();
}

bool Decoder::in_kernels() const noexcept {
  return impl_->fused != nullptr;
}

void merge_adapters(OffloadedModel& offloaded) {
  const torch::NoGradGuard no_grad;
  MoeModel& model = offloaded.model;
  const std::optional<AdapterSettings> settings = model->adapter_settings();
  if (!settings) {
    return;
  }
  if (offloaded.store.format() != ExpertFormat::kBfloat16) {
    throw std::invalid_argument("decoder: adapters must be merged before experts are packed");
  }
  const double scale = settings->alpha / static_cast<double>(settings->rank);
  const Architecture& a = model->architecture();
  const std::vector<Tensor> adapters = model->adapters();
  for (std::size_t layer = 0; layer < a.moe_layers().size(); ++layer) {
    const ExpertWeights experts = experts_in_blobs(
        a, offloaded.store.layout(),
        offloaded.store.blobs().narrow(0, static_cast<std::int64_t>(layer) * a.num_experts, a.num_experts));
    const auto add = [&](const Tensor& weights, const Tensor& first, const Tensor& second) {
      const Tensor update = second.cpu().to(torch::kFloat32).bmm(first.cpu().to(torch::kFloat32)) * scale;
      weights.copy_(weights.to(torch::kFloat32) + update);
    };
    add(experts.up_EFD, adapters[layer * 4], adapters[layer * 4 + 1]);
    add(experts.down_EDF, adapters[layer * 4 + 2], adapters[layer * 4 + 3]);
  }
  model->remove_adapters();
}

}  // namespace hestia
