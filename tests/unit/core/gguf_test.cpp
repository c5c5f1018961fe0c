#include "hestia/core/gguf.hpp"

#include <cmath>
#include <cstring>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "gguf_writer.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/safetensors.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::GgufWriter;

const std::filesystem::path kGoldens = std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/unit/core/goldens";

GgufWriter small_file() {
  GgufWriter writer;
  writer.text("general.architecture", "olmoe").uint32("olmoe.block_count", 2).float32("olmoe.eps", 1e-5F);
  writer.texts("words", {"a", "bc"}).int32s("kinds", {3, -1});
  writer.tensor("x", {4, 2}, 0, GgufWriter::raw_floats({1, 2, 3, 4, 5, 6, 7, 8}));
  writer.tensor("q", {32, 1}, 8, std::string(34, '\0'));
  return writer;
}

std::string refusal(const std::string& content) {
  const TemporaryFolder folder;
  put_file(folder.path() / "f.gguf", content);
  return error_text<InputError>([&] { const GgufFile file(folder.path() / "f.gguf"); });
}

std::string replaced_at(std::string content, std::size_t at, const std::string& bytes) {
  return content.replace(at, bytes.size(), bytes);
}

TEST_CASE("A file of the gguf package is read: metadata of every kind, tensors, alignment") {
  const GgufFile file(kGoldens / "python.gguf");
  CHECK(file.alignment() == 64);
  CHECK(file.text("general.architecture") == "llama");
  CHECK(file.integer("golden.uint8") == 255);
  CHECK(file.integer("golden.uint16") == 65535);
  CHECK(file.integer("golden.uint32") == 4294967295);
  CHECK(file.integer("golden.uint64") == (std::int64_t{1} << 62) + 1);
  CHECK(file.integer("golden.int8") == -128);
  CHECK(file.integer("golden.int16") == -32768);
  CHECK(file.integer("golden.int32") == std::numeric_limits<std::int32_t>::min());
  CHECK(file.integer("golden.int64") == std::numeric_limits<std::int64_t>::min());
  CHECK(file.number("golden.float32") == static_cast<double>(0.1F));
  CHECK(file.number("golden.float64") == 0.1);
  CHECK(file.number("golden.int16") == -32768.0);
  CHECK(file.boolean("golden.yes"));
  CHECK_FALSE(file.boolean("golden.no"));
  CHECK(file.text("golden.text") == "caf\u00e9 \u4e2d");
  CHECK(file.integers("golden.ints") == std::vector<std::int64_t>{1, -2, 3});
  CHECK(file.numbers("golden.floats") == std::vector<double>{0.5, -0.25});
  CHECK(file.texts("golden.texts") == std::vector<std::string>{"a", "", "\u4e2d b"});
  CHECK(file.names() == std::vector<std::string>{"t.F32", "t.F16", "t.BF16", "t.Q4_0", "t.Q4_1", "t.Q8_0", "t.Q6_K"});
  for (const std::string& name : file.names()) {
    CHECK(ggml_type_name(file.tensor(name).type) == name.substr(2));
    CHECK(file.tensor(name).file_offset % 64 == 0);
  }
  CHECK(file.tensor("t.F32").shape == std::vector<std::int64_t>{3, 64});
  CHECK(file.tensor("t.F32").num_elements() == 192);
  CHECK(file.tensor("t.Q6_K").bytes.size() == 2 * 210);
}

TEST_CASE("Dequantised values are those of the gguf package, bit by bit") {
  const GgufFile file(kGoldens / "python.gguf");
  const SafetensorsFile golden(kGoldens / "gguf_values.safetensors");
  REQUIRE(golden.names().size() == 6);
  for (const std::string& name : golden.names()) {
    INFO(name);
    const std::vector<float> values = file.floats(name);
    const TensorView& expected = golden.tensor(name);
    REQUIRE(values.size() * sizeof(float) == expected.bytes.size());
    CHECK(std::memcmp(values.data(), expected.bytes.data(), expected.bytes.size()) == 0);
  }
  CHECK(contains(error_text<InputError>([&] { static_cast<void>(file.floats("t.Q6_K")); }),
                 "tensor \"t.Q6_K\" cannot be read as numbers, got type Q6_K; convert the model to F32"));
}

