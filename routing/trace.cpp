#include "hestia/routing/trace.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "trace_hdf5.hpp"

namespace hestia {

namespace {

constexpr std::string_view kMagic = "# route_trace v";
constexpr std::string_view kColumns = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes";
constexpr std::string_view kPairColumns = "layer,expert";
constexpr std::string_view kHdf5Signature = "\x89HDF\r\n\x1a\n";
constexpr std::size_t kNumColumns = 9;
// Bounds that keep a damaged header from asking for absurd amounts of memory.
constexpr std::int64_t kMaxLayers = 1 << 20;
constexpr std::int64_t kMaxExperts = 1 << 16;

template <class Value>
bool parse_all(std::string_view text, Value& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  std::size_t begin = 0;
  while (true) {
    const std::size_t end = text.find(separator, begin);
    parts.push_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) {
      return parts;
    }
    begin = end + 1;
  }
}

// `text` shortened for a message.
std::string_view shown(std::string_view text) {
  return text.substr(0, 80);
}

// The words of a header line as key=value; a word without "=" belongs to the value before it (a path with spaces).
std::vector<std::pair<std::string, std::string>> key_values(std::string_view text) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const std::string_view word : split(text, ' ')) {
    const std::size_t equals = word.find('=');
    if (equals != std::string_view::npos) {
      pairs.emplace_back(std::string(word.substr(0, equals)), std::string(word.substr(equals + 1)));
    } else if (!word.empty() && !pairs.empty()) {
      pairs.back().second += ' ';
      pairs.back().second += word;
    }
  }
  return pairs;
}

struct Row {
  std::int64_t turn = 0;
  std::int64_t phase = 0;
  std::int64_t step = 0;
  std::int64_t layer = 0;
  std::int64_t slot = 0;
  std::int64_t expert = 0;
  float weight = 0.0F;
  std::int64_t residency = 0;
  std::int64_t expert_bytes = 0;
};

// Reads one trace file line by line. One object per file.
class TraceReader {
 public:
  TraceReader(const std::filesystem::path& path, std::string_view text) : path_(path.string()), text_(text) {}

  RoutingTrace read() {
    if (!next_line()) {
      throw InputError(fmt::format("{}: the file is empty; expected a routing trace", path_));
    }
    if (line_.starts_with(kMagic)) {
      check_version(line_.substr(kMagic.size()));
      read_header();
      read_rows();
    } else if (line_ == kPairColumns) {
      read_pairs();
    } else {
      throw error(fmt::format("not a routing trace: expected \"{}{}\" or \"{}\", got \"{}\"; check the path", kMagic,
                              kTraceVersion, kPairColumns, shown(line_)));
    }
    finish();
    return std::move(trace_);
  }

 private:
  [[nodiscard]] InputError error(const std::string& message) const {
    return InputError(fmt::format("{}:{}: {}", path_, line_number_, message));
  }

  bool next_line() {
    if (position_ == text_.size()) {
      return false;
    }
    ++line_number_;
    const std::size_t end = text_.find('\n', position_);
    if (end == std::string_view::npos) {
      throw error(
          fmt::format("the last line does not end in a newline, got \"{}\"; the file was cut short: record it "
                      "again, or end the line if it is whole",
                      shown(text_.substr(position_))));
    }
    line_ = text_.substr(position_, end - position_);
    if (line_.ends_with('\r')) {
      line_.remove_suffix(1);
    }
    position_ = end + 1;
    return true;
  }

  void check_version(std::string_view text) const {
    std::int64_t version = 0;
    if (!parse_all(text, version) || version < 1) {
      throw error(
          fmt::format("route_trace version is not a number, got \"{}\"; expected {}", shown(text), kTraceVersion));
    }
    if (version > kTraceVersion) {
      throw error(fmt::format("route_trace version {} is newer than this program supports ({}); update the program",
                              version, kTraceVersion));
    }
  }

  std::int64_t header_number(const std::pair<std::string, std::string>& pair, std::int64_t low,
                             std::int64_t high) const {
    std::int64_t value = 0;
    if (!parse_all(pair.second, value) || value < low || value > high) {
      throw error(fmt::format("{} must be a whole number between {} and {}, got \"{}\"; correct the header", pair.first,
                              low, high, shown(pair.second)));
    }
    return value;
  }

