#include "hestia/model/residency_selector.hpp"

#include <limits>

#include <ATen/Parallel.h>
#include <torch/autograd.h>
#include <torch/cuda.h>
#include <catch2/catch.hpp>

#include "hestia/kernels/soft_cache.hpp"
#include "hestia/model/static_set.hpp"
#include "model_fixtures.hpp"
#include "residency_cases.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

ResidencyRule rule_of(double lambda, std::int64_t always_keep, std::int64_t slots, std::size_t layers = 3) {
  ResidencyRule rule;
  rule.lambda = lambda;
  rule.always_keep = always_keep;
  rule.slots = slots;
  for (std::size_t i = 0; i < layers; ++i) {
    rule.logit_range.push_back(2.0F + 0.25F * static_cast<float>(i));
  }
  return rule;
}

MoeModel float_model(const Architecture& a) {
  at::set_num_threads(1);
  return create_model(a, torch::kFloat32, torch::kCPU, 12);
}

/// Three sequences of 4, 5 and 6 tokens, the second with a prompt of 3.
TokenBatch batch_with_prompt(const Architecture& a) {
  TokenBatch batch = packed_batch(a);
  batch.counted_BS = torch::tensor({1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0}, torch::kUInt8).view({2, 9});
  return batch;
}

/// A scope of random weights, for `layers` layers of `experts`.
ResidencyScope random_scope(SplitMix64& random, std::int64_t layers, std::int64_t experts) {
  ResidencyScope scope;
  scope.domains = {"python"};
  scope.elsewhere = random.uniform() < 0.5 ? 0.0 : 0.5;
  scope.window = 1 + static_cast<std::int64_t>(random.below(4));
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    std::vector<float> weights;
    for (std::int64_t expert = 0; expert < experts; ++expert) {
      weights.push_back(static_cast<float>(random.uniform() - 0.5));
    }
    scope.weights.push_back(weights);
    scope.offsets.push_back(0.05F * static_cast<float>(random.uniform() - 0.5));
  }
  return scope;
}

/// [T, K] of the reference for one layer's logits, the padding of the batch by plain Top-K.
Tensor by_reference(const ResidencyRule& rule, const Tensor& logits_TE, std::int64_t top_k, std::int64_t layer,
                    const std::vector<std::int64_t>& begins, const std::vector<std::int64_t>& ends,
                    const Tensor& counted_BS) {
  const ResidencyShape shape{.num_tokens = logits_TE.size(0),
                             .num_experts = logits_TE.size(1),
                             .top_k = top_k,
                             .always_keep = rule.always_keep,
                             .slots = rule.slots,
                             .bonus = rule.bonus(layer),
                             .score = rule.score};
  Tensor selected = top_k_lowest_index(logits_TE, top_k).clone();
  const Tensor logits = logits_TE.detach().contiguous();
  Tensor strength = counted_BS.reshape({-1}).to(torch::kFloat32);
  if (!rule.scope.everywhere()) {
    Tensor in_scope = torch::ones_like(strength);
    scope_strengths(rule.scope, layer, logits.const_data_ptr<float>(), begins.data(), ends.data(),
                    static_cast<std::int64_t>(begins.size()), in_scope.mutable_data_ptr<float>());
    strength = strength * in_scope;
  }
  route_with_residency(shape, logits.const_data_ptr<float>(), strength.const_data_ptr<float>(), begins.data(),
                       ends.data(), static_cast<std::int64_t>(begins.size()), selected.data_ptr<std::int64_t>());
  return selected;
}

bool same(const Tensor& a, const Tensor& b) {
  return torch::equal(a.cpu(), b.cpu());
}

}  // namespace

