#include "hestia/evaluation/task_scores.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/data/choice_questions.hpp"
#include "hestia/data/corpus.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/measure.hpp"

namespace hestia {

namespace {

constexpr const char* kExactMatch = "exact_match";
constexpr const char* kSpace = " \t\r\n\f\v";
constexpr std::size_t kTokensPerLook = 8;  // Between two looks for a stop.

std::string stripped(const std::string& text) {
  const std::size_t first = text.find_first_not_of(kSpace);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

// Sign, digits and fraction without what does not change the value; nullopt for what is no number.
std::optional<std::string> plain_number(const std::string& answer) {
  std::string text;
  std::copy_if(answer.begin(), answer.end(), std::back_inserter(text), [](char c) { return c != ',' && c != '$'; });
  if (!text.empty() && text.back() == '.') {
    text.pop_back();
  }
  std::string sign;
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
    sign = text.front() == '-' ? "-" : "";
    text.erase(0, 1);
  }
  const std::size_t dot = std::min(text.find('.'), text.size());
  std::string whole = text.substr(0, dot);
  std::string fraction = dot < text.size() ? text.substr(dot + 1) : "";
  if ((whole + fraction).empty() || !std::all_of(whole.begin(), whole.end(), is_digit) ||
      !std::all_of(fraction.begin(), fraction.end(), is_digit)) {
    return std::nullopt;
  }
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  fraction.resize(fraction.find_last_not_of('0') + 1);
  if ((whole + fraction).empty()) {
    return "0";
  }
  return fmt::format("{}{}.{}", sign, whole, fraction);
}

// Indices by growing length, equal ones in their order.
std::vector<std::size_t> by_length(std::size_t count, const std::function<std::size_t(std::size_t)>& length) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return length(a) < length(b); });
  return order;
}

torch::Tensor rows_of(const std::vector<std::int64_t>& values, std::int64_t rows, torch::Device device) {
  return torch::tensor(values, torch::kInt64).view({rows, -1}).to(device);
}

// A residency rule for tokens that come call by call: it is given all of each row again, and its last choices count.
class HistorySelector : public Selector {
 public:
  explicit HistorySelector(std::shared_ptr<Selector> rule) : rule_(std::move(rule)) {}

  [[nodiscard]] bool preserves_mass(std::int64_t moe_layer, std::int64_t top_k) const override {
    return rule_->preserves_mass(moe_layer, top_k);
  }

  torch::Tensor select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t moe_layer,
                       const TokenBatch& batch) override {
    const std::int64_t rows = batch.counted_BS.size(0);
    const std::int64_t length = batch.counted_BS.size(1);
    if (moe_layer == 0) {
      all_.counted_BS =
          all_.counted_BS.defined() ? torch::cat({all_.counted_BS, batch.counted_BS}, 1) : batch.counted_BS;
      all_.sequence_ids_BS = torch::zeros_like(all_.counted_BS);
    }
    if (static_cast<std::size_t>(moe_layer) == logits_BTE_.size()) {
      logits_BTE_.emplace_back();
    }
    torch::Tensor& kept_BTE = logits_BTE_.at(static_cast<std::size_t>(moe_layer));
    const torch::Tensor new_BSE = logits_TE.detach().view({rows, length, -1});
    kept_BTE = kept_BTE.defined() ? torch::cat({kept_BTE, new_BSE}, 1) : new_BSE;
    const std::int64_t total = kept_BTE.size(1);
    return rule_->select(kept_BTE.reshape({rows * total, -1}), top_k, moe_layer, all_)
        .view({rows, total, -1})
        .narrow(1, total - length, length)
        .reshape({rows * length, -1});
  }

 private:
  std::shared_ptr<Selector> rule_;
  TokenBatch all_;                         // Without tokens and positions, which no rule looks at.
  std::vector<torch::Tensor> logits_BTE_;  // Of each MoE layer.
};

// A selector for as long as this lives, then the one before again.
class SelectorFor {
 public:
  SelectorFor(MoeModel& model, std::shared_ptr<Selector> selector) : model_(model), before_(model->selector()) {
    model->set_selector(std::move(selector));
  }
  SelectorFor(const SelectorFor&) = delete;
  SelectorFor& operator=(const SelectorFor&) = delete;
  SelectorFor(SelectorFor&&) = delete;
  SelectorFor& operator=(SelectorFor&&) = delete;
  ~SelectorFor() { model_->set_selector(before_); }

