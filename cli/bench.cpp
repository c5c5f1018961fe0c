#include <iostream>
#include <memory>

#include "arguments.hpp"
#include "commands.hpp"
#include "hestia/evaluation/throughput.hpp"

namespace hestia {

void add_bench(CLI::App& app) {
  struct Arguments {
    RecipeArguments recipe;
    bool json = false;
    bool quiet = false;
  };
  auto arguments = std::make_shared<Arguments>();
  CLI::App* verb = app.add_subcommand("bench", "measure decoding over a grid of expert slots, policies and batches");
  add_recipe_arguments(*verb, arguments->recipe, "bench recipe (YAML)");
  verb->add_flag("--json", arguments->json, "one JSON object per arm, once it is measured, instead of the table");
  verb->add_flag("--quiet", arguments->quiet, "no progress bar");
  add_help_keys(*verb, "bench");
  verb->footer("Example: hestia bench recipes/bench_olmoe.yaml bench.slots=[all,16]");
  verb->callback([arguments] {
    check_overrides(arguments->recipe);
    const auto loaded = load_bench_recipe(arguments->recipe.recipe, arguments->recipe.overrides);
    const std::vector<Json> rows = run_bench(loaded, arguments->quiet, [&](const Json& row) {
      if (arguments->json) {
        std::cout << row.dump() + "\n" << std::flush;
      }
    });
    if (!arguments->json) {
      std::cout << bench_table(rows) << std::flush;
    }
  });
}

}  // namespace hestia
