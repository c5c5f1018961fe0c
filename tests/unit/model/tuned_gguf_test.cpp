#include "hestia/model/tuned_gguf.hpp"

#include <functional>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "gguf_writer.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/gguf.hpp"
#include "hestia/core/log.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/tensors.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

namespace hestia {
namespace {

using testing::GgufWriter;

std::vector<float> router_values(MoeModel model, std::int64_t layer) {
  const std::string name = router_name(model->architecture(), layer);
  for (const auto& [found, tensor] : model->named_tensors()) {
    if (found == name) {
      const torch::Tensor flat = tensor.detach().to(torch::kFloat32).contiguous();
      return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
    }
  }
  throw std::runtime_error("no router");
}

// What one file may have in another way than it should.
struct Layout {
  std::string architecture = "olmoe";
  std::uint32_t block_count = 2;
  std::uint32_t embedding_length = 32;
  std::uint32_t expert_count = 8;
  std::uint32_t expert_used_count = 2;
  std::uint32_t router_type = 0;
  std::function<void(GgufWriter&)> more = [](GgufWriter&) {};
  int layers_with_routers = 2;
};

// A base model on disk, its GGUF file (routers between tensors of random bytes), and routers that were tuned.
class Fixture {
 public:
  explicit Fixture(torch::Dtype base_dtype = torch::kFloat32) {
    MoeModel stored = testing::tiny_model(3);
    save_model(stored, base(), base_dtype, std::size_t{1} << 30);
    model = load_model(base(), torch::kFloat32, torch::kCPU);
    MoeModel tuned = testing::tiny_model(4);
    save_routers(tuned, routers());
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      tuned_values.push_back(router_values(tuned, layer));
    }
  }
  [[nodiscard]] std::filesystem::path base() const { return folder.path() / "base"; }
  [[nodiscard]] std::filesystem::path routers() const { return folder.path() / "router.safetensors"; }
  [[nodiscard]] std::filesystem::path gguf() const { return folder.path() / "base.gguf"; }
  [[nodiscard]] std::filesystem::path output() const { return folder.path() / "out/tuned.gguf"; }

  [[nodiscard]] static std::string encoded(const std::vector<float>& values, std::uint32_t type) {
    if (type == 0) {
      return GgufWriter::raw_floats(values);
    }
    std::string bytes;
    for (const float value : values) {
      const std::uint16_t bits = type == 1 ? float_to_half_bits(value) : float_to_bfloat16_bits(value);
      bytes += GgufWriter::raw(bits);
    }
    return bytes;
  }
  void write_gguf(const Layout& layout = {}) const {
    GgufWriter writer;
    writer.text("general.architecture", layout.architecture);
    writer.uint32(layout.architecture + ".block_count", layout.block_count);
    writer.uint32(layout.architecture + ".embedding_length", layout.embedding_length);
    writer.uint32(layout.architecture + ".expert_count", layout.expert_count);
    writer.uint32(layout.architecture + ".expert_used_count", layout.expert_used_count);
    writer.texts("tokenizer.ggml.tokens", {"a", "b"});
    layout.more(writer);
    SplitMix64 random(9);
    for (int layer = 0; layer < layout.layers_with_routers; ++layer) {
      std::string noise;
      for (int i = 0; i < 4 * 37; ++i) {
        noise += static_cast<char>(random.below(256));
      }
      writer.tensor(fmt::format("blk.{}.ffn_up_exps.weight", layer), {37}, 0, noise);
      writer.tensor(fmt::format("blk.{}.ffn_gate_inp.weight", layer), {32, 8}, layout.router_type,
                    encoded(router_values(model, layer), layout.router_type));
    }
    writer.save(gguf());
  }
  void patch(std::int64_t top_k = 2) const { write_tuned_gguf(base(), {routers(), {}, top_k}, gguf(), output()); }
  [[nodiscard]] std::string refusal(std::int64_t top_k = 2) const {
    try {
      patch(top_k);
    } catch (const Error& error) {
      CHECK_FALSE(std::filesystem::exists(output()));
      return error.what();
    }
    return "no error";
  }

