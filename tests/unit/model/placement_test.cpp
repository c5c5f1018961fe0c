#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include <catch2/catch.hpp>

#include <ATen/Parallel.h>
#include <torch/cuda.h>

#include "hestia/core/error.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/placement.hpp"
#include "hestia/model/tensors.hpp"
#include "temporary_folder.hpp"

using namespace hestia;
using torch::Tensor;

namespace {

/// Random tensors of random shapes and dtypes behind one another in one buffer, as in a file, so that many start at
/// addresses their dtype is not aligned to.
struct Stored {
  std::vector<std::byte> bytes;
  std::vector<Placement> placements;
  std::vector<Tensor> values;
};

Stored random_tensors(unsigned seed, torch::Device device) {
  std::mt19937 random(seed);
  const std::vector<torch::Dtype> dtypes = {torch::kFloat32, torch::kBFloat16, torch::kFloat16, torch::kFloat64};
  torch::manual_seed(seed);
  Stored stored;
  std::vector<std::size_t> begins;
  for (int i = 0; i < 24; ++i) {
    std::vector<std::int64_t> shape;
    for (unsigned d = 0; d < random() % 4; ++d) {
      shape.push_back(static_cast<std::int64_t>(i == 7 ? 0 : 1 + random() % 23));
    }
    const Tensor value = torch::randn(shape).to(dtypes[random() % dtypes.size()]);
    stored.values.push_back(value);
    stored.bytes.resize(stored.bytes.size() + random() % 3);
    begins.push_back(stored.bytes.size());
    stored.bytes.resize(stored.bytes.size() + value.nbytes());
    std::memcpy(stored.bytes.data() + begins.back(), value.const_data_ptr(), value.nbytes());
  }
  for (std::size_t i = 0; i < stored.values.size(); ++i) {
    const Tensor& value = stored.values[i];
    stored.placements.push_back(
        {{"tensor", safetensors_dtype(value.scalar_type()), value.sizes().vec(),
          std::span(stored.bytes).subspan(begins[i], value.nbytes())},
         torch::full(value.sizes(), -77.0,
                     torch::TensorOptions().dtype(dtypes[random() % dtypes.size()]).device(device))});
  }
  return stored;
}

void check_placement(torch::Device device) {
  const unsigned seed = std::random_device{}();
  INFO("seed " << seed);
  for (const std::size_t block_bytes : {std::size_t{1}, std::size_t{40}, std::size_t{1000}, std::size_t{1} << 22}) {
    for (const int threads : {1, 2, 5}) {
      Stored stored = random_tensors(seed, device);
      at::set_num_threads(threads);
      std::int64_t advanced = 0;
      place_tensors(stored.placements,
                    {.block_bytes = block_bytes, .advance = [&](std::int64_t bytes) { advanced += bytes; }});
      std::int64_t total = 0;
      for (std::size_t i = 0; i < stored.values.size(); ++i) {
        const Tensor& destination = stored.placements[i].destination;
        CHECK(torch::equal(destination.cpu(), stored.values[i].to(destination.scalar_type())));
        total += static_cast<std::int64_t>(stored.values[i].nbytes());
      }
      CHECK(advanced == total);
    }
  }
  at::set_num_threads(1);
}

}  // namespace

TEST_CASE("loops over at::parallel_for run on as many threads as are set") {
  // A caller compiled without OpenMP would run them on one, without a word.
  at::set_num_threads(3);
  std::mutex adding;
  std::set<std::thread::id> threads;
  at::parallel_for(0, 3, 1, [&](std::int64_t, std::int64_t) {
    const std::lock_guard lock(adding);
    threads.insert(std::this_thread::get_id());
  });
  at::set_num_threads(1);
  CHECK(threads.size() == 3);
}

TEST_CASE("every value is placed, whatever the block, the dtype, the alignment and the threads") {
  check_placement(torch::kCPU);
}

TEST_CASE("every value is placed on the GPU", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  check_placement(torch::Device(torch::kCUDA, 0));
}

TEST_CASE("a placement that cannot be written straight through is refused") {
  const Tensor value = torch::randn({4, 3});
  const TensorView view = {"w", DType::kF32, {4, 3}, {static_cast<const std::byte*>(value.const_data_ptr()), 48}, {}};
  CHECK_THROWS_AS(place_tensors({{view, torch::zeros({3, 4})}}), std::invalid_argument);
  CHECK_THROWS_AS(place_tensors({{view, torch::zeros({3, 4}).t()}}), std::invalid_argument);
  CHECK_NOTHROW(place_tensors({}));
}

TEST_CASE("a file that shrinks while it is placed is an error, not a crash") {
  const TemporaryFolder folder;
  const Tensor value = torch::randn({300, 40});
  SafetensorsWriter writer;
  writer.add("w", DType::kF32, {300, 40}, {static_cast<const std::byte*>(value.const_data_ptr()), 48'000});
  writer.write(folder.path() / "model.safetensors");
  const SafetensorsFile file(folder.path() / "model.safetensors");
  std::filesystem::resize_file(file.path(), 20'000);
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    std::int64_t advanced = 0;
    CHECK_THROWS_WITH(place_tensors({{file.tensor("w"), torch::zeros({300, 40})}},
                                    {.block_bytes = 64, .advance = [&](std::int64_t bytes) { advanced += bytes; }}),
                      Catch::Contains("model.safetensors") && Catch::Contains("the file ends there"));
    CHECK(advanced < 20'000);
  }
  at::set_num_threads(1);
}
