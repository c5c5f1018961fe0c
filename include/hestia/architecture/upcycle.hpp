#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string_view>
#include <vector>

#include "hestia/architecture/dense_checkpoint.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// How the router of an upcycled model starts.
enum class UpcycleStart {
  kGrouped,  ///< All shards of a copy share a router vector: the dense function, exactly.
  kSigned    ///< Vectors g_k + .15 d_{k,s} and g_k - .15 d_{k,s}: any mixture of copies, every shard covered.
};

/// First and second moment of what one layer's router sees, the output of post_attention_layernorm.
struct RouterInput {
  std::vector<float> mean;  ///< [D]
  double variance = 1.0;    ///< Mean over the D components of their variance.
};

/// Settings of `upcycle`. With K = `top_k`, copies = `num_experts` / K.
struct UpcycleOptions {
  std::int64_t num_experts = 64;
  std::int64_t top_k = 8;  ///< Also the number of shards.
  UpcycleStart start = UpcycleStart::kGrouped;
  std::uint64_t seed = 1;
  DType dtype = DType::kBF16;              ///< F32, BF16 or F16.
  std::vector<RouterInput> router_inputs;  ///< One per layer; needed by kSigned.
  bool quiet = false;                      ///< No progress bar.
};

/// "grouped" or "signed" -> start. Throws UsageError with the known names.
[[nodiscard]] UpcycleStart upcycle_start_from_name(std::string_view name);

/// One shard of a feed-forward network, an expert's weights.
struct FeedForwardShard {
  std::vector<float> gate;  ///< [F/K, D], w1 in Mixtral.
  std::vector<float> up;    ///< [F/K, D], w3.
  std::vector<float> down;  ///< [D, F/K], w2: K times the dense columns.
};

/// Cuts y = W_down (silu(W_gate h) * W_up h) into K shards of F/K neurons each. The mean of the shards' outputs is the
/// dense output, because K is folded into `down` and a router that weighs K experts alike gives each 1/K.
/// `gate`, `up` [F, D] and `down` [D, F] row-major. Throws std::invalid_argument for sizes that do not match or divide.
[[nodiscard]] std::vector<FeedForwardShard> split_feed_forward(const std::vector<float>& gate,
                                                               const std::vector<float>& up,
                                                               const std::vector<float>& down, std::int64_t hidden_size,
                                                               std::int64_t num_shards);

/// The router [E, D] of one layer, row-major; expert c K + s is shard s of copy c. Directions are Gaussian, orthogonal
/// to `input.mean` and of length variance^(-1/2), so that a logit has standard deviation 1.
/// Grouped: copy c has g_c in all its K rows. Signed: copies 2k and 2k + 1 have g_k + .15 d_{k,s} and g_k - .15
/// d_{k,s}, so that each shard of the k that wins picks its own sign. `seed` is that of this layer.
[[nodiscard]] std::vector<float> upcycled_router(const UpcycleOptions& options, const RouterInput& input,
                                                 std::uint64_t seed);

/// Throws UsageError with every setting that `architecture` does not allow: E a multiple of K (an even one for the
/// signed start), the feed-forward size a multiple of K, a dtype of the three.
void check_upcycle(const DenseArchitecture& architecture, const UpcycleOptions& options);

/// Writes `output`, a Hugging Face directory of Mixtral layout (config.json, safetensors; no tokenizer): attention,
/// norms and embeddings of the dense model, its feed-forward networks as experts, weights renormalised over the chosen.
/// Expert copies share memory, one shard of the output is held at a time, and `output` appears whole or not at all.
/// `extra` is called with the folder before that, to add other files. Throws as check_upcycle does; UsageError when
/// `output` exists and is not an empty folder; RunError naming what could not be written.
void upcycle(const DenseCheckpoint& dense, const UpcycleOptions& options, const std::filesystem::path& output,
             const std::function<void(const std::filesystem::path& folder)>& extra = {});

}  // namespace hestia
