#include <chrono>
#include <cmath>
#include <cstdlib>
#include <regex>
#include <sstream>
#include <thread>

#include <catch2/catch.hpp>

#include "core_fixtures.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "stderr_capture.hpp"

namespace hestia {
namespace {

// What a terminal of `columns` shows after `text`, line by line. Knows carriage return and "erase to the end".
std::vector<std::string> screen(const std::string& text) {
  std::vector<std::string> lines = {""};
  std::size_t column = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n') {
      lines.emplace_back();
      column = 0;
    } else if (text[i] == '\r') {
      column = 0;
    } else if (text.compare(i, 3, "\033[K") == 0) {
      lines.back().resize(column);
      i += 2;
    } else {
      lines.back().resize(std::max(lines.back().size(), column + 1), ' ');
      lines.back()[column++] = text[i];
    }
  }
  return lines;
}

TEST_CASE("Log lines go to stderr, with a word for what is not plain information") {
  StderrCapture capture;
  set_log_level(LogLevel::kInfo);
  log_debug("hidden");
  log_info("plain");
  log(LogLevel::kWarn, "odd");
  log_error("bad");
  set_log_level(LogLevel::kError);
  log_info("hidden");
  log(LogLevel::kWarn, "hidden");
  log_error("worse");
  set_log_level(LogLevel::kDebug);
  log_debug("shown");
  set_log_level(LogLevel::kInfo);
  CHECK(capture.text() == "plain\nwarning: odd\nerror: bad\nerror: worse\nshown\n");
}

TEST_CASE("Colour on a terminal, none with NO_COLOR") {
  {
    StderrCapture capture(80);
    log_error("bad");
    CHECK(contains(capture.text(), "\033[31merror:\033[0m bad"));
  }
  ::setenv("NO_COLOR", "1", 1);
  StderrCapture capture(80);
  log_error("bad");
  const std::string text = capture.text();
  ::unsetenv("NO_COLOR");
  CHECK(contains(text, "error: bad"));
  CHECK_FALSE(contains(text, "\033"));
}

TEST_CASE("Warnings are remembered once each, in order, even when the level hides them") {
  clear_degradations();
  StderrCapture capture;
  log_warning("slots reduced to 5");
  log_warning("memory is not pinned");
  log_warning("slots reduced to 5");
  set_log_level(LogLevel::kError);
  log_warning("no overlap");
  set_log_level(LogLevel::kInfo);
  CHECK(capture.text() == "warning: slots reduced to 5\nwarning: memory is not pinned\n");
  CHECK(degradations() == std::vector<std::string>{"slots reduced to 5", "memory is not pinned", "no overlap"});
  clear_degradations();
  CHECK(degradations().empty());
}

TEST_CASE("Lines of several threads do not tear") {
  StderrCapture capture;
  std::vector<std::thread> threads;
  for (char letter = 'a'; letter < 'e'; ++letter) {
    threads.emplace_back([letter] {
      for (int i = 0; i < 20; ++i) {
        log_info(std::string(40, letter));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  std::istringstream lines(capture.text());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    CHECK(line == std::string(40, line.at(0)));
  }
  CHECK(count == 80);
}

TEST_CASE("A wrong HESTIA_LOG is an error, not a guess") {
  ::setenv("HESTIA_LOG", "verbose", 1);
  CHECK(error_text<UsageError>(check_log_environment) ==
        "HESTIA_LOG: must be one of debug, info, warn, error, got \"verbose\"; set one of them or unset it");
  ::setenv("HESTIA_LOG", "debug", 1);
  CHECK_NOTHROW(check_log_environment());
  ::unsetenv("HESTIA_LOG");
  CHECK_NOTHROW(check_log_environment());
}

TEST_CASE("Blocks are aligned") {
  StderrCapture capture;
  log_block("Model", {{"layers", "6"}, {"experts a layer", "32"}, {"k", "4"}});
  CHECK(capture.text() == "Model\n  layers           6\n  experts a layer  32\n  k                4\n");
}

TEST_CASE("Without a terminal a bar is one plain line at the end") {
  StderrCapture capture;
  {
    Progress progress("train", 4000, "tok");
    for (int i = 0; i < 4; ++i) {
      progress.advance(1000, "loss 2.5");
    }
    progress.print_line("step 1");
    progress.finish();
    progress.finish();  // said once
  }
  const std::string text = capture.text();
  CHECK(std::regex_match(text,
                         std::regex("step 1\ntrain 100% 4000/4000 tok, [0-9.]+[kMG]? tok/s, [0-9.]+ s, loss 2.5\n")));
}

TEST_CASE("A quiet bar prints nothing") {
  StderrCapture capture;
  {
    Progress progress("train", 10, "tok", true);
    progress.advance(10);
    progress.print_line("line");
  }
  CHECK(capture.text().empty());
}

TEST_CASE("On a terminal a bar overwrites itself and fits the width") {
  for (const int columns : {80, 120, 40}) {
    StderrCapture capture(columns);
    {
      Progress progress("fine-tune", 1'000'000, "tok");
      for (int i = 0; i < 3; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(110));
        progress.advance(200'000,
                         "loss 2.4183, norm 0.41, \xC3\xA9\xC3\xA9\xC3\xA9 a long note that the width may cut");
      }
      progress.print_line("step 3 | loss 2.4");
    }
    const std::vector<std::string> lines = screen(capture.text());
    REQUIRE(lines.size() == 3);  // the step line, the final bar, and nothing after it
    CHECK(lines[0] == "step 3 | loss 2.4");
    CHECK(contains(lines[1], "fine-tune [##############.........."));
    CHECK(lines[2].empty());
    for (const std::string& line : lines) {
      const auto characters = std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xC0) != 0x80; });
      CHECK(characters < columns);
    }
    if (columns >= 80) {
      CHECK(contains(lines[1], "60% 600.0k/1.00M tok, "));
    }
  }
}

