#include <algorithm>
#include <cmath>
#include <memory>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/random.hpp"
#include "hestia/evaluation/task_scores.hpp"
#include "hestia/model/residency_selector.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_data;
using hestia::testing::tiny_model;

namespace {

// `prompt` tokens are not counted.
torch::Tensor logits_alone(MoeModel& model, const std::vector<std::int32_t>& tokens, std::size_t prompt = 0) {
  const torch::NoGradGuard no_grad;
  const auto length = static_cast<std::int64_t>(tokens.size());
  const torch::Tensor ids = torch::tensor(std::vector<std::int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
  const ModelOutput output =
      model->forward({ids, torch::arange(length).unsqueeze(0), torch::zeros({1, length}, torch::kInt64),
                      torch::arange(length).ge(static_cast<std::int64_t>(prompt)).to(torch::kInt64).unsqueeze(0)});
  return model->head(output.hidden_BSD)[0].to(torch::kFloat64);
}

// Sum of log p over completion tokens, one at a time.
double likelihood_alone(MoeModel& model, const TokenSequence& sequence) {
  const torch::Tensor log_p = torch::log_softmax(logits_alone(model, sequence.tokens), -1);
  const std::vector<std::uint8_t> completion = sequence.completion_mask();
  double sum = 0.0;
  for (std::size_t t = 1; t < sequence.tokens.size(); ++t) {
    if (completion[t] != 0) {
      sum += log_p[static_cast<std::int64_t>(t) - 1][sequence.tokens[t]].item<double>();
    }
  }
  return sum;
}

// The whole text again for every token, no cache.
std::vector<std::int32_t> continued_alone(MoeModel& model, const AnswerExample& example, std::int64_t max_new_tokens) {
  std::vector<std::int32_t> tokens = example.prompt;
  std::vector<std::int32_t> chosen;
  while (static_cast<std::int64_t>(chosen.size()) < max_new_tokens) {
    const torch::Tensor logits =
        logits_alone(model, tokens, example.prompt.size())[static_cast<std::int64_t>(tokens.size()) - 1].contiguous();
    const double* first = logits.data_ptr<double>();
    const auto token = static_cast<std::int32_t>(std::max_element(first, first + logits.numel()) - first);
    if (std::find(example.ends.begin(), example.ends.end(), token) != example.ends.end()) {
      break;
    }
    tokens.push_back(token);
    chosen.push_back(token);
  }
  return chosen;
}

std::vector<AnswerExample> random_prompts(std::uint64_t seed, std::size_t count) {
  SplitMix64 random(seed);
  std::vector<AnswerExample> examples(count);
  for (std::size_t i = 0; i < count; ++i) {
    examples[i].id = std::to_string(i);
    examples[i].prompt.resize(1 + random.below(13));
    for (std::int32_t& token : examples[i].prompt) {
      token = static_cast<std::int32_t>(random.below(48));
    }
    for (std::int32_t end = 0; end < 48; ++end) {
      if (random.uniform() < 0.08) {
        examples[i].ends.push_back(end);
      }
    }
  }
  return examples;
}

// Sequences with prompts, some of them with a second question.
std::vector<TokenSequence> random_examples(std::uint64_t seed, std::int64_t count) {
  SplitMix64 random(seed);
  std::vector<TokenSequence> sequences = tiny_data(seed, count, 30).sequences;
  for (TokenSequence& sequence : sequences) {
    const auto length = static_cast<std::int64_t>(sequence.tokens.size());
    sequence.num_prompt_tokens = 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(length - 1)));
    if (sequence.num_prompt_tokens + 4 < length && random.uniform() < 0.5) {
      sequence.later_prompts = {{sequence.num_prompt_tokens + 1, sequence.num_prompt_tokens + 3}};
    }
  }
  return sequences;
}

}  // namespace

TEST_CASE("the answer of a text is what follows the mark on its line, or all of it") {
  CHECK(extract_answer("  She has 3 + 4 = 7.\n#### 7 \nQuestion: ...\n#### 8", "####") == "7");
  CHECK(extract_answer("#### 1,200", "####") == "1,200");
  CHECK(extract_answer("the end: yes\r\n", "end:") == "yes");
  CHECK(extract_answer(" \n two words \t\n", "") == "two words");
  CHECK_FALSE(extract_answer("7", "####"));
  CHECK_FALSE(extract_answer("#### \n7", "####"));
  CHECK_FALSE(extract_answer("7 ####", "####"));
  CHECK_FALSE(extract_answer(" \n", ""));
  CHECK_FALSE(extract_answer("", ""));
}

