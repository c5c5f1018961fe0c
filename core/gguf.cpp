#include "hestia/core/gguf.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <tuple>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "hestia/core/float_bits.hpp"

namespace hestia {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr std::uint32_t kVersion = 3;
constexpr std::uint32_t kVersionOtherByteOrder = 0x03000000;
constexpr std::uint64_t kMaxNameBytes = 65535;
constexpr std::uint32_t kMaxDimensions = 4;
constexpr int kMaxArrayDepth = 4;
// What a metadata pair and a tensor entry take at least: lengths, types, one byte of a name or value.
constexpr std::uint64_t kLeastPairBytes = 8 + 4 + 1;
constexpr std::uint64_t kLeastTensorBytes = 8 + 4 + 4 + 8;
constexpr const char* kAlignmentKey = "general.alignment";

constexpr GgmlTypeInfo info(std::uint32_t number, std::string_view name, std::int64_t elements, std::int64_t bytes) {
  return {static_cast<GgmlType>(number), name, elements, bytes};
}

// Numbers 4, 5, 31 to 33 and 36 to 38 belonged to types that ggml has removed.
constexpr GgmlTypeInfo kTypes[] = {
    info(0, "F32", 1, 4),         info(1, "F16", 1, 2),         info(2, "Q4_0", 32, 18),
    info(3, "Q4_1", 32, 20),      info(6, "Q5_0", 32, 22),      info(7, "Q5_1", 32, 24),
    info(8, "Q8_0", 32, 34),      info(9, "Q8_1", 32, 36),      info(10, "Q2_K", 256, 84),
    info(11, "Q3_K", 256, 110),   info(12, "Q4_K", 256, 144),   info(13, "Q5_K", 256, 176),
    info(14, "Q6_K", 256, 210),   info(15, "Q8_K", 256, 292),   info(16, "IQ2_XXS", 256, 66),
    info(17, "IQ2_XS", 256, 74),  info(18, "IQ3_XXS", 256, 98), info(19, "IQ1_S", 256, 50),
    info(20, "IQ4_NL", 32, 18),   info(21, "IQ3_S", 256, 110),  info(22, "IQ2_S", 256, 82),
    info(23, "IQ4_XS", 256, 136), info(24, "I8", 1, 1),         info(25, "I16", 1, 2),
    info(26, "I32", 1, 4),        info(27, "I64", 1, 8),        info(28, "F64", 1, 8),
    info(29, "IQ1_M", 256, 56),   info(30, "BF16", 1, 2),       info(34, "TQ1_0", 256, 54),
    info(35, "TQ2_0", 256, 66),   info(39, "MXFP4", 32, 17),    info(40, "NVFP4", 64, 36),
    info(41, "Q1_0", 128, 18)};

struct ValueTypeInfo {
  std::string_view name;
  std::size_t size;  // 0: strings and arrays
};
constexpr ValueTypeInfo kValueTypes[] = {{"uint8", 1},  {"int8", 1},    {"uint16", 2}, {"int16", 2},  {"uint32", 4},
                                         {"int32", 4},  {"float32", 4}, {"bool", 1},   {"string", 0}, {"array", 0},
                                         {"uint64", 8}, {"int64", 8},   {"float64", 8}};

std::size_t value_size(GgufValueType type) {
  return kValueTypes[static_cast<std::size_t>(type)].size;
}

template <class Value>
Value read_as(const std::byte* data) {
  Value value{};
  std::memcpy(&value, data, sizeof value);
  return value;
}

// Names in messages: those of a damaged file are long and not text.
std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string out;
  for (const char letter : text.substr(0, kLongest)) {
    const auto code = static_cast<unsigned char>(letter);
    out += code < 0x20 || code == 0x7F ? fmt::format("\\x{:02x}", code) : std::string(1, letter);
  }
  return text.size() > kLongest ? out + "..." : out;
}

