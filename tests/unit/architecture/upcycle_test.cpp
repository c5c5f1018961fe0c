#include "hestia/architecture/upcycle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "gguf_writer.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/float_bits.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/random.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using testing::GgufWriter;

std::vector<float> random_values(SplitMix64& random, std::size_t count) {
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return static_cast<float>(random.uniform() * 2 - 1); });
  return values;
}

double dot(const float* a, const float* b, std::size_t count) {
  double sum = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  return sum;
}

// y = W_down (silu(W_gate h) * W_up h), plain loops.
std::vector<double> feed_forward(const std::vector<float>& gate, const std::vector<float>& up,
                                 const std::vector<float>& down, const std::vector<float>& h) {
  const std::size_t width = h.size();
  const std::size_t neurons = gate.size() / width;
  std::vector<double> y(width, 0.0);
  for (std::size_t f = 0; f < neurons; ++f) {
    const double g = dot(gate.data() + f * width, h.data(), width);
    const double inner = g / (1.0 + std::exp(-g)) * dot(up.data() + f * width, h.data(), width);
    for (std::size_t row = 0; row < width; ++row) {
      y[row] += static_cast<double>(down[row * neurons + f]) * inner;
    }
  }
  return y;
}

Json llama_config() {
  return {{"model_type", "llama"},      {"vocab_size", 11},       {"hidden_size", 8},
          {"intermediate_size", 12},    {"num_hidden_layers", 2}, {"num_attention_heads", 2},
          {"num_key_value_heads", 1},   {"rms_norm_eps", 1e-5},   {"rope_theta", 50000.0},
          {"bos_token_id", 1},          {"eos_token_id", {2, 3}}, {"max_position_embeddings", 64},
          {"tie_word_embeddings", true}};
}

// A dense model in memory, written as a directory or as a GGUF file.
struct Dense {
  explicit Dense(const TemporaryFolder& folder) : directory(folder.path() / "dense"), gguf(folder.path() / "d.gguf") {
    std::filesystem::create_directories(directory);
    architecture.vocab_size = 11;
    architecture.hidden_size = 8;
    architecture.intermediate_size = 12;
    architecture.num_layers = 2;
    architecture.num_attention_heads = 2;
    architecture.num_key_value_heads = 1;
    architecture.head_dim = 4;
    architecture.tie_word_embeddings = true;
    SplitMix64 random(4);
    for (const DenseTensor& tensor : dense_tensors(architecture)) {
      std::size_t count = 1;
      for (const std::int64_t size : tensor.shape) {
        count *= static_cast<std::size_t>(size);
      }
      values[tensor.name] = random_values(random, count);
    }
  }
  void write_directory(const Json& config = llama_config()) const {
    SafetensorsWriter writer;
    for (const DenseTensor& tensor : dense_tensors(architecture)) {
      writer.add(tensor.name, DType::kF32, tensor.shape, std::as_bytes(std::span(values.at(tensor.name))));
    }
    writer.write(directory / "model.safetensors");
    write_text_atomically(directory / "config.json", config.dump());
  }
  [[nodiscard]] GgufWriter gguf_writer() const {
    GgufWriter writer;
    writer.text("general.architecture", "llama").uint32("llama.embedding_length", 8).uint32("llama.block_count", 2);
    writer.uint32("llama.feed_forward_length", 12).uint32("llama.attention.head_count", 2);
    writer.uint32("llama.attention.head_count_kv", 1).uint32("llama.context_length", 64);
    writer.float32("llama.attention.layer_norm_rms_epsilon", 1e-5F).float32("llama.rope.freq_base", 50000.0F);
    writer.uint32("tokenizer.ggml.bos_token_id", 1).uint32("tokenizer.ggml.eos_token_id", 2);
    return writer;
  }
  void write_gguf(GgufWriter writer, std::uint32_t type = 0) const {
    for (const DenseTensor& tensor : dense_tensors(architecture)) {
      std::vector<float> rows = values.at(tensor.name);
      const bool key = tensor.name.ends_with("k_proj.weight");
      if (key || tensor.name.ends_with("q_proj.weight")) {
        // As llama.cpp's converter: within a head, row j of the first half and row j of the second become neighbours.
        const std::vector<float> plain = rows;
        for (int head = 0; head < (key ? 1 : 2); ++head) {
          for (int row = 0; row < 4; ++row) {
            const int to = 4 * head + 2 * (row % 2) + row / 2;
            std::copy_n(plain.begin() + (4 * head + row) * 8, 8, rows.begin() + to * 8);
          }
        }
      }
      std::vector<std::uint64_t> shape(tensor.shape.rbegin(), tensor.shape.rend());
      std::string bytes = GgufWriter::raw_floats(rows);
      if (type != 0 && shape.size() == 2) {
        bytes.clear();
        for (const float value : rows) {
          const std::uint16_t bits = type == 1 ? float_to_half_bits(value) : float_to_bfloat16_bits(value);
          bytes += GgufWriter::raw(bits);
        }
        writer.tensor(tensor.gguf, shape, type, bytes);
      } else {
        writer.tensor(tensor.gguf, shape, 0, bytes);
      }
    }
    writer.save(gguf);
  }

