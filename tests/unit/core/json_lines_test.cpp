#include <limits>

#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

TEST_CASE("JSON lines come back in order, with their keys in order") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "m.jsonl";
  {
    JsonLinesWriter writer(path);
    writer.write({{"step", 1}, {"loss", 2.5}, {"a", "x\ny"}});
    CHECK(read_text_file(path) == "{\"step\":1,\"loss\":2.5,\"a\":\"x\\ny\"}\n");  // valid before the writer closes
    writer.write({{"step", 2}, {"loss", std::numeric_limits<double>::quiet_NaN()}, {"a", "\xff"}});
  }
  JsonLinesWriter(path).write({{"step", 3}});
  std::vector<std::int64_t> lines;
  std::vector<Json> objects;
  read_json_lines(path, [&](std::int64_t line, const Json& object) {
    lines.push_back(line);
    objects.push_back(object);
  });
  REQUIRE(lines == std::vector<std::int64_t>{1, 2, 3});
  CHECK(objects[0].dump() == R"({"step":1,"loss":2.5,"a":"x\ny"})");
  CHECK(objects[1].at("loss").is_null());
  CHECK(objects[1].at("a") == "\xEF\xBF\xBD");  // bytes that are no text become the replacement character
  CHECK(objects[2].at("step") == 3);

  JsonLinesWriter(path, true).write({{"step", 9}});
  CHECK(read_text_file(path) == "{\"step\":9}\n");
}

TEST_CASE("Numbers survive JSON lines exactly") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "m.jsonl";
  const std::vector<double> values = {0.1, 1.0 / 3.0, 5e-324, 1.7976931348623157e308, -0.0, 123456789012345680.0};
  JsonLinesWriter(path).write({{"v", values}, {"big", std::numeric_limits<std::int64_t>::max()}});
  read_json_lines(path, [&](std::int64_t, const Json& object) {
    CHECK(object.at("v").get<std::vector<double>>() == values);
    CHECK(object.at("big") == std::numeric_limits<std::int64_t>::max());
  });
}

TEST_CASE("JSON lines go on after a line that was cut off, and leave it as it is") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "m.jsonl";
  put_file(path, "{\"a\":1}\n{\"a\":");
  JsonLinesWriter(path).write({{"a", 3}});
  CHECK(read_text_file(path) == "{\"a\":1}\n{\"a\":\n{\"a\":3}\n");
  JsonLinesWriter(path).write({{"a", 4}});  // and no empty line where the last one is whole
  CHECK(read_text_file(path) == "{\"a\":1}\n{\"a\":\n{\"a\":3}\n{\"a\":4}\n");
  put_file(path, "");
  JsonLinesWriter(path).write({{"a", 5}});
  CHECK(read_text_file(path) == "{\"a\":5}\n");
}

TEST_CASE("Empty lines count but are not visited, and the last line needs no end") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "m.jsonl";
  put_file(path, "{\"a\":1}\r\n\n  \t\n{\"a\":2}");
  std::vector<std::int64_t> lines;
  read_json_lines(path, [&](std::int64_t line, const Json&) { lines.push_back(line); });
  CHECK(lines == std::vector<std::int64_t>{1, 4});
}

TEST_CASE("A damaged JSON line is named by file and line") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "m.jsonl";
  const auto read = [&] { read_json_lines(path, [](std::int64_t, const Json&) {}); };
  put_file(path, "{\"a\":1}\n\n{\"a\":\n");
  CHECK(error_text<InputError>(read) ==
        path.string() + ":3: not JSON, got \"{\"a\":\"; every line must be one JSON object");
  put_file(path, "{\"a\":1}\n[1, 2]\n");
  CHECK(error_text<InputError>(read) ==
        path.string() + ":2: not a JSON object, got array; every line must be one JSON object");
  put_file(path, "{\"a\":1}{\"b\":2}\n");
  CHECK(contains(error_text<InputError>(read), ":1: not JSON"));
  put_file(path, std::string("{\"a\":1}\0{\"b\":2}\n", 16));  // a zero byte ends what the parser reads
  CHECK(contains(error_text<InputError>(read), ":1: holds a zero byte"));
  CHECK(contains(error_text<InputError>([&] { (void)read_json_file(path); }), "m.jsonl: holds a zero byte"));
  std::filesystem::remove(path);
  CHECK(contains(error_text<InputError>(read), "No such file or directory"));
}

TEST_CASE("A damaged JSON file is named with line and column") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "config.json";
  put_file(path, "{\n  \"a\": 1,\n  \"b\" 2\n}\n");
  CHECK(error_text<InputError>([&] { (void)read_json_file(path); }) ==
        path.string() + ":3:7: not valid JSON; mend the file or fetch it again");
  put_file(path, "");
  CHECK(contains(error_text<InputError>([&] { (void)read_json_file(path); }), ":1:1: not valid JSON"));
  put_file(path, R"({"z": 1, "a": [true, null]})");
  CHECK(read_json_file(path).dump() == R"({"z":1,"a":[true,null]})");
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  put_file(path, nested(500));
  CHECK(read_json_file(path).dump() == nested(500));
  put_file(path, nested(100000));
  CHECK(contains(error_text<InputError>([&] { (void)read_json_file(path); }), "nested more than 500 deep"));
  CHECK(contains(error_text<InputError>([&] { read_json_lines(path, [](std::int64_t, const Json&) {}); }),
                 "config.json:1: nested more than 500 deep, got \"[[["));
  put_file(path, R"({"text": ")" + std::string(600, '[') + R"(\"{[", "after": 1})");
  CHECK(read_json_file(path).at("after") == 1);
}

TEST_CASE("A metrics file that cannot be opened is a RunError") {
  const TemporaryFolder folder;
  CHECK(contains(error_text<RunError>([&] { JsonLinesWriter{folder.path() / "no" / "m.jsonl"}; }),
                 "m.jsonl: cannot be opened for writing, No such file or directory; check"));
}

}  // namespace
}  // namespace hestia
