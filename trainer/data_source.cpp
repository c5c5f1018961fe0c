#include "hestia/trainer/data_source.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"

namespace hestia {

namespace {

// UTF-8 bytes that one token stands for on average, at most: reading that much text is enough but where examples are
// cut.
constexpr std::int64_t kBytesPerToken = 8;
// A sample is drawn out of so many times its tokens.
constexpr std::int64_t kDrawnFrom = 8;
constexpr std::int64_t kMostBytes = std::int64_t{1} << 62;

std::int64_t bytes_of(const std::vector<Document>& documents) {
  return std::accumulate(documents.begin(), documents.end(), std::int64_t{0},
                         [](std::int64_t sum, const Document& document) { return sum + document.num_bytes(); });
}

bool has_template(const CorpusOptions& corpus) {
  return corpus.format == "question_answer" || corpus.format == "chat";
}

bool has_examples(const CorpusOptions& corpus) {
  return has_template(corpus) || !corpus.prompt_field.empty();
}

// Leaves of the sequences from `first` on a uniform choice that reaches `tokens`, in their order.
void draw(PackedData& data, std::size_t first, std::int64_t tokens, std::uint64_t seed) {
  SplitMix64 random(derive_seed(seed, "sample"));
  std::vector<std::pair<std::uint64_t, std::size_t>> order;
  for (std::size_t i = first; i < data.sequences.size(); ++i) {
    order.emplace_back(random.next(), i);
  }
  std::sort(order.begin(), order.end());
  std::vector<std::size_t> chosen;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < order.size() && total < tokens; ++i) {
    chosen.push_back(order[i].second);
    total += static_cast<std::int64_t>(data.sequences[order[i].second].tokens.size());
  }
  std::sort(chosen.begin(), chosen.end());
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    if (first + i != chosen[i]) {
      data.sequences[first + i] = std::move(data.sequences[chosen[i]]);
    }
  }
  data.sequences.resize(first + chosen.size());
}

// Of each domain the first `most_tokens` (0: all); with `sample` above 0 so many of them, drawn.
PackedData load(const DataOptions& options, const std::vector<std::string>& domains, const Tokenizer& tokenizer,
                Split split, std::int64_t most_tokens, std::int64_t threads, std::int64_t sample = 0) {
  PackedData data;
  for (const std::string& domain : domains) {
    const auto [corpus, key] = find_corpus(options, domain);
    check_template_tokens(*corpus, key, tokenizer);
    std::int64_t max_tokens = most_tokens;
    const bool draws = sample > 0 && !has_examples(*corpus);
    if (sample > 0) {
      const std::int64_t times = draws ? kDrawnFrom : 1;
      const std::int64_t pool = sample > kMostBytes / times ? kMostBytes : sample * times;
      max_tokens = most_tokens > 0 ? std::min(most_tokens, pool) : pool;
    }
    const SplitOptions split_options{options.held_out_fraction, static_cast<std::uint64_t>(options.split_seed)};
    // Twice as much text each time, until there are tokens enough or all of it was read.
    for (std::int64_t bytes_per_token = kBytesPerToken;; bytes_per_token *= 2) {
      CorpusOptions bounded = *corpus;
      const bool bounds =
          max_tokens > 0 && max_tokens <= (corpus->max_bytes > 0 ? corpus->max_bytes : kMostBytes) / bytes_per_token;
      if (bounds) {
        bounded.max_bytes = max_tokens * bytes_per_token;
      }
      const std::vector<Document> documents = read_corpus(bounded, split_options, split, key);
      PackedData longer = data;
      tokenize_documents(documents, tokenizer, options.sequence_length, max_tokens, threads, longer,
                         corpus->overlong == "drop" ? Overlong::kDrop : Overlong::kTruncate);
      const std::int64_t found = longer.num_tokens() - data.num_tokens();
      if (bounds && found < max_tokens && bytes_of(documents) >= bounded.max_bytes) {
        continue;
      }
      if (found == 0) {
        throw InputError(
            fmt::format("{}: the {} split of domain \"{}\" holds no text ({} documents); add files or change "
                        "data.held_out_fraction",
                        key, split == Split::kTrain ? "training" : "held-out", domain, documents.size()));
      }
      const std::size_t first = data.sequences.size();
      data = std::move(longer);
      if (draws) {
        draw(data, first, sample, static_cast<std::uint64_t>(options.split_seed));
      }
      break;
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

PackedData load_sample(const DataOptions& options, const std::vector<std::string>& domains, const Tokenizer& tokenizer,
                       Split split, std::int64_t tokens_per_domain, std::int64_t threads) {
  const std::int64_t most = split == Split::kTrain ? options.max_tokens_per_domain : 0;
  return load(options, domains, tokenizer, split, most, threads, tokens_per_domain);
}

}  // namespace hestia
