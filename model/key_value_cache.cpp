#include "hestia/model/key_value_cache.hpp"

#include <stdexcept>

#include <fmt/format.h>

namespace hestia {

using torch::Tensor;

KeyValueCache::KeyValueCache(std::int64_t capacity) : capacity_(capacity) {
  if (capacity < 1) {
    throw std::invalid_argument(fmt::format("key-value cache: capacity must be at least 1, got {}", capacity));
  }
}

void KeyValueCache::check(std::int64_t layer, const Tensor& all, const Tensor& more) {
  if (all.size(0) != more.size(0) || all.size(1) != more.size(1) || all.size(3) != more.size(3) ||
      all.scalar_type() != more.scalar_type() || all.device() != more.device()) {
    throw std::invalid_argument(
        fmt::format("key-value cache: layer {} holds rows of another batch or model; use a new cache", layer));
  }
}

std::pair<Tensor, Tensor> KeyValueCache::memory(std::int64_t layer) const {
  const auto index = static_cast<std::size_t>(layer);
  if (index >= layers_.size() || !layers_[index].key.defined()) {
    throw std::invalid_argument(fmt::format("key-value cache: layer {} has no tokens yet", layer));
  }
  return {layers_[index].key, layers_[index].value};
}

std::pair<Tensor, Tensor> KeyValueCache::put(std::int64_t layer, const Tensor& key_BH1d, const Tensor& value_BH1d,
                                             const Tensor& position_1, std::int64_t visible) {
  const auto index = static_cast<std::size_t>(layer);
  if (index >= layers_.size() || !layers_[index].key.defined()) {
    throw std::invalid_argument(fmt::format("key-value cache: layer {} has no tokens before this one", layer));
  }
  const auto write = [&](Tensor& all, const Tensor& more) {
    check(layer, all, more);
    all.index_copy_(2, position_1, more);
    return all.narrow(2, 0, visible);
  };
  Tensor keys = write(layers_[index].key, key_BH1d);
  return {std::move(keys), write(layers_[index].value, value_BH1d)};
}

std::pair<Tensor, Tensor> KeyValueCache::extend(std::int64_t layer, const Tensor& key_BHSd, const Tensor& value_BHSd) {
  const std::int64_t tokens = key_BHSd.size(2);
  if (tokens > capacity_ - length_) {
    throw std::invalid_argument(
        fmt::format("key-value cache: {} tokens do not fit behind {} of {}", tokens, length_, capacity_));
  }
  const auto index = static_cast<std::size_t>(layer);
  if (layers_.size() <= index) {
    layers_.resize(index + 1);
  }
  const auto append = [&](Tensor& all, const Tensor& more) {
    if (!all.defined()) {
      // Zeros: a masked key weighs 0, and 0 times what happens to lie there may be no number.
      all = torch::zeros({more.size(0), more.size(1), capacity_, more.size(3)}, more.options());
    }
    check(layer, all, more);
    all.narrow(2, length_, tokens).copy_(more);
    return all.narrow(2, 0, length_ + tokens);
  };
  Tensor keys = append(layers_[index].key, key_BHSd);
  return {std::move(keys), append(layers_[index].value, value_BHSd)};
}

void KeyValueCache::advance(std::int64_t tokens) {
  if (tokens < 0 || tokens > capacity_ - length_) {
    throw std::invalid_argument(
        fmt::format("key-value cache: cannot count {} tokens behind {} of {}", tokens, length_, capacity_));
  }
  length_ += tokens;
}

}  // namespace hestia
