// Letters: T tokens, K experts per token, N = T*K routed rows, D model dim, F expert hidden dim, E experts, R rank of
// adapters.

#include <numeric>
#include <stdexcept>

#include <fmt/format.h>
#include <torch/autograd.h>

#include "hestia/model/moe_model.hpp"

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

/// The N = T*K routed rows, sorted by expert; within one expert in token order.
struct Dispatch {
  Tensor token_N;                   ///< int64, the token of each sorted row.
  Tensor order_N;                   ///< int64, the flat place t*K + k of each sorted row.
  Tensor inverse_N;                 ///< int64, the sorted row of each flat place.
  Tensor offsets_E;                 ///< int32 on the device, end of each expert's rows; only for grouped products.
  std::vector<std::int64_t> begin;  ///< E + 1 row offsets on the host; only for one product per expert.
  bool grouped = false;
};

// at::_grouped_mm multiplies bf16 only and wants every stride to be a multiple of 16 bytes.
constexpr std::int64_t kGroupedElements = 16 / 2;

bool can_group(const Tensor& gate_EFD) {
  return gate_EFD.is_cuda() && gate_EFD.scalar_type() == torch::kBFloat16 && gate_EFD.size(1) % kGroupedElements == 0 &&
         gate_EFD.size(2) % kGroupedElements == 0;
}

Dispatch dispatch_on_host(const Tensor& selected_TK, std::int64_t num_experts) {
  const Tensor selected = selected_TK.to(torch::kCPU).contiguous();
  const std::int64_t num_rows = selected.numel();
  const std::int64_t top_k = selected.size(1);
  const auto* expert = selected.const_data_ptr<std::int64_t>();
  Dispatch dispatch;
  dispatch.begin.assign(static_cast<std::size_t>(num_experts) + 1, 0);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    if (expert[i] < 0 || expert[i] >= num_experts) {
      throw std::invalid_argument(
          fmt::format("executor: a selected expert must be between 0 and {}, got {}", num_experts - 1, expert[i]));
    }
    ++dispatch.begin[static_cast<std::size_t>(expert[i]) + 1];
  }
  std::partial_sum(dispatch.begin.begin(), dispatch.begin.end(), dispatch.begin.begin());
  Tensor token = torch::empty({num_rows}, torch::kInt64);
  Tensor order = torch::empty({num_rows}, torch::kInt64);
  Tensor inverse = torch::empty({num_rows}, torch::kInt64);
  auto* token_data = token.data_ptr<std::int64_t>();
  auto* order_data = order.data_ptr<std::int64_t>();
  auto* inverse_data = inverse.data_ptr<std::int64_t>();
  std::vector<std::int64_t> next(dispatch.begin.begin(), dispatch.begin.end() - 1);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const std::int64_t row = next[static_cast<std::size_t>(expert[i])]++;
    token_data[row] = i / top_k;
    order_data[row] = i;
    inverse_data[i] = row;
  }
  dispatch.token_N = token.to(selected_TK.device());
  dispatch.order_N = order.to(selected_TK.device());
  dispatch.inverse_N = inverse.to(selected_TK.device());
  return dispatch;
}

Dispatch dispatch_on_device(const Tensor& selected_TK, std::int64_t num_experts) {
  const std::int64_t top_k = selected_TK.size(1);
  const auto options = torch::TensorOptions().dtype(torch::kInt64).device(selected_TK.device());
  auto [experts_N, order_N] = selected_TK.reshape({-1}).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  Dispatch dispatch;
  dispatch.grouped = true;
  dispatch.order_N = order_N;
  dispatch.token_N = order_N.div(top_k, "floor");
  dispatch.inverse_N = torch::empty_like(order_N).scatter_(0, order_N, torch::arange(order_N.size(0), options));
  dispatch.offsets_E = at::searchsorted(experts_N, torch::arange(num_experts, options), /*out_int32=*/true,
                                        /*right=*/true);
  return dispatch;
}