  DenseArchitecture architecture;
  std::map<std::string, std::vector<float>> values;
  std::filesystem::path directory;
  std::filesystem::path gguf;
};

template <class Exception>
std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no error";
}

TEST_CASE("The shards of a feed-forward network add up to it") {
  SplitMix64 random(1);
  for (int round = 0; round < 30; ++round) {
    const std::size_t width = 1 + random.below(20);
    const auto shards = static_cast<std::int64_t>(1 + random.below(6));
    const std::size_t neurons = static_cast<std::size_t>(shards) * (1 + random.below(7));
    const std::vector<float> gate = random_values(random, neurons * width);
    const std::vector<float> up = random_values(random, neurons * width);
    const std::vector<float> down = random_values(random, neurons * width);
    const std::vector<float> h = random_values(random, width);
    const std::vector<double> expected = feed_forward(gate, up, down, h);
    std::vector<double> sum(width, 0.0);
    const auto parts = split_feed_forward(gate, up, down, static_cast<std::int64_t>(width), shards);
    REQUIRE(parts.size() == static_cast<std::size_t>(shards));
    for (const FeedForwardShard& part : parts) {
      CHECK(part.gate.size() == gate.size() / static_cast<std::size_t>(shards));
      const std::vector<double> y = feed_forward(part.gate, part.up, part.down, h);
      for (std::size_t i = 0; i < width; ++i) {
        sum[i] += y[i] / static_cast<double>(shards);
      }
    }
    for (std::size_t i = 0; i < width; ++i) {
      REQUIRE(sum[i] == Approx(expected[i]).epsilon(1e-6).margin(1e-6));
    }
  }
  const std::vector<float> six(6);
  CHECK_THROWS_AS(split_feed_forward(six, six, six, 2, 2), std::invalid_argument);
  CHECK_THROWS_AS(split_feed_forward(six, six, std::vector<float>(5), 2, 3), std::invalid_argument);
}

