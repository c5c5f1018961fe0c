#include "hestia/architecture/upcycle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <numbers>
#include <stdexcept>
#include <string>

#include <fmt/format.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/core/atomic_folder.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"

namespace hestia {
namespace {

namespace fs = std::filesystem;

constexpr double kSignedStep = 0.15;
constexpr std::uint64_t kMaxShardBytes = std::uint64_t{2} << 30;

std::vector<std::byte> encoded(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * dtype_size(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t bits =
        dtype == DType::kBF16 ? float_to_bfloat16_bits(values[i]) : float_to_half_bits(values[i]);
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
  }
  return bytes;
}

// A Gaussian direction, orthogonal to `mean`, of the given length.
std::vector<double> direction(SplitMix64& random, const std::vector<float>& mean, double length) {
  std::vector<double> values(mean.size());
  for (double& value : values) {
    value = std::sqrt(-2.0 * std::log(1.0 - random.uniform())) * std::cos(2.0 * std::numbers::pi * random.uniform());
  }
  double along = 0.0;
  double square = 0.0;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    along += values[i] * static_cast<double>(mean[i]);
    square += static_cast<double>(mean[i]) * static_cast<double>(mean[i]);
  }
  double norm = 0.0;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    values[i] -= square > 0.0 ? along / square * static_cast<double>(mean[i]) : 0.0;
    norm += values[i] * values[i];
  }
  for (double& value : values) {
    value *= norm > 0.0 ? length / std::sqrt(norm) : 0.0;  // in one dimension nothing is orthogonal to the mean
  }
  return values;
}

Json upcycled_config(const DenseArchitecture& a, const UpcycleOptions& options) {
  const std::string dtype = options.dtype == DType::kBF16  ? "bfloat16"
                            : options.dtype == DType::kF16 ? "float16"
                                                           : "float32";
  Json rope = a.rope_scaling.is_object() ? a.rope_scaling : Json{{"rope_type", "default"}};
  rope["rope_theta"] = a.rope_theta;
  return {{"architectures", Json::array({"MixtralForCausalLM"})},
          {"model_type", "mixtral"},
          {"vocab_size", a.vocab_size},
          {"hidden_size", a.hidden_size},
          {"intermediate_size", a.intermediate_size / options.top_k},
          {"num_hidden_layers", a.num_layers},
          {"num_attention_heads", a.num_attention_heads},
          {"num_key_value_heads", a.num_key_value_heads},
          {"head_dim", a.head_dim},
          {"num_local_experts", options.num_experts},
          {"num_experts_per_tok", options.top_k},
          {"hidden_act", "silu"},
          {"max_position_embeddings", a.max_position_embeddings},
          {"initializer_range", a.initializer_range},
          {"rms_norm_eps", a.rms_norm_eps},
          {"tie_word_embeddings", a.tie_word_embeddings},
          {"sliding_window", nullptr},
          {"rope_theta", a.rope_theta},
          {"rope_scaling", a.rope_scaling},
          {"rope_parameters", rope},
          {"bos_token_id", a.bos_token_id},
          {"eos_token_id", a.eos_token_id},
          {"pad_token_id", a.pad_token_id},
          {"attention_dropout", 0.0},
          {"router_jitter_noise", 0.0},
          {"router_aux_loss_coef", 0.001},
          {"output_router_logits", false},
          {"use_cache", true},
          {"torch_dtype", dtype},
          {"dtype", dtype}};
}

// What is known of a router's input without data: RMSNorm makes its mean square that of the norm's weights.
RouterInput guessed_input(const std::vector<float>& norm) {
  double square = 0.0;
  for (const float weight : norm) {
    square += static_cast<double>(weight) * static_cast<double>(weight);
  }
  return {std::vector<float>(norm.size(), 0.0F), square / static_cast<double>(norm.size())};
}

// Fills one file; the tensors' bytes live as long as it does.
class Shard {
 public:
  explicit Shard(DType dtype) : dtype_(dtype) { writer_.set_metadata("format", "pt"); }

  std::span<const std::byte> keep(const std::string& name, const std::vector<float>& values) {
    for (const float value : values) {
      const float stored = dtype_ == DType::kF16    ? half_bits_to_float(float_to_half_bits(value))
                           : dtype_ == DType::kBF16 ? bfloat16_bits_to_float(float_to_bfloat16_bits(value))
                                                    : value;
      if (!std::isfinite(stored)) {
        throw InputError(fmt::format("tensor \"{}\": holds {:g}, which is no finite {}; {}", name,
                                     static_cast<double>(value), dtype_name(dtype_),
                                     !std::isfinite(value)   ? "fetch the model again"
                                     : dtype_ == DType::kF16 ? "choose --dtype bfloat16 or float32"
                                                             : "choose --dtype float32"));
      }
    }
    return alive_.emplace_back(encoded(values, dtype_));
  }
  void add(const std::string& name, std::vector<std::int64_t> shape, std::span<const std::byte> bytes) {
    writer_.add(name, dtype_, std::move(shape), bytes);
    names_.push_back(name);
  }
  void write(const fs::path& path, Json::object_t& weight_map) const {
    writer_.write(path);
    for (const std::string& name : names_) {
      weight_map.emplace_back(name, path.filename().string());
    }
  }
  [[nodiscard]] std::size_t data_bytes() const { return writer_.data_bytes(); }