/// out[rows of e] = x[rows of e] * w[e] (+ out); x [N, B], w [E, B, A] -> [N, A].
Tensor times(const Dispatch& dispatch, const Tensor& x, const Tensor& w, const Tensor& accumulate = {}) {
  if (dispatch.grouped) {
    const Tensor product = at::_grouped_mm(x, w, dispatch.offsets_E);
    return accumulate.defined() ? accumulate.add_(product) : product;
  }
  Tensor out = accumulate.defined() ? accumulate : torch::empty({x.size(0), w.size(2)}, x.options());
  for (std::int64_t e = 0; e < w.size(0); ++e) {
    const std::int64_t begin = dispatch.begin[e];
    const std::int64_t rows = dispatch.begin[e + 1] - begin;
    if (rows == 0) {
      continue;
    }
    Tensor slice = out.narrow(0, begin, rows);
    if (accumulate.defined()) {
      slice.addmm_(x.narrow(0, begin, rows), w.select(0, e));
    } else {
      at::mm_out(slice, x.narrow(0, begin, rows), w.select(0, e));
    }
  }
  return out;
}

/// out[rows of e] = x[rows of e] * w[e]^T (+ out); x [N, A], w [E, B, A] -> [N, B].
Tensor times_transposed(const Dispatch& dispatch, const Tensor& x, const Tensor& w, const Tensor& accumulate = {}) {
  return times(dispatch, x, w.transpose(1, 2), accumulate);
}

/// out[e] = p[rows of e]^T * q[rows of e]; p [N, B], q [N, A] -> [E, B, A]; zeros for an expert without rows.
Tensor outer(const Dispatch& dispatch, const Tensor& p, const Tensor& q, std::int64_t num_experts) {
  if (dispatch.grouped) {
    return at::_grouped_mm(p.t(), q, dispatch.offsets_E);
  }
  Tensor out = torch::empty({num_experts, p.size(1), q.size(1)}, p.options());
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const std::int64_t begin = dispatch.begin[e];
    const std::int64_t rows = dispatch.begin[e + 1] - begin;
    Tensor slice = out.select(0, e);
    if (rows > 0) {
      at::mm_out(slice, p.narrow(0, begin, rows).t(), q.narrow(0, begin, rows));
    } else {
      slice.zero_();
    }
  }
  return out;
}

/// out[t] = sum over k of y[sorted row of (t, k)]; y [N, D] -> [T, D]. A fixed order of addition: same bits every time.
Tensor sum_of_token(const Dispatch& dispatch, const Tensor& y, std::int64_t num_tokens, std::int64_t top_k) {
  if (y.is_cpu() && y.scalar_type() == torch::kFloat32) {
    // Gathers and adds in one pass over y.
    const Tensor starts = torch::arange(0, num_tokens * top_k, top_k, torch::kInt64);
    return std::get<0>(at::_embedding_bag_forward_only(y, dispatch.inverse_N, starts));
  }
  return y.index_select(0, dispatch.inverse_N).view({num_tokens, top_k, y.size(1)}).sum(1);
}

/// Adapters as arguments of an autograd node: none, or these four.
enum AdapterPlace : std::size_t { kUpA, kUpB, kDownA, kDownB };

