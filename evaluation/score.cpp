#include "hestia/evaluation/score.hpp"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <stdexcept>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/autograd.h>

#include "hestia/core/error.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/simulator.hpp"

namespace hestia {
namespace {

constexpr std::int64_t kMaxExperts = 65536;  // of a RoutingTrace

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

class DumpReader {
 public:
  explicit DumpReader(const std::filesystem::path& path) : path_(path), file_(path) {}

  RoutingDump read(std::int64_t top_k) {
    RoutingDump dump;
    dump.path = path_;
    dump.logits_LSE = logits("router_logits", std::nullopt);
    shape_ = dump.logits_LSE.sizes().vec();
    if (file_.contains("base_router_logits")) {
      dump.base_logits_LSE = logits("base_router_logits", shape_).to(dump.logits_LSE.scalar_type());
    }
    read_layout(dump.layout);
    check_finite("router_logits", dump.logits_LSE, dump.layout);
    if (dump.base_logits_LSE.defined()) {
      check_finite("base_router_logits", dump.base_logits_LSE, dump.layout);
    }
    dump.selected_LSK = selected(dump.logits_LSE, dump.layout, top_k);
    return dump;
  }

 private:
  template <class... Parts>
  [[noreturn]] void fail(fmt::format_string<Parts...> format, Parts&&... parts) const {
    throw InputError(path_.string() + ": " + fmt::format(format, std::forward<Parts>(parts)...));
  }

  const TensorView& view(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const TensorView& found = file_.tensor(name);
    if (found.shape != shape) {
      fail("tensor {} must be {} like router_logits {}, got {}; write it again", name, shape_text(shape),
           shape_text(shape_), shape_text(found.shape));
    }
    return found;
  }

  torch::Tensor logits(const std::string& name, const std::optional<std::vector<std::int64_t>>& shape) const {
    const TensorView& found = shape ? view(name, *shape) : file_.tensor(name);
    if (found.shape.size() != 3 || found.num_elements() == 0 || found.shape[2] > kMaxExperts) {
      fail(
          "tensor {} must be [layers, tokens, experts] with at least one of each and at most {} experts, got {}; stack "
          "the router logits of the layers",
          name, kMaxExperts, shape_text(found.shape));
    }
    const torch::Tensor tensor = to_torch(found);
    if (!tensor.is_floating_point()) {
      fail("tensor {} must hold floating-point numbers, got {}; write the logits, not the chosen experts", name,
           dtype_name(found.dtype));
    }
    return tensor.to(tensor.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32);
  }

  void read_layout(SequenceLayout& layout) const {
    const std::int64_t num_tokens = shape_[1];
    layout.sequence_ids.assign(static_cast<std::size_t>(num_tokens), 0);
    layout.counted.assign(static_cast<std::size_t>(num_tokens), 1);
    if (file_.contains("sequence_ids")) {
      const TensorView& ids = view("sequence_ids", {num_tokens});
      if (ids.dtype != DType::kI64) {
        fail("tensor sequence_ids must be int64, got {}; write it as int64", dtype_name(ids.dtype));
      }
      const torch::Tensor tensor = to_torch(ids);
      std::copy_n(tensor.const_data_ptr<std::int64_t>(), num_tokens, layout.sequence_ids.begin());
    }
    if (file_.contains("counted")) {
      const TensorView& counted = view("counted", {num_tokens});
      if (counted.dtype != DType::kU8 && counted.dtype != DType::kBool) {
        fail("tensor counted must be uint8 or bool, got {}; write 1 where the token counts", dtype_name(counted.dtype));
      }
      const torch::Tensor tensor = to_torch(counted).to(torch::kUInt8);
      const auto* const values = tensor.const_data_ptr<std::uint8_t>();
      for (std::int64_t token = 0; token < num_tokens; ++token) {
        if (values[token] > 1) {
          fail("tensor counted must hold 0 or 1, got {} at token {}; write 1 where the token counts", values[token],
               token);
        }
        layout.counted[static_cast<std::size_t>(token)] = values[token];
      }
    }
    // sequence_runs refuses the same, without the file and the token.
    std::map<std::int64_t, std::size_t> last_token_of;
    for (std::size_t token = 0; token < layout.sequence_ids.size(); ++token) {
      const std::int64_t id = layout.sequence_ids[token];
      const auto seen = last_token_of.find(id);
      if (id >= 0 && seen != last_token_of.end() && seen->second + 1 != token) {
        fail(
            "tensor sequence_ids: the tokens of a sequence must stand together, got id {} at token {} again after {}; "
            "order the tokens by sequence",
            id, token, seen->second);
      }
      last_token_of[id] = token;
    }
  }

