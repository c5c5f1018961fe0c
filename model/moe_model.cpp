#include "hestia/model/moe_model.hpp"

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include <fmt/format.h>
#include <torch/autograd.h>

#include "hestia/model/adapters.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Statistics of a norm are taken in float32 whatever the model's dtype (float64 stays float64).
torch::Dtype statistics_dtype(const Tensor& x) {
  return x.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

/// y = weight * round(x / sqrt(mean(x^2) + eps)), the mean in float32 (Zhang & Sennrich 2019, arXiv 1910.07467; the
/// rounding before the weight is transformers'). One node, and only x and one scalar per row are kept for backward.
class RmsNorm : public Function<RmsNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    const Tensor wide = x.to(statistics_dtype(x));
    const Tensor inverse = (wide * wide).mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
    ctx->save_for_backward({x, weight, inverse});
    return (wide * inverse).to(x.scalar_type()).mul_(weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Tensor& inverse = saved[2];
    const Tensor& dy = gradients[0];
    const Tensor normal = x.to(statistics_dtype(x)) * inverse;
    variable_list result(3);
    if (ctx->needs_input_grad(1)) {
      result[1] = (dy * normal).reshape({-1, x.size(-1)}).sum(0).to(saved[1].scalar_type());
    }
    if (ctx->needs_input_grad(0)) {
      Tensor dnormal = (dy * saved[1]).to(normal.scalar_type());
      const Tensor mean = (dnormal * normal).mean(-1, /*keepdim=*/true);
      result[0] = dnormal.sub_(normal * mean).mul_(inverse).to(x.scalar_type());
    }
    return result;
  }
};

// Rotates halves: (a, b) -> (a cos - b sin, b cos + a sin), elementwise over the two halves of the last dimension.
Tensor rotate(const Tensor& x_BHSd, const Tensor& cosine, const Tensor& sine) {
  const std::int64_t half = x_BHSd.size(3) / 2;
  const Tensor a = x_BHSd.narrow(3, 0, half);
  const Tensor b = x_BHSd.narrow(3, half, half);
  Tensor out = torch::empty(x_BHSd.sizes(), x_BHSd.options());
  Tensor out_a = out.narrow(3, 0, half);
  Tensor out_b = out.narrow(3, half, half);
  at::mul_out(out_a, a, cosine);
  out_a.addcmul_(b, sine, -1);
  at::mul_out(out_b, b, cosine);
  out_b.addcmul_(a, sine);
  return out;
}

/// Rotary position embedding in the half-split layout (Su et al. 2021, arXiv 2104.09864). Backward is the rotation
/// back.
class Rotary : public Function<Rotary> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x_BHSd, const Tensor& cosine, const Tensor& sine) {
    ctx->save_for_backward({cosine, sine});
    return rotate(x_BHSd, cosine, sine);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotate(gradients[0], saved[0], saved[1].neg()), Tensor(), Tensor()};
  }
};

/// What all layers of one forward share.
struct SharedInputs {
  Tensor cosine;  ///< [B, 1, S, head_dim / 2], model dtype
  Tensor sine;
  Tensor mask;  ///< [B, 1, S, S] added to attention scores; undefined: plain causal.
  TokenBatch batch;
};

struct Layer {
  Tensor input_norm, query, query_bias, query_norm, key, key_bias, key_norm, value, value_bias;
  Tensor output, output_bias, post_attention_norm;
  Tensor router_ED;            ///< float32
  Tensor reference_router_ED;  ///< frozen copy, undefined until asked for
  ExpertWeights experts;

