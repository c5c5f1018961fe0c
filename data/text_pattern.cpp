#define PCRE2_CODE_UNIT_WIDTH 8
#include "text_pattern.hpp"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>

#include <fmt/format.h>

#include "hestia/core/error.hpp"
#include "unicode.hpp"
#include "unicode_differences.hpp"

namespace hestia {

namespace {

// PCRE2's own \s has U+180E, and its \w lacks marks and connectors.
constexpr std::string_view kSpaces = R"(\t-\r\x{85}\p{Z})";
constexpr std::string_view kWordCharacters = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr std::array<std::string_view, 5> kWordCategories = {"L", "M", "Nd", "Nl", "Pc"};
constexpr std::string_view kOnigurumaWords = R"(\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";
constexpr std::string_view kRustWords = R"(\x{200C}\x{200D})";
constexpr std::size_t kJitStackBytes = std::size_t{16} << 20U;

// Without C and Cn, which shrink as Unicode grows.
constexpr std::array<std::string_view, 35> kCategories = {
    "Cc", "Cf", "Co", "Cs", "L",  "Ll", "Lm", "Lo", "Lt", "Lu", "M",  "Mc", "Me", "Mn", "N",  "Nd", "Nl", "No",
    "P",  "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "S",  "Sc", "Sk", "Sm", "So", "Z",  "Zl", "Zp", "Zs"};
struct Script {
  std::string_view name;
  std::string_view added;  // Since Unicode 14.
};
constexpr std::array<Script, 7> kScripts = {{{"Han", R"(\x{2B739}\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})"},
                                             {"Hangul", ""},
                                             {"Hiragana", R"(\x{1B132})"},
                                             {"Katakana", R"(\x{1B155})"},
                                             {"Greek", ""},
                                             {"Hebrew", ""},
                                             {"Thai", ""}}};

// New code points of a category, or of all whose name begins with its letter.
std::string new_members(std::string_view category) {
  std::string members;
  for (const CategoryRange& range : kNewCategories) {
    if (range.category.starts_with(category)) {
      members += fmt::format("\\x{{{:X}}}-\\x{{{:X}}}", range.begin, range.end);
    }
  }
  return members;
}

class Translator {
 public:
  // `list_new`: whether sets list the code points that PCRE2 does not know.
  Translator(std::string_view source, const std::string& where, Dialect dialect, bool list_new)
      : source_(source), where_(where), dialect_(dialect), list_new_(list_new) {}

  [[nodiscard]] std::string run() {
    while (at_ < source_.size()) {
      if (in_set_) {
        in_set();
      } else {
        outside_set();
      }
    }
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(std::string_view construct) const {
    throw InputError(
        fmt::format("{}: the regular expression \"{}\" uses {}, which Hestia does not read as Oniguruma does; "
                    "use a tokenizer whose expressions do without",
                    where_, source_, construct));
  }
  [[nodiscard]] char peek(std::size_t ahead) const {
    return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0';
  }
  void copy(std::size_t count) {
    result_ += source_.substr(at_, count);
    at_ += count;
  }

  void outside_set() {
    const char c = source_[at_];
    if (c == '\\') {
      escape();
    } else if (c == '[') {
      in_set_ = true;
      copy(1);
      if (peek(0) == '^') {
        copy(1);
      }
      if (peek(0) == ']') {
        refuse("a set that begins with ]");
      }
    } else if (c == '(' && peek(1) == '?') {
      group();
    } else if (c == '}' && peek(1) == '+') {
      refuse("an interval followed by +");
    } else {
      copy(1);
    }
  }

  // (?: (?= (?! (?<= (?<! (?> and the flag i.
  void group() {
    std::size_t size = 2;
    while (std::isalpha(static_cast<unsigned char>(peek(size))) != 0 || peek(size) == '-') {
      if (peek(size) != 'i' && peek(size) != '-') {
        refuse(fmt::format("the flag (?{}", peek(size)));
      }
      ++size;
    }
    const bool known = std::string_view(":=!>)").find(peek(size)) != std::string_view::npos ||
                       (peek(size) == '<' && (peek(size + 1) == '=' || peek(size + 1) == '!'));
    if (!known) {
      refuse(fmt::format("the group {}", source_.substr(at_, size + 1)));
    }
    copy(size);
  }

  void in_set() {
    const char c = source_[at_];
    if (c == '\\') {
      escape();
    } else if (c == '[') {
      refuse("a set inside a set");
    } else if (c == '&' && peek(1) == '&') {
      refuse("an intersection of sets");
    } else {
      in_set_ = c != ']';
      copy(1);
    }
  }

  void named_set(const std::string& members, bool negated, std::size_t size) {
    if (in_set_ && negated) {
      refuse(fmt::format("{} inside a set", source_.substr(at_, size)));
    }
    result_ += in_set_ ? members : fmt::format("[{}{}]", negated ? "^" : "", members);
    at_ += size;
  }

  [[nodiscard]] std::string word_characters() const {
    std::string members =
        fmt::format("{}{}", kWordCharacters, dialect_ == Dialect::kRust ? kRustWords : kOnigurumaWords);
    if (list_new_) {
      for (const std::string_view category : kWordCategories) {
        members += new_members(category);
      }
    }
    return members;
  }

  void escape() {
    const char c = peek(1);
    switch (c) {
      case 's':
      case 'S':
        named_set(std::string(kSpaces), c == 'S', 2);
        break;
      case 'w':
      case 'W':
        named_set(word_characters(), c == 'W', 2);
        break;
      case 'd':
      case 'D':
        named_set(list_new_ ? R"(\p{Nd})" + new_members("Nd") : R"(\p{Nd})", c == 'D', 2);
        break;
      case 'p':
      case 'P':
        property();
        break;
      case 'x':
        if (peek(2) != '{' && peek(2) >= '8') {
          refuse("\\x of a byte above 7F");
        }
        copy(2);
        break;
      case 'u':
        code_point();
        break;
      case 'v':
        result_ += "\\x0b";  // PCRE2's \v is any vertical space.
        at_ += 2;
        break;
      case 't':
      case 'n':
      case 'r':
      case 'f':
      case 'a':
      case 'e':
      case 'A':
      case 'z':
        copy(2);
        break;
      case '\0':
        refuse("a backslash at its end");
      default:
        if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
          refuse(fmt::format("\\{}", c));
        }
        if (static_cast<unsigned char>(c) >= 0x80) {
          ++at_;  // An escaped letter is itself.
        } else {
          copy(2);
        }
    }
  }

  void property() {
    const std::size_t close = source_.find('}', at_);
    if (peek(2) != '{' || close == std::string_view::npos) {
      refuse("a property without braces");
    }
    std::string_view name = source_.substr(at_ + 3, close - at_ - 3);
    bool negated = peek(1) == 'P';
    if (!name.empty() && name.front() == '^') {
      negated = !negated;
      name.remove_prefix(1);
    }
    std::string members;
    if (std::find(kCategories.begin(), kCategories.end(), name) != kCategories.end()) {
      members = fmt::format("\\p{{{}}}{}", name, list_new_ ? new_members(name) : "");
    } else {
      const auto script =
          std::find_if(kScripts.begin(), kScripts.end(), [&](const Script& known) { return known.name == name; });
      if (script == kScripts.end()) {
        refuse(fmt::format("the property \\p{{{}}}", name));
      }
      // Without sc: PCRE2 takes a script with all characters that texts in it use.
      members = fmt::format("\\p{{sc:{}}}{}", name, list_new_ ? script->added : "");
    }
    named_set(members, negated, close + 1 - at_);
  }

  void code_point() {
    const std::string_view digits = source_.substr(at_ + 2, 4);
    if (digits.size() < 4 || !std::all_of(digits.begin(), digits.end(), [](char digit) {
          return std::isxdigit(static_cast<unsigned char>(digit)) != 0;
        })) {
      refuse("\\u without four digits");
    }
    result_ += fmt::format("\\x{{{}}}", digits);
    at_ += 6;
  }

  std::string_view source_;
  const std::string& where_;
  Dialect dialect_;
  bool list_new_;
  std::string result_;
  std::size_t at_ = 0;
  bool in_set_ = false;
};

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  const int size = pcre2_get_error_message(code, text.data(), text.size());
  return size > 0 ? std::string(text.begin(), text.begin() + size) : fmt::format("PCRE2 error {}", code);
}

PCRE2_SPTR units(std::string_view text) {
  // PCRE2 10.42 refuses a null subject even of no bytes.
  return reinterpret_cast<PCRE2_SPTR>(text.data() == nullptr ? "" : text.data());  // NOLINT(*-reinterpret-cast)
}

// What a match needs beside the code, one per thread.
class MatchState {
 public:
  MatchState()
      : data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(std::size_t{32} << 10U, kJitStackBytes, nullptr)) {
    if (data == nullptr || context == nullptr) {
      release();
      throw std::bad_alloc();
    }
    pcre2_jit_stack_assign(context, nullptr, stack_);
    pcre2_set_match_limit(context, UINT32_MAX);
  }
  MatchState(const MatchState&) = delete;
  MatchState& operator=(const MatchState&) = delete;
  ~MatchState() { release(); }

