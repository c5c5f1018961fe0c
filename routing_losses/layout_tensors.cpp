#include <stdexcept>

#include <fmt/format.h>

#include "hestia/routing_losses/routing_losses.hpp"

namespace hestia {
namespace {

torch::Tensor index_tensor(const std::vector<std::int64_t>& values, torch::Device device) {
  return torch::tensor(values, torch::kInt64).to(device);
}

}  // namespace

LayoutTensors::LayoutTensors(const SequenceLayout& layout, torch::Device device)
    : layout_(layout), runs_(sequence_runs(layout_)), device_(device) {
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> counted;
  std::vector<std::int64_t> pairs;
  std::vector<std::int64_t> pair_runs;
  std::vector<std::int64_t> pairs_per_run(runs_.size(), 0);
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
  for (std::size_t run = 0; run < runs_.size(); ++run) {
    begins.push_back(runs_[run].begin);
    ends.push_back(runs_[run].end);
    for (std::int64_t token = runs_[run].begin; token < runs_[run].end; ++token) {
      tokens.push_back(token);
      if (layout_.counted[static_cast<std::size_t>(token)] == 0) {
        continue;
      }
      counted.push_back(token);
      if (token > runs_[run].begin) {
        pairs.push_back(token);
        pair_runs.push_back(static_cast<std::int64_t>(run));
        ++pairs_per_run[run];
      }
    }
  }
  num_counted_ = static_cast<std::int64_t>(counted.size());
  num_pairs_ = static_cast<std::int64_t>(pairs.size());
  token_indices_ = index_tensor(tokens, device);
  device_ = token_indices_.device();  // with its index: "cuda" means the current device
  counted_indices_ = index_tensor(counted, device);
  pair_indices_ = index_tensor(pairs, device);
  pair_runs_ = index_tensor(pair_runs, device);
  pairs_per_run_ = index_tensor(pairs_per_run, device);
  run_begins_ = index_tensor(begins, device);
  run_ends_ = index_tensor(ends, device);
}

torch::Tensor LayoutTensors::lagged_indices(std::int64_t lag) const {
  if (lag < 1) {
    throw std::invalid_argument(fmt::format("lagged_indices: lag must be at least 1, got {}", lag));
  }
  std::vector<std::int64_t> indices;
  for (const SequenceRun& run : runs_) {
    for (std::int64_t token = run.begin + lag; token < run.end; ++token) {
      if (layout_.counted[static_cast<std::size_t>(token)] != 0) {
        indices.push_back(token);
      }
    }
  }
  return index_tensor(indices, device_);
}

WindowTensors LayoutTensors::windows(std::int64_t size) const {
  if (size < 1) {
    throw std::invalid_argument(fmt::format("windows: size must be at least 1, got {}", size));
  }
  std::vector<std::int64_t> window_of_counted;
  std::vector<std::int64_t> lengths;
  for (const SequenceRun& run : runs_) {
    bool open = false;
    for (std::int64_t token = run.begin; token < run.end; ++token) {
      if (layout_.counted[static_cast<std::size_t>(token)] == 0) {
        continue;
      }
      if (!open) {
        lengths.push_back(0);
      }
      window_of_counted.push_back(static_cast<std::int64_t>(lengths.size()) - 1);
      open = ++lengths.back() < size;
    }
  }
  return {index_tensor(window_of_counted, device_), index_tensor(lengths, device_)};
}

}  // namespace hestia
