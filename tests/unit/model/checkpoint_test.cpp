#include <filesystem>
#include <fstream>
#include <functional>
#include <map>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"
#include "model_fixtures.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using Catch::Matchers::Contains;
using torch::Tensor;

class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / ("hestia_unit_model_" + name)) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

bool same_tensors(MoeModel& a, MoeModel& b) {
  const auto left = a->named_tensors();
  const auto right = b->named_tensors();
  if (left.size() != right.size()) {
    return false;
  }
  for (std::size_t i = 0; i < left.size(); ++i) {
    if (left[i].first != right[i].first || !torch::equal(left[i].second, right[i].second)) {
      return false;
    }
  }
  return true;
}

// Rewrites the weights of a saved model after `change` has edited the list.
void edit_weights(const std::filesystem::path& directory,
                  const std::function<void(std::vector<std::pair<std::string, Tensor>>&)>& change) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  {
    const SafetensorsFile file(directory / "model.safetensors");
    for (const std::string& name : file.names()) {
      tensors.emplace_back(name, to_torch(file.tensor(name)));
    }
  }
  change(tensors);
  write_tensors(directory / "model.safetensors", tensors);
}

std::string load_message(const std::filesystem::path& directory) {
  try {
    static_cast<void>(load_model(directory, torch::kFloat32, torch::kCPU));
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a model is the same after saving and loading") {
  Architecture a = small_architecture();
  a.tie_word_embeddings = GENERATE(false, true);
  const torch::Dtype dtype = GENERATE(torch::kFloat32, torch::kBFloat16);
  const std::size_t shard = GENERATE(std::size_t{1} << 30, std::size_t{6000});
  const TemporaryFolder folder("roundtrip");
  MoeModel model = create_model(a, dtype, torch::kCPU, 4);
  if (dtype == torch::kBFloat16) {
    // A checkpoint holds routers in its own dtype, so only rounded ones can come back unchanged.
    const torch::NoGradGuard no_grad;
    for (Tensor& router : model->routers()) {
      router.copy_(router.to(dtype));
    }
  }
  save_model(model, folder.path(), dtype, shard);
  CHECK(std::filesystem::exists(folder.path() / "model.safetensors.index.json") == (shard < 10000));
  MoeModel loaded = load_model(folder.path(), dtype, torch::kCPU);
  CHECK(same_tensors(model, loaded));
  CHECK(router_hash(model) == router_hash(loaded));
  CHECK(loaded->architecture().tie_word_embeddings == a.tie_word_embeddings);
  CHECK(loaded->architecture().clip_qkv == a.clip_qkv);
  const torch::NoGradGuard no_grad;
  const TokenBatch batch = packed_batch(a);
  CHECK(torch::equal(model->forward(batch).hidden_BSD, loaded->forward(batch).hidden_BSD));
  // Another dtype on the way in converts every tensor.
  MoeModel wide = load_model(folder.path(), torch::kFloat64, torch::kCPU);
  CHECK(torch::equal(wide->routers()[1], model->routers()[1].to(torch::kFloat64)));
}

TEST_CASE("every misfit between config and weights is listed at once") {
  const Architecture a = small_architecture();
  const TemporaryFolder folder("misfit");
  MoeModel model = create_model(a, torch::kFloat32, torch::kCPU, 4);
  save_model(model, folder.path(), torch::kFloat32, std::size_t{1} << 30);
  edit_weights(folder.path(), [](auto& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name == "model.layers.0.mlp.gate.weight") {
        tensor = tensor.narrow(0, 0, 5).contiguous();
      } else if (name == "model.layers.1.mlp.experts.2.up_proj.weight") {
        name = "model.layers.1.mlp.experts.9.up_proj.weight";
      } else if (name == "model.norm.weight") {
        tensor = tensor.to(torch::kInt32);
      }
    }
  });
  const std::string message = load_message(folder.path());
  CHECK_THAT(message, Contains("\"model.layers.0.mlp.gate.weight\" must have shape [6, 16], got [5, 16]"));
  CHECK_THAT(message, Contains("\"model.layers.1.mlp.experts.2.up_proj.weight\" [8, 16] is missing"));
  CHECK_THAT(message, Contains("\"model.layers.1.mlp.experts.9.up_proj.weight\" [8, 16] is not part of a olmoe model"));
  CHECK_THAT(message, Contains("\"model.norm.weight\" must be F32, BF16, F16 or F64, got I32"));
  CHECK_THAT(message, Contains(folder.path().string()));
}

