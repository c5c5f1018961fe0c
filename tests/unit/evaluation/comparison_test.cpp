#include <algorithm>
#include <cmath>
#include <sstream>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/evaluation/comparison.hpp"

using namespace hestia;

namespace {

struct Layout {
  std::vector<std::string> arms = {kBaselineArm, kControlArm, kTunedArm};
  std::vector<std::string> domains = {"python", "kernel", "prose"};
  std::vector<std::string> policies = {"lru", "lfu", "belady"};
  std::vector<std::int64_t> slots = {4, 8, 16};
  double scale = 1.0;  // of perplexities, loads and bytes
};

// Figures that hold together as far as the table and the file look at them.
Comparison random_comparison(std::uint64_t seed, const Layout& layout) {
  SplitMix64 random(seed);
  Comparison comparison;
  comparison.num_layers = 6;
  comparison.num_experts = 32;
  comparison.top_k = 4;
  comparison.expert_bytes = 86016;
  comparison.device = "cpu";
  comparison.model_path = "checkpoints/tiny";
  comparison.bundle = "runs/a/bundle";
  comparison.command = "hestia evaluate a.yaml";
  comparison.seconds = 1.5;
  for (const std::string& name : layout.arms) {
    ArmFigures arm;
    arm.name = name;
    arm.router_hash = fmt::format("{:016x}", random.next());
    arm.top_k = comparison.top_k;
    for (const std::string& domain : layout.domains) {
      DomainFigures figures;
      figures.domain = domain;
      figures.tuned_domain = domain == layout.domains.front();
      figures.sequences = 10;
      figures.tokens = 1000;
      figures.quality.labels = 990;
      figures.quality.nll_sum = 990.0 * std::log(layout.scale * (3.0 + 5.0 * random.uniform()));
      figures.quality.bytes = 4000;
      figures.expert_overlap_ratio = random.uniform();
      figures.distinct_experts = 4.0 + 28.0 * random.uniform();
      figures.usage.normalised_entropy = 0.5 + 0.5 * random.uniform();
      figures.usage.coefficient_of_variation = random.uniform();
      figures.usage.max_share = 1.0 + random.uniform();
      figures.usage.unused_experts = static_cast<std::int64_t>(random.below(5));
      figures.kendall_tau = name == kBaselineArm ? figures.kendall_tau : random.uniform();
      figures.top_k_agreement = name == kBaselineArm ? figures.top_k_agreement : random.uniform();
      for (const std::int64_t length : {16, 64}) {
        figures.segments.push_back({length, {random.uniform(), 2.0 * random.uniform(), 500 + length}});
        for (const std::int64_t slots : layout.slots) {
          SegmentCacheFigures cache;
          cache.segment_length = length;
          cache.slots = slots;
          cache.counts.requests = 24000;
          cache.counts.hits = static_cast<std::int64_t>(random.below(24000));
          figures.segment_caches.push_back(cache);
        }
      }
      for (const std::int64_t slots : layout.slots) {
        for (const std::string& policy : layout.policies) {
          CacheFigures cache;
          cache.policy = policy;
          cache.slots = slots;
          cache.counts.requests = 24000;
          cache.counts.hits = static_cast<std::int64_t>(random.below(24000));
          cache.counts.loads = 24000 - cache.counts.hits;
          cache.loads_per_token_layer = layout.scale * static_cast<double>(cache.counts.loads) / 6000.0;
          cache.bytes_per_token = layout.scale * static_cast<double>(cache.counts.loads) * 86.016;
          figures.cache.push_back(cache);
        }
      }
      arm.domains.push_back(figures);
    }
    comparison.arms.push_back(arm);
  }
  return comparison;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(line);
  }
  return lines;
}

// Words of a line, bars left out.
std::string words_of(const std::string& line) {
  std::istringstream stream(line);
  std::string words;
  for (std::string word; stream >> word;) {
    words += word == "|" ? "" : word + " ";
  }
  return words;
}

std::vector<std::size_t> bars_of(const std::string& line) {
  std::vector<std::size_t> places;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '|') {
      places.push_back(i);
    }
  }
  return places;
}

