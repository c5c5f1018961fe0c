#include "hestia/trainer/preference_predictor.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>
#include <torch/autograd.h>

#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/safetensors.hpp"
#include "hestia/model/tensors.hpp"

namespace hestia {

namespace {

constexpr std::int64_t kRowsPerBlock = 1024;
constexpr double kSmallest = 1e-8;
constexpr const char* kPredictor = "predictor";
constexpr const char* kAnswer = "answer_itself";

torch::Tensor index_tensor(const std::vector<std::int64_t>& indices) {
  return torch::tensor(indices, torch::kInt64);
}

std::vector<float> to_vector(const torch::Tensor& tensor) {
  const torch::Tensor flat = tensor.detach().to(torch::kCPU, torch::kFloat32).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

std::span<const float> row_of(const torch::Tensor& matrix, std::int64_t row) {
  const auto width = static_cast<std::size_t>(matrix.numel() / matrix.size(0));
  return {matrix.const_data_ptr<float>() + static_cast<std::size_t>(row) * width, width};
}

// Uniform in +-1/sqrt(inputs), the usual start of a linear layer.
torch::Tensor initial(at::IntArrayRef shape, std::int64_t inputs, at::Generator& generator) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(inputs));
  return torch::empty(shape, torch::kFloat32).uniform_(-bound, bound, generator).requires_grad_(true);
}

struct Weights {
  torch::Tensor w1, b1, w2, b2;  // [H, D], [H], [L * E, H], [L * E]
  [[nodiscard]] torch::Tensor log_prediction(const torch::Tensor& x_ND, std::int64_t layers,
                                             std::int64_t experts) const {
    const torch::Tensor logits = at::linear(at::linear(x_ND, w1, b1).relu(), w2, b2);
    return logits.view({x_ND.size(0), layers, experts}).log_softmax(2);
  }
};

void descend(Weights& weights, const torch::Tensor& x_ND, const torch::Tensor& target_NLE,
             const PredictorOptions& options, SplitMix64& random,
             const std::function<void(std::int64_t, double)>& on_epoch) {
  const std::int64_t num_examples = x_ND.size(0);
  const std::int64_t layers = target_NLE.size(1);
  std::vector<torch::Tensor> parameters = {weights.w1, weights.b1, weights.w2, weights.b2};
  std::vector<torch::Tensor> velocity;
  velocity.reserve(parameters.size());
  for (const torch::Tensor& parameter : parameters) {
    velocity.push_back(torch::zeros_like(parameter));
  }
  std::vector<std::int64_t> order(static_cast<std::size_t>(num_examples));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  for (std::int64_t epoch = 1; epoch <= options.epochs; ++epoch) {
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random.below(i)]);
    }
    double sum = 0.0;
    for (std::int64_t begin = 0; begin < num_examples; begin += options.batch_size) {
      const std::int64_t size = std::min(options.batch_size, num_examples - begin);
      const torch::Tensor rows = index_tensor({order.begin() + begin, order.begin() + begin + size});
      const torch::Tensor target = target_NLE.index_select(0, rows);
      const torch::Tensor log_q = weights.log_prediction(x_ND.index_select(0, rows), layers, target.size(2));
      const torch::Tensor loss = (at::xlogy(target, target) - target * log_q).sum() / size;
      const double value = loss.item<double>();
      if (!std::isfinite(value)) {
        throw RunError(
            fmt::format("preference predictor: the loss is not finite in epoch {}, got {}; lower "
                        "export.predictor.learning_rate",
                        epoch, value));
      }
      sum += value * static_cast<double>(size);
      const auto gradients = torch::autograd::grad({loss}, parameters);
      const torch::NoGradGuard no_grad;
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        velocity[i].mul_(options.momentum).add_(gradients[i]);
        parameters[i].sub_(velocity[i], options.learning_rate);
      }
    }
    if (on_epoch) {
      on_epoch(epoch, sum / static_cast<double>(num_examples * layers));
    }
  }
}

