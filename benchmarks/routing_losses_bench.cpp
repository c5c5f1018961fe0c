// Time and memory of the routing objectives, forward and backward: each alone, MELINOE's and ReMoE's together, all
// together; beside them the plain-loop reference versions on a small part, and the time that reading the inputs and
// writing the gradient takes at the speed of a copy. Prints one JSON object.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/cuda.h>

#include <CLI/CLI.hpp>

#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/routing_losses/routing_losses.hpp"
#include "timing.hpp"

namespace {

using namespace hestia;

struct Options {
  std::int64_t layers = 16;
  std::int64_t experts = 64;
  std::int64_t top_k = 8;
  std::int64_t sequences = 4;
  std::int64_t sequence_length = 2048;
  std::int64_t repeats = 30;
  std::int64_t reference_tokens = 48;
  std::int64_t threads = 0;
  std::string device = "auto";
};

Json summary(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {{"median_ms", median(times)}, {"lowest_ms", times.front()}, {"highest_ms", times.back()}};
}

SequenceLayout layout_of(std::int64_t sequences, std::int64_t length) {
  SequenceLayout layout;
  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    layout.sequence_ids.insert(layout.sequence_ids.end(), static_cast<std::size_t>(length), sequence);
  }
  layout.counted.assign(layout.sequence_ids.size(), 1);
  return layout;
}

RoutingTensors random_routing(const Options& options, std::int64_t layers, std::int64_t tokens, torch::Device device) {
  RoutingTensors routing;
  routing.logits_LTE = (torch::randn({layers, tokens, options.experts}) * 1.5).to(device);
  routing.reference_logits_LTE = routing.logits_LTE + torch::randn({layers, tokens, options.experts}).to(device) * 0.3;
  routing.base_forward_logits_LTE = routing.reference_logits_LTE;
  routing.selected_LTK = std::get<1>(routing.logits_LTE.topk(options.top_k, -1)).contiguous();
  routing.logits_LTE.requires_grad_(true);
  return routing;
}

/// Forward and backward of some losses into the gradient of the logits, which is dropped.
void run(const std::vector<LossShare>& shares, const RoutingTensors& routing, const LayoutTensors& layout) {
  torch::Tensor logits = routing.logits_LTE;
  combine(shares, routing, layout).total.backward();
  logits.mutable_grad() = torch::Tensor();
}

struct Arm {
  std::string name;
  std::vector<LossShare> shares;
  std::vector<double> times;
  std::int64_t extra_bytes = 0;
};

/// Bytes of the allocator's peak beyond what was there before and the gradient that stays.
std::int64_t extra_bytes(const Arm& arm, const RoutingTensors& routing, const LayoutTensors& layout) {
  using c10::cuda::CUDACachingAllocator::getDeviceStats;
  const auto device = routing.logits_LTE.device().index();
  const auto aggregate = static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  c10::cuda::CUDACachingAllocator::resetPeakStats(device);
  const std::int64_t before = getDeviceStats(device).allocated_bytes[aggregate].current;
  run(arm.shares, routing, layout);
  torch::cuda::synchronize(device);
  return getDeviceStats(device).allocated_bytes[aggregate].peak - before -
         static_cast<std::int64_t>(routing.logits_LTE.nbytes());
}

/// Forward and backward of reference_sum of some losses on one layer and one short sequence, per token and layer; on
/// the CPU, where loops of small operations are fastest.
double reference_microseconds(const std::vector<LossShare>& shares, const Options& options) {
  const torch::Device device(torch::kCPU);
  const LayoutTensors layout(layout_of(1, options.reference_tokens), device);
  const RoutingTensors routing = random_routing(options, 1, options.reference_tokens, device);
  const double elapsed = milliseconds(
      [&] {
        torch::Tensor total = torch::zeros({}, routing.logits_LTE.options().requires_grad(false));
        for (const LossShare& share : shares) {
          total = total + share.scale * share.loss->reference_sum(routing, layout).sum();
        }
        total.backward();
      },
      device);
  return elapsed * 1e3 / static_cast<double>(options.reference_tokens);
}