  [[nodiscard]] std::vector<Tensor> parameters() const {
    std::vector<Tensor> all;
    for (const Tensor& tensor : {input_norm,
                                 query,
                                 query_bias,
                                 key,
                                 key_bias,
                                 value,
                                 value_bias,
                                 output,
                                 output_bias,
                                 query_norm,
                                 key_norm,
                                 post_attention_norm,
                                 router_ED,
                                 experts.gate_EFD,
                                 experts.up_EFD,
                                 experts.down_EDF,
                                 experts.adapters.up_a_ERD,
                                 experts.adapters.up_b_EFR,
                                 experts.adapters.down_a_ERF,
                                 experts.adapters.down_b_EDR}) {
      if (tensor.defined()) {
        all.push_back(tensor);
      }
    }
    return all;
  }
};

/// What one run of a layer gives.
struct LayerResult {
  Tensor hidden_BSD;
  Tensor logits_TE;
  Tensor selected_TK;
  Tensor weights_TK;
  Tensor probabilities_TE;
  Tensor reference_logits_TE;
};

/// Runs one layer on a hidden state; with a selection given, that one is served instead of asking the selector again.
using LayerRun = std::function<LayerResult(const Tensor& hidden_BSD, const std::optional<Tensor>& selected_TK)>;

// Lets autograd own the call until backward is done.
struct LayerCall : torch::CustomClassHolder {
  explicit LayerCall(LayerRun run_in) : run(std::move(run_in)) {}
  LayerRun run;
};

/// A layer whose activations are recomputed in backward. Router logits are among its outputs, so a loss on the routing
/// record reaches them through this node; what follows from the logits is recomputed outside it. Parameters are inputs
/// of the node (not touched behind autograd's back), so both backward() and grad() work. The selection of the first run
/// is reused: a selector with state must not be asked twice.
class CheckpointedLayer : public Function<CheckpointedLayer> {
 public:
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<LayerCall>& call,
                               const Tensor& hidden_BSD, at::TensorList parameters) {
    const LayerResult result = call->run(hidden_BSD, std::nullopt);
    variable_list saved = {hidden_BSD, result.selected_TK};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    ctx->set_materialize_grads(false);
    variable_list outputs = {result.hidden_BSD, result.logits_TE, result.selected_TK};
    variable_list constants = {result.selected_TK};
    if (result.reference_logits_TE.defined()) {
      outputs.push_back(result.reference_logits_TE);
      constants.push_back(result.reference_logits_TE);
    }
    ctx->mark_non_differentiable(constants);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<LayerCall>(ctx->saved_data["call"].toCapsule());
    const std::size_t num_parameters = saved.size() - 2;
    const Tensor hidden = saved[0].detach();
    hidden.requires_grad_(ctx->needs_input_grad(0));
    variable_list outputs;
    variable_list output_gradients;
    {
      const at::AutoGradMode enable(true);
      const LayerResult result = call->run(hidden, saved[1]);
      for (const auto& [output, gradient] :
           {std::pair(result.hidden_BSD, gradients[0]), std::pair(result.logits_TE, gradients[1])}) {
        if (gradient.defined() && output.requires_grad()) {
          outputs.push_back(output);
          output_gradients.push_back(gradient);
        }
      }
    }
    std::vector<std::size_t> places;  // among this node's arguments: the call, the hidden state, the parameters
    variable_list inputs;
    if (hidden.requires_grad()) {
      places.push_back(1);
      inputs.push_back(hidden);
    }
    for (std::size_t i = 0; i < num_parameters; ++i) {
      if (ctx->needs_input_grad(i + 1)) {
        places.push_back(i + 2);
        inputs.push_back(saved[i + 2]);
      }
    }
    variable_list result(num_parameters + 2);
    if (!outputs.empty() && !inputs.empty()) {
      const variable_list found = torch::autograd::grad(outputs, inputs, output_gradients, std::nullopt,
                                                        /*create_graph=*/false, /*allow_unused=*/true);
      for (std::size_t i = 0; i < places.size(); ++i) {
        result[places[i]] = found[i];
      }
    }
    return result;
  }
};

