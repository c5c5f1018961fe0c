#include <iostream>

#include <fmt/format.h>
#include <torch/cuda.h>

#include "commands.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/kernels/soft_cache.hpp"

namespace hestia {

void add_version(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("version", "print versions, commit and what this build can do");
  verb->footer("Example: hestia version");
  verb->callback([] {
    std::cout << fmt::format("hestia {} ({})\nLibTorch {}\ncompiler {}\nHestia's CUDA kernels: {}\nGPUs seen: {}\n",
                             program_version(), program_commit(), HESTIA_TORCH_VERSION, program_compiler(),
                             has_cuda_kernels() ? "compiled" : "not compiled", torch::cuda::device_count());
  });
}

}  // namespace hestia
