#include "hestia/core/progress.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "bar.hpp"
#include "hestia/core/log.hpp"

namespace hestia {

namespace {

constexpr auto kTerminalInterval = std::chrono::milliseconds(100);
constexpr auto kPlainInterval = std::chrono::seconds(10);
constexpr int kBarWidth = 24;

std::size_t terminal_width() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 20) {
    return size.ws_col;
  }
  return 80;
}

// The longest prefix that takes at most `columns` characters and cuts none in two.
std::size_t utf8_prefix(const std::string& text, std::size_t columns) {
  std::size_t size = 0;
  for (std::size_t count = 0; size < text.size(); ++size) {
    const bool starts_character = (static_cast<unsigned char>(text[size]) & 0xC0U) != 0x80U;
    if (starts_character && ++count > columns) {
      break;
    }
  }
  return size;
}

}  // namespace

Progress::Progress(std::string label, std::int64_t total, std::string unit, bool quiet)
    : label_(std::move(label)),
      total_(total),
      unit_(std::move(unit)),
      quiet_(quiet),
      terminal_(stderr_is_terminal()),
      start_(std::chrono::steady_clock::now()),
      last_draw_(start_) {}

Progress::~Progress() {
  try {
    finish();
  } catch (...) {  // NOLINT(bugprone-empty-catch): a bar that cannot be drawn must not end the program
  }
}

void Progress::advance(std::int64_t units, const std::string& note) {
  done_ += units;
  note_ = note;
  if (quiet_ || finished_) {
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (now - last_draw_ >= (terminal_ ? std::chrono::steady_clock::duration(kTerminalInterval)
                                     : std::chrono::steady_clock::duration(kPlainInterval))) {
    last_draw_ = now;
    draw(false);
  }
}

void Progress::print_line(const std::string& line) {
  if (quiet_) {
    return;
  }
  const bool bar = terminal_ && !finished_;
  std::fputs(((bar ? "\r\033[K" : "") + line + "\n").c_str(), stderr);
  if (bar) {
    last_draw_ = std::chrono::steady_clock::now();
    draw(false);
  }
}

void Progress::finish() {
  if (finished_) {
    return;
  }
  finished_ = true;
  if (!quiet_) {
    draw(true);
  }
}

void Progress::draw(bool final_line) {
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double rate = elapsed > 0.0 ? static_cast<double>(done_) / elapsed : 0.0;
  std::string text = label_ + " ";
  if (total_ > 0) {
    const double share = std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
    if (terminal_) {
      const int filled = static_cast<int>(std::lround(share * kBarWidth));
      text += "[" + std::string(static_cast<std::size_t>(filled), '#') +
              std::string(static_cast<std::size_t>(kBarWidth - filled), '.') + "] ";
    }
    text += fmt::format("{:3.0f}% {}/{} {}", 100.0 * share, format_count(static_cast<double>(done_)),
                        format_count(static_cast<double>(total_)), unit_);
  } else {
    text += fmt::format("{} {}", format_count(static_cast<double>(done_)), unit_);
  }
  text += fmt::format(", {} {}/s", format_count(rate), unit_);
  if (final_line) {
    text += ", " + format_seconds(elapsed);
  } else if (total_ > 0 && rate > 0.0) {
    text += ", " + format_seconds(static_cast<double>(std::max<std::int64_t>(0, total_ - done_)) / rate) + " left";
  }
  if (!note_.empty()) {
    text += ", " + note_;
  }
  if (terminal_) {
    text.resize(utf8_prefix(text, terminal_width() - 1));
    set_bar_on_screen(!final_line);
    std::fputs(("\r\033[K" + text + (final_line ? "\n" : "")).c_str(), stderr);
  } else {
    std::fputs((text + "\n").c_str(), stderr);
  }
  std::fflush(stderr);
}

std::string format_count(double value) {
  // The limits are where rounding to the digits shown would reach the next unit: never "1000.0k".
  const double size = std::abs(value);
  if (size >= 999.995e6) {
    return fmt::format("{:.2f}G", value / 1e9);
  }
  if (size >= 999.95e3) {
    return fmt::format("{:.2f}M", value / 1e6);
  }
  if (size >= 9999.95) {
    return fmt::format("{:.1f}k", value / 1e3);
  }
  return value == std::floor(value) ? fmt::format("{:.0f}", value) : fmt::format("{:.1f}", value);
}

std::string format_bytes(double bytes) {
  constexpr double kKibi = 1024.0;
  const double size = std::abs(bytes);
  if (size >= 1023.95 * kKibi * kKibi) {
    return fmt::format("{:.2f} GiB", bytes / (kKibi * kKibi * kKibi));
  }
  if (size >= 1023.95 * kKibi) {
    return fmt::format("{:.1f} MiB", bytes / (kKibi * kKibi));
  }
  if (size >= 1023.5) {
    return fmt::format("{:.1f} KiB", bytes / kKibi);
  }
  return fmt::format("{:.0f} B", bytes);
}

std::string format_seconds(double seconds) {
  if (!(std::abs(seconds) < 1e15)) {
    return "unknown";
  }
  if (seconds < 59.95) {
    return fmt::format("{:.1f} s", seconds);
  }
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 3600) {
    return fmt::format("{}m {:02d}s", whole / 60, whole % 60);
  }
  return fmt::format("{}h {:02d}m", whole / 3600, whole / 60 % 60);
}

}  // namespace hestia
