#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>

#include <ATen/Parallel.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/evaluation/comparison.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_data;
using hestia::testing::tiny_model;

namespace {

// Two threads only wait for each other on matrices this small.
MoeModel small_model(torch::Dtype dtype = torch::kFloat32) {
  at::set_num_threads(1);
  return tiny_model(3, dtype);
}

// Experts of one step, best first.
using Step = std::vector<int>;

// One sequence run alone: its loss, and what each layer served for its completion tokens.
struct Alone {
  double nll = 0.0;
  std::int64_t labels = 0;
  std::vector<std::vector<Step>> steps;  // [layer][completion token]
};

Alone run_alone(MoeModel& model, const TokenSequence& sequence) {
  const torch::NoGradGuard no_grad;
  const auto length = static_cast<std::int64_t>(sequence.tokens.size());
  const torch::Tensor ids =
      torch::tensor(std::vector<std::int64_t>(sequence.tokens.begin(), sequence.tokens.end())).unsqueeze(0);
  const ModelOutput output =
      model->forward({ids, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64)});
  const torch::Tensor log_p =
      torch::log_softmax(model->head(output.hidden_BSD)[0].to(torch::kFloat64), -1).to(torch::kCPU);
  Alone alone;
  for (std::int64_t t = 0; t + 1 < length; ++t) {
    if (t + 1 >= sequence.num_prompt_tokens) {
      alone.nll -= log_p[t][sequence.tokens[static_cast<std::size_t>(t + 1)]].item<double>();
      alone.labels += 1;
    }
  }
  for (const RoutingRecord& record : output.routing) {
    std::vector<Step> steps;
    for (std::int64_t t = sequence.num_prompt_tokens; t < length; ++t) {
      Step step;
      for (std::int64_t k = 0; k < record.selected_TK.size(1); ++k) {
        step.push_back(record.selected_TK[t][k].item<int>());
      }
      steps.push_back(step);
    }
    alone.steps.push_back(steps);
  }
  return alone;
}

bool holds(const std::vector<int>& set, int expert) {
  return std::find(set.begin(), set.end(), expert) != set.end();
}

// How many steps from `now` on until `expert` is asked for again; past the end when it is not.
std::size_t distance(const std::vector<Step>& steps, std::size_t now, int expert) {
  std::size_t later = now + 1;
  while (later < steps.size() && !holds(steps[later], expert)) {
    ++later;
  }
  return later;
}

struct Counts {
  std::int64_t requests = 0;
  std::int64_t hits = 0;
  std::int64_t evictions = 0;
};

// A slot cache as docs/routing.md tells it, with nothing clever: victims are looked for one by one.
void serve(const std::vector<Step>& steps, const std::string& policy, std::size_t slots, Counts& counts) {
  std::vector<int> resident;
  std::map<int, std::int64_t> touched;
  std::map<int, std::int64_t> uses;
  std::int64_t clock = 0;
  for (std::size_t now = 0; now < steps.size(); ++now) {
    const Step& step = steps[now];
    for (const int expert : step) {
      counts.requests += 1;
      counts.hits += holds(resident, expert) ? 1 : 0;
    }
    for (std::size_t rank = step.size(); rank-- > 0;) {
      touched[step[rank]] = clock++;
      uses[step[rank]] += 1;
      if (!holds(resident, step[rank])) {
        resident.push_back(step[rank]);
      }
    }
    while (resident.size() > slots) {
      int victim = -1;
      for (const int expert : resident) {
        if (step.size() <= slots && holds(step, expert)) {
          continue;
        }
        const auto worse = [&](int a, int b) {
          if (policy == "lru") {
            return touched[a] < touched[b];
          }
          if (policy == "lfu") {
            return uses[a] != uses[b] ? uses[a] < uses[b] : touched[a] < touched[b];
          }
          const std::size_t far_a = distance(steps, now, a);
          const std::size_t far_b = distance(steps, now, b);
          return far_a != far_b ? far_a > far_b : a < b;
        };
        if (victim < 0 || worse(expert, victim)) {
          victim = expert;
        }
      }
      resident.erase(std::find(resident.begin(), resident.end(), victim));
      counts.evictions += 1;
    }
  }
}