TEST_CASE("Routers of both starts: who shares what, orthogonal to the mean, of the right length") {
  SplitMix64 random(2);
  RouterInput input;
  input.mean = random_values(random, 256);
  input.variance = 0.25;
  UpcycleOptions options;
  options.num_experts = 24;
  options.top_k = 4;
  const std::size_t width = 256;
  for (const UpcycleStart start : {UpcycleStart::kGrouped, UpcycleStart::kSigned}) {
    options.start = start;
    const std::vector<float> router = upcycled_router(options, input, 7);
    REQUIRE(router.size() == 24 * width);
    CHECK(router == upcycled_router(options, input, 7));
    CHECK(router != upcycled_router(options, input, 8));
    const auto row = [&](std::size_t copy, std::size_t shard) { return router.data() + (copy * 4 + shard) * width; };
    for (std::size_t copy = 0; copy < 6; ++copy) {
      for (std::size_t shard = 0; shard < 4; ++shard) {
        CHECK(std::abs(dot(row(copy, shard), input.mean.data(), width)) < 1e-4);
      }
    }
    if (start == UpcycleStart::kGrouped) {
      for (std::size_t copy = 0; copy < 6; ++copy) {
        CHECK(dot(row(copy, 0), row(copy, 0), width) == Approx(4.0).epsilon(1e-5));
        for (std::size_t shard = 1; shard < 4; ++shard) {
          CHECK(std::equal(row(copy, 0), row(copy, 0) + width, row(copy, shard)));
        }
      }
      CHECK(std::abs(dot(row(0, 0), row(1, 0), width)) < 1.0);
    } else {
      for (std::size_t k = 0; k < 3; ++k) {
        std::vector<float> first(width);
        for (std::size_t shard = 0; shard < 4; ++shard) {
          // Half the sum of a pair is g_k for every shard, half the difference .15 of a direction of its own.
          std::vector<float> g(width);
          std::vector<float> d(width);
          for (std::size_t i = 0; i < width; ++i) {
            g[i] = (row(2 * k, shard)[i] + row(2 * k + 1, shard)[i]) / 2;
            d[i] = (row(2 * k, shard)[i] - row(2 * k + 1, shard)[i]) / 2;
          }
          CHECK(dot(g.data(), g.data(), width) == Approx(4.0).epsilon(1e-4));
          CHECK(dot(d.data(), d.data(), width) == Approx(4.0 * 0.15 * 0.15).epsilon(1e-4));
          if (shard == 0) {
            first = g;
          }
          for (std::size_t i = 0; i < width; ++i) {
            REQUIRE(g[i] == Approx(first[i]).margin(1e-6));
          }
        }
      }
    }
  }
}

