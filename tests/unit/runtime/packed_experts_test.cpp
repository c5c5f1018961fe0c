#include <cmath>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/runtime/decoder.hpp"
#include "tests/unit/model/model_fixtures.hpp"

using namespace hestia;
using namespace hestia::testing;
using torch::Tensor;

namespace {

const std::vector<ExpertFormat> kIntegers = {ExpertFormat::kInt8, ExpertFormat::kInt4, ExpertFormat::kInt4Asymmetric};
const torch::Device kCpu(torch::kCPU);
const torch::Device kGpu(torch::kCUDA, 0);

bool gpu_ready() {
  if (!torch::hasCUDA()) {
    WARN("SKIPPED: needs a GPU");
    return false;
  }
  return true;
}

// Groups with a tail and tiles with a tail.
Architecture odd_architecture() {
  Architecture a = small_architecture();
  a.hidden_size = 136;
  a.expert_intermediate_size = 24;
  a.initializer_range = 0.08;
  return a;
}

DecodeExpertsShape shape_of(const Architecture& a, ExpertFormat format) {
  return {.num_tokens = 1,
          .top_k = 1,
          .hidden_size = a.hidden_size,
          .expert_hidden_size = a.expert_intermediate_size,
          .format = format};
}

OffloadedModel create(const Architecture& a, ExpertFormat format, torch::Device device = kCpu) {
  return create_offloaded(a, torch::kBFloat16, device, 31, /*quiet=*/true, format);
}

// Weights of blob `blob`, float32 [3 * F * H].
Tensor weights_of(const Architecture& a, const ExpertStore& store, std::int64_t blob) {
  const std::int64_t size = a.hidden_size * a.expert_intermediate_size;
  Tensor weights = torch::empty({3 * size});
  auto* const at = weights.mutable_data_ptr<float>();
  dequantise_expert(shape_of(a, store.format()), store.blobs()[blob].const_data_ptr(), at, at + size, at + 2 * size);
  return weights;
}

double square_error(const Tensor& found, const Tensor& expected) {
  return normalised_square_error(found, expected);
}

struct Decoded {
  Tensor first, tokens, logits;
};

Decoded decode(const OffloadedModel& offloaded, std::int64_t rows, std::int64_t steps, std::int64_t slots) {
  const Architecture& a = offloaded.model->architecture();
  DecoderOptions options;
  options.rows = rows;
  options.capacity = 6 + steps;
  if (slots > 0) {
    options.cache.emplace();
    options.cache->slots.per_layer = slots;
  }
  Decoder decoder(offloaded, options);
  decoder.begin(random_integers(a.vocab_size, {rows, 5}, 32));
  const Tensor first = decoder.logits().clone();
  decoder.decode(steps);
  return {first, decoder.tokens(), decoder.logits().clone()};
}

// A store of bfloat16 with the rounded weights of a packed one.
OffloadedModel rounded(const Architecture& a, ExpertFormat format, torch::Device device) {
  const OffloadedModel packed = create(a, format);
  return create_offloaded(a, torch::kBFloat16, device, 31, true, ExpertFormat::kBfloat16, [&](OffloadedModel& model) {
    for (std::int64_t blob = 0; blob < model.store.num_blobs(); ++blob) {
      const Tensor weights = weights_of(a, packed.store, blob).to(torch::kBFloat16);
      model.store.blobs()[blob].copy_(weights.view(torch::kUInt8));
    }
  });
}

}  // namespace

TEST_CASE("a packed store holds what quantise_expert makes of the model's weights, and says what that lost") {
  for (const Architecture& a : {small_architecture(), odd_architecture(), mixed_architecture()}) {
    const OffloadedModel plain = create(a, ExpertFormat::kBfloat16);
    CHECK(plain.store.format() == ExpertFormat::kBfloat16);
    CHECK(plain.store.errors().empty());
    for (const ExpertFormat format : kIntegers) {
      CAPTURE(a.family, a.hidden_size, expert_format_name(format));
      const OffloadedModel packed = create(a, format);
      CHECK(packed.store.format() == format);
      REQUIRE(packed.store.num_blobs() == plain.store.num_blobs());
      CHECK(packed.store.layout().bytes == expert_blob(shape_of(a, format)).bytes);
      CHECK(stored_expert_bytes(a, torch::kBFloat16, format) == static_cast<std::int64_t>(packed.store.layout().bytes));
      const std::vector<ExpertError>& errors = packed.store.errors();
      REQUIRE(errors.size() == a.moe_layers().size());
      const std::int64_t size = a.hidden_size * a.expert_intermediate_size;
      for (std::size_t layer = 0; layer < errors.size(); ++layer) {
        double gate = 0.0;
        double up = 0.0;
        double down = 0.0;
        for (std::int64_t expert = 0; expert < a.num_experts; ++expert) {
          const std::int64_t blob = static_cast<std::int64_t>(layer) * a.num_experts + expert;
          const Tensor found = weights_of(a, packed.store, blob);
          const Tensor weights = weights_of(a, plain.store, blob);
          gate += square_error(found.narrow(0, 0, size), weights.narrow(0, 0, size));
          up += square_error(found.narrow(0, size, size), weights.narrow(0, size, size));
          down += square_error(found.narrow(0, 2 * size, size), weights.narrow(0, 2 * size, size));
        }
        const auto experts = static_cast<double>(a.num_experts);
        CHECK(errors[layer].gate == Approx(gate / experts));
        CHECK(errors[layer].up == Approx(up / experts));
        CHECK(errors[layer].down == Approx(down / experts));
        CHECK(errors[layer].gate > 0.0);
      }
    }
  }
}