  TemporaryFolder folder;
  MoeModel model{nullptr};
  std::vector<std::vector<float>> tuned_values;
};

// Every byte of the output is the base's, but for the ranges, which hold what is given.
void check_bytes(const Fixture& fixture, const std::vector<std::pair<std::uint64_t, std::string>>& ranges) {
  std::string expected = read_text_file(fixture.gguf());
  for (const auto& [offset, bytes] : ranges) {
    REQUIRE(expected.compare(offset, bytes.size(), bytes) != 0);
    expected.replace(offset, bytes.size(), bytes);
  }
  CHECK(read_text_file(fixture.output()) == expected);
}

TEST_CASE("Tuned routers replace those of a GGUF file, and nothing else changes") {
  const bool half = GENERATE(false, true);
  const torch::Dtype base_dtype = GENERATE(torch::kFloat32, torch::kBFloat16, torch::kFloat16);
  INFO((half ? "F16, base " : "F32, base ") << torch::toString(base_dtype));
  const Fixture fixture(base_dtype);
  Layout layout;
  layout.router_type = half ? 1 : 0;
  fixture.write_gguf(layout);
  clear_degradations();
  fixture.patch();
  CHECK(degradations().size() == (half ? 1 : 0));
  const GgufFile file(fixture.gguf());
  check_bytes(fixture, {{file.tensor("blk.0.ffn_gate_inp.weight").file_offset,
                         Fixture::encoded(fixture.tuned_values[0], layout.router_type)},
                        {file.tensor("blk.1.ffn_gate_inp.weight").file_offset,
                         Fixture::encoded(fixture.tuned_values[1], layout.router_type)}});
  const GgufFile tuned(fixture.output());
  CHECK(tuned.integer("olmoe.expert_used_count") == 2);
  if (!half) {
    CHECK(tuned.floats("blk.1.ffn_gate_inp.weight") == fixture.tuned_values[1]);
  }
  // A second time onto the same name, and onto what is not the base any more.
  CHECK_THAT(
      [&] {
        try {
          fixture.patch();
        } catch (const UsageError& error) {
          return std::string(error.what());
        }
        return std::string();
      }(),
      Catch::Contains("exists already"));
  std::filesystem::rename(fixture.output(), fixture.gguf());
  CHECK_THAT(fixture.refusal(),
             Catch::Contains("the router of layer 0 (\"blk.0.ffn_gate_inp.weight\") is not that of"));
}

TEST_CASE("Another K is written into the metadata value of the same width") {
  const Fixture fixture;
  fixture.write_gguf();
  fixture.patch(1);
  const GgufFile file(fixture.gguf());
  check_bytes(fixture,
              {{file.value("olmoe.expert_used_count").file_offset, GgufWriter::raw<std::uint32_t>(1)},
               {file.tensor("blk.0.ffn_gate_inp.weight").file_offset, Fixture::encoded(fixture.tuned_values[0], 0)},
               {file.tensor("blk.1.ffn_gate_inp.weight").file_offset, Fixture::encoded(fixture.tuned_values[1], 0)}});
  CHECK(GgufFile(fixture.output()).integer("olmoe.expert_used_count") == 1);
}

TEST_CASE("Routers may differ from the base's by the rounding of either file's type, and no more") {
  const Fixture fixture;
  fixture.write_gguf();
  GgufFile file(fixture.gguf());
  std::string content = read_text_file(fixture.gguf());
  std::vector<float> rounded = router_values(fixture.model, 1);
  for (float& value : rounded) {
    value = half_bits_to_float(float_to_half_bits(value));
  }
  const std::uint64_t at = file.tensor("blk.1.ffn_gate_inp.weight").file_offset;
  // F32 values that were F16 once are not the base's float32 values, nor do these round to them.
  write_text_atomically(fixture.gguf(), content.replace(at, 4 * rounded.size(), GgufWriter::raw_floats(rounded)));
  CHECK_THAT(fixture.refusal(), Catch::Contains("the router of layer 1"));
  // The other way round: a bf16 base, a file from float32.
  const Fixture coarse(torch::kBFloat16);
  coarse.write_gguf();
  file = GgufFile(coarse.gguf());
  content = read_text_file(coarse.gguf());
  std::vector<float> finer = router_values(coarse.model, 1);
  for (float& value : finer) {
    value *= 1.0F + 0x1p-12F;
  }
  const std::uint64_t place = file.tensor("blk.1.ffn_gate_inp.weight").file_offset;
  write_text_atomically(coarse.gguf(), content.replace(place, 4 * finer.size(), GgufWriter::raw_floats(finer)));
  coarse.patch();
  CHECK(GgufFile(coarse.output()).floats("blk.1.ffn_gate_inp.weight") == coarse.tuned_values[1]);
}

TEST_CASE("A GGUF file that is not the base model's is refused with one message") {
  const Fixture fixture;
  const auto refusal = [&](const std::function<void(Layout&)>& change) {
    Layout layout;
    change(layout);
    fixture.write_gguf(layout);
    return fixture.refusal();
  };
  CHECK_THAT(refusal([](Layout& layout) { layout.architecture = "llama"; }),
             Catch::Contains("general.architecture must be \"olmoe\" for the olmoe model in") &&
                 Catch::Contains("got \"llama\""));
  const std::string sizes = refusal([](Layout& layout) {
    layout.block_count = 3;
    layout.expert_count = 64;
  });
  CHECK_THAT(sizes, Catch::Contains("\"olmoe.block_count\" must be 2 as in") && Catch::Contains("got 3") &&
                        Catch::Contains("\"olmoe.expert_count\" must be 8") && Catch::Contains("got 64"));
  CHECK_THAT(refusal([](Layout& layout) { layout.embedding_length = 16; }), Catch::Contains("embedding_length"));
  CHECK_THAT(refusal([](Layout& layout) { layout.expert_used_count = 1; }), Catch::Contains("expert_used_count"));
  CHECK_THAT(refusal([](Layout& layout) {
               layout.more = [](GgufWriter& writer) {
                 writer.pair("split.count", 2, GgufWriter::raw<std::uint16_t>(3));
               };
             }),
             Catch::Contains("one of 3 files of a split model; merge them"));
  CHECK_THAT(refusal([](Layout& layout) { layout.layers_with_routers = 1; }),
             Catch::Contains("tensor \"blk.1.ffn_gate_inp.weight\" is missing"));
  CHECK_THAT(refusal([](Layout& layout) { layout.router_type = 30; }),
             Catch::Contains("\"blk.0.ffn_gate_inp.weight\" must be F32 or F16 to be replaced, got BF16"));
  fixture.write_gguf();
  const std::string whole = read_text_file(fixture.gguf());
  write_text_atomically(fixture.gguf(), whole.substr(0, whole.size() - 5));
  CHECK_THAT(fixture.refusal(), Catch::Contains("truncated"));
  // Adapters.
  fixture.write_gguf();
  CHECK_THROWS_AS(
      write_tuned_gguf(fixture.base(), {fixture.routers(), fixture.routers(), 2}, fixture.gguf(), fixture.output()),
      UsageError);
  CHECK_FALSE(std::filesystem::exists(fixture.output()));
  // Values that F16 cannot hold.
  Layout half;
  half.router_type = 1;
  fixture.write_gguf(half);
  auto tuned = testing::tiny_model(4);
  {
    const torch::NoGradGuard no_grad;
    for (const auto& [name, tensor] : tuned->named_tensors()) {
      if (name == router_name(tuned->architecture(), 1)) {
        tensor.mul_(1e7);
      }
    }
  }
  save_routers(tuned, fixture.routers());
  CHECK_THAT(fixture.refusal(), Catch::Contains("has values that F16 cannot hold"));
  // No temporary file stays.
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(fixture.folder.path())) {
    files += entry.path().extension() == ".tmp" ? 1 : 0;
  }
  CHECK(files == 0);
}

}  // namespace
}  // namespace hestia
