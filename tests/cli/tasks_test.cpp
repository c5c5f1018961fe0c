#include <algorithm>
#include <cmath>
#include <map>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia::testing {
namespace {

const std::string kTiny = std::string(HESTIA_SOURCE_DIR) + "/checkpoints/tiny";

// What the tiny model answers, with the questions of `sums.jsonl` and `doors.jsonl`.
std::string tiny_recipe() {
  return R"(recipe_version: 1
task: finetune
run_dir: runs/tiny
model: {path: )" +
         kTiny + R"(, dtype: float32, device: cpu, threads: 1}
data:
  sequence_length: 32
  held_out_fraction: 0.3
  train: [letters]
  evaluate: [letters]
  corpora:
    - {domain: letters, paths: [letters]}
    - {domain: sums, paths: [sums.jsonl], format: question_answer, template: qa}
evaluate:
  tokens_per_domain: 200
  policies: [lru]
  segments: []
  static_set: []
  agreement: false
  tasks:
    - {name: sums, kind: exact_match, domain: sums, split: all, max_new_tokens: 12, batch: 3}
    - {name: doors, kind: multiple_choice, paths: [doors.jsonl]}
)";
}

std::string question(int i) {
  const std::vector<std::string> words = {"def read", "the kernel", "a free society", "class File", "return", "memory"};
  return words[static_cast<std::size_t>(i) % words.size()] + std::string(static_cast<std::size_t>(i), '!');
}

std::string sums(const std::map<std::string, std::string>& answers) {
  std::string lines;
  for (int i = 0; i < 7; ++i) {
    const auto found = answers.find("sums.jsonl#" + std::to_string(i + 1));
    lines +=
        Json({{"question", question(i)}, {"answer", found == answers.end() ? "none" : found->second}}).dump() + "\n";
  }
  return lines;
}

std::string doors() {
  std::string lines;
  SplitMix64 random(77);
  for (int i = 0; i < 9; ++i) {
    lines += Json({{"question",
                    {{"stem", question(i)},
                     {"choices",
                      {{{"text", "wood"}, {"label", "A"}},
                       {{"text", "the stone wall behind it"}, {"label", "B"}},
                       {{"text", "def"}, {"label", "C"}}}}}},
                   {"answerKey", std::string(1, static_cast<char>('A' + random.below(3)))}})
                 .dump() +
             "\n";
  }
  return lines;
}

const Json& task_of(const Json& results, const std::string& arm, const std::string& task) {
  for (const Json& candidate : results.at("arms")) {
    if (candidate.at("name") == arm) {
      for (const Json& figures : candidate.at("tasks")) {
        if (figures.at("task") == task) {
          return figures;
        }
      }
    }
  }
  FAIL("no task " << task << " of " << arm);
  return results;
}

// Lines of answers.jsonl of one task, by id.
std::map<std::string, Json> answers_of(const SmallProject& project, const std::string& run, const std::string& arm,
                                       const std::string& task) {
  std::map<std::string, Json> answers;
  read_json_lines(project.path() / run / "answers.jsonl", [&](std::int64_t, const Json& line) {
    if (line.at("arm") == arm && line.at("task") == task) {
      CHECK(answers.emplace(line.at("id").get<std::string>(), line).second);
    }
  });
  return answers;
}

