#include "hestia/data/choice_questions.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/error.hpp"
#include "source_files.hpp"

namespace hestia {

namespace {

// Names of fields in the data sets that are about, used where a recipe names none.
const std::vector<std::string> kQuestionFields = {"question_stem", "question.stem", "goal", "question"};
const std::vector<std::vector<std::string>> kChoiceFields = {
    {"sol1", "sol2"}, {"choices.text"}, {"question.choices.text"}, {"choices"}};
const std::vector<std::string> kAnswerFields = {"label", "answerKey", "answer"};
constexpr std::string_view kQuestionPlace = "question";  // In the prompt that stands for any known field.

std::optional<std::size_t> number_of(std::string_view text) {
  std::size_t number = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), number);
  return result.ec == std::errc() && result.ptr == text.data() + text.size() ? std::optional(number) : std::nullopt;
}

// What a name leads to; null where there is nothing.
Json find_value(const Json& value, const std::string& name) {
  const std::size_t dot = std::min(name.find('.'), name.size());
  const std::string first = name.substr(0, dot);
  const std::string rest = dot < name.size() ? name.substr(dot + 1) : "";
  if (value.is_object()) {
    if (value.contains(name)) {
      return value.at(name);
    }
    return rest.empty() || !value.contains(first) ? Json() : find_value(value.at(first), rest);
  }
  if (!value.is_array()) {
    return Json();
  }
  if (const auto index = number_of(first)) {
    const bool inside = *index < value.size();
    return !inside ? Json() : (rest.empty() ? value[*index] : find_value(value[*index], rest));
  }
  Json all = Json::array();
  for (const Json& item : value) {
    all.push_back(find_value(item, name));
    if (all.back().is_null()) {
      return Json();
    }
  }
  return all;
}

// A prompt cut into texts and, at odd places, the names between them.
std::vector<std::string> parts_of(const std::string& prompt, std::string& problem) {
  std::vector<std::string> parts(1);
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    const char c = prompt[i];
    const bool twice = i + 1 < prompt.size() && prompt[i + 1] == c;
    if ((c == '{' || c == '}') && twice) {
      parts.back() += c;
      ++i;
    } else if (c == '{') {
      const std::size_t end = prompt.find('}', i);
      if (end == std::string::npos || end == i + 1) {
        problem = end == std::string::npos ? "has a { without its }" : "has a {} without a name";
        return parts;
      }
      parts.push_back(prompt.substr(i + 1, end - i - 1));
      parts.emplace_back();
      i = end;
    } else if (c == '}') {
      problem = "has a } without its {";
      return parts;
    } else {
      parts.back() += c;
    }
  }
  if (parts.size() == 1) {
    problem = "names no {field} of a line";
  }
  return parts;
}

// Reads one line; messages name its place.
class QuestionReader {
 public:
  QuestionReader(const ChoiceFormat& format, std::vector<std::string> parts, const std::string& recipe_key)
      : format_(format), parts_(std::move(parts)), recipe_key_(recipe_key) {}

  ChoiceQuestion read(const Json& object, const std::string& id, const std::string& place) const {
    ChoiceQuestion question;
    question.id = id;
    question.prompt = prompt(object, place);
    const std::vector<std::string> names = choice_names(object, place);
    question.choices = choices(object, names, place);
    question.right = right(object, names, question.choices.size(), place);
    return question;
  }

