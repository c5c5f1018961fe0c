#include "attention.hpp"

#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "norm.hpp"

namespace hestia {
namespace {

using torch::Tensor;

// Boolean [B, S, keys] -> [B, 1, S, keys], 0 or minus infinity.
Tensor additive(const Tensor& allowed, torch::Dtype dtype) {
  return torch::zeros(allowed.sizes(), allowed.options().dtype(dtype))
      .masked_fill_(allowed.logical_not(), -std::numeric_limits<double>::infinity())
      .unsqueeze(1);
}

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
  return additive(allowed, dtype);
}

// [1, 1, S, past + S] of S tokens behind `past` others; undefined when each sees all there is.
Tensor continued_mask(std::int64_t length, std::int64_t past, std::int64_t window, torch::Dtype dtype,
                      torch::Device device) {
  const bool windowed = window > 0 && window < past + length;
  if (length == 1 && !windowed) {
    return {};
  }
  const auto options = torch::TensorOptions().dtype(torch::kBool).device(device);
  Tensor allowed = torch::ones({1, length, past + length}, options).tril_(past);
  if (windowed) {
    allowed = allowed.triu_(past + 1 - window);
  }
  return additive(allowed, dtype);
}

void check_continues(const Architecture& architecture, const TokenBatch& batch, const KeyValueCache& cache) {
  const Tensor& ids = batch.sequence_ids_BS;
  const std::int64_t length = ids.size(1);
  const std::int64_t past = cache.length();
  const Tensor expected = torch::arange(past, past + length, batch.positions_BS.options()).expand_as(ids);
  if (length < 1 || !ids.ge(0).logical_and_(ids.eq(ids.narrow(1, 0, 1))).all().item<bool>() ||
      !batch.positions_BS.equal(expected)) {
    throw std::invalid_argument(
        fmt::format("model: with a key-value cache each row must be one sequence whose positions go on at {}", past));
  }
  if (length > cache.capacity() - past) {
    throw std::invalid_argument(fmt::format("model: {} tokens do not fit behind {} in a key-value cache of {}", length,
                                            past, cache.capacity()));
  }
  const RopeSettings& rope = architecture.rope;
  if (rope.type == "longrope" && past > 0 && past <= rope.original_positions &&
      past + length > rope.original_positions) {
    throw RunError(fmt::format(
        "model: the sequence grows over {} tokens, where its rope factors change, got {} and {} more; begin again with "
        "an empty key-value cache and all of its tokens",
        rope.original_positions, past, length));
  }
}

// New keys and values behind those of the cache, and all that the tokens see.
std::pair<Tensor, Tensor> cached(const AttentionInputs& inputs, std::int64_t layer, const Tensor& key,
                                 const Tensor& value) {
  return inputs.position_1.defined() ? inputs.cache->put(layer, key, value, inputs.position_1, inputs.visible)
                                     : inputs.cache->extend(layer, key, value);
}

// Without a mask, causal or not at all.
Tensor scored_and_mixed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, bool causal,
                        std::optional<double> scale = std::nullopt) {
  return mask.defined()
             ? at::scaled_dot_product_attention(query, key, value, mask, /*dropout_p=*/0.0,
                                                /*is_causal=*/false, scale)
             : at::scaled_dot_product_attention(query, key, value, std::nullopt, /*dropout_p=*/0.0, causal, scale);
}

// Every softmax has one score more, of a key without a value.
Tensor mixed_with_sinks(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, bool causal,
                        const Tensor& sinks_H) {
  const std::int64_t length = query.size(2);
  Tensor scores = at::matmul(query, key.transpose(2, 3)).div(std::sqrt(static_cast<double>(query.size(3))));
  if (mask.defined()) {
    scores = scores + mask;
  } else if (causal) {
    const Tensor later = torch::ones({length, length}, query.options().dtype(torch::kBool)).triu_(1);
    scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
  }
  const Tensor sinks = sinks_H.view({1, -1, 1, 1}).expand({query.size(0), -1, length, 1});
  const auto wide = query.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const Tensor shares = torch::cat({scores, sinks}, 3).softmax(3, wide).narrow(3, 0, key.size(2));
  return at::matmul(shares.to(value.scalar_type()), value);
}

