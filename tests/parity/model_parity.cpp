// Parity with transformers over the goldens that make_goldens.py wrote.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <set>

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/safetensors.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/model/tuned_checkpoint.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace hestia;
using torch::Tensor;

constexpr const char* kGoldenVersion = "3";
constexpr std::int64_t kPrefill = 7;  // PREFILL of make_goldens.py

struct Golden {
  std::filesystem::path directory;
  Tensor tokens_S;
  Tensor logits_SV;
  Tensor router_logits_LSE;
  Tensor selected_LSK;
  Tensor weights_LSK;
  std::vector<double> bfloat16_errors;  // largest, normalised square
  Tensor bfloat16_cached_logits_SV;     // after kPrefill tokens at once, then one by one
};

Golden load_golden(const std::string& name) {
  Golden golden;
  golden.directory = std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/parity/goldens" / name;
  const SafetensorsFile file(golden.directory / "golden.safetensors");
  const auto version = file.metadata().find("golden_version");
  if (version == file.metadata().end() || version->second != kGoldenVersion) {
    FAIL(file.path().string() << ": golden version must be " << kGoldenVersion << ", got "
                              << (version == file.metadata().end() ? "none" : version->second)
                              << "; run build/venv/bin/python tests/parity/make_goldens.py");
  }
  golden.tokens_S = to_torch(file.tensor("tokens"));
  golden.logits_SV = to_torch(file.tensor("logits"));
  golden.router_logits_LSE = to_torch(file.tensor("router_logits"));
  golden.selected_LSK = to_torch(file.tensor("selected"));
  golden.weights_LSK = to_torch(file.tensor("weights"));
  const Tensor errors = to_torch(file.tensor("bfloat16_errors"));
  golden.bfloat16_errors = {errors[0].item<double>(), errors[1].item<double>()};
  golden.bfloat16_cached_logits_SV = to_torch(file.tensor("bfloat16_cached_logits"));
  return golden;
}

TokenBatch one_sequence(const Tensor& tokens_S) {
  return {tokens_S.unsqueeze(0), torch::arange(tokens_S.size(0)).unsqueeze(0),
          torch::zeros({1, tokens_S.size(0)}, torch::kInt64)};
}

Tensor stacked(const ModelOutput& output, Tensor RoutingRecord::*member) {
  std::vector<Tensor> layers;
  for (const RoutingRecord& record : output.routing) {
    layers.push_back(record.*member);
  }
  return torch::stack(layers);
}

// Largest difference as a share of the largest reference value.
double relative_error(const Tensor& ours, const Tensor& reference) {
  REQUIRE(ours.sizes() == reference.sizes());
  REQUIRE(ours.isfinite().all().item<bool>());
  return ((ours.to(torch::kFloat64) - reference.to(torch::kFloat64)).abs().max() /
          reference.to(torch::kFloat64).abs().max())
      .item<double>();
}

double normalised_square_error(const Tensor& ours, const Tensor& reference) {
  const Tensor difference = ours.to(torch::kFloat64) - reference.to(torch::kFloat64);
  return (difference.square().sum() / reference.to(torch::kFloat64).square().sum()).item<double>();
}

void report(const std::string& what, double error, double tolerance) {
  INFO(fmt::format("{}: largest difference {:.2e}, {:.1f}% of the tolerance", what, error, 100 * error / tolerance));
  CHECK(error <= tolerance);
}

// Where transformers itself is farther off, these few numbers are that sensitive.
void report_bfloat16(const std::string& what, const Tensor& ours, const Tensor& reference, const Golden& golden) {
  report(what, relative_error(ours, reference), std::max(4e-2, 2 * golden.bfloat16_errors[0]));
  report(what + ", normalised square error", normalised_square_error(ours, reference),
         std::max(5e-4, 2 * golden.bfloat16_errors[1]));
}

