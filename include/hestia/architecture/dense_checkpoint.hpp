#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/gguf.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// A dense model of Llama layout: RMSNorm, rotary positions over the whole head, grouped-query attention without
/// biases, and y = W_down (silu(W_gate h) * W_up h) in every layer.
struct DenseArchitecture {  // NOLINT(bugprone-exception-escape): the check takes Json's move for one that throws
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_attention_heads = 0;
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  double rope_theta = 10000.0;
  Json rope_scaling;  ///< As config.json has it; null: none.
  Json bos_token_id;  ///< A number, a list or null; so are the next two.
  Json eos_token_id;
  Json pad_token_id;
};

/// One tensor of such a model.
struct DenseTensor {
  std::string name;  ///< In transformers: "model.layers.0.mlp.up_proj.weight".
  std::string gguf;  ///< In GGUF: "blk.0.ffn_up.weight".
  std::vector<std::int64_t> shape;
};

/// Every tensor of a model, embeddings first, then layer by layer.
[[nodiscard]] std::vector<DenseTensor> dense_tensors(const DenseArchitecture& architecture);

/// An open dense checkpoint, mapped: a Hugging Face directory of `model_type` "llama" (weights F32, F16, BF16, F64), or
/// a GGUF file of architecture "llama" (types that `dequantise` takes).
class DenseCheckpoint {
 public:
  /// Opens and checks. Throws InputError with every problem: another kind of model (with what it is), switches this
  /// layout does not have (biases, other activations, rotary factors of a GGUF file), sizes that do not fit together,
  /// tensors that are missing, surplus or of another shape or type.
  explicit DenseCheckpoint(const std::filesystem::path& path);

  [[nodiscard]] const DenseArchitecture& architecture() const noexcept { return architecture_; }
  /// The float32 values of a tensor (by its name in transformers), row-major. Query and key rows of a GGUF file, in
  /// which llama.cpp interleaves the two halves of a head, come back in the order of transformers.
  [[nodiscard]] std::vector<float> tensor(std::string_view name) const;
  /// The GGUF file, or nullptr when this is a directory.
  [[nodiscard]] const GgufFile* gguf() const noexcept { return gguf_.get(); }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

 private:
  void read_directory();
  void read_gguf();

  std::filesystem::path path_;
  DenseArchitecture architecture_;
  std::unique_ptr<SafetensorsCheckpoint> directory_;
  std::unique_ptr<GgufFile> gguf_;
  std::vector<DenseTensor> tensors_;
};

}  // namespace hestia
