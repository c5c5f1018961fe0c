#include <sentencepiece_trainer.h>

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include <catch2/catch.hpp>

#include "data_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/log.hpp"
#include "hestia/data/corpus.hpp"
#include "hestia/data/packing.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_line;
using testing::random_lines;
using testing::train_on;

constexpr std::int64_t kIgnored = -100;

CorpusOptions corpus_of(const std::filesystem::path& path, const std::string& format, const std::string& layout) {
  CorpusOptions options;
  options.domain = "d";
  options.format = format;
  options.paths = {path.string()};
  options.chat_template = layout;
  return options;
}

// In the order of the lines.
std::vector<Document> read_in_order(const CorpusOptions& options) {
  std::vector<Document> documents = read_corpus(options, {0.0, 1}, Split::kTrain, "data.corpora.0");
  const auto line = [](const Document& document) { return std::stoi(document.id.substr(document.id.find('#') + 1)); };
  std::sort(documents.begin(), documents.end(),
            [&](const Document& a, const Document& b) { return line(a) < line(b); });
  return documents;
}

// Everything as written, completions in braces, tokens in brackets, </s> as [].
std::string written(const Document& document) {
  std::string text = document.begin_sequence ? "[bos]" : "";
  bool open = false;
  for (const Piece& piece : document.pieces) {
    if (piece.completion != open) {
      text += piece.completion ? "{" : "}";
      open = piece.completion;
    }
    text += piece.kind == PieceKind::kText ? piece.text : "[" + piece.text + "]";
  }
  return text + (open ? "}" : "");
}

std::string written_line(const std::filesystem::path& path, const Json& line, const CorpusOptions& options) {
  put_file(path, line.dump() + "\n");
  const std::vector<Document> documents = read_in_order(options);
  return documents.size() == 1 ? written(documents[0]) : fmt::format("{} documents", documents.size());
}

const Json kConversation = {{"messages",
                             {{{"role", "system"}, {"content", "Be brief."}},
                              {{"role", "user"}, {"content", "Red?"}},
                              {{"role", "assistant"}, {"content", "No."}},
                              {{"role", "user"}, {"content", "Blue?"}},
                              {{"role", "assistant"}, {"content", "Yes."}}}}};