 private:
  MoeModel& model_;
  std::shared_ptr<Selector> before_;
};

// Prompts that run together, in step.
class GreedyGroup {
 public:
  GreedyGroup(MoeModel& model, std::vector<const AnswerExample*> examples, const GreedyOptions& options)
      : model_(model),
        examples_(std::move(examples)),
        options_(options),
        rows_(static_cast<std::int64_t>(examples_.size())),
        cache_(longest() + options.max_new_tokens),
        chosen_(examples_.size()),
        done_(examples_.size(), 0),
        continuations_(examples_.size()) {}

  std::vector<std::vector<std::int32_t>> run() {
    const torch::NoGradGuard no_grad;
    std::optional<SelectorFor> selector;
    if (std::dynamic_pointer_cast<ResidencySelector>(model_->selector()) != nullptr) {
      selector.emplace(model_, std::make_shared<HistorySelector>(model_->selector()));
    }
    const std::size_t shortest = examples_.front()->prompt.size();
    std::vector<std::int64_t> tokens;
    for (const AnswerExample* example : examples_) {
      tokens.insert(tokens.end(), example->prompt.begin(),
                    example->prompt.begin() + static_cast<std::ptrdiff_t>(shortest));
    }
    feed(tokens);
    while (!take_chosen()) {
      feed(chosen_);
    }
    return std::move(continuations_);
  }

 private:
  [[nodiscard]] std::int64_t longest() const { return static_cast<std::int64_t>(examples_.back()->prompt.size()); }

  // The next tokens of all rows, [rows, length]; then what each would choose.
  void feed(const std::vector<std::int64_t>& tokens) {
    const torch::Tensor tokens_BS = rows_of(tokens, rows_, model_->device());
    const std::int64_t length = tokens_BS.size(1);
    const torch::Tensor positions_BS =
        torch::arange(cache_.length(), cache_.length() + length, tokens_BS.options()).expand_as(tokens_BS).contiguous();
    std::vector<std::int64_t> counted;
    for (const AnswerExample* example : examples_) {
      for (std::int64_t place = cache_.length(); place < cache_.length() + length; ++place) {
        counted.push_back(place < static_cast<std::int64_t>(example->prompt.size()) ? 0 : 1);
      }
    }
    const ModelOutput output = model_->forward(
        {tokens_BS, positions_BS, torch::zeros_like(tokens_BS), rows_of(counted, rows_, model_->device())}, cache_);
    const torch::Tensor logits_BV = model_->head(output.hidden_BSD.select(1, length - 1)).to(torch::kFloat32);
    const std::int64_t vocabulary = logits_BV.size(1);
    const torch::Tensor ids_V = torch::arange(vocabulary, tokens_BS.options());
    const torch::Tensor next_B =
        torch::where(logits_BV.eq(logits_BV.amax(1, /*keepdim=*/true)), ids_V, torch::full_like(ids_V, vocabulary))
            .amin(1)
            .to(torch::kCPU);
    for (std::size_t row = 0; row < chosen_.size(); ++row) {
      chosen_[row] = next_B[static_cast<std::int64_t>(row)].item<std::int64_t>();
      if (chosen_[row] == vocabulary) {
        throw RunError(fmt::format("{}: the logits after {} tokens are not finite; check the model's weights",
                                   examples_[row]->id, cache_.length()));
      }
    }
  }

  // Rows inside their prompt go on with it, the others keep what they chose. True when all are done.
  bool take_chosen() {
    const auto place = static_cast<std::size_t>(cache_.length());
    bool all_done = true;
    for (std::size_t row = 0; row < examples_.size(); ++row) {
      const AnswerExample& example = *examples_[row];
      if (place < example.prompt.size()) {
        chosen_[row] = example.prompt[place];
      } else if (done_[row] == 0) {
        std::vector<std::int32_t>& tokens = continuations_[row];
        const auto token = static_cast<std::int32_t>(chosen_[row]);
        const bool ended = std::find(example.ends.begin(), example.ends.end(), token) != example.ends.end();
        if (!ended) {
          tokens.push_back(token);
        }
        const bool look = options_.enough && tokens.size() % kTokensPerLook == 0;
        const bool full = static_cast<std::int64_t>(tokens.size()) == options_.max_new_tokens;
        done_[row] = ended || full || (look && options_.enough(tokens)) ? 1 : 0;
      }
      all_done = all_done && done_[row] != 0;
    }
    return all_done;
  }

