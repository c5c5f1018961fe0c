#include "hestia/model/router_inputs.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>

#include "dense_model.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"

namespace hestia {

std::vector<RouterInput> measure_router_inputs(const DenseCheckpoint& dense, const SamplingOptions& options) {
  if (options.sequences < 1 || options.length < 2) {
    throw UsageError(fmt::format("a sample must have 1 sequence of 2 tokens at least, got {} of {}; choose more",
                                 options.sequences, options.length));
  }
  const torch::NoGradGuard no_grad;
  const DenseArchitecture& a = dense.architecture();
  Json first = a.bos_token_id.is_array() && !a.bos_token_id.empty() ? a.bos_token_id.front() : a.bos_token_id;
  const std::int64_t start = first.is_number_integer() ? first.get<std::int64_t>() : 0;
  if (start < 0 || start >= a.vocab_size) {
    throw InputError(fmt::format("{}: the bos token must be below the vocabulary of {}, got {}; correct it",
                                 dense.path().string(), a.vocab_size, start));
  }
  DenseModel model(dense);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(options.seed, "router inputs"));
  torch::Tensor tokens = torch::full({options.sequences}, start, torch::kInt64);
  const auto layers = static_cast<std::size_t>(a.num_layers);
  std::vector<torch::Tensor> sums(layers, torch::zeros({a.hidden_size}, torch::kFloat64));
  std::vector<double> squares(layers, 0.0);
  Progress progress("sample", options.sequences * options.length, "tok", options.quiet);
  for (std::int64_t position = 0; position < options.length; ++position) {
    const torch::Tensor logits = model.step(tokens);
    for (std::size_t layer = 0; layer < layers && position > 0; ++layer) {
      const torch::Tensor h = model.feed_forward_inputs()[layer].to(torch::kFloat64);
      sums[layer] = sums[layer] + h.sum(0);
      squares[layer] += h.square().sum().item<double>();
    }
    tokens = at::multinomial(logits.softmax(-1), 1, false, generator).squeeze(1);
    progress.advance(options.sequences);
  }
  const auto count = static_cast<double>(options.sequences * (options.length - 1));
  std::vector<RouterInput> inputs(layers);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const torch::Tensor mean = sums[layer] / count;
    inputs[layer].variance =
        (squares[layer] / count - mean.square().sum().item<double>()) / static_cast<double>(a.hidden_size);
    const torch::Tensor single = mean.to(torch::kFloat32).contiguous();
    inputs[layer].mean.assign(single.const_data_ptr<float>(), single.const_data_ptr<float>() + a.hidden_size);
  }
  return inputs;
}

}  // namespace hestia
