// Letters: T tokens of a step, K experts per token, D model dim, F expert hidden dim, E experts, L MoE layers.
#include "hestia/runtime/slot_executor.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "copy_proxy.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/kernels/decode_experts.hpp"
#include "hestia/kernels/decode_fetch.hpp"
#include "hestia/kernels/expert_fetch.hpp"
#include "packed_experts.hpp"

namespace hestia {
namespace {

using torch::Tensor;

Tensor device_bytes(std::size_t bytes, torch::Device device) {
  return torch::zeros({static_cast<std::int64_t>(bytes)}, torch::TensorOptions().dtype(torch::kUInt8).device(device));
}

template <class Value>
Value* as(const Tensor& memory) {
  return reinterpret_cast<Value*>(memory.data_ptr());
}

const std::uint16_t* bits(const Tensor& bfloat16) {
  return static_cast<const std::uint16_t*>(bfloat16.const_data_ptr());
}
std::uint16_t* mutable_bits(const Tensor& bfloat16) {
  return static_cast<std::uint16_t*>(bfloat16.mutable_data_ptr());
}

// An expert as the decode kernels take it.
ExpertBlob blob_of(const Architecture& a, const ExpertStore& store, std::int64_t rows, std::int64_t top_k) {
  return expert_blob({.num_tokens = rows,
                      .top_k = top_k,
                      .hidden_size = a.hidden_size,
                      .expert_hidden_size = a.expert_intermediate_size,
                      .format = store.format()});
}

// Whether the decode kernels take these experts, lying as they do in the blob.
bool kernels_take(const Architecture& a, const ExpertStore& store, std::int64_t rows, std::int64_t top_k,
                  torch::Device device) {
  const ExpertBlobLayout& layout = store.layout();
  if (!device.is_cuda() || layout.dtype != torch::kBFloat16 || a.expert_bias || a.swiglu_limit ||
      a.hidden_size % 8 != 0 || a.expert_intermediate_size % 8 != 0 || rows > kDecodeMaxTokens ||
      top_k > kDecodeMaxTopK) {
    return false;
  }
  const ExpertBlob blob = blob_of(a, store, rows, top_k);
  if (store.format() != ExpertFormat::kBfloat16) {
    return layout.bytes == blob.bytes;
  }
  return layout.parts.size() == 3 && layout.bytes == blob.bytes && layout.parts[0].offset == blob.gate &&
         layout.parts[1].offset == blob.up && layout.parts[2].offset == blob.down;
}

std::optional<SlotCacheShape> cache_shape(const Architecture& a, std::int64_t rows, std::int64_t top_k,
                                          const std::optional<SlotCacheOptions>& options) {
  if (!options) {
    return std::nullopt;
  }
  SlotCacheShape shape;
  shape.num_layers = static_cast<std::int64_t>(a.moe_layers().size());
  shape.num_experts = a.num_experts;
  const bool pool = options->slots.per_layer == 0;
  shape.slots = pool ? options->slots.pool : options->slots.per_layer;
  shape.layers_per_group = pool ? shape.num_layers : 1;
  shape.policy = options->policy;
  shape.gamma = options->gamma;
  shape.stress = options->stress;
  shape.scratch_slots = may_pass_by(a, rows * top_k, *options) ? scratch_slots(a, rows * top_k) : 0;
  check_slot_cache(shape);
  return shape;
}

}  // namespace

struct SlotExecutor::Impl {
  Impl(const Architecture& of, ExpertStore from, torch::Device on, std::int64_t most_rows,
       std::int64_t experts_per_token, const std::optional<SlotCacheOptions>& cache)
      : architecture(of),
        store(std::move(from)),
        device(on),
        rows(most_rows),
        top_k(experts_per_token),
        shape(cache_shape(of, most_rows, experts_per_token, cache)),
        seed(cache ? cache->seed : 0),
        moe_layers(of.moe_layers()) {}

  Architecture architecture;
  ExpertStore store;
  torch::Device device;
  std::int64_t rows;
  std::int64_t top_k;
  std::optional<SlotCacheShape> shape;
  std::uint64_t seed;
  FetchPath fetch_path = FetchPath::kWaves;
  std::vector<std::int64_t> moe_layers;

  Tensor slots_SB;  // uint8 [slots, bytes]: on a GPU its own memory, on the CPU with all resident the store's
  ExpertWeights slots;
  std::unique_ptr<UnpackedExperts> unpacked;  // of packed slots, where the kernels do not take them
  bool kernels = false;
  ExpertBlob as_kernels;  // an expert as they take it
  bool early = false;
  Tensor hidden_TKF, product_TKD;  // of the decode kernels
  Tensor fetch_workspace;
  Tensor wave_flags;                       // int32 [E], the host thread's answers where waves are asked for
  Tensor prefetch_state, prefetch_places;  // PrefetchState and two blobs; undefined: nothing is prefetched
  std::unique_ptr<CopyProxy> proxy;        // behind the memory that it writes
  bool asks = false;                       // the proxy is awake
  bool in_one = false;                     // one kernel can serve, fetch and multiply
  std::int64_t copied_before = 0;          // bytes of guesses, at the reset
  std::int64_t useful_before = 0;
  Tensor misses_read;  // of kStaged: the step and its loads, in pinned memory

