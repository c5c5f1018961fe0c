#include "fused_step.hpp"

#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAStream.h>
#include <fmt/format.h>

#include "hestia/kernels/decode_attention.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_linear.hpp"
#include "hestia/kernels/decode_router.hpp"
#include "hestia/kernels/soft_cache.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using P = TensorPart;

const std::uint16_t* bits(const Tensor& bfloat16) {
  return bfloat16.defined() ? static_cast<const std::uint16_t*>(bfloat16.const_data_ptr()) : nullptr;
}
std::uint16_t* mutable_bits(const Tensor& bfloat16) {
  return static_cast<std::uint16_t*>(bfloat16.mutable_data_ptr());
}

// Parameters of a layer, or of the parts outside the layers (-1).
using Parts = std::map<P, Tensor>;

std::map<std::int64_t, Parts> parts_of(MoeModel& model) {
  std::map<std::int64_t, Parts> parts;
  const std::vector<TensorSpec> specs = tensor_specs(model->architecture());
  const auto tensors = model->named_tensors();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].role != TensorRole::kExpert) {
      parts[specs[i].layer][specs[i].part] = tensors[i].second;
    }
  }
  return parts;
}

// Several parameters behind one another, which become views of it; undefined when they are.
Tensor joined(std::vector<Tensor> parts) {
  if (!parts.front().defined()) {
    return {};
  }
  Tensor all = torch::cat(parts, 0).contiguous();
  std::int64_t row = 0;
  for (Tensor& part : parts) {
    const std::int64_t rows = part.size(0);
    part.set_data(all.narrow(0, row, rows));
    row += rows;
  }
  return all;
}

}  // namespace

std::string fused_step_refusal(MoeModel& model, const SlotExecutor& slots, std::int64_t rows) {
  const Architecture& a = model->architecture();
  if (!model->device().is_cuda() || !has_cuda_kernels()) {
    return "they need a GPU";
  }
  if (!slots.runs_kernels()) {
    return "they take bfloat16 experts without biases or clamp, of sizes that are multiples of 8";
  }
  if (static_cast<std::int64_t>(a.moe_layers().size()) != a.num_layers || a.shared_intermediate_size > 0) {
    return "they do not run dense layers or shared experts";
  }
  if (a.key_value_rank > 0 || a.head_dim % 8 != 0 || a.head_dim > 256 ||
      a.num_attention_heads % a.num_key_value_heads != 0) {
    return "they run ordinary attention with heads of up to 256, a multiple of 8";
  }
  if (a.norm == NormKind::kLayer) {
    return "they run RMSNorm";
  }
  if (a.routing == RoutingKind::kSparsemixer || a.num_groups > 1 || a.router_bias || a.num_experts > 512) {
    return "they route by the softmax of up to 512 experts without groups or bias";
  }
  const auto parts = parts_of(model);
  if (parts.at(0).contains(P::kSinks)) {
    return "they run attention without sinks";
  }
  if (rows > kDecodeMaxTokens) {
    return fmt::format("they take up to {} rows", kDecodeMaxTokens);
  }
  return "";
}

struct FusedStep::Impl {
  struct Layer {
    Parts parts;
    Tensor query_key_value, query_key_value_bias;
    Tensor keys, values;
    DecodeAttentionShape attention;
  };

  MoeModel model{nullptr};
  KeyValueCache* cache = nullptr;
  std::shared_ptr<SlotExecutor> slots;
  std::int64_t rows = 0;
  bool early = false;
  Architecture architecture;
  std::vector<Layer> layers;
  Parts outside;
  Tensor cosine, sine;
  std::optional<Tensor> replayed;
  std::optional<ResidencyRule> rule;
  Tensor strength_LB;
  Tensor hidden_TD, normal_TD, projected, attended;
  Tensor probabilities_TE, router_logits_LBE, selected_LBK, weights_LBK, hit_slots_BK;
  Tensor router_workspace, attention_workspace;
  // What the gate of the layer behind says too early.
  Tensor guess_logits_E, guess_probabilities_E, guess_selected_K, guess_weights_K;