  pcre2_match_data* data;        // NOLINT(misc-non-private-member-variables-in-classes)
  pcre2_match_context* context;  // NOLINT(misc-non-private-member-variables-in-classes)

 private:
  void release() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack_);
  }
  pcre2_jit_stack* stack_;
};

MatchState& match_state() {
  thread_local MatchState state;
  return state;
}

}  // namespace

struct TextPattern::Code {
  explicit Code(pcre2_code* compiled) : code(compiled) {}
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() { pcre2_code_free(code); }
  pcre2_code* code;
};

TextPattern::TextPattern(std::string_view expression, const std::string& where, Dialect dialect) {
  const auto compile = [&](bool list_new) {
    const std::string pattern = Translator(expression, where, dialect, list_new).run();
    int error = 0;
    PCRE2_SIZE at = 0;
    pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    // Oniguruma's ^ and $ always stand at line breaks too.
    pcre2_code* code =
        pcre2_compile(units(pattern), pattern.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &at, context);
    pcre2_compile_context_free(context);
    if (code == nullptr) {
      throw InputError(fmt::format("{}: the regular expression \"{}\" does not compile, {}; fetch the file again",
                                   where, expression, message_of(error)));
    }
    // Without a JIT (some architectures have none) the same matches come slower.
    static_cast<void>(pcre2_jit_compile(code, PCRE2_JIT_COMPLETE));
    return std::make_shared<const Code>(code);
  };
  code_ = compile(false);
  code_for_new_ = compile(true);
}