  // The cache, on the device.
  Tensor cache_memory, step_memory, loads_memory, slots_TK, waves_TK, wave_slots, resident_LE;
  SlotCacheState state;
  std::int64_t max_waves = 1;
  // Hits compute on the current stream while the first wave of misses is copied on this one.
  std::optional<c10::cuda::CUDAStream> side;
  at::cuda::CUDAEvent served, fetched;

  [[nodiscard]] void* stream() const { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }
  [[nodiscard]] std::int64_t groups() const { return shape->num_layers / shape->layers_per_group; }
  [[nodiscard]] ExpertStoreShape store_shape() const {
    return {shape->num_layers, shape->num_experts, store.layout().bytes};
  }
  [[nodiscard]] SlotCacheAnswer answer() const {
    return {as<SlotCacheStep>(step_memory), as<SlotCacheLoad>(loads_memory), slots_TK.data_ptr<std::int32_t>(),
            waves_TK.data_ptr<std::int32_t>(), wave_slots.data_ptr<std::int32_t>()};
  }

  // `on`: the stream, on a GPU.
  void copy_blob(std::int64_t blob, std::int64_t slot, void* on) {
    const auto bytes = static_cast<std::size_t>(store.layout().bytes);
    std::uint8_t* to = slots_SB.mutable_data_ptr<std::uint8_t>() + static_cast<std::size_t>(slot) * bytes;
    if (device.is_cuda()) {
      store.copy_to_device(blob, 1, to, on);
    } else {
      std::memcpy(to, store.blobs().const_data_ptr<std::uint8_t>() + static_cast<std::size_t>(blob) * bytes, bytes);
    }
  }

  // Brings into the slots what the tables say that they hold.
  void fill() {
    const Tensor keys = torch::from_blob(state.key_of, {groups() * shape->slots},
                                         torch::TensorOptions().dtype(torch::kInt32).device(device))
                            .cpu();
    const auto* key = keys.const_data_ptr<std::int32_t>();
    for (std::int64_t slot = 0; slot < keys.size(0); ++slot) {
      if (key[slot] >= 0) {
        const std::int64_t first_layer = slot / shape->slots * shape->layers_per_group;
        copy_blob(first_layer * shape->num_experts + key[slot], slot, device.is_cuda() ? stream() : nullptr);
      }
    }
    if (device.is_cuda()) {
      c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
    }
  }

  // w times y summed over k in order.
  static Tensor combined(const Tensor& y_TKD, const Tensor& weights_TK, torch::Dtype dtype) {
    const Tensor weight = weights_TK.to(y_TKD.scalar_type()).unsqueeze(2);
    Tensor sum = y_TKD.select(1, 0) * weight.select(1, 0);
    for (std::int64_t k = 1; k < y_TKD.size(1); ++k) {
      sum = sum + y_TKD.select(1, k) * weight.select(1, k);
    }
    return sum.to(dtype);
  }

  // down(gated(gate x, up x)) of one token for the experts in slots [n] -> [n, D], rounded to the model's dtype.
  [[nodiscard]] Tensor expert_rows(const ExpertWeights& how, const Tensor& x_D, const Tensor& slot_N) const {
    const std::int64_t count = slot_N.size(0);
    const ExpertWeights& from = unpacked ? unpacked->listed(slots_SB, slot_N) : slots;
    const auto product = [&](const Tensor& weights, const Tensor& bias, const Tensor& in_NI1) {
      const Tensor out = (unpacked ? weights : weights.index_select(0, slot_N)).bmm(in_NI1).squeeze(2);
      return bias.defined() ? out + bias.index_select(0, slot_N) : out;
    };
    const Tensor x_ND1 = x_D.view({1, -1, 1}).expand({count, -1, 1});
    const Tensor hidden = gated_activation(how, product(from.gate_EFD, from.gate_bias_EF, x_ND1),
                                           product(from.up_EFD, from.up_bias_EF, x_ND1));
    return product(from.down_EDF, from.down_bias_ED, hidden.unsqueeze(2));
  }

  // The same of one expert, on the CPU, without a copy of its weights.
  [[nodiscard]] Tensor expert_row(const ExpertWeights& how, const Tensor& x_1D, std::int64_t slot) const {
    const ExpertWeights& from = unpacked ? unpacked->consecutive(slots_SB, slot) : slots;
    const std::int64_t at = unpacked ? 0 : slot;
    const auto product = [&](const Tensor& weights, const Tensor& bias, const Tensor& in) {
      return at::linear(in, weights.select(0, at), bias.defined() ? bias.select(0, at) : Tensor());
    };
    const Tensor hidden = gated_activation(how, product(from.gate_EFD, from.gate_bias_EF, x_1D),
                                           product(from.up_EFD, from.up_bias_EF, x_1D));
    return product(from.down_EDF, from.down_bias_ED, hidden);
  }

  template <class Index>
  void serve(const Index* selected, std::int64_t tokens, std::int64_t moe_layer) {
    if (device.is_cuda()) {
      slot_cache_serve_cuda(*shape, state, moe_layer, selected, tokens, top_k, answer(), stream());
    } else {
      slot_cache_serve_cpu(*shape, state, moe_layer, selected, tokens, top_k, answer());
    }
  }

