// Time of residency-aware routing per layer: the scan on the GPU (or the CPU) and the plain reference on one CPU
// thread, which also says whether every choice is the same. Logits drift along a sequence, so that residents come and
// go. Prints one JSON object.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/cuda.h>

#include <CLI/CLI.hpp>

#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/model/residency_selector.hpp"
#include "timing.hpp"

namespace {

using namespace hestia;

struct Options {
  std::int64_t experts = 64;
  std::int64_t top_k = 8;
  std::int64_t always_keep = 2;
  std::int64_t slots = 16;
  std::string score = "logit";
  double lambda = 0.2;
  std::int64_t sequences = 4;
  std::int64_t sequence_length = 2048;
  std::int64_t repeats = 50;
  std::int64_t threads = 0;
  std::string device = "auto";
};

// Half of a token's logits is what the token before had.
torch::Tensor drifting_logits(const Options& options) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  torch::Tensor logits =
      torch::empty({options.sequences, options.sequence_length, options.experts}).normal_(0.0, 1.5, generator);
  for (std::int64_t t = 1; t < options.sequence_length; ++t) {
    logits.select(1, t).mul_(0.75).add_(logits.select(1, t - 1), 0.66);
  }
  return logits.reshape({-1, options.experts}).contiguous();
}

Json measure(const Options& options, const std::string& command) {
  if (options.threads > 0) {
    at::set_num_threads(static_cast<int>(options.threads));
  }
  const bool gpu = options.device == "cuda" || (options.device == "auto" && torch::cuda::is_available());
  const torch::Device device = gpu ? torch::Device(torch::kCUDA, 0) : torch::Device(torch::kCPU);
  const torch::Tensor logits = drifting_logits(options);
  ResidencyRule rule;
  rule.score = residency_score_from_name(options.score).value();
  rule.lambda = options.lambda;
  rule.always_keep = options.always_keep;
  rule.slots = options.slots;
  rule.logit_range = {(logits.amax(1) - logits.amin(1)).mean().item<float>()};
  TokenBatch batch;
  batch.sequence_ids_BS =
      torch::arange(options.sequences, torch::kInt64).unsqueeze(1).repeat({1, options.sequence_length}).to(device);
  const torch::Tensor on_device = logits.to(device);
  ResidencySelector selector(rule);
  torch::Tensor selected = selector.select(on_device, options.top_k, 0, batch);
  std::vector<double> times;
  for (std::int64_t i = 0; i < options.repeats; ++i) {
    times.push_back(milliseconds([&] { selected = selector.select(on_device, options.top_k, 0, batch); }, device));
  }
  const ResidencyShape shape{.num_tokens = logits.size(0),
                             .num_experts = options.experts,
                             .top_k = options.top_k,
                             .always_keep = options.always_keep,
                             .slots = options.slots,
                             .bonus = rule.bonus(0),
                             .score = rule.score};
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
  for (std::int64_t i = 0; i < options.sequences; ++i) {
    begins.push_back(i * options.sequence_length);
    ends.push_back((i + 1) * options.sequence_length);
  }
  torch::Tensor reference = torch::empty({logits.size(0), options.top_k}, torch::kInt64);
  SimulationCounts counts;
  const double reference_ms = milliseconds(
      [&] {
        counts = route_with_residency(shape, logits.const_data_ptr<float>(), nullptr, begins.data(), ends.data(),
                                      options.sequences, reference.data_ptr<std::int64_t>());
      },
      torch::kCPU);
  const torch::Tensor plain = top_k_lowest_index(logits, options.top_k);
  return {{"benchmark", "residency-aware routing, one layer"},
          {"version", program_version()},
          {"commit", program_commit()},
          {"command", command},
          {"machine", machine_info()},
          {"device", gpu ? "cuda" : "cpu"},
          {"threads", at::get_num_threads()},
          {"experts", options.experts},
          {"top_k", options.top_k},
          {"always_keep", options.always_keep},
          {"slots", options.slots},
          {"score", options.score},
          {"lambda", options.lambda},
          {"sequences", options.sequences},
          {"sequence_length", options.sequence_length},
          {"repeats", options.repeats},
          {"median_ms_per_layer", median(times)},
          {"lowest_ms_per_layer", *std::min_element(times.begin(), times.end())},
          {"highest_ms_per_layer", *std::max_element(times.begin(), times.end())},
          {"reference_ms_per_layer", reference_ms},
          {"choices_equal_reference", torch::equal(selected.cpu(), reference)},
          {"share_of_choices_that_differ_from_top_k", reference.ne(plain).to(torch::kFloat32).mean().item<double>()},
          {"loads_per_token", static_cast<double>(counts.loads) / static_cast<double>(counts.steps)}};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Time of residency-aware routing per layer; prints one JSON object.");
    app.add_option("--experts", options.experts, "experts per layer")->capture_default_str();
    app.add_option("--top-k", options.top_k, "experts per token")->capture_default_str();
    app.add_option("--always-keep", options.always_keep, "J, experts chosen by score alone")->capture_default_str();
    app.add_option("--slots", options.slots, "C, slots of the cache")->capture_default_str();
    app.add_option("--score", options.score, "what experts are compared by")
        ->check(CLI::IsMember(residency_score_names()))
        ->capture_default_str();
    app.add_option("--lambda", options.lambda, "bonus in mean logit ranges, or the weight itself")
        ->capture_default_str();
    app.add_option("--sequences", options.sequences, "sequences in the batch")->capture_default_str();
    app.add_option("--sequence-length", options.sequence_length, "tokens of a sequence")->capture_default_str();
    app.add_option("--repeats", options.repeats, "calls measured")->capture_default_str();
    app.add_option("--threads", options.threads, "CPU threads; 0: as set by the environment")->capture_default_str();
    app.add_option("--device", options.device, "auto, cpu or cuda")->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    std::string command;
    for (int i = 0; i < argc; ++i) {
      command += (i == 0 ? "" : " ") + std::string(argv[i]);  // NOLINT(cppcoreguidelines-pro-bounds-pointer-arithmetic)
    }
    std::cout << measure(options, command).dump(2) << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_residency_scan: %s\n", error.what());
    return 1;
  }
}