TEST_CASE("numbers are the same however they are written, other answers only to the letter") {
  for (const char* same : {"1200", "1,200", "$1,200", "1200.", "$1200.00", "+1200", "01200.0", "1,200.000."}) {
    INFO(same);
    CHECK(same_answer(same, "1200"));
    CHECK(same_answer("1,200.", same));
    CHECK_FALSE(same_answer(same, "-1200"));
    CHECK_FALSE(same_answer(same, "1200.5"));
    CHECK_FALSE(same_answer(same, "12000"));
  }
  CHECK(same_answer(".5", "0.50"));
  CHECK(same_answer("-0", "0.0"));
  CHECK(same_answer("-$3", "-3"));
  CHECK_FALSE(same_answer("123456789012345678901", "123456789012345678902"));
  CHECK(same_answer("No", "No"));
  CHECK_FALSE(same_answer("No", "no"));
  CHECK_FALSE(same_answer("No.", "No"));
  CHECK_FALSE(same_answer("12 apples", "12"));
  CHECK_FALSE(same_answer("1.2.3", "1.23"));
  CHECK_FALSE(same_answer("$", ""));
  CHECK_FALSE(same_answer(",", "."));
  SplitMix64 random(5);
  for (int i = 0; i < 200; ++i) {
    const std::uint64_t whole = random.below(1000000);
    const std::uint64_t other = random.below(1000000);
    const std::string spelt =
        whole < 1000 ? fmt::format("${}.0", whole) : fmt::format("{},{:03}.", whole / 1000, whole % 1000);
    CHECK(same_answer(spelt, std::to_string(whole)));
    CHECK(same_answer(spelt, std::to_string(other)) == (whole == other));
  }
}

TEST_CASE("likelihoods of completions are those of a plain loop, whatever runs beside them") {
  at::set_num_threads(1);
  MoeModel model = tiny_model(5);
  const std::vector<TokenSequence> sequences = random_examples(41, 23);
  std::vector<double> expected;
  for (const TokenSequence& sequence : sequences) {
    expected.push_back(likelihood_alone(model, sequence));
  }
  for (const std::int64_t rows : {1, 3, 64}) {
    std::int64_t seen = 0;
    const std::vector<double> sums =
        completion_log_likelihoods(model, sequences, rows, [&](std::int64_t count) { seen += count; });
    REQUIRE(sums.size() == sequences.size());
    CHECK(seen == 23);
    for (std::size_t i = 0; i < sums.size(); ++i) {
      CHECK(sums[i] == Approx(expected[i]).epsilon(1e-5));
    }
  }
}

TEST_CASE("under a residency rule each choice meets a cache of its own") {
  at::set_num_threads(1);
  MoeModel model = tiny_model(6);
  const std::vector<TokenSequence> sequences = random_examples(43, 15);
  const std::vector<double> plain = completion_log_likelihoods(model, sequences, 4);
  ResidencyRule rule;
  rule.lambda = 0.5;
  rule.always_keep = 0;
  rule.slots = 3;
  rule.logit_range = {2.0F, 2.5F};
  model->set_selector(std::make_shared<ResidencySelector>(rule));
  const std::vector<double> alone = completion_log_likelihoods(model, sequences, 1);
  const std::vector<double> together = completion_log_likelihoods(model, sequences, 8);
  double moved = 0.0;
  for (std::size_t i = 0; i < alone.size(); ++i) {
    CHECK(together[i] == Approx(alone[i]).epsilon(1e-5));
    moved = std::max(moved, std::abs(alone[i] - plain[i]));
  }
  CHECK(moved > 1e-2);
}