TEST_CASE("Every template lays a conversation out as its family writes it, answers and what ends them completion") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const std::map<std::string, std::string> expected = {
      {"plain", "[bos]Be brief.\n\nRed?\n{No.[]}\nBlue?\n{Yes.[]}"},
      {"qa", "[bos]Be brief.\n\nQuestion: Red?\nAnswer:{ No.[]}\n\nQuestion: Blue?\nAnswer:{ Yes.[]}"},
      {"alpaca",
       "[bos]Be brief.\n\n### Instruction:\nRed?\n\n### Response:\n{No.[]}\n\n### Instruction:\nBlue?\n\n### "
       "Response:\n{Yes.[]}"},
      {"tulu",
       "[bos]<|system|>\nBe brief.\n<|user|>\nRed?\n<|assistant|>\n{No.[]}\n<|user|>\nBlue?\n<|assistant|>\n{Yes.[]}"},
      {"chatml",
       "[<|im_start|>]system\nBe brief.[<|im_end|>]\n[<|im_start|>]user\nRed?[<|im_end|>]\n[<|im_start|>]assistant\n"
       "{No.[<|im_end|>]}\n[<|im_start|>]user\nBlue?[<|im_end|>]\n[<|im_start|>]assistant\n{Yes.[<|im_end|>]}"},
      {"qwen3",
       "[<|im_start|>]system\nBe brief.[<|im_end|>]\n[<|im_start|>]user\nRed?[<|im_end|>]\n[<|im_start|>]assistant\n"
       "{No.[<|im_end|>]}\n[<|im_start|>]user\nBlue?[<|im_end|>]\n[<|im_start|>]assistant\n"
       "[<think>]\n\n[</think>]\n\n{Yes.[<|im_end|>]}"},
      {"mistral", "[bos][INST] Be brief.\n\nRed? [/INST]{ No.[]}[INST] Blue? [/INST]{ Yes.[]}"},
      {"phi3",
       "[<|system|>]Be brief.[<|end|>][<|user|>]Red?[<|end|>][<|assistant|>]{No.[<|end|>]}[<|user|>]Blue?[<|end|>]"
       "[<|assistant|>]{Yes.[<|end|>]}"},
      {"deepseek", "[bos]Be brief.\n\nUser: Red?\n\nAssistant:{ No.[]}User: Blue?\n\nAssistant:{ Yes.[]}"},
      {"harmony",
       "[<|start|>]developer[<|message|>]# Instructions\n\nBe "
       "brief.\n\n[<|end|>][<|start|>]user[<|message|>]Red?[<|end|>]"
       "[<|start|>]assistant[<|channel|>]final[<|message|>]{No.}[<|end|>][<|start|>]user[<|message|>]Blue?[<|end|>]"
       "[<|start|>]assistant[<|channel|>]final[<|message|>]{Yes.[<|return|>]}"},
  };
  CHECK(expected.size() == template_names().size());
  for (const std::string& name : template_names()) {
    INFO(name);
    const CorpusOptions options = corpus_of(path, "chat", name);
    CHECK(written_line(path, kConversation, options) == expected.at(name));
    // What follows the last answer teaches nothing.
    Json open = kConversation;
    open["messages"].push_back({{"role", "user"}, {"content", "Green?"}});
    CHECK(written_line(path, open, options) == expected.at(name));
    // ShareGPT writes the same conversation so.
    Json other = {{"id", 7}, {"conversations", Json::array()}};
    for (const Json& message : kConversation["messages"]) {
      const std::string role = message["role"];
      other["conversations"].push_back(
          {{"from", role == "user" ? "human" : (role == "assistant" ? "gpt" : role)}, {"value", message["content"]}});
    }
    CHECK(written_line(path, other, options) == expected.at(name));
    // A system message of the recipe stands where the line has none, and only there.
    CorpusOptions fixed = options;
    fixed.system_message = "Be brief.";
    Json bare = kConversation;
    bare["messages"].erase(0);
    CHECK(written_line(path, bare, fixed) == expected.at(name));
    fixed.system_message = "Be long.";
    CHECK(written_line(path, kConversation, fixed) == expected.at(name));
  }
  CHECK(template_tokens("chatml") == std::vector<std::string>{"<|im_start|>", "<|im_end|>"});
  CHECK(template_tokens("qwen3") == std::vector<std::string>{"<|im_start|>", "<|im_end|>", "<think>", "</think>"});
  CHECK(template_tokens("tulu").empty());
  CHECK_THROWS_AS(template_tokens("chatlm"), std::invalid_argument);
}

// One question and the answers to it and a second one, as `name` lays them out.
std::string exchange(const std::filesystem::path& path, const std::string& name, const std::string& system,
                     const std::string& question, const std::string& first, const std::string& last) {
  const Json messages = {{{"role", "system"}, {"content", system}},
                         {{"role", "user"}, {"content", question}},
                         {{"role", "assistant"}, {"content", first}},
                         {{"role", "user"}, {"content", "And?"}},
                         {{"role", "assistant"}, {"content", last}}};
  return written_line(path, {{"messages", messages}}, corpus_of(path, "chat", name));
}

TEST_CASE("qwen3 learns thoughts before the last answer only, and empty ones are prompt") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const std::string before =
      "[<|im_start|>]system\nBe brief.[<|im_end|>]\n[<|im_start|>]user\nRed?[<|im_end|>]\n[<|im_start|>]assistant\n";
  const std::string between = "[<|im_end|>]}\n[<|im_start|>]user\nAnd?[<|im_end|>]\n[<|im_start|>]assistant\n";
  const auto laid_out = [&](const std::string& first, const std::string& last) {
    return exchange(path, "qwen3", "Be brief.", "Red?", first, last);
  };
  const std::string plain = before + "{No." + between + "[<think>]\n\n[</think>]\n\n{Yes.[<|im_end|>]}";
  const std::string thinking = before + "{No." + between + "{[<think>]\nIt is.\n[</think>]\n\nYes.[<|im_end|>]}";
  CHECK(laid_out("No.", "Yes.") == plain);
  CHECK(laid_out("<think>\nHm.\n</think>\n\nNo.", "<think>\n\n</think>\n\nYes.") == plain);
  CHECK(laid_out("No.", "\n\nYes.") == plain);
  CHECK(laid_out("No.", "<think>\nIt is.\n</think>\n\nYes.") == thinking);
  CHECK(laid_out("<think>Hm.</think>No.", "<think>It is.</think>Yes.") == thinking);
  CHECK(laid_out("Hm.</think>No.", "It is.\n</think>Yes.") == thinking);
  // Without its end it is no thought. Other families know none.
  CHECK(laid_out("No.", "<think>Yes.") ==
        before + "{No." + between + "[<think>]\n\n[</think>]\n\n{<think>Yes.[<|im_end|>]}");
  CHECK(exchange(path, "chatml", "Be brief.", "Red?", "No.", "<think>a</think>Yes.") ==
        before + "{No." + between + "{<think>a</think>Yes.[<|im_end|>]}");
}

