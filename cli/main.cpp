#include <csignal>

#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/log.hpp"

namespace hestia {

namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may only touch lock-free atomics");

// The first Ctrl-C asks the loop to save and stop; the second ends the program at once.
void on_interrupt(int signal) {
  if (interrupted.exchange(true)) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

int fail(ExitCode code, const std::string& message) {
  log_error(message);
  return static_cast<int>(code);
}

// The argument that `app` has no use for, with the name it may stand for.
std::string unexpected_text(const CLI::App& app, const std::string& argument) {
  std::vector<std::string> known;
  const bool option = argument.starts_with('-');
  if (option) {
    for (const CLI::Option* candidate : app.get_options()) {
      for (const std::string& name : candidate->get_lnames()) {
        known.push_back("--" + name);
      }
    }
  } else {
    for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
      known.push_back(verb->get_name());
    }
  }
  const char* what = option ? "unknown option" : known.empty() ? "unexpected argument" : "unknown verb";
  const std::string near = nearest_name(argument.substr(0, argument.find('=')), known);
  return fmt::format("{} \"{}\"{}", what, argument, near.empty() ? "" : fmt::format(" (did you mean \"{}\"?)", near));
}

int usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* asked = &app;
  if (app.remaining().empty() && !app.get_subcommands().empty()) {
    asked = app.get_subcommands().front();
  }
  const std::vector<std::string> unexpected = asked->remaining();
  return fail(ExitCode::kUsage,
              fmt::format("{}; see `hestia{} --help`",
                          unexpected.empty() ? error.what() : unexpected_text(*asked, unexpected.front()),
                          asked == &app ? "" : " " + asked->get_name()));
}

int run(int argc, char** argv) {
  check_log_environment();
  CLI::App app{
      "Fine-tunes the routers of Mixture-of-Experts language models, exports them, and measures what that buys."};
  app.name("hestia");
  app.get_formatter()->label("SUBCOMMAND", "VERB");
  app.group("Verbs");  // which the verbs inherit
  app.require_subcommand(0, 1);
  app.footer(
      "`hestia VERB --help` explains one verb. Results go to stdout, everything else to stderr.\n"
      "Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 input missing or damaged, 130 interrupted "
      "(resumable).");
  add_finetune(app);
  add_export(app);
  add_evaluate(app);
  add_pretrain(app);
  add_generate(app);
  add_bench(app);
  add_simulate(app);
  add_score(app);
  add_validate(app);
  add_inspect(app);
  add_recipes(app);
  add_logits(app);
  add_upcycle(app);
  add_version(app);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      std::cerr << app.help() << "\n";
      return fail(ExitCode::kUsage, "give a verb, got none; see the list above");
    }
    // A full disk or a closed pipe shows here at the latest.
    if (!std::cout.flush()) {
      return fail(ExitCode::kFailed, "stdout: the results cannot be written; check space and where they go");
    }
    return static_cast<int>(ExitCode::kDone);
  } catch (const CLI::Success& success) {
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error);
  }
}

}  // namespace

const std::atomic<bool>& interrupt_flag() {
  std::signal(SIGINT, on_interrupt);
  return interrupted;
}

}  // namespace hestia

int main(int argc, char** argv) {
  using namespace hestia;  // NOLINT(google-build-using-namespace)
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    return fail(error.exit_code(), error.what());
  } catch (const c10::Error& error) {
    return fail(ExitCode::kFailed, first_line(error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    return fail(ExitCode::kFailed, "out of memory; use smaller train.rows_per_batch or data.sequence_length");
  } catch (const std::exception& error) {
    return fail(ExitCode::kFailed, first_line(error.what()));
  }
}
