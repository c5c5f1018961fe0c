#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace hestia {

/// The middle of `values` by size, or the mean of the two in the middle. Throws std::invalid_argument for none.
[[nodiscard]] inline double median(std::vector<double> values) {
  if (values.empty()) {
    throw std::invalid_argument("median: of no values");
  }
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2.0;
}

}  // namespace hestia