/// Serves the float32 selection: a router near a tie may flip in bf16, which says nothing about the products.
struct ForcedSelector final : Selector {
  Tensor selected_LSK;  // of the tokens of the forward
  Tensor select(const Tensor& /*logits_TE*/, std::int64_t /*top_k*/, std::int64_t moe_layer,
                const TokenBatch& /*batch*/) override {
    return selected_LSK[moe_layer];
  }
};

/// Mixes with the float32 weights: sparsemixer leaves out what is below a threshold, which a rounded logit may cross.
struct ForcedWeights final : GroupedExecutor {
  Tensor weights_LSK;  // of the tokens of the forward
  Tensor run(const ExpertWeights& experts, const Tensor& x_TD, const Tensor& selected_TK, const Tensor& /*weights_TK*/,
             std::int64_t moe_layer) override {
    return GroupedExecutor::run(experts, x_TD, selected_TK, weights_LSK[moe_layer], moe_layer);
  }
};

const std::vector<std::string> kCases = {"hub_plain",
                                         "normalised_gqa",
                                         "clipped_tied",
                                         "odd_sizes_linear_rope",
                                         "biased_top1",
                                         "qwen2_plain",
                                         "qwen2_dense_layers",
                                         "qwen2_layer_types",
                                         "qwen3_plain",
                                         "qwen3_windowed",
                                         "mixtral_plain",
                                         "mixtral_windowed",
                                         "phimoe_short",
                                         "phimoe_long",
                                         "phimoe_plain",
                                         "gpt_oss_plain",
                                         "gpt_oss_mxfp4",
                                         "gpt_oss_unbiased",
                                         "qwen3_fp8",
                                         "deepseek_v2_plain",
                                         "deepseek_v2_groups",
                                         "deepseek_v2_normalised",
                                         "deepseek_v2_one_scale"};

// The first tokens and the most likely next one, `steps` times.
Tensor generated(MoeModel& model, const Tensor& tokens_S, std::int64_t steps) {
  Tensor tokens = tokens_S.narrow(0, 0, 5);
  for (std::int64_t step = 0; step < steps; ++step) {
    const Tensor logits_SV = model->head(model->forward(one_sequence(tokens)).hidden_BSD)[0];
    tokens = torch::cat({tokens, logits_SV[-1].argmax(-1, /*keepdim=*/true)});
  }
  return tokens;
}

// What `make_goldens.py --check` reads: transformers must compute the same from the directory.
void write_expectation(const std::filesystem::path& directory, MoeModel& model, const Tensor& tokens_S,
                       const ModelOutput& output, const Tensor& logits_SV) {
  write_tensors(directory / "logits.safetensors", {{"tokens", tokens_S},
                                                   {"logits", logits_SV},
                                                   {"router_logits", stacked(output, &RoutingRecord::logits_TE)},
                                                   {"generated", generated(model, tokens_S, 7)}});
}

bool transformers_agrees(const std::vector<std::filesystem::path>& directories) {
  std::string command =
      fmt::format("'{}' -B '{}/tests/parity/make_goldens.py' --check", HESTIA_PYTHON, HESTIA_SOURCE_DIR);
  for (const std::filesystem::path& directory : directories) {
    command += fmt::format(" '{}'", directory.string());
  }
  return std::system(command.c_str()) == 0;
}

}  // namespace

TEST_CASE("every golden directory is tested and every tested one exists") {
  std::set<std::string> found;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(HESTIA_SOURCE_DIR) / "tests/parity/goldens")) {
    found.insert(entry.path().filename().string());
  }
  CHECK(found == std::set<std::string>(kCases.begin(), kCases.end()));
}

TEST_CASE("float32 logits, router logits and selections equal transformers'") {
  const std::string name = GENERATE(from_range(kCases));
  CAPTURE(name);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kFloat32, torch::kCPU);
  const bool dense = GENERATE(false, true);
  if (dense) {
    model->set_executor(std::make_shared<DenseExecutor>());
  }
  const ModelOutput output = model->forward(one_sequence(golden.tokens_S));
  report("logits", relative_error(model->head(output.hidden_BSD)[0], golden.logits_SV), 1e-4);
  report("router logits", relative_error(stacked(output, &RoutingRecord::logits_TE), golden.router_logits_LSE), 1e-4);
  CHECK(torch::equal(stacked(output, &RoutingRecord::selected_TK), golden.selected_LSK));
  report("mixing weights", relative_error(stacked(output, &RoutingRecord::weights_TK), golden.weights_LSK), 1e-4);
  for (const RoutingRecord& record : output.routing) {
    CHECK(torch::allclose(record.probabilities_TE, record.logits_TE.softmax(1)));
  }
}

