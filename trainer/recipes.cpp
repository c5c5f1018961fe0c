#include "hestia/trainer/recipes.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "hestia/routing/residency.hpp"
#include "hestia/trainer/trainer.hpp"

namespace hestia {

namespace {

constexpr double kMaxRate = 10.0;

}  // namespace

FieldList ModelOptions::fields() {
  FieldList list;
  list.add("path", path, "Hugging Face model directory: config.json, safetensors, tokenizer.json or tokenizer.model");
  list.add("dtype", dtype, "of all frozen weights; routers are float32 always", {"float32", "bfloat16"});
  list.add("device", device, "auto, cpu, cuda or cuda:N; auto takes a GPU when there is one");
  list.add("threads", threads, "CPU threads; 0: all cores", {.low = 0, .high = 1024});
  list.add("activation_checkpointing", activation_checkpointing,
           "recompute layers in backward instead of keeping them");
  return list;
}

FieldList DataOptions::fields() {
  FieldList list;
  list.add("sequence_length", sequence_length, "tokens of a row; longer documents are cut",
           {.low = 2, .high = 1 << 20});
  list.add("held_out_fraction", held_out_fraction, "share of documents never trained on",
           {.low = 0.0, .high = 0.9, .exclusive_low = true});
  list.add("split_seed", split_seed, "of the split into training and held-out documents", {.low = 0});
  list.add("max_tokens_per_domain", max_tokens_per_domain, "training tokens read per domain; 0: all", {.low = 0});
  list.add("train", train, "domains to train on").required();
  list.add("train_mix", train_mix, "weights of the training domains, in their order; empty: as they come",
           {.low = 0.0, .exclusive_low = true});
  list.add("evaluate", evaluate, "domains of every evaluation (held-out documents)");
  list.add_list("corpora", corpora, "where the text of each domain comes from").required();
  return list;
}

FieldList LoraOptions::fields() {
  FieldList list;
  list.add("rank", rank, "of the low-rank update of each projection", {.low = 1});
  list.add("alpha", alpha, "the update is scaled by alpha / rank", {.low = 0.0, .exclusive_low = true});
  return list;
}

FieldList TopKAnnealingOptions::fields() {
  FieldList list;
  list.add("step", step, "first optimiser step with top_k experts per token; 0: never", {.low = 0});
  list.add("top_k", top_k, "experts per token from that step on, at most the model's; 0: never", {.low = 0});
  return list;
}

FieldList TrainOptions::fields() {
  FieldList list;
  list.add("trainable", trainable, "which parameters train; router+lora: routers, and adapters on the experts",
           {"router", "router+lora", "all"});
  list.add_section("lora", lora.fields(), "adapters on up and down projections of the experts, for router+lora");
  list.add_section("top_k_annealing", top_k_annealing.fields(), "SEER-MoE: fewer experts per token from a step on");
  list.add("steps", steps, "optimiser steps; 0: as many as epochs take", {.low = 0});
  list.add("epochs", epochs, "passes over the training data, instead of steps; 0: none", {.low = 0.0, .high = 1e6});
  list.add("rows_per_batch", rows_per_batch, "rows of sequence_length tokens in a micro-batch", {.low = 1});
  list.add("accumulate", accumulate, "micro-batches per optimiser step", {.low = 1});
  list.add("learning_rate", learning_rate, "peak of AdamW's learning rate",
           {.low = 0.0, .high = kMaxRate, .exclusive_low = true});
  list.add("warmup_steps", warmup_steps, "linear warm-up", {.low = 0});
  list.add("warmup_ratio", warmup_ratio, "the same as a share of all steps, rounded up; 0: none",
           {.low = 0.0, .high = 1.0});
  list.add("schedule", schedule, "after the warm-up", {"linear", "cosine", "constant"});
  list.add("decay_steps", decay_steps, "step at which the decay is over, the rate stays after it; 0: the last step",
           {.low = 0});
  list.add("final_learning_rate", final_learning_rate, "share of the peak once the decay is over",
           {.low = 0.0, .high = 1.0});
  list.add("weight_decay", weight_decay, "decoupled, matrices only", {.low = 0.0, .high = 1.0});
  list.add("beta1", beta1, "AdamW", {.low = 0.0, .high = 0.99999});
  list.add("beta2", beta2, "AdamW", {.low = 0.0, .high = 0.9999999});
  list.add("epsilon", epsilon, "AdamW", {.low = 0.0, .high = 1.0, .exclusive_low = true});
  list.add("router_gradient", router_gradient,
           "experts that the gradient of the language-model loss to the routers is of: the chosen, or all",
           {"chosen", "all"});
  list.add("clip_norm", clip_norm, "largest global gradient norm; 0: no clipping", {.low = 0.0});
  list.add("log_every", log_every, "steps between step lines", {.low = 1});
  list.add("evaluate_every", evaluate_every, "steps between held-out evaluations; 0: at the end only", {.low = 0});
  list.add("evaluate_tokens", evaluate_tokens, "held-out tokens per domain in those evaluations", {.low = 1});
  list.add("checkpoint_every", checkpoint_every, "steps between checkpoints; 0: at the end only", {.low = 0});
  list.add("keep_checkpoints", keep_checkpoints, "older ones are removed", {.low = 1});
  return list;
}

FieldList LogitDistillationOptions::fields() {
  FieldList list;
  list.add("weight", weight, "weight of the term, which costs a forward of the base model; 0: not computed",
           {.low = 0.0});
  list.add("teacher", teacher, "model directory whose logits are held to instead, of the same vocabulary and width");
  list.add("domains", domains, "training domains whose tokens count; empty: all");
  return list;
}

FieldList ControlOptions::fields() {
  FieldList list;
  list.add("enabled", enabled, "also run plain NLL tuning: same trainable set, data, steps");
  list.add("learning_rate", learning_rate, "its own peak learning rate",
           {.low = 0.0, .high = kMaxRate, .exclusive_low = true});
  return list;
}

FieldList PredictorOptions::fields() {
  FieldList list;
  list.add("enabled", enabled, "train a predictor of a prompt's experts and compare it with what costs nothing");
  list.add("hidden_size", hidden_size, "units between its two layers", {.low = 1, .high = 1 << 20});
  list.add("learning_rate", learning_rate, "of SGD", {.low = 0.0, .high = kMaxRate, .exclusive_low = true});
  list.add("momentum", momentum, "of SGD", {.low = 0.0, .high = 0.9999});
  list.add("batch_size", batch_size, "sequences per step", {.low = 1});
  list.add("epochs", epochs, "passes over its training sequences", {.low = 1});
  list.add("held_out_fraction", held_out_fraction, "share of the stored sequences that it is compared on",
           {.low = 0.0, .high = 0.9, .exclusive_low = true});
  list.add("slots", slots, "experts per layer of the recall figures; empty: E/8, E/4, E/2", {.low = 1});
  list.add("standardise", standardise, "inputs to mean 0 and deviation 1");
  list.add("start_from_popularity", start_from_popularity, "before training, predict the mean popularity");
  list.add("embeddings", embeddings,
           "safetensors file with ids [N] and embeddings [N, D]; empty: the model's token embeddings");
  return list;
}

FieldList ExportOptions::fields() {
  FieldList list;
  list.add("tokens", tokens, "tokens per tuned domain behind the preference statistics", {.low = 1});
  list.add("split", split, "documents they come from", {"held_out", "train"});
  list.add("prompt_tokens", prompt_tokens, "text without a prompt: its first tokens count as one; 0: none", {.low = 0});
  list.add("max_sequences", max_sequences, "bound of the per-sequence statistics (reservoir sample); 0: all",
           {.low = 0});
  list.add("write_prompts", write_prompts, "also write prompts.jsonl, id and prompt of each stored sequence");
  list.add_section("predictor", predictor.fields(), "which experts will a prompt's answer use");
  return list;
}

FieldList ResidencyOptions::fields() {
  FieldList list;
  list.add("score", score,
           "what experts are compared by: logits, weights relative to the token's largest, or their roots",
           residency_score_names());
  list.add("lambda", lambda,
           "bonus of a resident expert: in mean logit ranges, or on the weight or its root; 0: plain Top-K",
           {.low = 0.0, .high = 1e6});
  list.add("layer_factors", layer_factors, "factors of lambda, one per MoE layer; empty: 1 everywhere",
           {.low = 0.0, .high = 1e6});
  list.add("always_keep", always_keep, "experts per token chosen by their score alone (J)", {.low = 0});
  list.add("preserve_mass", preserve_mass, "scale the chosen experts' weights to the sum that plain Top-K's have");
  list.add("slots", slots, "slots per layer of the cache; 0: losses.cache_simulation.slots, or E/4", {.low = 0});
  list.add("policy", policy, "of that cache", {"lru"});
  list.add("in_loop", in_loop, "train under this routing, not only serve with it");
  list.add("ramp_steps", ramp_steps, "in the loop: lambda grows linearly over so many steps; 0: at once", {.low = 0});
  list.add("train_slots", train_slots, "in the loop: slots per layer that steps take in turn; empty: slots",
           {.low = 1});
  list.add("calibration_tokens", calibration_tokens,
           "training tokens per domain behind the mean logit range and the scope", {.low = 1});
  list.add_section("scope", scope.fields(), "the text that the rule is for; other text is routed more plainly");
  return list;
}

FieldList ResidencyScopeOptions::fields() {
  FieldList list;
  list.add("domains", domains,
           "training domains that the rule is for, told from the others by the routers' logits; "
           "empty: it holds everywhere");
  list.add("elsewhere", elsewhere, "times which lambda counts in other text", {.low = 0.0, .high = 1.0});
  list.add("window", window, "tokens, the last ones, that the kind of text is told from", {.low = 1});
  list.add("keep", keep, "share of these domains' own text that is to be taken for theirs",
           {.low = 0.0, .high = 1.0, .exclusive_low = true});
  return list;
}

FieldList ResidencyPriorOptions::fields() {
  FieldList list;
  list.add("lambdas", lambdas, "evaluate every router under residency-aware routing by logits too; empty: do not",
           {.low = 0.0, .high = 1e6, .exclusive_low = true});
  list.add("weight_lambdas", weight_lambdas, "the same by weights (score: weight), for example [0.02, 0.05]",
           {.low = 0.0, .high = 1e6, .exclusive_low = true});
  list.add("root_lambdas", root_lambdas, "the same by roots of weights (score: root), for example [0.1, 0.3]",
           {.low = 0.0, .high = 1e6, .exclusive_low = true});
  list.add("layer_factors", layer_factors, "factors of each lambda, one per MoE layer; empty: the bundle's",
           {.low = 0.0, .high = 1e6});
  list.add("always_keep", always_keep, "values of J, each with each lambda", {.low = 0});
  list.add("slots", slots, "slots per layer of the cache; 0: the bundle's", {.low = 0});
  list.add("in_scope", in_scope, "serve them within the bundle's residency.scope, where it has one; false: everywhere");
  return list;
}

FieldList TaskOptions::fields() {
  FieldList list;
  list.add("name", name, "label in every report").required();
  list.add("kind", kind, "what counts: the text that greedy decoding writes, or the most likely choice",
           {"exact_match", "multiple_choice"})
      .required();
  list.add("limit", limit, "examples, from the first on; 0: all", {.low = 0});
  list.add("batch", batch, "rows that run together", {.low = 1, .high = 4096});
  list.add("domain", domain, "exact_match: domain of data.corpora that prompts and answers come from");
  list.add("split", split, "exact_match: which of its documents; all: a domain that is not trained on",
           {"held_out", "train", "all"});
  list.add("max_new_tokens", max_new_tokens, "exact_match: longest continuation", {.low = 1, .high = 1 << 20});
  list.add("stop", stop, "exact_match: texts that end a continuation, beside the end of sequence");
  list.add("answer_after", answer_after, "exact_match: the answer is what follows this on its line; empty: all text");
  list.add("paths", choices.paths, "multiple_choice: files of JSON lines, folders or globs");
  list.add("prompt", choices.prompt, "multiple_choice: {field} is a field of the line; empty: Question: ... Answer:");
  list.add("choices", choices.choices, "multiple_choice: the field with their list, or a field for each; empty: known");
  list.add("answer", choices.answer,
           "multiple_choice: field with number, letter or label of the right one; empty: known");
  return list;
}

FieldList EvaluateOptions::fields() {
  FieldList list;
  list.add("tokens_per_domain", tokens_per_domain, "tokens per domain", {.low = 1});
  list.add("split", split, "documents they come from; train: to choose settings without looking at held-out text",
           {"held_out", "train"});
  list.add("slots", slots, "slots per layer to simulate; empty: E/8, E/4, E/2", {.low = 1});
  list.add("policies", policies, "slot-cache policies to simulate", policy_names());
  list.add("gamma", gamma, "discount of the gamma policy", {.low = 0.0, .high = 1.0});
  list.add("segments", segments, "steps per segment of the segment metrics (SRP, SCH); empty: none", {.low = 1});
  list.add("static_set", static_set, "experts per layer of the static-set test; 0: E/4, at least K; empty: none",
           {.low = 0});
  list.add("agreement", agreement, "also how far each router agrees with the base's; false saves its CPU time");
  list.add_section("residency_prior", residency_prior.fields(), "arms under residency-aware routing");
  list.add_list("tasks", tasks, "what every router is to answer: accuracy beside the likelihood of text");
  return list;
}

FieldList NllOptions::fields() {
  FieldList list;
  list.add("domains", domains, "training domains whose labels it counts; empty: all");
  return list;
}

FieldList FinetuneRecipe::fields() {
  FieldList list;
  list.add("task", task, "what the recipe does", {"finetune"});
  list.add("run_dir", run_dir, "folder of the run: checkpoints, metrics, bundle, results").required();
  list.add("seed", seed, "of everything random; each purpose derives its own", {.low = 0});
  list.add_section("model", model.fields(), "the checkpoint and how to hold it");
  list.add_section("data", data.fields(), "corpora, training and evaluation domains");
  FieldList terms = losses.fields();
  terms.add("domains", loss_domains, "training domains whose tokens the routing objectives count; empty: all");
  terms.add_section("nll", nll.fields(), "the language-model loss itself");
  terms.add_section("logit_distillation", distillation.fields(), "stay near the base model's language-model logits");
  list.add_section("losses", terms, "what is trained on: the language-model loss, and objectives beside it");
  list.add_section("train", train.fields(), "optimiser and loop");
  list.add_section("residency", residency.fields(), "residency-aware routing: in training, and to serve with");
  list.add_section("control", control.fields(), "plain NLL tuning to compare with");
  list.add_section("export", export_options.fields(), "router bundle");
  list.add_section("evaluate", evaluate.fields(), "comparison of baseline, control and tuned router");
  return list;
}

FieldList ArchitectureOptions::fields() {
  FieldList list;
  list.add("family", family, "layout of the checkpoint", known_families());
  list.add("hidden_size", hidden_size, "model dimension", {.low = 8});
  list.add("expert_intermediate_size", expert_intermediate_size, "hidden dimension of one expert", {.low = 8});
  list.add("num_layers", num_layers, "layers", {.low = 1});
  list.add("num_attention_heads", num_attention_heads, "query heads", {.low = 1});
  list.add("num_key_value_heads", num_key_value_heads, "key and value heads", {.low = 1});
  list.add("num_experts", num_experts, "routed experts per layer", {.low = 1, .high = 65535});
  list.add("top_k", top_k, "experts per token", {.low = 1});
  list.add("normalise_top_k", normalise_top_k, "divide the chosen weights by their sum");
  list.add("tie_word_embeddings", tie_word_embeddings, "the head reuses the embedding");
  list.add("rope_theta", rope_theta, "base of the rotary embedding", {.low = 0.0, .exclusive_low = true});
  list.add("max_position_embeddings", max_position_embeddings, "longest sequence", {.low = 2});
  list.add("initializer_range", initializer_range, "standard deviation of initial weights",
           {.low = 0.0, .exclusive_low = true});
  return list;
}

FieldList TokenizerOptions::fields() {
  FieldList list;
  list.add("path", path, "an existing tokenizer.json or tokenizer.model; empty: train one on the training split");
  list.add("vocab_size", vocab_size, "tokens of a trained vocabulary", {.low = 300, .high = 1 << 20});
  list.add("sample_bytes", sample_bytes, "text to train it on, shared equally among the domains", {.low = 1000});
  list.add("special_tokens", special_tokens, "tokens of chat templates that a trained vocabulary gets");
  return list;
}

FieldList SaveOptions::fields() {
  FieldList list;
  list.add("dtype", dtype, "of the saved weights", {"float32", "bfloat16"});
  list.add("max_shard_bytes", max_shard_bytes, "larger models are written in shards", {.low = 1024});
  return list;
}

FieldList PretrainRecipe::fields() {
  FieldList list;
  list.add("task", task, "what the recipe does", {"pretrain"});
  list.add("run_dir", run_dir, "folder of the run; the model lands in its model/").required();
  list.add("seed", seed, "of everything random; each purpose derives its own", {.low = 0});
  list.add_section("model", model.fields(), "dtype and device (path is unused)");
  list.add_section("architecture", architecture.fields(), "the model to make");
  list.add_section("tokenizer", tokenizer.fields(), "its vocabulary");
  list.add_section("data", data.fields(), "corpora, training and evaluation domains");
  list.add_section("losses", losses.fields(), "routing objectives beside the language-model loss");
  list.add_section("train", train.fields(), "optimiser and loop");
  list.add_section("save", save.fields(), "the finished model");
  return list;
}

std::string recipe_task(const std::filesystem::path& path) {
  std::string task = "finetune";
  FieldList list;
  list.add("task", task, "", {"finetune", "pretrain", "bench"});
  Problems ignored;
  const RecipeSource source = read_recipe(path, {}, list, ignored);
  for (const std::string& message : ignored.messages()) {
    if (message.find(": task ") != std::string::npos) {
      throw UsageError(message);
    }
  }
  return task;
}

namespace {

// Keys that mean something for some formats of a corpus only.
const std::vector<std::pair<std::string, std::vector<std::string>>>& keys_of_formats() {
  static const std::vector<std::pair<std::string, std::vector<std::string>>> keys = {
      {"separator", {"text"}},
      {"min_document_bytes", {"text"}},
      {"max_document_bytes", {"text", "jsonl"}},
      {"text_field", {"jsonl"}},
      {"prompt_field", {"jsonl"}},
      {"prompt_template", {"jsonl"}},
      {"question_field", {"question_answer"}},
      {"context_field", {"question_answer"}},
      {"answer_field", {"question_answer"}},
      {"messages_field", {"chat"}},
      {"template", {"question_answer", "chat"}},
      {"system_message", {"question_answer", "chat"}},
      {"overlong", {"jsonl", "question_answer", "chat"}},
  };
  return keys;
}

// A key that would be ignored is a mistake. Saved recipes hold every key, so only other values than the default count.
void check_corpus_keys(const DataOptions& data, const RecipeSource& source, Problems& problems) {
  for (std::size_t i = 0; i < data.corpora.size(); ++i) {
    CorpusOptions corpus = data.corpora[i];
    CorpusOptions defaults;
    const FieldList now = corpus.fields();
    const FieldList plain = defaults.fields();
    for (const auto& [name, formats] : keys_of_formats()) {
      const auto value = [&name = name](const FieldList& list) {
        const auto field = std::find_if(list.fields().begin(), list.fields().end(),
                                        [&](const Field& candidate) { return candidate.name == name; });
        const auto* const number = std::get_if<std::int64_t*>(&field->target);
        return number != nullptr ? std::to_string(**number) : *std::get<std::string*>(field->target);
      };
      const std::string key = fmt::format("data.corpora.{}.{}", i, name);
      if (value(now) != value(plain) && std::find(formats.begin(), formats.end(), corpus.format) == formats.end()) {
        problems.add(fmt::format("{}: {} is for format {} only, got format {}; remove the key or change the format",
                                 source.location(key), key, fmt::join(formats, " or "), corpus.format));
      }
    }
  }
}

// `domains`, the value of `key`, are among `known`, which `where` defines, each once.
void check_domains(const std::vector<std::string>& domains, const std::string& key,
                   const std::vector<std::string>& known, const std::string& where, const RecipeSource& source,
                   Problems& problems) {
  std::set<std::string> seen;
  for (const std::string& domain : domains) {
    if (std::find(known.begin(), known.end(), domain) == known.end()) {
      const std::string near = nearest_name(domain, known);
      problems.add(fmt::format("{}: {} names the domain \"{}\", which {} does not {}{}", source.location(key), key,
                               domain, where, where == "data.train" ? "name" : "define",
                               near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near)));
    }
    if (!seen.insert(domain).second) {
      problems.add(fmt::format("{}: {} names the domain \"{}\" twice; remove one", source.location(key), key, domain));
    }
  }
}

void check_data(const DataOptions& data, const RecipeSource& source, Problems& problems) {
  std::vector<std::string> known;
  for (std::size_t i = 0; i < data.corpora.size(); ++i) {
    const std::string key = fmt::format("data.corpora.{}.domain", i);
    const std::string& domain = data.corpora[i].domain;
    if (std::find(known.begin(), known.end(), domain) != known.end()) {
      problems.add(fmt::format("{}: {} repeats the domain \"{}\"; give each corpus its own name", source.location(key),
                               key, domain));
    }
    known.push_back(domain);
  }
  check_corpus_keys(data, source, problems);
  check_domains(data.train, "data.train", known, "data.corpora", source, problems);
  check_domains(data.evaluate, "data.evaluate", known, "data.corpora", source, problems);
  if (data.train.empty()) {
    problems.add(fmt::format("{}: data.train must name at least one domain, got none", source.location("data.train")));
  }
  if (!data.train_mix.empty() && data.train_mix.size() != data.train.size()) {
    problems.add(fmt::format("{}: data.train_mix must have one weight per domain of data.train ({}), got {}",
                             source.location("data.train_mix"), data.train.size(), data.train_mix.size()));
  }
}

// True when the field `name` holds something else than in a default-constructed struct.
bool is_changed(const FieldList& now, const FieldList& plain, const std::string& name) {
  const auto field_of = [&name](const FieldList& list) {
    return std::find_if(list.fields().begin(), list.fields().end(),
                        [&](const Field& candidate) { return candidate.name == name; });
  };
  const auto& target = field_of(now)->target;
  const auto& other = field_of(plain)->target;
  const auto differs = [&](auto* type) {
    using Pointer = decltype(type);
    return std::holds_alternative<Pointer>(target) && *std::get<Pointer>(target) != *std::get<Pointer>(other);
  };
  return differs(static_cast<std::string*>(nullptr)) || differs(static_cast<std::int64_t*>(nullptr)) ||
         differs(static_cast<std::vector<std::string>*>(nullptr));
}

// The corpus of a task has questions, and none that the run trains on unless it is asked for.
void check_task_domain(const TaskOptions& task, const std::string& key, const DataOptions& data,
                       const RecipeSource& source, Problems& problems) {
  const std::string domain_key = key + ".domain";
  const auto corpus = std::find_if(data.corpora.begin(), data.corpora.end(),
                                   [&](const CorpusOptions& candidate) { return candidate.domain == task.domain; });
  if (corpus == data.corpora.end()) {
    std::vector<std::string> known;
    std::transform(data.corpora.begin(), data.corpora.end(), std::back_inserter(known),
                   [](const CorpusOptions& candidate) { return candidate.domain; });
    const std::string near = nearest_name(task.domain, known);
    problems.add(task.domain.empty()
                     ? fmt::format("{}: {} is missing; name the domain of data.corpora that the prompts come from",
                                   source.location(domain_key), domain_key)
                     : fmt::format("{}: {} names the domain \"{}\", which data.corpora does not define{}",
                                   source.location(domain_key), domain_key, task.domain,
                                   near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near)));
    return;
  }
  if (corpus->format == "text" || (corpus->format == "jsonl" && corpus->prompt_field.empty())) {
    problems.add(
        fmt::format("{}: {} must name a domain with prompts and answers, got \"{}\" of plain text (format {}{})",
                    source.location(domain_key), domain_key, task.domain, corpus->format,
                    corpus->format == "jsonl" ? " without prompt_field" : ""));
  }
  const bool trained = std::find(data.train.begin(), data.train.end(), task.domain) != data.train.end();
  if (task.split == "all" && trained) {
    problems.add(fmt::format(
        "{}: {}.split must be held_out or train for a domain that data.train names, got all of \"{}\"; documents that "
        "were trained on would stand among the others",
        source.location(key + ".split"), key, task.domain));
  }
}

