#pragma once

#include <string>
#include <vector>

#include "hestia/data/corpus.hpp"

namespace hestia {

enum class Role { kSystem, kUser, kAssistant };

/// One turn of a conversation.
struct Message {
  Role role = Role::kUser;
  std::string content;
  std::string context{};  ///< What a question is about; laid out after it.
};

/// Lays `messages` out in `document` as the template `name` says: the answers with what ends them are completion, all
/// else is prompt. What comes after the last answer is left out: nobody learns from it. Throws std::invalid_argument
/// when there is no such template.
void render_messages(const std::string& name, const std::vector<Message>& messages, Document& document);

}  // namespace hestia