// One guess against what the held-out sequences did.
class GuessScore {
 public:
  GuessScore(std::string method, const std::vector<std::int64_t>& slots, std::int64_t num_experts)
      : slots_(slots), num_experts_(num_experts), served_(slots.size(), 0) {
    figures_.method = std::move(method);
    figures_.probability_recall.assign(slots.size(), 0.0);
  }
  void add(std::span<const float> prediction_LE, std::span<const float> target_LE, std::span<const int> count_LE) {
    const auto experts = static_cast<std::size_t>(num_experts_);
    for (std::size_t begin = 0; begin < target_LE.size(); begin += experts) {
      for (std::size_t e = begin; e < begin + experts; ++e) {
        const double p = static_cast<double>(target_LE[e]);
        figures_.kl += p > 0.0 ? p * std::log(p / std::max(kSmallest, static_cast<double>(prediction_LE[e]))) : 0.0;
        requests_ += count_LE[e];
      }
      const std::vector<std::int64_t> order = top_experts(prediction_LE.subspan(begin, experts), num_experts_);
      for (std::size_t i = 0; i < slots_.size(); ++i) {
        for (std::int64_t rank = 0; rank < slots_[i]; ++rank) {
          const std::size_t e = begin + static_cast<std::size_t>(order[static_cast<std::size_t>(rank)]);
          figures_.probability_recall[i] += static_cast<double>(target_LE[e]);
          served_[i] += count_LE[e];
        }
      }
      rows_ += 1;
    }
  }
  [[nodiscard]] PredictorFigures figures() const {
    PredictorFigures result = figures_;
    const auto rows = static_cast<double>(std::max<std::int64_t>(1, rows_));
    result.kl /= rows;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      result.probability_recall[i] /= rows;
      result.request_recall.push_back(static_cast<double>(served_[i]) /
                                      static_cast<double>(std::max<std::int64_t>(1, requests_)));
    }
    return result;
  }

 private:
  std::vector<std::int64_t> slots_;
  std::int64_t num_experts_;
  std::vector<std::int64_t> served_;
  std::int64_t requests_ = 0;
  std::int64_t rows_ = 0;  // layers of sequences
  PredictorFigures figures_;
};

// What the prompt used plus one token's worth of the mean popularity, as a distribution per layer.
std::vector<float> prompt_guess(std::span<const int> prompt_count_LE, std::span<const float> popularity_LE,
                                std::int64_t num_experts, std::int64_t top_k) {
  std::vector<float> guess(popularity_LE.size());
  const auto experts = static_cast<std::size_t>(num_experts);
  for (std::size_t begin = 0; begin < guess.size(); begin += experts) {
    const auto first = prompt_count_LE.begin() + static_cast<std::ptrdiff_t>(begin);
    const double total = static_cast<double>(std::accumulate(first, first + num_experts, std::int64_t{0}) + top_k);
    for (std::size_t e = begin; e < begin + experts; ++e) {
      guess[e] = static_cast<float>((static_cast<double>(prompt_count_LE[e]) +
                                     static_cast<double>(top_k) * static_cast<double>(popularity_LE[e])) /
                                    total);
    }
  }
  return guess;
}

