#include "hestia/kernels/soft_cache.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"

using namespace hestia;

namespace {

struct Scan {
  SoftCacheShape shape;
  std::vector<std::int64_t> selected;
  std::vector<std::int64_t> begins;
  std::vector<std::int64_t> ends;
};

Scan random_scan(unsigned seed, SoftCacheStart start, double gamma) {
  Scan scan;
  scan.shape = {
      .num_layers = 3, .num_tokens = 70, .num_experts = 11, .top_k = 3, .slots = 4.0, .gamma = gamma, .start = start};
  scan.begins = {2, 30, 31};
  scan.ends = {27, 31, 70};
  std::mt19937 random(seed);
  std::vector<std::int64_t> experts(static_cast<std::size_t>(scan.shape.num_experts));
  std::iota(experts.begin(), experts.end(), 0);
  for (std::int64_t i = 0; i < scan.shape.num_layers * scan.shape.num_tokens; ++i) {
    std::shuffle(experts.begin(), experts.end(), random);
    scan.selected.insert(scan.selected.end(), experts.begin(), experts.begin() + scan.shape.top_k);
  }
  return scan;
}

/// The recursion as MELINOE writes it, with the normaliser Z (uniform start), or on counts whose norm is summed
/// (empty).
std::vector<double> paper_form(const Scan& scan) {
  const SoftCacheShape& shape = scan.shape;
  const auto experts = static_cast<std::size_t>(shape.num_experts);
  std::vector<double> result(static_cast<std::size_t>(shape.num_layers * shape.num_tokens) * experts, -7.0);
  for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (std::size_t run = 0; run < scan.begins.size(); ++run) {
      const bool empty = shape.start == SoftCacheStart::kEmpty;
      std::vector<double> state(experts, empty ? 0.0 : shape.slots / static_cast<double>(experts));
      double z = 1.0;
      for (std::int64_t token = scan.begins[run]; token < scan.ends[run]; ++token) {
        const auto position = static_cast<std::size_t>(layer * shape.num_tokens + token);
        const double norm = std::accumulate(state.begin(), state.end(), 0.0);
        for (std::size_t e = 0; e < experts; ++e) {
          result[position * experts + e] = empty ? state[e] / std::max(1.0, norm / shape.slots) : state[e];
        }
        const double next_z = shape.gamma * z + static_cast<double>(shape.top_k) / shape.slots;
        for (std::size_t e = 0; e < experts; ++e) {
          const auto chosen = scan.selected.begin() + static_cast<std::ptrdiff_t>(position) * shape.top_k;
          const double r = std::count(chosen, chosen + shape.top_k, static_cast<std::int64_t>(e)) > 0 ? 1.0 : 0.0;
          state[e] = empty ? shape.gamma * state[e] + r : (shape.gamma * z * state[e] + r) / next_z;
        }
        z = next_z;
      }
    }
  }
  return result;
}

template <class Real>
std::vector<Real> run_cpu(const Scan& scan) {
  std::vector<Real> cache(
      static_cast<std::size_t>(scan.shape.num_layers * scan.shape.num_tokens * scan.shape.num_experts), Real(-7));
  soft_cache_cpu(scan.shape, scan.selected.data(), scan.begins.data(), scan.ends.data(),
                 static_cast<std::int64_t>(scan.begins.size()), cache.data());
  return cache;
}

template <class A, class B>
double largest_difference(const std::vector<A>& a, const std::vector<B>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return largest;
}

}  // namespace

TEST_CASE("the scan equals the paper's recursion, and tokens outside the runs are left alone") {
  const double gamma = GENERATE(0.0, 0.5, 0.9, 0.999999, 1.0);
  const auto start = GENERATE(SoftCacheStart::kUniform, SoftCacheStart::kEmpty);
  const Scan scan = random_scan(11, start, gamma);
  const std::vector<double> expected = paper_form(scan);
  CAPTURE(gamma, static_cast<int>(start));
  CHECK(largest_difference(run_cpu<double>(scan), expected) < 1e-13);
  CHECK(largest_difference(run_cpu<float>(scan), expected) < 2e-6);
}

TEST_CASE("the scale knows the mass without a sum, near gamma 1 too") {
  for (const double gamma : {0.0, 0.3, 0.9, 1.0 - 1e-9, 1.0 - 1e-14, 1.0}) {
    const SoftCacheShape uniform{.num_experts = 8, .top_k = 2, .slots = 3.0, .gamma = gamma};
    const SoftCacheShape empty{
        .num_experts = 8, .top_k = 2, .slots = 3.0, .gamma = gamma, .start = SoftCacheStart::kEmpty};
    long double mass = 3.0L;
    long double added = 0.0L;
    for (std::int64_t steps = 0; steps < 300; ++steps) {
      CAPTURE(gamma, steps);
      CHECK(soft_cache_scale(uniform, steps) == Approx(static_cast<double>(3.0L / mass)).epsilon(1e-13));
      CHECK(soft_cache_scale(empty, steps) ==
            Approx(1.0 / std::max(1.0, static_cast<double>(added) / 3.0)).epsilon(1e-13));
      mass = mass * static_cast<long double>(gamma) + 2.0L;
      added = added * static_cast<long double>(gamma) + 2.0L;
    }
  }
}

