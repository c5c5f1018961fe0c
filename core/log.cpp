#include "hestia/core/log.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "bar.hpp"
#include "hestia/core/error.hpp"

namespace hestia {

namespace {

const std::vector<std::string>& level_names() {
  static const std::vector<std::string> names = {"debug", "info", "warn", "error"};  // in the order of LogLevel
  return names;
}

std::string environment_level() {
  const char* text = std::getenv("HESTIA_LOG");
  return text == nullptr || *text == '\0' ? "info" : text;
}

LogLevel level_from_environment() {
  const auto found = std::find(level_names().begin(), level_names().end(), environment_level());
  return found == level_names().end() ? LogLevel::kInfo : static_cast<LogLevel>(found - level_names().begin());
}

struct LogState {
  std::mutex mutex;
  std::atomic<LogLevel> level{level_from_environment()};
  std::vector<std::string> warnings;
  bool bar_on_screen = false;
};

LogState& state() {
  static LogState instance;
  return instance;
}

bool use_colour() {
  const char* no_colour = std::getenv("NO_COLOR");
  return stderr_is_terminal() && (no_colour == nullptr || *no_colour == '\0');
}

}  // namespace

void set_log_level(LogLevel level) {
  state().level = level;
}

void check_log_environment() {
  const std::string name = environment_level();
  if (std::find(level_names().begin(), level_names().end(), name) == level_names().end()) {
    throw UsageError(fmt::format("HESTIA_LOG: must be one of {}, got \"{}\"; set one of them or unset it",
                                 fmt::join(level_names(), ", "), name));
  }
}

void set_bar_on_screen(bool on_screen) {
  const std::scoped_lock lock(state().mutex);
  state().bar_on_screen = on_screen;
}

bool stderr_is_terminal() {
  return ::isatty(STDERR_FILENO) == 1;
}

void log(LogLevel level, std::string_view message) {
  if (level < state().level.load()) {
    return;
  }
  std::string line;
  if (level == LogLevel::kWarn) {
    line = use_colour() ? "\033[33mwarning:\033[0m " : "warning: ";
  } else if (level == LogLevel::kError) {
    line = use_colour() ? "\033[31merror:\033[0m " : "error: ";
  }
  line += message;
  line += '\n';
  const std::scoped_lock lock(state().mutex);
  if (state().bar_on_screen) {
    line.insert(0, "\r\033[K");
    state().bar_on_screen = false;
  }
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fflush(stderr);
}

void log_warning(std::string_view message) {
  {
    const std::scoped_lock lock(state().mutex);
    std::vector<std::string>& warnings = state().warnings;
    if (std::find(warnings.begin(), warnings.end(), message) != warnings.end()) {
      return;
    }
    warnings.emplace_back(message);
  }
  log(LogLevel::kWarn, message);
}

std::vector<std::string> degradations() {
  const std::scoped_lock lock(state().mutex);
  return state().warnings;
}

void clear_degradations() {
  const std::scoped_lock lock(state().mutex);
  state().warnings.clear();
}

void log_block(std::string_view title, const std::vector<std::pair<std::string, std::string>>& rows) {
  std::size_t width = 0;
  for (const auto& [key, value] : rows) {
    width = std::max(width, key.size());
  }
  std::string text(title);
  for (const auto& [key, value] : rows) {
    text.append("\n  ").append(key).append(width - key.size() + 2, ' ').append(value);
  }
  log(LogLevel::kInfo, text);
}

}  // namespace hestia
