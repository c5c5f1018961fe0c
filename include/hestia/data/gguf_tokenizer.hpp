#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "hestia/core/gguf.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia {

/// Pre-tokenisers (`tokenizer.ggml.pre`) that gguf_tokenizer knows.
[[nodiscard]] std::vector<std::string> known_gguf_pretokenizers();

/// The `tokenizer.json` of the byte-level BPE vocabulary in a GGUF file (`tokenizer.ggml.model` "gpt2"): tokens,
/// merges, control and user-defined tokens as added tokens (control ones special), the pre-tokeniser named by
/// `tokenizer.ggml.pre`, and a leading bos token where `add_bos_token` says so. Throws InputError naming the file for
/// another kind of vocabulary, another pre-tokeniser (with those known), missing or contradictory metadata.
[[nodiscard]] Json gguf_tokenizer(const GgufFile& file);
/// The `tokenizer_config.json` that goes with it: names of the special tokens, chat template, longest input.
[[nodiscard]] Json gguf_tokenizer_config(const GgufFile& file);
/// Writes both into `folder`.
void write_gguf_tokenizer(const GgufFile& file, const std::filesystem::path& folder);

}  // namespace hestia
