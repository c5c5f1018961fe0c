#include "hestia/trainer/preference_predictor.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/random.hpp"
#include "hestia/model/tensors.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

using namespace hestia;

namespace {

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kExperts = 8;
constexpr std::int64_t kInputs = 6;
constexpr std::int64_t kTopK = 2;

// Sequences whose first input decides which experts their answers prefer; what the prompt used says nothing.
PredictorExamples synthetic(std::int64_t count, std::uint64_t seed) {
  SplitMix64 random(seed);
  PredictorExamples examples;
  examples.embeddings_ND = torch::empty({count, kInputs});
  examples.target_NLE = torch::empty({count, kLayers, kExperts});
  examples.count_NLE = torch::zeros({count, kLayers, kExperts}, torch::kInt32);
  examples.prompt_count_NLE = torch::zeros({count, kLayers, kExperts}, torch::kInt32);
  examples.num_left_out = 3;
  examples.embedding = "made up";
  for (std::int64_t n = 0; n < count; ++n) {
    examples.ids.push_back(n);
    const bool kind = random.uniform() < 0.5;
    for (std::int64_t d = 0; d < kInputs; ++d) {
      // Small and off centre, as token embeddings are.
      examples.embeddings_ND[n][d] = 0.02 * (random.uniform() + (d == 0 && kind ? 2.0 : 0.0)) + 0.1;
    }
    for (std::int64_t l = 0; l < kLayers; ++l) {
      torch::Tensor row = torch::empty({kExperts});
      for (std::int64_t e = 0; e < kExperts; ++e) {
        row[e] = ((e < kExperts / 2) == (kind == (l == 0)) ? 1.0 : 0.1) + 0.05 * random.uniform();
        examples.count_NLE[n][l][e] = static_cast<int>(std::lround(40.0 * row[e].item<double>()));
        examples.prompt_count_NLE[n][l][e] = static_cast<int>(random.below(4));
      }
      examples.target_NLE[n][l] = row / row.sum();
    }
  }
  return examples;
}

PredictorOptions fast_options() {
  PredictorOptions options;
  options.hidden_size = 16;
  options.learning_rate = 0.05;
  options.epochs = 20;
  options.batch_size = 8;
  options.slots = {4, 2};
  return options;
}

const PredictorFigures& figures_of(const PreferencePredictor& predictor, const std::string& method) {
  for (const PredictorFigures& figures : predictor.report.figures) {
    if (figures.method == method) {
      return figures;
    }
  }
  throw std::logic_error("no figures of " + method);
}

// KL, probability recall and request recall of a guess, [N, L, E] in double, over the held-out examples.
struct Expected {
  double kl = 0.0;
  double probability = 0.0;
  double requests = 0.0;
};
Expected brute_force(const PredictorExamples& examples, const std::vector<std::int64_t>& held_out,
                     const std::function<torch::Tensor(std::int64_t)>& guess, std::int64_t slots) {
  Expected expected;
  double all = 0.0;
  for (const std::int64_t n : held_out) {
    const torch::Tensor q = guess(n).to(torch::kFloat64);
    for (std::int64_t l = 0; l < kLayers; ++l) {
      std::vector<std::pair<double, std::int64_t>> order;
      for (std::int64_t e = 0; e < kExperts; ++e) {
        const auto p = examples.target_NLE[n][l][e].item<double>();
        const double guessed = q[l][e].item<double>();
        expected.kl += p * (std::log(p) - std::log(guessed));
        all += examples.count_NLE[n][l][e].item<int>();
        order.emplace_back(-guessed, e);
      }
      std::sort(order.begin(), order.end());
      for (std::int64_t i = 0; i < slots; ++i) {
        const std::int64_t e = order[static_cast<std::size_t>(i)].second;
        expected.probability += examples.target_NLE[n][l][e].item<double>();
        expected.requests += examples.count_NLE[n][l][e].item<int>();
      }
    }
  }
  const auto rows = static_cast<double>(held_out.size()) * kLayers;
  return {expected.kl / rows, expected.probability / rows, expected.requests / all};
}

}  // namespace