TEST_CASE("the most likely choice counts, by sum and by byte") {
  at::set_num_threads(1);
  MoeModel model = tiny_model(7);
  SplitMix64 random(8);
  TaskExamples task;
  task.options.name = "choices";
  task.options.kind = "multiple_choice";
  task.options.batch = 5;
  const std::vector<TokenSequence> sequences = random_examples(47, 60);
  std::vector<std::pair<bool, bool>> expected;
  for (std::size_t first = 0; first < sequences.size();) {
    ChoiceExample example;
    example.id = std::to_string(first);
    const std::size_t count = std::min<std::size_t>(2 + random.below(4), sequences.size() - first);
    std::size_t best = 0;
    std::size_t best_by_bytes = 0;
    std::vector<double> sums;
    for (std::size_t i = 0; i < count; ++i) {
      example.choices.push_back(sequences[first + i]);
      example.bytes.push_back(static_cast<std::int64_t>(1 + random.below(40)));
      sums.push_back(likelihood_alone(model, sequences[first + i]));
      best = sums[i] > sums[best] ? i : best;
      best_by_bytes = sums[i] / static_cast<double>(example.bytes[i]) >
                              sums[best_by_bytes] / static_cast<double>(example.bytes[best_by_bytes])
                          ? i
                          : best_by_bytes;
    }
    first += count;
    example.right = static_cast<std::int64_t>(random.below(count));
    expected.emplace_back(best == static_cast<std::size_t>(example.right),
                          best_by_bytes == static_cast<std::size_t>(example.right));
    task.choices.push_back(std::move(example));
  }
  const auto tokenizer = open_tokenizer(std::filesystem::path(HESTIA_SOURCE_DIR) / "checkpoints/tiny");
  const TaskFigures figures = measure_task(model, *tokenizer, task, "choices", true);
  REQUIRE(figures.outcomes.size() == expected.size());
  double right = 0.0;
  double right_by_bytes = 0.0;
  bool differ = false;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(figures.outcomes[i].right == expected[i].first);
    CHECK(figures.outcomes[i].right_by_bytes == expected[i].second);
    CHECK(figures.outcomes[i].id == task.choices[i].id);
    right += expected[i].first ? 1.0 : 0.0;
    right_by_bytes += expected[i].second ? 1.0 : 0.0;
    differ = differ || expected[i].first != expected[i].second;
  }
  CHECK(differ);
  const auto n = static_cast<double>(expected.size());
  CHECK(figures.accuracy() == Approx(right / n));
  CHECK(figures.accuracy(true) == Approx(right_by_bytes / n));
}

TEST_CASE("prompts of unequal length are continued as each is alone") {
  at::set_num_threads(1);
  MoeModel model = create_model(hestia::testing::tiny_architecture(GENERATE("olmoe", "deepseek_v2", "gpt_oss")),
                                torch::kFloat64, torch::kCPU, 9);
  const std::vector<AnswerExample> examples = random_prompts(53, 11);
  constexpr std::int64_t kMost = 9;
  std::vector<std::vector<std::int32_t>> expected;
  std::size_t full = 0;
  for (const AnswerExample& example : examples) {
    expected.push_back(continued_alone(model, example, kMost));
    full += expected.back().size() == kMost ? 1 : 0;
  }
  CHECK(full > 0);
  CHECK(full < examples.size());  // some end before
  for (const std::int64_t rows : {1, 3, 32}) {
    INFO("rows " << rows);
    std::int64_t seen = 0;
    GreedyOptions options;
    options.max_new_tokens = kMost;
    options.rows = rows;
    CHECK(greedy_continuations(model, examples, options, [&](std::int64_t count) { seen += count; }) == expected);
    CHECK(seen == 11);
  }
}

TEST_CASE("what is written under a residency rule is chosen by the rule from the first token of the answer on") {
  at::set_num_threads(1);
  Architecture architecture = hestia::testing::tiny_architecture();
  architecture.normalise_top_k = false;  // so that preserved mass scales weights
  MoeModel model = create_model(architecture, torch::kFloat64, torch::kCPU, 14);
  const std::vector<AnswerExample> examples = random_prompts(83, 9);
  GreedyOptions options;
  options.max_new_tokens = 12;
  options.rows = GENERATE(1, 4);
  const std::vector<std::vector<std::int32_t>> plain = greedy_continuations(model, examples, options);
  ResidencyRule rule;
  rule.score = GENERATE(ResidencyScore::kLogit, ResidencyScore::kWeight, ResidencyScore::kRoot);
  rule.preserve_mass = GENERATE(false, true);
  rule.lambda = 0.6;
  rule.always_keep = 0;
  rule.slots = 3;
  rule.logit_range = {2.0F, 2.5F};
  if (GENERATE(false, true)) {
    rule.scope.domains = {"alpha"};
    rule.scope.elsewhere = 0.1;
    rule.scope.window = 3;
    rule.scope.weights = {{1, -1, 0.5F, 0, 0, -0.5F, 1, -1}, {0, 1, -1, 1, -1, 0, 0.5F, -0.5F}};
    rule.scope.offsets = {0.0F, 0.1F};
  }
  const auto selector = std::make_shared<ResidencySelector>(rule);
  model->set_selector(selector);
  std::vector<std::vector<std::int32_t>> expected;
  for (const AnswerExample& example : examples) {
    expected.push_back(continued_alone(model, example, 12));
  }
  CHECK(expected != plain);
  CHECK(greedy_continuations(model, examples, options) == expected);
  CHECK(model->selector() == selector);
}

