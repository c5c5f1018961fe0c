#include "hestia/trainer/bundle.hpp"

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "temporary_folder.hpp"
#include "tiny_model.hpp"

using namespace hestia;
using hestia::testing::tiny_model;

namespace {

BundleManifest write_example(const std::filesystem::path& directory) {
  MoeModel base = tiny_model();
  BundleManifest manifest;
  manifest.model_family = "olmoe";
  manifest.model_path = "/models/base";
  manifest.architecture = architecture_config(base->architecture());
  manifest.base_router_hash = router_hash(base);
  const torch::NoGradGuard no_grad;
  for (torch::Tensor& router : base->routers()) {
    router.mul_(1.25);
  }
  manifest.router_hash = router_hash(base);
  manifest.recipe = "recipe_version: 1\n";
  manifest.residency.slots = 2;
  manifest.residency.logit_range = {1.5F, 2.25F};
  manifest.metrics = {{"baseline", {{"nll", 2.0}}}, {"tuned", {{"nll", 2.1}}}};
  write_bundle(directory, base, manifest);
  return manifest;
}

void edit_manifest(const std::filesystem::path& directory, const std::function<void(Json&)>& edit) {
  Json json = read_json_file(directory / "manifest.json");
  edit(json);
  write_text_atomically(directory / "manifest.json", json.dump());
}

}  // namespace

TEST_CASE("a bundle read back is the bundle written") {
  const TemporaryFolder folder;
  const BundleManifest written = write_example(folder.path());
  MoeModel model = tiny_model();
  const torch::Tensor base = model->routers()[1].detach().clone();
  const BundleManifest read = load_bundle(model, folder.path());
  CHECK(read.router_hash == written.router_hash);
  CHECK(read.residency.logit_range == written.residency.logit_range);
  CHECK(read.residency.slots == 2);
  CHECK(read.metrics == written.metrics);
  CHECK(torch::equal(model->routers()[1], base * 1.25));
}

TEST_CASE("a bundle on the wrong base is refused with both identities") {
  const TemporaryFolder folder;
  const BundleManifest written = write_example(folder.path());
  MoeModel other = tiny_model(99);
  const std::string identity = router_hash(other);
  CHECK_THROWS_WITH(load_bundle(other, folder.path()), Catch::Contains("another base model") &&
                                                           Catch::Contains(written.base_router_hash.substr(0, 12)) &&
                                                           Catch::Contains(identity.substr(0, 12)));
  CHECK(router_hash(other) == identity);
}

TEST_CASE("damaged bundles say what is wrong") {
  const TemporaryFolder folder;
  write_example(folder.path());
  SECTION("no manifest") {
    std::filesystem::remove(folder.path() / "manifest.json");
    CHECK_THROWS_WITH(read_manifest(folder.path()), Catch::Contains("manifest.json is missing"));
  }
  SECTION("not JSON") {
    write_text_atomically(folder.path() / "manifest.json", "{\"kind\": ");
    CHECK_THROWS_AS(read_manifest(folder.path()), InputError);
  }
  SECTION("another kind of file") {
    write_text_atomically(folder.path() / "manifest.json", "{\"kind\": \"something\"}");
    CHECK_THROWS_WITH(read_manifest(folder.path()), Catch::Contains("not the manifest of a router bundle"));
  }
  SECTION("a newer format") {
    edit_manifest(folder.path(), [](Json& json) { json["format_version"] = 7; });
    CHECK_THROWS_WITH(read_manifest(folder.path()), Catch::Contains("format version 7") && Catch::Contains("(1)"));
  }
  SECTION("missing keys, all of them listed") {
    edit_manifest(folder.path(), [](Json& json) {
      json.erase("router_hash");
      json.erase("residency");
    });
    CHECK_THROWS_WITH(read_manifest(folder.path()),
                      Catch::Contains("\"router_hash\" is missing") && Catch::Contains("\"residency\" is missing"));
  }
  SECTION("a key of the wrong type") {
    edit_manifest(folder.path(), [](Json& json) { json["base_router_hash"] = 5; });
    CHECK_THROWS_WITH(read_manifest(folder.path()), Catch::Contains("\"base_router_hash\" has the wrong type, got 5"));
  }
  SECTION("routers of another run") {
    MoeModel model = tiny_model(5);
    save_routers(model, folder.path() / "router.safetensors");
    MoeModel base = tiny_model();
    CHECK_THROWS_WITH(load_bundle(base, folder.path()), Catch::Contains("does not match manifest.json"));
  }
  SECTION("a truncated router file") {
    std::string bytes = read_text_file(folder.path() / "router.safetensors");
    write_text_atomically(folder.path() / "router.safetensors", bytes.substr(0, bytes.size() / 2));
    MoeModel base = tiny_model();
    CHECK_THROWS_AS(load_bundle(base, folder.path()), InputError);
  }
}