void check_tasks(const std::vector<TaskOptions>& tasks, const DataOptions& data, const RecipeSource& source,
                 Problems& problems) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> keys_of_kinds = {
      {"exact_match", {"domain", "split", "max_new_tokens", "stop", "answer_after"}},
      {"multiple_choice", {"paths", "prompt", "choices", "answer"}}};
  std::set<std::string> names;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const std::string key = fmt::format("evaluate.tasks.{}", i);
    TaskOptions task = tasks[i];
    TaskOptions defaults;
    if (!task.name.empty() && !names.insert(task.name).second) {
      problems.add(fmt::format("{}: {}.name repeats \"{}\"; give each task its own name",
                               source.location(key + ".name"), key, task.name));
    }
    const bool generates = task.kind == "exact_match";
    if (!generates && task.kind != "multiple_choice") {
      continue;  // told already
    }
    for (const auto& [kind, keys] : keys_of_kinds) {
      for (const std::string& name : keys) {
        if (kind != task.kind && is_changed(task.fields(), defaults.fields(), name)) {
          problems.add(fmt::format("{}: {}.{} is for kind {} only, got kind {}; remove the key or change the kind",
                                   source.location(fmt::format("{}.{}", key, name)), key, name, kind, task.kind));
        }
      }
    }
    if (generates) {
      check_task_domain(task, key, data, source, problems);
      if (std::find(task.stop.begin(), task.stop.end(), "") != task.stop.end()) {
        problems.add(fmt::format("{}: {}.stop must hold texts that are not empty, got \"\"; remove it",
                                 source.location(key + ".stop"), key));
      }
      continue;
    }
    if (task.choices.paths.empty()) {
      problems.add(fmt::format("{}: {}.paths is missing; give the files of the questions",
                               source.location(key + ".paths"), key));
    }
    const std::string problem =
        task.choices.prompt.empty() ? std::string() : choice_prompt_problem(task.choices.prompt);
    if (!problem.empty()) {
      problems.add(fmt::format("{}: {}.prompt {}, got \"{}\"; mend it", source.location(key + ".prompt"), key, problem,
                               task.choices.prompt));
    }
  }
}

