#include "hestia/model/moe_model.hpp"

#include <cmath>
#include <optional>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/expert_blobs.hpp"
#include "layer.hpp"
#include "norm.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using P = TensorPart;

void check_batch(const TokenBatch& batch) {
  for (const Tensor& tensor : {batch.tokens_BS, batch.positions_BS, batch.sequence_ids_BS}) {
    if (!tensor.defined() || tensor.dim() != 2 || tensor.scalar_type() != torch::kInt64 ||
        tensor.sizes() != batch.tokens_BS.sizes()) {
      throw std::invalid_argument(
          "model: tokens, positions and sequence ids of a batch must be int64 [B, S] of one shape");
    }
  }
}

}  // namespace

struct MoeModelImpl::Impl {
  Architecture architecture;
  torch::Dtype dtype = torch::kFloat32;
  torch::Device device = torch::kCPU;
  LayerWeights outside;  ///< Embedding, final norm, head (none when tied to the embedding).
  // Shared with the graph of a checkpointed forward, which may outlive the model.
  std::vector<std::shared_ptr<LayerWeights>> layers;
  std::vector<std::shared_ptr<LayerWeights>> moe_layers;  ///< Those of them that hold experts.
  bool adapters_enabled = true;
  std::shared_ptr<Selector> selector = std::make_shared<TopKSelector>();
  std::shared_ptr<Executor> executor = std::make_shared<GroupedExecutor>();
  bool checkpointing = false;
  bool router_gradient_of_all = false;
  std::int64_t reference_top_k = 0;
  std::optional<AdapterSettings> adapter_settings;

  // The parameter of a tensor of the checkpoint; an expert's is the stacked one.
  Tensor& slot(const TensorSpec& spec) {
    return spec.layer < 0 ? outside[spec.part] : (*layers.at(static_cast<std::size_t>(spec.layer)))[spec.part];
  }

  // The model as it is now.
  [[nodiscard]] LayerRun present() const {
    LayerRun run;
    run.architecture = architecture;
    run.selector = selector;
    run.executor = executor;
    run.router_gradient_of_all = router_gradient_of_all;
    return run;
  }

  // All of the forward between embedding and head. `run` holds what is the same in every layer.
  ModelOutput forward(const TokenBatch& batch, LayerRun run, bool reference, KeyValueCache* cache = nullptr) {
    check_batch(batch);
    ModelOutput output = forward(batch, std::move(run), reference,
                                 cache == nullptr ? attention_inputs(architecture, batch, dtype)
                                                  : attention_inputs(architecture, batch, dtype, *cache));
    if (cache != nullptr) {
      cache->advance(batch.tokens_BS.size(1));
    }
    return output;
  }

  ModelOutput forward(const TokenBatch& batch, LayerRun run, bool reference, AttentionInputs attention) {
    run.shared = std::make_shared<SharedInputs>(SharedInputs{std::move(attention), batch});
    ModelOutput output;
    Tensor hidden = at::embedding(std::as_const(outside)[P::kTokenEmbedding], batch.tokens_BS);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      run.weights = layers[i];
      run.layer = static_cast<std::int64_t>(i);
      run.moe_layer = static_cast<std::int64_t>(output.routing.size());
      run.router_ED = reference ? run.weights->reference_router_ED : (*run.weights)[P::kRouter];
      run.experts = run.weights->experts(adapters_enabled && !reference);
      run.experts.swiglu_limit = architecture.swiglu_limit;
      run.experts.swiglu_alpha = architecture.swiglu_alpha;
      LayerResult result =
          checkpointing && at::GradMode::is_enabled() ? run_layer_checkpointed(run, hidden) : run_layer(run, hidden);
      hidden = result.hidden_BSD;
      if (result.routing.logits_TE.defined()) {
        output.routing.push_back(std::move(result.routing));
      }
    }
    const LayerWeights& last = outside;
    output.hidden_BSD = normalise(architecture, hidden, last[P::kFinalNorm], last[P::kFinalNormBias]);
    return output;
  }
};

