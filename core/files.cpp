#include "hestia/core/files.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hestia/core/atomic_file.hpp"
#include "hestia/core/error.hpp"

namespace hestia {

namespace {

std::string reason() {
  return std::system_category().message(errno);
}

// Closes a file descriptor at the end of the scope.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (value_ >= 0) {
      ::close(value_);
    }
  }
  [[nodiscard]] int get() const { return value_; }
  /// Gives the descriptor away, open.
  [[nodiscard]] int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

RunError write_error(const std::filesystem::path& path, const std::string& why) {
  return RunError(fmt::format("{}: cannot be written, {}; check folder, space and permissions", path.string(), why));
}

// Brings `path` to disk; messages name `subject`, the file the user knows of.
void fsync_path(const std::filesystem::path& path, int flags, const std::filesystem::path& subject) {
  const Descriptor descriptor(::open(path.c_str(), flags | O_CLOEXEC));
  if (descriptor.get() >= 0 && ::fsync(descriptor.get()) == 0) {
    return;
  }
  // Some network and FUSE file systems know no fsync of a folder; the rename has happened by then.
  if ((flags & O_DIRECTORY) != 0 && (errno == EINVAL || errno == ENOTSUP)) {
    return;
  }
  throw write_error(subject, reason());
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  // Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
  Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  if (descriptor.get() < 0 || ::fstat(descriptor.get(), &status) != 0) {
    throw InputError(fmt::format("{}: cannot be opened, {}; check the path", path.string(), reason()));
  }
  if (!S_ISREG(status.st_mode)) {
    throw InputError(fmt::format("{}: not a regular file; give the path of a file", path.string()));
  }
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) {
    return;
  }
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (address == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr): the macro's own cast
    throw InputError(fmt::format("{}: cannot be mapped, {}; check the file system", path.string(), reason()));
  }
  // The system then reads far ahead, in large pieces that it keeps together in memory: later reads find them faster
  // than the single pages that POSIX_FADV_WILLNEED would have it fetch.
  ::posix_fadvise(descriptor.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  data_ = static_cast<const std::byte*>(address);
  descriptor_ = descriptor.release();
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    ::munmap(const_cast<std::byte*>(data_), size_);
    ::close(descriptor_);
  }
}

MappedFile MappedFile::reopened() const {
  MappedFile again(path_);
  struct stat here {};
  struct stat there {};
  if (::fstat(descriptor_, &here) != 0 || ::fstat(again.descriptor_, &there) != 0 || here.st_dev != there.st_dev ||
      here.st_ino != there.st_ino) {
    throw InputError(fmt::format("{}: another file took its place while it was read; start again once it is written",
                                 path_.string()));
  }
  return again;
}

void MappedFile::read(std::size_t offset, std::span<std::byte> to) const {
  while (!to.empty()) {
    const ssize_t got = ::pread(descriptor_, to.data(), to.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      throw InputError(
          fmt::format("{}: {} bytes at {} cannot be read, {}; check the disk, and that nothing wrote to "
                      "the file meanwhile",
                      path_.string(), to.size(), offset, got < 0 ? reason() : std::string("the file ends there")));
    }
    to = to.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::size_t>(got);
  }
}

std::string read_text_file(const std::filesystem::path& path) {
  // Read, not mapped: pipes and files of /proc have no size to map.
  const Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  std::string text;
  std::size_t size = 0;
  while (descriptor.get() >= 0) {
    text.resize(std::max<std::size_t>(2 * size, 1 << 16));
    const ssize_t count = ::read(descriptor.get(), text.data() + size, text.size() - size);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      break;
    }
    if (count == 0) {
      text.resize(size);
      return text;
    }
    size += static_cast<std::size_t>(count);
  }
  throw InputError(fmt::format("{}: cannot be read, {}; check the path", path.string(), reason()));
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  // Renaming replaces whatever is there: what a link points to is meant, there already or not, and a pipe or device is
  // no place for a file. (A folder refuses to be replaced by itself.)
  constexpr int kMostLinks = 40;
  std::error_code none;
  if (const auto there = std::filesystem::status(path_, none); std::filesystem::exists(there) &&
                                                               !std::filesystem::is_regular_file(there) &&
                                                               !std::filesystem::is_directory(there)) {
    throw UsageError(fmt::format("{}: is there and not a regular file; choose another path", path_.string()));
  }
  for (int links = 0; links < kMostLinks && std::filesystem::is_symlink(path_, none); ++links) {
    path_ = path_.parent_path() / std::filesystem::read_symlink(path_);
  }
  static std::atomic<std::uint64_t> counter{0};
  temporary_ =
      path_.parent_path() / fmt::format(".{}.{}.{}.tmp", path_.filename().string(), ::getpid(), counter.fetch_add(1));
}

