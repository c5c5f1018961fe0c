#include "hestia/model/adapters.hpp"

#include <filesystem>
#include <functional>
#include <limits>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/model/tuned_checkpoint.hpp"
#include "model_fixtures.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace hestia;
using namespace hestia::testing;
using Catch::Matchers::Contains;
using torch::Tensor;

MoeModel make_model(torch::Dtype dtype = torch::kFloat32, std::uint64_t seed = 11) {
  return create_model(small_architecture(), dtype, torch::kCPU, seed);
}

// Adapters as after some training: B is not zero any more.
void train_adapters(MoeModel& model, const AdapterSettings& settings = {3, 6.0}) {
  create_adapters(model, settings, 5);
  const torch::NoGradGuard no_grad;
  std::uint64_t seed = 70;
  for (auto& [name, tensor] : model->named_adapters()) {
    ++seed;
    if (name.ends_with("lora_B.weight")) {
      tensor.copy_(random_normal(tensor.sizes(), seed) * 0.2);
    }
  }
}

void move_routers(MoeModel& model) {
  const torch::NoGradGuard no_grad;
  std::uint64_t seed = 50;
  for (Tensor& router : model->routers()) {
    router.add_(random_normal(router.sizes(), ++seed, torch::kFloat32), 0.3);
  }
}

Tensor hidden_of(MoeModel& model) {
  const torch::NoGradGuard no_grad;
  return model->forward(packed_batch(model->architecture())).hidden_BSD;
}

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("fresh adapters leave the model as it was, to the bit") {
  const torch::Dtype dtype = GENERATE(torch::kFloat32, torch::kBFloat16);
  MoeModel model = make_model(dtype);
  if (GENERATE(false, true)) {
    model->set_executor(std::make_shared<DenseExecutor>());
  }
  const Tensor base = hidden_of(model);
  CHECK(model->adapters().empty());
  CHECK(model->named_adapters().empty());
  CHECK_FALSE(model->adapter_settings());
  create_adapters(model, {4, 16.0}, 9);
  CHECK(torch::equal(hidden_of(model), base));
  REQUIRE(model->adapter_settings());
  CHECK(model->adapter_settings()->rank == 4);
  CHECK(model->adapter_settings()->alpha == 16.0);
  for (const Tensor& tensor : model->adapters()) {
    CHECK(tensor.scalar_type() == dtype);
    CHECK_FALSE(tensor.requires_grad());
  }
  train_adapters(model);
  CHECK(model->adapters().size() == 4 * 3);
  CHECK_FALSE(torch::equal(hidden_of(model), base));
  model->remove_adapters();
  CHECK(torch::equal(hidden_of(model), base));
  CHECK(model->adapters().empty());
}