// Walks the header of a mapped file; every step is checked against the end.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file) : bytes_(file.bytes()), path_(file.path().string()) {}

  [[nodiscard]] std::uint64_t at() const { return at_; }
  [[nodiscard]] std::uint64_t left() const { return bytes_.size() - at_; }
  [[nodiscard]] InputError error(const std::string& what) const {
    return InputError(fmt::format("{}: {}; fetch or write the file again", path_, what));
  }

  // `place` says what is being read, for the message.
  std::span<const std::byte> take(std::uint64_t size, const std::string& place) {
    if (size > left()) {
      throw error(
          fmt::format("the file is truncated: {} takes {} bytes from byte {} on, got {}", place, size, at_, left()));
    }
    const std::span<const std::byte> part = bytes_.subspan(at_, size);
    at_ += size;
    return part;
  }
  template <class Value>
  Value number(const std::string& place) {
    return read_as<Value>(take(sizeof(Value), place).data());
  }
  std::string_view text(std::uint64_t most, const std::string& place) {
    const std::uint64_t begin = at_;
    const auto size = number<std::uint64_t>(place);
    if (size > most) {
      throw error(fmt::format("{} at byte {} may take {} bytes at most, got {}", place, begin, most, size));
    }
    const std::span<const std::byte> part = take(size, place);
    return {reinterpret_cast<const char*>(part.data()), part.size()};
  }
  std::uint64_t count(std::uint64_t least_bytes, const std::string& place) {
    const auto value = number<std::uint64_t>(place);
    if (value > left() / least_bytes) {
      throw error(fmt::format("{} must fit into the {} bytes that follow, got {} (truncated?)", place, left(), value));
    }
    return value;
  }
  GgufValueType value_type(const std::string& place) {
    const auto number_of_type = number<std::uint32_t>(place);
    if (number_of_type >= std::size(kValueTypes)) {
      throw error(fmt::format("{} has a type that GGUF does not define, got {}", place, number_of_type));
    }
    return static_cast<GgufValueType>(number_of_type);
  }

  // Walks over one value, of which `value` gets bytes and place.
  void walk(GgufValue& value, const std::string& place, int depth) {
    value.file_offset = at_;
    if (value.type == GgufValueType::kArray) {
      value.element_type = value_type(place + ": the elements");
      if (value.element_type == GgufValueType::kArray && depth >= kMaxArrayDepth) {
        throw error(fmt::format("{} nests arrays more than {} deep", place, kMaxArrayDepth));
      }
      const std::size_t size = value_size(value.element_type);
      value.count = count(size != 0 ? size : 8, place + ": the number of elements");
      value.file_offset = at_;
      if (size != 0) {
        check_booleans(value.element_type, take(size * value.count, place), place);
      } else {
        for (std::uint64_t i = 0; i < value.count; ++i) {
          GgufValue element;
          element.type = value.element_type;
          walk(element, place, depth + 1);
        }
      }
    } else if (value.type == GgufValueType::kString) {
      text(std::numeric_limits<std::uint64_t>::max(), place);
    } else {
      check_booleans(value.type, take(value_size(value.type), place), place);
    }
    value.bytes = bytes_.subspan(value.file_offset, at_ - value.file_offset);
  }

 private:
  void check_booleans(GgufValueType type, std::span<const std::byte> values, const std::string& place) const {
    if (type != GgufValueType::kBool) {
      return;
    }
    for (const std::byte value : values) {
      if (std::to_integer<int>(value) > 1) {
        throw error(fmt::format("{} must be 0 or 1 as a bool, got {}", place, std::to_integer<int>(value)));
      }
    }
  }

  std::span<const std::byte> bytes_;
  std::string path_;
  std::uint64_t at_ = 0;
};

void check_kind(Cursor& cursor, const MappedFile& file) {
  const auto fail = [&](const std::string& what, const std::string& advice) {
    return InputError(fmt::format("{}: {}; {}", file.path().string(), what, advice));
  };
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() < kMagic.size() || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    const std::string_view first(reinterpret_cast<const char*>(bytes.data()), std::min(bytes.size(), kMagic.size()));
    throw fail(fmt::format("not a GGUF file, it must begin with \"GGUF\", got \"{}\"", shown(first)),
               "give the path of a .gguf file");
  }
  cursor.take(kMagic.size(), "the magic");
  const auto version = cursor.number<std::uint32_t>("the version");
  if (version == kVersionOtherByteOrder) {
    throw fail("a big-endian GGUF file is not supported", "convert it to little-endian");
  }
  if (version != kVersion) {
    throw fail(fmt::format("GGUF version must be {}, got {}", kVersion, version),
               "convert the model again with a current llama.cpp");
  }
}