/// The whole expert product as one autograd node: hundreds of small products would otherwise be hundreds of nodes.
/// Forward of token t: sum_k down_e (w_tk * (silu(gate_e x_t) * up_e x_t)); the weight goes before `down`, where rows
/// are short. It keeps gate and up products [N, F] and the inputs, nothing of width D per routed row. Adapters add
/// scale * (x A^T) B^T to the up and down products, and two tensors [N, R] to what is kept.
class GroupedProduct : public Function<GroupedProduct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_EFD, const Tensor& up_EFD, const Tensor& down_EDF,
                        const Tensor& x_TD, const Tensor& selected_TK, const Tensor& weights_TK,
                        at::TensorList adapters, double scale) {
    const std::int64_t num_experts = gate_EFD.size(0);
    const Dispatch dispatch =
        can_group(gate_EFD) ? dispatch_on_device(selected_TK, num_experts) : dispatch_on_host(selected_TK, num_experts);
    const Tensor x_ND = x_TD.index_select(0, dispatch.token_N);
    const Tensor gate_NF = times_transposed(dispatch, x_ND, gate_EFD);
    Tensor up_NF = times_transposed(dispatch, x_ND, up_EFD);
    Tensor up_low_NR;
    if (!adapters.empty()) {
      up_low_NR = times_transposed(dispatch, x_ND, adapters[kUpA]).mul_(scale);
      up_NF = times_transposed(dispatch, up_low_NR, adapters[kUpB], up_NF);
    }
    const Tensor weight_N1 = weights_TK.reshape({-1}).index_select(0, dispatch.order_N).unsqueeze(1);
    const Tensor hidden_NF = at::silu(gate_NF).mul_(up_NF).mul_(weight_N1);
    Tensor y_ND = times_transposed(dispatch, hidden_NF, down_EDF);
    Tensor down_low_NR;
    if (!adapters.empty()) {
      down_low_NR = times_transposed(dispatch, hidden_NF, adapters[kDownA]).mul_(scale);
      y_ND = times_transposed(dispatch, down_low_NR, adapters[kDownB], y_ND);
    }
    Tensor out_TD = sum_of_token(dispatch, y_ND, x_TD.size(0), selected_TK.size(1));
    variable_list saved = {gate_EFD,
                           up_EFD,
                           down_EDF,
                           x_TD,
                           weight_N1,
                           gate_NF,
                           up_NF,
                           dispatch.token_N,
                           dispatch.order_N,
                           dispatch.inverse_N,
                           dispatch.offsets_E,
                           up_low_NR,
                           down_low_NR};
    saved.insert(saved.end(), adapters.begin(), adapters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["begin"] = dispatch.begin;
    ctx->saved_data["top_k"] = selected_TK.size(1);
    ctx->saved_data["scale"] = scale;
    return out_TD;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& gate_EFD = saved[0];
    const Tensor& up_EFD = saved[1];
    const Tensor& down_EDF = saved[2];
    const Tensor& x_TD = saved[3];
    const Tensor& weight_N1 = saved[4];
    const Tensor& gate_NF = saved[5];
    const Tensor& up_NF = saved[6];
    Dispatch dispatch;
    dispatch.token_N = saved[7];
    dispatch.order_N = saved[8];
    dispatch.inverse_N = saved[9];
    dispatch.offsets_E = saved[10];
    dispatch.begin = ctx->saved_data["begin"].toIntVector();
    dispatch.grouped = dispatch.offsets_E.defined();
    const Tensor& up_low_NR = saved[11];
    const Tensor& down_low_NR = saved[12];
    const at::ArrayRef<Tensor> adapters = at::ArrayRef<Tensor>(saved).slice(13);
    const double scale = ctx->saved_data["scale"].toDouble();
    const std::int64_t top_k = ctx->saved_data["top_k"].toInt();
    const std::int64_t num_experts = gate_EFD.size(0);
    const bool need_gate = ctx->needs_input_grad(0);
    const bool need_up = ctx->needs_input_grad(1);
    const bool need_down = ctx->needs_input_grad(2);
    const bool need_x = ctx->needs_input_grad(3);
    const bool need_weights = ctx->needs_input_grad(5);
    const auto need_adapter = [&](AdapterPlace place) { return !adapters.empty() && ctx->needs_input_grad(6 + place); };
    const bool need_up_adapter = need_adapter(kUpA) || need_adapter(kUpB);
    const bool need_below_hidden = need_gate || need_up || need_x || need_up_adapter;
    variable_list result(7 + adapters.size());

    const Tensor dy_ND = gradients[0].contiguous().index_select(0, dispatch.token_N);
    const Tensor silu_NF = at::silu(gate_NF);
    // Gradient of silu(gate) * up * mixing weight, which enters `down`; scale * dy B of the down adapter.
    Tensor dhidden_NF;
    Tensor dy_low_NR;
    if (!adapters.empty() && (need_below_hidden || need_weights || need_adapter(kDownA))) {
      dy_low_NR = times(dispatch, dy_ND, adapters[kDownB]).mul_(scale);
    }
    if (need_below_hidden || need_weights) {
      dhidden_NF = times(dispatch, dy_ND, down_EDF);
      if (dy_low_NR.defined()) {
        dhidden_NF = times(dispatch, dy_low_NR, adapters[kDownA], dhidden_NF);
      }
    }
    if (need_weights) {
      const auto accumulator = weight_N1.scalar_type();
      const Tensor dweight_N = (dhidden_NF * silu_NF).mul_(up_NF).sum(1, /*keepdim=*/false, accumulator);
      result[5] = dweight_N.index_select(0, dispatch.inverse_N).view({-1, top_k});
    }
    if (need_down || need_adapter(kDownA)) {
      const Tensor hidden_NF = (silu_NF * up_NF).mul_(weight_N1);
      if (need_down) {
        result[2] = outer(dispatch, dy_ND, hidden_NF, num_experts);
      }
      if (need_adapter(kDownA)) {
        result[6 + kDownA] = outer(dispatch, dy_low_NR, hidden_NF, num_experts);
      }
    }
    if (need_adapter(kDownB)) {
      result[6 + kDownB] = outer(dispatch, dy_ND, down_low_NR, num_experts);
    }
    if (need_below_hidden) {
      dhidden_NF.mul_(weight_N1);
      const Tensor dup_NF = dhidden_NF * silu_NF;
      const Tensor dgate_NF = at::silu_backward(dhidden_NF.mul_(up_NF), gate_NF);
      Tensor dup_low_NR;
      if (!adapters.empty() && (need_x || need_adapter(kUpA))) {
        dup_low_NR = times(dispatch, dup_NF, adapters[kUpB]).mul_(scale);
      }
      if (need_gate || need_up || need_adapter(kUpA)) {
        const Tensor x_ND = x_TD.index_select(0, dispatch.token_N);
        if (need_gate) {
          result[0] = outer(dispatch, dgate_NF, x_ND, num_experts);
        }
        if (need_up) {
          result[1] = outer(dispatch, dup_NF, x_ND, num_experts);
        }
        if (need_adapter(kUpA)) {
          result[6 + kUpA] = outer(dispatch, dup_low_NR, x_ND, num_experts);
        }
      }
      if (need_adapter(kUpB)) {
        result[6 + kUpB] = outer(dispatch, dup_NF, up_low_NR, num_experts);
      }
      if (need_x) {
        Tensor dx_ND = times(dispatch, dgate_NF, gate_EFD);
        dx_ND = times(dispatch, dup_NF, up_EFD, dx_ND);
        if (dup_low_NR.defined()) {
          dx_ND = times(dispatch, dup_low_NR, adapters[kUpA], dx_ND);
        }
        result[3] = sum_of_token(dispatch, dx_ND, x_TD.size(0), top_k);
      }
    }
    return result;
  }
};

