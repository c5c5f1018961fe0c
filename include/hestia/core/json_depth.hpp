#pragma once

#include <string_view>

namespace hestia {

/// Whether brackets of the JSON `text` open more than `kDeepestJson` deep: parsed, such a value could not be printed or
/// walked without running out of stack. One pass; text that is no JSON gives either answer.
[[nodiscard]] bool too_deep_json(std::string_view text);
inline constexpr int kDeepestJson = 500;

}  // namespace hestia
