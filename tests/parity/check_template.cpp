// check_template: reads JSON lines {"template": NAME, "messages": [{"role", "content"}, ...]} from standard input and
// prints, for each, what Hestia lays out: {"begin_sequence": ..., "pieces": [{"text" | "token", "completion"}, ...]}. A
// token without a name is the vocabulary's </s>. For check_templates.py. Exit 0: every line was laid out.

#include <exception>
#include <iostream>
#include <string>

#include "data/templates.hpp"
#include "hestia/core/json_lines.hpp"

namespace {

using namespace hestia;

Role role_of(const std::string& name) {
  return name == "system" ? Role::kSystem : (name == "user" ? Role::kUser : Role::kAssistant);
}

Json laid_out(const Json& conversation) {
  std::vector<Message> messages;
  for (const Json& message : conversation.at("messages")) {
    messages.push_back({role_of(message.at("role").get<std::string>()), message.at("content").get<std::string>()});
  }
  Document document;
  render_messages(conversation.at("template").get<std::string>(), messages, document);
  Json pieces = Json::array();
  for (const Piece& piece : document.pieces) {
    pieces.push_back(
        {{piece.kind == PieceKind::kText ? "text" : "token", piece.text}, {"completion", piece.completion}});
  }
  return {{"begin_sequence", document.begin_sequence}, {"pieces", pieces}};
}

}  // namespace

int main() {
  try {
    for (std::string line; std::getline(std::cin, line);) {
      std::cout << laid_out(Json::parse(line)).dump() << '\n';
    }
  } catch (const std::exception& error) {
    std::cerr << "check_template: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
