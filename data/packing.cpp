#include "hestia/data/packing.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"
#include "templates.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kIgnored = -100;
// A batch is closed after this many drawn sequences in a row found no room; they go first in the next one.
constexpr std::size_t kMaxMisfits = 16;
constexpr std::size_t kDocumentsPerRound = 256;

// A document, or a part of it, as tokens with what each of them is.
struct FlatTokens {
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> completion;
  std::vector<std::uint8_t> text;  // 0: a special token, which stands for no bytes.

  [[nodiscard]] std::size_t size() const { return ids.size(); }
  void append(const std::vector<std::int32_t>& more, bool is_completion, bool is_text) {
    ids.insert(ids.end(), more.begin(), more.end());
    completion.resize(ids.size(), is_completion ? 1 : 0);
    text.resize(ids.size(), is_text ? 1 : 0);
  }
  void append(const FlatTokens& other, std::size_t begin, std::size_t end) {
    const auto add = [&](auto& to, const auto& from) {
      to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(begin),
                from.begin() + static_cast<std::ptrdiff_t>(end));
    };
    add(ids, other.ids);
    add(completion, other.completion);
    add(text, other.text);
  }
  void resize(std::size_t size) {
    ids.resize(size);
    completion.resize(size);
    text.resize(size);
  }
  void erase_first() {
    ids.erase(ids.begin());
    completion.erase(completion.begin());
    text.erase(text.begin());
  }
  [[nodiscard]] std::size_t leading_prompt() const {
    return static_cast<std::size_t>(std::find(completion.begin(), completion.end(), 1) - completion.begin());
  }
};

FlatTokens flatten(const Document& document, const Tokenizer& tokenizer) {
  FlatTokens flat;
  bool after_text = false;
  for (const Piece& piece : document.pieces) {
    if (piece.kind == PieceKind::kText) {
      flat.append(after_text ? tokenizer.encode_continuation(piece.text) : tokenizer.encode(piece.text),
                  piece.completion, true);
    } else if (piece.kind == PieceKind::kToken) {
      const std::int32_t id = tokenizer.token_id(piece.text);
      if (id < 0) {
        throw RunError(
            fmt::format("document {} of domain \"{}\": the vocabulary has no token \"{}\"; choose another template",
                        document.id, document.domain, piece.text));
      }
      flat.append({id}, piece.completion, false);
    } else if (tokenizer.eos_id() >= 0) {
      flat.append({tokenizer.eos_id()}, piece.completion, false);
    }
    after_text = piece.kind == PieceKind::kText;
  }
  return flat;
}

TokenSequence sequence_of(const FlatTokens& flat, const Tokenizer& tokenizer, std::int32_t domain) {
  TokenSequence sequence;
  sequence.tokens = flat.ids;
  sequence.domain = domain;
  sequence.num_prompt_tokens = static_cast<std::int64_t>(flat.leading_prompt());
  std::vector<std::int32_t> labels;
  for (std::size_t i = flat.leading_prompt(); i < flat.size(); ++i) {
    if (flat.completion[i] == 0) {
      if (flat.completion[i - 1] != 0) {
        sequence.later_prompts.push_back({static_cast<std::int64_t>(i), static_cast<std::int64_t>(i)});
      }
      sequence.later_prompts.back().end = static_cast<std::int64_t>(i) + 1;
    } else if (i > 0 && flat.text[i] != 0) {  // The first token is nobody's label.
      labels.push_back(flat.ids[i]);
    }
  }
  sequence.num_bytes = tokenizer.count_bytes(labels);
  return sequence;
}

struct Tokenized {
  std::vector<TokenSequence> sequences;
  ExampleCounts counts;
};

// Plain text: as many sequences as it takes.
Tokenized tokenize_text(const FlatTokens& flat, const FlatTokens& begin, const Tokenizer& tokenizer,
                        std::size_t sequence_length, std::int32_t domain) {
  Tokenized result;
  for (std::size_t at = 0; at < flat.size();) {
    FlatTokens part = begin;
    const std::size_t count = std::min(sequence_length - part.size(), flat.size() - at);
    part.append(flat, at, at + count);
    at += count;
    // One without a label teaches nothing: a last token alone.
    if (part.size() > 1) {
      result.sequences.push_back(sequence_of(part, tokenizer, domain));
    }
  }
  return result;
}

