#include "hestia/data/corpus.hpp"

#include <zlib.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include <fmt/format.h>

#include <catch2/catch.hpp>

#include "data_fixtures.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::completion_of;
using testing::prompt_of;
using testing::random_characters;
using testing::random_line;
using testing::random_lines;
using testing::utf8;

const std::string kKey = "data.corpora.0";
const std::string kReplacement = "\ufffd";

// A corpus without limits, so that small inputs come through whole.
CorpusOptions corpus_of(std::vector<std::string> paths) {
  CorpusOptions options;
  options.domain = "some domain";
  options.paths = std::move(paths);
  options.min_document_bytes = 0;
  return options;
}

CorpusOptions json_corpus_of(std::vector<std::string> paths) {
  CorpusOptions options = corpus_of(std::move(paths));
  options.format = "jsonl";
  return options;
}

// Everything: a held-out share of 0 leaves all documents to training.
std::vector<Document> read_all(const CorpusOptions& options, std::uint64_t seed = 1) {
  return read_corpus(options, {0.0, seed}, Split::kTrain, kKey);
}

std::vector<std::string> ids_of(const std::vector<Document>& documents) {
  std::vector<std::string> ids;
  std::transform(documents.begin(), documents.end(), std::back_inserter(ids), [](const Document& d) { return d.id; });
  return ids;
}

std::map<std::string, std::string> texts_by_id(const std::vector<Document>& documents) {
  std::map<std::string, std::string> texts;
  for (const Document& document : documents) {
    CHECK(texts.emplace(document.id, completion_of(document)).second);
  }
  return texts;
}

void put(const std::filesystem::path& path, std::string_view content) {
  std::filesystem::create_directories(path.parent_path());
  put_file(path, content);
}

// gzip data as `gzip` writes it, or with the extra field that dictzip puts into the header.
std::string deflated(const std::string& text, bool dictzip = false) {
  z_stream stream{};
  REQUIRE(::deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  unsigned char extra[] = {'R', 'A', 6, 0, 1, 0, 0xFF, 0x7F, 0, 0};
  gz_header header{};
  header.extra = extra;
  header.extra_len = sizeof extra;
  if (dictzip) {
    REQUIRE(::deflateSetHeader(&stream, &header) == Z_OK);
  }
  std::string bytes(::deflateBound(&stream, text.size()) + 100, '\0');
  std::string input = text;
  stream.next_in = reinterpret_cast<Bytef*>(input.data());
  stream.avail_in = static_cast<unsigned>(input.size());
  stream.next_out = reinterpret_cast<Bytef*>(bytes.data());
  stream.avail_out = static_cast<unsigned>(bytes.size());
  REQUIRE(::deflate(&stream, Z_FINISH) == Z_STREAM_END);
  bytes.resize(stream.total_out);
  ::deflateEnd(&stream);
  return bytes;
}

bool same(const std::vector<Document>& a, const std::vector<Document>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Document& x, const Document& y) {
    return x.id == y.id && x.domain == y.domain && prompt_of(x) == prompt_of(y) && completion_of(x) == completion_of(y);
  });
}

// Writes `count` files of random lines, some in sub-folders; returns their texts by id.
std::map<std::string, std::string> put_random_files(const std::filesystem::path& folder, SplitMix64& random, int count,
                                                    const std::string& prefix = "file") {
  std::map<std::string, std::string> texts;
  for (int i = 0; i < count; ++i) {
    const std::string id = fmt::format("{}{}{}.txt", i % 3 == 0 ? "deep/er/" : "", prefix, i);
    texts[id] = random_lines(random, 100 + random.below(200));
    put(folder / id, texts[id]);
  }
  return texts;
}

// ---------------------------------------------------------------------------------------------------------------------
// Plain text.

TEST_CASE("Every file of a folder is a document with its path, domain and text") {
  const TemporaryFolder folder;
  SplitMix64 random(1);
  const auto texts = put_random_files(folder.path(), random, 20);
  for (const std::string& path : {folder.path().string(), folder.path().string() + "/"}) {
    const std::vector<Document> documents = read_all(corpus_of({path}));
    CHECK(texts_by_id(documents) == texts);
    for (const Document& document : documents) {
      CHECK(document.domain == "some domain");
      CHECK(prompt_of(document).empty());
    }
  }
}

TEST_CASE("Links inside a folder are left out, so that no text comes twice") {
  const TemporaryFolder folder;
  put(folder.path() / "a" / "x.txt", "text of x\n");
  const TemporaryFolder elsewhere;
  put(elsewhere.path() / "z.txt", "text of z\n");
  std::filesystem::create_symlink("x.txt", folder.path() / "a" / "y.txt");
  std::filesystem::create_symlink(elsewhere.path() / "z.txt", folder.path() / "a" / "z.txt");
  std::filesystem::create_directory_symlink(folder.path() / "a", folder.path() / "b");
  std::filesystem::create_directory_symlink(folder.path(), folder.path() / "a" / "loop");
  CHECK(ids_of(read_all(corpus_of({folder.path().string()}))) == std::vector<std::string>{"a/x.txt"});
  // A link that the recipe names itself is followed.
  CHECK(ids_of(read_all(corpus_of({(folder.path() / "b").string()}))) == std::vector<std::string>{"x.txt"});
}

