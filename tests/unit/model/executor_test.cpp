#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>

#include <fmt/format.h>

#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <catch2/catch.hpp>

#include "model_fixtures.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

struct Inputs {
  ExpertWeights experts;
  Tensor x_TD;
  Tensor selected_TK;
  Tensor weights_TK;

  [[nodiscard]] std::vector<Tensor> all() const {
    std::vector<Tensor> list = {experts.gate_EFD, experts.up_EFD, experts.down_EDF, x_TD, weights_TK};
    if (const ExpertAdapters& adapters = experts.adapters; adapters.defined()) {
      list.insert(list.end(), {adapters.up_a_ERD, adapters.up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR});
    }
    return list;
  }
};

// A copy on another device or dtype whose tensors are leaves; the mixing weights keep float32 or better.
Inputs leaves(const Inputs& inputs, torch::Dtype dtype, torch::Device device, bool train_experts) {
  const auto leaf = [&](const Tensor& t, torch::Dtype type, bool train) {
    return t.detach().to(device, type).clone().set_requires_grad(train);
  };
  Inputs copy;
  copy.experts = {leaf(inputs.experts.gate_EFD, dtype, train_experts),
                  leaf(inputs.experts.up_EFD, dtype, train_experts),
                  leaf(inputs.experts.down_EDF, dtype, train_experts)};
  if (const ExpertAdapters& adapters = inputs.experts.adapters; adapters.defined()) {
    copy.experts.adapters = {leaf(adapters.up_a_ERD, dtype, true), leaf(adapters.up_b_EFR, dtype, true),
                             leaf(adapters.down_a_ERF, dtype, true), leaf(adapters.down_b_EDR, dtype, true),
                             adapters.scale};
  }
  copy.x_TD = leaf(inputs.x_TD, dtype, true);
  copy.selected_TK = inputs.selected_TK.to(device);
  copy.weights_TK = leaf(inputs.weights_TK, dtype == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32, true);
  return copy;
}

// Every token picks K distinct experts out of the first `reachable`, so the others stay empty. Rank 0: no adapters.
Inputs make_inputs(std::int64_t T, std::int64_t D, std::int64_t F, std::int64_t E, std::int64_t K,
                   std::int64_t reachable, std::uint64_t seed = 1, std::int64_t rank = 0) {
  Inputs inputs;
  const double scale = 1.0 / std::sqrt(static_cast<double>(D));
  inputs.experts = {random_normal({E, F, D}, seed) * scale, random_normal({E, F, D}, seed + 1) * scale,
                    random_normal({E, D, F}, seed + 2) / std::sqrt(static_cast<double>(F))};
  inputs.x_TD = random_normal({T, D}, seed + 3);
  inputs.selected_TK = top_k_lowest_index(random_normal({T, reachable}, seed + 4), K);
  inputs.weights_TK = random_normal({T, K}, seed + 5).abs() + 0.1;
  if (rank > 0) {
    const auto matrix = [&](std::int64_t rows, std::int64_t columns, std::uint64_t its_seed) {
      return random_normal({E, rows, columns}, its_seed) / std::sqrt(static_cast<double>(columns));
    };
    inputs.experts.adapters = {matrix(rank, D, seed + 6), matrix(F, rank, seed + 7), matrix(rank, F, seed + 8),
                               matrix(D, rank, seed + 9), 0.7};
  }
  return inputs;
}

struct Result {
  Tensor out_TD;
  std::vector<Tensor> gradients;
};

Result run(Executor& executor, const Inputs& inputs) {
  Result result;
  result.out_TD = executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0);
  const Tensor weight = random_normal(result.out_TD.sizes(), 77).to(result.out_TD.options());
  (result.out_TD * weight).sum().backward();
  for (const Tensor& input : inputs.all()) {
    result.gradients.push_back(input.grad());
  }
  return result;
}

// Experts as gpt-oss has them: gate and up in turn in one tensor, biases, the clamp in use.
struct BiasedInputs {
  std::vector<Tensor> leaves;  // gate and up, their bias, down, its bias, x, weights
  Tensor selected_TK;

