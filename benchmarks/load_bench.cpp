// Time to load a checkpoint, with its files in the page cache and without them, beside what bounds it: the disk (direct
// reads of the same files), the copy out of the page cache into page-locked memory, and the link to the GPU. Loads of a
// round: "cold"; "second_read", during which Linux moves each page to its list of those in use; "warm_new_process", of
// settled pages, with staging buffers made anew (so are those of the two before); "warm", with the buffers of the load
// before. Prints one JSON object.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <sys/resource.h>
#include <torch/cuda.h>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/median.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/placement.hpp"
#include "hestia/model/tensors.hpp"
#include "timing.hpp"

namespace {

using namespace hestia;

constexpr std::size_t kBlock = std::size_t{4} << 20;

struct Options {
  std::string model;
  std::string make;
  std::string device = "auto";
  std::string dtype = "bfloat16";
  int repeats = 5;
  int threads = 0;
  std::vector<std::size_t> block_kib = {};
  std::vector<std::size_t> lanes = {};
};

/// One load: all of it, and its parts in order, in milliseconds; they add up to it.
struct LoadTimes {
  double whole = 0.0;
  std::vector<std::pair<std::string, double>> parts;
};

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

/// Until the model is there and the device idle; `fresh`: staging buffers are made anew, as in a new process, and not
/// those of the load before. The model goes outside of the time.
LoadTimes time_load(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device, bool fresh) {
  if (device.is_cuda()) {
    c10::cuda::CUDACachingAllocator::emptyCache();
    if (fresh) {
      at::getHostAllocator(torch::kCUDA)->empty_cache();
    }
    torch::cuda::synchronize(device.index());
  }
  LoadTimes times;
  Clock::time_point part = Clock::now();
  const Clock::time_point begin = part;
  const auto end_part = [&] {
    if (!times.parts.empty()) {
      times.parts.back().second = since(part);
    }
    part = Clock::now();
  };
  const MoeModel model = load_model(directory, dtype, device, /*quiet=*/true, {}, [&](std::string_view name) {
    end_part();
    times.parts.emplace_back(name, 0.0);
  });
  if (device.is_cuda()) {
    torch::cuda::synchronize(device.index());
  }
  end_part();
  times.whole = since(begin);
  return times;
}

Json summary_of_parts(const std::vector<LoadTimes>& loads) {
  Json result = Json::object();
  for (std::size_t i = 0; i < loads.front().parts.size(); ++i) {
    std::vector<double> times;
    times.reserve(loads.size());
    for (const LoadTimes& load : loads) {
      times.push_back(load.parts.at(i).second);
    }
    result[loads.front().parts[i].first] = median(times) / 1e3;
  }
  return result;
}

std::vector<std::filesystem::path> files_of(const std::filesystem::path& model) {
  std::vector<std::filesystem::path> files;
  const SafetensorsCheckpoint checkpoint(model);
  for (const SafetensorsFile& file : checkpoint.files()) {
    files.push_back(file.path());
  }
  return files;
}

// Writes the files back and drops them from the page cache; returns the share that stayed.
double evict(const std::vector<std::filesystem::path>& files) {
  std::size_t pages = 0;
  std::size_t resident = 0;
  for (const auto& path : files) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    ::fdatasync(descriptor);
    ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
    ::close(descriptor);
    const MappedFile mapped(path);
    std::vector<unsigned char> state((mapped.bytes().size() + 4095) / 4096);
    ::mincore(const_cast<std::byte*>(mapped.bytes().data()), mapped.bytes().size(), state.data());
    pages += state.size();
    resident += static_cast<std::size_t>(std::count_if(state.begin(), state.end(), [](auto s) { return s & 1; }));
  }
  return static_cast<double>(resident) / static_cast<double>(pages);
}

// Runs `work(file, offset, bytes)` over all blocks of all files by all threads, each with a contiguous part; returns
// the number of bytes.
template <class Work>
std::size_t over_blocks(const std::vector<std::filesystem::path>& files, const Work& work) {
  struct Part {
    std::size_t file;
    std::size_t offset;
    std::size_t bytes;
  };
  std::vector<Part> parts;
  std::size_t total = 0;
  for (std::size_t f = 0; f < files.size(); ++f) {
    const std::size_t size = std::filesystem::file_size(files[f]);
    total += size;
    for (std::size_t offset = 0; offset < size; offset += kBlock) {
      parts.push_back({f, offset, std::min(kBlock, size - offset)});
    }
  }
  at::parallel_for(0, static_cast<std::int64_t>(parts.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    const torch::Tensor buffer =
        torch::empty({static_cast<std::int64_t>(kBlock + 4096)},
                     torch::TensorOptions().dtype(torch::kUInt8).pinned_memory(torch::cuda::is_available()));
    auto* data = static_cast<std::byte*>(buffer.data_ptr());
    data += 4096 - reinterpret_cast<std::uintptr_t>(data) % 4096;
    for (std::int64_t i = begin; i < end; ++i) {
      const Part& part = parts[static_cast<std::size_t>(i)];
      work(part.file, part.offset, part.bytes, data);
    }
  });
  return total;
}