  void add_comment(std::string_view text) {
    trace_.comment += trace_.comment.empty() ? "" : "\n";
    trace_.comment += text;
  }

  void read_model_line(std::string_view text) {
    std::string rest;
    for (const auto& pair : key_values(text)) {
      if (pair.first == "model") {
        trace_.model = pair.second;
      } else if (pair.first == "n_layer") {
        trace_.num_layers = header_number(pair, 1, kMaxLayers);
      } else if (pair.first == "n_expert") {
        trace_.num_experts = header_number(pair, 1, kMaxExperts);
      } else if (pair.first == "n_expert_used") {
        trace_.top_k = header_number(pair, 1, kMaxExperts);
      } else {
        rest += fmt::format("{}{}={}", rest.empty() ? "" : " ", pair.first, pair.second);
      }
    }
    if (!rest.empty()) {
      add_comment(rest);
    }
    if (trace_.num_experts > 0 && trace_.top_k > trace_.num_experts) {
      throw error(fmt::format("n_expert_used must be at most n_expert ({}), got {}; correct the header",
                              trace_.num_experts, trace_.top_k));
    }
  }

  void read_layer_line(std::string_view text) {
    TraceLayer layer;
    for (const auto& pair : key_values(text)) {
      if (pair.first == "layer") {
        layer.layer = header_number(pair, 0, kMaxLayers);
      } else if (pair.first == "expert_bytes") {
        layer.expert_bytes = header_number(pair, 0, kMaxTraceBytes);
      } else if (pair.first == "dense_bytes") {
        layer.dense_bytes = header_number(pair, 0, kMaxTraceBytes);
      } else if (pair.first == "preload") {
        for (const std::string_view expert : split(pair.second, ',')) {
          const auto id = header_number({pair.first, std::string(expert)}, 0, kMaxExperts - 1);
          layer.preload.push_back(static_cast<std::uint16_t>(id));
        }
      }
    }
    if (!layers_.emplace(layer.layer, layer).second) {
      throw error(fmt::format("layer {} is described twice; remove one of the lines", layer.layer));
    }
  }

  void read_header() {
    while (true) {
      if (!next_line()) {
        throw error(fmt::format("the column line is missing; expected \"{}\"", kColumns));
      }
      if (!line_.starts_with('#')) {
        break;
      }
      std::string_view text = line_.substr(1);
      text.remove_prefix(text.starts_with(' ') ? 1 : 0);
      if (text.starts_with("model=") || text.starts_with("n_layer=")) {
        read_model_line(text);
      } else if (text.starts_with("layer=")) {
        read_layer_line(text);
      } else {
        add_comment(text);
      }
    }
    if (line_ != kColumns) {
      throw error(fmt::format("wrong column line: expected \"{}\", got \"{}\"", kColumns, shown(line_)));
    }
    if (trace_.num_layers == 0 || trace_.num_experts == 0 || trace_.top_k == 0) {
      throw error(
          "the header lacks n_layer, n_expert or n_expert_used; expected a line \"# model=... n_layer=... "
          "n_expert=... n_expert_used=...\" above the columns");
    }
    if (!layers_.empty() && layers_.rbegin()->first >= trace_.num_layers) {
      throw error(fmt::format("a \"# layer=\" line must be below n_layer ({}), got {}; correct the header",
                              trace_.num_layers, layers_.rbegin()->first));
    }
  }

  // The fast path; what exactly is wrong with a line is found out by `row_error`.
  static bool parse_row(std::string_view line, Row& row) {
    const char* at = line.data();
    const char* const end = at + line.size();
    const auto field = [&](auto& value, bool last) {
      const auto [stop, code] = std::from_chars(at, end, value);
      if (code != std::errc() || (last ? stop != end : (stop == end || *stop != ','))) {
        return false;
      }
      at = last ? stop : stop + 1;
      return true;
    };
    return field(row.turn, false) && field(row.phase, false) && field(row.step, false) && field(row.layer, false) &&
           field(row.slot, false) && field(row.expert, false) && field(row.weight, false) &&
           field(row.residency, false) && field(row.expert_bytes, true);
  }