MoeModelImpl::MoeModelImpl(Architecture architecture, torch::Dtype dtype, torch::Device device,
                           const torch::Tensor& expert_blobs_NB)
    : impl_(std::make_unique<Impl>()) {
  impl_->architecture = std::move(architecture);
  impl_->dtype = dtype;
  impl_->device = device;
  for (std::int64_t layer = 0; layer < impl_->architecture.num_layers; ++layer) {
    impl_->layers.push_back(std::make_shared<LayerWeights>());
    if (impl_->architecture.is_moe_layer(layer)) {
      impl_->moe_layers.push_back(impl_->layers.back());
    }
  }
  std::vector<Tensor> blobs_by_layer;
  std::optional<ExpertBlobLayout> blob_layout;
  if (expert_blobs_NB.defined()) {
    blob_layout = expert_blob_layout(impl_->architecture, dtype);
    const std::int64_t num_experts = impl_->architecture.num_experts;
    const auto num_layers = static_cast<std::int64_t>(impl_->moe_layers.size());
    if (expert_blobs_NB.dim() != 2 || expert_blobs_NB.size(0) != num_layers * num_experts) {
      throw std::invalid_argument(fmt::format("model: {} expert blobs are needed, one for each MoE layer and expert",
                                              num_layers * num_experts));
    }
    blobs_by_layer.resize(impl_->layers.size());
    for (std::int64_t i = 0; i < num_layers; ++i) {
      blobs_by_layer.at(static_cast<std::size_t>(impl_->architecture.moe_layers().at(static_cast<std::size_t>(i)))) =
          expert_blobs_NB.narrow(0, i * num_experts, num_experts);
    }
  }
  const auto in_blobs = [&](const TensorSpec& spec) {
    for (std::size_t i = 0; i < blob_layout->parts.size(); ++i) {
      if (blob_layout->parts[i].part == spec.part) {
        return blob_part(*blob_layout, i, blobs_by_layer.at(static_cast<std::size_t>(spec.layer)));
      }
    }
    throw std::logic_error("model: an expert's tensor is not in its blob");
  };
  for (const TensorSpec& spec : tensor_specs(impl_->architecture)) {
    if (spec.expert > 0) {
      continue;  // its slice is allocated with expert 0
    }
    std::vector<std::int64_t> shape = spec.shape;
    std::string name = spec.name;
    if (spec.expert == 0) {
      shape.insert(shape.begin(), impl_->architecture.num_experts);
      name.replace(name.find("experts.0."), 10, "experts.");
    }
    if (spec.transposed) {
      std::swap(shape[1], shape[2]);
    }
    // LibTorch reserves the dot for submodules.
    for (char& letter : name) {
      letter = letter == '.' ? '/' : letter;
    }
    // Routers stay at least float32: their gradients are small and bf16 would swallow the steps.
    const bool wide = spec.role == TensorRole::kRouter && dtype != torch::kFloat64;
    const Tensor storage =
        blob_layout && spec.role == TensorRole::kExpert
            ? in_blobs(spec)
            : torch::empty(shape, torch::TensorOptions().dtype(wide ? torch::kFloat32 : dtype).device(device));
    impl_->slot(spec) = register_parameter(name, storage);
  }
}

MoeModelImpl::~MoeModelImpl() = default;

ModelOutput MoeModelImpl::forward(const TokenBatch& batch) {
  return impl_->forward(batch, impl_->present(), /*reference=*/false);
}

ModelOutput MoeModelImpl::forward(const TokenBatch& batch, KeyValueCache& cache) {
  const torch::NoGradGuard no_grad;
  return impl_->forward(batch, impl_->present(), /*reference=*/false, &cache);
}

