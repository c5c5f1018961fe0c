#include "hestia/model/adapters.hpp"

#include <charconv>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string_view>

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>

#include "check_tensor.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {
namespace {

constexpr std::string_view kFormat = "adapters 1";

// Metadata of a safetensors file are strings.
template <class Number>
void take_number(const SafetensorsFile& file, const char* key, Number& value, Problems& problems) {
  const auto entry = file.metadata().find(key);
  const std::string text = entry == file.metadata().end() ? "" : entry->second;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failure != std::errc() || end != text.data() + text.size() || !(static_cast<double>(value) > 0.0) ||
      !std::isfinite(static_cast<double>(value))) {
    problems.add(fmt::format("{}: metadata {} must be a positive number, got {}; export the adapters again",
                             file.path().string(), key,
                             entry == file.metadata().end() ? "nothing" : fmt::format("\"{}\"", text)));
  }
}

}  // namespace

bool takes_adapters(const TensorSpec& spec) {
  return spec.expert >= 0 && (spec.part == TensorPart::kExpertUp || spec.part == TensorPart::kExpertDown);
}

std::string adapter_name(const std::string& weight_name, char matrix) {
  constexpr std::string_view kSuffix = ".weight";
  if (!weight_name.ends_with(kSuffix)) {
    throw std::invalid_argument(fmt::format("adapters: \"{}\" is not the name of a weight", weight_name));
  }
  return fmt::format("{}.lora_{}.weight", weight_name.substr(0, weight_name.size() - kSuffix.size()), matrix);
}

void create_adapters(MoeModel& model, const AdapterSettings& settings, std::uint64_t seed) {
  model->add_adapters(settings);
  const torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : model->named_adapters()) {
    if (name.ends_with(".lora_A.weight")) {
      const double bound = 1.0 / std::sqrt(static_cast<double>(tensor.size(1)));
      auto generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(seed, name));
      tensor.copy_(torch::empty(tensor.sizes(), torch::kFloat32).uniform_(-bound, bound, generator));
    }
  }
}

void save_adapters(MoeModel& model, const std::filesystem::path& file) {
  const std::optional<AdapterSettings> settings = model->adapter_settings();
  if (!settings) {
    throw std::logic_error("save_adapters: the model has none");
  }
  write_tensors(file, model->named_adapters(),
                {{"format", "pt"},
                 {"hestia_format", std::string(kFormat)},
                 {"rank", std::to_string(settings->rank)},
                 {"alpha", fmt::format("{}", settings->alpha)}});
}

AdapterFile::AdapterFile(const std::filesystem::path& path, const Architecture& architecture) : tensors_(path) {
  const std::string subject = path.string();
  const auto format = tensors_.metadata().find("hestia_format");
  if (format == tensors_.metadata().end() || format->second != kFormat) {
    throw InputError(fmt::format(
        "{}: metadata hestia_format must be \"{}\", got {}; export the adapters again or update "
        "the program",
        subject, kFormat, format == tensors_.metadata().end() ? "nothing" : fmt::format("\"{}\"", format->second)));
  }
  Problems problems;
  take_number(tensors_, "rank", settings_.rank, problems);
  take_number(tensors_, "alpha", settings_.alpha, problems);
  problems.throw_input_if_any();
  std::set<std::string, std::less<>> wanted;
  const auto check = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    wanted.insert(name);
    check_present(tensors_, "adapter", name, shape, problems);
  };
  for (const TensorSpec& spec : tensor_specs(architecture)) {
    if (takes_adapters(spec)) {
      check(adapter_name(spec.name, 'A'), {settings_.rank, spec.shape[1]});
      check(adapter_name(spec.name, 'B'), {spec.shape[0], settings_.rank});
    }
  }
  check_nothing_else(tensors_, "an adapter", wanted, problems);
  problems.throw_input_if_any();
}

void load_adapters(MoeModel& model, const std::filesystem::path& file) {
  const AdapterFile source(file, model->architecture());
  model->add_adapters(source.settings());
  for (const auto& [name, tensor] : model->named_adapters()) {
    copy_into(source.tensors().tensor(name), tensor);
  }
}

torch::Tensor merged_weight(const torch::Tensor& weight, const torch::Tensor& a, const torch::Tensor& b, double scale) {
  const torch::Dtype wide = weight.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  return at::addmm(weight.to(wide), b.to(wide), a.to(wide), /*beta=*/1, /*alpha=*/scale).to(weight.scalar_type());
}

}  // namespace hestia