  [[nodiscard]] InputError row_error() const {
    const std::vector<std::string_view> fields = split(line_, ',');
    if (fields.size() != kNumColumns) {
      return error(fmt::format("expected {} columns ({}), got {} in \"{}\"", kNumColumns, kColumns, fields.size(),
                               shown(line_)));
    }
    const std::vector<std::string_view> names = split(kColumns, ',');
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (names[i] == "weight") {
        float value = 0.0F;
        if (!parse_all(fields[i], value)) {
          return error(fmt::format("weight must be a number, got \"{}\"", shown(fields[i])));
        }
        continue;
      }
      std::int64_t value = 0;
      if (!parse_all(fields[i], value)) {
        return error(fmt::format("{} must be a whole number, got \"{}\"", names[i], shown(fields[i])));
      }
    }
    return error(fmt::format("not a row of a routing trace, got \"{}\"", shown(line_)));
  }

  void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high, const char* limit) const {
    if (value < low || value > high) {
      throw error(fmt::format("{} must lie between {} and {}{}, got {}", name, low, high, limit, value));
    }
  }

  void check_row(const Row& row) const {
    check_range("phase", row.phase, 0, 1, " (0 prefill, 1 decode)");
    check_range("step", row.step, 0, INT64_MAX, "");
    check_range("layer", row.layer, 0, trace_.num_layers - 1, " (n_layer - 1)");
    check_range("slot", row.slot, 0, trace_.top_k - 1, " (n_expert_used - 1)");
    check_range("expert", row.expert, 0, trace_.num_experts - 1, " (n_expert - 1)");
    check_range("residency", row.residency, 0, 1, "");
    check_range("expert_bytes", row.expert_bytes, 0, kMaxTraceBytes, "");
    if (!std::isfinite(row.weight)) {
      throw error(fmt::format("weight must be finite, got {}", row.weight));
    }
  }

  // Starts the entry that `row` belongs to; within a turn the steps of a layer must rise.
  void open_entry(const Row& row) {
    if (trace_.entries.empty() || trace_.entries.back().sequence != row.turn) {
      if (!turn_ranks_.emplace(row.turn, turn_ranks_.size()).second) {
        throw error(fmt::format("turn {} comes back after another turn began; sort the rows by turn", row.turn));
      }
      std::fill(last_step_.begin(), last_step_.end(), -1);
    }
    std::int64_t& last = last_step_[static_cast<std::size_t>(row.layer)];
    if (row.step <= last) {
      throw error(
          fmt::format("step {} of layer {} comes after its step {}; the rows of one layer and step must stand "
                      "together and the steps of a layer must rise",
                      row.step, row.layer, last));
    }
    last = row.step;
    trace_.entries.push_back({row.turn, row.step, static_cast<std::int32_t>(row.layer), static_cast<Phase>(row.phase),
                              0, trace_.experts.size()});
  }

  // All rows of the open entry have been seen: their slots must be 0 .. count-1.
  void close_entry() {
    if (trace_.entries.empty()) {
      return;
    }
    const TraceEntry& entry = trace_.entries.back();
    for (std::size_t slot = 0; slot < entry.count; ++slot) {
      if (line_of_slot_[slot] < entry_line_) {
        line_number_ = entry_line_;
        throw error(
            fmt::format("slot {} is missing among the {} rows of step {}, layer {}; slots must run from 0 "
                        "without a gap",
                        slot, entry.count, entry.step, entry.layer));
      }
    }
  }

  void add_row(const Row& row) {
    const bool same = !trace_.entries.empty() && trace_.entries.back().sequence == row.turn &&
                      trace_.entries.back().step == row.step && trace_.entries.back().layer == row.layer;
    if (!same) {
      const std::int64_t line = line_number_;
      close_entry();
      line_number_ = line;
      open_entry(row);
      entry_line_ = line;
    }
    TraceEntry& entry = trace_.entries.back();
    if (entry.phase != static_cast<Phase>(row.phase)) {
      throw error(fmt::format("phase differs within step {}, layer {}, got {}", row.step, row.layer, row.phase));
    }
    const auto slot = static_cast<std::size_t>(row.slot);
    const auto expert = static_cast<std::size_t>(row.expert);
    if (line_of_slot_[slot] >= entry_line_) {
      throw error(fmt::format("slot {} of step {}, layer {} stands already in line {}", row.slot, row.step, row.layer,
                              line_of_slot_[slot]));
    }
    if (line_of_expert_[expert] >= entry_line_) {
      throw error(fmt::format("expert {} of step {}, layer {} stands already in line {}", row.expert, row.step,
                              row.layer, line_of_expert_[expert]));
    }
    line_of_slot_[slot] = line_number_;
    line_of_expert_[expert] = line_number_;
    // Slots may come in any order; until the gap is checked, room is kept for the highest seen.
    entry.count += 1;
    const std::size_t needed = static_cast<std::size_t>(entry.first) + std::max<std::size_t>(entry.count, slot + 1);
    if (trace_.experts.size() < needed) {
      trace_.experts.resize(needed);
      trace_.weights.resize(needed);
      trace_.residency.resize(needed);
      trace_.moved_bytes.resize(needed);
    }
    const std::size_t at = static_cast<std::size_t>(entry.first) + slot;
    trace_.experts[at] = static_cast<std::uint16_t>(expert);
    trace_.weights[at] = row.weight;
    trace_.residency[at] = static_cast<std::uint8_t>(row.residency);
    trace_.moved_bytes[at] = row.expert_bytes;
    const auto [found, added] = layers_.try_emplace(row.layer, TraceLayer{row.layer, row.expert_bytes, 0});
    if (!added && found->second.expert_bytes == 0) {
      found->second.expert_bytes = row.expert_bytes;
    }
  }

  void read_rows() {
    const std::size_t estimated_rows = (text_.size() - position_) / 28;
    trace_.experts.reserve(estimated_rows);
    trace_.weights.reserve(estimated_rows);
    trace_.residency.reserve(estimated_rows);
    trace_.moved_bytes.reserve(estimated_rows);
    trace_.entries.reserve(estimated_rows / static_cast<std::size_t>(trace_.top_k) + 1);
    last_step_.assign(static_cast<std::size_t>(trace_.num_layers), -1);
    line_of_slot_.assign(static_cast<std::size_t>(trace_.top_k), 0);
    line_of_expert_.assign(static_cast<std::size_t>(trace_.num_experts), 0);
    while (next_line()) {
      Row row;
      if (!parse_row(line_, row)) {
        throw row_error();
      }
      check_row(row);
      add_row(row);
    }
    const std::int64_t line = line_number_;
    close_entry();
    line_number_ = line;
    if (!trace_.entries.empty() && trace_.entries.back().count < trace_.top_k) {
      log_warning(fmt::format("{}: the last step and layer has {} experts of {}; the trace may have been cut short",
                              path_, trace_.entries.back().count, trace_.top_k));
    }
    drop_record_that_says_nothing();
    put_in_step_order();
  }

  // Nothing resident and everything moved is what a writer without a cache puts down.
  void drop_record_that_says_nothing() {
    bool says_something = false;
    for (const TraceEntry& entry : trace_.entries) {
      const std::int64_t bytes = layers_.at(entry.layer).expert_bytes;
      for (std::uint64_t i = entry.first; i < entry.first + entry.count; ++i) {
        says_something = says_something || trace_.residency[i] != 0 || trace_.moved_bytes[i] != bytes;
      }
    }
    if (!says_something) {
      trace_.residency.clear();
      trace_.moved_bytes.clear();
    }
  }

  void put_in_step_order() {
    const auto before = [this](std::size_t a, std::size_t b) {
      const TraceEntry& first = trace_.entries[a];
      const TraceEntry& second = trace_.entries[b];
      if (first.sequence != second.sequence) {
        return turn_ranks_.at(first.sequence) < turn_ranks_.at(second.sequence);
      }
      return first.step != second.step ? first.step < second.step : first.layer < second.layer;
    };
    std::vector<std::size_t> order(trace_.entries.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (std::is_sorted(order.begin(), order.end(), before)) {
      return;
    }
    std::sort(order.begin(), order.end(), before);
    const RoutingTrace old = std::exchange(
        trace_,
        RoutingTrace{
            trace_.model, trace_.comment, trace_.num_layers, trace_.num_experts, trace_.top_k, {}, {}, {}, {}, {}, {}});
    for (const std::size_t i : order) {
      TraceEntry entry = old.entries[i];
      const auto from = static_cast<std::ptrdiff_t>(entry.first);
      const auto to = from + static_cast<std::ptrdiff_t>(entry.count);
      entry.first = trace_.experts.size();
      trace_.entries.push_back(entry);
      trace_.experts.insert(trace_.experts.end(), old.experts.begin() + from, old.experts.begin() + to);
      trace_.weights.insert(trace_.weights.end(), old.weights.begin() + from, old.weights.begin() + to);
      if (!old.residency.empty()) {
        trace_.residency.insert(trace_.residency.end(), old.residency.begin() + from, old.residency.begin() + to);
        trace_.moved_bytes.insert(trace_.moved_bytes.end(), old.moved_bytes.begin() + from,
                                  old.moved_bytes.begin() + to);
      }
    }
  }

  // llama.cpp's form: a new step where the layer number falls, file order is the rank.
  void read_pairs() {
    std::int64_t step = 0;
    std::vector<std::int64_t> line_of_expert(static_cast<std::size_t>(kMaxExperts), 0);
    while (next_line()) {
      const std::vector<std::string_view> fields = split(line_, ',');
      if (fields.size() != 2) {
        throw error(
            fmt::format("expected 2 columns ({}), got {} in \"{}\"", kPairColumns, fields.size(), shown(line_)));
      }
      std::int64_t layer = 0;
      std::int64_t expert = 0;
      if (!parse_all(fields[0], layer) || !parse_all(fields[1], expert)) {
        throw error(fmt::format("layer and expert must be whole numbers, got \"{}\"", shown(line_)));
      }
      check_range("layer", layer, 0, kMaxLayers - 1, "");
      check_range("expert", expert, 0, kMaxExperts - 1, "");
      if (trace_.entries.empty() || trace_.entries.back().layer != layer) {
        step += !trace_.entries.empty() && layer < trace_.entries.back().layer ? 1 : 0;
        trace_.entries.push_back({0, step, static_cast<std::int32_t>(layer), Phase::kDecode, 0, trace_.experts.size()});
        entry_line_ = line_number_;
        layers_.try_emplace(layer, TraceLayer{layer, 0, 0});
      }
      std::int64_t& line = line_of_expert[static_cast<std::size_t>(expert)];
      if (line >= entry_line_) {
        throw error(
            fmt::format("expert {} of layer {} stands already in line {} of the same step; a new step begins "
                        "where the layer number falls",
                        expert, layer, line));
      }
      line = line_number_;
      trace_.experts.push_back(static_cast<std::uint16_t>(expert));
      trace_.entries.back().count += 1;
      trace_.num_layers = std::max(trace_.num_layers, layer + 1);
      trace_.num_experts = std::max(trace_.num_experts, expert + 1);
      trace_.top_k = std::max<std::int64_t>(trace_.top_k, trace_.entries.back().count);
    }
    if (trace_.entries.empty()) {
      throw error("no rows under the columns; record the trace again");
    }
    trace_.weights.assign(trace_.experts.size(), 0.0F);
  }

  void finish() {
    for (const auto& [index, layer] : layers_) {
      trace_.layers.push_back(layer);
    }
    check_trace_preload(path_, trace_);
  }

  std::string path_;
  std::string_view text_;
  std::size_t position_ = 0;
  std::string_view line_;
  std::int64_t line_number_ = 0;
  RoutingTrace trace_;
  std::map<std::int64_t, TraceLayer> layers_;
  std::unordered_map<std::int64_t, std::size_t> turn_ranks_;
  std::vector<std::int64_t> last_step_;       // Per layer, of the current turn.
  std::vector<std::int64_t> line_of_slot_;    // Line that used it last: at or past entry_line_ means in this entry.
  std::vector<std::int64_t> line_of_expert_;  // The same.
  std::int64_t entry_line_ = 0;
};