void check_aligned(const std::vector<std::string>& lines, std::size_t num_rows, std::size_t num_groups) {
  REQUIRE(lines.size() > num_rows + 2);
  CHECK(bars_of(lines[0]).size() == num_groups);
  for (std::size_t i = 0; i < num_rows + 2; ++i) {
    INFO(lines[i]);
    CHECK(lines[i].size() == lines[0].size());
    CHECK(bars_of(lines[i]) == bars_of(lines[0]));
    for (const std::size_t bar : bars_of(lines[i])) {
      CHECK(lines[i][bar - 1] == ' ');
      CHECK(lines[i][bar + 1] == ' ');
    }
  }
  // A column of numbers ends where its head ends: no head's last letter stands over the middle of a number.
  const std::string& head = lines[1];
  for (std::size_t place = head.find("ppl"); place + 1 < head.size(); ++place) {
    if (head[place] != ' ' && head[place + 1] == ' ') {
      for (std::size_t row = 2; row < num_rows + 2; ++row) {
        INFO(lines[row] << " at " << place);
        CHECK(lines[row][place] != ' ');
        CHECK(lines[row][place + 1] == ' ');
      }
    }
  }
}

}  // namespace

TEST_CASE("the table shows every arm, domain, policy and slot count in columns that line up") {
  const Layout layout;
  const Comparison comparison = random_comparison(3, layout);
  const std::vector<std::string> lines = lines_of(comparison_table(comparison));
  check_aligned(lines, 9, 3);
  CHECK(words_of(lines[0]) == "4 slots: loads, hit rate 8 slots: loads, hit rate 16 slots: loads, hit rate ");
  CHECK(
      words_of(lines[1]) ==
      "domain router ppl bit/B EOR dist. usageH lru lfu belady KiB/tok lru lfu belady KiB/tok lru lfu belady KiB/tok ");
  std::size_t row = 2;
  for (std::size_t domain = 0; domain < 3; ++domain) {
    for (const ArmFigures& arm : comparison.arms) {
      const DomainFigures& figures = arm.domains[domain];
      std::string expected;
      if (&arm == &comparison.arms.front()) {
        expected = domain == 0 ? "python* " : figures.domain + " ";
      }
      expected += fmt::format("{} {:.3f} {:.3f} {:.3f} {:.1f} {:.3f} ", arm.name, figures.quality.perplexity(),
                              figures.quality.bits_per_byte(), figures.expert_overlap_ratio, figures.distinct_experts,
                              figures.usage.normalised_entropy);
      for (std::size_t cell = 0; cell < 9; ++cell) {
        const CacheFigures& cache = figures.cache[cell];
        expected += fmt::format("{:.2f} {:.0f}% ", cache.loads_per_token_layer, 100.0 * cache.counts.hit_rate());
        if (cell % 3 == 2) {
          expected += fmt::format("{:.1f} ", figures.cache[cell - 2].bytes_per_token / 1024.0);
        }
      }
      CHECK(words_of(lines[row++]) == expected);
    }
  }
  CHECK_THAT(lines[row], Catch::StartsWith("* tuned on.") && Catch::Contains("of 4 requested") &&
                             Catch::Contains("under lru") && Catch::Contains("usageH"));
}

TEST_CASE("the table says how many experts each router requests when they differ") {
  Comparison comparison = random_comparison(3, {});
  comparison.arms[1].top_k = 3;
  comparison.arms[2].top_k = 3;
  CHECK_THAT(comparison_table(comparison), Catch::Contains("of 4 (baseline), 3 (nll control), 3 (tuned) requested"));
}

TEST_CASE("columns line up whatever the figures are") {
  Layout layout;
  SECTION("a large model: figures of many digits") {
    layout.scale = 1e6;
  }
  SECTION("figures of few digits") {
    layout.scale = 1e-3;
  }
  SECTION("one policy, whose columns are narrower than their label") {
    layout.policies = {"random"};
  }
  SECTION("one arm, one domain, one slot count") {
    layout.arms = {kBaselineArm};
    layout.domains = {"x"};
    layout.slots = {128};
  }
  SECTION("long names") {
    layout.domains = {"a domain with a very long name", "b"};
    layout.arms = {kBaselineArm, kTunedArm};
  }
  const std::vector<std::string> lines = lines_of(comparison_table(random_comparison(4, layout)));
  check_aligned(lines, layout.arms.size() * layout.domains.size(), layout.slots.size());
}