TEST_CASE("the predictor learns what the prompt determines and beats every free guess that cannot") {
  const PredictorExamples examples = synthetic(120, 1);
  std::vector<double> losses;
  const PreferencePredictor predictor = train_preference_predictor(
      examples, fast_options(), kTopK, 4, 7, [&](std::int64_t, double loss) { losses.push_back(loss); });
  REQUIRE(losses.size() == 20);
  CHECK(losses.back() < 0.25 * losses.front());
  CHECK(predictor.report.slots == std::vector<std::int64_t>{2, 4});
  CHECK(predictor.report.num_train == 96);
  CHECK(predictor.report.num_held_out == 24);
  CHECK(predictor.report.num_left_out == 3);
  const PredictorFigures& own = figures_of(predictor, "predictor");
  CHECK(own.kl < 0.2 * figures_of(predictor, "mean_popularity").kl);
  CHECK(own.request_recall[1] > figures_of(predictor, "mean_popularity").request_recall[1] + 0.1);
  CHECK(own.request_recall[1] > figures_of(predictor, "prompt_routing").request_recall[1] + 0.1);
  CHECK(figures_of(predictor, "answer_itself").kl == Approx(0.0).margin(1e-6));
  for (const PredictorFigures& figures : predictor.report.figures) {
    CHECK(figures.request_recall[1] <= figures_of(predictor, "answer_itself").request_recall[1] + 0.01);
  }
  // Both kinds are there to tell apart: the prediction follows the input.
  const std::vector<float> low = predictor.predict(std::vector<float>(kInputs, 0.11F));
  std::vector<float> input(kInputs, 0.11F);
  input[0] = 0.15F;
  const std::vector<float> high = predictor.predict(input);
  CHECK(low[0] < 0.1F);
  CHECK(high[0] > 0.15F);
}

TEST_CASE("the free guesses are what they say, against plain loops") {
  const PredictorExamples examples = synthetic(40, 2);
  const PredictorOptions options = fast_options();
  const PreferencePredictor predictor = train_preference_predictor(examples, options, kTopK, 2, 5);
  const ExampleSplit split = split_examples(40, options.held_out_fraction, 5);
  std::set<std::int64_t> everyone(split.train.begin(), split.train.end());
  everyone.insert(split.held_out.begin(), split.held_out.end());
  CHECK(everyone.size() == 40);
  CHECK(split.held_out.size() == 8);
  torch::Tensor popularity = torch::zeros({kLayers, kExperts}, torch::kFloat64);
  for (const std::int64_t n : split.train) {
    popularity += examples.target_NLE[n].to(torch::kFloat64) / 32.0;
  }
  const std::map<std::string, std::function<torch::Tensor(std::int64_t)>> guesses = {
      {"mean_popularity", [&](std::int64_t) { return popularity; }},
      {"prompt_routing",
       [&](std::int64_t n) {
         const torch::Tensor uses = examples.prompt_count_NLE[n].to(torch::kFloat64) + kTopK * popularity;
         return uses / uses.sum(1, true);
       }},
      {"nearest_prompt",
       [&](std::int64_t n) {
         double best = -2.0;
         std::int64_t nearest = -1;
         const torch::Tensor x = examples.embeddings_ND[n].to(torch::kFloat64);
         for (const std::int64_t m : split.train) {
           const torch::Tensor y = examples.embeddings_ND[m].to(torch::kFloat64);
           const double cosine = (x.dot(y) / (x.norm() * y.norm())).item<double>();
           if (cosine > best) {
             best = cosine;
             nearest = m;
           }
         }
         return examples.target_NLE[nearest];
       }},
      {"answer_itself", [&](std::int64_t n) { return examples.target_NLE[n]; }},
      {"predictor", [&](std::int64_t n) {
         const torch::Tensor x = examples.embeddings_ND[n].contiguous();
         std::vector<float> q = predictor.predict({x.const_data_ptr<float>(), static_cast<std::size_t>(kInputs)});
         return torch::tensor(q).view({kLayers, kExperts});
       }}};
  for (const auto& [method, guess] : guesses) {
    INFO(method);
    const PredictorFigures& figures = figures_of(predictor, method);
    for (std::size_t i = 0; i < 2; ++i) {
      const Expected expected = brute_force(examples, split.held_out, guess, predictor.report.slots[i]);
      CHECK(figures.kl == Approx(expected.kl).epsilon(1e-4).margin(1e-6));
      CHECK(figures.probability_recall[i] == Approx(expected.probability).epsilon(1e-5));
      CHECK(figures.request_recall[i] == Approx(expected.requests).epsilon(1e-9));
    }
  }
}

