#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <torch/types.h>

#include "commands.hpp"
#include "hestia/core/log.hpp"
#include "hestia/model/moe_model.hpp"
#include "hestia/model/tensors.hpp"
#include "token_list.hpp"

namespace hestia {
namespace {

struct LogitsOptions {
  std::filesystem::path model;
  std::string tokens;
  std::string dtype = "float32";
  std::string device = "cpu";
  std::filesystem::path output;
};

void run_logits(const LogitsOptions& options) {
  const torch::NoGradGuard no_grad;
  const std::vector<std::int64_t> tokens = parse_token_list("--tokens", options.tokens);
  const torch::Device device = device_from_recipe(options.device);
  const torch::Dtype dtype = dtype_from_recipe(options.dtype);
  const std::int64_t vocab_size = read_architecture(options.model).vocab_size;
  check_token_list("--tokens", tokens, vocab_size, options.model.string());
  MoeModel model = load_model(options.model, dtype, device);
  const auto length = static_cast<std::int64_t>(tokens.size());
  const auto integers = torch::TensorOptions().dtype(torch::kInt64).device(device);
  TokenBatch batch;
  batch.tokens_BS = torch::tensor(tokens, torch::kInt64).to(device).unsqueeze(0);
  batch.positions_BS = torch::arange(length, integers).unsqueeze(0);
  batch.sequence_ids_BS = torch::zeros({1, length}, integers);
  const ModelOutput output = model->forward(batch);
  std::vector<torch::Tensor> router_logits;
  std::vector<torch::Tensor> selected;
  for (const RoutingRecord& record : output.routing) {
    router_logits.push_back(record.logits_TE.to(torch::kFloat32));
    selected.push_back(record.selected_TK);
  }
  const torch::Tensor logits = model->head(output.hidden_BSD)[0].to(torch::kFloat32);
  write_tensors(options.output,
                {{"tokens", batch.tokens_BS[0]},
                 {"logits", logits},
                 {"router_logits", torch::stack(router_logits)},
                 {"selected", torch::stack(selected)}},
                {{"hestia_format", "logits 1"}, {"dtype", options.dtype}});
  log_info(fmt::format("wrote {}: logits [{}, {}], router_logits [{}, {}, {}]", options.output.string(), length,
                       vocab_size, output.routing.size(), length, model->architecture().num_experts));
}

}  // namespace

void add_logits(CLI::App& app) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* verb =
      app.add_subcommand("logits", "run one token sequence and write its logits and routing (parity checks)");
  verb->add_option("model", options->model, "model directory with config.json and safetensors")->required();
  verb->add_option("--tokens", options->tokens, "token ids of one sequence, for example 1,2,3")->required();
  verb->add_option("--dtype", options->dtype, "float32 or bfloat16")->capture_default_str();
  verb->add_option("--device", options->device, "cpu, cuda, cuda:N or auto")->capture_default_str();
  verb->add_option("--output", options->output,
                   "file to write: tokens [S], logits [S, V], router_logits [L, S, E], selected [L, S, K]")
      ->required();
  verb->footer("Example: hestia logits checkpoints/tiny --tokens 1,2,3 --output logits.safetensors");
  verb->callback([options] { run_logits(*options); });
}

}  // namespace hestia