PredictorReport compare(const PreferencePredictor& predictor, const PredictorExamples& examples,
                        const ExampleSplit& split, const std::vector<std::int64_t>& slots, std::int64_t top_k,
                        std::int64_t decisive_slots) {
  const std::int64_t experts = predictor.num_experts;
  const torch::Tensor train = index_tensor(split.train);
  const torch::Tensor targets = examples.target_NLE.index_select(0, train).contiguous();
  const std::vector<float> popularity = to_vector(targets.to(torch::kFloat64).mean(0));
  const torch::Tensor embeddings = examples.embeddings_ND.to(torch::kFloat64);
  const torch::Tensor unit =
      embeddings / embeddings.norm(2, /*dim=*/1, /*keepdim=*/true).clamp_min(std::numeric_limits<double>::min());
  const torch::Tensor unit_train = unit.index_select(0, train);
  const torch::Tensor all_targets = examples.target_NLE.contiguous();
  const torch::Tensor all_embeddings = examples.embeddings_ND.contiguous();
  const torch::Tensor counts = examples.count_NLE.contiguous();
  const torch::Tensor prompt_counts = examples.prompt_count_NLE.contiguous();
  const auto width = static_cast<std::size_t>(predictor.num_layers * experts);
  const auto ints_of = [&](const torch::Tensor& tensor, std::int64_t row) {
    return std::span<const int>(tensor.const_data_ptr<int>() + static_cast<std::size_t>(row) * width, width);
  };
  std::vector<GuessScore> methods;
  for (const char* name : {kPredictor, "mean_popularity", "prompt_routing", "nearest_prompt", kAnswer}) {
    methods.emplace_back(name, slots, experts);
  }
  for (const std::int64_t row : split.held_out) {
    const std::span<const float> target = row_of(all_targets, row);
    const std::span<const int> count = ints_of(counts, row);
    // argmax gives the first of equal values.
    const auto nearest = at::mv(unit_train, unit[row]).argmax().item<std::int64_t>();
    methods[0].add(predictor.predict(row_of(all_embeddings, row)), target, count);
    methods[1].add(popularity, target, count);
    methods[2].add(prompt_guess(ints_of(prompt_counts, row), popularity, experts, top_k), target, count);
    methods[3].add(row_of(targets, nearest), target, count);
    methods[4].add(target, target, count);
  }
  PredictorReport report;
  report.num_train = static_cast<std::int64_t>(split.train.size());
  report.num_held_out = static_cast<std::int64_t>(split.held_out.size());
  report.num_left_out = examples.num_left_out;
  report.slots = slots;
  report.decisive_slots = decisive_slots;
  const auto decisive = static_cast<std::size_t>(std::find(slots.begin(), slots.end(), decisive_slots) - slots.begin());
  const PredictorFigures* most = nullptr;
  const PredictorFigures* nearest = nullptr;
  for (const GuessScore& method : methods) {
    report.figures.push_back(method.figures());
  }
  // What costs nothing comes first: the predictor, the first of the figures, has to be better than each of them.
  std::vector<std::size_t> order(report.figures.size());
  std::iota(order.begin(), order.end(), std::size_t{1});
  order.back() = 0;
  for (const std::size_t i : order) {
    const PredictorFigures& figures = report.figures[i];
    if (figures.method == kAnswer) {
      continue;
    }
    if (most == nullptr || figures.request_recall[decisive] > most->request_recall[decisive]) {
      most = &figures;
    }
    if (nearest == nullptr || figures.kl < nearest->kl) {
      nearest = &figures;
    }
  }
  report.best_by_requests = most->method;
  report.best_by_kl = nearest->method;
  return report;
}

void check_examples(const PredictorExamples& examples) {
  const torch::Tensor& target = examples.target_NLE;
  if (!target.defined() || target.dim() != 3 || !examples.embeddings_ND.defined() ||
      examples.embeddings_ND.dim() != 2 || examples.embeddings_ND.size(0) != target.size(0) ||
      examples.count_NLE.sizes() != target.sizes() || examples.prompt_count_NLE.sizes() != target.sizes() ||
      target.scalar_type() != torch::kFloat32 || examples.embeddings_ND.scalar_type() != torch::kFloat32 ||
      examples.count_NLE.scalar_type() != torch::kInt32 || examples.prompt_count_NLE.scalar_type() != torch::kInt32) {
    throw std::invalid_argument(
        "preference predictor: embeddings float32 [N, D], targets float32 and counts int32 [N, L, E] must fit "
        "together");
  }
}

}  // namespace

PredictorExamples collect_examples(PreferenceWriter& writer) {
  PredictorExamples examples;
  std::vector<float> targets;
  std::vector<int> counts;
  std::vector<int> prompt_counts;
  const PreferenceAggregate shape = writer.aggregate(PreferenceRouter::kTuned);
  const auto experts = static_cast<std::size_t>(shape.num_experts);
  const std::size_t width = static_cast<std::size_t>(shape.num_layers) * experts;
  for (std::int64_t first = 0; first < writer.num_stored(); first += kRowsPerBlock) {
    const PreferenceRows rows =
        writer.rows(PreferenceRouter::kTuned, first, std::min(kRowsPerBlock, writer.num_stored() - first));
    for (std::size_t i = 0; i < rows.ids.size(); ++i) {
      if (rows.num_prompt_tokens[i] == 0 || rows.num_tokens[i] == rows.num_prompt_tokens[i]) {
        examples.num_left_out += 1;
        continue;
      }
      examples.ids.push_back(rows.ids[i]);
      const std::size_t begin = i * width;
      for (std::size_t layer = begin; layer < begin + width; layer += experts) {
        // Stored in half precision: they add up to nearly 1.
        double sum = 0.0;
        for (std::size_t e = layer; e < layer + experts; ++e) {
          sum += static_cast<double>(rows.mean_probability[e]);
        }
        for (std::size_t e = layer; e < layer + experts; ++e) {
          targets.push_back(static_cast<float>(static_cast<double>(rows.mean_probability[e]) / sum));
        }
      }
      counts.insert(counts.end(), rows.count.begin() + static_cast<std::ptrdiff_t>(begin),
                    rows.count.begin() + static_cast<std::ptrdiff_t>(begin + width));
      prompt_counts.insert(prompt_counts.end(), rows.prompt_count.begin() + static_cast<std::ptrdiff_t>(begin),
                           rows.prompt_count.begin() + static_cast<std::ptrdiff_t>(begin + width));
    }
  }
  const std::vector<std::int64_t> sizes = {static_cast<std::int64_t>(examples.ids.size()), shape.num_layers,
                                           shape.num_experts};
  examples.target_NLE = torch::from_blob(targets.data(), sizes, torch::kFloat32).clone();
  examples.count_NLE = torch::from_blob(counts.data(), sizes, torch::kInt32).clone();
  examples.prompt_count_NLE = torch::from_blob(prompt_counts.data(), sizes, torch::kInt32).clone();
  return examples;
}

