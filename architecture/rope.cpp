#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "family.hpp"

namespace hestia {

void read_rope(ConfigReader& reader, const Family& family, Architecture& architecture) {
  RopeSettings& rope = architecture.rope;
  const Json* theta = reader.find("rope_theta");
  if (theta != nullptr) {
    reader.read("rope_theta", *theta, rope.theta);
  }
  for (const char* section : {"rope_scaling", "rope_parameters"}) {
    const Json* settings = reader.find(section);
    if (settings == nullptr) {
      continue;
    }
    if (!settings->is_object()) {
      reader.problem(fmt::format("\"{}\" must be an object or null, got {}; correct it", section, shown(*settings)));
      continue;
    }
    const Json* type = ConfigReader::find_in(*settings, "rope_type");
    if (type == nullptr) {
      type = ConfigReader::find_in(*settings, "type");  // spelling of older transformers
    }
    if (type != nullptr) {
      reader.read("rope_type", *type, rope.type);
    }
    if (const Json* inner = ConfigReader::find_in(*settings, "rope_theta"); inner != nullptr) {
      const double outer = rope.theta;
      reader.read("rope_theta", *inner, rope.theta);
      if (theta != nullptr && theta->is_number() && inner->is_number() && outer != rope.theta) {
        reader.problem(
            fmt::format("\"rope_theta\" and \"{}.rope_theta\" contradict each other, got {} and {}; keep one", section,
                        outer, rope.theta));
      }
    }
    const Json* factor = ConfigReader::find_in(*settings, "factor");
    if (factor != nullptr) {
      reader.read("factor", *factor, rope.factor);
    } else if (rope.type == "linear") {
      reader.problem(fmt::format("\"{}\" of type \"linear\" has no \"factor\"; add it", section));
    }
    const Json* partial = ConfigReader::find_in(*settings, "partial_rotary_factor");
    if (partial != nullptr && !(partial->is_number() && partial->get<double>() == 1.0)) {
      reader.problem(
          fmt::format("\"{}.partial_rotary_factor\" is not supported, got {}; only 1.0 is", section, shown(*partial)));
    }
  }
  if (std::find(family.rope_types.begin(), family.rope_types.end(), rope.type) == family.rope_types.end()) {
    reader.problem(fmt::format("rope type is not supported, got \"{}\"; this program knows \"{}\" for {} models",
                               rope.type, fmt::join(family.rope_types, "\", \""), family.defaults.family));
  }
  if (!(rope.theta > 0.0) || !std::isfinite(rope.theta)) {
    reader.problem(fmt::format("\"rope_theta\" must be positive, got {}; correct it", rope.theta));
  }
  if (!(rope.factor > 0.0) || !std::isfinite(rope.factor)) {
    reader.problem(fmt::format("rope \"factor\" must be positive, got {}; correct it", rope.factor));
  }
  if (rope.type == "default") {
    rope.factor = 1.0;
  }
}

void write_rope(const Architecture& architecture, Json& config) {
  const RopeSettings& rope = architecture.rope;
  Json scaling = {{"rope_type", rope.type}};
  if (rope.type != "default") {
    scaling["factor"] = rope.factor;
  }
  config["rope_theta"] = rope.theta;
  config["rope_scaling"] = rope.type == "default" ? Json(nullptr) : scaling;
  scaling["rope_theta"] = rope.theta;
  config["rope_parameters"] = scaling;
}

}  // namespace hestia
