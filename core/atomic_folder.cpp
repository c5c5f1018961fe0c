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

}  // namespace

AtomicFolder::AtomicFolder(const std::filesystem::path& path) : path_(path.has_filename() ? path : path.parent_path()) {
  static std::atomic<std::uint64_t> counter{0};
  const std::filesystem::path above = path_.parent_path();
  std::error_code failure;
  if (!above.empty()) {
    std::filesystem::create_directories(above, failure);
  }
  temporary_ = above / fmt::format(".{}.{}.{}.tmp", path_.filename().string(), ::getpid(), counter.fetch_add(1));
  if (!failure && !std::filesystem::create_directory(temporary_, failure) && !failure) {
    failure = std::make_error_code(std::errc::file_exists);
  }
  if (failure) {
    fail(temporary_, failure);
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
