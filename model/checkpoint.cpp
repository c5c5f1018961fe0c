#include <algorithm>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <optional>
#include <set>
#include <span>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include "check_tensor.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/placement.hpp"
#include "hestia/model/tensors.hpp"
#include "widening.hpp"

namespace hestia {
namespace {

bool is_convertible(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF64;
}

// Tensors that savers add although they hold nothing new.
bool is_redundant(const Architecture& architecture, const SafetensorsCheckpoint& checkpoint, const std::string& name) {
  if (name.ends_with("rotary_emb.inv_freq")) {
    return true;
  }
  if (!architecture.tie_word_embeddings) {
    return false;
  }
  Architecture untied = architecture;
  untied.tie_word_embeddings = false;
  std::string head;
  std::string embedding;
  for (const TensorSpec& spec : tensor_specs(untied)) {
    if (spec.part == TensorPart::kHead) {
      head = spec.name;
    } else if (spec.part == TensorPart::kTokenEmbedding) {
      embedding = spec.name;
    }
  }
  if (name != head || !checkpoint.contains(embedding)) {
    return false;
  }
  const TensorView& copy = checkpoint.tensor(name);
  const TensorView& original = checkpoint.tensor(embedding);
  return copy.dtype == original.dtype && std::ranges::equal(copy.bytes, original.bytes);
}

// What the values of a quantised tensor, or its scales, may be stored as.
std::vector<DType> quantised_dtypes(const Architecture& architecture, bool values) {
  if (architecture.quantisation == Quantisation::kMxfp4) {
    return {DType::kU8};
  }
  return values ? std::vector<DType>{DType::kF8E4M3} : std::vector<DType>{DType::kF32, DType::kBF16};
}

void check_quantised(const std::string& subject, const TensorView& view, const std::vector<std::int64_t>& shape,
                     const std::vector<DType>& dtypes, Problems& problems) {
  if (view.shape != shape) {
    problems.add(
        fmt::format("{}: tensor \"{}\" must have shape [{}], got [{}]; config and weights do not belong together",
                    subject, view.name, fmt::join(shape, ", "), fmt::join(view.shape, ", ")));
  } else if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    problems.add(fmt::format("{}: tensor \"{}\" must be {}, got {}; config and weights do not belong together", subject,
                             view.name, std::string(dtype_name(dtypes.front())), std::string(dtype_name(view.dtype))));
  }
}

std::vector<std::pair<std::string, torch::Tensor>> named_routers(MoeModel& model) {
  const std::vector<torch::Tensor> routers = model->routers();
  const std::vector<std::int64_t> layers = model->architecture().moe_layers();
  std::vector<std::pair<std::string, torch::Tensor>> named;
  for (std::size_t i = 0; i < routers.size(); ++i) {
    named.emplace_back(router_name(model->architecture(), layers[i]), routers[i]);
  }
  return named;
}

}  // namespace

void check_tensor(const std::string& subject, const TensorView& view, const std::vector<std::int64_t>& shape,
                  Problems& problems) {
  if (view.shape != shape) {
    problems.add(
        fmt::format("{}: tensor \"{}\" must have shape [{}], got [{}]; config and weights do not belong "
                    "together",
                    subject, view.name, fmt::join(shape, ", "), fmt::join(view.shape, ", ")));
  } else if (!is_convertible(view.dtype)) {
    problems.add(fmt::format("{}: tensor \"{}\" must be F32, BF16, F16 or F64, got {}; give an unquantised checkpoint",
                             subject, view.name, std::string(dtype_name(view.dtype))));
  }
}

void check_present(const SafetensorsFile& file, std::string_view kind, const std::string& name,
                   const std::vector<std::int64_t>& shape, Problems& problems) {
  if (file.contains(name)) {
    check_tensor(file.path().string(), file.tensor(name), shape, problems);
  } else {
    problems.add(fmt::format("{}: {} \"{}\" [{}] is missing; this file belongs to another model", file.path().string(),
                             kind, name, fmt::join(shape, ", ")));
  }
}

void check_nothing_else(const SafetensorsFile& file, std::string_view kind,
                        const std::set<std::string, std::less<>>& wanted, Problems& problems) {
  for (const std::string& name : file.names()) {
    if (!wanted.contains(name)) {
      problems.add(fmt::format("{}: tensor \"{}\" is not {} of this model; this file belongs to another model",
                               file.path().string(), name, kind));
    }
  }
}