// Two domains, the second with prompts.
PackedData held_out_data() {
  PackedData data = tiny_data(17, 22, 40);
  for (TokenSequence& sequence : data.sequences) {
    if (sequence.domain == 1) {
      sequence.num_prompt_tokens = static_cast<std::int64_t>(sequence.tokens.size()) / 3;
      sequence.num_bytes = 2 * (static_cast<std::int64_t>(sequence.tokens.size()) - sequence.num_prompt_tokens);
    }
  }
  return data;
}

}  // namespace

TEST_CASE("the figures of an arm are those of a plain count over every sequence run alone") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.policies = {"lru", "lfu", "belady"};
  // Rows longer than most sequences, so that several share one.
  const ArmFigures arm = measure_arm(model, "tuned", data, {"beta"}, options, 64, true);
  CHECK(arm.name == "tuned");
  CHECK(arm.router_hash == router_hash(model));
  REQUIRE(arm.domains.size() == 2);
  for (std::size_t domain = 0; domain < 2; ++domain) {
    const DomainFigures& figures = arm.domains[domain];
    INFO(figures.domain);
    CHECK(figures.domain == data.domains[domain]);
    CHECK(figures.tuned_domain == (domain == 1));
    double nll = 0.0;
    std::int64_t labels = 0;
    std::int64_t bytes = 0;
    std::int64_t sequences = 0;
    std::int64_t tokens = 0;
    std::int64_t pairs = 0;
    double overlap = 0.0;
    double distinct = 0.0;
    std::vector<std::vector<double>> uses(2, std::vector<double>(8, 0.0));
    std::map<std::pair<std::string, std::int64_t>, Counts> caches;
    for (const TokenSequence& sequence : data.sequences) {
      if (sequence.domain != static_cast<std::int32_t>(domain)) {
        continue;
      }
      const Alone alone = run_alone(model, sequence);
      nll += alone.nll;
      labels += alone.labels;
      bytes += sequence.num_bytes;
      sequences += 1;
      tokens += static_cast<std::int64_t>(sequence.tokens.size()) - sequence.num_prompt_tokens;
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const std::vector<Step>& steps = alone.steps[layer];
        std::set<int> seen;
        for (std::size_t t = 0; t < steps.size(); ++t) {
          for (const int expert : steps[t]) {
            seen.insert(expert);
            uses[layer][static_cast<std::size_t>(expert)] += 1.0;
            overlap += t > 0 && holds(steps[t - 1], expert) ? 0.5 : 0.0;
          }
          pairs += t > 0 ? 1 : 0;
        }
        distinct += static_cast<double>(seen.size());
        for (const std::string& policy : options.policies) {
          for (const std::int64_t slots : {1, 2, 4}) {
            serve(steps, policy, static_cast<std::size_t>(slots), caches[{policy, slots}]);
          }
        }
      }
    }
    CHECK(figures.quality.nll_sum == Approx(nll).epsilon(1e-5));
    CHECK(figures.quality.labels == labels);
    CHECK(figures.quality.bytes == bytes);
    CHECK(figures.quality.perplexity() == Approx(std::exp(nll / static_cast<double>(labels))).epsilon(1e-5));
    CHECK(figures.quality.bits_per_byte() == Approx(nll / std::log(2.0) / static_cast<double>(bytes)).epsilon(1e-5));
    CHECK(figures.sequences == sequences);
    CHECK(figures.tokens == tokens);
    CHECK(figures.expert_overlap_ratio == Approx(overlap / static_cast<double>(pairs)).epsilon(1e-12));
    CHECK(figures.distinct_experts == Approx(distinct / static_cast<double>(2 * sequences)).epsilon(1e-12));
    double entropy = 0.0;
    double largest = 0.0;
    std::int64_t unused = 0;
    for (const std::vector<double>& layer : uses) {
      for (const double count : layer) {
        const double share = count / static_cast<double>(2 * tokens);
        entropy -= share > 0.0 ? share * std::log(share) / std::log(8.0) / 2.0 : 0.0;
        unused += count == 0.0 ? 1 : 0;
      }
      largest += *std::max_element(layer.begin(), layer.end()) / static_cast<double>(2 * tokens) * 8.0 / 2.0;
    }
    CHECK(figures.usage.normalised_entropy == Approx(entropy).epsilon(1e-12));
    CHECK(figures.usage.max_share == Approx(largest).epsilon(1e-12));
    CHECK(figures.usage.unused_experts == unused);
    // E/8, E/4, E/2 of 8 experts; the first is less than Top-K.
    REQUIRE(figures.cache.size() == 3 * 3);
    for (const CacheFigures& cache : figures.cache) {
      INFO(cache.policy << " " << cache.slots);
      const Counts& counts = caches.at({cache.policy, cache.slots});
      const std::int64_t loads = counts.requests - counts.hits;
      CHECK(cache.counts.requests == counts.requests);
      CHECK(cache.counts.hits == counts.hits);
      CHECK(cache.counts.loads == loads);
      CHECK(cache.counts.evictions == counts.evictions);
      CHECK(cache.counts.hits > 0);
      CHECK(loads > 0);
      CHECK(cache.loads_per_token_layer ==
            Approx(static_cast<double>(loads) / static_cast<double>(2 * tokens)).epsilon(1e-12));
      // Three matrices of 32 x 16 float32.
      CHECK(cache.bytes_per_token ==
            Approx(static_cast<double>(loads) * 3 * 32 * 16 * 4 / static_cast<double>(tokens)).epsilon(1e-12));
    }
  }
}

