#include "hestia/trainer/trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>
#include <set>
#include <stdexcept>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>
#include <torch/optim/adamw.h>

#include "hestia/core/files.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/core/random.hpp"
#include "hestia/model/adapters.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/trainer/distillation.hpp"
#include "hestia/trainer/measure.hpp"

namespace hestia {

namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kDoneMarker = "DONE";
constexpr const char* kRouterFile = "router.safetensors";
constexpr const char* kAdapterFile = "adapters.safetensors";
constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr std::int64_t kStateFormat = 1;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::filesystem::path checkpoint_folder(const std::filesystem::path& run_dir, std::int64_t step) {
  return run_dir / "checkpoints" / fmt::format("step_{}", step);
}

void fsync_folder(const std::filesystem::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    ::fsync(descriptor);
    ::close(descriptor);
  }
}

std::vector<std::pair<std::int64_t, std::filesystem::path>> complete_checkpoints(const std::filesystem::path& run_dir) {
  std::vector<std::pair<std::int64_t, std::filesystem::path>> found;
  const std::filesystem::path folder = run_dir / "checkpoints";
  if (!std::filesystem::is_directory(folder)) {
    return found;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("step_", 0) == 0 && name.find_first_not_of("0123456789", 5) == std::string::npos &&
        name.size() > 5 && std::filesystem::exists(entry.path() / kDoneMarker)) {
      found.emplace_back(std::stoll(name.substr(5)), entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

// AdamW over float32 master copies: a parameter of a narrower type gets one, a float32 parameter is its own master.
class Optimizer {
 public:
  Optimizer(std::vector<torch::Tensor> parameters, const std::vector<torch::Tensor>& matrices,
            const TrainOptions& options)
      : parameters_(std::move(parameters)) {
    std::set<const void*> weights;
    for (const torch::Tensor& matrix : matrices) {
      weights.insert(matrix.unsafeGetTensorImpl());
    }
    std::vector<torch::Tensor> decayed;
    std::vector<torch::Tensor> plain;
    for (const torch::Tensor& parameter : parameters_) {
      torch::Tensor master = parameter;
      if (parameter.scalar_type() != torch::kFloat32) {
        master = parameter.detach().to(torch::kFloat32).set_requires_grad(true);
      }
      masters_.push_back(master);
      (weights.count(parameter.unsafeGetTensorImpl()) > 0 ? decayed : plain).push_back(master);
    }
    torch::optim::AdamWOptions adam(options.learning_rate);
    adam.betas({options.beta1, options.beta2}).eps(options.epsilon).weight_decay(options.weight_decay);
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(decayed, std::make_unique<torch::optim::AdamWOptions>(adam));
    if (!plain.empty()) {
      adam.weight_decay(0.0);
      groups.emplace_back(plain, std::make_unique<torch::optim::AdamWOptions>(adam));
    }
    adamw_ = std::make_unique<torch::optim::AdamW>(groups, adam);
  }

  // Hands the gradients to the masters and returns their global norm.
  double collect_gradients() {
    std::vector<torch::Tensor> squares;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      torch::Tensor gradient = parameters_[i].grad();
      if (!gradient.defined()) {
        continue;
      }
      if (!masters_[i].is_same(parameters_[i])) {
        masters_[i].mutable_grad() = gradient.to(torch::kFloat32);
        parameters_[i].mutable_grad() = torch::Tensor();
      }
      squares.push_back(masters_[i].grad().to(torch::kFloat32).square().sum());
    }
    return squares.empty() ? 0.0 : std::sqrt(torch::stack(squares).sum().item<double>());
  }

  void step(double learning_rate, double gradient_scale) {
    const torch::NoGradGuard no_grad;
    if (gradient_scale != 1.0) {
      for (torch::Tensor& master : masters_) {
        if (master.grad().defined()) {
          master.mutable_grad().mul_(gradient_scale);
        }
      }
    }
    for (auto& group : adamw_->param_groups()) {
      group.options().set_lr(learning_rate);
    }
    adamw_->step();
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!masters_[i].is_same(parameters_[i])) {
        parameters_[i].copy_(masters_[i]);
      }
      masters_[i].mutable_grad() = torch::Tensor();
    }
  }

  void save(const std::filesystem::path& folder) {
    std::vector<std::pair<std::string, torch::Tensor>> tensors;
    std::int64_t steps = 0;
    for (std::size_t i = 0; i < masters_.size(); ++i) {
      tensors.emplace_back(fmt::format("master.{}", i), masters_[i].detach());
      const auto entry = adamw_->state().find(masters_[i].unsafeGetTensorImpl());
      if (entry != adamw_->state().end()) {
        const auto& state = static_cast<const torch::optim::AdamWParamState&>(*entry->second);
        tensors.emplace_back(fmt::format("exp_avg.{}", i), state.exp_avg());
        tensors.emplace_back(fmt::format("exp_avg_sq.{}", i), state.exp_avg_sq());
        steps = state.step();
      }
    }
    write_tensors(folder / kOptimizerFile, tensors,
                  {{"format", "hestia optimizer 1"}, {"step", std::to_string(steps)}});
  }

  void load(const std::filesystem::path& folder) {
    const torch::NoGradGuard no_grad;
    const SafetensorsFile file(folder / kOptimizerFile);
    const auto step_text = file.metadata().find("step");
    if (step_text == file.metadata().end()) {
      throw InputError(
          fmt::format("{}: the optimiser's step is missing; remove this checkpoint and resume from an older one",
                      file.path().string()));
    }
    for (std::size_t i = 0; i < masters_.size(); ++i) {
      copy_into(file.tensor(fmt::format("master.{}", i)), masters_[i]);
      if (!masters_[i].is_same(parameters_[i])) {
        parameters_[i].copy_(masters_[i]);
      }
      const std::string average = fmt::format("exp_avg.{}", i);
      if (file.contains(average)) {
        auto state = std::make_unique<torch::optim::AdamWParamState>();
        torch::Tensor first = torch::empty_like(masters_[i]).detach();
        torch::Tensor second = torch::empty_like(masters_[i]).detach();
        copy_into(file.tensor(average), first);
        copy_into(file.tensor(fmt::format("exp_avg_sq.{}", i)), second);
        state->exp_avg(first);
        state->exp_avg_sq(second);
        state->step(std::stoll(step_text->second));
        adamw_->state()[masters_[i].unsafeGetTensorImpl()] = std::move(state);
      }
    }
  }

 private:
  std::vector<torch::Tensor> parameters_;
  std::vector<torch::Tensor> masters_;
  std::unique_ptr<torch::optim::AdamW> adamw_;
};

