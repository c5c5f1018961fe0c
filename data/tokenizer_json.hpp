#pragma once

#include <filesystem>
#include <memory>

#include "hestia/data/tokenizer.hpp"

namespace hestia {

/// Opens a `tokenizer.json` of the tokenizers library. Which tokens begin, end and pad a text is read from the files
/// beside it: tokenizer_config.json, special_tokens_map.json, config.json. Throws InputError.
[[nodiscard]] std::unique_ptr<Tokenizer> open_json_tokenizer(const std::filesystem::path& path);

}  // namespace hestia
