#pragma once

#include <cstdint>
#include <vector>

#include "hestia/architecture/dense_checkpoint.hpp"
#include "hestia/architecture/upcycle.hpp"

namespace hestia {

/// Text that a dense model writes by itself to measure what its routers will see.
struct SamplingOptions {
  std::int64_t sequences = 64;
  std::int64_t length = 32;  ///< Tokens of each, the first included.
  std::uint64_t seed = 1;
  bool quiet = false;  ///< No progress bar.
};

/// Moments of the input of every layer's feed-forward network, hence of the router that `upcycle` puts before it, while
/// `dense` samples text from itself (temperature 1, from its bos token on; token 0 where it has none). The first
/// position, whose hidden state is unlike all others, is not counted. Runs in float32 on the CPU.
/// Throws UsageError for rotary scaling that this program does not run and for fewer than one sequence or two tokens.
[[nodiscard]] std::vector<RouterInput> measure_router_inputs(const DenseCheckpoint& dense,
                                                             const SamplingOptions& options);

}  // namespace hestia
