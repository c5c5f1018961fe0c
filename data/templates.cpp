#include "templates.hpp"

#include <algorithm>
#include <stdexcept>
#include <string_view>

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
      // Mixtral.
      {.name = "mistral",
       .system = {},
       .user = {{{"[INST] "}}, {{" [/INST]"}}},
       .assistant = {},
       .lead = " ",
       .end = {kEnd},
       .between = {},
       .system_in_user = true},
      // Phi-3.5: its tokenizer drops the line breaks that the written form has after these tokens.
      {.name = "phi3",
       .system = {{{"<|system|>", true}}, {{"<|end|>", true}}},
       .user = {{{"<|user|>", true}}, {{"<|end|>", true}}},
       .assistant = {{"<|assistant|>", true}},
       .lead = "",
       .end = {{"<|end|>", true}},
       .between = {},
       .begin_sequence = false},
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
                  {{"<|end|>", true}}},
       .user = {{{"<|start|>", true}, {"user"}, {"<|message|>", true}}, {{"<|end|>", true}}},
       .assistant = {{"<|start|>", true}, {"assistant"}, {"<|channel|>", true}, {"final"}, {"<|message|>", true}},
       .lead = "",
       .end = {{"<|return|>", true}},
       .between = {{"<|end|>", true}},
       .begin_sequence = false,
       .end_in_last_only = true},
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

void append_turn(const TurnFormat& format, const std::string& content, Document& document) {
  append(format.before, false, document);
  document.append_text(content, false);
  append(format.after, false, document);
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
  for (const std::vector<Part>* parts : {&format.system.before, &format.system.after, &format.user.before,
                                         &format.user.after, &format.assistant, &format.end, &format.between}) {
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
  std::string held;  // A system message that waits for its user turn.
  for (auto message = messages.begin(); message != end; ++message) {
    if (message->role == Role::kAssistant) {
      if (!held.empty()) {
        append_turn(format.user, held, document);
        held.clear();
      }
      append(format.assistant, false, document);
      document.append_text(format.lead, true);
      document.append_text(message->content, true);
      if (message + 1 == end || !format.end_in_last_only) {
        append(format.end, true, document);
      }
      if (message + 1 != end) {
        append(format.between, false, document);
      }
    } else if (message->role == Role::kUser) {
      std::string content = held.empty() ? "" : held + "\n\n";
      held.clear();
      content += message->content;
      if (!message->context.empty()) {
        content.append(format.context).append(message->context);
      }
      append_turn(format.user, content, document);
    } else if (format.system_in_user) {
      held = message->content;
    } else {
      append_turn(format.system, message->content, document);
    }
  }
}

}  // namespace hestia