void save_checkpoint(const TrainingJob& job, MoeModel& model, Optimizer& optimizer, std::int64_t step,
                     std::int64_t position) {
  const std::filesystem::path final_folder = checkpoint_folder(job.run_dir, step);
  if (std::filesystem::exists(final_folder / kDoneMarker)) {
    return;  // This very step is saved already.
  }
  std::filesystem::path folder = final_folder;
  folder += ".tmp";
  std::filesystem::remove_all(folder);
  std::filesystem::remove_all(final_folder);
  std::filesystem::create_directories(folder);
  save_routers(model, folder / kRouterFile);
  if (model->adapter_settings()) {
    save_adapters(model, folder / kAdapterFile);
  }
  optimizer.save(folder);
  const Json state = {{"format_version", kStateFormat},
                      {"step", step},
                      {"data_position", position},
                      {"seed", job.seed},
                      {"top_k", model->architecture().top_k}};
  write_text_atomically(folder / "state.json", state.dump(2) + "\n");
  write_text_atomically(folder / kDoneMarker, "");
  fsync_folder(folder);
  std::filesystem::rename(folder, final_folder);
  fsync_folder(final_folder.parent_path());
  const auto all = complete_checkpoints(job.run_dir);
  for (std::size_t i = 0; i + static_cast<std::size_t>(job.options.keep_checkpoints) < all.size(); ++i) {
    std::filesystem::remove_all(all[i].second);
  }
}

// state.json of a checkpoint.
class CheckpointState {
 public:
  explicit CheckpointState(const std::filesystem::path& folder)
      : path_(folder / "state.json"), json_(read_json_file(path_)) {
    if (const std::int64_t version = number("format_version"); version != kStateFormat) {
      throw InputError(
          fmt::format("{}: format version {} is not one this program supports ({}); resume with the program that wrote "
                      "it, or start afresh with --overwrite",
                      path_.string(), version, kStateFormat));
    }
  }
  [[nodiscard]] bool has(const char* key) const { return json_.is_object() && json_.contains(key); }
  [[nodiscard]] std::int64_t number(const char* key) const {
    if (!has(key) || !json_[key].is_number_integer()) {
      throw InputError(fmt::format(
          "{}: key \"{}\" must be a whole number, got {}; remove this checkpoint to resume from an older one",
          path_.string(), key, has(key) ? json_[key].dump() : "nothing"));
    }
    return json_[key].get<std::int64_t>();
  }