TEST_CASE("an arm follows the routers the model holds now") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.slots = {2};
  options.policies = {"lru"};
  const ArmFigures before = measure_arm(model, "baseline", data, {}, options, 48, true);
  {
    // Routers that send every token to the same two experts.
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& router : model->routers()) {
      router.zero_();
    }
  }
  const ArmFigures after = measure_arm(model, "tuned", data, {}, options, 48, true);
  CHECK(before.router_hash != after.router_hash);
  for (std::size_t domain = 0; domain < 2; ++domain) {
    const DomainFigures& figures = after.domains[domain];
    CHECK(figures.expert_overlap_ratio == 1.0);
    CHECK(figures.distinct_experts == 2.0);
    // One load per expert, layer and sequence: all of them cold.
    CHECK(figures.cache.at(0).counts.loads == 2 * 2 * figures.sequences);
    CHECK(figures.cache.at(0).counts.cold == figures.cache.at(0).counts.loads);
    CHECK(figures.cache.at(0).counts.loads < before.domains[domain].cache.at(0).counts.loads);
    CHECK(figures.quality.nll_sum != before.domains[domain].quality.nll_sum);
    CHECK(figures.quality.labels == before.domains[domain].quality.labels);
  }
}

TEST_CASE("an arm agrees with its own reference routers, and less and less with others") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.slots = {2};
  options.policies = {"lru"};
  CHECK_THROWS_AS(measure_arm(model, "tuned", data, {}, options, 48, true, true), std::invalid_argument);
  const std::vector<DomainFigures> alone = measure_arm(model, "baseline", data, {}, options, 48, true).domains;
  CHECK(std::isnan(alone.at(0).kendall_tau));
  CHECK(std::isnan(alone.at(0).top_k_agreement));
  model->keep_reference_routers();
  const ArmFigures same = measure_arm(model, "tuned", data, {}, options, 48, true, true);
  for (const DomainFigures& figures : same.domains) {
    CHECK(figures.kendall_tau == Approx(1.0).epsilon(1e-12));
    CHECK(figures.top_k_agreement == 1.0);
  }
  double last = 1.0;
  for (const double scale : {0.02, 0.2, 2.0}) {
    {
      const torch::NoGradGuard no_grad;
      torch::manual_seed(5);
      for (torch::Tensor& router : model->routers()) {
        router.add_(torch::randn_like(router), scale);
      }
    }
    const ArmFigures arm = measure_arm(model, "tuned", data, {}, options, 48, true, true);
    for (std::size_t domain = 0; domain < 2; ++domain) {
      INFO("domain " << domain << ", noise " << scale);
      double tau = 0.0;
      double common = 0.0;
      double rows = 0.0;
      for (const TokenSequence& sequence : data.sequences) {
        if (sequence.domain != static_cast<std::int32_t>(domain)) {
          continue;
        }
        const torch::NoGradGuard no_grad;
        const auto length = static_cast<std::int64_t>(sequence.tokens.size());
        const torch::Tensor ids =
            torch::tensor(std::vector<std::int64_t>(sequence.tokens.begin(), sequence.tokens.end())).unsqueeze(0);
        const ModelOutput output =
            model->forward({ids, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64)});
        for (const RoutingRecord& record : output.routing) {
          for (std::int64_t t = sequence.num_prompt_tokens; t < length; ++t) {
            const torch::Tensor now = record.logits_TE[t];
            const torch::Tensor base = record.reference_logits_TE[t];
            // Signs of all differences, each pair twice.
            const torch::Tensor by_now = (now.unsqueeze(0) - now.unsqueeze(1)).sign();
            const torch::Tensor by_base = (base.unsqueeze(0) - base.unsqueeze(1)).sign();
            tau += (by_now * by_base).sum().item<double>() / (8.0 * 7.0);
            for (const std::int64_t rank : {0, 1}) {
              const auto expert = std::get<1>(base.topk(2))[rank].item<std::int64_t>();
              common += record.selected_TK[t].eq(expert).sum().item<double>() / 2.0;
            }
            rows += 1.0;
          }
        }
      }
      // Packed rows and sequences alone round differently.
      CHECK(arm.domains[domain].kendall_tau == Approx(tau / rows).margin(2e-3));
      CHECK(arm.domains[domain].top_k_agreement == Approx(common / rows).margin(2e-3));
    }
    CHECK(arm.domains[0].kendall_tau < last);
    last = arm.domains[0].kendall_tau;
  }
  CHECK(last < 0.5);
}