TEST_CASE("bfloat16 logits stay near transformers' float32 ones") {
  const std::string name = GENERATE(from_range(kCases));
  CAPTURE(name);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kBFloat16, torch::kCPU);
  const auto forced = std::make_shared<ForcedSelector>();
  forced->selected_LSK = golden.selected_LSK;
  model->set_selector(forced);
  const ModelOutput output = model->forward(one_sequence(golden.tokens_S));
  const Tensor logits = model->head(output.hidden_BSD)[0];
  CHECK(logits.scalar_type() == torch::kBFloat16);
  report_bfloat16("logits", logits, golden.logits_SV, golden);
  CHECK(stacked(output, &RoutingRecord::logits_TE).scalar_type() == torch::kFloat32);
}

TEST_CASE("bfloat16 logits of a key-value cache stay near transformers' bfloat16 ones of its own, and float32 ones") {
  const std::string name = GENERATE(from_range(kCases));
  CAPTURE(name);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kBFloat16, torch::kCPU);
  const auto forced = std::make_shared<ForcedSelector>();
  model->set_selector(forced);
  const auto weighted = std::make_shared<ForcedWeights>();
  model->set_executor(weighted);
  const std::int64_t length = golden.tokens_S.size(0);
  const TokenBatch whole = one_sequence(golden.tokens_S);
  KeyValueCache cache(length);
  std::vector<Tensor> logits;
  while (cache.length() < length) {
    const std::int64_t count = cache.length() == 0 ? kPrefill : 1;
    const auto piece = [&](const Tensor& all) { return all.narrow(1, cache.length(), count); };
    forced->selected_LSK = piece(golden.selected_LSK);
    weighted->weights_LSK = piece(golden.weights_LSK);
    const TokenBatch batch = {piece(whole.tokens_BS), piece(whole.positions_BS), piece(whole.sequence_ids_BS)};
    logits.push_back(model->head(model->forward(batch, cache).hidden_BSD)[0]);
  }
  const Tensor logits_SV = torch::cat(logits);
  CHECK(logits_SV.scalar_type() == torch::kBFloat16);
  report_bfloat16("logits against bfloat16", logits_SV, golden.bfloat16_cached_logits_SV, golden);
  report_bfloat16("logits against float32", logits_SV, golden.logits_SV, golden);
}

TEST_CASE("packed rows with padding equal the same sequences run apart") {
  const std::string name = GENERATE(from_range(kCases));
  CAPTURE(name);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kFloat32, torch::kCPU);
  // Row 0: a, b; row 1: c, then padding. Lengths 5 + 7, 6 + 6.
  const Tensor a = golden.tokens_S.narrow(0, 0, 5);
  const Tensor b = golden.tokens_S.narrow(0, 2, 7);
  const Tensor c = golden.tokens_S.narrow(0, 6, 6);
  const Tensor pad = torch::zeros({6}, torch::kInt64);
  TokenBatch packed;
  packed.tokens_BS = torch::stack({torch::cat({a, b}), torch::cat({c, pad})});
  packed.positions_BS = torch::stack(
      {torch::cat({torch::arange(5), torch::arange(7)}), torch::cat({torch::arange(6), torch::arange(6)})});
  packed.sequence_ids_BS = torch::stack({torch::cat({torch::full({5}, 3), torch::full({7}, 4)}),
                                         torch::cat({torch::full({6}, 9), torch::full({6}, -1)})});
  const ModelOutput together = model->forward(packed);
  REQUIRE(together.hidden_BSD.isfinite().all().item<bool>());
  struct Piece {
    Tensor tokens;
    std::int64_t row;
    std::int64_t begin;
  };
  for (const Piece& piece : {Piece{a, 0, 0}, Piece{b, 0, 5}, Piece{c, 1, 0}}) {
    const std::int64_t length = piece.tokens.size(0);
    const ModelOutput apart = model->forward(one_sequence(piece.tokens));
    report("hidden", relative_error(together.hidden_BSD[piece.row].narrow(0, piece.begin, length), apart.hidden_BSD[0]),
           1e-5);
    for (std::size_t layer = 0; layer < apart.routing.size(); ++layer) {
      const std::int64_t flat = piece.row * 12 + piece.begin;
      CHECK(
          torch::equal(together.routing[layer].selected_TK.narrow(0, flat, length), apart.routing[layer].selected_TK));
    }
  }
}

