#include <cstdlib>

#include <catch2/catch.hpp>

#include "hestia/core/files.hpp"
#include "recipe_fixtures.hpp"

namespace hestia {
namespace {

std::string told(const std::string& body, const std::vector<std::string>& overrides = {}) {
  return RecipeCase(kHead + body, overrides).told();
}

TEST_CASE("A recipe fills the struct and leaves the rest at its defaults") {
  const RecipeCase read(R"(# a comment
recipe_version: 1
run_dir: "runs/quick start"
strict: yes
train: {steps: 1e3, learning_rate: 5e-3, schedule: linear, betas: [0.8, 1]}
cache:
  slots:
    - 1
    - 16
  policies: [lru, belady]
corpora:
  - domain: kernel
    paths: [/usr/share/doc/a, b]
  - {domain: prose, share: .25}
)");
  CHECK(read.told().empty());
  CHECK(read.options.run_dir == "runs/quick start");
  CHECK(read.options.strict);
  CHECK(read.options.steps == 1000);
  CHECK(read.options.learning_rate == 0.005);
  CHECK(read.options.schedule == "linear");
  CHECK(read.options.betas == std::vector<double>{0.8, 1.0});
  CHECK(read.options.slots == std::vector<std::int64_t>{1, 16});
  CHECK(read.options.policies == std::vector<std::string>{"lru", "belady"});
  CHECK(read.options.reuse == 0.3);
  REQUIRE(read.options.corpora.size() == 2);
  CHECK(read.options.corpora[0].paths == std::vector<std::string>{"/usr/share/doc/a", "b"});
  CHECK(read.options.corpora[1].domain == "prose");
  CHECK(read.options.corpora[1].share == 0.25);
}

TEST_CASE("Every problem of a recipe is told at once, in file order") {
  CHECK(told(R"(strict: maybe
train:
  steps: 0
  learning_rate: 0
  schedule: cosin
  warmup: 3
losses:
  load_balence: 0.1
cache: {slots: [2, 0, x], policies: [lru, lfo]}
corpora:
  - paths: [a]
    share: 2
extra: 1
)") == R"(r.yaml:3: strict must be true or false, got "maybe"
r.yaml:5: train.steps must be between 1 and 1000000000000000, got 0
r.yaml:6: train.learning_rate must be above 0, got 0
r.yaml:7: train.schedule must be one of linear, cosine, constant, got "cosin"; did you mean "cosine"?
r.yaml:8: unknown key "train.warmup"; remove it
r.yaml:10: unknown key "losses.load_balence"; did you mean "losses.load_balance"?
r.yaml:11: cache.slots must be at least 1, got 0
r.yaml:11: cache.slots must be an integer, got "x"
r.yaml:11: cache.policies must be one of lru, lfu, belady, got "lfo"; did you mean "lfu"?
r.yaml:14: corpora.0.share must be above 0 and at most 1, got 2
r.yaml:15: unknown key "extra"; remove it
r.yaml:13: the key "corpora.0.domain" is missing; add it (label in every report))");
}

TEST_CASE("A problem leaves the value it would have set alone") {
  const RecipeCase read(kHead + "train: {steps: 0, schedule: never}\ncache: {slots: [1, 2]}\n");
  CHECK(read.options.steps == 120);
  CHECK(read.options.schedule == "cosine");
  CHECK(read.options.slots == std::vector<std::int64_t>{1, 2});
}

TEST_CASE("Unknown keys: the nearest known key, also in another section") {
  CHECK(told("load_balance: 0.1\n") == "r.yaml:3: unknown key \"load_balance\"; did you mean \"losses.load_balance\"?");
  CHECK(told("train: {reuse: 0.1}\n") == "r.yaml:3: unknown key \"train.reuse\"; did you mean \"losses.reuse\"?");
  CHECK(told("learning-rate: 1\n") == "r.yaml:3: unknown key \"learning-rate\"; did you mean \"train.learning_rate\"?");
  CHECK(told("trian: {steps: 3}\n") == "r.yaml:3: unknown key \"trian\"; did you mean \"train\"?");
  CHECK(told("paths: [a]\n") == "r.yaml:3: unknown key \"paths\"; did you mean \"corpora.N.paths\"?");
  CHECK(told("Strict: true\n") == "r.yaml:3: unknown key \"Strict\"; did you mean \"strict\"?");
  CHECK(told("temperature: 1\n") == "r.yaml:3: unknown key \"temperature\"; remove it");
  CHECK(told("corpora: [{domain: a, share: 1, pats: []}]\n") ==
        "r.yaml:3: unknown key \"corpora.0.pats\"; did you mean \"corpora.0.paths\"?");
}

TEST_CASE("Keys that appear twice are refused") {
  CHECK(told("train:\n  steps: 3\n  steps: 4\n") == "r.yaml:5: the key \"train.steps\" appears twice; remove one");
  CHECK(told("losses: {}\nstrict: true\nlosses: {reuse: 1}\n") ==
        "r.yaml:5: the key \"losses\" appears twice; remove one");
  CHECK(told("recipe_version: 1\n") == "r.yaml:3: the key \"recipe_version\" appears twice; remove one");
}

TEST_CASE("recipe_version must be there and be 1") {
  CHECK(RecipeCase("run_dir: x\n").told() ==
        "r.yaml: the key \"recipe_version\" is missing; add \"recipe_version: 1\"");
  CHECK(RecipeCase("run_dir: x\nrecipe_version: 2\n").told() ==
        "r.yaml:2: recipe_version must be 1, got \"2\"; this program reads version 1 only");
  CHECK(contains(RecipeCase("run_dir: x\nrecipe_version:\n").told(), "recipe_version must be 1, got nothing"));
  CHECK(contains(RecipeCase("run_dir: x\nrecipe_versoin: 1\n").told(), "did you mean \"recipe_version\"?"));
  CHECK(told("", {"recipe_version=3"}) ==
        "command line: recipe_version must be 1, got \"3\"; this program reads version 1 only");
}

TEST_CASE("Required keys may come from the command line") {
  CHECK(RecipeCase("recipe_version: 1\n").told() ==
        "r.yaml: the key \"run_dir\" is missing; add it (folder of the run)");
  CHECK(RecipeCase("recipe_version: 1\n", {"run_dir=x"}).told().empty());
  CHECK(told("corpora: [{share: 1}]\n", {"corpora.0.domain=prose"}).empty());
  CHECK(told("", {"corpora.0.share=1"}) ==
        "r.yaml: the key \"corpora.0.domain\" is missing; add it (label in every report)");
}

TEST_CASE("Integers: what is integral and fits is taken, nothing else") {
  const auto steps = [](const std::string& text) {
    const RecipeCase read(kHead + "train: {steps: " + text + "}\n");
    return read.told().empty() ? std::to_string(read.options.steps) : read.told();
  };
  CHECK(steps("7") == "7");
  CHECK(steps("+7") == "7");
  CHECK(steps("12.0") == "12");
  CHECK(steps("1e3") == "1000");
  CHECK(steps("2.5e1") == "25");
  CHECK(steps("9007199254740993") ==
        "r.yaml:3: train.steps must be between 1 and 1000000000000000, got 9007199254740993");
  for (const std::string text :
       {"12.5", "0x10", "1_000", "twelve", "true", "1e-3", "\"12\"", "'3'", "+-3", "--3", "1 2", ".inf", "nan"}) {
    const std::string shown = text.find_first_of("\"'") == 0 ? text.substr(1, text.size() - 2) : text;
    CHECK(steps(text) == "r.yaml:3: train.steps must be an integer, got \"" + shown + "\"");
  }
  CHECK(steps("9223372036854775808") ==
        "r.yaml:3: train.steps must be an integer of 64 bits, got \"9223372036854775808\"");
  CHECK(steps("1e19") == "r.yaml:3: train.steps must be an integer of 64 bits, got \"1e19\"");
  CHECK(steps("[3]") == "r.yaml:3: train.steps must be an integer, got a list");
  CHECK(steps("{a: 3}") == "r.yaml:3: train.steps must be an integer, got a section");
}

TEST_CASE("Numbers are finite") {
  const auto decay = [](const std::string& text) {
    const RecipeCase read(kHead + "losses:\n  reuse: " + text + "\n");
    return read.told().empty() ? read.options.reuse : -99.0;
  };
  CHECK(decay("5e-3") == 0.005);
  CHECK(decay("1") == 1.0);
  CHECK(decay("-.5") == -0.5);
  CHECK(decay("+1E2") == 100.0);
  for (const std::string text : {".nan", "nan", "inf", "-inf", ".inf", "1e999", "1,5", "0.1x", "\"1\"", "x"}) {
    CHECK(decay(text) == -99.0);
    CHECK(contains(told("losses:\n  reuse: " + text + "\n"), "r.yaml:4: losses.reuse must be a finite number, got"));
  }
  CHECK(told("train: {weight_decay: 1.5}\n") == "r.yaml:3: train.weight_decay must be between 0 and 1, got 1.5");
}

TEST_CASE("Booleans are true, false, yes or no") {
  for (const auto& [text, expected] : {std::pair("true", true), {"yes", true}, {"false", false}, {"no", false}}) {
    const RecipeCase read(kHead + "strict: " + text + "\n");
    CHECK(read.told().empty());
    CHECK(read.options.strict == expected);
  }
  for (const std::string text : {"1", "on", "True ish", "\"true\"", "[true]"}) {
    CHECK(contains(told("strict: " + text + "\n"), "r.yaml:3: strict must be true or false, got "));
  }
}

TEST_CASE("A key without a value is refused") {
  for (const std::string text : {"", " ~", " null", " # nothing"}) {
    CHECK(told("strict:" + text + "\n") ==
          "r.yaml:3: strict has no value; give one or remove the key to keep its default");
  }
  CHECK(told("train:\n#  steps: 3\n") ==
        "r.yaml:3: train has no value; give one or remove the key to keep its default");
  CHECK(contains(told("cache: {policies: [lru, ~]}\n"), "cache.policies must be a list of texts, got nothing"));
  CHECK(RecipeCase("recipe_version: 1\nrun_dir:\n").told() ==
        "r.yaml:2: run_dir has no value; give one (\"\" is an empty text) or remove the key to keep its default");
}

TEST_CASE("One value is no list, a list is no value, a section is neither") {
  CHECK(told("cache: {slots: 4}\n") == "r.yaml:3: cache.slots must be a list of integers in brackets, got \"4\"");
  CHECK(told("cache: {policies: lru}\n") ==
        "r.yaml:3: cache.policies must be a list of texts in brackets, got \"lru\"");
  CHECK(told("train: {betas: 0.9}\n") == "r.yaml:3: train.betas must be a list of numbers in brackets, got \"0.9\"");
  CHECK(RecipeCase("recipe_version: 1\nrun_dir: [a]\n").told() == "r.yaml:2: run_dir must be a text, got a list");
  CHECK(told("train: 5\n") == "r.yaml:3: train must be a section of \"key: value\" lines, got \"5\"");
  CHECK(told("train: [a]\n") == "r.yaml:3: train must be a section of \"key: value\" lines, got a list");
  CHECK(told("corpora: {domain: a}\n") == "r.yaml:3: corpora must be a list of sections, got a section");
  CHECK(told("corpora: [a]\n") ==
        "r.yaml:3: corpora.0 must be a section of \"key: value\" lines, got \"a\"\n"
        "r.yaml:3: the key \"corpora.0.domain\" is missing; add it (label in every report)");
  CHECK(told("[a, b]: 3\n") == "r.yaml:3: a key must be a word, got a list");
  CHECK(contains(RecipeCase("- a\n").told(),
                 "r.yaml:1: the recipe must be a section of \"key: value\" lines, got a list"));
  CHECK(contains(RecipeCase("").told(), "r.yaml:1: the recipe must be a section of \"key: value\" lines, got nothing"));
}

TEST_CASE("What is not YAML is refused with line and column") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "r.yaml";
  const auto message = [&](const std::string& text) {
    put_file(path, text);
    Options options;
    Problems problems;
    std::string told = error_text<UsageError>([&] { (void)read_recipe(path, {}, options.fields(), problems); });
    const std::string lead = folder.path().string() + "/";
    REQUIRE(told.substr(0, lead.size()) == lead);
    return told.substr(lead.size());
  };
  CHECK(contains(message(kHead + "train: {steps: 3\n"), "r.yaml:4:1: not YAML, end of map flow not found; check"));
  CHECK(contains(message(kHead + "train:\n  steps: 3\n bad: 1\n"), "r.yaml:5:"));
  CHECK(contains(message(kHead + "run: \"open\n"), "not YAML, "));
  CHECK(contains(message(kHead + "a: b: c\n"), "r.yaml:3:5: not YAML, illegal map value"));
  CHECK(contains(message(kHead + "train:\n\tsteps: 3\n"), "r.yaml:4:1: not YAML, a tab"));
  CHECK(contains(message(kHead + "train:\n  \tsteps: 3\n"), "r.yaml:4:3: not YAML, a tab"));
  CHECK(contains(message(kHead + "---\nstrict: true\n"), "not YAML, there is a second document"));
  CHECK(contains(message(std::string(3000, '[')), "r.yaml:1:"));
  CHECK(contains(message(kHead + "a: *nowhere\n"), "r.yaml:3:4: not YAML, "));
  CHECK(contains(error_text<InputError>([&] {
                   Options options;
                   Problems problems;
                   (void)read_recipe(folder.path() / "no.yaml", {}, options.fields(), problems);
                 }),
                 "no.yaml: cannot be read, No such file or directory"));
}

TEST_CASE("Tabs are fine where they do not indent") {
  CHECK(told("strict: true\t# why\n\t\n\t# a comment\nlosses: {\n\treuse: 1}\n").empty());
}

TEST_CASE("Overrides set any key, split at the first =") {
  const RecipeCase read(
      kHead + "train: {steps: 3}\ncorpora:\n  - {domain: a, paths: [x, y]}\n",
      {"train.steps=1e2", "run_dir=/tmp/a=b=c", "cache.slots=[1, 2, 3]", "cache.slots.1=9", "cache.slots.3=4",
       "cache.policies=[]", "cache.policies.0=lfu", "strict=true", "corpora.0.paths.1=z", "corpora.1={domain: b}",
       "corpora.2.domain=c", "losses={reuse: 0.5}", "train.schedule=\"linear\""});
  CHECK(read.told().empty());
  CHECK(read.options.steps == 100);
  CHECK(read.options.run_dir == "/tmp/a=b=c");
  CHECK(read.options.slots == std::vector<std::int64_t>{1, 9, 3, 4});
  CHECK(read.options.policies == std::vector<std::string>{"lfu"});
  CHECK(read.options.strict);
  CHECK(read.options.schedule == "linear");
  CHECK(read.options.reuse == 0.5);
  CHECK(read.options.load_balance == 0.01);
  REQUIRE(read.options.corpora.size() == 3);
  CHECK(read.options.corpora[0].paths == std::vector<std::string>{"x", "z"});
  CHECK(read.options.corpora[1].domain == "b");
  CHECK(read.options.corpora[2].domain == "c");
  CHECK(read.source.overrides().size() == 13);
}

TEST_CASE("Wrong overrides are told as such") {
  CHECK(told("", {"losses.load_balence=1"}) ==
        "command line: unknown key \"losses.load_balence\"; did you mean \"losses.load_balance\"?");
  CHECK(told("", {"loses.reuse=1"}) == "command line: unknown key \"loses.reuse\"; did you mean \"losses.reuse\"?");
  CHECK(told("", {"reuse=1"}) == "command line: unknown key \"reuse\"; did you mean \"losses.reuse\"?");
  CHECK(told("", {"train.steps.x=1"}) == "command line: unknown key \"train.steps.x\"; did you mean \"train.steps\"?");
  CHECK(told("", {"corpora.0.domain=a", "corpora.0.sharre=1"}) ==
        "command line: unknown key \"corpora.0.sharre\"; did you mean \"corpora.0.share\"?");
  CHECK(told("", {"train.steps=0"}) == "command line: train.steps must be between 1 and 1000000000000000, got 0");
  CHECK(told("", {"train.steps=abc"}) == "command line: train.steps must be an integer, got \"abc\"");
  CHECK(told("", {"cache.slots=4"}) == "command line: cache.slots must be a list of integers in brackets, got \"4\"");
  CHECK(told("", {"cache.slots=[4, 0]"}) == "command line: cache.slots must be at least 1, got 0");
  CHECK(told("", {"cache.slots.5=1"}) ==
        "command line: cache.slots has 2 elements, got the index \"5\"; 0 to 1 replace, 2 appends");
  CHECK(told("", {"corpora.1.domain=a"}) ==
        "command line: corpora has 0 elements, got the index \"1\"; 0 appends the first");
  CHECK(told("", {"corpora.first.domain=a"}) ==
        "command line: corpora has 0 elements, got the index \"first\"; 0 appends the first");
  CHECK(told("", {"cache.slots.-1=3"}) ==
        "command line: cache.slots has 2 elements, got the index \"-1\"; 0 to 1 replace, 2 appends");
  CHECK(told("", {"strict"}) == "command line: \"strict\" is not an override; write key=value");
  CHECK(told("", {"=3"}) == "command line: \"=3\" is not an override; write key=value");
  CHECK(contains(told("", {"strict="}), "command line: strict has no value; give one"));
  CHECK(contains(told("", {"run_dir=[a"}), "command line: run_dir=[a: the value is not YAML, "));
  CHECK(contains(told("", {"run_dir=a: b: c"}), "the value is not YAML, "));
  CHECK(told("", {"run_dir=a: b"}) == "command line: run_dir must be a text, got a section");
}

TEST_CASE("Interpolation: environment, defaults, other keys") {
  ::setenv("HESTIA_TEST_ROOT", "/data/${run_dir}", 1);
  ::setenv("HESTIA_TEST_EMPTY", "", 1);
  ::unsetenv("HESTIA_TEST_UNSET");
  const RecipeCase read(R"(recipe_version: 1
run_dir: ${corpora.0.paths.0}/run
train: {schedule: "${env:HESTIA_TEST_UNSET:-linear}"}
corpora:
  - domain: ${env:HESTIA_TEST_ROOT}
    paths: ["${corpora.0.paths.1}/a", "${env:HESTIA_TEST_UNSET:-}b", "$${kept} $x $$ {}", "${train.schedule}",
            "${env:HESTIA_TEST_EMPTY}|${env:HESTIA_TEST_EMPTY:-default}|${env:HESTIA_TEST_UNSET:-a:-b}"]
)");
  CHECK(read.told().empty());
  CHECK(read.options.run_dir == "b/a/run");
  CHECK(read.options.schedule == "linear");
  CHECK(read.options.corpora[0].domain == "/data/${run_dir}");  // what the environment holds is text, not a recipe
  CHECK(read.options.corpora[0].paths ==
        std::vector<std::string>{"b/a", "b", "${kept} $x $$ {}", "linear", "|default|a:-b"});
}

TEST_CASE("Interpolation sees overrides") {
  const RecipeCase read(kHead + "corpora: [{domain: \"${run_dir}/d\"}]\n", {"run_dir=new"});
  CHECK(read.told().empty());
  CHECK(read.options.corpora[0].domain == "new/d");
}

TEST_CASE("Wrong interpolations are told with their place") {
  ::unsetenv("HESTIA_TEST_UNSET");
  const auto domain = [](const std::string& text) { return told("corpora:\n  - domain: " + text + "\n"); };
  CHECK(
      domain("${env:HESTIA_TEST_UNSET}") ==
      "r.yaml:4: corpora.0.domain needs the environment variable HESTIA_TEST_UNSET, which is not set; set it or write "
      "${env:HESTIA_TEST_UNSET:-default}");
  CHECK(domain("${run_dri}") ==
        "r.yaml:4: corpora.0.domain refers to \"run_dri\", which is not a text key of this recipe; did you mean "
        "\"run_dir\"?");
  CHECK(contains(domain("${train.steps}"), "refers to \"train.steps\", which is not a text key of this recipe"));
  CHECK(contains(domain("\"${}\""), "refers to \"\", which is not a text key"));
  CHECK(contains(domain("\"${run_dir\""), "r.yaml:4: corpora.0.domain has a \"${\" without \"}\"; close it"));
  CHECK(domain("${corpora.0.domain}") ==
        "r.yaml:4: corpora.0.domain refers to itself through ${...}; break the circle");
  CHECK(RecipeCase("recipe_version: 1\nrun_dir: ${corpora.0.domain}\ncorpora: [{domain: \"a${run_dir}\"}]\n").told() ==
        "r.yaml:3: corpora.0.domain refers to itself through ${...}; break the circle");
  CHECK(told("train: {schedule: \"${run_dir}\"}\n") ==
        "r.yaml:3: train.schedule must be one of linear, cosine, constant, got \"runs/x\"");
  CHECK(
      told("", {"run_dir=${nowhere}"}) ==
      "run_dir=${nowhere} on the command line: run_dir refers to \"nowhere\", which is not a text key of this recipe");
}

TEST_CASE("The source knows where each value came from") {
  const RecipeCase read(R"(recipe_version: 1
run_dir: a
train:
  steps: 3
  betas:
    - 0.5
corpora:
  - domain: x
  - domain: y
    share: 0.5
)",
                        {"train.weight_decay=0.5", "corpora.0={domain: z}", "cache.slots.0=1"});
  REQUIRE(read.told().empty());
  const auto at = [&](const std::string& key) { return read.relative(read.source.location(key)); };
  CHECK(at("run_dir") == "r.yaml:2");
  CHECK(at("train.steps") == "r.yaml:4");
  CHECK(at("train.betas") == "r.yaml:5");
  CHECK(at("train.schedule") == "r.yaml:3");  // the section around a default
  CHECK(at("losses.reuse") == "r.yaml");
  CHECK(at("train.weight_decay") == "train.weight_decay=0.5 on the command line");
  CHECK(at("corpora.0.domain") == "corpora.0={domain: z} on the command line");
  CHECK(at("corpora.1.share") == "r.yaml:10");
  CHECK(at("cache.slots.0") == "cache.slots.0=1 on the command line");
  CHECK(read.source.is_set("train"));
  CHECK(read.source.is_set("train.steps"));
  CHECK(read.source.is_set("train.weight_decay"));
  CHECK_FALSE(read.source.is_set("train.schedule"));
  CHECK_FALSE(read.source.is_set("losses"));
  CHECK_FALSE(read.source.is_set("train.step"));
  CHECK(read.source.is_set("cache"));
  CHECK(read.source.is_overridden("train.weight_decay"));
  CHECK(read.source.is_overridden("corpora.0.domain"));
  CHECK_FALSE(read.source.is_overridden("train.steps"));
  CHECK_FALSE(read.source.is_overridden("train.schedule"));
  CHECK(read.source.path() == read.path());
  const std::string text = read_text_file(read.path());
  CHECK(read.source.hash() == sha256_hex(as_bytes(text)));
}

TEST_CASE("Help has one aligned row for each key") {
  Options options;
  const std::string help = describe_fields(options.fields());
  CHECK(contains(help, "\ntrain.steps          integer between 1 and 1000000000000000  120"));
  CHECK(contains(help, "\ntrain.schedule       linear|cosine|constant"));
  CHECK(contains(help, "\ntrain.learning_rate  number above 0"));
  CHECK(contains(help, "\ncorpora.N.domain     text                                    required"));
  CHECK(contains(help, "refuse degraded modes\n"));
  CHECK(options.corpora.empty());
  std::size_t rows = 0;
  std::size_t column = std::string::npos;
  for (std::size_t begin = 0; begin < help.size(); ++rows) {
    const std::size_t end = help.find('\n', begin);
    const std::string line = help.substr(begin, end - begin);
    if (contains(line, "weight") && !contains(line, "weight_decay")) {
      CHECK((column == std::string::npos || line.rfind("weight") == column));
      column = line.rfind("weight");
    }
    begin = end + 1;
  }
  CHECK(rows == 15);
  CHECK(field_keys(options.fields()) ==
        std::vector<std::string>{"run_dir", "strict", "train", "train.steps", "train.learning_rate",
                                 "train.weight_decay", "train.schedule", "train.betas", "losses", "losses.load_balance",
                                 "losses.reuse", "cache", "cache.slots", "cache.policies", "corpora",
                                 "corpora.N.domain", "corpora.N.paths", "corpora.N.share"});
}

}  // namespace
}  // namespace hestia
