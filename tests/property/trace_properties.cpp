#include "hestia/routing/trace.hpp"

#include <cmath>
#include <fstream>
#include <limits>
#include <numeric>
#include <sstream>

#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "hestia/routing/simulator.hpp"
#include "random_cases.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using namespace testing;

// Any finite float: all exponents, both signs, zero and subnormals among them.
float any_weight(SplitMix64& random) {
  if (chance(random, 0.05)) {
    return 0.0F;
  }
  const double scale = std::pow(2.0, static_cast<double>(between(random, -149, 126)));
  return static_cast<float>((random.uniform() - 0.3) * scale);
}

std::string any_text(SplitMix64& random) {
  const std::string letters = "abz 019=,#/.-_";
  std::string text;
  for (std::int64_t i = between(random, 0, 20); i > 0; --i) {
    text += letters[random.below(letters.size())];
  }
  return text;
}

// Headers, weights and the recorder's view drawn at random.
RoutingTrace decorated(SplitMix64& random, RoutingTrace trace) {
  trace.model = "models/number " + std::to_string(random.below(100));
  for (std::int64_t i = between(random, 0, 3); i > 0; --i) {
    trace.comment += (trace.comment.empty() ? "note: " : "\nnote: ") + any_text(random);
  }
  for (TraceLayer& layer : trace.layers) {
    // 0 is "not known", and then the rows decide: unless they say nothing either, the trace would come back richer.
    layer.expert_bytes = between(random, 1, 1'000'000'000'000);
    layer.dense_bytes = chance(random, 0.3) ? 0 : between(random, 1, 1'000'000);
  }
  if (chance(random, 0.4)) {
    for (TraceLayer& layer : trace.layers) {
      layer.preload = random_experts(random, trace.num_experts, between(random, 1, trace.num_experts));
    }
  }
  for (float& weight : trace.weights) {
    weight = any_weight(random);
  }
  if (chance(random, 0.5) && !trace.experts.empty()) {
    for (std::size_t i = 0; i < trace.experts.size(); ++i) {
      trace.residency.push_back(static_cast<std::uint8_t>(random.below(2)));
      trace.moved_bytes.push_back(chance(random, 0.5) ? 0 : between(random, 1, 5000));
    }
    trace.residency.back() = 1;  // A record that says nothing is dropped on reading.
  }
  return trace;
}

std::vector<SimulationCounts> counts_of(const RoutingTrace& trace) {
  SimulationOptions options;
  options.slots = 3;
  options.include_prefill = true;
  return simulate_per_layer(trace, options);
}

bool same_loads(const RoutingTrace& a, const RoutingTrace& b) {
  const std::vector<SimulationCounts> first = counts_of(a);
  const std::vector<SimulationCounts> second = counts_of(b);
  return std::equal(first.begin(), first.end(), second.begin(), second.end(),
                    [](const SimulationCounts& x, const SimulationCounts& y) {
                      return x.loads == y.loads && x.requests == y.requests && x.load_bytes == y.load_bytes;
                    });
}

TEST_CASE("property: a CSV trace that is read and written again has the same bytes and means the same") {
  const TemporaryFolder folder;
  set_log_level(LogLevel::kError);  // some traces end in a short step, which is worth a warning elsewhere
  for_cases(60, 20000, [&](SplitMix64& random) {
    const RoutingTrace trace = decorated(random, any_trace(random));
    write_trace_csv(folder.path() / "one.csv", trace);
    const RoutingTrace back = read_trace(folder.path() / "one.csv");
    CHECK(same_trace(back, trace));
    CHECK(same_loads(back, trace));
    write_trace_csv(folder.path() / "two.csv", back);
    CHECK(read_text_file(folder.path() / "one.csv") == read_text_file(folder.path() / "two.csv"));
  });
}

TEST_CASE("property: rows of a turn may stand layer by layer, and those of a step by any slot first") {
  const TemporaryFolder folder;
  set_log_level(LogLevel::kError);
  for_cases(40, 21000, [&](SplitMix64& random) {
    const RoutingTrace trace = decorated(random, any_trace(random));
    write_trace_csv(folder.path() / "in_order.csv", trace);
    std::istringstream text(read_text_file(folder.path() / "in_order.csv"));
    std::string header;
    std::string line;
    while (std::getline(text, line) && line.rfind("turn,", 0) != 0) {
      header += line + "\n";
    }
    header += line + "\n";
    std::vector<std::vector<std::string>> rows_of_entry;
    for (const TraceEntry& entry : trace.entries) {
      std::vector<std::string> rows(entry.count);
      for (std::string& row : rows) {
        REQUIRE(std::getline(text, row));
      }
      for (std::size_t i = rows.size(); i > 1; --i) {
        std::swap(rows[i - 1], rows[random.below(i)]);
      }
      rows_of_entry.push_back(std::move(rows));
    }
    std::vector<std::size_t> order(trace.entries.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      const TraceEntry& x = trace.entries[a];
      const TraceEntry& y = trace.entries[b];
      return x.sequence != y.sequence ? x.sequence < y.sequence : x.layer < y.layer;
    });
    {
      std::ofstream out(folder.path() / "shuffled.csv", std::ios::binary);
      out << header;
      for (const std::size_t i : order) {
        for (const std::string& row : rows_of_entry[i]) {
          out << row << '\n';
        }
      }
    }
    CHECK(same_trace(read_trace(folder.path() / "shuffled.csv"), trace));
  });
}

TEST_CASE("property: the packed form gives back what it was given, weights to half precision") {
  const TemporaryFolder folder;
  for_cases(40, 22000, [&](SplitMix64& random) {
    TraceShape shape = random_shape(random);
    shape.skip = 0.0;
    RoutingTrace trace = decorated(random, random_trace(random, shape));
    for (float& weight : trace.weights) {
      weight = static_cast<float>(random.uniform() - 0.3);
    }
    write_trace_hdf5(folder.path() / "one.h5", trace);
    const RoutingTrace once = read_trace(folder.path() / "one.h5");
    REQUIRE(once.weights.size() == trace.weights.size());
    for (std::size_t i = 0; i < trace.weights.size(); ++i) {
      // 11 bits, or steps of 2^-24 below the smallest normal number.
      const float error = std::abs(once.weights[i] - trace.weights[i]);
      CHECK(error <= std::max(std::ldexp(std::abs(trace.weights[i]), -11), std::ldexp(1.0F, -25)));
    }
    CHECK(same_loads(once, trace));
    trace.weights = once.weights;
    CHECK(same_trace(once, trace));
    // Half-precision weights survive a second writing, and a detour through CSV.
    write_trace_hdf5(folder.path() / "two.h5", once);
    CHECK(same_trace(read_trace(folder.path() / "two.h5"), trace));
    write_trace_csv(folder.path() / "detour.csv", once);
    CHECK(same_trace(read_trace(folder.path() / "detour.csv"), trace));
  });
}

}  // namespace
}  // namespace hestia