 private:
  DType dtype_;
  SafetensorsWriter writer_;
  std::list<std::vector<std::byte>> alive_;
  std::vector<std::string> names_;
};

void add_layer(Shard& shard, const DenseCheckpoint& dense, const UpcycleOptions& options, std::int64_t layer) {
  const DenseArchitecture& a = dense.architecture();
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  for (const DenseTensor& tensor : dense_tensors(a)) {
    if (tensor.name.starts_with(prefix) && tensor.name.find(".mlp.") == std::string::npos) {
      shard.add(tensor.name, tensor.shape, shard.keep(tensor.name, dense.tensor(tensor.name)));
    }
  }
  const RouterInput input = options.router_inputs.empty()
                                ? guessed_input(dense.tensor(prefix + "post_attention_layernorm.weight"))
                                : options.router_inputs[static_cast<std::size_t>(layer)];
  const std::string block = prefix + "block_sparse_moe.";
  shard.add(block + "gate.weight", {options.num_experts, a.hidden_size},
            shard.keep(block + "gate.weight", upcycled_router(options, input, derive_seed(options.seed, block))));
  const std::vector<FeedForwardShard> experts =
      split_feed_forward(dense.tensor(prefix + "mlp.gate_proj.weight"), dense.tensor(prefix + "mlp.up_proj.weight"),
                         dense.tensor(prefix + "mlp.down_proj.weight"), a.hidden_size, options.top_k);
  const std::int64_t neurons = a.intermediate_size / options.top_k;
  for (std::int64_t s = 0; s < options.top_k; ++s) {
    const FeedForwardShard& expert = experts[static_cast<std::size_t>(s)];
    const auto gate = shard.keep(prefix + "mlp.gate_proj.weight", expert.gate);
    const auto up = shard.keep(prefix + "mlp.up_proj.weight", expert.up);
    const auto down = shard.keep(prefix + "mlp.down_proj.weight", expert.down);
    for (std::int64_t number = s; number < options.num_experts; number += options.top_k) {
      const std::string name = fmt::format("{}experts.{}.", block, number);
      shard.add(name + "w1.weight", {neurons, a.hidden_size}, gate);
      shard.add(name + "w3.weight", {neurons, a.hidden_size}, up);
      shard.add(name + "w2.weight", {a.hidden_size, neurons}, down);
    }
  }
}

void write_weights(const DenseCheckpoint& dense, const UpcycleOptions& options, const fs::path& folder) {
  const DenseArchitecture& a = dense.architecture();
  const std::int64_t copies = options.num_experts / options.top_k;
  const auto layer_bytes =
      static_cast<std::uint64_t>(3 * copies * a.hidden_size * a.intermediate_size) * dtype_size(options.dtype);
  const auto per_file =
      static_cast<std::int64_t>(std::max<std::uint64_t>(1, kMaxShardBytes / std::max<std::uint64_t>(1, layer_bytes)));
  const std::int64_t num_files = (a.num_layers + per_file - 1) / per_file;
  Progress progress("upcycle", a.num_layers, "layers", options.quiet);
  Json::object_t weight_map;
  std::size_t total = 0;
  for (std::int64_t number = 0; number < num_files; ++number) {
    Shard shard(options.dtype);
    if (number == 0) {
      for (const DenseTensor& tensor : dense_tensors(a)) {
        if (!tensor.name.starts_with("model.layers.")) {
          shard.add(tensor.name, tensor.shape, shard.keep(tensor.name, dense.tensor(tensor.name)));
        }
      }
    }
    for (std::int64_t layer = number * per_file; layer < std::min(a.num_layers, (number + 1) * per_file); ++layer) {
      add_layer(shard, dense, options, layer);
      progress.advance(1);
    }
    const std::string name = num_files == 1 ? std::string("model.safetensors")
                                            : fmt::format("model-{:05d}-of-{:05d}.safetensors", number + 1, num_files);
    shard.write(folder / name, weight_map);
    total += shard.data_bytes();
  }
  if (num_files > 1) {
    const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
    write_text_atomically(folder / "model.safetensors.index.json", index.dump(2) + "\n");
  }
}

}  // namespace

UpcycleStart upcycle_start_from_name(std::string_view name) {
  if (name == "grouped") {
    return UpcycleStart::kGrouped;
  }
  if (name == "signed") {
    return UpcycleStart::kSigned;
  }
  throw UsageError(fmt::format("--start must be grouped or signed, got \"{}\"; choose one", name));
}