void check_batch(const TokenBatch& batch) {
  for (const Tensor& tensor : {batch.tokens_BS, batch.positions_BS, batch.sequence_ids_BS}) {
    if (!tensor.defined() || tensor.dim() != 2 || tensor.scalar_type() != torch::kInt64 ||
        tensor.sizes() != batch.tokens_BS.sizes()) {
      throw std::invalid_argument(
          "model: tokens, positions and sequence ids of a batch must be int64 [B, S] of one shape");
    }
  }
}

// Additive mask [B, 1, S, S]: a token sees itself and earlier tokens of its sequence. Padding sees itself only, which
// keeps its softmax finite. Undefined when plain causal attention says the same.
Tensor attention_mask(const Tensor& sequence_ids_BS, torch::Dtype dtype) {
  const Tensor first_B1 = sequence_ids_BS.narrow(1, 0, 1);
  if (sequence_ids_BS.eq(first_B1).logical_and_(first_B1.ge(0)).all().item<bool>()) {
    return {};
  }
  const std::int64_t length = sequence_ids_BS.size(1);
  const auto device = torch::TensorOptions().device(sequence_ids_BS.device());
  const Tensor query = sequence_ids_BS.unsqueeze(2);
  const Tensor causal = torch::ones({length, length}, device.dtype(torch::kBool)).tril_();
  const Tensor self = torch::eye(length, device.dtype(torch::kBool));
  const Tensor allowed =
      query.eq(sequence_ids_BS.unsqueeze(1)).logical_and_(query.ge(0)).logical_and_(causal).logical_or_(self);
  return torch::zeros(allowed.sizes(), device.dtype(dtype))
      .masked_fill_(allowed.logical_not(), -std::numeric_limits<double>::infinity())
      .unsqueeze(1);
}

Tensor attend(const Architecture& a, const Layer& layer, const SharedInputs& shared, const Tensor& x_BSD) {
  const std::int64_t rows = x_BSD.size(0);
  const std::int64_t length = x_BSD.size(1);
  Tensor query = at::linear(x_BSD, layer.query, layer.query_bias);
  Tensor key = at::linear(x_BSD, layer.key, layer.key_bias);
  Tensor value = at::linear(x_BSD, layer.value, layer.value_bias);
  if (layer.query_norm.defined()) {
    query = RmsNorm::apply(query, layer.query_norm, a.rms_norm_eps);
    key = RmsNorm::apply(key, layer.key_norm, a.rms_norm_eps);
  }
  if (a.clip_qkv) {
    query = query.clamp(-*a.clip_qkv, *a.clip_qkv);
    key = key.clamp(-*a.clip_qkv, *a.clip_qkv);
    value = value.clamp(-*a.clip_qkv, *a.clip_qkv);
  }
  const auto split = [&](const Tensor& x, std::int64_t heads) {
    return x.view({rows, length, heads, a.head_dim}).transpose(1, 2);
  };
  query = Rotary::apply(split(query, a.num_attention_heads), shared.cosine, shared.sine);
  key = Rotary::apply(split(key, a.num_key_value_heads), shared.cosine, shared.sine);
  value = split(value, a.num_key_value_heads);
  const std::int64_t group = a.num_attention_heads / a.num_key_value_heads;
  if (group > 1) {
    key = key.repeat_interleave(group, 1);
    value = value.repeat_interleave(group, 1);
  }
  const Tensor mixed = shared.mask.defined() ? at::scaled_dot_product_attention(query, key, value, shared.mask)
                                             : at::scaled_dot_product_attention(query, key, value, std::nullopt,
                                                                                /*dropout_p=*/0.0, /*is_causal=*/true);
  return at::linear(mixed.transpose(1, 2).reshape({rows, length, a.num_attention_heads * a.head_dim}), layer.output,
                    layer.output_bias);
}

Tensor mixing_weights(const Architecture& a, const Tensor& probabilities_TE, const Tensor& selected_TK) {
  const Tensor weights_TK = probabilities_TE.gather(1, selected_TK);
  return a.normalise_top_k ? weights_TK / weights_TK.sum(1, /*keepdim=*/true) : weights_TK;
}