TEST_CASE("a packed model keeps no second copy of its experts, and does not run by itself unnoticed") {
  const Architecture a = small_architecture();
  OffloadedModel packed = create(a, ExpertFormat::kInt4);
  bool seen = false;
  for (const auto& [name, tensor] : packed.model->named_tensors()) {
    if (name.find("experts") != std::string::npos) {
      seen = true;
      CHECK(tensor.isnan().all().item<bool>());
      CHECK(tensor.storage().nbytes() == sizeof(std::uint16_t));
    } else {
      CHECK_FALSE(tensor.isnan().any().item<bool>());
    }
  }
  CHECK(seen);
}

TEST_CASE("a decoder of packed experts is one of the weights that they stand for") {
  for (const Architecture& a : {small_architecture(), odd_architecture(), mixed_architecture()}) {
    for (const ExpertFormat format : kIntegers) {
      CAPTURE(a.family, a.hidden_size, expert_format_name(format));
      const OffloadedModel packed = create(a, format);
      const OffloadedModel expected_model = rounded(a, format, kCpu);
      for (const std::int64_t slots : {0, 2}) {
        const Decoded found = decode(packed, 2, 9, slots);
        const Decoded expected = decode(expected_model, 2, 9, slots);
        CHECK(found.first.equal(expected.first));
        CHECK(found.tokens.equal(expected.tokens));
        CHECK(found.logits.equal(expected.logits));
      }
    }
  }
}

TEST_CASE("on the GPU, a decoder of packed experts is one of the weights that they stand for", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  Architecture a = odd_architecture();
  // Kernels do not round the weights, which may choose another expert: with all of them chosen there is none.
  a.top_k = a.num_experts;
  for (const ExpertFormat format : kIntegers) {
    CAPTURE(expert_format_name(format));
    const OffloadedModel packed = create(a, format, kGpu);
    const OffloadedModel expected_model = rounded(a, format, kGpu);
    for (const std::int64_t slots : {0, 2}) {
      // The prompt is served by the same bits, the first step by kernels.
      const Decoded found = decode(packed, 2, 1, slots);
      const Decoded expected = decode(expected_model, 2, 1, slots);
      CHECK(found.first.equal(expected.first));
      CHECK(found.tokens.narrow(1, 0, 1).equal(expected.tokens.narrow(1, 0, 1)));
      CHECK(square_error(found.logits, expected.logits) < 2e-3);
    }
  }
}

TEST_CASE("on the GPU, packed experts decode where the kernels do not take them", "[gpu]") {
  if (!gpu_ready()) {
    return;
  }
  Architecture a = odd_architecture();
  a.num_experts = 36;
  a.top_k = 34;  // more than the kernels take
  for (const ExpertFormat format : kIntegers) {
    CAPTURE(expert_format_name(format));
    const OffloadedModel packed = create(a, format, kGpu);
    const Decoded all = decode(packed, 2, 4, 0);
    const Decoded few = decode(packed, 2, 4, 5);
    CHECK(few.tokens.equal(all.tokens));
    CHECK(few.logits.equal(all.logits));
    const Decoded expected = decode(rounded(a, format, kGpu), 2, 4, 5);
    CHECK(few.first.equal(expected.first));
    CHECK(few.tokens.equal(expected.tokens));
    CHECK(square_error(few.logits, expected.logits) < 1e-4);
  }
}