TEST_CASE("Suffixes choose among the files of folders, below .gz and .dz, but not among named files") {
  const TemporaryFolder folder;
  for (const char* name : {"a.rst", "b.txt", "c.py", "rst", "d.rst.bak"}) {
    put(folder.path() / name, std::string("this is ") + name);
  }
  put(folder.path() / "e.rst.gz", deflated("this is e"));
  put(folder.path() / "f.txt.dz", deflated("this is f", true));
  put(folder.path() / "g.py.gz", deflated("this is g"));
  CorpusOptions options = corpus_of({folder.path().string()});
  options.suffixes = {".rst", ".txt"};
  CHECK(texts_by_id(read_all(options)) == std::map<std::string, std::string>{{"a.rst", "this is a.rst"},
                                                                             {"b.txt", "this is b.txt"},
                                                                             {"e.rst.gz", "this is e"},
                                                                             {"f.txt.dz", "this is f"}});
  options.paths = {(folder.path() / "c.py").string(), (folder.path() / "*.bak").string()};
  CHECK(read_all(options).size() == 2);
}

TEST_CASE("Globs match files and folders, names are told apart below the first wildcard") {
  const TemporaryFolder folder;
  const std::string root = folder.path().string();
  for (const char* name : {"one/readme.txt", "two/readme.txt", "two/deep/readme.txt", "three/other.md"}) {
    put(folder.path() / name, std::string("this is ") + name);
  }
  const auto ids = [&](const std::string& pattern) {
    std::vector<std::string> found = ids_of(read_all(corpus_of({root + pattern})));
    std::sort(found.begin(), found.end());
    return found;
  };
  CHECK(ids("/*/readme.txt") == std::vector<std::string>{"one/readme.txt", "two/readme.txt"});
  CHECK(ids("/t*") == std::vector<std::string>{"three/other.md", "two/deep/readme.txt", "two/readme.txt"});
  CHECK(ids("/{one,three}/*") == std::vector<std::string>{"one/readme.txt", "three/other.md"});
  CHECK(ids("/t?o/[dr]ea*") == std::vector<std::string>{"two/readme.txt"});
  CHECK(ids("/two/readme.txt") == std::vector<std::string>{"readme.txt"});
  CHECK(texts_by_id(read_all(corpus_of({root + "/*/readme.txt"}))).at("two/readme.txt") == "this is two/readme.txt");
}

TEST_CASE("A path that exists is no pattern") {
  const TemporaryFolder folder;
  put(folder.path() / "notes [old]" / "a*.txt", "with signs in its name\n");
  CHECK(ids_of(read_all(corpus_of({(folder.path() / "notes [old]").string()}))) == std::vector<std::string>{"a*.txt"});
  CHECK(read_all(corpus_of({(folder.path() / "notes [old]" / "a*.txt").string()})).size() == 1);
}

TEST_CASE("Relative patterns and the home folder work") {
  const TemporaryFolder folder;
  put(folder.path() / "texts" / "a.txt", "here\n");
  const std::filesystem::path before = std::filesystem::current_path();
  const char* home = std::getenv("HOME");
  const std::string home_before = home == nullptr ? "" : home;
  std::filesystem::current_path(folder.path());
  ::setenv("HOME", folder.path().c_str(), 1);
  std::vector<std::string> ids;
  for (const char* pattern : {"texts", "texts/a.txt", "t*", "~/texts", "~/t*/a.txt", "./texts/"}) {
    ids.push_back(ids_of(read_all(corpus_of({pattern}))).at(0));
  }
  std::filesystem::current_path(before);
  home == nullptr ? ::unsetenv("HOME") : ::setenv("HOME", home_before.c_str(), 1);
  CHECK(ids == std::vector<std::string>{"a.txt", "a.txt", "texts/a.txt", "a.txt", "texts/a.txt", "a.txt"});
}

TEST_CASE("A file that several paths match is read once") {
  const TemporaryFolder folder;
  SplitMix64 random(2);
  const auto texts = put_random_files(folder.path(), random, 12);
  const std::string root = folder.path().string();
  const CorpusOptions options = corpus_of({root, root + "/deep", root + "/*.txt", root + "/deep/../deep/er/*"});
  CHECK(texts_by_id(read_all(options)) == texts);
}

TEST_CASE("Folders may hold files of the same name: both come, in the same order every time") {
  const TemporaryFolder folder;
  SplitMix64 random(3);
  CorpusOptions options = corpus_of({});
  std::multiset<std::string> expected;
  for (const char* name : {"a", "b", "c"}) {
    options.paths.push_back((folder.path() / name).string());
    for (int i = 0; i < 10; ++i) {
      const std::string text = random_line(random, 8);
      put(folder.path() / name / fmt::format("{}.txt", i), text);
      expected.insert(text);
    }
  }
  const std::vector<Document> documents = read_all(options);
  std::multiset<std::string> found;
  for (const Document& document : documents) {
    found.insert(completion_of(document));
  }
  CHECK(found == expected);
  CHECK(same(documents, read_all(options)));
}