  [[nodiscard]] DecodeNorm norm() const {
    return architecture.norm == NormKind::kRmsWide ? DecodeNorm::kRmsWide : DecodeNorm::kRms;
  }
  const Tensor& part(const Parts& parts, P which) const {
    static const Tensor none;
    const auto found = parts.find(which);
    return found == parts.end() ? none : found->second;
  }

  // out = residual + (weight rmsnorm(x) + bias)
  template <class Out>
  void linear(const Tensor& x, const Tensor& norm_weight, const Tensor& weight, const Tensor& bias,
              const Tensor& residual, Out* out, void* stream) const {
    const DecodeLinearShape shape{.num_tokens = rows,
                                  .input_size = weight.size(1),
                                  .output_size = weight.size(0),
                                  .norm = norm(),
                                  .norm_eps = static_cast<float>(architecture.norm_eps),
                                  .dependent = early};
    decode_linear_cuda(shape,
                       {bits(x), bits(norm_weight), bits(weight), bits(bias), bits(residual), mutable_bits(normal_TD)},
                       out, stream);
  }

  // What the router of layer `index` is given to guess what the layer behind it will miss.
  [[nodiscard]] std::optional<DecodeGuess> guess_behind(std::int64_t index) const {
    const std::int64_t next = index + 1;
    std::optional<DecodeGuess> guess;
    if (next < architecture.num_layers) {
      guess = slots->router_guess(next);
    }
    if (!guess) {
      return guess;
    }
    const Parts& parts = layers[static_cast<std::size_t>(next)].parts;
    guess->norm_weight = bits(part(parts, P::kPostAttentionNorm));
    guess->router = part(parts, P::kRouter).const_data_ptr<float>();
    if (replayed) {
      guess->forced = (*replayed)[next].const_data_ptr<std::int64_t>();
    } else if (rule) {
      guess->bonus = rule->bonus(next);
      guess->strength = strength_LB[next].const_data_ptr<float>();
    }
    guess->scratch = {nullptr,
                      guess_logits_E.mutable_data_ptr<float>(),
                      guess_probabilities_E.mutable_data_ptr<float>(),
                      guess_selected_K.mutable_data_ptr<std::int32_t>(),
                      guess_weights_K.mutable_data_ptr<float>(),
                      nullptr};
    return guess;
  }

