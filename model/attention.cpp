#include "attention.hpp"

#include <limits>

#include "norm.hpp"

namespace hestia {
namespace {

using torch::Tensor;

// Undefined when plain causal attention says the same.
Tensor attention_mask(const Tensor& sequence_ids_BS, std::int64_t window, torch::Dtype dtype) {
  const Tensor first_B1 = sequence_ids_BS.narrow(1, 0, 1);
  const std::int64_t length = sequence_ids_BS.size(1);
  const bool windowed = window > 0 && window < length;
  if (!windowed && sequence_ids_BS.eq(first_B1).logical_and_(first_B1.ge(0)).all().item<bool>()) {
    return {};
  }
  const auto device = torch::TensorOptions().device(sequence_ids_BS.device());
  const Tensor query = sequence_ids_BS.unsqueeze(2);
  Tensor causal = torch::ones({length, length}, device.dtype(torch::kBool)).tril_();
  if (windowed) {
    causal = causal.triu_(1 - window);
  }
  const Tensor self = torch::eye(length, device.dtype(torch::kBool));
  const Tensor allowed =
      query.eq(sequence_ids_BS.unsqueeze(1)).logical_and_(query.ge(0)).logical_and_(causal).logical_or_(self);
  return torch::zeros(allowed.sizes(), device.dtype(dtype))
      .masked_fill_(allowed.logical_not(), -std::numeric_limits<double>::infinity())
      .unsqueeze(1);
}

}  // namespace

AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch, torch::Dtype dtype) {
  AttentionInputs inputs;
  inputs.rotary = rotary_tables(architecture, batch.positions_BS, batch.sequence_ids_BS, dtype);
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    const std::int64_t window = architecture.window_of(layer);
    if (!inputs.masks.contains(window)) {
      inputs.masks[window] = attention_mask(batch.sequence_ids_BS, window, dtype);
    }
  }
  return inputs;
}

Tensor attend(const Architecture& a, const LayerWeights& weights, std::int64_t layer, const AttentionInputs& inputs,
              const Tensor& x_BSD) {
  using P = TensorPart;
  const std::int64_t rows = x_BSD.size(0);
  const std::int64_t length = x_BSD.size(1);
  Tensor query = at::linear(x_BSD, weights[P::kQuery], weights[P::kQueryBias]);
  Tensor key = at::linear(x_BSD, weights[P::kKey], weights[P::kKeyBias]);
  Tensor value = at::linear(x_BSD, weights[P::kValue], weights[P::kValueBias]);
  const auto norm_query_and_key = [&] {
    query = rms_norm(query, weights[P::kQueryNorm], a.norm_eps);
    key = rms_norm(key, weights[P::kKeyNorm], a.norm_eps);
  };
  if (a.query_key_norm && !a.query_key_norm_heads) {
    norm_query_and_key();
  }
  if (a.clip_qkv) {
    query = query.clamp(-*a.clip_qkv, *a.clip_qkv);
    key = key.clamp(-*a.clip_qkv, *a.clip_qkv);
    value = value.clamp(-*a.clip_qkv, *a.clip_qkv);
  }
  const auto split = [&](const Tensor& x, std::int64_t heads) {
    return x.view({rows, length, heads, a.head_dim}).transpose(1, 2);
  };
  query = split(query, a.num_attention_heads);
  key = split(key, a.num_key_value_heads);
  value = split(value, a.num_key_value_heads);
  if (a.query_key_norm && a.query_key_norm_heads) {
    norm_query_and_key();
  }
  query = rotary(query, inputs.rotary);
  key = rotary(key, inputs.rotary);
  const std::int64_t group = a.num_attention_heads / a.num_key_value_heads;
  if (group > 1) {
    key = key.repeat_interleave(group, 1);
    value = value.repeat_interleave(group, 1);
  }
  const Tensor& mask = inputs.masks.at(a.window_of(layer));
  const Tensor mixed = mask.defined() ? at::scaled_dot_product_attention(query, key, value, mask)
                                      : at::scaled_dot_product_attention(query, key, value, std::nullopt,
                                                                         /*dropout_p=*/0.0, /*is_causal=*/true);
  return at::linear(mixed.transpose(1, 2).reshape({rows, length, a.num_attention_heads * a.head_dim}),
                    weights[P::kAttentionOutput], weights[P::kAttentionOutputBias]);
}

}  // namespace hestia
