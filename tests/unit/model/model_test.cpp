#include <chrono>

#include <fmt/format.h>

#include <ATen/Parallel.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/model/expert_blobs.hpp"
#include "hestia/model/key_value_cache.hpp"
#include "model_fixtures.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

// Norms and biases off their initial values, so that their gradients and uses are visible.
MoeModel make_model(const Architecture& a, torch::Dtype dtype = torch::kFloat64, torch::Device device = torch::kCPU) {
  const torch::NoGradGuard no_grad;
  MoeModel model = create_model(a, dtype, device, 11);
  std::uint64_t seed = 500;
  for (auto& [name, tensor] : model->named_tensors()) {
    ++seed;
    if (tensor.dim() == 1) {
      tensor.add_(random_normal(tensor.sizes(), seed).mul(0.3).to(tensor.options()));
    }
  }
  return model;
}

std::vector<Tensor> gradients_of(MoeModel& model) {
  std::vector<Tensor> gradients;
  for (Tensor& parameter : model->all_parameters()) {
    gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : Tensor());
    parameter.mutable_grad() = Tensor();
  }
  return gradients;
}

TokenBatch single(const Tensor& tokens_S) {
  return {tokens_S.unsqueeze(0), torch::arange(tokens_S.size(0)).unsqueeze(0),
          torch::zeros({1, tokens_S.size(0)}, torch::kInt64)};
}

}  // namespace

TEST_CASE("gradients of every parameter equal finite differences") {
  const std::string switches =
      GENERATE(as<std::string>(), "on", "off, tied", "dense layers, shared experts, groups, windows", "phimoe",
               "deepseek", "gpt-oss");
  CAPTURE(switches);
  Architecture a = switches == "phimoe"          ? phi_architecture()
                   : switches == "deepseek"      ? deepseek_architecture()
                   : switches == "gpt-oss"       ? gpt_oss_architecture()
                   : switches.find("dense") == 0 ? mixed_architecture()
                                                 : small_architecture();
  if (switches == "off, tied") {
    a.normalise_top_k = false;
    a.clip_qkv.reset();
    a.attention_bias = false;
    a.rope = {};
    a.tie_word_embeddings = true;
    a.num_key_value_heads = a.num_attention_heads;
  }
  const bool checkpointing = GENERATE(false, true);
  MoeModel model = make_model(a);
  model->set_activation_checkpointing(checkpointing);
  const TokenBatch batch = packed_batch(a);
  const Tensor weight = random_normal({2, 9, a.vocab_size}, 31);
  const auto loss = [&] {
    const ModelOutput output = model->forward(batch);
    return probe_loss(output) + (model->head(output.hidden_BSD) * weight).sum();
  };
  loss().backward();
  const torch::NoGradGuard no_grad;
  constexpr double kStep = 1e-6;
  // Along one random direction per parameter: every entry counts, for two forwards.
  std::uint64_t seed = 900;
  for (const auto& item : model->named_parameters()) {
    CAPTURE(item.key());
    REQUIRE(item.value().grad().defined());
    Tensor values = item.value();
    const Tensor kept = values.clone();
    const Tensor direction = random_normal(values.sizes(), ++seed);
    values.add_(direction, kStep);
    const double above = loss().item<double>();
    values.copy_(kept).sub_(direction, kStep);
    const double below = loss().item<double>();
    values.copy_(kept);
    CHECK((item.value().grad() * direction).sum().item<double>() ==
          Approx((above - below) / (2 * kStep)).margin(1e-5).epsilon(1e-6));
  }
}

TEST_CASE("rope factors follow each sequence's own length") {
  const torch::NoGradGuard no_grad;
  const Architecture a = phi_architecture();
  MoeModel model = make_model(a);
  const TokenBatch packed = packed_batch(a);
  const ModelOutput together = model->forward(packed);
  // Lengths 4 and 5 in the first row, 6 in the second: short, long, long.
  struct Piece {
    std::int64_t row, begin, length;
  };
  for (const Piece& piece : {Piece{0, 0, 4}, Piece{0, 4, 5}, Piece{1, 0, 6}}) {
    const Tensor tokens = packed.tokens_BS[piece.row].narrow(0, piece.begin, piece.length);
    const Tensor expected = together.hidden_BSD[piece.row].narrow(0, piece.begin, piece.length);
    CHECK(relative_error(model->forward(single(tokens)).hidden_BSD[0], expected) < 1e-12);
    Architecture other = a;
    other.rope.long_factor = a.rope.short_factor;
    MoeModel changed = make_model(other);
    CHECK((relative_error(changed->forward(single(tokens)).hidden_BSD[0], expected) < 1e-12) == (piece.length == 4));
  }
}

