#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <vector>

#include <fmt/format.h>

#include "commands.hpp"
#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/trainer/recipes.hpp"

namespace hestia {

namespace {

// ./recipes where there is one, else the recipes of the source tree this program was built from.
std::filesystem::path recipe_folder() {
  for (const std::filesystem::path& folder :
       {std::filesystem::path("recipes"), std::filesystem::path(HESTIA_RECIPES)}) {
    if (std::filesystem::is_directory(folder)) {
      return folder;
    }
  }
  throw InputError("recipes: there is no recipes folder here; run this in a checkout of Hestia");
}

std::vector<std::filesystem::path> recipe_files(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".yaml") {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

// The first line of the header comment.
std::string summary_of(const std::filesystem::path& file) {
  const std::string text = read_text_file(file);
  if (text.rfind("# ", 0) != 0) {
    return "";
  }
  return text.substr(2, text.find('\n') - 2);
}

}  // namespace

void add_recipes(CLI::App& app) {
  auto name = std::make_shared<std::string>();
  CLI::App* verb = app.add_subcommand("recipes", "list the shipped recipes, or print one");
  verb->add_option("name", *name, "recipe to print (with or without .yaml)");
  verb->footer("Example: hestia recipes quickstart > my.yaml");
  verb->callback([name] {
    const std::filesystem::path folder = recipe_folder();
    const std::vector<std::filesystem::path> files = recipe_files(folder);
    if (name->empty()) {
      std::size_t width = 0;
      for (const auto& file : files) {
        width = std::max(width, file.string().size());
      }
      for (const auto& file : files) {
        std::cout << fmt::format("{:<{}}  {:<8}  {}\n", file.string(), width, recipe_task(file), summary_of(file));
      }
      return;
    }
    std::vector<std::string> names;
    for (const auto& file : files) {
      if (file.stem() == *name || file.filename() == *name) {
        std::cout << read_text_file(file);
        return;
      }
      names.push_back(file.stem().string());
    }
    const std::string near = nearest_name(*name, names);
    throw UsageError(
        fmt::format("there is no recipe \"{}\" in {}{}", *name, folder.string(),
                    near.empty() ? "; `hestia recipes` lists them" : fmt::format("; did you mean \"{}\"?", near)));
  });
}

}  // namespace hestia
