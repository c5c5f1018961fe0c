#include "hestia/trainer/data_source.hpp"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/log.hpp"

namespace hestia {

namespace {

// Upper bound on the UTF-8 bytes one token stands for on average: reading that much text is always enough.
constexpr std::int64_t kBytesPerToken = 8;

bool has_template(const CorpusOptions& corpus) {
  return corpus.format == "question_answer" || corpus.format == "chat";
}

PackedData load(const DataOptions& options, const std::vector<std::string>& domains, const Tokenizer& tokenizer,
                Split split, std::int64_t max_tokens, std::int64_t threads) {
  PackedData data;
  for (const std::string& domain : domains) {
    const auto [corpus, key] = find_corpus(options, domain);
    check_template_tokens(*corpus, key, tokenizer);
    CorpusOptions bounded = *corpus;
    if (max_tokens > 0) {
      const std::int64_t bytes = max_tokens * kBytesPerToken;
      bounded.max_bytes = bounded.max_bytes == 0 ? bytes : std::min(bounded.max_bytes, bytes);
    }
    const SplitOptions split_options{options.held_out_fraction, static_cast<std::uint64_t>(options.split_seed)};
    const std::vector<Document> documents = read_corpus(bounded, split_options, split, key);
    const std::int64_t before = data.num_tokens();
    tokenize_documents(documents, tokenizer, options.sequence_length, max_tokens, threads, data,
                       corpus->overlong == "drop" ? Overlong::kDrop : Overlong::kTruncate);
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

void check_template_tokens(const CorpusOptions& corpus, const std::string& recipe_key, const Tokenizer& tokenizer) {
  if (!has_template(corpus)) {
    return;
  }
  std::vector<std::string> missing;
  for (const std::string& name : template_tokens(corpus.chat_template)) {
    if (tokenizer.token_id(name) < 0) {
      missing.push_back(name);
    }
  }
  if (!missing.empty()) {
    throw UsageError(
        fmt::format("{}.template: the model's vocabulary has no token {}, which \"{}\" needs; choose the "
                    "template of this model's family, or one of plain text such as qa",
                    recipe_key, fmt::join(missing, ", "), corpus.chat_template));
  }
}

PackedData load_training_data(const DataOptions& options, const Tokenizer& tokenizer, std::int64_t threads) {
  return load(options, options.train, tokenizer, Split::kTrain, options.max_tokens_per_domain, threads);
}

PackedData load_held_out_data(const DataOptions& options, const std::vector<std::string>& domains,
                              const Tokenizer& tokenizer, std::int64_t tokens_per_domain, std::int64_t threads) {
  return load(options, domains, tokenizer, Split::kHeldOut, tokens_per_domain, threads);
}

}  // namespace hestia