// An example: one sequence or none.
Tokenized tokenize_example(const FlatTokens& flat, FlatTokens begin, const Tokenizer& tokenizer,
                           std::size_t sequence_length, std::int32_t domain, Overlong overlong) {
  Tokenized result;
  result.counts.read = 1;
  const std::size_t total = begin.size() + flat.size();
  std::size_t first = 0;
  if (total > sequence_length) {
    if (overlong == Overlong::kDrop) {
      result.counts.dropped = 1;
      return result;
    }
    const std::size_t prompt = flat.leading_prompt();
    const std::size_t least = std::min(prompt, sequence_length / 2);
    first = std::min(prompt - least, total - sequence_length);
  }
  if (flat.leading_prompt() > 0) {
    std::fill(begin.completion.begin(), begin.completion.end(), std::uint8_t{0});
  }
  begin.append(flat, first, flat.size());
  begin.resize(std::min(begin.size(), sequence_length));
  while (begin.size() > 0 && begin.completion.back() == 0) {
    begin.resize(begin.size() - 1);  // What no answer follows.
  }
  if (begin.size() > std::max<std::size_t>(1, begin.leading_prompt())) {
    result.sequences.push_back(sequence_of(begin, tokenizer, domain));
    result.counts.truncated = total > sequence_length ? 1 : 0;
  } else {
    result.counts.dropped = 1;
  }
  return result;
}

// The <s> that a document begins with; where its text spells one, that one goes.
FlatTokens begin_of(const Document& document, const Tokenizer& tokenizer, FlatTokens& flat) {
  FlatTokens begin;
  if (document.begin_sequence && tokenizer.bos_id() >= 0) {
    begin.append({tokenizer.bos_id()}, true, false);
    if (flat.size() > 0 && flat.ids.front() == tokenizer.bos_id()) {
      flat.erase_first();
    }
  }
  return begin;
}

Tokenized tokenize(const Document& document, const Tokenizer& tokenizer, std::int64_t sequence_length,
                   std::int32_t domain, Overlong overlong) {
  FlatTokens flat = flatten(document, tokenizer);
  FlatTokens begin = begin_of(document, tokenizer, flat);
  const auto length = static_cast<std::size_t>(sequence_length);
  return document.has_prompt() ? tokenize_example(flat, std::move(begin), tokenizer, length, domain, overlong)
                               : tokenize_text(flat, begin, tokenizer, length, domain);
}

void report_overlong(const PackedData& data, const std::vector<ExampleCounts>& before, std::int64_t sequence_length) {
  for (std::size_t domain = 0; domain < data.examples.size(); ++domain) {
    const ExampleCounts& now = data.examples[domain];
    const ExampleCounts then = domain < before.size() ? before[domain] : ExampleCounts();
    if (now.truncated > then.truncated || now.dropped > then.dropped) {
      log_warning(
          fmt::format("domain \"{}\": of {} examples, {} longer than data.sequence_length ({}) were truncated and {} "
                      "dropped",
                      data.domains[domain], now.read - then.read, now.truncated - then.truncated, sequence_length,
                      now.dropped - then.dropped));
    }
  }
}

// Rows of sequence indices, first fit.
class RowPacker {
 public:
  RowPacker(std::int64_t num_rows, std::int64_t row_length)
      : row_length_(row_length),
        rows_(static_cast<std::size_t>(num_rows)),
        used_(static_cast<std::size_t>(num_rows), 0) {}

  bool place(std::size_t index, std::int64_t length) {
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      if (used_[row] + length <= row_length_) {
        rows_[row].push_back(index);
        used_[row] += length;
        return true;
      }
    }
    return false;
  }
  [[nodiscard]] bool full() const {
    return std::all_of(used_.begin(), used_.end(), [&](std::int64_t used) { return used == row_length_; });
  }
  [[nodiscard]] bool empty() const { return rows_.front().empty(); }
  [[nodiscard]] const std::vector<std::vector<std::size_t>>& rows() const { return rows_; }

 private:
  std::int64_t row_length_;
  std::vector<std::vector<std::size_t>> rows_;
  std::vector<std::int64_t> used_;
};

