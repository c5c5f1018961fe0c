#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/json_lines.hpp"
#include "hestia/core/log.hpp"
#include "hestia/core/progress.hpp"
#include "hestia/data/corpus.hpp"
#include "hestia/data/packing.hpp"
#include "hestia/data/tokenizer.hpp"
#include "hestia/evaluation/build_info.hpp"
#include "hestia/evaluation/throughput.hpp"
#include "hestia/kernels/expert_formats.hpp"
#include "hestia/model/tensors.hpp"
#include "hestia/routing/fold.hpp"
#include "hestia/routing/preload.hpp"
#include "hestia/routing/trace.hpp"
#include "hestia/runtime/decoder.hpp"
#include "hestia/runtime/replay.hpp"
#include "hestia/trainer/bundle.hpp"
#include "hestia/trainer/preference_predictor.hpp"
#include "hestia/trainer/residency.hpp"
#include "token_list.hpp"

namespace hestia {
namespace {

struct GenerateArguments {
  std::filesystem::path model;
  std::filesystem::path router;
  std::string prompt;
  std::filesystem::path prompts;
  std::string chat;
  std::string system;
  std::string prompt_tokens;
  std::int64_t max_tokens = 128;
  std::string expert_slots;
  std::string policy = "lru";
  std::string fetch = "auto";
  std::string prefetch = "off";
  double gamma = SlotCacheOptions{}.gamma;
  std::uint64_t seed = 1;
  std::string start = "cold";
  std::filesystem::path preload;
  std::string preload_by = "aggregate";
  std::string preload_router;
  std::string residency = "bundle";
  bool everywhere = false;
  double temperature = 0.0;
  double top_p = 1.0;
  std::string device = "auto";
  std::string dtype = "bfloat16";
  std::string expert_format = "bf16";
  std::string pinned_memory;
  std::optional<std::uint64_t> random_weights;
  bool ignore_eos = false;
  bool no_graph = false;
  std::filesystem::path record;
  std::vector<std::string> record_logits;  // a file, or nothing: into the trace
  bool logits_in_trace = false;
  std::int64_t logits_sequences = 0;
  std::filesystem::path replay;
  bool fold = false;
  bool json = false;
  bool quiet = false;
};

CacheStart start_from_name(const std::string& name) {
  if (name == "cold") {
    return CacheStart::kCold;
  }
  if (name == "prefill") {
    return CacheStart::kPrefill;
  }
  if (name == "preload") {
    return CacheStart::kPreload;
  }
  const std::string near = nearest_name(name, {"cold", "prefill", "preload"});
  throw UsageError(fmt::format("--start: must be cold, prefill or preload, got \"{}\"{}", name,
                               near.empty() ? "" : fmt::format(" (did you mean \"{}\"?)", near)));
}

// "off", "bundle" or "LAMBDA,J[,SCORE[,one factor per MoE layer]]" on top of the bundle's logit ranges and factors.
std::optional<ResidencyRule> residency_from(const std::string& text, bool everywhere,
                                            const std::optional<BundleManifest>& manifest,
                                            const Architecture& architecture) {
  const std::size_t num_layers = architecture.moe_layers().size();
  if (everywhere && (!manifest || manifest->residency.scope.everywhere())) {
    throw UsageError("--residency-everywhere: there is no bundle whose rule is for some text alone; leave it out");
  }
  if (text == "off" || (text == "bundle" && !manifest)) {
    return std::nullopt;
  }
  ResidencyRule rule = manifest ? manifest->residency : ResidencyRule();
  if (everywhere) {
    rule.scope = {};
  }
  check_scope(rule, architecture, "--router");
  if (text == "bundle") {
    return rule;
  }
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  const auto read = [](const std::string& part, auto& value) {
    const char* const end = part.data() + part.size();
    const auto result = std::from_chars(part.data(), end, value);
    return result.ec == std::errc() && result.ptr == end && value >= 0;
  };
  bool good = read(parts[0], rule.lambda) && std::isfinite(rule.lambda);
  if (good && parts.size() > 1) {
    good = read(parts[1], rule.always_keep);
  }
  if (good && parts.size() > 2) {
    constexpr std::string_view kMass = "+mass";
    rule.preserve_mass = std::string_view(parts[2]).ends_with(kMass);
    const std::string name = parts[2].substr(0, parts[2].size() - (rule.preserve_mass ? kMass.size() : 0));
    const std::optional<ResidencyScore> score = residency_score_from_name(name);
    good = score.has_value();
    rule.score = score.value_or(rule.score);
  }
  if (good && parts.size() > 3) {
    rule.layer_factors.assign(parts.size() - 3, 0.0);
    for (std::size_t i = 0; good && i < rule.layer_factors.size(); ++i) {
      good = read(parts[i + 3], rule.layer_factors[i]) && std::isfinite(rule.layer_factors[i]);
    }
  }
  if (!good) {
    throw UsageError(fmt::format(
        "--residency-prior: must be LAMBDA,J (0.3,2) or LAMBDA,J,SCORE with the score logit, weight or root "
        "(0.05,2,weight) or one of them with +mass (0.3,2,logit+mass), then if wanted a factor of lambda "
        "per MoE layer (0.05,2,weight,1,0.5,2), off, or bundle for the bundle's own rule, got \"{}\"",
        text));
  }
  if (rule.lambda > 0.0 && rule.always_keep >= architecture.top_k) {
    throw UsageError(fmt::format(
        "--residency-prior: J must be below the model's experts per token ({}), got {} in \"{}\": the rule would have "
        "nothing to choose; give less, or off",
        architecture.top_k, rule.always_keep, text));
  }
  if (!rule.layer_factors.empty() && rule.layer_factors.size() != num_layers) {
    throw UsageError(
        fmt::format("--residency-prior: must have one factor of lambda per MoE layer ({}) or none, got {} in \"{}\"",
                    num_layers, rule.layer_factors.size(), text));
  }
  if (!manifest && rule.score == ResidencyScore::kLogit) {
    throw UsageError(fmt::format(
        "--residency-prior: lambda is measured in the logit ranges that a bundle holds, got \"{}\" without --router; "
        "give the bundle (hestia export RECIPE --untuned makes one of the model's own routers), or a rule by weight or "
        "root",
        text));
  }
  return rule;
}

// Prints what is new of a text that grows, without a character that is not whole yet.
class Stream {
 public:
  Stream(const Tokenizer& tokenizer, bool enabled) : tokenizer_(&tokenizer), enabled_(enabled) {}
  void add(std::int64_t token) { ids_.push_back(static_cast<std::int32_t>(token)); }
  void print(bool last) {
    text_ = tokenizer_->decode(ids_);
    std::size_t end = text_.size();
    constexpr std::string_view kBroken = "\xEF\xBF\xBD";
    while (!last && end >= kBroken.size() && std::string_view(text_).substr(0, end).ends_with(kBroken)) {
      end -= kBroken.size();
    }
    if (enabled_ && end > printed_) {
      std::cout << text_.substr(printed_, end - printed_) << std::flush;
      printed_ = end;
    }
  }
  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  const Tokenizer* tokenizer_;
  bool enabled_;
  std::vector<std::int32_t> ids_;
  std::string text_;
  std::size_t printed_ = 0;
};

struct Totals {
  std::int64_t requests = 0, hits = 0, cold = 0, loads = 0, evictions = 0;
};

void add_counts(Totals& totals, const std::vector<SlotCacheCounts>& counts) {
  for (const SlotCacheCounts& layer : counts) {
    totals.requests += layer.requests;
    totals.hits += layer.hits;
    totals.cold += layer.cold;
    totals.loads += layer.loads;
    totals.evictions += layer.evictions;
  }
}

void add_prefetched(PrefetchTotals& totals, const PrefetchTotals& more) {
  totals.guesses += more.guesses;
  totals.right += more.right;
  totals.useful_bytes += more.useful_bytes;
  totals.copied_bytes += more.copied_bytes;
}

double rate_of(const DecodeTimes& times) {
  return times.step_seconds > 0 ? static_cast<double>(times.steps) / times.step_seconds : 0.0;
}

double per(std::int64_t count, std::int64_t of) {
  return of == 0 ? 0.0 : static_cast<double>(count) / static_cast<double>(of);
}

// What a start with preload takes its experts from.
struct Preload {
  PreloadSource source;
  std::optional<PreferencePredictor> predictor;
  std::optional<NearestPrompt> nearest;
  std::vector<std::vector<std::uint16_t>> experts;  // per MoE layer, once they are known
  NearestPreload found;                             // of kNearest, once the prompt has run
};

// Everything but what needs the weights or the prompt's routing; nullopt for other starts.
std::optional<Preload> preload_from(const GenerateArguments& arguments, const Architecture& architecture) {
  if (start_from_name(arguments.start) != CacheStart::kPreload) {
    const char* const given = !arguments.preload.empty()            ? "--preload"
                              : !arguments.preload_router.empty()   ? "--preload-router"
                              : arguments.preload_by != "aggregate" ? "--preload-by"
                                                                    : nullptr;
    if (given != nullptr) {
      throw UsageError(fmt::format("{}: only serves --start preload, got --start {}", given, arguments.start));
    }
    return std::nullopt;
  }
  Preload preload;
  preload.source.by = preload_choice_from_name(arguments.preload_by, "--preload-by");
  preload.source.file = !arguments.preload.empty()  ? arguments.preload
                        : !arguments.router.empty() ? arguments.router / "preferences.h5"
                                                    : std::filesystem::path();
  if (preload.source.file.empty()) {
    throw UsageError("--start preload: needs statistics; give --router BUNDLE or --preload FILE");
  }
  const std::string router = !arguments.preload_router.empty() ? arguments.preload_router
                             : arguments.router.empty()        ? "baseline"
                                                               : "tuned";
  preload.source.router = router_from_name(router, "--preload-router");
  const std::vector<std::int64_t> layers = architecture.moe_layers();
  const std::int64_t experts = architecture.num_experts;
  constexpr const char* kWhose = "the model";
  switch (preload.source.by) {
    case PreloadChoice::kAggregate:
      preload.experts = read_preload(preload.source.file, preload.source.router, layers, experts, kWhose);
      break;
    case PreloadChoice::kPredictor:
      if (preload.source.router == PreferenceRouter::kBaseline && !arguments.preload_router.empty()) {
        throw UsageError(
            "--preload-router: the predictor guesses the tuned router's experts, got \"baseline\"; leave the option "
            "out, or preload by aggregate or nearest");
      }
      preload.predictor =
          read_preload_predictor(preload.source.file, layers, experts, architecture.hidden_size, kWhose);
      preload.source.router = PreferenceRouter::kTuned;
      break;
    case PreloadChoice::kNearest:
      preload.nearest.emplace(preload.source.file, preload.source.router, layers, experts, kWhose);
      break;
  }
  return preload;
}

// Tells the decoder what to begin with. `preload` and `prompt`, the one that runs, must outlive it.
void set_preload(Preload& preload, MoeModel& model, const std::vector<std::int64_t>& prompt, DecoderOptions& options) {
  if (preload.predictor) {
    const torch::Tensor embedding_VD = token_embedding(model);
    options.preload_of_prompt = [&preload, &prompt, embedding_VD](const torch::Tensor& /*prompt_count_LE*/) {
      const torch::Tensor embedding_D = mean_embedding(embedding_VD, prompt).contiguous();
      const std::vector<float> guess = preload.predictor->predict(
          {embedding_D.const_data_ptr<float>(), static_cast<std::size_t>(embedding_D.numel())});
      preload.experts = preload_order(guess, preload.predictor->num_layers, preload.predictor->num_experts);
      return preload.experts;
    };
  } else if (preload.nearest) {
    options.preload_of_prompt = [&preload](const torch::Tensor& prompt_count_LE) {
      const torch::Tensor counts = prompt_count_LE.contiguous();
      preload.found =
          preload.nearest->find({counts.const_data_ptr<std::int64_t>(), static_cast<std::size_t>(counts.numel())});
      preload.experts = preload.found.order;
      return preload.experts;
    };
  } else {
    options.preload = preload.experts;
  }
}

bool is_packed(const std::filesystem::path& trace) {
  const std::string extension = trace.extension().string();
  return extension == ".h5" || extension == ".hdf5";
}

// What was routed, sequence after sequence.
class Recorder {
 public:
  explicit Recorder(const GenerateArguments& arguments) : arguments_(arguments) {}