TEST_CASE("The written experts and router compute the dense feed-forward network") {
  const TemporaryFolder folder;
  const Dense model(folder);
  model.write_directory();
  const DenseCheckpoint dense(model.directory);
  UpcycleOptions options;
  options.num_experts = 12;
  options.top_k = 4;
  options.dtype = DType::kF32;
  options.quiet = true;
  const std::filesystem::path output = folder.path() / "moe";
  upcycle(dense, options, output, [](const std::filesystem::path& made) { write_text_atomically(made / "x", "y"); });
  CHECK(read_text_file(output / "x") == "y");
  const SafetensorsCheckpoint moe(output);
  CHECK(moe.names().size() == 2 + 2 * (6 + 1 + 12 * 3));
  const auto floats = [&](const std::string& name) {
    const TensorView& view = moe.tensor(name);
    std::vector<float> values(static_cast<std::size_t>(view.num_elements()));
    std::memcpy(values.data(), view.bytes.data(), view.bytes.size());
    return values;
  };
  for (const auto& [name, values] : model.values) {
    if (name.find(".mlp.") == std::string::npos) {
      CHECK(floats(name) == values);
    }
  }
  SplitMix64 random(6);
  for (int round = 0; round < 20; ++round) {
    const std::string layer = fmt::format("model.layers.{}.", round % 2);
    const std::vector<float> h = random_values(random, 8);
    const std::vector<float> router = floats(layer + "block_sparse_moe.gate.weight");
    // Softmax, the K largest, renormalised: the maximum cancels.
    std::vector<double> weights(12);
    std::vector<std::size_t> order(12);
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t e = 0; e < 12; ++e) {
      weights[e] = std::exp(dot(router.data() + e * 8, h.data(), 8));
    }
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; });
    double total = 0.0;
    for (std::size_t i = 0; i < 4; ++i) {
      total += weights[order[i]];
    }
    std::vector<double> y(8, 0.0);
    for (std::size_t i = 0; i < 4; ++i) {
      const std::string expert = fmt::format("{}block_sparse_moe.experts.{}.", layer, order[i]);
      const std::vector<double> part =
          feed_forward(floats(expert + "w1.weight"), floats(expert + "w3.weight"), floats(expert + "w2.weight"), h);
      for (std::size_t d = 0; d < 8; ++d) {
        y[d] += weights[order[i]] / total * part[d];
      }
    }
    const std::vector<double> expected =
        feed_forward(model.values.at(layer + "mlp.gate_proj.weight"), model.values.at(layer + "mlp.up_proj.weight"),
                     model.values.at(layer + "mlp.down_proj.weight"), h);
    for (std::size_t d = 0; d < 8; ++d) {
      REQUIRE(y[d] == Approx(expected[d]).epsilon(1e-6).margin(1e-6));
    }
  }
  const Json config = read_json_file(output / "config.json");
  CHECK(config.at("model_type") == "mixtral");
  CHECK(config.at("num_local_experts") == 12);
  CHECK(config.at("num_experts_per_tok") == 4);
  CHECK(config.at("intermediate_size") == 3);
  CHECK(config.at("num_key_value_heads") == 1);
  CHECK(config.at("head_dim") == 4);
  CHECK(config.at("tie_word_embeddings") == true);
  CHECK(config.at("eos_token_id") == Json({2, 3}));
  CHECK(config.at("rope_parameters").at("rope_theta") == 50000.0);
  CHECK(config.at("dtype") == "float32");
  // Not over what is there, and nothing half-written.
  CHECK_THAT(error_of<UsageError>([&] { upcycle(dense, options, output); }), Catch::Contains("exists already"));
  const auto interrupted = [](const std::filesystem::path&) { throw RunError("stop"); };
  const auto entries = [&] { return std::distance(std::filesystem::directory_iterator(folder.path()), {}); };
  const auto before = entries();
  CHECK_THROWS_AS(upcycle(dense, options, folder.path() / "half", interrupted), RunError);
  CHECK(entries() == before);
  CHECK_FALSE(std::filesystem::exists(folder.path() / "half"));
  // What float16 cannot hold is said before anything stands there.
  UpcycleOptions half = options;
  half.dtype = DType::kF16;
  const TemporaryFolder other;
  Dense large(other);
  large.values.at("model.layers.1.mlp.up_proj.weight").at(3) = 70000.0F;
  large.write_directory();
  const DenseCheckpoint overflowing(large.directory);
  CHECK_THAT(
      error_of<InputError>([&] { upcycle(overflowing, half, folder.path() / "half"); }),
      Catch::Contains("\"model.layers.1.mlp.up_proj.weight\": holds 70000, which is no finite F16; choose --dtype "
                      "bfloat16"));
  CHECK_FALSE(std::filesystem::exists(folder.path() / "half"));
  large.values.at("model.norm.weight").at(0) = std::numeric_limits<float>::quiet_NaN();
  large.write_directory();
  const DenseCheckpoint damaged(large.directory);
  CHECK_THAT(error_of<InputError>([&] { upcycle(damaged, options, folder.path() / "half"); }),
             Catch::Contains("\"model.norm.weight\": holds nan") && Catch::Contains("fetch the model again"));
  // Half the bytes in the other types.
  options.dtype = DType::kBF16;
  upcycle(dense, options, folder.path() / "bf16");
  const SafetensorsCheckpoint small(folder.path() / "bf16");
  const std::string name = "model.layers.1.block_sparse_moe.experts.5.w1.weight";
  REQUIRE(small.tensor(name).dtype == DType::kBF16);
  std::uint16_t bits = 0;
  std::memcpy(&bits, small.tensor(name).bytes.data(), 2);
  CHECK(bits == float_to_bfloat16_bits(floats(name).front()));
}