// Of two keys that say the same, the one on the command line counts; the other becomes 0. Where `by_zero`, 0 on the
// command line counts, too.
template <class First, class Second>
void settle(First& first, const std::string& first_key, Second& second, const std::string& second_key, bool by_zero,
            const RecipeSource& source, Problems& problems) {
  const bool first_counts = source.is_overridden(first_key) && (by_zero || first != First{});
  const bool second_counts = source.is_overridden(second_key) && (by_zero || second != Second{});
  if (first_counts != second_counts) {
    if (first_counts) {
      second = Second{};
    } else {
      first = First{};
    }
    return;
  }
  if (first == First{} || second == Second{}) {
    return;
  }
  const bool given = source.is_set(first_key);  // and not its default
  if (given) {
    problems.add(fmt::format("{}: {} and {} say the same in two ways, got {} and {}; remove one",
                             source.location(second_key), first_key, second_key, first, second));
  } else {
    first = First{};
  }
}

std::int64_t steps_of_share(double share, std::int64_t steps) {
  constexpr double kRounding = 1e-9;  // 0.07 * 100 is a little more than 7.
  return static_cast<std::int64_t>(std::ceil(share * static_cast<double>(steps) - kRounding));
}

void settle_train(TrainOptions& train, const RecipeSource& source, Problems& problems) {
  settle(train.steps, "train.steps", train.epochs, "train.epochs", /*by_zero=*/false, source, problems);
  settle(train.warmup_steps, "train.warmup_steps", train.warmup_ratio, "train.warmup_ratio", /*by_zero=*/true, source,
         problems);
  if (train.steps == 0 && train.epochs == 0.0) {
    problems.add(fmt::format("{}: train.steps must be at least 1, got 0; set it or train.epochs",
                             source.location("train.steps")));
  }
  if (train.steps > 0 && train.warmup_ratio > 0.0) {
    train.warmup_steps = steps_of_share(train.warmup_ratio, train.steps);
    train.warmup_ratio = 0.0;
  }
}

