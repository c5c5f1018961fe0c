#include "hestia/trainer/data_source.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "hestia/core/log.hpp"

namespace hestia {

namespace {

// Upper bound on the UTF-8 bytes one token stands for on average: reading that much text is always enough.
constexpr std::int64_t kBytesPerToken = 8;

PackedData load(const DataOptions& options, const std::vector<std::string>& domains, const Tokenizer& tokenizer,
                Split split, std::int64_t max_tokens, std::int64_t threads) {
  PackedData data;
  for (const std::string& domain : domains) {
    const auto [corpus, key] = find_corpus(options, domain);
    CorpusOptions bounded = *corpus;
    if (max_tokens > 0) {
      const std::int64_t bytes = max_tokens * kBytesPerToken;
      bounded.max_bytes = bounded.max_bytes == 0 ? bytes : std::min(bounded.max_bytes, bytes);
    }
    const SplitOptions split_options{options.held_out_fraction, static_cast<std::uint64_t>(options.split_seed)};
    const std::vector<Document> documents = read_corpus(bounded, split_options, split, key);
    const std::int64_t before = data.num_tokens();
    tokenize_documents(documents, tokenizer, options.sequence_length, max_tokens, threads, data);
    if (data.num_tokens() == before) {
      throw InputError(
          fmt::format("{}: the {} split of domain \"{}\" holds no text ({} documents); add files or change "
                      "data.held_out_fraction",
                      key, split == Split::kTrain ? "training" : "held-out", domain, documents.size()));
    }
  }
  return data;
}

}  // namespace

PackedData load_training_data(const DataOptions& options, const Tokenizer& tokenizer, std::int64_t threads) {
  return load(options, options.train, tokenizer, Split::kTrain, options.max_tokens_per_domain, threads);
}

PackedData load_held_out_data(const DataOptions& options, const std::vector<std::string>& domains,
                              const Tokenizer& tokenizer, std::int64_t tokens_per_domain, std::int64_t threads) {
  return load(options, domains, tokenizer, Split::kHeldOut, tokens_per_domain, threads);
}

}  // namespace hestia
