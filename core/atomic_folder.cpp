#include "hestia/core/atomic_folder.hpp"

#include <atomic>
#include <cstdint>
#include <system_error>

#include <fmt/format.h>
#include <unistd.h>

#include "hestia/core/error.hpp"

namespace hestia {

namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::error_code& failure) {
  throw RunError(
      fmt::format("{}: cannot be written, got \"{}\"; choose another place", path.string(), failure.message()));
}

// The folder that `path` names: without a slash or dots at its end, and where a link leads to.
std::filesystem::path place_of(const std::filesystem::path& path) {
  std::filesystem::path place = path.lexically_normal();
  if (!place.has_filename()) {
    place = place.parent_path();
  }
  const std::filesystem::path name = place.filename();
  if (name.empty() || name == "." || name == "..") {
    fail(path, std::make_error_code(std::errc::invalid_argument));
  }
  std::error_code failure;
  if (std::filesystem::is_symlink(place, failure)) {
    place = std::filesystem::canonical(place, failure);
    if (failure) {
      fail(path, failure);
    }
  }
  return place;
}

}  // namespace

AtomicFolder::AtomicFolder(const std::filesystem::path& path) : path_(place_of(path)) {
  static std::atomic<std::uint64_t> counter{0};
  const std::filesystem::path above = path_.parent_path();
  std::error_code failure;
  if (!above.empty()) {
    std::filesystem::create_directories(above, failure);
  }
  // A killed process of the same number may have left one.
  for (bool made = false; !failure && !made;) {
    temporary_ = above / fmt::format(".{}.{}.{}.tmp", path_.filename().string(), ::getpid(), counter.fetch_add(1));
    made = std::filesystem::create_directory(temporary_, failure);
    if (failure == std::errc::file_exists) {
      failure.clear();
    }
  }
  if (failure) {
    fail(path_, failure);
  }
}

AtomicFolder::~AtomicFolder() {
  if (!committed_) {
    std::error_code ignored;
    std::filesystem::remove_all(temporary_, ignored);
  }
}

void AtomicFolder::commit() {
  std::error_code failure;
  std::filesystem::rename(temporary_, path_, failure);  // an empty folder may be there
  if (failure) {
    fail(path_, failure);
  }
  committed_ = true;
}

}  // namespace hestia