void check_shapes(const ExpertWeights& experts, const Tensor& x_TD, const Tensor& selected_TK,
                  const Tensor& weights_TK) {
  const bool ok = experts.gate_EFD.dim() == 3 && x_TD.dim() == 2 && selected_TK.dim() == 2 &&
                  experts.up_EFD.sizes() == experts.gate_EFD.sizes() && experts.down_EDF.dim() == 3 &&
                  experts.down_EDF.size(0) == experts.gate_EFD.size(0) &&
                  experts.down_EDF.size(1) == experts.gate_EFD.size(2) &&
                  experts.down_EDF.size(2) == experts.gate_EFD.size(1) && x_TD.size(1) == experts.gate_EFD.size(2) &&
                  selected_TK.size(0) == x_TD.size(0) && weights_TK.sizes() == selected_TK.sizes();
  if (!ok) {
    throw std::invalid_argument("executor: shapes of experts, inputs, selection and weights do not fit together");
  }
  const bool biased = experts.gate_bias_EF.defined();
  if (biased != experts.up_bias_EF.defined() || biased != experts.down_bias_ED.defined() ||
      (biased && experts.adapters.defined()) || (experts.swiglu_limit && !biased)) {
    throw std::invalid_argument(
        "executor: experts have all biases or none; those with biases take no adapters, those without no clamp");
  }
  if (!experts.adapters.defined()) {
    return;
  }
  const std::int64_t num_experts = experts.gate_EFD.size(0);
  const std::int64_t hidden = experts.gate_EFD.size(1);
  const std::int64_t model_dim = experts.gate_EFD.size(2);
  const ExpertAdapters& adapters = experts.adapters;
  const std::int64_t rank = adapters.up_a_ERD.dim() == 3 ? adapters.up_a_ERD.size(1) : 0;
  const auto is = [&](const Tensor& tensor, std::int64_t rows, std::int64_t columns) {
    return tensor.defined() && tensor.sizes() == at::IntArrayRef({num_experts, rows, columns});
  };
  if (rank < 1 || !is(adapters.up_a_ERD, rank, model_dim) || !is(adapters.up_b_EFR, hidden, rank) ||
      !is(adapters.down_a_ERF, rank, hidden) || !is(adapters.down_b_EDR, model_dim, rank)) {
    throw std::invalid_argument("executor: shapes of experts and adapters do not fit together");
  }
}

