// The gradient of experts that were not chosen, against autograd on the sum as if they were in it.

#include "model/router_gradient.hpp"

#include <torch/autograd.h>
#include <catch2/catch.hpp>

#include "hestia/model/residency_selector.hpp"
#include "hestia/model/routing_rule.hpp"
#include "model_fixtures.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

constexpr std::int64_t kTokens = 1100;  // more than one chunk
constexpr std::int64_t kWidth = 6;
constexpr std::int64_t kInner = 5;
constexpr std::int64_t kExperts = 7;

ExpertWeights experts_of(bool adapters, bool biases) {
  ExpertWeights experts{random_normal({kExperts, kInner, kWidth}, 1), random_normal({kExperts, kInner, kWidth}, 2),
                        random_normal({kExperts, kWidth, kInner}, 3)};
  if (adapters) {
    experts.adapters = {random_normal({kExperts, 2, kWidth}, 4), random_normal({kExperts, kInner, 2}, 5),
                        random_normal({kExperts, 2, kInner}, 6), random_normal({kExperts, kWidth, 2}, 7), 0.7};
  }
  if (biases) {
    experts.gate_bias_EF = random_normal({kExperts, kInner}, 8);
    experts.up_bias_EF = random_normal({kExperts, kInner}, 9);
    experts.down_bias_ED = random_normal({kExperts, kWidth}, 10);
    experts.swiglu_limit = 0.9;
    experts.swiglu_alpha = 1.702;
  }
  return experts;
}

// E_e(x_t) of every expert, [T, E, D].
Tensor outputs_of_all(const ExpertWeights& experts, const Tensor& x_TD) {
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> found;
  for (std::int64_t e = 0; e < kExperts; ++e) {
    found.push_back(GroupedExecutor().run(experts, x_TD, torch::full({kTokens, 1}, e, torch::kInt64),
                                          torch::ones({kTokens, 1}, torch::kFloat64), 0));
  }
  return torch::stack(found, 1);
}

}  // namespace

TEST_CASE("responses of all experts are the products of their outputs with the gradient") {
  const ExpertWeights experts = GENERATE(experts_of(false, false), experts_of(true, false), experts_of(false, true));
  const Tensor x = random_normal({kTokens, kWidth}, 20);
  const Tensor g = random_normal({kTokens, kWidth}, 21);
  const Tensor expected = (outputs_of_all(experts, x) * g.unsqueeze(1)).sum(2);
  CHECK(relative_error(expert_responses(experts, x, g), expected) < 1e-12);
}