ModelOutput MoeModelImpl::step(const torch::Tensor& tokens_B1, const StepPlace& place, KeyValueCache& cache) {
  const torch::NoGradGuard no_grad;
  TokenBatch batch;
  batch.tokens_BS = tokens_B1;
  batch.positions_BS = place.position_1.view({1, 1}).expand_as(tokens_B1);
  batch.sequence_ids_BS = torch::zeros_like(tokens_B1);
  check_batch(batch);
  return impl_->forward(batch, impl_->present(), /*reference=*/false,
                        attention_inputs(impl_->architecture, place, impl_->dtype, cache));
}

Rotations MoeModelImpl::rotations(std::int64_t capacity) const {
  const torch::NoGradGuard no_grad;
  const Tensor positions_BS =
      torch::arange(capacity, torch::TensorOptions().dtype(torch::kInt64).device(impl_->device)).unsqueeze(1);
  const RotaryTables tables =
      rotations_of(impl_->architecture, positions_BS, torch::zeros_like(positions_BS), impl_->dtype);
  return {tables.cosine, tables.sine};
}

ModelOutput MoeModelImpl::forward_reference(const TokenBatch& batch) {
  const torch::NoGradGuard no_grad;
  if (impl_->reference_top_k == 0) {
    throw std::logic_error("forward_reference: no reference routers; call keep_reference_routers first");
  }
  LayerRun run;
  run.architecture = impl_->architecture;
  run.architecture.top_k = impl_->reference_top_k;
  // The untouched model serves what its routers like best, whatever the tuned ones are trained under.
  run.selector = std::make_shared<TopKSelector>();
  run.executor = impl_->executor;
  return impl_->forward(batch, std::move(run), /*reference=*/true);
}

torch::Tensor MoeModelImpl::head(const torch::Tensor& hidden) {
  return at::linear(hidden, head_weight(), head_bias());
}

const torch::Tensor& MoeModelImpl::head_bias() const noexcept {
  return std::as_const(impl_->outside)[P::kHeadBias];
}

const torch::Tensor& MoeModelImpl::head_weight() const noexcept {
  const LayerWeights& outside = impl_->outside;
  return outside[P::kHead].defined() ? outside[P::kHead] : outside[P::kTokenEmbedding];
}

void MoeModelImpl::set_selector(std::shared_ptr<Selector> selector) {
  impl_->selector = std::move(selector);
}

const std::shared_ptr<Selector>& MoeModelImpl::selector() const noexcept {
  return impl_->selector;
}

void MoeModelImpl::set_executor(std::shared_ptr<Executor> executor) {
  impl_->executor = std::move(executor);
}

void MoeModelImpl::keep_reference_routers() {
  for (const auto& layer : impl_->moe_layers) {
    layer->reference_router_ED = (*layer)[P::kRouter].detach().clone();
  }
  impl_->reference_top_k = impl_->architecture.top_k;
}

void MoeModelImpl::set_top_k(std::int64_t top_k) {
  if (top_k < 1 || top_k > impl_->architecture.num_experts) {
    throw std::invalid_argument(fmt::format("model: experts per token must be between 1 and {}, got {}",
                                            impl_->architecture.num_experts, top_k));
  }
  impl_->architecture.top_k = top_k;
}

void MoeModelImpl::add_adapters(const AdapterSettings& settings) {
  if (settings.rank < 1 || !std::isfinite(settings.alpha) || settings.alpha <= 0.0) {
    throw std::invalid_argument(
        fmt::format("model: adapters need a rank of at least 1 and a finite positive alpha, got {} and {}",
                    settings.rank, settings.alpha));
  }
  const Architecture& a = impl_->architecture;
  if (a.expert_bias) {
    throw UsageError(fmt::format(
        "adapters: experts of {} models are stored as one tensor with biases and take none; train routers only",
        a.family));
  }
  const auto zeros = [&](std::int64_t rows, std::int64_t columns) {
    return torch::zeros({a.num_experts, rows, columns},
                        torch::TensorOptions().dtype(impl_->dtype).device(impl_->device));
  };
  for (const auto& layer : impl_->moe_layers) {
    layer->adapters = {zeros(settings.rank, a.hidden_size), zeros(a.expert_intermediate_size, settings.rank),
                       zeros(settings.rank, a.expert_intermediate_size), zeros(a.hidden_size, settings.rank),
                       settings.alpha / static_cast<double>(settings.rank)};
  }
  impl_->adapter_settings = settings;
}