TEST_CASE("a key-value cache refuses what does not continue it and stays as it was") {
  Architecture a = phi_architecture();
  a.rope.original_positions = GENERATE(4, 100);
  MoeModel model = make_model(a);
  const Tensor tokens = random_integers(a.vocab_size, {9}, 41);
  const auto piece = [&](std::int64_t begin, std::int64_t count) {
    TokenBatch batch = single(tokens.narrow(0, begin, count));
    batch.positions_BS = batch.positions_BS + begin;
    return batch;
  };
  CHECK_THROWS_AS(KeyValueCache(0), std::invalid_argument);
  KeyValueCache cache(8);
  CHECK_FALSE(model->forward(piece(0, 3), cache).hidden_BSD.requires_grad());
  CHECK(cache.length() == 3);
  CHECK_THROWS_AS(model->forward(piece(2, 1), cache), std::invalid_argument);  // a position again
  CHECK_THROWS_AS(model->forward(piece(3, 6), cache), std::invalid_argument);  // too many
  TokenBatch two = piece(3, 2);
  two.sequence_ids_BS = torch::tensor({0, 1}, torch::kInt64).unsqueeze(0);
  CHECK_THROWS_AS(model->forward(two, cache), std::invalid_argument);
  two.sequence_ids_BS = torch::full({1, 2}, -1, torch::kInt64);
  CHECK_THROWS_AS(model->forward(two, cache), std::invalid_argument);
  TokenBatch rows = piece(3, 1);
  rows = {rows.tokens_BS.expand({2, 1}), rows.positions_BS.expand({2, 1}), rows.sequence_ids_BS.expand({2, 1})};
  CHECK_THROWS_AS(model->forward(rows, cache), std::invalid_argument);
  CHECK(cache.length() == 3);
  if (a.rope.original_positions == 4) {
    CHECK_THROWS_AS(model->forward(piece(3, 2), cache), RunError);
    cache.clear();
    CHECK_NOTHROW(model->forward(piece(0, 5), cache));  // long from its first token on
    CHECK_NOTHROW(model->forward(piece(5, 1), cache));
  } else {
    const Tensor whole = model->forward(piece(0, 5)).hidden_BSD;
    CHECK(relative_error(model->forward(piece(3, 2), cache).hidden_BSD, whole.narrow(1, 3, 2)) < 1e-12);
  }
}

TEST_CASE("a step at a place on the device is the forward of the next token") {
  const torch::NoGradGuard no_grad;
  Architecture phi = phi_architecture();
  phi.rope.original_positions = 3;
  const Architecture a =
      GENERATE_COPY(small_architecture(), mixed_architecture(), phi, deepseek_architecture(), gpt_oss_architecture());
  CAPTURE(a.family);
  MoeModel model = make_model(a);
  constexpr std::int64_t kPrompt = 4;
  constexpr std::int64_t kLength = 9;
  const Tensor tokens_BS = random_integers(a.vocab_size, {2, kLength}, 43);
  const auto batch_of = [&](std::int64_t length) {
    const Tensor positions = torch::arange(length, torch::kInt64).unsqueeze(0).expand({2, length});
    return TokenBatch{tokens_BS.narrow(1, 0, length), positions, torch::zeros({2, length}, torch::kInt64)};
  };
  const ModelOutput whole = model->forward(batch_of(kLength));
  KeyValueCache cache(kLength + 2);
  (void)model->forward(batch_of(kPrompt), cache);
  const Rotations rotations = model->rotations(cache.capacity());
  const Tensor position_1 = torch::tensor({kPrompt}, torch::kInt64);
  for (std::int64_t t = kPrompt; t < kLength; ++t) {
    // Keys behind the step's own are masked, however many are looked at.
    const std::int64_t visible = t % 2 == 0 ? t + 1 : cache.capacity();
    const ModelOutput step = model->step(tokens_BS.narrow(1, t, 1), {position_1, rotations, visible}, cache);
    CHECK(relative_error(step.hidden_BSD, whole.hidden_BSD.narrow(1, t, 1)) < 1e-12);
    REQUIRE(step.routing.size() == whole.routing.size());
    for (std::size_t layer = 0; layer < whole.routing.size(); ++layer) {
      const Tensor expected = whole.routing[layer].selected_TK.view({2, kLength, a.top_k}).select(1, t);
      CHECK(step.routing[layer].selected_TK.equal(expected));
    }
    CHECK(cache.length() == t);
    cache.advance(1);
    position_1.add_(1);
  }
}

