#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <stdexcept>
#include <thread>

#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/atomic_folder.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/random.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

std::size_t entries(const std::filesystem::path& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

std::string random_text(SplitMix64& random, std::size_t size) {
  std::string text(size, '\0');
  std::generate(text.begin(), text.end(), [&] { return static_cast<char>(random.below(256)); });
  return text;
}

TEST_CASE("SHA-256 gives the digests of FIPS 180-4's examples") {
  CHECK(sha256_hex({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256_hex(as_bytes("abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_hex(as_bytes("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(sha256_hex(as_bytes(std::string(1'000'000, 'a'))) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("SHA-256 does not depend on how the bytes arrive") {
  SplitMix64 random(1);
  // Sizes around the block and around where the length no longer fits the last block.
  for (const std::size_t size : {1U, 55U, 56U, 57U, 63U, 64U, 65U, 119U, 120U, 128U, 1000U}) {
    const std::string text = random_text(random, size);
    Sha256 hash;
    for (std::size_t begin = 0; begin < size;) {
      const std::size_t count = std::min<std::size_t>(size - begin, random.below(70));
      hash.update(as_bytes(std::string_view(text).substr(begin, count)));
      begin += count;
    }
    CHECK(hash.hex() == sha256_hex(as_bytes(text)));
  }
}

TEST_CASE("A mapped file shows the file's bytes and moves") {
  const TemporaryFolder folder;
  SplitMix64 random(2);
  const std::string text = random_text(random, 10'000);
  put_file(folder.path() / "a", text);
  put_file(folder.path() / "empty", "");
  MappedFile file(folder.path() / "a");
  const MappedFile moved(std::move(file));
  REQUIRE(moved.bytes().size() == text.size());
  CHECK(std::equal(moved.bytes().begin(), moved.bytes().end(), as_bytes(text).begin()));
  CHECK(moved.path() == folder.path() / "a");
  MappedFile target(folder.path() / "empty");
  CHECK(target.bytes().empty());
  target = MappedFile(folder.path() / "a");
  CHECK(target.bytes().size() == text.size());
}

TEST_CASE("A mapped file is read around its mapping, or says where that failed") {
  const TemporaryFolder folder;
  SplitMix64 random(3);
  const std::string text = random_text(random, 10'000);
  const std::filesystem::path path = folder.path() / "a";
  put_file(path, text);
  MappedFile target(folder.path() / "a");
  const MappedFile file = std::move(target);
  for (int round = 0; round < 50; ++round) {
    const std::size_t begin = random.below(10'001);
    std::string read(random.below(10'001 - begin), '\0');
    file.read(begin, std::as_writable_bytes(std::span(read)));
    CHECK(read == text.substr(begin, read.size()));
  }
  {
    const MappedFile again = file.reopened();
    std::string read(300, '\0');
    again.read(9000, std::as_writable_bytes(std::span(read)));
    CHECK(read == text.substr(9000, 300));
    put_file(folder.path() / "b", text);
    const MappedFile other(folder.path() / "b");
    std::filesystem::rename(path, folder.path() / "b");
    CHECK(error_text<InputError>([&] { static_cast<void>(other.reopened()); }) ==
          other.path().string() + ": another file took its place while it was read; start again once it is written");
    std::filesystem::rename(folder.path() / "b", path);
  }
  // Through the mapping this would be a bus error.
  std::filesystem::resize_file(path, 0);
  std::string read(7, '\0');
  CHECK(error_text<InputError>([&] { file.read(5, std::as_writable_bytes(std::span(read))); }) ==
        path.string() +
            ": 7 bytes at 5 cannot be read, the file ends there; check the disk, and that nothing wrote to "
            "the file meanwhile");
}

TEST_CASE("Files that cannot be read are named with the reason") {
  const TemporaryFolder folder;
  const std::filesystem::path missing = folder.path() / "missing";
  CHECK(error_text<InputError>([&] { MappedFile{missing}; }) ==
        missing.string() + ": cannot be opened, No such file or directory; check the path");
  CHECK(error_text<InputError>([&] { (void)read_text_file(missing); }) ==
        missing.string() + ": cannot be read, No such file or directory; check the path");
  CHECK(error_text<InputError>([&] { MappedFile{folder.path()}; }) ==
        folder.path().string() + ": not a regular file; give the path of a file");
  CHECK(error_text<InputError>([&] { (void)read_text_file(folder.path()); }) ==
        folder.path().string() + ": cannot be read, Is a directory; check the path");
}

TEST_CASE("read_text_file reads whole files, also of unknown size") {
  const TemporaryFolder folder;
  SplitMix64 random(3);
  for (const std::size_t size : {0U, 1U, 65'535U, 65'536U, 65'537U, 300'000U}) {
    const std::string text = random_text(random, size);
    put_file(folder.path() / "a", text);
    CHECK(read_text_file(folder.path() / "a") == text);
  }
  CHECK(contains(read_text_file("/proc/self/status"), "VmRSS"));  // st_size is 0 there
}

TEST_CASE("write_text_atomically replaces the file and leaves nothing else") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  SplitMix64 random(4);
  for (const std::size_t size : {100U, 0U, 70'000U}) {
    const std::string text = random_text(random, size);
    write_text_atomically(path, text);
    CHECK(read_text_file(path) == text);
    CHECK(entries(folder.path()) == 1);
  }
}

TEST_CASE("A link is written through, what is no regular file is refused and stays") {
  const TemporaryFolder folder;
  const std::filesystem::path target = folder.path() / "target.txt";
  const std::filesystem::path link = folder.path() / "link.txt";
  write_text_atomically(target, "old");
  std::filesystem::create_symlink("target.txt", link);
  write_text_atomically(link, "new");
  CHECK(std::filesystem::is_symlink(link));
  CHECK(read_text_file(target) == "new");
  std::filesystem::remove(target);
  write_text_atomically(link, "again");  // a link to what is not there yet
  CHECK(std::filesystem::is_symlink(link));
  CHECK(read_text_file(target) == "again");
  const std::filesystem::path pipe = folder.path() / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(
      contains(error_text<UsageError>([&] { write_text_atomically(pipe, "x"); }), "pipe: is there and not a regular"));
  CHECK(std::filesystem::is_fifo(pipe));
  CHECK(entries(folder.path()) == 3);
}

TEST_CASE("A relative path without a folder is written in the current one") {
  const TemporaryFolder folder;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  write_text_atomically("plain.txt", "here");
  std::filesystem::current_path(before);
  CHECK(read_text_file(folder.path() / "plain.txt") == "here");
}

TEST_CASE("A writer that throws leaves the old file and no temporary one") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  write_text_atomically(path, "old");
  std::filesystem::path temporary;
  CHECK_THROWS_AS(write_file_atomically(path,
                                        [&](const std::filesystem::path& name) {
                                          temporary = name;
                                          put_file(name, "half of the new");
                                          CHECK(entries(folder.path()) == 2);
                                          throw std::logic_error("stop");
                                        }),
                  std::logic_error);
  CHECK(temporary.parent_path() == folder.path());
  CHECK(read_text_file(path) == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("A disk that refuses is a RunError that names the file the user knows") {
  const TemporaryFolder folder;
  const std::filesystem::path lost = folder.path() / "no" / "such" / "a.txt";
  CHECK(error_text<RunError>([&] { write_text_atomically(lost, "x"); }) ==
        lost.string() + ": cannot be written, No such file or directory; check folder, space and permissions");
  CHECK(error_text<RunError>([&] { write_file_atomically(folder.path() / "b", [](const auto&) {}); }) ==
        (folder.path() / "b").string() +
            ": cannot be written, No such file or directory; check folder, space and permissions");
  std::filesystem::create_directory(folder.path() / "taken");
  put_file(folder.path() / "taken" / "x", "x");
  CHECK(contains(error_text<RunError>([&] { write_text_atomically(folder.path() / "taken", "x"); }),
                 "taken: cannot be written, "));
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("A full disk keeps the old file") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  write_text_atomically(path, "old");
  // A limit on file sizes makes the kernel refuse writes as a full disk does.
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto previous = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{4096, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string text = error_text<RunError>([&] { write_text_atomically(path, std::string(100'000, 'x')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  (void)std::signal(SIGXFSZ, previous);
  CHECK(text == path.string() + ": cannot be written, File too large; check folder, space and permissions");
  CHECK(read_text_file(path) == "old");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("Writers of one file at once never mix: the last one wins whole") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  std::vector<std::thread> threads;
  for (char letter = 'a'; letter < 'e'; ++letter) {
    threads.emplace_back([&path, letter] {
      for (int i = 0; i < 10; ++i) {
        write_text_atomically(path, std::string(20'000, letter));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const std::string text = read_text_file(path);
  CHECK(text == std::string(20'000, text.at(0)));
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a folder appears whole or not at all, and takes nobody's place") {
  const TemporaryFolder folder;
  const std::filesystem::path place = folder.path() / "new" / "model";
  {
    AtomicFolder first(place / "");  // "model/" is model
    AtomicFolder second(place);
    CHECK(first.path() == place);
    CHECK(first.temporary() != second.temporary());
    CHECK(first.temporary().parent_path() == place.parent_path());
    write_text_atomically(first.temporary() / "a.txt", "a");
    write_text_atomically(second.temporary() / "b.txt", "b");
    CHECK_FALSE(std::filesystem::exists(place));
    CHECK(entries(folder.path() / "new") == 2);
    first.commit();
    CHECK(read_text_file(place / "a.txt") == "a");
    CHECK_THROWS_WITH(second.commit(), Catch::Contains("new/model: cannot be written"));
  }
  CHECK(entries(folder.path() / "new") == 1);  // the second one's is gone
  CHECK_FALSE(std::filesystem::exists(place / "b.txt"));
  std::filesystem::create_directory(folder.path() / "empty");
  AtomicFolder over(folder.path() / "empty");
  over.commit();
  CHECK(std::filesystem::is_empty(folder.path() / "empty"));
  // Through a link, and under names that are written otherwise; a link to nothing is told before the work.
  std::filesystem::create_directory(folder.path() / "target");
  std::filesystem::create_directory_symlink(folder.path() / "target", folder.path() / "link");
  AtomicFolder linked(folder.path() / "link");
  write_text_atomically(linked.temporary() / "a.txt", "a");
  linked.commit();
  CHECK(std::filesystem::is_symlink(folder.path() / "link"));
  CHECK(read_text_file(folder.path() / "target" / "a.txt") == "a");
  AtomicFolder dotted(folder.path() / "dotted" / ".");
  CHECK(dotted.path() == folder.path() / "dotted");
  dotted.commit();
  CHECK(std::filesystem::is_directory(folder.path() / "dotted"));
  std::filesystem::create_directory_symlink(folder.path() / "nowhere", folder.path() / "dangling");
  CHECK_THROWS_WITH(AtomicFolder(folder.path() / "dangling"), Catch::Contains("dangling: cannot be written"));
  CHECK_THROWS_WITH(AtomicFolder(".."), Catch::Contains("..: cannot be written"));
  // What a killed process of the same number left is passed over.
  const std::filesystem::path first = AtomicFolder(folder.path() / "again").temporary();
  const std::string name = first.filename().string();
  const std::size_t dot = name.rfind('.', name.size() - 5);
  const int number = std::stoi(name.substr(dot + 1));
  std::filesystem::create_directory(folder.path() / (name.substr(0, dot + 1) + std::to_string(number + 1) + ".tmp"));
  CHECK(AtomicFolder(folder.path() / "again").temporary().filename() ==
        name.substr(0, dot + 1) + std::to_string(number + 2) + ".tmp");
  write_text_atomically(folder.path() / "file", "x");
  CHECK_THROWS_WITH(AtomicFolder(folder.path() / "file" / "model"), Catch::Contains("cannot be written"));
}

}  // namespace
}  // namespace hestia