 private:
  std::filesystem::path path_;
  Json json_;
};

// Names the first lines in which two resolved recipes differ.
std::string first_difference(const std::string& saved, const std::string& now) {
  std::istringstream a(saved);
  std::istringstream b(now);
  std::string line_a;
  std::string line_b;
  while (true) {
    const bool more_a = static_cast<bool>(std::getline(a, line_a));
    const bool more_b = static_cast<bool>(std::getline(b, line_b));
    if (!more_a && !more_b) {
      return "";
    }
    if (!more_a || !more_b || line_a != line_b) {
      return fmt::format("was \"{}\", is \"{}\"", more_a ? line_a : "", more_b ? line_b : "");
    }
  }
}

// Drops the metrics of steps after `step`, and a line that was cut off: they were logged by a run that did not live to
// save them.
void trim_metrics(const std::filesystem::path& path, std::int64_t step) {
  if (!std::filesystem::exists(path)) {
    return;
  }
  std::string text = read_text_file(path);
  text.resize(text.find_last_of('\n') + 1);  // to nothing, where no line is whole
  write_text_atomically(path, text);
  std::string kept;
  read_json_lines(path, [&](std::int64_t, const Json& object) {
    if (!object.contains("step") || object.at("step").get<std::int64_t>() <= step) {
      kept += object.dump() + "\n";
    }
  });
  write_text_atomically(path, kept);
}

// Per domain of `data`: whether `names` holds it; of all, when it is empty.
std::vector<bool> domains_named(const std::vector<std::string>& names, const PackedData& data) {
  std::vector<bool> named;
  for (const std::string& domain : data.domains) {
    named.push_back(names.empty() || std::find(names.begin(), names.end(), domain) != names.end());
  }
  return named;
}

// `values`, one per token of the batch, with `other` where the token's domain is not `named`.
template <class T>
std::vector<T> of_domains(std::vector<T> values, const PackedBatch& batch, const std::vector<bool>& named, T other) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::int64_t sequence = batch.sequence_ids[i];
    if (sequence >= 0 && !named[static_cast<std::size_t>(batch.domains[static_cast<std::size_t>(sequence)])]) {
      values[i] = other;
    }
  }
  return values;
}

// Total and per-term values of one optimiser step.
struct StepValues {
  double loss = 0.0;
  double nll = 0.0;
  double distillation = 0.0;
  std::vector<double> terms;  // NaN: not computed at this step
};

// What weight decay is for: all but norms and biases, which experts stacked in one tensor have as matrices too.
std::vector<torch::Tensor> matrices_of(MoeModel& model) {
  std::vector<torch::Tensor> matrices = model->adapters();
  for (const auto& parameter : model->named_parameters(/*recurse=*/false)) {
    if (parameter.value().dim() >= 2 && !parameter.key().ends_with("bias")) {
      matrices.push_back(parameter.value());
    }
  }
  return matrices;
}

class Loop {
 public:
  explicit Loop(const TrainingJob& job)
      : job_(job),
        model_(job.model),
        base_top_k_(job.model->architecture().top_k),
        parameters_(select_trainable(model_, job.options.trainable)),
        optimizer_(parameters_, matrices_of(model_), job.options),
        sampler_(*job.train_data, job.options.rows_per_batch, job.sequence_length, data_order_seed(job.seed),
                 job.train_mix),
        loss_domains_(domains_named(job.loss_domains, *job.train_data)),
        nll_domains_(domains_named(job.nll_domains, *job.train_data)),
        distillation_domains_(domains_named(job.distillation_domains, *job.train_data)) {
    if (job.held_out != nullptr) {
      for (std::size_t domain = 0; domain < job.held_out->domains.size(); ++domain) {
        held_out_batches_.push_back(pack_for_evaluation(*job.held_out, static_cast<std::int64_t>(domain),
                                                        job.options.rows_per_batch, job.sequence_length));
      }
    }
  }

