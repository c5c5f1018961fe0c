#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/safetensors.hpp"

namespace hestia {

/// Adds to `problems` when a tensor of `subject` has another shape or is no float.
void check_tensor(const std::string& subject, const TensorView& view, const std::vector<std::int64_t>& shape,
                  Problems& problems);
/// check_tensor for `name` in a file of one kind of tensor ("router"), or a problem that it is missing.
void check_present(const SafetensorsFile& file, std::string_view kind, const std::string& name,
                   const std::vector<std::int64_t>& shape, Problems& problems);
/// A problem for each tensor of the file that is not wanted, hence not `kind` ("a router") of this model.
void check_nothing_else(const SafetensorsFile& file, std::string_view kind,
                        const std::set<std::string, std::less<>>& wanted, Problems& problems);
/// Everything wrong with a file that should hold the routers of `architecture` and nothing else.
void check_routers(const SafetensorsFile& file, const Architecture& architecture, Problems& problems);

}  // namespace hestia