TEST_CASE("A starts uniform within one over the root of its width, from the seed alone, every expert its own, B zero") {
  const Architecture a = small_architecture();
  MoeModel model = make_model();
  create_adapters(model, {5, 1.0}, 9);
  const auto named = model->named_adapters();
  REQUIRE(named.size() == 3 * 6 * 2 * 2);
  Tensor before;
  for (const auto& [name, tensor] : named) {
    CAPTURE(name);
    const bool up = name.find("up_proj") != std::string::npos;
    const std::int64_t in = up ? a.hidden_size : a.expert_intermediate_size;
    const std::int64_t out = up ? a.expert_intermediate_size : a.hidden_size;
    if (name.ends_with(".lora_A.weight")) {
      CHECK(tensor.sizes() == at::IntArrayRef({5, in}));
      const double bound = 1.0 / std::sqrt(static_cast<double>(in));
      CHECK(tensor.abs().max().item<double>() <= bound);
      CHECK(tensor.abs().max().item<double>() > 0.8 * bound);
      // Standard deviation of a uniform variable: its bound over the root of 3.
      CHECK(tensor.std().item<double>() == Approx(bound / std::sqrt(3.0)).epsilon(0.25));
      CHECK((!before.defined() || before.sizes() != tensor.sizes() || !torch::equal(before, tensor)));
      before = tensor;
    } else {
      CHECK(name.ends_with(".lora_B.weight"));
      CHECK(tensor.sizes() == at::IntArrayRef({out, 5}));
      CHECK(tensor.abs().max().item<float>() == 0.0F);
    }
  }
  CHECK(named[0].first == "model.layers.0.mlp.experts.0.up_proj.lora_A.weight");
  CHECK(named[3].first == "model.layers.0.mlp.experts.0.down_proj.lora_B.weight");
  MoeModel same = make_model(torch::kFloat32, 12);
  create_adapters(same, {5, 1.0}, 9);
  MoeModel other = make_model();
  create_adapters(other, {5, 1.0}, 10);
  CHECK(torch::equal(same->adapters()[0], model->adapters()[0]));
  CHECK_FALSE(torch::equal(other->adapters()[0], model->adapters()[0]));
  MoeModel narrow = make_model(torch::kBFloat16);
  create_adapters(narrow, {5, 1.0}, 9);
  CHECK(torch::equal(narrow->adapters()[2], model->adapters()[2].to(torch::kBFloat16)));
}

TEST_CASE("adapters and K outside their bounds are refused") {
  MoeModel model = make_model();
  CHECK_THROWS_WITH(model->add_adapters({0, 1.0}), Contains("got 0 and 1"));
  CHECK_THROWS_AS(model->add_adapters({2, 0.0}), std::invalid_argument);
  CHECK_THROWS_AS(model->add_adapters({2, std::numeric_limits<double>::infinity()}), std::invalid_argument);
  CHECK(model->adapters().empty());
  CHECK_THROWS_WITH(model->set_top_k(0), Contains("between 1 and 6, got 0"));
  CHECK_THROWS_WITH(model->set_top_k(7), Contains("between 1 and 6, got 7"));
  CHECK(model->architecture().top_k == 2);
  CHECK_THROWS_AS(adapter_name("model.norm.bias", 'A'), std::invalid_argument);
  const TemporaryFolder folder;
  CHECK_THROWS_AS(save_adapters(model, folder.path() / "none.safetensors"), std::logic_error);
}

TEST_CASE("gradients reach routers and adapters of every layer and nothing else, checkpointed or not") {
  MoeModel model = make_model(torch::kFloat64);
  train_adapters(model);
  freeze_all_but_routers(model);
  for (Tensor& tensor : model->adapters()) {
    tensor.set_requires_grad(true);
  }
  const auto gradients = [&](bool checkpointing, std::shared_ptr<Executor> executor) {
    model->set_activation_checkpointing(checkpointing);
    model->set_executor(std::move(executor));
    probe_loss(model->forward(packed_batch(model->architecture()))).backward();
    std::vector<Tensor> found;
    for (const std::vector<Tensor>& list : {model->routers(), model->adapters()}) {
      for (Tensor parameter : list) {
        REQUIRE(parameter.grad().defined());
        CHECK(parameter.grad().abs().max().item<double>() > 0.0);
        found.push_back(parameter.grad().clone());
        parameter.mutable_grad() = Tensor();
      }
    }
    for (const Tensor& parameter : model->all_parameters()) {
      CHECK_FALSE(parameter.grad().defined());
    }
    return found;
  };
  // Merged weights and autograd's own derivative of them.
  const std::vector<Tensor> expected = gradients(false, std::make_shared<DenseExecutor>());
  for (const bool checkpointing : {false, true}) {
    const std::vector<Tensor> found = gradients(checkpointing, std::make_shared<GroupedExecutor>());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(relative_error(found[i], expected[i]) <= 1e-10);
    }
  }
}