void check_losses(const RoutingLossOptions& losses, const RecipeSource& source, Problems& problems) {
  const std::vector<std::int64_t>& lags = losses.lag.lags;
  if (lags.empty() || std::adjacent_find(lags.begin(), lags.end(), std::greater_equal<>()) != lags.end()) {
    problems.add(fmt::format("{}: losses.lag.lags must be a strictly increasing list, got [{}]; sort it",
                             source.location("losses.lag.lags"), fmt::join(lags, ", ")));
  }
}

void check_train(const TrainOptions& train, const RecipeSource& source, Problems& problems) {
  const TopKAnnealingOptions& annealing = train.top_k_annealing;
  if ((annealing.step == 0) != (annealing.top_k == 0)) {
    problems.add(
        fmt::format("{}: train.top_k_annealing needs a step and a top_k of at least 1, got step {} and top_k {}; set "
                    "both, or both to 0 for no annealing",
                    source.location("train.top_k_annealing"), annealing.step, annealing.top_k));
  }
  if (train.steps == 0) {
    if (train.decay_steps > 0) {
      problems.add(
          fmt::format("{}: train.decay_steps needs train.steps, got {} with train.epochs; give the steps, or leave it "
                      "out to decay over all of them",
                      source.location("train.decay_steps"), train.decay_steps));
    }
    return;
  }
  if (train.warmup_steps > train.steps) {
    problems.add(fmt::format("{}: train.warmup_steps must be at most train.steps ({}), got {}",
                             source.location("train.warmup_steps"), train.steps, train.warmup_steps));
  }
  if (train.decay_steps > 0) {
    if (train.decay_steps < train.warmup_steps || train.decay_steps > train.steps) {
      problems.add(
          fmt::format("{}: train.decay_steps must be 0 or from train.warmup_steps ({}) to train.steps ({}), got {}",
                      source.location("train.decay_steps"), train.warmup_steps, train.steps, train.decay_steps));
    } else if (train.decay_steps < train.steps && train.final_learning_rate == 0.0 && train.schedule != "constant") {
      problems.add(fmt::format(
          "{}: steps after train.decay_steps ({}) would run at a learning rate of 0; set train.final_learning_rate, "
          "got 0",
          source.location("train.decay_steps"), train.decay_steps));
    }
  }
  if (train.top_k_annealing.step > train.steps) {
    problems.add(fmt::format("{}: train.top_k_annealing.step must be at most train.steps ({}), got {}",
                             source.location("train.top_k_annealing.step"), train.steps, train.top_k_annealing.step));
  }
}

}  // namespace

