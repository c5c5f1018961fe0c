#include "normalizers.hpp"

#include <utility>
#include <vector>

#include <fmt/format.h>

#include "text_pattern.hpp"
#include "unicode.hpp"

namespace hestia {

namespace {

class UnicodeForm final : public Normalizer {
 public:
  explicit UnicodeForm(NormalForm form) : form_(form) {}
  void apply(std::string& text, bool /*prepend*/) const override { text = to_normal_form(text, form_); }

 private:
  NormalForm form_;
};

class Lowercase final : public Normalizer {
 public:
  void apply(std::string& text, bool /*prepend*/) const override { text = to_lower_case(text); }
};

class Strip final : public Normalizer {
 public:
  Strip(bool left, bool right) : left_(left), right_(right) {}
  void apply(std::string& text, bool /*prepend*/) const override {
    std::size_t begin = 0;
    std::size_t end = text.size();
    while (left_ && begin < end && is_white_space(code_point_at(text, begin).value)) {
      begin += code_point_at(text, begin).size;
    }
    while (right_ && end > begin && is_white_space(code_point_at(text, code_point_before(text, end)).value)) {
      end = code_point_before(text, end);
    }
    text = text.substr(begin, end - begin);
  }

 private:
  bool left_;
  bool right_;
};

class Prepend final : public Normalizer {
 public:
  explicit Prepend(std::string front) : front_(std::move(front)) {}
  void apply(std::string& text, bool prepend) const override {
    if (prepend && !text.empty()) {
      text.insert(0, front_);
    }
  }

 private:
  std::string front_;
};

class Replace final : public Normalizer {
 public:
  Replace(TextPattern pattern, std::string content) : pattern_(std::move(pattern)), content_(std::move(content)) {}
  void apply(std::string& text, bool /*prepend*/) const override {
    std::string result;
    std::size_t copied = 0;
    pattern_.for_each_match(text, [&](std::size_t begin, std::size_t end) {
      result.append(text, copied, begin - copied);
      result += content_;
      copied = end;
    });
    result.append(text, copied);
    text = std::move(result);
  }

 private:
  TextPattern pattern_;
  std::string content_;
};

class NormalizerSequence final : public Normalizer {
 public:
  explicit NormalizerSequence(std::vector<std::unique_ptr<Normalizer>> steps) : steps_(std::move(steps)) {}
  void apply(std::string& text, bool prepend) const override {
    for (const auto& step : steps_) {
      step->apply(text, prepend);
    }
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const JsonNode& node) {
  const std::string type = node.text("type");
  if (type == "NFC") {
    return std::make_unique<UnicodeForm>(NormalForm::kNfc);
  }
  if (type == "NFD") {
    return std::make_unique<UnicodeForm>(NormalForm::kNfd);
  }
  if (type == "NFKC") {
    return std::make_unique<UnicodeForm>(NormalForm::kNfkc);
  }
  if (type == "NFKD") {
    return std::make_unique<UnicodeForm>(NormalForm::kNfkd);
  }
  if (type == "Lowercase") {
    return std::make_unique<Lowercase>();
  }
  if (type == "Strip") {
    return std::make_unique<Strip>(node.flag("strip_left"), node.flag("strip_right"));
  }
  if (type == "Prepend") {
    return std::make_unique<Prepend>(node.text("prepend"));
  }
  if (type == "Replace") {
    return std::make_unique<Replace>(TextPattern::from_json(node.at("pattern")), node.text("content"));
  }
  if (type == "Sequence") {
    std::vector<std::unique_ptr<Normalizer>> steps;
    for (const JsonNode& step : node.list("normalizers")) {
      steps.push_back(make_normalizer(step));
    }
    return std::make_unique<NormalizerSequence>(std::move(steps));
  }
  node.fail(
      fmt::format("a normalizer of type \"{}\", which Hestia does not read; it reads NFC, NFD, NFKC, NFKD, "
                  "Lowercase, Strip, Prepend, Replace and Sequence",
                  type));
}

}  // namespace hestia