  MoeModel& model_;
  std::vector<const AnswerExample*> examples_;  // By growing length of the prompt.
  const GreedyOptions& options_;
  std::int64_t rows_;
  KeyValueCache cache_;
  std::vector<std::int64_t> chosen_;
  std::vector<std::uint8_t> done_;
  std::vector<std::vector<std::int32_t>> continuations_;
};

// One sequence a row, padded behind.
struct PaddedBatch {
  TokenBatch batch;
  torch::Tensor labels_BS;
};

PaddedBatch padded(const std::vector<const TokenSequence*>& sequences, torch::Device device) {
  const auto rows = static_cast<std::int64_t>(sequences.size());
  const std::size_t length = sequences.back()->tokens.size();
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> positions;
  std::vector<std::int64_t> ids;
  std::vector<std::int64_t> counted;
  std::vector<std::int64_t> labels;
  constexpr std::int64_t kNoLabel = -100;
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    const TokenSequence& sequence = *sequences[row];
    const std::vector<std::uint8_t> completion = sequence.completion_mask();
    for (std::size_t t = 0; t < length; ++t) {
      const bool inside = t < sequence.tokens.size();
      tokens.push_back(inside ? sequence.tokens[t] : 0);
      positions.push_back(inside ? static_cast<std::int64_t>(t) : 0);
      ids.push_back(inside ? static_cast<std::int64_t>(row) : -1);
      counted.push_back(inside && completion[t] != 0 ? 1 : 0);
      const bool labelled = t + 1 < sequence.tokens.size() && completion[t + 1] != 0;
      labels.push_back(labelled ? sequence.tokens[t + 1] : kNoLabel);
    }
  }
  return {{rows_of(tokens, rows, device), rows_of(positions, rows, device), rows_of(ids, rows, device),
           rows_of(counted, rows, device)},
          rows_of(labels, rows, device)};
}

void load_answers(const LoadedRecipe<FinetuneRecipe>& loaded, const std::string& key, const Tokenizer& tokenizer,
                  const Architecture& architecture, TaskExamples& task) {
  const DataOptions& data = loaded.recipe.data;
  const TaskOptions& options = task.options;
  const auto [corpus, corpus_key] = find_corpus(data, options.domain);
  check_template_tokens(*corpus, corpus_key, tokenizer);
  const SplitOptions split{options.split == "all" ? 0.0 : data.held_out_fraction,
                           static_cast<std::uint64_t>(data.split_seed)};
  for (const Document& document :
       read_corpus(*corpus, split, options.split == "held_out" ? Split::kHeldOut : Split::kTrain, corpus_key)) {
    if (options.limit > 0 && static_cast<std::int64_t>(task.answers.size()) == options.limit) {
      break;
    }
    AnswerExample example;
    example.id = document.id;
    const std::string reference = document.first_answer();
    const std::optional<std::string> answer = extract_answer(reference, options.answer_after);
    if (!answer) {
      throw InputError(
          options.answer_after.empty()
              ? fmt::format("{} of domain \"{}\": the answer is empty; remove this line", document.id, options.domain)
              : fmt::format(
                    "{} of domain \"{}\": no answer follows \"{}\", got \"...{}\"; mend this line or {}.answer_after",
                    document.id, options.domain, options.answer_after,
                    reference.substr(reference.size() - std::min<std::size_t>(reference.size(), 40)), key));
    }
    example.answer = *answer;
    ChatPrompt prompt = answer_prompt(document, tokenizer);
    example.prompt = std::move(prompt.tokens);
    example.ends = std::move(prompt.ends);
    if (tokenizer.eos_id() >= 0) {
      example.ends.push_back(tokenizer.eos_id());
    }
    if (example.prompt.empty()) {
      throw InputError(fmt::format("{} of domain \"{}\": there is nothing before the answer; remove this line",
                                   document.id, options.domain));
    }
    const std::int64_t length = static_cast<std::int64_t>(example.prompt.size()) + options.max_new_tokens;
    if (length > architecture.max_position_embeddings) {
      throw UsageError(fmt::format(
          "{}: {}.max_new_tokens must leave prompt and continuation within the model's {} positions, got {} behind the "
          "{} tokens of {}",
          loaded.source.location(key + ".max_new_tokens"), key, architecture.max_position_embeddings,
          options.max_new_tokens, example.prompt.size(), document.id));
    }
    task.answers.push_back(std::move(example));
  }
  if (task.answers.empty()) {
    throw InputError(fmt::format(
        "{}: the {} documents of domain \"{}\" hold no example; add files or change {}.split or data.held_out_fraction",
        loaded.source.location(key), options.split, options.domain, key));
  }
}