TEST_CASE("A running bar on a terminal shows rate and time left") {
  StderrCapture capture(120);
  std::string drawn;
  {
    Progress progress("evaluate", 1000, "seq");
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    progress.advance(500);
    drawn = capture.text();
  }
  CHECK(std::regex_search(drawn, std::regex("50% 500/1000 seq, [0-9.]+k? seq/s, [0-9.]+ s left")));
}

TEST_CASE("A log line clears the bar it meets") {
  ::setenv("NO_COLOR", "1", 1);
  StderrCapture capture(80);
  {
    Progress progress("train", 100, "tok");
    std::this_thread::sleep_for(std::chrono::milliseconds(110));
    progress.advance(50);
    log_info("saved");
    log_info("again");
  }
  const std::vector<std::string> lines = screen(capture.text());
  ::unsetenv("NO_COLOR");
  REQUIRE(lines.size() == 4);
  CHECK(lines[0] == "saved");
  CHECK(lines[1] == "again");
  CHECK(contains(lines[2], "train ["));
}

TEST_CASE("A bar of unknown length counts") {
  StderrCapture capture;
  {
    Progress progress("read", 0, "files");
    progress.advance(7);
  }
  CHECK(std::regex_match(capture.text(), std::regex("read 7 files, [0-9.]+[kMG]? files/s, [0-9.]+ s\n")));
}

TEST_CASE("Short forms of counts, bytes and times") {
  CHECK(format_count(0) == "0");
  CHECK(format_count(1234) == "1234");
  CHECK(format_count(0.25) == "0.2");
  CHECK(format_count(12'345) == "12.3k");
  CHECK(format_count(9999.97) == "10.0k");
  CHECK(format_count(999'960) == "1.00M");
  CHECK(format_count(34'700'000) == "34.70M");
  CHECK(format_count(999'996'000) == "1.00G");
  CHECK(format_count(-20'000) == "-20.0k");
  CHECK(format_bytes(512) == "512 B");
  CHECK(format_bytes(1023.7) == "1.0 KiB");
  CHECK(format_bytes(1536) == "1.5 KiB");
  CHECK(format_bytes(1024 * 1024 - 1) == "1.0 MiB");
  CHECK(format_bytes(12.3 * 1024 * 1024) == "12.3 MiB");
  CHECK(format_bytes(79.25 * 1024 * 1024 * 1024) == "79.25 GiB");
  CHECK(format_seconds(4.21) == "4.2 s");
  CHECK(format_seconds(59.97) == "1m 00s");
  CHECK(format_seconds(83) == "1m 23s");
  CHECK(format_seconds(3599.7) == "1h 00m");
  CHECK(format_seconds(7'380) == "2h 03m");
  CHECK(format_seconds(INFINITY) == "unknown");
  CHECK(format_seconds(NAN) == "unknown");
}

}  // namespace
}  // namespace hestia