  TrainingResult run() {
    const std::int64_t first = open_run();
    model_->set_top_k(top_k_at(job_.options, first, base_top_k_));
    const bool evaluation_due = first > 0 && first < job_.options.steps && evaluates_at(first) && !evaluated_at(first);
    JsonLinesWriter metrics(job_.run_dir / "metrics.jsonl");
    if (first == 0) {
      metrics.write(start_event());
    }
    if (evaluation_due) {  // the interruption had not waited for it
      metrics.write({{"event", "evaluate"}, {"step", first}, {"held_out", evaluate()}});
    }
    TrainingResult result;
    Progress progress(job_.label, job_.options.steps - first, "step", job_.quiet);
    for (std::int64_t step = first + 1; step <= job_.options.steps; ++step) {
      const Clock::time_point start = Clock::now();
      const bool logged = step == 1 || step == job_.options.steps || step % job_.options.log_every == 0;
      std::int64_t tokens = 0;
      if (const std::int64_t top_k = top_k_at(job_.options, step, base_top_k_); top_k != model_->architecture().top_k) {
        progress.print_line(fmt::format("step {}: {} experts per token from here on, {} before", step, top_k,
                                        model_->architecture().top_k));
        model_->set_top_k(top_k);
      }
      if (job_.residency.selector) {
        job_.residency.selector->set_rule(job_.residency.at(step));
      }
      const StepValues values = forward_backward(step, logged, tokens);
      const double norm = optimizer_.collect_gradients();
      if (!std::isfinite(values.loss) || !std::isfinite(norm)) {
        throw RunError(fmt::format(
            "step {}: the {} is not finite, got loss {} and gradient norm {}; nothing was updated; lower "
            "train.learning_rate or the "
            "weights under losses (last checkpoint: {})",
            step, std::isfinite(values.loss) ? "gradient" : "loss", values.loss, norm, last_checkpoint_text()));
      }
      const double clip = job_.options.clip_norm;
      const double rate = job_.options.learning_rate * learning_rate_at(job_.options, step);
      optimizer_.step(rate, clip > 0.0 && norm > clip ? clip / (norm + 1e-6) : 1.0);
      const double seconds = seconds_since(start);
      result.seconds += seconds;
      result.tokens += tokens;
      result.steps = step;
      if (logged || job_.on_step) {
        const Json event = step_event(step, values, norm, rate, seconds, tokens);
        if (logged) {
          metrics.write(event);
          progress.print_line(step_line(step, values, norm, rate, seconds, tokens));
        }
        if (job_.on_step) {
          job_.on_step(event);
        }
      }
      if (job_.residency.selector) {
        job_.residency.selector->set_rule(job_.residency.rule);
      }
      progress.advance(1, fmt::format("loss {:.4f}", values.loss));
      const bool last = step == job_.options.steps;
      const bool stopping = job_.stop != nullptr && job_.stop->load();
      if (evaluates_at(step) && (last || !stopping)) {
        const Json held_out = evaluate();
        metrics.write({{"event", "evaluate"}, {"step", step}, {"held_out", held_out}});
        progress.print_line(evaluate_line(step, held_out));
      }
      if (last || stopping || (job_.options.checkpoint_every > 0 && step % job_.options.checkpoint_every == 0)) {
        save_checkpoint(job_, model_, optimizer_, step, sampler_.position());
      }
      if (stopping && !last) {
        progress.finish();
        throw InterruptedError(fmt::format("interrupted after step {}; saved in {}, go on with --resume", step,
                                           checkpoint_folder(job_.run_dir, step).string()));
      }
    }
    progress.finish();
    return result;
  }

 private:
  [[nodiscard]] bool evaluates_at(std::int64_t step) const {
    const std::int64_t every = job_.options.evaluate_every;
    return !held_out_batches_.empty() && (step == job_.options.steps || (every > 0 && step % every == 0));
  }

  // Whether metrics.jsonl has the evaluation of that step.
  [[nodiscard]] bool evaluated_at(std::int64_t step) const {
    bool found = false;
    if (!std::filesystem::exists(job_.run_dir / "metrics.jsonl")) {
      return false;
    }
    read_json_lines(job_.run_dir / "metrics.jsonl", [&](std::int64_t, const Json& event) {
      found = found || (event.value("event", "") == "evaluate" && event.value("step", std::int64_t{0}) == step);
    });
    return found;
  }

