#include "hestia/routing/agreement.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <fmt/format.h>

namespace hestia {

namespace {

// Number of pairs among n items.
double pairs_of(std::int64_t n) {
  return 0.5 * static_cast<double>(n) * static_cast<double>(n - 1);
}

// Pairs of equal neighbours' runs: `same(i)` tells whether item i equals item i - 1.
template <class Same>
double tied_pairs(std::size_t n, const Same& same) {
  double pairs = 0.0;
  std::int64_t run = 1;
  for (std::size_t i = 1; i <= n; ++i) {
    if (i < n && same(i)) {
      ++run;
    } else {
      pairs += pairs_of(run);
      run = 1;
    }
  }
  return pairs;
}

// Sorts `values` upwards and returns how many pairs stood in strictly falling order.
std::int64_t sort_counting_inversions(std::vector<float>& values) {
  std::vector<float> merged(values.size());
  std::int64_t inversions = 0;
  for (std::size_t width = 1; width < values.size(); width *= 2) {
    for (std::size_t begin = 0; begin < values.size(); begin += 2 * width) {
      const std::size_t middle = std::min(begin + width, values.size());
      const std::size_t end = std::min(begin + 2 * width, values.size());
      std::size_t left = begin;
      std::size_t right = middle;
      for (std::size_t out = begin; out < end; ++out) {
        if (right == end || (left < middle && values[left] <= values[right])) {
          merged[out] = values[left++];
        } else {
          inversions += static_cast<std::int64_t>(middle - left);
          merged[out] = values[right++];
        }
      }
    }
    values.swap(merged);
  }
  return inversions;
}

void check_pair(const SequenceRouting& reference, const SequenceRouting& tuned) {
  const auto mismatch = [&](const char* what, std::int64_t a, std::int64_t b) {
    return std::invalid_argument(
        fmt::format("router agreement: {} differs in sequence {}: {} and {}", what, reference.id, a, b));
  };
  if (reference.id != tuned.id) {
    throw mismatch("id", reference.id, tuned.id);
  }
  if (reference.num_tokens != tuned.num_tokens) {
    throw mismatch("number of tokens", reference.num_tokens, tuned.num_tokens);
  }
  if (reference.num_prompt_tokens != tuned.num_prompt_tokens) {
    throw mismatch("number of prompt tokens", reference.num_prompt_tokens, tuned.num_prompt_tokens);
  }
  if (reference.num_layers != tuned.num_layers) {
    throw mismatch("number of layers", reference.num_layers, tuned.num_layers);
  }
  if (reference.num_experts != tuned.num_experts) {
    throw mismatch("number of experts", reference.num_experts, tuned.num_experts);
  }
  if (reference.top_k != tuned.top_k) {
    throw mismatch("top_k", reference.top_k, tuned.top_k);
  }
  for (const SequenceRouting* routing : {&reference, &tuned}) {
    const std::int64_t rows = routing->num_layers * routing->num_tokens;
    if (routing->num_prompt_tokens < 0 || routing->num_prompt_tokens > routing->num_tokens) {
      throw std::invalid_argument(fmt::format("router agreement: sequence {} has {} prompt tokens of {}", routing->id,
                                              routing->num_prompt_tokens, routing->num_tokens));
    }
    if (routing->selected.size() != static_cast<std::size_t>(rows * routing->top_k) ||
        routing->probabilities.size() != static_cast<std::size_t>(rows * routing->num_experts)) {
      throw std::invalid_argument(fmt::format(
          "router agreement: sequence {} has {} selections and {} probabilities, expected {} and {}", routing->id,
          routing->selected.size(), routing->probabilities.size(), rows * routing->top_k, rows * routing->num_experts));
    }
    if (!routing->counted.empty() && routing->counted.size() != static_cast<std::size_t>(routing->num_tokens)) {
      throw std::invalid_argument(fmt::format("router agreement: sequence {} has {} flags of counted tokens for {}",
                                              routing->id, routing->counted.size(), routing->num_tokens));
    }
  }
  if (reference.counted != tuned.counted) {
    throw mismatch("which tokens count", reference.num_counted(), tuned.num_counted());
  }
}

}  // namespace

double kendall_tau(std::span<const float> x, std::span<const float> y) {
  if (x.size() != y.size()) {
    throw std::invalid_argument(fmt::format("kendall_tau: {} and {} scores", x.size(), y.size()));
  }
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return x[a] != x[b] ? x[a] < x[b] : y[a] < y[b]; });
  const double tied_x = tied_pairs(order.size(), [&](std::size_t i) { return x[order[i]] == x[order[i - 1]]; });
  const double tied_both = tied_pairs(
      order.size(), [&](std::size_t i) { return x[order[i]] == x[order[i - 1]] && y[order[i]] == y[order[i - 1]]; });
  std::vector<float> sorted;
  sorted.reserve(order.size());
  for (const std::size_t item : order) {
    sorted.push_back(y[item]);
  }
  // Ties of x stand by rising y, so an inversion is a discordant pair.
  const auto discordant = static_cast<double>(sort_counting_inversions(sorted));
  const double tied_y = tied_pairs(sorted.size(), [&](std::size_t i) { return sorted[i] == sorted[i - 1]; });
  const double all = pairs_of(static_cast<std::int64_t>(x.size()));
  if (all == tied_x || all == tied_y) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  const double concordant = all - tied_x - tied_y + tied_both - discordant;
  return (concordant - discordant) / std::sqrt((all - tied_x) * (all - tied_y));
}

void RouterAgreement::add(const SequenceRouting& reference, const SequenceRouting& tuned) {
  check_pair(reference, tuned);
  const auto num_experts = static_cast<std::size_t>(tuned.num_experts);
  const auto top_k = static_cast<std::size_t>(tuned.top_k);
  const auto first_counted = static_cast<std::size_t>(tuned.num_prompt_tokens);
  const auto num_tokens = static_cast<std::size_t>(tuned.num_tokens);
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(tuned.num_layers); ++layer) {
    for (std::size_t token = first_counted; token < num_tokens; ++token) {
      if (!tuned.is_counted(static_cast<std::int64_t>(token))) {
        continue;
      }
      const std::size_t row = layer * num_tokens + token;
      const std::span<const std::uint16_t> chosen(tuned.selected.data() + row * top_k, top_k);
      std::int64_t common = 0;
      for (std::size_t k = 0; k < top_k; ++k) {
        common += std::count(chosen.begin(), chosen.end(), reference.selected[row * top_k + k]);
      }
      agreement_sum_ += static_cast<double>(common) / static_cast<double>(top_k);
      rows_ += 1;
      const double tau = hestia::kendall_tau({reference.probabilities.data() + row * num_experts, num_experts},
                                             {tuned.probabilities.data() + row * num_experts, num_experts});
      if (!std::isnan(tau)) {
        tau_sum_ += tau;
        tau_rows_ += 1;
      }
    }
  }
  num_counted_ += tuned.num_counted();
}

double RouterAgreement::kendall_tau() const {
  return tau_rows_ == 0 ? std::numeric_limits<double>::quiet_NaN() : tau_sum_ / static_cast<double>(tau_rows_);
}

double RouterAgreement::top_k_agreement() const {
  return rows_ == 0 ? std::numeric_limits<double>::quiet_NaN() : agreement_sum_ / static_cast<double>(rows_);
}

}  // namespace hestia