TEST_CASE("quantised checkpoints: widened values, and every misfit listed") {
  const TemporaryFolder folder("quantised");
  const bool fp8 = GENERATE(true, false);
  const Architecture a = fp8 ? deepseek_architecture() : gpt_oss_architecture();
  MoeModel model = create_model(a, torch::kFloat32, torch::kCPU, 4);
  save_model(model, folder.path(), torch::kFloat32, std::size_t{1} << 30);
  Json config = read_json_file(folder.path() / "config.json");
  config["quantization_config"] = fp8 ? Json{{"quant_method", "fp8"}, {"fmt", "e4m3"}, {"weight_block_size", {5, 3}}}
                                      : Json{{"quant_method", "mxfp4"}};
  write_text_atomically(folder.path() / "config.json", config.dump());
  // What the loaded model must hold, by LibTorch's own conversions.
  std::map<std::string, Tensor> expected;
  const auto scaled = [](const Tensor& x, const Tensor& scale, std::int64_t rows, std::int64_t columns) {
    return x *
           scale.repeat_interleave(rows, 0).slice(0, 0, x.size(0)).repeat_interleave(columns, 1).slice(1, 0, x.size(1));
  };
  edit_weights(folder.path(), [&](auto& tensors) {
    std::vector<std::pair<std::string, Tensor>> stored;
    std::uint64_t seed = 50;
    for (auto& [name, tensor] : tensors) {
      ++seed;
      if (fp8 && name.ends_with("_proj.weight")) {
        const Tensor bits = random_integers(0x7f, tensor.sizes(), seed).to(torch::kUInt8);  // no NaN
        const Tensor values = bits.view(torch::kFloat8_e4m3fn);
        const Tensor scale =
            random_normal({(tensor.size(0) + 4) / 5, (tensor.size(1) + 2) / 3}, seed + 1000, torch::kFloat32);
        expected[name] = scaled(values.to(torch::kFloat32), scale, 5, 3);
        stored.emplace_back(name, values);
        stored.emplace_back(name + "_scale_inv", scale);
      } else if (!fp8 && (name.ends_with("gate_up_proj") || name.ends_with("down_proj"))) {
        const std::int64_t groups = tensor.size(1) / 32;
        const Tensor bits = random_integers(256, {tensor.size(0), tensor.size(2), groups, 16}, seed);
        const Tensor scales = random_integers(8, {tensor.size(0), tensor.size(2), groups}, seed + 1000) + 120;
        const Tensor values =
            torch::tensor({0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0});
        const Tensor nibbles = torch::stack({bits.remainder(16), bits.div(16, "floor")}, 4).flatten(3);
        expected[name] = (values.index({nibbles}) * at::exp2(scales - 127).unsqueeze(3)).flatten(2).transpose(1, 2);
        stored.emplace_back(name + "_blocks", bits.to(torch::kUInt8));
        stored.emplace_back(name + "_scales", scales.to(torch::kUInt8));
      } else {
        expected[name] = tensor;
        stored.emplace_back(name, tensor);
      }
    }
    tensors = stored;
  });
  for (const torch::Dtype dtype : {torch::kFloat32, torch::kBFloat16}) {
    MoeModel loaded = load_model(folder.path(), dtype, torch::kCPU);
    std::size_t wrong = 0;
    for (const auto& [name, tensor] : loaded->named_tensors()) {
      wrong += torch::equal(tensor, expected.at(name).to(tensor.scalar_type())) ? 0 : 1;
    }
    CHECK(wrong == 0);
  }
  edit_weights(folder.path(), [&](auto& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name.ends_with("layers.0.self_attn.o_proj.weight_scale_inv") ||
          name.ends_with("layers.0.mlp.experts.down_proj_scales")) {
        name = "lost";
      } else if (name.ends_with("layers.1.self_attn.o_proj.weight_scale_inv") ||
                 name.ends_with("layers.1.mlp.experts.down_proj_blocks")) {
        tensor = tensor.narrow(0, 0, 1).contiguous();
      } else if (name.ends_with("layers.1.self_attn.kv_b_proj.weight_scale_inv") ||
                 name.ends_with("layers.1.mlp.experts.gate_up_proj_scales")) {
        tensor = tensor.to(torch::kInt32);
      }
    }
  });
  const std::string message = load_message(folder.path());
  CHECK_THAT(message, Contains(fp8 ? "o_proj.weight_scale_inv\" [4, 7] is missing"
                                   : "down_proj_scales\" [6, 32, 1] is missing"));
  CHECK_THAT(message, Contains("\"lost\"") && Contains("is not part of a"));
  CHECK_THAT(message, Contains(fp8 ? "must have shape [4, 7], got [1, 7]"
                                   : "must have shape [6, 32, 1, 16], got [1, 32, 1, 16]"));
  CHECK_THAT(message, Contains(fp8 ? "must be F32, got I32" : "must be U8, got I32"));
  // Without the word of the config the values are no floats.
  config.erase("quantization_config");
  write_text_atomically(folder.path() / "config.json", config.dump());
  CHECK_THAT(load_message(folder.path()), Contains(fp8 ? "got F8_E4M3" : "gate_up_proj\" [6, 32, 64] is missing"));
}

