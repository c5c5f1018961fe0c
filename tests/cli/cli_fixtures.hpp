#pragma once

#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/files.hpp"
#include "hestia/core/random.hpp"
#include "program.hpp"
#include "temporary_folder.hpp"

namespace hestia::testing {

/// The program refused: this exit code, nothing on stdout, one complaint on stderr that says every part.
inline void check_complaint(const Outcome& outcome, int code, const std::vector<std::string>& parts) {
  INFO("stderr: " << outcome.err);
  CHECK(outcome.code == code);
  CHECK(outcome.out.empty());
  CHECK_THAT(outcome.err, Catch::Contains("error: "));
  CHECK_THAT(outcome.err, !Catch::Contains("terminate called") && !Catch::Contains("json.exception"));
  for (const std::string& part : parts) {
    CHECK_THAT(outcome.err, Catch::Contains(part));
  }
}

/// The program did what it was asked for; gives back its stdout.
inline std::string done(const Outcome& outcome) {
  INFO("stderr: " << outcome.err);
  INFO("stdout: " << outcome.out);
  REQUIRE(outcome.code == 0);
  return outcome.out;
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  INFO("looking for: " << from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

/// A folder with two small corpora, a recipe that pretrains a model of a few thousand parameters on them in seconds,
/// and one that tunes its routers. Paths in the recipes are relative: run the program in `path()`.
class SmallProject {
 public:
  SmallProject() {
    std::filesystem::create_directories(path() / "letters");
    SplitMix64 random(20);
    for (int file = 0; file < 40; ++file) {
      write("letters/" + std::to_string(file) + ".txt",
            sentences(random, {"alpha", "beta", "gamma", "delta", "eta"}, 60));
    }
    std::string lines;
    for (int line = 0; line < 60; ++line) {
      lines += R"({"question": ")" + sentences(random, {"red?", "green?", "blue?"}, 4) + R"(", "answer": ")" +
               sentences(random, {"dark", "light", "pale", "vivid", "dull"}, 20) + "\"}\n";
    }
    write("colours.jsonl", lines);
    write("pretrain.yaml", kPretrain);
    write("finetune.yaml", kFinetune);
  }

  [[nodiscard]] const std::filesystem::path& path() const { return folder_.path(); }
  void write(const std::string& name, const std::string& text) const { write_text_atomically(path() / name, text); }
  [[nodiscard]] std::string read(const std::string& name) const { return read_text_file(path() / name); }
  /// Runs `hestia` inside the folder.
  [[nodiscard]] Outcome run(const std::vector<std::string>& arguments) const { return hestia(arguments, here()); }
  [[nodiscard]] Surroundings here() const { return {path(), {}, {}}; }
  /// Makes the model that finetune.yaml tunes.
  void pretrain() const { done(run({"pretrain", "pretrain.yaml", "--quiet"})); }

  static constexpr const char* kPretrain = R"(# Pretrains a toy.
recipe_version: 1
task: pretrain
run_dir: runs/base
seed: 7
model: {dtype: float32, device: cpu, threads: 1}
architecture:
  hidden_size: 16
  expert_intermediate_size: 8
  num_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 2
  num_experts: 8
  top_k: 2
  initializer_range: 0.2
tokenizer: {vocab_size: 320, sample_bytes: 100000}
data:
  sequence_length: 64
  held_out_fraction: 0.3
  train: [letters, colours]
  evaluate: [letters, colours]
  corpora:
    - {domain: letters, paths: [letters]}
    - {domain: colours, paths: [colours.jsonl], format: jsonl, text_field: answer, prompt_field: question}
losses:
  load_balance: {weight: 0.01}
train: {trainable: all, steps: 6, rows_per_batch: 2, learning_rate: 5.0e-3, log_every: 2, evaluate_tokens: 1000}
save: {dtype: float32}
)";
  static constexpr const char* kFinetune = R"(# Tunes the routers of the toy.
recipe_version: 1
task: finetune
run_dir: runs/tuned
seed: 8
model: {path: runs/base/model, dtype: float32, device: cpu, threads: 1}
data:
  sequence_length: 64
  held_out_fraction: 0.3
  train: [letters]
  evaluate: [letters, colours]
  corpora:
    - {domain: letters, paths: [letters]}
    - {domain: colours, paths: [colours.jsonl], format: jsonl, text_field: answer, prompt_field: question}
losses:
  cache_simulation: {weight: 0.1}
  rank_matching: {weight: 0.01}
  reuse: {weight: 0.3}
  trust: {weight: 0.1}
train: {steps: 6, rows_per_batch: 2, learning_rate: 2.0e-2, log_every: 1, evaluate_tokens: 1000}
control: {enabled: true, learning_rate: 1.0e-3}
export: {tokens: 2000, max_sequences: 9}
evaluate: {tokens_per_domain: 2000, policies: [lru, belady]}
)";

 private:
  static std::string sentences(SplitMix64& random, const std::vector<std::string>& words, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) {
      text += words[random.below(words.size())] + (i + 1 == count ? "" : " ");
    }
    return text;
  }

  TemporaryFolder folder_;
};

}  // namespace hestia::testing