TEST_CASE("evaluate has the tiny model answer: its own words are right, others are not") {
  const SmallProject project;
  project.write("tiny.yaml", tiny_recipe());
  project.write("doors.jsonl", doors());
  project.write("sums.jsonl", sums({}));
  CHECK(done(project.run({"validate", "tiny.yaml"})) == "tiny.yaml: OK\n");
  const auto evaluated = [&](const std::vector<std::string>& overrides) {
    std::vector<std::string> arguments = {"evaluate", "tiny.yaml", "--only", "baseline", "--json", "--quiet"};
    arguments.insert(arguments.end(), overrides.begin(), overrides.end());
    return Json::parse(done(project.run(arguments)));
  };
  Json results = evaluated({});
  CHECK(task_of(results, "baseline", "sums").at("count") == 7);
  CHECK(task_of(results, "baseline", "sums").at("accuracy") == 0.0);
  CHECK_FALSE(task_of(results, "baseline", "sums").contains("accuracy_by_bytes"));
  const Json& choices = task_of(results, "baseline", "doors");
  CHECK(choices.at("count") == 9);
  std::map<std::string, Json> lines = answers_of(project, "runs/tiny", "baseline", "doors");
  REQUIRE(lines.size() == 9);
  for (const bool by_bytes : {false, true}) {
    const std::string suffix = by_bytes ? "_by_bytes" : "";
    double right = 0.0;
    for (const auto& [id, line] : lines) {
      CHECK(line.at("right" + suffix) == (line.at("choice" + suffix) == line.at("expected")));
      right += line.at("right" + suffix).get<bool>() ? 1.0 : 0.0;
      const auto sums = line.at("log_likelihoods").get<std::vector<double>>();
      REQUIRE(sums.size() == 3);
      CHECK(std::all_of(sums.begin(), sums.end(), [](double sum) { return sum < 0.0; }));
    }
    CHECK(choices.at("accuracy" + suffix).get<double>() == Approx(right / 9.0));
    CHECK(choices.at("standard_error" + suffix).get<double>() >= 0.0);
  }

  // References out of its own mouth.
  lines = answers_of(project, "runs/tiny", "baseline", "sums");
  REQUIRE(lines.size() == 7);
  std::map<std::string, std::string> own;
  std::map<std::string, std::string> altered;
  for (const auto& [id, line] : lines) {
    INFO(id << ": " << line.dump());
    REQUIRE(line.at("answer").is_string());
    CHECK(line.at("expected") == "none");
    CHECK(line.at("tokens").get<int>() <= 12);
    own[id] = "  " + line.at("text").get<std::string>() + "\n";
    altered[id] = line.at("text").get<std::string>() + " not";
  }
  // The decoder, another program path, says the same.
  const Json generated = Json::parse(
      done(project.run({"generate", "--model", kTiny, "--dtype", "float32", "--device", "cpu", "--max-tokens", "12",
                        "--json", "--quiet", "--prompt", "Question: " + question(3) + "\nAnswer:"})));
  CHECK(generated.at("text") == lines.at("sums.jsonl#4").at("text"));

  project.write("sums.jsonl", sums(own));
  results = evaluated({"evaluate.tasks.0.batch=32"});
  CHECK(task_of(results, "baseline", "sums").at("accuracy") == 1.0);
  CHECK(task_of(results, "baseline", "sums").at("standard_error") == 0.0);
  results = evaluated({"evaluate.tasks.0.limit=4", "evaluate.tasks.1.limit=5"});
  CHECK(task_of(results, "baseline", "sums").at("count") == 4);
  CHECK(task_of(results, "baseline", "doors").at("count") == 5);
  project.write("sums.jsonl", sums(altered));
  results = evaluated({});
  CHECK(task_of(results, "baseline", "sums").at("accuracy") == 0.0);
  CHECK(results.at("task_delta") == Json::array());  // one router alone

  // A stop cuts the text, and a mark that is missing in what is written makes it wrong, in a reference an error.
  const std::string text = lines.at("sums.jsonl#1").at("text").get<std::string>();
  const std::string stop = text.substr(text.size() / 2);
  const std::string before = text.substr(0, text.find(stop));
  std::map<std::string, std::string> cut;
  cut["sums.jsonl#1"] = before;
  project.write("sums.jsonl", sums(cut));
  static_cast<void>(evaluated({"evaluate.tasks.0.stop=[" + Json(stop).dump() + "]"}));
  lines = answers_of(project, "runs/tiny", "baseline", "sums");
  CHECK(lines.at("sums.jsonl#1").at("right") == true);
  CHECK(lines.at("sums.jsonl#1").at("text") == before);
  check_complaint(
      project.run({"evaluate", "tiny.yaml", "--only", "baseline", "evaluate.tasks.0.answer_after=\"####\""}), 3,
      {"sums.jsonl#", "no answer follows \"####\"", "evaluate.tasks.0.answer_after"});
  check_complaint(project.run({"evaluate", "tiny.yaml", "--only", "baseline", "evaluate.tasks.0.max_new_tokens=4096"}),
                  2, {"evaluate.tasks.0.max_new_tokens", "4096 positions"});
  check_complaint(project.run({"validate", "tiny.yaml", "evaluate.tasks.1.paths=[walls.jsonl]"}), 3,
                  {"evaluate.tasks.1.paths: nothing matches \"walls.jsonl\""});
}