  // Whether misses may arrive while hits compute, whatever the routing is.
  [[nodiscard]] bool overlaps(std::int64_t tokens) const {
    return shape->policy != CachePolicyKind::kStatic && std::min(tokens * top_k, shape->num_experts) <= shape->slots;
  }

  [[nodiscard]] Tensor run_cpu(const ExpertWeights& how, const Tensor& x_TD, const Tensor& selected_TK,
                               const Tensor& weights_TK, std::int64_t moe_layer) {
    const std::int64_t tokens = x_TD.size(0);
    const bool wide = x_TD.scalar_type() == torch::kFloat64;
    Tensor y_TKD = torch::empty({tokens, top_k, x_TD.size(1)}, wide ? torch::kFloat64 : torch::kFloat32);
    const auto compute = [&](std::int64_t wave, auto slot_of) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t k = 0; k < top_k; ++k) {
          if (const std::int64_t slot = slot_of(t * top_k + k, wave); slot >= 0) {
            y_TKD[t][k].copy_(expert_row(how, x_TD.narrow(0, t, 1), slot)[0]);
          }
        }
      }
    };
    if (!shape) {
      const auto* ids = selected_TK.const_data_ptr<std::int64_t>();
      compute(0, [&](std::int64_t i, std::int64_t /*wave*/) { return moe_layer * architecture.num_experts + ids[i]; });
      return combined(y_TKD, weights_TK, x_TD.scalar_type());
    }
    serve(selected_TK.const_data_ptr<std::int64_t>(), tokens, moe_layer);
    const SlotCacheAnswer said = answer();
    for (std::int64_t wave = 0; wave < said.step->waves; ++wave) {
      if (wave > 0) {
        expert_fetch_cpu(store_shape(), store.blobs().const_data_ptr(), moe_layer, said.step, said.loads, wave,
                         slots_SB.mutable_data_ptr());
      }
      compute(wave, [&](std::int64_t i, std::int64_t now) { return said.waves[i] == now ? said.slots[i] : -1; });
    }
    return combined(y_TKD, weights_TK, x_TD.scalar_type());
  }

  // Serves a step and calls compute(int32 [T, K], the slots of the wave, -1 elsewhere; whether it is the last) for
  // every wave that there can be.
  template <class Index, class Compute>
  void in_waves(const Index* selected, std::int64_t tokens, std::int64_t moe_layer, Compute compute) {
    serve(selected, tokens, moe_layer);
    const SlotCacheAnswer said = answer();
    if (fetch_path == FetchPath::kStaged) {
      compute_staged(tokens, moe_layer, said, compute);
      return;
    }
    const auto fetch = [&](std::int64_t wave, void* on) {
      if (asks && !in_one) {
        expert_ask_cuda(store_shape(), moe_layer, said.step, said.loads, wave, copy_flags(), proxy->request(), on);
        return;
      }
      expert_fetch_cuda(store_shape(), store.device_data(), moe_layer, said.step, said.loads, wave,
                        slots_SB.mutable_data_ptr(), kExpertFetchBlocks, on);
    };
    const auto current = c10::cuda::getCurrentCUDAStream(device.index());
    const bool overlap = overlaps(tokens);
    if (overlap) {
      served.record(current);
      served.block(*side);
      fetch(1, side->stream());
      fetched.record(*side);
    }
    const std::int64_t waves = slot_cache_max_waves(*shape, tokens * top_k);
    for (std::int64_t wave = 0; wave < waves; ++wave) {
      if (wave == 1 && overlap) {
        fetched.block(current);
      } else if (wave > 0) {
        fetch(wave, current.stream());
      }
      compute(said.wave_slots + wave * tokens * top_k, wave + 1 == waves);
    }
  }

  // The waves of a step that has been served, of which the host reads what to copy.
  template <class Compute>
  void compute_staged(std::int64_t tokens, std::int64_t moe_layer, const SlotCacheAnswer& said, Compute compute) {
    const auto current = c10::cuda::getCurrentCUDAStream(device.index());
    const std::size_t list_bytes = loads_memory.nbytes();
    auto* const read = misses_read.mutable_data_ptr<std::uint8_t>();
    C10_CUDA_CHECK(cudaMemcpyAsync(read, said.step, sizeof(SlotCacheStep), cudaMemcpyDeviceToHost, current.stream()));
    C10_CUDA_CHECK(cudaMemcpyAsync(read + sizeof(SlotCacheStep), said.loads, list_bytes, cudaMemcpyDeviceToHost,
                                   current.stream()));
    current.synchronize();
    SlotCacheStep step;
    std::memcpy(&step, read, sizeof step);
    std::vector<SlotCacheLoad> loads(list_bytes / sizeof(SlotCacheLoad));
    std::memcpy(loads.data(), read + sizeof(SlotCacheStep), list_bytes);
    const auto fetch = [&](std::int64_t wave, void* on) {
      const std::int64_t last = std::min<std::int64_t>(step.loads, wave * step.wave_size);
      for (std::int64_t i = (wave - 1) * step.wave_size; i < last; ++i) {
        const SlotCacheLoad& load = loads[static_cast<std::size_t>(i)];
        copy_blob(moe_layer * shape->num_experts + load.expert, load.slot, on);
      }
    };
    const bool overlap = overlaps(tokens);
    const std::int64_t waves = slot_cache_max_waves(*shape, tokens * top_k);
    for (std::int64_t wave = 0; wave < waves; ++wave) {
      if (wave == 1 && overlap) {
        // Only now: the hits compute while the host copies.
        fetch(1, side->stream());
        fetched.record(*side);
        fetched.block(current);
      } else if (wave > 0) {
        fetch(wave, current.stream());
      }
      compute(said.wave_slots + wave * tokens * top_k, wave + 1 == waves);
    }
  }

  // The decode kernels of one wave; the last one writes out = residual + the mixed products.
  void wave_in_kernels(const DecodeExpertsShape& sizes, const std::uint16_t* x, const std::int32_t* slot,
                       const std::uint8_t* pool, bool last, const float* weights, const std::uint16_t* residual,
                       std::uint16_t* out) const {
    DecodeExpertsShape first = sizes;
    // Slots and weights of a wave are written by what comes just before it.
    first.dependent = sizes.dependent && !shape;
    decode_gate_up_cuda(first, x, slot, pool, mutable_bits(hidden_TKF), stream());
    if (last && sizes.num_tokens == 1) {
      decode_down_combine_cuda(sizes, bits(hidden_TKF), slot, pool, weights, product_TKD.const_data_ptr<float>(),
                               residual, out, stream());
      return;
    }
    decode_down_cuda(sizes, bits(hidden_TKF), slot, pool, product_TKD.mutable_data_ptr<float>(), stream());
    if (last) {
      decode_combine_cuda(sizes, product_TKD.const_data_ptr<float>(), weights, residual, out, stream());
    }
  }

  [[nodiscard]] bool fetches_in_one() const {
    return in_one && (fetch_path == FetchPath::kTogether || fetch_path == FetchPath::kCopies);
  }

  // Where the host thread says what it has copied.
  [[nodiscard]] std::uint32_t* copy_flags() {
    return in_one ? decode_fetch_flags(fetch_workspace.mutable_data_ptr())
                  : static_cast<std::uint32_t*>(wave_flags.mutable_data_ptr());
  }

  // The layer's step as the kernel takes it that serves, fetches and multiplies.
  [[nodiscard]] DecodeFetch fetch_of(const std::int32_t* selected, const std::int32_t* hit_slots,
                                     std::int64_t moe_layer) {
    DecodeFetch fetch{.cache = *shape,
                      .state = state,
                      .layer = moe_layer,
                      .selected = selected,
                      .hit_slots = hit_slots,
                      .store = store.device_data(),
                      .answer = answer(),
                      .workspace = fetch_workspace.data_ptr()};
    fetch.answer.wave_slots = nullptr;
    fetch.request = asks ? proxy->request() : nullptr;
    fetch.blob = as_kernels;
    if (prefetch_state.defined()) {
      fetch.prefetch = as<PrefetchState>(prefetch_state);
      fetch.staging =
          prefetch_places.const_data_ptr<std::uint8_t>() + static_cast<std::size_t>(moe_layer % 2) * as_kernels.bytes;
    }
    return fetch;
  }

  // Copies and computes a step of one token in two kernels, and serves it where the router has not.
  void run_together(const DecodeExpertsShape& sizes, const std::uint16_t* x, const std::int32_t* selected,
                    const std::int32_t* hit_slots, const float* weights, const std::uint16_t* residual,
                    std::uint16_t* out, std::int64_t moe_layer, std::span<const Tensor> ahead) {
    DecodeFetch fetch = fetch_of(selected, hit_slots, moe_layer);
    for (std::size_t i = 0; i < std::min(ahead.size(), kFetchAhead); ++i) {
      fetch.ahead[i] = {ahead[i].const_data_ptr(), ahead[i].nbytes()};
    }
    auto* const pool = slots_SB.mutable_data_ptr<std::uint8_t>();
    auto* const products = product_TKD.mutable_data_ptr<float>();
    decode_fetch_gate_up_cuda(sizes, fetch, x, pool, mutable_bits(hidden_TKF), products, stream());
    decode_down_combine_cuda(sizes, bits(hidden_TKF), fetch.answer.slots, pool, weights, products, residual, out,
                             stream(), hit_slots);
  }

  // hit_slots: null where nobody looked them up.
  void run_kernels(const Tensor& x_TD, const Tensor& selected_TK, const Tensor& weights_TK,
                   const std::int32_t* hit_slots, const std::uint16_t* residual, std::uint16_t* out,
                   std::int64_t moe_layer, std::span<const Tensor> ahead) {
    const std::int64_t tokens = x_TD.size(0);
    const DecodeExpertsShape sizes{.num_tokens = tokens,
                                   .top_k = top_k,
                                   .hidden_size = architecture.hidden_size,
                                   .expert_hidden_size = architecture.expert_intermediate_size,
                                   .format = store.format(),
                                   .dependent = early};
    const auto* selected = selected_TK.const_data_ptr<std::int32_t>();
    const auto* weights = weights_TK.const_data_ptr<float>();
    const auto* pool = slots_SB.const_data_ptr<std::uint8_t>();
    if (!shape) {
      const auto first = static_cast<std::size_t>(moe_layer * architecture.num_experts);
      wave_in_kernels(sizes, bits(x_TD), selected, pool + first * store.layout().bytes, true, weights, residual, out);
      return;
    }
    if (hit_slots != nullptr && fetches_in_one()) {
      run_together(sizes, bits(x_TD), selected, hit_slots, weights, residual, out, moe_layer, ahead);
      return;
    }
    in_waves(selected, tokens, moe_layer, [&](const std::int32_t* slot, bool last) {
      wave_in_kernels(sizes, bits(x_TD), slot, pool, last, weights, residual, out);
    });
  }

  [[nodiscard]] Tensor run_cuda(const ExpertWeights& how, const Tensor& x_TD, const Tensor& selected_TK,
                                const Tensor& weights_TK, std::int64_t moe_layer) {
    const std::int64_t tokens = x_TD.size(0);
    const auto accumulator = x_TD.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
    std::vector<Tensor> y_KD(static_cast<std::size_t>(tokens));
    const auto compute = [&](const Tensor& slot_TK) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        Tensor& y = y_KD[static_cast<std::size_t>(t)];
        const Tensor slot_K = slot_TK[t];
        const Tensor found = expert_rows(how, x_TD[t], slot_K.clamp_min(0)).to(accumulator);
        y = y.defined() ? torch::where(slot_K.ge(0).unsqueeze(1), found, y) : found;
      }
    };
    if (!shape) {
      compute(selected_TK.to(torch::kInt32) + moe_layer * architecture.num_experts);
    } else {
      in_waves(selected_TK.const_data_ptr<std::int64_t>(), tokens, moe_layer, [&](const std::int32_t* slot, bool) {
        compute(torch::from_blob(const_cast<std::int32_t*>(slot), {tokens, top_k}, slots_TK.options()));
      });
    }
    return combined(torch::stack(y_KD), weights_TK, x_TD.scalar_type());
  }
};