TEST_CASE("phi3 drops the white space that its tokens swallow") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  CHECK(exchange(path, "phi3", "\n Be brief. ", "\t\xC2\xA0Red?\n", " No.\n", "\n\n\xE3\x80\x80 Yes.") ==
        "[<|system|>]Be brief. [<|end|>][<|user|>]Red?\n[<|end|>][<|assistant|>]{No.\n[<|end|>]}[<|user|>]And?[<|end|>]"
        "[<|assistant|>]{Yes.[<|end|>]}");
}

TEST_CASE("An empty system message is a turn where the family's own template has one") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto begins_with = [&](const std::string& name, const std::string& beginning) {
    const std::string text = exchange(path, name, "", "Red?", "No.", "Yes.");
    INFO(text);
    CHECK(text.starts_with(beginning));
  };
  begins_with("phi3", "[<|user|>]Red?");
  begins_with("harmony", "[<|start|>]user[<|message|>]Red?");
  begins_with("chatml", "[<|im_start|>]system\n[<|im_end|>]\n[<|im_start|>]user\nRed?");
  begins_with("qwen3", "[<|im_start|>]system\n[<|im_end|>]\n[<|im_start|>]user\nRed?");
  begins_with("mistral", "[bos][INST] \n\nRed? [/INST]");
  begins_with("deepseek", "[bos]\n\nUser: Red?");
  begins_with("tulu", "[bos]<|system|>\n\n<|user|>\nRed?");
}

TEST_CASE("Questions and answers are read under the names of the common data sets, or those of the recipe") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const CorpusOptions options = corpus_of(path, "question_answer", "qa");
  const std::string expected = "[bos]Question: one?\nAnswer:{ 1[]}";
  CHECK(written_line(path, {{"question", "one?"}, {"answer", "1"}}, options) == expected);
  CHECK(written_line(path, {{"instruction", "one?"}, {"response", "1"}}, options) == expected);
  CHECK(written_line(path, {{"instruction", "one?"}, {"context", ""}, {"response", "1"}}, options) == expected);
  CHECK(written_line(path, {{"instruction", "one?"}, {"input", nullptr}, {"output", "1"}}, options) == expected);
  CHECK(written_line(path, {{"instruction", "one?"}, {"context", "of 2"}, {"response", "1"}, {"category", "x"}},
                     options) == "[bos]Question: one?\n\nof 2\nAnswer:{ 1[]}");
  CHECK(written_line(path, {{"instruction", "one?"}, {"input", "of 2"}, {"output", "1"}},
                     corpus_of(path, "question_answer", "alpaca")) ==
        "[bos]### Instruction:\none?\n\n### Input:\nof 2\n\n### Response:\n{1[]}");
  CorpusOptions named = options;
  named.question_field = "q";
  named.answer_field = "a";
  named.context_field = "c";
  CHECK(written_line(path, {{"question", "no"}, {"q", "one?"}, {"answer", "no"}, {"a", "1"}}, named) == expected);
  // Nothing to learn.
  CHECK(written_line(path, {{"question", "one?"}, {"answer", ""}}, options) == "0 documents");
  CHECK(written_line(path, {{"question", ""}, {"answer", "1"}}, options) == "[bos]Question: \nAnswer:{ 1[]}");
}

