#pragma once

#include <atomic>

#include <CLI/CLI.hpp>

namespace hestia {

// One function per verb, each in the file of its name: registers a subcommand whose callback does the work and throws
// hestia::Error on failure.
void add_finetune(CLI::App& app);
void add_pretrain(CLI::App& app);
void add_export(CLI::App& app);
void add_evaluate(CLI::App& app);
void add_simulate(CLI::App& app);
void add_score(CLI::App& app);
void add_validate(CLI::App& app);
void add_generate(CLI::App& app);
void add_bench(CLI::App& app);
void add_inspect(CLI::App& app);
void add_recipes(CLI::App& app);
void add_logits(CLI::App& app);
void add_upcycle(CLI::App& app);
void add_version(CLI::App& app);

/// Set by SIGINT; the training loop saves and stops.
[[nodiscard]] const std::atomic<bool>& interrupt_flag();

}  // namespace hestia
