#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hestia/data/packing.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// Throws UsageError when the corpus lays its turns out with a template whose tokens the vocabulary lacks; `recipe_key`
/// as in read_corpus.
void check_template_tokens(const CorpusOptions& corpus, const std::string& recipe_key, const Tokenizer& tokenizer);

/// Tokenised training split of the recipe's `data.train` domains. Throws what read_corpus and
/// check_template_tokens throw.
[[nodiscard]] PackedData load_training_data(const DataOptions& options, const Tokenizer& tokenizer,
                                            std::int64_t threads);

/// Tokenised held-out split of `domains`, at most `tokens_per_domain` tokens each.
[[nodiscard]] PackedData load_held_out_data(const DataOptions& options, const std::vector<std::string>& domains,
                                            const Tokenizer& tokenizer, std::int64_t tokens_per_domain,
                                            std::int64_t threads);

}  // namespace hestia
