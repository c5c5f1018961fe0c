#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/random.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

TEST_CASE("HDF5 datasets of every type and of odd shapes come back") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.h5";
  SplitMix64 random(1);
  const std::vector<std::vector<std::int64_t>> shapes = {{},     {1},       {0},    {5, 0, 3},
                                                         {7, 3}, {2, 3, 4}, {3000}, {17, 64, 9}};
  std::vector<std::vector<std::uint8_t>> bytes;
  std::vector<std::vector<std::uint16_t>> shorts;
  std::vector<std::vector<std::int64_t>> ints;
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<double>> doubles;
  std::vector<std::vector<std::uint16_t>> halves;
  {
    H5File file = H5File::create(path);
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      std::size_t count = 1;
      for (const std::int64_t dimension : shapes[i]) {
        count *= static_cast<std::size_t>(dimension);
      }
      auto& u8 = bytes.emplace_back(count);
      auto& u16 = shorts.emplace_back(count);
      auto& i64 = ints.emplace_back(count);
      auto& f32 = floats.emplace_back(count);
      auto& f64 = doubles.emplace_back(count);
      auto& f16 = halves.emplace_back(count);
      for (std::size_t j = 0; j < count; ++j) {
        u8[j] = static_cast<std::uint8_t>(random.next());
        u16[j] = static_cast<std::uint16_t>(random.next());
        i64[j] = static_cast<std::int64_t>(random.next());
        f32[j] = static_cast<float>(random.uniform() * 100 - 50);
        f64[j] = random.uniform() * 1e300;
        f16[j] = float_to_half_bits(f32[j]);
      }
      file.write(fmt::format("/u8/{}", i), H5Type::kUInt8, shapes[i], u8.data());
      file.write(fmt::format("/deep/er/u16/{}", i), H5Type::kUInt16, shapes[i], u16.data());
      file.write(fmt::format("/i64/{}", i), H5Type::kInt64, shapes[i], i64.data());
      file.write(fmt::format("/f32/{}", i), H5Type::kFloat32, shapes[i], f32.data());
      file.write(fmt::format("/f64/{}", i), H5Type::kFloat64, shapes[i], f64.data());
      file.write(fmt::format("/f16/{}", i), H5Type::kFloat16, shapes[i], f16.data());
    }
    file.close();
  }
  const H5File file = H5File::open(path);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    CHECK(file.shape(fmt::format("/f16/{}", i)) == shapes[i]);
    const std::vector<std::int64_t> u8 = file.read_ints(fmt::format("/u8/{}", i));
    CHECK(std::equal(u8.begin(), u8.end(), bytes[i].begin(), bytes[i].end()));
    const std::vector<std::int64_t> u16 = file.read_ints(fmt::format("/deep/er/u16/{}", i));
    CHECK(std::equal(u16.begin(), u16.end(), shorts[i].begin(), shorts[i].end()));
    CHECK(file.read_ints(fmt::format("/i64/{}", i)) == ints[i]);
    CHECK(file.read_floats(fmt::format("/f32/{}", i)) == floats[i]);
    CHECK(file.read_doubles(fmt::format("/f64/{}", i)) == doubles[i]);
    const std::vector<float> f16 = file.read_floats(fmt::format("/f16/{}", i));
    REQUIRE(f16.size() == halves[i].size());
    for (std::size_t j = 0; j < f16.size(); ++j) {
      REQUIRE(f16[j] == half_bits_to_float(halves[i][j]));
    }
  }
}

TEST_CASE("Special half values pass through HDF5's own conversion") {
  const TemporaryFolder folder;
  std::vector<std::uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) {
    bits[i] = static_cast<std::uint16_t>(i);
  }
  {
    H5File file = H5File::create(folder.path() / "a.h5");
    file.write("/all", H5Type::kFloat16, {65536}, bits.data());
  }
  const std::vector<float> values = H5File::open(folder.path() / "a.h5").read_floats("/all");
  for (std::size_t i = 0; i < bits.size(); ++i) {
    const float expected = half_bits_to_float(bits[i]);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(values[i]));
    } else {
      REQUIRE(std::bit_cast<std::uint32_t>(values[i]) == std::bit_cast<std::uint32_t>(expected));
    }
  }
}

