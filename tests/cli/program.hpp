#pragma once

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

namespace hestia::testing {

/// What a finished process left behind.
struct Outcome {
  int code = -1;    ///< Exit code; 128 + the signal that ended it.
  std::string out;  ///< stdout
  std::string err;  ///< stderr
};

/// How a process is started.
struct Surroundings {
  std::filesystem::path folder = HESTIA_SOURCE_DIR;  ///< Working directory.
  std::map<std::string, std::string> environment;    ///< On top of the test's own.
  std::string stdout_path;                           ///< Where stdout goes instead of into the Outcome.
};

/// One `hestia` process, its two streams read apart. The destructor ends it.
class Program {
 public:
  explicit Program(const std::vector<std::string>& arguments, const Surroundings& surroundings = {}) {
    int out[2];
    int err[2];
    if (::pipe2(out, O_CLOEXEC) != 0 || ::pipe2(err, O_CLOEXEC) != 0) {
      throw std::runtime_error("cannot make a pipe");
    }
    // Everything that allocates happens before the fork.
    std::vector<std::string> words = {HESTIA_PROGRAM};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& word : words) {
      argv.push_back(word.data());
    }
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ < 0) {
      throw std::runtime_error("cannot fork");
    }
    if (pid_ == 0) {
      const int in = ::open("/dev/null", O_RDONLY);
      const int elsewhere =
          surroundings.stdout_path.empty() ? out[1] : ::open(surroundings.stdout_path.c_str(), O_WRONLY);
      ::dup2(in, STDIN_FILENO);
      ::dup2(elsewhere, STDOUT_FILENO);
      ::dup2(err[1], STDERR_FILENO);
      ::unsetenv("HESTIA_LOG");
      ::setenv("CUDA_VISIBLE_DEVICES", "", 1);  // the same figures on every machine
      ::setenv("OMP_NUM_THREADS", "1", 1);      // ctest runs several of these side by side
      for (const auto& [name, value] : surroundings.environment) {
        ::setenv(name.c_str(), value.c_str(), 1);
      }
      if (::chdir(surroundings.folder.c_str()) == 0) {
        ::execv(argv[0], argv.data());
      }
      ::_exit(127);
    }
    ::close(out[1]);
    ::close(err[1]);
    streams_[0] = {out[0], {}};
    streams_[1] = {err[0], {}};
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    for (Stream& stream : streams_) {
      if (stream.descriptor >= 0) {
        ::close(stream.descriptor);
      }
    }
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }

  /// Reads until stderr holds `text`; false when the process ended, or two minutes passed, without it.
  bool wait_for_stderr(const std::string& text) { return wait_for(streams_[1], text); }
  /// The same of stdout.
  bool wait_for_stdout(const std::string& text) { return wait_for(streams_[0], text); }

  void signal(int number) const { ::kill(pid_, number); }

  /// Waits for the end.
  Outcome finish() {
    while (read_some()) {
    }
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    Outcome outcome;
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    outcome.out = std::move(streams_[0].text);
    outcome.err = std::move(streams_[1].text);
    return outcome;
  }

 private:
  struct Stream {
    int descriptor = -1;
    std::string text;
  };

  bool wait_for(const Stream& stream, const std::string& text) {
    while (stream.text.find(text) == std::string::npos) {
      if (!read_some()) {
        return false;
      }
    }
    return true;
  }

  // False when both streams are at their end. A process that says nothing for two minutes is ended.
  bool read_some() {
    pollfd polled[2] = {{streams_[0].descriptor, POLLIN, 0}, {streams_[1].descriptor, POLLIN, 0}};
    if (polled[0].fd < 0 && polled[1].fd < 0) {
      return false;
    }
    if (::poll(polled, 2, 120'000) == 0) {
      ::kill(pid_, SIGKILL);
      streams_[1].text += "\n(the test ended this process: it said nothing for two minutes)\n";
    }
    for (int i = 0; i < 2; ++i) {
      if (polled[i].fd < 0 || polled[i].revents == 0) {
        continue;
      }
      char buffer[65536];
      const ssize_t count = ::read(polled[i].fd, buffer, sizeof buffer);
      if (count > 0) {
        streams_[i].text.append(buffer, static_cast<std::size_t>(count));
      } else if (count == 0 || errno != EINTR) {
        ::close(polled[i].fd);
        streams_[i].descriptor = -1;
      }
    }
    return true;
  }

  pid_t pid_ = -1;
  Stream streams_[2];
};

/// Runs `hestia` to its end.
inline Outcome hestia(const std::vector<std::string>& arguments, const Surroundings& surroundings = {}) {
  return Program(arguments, surroundings).finish();
}

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(line);
  }
  return lines;
}

}  // namespace hestia::testing
