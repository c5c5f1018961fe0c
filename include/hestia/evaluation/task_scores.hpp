#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

/// The answer that a text gives: what follows the first `after` on its line, or with an empty `after` all of it; white
/// space at both ends removed. nullopt when `after` is not there or nothing follows it.
[[nodiscard]] std::optional<std::string> extract_answer(const std::string& text, const std::string& after);
/// Whether two answers are the same text, or the same number once commas, dollar signs and a dot at the end are
/// removed: `$1,200.` and `1200.00`.
[[nodiscard]] bool same_answer(const std::string& one, const std::string& other);

/// A prompt to continue, and what is expected.
struct AnswerExample {
  std::string id;
  std::vector<std::int32_t> prompt;  ///< As an example of the same corpus has it in training, never cut.
  std::vector<std::int32_t> ends;    ///< Tokens that end an answer, each on its own.
  std::string answer;                ///< What extract_answer takes from the reference.
};

/// A question with the choices that are weighed.
struct ChoiceExample {
  std::string id;
  std::vector<TokenSequence> choices;  ///< The prompt and one choice each.
  std::vector<std::int64_t> bytes;     ///< Of each choice's text.
  std::int64_t right = 0;
};

/// The examples of one entry of `evaluate.tasks`: of its kind, the other list is empty.
struct TaskExamples {
  TaskOptions options;
  std::vector<AnswerExample> answers;
  std::vector<ChoiceExample> choices;
};

/// Reads entry `index` of the recipe's `evaluate.tasks`. Throws what read_corpus, check_template_tokens and
/// read_choice_questions throw, InputError, with the document, for a reference without an answer and when there is no
/// example, UsageError, with the place in the recipe, when prompt and continuation do not fit the model's positions.
[[nodiscard]] TaskExamples load_task(const LoadedRecipe<FinetuneRecipe>& loaded, std::size_t index,
                                     const Tokenizer& tokenizer, const Architecture& architecture);

/// How prompts are continued.
struct GreedyOptions {
  std::int64_t max_new_tokens = 256;
  std::int64_t rows = 32;  ///< Prompts that run together, those of similar length.
  /// Asked about the tokens of a continuation every few of them: true ends it there. May be empty.
  std::function<bool(const std::vector<std::int32_t>&)> enough;
};

/// Continues every prompt token by token with the highest logit, ties to the lower id, through the model's key-value
/// cache: without the token that ended it, at most max_new_tokens each. Prompts of unequal length run in step: the
/// longer ones feed their own tokens where the shorter ones feed what they chose. `progress` is told of finished
/// prompts. A ResidencySelector chooses as it would for the whole text: prompts by z alone, what is written by the
/// rule. Throws RunError when logits are not finite.
[[nodiscard]] std::vector<std::vector<std::int32_t>> greedy_continuations(
    MoeModel& model, const std::vector<AnswerExample>& examples, const GreedyOptions& options,
    const std::function<void(std::int64_t)>& progress = {});

/// Sum over a sequence's completion tokens of log p(token | what is before it), nats, for each sequence; `rows` of
/// similar length run together, each alone in its row. Without gradient, under the selector that the model has.
/// `progress` is told of finished sequences.
[[nodiscard]] std::vector<double> completion_log_likelihoods(MoeModel& model,
                                                             const std::vector<TokenSequence>& sequences,
                                                             std::int64_t rows,
                                                             const std::function<void(std::int64_t)>& progress = {});

/// What became of one example.
struct TaskOutcome {  // NOLINT(bugprone-exception-escape): the check takes Json's move for one that throws
  std::string id;
  bool right = false;
  bool right_by_bytes = false;  ///< multiple_choice: by log-likelihood per byte of the choice.
  Json detail;                  ///< What was answered and what was expected.
};

/// One router on one task.
struct TaskFigures {
  std::string name;
  std::string kind;
  std::vector<TaskOutcome> outcomes;
  /// Share of right outcomes; by bytes for multiple_choice only. NaN without outcomes.
  [[nodiscard]] double accuracy(bool by_bytes = false) const;
  /// Standard error of that mean, sqrt(p (1 - p) / (n - 1)); NaN below two outcomes.
  [[nodiscard]] double standard_error(bool by_bytes = false) const;
};

/// Accuracy of `now` less that of `before` in points (0.01), example by example, with its standard error.
struct TaskDifference {
  double points = 0.0;
  double standard_error = 0.0;  ///< Of the paired differences; NaN below two examples.
};
/// Throws std::invalid_argument for figures of other examples.
[[nodiscard]] TaskDifference task_difference(const TaskFigures& now, const TaskFigures& before, bool by_bytes = false);

/// Has whatever `model` holds now do a task. `label` names the progress bar.
[[nodiscard]] TaskFigures measure_task(MoeModel& model, const Tokenizer& tokenizer, const TaskExamples& task,
                                       const std::string& label, bool quiet);

}  // namespace hestia