  // Prepares the run directory; returns the step to go on from.
  std::int64_t open_run() {
    const std::filesystem::path recipe_path = job_.run_dir / "recipe.yaml";
    if (job_.overwrite) {
      // With what was made from the earlier run: evaluate would take it for this one's.
      std::vector<std::string> names = {"checkpoints",
                                        "metrics.jsonl",
                                        "recipe.yaml",
                                        "residency.json",
                                        "control",
                                        "bundle",
                                        "hf",
                                        "gguf",
                                        "results.json",
                                        "answers.jsonl",
                                        "results.previous.json",
                                        "answers.previous.jsonl"};
      names.insert(names.end(), job_.outputs.begin(), job_.outputs.end());
      for (const std::string& name : names) {
        std::filesystem::remove_all(job_.run_dir / name);
      }
    }
    const auto latest = latest_checkpoint(job_.run_dir);
    if (job_.resume) {
      if (!latest) {
        throw UsageError(
            fmt::format("{}: there is no checkpoint to resume from; start {}", job_.run_dir.string(),
                        std::filesystem::exists(recipe_path) ? "afresh with --overwrite" : "without --resume"));
      }
      check_same_recipe(job_.run_dir, job_.resolved_recipe);
      const auto& [step, folder] = *latest;
      const std::int64_t position = CheckpointState(folder).number("data_position");
      optimizer_.load(folder);
      sampler_.seek(position);
      trim_metrics(job_.run_dir / "metrics.jsonl", step);
      log_info(fmt::format("resuming {} at step {}", job_.run_dir.string(), step));
      return step;
    }
    if (std::filesystem::exists(recipe_path)) {
      throw UsageError(fmt::format(
          "{}: holds a run already{}start afresh with --overwrite, or choose another run_dir", job_.run_dir.string(),
          latest ? fmt::format(" (step {} of it is saved); go on with --resume, ", latest->first)
                 : ", which saved no checkpoint; "));
    }
    std::filesystem::create_directories(job_.run_dir);
    for (const auto& [name, text] : job_.run_files) {
      write_text_atomically(job_.run_dir / name, text);
    }
    write_text_atomically(recipe_path, job_.resolved_recipe);
    return 0;
  }

  StepValues forward_backward(std::int64_t step, bool logged, std::int64_t& tokens) {
    struct MicroBatch {
      PackedBatch batch;
      std::unique_ptr<LayoutTensors> layout;
      std::vector<std::int64_t> learned;    // its labels that the language-model loss counts
      std::vector<std::int64_t> distilled;  // and distillation
    };
    constexpr std::int64_t kNoLabel = -100;
    const auto number_of = [](const std::vector<std::int64_t>& token_labels) {
      return static_cast<double>(
          std::count_if(token_labels.begin(), token_labels.end(), [](std::int64_t label) { return label >= 0; }));
    };
    // Divisors first: they depend on the layout alone, so micro-batches can be scaled before any forward.
    std::vector<MicroBatch> micro_batches;
    double labels = 0.0;
    double distilled = 0.0;
    std::vector<double> counts(job_.losses.size(), 0.0);
    for (std::int64_t i = 0; i < job_.options.accumulate; ++i) {
      MicroBatch micro{sampler_.next(), nullptr, {}, {}};
      SequenceLayout layout = layout_of(micro.batch);
      layout.counted = of_domains<std::uint8_t>(std::move(layout.counted), micro.batch, loss_domains_, 0);
      micro.layout = std::make_unique<LayoutTensors>(layout, model_->device());
      micro.learned = of_domains(micro.batch.labels, micro.batch, nll_domains_, kNoLabel);
      labels += number_of(micro.learned);
      if (job_.distillation_weight > 0.0) {
        micro.distilled = of_domains(micro.batch.labels, micro.batch, distillation_domains_, kNoLabel);
        distilled += number_of(micro.distilled);
      }
      for (std::size_t term = 0; term < counts.size(); ++term) {
        counts[term] += job_.losses[term].loss->count(*micro.layout);
      }
      for (const SequenceRun& run : micro.layout->runs()) {
        tokens += run.length();
      }
      micro_batches.push_back(std::move(micro));
    }
    std::vector<torch::Tensor> term_values(counts.size());
    torch::Tensor nll_value;
    torch::Tensor distillation_value;
    torch::Tensor loss_value;
    const bool base_forward = needs_base_forward(logged);
    for (const MicroBatch& micro : micro_batches) {
      const TokenBatch tokens_on_device = to_device(micro.batch, model_->device());
      const ModelOutput output = model_->forward(tokens_on_device);
      const auto on_device = [&](const std::vector<std::int64_t>& token_labels) {
        return torch::tensor(token_labels, torch::kInt64)
            .reshape({micro.batch.num_rows, micro.batch.row_length})
            .to(model_->device());
      };
      torch::Tensor loss = nll_sum(model_, output.hidden_BSD, on_device(micro.learned)) / std::max(labels, 1.0);
      accumulate(nll_value, loss);
      RoutingTensors routing = stack(output.routing);
      if (base_forward) {
        const ModelOutput base = forward_base(tokens_on_device);
        routing.base_forward_logits_LTE = stack(base.routing).logits_LTE;
        if (job_.distillation_weight > 0.0) {
          MoeModel base_model = job_.base_model.is_empty() ? model_ : job_.base_model;
          const torch::Tensor value =
              distillation_sum(model_, output.hidden_BSD, base_model, base.hidden_BSD, on_device(micro.distilled)) /
              std::max(distilled, 1.0);
          accumulate(distillation_value, value);
          loss = loss + job_.distillation_weight * value;
        }
      }
      const auto num_layers = static_cast<double>(routing.logits_LTE.size(0));
      std::vector<LossShare> shares;
      std::vector<std::size_t> shown;  // the term of each share
      for (std::size_t term = 0; term < counts.size(); ++term) {
        const WeightedLoss& weighted = job_.losses[term];
        if (weighted.weight > 0.0 || logged) {
          shares.push_back({weighted.loss.get(), weighted.weight_at(step) / (divisor(counts[term]) * num_layers)});
          shown.push_back(term);
        }
      }
      const CombinedLoss combined = combine(shares, routing, *micro.layout);
      for (std::size_t i = 0; i < shown.size(); ++i) {
        accumulate(term_values[shown[i]], combined.sums_L[i].mean() / divisor(counts[shown[i]]));
      }
      loss = loss + combined.total;
      loss.backward();
      accumulate(loss_value, loss);
    }
    StepValues values;
    values.loss = loss_value.item<double>();
    values.nll = nll_value.item<double>();
    values.distillation = distillation_value.defined() ? distillation_value.item<double>() : 0.0;
    for (const torch::Tensor& value : term_values) {
      values.terms.push_back(value.defined() ? value.item<double>() : std::numeric_limits<double>::quiet_NaN());
    }
    return values;
  }