TEST_CASE("evaluate compares the accuracy of every router") {
  const SmallProject project;
  project.pretrain();
  std::string doors;
  SplitMix64 random(78);
  for (int i = 0; i < 12; ++i) {
    doors += Json({{"goal", "red?"}, {"sol1", "dark"}, {"sol2", "pale"}, {"label", random.below(2)}}).dump() + "\n";
  }
  project.write("doors.jsonl", doors);
  project.write("tasks.yaml", std::string(SmallProject::kFinetune) +
                                  "  residency_prior: {weight_lambdas: [0.05], always_keep: [1]}\n"
                                  "  tasks:\n"
                                  "    - {name: colours, kind: exact_match, domain: colours, max_new_tokens: 5}\n"
                                  "    - {name: doors, kind: multiple_choice, paths: [doors.jsonl]}\n");
  std::string recipe = project.read("tasks.yaml");
  recipe = replaced(recipe, "evaluate: {tokens_per_domain: 2000, policies: [lru, belady]}\n",
                    "evaluate:\n  tokens_per_domain: 2000\n  policies: [lru]\n");
  project.write("tasks.yaml", recipe);
  done(project.run({"finetune", "tasks.yaml", "--quiet"}));
  CHECK_THAT(project.read("runs/tuned/recipe.yaml"), Catch::Contains("max_new_tokens: 5"));
  done(project.run({"export", "tasks.yaml", "--quiet"}));
  const std::string table = done(project.run({"evaluate", "tasks.yaml", "--quiet"}));
  for (const char* part : {"points on baseline", "points on control", "by bytes %", "colours", "doors", "+- "}) {
    CHECK_THAT(table, Catch::Contains(part));
  }
  const Json results = read_json_file(project.path() / "runs/tuned/results.json");
  const auto held_out = task_of(results, "baseline", "colours").at("count").get<int>();
  CHECK(held_out > 5);
  CHECK(held_out < 40);
  for (const char* arm : {"baseline", "nll control", "tuned"}) {
    CHECK(task_of(results, arm, "colours").at("count") == held_out);
    CHECK(task_of(results, arm, "doors").at("count") == 12);
    for (const char* task : {"colours", "doors"}) {
      const auto accuracy = task_of(results, arm, task).at("accuracy").get<double>();
      CHECK(accuracy >= 0.0);
      CHECK(accuracy <= 1.0);
    }
    CHECK(answers_of(project, "runs/tuned", arm, "doors").size() == 12);
  }
  // The arm's own router answers.
  CHECK(answers_of(project, "runs/tuned", "tuned", "doors") != answers_of(project, "runs/tuned", "baseline", "doors"));
  CHECK(answers_of(project, "runs/tuned", "tuned", "doors").begin()->second.at("log_likelihoods") !=
        answers_of(project, "runs/tuned", "baseline", "doors").begin()->second.at("log_likelihoods"));
  const std::string ruled = "tuned, weight lambda 0.05, J 1";
  CHECK(task_of(results, ruled, "doors").at("count") == 12);
  CHECK(task_of(results, ruled, "colours").at("count") == held_out);
  const Json& delta = results.at("task_delta");
  REQUIRE(delta.size() == 2);
  for (const Json& task : delta) {
    const std::string name = task.at("task").get<std::string>();
    const double now = task_of(results, "tuned", name).at("accuracy").get<double>();
    for (const auto& [other, arm] : {std::pair("baseline", "baseline"), std::pair("control", "nll control")}) {
      CHECK(task.at(std::string("points_against_") + other).at("value").get<double>() ==
            Approx(100.0 * (now - task_of(results, arm, name).at("accuracy").get<double>())).margin(1e-9));
    }
    CHECK(task.contains("points_by_bytes_against_baseline") == (name == "doors"));
  }
  // Not asked for: not there.
  const Json last_with_tasks = read_json_file(project.path() / "runs/tuned/results.json");
  const std::string its_answers = project.read("runs/tuned/answers.jsonl");
  done(project.run({"evaluate", "tasks.yaml", "--quiet", "--checkpoint", "evaluate.tasks=[]"}));
  const Json without = read_json_file(project.path() / "runs/tuned/results.json");
  CHECK_FALSE(without.contains("task_delta"));
  CHECK_FALSE(without.at("arms").at(0).contains("tasks"));
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/answers.jsonl"));
  // The evaluation before stays beside the last, a part of it or not; the one before that does not.
  CHECK(read_json_file(project.path() / "runs/tuned/results.previous.json") == last_with_tasks);
  CHECK(project.read("runs/tuned/answers.previous.jsonl") == its_answers);
  done(project.run({"evaluate", "tasks.yaml", "--quiet", "evaluate.tasks=[]", "--only", "baseline"}));
  CHECK(read_json_file(project.path() / "runs/tuned/results.previous.json") == without);
  CHECK_FALSE(std::filesystem::exists(project.path() / "runs/tuned/answers.previous.jsonl"));
}

}  // namespace
}  // namespace hestia::testing
