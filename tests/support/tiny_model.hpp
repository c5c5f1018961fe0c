#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "hestia/core/random.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia::testing {

/// A random model of a family, of a few thousand parameters.
inline Architecture tiny_architecture(const std::string& family = "olmoe") {
  Architecture architecture = family_defaults(family);
  architecture.dense_intermediate_size = 24;
  architecture.shared_intermediate_size = family == "qwen2_moe" ? 24 : 0;
  architecture.attention_bias = architecture.attention_bias || family == "phimoe";
  architecture.head_bias = family == "phimoe";
  if (family == "deepseek_v2") {
    architecture.first_dense_layers = 1;
    architecture.shared_intermediate_size = 32;
    architecture.key_value_rank = 12;
    architecture.plain_head_dim = 8;
    architecture.rotary_head_dim = 4;
    architecture.value_head_dim = 8;
  }
  if (family == "gpt_oss") {
    architecture.swiglu_limit = 0.8;
    architecture.sliding_window = 5;
    architecture.windowed_layers = {true, false};
  }
  architecture.vocab_size = 48;
  architecture.hidden_size = 32;
  architecture.expert_intermediate_size = 16;
  architecture.num_layers = 2;
  architecture.num_attention_heads = 4;
  architecture.num_key_value_heads = 4;
  architecture.head_dim = family == "deepseek_v2" ? 12 : 8;
  architecture.num_experts = 8;
  architecture.top_k = 2;
  architecture.max_position_embeddings = 128;
  architecture.initializer_range = 0.2;
  return architecture;
}

/// Norms and biases off their initial values.
inline void move_vectors(MoeModel& model) {
  const torch::NoGradGuard no_grad;
  std::int64_t place = 0;
  for (auto& [name, tensor] : model->named_tensors()) {
    if (tensor.dim() == 1) {
      tensor.add_(torch::arange(tensor.size(0)).add(++place).sin().mul(0.3).to(tensor.options()));
    }
  }
}

inline MoeModel tiny_model(std::uint64_t seed = 3, torch::Dtype dtype = torch::kFloat32,
                           torch::Device device = torch::kCPU) {
  return create_model(tiny_architecture(), dtype, device, seed);
}

/// Two domains of random token sequences with a learnable pattern (each token tends to follow its predecessor).
inline PackedData tiny_data(std::uint64_t seed, std::int64_t num_sequences, std::int64_t max_length) {
  SplitMix64 random(seed);
  PackedData data;
  data.domains = {"alpha", "beta"};
  for (std::int64_t i = 0; i < num_sequences; ++i) {
    TokenSequence sequence;
    sequence.domain = static_cast<std::int32_t>(i % 2);
    const auto length = static_cast<std::int64_t>(2 + random.below(static_cast<std::uint64_t>(max_length - 1)));
    auto token = static_cast<std::int32_t>(random.below(48));
    for (std::int64_t t = 0; t < length; ++t) {
      sequence.tokens.push_back(token);
      token = random.uniform() < 0.7 ? (token + 1 + sequence.domain) % 48 : static_cast<std::int32_t>(random.below(48));
    }
    sequence.num_bytes = 3 * (length - 1);
    data.sequences.push_back(std::move(sequence));
  }
  return data;
}

}  // namespace hestia::testing