TEST_CASE("logits of packed experts are as near those of bfloat16 as the bits allow") {
  Architecture a = odd_architecture();
  a.top_k = a.num_experts;  // no choice that could change
  const Decoded plain = decode(create(a, ExpertFormat::kBfloat16), 3, 1, 2);
  const auto error = [&](ExpertFormat format) {
    return square_error(decode(create(a, format), 3, 1, 2).first, plain.first);
  };
  const double int8 = error(ExpertFormat::kInt8);
  const double int4 = error(ExpertFormat::kInt4);
  CHECK(int8 > 0.0);
  CHECK(int8 < 1e-3);
  CHECK(int4 > 4 * int8);
  CHECK(int4 < 5e-2);
  CHECK(error(ExpertFormat::kInt4Asymmetric) < 5e-2);
}

TEST_CASE("what cannot be packed is refused before weights are read, with the reason") {
  const auto complains = [](const Architecture& a, torch::Dtype dtype, const std::vector<std::string>& parts) {
    for (const ExpertFormat format : kIntegers) {
      CHECK_NOTHROW(stored_expert_bytes(a, dtype, ExpertFormat::kBfloat16));
      CHECK_THROWS_AS(stored_expert_bytes(a, dtype, format), UsageError);
      CHECK_THROWS_AS(create_offloaded(a, dtype, kCpu, 1, true, format), UsageError);
      for (const std::string& part : parts) {
        CHECK_THROWS_WITH(stored_expert_bytes(a, dtype, format), Catch::Contains(part));
      }
      CHECK_THROWS_WITH(stored_expert_bytes(a, dtype, format),
                        Catch::Contains(std::string(expert_format_name(format))));
    }
  };
  complains(gpt_oss_architecture(), torch::kBFloat16, {"biases", "gpt_oss", "use bf16"});
  complains(small_architecture(), torch::kFloat32, {"a model of float32", "dtype bfloat16"});
  Architecture a = small_architecture();
  a.hidden_size = 20;
  complains(a, torch::kBFloat16, {"multiples of 8", "hidden size of 20"});
  a.hidden_size = 16;
  a.expert_intermediate_size = 12;
  complains(a, torch::kBFloat16, {"multiples of 8", "hidden size of 12"});
  const OffloadedModel packed = create(small_architecture(), ExpertFormat::kInt8);
  CHECK_THROWS_AS(ExpertStore::packed(small_architecture(), packed.store, ExpertFormat::kInt8), std::invalid_argument);
}

TEST_CASE("a weight that is not finite is named with its layer and expert") {
  const Architecture a = mixed_architecture();  // layers 0 and 2 have experts
  const auto break_one = [&](OffloadedModel& offloaded) {
    Tensor blob = offloaded.store.blobs()[a.num_experts + 4].view(torch::kBFloat16);
    blob[a.hidden_size * a.expert_intermediate_size + 3] = std::numeric_limits<float>::infinity();
  };
  const auto pack = [&] {
    return create_offloaded(a, torch::kBFloat16, kCpu, 1, true, ExpertFormat::kInt4, break_one);
  };
  CHECK_THROWS_AS(pack(), InputError);
  CHECK_THROWS_WITH(pack(), Catch::Contains("layer 2, expert 4") && Catch::Contains("up holds") &&
                                Catch::Contains("row 0, column 3"));
}

TEST_CASE("adapters are merged before experts are packed, not after") {
  const torch::NoGradGuard no_grad;
  const Architecture a = small_architecture();
  const auto add = [](OffloadedModel& offloaded) {
    offloaded.model->add_adapters({.rank = 2, .alpha = 3.0});
    std::uint64_t seed = 90;
    for (Tensor& adapter : offloaded.model->adapters()) {
      adapter.copy_(random_normal(adapter.sizes(), seed++).mul(0.2));
    }
  };
  const auto add_and_merge = [&](OffloadedModel& offloaded) {
    add(offloaded);
    merge_adapters(offloaded);
  };
  const OffloadedModel merged =
      create_offloaded(a, torch::kBFloat16, kCpu, 31, true, ExpertFormat::kInt8, add_and_merge);
  CHECK_FALSE(merged.model->adapter_settings());
  const OffloadedModel expected =
      create_offloaded(a, torch::kBFloat16, kCpu, 31, true, ExpertFormat::kBfloat16, add_and_merge);
  const OffloadedModel base = create(a, ExpertFormat::kBfloat16);
  const Tensor weights = weights_of(a, merged.store, 7);
  CHECK(square_error(weights, weights_of(a, expected.store, 7)) < 1e-4);
  CHECK(square_error(weights, weights_of(a, base.store, 7)) > 1e-2);
  OffloadedModel late = create(a, ExpertFormat::kInt8);
  add(late);
  CHECK_THROWS_AS(merge_adapters(late), std::invalid_argument);
}
