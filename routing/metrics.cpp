#include "hestia/routing/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <span>
#include <stdexcept>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "layer_steps.hpp"

namespace hestia {

namespace {

// Entropy in nats of non-negative `values` scaled to sum 1, over log of their number; 1 for a single value, which
// cannot be uneven. The sum must be positive.
template <class Value>
double normalised_entropy(std::span<const Value> values, double sum) {
  if (values.size() < 2) {
    return 1.0;
  }
  double entropy = 0.0;
  for (const Value value : values) {
    const double share = static_cast<double>(value) / sum;
    if (share > 0.0) {
      entropy -= share * std::log(share);
    }
  }
  return entropy / std::log(static_cast<double>(values.size()));
}

std::size_t checked_size(std::int64_t value, const char* name) {
  if (value < 1) {
    throw std::invalid_argument(fmt::format("routing metrics: {} must be at least 1, got {}", name, value));
  }
  return static_cast<std::size_t>(value);
}

}  // namespace

double expert_overlap_ratio(const RoutingTrace& trace, bool include_prefill) {
  std::vector<std::size_t> last_step_of(static_cast<std::size_t>(trace.num_experts));
  // Whole numbers per size of E_t, so that the ratio is exact up to one division each.
  std::vector<std::int64_t> overlap_by_size(static_cast<std::size_t>(trace.num_experts) + 1, 0);
  std::int64_t pairs = 0;
  for (const LayerSteps& steps : layer_steps(trace, include_prefill)) {
    for (const LayerSequence& sequence : steps.sequences) {
      std::fill(last_step_of.begin(), last_step_of.end(), std::size_t{0});
      // Steps are numbered from 1 here: 0 means not yet used.
      for (std::size_t i = sequence.begin; i < sequence.end; ++i) {
        const std::size_t step = i - sequence.begin + 1;
        const std::span<const std::uint16_t> experts = trace.experts_of(trace.entries[steps.entries[i]]);
        std::int64_t overlap = 0;
        for (const std::uint16_t expert : experts) {
          overlap += step > 1 && last_step_of[expert] == step - 1 ? 1 : 0;
          last_step_of[expert] = step;
        }
        overlap_by_size[experts.size()] += overlap;
        pairs += step > 1 ? 1 : 0;
      }
    }
  }
  double sum = 0.0;
  for (std::size_t size = 1; size < overlap_by_size.size(); ++size) {
    sum += static_cast<double>(overlap_by_size[size]) / static_cast<double>(size);
  }
  return pairs == 0 ? 0.0 : sum / static_cast<double>(pairs);
}

double distinct_experts(const RoutingTrace& trace, bool include_prefill) {
  std::vector<std::size_t> last_sequence_of(static_cast<std::size_t>(trace.num_experts));
  std::int64_t distinct = 0;
  std::size_t num_sequences = 0;
  for (const LayerSteps& steps : layer_steps(trace, include_prefill)) {
    for (const LayerSequence& sequence : steps.sequences) {
      ++num_sequences;
      for (std::size_t i = sequence.begin; i < sequence.end; ++i) {
        for (const std::uint16_t expert : trace.experts_of(trace.entries[steps.entries[i]])) {
          distinct += last_sequence_of[expert] == num_sequences ? 0 : 1;
          last_sequence_of[expert] = num_sequences;
        }
      }
    }
  }
  return num_sequences == 0 ? 0.0 : static_cast<double>(distinct) / static_cast<double>(num_sequences);
}

SegmentRouting segment_routing(const RoutingTrace& trace, std::int64_t segment_length, bool include_prefill) {
  if (segment_length < 1) {
    throw UsageError(fmt::format("segment: must be at least 1 step, got {}; give 1 or more", segment_length));
  }
  // pairs[length][f]: (expert, segment) pairs of segments that long that use the expert f > 0 times.
  std::map<std::size_t, std::vector<std::int64_t>> pairs;
  SegmentRouting result;
  std::vector<std::size_t> uses(static_cast<std::size_t>(trace.num_experts), 0);
  std::vector<std::size_t> since(uses.size(), 0);
  for (const LayerSteps& steps : layer_steps(trace, include_prefill)) {
    for (const LayerSequence& sequence : steps.sequences) {
      const std::size_t num_steps = sequence.end - sequence.begin;
      const auto length = static_cast<std::size_t>(std::min(segment_length, static_cast<std::int64_t>(num_steps)));
      const std::size_t num_segments = num_steps - length + 1;
      result.segments += static_cast<std::int64_t>(num_segments);
      std::vector<std::int64_t>& counts = pairs[length];
      counts.resize(length + 1, 0);
      std::fill(uses.begin(), uses.end(), std::size_t{0});
      std::fill(since.begin(), since.end(), std::size_t{0});
      // An expert's uses stay the same over many segments: they are booked when they change.
      const auto book = [&](std::size_t expert, std::size_t segment) {
        counts[uses[expert]] += static_cast<std::int64_t>(segment - since[expert]);
        since[expert] = segment;
      };
      const auto experts_at = [&](std::size_t step) {
        return trace.experts_of(trace.entries[steps.entries[sequence.begin + step]]);
      };
      for (std::size_t step = 0; step < length; ++step) {
        for (const std::uint16_t expert : experts_at(step)) {
          uses[expert] += 1;
        }
      }
      for (std::size_t segment = 1; segment < num_segments; ++segment) {
        for (const std::uint16_t expert : experts_at(segment - 1)) {
          book(expert, segment);
          uses[expert] -= 1;
        }
        for (const std::uint16_t expert : experts_at(segment - 1 + length)) {
          book(expert, segment);
          uses[expert] += 1;
        }
      }
      for (std::size_t expert = 0; expert < uses.size(); ++expert) {
        book(expert, num_segments);
      }
    }
  }

  struct Group {
    std::int64_t uses = 0;
    std::int64_t length = 0;
    std::int64_t number = 0;
  };
  std::vector<Group> groups;
  std::int64_t all_uses = 0;
  for (const auto& [length, counts] : pairs) {
    for (std::size_t f = 1; f < counts.size(); ++f) {
      if (counts[f] > 0) {
        groups.push_back({static_cast<std::int64_t>(f), static_cast<std::int64_t>(length), counts[f]});
        all_uses += static_cast<std::int64_t>(f) * counts[f];
      }
    }
  }
  // By falling share f / |s|. Equal shares stand together, and only the whole of them can be a threshold's choice; a
  // part of them never scores better than the better of all and none.
  std::sort(groups.begin(), groups.end(),
            [](const Group& a, const Group& b) { return a.uses * b.length > b.uses * a.length; });
  std::int64_t true_positives = 0;
  std::int64_t active = 0;
  for (const Group& group : groups) {
    true_positives += group.uses * group.number;
    active += group.length * group.number;
    const double f1 = 2.0 * static_cast<double>(true_positives) / static_cast<double>(active + all_uses);
    if (f1 >= result.best_performance) {
      result.best_performance = f1;
      result.size_ratio = static_cast<double>(active) / static_cast<double>(all_uses);
    }
  }
  return result;
}

RoutingMetrics::RoutingMetrics(std::int64_t num_layers, std::int64_t num_experts, std::int64_t top_k,
                               const std::vector<std::int64_t>& model_layers, std::int64_t expert_bytes)
    : counts_(checked_size(num_layers, "num_layers") * checked_size(num_experts, "num_experts"), 0) {
  if (model_layers.size() != static_cast<std::size_t>(num_layers)) {
    throw std::invalid_argument(
        fmt::format("routing metrics: {} model layers for {} MoE layers", model_layers.size(), num_layers));
  }
  if (top_k < 1 || top_k > num_experts) {
    throw std::invalid_argument(
        fmt::format("routing metrics: top_k must lie between 1 and {}, got {}", num_experts, top_k));
  }
  trace_.num_experts = num_experts;
  trace_.top_k = top_k;
  for (const std::int64_t layer : model_layers) {
    trace_.layers.push_back({layer, expert_bytes, 0});
    trace_.num_layers = std::max(trace_.num_layers, layer + 1);
  }
}

void RoutingMetrics::add(const SequenceRouting& sequence) {
  const auto num_layers = static_cast<std::size_t>(sequence.num_layers);
  const auto num_tokens = static_cast<std::size_t>(sequence.num_tokens);
  const auto num_experts = static_cast<std::size_t>(sequence.num_experts);
  const auto top_k = static_cast<std::size_t>(sequence.top_k);
  if (!sequence.probabilities.empty() && sequence.probabilities.size() != num_layers * num_tokens * num_experts) {
    throw std::invalid_argument(fmt::format("routing of sequence {}: {} probabilities, expected {} x {} x {}",
                                            sequence.id, sequence.probabilities.size(), num_layers, num_tokens,
                                            num_experts));
  }
  append_sequence(trace_, sequence);
  const auto first_counted = static_cast<std::size_t>(sequence.num_prompt_tokens);
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    std::int64_t* const counts = counts_.data() + layer * num_experts;
    const std::uint16_t* const selected = sequence.selected.data() + layer * num_tokens * top_k;
    for (std::size_t i = first_counted * top_k; i < num_tokens * top_k; ++i) {
      counts[selected[i]] += sequence.is_counted(static_cast<std::int64_t>(i / top_k)) ? 1 : 0;
    }
  }
  num_sequences_ += 1;
  num_counted_ += sequence.num_counted();
}

