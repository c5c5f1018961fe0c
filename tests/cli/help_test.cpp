#include <algorithm>

#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"

namespace hestia::testing {
namespace {

const std::vector<std::string> kVerbs = {"finetune", "export",  "evaluate", "pretrain", "simulate", "validate",
                                         "inspect",  "recipes", "logits",   "score",    "version"};

TEST_CASE("hestia --help names every verb") {
  for (const char* flag : {"--help", "-h"}) {
    const Outcome outcome = hestia({flag});
    CHECK(outcome.code == 0);
    CHECK(outcome.err.empty());
    CHECK_THAT(outcome.out, Catch::Contains("Usage: hestia") && Catch::Contains("Exit codes: 0 done"));
    for (const std::string& verb : kVerbs) {
      CHECK_THAT(outcome.out, Catch::Contains("\n  " + verb + " "));
    }
  }
}

TEST_CASE("every verb explains itself") {
  for (const std::string& verb : kVerbs) {
    INFO(verb);
    const Outcome outcome = hestia({verb, "--help"});
    CHECK(outcome.code == 0);
    CHECK(outcome.err.empty());
    const std::vector<std::string> lines = lines_of(outcome.out);
    REQUIRE(lines.size() > 4);
    // What it does, how it is called, an example; lines that fit a screen.
    CHECK(lines[0].size() > 20);
    CHECK(lines[1].rfind("Usage: hestia " + verb, 0) == 0);
    CHECK_THAT(outcome.out, Catch::Contains("Example: hestia " + verb));
    for (const std::string& line : lines) {
      CHECK(line.size() <= 160);
    }
    // Each option stands with an explanation, on its line or the next.
    for (std::size_t i = 0; i < lines.size(); ++i) {
      if (lines[i].rfind("  -", 0) == 0) {
        INFO(lines[i]);
        const bool explained = lines[i].size() > 32 || (i + 1 < lines.size() && lines[i + 1].size() > 32);
        CHECK(explained);
      }
    }
  }
}

TEST_CASE("a command line that makes no sense ends with 2 and a hint") {
  const Outcome nothing = hestia({});
  check_complaint(nothing, 2, {"Usage: hestia", "give a verb"});
  check_complaint(hestia({"simulat", "trace.csv"}), 2,
                  {"unknown verb \"simulat\"", "(did you mean \"simulate\"?)", "`hestia --help`"});
  check_complaint(hestia({"zzz"}), 2, {"unknown verb \"zzz\"", "`hestia --help`"});
  check_complaint(hestia({""}), 2, {"unknown verb \"\""});
  check_complaint(hestia({"--verbose"}), 2, {"unknown option \"--verbose\"", "`hestia --help`"});
  check_complaint(hestia({"--fast", "version"}), 2, {"unknown option \"--fast\""});
  check_complaint(hestia({"version", "--fast"}), 2, {"unknown option \"--fast\"", "`hestia version --help`"});
  check_complaint(hestia({"version", "recipes"}), 2, {"unexpected argument \"recipes\""});
  check_complaint(hestia({"finetune", "recipes/quickstart.yaml", "--quite"}), 2,
                  {"unknown option \"--quite\"", "(did you mean \"--quiet\"?)", "`hestia finetune --help`"});
  check_complaint(hestia({"logits", "checkpoints/tiny", "--toknes=1,2"}), 2,
                  {"unknown option \"--toknes=1,2\"", "(did you mean \"--tokens\"?)"});
  for (const char* verb : {"finetune", "simulate", "logits"}) {
    INFO(verb);
    check_complaint(hestia({verb}), 2, {"required", std::string("`hestia ") + verb + " --help`"});
  }
  check_complaint(hestia({"validate"}), 2, {"give at least one recipe"});
  check_complaint(hestia({"finetune", "recipes/quickstart.yaml", "--resume", "--overwrite"}), 2,
                  {"--resume", "excludes"});
}

TEST_CASE("version says what this program is") {
  const std::string out = done(hestia({"version"}));
  CHECK(out.rfind("hestia ", 0) == 0);
  for (const char* part : {"LibTorch 2.", "compiler ", "CUDA kernels: ", "GPUs seen: "}) {
    CHECK_THAT(out, Catch::Contains(part));
  }
}

TEST_CASE("every recipe key is listed by --help-keys, in aligned columns") {
  const std::string finetune = done(hestia({"finetune", "--help-keys"}));
  const std::string pretrain = done(hestia({"pretrain", "--help-keys"}));
  CHECK(done(hestia({"validate", "--help-keys", "finetune"})) == finetune);
  CHECK(done(hestia({"validate", "--help-keys", "pretrain"})) == pretrain);
  for (const char* key : {"model.path ", "losses.cache_simulation.weight ", "data.corpora.N.domain ",
                          "control.enabled ", "evaluate.policies "}) {
    CHECK_THAT(finetune, Catch::Contains(key));
  }
  CHECK_THAT(pretrain, Catch::Contains("architecture.num_experts ") && Catch::Contains("tokenizer.vocab_size "));
  for (const std::string& text : {finetune, pretrain}) {
    const std::vector<std::string> lines = lines_of(text);
    REQUIRE(lines.size() > 40);
    // key, kind, default and help: each column begins in the same place everywhere, after two blanks.
    const std::size_t kind = lines[0].find("  ");
    const std::size_t begin = lines[0].find_first_not_of(' ', kind);
    for (const std::string& line : lines) {
      INFO(line);
      CHECK(line.find(' ') < begin);
      CHECK(line.substr(begin - 2, 2) == "  ");
      CHECK(line[begin] != ' ');
      CHECK(line.size() > begin + 20);
    }
  }
}

TEST_CASE("the environment's log level is checked, and quiet levels keep stderr empty") {
  Surroundings surroundings;
  surroundings.environment["HESTIA_LOG"] = "loud";
  check_complaint(hestia({"version"}, surroundings), 2, {"HESTIA_LOG", "\"loud\"", "debug, info, warn, error"});
  surroundings.environment["HESTIA_LOG"] = "warn";
  const TemporaryFolder folder;
  const Outcome quiet = hestia({"logits", HESTIA_SOURCE_DIR "/tests/parity/goldens/hub_plain", "--tokens", "1,2",
                                "--output", (folder.path() / "a.safetensors").string()},
                               surroundings);
  CHECK(quiet.code == 0);
  CHECK(quiet.err.empty());
}

TEST_CASE("results that cannot be written are a failure") {
  Surroundings surroundings;
  surroundings.stdout_path = "/dev/full";
  const Outcome outcome = hestia({"version"}, surroundings);
  CHECK(outcome.code == 1);
  CHECK_THAT(outcome.err, Catch::Contains("stdout: the results cannot be written"));
}

}  // namespace
}  // namespace hestia::testing
