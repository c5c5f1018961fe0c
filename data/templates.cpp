#include "templates.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "unicode.hpp"

namespace hestia {

namespace {

// Text, or a token by its name (empty: </s>).
struct Part {
  std::string_view text;
  bool token = false;
};

struct TurnFormat {
  std::vector<Part> before;
  std::vector<Part> after;
};

constexpr Part kEnd{"", true};
constexpr std::string_view kThinkBegin = "<think>";
constexpr std::string_view kThinkEnd = "</think>";

struct Template {
  std::string name;
  TurnFormat system;
  TurnFormat user;
  std::vector<Part> assistant;        // Prompt before an answer.
  std::string_view lead;              // Completion before an answer: the space that a prompt must not end with.
  std::vector<Part> end;              // Completion after an answer.
  std::vector<Part> between;          // Prompt after an answer that another turn follows.
  std::string_view context = "\n\n";  // Between a question and what it is about.
  bool begin_sequence = true;         // The family's chats start with <s>, where it has one.
  bool system_in_user = false;        // There is no system turn: the first user turn begins with it.
  bool end_in_last_only = false;      // An answer that another turn follows has `between` in place of `end`.
  bool skip_empty_system = false;     // A system message without text has no turn.
  bool strip_left = false;            // White space after a token belongs to the token, and is dropped.
  // A family that thinks aloud: what the prompt of the last answer ends with when that one holds no thoughts.
  std::vector<Part> no_thoughts{};
};

const std::vector<Template>& templates() {
  static const std::vector<Template> all = {
      {.name = "plain",
       .system = {{}, {{"\n\n"}}},
       .user = {{}, {{"\n"}}},
       .assistant = {},
       .lead = "",
       .end = {kEnd},
       .between = {{"\n"}}},
      {.name = "qa",
       .system = {{}, {{"\n\n"}}},
       .user = {{{"Question: "}}, {{"\n"}}},
       .assistant = {{"Answer:"}},
       .lead = " ",
       .end = {kEnd},
       .between = {{"\n\n"}}},
      {.name = "alpaca",
       .system = {{}, {{"\n\n"}}},
       .user = {{{"### Instruction:\n"}}, {{"\n\n"}}},
       .assistant = {{"### Response:\n"}},
       .lead = "",
       .end = {kEnd},
       .between = {{"\n\n"}},
       .context = "\n\n### Input:\n"},
      // OLMoE-Instruct: the vocabulary has no tokens for the roles, they are text.
      {.name = "tulu",
       .system = {{{"<|system|>\n"}}, {{"\n"}}},
       .user = {{{"<|user|>\n"}}, {{"\n"}}},
       .assistant = {{"<|assistant|>\n"}},
       .lead = "",
       .end = {kEnd},
       .between = {{"\n"}}},
      // Qwen.
      {.name = "chatml",
       .system = {{{"<|im_start|>", true}, {"system\n"}}, {{"<|im_end|>", true}, {"\n"}}},
       .user = {{{"<|im_start|>", true}, {"user\n"}}, {{"<|im_end|>", true}, {"\n"}}},
       .assistant = {{"<|im_start|>", true}, {"assistant\n"}},
       .lead = "",
       .end = {{"<|im_end|>", true}},
       .between = {{"\n"}},
       .begin_sequence = false},
      // Qwen3 with and without thinking. Its own template knows no thoughts before answers that another turn follows.
      {.name = "qwen3",
       .system = {{{"<|im_start|>", true}, {"system\n"}}, {{"<|im_end|>", true}, {"\n"}}},
       .user = {{{"<|im_start|>", true}, {"user\n"}}, {{"<|im_end|>", true}, {"\n"}}},
       .assistant = {{"<|im_start|>", true}, {"assistant\n"}},
       .lead = "",
       .end = {{"<|im_end|>", true}},
       .between = {{"\n"}},
       .begin_sequence = false,
       .no_thoughts = {{kThinkBegin, true}, {"\n\n"}, {kThinkEnd, true}, {"\n\n"}}},
      // Mixtral.
      {.name = "mistral",
       .system = {},
       .user = {{{"[INST] "}}, {{" [/INST]"}}},
       .assistant = {},
       .lead = " ",
       .end = {kEnd},
       .between = {},
       .system_in_user = true},
      // Phi-3.5: its tokenizer drops white space after these tokens, the line breaks of the written form among it.
      {.name = "phi3",
       .system = {{{"<|system|>", true}}, {{"<|end|>", true}}},
       .user = {{{"<|user|>", true}}, {{"<|end|>", true}}},
       .assistant = {{"<|assistant|>", true}},
       .lead = "",
       .end = {{"<|end|>", true}},
       .between = {},
       .begin_sequence = false,
       .skip_empty_system = true,
       .strip_left = true},
      {.name = "deepseek",
       .system = {{}, {{"\n\n"}}},
       .user = {{{"User: "}}, {{"\n\n"}}},
       .assistant = {{"Assistant:"}},
       .lead = " ",
       .end = {kEnd},
       .between = {}},
      // gpt-oss: answers in the final channel. What ends one is <|return|>, which a later turn turns into <|end|>.
      {.name = "harmony",
       .system = {{{"<|start|>", true}, {"developer"}, {"<|message|>", true}, {"# Instructions\n\n"}},
                  {{"\n\n"}, {"<|end|>", true}}},
       .user = {{{"<|start|>", true}, {"user"}, {"<|message|>", true}}, {{"<|end|>", true}}},
       .assistant = {{"<|start|>", true}, {"assistant"}, {"<|channel|>", true}, {"final"}, {"<|message|>", true}},
       .lead = "",
       .end = {{"<|return|>", true}},
       .between = {{"<|end|>", true}},
       .begin_sequence = false,
       .end_in_last_only = true,
       .skip_empty_system = true},
  };
  return all;
}

const Template& find_template(const std::string& name) {
  const auto found = std::find_if(templates().begin(), templates().end(),
                                  [&](const Template& candidate) { return candidate.name == name; });
  if (found == templates().end()) {
    throw std::invalid_argument("there is no template " + name);
  }
  return *found;
}

void append(const std::vector<Part>& parts, bool completion, Document& document) {
  for (const Part& part : parts) {
    if (part.token) {
      document.append_token(part.text, completion);
    } else {
      document.append_text(part.text, completion);
    }
  }
}

std::string_view strip_left(std::string_view text) {
  while (!text.empty() && is_white_space(code_point_at(text, 0).value)) {
    text.remove_prefix(code_point_at(text, 0).size);
  }
  return text;
}

std::string_view strip_breaks(std::string_view text, bool left, bool right) {
  while (left && text.starts_with('\n')) {
    text.remove_prefix(1);
  }
  while (right && text.ends_with('\n')) {
    text.remove_suffix(1);
  }
  return text;
}

void append_turn(const TurnFormat& format, std::string_view content, bool strip, Document& document) {
  append(format.before, false, document);
  document.append_text(strip ? strip_left(content) : content, false);
  append(format.after, false, document);
}

// An answer apart from the thoughts before it, by the rule of Qwen3's own template.
struct Answer {
  std::string_view thoughts;
  std::string_view text;
};

Answer without_thoughts(std::string_view content) {
  const std::size_t first_end = content.find(kThinkEnd);
  if (first_end == std::string_view::npos) {
    return {{}, content};
  }
  std::string_view thoughts = content.substr(0, first_end);
  const std::size_t begin = thoughts.rfind(kThinkBegin);
  if (begin != std::string_view::npos) {
    thoughts.remove_prefix(begin + kThinkBegin.size());
  }
  return {strip_breaks(thoughts, true, true),
          strip_breaks(content.substr(content.rfind(kThinkEnd) + kThinkEnd.size()), true, false)};
}

// What stands between the assistant's mark and the end of its turn.
void append_answer(const Template& format, const std::string& content, bool is_last, Document& document) {
  if (format.no_thoughts.empty()) {
    document.append_text(format.lead, true);
    document.append_text(format.strip_left ? strip_left(content) : content, true);
    return;
  }
  const Answer answer = without_thoughts(content);
  if (!is_last) {
    document.append_text(answer.text, true);
    return;
  }
  if (answer.thoughts.empty()) {
    append(format.no_thoughts, false, document);
  } else {
    document.append_token(kThinkBegin, true);
    document.append_text("\n", true);
    document.append_text(answer.thoughts, true);
    document.append_text("\n", true);
    document.append_token(kThinkEnd, true);
    document.append_text("\n\n", true);
  }
  document.append_text(strip_breaks(answer.text, true, false), true);
}

}  // namespace

std::vector<std::string> template_names() {
  std::vector<std::string> names;
  std::transform(templates().begin(), templates().end(), std::back_inserter(names),
                 [](const Template& candidate) { return candidate.name; });
  return names;
}

std::vector<std::string> template_tokens(const std::string& name) {
  const Template& format = find_template(name);
  std::vector<std::string> names;
  for (const std::vector<Part>* parts :
       {&format.system.before, &format.system.after, &format.user.before, &format.user.after, &format.assistant,
        &format.no_thoughts, &format.end, &format.between}) {
    for (const Part& part : *parts) {
      if (part.token && !part.text.empty() && std::find(names.begin(), names.end(), part.text) == names.end()) {
        names.emplace_back(part.text);
      }
    }
  }
  return names;
}

void render_messages(const std::string& name, const std::vector<Message>& messages, Document& document) {
  const Template& format = find_template(name);
  document.begin_sequence = format.begin_sequence;
  const auto last = std::find_if(messages.rbegin(), messages.rend(),
                                 [](const Message& message) { return message.role == Role::kAssistant; });
  const auto end = last.base();
  std::optional<std::string> held;  // A system message that waits for its user turn.
  for (auto message = messages.begin(); message != end; ++message) {
    if (message->role == Role::kAssistant) {
      if (held) {
        append_turn(format.user, *held, format.strip_left, document);
        held.reset();
      }
      append(format.assistant, false, document);
      append_answer(format, message->content, message + 1 == end, document);
      if (message + 1 == end || !format.end_in_last_only) {
        append(format.end, true, document);
      }
      if (message + 1 != end) {
        append(format.between, false, document);
      }
    } else if (message->role == Role::kUser) {
      std::string content = held ? *held + "\n\n" : "";
      held.reset();
      content += message->content;
      if (!message->context.empty()) {
        content.append(format.context).append(message->context);
      }
      append_turn(format.user, content, format.strip_left, document);
    } else if (format.system_in_user) {
      held = message->content;
    } else if (!message->content.empty() || !format.skip_empty_system) {
      append_turn(format.system, message->content, format.strip_left, document);
    }
  }
}

}  // namespace hestia
