#include <cmath>
#include <limits>
#include <random>

#include <torch/autograd.h>
#include <torch/types.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/evaluation/score.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/simulator.hpp"
#include "temporary_folder.hpp"

using namespace hestia;

namespace {

using Named = std::vector<std::pair<std::string, torch::Tensor>>;

torch::Tensor normal(std::mt19937& random, std::vector<std::int64_t> shape, torch::Dtype dtype) {
  std::normal_distribution<double> distribution(0.0, 1.4);
  torch::Tensor tensor = torch::empty(shape, torch::kFloat64);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    tensor.data_ptr<double>()[i] = distribution(random);
  }
  return tensor.to(dtype);
}

// Padding, a prompt, a sequence without one, a hole in the middle of what counts.
const std::vector<std::int64_t> kIds = {-1, 7, 7, 7, 7, 7, 3, 3, 3, 3, -1, 9};
const std::vector<std::uint8_t> kCounted = {1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1};

Named usual_dump(std::mt19937& random, torch::Dtype dtype = torch::kFloat64) {
  Named tensors = {{"router_logits", normal(random, {3, 12, 6}, dtype)},
                   {"base_router_logits", normal(random, {3, 12, 6}, dtype)},
                   {"sequence_ids", torch::tensor(kIds)},
                   {"counted", torch::tensor(kCounted, torch::kUInt8)}};
  if (dtype != torch::kBFloat16) {
    tensors[0].second.select(1, 10).fill_(std::numeric_limits<double>::quiet_NaN());  // padding may hold anything
  }
  return tensors;
}

std::filesystem::path write(const TemporaryFolder& folder, const Named& tensors, const std::string& top_k = "2") {
  const std::filesystem::path path = folder.path() / "dump.safetensors";
  std::vector<std::pair<std::string, std::string>> metadata;
  if (!top_k.empty()) {
    metadata.emplace_back("top_k", top_k);
  }
  write_tensors(path, tensors, metadata);
  return path;
}

// Replaces one tensor, or leaves it out when undefined.
Named with(Named tensors, const std::string& name, const torch::Tensor& tensor) {
  Named result;
  for (auto& entry : tensors) {
    if (entry.first != name) {
      result.push_back(entry);
    }
  }
  if (tensor.defined()) {
    result.emplace_back(name, tensor);
  }
  return result;
}

ScoreOptions usual_options() {
  ScoreOptions options;
  options.slots = 3;
  options.policies = {CachePolicyKind::kLru, CachePolicyKind::kBelady};
  options.gradients = true;
  return options;
}

}  // namespace

TEST_CASE("score gives the value and gradient of every objective's plain reference") {
  std::mt19937 random(11);
  const TemporaryFolder folder;
  const RoutingDump dump = read_routing_dump(write(folder, usual_dump(random)));
  CHECK(dump.logits_LSE.scalar_type() == torch::kFloat64);
  ScoreOptions options = usual_options();
  options.losses.cache_simulation.gamma = 0.7;
  const Score result = score(dump, options);
  CHECK(result.skipped.empty());

  RoutingLossOptions losses = options.losses;
  losses.cache_simulation.slots = 3;
  const LayoutTensors layout(dump.layout, torch::kCPU);
  std::size_t term = 0;
  for (const WeightedLoss& weighted : make_routing_losses(losses, 6, 2)) {
    INFO(weighted.loss->name());
    RoutingTensors routing{dump.logits_LSE.clone().requires_grad_(true), dump.selected_LSK, dump.base_logits_LSE};
    const torch::Tensor value = weighted.loss->reference_sum(routing, layout).mean() / weighted.loss->count(layout);
    CHECK(result.losses.at(std::string(weighted.loss->name())).get<double>() ==
          Approx(value.item<double>()).epsilon(1e-12));
    const torch::Tensor gradient = torch::autograd::grad({value}, {routing.logits_LTE})[0];
    REQUIRE(result.gradients.at(term).first == weighted.loss->name());
    CHECK(result.gradients[term].second.scalar_type() == torch::kFloat64);
    CHECK(torch::allclose(torch::nan_to_num(result.gradients[term].second), torch::nan_to_num(gradient), 0.0, 1e-13));
    ++term;
  }
  CHECK(term == routing_loss_names().size());
  CHECK(result.gradients.size() == term);
}

