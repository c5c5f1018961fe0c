#include <algorithm>
#include <chrono>
#include <cstring>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/safetensors.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

std::vector<std::byte> random_bytes(SplitMix64& random, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::byte>(random.below(256)); });
  return bytes;
}

bool same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// A file with this header text and so many bytes of data.
std::string raw_file(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t size = header.size();
  std::string text(8, '\0');
  std::memcpy(text.data(), &size, 8);
  return text + header + std::string(data_bytes, 'x');
}

constexpr DType kAllDTypes[] = {DType::kBool, DType::kU8,   DType::kI8,  DType::kI16,    DType::kU16,
                                DType::kF16,  DType::kBF16, DType::kI32, DType::kU32,    DType::kF32,
                                DType::kF64,  DType::kI64,  DType::kU64, DType::kF8E4M3, DType::kF8E5M2};

TEST_CASE("Every dtype has one spelling and one size") {
  for (const DType dtype : kAllDTypes) {
    CHECK(dtype_from_name(dtype_name(dtype)) == dtype);
    CHECK((dtype_size(dtype) == 1 || dtype_size(dtype) == 2 || dtype_size(dtype) == 4 || dtype_size(dtype) == 8));
  }
  CHECK(dtype_name(DType::kBF16) == "BF16");
  CHECK(dtype_size(DType::kBF16) == 2);
  CHECK_FALSE(dtype_from_name("bf16"));
  CHECK_FALSE(dtype_from_name(""));
  CHECK_THROWS_AS(dtype_size(static_cast<DType>(99)), std::invalid_argument);
}

TEST_CASE("Tensors come back as they were written, aligned to their elements") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.safetensors";
  SplitMix64 random(1);
  std::vector<TensorView> written;
  std::vector<std::vector<std::byte>> storage;
  SafetensorsWriter writer;
  CHECK(writer.empty());
  std::size_t total = 0;
  for (int i = 0; i < 60; ++i) {
    const DType dtype = kAllDTypes[random.below(std::size(kAllDTypes))];
    std::vector<std::int64_t> shape(random.below(4));
    std::size_t elements = 1;
    for (std::int64_t& dimension : shape) {
      dimension = static_cast<std::int64_t>(random.below(6));  // sometimes 0
      elements *= static_cast<std::size_t>(dimension);
    }
    storage.push_back(random_bytes(random, elements * dtype_size(dtype)));
    total += storage.back().size();
    written.push_back({fmt::format("layer.{}.\"quoted\".\u00e9", i), dtype, shape, {}});
  }
  for (std::size_t i = 0; i < written.size(); ++i) {
    written[i].bytes = storage[i];
    writer.add(written[i].name, written[i].dtype, written[i].shape, written[i].bytes);
  }
  writer.set_metadata("format", "pt");
  writer.set_metadata("note", "line\nbreak");
  CHECK(writer.data_bytes() == total);
  writer.write(path);

  const SafetensorsFile file(path);
  CHECK(file.names().size() == written.size());
  CHECK(file.path() == path);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"note", "line\nbreak"}});
  for (const TensorView& expected : written) {
    REQUIRE(file.contains(expected.name));
    const TensorView& found = file.tensor(expected.name);
    CHECK(found.name == expected.name);
    CHECK(found.dtype == expected.dtype);
    CHECK(found.shape == expected.shape);
    CHECK(same(found.bytes, expected.bytes));
    CHECK(found.num_elements() == static_cast<std::int64_t>(expected.bytes.size() / dtype_size(expected.dtype)));
    if (!found.bytes.empty()) {
      CHECK(reinterpret_cast<std::uintptr_t>(found.bytes.data()) % dtype_size(found.dtype) == 0);
    }
  }
  const auto offset = [&](const std::string& name) { return file.tensor(name).bytes.data(); };
  CHECK(std::is_sorted(file.names().begin(), file.names().end(),
                       [&](const std::string& a, const std::string& b) { return offset(a) < offset(b); }));
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
}