void check_routers(const SafetensorsFile& file, const Architecture& architecture, Problems& problems) {
  std::set<std::string, std::less<>> wanted;
  for (const std::int64_t layer : architecture.moe_layers()) {
    const std::string name = router_name(architecture, layer);
    wanted.insert(name);
    check_present(file, "router", name, {architecture.num_experts, architecture.hidden_size}, problems);
  }
  check_nothing_else(file, "a router", wanted, problems);
}

MoeModel load_model(const std::filesystem::path& directory, torch::Dtype dtype, torch::Device device, bool quiet,
                    const torch::Tensor& expert_blobs_NB, const std::function<void(std::string_view part)>& begins) {
  const torch::NoGradGuard no_grad;
  const auto begin = [&](std::string_view part) {
    if (begins) {
      begins(part);
    }
  };
  begin("open");
  const Architecture architecture = read_architecture(directory);
  // Memory is asked for while the files are opened and checked; when these are refused, it goes again.
  std::future<MoeModel> constructed = std::async(std::launch::async, [&] {
    const torch::NoGradGuard no_grad_here;
    return MoeModel(architecture, dtype, device, expert_blobs_NB);
  });
  const SafetensorsCheckpoint checkpoint(directory);
  begin("check");
  const std::vector<TensorSpec> specs = tensor_specs(architecture);
  const std::string subject = directory.string();
  Problems problems;
  std::set<std::string, std::less<>> wanted;
  std::vector<std::vector<const TensorView*>> views_of;  // by spec: values, and scales if any
  views_of.reserve(specs.size());
  for (const TensorSpec& spec : specs) {
    const std::vector<StoredTensor> stored = stored_tensors(architecture, spec, checkpoint);
    std::vector<const TensorView*>& views = views_of.emplace_back();
    for (const StoredTensor& part : stored) {
      wanted.insert(part.name);
      if (!checkpoint.contains(part.name)) {
        problems.add(fmt::format("{}: tensor \"{}\" [{}] is missing; config.json says that the model has it", subject,
                                 part.name, fmt::join(part.shape, ", ")));
        continue;
      }
      views.push_back(&checkpoint.tensor(part.name));
      if (stored.size() == 1) {
        check_tensor(subject, *views.back(), part.shape, problems);
      } else {
        check_quantised(subject, *views.back(), part.shape,
                        quantised_dtypes(architecture, part.name == stored.front().name), problems);
      }
    }
  }
  for (const std::string& name : checkpoint.names()) {
    if (!wanted.contains(name) && !is_redundant(architecture, checkpoint, name)) {
      problems.add(
          fmt::format("{}: tensor \"{}\" [{}] is not part of a {} model with this config.json; config and "
                      "weights do not belong together",
                      subject, name, fmt::join(checkpoint.tensor(name).shape, ", "), architecture.family));
    }
  }
  problems.throw_input_if_any();
  begin("construct");
  MoeModel model = constructed.get();
  begin("list");
  const auto tensors = model->named_tensors();
  std::vector<Placement> placements;
  std::vector<Placement> in_blobs;  // where the experts lie elsewhere
  std::vector<Widening> widenings;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorView& values = *views_of[i][0];
    const torch::Tensor& destination = tensors[i].second;
    bytes += static_cast<std::int64_t>(values.bytes.size());
    if (views_of[i].size() == 2) {
      const bool mxfp4 = architecture.quantisation == Quantisation::kMxfp4;
      widenings.push_back({values, *views_of[i][1], mxfp4 ? destination.transpose(1, 2) : destination.unsqueeze(0)});
    } else if (!destination.is_contiguous()) {
      widenings.push_back({values, std::nullopt, destination.dim() == 2 ? destination.unsqueeze(0) : destination});
    } else {
      const bool here = destination.device() == model->device();
      (here ? placements : in_blobs).push_back({values, destination});
    }
  }
  // In the order of the files: a disk reads on faster than it jumps.
  std::ranges::stable_sort(placements, {}, [](const Placement& p) { return p.source.bytes.data(); });
  std::ranges::stable_sort(in_blobs, {}, [](const Placement& p) { return p.source.bytes.data(); });
  std::ranges::stable_sort(widenings, {}, [](const Widening& w) { return w.values.bytes.data(); });
  constexpr std::int64_t kWorthShowing = std::int64_t{1} << 28;
  Progress progress("load", bytes, "B", quiet || bytes < kWorthShowing);
  const auto advance = [&](std::int64_t done) { progress.advance(done); };
  begin("place");
  for (const std::vector<Placement>& list : {std::cref(placements), std::cref(in_blobs)}) {
    place_tensors(list, {.advance = advance});
  }
  begin("widen");
  widen_tensors(architecture, widenings, {.advance = advance});
  progress.finish();
  begin("close");
  return model;
}