void MoeModelImpl::remove_adapters() {
  for (const auto& layer : impl_->moe_layers) {
    layer->adapters = {};
  }
  impl_->adapter_settings.reset();
}

void MoeModelImpl::set_adapters_enabled(bool enabled) {
  impl_->adapters_enabled = enabled;
}

void MoeModelImpl::set_router_gradient_of_all(bool enabled) {
  if (enabled && impl_->architecture.routing == RoutingKind::kSparsemixer) {
    throw std::invalid_argument("router gradient of all experts: not for sparsemixer routing");
  }
  impl_->router_gradient_of_all = enabled;
}

void MoeModelImpl::set_activation_checkpointing(bool enabled) {
  impl_->checkpointing = enabled;
}

const Architecture& MoeModelImpl::architecture() const noexcept {
  return impl_->architecture;
}

torch::Dtype MoeModelImpl::dtype() const noexcept {
  return impl_->dtype;
}

torch::Device MoeModelImpl::device() const noexcept {
  return impl_->device;
}

std::vector<torch::Tensor> MoeModelImpl::routers() {
  std::vector<Tensor> result;
  for (const auto& layer : impl_->moe_layers) {
    result.push_back((*layer)[P::kRouter]);
  }
  return result;
}

std::optional<AdapterSettings> MoeModelImpl::adapter_settings() const noexcept {
  return impl_->adapter_settings;
}

std::vector<torch::Tensor> MoeModelImpl::adapters() {
  std::vector<Tensor> result;
  for (const auto& layer : impl_->moe_layers) {
    const ExpertAdapters& adapters = layer->adapters;
    if (adapters.defined()) {
      result.insert(result.end(), {adapters.up_a_ERD, adapters.up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR});
    }
  }
  return result;
}

std::vector<std::pair<std::string, torch::Tensor>> MoeModelImpl::named_adapters() {
  const torch::NoGradGuard no_grad;
  std::vector<std::pair<std::string, Tensor>> result;
  if (!impl_->adapter_settings) {
    return result;
  }
  for (const TensorSpec& spec : tensor_specs(impl_->architecture)) {
    if (takes_adapters(spec)) {
      const bool up = spec.part == P::kExpertUp;
      const ExpertAdapters& adapters = impl_->layers.at(static_cast<std::size_t>(spec.layer))->adapters;
      result.emplace_back(adapter_name(spec.name, 'A'),
                          (up ? adapters.up_a_ERD : adapters.down_a_ERF).select(0, spec.expert));
      result.emplace_back(adapter_name(spec.name, 'B'),
                          (up ? adapters.up_b_EFR : adapters.down_b_EDR).select(0, spec.expert));
    }
  }
  return result;
}

std::vector<std::pair<std::string, torch::Tensor>> MoeModelImpl::named_tensors() {
  const torch::NoGradGuard no_grad;  // slices must stay writable, which views with a graph are not
  std::vector<std::pair<std::string, Tensor>> result;
  for (const TensorSpec& spec : tensor_specs(impl_->architecture)) {
    const Tensor& parameter = impl_->slot(spec);
    const Tensor whole = spec.transposed ? parameter.transpose(1, 2) : parameter;
    result.emplace_back(spec.name, spec.expert < 0 ? whole : whole.select(0, spec.expert));
  }
  return result;
}

std::vector<torch::Tensor> MoeModelImpl::all_parameters() {
  return parameters(/*recurse=*/false);
}

}  // namespace hestia
