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
      all = torch::empty({more.size(0), more.size(1), capacity_, more.size(3)}, more.options());
    }
    if (all.size(0) != more.size(0) || all.size(1) != more.size(1) || all.size(3) != more.size(3) ||
        all.scalar_type() != more.scalar_type() || all.device() != more.device()) {
      throw std::invalid_argument(
          fmt::format("key-value cache: layer {} holds rows of another batch or model; use a new cache", layer));
    }
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