SlotExecutor::SlotExecutor(const Architecture& architecture, ExpertStore store, torch::Device device, std::int64_t rows,
                           std::int64_t top_k, const std::optional<SlotCacheOptions>& cache)
    : impl_(std::make_unique<Impl>(architecture, std::move(store), device, rows, top_k, cache)) {
  Impl& impl = *impl_;
  const ExpertBlobLayout& layout = impl.store.layout();
  if (device.is_cuda() && !impl.store.pinned() && impl.store.staging_bytes() == 0) {
    throw RunError("slot executor: experts come to the GPU out of pinned host memory, got a store that is not pinned");
  }
  if (!impl.shape && !device.is_cuda()) {
    impl.slots_SB = impl.store.blobs();
  } else {
    const std::int64_t count = impl.shape ? slot_cache_num_slots(*impl.shape) : impl.store.num_blobs();
    const std::int64_t bytes = count * static_cast<std::int64_t>(layout.bytes);
    try {
      impl.slots_SB = torch::zeros({count, static_cast<std::int64_t>(layout.bytes)},
                                   torch::TensorOptions().dtype(torch::kUInt8).device(device));
    } catch (const c10::OutOfMemoryError&) {
      throw RunError(fmt::format(
          "expert slots: the GPU has no memory for {} slots of {} each, got out of memory at {}; ask for "
          "fewer with --expert-slots",
          count, format_bytes(static_cast<double>(layout.bytes)), format_bytes(static_cast<double>(bytes))));
    }
    if (!impl.shape) {
      impl.store.copy_to_device(0, count, impl.slots_SB.mutable_data_ptr(), impl.stream());
      c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
    }
  }
  impl.kernels = kernels_take(architecture, impl.store, rows, top_k, device);
  if (impl.store.format() == ExpertFormat::kBfloat16) {
    impl.slots = experts_in_blobs(architecture, layout, impl.slots_SB);
  } else if (!impl.kernels) {
    impl.unpacked =
        std::make_unique<UnpackedExperts>(architecture, impl.store.format(), device.is_cuda() ? top_k : 1, device);
  }
  const auto options = torch::TensorOptions().device(device);
  if (impl.kernels) {
    impl.hidden_TKF =
        torch::zeros({rows, top_k, architecture.expert_intermediate_size}, options.dtype(torch::kBFloat16));
    impl.product_TKD = torch::zeros({rows, top_k, architecture.hidden_size}, options.dtype(torch::kFloat32));
    impl.fetch_workspace = device_bytes(decode_fetch_workspace(), device);
    impl.as_kernels = blob_of(architecture, impl.store, rows, top_k);
  }
  if (!impl.shape) {
    return;
  }
  impl.cache_memory = device_bytes(slot_cache_bytes(*impl.shape), device);
  impl.state = slot_cache_state(*impl.shape, impl.cache_memory.data_ptr());
  impl.step_memory = device_bytes(sizeof(SlotCacheStep), device);
  impl.loads_memory = device_bytes(
      sizeof(SlotCacheLoad) * static_cast<std::size_t>(std::min(architecture.num_experts, rows * top_k)), device);
  impl.slots_TK = torch::zeros({rows, top_k}, options.dtype(torch::kInt32));
  impl.waves_TK = torch::zeros({rows, top_k}, options.dtype(torch::kInt32));
  std::int64_t most = 0;  // fewer rows may need more of it, with fewer waves they do not
  for (std::int64_t tokens = 1; tokens <= rows; ++tokens) {
    most = std::max(most, slot_cache_max_waves(*impl.shape, tokens * top_k) * tokens * top_k);
  }
  impl.wave_slots = torch::zeros({most}, options.dtype(torch::kInt32));
  impl.resident_LE = torch::zeros({impl.shape->num_layers, architecture.num_experts}, options.dtype(torch::kUInt8));
  if (device.is_cuda() && (!impl.store.pinned() || cache->fetch == FetchPath::kStaged)) {
    if (cache->fetch != FetchPath::kAuto && cache->fetch != FetchPath::kStaged) {
      log_warning(
          fmt::format("--fetch {}: reads experts out of pinned memory, where {} of {} are; the host copies every miss",
                      fetch_path_name(cache->fetch), impl.store.pinned_blobs(), impl.store.num_blobs()));
    }
    impl.fetch_path = FetchPath::kStaged;
    impl.misses_read = torch::zeros({static_cast<std::int64_t>(sizeof(SlotCacheStep)) + impl.loads_memory.numel()},
                                    torch::TensorOptions().dtype(torch::kUInt8).pinned_memory(true));
  } else if (impl.kernels) {
    impl.in_one = rows == 1 && impl.overlaps(1);
    const FetchPath by_kernels = impl.in_one ? FetchPath::kTogether : FetchPath::kWaves;
    impl.fetch_path = cache->fetch;
    const bool prefetches = cache->prefetch != PrefetchKind::kOff && impl.in_one && impl.shape->layers_per_group == 1;
    if (impl.fetch_path == FetchPath::kAuto) {
      const bool copies = prefetches || static_cast<std::int64_t>(layout.bytes) >= kCopiedExpertBytes;
      impl.fetch_path = copies ? FetchPath::kCopies : by_kernels;
    } else if (impl.fetch_path == FetchPath::kTogether) {
      impl.fetch_path = by_kernels;
    }
    if (impl.fetch_path == FetchPath::kCopies) {
      if (!impl.in_one) {
        impl.wave_flags = torch::zeros({architecture.num_experts}, options.dtype(torch::kInt32));
      }
      std::optional<CopyStaging> staging;
      if (prefetches) {
        impl.prefetch_state = device_bytes(sizeof(PrefetchState), device);
        impl.prefetch_places = device_bytes(2 * impl.as_kernels.bytes, device);
        staging = {impl.prefetch_places.mutable_data_ptr<std::uint8_t>(),
                   as<PrefetchState>(impl.prefetch_state)->landed, architecture.num_experts};
      }
      try {
        impl.proxy = std::make_unique<CopyProxy>(impl.store, impl.slots_SB.mutable_data_ptr<std::uint8_t>(),
                                                 impl.copy_flags(), staging, device.index());
        if (!impl.in_one) {
          // Its first launch, of no step: none may come while kernels wait for the thread, nor in a capture.
          expert_ask_cuda(impl.store_shape(), 0, impl.answer().step, impl.answer().loads, 1, impl.copy_flags(),
                          impl.proxy->request(), impl.stream());
        }
      } catch (const RunError& error) {
        if (cache->fetch != FetchPath::kAuto) {
          throw;
        }
        log_warning(fmt::format("{}; kernels fetch the misses themselves", error.what()));
        impl.fetch_path = by_kernels;
        impl.prefetch_state = Tensor();
        impl.prefetch_places = Tensor();
      }
    }
  }
  if (device.is_cuda()) {
    impl.side = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index());
  }
  reset(0);
}

