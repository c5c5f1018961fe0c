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
                               const torch::Tensor& weight_VD, const torch::Tensor& base_hidden_ND,
                               const torch::Tensor& base_weight_VD, bool with_gradient) {
    HeadGradient gradient(hidden_ND, weight_VD, with_gradient);
    torch::Tensor total = torch::zeros({}, hidden_ND.options().dtype(torch::kFloat32));
    const std::int64_t num_rows = hidden_ND.size(0);
    const std::int64_t chunk = head_chunk_rows(hidden_ND, weight_VD);
    for (std::int64_t begin = 0; begin < num_rows; begin += chunk) {
      const std::int64_t length = std::min(chunk, num_rows - begin);
      const torch::Tensor log_p = head_log_softmax(hidden_ND.narrow(0, begin, length), weight_VD);
      const torch::Tensor log_base = head_log_softmax(base_hidden_ND.narrow(0, begin, length), base_weight_VD);
      const torch::Tensor base = log_base.exp();
      total.add_((base * (log_base - log_p)).sum());
      if (with_gradient) {
        gradient.add(begin, log_p.exp() - base);
      }
    }
    gradient.save(context);
    return total;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grad_output) {
    auto [hidden, weight] = HeadGradient::scaled(context, grad_output[0]);
    return {hidden, weight, torch::Tensor(), torch::Tensor(), torch::Tensor()};
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
  const torch::Tensor& weight_VD = model->head_weight();
  const bool with_gradient = torch::GradMode::is_enabled() && (hidden_ND.requires_grad() || weight_VD.requires_grad());
  return ChunkedDistillation::apply(hidden_ND, weight_VD, labelled(base_hidden_BSD.detach()),
                                    base->head_weight().detach(), with_gradient);
}

}  // namespace hestia
