#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "family.hpp"

namespace hestia {

namespace {

constexpr const char* kOriginal = "original_max_position_embeddings";

void read_longrope(ConfigReader& reader, const Json& settings, Architecture& architecture) {
  RopeSettings& rope = architecture.rope;
  const auto read = [&](const char* key, auto& out) {
    if (const Json* value = ConfigReader::find_in(settings, key); value != nullptr) {
      reader.read(key, *value, out);
    } else {
      reader.problem(fmt::format("rope settings of type \"longrope\" have no \"{}\"; add it", key));
    }
  };
  read("short_factor", rope.short_factor);
  read("long_factor", rope.long_factor);
  read("short_mscale", rope.short_scale);
  read("long_mscale", rope.long_scale);
  rope.original_positions = architecture.max_position_embeddings;
  if (const Json* inner = ConfigReader::find_in(settings, kOriginal); inner != nullptr) {
    reader.read(kOriginal, *inner, rope.original_positions);
  }
  reader.read_optional(kOriginal, rope.original_positions);  // the outer one has the last word in transformers
  if (rope.original_positions < 1 || !(rope.short_scale > 0.0) || !(rope.long_scale > 0.0)) {
    reader.problem(
        fmt::format("\"{}\", \"short_mscale\" and \"long_mscale\" must be positive, got {}, {} and {}; correct them",
                    kOriginal, rope.original_positions, rope.short_scale, rope.long_scale));
  }
}

void read_yarn(ConfigReader& reader, const Json& settings, const char* section, Architecture& architecture) {
  RopeSettings& rope = architecture.rope;
  const auto read = [&](const char* key, auto& out) {
    if (const Json* value = ConfigReader::find_in(settings, key); value != nullptr) {
      reader.read(key, *value, out);
    }
  };
  RopeSettings defaults;  // not what the family has without any settings
  defaults.theta = rope.theta;
  defaults.type = rope.type;
  defaults.factor = rope.factor;
  defaults.original_positions = architecture.max_position_embeddings;
  rope = defaults;
  read(kOriginal, rope.original_positions);
  read("beta_fast", rope.beta_fast);
  read("beta_slow", rope.beta_slow);
  read("truncate", rope.truncate);
  read("mscale", rope.mscale);
  read("mscale_all_dim", rope.mscale_all_dim);
  read("attention_factor", rope.attention_factor);
  if (rope.original_positions < 1 || !(rope.beta_fast > 0.0) || !(rope.beta_slow > 0.0) ||
      !std::isfinite(rope.beta_fast) || !std::isfinite(rope.beta_slow)) {
    reader.problem(fmt::format(
        "\"{}\", \"beta_fast\" and \"beta_slow\" of \"{}\" must be positive, got {}, {} and {}; correct them",
        kOriginal, section, rope.original_positions, rope.beta_fast, rope.beta_slow));
  }
  if (!(rope.rotation_scale() > 0.0) || !std::isfinite(rope.rotation_scale())) {
    reader.problem(fmt::format(
        "\"attention_factor\", \"mscale\" and \"mscale_all_dim\" of \"{}\" must give a positive scale, got {}; "
        "correct them",
        section, rope.rotation_scale()));
  }
}

}  // namespace

double RopeSettings::yarn_scale(double m) const {
  return factor <= 1.0 ? 1.0 : 0.1 * m * std::log(factor) + 1.0;
}

double RopeSettings::rotation_scale() const {
  if (type != "yarn") {
    return 1.0;
  }
  if (attention_factor) {
    return *attention_factor;
  }
  const bool both = mscale.value_or(0.0) != 0.0 && mscale_all_dim.value_or(0.0) != 0.0;
  return both ? yarn_scale(*mscale) / yarn_scale(*mscale_all_dim) : yarn_scale(1.0);
}

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
    } else if (rope.type == "linear" || rope.type == "yarn") {
      reader.problem(fmt::format("\"{}\" of type \"{}\" has no \"factor\"; add it", section, rope.type));
    }
    if (rope.type == "yarn") {
      read_yarn(reader, *settings, section, architecture);
    }
    if (rope.type == "longrope") {
      read_longrope(reader, *settings, architecture);
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
  if (rope.type != "linear" && rope.type != "yarn") {
    rope.factor = 1.0;
  }
}

void write_rope(const Architecture& architecture, Json& config) {
  const RopeSettings& rope = architecture.rope;
  Json scaling = {{"rope_type", rope.type}};
  if (rope.type == "linear") {
    scaling["factor"] = rope.factor;
  } else if (rope.type == "longrope") {
    scaling["original_max_position_embeddings"] = rope.original_positions;
    scaling["short_factor"] = rope.short_factor;
    scaling["long_factor"] = rope.long_factor;
    scaling["short_mscale"] = rope.short_scale;
    scaling["long_mscale"] = rope.long_scale;
    config["original_max_position_embeddings"] = rope.original_positions;
  } else if (rope.type == "yarn") {
    scaling["factor"] = rope.factor;
    scaling[kOriginal] = rope.original_positions;
    scaling["beta_fast"] = rope.beta_fast;
    scaling["beta_slow"] = rope.beta_slow;
    scaling["truncate"] = rope.truncate;
    for (const auto& [key, value] : {std::pair("mscale", rope.mscale), std::pair("mscale_all_dim", rope.mscale_all_dim),
                                     std::pair("attention_factor", rope.attention_factor)}) {
      if (value) {
        scaling[key] = *value;
      }
    }
  }
  config["rope_theta"] = rope.theta;
  config["rope_scaling"] = rope.type == "default" ? Json(nullptr) : scaling;
  scaling["rope_theta"] = rope.theta;
  config["rope_parameters"] = scaling;
}

}  // namespace hestia
