#pragma once

// Letters: L MoE layers, S tokens (flat), E experts, K experts per token, C slots per layer.

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <torch/types.h>

#include "hestia/core/json_lines.hpp"
#include "hestia/routing/cache_policy.hpp"
#include "hestia/routing/layout.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia {

/// Router logits that some framework wrote down, on the CPU. float64 stays float64, every other type is float32.
struct RoutingDump {
  std::filesystem::path path;
  torch::Tensor logits_LSE;       ///< z of the router under test.
  torch::Tensor base_logits_LSE;  ///< z of the base router, the type of logits_LSE; undefined when not in the file.
  torch::Tensor selected_LSK;     ///< int64, the experts served, by falling logit (equal logits: lower index first).
  SequenceLayout layout;          ///< Sequence of every token and whether it counts.
};

/// Reads a dump from a safetensors file: `router_logits` [L, S, E] (any float type), optional `base_router_logits`
/// [L, S, E], optional `selected` [L, S, K] (any integer type; else the K highest logits, ties to the lower index),
/// optional `sequence_ids` int64 [S] (negative: padding; else all tokens are one sequence), optional `counted` uint8 or
/// bool [S] (else every token counts). K is `top_k` when positive, else the metadata string `top_k`, else the size of
/// `selected`. Throws InputError that names file, tensor and value for: a damaged file, a missing or misshapen tensor,
/// a wrong type, K missing or above E, experts out of range or repeated, a sequence that comes back after it ended, and
/// logits that are not finite at a token that is no padding.
[[nodiscard]] RoutingDump read_routing_dump(const std::filesystem::path& path, std::int64_t top_k = 0);

/// The served experts of the dump as a trace: tokens that count are decode steps, the others of a sequence prefill;
/// weights are softmax(z), in float32. Padding is left out.
[[nodiscard]] RoutingTrace trace_of(const RoutingDump& dump);

/// What to compute of a dump.
struct ScoreOptions {
  RoutingLossOptions losses;  ///< Weights do not matter: every term is reported unweighted.
  std::int64_t slots = 0;     ///< C of the cache policies, and of cache_simulation unless that sets its own; 0: E/4.
  std::vector<CachePolicyKind> policies;
  double gamma = 0.9;      ///< Discount of the policy gamma.
  bool gradients = false;  ///< Also d value / d logits of every term.
};

/// Every objective and routing metric of a dump.
struct Score {   // NOLINT(bugprone-exception-escape): nlohmann moves objects without a noexcept
  Json losses;   ///< Value by registry name: mean over layers of sum / count; null when the term cannot be computed.
  Json skipped;  ///< Reason by name of every term that is null.
  Json metrics;  ///< eor, distinct, and per policy its integer counts.
  std::vector<std::pair<std::string, torch::Tensor>> gradients;  ///< Name and [L, S, E], in the type of the logits.
};

/// Computes everything in the type of the logits. A term that needs base logits is skipped, with the reason, when the
/// dump has none. Throws UsageError when an option does not fit the dump (slots above E).
[[nodiscard]] Score score(const RoutingDump& dump, const ScoreOptions& options);

}  // namespace hestia
