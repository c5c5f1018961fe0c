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
    : layout_(layout), runs_(sequence_runs(layout_)), device_(device), windows_mutex_(std::make_unique<std::mutex>()) {
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> counted;
  std::vector<std::int64_t> pairs_per_run(runs_.size(), 0);
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
  std::vector<std::int64_t> token_begins(layout_.sequence_ids.size(), 0);
  std::vector<std::int64_t> token_ends(layout_.sequence_ids.size(), 0);
  std::vector<std::int64_t> token_runs(layout_.sequence_ids.size(), -1);
  std::vector<std::uint8_t> counted_tokens(layout_.sequence_ids.size(), 0);
  for (std::size_t run = 0; run < runs_.size(); ++run) {
    begins.push_back(runs_[run].begin);
    ends.push_back(runs_[run].end);
    for (std::int64_t token = runs_[run].begin; token < runs_[run].end; ++token) {
      const auto position = static_cast<std::size_t>(token);
      tokens.push_back(token);
      token_begins[position] = runs_[run].begin;
      token_ends[position] = runs_[run].end;
      token_runs[position] = static_cast<std::int64_t>(run);
      if (layout_.counted[position] == 0) {
        continue;
      }
      counted_tokens[position] = 1;
      counted.push_back(token);
      if (token > runs_[run].begin) {
        ++num_pairs_;
        ++pairs_per_run[run];
      }
    }
  }
  num_counted_ = static_cast<std::int64_t>(counted.size());
  token_indices_ = index_tensor(tokens, device);
  device_ = token_indices_.device();  // with its index: "cuda" means the current device
  counted_indices_ = index_tensor(counted, device);
  pairs_per_run_ = index_tensor(pairs_per_run, device);
  run_begins_ = index_tensor(begins, device);
  run_ends_ = index_tensor(ends, device);
  token_begins_ = index_tensor(token_begins, device);
  token_ends_ = index_tensor(token_ends, device);
  token_runs_ = index_tensor(token_runs, device);
  counted_ = torch::tensor(counted_tokens, torch::kUInt8).to(device);
}

const WindowTensors& LayoutTensors::windows(std::int64_t size) const {
  if (size < 1) {
    throw std::invalid_argument(fmt::format("windows: size must be at least 1, got {}", size));
  }
  const std::lock_guard lock(*windows_mutex_);
  const auto found = windows_.find(size);
  if (found != windows_.end()) {
    return found->second;
  }
  std::vector<std::int64_t> window_of_token(layout_.sequence_ids.size(), -1);
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
  std::vector<std::int64_t> lengths;
  for (const SequenceRun& run : runs_) {
    bool open = false;
    for (std::int64_t token = run.begin; token < run.end; ++token) {
      if (layout_.counted[static_cast<std::size_t>(token)] == 0) {
        continue;
      }
      if (!open) {
        begins.push_back(token);
        ends.push_back(token);
        lengths.push_back(0);
      }
      window_of_token[static_cast<std::size_t>(token)] = static_cast<std::int64_t>(lengths.size()) - 1;
      ends.back() = token + 1;
      open = ++lengths.back() < size;
    }
  }
  WindowTensors made{index_tensor(window_of_token, device_), index_tensor(begins, device_), index_tensor(ends, device_),
                     index_tensor(lengths, device_)};
  return windows_.emplace(size, std::move(made)).first->second;
}

}  // namespace hestia