void check_lengths(const RoutingTrace& trace) {
  const std::size_t size = trace.experts.size();
  if (trace.weights.size() != size || trace.residency.size() != trace.moved_bytes.size() ||
      (!trace.residency.empty() && trace.residency.size() != size)) {
    throw std::invalid_argument(
        fmt::format("routing trace: {} experts, {} weights, {} residency flags and {} moved bytes do not match", size,
                    trace.weights.size(), trace.residency.size(), trace.moved_bytes.size()));
  }
}

}  // namespace

void check_trace_preload(const std::string& path, const RoutingTrace& trace) {
  const auto wrong = [&](const TraceLayer& layer, const std::string& what) {
    return InputError(fmt::format("{}: the preload of layer {} {}; correct the header or record the trace again", path,
                                  layer.layer, what));
  };
  for (const TraceLayer& layer : trace.layers) {
    if (layer.preload.empty() != trace.layers.front().preload.empty()) {
      throw wrong(layer,
                  fmt::format("must be there as that of layer {}, got {} experts and {}", trace.layers.front().layer,
                              layer.preload.size(), trace.layers.front().preload.size()));
    }
    std::vector<bool> seen(static_cast<std::size_t>(trace.num_experts), false);
    for (const std::uint16_t expert : layer.preload) {
      if (expert >= trace.num_experts || seen[expert]) {
        throw wrong(layer, fmt::format("must name different experts below {}, got {}", trace.num_experts, expert));
      }
      seen[expert] = true;
    }
  }
}