std::uint64_t rounded_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

InputError wrong_type(const GgufFile& file, std::string_view key, std::string_view wanted, const GgufValue& value) {
  const std::string got = value.type == GgufValueType::kArray
                              ? fmt::format("array of {}", gguf_value_type_name(value.element_type))
                              : std::string(gguf_value_type_name(value.type));
  return InputError(fmt::format("{}: metadata \"{}\" must be {}, got {}; convert the model again", file.path().string(),
                                key, wanted, got));
}

bool is_integer(GgufValueType type) {
  using Type = GgufValueType;
  return type != Type::kFloat32 && type != Type::kFloat64 && type != Type::kBool && type != Type::kString &&
         type != Type::kArray;
}

// nullopt: beyond int64.
std::optional<std::int64_t> integer_at(GgufValueType type, const std::byte* data) {
  switch (type) {
    case GgufValueType::kUInt8:
      return read_as<std::uint8_t>(data);
    case GgufValueType::kInt8:
      return read_as<std::int8_t>(data);
    case GgufValueType::kUInt16:
      return read_as<std::uint16_t>(data);
    case GgufValueType::kInt16:
      return read_as<std::int16_t>(data);
    case GgufValueType::kUInt32:
      return read_as<std::uint32_t>(data);
    case GgufValueType::kInt32:
      return read_as<std::int32_t>(data);
    case GgufValueType::kInt64:
      return read_as<std::int64_t>(data);
    case GgufValueType::kUInt64: {
      const auto value = read_as<std::uint64_t>(data);
      return value <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())
                 ? std::optional<std::int64_t>(static_cast<std::int64_t>(value))
                 : std::nullopt;
    }
    default:
      throw std::invalid_argument("gguf: not an integer type");
  }
}

std::string text_at(const std::byte*& data) {
  const auto size = read_as<std::uint64_t>(data);
  data += sizeof size;
  std::string text(reinterpret_cast<const char*>(data), size);
  data += size;
  return text;
}

std::int64_t checked_integer(const GgufFile& file, std::string_view key, GgufValueType type, const std::byte* data) {
  const std::optional<std::int64_t> value = integer_at(type, data);
  if (!value) {
    throw InputError(fmt::format("{}: metadata \"{}\" must fit into 63 bits, got {}; convert the model again",
                                 file.path().string(), key, read_as<std::uint64_t>(data)));
  }
  return *value;
}

float half_at(const std::byte* data) {
  return half_bits_to_float(read_as<std::uint16_t>(data));
}

}  // namespace

const GgmlTypeInfo* find_ggml_type(std::uint32_t number) {
  const auto* const found = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const GgmlTypeInfo& entry) {
    return static_cast<std::uint32_t>(entry.type) == number;
  });
  return found == std::end(kTypes) ? nullptr : found;
}

std::string_view ggml_type_name(GgmlType type) {
  const GgmlTypeInfo* const found = find_ggml_type(static_cast<std::uint32_t>(type));
  if (found == nullptr) {
    throw std::invalid_argument(fmt::format("gguf: unknown tensor type {}", static_cast<std::uint32_t>(type)));
  }
  return found->name;
}

std::string_view gguf_value_type_name(GgufValueType type) {
  return kValueTypes[static_cast<std::size_t>(type)].name;
}

bool can_dequantise(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
    case GgmlType::kF16:
    case GgmlType::kBF16:
    case GgmlType::kQ40:
    case GgmlType::kQ41:
    case GgmlType::kQ80:
      return true;
  }
  return false;
}

