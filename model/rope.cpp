#include "rope.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <torch/autograd.h>

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Rotates halves: (a, b) -> (a cos - b sin, b cos + a sin), elementwise over the two halves of the last dimension.
Tensor rotate(const Tensor& x_BHSd, const Tensor& cosine, const Tensor& sine) {
  const std::int64_t half = x_BHSd.size(3) / 2;
  const Tensor a = x_BHSd.narrow(3, 0, half);
  const Tensor b = x_BHSd.narrow(3, half, half);
  Tensor out = torch::empty(x_BHSd.sizes(), x_BHSd.options());
  Tensor out_a = out.narrow(3, 0, half);
  Tensor out_b = out.narrow(3, half, half);
  at::mul_out(out_a, a, cosine);
  out_a.addcmul_(b, sine, -1);
  at::mul_out(out_b, b, cosine);
  out_b.addcmul_(a, sine);
  return out;
}

// Of each token's sequence, int64 [B, S]; a sequence is a stretch of one id within a row.
Tensor sequence_lengths(const Tensor& positions_BS, const Tensor& sequence_ids_BS) {
  Tensor run_BS = torch::zeros_like(sequence_ids_BS);
  const std::int64_t rest = sequence_ids_BS.size(1) - 1;
  const Tensor begins = sequence_ids_BS.narrow(1, 1, rest).ne(sequence_ids_BS.narrow(1, 0, rest));
  run_BS.narrow(1, 1, rest).copy_(begins.cumsum(1));
  return torch::zeros_like(positions_BS).scatter_reduce_(1, run_BS, positions_BS + 1, "amax").gather(1, run_BS);
}

// How far each of the d/2 frequencies is divided by the factor, 0 to 1: a line in i between the one that turns
// beta_fast times over the original positions and the one that turns beta_slow times; frequency i turns positions / (2
// pi theta^(2i/d)) times.
Tensor yarn_stretched(const RopeSettings& rope, std::int64_t dim, const torch::TensorOptions& options) {
  const auto index_of_turns = [&](double turns) {
    return static_cast<double>(dim) *
           std::log(static_cast<double>(rope.original_positions) / (turns * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(rope.theta));
  };
  double first = index_of_turns(rope.beta_fast);
  double last = index_of_turns(rope.beta_slow);
  if (rope.truncate) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(dim - 1));
  if (first == last) {
    last += 0.001;
  }
  return ((torch::arange(dim / 2, options) - first) / (last - first)).clamp_(0.0, 1.0);
}

/// Backward is the rotation back.
class Rotary : public Function<Rotary> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x_BHSd, const Tensor& cosine, const Tensor& sine) {
    ctx->save_for_backward({cosine, sine});
    return rotate(x_BHSd, cosine, sine);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotate(gradients[0], saved[0], saved[1].neg()), Tensor(), Tensor()};
  }
};

}  // namespace

RotaryTables rotary_tables(const Architecture& architecture, const Tensor& positions_BS, const Tensor& sequence_ids_BS,
                           torch::Dtype dtype) {
  const RopeSettings& rope = architecture.rope;
  const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(positions_BS.device());
  const std::int64_t dim = architecture.rotary_dim();
  const Tensor exponent = torch::arange(0, dim, 2, options) / dim;
  const Tensor period = at::pow(rope.theta, exponent);
  const Tensor position = positions_BS.unsqueeze(2).to(torch::kFloat32);
  const auto tables = [&](const Tensor& frequency, double scale) {
    const Tensor angle = (position * frequency).unsqueeze(1);
    return RotaryTables{angle.cos().mul_(scale), angle.sin().mul_(scale)};
  };
  RotaryTables result;
  if (rope.type == "longrope") {
    const auto scaled = [&](const std::vector<double>& factor, double scale) {
      return tables(torch::tensor(factor, options).mul_(period).reciprocal_(), scale);
    };
    const RotaryTables near = scaled(rope.short_factor, rope.short_scale);
    const RotaryTables far = scaled(rope.long_factor, rope.long_scale);
    const Tensor is_far =
        sequence_lengths(positions_BS, sequence_ids_BS).gt(rope.original_positions).unsqueeze(1).unsqueeze(3);
    result = {torch::where(is_far, far.cosine, near.cosine), torch::where(is_far, far.sine, near.sine)};
  } else if (rope.type == "yarn") {
    const Tensor stretched = yarn_stretched(rope, dim, options);
    result = tables((period * rope.factor).reciprocal_() * stretched + period.reciprocal() * (1 - stretched),
                    rope.rotation_scale());
  } else {
    result = tables(period.reciprocal().div(rope.factor), 1.0);
  }
  return {result.cosine.to(dtype), result.sine.to(dtype)};
}

Tensor rotary(const Tensor& x_BHSd, const RotaryTables& tables) {
  return Rotary::apply(x_BHSd, tables.cosine, tables.sine);
}

}  // namespace hestia