SlotExecutor::~SlotExecutor() = default;

torch::Tensor SlotExecutor::run(const ExpertWeights& experts, const torch::Tensor& x_TD,
                                const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                                std::int64_t moe_layer) {
  const torch::NoGradGuard no_grad;
  Impl& impl = *impl_;
  const std::int64_t tokens = x_TD.size(0);
  if (tokens < 1 || tokens > impl.rows || selected_TK.dim() != 2 || selected_TK.size(0) != tokens ||
      selected_TK.size(1) != impl.top_k || weights_TK.sizes() != selected_TK.sizes() ||
      x_TD.size(1) != impl.architecture.hidden_size) {
    throw std::invalid_argument(fmt::format("slot executor: steps have up to {} rows of {} experts, got {} of {}",
                                            impl.rows, impl.top_k, tokens, selected_TK.size(-1)));
  }
  if (experts.adapters.defined()) {
    throw std::invalid_argument("slot executor: adapters must be merged into the store before decoding");
  }
  const Tensor selected = selected_TK.contiguous();
  const Tensor x = x_TD.contiguous();
  if (!impl.device.is_cuda()) {
    return impl.run_cpu(experts, x, selected, weights_TK, moe_layer);
  }
  if (!impl.kernels) {
    return impl.run_cuda(experts, x, selected, weights_TK, moe_layer);
  }
  Tensor out_TD = torch::empty_like(x);
  impl.run_kernels(x, selected.to(torch::kInt32), weights_TK.to(torch::kFloat32).contiguous(), nullptr, nullptr,
                   mutable_bits(out_TD), moe_layer, {});
  return out_TD;
}

