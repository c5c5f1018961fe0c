#!/usr/bin/env python3
"""The routing traces in benchmarks/traces: their table is what the program makes of them, and the decoder replays them.

    test_kept_traces.py PROGRAM
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRACES = ROOT / "benchmarks" / "traces"
FILES = {"base": "a_base_python.h5", "tuned": "a_loop_distill_python.h5"}
PROGRAM = sys.argv.pop() if len(sys.argv) > 1 else str(ROOT / "build" / "bin" / "hestia")
SLOTS = (8, 16, 32)
STEPS, LAYERS, TOP_K = 25400, 16, 8
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 64,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def output_of(*words):
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


class KeptTraces(unittest.TestCase):
    def test_they_are_small(self):
        self.assertEqual(sorted(path.name for path in TRACES.glob("*.h5")), sorted(FILES.values()))
        self.assertLess(sum(path.stat().st_size for path in TRACES.iterdir()), 10_000_000)

    def test_loads_are_those_of_the_table(self):
        table = (TRACES / "README.md").read_text()
        for name, file in FILES.items():
            lines = output_of("simulate", TRACES / file, "--policy", "lru", "--slots", "8,16,32", "--json").splitlines()
            rows = [json.loads(line) for line in lines]
            self.assertEqual([row["slots"] for row in rows], list(SLOTS))
            self.assertEqual({row["requests"] for row in rows}, {STEPS * LAYERS * TOP_K})
            said = re.search(rf"^\| {name}, loads \| (\d+) \| (\d+) \| (\d+) \|", table, flags=re.MULTILINE)
            self.assertEqual([row["loads"] for row in rows], [int(loads) for loads in said.groups()], name)

    def test_the_decoder_replays_them(self):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "config.json").write_text(json.dumps(CONFIG))
            for name, loads in (("base", 7289), ("tuned", 1257)):  # of the first sequence; 1257 was counted on a GPU
                words = ["generate", "--model", folder, "--random-weights", 1, "--replay", TRACES / FILES[name]]
                words += ["--prompt-tokens", 1, "--max-tokens", 128, "--ignore-eos", "--expert-slots", 16]
                run = json.loads(output_of(*words, "--device", "cpu", "--json", "--quiet"))
                self.assertEqual(run["cache"]["requests"], 127 * LAYERS * TOP_K)
                self.assertEqual(run["cache"]["loads"], loads, name)


if __name__ == "__main__":
    unittest.main()