TEST_CASE("Files shorter than min_document_bytes are left out") {
  const TemporaryFolder folder;
  put(folder.path() / "short", std::string(99, 'x'));
  put(folder.path() / "long", std::string(100, 'y'));
  put(folder.path() / "empty", "");
  CorpusOptions options = corpus_of({folder.path().string()});
  options.min_document_bytes = 100;
  CHECK(ids_of(read_all(options)) == std::vector<std::string>{"long"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Compressed files.

TEST_CASE("Compressed files are inflated, of any size and of several members") {
  const TemporaryFolder folder;
  SplitMix64 random(4);
  const std::string large = random_lines(random, 700'000);  // more than the buffers hold
  put(folder.path() / "large.gz", deflated(large));
  put(folder.path() / "large.dz", deflated(large, true));
  put(folder.path() / "two.gz", deflated("first member\n") + deflated("second member\n"));
  put(folder.path() / "nothing.gz", deflated(""));
  put(folder.path() / ".gz", "only its name\n");  // a hidden file, nothing before the suffix
  CorpusOptions options = corpus_of({folder.path().string()});
  options.max_document_bytes = 1 << 20;
  CHECK(texts_by_id(read_all(options)) ==
        std::map<std::string, std::string>{{"large.gz", large},
                                           {"large.dz", large},
                                           {"two.gz", "first member\nsecond member\n"},
                                           {"nothing.gz", ""},
                                           {".gz", "only its name\n"}});
}

TEST_CASE("Damaged gzip data is named with the reason") {
  const TemporaryFolder folder;
  SplitMix64 random(5);
  const std::string good = deflated(random_lines(random, 20'000));
  const std::filesystem::path path = folder.path() / "a.txt.gz";
  const auto message = [&](const std::string& bytes) {
    put(path, bytes);
    return error_text<InputError>([&] { (void)read_all(corpus_of({path.string()})); });
  };
  const auto expected = [&](const std::string& reason) {
    return fmt::format("{}: damaged gzip data ({}); install or fetch the file again", path.string(), reason);
  };
  for (const std::size_t size : {std::size_t{20}, good.size() / 2, good.size() - 9, good.size() - 8, good.size() - 1}) {
    CAPTURE(size, good.size());
    CHECK(message(good.substr(0, size)) == expected("unexpected end of file"));
  }
  std::string changed = good;
  changed[good.size() - 6] = static_cast<char>(changed[good.size() - 6] ^ 1);  // in the checksum
  CHECK(message(changed) == expected("incorrect data check"));
  changed = good;
  changed[good.size() - 2] = static_cast<char>(changed[good.size() - 2] ^ 1);  // in the length
  CHECK(message(changed) == expected("incorrect length check"));
  for (int i = 0; i < 20; ++i) {
    changed = good;
    const std::size_t place = 10 + random.below(good.size() - 10);
    changed[place] = static_cast<char>(changed[place] ^ static_cast<char>(1 + random.below(255)));
    CAPTURE(place);
    CHECK(contains(message(changed), "damaged gzip data ("));
  }
  for (const std::string& bytes : {std::string("no gzip data at all\n"), good.substr(1), std::string()}) {
    CHECK(message(bytes) == expected("it does not begin like gzip data"));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Text that is not UTF-8.

TEST_CASE("Bytes that are not UTF-8 become U+FFFD, all others stay") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  const std::string& r = kReplacement;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"plain", "plain"},
      {"\x80", r},                                           // a continuation without a lead
      {"a\xC3", "a" + r},                                    // ends inside a character
      {"a\xE2\x82", "a" + r + r},                            //
      {"\xF0\x9F\x98z", r + r + r + "z"},                    //
      {"\xC3(", r + "("},                                    // a lead without its continuation
      {"\xC0\x80 \xC1\xBF", r + r + " " + r + r},            // overlong
      {"\xE0\x9F\xBF \xE0\xA0\x80", r + r + r + " \u0800"},  //
      {"\xF0\x8F\xBF\xBF \xF0\x90\x80\x80", r + r + r + r + " \U00010000"},
      {"\xED\xA0\x80 \xED\x9F\xBF", r + r + r + " \ud7ff"},  // a surrogate
      {"\xF4\x90\x80\x80 \xF4\x8F\xBF\xBF", r + r + r + r + " \U0010ffff"},
      {"\xF5\x80\x80\x80\xFF", r + r + r + r + r},
      {"gr\xFC\xDF dich", "gr" + r + r + " dich"},  // Latin-1
      {"caf\u00e9 \U0001F600\n", "caf\u00e9 \U0001F600\n"},
  };
  for (const auto& [bytes, text] : cases) {
    put(path, bytes);
    CHECK(completion_of(read_all(corpus_of({path.string()})).at(0)) == text);
  }
}

// Decodes strictly and from the definition alone; false where the text is not UTF-8.
bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at]);
    const std::size_t length = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
    if (length == 0 || at + length > text.size()) {
      return false;
    }
    std::uint32_t code = length == 1 ? lead : lead & (0x7FU >> length);
    for (std::size_t i = 1; i < length; ++i) {
      const auto next = static_cast<unsigned char>(text[at + i]);
      if (next >> 6 != 2) {
        return false;
      }
      code = code << 6 | (next & 0x3FU);
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000) || utf8(code).size() != length) {
      return false;
    }
    at += length;
  }
  return true;
}

