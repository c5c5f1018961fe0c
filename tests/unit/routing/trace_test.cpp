#include "hestia/routing/trace.hpp"

#include <fstream>
#include <functional>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/hdf5.hpp"
#include "hestia/core/log.hpp"
#include "hestia/routing/simulator.hpp"
#include "routing_fixtures.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::random_trace;
using testing::recorded_trace;
using testing::same_trace;
using testing::TraceShape;

const std::string kHeader =
    "# route_trace v1\n"
    "# model=tiny n_layer=4 n_expert=8 n_expert_used=2\n"
    "# layer=1 expert_bytes=100 dense_bytes=50\n"
    "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n";
// Lines 5 to 10 of a whole file.
const std::string kRows =
    "0,0,0,1,0,3,0.75,0,100\n"
    "0,0,0,1,1,5,0.25,0,100\n"
    "0,1,1,1,0,5,0.5,0,100\n"
    "0,1,1,1,1,2,0.5,0,100\n"
    "0,1,2,1,0,2,0.625,0,100\n"
    "0,1,2,1,1,7,0.375,0,100\n";

std::filesystem::path write(const TemporaryFolder& folder, const std::string& text,
                            const std::string& name = "trace.csv") {
  const std::filesystem::path path = folder.path() / name;
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

RoutingTrace parse(const std::string& text) {
  const TemporaryFolder folder;
  return read_trace(write(folder, text));
}

std::string failure(const std::string& text) {
  const TemporaryFolder folder;
  const std::filesystem::path path = write(folder, text);
  try {
    (void)read_trace(path);
  } catch (const InputError& error) {
    std::string message = error.what();
    const std::size_t at = message.find(path.string());
    REQUIRE(at == 0);
    return message.substr(path.string().size());
  }
  return "no error";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

TEST_CASE("a route_trace is read column by column") {
  const RoutingTrace trace = parse(kHeader + kRows);
  CHECK(trace.model == "tiny");
  CHECK(trace.num_layers == 4);
  CHECK(trace.num_experts == 8);
  CHECK(trace.top_k == 2);
  REQUIRE(trace.layers.size() == 1);
  CHECK(trace.layers[0].layer == 1);
  CHECK(trace.layers[0].expert_bytes == 100);
  CHECK(trace.layers[0].dense_bytes == 50);
  REQUIRE(trace.entries.size() == 3);
  CHECK(trace.entries[0].phase == Phase::kPrefill);
  CHECK(trace.entries[1].phase == Phase::kDecode);
  CHECK(trace.entries[2].step == 2);
  CHECK(trace.experts == std::vector<std::uint16_t>{3, 5, 5, 2, 2, 7});
  CHECK(trace.weights == std::vector<float>{0.75F, 0.25F, 0.5F, 0.5F, 0.625F, 0.375F});
  CHECK(trace.residency.empty());
  CHECK(trace.moved_bytes.empty());
}

TEST_CASE("a trace keeps what its recorder's cache began with, and refuses what no cache can begin with") {
  const std::string line = "# layer=1 expert_bytes=100 dense_bytes=50";
  const auto with = [&](const std::string& preload) { return replaced(kHeader, line, line + preload) + kRows; };
  CHECK(parse(with(" preload=7,0,3")).layers[0].preload == std::vector<std::uint16_t>{7, 0, 3});
  CHECK_THAT(failure(with(" preload=7,8")), Catch::Contains("layer 1 must name different experts below 8, got 8"));
  CHECK_THAT(failure(with(" preload=7,0,7")), Catch::Contains("different experts below 8, got 7"));
  CHECK_THAT(failure(with(" preload=7,,1")), Catch::Contains("preload must be a whole number"));
  CHECK_THAT(failure(with(" preload=1\n# layer=2 expert_bytes=100")), Catch::Contains("preload of layer 2"));
}

TEST_CASE("a packed trace may hold the router logits of its steps, or of the first of them") {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "trace.h5";
  const RoutingTrace trace = testing::trace_of(5, {{3, 1}, {0, 4}, {2, 1}});
  std::vector<float> logits;
  for (int i = 0; i < 15; ++i) {
    logits.push_back(static_cast<float>(i * i % 7) - 2.75F);
  }
  write_trace_hdf5(path, trace, logits);
  CHECK(read_trace_logits(path) == logits);
  CHECK(same_trace(read_trace(path), trace));
  logits.resize(10);  // of the first two steps only
  write_trace_hdf5(path, trace, logits);
  CHECK(read_trace_logits(path) == logits);
  CHECK(same_trace(read_trace(path), trace));
  logits.pop_back();
  CHECK_THROWS_AS(write_trace_hdf5(path, trace, logits), std::invalid_argument);
  logits.resize(20);
  CHECK_THROWS_AS(write_trace_hdf5(path, trace, logits), std::invalid_argument);
  write_trace_hdf5(path, trace);
  CHECK(read_trace_logits(path).empty());
}

TEST_CASE("the order of slots, carriage returns and unlisted layers do not matter") {
  const std::string swapped = replaced(kRows, "0,0,0,1,0,3,0.75,0,100\n0,0,0,1,1,5,0.25,0,100\n",
                                       "0,0,0,1,1,5,0.25,0,100\n0,0,0,1,0,3,0.75,0,100\n");
  const RoutingTrace expected = parse(kHeader + kRows);
  CHECK(same_trace(parse(kHeader + swapped), expected));
  std::string dos;
  for (const char character : kHeader + kRows) {
    dos += character == '\n' ? std::string("\r\n") : std::string(1, character);
  }
  CHECK(same_trace(parse(dos), expected));
  const RoutingTrace more = parse(kHeader + kRows + "0,1,2,3,0,4,1,0,240\n0,1,2,3,1,6,0,0,240\n");
  REQUIRE(more.layers.size() == 2);
  CHECK(more.layers[1].layer == 3);
  CHECK(more.layers[1].expert_bytes == 240);
}

TEST_CASE("comments, unknown model keys and spaces in the model name are kept") {
  const std::string text =
      "# route_trace v1\n# recorded by hand\n# model=/my models/a b.gguf arch=qwen3moe n_layer=4 n_expert=8 "
      "n_expert_used=2 note=two words\n" +
      kHeader.substr(kHeader.find("turn")) + kRows;
  const RoutingTrace trace = parse(text);
  CHECK(trace.model == "/my models/a b.gguf");
  CHECK(trace.comment == "recorded by hand\narch=qwen3moe note=two words");
  const TemporaryFolder folder;
  write_trace_csv(folder.path() / "again.csv", trace);
  CHECK(same_trace(read_trace(folder.path() / "again.csv"), trace));
}

TEST_CASE("rows recorded layer by layer are put in step order") {
  const std::string by_layer =
      "0,0,0,0,0,1,0.5,0,9\n0,0,0,0,1,2,0.5,0,9\n0,0,1,0,0,3,0.5,0,9\n0,0,1,0,1,4,0.5,0,9\n"
      "0,0,0,2,0,5,0.5,1,0\n0,0,0,2,1,6,0.5,0,8\n0,0,1,2,0,7,0.5,0,8\n0,0,1,2,1,0,0.5,0,8\n";
  const RoutingTrace trace = parse(kHeader + by_layer);
  REQUIRE(trace.entries.size() == 4);
  CHECK(trace.entries[1].layer == 2);
  CHECK(trace.entries[1].step == 0);
  CHECK(trace.entries[2].layer == 0);
  CHECK(trace.entries[2].step == 1);
  CHECK(trace.experts == std::vector<std::uint16_t>{1, 2, 5, 6, 3, 4, 7, 0});
  CHECK(trace.residency == std::vector<std::uint8_t>{0, 0, 1, 0, 0, 0, 0, 0});
  CHECK(trace.moved_bytes == std::vector<std::int64_t>{9, 9, 0, 8, 9, 9, 8, 8});
}

TEST_CASE("a CSV trace written twice has the same bytes") {
  SplitMix64 random(51);
  const TemporaryFolder folder;
  for (int round = 0; round < 10; ++round) {
    TraceShape shape;
    shape.top_k = 1 + static_cast<std::int64_t>(random.below(5));
    shape.skip = round % 2 == 0 ? 0.3 : 0.0;
    RoutingTrace trace = random_trace(random, shape);
    trace.comment = "one line\nand another";
    // Small weights are written with an exponent.
    trace.weights[0] = 1.5e-7F;
    if (round % 3 == 0) {
      for (std::size_t i = 0; i < trace.experts.size(); ++i) {
        trace.residency.push_back(static_cast<std::uint8_t>(random.below(2)));
        trace.moved_bytes.push_back(static_cast<std::int64_t>(random.below(5000)));
      }
    }
    write_trace_csv(folder.path() / "one.csv", trace);
    const RoutingTrace back = read_trace(folder.path() / "one.csv");
    CHECK(same_trace(back, trace));
    write_trace_csv(folder.path() / "two.csv", back);
    CHECK(read_text_file(folder.path() / "one.csv") == read_text_file(folder.path() / "two.csv"));
  }
}

TEST_CASE("the recorded trace survives rewriting", "[golden]") {
  const auto path = recorded_trace();
  if (!path) {
    return;
  }
  const RoutingTrace trace = read_trace(*path);
  CHECK(trace.num_layers == 48);
  CHECK(trace.num_experts == 128);
  CHECK(trace.top_k == 6);
  CHECK(trace.layers.size() == 48);
  CHECK(trace.comment == "arch=qwen3moe");
  CHECK(trace.experts.size() == 36864 + 7902);
  CHECK(std::count(trace.residency.begin(), trace.residency.end(), 1) == 29597);
  const TemporaryFolder folder;
  write_trace_csv(folder.path() / "one.csv", trace);
  const RoutingTrace back = read_trace(folder.path() / "one.csv");
  CHECK(same_trace(back, trace));
  write_trace_csv(folder.path() / "two.csv", back);
  CHECK(read_text_file(folder.path() / "one.csv") == read_text_file(folder.path() / "two.csv"));

  // The last layer of its prefill served one token only: such a trace cannot be packed, its decode steps can.
  CHECK_THROWS_AS(write_trace_hdf5(folder.path() / "whole.h5", trace), UsageError);
  RoutingTrace decode = trace;
  std::erase_if(decode.entries, [](const TraceEntry& entry) { return entry.phase == Phase::kPrefill; });
  write_trace_hdf5(folder.path() / "decode.h5", decode);
  const RoutingTrace packed = read_trace(folder.path() / "decode.h5");
  CHECK(packed.experts.size() == 36864);
  SimulationOptions options;
  options.slots = 16;
  CHECK(simulate(packed, options).hits == 22522);
}

TEST_CASE("the packed form keeps everything but the last bits of the weights") {
  SplitMix64 random(52);
  const TemporaryFolder folder;
  for (int round = 0; round < 4; ++round) {
    RoutingTrace trace = random_trace(random, TraceShape{});
    trace.comment = "packed";
    if (round % 2 == 0) {
      for (std::size_t i = 0; i < trace.experts.size(); ++i) {
        trace.residency.push_back(static_cast<std::uint8_t>(random.below(2)));
        trace.moved_bytes.push_back(static_cast<std::int64_t>(random.below(5000)));
      }
    }
    write_trace_hdf5(folder.path() / "trace.h5", trace);
    RoutingTrace back = read_trace(folder.path() / "trace.h5");
    for (std::size_t i = 0; i < trace.weights.size(); ++i) {
      CHECK(back.weights[i] == half_bits_to_float(float_to_half_bits(trace.weights[i])));
    }
    trace.weights = back.weights;
    CHECK(same_trace(back, trace));
  }
}

TEST_CASE("traces that do not fit the packed form are refused with the reason") {
  SplitMix64 random(53);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "trace.h5";
  const RoutingTrace whole = random_trace(random, TraceShape{});
  RoutingTrace trace = whole;
  trace.entries.erase(trace.entries.begin() + 5);
  CHECK_THROWS_AS(write_trace_hdf5(path, trace), UsageError);
  trace.entries.erase(trace.entries.begin() + 9);
  CHECK_THROWS_WITH(write_trace_hdf5(path, trace), Catch::Contains("lacks layer") && Catch::Contains("as CSV"));
  trace = whole;
  trace.entries[4].count -= 1;
  CHECK_THROWS_WITH(write_trace_hdf5(path, trace), Catch::Contains("needs 3 experts in every step, got 2"));
  trace = whole;
  trace.entries[1].phase = trace.entries[0].phase == Phase::kDecode ? Phase::kPrefill : Phase::kDecode;
  CHECK_THROWS_WITH(write_trace_hdf5(path, trace), Catch::Contains("one phase per step"));
  CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("a damaged packed trace is refused with the reason") {
  SplitMix64 random(54);
  const TemporaryFolder folder;
  const std::filesystem::path path = folder.path() / "trace.h5";
  const auto make = [&](std::int64_t version, const std::string& format, const std::vector<std::int64_t>& layers,
                        const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& experts,
                        std::vector<std::int64_t> steps, std::int64_t expert_bytes = 5) {
    H5File file = H5File::create(path);
    file.write_attribute("/", "format", format);
    file.write_attribute("/", "format_version", version);
    file.write_attribute("/", "model", std::string("m"));
    file.write_attribute("/", "comment", std::string());
    file.write_attribute("/", "num_layers", std::int64_t{4});
    file.write_attribute("/", "num_experts", std::int64_t{8});
    file.write_attribute("/", "top_k", std::int64_t{2});
    file.write_attribute("/", "layers", layers);
    file.write_attribute("/", "expert_bytes", std::vector<std::int64_t>(layers.size(), expert_bytes));
    file.write_attribute("/", "dense_bytes", std::vector<std::int64_t>(layers.size(), 6));
    const std::vector<std::uint16_t> weights(experts.size(), 0x3800);
    const std::vector<std::int64_t> sequences(steps.size(), 0);
    const std::vector<std::uint8_t> phases(steps.size(), 1);
    const auto num_steps = static_cast<std::int64_t>(steps.size());
    file.write("/trace/expert", H5Type::kInt64, shape, experts.data());  // any integer type is read
    file.write("/trace/weight", H5Type::kFloat16, shape, weights.data());
    file.write("/trace/sequence", H5Type::kInt64, {num_steps}, sequences.data());
    file.write("/trace/step", H5Type::kInt64, {num_steps}, steps.data());
    file.write("/trace/phase", H5Type::kUInt8, {num_steps}, phases.data());
    file.close();
  };
  const auto message = [&] {
    try {
      (void)read_trace(path);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const std::string format = "hestia route_trace";
  make(1, format, {1}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1});
  CHECK(message() == "no error");
  make(2, format, {1}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("version 2 is newer than this program supports (1)"));
  make(1, "something", {1}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("got \"something\" 1"));
  make(1, format, {4}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("below num_layers (4), got 4"));
  make(1, format, {1, 2}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("/trace/expert must have shape [2, 2, 2], got [2, 1, 2]"));
  make(1, format, {1}, {2, 1, 2}, {3, 8, 5, 6}, {0, 1});
  CHECK_THAT(message(),
             Catch::Contains("expert must be at least 0 and below num_experts (8), got 8 at step 0, layer 1"));
  make(1, format, {1}, {2, 1, 2}, {3, -1, 5, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("below num_experts (8), got -1 at step 0, layer 1"));
  make(1, format, {1}, {2, 1, 2}, {3, 4, 5, 6}, {-1, 1});
  CHECK_THAT(message(), Catch::Contains("step must be at least 0, got -1 at position 0"));
  make(1, format, {1}, {2, 1, 2}, {3, 4, 5, 6}, {0, 1}, INT64_MAX);
  CHECK_THAT(message(), Catch::Contains("expert_bytes and dense_bytes must lie between 0 and 1099511627776, got 9223"));
  make(1, format, {1}, {2, 1, 2}, {3, 4, 6, 6}, {0, 1});
  CHECK_THAT(message(), Catch::Contains("expert 6 stands twice at step 1, layer 1"));
  make(1, format, {1}, {2, 1, 2}, {3, 4, 5, 6}, {1, 1});
  CHECK_THAT(message(), Catch::Contains("steps of a sequence must rise, got 1 after 1"));
  {
    H5File file = H5File::create(path);
    file.write_attribute("/", "format", format);
    file.close();
  }
  CHECK_THAT(message(), Catch::Contains("/trace/expert is missing"));
  std::filesystem::resize_file(path, 300);
  CHECK_THAT(message(), Catch::Contains(path.string()));
  CHECK(message() != "no error");
}

TEST_CASE("llama.cpp's pairs: a step begins where the layer falls, file order is the rank") {
  const RoutingTrace trace = parse("layer,expert\n0,5\n0,2\n3,7\n3,1\n0,2\n0,6\n3,0\n3,7\n3,4\n");
  CHECK(trace.num_layers == 4);
  CHECK(trace.num_experts == 8);
  CHECK(trace.top_k == 3);
  REQUIRE(trace.layers.size() == 2);
  CHECK(trace.layers[1].layer == 3);
  REQUIRE(trace.entries.size() == 4);
  CHECK(trace.entries[1].step == 0);
  CHECK(trace.entries[2].step == 1);
  CHECK(trace.entries[3].count == 3);
  CHECK(trace.entries[0].phase == Phase::kDecode);
  CHECK(trace.experts == std::vector<std::uint16_t>{5, 2, 7, 1, 2, 6, 0, 7, 4});
  CHECK(trace.weights == std::vector<float>(9, 0.0F));
  SimulationOptions options;
  options.slots = 2;
  CHECK(simulate(trace, options).hits == 2);

  CHECK_THAT(failure("layer,expert\n0,5\n0,5\n"), Catch::Contains(":3: expert 5 of layer 0 stands already in line 2"));
  CHECK_THAT(failure("layer,expert\n0,5,1\n"), Catch::Contains(":2: expected 2 columns (layer,expert), got 3"));
  CHECK_THAT(failure("layer,expert\n0,5\n0,x\n"), Catch::Contains(":3: layer and expert must be whole numbers"));
  CHECK_THAT(failure("layer,expert\n-1,5\n"), Catch::Contains(":2: layer must lie between 0"));
  CHECK_THAT(failure("layer,expert\n0,70000\n"), Catch::Contains(":2: expert must lie between 0 and 65535, got 70000"));
  CHECK_THAT(failure("layer,expert\n"), Catch::Contains("no rows"));
}

TEST_CASE("damaged traces are refused with file, line and value") {
  const auto with_row = [](const std::string& row) { return failure(kHeader + kRows + row + "\n"); };
  CHECK(failure(kHeader + kRows) == "no error");

  SECTION("header") {
    CHECK_THAT(failure(""), Catch::Contains("the file is empty"));
    CHECK_THAT(failure(kRows), Catch::Contains(":1: not a routing trace: expected \"# route_trace v1\"") &&
                                   Catch::Contains("got \"0,0,0,1,0,3,0.75,0,100\""));
    CHECK_THAT(
        failure(replaced(kHeader, "v1", "v2") + kRows),
        Catch::Contains(":1: route_trace version 2 is newer than this program supports (1); update the program"));
    CHECK_THAT(failure(replaced(kHeader, "v1", "vx") + kRows), Catch::Contains("not a number, got \"x\""));
    CHECK_THAT(failure(replaced(kHeader, " n_expert=8", "") + kRows), Catch::Contains("lacks n_layer, n_expert"));
    CHECK_THAT(failure(replaced(kHeader, "n_expert=8", "n_expert=-8") + kRows),
               Catch::Contains(":2: n_expert must be a whole number between 1 and 65536, got \"-8\""));
    CHECK_THAT(failure(replaced(kHeader, "n_expert=8", "n_expert=99999999") + kRows), Catch::Contains(":2: n_expert"));
    CHECK_THAT(failure(replaced(kHeader, "n_expert_used=2", "n_expert_used=9") + kRows),
               Catch::Contains(":2: n_expert_used must be at most n_expert (8), got 9"));
    CHECK_THAT(failure(replaced(kHeader, "expert_bytes=100", "expert_bytes=9223372036854775807") + kRows),
               Catch::Contains(":3: expert_bytes must be a whole number between 0 and 1099511627776, got \"9223"));
    CHECK_THAT(failure(replaced(kHeader, "# layer=1", "# layer=4") + kRows),
               Catch::Contains("must be below n_layer (4), got 4"));
    CHECK_THAT(failure(replaced(kHeader, "# layer=1", "# layer=1\n# layer=1") + kRows),
               Catch::Contains(":4: layer 1 is described twice"));
    CHECK_THAT(failure(replaced(kHeader, "weight,", "") + kRows),
               Catch::Contains(":4: wrong column line") && Catch::Contains("slot,expert,residency"));
    CHECK_THAT(failure(kHeader.substr(0, kHeader.find("turn"))), Catch::Contains(":3: the column line is missing"));
    CHECK_THAT(failure(kHeader.substr(0, kHeader.find("turn")) + kRows), Catch::Contains(":4: wrong column line"));
  }
  SECTION("a cut file") {
    const std::string whole = kHeader + kRows;
    CHECK_THAT(failure(whole.substr(0, whole.size() - 1)),
               Catch::Contains(":10: the last line does not end in a newline"));
    CHECK_THAT(failure(whole.substr(0, whole.size() - 9)), Catch::Contains("cut short"));
    // Cut in the last column, with the newline put back: still too few columns, or a number that says something else.
    CHECK_THAT(failure(whole.substr(0, whole.size() - 7) + "\n"), Catch::Contains(":10: expected 9 columns"));
    clear_degradations();
    CHECK(failure(kHeader + kRows.substr(0, kRows.find("0,1,2,1,1"))) == "no error");
    const std::vector<std::string> warnings = degradations();
    REQUIRE(warnings.size() == 1);
    CHECK_THAT(warnings[0], Catch::Contains("the last step and layer has 1 experts of 2"));
    clear_degradations();
  }
  SECTION("columns") {
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0"),
               Catch::Contains(":11: expected 9 columns") && Catch::Contains("got 8 in \"0,1,3,1,0,2,0.5,0\""));
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0,100,7"),
               Catch::Contains(":11: expected 9 columns") && Catch::Contains("got 10"));
    CHECK_THAT(with_row(""), Catch::Contains(":11: expected 9 columns"));
    CHECK_THAT(with_row("# a comment"), Catch::Contains(":11: expected 9 columns"));
    CHECK_THAT(with_row("0,1,3,1,0,two,0.5,0,100"), Catch::Contains(":11: expert must be a whole number, got \"two\""));
    CHECK_THAT(with_row("0,1,3,1,0,2.5,0.5,0,100"), Catch::Contains(":11: expert must be a whole number, got \"2.5\""));
    CHECK_THAT(with_row("0,1,3,1,0,2,much,0,100"), Catch::Contains(":11: weight must be a number, got \"much\""));
    CHECK_THAT(with_row("0,1,3,1,0,2,,0,100"), Catch::Contains(":11: weight must be a number, got \"\""));
    CHECK_THAT(with_row("0,1,99999999999999999999,1,0,2,0.5,0,100"),
               Catch::Contains(":11: step must be a whole number"));
  }
  SECTION("values") {
    CHECK_THAT(with_row("0,1,3,1,0,8,0.5,0,100"),
               Catch::Contains(":11: expert must lie between 0 and 7 (n_expert - 1), got 8"));
    CHECK_THAT(with_row("0,1,3,1,0,-1,0.5,0,100"),
               Catch::Contains(":11: expert must lie") && Catch::Contains("got -1"));
    CHECK_THAT(with_row("0,2,3,1,0,2,0.5,0,100"), Catch::Contains(":11: phase must lie between 0 and 1"));
    CHECK_THAT(with_row("0,1,3,4,0,2,0.5,0,100"), Catch::Contains(":11: layer must lie between 0 and 3"));
    CHECK_THAT(with_row("0,1,3,1,2,2,0.5,0,100"), Catch::Contains(":11: slot must lie between 0 and 1"));
    CHECK_THAT(with_row("0,1,3,1,0,2,nan,0,100"), Catch::Contains(":11: weight must be finite"));
    CHECK_THAT(with_row("0,1,3,1,0,2,inf,0,100"), Catch::Contains(":11: weight must be finite"));
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,7,100"), Catch::Contains(":11: residency must lie between 0 and 1"));
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0,-4"), Catch::Contains(":11: expert_bytes must lie"));
    CHECK_THAT(with_row("0,1,-3,1,0,2,0.5,0,4"), Catch::Contains(":11: step must lie"));
  }
  SECTION("slots and experts of one step") {
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0,100\n0,1,3,1,0,3,0.5,0,100"),
               Catch::Contains(":12: slot 0 of step 3, layer 1 stands already in line 11"));
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0,100\n0,1,3,1,1,2,0.5,0,100"),
               Catch::Contains(":12: expert 2 of step 3, layer 1 stands already in line 11"));
    CHECK_THAT(with_row("0,1,3,1,1,2,0.5,0,100"),
               Catch::Contains(":11: slot 0 is missing among the 1 rows of step 3, layer 1"));
    CHECK_THAT(with_row("0,1,3,1,1,2,0.5,0,100\n0,1,4,1,0,2,0.5,0,100"), Catch::Contains(":11: slot 0 is missing"));
    CHECK_THAT(with_row("0,1,3,1,0,2,0.5,0,100\n0,0,3,1,1,3,0.5,0,100"), Catch::Contains(":12: phase differs"));
  }
  SECTION("order") {
    CHECK_THAT(with_row("0,1,1,1,0,2,0.5,0,100"), Catch::Contains(":11: step 1 of layer 1 comes after its step 2"));
    CHECK_THAT(with_row("1,1,0,1,0,2,0.5,0,100\n0,1,3,1,0,2,0.5,0,100"),
               Catch::Contains(":12: turn 0 comes back after another turn began"));
  }
}

TEST_CASE("any cut of a trace is refused or gives whole entries") {
  SplitMix64 random(55);
  const TemporaryFolder folder;
  TraceShape shape;
  shape.num_sequences = 2;
  shape.max_steps = 6;
  const RoutingTrace trace = random_trace(random, shape);
  write_trace_csv(folder.path() / "whole.csv", trace);
  const std::string text = read_text_file(folder.path() / "whole.csv");
  set_log_level(LogLevel::kError);
  for (std::size_t size = 0; size < text.size(); ++size) {
    const std::filesystem::path path = write(folder, text.substr(0, size), "cut.csv");
    if (size > 0 && text[size - 1] == '\n' && size > text.find("turn,")) {
      CHECK_NOTHROW(read_trace(path));
    } else {
      CHECK_THROWS_AS(read_trace(path), InputError);
    }
  }
  set_log_level(LogLevel::kInfo);
  clear_degradations();
}

TEST_CASE("random damage never does worse than an input error") {
  SplitMix64 random(56);
  const TemporaryFolder folder;
  TraceShape shape;
  shape.max_steps = 6;
  write_trace_csv(folder.path() / "whole.csv", random_trace(random, shape));
  const std::string text = read_text_file(folder.path() / "whole.csv");
  set_log_level(LogLevel::kError);
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string damaged = text;
    for (std::uint64_t i = 1 + random.below(3); i > 0; --i) {
      damaged[random.below(damaged.size())] = "0123456789,-.\n #=ex"[random.below(19)];
    }
    try {
      const RoutingTrace trace = read_trace(write(folder, damaged, "damaged.csv"));
      (void)simulate(trace, SimulationOptions{});
    } catch (const InputError&) {
      ++refused;
    }
  }
  set_log_level(LogLevel::kInfo);
  clear_degradations();
  CHECK(refused > 1000);
}