TEST_CASE("every layer serves what the reference chooses, prompts, packing and padding included") {
  Architecture a = small_architecture();
  a.normalise_top_k = GENERATE(true, false);
  MoeModel model = float_model(a);
  ResidencyRule rule = rule_of(0.4, 1, 3);
  rule.preserve_mass = GENERATE(false, true);
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  rule.layer_factors = GENERATE(std::vector<double>{}, std::vector<double>{0.5, 3.0, 1.25});
  model->set_selector(std::make_shared<ResidencySelector>(rule));
  const TokenBatch batch = batch_with_prompt(a);
  const torch::NoGradGuard no_grad;
  const ModelOutput output = model->forward(batch);
  bool differs = false;
  for (std::size_t layer = 0; layer < output.routing.size(); ++layer) {
    const RoutingRecord& record = output.routing[layer];
    const Tensor expected = by_reference(rule, record.logits_TE, a.top_k, static_cast<std::int64_t>(layer), {0, 4, 9},
                                         {4, 9, 15}, batch.counted_BS);
    CHECK(same(record.selected_TK, expected));
    differs = differs || !same(expected, top_k_lowest_index(record.logits_TE, a.top_k));
    // Weights come from z, falling, renormalised where the model does, else with the mass of the plain choice if so.
    Tensor weights = record.logits_TE.softmax(1).gather(1, record.selected_TK);
    if (a.normalise_top_k) {
      weights = weights / weights.sum(1, true);
    } else if (rule.preserve_mass) {
      const Tensor mass = std::get<0>(record.logits_TE.softmax(1).topk(a.top_k, 1)).sum(1, true);
      CHECK(relative_error(record.weights_TK.sum(1, true), mass) < 1e-6);
      weights = weights * (mass / weights.sum(1, true));
    }
    CHECK(relative_error(record.weights_TK, weights) < 1e-6);
    const Tensor as_plain = expected.eq(top_k_lowest_index(record.logits_TE, a.top_k)).all(1);
    CHECK(torch::equal(
        record.weights_TK.index({as_plain}),
        (a.normalise_top_k ? weights : record.logits_TE.softmax(1).gather(1, expected)).index({as_plain})));
    CHECK((record.weights_TK.select(1, 0) >= record.weights_TK.select(1, 1)).all().item<bool>());
  }
  CHECK(differs);
}

TEST_CASE("where a rule has a scope, every layer judges the text by itself, as the reference does") {
  const Architecture a = small_architecture();
  MoeModel model = float_model(a);
  const TokenBatch batch = batch_with_prompt(a);
  const torch::NoGradGuard no_grad;
  SplitMix64 random(5);
  int outside = 0;
  int inside = 0;
  for (int i = 0; i < 40; ++i) {
    ResidencyRule rule = rule_of(1.5, 0, 4);
    rule.score = i % 4 == 0 ? ResidencyScore::kRoot : ResidencyScore::kLogit;
    const auto routed = [&] {
      model->set_selector(std::make_shared<ResidencySelector>(rule));
      return model->forward(batch);
    };
    const Tensor everywhere = routed().routing[0].selected_TK;
    rule.scope = random_scope(random, 3, a.num_experts);
    const ModelOutput output = routed();
    for (std::size_t layer = 0; layer < output.routing.size(); ++layer) {
      const RoutingRecord& record = output.routing[layer];
      CHECK(same(record.selected_TK, by_reference(rule, record.logits_TE, a.top_k, static_cast<std::int64_t>(layer),
                                                  {0, 4, 9}, {4, 9, 15}, batch.counted_BS)));
    }
    (same(output.routing[0].selected_TK, everywhere) ? inside : outside) += 1;
  }
  CHECK(inside > 3);
  CHECK(outside > 3);
  // All of the text inside: as without a scope, bit by bit; all of it outside, with nothing there: plain Top-K.
  ResidencyRule rule = rule_of(0.4, 1, 3);
  const auto hidden = [&](Selector* selector) {
    model->set_selector(std::shared_ptr<Selector>(selector));
    return model->forward(batch).hidden_BSD;
  };
  const Tensor without = hidden(new ResidencySelector(rule));
  rule.scope.domains = {"python"};
  rule.scope.weights.assign(3, std::vector<float>(static_cast<std::size_t>(a.num_experts), 0.0F));
  rule.scope.offsets.assign(3, 0.0F);
  CHECK(torch::equal(hidden(new ResidencySelector(rule)), without));
  rule.scope.offsets.assign(3, -1.0F);
  CHECK(torch::equal(hidden(new ResidencySelector(rule)), hidden(new TopKSelector())));
  CHECK_FALSE(torch::equal(without, hidden(new TopKSelector())));
  // What it saw: counted tokens alone, prompts and padding left out.
  ResidencySelector asked(rule);
  CHECK_FALSE(asked.take_scope_share());
  const Tensor z = torch::zeros({18, a.num_experts});
  const auto share_with = [&](float offset) {
    rule.scope.offsets.assign(3, offset);
    asked.set_rule(rule);
    (void)asked.select(z, a.top_k, 0, batch);
    (void)asked.select(z, a.top_k, 1, batch);
  };
  share_with(1.0F);
  CHECK(asked.take_scope_share() == 1.0);
  CHECK_FALSE(asked.take_scope_share());
  share_with(1.0F);
  share_with(-1.0F);
  CHECK(asked.take_scope_share() == 0.5);
  rule.scope.offsets.assign(3, -1.0F);
  // A rule that changes, as in training, takes its scope along.
  auto selector = std::make_shared<ResidencySelector>(rule);
  model->set_selector(selector);
  CHECK_FALSE(torch::equal(model->forward(batch).hidden_BSD, without));
  rule.scope.offsets.assign(3, 1.0F);
  selector->set_rule(rule);
  CHECK(torch::equal(model->forward(batch).hidden_BSD, without));
}

