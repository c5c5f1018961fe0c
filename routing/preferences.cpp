#include "hestia/routing/preferences.hpp"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/log.hpp"

namespace hestia {

namespace {

constexpr const char* kFormat = "hestia preferences";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::int64_t kSequenceChunkRows = 1024;
constexpr std::int64_t kArraysPerRow = 6;  // count, mean_probability, prompt_count; baseline, tuned
constexpr const char* kRouterGroups[2] = {"/routers/baseline/", "/routers/tuned/"};

PreferenceAggregate empty_aggregate(std::int64_t num_layers, std::int64_t num_experts) {
  PreferenceAggregate aggregate;
  aggregate.num_layers = num_layers;
  aggregate.num_experts = num_experts;
  const auto per_layer = static_cast<std::size_t>(num_layers * num_experts);
  const auto pairs = per_layer * static_cast<std::size_t>(num_experts);
  aggregate.count.assign(per_layer, 0);
  aggregate.mean_probability.assign(per_layer, 0.0);
  aggregate.coactivation.assign(pairs, 0);
  aggregate.transition.assign(pairs, 0);
  return aggregate;
}

void check_sequence(const SequenceRouting& sequence, std::string_view router, std::int64_t num_layers,
                    std::int64_t num_experts) {
  const auto subject = [&] { return fmt::format("preferences, {} router, sequence {}", router, sequence.id); };
  if (sequence.num_layers != num_layers || sequence.num_experts != num_experts || sequence.num_tokens < 0 ||
      sequence.num_prompt_tokens < 0 || sequence.num_prompt_tokens > sequence.num_tokens || sequence.top_k < 1) {
    throw std::invalid_argument(fmt::format(
        "{}: {} layers, {} experts, top {}, {} tokens with {} of prompt do not fit a model of {} layers, {} experts",
        subject(), sequence.num_layers, sequence.num_experts, sequence.top_k, sequence.num_tokens,
        sequence.num_prompt_tokens, num_layers, num_experts));
  }
  const auto rows = static_cast<std::size_t>(num_layers * sequence.num_tokens);
  const std::size_t selected = rows * static_cast<std::size_t>(sequence.top_k);
  const std::size_t probabilities = rows * static_cast<std::size_t>(num_experts);
  if (!sequence.counted.empty() && sequence.counted.size() != static_cast<std::size_t>(sequence.num_tokens)) {
    throw std::invalid_argument(
        fmt::format("{}: {} flags of counted tokens for {}", subject(), sequence.counted.size(), sequence.num_tokens));
  }
  if (sequence.selected.size() != selected || sequence.probabilities.size() != probabilities) {
    throw std::invalid_argument(fmt::format("{}: expected {} selections and {} probabilities, got {} and {}", subject(),
                                            selected, probabilities, sequence.selected.size(),
                                            sequence.probabilities.size()));
  }
  for (const std::uint16_t expert : sequence.selected) {
    if (expert >= num_experts) {
      throw std::invalid_argument(fmt::format("{}: expert {} is not below {}", subject(), expert, num_experts));
    }
  }
}

// What one router did with one sequence.
struct SequenceCounts {
  std::vector<std::int64_t> count;         // [L, E]
  std::vector<std::int64_t> prompt_count;  // [L, E]
  std::vector<double> probability_sum;     // [L, E]
};

// Counts one sequence and adds its pairs to `total`.
SequenceCounts count_sequence(const SequenceRouting& sequence, PreferenceAggregate& total) {
  const auto num_layers = static_cast<std::size_t>(sequence.num_layers);
  const auto num_experts = static_cast<std::size_t>(sequence.num_experts);
  const auto num_tokens = static_cast<std::size_t>(sequence.num_tokens);
  const auto top_k = static_cast<std::size_t>(sequence.top_k);
  SequenceCounts counts{std::vector<std::int64_t>(num_layers * num_experts, 0),
                        std::vector<std::int64_t>(num_layers * num_experts, 0),
                        std::vector<double>(num_layers * num_experts, 0.0)};
  for (std::size_t layer = 0; layer < num_layers; ++layer) {
    for (std::size_t token = 0; token < num_tokens; ++token) {
      const std::size_t row = layer * num_tokens + token;
      const std::span<const std::uint16_t> served(sequence.selected.data() + row * top_k, top_k);
      if (!sequence.is_counted(static_cast<std::int64_t>(token))) {
        for (const std::uint16_t expert : served) {
          counts.prompt_count[layer * num_experts + expert] += 1;
        }
        continue;
      }
      for (std::size_t expert = 0; expert < num_experts; ++expert) {
        counts.probability_sum[layer * num_experts + expert] +=
            static_cast<double>(sequence.probabilities[row * num_experts + expert]);
      }
      for (const std::uint16_t expert : served) {
        counts.count[layer * num_experts + expert] += 1;
        for (const std::uint16_t other : served) {
          total.coactivation[(layer * num_experts + expert) * num_experts + other] += 1;
        }
      }
      if (token > 0) {
        const std::span<const std::uint16_t> before(sequence.selected.data() + (row - 1) * top_k, top_k);
        for (const std::uint16_t from : before) {
          for (const std::uint16_t to : served) {
            total.transition[(layer * num_experts + from) * num_experts + to] += 1;
          }
        }
      }
    }
  }
  return counts;
}

std::vector<std::uint16_t> saturated(const std::vector<std::int64_t>& counts) {
  std::vector<std::uint16_t> narrow(counts.size());
  bool clipped = false;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    clipped = clipped || counts[i] > UINT16_MAX;
    narrow[i] = static_cast<std::uint16_t>(std::min<std::int64_t>(counts[i], UINT16_MAX));
  }
  if (clipped) {
    log_warning(
        "preferences: a sequence uses an expert more than 65535 times; its stored counts stop there (the aggregate is "
        "exact)");
  }
  return narrow;
}

std::size_t index_of(PreferenceRouter router) {
  return router == PreferenceRouter::kBaseline ? 0 : 1;
}

PreferenceRows read_rows(const H5File& file, PreferenceRouter router, std::int64_t first, std::int64_t count) {
  const std::string group = kRouterGroups[index_of(router)];
  PreferenceRows rows;
  rows.ids = file.read_int_rows("/sequences/id", first, count);
  rows.tasks = file.read_string_rows("/sequences/task", first, count);
  rows.num_prompt_tokens = file.read_int_rows("/sequences/num_prompt_tokens", first, count);
  rows.num_tokens = file.read_int_rows("/sequences/num_tokens", first, count);
  rows.count = file.read_uint16_rows(group + "count", first, count);
  rows.prompt_count = file.read_uint16_rows(group + "prompt_count", first, count);
  rows.mean_probability = file.read_float_rows(group + "mean_probability", first, count);
  return rows;
}

// Rows [from, from + 1) of the parts of `all`, `width` values each, appended to `out`.
void append_row(const PreferenceRows& all, std::size_t from, std::size_t width, PreferenceRows& out) {
  const auto append = [&](const auto& values, auto& target) {
    const auto begin = values.begin() + static_cast<std::ptrdiff_t>(from * width);
    target.insert(target.end(), begin, begin + static_cast<std::ptrdiff_t>(width));
  };
  out.ids.push_back(all.ids[from]);
  out.tasks.push_back(all.tasks[from]);
  out.num_prompt_tokens.push_back(all.num_prompt_tokens[from]);
  out.num_tokens.push_back(all.num_tokens[from]);
  append(all.count, out.count);
  append(all.prompt_count, out.prompt_count);
  append(all.mean_probability, out.mean_probability);
}

void check_predictor(const PreferencePredictor& predictor, std::int64_t num_layers, std::int64_t num_experts) {
  const auto hidden = static_cast<std::size_t>(predictor.hidden_size);
  const auto outputs = static_cast<std::size_t>(num_layers * num_experts);
  if (predictor.num_layers != num_layers || predictor.num_experts != num_experts || predictor.embedding_size < 1 ||
      predictor.hidden_size < 1 ||
      predictor.hidden_weight.size() != hidden * static_cast<std::size_t>(predictor.embedding_size) ||
      predictor.hidden_bias.size() != hidden || predictor.output_weight.size() != outputs * hidden ||
      predictor.output_bias.size() != outputs) {
    throw std::invalid_argument(
        fmt::format("preferences: a predictor of {} layers, {} experts, {} hidden units and {} inputs does not fit {} "
                    "layers and {} experts, or its weights do not fit it",
                    predictor.num_layers, predictor.num_experts, predictor.hidden_size, predictor.embedding_size,
                    num_layers, num_experts));
  }
  for (const PredictorFigures& figures : predictor.report.figures) {
    if (figures.probability_recall.size() != predictor.report.slots.size() ||
        figures.request_recall.size() != predictor.report.slots.size()) {
      throw std::invalid_argument(
          fmt::format("preferences: the predictor's report has figures of {} slot counts, got {} slot counts",
                      figures.request_recall.size(), predictor.report.slots.size()));
    }
  }
}

void write_predictor(H5File& file, const PreferencePredictor& predictor) {
  const std::int64_t layers = predictor.num_layers;
  const std::int64_t experts = predictor.num_experts;
  const std::int64_t hidden = predictor.hidden_size;
  file.write("/predictor/hidden_weight", H5Type::kFloat32, {hidden, predictor.embedding_size},
             predictor.hidden_weight.data());
  file.write("/predictor/hidden_bias", H5Type::kFloat32, {hidden}, predictor.hidden_bias.data());
  file.write("/predictor/output_weight", H5Type::kFloat32, {layers, experts, hidden}, predictor.output_weight.data());
  file.write("/predictor/output_bias", H5Type::kFloat32, {layers, experts}, predictor.output_bias.data());
  file.write_attribute("/predictor", "activation", std::string("relu"));
  file.write_attribute("/predictor", "embedding", predictor.embedding);
  const PredictorReport& report = predictor.report;
  file.write_attribute("/predictor", "num_train", report.num_train);
  file.write_attribute("/predictor", "num_held_out", report.num_held_out);
  file.write_attribute("/predictor", "num_left_out", report.num_left_out);
  file.write_attribute("/predictor", "decisive_slots", report.decisive_slots);
  file.write_attribute("/predictor", "best_by_requests", report.best_by_requests);
  file.write_attribute("/predictor", "best_by_kl", report.best_by_kl);
  std::vector<std::string> methods;
  std::vector<double> kl;
  std::vector<double> probability_recall;
  std::vector<double> request_recall;
  for (const PredictorFigures& figures : report.figures) {
    methods.push_back(figures.method);
    kl.push_back(figures.kl);
    probability_recall.insert(probability_recall.end(), figures.probability_recall.begin(),
                              figures.probability_recall.end());
    request_recall.insert(request_recall.end(), figures.request_recall.begin(), figures.request_recall.end());
  }
  const auto num_methods = static_cast<std::int64_t>(methods.size());
  const auto num_slots = static_cast<std::int64_t>(report.slots.size());
  file.write_strings("/predictor/report/method", methods);
  file.write("/predictor/report/kl", H5Type::kFloat64, {num_methods}, kl.data());
  file.write("/predictor/report/slots", H5Type::kInt64, {num_slots}, report.slots.data());
  file.write("/predictor/report/probability_recall", H5Type::kFloat64, {num_methods, num_slots},
             probability_recall.data());
  file.write("/predictor/report/request_recall", H5Type::kFloat64, {num_methods, num_slots}, request_recall.data());
}

void check_shape(const H5File& file, const std::filesystem::path& path, const std::string& name,
                 const std::vector<std::int64_t>& expected) {
  const std::vector<std::int64_t> shape = file.shape(name);
  if (shape != expected) {
    throw InputError(fmt::format("{}: dataset {} must have shape [{}], got [{}]; export the bundle again",
                                 path.string(), name, fmt::join(expected, ", "), fmt::join(shape, ", ")));
  }
}

PreferenceAggregate read_aggregate(const H5File& file, const std::string& group, std::int64_t num_layers,
                                   std::int64_t num_experts) {
  PreferenceAggregate aggregate;
  aggregate.num_layers = num_layers;
  aggregate.num_experts = num_experts;
  aggregate.count = file.read_ints(group + "count");
  aggregate.mean_probability = file.read_doubles(group + "mean_probability");
  aggregate.coactivation = file.read_ints(group + "coactivation");
  aggregate.transition = file.read_ints(group + "transition");
  return aggregate;
}

}  // namespace

