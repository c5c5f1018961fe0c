#include "dense_model.hpp"

#include <cmath>
#include <string>

#include <fmt/format.h>

#include "hestia/core/error.hpp"

namespace hestia {

using torch::Tensor;

DenseModel::DenseModel(const DenseCheckpoint& checkpoint) : architecture_(checkpoint.architecture()) {
  const Json& scaling = architecture_.rope_scaling;
  if (scaling.is_object()) {
    const std::string type = scaling.value("rope_type", scaling.value("type", std::string("default")));
    if (type == "linear") {
      rope_factor_ = scaling.value("factor", 1.0);
    } else if (type != "default") {
      throw UsageError(
          fmt::format("{}: this program runs a dense model with plain or linear rotary positions only, got "
                      "\"{}\"; upcycle a model of those",
                      checkpoint.path().string(), type));
    }
  }
  const auto load = [&](const std::string& name, std::int64_t rows) {
    std::vector<float> values = checkpoint.tensor(name);
    const Tensor flat =
        torch::from_blob(values.data(), {static_cast<std::int64_t>(values.size())}, torch::kFloat32).clone();
    return rows == 0 ? flat : flat.view({rows, -1});
  };
  const DenseArchitecture& a = architecture_;
  embedding_ = load("model.embed_tokens.weight", a.vocab_size);
  final_norm_ = load("model.norm.weight", 0);
  head_ = a.tie_word_embeddings ? embedding_ : load("lm_head.weight", a.vocab_size);
  for (std::int64_t number = 0; number < a.num_layers; ++number) {
    const std::string prefix = fmt::format("model.layers.{}.", number);
    Layer layer;
    layer.input_norm = load(prefix + "input_layernorm.weight", 0);
    layer.query = load(prefix + "self_attn.q_proj.weight", a.num_attention_heads * a.head_dim);
    layer.key = load(prefix + "self_attn.k_proj.weight", a.num_key_value_heads * a.head_dim);
    layer.value = load(prefix + "self_attn.v_proj.weight", a.num_key_value_heads * a.head_dim);
    layer.output = load(prefix + "self_attn.o_proj.weight", a.hidden_size);
    layer.feed_forward_norm = load(prefix + "post_attention_layernorm.weight", 0);
    layer.gate = load(prefix + "mlp.gate_proj.weight", a.intermediate_size);
    layer.up = load(prefix + "mlp.up_proj.weight", a.intermediate_size);
    layer.down = load(prefix + "mlp.down_proj.weight", a.hidden_size);
    layers_.push_back(std::move(layer));
  }
}

Tensor DenseModel::norm(const Tensor& x, const Tensor& weight) const {
  return x * (x.square().mean(-1, true) + architecture_.rms_norm_eps).rsqrt() * weight;
}

// (a, b) -> (a cos - b sin, b cos + a sin) over the two halves of the last dimension.
Tensor DenseModel::rotate(const Tensor& x_BHd) const {
  const std::int64_t half = architecture_.head_dim / 2;
  const Tensor exponent = torch::arange(0, half, torch::kFloat64) / static_cast<double>(half);
  const Tensor angle =
      static_cast<double>(position_) / rope_factor_ * at::pow(architecture_.rope_theta, exponent).reciprocal();
  const Tensor cosine = angle.cos().to(torch::kFloat32);
  const Tensor sine = angle.sin().to(torch::kFloat32);
  const Tensor a = x_BHd.narrow(2, 0, half);
  const Tensor b = x_BHd.narrow(2, half, half);
  return at::cat({a * cosine - b * sine, b * cosine + a * sine}, 2);
}

Tensor DenseModel::step(const Tensor& tokens_B) {
  const torch::NoGradGuard no_grad;
  const DenseArchitecture& a = architecture_;
  const std::int64_t batch = tokens_B.size(0);
  const double scale = 1.0 / std::sqrt(static_cast<double>(a.head_dim));
  feed_forward_inputs_.clear();
  Tensor x = embedding_.index_select(0, tokens_B);
  for (Layer& layer : layers_) {
    Tensor h = norm(x, layer.input_norm);
    const Tensor query = rotate(at::linear(h, layer.query).view({batch, a.num_attention_heads, a.head_dim}));
    const Tensor key = rotate(at::linear(h, layer.key).view({batch, a.num_key_value_heads, a.head_dim})).unsqueeze(2);
    const Tensor value = at::linear(h, layer.value).view({batch, a.num_key_value_heads, 1, a.head_dim});
    layer.keys_BHTd = position_ == 0 ? key : at::cat({layer.keys_BHTd, key}, 2);
    layer.values_BHTd = position_ == 0 ? value : at::cat({layer.values_BHTd, value}, 2);
    // Heads that share keys and values are neighbours.
    const Tensor grouped = query.view({batch, a.num_key_value_heads, -1, a.head_dim});
    const Tensor scores = at::matmul(grouped, layer.keys_BHTd.transpose(2, 3)) * scale;
    const Tensor mixed = at::matmul(scores.softmax(-1), layer.values_BHTd).reshape({batch, -1});
    x = x + at::linear(mixed, layer.output);
    h = norm(x, layer.feed_forward_norm);
    feed_forward_inputs_.push_back(h);
    x = x + at::linear(at::silu(at::linear(h, layer.gate)) * at::linear(h, layer.up), layer.down);
  }
  ++position_;
  return at::linear(norm(x, final_norm_), head_);
}

}  // namespace hestia
