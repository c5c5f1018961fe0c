#include <string>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/runtime/slot_executor.hpp"
#include "tests/unit/model/model_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;

namespace {

ExpertSlots parse(const std::string& text, std::int64_t num_selected = 2) {
  Architecture a = small_architecture();  // 3 MoE layers of 6 experts, top 2
  return parse_expert_slots(text, a, 1024, num_selected);
}

std::string message_of(const std::string& text) {
  try {
    (void)parse(text);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("slots are given per layer, for one pool, or by memory") {
  CHECK(parse("4").per_layer == 4);
  CHECK(parse("4").pool == 0);
  CHECK(parse("total:7").pool == 7);
  CHECK(parse("total:7").per_layer == 0);
  // 14 KiB hold 14 blobs, 2 of them scratch: 12 slots for 3 layers.
  CHECK(parse("memory:14KiB").per_layer == 4);
  CHECK(parse("memory:14336").per_layer == 4);
  CHECK(parse("memory:14336B").per_layer == 4);
  CHECK(parse("memory:13.9KiB").per_layer == 3);
  CHECK(parse("memory:14KiB", 1).per_layer == 4);  // one scratch slot, a slot left over
  CHECK(parse("memory:15KiB", 1).per_layer == 4);
  CHECK(parse("memory:16KiB", 1).per_layer == 5);
  CHECK(parse("memory:1GiB").per_layer == 6);  // no more than there are experts
  CHECK(parse("memory:4KiB").per_layer == 0);  // two slots for three layers
  CHECK(parse("memory:4KiB").pool == 2);
}

TEST_CASE("fetch paths and prefetching have names, and a name that is none is refused with the nearest") {
  for (const std::string& name : fetch_path_names()) {
    CHECK(fetch_path_name(fetch_path_from_name(name)) == name);
  }
  for (const std::string& name : prefetch_names()) {
    CHECK(prefetch_name(prefetch_from_name(name)) == name);
  }
  CHECK_THROWS_WITH(fetch_path_from_name("copy"), Catch::Contains("fetch path: unknown name, got \"copy\"") &&
                                                      Catch::Contains("auto, together, copies, waves, staged"));
  CHECK_THROWS_WITH(prefetch_from_name("next_gate"), Catch::Contains("prefetch: unknown name, got \"next_gate\"") &&
                                                         Catch::Contains("did you mean \"next-gate\"?"));
}

TEST_CASE("what is no number of slots is refused with the forms there are") {
  for (const std::string text : {"", "x", "4x", "0", "-1", "7", "total:", "total:0", "total:19", "total:3.5", "memory:",
                                 "memory:GiB", "memory:-1GiB", "memory:nan", "memory:1TiB", "memory:2KiB", "16 "}) {
    CAPTURE(text);
    const std::string message = message_of(text);
    CHECK(message.find("--expert-slots") != std::string::npos);
    CHECK(message.find("\"" + text + "\"") != std::string::npos);
    CHECK(message.find("memory:6GiB") != std::string::npos);
  }
  CHECK(message_of("7").find("from 1 to 6 for 3 MoE layers of 6 experts") != std::string::npos);
}