PreferenceWriter::PreferenceWriter(const std::filesystem::path& path, std::int64_t num_layers, std::int64_t num_experts,
                                   std::vector<std::int64_t> model_layers, const PreferenceWriterOptions& options)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      model_layers_(std::move(model_layers)),
      options_(options),
      random_(options.seed) {
  if (num_layers < 1 || num_experts < 1 || num_experts > 65536 || options.max_sequences < 0 ||
      options.deflate_level < 0 || options.deflate_level > 9 ||
      model_layers_.size() != static_cast<std::size_t>(num_layers)) {
    throw std::invalid_argument(
        fmt::format("preferences: {} layers ({} model layers), {} experts, {} stored sequences, deflate level {} make "
                    "no file",
                    num_layers, model_layers_.size(), num_experts, options.max_sequences, options.deflate_level));
  }
  const std::int64_t array_bytes = num_layers * num_experts * static_cast<std::int64_t>(sizeof(std::uint16_t));
  chunk_rows_ = std::max<std::int64_t>(1, options.chunk_bytes / array_bytes);
  const std::int64_t buffer_chunks = options.buffer_bytes / (kArraysPerRow * array_bytes) / chunk_rows_;
  buffer_rows_ = static_cast<std::size_t>(std::max<std::int64_t>(1, buffer_chunks) * chunk_rows_);
  for (Totals& totals : totals_) {
    totals.sums = empty_aggregate(num_layers, num_experts);
  }
  target_ = std::make_unique<AtomicFile>(path);
  file_ = H5File::create(target_->temporary());
  create_datasets();
}