TEST_CASE("Quantised blocks are read by ggml's formulas") {
  SplitMix64 random(8);
  for (int round = 0; round < 200; ++round) {
    const float d = static_cast<float>(random.uniform() * 4 - 2);
    const float m = static_cast<float>(random.uniform() * 4 - 2);
    const float scale = half_bits_to_float(float_to_half_bits(d));
    const float minimum = half_bits_to_float(float_to_half_bits(m));
    std::string payload;
    for (int i = 0; i < 32; ++i) {
      payload += static_cast<char>(random.below(256));
    }
    const std::string d_bits = GgufWriter::raw(float_to_half_bits(d));
    const std::string m_bits = GgufWriter::raw(float_to_half_bits(m));
    std::vector<float> values(32);
    const auto nibble = [&](int i) { return (static_cast<unsigned char>(payload[i % 16]) >> (i < 16 ? 0 : 4)) & 15; };
    dequantise(GgmlType::kQ40, as_bytes(d_bits + payload.substr(0, 16)), values);
    for (int i = 0; i < 32; ++i) {
      REQUIRE(values[i] == scale * static_cast<float>(nibble(i) - 8));
    }
    dequantise(GgmlType::kQ41, as_bytes(d_bits + m_bits + payload.substr(0, 16)), values);
    for (int i = 0; i < 32; ++i) {
      REQUIRE(values[i] == scale * static_cast<float>(nibble(i)) + minimum);
    }
    dequantise(GgmlType::kQ80, as_bytes(d_bits + payload), values);
    for (int i = 0; i < 32; ++i) {
      REQUIRE(values[i] == scale * static_cast<float>(static_cast<signed char>(payload[i])));
    }
  }
  std::vector<float> values(32);
  CHECK_THROWS_AS(dequantise(GgmlType::kQ80, as_bytes(std::string(33, 'x')), values), std::invalid_argument);
  CHECK_THROWS_AS(dequantise(GgmlType::kQ80, {}, std::span(values).first(5)), std::invalid_argument);
  CHECK_THROWS_AS(dequantise(static_cast<GgmlType>(14), {}, {}), std::invalid_argument);
}

TEST_CASE("Tensor types have the layout of ggml") {
  CHECK(find_ggml_type(14)->name == "Q6_K");
  CHECK(find_ggml_type(14)->block_bytes == 210);
  CHECK(find_ggml_type(39)->name == "MXFP4");
  CHECK(find_ggml_type(39)->block_elements == 32);
  CHECK(find_ggml_type(4) == nullptr);
  CHECK(find_ggml_type(4000000000U) == nullptr);
  CHECK_FALSE(can_dequantise(static_cast<GgmlType>(14)));
  CHECK(can_dequantise(GgmlType::kBF16));
  CHECK_THROWS_AS(ggml_type_name(static_cast<GgmlType>(4)), std::invalid_argument);
}

TEST_CASE("Metadata and tensors that are missing or of another type are named") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "f.gguf").string();
  small_file().pair("big", 10, GgufWriter::raw(~std::uint64_t{0})).save(path);
  const GgufFile file(path);
  const auto text = [&](const auto& action) { return error_text<InputError>(action); };
  CHECK(text([&] { static_cast<void>(file.integer("olmoe.block_cuont")); }) ==
        path + ": there is no metadata \"olmoe.block_cuont\"; did you mean \"olmoe.block_count\"?");
  CHECK(contains(text([&] { static_cast<void>(file.integer("olmoe.eps")); }), "must be an integer, got float32"));
  CHECK(contains(text([&] { static_cast<void>(file.integer("big")); }),
                 "must fit into 63 bits, got 18446744073709551615"));
  CHECK(contains(text([&] { static_cast<void>(file.text("words")); }), "must be string, got array of string"));
  CHECK(contains(text([&] { static_cast<void>(file.texts("kinds")); }),
                 "must be an array of strings, got array of int32"));
  CHECK(contains(text([&] { static_cast<void>(file.integers("words")); }), "got array of string"));
  CHECK(contains(text([&] { static_cast<void>(file.numbers("olmoe.eps")); }), "an array of floats, got float32"));
  CHECK(contains(text([&] { static_cast<void>(file.boolean("olmoe.eps")); }), "must be bool, got float32"));
  CHECK(
      contains(text([&] { static_cast<void>(file.number("general.architecture")); }), "must be a number, got string"));
  CHECK(contains(text([&] { static_cast<void>(file.tensor("y")); }), "there is no tensor \"y\""));
  CHECK(file.floats("x") == std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8});
  CHECK(file.tensor("x").shape == std::vector<std::int64_t>{2, 4});
}

