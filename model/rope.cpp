#include "rope.hpp"

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

RotaryTables rotary_tables(const Architecture& architecture, const Tensor& positions_BS,
                           const Tensor& /*sequence_ids_BS*/, torch::Dtype dtype) {
  const RopeSettings& rope = architecture.rope;
  const auto options = torch::TensorOptions().dtype(torch::kFloat32).device(positions_BS.device());
  const Tensor exponent = torch::arange(0, architecture.head_dim, 2, options) / architecture.head_dim;
  const Tensor frequency = at::pow(rope.theta, exponent).reciprocal().div(rope.factor);
  const Tensor angle = (positions_BS.unsqueeze(2).to(torch::kFloat32) * frequency).unsqueeze(1);
  return {angle.cos().to(dtype), angle.sin().to(dtype)};
}

Tensor rotary(const Tensor& x_BHSd, const RotaryTables& tables) {
  return Rotary::apply(x_BHSd, tables.cosine, tables.sine);
}

}  // namespace hestia