TEST_CASE("a step refuses a cache that it does not continue") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a);
  const Tensor tokens_B1 = random_integers(a.vocab_size, {1, 1}, 44);
  const Tensor position_1 = torch::zeros({1}, torch::kInt64);
  KeyValueCache cache(4);
  const Rotations rotations = model->rotations(4);
  CHECK_THROWS_AS(model->step(tokens_B1, {position_1, rotations, 1}, cache), std::invalid_argument);  // empty
  (void)model->forward(single(random_integers(a.vocab_size, {2}, 45)), cache);
  position_1.fill_(2);
  CHECK_THROWS_AS(model->step(tokens_B1, {position_1, rotations, 2}, cache), std::invalid_argument);  // not its own key
  CHECK_THROWS_AS(model->step(tokens_B1, {position_1, rotations, 5}, cache), std::invalid_argument);  // no such key
  CHECK_THROWS_AS(model->step(tokens_B1, {position_1, model->rotations(3), 4}, cache), std::invalid_argument);
  CHECK_THROWS_AS(model->step(tokens_B1.expand({2, 1}), {position_1, rotations, 3}, cache), std::invalid_argument);
  CHECK_NOTHROW(model->step(tokens_B1, {position_1, rotations, 3}, cache));
}

TEST_CASE("routed experts in blobs are the same model") {
  const torch::NoGradGuard no_grad;
  const Architecture a =
      GENERATE(small_architecture(), mixed_architecture(), deepseek_architecture(), gpt_oss_architecture());
  const torch::Dtype dtype = GENERATE(torch::kFloat32, torch::kBFloat16);
  CAPTURE(a.family, dtype);
  const ExpertBlobLayout layout = expert_blob_layout(a, dtype);
  CHECK(layout.bytes % 64 == 0);
  CHECK(layout.bytes >= static_cast<std::size_t>(a.expert_parameters()) * c10::elementSize(dtype));
  const auto moe_layers = static_cast<std::int64_t>(a.moe_layers().size());
  const Tensor blobs_NB =
      torch::full({moe_layers * a.num_experts, static_cast<std::int64_t>(layout.bytes)}, 0xff, torch::kUInt8);
  MoeModel plain = create_model(a, dtype, torch::kCPU, 3);
  MoeModel in_blobs = create_model(a, dtype, torch::kCPU, 3, blobs_NB);
  const auto expected = plain->named_tensors();
  const auto tensors = in_blobs->named_tensors();
  REQUIRE(tensors.size() == expected.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK(tensors[i].first == expected[i].first);
    CHECK(tensors[i].second.equal(expected[i].second));
  }
  const TokenBatch batch = single(random_integers(a.vocab_size, {7}, 46));
  CHECK(in_blobs->forward(batch).hidden_BSD.equal(plain->forward(batch).hidden_BSD));

  // Each expert alone out of its blob.
  const ExpertWeights experts = experts_in_blobs(a, layout, blobs_NB.narrow(0, a.num_experts + 1, 2));
  const std::string other = a.family == "gpt_oss" ? "model.layers.1.mlp.experts.down_proj" : "";
  for (const auto& [name, tensor] : expected) {
    if (name == fmt::format("model.layers.{}.mlp.experts.1.down_proj.weight", a.moe_layers()[1])) {
      CHECK(experts.down_EDF[0].equal(tensor));
    } else if (name == other) {
      CHECK(experts.down_EDF[1].equal(tensor[2].t()));  // stored transposed
    }
  }
  CHECK_THROWS_AS(create_model(a, dtype, torch::kCPU, 3, blobs_NB.narrow(0, 0, a.num_experts)), std::invalid_argument);
  CHECK_THROWS_AS(create_model(a, dtype, torch::kCPU, 3, blobs_NB.narrow(1, 0, 64)), std::invalid_argument);
  CHECK_THROWS_AS(expert_blob_layout(a, torch::kInt32), std::invalid_argument);
}