// Pairs of neighbours to halves, the layout of `rotary`. Query and key are permuted alike: their products stay.
Tensor halves_of_pairs(const Tensor& x_BHSd) {
  return x_BHSd.unflatten(3, {-1, 2}).transpose(3, 4).flatten(3);
}

Tensor latent_attention(const Architecture& a, const LayerWeights& weights, std::int64_t layer,
                        const AttentionInputs& inputs, const Tensor& x_BSD) {
  using P = TensorPart;
  const Tensor& mask = inputs.masks.at(a.window_of(layer));
  constexpr double kEps = 1e-6;  // of the latents' norms, whatever the config says of the others
  const auto heads = [&](const Tensor& x, std::int64_t number) { return x.unflatten(2, {number, -1}).transpose(1, 2); };
  Tensor query = a.query_rank == 0
                     ? at::linear(x_BSD, weights[P::kQuery])
                     : at::linear(rms_norm(at::linear(x_BSD, weights[P::kQueryDown], weights[P::kQueryDownBias]),
                                           weights[P::kQueryLatentNorm], kEps),
                                  weights[P::kQueryUp]);
  query = heads(query, a.num_attention_heads);
  const Tensor down = at::linear(x_BSD, weights[P::kKeyValueDown], weights[P::kKeyValueDownBias]);
  const Tensor latent_BSR =
      rms_norm(down.narrow(2, 0, a.key_value_rank).contiguous(), weights[P::kKeyValueLatentNorm], kEps);
  const Tensor key_value = heads(at::linear(latent_BSR, weights[P::kKeyValueUp]), a.num_attention_heads);
  const auto turned = [&](const Tensor& x) {
    const torch::Dtype wide = inputs.rotary.cosine.scalar_type();
    return rotary(halves_of_pairs(x).to(wide), inputs.rotary).to(x.scalar_type());
  };
  const Tensor shared_key = turned(heads(down.narrow(2, a.key_value_rank, a.rotary_head_dim), 1));
  query = torch::cat(
      {query.narrow(3, 0, a.plain_head_dim), turned(query.narrow(3, a.plain_head_dim, a.rotary_head_dim))}, 3);
  Tensor key =
      torch::cat({key_value.narrow(3, 0, a.plain_head_dim), shared_key.expand({-1, a.num_attention_heads, -1, -1})}, 3);
  Tensor value = key_value.narrow(3, a.plain_head_dim, a.value_head_dim);
  if (inputs.cache != nullptr) {
    std::tie(key, value) = cached(inputs, layer, key, value);
  }
  // A longer context flattens scores; yarn of this family sharpens them by the square of its scale.
  const double sharpening = a.rope.type == "yarn" ? a.rope.yarn_scale(a.rope.mscale_all_dim.value_or(0.0)) : 1.0;
  const double scale = sharpening * sharpening / std::sqrt(static_cast<double>(a.head_dim));
  return at::linear(scored_and_mixed(query, key, value, mask, !inputs.all_visible, scale).transpose(1, 2).flatten(2),
                    weights[P::kAttentionOutput], weights[P::kAttentionOutputBias]);
}

}  // namespace

RotaryTables rotations_of(const Architecture& architecture, const Tensor& positions_BS, const Tensor& sequence_ids_BS,
                          torch::Dtype dtype) {
  // Latent attention rotates in float32.
  const bool wide = architecture.key_value_rank > 0 && dtype == torch::kBFloat16;
  return rotary_tables(architecture, positions_BS, sequence_ids_BS, wide ? torch::kFloat32 : dtype);
}

