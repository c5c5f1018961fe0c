#pragma once

#include <filesystem>

#include "hestia/model/tuned_checkpoint.hpp"

namespace hestia {

/// Writes `output`: the GGUF file `gguf` of the model in the Hugging Face directory `base`, with the tuned routers in
/// the bytes of its `blk.N.ffn_gate_inp.weight` (F32, or F16 to which they are rounded) and K in the value of
/// `*.expert_used_count`. Every other byte is as in `gguf`. The file appears whole or not at all.
/// Throws UsageError when `output` exists or `parts` has adapters (which a GGUF file of the base has no place for);
/// InputError when the parts, the base and the GGUF file do not belong together: another architecture or size, K
/// missing, one file of several, routers that are missing or of another type, and routers that are not those of
/// `base` to within the rounding of either file's type (the first layer that differs is named). RunError naming what
/// could not be written.
void write_tuned_gguf(const std::filesystem::path& base, const TunedParts& parts, const std::filesystem::path& gguf,
                      const std::filesystem::path& output);

}  // namespace hestia