TEST_CASE("routers get the gradient of experts that were not chosen as if these were in the sum") {
  Architecture a;
  a.num_experts = kExperts;
  a.top_k = 3;
  a.routed_scale = GENERATE(1.0, 2.5);
  a.routing = GENERATE(RoutingKind::kSoftmax, RoutingKind::kSoftmaxOfChosen);
  a.normalise_top_k = GENERATE(false, true);
  const bool preserve_mass = GENERATE(false, true);
  const ExpertWeights experts = experts_of(a.normalise_top_k, false);
  const Tensor x = random_normal({kTokens, kWidth}, 30).set_requires_grad(true);
  const Tensor z = random_normal({kTokens, kExperts}, 31).set_requires_grad(true);
  const Tensor probe = random_normal({kTokens, kWidth}, 32);
  Tensor plain = top_k_lowest_index(z, 3);
  Tensor selected = plain.clone();
  selected.narrow(0, 0, 500).copy_(top_k_lowest_index(random_normal({500, kExperts}, 33), 3));  // as under a prior
  plain = preserve_mass ? plain : Tensor();
  const auto record_of = [&] {
    RoutingRecord record;
    record.logits_TE = z;
    record.probabilities_TE = z.softmax(1);
    record.selected_TK = selected;
    record.weights_TK = mixing_weights(a, z, record.probabilities_TE, selected, plain);
    return record;
  };
  const auto mixed_of = [&](const RoutingRecord& record) {
    return GroupedExecutor().run(experts, x, record.selected_TK, record.weights_TK, 0);
  };
  const auto gradients = [&](const Tensor& y) { return torch::autograd::grad({(y * probe).sum()}, {z, x}); };

  const RoutingRecord record = record_of();
  const Tensor mixed = mixed_of(record);
  const Tensor y = with_gradient_of_others(a, experts, mixed, x, record);
  CHECK(torch::equal(y, mixed));
  const auto found = gradients(y);
  const auto without = gradients(mixed_of(record_of()));

  const RoutingRecord other = record_of();
  const Tensor outputs_TED = outputs_of_all(experts, x.detach());
  const Tensor is_other_TE = torch::ones({kTokens, kExperts}, torch::kFloat64).scatter(1, selected, 0.0);
  Tensor extended;
  if (a.routing == RoutingKind::kSoftmax && !a.normalise_top_k) {
    const Tensor& p = other.probabilities_TE;
    const Tensor scale = (other.weights_TK.sum(1, true) / p.gather(1, selected).sum(1, true)).detach();
    const Tensor added = (p - p.detach()) * is_other_TE * scale;
    extended = mixed_of(other) + (added.unsqueeze(2) * outputs_TED).sum(1);
  } else {
    const Tensor e = z.exp();
    const Tensor added = (e - e.detach()) * is_other_TE;  // 0, with a gradient
    const Tensor chosen = e.gather(1, selected).sum(1, true);
    const Tensor top = mixed_of(other) * chosen + a.routed_scale * (added.unsqueeze(2) * outputs_TED).sum(1);
    extended = top / (chosen + added.sum(1, true));
  }
  const auto expected = gradients(extended);
  CHECK(relative_error(found[0], expected[0]) < 1e-9);
  CHECK(relative_error(found[0], without[0]) > 1e-2);
  CHECK(relative_error(found[1], without[1]) < 1e-12);  // inputs get none from here
}

TEST_CASE("the gradient of all experts is the model's own where all are chosen, and is refused for sparsemixer") {
  Architecture a = small_architecture();
  a.top_k = a.num_experts;
  const auto gradients = [&](const Architecture& architecture, bool all, bool checkpointing) {
    MoeModel model = create_model(architecture, torch::kFloat64, torch::kCPU, 12);
    freeze_all_but_routers(model);
    model->set_router_gradient_of_all(all);
    if (architecture.top_k < architecture.num_experts) {
      ResidencyRule rule;
      rule.lambda = 0.5;
      rule.always_keep = 1;
      rule.slots = 3;
      rule.logit_range = {2.0F, 2.25F, 2.5F};
      rule.preserve_mass = true;
      model->set_selector(std::make_shared<ResidencySelector>(rule));
    }
    model->set_activation_checkpointing(checkpointing);
    const ModelOutput output = model->forward(packed_batch(architecture));
    return torch::autograd::grad({probe_loss(output, true, false)}, model->routers());
  };
  const auto largest_difference = [](const std::vector<Tensor>& one, const std::vector<Tensor>& other) {
    double largest = 0.0;
    for (std::size_t i = 0; i < one.size(); ++i) {
      largest = std::max(largest, relative_error(one[i], other[i]));
    }
    return largest;
  };
  CHECK(largest_difference(gradients(a, true, false), gradients(a, false, false)) < 1e-10);
  a = small_architecture();
  a.normalise_top_k = GENERATE(false, true);
  const auto all = gradients(a, true, false);
  CHECK(largest_difference(all, gradients(a, false, false)) > 1e-2);
  CHECK(largest_difference(all, gradients(a, true, true)) < 1e-10);
  a.routing = RoutingKind::kSparsemixer;
  CHECK_THROWS_AS(create_model(a, torch::kFloat64, torch::kCPU, 12)->set_router_gradient_of_all(true),
                  std::invalid_argument);
}