TEST_CASE("evidence is in whole units, and a windowed mean stays within its run") {
  const Tensor logits = torch::tensor({1.0F, 0.5F, INFINITY, 1.0F, 3e8F, 0.0F, NAN, 0.0F}).view({4, 2});
  const Tensor evidence = scope_evidence(logits, torch::tensor({0.25, -1.0}, torch::kFloat64), 1.0 + 0x1p-21);
  CHECK(torch::equal(evidence, torch::tensor({(3L << 18) + 0L, 0L, 1000000L << 20, 0L}, torch::kInt64)));
  const Tensor values = torch::tensor({1, 2, 6, 4, 10, 20}, torch::kInt64) * (1 << 20);
  TokenBatch batch;
  batch.sequence_ids_BS = torch::tensor({0, 0, 0, 0, 1, -1}, torch::kInt64).view({2, 3});
  const Tensor begin = run_begin_of_tokens(batch);
  CHECK(torch::equal(begin, torch::tensor({0, 0, 0, 3, 4, 5}, torch::kInt64)));
  CHECK(torch::allclose(windowed_mean(values, begin, 2),
                        torch::tensor({1.0, 1.5, 4.0, 4.0, 10.0, 20.0}, torch::kFloat64)));
  CHECK(torch::allclose(windowed_mean(values, begin, 9),
                        torch::tensor({1.0, 1.5, 3.0, 4.0, 10.0, 20.0}, torch::kFloat64)));
}

TEST_CASE("packed sequences are routed as each one alone") {
  const Architecture a = small_architecture();
  MoeModel model = float_model(a);
  ResidencyRule rule = rule_of(0.5, 1, 3);
  if (GENERATE(false, true)) {
    SplitMix64 random(8);
    rule.scope = random_scope(random, 3, a.num_experts);
  }
  model->set_selector(std::make_shared<ResidencySelector>(rule));
  const TokenBatch batch = batch_with_prompt(a);
  const torch::NoGradGuard no_grad;
  const ModelOutput packed = model->forward(batch);
  const auto flat = [](const Tensor& x) { return x.reshape({-1}); };
  for (const auto& run : {std::pair(0, 4), std::pair(4, 9), std::pair(9, 15)}) {
    const std::int64_t begin = run.first;
    const std::int64_t end = run.second;
    const auto part = [&](const Tensor& x) { return flat(x).slice(0, begin, end).unsqueeze(0).contiguous(); };
    const ModelOutput alone = model->forward(
        {part(batch.tokens_BS), part(batch.positions_BS), part(batch.sequence_ids_BS), part(batch.counted_BS)});
    for (std::size_t layer = 0; layer < packed.routing.size(); ++layer) {
      CHECK(same(alone.routing[layer].selected_TK, packed.routing[layer].selected_TK.slice(0, begin, end)));
    }
  }
}