TEST_CASE("A file without tensors is a file") {
  const TemporaryFolder folder;
  SafetensorsWriter().write(folder.path() / "a.safetensors");
  CHECK(SafetensorsFile(folder.path() / "a.safetensors").names().empty());
}

TEST_CASE("A tensor that is not there: the nearest name is proposed") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.safetensors";
  const float value = 1.5F;
  SafetensorsWriter writer;
  writer.add("model.layers.0.mlp.gate.weight", DType::kF32, {1}, std::as_bytes(std::span(&value, 1)));
  writer.write(path);
  const SafetensorsFile file(path);
  CHECK(error_text<InputError>([&] { (void)file.tensor("model.layers.0.mlp.gates.weight"); }) ==
        path.string() +
            ": there is no tensor \"model.layers.0.mlp.gates.weight\"; did you mean "
            "\"model.layers.0.mlp.gate.weight\"?");
  CHECK(error_text<InputError>([&] { (void)file.tensor("lm_head"); }) ==
        path.string() + ": there is no tensor \"lm_head\"; check that this is the right file");
}

TEST_CASE("The writer refuses what would make a damaged file") {
  const std::vector<std::byte> bytes(12, std::byte{7});
  SafetensorsWriter writer;
  writer.add("a", DType::kF32, {3}, bytes);
  CHECK(contains(error_text<std::invalid_argument>([&] { writer.add("a", DType::kF32, {3}, bytes); }), "added twice"));
  CHECK_THROWS_AS(writer.add("b", DType::kF32, {4}, bytes), std::invalid_argument);
  CHECK_THROWS_AS(writer.add("b", DType::kF32, {-3}, bytes), std::invalid_argument);
  CHECK_THROWS_AS(writer.add("b", DType::kF32, {INT64_MAX, INT64_MAX}, bytes), std::invalid_argument);
  CHECK_THROWS_AS(writer.add("__metadata__", DType::kF32, {3}, bytes), std::invalid_argument);
  CHECK(writer.data_bytes() == 12);
  const TemporaryFolder folder;
  CHECK(contains(error_text<RunError>([&] { writer.write(folder.path() / "no" / "a.safetensors"); }),
                 "a.safetensors: cannot be written, No such file or directory; check"));
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("Damaged safetensors files are refused with file, tensor and values") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.safetensors";
  const auto message = [&](const std::string& content) {
    put_file(path, content);
    std::string text = error_text<InputError>([&] { const SafetensorsFile file(path); });
    const std::string lead = path.string() + ": ";
    const std::string tail = "; fetch or write the file again";
    REQUIRE(text.substr(0, lead.size()) == lead);
    REQUIRE(text.substr(text.size() - tail.size()) == tail);
    return text.substr(lead.size(), text.size() - lead.size() - tail.size());
  };
  const auto header_message = [&](const std::string& header, std::size_t data_bytes) {
    return message(raw_file(header, data_bytes));
  };

  SECTION("sizes of file and header") {
    CHECK(message("") == "not a safetensors file, it must hold at least 8 bytes, got 0");
    CHECK(message("1234567") == "not a safetensors file, it must hold at least 8 bytes, got 7");
    CHECK(message(std::string("\x10\0\0\0\0\0\0\0{}", 10)) ==
          "the file is truncated: its header takes 16 bytes, got 2");
    CHECK(message(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)) ==
          "the header may take 100000000 bytes at most, got 18446744073709551615 (not a safetensors file?)");
    CHECK(message(std::string("PK\x03\x04zipped archive", 18)) ==
          "the header may take 100000000 bytes at most, got 8102091702413773648 (not a safetensors file?)");
  }
  SECTION("header text") {
    CHECK(header_message("", 0) == "the header is not valid JSON at byte 1");
    CHECK(header_message("{\"a\": }", 0) == "the header is not valid JSON at byte 7");
    CHECK(header_message(std::string("{}\0 ", 4), 0) == "the header is not valid JSON at byte 2");
    CHECK(header_message("{} {}", 0) == "the header is not valid JSON at byte 4");
    CHECK(header_message("{\"\xff\": 1}", 0) == "the header is not valid JSON at byte 3");
    CHECK(header_message("{\"a\": 1e999}", 0) == "the header is not valid JSON");
    CHECK(header_message("[1, 2]", 0) == "the header must be a JSON object, got array");
    CHECK(header_message(std::string(200'000, '['), 0) == "the header is not valid JSON at byte 200001");
    CHECK(header_message("{\"w\": " + std::string(1'000'000, '[') + std::string(1'000'000, ']') + "}", 0) ==
          "the header is nested deeper than 64 levels");
  }
  SECTION("repeated names") {
    const std::string entry = R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
    CHECK(header_message(R"({"w":)" + entry + R"(,"w":)" + entry + "}", 1) == "the header holds the name \"w\" twice");
    CHECK(header_message(R"({"__metadata__":{"a":"1","a":"2"}})", 0) == "the header holds the name \"a\" twice");
    CHECK(header_message(R"({"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1) ==
          "the header holds the name \"dtype\" twice");
    // The same key in two tensors is no repetition.
    put_file(path, raw_file(R"({"v":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"w":)" + entry + "}", 2));
    CHECK(SafetensorsFile(path).names() == std::vector<std::string>{"w", "v"});
  }
  SECTION("metadata") {
    CHECK(header_message(R"({"__metadata__":[]})", 0) == "__metadata__ must be an object of strings, got array");
    CHECK(header_message(R"({"__metadata__":{"step":3}})", 0) == "__metadata__ \"step\" must be a string, got number");
  }
  SECTION("entries") {
    CHECK(header_message(R"({"w":3})", 0) == "tensor \"w\" must have dtype, shape and data_offsets, got 3");
    CHECK(header_message(R"({"w":{"dtype":"U8","shape":[1]}})", 1) ==
          R"(tensor "w" must have dtype, shape and data_offsets, got {"dtype":"U8","shape":[1]})");
    CHECK(header_message(R"({"w":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1) ==
          R"(tensor "w" has an unknown dtype, got "F4")");
    CHECK(header_message(R"({"w":{"dtype":7,"shape":[1],"data_offsets":[0,1]}})", 1) ==
          R"(tensor "w" has an unknown dtype, got 7)");
    CHECK(header_message(R"({"w":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1) ==
          R"(tensor "w" must have a list as shape, got 1)");
    for (const std::string dimension : {"-1", "1.0", "\"1\"", "null", "9223372036854775808"}) {
      CHECK(header_message(R"({"w":{"dtype":"U8","shape":[)" + dimension + R"(],"data_offsets":[0,1]}})", 1) ==
            R"(tensor "w" has a dimension that is not a size, got )" + dimension);
    }
    // 2^32 * 2^32 elements are 0 modulo 2^64.
    CHECK(header_message(R"({"w":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0) ==
          R"(tensor "w" has a shape whose size overflows, got [4294967296,4294967296])");
    CHECK(header_message(R"({"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0) ==
          R"(tensor "w" has a shape whose size overflows, got [4611686018427387904])");
  }
  SECTION("offsets") {
    for (const std::string offsets : {"[0]", "[0,1,2]", "3", "[-1,1]", "[0,1.5]", "[0,null]"}) {
      CHECK(header_message(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":)" + offsets + "}}", 1) ==
            "tensor \"w\" must have two data_offsets, got " + offsets);
    }
    CHECK(header_message(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1) ==
          "tensor \"w\" has reversed data_offsets, got [1, 0]");
    CHECK(header_message(R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 3) ==
          "tensor \"w\" ends at byte 4, but the file holds 3 bytes of data (truncated?)");
    CHECK(header_message(R"({"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,20]}})", 20) ==
          "tensor \"w\" of dtype F32 and shape [2,3] takes 24 bytes, got 20");
    CHECK(header_message(R"({"w":{"dtype":"F32","shape":[],"data_offsets":[0,8]}})", 8) ==
          "tensor \"w\" of dtype F32 and shape [] takes 4 bytes, got 8");
  }
  SECTION("layout of the data") {
    const auto two = [](int begin, int end, int other_begin, int other_end) {
      return fmt::format(R"({{"v":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}},)"
                         R"("w":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}}}})",
                         end - begin, begin, end, other_end - other_begin, other_begin, other_end);
    };
    CHECK(header_message(two(0, 4, 3, 8), 8) == "tensors \"v\" and \"w\" overlap at byte 3 of the data");
    CHECK(header_message(two(0, 8, 4, 4), 8) == "tensors \"v\" and \"w\" overlap at byte 4 of the data");
    CHECK(header_message(two(0, 8, 0, 8), 8) == "tensors \"v\" and \"w\" overlap at byte 0 of the data");
    CHECK(header_message(two(0, 3, 4, 8), 8) == "bytes 3 to 4 of the data, before tensor \"w\", belong to no tensor");
    CHECK(header_message(two(4, 8, 1, 4), 8) == "bytes 0 to 1 of the data, before tensor \"w\", belong to no tensor");
    CHECK(header_message(two(0, 4, 4, 7), 8) == "the tensors take 7 bytes, but the file holds 8 bytes of data");
    CHECK(header_message("{}", 3) == "the tensors take 0 bytes, but the file holds 3 bytes of data");
  }
  SECTION("long values are shortened") {
    const std::string text = header_message(R"({"w":")" + std::string(10'000, 'q') + R"("})", 0);
    CHECK(text.size() < 200);
    CHECK(contains(text, "qqq..."));
  }
}

TEST_CASE("No damage crashes the reader: every truncation, every flipped byte, random headers") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.safetensors";
  SplitMix64 random(5);
  const std::vector<std::byte> first = random_bytes(random, 24);
  const std::vector<std::byte> second = random_bytes(random, 6);
  SafetensorsWriter writer;
  writer.add("gate", DType::kF32, {2, 3}, first);
  writer.add("bias", DType::kBF16, {3}, second);
  writer.set_metadata("format", "pt");
  writer.write(path);
  const std::string good = read_text_file(path);
  int valid = 0;
  int refused = 0;
  const auto attempt = [&](const std::string& content) {
    put_file(path, content);
    try {
      const SafetensorsFile file(path);
      for (const std::string& name : file.names()) {
        const TensorView& tensor = file.tensor(name);
        // Reading every byte lets the sanitizer see a view that leaves the file.
        const auto sum = std::count(tensor.bytes.begin(), tensor.bytes.end(), std::byte{0});
        REQUIRE(sum <= static_cast<std::int64_t>(good.size()));
        REQUIRE(tensor.bytes.size() == static_cast<std::size_t>(tensor.num_elements()) * dtype_size(tensor.dtype));
      }
      ++valid;
    } catch (const InputError& error) {
      REQUIRE(contains(error.what(), path.string() + ": "));
      ++refused;
    }
  };
  for (std::size_t size = 0; size < good.size(); ++size) {
    attempt(good.substr(0, size));
  }
  CHECK(valid == 0);  // no part of a file is a file
  CHECK(refused == static_cast<int>(good.size()));
  attempt(good + "x");
  CHECK(valid == 0);
  for (std::size_t position = 0; position < good.size(); ++position) {
    for (const int flip : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
      std::string bad = good;
      bad[position] = static_cast<char>(bad[position] ^ flip);
      attempt(bad);
    }
  }
  CHECK(valid >= 30 * 9);  // a flip in the data makes another valid file
  CHECK(refused > 500);
  const std::string pieces[] = {"{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                "\"w\"",
                                "\"dtype\"",
                                "\"F32\"",
                                "\"shape\"",
                                "1",
                                "-1",
                                "\"data_offsets\"",
                                "99999999999999999999",
                                "null",
                                "true",
                                "\"__metadata__\"",
                                "1e9"};
  for (int i = 0; i < 3000; ++i) {
    std::string header = "{";
    for (std::uint64_t count = random.below(14); count > 0; --count) {
      header += pieces[random.below(std::size(pieces))];
    }
    attempt(raw_file(header + "}", random.below(5)));
  }
}

TEST_CASE("A header with fifty thousand names is read and written without delay") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.safetensors";
  const std::byte byte{3};
  SafetensorsWriter writer;
  for (int i = 0; i < 50'000; ++i) {
    writer.add(fmt::format("model.layers.{}.mlp.experts.{}.gate_proj.weight", i / 256, i % 256), DType::kU8, {1},
               std::span(&byte, 1));
  }
  const auto start = std::chrono::steady_clock::now();
  writer.write(path);
  CHECK(SafetensorsFile(path).names().size() == 50'000);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));  // quadratic work takes minutes
}

class Shards {
 public:
  Shards() {
    SplitMix64 random(9);
    for (int i = 0; i < 7; ++i) {
      storage_.push_back(random_bytes(random, 4 * static_cast<std::size_t>(i + 1)));
    }
    for (int i = 0; i < 7; ++i) {
      tensors_.push_back({fmt::format("t.{}", i), DType::kF32, {i + 1}, storage_[static_cast<std::size_t>(i)]});
    }
  }
  [[nodiscard]] const std::vector<TensorView>& tensors() const { return tensors_; }

 private:
  std::vector<std::vector<std::byte>> storage_;
  std::vector<TensorView> tensors_;
};

TEST_CASE("Checkpoints in one file or in shards read the same") {
  const Shards shards;
  for (const std::size_t limit : {1'000'000U, 40U, 24U, 1U}) {
    const TemporaryFolder folder;
    write_sharded(folder.path(), shards.tensors(), limit, {{"format", "pt"}});
    const SafetensorsCheckpoint checkpoint(folder.path());
    CHECK(checkpoint.names().size() == 7);
    for (const TensorView& expected : shards.tensors()) {
      REQUIRE(checkpoint.contains(expected.name));
      CHECK(same(checkpoint.tensor(expected.name).bytes, expected.bytes));
    }
    // Sizes are 4, 8, ... 28 bytes, placed in order.
    const std::size_t expected_files = limit == 1'000'000U ? 1 : limit == 40U ? 4 : limit == 24U ? 5 : 7;
    CHECK(checkpoint.files().size() == expected_files);
    for (const SafetensorsFile& file : checkpoint.files()) {
      CHECK(file.metadata().at("format") == "pt");
    }
    const bool has_index = std::filesystem::exists(folder.path() / "model.safetensors.index.json");
    CHECK(has_index == (expected_files > 1));
    if (has_index) {
      const Json index = read_json_file(folder.path() / "model.safetensors.index.json");
      CHECK(index.at("metadata").at("total_size") == 112);
      CHECK(index.at("weight_map").size() == 7);
      CHECK(index.at("weight_map").at("t.0") == fmt::format("model-00001-of-{:05d}.safetensors", expected_files));
    }
    CHECK(contains(error_text<InputError>([&] { (void)checkpoint.tensor("t.9"); }),
                   folder.path().string() + ": there is no tensor \"t.9\"; did you mean \"t."));
  }
}

TEST_CASE("A checkpoint written over another of the other kind is the one read") {
  const Shards shards;
  const TemporaryFolder folder;
  const std::vector<TensorView> fewer(shards.tensors().begin(), shards.tensors().begin() + 3);
  write_sharded(folder.path(), shards.tensors(), 24, {});
  write_sharded(folder.path(), fewer, 1'000'000, {});
  CHECK(SafetensorsCheckpoint(folder.path()).names().size() == 3);
  CHECK_FALSE(std::filesystem::exists(folder.path() / "model.safetensors.index.json"));
  write_sharded(folder.path(), shards.tensors(), 24, {});
  CHECK(SafetensorsCheckpoint(folder.path()).names().size() == 7);
  CHECK_FALSE(std::filesystem::exists(folder.path() / "model.safetensors"));
  const std::vector<TensorView> twice = {shards.tensors()[0], shards.tensors()[1], shards.tensors()[0]};
  CHECK_THROWS_AS(write_sharded(folder.path(), twice, 1, {}), std::invalid_argument);
}

TEST_CASE("Damaged checkpoints say what is missing where") {
  const Shards shards;
  const TemporaryFolder folder;
  const std::filesystem::path index_path = folder.path() / "model.safetensors.index.json";
  const auto message = [&] {
    return error_text<InputError>([&] { const SafetensorsCheckpoint opened(folder.path()); });
  };
  CHECK(message() == folder.path().string() +
                         ": holds neither model.safetensors nor model.safetensors.index.json; give the directory of a "
                         "checkpoint");
  write_sharded(folder.path(), shards.tensors(), 40, {});
  const std::string index = read_text_file(index_path);

  SECTION("a shard is gone") {
    std::filesystem::remove(folder.path() / "model-00002-of-00004.safetensors");
    std::filesystem::remove(folder.path() / "model-00003-of-00004.safetensors");
    CHECK(message() ==
          folder.path().string() + ": the shard model-00002-of-00004.safetensors is missing; fetch it again\n" +
              folder.path().string() + ": the shard model-00003-of-00004.safetensors is missing; fetch it again");
  }
  SECTION("a shard is truncated") {
    const std::filesystem::path shard = folder.path() / "model-00002-of-00004.safetensors";
    std::filesystem::resize_file(shard, std::filesystem::file_size(shard) - 1);
    CHECK(contains(message(), "model-00002-of-00004.safetensors: tensor \"t."));
    CHECK(contains(message(), "(truncated?)"));
  }
  SECTION("the index names what its shard does not hold") {
    Json json = Json::parse(index);
    json["weight_map"]["t.99"] = "model-00002-of-00004.safetensors";
    put_file(index_path, json.dump());
    CHECK(message() ==
          index_path.string() +
              ": \"t.99\" should be in model-00002-of-00004.safetensors, which does not hold it; fetch the "
              "shard again");
  }
  SECTION("a tensor lies in two shards") {
    SafetensorsWriter writer;
    for (const std::string name : {"t.6", "t.0"}) {
      const auto& tensor = shards.tensors()[name == "t.6" ? 6 : 0];
      writer.add(name, tensor.dtype, tensor.shape, tensor.bytes);
    }
    writer.write(folder.path() / "model-00004-of-00004.safetensors");
    CHECK(message() == folder.path().string() +
                           ": \"t.0\" is in two shards, model-00001-of-00004.safetensors and "
                           "model-00004-of-00004.safetensors; fetch the shards again");
  }
  SECTION("the index leaves the folder") {
    put_file(index_path, R"({"weight_map": {"t.0": "../other.safetensors", "t.1": 3}})");
    CHECK(message() ==
          index_path.string() +
              ": \"t.0\" must name a file of the same folder, got \"../other.safetensors\"; fetch the file "
              "again\n" +
              index_path.string() + ": \"t.1\" must name a file of the same folder, got 3; fetch the file again");
    put_file(index_path, R"({"weight_map": {"t.0": ".."}})");
    CHECK(contains(message(), "not a regular file"));
  }
  SECTION("the index is no index") {
    put_file(index_path, "{\"weight_map\": ");
    CHECK(message() == index_path.string() + ": the index is not valid JSON at byte 16; fetch the file again");
    put_file(index_path, R"({"weight_map": {"t.0": "a", "t.0": "b"}})");
    CHECK(message() == index_path.string() + ": the index holds the name \"t.0\" twice; fetch the file again");
    put_file(index_path, "[]");
    CHECK(message() == index_path.string() + ": the index must be a JSON object, got array; fetch the file again");
    for (const std::string text : {"{}", R"({"weight_map": []})", R"({"weight_map": {}})"}) {
      put_file(index_path, text);
      CHECK(contains(message(), "weight_map must be an object that names tensors and their files, got "));
    }
  }
}

}  // namespace
}  // namespace hestia