TEST_CASE("segment metrics are there for every segment length, sorted and each once, and every slot count") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.policies = {"lru", "belady"};
  options.slots = {4, 2};
  const auto lengths_of = [](const DomainFigures& figures) {
    std::vector<std::int64_t> lengths;
    for (const SegmentFigures& segment : figures.segments) {
      lengths.push_back(segment.segment_length);
    }
    return lengths;
  };
  ArmFigures arm = measure_arm(model, "baseline", data, {}, options, 48, true);
  CHECK(lengths_of(arm.domains.at(1)) == std::vector<std::int64_t>{16, 64});
  options.segments = {64, 1, 4, 64};
  arm = measure_arm(model, "baseline", data, {}, options, 48, true);
  for (const DomainFigures& figures : arm.domains) {
    CHECK(lengths_of(figures) == std::vector<std::int64_t>{1, 4, 64});
    CHECK(figures.segments.at(0).routing.best_performance == 1.0);
    CHECK(figures.segments.at(0).routing.segments == 2 * figures.tokens);
    CHECK(figures.segments.at(1).routing.best_performance < 1.0);
    // 64 steps are more than any sequence has.
    CHECK(figures.segments.at(2).routing.segments == 2 * figures.sequences);
    REQUIRE(figures.segment_caches.size() == 3 * 2);
    for (std::size_t i = 0; i < 6; ++i) {
      const SegmentCacheFigures& cache = figures.segment_caches[i];
      CHECK(cache.segment_length == std::vector<std::int64_t>{1, 4, 64}.at(i / 2));
      CHECK(cache.slots == std::vector<std::int64_t>{2, 4}.at(i % 2));
      const SimulationCounts& bound = find_cache(figures, "belady", cache.slots)->counts;
      CHECK(cache.counts.requests == bound.requests);
      CHECK(cache.counts.hits <= bound.hits);
      CHECK(cache.counts.hits > 0);
    }
    // With slots for K experts only the step itself stays, whoever looks ahead.
    CHECK(figures.segment_caches[0].counts.hits == find_cache(figures, "lru", 2)->counts.hits);
  }
  options.segments.clear();
  arm = measure_arm(model, "baseline", data, {}, options, 48, true);
  CHECK(arm.domains.at(0).segments.empty());
  CHECK(arm.domains.at(0).segment_caches.empty());
}