TEST_CASE("lambda 0 and J at K are plain Top-K, without prompts every token counts") {
  Architecture a = small_architecture();
  a.normalise_top_k = GENERATE(true, false);
  MoeModel model = float_model(a);
  const TokenBatch batch = packed_batch(a);
  const torch::NoGradGuard no_grad;
  const ModelOutput plain = model->forward(batch);
  const ResidencyScore score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  for (ResidencyRule rule : {rule_of(0.0, 1, 3), rule_of(2.0, a.top_k, 3), rule_of(2.0, 99, 1)}) {
    rule.score = score;
    rule.preserve_mass = true;
    model->set_selector(std::make_shared<ResidencySelector>(rule));
    const ModelOutput output = model->forward(batch);
    for (std::size_t layer = 0; layer < plain.routing.size(); ++layer) {
      CHECK(same(output.routing[layer].selected_TK, plain.routing[layer].selected_TK));
    }
    CHECK(torch::equal(output.hidden_BSD, plain.hidden_BSD));
  }
}

TEST_CASE("layers have the strength of their factors: 1 as without, 0 plainly routed") {
  const Architecture a = small_architecture();
  MoeModel model = float_model(a);
  const TokenBatch batch = batch_with_prompt(a);
  const torch::NoGradGuard no_grad;
  ResidencyRule rule = rule_of(0.6, 0, 3);
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  const auto served = [&](const std::vector<double>& factors) {
    rule.layer_factors = factors;
    model->set_selector(std::make_shared<ResidencySelector>(rule));
    return model->forward(batch);
  };
  const ModelOutput without = served({});
  CHECK(torch::equal(served({1.0, 1.0, 1.0}).hidden_BSD, without.hidden_BSD));
  const ModelOutput first_off = served({0.0, 1.0, 1.0});
  const Tensor plain = top_k_lowest_index(without.routing[0].logits_TE, a.top_k);
  CHECK(same(first_off.routing[0].selected_TK, plain));
  CHECK_FALSE(same(without.routing[0].selected_TK, plain));
  const ModelOutput last_off = served({1.0, 1.0, 0.0});
  for (std::size_t layer = 0; layer < 2; ++layer) {
    CHECK(same(last_off.routing[layer].selected_TK, without.routing[layer].selected_TK));
  }
  CHECK_FALSE(same(last_off.routing[2].selected_TK, without.routing[2].selected_TK));
  CHECK_THROWS_AS(served({1.0, 1.0}), std::out_of_range);
}

TEST_CASE("the weights of what is served carry gradient to the routers, checkpointed or not") {
  Architecture a = small_architecture();
  ResidencyRule rule = rule_of(0.5, 1, 3);
  rule.preserve_mass = GENERATE(false, true);
  a.normalise_top_k = !rule.preserve_mass;
  MoeModel model = float_model(a);
  freeze_all_but_routers(model);
  const TokenBatch batch = batch_with_prompt(a);
  const auto gradients = [&](bool checkpointing, std::shared_ptr<Selector> selector) {
    model->set_selector(std::move(selector));
    model->set_activation_checkpointing(checkpointing);
    std::vector<Tensor> routers = model->routers();
    const ModelOutput output = model->forward(batch);
    CHECK_FALSE(output.routing[0].selected_TK.requires_grad());
    return torch::autograd::grad({probe_loss(output, true, false)}, routers);
  };
  const auto kept = gradients(false, std::make_shared<ResidencySelector>(rule));
  const auto recomputed = gradients(true, std::make_shared<ResidencySelector>(rule));
  const auto plain = gradients(false, std::make_shared<TopKSelector>());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    CHECK(kept[i].abs().max().item<double>() > 0.0);
    CHECK(relative_error(recomputed[i], kept[i]) < 1e-5);
    CHECK(relative_error(plain[i], kept[i]) > 1e-3);
  }
}