TEST_CASE("the base model's forward leaves adapters and a changed K aside") {
  MoeModel model = make_model();
  const TokenBatch batch = packed_batch(model->architecture());
  const torch::NoGradGuard no_grad;
  const ModelOutput base = model->forward(batch);
  model->keep_reference_routers();
  train_adapters(model);
  move_routers(model);
  model->set_top_k(1);
  const ModelOutput tuned = model->forward(batch);
  CHECK_FALSE(torch::equal(tuned.hidden_BSD, base.hidden_BSD));
  for (const RoutingRecord& record : tuned.routing) {
    CHECK(record.selected_TK.sizes() == at::IntArrayRef({18, 1}));
    CHECK(torch::equal(record.selected_TK, top_k_lowest_index(record.logits_TE, 1)));
    // The family divides the weights by their sum: over one expert that is 1.
    CHECK(torch::allclose(record.weights_TK, torch::ones({18, 1})));
  }
  const ModelOutput reference = model->forward_reference(batch);
  CHECK(torch::equal(reference.hidden_BSD, base.hidden_BSD));
  for (std::size_t i = 0; i < base.routing.size(); ++i) {
    CHECK(torch::equal(reference.routing[i].selected_TK, base.routing[i].selected_TK));
    CHECK(torch::equal(reference.routing[i].logits_TE, base.routing[i].logits_TE));
  }
  CHECK(model->architecture().top_k == 1);
}

TEST_CASE("adapters travel alone, and only to a model they fit") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "adapters.safetensors";
  const torch::Dtype dtype = GENERATE(torch::kFloat32, torch::kBFloat16);
  MoeModel model = make_model(dtype);
  train_adapters(model, {3, 0.1});
  save_adapters(model, path);
  const SafetensorsFile file(path);
  CHECK(file.metadata().at("hestia_format") == "adapters 1");
  CHECK(file.metadata().at("rank") == "3");
  CHECK(file.metadata().at("alpha") == "0.1");
  CHECK(file.tensor("model.layers.2.mlp.experts.5.down_proj.lora_A.weight").shape == std::vector<std::int64_t>{3, 8});
  CHECK(file.names().size() == 72);

  MoeModel loaded = make_model(dtype);
  create_adapters(loaded, {2, 1.0}, 1);  // give way
  load_adapters(loaded, path);
  CHECK(loaded->adapter_settings()->rank == 3);
  CHECK(loaded->adapter_settings()->alpha == 0.1);
  for (std::size_t i = 0; i < model->adapters().size(); ++i) {
    CHECK(torch::equal(loaded->adapters()[i], model->adapters()[i]));
  }
  CHECK(torch::equal(hidden_of(loaded), hidden_of(model)));

  // Damages: each leaves the model as it was.
  const auto damaged = [&](const std::function<void(std::vector<std::pair<std::string, Tensor>>&,
                                                    std::vector<std::pair<std::string, std::string>>&)>& edit) {
    std::vector<std::pair<std::string, Tensor>> tensors = model->named_adapters();
    std::vector<std::pair<std::string, std::string>> metadata(file.metadata().begin(), file.metadata().end());
    edit(tensors, metadata);
    write_tensors(folder.path() / "damaged.safetensors", tensors, metadata);
    MoeModel target = make_model(dtype);
    const std::string message = message_of([&] { load_adapters(target, folder.path() / "damaged.safetensors"); });
    CHECK(target->adapters().empty());
    return message;
  };
  const auto set = [](std::vector<std::pair<std::string, std::string>>& metadata, const std::string& key,
                      const std::string& value) {
    for (auto& [name, text] : metadata) {
      text = name == key ? value : text;
    }
  };
  CHECK_THAT(damaged([&](auto&, auto& metadata) { set(metadata, "hestia_format", "adapters 2"); }),
             Contains("must be \"adapters 1\", got \"adapters 2\""));
  CHECK_THAT(damaged([&](auto&, auto& metadata) { metadata.clear(); }), Contains("got nothing"));
  CHECK_THAT(
      damaged([&](auto&, auto& metadata) {
        set(metadata, "rank", "3.5");
        set(metadata, "alpha", "-1");
      }),
      Contains("rank must be a positive number, got \"3.5\"") && Contains("alpha must be") && Contains("\"-1\""));
  CHECK_THAT(damaged([&](auto& tensors, auto&) {
               tensors.erase(tensors.begin());
               tensors[4].second = tensors[4].second.t().contiguous();
               tensors.emplace_back("stray", torch::ones({2}));
             }),
             Contains("adapter \"model.layers.0.mlp.experts.0.up_proj.lora_A.weight\" [3, 16] is missing") &&
                 Contains("must have shape") && Contains("\"stray\" is not an adapter of this model"));
}