TEST_CASE("a table of nothing is empty") {
  CHECK(comparison_table(Comparison{}).empty());
  Layout layout;
  layout.domains = {};
  CHECK(comparison_table(random_comparison(5, layout)).empty());
}

TEST_CASE("perplexity with C experts stands under its own C, whatever an arm's K made of the sizes") {
  Layout layout;
  Comparison comparison = random_comparison(7, layout);
  const auto set_of = [](std::int64_t experts, double perplexity) {
    StaticSetFigures set;
    set.experts = experts;
    set.quality.labels = 100;
    set.quality.nll_sum = 100.0 * std::log(perplexity);
    return set;
  };
  for (std::size_t i = 0; i < comparison.arms.size(); ++i) {
    for (DomainFigures& figures : comparison.arms[i].domains) {
      figures.static_sets = i == 2 ? std::vector<StaticSetFigures>{set_of(2, 222.5), set_of(8, 888.5)}
                                   : std::vector<StaticSetFigures>{set_of(4, 444.5), set_of(8, 777.5)};
    }
  }
  const std::string table = comparison_table(comparison);
  CHECK_THAT(table, Catch::Contains("ppl@4") && Catch::Contains("ppl@8") && Catch::Contains("444.5") &&
                        Catch::Contains("888.5") && !Catch::Contains("222.5"));
}

TEST_CASE("the closing lines say what tuning changed in each domain") {
  const Layout layout;
  const Comparison comparison = random_comparison(6, layout);
  const std::vector<std::string> lines = lines_of(comparison_table(comparison));
  REQUIRE(lines.size() == 2 + 9 + 2 + 3);
  for (std::size_t domain = 0; domain < 3; ++domain) {
    const DomainFigures& baseline = comparison.arms[0].domains[domain];
    const DomainFigures& control = comparison.arms[1].domains[domain];
    const DomainFigures& tuned = comparison.arms[2].domains[domain];
    const auto loads = [](const DomainFigures& figures) {
      return static_cast<double>(find_cache(figures, "lru", 8)->counts.loads);
    };
    CHECK(lines[13 + domain] ==
          fmt::format("{}{}: loads {:+.1f} % against baseline (LRU, 8 slots), perplexity {:+.2f} % against plain NLL "
                      "tuning, usage entropy {:.1f} % of the baseline's",
                      baseline.domain, domain == 0 ? "*" : "", 100.0 * (loads(tuned) / loads(baseline) - 1.0),
                      100.0 * (std::exp(tuned.quality.nll() - control.quality.nll()) - 1.0),
                      100.0 * tuned.usage.normalised_entropy / baseline.usage.normalised_entropy));
  }
  // Without a control the baseline stands in, and is named; without LRU at E/4 no loads are quoted.
  Layout two;
  two.arms = {kBaselineArm, kTunedArm};
  two.slots = {4, 16};
  const std::string table = comparison_table(random_comparison(6, two));
  CHECK_THAT(table, Catch::Contains("python*: perplexity ") && Catch::Contains("% against baseline,") &&
                        !Catch::Contains("plain NLL") && !Catch::Contains("(LRU"));
  Layout one;
  one.arms = {kBaselineArm};
  CHECK_THAT(comparison_table(random_comparison(6, one)), !Catch::Contains("against"));
}