torch::Tensor token_embedding(MoeModel& model) {
  const std::vector<TensorSpec> specs = tensor_specs(model->architecture());
  const auto tensors = model->named_tensors();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].part == TensorPart::kTokenEmbedding) {
      return tensors[i].second;
    }
  }
  throw std::logic_error("token_embedding: the architecture names none");
}

torch::Tensor mean_embedding(const torch::Tensor& embedding_VD, std::span<const std::int64_t> tokens) {
  if (tokens.empty()) {
    throw std::invalid_argument("mean_embedding: no tokens");
  }
  const torch::NoGradGuard no_grad;
  const torch::Tensor rows = index_tensor({tokens.begin(), tokens.end()}).to(embedding_VD.device());
  return embedding_VD.index_select(0, rows).to(torch::kFloat32).mean(0).to(torch::kCPU);
}

torch::Tensor read_embeddings(const std::filesystem::path& path, const std::vector<std::int64_t>& ids) {
  const SafetensorsFile file(path);
  const torch::Tensor known = to_torch(file.tensor("ids"));
  const torch::Tensor values = to_torch(file.tensor("embeddings"));
  if (known.dim() != 1 || known.scalar_type() != torch::kInt64 || values.dim() != 2 || !values.is_floating_point() ||
      values.size(0) != known.size(0) || values.size(1) < 1) {
    throw InputError(fmt::format(
        "{}: ids must be int64 [N] and embeddings a float type [N, D], got {} dimensions of {} rows and {} dimensions "
        "of {} rows; write the file again",
        path.string(), known.dim(), known.dim() > 0 ? known.size(0) : 0, values.dim(),
        values.dim() > 0 ? values.size(0) : 0));
  }
  std::map<std::int64_t, std::int64_t> row_of_id;
  for (std::int64_t i = 0; i < known.size(0); ++i) {
    const auto id = known[i].item<std::int64_t>();
    if (!row_of_id.emplace(id, i).second) {
      throw InputError(fmt::format("{}: id {} is there twice; write the file again", path.string(), id));
    }
  }
  std::vector<std::int64_t> rows;
  for (const std::int64_t id : ids) {
    const auto found = row_of_id.find(id);
    if (found == row_of_id.end()) {
      throw InputError(
          fmt::format("{}: sequence {} has no embedding among the {} there are; embed every line of prompts.jsonl "
                      "(export.write_prompts) of an export with the same data",
                      path.string(), id, row_of_id.size()));
    }
    rows.push_back(found->second);
  }
  torch::Tensor chosen = values.index_select(0, index_tensor(rows)).to(torch::kFloat32).contiguous();
  if (!chosen.isfinite().all().item<bool>()) {
    throw InputError(
        fmt::format("{}: embeddings hold values that are not finite; write the file again", path.string()));
  }
  return chosen;
}

ExampleSplit split_examples(std::int64_t num_examples, double held_out_fraction, std::uint64_t seed) {
  if (num_examples < 2) {
    throw RunError(
        fmt::format("export.predictor needs at least 2 stored sequences with a prompt and an answer, got {}; "
                    "raise export.tokens and export.max_sequences",
                    num_examples));
  }
  std::vector<std::int64_t> order(static_cast<std::size_t>(num_examples));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  SplitMix64 random(derive_seed(seed, "predictor split"));
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[random.below(i)]);
  }
  const std::int64_t held_out = std::clamp<std::int64_t>(
      std::llround(static_cast<double>(num_examples) * held_out_fraction), 1, num_examples - 1);
  return {{order.begin() + held_out, order.end()}, {order.begin(), order.begin() + held_out}};
}