TEST_CASE("a merged weight is the sum in float32, rounded once") {
  const Tensor weight = random_normal({7, 5}, 1);
  const Tensor a = random_normal({3, 5}, 2);
  const Tensor b = random_normal({7, 3}, 3);
  const Tensor exact = weight + 0.5 * b.matmul(a);
  CHECK(relative_error(merged_weight(weight, a, b, 0.5), exact) <= 1e-14);
  const Tensor low = merged_weight(weight.to(torch::kBFloat16), a.to(torch::kBFloat16), b.to(torch::kBFloat16), 0.5);
  const Tensor sum =
      weight.to(torch::kBFloat16).to(torch::kFloat32) +
      0.5 * b.to(torch::kBFloat16).to(torch::kFloat32).matmul(a.to(torch::kBFloat16).to(torch::kFloat32));
  CHECK(low.scalar_type() == torch::kBFloat16);
  CHECK(torch::equal(low, sum.to(torch::kBFloat16)));
}

TEST_CASE("a tuned checkpoint is the base's directory with the tuned parts in it") {
  const TemporaryFolder folder;
  const torch::Dtype stored = GENERATE(torch::kFloat32, torch::kBFloat16);
  const bool sharded = GENERATE(false, true);
  const auto base = folder.path() / "base";
  const auto output = folder.path() / "made" / "tuned";
  {
    MoeModel model = make_model(stored);
    save_model(model, base, stored, sharded ? 3000 : 1 << 30);
    write_text_atomically(base / "tokenizer.model", "the vocabulary");
    write_text_atomically(base / "pytorch_model.bin", "old weights");
  }
  MoeModel tuned = load_model(base, stored, torch::kCPU);
  move_routers(tuned);
  TunedParts parts;
  parts.routers = folder.path() / "router.safetensors";
  save_routers(tuned, parts.routers);
  parts.top_k = 2;
  const bool adapters = GENERATE(false, true);
  if (adapters) {
    train_adapters(tuned);
    parts.adapters = folder.path() / "adapters.safetensors";
    save_adapters(tuned, *parts.adapters);
    parts.top_k = 1;
    tuned->set_top_k(1);
  }
  // Another's folder, that only looks like a temporary one.
  const std::filesystem::path others = folder.path() / "made" / "tuned.tmp";
  std::filesystem::create_directories(others);
  write_text_atomically(others / "mine.txt", "mine");
  clear_degradations();
  write_tuned_checkpoint(base, parts, output);
  CHECK(degradations().size() == 1);
  CHECK_THAT(degradations().at(0), Contains("\"pytorch_model.bin\" is not copied"));
  clear_degradations();
  CHECK_FALSE(std::filesystem::exists(output / "pytorch_model.bin"));
  CHECK(read_text_file(output / "tokenizer.model") == "the vocabulary");
  CHECK(read_text_file(others / "mine.txt") == "mine");
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path() / "made"), {}) == 2);

  const Architecture architecture = read_architecture(output);
  CHECK(architecture.top_k == parts.top_k);
  Json config = read_json_file(output / "config.json");
  config["num_experts_per_tok"] = 2;
  CHECK(config == read_json_file(base / "config.json"));

  // Nothing but routers and merged projections differs, by a byte.
  const SafetensorsCheckpoint before(base);
  const SafetensorsCheckpoint after(output);
  REQUIRE(after.files().size() == before.files().size());
  CHECK((after.files().size() > 1) == sharded);
  std::size_t linked = 0;
  for (std::size_t i = 0; i < before.files().size(); ++i) {
    CHECK(after.files()[i].path().filename() == before.files()[i].path().filename());
    CHECK(after.files()[i].names() == before.files()[i].names());
    CHECK(after.files()[i].metadata() == before.files()[i].metadata());
    linked += std::filesystem::hard_link_count(after.files()[i].path()) > 1 ? 1 : 0;
  }
  CHECK((linked > 0) == sharded);
  for (const TensorSpec& spec : tensor_specs(architecture)) {
    CAPTURE(spec.name);
    const TensorView& old_view = before.tensor(spec.name);
    const TensorView& new_view = after.tensor(spec.name);
    CHECK(new_view.dtype == old_view.dtype);
    const bool same = std::ranges::equal(new_view.bytes, old_view.bytes);
    const bool merged = adapters && (spec.part == TensorPart::kExpertUp || spec.part == TensorPart::kExpertDown);
    CHECK(same == !(spec.role == TensorRole::kRouter || merged));
  }

  // Loaded as a plain model it does what routers and adapters did.
  MoeModel plain = load_model(output, torch::kFloat32, torch::kCPU);
  MoeModel apart = load_model(base, torch::kFloat32, torch::kCPU);
  load_routers(apart, parts.routers);
  if (adapters) {
    load_adapters(apart, *parts.adapters);
  }
  apart->set_top_k(parts.top_k);
  if (stored == torch::kFloat32) {
    CHECK(relative_error(hidden_of(plain), hidden_of(apart)) <= 1e-5);
  } else {
    for (std::size_t i = 0; i < plain->routers().size(); ++i) {
      CHECK(torch::equal(plain->routers()[i], apart->routers()[i].to(torch::kBFloat16).to(torch::kFloat32)));
    }
    CHECK(normalised_square_error(hidden_of(plain), hidden_of(apart)) <= 5e-3);
  }

  // Not over what is there.
  CHECK_THROWS_WITH(write_tuned_checkpoint(base, parts, output), Contains("exists already"));
  CHECK_THROWS_AS(write_tuned_checkpoint(base, parts, base), UsageError);
}

