#include "hestia/kernels/gpu_architecture.hpp"

#include <charconv>

namespace hestia {
namespace {

// Whether code compiled for one entry of the list runs.
bool runs(std::string_view entry, int capability) {
  const bool real_only = entry.ends_with("-real");
  const bool virtual_only = entry.ends_with("-virtual");
  entry = entry.substr(0, entry.find('-'));
  int compiled = 0;
  const auto [end, failure] = std::from_chars(entry.data(), entry.data() + entry.size(), compiled);
  if (failure != std::errc()) {
    return true;
  }
  const std::string_view suffix(end, static_cast<std::size_t>(entry.data() + entry.size() - end));
  if (suffix == "a") {
    return capability == compiled;
  }
  const bool in_family = capability / 10 == compiled / 10 && capability >= compiled;
  return (in_family && !virtual_only) || (capability >= compiled && suffix.empty() && !real_only);
}

}  // namespace

std::string_view compiled_gpu_architectures() {
  return HESTIA_GPU_ARCHITECTURES;
}

std::string gpu_architecture_refusal(std::string_view architectures, int major, int minor) {
  const int capability = 10 * major + minor;
  for (std::string_view rest = architectures; !rest.empty();) {
    const std::size_t end = rest.find(',');
    if (runs(rest.substr(0, end), capability)) {
      return "";
    }
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
  }
  if (architectures.empty()) {
    return "";  // another message says that there are no kernels
  }
  return "has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         ", which kernels compiled for " + std::string(architectures) +
         " do not run on; configure with -DCMAKE_CUDA_ARCHITECTURES=" + std::to_string(capability) +
         " and build again, or use the CPU";
}

}  // namespace hestia
