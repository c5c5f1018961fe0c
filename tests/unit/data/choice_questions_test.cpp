#include "hestia/data/choice_questions.hpp"

#include <fmt/format.h>

#include <catch2/catch.hpp>

#include "data_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_line;

const std::string kKey = "evaluate.tasks.0";

// A question with its right answer, to be written down in one layout or another.
struct Drawn {
  std::string question;
  std::vector<std::string> choices;
  std::size_t right = 0;
};

Drawn drawn(SplitMix64& random, std::size_t count) {
  Drawn question;
  question.question = random_line(random, 1 + random.below(6));
  for (std::size_t i = 0; i < count; ++i) {
    question.choices.push_back(random_line(random, 1 + random.below(3)) + std::to_string(i));
  }
  question.right = random.below(count);
  return question;
}

std::string letter(std::size_t index) {
  return std::string(1, static_cast<char>('A' + index));
}

Json labels_of(std::size_t count) {
  Json labels = Json::array();
  for (std::size_t i = 0; i < count; ++i) {
    labels.push_back(letter(i));
  }
  return labels;
}

Json piqa_line(const Drawn& drawn) {
  return {
      {"goal", drawn.question}, {"sol1", drawn.choices[0]}, {"sol2", drawn.choices[1]}, {"label", int(drawn.right)}};
}

// CommonsenseQA as in the hub's tables.
Json commonsense_line(const Drawn& drawn) {
  return {{"id", "1afa02df"},
          {"question", drawn.question},
          {"question_concept", "revolving door"},
          {"choices", {{"label", labels_of(drawn.choices.size())}, {"text", drawn.choices}}},
          {"answerKey", letter(drawn.right)}};
}

// OpenBookQA and CommonsenseQA as their authors publish them.
Json stem_line(const Drawn& drawn) {
  Json choices = Json::array();
  for (std::size_t i = 0; i < drawn.choices.size(); ++i) {
    choices.push_back({{"text", drawn.choices[i]}, {"label", letter(i)}});
  }
  return {{"id", "7-980"},
          {"question", {{"stem", drawn.question}, {"choices", choices}}},
          {"answerKey", letter(drawn.right)}};
}

Json open_book_line(const Drawn& drawn) {
  return {{"id", "7-980"},
          {"question_stem", drawn.question},
          {"choices", {{"text", drawn.choices}, {"label", labels_of(drawn.choices.size())}}},
          {"answerKey", letter(drawn.right)}};
}