TEST_CASE("routers of lower layers learn through frozen layers above") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat32);
  model->set_activation_checkpointing(GENERATE(false, true));
  freeze_all_but_routers(model);
  const ModelOutput output = model->forward(packed_batch(a));
  SECTION("from the hidden state") {
    probe_loss(output, true, false).backward();
    for (const Tensor& router : model->routers()) {
      CHECK(router.grad().abs().max().item<float>() > 1e-4F);
    }
  }
  SECTION("from the last layer's logits alone") {
    (output.routing.back().logits_TE * random_normal(output.routing.back().logits_TE.sizes(), 6, torch::kFloat32))
        .sum()
        .backward();
    for (const Tensor& router : model->routers()) {
      CHECK(router.grad().abs().max().item<float>() > 1e-4F);
    }
  }
  SECTION("from the first layer's record only the first router learns") {
    output.routing[0].probabilities_TE.square().sum().backward();
    CHECK(model->routers()[0].grad().abs().max().item<float>() > 0.0F);
    CHECK_FALSE(model->routers()[1].grad().defined());
    CHECK_FALSE(model->routers()[2].grad().defined());
  }
  std::int64_t with_gradient = 0;
  for (const Tensor& parameter : model->all_parameters()) {
    with_gradient += parameter.grad().defined() ? 1 : 0;
    CHECK((parameter.requires_grad() || !parameter.grad().defined()));
  }
  CHECK(with_gradient >= 1);
  CHECK(with_gradient <= a.num_layers);
}

TEST_CASE("activation checkpointing changes neither outputs nor gradients") {
  const int kind = GENERATE(0, 1, 2, 3, 4);
  const Architecture a = kind == 0   ? small_architecture()
                         : kind == 1 ? mixed_architecture()
                         : kind == 2 ? phi_architecture()
                         : kind == 3 ? deepseek_architecture()
                                     : gpt_oss_architecture();
  const torch::Dtype dtype = GENERATE(torch::kFloat32, torch::kBFloat16);
  const bool frozen = GENERATE(false, true);
  const bool hidden = GENERATE(true, false);
  MoeModel model = make_model(a, dtype);
  model->keep_reference_routers();
  if (frozen) {
    freeze_all_but_routers(model);
  }
  const TokenBatch batch = packed_batch(a);
  const ModelOutput plain = model->forward(batch);
  REQUIRE(plain.routing.size() == a.moe_layers().size());
  probe_loss(plain, hidden, true).backward();
  const std::vector<Tensor> expected = gradients_of(model);
  model->set_activation_checkpointing(true);
  const ModelOutput checkpointed = model->forward(batch);
  CHECK(torch::equal(plain.hidden_BSD, checkpointed.hidden_BSD));
  for (std::size_t i = 0; i < plain.routing.size(); ++i) {
    CHECK(torch::equal(plain.routing[i].logits_TE, checkpointed.routing[i].logits_TE));
    CHECK(torch::equal(plain.routing[i].weights_TK, checkpointed.routing[i].weights_TK));
    CHECK(torch::equal(plain.routing[i].selected_TK, checkpointed.routing[i].selected_TK));
    CHECK(torch::equal(plain.routing[i].reference_logits_TE, checkpointed.routing[i].reference_logits_TE));
    CHECK_FALSE(checkpointed.routing[i].selected_TK.requires_grad());
    CHECK_FALSE(checkpointed.routing[i].reference_logits_TE.requires_grad());
  }
  probe_loss(checkpointed, hidden, true).backward();
  const std::vector<Tensor> got = gradients_of(model);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    REQUIRE(expected[i].defined() == got[i].defined());
    if (expected[i].defined()) {
      CHECK(relative_error(got[i], expected[i]) <= (dtype == torch::kFloat32 ? 1e-5 : 2e-2));
    }
  }
}