std::int64_t length_of(const PackedData& data, std::size_t index) {
  return static_cast<std::int64_t>(data.sequences[index].tokens.size());
}

PackedBatch build_batch(const PackedData& data, const std::vector<std::vector<std::size_t>>& rows,
                        std::int64_t row_length) {
  PackedBatch batch;
  batch.num_rows = static_cast<std::int64_t>(rows.size());
  batch.row_length = row_length;
  const auto size = static_cast<std::size_t>(batch.num_rows * row_length);
  batch.tokens.assign(size, 0);
  batch.labels.assign(size, kIgnored);
  batch.sequence_ids.assign(size, -1);
  batch.positions.assign(size, 0);
  batch.counted.assign(size, 0);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::size_t at = row * static_cast<std::size_t>(row_length);
    for (const std::size_t index : rows[row]) {
      const TokenSequence& sequence = data.sequences[index];
      const auto id = static_cast<std::int64_t>(batch.domains.size());
      batch.domains.push_back(sequence.domain);
      batch.num_bytes += sequence.num_bytes;
      const std::vector<std::uint8_t> completion = sequence.completion_mask();
      for (std::size_t t = 0; t < sequence.tokens.size(); ++t, ++at) {
        batch.tokens[at] = sequence.tokens[t];
        batch.sequence_ids[at] = id;
        batch.positions[at] = static_cast<std::int64_t>(t);
        batch.counted[at] = completion[t];
        if (t + 1 < sequence.tokens.size() && completion[t + 1] != 0) {
          batch.labels[at] = sequence.tokens[t + 1];
        }
      }
    }
  }
  return batch;
}

}  // namespace

std::int64_t PackedBatch::num_labels() const {
  return std::count_if(labels.begin(), labels.end(), [](std::int64_t label) { return label != kIgnored; });
}

std::vector<std::uint8_t> TokenSequence::completion_mask() const {
  std::vector<std::uint8_t> mask(tokens.size(), 1);
  std::fill(mask.begin(), mask.begin() + num_prompt_tokens, std::uint8_t{0});
  for (const TokenRange& range : later_prompts) {
    std::fill(mask.begin() + range.begin, mask.begin() + range.end, std::uint8_t{0});
  }
  return mask;
}

std::int64_t PackedData::num_tokens() const {
  std::int64_t total = 0;
  for (const TokenSequence& sequence : sequences) {
    total += static_cast<std::int64_t>(sequence.tokens.size());
  }
  return total;
}

void tokenize_documents(const std::vector<Document>& documents, const Tokenizer& tokenizer,
                        std::int64_t sequence_length, std::int64_t max_tokens, std::int64_t num_threads,
                        PackedData& data, Overlong overlong) {
  if (sequence_length < 2) {
    throw std::invalid_argument("tokenize_documents: sequence_length must be at least 2");
  }
  const std::vector<ExampleCounts> before = data.examples;
  std::int64_t total = 0;
  const auto enough = [&] { return max_tokens > 0 && total >= max_tokens; };
  for (std::size_t first = 0; first < documents.size() && !enough(); first += kDocumentsPerRound) {
    const std::size_t last = std::min(documents.size(), first + kDocumentsPerRound);
    std::vector<Tokenized> results(last - first);
    std::vector<std::int32_t> domains(last - first);
    for (std::size_t i = first; i < last; ++i) {
      auto known = std::find(data.domains.begin(), data.domains.end(), documents[i].domain);
      if (known == data.domains.end()) {
        data.domains.push_back(documents[i].domain);
        known = data.domains.end() - 1;
      }
      domains[i - first] = static_cast<std::int32_t>(known - data.domains.begin());
    }
    std::atomic<std::size_t> next{first};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto work = [&] {
      try {
        for (std::size_t i = next.fetch_add(1); i < last; i = next.fetch_add(1)) {
          results[i - first] = tokenize(documents[i], tokenizer, sequence_length, domains[i - first], overlong);
        }
      } catch (...) {
        const std::scoped_lock lock(failure_mutex);
        failure = std::current_exception();
      }
    };
    std::vector<std::thread> threads;
    for (std::int64_t i = 1; i < num_threads; ++i) {
      threads.emplace_back(work);
    }
    work();
    for (std::thread& thread : threads) {
      thread.join();
    }
    if (failure) {
      std::rethrow_exception(failure);
    }
    data.examples.resize(data.domains.size());
    for (std::size_t i = 0; i < results.size() && !enough(); ++i) {
      ExampleCounts& counts = data.examples[static_cast<std::size_t>(domains[i])];
      counts.read += results[i].counts.read;
      counts.truncated += results[i].counts.truncated;
      counts.dropped += results[i].counts.dropped;
      for (TokenSequence& sequence : results[i].sequences) {
        if (enough()) {
          break;
        }
        total += static_cast<std::int64_t>(sequence.tokens.size());
        data.sequences.push_back(std::move(sequence));
      }
    }
  }
  report_overlong(data, before, sequence_length);
}

