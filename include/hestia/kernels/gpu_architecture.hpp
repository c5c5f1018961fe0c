#pragma once

#include <string>
#include <string_view>

namespace hestia {

/// The GPU architectures that this build's CUDA kernels are compiled for, as CMake writes them, with commas between
/// them ("90", "80,90-real", "90a"); empty in a build without them.
[[nodiscard]] std::string_view compiled_gpu_architectures();

/// Why kernels compiled for `architectures` do not run on a GPU of compute capability major.minor; empty when they do.
/// Machine code ("90", "90-real") runs on the same major version from its minor one on, intermediate code ("90",
/// "90-virtual") on everything from it on, "90a" on 9.0 alone, "100f" on the same major version from its minor one on.
/// Words that are no numbers, such as "native", refuse nothing.
[[nodiscard]] std::string gpu_architecture_refusal(std::string_view architectures, int major, int minor);

}  // namespace hestia
