// How large preferences.h5 becomes and how fast it is written and read, on made-up routing of realistic shape: every
// sequence prefers some experts of each layer, its tokens draw their experts from that preference.
//
//     bench_preferences --folder DIR [--sequences N] [--repeats N] [--max-sequences N] [--layers L] [--experts E]
//                       [--top-k K] [--tokens T] [--deflate LEVEL] [--shuffle 0|1] [--chunk-kib N] [--buffer-mib N]
//
// Prints one JSON object. Times are of add() and close() alone; making the routing is not counted. Peak memory is the
// process's, the made-up routing of one sequence included.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include <sys/resource.h>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/core/random.hpp"
#include "hestia/routing/preferences.hpp"

namespace hestia {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::int64_t peak_bytes() {
  struct rusage usage {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

double gauss(SplitMix64& random) {
  return std::sqrt(-2.0 * std::log(1.0 - random.uniform())) * std::cos(2.0 * M_PI * random.uniform());
}

// Draws from a fixed distribution over experts in constant time (Walker's alias method).
class ExpertSampler {
 public:
  explicit ExpertSampler(const std::vector<double>& probabilities) : keep_(probabilities.size()), other_(keep_.size()) {
    std::vector<double> scaled;
    std::vector<std::size_t> small;
    std::vector<std::size_t> large;
    for (std::size_t e = 0; e < probabilities.size(); ++e) {
      scaled.push_back(probabilities[e] * static_cast<double>(probabilities.size()));
      (scaled[e] < 1.0 ? small : large).push_back(e);
    }
    std::fill(keep_.begin(), keep_.end(), 1.0);
    while (!small.empty() && !large.empty()) {
      const std::size_t low = small.back();
      small.pop_back();
      const std::size_t high = large.back();
      keep_[low] = scaled[low];
      other_[low] = static_cast<std::uint16_t>(high);
      scaled[high] -= 1.0 - scaled[low];
      if (scaled[high] < 1.0) {
        large.pop_back();
        small.push_back(high);
      }
    }
  }
  std::uint16_t draw(SplitMix64& random) const {
    const double place = random.uniform() * static_cast<double>(keep_.size());
    const auto e = static_cast<std::size_t>(place);
    return place - static_cast<double>(e) < keep_[e] ? static_cast<std::uint16_t>(e) : other_[e];
  }