  void run_layer(std::int64_t index, const Tensor& position_1, const Tensor& step_1, void* stream) {
    Layer& layer = layers[static_cast<std::size_t>(index)];
    const Architecture& a = architecture;
    layer.attention.dependent = early;
    linear(hidden_TD, part(layer.parts, P::kInputNorm), layer.query_key_value, layer.query_key_value_bias, {},
           mutable_bits(projected), stream);
    const DecodeKeyValues memory{mutable_bits(layer.keys), mutable_bits(layer.values)};
    const auto* position = position_1.const_data_ptr<std::int64_t>();
    decode_attention_cuda(layer.attention,
                          {bits(projected), bits(part(layer.parts, P::kQueryNorm)),
                           bits(part(layer.parts, P::kKeyNorm)), bits(cosine), bits(sine), position, nullptr},
                          memory, mutable_bits(attended), attention_workspace.mutable_data_ptr(), stream);
    linear(attended, {}, part(layer.parts, P::kAttentionOutput), part(layer.parts, P::kAttentionOutputBias), hidden_TD,
           mutable_bits(hidden_TD), stream);

    DecodeRouterShape shape{.num_tokens = rows,
                            .hidden_size = a.hidden_size,
                            .num_experts = a.num_experts,
                            .top_k = a.top_k,
                            .norm = norm(),
                            .norm_eps = static_cast<float>(a.norm_eps),
                            .normalise_top_k = a.normalise_top_k || a.routing == RoutingKind::kSoftmaxOfChosen,
                            .routed_scale = static_cast<float>(a.routed_scale),
                            .dependent = early};
    DecodeRouterInputs in{.hidden = bits(hidden_TD),
                          .norm_weight = bits(part(layer.parts, P::kPostAttentionNorm)),
                          .router = part(layer.parts, P::kRouter).const_data_ptr<float>()};
    if (replayed) {
      in.forced = (*replayed)[index].const_data_ptr<std::int64_t>();
      in.num_forced = replayed->size(1);
      in.step = step_1.const_data_ptr<std::int64_t>();
    } else if (rule) {
      shape.bonus = rule->bonus(index);
      shape.always_keep = rule->always_keep;
      shape.score = rule->score;
      shape.preserve_mass = rule->preserve_mass;
      in.strength = strength_LB[index].const_data_ptr<float>();
    }
    in.slot_of = slots->slot_of(index);
    const Tensor selected = selected_LBK[index];
    const Tensor weights = weights_LBK[index];
    const std::optional<DecodeFetch> fetch = slots->router_fetch(selected, hit_slots_BK, index);
    in.fetch = fetch ? &*fetch : nullptr;
    const std::optional<DecodeGuess> guess = guess_behind(index);
    in.guess = guess ? &*guess : nullptr;
    decode_router_cuda(shape, in,
                       {mutable_bits(normal_TD), router_logits_LBE[index].mutable_data_ptr<float>(),
                        probabilities_TE.mutable_data_ptr<float>(), selected.mutable_data_ptr<std::int32_t>(),
                        weights.mutable_data_ptr<float>(),
                        in.slot_of != nullptr ? hit_slots_BK.mutable_data_ptr<std::int32_t>() : nullptr},
                       router_workspace.mutable_data_ptr(), stream);
    std::vector<Tensor> ahead;
    if (index + 1 < a.num_layers) {
      const Layer& next = layers[static_cast<std::size_t>(index) + 1];
      ahead = {next.query_key_value, part(next.parts, P::kAttentionOutput)};
    }
    slots->decode(normal_TD, selected, weights, hit_slots_BK, hidden_TD, index, ahead);
  }
};

FusedStep::FusedStep(MoeModel model, KeyValueCache& cache, std::shared_ptr<SlotExecutor> slots,
                     const Rotations& rotations, std::int64_t rows)
    : impl_(std::make_unique<Impl>()) {
  const torch::NoGradGuard no_grad;
  Impl& impl = *impl_;
  impl.model = std::move(model);
  impl.cache = &cache;
  impl.slots = std::move(slots);
  impl.rows = rows;
  impl.architecture = impl.model->architecture();
  const Architecture& a = impl.architecture;
  std::map<std::int64_t, Parts> parts = parts_of(impl.model);
  impl.outside = parts.at(-1);
  impl.cosine = rotations.cosine.contiguous();
  impl.sine = rotations.sine.contiguous();
  for (std::int64_t index = 0; index < a.num_layers; ++index) {
    Impl::Layer layer;
    layer.parts = std::move(parts.at(index));
    layer.query_key_value = joined({layer.parts.at(P::kQuery), layer.parts.at(P::kKey), layer.parts.at(P::kValue)});
    if (layer.parts.contains(P::kQueryBias)) {
      layer.query_key_value_bias =
          joined({layer.parts.at(P::kQueryBias), layer.parts.at(P::kKeyBias), layer.parts.at(P::kValueBias)});
    }
    const bool normed = layer.parts.contains(P::kQueryNorm);
    layer.attention = {.num_tokens = rows,
                       .num_heads = a.num_attention_heads,
                       .num_key_value_heads = a.num_key_value_heads,
                       .head_dim = a.head_dim,
                       .capacity = cache.capacity(),
                       .one_position = true,
                       .norm = !normed                  ? DecodeHeadNorm::kNone
                               : a.query_key_norm_heads ? DecodeHeadNorm::kHeads
                                                        : DecodeHeadNorm::kWidth,
                       .norm_eps = static_cast<float>(a.norm_eps),
                       .clip = static_cast<float>(a.clip_qkv.value_or(0.0)),
                       .num_rotations = impl.cosine.size(0),
                       .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.head_dim))),
                       .window = a.window_of(index)};
    impl.layers.push_back(std::move(layer));
  }
  const auto options = torch::TensorOptions().device(impl.model->device());
  const auto half = options.dtype(torch::kBFloat16);
  const auto floats = options.dtype(torch::kFloat32);
  impl.hidden_TD = torch::zeros({rows, a.hidden_size}, half);
  impl.normal_TD = torch::zeros({rows, a.hidden_size}, half);
  const std::int64_t heads = a.num_attention_heads + 2 * a.num_key_value_heads;
  impl.projected = torch::zeros({rows, heads * a.head_dim}, half);
  impl.attended = torch::zeros({rows, a.num_attention_heads * a.head_dim}, half);
  impl.probabilities_TE = torch::zeros({rows, a.num_experts}, floats);
  impl.router_logits_LBE = torch::zeros({a.num_layers, rows, a.num_experts}, floats);
  impl.selected_LBK = torch::zeros({a.num_layers, rows, a.top_k}, options.dtype(torch::kInt32));
  impl.hit_slots_BK = torch::zeros({rows, a.top_k}, options.dtype(torch::kInt32));
  impl.weights_LBK = torch::zeros({a.num_layers, rows, a.top_k}, floats);
  impl.guess_logits_E = torch::zeros({a.num_experts}, floats);
  impl.guess_probabilities_E = torch::zeros({a.num_experts}, floats);
  impl.guess_selected_K = torch::zeros({a.top_k}, options.dtype(torch::kInt32));
  impl.guess_weights_K = torch::zeros({a.top_k}, floats);
  const DecodeRouterShape router{
      .num_tokens = rows, .hidden_size = a.hidden_size, .num_experts = a.num_experts, .top_k = a.top_k};
  const auto bytes = options.dtype(torch::kUInt8);
  impl.router_workspace = torch::zeros({static_cast<std::int64_t>(decode_router_workspace(router))}, bytes);
  impl.attention_workspace =
      torch::zeros({static_cast<std::int64_t>(decode_attention_workspace(impl.layers.front().attention))}, bytes);
}