RoutingTrace read_trace(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  if (text.starts_with(kHdf5Signature)) {
    return read_trace_hdf5(path);
  }
  return TraceReader(path, text).read();
}

void write_trace_csv(const std::filesystem::path& path, const RoutingTrace& trace) {
  check_lengths(trace);
  std::string model = trace.model;
  std::replace(model.begin(), model.end(), '\n', ' ');
  fmt::memory_buffer text;
  auto out = std::back_inserter(text);
  fmt::format_to(out, "{}{}\n# model={} n_layer={} n_expert={} n_expert_used={}\n", kMagic, kTraceVersion, model,
                 trace.num_layers, trace.num_experts, trace.top_k);
  if (!trace.comment.empty()) {
    for (const std::string_view line : split(trace.comment, '\n')) {
      if (line.starts_with("model=") || line.starts_with("n_layer=") || line.starts_with("layer=")) {
        throw std::invalid_argument(
            fmt::format("routing trace: the comment line \"{}\" would be read as a header line", line));
      }
      fmt::format_to(out, "# {}\n", line);
    }
  }
  std::unordered_map<std::int64_t, std::int64_t> bytes_of_layer;
  for (const TraceLayer& layer : trace.layers) {
    bytes_of_layer.emplace(layer.layer, layer.expert_bytes);
    fmt::format_to(out, "# layer={} expert_bytes={} dense_bytes={}{}\n", layer.layer, layer.expert_bytes,
                   layer.dense_bytes,
                   layer.preload.empty() ? "" : fmt::format(" preload={}", fmt::join(layer.preload, ",")));
  }
  fmt::format_to(out, "{}\n", kColumns);
  for (const TraceEntry& entry : trace.entries) {
    const auto found = bytes_of_layer.find(entry.layer);
    const std::int64_t bytes = found == bytes_of_layer.end() ? 0 : found->second;
    for (std::size_t slot = 0; slot < entry.count; ++slot) {
      const std::size_t at = static_cast<std::size_t>(entry.first) + slot;
      const bool recorded = !trace.residency.empty();
      fmt::format_to(out, "{},{},{},{},{},{},{},{},{}\n", entry.sequence, static_cast<int>(entry.phase), entry.step,
                     entry.layer, slot, trace.experts[at], trace.weights[at], recorded ? trace.residency[at] : 0,
                     recorded ? trace.moved_bytes[at] : bytes);
    }
  }
  write_text_atomically(path, {text.data(), text.size()});
}