  void check_finite(const std::string& name, const torch::Tensor& logits_LSE, const SequenceLayout& layout) const {
    const torch::Tensor bad_S = torch::isfinite(logits_LSE).logical_not().any(2).any(0).to(torch::kUInt8);
    const auto* const bad = bad_S.const_data_ptr<std::uint8_t>();
    for (std::int64_t token = 0; token < layout.num_tokens(); ++token) {
      if (bad[token] != 0 && layout.sequence_ids[static_cast<std::size_t>(token)] >= 0) {
        const torch::Tensor place =
            torch::isfinite(logits_LSE.select(1, token)).logical_not().nonzero()[0].to(torch::kInt64);
        const auto layer = place[0].item<std::int64_t>();
        const auto expert = place[1].item<std::int64_t>();
        fail(
            "tensor {} must be finite, got {} at layer {}, token {}, expert {}; mark padding with a negative sequence "
            "id",
            name, logits_LSE[layer][token][expert].item<double>(), layer, token, expert);
      }
    }
  }

  std::int64_t chosen_top_k(std::int64_t top_k) const {
    const std::int64_t num_experts = shape_[2];
    std::string source = "--top-k";
    if (top_k <= 0) {
      source = "metadata top_k";
      const auto entry = file_.metadata().find("top_k");
      if (entry != file_.metadata().end()) {
        const char* const end = entry->second.data() + entry->second.size();
        const auto [last, failure] = std::from_chars(entry->second.data(), end, top_k);
        if (failure != std::errc() || last != end) {
          fail("metadata top_k must be a whole number, got \"{}\"; write the experts per token", entry->second);
        }
      } else if (file_.contains("selected")) {
        source = "the last size of selected";
        top_k = file_.tensor("selected").shape.empty() ? 0 : file_.tensor("selected").shape.back();
      } else {
        fail("metadata top_k is missing, got {}; write it (safetensors metadata are strings) or give --top-k K",
             file_.metadata().empty() ? "no metadata" : "other metadata only");
      }
    }
    if (top_k < 1 || top_k > num_experts) {
      fail("{} must be between 1 and the {} experts of router_logits, got {}; correct it", source, num_experts, top_k);
    }
    return top_k;
  }

  torch::Tensor selected(const torch::Tensor& logits_LSE, const SequenceLayout& layout, std::int64_t top_k) const {
    top_k = chosen_top_k(top_k);
    if (!file_.contains("selected")) {
      return std::get<1>(torch::sort(logits_LSE, /*stable=*/true, /*dim=*/-1, /*descending=*/true))
          .narrow(2, 0, top_k)
          .contiguous();
    }
    const torch::Tensor given = to_torch(view("selected", {shape_[0], shape_[1], top_k}));
    if (given.is_floating_point() || given.scalar_type() == torch::kBool) {
      fail("tensor selected must hold integers, got {}; write expert indices", c10::toString(given.scalar_type()));
    }
    // By index first, so that the stable sort by logit leaves equal logits in index order.
    torch::Tensor sorted = std::get<0>(given.to(torch::kInt64).sort(-1)).contiguous();
    auto* const experts = sorted.data_ptr<std::int64_t>();
    for (std::int64_t row = 0; row < shape_[0] * shape_[1]; ++row) {
      const std::int64_t token = row % shape_[1];
      std::int64_t* const first = experts + row * top_k;
      if (layout.sequence_ids[static_cast<std::size_t>(token)] < 0) {
        // Whatever padding holds: valid experts, so that no later step has to ask.
        for (std::int64_t k = 0; k < top_k; ++k) {
          first[k] = k;
        }
        continue;
      }
      for (std::int64_t k = 0; k < top_k; ++k) {
        if (first[k] < 0 || first[k] >= shape_[2] || (k > 0 && first[k] == first[k - 1])) {
          fail("tensor selected must hold different experts from 0 to {}, got {} at layer {}, token {}; correct it",
               shape_[2] - 1, first[k], row / shape_[1], token);
        }
      }
    }
    const torch::Tensor order =
        std::get<1>(torch::sort(logits_LSE.gather(2, sorted), /*stable=*/true, /*dim=*/-1, /*descending=*/true));
    return sorted.gather(2, order).contiguous();
  }