  BiasedInputs(std::int64_t T, std::int64_t D, std::int64_t F, std::int64_t E, std::int64_t K, torch::Dtype dtype,
               torch::Device device) {
    const auto leaf = [&](at::IntArrayRef shape, std::uint64_t seed, double scale, torch::Dtype type) {
      leaves.push_back((random_normal(shape, seed) * scale).to(type).to(device).set_requires_grad(true));
    };
    leaf({E, 2 * F, D}, 60, 1.0 / std::sqrt(static_cast<double>(D)), dtype);
    leaf({E, 2 * F}, 61, 0.5, dtype);
    leaf({E, D, F}, 62, 1.0 / std::sqrt(static_cast<double>(F)), dtype);
    leaf({E, D}, 63, 0.5, dtype);
    leaf({T, D}, 64, 1.0, dtype);
    leaf({T, K}, 65, 1.0, dtype == torch::kFloat64 ? dtype : torch::kFloat32);
    selected_TK = top_k_lowest_index(random_normal({T, E}, 66), K).to(device);
  }

  [[nodiscard]] Result run(Executor& executor) const {
    const auto every_second = [](const Tensor& rows, std::int64_t first) {
      return rows.slice(1, first, std::nullopt, 2);
    };
    ExpertWeights experts{every_second(leaves[0], 0), every_second(leaves[0], 1), leaves[2]};
    experts.gate_bias_EF = every_second(leaves[1], 0);
    experts.up_bias_EF = every_second(leaves[1], 1);
    experts.down_bias_ED = leaves[3];
    experts.swiglu_limit = 0.9;
    experts.swiglu_alpha = 1.702;
    Result result;
    result.out_TD = executor.run(experts, leaves[4], selected_TK, leaves[5], 0);
    const Tensor weight = random_normal(result.out_TD.sizes(), 77).to(result.out_TD.options());
    (result.out_TD * weight).sum().backward();
    for (const Tensor& tensor : leaves) {
      result.gradients.push_back(tensor.grad());
    }
    return result;
  }
};

const char* const kNames[] = {"gate", "up", "down", "x", "weights", "up A", "up B", "down A", "down B"};

void compare(const Result& ours, const Result& reference, double tolerance, double gradient_tolerance) {
  CHECK(relative_error(ours.out_TD, reference.out_TD) <= tolerance);
  for (std::size_t i = 0; i < reference.gradients.size(); ++i) {
    CAPTURE(kNames[i]);
    REQUIRE(ours.gradients[i].defined() == reference.gradients[i].defined());
    if (reference.gradients[i].defined()) {
      CHECK(relative_error(ours.gradients[i], reference.gradients[i]) <= gradient_tolerance);
    }
  }
}

}  // namespace

TEST_CASE("top-K takes the largest, ties to the lower index") {
  const Tensor values =
      torch::tensor({1.0F, 3.0F, 3.0F, 2.0F, 3.0F, 5.0F, 5.0F, 5.0F, 5.0F, 5.0F, -1.0F, -2.0F, -1.0F, -2.0F, -3.0F})
          .view({3, 5});
  CHECK(torch::equal(top_k_lowest_index(values, 3),
                     torch::tensor({1, 2, 4, 0, 1, 2, 0, 2, 1}, torch::kInt64).view({3, 3})));
  CHECK(torch::equal(top_k_lowest_index(values, 5).narrow(0, 0, 1),
                     torch::tensor({1, 2, 4, 3, 0}, torch::kInt64).view({1, 5})));
  CHECK_THROWS_AS(top_k_lowest_index(values, 6), std::invalid_argument);
  CHECK_THROWS_AS(top_k_lowest_index(values, 0), std::invalid_argument);
  CHECK(top_k_lowest_index(torch::empty({0, 5}), 2).sizes() == at::IntArrayRef({0, 2}));
}

TEST_CASE("top-K equals a stable sort on random values with many ties") {
  const std::int64_t top_k = GENERATE(1, 4, 31);
  const Tensor values = (random_normal({200, 31}, 9) * 2).round().to(GENERATE(torch::kFloat32, torch::kFloat64));
  const Tensor expected = std::get<1>(values.sort(true, 1, true)).narrow(1, 0, top_k);
  CHECK(torch::equal(top_k_lowest_index(values, top_k), expected));
  CHECK(torch::equal(top_k_lowest_index(values.t().contiguous().t(), top_k), expected));
}