PreferenceWriter::~PreferenceWriter() = default;

void PreferenceWriter::create_datasets() {
  const H5RowStorage plain{kSequenceChunkRows, options_.deflate_level, options_.shuffle};
  for (const char* name : {"/sequences/id", "/sequences/num_prompt_tokens", "/sequences/num_tokens"}) {
    file_->create_rows(name, H5Type::kInt64, {}, plain);
  }
  file_->create_string_rows("/sequences/task", kSequenceChunkRows);
  const H5RowStorage storage{chunk_rows_, options_.deflate_level, options_.shuffle};
  const std::vector<std::int64_t> row = {num_layers_, num_experts_};
  for (const std::string group : kRouterGroups) {
    file_->create_rows(group + "count", H5Type::kUInt16, row, storage);
    file_->create_rows(group + "mean_probability", H5Type::kFloat16, row, storage);
    file_->create_rows(group + "prompt_count", H5Type::kUInt16, row, storage);
  }
}

// The place of the sequence that comes now; none when the reservoir passes it by. Algorithm R: the first max_sequences
// are kept; number n (from 1) then replaces a kept one with chance max/n.
std::optional<std::int64_t> PreferenceWriter::next_slot() {
  num_seen_ += 1;
  if (options_.max_sequences == 0 || num_stored_ < options_.max_sequences) {
    return num_stored_++;
  }
  const auto slot = static_cast<std::int64_t>(random_.below(static_cast<std::uint64_t>(num_seen_)));
  return slot < options_.max_sequences ? std::optional(slot) : std::nullopt;
}