TEST_CASE("a checkpointed forward outlives its model and serves grad()") {
  const Architecture a = small_architecture();
  std::vector<Tensor> routers;
  Tensor loss;
  std::vector<Tensor> expected;
  {
    MoeModel model = make_model(a, torch::kFloat64);
    routers = model->routers();
    expected = torch::autograd::grad({probe_loss(model->forward(packed_batch(a)))}, routers);
    model->set_activation_checkpointing(true);
    loss = probe_loss(model->forward(packed_batch(a)));
  }
  const std::vector<Tensor> got = torch::autograd::grad({loss}, routers);
  for (std::size_t i = 0; i < got.size(); ++i) {
    CHECK(relative_error(got[i], expected[i]) <= 1e-12);
    CHECK_FALSE(routers[i].grad().defined());
  }
}

TEST_CASE("the selector is asked once per layer, also with checkpointing, and its choice is served") {
  struct Counting : Selector {
    std::vector<std::int64_t> asked;
    Tensor select(const Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                  const TokenBatch& batch) override {
      asked.push_back(moe_layer);
      CHECK_FALSE(logits_TE.requires_grad());
      CHECK(batch.tokens_BS.numel() == logits_TE.size(0));
      // Changes with every call: asking twice would serve two different selections.
      const std::int64_t shift = static_cast<std::int64_t>(asked.size());
      return (top_k_lowest_index(logits_TE, top_k) + shift) % logits_TE.size(1);
    }
  };
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat64);
  const auto gradients = [&](bool checkpointing) {
    auto selector = std::make_shared<Counting>();
    model->set_selector(selector);
    model->set_activation_checkpointing(checkpointing);
    const ModelOutput output = model->forward(packed_batch(a));
    probe_loss(output).backward();
    CHECK(selector->asked == std::vector<std::int64_t>{0, 1, 2});
    CHECK(torch::equal(output.routing[0].selected_TK,
                       (top_k_lowest_index(output.routing[0].logits_TE, a.top_k) + 1) % a.num_experts));
    return gradients_of(model);
  };
  const std::vector<Tensor> plain = gradients(false);
  const std::vector<Tensor> checkpointed = gradients(true);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    REQUIRE(checkpointed[i].defined() == plain[i].defined());
    if (plain[i].defined()) {
      CHECK(relative_error(checkpointed[i], plain[i]) <= 1e-12);
    }
  }
}

TEST_CASE("nothing leaks between sequences or out of padding") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat64);
  TokenBatch batch = packed_batch(a);
  const ModelOutput before = model->forward(batch);
  CHECK(before.hidden_BSD.isfinite().all().item<bool>());
  probe_loss(before).backward();
  for (const Tensor& gradient : gradients_of(model)) {
    CHECK((!gradient.defined() || gradient.isfinite().all().item<bool>()));  // the head is not in the loss
  }
  // Changing sequence 0 and the padding leaves sequences 1 and 2 as they were, to the bit.
  batch.tokens_BS = batch.tokens_BS.clone();
  batch.tokens_BS.narrow(1, 0, 1).select(0, 0).add_(1).remainder_(a.vocab_size);
  batch.tokens_BS[1].narrow(0, 6, 3).add_(3).remainder_(a.vocab_size);
  const ModelOutput after = model->forward(batch);
  CHECK(relative_error(after.hidden_BSD[0].narrow(0, 4, 5), before.hidden_BSD[0].narrow(0, 4, 5)) <= 1e-12);
  CHECK(relative_error(after.hidden_BSD[1].narrow(0, 0, 6), before.hidden_BSD[1].narrow(0, 0, 6)) <= 1e-12);
  CHECK(relative_error(after.hidden_BSD[0].narrow(0, 0, 4), before.hidden_BSD[0].narrow(0, 0, 4)) > 1e-3);
}

TEST_CASE("attention looks back only") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat64);
  const Tensor tokens = random_integers(a.vocab_size, {8}, 3);
  Tensor changed = tokens.clone();
  changed[5] = (tokens[5] + 1) % a.vocab_size;
  const Tensor first = model->forward(single(tokens)).hidden_BSD[0];
  const Tensor second = model->forward(single(changed)).hidden_BSD[0];
  CHECK(relative_error(second.narrow(0, 0, 5), first.narrow(0, 0, 5)) <= 1e-12);
  CHECK(relative_error(second.narrow(0, 6, 2), first.narrow(0, 6, 2)) > 1e-6);
}