TEST_CASE("A line that is no example is named with file, line, key and value") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto message = [&](const CorpusOptions& options, const std::string& line) {
    put_file(path, (options.format == "chat" ? kConversation.dump() : R"({"question": "a", "answer": "b"})") + "\n\n" +
                       line + "\n");
    std::string first;
    for (const Split split : {Split::kTrain, Split::kHeldOut}) {
      const std::string text = error_text<InputError>([&] {
        (void)read_corpus(options, {0.5, 1}, split, "data.corpora.2");
      });
      first = first.empty() ? text : first;
      CHECK(text == first);
    }
    const std::string place = path.string() + ":3: ";
    CHECK(first.rfind(place, 0) == 0);
    return first.substr(std::min(first.size(), place.size()));
  };
  const CorpusOptions questions = corpus_of(path, "question_answer", "qa");
  CHECK(message(questions, R"({"query": "a", "answer": "b"})") ==
        "there is no text field \"question\" or \"instruction\" or \"prompt\", got query, answer; set "
        "data.corpora.2.question_field to a field of this file");
  CHECK(message(questions, R"({"question": "a", "reply": "b"})") ==
        "there is no text field \"answer\" or \"response\" or \"output\" or \"completion\", got question, reply; set "
        "data.corpora.2.answer_field to a field of this file");
  CHECK(message(questions, "{}") ==
        "there is no text field \"question\" or \"instruction\" or \"prompt\", got none; set "
        "data.corpora.2.question_field to a field of this file");
  CHECK(message(questions, R"({"question": "a", "answer": 12})") ==
        "\"answer\" must be text, got 12; mend or remove this line");
  CHECK(message(questions, R"({"question": ["a"], "answer": "b"})") ==
        "\"question\" must be text, got [\"a\"]; mend or remove this line");
  CHECK(message(questions, R"({"question": "a", "answer": "b", "context": {"a": 1}})") ==
        "\"context\" must be text, got {\"a\":1}; mend or remove this line");
  CHECK(contains(message(questions, R"([{"question": "a", "answer": "b"}])"), "`jq -c '.[]'` makes lines of an array"));

  const CorpusOptions chat = corpus_of(path, "chat", "plain");
  CHECK(message(chat, R"({"text": "a"})") ==
        "there is no list field \"messages\" or \"conversations\", got text; set data.corpora.2.messages_field to a "
        "field of this file");
  CHECK(message(chat, R"({"messages": "hi"})") ==
        "\"messages\" must be a list of messages, got \"hi\"; mend or remove this line");
  CHECK(message(chat, R"({"messages": []})") ==
        "\"messages\" must be a list of messages, got []; mend or remove this line");
  CHECK(message(chat, R"({"messages": ["hi"]})") ==
        "\"messages.0\" must be an object with role and content, got \"hi\"; mend this line");
  CHECK(message(chat, R"({"messages": [{"role": "user"}]})") ==
        "\"messages.0\" has neither \"content\" nor \"value\", got {\"role\":\"user\"}; mend this line");
  CHECK(message(chat, R"({"messages": [{"value": "a"}]})") ==
        "\"messages.0\" has neither \"role\" nor \"from\", got {\"value\":\"a\"}; mend this line");
  CHECK(message(chat, R"({"messages": [{"role": "user", "content": null}]})") ==
        "\"messages.0.content\" must be text, got null; mend or remove this line");
  CHECK(contains(message(chat, R"({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]})"),
                 "the role of \"messages.1\" must be user (human), assistant (gpt) or, in the first message, system, "
                 "got \"tool\""));
  CHECK(
      contains(message(chat, R"({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]})"),
               "got \"system\""));
  CHECK(message(chat, R"({"messages": [{"role": "user", "content": "a"}]})") ==
        "\"messages\" has no message of the assistant, got 1 messages; remove this line");
}