TEST_CASE("top-K of not-a-number still names distinct experts") {
  const Tensor values = torch::full({2, 4}, std::numeric_limits<float>::quiet_NaN());
  CHECK(torch::equal(top_k_lowest_index(values, 2), torch::tensor({0, 1, 0, 1}, torch::kInt64).view({2, 2})));
}

TEST_CASE("grouped products equal the dense reference, gradients included") {
  struct Case {
    std::int64_t T, D, F, E, K, reachable;
  };
  const Case c = GENERATE(Case{23, 12, 7, 5, 2, 5}, Case{40, 8, 5, 9, 3, 4}, Case{1, 6, 3, 4, 1, 4},
                          Case{17, 5, 9, 3, 3, 3}, Case{30, 7, 6, 8, 1, 1}, Case{64, 16, 8, 32, 4, 32});
  CAPTURE(c.T, c.D, c.F, c.E, c.K, c.reachable);
  const bool train_experts = GENERATE(true, false);
  const std::int64_t rank = GENERATE(0, 1, 4);
  CAPTURE(rank);
  const Inputs inputs = make_inputs(c.T, c.D, c.F, c.E, c.K, c.reachable, 1, rank);
  GroupedExecutor grouped;
  DenseExecutor dense;
  const Result reference = run(dense, leaves(inputs, torch::kFloat64, torch::kCPU, train_experts));
  compare(run(grouped, leaves(inputs, torch::kFloat64, torch::kCPU, train_experts)), reference, 1e-12, 1e-12);
  compare(run(grouped, leaves(inputs, torch::kFloat32, torch::kCPU, train_experts)), reference, 1e-5, 1e-4);
  const Result low = run(grouped, leaves(inputs, torch::kBFloat16, torch::kCPU, train_experts));
  // Adapters add two roundings to every product.
  compare(low, reference, rank == 0 ? 4e-2 : 8e-2, rank == 0 ? 4e-2 : 8e-2);
  CHECK(low.out_TD.scalar_type() == torch::kBFloat16);
  CHECK(low.gradients[4].scalar_type() == torch::kFloat32);
  CHECK(reference.gradients[0].defined() == train_experts);
}

TEST_CASE("experts with biases and a clamp: grouped products equal the dense reference") {
  GroupedExecutor grouped;
  DenseExecutor dense;
  const std::int64_t D = GENERATE(12, 32);
  for (const torch::Dtype dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16}) {
    const auto inputs = [&](torch::Dtype type) { return BiasedInputs(2 * D + 6, D, D / 2, 9, 3, type, torch::kCPU); };
    const Result reference = inputs(torch::kFloat64).run(dense);
    const double tolerance = dtype == torch::kFloat64 ? 1e-12 : dtype == torch::kFloat32 ? 1e-4 : 5e-2;
    // bf16 puts some values on the other side of the clamp.
    const double gradient_tolerance = dtype == torch::kBFloat16 ? 0.2 : tolerance;
    compare(inputs(dtype).run(grouped), reference, tolerance, gradient_tolerance);
  }
  // One token by the formula.
  const BiasedInputs one(1, 3, 2, 1, 1, torch::kFloat64, torch::kCPU);
  const torch::NoGradGuard no_grad;
  std::vector<double> hidden;
  for (std::int64_t f = 0; f < 2; ++f) {
    const auto row = [&](std::int64_t r) {
      return (one.leaves[0][0][r] * one.leaves[4][0]).sum().item<double>() + one.leaves[1][0][r].item<double>();
    };
    const double gate = std::min(row(2 * f), 0.9);
    const double up = std::clamp(row(2 * f + 1), -0.9, 0.9);
    hidden.push_back((up + 1.0) * gate / (1.0 + std::exp(-1.702 * gate)));
  }
  ExpertWeights experts{one.leaves[0].slice(1, 0, std::nullopt, 2), one.leaves[0].slice(1, 1, std::nullopt, 2),
                        one.leaves[2]};
  experts.gate_bias_EF = one.leaves[1].slice(1, 0, std::nullopt, 2);
  experts.up_bias_EF = one.leaves[1].slice(1, 1, std::nullopt, 2);
  experts.down_bias_ED = one.leaves[3];
  experts.swiglu_limit = 0.9;
  experts.swiglu_alpha = 1.702;
  const Tensor out = grouped.run(experts, one.leaves[4], one.selected_TK, one.leaves[5], 0);
  for (std::int64_t d = 0; d < 3; ++d) {
    const double down = one.leaves[2][0][d][0].item<double>() * hidden[0] +
                        one.leaves[2][0][d][1].item<double>() * hidden[1] + one.leaves[3][0][d].item<double>();
    CHECK(out[0][d].item<double>() == Approx(one.leaves[5][0][0].item<double>() * down).epsilon(1e-12));
  }
  experts.down_bias_ED = Tensor();
  CHECK_THROWS_AS(grouped.run(experts, one.leaves[4], one.selected_TK, one.leaves[5], 0), std::invalid_argument);
}