TEST_CASE("Random bytes come out as UTF-8, random characters as they are") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  SplitMix64 random(6);
  const auto through = [&](const std::string& bytes) {
    put(path, bytes);
    return completion_of(read_all(corpus_of({path.string()})).at(0));
  };
  for (int i = 0; i < 100; ++i) {
    const std::string good = random_characters(random, 1 + random.below(50));
    REQUIRE(through(good) == good);
    std::string bytes = good;
    for (std::size_t changes = 1 + random.below(5); changes > 0; --changes) {
      bytes[random.below(bytes.size())] = static_cast<char>(random.below(256));
    }
    const std::string mended = through(bytes);
    REQUIRE(is_utf8(mended));
    REQUIRE((mended == bytes) == is_utf8(bytes));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Missing corpora.

TEST_CASE("A missing corpus names the path, the package and the recipe key") {
  const TemporaryFolder folder;
  const std::string lost = (folder.path() / "no" / "such").string();
  put(folder.path() / "here" / "a.txt", "a text that is there\n");
  const auto message = [&](const CorpusOptions& options) {
    return error_text<InputError>([&] { (void)read_all(options); });
  };
  CorpusOptions options = corpus_of({(folder.path() / "here").string(), lost});
  CHECK(message(options) ==
        "data.corpora.0.paths: nothing matches \"" + lost + "\"; point data.corpora.0.paths elsewhere");
  options.package = "linux-doc-6.1";
  CHECK(message(options) == "data.corpora.0.paths: nothing matches \"" + lost +
                                "\"; install the Debian package (apt-get install linux-doc-6.1) or point "
                                "data.corpora.0.paths elsewhere");
  options.paths = {(folder.path() / "here").string()};
  options.suffixes = {".rst", ".md"};
  CHECK(message(options) == "data.corpora.0.paths: nothing matches \"" + options.paths[0] +
                                "\" with names ending in .rst, .md; install the Debian package (apt-get install "
                                "linux-doc-6.1) or point data.corpora.0.paths elsewhere");
  options = corpus_of({(folder.path() / "*.none").string()});
  CHECK(contains(message(options), "nothing matches \"" + options.paths[0] + "\""));
  options = corpus_of({(folder.path() / std::string(300, 'n')).string()});
  CHECK(
      contains(message(options), "data.corpora.0.paths: \"" + options.paths[0] + "\" cannot be looked up: File name"));
}

// ---------------------------------------------------------------------------------------------------------------------
// Separators.

TEST_CASE("A line that matches the separator starts a new document") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "dictionary";
  put(path, "preface\n\nApple\n  a fruit\nBear\n  an animal\n  of the woods\nCar\n  no line break at the end");
  CorpusOptions options = corpus_of({path.string()});
  options.separator = "^[A-Z]";
  CHECK(texts_by_id(read_all(options)) ==
        std::map<std::string, std::string>{{"dictionary#0", "preface\n\n"},
                                           {"dictionary#1", "Apple\n  a fruit\n"},
                                           {"dictionary#2", "Bear\n  an animal\n  of the woods\n"},
                                           {"dictionary#3", "Car\n  no line break at the end"}});
  put(path, "");
  CHECK(ids_of(read_all(options)).size() <= 1);
}

TEST_CASE("The separator sees a line without its line break") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  CorpusOptions options = corpus_of({path.string()});
  for (const std::string& end : {std::string("\n"), std::string("\r\n")}) {
    put(path, "one" + end + "----" + end + "two -----" + end + "----" + end + end + "three" + end);
    options.separator = "^-+$";
    CHECK(texts_by_id(read_all(options)) ==
          std::map<std::string, std::string>{{"a.txt#0", "one" + end},
                                             {"a.txt#1", "----" + end + "two -----" + end},
                                             {"a.txt#2", "----" + end + end + "three" + end}});
    options.separator = "^$";
    CHECK(read_all(options).size() == 2);
  }
}

TEST_CASE("Very long lines do not overflow the stack, the separator sees their first 1000 bytes") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  CorpusOptions options = corpus_of({path.string()});
  options.max_document_bytes = 1 << 22;
  const std::string head(990, 'x');
  const std::string tail(1'000'000, 'y');
  put(path, "begin\n" + head + "new" + tail + "\n" + head + "0123456789new" + tail + "\nnew" + tail + "end\n");
  options.separator = "^.*new";
  CHECK(read_all(options).size() == 3);
  options.separator = "(x|y)*end$";
  CHECK(read_all(options).size() == 1);
  options.separator = "^x+0123456789$";  // the thousandth byte is not the end of the line
  CHECK(read_all(options).size() == 1);
}

