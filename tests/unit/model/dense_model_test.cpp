#include "model/dense_model.hpp"

#include <cmath>
#include <map>

#include <fmt/format.h>
#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/random.hpp"
#include "hestia/model/router_inputs.hpp"
#include "temporary_folder.hpp"

namespace hestia {
namespace {

using Row = std::vector<double>;

// A random dense model on disk: 2 layers, 4 heads of 6 that share 2 keys, linear rotary scaling.
struct Fixture {
  explicit Fixture(bool tied) {
    architecture.vocab_size = 13;
    architecture.hidden_size = 10;
    architecture.intermediate_size = 14;
    architecture.num_layers = 2;
    architecture.num_attention_heads = 4;
    architecture.num_key_value_heads = 2;
    architecture.head_dim = 6;
    architecture.tie_word_embeddings = tied;
    SplitMix64 random(tied ? 5 : 6);
    SafetensorsWriter writer;
    for (const DenseTensor& tensor : dense_tensors(architecture)) {
      std::size_t count = 1;
      for (const std::int64_t size : tensor.shape) {
        count *= static_cast<std::size_t>(size);
      }
      std::vector<float>& made = values[tensor.name];
      for (std::size_t i = 0; i < count; ++i) {
        made.push_back(static_cast<float>(random.uniform() * 1.4 - 0.7) + (tensor.shape.size() == 1 ? 1.0F : 0.0F));
      }
    }
    for (const DenseTensor& tensor : dense_tensors(architecture)) {
      writer.add(tensor.name, DType::kF32, tensor.shape, std::as_bytes(std::span(values.at(tensor.name))));
    }
    writer.write(folder.path() / "model.safetensors");
    config = {{"model_type", "llama"},
              {"vocab_size", 13},
              {"hidden_size", 10},
              {"intermediate_size", 14},
              {"num_hidden_layers", 2},
              {"num_attention_heads", 4},
              {"num_key_value_heads", 2},
              {"head_dim", 6},
              {"rms_norm_eps", 1e-3},
              {"rope_theta", 100.0},
              {"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}},
              {"tie_word_embeddings", tied},
              {"bos_token_id", 1}};
    save();
  }
  void save() const { write_text_atomically(folder.path() / "config.json", config.dump()); }

  // W x, with W [rows, x.size()].
  [[nodiscard]] Row times(const std::string& name, const Row& x) const {
    const std::vector<float>& weight = values.at(name);
    Row y(weight.size() / x.size(), 0.0);
    for (std::size_t row = 0; row < y.size(); ++row) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        y[row] += static_cast<double>(weight[row * x.size() + i]) * x[i];
      }
    }
    return y;
  }
  [[nodiscard]] Row norm(const std::string& name, const Row& x) const {
    double square = 0.0;
    for (const double value : x) {
      square += value * value;
    }
    Row y = x;
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[i] *= static_cast<double>(values.at(name)[i]) / std::sqrt(square / static_cast<double>(x.size()) + 1e-3);
    }
    return y;
  }
  static void rotate(Row& heads, std::size_t position) {
    for (std::size_t head = 0; head < heads.size(); head += 6) {
      for (std::size_t i = 0; i < 3; ++i) {
        const double angle = static_cast<double>(position) / 2.0 / std::pow(100.0, static_cast<double>(i) / 3.0);
        const double a = heads[head + i];
        const double b = heads[head + 3 + i];
        heads[head + i] = a * std::cos(angle) - b * std::sin(angle);
        heads[head + 3 + i] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  // Plain loops over one sequence: logits and feed-forward inputs [position][layer] of every position.
  void forward(const std::vector<std::int64_t>& tokens, std::vector<Row>& logits,
               std::vector<std::vector<Row>>& inputs) const {
    std::vector<std::vector<Row>> keys(2);
    std::vector<std::vector<Row>> gains(2);
    for (std::size_t position = 0; position < tokens.size(); ++position) {
      const float* from = values.at("model.embed_tokens.weight").data() + 10 * tokens[position];
      Row x(from, from + 10);
      inputs.emplace_back();
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const std::string prefix = fmt::format("model.layers.{}.", layer);
        Row h = norm(prefix + "input_layernorm.weight", x);
        Row query = times(prefix + "self_attn.q_proj.weight", h);
        Row key = times(prefix + "self_attn.k_proj.weight", h);
        rotate(query, position);
        rotate(key, position);
        keys[layer].push_back(key);
        gains[layer].push_back(times(prefix + "self_attn.v_proj.weight", h));
        Row mixed(24, 0.0);
        for (std::size_t head = 0; head < 4; ++head) {
          const std::size_t shared = 6 * (head / 2);
          Row weight;
          double total = 0.0;
          for (std::size_t t = 0; t <= position; ++t) {
            double score = 0.0;
            for (std::size_t i = 0; i < 6; ++i) {
              score += query[6 * head + i] * keys[layer][t][shared + i];
            }
            weight.push_back(std::exp(score / std::sqrt(6.0)));
            total += weight.back();
          }
          for (std::size_t t = 0; t <= position; ++t) {
            for (std::size_t i = 0; i < 6; ++i) {
              mixed[6 * head + i] += weight[t] / total * gains[layer][t][shared + i];
            }
          }
        }
        const Row attention = times(prefix + "self_attn.o_proj.weight", mixed);
        for (std::size_t i = 0; i < 10; ++i) {
          x[i] += attention[i];
        }
        h = norm(prefix + "post_attention_layernorm.weight", x);
        inputs.back().push_back(h);
        Row inner = times(prefix + "mlp.gate_proj.weight", h);
        const Row up = times(prefix + "mlp.up_proj.weight", h);
        for (std::size_t f = 0; f < inner.size(); ++f) {
          inner[f] = inner[f] / (1.0 + std::exp(-inner[f])) * up[f];
        }
        const Row out = times(prefix + "mlp.down_proj.weight", inner);
        for (std::size_t i = 0; i < 10; ++i) {
          x[i] += out[i];
        }
      }
      logits.push_back(times(architecture.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight",
                             norm("model.norm.weight", x)));
    }
  }

  TemporaryFolder folder;
  DenseArchitecture architecture;
  std::map<std::string, std::vector<float>> values;
  Json config;
};

TEST_CASE("The dense forward equals plain loops, position by position") {
  const Fixture fixture(GENERATE(false, true));
  DenseModel model(DenseCheckpoint(fixture.folder.path()));
  SplitMix64 random(3);
  std::vector<std::vector<std::int64_t>> tokens(3, std::vector<std::int64_t>(9));
  for (auto& sequence : tokens) {
    for (std::int64_t& token : sequence) {
      token = static_cast<std::int64_t>(random.below(13));
    }
  }
  std::vector<std::vector<Row>> logits(3);
  std::vector<std::vector<std::vector<Row>>> inputs(3);
  for (std::size_t b = 0; b < 3; ++b) {
    fixture.forward(tokens[b], logits[b], inputs[b]);
  }
  for (std::size_t position = 0; position < 9; ++position) {
    const torch::Tensor step =
        model.step(torch::tensor({tokens[0][position], tokens[1][position], tokens[2][position]}, torch::kInt64));
    for (std::size_t b = 0; b < 3; ++b) {
      for (std::size_t v = 0; v < 13; ++v) {
        REQUIRE(step[b][v].item<double>() == Approx(logits[b][position][v]).epsilon(1e-4).margin(1e-4));
      }
      for (std::size_t layer = 0; layer < 2; ++layer) {
        for (std::size_t i = 0; i < 10; ++i) {
          REQUIRE(model.feed_forward_inputs()[layer][b][i].item<double>() ==
                  Approx(inputs[b][position][layer][i]).epsilon(1e-4).margin(1e-4));
        }
      }
    }
  }
}

TEST_CASE("Router inputs are the moments of sampled positions but the first") {
  Fixture fixture(false);
  const DenseCheckpoint dense(fixture.folder.path());
  SamplingOptions options;
  options.sequences = 400;
  options.length = 2;
  options.quiet = true;
  const std::vector<RouterInput> measured = measure_router_inputs(dense, options);
  REQUIRE(measured.size() == 2);
  CHECK(measured[1].mean == measure_router_inputs(dense, options)[1].mean);
  // Two tokens: the second is drawn from softmax(logits of bos), so the expectation is a sum over the vocabulary.
  std::vector<Row> first;
  std::vector<std::vector<Row>> unused;
  fixture.forward({1}, first, unused);
  Row share;
  double total = 0.0;
  for (const double logit : first[0]) {
    share.push_back(std::exp(logit));
    total += share.back();
  }
  for (std::size_t layer = 0; layer < 2; ++layer) {
    Row mean(10, 0.0);
    double square = 0.0;
    for (std::int64_t token = 0; token < 13; ++token) {
      std::vector<Row> logits;
      std::vector<std::vector<Row>> inputs;
      fixture.forward({1, token}, logits, inputs);
      for (std::size_t i = 0; i < 10; ++i) {
        const double value = inputs[1][layer][i];
        mean[i] += share[static_cast<std::size_t>(token)] / total * value;
        square += share[static_cast<std::size_t>(token)] / total * value * value;
      }
    }
    double variance = square;
    for (std::size_t i = 0; i < 10; ++i) {
      variance -= mean[i] * mean[i];
      CHECK(std::abs(static_cast<double>(measured[layer].mean[i]) - mean[i]) < 0.25);
    }
    CHECK(measured[layer].variance == Approx(variance / 10.0).epsilon(0.2));
  }
  options.length = 1;
  CHECK_THROWS_AS(measure_router_inputs(dense, options), UsageError);
  options.length = 2;
  fixture.config["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8.0}};
  fixture.save();
  const DenseCheckpoint other(fixture.folder.path());
  CHECK_THROWS_WITH(measure_router_inputs(other, options), Catch::Contains("got \"llama3\"; upcycle a model of those"));
}

}  // namespace
}  // namespace hestia