TEST_CASE("CUDA: experts with biases equal the CPU's, in bf16 as grouped products", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  GroupedExecutor grouped;
  DenseExecutor dense;
  const Result reference = BiasedInputs(70, 32, 16, 9, 3, torch::kFloat64, torch::kCPU).run(dense);
  const torch::Device device(torch::kCUDA, 0);
  compare(BiasedInputs(70, 32, 16, 9, 3, torch::kFloat32, device).run(grouped), reference, 1e-4, 1e-4);
  compare(BiasedInputs(70, 32, 16, 9, 3, torch::kBFloat16, device).run(grouped), reference, 5e-2, 0.2);
}

TEST_CASE("gradients of the grouped product equal finite differences") {
  const std::int64_t rank = GENERATE(0, 2);
  const Inputs inputs = leaves(make_inputs(11, 6, 5, 4, 2, 3, 40, rank), torch::kFloat64, torch::kCPU, true);
  GroupedExecutor executor;
  const Result result = run(executor, inputs);
  const Tensor weight = random_normal(result.out_TD.sizes(), 77);
  const torch::NoGradGuard no_grad;
  const auto loss = [&] {
    return (executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0) * weight)
        .sum()
        .item<double>();
  };
  constexpr double kStep = 1e-5;
  for (std::size_t i = 0; i < inputs.all().size(); ++i) {
    CAPTURE(kNames[i]);
    double* values = inputs.all()[i].data_ptr<double>();
    const Tensor gradient = result.gradients[i].contiguous();
    for (std::int64_t at = 0; at < gradient.numel(); at += 1 + gradient.numel() / 40) {
      const double kept = values[at];
      values[at] = kept + kStep;
      const double above = loss();
      values[at] = kept - kStep;
      const double below = loss();
      values[at] = kept;
      CHECK(gradient.const_data_ptr<double>()[at] == Approx((above - below) / (2 * kStep)).margin(1e-7).epsilon(1e-6));
    }
  }
}