  [[nodiscard]] bool needs_base_forward(bool logged) const {
    return job_.distillation_weight > 0.0 ||
           std::any_of(job_.losses.begin(), job_.losses.end(), [logged](const WeightedLoss& weighted) {
             return weighted.loss->needs_base_forward() && (weighted.weight > 0.0 || logged);
           });
  }

  ModelOutput forward_base(const TokenBatch& batch) {
    if (job_.base_model.is_empty()) {
      return model_->forward_reference(batch);
    }
    const torch::NoGradGuard no_grad;
    MoeModel base = job_.base_model;
    return base->forward(batch);
  }

  static double divisor(double count) { return count > 0.0 ? count : 1.0; }

  static void accumulate(torch::Tensor& total, const torch::Tensor& value) {
    total = total.defined() ? total + value.detach() : value.detach();
  }

  static RoutingTensors stack(const std::vector<RoutingRecord>& records) {
    std::vector<torch::Tensor> logits;
    std::vector<torch::Tensor> selected;
    std::vector<torch::Tensor> reference;
    for (const RoutingRecord& record : records) {
      logits.push_back(record.logits_TE);
      selected.push_back(record.selected_TK);
      if (record.reference_logits_TE.defined()) {
        reference.push_back(record.reference_logits_TE);
      }
    }
    return {torch::stack(logits), torch::stack(selected),
            reference.empty() ? torch::Tensor() : torch::stack(reference)};
  }

  Json evaluate() {
    Json json = Json::object();
    for (std::size_t domain = 0; domain < held_out_batches_.size(); ++domain) {
      const QualityResult quality = measure(model_, *job_.held_out, held_out_batches_[domain], false, {});
      json[job_.held_out->domains[domain]] = {
          {"nll", quality.nll()}, {"perplexity", quality.perplexity()}, {"bits_per_byte", quality.bits_per_byte()}};
    }
    return json;
  }

