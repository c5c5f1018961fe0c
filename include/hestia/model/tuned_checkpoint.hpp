#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

namespace hestia {

/// What a tuned model has in place of its base's.
struct TunedParts {
  std::filesystem::path routers;                  ///< As `save_routers` writes them.
  std::optional<std::filesystem::path> adapters;  ///< As `save_adapters` writes them.
  std::int64_t top_k = 0;                         ///< Experts per token.
};

/// Writes the Hugging Face directory `output` of a tuned model, which anything that loads `base` loads: the routers in
/// the type that the base stores them in, expert weights with their adapters merged in float32 and rounded once to
/// theirs, K in config.json; all else as in `base`. Shards keep their names and their tensors; those that did not
/// change are hard links where the file system allows it. Weights of the base in other formats, and subfolders, are
/// left out with a warning. Never holds more than one shard in memory. `output` appears whole or not at all.
/// Throws UsageError when `output` exists and is not an empty folder, InputError when the parts and the base do not
/// belong together (every problem), RunError naming what could not be written.
void write_tuned_checkpoint(const std::filesystem::path& base, const TunedParts& parts,
                            const std::filesystem::path& output);

}  // namespace hestia