ExpertWeights without_adapters(const ExpertWeights& experts) {
  return {experts.gate_EFD, experts.up_EFD, experts.down_EDF};
}

LayerResult run_layer(const Architecture& a, const Layer& layer, std::int64_t index, const SharedInputs& shared,
                      Selector& selector, Executor& executor, const Tensor& router_ED, const ExpertWeights& experts,
                      const Tensor& hidden_BSD, const std::optional<Tensor>& selected_TK) {
  const Tensor attended =
      hidden_BSD + attend(a, layer, shared, RmsNorm::apply(hidden_BSD, layer.input_norm, a.rms_norm_eps));
  const Tensor x_TD = RmsNorm::apply(attended, layer.post_attention_norm, a.rms_norm_eps).reshape({-1, a.hidden_size});
  const Tensor router_input = x_TD.to(router_ED.scalar_type());
  LayerResult result;
  result.logits_TE = at::linear(router_input, router_ED);
  result.probabilities_TE = result.logits_TE.softmax(1);
  if (selected_TK) {
    result.selected_TK = *selected_TK;
  } else {
    const torch::NoGradGuard no_grad;
    result.selected_TK = selector.select(result.logits_TE.detach(), a.top_k, index, shared.batch);
    if (layer.reference_router_ED.defined()) {
      result.reference_logits_TE = at::linear(router_input.detach(), layer.reference_router_ED);
    }
  }
  result.weights_TK = mixing_weights(a, result.probabilities_TE, result.selected_TK);
  const Tensor mixed = executor.run(experts, x_TD, result.selected_TK, result.weights_TK, index);
  result.hidden_BSD = attended + mixed.view_as(attended);
  return result;
}

}  // namespace

struct MoeModelImpl::Impl {
  Architecture architecture;
  torch::Dtype dtype = torch::kFloat32;
  torch::Device device = torch::kCPU;
  Tensor embedding, final_norm, head;  ///< `head` undefined when tied to the embedding
  // Shared with the graph of a checkpointed forward, which may outlive the model.
  std::vector<std::shared_ptr<Layer>> layers;
  bool adapters_enabled = true;
  std::shared_ptr<Selector> selector = std::make_shared<TopKSelector>();
  std::shared_ptr<Executor> executor = std::make_shared<GroupedExecutor>();
  bool checkpointing = false;
  std::int64_t reference_top_k = 0;
  std::optional<AdapterSettings> adapter_settings;

  // The parameter of a tensor of the checkpoint; an expert's is the stacked one.
  Tensor& slot(const TensorSpec& spec) {
    using P = TensorPart;
    switch (spec.part) {
      case P::kTokenEmbedding:
        return embedding;
      case P::kFinalNorm:
        return final_norm;
      case P::kHead:
        return head;
      default:
        break;
    }
    Layer& layer = *layers.at(static_cast<std::size_t>(spec.layer));
    switch (spec.part) {
      case P::kInputNorm:
        return layer.input_norm;
      case P::kQuery:
        return layer.query;
      case P::kQueryBias:
        return layer.query_bias;
      case P::kQueryNorm:
        return layer.query_norm;
      case P::kKey:
        return layer.key;
      case P::kKeyBias:
        return layer.key_bias;
      case P::kKeyNorm:
        return layer.key_norm;
      case P::kValue:
        return layer.value;
      case P::kValueBias:
        return layer.value_bias;
      case P::kAttentionOutput:
        return layer.output;
      case P::kAttentionOutputBias:
        return layer.output_bias;
      case P::kPostAttentionNorm:
        return layer.post_attention_norm;
      case P::kRouter:
        return layer.router_ED;
      case P::kExpertGate:
        return layer.experts.gate_EFD;
      case P::kExpertUp:
        return layer.experts.up_EFD;
      case P::kExpertDown:
        return layer.experts.down_EDF;
      default:
        break;
    }
    throw std::invalid_argument(fmt::format("model: no parameter belongs to tensor \"{}\"", spec.name));
  }

