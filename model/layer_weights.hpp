#pragma once

#include <map>
#include <vector>

#include <torch/types.h>

#include "hestia/architecture/architecture.hpp"
#include "hestia/model/moe_model.hpp"

namespace hestia {

/// Parameters of one model layer, or of the parts outside the layers, by what they are; an expert's matrices are the
/// stacked ones.
class LayerWeights {
 public:
  /// A place for the parameter.
  torch::Tensor& operator[](TensorPart part) { return parts_[part]; }
  /// The parameter; undefined when the layer has no such part.
  const torch::Tensor& operator[](TensorPart part) const {
    static const torch::Tensor none;
    const auto found = parts_.find(part);
    return found == parts_.end() ? none : found->second;
  }

  ExpertAdapters adapters;
  torch::Tensor reference_router_ED;  ///< Frozen copy, undefined until asked for.

  [[nodiscard]] ExpertWeights experts(bool with_adapters) const {
    using P = TensorPart;
    ExpertWeights experts{(*this)[P::kExpertGate], (*this)[P::kExpertUp], (*this)[P::kExpertDown],
                          with_adapters ? adapters : ExpertAdapters{}};
    const torch::Tensor& both = (*this)[P::kExpertGateUp];
    if (both.defined()) {
      const auto every_second = [](const torch::Tensor& rows, std::int64_t first) {
        return rows.slice(1, first, std::nullopt, 2);
      };
      const torch::Tensor& bias = (*this)[P::kExpertGateUpBias];
      experts.gate_EFD = every_second(both, 0);
      experts.up_EFD = every_second(both, 1);
      experts.gate_bias_EF = every_second(bias, 0);
      experts.up_bias_EF = every_second(bias, 1);
      experts.down_bias_ED = (*this)[P::kExpertDownBias];
    }
    return experts;
  }

  /// Everything that may train.
  [[nodiscard]] std::vector<torch::Tensor> parameters() const {
    std::vector<torch::Tensor> all;
    for (const auto& [part, tensor] : parts_) {
      all.push_back(tensor);
    }
    if (adapters.defined()) {
      all.insert(all.end(), {adapters.up_a_ERD, adapters.up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR});
    }
    return all;
  }

 private:
  std::map<TensorPart, torch::Tensor> parts_;
};

}  // namespace hestia