TEST_CASE("prefill and decoding with a key-value cache equal one forward") {
  const std::string name = GENERATE(from_range(kCases));
  const auto pieces = GENERATE(std::vector<std::int64_t>{}, std::vector<std::int64_t>{7, 2, 3},
                               std::vector<std::int64_t>{11}, std::vector<std::int64_t>{13});
  CAPTURE(name, pieces);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kFloat32, torch::kCPU);
  const std::int64_t length = golden.tokens_S.size(0);
  // Another sequence of the same length beside it.
  const Tensor tokens_BS = torch::stack({golden.tokens_S, golden.tokens_S.flip(0)});
  const auto batch = [&](std::int64_t begin, std::int64_t count) {
    return TokenBatch{tokens_BS.narrow(1, begin, count), torch::arange(begin, begin + count).expand({2, count}),
                      torch::tensor({4, 7}, torch::kInt64).unsqueeze(1).expand({2, count})};
  };
  const ModelOutput whole = model->forward(batch(0, length));
  KeyValueCache cache(length);
  std::vector<Tensor> hidden;
  std::vector<std::vector<Tensor>> selected(whole.routing.size());
  std::size_t next = 0;
  while (cache.length() < length) {
    // Where the length decides on rope factors, prefill must reach it.
    const std::int64_t first = name == "phimoe_long" ? kPrefill : 1;
    const std::int64_t count = next < pieces.size() ? pieces[next] : cache.length() == 0 ? first : 1;
    ++next;
    const ModelOutput output = model->forward(batch(cache.length(), count), cache);
    hidden.push_back(output.hidden_BSD);
    for (std::size_t layer = 0; layer < selected.size(); ++layer) {
      selected[layer].push_back(output.routing[layer].selected_TK.view({2, count, -1}));
    }
  }
  report("hidden states", relative_error(torch::cat(hidden, 1), whole.hidden_BSD), 1e-5);
  report("logits", relative_error(model->head(torch::cat(hidden, 1))[0], golden.logits_SV), 1e-4);
  for (std::size_t layer = 0; layer < selected.size(); ++layer) {
    CHECK(torch::equal(torch::cat(selected[layer], 1).flatten(0, 1), whole.routing[layer].selected_TK));
  }
}