  void add(const Decoder& decoder, std::int64_t sequence) {
    steps_ += decoder.times().steps;
    if (!arguments_.record.empty()) {
      SequenceRouting routing = decoder.recorded();
      routing.id = sequence;
      tokens_ += routing.num_tokens;
      append_sequence(trace_, routing);
    }
    const bool wanted = arguments_.logits_in_trace || !arguments_.record_logits.empty();
    if (wanted && (arguments_.logits_sequences == 0 || sequence < arguments_.logits_sequences)) {
      const torch::Tensor steps_LSE = decoder.recorded_logits().select(2, 0);
      logits_LSE_.push_back(arguments_.logits_in_trace
                                ? torch::cat({decoder.recorded_prompt_logits().select(2, 0), steps_LSE}, 1)
                                : steps_LSE);
      sequence_ids_.push_back(torch::full({steps_LSE.size(1)}, sequence, torch::kInt64));
    }
  }

  void write(const Architecture& architecture, std::int64_t expert_bytes, const std::optional<Preload>& preload) {
    if (!arguments_.record.empty()) {
      write_trace(architecture, expert_bytes, preload);
    }
    if (!arguments_.record_logits.empty()) {
      write_logits(arguments_.record_logits.front(), architecture.top_k);
    }
  }

 private:
  void write_trace(const Architecture& architecture, std::int64_t expert_bytes, const std::optional<Preload>& preload) {
    const std::vector<std::int64_t> moe_layers = architecture.moe_layers();
    trace_.model = arguments_.model.string();
    trace_.num_layers = architecture.num_layers;
    for (std::size_t layer = 0; layer < trace_.layers.size(); ++layer) {
      trace_.layers[layer].layer = moe_layers[layer];
      trace_.layers[layer].expert_bytes = expert_bytes;
      if (preload) {
        trace_.layers[layer].preload = preload->experts.at(layer);
      }
    }
    for (TraceEntry& entry : trace_.entries) {
      entry.layer = static_cast<std::int32_t>(moe_layers[static_cast<std::size_t>(entry.layer)]);
    }
    if (is_packed(arguments_.record)) {
      torch::Tensor logits_TLE = torch::empty({0});
      if (arguments_.logits_in_trace) {
        logits_TLE = torch::cat(logits_LSE_, 1).transpose(0, 1).contiguous();
      }
      write_trace_hdf5(arguments_.record, trace_,
                       {logits_TLE.const_data_ptr<float>(), static_cast<std::size_t>(logits_TLE.numel())});
    } else {
      write_trace_csv(arguments_.record, trace_);
    }
    log_info(fmt::format("wrote {}: {} tokens, {} of them decoded", arguments_.record.string(), tokens_, steps_));
  }

