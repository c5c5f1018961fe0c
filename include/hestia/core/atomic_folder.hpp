#pragma once

#include <filesystem>

namespace hestia {

/// A folder that appears whole or not at all: it is filled at `temporary()`, a name of its own beside the place, and
/// `commit` puts it there. What others left under any other name stays.
class AtomicFolder {
 public:
  /// Creates the temporary folder, `.NAME.PROCESS.NUMBER.tmp` (what a killed process leaves), and the folders above it.
  /// "runs/hf/" is runs/hf, and a link to a folder is that folder. Throws RunError naming the path when the disk
  /// refuses, or for one without a name of its own.
  explicit AtomicFolder(const std::filesystem::path& path);
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  /// Removes the temporary folder with all that is in it unless it was committed.
  ~AtomicFolder();
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return temporary_; }
  /// Renames the temporary folder to `path`, where nothing or an empty folder is. Throws RunError naming the path when
  /// the disk refuses, or when there is something by now.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  bool committed_ = false;
};

}  // namespace hestia
