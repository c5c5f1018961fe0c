#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

std::vector<std::int64_t> values(const torch::Tensor& tensor) {
  return {tensor.data_ptr<std::int64_t>(), tensor.data_ptr<std::int64_t>() + tensor.numel()};
}

using Indices = std::vector<std::int64_t>;

}  // namespace

TEST_CASE("a layout's index tensors: counted tokens, pairs that reach back into the prompt, runs") {
  // Tokens: 0 padding; 1 2 3 sequence (1 prompt); 4 5 sequence; 6 padding; 7 one token; 8 9 all prompt.
  const LayoutTensors layout(layout_of({{1, 0, true}, {3, 1}, {2, 0}, {1, 0, true}, {1, 0}, {2, 2}}), torch::kCPU);
  CHECK(layout.num_tokens() == 10);
  CHECK(layout.num_counted() == 5);
  CHECK(layout.num_pairs() == 3);
  CHECK(values(layout.token_indices()) == Indices{1, 2, 3, 4, 5, 7, 8, 9});
  CHECK(values(layout.counted_indices()) == Indices{2, 3, 4, 5, 7});
  CHECK(values(layout.pair_indices()) == Indices{2, 3, 5});
  CHECK(values(layout.pair_runs()) == Indices{0, 0, 1});
  CHECK(values(layout.pairs_per_run()) == Indices{2, 1, 0, 0});
  CHECK(values(layout.run_begins()) == Indices{1, 4, 7, 8});
  CHECK(values(layout.run_ends()) == Indices{4, 6, 8, 10});
}

TEST_CASE("counts depend on the layout alone") {
  const Sizes sizes;
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    // Counted: 4 + 4 + 0 + 1 + 5; pairs: 4 + 3 + 0 + 0 + 5.
    CHECK(variant.loss->count(layout) == (variant.label == "reuse" ? 12.0 : 14.0));
  }
}

TEST_CASE("an inconsistent layout is refused") {
  SequenceLayout comes_back{{1, 2, 1}, {1, 1, 1}};
  CHECK_THROWS_AS(LayoutTensors(comes_back, torch::kCPU), std::invalid_argument);
  SequenceLayout short_flags{{1, 1, 1}, {1, 1}};
  CHECK_THROWS_AS(LayoutTensors(short_flags, torch::kCPU), std::invalid_argument);
}

TEST_CASE("routing that does not fit the layout is refused by name") {
  const Sizes sizes;
  std::mt19937 random(3);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const std::string name(variant.loss->name());
    const RoutingTensors good = random_routing(random, sizes, layout.num_tokens());
    RoutingTensors bad = random_routing(random, sizes, layout.num_tokens() + 1);
    CHECK_THROWS_WITH(variant.loss->sum(bad, layout), Catch::StartsWith(name + ": logits must have 28 tokens"));
    bad = good;
    bad.logits_LTE = good.logits_LTE.detach().to(torch::kBFloat16);
    CHECK_THROWS_WITH(variant.loss->sum(bad, layout), Catch::Contains("float32 or float64, got BFloat16"));
    bad = good;
    bad.selected_LTK = good.selected_LTK.to(torch::kInt32);
    CHECK_THROWS_WITH(variant.loss->sum(bad, layout), Catch::Contains("selected must be int64"));
    bad = good;
    bad.selected_LTK = good.selected_LTK.narrow(1, 0, 5);
    CHECK_THROWS_AS(variant.loss->reference_sum(bad, layout), std::invalid_argument);
    bad = good;
    bad.reference_logits_LTE = torch::Tensor();
    if (variant.loss->needs_reference()) {
      CHECK_THROWS_WITH(variant.loss->sum(bad, layout),
                        Catch::Contains("reference logits") && Catch::Contains("got undefined"));
      CHECK_THROWS_AS(variant.loss->reference_sum(bad, layout), std::invalid_argument);
    } else {
      CHECK_NOTHROW(variant.loss->sum(bad, layout));
    }
  }
}
