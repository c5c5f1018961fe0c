#include "pre_tokenizers.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "unicode.hpp"

namespace hestia {

namespace {

enum class Behaviour { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Span {
  std::size_t begin = 0;
  std::size_t end = 0;
  bool match = false;
};

void visit_span(const TextPiece& piece, std::size_t begin, std::size_t end, PieceVisitor visit) {
  if (begin < end) {
    visit({piece.text.substr(begin, end - begin), piece.first && begin == 0, piece.prepend});
  }
}

// A match joins the span before it unless that one was a match too.
std::vector<Span> joined_with_previous(const std::vector<Span>& spans) {
  std::vector<Span> joined;
  bool after_match = false;
  for (const Span& span : spans) {
    if (span.match && !after_match && !joined.empty()) {
      joined.back().end = span.end;
    } else {
      joined.push_back(span);
    }
    after_match = span.match;
  }
  return joined;
}

std::vector<Span> joined_with_next(const std::vector<Span>& spans) {
  std::vector<Span> joined;
  bool before_match = false;
  for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
    if (span->match && !before_match && !joined.empty()) {
      joined.back().begin = span->begin;
    } else {
      joined.push_back(*span);
    }
    before_match = span->match;
  }
  std::reverse(joined.begin(), joined.end());
  return joined;
}

// `for_each_match(f)` calls f(begin, end) for the delimiters in order; `invert` takes what lies between them instead.
template <typename ForEachMatch>
void split_at(const TextPiece& piece, Behaviour behaviour, bool invert, const ForEachMatch& for_each_match,
              PieceVisitor visit) {
  const std::size_t size = piece.text.size();
  std::size_t done = 0;
  if (behaviour == Behaviour::kIsolated) {
    for_each_match([&](std::size_t begin, std::size_t end) {
      visit_span(piece, done, begin, visit);
      visit_span(piece, begin, end, visit);
      done = end;
    });
    visit_span(piece, done, size, visit);
    return;
  }
  std::vector<Span> spans;
  for_each_match([&](std::size_t begin, std::size_t end) {
    if (done != begin) {
      spans.push_back({done, begin, invert});
    }
    spans.push_back({begin, end, !invert});
    done = end;
  });
  if (done != size) {
    spans.push_back({done, size, invert});
  }
  if (behaviour == Behaviour::kMergedWithPrevious) {
    spans = joined_with_previous(spans);
  } else if (behaviour == Behaviour::kMergedWithNext) {
    spans = joined_with_next(spans);
  } else if (behaviour == Behaviour::kRemoved) {
    spans.erase(std::remove_if(spans.begin(), spans.end(), [](const Span& span) { return span.match; }), spans.end());
  } else {
    std::vector<Span> joined;
    for (const Span& span : spans) {
      if (!joined.empty() && joined.back().match == span.match) {
        joined.back().end = span.end;
      } else {
        joined.push_back(span);
      }
    }
    spans = std::move(joined);
  }
  for (const Span& span : spans) {
    visit_span(piece, span.begin, span.end, visit);
  }
}

// Every code point that `is_delimiter` accepts is a match.
template <typename Predicate>
void split_at_characters(const TextPiece& piece, Behaviour behaviour, const Predicate& is_delimiter,
                         PieceVisitor visit) {
  split_at(
      piece, behaviour, false,
      [&](const auto& match) {
        for (std::size_t at = 0; at < piece.text.size();) {
          const CodePoint current = code_point_at(piece.text, at);
          if (is_delimiter(current.value)) {
            match(at, at + current.size);
          }
          at += current.size;
        }
      },
      visit);
}

Behaviour behaviour_of(const JsonNode& node) {
  static const std::vector<std::pair<std::string_view, Behaviour>> names = {
      {"Removed", Behaviour::kRemoved},
      {"Isolated", Behaviour::kIsolated},
      {"MergedWithPrevious", Behaviour::kMergedWithPrevious},
      {"MergedWithNext", Behaviour::kMergedWithNext},
      {"Contiguous", Behaviour::kContiguous}};
  const std::string name = node.text("behavior");
  const auto found = std::find_if(names.begin(), names.end(), [&](const auto& entry) { return entry.first == name; });
  if (found == names.end()) {
    node.fail(
        fmt::format("behavior must be Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous, got "
                    "\"{}\"; fetch the file again",
                    name));
  }
  return found->second;
}

class Split final : public PreTokenizer {
 public:
  Split(TextPattern pattern, Behaviour behaviour, bool invert)
      : pattern_(std::move(pattern)), behaviour_(behaviour), invert_(invert) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    split_at(
        piece, behaviour_, invert_, [&](const auto& match) { pattern_.for_each_match(piece.text, match); }, visit);
  }

 private:
  TextPattern pattern_;
  Behaviour behaviour_;
  bool invert_;
};

// Radford et al. 2019: what GPT-2 splits text into.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

class ByteLevel final : public PreTokenizer {
 public:
  ByteLevel(bool add_prefix_space, bool use_regex, const std::string& where)
      : add_prefix_space_(add_prefix_space), use_regex_(use_regex), pattern_(kGpt2Pattern, where) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    TextPiece whole = piece;
    std::string spaced;
    if (add_prefix_space_ && piece.text.front() != ' ' && (piece.prepend || !piece.first)) {
      spaced = fmt::format(" {}", piece.text);
      whole.text = spaced;
    }
    if (!use_regex_) {
      visit(whole);
      return;
    }
    split_at(
        whole, Behaviour::kIsolated, false, [&](const auto& match) { pattern_.for_each_match(whole.text, match); },
        visit);
  }
  [[nodiscard]] bool byte_level() const override { return true; }

