#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/core/files.hpp"

namespace hestia {

/// Element types of safetensors files (spellings of the format: "F32", "BF16", ...).
enum class DType { kBool, kU8, kI8, kI16, kU16, kF16, kBF16, kI32, kU32, kF32, kF64, kI64, kU64, kF8E4M3, kF8E5M2 };

/// Bytes of one element.
[[nodiscard]] std::size_t dtype_size(DType dtype);
/// Spelling in a safetensors header.
[[nodiscard]] std::string_view dtype_name(DType dtype);
/// Inverse of dtype_name; nullopt when unknown.
[[nodiscard]] std::optional<DType> dtype_from_name(std::string_view name);

/// One tensor of a mapped file. `bytes` points into the mapping of the SafetensorsFile that returned it and is
/// row-major, little-endian, possibly unaligned for its dtype.
struct TensorView {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
  std::shared_ptr<const MappedFile> file = {};  ///< What `bytes` is a part of; null: memory of the caller's.
  [[nodiscard]] std::int64_t num_elements() const;
  /// Copies the bytes that begin at byte `offset` of the tensor into all of `to`: MappedFile::read where there is a
  /// file. Throws as that does.
  void read(std::size_t offset, std::span<std::byte> to) const;
};

/// A memory-mapped, fully validated `.safetensors` file.
class SafetensorsFile {
 public:
  /// Maps and validates. Throws InputError naming file, tensor and values for: a file shorter than its header says, a
  /// header over 100 MB, JSON that does not parse, duplicate names, unknown dtypes, negative or overflowing shapes,
  /// offsets out of range or reversed, sizes that do not match shape x dtype, overlapping tensors, holes between
  /// tensors.
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// Names in file order (by offset).
  [[nodiscard]] const std::vector<std::string>& names() const noexcept { return names_; }
  [[nodiscard]] bool contains(std::string_view name) const;
  /// The tensor called `name`. Throws InputError with the file and the nearest name when missing.
  [[nodiscard]] const TensorView& tensor(std::string_view name) const;
  /// The `__metadata__` strings.
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return file_->path(); }

 private:
  std::shared_ptr<const MappedFile> file_;
  std::vector<std::string> names_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// A checkpoint of one `model.safetensors` (which goes first) or of shards named by `model.safetensors.index.json`.
class SafetensorsCheckpoint {
 public:
  /// Opens `directory`/model.safetensors, or every shard of the index. Throws InputError: neither present, a shard
  /// missing, the index naming a tensor its shard does not hold, a tensor in two shards.
  explicit SafetensorsCheckpoint(const std::filesystem::path& directory);
  [[nodiscard]] std::vector<std::string> names() const;
  [[nodiscard]] bool contains(std::string_view name) const;
  [[nodiscard]] const TensorView& tensor(std::string_view name) const;
  [[nodiscard]] const std::vector<SafetensorsFile>& files() const noexcept { return files_; }

 private:
  std::filesystem::path directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t, std::less<>> file_of_;
};

/// Collects tensors and writes one file. Bytes are borrowed: they must live until `write` returns.
class SafetensorsWriter {
 public:
  /// Adds a tensor; `bytes` row-major. Throws std::invalid_argument when the size does not match, the name
  /// repeats or is `__metadata__`.
  void add(std::string name, DType dtype, std::vector<std::int64_t> shape, std::span<const std::byte> bytes);
  void set_metadata(std::string key, std::string value);
  /// Bytes of tensor data added so far.
  [[nodiscard]] std::size_t data_bytes() const noexcept { return data_bytes_; }
  [[nodiscard]] bool empty() const noexcept { return tensors_.empty(); }
  /// Writes to a temporary file, fsyncs, renames. Tensor data is aligned to 8 bytes. Throws RunError naming `path`.
  void write(const std::filesystem::path& path) const;

 private:
  std::vector<TensorView> tensors_;
  std::set<std::string> names_;
  std::map<std::string, std::string> metadata_;
  std::size_t data_bytes_ = 0;
};

/// Writes tensors (in order) as model.safetensors, or as shards of at most `max_shard_bytes` of data plus
/// model.safetensors.index.json; then removes the index or the whole file that an earlier checkpoint of the other kind
/// left there. A tensor larger than the limit gets a shard of its own. Each file is written atomically.
void write_sharded(const std::filesystem::path& directory, const std::vector<TensorView>& tensors,
                   std::size_t max_shard_bytes, const std::map<std::string, std::string>& metadata);

}  // namespace hestia