TEST_CASE("a single token and a batch of whole rows work") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat32);
  const Tensor tokens = random_integers(a.vocab_size, {2, 6}, 8);
  TokenBatch batch{tokens, torch::arange(6).expand({2, 6}),
                   torch::tensor({0, 1}, torch::kInt64).view({2, 1}).expand({2, 6})};
  const ModelOutput both = model->forward(batch);
  CHECK(both.routing[1].logits_TE.sizes() == at::IntArrayRef({12, a.num_experts}));
  for (std::int64_t row = 0; row < 2; ++row) {
    CHECK(relative_error(both.hidden_BSD[row], model->forward(single(tokens[row])).hidden_BSD[0]) <= 1e-5);
  }
  const ModelOutput one = model->forward(single(tokens[0].narrow(0, 0, 1)));
  CHECK(relative_error(one.hidden_BSD[0], both.hidden_BSD[0].narrow(0, 0, 1)) <= 1e-5);
  batch.positions_BS = torch::arange(5).unsqueeze(0);
  CHECK_THROWS_AS(model->forward(batch), std::invalid_argument);
}

TEST_CASE("reference routers stay what they were") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kFloat32);
  freeze_all_but_routers(model);
  const TokenBatch batch = packed_batch(a);
  CHECK_FALSE(model->forward(batch).routing[0].reference_logits_TE.defined());
  CHECK_THROWS_AS(model->forward_reference(batch), std::logic_error);
  model->keep_reference_routers();
  const ModelOutput start = model->forward(batch);
  for (const RoutingRecord& record : start.routing) {
    CHECK(torch::equal(record.reference_logits_TE, record.logits_TE));
    CHECK_FALSE(record.reference_logits_TE.requires_grad());
    CHECK(record.logits_TE.requires_grad());
  }
  {
    const torch::NoGradGuard no_grad;
    model->routers()[0].add_(0.5);
  }
  const ModelOutput later = model->forward(batch);
  CHECK(torch::equal(later.routing[0].reference_logits_TE, start.routing[0].logits_TE));
  CHECK_FALSE(torch::equal(later.routing[0].logits_TE, start.routing[0].logits_TE));

  // The whole forward with them is the one from before, whatever the present routers do.
  const ModelOutput base = model->forward_reference(batch);
  CHECK(torch::equal(base.hidden_BSD, start.hidden_BSD));
  CHECK_FALSE(torch::equal(later.hidden_BSD, start.hidden_BSD));
  for (std::size_t i = 0; i < base.routing.size(); ++i) {
    CHECK(torch::equal(base.routing[i].logits_TE, start.routing[i].logits_TE));
    CHECK(torch::equal(base.routing[i].selected_TK, start.routing[i].selected_TK));
    CHECK_FALSE(base.routing[i].logits_TE.requires_grad());
  }
}

TEST_CASE("parameters have the names and dtypes of the checkpoint and are not copies") {
  const Architecture a = small_architecture();
  MoeModel model = make_model(a, torch::kBFloat16);
  const auto named = model->named_tensors();
  const std::vector<TensorSpec> specs = tensor_specs(a);
  REQUIRE(named.size() == specs.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CHECK(named[i].first == specs[i].name);
    CHECK(named[i].second.sizes() == at::IntArrayRef(specs[i].shape));
    CHECK(named[i].second.scalar_type() == (specs[i].role == TensorRole::kRouter ? torch::kFloat32 : torch::kBFloat16));
    elements += named[i].second.numel();
  }
  CHECK(elements == a.total_parameters());
  std::int64_t stacked = 0;
  for (const Tensor& parameter : model->all_parameters()) {
    stacked += parameter.numel();
  }
  CHECK(stacked == elements);
  const torch::NoGradGuard no_grad;
  const ModelOutput before = model->forward(packed_batch(a));
  for (const auto& [name, tensor] : named) {
    if (name == "model.layers.2.mlp.experts.3.down_proj.weight") {
      Tensor slice = tensor;
      slice.mul_(-3.0);
    }
  }
  CHECK_FALSE(torch::equal(model->forward(packed_batch(a)).hidden_BSD, before.hidden_BSD));
}