void PreferenceWriter::add(const SequenceRouting& baseline, const SequenceRouting& tuned) {
  if (!file_) {
    throw std::logic_error("preferences: a sequence after the file was closed");
  }
  if (baseline.id != tuned.id || baseline.num_tokens != tuned.num_tokens ||
      baseline.num_prompt_tokens != tuned.num_prompt_tokens || baseline.counted != tuned.counted) {
    throw std::invalid_argument(fmt::format(
        "preferences: the routers saw different sequences, {} of {} tokens ({} of prompt) and {} of {} ({})",
        baseline.id, baseline.num_tokens, baseline.num_prompt_tokens, tuned.id, tuned.num_tokens,
        tuned.num_prompt_tokens));
  }
  check_sequence(baseline, "baseline", num_layers_, num_experts_);
  check_sequence(tuned, "tuned", num_layers_, num_experts_);

  const std::optional<std::int64_t> slot = next_slot();
  Row row{baseline.id, baseline.task, baseline.num_prompt_tokens, baseline.num_tokens, {}, {}, {}};
  const std::int64_t num_completion = baseline.num_counted();
  for (std::size_t router = 0; router < 2; ++router) {
    Totals& totals = totals_[router];
    const SequenceCounts counts = count_sequence(router == 0 ? baseline : tuned, totals.sums);
    totals.tokens += num_completion;
    for (std::size_t i = 0; i < counts.count.size(); ++i) {
      totals.sums.count[i] += counts.count[i];
      totals.sums.mean_probability[i] += counts.probability_sum[i];
    }
    if (slot) {
      row.count[router] = saturated(counts.count);
      row.prompt_count[router] = saturated(counts.prompt_count);
      for (const double sum : counts.probability_sum) {
        row.mean_probability[router].push_back(float_to_half_bits(
            num_completion > 0 ? static_cast<float>(sum / static_cast<double>(num_completion)) : 0.0F));
      }
    }
  }
  if (slot) {
    pending_.insert_or_assign(*slot, std::move(row));
    if (pending_.size() >= buffer_rows_) {
      flush();
    }
  }
}

