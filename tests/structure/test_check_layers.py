"""Builds small source trees with one forbidden thing each and expects check_layers to name exactly that."""

import tempfile
import unittest
from pathlib import Path

import check_layers

LAYERS = """# comment
core:              | torch-free
routing: core      | torch-free
model: core        | torch
"""


class CheckLayers(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name).resolve()
        self.write("cmake/layers.txt", LAYERS)
        self.write("include/hestia/core/error.hpp", "#pragma once\n#include <string>\n")
        self.write("include/hestia/routing/trace.hpp", '#pragma once\n#include "hestia/core/error.hpp"\n')
        self.write("include/hestia/model/model.hpp", "#pragma once\n#include <torch/types.h>\n")
        self.write("core/error.cpp", '#include "hestia/core/error.hpp"\n')
        self.write("routing/rows.hpp", "#pragma once\n")
        self.write("routing/trace.cpp", '#include "hestia/routing/trace.hpp"\n\n#include "rows.hpp"\n')
        self.write("model/model.cpp", '#include "hestia/model/model.hpp"\n// #include "hestia/routing/trace.hpp"\n')

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def includes(self):
        return check_layers.check_includes(self.root)[0]

    def links(self, graph):
        self.write("graph.txt", graph)
        return check_layers.check_links(self.root, self.root / "graph.txt")[0]

    def test_a_clean_tree_passes(self):
        self.assertEqual(self.includes(), [])
        self.assertEqual(self.links("hestia_core: fmt\nhestia_routing: hestia_core ZLIB::ZLIB\nhestia_model: hestia_core torch\n"), [])

    def test_upward_include(self):
        self.write("core/log.cpp", '#include <string>\n#include "hestia/routing/trace.hpp"\n')
        self.assertEqual(self.includes(), ["core/log.cpp:2: core may not use routing, got 'hestia/routing/trace.hpp'"])

    def test_sideways_include_in_a_public_header(self):
        self.write("include/hestia/model/model.hpp", "#pragma once\n#  include <hestia/routing/trace.hpp>\n")
        self.assertEqual(self.includes(), ["include/hestia/model/model.hpp:2: model may not use routing, got 'hestia/routing/trace.hpp'"])

    def test_include_after_a_block_comment_keeps_its_line(self):
        self.write("core/log.cpp", '/* three\n lines\n here */\n#include "hestia/model/model.hpp"\n')
        self.assertEqual(self.includes(), ["core/log.cpp:4: core may not use model, got 'hestia/model/model.hpp'"])

    def test_torch_in_a_torch_free_module(self):
        for header in ("torch/torch.h", "ATen/ATen.h", "c10/util/Half.h"):
            with self.subTest(header):
                self.write("routing/trace.cpp", f"#include <{header}>\n")
                self.assertEqual(self.includes(), [f"routing/trace.cpp:1: routing is torch-free, got <{header}>"])

    def test_torch_in_a_device_source(self):
        self.write("model/block.cu", "#include <ATen/ATen.h>\n")
        self.assertEqual(self.includes(), ["model/block.cu:1: sources for nvcc never include torch, got <ATen/ATen.h>"])

    def test_internal_header_of_another_module(self):
        for header in ("../routing/rows.hpp", "routing/rows.hpp"):
            with self.subTest(header):
                self.write("model/model.cpp", f'#include "{header}"\n')
                self.assertEqual(self.includes(), [f"model/model.cpp:1: internal headers are for their own module, got '{header}' of routing"])

    def test_public_header_that_includes_an_internal_one(self):
        self.write("include/hestia/routing/trace.hpp", '#pragma once\n#include "rows.hpp"\n')
        self.assertEqual(self.includes(), ["include/hestia/routing/trace.hpp:2: a public header may only include public headers, got 'rows.hpp'"])

    def test_header_that_is_not_there(self):
        self.write("routing/trace.cpp", '#include "hestia/core/gone.hpp"\n#include "gone.hpp"\n')
        self.assertEqual(self.includes(), ["routing/trace.cpp:1: no such public header, got 'hestia/core/gone.hpp'",
                                           "routing/trace.cpp:2: no such header in routing/, got 'gone.hpp'"])

    def test_module_that_is_not_in_the_table(self):
        self.write("extra/CMakeLists.txt", "hestia_module(extra SOURCES extra.cpp)\n")
        self.write("include/hestia/other/other.hpp", "#pragma once\n")
        self.assertEqual(self.includes(), ["include/hestia/other: module is not in cmake/layers.txt", "extra: module is not in cmake/layers.txt"])

    def test_empty_tree_is_no_success(self):
        for folder in ("core", "routing", "model", "include"):
            for path in sorted((self.root / folder).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        self.assertEqual(self.includes(), [f"{self.root}: no source of any module found"])

    def test_links(self):
        self.assertEqual(self.links("hestia_core: hestia_routing\nhestia_routing: hestia_core torch\nhestia_model: hestia_routing hestia_test_main\n"),
                         ["core: may not link routing", "routing: is torch-free, got a link to torch", "model: may not link routing",
                          "model: links a target that is no module, got hestia_test_main"])

    def test_torch_by_its_file_name(self):
        self.assertEqual(self.links("hestia_core: /opt/lib/libc10.so\nhestia_routing: hestia_pch hestia_torch\nhestia_model: torch\n"),
                         ["core: is torch-free, got a link to /opt/lib/libc10.so", "routing: is torch-free, got a link to hestia_pch",
                          "routing: is torch-free, got a link to hestia_torch"])

    def test_module_without_a_target(self):
        self.assertEqual(self.links("hestia_core: fmt\nhestia_model: torch\n"), ["routing: has sources but no target hestia_routing"])

    def test_table_that_breaks_its_own_rules(self):
        for text, message in (("core: routing | torch-free\nrouting: | torch-free\n", "may only use modules above"),
                              ("core: | torch\nrouting: core | torch-free\n", "which are not"), ("core routing\n", "layers.txt:1")):
            with self.subTest(text):
                self.write("cmake/layers.txt", text)
                with self.assertRaisesRegex(SystemExit, message):
                    check_layers.read_layers(self.root)

    def test_table_quoted_in_contributing(self):
        rows = ["| `core/` | nothing of ours | no |", "| `routing/` | core | no |", "| `model/` | core | yes |"]
        self.write("CONTRIBUTING.md", "\n".join(rows))
        self.assertEqual(check_layers.check_table(self.root)[0], [])
        self.write("CONTRIBUTING.md", "\n".join([rows[0], "| `routing/` | core, model | no |", rows[2]]))
        self.assertEqual(check_layers.check_table(self.root)[0],
                         ["CONTRIBUTING.md: row is missing, wanted | `routing/` | core | no |",
                          "CONTRIBUTING.md: row is not in cmake/layers.txt, got | `routing/` | core, model | no |"])
        self.write("CONTRIBUTING.md", "\n".join(reversed(rows)))
        self.assertEqual(check_layers.check_table(self.root)[0], ["CONTRIBUTING.md: rows are not in the order of cmake/layers.txt"])


if __name__ == "__main__":
    unittest.main()