TEST_CASE("a seed gives one predictor, another seed another") {
  const PredictorExamples examples = synthetic(30, 3);
  for (const bool start_from_popularity : {true, false}) {
    PredictorOptions options = fast_options();
    options.start_from_popularity = start_from_popularity;
    const auto weights = [&](std::uint64_t seed) {
      return train_preference_predictor(examples, options, kTopK, 2, seed).output_weight;
    };
    CHECK(weights(1) == weights(1));
    CHECK(weights(1) != weights(2));
  }
}

TEST_CASE("what a predictor cannot be made from is refused") {
  const PredictorExamples examples = synthetic(10, 4);
  PredictorOptions options = fast_options();
  CHECK_THROWS_WITH(split_examples(1, 0.2, 1), Catch::Contains("at least 2 stored sequences") &&
                                                   Catch::Contains("got 1") && Catch::Contains("export.tokens"));
  options.slots = {9};
  CHECK_THROWS_WITH(train_preference_predictor(examples, options, kTopK, 2, 1),
                    Catch::Contains("export.predictor.slots") && Catch::Contains("(8), got 9"));
  options = fast_options();
  options.learning_rate = 10.0;
  PredictorExamples huge = examples;
  huge.embeddings_ND = examples.embeddings_ND * 1e30;
  options.standardise = false;
  options.start_from_popularity = false;
  CHECK_THROWS_WITH(train_preference_predictor(huge, options, kTopK, 2, 1), Catch::Contains("not finite"));
  PredictorExamples wrong = examples;
  wrong.count_NLE = torch::zeros({10, kLayers, kExperts - 1}, torch::kInt32);
  CHECK_THROWS_AS(train_preference_predictor(wrong, fast_options(), kTopK, 2, 1), std::invalid_argument);
}

TEST_CASE("embeddings of another program are found by id") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "e.safetensors";
  const torch::Tensor values = torch::rand({3, 4});
  write_tensors(path, {{"ids", torch::tensor({9, 4, 7}, torch::kInt64)}, {"embeddings", values}});
  CHECK(torch::equal(read_embeddings(path, {7, 9}), torch::stack({values[2], values[0]})));
  CHECK_THROWS_WITH(read_embeddings(path, {9, 5}), Catch::Contains("sequence 5 has no embedding among the 3"));
  write_tensors(path, {{"ids", torch::tensor({9, 9}, torch::kInt64)}, {"embeddings", values.narrow(0, 0, 2)}});
  CHECK_THROWS_WITH(read_embeddings(path, {9}), Catch::Contains("id 9 is there twice"));
  write_tensors(path, {{"ids", torch::tensor({9, 4}, torch::kInt64)}, {"embeddings", values}});
  CHECK_THROWS_AS(read_embeddings(path, {9}), InputError);
  write_tensors(path, {{"ids", torch::tensor({1}, torch::kInt64)}, {"embeddings", torch::full({1, 2}, NAN)}});
  CHECK_THROWS_WITH(read_embeddings(path, {1}), Catch::Contains("not finite"));
  write_tensors(path, {{"ids", torch::tensor({1}, torch::kInt64)}});
  CHECK_THROWS_AS(read_embeddings(path, {1}), InputError);
}

TEST_CASE("a prompt's embedding is the mean over its tokens") {
  MoeModel model = testing::tiny_model();
  const torch::Tensor embedding = token_embedding(model);
  CHECK(embedding.sizes() == std::vector<std::int64_t>{48, 32});
  const std::vector<std::int64_t> tokens = {3, 3, 17};
  CHECK(torch::allclose(mean_embedding(embedding, tokens), (2 * embedding[3] + embedding[17]) / 3));
  CHECK_THROWS_AS(mean_embedding(embedding, std::vector<std::int64_t>{}), std::invalid_argument);
}
