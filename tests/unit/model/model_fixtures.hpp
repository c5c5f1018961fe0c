#pragma once

#include <cmath>
#include <string>

#include <ATen/CPUGeneratorImpl.h>

#include "hestia/model/moe_model.hpp"

namespace hestia::testing {

/// normal(0, 1) of a fixed seed.
inline torch::Tensor random_normal(at::IntArrayRef shape, std::uint64_t seed, torch::Dtype dtype = torch::kFloat64) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return torch::empty(shape, torch::kFloat64).normal_(0.0, 1.0, generator).to(dtype);
}

inline torch::Tensor random_integers(std::int64_t high, at::IntArrayRef shape, std::uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return torch::empty(shape, torch::kInt64).random_(0, high, generator);
}

/// Largest difference as a share of the largest reference value.
inline double relative_error(const torch::Tensor& ours, const torch::Tensor& reference) {
  const torch::Tensor wide = reference.detach().cpu().to(torch::kFloat64);
  return ((ours.detach().cpu().to(torch::kFloat64) - wide).abs().max() / wide.abs().max()).item<double>();
}

/// Squared error over squared reference: what low precision is judged by.
inline double normalised_square_error(const torch::Tensor& ours, const torch::Tensor& reference) {
  const torch::Tensor wide = reference.detach().cpu().to(torch::kFloat64);
  return ((ours.detach().cpu().to(torch::kFloat64) - wide).square().sum() / wide.square().sum()).item<double>();
}

/// A small model with every switch of the family on.
inline Architecture small_architecture() {
  Architecture a = family_defaults("olmoe");
  a.vocab_size = 37;
  a.hidden_size = 16;
  a.expert_intermediate_size = 8;
  a.num_layers = 3;
  a.num_attention_heads = 4;
  a.num_key_value_heads = 2;
  a.head_dim = 4;
  a.num_experts = 6;
  a.top_k = 2;
  a.normalise_top_k = true;
  a.clip_qkv = 1.2;
  a.attention_bias = true;
  a.rope.type = "linear";
  a.rope.factor = 2.0;
  a.initializer_range = 0.4;
  return a;
}

/// A small model with the block options that OLMoE lacks: a dense layer, shared experts, groups, windows.
inline Architecture mixed_architecture() {
  Architecture a = family_defaults("qwen2_moe");
  a.vocab_size = 37;
  a.hidden_size = 16;
  a.expert_intermediate_size = 8;
  a.shared_intermediate_size = 6;
  a.dense_intermediate_size = 10;
  a.num_layers = 3;
  a.dense_layers = {1};
  a.num_attention_heads = 4;
  a.num_key_value_heads = 2;
  a.head_dim = 6;
  a.sliding_window = 3;
  a.windowed_layers = {true, false, true};
  a.num_experts = 6;
  a.top_k = 2;
  a.num_groups = 3;
  a.top_groups = 2;
  a.routed_scale = 1.7;
  a.initializer_range = 0.4;
  return a;
}

/// A small Phi-3.5-MoE: layer norms, biases, sparsemixer, rope factors by length (of packed_batch's, some each).
inline Architecture phi_architecture() {
  Architecture a = family_defaults("phimoe");
  a.vocab_size = 37;
  a.hidden_size = 16;
  a.expert_intermediate_size = 8;
  a.num_layers = 2;
  a.num_attention_heads = 4;
  a.num_key_value_heads = 2;
  a.head_dim = 4;
  a.attention_bias = true;
  a.head_bias = true;
  a.num_experts = 6;
  a.top_k = 2;
  a.router_jitter = 0.3;
  a.rope.type = "longrope";
  a.rope.original_positions = 4;
  a.rope.short_factor = {1.0, 1.5};
  a.rope.long_factor = {2.0, 7.0};
  a.rope.short_scale = 1.1;
  a.rope.long_scale = 1.3;
  a.initializer_range = 0.4;
  return a;
}

/// A small DeepSeek-V2: latent attention, a dense layer, groups, yarn.
inline Architecture deepseek_architecture() {
  Architecture a = mixed_architecture();
  const Architecture family = family_defaults("deepseek_v2");
  a.family = family.family;
  a.model_type = family.model_type;
  a.sparse_from_zero = true;
  a.shared_intermediate_size = 8;
  a.dense_layers = {};
  a.first_dense_layers = 1;
  a.sliding_window = 0;
  a.windowed_layers = {};
  a.num_key_value_heads = 4;
  a.attention_bias = true;
  a.query_rank = 7;
  a.key_value_rank = 6;
  a.plain_head_dim = 3;
  a.rotary_head_dim = 4;
  a.head_dim = 7;
  a.value_head_dim = 5;
  a.rope.type = "yarn";
  a.rope.factor = 4.0;
  a.rope.original_positions = 16;
  a.rope.beta_fast = 2.0;
  a.rope.mscale = 1.0;
  a.rope.mscale_all_dim = 0.8;
  return a;
}

/// A small gpt-oss: sinks, biases, clamped activation that clamps, alternating windows.
inline Architecture gpt_oss_architecture() {
  Architecture a = family_defaults("gpt_oss");
  a.vocab_size = 37;
  a.hidden_size = 32;
  a.expert_intermediate_size = 32;
  a.num_layers = 2;
  a.num_attention_heads = 4;
  a.num_key_value_heads = 2;
  a.head_dim = 6;
  a.sliding_window = 3;
  a.windowed_layers = {true, false};
  a.num_experts = 6;
  a.top_k = 2;
  a.swiglu_limit = 0.8;
  a.initializer_range = 0.3;
  return a;
}

/// Two rows of length 9: two sequences packed; one sequence and padding.
inline TokenBatch packed_batch(const Architecture& a, torch::Device device = torch::kCPU) {
  TokenBatch batch;
  batch.tokens_BS = random_integers(a.vocab_size, {2, 9}, 5).to(device);
  batch.positions_BS =
      torch::tensor({0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 0}, torch::kInt64).view({2, 9}).to(device);
  batch.sequence_ids_BS =
      torch::tensor({0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, -1, -1, -1}, torch::kInt64).view({2, 9}).to(device);
  return batch;
}

/// Leaves only the routers trainable.
inline void freeze_all_but_routers(MoeModel& model) {
  for (torch::Tensor& parameter : model->all_parameters()) {
    parameter.set_requires_grad(false);
  }
  for (torch::Tensor& router : model->routers()) {
    router.set_requires_grad(true);
  }
}

/// A scalar that depends on the hidden state and on everything in the records, with fixed random weights.
inline torch::Tensor probe_loss(const ModelOutput& output, bool hidden = true, bool records = true) {
  torch::Tensor loss;
  const auto add = [&](const torch::Tensor& value, std::uint64_t seed) {
    const torch::Tensor weight = random_normal(value.sizes(), seed).to(value.options());
    const torch::Tensor term = (value * weight).sum().to(torch::kFloat64);
    loss = loss.defined() ? loss + term : term;
  };
  if (hidden) {
    add(output.hidden_BSD, 101);
  }
  if (records) {
    for (std::size_t i = 0; i < output.routing.size(); ++i) {
      add(output.routing[i].logits_TE, 200 + i);
      add(output.routing[i].probabilities_TE, 300 + i);
      add(output.routing[i].weights_TK, 400 + i);
    }
  }
  return loss;
}

}  // namespace hestia::testing