TEST_CASE("A missing corpus names where to get it") {
  CorpusOptions options = corpus_of("/absent/a.jsonl", "question_answer", "qa");
  options.origin = "https://example.org/a.jsonl";
  CHECK(error_text<InputError>([&] { (void)read_corpus(options, {}, Split::kTrain, "data.corpora.1"); }) ==
        "data.corpora.1.paths: nothing matches \"/absent/a.jsonl\"; fetch it from https://example.org/a.jsonl or point "
        "data.corpora.1.paths elsewhere");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens and masks.

// A vocabulary with the tokens of every template.
std::unique_ptr<Tokenizer> chat_tokenizer(const std::filesystem::path& folder) {
  TokenizerTraining training{.vocab_size = 400};
  for (const std::string& name : template_names()) {
    for (const std::string& token : template_tokens(name)) {
      if (std::find(training.special_tokens.begin(), training.special_tokens.end(), token) ==
          training.special_tokens.end()) {
        training.special_tokens.push_back(token);
      }
    }
  }
  SplitMix64 random(78);
  train_on({random_lines(random, 30'000)}, training, folder / "tokenizer.model");
  return open_tokenizer(folder);
}

TEST_CASE("Special tokens have ids of their own, and no text becomes one") {
  const TemporaryFolder folder;
  const auto tokenizer = chat_tokenizer(folder.path());
  const std::int32_t end = tokenizer->token_id("<|im_end|>");
  CHECK(end > 3);
  CHECK(tokenizer->token_id("<|im_start|>") == end - 1);
  CHECK(tokenizer->token_id("<|absent|>") == -1);
  CHECK(tokenizer->token_id("</s>") == tokenizer->eos_id());
  CHECK(tokenizer->count_bytes({end}) == 0);
  const std::vector<std::int32_t> spelt = tokenizer->encode("a<|im_end|>b");
  CHECK(std::count(spelt.begin(), spelt.end(), end) == 0);
  CHECK(tokenizer->decode(spelt) == "a<|im_end|>b");
}

TEST_CASE("Labels are the answers and what ends them, whatever the template, and the prompt does not depend on them") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto tokenizer = chat_tokenizer(folder.path());
  SplitMix64 random(21);
  for (const std::string& name : template_names()) {
    INFO(name);
    const CorpusOptions options = corpus_of(path, "chat", name);
    std::string lines;
    std::vector<std::vector<std::string>> answers;
    for (int i = 0; i < 12; ++i) {
      Json messages = Json::array();
      if (random.below(2) == 0) {
        messages.push_back({{"role", "system"}, {"content", random_line(random, 3)}});
      }
      answers.emplace_back();
      const std::size_t turns = 1 + random.below(3);
      for (std::size_t turn = 0; turn < turns; ++turn) {
        messages.push_back({{"role", "user"}, {"content", random_line(random, 1 + random.below(9))}});
        answers.back().push_back(random_line(random, 1 + random.below(9)));
        messages.push_back({{"role", "assistant"}, {"content", answers.back().back()}});
      }
      lines += Json({{"messages", messages}}).dump() + "\n";
    }
    put_file(path, lines);
    const std::vector<Document> documents = read_in_order(options);
    REQUIRE(documents.size() == answers.size());
    PackedData data;
    tokenize_documents(documents, *tokenizer, 1024, 0, 1, data);
    REQUIRE(data.sequences.size() == answers.size());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      PackedData one;
      one.domains = data.domains;
      one.sequences = {data.sequences[i]};
      const PackedBatch batch = pack_for_evaluation(one, -1, 1, 1024).at(0);
      // Runs of labelled tokens, which are runs of counted ones moved by one.
      std::vector<std::vector<std::int32_t>> runs;
      bool open = false;
      for (std::size_t t = 0; t < data.sequences[i].tokens.size(); ++t) {
        const bool labelled = batch.labels[t] != kIgnored;
        if (labelled) {
          REQUIRE(batch.labels[t] == batch.tokens[t + 1]);
          REQUIRE(batch.counted[t + 1] == 1);
          if (!open) {
            runs.emplace_back();
          }
          runs.back().push_back(static_cast<std::int32_t>(batch.labels[t]));
        } else if (t + 1 < batch.tokens.size()) {
          REQUIRE(batch.counted[t + 1] == 0);
        }
        open = labelled;
      }
      REQUIRE(runs.size() == answers[i].size());
      std::int64_t bytes = 0;
      const bool lead = name == "qa" || name == "mistral" || name == "deepseek";
      for (std::size_t turn = 0; turn < runs.size(); ++turn) {
        const std::string answer = (lead ? " " : "") + answers[i][turn];
        std::vector<std::int32_t> expected = tokenizer->encode(answer);
        if (name == "harmony") {  // Only the last answer ends as the model ends one.
          if (turn + 1 == runs.size()) {
            expected.push_back(tokenizer->token_id("<|return|>"));
          }
        } else {
          expected.push_back(template_tokens(name).empty()
                                 ? tokenizer->eos_id()
                                 : tokenizer->token_id(name == "phi3" ? "<|end|>" : "<|im_end|>"));
        }
        CHECK(runs[turn] == expected);
        bytes += static_cast<std::int64_t>(answer.size());
      }
      CHECK(data.sequences[i].num_bytes == bytes);
      // Other answers leave every token of the first prompt as it was.
      Document other = documents[i];
      for (Piece& piece : other.pieces) {
        if (piece.completion && piece.kind == PieceKind::kText) {
          piece.text = random_line(random, 4);
        }
      }
      PackedData changed;
      tokenize_documents({other}, *tokenizer, 1024, 0, 1, changed);
      const auto prompt = data.sequences[i].num_prompt_tokens;
      REQUIRE(changed.sequences.at(0).num_prompt_tokens == prompt);
      CHECK(std::equal(data.sequences[i].tokens.begin(), data.sequences[i].tokens.begin() + prompt,
                       changed.sequences[0].tokens.begin()));
    }
  }
}

TEST_CASE(
    "A prompt for generation has the tokens of an example's, whatever the template, and knows what ends an answer") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto tokenizer = chat_tokenizer(folder.path());
  SplitMix64 random(23);
  for (const std::string& name : template_names()) {
    INFO(name);
    for (int i = 0; i < 8; ++i) {
      const std::string system = i % 2 == 0 ? "" : random_line(random, 3);
      const std::string user = random_line(random, 1 + random.below(9));
      Json messages = Json::array();
      if (!system.empty()) {
        messages.push_back({{"role", "system"}, {"content", system}});
      }
      messages.push_back({{"role", "user"}, {"content", user}});
      messages.push_back({{"role", "assistant"}, {"content", random_line(random, 4)}});
      put_file(path, Json({{"messages", messages}}).dump() + "\n");
      PackedData data;
      tokenize_documents(read_in_order(corpus_of(path, "chat", name)), *tokenizer, 1024, 0, 1, data);
      const TokenSequence& sequence = data.sequences.at(0);
      const ChatPrompt chat = chat_prompt(name, system, user, *tokenizer, "--chat");
      CHECK(chat.tokens ==
            std::vector<std::int32_t>(sequence.tokens.begin(), sequence.tokens.begin() + sequence.num_prompt_tokens));
      CHECK(chat.ends == std::vector<std::int32_t>{sequence.tokens.back()});
      const ChatPrompt example = answer_prompt(read_in_order(corpus_of(path, "chat", name)).at(0), *tokenizer);
      CHECK(example.tokens == chat.tokens);
      CHECK(example.ends == chat.ends);
    }
  }
}

TEST_CASE("the first answer of a conversation has its own prompt, text and end") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto tokenizer = chat_tokenizer(folder.path());
  SplitMix64 random(29);
  for (const std::string& name : template_names()) {
    INFO(name);
    const std::string user = random_line(random, 5);
    const std::string answer = random_line(random, 7);
    const Json messages = {{{"role", "user"}, {"content", user}},
                           {{"role", "assistant"}, {"content", answer}},
                           {{"role", "user"}, {"content", random_line(random, 4)}},
                           {{"role", "assistant"}, {"content", random_line(random, 6)}}};
    put_file(path, Json({{"messages", messages}}).dump() + "\n");
    const Document document = read_in_order(corpus_of(path, "chat", name)).at(0);
    CHECK_THAT(document.first_answer(), Catch::EndsWith(answer));
    CHECK(document.first_answer().size() <= answer.size() + 1);  // with the space that some templates put before it
    PackedData data;
    tokenize_documents({document}, *tokenizer, 1024, 0, 1, data);
    const TokenSequence& sequence = data.sequences.at(0);
    const ChatPrompt prompt = answer_prompt(document, *tokenizer);
    CHECK(prompt.tokens ==
          std::vector<std::int32_t>(sequence.tokens.begin(), sequence.tokens.begin() + sequence.num_prompt_tokens));
    const auto end = static_cast<std::size_t>(sequence.later_prompts.at(0).begin);
    // Where an answer that another turn follows has no end of its own, the next prompt begins with one.
    CHECK(prompt.ends ==
          (name == "harmony" ? std::vector<std::int32_t>() : std::vector<std::int32_t>{sequence.tokens.at(end - 1)}));
  }
}