  std::filesystem::path path_;
  SafetensorsFile file_;
  std::vector<std::int64_t> shape_;
};

Json counts_json(const SimulationCounts& counts, std::int64_t slots) {
  return {{"slots", slots},
          {"requests", counts.requests},
          {"hits", counts.hits},
          {"cold", counts.cold},
          {"loads", counts.loads},
          {"evictions", counts.evictions},
          {"hit_rate", counts.hit_rate()},
          {"loads_per_token_layer",
           counts.steps == 0 ? 0.0 : static_cast<double>(counts.loads) / static_cast<double>(counts.steps)}};
}

Json metrics_of(const RoutingTrace& trace, const ScoreOptions& options, std::int64_t slots) {
  Json metrics = {{"eor", expert_overlap_ratio(trace)}, {"distinct", distinct_experts(trace)}};
  for (const CachePolicyKind policy : options.policies) {
    SimulationOptions simulation;
    simulation.policy = policy;
    simulation.slots = slots;
    simulation.gamma = options.gamma;
    metrics[std::string(policy_name(policy))] = counts_json(simulate(trace, simulation), slots);
  }
  return metrics;
}

}  // namespace

RoutingDump read_routing_dump(const std::filesystem::path& path, std::int64_t top_k) {
  return DumpReader(path).read(top_k);
}

RoutingTrace trace_of(const RoutingDump& dump) {
  const torch::NoGradGuard no_grad;
  const std::int64_t num_layers = dump.logits_LSE.size(0);
  const std::int64_t num_tokens = dump.logits_LSE.size(1);
  const std::int64_t top_k = dump.selected_LSK.size(2);
  const torch::Tensor weights_LSK =
      torch::softmax(dump.logits_LSE, -1).gather(2, dump.selected_LSK).to(torch::kFloat32).contiguous();
  const auto* const weights = weights_LSK.const_data_ptr<float>();
  const auto* const experts = dump.selected_LSK.const_data_ptr<std::int64_t>();
  RoutingTrace trace;
  trace.num_layers = num_layers;
  trace.num_experts = dump.logits_LSE.size(2);
  trace.top_k = top_k;
  for (std::int64_t layer = 0; layer < num_layers; ++layer) {
    trace.layers.push_back({layer, 0, 0});
  }
  for (const SequenceRun& run : sequence_runs(dump.layout)) {
    for (std::int64_t token = run.begin; token < run.end; ++token) {
      for (std::int64_t layer = 0; layer < num_layers; ++layer) {
        TraceEntry entry;
        entry.sequence = run.id;
        entry.step = token - run.begin;
        entry.layer = static_cast<std::int32_t>(layer);
        entry.phase = dump.layout.counted[static_cast<std::size_t>(token)] != 0 ? Phase::kDecode : Phase::kPrefill;
        entry.count = static_cast<std::uint32_t>(top_k);
        entry.first = trace.experts.size();
        trace.entries.push_back(entry);
        const std::int64_t first = (layer * num_tokens + token) * top_k;
        for (std::int64_t k = 0; k < top_k; ++k) {
          trace.experts.push_back(static_cast<std::uint16_t>(experts[first + k]));
          trace.weights.push_back(weights[first + k]);
        }
      }
    }
  }
  return trace;
}

Score score(const RoutingDump& dump, const ScoreOptions& options) {
  const std::int64_t num_experts = dump.logits_LSE.size(2);
  const std::int64_t slots = options.slots > 0 ? options.slots : std::max<std::int64_t>(1, num_experts / 4);
  RoutingLossOptions loss_options = options.losses;
  if (loss_options.cache_simulation.slots == 0) {
    loss_options.cache_simulation.slots = slots;
  }
  if (slots > num_experts) {
    throw UsageError(fmt::format("--slots: must be between 1 and the {} experts of {}, got {}; give fewer", num_experts,
                                 dump.path.string(), slots));
  }
  RoutingTensors routing;
  routing.logits_LTE = dump.logits_LSE.detach().clone().requires_grad_(options.gradients);
  routing.selected_LTK = dump.selected_LSK;
  routing.reference_logits_LTE = dump.base_logits_LSE;
  routing.base_forward_logits_LTE = dump.base_logits_LSE;
  const LayoutTensors layout(dump.layout, torch::kCPU);
  Score result;
  result.losses = Json::object();
  result.skipped = Json::object();
  for (const WeightedLoss& weighted : make_routing_losses(loss_options, num_experts, dump.selected_LSK.size(2))) {
    const std::string name(weighted.loss->name());
    const bool needs_base = weighted.loss->needs_reference() || weighted.loss->needs_base_forward();
    if (needs_base && !dump.base_logits_LSE.defined()) {
      result.losses[name] = nullptr;
      result.skipped[name] = "needs base_router_logits";
      continue;
    }
    const torch::AutoGradMode with_gradient(options.gradients);
    const double count = weighted.loss->count(layout);
    const torch::Tensor value = weighted.loss->sum(routing, layout).mean() / (count > 0.0 ? count : 1.0);
    result.losses[name] = value.detach().to(torch::kFloat64).item<double>();
    if (options.gradients) {
      result.gradients.emplace_back(name, torch::autograd::grad({value}, {routing.logits_LTE})[0].contiguous());
    }
  }
  result.metrics = metrics_of(trace_of(dump), options, slots);
  return result;
}

}  // namespace hestia