// The executor of experts with biases: the same products as nodes of their own.
Tensor run_biased(const ExpertWeights& experts, const Tensor& x_TD, const Tensor& selected_TK,
                  const Tensor& weights_TK) {
  const std::int64_t num_experts = experts.gate_EFD.size(0);
  const bool grouped = can_group(experts.gate_EFD);
  const Dispatch dispatch =
      grouped ? dispatch_on_device(selected_TK, num_experts) : dispatch_on_host(selected_TK, num_experts);
  const Tensor expert_N = selected_TK.reshape({-1}).index_select(0, dispatch.order_N);
  // x W_e^T + b_e of every row's expert e
  const auto product = [&](const Tensor& x, const Tensor& w, const Tensor& bias) {
    if (grouped) {
      return at::_grouped_mm(x, w.transpose(1, 2), dispatch.offsets_E) + bias.index_select(0, expert_N);
    }
    std::vector<Tensor> pieces;
    for (std::int64_t e = 0; e < num_experts; ++e) {
      const std::int64_t begin = dispatch.begin[e];
      const std::int64_t rows = dispatch.begin[e + 1] - begin;
      if (rows > 0) {
        pieces.push_back(at::linear(x.narrow(0, begin, rows), w.select(0, e), bias.select(0, e)));
      }
    }
    return torch::cat(pieces);
  };
  const Tensor x_ND = x_TD.index_select(0, dispatch.token_N);
  const Tensor hidden_NF = gated_activation(experts, product(x_ND, experts.gate_EFD, experts.gate_bias_EF),
                                            product(x_ND, experts.up_EFD, experts.up_bias_EF));
  const Tensor weight_N1 = weights_TK.reshape({-1}).index_select(0, dispatch.order_N).unsqueeze(1);
  const Tensor y_ND = (product(hidden_NF, experts.down_EDF, experts.down_bias_ED) * weight_N1).to(x_TD.scalar_type());
  return y_ND.index_select(0, dispatch.inverse_N).view({x_TD.size(0), -1, x_TD.size(1)}).sum(1);
}

