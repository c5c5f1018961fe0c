#include "layer.hpp"

#include <utility>

#include <torch/autograd.h>

#include "hestia/model/routing_rule.hpp"
#include "norm.hpp"
#include "router_gradient.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using P = TensorPart;

// down(silu(gate x) * up x)
Tensor feed_forward(const LayerWeights& weights, P gate, P up, P down, const Tensor& x_TD) {
  return at::linear(at::silu(at::linear(x_TD, weights[gate])) * at::linear(x_TD, weights[up]), weights[down]);
}

// The expert that every token runs.
Tensor shared_expert(const LayerWeights& weights, const Tensor& x_TD) {
  const Tensor out_TD = feed_forward(weights, P::kSharedGate, P::kSharedUp, P::kSharedDown, x_TD);
  const Tensor& scale = weights[P::kSharedScale];
  return scale.defined() ? at::sigmoid(at::linear(x_TD, scale)) * out_TD : out_TD;
}

// Weights of the experts that were chosen, as the selector wants them.
Tensor weights_of(const LayerRun& run, const RoutingRecord& record) {
  const Architecture& a = run.architecture;
  Tensor plain_TK;
  if (run.selector->preserves_mass(run.moe_layer, a.top_k)) {
    const torch::NoGradGuard no_grad;
    plain_TK = top_k_lowest_index(selection_scores(a, record.logits_TE), a.top_k);
  }
  return mixing_weights(a, record.logits_TE, record.probabilities_TE, record.selected_TK, plain_TK);
}

// Routed experts of normalised hidden states [T, D], mixed.
Tensor moe_block(const LayerRun& run, const Tensor& x_TD, const std::optional<Tensor>& selected_TK,
                 RoutingRecord& record) {
  const Architecture& a = run.architecture;
  const LayerWeights& weights = *run.weights;
  const Tensor router_input = x_TD.to(run.router_ED.scalar_type());
  record.logits_TE = at::linear(router_input, run.router_ED, weights[P::kRouterBias]);
  record.probabilities_TE = record.logits_TE.softmax(1);
  if (selected_TK) {
    record.selected_TK = *selected_TK;
  } else {
    const torch::NoGradGuard no_grad;
    record.selected_TK =
        run.selector->select(selection_scores(a, record.logits_TE), a.top_k, run.moe_layer, run.shared->batch);
    if (weights.reference_router_ED.defined()) {
      record.reference_logits_TE =
          at::linear(router_input.detach(), weights.reference_router_ED, weights[P::kRouterBias]);
    }
  }
  record.weights_TK = weights_of(run, record);
  Tensor mixed = run.executor->run(run.experts, x_TD, record.selected_TK, record.weights_TK, run.moe_layer);
  if (run.router_gradient_of_all && torch::GradMode::is_enabled() && record.logits_TE.requires_grad()) {
    mixed = with_gradient_of_others(a, run.experts, mixed, x_TD, record);
  }
  return a.shared_intermediate_size > 0 ? mixed + shared_expert(weights, x_TD) : mixed;
}

// Lets autograd own the call until backward is done.
struct LayerCall : torch::CustomClassHolder {
  explicit LayerCall(LayerRun run_in) : run(std::move(run_in)) {}
  LayerRun run;
};

