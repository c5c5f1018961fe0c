#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace hestia::testing {

/// Writes GGUF files byte by byte, wrong ones too. The calls between header() and save() say what the file holds.
class GgufWriter {
 public:
  template <class Value>
  static std::string raw(const Value& value) {
    std::string bytes(sizeof value, '\0');
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
  }
  static std::string raw_text(const std::string& text) { return raw<std::uint64_t>(text.size()) + text; }
  static std::string raw_floats(const std::vector<float>& values) {
    std::string bytes(4 * values.size(), '\0');
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }

  GgufWriter& pair(const std::string& key, std::uint32_t type, const std::string& bytes) {
    pairs_ += raw_text(key) + raw(type) + bytes;
    ++num_pairs_;
    return *this;
  }
  GgufWriter& text(const std::string& key, const std::string& value) { return pair(key, 8, raw_text(value)); }
  GgufWriter& uint32(const std::string& key, std::uint32_t value) { return pair(key, 4, raw(value)); }
  GgufWriter& float32(const std::string& key, float value) { return pair(key, 6, raw(value)); }
  GgufWriter& boolean(const std::string& key, bool value) { return pair(key, 7, std::string(1, value ? 1 : 0)); }
  GgufWriter& texts(const std::string& key, const std::vector<std::string>& values) {
    std::string bytes = raw<std::uint32_t>(8) + raw<std::uint64_t>(values.size());
    for (const std::string& value : values) {
      bytes += raw_text(value);
    }
    return pair(key, 9, bytes);
  }
  GgufWriter& int32s(const std::string& key, const std::vector<std::int32_t>& values) {
    std::string bytes = raw<std::uint32_t>(5) + raw<std::uint64_t>(values.size());
    for (const std::int32_t value : values) {
      bytes += raw(value);
    }
    return pair(key, 9, bytes);
  }
  /// `shape` as in the file: fastest dimension first. The data goes to the next aligned place.
  GgufWriter& tensor(const std::string& name, const std::vector<std::uint64_t>& shape, std::uint32_t type,
                     const std::string& bytes) {
    data_.resize((data_.size() + alignment - 1) / alignment * alignment, '\xEE');
    entry(name, shape, type, data_.size());
    data_ += bytes;
    return *this;
  }
  GgufWriter& entry(const std::string& name, const std::vector<std::uint64_t>& shape, std::uint32_t type,
                    std::uint64_t offset) {
    tensors_ += raw_text(name) + raw(static_cast<std::uint32_t>(shape.size()));
    for (const std::uint64_t size : shape) {
      tensors_ += raw(size);
    }
    tensors_ += raw(type) + raw(offset);
    ++num_tensors_;
    return *this;
  }

  [[nodiscard]] std::string bytes() const {
    std::string file = magic + raw(version) + raw(num_tensors_) + raw(num_pairs_) + pairs_ + tensors_;
    file.resize((file.size() + alignment - 1) / alignment * alignment, '\0');
    return file + data_;
  }
  void save(const std::filesystem::path& path) const {
    const std::string content = bytes();
    std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
  }

  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::uint64_t alignment = 32;

 private:
  std::string pairs_;
  std::string tensors_;
  std::string data_;
  std::uint64_t num_pairs_ = 0;
  std::uint64_t num_tensors_ = 0;
};

}  // namespace hestia::testing