TEST_CASE("experts of gpt-oss refuse adapters") {
  MoeModel model = create_model(gpt_oss_architecture(), torch::kFloat32, torch::kCPU, 4);
  CHECK_THROWS_WITH(model->add_adapters({2, 4.0}),
                    Contains("experts of gpt_oss models") && Contains("train routers only"));
  CHECK(model->named_adapters().empty());
}

TEST_CASE("tensors that add nothing are accepted, a head that contradicts tying is not") {
  Architecture a = small_architecture();
  a.tie_word_embeddings = true;
  const TemporaryFolder folder("redundant");
  MoeModel model = create_model(a, torch::kFloat32, torch::kCPU, 4);
  save_model(model, folder.path(), torch::kFloat32, std::size_t{1} << 30);
  CHECK_FALSE(SafetensorsCheckpoint(folder.path()).contains("lm_head.weight"));
  const Tensor embedding = to_torch(SafetensorsCheckpoint(folder.path()).tensor("model.embed_tokens.weight"));
  edit_weights(folder.path(), [&](auto& tensors) {
    tensors.emplace_back("lm_head.weight", embedding);
    tensors.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", torch::ones({2}));
  });
  MoeModel loaded = load_model(folder.path(), torch::kFloat32, torch::kCPU);
  CHECK(same_tensors(model, loaded));
  edit_weights(folder.path(), [&](auto& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name == "lm_head.weight") {
        tensor = embedding + 1;
      }
    }
  });
  CHECK_THAT(load_message(folder.path()), Contains("\"lm_head.weight\" [37, 16] is not part of"));
}

TEST_CASE("a truncated checkpoint is an input error") {
  const TemporaryFolder folder("truncated");
  MoeModel model = create_model(small_architecture(), torch::kFloat32, torch::kCPU, 4);
  save_model(model, folder.path(), torch::kFloat32, std::size_t{1} << 30);
  const std::filesystem::path file = folder.path() / "model.safetensors";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 100);
  CHECK_THAT(load_message(folder.path()), Contains("model.safetensors"));
  std::filesystem::remove(file);
  CHECK_FALSE(load_message(folder.path()).empty());
}

TEST_CASE("routers travel alone, and only to a model they fit") {
  const Architecture a = small_architecture();
  const TemporaryFolder folder("routers");
  const std::filesystem::path file = folder.path() / "router.safetensors";
  MoeModel source = create_model(a, torch::kBFloat16, torch::kCPU, 4);
  MoeModel target = create_model(a, torch::kFloat32, torch::kCPU, 5);
  CHECK(router_hash(source) != router_hash(target));
  save_routers(source, file);
  {
    const SafetensorsFile saved(file);
    CHECK(saved.names().size() == 3);
    CHECK(saved.tensor("model.layers.2.mlp.gate.weight").dtype == DType::kF32);
  }
  load_routers(target, file);
  CHECK(router_hash(source) == router_hash(target));
  CHECK(torch::equal(source->routers()[2], target->routers()[2]));
  CHECK(target->routers()[0].requires_grad());

  const std::string hash = router_hash(target);
  Architecture other = a;
  other.num_layers = 2;
  other.num_experts = 5;
  MoeModel smaller = create_model(other, torch::kFloat32, torch::kCPU, 4);
  save_routers(smaller, file);
  try {
    load_routers(target, file);
    FAIL("routers of another model were accepted");
  } catch (const InputError& error) {
    CHECK_THAT(error.what(), Contains("\"model.layers.2.mlp.gate.weight\" [6, 16] is missing") &&
                                 Contains("\"model.layers.0.mlp.gate.weight\" must have shape [6, 16], got [5, 16]"));
  }
  CHECK(router_hash(target) == hash);
  save_routers(target, file);
  CHECK_THROWS_WITH(load_routers(smaller, file), Contains("\"model.layers.2.mlp.gate.weight\" is not a router"));
}

TEST_CASE("the hash sees one changed bit") {
  MoeModel model = create_model(small_architecture(), torch::kFloat32, torch::kCPU, 4);
  const std::string before = router_hash(model);
  CHECK(before.size() == 64);
  const torch::NoGradGuard no_grad;
  model->routers()[1][3][7].add_(1e-6F);
  CHECK(router_hash(model) != before);
}

