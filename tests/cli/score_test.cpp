#include <cmath>
#include <cstring>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia::testing {
namespace {

template <class Value>
std::span<const std::byte> bytes_of(const std::vector<Value>& values) {
  return std::as_bytes(std::span(values));
}

// Two layers, a prompt token and two decode steps of one sequence, one of another, padding; three experts, top 1.
// Layer 0 repeats expert 0 and layer 1 alternates 1, 2.
struct Dump {
  std::vector<double> logits = {2, 0, 0, 2, 0, 0, 2, 0, 0, 2, 0, 0, 9, 9, 9,   // layer 0
                                0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 9, 9, 9};  // layer 1
  std::vector<std::int64_t> ids = {4, 4, 4, 5, -1};
  std::vector<std::uint8_t> counted = {0, 1, 1, 1, 1};

  void write(const std::filesystem::path& path) const {
    SafetensorsWriter writer;
    writer.add("router_logits", DType::kF64, {2, 5, 3}, bytes_of(logits));
    writer.add("sequence_ids", DType::kI64, {5}, bytes_of(ids));
    writer.add("counted", DType::kU8, {5}, bytes_of(counted));
    writer.set_metadata("top_k", "1");
    writer.write(path);
  }
};

TEST_CASE("score prints one JSON object whose figures can be worked out by hand") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "dump.safetensors").string();
  Dump().write(path);
  const Json json = Json::parse(done(hestia({"score", path, "--slots", "1", "--policy", "lru,belady", "--json"})));
  CHECK(json.at("dtype") == "float64");
  CHECK(json.at("layers") == 2);
  CHECK(json.at("experts") == 3);
  CHECK(json.at("top_k") == 1);
  CHECK(json.at("sequences") == 2);
  CHECK(json.at("tokens") == 4);
  CHECK(json.at("counted_tokens") == 3);
  // Pairs (t, t-1) of decode steps: one per layer, a hit in layer 0 and a miss in layer 1.
  CHECK(json.at("metrics").at("eor").get<double>() == 0.5);
  CHECK(json.at("metrics").at("lru").at("requests") == 6);
  CHECK(json.at("metrics").at("lru").at("hits") == 1);
  CHECK(json.at("metrics").at("lru").at("loads") == 5);
  CHECK(json.at("metrics").at("belady").at("hits") == 1);
  // reuse: one pair of losses starts at the prompt: mean of p on the expert before, both pairs.
  const double p0 = std::exp(2.0) / (std::exp(2.0) + 2.0);
  const double q = 1.0 / (std::exp(1.0) + 2.0);
  const double expected = 0.5 * (-std::log(p0 + 1e-8) - std::log(q + 1e-8));
  CHECK(json.at("losses").at("reuse").get<double>() == Approx(expected).epsilon(1e-12));
  CHECK(json.at("losses").at("trust").is_null());
  CHECK(json.at("skipped").at("trust") == "needs base_router_logits");
}