void PreferenceWriter::flush() {
  while (!pending_.empty()) {
    flush_chunk(pending_.begin()->first / chunk_rows_);
  }
}

// Writes the rows of one chunk that are pending. The others in it are read first: a chunk is compressed as a whole.
void PreferenceWriter::flush_chunk(std::int64_t chunk) {
  const std::int64_t begin = chunk * chunk_rows_;
  const std::int64_t end = std::min(begin + chunk_rows_, num_stored_);
  std::vector<const Row*> rows(static_cast<std::size_t>(end - begin), nullptr);
  for (auto entry = pending_.begin(); entry != pending_.end() && entry->first < end; ++entry) {
    rows[static_cast<std::size_t>(entry->first - begin)] = &entry->second;
  }
  // Texts lie in a heap that only grows: write those that are new.
  for (std::size_t i = 0; i < rows.size();) {
    std::vector<std::string> tasks;
    while (i < rows.size() && rows[i] != nullptr) {
      tasks.push_back(rows[i++]->task);
    }
    if (!tasks.empty()) {
      file_->write_string_rows("/sequences/task", begin + static_cast<std::int64_t>(i - tasks.size()), tasks);
    } else {
      ++i;
    }
  }
  std::vector<Row> kept;
  if (std::find(rows.begin(), rows.end(), nullptr) != rows.end()) {
    const std::int64_t written = std::min(end, num_written_) - begin;
    const PreferenceRows old[2] = {read_rows(*file_, PreferenceRouter::kBaseline, begin, written),
                                   read_rows(*file_, PreferenceRouter::kTuned, begin, written)};
    const auto width = static_cast<std::ptrdiff_t>(num_layers_ * num_experts_);
    kept.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] != nullptr) {
        continue;
      }
      Row row{old[0].ids[i], "", old[0].num_prompt_tokens[i], old[0].num_tokens[i], {}, {}, {}};
      const auto at = static_cast<std::ptrdiff_t>(i) * width;
      for (std::size_t router = 0; router < 2; ++router) {
        const PreferenceRows& from = old[router];
        row.count[router].assign(from.count.begin() + at, from.count.begin() + at + width);
        row.prompt_count[router].assign(from.prompt_count.begin() + at, from.prompt_count.begin() + at + width);
        std::transform(from.mean_probability.begin() + at, from.mean_probability.begin() + at + width,
                       std::back_inserter(row.mean_probability[router]), float_to_half_bits);
      }
      kept.push_back(std::move(row));
      rows[i] = &kept.back();
    }
  }
  const auto count = static_cast<std::int64_t>(rows.size());
  const auto write_numbers = [&](const char* name, std::int64_t Row::*member) {
    std::vector<std::int64_t> values;
    values.reserve(rows.size());
    for (const Row* row : rows) {
      values.push_back(row->*member);
    }
    file_->write_rows(name, H5Type::kInt64, begin, count, values.data());
  };
  write_numbers("/sequences/id", &Row::id);
  write_numbers("/sequences/num_prompt_tokens", &Row::num_prompt_tokens);
  write_numbers("/sequences/num_tokens", &Row::num_tokens);
  const auto write_arrays = [&](const std::string& name, H5Type type, auto member, std::size_t router) {
    std::vector<std::uint16_t> values;
    for (const Row* row : rows) {
      const std::vector<std::uint16_t>& part = (row->*member)[router];
      values.insert(values.end(), part.begin(), part.end());
    }
    file_->write_rows(kRouterGroups[router] + name, type, begin, count, values.data());
  };
  for (std::size_t router = 0; router < 2; ++router) {
    write_arrays("count", H5Type::kUInt16, &Row::count, router);
    write_arrays("mean_probability", H5Type::kFloat16, &Row::mean_probability, router);
    write_arrays("prompt_count", H5Type::kUInt16, &Row::prompt_count, router);
  }
  num_written_ = std::max(num_written_, end);
  pending_.erase(pending_.begin(), pending_.lower_bound(end));
}