TEST_CASE("Sizes that do not divide are refused with all that is wrong") {
  DenseArchitecture architecture;
  architecture.intermediate_size = 12;
  UpcycleOptions options;
  options.num_experts = 12;
  options.top_k = 5;
  const std::string text = error_of<UsageError>([&] { check_upcycle(architecture, options); });
  CHECK_THAT(text, Catch::Contains("--experts must be a multiple of --top-k (5), got 12") &&
                       Catch::Contains("--top-k must divide the feed-forward size (12), got 5"));
  options.top_k = 4;
  check_upcycle(architecture, options);
  options.start = UpcycleStart::kSigned;
  CHECK_THAT(error_of<UsageError>([&] { check_upcycle(architecture, options); }), Catch::Contains("even multiple"));
  options.num_experts = std::int64_t{1} << 58;
  CHECK_THAT(error_of<UsageError>([&] { check_upcycle(architecture, options); }),
             Catch::Contains("at most 65536, got 288"));
  options.top_k = 0;
  CHECK_THAT(error_of<UsageError>([&] { check_upcycle(architecture, options); }), Catch::Contains("at least 1, got 0"));
  options.top_k = 12;
  options.num_experts = 6;
  CHECK_THAT(error_of<UsageError>([&] { check_upcycle(architecture, options); }), Catch::Contains("got 6"));
  CHECK(upcycle_start_from_name("signed") == UpcycleStart::kSigned);
  CHECK_THAT(error_of<UsageError>([] { static_cast<void>(upcycle_start_from_name("best")); }),
             Catch::Contains("\"best\""));
}

TEST_CASE("A GGUF file and a directory of one model have the same tensors") {
  const TemporaryFolder folder;
  const Dense model(folder);
  for (const std::uint32_t type : {0U, 1U, 30U}) {
    model.write_gguf(model.gguf_writer(), type);
    const DenseCheckpoint dense(model.gguf);
    REQUIRE(dense.gguf() != nullptr);
    CHECK(dense.architecture().rms_norm_eps == 1e-5);
    CHECK(dense.architecture().rope_theta == 50000.0);
    CHECK(dense.architecture().head_dim == 4);
    CHECK(dense.architecture().tie_word_embeddings);
    for (const DenseTensor& tensor : dense_tensors(model.architecture)) {
      INFO(tensor.name);
      std::vector<float> expected = model.values.at(tensor.name);
      for (float& value : expected) {
        if (type != 0 && tensor.shape.size() == 2) {
          value = type == 1 ? half_bits_to_float(float_to_half_bits(value))
                            : bfloat16_bits_to_float(float_to_bfloat16_bits(value));
        }
      }
      CHECK(dense.tensor(tensor.name) == expected);
    }
  }
}

TEST_CASE("Rotary positions that the upcycled model could not be read with are refused before anything is written") {
  const TemporaryFolder folder;
  const Dense model(folder);
  Json config = llama_config();
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 64}};
  model.write_directory(config);
  const DenseCheckpoint dense(model.directory);
  UpcycleOptions options;
  options.num_experts = 4;
  options.top_k = 2;
  options.quiet = true;
  const std::filesystem::path output = folder.path() / "moe";
  CHECK_THAT(error_of<InputError>([&] { upcycle(dense, options, output); }),
             Catch::Contains("upcycled") && Catch::Contains("got \"llama3\""));
  CHECK_FALSE(std::filesystem::exists(output));
}

