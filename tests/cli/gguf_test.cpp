#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "gguf_writer.hpp"
#include "hestia/core/gguf.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia::testing {
namespace {

// A GGUF file with the routers of the project's base model and no other tensors but one per layer of experts.
void write_gguf(const SmallProject& project, const std::string& name) {
  const SafetensorsCheckpoint base(project.path() / "runs/base/model");
  GgufWriter writer;
  writer.text("general.architecture", "olmoe").uint32("olmoe.block_count", 2).uint32("olmoe.embedding_length", 16);
  writer.uint32("olmoe.expert_count", 8).uint32("olmoe.expert_used_count", 2);
  writer.texts("tokenizer.ggml.tokens", {"<s>", "caf\u00e9"}).boolean("tokenizer.ggml.add_bos_token", true);
  writer.float32("olmoe.rope.freq_base", 10000.0F);
  for (int layer = 0; layer < 2; ++layer) {
    writer.tensor(fmt::format("blk.{}.ffn_up_exps.weight", layer), {32, 8, 8}, 8, std::string(8 * 8 * 34, '\x11'));
    const TensorView& router = base.tensor(fmt::format("model.layers.{}.mlp.gate.weight", layer));
    REQUIRE(router.dtype == DType::kF32);
    writer.tensor(fmt::format("blk.{}.ffn_gate_inp.weight", layer), {16, 8}, 0,
                  {reinterpret_cast<const char*>(router.bytes.data()), router.bytes.size()});
  }
  writer.save(project.path() / name);
}

TEST_CASE("tuned routers go into the base model's GGUF file, and inspect reads it") {
  const SmallProject project;
  project.pretrain();
  write_gguf(project, "base.gguf");
  const std::vector<std::string> finished = {"finetune.yaml", "control.enabled=false", "train.steps=2"};
  const auto with = [&](std::vector<std::string> arguments, const std::vector<std::string>& more = {}) {
    arguments.insert(arguments.end(), finished.begin(), finished.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  done(project.run(with({"finetune"}, {"--quiet"})));
  CHECK(done(project.run(with({"export"}, {"--to", "gguf", "--gguf", "base.gguf"}))) == "runs/tuned/gguf/base.gguf\n");
  const SafetensorsFile routers(project.path() / "runs/tuned/checkpoints/step_2/router.safetensors");
  std::string expected = project.read("base.gguf");
  const GgufFile base(project.path() / "base.gguf");
  for (int layer = 0; layer < 2; ++layer) {
    const auto tuned = routers.tensor(fmt::format("model.layers.{}.mlp.gate.weight", layer)).bytes;
    const std::string bytes(reinterpret_cast<const char*>(tuned.data()), tuned.size());
    const std::uint64_t at = base.tensor(fmt::format("blk.{}.ffn_gate_inp.weight", layer)).file_offset;
    REQUIRE(expected.compare(at, bytes.size(), bytes) != 0);
    expected.replace(at, bytes.size(), bytes);
  }
  CHECK(project.read("runs/tuned/gguf/base.gguf") == expected);

  const auto refused = [&](const std::vector<std::string>& more, int code, const std::vector<std::string>& parts) {
    check_complaint(project.run(with({"export"}, more)), code, parts);
  };
  refused({"--to", "gguf", "--gguf", "base.gguf"}, 2, {"runs/tuned/gguf/base.gguf", "exists already", "--output"});
  refused({"--to", "gguf"}, 2, {"--to gguf", "--gguf BASE.gguf"});
  refused({"--gguf", "base.gguf"}, 2, {"--gguf is for --to gguf", "bundle"});
  refused({"--to", "gguf", "--gguf", "absent.gguf", "--output", "o.gguf"}, 3, {"absent.gguf", "No such file"});
  refused({"--to", "gguf", "--gguf", "runs/tuned/gguf/base.gguf", "--output", "o.gguf"}, 3,
          {"the router of layer 0 (\"blk.0.ffn_gate_inp.weight\")", "another base"});
  refused({"--to", "gguf", "--gguf", "finetune.yaml", "--output", "o.gguf"}, 3, {"not a GGUF file", "\"# Tu\""});
  refused({"--to", "ggml"}, 2, {"bundle, hf, gguf", "\"ggml\""});
  CHECK_FALSE(std::filesystem::exists(project.path() / "o.gguf"));

  const std::string told = done(project.run({"inspect", "base.gguf", "--memory", "8KiB"}));
  for (const char* part :
       {"base.gguf: GGUF file\n", "architecture               olmoe\n", "2 (2 with experts)",
        "8 per layer, 2 per token", "bytes per expert           272 B\n", "expert bytes a token uses  1.1 KiB\n",
        "dense bytes                1.0 KiB\n", "blk.0.ffn_gate_inp.weight ... blk.1.ffn_gate_inp.weight F32 [8, 16]",
        "slots in 8KiB              8 of 8", "8 metadata keys\n", "olmoe.rope.freq_base          10000\n",
        "2 x string: [\"<s>\",\"caf\u00e9\"]\n", "tokenizer.ggml.add_bos_token  true\n", "4 tensors\n",
        "blk.1.ffn_up_exps.weight   Q8_0 [8, 8, 32]\n"}) {
    CHECK_THAT(told, Catch::Contains(part));
  }
  project.write("cut.gguf", expected.substr(0, 300));
  check_complaint(project.run({"inspect", "cut.gguf"}), 3, {"cut.gguf: ", "truncated"});
}

TEST_CASE("upcycle makes a model directory with the tokenizer out of a dense file") {
  const SmallProject project;
  SplitMix64 random(2);
  GgufWriter writer;
  writer.text("general.architecture", "llama").uint32("llama.embedding_length", 8).uint32("llama.block_count", 1);
  writer.uint32("llama.feed_forward_length", 12).uint32("llama.attention.head_count", 2);
  writer.float32("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  writer.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
  writer.texts("tokenizer.ggml.tokens", {"a", "b", "ab"}).texts("tokenizer.ggml.merges", {"a b"});
  const auto add = [&](const std::string& name, const std::vector<std::uint64_t>& shape) {
    std::vector<float> values(shape.size() == 1 ? shape[0] : shape[0] * shape[1]);
    for (float& value : values) {
      value = static_cast<float>(random.uniform() - 0.5);
    }
    writer.tensor(name, shape, 0, GgufWriter::raw_floats(values));
  };
  add("token_embd.weight", {8, 3});
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output"}) {
    add(fmt::format("blk.0.{}.weight", name), {8, 8});
  }
  add("blk.0.attn_norm.weight", {8});
  add("blk.0.ffn_norm.weight", {8});
  add("blk.0.ffn_gate.weight", {8, 12});
  add("blk.0.ffn_up.weight", {8, 12});
  add("blk.0.ffn_down.weight", {12, 8});
  add("output_norm.weight", {8});
  writer.save(project.path() / "dense.gguf");
  const std::vector<std::string> sizes = {"upcycle", "dense.gguf", "--experts", "12", "--top-k", "3"};
  const auto with = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = sizes;
    arguments.insert(arguments.end(), more.begin(), more.end());
    return project.run(arguments);
  };
  for (const char* start : {"grouped", "signed"}) {
    const std::string to = std::string("moe-") + start;
    const Outcome outcome = with({"--start", start, "--to", to});
    CHECK(done(outcome) == to + "\n");
    CHECK_THAT(outcome.err, Catch::Contains("12 experts of 4 neurons in 1 layers, 3 per token, " + std::string(start)));
    for (const char* file : {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}) {
      CHECK(std::filesystem::exists(project.path() / to / file));
    }
    CHECK(SafetensorsFile(project.path() / to / "model.safetensors").names().size() == 2 + 6 + 1 + 12 * 3);
  }
  CHECK(project.read("moe-grouped/model.safetensors") != project.read("moe-signed/model.safetensors"));
  CHECK_THAT(done(project.run({"inspect", "moe-grouped"})),
             Catch::Contains("moe-grouped: model directory") && Catch::Contains("mixtral") &&
                 Catch::Contains("12 per layer, 3 per token") && Catch::Contains("1 (1 with experts)") &&
                 Catch::Contains("model.layers.0.block_sparse_moe.gate.weight"));
  // Every grouped start is the dense function, however it is cut.
  std::vector<std::vector<float>> logits;
  for (const auto& [experts, top_k] : {std::pair("12", "3"), std::pair("4", "2"), std::pair("2", "1")}) {
    const std::string to = std::string("cut-") + experts;
    done(project.run(
        {"upcycle", "dense.gguf", "--experts", experts, "--top-k", top_k, "--dtype", "float32", "--to", to}));
    done(project.run({"logits", to, "--tokens", "0,2,1,1", "--output", to + ".safetensors"}));
    const SafetensorsFile file(project.path() / (to + ".safetensors"));
    CHECK(file.tensor("logits").shape == std::vector<std::int64_t>{4, 3});
    CHECK(file.tensor("router_logits").shape == std::vector<std::int64_t>{1, 4, std::stoi(experts)});
    CHECK(file.tensor("selected").shape == std::vector<std::int64_t>{1, 4, std::stoi(top_k)});
    const TensorView view = file.tensor("logits");
    logits.emplace_back(12);
    REQUIRE(view.bytes.size() == 12 * sizeof(float));
    std::memcpy(logits.back().data(), view.bytes.data(), view.bytes.size());
  }
  CHECK(std::any_of(logits[0].begin(), logits[0].end(), [](float value) { return std::abs(value) > 0.01F; }));
  for (std::size_t i = 0; i < 12; ++i) {
    CHECK(logits[1][i] == Approx(logits[0][i]).margin(1e-5));
    CHECK(logits[2][i] == Approx(logits[0][i]).margin(1e-5));
  }
  done(with({"--start", "signed", "--to", "again"}));
  CHECK(project.read("again/model.safetensors") == project.read("moe-signed/model.safetensors"));
  check_complaint(with({"--to", "again"}), 2, {"again: exists already", "--to"});
  check_complaint(project.run({"upcycle", "dense.gguf", "--experts", "12", "--top-k", "5", "--to", "x"}), 2,
                  {"multiple of --top-k (5), got 12", "(12), got 5"});
  check_complaint(with({"--to", "x", "--start", "random"}), 2, {"grouped or signed", "\"random\""});
  check_complaint(with({"--to", "x", "--dtype", "int8"}), 2, {"bfloat16", "\"int8\""});
  check_complaint(project.run({"upcycle", "absent", "--to", "x"}), 3, {"absent: no such file"});
  check_complaint(project.run({"upcycle", "finetune.yaml", "--to", "x"}), 3, {"not a GGUF file"});
  CHECK_FALSE(std::filesystem::exists(project.path() / "x"));
}

}  // namespace
}  // namespace hestia::testing
