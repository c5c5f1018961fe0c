#pragma once

#include <filesystem>

#include "hestia/routing/trace.hpp"

namespace hestia {

/// Reads the packed HDF5 form. Throws InputError naming the file and dataset.
[[nodiscard]] RoutingTrace read_trace_hdf5(const std::filesystem::path& path);

/// Version of route_trace, in its CSV and its packed form.
inline constexpr std::int64_t kTraceVersion = 1;

}  // namespace hestia