  [[nodiscard]] SharedInputs shared_inputs(const TokenBatch& batch) const {
    SharedInputs shared;
    shared.batch = batch;
    const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(device);
    const Tensor exponent = torch::arange(0, architecture.head_dim, 2, options) / architecture.head_dim;
    const Tensor frequency = at::pow(architecture.rope.theta, exponent).reciprocal().div(architecture.rope.factor);
    const Tensor angle = (batch.positions_BS.unsqueeze(2).to(torch::kFloat32) * frequency).unsqueeze(1);
    shared.cosine = angle.cos().to(dtype);
    shared.sine = angle.sin().to(dtype);
    shared.mask = attention_mask(batch.sequence_ids_BS, dtype);
    return shared;
  }
};

MoeModelImpl::MoeModelImpl(Architecture architecture, torch::Dtype dtype, torch::Device device)
    : impl_(std::make_unique<Impl>()) {
  impl_->architecture = std::move(architecture);
  impl_->dtype = dtype;
  impl_->device = device;
  for (std::int64_t layer = 0; layer < impl_->architecture.num_layers; ++layer) {
    impl_->layers.push_back(std::make_shared<Layer>());
  }
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
    // LibTorch reserves the dot for submodules.
    for (char& letter : name) {
      letter = letter == '.' ? '/' : letter;
    }
    // Routers stay at least float32: their gradients are small and bf16 would swallow the steps.
    const bool wide = spec.role == TensorRole::kRouter && dtype != torch::kFloat64;
    const Tensor storage =
        torch::empty(shape, torch::TensorOptions().dtype(wide ? torch::kFloat32 : dtype).device(device));
    impl_->slot(spec) = register_parameter(name, storage);
  }
}

MoeModelImpl::~MoeModelImpl() = default;

ModelOutput MoeModelImpl::forward(const TokenBatch& batch) {
  check_batch(batch);
  const auto shared = std::make_shared<SharedInputs>(impl_->shared_inputs(batch));
  const Architecture& a = impl_->architecture;
  ModelOutput output;
  Tensor hidden = at::embedding(impl_->embedding, batch.tokens_BS);
  for (std::size_t i = 0; i < impl_->layers.size(); ++i) {
    const std::shared_ptr<Layer>& layer = impl_->layers[i];
    const auto index = static_cast<std::int64_t>(i);
    const ExpertWeights experts = impl_->adapters_enabled ? layer->experts : without_adapters(layer->experts);
    RoutingRecord record;
    if (impl_->checkpointing && at::GradMode::is_enabled()) {
      LayerRun run = [a, layer, index, shared, experts, selector = impl_->selector, executor = impl_->executor](
                         const Tensor& x, const std::optional<Tensor>& selected) {
        return run_layer(a, *layer, index, *shared, *selector, *executor, layer->router_ED, experts, x, selected);
      };
      const std::vector<Tensor> parameters = layer->parameters();
      variable_list outputs =
          CheckpointedLayer::apply(c10::make_intrusive<LayerCall>(std::move(run)), hidden, at::TensorList(parameters));
      hidden = outputs[0];
      record.logits_TE = outputs[1];
      record.selected_TK = outputs[2];
      record.reference_logits_TE = outputs.size() > 3 ? outputs[3] : Tensor();
      record.probabilities_TE = record.logits_TE.softmax(1);
      record.weights_TK = mixing_weights(a, record.probabilities_TE, record.selected_TK);
    } else {
      LayerResult result = run_layer(a, *layer, index, *shared, *impl_->selector, *impl_->executor, layer->router_ED,
                                     experts, hidden, std::nullopt);
      hidden = result.hidden_BSD;
      record.logits_TE = result.logits_TE;
      record.probabilities_TE = result.probabilities_TE;
      record.selected_TK = result.selected_TK;
      record.weights_TK = result.weights_TK;
      record.reference_logits_TE = result.reference_logits_TE;
    }
    output.routing.push_back(std::move(record));
  }
  output.hidden_BSD = RmsNorm::apply(hidden, impl_->final_norm, a.rms_norm_eps);
  return output;
}