TEST_CASE("score simulates the served experts of the tokens that count") {
  std::mt19937 random(12);
  const TemporaryFolder folder;
  const RoutingDump dump = read_routing_dump(write(folder, usual_dump(random, torch::kFloat32)));
  const Score result = score(dump, usual_options());
  const RoutingTrace trace = trace_of(dump);
  CHECK(trace.entries.size() == 3 * 10);  // padding is left out
  CHECK(result.metrics.at("eor").get<double>() == expert_overlap_ratio(trace));
  CHECK(result.metrics.at("distinct").get<double>() == distinct_experts(trace));
  SimulationOptions simulation;
  simulation.slots = 3;
  const SimulationCounts counts = simulate(trace, simulation);
  CHECK(counts.requests == 3 * 2 * 7);  // layers, experts per token, counted tokens that are no padding
  CHECK(result.metrics.at("lru").at("requests") == counts.requests);
  CHECK(result.metrics.at("lru").at("hits") == counts.hits);
  CHECK(result.metrics.at("lru").at("loads") == counts.loads);
  CHECK(result.metrics.at("lru").at("slots") == 3);
  CHECK(result.metrics.at("belady").at("hits") >= result.metrics.at("lru").at("hits"));
  CHECK(!result.metrics.contains("lfu"));
}

TEST_CASE("the served experts are the highest logits, equal ones by index, unless the file says otherwise") {
  std::mt19937 random(13);
  const TemporaryFolder folder;
  const torch::Tensor logits = torch::tensor({{{1.0, 3.0, 3.0, 0.0}, {2.0, 2.0, 2.0, 2.0}}});
  const RoutingDump plain = read_routing_dump(write(folder, {{"router_logits", logits}}, "3"));
  CHECK(torch::equal(plain.selected_LSK, torch::tensor({{{1, 2, 0}, {0, 1, 2}}}, torch::kInt64)));
  CHECK(plain.layout.sequence_ids == std::vector<std::int64_t>{0, 0});
  CHECK(plain.layout.counted == std::vector<std::uint8_t>{1, 1});
  // Any order in the file, and K from the size of `selected` where the metadata do not say.
  const torch::Tensor served = torch::tensor({{{3, 2}, {3, 1}}}, torch::kInt32);
  const RoutingDump given = read_routing_dump(write(folder, {{"router_logits", logits}, {"selected", served}}, ""));
  CHECK(torch::equal(given.selected_LSK, torch::tensor({{{2, 3}, {1, 3}}}, torch::kInt64)));
  CHECK(read_routing_dump(write(folder, {{"router_logits", logits}}, ""), 1).selected_LSK.size(2) == 1);
}

TEST_CASE("half-precision logits are computed in float32") {
  std::mt19937 random(14);
  const TemporaryFolder folder;
  const Named tensors = usual_dump(random, torch::kBFloat16);
  const RoutingDump dump = read_routing_dump(write(folder, tensors));
  CHECK(dump.logits_LSE.scalar_type() == torch::kFloat32);
  CHECK(torch::equal(dump.logits_LSE, tensors[0].second.to(torch::kFloat32)));
  for (const auto& [name, gradient] : score(dump, usual_options()).gradients) {
    INFO(name);
    CHECK(gradient.scalar_type() == torch::kFloat32);
    CHECK(gradient.sizes() == dump.logits_LSE.sizes());
  }
}

TEST_CASE("without base logits the terms that need them are skipped with the reason") {
  std::mt19937 random(15);
  const TemporaryFolder folder;
  const RoutingDump dump = read_routing_dump(write(folder, with(usual_dump(random), "base_router_logits", {})));
  const Score result = score(dump, usual_options());
  for (const char* name : {"rank_matching", "trust"}) {
    CHECK(result.losses.at(name).is_null());
    CHECK(result.skipped.at(name) == "needs base_router_logits");
  }
  CHECK(result.losses.at("reuse").is_number());
  CHECK(result.gradients.size() == routing_loss_names().size() - result.skipped.size());
}