TEST_CASE("the results file holds every figure") {
  clear_degradations();
  log_warning("test: fewer slots than asked for");
  const Layout layout;
  Comparison comparison = random_comparison(7, layout);
  comparison.arms[2].top_k = 3;
  comparison.arms[2].adapters = true;
  const Json json = Json::parse(comparison_json(comparison).dump());
  clear_degradations();
  CHECK(json.at("format_version") == 1);
  CHECK(json.at("kind") == "hestia comparison");
  CHECK(json.at("version") == program_version());
  CHECK(json.at("commit") == program_commit());
  CHECK(json.at("command") == "hestia evaluate a.yaml");
  CHECK(json.at("device") == "cpu");
  CHECK(json.at("seconds") == 1.5);
  CHECK(json.at("bundle") == "runs/a/bundle");
  CHECK(json.at("degradations") == Json::array({"test: fewer slots than asked for"}));
  CHECK(json.at("model") ==
        Json{{"path", "checkpoints/tiny"}, {"layers", 6}, {"experts", 32}, {"top_k", 4}, {"expert_bytes", 86016}});
  CHECK_THAT(json.at("note").get<std::string>(), Catch::Contains("modelled"));
  for (const char* key : {"cpu", "cores", "memory_bytes"}) {
    CHECK(json.at("machine").contains(key));
  }
  REQUIRE(json.at("arms").size() == 3);
  for (std::size_t a = 0; a < 3; ++a) {
    const ArmFigures& arm = comparison.arms[a];
    CHECK(json.at("arms")[a].at("name") == arm.name);
    CHECK(json.at("arms")[a].at("router_hash") == arm.router_hash);
    CHECK(json.at("arms")[a].at("top_k") == arm.top_k);
    CHECK(json.at("arms")[a].at("adapters") == arm.adapters);
    REQUIRE(json.at("arms")[a].at("domains").size() == 3);
    for (std::size_t d = 0; d < 3; ++d) {
      const DomainFigures& figures = arm.domains[d];
      const Json& domain = json.at("arms")[a].at("domains")[d];
      CHECK(domain.at("domain") == figures.domain);
      CHECK(domain.at("tuned_domain") == figures.tuned_domain);
      CHECK(domain.at("sequences") == 10);
      CHECK(domain.at("tokens") == 1000);
      CHECK(domain.at("nll") == figures.quality.nll());
      CHECK(domain.at("perplexity") == figures.quality.perplexity());
      CHECK(domain.at("bits_per_byte") == figures.quality.bits_per_byte());
      CHECK(domain.at("expert_overlap_ratio") == figures.expert_overlap_ratio);
      CHECK(domain.at("distinct_experts") == figures.distinct_experts);
      CHECK(domain.at("usage_entropy") == figures.usage.normalised_entropy);
      CHECK(domain.at("usage_cv") == figures.usage.coefficient_of_variation);
      CHECK(domain.at("usage_max_share") == figures.usage.max_share);
      CHECK(domain.at("unused_experts") == figures.usage.unused_experts);
      if (a == 0) {
        CHECK(domain.at("kendall_tau").is_null());
        CHECK(domain.at("top_k_agreement").is_null());
      } else {
        CHECK(domain.at("kendall_tau") == figures.kendall_tau);
        CHECK(domain.at("top_k_agreement") == figures.top_k_agreement);
      }
      REQUIRE(domain.at("segment_routing_best_performance").size() == 2);
      for (std::size_t s = 0; s < 2; ++s) {
        const SegmentFigures& segment = figures.segments[s];
        CHECK(domain.at("segment_routing_best_performance")[s] == Json{{"segment", segment.segment_length},
                                                                       {"value", segment.routing.best_performance},
                                                                       {"size_ratio", segment.routing.size_ratio},
                                                                       {"segments", segment.routing.segments}});
      }
      REQUIRE(domain.at("segment_cache_hit_rate").size() == 2 * 3);
      for (std::size_t s = 0; s < 6; ++s) {
        const SegmentCacheFigures& cache = figures.segment_caches[s];
        CHECK(domain.at("segment_cache_hit_rate")[s] == Json{{"segment", cache.segment_length},
                                                             {"slots", cache.slots},
                                                             {"value", cache.counts.hit_rate()},
                                                             {"requests", cache.counts.requests},
                                                             {"hits", cache.counts.hits}});
      }
      REQUIRE(domain.at("cache").size() == 9);
      for (std::size_t c = 0; c < 9; ++c) {
        const CacheFigures& cache = figures.cache[c];
        const Json& cell = domain.at("cache")[c];
        CHECK(cell.at("policy") == cache.policy);
        CHECK(cell.at("slots") == cache.slots);
        CHECK(cell.at("requests") == cache.counts.requests);
        CHECK(cell.at("hits") == cache.counts.hits);
        CHECK(cell.at("loads") == cache.counts.loads);
        CHECK(cell.at("hit_rate") == cache.counts.hit_rate());
        CHECK(cell.at("loads_per_token_layer") == cache.loads_per_token_layer);
        CHECK(cell.at("modelled_bytes_per_token") == cache.bytes_per_token);
        CHECK(cell.contains("cold"));
        CHECK(cell.contains("evictions"));
      }
    }
  }
}

