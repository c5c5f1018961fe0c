#include <bit>
#include <cmath>

#include <catch2/catch.hpp>

#include "hestia/core/files.hpp"
#include "hestia/core/random.hpp"
#include "recipe_fixtures.hpp"

namespace hestia {
namespace {

// Pieces that YAML, or this reader, could take for something else.
const std::vector<std::string> kPieces = {
    " ",      "\n", "\t",          "\"",   "'",      "\\",         ":",          ": ",     "=",       "#",
    " # ",    "-",  "- ",          "?",    "!",      "&",          "*",          "|",      ">",       "%",
    "@",      "`",  "[",           "]",    "{",      "}",          ",",          "~",      "null",    "true",
    "no",     "12", "1e3",         "0x1F", ".nan",   "2001-01-01", "<<",         "---",    "...",     "${",
    "$",      "$$", "${env:HOME}", "}",    "\u00e9", "\u4e2d",     "\U0001F600", "\u0085", "\u2028",  "\u2029",
    "\ufeff", "\r", "\r\n",        "\x01", "\x1b",   "\x7f",       "/usr/share", "word",   "a-b_c.d", "Z"};

std::string random_text(SplitMix64& random) {
  std::string text;
  for (std::uint64_t count = random.below(6); count > 0; --count) {
    text += kPieces[random.below(kPieces.size())];
  }
  return text;
}

double random_double(SplitMix64& random) {
  switch (random.below(4)) {
    case 0:
      return static_cast<double>(random.below(2000)) - 1000.0;
    case 1:
      return random.uniform();
    case 2:
      return -random.uniform() * 1e-300;
    default: {
      const double value = std::bit_cast<double>(random.next());
      return std::isfinite(value) ? value : -0.0;
    }
  }
}

Options random_options(SplitMix64& random) {
  Options options;
  options.run_dir = random_text(random);
  options.strict = random.below(2) == 1;
  options.steps = 1 + static_cast<std::int64_t>(random.below(1'000'000'000'000'000));
  options.learning_rate = 1e-12 + random.uniform();
  options.weight_decay = random.uniform();
  options.schedule = random.below(2) == 1 ? "linear" : "constant";
  options.load_balance = random_double(random);
  options.reuse = random_double(random);
  options.slots.resize(random.below(4));
  for (std::int64_t& slots : options.slots) {
    slots = 1 + static_cast<std::int64_t>(random.next() >> 1) / 2;
  }
  options.betas.resize(random.below(3));
  for (double& beta : options.betas) {
    beta = random.uniform();
  }
  options.policies.assign(random.below(3), "belady");
  options.corpora.resize(random.below(4));
  for (Corpus& corpus : options.corpora) {
    corpus.domain = random_text(random);
    corpus.paths.resize(random.below(4));
    for (std::string& path : corpus.paths) {
      path = random_text(random);
    }
    corpus.share = 1.0 - random.uniform();
  }
  return options;
}

bool same(double a, double b) {
  return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b);
}

void check_same(const Options& a, const Options& b) {
  REQUIRE(a.run_dir == b.run_dir);
  REQUIRE(a.strict == b.strict);
  REQUIRE(a.steps == b.steps);
  REQUIRE(same(a.learning_rate, b.learning_rate));
  REQUIRE(same(a.weight_decay, b.weight_decay));
  REQUIRE(a.schedule == b.schedule);
  REQUIRE(same(a.load_balance, b.load_balance));
  REQUIRE(same(a.reuse, b.reuse));
  REQUIRE(a.slots == b.slots);
  REQUIRE(a.betas == b.betas);
  REQUIRE(a.policies == b.policies);
  REQUIRE(a.corpora.size() == b.corpora.size());
  for (std::size_t i = 0; i < a.corpora.size(); ++i) {
    REQUIRE(a.corpora[i].domain == b.corpora[i].domain);
    REQUIRE(a.corpora[i].paths == b.corpora[i].paths);
    REQUIRE(same(a.corpora[i].share, b.corpora[i].share));
  }
}

TEST_CASE("A saved recipe reads back exactly, whatever it holds") {
  SplitMix64 random(2024);
  for (int i = 0; i < 1500; ++i) {
    Options written = random_options(random);
    const std::string text = save_recipe(written.fields());
    INFO(text);
    const RecipeCase read(text);
    REQUIRE(read.told() == "");
    check_same(read.options, written);
  }
}

std::string utf8(std::uint32_t character) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | ((character >> shift) & 0x3F)); };
  if (character < 0x80) {
    return {static_cast<char>(character)};
  }
  if (character < 0x800) {
    return {static_cast<char>(0xC0 | (character >> 6)), tail(0)};
  }
  return {static_cast<char>(0xE0 | (character >> 12)), tail(6), tail(0)};
}