TEST_CASE("a uniform start always holds exactly C, an empty one never more") {
  for (const auto start : {SoftCacheStart::kUniform, SoftCacheStart::kEmpty}) {
    const Scan scan = random_scan(12, start, 0.9);
    const std::vector<double> cache = run_cpu<double>(scan);
    double smallest = 1e9;
    double largest = 0.0;
    for (std::size_t run = 0; run < scan.begins.size(); ++run) {
      for (std::int64_t token = scan.begins[run]; token < scan.ends[run]; ++token) {
        const auto row = cache.begin() + token * scan.shape.num_experts;
        const double mass = std::accumulate(row, row + scan.shape.num_experts, 0.0);
        smallest = std::min(smallest, mass);
        largest = std::max(largest, mass);
      }
    }
    CHECK(largest == Approx(4.0).epsilon(1e-13));
    CHECK(smallest == Approx(start == SoftCacheStart::kUniform ? 4.0 : 0.0).margin(1e-13));
  }
}

TEST_CASE("an empty cache of many slots never fills") {
  Scan scan = random_scan(13, SoftCacheStart::kEmpty, 0.5);
  scan.shape.slots = 6.0;  // K / (1 - gamma)
  const std::vector<double> cache = run_cpu<double>(scan);
  const auto last = cache.begin() + (scan.ends.back() - 1) * scan.shape.num_experts;
  CHECK(std::accumulate(last, last + scan.shape.num_experts, 0.0) < 6.0);
}

TEST_CASE("the adjoint is the transpose of the scan") {
  // c(r) is affine: <w, c(r + d) - c(r)> must equal <adjoint(w), d> for any d that keeps K per token.
  const auto start = GENERATE(SoftCacheStart::kUniform, SoftCacheStart::kEmpty);
  const double gamma = GENERATE(0.0, 0.8, 1.0);
  const Scan scan = random_scan(14, start, gamma);
  Scan other = random_scan(15, start, gamma);
  std::mt19937 random(16);
  std::normal_distribution<double> normal;
  const std::vector<double> cache = run_cpu<double>(scan);
  const std::vector<double> other_cache = run_cpu<double>(other);
  std::vector<double> weights(cache.size());
  std::generate(weights.begin(), weights.end(), [&] { return normal(random); });
  double expected = 0.0;
  for (std::size_t i = 0; i < cache.size(); ++i) {
    expected += weights[i] * (other_cache[i] - cache[i]);
  }
  std::vector<double> adjoint = weights;
  soft_cache_adjoint_cpu(scan.shape, scan.begins.data(), scan.ends.data(), 3, adjoint.data());
  double got = 0.0;
  std::size_t untouched = 0;
  for (std::int64_t position = 0; position < scan.shape.num_layers * scan.shape.num_tokens; ++position) {
    const std::int64_t token = position % scan.shape.num_tokens;
    if (token < 2 || (token >= 27 && token < 30)) {
      for (std::int64_t e = 0; e < scan.shape.num_experts; ++e) {
        const auto i = static_cast<std::size_t>(position * scan.shape.num_experts + e);
        untouched += adjoint[i] == weights[i] ? 1U : 0U;
      }
      continue;
    }
    for (std::int64_t k = 0; k < scan.shape.top_k; ++k) {
      const auto i = static_cast<std::size_t>(position * scan.shape.top_k + k);
      const auto row = static_cast<std::size_t>(position * scan.shape.num_experts);
      got += adjoint[row + static_cast<std::size_t>(other.selected[i])];
      got -= adjoint[row + static_cast<std::size_t>(scan.selected[i])];
    }
  }
  CHECK(got == Approx(expected).epsilon(1e-11));
  CHECK(untouched == 3U * 5U * 11U);
}

TEST_CASE("float32 holds its mass over thousands of tokens") {
  Scan scan;
  scan.shape = {.num_layers = 1, .num_tokens = 4096, .num_experts = 64, .top_k = 8, .slots = 16.0, .gamma = 0.9};
  scan.begins = {0};
  scan.ends = {4096};
  std::mt19937 random(17);
  std::vector<std::int64_t> experts(64);
  std::iota(experts.begin(), experts.end(), 0);
  for (int token = 0; token < 4096; ++token) {
    std::shuffle(experts.begin(), experts.end(), random);
    scan.selected.insert(scan.selected.end(), experts.begin(), experts.begin() + 8);
  }
  const std::vector<float> cache = run_cpu<float>(scan);
  CHECK(largest_difference(cache, run_cpu<double>(scan)) < 2e-6);
  const auto last = cache.end() - 64;
  CHECK(std::accumulate(last, cache.end(), 0.0) == Approx(16.0).epsilon(1e-6));
}

TEST_CASE("an expert out of range is refused with its place, but only inside a run") {
  Scan scan = random_scan(18, SoftCacheStart::kUniform, 0.9);
  scan.selected[0] = 999;  // token 0 is padding
  CHECK_NOTHROW(run_cpu<float>(scan));
  scan.selected[static_cast<std::size_t>((1 * 70 + 5) * 3 + 2)] = 11;
  CHECK_THROWS_WITH(run_cpu<float>(scan), Catch::Contains("between 0 and 10, got 11 at layer 1, token 5"));
  scan.selected[static_cast<std::size_t>((1 * 70 + 5) * 3 + 2)] = -1;
  CHECK_THROWS_AS(run_cpu<float>(scan), std::invalid_argument);
}

TEST_CASE("a build without CUDA kernels refuses the GPU scan with the way out") {
  if (has_cuda_kernels()) {
    SUCCEED("this build has CUDA kernels");
    return;
  }
  const Scan scan = random_scan(19, SoftCacheStart::kUniform, 0.9);
  float cache = 0.0F;
  CHECK_THROWS_AS(
      soft_cache_cuda(scan.shape, scan.selected.data(), scan.begins.data(), scan.ends.data(), 3, &cache, nullptr),
      RunError);
  CHECK_THROWS_WITH(soft_cache_adjoint_cuda(scan.shape, scan.begins.data(), scan.ends.data(), 3, &cache, nullptr),
                    Catch::Contains("HESTIA_CUDA=ON"));
}