 private:
  [[noreturn]] void throw_missing(const Json& object, const std::string& what, const std::string& wanted,
                                  const std::string& option, const std::string& place) const {
    std::vector<std::string> names;
    for (const auto& [key, value] : object.items()) {
      names.push_back(key);
    }
    throw InputError(fmt::format("{}: there is no {} field \"{}\", got {}; set {}.{} to a field of this file", place,
                                 what, wanted, names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", ")),
                                 recipe_key_, option));
  }

  [[nodiscard]] static std::string text_of(const Json& value, const std::string& name, const std::string& place) {
    if (!value.is_string()) {
      throw InputError(
          fmt::format("{}: \"{}\" must be text, got {}; mend or remove this line", place, name, quoted_json(value)));
    }
    return value.get<std::string>();
  }

  [[nodiscard]] std::string prompt(const Json& object, const std::string& place) const {
    std::string text;
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      if (i % 2 == 0) {
        text += parts_[i];
        continue;
      }
      std::string name = parts_[i];
      if (format_.prompt.empty()) {
        const auto found = std::find_if(kQuestionFields.begin(), kQuestionFields.end(), [&](const std::string& known) {
          return find_value(object, known).is_string();
        });
        if (found == kQuestionFields.end()) {
          throw_missing(object, "question", fmt::format("{}", fmt::join(kQuestionFields, "\" or \"")), "prompt", place);
        }
        name = *found;
      }
      const Json value = find_value(object, name);
      if (value.is_null()) {
        throw_missing(object, "prompt", name, "prompt", place);
      }
      text += text_of(value, name, place);
    }
    if (text.empty()) {
      throw InputError(fmt::format("{}: the prompt is empty; mend or remove this line", place));
    }
    return text;
  }

  [[nodiscard]] std::vector<std::string> choice_names(const Json& object, const std::string& place) const {
    const auto present = [&](const std::vector<std::string>& names) {
      return std::none_of(names.begin(), names.end(),
                          [&](const std::string& name) { return find_value(object, name).is_null(); });
    };
    if (!format_.choices.empty()) {
      for (const std::string& name : format_.choices) {
        if (find_value(object, name).is_null()) {
          throw_missing(object, "choice", name, "choices", place);
        }
      }
      return format_.choices;
    }
    const auto found = std::find_if(kChoiceFields.begin(), kChoiceFields.end(), present);
    if (found == kChoiceFields.end()) {
      throw_missing(object, "choice", "choices.text\" or \"sol1", "choices", place);
    }
    return *found;
  }

  [[nodiscard]] static std::vector<std::string> choices(const Json& object, const std::vector<std::string>& names,
                                                        const std::string& place) {
    std::vector<std::string> texts;
    const Json first = find_value(object, names.front());
    if (names.size() == 1) {
      if (!first.is_array() || first.size() < 2) {
        throw InputError(fmt::format("{}: \"{}\" must be a list of at least two choices, got {}; mend this line", place,
                                     names.front(), quoted_json(first)));
      }
      for (const Json& item : first) {
        texts.push_back(text_of(item, names.front(), place));
      }
    } else {
      for (const std::string& name : names) {
        texts.push_back(text_of(find_value(object, name), name, place));
      }
    }
    for (const std::string& text : texts) {
      if (text.empty()) {
        throw InputError(
            fmt::format("{}: a choice of \"{}\" is empty; mend or remove this line", place, fmt::join(names, ", ")));
      }
    }
    return texts;
  }

  // The labels beside the texts: choices.label of choices.text. Empty: there are none.
  [[nodiscard]] static std::vector<std::string> labels(const Json& object, const std::vector<std::string>& names,
                                                       std::size_t count) {
    const std::size_t dot = names.front().rfind('.');
    if (names.size() > 1 || dot == std::string::npos) {
      return {};
    }
    const Json list = find_value(object, names.front().substr(0, dot) + ".label");
    std::vector<std::string> found;
    if (list.is_array() && list.size() == count) {
      for (const Json& item : list) {
        found.push_back(item.is_string() ? item.get<std::string>() : item.dump());
      }
    }
    return found;
  }

  [[nodiscard]] std::int64_t right(const Json& object, const std::vector<std::string>& names, std::size_t count,
                                   const std::string& place) const {
    std::string name = format_.answer;
    if (name.empty()) {
      const auto found = std::find_if(kAnswerFields.begin(), kAnswerFields.end(),
                                      [&](const std::string& known) { return !find_value(object, known).is_null(); });
      name = found == kAnswerFields.end() ? "" : *found;
    }
    const Json value = name.empty() ? Json() : find_value(object, name);
    if (value.is_null()) {
      throw_missing(object, "answer", name.empty() ? fmt::format("{}", fmt::join(kAnswerFields, "\" or \"")) : name,
                    "answer", place);
    }
    std::optional<std::size_t> index;
    const std::vector<std::string> labelled = labels(object, names, count);
    if (value.is_string() && !labelled.empty()) {
      const auto found = std::find(labelled.begin(), labelled.end(), value.get<std::string>());
      if (found != labelled.end()) {
        index = static_cast<std::size_t>(found - labelled.begin());
      }
    } else if (value.is_string()) {
      const std::string text = value.get<std::string>();
      index = text.size() == 1 && text[0] >= 'A' && text[0] <= 'Z' ? static_cast<std::size_t>(text[0] - 'A')
                                                                   : number_of(text);
    } else if (value.is_number_integer() && value.get<std::int64_t>() >= 0) {
      index = value.get<std::size_t>();
    }
    if (!index || *index >= count) {
      throw InputError(fmt::format(
          "{}: \"{}\" must name one of {} choices by its number from 0, letter or label, got {}; mend or remove this "
          "line (a test set that is published without answers cannot be measured)",
          place, name, count, quoted_json(value)));
    }
    return static_cast<std::int64_t>(*index);
  }

  const ChoiceFormat& format_;
  std::vector<std::string> parts_;
  const std::string& recipe_key_;
};

}  // namespace

std::string default_choice_prompt() {
  return fmt::format("Question: {{{}}}\nAnswer:", kQuestionPlace);
}

std::string choice_prompt_problem(const std::string& prompt) {
  std::string problem;
  static_cast<void>(parts_of(prompt, problem));
  return problem;
}

std::vector<ChoiceQuestion> read_choice_questions(const ChoiceFormat& format, std::int64_t limit,
                                                  const std::string& recipe_key) {
  std::string problem;
  const QuestionReader reader(
      format, parts_of(format.prompt.empty() ? default_choice_prompt() : format.prompt, problem), recipe_key);
  if (!problem.empty()) {
    throw UsageError(fmt::format("{}.prompt {}, got \"{}\"; mend it", recipe_key, problem, format.prompt));
  }
  const auto wanted = limit > 0 ? static_cast<std::size_t>(limit) : std::string::npos;
  std::vector<ChoiceQuestion> questions;
  for (const SourceFile& file : find_files({format.paths}, recipe_key)) {
    if (questions.size() < wanted) {
      for_each_line(valid_utf8(read_source(file.path)), [&](std::int64_t line, std::string_view content) {
        const std::string place = fmt::format("{}:{}", file.path.string(), line);
        questions.push_back(reader.read(json_object(content, place), fmt::format("{}#{}", file.id, line), place));
        return questions.size() < wanted;
      });
    }
  }
  if (questions.empty()) {
    throw InputError(fmt::format("{}.paths: there is no question in {}; add lines or point it elsewhere", recipe_key,
                                 fmt::join(format.paths, ", ")));
  }
  return questions;
}

}  // namespace hestia