TEST_CASE("A chat format that is not there, or lacks tokens, is refused with what there is") {
  const TemporaryFolder folder;
  train_on({"some words to learn from\n"}, TokenizerTraining{.vocab_size = 300}, folder.path() / "tokenizer.model");
  const auto tokenizer = open_tokenizer(folder.path());
  const auto refusal = [&](const std::string& format) {
    return error_text<UsageError>([&] { (void)chat_prompt(format, "", "Red?", *tokenizer, "--chat"); });
  };
  CHECK_THAT(refusal("chatlm"), Catch::Contains("--chat") && Catch::Contains("\"chatlm\"") &&
                                    Catch::Contains("did you mean \"chatml\"?") && Catch::Contains("tulu") &&
                                    Catch::Contains("harmony"));
  CHECK_THAT(refusal("chatml"), Catch::Contains("has no token <|im_start|>, <|im_end|>") && Catch::Contains("qa"));
}

TEST_CASE("A sequence begins with bos once: where the vocabulary names it and the family writes it") {
  const TemporaryFolder folder;
  const std::filesystem::path goldens = std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/unit/data/goldens";
  std::filesystem::copy_file(goldens / "olmoe/tokenizer.json", folder.path() / "tokenizer.json");
  const auto path = folder.path() / "a.jsonl";
  const auto first_tokens = [&](const Json& line, const std::string& format, const std::string& layout) {
    put_file(path, line.dump() + "\n");
    CorpusOptions options = corpus_of(path, format, layout);
    PackedData data;
    tokenize_documents(read_in_order(options), *open_tokenizer(folder.path()), 16, 0, 1, data);
    REQUIRE(!data.sequences.empty());
    return data.sequences;
  };
  const Json chat = {{"messages", {{{"role", "user"}, {"content", "a"}}, {{"role", "assistant"}, {"content", "b"}}}}};
  std::string letters;
  for (int i = 0; i < 40; ++i) {
    letters += "q x";
  }
  for (const bool named : {true, false}) {
    // OLMoE-Instruct begins and ends with one token, <|endoftext|>; the base model names no bos.
    put_file(folder.path() / "tokenizer_config.json",
             Json({{"bos_token", named ? Json("<|user|>") : Json()}, {"eos_token", "<|user|>"}}).dump());
    const std::int32_t token = open_tokenizer(folder.path())->token_id("<|user|>");
    REQUIRE(token >= 0);
    CHECK(open_tokenizer(folder.path())->bos_id() == (named ? token : -1));
    const auto qa = first_tokens({{"question", "a"}, {"answer", "b"}}, "question_answer", "qa").at(0);
    CHECK((qa.tokens.at(0) == token) == named);
    CHECK(std::count(qa.tokens.begin(), qa.tokens.end(), token) == (named ? 2 : 1));
    CHECK(qa.tokens.back() == token);
    // A text that spells it has it once, too, and so has every part of it.
    for (const std::string begin : {"", "<|user|>"}) {
      const auto parts = first_tokens({{"text", begin + letters}}, "jsonl", "");
      REQUIRE(parts.size() > 1);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        INFO(named << begin << i);
        CHECK((parts[i].tokens.at(0) == token) == (named || (i == 0 && !begin.empty())));
        CHECK((parts[i].tokens.at(1) != token || i + 1 == parts.size()));  // The last may hold the end alone.
      }
    }
  }
  put_file(folder.path() / "tokenizer_config.json", R"({"bos_token": "<|end|>", "eos_token": "<|end|>"})");
  const auto tokens = first_tokens(chat, "chat", "tulu").at(0).tokens;
  const std::int32_t end = open_tokenizer(folder.path())->eos_id();
  CHECK(tokens.front() == end);
  CHECK(tokens.at(1) != end);
  CHECK(std::count(tokens.begin(), tokens.end(), end) == 2);
}