void append_sequence(RoutingTrace& trace, const SequenceRouting& sequence) {
  const auto subject = [&] { return fmt::format("routing of sequence {}", sequence.id); };
  if (trace.layers.empty()) {
    trace.num_layers = sequence.num_layers;
    trace.num_experts = sequence.num_experts;
    trace.top_k = sequence.top_k;
    for (std::int64_t layer = 0; layer < sequence.num_layers; ++layer) {
      trace.layers.push_back({layer, 0, 0});
    }
  }
  if (sequence.num_layers != static_cast<std::int64_t>(trace.layers.size()) ||
      sequence.num_experts != trace.num_experts || sequence.top_k != trace.top_k || sequence.num_tokens < 0) {
    throw std::invalid_argument(fmt::format(
        "{}: {} layers, {} experts, top {} of {} tokens do not match the trace's {} layers, {} experts, top {}",
        subject(), sequence.num_layers, sequence.num_experts, sequence.top_k, sequence.num_tokens, trace.layers.size(),
        trace.num_experts, trace.top_k));
  }
  const auto num_layers = static_cast<std::size_t>(sequence.num_layers);
  const auto num_tokens = static_cast<std::size_t>(sequence.num_tokens);
  const auto top_k = static_cast<std::size_t>(sequence.top_k);
  const std::size_t size = num_layers * num_tokens * top_k;
  if (sequence.selected.size() != size || (!sequence.weights.empty() && sequence.weights.size() != size)) {
    throw std::invalid_argument(fmt::format("{}: {} selected experts and {} weights, expected {} x {} x {}", subject(),
                                            sequence.selected.size(), sequence.weights.size(), num_layers, num_tokens,
                                            top_k));
  }
  if (sequence.num_prompt_tokens < 0 || sequence.num_prompt_tokens > sequence.num_tokens) {
    throw std::invalid_argument(
        fmt::format("{}: {} prompt tokens of {}", subject(), sequence.num_prompt_tokens, sequence.num_tokens));
  }
  if (!sequence.counted.empty() && sequence.counted.size() != num_tokens) {
    throw std::invalid_argument(
        fmt::format("{}: {} flags of counted tokens for {}", subject(), sequence.counted.size(), num_tokens));
  }
  if (!trace.entries.empty() && trace.entries.back().sequence == sequence.id) {
    throw std::invalid_argument(fmt::format("{}: the sequence before has the same id", subject()));
  }
  check_lengths(trace);
  std::vector<std::size_t> last_use(static_cast<std::size_t>(trace.num_experts), 0);
  for (std::size_t i = 0; i < size; ++i) {
    const std::uint16_t expert = sequence.selected[i];
    if (expert >= trace.num_experts) {
      throw std::invalid_argument(fmt::format("{}: expert {} is not below {}", subject(), expert, trace.num_experts));
    }
    if (last_use[expert] == i / top_k + 1) {
      throw std::invalid_argument(fmt::format("{}: a token selects expert {} twice", subject(), expert));
    }
    last_use[expert] = i / top_k + 1;
  }

  for (std::size_t token = 0; token < num_tokens; ++token) {
    const Phase phase = sequence.is_counted(static_cast<std::int64_t>(token)) ? Phase::kDecode : Phase::kPrefill;
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      const std::size_t from = (layer * num_tokens + token) * top_k;
      trace.entries.push_back({sequence.id, static_cast<std::int64_t>(token),
                               static_cast<std::int32_t>(trace.layers[layer].layer), phase,
                               static_cast<std::uint32_t>(top_k), trace.experts.size()});
      for (std::size_t k = 0; k < top_k; ++k) {
        trace.experts.push_back(sequence.selected[from + k]);
        trace.weights.push_back(sequence.weights.empty() ? 0.0F : sequence.weights[from + k]);
      }
      if (!trace.residency.empty()) {
        trace.residency.insert(trace.residency.end(), top_k, 0);
        trace.moved_bytes.insert(trace.moved_bytes.end(), top_k, trace.layers[layer].expert_bytes);
      }
    }
  }
}

}  // namespace hestia
