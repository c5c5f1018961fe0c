#include "hestia/routing/preferences.hpp"

#include <algorithm>
#include <stdexcept>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"

namespace hestia {

namespace {

constexpr const char* kFormat = "hestia preferences";
constexpr std::int64_t kFormatVersion = 1;

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

template <class Value>
void put(std::vector<std::vector<Value>>& kept, std::size_t slot, std::vector<Value>&& value) {
  if (slot == kept.size()) {
    kept.push_back(std::move(value));
  } else {
    kept[slot] = std::move(value);
  }
}

template <class Value>
std::vector<Value> joined(const std::vector<std::vector<Value>>& parts) {
  std::vector<Value> all;
  for (const std::vector<Value>& part : parts) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

PreferenceAggregate read_aggregate(const H5File& file, const std::filesystem::path& path, const std::string& group,
                                   std::int64_t num_layers, std::int64_t num_experts) {
  PreferenceAggregate aggregate;
  aggregate.num_layers = num_layers;
  aggregate.num_experts = num_experts;
  const std::vector<std::int64_t> per_layer = {num_layers, num_experts};
  const std::vector<std::int64_t> pairs = {num_layers, num_experts, num_experts};
  for (const char* name : {"count", "mean_probability", "coactivation", "transition"}) {
    const std::vector<std::int64_t>& expected =
        std::string_view(name) == "coactivation" || std::string_view(name) == "transition" ? pairs : per_layer;
    const std::vector<std::int64_t> shape = file.shape(group + name);
    if (shape != expected) {
      throw InputError(fmt::format("{}: dataset {}{} must have shape [{}], got [{}]; export the bundle again",
                                   path.string(), group, name, fmt::join(expected, ", "), fmt::join(shape, ", ")));
    }
  }
  aggregate.count = file.read_ints(group + "count");
  aggregate.mean_probability = file.read_doubles(group + "mean_probability");
  aggregate.coactivation = file.read_ints(group + "coactivation");
  aggregate.transition = file.read_ints(group + "transition");
  return aggregate;
}

}  // namespace

PreferenceRecorder::PreferenceRecorder(std::int64_t num_layers, std::int64_t num_experts,
                                       std::vector<std::int64_t> model_layers, std::int64_t max_sequences,
                                       std::uint64_t seed)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      model_layers_(std::move(model_layers)),
      max_sequences_(max_sequences),
      random_state_(seed) {
  if (num_layers < 1 || num_experts < 1 || num_experts > 65536 || max_sequences < 0 ||
      model_layers_.size() != static_cast<std::size_t>(num_layers)) {
    throw std::invalid_argument(
        fmt::format("preferences: {} layers ({} model layers), {} experts, {} stored sequences make no recorder",
                    num_layers, model_layers_.size(), num_experts, max_sequences));
  }
  for (Router* router : {&baseline_, &tuned_}) {
    router->total = empty_aggregate(num_layers, num_experts);
    router->probability_sum.assign(static_cast<std::size_t>(num_layers * num_experts), 0.0);
  }
}

void PreferenceRecorder::add(const SequenceRouting& baseline, const SequenceRouting& tuned) {
  if (baseline.id != tuned.id || baseline.num_tokens != tuned.num_tokens ||
      baseline.num_prompt_tokens != tuned.num_prompt_tokens || baseline.counted != tuned.counted) {
    throw std::invalid_argument(fmt::format(
        "preferences: the routers saw different sequences, {} of {} tokens ({} of prompt) and {} of {} ({})",
        baseline.id, baseline.num_tokens, baseline.num_prompt_tokens, tuned.id, tuned.num_tokens,
        tuned.num_prompt_tokens));
  }
  check_sequence(baseline, "baseline", num_layers_, num_experts_);
  check_sequence(tuned, "tuned", num_layers_, num_experts_);

  // Algorithm R: the first max_sequences are kept; number n (from 1) then replaces a kept one with chance max/n.
  const auto limit = static_cast<std::size_t>(max_sequences_);
  seen_ += 1;
  std::size_t slot = kept_.size();
  if (kept_.size() == limit) {
    SplitMix64 random(random_state_);
    slot = random.below(static_cast<std::uint64_t>(seen_));
    random_state_ = random.state();
  }
  const bool keep = slot < limit;
  if (keep) {
    const Kept entry{baseline.id, baseline.task, baseline.num_prompt_tokens, baseline.num_tokens};
    if (slot == kept_.size()) {
      kept_.push_back(entry);
    } else {
      kept_[slot] = entry;
    }
  }

  const std::int64_t num_completion = baseline.num_counted();
  const auto record = [&](Router& router, const SequenceRouting& sequence) {
    SequenceCounts counts = count_sequence(sequence, router.total);
    router.tokens += num_completion;
    std::vector<float> mean(counts.count.size(), 0.0F);
    for (std::size_t i = 0; i < mean.size(); ++i) {
      router.total.count[i] += counts.count[i];
      router.probability_sum[i] += counts.probability_sum[i];
      if (num_completion > 0) {
        mean[i] = static_cast<float>(counts.probability_sum[i] / static_cast<double>(num_completion));
      }
    }
    if (keep) {
      put(router.count, slot, saturated(counts.count));
      put(router.prompt_count, slot, saturated(counts.prompt_count));
      put(router.mean_probability, slot, std::move(mean));
    }
  };
  record(baseline_, baseline);
  record(tuned_, tuned);
}

PreferenceAggregate PreferenceRecorder::aggregate_of(const Router& router) {
  PreferenceAggregate aggregate = router.total;
  for (std::size_t i = 0; i < aggregate.mean_probability.size() && router.tokens > 0; ++i) {
    aggregate.mean_probability[i] = router.probability_sum[i] / static_cast<double>(router.tokens);
  }
  return aggregate;
}

PreferenceAggregate PreferenceRecorder::aggregate_baseline() const {
  return aggregate_of(baseline_);
}

PreferenceAggregate PreferenceRecorder::aggregate_tuned() const {
  return aggregate_of(tuned_);
}

void PreferenceRecorder::write(const std::filesystem::path& path) const {
  std::vector<std::int64_t> ids;
  std::vector<std::string> tasks;
  std::vector<std::int64_t> prompt_tokens;
  std::vector<std::int64_t> tokens;
  for (const Kept& kept : kept_) {
    ids.push_back(kept.id);
    tasks.push_back(kept.task);
    prompt_tokens.push_back(kept.num_prompt_tokens);
    tokens.push_back(kept.num_tokens);
  }
  const auto num_kept = static_cast<std::int64_t>(kept_.size());
  const std::vector<std::int64_t> per_sequence = {num_kept, num_layers_, num_experts_};
  const std::vector<std::int64_t> per_layer = {num_layers_, num_experts_};
  const std::vector<std::int64_t> pairs = {num_layers_, num_experts_, num_experts_};
  write_file_atomically(path, [&](const std::filesystem::path& temporary) {
    H5File file = H5File::create(temporary);
    file.write_attribute("/", "format", std::string(kFormat));
    file.write_attribute("/", "format_version", kFormatVersion);
    file.write_attribute("/", "producer", std::string("hestia"));
    file.write_attribute("/", "layers", model_layers_);
    file.write_attribute("/", "num_experts", num_experts_);
    file.write_attribute("/", "num_sequences_total", seen_);
    file.write_attribute("/", "max_sequences", max_sequences_);
    file.write("/sequences/id", H5Type::kInt64, {num_kept}, ids.data());
    file.write_strings("/sequences/task", tasks);
    file.write("/sequences/num_prompt_tokens", H5Type::kInt64, {num_kept}, prompt_tokens.data());
    file.write("/sequences/num_tokens", H5Type::kInt64, {num_kept}, tokens.data());
    const auto write_router = [&](const std::string& group, const Router& router) {
      const std::vector<std::uint16_t> counts = joined(router.count);
      const std::vector<std::uint16_t> prompt_counts = joined(router.prompt_count);
      std::vector<std::uint16_t> probabilities;
      for (const std::vector<float>& sequence : router.mean_probability) {
        for (const float value : sequence) {
          probabilities.push_back(float_to_half_bits(value));
        }
      }
      const PreferenceAggregate total = aggregate_of(router);
      file.write(group + "count", H5Type::kUInt16, per_sequence, counts.data());
      file.write(group + "mean_probability", H5Type::kFloat16, per_sequence, probabilities.data());
      file.write(group + "prompt_count", H5Type::kUInt16, per_sequence, prompt_counts.data());
      file.write(group + "aggregate/count", H5Type::kInt64, per_layer, total.count.data());
      file.write(group + "aggregate/mean_probability", H5Type::kFloat64, per_layer, total.mean_probability.data());
      file.write(group + "aggregate/coactivation", H5Type::kInt64, pairs, total.coactivation.data());
      file.write(group + "aggregate/transition", H5Type::kInt64, pairs, total.transition.data());
    };
    write_router("/routers/baseline/", baseline_);
    write_router("/routers/tuned/", tuned_);
    file.close();
  });
}

Preferences read_preferences(const std::filesystem::path& path) {
  const H5File file = H5File::open(path);
  const auto damaged = [&](const std::string& what) {
    return InputError(fmt::format("{}: {}; export the bundle again", path.string(), what));
  };
  if (!file.contains("/sequences/id") || !file.contains("/routers/baseline/aggregate/count") ||
      !file.contains("/routers/tuned/aggregate/count")) {
    throw damaged("not a preferences file: /sequences or /routers is missing");
  }
  const std::int64_t version = file.read_int_attribute("/", "format_version");
  if (version > kFormatVersion) {
    throw InputError(
        fmt::format("{}: format version {} is newer than this program supports ({}); export the bundle "
                    "again or update the program",
                    path.string(), version, kFormatVersion));
  }
  const std::string format = file.read_string_attribute("/", "format");
  if (format != kFormat || version < 1) {
    throw damaged(fmt::format("not a preferences file: format must be \"{}\" version {}, got \"{}\" {}", kFormat,
                              kFormatVersion, format, version));
  }
  Preferences preferences;
  preferences.num_sequences_total = file.read_int_attribute("/", "num_sequences_total");
  preferences.layers = file.read_ints_attribute("/", "layers");
  const std::int64_t num_experts = file.read_int_attribute("/", "num_experts");
  const auto num_layers = static_cast<std::int64_t>(preferences.layers.size());
  preferences.ids = file.read_ints("/sequences/id");
  preferences.tasks = file.read_strings("/sequences/task");
  const auto num_kept = static_cast<std::int64_t>(preferences.ids.size());
  if (preferences.tasks.size() != preferences.ids.size() || num_kept > preferences.num_sequences_total) {
    throw damaged(fmt::format("{} sequence ids, {} tasks and {} sequences in all do not match", num_kept,
                              preferences.tasks.size(), preferences.num_sequences_total));
  }
  for (const std::string group : {"/routers/baseline/", "/routers/tuned/"}) {
    for (const char* name : {"count", "mean_probability", "prompt_count"}) {
      const std::vector<std::int64_t> expected = {num_kept, num_layers, num_experts};
      const std::vector<std::int64_t> shape = file.shape(group + name);
      if (shape != expected) {
        throw damaged(fmt::format("dataset {}{} must have shape [{}], got [{}]", group, name, fmt::join(expected, ", "),
                                  fmt::join(shape, ", ")));
      }
    }
  }
  preferences.baseline = read_aggregate(file, path, "/routers/baseline/aggregate/", num_layers, num_experts);
  preferences.tuned = read_aggregate(file, path, "/routers/tuned/aggregate/", num_layers, num_experts);
  return preferences;
}

}  // namespace hestia