PreferenceRows PreferenceWriter::rows(PreferenceRouter router, std::int64_t first, std::int64_t count) {
  if (!file_) {
    throw std::logic_error("preferences: rows after the file was closed; open it with PreferenceReader");
  }
  flush();
  return read_rows(*file_, router, first, count);
}

PreferenceAggregate PreferenceWriter::aggregate(PreferenceRouter router) const {
  const Totals& totals = totals_[index_of(router)];
  PreferenceAggregate aggregate = totals.sums;
  for (double& value : aggregate.mean_probability) {
    value = totals.tokens > 0 ? value / static_cast<double>(totals.tokens) : 0.0;
  }
  return aggregate;
}

void PreferenceWriter::close(const PreferencePredictor* predictor) {
  if (!file_) {
    throw std::logic_error("preferences: the file was closed before");
  }
  if (predictor != nullptr) {
    check_predictor(*predictor, num_layers_, num_experts_);
  }
  flush();
  const std::vector<std::int64_t> per_layer = {num_layers_, num_experts_};
  const std::vector<std::int64_t> pairs = {num_layers_, num_experts_, num_experts_};
  for (const PreferenceRouter router : {PreferenceRouter::kBaseline, PreferenceRouter::kTuned}) {
    const std::string group = std::string(kRouterGroups[index_of(router)]) + "aggregate/";
    const PreferenceAggregate total = aggregate(router);
    file_->write(group + "count", H5Type::kInt64, per_layer, total.count.data());
    file_->write(group + "mean_probability", H5Type::kFloat64, per_layer, total.mean_probability.data());
    file_->write(group + "coactivation", H5Type::kInt64, pairs, total.coactivation.data());
    file_->write(group + "transition", H5Type::kInt64, pairs, total.transition.data());
  }
  if (predictor != nullptr) {
    write_predictor(*file_, *predictor);
  }
  file_->write_attribute("/", "format", std::string(kFormat));
  file_->write_attribute("/", "format_version", kFormatVersion);
  file_->write_attribute("/", "producer", std::string("hestia"));
  file_->write_attribute("/", "layers", model_layers_);
  file_->write_attribute("/", "num_experts", num_experts_);
  file_->write_attribute("/", "num_sequences_total", num_seen_);
  file_->write_attribute("/", "max_sequences", options_.max_sequences);
  file_->close();
  file_.reset();
  target_->commit();
}