bool SlotExecutor::runs_kernels() const noexcept {
  return impl_->kernels;
}

void SlotExecutor::start_early(bool allowed) {
  impl_->early = allowed;
}

const std::int32_t* SlotExecutor::slot_of(std::int64_t moe_layer) const {
  return impl_->shape ? impl_->state.slot_of + moe_layer * impl_->shape->num_experts : nullptr;
}

std::optional<DecodeFetch> SlotExecutor::router_fetch(const torch::Tensor& selected_TK,
                                                      const torch::Tensor& hit_slots_TK, std::int64_t moe_layer) {
  if (!impl_->shape || !impl_->kernels || !impl_->fetches_in_one()) {
    return std::nullopt;
  }
  return impl_->fetch_of(selected_TK.const_data_ptr<std::int32_t>(), hit_slots_TK.const_data_ptr<std::int32_t>(),
                         moe_layer);
}

std::optional<DecodeGuess> SlotExecutor::router_guess(std::int64_t moe_layer) const {
  const Impl& impl = *impl_;
  if (!impl.prefetch_state.defined()) {
    return std::nullopt;
  }
  return DecodeGuess{.slot_of = slot_of(moe_layer),
                     .layer = moe_layer,
                     .state = as<PrefetchState>(impl.prefetch_state),
                     .request = impl.asks ? impl.proxy->request() : nullptr};
}