TEST_CASE("only the gradients asked for are computed") {
  Inputs inputs = leaves(make_inputs(20, 8, 6, 4, 2, 4), torch::kFloat64, torch::kCPU, false);
  GroupedExecutor executor;
  SECTION("only one stack of experts trains") {
    inputs.x_TD.set_requires_grad(false);
    inputs.weights_TK.set_requires_grad(false);
    inputs.experts.down_EDF.set_requires_grad(true);
    const Result result = run(executor, inputs);
    CHECK(result.gradients[2].defined());
    CHECK_FALSE(result.gradients[0].defined());
    CHECK_FALSE(result.gradients[3].defined());
    CHECK_FALSE(result.gradients[4].defined());
  }
  SECTION("one adapter matrix alone trains") {
    const std::size_t alone = GENERATE(5, 6, 7, 8);
    CAPTURE(kNames[alone]);
    Inputs adapted = leaves(make_inputs(20, 8, 6, 4, 2, 4, 1, 3), torch::kFloat64, torch::kCPU, false);
    const Tensor expected = run(executor, adapted).gradients[alone].clone();
    for (Tensor& input : adapted.all()) {
      input.mutable_grad() = Tensor();
      input.set_requires_grad(false);
    }
    adapted.all()[alone].set_requires_grad(true);
    const Result result = run(executor, adapted);
    for (std::size_t i = 0; i < result.gradients.size(); ++i) {
      CHECK(result.gradients[i].defined() == (i == alone));
    }
    CHECK(torch::equal(result.gradients[alone], expected));
  }
  SECTION("nothing trains: no graph") {
    inputs.x_TD.set_requires_grad(false);
    inputs.weights_TK.set_requires_grad(false);
    CHECK_FALSE(executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0).requires_grad());
  }
  SECTION("frozen experts get none from either executor") {
    DenseExecutor dense;
    for (Executor* each : {static_cast<Executor*>(&executor), static_cast<Executor*>(&dense)}) {
      const Result result = run(*each, inputs);
      CHECK_FALSE(result.gradients[0].defined());
      CHECK_FALSE(result.gradients[1].defined());
      CHECK_FALSE(result.gradients[2].defined());
      CHECK(result.gradients[3].abs().min().item<double>() > 0);
    }
  }
}

TEST_CASE("adapters whose B is zero change nothing, to the bit") {
  const torch::Dtype dtype = GENERATE(torch::kFloat64, torch::kFloat32, torch::kBFloat16);
  const Inputs plain = leaves(make_inputs(40, 8, 6, 5, 2, 4), dtype, torch::kCPU, true);
  Inputs adapted = leaves(make_inputs(40, 8, 6, 5, 2, 4, 1, 3), dtype, torch::kCPU, true);
  {
    const torch::NoGradGuard no_grad;
    adapted.experts.adapters.up_b_EFR.zero_();
    adapted.experts.adapters.down_b_EDR.zero_();
  }
  GroupedExecutor grouped;
  DenseExecutor dense;
  for (Executor* each : {static_cast<Executor*>(&grouped), static_cast<Executor*>(&dense)}) {
    const Result expected = run(*each, plain);
    const Result result = run(*each, adapted);
    CHECK(torch::equal(result.out_TD, expected.out_TD));
    for (std::size_t i = 0; i < expected.gradients.size(); ++i) {
      CAPTURE(kNames[i]);
      CHECK(torch::equal(result.gradients[i], expected.gradients[i]));
    }
    // A learns nothing before B has moved; B learns from the start.
    CHECK(result.gradients[5].abs().max().item<double>() == 0.0);
    CHECK(result.gradients[7].abs().max().item<double>() == 0.0);
    CHECK(result.gradients[6].abs().max().item<double>() > 0.0);
    CHECK(result.gradients[8].abs().max().item<double>() > 0.0);
    for (const Inputs& inputs : {plain, adapted}) {
      for (Tensor& input : inputs.all()) {
        input.mutable_grad() = Tensor();
      }
    }
  }
}

namespace {

// The largest allocation on the CPU while it is watched.
class LargestAllocation : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t /*allocated*/, std::size_t /*reserved*/,
                         c10::Device /*device*/) override {
    largest = std::max(largest, bytes);
  }
  bool memoryProfilingEnabled() const override { return true; }
  std::int64_t largest = 0;
};

}  // namespace

TEST_CASE("training adapters allocates nothing as large as a stack of frozen experts") {
  const bool train_experts = GENERATE(false, true);
  const Inputs inputs = leaves(make_inputs(6, 64, 48, 16, 2, 16, 1, 2), torch::kFloat32, torch::kCPU, train_experts);
  const auto watch = std::make_shared<LargestAllocation>();
  GroupedExecutor executor;
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
    run(executor, inputs);
  }
  REQUIRE(watch->largest > 0);
  const auto stack = static_cast<std::int64_t>(inputs.experts.up_EFD.nbytes());
  CHECK((watch->largest >= stack) == train_experts);
}