TEST_CASE("A conversation that is too long loses its end, never a question without an answer after it") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "a.jsonl";
  const auto tokenizer = chat_tokenizer(folder.path());
  SplitMix64 random(22);
  Json messages = Json::array();
  for (int turn = 0; turn < 4; ++turn) {
    messages.push_back({{"role", "user"}, {"content", random_line(random, 6)}});
    messages.push_back({{"role", "assistant"}, {"content", random_line(random, 6)}});
  }
  put_file(path, Json({{"messages", messages}}).dump() + "\n");
  const std::vector<Document> documents = read_in_order(corpus_of(path, "chat", "chatml"));
  PackedData whole;
  tokenize_documents(documents, *tokenizer, 4096, 0, 1, whole);
  REQUIRE(whole.sequences.size() == 1);
  CHECK(whole.examples.at(0).truncated == 0);
  const TokenSequence& all = whole.sequences[0];
  CHECK(all.later_prompts.size() == 3);
  clear_degradations();
  set_log_level(LogLevel::kError);
  bool ended_in_question = false;
  for (auto length = static_cast<std::int64_t>(all.tokens.size()) - 1; length > 2 * all.num_prompt_tokens; --length) {
    PackedData cut;
    tokenize_documents(documents, *tokenizer, length, 0, 1, cut);
    REQUIRE(cut.sequences.size() == 1);
    CHECK(cut.examples.at(0).truncated == 1);
    const TokenSequence& sequence = cut.sequences[0];
    const std::size_t size = sequence.tokens.size();
    REQUIRE(static_cast<std::int64_t>(size) <= length);
    // The leading prompt may have lost its left part; from the other end, nothing but the end is gone.
    CHECK(sequence.completion_mask().back() == 1);
    ended_in_question = ended_in_question || static_cast<std::int64_t>(size) < length;
    for (std::size_t later = 0; later < sequence.later_prompts.size(); ++later) {
      CHECK(sequence.later_prompts[later].end < static_cast<std::int64_t>(size));
    }
  }
  CHECK(ended_in_question);
  set_log_level(LogLevel::kInfo);
  clear_degradations();
}