TEST_CASE("Pieces shorter than min_document_bytes join the next, nothing but a short last one is lost") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.txt";
  CorpusOptions options = corpus_of({path.string()});
  options.separator = "^#";
  SplitMix64 random(7);
  for (int round = 0; round < 30; ++round) {
    std::string text;
    for (std::size_t piece = 1 + random.below(20); piece > 0; --piece) {
      text += "# heading\n" + random_lines(random, random.below(150));
    }
    put(path, text);
    options.min_document_bytes = static_cast<std::int64_t>(random.below(200));
    const std::map<std::string, std::string> pieces = texts_by_id(read_all(options));
    std::string joined;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const std::string& piece = pieces.at(fmt::format("a.txt#{}", i));
      REQUIRE(static_cast<std::int64_t>(piece.size()) >= options.min_document_bytes);
      REQUIRE(piece[0] == '#');
      // The first heading after enough bytes starts the next piece.
      const std::size_t next =
          piece.find("\n#", static_cast<std::size_t>(std::max<std::int64_t>(options.min_document_bytes, 1) - 1));
      REQUIRE(next == std::string::npos);
      joined += piece;
    }
    REQUIRE(text.rfind(joined, 0) == 0);
    REQUIRE(static_cast<std::int64_t>(text.size() - joined.size()) <
            std::max<std::int64_t>(options.min_document_bytes, 1));
  }
}

TEST_CASE("A separator that is no regular expression is wrong usage") {
  const TemporaryFolder folder;
  put(folder.path() / "a.txt", "text\n");
  CorpusOptions options = corpus_of({folder.path().string()});
  options.separator = "^[A-";
  CHECK(error_text<UsageError>([&] { (void)read_all(options); }) ==
        "data.corpora.0.separator is not a regular expression, got \"^[A-\"; mend it");
}

// ---------------------------------------------------------------------------------------------------------------------
// JSON lines.

TEST_CASE("JSON lines hold one document each, with a text field of any name") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.jsonl";
  put(path,
      "{\"text\": \"first\\n\\u00e9\", \"body\": \"FIRST\"}\r\n\n  \t\n{\"body\": \"SECOND\", \"text\": \"second\"}\n"
      "{\"text\": \"\", \"body\": \"THIRD\"}\n{\"text\": \"last \\ud83d\\ude00\", \"body\": \"LAST\"}");
  CorpusOptions options = json_corpus_of({path.string()});
  const std::vector<Document> documents = read_all(options);
  CHECK(texts_by_id(documents) == std::map<std::string, std::string>{{"a.jsonl#1", "first\n\u00e9"},
                                                                     {"a.jsonl#4", "second"},
                                                                     {"a.jsonl#6", "last \U0001F600"}});
  CHECK(documents[0].domain == "some domain");
  CHECK(prompt_of(documents[0]).empty());
  options.text_field = "body";
  CHECK(texts_by_id(read_all(options)).at("a.jsonl#5") == "THIRD");
}