TEST_CASE("an expert without tokens gets a zero gradient, not garbage") {
  const Inputs inputs = leaves(make_inputs(30, 8, 6, 8, 2, 3, 1, 2), torch::kFloat32, torch::kCPU, true);
  GroupedExecutor executor;
  const Result result = run(executor, inputs);
  for (const std::size_t i : {0, 1, 2, 5, 6, 7, 8}) {
    CHECK(result.gradients[i].narrow(0, 3, 5).abs().max().item<float>() == 0.0F);
    CHECK(result.gradients[i].narrow(0, 0, 3).abs().amax({1, 2}).min().item<float>() > 0.0F);
  }
}

TEST_CASE("executors refuse what does not fit together and accept no tokens") {
  Inputs inputs = leaves(make_inputs(6, 8, 6, 4, 2, 4), torch::kFloat32, torch::kCPU, false);
  GroupedExecutor executor;
  const auto call = [&] { return executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0); };
  SECTION("no tokens") {
    inputs.x_TD = torch::empty({0, 8});
    inputs.selected_TK = torch::empty({0, 2}, torch::kInt64);
    inputs.weights_TK = torch::empty({0, 2});
    CHECK(call().sizes() == at::IntArrayRef({0, 8}));
  }
  SECTION("an expert that is not there") {
    inputs.selected_TK = inputs.selected_TK.clone();
    inputs.selected_TK[3][1] = 4;
    CHECK_THROWS_WITH(call(), Catch::Matchers::Contains("between 0 and 3, got 4"));
  }
  SECTION("another width") {
    inputs.x_TD = torch::ones({6, 7});
    CHECK_THROWS_AS(call(), std::invalid_argument);
  }
  SECTION("too few weights") {
    inputs.weights_TK = torch::ones({6, 1});
    CHECK_THROWS_AS(call(), std::invalid_argument);
  }
  SECTION("adapters of another rank or another model") {
    const ExpertAdapters fitting = make_inputs(6, 8, 6, 4, 2, 4, 1, 3).experts.adapters;
    for (Tensor ExpertAdapters::*member : {&ExpertAdapters::up_a_ERD, &ExpertAdapters::up_b_EFR,
                                           &ExpertAdapters::down_a_ERF, &ExpertAdapters::down_b_EDR}) {
      inputs.experts.adapters = fitting;
      inputs.experts.adapters.*member = (fitting.*member).narrow(1, 0, 2);
      CHECK_THROWS_WITH(call(), Catch::Matchers::Contains("adapters do not fit"));
    }
    inputs.experts.adapters = fitting;
    inputs.experts.adapters.down_b_EDR = Tensor();
    CHECK_THROWS_AS(call(), std::invalid_argument);
  }
}

TEST_CASE("the same products give the same bits") {
  const Inputs inputs = make_inputs(300, 32, 24, 8, 3, 8);
  GroupedExecutor executor;
  const Result first = run(executor, leaves(inputs, torch::kFloat32, torch::kCPU, true));
  const Result second = run(executor, leaves(inputs, torch::kFloat32, torch::kCPU, true));
  CHECK(torch::equal(first.out_TD, second.out_TD));
  for (std::size_t i = 0; i < first.gradients.size(); ++i) {
    CHECK(torch::equal(first.gradients[i], second.gradients[i]));
  }
}