TEST_CASE("transformers computes and generates from an exported tuned model what Hestia does with its parts apart") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::filesystem::path> directories;
  for (const std::string& name : kCases) {
    CAPTURE(name);
    const Golden golden = load_golden(name);
    MoeModel model = load_model(golden.directory, torch::kFloat32, torch::kCPU);
    const bool takes_adapters = model->architecture().family != "gpt_oss" && name != "qwen3_fp8";
    if (takes_adapters) {
      create_adapters(model, {4, 8.0}, 3);
    }
    auto generator = at::make_generator<at::CPUGeneratorImpl>(std::uint64_t{17});
    const auto move = [&](Tensor& tensor, double scale) {
      tensor.add_(torch::empty(tensor.sizes(), torch::kFloat32).normal_(0.0, scale, generator));
    };
    for (Tensor& router : model->routers()) {
      move(router, 0.2);
    }
    for (auto& [adapter, tensor] : model->named_adapters()) {
      move(tensor, 0.1);
    }
    if (model->architecture().family != "phimoe") {  // which always chooses two
      model->set_top_k(std::max<std::int64_t>(1, model->architecture().top_k - 1));
    }
    TunedParts parts;
    parts.routers = folder.path() / (name + ".router.safetensors");
    parts.top_k = model->architecture().top_k;
    save_routers(model, parts.routers);
    if (takes_adapters) {
      parts.adapters = folder.path() / (name + ".adapters.safetensors");
      save_adapters(model, *parts.adapters);
    }
    const std::filesystem::path directory = folder.path() / name;
    write_tuned_checkpoint(golden.directory, parts, directory);

    const ModelOutput output = model->forward(one_sequence(golden.tokens_S));
    const Tensor logits_SV = model->head(output.hidden_BSD)[0];
    CHECK(relative_error(logits_SV, golden.logits_SV) > 1e-2);  // the tuned parts are not lost in the tolerance
    write_expectation(directory, model, golden.tokens_S, output, logits_SV);
    directories.push_back(directory);
  }
  CHECK(transformers_agrees(directories));
}

TEST_CASE("transformers computes and generates from a created and saved model what Hestia does") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  std::vector<std::filesystem::path> directories;
  std::set<std::string> families;
  for (const std::string& name : kCases) {
    CAPTURE(name);
    const Golden golden = load_golden(name);
    Architecture architecture = read_architecture(golden.directory);
    architecture.initializer_range = 0.3;
    families.insert(architecture.family);
    MoeModel model = create_model(architecture, torch::kFloat32, torch::kCPU, 23);
    directories.push_back(folder.path() / name);
    save_model(model, directories.back(), torch::kFloat32, 1 << 14);  // several shards
    const ModelOutput output = model->forward(one_sequence(golden.tokens_S));
    write_expectation(directories.back(), model, golden.tokens_S, output, model->head(output.hidden_BSD)[0]);
    MoeModel again = load_model(directories.back(), torch::kFloat32, torch::kCPU);
    CHECK(torch::equal(again->forward(one_sequence(golden.tokens_S)).hidden_BSD, output.hidden_BSD));
  }
  const std::vector<std::string> known = known_families();
  CHECK(families == std::set<std::string>(known.begin(), known.end()));
  CHECK(transformers_agrees(directories));
}

TEST_CASE("CUDA gives the CPU's logits and selections", "[gpu]") {
  if (!torch::hasCUDA()) {
    WARN("no GPU: skipped");
    return;
  }
  const std::string name = GENERATE(from_range(kCases));
  CAPTURE(name);
  const torch::NoGradGuard no_grad;
  const Golden golden = load_golden(name);
  MoeModel model = load_model(golden.directory, torch::kFloat32, torch::Device(torch::kCUDA, 0));
  TokenBatch batch = one_sequence(golden.tokens_S);
  batch = {batch.tokens_BS.cuda(), batch.positions_BS.cuda(), batch.sequence_ids_BS.cuda()};
  const ModelOutput output = model->forward(batch);
  report("logits", relative_error(model->head(output.hidden_BSD)[0].cpu(), golden.logits_SV), 1e-4);
  CHECK(torch::equal(stacked(output, &RoutingRecord::selected_TK).cpu(), golden.selected_LSK));
  KeyValueCache cache(golden.tokens_S.size(0));
  std::vector<Tensor> hidden;
  for (const std::int64_t count : {std::int64_t{7}, std::int64_t{1}, golden.tokens_S.size(0) - 8}) {
    const auto piece = [&](const Tensor& all) { return all.narrow(1, cache.length(), count); };
    const TokenBatch next = {piece(batch.tokens_BS), piece(batch.positions_BS), piece(batch.sequence_ids_BS)};
    hidden.push_back(model->forward(next, cache).hidden_BSD);
  }
  report("cached logits", relative_error(model->head(torch::cat(hidden, 1))[0].cpu(), golden.logits_SV), 1e-4);
}