void check_train_fits(const TrainOptions& train, const RecipeSource& source, const Architecture& architecture,
                      Problems& problems) {
  if (train.top_k_annealing.top_k > architecture.top_k) {
    problems.add(
        fmt::format("{}: train.top_k_annealing.top_k must be at most the model's experts per token ({}), got {}",
                    source.location("train.top_k_annealing.top_k"), architecture.top_k, train.top_k_annealing.top_k));
  }
  if (train.top_k_annealing.top_k > 0 && architecture.fixed_top_k > 0 &&
      train.top_k_annealing.top_k != architecture.fixed_top_k) {
    problems.add(
        fmt::format("{}: the routing of {} has {} experts per token and no other number, got {}; leave "
                    "train.top_k_annealing out",
                    source.location("train.top_k_annealing.top_k"), architecture.family, architecture.fixed_top_k,
                    train.top_k_annealing.top_k));
  }
  if (train.router_gradient == "all" && architecture.routing == RoutingKind::kSparsemixer) {
    problems.add(
        fmt::format("{}: train.router_gradient must be chosen for {}, whose mixing weights share no sum, got all",
                    source.location("train.router_gradient"), architecture.family));
  }
  if (train.trainable == "router+lora" && architecture.expert_bias) {
    problems.add(
        fmt::format("{}: train.trainable must be router or all for {}, whose experts are stored as one tensor with "
                    "biases and take no adapters, got router+lora",
                    source.location("train.trainable"), architecture.family));
  }
  const std::int64_t full_rank = std::min(architecture.hidden_size, architecture.expert_intermediate_size);
  if (train.trainable == "router+lora" && train.lora.rank > full_rank) {
    problems.add(fmt::format("{}: train.lora.rank must be at most the rank of the experts' matrices ({}), got {}",
                             source.location("train.lora.rank"), full_rank, train.lora.rank));
  }
}