TEST_CASE("new models depend on the seed alone") {
  Architecture a = small_architecture();
  a.hidden_size = 64;
  a.head_dim = 16;
  a.initializer_range = 0.05;
  MoeModel first = create_model(a, torch::kFloat32, torch::kCPU, 9);
  MoeModel second = create_model(a, torch::kFloat32, torch::kCPU, 9);
  MoeModel third = create_model(a, torch::kFloat32, torch::kCPU, 10);
  MoeModel low = create_model(a, torch::kBFloat16, torch::kCPU, 9);
  CHECK(same_tensors(first, second));
  const auto named = first->named_tensors();
  const auto other = third->named_tensors();
  const auto rounded = low->named_tensors();
  const std::vector<TensorSpec> specs = tensor_specs(a);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CAPTURE(named[i].first);
    const Tensor& tensor = named[i].second;
    CHECK(torch::equal(rounded[i].second, tensor.to(rounded[i].second.scalar_type())));
    if (specs[i].role == TensorRole::kNorm) {
      CHECK(tensor.eq(1).all().item<bool>());
    } else if (tensor.dim() == 1) {
      CHECK(tensor.eq(0).all().item<bool>());
    } else {
      CHECK_FALSE(torch::equal(tensor, other[i].second));
      CHECK(tensor.std().item<double>() == Approx(0.05).epsilon(0.2));
      CHECK(std::abs(tensor.mean().item<double>()) < 0.01);
    }
  }
  CHECK_FALSE(torch::equal(named[3].second.flatten().narrow(0, 0, 8), named[1].second.flatten().narrow(0, 0, 8)));
}

TEST_CASE("dtypes and devices have names") {
  CHECK(dtype_from_recipe("float32") == torch::kFloat32);
  CHECK(dtype_from_recipe("bfloat16") == torch::kBFloat16);
  CHECK(dtype_from_recipe("bf16") == torch::kBFloat16);
  CHECK(dtype_from_recipe("float64") == torch::kFloat64);
  CHECK_THROWS_AS(dtype_from_recipe("int8"), UsageError);
  CHECK_THROWS_WITH(dtype_from_recipe("fp8"), Contains("got \"fp8\"; use float32"));
  CHECK(device_from_recipe("cpu").is_cpu());
  CHECK(device_from_recipe("auto").is_cuda() == torch::hasCUDA());
  for (const char* wrong : {"gpu", "cuda:", "cuda:x", "cuda:-1", "", "cuda:99999"}) {
    CHECK_THROWS_AS(device_from_recipe(wrong), UsageError);
  }
  CHECK_THROWS_WITH(device_from_recipe("cuda:99"), Contains("got \"cuda:99\""));
  if (!torch::hasCUDA()) {
    CHECK_THROWS_WITH(device_from_recipe("cuda"), Contains("0 usable GPUs"));
  }
}

TEST_CASE("safetensors dtypes map to LibTorch and back") {
  for (const DType dtype :
       {DType::kBool, DType::kU8, DType::kI8, DType::kI16, DType::kU16, DType::kF16, DType::kBF16, DType::kI32,
        DType::kU32, DType::kF32, DType::kF64, DType::kI64, DType::kU64, DType::kF8E4M3, DType::kF8E5M2}) {
    CHECK(safetensors_dtype(torch_dtype(dtype)) == dtype);
    CHECK(c10::elementSize(torch_dtype(dtype)) == dtype_size(dtype));
  }
  CHECK_THROWS_AS(safetensors_dtype(torch::kComplexFloat), InputError);
}

TEST_CASE("tensors come back from a file, aligned or not, and convert on the way") {
  const TemporaryFolder folder("tensors");
  const std::filesystem::path file = folder.path() / "t.safetensors";
  const Tensor values = random_normal({3, 5}, 12, torch::kFloat32);
  write_tensors(
      file, {{"a", values}, {"strided", values.t()}, {"scalar", torch::tensor(2.5F)}, {"none", torch::empty({0, 4})}},
      {{"key", "value"}});
  const SafetensorsFile saved(file);
  CHECK(saved.metadata().at("key") == "value");
  CHECK(torch::equal(to_torch(saved.tensor("a")), values));
  CHECK(torch::equal(to_torch(saved.tensor("strided")), values.t()));
  CHECK(to_torch(saved.tensor("scalar")).item<float>() == 2.5F);
  CHECK(to_torch(saved.tensor("none")).sizes() == at::IntArrayRef({0, 4}));
  // One byte off its natural place, as any header length may leave it.
  std::vector<std::byte> shifted(values.nbytes() + 1);
  std::copy_n(static_cast<const std::byte*>(values.const_data_ptr()), values.nbytes(), shifted.begin() + 1);
  TensorView view{"odd", DType::kF32, {3, 5}, std::span(shifted).subspan(1)};
  CHECK(torch::equal(to_torch(view), values));
  Tensor target = torch::empty({5, 3}, torch::kBFloat16).t();
  copy_into(view, target);
  CHECK(torch::equal(target, values.to(torch::kBFloat16)));
  copy_into(saved.tensor("a"), target);
  CHECK(torch::equal(target, values.to(torch::kBFloat16)));
  CHECK_THROWS_WITH(copy_into(view, torch::empty({5, 3})), Contains("shape must be [5, 3], got [3, 5]"));
}