TEST_CASE("A damaged GGUF file gives one error that says what is wrong and where") {
  const std::string whole = small_file().bytes();
  CHECK(refusal(whole) == "no error");
  CHECK(contains(refusal(""), "not a GGUF file, it must begin with \"GGUF\", got \"\""));
  CHECK(contains(refusal("GGML" + whole.substr(4)), "got \"GGML\"; give the path of a .gguf file"));
  CHECK(contains(refusal(replaced_at(whole, 4, GgufWriter::raw<std::uint32_t>(2))), "GGUF version must be 3, got 2"));
  CHECK(contains(refusal(replaced_at(whole, 4, GgufWriter::raw<std::uint32_t>(1))), "GGUF version must be 3, got 1"));
  CHECK(contains(refusal(replaced_at(whole, 4, GgufWriter::raw<std::uint32_t>(0x03000000))), "big-endian"));
  CHECK(contains(refusal(replaced_at(whole, 8, GgufWriter::raw(std::uint64_t{1} << 60))), "the number of tensors"));
  CHECK(contains(refusal(replaced_at(whole, 16, GgufWriter::raw(std::uint64_t{1} << 60))), "number of metadata keys"));
  CHECK(contains(refusal(replaced_at(whole, 24, GgufWriter::raw(std::uint64_t{1} << 60))),
                 "metadata key 0 at byte 24 may take 65535 bytes"));
  CHECK(contains(refusal(small_file().text("", "x").bytes()), "metadata key 5 must not be empty"));
  CHECK(contains(refusal(small_file().uint32("kinds", 4).bytes()), "metadata \"kinds\" is there twice"));
  CHECK(contains(refusal(small_file().pair("k", 13, "").bytes()),
                 "metadata \"k\" has a type that GGUF does not define, got 13"));
  CHECK(contains(refusal(small_file().pair("k", 7, "\x02").bytes()), "metadata \"k\" must be 0 or 1 as a bool, got 2"));
  const auto array = [](std::uint32_t type, std::uint64_t count) {
    return GgufWriter::raw(type) + GgufWriter::raw(count);
  };
  CHECK(contains(refusal(small_file().pair("k", 9, array(4, std::uint64_t{1} << 62)).bytes()),
                 "metadata \"k\": the number of elements must fit"));
  CHECK(contains(refusal(small_file().pair("k", 9, array(99, 0)).bytes()), "the elements has a type"));
  std::string deep;
  for (int i = 0; i < 6; ++i) {
    deep += array(9, 1);
  }
  CHECK(contains(refusal(small_file().pair("k", 9, deep + array(4, 0)).bytes()), "nests arrays more than 4 deep"));
  CHECK(refusal(small_file()
                    .pair("k", 9, array(9, 2) + array(4, 1) + GgufWriter::raw<std::uint32_t>(7) + array(8, 0))
                    .bytes()) == "no error");
  CHECK(contains(refusal(small_file().uint32("general.alignment", 48).bytes()), "must be a power of two, got 48"));
  CHECK(contains(refusal(small_file().uint32("general.alignment", 0).bytes()), "must be a power of two, got 0"));
  CHECK(contains(refusal(small_file().text("general.alignment", "32").bytes()), "must be uint32, got string"));
  CHECK(contains(refusal(small_file().entry("x", {4}, 0, 0).bytes()), "tensor \"x\" is there twice"));
  CHECK(contains(refusal(small_file().entry("", {4}, 0, 0).bytes()), "tensor 2 must have a name"));
  CHECK(contains(refusal(small_file().entry("y", {1, 1, 1, 1, 1}, 0, 0).bytes()), "4 dimensions at most, got 5"));
  CHECK(contains(refusal(small_file().entry("y", {0}, 0, 0).bytes()), "got 0"));
  CHECK(contains(refusal(small_file().entry("y", {1ULL << 40, 1ULL << 40}, 0, 0).bytes()), "overflow"));
  CHECK(contains(refusal(small_file().entry("y", {1ULL << 62}, 0, 0).bytes()), "got 4611686018427387904"));
  CHECK(contains(refusal(small_file().entry("y", {4}, 4, 0).bytes()), "type that this program does not know, got 4"));
  CHECK(contains(refusal(small_file().entry("y", {33}, 8, 0).bytes()), "rows of whole blocks of 32 values, got 33"));
  CHECK(contains(refusal(small_file().entry("y", {4}, 0, 8).bytes()), "must begin at a multiple of 32 bytes, got 8"));
  CHECK(contains(refusal(small_file().entry("y", {4}, 0, 0).bytes()), "tensors \"x\" and \"y\" overlap at byte 0") !=
        contains(refusal(small_file().entry("y", {4}, 0, 0).bytes()), "tensors \"y\" and \"x\" overlap at byte 0"));
  CHECK(contains(refusal(small_file().entry("y", {4}, 0, 1ULL << 40).bytes()), "but the file holds"));
}

TEST_CASE("Every file that is cut short is refused") {
  const std::string whole = small_file().bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    INFO(size);
    const std::string text = refusal(whole.substr(0, size));
    REQUIRE(text != "no error");
    REQUIRE(contains(text, "f.gguf: "));
  }
}

TEST_CASE("Random damage is refused or read, and never breaks the reader") {
  const std::string whole = small_file().bytes();
  SplitMix64 random(3);
  const TemporaryFolder folder;
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = whole;
    for (std::uint64_t i = 0; i <= random.below(3); ++i) {
      damaged[random.below(damaged.size())] = static_cast<char>(random.below(256));
    }
    put_file(folder.path() / "f.gguf", damaged);
    try {
      const GgufFile file(folder.path() / "f.gguf");
      for (const std::string& name : file.names()) {
        if (can_dequantise(file.tensor(name).type)) {
          CHECK(file.floats(name).size() == static_cast<std::size_t>(file.tensor(name).num_elements()));
        }
      }
    } catch (const InputError&) {
      ++refused;
    }
  }
  CHECK(refused > 500);
  CHECK(refused < 3000);
}

}  // namespace
}  // namespace hestia
