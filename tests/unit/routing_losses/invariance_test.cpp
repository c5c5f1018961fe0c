#include <ATen/Parallel.h>
#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

RoutingTensors tokens_of(const RoutingTensors& routing, const torch::Tensor& indices) {
  RoutingTensors part;
  part.logits_LTE = routing.logits_LTE.detach().index_select(1, indices).requires_grad_(true);
  part.selected_LTK = routing.selected_LTK.index_select(1, indices);
  part.reference_logits_LTE = routing.reference_logits_LTE.index_select(1, indices);
  return part;
}

SequenceLayout layout_part(const SequenceLayout& layout, const SequenceRun& run) {
  SequenceLayout part;
  part.sequence_ids.assign(layout.sequence_ids.begin() + run.begin, layout.sequence_ids.begin() + run.end);
  part.counted.assign(layout.counted.begin() + run.begin, layout.counted.begin() + run.end);
  return part;
}

}  // namespace

TEST_CASE("renaming the experts renames the gradient and nothing else") {
  const Sizes sizes;
  std::mt19937 random(41);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  const torch::Tensor order = torch::tensor({4, 2, 6, 0, 5, 3, 1}, torch::kInt64);
  const torch::Tensor new_name = order.argsort();
  RoutingTensors renamed;
  renamed.logits_LTE = routing.logits_LTE.detach().index_select(2, order).requires_grad_(true);
  renamed.reference_logits_LTE = routing.reference_logits_LTE.index_select(2, order);
  renamed.selected_LTK = new_name.index_select(0, routing.selected_LTK.flatten()).view_as(routing.selected_LTK);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor sum = variant.loss->sum(routing, layout);
    const torch::Tensor renamed_sum = variant.loss->sum(renamed, layout);
    CHECK(relative_difference(renamed_sum, sum) < 1e-13);
    CHECK(relative_difference(gradient_of(renamed_sum, renamed), gradient_of(sum, routing).index_select(2, order)) <
          1e-12);
  }
}

TEST_CASE("the order in which a token's experts are listed does not matter") {
  const Sizes sizes;
  std::mt19937 random(42);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  RoutingTensors flipped = routing;
  flipped.selected_LTK = routing.selected_LTK.flip(2);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    CHECK(relative_difference(variant.loss->sum(flipped, layout), variant.loss->sum(routing, layout)) < 1e-13);
  }
}

TEST_CASE("packed sequences equal separate ones: state is reset, sums and counts add up over micro-batches") {
  const Sizes sizes;
  std::mt19937 random(43);
  const LayoutTensors layout(usual_layout(), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor packed = variant.loss->sum(routing, layout);
    const torch::Tensor packed_gradient = gradient_of(packed, routing);
    torch::Tensor sum = torch::zeros_like(packed).detach();
    torch::Tensor gradient = torch::zeros_like(packed_gradient);
    double count = 0.0;
    for (const SequenceRun& run : layout.runs()) {
      const LayoutTensors alone(layout_part(layout.layout(), run), torch::kCPU);
      const torch::Tensor indices = torch::arange(run.begin, run.end);
      const RoutingTensors part = tokens_of(routing, indices);
      const torch::Tensor part_sum = variant.loss->sum(part, alone);
      sum += part_sum.detach();
      gradient.index_copy_(1, indices, gradient_of(part_sum, part));
      count += variant.loss->count(alone);
    }
    CHECK(count == variant.loss->count(layout));
    if (variant.loss->name() == "load_balance") {
      // The one term that is not per sequence: splitting the batch must change it.
      CHECK(relative_difference(sum, packed) > 1e-3);
      continue;
    }
    CHECK(relative_difference(sum, packed) < 1e-13);
    CHECK(relative_difference(gradient, packed_gradient) < 1e-13);
  }
}

