#include "hestia/trainer/distillation.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>
#include <torch/autograd.h>

#include "head_chunks.hpp"

namespace hestia {
namespace {

// d KL / d logits = P - P_base: made together with the value, chunk by chunk.
class ChunkedDistillation : public torch::autograd::Function<ChunkedDistillation> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& hidden_ND,
                               at::TensorList head, const torch::Tensor& base_hidden_ND, at::TensorList base_head,
                               bool with_gradient) {
    HeadGradient gradient(hidden_ND, head, with_gradient);
    torch::Tensor total = torch::zeros({}, hidden_ND.options().dtype(torch::kFloat32));
    const std::int64_t num_rows = hidden_ND.size(0);
    const std::int64_t chunk = head_chunk_rows(hidden_ND, head);
    for (std::int64_t begin = 0; begin < num_rows; begin += chunk) {
      const std::int64_t length = std::min(chunk, num_rows - begin);
      const torch::Tensor log_p = head_log_softmax(hidden_ND.narrow(0, begin, length), head);
      const torch::Tensor log_base = head_log_softmax(base_hidden_ND.narrow(0, begin, length), base_head);
      const torch::Tensor base = log_base.exp();
      total.add_((base * (log_base - log_p)).sum());
      if (with_gradient) {
        gradient.add(begin, log_p.exp() - base);
      }
    }
    gradient.save(context);
    context->saved_data["base_parts"] = static_cast<std::int64_t>(base_head.size());
    return total;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grad_output) {
    const auto base_parts = static_cast<std::size_t>(context->saved_data["base_parts"].toInt());
    return HeadGradient::scaled(context, grad_output[0], /*others=*/base_parts + 2);
  }
};

}  // namespace

torch::Tensor distillation_sum(MoeModel& model, const torch::Tensor& hidden_BSD, MoeModel& base,
                               const torch::Tensor& base_hidden_BSD, const torch::Tensor& labels_BS) {
  if (hidden_BSD.sizes() != base_hidden_BSD.sizes() || model->head_weight().size(0) != base->head_weight().size(0)) {
    throw std::invalid_argument(fmt::format("distillation: the base model's output must be {} over {} tokens, got {}",
                                            c10::str(hidden_BSD.sizes()), model->head_weight().size(0),
                                            c10::str(base_hidden_BSD.sizes())));
  }
  const torch::Tensor rows = labels_BS.reshape({-1}).ge(0).nonzero().squeeze(1);
  const auto labelled = [&rows](const torch::Tensor& hidden) {
    return hidden.reshape({-1, hidden.size(-1)}).index_select(0, rows);
  };
  const torch::Tensor hidden_ND = labelled(hidden_BSD);
  const std::vector<torch::Tensor> head = head_parameters(model);
  std::vector<torch::Tensor> base_head;
  for (const torch::Tensor& part : head_parameters(base)) {
    base_head.push_back(part.detach());
  }
  return ChunkedDistillation::apply(hidden_ND, at::TensorList(head), labelled(base_hidden_BSD.detach()),
                                    at::TensorList(base_head), wants_gradient(hidden_ND, head));
}

}  // namespace hestia
