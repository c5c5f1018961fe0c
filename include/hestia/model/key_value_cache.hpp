#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <torch/types.h>

namespace hestia {

/// Keys and values of the tokens so far, for decoding token by token: one sequence per row of a batch, all rows of the
/// same length. Memory for the whole capacity is taken, layer by layer, when a layer first extends it. Not thread-safe.
class KeyValueCache {
 public:
  /// Throws std::invalid_argument unless `capacity`, in tokens per row, is at least 1.
  explicit KeyValueCache(std::int64_t capacity);

  /// Tokens per row that every layer has.
  [[nodiscard]] std::int64_t length() const noexcept { return length_; }
  [[nodiscard]] std::int64_t capacity() const noexcept { return capacity_; }
  /// Forgets all tokens, keeps the memory.
  void clear() noexcept { length_ = 0; }

  /// Writes keys [B, H, S, d] and values [B, H, S, dv] of S tokens behind the first length() ones of a model layer and
  /// returns views of all length() + S. Keys are as attention uses them, rotated. The length stays until `advance`.
  /// Throws std::invalid_argument when they do not fit: capacity, or shape, dtype and device of earlier ones.
  [[nodiscard]] std::pair<torch::Tensor, torch::Tensor> extend(std::int64_t layer, const torch::Tensor& key_BHSd,
                                                               const torch::Tensor& value_BHSd);
  /// One token for each row, [B, H, 1, d] and [B, H, 1, dv], at a position that stands on the device (int64 [1], below
  /// the capacity), and views of the first `visible` keys and values; what lies behind the position is of no meaning,
  /// but finite. Nothing is read back. Throws std::invalid_argument as `extend` does, or for a layer without tokens.
  [[nodiscard]] std::pair<torch::Tensor, torch::Tensor> put(std::int64_t layer, const torch::Tensor& key_BH1d,
                                                            const torch::Tensor& value_BH1d,
                                                            const torch::Tensor& position_1, std::int64_t visible);
  /// The whole memory of a model layer, [B, H, capacity, d] and [B, H, capacity, dv], contiguous; the first length()
  /// tokens have a meaning. Throws std::invalid_argument for a layer without tokens.
  [[nodiscard]] std::pair<torch::Tensor, torch::Tensor> memory(std::int64_t layer) const;
  /// Counts `tokens` more, once every layer has them.
  void advance(std::int64_t tokens);

 private:
  struct Layer {
    torch::Tensor key, value;
  };
  static void check(std::int64_t layer, const torch::Tensor& all, const torch::Tensor& more);

  std::int64_t capacity_;
  std::int64_t length_ = 0;
  std::vector<Layer> layers_;
};

}  // namespace hestia