TEST_CASE("Repetitive data is compressed") {
  const TemporaryFolder folder;
  const std::vector<std::int64_t> values(200'000, 42);
  {
    H5File file = H5File::create(folder.path() / "a.h5");
    file.write("/v", H5Type::kInt64, {400, 500}, values.data());
    file.close();
  }
  CHECK(std::filesystem::file_size(folder.path() / "a.h5") < 50'000);
  CHECK(H5File::open(folder.path() / "a.h5").read_ints("/v") == values);
}

TEST_CASE("HDF5 datasets grow by rows, are overwritten in place and read by range") {
  const TemporaryFolder folder;
  SplitMix64 random(5);
  for (const std::int64_t chunk_rows : {1, 3, 8}) {
    for (const int level : {0, 1, 6}) {
      const std::filesystem::path path = folder.path() / "a.h5";
      std::vector<std::uint16_t> expected;
      std::vector<std::string> texts;
      H5File file = H5File::create(path);
      file.create_rows("/deep/v", H5Type::kUInt16, {2, 3}, {chunk_rows, level, true});
      file.create_string_rows("/t", chunk_rows);
      for (int round = 0; round < 12; ++round) {
        const auto stored = static_cast<std::int64_t>(texts.size());
        const auto first = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(stored + 1)));
        const auto count = static_cast<std::int64_t>(random.below(5));
        std::vector<std::uint16_t> values(static_cast<std::size_t>(count * 6));
        std::generate(values.begin(), values.end(), [&] { return static_cast<std::uint16_t>(random.next()); });
        std::vector<std::string> words;
        for (std::int64_t i = 0; i < count; ++i) {
          words.push_back(fmt::format("word {}", random.below(1000)));
        }
        file.write_rows("/deep/v", H5Type::kUInt16, first, count, values.data());
        file.write_string_rows("/t", first, words);
        expected.resize(std::max(expected.size(), static_cast<std::size_t>((first + count) * 6)));
        texts.resize(std::max(texts.size(), static_cast<std::size_t>(first + count)));
        std::copy(values.begin(), values.end(), expected.begin() + first * 6);
        std::copy(words.begin(), words.end(), texts.begin() + first);
        CHECK(file.read_uint16_rows("/deep/v", 0, static_cast<std::int64_t>(texts.size())) == expected);
      }
      file.close();
      const H5File back = H5File::open(path);
      const auto stored = static_cast<std::int64_t>(texts.size());
      CHECK(back.shape("/deep/v") == std::vector<std::int64_t>{stored, 2, 3});
      CHECK(back.chunk_rows("/deep/v") == chunk_rows);
      CHECK(back.read_strings("/t") == texts);
      const std::vector<std::int64_t> part = back.read_int_rows("/deep/v", stored / 2, 1);
      CHECK(std::equal(part.begin(), part.end(), expected.begin() + stored / 2 * 6));
      CHECK(back.read_float_rows("/deep/v", stored - 1, 1).size() == 6);
      CHECK(back.read_string_rows("/t", stored - 1, 1).front() == texts.back());
      CHECK(back.read_int_rows("/deep/v", stored, 0).empty());
      CHECK_THROWS_AS(back.read_int_rows("/deep/v", stored, 1), std::out_of_range);
      CHECK_THROWS_AS(back.read_int_rows("/deep/v", -1, 1), std::out_of_range);
      CHECK_THROWS_AS(back.read_string_rows("/deep/v", 0, 1), InputError);
    }
  }
}

