#include <cmath>
#include <cstring>
#include <numeric>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia::testing {
namespace {

const std::string kSmallModel = HESTIA_SOURCE_DIR "/tests/parity/goldens/hub_plain";

template <class Value>
std::vector<Value> values_of(const TensorView& view) {
  std::vector<Value> values(static_cast<std::size_t>(view.num_elements()));
  REQUIRE(view.bytes.size() == values.size() * sizeof(Value));
  std::memcpy(values.data(), view.bytes.data(), view.bytes.size());
  return values;
}

using Shape = std::vector<std::int64_t>;

TEST_CASE("logits writes logits, router logits and selected experts of the shipped model") {
  const TemporaryFolder folder;
  const std::string output = (folder.path() / "out.safetensors").string();
  const Outcome outcome = hestia({"logits", "checkpoints/tiny", "--tokens", "1,2,3,500,4095", "--output", output});
  CHECK(done(outcome).empty());
  CHECK_THAT(outcome.err, Catch::Contains(output));
  const SafetensorsFile file(output);
  CHECK(file.names().size() == 4);
  CHECK(file.tensor("tokens").dtype == DType::kI64);
  CHECK(values_of<std::int64_t>(file.tensor("tokens")) == std::vector<std::int64_t>{1, 2, 3, 500, 4095});
  CHECK(file.tensor("logits").dtype == DType::kF32);
  CHECK(file.tensor("logits").shape == Shape{5, 4096});
  CHECK(file.tensor("router_logits").dtype == DType::kF32);
  CHECK(file.tensor("router_logits").shape == Shape{6, 5, 32});
  CHECK(file.tensor("selected").dtype == DType::kI64);
  CHECK(file.tensor("selected").shape == Shape{6, 5, 4});
  for (const float value : values_of<float>(file.tensor("logits"))) {
    if (!std::isfinite(value)) {
      FAIL("a logit is not finite");
    }
  }
  // The experts of every token are the best of its router logits, best first.
  const std::vector<float> router = values_of<float>(file.tensor("router_logits"));
  const std::vector<std::int64_t> selected = values_of<std::int64_t>(file.tensor("selected"));
  for (std::size_t token = 0; token < 6 * 5; ++token) {
    std::vector<std::int64_t> order(32);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return router[token * 32 + static_cast<std::size_t>(a)] > router[token * 32 + static_cast<std::size_t>(b)];
    });
    order.resize(4);
    const auto begin = selected.begin() + static_cast<std::ptrdiff_t>(token * 4);
    CHECK(std::vector<std::int64_t>(begin, begin + 4) == order);
  }
}

TEST_CASE("logits of a small model are transformers' and do not look ahead") {
  const TemporaryFolder folder;
  const SafetensorsFile golden(kSmallModel + "/golden.safetensors");
  std::string tokens;
  std::string first_three;
  for (const std::int64_t token : values_of<std::int64_t>(golden.tensor("tokens"))) {
    tokens += (tokens.empty() ? "" : ",") + std::to_string(token);
    if (std::count(tokens.begin(), tokens.end(), ',') == 2) {
      first_three = tokens;
    }
  }
  const auto logits = [&](const std::string& list, const std::vector<std::string>& more = {}) {
    const std::string output = (folder.path() / "out.safetensors").string();
    std::vector<std::string> arguments = {"logits", kSmallModel, "--tokens", list, "--output", output};
    arguments.insert(arguments.end(), more.begin(), more.end());
    done(hestia(arguments));
    const SafetensorsFile file(output);
    CHECK(file.tensor("logits").dtype == DType::kF32);
    return values_of<float>(file.tensor("logits"));
  };
  const std::vector<float> expected = values_of<float>(golden.tensor("logits"));
  const std::vector<float> got = logits(tokens);
  REQUIRE(got.size() == expected.size());
  float scale = 0.0F;
  for (const float value : expected) {
    scale = std::max(scale, std::abs(value));
  }
  for (std::size_t i = 0; i < got.size(); ++i) {
    CHECK(std::abs(got[i] - expected[i]) <= 1e-4F * scale);
  }
  const std::vector<float> prefix = logits(first_three);
  REQUIRE(prefix.size() < got.size());
  for (std::size_t i = 0; i < prefix.size(); ++i) {
    CHECK(std::abs(got[i] - prefix[i]) <= 1e-5F * scale);
  }
  // Narrower arithmetic: near, but not the same.
  const std::vector<float> rounded = logits(tokens, {"--dtype", "bfloat16"});
  REQUIRE(rounded.size() == got.size());
  CHECK(rounded != got);
  double difference = 0.0;
  double square = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(rounded[i] - got[i]), 2);
    square += std::pow(static_cast<double>(got[i]), 2);
  }
  CHECK(difference / square < 1e-2);
}

TEST_CASE("logits names a wrong token, dtype, device or place") {
  const TemporaryFolder folder;
  const std::string output = (folder.path() / "out.safetensors").string();
  const auto logits = [&](const std::string& model, const std::string& tokens,
                          const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {"logits", model, "--tokens", tokens, "--output", output};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return hestia(arguments);
  };
  check_complaint(logits("checkpoints/tiny", "1,4096"), 2, {"between 0 and 4095", "checkpoints/tiny", "got 4096"});
  check_complaint(logits("checkpoints/tiny", "-1"), 2, {"between 0 and 4095", "got -1"});
  check_complaint(logits("checkpoints/tiny", "1,x"), 2, {"--tokens", "\"1,x\"", "1,2,3"});
  check_complaint(logits("checkpoints/tiny", "99999999999999999999"), 2, {"--tokens", "99999999999999999999"});
  check_complaint(logits(kSmallModel, "1", {"--dtype", "float8"}), 2, {"float8", "float32"});
  check_complaint(logits(kSmallModel, "1", {"--device", "cuda"}), 2, {"cuda"});
  check_complaint(logits("models/absent", "1"), 3, {"models/absent"});
  check_complaint(logits(folder.path().string(), "1"), 3, {"config.json"});
  CHECK_FALSE(std::filesystem::exists(output));
  check_complaint(hestia({"logits", kSmallModel, "--tokens", "1", "--output", "/absent/out.safetensors"}), 1,
                  {"/absent/out.safetensors", "cannot be written"});
}

}  // namespace
}  // namespace hestia::testing