PreferenceReader::PreferenceReader(const std::filesystem::path& path) : path_(path), file_(H5File::open(path)) {
  if (!file_.contains("/sequences/id") || !file_.contains("/routers/baseline/aggregate/count") ||
      !file_.contains("/routers/tuned/aggregate/count")) {
    throw damaged("not a preferences file: /sequences or /routers is missing");
  }
  const std::int64_t version = file_.read_int_attribute("/", "format_version");
  if (version > kFormatVersion) {
    throw InputError(
        fmt::format("{}: format version {} is newer than this program supports ({}); export the bundle "
                    "again or update the program",
                    path.string(), version, kFormatVersion));
  }
  const std::string format = file_.read_string_attribute("/", "format");
  if (format != kFormat || version < 1) {
    throw damaged(fmt::format("not a preferences file: format must be \"{}\" version {}, got \"{}\" {}", kFormat,
                              kFormatVersion, format, version));
  }
  num_sequences_total_ = file_.read_int_attribute("/", "num_sequences_total");
  layers_ = file_.read_ints_attribute("/", "layers");
  num_experts_ = file_.read_int_attribute("/", "num_experts");
  const std::vector<std::int64_t> stored = file_.shape("/sequences/id");
  num_stored_ = stored.size() == 1 ? stored[0] : -1;
  if (num_stored_ < 0 || num_stored_ > num_sequences_total_) {
    throw damaged(fmt::format("sequence ids of shape [{}] and {} sequences in all do not match",
                              fmt::join(stored, ", "), num_sequences_total_));
  }
  for (const char* name : {"task", "num_prompt_tokens", "num_tokens"}) {
    check_shape(file_, path_, std::string("/sequences/") + name, {num_stored_});
  }
  for (const std::string group : kRouterGroups) {
    for (const char* name : {"count", "mean_probability", "prompt_count"}) {
      check_shape(file_, path_, group + name, {num_stored_, num_layers(), num_experts_});
    }
    for (const char* name : {"aggregate/count", "aggregate/mean_probability"}) {
      check_shape(file_, path_, group + name, {num_layers(), num_experts_});
    }
    for (const char* name : {"aggregate/coactivation", "aggregate/transition"}) {
      check_shape(file_, path_, group + name, {num_layers(), num_experts_, num_experts_});
    }
  }
}

InputError PreferenceReader::damaged(const std::string& what) const {
  return InputError(fmt::format("{}: {}; export the bundle again", path_.string(), what));
}

std::vector<std::int64_t> PreferenceReader::ids() const {
  return file_.read_ints("/sequences/id");
}

std::vector<std::string> PreferenceReader::tasks() const {
  return file_.read_strings("/sequences/task");
}

PreferenceRows PreferenceReader::rows(PreferenceRouter router, std::int64_t first, std::int64_t count) const {
  return read_rows(file_, router, first, count);
}

PreferenceRows PreferenceReader::rows(PreferenceRouter router, std::span<const std::int64_t> places) const {
  const auto width = static_cast<std::size_t>(num_layers() * num_experts_);
  const std::int64_t chunk = file_.chunk_rows(std::string(kRouterGroups[index_of(router)]) + "count");
  std::vector<std::int64_t> sorted(places.begin(), places.end());
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  // Each chunk is read once, from the first to the last place in it.
  PreferenceRows found;
  for (std::size_t begin = 0; begin < sorted.size();) {
    std::size_t end = begin;
    while (end < sorted.size() && sorted[end] / chunk == sorted[begin] / chunk) {
      ++end;
    }
    const PreferenceRows block = read_rows(file_, router, sorted[begin], sorted[end - 1] - sorted[begin] + 1);
    for (std::size_t i = begin; i < end; ++i) {
      append_row(block, static_cast<std::size_t>(sorted[i] - sorted[begin]), width, found);
    }
    begin = end;
  }
  PreferenceRows rows;
  for (const std::int64_t place : places) {
    const auto at = std::lower_bound(sorted.begin(), sorted.end(), place) - sorted.begin();
    append_row(found, static_cast<std::size_t>(at), width, rows);
  }
  return rows;
}