void dequantise(GgmlType type, std::span<const std::byte> blocks, std::span<float> values) {
  if (!can_dequantise(type)) {
    throw std::invalid_argument(
        fmt::format("gguf: tensor type {} has no float32 form here", static_cast<std::uint32_t>(type)));
  }
  const GgmlTypeInfo& layout = *find_ggml_type(static_cast<std::uint32_t>(type));
  const auto elements = static_cast<std::size_t>(layout.block_elements);
  const auto size = static_cast<std::size_t>(layout.block_bytes);
  if (values.size() % elements != 0 || blocks.size() != values.size() / elements * size) {
    throw std::invalid_argument(
        fmt::format("gguf: {} bytes of {} do not hold {} values", blocks.size(), layout.name, values.size()));
  }
  const std::byte* block = blocks.data();
  const std::size_t half = elements / 2;
  for (std::size_t first = 0; first < values.size(); first += elements, block += size) {
    float* const out = values.data() + first;
    switch (type) {
      case GgmlType::kF32:
        *out = read_as<float>(block);
        break;
      case GgmlType::kF16:
        *out = half_at(block);
        break;
      case GgmlType::kBF16:
        *out = bfloat16_bits_to_float(read_as<std::uint16_t>(block));
        break;
      case GgmlType::kQ40: {
        const float scale = half_at(block);
        for (std::size_t i = 0; i < half; ++i) {
          const int pair = std::to_integer<int>(block[2 + i]);
          out[i] = static_cast<float>((pair & 0xF) - 8) * scale;
          out[i + half] = static_cast<float>((pair >> 4) - 8) * scale;
        }
        break;
      }
      case GgmlType::kQ41: {
        const float scale = half_at(block);
        const float minimum = half_at(block + 2);
        for (std::size_t i = 0; i < half; ++i) {
          const int pair = std::to_integer<int>(block[4 + i]);
          out[i] = static_cast<float>(pair & 0xF) * scale + minimum;
          out[i + half] = static_cast<float>(pair >> 4) * scale + minimum;
        }
        break;
      }
      case GgmlType::kQ80: {
        const float scale = half_at(block);
        for (std::size_t i = 0; i < elements; ++i) {
          out[i] = static_cast<float>(read_as<std::int8_t>(block + 2 + i)) * scale;
        }
        break;
      }
    }
  }
}

std::int64_t GgufTensor::num_elements() const {
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) {
    elements *= size;
  }
  return elements;
}