PreferencePredictor train_preference_predictor(const PredictorExamples& examples, const PredictorOptions& options,
                                               std::int64_t top_k, std::int64_t decisive_slots, std::uint64_t seed,
                                               const std::function<void(std::int64_t, double)>& on_epoch) {
  check_examples(examples);
  const std::int64_t layers = examples.target_NLE.size(1);
  const std::int64_t experts = examples.target_NLE.size(2);
  const std::int64_t inputs = examples.embeddings_ND.size(1);
  std::vector<std::int64_t> slots = options.slots;
  if (slots.empty()) {
    for (const std::int64_t share : {8, 4, 2}) {
      slots.push_back(std::max<std::int64_t>(1, experts / share));
    }
  }
  slots.push_back(decisive_slots);
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  if (slots.front() < 1 || slots.back() > experts) {
    throw UsageError(fmt::format("export.predictor.slots must be from 1 to the model's experts per layer ({}), got {}",
                                 experts, slots.front() < 1 ? slots.front() : slots.back()));
  }
  const ExampleSplit split = split_examples(examples.target_NLE.size(0), options.held_out_fraction, seed);
  const torch::Tensor train = index_tensor(split.train);
  torch::Tensor x_ND = examples.embeddings_ND.index_select(0, train);
  const torch::Tensor target_NLE = examples.target_NLE.index_select(0, train);
  torch::Tensor shift = torch::zeros({inputs}, torch::kFloat32);
  torch::Tensor scale = torch::ones({inputs}, torch::kFloat32);
  if (options.standardise) {
    shift = x_ND.mean(0);
    scale = (x_ND - shift).square().mean(0).sqrt();
    scale = at::where(scale > 1e-12, scale, torch::ones_like(scale));
    x_ND = (x_ND - shift) / scale;
  }
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(seed, "predictor weights"));
  Weights weights;
  weights.w1 = initial({options.hidden_size, inputs}, inputs, generator);
  weights.b1 = initial({options.hidden_size}, inputs, generator);
  weights.w2 = initial({layers * experts, options.hidden_size}, options.hidden_size, generator);
  weights.b2 = initial({layers * experts}, options.hidden_size, generator);
  if (options.start_from_popularity) {
    const torch::NoGradGuard no_grad;
    weights.b2.copy_(target_NLE.mean(0).clamp_min(kSmallest).log().reshape({-1}));
    // With weights of its own the output layer would start off this by chance.
    weights.w2.zero_();
  }
  SplitMix64 random(derive_seed(seed, "predictor order"));
  descend(weights, x_ND, target_NLE, options, random, on_epoch);
  const torch::NoGradGuard no_grad;
  PreferencePredictor predictor;
  predictor.num_layers = layers;
  predictor.num_experts = experts;
  predictor.embedding_size = inputs;
  predictor.hidden_size = options.hidden_size;
  predictor.embedding = examples.embedding;
  const torch::Tensor folded = weights.w1 / scale;
  predictor.hidden_weight = to_vector(folded);
  predictor.hidden_bias = to_vector(weights.b1 - at::mv(folded, shift));
  predictor.output_weight = to_vector(weights.w2);
  predictor.output_bias = to_vector(weights.b2);
  predictor.report = compare(predictor, examples, split, slots, top_k, decisive_slots);
  return predictor;
}

Json predictor_json(const PreferencePredictor& predictor) {
  const PredictorReport& report = predictor.report;
  Json methods = Json::array();
  for (const PredictorFigures& figures : report.figures) {
    methods.push_back({{"method", figures.method},
                       {"kl", figures.kl},
                       {"probability_recall", figures.probability_recall},
                       {"request_recall", figures.request_recall}});
  }
  return {{"embedding", predictor.embedding},
          {"embedding_size", predictor.embedding_size},
          {"hidden_size", predictor.hidden_size},
          {"train_sequences", report.num_train},
          {"held_out_sequences", report.num_held_out},
          {"left_out_sequences", report.num_left_out},
          {"slots", report.slots},
          {"decisive_slots", report.decisive_slots},
          {"best_by_requests", report.best_by_requests},
          {"best_by_kl", report.best_by_kl},
          {"methods", methods}};
}

}  // namespace hestia
