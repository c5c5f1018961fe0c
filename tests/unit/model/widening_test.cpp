#include "model/widening.hpp"

#include <cstring>
#include <random>

#include <catch2/catch.hpp>

#include <ATen/Parallel.h>
#include <torch/cuda.h>

#include "hestia/core/quantised.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"
#include "temporary_folder.hpp"

using namespace hestia;
using torch::Tensor;

namespace {

/// Some tensors of one kind in a file, and what they widen to, in one go.
struct Stored {
  Architecture architecture;
  std::vector<Widening> tensors;
  std::vector<Tensor> expected_MRC;
  std::int64_t bytes = 0;
};

Tensor random_bytes(const std::vector<std::int64_t>& shape, std::int64_t below) {
  return torch::randint(below, shape, torch::kUInt8);
}

std::span<const std::uint8_t> octets(const Tensor& bytes) {
  return {bytes.const_data_ptr<std::uint8_t>(), bytes.nbytes()};
}

// A view with the strides of a transposed tensor, of a slice, or of neither.
Tensor destination(const Tensor& like_MRC, std::size_t kind, torch::Dtype dtype, torch::Device device) {
  const std::vector<std::int64_t> sizes = like_MRC.sizes().vec();
  const auto options = torch::TensorOptions().dtype(dtype).device(device);
  switch (kind % 3) {
    case 0:
      return torch::full({sizes[0], sizes[2], sizes[1]}, -77.0, options).transpose(1, 2);
    case 1:
      return torch::full({sizes[0], sizes[1] + 2, sizes[2]}, -77.0, options).narrow(1, 1, sizes[1]);
    default:
      return torch::full(sizes, -77.0, options);
  }
}

Stored store(Quantisation kind, torch::Device device, const std::filesystem::path& path, std::mt19937& random) {
  Stored stored;
  stored.architecture.quantisation = kind;
  stored.architecture.scale_block_rows = 1 + random() % 9;
  stored.architecture.scale_block_columns = 1 + random() % 9;
  const auto size = [&](unsigned limit) { return static_cast<std::int64_t>(1 + random() % limit); };
  std::vector<std::pair<std::string, Tensor>> file;
  for (int i = 0; i < 6; ++i) {
    const std::int64_t matrices = kind == Quantisation::kFp8Blocks ? 1 : size(4);
    const std::int64_t rows = size(40);
    const std::string name = "tensor" + std::to_string(i);
    Tensor wide;
    if (kind == Quantisation::kMxfp4) {
      const std::int64_t groups = size(3);
      const Tensor blocks = random_bytes({matrices, rows, groups, 16}, 256);
      const Tensor scales = random_bytes({matrices, rows, groups}, 255);
      wide = torch::empty({matrices, rows, groups * 32});
      dequantise_mxfp4(octets(blocks), octets(scales),
                       {wide.mutable_data_ptr<float>(), static_cast<std::size_t>(wide.numel())});
      file.emplace_back(name, blocks);
      file.emplace_back(name + "_scales", scales);
    } else if (kind == Quantisation::kFp8Blocks) {
      const std::int64_t columns = size(40);
      const auto& a = stored.architecture;
      const Tensor bits = random_bytes({rows, columns}, 0x7f);
      const Tensor scales = torch::randn({(rows + a.scale_block_rows - 1) / a.scale_block_rows,
                                          (columns + a.scale_block_columns - 1) / a.scale_block_columns})
                                .to(i % 2 == 0 ? torch::kFloat32 : torch::kBFloat16);
      wide = torch::empty({1, rows, columns});
      const Tensor factors = scales.to(torch::kFloat32);
      dequantise_e4m3(octets(bits), {factors.const_data_ptr<float>(), static_cast<std::size_t>(factors.numel())},
                      columns, a.scale_block_rows, a.scale_block_columns,
                      {wide.mutable_data_ptr<float>(), static_cast<std::size_t>(wide.numel())});
      file.emplace_back(name, bits.view(torch::kFloat8_e4m3fn));
      file.emplace_back(name + "_scales", scales);
    } else {
      wide = torch::randn({matrices, rows, size(40)}).to(i % 2 == 0 ? torch::kFloat16 : torch::kFloat64);
      file.emplace_back(name, wide);
    }
    stored.expected_MRC.push_back(wide);
  }
  write_tensors(path, file);
  const SafetensorsFile written(path);
  for (std::size_t i = 0; i < stored.expected_MRC.size(); ++i) {
    const std::string name = "tensor" + std::to_string(i);
    Widening widening = {written.tensor(name), std::nullopt,
                         destination(stored.expected_MRC[i], i, i < 3 ? torch::kBFloat16 : torch::kFloat32, device)};
    if (kind != Quantisation::kNone) {
      widening.scales = written.tensor(name + "_scales");
    }
    stored.bytes += static_cast<std::int64_t>(widening.values.bytes.size());
    stored.tensors.push_back(std::move(widening));
  }
  return stored;
}

void check_widening(torch::Device device) {
  const unsigned seed = std::random_device{}();
  INFO("seed " << seed);
  const TemporaryFolder folder;
  for (const Quantisation kind : {Quantisation::kMxfp4, Quantisation::kFp8Blocks, Quantisation::kNone}) {
    for (const std::int64_t piece : {1, 70, 300, 1 << 20}) {
      for (const int threads : {1, 2, 5}) {
        CAPTURE(kind, piece, threads);
        std::mt19937 random(seed);
        torch::manual_seed(seed);
        at::set_num_threads(threads);
        const Stored stored = store(kind, device, folder.path() / "model.safetensors", random);
        std::int64_t advanced = 0;
        widen_tensors(stored.architecture, stored.tensors,
                      {.piece_values = piece, .advance = [&](std::int64_t bytes) { advanced += bytes; }});
        for (std::size_t i = 0; i < stored.tensors.size(); ++i) {
          const Tensor& widened = stored.tensors[i].destination_MRC;
          CHECK(torch::equal(widened.cpu(), stored.expected_MRC[i].to(widened.scalar_type())));
        }
        CHECK(advanced == stored.bytes);
      }
    }
  }
  at::set_num_threads(1);
}

}  // namespace

TEST_CASE("widened values do not depend on pieces and threads") {
  check_widening(torch::kCPU);
}

TEST_CASE("values are widened onto the GPU", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  check_widening(torch::Device(torch::kCUDA, 0));
}

TEST_CASE("a file that shrinks while it is widened is an error that names it") {
  const TemporaryFolder folder;
  std::mt19937 random(5);
  const std::filesystem::path path = folder.path() / "model.safetensors";
  const Stored stored = store(Quantisation::kMxfp4, torch::kCPU, path, random);
  std::filesystem::resize_file(path, 1000);
  CHECK_THROWS_WITH(widen_tensors(stored.architecture, stored.tensors),
                    Catch::Contains("model.safetensors") && Catch::Contains("the file ends there"));
}