TEST_CASE("the results file says what tuning changed") {
  const Layout layout;
  Comparison comparison = random_comparison(8, layout);
  // A cache that the baseline never had to load: nothing to compare with.
  comparison.arms[0].domains[1].cache[0].counts.loads = 0;
  const Json json = comparison_json(comparison);
  REQUIRE(json.at("delta").size() == 3);
  for (std::size_t d = 0; d < 3; ++d) {
    const Json& delta = json.at("delta")[d];
    const DomainFigures& baseline = comparison.arms[0].domains[d];
    const DomainFigures& control = comparison.arms[1].domains[d];
    const DomainFigures& tuned = comparison.arms[2].domains[d];
    CHECK(delta.at("domain") == baseline.domain);
    CHECK(delta.at("perplexity_against_baseline").get<double>() ==
          Approx(std::expm1(tuned.quality.nll() - baseline.quality.nll())).epsilon(1e-9));
    CHECK(delta.at("perplexity_against_control").get<double>() ==
          Approx(std::expm1(tuned.quality.nll() - control.quality.nll())).epsilon(1e-9));
    CHECK(delta.at("usage_entropy_against_baseline").get<double>() ==
          Approx(tuned.usage.normalised_entropy / baseline.usage.normalised_entropy));
    REQUIRE(delta.at("loads").size() == 9);
    for (std::size_t c = 0; c < 9; ++c) {
      const Json& loads = delta.at("loads")[c];
      CHECK(loads.at("policy") == tuned.cache[c].policy);
      CHECK(loads.at("slots") == tuned.cache[c].slots);
      if (d == 1 && c == 0) {
        CHECK(loads.at("loads_against_baseline").is_null());
      } else {
        CHECK(loads.at("loads_against_baseline").get<double>() ==
              Approx((static_cast<double>(tuned.cache[c].counts.loads) -
                      static_cast<double>(baseline.cache[c].counts.loads)) /
                     static_cast<double>(baseline.cache[c].counts.loads))
                  .epsilon(1e-9));
      }
    }
  }
  Layout two;
  two.arms = {kBaselineArm, kTunedArm};
  CHECK_FALSE(comparison_json(random_comparison(8, two)).at("delta")[0].contains("perplexity_against_control"));
  Layout one;
  one.arms = {kBaselineArm};
  CHECK(comparison_json(random_comparison(8, one)).at("delta").empty());
}

TEST_CASE("arms and cells are found by name") {
  const Comparison comparison = random_comparison(9, Layout{});
  CHECK(find_arm(comparison, kTunedArm) == &comparison.arms[2]);
  CHECK(find_arm(comparison, "other") == nullptr);
  const DomainFigures& figures = comparison.arms[0].domains[0];
  CHECK(find_cache(figures, "lfu", 8) == &figures.cache[4]);
  CHECK(find_cache(figures, "lfu", 9) == nullptr);
  CHECK(find_cache(figures, "fifo", 8) == nullptr);
}

TEST_CASE("the program knows its version and its machine") {
  const std::string version = program_version();
  CHECK(std::count(version.begin(), version.end(), '.') == 2);
  CHECK_FALSE(program_commit().empty());
  CHECK_FALSE(program_compiler().empty());
  const Json machine = machine_info();
  CHECK(machine.at("cores").get<std::int64_t>() >= 1);
  CHECK(machine.at("memory_bytes").get<std::int64_t>() > 100'000'000);
  CHECK_FALSE(machine.at("cpu").get<std::string>().empty());
}

namespace {

// Right and wrong answers of two tasks for every arm; the second one is of choices.
void add_tasks(Comparison& comparison, std::uint64_t seed) {
  SplitMix64 random(seed);
  for (ArmFigures& arm : comparison.arms) {
    for (const char* kind : {"exact_match", "multiple_choice"}) {
      TaskFigures task;
      task.name = std::string(kind) + " task";
      task.kind = kind;
      for (int i = 0; i < 50; ++i) {
        TaskOutcome outcome;
        outcome.id = std::to_string(i);
        outcome.right = random.uniform() < 0.5;
        outcome.right_by_bytes = random.uniform() < 0.3;
        task.outcomes.push_back(outcome);
      }
      arm.tasks.push_back(task);
    }
  }
}

}  // namespace

