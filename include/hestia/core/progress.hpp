#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace hestia {

/// A progress bar on stderr with rate and time left on a terminal; a plain line every ten seconds and at the end
/// otherwise. Destruction finishes the bar. Not thread-safe; one bar at a time.
class Progress {
 public:
  /// `total` units of `unit` (for example "tok"); total 0 means unknown. Prints nothing when `quiet`.
  Progress(std::string label, std::int64_t total, std::string unit, bool quiet = false);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  Progress(Progress&&) = delete;
  Progress& operator=(Progress&&) = delete;
  ~Progress();

  /// Adds `units` done; redraws at most ten times a second. `note` is shown after the rate when not empty.
  void advance(std::int64_t units, const std::string& note = "");
  /// Prints `line` above the bar (a step line must not tear the bar).
  void print_line(const std::string& line);
  /// Ends the bar with its final count and total time.
  void finish();

 private:
  void draw(bool final_line);
  std::string label_;
  std::int64_t total_;
  std::string unit_;
  bool quiet_;
  bool terminal_;
  bool finished_ = false;
  std::int64_t done_ = 0;
  std::string note_;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point last_draw_;
};

/// `1234`, `12.3k`, `34.70M`: a short form of a count or rate; exact below ten thousand.
[[nodiscard]] std::string format_count(double value);
/// `12.3 MiB`: a short form of a byte count.
[[nodiscard]] std::string format_bytes(double bytes);
/// `1m 23s`, `4.2 s`: a short form of a duration in seconds; `unknown` when it is not finite.
[[nodiscard]] std::string format_seconds(double seconds);

}  // namespace hestia