std::vector<WeightedLoss> recipe_losses(const RoutingLossOptions& losses, const RecipeSource& source,
                                        std::int64_t num_experts, std::int64_t top_k) {
  try {
    return make_routing_losses(losses, num_experts, top_k);
  } catch (const UsageError& error) {
    const std::string message = error.what();  // begins with the key
    throw UsageError(fmt::format("{}: {}", source.location(message.substr(0, message.find_first_of(": "))), message));
  }
}

namespace {

bool names_domain(const std::vector<std::string>& domains, const std::string& domain) {
  return domains.empty() || std::find(domains.begin(), domains.end(), domain) != domains.end();
}

// Beside other terms, a domain that the language-model loss leaves out has to be there for one of them. Without any the
// recipe is plain tuning, a control's for example, and the rows of such a domain are only what they displace.
void check_counted(LoadedRecipe<FinetuneRecipe>& loaded, Problems& problems) {
  FinetuneRecipe& recipe = loaded.recipe;
  const bool terms = recipe.losses.any_weight();
  const bool distilled = recipe.distillation.weight > 0.0;
  if (recipe.nll.domains.empty() || (!terms && !distilled)) {
    return;
  }
  for (const std::string& domain : recipe.data.train) {
    const bool counted = names_domain(recipe.nll.domains, domain) ||
                         (distilled && names_domain(recipe.distillation.domains, domain)) ||
                         (terms && names_domain(recipe.loss_domains, domain));
    if (!counted) {
      problems.add(
          fmt::format("{}: losses.nll.domains leaves out the domain \"{}\" of data.train, and so does every term with "
                      "a weight; name it in losses.nll.domains, or train on the others alone",
                      loaded.source.location("losses.nll.domains"), domain));
    }
  }
}

// A scope is told from what else is trained on.
void check_scope(const FinetuneRecipe& recipe, const RecipeSource& source, Problems& problems) {
  const ResidencyScopeOptions& scope = recipe.residency.scope;
  check_domains(scope.domains, "residency.scope.domains", recipe.data.train, "data.train", source, problems);
  if (!scope.domains.empty() &&
      std::all_of(recipe.data.train.begin(), recipe.data.train.end(),
                  [&](const std::string& domain) { return names_domain(scope.domains, domain); })) {
    problems.add(
        fmt::format("{}: residency.scope.domains must leave a domain of data.train out, which these are told from, got "
                    "all of them ({}); add general text to data.train, or leave the scope out",
                    source.location("residency.scope.domains"), fmt::join(scope.domains, ", ")));
  }
  const ResidencyScopeOptions plain;
  for (const auto& [key, given] : {std::pair("residency.scope.elsewhere", scope.elsewhere != plain.elsewhere),
                                   std::pair("residency.scope.window", scope.window != plain.window),
                                   std::pair("residency.scope.keep", scope.keep != plain.keep)}) {
    if (given && scope.domains.empty()) {
      problems.add(fmt::format("{}: {} does nothing without residency.scope.domains; set it, or leave this out",
                               source.location(key), key));
    }
  }
}

}  // namespace

