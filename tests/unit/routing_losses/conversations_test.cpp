#include <catch2/catch.hpp>

#include "loss_fixtures.hpp"

namespace hestia::testing {
namespace {

// Conversations: prompt comes back between counted stretches, also at a sequence's end, and padding lies between.
SequenceLayout random_conversations(std::mt19937& random) {
  SequenceLayout layout;
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const auto append = [&](std::int64_t id, int length, std::uint8_t counted) {
    layout.sequence_ids.insert(layout.sequence_ids.end(), static_cast<std::size_t>(length), id);
    layout.counted.insert(layout.counted.end(), static_cast<std::size_t>(length), counted);
  };
  for (std::int64_t id = 0; id < 4; ++id) {
    const int turns = draw(2, 4);
    for (int turn = 0; turn < turns; ++turn) {
      append(id, draw(turn == 0 ? 0 : 1, 4), 0);
      append(id, draw(1, 5), 1);
    }
    append(id, draw(0, 2), 0);
    append(-1, draw(0, 3), 1);
  }
  return layout;
}

TEST_CASE("every objective agrees with its plain loop on conversations of several turns") {
  std::mt19937 random(91);
  const Sizes sizes;
  for (int round = 0; round < 12; ++round) {
    const SequenceLayout layout = random_conversations(random);
    const LayoutTensors tensors(layout, torch::kCPU);
    const RoutingTensors routing = random_routing(random, sizes, layout.num_tokens());
    for (const Variant& variant : every_variant(sizes)) {
      INFO(variant.label);
      const torch::Tensor sum = variant.loss->sum(routing, tensors);
      const torch::Tensor reference = variant.loss->reference_sum(routing, tensors);
      CHECK(relative_difference(sum, reference) < 1e-10);
      CHECK(relative_difference(gradient_of(sum, routing), gradient_of(reference, routing)) < 1e-9);
    }
  }
}

TEST_CASE("a later question changes an objective through what is remembered of it, and is not counted itself") {
  std::mt19937 random(92);
  const Sizes sizes;
  // One sequence: question, answer, question, answer.
  SequenceLayout layout;
  layout.sequence_ids.assign(12, 5);
  layout.counted = {0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1};
  const LayoutTensors tensors(layout, torch::kCPU);
  CHECK(tensors.num_counted() == 7);
  const RoutingTensors routing = random_routing(random, sizes, 12);
  for (const Variant& variant : every_variant(sizes)) {
    INFO(variant.label);
    CHECK(variant.loss->count(tensors) == 7.0);
    const bool propagates = variant.label.find("propagate") != std::string::npos;
    const torch::Tensor gradient = gradient_of(variant.loss->sum(routing, tensors), routing);
    for (std::int64_t t = 0; t < 12; ++t) {
      if (layout.counted[static_cast<std::size_t>(t)] == 0 && !pulls_both_sides(*variant.loss) && !propagates) {
        CHECK(gradient.select(1, t).abs().max().item<double>() == 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace hestia::testing