void load_choices(const LoadedRecipe<FinetuneRecipe>& loaded, const std::string& key, const Tokenizer& tokenizer,
                  const Architecture& architecture, TaskExamples& task) {
  for (const ChoiceQuestion& question : read_choice_questions(task.options.choices, task.options.limit, key)) {
    ChoiceExample example;
    example.id = question.id;
    example.right = question.right;
    const bool apart = std::string(kSpace).find(question.prompt.back()) != std::string::npos;
    std::vector<Document> documents;
    for (const std::string& choice : question.choices) {
      Document document;
      document.id = question.id;
      document.domain = task.options.name;
      document.append_text(question.prompt, false);
      document.append_text((apart ? "" : " ") + choice, true);
      documents.push_back(std::move(document));
      example.bytes.push_back(static_cast<std::int64_t>(choice.size()));
    }
    PackedData data;
    tokenize_documents(documents, tokenizer, std::int64_t{1} << 30, 0, 1, data);
    if (data.sequences.size() != documents.size()) {
      throw InputError(fmt::format("{} of task \"{}\": a choice has no token of its own; remove this line", question.id,
                                   task.options.name));
    }
    for (const TokenSequence& sequence : data.sequences) {
      if (static_cast<std::int64_t>(sequence.tokens.size()) > architecture.max_position_embeddings) {
        throw UsageError(fmt::format(
            "{}: {} has a prompt with a choice of {} tokens, got a model of {} positions; remove "
            "this line of the file",
            loaded.source.location(key), question.id, sequence.tokens.size(), architecture.max_position_embeddings));
      }
    }
    example.choices = std::move(data.sequences);
    task.choices.push_back(std::move(example));
  }
}

std::size_t argmax(const std::vector<double>& values) {
  return static_cast<std::size_t>(std::max_element(values.begin(), values.end()) - values.begin());
}

void measure_answers(MoeModel& model, const Tokenizer& tokenizer, const TaskExamples& task,
                     const std::function<void(std::int64_t)>& progress, TaskFigures& figures) {
  const TaskOptions& options = task.options;
  // Where the first stop begins.
  const auto end_of = [&](const std::string& text) {
    std::size_t end = text.size();
    for (const std::string& stop : options.stop) {
      end = std::min(end, text.find(stop));
    }
    return end;
  };
  GreedyOptions greedy{options.max_new_tokens, options.batch, {}};
  if (!options.stop.empty()) {
    greedy.enough = [&](const std::vector<std::int32_t>& tokens) {
      const std::string text = tokenizer.decode(tokens);
      return end_of(text) < text.size();
    };
  }
  const std::vector<std::vector<std::int32_t>> continuations =
      greedy_continuations(model, task.answers, greedy, progress);
  for (std::size_t i = 0; i < task.answers.size(); ++i) {
    std::string text = tokenizer.decode(continuations[i]);
    text.resize(end_of(text));
    const std::optional<std::string> answer = extract_answer(text, options.answer_after);
    TaskOutcome outcome;
    outcome.id = task.answers[i].id;
    outcome.right = answer && same_answer(*answer, task.answers[i].answer);
    outcome.detail = {{"answer", answer ? Json(*answer) : Json()},
                      {"expected", task.answers[i].answer},
                      {"tokens", continuations[i].size()},
                      {"text", text}};
    figures.outcomes.push_back(std::move(outcome));
  }
}

