#include "hestia/model/tuned_checkpoint.hpp"

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>

#include "check_tensor.hpp"
#include "hestia/architecture/architecture.hpp"
#include "hestia/core/atomic_folder.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = "config.json";
constexpr const char* kIndex = "model.safetensors.index.json";

/// Makes a changed tensor out of the base's.
using Change = std::function<torch::Tensor(const TensorView& base)>;

// Endings of files that hold weights other than those Hestia reads.
bool holds_weights(const fs::path& file) {
  constexpr std::string_view kEndings[] = {".safetensors", ".bin", ".pt",      ".pth",  ".ckpt",
                                           ".gguf",        ".h5",  ".msgpack", ".onnx", ".npz"};
  return std::ranges::find(kEndings, file.extension().string()) != std::end(kEndings);
}

[[noreturn]] void fail(const fs::path& path, const std::error_code& failure) {
  throw RunError(
      fmt::format("{}: cannot be written, got \"{}\"; choose another place", path.string(), failure.message()));
}

void copy_whole(const fs::path& from, const fs::path& to) {
  std::error_code failure;
  fs::copy_file(from, to, failure);
  if (failure) {
    fail(to, failure);
  }
}

void link_or_copy(const fs::path& from, const fs::path& to) {
  std::error_code failure;
  // A hub cache holds symbolic links: what they lead to is linked.
  fs::create_hard_link(fs::canonical(from), to, failure);
  if (failure) {
    copy_whole(from, to);
  }
}

std::map<std::string, Change, std::less<>> changes_of(const Architecture& architecture, const SafetensorsFile& routers,
                                                      const AdapterFile* adapters) {
  std::map<std::string, Change, std::less<>> changes;
  for (const std::string& name : routers.names()) {
    changes[name] = [&routers, name](const TensorView& base) {
      return to_torch(routers.tensor(name)).to(torch_dtype(base.dtype));
    };
  }
  if (adapters == nullptr) {
    return changes;
  }
  const double scale = adapters->settings().alpha / static_cast<double>(adapters->settings().rank);
  for (const TensorSpec& spec : tensor_specs(architecture)) {
    if (takes_adapters(spec)) {
      const std::string a = adapter_name(spec.name, 'A');
      const std::string b = adapter_name(spec.name, 'B');
      changes[spec.name] = [adapters, a, b, scale](const TensorView& base) {
        return merged_weight(to_torch(base), to_torch(adapters->tensors().tensor(a)),
                             to_torch(adapters->tensors().tensor(b)), scale);
      };
    }
  }
  return changes;
}

void write_changed(const SafetensorsFile& file, const std::map<std::string, Change, std::less<>>& changes,
                   const fs::path& output) {
  std::vector<torch::Tensor> alive;  // the writer borrows their bytes
  SafetensorsWriter writer;
  for (const std::string& name : file.names()) {
    const TensorView& base = file.tensor(name);
    const auto change = changes.find(name);
    if (change == changes.end()) {
      writer.add(name, base.dtype, base.shape, base.bytes);
    } else {
      alive.push_back(change->second(base).contiguous());
      const torch::Tensor& tensor = alive.back();
      writer.add(name, base.dtype, base.shape,
                 {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
    }
  }
  for (const auto& [key, value] : file.metadata()) {
    writer.set_metadata(key, value);
  }
  writer.write(output);
}

void copy_the_rest(const fs::path& base, const SafetensorsCheckpoint& checkpoint, const fs::path& output) {
  const bool sharded = checkpoint.files().front().path().filename() != "model.safetensors";
  std::vector<std::string> left_out;
  for (const auto& entry : fs::directory_iterator(base)) {
    const fs::path name = entry.path().filename();
    const bool written = std::ranges::any_of(
        checkpoint.files(), [&](const SafetensorsFile& file) { return file.path().filename() == name; });
    if (written || name == kConfig || (name == kIndex && !sharded)) {
      continue;
    }
    if (!entry.is_regular_file() || holds_weights(name)) {
      left_out.push_back(name.string());
    } else {
      copy_whole(entry.path(), output / name);
    }
  }
  std::ranges::sort(left_out);
  for (const std::string& name : left_out) {
    log_warning(fmt::format("{}: \"{}\" is not copied, it may hold weights of the base model", base.string(), name));
  }
}

}  // namespace

void write_tuned_checkpoint(const fs::path& base, const TunedParts& parts, const fs::path& output) {
  if (fs::exists(output) && !(fs::is_directory(output) && fs::is_empty(output))) {
    throw UsageError(fmt::format("{}: exists already; remove it or choose another --output", output.string()));
  }
  const Architecture architecture = read_architecture(base);
  const SafetensorsCheckpoint checkpoint(base);
  const SafetensorsFile routers(parts.routers);
  Problems problems;
  check_routers(routers, architecture, problems);
  problems.throw_input_if_any();
  std::optional<AdapterFile> adapters;
  if (parts.adapters) {
    adapters.emplace(*parts.adapters, architecture);
  }
  if (parts.top_k < 1 || parts.top_k > architecture.num_experts) {
    throw std::invalid_argument(
        fmt::format("tuned checkpoint: top_k must be between 1 and {}, got {}", architecture.num_experts, parts.top_k));
  }
  const auto changes = changes_of(architecture, routers, adapters ? &*adapters : nullptr);
  for (const TensorSpec& spec : tensor_specs(architecture)) {
    bool complete = true;
    for (const StoredTensor& part : stored_tensors(architecture, spec, checkpoint)) {
      if (!checkpoint.contains(part.name)) {
        problems.add(fmt::format("{}: tensor \"{}\" is missing; fetch the checkpoint again", base.string(), part.name));
        complete = false;
      }
    }
    if (complete && changes.contains(spec.name)) {
      check_tensor(base.string(), checkpoint.tensor(spec.name), spec.shape, problems);
    }
  }
  problems.throw_input_if_any();

  AtomicFolder whole(output);
  const fs::path& folder = whole.temporary();
  copy_the_rest(base, checkpoint, folder);
  for (const SafetensorsFile& file : checkpoint.files()) {
    const fs::path target = folder / file.path().filename();
    if (std::ranges::any_of(file.names(), [&](const std::string& name) { return changes.contains(name); })) {
      write_changed(file, changes, target);
    } else {
      link_or_copy(file.path(), target);
    }
  }
  if (parts.top_k == architecture.top_k) {
    copy_whole(base / kConfig, folder / kConfig);
  } else {
    Json config = read_json_file(base / kConfig);
    set_config_top_k(config, architecture, parts.top_k);
    static_cast<void>(parse_architecture(config, (output / kConfig).string()));  // a family may have one K only
    write_text_atomically(folder / kConfig, config.dump(2) + "\n");
  }
  whole.commit();
}

}  // namespace hestia