TEST_CASE("the base model's forward is routed plainly whatever the selector") {
  const Architecture a = small_architecture();
  MoeModel model = float_model(a);
  const TokenBatch batch = batch_with_prompt(a);
  const torch::NoGradGuard no_grad;
  const Tensor plain = model->forward(batch).hidden_BSD;
  model->keep_reference_routers();
  model->set_selector(std::make_shared<ResidencySelector>(rule_of(2.0, 0, 3)));
  CHECK(torch::equal(model->forward_reference(batch).hidden_BSD, plain));
  CHECK_FALSE(torch::equal(model->forward(batch).hidden_BSD, plain));
}

TEST_CASE("a static set's own experts are served, also where the family left their groups out") {
  StaticSetSelector selector({{4, 5}, {1, 4, 6}}, 8);
  const double out = -std::numeric_limits<double>::infinity();
  const torch::Tensor scores = torch::tensor({{1.0, 2.0, 3.0, 4.0, out, out, out, out}}, torch::kFloat64);
  const auto served = [&](std::int64_t layer) {
    return std::get<0>(selector.select(scores, 2, layer, {}).sort(1)).to(torch::kInt64);
  };
  CHECK(torch::equal(served(0), torch::tensor({{4, 5}}, torch::kInt64)));
  CHECK(served(1)[0][0].item<std::int64_t>() == 1);  // the one of its group that is in the set
  CHECK(served(1)[0][1].item<std::int64_t>() != 0);
  CHECK(served(1)[0][1].item<std::int64_t>() >= 4);
}

TEST_CASE("a batch changed in place is laid out anew") {
  at::set_num_threads(1);
  ResidencySelector selector(rule_of(1.0, 0, 2, 1));
  const Tensor logits = random_normal({6, 5}, 3, torch::kFloat32);
  TokenBatch batch;
  batch.sequence_ids_BS = torch::zeros({1, 6}, torch::kInt64);
  const Tensor together = selector.select(logits, 2, 0, batch);
  batch.sequence_ids_BS.slice(1, 3, 6).fill_(1);
  const Tensor apart = selector.select(logits, 2, 0, batch);
  CHECK(same(apart.slice(0, 3, 4), top_k_lowest_index(logits.slice(0, 3, 4), 2)));
  CHECK_FALSE(same(apart, together));
}