TEST_CASE("a missing trace names its path") {
  CHECK_THROWS_AS(read_trace("/nowhere/trace.csv"), InputError);
  CHECK_THROWS_WITH(read_trace("/nowhere/trace.csv"), Catch::Contains("/nowhere/trace.csv"));
}

TEST_CASE("recorded sequences append as prefill and decode steps") {
  SplitMix64 random(57);
  RoutingTrace trace;
  SequenceRouting sequence;
  sequence.id = 3;
  sequence.num_prompt_tokens = 2;
  sequence.num_tokens = 5;
  sequence.num_layers = 2;
  sequence.num_experts = 9;
  sequence.top_k = 3;
  for (int row = 0; row < 10; ++row) {
    for (const std::uint16_t expert : testing::random_experts(random, 9, 3)) {
      sequence.selected.push_back(expert);
      sequence.weights.push_back(static_cast<float>(random.uniform()));
    }
  }
  append_sequence(trace, sequence);
  CHECK(trace.num_layers == 2);
  CHECK(trace.num_experts == 9);
  REQUIRE(trace.entries.size() == 10);
  for (std::size_t token = 0; token < 5; ++token) {
    for (std::size_t layer = 0; layer < 2; ++layer) {
      const TraceEntry& entry = trace.entries[token * 2 + layer];
      CHECK(entry.sequence == 3);
      CHECK(entry.step == static_cast<std::int64_t>(token));
      CHECK(entry.layer == static_cast<std::int32_t>(layer));
      CHECK(entry.phase == (token < 2 ? Phase::kPrefill : Phase::kDecode));
      for (std::size_t k = 0; k < 3; ++k) {
        CHECK(trace.experts_of(entry)[k] == sequence.selected[(layer * 5 + token) * 3 + k]);
        CHECK(trace.weights_of(entry)[k] == sequence.weights[(layer * 5 + token) * 3 + k]);
      }
    }
  }
  SequenceRouting second = sequence;
  second.id = 4;
  second.weights.clear();
  append_sequence(trace, second);
  CHECK(trace.entries.size() == 20);
  CHECK(trace.weights.back() == 0.0F);
  CHECK_THROWS_WITH(append_sequence(trace, second), Catch::Contains("same id"));
  second.id = 5;
  second.selected.pop_back();
  CHECK_THROWS_WITH(append_sequence(trace, second), Catch::Contains("29 selected experts"));
  // Both written forms take what was appended.
  const TemporaryFolder folder;
  write_trace_csv(folder.path() / "t.csv", trace);
  CHECK(same_trace(read_trace(folder.path() / "t.csv"), trace));
  write_trace_hdf5(folder.path() / "t.h5", trace);
  CHECK(read_trace(folder.path() / "t.h5").experts == trace.experts);
}

}  // namespace
}  // namespace hestia
