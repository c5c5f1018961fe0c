#pragma once

#include <chrono>
#include <functional>

#include <torch/cuda.h>
#include <torch/types.h>

namespace hestia {

/// Wall-clock time of `work` in milliseconds, with the device idle before and after.
inline double milliseconds(const std::function<void()>& work, torch::Device device) {
  const auto wait = [&] {
    if (device.is_cuda()) {
      torch::cuda::synchronize(device.index());
    }
  };
  wait();
  const auto start = std::chrono::steady_clock::now();
  work();
  wait();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace hestia