TEST_CASE("HDF5 texts and attributes come back") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.h5";
  const std::vector<std::string> texts = {"", "gsm8k", "caf\u00e9 \u4e2d\u6587", std::string(10'000, 'q'), "a\nb"};
  const std::vector<std::int64_t> layers = {0, 3, -5, std::numeric_limits<std::int64_t>::max()};
  {
    H5File file = H5File::create(path);
    file.write_strings("/sequences/task", texts);
    file.write_strings("/sequences/none", {});
    file.write_attribute("/", "format_version", std::int64_t{3});
    file.write_attribute("/", "format", std::string("x"));
    file.write_attribute("/", "format", std::string("hestia preferences"));  // the last value stands
    file.write_attribute("/routers/tuned", "layers", layers);
    file.write_attribute("/routers/tuned", "nothing", std::vector<std::int64_t>{});
    file.write_attribute("/sequences/task", "empty", std::string());
  }
  const H5File file = H5File::open(path);
  CHECK(file.read_strings("/sequences/task") == texts);
  CHECK(file.read_strings("/sequences/none").empty());
  CHECK(file.read_int_attribute("/", "format_version") == 3);
  CHECK(file.read_string_attribute("/", "format") == "hestia preferences");
  CHECK(file.read_ints_attribute("/routers/tuned", "layers") == layers);
  CHECK(file.read_ints_attribute("/routers/tuned", "nothing").empty());
  CHECK(file.read_string_attribute("/sequences/task", "empty").empty());
  CHECK(file.contains("/"));
  CHECK(file.contains("/sequences"));
  CHECK(file.contains("/sequences/task"));
  CHECK_FALSE(file.contains("/sequences/missing"));
  CHECK_FALSE(file.contains("/no/such/path"));
  CHECK_FALSE(file.contains("/sequences/task/below"));
}

TEST_CASE("What HDF5 cannot give or take is named with file and object") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.h5";
  const std::string lead = path.string() + ": ";
  const std::vector<std::int64_t> values = {4, 5};
  H5File made = H5File::create(path);
  made.write("/v", H5Type::kInt64, {2}, values.data());
  made.write_strings("/s", {"x"});
  made.write_attribute("/v", "many", values);
  made.write_attribute("/v", "text", std::string("t"));
  CHECK(contains(error_text<RunError>([&] { made.write("/v", H5Type::kInt64, {2}, values.data()); }),
                 lead + "dataset /v cannot be written, "));
  CHECK(contains(error_text<RunError>([&] { made.write("/v/below", H5Type::kInt64, {2}, values.data()); }),
                 lead + "dataset /v/below cannot be written, "));
  CHECK_THROWS_AS(made.write("/w", H5Type::kInt64, {-2}, values.data()), std::invalid_argument);
  CHECK(error_text<RunError>([&] { made.write_strings("/z", {std::string("a\0b", 3)}); }) ==
        lead + "dataset /z cannot be written, a text in it holds a zero byte; remove the byte");
  made.close();

  const H5File file = H5File::open(path);
  CHECK(error_text<InputError>([&] { (void)file.read_ints("/w"); }) ==
        lead + "there is no dataset /w; check that this is the right file");
  CHECK(error_text<InputError>([&] { (void)file.shape("/a/b/c"); }) ==
        lead + "there is no dataset /a/b/c; check that this is the right file");
  CHECK(contains(error_text<InputError>([&] { (void)file.read_ints("/"); }), lead + "dataset / cannot be read, "));
  CHECK(contains(error_text<InputError>([&] { (void)file.read_ints("/s"); }), lead + "dataset /s cannot be read, "));
  CHECK(contains(error_text<InputError>([&] { (void)file.read_strings("/v"); }),
                 "dataset /v does not hold variable-length strings"));
  CHECK(error_text<InputError>([&] { (void)file.read_int_attribute("/v", "missing"); }) ==
        lead + "there is no attribute missing of /v; check that this is the right file");
  CHECK(error_text<InputError>([&] { (void)file.read_int_attribute("/w", "a"); }) ==
        lead + "there is no object /w; check that this is the right file");
  CHECK(contains(error_text<InputError>([&] { (void)file.read_int_attribute("/v", "many"); }), "attribute many of /v"));
  CHECK(contains(error_text<InputError>([&] { (void)file.read_int_attribute("/v", "text"); }), "attribute text of /v"));
  CHECK(contains(error_text<InputError>([&] { (void)file.read_string_attribute("/v", "many"); }), "attribute many"));

  CHECK(error_text<InputError>([&] { (void)H5File::open(folder.path() / "b.h5"); }) ==
        (folder.path() / "b.h5").string() + ": no such file; check the path");
  put_file(folder.path() / "b.h5", "this is not HDF5 at all");
  CHECK(contains(error_text<InputError>([&] { (void)H5File::open(folder.path() / "b.h5"); }),
                 "b.h5: not a readable HDF5 file, "));
  CHECK(contains(error_text<RunError>([&] { (void)H5File::create(folder.path() / "no" / "a.h5"); }),
                 "a.h5: cannot be created, "));
}

TEST_CASE("A truncated HDF5 file is refused or read right, never worse") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.h5";
  SplitMix64 random(3);
  std::vector<std::int64_t> values(3000);
  std::generate(values.begin(), values.end(), [&] { return static_cast<std::int64_t>(random.next()); });
  {
    H5File file = H5File::create(path);
    file.write("/v", H5Type::kInt64, {3000}, values.data());
    file.write_strings("/s", {"one", "two"});
  }
  const std::string good = read_text_file(path);
  int refused = 0;
  for (std::size_t size = 0; size < good.size(); size += 97) {
    put_file(path, good.substr(0, size));
    try {
      const H5File file = H5File::open(path);
      CHECK(file.read_ints("/v") == values);
      CHECK(file.read_strings("/s").size() == 2);
    } catch (const InputError& error) {
      CHECK(contains(error.what(), path.string()));
      ++refused;
    }
  }
  CHECK(refused > 100);
}

TEST_CASE("Assigning over an open HDF5 file closes it") {
  const TemporaryFolder folder;
  const std::int64_t value = 8;
  H5File file = H5File::create(folder.path() / "a.h5");
  file.write("/v", H5Type::kInt64, {1}, &value);
  file = H5File::create(folder.path() / "b.h5");
  // HDF5 refuses to open for reading what is still open for writing.
  CHECK(H5File::open(folder.path() / "a.h5").read_ints("/v").front() == 8);
}

}  // namespace
}  // namespace hestia