TEST_CASE("slots are sorted, each once, and at most all experts") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.policies = {"belady", "gamma"};
  options.slots = {8, 3, 8, 1};
  const ArmFigures arm = measure_arm(model, "baseline", data, {}, options, 48, true);
  std::vector<std::pair<std::string, std::int64_t>> cells;
  for (const CacheFigures& cache : arm.domains.at(0).cache) {
    cells.emplace_back(cache.policy, cache.slots);
  }
  CHECK(cells == std::vector<std::pair<std::string, std::int64_t>>{
                     {"belady", 1}, {"gamma", 1}, {"belady", 3}, {"gamma", 3}, {"belady", 8}, {"gamma", 8}});
  // With room for all experts every request but the first of each is a hit.
  const SimulationCounts& all = find_cache(arm.domains.at(0), "gamma", 8)->counts;
  CHECK(all.loads == all.cold);
  CHECK(all.evictions == 0);
  options.slots = {4, 9};
  CHECK_THROWS_WITH(measure_arm(model, "baseline", data, {}, options, 48, true),
                    Catch::Contains("evaluate.slots must be at most the model's experts per layer (8), got 9"));
  options.slots = {4};
  options.policies = {"lruu"};
  CHECK_THROWS_AS(measure_arm(model, "baseline", data, {}, options, 48, true), UsageError);
}

TEST_CASE("the discount of the gamma policy is the recipe's: 0 is LRU, 1 is LFU") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.policies = {"gamma", "lru", "lfu"};
  options.slots = {3, 4, 5};
  for (const double gamma : {0.0, 1.0}) {
    options.gamma = gamma;
    const ArmFigures arm = measure_arm(model, "baseline", data, {}, options, 48, true);
    std::map<std::string, std::vector<std::int64_t>> hits;
    for (const DomainFigures& figures : arm.domains) {
      for (const CacheFigures& cache : figures.cache) {
        hits[cache.policy].push_back(cache.counts.hits);
      }
    }
    CHECK(hits["lru"] != hits["lfu"]);
    CHECK(hits["gamma"] == hits[gamma == 0.0 ? "lru" : "lfu"]);
  }
}

TEST_CASE("bytes follow the dtype the experts are held in") {
  MoeModel model = small_model(torch::kBFloat16);
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.policies = {"lru"};
  options.slots = {2};
  const ArmFigures arm = measure_arm(model, "baseline", data, {}, options, 48, true);
  const DomainFigures& figures = arm.domains.at(1);
  CHECK(figures.cache.at(0).bytes_per_token == Approx(static_cast<double>(figures.cache.at(0).counts.loads) * 3 * 32 *
                                                      16 * 2 / static_cast<double>(figures.tokens)));
}

