#include "hestia/kernels/decode_sample.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_checks.hpp"
#include "sample_rules.hpp"

namespace hestia {
namespace {

std::int64_t highest(const float* logits, std::int64_t size) {
  std::uint64_t best = 0;
  for (std::int64_t id = 0; id < size; ++id) {
    best = std::max(best, greedy_key(logits[id], static_cast<std::uint32_t>(id)));
  }
  return greedy_id(best);
}

std::int64_t drawn(const DecodeSampleShape& shape, const float* logits, std::uint64_t bits) {
  const auto size = static_cast<std::uint32_t>(shape.vocabulary);
  float largest = -std::numeric_limits<float>::infinity();
  for (std::uint32_t id = 0; id < size; ++id) {
    largest = logits[id] > largest ? logits[id] : largest;
  }
  const float factor = sample_factor(shape.temperature);
  std::vector<std::uint64_t> weights(size);
  std::vector<std::uint64_t> keys(size);
  std::uint64_t total = 0;
  for (std::uint32_t id = 0; id < size; ++id) {
    const std::uint32_t distance = sample_distance(largest, logits[id], factor);
    weights[id] = sample_weight(distance);
    keys[id] = sample_key(distance, id);
    total += weights[id];
  }
  if (total == 0) {
    return -1;
  }
  if (shape.top_p < 1.0F) {
    const std::uint64_t target = nucleus_target(shape.top_p, total);
    std::sort(keys.begin(), keys.end());
    total = 0;
    for (const std::uint64_t key : keys) {
      std::uint64_t& weight = weights[key & ((1U << kSampleIdBits) - 1)];
      weight = total < target ? weight : 0;
      total += weight;
    }
  }
  const std::uint64_t draw = sample_draw(bits, total);
  std::uint64_t sum = 0;
  std::uint32_t id = 0;
  while (id + 1 < size && (sum += weights[id]) <= draw) {
    ++id;
  }
  return id;
}

}  // namespace

void check_decode_sample(const DecodeSampleShape& shape) {
  check_decode_range("decode sample", "rows of a step", shape.num_tokens, kDecodeMaxRows);
  check_decode_range("decode sample", "the vocabulary", shape.vocabulary, std::int64_t{1} << kSampleIdBits);
  if (!(shape.temperature >= 0.0F && std::isfinite(shape.temperature))) {
    throw std::invalid_argument("decode sample: the temperature must be at least 0, got " +
                                std::to_string(shape.temperature));
  }
  if (!(shape.top_p > 0.0F && shape.top_p <= 1.0F)) {
    throw std::invalid_argument("decode sample: top_p must be above 0 and at most 1, got " +
                                std::to_string(shape.top_p));
  }
}

template <class Index>
void decode_sample_cpu(const DecodeSampleShape& shape, const DecodeSampleInputs& in, Index* ids) {
  check_decode_sample(shape);
  for (std::int64_t t = 0; t < shape.num_tokens; ++t) {
    const float* const logits = in.logits + t * shape.vocabulary;
    ids[t] = static_cast<Index>(shape.temperature == 0.0F
                                    ? highest(logits, shape.vocabulary)
                                    : drawn(shape, logits, sample_bits(in.seed[t], in.step[shape.one_step ? 0 : t])));
  }
}

template void decode_sample_cpu<std::int32_t>(const DecodeSampleShape&, const DecodeSampleInputs&, std::int32_t*);
template void decode_sample_cpu<std::int64_t>(const DecodeSampleShape&, const DecodeSampleInputs&, std::int64_t*);

}  // namespace hestia