ChatPrompt chat_prompt(const std::string& format, const std::string& system, const std::string& user,
                       const Tokenizer& tokenizer, const std::string& option) {
  const std::vector<std::string> names = template_names();
  if (std::find(names.begin(), names.end(), format) == names.end()) {
    const std::string nearest = nearest_name(format, names);
    throw UsageError(fmt::format("{}: no such chat format, got \"{}\"; {}choose one of {}", option, format,
                                 nearest.empty() ? "" : fmt::format("did you mean \"{}\"? ", nearest),
                                 fmt::join(names, ", ")));
  }
  std::vector<std::string> missing;
  for (const std::string& name : template_tokens(format)) {
    if (tokenizer.token_id(name) < 0) {
      missing.push_back(name);
    }
  }
  if (!missing.empty()) {
    throw UsageError(
        fmt::format("{}: the model's vocabulary has no token {}, which \"{}\" needs; choose the format of this model's "
                    "family, or one of plain text such as qa",
                    option, fmt::join(missing, ", "), format));
  }
  std::vector<Message> messages;
  if (!system.empty()) {
    messages.push_back({Role::kSystem, system});
  }
  messages.push_back({Role::kUser, user});
  messages.push_back({Role::kAssistant, ""});
  Document document;
  render_messages(format, messages, document);
  return answer_prompt(document, tokenizer);
}

ChatPrompt answer_prompt(const Document& document, const Tokenizer& tokenizer) {
  const auto is_answer = [](const Piece& piece) { return piece.completion; };
  const auto answer = std::find_if(document.pieces.begin(), document.pieces.end(), is_answer);
  Document part = document;
  part.pieces.assign(document.pieces.begin(), answer);
  FlatTokens flat = flatten(part, tokenizer);
  FlatTokens prompt = begin_of(document, tokenizer, flat);
  prompt.append(flat, 0, flat.size());
  ChatPrompt chat;
  chat.tokens = prompt.ids;
  part.pieces.assign(answer, std::find_if_not(answer, document.pieces.end(), is_answer));
  const FlatTokens answered = flatten(part, tokenizer);
  for (std::size_t i = 0; i < answered.size(); ++i) {
    if (answered.text[i] == 0) {
      chat.ends.push_back(answered.ids[i]);
    }
  }
  return chat;
}

PackedSampler::PackedSampler(const PackedData& data, std::int64_t rows_per_batch, std::int64_t row_length,
                             std::uint64_t seed, std::vector<double> mix)
    : data_(&data), rows_per_batch_(rows_per_batch), row_length_(row_length), seed_(seed), mix_(std::move(mix)) {
  if (data.sequences.empty()) {
    throw RunError("data: there is nothing to train on, got 0 sequences; check data.train and the corpora");
  }
  if (!mix_.empty() && mix_.size() != data.domains.size()) {
    throw std::invalid_argument("PackedSampler: one weight per domain");
  }
  if (!std::all_of(mix_.begin(), mix_.end(), [](double weight) { return weight > 0.0; })) {
    throw std::invalid_argument("PackedSampler: a weight must be above 0");
  }
  for (std::size_t i = 0; i < data.sequences.size(); ++i) {
    if (length_of(data, i) > row_length) {
      throw std::invalid_argument("PackedSampler: a sequence is longer than a row");
    }
  }
  // Without weights all sequences are one pool.
  pools_.resize(mix_.empty() ? 1 : data.domains.size());
  reset();
}

void PackedSampler::reset() {
  position_ = 0;
  pending_.clear();
  for (std::size_t number = 0; number < pools_.size(); ++number) {
    pools_[number] = Pool();
    start_epoch(number);
  }
}

