#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hestia {

/// `general.architecture` of a GGUF file of models with this `model_type` of config.json ("" when llama.cpp's name for
/// it is not known here): "olmoe" for "olmoe", "llama" for "mixtral".
[[nodiscard]] std::string gguf_architecture(std::string_view model_type);
/// Name of a model layer's router matrix [E, D] in a GGUF file: `blk.3.ffn_gate_inp.weight`.
[[nodiscard]] std::string gguf_router_name(std::int64_t layer);

}  // namespace hestia
