#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace hestia {

/// Process exit codes of the `hestia` program.
enum class ExitCode : int {
  kDone = 0,          ///< Finished.
  kFailed = 1,        ///< The run failed (non-finite loss, out of memory, a device error).
  kUsage = 2,         ///< Wrong command line or recipe.
  kInput = 3,         ///< An input file is missing or damaged.
  kInterrupted = 130  ///< Stopped by SIGINT; state saved, resumable.
};

/// Base of every error Hestia reports to its user.
/// Message form: `<subject>: <what is wrong>, got <value>; <what to do>`.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  /// The exit code the program ends with when this error reaches `main`.
  [[nodiscard]] ExitCode exit_code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// The run itself failed: exit code 1.
class RunError : public Error {
 public:
  explicit RunError(const std::string& message) : Error(ExitCode::kFailed, message) {}
};

/// The command line or a recipe is wrong: exit code 2.
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& message) : Error(ExitCode::kUsage, message) {}
};

/// An input file is missing, damaged or of the wrong kind: exit code 3.
class InputError : public Error {
 public:
  explicit InputError(const std::string& message) : Error(ExitCode::kInput, message) {}
};

/// The user pressed Ctrl-C and the state has been saved: exit code 130.
class InterruptedError : public Error {
 public:
  explicit InterruptedError(const std::string& message) : Error(ExitCode::kInterrupted, message) {}
};

/// Several problems found in one pass; collected so that the user sees all of them at once.
class Problems {
 public:
  /// Appends one complete message.
  void add(std::string message) { messages_.push_back(std::move(message)); }
  [[nodiscard]] bool empty() const noexcept { return messages_.empty(); }
  [[nodiscard]] const std::vector<std::string>& messages() const noexcept { return messages_; }
  /// All messages, one per line.
  [[nodiscard]] std::string joined() const;
  /// Throws UsageError with every message when there is any.
  void throw_usage_if_any() const;
  /// Throws InputError with every message when there is any.
  void throw_input_if_any() const;

 private:
  std::vector<std::string> messages_;
};

/// The candidate with the smallest edit distance to `word`, or "" when none is close (more than
/// max(2, length/3) edits away). Used for `did you mean` hints.
[[nodiscard]] std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace hestia
