#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>

#include "json_node.hpp"

namespace hestia {

/// A callable seen through a pointer; it must outlive the call it is passed to.
template <typename Signature>
class FunctionRef;
template <typename Result, typename... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <typename Callable>
  requires(!std::is_same_v<std::remove_cvref_t<Callable>, FunctionRef>)
      FunctionRef(Callable&& callable)  // NOLINT(google-explicit-constructor,bugprone-forwarding-reference-overload)
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),  // NOLINT(*-const-cast)
        call_([](void* object, Arguments... arguments) -> Result {
          return (*static_cast<std::remove_reference_t<Callable>*>(object))(arguments...);
        }) {}
  Result operator()(Arguments... arguments) const { return call_(object_, arguments...); }

 private:
  void* object_;
  Result (*call_)(void*, Arguments...);
};

/// Whose rules an expression was written for: they differ in what \w is.
enum class Dialect { kOniguruma, kRust };

/// A regular expression of a `tokenizer.json`, compiled by PCRE2 with its JIT. The file writes it for Oniguruma; the
/// constructs on which the two disagree are rewritten or refused, and text with code points that PCRE2 does not know
/// yet is matched by a second form that lists them. Thread-safe.
class TextPattern {
 public:
  /// Throws InputError, beginning with `where`, when the expression does not compile or holds what is refused.
  TextPattern(std::string_view expression, const std::string& where, Dialect dialect = Dialect::kOniguruma);
  /// A pattern that matches exactly `text`.
  [[nodiscard]] static TextPattern literal(std::string_view text);
  /// {"String": TEXT} or {"Regex": EXPRESSION}.
  [[nodiscard]] static TextPattern from_json(const JsonNode& node);

  /// Calls `visit(begin, end)` for the matches in `text` (valid UTF-8) from left to right; none overlap, and an empty
  /// one right after another is none. Throws RunError when PCRE2 gives up.
  void for_each_match(std::string_view text, FunctionRef<void(std::size_t, std::size_t)> visit) const;

 private:
  TextPattern() = default;
  struct Code;
  std::shared_ptr<const Code> code_;
  std::shared_ptr<const Code> code_for_new_;  // For text with new code points.
  std::string literal_;
};

}  // namespace hestia
