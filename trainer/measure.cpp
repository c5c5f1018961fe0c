#include "hestia/trainer/measure.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include <torch/autograd.h>

#include "head_chunks.hpp"
#include "hestia/core/error.hpp"
#include "hestia/model/routing_rule.hpp"

namespace hestia {

namespace {

// Linear head and cross-entropy in chunks, the gradients made together with the value.
class ChunkedNll : public torch::autograd::Function<ChunkedNll> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& hidden_ND,
                               at::TensorList head, const torch::Tensor& labels_N, bool with_gradient) {
    HeadGradient gradient(hidden_ND, head, with_gradient);
    torch::Tensor total = torch::zeros({}, hidden_ND.options().dtype(torch::kFloat32));
    const std::int64_t num_rows = hidden_ND.size(0);
    const std::int64_t chunk = head_chunk_rows(hidden_ND, head);
    for (std::int64_t begin = 0; begin < num_rows; begin += chunk) {
      const std::int64_t length = std::min(chunk, num_rows - begin);
      const torch::Tensor labels = labels_N.narrow(0, begin, length).unsqueeze(1);
      torch::Tensor log_probabilities = head_log_softmax(hidden_ND.narrow(0, begin, length), head);
      total.sub_(log_probabilities.gather(1, labels).sum());
      if (with_gradient) {
        torch::Tensor grad_logits = log_probabilities.exp_();
        grad_logits.scatter_add_(1, labels, torch::full({length, 1}, -1.0F, grad_logits.options()));
        gradient.add(begin, grad_logits);
      }
    }
    gradient.save(context);
    return total;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grad_output) {
    return HeadGradient::scaled(context, grad_output[0], /*others=*/2);
  }
};

torch::Tensor from_vector(const std::vector<std::int64_t>& values, std::int64_t rows, std::int64_t columns,
                          torch::Device device) {
  return torch::from_blob(const_cast<std::int64_t*>(values.data()), {rows, columns}, torch::kInt64)  // NOLINT
      .clone()
      .to(device);
}

// What the routers of all layers chose in one batch, on the CPU.
class BatchRouting {
 public:
  explicit BatchRouting(std::int64_t num_experts) : num_experts_(num_experts) {}
  // One layer; `weights` and `probabilities` may be undefined.
  void add(const torch::Tensor& selected_TK, const torch::Tensor& weights_TK, const torch::Tensor& probabilities_TE) {
    selected_.push_back(selected_TK.to(torch::kCPU).contiguous());
    if (weights_TK.defined()) {
      weights_.push_back(weights_TK.to(torch::kCPU, torch::kFloat32).contiguous());
    }
    if (probabilities_TE.defined()) {
      probabilities_.push_back(probabilities_TE.to(torch::kCPU, torch::kFloat32).contiguous());
    }
  }

  // The part of one sequence; its id is `first_id` and its number in the batch.
  [[nodiscard]] SequenceRouting sequence(const PackedData& data, const PackedBatch& batch, const SequenceRun& run,
                                         std::int64_t first_id) const {
    SequenceRouting routing;
    routing.id = first_id + run.id;
    routing.task = data.domains.at(static_cast<std::size_t>(batch.domains.at(static_cast<std::size_t>(run.id))));
    routing.num_tokens = run.length();
    while (routing.num_prompt_tokens < run.length() &&
           batch.counted[static_cast<std::size_t>(run.begin + routing.num_prompt_tokens)] == 0) {
      ++routing.num_prompt_tokens;
    }
    const auto first = batch.counted.begin() + run.begin;
    if (std::find(first + routing.num_prompt_tokens, first + run.length(), 0) != first + run.length()) {
      routing.counted.assign(first, first + run.length());
    }
    routing.num_layers = static_cast<std::int64_t>(selected_.size());
    routing.num_experts = num_experts_;
    routing.top_k = selected_.empty() ? 0 : selected_.front().size(1);
    for (const torch::Tensor& selected : selected_) {
      const std::int64_t* experts = selected.data_ptr<std::int64_t>();
      for (std::int64_t i = run.begin * routing.top_k; i < run.end * routing.top_k; ++i) {
        routing.selected.push_back(static_cast<std::uint16_t>(experts[i]));
      }
    }
    append_rows(weights_, run, routing.weights);
    append_rows(probabilities_, run, routing.probabilities);
    return routing;
  }

 private:
  static void append_rows(const std::vector<torch::Tensor>& layers, const SequenceRun& run,
                          std::vector<float>& values) {
    for (const torch::Tensor& layer : layers) {
      const float* first = layer.data_ptr<float>();
      values.insert(values.end(), first + run.begin * layer.size(1), first + run.end * layer.size(1));
    }
  }

  std::int64_t num_experts_;
  std::vector<torch::Tensor> selected_;
  std::vector<torch::Tensor> weights_;
  std::vector<torch::Tensor> probabilities_;
};

}  // namespace

double QualityResult::nll() const {
  return labels == 0 ? std::numeric_limits<double>::quiet_NaN() : nll_sum / static_cast<double>(labels);
}

double QualityResult::perplexity() const {
  return std::exp(nll());
}

double QualityResult::bits_per_byte() const {
  return bytes == 0 ? std::numeric_limits<double>::quiet_NaN() : nll_sum / std::log(2.0) / static_cast<double>(bytes);
}

TokenBatch to_device(const PackedBatch& batch, torch::Device device) {
  return {from_vector(batch.tokens, batch.num_rows, batch.row_length, device),
          from_vector(batch.positions, batch.num_rows, batch.row_length, device),
          from_vector(batch.sequence_ids, batch.num_rows, batch.row_length, device),
          torch::from_blob(const_cast<std::uint8_t*>(batch.counted.data()),  // NOLINT
                           {batch.num_rows, batch.row_length}, torch::kUInt8)
              .clone()
              .to(device)};
}

