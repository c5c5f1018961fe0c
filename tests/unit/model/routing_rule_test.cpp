// The routing rule against loops over its definition.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/model/residency_selector.hpp"
#include "hestia/model/routing_rule.hpp"
#include "model_fixtures.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

Architecture rule(std::int64_t num_experts, std::int64_t top_k) {
  Architecture a;
  a.num_experts = num_experts;
  a.top_k = top_k;
  return a;
}

TokenBatch tokens(std::int64_t count) {
  return {torch::zeros({1, count}, torch::kInt64), torch::arange(count).unsqueeze(0),
          torch::zeros({1, count}, torch::kInt64)};
}

// Group-limited greedy choice of one token, as DeepSeek V2 words it.
std::vector<std::int64_t> grouped_choice(const Architecture& a, const Tensor& logits_E) {
  const std::int64_t size = a.num_experts / a.num_groups;
  std::vector<std::pair<double, std::int64_t>> groups;
  for (std::int64_t g = 0; g < a.num_groups; ++g) {
    groups.emplace_back(-logits_E.narrow(0, g * size, size).max().item<double>(), g);
  }
  std::sort(groups.begin(), groups.end());
  std::vector<std::pair<double, std::int64_t>> experts;
  for (std::int64_t i = 0; i < a.top_groups; ++i) {
    for (std::int64_t e = groups[i].second * size; e < (groups[i].second + 1) * size; ++e) {
      experts.emplace_back(-logits_E[e].item<double>(), e);
    }
  }
  std::sort(experts.begin(), experts.end());
  std::vector<std::int64_t> chosen;
  for (std::int64_t k = 0; k < a.top_k; ++k) {
    chosen.push_back(experts[k].second);
  }
  return chosen;
}

}  // namespace

TEST_CASE("groups: only experts of the best groups are chosen, best first") {
  Architecture a = rule(12, 4);
  a.num_groups = GENERATE(2, 3, 6);
  a.top_groups = std::max<std::int64_t>(2, a.num_groups / 2);
  CAPTURE(a.num_groups, a.top_groups);
  // A few values only, so that groups and experts tie.
  const Tensor coarse = random_integers(5, {40, 12}, 71).to(torch::kFloat32);
  const Tensor logits = torch::cat({coarse, random_normal({40, 12}, 72, torch::kFloat32)});
  const Tensor scores = selection_scores(a, logits);
  CHECK_FALSE(scores.requires_grad());
  const Tensor selected = TopKSelector().select(scores, a.top_k, 0, tokens(80));
  for (std::int64_t t = 0; t < 80; ++t) {
    CHECK(torch::equal(selected[t], torch::tensor(grouped_choice(a, logits[t]), torch::kInt64)));
    for (std::int64_t e = 0; e < 12; ++e) {
      const double score = scores[t][e].item<double>();
      CHECK((score == logits[t][e].item<double>() || score == -std::numeric_limits<double>::infinity()));
    }
  }
}

TEST_CASE("groups: a residency prior chooses inside them") {
  Architecture a = rule(12, 3);
  a.num_groups = 4;
  a.top_groups = 2;
  const Tensor logits = random_normal({60, 12}, 73, torch::kFloat32);
  const Tensor scores = selection_scores(a, logits);
  ResidencyRule residency;
  residency.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  residency.lambda = GENERATE(0.0, 0.5, 50.0);
  residency.always_keep = 1;
  residency.slots = 5;
  residency.logit_range = {3.0F};
  const Tensor selected = ResidencySelector(residency).select(scores, a.top_k, 0, tokens(60));
  CHECK(scores.gather(1, selected).isfinite().all().item<bool>());
  const Tensor plain = TopKSelector().select(scores, a.top_k, 0, tokens(60));
  CHECK(torch::equal(selected, plain) == (residency.lambda == 0.0));
}