void PackedSampler::start_epoch(std::size_t number) {
  Pool& pool = pools_[number];
  pool.order.clear();
  for (std::size_t i = 0; i < data_->sequences.size(); ++i) {
    if (mix_.empty() || static_cast<std::size_t>(data_->sequences[i].domain) == number) {
      pool.order.push_back(i);
    }
  }
  if (pool.order.empty()) {
    throw RunError(
        fmt::format("data: domain \"{}\" has nothing to train on; check its corpus", data_->domains[number]));
  }
  SplitMix64 random(derive_seed(derive_seed(seed_, "pool"), fmt::format("{}/{}", number, pool.epoch)));
  for (std::size_t i = pool.order.size() - 1; i > 0; --i) {
    std::swap(pool.order[i], pool.order[random.below(i + 1)]);
  }
  pool.cursor = 0;
}

std::size_t PackedSampler::draw() {
  // The pool that lags furthest behind its share of the tokens drawn so far.
  std::size_t chosen = 0;
  if (!mix_.empty()) {
    double best = pools_[0].drawn / mix_[0];
    for (std::size_t number = 1; number < pools_.size(); ++number) {
      const double share = pools_[number].drawn / mix_[number];
      if (share < best) {
        best = share;
        chosen = number;
      }
    }
  }
  Pool& pool = pools_[chosen];
  if (pool.cursor == pool.order.size()) {
    ++pool.epoch;
    start_epoch(chosen);
  }
  const std::size_t index = pool.order[pool.cursor++];
  pool.drawn += static_cast<double>(length_of(*data_, index));
  return index;
}

std::vector<std::vector<std::size_t>> PackedSampler::next_rows() {
  RowPacker packer(rows_per_batch_, row_length_);
  std::vector<std::size_t> misfits;
  for (const std::size_t index : pending_) {
    if (!packer.place(index, length_of(*data_, index))) {
      misfits.push_back(index);
    }
  }
  while (misfits.size() < kMaxMisfits && !packer.full()) {
    const std::size_t index = draw();
    if (!packer.place(index, length_of(*data_, index))) {
      misfits.push_back(index);
    }
  }
  pending_ = std::move(misfits);
  ++position_;
  return packer.rows();
}

PackedBatch PackedSampler::next() {
  return build_batch(*data_, next_rows(), row_length_);
}

std::int64_t PackedSampler::batches_for(double epochs) const {
  if (!(epochs > 0.0)) {
    throw std::invalid_argument("PackedSampler: epochs must be above 0");
  }
  PackedSampler replay(*this);
  replay.reset();
  const double target = epochs * static_cast<double>(data_->num_tokens());
  std::int64_t tokens = 0;
  while (static_cast<double>(tokens) < target) {
    for (const std::vector<std::size_t>& row : replay.next_rows()) {
      for (const std::size_t index : row) {
        tokens += length_of(*data_, index);
      }
    }
  }
  return replay.position();
}

void PackedSampler::seek(std::int64_t position) {
  reset();
  while (position_ < position) {
    next_rows();
  }
}

std::vector<PackedBatch> pack_for_evaluation(const PackedData& data, std::int64_t domain, std::int64_t rows_per_batch,
                                             std::int64_t row_length) {
  std::vector<PackedBatch> batches;
  RowPacker packer(rows_per_batch, row_length);
  for (std::size_t i = 0; i < data.sequences.size(); ++i) {
    if (domain >= 0 && data.sequences[i].domain != domain) {
      continue;
    }
    if (length_of(data, i) > row_length) {
      throw std::invalid_argument("pack_for_evaluation: a sequence is longer than a row");
    }
    if (!packer.place(i, length_of(data, i))) {
      batches.push_back(build_batch(data, packer.rows(), row_length));
      packer = RowPacker(rows_per_batch, row_length);
      packer.place(i, length_of(data, i));
    }
  }
  if (!packer.empty()) {
    // The last batch has as many rows as it needs.
    std::vector<std::vector<std::size_t>> rows = packer.rows();
    while (rows.back().empty()) {
      rows.pop_back();
    }
    batches.push_back(build_batch(data, rows, row_length));
  }
  return batches;
}

}  // namespace hestia
