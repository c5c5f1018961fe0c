#pragma once

#include <filesystem>

namespace hestia {

/// A file that appears whole or not at all, for writers that fill it bit by bit: they write to `temporary()`, a name of
/// its own in the same folder, and `commit` puts it in place. (`write_file_atomically` is the same in one call.) Where
/// there is a link, the file that it points to is meant; the constructor throws UsageError where there is a pipe or a
/// device.
class AtomicFile {
 public:
  /// Chooses the temporary name; nothing is created yet.
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  /// Removes the temporary file unless it was committed.
  ~AtomicFile();
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return temporary_; }
  /// Brings the temporary file (closed by now) and the folder to disk and renames it over `path`. Throws RunError
  /// naming the path when the disk refuses.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  bool committed_ = false;
};

}  // namespace hestia
