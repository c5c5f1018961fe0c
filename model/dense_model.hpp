#pragma once

#include <cstdint>
#include <vector>

#include <torch/types.h>

#include "hestia/architecture/dense_checkpoint.hpp"

namespace hestia {

/// The float32 forward of a dense Llama model on the CPU, one position of B sequences at a time. Its key-value cache
/// grows with every step. For measuring and sampling: no gradients, no batches of unequal length.
class DenseModel {
 public:
  /// Copies the weights. Throws UsageError for rotary scaling other than none and linear.
  explicit DenseModel(const DenseCheckpoint& checkpoint);
  /// Logits [B, V] after the next token of every sequence, `tokens_B` int64.
  torch::Tensor step(const torch::Tensor& tokens_B);
  /// What the feed-forward network of every layer took in at the last step, [B, D] each.
  [[nodiscard]] const std::vector<torch::Tensor>& feed_forward_inputs() const noexcept { return feed_forward_inputs_; }

 private:
  struct Layer {
    torch::Tensor input_norm, query, key, value, output, feed_forward_norm, gate, up, down;
    torch::Tensor keys_BHTd, values_BHTd;  ///< Undefined before the first step.
  };
  [[nodiscard]] torch::Tensor norm(const torch::Tensor& x, const torch::Tensor& weight) const;
  [[nodiscard]] torch::Tensor rotate(const torch::Tensor& x_BHd) const;

  DenseArchitecture architecture_;
  double rope_factor_ = 1.0;
  torch::Tensor embedding_, final_norm_, head_;
  std::vector<Layer> layers_;
  std::vector<torch::Tensor> feed_forward_inputs_;
  std::int64_t position_ = 0;
};

}  // namespace hestia
