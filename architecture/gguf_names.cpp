#include "hestia/architecture/gguf_names.hpp"

#include <utility>

#include <fmt/format.h>

namespace hestia {

std::string gguf_architecture(std::string_view model_type) {
  constexpr std::pair<std::string_view, std::string_view> kNames[] = {
      {"olmoe", "olmoe"},           {"mixtral", "llama"}, {"qwen2_moe", "qwen2moe"}, {"qwen3_moe", "qwen3moe"},
      {"deepseek_v2", "deepseek2"}, {"phimoe", "phimoe"}, {"gpt_oss", "gpt-oss"}};
  for (const auto& [theirs, name] : kNames) {
    if (theirs == model_type) {
      return std::string(name);
    }
  }
  return "";
}

std::string gguf_router_name(std::int64_t layer) {
  return fmt::format("blk.{}.ffn_gate_inp.weight", layer);
}

}  // namespace hestia