AtomicFile::~AtomicFile() {
  if (!committed_) {
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
  }
}

void AtomicFile::commit() {
  const std::filesystem::path folder = path_.parent_path();
  fsync_path(temporary_, O_RDONLY, path_);
  std::error_code problem;
  std::filesystem::rename(temporary_, path_, problem);
  if (problem) {
    throw write_error(path_, problem.message());
  }
  committed_ = true;
  fsync_path(folder.empty() ? "." : folder, O_RDONLY | O_DIRECTORY, path_);
}

void write_file_atomically(const std::filesystem::path& path,
                           const std::function<void(const std::filesystem::path& temporary)>& write) {
  AtomicFile file(path);
  try {
    write(file.temporary());
  } catch (const std::filesystem::filesystem_error& error) {
    throw write_error(path, error.code().message());
  }
  file.commit();
}

void write_text_atomically(const std::filesystem::path& path, std::string_view content) {
  write_file_atomically(path, [&](const std::filesystem::path& temporary) {
    std::ofstream stream(temporary, std::ios::binary);
    stream.write(content.data(), static_cast<std::streamsize>(content.size()));
    stream.close();
    if (!stream) {
      throw write_error(path, reason());
    }
  });
}

namespace {

constexpr std::uint32_t kSha256Rounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

}  // namespace

Sha256::Sha256()
    : state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19},
      buffer_{} {}

void Sha256::block(const std::byte* data) {
  std::uint32_t words[64];
  for (int i = 0; i < 16; ++i) {
    words[i] = 0;
    for (int j = 0; j < 4; ++j) {
      words[i] = (words[i] << 8) | static_cast<std::uint32_t>(data[4 * i + j]);
    }
  }
  for (int i = 16; i < 64; ++i) {
    const std::uint32_t s0 = std::rotr(words[i - 15], 7) ^ std::rotr(words[i - 15], 18) ^ (words[i - 15] >> 3);
    const std::uint32_t s1 = std::rotr(words[i - 2], 17) ^ std::rotr(words[i - 2], 19) ^ (words[i - 2] >> 10);
    words[i] = words[i - 16] + s0 + words[i - 7] + s1;
  }
  std::uint32_t v[8];
  std::memcpy(v, state_, sizeof v);
  for (int i = 0; i < 64; ++i) {
    const std::uint32_t s1 = std::rotr(v[4], 6) ^ std::rotr(v[4], 11) ^ std::rotr(v[4], 25);
    const std::uint32_t choose = (v[4] & v[5]) ^ (~v[4] & v[6]);
    const std::uint32_t first = v[7] + s1 + choose + kSha256Rounds[i] + words[i];
    const std::uint32_t s0 = std::rotr(v[0], 2) ^ std::rotr(v[0], 13) ^ std::rotr(v[0], 22);
    const std::uint32_t second = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    for (int j = 7; j > 0; --j) {
      v[j] = v[j - 1];
    }
    v[4] += first;
    v[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) {
    state_[i] += v[i];
  }
}

void Sha256::update(std::span<const std::byte> bytes) {
  std::size_t filled = length_ % 64;
  length_ += bytes.size();
  while (!bytes.empty()) {
    if (filled == 0 && bytes.size() >= 64) {
      block(bytes.data());
      bytes = bytes.subspan(64);
      continue;
    }
    const std::size_t count = std::min(bytes.size(), 64 - filled);
    std::memcpy(buffer_ + filled, bytes.data(), count);
    filled += count;
    bytes = bytes.subspan(count);
    if (filled == 64) {
      block(buffer_);
      filled = 0;
    }
  }
}

std::string Sha256::hex() {
  const std::uint64_t bits = length_ * 8;
  const std::byte marker{0x80};
  update({&marker, 1});
  const std::byte zero{0};
  while (length_ % 64 != 56) {
    update({&zero, 1});
  }
  std::byte tail[8];
  for (int i = 0; i < 8; ++i) {
    tail[i] = static_cast<std::byte>(bits >> (56 - 8 * i));
  }
  update(tail);
  std::string text;
  for (const std::uint32_t word : state_) {
    text += fmt::format("{:08x}", word);
  }
  return text;
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

}  // namespace hestia
