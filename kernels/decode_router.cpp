#include "hestia/kernels/decode_router.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_checks.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

/// K experts each, by falling score.
struct Choice {
  std::vector<std::int32_t> plain;  ///< By the score alone.
  std::vector<std::int32_t> selected;
};

Choice choose(const DecodeRouterShape& shape, float bonus, const float* logits, const std::int32_t* slot_of) {
  std::vector<float> scores(logits, logits + shape.num_experts);
  if (slot_of != nullptr && routes_by_weight(shape.score, bonus, shape.always_keep, shape.top_k)) {
    weight_scores(shape.score, logits, shape.num_experts, scores.data());
  }
  std::vector<ResidencyCandidate> experts;
  for (std::int32_t e = 0; e < shape.num_experts; ++e) {
    const std::int32_t own = ordered_logit(scores[static_cast<std::size_t>(e)]);
    experts.push_back({own, own, e});
  }
  const auto top = experts.begin() + shape.top_k;
  const auto rest = experts.begin() + std::min(shape.always_keep, shape.top_k);
  const auto best = [&] {
    std::vector<std::int32_t> ids;
    std::transform(experts.begin(), top, std::back_inserter(ids), [](const auto& c) { return c.expert; });
    return ids;
  };
  Choice choice;
  std::sort(experts.begin(), experts.end(), chosen_before);
  choice.plain = best();
  for (auto candidate = rest; candidate != experts.end(); ++candidate) {
    if (slot_of != nullptr && slot_of[candidate->expert] >= 0) {
      candidate->adjusted = ordered_logit(scores[static_cast<std::size_t>(candidate->expert)] + bonus);
    }
  }
  std::sort(rest, experts.end(), chosen_before);
  std::for_each(experts.begin(), top, [](ResidencyCandidate& c) { c.adjusted = c.own; });
  std::sort(experts.begin(), top, chosen_before);
  choice.selected = best();
  return choice;
}

}  // namespace

void check_decode_router(const DecodeRouterShape& shape) {
  check_decode_range("decode router", "rows of a step", shape.num_tokens, kDecodeMaxRows);
  check_decode_multiple("decode router", "the hidden size", shape.hidden_size, 8);
  check_decode_range("decode router", "experts", shape.num_experts, 512);
  check_decode_range("decode router", "experts per token", shape.top_k, std::min<std::int64_t>(32, shape.num_experts));
  if (shape.always_keep < 0 || !(shape.bonus >= 0.0F && std::isfinite(shape.bonus))) {
    throw std::invalid_argument("decode router: the prior needs always_keep and bonus of at least 0, got " +
                                std::to_string(shape.always_keep) + " and " + std::to_string(shape.bonus));
  }
}

void check_router_guess(const DecodeRouterShape& shape, const DecodeRouterInputs& in) {
  if (in.guess == nullptr) {
    return;
  }
  if (shape.num_tokens != 1) {
    throw std::invalid_argument("decode router: guesses in a step of one token, got " +
                                std::to_string(shape.num_tokens));
  }
  if (in.guess->slot_of == nullptr || in.guess->state == nullptr) {
    throw std::invalid_argument("decode router: a guess needs the next layer's slots and a place to be put, got none");
  }
  if ((in.guess->forced == nullptr) != (in.forced == nullptr)) {
    throw std::invalid_argument("decode router: either both layers' choices come from a trace or none");
  }
}

void check_router_slots(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out) {
  if (out.slots != nullptr && in.slot_of == nullptr) {
    throw std::invalid_argument("decode router: slots of the selected need the table of the slot cache, got none");
  }
  if (in.fetch != nullptr) {
    if (out.slots == nullptr) {
      throw std::invalid_argument("decode router: serving a step needs the slots of the selected, got none");
    }
    check_decode_fetch(shape.num_tokens, shape.top_k, *in.fetch);
  }
}

void rms_norm_row(const std::uint16_t* x, const std::uint16_t* weight, std::int64_t size, float eps, DecodeNorm norm,
                  std::uint16_t* out) {
  float sum = 0.0F;
  for (std::int64_t i = 0; i < size; ++i) {
    const float value = bfloat16_bits_to_float(x[i]);
    sum += value * value;
  }
  const float inverse = 1.0F / std::sqrt(sum / static_cast<float>(size) + eps);
  for (std::int64_t i = 0; i < size; ++i) {
    float normal = bfloat16_bits_to_float(x[i]) * inverse;
    if (norm == DecodeNorm::kRms) {
      normal = bfloat16_bits_to_float(float_to_bfloat16_bits(normal));
    }
    out[i] = float_to_bfloat16_bits(normal * bfloat16_bits_to_float(weight[i]));
  }
}