  // In the form that `hestia score` reads.
  void write_logits(const std::filesystem::path& path, std::int64_t top_k) {
    const torch::Tensor logits_LSE = torch::cat(logits_LSE_, 1).contiguous();
    const std::int64_t steps = logits_LSE.size(1);
    write_tensors(path,
                  {{"router_logits", logits_LSE},
                   {"sequence_ids", torch::cat(sequence_ids_)},
                   {"counted", torch::ones({steps}, torch::kUInt8)}},
                  {{"top_k", std::to_string(top_k)}});
    log_info(fmt::format("wrote {}: router logits of {} steps", path.string(), steps));
  }

  const GenerateArguments& arguments_;
  RoutingTrace trace_;
  std::vector<torch::Tensor> logits_LSE_;  // [MoE layers, steps, E] of each sequence
  std::vector<torch::Tensor> sequence_ids_;
  std::int64_t tokens_ = 0;
  std::int64_t steps_ = 0;
};

std::int64_t first_turn(const RoutingTrace& trace) {
  const std::vector<std::int64_t> turns = turns_of(trace);
  if (turns.empty()) {
    throw UsageError("--replay: the trace has no decode steps");
  }
  return turns.front();
}

struct Prompt {  // NOLINT(bugprone-exception-escape): the check takes Json's move for one that throws
  std::vector<std::int64_t> tokens;
  std::vector<std::int64_t> ends;  // of an answer, beside the model's own end token
  std::string source;              // for messages: an option, or file and line
  Json id;                         // of a line that has one
};

Prompt prompt_of_text(const GenerateArguments& arguments, const std::string& text, const std::string& source,
                      const Architecture& stored, const Tokenizer& tokenizer) {
  Prompt prompt;
  prompt.source = source;
  if (!arguments.chat.empty()) {
    const ChatPrompt chat = chat_prompt(arguments.chat, arguments.system, text, tokenizer, "--chat");
    prompt.tokens.assign(chat.tokens.begin(), chat.tokens.end());
    prompt.ends.assign(chat.ends.begin(), chat.ends.end());
  } else {
    const std::vector<std::int32_t> ids = tokenizer.encode(text);
    prompt.tokens.assign(ids.begin(), ids.end());
    const std::int32_t bos = tokenizer.bos_id();
    const bool spelt_out = !ids.empty() && ids.front() == bos;
    if (bos >= 0 && stored.bos_token_id >= 0 && !spelt_out) {
      prompt.tokens.insert(prompt.tokens.begin(), bos);
    }
  }
  if (prompt.tokens.empty()) {
    throw UsageError(fmt::format("{}: must have at least one token, got \"{}\"", source, text));
  }
  return prompt;
}

// The lines of a file: {"prompt": "...", "id": ...}.
std::vector<Prompt> prompts_of_file(const GenerateArguments& arguments, const Architecture& stored,
                                    const Tokenizer& tokenizer) {
  std::vector<Prompt> prompts;
  read_json_lines(arguments.prompts, [&](std::int64_t line, const Json& object) {
    const std::string source = fmt::format("{}:{}", arguments.prompts.string(), line);
    if (!object.contains("prompt") || !object.at("prompt").is_string()) {
      throw InputError(fmt::format("{}: \"prompt\" must be text, got {}; mend or remove this line", source,
                                   object.contains("prompt") ? object.at("prompt").dump() : "none"));
    }
    prompts.push_back(prompt_of_text(arguments, object.at("prompt").get<std::string>(), source, stored, tokenizer));
    if (object.contains("id")) {
      prompts.back().id = object.at("id");
    }
  });
  if (prompts.empty()) {
    throw InputError(fmt::format("{}: there is no prompt; write one JSON object a line, {{\"prompt\": \"...\"}}",
                                 arguments.prompts.string()));
  }
  return prompts;
}

std::vector<Prompt> prompts_of(const GenerateArguments& arguments, const Architecture& stored,
                               std::optional<std::unique_ptr<Tokenizer>>& tokenizer) {
  std::vector<Prompt> prompts;
  if (arguments.prompt_tokens.empty()) {
    tokenizer = open_tokenizer(arguments.model);
    if (arguments.prompts.empty()) {
      prompts.push_back(prompt_of_text(arguments, arguments.prompt, "--prompt", stored, **tokenizer));
    } else {
      prompts = prompts_of_file(arguments, stored, **tokenizer);
    }
  } else {
    prompts.push_back({parse_token_list("--prompt-tokens", arguments.prompt_tokens), {}, "--prompt-tokens", {}});
    check_token_list("--prompt-tokens", prompts.front().tokens, stored.vocab_size, arguments.model.string());
  }
  for (const Prompt& prompt : prompts) {
    const auto length = static_cast<std::int64_t>(prompt.tokens.size());
    if (length + arguments.max_tokens > stored.max_position_embeddings) {
      throw UsageError(fmt::format("--max-tokens: the model reaches {} tokens, got a prompt of {} and {} more{}",
                                   stored.max_position_embeddings, length, arguments.max_tokens,
                                   arguments.prompts.empty() ? "" : fmt::format(" ({})", prompt.source)));
    }
  }
  return prompts;
}

// Several prompts go with fewer options than one.
void check_prompts_options(const GenerateArguments& arguments) {
  const int given = (arguments.prompt.empty() ? 0 : 1) + (arguments.prompt_tokens.empty() ? 0 : 1) +
                    (arguments.prompts.empty() ? 0 : 1);
  if (given != 1) {
    throw UsageError("generate: give either --prompt TEXT or --prompt-tokens 1,2,3 or --prompts FILE.jsonl");
  }
  if (arguments.logits_sequences < 0) {
    throw UsageError(fmt::format("--record-logits-sequences: must be at least 0 (0 is all of them), got {}",
                                 arguments.logits_sequences));
  }
  if (arguments.logits_sequences > 0 && !arguments.logits_in_trace && arguments.record_logits.empty()) {
    throw UsageError(
        fmt::format("--record-logits-sequences: only serves --record-logits, got {} without it; add --record-logits",
                    arguments.logits_sequences));
  }
  if (arguments.prompts.empty()) {
    return;
  }
  if (!arguments.replay.empty()) {
    throw UsageError(
        "--prompts: does not go with --replay, which serves one sequence of a trace; give --prompt, or "
        "use hestia bench");
  }
  if (!arguments.record.empty() && (arguments.preload_by == "predictor" || arguments.preload_by == "nearest")) {
    throw UsageError(
        fmt::format("--record: a trace holds one list of pre-loaded experts, got --prompts with --preload-by {}, which "
                    "makes one for each; leave --record out, or preload by aggregate",
                    arguments.preload_by));
  }
}

// What came out of one prompt.
struct Generated {
  std::vector<std::int64_t> tokens;
  std::string stop = "length";  // or "eos", "interrupted"
  std::string text;
};

// Runs one prompt to its end. Text, or where there is no tokenizer the ids, goes to stdout unless `quiet`.
Generated generated_from(Decoder& decoder, const Prompt& prompt, std::int64_t sequence,
                         const std::vector<std::int64_t>& eos, std::int64_t most_steps, const Tokenizer* tokenizer,
                         bool quiet) {
  Generated generated;
  std::optional<Stream> stream;
  if (tokenizer != nullptr) {
    stream.emplace(*tokenizer, !quiet);
  }
  std::vector<std::int64_t>& tokens = generated.tokens;
  decoder.begin(torch::tensor(prompt.tokens, torch::kInt64).unsqueeze(0), sequence);
  while (true) {
    const torch::Tensor chosen = decoder.tokens();
    tokens.push_back(chosen[0][chosen.size(1) - 1].item<std::int64_t>());
    if (std::find(eos.begin(), eos.end(), tokens.back()) != eos.end()) {
      generated.stop = "eos";
      break;
    }
    if (stream) {
      stream->add(tokens.back());
      stream->print(/*last=*/false);
    } else if (!quiet) {
      std::cout << (tokens.size() > 1 ? "," : "") << tokens.back() << std::flush;
    }
    if (decoder.times().steps >= most_steps) {
      break;
    }
    if (interrupt_flag().load()) {
      generated.stop = "interrupted";
      break;
    }
    decoder.decode(1);
  }
  if (stream) {
    stream->print(/*last=*/true);
    generated.text = stream->text();
  }
  if (!quiet) {
    std::cout << std::endl;
  }
  return generated;
}

void run_generate(const GenerateArguments& arguments) {
  check_prompts_options(arguments);
  if (!arguments.prompt_tokens.empty() && !arguments.chat.empty()) {
    throw UsageError("--chat: lays out the text of --prompt, got --prompt-tokens; give --prompt TEXT");
  }
  if (arguments.chat.empty() && !arguments.system.empty()) {
    throw UsageError(
        "--system: only serves --chat; give the chat format of the model's family, for example --chat tulu");
  }
  if (arguments.logits_in_trace && !is_packed(arguments.record)) {
    throw UsageError(
        fmt::format("--record-logits: without a file the logits go into a packed trace, got --record \"{}\"; give "
                    "--record FILE.h5, or --record-logits FILE.safetensors",
                    arguments.record.string()));
  }
  if (arguments.max_tokens < 1) {
    throw UsageError(fmt::format("--max-tokens: must be at least 1, got {}", arguments.max_tokens));
  }
  if (!(arguments.temperature >= 0) || !std::isfinite(arguments.temperature)) {
    throw UsageError(fmt::format("--temperature: must be at least 0 (0 is greedy), got {}", arguments.temperature));
  }
  if (!(arguments.top_p > 0 && arguments.top_p <= 1)) {
    throw UsageError(fmt::format("--top-p: must be above 0 and at most 1, got {}", arguments.top_p));
  }
  const torch::Device device = device_from_recipe(arguments.device);
  const torch::Dtype dtype = dtype_from_recipe(arguments.dtype);
  const ExpertFormat format = expert_format_from_name(arguments.expert_format);
  std::optional<std::int64_t> pinned_budget;
  if (!arguments.pinned_memory.empty()) {
    pinned_budget = parse_pinned_memory(arguments.pinned_memory, "--pinned-memory");
  }
  const Architecture stored = read_architecture(arguments.model);
  // Everything that can be wrong is looked at before the weights are read.
  std::optional<std::unique_ptr<Tokenizer>> tokenizer;
  const std::vector<Prompt> prompts = prompts_of(arguments, stored, tokenizer);
  const bool many = !arguments.prompts.empty();
  std::optional<RoutingTrace> trace;
  std::string fold;
  if (!arguments.replay.empty()) {
    trace = read_trace(arguments.replay);
    if (arguments.fold) {
      FoldedTrace folded =
          fold_trace(*trace, {static_cast<std::int64_t>(stored.moe_layers().size()), stored.num_experts});
      fold = folded.description();
      log_info(fold);
      trace = std::move(folded.trace);
    }
    static_cast<void>(replay_of(*trace, {first_turn(*trace)}, stored));
  } else if (arguments.fold) {
    throw UsageError("--fold: lays a trace onto the model's shape; give the trace with --replay");
  }

  DecoderOptions options;
  const std::int64_t blob_bytes = stored_expert_bytes(stored, dtype, format);
  const PrefetchKind prefetch = prefetch_from_name(arguments.prefetch);
  if (!arguments.expert_slots.empty()) {
    options.cache.emplace();
    options.cache->slots = parse_expert_slots(arguments.expert_slots, stored, blob_bytes, stored.top_k);
    options.cache->policy = policy_from_name(arguments.policy);
    options.cache->fetch = fetch_path_from_name(arguments.fetch);
    options.cache->prefetch = prefetch;
    options.cache->gamma = arguments.gamma;
    options.cache->seed = arguments.seed;
  }
  options.start = start_from_name(arguments.start);
  std::optional<Preload> preload = preload_from(arguments, stored);
  for (const Prompt& prompt : prompts) {
    options.capacity =
        std::max(options.capacity, static_cast<std::int64_t>(prompt.tokens.size()) + arguments.max_tokens);
  }
  options.sampling = {arguments.temperature, arguments.top_p, arguments.seed};
  options.graph = !arguments.no_graph;
  options.record = !arguments.record.empty();
  options.record_logits = arguments.logits_in_trace || !arguments.record_logits.empty();

  std::optional<BundleManifest> manifest;
  const auto load_router = [&](OffloadedModel& loaded) {
    if (!arguments.router.empty()) {
      manifest = load_bundle(loaded.model, arguments.router);
      merge_adapters(loaded);
    }
  };
  OffloadedModel offloaded =
      arguments.random_weights
          ? create_offloaded(stored, dtype, device, *arguments.random_weights, arguments.quiet, format, load_router,
                             pinned_budget)
          : load_offloaded(arguments.model, dtype, device, arguments.quiet, format, load_router, pinned_budget);
  if (arguments.random_weights) {
    log_warning("weights are random: text, routing and hit rates say nothing of a trained model");
  }
  const Json expert_error = expert_error_json(offloaded.store);
  const Json expert_store = expert_store_json(offloaded.store);
  options.residency = residency_from(arguments.residency, arguments.everywhere, manifest, stored);
  std::vector<std::int64_t> prompt;  // the one that runs
  if (preload) {
    set_preload(*preload, offloaded.model, prompt, options);
  }
  const Architecture architecture = offloaded.model->architecture();
  Decoder decoder(std::move(offloaded), options);
  std::int64_t most_steps = arguments.max_tokens - 1;
  if (trace) {
    DecodeReplay replay = replay_of(*trace, {first_turn(*trace)}, architecture);
    most_steps = std::min(most_steps, replay.steps_LSBK.size(1));
    decoder.replay(std::move(replay));
    log_warning("replay: experts are the trace's, so speed and hits are real and the text is not the model's");
  }

  // With all experts there a rule changes no choice, and a replay makes none.
  const ResidencyRule* const served =
      options.cache && !trace && options.residency && options.residency->lambda > 0 ? &*options.residency : nullptr;
  const Tokenizer* const text_of = tokenizer ? tokenizer->get() : nullptr;
  const bool traced = options.record || options.record_logits;
  const auto moe_layers = static_cast<std::int64_t>(architecture.moe_layers().size());
  const auto scope_found = [&] {
    return served->scope.everywhere() ? Json()
                                      : Json{{"domains", served->scope.domains},
                                             {"elsewhere", served->scope.elsewhere},
                                             {"share_of_layers", decoder.scope_share()}};
  };
  const auto result_of = [&](const Generated& generated, std::size_t prompt_length) {
    const DecodeTimes& times = decoder.times();
    Totals totals;
    add_counts(totals, decoder.counts());
    Json found = {
        {"format_version", 1},
        {"program", {{"version", program_version()}, {"commit", program_commit()}}},
        {"machine", machine_info()},
        {"model", arguments.model.string()},
        {"router", arguments.router.empty() ? "base" : arguments.router.string()},
        {"mode", trace ? "replay" : "live"},
        {"chat", arguments.chat.empty() ? Json() : Json(arguments.chat)},
        {"fold", fold.empty() ? Json() : Json(fold)},
        {"random_weights", arguments.random_weights.has_value()},
        {"device", device.str()},
        {"dtype", arguments.dtype},
        {"expert_format", stored_format_name(dtype, format)},
        {"expert_bytes", blob_bytes},
        {"expert_error", expert_error},
        {"expert_store", expert_store},
        {"prompt_tokens", prompt_length},
        {"tokens", generated.tokens},
        {"text", text_of != nullptr ? Json(generated.text) : Json()},
        {"stop", generated.stop},
        {"cuda_graph", decoder.in_graphs()},
        {"kernels", decoder.in_kernels()},
        {"traced", traced},
        {"ttft_seconds", times.prompt_seconds},
        {"decode_steps", times.steps},
        {"tokens_per_second", rate_of(times)},
    };
    if (options.cache) {
      const SlotCacheOptions& cache = *options.cache;
      found["cache"] = {
          {"slots_per_layer", cache.slots.per_layer},
          {"pool_slots", cache.slots.pool},
          {"slot_bytes", decoder.slots().slot_bytes()},
          {"policy", arguments.policy},
          {"fetch", fetch_path_name(decoder.fetch_path())},
          {"start", arguments.start},
          {"preload", preload ? preload_json(preload->source, preload->found) : Json()},
          {"requests", totals.requests},
          {"hits", totals.hits},
          {"cold", totals.cold},
          {"loads", totals.loads},
          {"evictions", totals.evictions},
          {"hit_rate", per(totals.hits, totals.requests)},
          {"loads_per_token_and_layer", per(totals.loads, times.steps * moe_layers)},
          {"bytes_per_token", per(totals.loads * blob_bytes, times.steps)},
          {"prefetch", prefetch_json(decoder)},
      };
    } else {
      found["cache"] = nullptr;
    }
    found["residency"] =
        served != nullptr ? Json{{"score", residency_score_name(served->score)}, {"lambda", served->lambda},
                                 {"layer_factors", served->layer_factors},       {"always_keep", served->always_keep},
                                 {"preserve_mass", served->preserve_mass},       {"scope", scope_found()}}
                          : Json();
    found["warnings"] = degradations();
    return found;
  };

  Recorder recorder(arguments);
  Totals totals;
  PrefetchTotals prefetched;
  DecodeTimes all;
  std::int64_t prompt_tokens = 0;
  std::int64_t new_tokens = 0;
  std::string stop;
  Json result;
  std::int64_t sequence = 0;
  for (const Prompt& next : prompts) {
    prompt = next.tokens;
    std::vector<std::int64_t> eos;
    if (!arguments.ignore_eos && !trace) {
      eos = next.ends;
      eos.push_back(architecture.eos_token_id);
      if (text_of != nullptr) {
        eos.push_back(text_of->eos_id());
      }
    }
    if (many && !arguments.json) {
      std::cout << (sequence > 0 ? "\n" : "") << "--- sequence " << sequence
                << (next.id.is_null() ? "" : fmt::format(", id {}", next.id.dump())) << std::endl;
    }
    const Generated generated = generated_from(decoder, next, sequence, eos, most_steps, text_of, arguments.json);
    stop = generated.stop;
    if (traced) {
      recorder.add(decoder, sequence);
    }
    if (arguments.json) {
      result = result_of(generated, prompt.size());
    }
    if (arguments.json && many) {
      result["sequence"] = sequence;
      result["id"] = next.id;
      std::cout << result.dump() << std::endl;
    }
    add_counts(totals, decoder.counts());
    add_prefetched(prefetched, decoder.prefetch_totals());
    all.prompt_seconds += decoder.times().prompt_seconds;
    all.step_seconds += decoder.times().step_seconds;
    all.steps += decoder.times().steps;
    prompt_tokens += static_cast<std::int64_t>(prompt.size());
    new_tokens += static_cast<std::int64_t>(generated.tokens.size());
    ++sequence;
    if (stop == "interrupted") {
      break;
    }
  }
  if (traced) {
    recorder.write(architecture, blob_bytes, preload);
  }
  if (arguments.json && !many) {
    std::cout << result.dump(2) << std::endl;
  }
  if (!arguments.json) {
    std::vector<std::pair<std::string, std::string>> rows = {
        {"tokens", fmt::format("{} prompt, {} generated ({})", prompt_tokens, new_tokens,
                               many ? fmt::format("{} sequences", sequence) : stop)},
        {"first token", fmt::format("{}{}", format_seconds(all.prompt_seconds / static_cast<double>(sequence)),
                                    many ? " on average" : "")},
        {"speed", fmt::format("{:.1f} tokens/s over {} steps{}", rate_of(all), all.steps,
                              traced ? " (traced: not a benchmark run)" : "")}};
    if (!expert_error.is_null()) {
      rows.emplace_back("packed", fmt::format("{}, {} an expert, relative square error {:.3g} (worst layer {:.3g})",
                                              arguments.expert_format, format_bytes(static_cast<double>(blob_bytes)),
                                              expert_error["mean"].get<double>(), expert_error["max"].get<double>()));
    }
    if (options.cache) {
      rows.emplace_back("experts",
                        fmt::format("{} slots {}, {} on the device, {} policy, {} start", decoder.slots().num_slots(),
                                    options.cache->slots.per_layer > 0 ? "per layer" : "in one pool",
                                    format_bytes(static_cast<double>(decoder.slots().slot_bytes())), arguments.policy,
                                    arguments.start));
      rows.emplace_back("hits", fmt::format("{} of {} requests ({:.1f} %)", totals.hits, totals.requests,
                                            100.0 * per(totals.hits, totals.requests)));
      rows.emplace_back(
          "loads", fmt::format("{:.3f} per token and layer, {} per token", per(totals.loads, all.steps * moe_layers),
                               format_bytes(per(totals.loads * blob_bytes, all.steps))));
      if (decoder.prefetch() != PrefetchKind::kOff) {
        rows.emplace_back("prefetch",
                          fmt::format("{}: {} of {} guesses right ({:.1f} %), {} useful and {} wasted per token",
                                      prefetch_name(decoder.prefetch()), prefetched.right, prefetched.guesses,
                                      100.0 * per(prefetched.right, prefetched.guesses),
                                      format_bytes(per(prefetched.useful_bytes, all.steps)),
                                      format_bytes(per(prefetched.copied_bytes - prefetched.useful_bytes, all.steps))));
      }
    } else {
      rows.emplace_back("experts", "all resident");
    }
    rows.emplace_back("residency",
                      served != nullptr ? fmt::format("{}, J {}", lambda_text(*served), served->always_keep) : "none");
    log_block(fmt::format("Generated with {} ({})", arguments.model.string(), trace ? "replay" : "live"), rows);
  }
  if (stop == "interrupted") {
    throw InterruptedError("generate: stopped by Ctrl-C; what was generated stands above");
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* verb =
      app.add_subcommand("generate", "generate text with most experts in host memory, and say what that took");
  verb->add_option("--model", arguments->model, "model directory with config.json, weights and tokeniser")
      ->required()
      ->option_text("DIR");
  verb->add_option("--router", arguments->router, "router bundle to serve in place of the model's own routers")
      ->option_text("BUNDLE");
  verb->add_option("--prompt", arguments->prompt, "text to go on from")->option_text("TEXT");
  verb->add_option("--prompts", arguments->prompts,
                   "JSON lines with a prompt each, run one after the other, the slots begun anew for each")
      ->option_text("FILE");
  verb->add_option("--chat", arguments->chat,
                   fmt::format("lay the prompt out as a user's message: {} (docs/recipes.md)",
                               fmt::join(template_names(), ", ")))
      ->option_text("FORMAT");
  verb->add_option("--system", arguments->system, "with --chat: the system message before it")->option_text("TEXT");
  verb->add_option("--prompt-tokens", arguments->prompt_tokens, "token ids in place of text, for example 1,2,3")
      ->option_text("IDS");
  verb->add_option("--max-tokens", arguments->max_tokens, "most tokens to generate")->capture_default_str();
  verb->add_option("--expert-slots", arguments->expert_slots,
                   "experts on the device: 16 per layer, total:256 in one pool, memory:6GiB (default: all)")
      ->option_text("N");
  verb->add_option("--policy", arguments->policy, "which expert leaves: lru, lfu, gamma, lifo, fifo, random, static")
      ->capture_default_str();
  verb->add_option(
          "--fetch", arguments->fetch,
          "how misses come: auto, together (one kernel copies and computes), copies (the copy engine, told by a host "
          "thread), waves (kernels of their own), staged (the copy engine, told by the host between kernels)")
      ->capture_default_str();
  verb->add_option(
          "--prefetch", arguments->prefetch,
          "what the link brings while nothing is asked for: off, or next-gate (what the next layer's gate would "
          "choose too early and has no slot)")
      ->capture_default_str();
  verb->add_option("--gamma", arguments->gamma, "discount of the policy gamma")->capture_default_str();
  verb->add_option("--start", arguments->start,
                   "slots at the first step: cold, prefill for what the prompt used, or preload from statistics")
      ->capture_default_str();
  verb->add_option("--preload", arguments->preload, "preferences.h5 to preload from (default: the bundle's)")
      ->option_text("FILE");
  verb->add_option("--preload-by", arguments->preload_by,
                   "which experts: aggregate (most used of all), predictor (guessed from the prompt), or nearest (most "
                   "used after the stored prompt that routed most alike)")
      ->capture_default_str();
  verb->add_option("--preload-router", arguments->preload_router,
                   "whose statistics: baseline or tuned (default: that of --router)")
      ->option_text("NAME");
  verb->add_flag("--residency-everywhere", arguments->everywhere,
                 "serve that rule for every prompt, also where the bundle's is for some text alone");
  verb->add_option("--residency-prior", arguments->residency,
                   "prefer experts that are there: LAMBDA,J or LAMBDA,J,logit|weight|root (or +mass behind it), then a "
                   "factor of LAMBDA "
                   "per MoE layer or none, off, or bundle for the bundle's own rule")
      ->capture_default_str();
  verb->add_option("--temperature", arguments->temperature, "0: always the likeliest token")->capture_default_str();
  verb->add_option("--top-p", arguments->top_p, "draw among the likeliest tokens that reach this probability together")
      ->capture_default_str();
  verb->add_option("--seed", arguments->seed, "of drawn tokens and the policy random")->capture_default_str();
  verb->add_option("--device", arguments->device, "cpu, cuda, cuda:N or auto")->capture_default_str();
  verb->add_option("--dtype", arguments->dtype, "bfloat16 or float32")->capture_default_str();
  verb->add_option("--expert-format", arguments->expert_format,
                   "experts in memory: bf16 (as --dtype says), or packed at loading: int8, int4, int4-asymmetric")
      ->capture_default_str();
  verb->add_option(
          "--pinned-memory", arguments->pinned_memory,
          "on a GPU: most pinned host memory for experts, as 8GiB; those beyond it pass through staging buffers "
          "(default: all are pinned)")
      ->option_text("BYTES");
  verb->add_option("--random-weights", arguments->random_weights,
                   "make weights of this seed in memory: DIR needs only config.json (for replay)")
      ->option_text("SEED");
  verb->add_flag("--ignore-eos", arguments->ignore_eos, "go on after the end-of-text token");
  verb->add_flag("--no-graph", arguments->no_graph, "on a GPU: no CUDA graphs");
  verb->add_option("--record", arguments->record, "write the routing trace: CSV, or packed when it ends in .h5")
      ->option_text("FILE");
  CLI::Option* logits =
      verb->add_option(
              "--record-logits", arguments->record_logits,
              "and the router logits: into the trace, which then ends in .h5; with a FILE those of the steps into "
              "it, as `hestia score` reads them")
          ->expected(0, 1)
          ->option_text("[FILE]");
  verb->add_option("--record-logits-sequences", arguments->logits_sequences,
                   "with --record-logits and --prompts: of the first N sequences only; 0: of all")
      ->option_text("N");
  verb->add_option("--replay", arguments->replay, "serve the experts of this trace's first sequence")
      ->option_text("TRACE");
  verb->add_flag("--fold", arguments->fold, "lay the trace onto the model's layers and experts (docs/routing.md)");
  verb->add_flag("--json", arguments->json,
                 "one JSON object in place of text and statistics; with --prompts one a line for each");
  verb->add_flag("--quiet", arguments->quiet, "no progress bar");
  verb->footer("Example: hestia generate --model checkpoints/tiny --expert-slots 4 --prompt \"The kernel\"");
  verb->callback([arguments, logits, verb] {
    for (const char* of_slots : {"--policy", "--fetch", "--prefetch", "--gamma", "--start", "--preload", "--preload-by",
                                 "--preload-router", "--residency-everywhere"}) {
      if (verb->count(of_slots) > 0 && arguments->expert_slots.empty()) {
        throw UsageError(
            fmt::format("{}: is about expert slots, and all experts are on the device; give --expert-slots, or leave "
                        "it out",
                        of_slots));
      }
    }
    if (arguments->expert_slots.empty() && arguments->residency != "off" && arguments->residency != "bundle") {
      throw UsageError(fmt::format(
          "--residency-prior: prefers experts that are there, and all are, got \"{}\"; give --expert-slots, "
          "or leave it out",
          arguments->residency));
    }
    const bool none = arguments->record_logits.empty() || arguments->record_logits.front().empty();
    arguments->logits_in_trace = logits->count() > 0 && none;
    if (none) {
      arguments->record_logits.clear();
    }
    run_generate(*arguments);
  });
}

}  // namespace hestia