double RoutingMetrics::expert_overlap_ratio() const {
  return hestia::expert_overlap_ratio(trace_);
}

double RoutingMetrics::distinct_experts() const {
  return hestia::distinct_experts(trace_);
}

UsageStatistics RoutingMetrics::usage() const {
  UsageStatistics statistics;
  const auto num_experts = static_cast<std::size_t>(trace_.num_experts);
  std::size_t used_layers = 0;
  for (std::size_t layer = 0; layer < trace_.layers.size(); ++layer) {
    const std::span<const std::int64_t> counts(counts_.data() + layer * num_experts, num_experts);
    statistics.unused_experts += std::count(counts.begin(), counts.end(), std::int64_t{0});
    double sum = 0.0;
    for (const std::int64_t count : counts) {
      sum += static_cast<double>(count);
    }
    if (sum == 0.0) {
      continue;
    }
    ++used_layers;
    const double mean = sum / static_cast<double>(num_experts);
    double squares = 0.0;
    for (const std::int64_t count : counts) {
      const double deviation = static_cast<double>(count) / mean - 1.0;
      squares += deviation * deviation;
    }
    statistics.normalised_entropy += normalised_entropy(counts, sum);
    statistics.coefficient_of_variation += std::sqrt(squares / static_cast<double>(num_experts));
    statistics.max_share += static_cast<double>(*std::max_element(counts.begin(), counts.end())) / mean;
  }
  if (used_layers > 0) {
    const auto divisor = static_cast<double>(used_layers);
    statistics.normalised_entropy /= divisor;
    statistics.coefficient_of_variation /= divisor;
    statistics.max_share /= divisor;
  }
  return statistics;
}

SegmentRouting RoutingMetrics::segment_routing(std::int64_t segment_length) const {
  return hestia::segment_routing(trace_, segment_length);
}

SimulationCounts RoutingMetrics::simulate_segment_cache(std::int64_t segment_length,
                                                        const SimulationOptions& options) const {
  return hestia::simulate_segment_cache(trace_, segment_length, options);
}

SimulationCounts RoutingMetrics::simulate(const SimulationOptions& options) const {
  return hestia::simulate(trace_, options);
}

}  // namespace hestia