AttentionInputs attention_inputs(const Architecture& architecture, const StepPlace& place, torch::Dtype dtype,
                                 KeyValueCache& cache) {
  if (cache.length() < 1 || place.visible <= cache.length() || place.visible > cache.capacity() ||
      place.visible > place.rotations.cosine.size(0)) {
    throw std::invalid_argument(
        fmt::format("model: a step behind {} tokens in a cache of {} needs a number of visible keys between, got {}",
                    cache.length(), cache.capacity(), place.visible));
  }
  AttentionInputs inputs;
  inputs.rotary = {place.rotations.cosine.index_select(0, place.position_1),
                   place.rotations.sine.index_select(0, place.position_1)};
  inputs.all_visible = true;
  const Tensor key = torch::arange(place.visible, place.position_1.options());
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    const std::int64_t window = architecture.window_of(layer);
    if (inputs.masks.contains(window)) {
      continue;
    }
    Tensor allowed = key.le(place.position_1);
    if (window > 0) {
      allowed = allowed.logical_and(key.gt(place.position_1 - window));
    }
    inputs.masks[window] = additive(allowed.view({1, 1, -1}), dtype);
  }
  inputs.cache = &cache;
  inputs.position_1 = place.position_1;
  inputs.visible = place.visible;
  return inputs;
}

AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch, torch::Dtype dtype) {
  AttentionInputs inputs;
  inputs.rotary = rotations_of(architecture, batch.positions_BS, batch.sequence_ids_BS, dtype);
  for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
    const std::int64_t window = architecture.window_of(layer);
    if (!inputs.masks.contains(window)) {
      inputs.masks[window] = attention_mask(batch.sequence_ids_BS, window, dtype);
    }
  }
  return inputs;
}

AttentionInputs attention_inputs(const Architecture& architecture, const TokenBatch& batch, torch::Dtype dtype,
                                 KeyValueCache& cache) {
  check_continues(architecture, batch, cache);
  const std::int64_t past = cache.length();
  AttentionInputs inputs;
  if (past == 0) {
    inputs = attention_inputs(architecture, batch, dtype);
  } else {
    inputs.rotary = rotations_of(architecture, batch.positions_BS, batch.sequence_ids_BS, dtype);
    inputs.all_visible = true;
    for (std::int64_t layer = 0; layer < architecture.num_layers; ++layer) {
      const std::int64_t window = architecture.window_of(layer);
      if (!inputs.masks.contains(window)) {
        inputs.masks[window] = continued_mask(batch.tokens_BS.size(1), past, window, dtype, batch.tokens_BS.device());
      }
    }
  }
  inputs.cache = &cache;
  return inputs;
}

Tensor attend(const Architecture& a, const LayerWeights& weights, std::int64_t layer, const AttentionInputs& inputs,
              const Tensor& x_BSD) {
  using P = TensorPart;
  const Tensor& mask = inputs.masks.at(a.window_of(layer));
  if (a.key_value_rank > 0) {
    return latent_attention(a, weights, layer, inputs, x_BSD);
  }
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
  if (inputs.cache != nullptr) {
    std::tie(key, value) = cached(inputs, layer, key, value);
  }
  const std::int64_t group = a.num_attention_heads / a.num_key_value_heads;
  if (group > 1) {
    key = key.repeat_interleave(group, 1);
    value = value.repeat_interleave(group, 1);
  }
  const Tensor& sinks = weights[P::kSinks];
  const Tensor mixed = sinks.defined() ? mixed_with_sinks(query, key, value, mask, !inputs.all_visible, sinks)
                                       : scored_and_mixed(query, key, value, mask, !inputs.all_visible);
  return at::linear(mixed.transpose(1, 2).reshape({rows, length, a.num_attention_heads * a.head_dim}),
                    weights[P::kAttentionOutput], weights[P::kAttentionOutputBias]);
}

}  // namespace hestia