TEST_CASE("Every character of the first 12288 survives saving, wherever it stands") {
  constexpr std::uint32_t kAtOnce = 256;
  for (std::uint32_t first = 0; first < 0x3000; first += kAtOnce) {
    Options written;
    written.corpora.resize(1);
    for (std::uint32_t character = first; character < first + kAtOnce; ++character) {
      const std::string text = utf8(character);
      for (const std::string& placed : {text, "a" + text, text + "b", "a" + text + "b"}) {
        written.corpora[0].paths.push_back(placed);
      }
    }
    const RecipeCase read(save_recipe(written.fields()));
    REQUIRE(read.told() == "");
    check_same(read.options, written);
  }
}

TEST_CASE("A saved recipe is plain to read") {
  Options options;
  options.run_dir = "runs/quickstart";
  options.corpora.resize(2);
  options.corpora[0].domain = "kernel";
  options.corpora[0].paths = {"/usr/share/doc", "with space"};
  options.corpora[1].domain = "true";
  CHECK(save_recipe(options.fields()) == R"(recipe_version: 1
run_dir: runs/quickstart
strict: false
train:
  steps: 120
  learning_rate: 0.005
  weight_decay: 0
  schedule: cosine
  betas: [0.9, 0.95]
losses:
  load_balance: 0.01
  reuse: 0.3
cache:
  slots: [4, 8]
  policies: [lru]
corpora:
  - domain: kernel
    paths: [/usr/share/doc, "with space"]
    share: 1
  - domain: "true"
    paths: []
    share: 1
)");
}

TEST_CASE("Sections without fields and lists in lists are saved so that they read back") {
  struct Inner {
    std::vector<std::int64_t> values;
    FieldList fields() {
      FieldList values_only;
      values_only.add("values", values, "numbers");
      FieldList list;
      list.add_section("first", values_only, "a section as the first field");
      list.add_section("none", FieldList(), "nothing");
      return list;
    }
  };
  struct Outer {
    std::vector<Inner> inner;
    FieldList fields() {
      FieldList list;
      list.add_list("inner", inner, "elements");
      return list;
    }
  };
  struct Root {
    std::vector<Outer> outer;
    FieldList fields() {
      FieldList list;
      list.add_list("outer", outer, "elements");
      list.add_section("none", FieldList(), "nothing");
      return list;
    }
  };
  Root written;
  written.outer.resize(3);
  written.outer[0].inner.resize(2);
  written.outer[0].inner[1].values = {3, 4};
  written.outer[2].inner.resize(1);
  written.outer[2].inner[0].values = {5};
  const TemporaryFolder folder;
  const std::string text = save_recipe(written.fields());
  INFO(text);
  put_file(folder.path() / "r.yaml", text);
  Root read;
  Problems problems;
  (void)read_recipe(folder.path() / "r.yaml", {}, read.fields(), problems);
  CHECK(problems.joined() == "");
  REQUIRE(read.outer.size() == 3);
  REQUIRE(read.outer[0].inner.size() == 2);
  CHECK(read.outer[0].inner[1].values == std::vector<std::int64_t>{3, 4});
  CHECK(read.outer[1].inner.empty());
  CHECK(read.outer[2].inner[0].values == std::vector<std::int64_t>{5});
}

TEST_CASE("No damage to a recipe crashes the reader") {
  SplitMix64 random(77);
  Options options = random_options(random);
  options.corpora.resize(2);
  const std::string good = save_recipe(options.fields());
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "r.yaml";
  int fine = 0;
  int told = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    for (std::uint64_t edits = 1 + random.below(4); edits > 0; --edits) {
      const std::size_t at = random.below(bad.size());
      switch (random.below(3)) {
        case 0:
          bad.erase(at, 1 + random.below(5));
          break;
        case 1:
          bad.insert(at, kPieces[random.below(kPieces.size())]);
          break;
        default:
          bad[at] = static_cast<char>(random.below(256));
      }
    }
    put_file(path, bad);
    Options read;
    Problems problems;
    try {
      (void)read_recipe(path, {}, read.fields(), problems);
      for (const std::string& message : problems.messages()) {
        REQUIRE(message.rfind(path.string() + ":", 0) == 0);
      }
      ++(problems.empty() ? fine : told);
    } catch (const UsageError& error) {
      REQUIRE(std::string(error.what()).rfind(path.string() + ":", 0) == 0);
      ++told;
    }
  }
  CHECK(fine > 50);
  CHECK(told > 500);
}

}  // namespace
}  // namespace hestia