GgufFile::GgufFile(const std::filesystem::path& path) : file_(path) {
  Cursor cursor(file_);
  check_kind(cursor, file_);
  const auto num_tensors = cursor.number<std::uint64_t>("the number of tensors");
  const std::uint64_t num_pairs = cursor.count(kLeastPairBytes, "the number of metadata keys");
  for (std::uint64_t i = 0; i < num_pairs; ++i) {
    const std::string place = fmt::format("metadata key {}", i);
    const std::string key(cursor.text(kMaxNameBytes, place));
    if (key.empty()) {
      throw cursor.error(fmt::format("{} must not be empty", place));
    }
    const std::string subject = fmt::format("metadata \"{}\"", shown(key));
    GgufValue value;
    value.type = cursor.value_type(subject);
    cursor.walk(value, subject, 1);
    if (!values_.emplace(key, value).second) {
      throw cursor.error(fmt::format("{} is there twice", subject));
    }
    keys_.push_back(key);
  }
  if (has(kAlignmentKey)) {
    const GgufValue& given = value(kAlignmentKey);
    if (given.type != GgufValueType::kUInt32) {
      throw wrong_type(*this, kAlignmentKey, "uint32", given);
    }
    alignment_ = read_as<std::uint32_t>(given.bytes.data());
    if (alignment_ == 0 || (alignment_ & (alignment_ - 1)) != 0) {
      throw cursor.error(fmt::format("metadata \"{}\" must be a power of two, got {}", kAlignmentKey, alignment_));
    }
  }
  if (num_tensors > cursor.left() / kLeastTensorBytes) {
    throw cursor.error(fmt::format("the number of tensors must fit into the {} bytes that follow, got {} (truncated?)",
                                   cursor.left(), num_tensors));
  }
  struct Range {
    std::uint64_t begin;
    std::uint64_t end;
    const std::string* name;
  };
  std::vector<Range> ranges;
  std::vector<std::uint64_t> sizes;
  for (std::uint64_t i = 0; i < num_tensors; ++i) {
    const std::string place = fmt::format("tensor {}", i);
    GgufTensor tensor;
    tensor.name = cursor.text(kMaxNameBytes, place + ": the name");
    if (tensor.name.empty()) {
      throw cursor.error(fmt::format("{} must have a name", place));
    }
    const std::string subject = fmt::format("tensor \"{}\"", shown(tensor.name));
    const auto num_dimensions = cursor.number<std::uint32_t>(subject);
    if (num_dimensions > kMaxDimensions) {
      throw cursor.error(
          fmt::format("{} may have {} dimensions at most, got {}", subject, kMaxDimensions, num_dimensions));
    }
    std::uint64_t elements = 1;
    for (std::uint32_t d = 0; d < num_dimensions; ++d) {
      const auto size = cursor.number<std::uint64_t>(subject);
      constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
      if (size == 0 || size > kLargest / elements) {
        throw cursor.error(
            fmt::format("{} has a dimension that is 0 or makes its size overflow, got {}", subject, size));
      }
      elements *= size;
      tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
    }
    const auto type_number = cursor.number<std::uint32_t>(subject);
    const GgmlTypeInfo* const layout = find_ggml_type(type_number);
    if (layout == nullptr) {
      throw cursor.error(fmt::format("{} has a type that this program does not know, got {}", subject, type_number));
    }
    tensor.type = layout->type;
    const std::int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
    if (row % layout->block_elements != 0) {
      throw cursor.error(fmt::format("{} of type {} must have rows of whole blocks of {} values, got {}", subject,
                                     layout->name, layout->block_elements, row));
    }
    const std::uint64_t blocks = elements / static_cast<std::uint64_t>(layout->block_elements);
    if (blocks > std::numeric_limits<std::uint64_t>::max() / static_cast<std::uint64_t>(layout->block_bytes)) {
      throw cursor.error(fmt::format("{} has a size that overflows, got {} blocks", subject, blocks));
    }
    tensor.file_offset = cursor.number<std::uint64_t>(subject);  // of the data until its place is known, below
    if (tensor.file_offset % alignment_ != 0) {
      throw cursor.error(
          fmt::format("{} must begin at a multiple of {} bytes, got {}", subject, alignment_, tensor.file_offset));
    }
    names_.push_back(tensor.name);
    sizes.push_back(blocks * static_cast<std::uint64_t>(layout->block_bytes));
    if (!tensors_.emplace(tensor.name, std::move(tensor)).second) {
      throw cursor.error(fmt::format("{} is there twice", subject));
    }
  }
  const std::span<const std::byte> bytes = file_.bytes();
  const std::uint64_t data_begin = std::min<std::uint64_t>(rounded_up(cursor.at(), alignment_), bytes.size());
  const std::span<const std::byte> data = bytes.subspan(data_begin);
  for (std::size_t i = 0; i < names_.size(); ++i) {
    GgufTensor& tensor = tensors_.find(names_[i])->second;
    const std::uint64_t begin = tensor.file_offset;
    if (begin > data.size() || sizes[i] > data.size() - begin) {
      throw cursor.error(
          fmt::format("tensor \"{}\" takes {} bytes from byte {} of the data on, but the file holds {} "
                      "bytes of data (truncated?)",
                      shown(names_[i]), sizes[i], begin, data.size()));
    }
    tensor.bytes = data.subspan(begin, sizes[i]);
    tensor.file_offset = data_begin + begin;
    ranges.push_back({begin, begin + sizes[i], &names_[i]});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) {
      throw cursor.error(fmt::format("tensors \"{}\" and \"{}\" overlap at byte {} of the data",
                                     shown(*ranges[i - 1].name), shown(*ranges[i].name), ranges[i].begin));
    }
  }
}

bool GgufFile::has(std::string_view key) const {
  return values_.find(key) != values_.end();
}

