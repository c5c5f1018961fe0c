#include "hestia/evaluation/build_info.hpp"

#include <fstream>
#include <thread>

namespace hestia {

namespace {

// The value of the first `key : value` line of a /proc file; empty when there is none.
std::string proc_value(const char* path, const std::string& key) {
  std::ifstream stream(path);
  std::string line;
  while (std::getline(stream, line)) {
    if (line.rfind(key, 0) == 0) {
      const std::size_t colon = line.find(':');
      const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
      return colon == std::string::npos || begin == std::string::npos ? "" : line.substr(begin);
    }
  }
  return "";
}

}  // namespace

std::string program_version() {
  return HESTIA_VERSION;
}
std::string program_commit() {
  return HESTIA_COMMIT;
}
std::string program_compiler() {
  return HESTIA_COMPILER;
}

Json machine_info() {
  const std::string cpu = proc_value("/proc/cpuinfo", "model name");
  const std::string memory = proc_value("/proc/meminfo", "MemTotal");
  return {{"cpu", cpu.empty() ? "unknown" : cpu},
          {"cores", std::thread::hardware_concurrency()},
          {"memory_bytes", memory.empty() ? 0 : std::stoll(memory) * 1024}};
}

}  // namespace hestia