void measure_choices(MoeModel& model, const TaskExamples& task, const std::function<void(std::int64_t)>& progress,
                     TaskFigures& figures) {
  std::vector<TokenSequence> sequences;
  for (const ChoiceExample& example : task.choices) {
    sequences.insert(sequences.end(), example.choices.begin(), example.choices.end());
  }
  const std::vector<double> all = completion_log_likelihoods(model, sequences, task.options.batch, progress);
  auto next = all.begin();
  for (const ChoiceExample& example : task.choices) {
    const std::vector<double> sums(next, next + static_cast<std::ptrdiff_t>(example.choices.size()));
    next += static_cast<std::ptrdiff_t>(example.choices.size());
    if (!std::all_of(sums.begin(), sums.end(), [](double sum) { return std::isfinite(sum); })) {
      throw RunError(
          fmt::format("{}: the likelihoods of its choices are not finite; use another dtype or look at the "
                      "run that made the weights",
                      example.id));
    }
    std::vector<double> per_byte;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      per_byte.push_back(sums[i] / static_cast<double>(example.bytes[i]));
    }
    const auto right = static_cast<std::size_t>(example.right);
    TaskOutcome outcome;
    outcome.id = example.id;
    outcome.right = argmax(sums) == right;
    outcome.right_by_bytes = argmax(per_byte) == right;
    outcome.detail = {{"choice", argmax(sums)},
                      {"choice_by_bytes", argmax(per_byte)},
                      {"expected", right},
                      {"log_likelihoods", sums}};
    figures.outcomes.push_back(std::move(outcome));
  }
}

bool right_of(const TaskOutcome& outcome, bool by_bytes) {
  return by_bytes ? outcome.right_by_bytes : outcome.right;
}

}  // namespace

std::optional<std::string> extract_answer(const std::string& text, const std::string& after) {
  std::string answer = text;
  if (!after.empty()) {
    const std::size_t found = text.find(after);
    if (found == std::string::npos) {
      return std::nullopt;
    }
    const std::size_t begin = found + after.size();
    answer = text.substr(begin, std::min(text.find('\n', begin), text.size()) - begin);
  }
  answer = stripped(answer);
  return answer.empty() ? std::nullopt : std::optional(answer);
}

bool same_answer(const std::string& one, const std::string& other) {
  const std::optional<std::string> number = plain_number(one);
  return one == other || (number && number == plain_number(other));
}

TaskExamples load_task(const LoadedRecipe<FinetuneRecipe>& loaded, std::size_t index, const Tokenizer& tokenizer,
                       const Architecture& architecture) {
  TaskExamples task;
  task.options = loaded.recipe.evaluate.tasks.at(index);
  const std::string key = fmt::format("evaluate.tasks.{}", index);
  if (task.options.kind == kExactMatch) {
    load_answers(loaded, key, tokenizer, architecture, task);
  } else {
    load_choices(loaded, key, tokenizer, architecture, task);
  }
  return task;
}

std::vector<std::vector<std::int32_t>> greedy_continuations(MoeModel& model, const std::vector<AnswerExample>& examples,
                                                            const GreedyOptions& options,
                                                            const std::function<void(std::int64_t)>& progress) {
  if (options.max_new_tokens < 1 || options.rows < 1) {
    throw std::invalid_argument("greedy_continuations: at least one token and one row");
  }
  const std::vector<std::size_t> order =
      by_length(examples.size(), [&](std::size_t i) { return examples[i].prompt.size(); });
  std::vector<std::vector<std::int32_t>> continuations(examples.size());
  const auto rows = static_cast<std::size_t>(options.rows);
  for (std::size_t begin = 0; begin < order.size(); begin += rows) {
    const std::size_t end = std::min(order.size(), begin + rows);
    std::vector<const AnswerExample*> group;
    for (std::size_t i = begin; i < end; ++i) {
      group.push_back(&examples[order[i]]);
    }
    if (group.front()->prompt.empty()) {
      throw std::invalid_argument("greedy_continuations: a prompt has no token");
    }
    std::vector<std::vector<std::int32_t>> found = GreedyGroup(model, std::move(group), options).run();
    for (std::size_t i = begin; i < end; ++i) {
      continuations[order[i]] = std::move(found[i - begin]);
    }
    if (progress) {
      progress(static_cast<std::int64_t>(end - begin));
    }
  }
  return continuations;
}