TEST_CASE("padding has no effect, whatever it holds") {
  const Sizes sizes;
  std::mt19937 random(44);
  const LayoutTensors padded(usual_layout(), torch::kCPU);
  RoutingTensors routing = random_routing(random, sizes, padded.num_tokens());
  SequenceLayout dense_layout;
  torch::Tensor is_padding = torch::ones({padded.num_tokens()}, torch::kBool);
  is_padding.index_fill_(0, padded.token_indices(), false);
  for (const SequenceRun& run : padded.runs()) {
    const SequenceLayout part = layout_part(padded.layout(), run);
    dense_layout.sequence_ids.insert(dense_layout.sequence_ids.end(), part.sequence_ids.begin(),
                                     part.sequence_ids.end());
    dense_layout.counted.insert(dense_layout.counted.end(), part.counted.begin(), part.counted.end());
  }
  const LayoutTensors dense(dense_layout, torch::kCPU);
  const RoutingTensors without = tokens_of(routing, padded.token_indices());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const torch::Tensor holes = is_padding.nonzero().flatten();
  REQUIRE(holes.numel() == 7);
  routing.logits_LTE = routing.logits_LTE.detach().index_fill(1, holes, nan).requires_grad_(true);
  routing.reference_logits_LTE = routing.reference_logits_LTE.index_fill(1, holes, nan);
  routing.selected_LTK = routing.selected_LTK.index_fill(1, holes, 99);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor sum = variant.loss->sum(routing, padded);
    const torch::Tensor expected = variant.loss->sum(without, dense);
    CHECK(relative_difference(sum, expected) < 1e-14);
    const torch::Tensor gradient = gradient_of(sum, routing);
    CHECK((gradient.index_select(1, holes) == 0.0).all().item<bool>());
    CHECK(relative_difference(gradient.index_select(1, padded.token_indices()), gradient_of(expected, without)) <
          1e-14);
  }
}

TEST_CASE("prompt tokens carry state but do not count") {
  const Sizes sizes;
  std::mt19937 random(45);
  const LayoutTensors layout(layout_of({{8, 4}, {5, 1}}), torch::kCPU);
  const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
  const torch::Tensor prompt = torch::tensor({0, 1, 2, 3, 8}, torch::kInt64);
  RoutingTensors other_logits = routing;
  other_logits.logits_LTE =
      routing.logits_LTE.detach().index_copy(1, prompt, random_normal(random, {2, 5, 7})).requires_grad_(true);
  RoutingTensors other_choice = routing;
  other_choice.selected_LTK = routing.selected_LTK.clone();
  other_choice.selected_LTK.select(1, 3).copy_((routing.selected_LTK.select(1, 3) + 1) % 7);
  for (const Variant& variant : every_variant(sizes)) {
    CAPTURE(variant.label);
    const torch::Tensor sum = variant.loss->sum(routing, layout);
    const torch::Tensor prompt_gradient = gradient_of(sum, routing).index_select(1, prompt);
    // Terms of two tokens see the prompt tokens that are near enough.
    const bool both_sides = pulls_both_sides(*variant.loss);
    CHECK(torch::equal(variant.loss->sum(other_logits, layout), sum) == !both_sides);
    const bool propagates = variant.label.find("propagate") != std::string::npos;
    CHECK((prompt_gradient.abs().max().item<double>() > 1e-4) == (propagates || both_sides));
    if (both_sides && variant.loss->name() != "lag") {
      CHECK((prompt_gradient.narrow(1, 0, 3) == 0.0).all().item<bool>());
      CHECK((prompt_gradient.narrow(1, 3, 2).abs().amax({0, 2}) > 1e-4).all().item<bool>());
    }
    const bool has_state = variant.loss->name() == "cache_simulation" || variant.loss->name() == "reuse";
    CHECK((relative_difference(variant.loss->sum(other_choice, layout), sum) > 1e-4) == has_state);
  }
}

TEST_CASE("the value does not depend on how many threads compute it") {
  const Sizes sizes{.num_layers = 3, .num_experts = 16, .top_k = 4};
  std::mt19937 random(46);
  const LayoutTensors layout(layout_of({{300, 20}, {200, 0}}), torch::kCPU);
  const RoutingTensors routing = converted(random_routing(random, sizes, 500), torch::kFloat32, torch::kCPU);
  const int threads = at::get_num_threads();
  for (const Variant& variant : every_variant(sizes)) {
    if (variant.loss->name() != "cache_simulation" && variant.loss->name() != "rank_matching") {
      continue;  // the others are tensor operations only
    }
    CAPTURE(variant.label);
    at::set_num_threads(1);
    const torch::Tensor one = variant.loss->sum(routing, layout);
    const torch::Tensor one_gradient = gradient_of(one, routing);
    at::set_num_threads(3);
    const torch::Tensor three = variant.loss->sum(routing, layout);
    CHECK(torch::equal(one, three));
    CHECK(torch::equal(one_gradient, gradient_of(three, routing)));
  }
  at::set_num_threads(threads);
}