struct Folder {
  TemporaryFolder folder;
  [[nodiscard]] std::filesystem::path file() const { return folder.path() / "questions.jsonl"; }
  [[nodiscard]] ChoiceFormat format() const { return {{file().string()}, "", {}, ""}; }
  void write(const std::vector<Json>& lines) const {
    std::string text;
    for (const Json& line : lines) {
      text += line.dump() + "\n\n";
    }
    write_text_atomically(file(), text);
  }
  // What reading this one line says.
  [[nodiscard]] std::string complaint(const Json& line, const ChoiceFormat& format) const {
    write({line});
    try {
      static_cast<void>(read_choice_questions(format, 0, kKey));
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  }
  [[nodiscard]] std::string complaint(const Json& line) const { return complaint(line, format()); }
};

TEST_CASE("questions with choices are read as PIQA, CommonsenseQA and OpenBookQA are published") {
  const Folder folder;
  SplitMix64 random(31);
  const std::vector<std::pair<std::size_t, Json (*)(const Drawn&)>> layouts = {
      {2, piqa_line}, {5, commonsense_line}, {4, stem_line}, {4, open_book_line}};
  for (std::size_t layout = 0; layout < layouts.size(); ++layout) {
    INFO("layout " << layout);
    std::vector<Drawn> all;
    std::vector<Json> lines;
    for (int i = 0; i < 12; ++i) {
      all.push_back(drawn(random, layouts[layout].first));
      lines.push_back(layouts[layout].second(all.back()));
    }
    folder.write(lines);
    const std::vector<ChoiceQuestion> questions = read_choice_questions(folder.format(), 0, kKey);
    REQUIRE(questions.size() == all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      CHECK(questions[i].prompt == "Question: " + all[i].question + "\nAnswer:");
      CHECK(questions[i].choices == all[i].choices);
      CHECK(questions[i].right == static_cast<std::int64_t>(all[i].right));
      CHECK(questions[i].id == fmt::format("questions.jsonl#{}", 2 * i + 1));
    }
    CHECK(read_choice_questions(folder.format(), 5, kKey).size() == 5);
  }
}

TEST_CASE("fields, prompt and the way to name the right choice can be given") {
  const Folder folder;
  const Json line = {{"ask", {{"text", "Why?"}}},
                     {"options", {"a1", "b2", "c3"}},
                     {"first", "one"},
                     {"second", "two"},
                     {"key", "1"},
                     {"choices", {{"text", {"red", "blue"}}, {"label", {"1", "2"}}}}};
  folder.write({line});
  ChoiceFormat format = folder.format();
  format.prompt = "{{{ask.text}}} {options.2} {choices.text.0}:";
  format.choices = {"options"};
  format.answer = "key";
  ChoiceQuestion question = read_choice_questions(format, 0, kKey).at(0);
  CHECK(question.prompt == "{Why?} c3 red:");
  CHECK(question.choices == std::vector<std::string>{"a1", "b2", "c3"});
  CHECK(question.right == 1);  // from 0, where there are no labels
  format.choices = {"choices.text"};
  CHECK(read_choice_questions(format, 0, kKey).at(0).right == 0);  // the label
  format.choices = {"choices.label"};
  CHECK(read_choice_questions(format, 0, kKey).at(0).choices == std::vector<std::string>{"1", "2"});
  format.choices = {"second", "first"};
  CHECK(read_choice_questions(format, 0, kKey).at(0).choices == std::vector<std::string>{"two", "one"});
}

TEST_CASE("a prompt of choices with a lone brace or without a field is refused") {
  CHECK(choice_prompt_problem(default_choice_prompt()).empty());
  CHECK(choice_prompt_problem("{a} {{x}}").empty());
  CHECK_THAT(choice_prompt_problem("{a"), Catch::Contains("without its }"));
  CHECK_THAT(choice_prompt_problem("a} {b}"), Catch::Contains("without its {"));
  CHECK_THAT(choice_prompt_problem("{} {b}"), Catch::Contains("without a name"));
  CHECK_THAT(choice_prompt_problem("all {{text}}"), Catch::Contains("names no {field}"));
  const Folder folder;
  ChoiceFormat format = folder.format();
  format.prompt = "{a";
  CHECK_THROWS_WITH(read_choice_questions(format, 0, kKey), Catch::Contains("evaluate.tasks.0.prompt has a {"));
}

TEST_CASE("a question that is not whole is told with file, line, key and value") {
  const Folder folder;
  const Json good = {{"goal", "To sit"}, {"sol1", "chair"}, {"sol2", "wall"}, {"label", 0}};
  const auto with = [&](const std::string& key, const Json& value) {
    Json line = good;
    line[key] = value;
    return line;
  };
  const auto without = [&](const std::string& key) {
    Json line = good;
    line.erase(key);
    return line;
  };
  CHECK(folder.complaint(good).empty());
  const std::string place = folder.file().string() + ":1: ";
  CHECK_THAT(folder.complaint(without("goal")),
             Catch::StartsWith(place) && Catch::Contains("no question field \"question_stem\" or") &&
                 Catch::Contains("got sol1, sol2, label; set evaluate.tasks.0.prompt"));
  CHECK_THAT(folder.complaint(without("sol2")), Catch::StartsWith(place) && Catch::Contains("no choice field") &&
                                                    Catch::Contains("evaluate.tasks.0.choices"));
  CHECK_THAT(folder.complaint(without("label")), Catch::StartsWith(place) && Catch::Contains("no answer field"));
  CHECK_THAT(folder.complaint(with("sol1", 7)), Catch::Contains("\"sol1\" must be text, got 7"));
  CHECK_THAT(folder.complaint(with("sol1", "")), Catch::Contains("a choice of \"sol1, sol2\" is empty"));
  for (const Json& wrong : {Json(2), Json(-1), Json("C"), Json("a"), Json(""), Json(0.5)}) {
    CHECK_THAT(folder.complaint(with("label", wrong)), Catch::StartsWith(place) &&
                                                           Catch::Contains("must name one of 2 choices") &&
                                                           Catch::Contains("got " + wrong.dump()));
  }
  ChoiceFormat format = folder.format();
  format.choices = {"sol1"};
  CHECK_THAT(folder.complaint(good, format), Catch::Contains("\"sol1\" must be a list of at least two choices"));
  format.choices = {"sol1", "sol3"};
  CHECK_THAT(folder.complaint(good, format), Catch::Contains("no choice field \"sol3\""));
  CHECK_THAT(
      folder.complaint(
          {{"question", "Why?"}, {"choices", {{"text", {"a", "b"}}, {"label", {"A", "B"}}}}, {"answerKey", "C"}}),
      Catch::Contains("\"answerKey\" must name one of 2 choices"));
  write_text_atomically(folder.file(), "\n[1]\n");
  CHECK_THROWS_WITH(read_choice_questions(folder.format(), 0, kKey), Catch::Contains(":2: not a JSON object"));
  write_text_atomically(folder.file(), "\n");
  CHECK_THROWS_WITH(read_choice_questions(folder.format(), 0, kKey),
                    Catch::Contains("evaluate.tasks.0.paths: there is no question in"));
  CHECK_THROWS_WITH(read_choice_questions({{"nowhere.jsonl"}, "", {}, ""}, 0, kKey),
                    Catch::Contains("evaluate.tasks.0.paths: nothing matches \"nowhere.jsonl\""));
}

}  // namespace
}  // namespace hestia