TEST_CASE("a tuned checkpoint is refused as a whole when its parts are of another model") {
  const TemporaryFolder folder;
  const auto base = folder.path() / "base";
  const auto output = folder.path() / "tuned";
  {
    MoeModel model = make_model();
    save_model(model, base, torch::kFloat32, 1 << 30);
  }
  Architecture other = small_architecture();
  other.num_experts = 7;
  MoeModel stranger = create_model(other, torch::kFloat32, torch::kCPU, 1);
  train_adapters(stranger);
  TunedParts parts;
  parts.routers = folder.path() / "router.safetensors";
  parts.top_k = 2;
  save_routers(stranger, parts.routers);
  CHECK_THAT(message_of([&] { write_tuned_checkpoint(base, parts, output); }), Contains("must have shape [6, 16]"));
  MoeModel model = make_model();
  save_routers(model, parts.routers);
  parts.adapters = folder.path() / "adapters.safetensors";
  save_adapters(stranger, *parts.adapters);
  CHECK_THAT(message_of([&] { write_tuned_checkpoint(base, parts, output); }), Contains("is not an adapter"));
  parts.adapters.reset();
  parts.top_k = 7;
  CHECK_THROWS_AS(write_tuned_checkpoint(base, parts, output), std::invalid_argument);
  parts.top_k = 2;
  parts.routers = folder.path() / "nothing.safetensors";
  CHECK_THROWS_AS(write_tuned_checkpoint(base, parts, output), InputError);
  CHECK_FALSE(std::filesystem::exists(output));
}
