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
  CHECK(values(layout.pairs_per_run()) == Indices{2, 1, 0, 0});
  CHECK(values(layout.run_begins()) == Indices{1, 4, 7, 8});
  CHECK(values(layout.run_ends()) == Indices{4, 6, 8, 10});
  CHECK(values(layout.token_begins()) == Indices{0, 1, 1, 1, 4, 4, 0, 7, 8, 8});
  CHECK(values(layout.token_ends()) == Indices{0, 4, 4, 4, 6, 6, 0, 8, 10, 10});
  CHECK(values(layout.token_runs()) == Indices{-1, 0, 0, 0, 1, 1, -1, 2, 3, 3});
  CHECK(values(layout.counted().to(torch::kInt64)) == Indices{0, 0, 1, 1, 1, 1, 0, 1, 0, 0});
}

TEST_CASE("windows hold counted tokens only, start at the first of a sequence and may be short at its end") {
  // Counted: 2 .. 6 of the first sequence, none of the second, 11 and 12 of the third, 13 of the fourth.
  const LayoutTensors layout(layout_of({{7, 2}, {2, 2}, {1, 0, true}, {3, 1}, {1, 0}}), torch::kCPU);
  const WindowTensors& two = layout.windows(2);
  CHECK(values(two.window_of_token) == Indices{-1, -1, 0, 0, 1, 1, 2, -1, -1, -1, -1, 3, 3, 4});
  CHECK(values(two.begins) == Indices{2, 4, 6, 11, 13});
  CHECK(values(two.ends) == Indices{4, 6, 7, 13, 14});
  CHECK(values(two.lengths) == Indices{2, 2, 1, 2, 1});
  CHECK(values(layout.windows(1).lengths) == Indices(8, 1));
  const WindowTensors& large = layout.windows(1000);
  CHECK(values(large.window_of_token) == Indices{-1, -1, 0, 0, 0, 0, 0, -1, -1, -1, -1, 1, 1, 2});
  CHECK(values(large.lengths) == Indices{5, 2, 1});
  CHECK(&layout.windows(2) == &two);
  CHECK_THROWS_WITH(layout.windows(0), Catch::Contains("size must be at least 1, got 0"));
  // A turn that is not counted inside a sequence takes no place in a window.
  const LayoutTensors turns(SequenceLayout{{5, 5, 5, 5, 5, 5}, {0, 1, 0, 0, 1, 1}}, torch::kCPU);
  CHECK(values(turns.windows(2).window_of_token) == Indices{-1, 0, -1, -1, 0, 1});
  CHECK(values(turns.windows(2).begins) == Indices{1, 5});
  CHECK(values(turns.windows(2).ends) == Indices{5, 6});
  CHECK(values(turns.windows(2).lengths) == Indices{2, 1});
  const LayoutTensors nothing(layout_of({{3, 3}, {2, 0, true}}), torch::kCPU);
  CHECK(nothing.windows(4).lengths.numel() == 0);
}

TEST_CASE("counts depend on the layout alone") {
  const Sizes sizes;
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    // Counted: 4 + 4 + 0 + 1 + 5; pairs: 4 + 3 + 0 + 0 + 5.
    const bool of_pairs = variant.loss->name() == "reuse" || pulls_both_sides(*variant.loss);
    CHECK(variant.loss->count(layout) == (of_pairs ? 12.0 : 14.0));
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