TEST_CASE("score takes the options of a recipe and writes gradients") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "dump.safetensors").string();
  const std::string out = (folder.path() / "gradients.safetensors").string();
  Dump().write(path);
  const Outcome outcome = hestia({"score", path, "losses.cache_simulation.gamma=0.5", "losses.cache_simulation.slots=2",
                                  "--gradients", out, "--json"});
  const Json json = Json::parse(done(outcome));
  CHECK_THAT(outcome.err, Catch::Contains(out));
  CHECK(json.at("metrics").at("lru").at("slots") == 1);  // E/4, at least 1; the objective has its own
  // cache_simulation, C = 2: c_1 = 2/3 each; after r: n = .5 * 2/3 + r, mass 2, so c = 4/3 on the expert and 1/3
  // beside. Layer 0 counts t = 2, 3 of the first sequence and t = 1 of the second.
  const double c2 = 1.0 / 3.0 + 1.0;
  const double n3 = 0.5 * c2 + 1.0;
  const double layer0 = (1.0 - c2) + (1.0 - n3) + (1.0 - 2.0 / 3.0);
  // Layer 1: expert 2 was not used yet (1/3); then expert 1, which was at 4/3 before (2/3 now).
  const double layer1 = (1.0 - 1.0 / 3.0) + (1.0 - 2.0 / 3.0) + (1.0 - 2.0 / 3.0);
  CHECK(json.at("losses").at("cache_simulation").get<double>() == Approx((layer0 + layer1) / 2 / 3).epsilon(1e-12));
  const SafetensorsFile file(out);
  CHECK(file.metadata().at("hestia_format") == "routing_gradients 1");
  REQUIRE(file.contains("grad.cache_simulation"));
  CHECK(!file.contains("grad.trust"));
  const TensorView& view = file.tensor("grad.cache_simulation");
  CHECK(view.dtype == DType::kF64);
  CHECK(view.shape == std::vector<std::int64_t>{2, 5, 3});
  std::vector<double> gradient(30);
  std::memcpy(gradient.data(), view.bytes.data(), view.bytes.size());
  // -p_j (c_j - sum_i p_i c_i) / (L T) at layer 0, t = 2; none at the prompt and at padding.
  const double p0 = std::exp(2.0) / (std::exp(2.0) + 2.0);
  const double mean = p0 * c2 + (1.0 - p0) / 3.0;
  CHECK(gradient[3] == Approx(-p0 * (c2 - mean) / 6.0).epsilon(1e-12));
  for (const std::size_t index : {0U, 1U, 2U, 12U, 13U, 14U, 27U}) {
    CHECK(gradient[index] == 0.0);
  }
}

TEST_CASE("score prints a table") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "dump.safetensors").string();
  Dump().write(path);
  const std::string table = done(hestia({"score", path}));
  CHECK_THAT(table, Catch::Contains("2 MoE layers, 3 experts, top 1, float64") &&
                        Catch::Contains("needs base_router_logits") && Catch::Contains("expert overlap") &&
                        Catch::Contains("\nlru "));
}

TEST_CASE("score refuses what it cannot read and options that do not exist") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "dump.safetensors").string();
  Dump dump;
  dump.write(path);
  check_complaint(hestia({"score", path, "losses.reus.weight=1"}), 2,
                  {"unknown key \"losses.reus.weight\"", "did you mean \"losses.reuse.weight\"?"});
  check_complaint(hestia({"score", path, "losses.cache_simulation.gamma=2", "slots=4"}), 2,
                  {"losses.cache_simulation.gamma must be between 0 and 1, got 2", "unknown key \"slots\""});
  check_complaint(hestia({"score", path, "losses.cache_simulation.slots=9"}), 2, {"3 experts", "got 9"});
  check_complaint(hestia({"score", path, "--slots", "9"}), 2, {"--slots", "3 experts", "got 9"});
  check_complaint(hestia({"score", path, "--slots", "0"}), 2, {"--slots"});
  check_complaint(hestia({"score", path, "--policy", "lrv"}), 2, {"lrv", "lru"});
  check_complaint(hestia({"score", path, "--top-k", "4"}), 3, {path, "--top-k", "got 4"});
  check_complaint(hestia({"score", (folder.path() / "absent").string()}), 3, {"absent"});
  const std::string gradients = (folder.path() / "no" / "such" / "folder.safetensors").string();
  check_complaint(hestia({"score", path, "--gradients", gradients, "--json"}), 1, {"no/such"});
  dump.logits[7] = std::nan("");
  dump.write(path);
  check_complaint(hestia({"score", path}), 3, {path, "must be finite", "layer 0, token 2, expert 1"});
  write_text_atomically(path, read_text_file(path).substr(0, 90));
  check_complaint(hestia({"score", path}), 3, {path});
}

}  // namespace
}  // namespace hestia::testing