  // What the run is about to do; without a step, so that resuming keeps it.
  Json start_event() const {
    Json data = Json::object();
    for (std::size_t domain = 0; domain < job_.train_data->domains.size(); ++domain) {
      std::int64_t sequences = 0;
      std::int64_t tokens = 0;
      std::int64_t completion_tokens = 0;
      for (const TokenSequence& sequence : job_.train_data->sequences) {
        if (static_cast<std::size_t>(sequence.domain) == domain) {
          const std::vector<std::uint8_t> mask = sequence.completion_mask();
          sequences += 1;
          tokens += static_cast<std::int64_t>(mask.size());
          completion_tokens += std::count(mask.begin(), mask.end(), 1);
        }
      }
      Json entry = {{"sequences", sequences}, {"tokens", tokens}, {"completion_tokens", completion_tokens}};
      if (domain < job_.train_data->examples.size() && job_.train_data->examples[domain].read > 0) {
        const ExampleCounts& examples = job_.train_data->examples[domain];
        entry["examples"] = examples.read;
        entry["truncated"] = examples.truncated;
        entry["dropped"] = examples.dropped;
      }
      data[job_.train_data->domains[domain]] = std::move(entry);
    }
    return {{"event", "start"},
            {"steps", job_.options.steps},
            {"warmup_steps", job_.options.warmup_steps},
            {"data", std::move(data)}};
  }

  Json step_event(std::int64_t step, const StepValues& values, double norm, double rate, double seconds,
                  std::int64_t tokens) const {
    Json event = {{"event", "step"}, {"step", step}, {"loss", values.loss}, {"nll", values.nll}};
    for (std::size_t term = 0; term < values.terms.size(); ++term) {
      if (std::isfinite(values.terms[term])) {
        event[std::string(job_.losses[term].loss->name())] = values.terms[term];
      }
    }
    if (job_.distillation_weight > 0.0) {
      event["logit_distillation"] = values.distillation;
    }
    event["top_k"] = model_->architecture().top_k;
    event["learning_rate"] = rate;
    event["gradient_norm"] = norm;
    event["seconds"] = seconds;
    event["tokens"] = tokens;
    return event;
  }

  std::string step_line(std::int64_t step, const StepValues& values, double norm, double rate, double seconds,
                        std::int64_t tokens) const {
    const std::string total = std::to_string(job_.options.steps);
    std::string line =
        fmt::format("step {:>{}}/{} | loss {:.4f} | nll {:.4f}", step, total.size(), total, values.loss, values.nll);
    for (std::size_t term = 0; term < values.terms.size(); ++term) {
      // What trains; terms of weight 0 are in metrics.jsonl.
      if (job_.losses[term].weight > 0.0) {
        line += fmt::format(" | {} {:.4g}", job_.losses[term].loss->name(), values.terms[term]);
      }
    }
    if (job_.distillation_weight > 0.0) {
      line += fmt::format(" | logit_distillation {:.4g}", values.distillation);
    }
    line += fmt::format(" | lr {:.2e} | norm {:.3f} | {:.0f} ms | {} tok/s", rate, norm, seconds * 1e3,
                        format_count(static_cast<double>(tokens) / seconds));
    return line;
  }

  std::string evaluate_line(std::int64_t step, const Json& held_out) const {
    const std::string total = std::to_string(job_.options.steps);
    std::string line = fmt::format("eval {:>{}}/{}", step, total.size(), total);
    for (const auto& [domain, figures] : held_out.items()) {
      line += fmt::format(" | {} ppl {:.3f}", domain, figures.at("perplexity").get<double>());
    }
    return line;
  }

  std::string last_checkpoint_text() const {
    const auto latest = latest_checkpoint(job_.run_dir);
    return latest ? latest->second.string() : "none";
  }

  const TrainingJob& job_;
  MoeModel model_;
  std::int64_t base_top_k_;
  std::vector<torch::Tensor> parameters_;
  Optimizer optimizer_;
  PackedSampler sampler_;
  std::vector<bool> loss_domains_;                          // per training domain: the routing terms count its tokens
  std::vector<bool> nll_domains_;                           // the language-model loss its labels
  std::vector<bool> distillation_domains_;                  // and the distillation its labels
  std::vector<std::vector<PackedBatch>> held_out_batches_;  // per domain
};

}  // namespace

double learning_rate_at(const TrainOptions& options, std::int64_t step) {
  if (step <= options.warmup_steps) {
    return static_cast<double>(step) / static_cast<double>(options.warmup_steps);
  }
  const std::int64_t end = options.decay_steps > 0 ? options.decay_steps : options.steps;
  if (options.schedule == "constant") {
    return 1.0;
  }
  if (end == options.warmup_steps) {
    return options.final_learning_rate;  // nothing lies between
  }
  // The last step of the decay runs at the final rate's neighbour, never at exactly 0: progress counts steps begun.
  const double progress = std::min(
      1.0, static_cast<double>(step - 1 - options.warmup_steps) / static_cast<double>(end - options.warmup_steps));
  const double falling =
      options.schedule == "cosine" ? 0.5 * (1.0 + std::cos(std::numbers::pi * progress)) : 1.0 - progress;
  return options.final_learning_rate + (1.0 - options.final_learning_rate) * falling;
}

