#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hestia {

/// Severity of a log line. Everything goes to stderr; stdout carries results only.
enum class LogLevel { kDebug, kInfo, kWarn, kError };

/// Lines below `level` are dropped (default kInfo; `HESTIA_LOG=debug|info|warn|error` in the environment).
void set_log_level(LogLevel level);
/// Throws UsageError when `HESTIA_LOG` is set to something else (which is read as info until then). For `main`: a
/// logger that throws at its first line would lose that line.
void check_log_environment();
/// Writes one line to stderr, thread-safe. Warnings are prefixed `warning: `, errors `error: `; colour only on a
/// terminal and never when NO_COLOR is set.
void log(LogLevel level, std::string_view message);
inline void log_info(std::string_view message) {
  log(LogLevel::kInfo, message);
}
inline void log_debug(std::string_view message) {
  log(LogLevel::kDebug, message);
}
inline void log_error(std::string_view message) {
  log(LogLevel::kError, message);
}

/// Logs a warning and remembers it: a degraded mode must also stand in the results.
/// Every text passed here is returned by `degradations()` once, in first-seen order.
void log_warning(std::string_view message);
/// All distinct warnings since the process started (or since `clear_degradations`).
[[nodiscard]] std::vector<std::string> degradations();
void clear_degradations();

/// True when stderr is a terminal.
[[nodiscard]] bool stderr_is_terminal();

/// Prints an aligned start-up block to stderr: a title line, then `  key   value` rows.
void log_block(std::string_view title, const std::vector<std::pair<std::string, std::string>>& rows);

}  // namespace hestia
