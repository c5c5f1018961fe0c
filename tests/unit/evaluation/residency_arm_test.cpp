#include <ATen/Parallel.h>
#include <catch2/catch.hpp>

#include "hestia/evaluation/comparison.hpp"
#include "hestia/model/residency_selector.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_data;
using hestia::testing::tiny_model;

namespace {

ResidencyRule example_rule(std::int64_t slots) {
  ResidencyRule rule;
  rule.lambda = 0.3;
  rule.always_keep = 1;
  rule.slots = slots;
  rule.logit_range = {2.0F, 2.5F};
  return rule;
}

}  // namespace

TEST_CASE("an arm's loads under LRU are those of the cache that its selector kept") {
  at::set_num_threads(1);
  const std::int64_t slots = GENERATE(1, 2, 3, 8);  // below, at and above K; all experts
  ResidencyRule rule = example_rule(slots);
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  rule.layer_factors = GENERATE(std::vector<double>{}, std::vector<double>{0.25, 2.0});
  PackedData data = tiny_data(17, 22, 40);
  for (TokenSequence& sequence : data.sequences) {
    sequence.num_prompt_tokens = sequence.domain == 1 ? static_cast<std::int64_t>(sequence.tokens.size()) / 3 : 0;
  }
  MoeModel model = tiny_model();
  model->set_selector(std::make_shared<ResidencySelector>(rule));
  EvaluateOptions options;
  options.slots = {slots};
  options.policies = {"lru"};
  const ArmFigures arm = measure_arm(model, "tuned", data, {}, options, 48, true);
  for (std::size_t domain = 0; domain < 2; ++domain) {
    // What the reference's cache sees on the very logits of the arm's batches.
    const auto batches = pack_for_evaluation(data, static_cast<std::int64_t>(domain), 8, 48);
    const torch::NoGradGuard no_grad;
    SimulationCounts seen;
    for (const PackedBatch& batch : batches) {
      const ModelOutput output = model->forward(to_device(batch, torch::kCPU));
      std::vector<std::int64_t> begins;
      std::vector<std::int64_t> ends;
      for (const SequenceRun& run : sequence_runs(layout_of(batch))) {
        begins.push_back(run.begin);
        ends.push_back(run.end);
      }
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const torch::Tensor logits = output.routing[layer].logits_TE.contiguous();
        const ResidencyShape shape{.num_tokens = logits.size(0),
                                   .num_experts = 8,
                                   .top_k = 2,
                                   .always_keep = 1,
                                   .slots = slots,
                                   .bonus = rule.bonus(static_cast<std::int64_t>(layer)),
                                   .score = rule.score};
        torch::Tensor chosen = output.routing[layer].selected_TK.clone();
        const std::vector<float> strength(batch.counted.begin(), batch.counted.end());
        seen += route_with_residency(shape, logits.const_data_ptr<float>(), strength.data(), begins.data(), ends.data(),
                                     static_cast<std::int64_t>(begins.size()), chosen.data_ptr<std::int64_t>());
        CHECK(torch::equal(chosen, output.routing[layer].selected_TK));
      }
    }
    CHECK(seen.hits > 0);
    if (domain == 0) {
      // Text without prompts: the comparison's own figures.
      const CacheFigures* cache = find_cache(arm.domains[0], "lru", slots);
      REQUIRE(cache != nullptr);
      CHECK(cache->counts.loads == seen.loads);
      CHECK(cache->counts.hits == seen.hits);
      CHECK(cache->counts.evictions == seen.evictions);
    }
    // With prompts the selector's cache is warm where the comparison's begins cold: counted from the prompt on, they
    // agree.
    RoutingMetrics metrics(2, 8, 2, {0, 1}, 0);
    measure(model, data, batches, false, [&](SequenceRouting&& routing) { metrics.add(routing); });
    SimulationOptions simulation;
    simulation.slots = slots;
    simulation.include_prefill = true;
    CHECK(metrics.simulate(simulation).loads == seen.loads);
    CHECK(metrics.simulate(simulation).hits == seen.hits);
  }
}

TEST_CASE("a stronger prior loads less, and agrees less with plain routing") {
  at::set_num_threads(1);
  const PackedData data = tiny_data(18, 30, 40);
  MoeModel model = tiny_model();
  model->keep_reference_routers();
  EvaluateOptions options;
  options.slots = {3};
  options.policies = {"lru"};
  const ArmFigures plain = measure_arm(model, "baseline", data, {}, options, 48, true, true);
  double loads = find_cache(plain.domains[0], "lru", 3)->loads_per_token_layer;
  double agreement = plain.domains[0].top_k_agreement;
  CHECK(agreement == 1.0);
  for (const double lambda : {0.1, 0.3, 1.0}) {
    ResidencyRule rule = example_rule(3);
    rule.lambda = lambda;
    model->set_selector(std::make_shared<ResidencySelector>(rule));
    const ArmFigures arm = measure_arm(model, "baseline", data, {}, options, 48, true, true);
    CHECK(find_cache(arm.domains[0], "lru", 3)->loads_per_token_layer < loads);
    CHECK(arm.domains[0].top_k_agreement < agreement);
    loads = find_cache(arm.domains[0], "lru", 3)->loads_per_token_layer;
    agreement = arm.domains[0].top_k_agreement;
  }
}