PreferenceAggregate PreferenceReader::aggregate(PreferenceRouter router) const {
  return read_aggregate(file_, std::string(kRouterGroups[index_of(router)]) + "aggregate/", num_layers(), num_experts_);
}

std::optional<PreferencePredictor> PreferenceReader::predictor() const {
  if (!file_.contains("/predictor")) {
    return std::nullopt;
  }
  PreferencePredictor predictor;
  predictor.num_layers = num_layers();
  predictor.num_experts = num_experts_;
  const std::vector<std::int64_t> shape = file_.shape("/predictor/hidden_weight");
  if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) {
    throw damaged(fmt::format("dataset /predictor/hidden_weight must be a matrix, got [{}]", fmt::join(shape, ", ")));
  }
  predictor.hidden_size = shape[0];
  predictor.embedding_size = shape[1];
  check_shape(file_, path_, "/predictor/hidden_bias", {predictor.hidden_size});
  check_shape(file_, path_, "/predictor/output_weight", {num_layers(), num_experts_, predictor.hidden_size});
  check_shape(file_, path_, "/predictor/output_bias", {num_layers(), num_experts_});
  const std::string activation = file_.read_string_attribute("/predictor", "activation");
  if (activation != "relu") {
    throw damaged(fmt::format("attribute activation of /predictor must be \"relu\", got \"{}\"", activation));
  }
  predictor.embedding = file_.read_string_attribute("/predictor", "embedding");
  predictor.hidden_weight = file_.read_floats("/predictor/hidden_weight");
  predictor.hidden_bias = file_.read_floats("/predictor/hidden_bias");
  predictor.output_weight = file_.read_floats("/predictor/output_weight");
  predictor.output_bias = file_.read_floats("/predictor/output_bias");
  PredictorReport& report = predictor.report;
  report.num_train = file_.read_int_attribute("/predictor", "num_train");
  report.num_held_out = file_.read_int_attribute("/predictor", "num_held_out");
  report.num_left_out = file_.read_int_attribute("/predictor", "num_left_out");
  report.decisive_slots = file_.read_int_attribute("/predictor", "decisive_slots");
  report.best_by_requests = file_.read_string_attribute("/predictor", "best_by_requests");
  report.best_by_kl = file_.read_string_attribute("/predictor", "best_by_kl");
  report.slots = file_.read_ints("/predictor/report/slots");
  const std::vector<std::string> methods = file_.read_strings("/predictor/report/method");
  const auto num_methods = static_cast<std::int64_t>(methods.size());
  const auto num_slots = static_cast<std::int64_t>(report.slots.size());
  check_shape(file_, path_, "/predictor/report/kl", {num_methods});
  check_shape(file_, path_, "/predictor/report/probability_recall", {num_methods, num_slots});
  check_shape(file_, path_, "/predictor/report/request_recall", {num_methods, num_slots});
  const std::vector<double> kl = file_.read_doubles("/predictor/report/kl");
  const std::vector<double> probability_recall = file_.read_doubles("/predictor/report/probability_recall");
  const std::vector<double> request_recall = file_.read_doubles("/predictor/report/request_recall");
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const auto begin = static_cast<std::ptrdiff_t>(i) * num_slots;
    report.figures.push_back({methods[i],
                              kl[i],
                              {probability_recall.begin() + begin, probability_recall.begin() + begin + num_slots},
                              {request_recall.begin() + begin, request_recall.begin() + begin + num_slots}});
  }
  return predictor;
}

}  // namespace hestia