MoeModel create_model(const Architecture& architecture, torch::Dtype dtype, torch::Device device, std::uint64_t seed,
                      const torch::Tensor& expert_blobs_NB) {
  const torch::NoGradGuard no_grad;
  MoeModel model(architecture, dtype, device, expert_blobs_NB);
  const std::vector<TensorSpec> specs = tensor_specs(architecture);
  auto tensors = model->named_tensors();
  at::parallel_for(0, static_cast<std::int64_t>(specs.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    const torch::NoGradGuard no_grad_here;
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      torch::Tensor& tensor = tensors[i].second;
      if (specs[i].name.ends_with("bias")) {
        tensor.zero_();
      } else if (specs[i].role == TensorRole::kNorm) {
        tensor.fill_(1.0);
      } else {
        // One generator per tensor: a model with one layer more shares the weights of the others.
        auto generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(seed, specs[i].name));
        tensor.copy_(
            torch::empty(specs[i].shape, torch::kFloat32).normal_(0.0, architecture.initializer_range, generator));
      }
    }
  });
  return model;
}

void save_model(MoeModel& model, const std::filesystem::path& directory, torch::Dtype dtype,
                std::size_t max_shard_bytes) {
  std::error_code failure;
  std::filesystem::create_directories(directory, failure);
  if (failure) {
    throw RunError(fmt::format("{}: the folder cannot be made, got \"{}\"; choose another place", directory.string(),
                               failure.message()));
  }
  Json config = architecture_config(model->architecture());
  const std::string dtype_text = dtype == torch::kBFloat16  ? "bfloat16"
                                 : dtype == torch::kFloat16 ? "float16"
                                 : dtype == torch::kFloat64 ? "float64"
                                                            : "float32";
  config["torch_dtype"] = dtype_text;  // transformers 4
  config["dtype"] = dtype_text;        // transformers 5
  std::vector<torch::Tensor> alive;    // the writer borrows their bytes
  std::vector<TensorView> views;
  for (const auto& [name, tensor] : model->named_tensors()) {
    alive.push_back(tensor.detach().to(torch::kCPU, dtype).contiguous());
    const torch::Tensor& copy = alive.back();
    views.push_back({name,
                     safetensors_dtype(dtype),
                     copy.sizes().vec(),
                     {static_cast<const std::byte*>(copy.const_data_ptr()), copy.nbytes()}});
  }
  // transformers refuses files without this mark.
  write_sharded(directory, views, max_shard_bytes, {{"format", "pt"}});
  write_text_atomically(directory / "config.json", config.dump(2) + "\n");
}

void load_routers(MoeModel& model, const std::filesystem::path& file) {
  const SafetensorsFile source(file);
  Problems problems;
  check_routers(source, model->architecture(), problems);
  problems.throw_input_if_any();
  for (auto& [name, router] : named_routers(model)) {
    copy_into(source.tensor(name), router);
  }
}

void save_routers(MoeModel& model, const std::filesystem::path& file) {
  auto routers = named_routers(model);
  for (auto& [name, router] : routers) {
    router = router.detach().to(torch::kFloat32);
  }
  write_tensors(file, routers, {{"format", "pt"}});
}

std::string router_hash(MoeModel& model) {
  Sha256 hash;
  for (const auto& [name, router] : named_routers(model)) {
    const torch::Tensor values = router.detach().to(torch::kCPU, torch::kFloat32).contiguous();
    // The terminating zero separates the name from the values.
    hash.update(std::as_bytes(std::span(name.c_str(), name.size() + 1)));
    hash.update({static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes()});
  }
  return hash.hex();
}

}  // namespace hestia
