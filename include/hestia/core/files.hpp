#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace hestia {

/// A read-only memory mapping of a whole file, unmapped and closed on destruction. Empty files map to an empty span.
class MappedFile {
 public:
  MappedFile() = default;
  /// Maps `path`. Throws InputError naming the path and the system's reason.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  /// The same file, opened once more: the system reads ahead for each opening by itself, so threads that read in
  /// sequence do best with one each. Throws InputError as the constructor does, or that another file took its place.
  [[nodiscard]] MappedFile reopened() const;
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  /// Reads the bytes that begin at `offset` of the file into all of `to`, around the mapping: nothing is added to what
  /// the process holds of the file, and a disk that fails is an exception instead of a signal. Any number of threads
  /// may read at once. Throws InputError naming the path, the place and the system's reason, or that the file ends.
  void read(std::size_t offset, std::span<std::byte> to) const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Reads a whole file. Throws InputError naming the path and the system's reason.
[[nodiscard]] std::string read_text_file(const std::filesystem::path& path);

/// Replaces `path` whole or not at all: `write` fills a temporary file in the same folder, which is fsynced and renamed
/// over `path`; the folder is fsynced too. On any exception the temporary file is removed and `path` is untouched.
/// Throws RunError naming the path when the disk refuses.
void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(const std::filesystem::path& temporary)>& write);
/// As above, with the content at hand.
void write_text_atomically(const std::filesystem::path& path, std::string_view content);

/// Lower-case hexadecimal SHA-256 of `bytes` (FIPS 180-4).
[[nodiscard]] std::string sha256_hex(std::span<const std::byte> bytes);

/// Incremental SHA-256 (FIPS 180-4).
class Sha256 {
 public:
  Sha256();
  void update(std::span<const std::byte> bytes);
  /// Lower-case hexadecimal digest; the object must not be used afterwards.
  [[nodiscard]] std::string hex();

 private:
  void block(const std::byte* data);
  std::uint32_t state_[8];
  std::uint64_t length_ = 0;
  std::byte buffer_[64];
};

}  // namespace hestia