/// The four adapters of a layer, in the order of AdapterPlace; none when there are none. For grouped products a rank in
/// between is filled up with zeros, which add nothing and get no gradient back.
std::vector<Tensor> adapter_arguments(const ExpertWeights& experts) {
  const ExpertAdapters& adapters = experts.adapters;
  if (!adapters.defined()) {
    return {};
  }
  std::vector<Tensor> list = {adapters.up_a_ERD, adapters.up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR};
  const std::int64_t beyond = adapters.up_a_ERD.size(1) % kGroupedElements;
  if (can_group(experts.gate_EFD) && beyond != 0) {
    const std::int64_t missing = kGroupedElements - beyond;
    for (const AdapterPlace place : {kUpA, kDownA}) {
      list[place] = at::constant_pad_nd(list[place], {0, 0, 0, missing});
    }
    for (const AdapterPlace place : {kUpB, kDownB}) {
      list[place] = at::constant_pad_nd(list[place], {0, missing});
    }
  }
  return list;
}

}  // namespace

torch::Tensor gated_activation(const ExpertWeights& experts, const torch::Tensor& gate, const torch::Tensor& up) {
  if (!experts.swiglu_limit) {
    return at::silu(gate) * up;
  }
  const double limit = *experts.swiglu_limit;
  // In float32: bf16 would round five times.
  const auto wide = gate.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const Tensor low = gate.to(wide).clamp_max(limit);
  const Tensor product = (up.to(wide).clamp(-limit, limit) + 1) * low * at::sigmoid(low * experts.swiglu_alpha);
  return product.to(gate.scalar_type());
}

torch::Tensor GroupedExecutor::run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                   const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                   std::int64_t /*moe_layer*/) {
  check_shapes(experts, x_TD, selected_TK, weights_TK);
  if (x_TD.size(0) == 0) {
    return x_TD * 1;  // nothing routed; still a node of the graph
  }
  if (experts.gate_bias_EF.defined()) {
    return run_biased(experts, x_TD, selected_TK, weights_TK);
  }
  const std::vector<Tensor> adapters = adapter_arguments(experts);
  return GroupedProduct::apply(experts.gate_EFD, experts.up_EFD, experts.down_EDF, x_TD, selected_TK, weights_TK,
                               at::TensorList(adapters), experts.adapters.scale);
}

torch::Tensor DenseExecutor::run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                 const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                 std::int64_t /*moe_layer*/) {
  check_shapes(experts, x_TD, selected_TK, weights_TK);
  const ExpertAdapters& adapters = experts.adapters;
  Tensor up_EFD = experts.up_EFD;
  Tensor down_EDF = experts.down_EDF;
  if (adapters.defined()) {
    up_EFD = up_EFD + adapters.scale * adapters.up_b_EFR.bmm(adapters.up_a_ERD);
    down_EDF = down_EDF + adapters.scale * adapters.down_b_EDR.bmm(adapters.down_a_ERF);
  }
  Tensor out_TD = torch::zeros_like(x_TD);
  for (std::int64_t e = 0; e < experts.gate_EFD.size(0); ++e) {
    const Tensor weight_T1 = (weights_TK * selected_TK.eq(e)).sum(1, /*keepdim=*/true);
    const auto bias = [&](const Tensor& all) { return all.defined() ? all[e] : Tensor(); };
    const Tensor hidden_TF =
        gated_activation(experts, at::linear(x_TD, experts.gate_EFD[e], bias(experts.gate_bias_EF)),
                         at::linear(x_TD, up_EFD[e], bias(experts.up_bias_EF)));
    out_TD =
        out_TD + (weight_T1 * at::linear(hidden_TF, down_EDF[e], bias(experts.down_bias_ED))).to(x_TD.scalar_type());
  }
  return out_TD;
}

}  // namespace hestia