TEST_CASE("tasks have a table of their own, accuracies and points against the others") {
  Comparison comparison = random_comparison(71, Layout());
  CHECK(task_table(comparison).empty());
  CHECK_FALSE(comparison_json(comparison).contains("task_delta"));
  CHECK_FALSE(comparison_json(comparison).at("arms").at(0).contains("tasks"));
  add_tasks(comparison, 72);
  const std::vector<std::string> lines = lines_of(task_table(comparison));
  REQUIRE(lines.size() == 1 + 6 + 1);  // heads, rows, what it means
  CHECK(words_of(lines[0]) == "task router n right % by bytes % points on baseline points on control ");
  const TaskFigures& tuned = comparison.arms[2].tasks[1];
  const TaskFigures& base = comparison.arms[0].tasks[1];
  const TaskFigures& control = comparison.arms[1].tasks[1];
  const TaskDifference on_base = task_difference(tuned, base);
  const TaskDifference on_control = task_difference(tuned, control);
  CHECK(words_of(lines[6]) ==
        fmt::format("tuned 50 {:.1f} +- {:.1f} {:.1f} +- {:.1f} {:+.1f} +- {:.1f} {:+.1f} +- {:.1f} ",
                    100.0 * tuned.accuracy(), 100.0 * tuned.standard_error(), 100.0 * tuned.accuracy(true),
                    100.0 * tuned.standard_error(true), on_base.points, on_base.standard_error, on_control.points,
                    on_control.standard_error));
  const TaskFigures& first = comparison.arms[0].tasks[0];
  const TaskDifference back = task_difference(first, comparison.arms[1].tasks[0]);
  CHECK(words_of(lines[1]) == fmt::format("exact_match task baseline 50 {:.1f} +- {:.1f} - - {:+.1f} +- {:.1f} ",
                                          100.0 * first.accuracy(), 100.0 * first.standard_error(), back.points,
                                          back.standard_error));
  const Json json = comparison_json(comparison);
  const Json& figures = json.at("arms").at(2).at("tasks").at(1);
  CHECK(figures.at("count") == 50);
  CHECK(figures.at("accuracy") == tuned.accuracy());
  CHECK(figures.at("accuracy_by_bytes") == tuned.accuracy(true));
  CHECK(figures.at("standard_error_by_bytes") == tuned.standard_error(true));
  const Json& delta = json.at("task_delta").at(1);
  CHECK(delta.at("task") == "multiple_choice task");
  CHECK(delta.at("points_against_baseline").at("value") == on_base.points);
  CHECK(delta.at("points_against_control").at("standard_error") == on_control.standard_error);
  CHECK(delta.at("points_by_bytes_against_baseline").at("value") == task_difference(tuned, base, true).points);
  CHECK_FALSE(json.at("task_delta").at(0).contains("points_by_bytes_against_baseline"));
}

TEST_CASE("a task that an arm was not measured on is not in its table") {
  Layout layout;
  layout.arms = {kBaselineArm, kTunedArm, "tuned, lambda 0.1, J 2"};
  Comparison comparison = random_comparison(73, layout);
  add_tasks(comparison, 74);
  comparison.arms[2].tasks.erase(comparison.arms[2].tasks.begin());
  const std::vector<std::string> lines = lines_of(task_table(comparison));
  REQUIRE(lines.size() == 1 + 5 + 1);
  CHECK_THAT(lines[2], !Catch::Contains("lambda"));
  CHECK_THAT(lines[5], Catch::Contains("tuned, lambda 0.1, J 2"));
  CHECK_THAT(lines[0], !Catch::Contains("control"));
  // Exact matches alone have no column of bytes.
  for (ArmFigures& arm : comparison.arms) {
    arm.tasks.resize(arm.tasks.size() - 1);
  }
  CHECK_THAT(task_table(comparison), !Catch::Contains("bytes"));
}
