#pragma once

#include <filesystem>
#include <string>

#include "hestia/routing/trace.hpp"

namespace hestia {

/// Most bytes of an expert or a layer that a trace may state (1 TiB): sums over millions of loads stay within 63 bits.
constexpr std::int64_t kMaxTraceBytes = std::int64_t{1} << 40;

/// Reads the packed HDF5 form. Throws InputError naming the file and dataset.
[[nodiscard]] RoutingTrace read_trace_hdf5(const std::filesystem::path& path);

/// Throws InputError naming `path` when some layers alone are pre-loaded, or an expert is there twice or not at all.
void check_trace_preload(const std::string& path, const RoutingTrace& trace);

/// Version of route_trace, in its CSV and its packed form.
inline constexpr std::int64_t kTraceVersion = 1;

}  // namespace hestia
