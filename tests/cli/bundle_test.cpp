#include <catch2/catch.hpp>

#include "cli_fixtures.hpp"
#include "hestia/core/json_lines.hpp"

namespace hestia::testing {
namespace {

TEST_CASE("a damaged router bundle is refused by inspect and evaluate, with what to do") {
  const SmallProject project;
  project.pretrain();
  done(project.run({"finetune", "finetune.yaml", "control.enabled=false", "train.steps=1", "--quiet"}));
  const std::vector<std::string> evaluate = {"evaluate", "finetune.yaml", "train.steps=1", "control.enabled=false",
                                             "--quiet"};
  done(project.run({"export", "finetune.yaml", "train.steps=1", "--quiet"}));
  const std::string bundle = "runs/tuned/bundle";
  const std::string manifest = project.read(bundle + "/manifest.json");
  const std::string router = project.read(bundle + "/router.safetensors");
  const std::string preferences = project.read(bundle + "/preferences.h5");
  // Making a bundle takes seconds, so all damages are done to this one, which is mended in between.
  const auto restore = [&] {
    project.write(bundle + "/manifest.json", manifest);
    project.write(bundle + "/router.safetensors", router);
    project.write(bundle + "/preferences.h5", preferences);
  };
  const auto both = [&](const std::vector<std::string>& parts) {
    check_complaint(project.run({"inspect", bundle}), 3, parts);
    check_complaint(project.run(evaluate), 3, parts);
  };
  const auto edited = [&](const std::function<void(Json&)>& edit) {
    Json json = Json::parse(manifest);
    edit(json);
    project.write(bundle + "/manifest.json", json.dump(2));
  };

  {
    restore();
    INFO("manifest.json is cut");
    project.write(bundle + "/manifest.json", manifest.substr(0, manifest.size() / 2));
    both({bundle + "/manifest.json:", "not valid JSON"});
  }
  {
    restore();
    INFO("manifest.json is another file");
    project.write(bundle + "/manifest.json", "{\"name\": \"web app\"}");
    both({bundle + "/manifest.json", "not the manifest of a router bundle", "hestia export"});
  }
  {
    restore();
    INFO("a newer format");
    edited([](Json& json) { json["format_version"] = 9; });
    both({"format version 9", "supports (2)", "update the program"});
  }
  {
    restore();
    INFO("keys missing and wrong, all of them listed");
    edited([](Json& json) {
      json.erase("router_hash");
      json["model_path"] = 7;
      json["residency"]["slots"] = "many";
    });
    both({"\"router_hash\" is missing", "\"model_path\" has the wrong type, got 7", "\"slots\" has the wrong type",
          "export the bundle again"});
  }
  {
    restore();
    INFO("the residency rule is no object");
    edited([](Json& json) { json["residency"] = 5; });
    both({"\"residency\": must be an object, got 5"});
  }
  {
    restore();
    INFO("router.safetensors is cut");
    project.write(bundle + "/router.safetensors", router.substr(0, router.size() - 100));
    both({bundle + "/router.safetensors", "truncated", "again"});
  }
  {
    restore();
    INFO("router.safetensors is missing");
    std::filesystem::remove(project.path() / bundle / "router.safetensors");
    both({bundle + "/router.safetensors", "No such file"});
  }
  {
    restore();
    INFO("preferences.h5 is cut");
    project.write(bundle + "/preferences.h5", preferences.substr(0, preferences.size() / 2));
    check_complaint(project.run({"inspect", bundle}), 3, {bundle + "/preferences.h5"});
    done(project.run(evaluate));  // which does not need it
  }
  {
    restore();
    INFO("the routers of another run");
    std::string other = router;
    other[other.size() - 3] ^= 0x10;
    project.write(bundle + "/router.safetensors", other);
    check_complaint(project.run(evaluate), 3,
                    {"router.safetensors does not match manifest.json", "export the bundle again"});
  }
  {
    restore();
    INFO("the base is another model");
    done(project.run({"pretrain", "pretrain.yaml", "run_dir=runs/other", "seed=99", "--quiet"}));
    std::vector<std::string> arguments = evaluate;
    arguments.push_back("model.path=runs/other/model");
    const std::string base = Json::parse(manifest).at("base_router_hash").get<std::string>();
    check_complaint(project.run(arguments), 3,
                    {bundle, "another base model", "runs/base/model", base.substr(0, 12), "tuned from"});
  }
  {
    restore();
    INFO("it is not there");
    std::vector<std::string> arguments = evaluate;
    arguments.insert(arguments.end(), {"--bundle", "elsewhere"});
    check_complaint(project.run(arguments), 3, {"elsewhere: there is no router bundle", "hestia export"});
  }
  {
    restore();
    INFO("whole again");
    CHECK_THAT(done(project.run(evaluate)), Catch::Contains("tuned"));
  }
}

}  // namespace
}  // namespace hestia::testing