 private:
  bool add_prefix_space_;
  bool use_regex_;
  TextPattern pattern_;
};

class Digits final : public PreTokenizer {
 public:
  explicit Digits(bool individual) : behaviour_(individual ? Behaviour::kIsolated : Behaviour::kContiguous) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    split_at_characters(piece, behaviour_, is_number, visit);
  }

 private:
  Behaviour behaviour_;
};

class Punctuation final : public PreTokenizer {
 public:
  explicit Punctuation(Behaviour behaviour) : behaviour_(behaviour) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    split_at_characters(piece, behaviour_, is_punctuation, visit);
  }

 private:
  Behaviour behaviour_;
};

class WhitespaceSplit final : public PreTokenizer {
 public:
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    split_at_characters(piece, Behaviour::kRemoved, is_white_space, visit);
  }
};

class Metaspace final : public PreTokenizer {
 public:
  enum class Prepend { kNever, kFirst, kAlways };
  Metaspace(std::string sign, Prepend prepend, bool splits)
      : sign_(std::move(sign)), prepend_(prepend), splits_(splits) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override {
    std::string marked;
    marked.reserve(piece.text.size() + piece.text.size() / 2);
    for (const char c : piece.text) {
      if (c == ' ') {
        marked += sign_;
      } else {
        marked += c;
      }
    }
    const bool wanted = prepend_ == Prepend::kAlways || (prepend_ == Prepend::kFirst && piece.first);
    if (wanted && (piece.prepend || !piece.first) && !marked.starts_with(sign_)) {
      marked.insert(0, sign_);
    }
    const TextPiece whole{marked, piece.first, piece.prepend};
    if (!splits_) {
      visit(whole);
      return;
    }
    split_at(
        whole, Behaviour::kMergedWithNext, false,
        [&](const auto& match) {
          for (std::size_t at = marked.find(sign_); at != std::string::npos;
               at = marked.find(sign_, at + sign_.size())) {
            match(at, at + sign_.size());
          }
        },
        visit);
  }

 private:
  std::string sign_;
  Prepend prepend_;
  bool splits_;
};

class PreTokenizerSequence final : public PreTokenizer {
 public:
  explicit PreTokenizerSequence(std::vector<std::unique_ptr<PreTokenizer>> steps) : steps_(std::move(steps)) {}
  void split(const TextPiece& piece, PieceVisitor visit) const override { run(0, piece, visit); }
  [[nodiscard]] bool byte_level() const override { return !steps_.empty() && steps_.back()->byte_level(); }

 private:
  void run(std::size_t step, const TextPiece& piece, PieceVisitor visit) const {
    if (step == steps_.size()) {
      visit(piece);
      return;
    }
    steps_[step]->split(piece, [&](const TextPiece& part) { run(step + 1, part, visit); });
  }
  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

std::unique_ptr<PreTokenizer> make_metaspace(const JsonNode& node) {
  const std::string sign = node.text("replacement");
  const std::string scheme = node.has("prepend_scheme")            ? node.text("prepend_scheme")
                             : node.flag("add_prefix_space", true) ? "always"
                                                                   : "never";
  if (scheme != "always" && scheme != "never" && scheme != "first") {
    node.fail(fmt::format("prepend_scheme must be always, never or first, got \"{}\"; fetch the file again", scheme));
  }
  if (sign.empty()) {
    node.fail("replacement must be one character, got none; fetch the file again");
  }
  const Metaspace::Prepend prepend = scheme == "always"  ? Metaspace::Prepend::kAlways
                                     : scheme == "first" ? Metaspace::Prepend::kFirst
                                                         : Metaspace::Prepend::kNever;
  return std::make_unique<Metaspace>(sign, prepend, node.flag("split", true));
}

std::unique_ptr<PreTokenizer> make_sequence(const JsonNode& node) {
  std::vector<std::unique_ptr<PreTokenizer>> steps;
  for (const JsonNode& step : node.list("pretokenizers")) {
    if (!steps.empty() && steps.back()->byte_level()) {
      step.fail("a step after ByteLevel, which Hestia reads only as the last one");
    }
    steps.push_back(make_pre_tokenizer(step));
  }
  return std::make_unique<PreTokenizerSequence>(std::move(steps));
}

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const JsonNode& node) {
  const std::string type = node.text("type");
  if (type == "ByteLevel") {
    return std::make_unique<ByteLevel>(node.flag("add_prefix_space"), node.flag("use_regex", true), node.where());
  }
  if (type == "Split") {
    return std::make_unique<Split>(TextPattern::from_json(node.at("pattern")), behaviour_of(node),
                                   node.flag("invert", false));
  }
  if (type == "Digits") {
    return std::make_unique<Digits>(node.flag("individual_digits"));
  }
  if (type == "Metaspace") {
    return make_metaspace(node);
  }
  if (type == "Whitespace") {
    return std::make_unique<Split>(TextPattern(R"(\w+|[^\w\s]+)", node.where(), Dialect::kRust), Behaviour::kRemoved,
                                   true);
  }
  if (type == "WhitespaceSplit") {
    return std::make_unique<WhitespaceSplit>();
  }
  if (type == "Punctuation") {
    return std::make_unique<Punctuation>(node.has("behavior") ? behaviour_of(node) : Behaviour::kIsolated);
  }
  if (type == "Sequence") {
    return make_sequence(node);
  }
  node.fail(
      fmt::format("a pre-tokenizer of type \"{}\", which Hestia does not read; it reads ByteLevel, Split, Digits, "
                  "Metaspace, Whitespace, WhitespaceSplit, Punctuation and Sequence",
                  type));
}

}  // namespace hestia