namespace {

void guess_next(DecodeRouterShape shape, const DecodeRouterInputs& in) {
  const DecodeGuess& guess = *in.guess;
  DecodeRouterInputs next = in;
  next.norm_weight = guess.norm_weight;
  next.router = guess.router;
  next.bias = nullptr;
  next.slot_of = guess.slot_of;
  next.forced = guess.forced;
  next.fetch = nullptr;
  next.guess = nullptr;
  shape.bonus = guess.bonus;
  next.strength = guess.strength;
  DecodeRouterOutputs out = guess.scratch;
  std::vector<std::uint16_t> normal(static_cast<std::size_t>(shape.hidden_size));
  out.normal = normal.data();
  decode_router_cpu(shape, next, out);
  PrefetchState& state = *guess.state;
  const std::vector<std::int32_t> selected(out.selected, out.selected + shape.top_k);
  const auto missing =
      std::find_if(selected.begin(), selected.end(), [&](std::int32_t expert) { return guess.slot_of[expert] < 0; });
  const bool found = missing != selected.end();
  state.tag = state.tag % kPrefetchTags + 1;
  state.guesses[guess.layer % 2] = {found ? static_cast<std::uint32_t>(*missing) + 1 : 0U, state.tag};
  state.counts.guesses += found ? 1 : 0;
}

}  // namespace

void decode_router_cpu(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out) {
  check_decode_router(shape);
  check_router_slots(shape, in, out);
  check_router_guess(shape, in);
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    std::uint16_t* const normal = out.normal + t * shape.hidden_size;
    float* const logits = out.logits + t * shape.num_experts;
    float* const probabilities = out.probabilities + t * shape.num_experts;
    rms_norm_row(in.hidden + t * shape.hidden_size, in.norm_weight, shape.hidden_size, shape.norm_eps, shape.norm,
                 normal);
    for (std::int64_t e = 0; e < shape.num_experts; ++e) {
      float sum = 0.0F;
      for (std::int64_t i = 0; i < shape.hidden_size; ++i) {
        sum += in.router[e * shape.hidden_size + i] * bfloat16_bits_to_float(normal[i]);
      }
      logits[e] = in.bias == nullptr ? sum : sum + in.bias[e];
    }
    const float largest = *std::max_element(logits, logits + shape.num_experts);
    float total = 0.0F;
    for (std::int64_t e = 0; e < shape.num_experts; ++e) {
      probabilities[e] = std::exp(logits[e] - largest);
      total += probabilities[e];
    }
    std::for_each(probabilities, probabilities + shape.num_experts, [&](float& p) { p /= total; });
    Choice choice = choose(shape, bonus_at(shape.bonus, in.strength, t), logits, in.slot_of);
    std::vector<std::int32_t>& selected = choice.selected;
    if (in.forced != nullptr) {
      const std::int64_t* const row = in.forced + (*in.step % in.num_forced * shape.num_tokens + t) * shape.top_k;
      std::copy(row, row + shape.top_k, selected.begin());
    }
    const auto mass = [&](const std::vector<std::int32_t>& experts) {
      return std::accumulate(experts.begin(), experts.end(), 0.0F,
                             [&](float sum, std::int32_t e) { return sum + probabilities[e]; });
    };
    const float chosen = mass(selected);
    const bool scaled = scales_weights(shape, in);
    const float ratio = scaled ? mass(choice.plain) / std::max(chosen, std::numeric_limits<float>::min()) : 1.0F;
    for (std::int64_t k = 0; k < shape.top_k; ++k) {
      out.selected[t * shape.top_k + k] = selected[k];
      if (out.slots != nullptr) {
        out.slots[t * shape.top_k + k] = in.slot_of[selected[k]];
      }
      const float weight = probabilities[selected[k]] * ratio;
      out.weights[t * shape.top_k + k] = (shape.normalise_top_k ? weight / chosen : weight) * shape.routed_scale;
    }
  }
  if (in.guess != nullptr) {
    guess_next(shape, in);
  }
}

}  // namespace hestia
