#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "hestia/evaluation/comparison.hpp"

namespace hestia {

namespace {

// Policies and slot counts in the order they were simulated.
template <class Value, class Get>
std::vector<Value> distinct(const std::vector<CacheFigures>& cache, const Get& get) {
  std::vector<Value> values;
  for (const CacheFigures& cell : cache) {
    const Value value = get(cell);
    if (std::find(values.begin(), values.end(), value) == values.end()) {
      values.push_back(value);
    }
  }
  return values;
}

// What the table means for whoever tuned the router: the tuned domains at a quarter of the experts under LRU.
std::string summary(const Comparison& comparison) {
  const ArmFigures* baseline = find_arm(comparison, kBaselineArm);
  const ArmFigures* control = find_arm(comparison, kControlArm);
  const ArmFigures* tuned = find_arm(comparison, kTunedArm);
  if (baseline == nullptr || tuned == nullptr) {
    return "";
  }
  const std::int64_t slots = std::max<std::int64_t>(1, comparison.num_experts / 4);
  std::string out;
  for (std::size_t i = 0; i < tuned->domains.size(); ++i) {
    const DomainFigures& now = tuned->domains[i];
    const DomainFigures& before = baseline->domains[i];
    const CacheFigures* loads_now = find_cache(now, "lru", slots);
    const CacheFigures* loads_before = find_cache(before, "lru", slots);
    std::string line = fmt::format("{}{}:", now.domain, now.tuned_domain ? "*" : "");
    if (loads_now != nullptr && loads_before != nullptr && loads_before->counts.loads > 0) {
      line +=
          fmt::format(" loads {:+.1f} % against baseline (LRU, {} slots),",
                      100.0 * (loads_now->loads_per_token_layer / loads_before->loads_per_token_layer - 1.0), slots);
      if (tuned->top_k != baseline->top_k) {
        line += fmt::format(" of {} instead of {} requests,", tuned->top_k, baseline->top_k);
      }
    }
    const QualityResult& reference = control != nullptr ? control->domains[i].quality : before.quality;
    line += fmt::format(" perplexity {:+.2f} % against {},",
                        100.0 * (now.quality.perplexity() / reference.perplexity() - 1.0),
                        control != nullptr ? "plain NLL tuning" : "baseline");
    line += fmt::format(" usage entropy {:.1f} % of the baseline's\n",
                        100.0 * now.usage.normalised_entropy / before.usage.normalised_entropy);
    out += line;
  }
  return out;
}

// Experts that a token of each router requests: "4", or "4 (baseline), 2 (tuned)".
std::string requested_text(const Comparison& comparison) {
  const auto same = [&](const ArmFigures& arm) { return arm.top_k == comparison.top_k; };
  if (std::all_of(comparison.arms.begin(), comparison.arms.end(), same)) {
    return std::to_string(comparison.top_k);
  }
  std::string text;
  for (const ArmFigures& arm : comparison.arms) {
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", arm.top_k, arm.name);
  }
  return text;
}

constexpr std::size_t kGap = 2;

struct Column {
  std::vector<std::string> cells;  // Head first.
  bool left = false;               // Texts stand left, numbers right.
  std::string group;               // Of the first column of a group: what stands over it.
};

std::size_t width_of(const Column& column) {
  std::size_t width = 0;
  for (const std::string& cell : column.cells) {
    width = std::max(width, cell.size());
  }
  return width;
}

// Columns as wide as their widest cell; a bar before every group, its label over it.
std::string aligned(const std::vector<Column>& columns) {
  std::vector<std::size_t> widths;
  std::string out;
  for (std::size_t i = 0; i < columns.size();) {
    const std::string& label = columns[i].group;
    const std::size_t first = i;
    std::size_t total = 0;
    do {
      widths.push_back(width_of(columns[i]));
      total += widths.back() + (i == 0 ? 0 : kGap);
      ++i;
    } while (i < columns.size() && columns[i].group.empty());
    if (total < label.size() + 2) {
      widths[first] += label.size() + 2 - total;
      total = label.size() + 2;
    }
    out += label.empty() ? std::string(total, ' ') : fmt::format(" |{:^{}}", label, total);
  }
  for (std::size_t row = 0; row < columns.front().cells.size(); ++row) {
    out += "\n";
    for (std::size_t i = 0; i < columns.size(); ++i) {
      const std::string& cell = columns[i].cells[row];
      out += columns[i].group.empty() ? "" : " |";
      out += std::string(i == 0 ? 0 : kGap, ' ');
      out += columns[i].left ? fmt::format("{:<{}}", cell, widths[i]) : fmt::format("{:>{}}", cell, widths[i]);
    }
  }
  return out + "\n";
}

constexpr double kPercent = 100.0;

// "43.2 +- 1.4" of a mean and its standard error, both in points.
std::string with_error(double value, double error, bool sign) {
  const std::string text = sign ? fmt::format("{:+.1f}", value) : fmt::format("{:.1f}", value);
  return std::isnan(error) ? text : fmt::format("{} +- {:.1f}", text, error);
}

}  // namespace

std::string task_table(const Comparison& comparison) {
  const ArmFigures* baseline = find_arm(comparison, kBaselineArm);
  const ArmFigures* control = find_arm(comparison, kControlArm);
  std::vector<Column> columns(6);
  const std::vector<std::string> heads = {"task", "router", "n", "right %", "by bytes %", "points on baseline"};
  for (std::size_t i = 0; i < columns.size(); ++i) {
    columns[i].cells.push_back(heads[i]);
    columns[i].left = i < 2;
  }
  if (control != nullptr) {
    columns.emplace_back().cells.emplace_back("points on control");
  }
  bool by_bytes = false;
  const std::vector<TaskFigures> tasks =
      comparison.arms.empty() ? std::vector<TaskFigures>() : comparison.arms.front().tasks;
  for (const TaskFigures& first : tasks) {
    for (const ArmFigures& arm : comparison.arms) {
      const TaskFigures* task = find_task(arm, first.name);
      if (task == nullptr) {
        continue;
      }
      const auto against = [&](const ArmFigures* other) {
        const TaskFigures* before = other == nullptr || other == &arm ? nullptr : find_task(*other, task->name);
        if (before == nullptr) {
          return std::string("-");
        }
        const TaskDifference difference = task_difference(*task, *before);
        return with_error(difference.points, difference.standard_error, true);
      };
      const bool choices = task->kind == "multiple_choice";
      by_bytes = by_bytes || choices;
      columns[0].cells.push_back(&arm == &comparison.arms.front() ? task->name : "");
      columns[1].cells.push_back(arm.name);
      columns[2].cells.push_back(std::to_string(task->outcomes.size()));
      columns[3].cells.push_back(with_error(kPercent * task->accuracy(), kPercent * task->standard_error(), false));
      columns[4].cells.push_back(
          choices ? with_error(kPercent * task->accuracy(true), kPercent * task->standard_error(true), false) : "-");
      columns[5].cells.push_back(against(baseline));
      if (control != nullptr) {
        columns[6].cells.push_back(against(control));
      }
    }
  }
  if (columns[0].cells.size() == 1) {
    return "";
  }
  if (!by_bytes) {
    columns.erase(columns.begin() + 4);
  }
  const std::string text = aligned(columns);
  return text.substr(text.find('\n') + 1) +  // no groups above these columns
         fmt::format("+- standard error{}; of points: of the differences example by example\n",
                     by_bytes ? "; by bytes: choices by likelihood per byte" : "");
}

std::string comparison_table(const Comparison& comparison) {
  if (comparison.arms.empty() || comparison.arms.front().domains.empty()) {
    return "";
  }
  const std::vector<CacheFigures>& cells = comparison.arms.front().domains.front().cache;
  const auto slots = distinct<std::int64_t>(cells, [](const CacheFigures& cell) { return cell.slots; });
  const auto policies = distinct<std::string>(cells, [](const CacheFigures& cell) { return cell.policy; });
  std::vector<Column> columns;
  const auto add = [&](const std::string& head, const auto& text) -> Column& {
    Column column;
    column.cells.push_back(head);
    for (std::size_t domain = 0; domain < comparison.arms.front().domains.size(); ++domain) {
      for (const ArmFigures& arm : comparison.arms) {
        column.cells.push_back(text(arm, arm.domains[domain]));
      }
    }
    columns.push_back(std::move(column));
    return columns.back();
  };
  const auto add_number = [&](const std::string& head, int digits, const auto& value) {
    add(head, [&](const ArmFigures& /*arm*/, const DomainFigures& figures) {
      return fmt::format("{:.{}f}", value(figures), digits);
    });
  };
  add("domain", [&](const ArmFigures& arm, const DomainFigures& figures) {
    return &arm == &comparison.arms.front() ? figures.domain + (figures.tuned_domain ? "*" : "") : std::string();
  }).left = true;
  add("router", [](const ArmFigures& arm, const DomainFigures& /*figures*/) { return arm.name; }).left = true;
  add_number("ppl", 3, [](const DomainFigures& figures) { return figures.quality.perplexity(); });
  add_number("bit/B", 3, [](const DomainFigures& figures) { return figures.quality.bits_per_byte(); });
  add_number("EOR", 3, [](const DomainFigures& figures) { return figures.expert_overlap_ratio; });
  add_number("dist.", 1, [](const DomainFigures& figures) { return figures.distinct_experts; });
  add_number("usageH", 3, [](const DomainFigures& figures) { return figures.usage.normalised_entropy; });
  const bool scoped = std::any_of(comparison.arms.begin(), comparison.arms.end(), [](const ArmFigures& arm) {
    return arm.residency && !arm.residency->scope.everywhere();
  });
  if (scoped) {
    add("scope", [](const ArmFigures& /*arm*/, const DomainFigures& figures) {
      return std::isfinite(figures.scope_share) ? fmt::format("{:.0f}%", 100.0 * figures.scope_share) : "-";
    });
  }
  const std::vector<StaticSetFigures>& static_sets = comparison.arms.front().domains.front().static_sets;
  for (const StaticSetFigures& of_first : static_sets) {
    const std::int64_t experts = of_first.experts;
    // Not measured under a residency rule, nor with as many experts by an arm whose K is another.
    add(fmt::format("ppl@{}", experts), [experts](const ArmFigures& /*arm*/, const DomainFigures& figures) {
      const auto found = std::find_if(figures.static_sets.begin(), figures.static_sets.end(),
                                      [experts](const StaticSetFigures& set) { return set.experts == experts; });
      return found == figures.static_sets.end() ? "-" : fmt::format("{:.3f}", found->quality.perplexity());
    });
  }
  for (const std::int64_t count : slots) {
    const std::size_t first = columns.size();
    for (const std::string& policy : policies) {
      add(policy, [&](const ArmFigures& /*arm*/, const DomainFigures& figures) {
        const CacheFigures* cache = find_cache(figures, policy, count);
        return fmt::format("{:.2f} {:3.0f}%", cache->loads_per_token_layer, 100.0 * cache->counts.hit_rate());
      });
    }
    add_number("KiB/tok", 1, [&](const DomainFigures& figures) {
      return find_cache(figures, policies.front(), count)->bytes_per_token / 1024.0;
    });
    columns[first].group = fmt::format("{} slots: loads, hit rate", count);
  }
  std::string out = aligned(columns);
  if (!policies.empty()) {
    out += fmt::format(
        "* tuned on. loads per token and layer, of {} requested; KiB per token (modelled) under {}; EOR expert overlap "
        "ratio; dist. distinct experts per sequence and layer; usageH entropy of mean expert usage{}{}{}\n\n",
        requested_text(comparison), policies.front(),
        scoped ? "; scope share of tokens and layers that the rule took for text that it is for" : "",
        static_sets.empty() ? "" : "; ppl@C when each layer has only the C experts that the domain uses most",
        comparison.split == "train" ? "; on training text" : "");
  }
  return out + summary(comparison);
}

}  // namespace hestia