TEST_CASE("What is no dense Llama model is refused") {
  const TemporaryFolder folder;
  const Dense model(folder);
  const auto directory = [&](const std::function<void(Json&)>& change) {
    Json config = llama_config();
    change(config);
    model.write_directory(config);
    return error_of<InputError>([&] { const DenseCheckpoint dense(model.directory); });
  };
  CHECK(directory([](Json&) {}) == "no error");
  CHECK_THAT(directory([](Json& config) { config["model_type"] = "gemma"; }),
             Catch::Contains("\"model_type\" must be \"llama\", got \"gemma\""));
  const std::string several = directory([](Json& config) {
    config["attention_bias"] = true;
    config["hidden_act"] = "gelu";
    config.erase("intermediate_size");
  });
  CHECK_THAT(several, Catch::Contains("\"attention_bias\" must be false, got true") &&
                          Catch::Contains("\"hidden_act\" must be \"silu\", got \"gelu\"") &&
                          Catch::Contains("\"intermediate_size\" must be a whole number, got none"));
  CHECK_THAT(directory([](Json& config) { config["intermediate_size"] = 13; }),
             Catch::Contains("mlp.up_proj.weight\" must be float [13, 8], got F32 [12, 8]"));
  CHECK_THAT(directory([](Json& config) { config["num_hidden_layers"] = 3; }),
             Catch::Contains("\"model.layers.2.mlp.up_proj.weight\" is missing"));
  CHECK_THAT(directory([](Json& config) { config["num_hidden_layers"] = 1; }), Catch::Contains("is not part of"));
  CHECK_THAT(directory([](Json& config) { config["num_attention_heads"] = 0; }), Catch::Contains("number of heads"));

  const auto gguf = [&](GgufWriter writer) {
    model.write_gguf(std::move(writer));
    return error_of<InputError>([&] { const DenseCheckpoint dense(model.gguf); });
  };
  CHECK(gguf(model.gguf_writer()) == "no error");
  CHECK_THAT(gguf(model.gguf_writer().uint32("llama.expert_count", 8)), Catch::Contains("has 8 experts already"));
  CHECK_THAT(gguf(model.gguf_writer().uint32("llama.rope.dimension_count", 2)),
             Catch::Contains("the whole head (4), got 2"));
  CHECK_THAT(gguf(model.gguf_writer().text("llama.rope.scaling.type", "yarn")), Catch::Contains("got \"yarn\""));
  // A factor without a type is linear, by either key; 0 and 1 are none.
  const auto scaling = [&](GgufWriter writer) {
    model.write_gguf(std::move(writer));
    return DenseCheckpoint(model.gguf).architecture().rope_scaling;
  };
  const Json linear = {{"rope_type", "linear"}, {"factor", 2.5}};
  CHECK(scaling(model.gguf_writer().float32("llama.rope.scaling.factor", 2.5F)) == linear);
  CHECK(scaling(model.gguf_writer().float32("llama.rope.scale_linear", 2.5F)) == linear);
  CHECK(scaling(model.gguf_writer().text("llama.rope.scaling.type", "none").float32("llama.rope.scaling.factor", 2.5F))
            .is_null());
  CHECK(scaling(model.gguf_writer().float32("llama.rope.scaling.factor", 0.0F)).is_null());
  CHECK(scaling(model.gguf_writer().float32("llama.rope.scale_linear", 1.0F)).is_null());
  CHECK_THAT(gguf(model.gguf_writer().float32("llama.rope.scaling.factor", std::numeric_limits<float>::quiet_NaN())),
             Catch::Contains("\"llama.rope.scaling.factor\" must be a number of at least 0, got nan"));
  CHECK_THAT(gguf(model.gguf_writer().float32("llama.rope.scaling.factor", -2.0F)), Catch::Contains("got -2"));
  // Special tokens that the vocabulary of 11 does not have: a warning, and none.
  clear_degradations();
  model.write_gguf(model.gguf_writer().uint32("tokenizer.ggml.padding_token_id", 11));
  CHECK(DenseCheckpoint(model.gguf).architecture().pad_token_id.is_null());
  CHECK(DenseCheckpoint(model.gguf).architecture().bos_token_id == 1);
  REQUIRE_FALSE(degradations().empty());
  CHECK_THAT(degradations().front(), Catch::Contains("pad_token_id must be below the 11 tokens, got 11"));
  clear_degradations();
  Json config = llama_config();
  config["eos_token_id"] = {2, 11};
  config["bos_token_id"] = -1;
  config["pad_token_id"] = 10;
  model.write_directory(config);
  const DenseArchitecture read = DenseCheckpoint(model.directory).architecture();
  CHECK(Json{read.eos_token_id, read.bos_token_id, read.pad_token_id} == Json{Json::array({2}), nullptr, 10});
  CHECK(degradations().size() == 2);
  clear_degradations();
  CHECK_THAT(gguf(model.gguf_writer().tensor("rope_freqs.weight", {2}, 0, std::string(8, 'x'))),
             Catch::Contains("\"rope_freqs.weight\" is not part of"));
  GgufWriter other;
  other.text("general.architecture", "gemma");
  CHECK_THAT(gguf(other), Catch::Contains("general.architecture must be \"llama\", got \"gemma\""));
  CHECK_THAT(error_of<InputError>([&] { const DenseCheckpoint dense(folder.path() / "none"); }),
             Catch::Contains("No such file"));
}

}  // namespace
}  // namespace hestia