TEST_CASE("A document that needs a token the vocabulary lacks is refused") {
  const TemporaryFolder folder;
  const auto tokenizer = testing::small_tokenizer(folder.path());
  Document document;
  document.id = "a#1";
  document.domain = "d";
  document.append_token("<|im_start|>", false);
  document.append_text("x", true);
  PackedData data;
  CHECK(error_text<RunError>([&] { tokenize_documents({document}, *tokenizer, 16, 0, 1, data); }) ==
        "document a#1 of domain \"d\": the vocabulary has no token \"<|im_start|>\"; choose another template");
}

TEST_CASE("A vocabulary that begins every text with a space does so once, not at every piece") {
  const TemporaryFolder folder;
  SplitMix64 random(23);
  const std::string text = random_lines(random, 30'000);
  put_file(folder.path() / "text.txt", text);
  // As Mixtral's and Phi's vocabularies are: a dummy prefix, line breaks as bytes.
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      std::unordered_map<std::string, std::string>{{"input", (folder.path() / "text.txt").string()},
                                                   {"model_prefix", (folder.path() / "tokenizer").string()},
                                                   {"model_type", "bpe"},
                                                   {"vocab_size", "420"},
                                                   {"byte_fallback", "true"},
                                                   {"normalization_rule_name", "identity"},
                                                   {"remove_extra_whitespaces", "false"},
                                                   {"add_dummy_prefix", "true"},
                                                   {"minloglevel", "2"}});
  REQUIRE(status.ok());
  const auto tokenizer = open_tokenizer(folder.path());
  for (int round = 0; round < 50; ++round) {
    std::string line = random_line(random, 1 + random.below(6));
    line.pop_back();
    const std::vector<std::int32_t> start = tokenizer->encode(line);
    const std::vector<std::int32_t> on = tokenizer->encode_continuation(line);
    // The space in front is the whole difference.
    CHECK(tokenizer->count_bytes(start) == static_cast<std::int64_t>(line.size()) + 1);
    CHECK(tokenizer->count_bytes(on) == static_cast<std::int64_t>(line.size()));
    CHECK(tokenizer->encode_continuation(" " + line) == start);
    // Two pieces: the second goes on where the first ended.
    Document document("a", "d", "\n", line);
    PackedData data;
    tokenize_documents({document}, *tokenizer, 512, 0, 1, data);
    const TokenSequence& sequence = data.sequences.at(0);
    std::vector<std::int32_t> answer(sequence.tokens.begin() + sequence.num_prompt_tokens, sequence.tokens.end() - 1);
    CHECK(answer == on);
    CHECK(sequence.num_bytes == static_cast<std::int64_t>(line.size()));
  }
  CHECK(tokenizer->encode_continuation("").empty());
}

}  // namespace
}  // namespace hestia
