#pragma once

#include <cstddef>
#include <cstdint>

#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/routing/residency.hpp"

namespace hestia {

/// Where an RMSNorm rounds to bfloat16. inverse = 1 / sqrt(mean(x^2) + eps) and x * inverse are float32.
enum class DecodeNorm : std::int32_t {
  kRms,     ///< bfloat16(bfloat16(x * inverse) * weight)
  kRmsWide  ///< bfloat16(x * inverse * weight)
};

/// Sizes and rule of one layer's router in a decode step.
struct DecodeRouterShape {
  std::int64_t num_tokens = 0;   ///< T, from 1
  std::int64_t hidden_size = 0;  ///< H, a multiple of 8
  std::int64_t num_experts = 0;  ///< E, 1 to 512
  std::int64_t top_k = 0;        ///< K, 1 to min(E, 32)
  DecodeNorm norm = DecodeNorm::kRms;
  float norm_eps = 1e-5F;
  bool normalise_top_k = false;  ///< Mixing weights are divided by their sum.
  float routed_scale = 1.0F;     ///< Then multiplied by this.
  /// Residency-aware routing (hestia/routing/residency.hpp): added to the score of a resident expert; 0 is plain Top-K,
  /// bit by bit.
  float bonus = 0.0F;
  std::int64_t always_keep = 0;  ///< J: experts chosen by the score alone before residency has a say.
  ResidencyScore score = ResidencyScore::kLogit;
  /// Under a prior, and without normalise_top_k: weights are scaled to the sum that those of plain Top-K have.
  bool preserve_mass = false;
  /// The kernel may start before the one before it on the stream has ended; it awaits that end itself, the router's
  /// weights already on their way. So that kernel must not write `router`. Compute capability 9.0 or higher; no effect
  /// on the CPU.
  bool dependent = false;
};

struct DecodeGuess;

/// What goes in. bfloat16 values are their bits.
struct DecodeRouterInputs {
  const std::uint16_t* hidden = nullptr;       ///< bfloat16 [T, H], before the norm
  const std::uint16_t* norm_weight = nullptr;  ///< bfloat16 [H]
  const float* router = nullptr;               ///< float32 [E, H]
  const float* bias = nullptr;                 ///< float32 [E]; null: none
  /// int32 [E], the slot where the layer's slot cache holds the expert before this step, negative: nowhere; all tokens
  /// see the same. Null: no cache.
  const std::int32_t* slot_of = nullptr;
  /// float32 [T], at least 0: times which the bonus counts in each row, 0 plain Top-K; null: 1.
  const float* strength = nullptr;
  /// int64 [S, T, K]: expert ids, below E, that are selected in place of the rule's, from row `*step` modulo S on, in
  /// their order (a trace that is replayed); they weigh what the router says of them. Null: none.
  const std::int64_t* forced = nullptr;
  std::int64_t num_forced = 0;         ///< S
  const std::int64_t* step = nullptr;  ///< int64 [1], from 0
  /// In a step of one token in which a selected expert has no slot, the kernel serves the slot cache and asks for the
  /// copies, so that these begin before decode_fetch_gate_up_cuda does, which must be given the same and comes next.
  /// Its `selected` and `hit_slots` are the router's outputs. Null, or a hidden size beyond 6144: that kernel serves
  /// every step. `slots` must be written then. The CPU checks it and does no more.
  const DecodeFetch* fetch = nullptr;
  /// In a step of one token: guesses what the next layer will miss, too. Null: does not.
  const DecodeGuess* guess = nullptr;
};

/// Whether mixing weights are scaled to the sum of plain Top-K's: where a prior has a say and no trace chooses.
[[nodiscard]] HESTIA_HOST_DEVICE inline bool scales_weights(const DecodeRouterShape& shape,
                                                            const DecodeRouterInputs& in) {
  return shape.preserve_mass && !shape.normalise_top_k && shape.bonus > 0.0F && shape.always_keep < shape.top_k &&
         in.slot_of != nullptr && in.forced == nullptr;
}

/// What comes out, each overwritten.
struct DecodeRouterOutputs {
  std::uint16_t* normal = nullptr;   ///< bfloat16 [T, H], the normalised hidden state
  float* logits = nullptr;           ///< float32 [T, E]
  float* probabilities = nullptr;    ///< float32 [T, E], softmax of the logits
  std::int32_t* selected = nullptr;  ///< int32 [T, K], by falling score, ties to the lower index, also under a prior
  float* weights = nullptr;          ///< float32 [T, K], their mixing weights, from the probabilities
  std::int32_t* slots = nullptr;     ///< int32 [T, K], slot_of of the selected; null: not written
};

/// The next layer's gate, asked too early: its choice for this layer's hidden state, by the same rule and sizes. The
/// guess is the first of the chosen, by falling score, that has no slot; hidden states of neighbouring layers are alike
/// (A. Eliseev and D. Mazur, Fast Inference of Mixture-of-Experts Language Models with Offloading, arXiv:2312.17238,
/// prefetch so). All pointers as in DecodeRouterInputs, of the next layer; it has no bias.
struct DecodeGuess {
  const std::uint16_t* norm_weight = nullptr;
  const float* router = nullptr;
  const std::int32_t* slot_of = nullptr;  ///< Nobody else may write it meanwhile: slots are not shared by layers.
  const std::int64_t* forced = nullptr;   ///< What a trace chooses in the next layer, of the same steps: always right.
  float bonus = 0.0F;                     ///< In place of the shape's.
  const float* strength = nullptr;        ///< float32 [1], times which it counts; null: 1.
  std::int64_t layer = 0;                 ///< Number of the next layer among those with experts.
  PrefetchState* state = nullptr;         ///< Gets the guess, and its count.
  CopyRequest* request = nullptr;         ///< Is told of it, after the layer's own loads where the router serves.
  DecodeRouterOutputs scratch = {};       ///< Written but for `normal`, and `slots`, which may be null.
};

/// RMSNorm, router product, softmax and Top-K: normal = rmsnorm(hidden), logits = router normal + bias,
/// weights = probabilities of the selected, normalised and scaled as the shape says; with `preserve_mass` under a prior
/// first times (sum of the probabilities of the K highest by score) / (sum of those of the selected). The first min(J,
/// K) experts are the highest by score, which is the logit unless a prior is by weight or root; the others the best of
/// the rest by chosen_before of hestia/routing/residency.hpp. CPU, synchronous, one thread. Throws
/// std::invalid_argument when a size is none of the above, and for a `guess` in a step of several tokens, without slots
/// or a place, or with a trace for one of the layers only.
void decode_router_cpu(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out);

/// Bytes of device memory that decode_router_cuda counts in: zero before the first call, and zero again after each.
[[nodiscard]] std::size_t decode_router_workspace(const DecodeRouterShape& shape);

/// The same on the GPU: device pointers (hidden, norm_weight, router and normal aligned to 16), asynchronous on
/// `stream` (a cudaStream_t) of the current device, one kernel, no allocation, fit for capture in a graph. One warp per
/// token and expert; the block of a token that ends last chooses. A token's results do not depend on T. Throws
/// std::invalid_argument as the CPU and for a `fetch` that decode_fetch_gate_up_cuda does not take, and RunError with
/// the CUDA error when the launch fails, or when Hestia was built without its CUDA kernels.
void decode_router_cuda(const DecodeRouterShape& shape, const DecodeRouterInputs& in, const DecodeRouterOutputs& out,
                        void* workspace, void* stream);

}  // namespace hestia