void SlotExecutor::decode(const torch::Tensor& x_TD, const torch::Tensor& selected_TK, const torch::Tensor& weights_TK,
                          const torch::Tensor& hit_slots_TK, const torch::Tensor& out_TD, std::int64_t moe_layer,
                          std::span<const torch::Tensor> ahead) {
  if (!impl_->kernels) {
    throw std::logic_error("slot executor: the decode kernels do not take these experts");
  }
  impl_->run_kernels(x_TD, selected_TK, weights_TK, hit_slots_TK.const_data_ptr<std::int32_t>(), bits(out_TD),
                     mutable_bits(out_TD), moe_layer, ahead);
}

bool SlotExecutor::fetches_in_one() const noexcept {
  return impl_->fetches_in_one();
}

std::int64_t SlotExecutor::copy_requests() const noexcept {
  return impl_->proxy ? impl_->proxy->requests() : 0;
}

FetchPath SlotExecutor::fetch_path() const noexcept {
  return impl_->fetch_path;
}

void SlotExecutor::wake_copies() {
  if (impl_->proxy && !impl_->asks) {
    impl_->proxy->wake();
    impl_->asks = true;
  }
}

void SlotExecutor::rest_copies() {
  if (impl_->asks) {
    impl_->asks = false;
    impl_->proxy->rest();
  }
}

void SlotExecutor::reset(std::int64_t sequence, const std::vector<std::vector<std::uint16_t>>& preload) {
  Impl& impl = *impl_;
  if (!impl.shape) {
    return;
  }
  for (Tensor* counters : {&impl.fetch_workspace, &impl.wave_flags}) {
    if (counters->defined()) {
      counters->zero_();  // as they are, unless a step was cut off
    }
  }
  if (impl.prefetch_state.defined()) {
    constexpr auto kKept = static_cast<std::int64_t>(offsetof(PrefetchState, met));  // what the host thread knows, too
    impl.prefetch_state.narrow(0, kKept, impl.prefetch_state.numel() - kKept).zero_();
    impl.copied_before = impl.proxy->guessed_bytes();
    impl.useful_before = impl.proxy->useful_bytes();
  }
  const SlotCacheShape& shape = *impl.shape;
  const std::int64_t groups = impl.groups();
  std::vector<std::uint64_t> seeds;
  for (std::int64_t group = 0; group < groups; ++group) {
    const auto layer = impl.moe_layers.at(static_cast<std::size_t>(group * shape.layers_per_group));
    seeds.push_back(victim_seed(impl.seed, layer, sequence));
  }
  std::int64_t count = 0;
  std::vector<std::int32_t> keys;
  if (!preload.empty()) {
    if (static_cast<std::int64_t>(preload.size()) != shape.num_layers) {
      throw std::invalid_argument(
          fmt::format("slot executor: a preload lists experts of {} layers, got {}", shape.num_layers, preload.size()));
    }
    std::size_t longest = 0;
    for (const auto& list : preload) {
      longest = std::max(longest, list.size());
    }
    count = static_cast<std::int64_t>(longest) * shape.layers_per_group;
    for (std::int64_t group = 0; group < groups; ++group) {
      std::vector<std::int32_t> of_group;
      for (std::size_t rank = 0; rank < longest; ++rank) {
        for (std::int64_t in_group = 0; in_group < shape.layers_per_group; ++in_group) {
          const auto& list = preload[static_cast<std::size_t>(group * shape.layers_per_group + in_group)];
          if (rank < list.size()) {
            of_group.push_back(static_cast<std::int32_t>(in_group * shape.num_experts + list[rank]));
          }
        }
      }
      of_group.resize(static_cast<std::size_t>(count), -1);
      keys.insert(keys.end(), of_group.begin(), of_group.end());
    }
  }
  if (impl.device.is_cuda()) {
    // Copies that the current stream waits for: its memory may still be in use there.
    const Tensor seed_memory =
        torch::from_blob(seeds.data(), {groups}, torch::kInt64).to(impl.device, /*non_blocking=*/false, /*copy=*/true);
    const Tensor key_memory =
        torch::from_blob(keys.data(), {static_cast<std::int64_t>(keys.size())}, torch::kInt32).to(impl.device);
    slot_cache_reset_cuda(shape, impl.state, keys.empty() ? nullptr : as<std::int32_t>(key_memory), count,
                          as<std::uint64_t>(seed_memory), impl.stream());
    c10::cuda::getCurrentCUDAStream(impl.device.index()).synchronize();
  } else {
    slot_cache_reset_cpu(shape, impl.state, keys.empty() ? nullptr : keys.data(), count, seeds.data());
  }
  impl.fill();
}