TEST_CASE("the static-set test restricts every token to the experts that the domain used most") {
  MoeModel model = small_model();
  const PackedData data = held_out_data();
  EvaluateOptions options;
  options.slots = {2};
  options.policies = {"lru"};
  options.segments.clear();
  options.static_set = {8, 3, 0, 3};  // 0: E/4, which is K here
  const ArmFigures arm = measure_arm(model, "tuned", data, {}, options, 64, true);
  for (std::size_t domain = 0; domain < 2; ++domain) {
    const DomainFigures& figures = arm.domains[domain];
    REQUIRE(figures.static_sets.size() == 3);
    CHECK(figures.static_sets[0].experts == 2);
    CHECK(figures.static_sets[1].experts == 3);
    // All experts: nothing is forbidden.
    CHECK(figures.static_sets[2].experts == 8);
    CHECK(figures.static_sets[2].share == 1.0);
    CHECK(figures.static_sets[2].quality.nll_sum == figures.quality.nll_sum);
    // By hand: uses counted over sequences run alone, then each run again with a selector of the test's own.
    std::vector<std::map<int, int>> uses(2);
    for (const TokenSequence& sequence : data.sequences) {
      if (sequence.domain != static_cast<std::int32_t>(domain)) {
        continue;
      }
      const Alone alone = run_alone(model, sequence);
      for (std::size_t layer = 0; layer < 2; ++layer) {
        for (const Step& step : alone.steps[layer]) {
          for (const int expert : step) {
            uses[layer][expert] += 1;
          }
        }
      }
    }
    struct Listed : Selector {
      std::vector<std::vector<int>> allowed{2};
      torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t layer,
                           const TokenBatch& /*batch*/) override {
        torch::Tensor selected = torch::empty({logits_TE.size(0), top_k}, torch::kInt64);
        for (std::int64_t t = 0; t < logits_TE.size(0); ++t) {
          std::vector<std::pair<float, int>> order;
          for (const int expert : allowed[static_cast<std::size_t>(layer)]) {
            order.emplace_back(-logits_TE[t][expert].item<float>(), expert);
          }
          std::sort(order.begin(), order.end());
          for (std::int64_t k = 0; k < top_k; ++k) {
            selected[t][k] = order[static_cast<std::size_t>(k)].second;
          }
        }
        return selected;
      }
    };
    const auto selector = std::make_shared<Listed>();
    double inside = 0.0;
    double all = 0.0;
    for (std::size_t layer = 0; layer < 2; ++layer) {
      std::vector<std::pair<int, int>> order;
      for (int expert = 0; expert < 8; ++expert) {
        order.emplace_back(-uses[layer][expert], expert);
        all += uses[layer][expert];
      }
      std::sort(order.begin(), order.end());
      for (std::size_t i = 0; i < 3; ++i) {
        selector->allowed[layer].push_back(order[i].second);
        inside -= order[i].first;
      }
    }
    model->set_selector(selector);
    double nll = 0.0;
    for (const TokenSequence& sequence : data.sequences) {
      nll += sequence.domain == static_cast<std::int32_t>(domain) ? run_alone(model, sequence).nll : 0.0;
    }
    model->set_selector(std::make_shared<TopKSelector>());
    CHECK(figures.static_sets[1].share == Approx(inside / all).epsilon(1e-12));
    CHECK(figures.static_sets[1].quality.nll_sum == Approx(nll).epsilon(1e-5));
    CHECK(figures.static_sets[1].quality.nll_sum != Approx(figures.quality.nll_sum).epsilon(1e-6));
    CHECK(figures.static_sets[1].quality.labels == figures.quality.labels);
  }
  // The model is as it was.
  options.static_set.clear();
  const ArmFigures again = measure_arm(model, "tuned", data, {}, options, 64, true);
  CHECK(again.domains[0].static_sets.empty());
  CHECK(again.domains[0].quality.nll_sum == arm.domains[0].quality.nll_sum);
  options.static_set = {1};
  CHECK_THROWS_WITH(measure_arm(model, "tuned", data, {}, options, 64, true),
                    Catch::Contains("evaluate.static_set") && Catch::Contains("(2 to 8) or 0, got 1"));
  options.static_set = {9};
  CHECK_THROWS_AS(measure_arm(model, "tuned", data, {}, options, 64, true), UsageError);
}

TEST_CASE("a router that is static already loses nothing in the static-set test") {
  MoeModel model = small_model();
  {
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& router : model->routers()) {
      router.zero_();  // ties: experts 0 and 1 for every token
    }
  }
  EvaluateOptions options;
  options.slots = {2};
  options.policies = {"lru"};
  options.static_set = {2};
  for (const DomainFigures& figures : measure_arm(model, "tuned", held_out_data(), {}, options, 64, true).domains) {
    CHECK(figures.static_sets.at(0).share == 1.0);
    CHECK(figures.static_sets.at(0).quality.nll_sum == figures.quality.nll_sum);
  }
}