TEST_CASE("CUDA executors equal the CPU", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  const torch::Device gpu(torch::kCUDA, 0);
  struct Case {
    std::int64_t T, D, F, E, K, reachable;
  };
  // Sizes that bf16 groups take (multiples of 8), with and without empty experts, and sizes they do not.
  const Case c = GENERATE(Case{257, 64, 48, 16, 4, 16}, Case{190, 64, 24, 16, 2, 5}, Case{1, 32, 16, 8, 2, 8},
                          Case{90, 36, 20, 7, 3, 7}, Case{2048, 256, 56, 32, 4, 32});
  CAPTURE(c.T, c.D, c.F, c.E, c.K, c.reachable);
  const bool train_experts = GENERATE(true, false);
  const std::int64_t rank = GENERATE(0, 5, 16);  // 5: not a multiple of 8 either
  CAPTURE(rank);
  // Rounded to bf16 first, so that both sides start from the same numbers.
  Inputs inputs = make_inputs(c.T, c.D, c.F, c.E, c.K, c.reachable, 1, rank);
  for (Tensor* t : {&inputs.experts.gate_EFD, &inputs.experts.up_EFD, &inputs.experts.down_EDF, &inputs.x_TD}) {
    *t = t->to(torch::kBFloat16);
  }
  if (ExpertAdapters& adapters = inputs.experts.adapters; adapters.defined()) {
    for (Tensor* t : {&adapters.up_a_ERD, &adapters.up_b_EFR, &adapters.down_a_ERF, &adapters.down_b_EDR}) {
      *t = t->to(torch::kBFloat16);
    }
  }
  GroupedExecutor executor;
  const Result reference = run(executor, leaves(inputs, torch::kFloat32, torch::kCPU, train_experts));
  compare(run(executor, leaves(inputs, torch::kFloat32, gpu, train_experts)), reference, 1e-5, 1e-4);
  const Result low = run(executor, leaves(inputs, torch::kBFloat16, gpu, train_experts));
  const double tolerance = rank == 0 ? 4e-2 : 8e-2;
  const double square_tolerance = rank == 0 ? 5e-4 : 1e-3;
  compare(low, reference, tolerance, tolerance);
  CHECK(normalised_square_error(low.out_TD, reference.out_TD) <= square_tolerance);
  for (std::size_t i = 0; i < low.gradients.size(); ++i) {
    if (reference.gradients[i].defined()) {
      CAPTURE(kNames[i]);
      CHECK(normalised_square_error(low.gradients[i], reference.gradients[i]) <= square_tolerance);
    }
  }
  if (train_experts && c.reachable < c.E) {
    CHECK(low.gradients[0].narrow(0, c.reachable, c.E - c.reachable).abs().max().item<float>() == 0.0F);
  }
}

TEST_CASE("grouped products on CUDA never wait for the device", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  const Inputs inputs = leaves(make_inputs(300, 64, 32, 16, 4, 16, 1, GENERATE(0, 8, 3)), torch::kBFloat16,
                               torch::Device(torch::kCUDA, 0), true);
  GroupedExecutor executor;
  const Tensor gradient = torch::ones_like(inputs.x_TD);
  // In this mode LibTorch throws where it would synchronise.
  c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
  CHECK_THROWS(inputs.x_TD.sum().item<float>());
  CHECK_NOTHROW(executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0).backward(gradient));
  CHECK_NOTHROW(top_k_lowest_index(inputs.weights_TK, 2));
  c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
}

TEST_CASE("CUDA top-K breaks ties like the CPU", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  const Tensor values = (random_normal({3000, 64}, 9) * 2).round().to(torch::kFloat32);
  CHECK(torch::equal(top_k_lowest_index(values.cuda(), 8).cpu(), top_k_lowest_index(values, 8)));
}

TEST_CASE("speed of the grouped product", "[.benchmark]") {
  at::set_num_threads(2);
  const bool train_experts = GENERATE(false, true);
  const std::int64_t rank = GENERATE(0, 32);
  const Inputs inputs =
      leaves(make_inputs(2048, 256, 56, 32, 4, 32, 1, rank), torch::kFloat32, torch::kCPU, train_experts);
  GroupedExecutor executor;
  const Tensor gradient = random_normal({2048, 256}, 3, torch::kFloat32);
  double best_forward = 1e9;
  double best_both = 1e9;
  for (int repeat = 0; repeat < 40; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    const Tensor out = executor.run(inputs.experts, inputs.x_TD, inputs.selected_TK, inputs.weights_TK, 0);
    const auto middle = std::chrono::steady_clock::now();
    out.backward(gradient);
    const auto end = std::chrono::steady_clock::now();
    best_forward = std::min(best_forward, std::chrono::duration<double, std::milli>(middle - start).count());
    best_both = std::min(best_both, std::chrono::duration<double, std::milli>(end - start).count());
  }
  WARN(fmt::format("T 2048, D 256, F 56, E 32, K 4, {} experts, rank {}: forward {:.1f} ms, with backward {:.1f} ms",
                   train_experts ? "trained" : "frozen", rank, best_forward, best_both));
}