/// A layer whose activations are recomputed in backward. Router logits are among its outputs, so a loss on the routing
/// record reaches them through this node; what follows from the logits is recomputed outside it. Parameters are inputs
/// of the node (not touched behind autograd's back), so both backward() and grad() work. The selection of the first run
/// is reused: a selector with state must not be asked twice.
class CheckpointedLayer : public Function<CheckpointedLayer> {
 public:
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<LayerCall>& call,
                               const Tensor& hidden_BSD, at::TensorList parameters) {
    const LayerResult result = run_layer(call->run, hidden_BSD);
    const RoutingRecord& routing = result.routing;
    variable_list saved = {hidden_BSD, routing.selected_TK};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    ctx->set_materialize_grads(false);
    variable_list outputs = {result.hidden_BSD};
    variable_list constants;
    if (routing.logits_TE.defined()) {
      outputs.insert(outputs.end(), {routing.logits_TE, routing.selected_TK});
      constants.push_back(routing.selected_TK);
    }
    if (routing.reference_logits_TE.defined()) {
      outputs.push_back(routing.reference_logits_TE);
      constants.push_back(routing.reference_logits_TE);
    }
    ctx->mark_non_differentiable(constants);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<LayerCall>(ctx->saved_data["call"].toCapsule());
    const std::size_t num_parameters = saved.size() - 2;
    const Tensor hidden = saved[0].detach();
    hidden.requires_grad_(ctx->needs_input_grad(0));
    variable_list outputs;
    variable_list output_gradients;
    {
      const at::AutoGradMode enable(true);
      const LayerResult result = run_layer(call->run, hidden, saved[1]);
      const auto add = [&](const Tensor& output, const Tensor& gradient) {
        if (gradient.defined() && output.requires_grad()) {
          outputs.push_back(output);
          output_gradients.push_back(gradient);
        }
      };
      add(result.hidden_BSD, gradients[0]);
      if (result.routing.logits_TE.defined()) {
        add(result.routing.logits_TE, gradients[1]);
      }
    }
    std::vector<std::size_t> places;  // among this node's arguments: the call, the hidden state, the parameters
    variable_list inputs;
    if (hidden.requires_grad()) {
      places.push_back(1);
      inputs.push_back(hidden);
    }
    for (std::size_t i = 0; i < num_parameters; ++i) {
      if (ctx->needs_input_grad(i + 1)) {
        places.push_back(i + 2);
        inputs.push_back(saved[i + 2]);
      }
    }
    variable_list result(num_parameters + 2);
    if (!outputs.empty() && !inputs.empty()) {
      const variable_list found = torch::autograd::grad(outputs, inputs, output_gradients, std::nullopt,
                                                        /*create_graph=*/false, /*allow_unused=*/true);
      for (std::size_t i = 0; i < places.size(); ++i) {
        result[places[i]] = found[i];
      }
    }
    return result;
  }
};

}  // namespace

LayerResult run_layer(const LayerRun& run, const Tensor& hidden_BSD, const std::optional<Tensor>& selected_TK) {
  const Architecture& a = run.architecture;
  const LayerWeights& weights = *run.weights;
  const Tensor normal = normalise(a, hidden_BSD, weights[P::kInputNorm], weights[P::kInputNormBias]);
  const Tensor attended = hidden_BSD + attend(a, weights, run.layer, run.shared->attention, normal);
  const Tensor x_TD = normalise(a, attended, weights[P::kPostAttentionNorm], weights[P::kPostAttentionNormBias])
                          .reshape({-1, a.hidden_size});
  LayerResult result;
  const Tensor out_TD = a.is_moe_layer(run.layer)
                            ? moe_block(run, x_TD, selected_TK, result.routing)
                            : feed_forward(weights, P::kDenseGate, P::kDenseUp, P::kDenseDown, x_TD);
  result.hidden_BSD = attended + out_TD.view_as(attended);
  return result;
}

LayerResult run_layer_checkpointed(const LayerRun& run, const Tensor& hidden_BSD) {
  const std::vector<Tensor> parameters = run.weights->parameters();
  const variable_list outputs =
      CheckpointedLayer::apply(c10::make_intrusive<LayerCall>(run), hidden_BSD, at::TensorList(parameters));
  LayerResult result;
  result.hidden_BSD = outputs[0];
  if (outputs.size() > 1) {
    RoutingRecord& record = result.routing;
    record.logits_TE = outputs[1];
    record.selected_TK = outputs[2];
    record.reference_logits_TE = outputs.size() > 3 ? outputs[3] : Tensor();
    record.probabilities_TE = record.logits_TE.softmax(1);
    record.weights_TK = weights_of(run, record);
  }
  return result;
}

}  // namespace hestia