TEST_CASE("A prompt field makes prompt and answer, through the template") {
  const TemporaryFolder folder;
  put(folder.path() / "a.jsonl",
      "{\"question\": \"why {prompt}?\", \"answer\": \"because\"}\n{\"question\": \"how?\", \"answer\": \"so\"}\n");
  CorpusOptions options = json_corpus_of({folder.path().string()});
  options.text_field = "answer";
  options.prompt_field = "question";
  std::vector<Document> documents = read_all(options);
  std::sort(documents.begin(), documents.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  REQUIRE(documents.size() == 2);
  CHECK(prompt_of(documents[0]) == "why {prompt}?");
  CHECK(completion_of(documents[0]) == "because");
  options.prompt_template = "Question: {prompt}\nAnswer: ";
  documents = read_all(options);
  std::sort(documents.begin(), documents.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  CHECK(prompt_of(documents[0]) == "Question: why {prompt}?\nAnswer: ");
  CHECK(prompt_of(documents[1]) == "Question: how?\nAnswer: ");
  CHECK(completion_of(documents[1]) == "so");
  options.prompt_template = "Question: {promt}";
  CHECK(error_text<UsageError>([&] { (void)read_all(options); }) ==
        "data.corpora.0.prompt_template must contain {prompt}, got \"Question: {promt}\"; add it");
}

TEST_CASE("JSON lines are inflated and mended like text") {
  const TemporaryFolder folder;
  put(folder.path() / "a.jsonl.gz", deflated("{\"text\": \"packed\"}\n{\"text\": \"gr\xFC\xDF\"}\n"));
  CorpusOptions options = json_corpus_of({folder.path().string()});
  options.suffixes = {".jsonl"};
  CHECK(texts_by_id(read_all(options)) ==
        std::map<std::string, std::string>{{"a.jsonl.gz#1", "packed"}, {"a.jsonl.gz#2", "gr\ufffd\ufffd"}});
}

TEST_CASE("A JSON line without the field is named by file and line, whichever split it falls into") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "a.jsonl";
  CorpusOptions options = json_corpus_of({path.string()});
  const auto message = [&](Split split) {
    return error_text<InputError>([&] { (void)read_corpus(options, {0.5, 1}, split, "data.corpora.3"); });
  };
  for (const Split split : {Split::kTrain, Split::kHeldOut}) {
    put(path, "{\"text\": \"fine\"}\n\n{\"body\": \"x\", \"title\": \"y\"}\n");
    CHECK(message(split) ==
          path.string() +
              ":3: there is no text field \"text\", got body, title; set data.corpora.3.text_field to a field of this "
              "file");
    put(path, "{\"text\": 7}\n");
    CHECK(message(split) == path.string() + ":1: \"text\" must be text, got 7; mend or remove this line");
    put(path, "{\"text\": \"fine\"}\n{\"text\": \n");
    CHECK(message(split) ==
          path.string() + ":2: not a JSON object, got \"{\"text\": \"; every line must be one JSON object");
    put(path, "[\"text\"]\n");
    CHECK(message(split) ==
          path.string() +
              ":1: not a JSON object, got \"[\"text\"]\"; every line must be one JSON object (`jq -c '.[]'` makes "
              "lines of an array)");
    options.prompt_field = "question";
    put(path, "{\"text\": \"fine\"}\n");
    CHECK(contains(message(split), path.string() + ":1: there is no text field \"question\", got text; set"));
    options.prompt_field.clear();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Order.

TEST_CASE("The order is shuffled and depends on seed and ids only") {
  const TemporaryFolder first;
  const TemporaryFolder second;
  SplitMix64 random(8);
  const auto texts = put_random_files(first.path(), random, 60);
  for (auto text = texts.rbegin(); text != texts.rend(); ++text) {  // the other way round, in another folder
    put(second.path() / text->first, text->second);
  }
  const std::vector<Document> documents = read_all(corpus_of({first.path().string()}));
  CHECK(same(documents, read_all(corpus_of({first.path().string()}))));
  CHECK(same(documents, read_all(corpus_of({second.path().string()}))));
  const std::vector<std::string> ids = ids_of(documents);
  CHECK_FALSE(std::is_sorted(ids.begin(), ids.end()));
  const std::vector<std::string> other = ids_of(read_all(corpus_of({first.path().string()}), 2));
  CHECK(other != ids);
  CHECK(std::is_permutation(other.begin(), other.end(), ids.begin(), ids.end()));
}

TEST_CASE("Pieces and JSON lines are shuffled too, across files") {
  const TemporaryFolder folder;
  for (const char* name : {"a", "b"}) {
    std::string text;
    std::string json;
    for (int i = 0; i < 50; ++i) {
      text += fmt::format("# {} of {}\n", i, name);
      json += fmt::format("{{\"text\": \"{} of {}\"}}\n", i, name);
    }
    put(folder.path() / (std::string(name) + ".txt"), text);
    put(folder.path() / (std::string(name) + ".jsonl"), json);
  }
  CorpusOptions pieces = corpus_of({(folder.path() / "*.txt").string()});
  pieces.separator = "^#";
  for (const CorpusOptions& options : {pieces, json_corpus_of({(folder.path() / "*.jsonl").string()})}) {
    const std::vector<Document> documents = read_all(options);
    REQUIRE(documents.size() == 100);
    CHECK(same(documents, read_all(options)));
    CHECK_FALSE(same(documents, read_all(options, 2)));
    int changes = 0;
    for (std::size_t i = 1; i < documents.size(); ++i) {
      changes += documents[i].id[0] != documents[i - 1].id[0] ? 1 : 0;
    }
    CHECK(changes > 25);  // 50 expected of a shuffle, 1 of files in a row
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The split.

TEST_CASE("Training and held-out documents are disjoint and together everything") {
  const TemporaryFolder folder;
  SplitMix64 random(9);
  const auto texts = put_random_files(folder.path(), random, 120);
  const CorpusOptions options = corpus_of({folder.path().string()});
  std::set<std::set<std::string>> splits;
  for (std::uint64_t seed = 1; seed < 5; ++seed) {
    const SplitOptions split{0.3, seed};
    std::vector<Document> all = read_corpus(options, split, Split::kTrain, kKey);
    const std::vector<Document> held_out = read_corpus(options, split, Split::kHeldOut, kKey);
    CHECK(all.size() > 60);
    CHECK(held_out.size() > 18);
    const std::vector<std::string> ids = ids_of(held_out);
    splits.emplace(ids.begin(), ids.end());
    all.insert(all.end(), held_out.begin(), held_out.end());
    CHECK(texts_by_id(all) == texts);  // also checks that no id comes twice
  }
  CHECK(splits.size() == 4);  // other seeds hold out others
}

TEST_CASE("No share and the whole share") {
  const TemporaryFolder folder;
  SplitMix64 random(10);
  (void)put_random_files(folder.path(), random, 10);
  const CorpusOptions options = corpus_of({folder.path().string()});
  CHECK(read_corpus(options, {0.0, 1}, Split::kHeldOut, kKey).empty());
  CHECK(read_corpus(options, {1.0, 1}, Split::kTrain, kKey).empty());
  CHECK(read_corpus(options, {1.0, 1}, Split::kHeldOut, kKey).size() == 10);
}

TEST_CASE("Adding files moves no document to the other split and keeps the order of the others") {
  const TemporaryFolder folder;
  SplitMix64 random(11);
  (void)put_random_files(folder.path(), random, 60);
  const CorpusOptions options = corpus_of({folder.path().string()});
  const SplitOptions split{0.25, 7};
  std::map<Split, std::vector<std::string>> before;
  for (const Split half : {Split::kTrain, Split::kHeldOut}) {
    before[half] = ids_of(read_corpus(options, split, half, kKey));
  }
  const auto added = put_random_files(folder.path(), random, 40, "added");
  for (const Split half : {Split::kTrain, Split::kHeldOut}) {
    std::vector<std::string> after = ids_of(read_corpus(options, split, half, kKey));
    CHECK(after.size() > before[half].size());
    after.erase(std::remove_if(after.begin(), after.end(), [&](const auto& id) { return added.count(id) > 0; }),
                after.end());
    CHECK(after == before[half]);
  }
}

TEST_CASE("The held-out share is about the one asked for, by documents of every format") {
  const TemporaryFolder folder;
  std::string text;
  std::string json;
  for (int i = 0; i < 4000; ++i) {
    text += fmt::format("# number {}\n", i);
    json += fmt::format("{{\"text\": \"number {}\"}}\n", i);
  }
  put(folder.path() / "a.txt", text);
  put(folder.path() / "a.jsonl", json);
  CorpusOptions pieces = corpus_of({(folder.path() / "a.txt").string()});
  pieces.separator = "^#";
  for (const CorpusOptions& options : {pieces, json_corpus_of({(folder.path() / "a.jsonl").string()})}) {
    for (const double fraction : {0.05, 0.2, 0.5}) {
      const auto held_out = static_cast<double>(read_corpus(options, {fraction, 3}, Split::kHeldOut, kKey).size());
      const auto train = static_cast<double>(read_corpus(options, {fraction, 3}, Split::kTrain, kKey).size());
      CHECK(held_out + train == 4000);
      const double deviation = std::sqrt(4000 * fraction * (1 - fraction));
      CHECK(std::abs(held_out - 4000 * fraction) < 4 * deviation);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Long documents.

TEST_CASE("Long documents are cut at line breaks into parts that share one split") {
  const TemporaryFolder folder;
  SplitMix64 random(12);
  std::map<std::string, std::string> texts;
  std::string json;
  for (int i = 0; i < 40; ++i) {
    const std::string text = random_lines(random, 100 + random.below(3000));
    put(folder.path() / "texts" / fmt::format("{}", i), text);
    json += Json({{"text", text}}).dump() + "\n";
    texts[fmt::format("{}", i)] = text;
    texts[fmt::format("a.jsonl#{}", i + 1)] = text;
  }
  put(folder.path() / "a.jsonl", json);
  for (CorpusOptions options :
       {corpus_of({(folder.path() / "texts").string()}), json_corpus_of({(folder.path() / "a.jsonl").string()})}) {
    options.max_document_bytes = 300;
    std::map<std::string, std::set<Split>> splits;
    std::map<std::string, std::string> parts;
    for (const Split half : {Split::kTrain, Split::kHeldOut}) {
      for (const auto& [id, text] : texts_by_id(read_corpus(options, {0.4, 1}, half, kKey))) {
        splits[id.substr(0, id.find("#part"))].insert(half);
        parts[id] = text;
        CHECK(text.size() <= 300);
        CHECK(text.back() == '\n');
      }
    }
    CHECK(splits.size() == 40);
    for (const auto& [id, halves] : splits) {
      CHECK(halves.size() == 1);
      const std::string& text = texts.at(id);
      if (text.size() <= 300) {
        CHECK(parts.at(id) == text);
        continue;
      }
      std::string joined;
      for (int number = 0; joined.size() < text.size(); ++number) {
        const std::string& part = parts.at(fmt::format("{}#part{}", id, number));
        joined += part;
        // No line more would have fitted.
        const std::size_t line = text.substr(joined.size(), 300).find('\n');
        CHECK((joined.size() == text.size() || part.size() + line + 1 > 300));
      }
      CHECK(joined == text);
    }
  }
}

TEST_CASE("Lines longer than a document are cut between characters") {
  const TemporaryFolder folder;
  SplitMix64 random(13);
  const std::filesystem::path path = folder.path() / "a.txt";
  CorpusOptions options = corpus_of({path.string()});
  for (int round = 0; round < 40; ++round) {
    std::string text = random_characters(random, 200);
    std::replace(text.begin(), text.end(), '\n', ' ');
    put(path, text);
    options.max_document_bytes = static_cast<std::int64_t>(64 + random.below(20));
    const auto parts = texts_by_id(read_all(options));
    std::string joined;
    for (std::size_t number = 0; number < parts.size(); ++number) {
      const std::string& part = parts.at(fmt::format("a.txt#part{}", number));
      REQUIRE(is_utf8(part));
      REQUIRE(static_cast<std::int64_t>(part.size()) <= options.max_document_bytes);
      REQUIRE((number + 1 == parts.size() || static_cast<std::int64_t>(part.size()) > options.max_document_bytes - 4));
      joined += part;
    }
    REQUIRE(joined == text);
  }
}

TEST_CASE("Answers to a prompt stay whole") {
  const TemporaryFolder folder;
  SplitMix64 random(14);
  const std::string answer = random_lines(random, 1000);
  put(folder.path() / "a.jsonl", Json({{"text", answer}, {"question", "what?"}}).dump() + "\n");
  CorpusOptions options = json_corpus_of({folder.path().string()});
  options.max_document_bytes = 100;
  options.prompt_field = "question";
  const std::vector<Document> documents = read_all(options);
  REQUIRE(documents.size() == 1);
  CHECK(completion_of(documents[0]) == answer);
}

// ---------------------------------------------------------------------------------------------------------------------
// Limits and options.

TEST_CASE("max_bytes keeps the first documents of the order, as many as it takes to reach it") {
  const TemporaryFolder folder;
  SplitMix64 random(15);
  (void)put_random_files(folder.path() / "texts", random, 40);
  std::string json;
  std::string text;
  for (int i = 0; i < 60; ++i) {
    json += Json({{"text", random_line(random, 9)}, {"question", random_line(random, 5)}}).dump() + "\n";
    text += "# heading\n" + random_lines(random, 100);
  }
  put(folder.path() / "a.jsonl", json);
  put(folder.path() / "a.txt", text);
  CorpusOptions pieces = corpus_of({(folder.path() / "a.txt").string()});
  pieces.separator = "^#";
  CorpusOptions questions = json_corpus_of({(folder.path() / "a.jsonl").string()});
  questions.prompt_field = "question";
  const auto bytes = [](const std::vector<Document>& documents) {
    return std::accumulate(documents.begin(), documents.end(), std::int64_t{0},
                           [](std::int64_t sum, const auto& d) { return sum + d.num_bytes(); });
  };
  for (CorpusOptions options : {corpus_of({(folder.path() / "texts").string()}), pieces, questions}) {
    const std::vector<Document> all = read_all(options);
    for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{1500}, bytes(all) - 1, bytes(all), bytes(all) + 1}) {
      options.max_bytes = limit;
      std::vector<Document> some = read_all(options);
      REQUIRE(some.size() <= all.size());
      CHECK(same(some, {all.begin(), all.begin() + static_cast<std::ptrdiff_t>(some.size())}));
      CHECK((bytes(some) >= limit || some.size() == all.size()));
      some.pop_back();
      CHECK(bytes(some) < limit);
    }
  }
}

TEST_CASE("Every option of a corpus is a recipe key, with its bounds") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "corpus.yaml";
  put(path,
      "recipe_version: 1\ndomain: d\nformat: jsonl\npaths: [a, b]\nsuffixes: [.x]\npackage: p\nseparator: s\n"
      "max_bytes: 5\nmin_document_bytes: 6\nmax_document_bytes: 70\ntext_field: t\nprompt_field: q\n"
      "prompt_template: '<{prompt}>'\n");
  CorpusOptions options;
  Problems problems;
  (void)read_recipe(path, {}, options.fields(), problems);
  CHECK(problems.joined().empty());
  CHECK(options.domain == "d");
  CHECK(options.format == "jsonl");
  CHECK(options.paths == std::vector<std::string>{"a", "b"});
  CHECK(options.suffixes == std::vector<std::string>{".x"});
  CHECK(options.package == "p");
  CHECK(options.separator == "s");
  CHECK(options.max_bytes == 5);
  CHECK(options.min_document_bytes == 6);
  CHECK(options.max_document_bytes == 70);
  CHECK(options.text_field == "t");
  CHECK(options.prompt_field == "q");
  CHECK(options.prompt_template == "<{prompt}>");

  put(path, "recipe_version: 1\nformat: xml\nmax_bytes: -1\nmin_document_bytes: -1\nmax_document_bytes: 63\n");
  CorpusOptions wrong;
  Problems found;
  (void)read_recipe(path, {}, wrong.fields(), found);
  CHECK(found.messages().size() == 6);  // domain and paths are required
  for (const char* key : {"domain", "paths", "format", "max_bytes", "min_document_bytes", "max_document_bytes"}) {
    CHECK(contains(found.joined(), key));
  }
}

}  // namespace
}  // namespace hestia