 private:
  std::vector<double> keep_;
  std::vector<std::uint16_t> other_;
};

struct Shape {
  std::int64_t layers = 16;
  std::int64_t experts = 64;
  std::int64_t top_k = 8;
  std::int64_t tokens = 300;
};

// Logits of each layer's popularity plus `spread` times a sequence's own taste.
void fill(SequenceRouting& routing, const Shape& shape, const std::vector<double>& popularity, double spread,
          SplitMix64& random) {
  const auto experts = static_cast<std::size_t>(shape.experts);
  for (std::int64_t layer = 0; layer < shape.layers; ++layer) {
    std::vector<double> p(experts);
    double sum = 0.0;
    for (std::size_t e = 0; e < experts; ++e) {
      p[e] = std::exp(popularity[static_cast<std::size_t>(layer) * experts + e] + spread * gauss(random));
      sum += p[e];
    }
    for (double& value : p) {
      value /= sum;
    }
    const ExpertSampler sampler(p);
    for (std::int64_t token = 0; token < routing.num_tokens; ++token) {
      const auto row = static_cast<std::size_t>(layer * routing.num_tokens + token);
      std::uint16_t* chosen = routing.selected.data() + row * static_cast<std::size_t>(shape.top_k);
      float* probability = routing.probabilities.data() + row * experts;
      std::transform(p.begin(), p.end(), probability, [](double value) { return static_cast<float>(value); });
      for (std::int64_t k = 0; k < shape.top_k;) {
        const std::uint16_t expert = sampler.draw(random);
        if (std::find(chosen, chosen + k, expert) == chosen + k) {
          chosen[k++] = expert;
        }
      }
      // A token moves probability towards what it chose.
      for (std::size_t e = 0; e < experts; ++e) {
        probability[e] *= 0.5F;
      }
      for (std::int64_t k = 0; k < shape.top_k; ++k) {
        probability[chosen[k]] += 0.5F / static_cast<float>(shape.top_k);
      }
    }
  }
}

int run(const std::map<std::string, std::string>& arguments) {
  const auto number = [&](const std::string& name, std::int64_t otherwise) {
    const auto found = arguments.find(name);
    return found == arguments.end() ? otherwise : std::stoll(found->second);
  };
  const std::int64_t num_sequences = number("--sequences", 100000);
  const std::int64_t repeats = number("--repeats", 3);
  const Shape shape{number("--layers", 16), number("--experts", 64), number("--top-k", 8), number("--tokens", 300)};
  PreferenceWriterOptions options;
  options.max_sequences = number("--max-sequences", options.max_sequences);
  options.deflate_level = static_cast<int>(number("--deflate", options.deflate_level));
  options.shuffle = number("--shuffle", options.shuffle ? 1 : 0) != 0;
  options.chunk_bytes = number("--chunk-kib", options.chunk_bytes / 1024) * 1024;
  options.buffer_bytes = number("--buffer-mib", options.buffer_bytes >> 20) << 20;
  const std::filesystem::path path = std::filesystem::path(arguments.at("--folder")) / "bench_preferences.h5";
  std::vector<std::int64_t> model_layers(static_cast<std::size_t>(shape.layers));
  std::iota(model_layers.begin(), model_layers.end(), std::int64_t{0});

  std::vector<double> write_seconds;
  std::vector<double> close_seconds;
  std::vector<double> scan_seconds;
  std::vector<double> pick_seconds;
  std::int64_t file_bytes = 0;
  std::int64_t stored = 0;
  std::int64_t peak_writing = 0;
  constexpr std::int64_t kBlock = 1024;
  constexpr std::int64_t kPicks = 200;
  for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
    SplitMix64 random(derive_seed(1, "bench") + static_cast<std::uint64_t>(repeat));
    std::vector<double> popularity(static_cast<std::size_t>(shape.layers * shape.experts));
    std::generate(popularity.begin(), popularity.end(), [&] { return 0.7 * gauss(random); });
    double writing = 0.0;
    {
      PreferenceWriter writer(path, shape.layers, shape.experts, model_layers, options);
      SequenceRouting routers[2];
      for (std::int64_t id = 0; id < num_sequences; ++id) {
        const std::int64_t tokens =
            shape.tokens / 2 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(shape.tokens + 1)));
        for (std::size_t router = 0; router < 2; ++router) {
          SequenceRouting& routing = routers[router];
          routing.id = id;
          routing.task = "domain " + std::to_string(id % 5);
          routing.num_tokens = tokens;
          routing.num_prompt_tokens = tokens / 5;
          routing.num_layers = shape.layers;
          routing.num_experts = shape.experts;
          routing.top_k = shape.top_k;
          const auto rows = static_cast<std::size_t>(shape.layers * tokens);
          routing.selected.resize(rows * static_cast<std::size_t>(shape.top_k));
          routing.probabilities.resize(rows * static_cast<std::size_t>(shape.experts));
          fill(routing, shape, popularity, router == 0 ? 1.0 : 1.4, random);
        }
        const auto start = Clock::now();
        writer.add(routers[0], routers[1]);
        writing += seconds_since(start);
      }
      const auto start = Clock::now();
      writer.close();
      close_seconds.push_back(seconds_since(start));
      write_seconds.push_back(writing + close_seconds.back());
      peak_writing = peak_bytes();
    }
    file_bytes = static_cast<std::int64_t>(std::filesystem::file_size(path));
    const PreferenceReader reader(path);
    stored = reader.num_stored();
    auto start = Clock::now();
    std::uint64_t sum = 0;  // of what was read, so that nothing is optimised away
    for (std::int64_t first = 0; first < stored; first += kBlock) {
      const PreferenceRows rows = reader.rows(PreferenceRouter::kTuned, first, std::min(kBlock, stored - first));
      sum = std::accumulate(rows.count.begin(), rows.count.end(), sum);
    }
    scan_seconds.push_back(seconds_since(start));
    start = Clock::now();
    for (std::int64_t i = 0; i < kPicks; ++i) {
      const std::vector<std::int64_t> place = {
          static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(stored)))};
      sum += reader.rows(PreferenceRouter::kTuned, place).count[0];
    }
    pick_seconds.push_back(seconds_since(start) / kPicks);
    if (sum == 0) {
      throw RunError("bench_preferences: nothing was read back");
    }
    std::filesystem::remove(path);
  }
  const double raw = static_cast<double>(stored * shape.layers * shape.experts * 2 * 6);
  std::cout << Json(
                   {{"sequences", num_sequences},
                    {"stored", stored},
                    {"layers", shape.layers},
                    {"experts", shape.experts},
                    {"top_k", shape.top_k},
                    {"mean_tokens", shape.tokens},
                    {"max_sequences", options.max_sequences},
                    {"deflate_level", options.deflate_level},
                    {"shuffle", options.shuffle},
                    {"chunk_bytes", options.chunk_bytes},
                    {"buffer_bytes", options.buffer_bytes},
                    {"repeats", repeats},
                    {"file_bytes", file_bytes},
                    {"bytes_per_stored_sequence", static_cast<double>(file_bytes) / static_cast<double>(stored)},
                    {"compressed_to", static_cast<double>(file_bytes) / raw},
                    {"write_seconds", write_seconds},
                    {"median_sequences_per_second_written", static_cast<double>(num_sequences) / median(write_seconds)},
                    {"median_close_seconds", median(close_seconds)},
                    {"median_sequences_per_second_scanned", static_cast<double>(stored) / median(scan_seconds)},
                    {"median_milliseconds_per_picked_sequence", 1e3 * median(pick_seconds)},
                    {"peak_bytes_writing", peak_writing},
                    {"peak_bytes", peak_bytes()}})
                   .dump(2)
            << "\n";
  return 0;
}

}  // namespace
}  // namespace hestia

int main(int argc, char** argv) {
  std::map<std::string, std::string> arguments;
  for (int i = 1; i + 1 < argc; i += 2) {
    arguments[argv[i]] = argv[i + 1];
  }
  if (argc % 2 == 0 || arguments.count("--folder") == 0) {
    std::cerr
        << "usage: bench_preferences --folder DIR [--sequences N] [--repeats N] ...; see the head of the source\n";
    return 2;
  }
  try {
    return hestia::run(arguments);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