TEST_CASE("the CUDA model equals the CPU's, forward and gradients", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  Architecture a = small_architecture();
  a.hidden_size = 64;
  a.head_dim = 16;
  a.expert_intermediate_size = 24;
  a.initializer_range = 0.15;
  a.clip_qkv.reset();  // its gradient jumps at the boundary, where rounding decides the side
  const torch::Device gpu(torch::kCUDA, 0);
  const bool checkpointing = GENERATE(false, true);
  // Weights rounded to bf16 once, so that all models hold the same numbers.
  const auto rounded_model = [&](torch::Dtype dtype, torch::Device device) {
    MoeModel model = make_model(a, dtype, device);
    const torch::NoGradGuard no_grad;
    for (Tensor& parameter : model->all_parameters()) {
      parameter.copy_(parameter.to(torch::kBFloat16));
    }
    return model;
  };
  MoeModel reference = rounded_model(torch::kFloat32, torch::kCPU);
  const ModelOutput expected = reference->forward(packed_batch(a));
  probe_loss(expected).backward();
  const std::vector<Tensor> expected_gradients = gradients_of(reference);
  struct Forced : Selector {
    std::vector<Tensor> selected;
    Tensor select(const Tensor& logits_TE, std::int64_t, std::int64_t moe_layer, const TokenBatch&) override {
      return selected[static_cast<std::size_t>(moe_layer)].to(logits_TE.device());
    }
  };
  for (const torch::Dtype dtype : {torch::kFloat32, torch::kBFloat16}) {
    MoeModel model = rounded_model(dtype, gpu);
    model->set_activation_checkpointing(checkpointing);
    auto forced = std::make_shared<Forced>();
    for (const RoutingRecord& record : expected.routing) {
      forced->selected.push_back(record.selected_TK);
    }
    model->set_selector(forced);
    const ModelOutput output = model->forward(packed_batch(a, gpu));
    probe_loss(output).backward();
    const std::vector<Tensor> gradients = gradients_of(model);
    const bool wide = dtype == torch::kFloat32;
    CHECK(normalised_square_error(output.hidden_BSD, expected.hidden_BSD) <= (wide ? 1e-9 : 1e-3));
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      CAPTURE(model->named_parameters().keys()[i], c10::toString(dtype));
      REQUIRE(gradients[i].defined() == expected_gradients[i].defined());
      if (!gradients[i].defined()) {
        continue;
      }
      // bf16: three layers of rounded activations lie under every gradient; those of norms and biases are small sums
      // of large terms (measured: up to 1.5e-2).
      CHECK(normalised_square_error(gradients[i], expected_gradients[i]) <= (wide ? 1e-8 : 2e-2));
    }
  }
}

TEST_CASE("speed of a layer", "[.benchmark]") {
  at::set_num_threads(2);
  Architecture a = small_architecture();
  a.vocab_size = 4096;
  a.hidden_size = 256;
  a.expert_intermediate_size = 56;
  a.num_layers = 6;
  a.num_attention_heads = 8;
  a.num_key_value_heads = 8;
  a.head_dim = 32;
  a.num_experts = 32;
  a.top_k = 4;
  a.attention_bias = false;
  a.clip_qkv.reset();
  a.initializer_range = 0.02;
  MoeModel model = create_model(a, torch::kFloat32, torch::kCPU, 1);
  const bool frozen = GENERATE(true, false);
  if (frozen) {
    freeze_all_but_routers(model);
  }
  model->keep_reference_routers();
  TokenBatch batch{random_integers(4096, {8, 256}, 2), torch::arange(256).expand({8, 256}).contiguous(),
                   (torch::arange(256) / 100).floor().to(torch::kInt64).expand({8, 256}).contiguous()};
  double best_forward = 1e9;
  double best_both = 1e9;
  for (int repeat = 0; repeat < 6; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    const ModelOutput output = model->forward(batch);
    const auto middle = std::chrono::steady_clock::now();
    output.hidden_BSD.sum().backward();
    const auto end = std::chrono::steady_clock::now();
    best_forward = std::min(best_forward, std::chrono::duration<double, std::milli>(middle - start).count());
    best_both = std::min(best_both, std::chrono::duration<double, std::milli>(end - start).count());
  }
  WARN(fmt::format("6 layers, T 2048, {}: forward {:.1f} ms, with backward {:.1f} ms a layer",
                   frozen ? "routers only" : "everything trained", best_forward / 6, best_both / 6));
}