TEST_CASE("sparsemixer weighs each expert among those near the best of the rest") {
  Architecture a = rule(9, 3);
  a.routing = RoutingKind::kSparsemixer;
  a.router_jitter = GENERATE(0.0, 0.05, 0.3);
  const Tensor logits = random_normal({60, 9}, 77).set_requires_grad(true);
  // The family's own choice, best first, and others, as a residency prior makes them.
  Tensor selected = top_k_lowest_index(logits, 3);
  for (std::int64_t t = 30; t < 60; ++t) {
    const Tensor some = std::get<0>(random_normal({9}, 100 + t).argsort().narrow(0, 0, 3).sort());
    selected[t] = some.index_select(0, logits[t].detach().index_select(0, some).argsort(-1, true));
  }
  const auto weights = [&](const Tensor& z) { return mixing_weights(a, z, z.softmax(1), selected); };
  const Tensor got = weights(logits);
  std::int64_t alone = 0;
  for (std::int64_t t = 0; t < 60; ++t) {
    std::vector<double> z;
    for (std::int64_t e = 0; e < 9; ++e) {
      z.push_back(logits[t][e].item<double>());
    }
    std::vector<bool> taken(9, false);
    for (std::int64_t k = 0; k < 3; ++k) {
      const auto chosen = static_cast<std::size_t>(selected[t][k].item<std::int64_t>());
      double best = -std::numeric_limits<double>::infinity();
      for (std::size_t e = 0; e < 9; ++e) {
        best = taken[e] ? best : std::max(best, z[e]);
      }
      double sum = 0.0;
      std::int64_t near = 0;
      for (std::size_t e = 0; e < 9; ++e) {
        const bool is_near = !taken[e] && (best - z[e]) / std::max(std::abs(z[e]), best) <= 2 * a.router_jitter;
        if (e == chosen || is_near) {
          sum += std::exp(z[e]);
          ++near;
        }
      }
      alone += t < 30 && near == 1 ? 1 : 0;
      CHECK(got[t][k].item<double>() == Approx(std::exp(z[chosen]) / sum).epsilon(1e-12));
      taken[chosen] = true;
    }
  }
  // Of the own choices, both kinds occur where the threshold lets them.
  CHECK(alone > 0);
  CHECK((alone < 90) == (a.router_jitter > 0.0));
  if (a.router_jitter > 0.0) {
    const Tensor direction = random_normal({60, 9}, 78);
    const Tensor probe = random_normal({60, 3}, 79);
    (got * probe).sum().backward();
    const torch::NoGradGuard no_grad;
    const double above = (weights(logits + 1e-6 * direction) * probe).sum().item<double>();
    const double below = (weights(logits - 1e-6 * direction) * probe).sum().item<double>();
    CHECK((logits.grad() * direction).sum().item<double>() == Approx((above - below) / 2e-6).epsilon(1e-6));
  }
}

TEST_CASE("mixing weights equal their definition and carry its gradient") {
  Architecture a = rule(9, 3);
  a.routing = GENERATE(RoutingKind::kSoftmax, RoutingKind::kSoftmaxOfChosen);
  a.normalise_top_k = GENERATE(false, true);
  a.routed_scale = GENERATE(1.0, 2.5);
  const Tensor logits = random_normal({7, 9}, 74).set_requires_grad(true);
  // Any selection is weighed, not only the best experts.
  Tensor selected = torch::empty({7, 3}, torch::kInt64);
  for (std::int64_t t = 0; t < 7; ++t) {
    selected[t] = random_normal({9}, 80 + t).argsort().narrow(0, 0, 3);
  }
  const bool keeps_mass = GENERATE(false, true);
  const Tensor plain = keeps_mass ? top_k_lowest_index(logits, 3) : Tensor();
  const auto weights = [&](const Tensor& z) { return mixing_weights(a, z, z.softmax(1), selected, plain); };
  const Tensor got = weights(logits);
  for (std::int64_t t = 0; t < 7; ++t) {
    double all = 0.0;
    double chosen = 0.0;
    double best = 0.0;
    for (std::int64_t e = 0; e < 9; ++e) {
      all += std::exp(logits[t][e].item<double>());
    }
    for (std::int64_t k = 0; k < 3; ++k) {
      chosen += std::exp(logits[t][selected[t][k].item<std::int64_t>()].item<double>());
    }
    for (std::int64_t k = 0; keeps_mass && k < 3; ++k) {
      best += std::exp(logits[t][plain[t][k].item<std::int64_t>()].item<double>());
    }
    const bool normalises = a.routing != RoutingKind::kSoftmax || a.normalise_top_k;
    const double sum = normalises ? chosen : (keeps_mass ? all * chosen / best : all);
    for (std::int64_t k = 0; k < 3; ++k) {
      const double z = logits[t][selected[t][k].item<std::int64_t>()].item<double>();
      CHECK(got[t][k].item<double>() == Approx(a.routed_scale * std::exp(z) / sum).epsilon(1e-12));
    }
  }
  const Tensor direction = random_normal({7, 9}, 75);
  const Tensor probe = random_normal({7, 3}, 76);
  (got * probe).sum().backward();
  const torch::NoGradGuard no_grad;
  const double above = (weights(logits + 1e-6 * direction) * probe).sum().item<double>();
  const double below = (weights(logits - 1e-6 * direction) * probe).sum().item<double>();
  CHECK((logits.grad() * direction).sum().item<double>() == Approx((above - below) / 2e-6).epsilon(1e-6));
}

TEST_CASE("preserved mass: the plain choice is weighed as it is, a choice without any weight stays finite") {
  const Architecture a = rule(9, 3);
  const Tensor logits = random_normal({40, 9}, 90).to(torch::kFloat32);
  const Tensor plain = top_k_lowest_index(logits, 3);
  const Tensor probabilities = logits.softmax(1);
  CHECK(torch::equal(mixing_weights(a, logits, probabilities, plain, plain),
                     mixing_weights(a, logits, probabilities, plain)));
  const Tensor far = torch::tensor({{400.0F, 399.0F, 398.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F}});
  const Tensor lost = mixing_weights(a, far, far.softmax(1), torch::tensor({{3, 4, 5}}), torch::tensor({{0, 1, 2}}));
  CHECK(lost.isfinite().all().item<bool>());
}
