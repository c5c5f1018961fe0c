#pragma once

#include <string>

#include "hestia/core/json_lines.hpp"

namespace hestia {

/// Version of the program, for example "0.1.0".
[[nodiscard]] std::string program_version();
/// Git commit the program was configured from, 12 digits, or "unknown" outside a git checkout.
[[nodiscard]] std::string program_commit();
/// Compiler and its version.
[[nodiscard]] std::string program_compiler();
/// What this machine is: {"cpu", "cores", "memory_bytes"}, read from /proc; "unknown" where it does not say.
[[nodiscard]] Json machine_info();

}  // namespace hestia
