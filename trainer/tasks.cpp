#include "hestia/trainer/tasks.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <thread>
#include <unordered_map>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/core/atomic_folder.hpp"
#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"
#include "hestia/core/shell_word.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/residency_selector.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/model/tuned_checkpoint.hpp"
#include "hestia/model/tuned_gguf.hpp"
#include "hestia/routing/metrics.hpp"
#include "hestia/routing/preferences.hpp"
#include "hestia/trainer/bundle.hpp"
#include "hestia/trainer/data_source.hpp"
#include "hestia/trainer/measure.hpp"
#include "hestia/trainer/preference_predictor.hpp"
#include "hestia/trainer/residency.hpp"

namespace hestia {

namespace {

constexpr const char* kRouterLora = "router+lora";

std::int64_t use_threads(std::int64_t requested) {
  const std::int64_t threads =
      requested > 0 ? requested
                    : std::max<std::int64_t>(1, static_cast<std::int64_t>(std::thread::hardware_concurrency()));
  at::set_num_threads(static_cast<int>(threads));
  return threads;
}

std::string device_text(torch::Device device) {
  return device.is_cuda() ? device.str() : fmt::format("cpu, {} threads", at::get_num_threads());
}

std::int64_t count_elements(const std::vector<torch::Tensor>& tensors) {
  std::int64_t total = 0;
  for (const torch::Tensor& tensor : tensors) {
    total += tensor.numel();
  }
  return total;
}

void log_recipe(const RecipeSource& source, const std::string& run_dir, std::int64_t seed) {
  log_block("Recipe",
            {{"file", source.path().string()},
             {"sha256", source.hash().substr(0, 12)},
             {"overrides", source.overrides().empty() ? "none" : fmt::format("{}", fmt::join(source.overrides(), " "))},
             {"run directory", run_dir},
             {"seed", std::to_string(seed)}});
}

void log_model(MoeModel& model, const std::vector<torch::Tensor>& trainable) {
  const Architecture& architecture = model->architecture();
  log_block("Model",
            {{"family", architecture.family},
             {"layers", std::to_string(architecture.num_layers)},
             {"experts", fmt::format("{} per layer, {} per token", architecture.num_experts, architecture.top_k)},
             {"parameters", format_count(static_cast<double>(architecture.total_parameters()))},
             {"trainable", format_count(static_cast<double>(count_elements(trainable)))},
             {"dtype", std::string(torch::toString(model->dtype()))},
             {"device", device_text(model->device())}});
}

// "; 3 truncated, 1 dropped of 700 examples"; empty where there is nothing to tell.
std::string examples_text(const PackedData& data) {
  ExampleCounts all;
  for (const ExampleCounts& counts : data.examples) {
    all.read += counts.read;
    all.truncated += counts.truncated;
    all.dropped += counts.dropped;
  }
  return all.read == 0 ? ""
                       : fmt::format("; {} truncated, {} dropped of {} examples", all.truncated, all.dropped, all.read);
}

void log_data(const PackedData& train, const PackedData& held_out) {
  const auto row = [](const PackedData& data) {
    return fmt::format("{} tokens in {} sequences of {}{}", format_count(static_cast<double>(data.num_tokens())),
                       data.sequences.size(), fmt::join(data.domains, ", "), examples_text(data));
  };
  log_block("Data", {{"training", row(train)}, {"held out", row(held_out)}});
}

void log_plan(const TrainOptions& options, std::int64_t sequence_length) {
  std::vector<std::pair<std::string, std::string>> rows = {
      {"steps", std::to_string(options.steps)},
      {"tokens per step",
       format_count(static_cast<double>(options.rows_per_batch * options.accumulate * sequence_length))},
      {"learning rate",
       fmt::format("{:g}, {} warm-up steps, {}", options.learning_rate, options.warmup_steps, options.schedule)},
      {"trainable", options.trainable == kRouterLora ? fmt::format("{}, rank {}, alpha {:g}", options.trainable,
                                                                   options.lora.rank, options.lora.alpha)
                                                     : options.trainable}};
  if (options.top_k_annealing.step > 0) {
    rows.emplace_back("experts per token",
                      fmt::format("{} from step {} on", options.top_k_annealing.top_k, options.top_k_annealing.step));
  }
  log_block("Plan", rows);
}

// The recipe of the plain NLL control: the same run without routing objectives, at its own learning rate.
FinetuneRecipe control_recipe(const FinetuneRecipe& recipe) {
  FinetuneRecipe control = recipe;
  control.run_dir = (std::filesystem::path(recipe.run_dir) / "control").string();
  control.train.learning_rate = recipe.control.learning_rate;
  control.control.enabled = false;
  control.losses.set_all_weights(0.0);
  control.distillation = {};
  control.residency.in_loop = false;
  control.residency.ramp_steps = 0;
  control.residency.train_slots.clear();
  return control;
}

// A later run of the same recipe may find one of its two halves finished.
bool is_finished(const std::filesystem::path& run_dir, std::int64_t steps) {
  const auto latest = latest_checkpoint(run_dir);
  return latest && latest->first == steps;
}

// Stands in for the base model: so no loss may want the base's own routing.
MoeModel load_teacher(const LoadedRecipe<FinetuneRecipe>& loaded, const Architecture& student,
                      const std::vector<WeightedLoss>& losses, torch::Device device, bool quiet) {
  const char* key = "losses.logit_distillation.teacher";
  const std::string& path = loaded.recipe.distillation.teacher;
  const Architecture teacher = read_architecture(path);
  Problems problems;
  if (teacher.vocab_size != student.vocab_size || teacher.hidden_size != student.hidden_size ||
      teacher.moe_layers().empty()) {
    problems.add(
        fmt::format("{}: {} must be a MoE model of {} tokens and width {}, as the tuned one, got {} of {} and "
                    "{}; choose another",
                    loaded.source.location(key), key, student.vocab_size, student.hidden_size, path, teacher.vocab_size,
                    teacher.hidden_size));
  }
  if (std::any_of(losses.begin(), losses.end(),
                  [](const WeightedLoss& loss) { return loss.loss->needs_base_forward(); })) {
    problems.add(fmt::format("{}: {} does not go with losses.rank_matching.reference base_forward; choose one",
                             loaded.source.location(key), key));
  }
  problems.throw_usage_if_any();
  return load_model(path, dtype_from_recipe(loaded.recipe.model.dtype), device, quiet);
}

void finetune_once(const LoadedRecipe<FinetuneRecipe>& loaded, const std::string& resolved, const std::string& label,
                   const PackedData& train_data, const PackedData& held_out, const RunFlags& flags, bool resume) {
  const FinetuneRecipe& recipe = loaded.recipe;
  const torch::Device device = device_from_recipe(recipe.model.device);
  MoeModel model = load_model(recipe.model.path, dtype_from_recipe(recipe.model.dtype), device, flags.quiet);
  model->keep_reference_routers();
  if (recipe.train.trainable == kRouterLora) {
    create_adapters(model, {recipe.train.lora.rank, recipe.train.lora.alpha},
                    derive_seed(static_cast<std::uint64_t>(recipe.seed), "adapters"));
  }
  model->set_activation_checkpointing(recipe.model.activation_checkpointing);
  model->set_router_gradient_of_all(recipe.train.router_gradient == "all");
  TrainingJob job;
  ResidencyRule rule = residency_rule(loaded, model->architecture());
  if (recipe.residency.in_loop) {
    const std::filesystem::path saved = residency_path(recipe.run_dir);
    if (resume && std::filesystem::exists(saved)) {
      rule = read_residency(saved);
      check_scope(rule, model->architecture(), saved.string());
    } else {
      calibrate(rule, model, calibration_data(train_data, recipe.residency.calibration_tokens),
                recipe.data.sequence_length);
    }
    log_info(fmt::format("residency in the loop: {}, {} of {} experts by {} alone, {} slots, logit range {:.3f}",
                         lambda_text(rule), rule.always_keep, model->architecture().top_k,
                         residency_score_name(rule.score), rule.slots, fmt::join(rule.logit_range, " ")));
    job.run_files = {{saved.filename().string(), residency_json(rule).dump(2) + "\n"}};
    job.residency = {std::make_shared<ResidencySelector>(rule), rule, recipe.residency.ramp_steps,
                     recipe.residency.train_slots};
    model->set_selector(job.residency.selector);
  }
  job.model = model;
  job.options = recipe.train;
  job.losses =
      recipe_losses(recipe.losses, loaded.source, model->architecture().num_experts, model->architecture().top_k);
  job.loss_domains = recipe.loss_domains;
  job.nll_domains = recipe.nll.domains;
  job.distillation_weight = recipe.distillation.weight;
  job.distillation_domains = recipe.distillation.domains;
  const bool base_forward = job.distillation_weight > 0.0 ||
                            std::any_of(job.losses.begin(), job.losses.end(),
                                        [](const WeightedLoss& loss) { return loss.loss->needs_base_forward(); });
  if (job.distillation_weight > 0.0 && !recipe.distillation.teacher.empty()) {
    job.base_model = load_teacher(loaded, model->architecture(), job.losses, device, flags.quiet);
  } else if (base_forward && recipe.train.trainable == "all") {
    log_info("a second copy of the model is held for the base model's forward: train.trainable is all");
    job.base_model = load_model(recipe.model.path, dtype_from_recipe(recipe.model.dtype), device, flags.quiet);
  }
  job.train_data = &train_data;
  job.train_mix = recipe.data.train_mix;
  job.sequence_length = recipe.data.sequence_length;
  job.held_out = &held_out;
  job.seed = static_cast<std::uint64_t>(recipe.seed);
  job.run_dir = recipe.run_dir;
  job.resolved_recipe = resolved;
  job.label = label;
  job.resume = resume;
  // A control run that died before its first checkpoint has nothing to resume from, and nothing to lose.
  job.overwrite = flags.overwrite || (flags.resume && !resume);
  job.quiet = flags.quiet;
  job.stop = flags.stop;
  log_model(model, select_trainable(model, recipe.train.trainable));
  log_plan(recipe.train, recipe.data.sequence_length);
  const TrainingResult result = train(job);
  if (result.seconds > 0.0) {
    log_info(fmt::format("{}: {} steps in {}, {} tok/s", label, result.steps, format_seconds(result.seconds),
                         format_count(static_cast<double>(result.tokens) / result.seconds)));
  }
}

Json figures_of(const QualityResult& quality, const RoutingMetrics& metrics, std::int64_t slots,
                std::int64_t num_layers) {
  SimulationOptions simulation;
  simulation.slots = slots;
  const SimulationCounts counts = metrics.simulate(simulation);
  const double steps = static_cast<double>(metrics.num_counted() * num_layers);
  return {{"nll", quality.nll()},
          {"perplexity", quality.perplexity()},
          {"expert_overlap_ratio", metrics.expert_overlap_ratio()},
          {"distinct_experts", metrics.distinct_experts()},
          {"usage_entropy", metrics.usage().normalised_entropy},
          {"lru_slots", slots},
          {"lru_loads_per_token_layer", steps > 0.0 ? static_cast<double>(counts.loads) / steps : 0.0},
          {"lru_hit_rate", counts.hit_rate()}};
}

std::vector<torch::Tensor> copies_of_routers(MoeModel& model) {
  std::vector<torch::Tensor> copies;
  for (const torch::Tensor& router : model->routers()) {
    copies.push_back(router.detach().clone());
  }
  return copies;
}

void set_routers(MoeModel& model, const std::vector<torch::Tensor>& routers) {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> present = model->routers();
  for (std::size_t i = 0; i < routers.size(); ++i) {
    present[i].copy_(routers[i]);
  }
}

void add_quality(QualityResult& sum, const QualityResult& part) {
  sum.nll_sum += part.nll_sum;
  sum.labels += part.labels;
  sum.bytes += part.bytes;
}

// What the preference statistics are taken over.
PackedData export_data(const FinetuneRecipe& recipe, const Tokenizer& tokenizer, std::int64_t threads) {
  const ExportOptions& options = recipe.export_options;
  PackedData data = load_sample(recipe.data, recipe.data.train, tokenizer,
                                options.split == "train" ? Split::kTrain : Split::kHeldOut, options.tokens, threads);
  std::int64_t cut = 0;
  for (TokenSequence& sequence : data.sequences) {
    if (options.prompt_tokens > 0 && sequence.num_prompt_tokens == 0 &&
        static_cast<std::int64_t>(sequence.tokens.size()) > options.prompt_tokens) {
      sequence.num_prompt_tokens = options.prompt_tokens;
      cut += 1;
    }
  }
  if (options.prompt_tokens > 0) {
    log_info(fmt::format("export.prompt_tokens: the first {} tokens of {} of {} sequences count as their prompt",
                         options.prompt_tokens, cut, data.sequences.size()));
  }
  return data;
}

// Prompt tokens by the sequence ids that the export gives: in the order of the batches.
std::unordered_map<std::int64_t, std::vector<std::int64_t>> prompts_of(const std::vector<PackedBatch>& batches) {
  std::unordered_map<std::int64_t, std::vector<std::int64_t>> prompts;
  std::int64_t first_id = 0;
  for (const PackedBatch& batch : batches) {
    for (const SequenceRun& run : sequence_runs(layout_of(batch))) {
      std::int64_t end = run.begin;
      while (end < run.end && batch.counted[static_cast<std::size_t>(end)] == 0) {
        ++end;
      }
      prompts[first_id + run.id].assign(batch.tokens.begin() + run.begin, batch.tokens.begin() + end);
    }
    first_id += static_cast<std::int64_t>(batch.domains.size());
  }
  return prompts;
}

void write_prompts(const std::filesystem::path& path, PreferenceWriter& writer, const std::vector<PackedBatch>& batches,
                   const Tokenizer& tokenizer) {
  const auto prompts = prompts_of(batches);
  const PreferenceRows rows = writer.rows(PreferenceRouter::kTuned, 0, writer.num_stored());
  std::string lines;
  for (std::size_t i = 0; i < rows.ids.size(); ++i) {
    const std::vector<std::int64_t>& tokens = prompts.at(rows.ids[i]);
    if (tokens.empty()) {
      continue;
    }
    const Json line = {{"id", rows.ids[i]},
                       {"task", rows.tasks[i]},
                       {"prompt", tokenizer.decode(std::vector<std::int32_t>(tokens.begin(), tokens.end()))}};
    lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  write_text_atomically(path, lines);
}

constexpr const char* kPromptFile = "prompts.jsonl";

// What would otherwise show only after both routers have run over all text.
void check_predictor(const LoadedRecipe<FinetuneRecipe>& loaded, const Architecture& architecture) {
  const PredictorOptions& options = loaded.recipe.export_options.predictor;
  if (!options.enabled) {
    return;
  }
  for (const std::int64_t slots : options.slots) {
    if (slots < 1 || slots > architecture.num_experts) {
      throw UsageError(
          fmt::format("{}: export.predictor.slots must be from 1 to the model's experts per layer ({}), got {}",
                      loaded.source.location("export.predictor.slots"), architecture.num_experts, slots));
    }
  }
  if (!options.embeddings.empty()) {
    static_cast<void>(read_embeddings(options.embeddings, {}));
  }
}

PreferencePredictor make_predictor(const FinetuneRecipe& recipe, MoeModel& model,
                                   const std::vector<PackedBatch>& batches, PreferenceWriter& writer,
                                   std::int64_t slots) {
  const PredictorOptions& options = recipe.export_options.predictor;
  PredictorExamples examples = collect_examples(writer);
  if (options.embeddings.empty()) {
    const auto prompts = prompts_of(batches);
    const torch::Tensor embedding = token_embedding(model);
    std::vector<torch::Tensor> rows;
    for (const std::int64_t id : examples.ids) {
      rows.push_back(mean_embedding(embedding, prompts.at(id)));
    }
    examples.embeddings_ND = rows.empty() ? torch::zeros({0, embedding.size(1)}, torch::kFloat32) : torch::stack(rows);
    examples.embedding = kMeanTokenEmbedding;
  } else {
    examples.embeddings_ND = read_embeddings(options.embeddings, examples.ids);
    examples.embedding = "by sequence id from " + std::filesystem::path(options.embeddings).filename().string();
  }
  double first = std::numeric_limits<double>::quiet_NaN();
  double last = first;
  PreferencePredictor predictor = train_preference_predictor(
      examples, options, model->architecture().top_k, slots,
      derive_seed(static_cast<std::uint64_t>(recipe.seed), "predictor"), [&](std::int64_t epoch, double loss) {
        first = epoch == 1 ? loss : first;
        last = loss;
      });
  const PredictorReport& report = predictor.report;
  const auto decisive = static_cast<std::size_t>(
      std::find(report.slots.begin(), report.slots.end(), report.decisive_slots) - report.slots.begin());
  std::vector<std::pair<std::string, std::string>> rows = {
      {"sequences", fmt::format("{} to train on, {} held out, {} without prompt or answer", report.num_train,
                                report.num_held_out, report.num_left_out)},
      {"training loss", fmt::format("KL {:.4f} in epoch 1, {:.4f} in epoch {}", first, last, options.epochs)}};
  for (const PredictorFigures& figures : report.figures) {
    rows.emplace_back(figures.method, fmt::format("KL {:.4f}, {:.1f} % of requests in its top {} experts", figures.kl,
                                                  100.0 * figures.request_recall[decisive], report.decisive_slots));
  }
  rows.emplace_back("best", fmt::format("{} by requests, {} by KL", report.best_by_requests, report.best_by_kl));
  log_block("Preference predictor", rows);
  return predictor;
}

// A model directory of a run that trained all parameters, in the recipe's dtype; whole or not at all.
void write_whole_model(const FinetuneRecipe& recipe, const std::filesystem::path& checkpoint,
                       const std::filesystem::path& output, bool quiet) {
  if (std::filesystem::exists(output) &&
      !(std::filesystem::is_directory(output) && std::filesystem::is_empty(output))) {
    throw UsageError(fmt::format("{}: exists already; remove it or choose another --output", output.string()));
  }
  constexpr std::size_t kShardBytes = 5'000'000'000;
  const torch::Dtype dtype = dtype_from_recipe(recipe.model.dtype);
  MoeModel model = load_model(recipe.model.path, dtype, torch::kCPU, quiet);
  load_run_weights(model, checkpoint, recipe.train.trainable);
  AtomicFolder folder(output);
  save_model(model, folder.temporary(), dtype, kShardBytes);
  copy_tokenizer(recipe.model.path, folder.temporary());
  folder.commit();
}

std::vector<PackedBatch> all_batches(const PackedData& data, const TrainOptions& train, std::int64_t sequence_length) {
  return pack_for_evaluation(data, -1, train.rows_per_batch, sequence_length);
}

Architecture architecture_from(const ArchitectureOptions& options, const Tokenizer& tokenizer) {
  Architecture architecture = family_defaults(options.family);
  architecture.vocab_size = tokenizer.vocab_size();
  architecture.hidden_size = options.hidden_size;
  architecture.expert_intermediate_size = options.expert_intermediate_size;
  architecture.num_layers = options.num_layers;
  architecture.num_attention_heads = options.num_attention_heads;
  architecture.num_key_value_heads = options.num_key_value_heads;
  architecture.head_dim = options.hidden_size / options.num_attention_heads;
  architecture.num_experts = options.num_experts;
  architecture.top_k = options.top_k;
  architecture.normalise_top_k = options.normalise_top_k;
  architecture.rope.theta = options.rope_theta;
  architecture.tie_word_embeddings = options.tie_word_embeddings;
  architecture.max_position_embeddings = options.max_position_embeddings;
  architecture.initializer_range = options.initializer_range;
  architecture.bos_token_id = tokenizer.bos_id();
  architecture.eos_token_id = tokenizer.eos_id();
  architecture.pad_token_id = tokenizer.pad_id();
  // The trained model is read back from its config.json, which cannot say everything in every family.
  try {
    const Architecture again = parse_architecture(architecture_config(architecture), "architecture");
    if (again.normalise_top_k != architecture.normalise_top_k) {
      throw UsageError(fmt::format("architecture.normalise_top_k must be {} for the family {}, got {}; correct one",
                                   again.normalise_top_k, options.family, architecture.normalise_top_k));
    }
  } catch (const InputError& problem) {
    throw UsageError(problem.what());
  }
  return architecture;
}

// Trains the tokeniser on the training split, the same share of text from every domain.
void make_tokenizer(const PretrainRecipe& recipe, const std::filesystem::path& path, std::int64_t threads) {
  const std::int64_t share =
      std::max<std::int64_t>(1, recipe.tokenizer.sample_bytes / static_cast<std::int64_t>(recipe.data.train.size()));
  std::vector<std::string> lines;
  for (const std::string& domain : recipe.data.train) {
    const auto [corpus, key] = find_corpus(recipe.data, domain);
    CorpusOptions bounded = *corpus;
    bounded.max_bytes = bounded.max_bytes == 0 ? share : std::min(bounded.max_bytes, share);
    const SplitOptions split{recipe.data.held_out_fraction, static_cast<std::uint64_t>(recipe.data.split_seed)};
    for (Document& document : read_corpus(bounded, split, Split::kTrain, key)) {
      lines.push_back(document.text());
    }
  }
  TokenizerTraining training;
  training.vocab_size = recipe.tokenizer.vocab_size;
  training.num_threads = threads;
  training.special_tokens = recipe.tokenizer.special_tokens;
  std::size_t next = 0;
  log_info(fmt::format("training a tokenizer of {} tokens on {} documents", training.vocab_size, lines.size()));
  train_tokenizer(
      [&](std::string& sentence) {
        if (next == lines.size()) {
          return false;
        }
        sentence = std::move(lines[next++]);
        return true;
      },
      training, path);
}

// Bits per byte and expert usage of the finished model on every held-out domain.
Json pretraining_report(MoeModel& model, const PackedData& held_out, const PretrainRecipe& recipe) {
  const Architecture& architecture = model->architecture();
  Json report = Json::object();
  for (std::size_t domain = 0; domain < held_out.domains.size(); ++domain) {
    RoutingMetrics metrics(static_cast<std::int64_t>(architecture.moe_layers().size()), architecture.num_experts,
                           architecture.top_k, architecture.moe_layers(), 0);
    const auto batches = pack_for_evaluation(held_out, static_cast<std::int64_t>(domain), recipe.train.rows_per_batch,
                                             recipe.data.sequence_length);
    const QualityResult quality =
        measure(model, held_out, batches, false, [&](SequenceRouting&& routing) { metrics.add(routing); });
    const UsageStatistics usage = metrics.usage();
    report[held_out.domains[domain]] = {{"nll", quality.nll()},
                                        {"perplexity", quality.perplexity()},
                                        {"bits_per_byte", quality.bits_per_byte()},
                                        {"tokens", quality.labels},
                                        {"usage_entropy", usage.normalised_entropy},
                                        {"usage_cv", usage.coefficient_of_variation},
                                        {"max_share", usage.max_share},
                                        {"unused_experts", usage.unused_experts},
                                        {"expert_overlap_ratio", metrics.expert_overlap_ratio()},
                                        {"distinct_experts", metrics.distinct_experts()}};
  }
  return report;
}

// By how much the mean held-out loss fell between the evaluation nearest to 80 % of the steps and the last one.
Json flattening(const std::filesystem::path& metrics_path, std::int64_t steps) {
  std::vector<std::pair<std::int64_t, double>> losses;
  read_json_lines(metrics_path, [&](std::int64_t, const Json& event) {
    if (event.value("event", "") != "evaluate") {
      return;
    }
    double sum = 0.0;
    for (const auto& [domain, figures] : event.at("held_out").items()) {
      sum += figures.at("nll").get<double>();
    }
    losses.emplace_back(event.at("step").get<std::int64_t>(), sum / static_cast<double>(event.at("held_out").size()));
  });
  Json json = Json::object();
  const double target = 0.8 * static_cast<double>(steps);
  const std::pair<std::int64_t, double>* from = nullptr;
  for (const auto& entry : losses) {
    if (static_cast<double>(entry.first) <= target) {
      from = &entry;
    }
  }
  if (from != nullptr && losses.back().first == steps) {
    json["from_step"] = from->first;
    json["held_out_nll_then"] = from->second;
    json["held_out_nll_last"] = losses.back().second;
    json["relative_fall"] = (from->second - losses.back().second) / from->second;
  }
  return json;
}

// A bundle of a run's checkpoint, or of the base's own routers where there is none.
void write_router_bundle(const LoadedRecipe<FinetuneRecipe>& loaded, const std::string& recipe_text,
                         const std::optional<std::filesystem::path>& checkpoint, const std::filesystem::path& directory,
                         std::int64_t threads, bool quiet) {
  const FinetuneRecipe& recipe = loaded.recipe;
  check_predictor(loaded, read_architecture(recipe.model.path));
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(recipe.model.path);
  const PackedData data = export_data(recipe, *tokenizer, threads);
  if (recipe.export_options.predictor.enabled &&
      std::none_of(data.sequences.begin(), data.sequences.end(),
                   [](const TokenSequence& sequence) { return sequence.num_prompt_tokens > 0; })) {
    throw UsageError(fmt::format(
        "{}: export.predictor guesses from prompts, and no text of data.train has one; set export.prompt_tokens to "
        "take "
        "the first tokens of each text for its prompt, give the corpus a prompt_field, or switch the predictor off",
        loaded.source.location("export.predictor.enabled")));
  }
  const std::vector<PackedBatch> batches = all_batches(data, recipe.train, recipe.data.sequence_length);
  MoeModel model = load_model(recipe.model.path, dtype_from_recipe(recipe.model.dtype),
                              device_from_recipe(recipe.model.device), quiet);
  const Architecture& architecture = model->architecture();
  const std::vector<std::int64_t> layers = architecture.moe_layers();
  const auto num_layers = static_cast<std::int64_t>(layers.size());

  BundleManifest manifest;
  manifest.model_family = architecture.family;
  manifest.model_path = recipe.model.path;
  manifest.architecture = architecture_config(architecture);
  manifest.base_router_hash = router_hash(model);
  manifest.recipe = recipe_text;
  manifest.residency = checkpoint ? rule_of_run(loaded, model, *tokenizer, threads)
                                  : calibrated_rule(loaded, model, *tokenizer, threads);
  const std::int64_t slots = manifest.residency.slots;

  const std::vector<torch::Tensor> base_routers = copies_of_routers(model);
  const std::int64_t base_top_k = architecture.top_k;
  if (checkpoint) {
    load_checkpoint_weights(model, *checkpoint);
  }
  const std::vector<torch::Tensor> tuned_routers = copies_of_routers(model);
  const std::int64_t tuned_top_k = architecture.top_k;
  manifest.router_hash = router_hash(model);
  const auto serve = [&](bool tuned) {
    set_routers(model, tuned ? tuned_routers : base_routers);
    model->set_adapters_enabled(tuned);
    model->set_top_k(tuned ? tuned_top_k : base_top_k);
    if (manifest.residency.lambda > 0.0) {
      model->set_selector(tuned ? std::shared_ptr<Selector>(std::make_shared<ResidencySelector>(manifest.residency))
                                : std::make_shared<TopKSelector>());
    }
  };

  std::filesystem::create_directories(directory);
  PreferenceWriterOptions storage;
  storage.max_sequences = recipe.export_options.max_sequences;
  storage.seed = derive_seed(static_cast<std::uint64_t>(recipe.seed), "preferences");
  PreferenceWriter writer(directory / "preferences.h5", num_layers, architecture.num_experts, layers, storage);
  Progress progress("export", 2 * data.num_tokens(), "tok", quiet);
  const auto advance = [&](std::int64_t tokens) { progress.advance(tokens); };
  RoutingMetrics baseline_metrics(num_layers, architecture.num_experts, base_top_k, layers, 0);
  RoutingMetrics tuned_metrics(num_layers, architecture.num_experts, tuned_top_k, layers, 0);
  QualityResult baseline_quality;
  QualityResult tuned_quality;
  // Both routers batch by batch, so that probabilities of one batch are all that is held.
  std::int64_t first_id = 0;
  for (const PackedBatch& batch : batches) {
    std::vector<SequenceRouting> baseline;
    serve(false);
    add_quality(baseline_quality, measure(
                                      model, data, {batch}, true,
                                      [&](SequenceRouting&& routing) {
                                        routing.id += first_id;
                                        baseline_metrics.add(routing);
                                        baseline.push_back(std::move(routing));
                                      },
                                      advance));
    serve(true);
    std::size_t next = 0;
    add_quality(tuned_quality, measure(
                                   model, data, {batch}, true,
                                   [&](SequenceRouting&& routing) {
                                     routing.id += first_id;
                                     tuned_metrics.add(routing);
                                     writer.add(baseline.at(next++), routing);
                                   },
                                   advance));
    first_id += static_cast<std::int64_t>(batch.domains.size());
  }
  progress.finish();
  manifest.metrics = {{"domains", recipe.data.train},
                      {"baseline", figures_of(baseline_quality, baseline_metrics, slots, num_layers)},
                      {"tuned", figures_of(tuned_quality, tuned_metrics, slots, num_layers)}};
  std::optional<PreferencePredictor> predictor;
  if (recipe.export_options.predictor.enabled) {
    predictor = make_predictor(recipe, model, batches, writer, slots);
    manifest.predictor = predictor_json(*predictor);
  }
  if (recipe.export_options.write_prompts) {
    write_prompts(directory / kPromptFile, writer, batches, *tokenizer);
  } else {
    std::filesystem::remove(directory / kPromptFile);  // an earlier export's, by ids of other sequences
  }
  writer.close(predictor ? &*predictor : nullptr);
  write_bundle(directory, model, manifest);
  log_info(fmt::format("router bundle in {}", directory.string()));
}

}  // namespace

void run_finetune(const LoadedRecipe<FinetuneRecipe>& loaded, const RunFlags& flags) {
  FinetuneRecipe recipe = loaded.recipe;
  const std::int64_t threads = use_threads(recipe.model.threads);
  log_recipe(loaded.source, recipe.run_dir, recipe.seed);
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(recipe.model.path);
  Problems problems;
  check_train_fits(recipe.train, loaded.source, read_architecture(recipe.model.path), problems);
  problems.throw_usage_if_any();
  if (recipe.train.trainable == "all") {
    log_warning(
        fmt::format("{}: what train.trainable \"all\" tunes stays in the run, where hestia evaluate --checkpoint "
                    "measures it, and can be exported as a whole only (--to hf)",
                    loaded.source.location("train.trainable")));
  }
  const PackedData train_data = load_training_data(recipe.data, *tokenizer, threads);
  const PackedData held_out = load_sample(recipe.data, recipe.data.evaluate, *tokenizer, Split::kHeldOut,
                                          recipe.train.evaluate_tokens, threads);
  log_data(train_data, held_out);
  resolve_steps(recipe.train, train_data, recipe.data.train_mix, recipe.data.sequence_length,
                static_cast<std::uint64_t>(recipe.seed), loaded.source);
  const bool resume_main = flags.resume;
  if (resume_main && is_finished(recipe.run_dir, recipe.train.steps)) {
    check_same_recipe(recipe.run_dir, save_recipe(recipe.fields()));
    log_info(fmt::format("{}: all {} steps are done already", recipe.run_dir, recipe.train.steps));
  } else {
    finetune_once({recipe, loaded.source}, save_recipe(recipe.fields()), "tune", train_data, held_out, flags,
                  resume_main);
  }
  if (recipe.control.enabled) {
    FinetuneRecipe control = control_recipe(recipe);
    const bool started = latest_checkpoint(control.run_dir).has_value();
    if (flags.resume && is_finished(control.run_dir, control.train.steps)) {
      check_same_recipe(control.run_dir, save_recipe(control.fields()));
      log_info(fmt::format("{}: all {} steps are done already", control.run_dir, control.train.steps));
    } else {
      log_info("control: plain NLL tuning with the same trainable set, data and steps");
      finetune_once({control, loaded.source}, save_recipe(control.fields()), "control", train_data, held_out, flags,
                    flags.resume && started);
    }
  }
}

void run_pretrain(const LoadedRecipe<PretrainRecipe>& loaded, const RunFlags& flags) {
  PretrainRecipe recipe = loaded.recipe;
  const std::int64_t threads = use_threads(recipe.model.threads);
  log_recipe(loaded.source, recipe.run_dir, recipe.seed);
  const std::filesystem::path run_dir = recipe.run_dir;
  std::filesystem::path tokenizer_path = recipe.tokenizer.path;
  if (flags.overwrite && !tokenizer_path.empty()) {
    const std::filesystem::path inside = std::filesystem::weakly_canonical(tokenizer_path)
                                             .lexically_relative(std::filesystem::weakly_canonical(run_dir / "model"));
    if (!inside.empty() && *inside.begin() != "..") {
      throw UsageError(
          fmt::format("{}: tokenizer.path lies in the model that --overwrite removes, got {}; copy it first",
                      loaded.source.location("tokenizer.path"), tokenizer_path.string()));
    }
  }
  if (tokenizer_path.empty()) {
    tokenizer_path = run_dir / "tokenizer.model";
    if (!flags.resume || !std::filesystem::exists(tokenizer_path)) {
      if (!flags.overwrite && std::filesystem::exists(run_dir / "recipe.yaml")) {
        throw UsageError(
            fmt::format("{}: holds a run already; go on with --resume, start afresh with --overwrite, or "
                        "choose another run_dir",
                        run_dir.string()));
      }
      std::filesystem::create_directories(run_dir);
      make_tokenizer(recipe, tokenizer_path, threads);
    }
  }
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(tokenizer_path);
  const Architecture architecture = architecture_from(recipe.architecture, *tokenizer);
  Problems problems;
  check_train_fits(recipe.train, loaded.source, architecture, problems);
  problems.throw_usage_if_any();
  const PackedData train_data = load_training_data(recipe.data, *tokenizer, threads);
  const PackedData held_out = load_sample(recipe.data, recipe.data.evaluate, *tokenizer, Split::kHeldOut,
                                          recipe.train.evaluate_tokens, threads);
  log_data(train_data, held_out);
  resolve_steps(recipe.train, train_data, recipe.data.train_mix, recipe.data.sequence_length,
                static_cast<std::uint64_t>(recipe.seed), loaded.source);
  const torch::Device device = device_from_recipe(recipe.model.device);
  MoeModel model = create_model(architecture, dtype_from_recipe(recipe.model.dtype), device,
                                derive_seed(static_cast<std::uint64_t>(recipe.seed), "weights"));
  model->set_activation_checkpointing(recipe.model.activation_checkpointing);
  model->set_router_gradient_of_all(recipe.train.router_gradient == "all");
  TrainingJob job;
  job.model = model;
  job.options = recipe.train;
  for (WeightedLoss& loss :
       recipe_losses(recipe.losses, loaded.source, model->architecture().num_experts, model->architecture().top_k)) {
    if (!loss.loss->needs_reference() && !loss.loss->needs_base_forward()) {
      job.losses.push_back(std::move(loss));
    }
  }
  job.train_data = &train_data;
  job.train_mix = recipe.data.train_mix;
  job.sequence_length = recipe.data.sequence_length;
  job.held_out = held_out.domains.empty() ? nullptr : &held_out;
  job.seed = static_cast<std::uint64_t>(recipe.seed);
  job.run_dir = run_dir;
  job.resolved_recipe = save_recipe(recipe.fields());
  job.label = "pretrain";
  job.outputs = {"model", "report.json"};
  job.resume = flags.resume;
  job.overwrite = flags.overwrite;
  job.quiet = flags.quiet;
  job.stop = flags.stop;
  log_model(model, select_trainable(model, "all"));
  log_plan(recipe.train, recipe.data.sequence_length);
  const TrainingResult result = train(job);

  const std::filesystem::path output = run_dir / "model";
  std::filesystem::create_directories(output);
  save_model(model, output, dtype_from_recipe(recipe.save.dtype),
             static_cast<std::size_t>(recipe.save.max_shard_bytes));
  copy_tokenizer(tokenizer_path, output);
  Json report;
  report["format_version"] = 1;
  report["steps"] = recipe.train.steps;
  report["tokens_this_process"] = result.tokens;
  report["seconds_this_process"] = result.seconds;
  report["training_tokens_available"] = train_data.num_tokens();
  report["parameters"] = model->architecture().total_parameters();
  report["device"] = device_text(device);
  report["flattening"] = flattening(run_dir / "metrics.jsonl", recipe.train.steps);
  if (!held_out.domains.empty()) {
    // Of the model as saved: what a reader of the directory gets.
    MoeModel saved = load_model(output, dtype_from_recipe(recipe.model.dtype), device, flags.quiet);
    report["held_out"] = pretraining_report(saved, held_out, recipe);
  }
  report["degradations"] = degradations();
  write_text_atomically(run_dir / "report.json", report.dump(2) + "\n");
  log_info(fmt::format("model in {}, report in {}", output.string(), (run_dir / "report.json").string()));
}

std::vector<std::string> export_formats() {
  return {"bundle", "hf", "gguf"};
}

std::filesystem::path run_export(const LoadedRecipe<FinetuneRecipe>& loaded, const ExportTarget& target, bool quiet) {
  const std::string& to = target.to;
  const std::vector<std::string> formats = export_formats();
  if (std::find(formats.begin(), formats.end(), to) == formats.end()) {
    throw UsageError(fmt::format("--to must be one of {}, got \"{}\"; choose one", fmt::join(formats, ", "), to));
  }
  if ((to == "gguf") != !target.gguf.empty()) {
    throw UsageError(to == "gguf" ? "--to gguf replaces routers in the base model's GGUF file, got none; give it with "
                                    "--gguf BASE.gguf"
                                  : fmt::format("--gguf is for --to gguf, got --to {}; leave it out", to));
  }
  const std::int64_t threads = use_threads(loaded.recipe.model.threads);
  if (target.untuned) {
    if (to != "bundle") {
      throw UsageError(
          fmt::format("--untuned writes a bundle: its model is the base as it is, got --to {}; leave one out", to));
    }
    if (loaded.recipe.residency.lambda == 0.0) {
      throw UsageError(
          fmt::format("{}: --untuned exports the model's own routers under a residency rule, got residency.lambda 0, "
                      "which is plain Top-K; set it, for example to 0.2",
                      loaded.source.location("residency.lambda")));
    }
    std::filesystem::path directory =
        target.output.empty() ? std::filesystem::path(loaded.recipe.run_dir) / "untuned" : target.output;
    write_router_bundle(loaded, save_recipe(FinetuneRecipe(loaded.recipe).fields()), std::nullopt, directory, threads,
                        quiet);
    return directory;
  }
  FinetuneRecipe recipe = loaded.recipe;
  resolve_steps_from_run(recipe.train, recipe.run_dir, loaded.source);
  const auto latest = latest_checkpoint(recipe.run_dir);
  if (!latest || latest->first < recipe.train.steps) {
    const std::string command = "hestia finetune " + recipe_words(loaded.source);
    const std::string whole = recipe.train.steps > 0 ? fmt::format("{} steps", recipe.train.steps)
                                                     : fmt::format("{} epochs", recipe.train.epochs);
    throw UsageError(fmt::format("{}: the run is not finished ({} of {}); finish it with `{}{}`", recipe.run_dir,
                                 latest ? latest->first : 0, whole, command, latest ? " --resume" : ""));
  }
  if (recipe.train.trainable == "all" && to != "hf") {
    throw UsageError(
        fmt::format("{}: routers and adapters can be exported, got train.trainable \"{}\"; write the whole model "
                    "with --to hf, or tune with train.trainable=router or router+lora",
                    loaded.source.location("train.trainable"), recipe.train.trainable));
  }
  std::filesystem::path directory = target.output;
  if (directory.empty()) {
    directory = std::filesystem::path(recipe.run_dir) / to;
    if (to == "gguf") {
      directory /= target.gguf.filename();
    }
  }
  if (to != "bundle" && std::filesystem::exists(residency_path(recipe.run_dir))) {
    const ResidencyRule rule = read_residency(residency_path(recipe.run_dir));
    log_warning(
        fmt::format("{}: the run trained under residency-aware routing ({}, J {}, {} slots), which --to "
                    "{} has no place for; only --to bundle hands it on",
                    recipe.run_dir, lambda_text(rule), rule.always_keep, rule.slots, to));
  }
  if (to == "gguf") {
    write_tuned_gguf(recipe.model.path, tuned_parts(latest->second, read_architecture(recipe.model.path)), target.gguf,
                     directory);
    log_info(fmt::format("tuned model in {}", directory.string()));
    return directory;
  }
  if (to == "hf" && recipe.train.trainable == "all") {
    write_whole_model(recipe, latest->second, directory, quiet);
    log_info(fmt::format("tuned model in {}", directory.string()));
    return directory;
  }
  if (to == "hf") {
    write_tuned_checkpoint(recipe.model.path, tuned_parts(latest->second, read_architecture(recipe.model.path)),
                           directory);
    log_info(fmt::format("tuned model in {}", directory.string()));
    return directory;
  }
  // Of the run: overrides that are missing now were part of it.
  write_router_bundle({recipe, loaded.source}, read_text_file(std::filesystem::path(recipe.run_dir) / "recipe.yaml"),
                      latest->second, directory, threads, quiet);
  return directory;
}

}  // namespace hestia
