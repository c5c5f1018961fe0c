#pragma once

#include <fcntl.h>
#include <pty.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace hestia {

/// Sends stderr to a pipe, or to a terminal of `columns`, until `text()` or the end of the scope. What is written has
/// to fit the kernel's buffer (4 KiB for the terminal).
class StderrCapture {
 public:
  explicit StderrCapture(int columns = 0) {
    int ends[2] = {-1, -1};
    winsize size{};
    size.ws_col = static_cast<unsigned short>(columns);
    size.ws_row = 24;
    if (columns > 0 ? ::openpty(&ends[0], &ends[1], nullptr, nullptr, &size) != 0 : ::pipe(ends) != 0) {
      throw std::runtime_error("cannot make a pipe or terminal");
    }
    read_end_ = ends[0];
    std::fflush(stderr);
    saved_ = ::dup(STDERR_FILENO);
    ::dup2(ends[1], STDERR_FILENO);
    ::close(ends[1]);
  }
  StderrCapture(const StderrCapture&) = delete;
  StderrCapture& operator=(const StderrCapture&) = delete;
  ~StderrCapture() {
    restore();
    ::close(read_end_);
  }

  /// Everything written so far; stderr is the old one again.
  std::string text() {
    // Asked for before the other end closes: a terminal whose last writer is gone may drop what was not read.
    ::fcntl(read_end_, F_SETFL, O_NONBLOCK);
    std::fflush(stderr);
    std::string out;
    char buffer[4096];
    for (ssize_t count = 0; (count = ::read(read_end_, buffer, sizeof buffer)) > 0;) {
      out.append(buffer, static_cast<std::size_t>(count));
    }
    restore();
    return out;
  }

 private:
  void restore() {
    if (saved_ >= 0) {
      std::fflush(stderr);
      ::dup2(saved_, STDERR_FILENO);
      ::close(saved_);
      saved_ = -1;
    }
  }
  int read_end_ = -1;
  int saved_ = -1;
};

}  // namespace hestia