LoadedRecipe<FinetuneRecipe> load_finetune_recipe(const std::filesystem::path& path,
                                                  const std::vector<std::string>& overrides) {
  LoadedRecipe<FinetuneRecipe> loaded;
  Problems problems;
  loaded.source = read_recipe(path, overrides, loaded.recipe.fields(), problems);
  const FinetuneRecipe& recipe = loaded.recipe;
  check_data(recipe.data, loaded.source, problems);
  check_losses(recipe.losses, loaded.source, problems);
  check_domains(recipe.loss_domains, "losses.domains", recipe.data.train, "data.train", loaded.source, problems);
  check_domains(recipe.nll.domains, "losses.nll.domains", recipe.data.train, "data.train", loaded.source, problems);
  check_domains(recipe.distillation.domains, "losses.logit_distillation.domains", recipe.data.train, "data.train",
                loaded.source, problems);
  if (std::all_of(recipe.nll.domains.begin(), recipe.nll.domains.end(),
                  [&](const std::string& domain) { return names_domain(recipe.data.train, domain); })) {
    check_counted(loaded, problems);
  }
  settle_train(loaded.recipe.train, loaded.source, problems);
  check_train(recipe.train, loaded.source, problems);
  if (recipe.model.path.empty()) {
    problems.add(fmt::format("{}: model.path is missing; give the directory of the checkpoint to tune",
                             loaded.source.location("model.path")));
  }
  if (recipe.residency.in_loop && recipe.residency.lambda == 0.0) {
    problems.add(
        fmt::format("{}: residency.lambda must be above 0 when residency.in_loop is true (0 is plain Top-K), got 0",
                    loaded.source.location("residency.lambda")));
  }
  for (const auto& [key, given] :
       {std::pair("losses.logit_distillation.teacher", !recipe.distillation.teacher.empty()),
        std::pair("losses.logit_distillation.domains", !recipe.distillation.domains.empty())}) {
    if (given && recipe.distillation.weight == 0.0) {
      problems.add(
          fmt::format("{}: {} does nothing without losses.logit_distillation.weight; set it, or leave this out",
                      loaded.source.location(key), key));
    }
  }
  check_scope(recipe, loaded.source, problems);
  for (const auto& [key, given] : {std::pair("residency.ramp_steps", recipe.residency.ramp_steps > 0),
                                   std::pair("residency.train_slots", !recipe.residency.train_slots.empty())}) {
    if (given && !recipe.residency.in_loop) {
      problems.add(fmt::format("{}: {} only counts in training; set residency.in_loop to true, or leave it out",
                               loaded.source.location(key), key));
    }
  }
  if (recipe.evaluate.residency_prior.asks_for_arms() && recipe.evaluate.residency_prior.always_keep.empty()) {
    problems.add(fmt::format("{}: evaluate.residency_prior.always_keep must name at least one value, got none",
                             loaded.source.location("evaluate.residency_prior.always_keep")));
  }
  check_tasks(recipe.evaluate.tasks, recipe.data, loaded.source, problems);
  if (recipe.data.evaluate.empty()) {
    problems.add(fmt::format("{}: data.evaluate must name at least one domain, got none",
                             loaded.source.location("data.evaluate")));
  }
  problems.throw_usage_if_any();
  return loaded;
}

