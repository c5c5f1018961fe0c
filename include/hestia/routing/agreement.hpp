#pragma once

#include <cstdint>
#include <span>

#include "hestia/routing/layout.hpp"

namespace hestia {

/// Kendall's tau-b of two score lists over the same items: (concordant - discordant pairs) / sqrt(pairs untied in `x` *
/// pairs untied in `y`), in [-1, 1]; NaN when either list has no untied pair. O(n log n) (Knight 1966). Throws
/// std::invalid_argument when the lengths differ.
[[nodiscard]] double kendall_tau(std::span<const float> x, std::span<const float> y);

/// Streams how far two routers agree on the same tokens. Every counted token of every layer weighs the same; kept are
/// sums. Not thread-safe.
class RouterAgreement {
 public:
  /// Adds one sequence seen by both routers, with probabilities (any score in the routers' order does). Throws
  /// std::invalid_argument when the two differ in id, prompt, length or shape, or lack probabilities, and adds nothing
  /// then.
  void add(const SequenceRouting& reference, const SequenceRouting& tuned);

  /// Mean over counted tokens and layers of kendall_tau over all E probabilities; rows where it is undefined (all
  /// equal) are left out. NaN when no row is left.
  [[nodiscard]] double kendall_tau() const;
  /// Mean over counted tokens and layers of |E_reference n E_tuned| / K. NaN when nothing was counted.
  [[nodiscard]] double top_k_agreement() const;
  /// Counted tokens over all sequences.
  [[nodiscard]] std::int64_t num_counted() const noexcept { return num_counted_; }

 private:
  double tau_sum_ = 0.0;
  std::int64_t tau_rows_ = 0;
  double agreement_sum_ = 0.0;
  std::int64_t rows_ = 0;
  std::int64_t num_counted_ = 0;
};

}  // namespace hestia
