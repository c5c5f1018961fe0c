#include "norm.hpp"

#include <torch/autograd.h>

namespace hestia {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Statistics of a norm are taken in float32 whatever the model's dtype (float64 stays float64).
torch::Dtype statistics_dtype(const Tensor& x) {
  return x.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
}

/// One node, and only x and one scalar per row are kept for backward.
class RmsNorm : public Function<RmsNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps, bool wide_scale) {
    const Tensor wide = x.to(statistics_dtype(x));
    const Tensor inverse = (wide * wide).mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
    ctx->save_for_backward({x, weight, inverse});
    const Tensor normal = wide * inverse;
    return wide_scale ? (normal * weight).to(x.scalar_type()) : normal.to(x.scalar_type()).mul_(weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Tensor& inverse = saved[2];
    const Tensor& dy = gradients[0];
    const Tensor normal = x.to(statistics_dtype(x)) * inverse;
    variable_list result(4);
    if (ctx->needs_input_grad(1)) {
      result[1] = (dy * normal).reshape({-1, x.size(-1)}).sum(0).to(saved[1].scalar_type());
    }
    if (ctx->needs_input_grad(0)) {
      Tensor dnormal = (dy * saved[1]).to(normal.scalar_type());
      const Tensor mean = (dnormal * normal).mean(-1, /*keepdim=*/true);
      result[0] = dnormal.sub_(normal * mean).mul_(inverse).to(x.scalar_type());
    }
    return result;
  }
};

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return RmsNorm::apply(x, weight, eps, /*wide_scale=*/false);
}

Tensor normalise(const Architecture& architecture, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  switch (architecture.norm) {
    case NormKind::kRms:
      return rms_norm(x, weight, architecture.norm_eps);
    case NormKind::kRmsWide:
      return RmsNorm::apply(x, weight, architecture.norm_eps, /*wide_scale=*/true);
    case NormKind::kLayer:
      return at::layer_norm(x, {x.size(-1)}, weight, bias, architecture.norm_eps);
  }
  throw std::invalid_argument("model: unknown norm");
}

}  // namespace hestia