TEST_CASE("a continuation that says enough ends soon after, and its neighbours go on") {
  at::set_num_threads(1);
  MoeModel model = tiny_model(10);
  std::vector<AnswerExample> examples = random_prompts(59, 4);
  for (AnswerExample& example : examples) {
    example.ends.clear();
  }
  GreedyOptions options;
  options.max_new_tokens = 40;
  const std::vector<std::vector<std::int32_t>> whole = greedy_continuations(model, examples, options);
  const std::vector<std::int32_t> stopped(whole[2].begin(), whole[2].begin() + 8);
  options.enough = [&](const std::vector<std::int32_t>& tokens) {
    return std::equal(stopped.begin(), stopped.end(), tokens.begin());
  };
  const std::vector<std::vector<std::int32_t>> cut = greedy_continuations(model, examples, options);
  CHECK(cut[2] == stopped);
  for (const std::size_t i : {0, 1, 3}) {
    CHECK((cut[i] == whole[i] || cut[i] == stopped));
    CHECK(whole[i].size() == 40);
  }
}

TEST_CASE("logits that are no numbers end a task with the example's name") {
  MoeModel model = tiny_model(11);
  const torch::NoGradGuard no_grad;
  model->head_weight().detach().fill_(std::nan(""));
  CHECK_THROWS_WITH(greedy_continuations(model, random_prompts(61, 1), {}),
                    Catch::StartsWith("0: the logits") && Catch::Contains("not finite"));
  TaskExamples task;
  task.options.name = "choices";
  task.options.kind = "multiple_choice";
  ChoiceExample example;
  example.id = "line 7";
  example.choices = random_examples(62, 2);
  example.bytes = {3, 4};
  task.choices = {example};
  const auto tokenizer = open_tokenizer(std::filesystem::path(HESTIA_SOURCE_DIR) / "checkpoints/tiny");
  CHECK_THROWS_WITH(measure_task(model, *tokenizer, task, "choices", true),
                    Catch::StartsWith("line 7: the likelihoods") && Catch::Contains("not finite"));
}

TEST_CASE("accuracies are compared example by example") {
  SplitMix64 random(12);
  TaskFigures before;
  TaskFigures now;
  std::vector<double> differences;
  for (int i = 0; i < 37; ++i) {
    TaskOutcome outcome;
    outcome.id = std::to_string(i);
    outcome.right = random.uniform() < 0.4;
    before.outcomes.push_back(outcome);
    outcome.right = random.uniform() < 0.7;
    now.outcomes.push_back(outcome);
    differences.push_back(double(now.outcomes.back().right) - double(before.outcomes.back().right));
  }
  double mean = 0.0;
  for (const double difference : differences) {
    mean += difference / 37.0;
  }
  double variance = 0.0;
  for (const double difference : differences) {
    variance += (difference - mean) * (difference - mean) / 36.0;
  }
  const TaskDifference difference = task_difference(now, before);
  CHECK(difference.points == Approx(100.0 * (now.accuracy() - before.accuracy())));
  CHECK(difference.points == Approx(100.0 * mean));
  CHECK(difference.standard_error == Approx(100.0 * std::sqrt(variance / 37.0)));
  const double p = now.accuracy();
  CHECK(now.standard_error() == Approx(std::sqrt(p * (1.0 - p) / 36.0)));
  CHECK(task_difference(now, now).points == 0.0);
  CHECK(task_difference(now, now).standard_error == 0.0);
  CHECK(std::isnan(TaskFigures{}.accuracy()));
  now.outcomes.back().id = "other";
  CHECK_THROWS_AS(task_difference(now, before), std::invalid_argument);
}

TEST_CASE("the CUDA model answers and weighs choices as the CPU's", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  at::set_num_threads(1);
  MoeModel host = tiny_model(13);
  MoeModel device = tiny_model(13, torch::kFloat32, torch::kCUDA);
  const std::vector<AnswerExample> examples = random_prompts(67, 19);
  GreedyOptions options;
  options.max_new_tokens = 9;
  options.rows = 5;
  CHECK(greedy_continuations(device, examples, options) == greedy_continuations(host, examples, options));
  const std::vector<TokenSequence> sequences = random_examples(71, 21);
  const std::vector<double> expected = completion_log_likelihoods(host, sequences, 8);
  const std::vector<double> found = completion_log_likelihoods(device, sequences, 8);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(found[i] == Approx(expected[i]).epsilon(1e-4));
  }
}
