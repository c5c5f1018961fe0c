#include "hestia/data/packing.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kIgnored = -100;
// A batch is closed after this many drawn sequences in a row found no room; they go first in the next one.
constexpr std::size_t kMaxMisfits = 16;
constexpr std::size_t kDocumentsPerRound = 256;

std::int64_t bytes_of_labels(const std::vector<std::int32_t>& tokens, std::int64_t first_label,
                             const Tokenizer& tokenizer) {
  std::vector<std::int32_t> labels;
  for (std::size_t i = static_cast<std::size_t>(first_label); i < tokens.size(); ++i) {
    if (tokens[i] != tokenizer.eos_id() && tokens[i] != tokenizer.bos_id()) {
      labels.push_back(tokens[i]);
    }
  }
  return tokenizer.count_bytes(labels);
}

std::vector<TokenSequence> tokenize(const Document& document, const Tokenizer& tokenizer, std::int64_t sequence_length,
                                    std::int32_t domain) {
  std::vector<TokenSequence> sequences;
  const bool has_bos = tokenizer.bos_id() >= 0;
  std::vector<std::int32_t> prompt;
  if (!document.prompt.empty()) {
    prompt = tokenizer.encode(document.prompt);
    const auto most = static_cast<std::size_t>(sequence_length / 2);
    if (prompt.size() > most) {
      log_warning(fmt::format("prompts longer than half of data.sequence_length ({}) are cut from their left",
                              sequence_length));
      prompt.erase(prompt.begin(), prompt.end() - static_cast<std::ptrdiff_t>(most));
    }
  }
  std::vector<std::int32_t> text = tokenizer.encode(document.completion);
  if (tokenizer.eos_id() >= 0) {
    text.push_back(tokenizer.eos_id());
  }
  std::size_t begin = 0;
  while (begin < text.size()) {
    TokenSequence sequence;
    sequence.domain = domain;
    if (has_bos) {
      sequence.tokens.push_back(tokenizer.bos_id());
    }
    if (begin == 0) {
      sequence.tokens.insert(sequence.tokens.end(), prompt.begin(), prompt.end());
      sequence.num_prompt_tokens = prompt.empty() ? 0 : static_cast<std::int64_t>(sequence.tokens.size());
    }
    const std::size_t room = static_cast<std::size_t>(sequence_length) - sequence.tokens.size();
    const std::size_t count = std::min(room, text.size() - begin);
    sequence.tokens.insert(sequence.tokens.end(), text.begin() + static_cast<std::ptrdiff_t>(begin),
                           text.begin() + static_cast<std::ptrdiff_t>(begin + count));
    begin += count;
    sequence.num_bytes =
        bytes_of_labels(sequence.tokens, std::max<std::int64_t>(1, sequence.num_prompt_tokens), tokenizer);
    // One without a label teaches nothing: a last token alone, or a prompt that left no room.
    if (sequence.tokens.size() > std::max<std::size_t>(1, static_cast<std::size_t>(sequence.num_prompt_tokens))) {
      sequences.push_back(std::move(sequence));
    }
    if (!prompt.empty() && begin < text.size()) {
      // The rest of an answer without its question would be another task.
      log_warning(
          fmt::format("answers that do not fit data.sequence_length ({}) with their prompt are cut", sequence_length));
      break;
    }
  }
  return sequences;
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
      for (std::size_t t = 0; t < sequence.tokens.size(); ++t, ++at) {
        batch.tokens[at] = sequence.tokens[t];
        batch.sequence_ids[at] = id;
        batch.positions[at] = static_cast<std::int64_t>(t);
        batch.counted[at] = static_cast<std::int64_t>(t) >= sequence.num_prompt_tokens ? 1 : 0;
        if (t + 1 < sequence.tokens.size() && static_cast<std::int64_t>(t) + 1 >= sequence.num_prompt_tokens) {
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

std::int64_t PackedData::num_tokens() const {
  std::int64_t total = 0;
  for (const TokenSequence& sequence : sequences) {
    total += static_cast<std::int64_t>(sequence.tokens.size());
  }
  return total;
}

void tokenize_documents(const std::vector<Document>& documents, const Tokenizer& tokenizer,
                        std::int64_t sequence_length, std::int64_t max_tokens, std::int64_t num_threads,
                        PackedData& data) {
  if (sequence_length < 2) {
    throw std::invalid_argument("tokenize_documents: sequence_length must be at least 2");
  }
  std::int64_t total = 0;
  for (std::size_t first = 0; first < documents.size(); first += kDocumentsPerRound) {
    const std::size_t last = std::min(documents.size(), first + kDocumentsPerRound);
    std::vector<std::vector<TokenSequence>> results(last - first);
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
          results[i - first] = tokenize(documents[i], tokenizer, sequence_length, domains[i - first]);
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
    for (std::vector<TokenSequence>& sequences : results) {
      for (TokenSequence& sequence : sequences) {
        if (max_tokens > 0 && total >= max_tokens) {
          return;
        }
        total += static_cast<std::int64_t>(sequence.tokens.size());
        data.sequences.push_back(std::move(sequence));
      }
    }
  }
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