TextPattern TextPattern::literal(std::string_view text) {
  TextPattern pattern;
  pattern.literal_ = text;
  return pattern;
}

TextPattern TextPattern::from_json(const JsonNode& node) {
  return node.has("String") ? literal(node.text("String")) : TextPattern(node.text("Regex"), node.where());
}

void TextPattern::for_each_match(std::string_view text, FunctionRef<void(std::size_t, std::size_t)> visit) const {
  if (code_ == nullptr) {
    for (std::size_t at = literal_.empty() ? std::string_view::npos : text.find(literal_); at != std::string_view::npos;
         at = text.find(literal_, at + literal_.size())) {
      visit(at, at + literal_.size());
    }
    return;
  }
  const pcre2_code* code = (has_new_code_point(text) ? code_for_new_ : code_)->code;
  MatchState& state = match_state();
  const PCRE2_SPTR subject = units(text);
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(state.data);
  std::size_t from = 0;
  std::size_t last_end = std::string_view::npos;
  while (from <= text.size()) {
    int found = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, state.data, state.context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {  // The interpreter keeps its state on the heap.
      found =
          pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, state.data, state.context);
    }
    if (found == PCRE2_ERROR_NOMATCH) {
      return;
    }
    if (found < 0) {
      throw RunError(fmt::format("tokenizer: a regular expression fails on a text of {} bytes, {}; cut the text",
                                 text.size(), message_of(found)));
    }
    const std::size_t begin = ends[0];  // NOLINT(cppcoreguidelines-pro-bounds-pointer-arithmetic)
    const std::size_t end = ends[1];    // NOLINT(cppcoreguidelines-pro-bounds-pointer-arithmetic)
    if (begin == end) {
      from = end < text.size() ? end + code_point_at(text, end).size : end + 1;
      if (last_end == end) {
        continue;
      }
    } else {
      from = end;
    }
    last_end = end;
    visit(begin, end);
  }
}

}  // namespace hestia