const GgufValue& GgufFile::value(std::string_view key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) {
    const std::string near = nearest_name(key, keys_);
    throw InputError(fmt::format(
        "{}: there is no metadata \"{}\"{}", path().string(), key,
        near.empty() ? "; check that this is the right file" : fmt::format("; did you mean \"{}\"?", near)));
  }
  return found->second;
}

std::int64_t GgufFile::integer(std::string_view key) const {
  const GgufValue& found = value(key);
  if (!is_integer(found.type)) {
    throw wrong_type(*this, key, "an integer", found);
  }
  return checked_integer(*this, key, found.type, found.bytes.data());
}

double GgufFile::number(std::string_view key) const {
  const GgufValue& found = value(key);
  if (found.type == GgufValueType::kFloat32) {
    return static_cast<double>(read_as<float>(found.bytes.data()));
  }
  if (found.type == GgufValueType::kFloat64) {
    return read_as<double>(found.bytes.data());
  }
  if (!is_integer(found.type)) {
    throw wrong_type(*this, key, "a number", found);
  }
  return static_cast<double>(checked_integer(*this, key, found.type, found.bytes.data()));
}

bool GgufFile::boolean(std::string_view key) const {
  const GgufValue& found = value(key);
  if (found.type != GgufValueType::kBool) {
    throw wrong_type(*this, key, "bool", found);
  }
  return std::to_integer<int>(found.bytes[0]) != 0;
}

std::string GgufFile::text(std::string_view key) const {
  const GgufValue& found = value(key);
  if (found.type != GgufValueType::kString) {
    throw wrong_type(*this, key, "string", found);
  }
  const std::byte* data = found.bytes.data();
  return text_at(data);
}

std::vector<std::int64_t> GgufFile::integers(std::string_view key) const {
  const GgufValue& found = value(key);
  if (found.type != GgufValueType::kArray || !is_integer(found.element_type)) {
    throw wrong_type(*this, key, "an array of integers", found);
  }
  std::vector<std::int64_t> all(found.count);
  const std::size_t size = value_size(found.element_type);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i] = checked_integer(*this, key, found.element_type, found.bytes.data() + i * size);
  }
  return all;
}

std::vector<double> GgufFile::numbers(std::string_view key) const {
  const GgufValue& found = value(key);
  const bool single = found.element_type == GgufValueType::kFloat32;
  if (found.type != GgufValueType::kArray || !(single || found.element_type == GgufValueType::kFloat64)) {
    throw wrong_type(*this, key, "an array of floats", found);
  }
  std::vector<double> all(found.count);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i] = single ? static_cast<double>(read_as<float>(found.bytes.data() + 4 * i))
                    : read_as<double>(found.bytes.data() + 8 * i);
  }
  return all;
}

std::vector<std::string> GgufFile::texts(std::string_view key) const {
  const GgufValue& found = value(key);
  if (found.type != GgufValueType::kArray || found.element_type != GgufValueType::kString) {
    throw wrong_type(*this, key, "an array of strings", found);
  }
  std::vector<std::string> all(found.count);
  const std::byte* data = found.bytes.data();
  for (std::string& text : all) {
    text = text_at(data);
  }
  return all;
}

bool GgufFile::contains(std::string_view name) const {
  return tensors_.find(name) != tensors_.end();
}

const GgufTensor& GgufFile::tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    const std::string near = nearest_name(name, names_);
    throw InputError(fmt::format(
        "{}: there is no tensor \"{}\"{}", path().string(), name,
        near.empty() ? "; check that this is the right file" : fmt::format("; did you mean \"{}\"?", near)));
  }
  return found->second;
}

std::vector<float> GgufFile::floats(std::string_view name) const {
  const GgufTensor& found = tensor(name);
  if (!can_dequantise(found.type)) {
    throw InputError(
        fmt::format("{}: tensor \"{}\" cannot be read as numbers, got type {}; convert the model to F32, F16, BF16, "
                    "Q4_0, Q4_1 or Q8_0",
                    path().string(), name, ggml_type_name(found.type)));
  }
  std::vector<float> values(static_cast<std::size_t>(found.num_elements()));
  dequantise(found.type, found.bytes, values);
  return values;
}

}  // namespace hestia
