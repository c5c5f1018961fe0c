#include "token_decoders.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "text_pattern.hpp"
#include "unicode.hpp"

namespace hestia {

namespace {

constexpr std::uint32_t kAlphabetEnd = 0x144;
constexpr std::uint32_t kFirstStandIn = 0x100;

// Latin-1 without its controls, spaces and soft hyphen spells itself; the other 68 bytes are spelt U+0100 and on.
bool spells_itself(std::uint32_t byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

// Byte by code point; -1: no character of the alphabet.
const std::array<int, kAlphabetEnd>& byte_of_code_point() {
  static const auto table = [] {
    std::array<int, kAlphabetEnd> bytes{};
    bytes.fill(-1);
    std::uint32_t stand_in = kFirstStandIn;
    for (std::uint32_t byte = 0; byte < 0x100; ++byte) {
      bytes.at(spells_itself(byte) ? byte : stand_in++) = static_cast<int>(byte);
    }
    return bytes;
  }();
  return table;
}

std::string concatenated(const std::vector<std::string>& parts) {
  return std::accumulate(parts.begin(), parts.end(), std::string(),
                         [](std::string text, const std::string& part) { return std::move(text) + part; });
}

class ByteLevelDecoder final : public TokenDecoder {
 public:
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    std::string bytes;
    for (const std::string& token : tokens) {
      bytes += bytes_of_byte_level(token);
    }
    return {replace_broken_utf8(bytes)};
  }
  [[nodiscard]] bool byte_level() const override { return true; }
};

class ByteFallbackDecoder final : public TokenDecoder {
 public:
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    std::vector<std::string> parts;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) {
        return;
      }
      if (is_utf8(bytes)) {
        parts.push_back(bytes);
      } else {
        parts.insert(parts.end(), bytes.size(), "\uFFFD");
      }
      bytes.clear();
    };
    for (std::string& token : tokens) {
      const int value = value_of_byte_token(token);
      if (value >= 0) {
        bytes += static_cast<char>(static_cast<unsigned char>(value));
      } else {
        flush();
        parts.push_back(std::move(token));
      }
    }
    flush();
    return parts;
  }
};

class FuseDecoder final : public TokenDecoder {
 public:
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    return {concatenated(tokens)};
  }
};

class StripDecoder final : public TokenDecoder {
 public:
  StripDecoder(std::string character, std::int32_t start, std::int32_t stop)
      : character_(std::move(character)), start_(start), stop_(stop) {}
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    for (std::string& token : tokens) {
      std::string_view rest = token;
      for (std::int32_t i = 0; i < start_ && rest.starts_with(character_); ++i) {
        rest.remove_prefix(character_.size());
      }
      for (std::int32_t i = 0; i < stop_ && rest.ends_with(character_); ++i) {
        rest.remove_suffix(character_.size());
      }
      token = std::string(rest);
    }
    return tokens;
  }

 private:
  std::string character_;
  std::int32_t start_;
  std::int32_t stop_;
};

class ReplaceDecoder final : public TokenDecoder {
 public:
  ReplaceDecoder(TextPattern pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    for (std::string& token : tokens) {
      std::string result;
      std::size_t copied = 0;
      pattern_.for_each_match(token, [&](std::size_t begin, std::size_t end) {
        result.append(token, copied, begin - copied);
        result += content_;
        copied = end;
      });
      result.append(token, copied);
      token = std::move(result);
    }
    return tokens;
  }

 private:
  TextPattern pattern_;
  std::string content_;
};

class MetaspaceDecoder final : public TokenDecoder {
 public:
  MetaspaceDecoder(std::string sign, bool prepended) : sign_(std::move(sign)), prepended_(prepended) {}
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      std::string result;
      std::size_t copied = 0;
      for (std::size_t at = tokens[i].find(sign_); at != std::string::npos; at = tokens[i].find(sign_, copied)) {
        result.append(tokens[i], copied, at - copied);
        if (i > 0 || !prepended_) {
          result += ' ';
        }
        copied = at + sign_.size();
      }
      result.append(tokens[i], copied);
      tokens[i] = std::move(result);
    }
    return tokens;
  }

 private:
  std::string sign_;
  bool prepended_;
};

class DecoderSequence final : public TokenDecoder {
 public:
  explicit DecoderSequence(std::vector<std::unique_ptr<TokenDecoder>> steps) : steps_(std::move(steps)) {}
  [[nodiscard]] std::vector<std::string> apply(std::vector<std::string> tokens) const override {
    for (const auto& step : steps_) {
      tokens = step->apply(std::move(tokens));
    }
    return tokens;
  }
  [[nodiscard]] bool byte_level() const override {
    return std::any_of(steps_.begin(), steps_.end(), [](const auto& step) { return step->byte_level(); });
  }

 private:
  std::vector<std::unique_ptr<TokenDecoder>> steps_;
};

}  // namespace

bool is_byte_level(std::string_view token) {
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint current = code_point_at(token, at);
    if (current.value >= kAlphabetEnd || byte_of_code_point().at(current.value) < 0) {
      return false;
    }
    at += current.size;
  }
  return true;
}

std::string bytes_of_byte_level(std::string_view token) {
  std::string bytes;
  for (std::size_t at = 0; at < token.size();) {
    const CodePoint current = code_point_at(token, at);
    const int byte = current.value < kAlphabetEnd ? byte_of_code_point().at(current.value) : -1;
    if (byte < 0) {
      return std::string(token);
    }
    bytes += static_cast<char>(static_cast<unsigned char>(byte));
    at += current.size;
  }
  return bytes;
}

int value_of_byte_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) {
    return -1;
  }
  int value = 0;
  for (const char digit : token.substr(3, 2)) {
    const auto c = static_cast<unsigned char>(digit);
    if (std::isxdigit(c) == 0) {
      return -1;
    }
    value = value * 16 + (std::isdigit(c) != 0 ? c - '0' : std::tolower(c) - 'a' + 10);
  }
  return value;
}

std::unique_ptr<TokenDecoder> make_token_decoder(const JsonNode& node) {
  const std::string type = node.text("type");
  if (type == "ByteLevel") {
    return std::make_unique<ByteLevelDecoder>();
  }
  if (type == "ByteFallback") {
    return std::make_unique<ByteFallbackDecoder>();
  }
  if (type == "Fuse") {
    return std::make_unique<FuseDecoder>();
  }
  if (type == "Strip") {
    return std::make_unique<StripDecoder>(node.text("content"), node.integer("start"), node.integer("stop"));
  }
  if (type == "Replace") {
    return std::make_unique<ReplaceDecoder>(TextPattern::from_json(node.at("pattern")), node.text("content"));
  }
  if (type == "Metaspace") {
    const bool prepended =
        node.has("prepend_scheme") ? node.text("prepend_scheme") != "never" : node.flag("add_prefix_space", true);
    return std::make_unique<MetaspaceDecoder>(node.text("replacement"), prepended);
  }
  if (type == "Sequence") {
    std::vector<std::unique_ptr<TokenDecoder>> steps;
    for (const JsonNode& step : node.list("decoders")) {
      steps.push_back(make_token_decoder(step));
    }
    return std::make_unique<DecoderSequence>(std::move(steps));
  }
  node.fail(
      fmt::format("a decoder of type \"{}\", which Hestia does not read; it reads ByteLevel, ByteFallback, Fuse, "
                  "Strip, Replace, Metaspace and Sequence",
                  type));
}

}  // namespace hestia