ModelOutput MoeModelImpl::forward_reference(const TokenBatch& batch) {
  const torch::NoGradGuard no_grad;
  check_batch(batch);
  const SharedInputs shared = impl_->shared_inputs(batch);
  Architecture a = impl_->architecture;
  a.top_k = impl_->reference_top_k;
  // The untouched model serves what its routers like best, whatever the tuned ones are trained under.
  TopKSelector selector;
  ModelOutput output;
  Tensor hidden = at::embedding(impl_->embedding, batch.tokens_BS);
  for (std::size_t i = 0; i < impl_->layers.size(); ++i) {
    const Layer& layer = *impl_->layers[i];
    if (!layer.reference_router_ED.defined()) {
      throw std::logic_error("forward_reference: no reference routers; call keep_reference_routers first");
    }
    const ExpertWeights base = without_adapters(layer.experts);
    LayerResult result = run_layer(a, layer, static_cast<std::int64_t>(i), shared, selector, *impl_->executor,
                                   layer.reference_router_ED, base, hidden, std::nullopt);
    hidden = result.hidden_BSD;
    output.routing.push_back(
        {result.logits_TE, result.probabilities_TE, result.selected_TK, result.weights_TK, result.reference_logits_TE});
  }
  output.hidden_BSD = RmsNorm::apply(hidden, impl_->final_norm, a.rms_norm_eps);
  return output;
}

torch::Tensor MoeModelImpl::head(const torch::Tensor& hidden) {
  return at::linear(hidden, head_weight());
}

const torch::Tensor& MoeModelImpl::head_weight() const noexcept {
  return impl_->head.defined() ? impl_->head : impl_->embedding;
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
  for (const auto& layer : impl_->layers) {
    layer->reference_router_ED = layer->router_ED.detach().clone();
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
  const auto zeros = [&](std::int64_t rows, std::int64_t columns) {
    return torch::zeros({a.num_experts, rows, columns},
                        torch::TensorOptions().dtype(impl_->dtype).device(impl_->device));
  };
  for (const auto& layer : impl_->layers) {
    layer->experts.adapters = {zeros(settings.rank, a.hidden_size), zeros(a.expert_intermediate_size, settings.rank),
                               zeros(settings.rank, a.expert_intermediate_size), zeros(a.hidden_size, settings.rank),
                               settings.alpha / static_cast<double>(settings.rank)};
  }
  impl_->adapter_settings = settings;
}

void MoeModelImpl::remove_adapters() {
  for (const auto& layer : impl_->layers) {
    layer->experts.adapters = {};
  }
  impl_->adapter_settings.reset();
}

void MoeModelImpl::set_adapters_enabled(bool enabled) {
  impl_->adapters_enabled = enabled;
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
  for (const auto& layer : impl_->layers) {
    result.push_back(layer->router_ED);
  }
  return result;
}

std::optional<AdapterSettings> MoeModelImpl::adapter_settings() const noexcept {
  return impl_->adapter_settings;
}

std::vector<torch::Tensor> MoeModelImpl::adapters() {
  std::vector<Tensor> result;
  for (const auto& layer : impl_->layers) {
    const ExpertAdapters& adapters = layer->experts.adapters;
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
      const bool up = spec.part == TensorPart::kExpertUp;
      const ExpertAdapters& adapters = impl_->layers.at(static_cast<std::size_t>(spec.layer))->experts.adapters;
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
    result.emplace_back(spec.name, spec.expert < 0 ? parameter : parameter.select(0, spec.expert));
  }
  return result;
}

std::vector<torch::Tensor> MoeModelImpl::all_parameters() {
  return parameters(/*recurse=*/false);
}

}  // namespace hestia