std::vector<double> completion_log_likelihoods(MoeModel& model, const std::vector<TokenSequence>& sequences,
                                               std::int64_t rows, const std::function<void(std::int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  const std::vector<std::size_t> order =
      by_length(sequences.size(), [&](std::size_t i) { return sequences[i].tokens.size(); });
  std::vector<double> sums(sequences.size(), 0.0);
  for (std::size_t begin = 0; begin < order.size(); begin += static_cast<std::size_t>(rows)) {
    const std::size_t end = std::min(order.size(), begin + static_cast<std::size_t>(rows));
    std::vector<const TokenSequence*> group;
    for (std::size_t i = begin; i < end; ++i) {
      group.push_back(&sequences[order[i]]);
    }
    const PaddedBatch padded_batch = padded(group, model->device());
    const ModelOutput output = model->forward(padded_batch.batch);
    const torch::Tensor sums_B = label_log_probabilities(model, output.hidden_BSD, padded_batch.labels_BS)
                                     .to(torch::kFloat64)
                                     .sum(1)
                                     .to(torch::kCPU);
    for (std::size_t i = begin; i < end; ++i) {
      sums[order[i]] = sums_B[static_cast<std::int64_t>(i - begin)].item<double>();
    }
    if (progress) {
      progress(static_cast<std::int64_t>(end - begin));
    }
  }
  return sums;
}

double TaskFigures::accuracy(bool by_bytes) const {
  const auto right = std::count_if(outcomes.begin(), outcomes.end(),
                                   [&](const TaskOutcome& outcome) { return right_of(outcome, by_bytes); });
  return outcomes.empty() ? std::numeric_limits<double>::quiet_NaN()
                          : static_cast<double>(right) / static_cast<double>(outcomes.size());
}

double TaskFigures::standard_error(bool by_bytes) const {
  const double p = accuracy(by_bytes);
  return outcomes.size() < 2 ? std::numeric_limits<double>::quiet_NaN()
                             : std::sqrt(p * (1.0 - p) / static_cast<double>(outcomes.size() - 1));
}

TaskDifference task_difference(const TaskFigures& now, const TaskFigures& before, bool by_bytes) {
  const std::size_t count = now.outcomes.size();
  if (count != before.outcomes.size()) {
    throw std::invalid_argument("task_difference: the routers answered other examples");
  }
  double sum = 0.0;
  double squares = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    if (now.outcomes[i].id != before.outcomes[i].id) {
      throw std::invalid_argument("task_difference: the routers answered other examples");
    }
    const double difference = static_cast<double>(right_of(now.outcomes[i], by_bytes)) -
                              static_cast<double>(right_of(before.outcomes[i], by_bytes));
    sum += difference;
    squares += difference * difference;
  }
  constexpr double kPoints = 100.0;
  const auto n = static_cast<double>(count);
  TaskDifference result;
  result.points = kPoints * sum / n;
  result.standard_error = count < 2 ? std::numeric_limits<double>::quiet_NaN()
                                    : kPoints * std::sqrt(std::max(0.0, squares / n - sum * sum / (n * n)) / (n - 1.0));
  return result;
}

TaskFigures measure_task(MoeModel& model, const Tokenizer& tokenizer, const TaskExamples& task,
                         const std::string& label, bool quiet) {
  TaskFigures figures;
  figures.name = task.options.name;
  figures.kind = task.options.kind;
  std::int64_t total = static_cast<std::int64_t>(task.answers.size());
  for (const ChoiceExample& example : task.choices) {
    total += static_cast<std::int64_t>(example.choices.size());
  }
  const bool generates = task.options.kind == kExactMatch;
  Progress bar(label, total, generates ? "answer" : "choice", quiet);
  const auto progress = [&](std::int64_t count) { bar.advance(count); };
  if (generates) {
    measure_answers(model, tokenizer, task, progress, figures);
  } else {
    measure_choices(model, task, progress, figures);
  }
  return figures;
}

}  // namespace hestia