TEST_CASE("a rule without a meaning is refused") {
  const auto refused = [](const ResidencyRule& rule, const std::string& part) {
    CHECK_THROWS_WITH(ResidencySelector(rule), Catch::Contains(part));
  };
  refused(rule_of(-0.1, 1, 3), "lambda must be at least 0 and finite, got -0.1");
  refused(rule_of(std::numeric_limits<double>::quiet_NaN(), 1, 3), "lambda");
  refused(rule_of(0.1, -1, 3), "always_keep");
  refused(rule_of(0.1, 1, 0), "slots at least 1, got 1 and 0");
  ResidencyRule rule = rule_of(0.1, 1, 3);
  rule.policy = "lfu";
  refused(rule, "the policy must be lru, got \"lfu\"");
  rule = rule_of(0.1, 1, 3);
  rule.logit_range[1] = -1.0F;
  refused(rule, "logit range");
  rule = rule_of(0.1, 1, 3);
  rule.layer_factors = {1.0, -0.5, 1.0};
  refused(rule, "a layer's factor must be at least 0 and finite, got -0.5");
  rule.layer_factors = {1.0, 1.0, std::numeric_limits<double>::infinity()};
  refused(rule, "a layer's factor");
  rule = rule_of(0.1, 1, 3);
  rule.scope.domains = {"python"};
  refused(rule, "the scope must have weights and an offset for each MoE layer, got 0 and 0");
  rule.scope.weights = {{1, 2, 3}};
  rule.scope.offsets = {0.0F};
  rule.scope.elsewhere = 1.5;
  refused(rule, "elsewhere must be from 0 to 1 and its window at least 1, got 1.5 and 64");
  rule.scope.elsewhere = 0.5;
  rule.scope.window = 0;
  refused(rule, "got 0.5 and 0");
  rule.scope.window = 1;
  TokenBatch two_tokens;
  two_tokens.sequence_ids_BS = torch::zeros({1, 2}, torch::kInt64);
  ResidencySelector scoped(rule);
  CHECK_THROWS_WITH(scoped.select(torch::zeros({2, 4}), 2, 0, two_tokens),
                    Catch::Contains("the scope is of 3 experts, the layer has 4"));
  CHECK_THROWS_AS(scoped.select(torch::zeros({2, 3}), 2, 1, two_tokens), std::out_of_range);
  ResidencySelector one_layer(rule_of(0.1, 1, 3, 1));
  TokenBatch batch;
  batch.sequence_ids_BS = torch::zeros({1, 2}, torch::kInt64);
  CHECK_THROWS_AS(one_layer.select(torch::zeros({2, 4}), 2, 1, batch), std::out_of_range);
}

TEST_CASE("the CUDA residency scan chooses what the CPU chooses", "[gpu]") {
  if (!torch::cuda::is_available() || !has_cuda_kernels()) {
    WARN("SKIPPED: needs a GPU and a build with CUDA kernels");
    return;
  }
  SplitMix64 random(99);
  for (int i = 0; i < 240; ++i) {
    const std::int64_t most = std::vector<std::int64_t>{32, 64, 128, 256, 512}.at(static_cast<std::size_t>(i % 5));
    ResidencyCase c = random_residency_case(random, most, 400);
    INFO("case " << i << ": " << c.text());
    Tensor ids = torch::full({1, c.shape.num_tokens}, -1, torch::kInt64);
    for (std::int64_t run = 0; run < c.num_runs(); ++run) {
      ids.slice(1, c.run_begin[static_cast<std::size_t>(run)], c.run_end[static_cast<std::size_t>(run)]).fill_(run);
    }
    TokenBatch batch;
    batch.sequence_ids_BS = ids;
    batch.counted_BS = torch::tensor(c.counted, torch::kUInt8).view({1, -1});
    ResidencyRule rule = rule_of(1.0, c.shape.always_keep, c.shape.slots, 1);
    rule.score = c.shape.score;
    if (rule.score != ResidencyScore::kLogit) {
      rule.lambda = static_cast<double>(c.shape.bonus);
    } else {
      rule.logit_range[0] = c.shape.bonus;
    }
    if (i % 2 == 1) {
      rule.scope = random_scope(random, 1, c.shape.num_experts);
    }
    ResidencySelector on_cpu(rule);
    ResidencySelector on_gpu(rule);
    const Tensor logits = torch::tensor(c.logits).view({c.shape.num_tokens, c.shape.num_experts});
    const Tensor expected = on_cpu.select(logits, c.shape.top_k, 0, batch);
    batch.sequence_ids_BS = ids.to(torch::kCUDA);
    batch.counted_BS = batch.counted_BS.to(torch::kCUDA);
    const Tensor found = on_gpu.select(logits.to(torch::kCUDA), c.shape.top_k, 0, batch);
    CHECK(found.is_cuda());
    REQUIRE(same(found, expected));
  }
}
