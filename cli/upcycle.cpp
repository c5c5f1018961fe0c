#include <chrono>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>

#include <fmt/format.h>

#include "commands.hpp"
#include "hestia/architecture/upcycle.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/data/gguf_tokenizer.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/model/router_inputs.hpp"

namespace hestia {
namespace {

struct UpcycleArguments {
  std::filesystem::path dense;
  std::filesystem::path to;
  std::string start = "grouped";
  std::string dtype = "bfloat16";
  UpcycleOptions options;
};

DType dtype_from_argument(const std::string& name) {
  if (name == "float32") {
    return DType::kF32;
  }
  if (name == "bfloat16") {
    return DType::kBF16;
  }
  if (name == "float16") {
    return DType::kF16;
  }
  throw UsageError(fmt::format("--dtype must be float32, bfloat16 or float16, got \"{}\"; choose one", name));
}

// The dense model's tokenizer, which is the upcycled model's too.
void add_tokenizer(const DenseCheckpoint& dense, const std::filesystem::path& folder) {
  if (dense.gguf() != nullptr) {
    try {
      write_gguf_tokenizer(*dense.gguf(), folder);
    } catch (const InputError& error) {
      log_warning(fmt::format("no tokenizer is written: {}", error.what()));
    }
    return;
  }
  if (!copy_tokenizer(dense.path(), folder)) {
    log_warning(fmt::format("no tokenizer is written: {} holds none", dense.path().string()));
  }
}

void run_upcycle(UpcycleArguments& arguments) {
  const auto begin = std::chrono::steady_clock::now();
  arguments.options.start = upcycle_start_from_name(arguments.start);
  arguments.options.dtype = dtype_from_argument(arguments.dtype);
  if (!std::filesystem::exists(arguments.dense)) {
    throw InputError(fmt::format("{}: no such file or directory; check the path", arguments.dense.string()));
  }
  const DenseCheckpoint dense(arguments.dense);
  check_upcycle(dense.architecture(), arguments.options);
  if (arguments.options.start == UpcycleStart::kSigned) {
    SamplingOptions sampling;
    sampling.seed = arguments.options.seed;
    sampling.quiet = arguments.options.quiet;
    arguments.options.router_inputs = measure_router_inputs(dense, sampling);
  }
  upcycle(dense, arguments.options, arguments.to,
          [&](const std::filesystem::path& folder) { add_tokenizer(dense, folder); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  log_info(fmt::format("{} experts of {} neurons in {} layers, {} per token, {} start, in {}",
                       arguments.options.num_experts, dense.architecture().intermediate_size / arguments.options.top_k,
                       dense.architecture().num_layers, arguments.options.top_k, arguments.start,
                       format_seconds(seconds.count())));
  std::cout << arguments.to.string() << "\n";
}

}  // namespace

void add_upcycle(CLI::App& app) {
  auto arguments = std::make_shared<UpcycleArguments>();
  CLI::App* verb = app.add_subcommand("upcycle", "make a Mixture-of-Experts model (Mixtral layout) out of a dense one");
  verb->add_option("dense", arguments->dense, "Hugging Face directory of a Llama model, or its GGUF file")->required();
  verb->add_option("--to", arguments->to, "model directory to write")->required();
  verb->add_option("--experts", arguments->options.num_experts, "experts per layer, a multiple of --top-k")
      ->capture_default_str();
  verb->add_option("--top-k", arguments->options.top_k,
                   "experts per token; each feed-forward network is cut into as many shards")
      ->capture_default_str();
  verb->add_option("--start", arguments->start,
                   "grouped (computes what the dense model does) or signed (experts mix freely, to be trained)")
      ->capture_default_str();
  verb->add_option("--seed", arguments->options.seed, "of the router's directions")->capture_default_str();
  verb->add_option("--dtype", arguments->dtype, "type of the weights: float32, bfloat16 or float16")
      ->capture_default_str();
  verb->add_flag("--quiet", arguments->options.quiet, "no progress bar");
  verb->footer("Example: hestia upcycle SmolLM2-135M-Instruct.Q4_1.gguf --experts 64 --top-k 8 --to smollm2-moe");
  verb->callback([arguments] { run_upcycle(*arguments); });
}

}  // namespace hestia