// Bytes per second of direct reads; 0 where the file system has none.
double disk_rate(const std::vector<std::filesystem::path>& files) {
  std::vector<int> descriptors;
  descriptors.reserve(files.size());
  for (const auto& path : files) {
    descriptors.push_back(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  }
  std::atomic<bool> failed = false;
  std::size_t bytes = 0;
  const double elapsed = milliseconds(
      [&] {
        bytes = over_blocks(files, [&](std::size_t file, std::size_t offset, std::size_t size, std::byte* to) {
          const ssize_t got = ::pread(descriptors[file], to, (size + 4095) / 4096 * 4096, static_cast<off_t>(offset));
          failed = failed || got != static_cast<ssize_t>(size);
        });
      },
      torch::kCPU);
  for (const int descriptor : descriptors) {
    ::close(descriptor);
  }
  return failed ? 0.0 : static_cast<double>(bytes) / elapsed * 1e3;
}

double page_cache_rate(const std::vector<std::filesystem::path>& files) {
  std::size_t bytes = 0;
  std::vector<MappedFile> mapped;
  mapped.reserve(files.size());
  for (const auto& path : files) {
    mapped.emplace_back(path);
  }
  const double elapsed = milliseconds(
      [&] {
        bytes = over_blocks(files, [&](std::size_t file, std::size_t offset, std::size_t size, std::byte* to) {
          std::memcpy(to, mapped[file].bytes().data() + offset, size);
        });
      },
      torch::kCPU);
  return static_cast<double>(bytes) / elapsed * 1e3;
}

double link_rate(torch::Device device) {
  const auto options = torch::TensorOptions().dtype(torch::kUInt8);
  const std::int64_t bytes = std::int64_t{1} << 29;
  const torch::Tensor host = torch::empty({bytes}, options.pinned_memory(true)).fill_(7);
  const torch::Tensor there = torch::empty({bytes}, options.device(device));
  std::vector<double> times(9);
  for (double& time : times) {
    time = milliseconds([&] { there.copy_(host, /*non_blocking=*/true); }, device);
  }
  return static_cast<double>(bytes) / median(times) * 1e3;
}

Json summary(const std::vector<LoadTimes>& loads, double bytes, double bound) {
  std::vector<double> times;
  times.reserve(loads.size());
  for (const LoadTimes& load : loads) {
    times.push_back(load.whole);
  }
  const double middle = median(times);
  Json result = {{"median_s", middle / 1e3},
                 {"lowest_s", *std::min_element(times.begin(), times.end()) / 1e3},
                 {"highest_s", *std::max_element(times.begin(), times.end()) / 1e3},
                 {"gb_per_s", bytes / middle / 1e6}};
  if (bound > 0.0) {
    result["bound_gb_per_s"] = bound / 1e9;
    result["share_of_bound"] = bytes / middle * 1e3 / bound;
  }
  result["parts_s"] = summary_of_parts(loads);
  return result;
}

Json measure(const Options& options) {
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  const torch::Device device = device_from_recipe(options.device);
  const torch::Dtype dtype = dtype_from_recipe(options.dtype);
  const std::filesystem::path directory = options.model;
  if (!options.make.empty()) {
    const Architecture architecture = parse_architecture(Json::parse(read_text_file(options.make)), options.make);
    MoeModel model = create_model(architecture, torch::kBFloat16, device, 1);
    save_model(model, directory, torch::kBFloat16, std::size_t{5} << 30);
  }
  const std::vector<std::filesystem::path> files = files_of(directory);
  double bytes = 0.0;
  for (const auto& file : files) {
    bytes += static_cast<double>(std::filesystem::file_size(file));
  }
  const double link = device.is_cuda() ? link_rate(device) : 0.0;
  std::vector<double> disk;
  std::vector<double> cache;
  std::vector<LoadTimes> cold;
  std::vector<LoadTimes> second;
  std::vector<LoadTimes> fresh;
  std::vector<LoadTimes> warm;
  std::vector<std::vector<double>> placed(options.block_kib.size() * options.lanes.size());
  double stayed = 0.0;
  // Placing alone, with other blocks and lanes than load_model's.
  const auto place = [&] {
    const SafetensorsCheckpoint checkpoint(directory);
    MoeModel model(read_architecture(directory), dtype, device);
    std::vector<Placement> placements;
    for (const auto& [name, tensor] : model->named_tensors()) {
      placements.push_back({checkpoint.tensor(name), tensor});
    }
    std::ranges::stable_sort(placements, {}, [](const Placement& p) { return p.source.bytes.data(); });
    for (std::size_t i = 0; i < placed.size(); ++i) {
      const PlacementOptions settings = {.block_bytes = options.block_kib[i / options.lanes.size()] << 10,
                                         .device_lanes = options.lanes[i % options.lanes.size()]};
      placed[i].push_back(milliseconds([&] { place_tensors(placements, settings); }, device));
    }
  };
  for (int repeat = 0; repeat < options.repeats; ++repeat) {
    stayed = std::max(stayed, evict(files));
    disk.push_back(disk_rate(files));
    stayed = std::max(stayed, evict(files));
    cold.push_back(time_load(directory, dtype, device, /*fresh=*/true));
    second.push_back(time_load(directory, dtype, device, /*fresh=*/true));
    fresh.push_back(time_load(directory, dtype, device, /*fresh=*/true));
    warm.push_back(time_load(directory, dtype, device, /*fresh=*/false));
    if (!placed.empty()) {
      place();
    }
    cache.push_back(page_cache_rate(files));
  }
  const double disk_middle = median(disk);
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const double fastest_cold = link > 0.0 ? std::min(link, disk_middle) : disk_middle;
  const double cache_middle = median(cache);
  const double fastest_warm = link > 0.0 ? std::min(link, cache_middle) : cache_middle;
  Json places = Json::object();
  for (std::size_t i = 0; i < placed.size(); ++i) {
    places[fmt::format("{}_kib_{}_lanes", options.block_kib[i / options.lanes.size()],
                       options.lanes[i % options.lanes.size()])] = median(placed[i]) / 1e3;
  }
  return {
      {"benchmark", "loading a checkpoint"},
      {"version", program_version()},
      {"commit", program_commit()},
      {"machine", machine_info()},
      {"device", device.str()},
      {"threads", at::get_num_threads()},
      {"bytes", bytes},
      {"files", files.size()},
      {"dtype", options.dtype},
      {"repeats", options.repeats},
      {"probes_gb_per_s", {{"disk", disk_middle / 1e9}, {"page_cache_copy", cache_middle / 1e9}, {"link", link / 1e9}}},
      {"page_cache_share_left_before_cold", stayed},
      {"cold", summary(cold, bytes, fastest_cold)},
      {"second_read", summary(second, bytes, fastest_warm)},
      {"warm_new_process", summary(fresh, bytes, fastest_warm)},
      {"warm", summary(warm, bytes, fastest_warm)},
      {"warm_place_s", places},
      {"highest_resident_bytes", static_cast<double>(usage.ru_maxrss) * 1024.0}};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Options options;
    CLI::App app("Time to load a checkpoint, cold and warm, beside what bounds it; prints one JSON object.");
    app.add_option("MODEL", options.model, "model directory")->required();
    app.add_option("--make", options.make, "config.json: first write a model of it with random weights there");
    app.add_option("--device", options.device, "auto, cpu or cuda")->capture_default_str();
    app.add_option("--dtype", options.dtype, "dtype of the loaded model")->capture_default_str();
    app.add_option("--repeats", options.repeats, "rounds: disk, a cold load, three warm ones, page cache")
        ->capture_default_str();
    app.add_option("--threads", options.threads, "CPU threads; 0: as set by the environment")->capture_default_str();
    app.add_option("--block-kib", options.block_kib, "also time placing with these block sizes")->delimiter(',');
    app.add_option("--lanes", options.lanes, "and each of these numbers of threads for a GPU (16 if none is given)")
        ->delimiter(',');
    CLI11_PARSE(app, argc, argv);
    if (options.lanes.empty()) {
      options.lanes = {PlacementOptions{}.device_lanes};
    }
    std::cout << measure(options).dump(2) << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_load: %s\n", error.what());
    return 1;
  }
}
