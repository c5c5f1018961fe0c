#include "hestia/kernels/gpu_architecture.hpp"

#include <catch2/catch.hpp>

#include "hestia/kernels/soft_cache.hpp"

namespace hestia {
namespace {

TEST_CASE("kernels run on the architectures that they are compiled for, and on later ones where the code allows it") {
  const auto runs = [](const char* compiled, int major, int minor) {
    return gpu_architecture_refusal(compiled, major, minor).empty();
  };
  CHECK(runs("90", 9, 0));
  CHECK(runs("90", 12, 0));
  CHECK_FALSE(runs("90", 8, 9));
  CHECK(runs("80-real", 8, 9));
  CHECK_FALSE(runs("86-real", 8, 0));
  CHECK_FALSE(runs("80-real", 9, 0));
  CHECK(runs("80-virtual", 9, 0));
  CHECK_FALSE(runs("90-virtual", 8, 9));
  CHECK(runs("75-real,80-real,90-virtual", 8, 6));
  CHECK(runs("75-real,80-real,90-virtual", 10, 3));
  CHECK_FALSE(runs("75-real,80-real,90-virtual", 7, 0));
  CHECK(runs("90a", 9, 0));
  CHECK_FALSE(runs("90a", 10, 0));
  CHECK_FALSE(runs("90a-real", 9, 1));
  CHECK(runs("100f", 10, 3));
  CHECK_FALSE(runs("100f", 12, 0));
  CHECK(runs("native", 5, 0));
  CHECK(runs("", 9, 0));
}

TEST_CASE("the refusal of a GPU names it, what the build has, and what to do") {
  CHECK(gpu_architecture_refusal("90,100-real", 8, 0) ==
        "has compute capability 8.0, which kernels compiled for 90,100-real do not run on; configure with "
        "-DCMAKE_CUDA_ARCHITECTURES=80 and build again, or use the CPU");
  CHECK(compiled_gpu_architectures().empty() != has_cuda_kernels());
}

}  // namespace
}  // namespace hestia
