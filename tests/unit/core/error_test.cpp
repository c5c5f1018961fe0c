#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/error.hpp"

namespace hestia {
namespace {

TEST_CASE("Every error carries the exit code of its kind") {
  CHECK(RunError("x").exit_code() == ExitCode::kFailed);
  CHECK(UsageError("x").exit_code() == ExitCode::kUsage);
  CHECK(InputError("x").exit_code() == ExitCode::kInput);
  CHECK(InterruptedError("x").exit_code() == ExitCode::kInterrupted);
  CHECK(static_cast<int>(ExitCode::kInterrupted) == 130);
}

TEST_CASE("Problems are thrown together, one a line") {
  Problems problems;
  CHECK_NOTHROW(problems.throw_usage_if_any());
  CHECK_NOTHROW(problems.throw_input_if_any());
  problems.add("a.yaml:1: first");
  problems.add("a.yaml:2: second");
  CHECK(error_text<UsageError>([&] { problems.throw_usage_if_any(); }) == "a.yaml:1: first\na.yaml:2: second");
  CHECK(error_text<InputError>([&] { problems.throw_input_if_any(); }) == "a.yaml:1: first\na.yaml:2: second");
}

TEST_CASE("nearest_name finds what was meant and nothing else") {
  const std::vector<std::string> names = {"load_balance", "reuse", "trust", "lru", "lfu", "steps"};
  CHECK(nearest_name("load_balence", names) == "load_balance");
  CHECK(nearest_name("loadbalance", names) == "load_balance");
  CHECK(nearest_name("setps", names) == "steps");  // one swap, not two edits
  CHECK(nearest_name("lur", names) == "lru");
  CHECK(nearest_name("reuse", names) == "reuse");
  CHECK(nearest_name("temperature", names).empty());
  CHECK(nearest_name("xy", names).empty());  // everything short is two edits from it
  CHECK(nearest_name("reuse", {}).empty());
  // At twelve letters four edits are near, five are not.
  CHECK(nearest_name("load_bal____", names) == "load_balance");
  CHECK(nearest_name("load_ba_____", names).empty());
}

}  // namespace
}  // namespace hestia
