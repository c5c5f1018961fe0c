#include "trace_hdf5.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/hdf5.hpp"

namespace hestia {

namespace {

constexpr const char* kFormat = "hestia route_trace";

std::size_t as_size(std::int64_t count) {
  return static_cast<std::size_t>(count);
}

InputError damaged(const std::filesystem::path& path, const std::string& what) {
  return InputError(fmt::format("{}: {}; record the trace again", path.string(), what));
}

void expect_shape(const H5File& file, const std::filesystem::path& path, const std::string& name,
                  const std::vector<std::int64_t>& expected) {
  const std::vector<std::int64_t> shape = file.shape(name);
  if (shape != expected) {
    throw damaged(path, fmt::format("dataset {} must have shape [{}], got [{}]", name, fmt::join(expected, ", "),
                                    fmt::join(shape, ", ")));
  }
}

}  // namespace

void write_trace_hdf5(const std::filesystem::path& path, const RoutingTrace& trace, std::span<const float> logits) {
  const std::size_t num_layers = trace.layers.size();
  const auto top_k = as_size(trace.top_k);
  const std::string hint = "; write it as CSV";
  if (trace.weights.size() != trace.experts.size()) {
    throw std::invalid_argument(
        fmt::format("routing trace: {} experts but {} weights", trace.experts.size(), trace.weights.size()));
  }
  if (num_layers == 0 || trace.entries.size() % num_layers != 0) {
    throw UsageError(fmt::format("{}: a packed trace needs every layer in every step, got {} entries for {} layers{}",
                                 path.string(), trace.entries.size(), num_layers, hint));
  }
  const std::size_t num_steps = trace.entries.size() / num_layers;
  const std::size_t step_logits = num_layers * as_size(trace.num_experts);
  if (!logits.empty() && (logits.size() % step_logits != 0 || logits.size() / step_logits > num_steps)) {
    throw std::invalid_argument(fmt::format("routing trace: {} logits for {} steps and layers of {} experts",
                                            logits.size(), trace.entries.size(), trace.num_experts));
  }
  std::vector<std::uint16_t> experts;
  std::vector<std::uint16_t> weights;
  std::vector<std::uint8_t> residency;
  std::vector<std::int64_t> moved_bytes;
  std::vector<std::int64_t> sequences;
  std::vector<std::int64_t> steps;
  std::vector<std::uint8_t> phases;
  experts.reserve(trace.entries.size() * top_k);
  weights.reserve(trace.entries.size() * top_k);
  for (std::size_t i = 0; i < trace.entries.size(); ++i) {
    const TraceEntry& entry = trace.entries[i];
    const TraceEntry& head = trace.entries[i - i % num_layers];
    if (entry.layer != trace.layers[i % num_layers].layer || entry.sequence != head.sequence ||
        entry.step != head.step) {
      throw UsageError(
          fmt::format("{}: a packed trace needs every layer in every step, but step {} of turn {} lacks "
                      "layer {}{}",
                      path.string(), head.step, head.sequence, trace.layers[i % num_layers].layer, hint));
    }
    if (entry.phase != head.phase) {
      throw UsageError(fmt::format("{}: a packed trace needs one phase per step, but step {} of turn {} has two{}",
                                   path.string(), entry.step, entry.sequence, hint));
    }
    if (entry.count != top_k) {
      throw UsageError(fmt::format("{}: a packed trace needs {} experts in every step, got {} in step {} of turn {}{}",
                                   path.string(), top_k, entry.count, entry.step, entry.sequence, hint));
    }
    if (i % num_layers == 0) {
      sequences.push_back(entry.sequence);
      steps.push_back(entry.step);
      phases.push_back(static_cast<std::uint8_t>(entry.phase));
    }
    for (std::uint64_t at = entry.first; at < entry.first + entry.count; ++at) {
      experts.push_back(trace.experts[at]);
      weights.push_back(float_to_half_bits(trace.weights[at]));
      if (!trace.residency.empty()) {
        residency.push_back(trace.residency[at]);
        moved_bytes.push_back(trace.moved_bytes[at]);
      }
    }
  }
  std::vector<std::int64_t> layers;
  std::vector<std::int64_t> expert_bytes;
  std::vector<std::int64_t> dense_bytes;
  std::size_t longest = 0;
  for (const TraceLayer& layer : trace.layers) {
    longest = std::max(longest, layer.preload.size());
    layers.push_back(layer.layer);
    expert_bytes.push_back(layer.expert_bytes);
    dense_bytes.push_back(layer.dense_bytes);
  }
  std::vector<std::int64_t> preload;
  for (const TraceLayer& layer : trace.layers) {
    preload.insert(preload.end(), layer.preload.begin(), layer.preload.end());
    preload.insert(preload.end(), longest - layer.preload.size(), -1);
  }
  const auto steps_signed = static_cast<std::int64_t>(num_steps);
  const std::vector<std::int64_t> shape = {steps_signed, static_cast<std::int64_t>(num_layers), trace.top_k};
  write_file_atomically(path, [&](const std::filesystem::path& temporary) {
    H5File file = H5File::create(temporary);
    file.write_attribute("/", "format", std::string(kFormat));
    file.write_attribute("/", "format_version", kTraceVersion);
    file.write_attribute("/", "producer", std::string("hestia"));
    file.write_attribute("/", "model", trace.model);
    file.write_attribute("/", "comment", trace.comment);
    file.write_attribute("/", "num_layers", trace.num_layers);
    file.write_attribute("/", "num_experts", trace.num_experts);
    file.write_attribute("/", "top_k", trace.top_k);
    file.write_attribute("/", "layers", layers);
    file.write_attribute("/", "expert_bytes", expert_bytes);
    file.write_attribute("/", "dense_bytes", dense_bytes);
    file.write("/trace/expert", H5Type::kUInt16, shape, experts.data());
    file.write("/trace/weight", H5Type::kFloat16, shape, weights.data());
    file.write("/trace/sequence", H5Type::kInt64, {steps_signed}, sequences.data());
    file.write("/trace/step", H5Type::kInt64, {steps_signed}, steps.data());
    file.write("/trace/phase", H5Type::kUInt8, {steps_signed}, phases.data());
    if (!trace.residency.empty()) {
      file.write("/trace/residency", H5Type::kUInt8, shape, residency.data());
      file.write("/trace/moved_bytes", H5Type::kInt64, shape, moved_bytes.data());
    }
    if (!logits.empty()) {
      std::vector<std::uint16_t> half(logits.size());
      std::transform(logits.begin(), logits.end(), half.begin(), float_to_half_bits);
      file.write("/trace/logits", H5Type::kFloat16,
                 {static_cast<std::int64_t>(logits.size() / step_logits), static_cast<std::int64_t>(num_layers),
                  trace.num_experts},
                 half.data());
    }
    if (longest > 0) {
      file.write("/trace/preload", H5Type::kInt64,
                 {static_cast<std::int64_t>(num_layers), static_cast<std::int64_t>(longest)}, preload.data());
    }
    file.close();
  });
}

std::vector<float> read_trace_logits(const std::filesystem::path& path) {
  const H5File file = H5File::open(path);
  if (!file.contains("/trace/logits")) {
    return {};
  }
  const std::vector<std::int64_t> shape = file.shape("/trace/expert");
  const std::vector<std::int64_t> found = file.shape("/trace/logits");
  const std::int64_t steps = found.empty() ? 0 : std::min(found[0], shape.at(0));  // some of the first ones
  expect_shape(file, path, "/trace/logits", {steps, shape.at(1), file.read_int_attribute("/", "num_experts")});
  return file.read_floats("/trace/logits");
}

RoutingTrace read_trace_hdf5(const std::filesystem::path& path) {
  const H5File file = H5File::open(path);
  if (!file.contains("/trace/expert")) {
    throw damaged(path, "not a packed routing trace: dataset /trace/expert is missing");
  }
  const std::int64_t version = file.read_int_attribute("/", "format_version");
  if (version > kTraceVersion) {
    throw InputError(
        fmt::format("{}: route_trace version {} is newer than this program supports ({}); update the "
                    "program",
                    path.string(), version, kTraceVersion));
  }
  const std::string format = file.read_string_attribute("/", "format");
  if (format != kFormat || version < 1) {
    throw damaged(path, fmt::format("not a packed routing trace: format must be \"{}\" version {}, got \"{}\" {}",
                                    kFormat, kTraceVersion, format, version));
  }
  RoutingTrace trace;
  trace.model = file.read_string_attribute("/", "model");
  trace.comment = file.read_string_attribute("/", "comment");
  trace.num_layers = file.read_int_attribute("/", "num_layers");
  trace.num_experts = file.read_int_attribute("/", "num_experts");
  trace.top_k = file.read_int_attribute("/", "top_k");
  const std::vector<std::int64_t> layers = file.read_ints_attribute("/", "layers");
  const std::vector<std::int64_t> expert_bytes = file.read_ints_attribute("/", "expert_bytes");
  const std::vector<std::int64_t> dense_bytes = file.read_ints_attribute("/", "dense_bytes");
  if (trace.num_experts < 1 || trace.num_experts > 65536 || trace.top_k < 1 || trace.top_k > trace.num_experts) {
    throw damaged(path, fmt::format("top_k and num_experts must satisfy 1 <= top_k <= num_experts <= 65536, got {} and "
                                    "{}",
                                    trace.top_k, trace.num_experts));
  }
  if (layers.empty() || expert_bytes.size() != layers.size() || dense_bytes.size() != layers.size()) {
    throw damaged(path, fmt::format("attributes layers, expert_bytes and dense_bytes must be of one length, got {}, {} "
                                    "and {}",
                                    layers.size(), expert_bytes.size(), dense_bytes.size()));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers[i] < (i == 0 ? 0 : layers[i - 1] + 1) || layers[i] >= trace.num_layers) {
      throw damaged(path, fmt::format("attribute layers must rise from 0 and stay below num_layers ({}), got {} at {}",
                                      trace.num_layers, layers[i], i));
    }
    for (const std::int64_t bytes : {expert_bytes[i], dense_bytes[i]}) {
      if (bytes < 0 || bytes > kMaxTraceBytes) {
        throw damaged(path, fmt::format("expert_bytes and dense_bytes must lie between 0 and {}, got {} at layer {}",
                                        kMaxTraceBytes, bytes, layers[i]));
      }
    }
    trace.layers.push_back({layers[i], expert_bytes[i], dense_bytes[i]});
  }
  if (file.contains("/trace/preload")) {
    const std::vector<std::int64_t> preload_shape = file.shape("/trace/preload");
    const std::int64_t longest = preload_shape.size() == 2 ? preload_shape[1] : 0;
    expect_shape(file, path, "/trace/preload", {static_cast<std::int64_t>(layers.size()), longest});
    const std::vector<std::int64_t> preload = file.read_ints("/trace/preload");
    for (std::size_t i = 0; i < preload.size(); ++i) {
      if (preload[i] < -1 || preload[i] >= trace.num_experts) {
        throw damaged(path, fmt::format("an expert of the preload must be below num_experts ({}), got {}",
                                        trace.num_experts, preload[i]));
      }
      if (preload[i] >= 0) {
        trace.layers[i / as_size(longest)].preload.push_back(static_cast<std::uint16_t>(preload[i]));
      }
    }
    check_trace_preload(path.string(), trace);
  }
  const std::vector<std::int64_t> expert_shape = file.shape("/trace/expert");
  const std::int64_t num_steps = expert_shape.empty() ? 0 : expert_shape[0];
  const std::vector<std::int64_t> shape = {num_steps, static_cast<std::int64_t>(layers.size()), trace.top_k};
  expect_shape(file, path, "/trace/expert", shape);
  expect_shape(file, path, "/trace/weight", shape);
  for (const char* name : {"/trace/sequence", "/trace/step", "/trace/phase"}) {
    expect_shape(file, path, name, {num_steps});
  }
  const std::vector<std::int64_t> experts = file.read_ints("/trace/expert");
  trace.weights = file.read_floats("/trace/weight");
  const std::vector<std::int64_t> sequences = file.read_ints("/trace/sequence");
  const std::vector<std::int64_t> steps = file.read_ints("/trace/step");
  const std::vector<std::int64_t> phases = file.read_ints("/trace/phase");
  if (file.contains("/trace/residency")) {
    expect_shape(file, path, "/trace/residency", shape);
    expect_shape(file, path, "/trace/moved_bytes", shape);
    const std::vector<std::int64_t> residency = file.read_ints("/trace/residency");
    trace.residency.assign(residency.begin(), residency.end());
    trace.moved_bytes = file.read_ints("/trace/moved_bytes");
  }
  const auto top_k = as_size(trace.top_k);
  std::vector<std::size_t> last_entry_of(as_size(trace.num_experts), 0);
  trace.experts.reserve(experts.size());
  trace.entries.reserve(as_size(num_steps) * layers.size());
  for (std::size_t step = 0; step < as_size(num_steps); ++step) {
    if (phases[step] < 0 || phases[step] > 1) {
      throw damaged(path, fmt::format("phase must be 0 or 1, got {} at position {}", phases[step], step));
    }
    if (steps[step] < 0) {
      throw damaged(path, fmt::format("step must be at least 0, got {} at position {}", steps[step], step));
    }
    if (step > 0 && sequences[step] == sequences[step - 1] && steps[step] <= steps[step - 1]) {
      throw damaged(path, fmt::format("steps of a sequence must rise, got {} after {} at position {}", steps[step],
                                      steps[step - 1], step));
    }
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      trace.entries.push_back({sequences[step], steps[step], static_cast<std::int32_t>(layers[layer]),
                               static_cast<Phase>(phases[step]), static_cast<std::uint32_t>(top_k),
                               trace.experts.size()});
      for (std::size_t k = 0; k < top_k; ++k) {
        const std::size_t at = trace.experts.size();
        if (experts[at] < 0 || experts[at] >= trace.num_experts) {
          throw damaged(path,
                        fmt::format("expert must be at least 0 and below num_experts ({}), got {} at step {}, layer {}",
                                    trace.num_experts, experts[at], steps[step], layers[layer]));
        }
        std::size_t& last = last_entry_of[as_size(experts[at])];
        if (last == trace.entries.size()) {
          throw damaged(path, fmt::format("expert {} stands twice at step {}, layer {}", experts[at], steps[step],
                                          layers[layer]));
        }
        last = trace.entries.size();
        if (!std::isfinite(trace.weights[at])) {
          throw damaged(path, fmt::format("weight must be finite, got {} at step {}, layer {}", trace.weights[at],
                                          steps[step], layers[layer]));
        }
        trace.experts.push_back(static_cast<std::uint16_t>(experts[at]));
      }
    }
  }
  return trace;
}

}  // namespace hestia
