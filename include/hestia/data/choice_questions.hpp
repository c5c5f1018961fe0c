#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hestia {

/// Where questions with choices are, and in which fields of a JSON line. A name may lead inwards, `question.stem`; over
/// a list it names that field of every item, `choices.text`, or with a number one item, `choices.text.0`.
struct ChoiceFormat {
  std::vector<std::string> paths;    ///< As CorpusOptions::paths.
  std::string prompt;                ///< `{name}` is a field, `{{` a brace; empty: default_choice_prompt().
  std::vector<std::string> choices;  ///< One field that holds a list, or a field for each; empty: the known ones.
  std::string answer;  ///< Field of the right one: its number from 0, its letter or label; empty: the known ones.
};

/// One question.
struct ChoiceQuestion {
  std::string id;      ///< File name, `#` and line.
  std::string prompt;  ///< Laid out; not empty.
  std::vector<std::string> choices;
  std::int64_t right = 0;  ///< Index of the right one.
};

/// `Question: ...` and `Answer:` on a line of its own, the question being the first known field that a line has.
[[nodiscard]] std::string default_choice_prompt();
/// What is wrong with a prompt of ChoiceFormat: a lone brace, a name that is empty, no field at all; empty: nothing.
[[nodiscard]] std::string choice_prompt_problem(const std::string& prompt);

/// The first `limit` questions (0: all) in the order of files and lines. `recipe_key` (for example "evaluate.tasks.0")
/// names the key to change in messages. Fields that a format leaves open are found where PIQA, CommonsenseQA and
/// OpenBookQA have them. Throws InputError when nothing matches `paths` or there is no question, and with file, line,
/// key and value for lines that are no JSON objects, lack a field, have fewer than two choices or no right one.
[[nodiscard]] std::vector<ChoiceQuestion> read_choice_questions(const ChoiceFormat& format, std::int64_t limit,
                                                                const std::string& recipe_key);

}  // namespace hestia