FusedStep::~FusedStep() = default;

void FusedStep::replay(std::optional<torch::Tensor> steps_LSBK) {
  impl_->replayed = std::move(steps_LSBK);
}

void FusedStep::start_early(bool allowed) {
  const auto* properties = at::cuda::getDeviceProperties(impl_->model->device().index());
  impl_->early = allowed && properties->major >= 9;
  impl_->slots->start_early(impl_->early);
}

void FusedStep::route_by(std::optional<ResidencyRule> rule, torch::Tensor strength_LB) {
  impl_->rule = std::move(rule);
  impl_->strength_LB = std::move(strength_LB);
}

void FusedStep::run(const torch::Tensor& tokens_B1, const torch::Tensor& position_1, const torch::Tensor& step_1,
                    const torch::Tensor& logits_BV) {
  const torch::NoGradGuard no_grad;
  Impl& impl = *impl_;
  void* const stream = c10::cuda::getCurrentCUDAStream(impl.model->device().index()).stream();
  for (std::int64_t index = 0; index < impl.architecture.num_layers; ++index) {
    Impl::Layer& layer = impl.layers[static_cast<std::size_t>(index)];
    std::tie(layer.keys, layer.values) = impl.cache->memory(index);
  }
  at::index_select_out(impl.hidden_TD, impl.outside.at(P::kTokenEmbedding), 0, tokens_B1.view(-1));
  for (std::int64_t index = 0; index < impl.architecture.num_layers; ++index) {
    impl.run_layer(index, position_1, step_1, stream);
  }
  impl.linear(impl.hidden_TD, impl.outside.at(P::kFinalNorm), impl.model->head_weight(), impl.model->head_bias(), {},
              logits_BV.mutable_data_ptr<float>(), stream);
}

const torch::Tensor& FusedStep::selected() const noexcept {
  return impl_->selected_LBK;
}
const torch::Tensor& FusedStep::weights() const noexcept {
  return impl_->weights_LBK;
}
const torch::Tensor& FusedStep::router_logits() const noexcept {
  return impl_->router_logits_LBE;
}

}  // namespace hestia