SequenceLayout layout_of(const PackedBatch& batch) {
  return {batch.sequence_ids, batch.counted};
}

std::vector<float> mean_logit_range(MoeModel& model, const std::vector<PackedBatch>& batches) {
  const torch::NoGradGuard no_grad;
  std::vector<double> sums(model->architecture().moe_layers().size(), 0.0);
  double tokens = 0.0;
  for (const PackedBatch& batch : batches) {
    const TokenBatch on_device = to_device(batch, model->device());
    const torch::Tensor real = on_device.sequence_ids_BS.reshape({-1}).ge(0);
    const ModelOutput output = model->forward(on_device);
    for (std::size_t layer = 0; layer < sums.size(); ++layer) {
      const auto [low, high] = output.routing[layer].logits_TE.to(torch::kFloat64).aminmax(1, /*keepdim=*/false);
      sums[layer] += (high - low).masked_select(real).sum().item<double>();
    }
    tokens += real.sum().item<double>();
  }
  std::vector<float> ranges;
  ranges.reserve(sums.size());
  for (const double sum : sums) {
    ranges.push_back(static_cast<float>(sum / tokens));
  }
  return ranges;
}

torch::Tensor nll_sum(MoeModel& model, const torch::Tensor& hidden_BSD, const torch::Tensor& labels_BS) {
  const torch::Tensor labels_T = labels_BS.reshape({-1});
  const torch::Tensor rows = labels_T.ge(0).nonzero().squeeze(1);
  const torch::Tensor hidden_ND = hidden_BSD.reshape({-1, hidden_BSD.size(-1)}).index_select(0, rows);
  const torch::Tensor labels_N = labels_T.index_select(0, rows);
  const std::vector<torch::Tensor> head = head_parameters(model);
  return ChunkedNll::apply(hidden_ND, at::TensorList(head), labels_N, wants_gradient(hidden_ND, head));
}

torch::Tensor label_log_probabilities(MoeModel& model, const torch::Tensor& hidden_BSD,
                                      const torch::Tensor& labels_BS) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor labels_T = labels_BS.reshape({-1});
  const torch::Tensor rows = labels_T.ge(0).nonzero().squeeze(1);
  const torch::Tensor hidden_ND = hidden_BSD.reshape({-1, hidden_BSD.size(-1)}).index_select(0, rows);
  const torch::Tensor labels_N1 = labels_T.index_select(0, rows).unsqueeze(1);
  const std::vector<torch::Tensor> head = head_parameters(model);
  const std::int64_t chunk = head_chunk_rows(hidden_ND, head);
  torch::Tensor found_N = torch::zeros({rows.size(0)}, hidden_BSD.options().dtype(torch::kFloat32));
  for (std::int64_t begin = 0; begin < rows.size(0); begin += chunk) {
    const std::int64_t length = std::min(chunk, rows.size(0) - begin);
    const torch::Tensor log_probabilities = head_log_softmax(hidden_ND.narrow(0, begin, length), head);
    found_N.narrow(0, begin, length).copy_(log_probabilities.gather(1, labels_N1.narrow(0, begin, length)).squeeze(1));
  }
  return torch::zeros(labels_T.sizes(), found_N.options()).index_copy_(0, rows, found_N).view_as(labels_BS);
}

QualityResult measure(MoeModel& model, const PackedData& data, const std::vector<PackedBatch>& batches,
                      bool with_probabilities, const std::function<void(SequenceRouting&&)>& visit,
                      const std::function<void(std::int64_t tokens)>& progress,
                      const std::function<void(const SequenceRouting&, const SequenceRouting&)>& compare) {
  const torch::NoGradGuard no_grad;
  QualityResult result;
  std::int64_t next_id = 0;
  for (const PackedBatch& batch : batches) {
    const ModelOutput output = model->forward(to_device(batch, model->device()));
    const torch::Tensor labels = from_vector(batch.labels, batch.num_rows, batch.row_length, model->device());
    result.nll_sum += nll_sum(model, output.hidden_BSD, labels).to(torch::kFloat64).item<double>();
    result.labels += batch.num_labels();
    result.bytes += batch.num_bytes;
    const std::vector<SequenceRun> runs = sequence_runs(layout_of(batch));
    if (visit || compare) {
      BatchRouting own(model->architecture().num_experts);
      BatchRouting reference(model->architecture().num_experts);
      for (const RoutingRecord& record : output.routing) {
        const bool probabilities = with_probabilities || compare;
        own.add(record.selected_TK, record.weights_TK, probabilities ? record.probabilities_TE : torch::Tensor());
        if (compare) {
          if (!record.reference_logits_TE.defined()) {
            throw std::invalid_argument("measure: the model keeps no reference routers to compare with");
          }
          const torch::Tensor scores = selection_scores(model->architecture(), record.reference_logits_TE);
          reference.add(top_k_lowest_index(scores, record.selected_TK.size(1)), torch::Tensor(),
                        record.reference_logits_TE.softmax(1));
        }
      }
      for (const SequenceRun& run : runs) {
        SequenceRouting routing = own.sequence(data, batch, run, next_id);
        if (compare) {
          compare(reference.sequence(data, batch, run, next_id), routing);
          if (!with_probabilities) {
            routing.probabilities.clear();
          }
        }
        if (visit) {
          visit(std::move(routing));
        }
      }
    }
    next_id += static_cast<std::int64_t>(batch.domains.size());
    if (progress) {
      std::int64_t tokens = 0;
      for (const SequenceRun& run : runs) {
        tokens += run.length();
      }
      progress(tokens);
    }
  }
  return result;
}

}  // namespace hestia