std::vector<FeedForwardShard> split_feed_forward(const std::vector<float>& gate, const std::vector<float>& up,
                                                 const std::vector<float>& down, std::int64_t hidden_size,
                                                 std::int64_t num_shards) {
  const auto width = static_cast<std::size_t>(hidden_size);
  const auto count = static_cast<std::size_t>(num_shards);
  const std::size_t neurons = width == 0 ? 0 : gate.size() / width;
  if (width == 0 || count == 0 || neurons * width != gate.size() || up.size() != gate.size() ||
      down.size() != gate.size() || neurons % count != 0) {
    throw std::invalid_argument("upcycle: matrices of a feed-forward network that do not match, or do not divide");
  }
  const std::size_t part = neurons / count;
  const auto scale = static_cast<float>(num_shards);
  std::vector<FeedForwardShard> shards(count);
  for (std::size_t s = 0; s < count; ++s) {
    const auto first = static_cast<std::ptrdiff_t>(s * part * width);
    const auto last = static_cast<std::ptrdiff_t>((s + 1) * part * width);
    shards[s].gate.assign(gate.begin() + first, gate.begin() + last);
    shards[s].up.assign(up.begin() + first, up.begin() + last);
    shards[s].down.resize(width * part);
    for (std::size_t row = 0; row < width; ++row) {
      for (std::size_t i = 0; i < part; ++i) {
        shards[s].down[row * part + i] = scale * down[row * neurons + s * part + i];
      }
    }
  }
  return shards;
}

std::vector<float> upcycled_router(const UpcycleOptions& options, const RouterInput& input, std::uint64_t seed) {
  SplitMix64 random(seed);
  const std::size_t width = input.mean.size();
  const double length = 1.0 / std::sqrt(input.variance);
  const auto shards = static_cast<std::size_t>(options.top_k);
  std::vector<float> router(static_cast<std::size_t>(options.num_experts) * width);
  const bool with_signs = options.start == UpcycleStart::kSigned;
  const std::size_t copies = static_cast<std::size_t>(options.num_experts) / shards;
  const std::size_t per_direction = with_signs ? 2 : 1;
  for (std::size_t k = 0; k < copies / per_direction; ++k) {
    const std::vector<double> g = direction(random, input.mean, length);
    for (std::size_t s = 0; s < shards; ++s) {
      const std::vector<double> d =
          with_signs ? direction(random, input.mean, kSignedStep * length) : std::vector<double>(width, 0.0);
      for (std::size_t side = 0; side < per_direction; ++side) {
        float* const row = router.data() + ((k * per_direction + side) * shards + s) * width;
        for (std::size_t i = 0; i < width; ++i) {
          row[i] = static_cast<float>(side == 0 ? g[i] + d[i] : g[i] - d[i]);
        }
      }
    }
  }
  return router;
}

void check_upcycle(const DenseArchitecture& architecture, const UpcycleOptions& options) {
  Problems problems;
  if (options.top_k < 1) {
    problems.add(fmt::format("--top-k must be at least 1, got {}; choose another", options.top_k));
    problems.throw_usage_if_any();
  }
  constexpr std::int64_t kMostExperts = 65536;  // that a model may have
  if (options.num_experts > kMostExperts) {
    problems.add(fmt::format("--experts must be at most {}, got {}; choose fewer", kMostExperts, options.num_experts));
  } else if (options.num_experts < options.top_k || options.num_experts % options.top_k != 0) {
    problems.add(fmt::format("--experts must be a multiple of --top-k ({}), got {}; every shard is copied as often",
                             options.top_k, options.num_experts));
  } else if (options.start == UpcycleStart::kSigned && options.num_experts / options.top_k % 2 != 0) {
    problems.add(
        fmt::format("--experts must be an even multiple of --top-k ({}) for the signed start, got {}; copies "
                    "come in pairs",
                    options.top_k, options.num_experts));
  }
  if (architecture.intermediate_size % options.top_k != 0) {
    problems.add(fmt::format("--top-k must divide the feed-forward size ({}), got {}; each shard gets as many neurons",
                             architecture.intermediate_size, options.top_k));
  }
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16 && options.dtype != DType::kF16) {
    problems.add(fmt::format("--dtype must be float32, bfloat16 or float16, got {}", dtype_name(options.dtype)));
  }
  problems.throw_usage_if_any();
}

void upcycle(const DenseCheckpoint& dense, const UpcycleOptions& options, const fs::path& output,
             const std::function<void(const fs::path& folder)>& extra) {
  const DenseArchitecture& a = dense.architecture();
  check_upcycle(a, options);
  // What this program could not read again is not written.
  static_cast<void>(parse_architecture(upcycled_config(a, options), dense.path().string() + ", upcycled"));
  if (!options.router_inputs.empty() && options.router_inputs.size() != static_cast<std::size_t>(a.num_layers)) {
    throw std::invalid_argument("upcycle: router_inputs must have one entry per layer");
  }
  if (options.router_inputs.empty() && options.start == UpcycleStart::kSigned) {
    throw std::invalid_argument("upcycle: the signed start needs router_inputs");
  }
  if (fs::exists(output) && !(fs::is_directory(output) && fs::is_empty(output))) {
    throw UsageError(fmt::format("{}: exists already; remove it or choose another --to", output.string()));
  }
  AtomicFolder folder(output);
  write_weights(dense, options, folder.temporary());
  if (extra) {
    extra(folder.temporary());
  }
  write_text_atomically(folder.temporary() / "config.json", upcycled_config(a, options).dump(2) + "\n");
  folder.commit();
}

}  // namespace hestia