ResidencyRule ResidencySchedule::at(std::int64_t step) const {
  ResidencyRule now = rule;
  if (ramp_steps > 0) {
    now.lambda *= std::min(1.0, static_cast<double>(step) / static_cast<double>(ramp_steps));
  }
  if (!slots.empty()) {
    now.slots = slots[static_cast<std::size_t>(step - 1) % slots.size()];
  }
  return now;
}

std::uint64_t data_order_seed(std::uint64_t seed) {
  return derive_seed(seed, "data order");
}

std::int64_t top_k_at(const TrainOptions& options, std::int64_t step, std::int64_t top_k) {
  const TopKAnnealingOptions& annealing = options.top_k_annealing;
  return annealing.step > 0 && step >= annealing.step ? annealing.top_k : top_k;
}

TunedParts tuned_parts(const std::filesystem::path& folder, const Architecture& base) {
  const CheckpointState state(folder);
  TunedParts parts;
  parts.routers = folder / kRouterFile;
  if (std::filesystem::exists(folder / kAdapterFile)) {
    parts.adapters = folder / kAdapterFile;
  }
  // Runs from before there was annealing say nothing about K.
  parts.top_k = state.has("top_k") ? state.number("top_k") : base.top_k;
  if (parts.top_k < 1 || parts.top_k > base.num_experts) {
    throw InputError(
        fmt::format("{}: key \"top_k\" must be between 1 and the model's {} experts, got {}; this "
                    "checkpoint belongs to another model",
                    (folder / "state.json").string(), base.num_experts, parts.top_k));
  }
  return parts;
}

void load_checkpoint_weights(MoeModel& model, const std::filesystem::path& folder) {
  const TunedParts parts = tuned_parts(folder, model->architecture());
  load_routers(model, parts.routers);
  if (parts.adapters) {
    load_adapters(model, *parts.adapters);
  } else {
    model->remove_adapters();
  }
  model->set_top_k(parts.top_k);
}

void load_run_weights(MoeModel& model, const std::filesystem::path& folder, const std::string& trainable) {
  load_checkpoint_weights(model, folder);
  if (trainable != "all") {
    return;
  }
  const SafetensorsFile file(folder / kOptimizerFile);
  const std::vector<torch::Tensor> parameters = model->all_parameters();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    copy_into(file.tensor(fmt::format("master.{}", i)), parameters[i]);
  }
}

std::vector<torch::Tensor> select_trainable(MoeModel& model, const std::string& trainable) {
  std::vector<torch::Tensor> selected;
  if (trainable == "all") {
    selected = model->all_parameters();
  } else if (trainable == "router" || trainable == "router+lora") {
    selected = model->routers();
  } else {
    throw std::invalid_argument(fmt::format("select_trainable: unknown set \"{}\"", trainable));
  }
  const std::vector<torch::Tensor> adapters = model->adapters();
  if (trainable == "router+lora") {
    if (adapters.empty()) {
      throw std::invalid_argument("select_trainable: router+lora needs a model with adapters");
    }
    selected.insert(selected.end(), adapters.begin(), adapters.end());
  }
  for (const std::vector<torch::Tensor>& list : {model->all_parameters(), adapters}) {
    for (const torch::Tensor& parameter : list) {
      parameter.requires_grad_(false);
    }
  }
  for (const torch::Tensor& parameter : selected) {
    parameter.requires_grad_(true);
  }
  return selected;
}

std::optional<std::pair<std::int64_t, std::filesystem::path>> latest_checkpoint(const std::filesystem::path& run_dir) {
  const auto all = complete_checkpoints(run_dir);
  if (all.empty()) {
    return std::nullopt;
  }
  return all.back();
}

void check_same_recipe(const std::filesystem::path& run_dir, const std::string& resolved_recipe) {
  const std::string difference = first_difference(read_text_file(run_dir / "recipe.yaml"), resolved_recipe);
  if (!difference.empty()) {
    throw UsageError(
        fmt::format("{}: the recipe changed since this run began ({}); resume with the recipe it was "
                    "started with, or start afresh with --overwrite",
                    run_dir.string(), difference));
  }
}

TrainingResult train(const TrainingJob& job) {
  if (job.options.steps < 1) {
    throw std::invalid_argument("train: the number of steps is not known");
  }
  return Loop(job).run();
}

}  // namespace hestia