TEST_CASE("a dump of padding alone scores zero everywhere") {
  std::mt19937 random(16);
  const TemporaryFolder folder;
  const torch::Tensor ids = torch::full({12}, -5, torch::kInt64);
  const Score result =
      score(read_routing_dump(write(folder, with(usual_dump(random), "sequence_ids", ids))), usual_options());
  for (const auto& [name, value] : result.losses.items()) {
    INFO(name);
    CHECK(value.get<double>() == 0.0);
  }
  CHECK(result.metrics.at("lru").at("requests") == 0);
}

TEST_CASE("a wrong dump gives one message with file, tensor and value") {
  std::mt19937 random(17);
  const TemporaryFolder folder;
  const Named usual = usual_dump(random);
  const auto refuses = [&](const Named& tensors, const std::vector<std::string>& parts,
                           const std::string& top_k = "2") {
    const std::filesystem::path path = write(folder, tensors, top_k);
    try {
      (void)read_routing_dump(path);
      FAIL("accepted: " << parts.front());
    } catch (const InputError& error) {
      CHECK_THAT(error.what(), Catch::Contains(path.string()));
      for (const std::string& part : parts) {
        CHECK_THAT(error.what(), Catch::Contains(part));
      }
    }
  };
  refuses(with(usual, "router_logits", {}), {"router_logits"});
  refuses(with(usual, "router_logits", torch::ones({12, 6})), {"[layers, tokens, experts]", "[12, 6]"});
  refuses(with(usual, "router_logits", torch::ones({3, 12, 6}, torch::kInt64)), {"floating-point", "I64"});
  refuses(with(usual, "base_router_logits", torch::ones({3, 12, 5})), {"base_router_logits", "[3, 12, 5]"});
  refuses(with(usual, "sequence_ids", torch::ones({11}, torch::kInt64)), {"sequence_ids must be [12]", "[11]"});
  refuses(with(usual, "sequence_ids", torch::ones({12}, torch::kInt32)), {"must be int64", "I32"});
  torch::Tensor ids = torch::tensor(kIds);
  ids[11] = 7;
  refuses(with(usual, "sequence_ids", ids), {"id 7 at token 11 again after 5"});
  refuses(with(usual, "counted", torch::ones({12}, torch::kInt64)), {"counted must be uint8 or bool", "I64"});
  refuses(with(usual, "counted", torch::full({12}, 2, torch::kUInt8)), {"0 or 1, got 2 at token 0"});
  refuses(usual, {"metadata top_k is missing", "--top-k"}, "");
  refuses(usual, {"metadata top_k must be a whole number", "\"two\""}, "two");
  refuses(usual, {"between 1 and the 6 experts", "got 7"}, "7");
  refuses(usual, {"between 1 and the 6 experts", "got 0"}, "0");
  torch::Tensor logits = usual[0].second.clone();
  logits[2][4][1] = -std::numeric_limits<double>::infinity();
  refuses(with(usual, "router_logits", logits), {"must be finite", "-inf at layer 2, token 4, expert 1"});
  torch::Tensor served = torch::tensor({0, 1}, torch::kInt64).expand({3, 12, 2}).contiguous();
  served[1][3][1] = 6;
  refuses(with(usual, "selected", served), {"selected must hold different experts", "got 6 at layer 1, token 3"});
  served[1][3][1] = 0;
  refuses(with(usual, "selected", served), {"got 0 at layer 1, token 3"});
  served[1][3][1] = 1;
  served[0][0].fill_(99);  // padding may hold anything
  CHECK_NOTHROW(read_routing_dump(write(folder, with(usual, "selected", served))));
  ScoreOptions options = usual_options();
  options.slots = 7;
  CHECK_THROWS_AS(score(read_routing_dump(write(folder, usual)), options), UsageError);
}