LoadedRecipe<PretrainRecipe> load_pretrain_recipe(const std::filesystem::path& path,
                                                  const std::vector<std::string>& overrides) {
  LoadedRecipe<PretrainRecipe> loaded;
  Problems problems;
  loaded.source = read_recipe(path, overrides, loaded.recipe.fields(), problems);
  const PretrainRecipe& recipe = loaded.recipe;
  check_data(recipe.data, loaded.source, problems);
  check_losses(recipe.losses, loaded.source, problems);
  settle_train(loaded.recipe.train, loaded.source, problems);
  check_train(recipe.train, loaded.source, problems);
  const ArchitectureOptions& architecture = recipe.architecture;
  if (architecture.top_k > architecture.num_experts) {
    problems.add(fmt::format("{}: architecture.top_k must be between 1 and num_experts ({}), got {}",
                             loaded.source.location("architecture.top_k"), architecture.num_experts,
                             architecture.top_k));
  }
  if (recipe.train.top_k_annealing.top_k > architecture.top_k) {
    problems.add(fmt::format("{}: train.top_k_annealing.top_k must be at most architecture.top_k ({}), got {}",
                             loaded.source.location("train.top_k_annealing.top_k"), architecture.top_k,
                             recipe.train.top_k_annealing.top_k));
  }
  if (architecture.hidden_size % (2 * architecture.num_attention_heads) != 0) {
    problems.add(
        fmt::format("{}: architecture.hidden_size must be a multiple of twice num_attention_heads ({}), got {}",
                    loaded.source.location("architecture.hidden_size"), architecture.num_attention_heads,
                    architecture.hidden_size));
  }
  if (architecture.num_attention_heads % architecture.num_key_value_heads != 0) {
    problems.add(fmt::format("{}: architecture.num_key_value_heads must divide num_attention_heads ({}), got {}",
                             loaded.source.location("architecture.num_key_value_heads"),
                             architecture.num_attention_heads, architecture.num_key_value_heads));
  }
  if (recipe.data.sequence_length > architecture.max_position_embeddings) {
    problems.add(
        fmt::format("{}: data.sequence_length must be at most architecture.max_position_embeddings ({}), got {}",
                    loaded.source.location("data.sequence_length"), architecture.max_position_embeddings,
                    recipe.data.sequence_length));
  }
  if (recipe.train.trainable != "all") {
    problems.add(fmt::format("{}: train.trainable must be \"all\" in a pretraining recipe, got \"{}\"",
                             loaded.source.location("train.trainable"), recipe.train.trainable));
  }
  for (const auto& [name, weight] : {std::pair{"trust", recipe.losses.trust.weight},
                                     std::pair{"rank_matching", recipe.losses.rank_matching.weight}}) {
    if (weight != 0.0) {
      const std::string key = fmt::format("losses.{}.weight", name);
      problems.add(fmt::format("{}: {} must be 0 in a pretraining recipe (there is no base router), got {}",
                               loaded.source.location(key), key, weight));
    }
  }
  problems.throw_usage_if_any();
  return loaded;
}

void resolve_steps(TrainOptions& options, const PackedData& data, const std::vector<double>& mix,
                   std::int64_t sequence_length, std::uint64_t seed, const RecipeSource& source) {
  if (options.steps > 0) {
    return;
  }
  const PackedSampler sampler(data, options.rows_per_batch, sequence_length, data_order_seed(seed), mix);
  const std::int64_t batches = sampler.batches_for(options.epochs);
  const std::int64_t steps = (batches + options.accumulate - 1) / options.accumulate;
  const std::int64_t warmup_steps =
      options.warmup_ratio > 0.0 ? steps_of_share(options.warmup_ratio, steps) : options.warmup_steps;
  Problems problems;
  for (const auto& [key, step] : {std::pair("train.warmup_steps", warmup_steps),
                                  std::pair("train.top_k_annealing.step", options.top_k_annealing.step)}) {
    if (step > steps) {
      problems.add(fmt::format("{}: {} must be at most the {} steps that train.epochs ({}) come to, got {}",
                               source.location(key), key, steps, options.epochs, step));
    }
  }
  problems.throw_usage_if_any();
  options.steps = steps;
  options.warmup_steps = warmup_steps;
  options.epochs = 0.0;
  options.warmup_ratio = 0.0;
}

void resolve_steps_from_run(TrainOptions& options, const std::filesystem::path& run_dir, const RecipeSource& source) {
  const std::filesystem::path saved = run_dir / "recipe.yaml";
  if (!std::filesystem::exists(saved)) {
    return;
  }
  const TrainOptions run = load_finetune_recipe(saved, {}).recipe.train;
  if (run.trainable != options.trainable) {
    throw UsageError(fmt::format(
        "{}: the run in {} trained with train.trainable \"{}\", got \"{}\"; give the recipe as it was run, or {} in "
        "its place",
        source.location("train.trainable"), run_dir.string(), run.trainable, options.trainable, run_dir.string()));
  }
  if (options.steps > 0 && options.steps != run.steps) {
    throw UsageError(
        fmt::format("{}: the run in {} is one of {} steps, got {}; give the recipe as it was run, or {} in its place",
                    source.location("train.steps"), run_dir.string(), run.steps, options.steps, run_dir.string()));
  }
  if (options.steps > 0) {
    return;
  }
  options.steps = run.steps;
  options.warmup_steps = run.warmup_steps;
  options.epochs = 0.0;
  options.warmup_ratio = 0.0;
}

std::pair<const CorpusOptions*, std::string> find_corpus(const DataOptions& data, const std::string& domain) {
  for (std::size_t i = 0; i < data.corpora.size(); ++i) {
    if (data.corpora[i].domain == domain) {
      return {&data.corpora[i], fmt::format("data.corpora.{}", i)};
    }
  }
  throw std::invalid_argument("find_corpus: unknown domain " + domain);
}

}  // namespace hestia
