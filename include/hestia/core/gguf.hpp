#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/files.hpp"

namespace hestia {

/// Number of a tensor type in ggml. Named are those that Hestia computes with; ggml_type_name and the reader know the
/// others too.
enum class GgmlType : std::uint32_t { kF32 = 0, kF16 = 1, kQ40 = 2, kQ41 = 3, kQ80 = 8, kBF16 = 30 };

/// How ggml stores a type: rows are cut into blocks of `block_elements` values, each of `block_bytes` bytes.
struct GgmlTypeInfo {
  GgmlType type;
  std::string_view name;  ///< ggml's own, for example "Q4_1".
  std::int64_t block_elements;
  std::int64_t block_bytes;
};

/// The layout of a type number; nullptr when this program does not know it.
[[nodiscard]] const GgmlTypeInfo* find_ggml_type(std::uint32_t number);
/// ggml's name of a type. Throws std::invalid_argument for one that find_ggml_type does not know.
[[nodiscard]] std::string_view ggml_type_name(GgmlType type);

/// True for the types that `dequantise` takes: F32, F16, BF16, Q4_0, Q4_1, Q8_0.
[[nodiscard]] bool can_dequantise(GgmlType type);
/// Writes the float32 values of whole blocks: F32, F16 and BF16 as they are; with a block's scale d and minimum m (IEEE
/// half) and its integers q, Q4_0 is d (q - 8), Q4_1 d q + m and Q8_0 d q, the low nibbles of a 4-bit block before the
/// high ones (as in ggml's dequantize_row_*). Throws std::invalid_argument for other types and for sizes that do not
/// match.
void dequantise(GgmlType type, std::span<const std::byte> blocks, std::span<float> values);

/// One tensor of a mapped GGUF file; `bytes` points into the mapping of the GgufFile that returned it.
struct GgufTensor {
  std::string name;
  GgmlType type = GgmlType::kF32;
  std::vector<std::int64_t> shape;   ///< Slowest dimension first, as elsewhere in Hestia (the file has it reversed).
  std::span<const std::byte> bytes;  ///< Little-endian blocks, rows one after another.
  std::uint64_t file_offset = 0;     ///< Of `bytes` in the file.
  [[nodiscard]] std::int64_t num_elements() const;
};

/// Types of metadata values, numbered as in the file.
enum class GgufValueType : std::uint32_t {
  kUInt8 = 0,
  kInt8 = 1,
  kUInt16 = 2,
  kInt16 = 3,
  kUInt32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUInt64 = 10,
  kInt64 = 11,
  kFloat64 = 12
};

/// Spelling of a metadata type, for example "uint32".
[[nodiscard]] std::string_view gguf_value_type_name(GgufValueType type);

/// One metadata value, still in the file's bytes.
struct GgufValue {
  GgufValueType type = GgufValueType::kUInt8;
  GgufValueType element_type = GgufValueType::kUInt8;  ///< Of an array.
  std::uint64_t count = 1;                             ///< Elements of an array.
  std::span<const std::byte> bytes;  ///< Of the value, or of an array's elements, without type and count.
  std::uint64_t file_offset = 0;     ///< Of `bytes` in the file.
};

/// A memory-mapped, fully validated GGUF file (version 3, little-endian).
class GgufFile {
 public:
  /// Maps and validates. Throws InputError naming file, place and value for: another kind of file, another version or
  /// byte order, a file shorter than its header says, counts and lengths beyond its end, empty or repeated keys and
  /// tensor names, unknown value and tensor types, booleans other than 0 and 1, an alignment that is no power of two,
  /// more than four dimensions, overflowing shapes, rows that are no whole blocks, offsets that are not aligned or out
  /// of range, overlapping tensors.
  explicit GgufFile(const std::filesystem::path& path);

  /// Metadata keys in file order.
  [[nodiscard]] const std::vector<std::string>& keys() const noexcept { return keys_; }
  [[nodiscard]] bool has(std::string_view key) const;
  /// The value of `key`. This and what follows throw InputError with the file and the nearest key when it is missing,
  /// or with both types when it is of another one.
  [[nodiscard]] const GgufValue& value(std::string_view key) const;
  /// An integer of any width. Throws InputError for one beyond int64.
  [[nodiscard]] std::int64_t integer(std::string_view key) const;
  /// A float or an integer.
  [[nodiscard]] double number(std::string_view key) const;
  [[nodiscard]] bool boolean(std::string_view key) const;
  [[nodiscard]] std::string text(std::string_view key) const;
  /// Arrays of integers of any width, of floats, of strings.
  [[nodiscard]] std::vector<std::int64_t> integers(std::string_view key) const;
  [[nodiscard]] std::vector<double> numbers(std::string_view key) const;
  [[nodiscard]] std::vector<std::string> texts(std::string_view key) const;

  /// Tensor names in the order of the file's list.
  [[nodiscard]] const std::vector<std::string>& names() const noexcept { return names_; }
  [[nodiscard]] bool contains(std::string_view name) const;
  /// The tensor called `name`. Throws InputError with the file and the nearest name when missing.
  [[nodiscard]] const GgufTensor& tensor(std::string_view name) const;
  /// The float32 values of a tensor, row-major. Throws InputError naming it when `can_dequantise` has no for its type.
  [[nodiscard]] std::vector<float> floats(std::string_view name) const;
  [[nodiscard]] std::uint64_t alignment() const noexcept { return alignment_; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return file_.path(); }

 private:
  MappedFile file_;
  std::uint64_t alignment_ = 32;
  std::vector<std::string> keys_;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<std::string> names_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
};

}  // namespace hestia
