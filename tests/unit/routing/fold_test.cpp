#include "hestia/routing/fold.hpp"

#include <algorithm>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/routing/simulator.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_trace;
using testing::recorded_trace;
using testing::same_trace;
using testing::TraceShape;

const TraceEntry* entry_of(const RoutingTrace& trace, std::int64_t sequence, std::int64_t step, std::int64_t layer) {
  const auto found = std::find_if(trace.entries.begin(), trace.entries.end(), [&](const TraceEntry& entry) {
    return entry.sequence == sequence && entry.step == step && entry.layer == layer;
  });
  return found == trace.entries.end() ? nullptr : &*found;
}

TEST_CASE("a folded trace is the old one, layer by layer and expert by expert") {
  SplitMix64 random(501);
  TraceShape shape;
  shape.num_layers = 4;
  shape.skip = 0.2;
  RoutingTrace trace = random_trace(random, shape);
  trace.comment = "recorded on a rainy day";
  // Fewer and more layers, fewer and more experts, and the same.
  for (const RoutingShape onto :
       {RoutingShape{3, 5}, RoutingShape{4, 12}, RoutingShape{9, 7}, RoutingShape{1, 1}, RoutingShape{2, 40}}) {
    INFO(shape_text(onto));
    const FoldedTrace folded = fold_trace(trace, onto);
    CHECK(shape_of(folded.trace) == onto);
    CHECK(folded.from == RoutingShape{4, 12});
    CHECK(folded.trace.num_layers == onto.num_layers);
    CHECK(folded.trace.top_k == std::min<std::int64_t>(3, onto.num_experts));
    CHECK(folded.trace.residency.empty());
    std::size_t entries = 0;
    std::int64_t before = 0;
    std::int64_t after = 0;
    for (const TraceEntry& entry : trace.entries) {
      for (std::int64_t layer = 0; layer < onto.num_layers; ++layer) {
        if (trace.layers[static_cast<std::size_t>(layer % 4)].layer != entry.layer) {
          continue;
        }
        const TraceEntry* const at = entry_of(folded.trace, entry.sequence, entry.step, layer);
        REQUIRE(at != nullptr);
        CHECK(at->phase == entry.phase);
        std::vector<std::uint16_t> experts;
        std::vector<float> weights;
        for (std::size_t rank = 0; rank < entry.count; ++rank) {
          const auto expert = static_cast<std::uint16_t>(trace.experts_of(entry)[rank] % onto.num_experts);
          if (std::count(experts.begin(), experts.end(), expert) == 0) {
            experts.push_back(expert);
            weights.push_back(trace.weights_of(entry)[rank]);
          }
        }
        const auto got = folded.trace.experts_of(*at);
        const auto got_weights = folded.trace.weights_of(*at);
        CHECK(std::vector<std::uint16_t>(got.begin(), got.end()) == experts);
        CHECK(std::vector<float>(got_weights.begin(), got_weights.end()) == weights);
        before += entry.count;
        after += at->count;
        ++entries;
      }
    }
    CHECK(folded.trace.entries.size() == entries);
    CHECK(folded.requests_before == before);
    CHECK(folded.requests_after == after);
    for (const TraceLayer& layer : folded.trace.layers) {
      CHECK(layer.expert_bytes == 0);
      CHECK(layer.dense_bytes == 0);
    }
    CHECK(folded.trace.comment == trace.comment + "\nfolded " + folded.description());
    // Sound enough to be written and read again.
    const TemporaryFolder folder;
    write_trace_csv(folder.path() / "folded.csv", folded.trace);
    CHECK(same_trace(read_trace(folder.path() / "folded.csv"), folded.trace));
  }
}

TEST_CASE("the recorded trace folded onto 16 layers of 64 experts has the misses that decoders are measured at",
          "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  const FoldedTrace folded = fold_trace(read_trace(*path), {16, 64});
  CHECK_THAT(folded.description(), Catch::StartsWith("48x128 onto 16x64: layer l is l mod 48, expert e is e mod 64; "
                                                     "5.88 of 6.00 experts a step left"));
  for (const auto& [slots, misses] : {std::pair<std::int64_t, double>{16, 2.16}, {32, 0.89}}) {
    SimulationOptions options;
    options.slots = slots;
    const SimulationCounts counts = simulate(folded.trace, options);
    CHECK(counts.steps == 2048);
    CHECK(static_cast<double>(counts.loads) / static_cast<double>(counts.steps) == Approx(misses).margin(0.005));
  }
  SimulationOptions options;
  CHECK(simulate(folded.trace, options).loads == 4433);
  options.slots = 32;
  CHECK(simulate(folded.trace, options).loads == 1828);
}

TEST_CASE("a shape is LxE") {
  CHECK(shape_from_text("16x64", "--fold") == RoutingShape{16, 64});
  CHECK(shape_text({16, 64}) == "16x64");
  CHECK(shape_from_text("1x65536", "--fold").num_experts == 65536);
  for (const char* text : {"", "16", "16x", "x64", "16x64x8", "0x64", "16x0", "-1x4", "16x65537", "4097x64", "16 x 64",
                           "16X64", "99999999999999999999x1"}) {
    INFO(text);
    CHECK_THROWS_AS(shape_from_text(text, "--fold"), UsageError);
    CHECK_THROWS_WITH(shape_from_text(text, "--fold"),
                      Catch::Contains("--fold: must be LxE") && Catch::Contains(std::string("\"") + text + "\""));
  }
}

TEST_CASE("a trace of another shape is refused with the fold that would do") {
  SplitMix64 random(502);
  const RoutingTrace trace = random_trace(random, TraceShape{});
  CHECK_NOTHROW(check_trace_shape(trace, {2, 12}));
  CHECK_THROWS_AS(check_trace_shape(trace, {2, 13}), UsageError);
  CHECK_THROWS_WITH(check_trace_shape(trace, {3, 12}),
                    Catch::Contains("got 2 and 12") && Catch::Contains("--fold 3x12"));
  CHECK_NOTHROW(check_trace_shape(fold_trace(trace, {3, 13}).trace, {3, 13}));
  CHECK_THROWS_AS(fold_trace(trace, {0, 13}), UsageError);
  CHECK_THROWS_AS(fold_trace(RoutingTrace{}, {3, 13}), UsageError);
}

}  // namespace
}  // namespace hestia
