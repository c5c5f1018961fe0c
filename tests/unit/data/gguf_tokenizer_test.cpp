#include "hestia/data/gguf_tokenizer.hpp"

#include <functional>

#include <catch2/catch.hpp>

#include "gguf_writer.hpp"
#include "hestia/core/error.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::GgufWriter;

GgufWriter vocabulary(const std::string& pre, const std::vector<std::string>& merges = {"a b", "ab c"}) {
  GgufWriter writer;
  writer.text("general.architecture", "llama").uint32("llama.context_length", 77);
  writer.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre);
  writer.texts("tokenizer.ggml.tokens", {"<s>", "a", "b", "c", "ab", "abc", "<tool>"});
  writer.int32s("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 1, 4}).texts("tokenizer.ggml.merges", merges);
  return writer;
}

TEST_CASE("A GGUF vocabulary becomes a tokenizer.json") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "f.gguf";
  vocabulary("smollm").uint32("tokenizer.ggml.bos_token_id", 0).text("tokenizer.chat_template", "{{ x }}").save(path);
  const GgufFile file(path);
  const Json json = gguf_tokenizer(file);
  CHECK(json.at("model").at("type") == "BPE");
  CHECK(json.at("model").at("vocab").size() == 7);
  CHECK(json.at("model").at("vocab").at("abc") == 5);
  CHECK(json.at("model").at("merges") == Json({"a b", "ab c"}));
  REQUIRE(json.at("added_tokens").size() == 2);
  CHECK(json.at("added_tokens").at(0).at("content") == "<s>");
  CHECK(json.at("added_tokens").at(0).at("special") == true);
  CHECK(json.at("added_tokens").at(1).at("id") == 6);
  CHECK(json.at("added_tokens").at(1).at("special") == false);
  const Json& steps = json.at("pre_tokenizer").at("pretokenizers");
  REQUIRE(steps.size() == 2);
  CHECK(steps.at(0).at("type") == "Digits");
  CHECK(steps.at(0).at("individual_digits") == true);
  CHECK(steps.at(1).at("type") == "ByteLevel");
  CHECK(steps.at(1).at("use_regex") == true);
  CHECK(json.at("post_processor").is_null());
  const Json config = gguf_tokenizer_config(file);
  CHECK(config.at("bos_token") == "<s>");
  CHECK_FALSE(config.contains("eos_token"));
  CHECK(config.at("chat_template") == "{{ x }}");
  CHECK(config.at("model_max_length") == 77);
  write_gguf_tokenizer(file, folder.path());
  CHECK(read_json_file(folder.path() / "tokenizer.json") == json);
  CHECK(read_json_file(folder.path() / "tokenizer_config.json") == config);
}

TEST_CASE("Pre-tokenisers with a pattern of their own, and a leading token") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "f.gguf";
  vocabulary("llama-bpe")
      .uint32("tokenizer.ggml.bos_token_id", 0)
      .boolean("tokenizer.ggml.add_bos_token", true)
      .save(path);
  const Json json = gguf_tokenizer(GgufFile(path));
  const Json& steps = json.at("pre_tokenizer").at("pretokenizers");
  CHECK(steps.at(0).at("type") == "Split");
  CHECK_THAT(steps.at(0).at("pattern").at("Regex").get<std::string>(), Catch::Contains("\\p{N}{1,3}"));
  CHECK(steps.at(1).at("use_regex") == false);
  CHECK(json.at("model").at("ignore_merges") == true);
  CHECK(json.at("post_processor").at("special_tokens").at("<s>").at("ids") == Json::array({0}));
  vocabulary("qwen2").save(path);
  CHECK(gguf_tokenizer(GgufFile(path)).at("normalizer").at("type") == "NFC");
  vocabulary("gpt-2").save(path);
  CHECK(gguf_tokenizer(GgufFile(path)).at("pre_tokenizer").at("pretokenizers").size() == 1);
  CHECK(gguf_tokenizer(GgufFile(path)).at("normalizer").is_null());
  vocabulary("olmo").save(path);
  CHECK(gguf_tokenizer(GgufFile(path)).at("normalizer").at("type") == "NFC");
  // Where the file does not say, llama-bpe leads with the token of beginning, if there is one, and others do not.
  const auto leads = [&](const GgufWriter& writer) {
    writer.save(path);
    return !gguf_tokenizer(GgufFile(path)).at("post_processor").is_null();
  };
  CHECK(leads(vocabulary("llama-bpe").uint32("tokenizer.ggml.bos_token_id", 0)));
  CHECK_FALSE(leads(vocabulary("llama-bpe")));
  CHECK_FALSE(leads(
      vocabulary("llama-bpe").uint32("tokenizer.ggml.bos_token_id", 0).boolean("tokenizer.ggml.add_bos_token", false)));
  CHECK_FALSE(leads(vocabulary("smollm").uint32("tokenizer.ggml.bos_token_id", 0)));
  // One that the vocabulary does not have is none.
  CHECK_FALSE(leads(vocabulary("llama-bpe").uint32("tokenizer.ggml.bos_token_id", 7)));
  CHECK_FALSE(gguf_tokenizer_config(GgufFile(path)).contains("bos_token"));
}

TEST_CASE("A vocabulary that cannot be converted is refused") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "f.gguf";
  const auto refusal = [&](const GgufWriter& writer) {
    writer.save(path);
    try {
      write_gguf_tokenizer(GgufFile(path), folder.path());
    } catch (const InputError& error) {
      CHECK_FALSE(std::filesystem::exists(folder.path() / "tokenizer.json"));
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(refusal(vocabulary("tekken")),
             Catch::Contains("f.gguf: tokenizer.ggml.pre must be one of gpt-2, olmo, smollm") &&
                 Catch::Contains("got \"tekken\"; take the tokenizer files"));
  // The second document fails: the first is not written either.
  CHECK_THAT(refusal(vocabulary("gpt-2").text("tokenizer.chat_template", "\xff")), Catch::Contains("is not UTF-8"));
  GgufWriter pieces;
  pieces.text("general.architecture", "llama").text("tokenizer.ggml.model", "llama");
  CHECK_THAT(refusal(pieces), Catch::Contains("must be \"gpt2\" (byte-level BPE), got \"llama\""));
  CHECK_THAT(refusal(vocabulary("smollm", {"ab"})), Catch::Contains("a merge must be two tokens"));
  CHECK_THAT(refusal(vocabulary("smollm", {"a b c"})), Catch::Contains("got \"a b c\""));
  CHECK_THAT(refusal(vocabulary("smollm").boolean("tokenizer.ggml.add_bos_token", true)),
             Catch::Contains("bos_token_id is missing"));
  GgufWriter short_types;
  short_types.text("general.architecture", "llama")
      .text("tokenizer.ggml.model", "gpt2")
      .text("tokenizer.ggml.pre", "smollm");
  short_types.texts("tokenizer.ggml.tokens", {"a", "b"})
      .texts("tokenizer.ggml.merges", {})
      .int32s("tokenizer.ggml.token_type", {1});
  CHECK_THAT(refusal(short_types), Catch::Contains("one entry per token (2), got 1"));
  GgufWriter bytes;
  bytes.text("general.architecture", "llama").text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
  bytes.texts("tokenizer.ggml.tokens", {"\xFF"}).texts("tokenizer.ggml.merges", {});
  CHECK_THAT(refusal(bytes), Catch::Contains("is not UTF-8"));
}

}  // namespace
}  // namespace hestia
