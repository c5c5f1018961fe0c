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

/// A sample of one split of `domains` to measure on: sequences up to and with the one that reaches `tokens_per_domain`
/// tokens of each, as uniformly drawn by `data.split_seed` as reading little of a large corpus allows: out of all
/// sequences of the first documents (in the order of read_corpus) that hold 8 times as many tokens, so that a few long
/// documents do not stand for the domain. Examples, one sequence each, are the first ones. Of the training split it is
/// drawn from what load_training_data reads. The order is that of the documents. Throws InputError when a domain's
/// split holds no text, and what read_corpus, check_template_tokens and tokenize_documents throw.
[[nodiscard]] PackedData load_sample(const DataOptions& options, const std::vector<std::string>& domains,
                                     const Tokenizer& tokenizer, Split split, std::int64_t tokens_per_domain,
                                     std::int64_t threads);

}  // namespace hestia
