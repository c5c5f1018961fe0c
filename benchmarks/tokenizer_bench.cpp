// Encoding rate of a tokeniser on a text file, one thread: bench_tokenizer TOKENIZER TEXT [REPEATS]. Prints one JSON
// object. The whole text is one call.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/data/tokenizer.hpp"

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv, argv + argc);  // NOLINT(*-pointer-arithmetic)
    if (arguments.size() < 3) {
      std::cerr << "usage: bench_tokenizer TOKENIZER TEXT [REPEATS]\n";
      return 2;
    }
    const auto tokenizer = hestia::open_tokenizer(arguments[1]);
    const std::string text = hestia::read_text_file(arguments[2]);
    const int repeats = arguments.size() > 3 ? std::max(1, std::stoi(arguments[3])) : 7;
    std::vector<double> rates;
    std::size_t num_ids = 0;
    for (int i = 0; i < repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      num_ids = tokenizer->encode(text).size();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      rates.push_back(static_cast<double>(text.size()) / seconds.count() / 1e6);
    }
    std::sort(rates.begin(), rates.end());
    const hestia::Json result = {{"benchmark", "encoding, one thread"},
                                 {"bytes", text.size()},
                                 {"ids", num_ids},
                                 {"vocab_size", tokenizer->vocab_size()},
                                 {"repeats", repeats},
                                 {"median_megabytes_per_second", hestia::median(rates)},
                                 {"highest_megabytes_per_second", rates.back()},
                                 {"lowest_megabytes_per_second", rates.front()}};
    std::cout << result.dump(2) << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
