#include <cstdlib>
#include <numeric>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/safetensors.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

int python(const std::string& verb, const std::filesystem::path& folder) {
  const std::string command = fmt::format("'{}' -B '{}/tests/unit/core/interchange.py' {} '{}'", HESTIA_PYTHON,
                                          HESTIA_SOURCE_DIR, verb, folder.string());
  return std::system(command.c_str());
}

template <class Value>
std::span<const std::byte> bytes_of(const std::vector<Value>& values) {
  return std::as_bytes(std::span(values));
}

TEST_CASE("h5py and the safetensors package read what Hestia writes") {
  const TemporaryFolder folder;
  const std::vector<float> floats = {-1.0F, -0.5F, 0.0F, 0.5F, 1.0F, 1.5F};
  const std::vector<std::uint16_t> halves = {float_to_half_bits(1.0F), float_to_half_bits(-2.0F),
                                             float_to_half_bits(0.5F)};
  const std::vector<std::int64_t> ints = {-7, std::int64_t{1} << 62};
  const std::vector<std::int32_t> scalar = {9};
  SafetensorsWriter writer;
  writer.add("d.empty", DType::kF32, {0, 4}, {});
  writer.add("b.half", DType::kF16, {3}, bytes_of(halves));
  writer.add("a.float", DType::kF32, {2, 3}, bytes_of(floats));
  writer.add("c.int", DType::kI64, {2, 1}, bytes_of(ints));
  writer.add("e.scalar", DType::kI32, {}, bytes_of(scalar));
  writer.set_metadata("format", "pt");
  writer.set_metadata("note", "caf\u00e9");
  writer.write(folder.path() / "hestia.safetensors");
  {
    H5File file = H5File::create(folder.path() / "hestia.h5");
    file.write_attribute("/", "format", std::string("caf\u00e9"));
    file.write_attribute("/", "format_version", std::int64_t{3});
    file.write_attribute("/routers/tuned", "layers", std::vector<std::int64_t>{0, 2, 5});
    file.write_strings("/sequences/task", {"gsm8k", "", "\u4e2d"});
    std::vector<std::uint16_t> counts(40 * 6 * 32);
    std::iota(counts.begin(), counts.end(), std::uint16_t{0});
    file.write("/routers/tuned/count", H5Type::kUInt16, {40, 6, 32}, counts.data());
    const std::vector<std::uint16_t> means = {float_to_half_bits(0.25F), float_to_half_bits(-1.5F),
                                              float_to_half_bits(65504.0F)};
    file.write("/routers/tuned/mean_probability", H5Type::kFloat16, {3}, means.data());
    file.close();
  }
  CHECK(python("check", folder.path()) == 0);
}

TEST_CASE("Hestia reads what h5py and the safetensors package write") {
  const TemporaryFolder folder;
  REQUIRE(python("write", folder.path()) == 0);
  const SafetensorsFile file(folder.path() / "python.safetensors");
  CHECK(file.names().size() == 4);
  CHECK(file.metadata().at("framework") == "numpy");
  CHECK(file.tensor("w").shape == std::vector<std::int64_t>{3, 4});
  std::vector<float> expected(12);
  std::iota(expected.begin(), expected.end(), 0.0F);
  const auto found = file.tensor("w").bytes;
  CHECK(std::equal(found.begin(), found.end(), bytes_of(expected).begin(), bytes_of(expected).end()));
  CHECK(file.tensor("b").dtype == DType::kBool);
  CHECK(file.tensor("ids").num_elements() == 5);
  CHECK(file.tensor("none").num_elements() == 0);

  const H5File other = H5File::open(folder.path() / "python.h5");
  CHECK(other.read_floats("/a/half") == std::vector<float>{0.5F, 2.0F, -3.25F});
  const std::vector<std::int64_t> packed = other.read_ints("/a/packed");
  REQUIRE(packed.size() == 5000);
  CHECK(packed.back() == 4999);
  CHECK(other.read_ints("/a/gzip").at(300) == 300 % 256);
  CHECK(other.read_ints("/a/big_endian") == std::vector<std::int64_t>{1, 258});
  CHECK(other.read_strings("/a/text") == std::vector<std::string>{"one", "caf\u00e9"});
  CHECK(other.read_strings("/a/ascii") == std::vector<std::string>{"x", "yz"});
  CHECK(other.read_string_attribute("/", "name") == "model");
  CHECK(other.read_ints_attribute("/", "layers") == std::vector<std::int64_t>{1, 2, 3});
  CHECK(other.read_int_attribute("/", "small") == -4);
}

}  // namespace
}  // namespace hestia
