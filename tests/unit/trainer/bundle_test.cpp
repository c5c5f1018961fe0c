#include "hestia/trainer/bundle.hpp"

#include <catch2/catch.hpp>

#include "hestia/core/error.hpp"
#include "hestia/core/files.hpp"
#include "hestia/model/adapters.hpp"
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
  manifest.residency.layer_factors = {0.7, 1.3};
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
  CHECK(read.residency.layer_factors == written.residency.layer_factors);
  CHECK(read.residency.slots == 2);
  CHECK(read.metrics == written.metrics);
  CHECK(torch::equal(model->routers()[1], base * 1.25));
}

TEST_CASE("adapters and K travel in the bundle, and give way to those of the next") {
  const TemporaryFolder folder;
  MoeModel tuned = tiny_model();
  BundleManifest manifest = write_example(folder.path() / "plain");
  manifest.router_hash = router_hash(tuned);
  create_adapters(tuned, {3, 6.0}, 4);
  tuned->set_top_k(1);
  write_bundle(folder.path() / "adapted", tuned, manifest);

  MoeModel model = tiny_model();
  const BundleManifest read = load_bundle(model, folder.path() / "adapted");
  CHECK(read.top_k == 1);
  CHECK(model->architecture().top_k == 1);
  REQUIRE(read.adapters);
  CHECK(read.adapters->rank == 3);
  CHECK(read.adapters->alpha == 6.0);
  CHECK(read.adapters->sha256 == sha256_hex(MappedFile(folder.path() / "adapted" / "adapters.safetensors").bytes()));
  REQUIRE(model->adapters().size() == tuned->adapters().size());
  for (std::size_t i = 0; i < model->adapters().size(); ++i) {
    CHECK(torch::equal(model->adapters()[i], tuned->adapters()[i]));
  }
  // Its routers are the base's, so that the other one fits after it.
  const BundleManifest plain = load_bundle(model, folder.path() / "plain");
  CHECK_FALSE(plain.adapters);
  CHECK(plain.top_k == 2);
  CHECK(model->adapters().empty());
  CHECK(model->architecture().top_k == 2);

  const auto adapted = folder.path() / "adapted";
  MoeModel fresh = tiny_model();
  SECTION("adapters of another run") {
    create_adapters(tuned, {3, 6.0}, 5);
    save_adapters(tuned, adapted / "adapters.safetensors");
    CHECK_THROWS_WITH(load_bundle(fresh, adapted),
                      Catch::Contains("adapters.safetensors does not match manifest.json"));
    CHECK(fresh->adapters().empty());
  }
  SECTION("adapters missing") {
    std::filesystem::remove(adapted / "adapters.safetensors");
    CHECK_THROWS_WITH(load_bundle(fresh, adapted), Catch::Contains("adapters.safetensors"));
  }
  SECTION("a manifest that is damaged") {
    edit_manifest(adapted, [](Json& json) {
      json["top_k"] = "two";
      json["adapters"].erase("rank");
    });
    CHECK_THROWS_WITH(read_manifest(adapted), Catch::Contains("\"top_k\" has the wrong type, got \"two\"") &&
                                                  Catch::Contains("adapters: key \"rank\" is missing"));
    edit_manifest(adapted, [](Json& json) {
      json["top_k"] = 0;
      json["adapters"] = 5;
    });
    CHECK_THROWS_WITH(read_manifest(adapted), Catch::Contains("\"top_k\" must be at least 1, got 0") &&
                                                  Catch::Contains("\"adapters\" must be an object or null, got 5"));
  }
  SECTION("a K that the model has not got") {
    edit_manifest(adapted, [](Json& json) { json["top_k"] = 9; });
    CHECK_THROWS_WITH(load_bundle(fresh, adapted), Catch::Contains("at most the model's 8 experts, got 9"));
  }
  SECTION("exported again without adapters, none are left behind") {
    tuned->remove_adapters();
    write_bundle(adapted, tuned, manifest);
    CHECK_FALSE(std::filesystem::exists(adapted / "adapters.safetensors"));
    CHECK_FALSE(read_manifest(adapted).adapters);
  }
}

TEST_CASE("a bundle of format 1 is served with the base's K") {
  const TemporaryFolder folder;
  write_example(folder.path());
  edit_manifest(folder.path(), [](Json& json) {
    json["format_version"] = 1;
    json.erase("top_k");
    json.erase("adapters");
  });
  MoeModel model = tiny_model();
  const BundleManifest read = load_bundle(model, folder.path());
  CHECK(read.top_k == 2);
  CHECK_FALSE(read.adapters);
  CHECK(model->architecture().top_k == 2);
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
    CHECK_THROWS_WITH(read_manifest(folder.path()), Catch::Contains("format version 7") && Catch::Contains("(2)"));
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
  SECTION("a rule of another number of layers") {
    edit_manifest(folder.path(), [](Json& json) { json["residency"]["layer_factors"] = {0.7}; });
    MoeModel base = tiny_model();
    CHECK_THROWS_WITH(load_bundle(base, folder.path()),
                      Catch::Contains("layer_factors must have one number per MoE layer") && Catch::Contains("got 1"));
    edit_manifest(folder.path(), [](Json& json) {
      json["residency"]["layer_factors"] = {0.7, 1.0, 1.0};
      json["residency"]["logit_range"] = {1.0, 1.0, 1.0};
    });
    CHECK_THROWS_WITH(load_bundle(base, folder.path()), Catch::Contains("one number per MoE layer (2), got 3"));
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