void SlotExecutor::touch(const std::vector<torch::Tensor>& selected_SRK) {
  Impl& impl = *impl_;
  if (!impl.shape) {
    return;
  }
  if (static_cast<std::int64_t>(selected_SRK.size()) != impl.shape->num_layers) {
    throw std::invalid_argument(fmt::format("slot executor: a prompt routes in {} layers, got {}",
                                            impl.shape->num_layers, selected_SRK.size()));
  }
  for (std::size_t layer = 0; layer < selected_SRK.size(); ++layer) {
    const Tensor selected = selected_SRK[layer].to(impl.device).contiguous();
    const auto* ids = selected.const_data_ptr<std::int64_t>();
    const auto moe_layer = static_cast<std::int64_t>(layer);
    if (impl.device.is_cuda()) {
      slot_cache_touch_cuda(*impl.shape, impl.state, moe_layer, ids, selected.size(0), selected.size(1),
                            selected.size(2), impl.stream());
    } else {
      slot_cache_touch_cpu(*impl.shape, impl.state, moe_layer, ids, selected.size(0), selected.size(1),
                           selected.size(2));
    }
  }
  impl.fill();
}

torch::Tensor SlotExecutor::resident(std::int64_t moe_layer) {
  Impl& impl = *impl_;
  if (!impl.shape) {
    return {};
  }
  Tensor mask = impl.resident_LE[moe_layer];
  if (impl.device.is_cuda()) {
    slot_cache_mask_cuda(*impl.shape, impl.state, moe_layer, mask.data_ptr<std::uint8_t>(), impl.stream());
  } else {
    slot_cache_mask_cpu(*impl.shape, impl.state, moe_layer, mask.data_ptr<std::uint8_t>());
  }
  return mask;
}

std::vector<SlotCacheCounts> SlotExecutor::counts() const {
  const Impl& impl = *impl_;
  if (!impl.shape) {
    return {};
  }
  std::vector<SlotCacheCounts> counts(static_cast<std::size_t>(impl.shape->num_layers));
  const std::size_t bytes = counts.size() * sizeof(SlotCacheCounts);
  if (impl.device.is_cuda()) {
    c10::cuda::getCurrentCUDAStream(impl.device.index()).synchronize();
    C10_CUDA_CHECK(cudaMemcpy(counts.data(), impl.state.counts, bytes, cudaMemcpyDeviceToHost));
  } else {
    std::memcpy(counts.data(), impl.state.counts, bytes);
  }
  return counts;
}

PrefetchKind SlotExecutor::prefetch() const noexcept {
  return impl_->prefetch_state.defined() ? PrefetchKind::kNextGate : PrefetchKind::kOff;
}

PrefetchTotals SlotExecutor::prefetch_totals() const {
  const Impl& impl = *impl_;
  if (!impl.prefetch_state.defined()) {
    return {};
  }
  c10::cuda::getCurrentCUDAStream(impl.device.index()).synchronize();
  PrefetchState state;
  C10_CUDA_CHECK(cudaMemcpy(&state, impl.prefetch_state.const_data_ptr(), sizeof state, cudaMemcpyDeviceToHost));
  return {state.counts, impl.proxy->guessed_bytes() - impl.copied_before,
          impl.proxy->useful_bytes() - impl.useful_before};
}

std::int64_t SlotExecutor::num_slots() const noexcept {
  return impl_->shape ? impl_->shape->slots : impl_->architecture.num_experts;
}

std::int64_t SlotExecutor::slot_bytes() const noexcept {
  return impl_->shape || impl_->device.is_cuda() ? impl_->slots_SB.numel() : 0;
}

bool SlotExecutor::all_resident() const noexcept {
  return !impl_->shape;
}

const torch::Tensor& SlotExecutor::memory() const noexcept {
  return impl_->slots_SB;
}

const ExpertWeights& SlotExecutor::slots() const noexcept {
  return impl_->slots;
}

}  // namespace hestia