Json measure(const Options& options) {
  const bool gpu = options.device == "auto" ? torch::cuda::is_available() : options.device != "cpu";
  const torch::Device device = gpu ? torch::Device(torch::kCUDA, 0) : torch::Device(torch::kCPU);
  if (options.threads > 0) {
    at::set_num_threads(static_cast<int>(options.threads));
  }
  const std::int64_t tokens = options.sequences * options.sequence_length;
  const RoutingTensors routing = random_routing(options, options.layers, tokens, device);
  std::vector<double> layout_times;
  layout_times.reserve(5);
  for (int i = 0; i < 5; ++i) {
    layout_times.push_back(milliseconds(
        [&] {
          const LayoutTensors made(layout_of(options.sequences, options.sequence_length), device);
          static_cast<void>(made.windows(WorkingSetOptions{}.window));
        },
        device));
  }
  const LayoutTensors layout(layout_of(options.sequences, options.sequence_length), device);

  const std::vector<WeightedLoss> losses = make_routing_losses(RoutingLossOptions{}, options.experts, options.top_k);
  const std::vector<std::string> of_papers = {"cache_simulation", "rank_matching", "reuse",      "trust",
                                              "smooth",           "lag",           "working_set"};
  std::vector<Arm> arms = {{"melinoe_and_remoe", {}, {}}, {"all", {}, {}}};
  for (const WeightedLoss& weighted : losses) {
    const std::string name(weighted.loss->name());
    const LossShare share{weighted.loss.get(), 1.0 / weighted.loss->count(layout)};
    arms.push_back({name, {share}, {}});
    arms[1].shares.push_back(share);
    if (std::find(of_papers.begin(), of_papers.end(), name) != of_papers.end()) {
      arms[0].shares.push_back(share);
    }
  }
  torch::Tensor copy = torch::empty_like(routing.reference_logits_LTE);
  std::vector<double> copy_times;
  for (std::int64_t repeat = -2; repeat < options.repeats; ++repeat) {  // two rounds to warm up
    for (Arm& arm : arms) {
      const double elapsed = milliseconds([&] { run(arm.shares, routing, layout); }, device);
      if (repeat >= 0) {
        arm.times.push_back(elapsed);
      }
    }
    const double elapsed = milliseconds([&] { copy.copy_(routing.reference_logits_LTE); }, device);
    if (repeat >= 0) {
      copy_times.push_back(elapsed);
    }
  }
  // Two inputs read and one gradient written, at the rate of a copy (one read, one write).
  const double bound = summary(copy_times)["median_ms"].get<double>() * 1.5;
  Json results = Json::object();
  for (Arm& arm : arms) {
    results[arm.name] = summary(arm.times);
    if (gpu) {
      results[arm.name]["extra_mib"] = static_cast<double>(extra_bytes(arm, routing, layout)) / (1 << 20);
    }
  }
  for (std::size_t i = 0; i < 2; ++i) {
    const double per_token = reference_microseconds(arms[i].shares, options);
    const double whole = per_token * static_cast<double>(options.layers * tokens) / 1e3;
    Json& result = results[arms[i].name];
    result["share_of_bound"] = bound / result["median_ms"].get<double>();
    result["reference_us_per_token_and_layer"] = per_token;
    result["reference_ms_extrapolated"] = whole;
  }
  return {{"benchmark", "routing losses, forward and backward"},
          {"version", program_version()},
          {"commit", program_commit()},
          {"machine", machine_info()},
          {"device", gpu ? "cuda" : "cpu"},
          {"threads", at::get_num_threads()},
          {"layers", options.layers},
          {"experts", options.experts},
          {"top_k", options.top_k},
          {"sequences", options.sequences},
          {"sequence_length", options.sequence_length},
          {"dtype", "float32"},
          {"repeats", options.repeats},
          {"layout_ms", summary(layout_times)["median_ms"]},
          {"copy_bound_ms", bound},
          {"reference_tokens", options.reference_tokens},
          {"results", results}};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Time and memory of the routing objectives; prints one JSON object.");
    app.add_option("--layers", options.layers, "MoE layers")->capture_default_str();
    app.add_option("--experts", options.experts, "experts per layer")->capture_default_str();
    app.add_option("--top-k", options.top_k, "experts per token")->capture_default_str();
    app.add_option("--sequences", options.sequences, "sequences in the batch")->capture_default_str();
    app.add_option("--sequence-length", options.sequence_length, "tokens of a sequence")->capture_default_str();
    app.add_option("--repeats", options.repeats, "rounds over all arms, interleaved")->capture_default_str();
    app.add_option("--reference-tokens", options.reference_tokens, "tokens for the plain versions")
        ->capture_default_str();
    app.add_option("--threads", options.threads, "CPU threads; 0: as set by the environment")->capture_default_str();
    app.add_option("--device", options.device, "auto, cpu or cuda")->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    std::cout << measure(options).dump(2) << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_routing_losses: %s\n", error.what());
    return 1;
  }
}
