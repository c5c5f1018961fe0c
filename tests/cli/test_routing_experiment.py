#!/usr/bin/env python3
"""The driver of the routing experiment on a toy: pretraining, arms, interruption, going on, table and picture; factors
of lambda by layer.

    test_routing_experiment.py PROGRAM
"""

import importlib.util
import json
import math
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "benchmarks" / "routing_experiment"
PROGRAM = sys.argv.pop() if len(sys.argv) > 1 else str(ROOT / "build" / "bin" / "hestia")
sys.path.insert(0, str(FOLDER))
SPEC = importlib.util.spec_from_file_location("driver", FOLDER / "driver.py")
driver = importlib.util.module_from_spec(SPEC)
sys.modules["driver"] = driver
SPEC.loader.exec_module(driver)
import layers  # noqa: E402 (of the same folder; imports the driver)

TOY_MODEL = (
    "architecture.hidden_size=16 architecture.expert_intermediate_size=8 architecture.num_layers=2 "
    "architecture.num_attention_heads=2 architecture.num_key_value_heads=2 architecture.num_experts=8 "
    "architecture.top_k=2 architecture.initializer_range=0.2 tokenizer.vocab_size=320 tokenizer.sample_bytes=200000 "
    "train.steps=4 train.warmup_steps=1 train.evaluate_every=0 train.evaluate_tokens=500"
).split()
TOY = (
    "model.device=cpu model.dtype=float32 model.threads=1 data.sequence_length=64 data.held_out_fraction=0.3 "
    "train.rows_per_batch=2"
).split()
TOY_ARMS = (
    "train.steps=2 train.warmup_steps=1 train.log_every=1 evaluate.static_set=[2] "
    "evaluate.residency_prior.always_keep=[1] evaluate.residency_prior.lambdas=[0.5] residency.always_keep=1"
    " evaluate.residency_prior.weight_lambdas=[0.25]"
).split()
SMALL = ("--tuned-tokens", 1500, "--other-tokens", 300, "--problems", 3)
ARMS = """# a comment
python - 1 base
python router 1 nll_1e-2 train.learning_rate=1e-2
python router,all 1 cs.2 losses.cache_simulation.weight=0.2
python router+lora 1 loop residency.in_loop=true residency.lambda=0.3 train.lora.rank=2
"""


DOMAINS = driver.domains_of(FOLDER / "tune_a.yaml", ["python"])


def toy_corpus(folder):
    source = random.Random(4)
    folder.mkdir()
    for domain in DOMAINS:
        words = ["".join(source.choices("abcdefghij", k=4)) for _ in range(12)]
        lines = [{"name": str(n), "text": " ".join(source.choices(words, k=150))} for n in range(80)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(5)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    choices = [{"goal": f"Take {n}.", "sol1": "one", "sol2": "another", "label": n % 2} for n in range(4)]
    (folder.parent / "choices").mkdir()
    (folder.parent / "choices" / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in choices))


class Experiment(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = pathlib.Path(temporary.name)
        toy_corpus(self.out / "corpus")
        (self.out / "arms.txt").write_text(ARMS)

    def command(self, verb, *more):
        arguments = [sys.executable, FOLDER / "driver.py", verb, "--out", self.out, *more]
        if verb in ("pretrain", "run"):
            arguments += ["--program", PROGRAM, "--corpus", self.out / "corpus", "--gpus", "cpu", *TOY]
            arguments += TOY_MODEL if verb == "pretrain" else TOY_ARMS
        return [str(word) for word in arguments]

    def call(self, verb, *more, code=0):
        done = subprocess.run(self.command(verb, *more), capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def run_arms(self, *more, code=0):
        words = ["--arms", self.out / "arms.txt", *SMALL, "--choices", self.out / "choices"]
        return self.call("run", *words, *more, code=code)

    def rows(self):
        return driver.read_rows(self.out / "results.jsonl")

    def test_end_to_end(self):
        self.assertIn("make it with driver.py pretrain", self.run_arms(code=1))
        self.call("pretrain")
        self.assertFalse((self.out / "base" / "checkpoints").exists())
        self.assertIn("there already", self.call("pretrain"))
        self.assertIn("no arms yet", self.call("table", code=1))

        # Too little time for anything: what was begun is ended and leaves nothing.
        self.assertIn("0 arms done, 0 failed, 5 to go", self.run_arms("--seconds", 0.2))
        self.assertEqual(self.rows(), [])
        # Interrupted while arms run: what landed stays, the next call does the rest, once.
        arguments = self.command("run", "--arms", self.out / "arms.txt", *SMALL, "--choices", self.out / "choices")
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for _ in range(600):
                if self.rows():
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            said = process.communicate()[0]
        self.assertRegex(said, r"[1-4] arms done, 0 failed, [1-4] to go")
        self.assertFalse((self.out / "arms").exists())
        first = len(self.rows())
        self.assertIn(f"{5 - first} arms done, 0 failed, 0 to go", self.run_arms("--jobs-per-gpu", 2))
        self.assertIn("0 arms done, 0 failed, 0 to go", self.run_arms())
        rows = {row["arm"]: row for row in self.rows()}
        self.assertEqual(len(rows), 5)
        self.assertEqual(len(self.rows()), 5)

        base = rows["python/-/base/seed1"]
        self.assertEqual([point["residency"] for point in base["points"]][0], None)
        for row in rows.values():
            task = row["points"][0]["tasks"][0]
            self.assertEqual((task["task"], task["kind"], task["count"]), ("gsm8k", "exact_match", 3), row["arm"])
            task = row["points"][0]["tasks"][1]
            self.assertEqual((task["task"], task["kind"], task["count"]), ("piqa", "multiple_choice", 4), row["arm"])
        self.assertEqual(base["points"][1]["residency"], {"lambda": 0.5, "always_keep": 1, "slots": 2})
        loop = rows["python/router+lora/loop/seed1"]
        self.assertEqual([p["residency"] and p["residency"]["lambda"] for p in loop["points"]], [None, 0.5, 0.25, 0.3])
        self.assertEqual([(p["residency"] or {}).get("score") for p in loop["points"]], [None, None, "weight", None])
        whole = rows["python/all/cs.2/seed1"]["points"][0]["domains"]
        self.assertEqual(sorted(whole), sorted(DOMAINS))
        for domain, figures in whole.items():
            self.assertNotEqual(figures["nll"], base["points"][0]["domains"][domain]["nll"], domain)
            self.assertEqual(sorted(figures["loads"]["lru"]), ["1", "2", "4"])
            self.assertEqual(sorted(figures["loads"]), ["belady", "lru"])
        self.assertEqual(list(whole["python"]["static_set"]), ["2"])
        self.assertEqual({row["base_sha256"] for row in rows.values()}, {driver.sha256_of(self.out / "base" / "model")})

        said = self.call("table")
        self.assertRegex(said, r"router +cs\.2 +1 ")
        self.assertRegex(said, r"router +cs\.2 +0\.5, J 1 +1 ")
        self.assertRegex(said, r"router +cs\.2 +1 +\d+\.\d \([+-]\d+\.\d\) +\d+\.\d \([+-]\d+\.\d\)\n")
        weak, strong = (
            base["points"][0]["domains"]["python"]["loads"]["lru"]["2"] / point["domains"]["python"]["loads"]["lru"]["2"]
            for point in (loop["points"][3], loop["points"][1])
        )
        self.assertRegex(self.call("table", "--at", (weak + strong) / 2), r"router\+lora +loop +\*, J 1 +1 +- +[+-]\d")
        self.assertIn("a number above 0, got 0;", self.call("table", "--at", 0, code=2))
        self.assertIn("not allowed with", self.call("table", "--at", 4, "--front", code=2))
        self.assertIn("must be a folder with JSON-lines files", self.run_arms("--choices", self.out / "base" / "model", code=2))
        self.call("plot", "--svg", self.out / "plot.svg")
        xml.etree.ElementTree.parse(self.out / "plot.svg")

        # One arm that cannot run does not keep the others from it.
        (self.out / "arms.txt").write_text(
            "python router 1 bad train.learning_rate=fast\npython router 1 nll_1e-1 train.learning_rate=1e-1\n"
        )
        said = self.run_arms(code=1)
        self.assertIn("1 arms done, 1 failed, 0 to go", said)
        self.assertIn("train.learning_rate", said)
        # Arms of another base model.
        other = {**base, "base_sha256": "0" * 64}
        with (self.out / "results.jsonl").open("a") as stream:
            stream.write(json.dumps(other) + "\n")
        self.assertIn("cannot be compared", self.call("table", code=1))
        self.assertIn("another base model (000000000000)", self.run_arms(code=1))

    def test_layers_are_measured_one_at_a_time(self):
        self.call("pretrain")
        arguments = [FOLDER / "layers.py", "--out", self.out, "--corpus", self.out / "corpus", "--program", PROGRAM]
        arguments += ["--gpus", "cpu", "--others", "kernel,go", "--tokens", 600]
        by_logit = ["--lambdas", "0.3,0.9"]
        in_loop = ["residency.lambda=0.7", "residency.always_keep=0", "residency.in_loop=true", "residency.ramp_steps=5"]
        by_root = ["--score", "root", "--budget", "0.5", "--others", ""]
        self.measure_layers([*arguments, *by_logit, *TOY, *in_loop], "logit", [0.3, 0.9], ["python", "kernel", "go"])
        self.measure_layers([*arguments, *by_root, *TOY], "root", [0.4, 0.6, 1.0], ["python"])
        arguments = [sys.executable, FOLDER / "layers.py", "--out", self.out / "none", "--program", PROGRAM]
        missing = subprocess.run(arguments, capture_output=True, text=True, check=False)
        self.assertIn("make it with driver.py pretrain", missing.stderr)

    def measure_layers(self, arguments, score, lambdas, domains):
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
        said = "the rule costs nothing here"  # so it may come out on a model that has learnt nothing
        self.assertTrue(done.returncode == 0 or said in done.stderr, done.stderr)
        for layer in range(2):
            results = json.loads((self.out / "layers" / score / str(layer) / "results.json").read_text())
            plain, *others = results["arms"]
            weak, strong = others[0], others[-1]
            self.assertIsNone(plain["residency"])
            self.assertEqual([arm["residency"]["lambda"] for arm in others], lambdas)
            self.assertEqual({arm["residency"]["score"] for arm in others}, {score})
            self.assertEqual(strong["residency"]["layer_factors"], [int(other == layer) for other in range(2)])
            self.assertEqual([d["domain"] for d in plain["domains"]], domains)
            loads = [
                next(c for c in arm["domains"][0]["cache"] if c["slots"] == 2)["loads_per_token_layer"]
                for arm in (plain, weak, strong)
            ]
            self.assertLess(loads[2], loads[0])
            self.assertLessEqual(loads[1], loads[0])
        if done.returncode == 0:
            kept = json.loads((self.out / ("layers_root.json" if score == "root" else "layers.json")).read_text())
            self.assertEqual(kept["score"], score)
            self.assertEqual([len(points) for points in kept["layers"]], [len(lambdas)] * 2)
            self.assertIn(f"layer_factors={json.dumps(kept['layer_factors']).replace(' ', '')}", done.stdout)

    def test_factors_by_layer_have_equal_prices(self):
        source = random.Random(9)

        def layer(cost, rate, top):
            return [
                {"lambda": x, "saved": top * (1 - math.exp(-rate * x)), "nll": cost * x * x, "nll_others": cost * x * x}
                for x in (0.2, 0.3, 0.5)
            ]

        for _ in range(20):
            kinds = [(source.uniform(0.01, 0.03), source.uniform(4, 8), source.uniform(2, 5)) for _ in range(6)]
            measured = [layer(*kind) for kind in kinds]
            result = layers.choose(measured, 0.25)
            self.assertAlmostEqual(layers.cost_of(measured[0]), kinds[0][0], 9)
            wanted = sum(layers.saved_at(points, 0.25) for points in measured)
            self.assertLess(abs(result["expected_saved"] / wanted - 1), 0.01)
            self.assertLess(result["expected_nll"], result["expected_nll_of_uniform"] * 1.01)
            # What is moved from one layer to another at the same savings costs more, but for the grid's steps.
            costs, strengths = result["cost_of_lambda_squared"], [0.25 * f for f in result["layer_factors"]]
            for one, other in ((0, 1), (2, 5), (4, 3)):
                moved = list(strengths)
                moved[one] += 0.04
                lost = layers.saved_at(measured[one], moved[one]) - layers.saved_at(measured[one], strengths[one])
                have = layers.saved_at(measured[other], strengths[other])
                while layers.saved_at(measured[other], moved[other]) > have - lost and moved[other] > 0:
                    moved[other] -= 0.0005
                was = sum(c * x * x for c, x in zip(costs, strengths))
                self.assertGreater(sum(c * x * x for c, x in zip(costs, moved)), was - 2e-5)
        even = layers.choose([layer(0.02, 6, 3)] * 4, 0.25)
        self.assertEqual(even["layer_factors"], [1.0] * 4)
        first_costs_more = layers.choose([layer(0.06, 6, 3), *[layer(0.02, 6, 3)] * 3], 0.25)["layer_factors"]
        self.assertLess(first_costs_more[0], 0.9)
        self.assertEqual(len(set(first_costs_more[1:])), 1)
        self.assertGreater(first_costs_more[1], 1.0)
        with self.assertRaisesRegex(SystemExit, "the rule costs nothing"):
            layers.choose([layer(-0.01, 6, 3)] * 2, 0.25)

    def test_domains_that_are_measured(self):
        more = driver.domains_of(FOLDER / "tune_a.yaml", ["gsm8k", "functions"])
        self.assertEqual(set(more) - set(DOMAINS), {"functions", "humaneval"})
        self.assertNotIn("gsm8k_test", more)
        (self.out / "arms.txt").write_text("functions router 1 nll train.learning_rate=1e-3\n")
        self.call("pretrain")
        self.assertIn("need --tuned python,gsm8k,functions, or --only", self.run_arms(code=1))


class Corpus(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = pathlib.Path(temporary.name)

    def test_corpus_of_functions(self):
        documented = 'def double(number):\n    """Returns twice the number, as every test of it says."""\n'
        long = f"    {documented[:-1].replace(chr(10), chr(10) + '    ')}\n        total = {' + '.join(['number'] * 20)}\n        return total\n"
        source = f"class Kept:\n{long}\ndef plain():\n    return 1\n\n{documented}    return 2 * number\n"
        found = driver.corpus.functions_of(source)
        self.assertEqual(len(found), 1, "one has no docstring, one is short")
        self.assertTrue(found[0].startswith("def double(number):\n    "))
        self.assertTrue(found[0].endswith("    return total\n"))
        self.assertEqual(driver.corpus.functions_of("print 'of another Python'"), [])
        package = self.out / "unpacked" / driver.corpus.PYTHON_PACKAGES[0] / "usr/lib/python3.11/deep"
        package.mkdir(parents=True)
        for number in range(30):
            (package / f"module{number}.py").write_text(source.replace("double", f"double{number % 20}"))
        lines, size = driver.corpus.function_lines(self.out)
        text = "".join(json.loads(line)["text"] for line in lines)
        self.assertEqual(size, len(text.encode()))
        names = set(re.findall(r"^def (\w+)", text, flags=re.MULTILINE))
        self.assertEqual(len(re.findall(r"^def ", text, flags=re.MULTILINE)), len(names), "each once")
        self.assertGreater(len(names), 10)
        for line in lines:
            self.assertGreaterEqual(len(json.loads(line)["text"]), driver.corpus.PROBLEMS_BYTES)

    def test_corpus_of_humaneval(self):
        problem = {"prompt": "def one():\n" + '    """' + "x" * 900 + '"""\n', "canonical_solution": "    return 1\n\n"}
        path = self.out / "HumanEval.jsonl"
        path.write_text("".join(json.dumps({**problem, "task_id": number}) + "\n" for number in range(7)))
        lines, size = driver.corpus.humaneval_lines(path)
        self.assertEqual(len(lines), 2)
        self.assertEqual([json.loads(line)["text"].count("    return 1\n\n\n") for line in lines], [3, 3])
        self.assertEqual(size, sum(len(json.loads(line)["text"]) for line in lines))


class Table(unittest.TestCase):
    @staticmethod
    def row(trainable, name, loads, perplexity, outside=10.0, seed=1, overrides=()):
        def figures(value):
            return {
                "nll": driver.math.log(value),
                "perplexity": value,
                "loads": {"lru": {"16": loads}, "belady": {"16": loads / 2}},
                "static_set": {"16": 2 * value},
                "expert_overlap_ratio": 0.5,
                "usage_entropy": 0.9,
            }

        point = {"residency": None, "domains": {"python": figures(perplexity), "prose": figures(outside)}}
        return {
            "domain": "python",
            "trainable": trainable,
            "name": name,
            "seed": seed,
            "overrides": list(overrides),
            "experts": 64,
            "points": [point],
        }

    def test_tasks_against_plain_tuning(self):
        def row(trainable, name, seed, ppl, piqa, gsm8k=0.5):
            figures = {"python": {"perplexity": ppl}}
            tasks = [{"task": "gsm8k", "accuracy": gsm8k, "count": 5}]
            tasks += [{"task": "piqa", "accuracy": 0.1, "accuracy_by_bytes": piqa, "count": 40}]
            point = {"domains": figures, "tasks": tasks}
            arm = {"domain": "python", "trainable": trainable, "name": name, "seed": seed, "overrides": []}
            return {**arm, "points": [point]}

        rows = [row("-", "base", 1, 9.0, 0.7), row("router", "nll_a", 1, 8.0, 0.5), row("router", "nll_b", 1, 7.0, 0.65)]
        rows += [row("router", "nll_b", 2, 7.2, 0.55), row("router", "arm", 1, 7.5, 0.62, 0.25)]
        text = driver.tasks_text(rows, "python").splitlines()
        self.assertRegex(text[2], r"^- +base +1 +50\.0 +70\.0$")
        self.assertRegex(text[3], r"^router +nll_a +1 +50\.0 \(\+0\.0\) +50\.0 \(-15\.0\)$", "of the same seed")
        self.assertRegex(text[4], r"^router +nll_b +2 +50\.0 +60\.0$")
        self.assertRegex(text[5], r"^router +arm +1 +25\.0 \(-25\.0\) +62\.0 \(-3\.0\)$", "of the same seed")
        # Another seed than plain tuning has; and twice as many steps, which are compared among themselves.
        longer = [row("router", "nll_long", 1, 6.0, 0.7), row("router", "arm_long", 1, 6.5, 0.65)]
        for long in longer:
            long["overrides"] = ["train.steps=600"]
        text = driver.tasks_text([*rows, row("router", "arm_3", 3, 7.5, 0.62), *longer], "python").splitlines()
        self.assertRegex(text[6], r"^router +arm_3 +1 +50\.0 \(\+0\.0~\) +62\.0 \(\+2\.0~\)$")
        self.assertRegex(text[7], r"^router +nll_long +1 +50\.0 +70\.0$")
        self.assertRegex(text[8], r"^router +arm_long +1 +50\.0 \(\+0\.0\) +65\.0 \(-5\.0\)$")
        self.assertEqual(driver.tasks_text([{**rows[0], "points": [{"domains": {}}]}], "python"), "")
        rows[2]["points"][0]["tasks"][1]["count"] = 41
        with self.assertRaisesRegex(SystemExit, "piqa: rows of 40 and of 41 questions"):
            driver.tasks_text(rows, "python")

    def test_rules_of_both_scores(self):
        rule = {"format_version": 1, "lambda": 0.05, "always_keep": 1, "slots": 16, "policy": "lru"}
        rules = [None, rule, {**rule, "score": "logit"}, {**rule, "score": "weight"}, {**rule, "score": "weight"}]
        rules[-1]["slots"] = 8
        rules += [{**rule, "layer_factors": []}, {**rule, "layer_factors": [0.5, 2.0]}]
        rules += [{**rule, "preserve_mass": True}]
        rules += [{**rule, "scope": {"domains": ["python"], "elsewhere": 0.5}}, {**rule, "scope": None}]
        rules += [{**rule, "layer_factors": [1.0, 0.9, 1.2, 1.0, 1.1]}]
        rules += [{**rule, "scope": {"domains": ["python"], "elsewhere": 0, "keep": keep}} for keep in (0.95, 0.99)]
        points = driver.points_of({"arms": [{"residency": rule, "domains": []} for rule in rules]})
        self.assertEqual(
            [driver.rule_text(point["residency"], 16) for point in points],
            ["", "0.05, J 1", "0.05, J 1", "weight 0.05, J 1", "weight 0.05, J 1, C 8", "0.05, J 1"]
            + ["0.05 x 0.5/2, J 1", "0.05, J 1, mass", "0.05, J 1, for python (elsewhere x 0.5)", "0.05, J 1"]
            + ["0.05 x 0.9..1.2, J 1", "0.05, J 1, for python (elsewhere x 0)"]
            + ["0.05, J 1, for python (elsewhere x 0, keep 0.99)"],
        )

    def test_share_inside_a_scope(self):
        domain = {"domain": "python", "tokens": 4, "nll": 0.7, "perplexity": 2.0, "expert_overlap_ratio": 0.5}
        domain |= {"distinct_experts": 3.0, "usage_entropy": 0.9, "static_set": [], "cache": []}
        rule = {"lambda": 0.2, "always_keep": 0, "slots": 2, "scope": {"domains": ["python"]}}
        arms = [{"residency": None, "domains": [domain]}]
        arms += [{"residency": rule, "domains": [{**domain, "scope_share": 0.93}]}]
        plain, scoped = driver.points_of({"arms": arms})
        self.assertNotIn("scope_share", plain["domains"]["python"])
        self.assertEqual(scoped["domains"]["python"]["scope_share"], 0.93)

    def test_points(self):
        rows = [
            self.row("-", "base", 4.0, 8.0),
            self.row("router", "nll_1", 4.0, 7.0),
            self.row("router", "nll_2", 4.0, 6.0),
            self.row("router", "nll_mix", 4.0, 5.0, overrides=["data.train=[python,prose]"]),
            self.row("router", "nll_long", 4.0, 4.0, overrides=["train.steps=9"]),
            self.row("router", "long", 2.0, 5.0, overrides=["train.steps=9"]),
            self.row("router", "good", 1.0, 6.05, outside=10.05),
            self.row("router", "forgets", 1.0, 6.03, outside=12.0),
            self.row("router", "worse", 1.5, 6.1, seed=1),
            self.row("router", "worse", 1.5, 6.3, seed=2),
            self.row("router", "milder", 2.0, 6.0, outside=20.0),
            self.row("all", "nll_1", 4.0, 4.0, outside=15.0),
            self.row("all", "far", 0.3, 4.1),
            self.row("all", "holds", 0.35, 4.0, outside=15.1),
            self.row("all", "drifts", 0.3, 3.9, outside=15.2),
        ]
        points = {(p.trainable, p.name): p for p in driver.points_by_domain(rows, "python")}
        good = points["router", "good"]
        self.assertAlmostEqual(good.factor, 4.0)
        self.assertAlmostEqual(good.against_nll, 6.05 / 6 - 1)
        self.assertAlmostEqual(good.outside, 0.005)
        self.assertAlmostEqual(good.static, 1.0)
        self.assertEqual(good.targets(), "ACD")
        self.assertEqual(points["router", "forgets"].targets(), "AD")
        self.assertEqual(points["router", "milder"].targets(), "D")
        self.assertEqual(points["all", "far"].targets(), "B")
        self.assertEqual(points["all", "holds"].targets(), "BE")
        self.assertEqual(points["all", "drifts"].targets(), "B", "plain tuning's 15.0 out of domain, and 1.3 %")
        self.assertAlmostEqual(points["router", "long"].against_nll, 0.25)
        worse = points["router", "worse"]
        self.assertEqual(worse.seeds, 2)
        self.assertAlmostEqual(worse.perplexity, 6.2)
        self.assertAlmostEqual(worse.against_nll_spread, 0.2 / 6)
        self.assertFalse(worse.front)
        self.assertFalse(good.front, "another has as few loads at less perplexity")
        self.assertTrue(points["router", "forgets"].front)
        self.assertIn("Met: A, B, C, D, E", driver.table_text(rows, "python"))
        self.assertIn("~ plain tuning lacks a seed", driver.table_text(rows, "python"))

    def test_arms_at_a_number_of_times_fewer_loads(self):
        def served(row, *points, **rule):
            for strength, loads, perplexity, outside in points:
                point = self.row("", "", loads, perplexity, outside)["points"][0]
                point["residency"] = {"lambda": strength, "always_keep": 0, "slots": 16, **rule}
                row["points"].append(point)
            return row

        def line(low, high, share):  # a line through logarithms is a power of the ratio
            return low * (high / low) ** share

        # At 4 times fewer than 4 loads, 1: 3.2 and 5 times are 4/9 and 5/9 of the way.
        two = ((0.3, 0.8, 7.2, 10.4), (0.2, 1.25, 7.1, 10.2), (0.5, 0.4, 9.0, 20.0))
        rows = [served(self.row("-", "base", 4.0, 7.0), *two), served(self.row("-", "base", 4.0, 7.0, seed=2), two[0])]
        rows += [self.row("router", "nll_1", 4.0, value, 10.1, seed) for seed, value in ((1, 7.0), (2, 6.9))]
        rows += [self.row("router", "nll_2", 4.0, 7.5, 10.1)]
        rows += [served(self.row("router", "arm", 4.0, 7.0, seed=seed), *two) for seed in (1, 2)]
        rows += [served(self.row("router", "arm", 4.0, 7.0, seed=3), two[0])]
        rows += [served(self.row("router", "mixed", 4.0, 7.0), two[0])]
        rows += [served(rows.pop(), two[1], preserve_mass=True)]
        rows += [served(self.row("router", "exact", 4.0, 7.0), (0.2, 1.0, 6.95, 10.05), (0.3, 0.8, 7.1, 10.2))]
        rows += [served(self.row("router", "alone", 4.0, 7.0, seed=9), *two)]
        found = {(arm.trainable, arm.name): arm for arm in driver.crossings(rows, "python", 4.0)}
        self.assertEqual({name for _, name in found}, {"base", "arm", "exact", "alone"}, "not across rules")
        perplexity, outside = line(7.1, 7.2, 4 / 9), line(10.2, 10.4, 4 / 9)
        base = found["-", "base"]
        self.assertEqual(base.rule, "*, J 0")
        self.assertAlmostEqual(base.against_nll[0], perplexity / 7.0 - 1)
        self.assertEqual(len(base.against_nll), 1, "the base's rows are no seeds")
        arm = found["router", "arm"]
        self.assertEqual((len(arm.outside), arm.seeds), (2, 3), "the third seed has nothing beyond")
        for got, plain in zip(arm.against_nll, (7.0, 6.9)):
            self.assertAlmostEqual(got, perplexity / plain - 1)
        self.assertAlmostEqual(arm.outside[1], outside / 10 - 1)
        self.assertAlmostEqual(found["router", "exact"].against_nll[0], 6.95 / 7.0 - 1)
        alone = found["router", "alone"]
        self.assertFalse(alone.same_seeds)
        self.assertAlmostEqual(alone.against_nll[0], perplexity / math.sqrt(7.0 * 6.9) - 1)
        text = driver.crossings_text(rows, "python", 4.0)
        self.assertRegex(text, r"router +exact +\*, J 0 +1 +-0\.71% +\+0\.50% ACD\n")
        self.assertRegex(text, r"router +arm +\*, J 0 +2/3 +\+2\.80% ±0\.74 +\+2\.88% ±0\.00\n")
        self.assertRegex(text, r"router +alone +\*, J 0 +1 +\+\d\.\d+%~ ")
        self.assertIn("no arm was measured on both sides of 20 times", driver.crossings_text(rows, "python", 20.0))
        self.assertIn("no base row yet", driver.crossings_text(rows[2:], "python", 4.0))
        unlike = [row for row in rows if not row["name"].startswith("nll")]
        self.assertRegex(driver.crossings_text(unlike, "python", 4.0), r"router +exact +\*, J 0 +1 +- +\+0\.50%\n")
        some = [*rows, served(self.row("router", "exact", 4.0, 7.0, seed=2), (0.2, 1.2, 6.95, 10.05))]
        self.assertRegex(driver.crossings_text(some, "python", 4.0), r"router +exact +\*, J 0 +1/2 +-0\.71% +\+0\.50%\n")

    def test_points_against_the_same_seeds(self):
        rows = [self.row("-", "base", 4.0, 8.0)]
        rows += [self.row("router", "nll_1", 4.0, value, seed=seed) for seed, value in ((1, 7.0), (2, 7.14), (3, 7.14))]
        rows += [self.row("router", "arm", 1.0, 7.126, seed=1), self.row("router", "other", 1.0, 7.0, seed=4)]
        points = {p.name: p for p in driver.points_by_domain(rows, "python")}
        self.assertAlmostEqual(points["arm"].against_nll, 7.126 / 7.0 - 1)
        self.assertEqual(points["arm"].targets(), "")
        self.assertTrue(points["arm"].same_seeds)
        self.assertAlmostEqual(points["other"].against_nll, 7.0 / (21.28 / 3) - 1)
        self.assertFalse(points["other"].same_seeds)
        self.assertAlmostEqual(points["nll_1"].against_nll, 0.0)

    def test_rules_that_look_alike_are_no_seeds(self):
        rows = [self.row("-", "base", 4.0, 8.0), self.row("-", "base", 2.0, 8.2, seed=2), self.row("-", "base", 1.0, 8.4, seed=3)]
        for row, middle in zip(rows[1:], (1.0, 1.1)):
            factors = [0.9, 1.2, middle, 1.0, 1.0]
            row["points"][0]["residency"] = {"lambda": 0.2, "always_keep": 0, "slots": 16, "layer_factors": factors}
        points = driver.points_by_domain(rows, "python")
        self.assertEqual([(point.rule, point.seeds, point.factor) for point in points],
                         [("", 1, 1.0), ("0.2 x 0.9..1.2, J 0", 1, 2.0), ("0.2 x 0.9..1.2, J 0", 1, 4.0)])
        lines = driver.table_text(rows, "python").splitlines()
        self.assertEqual({line.index(word) for line, word in zip(lines[1:3], ("seeds", "    1"))}, {lines[1].index("seeds")})

    def test_points_of_other_text(self):
        rows = [self.row("-", "base", 4.0, 8.0), self.row("router", "nll_1", 4.0, 7.0)]
        for row, tokens in zip(rows, (32768, 8192)):
            row["points"][0]["domains"]["prose"]["tokens"] = tokens
        with self.assertRaisesRegex(SystemExit, "nll_1: measured on 8192 tokens of prose, the base on 32768"):
            driver.points_by_domain(rows, "python")
        self.assertIn("no base row yet", driver.table_text(rows[1:], "python"))
        del rows[1]["points"][0]["domains"]["prose"]
        with self.assertRaisesRegex(SystemExit, "nll_1: measured on 0 tokens of prose, the base on 32768"):
            driver.points_by_domain(rows, "python")

    def test_rows_that_were_cut_off(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "results.jsonl"
            path.write_text('{"arm": "a"}\n{"arm": "b"}\n{"ar')
            self.assertEqual(driver.read_rows(path), [{"arm": "a"}, {"arm": "b"}])
            self.assertTrue(path.read_text().endswith('{"ar'))
            self.assertEqual(len(driver.read_rows(path, mend=True)), 2)
            self.assertEqual(path.read_text(), '{"arm": "a"}\n{"arm": "b"}\n')
            path.write_text('{"arm": "a"}\n{"arm": "b"}')
            self.assertEqual(len(driver.read_rows(path)), 2)
            self.assertEqual(len(driver.read_rows(path, mend=True)), 2)
            self.assertTrue(path.read_text().endswith('{"arm": "b"}\n'))
            path.write_text('{"arm": "a"}\n{"arm"\n')
            with self.assertRaisesRegex(SystemExit, "results.jsonl:2: not JSON"):
                driver.read_rows(path)

    def test_shipped_arms(self):
        for name, at_least in (("arms_a.txt", 100), ("arms_b.txt", 30)):
            with self.subTest(name):
                self.check_arms(driver.read_arms(FOLDER / name), at_least)

    def check_arms(self, arms, at_least):
        self.assertGreaterEqual(len(arms), at_least)
        self.assertEqual({arm.trainable for arm in arms}, {"-", "router", "router+lora", "all"})
        # Every key that an arm sets, in the first arm that does.
        keys = set()
        for arm in arms:
            new = {word.partition("=")[0] for word in arm.overrides} - keys
            keys |= new
            if new and arm.trainable != driver.BASE_SET:
                words = driver.merged([f"train.trainable={arm.trainable}"], arm.overrides)
                command = [PROGRAM, "validate", "--no-files", FOLDER / "tune_a.yaml", *words]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                self.assertEqual(done.returncode, 0, f"{arm.id}: {done.stderr}")

    def test_bad_arms(self):
        wrong = ("python router 1", "python router x nll", "python - 1 nll", "python most 1 nll", "python all 1 a b")
        for text in wrong:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "arms.txt"
                path.write_text(text + "\n")
                with self.assertRaisesRegex(SystemExit, "arms.txt:1: "):
                    driver.read_arms(path)

    def test_queue_leaves_out_what_would_not_end(self):
        arms = [driver.Arm("python", trainable, 1, "x", ()) for trainable in ("all", "router")]
        rows = [
            {"trainable": trainable, "overrides": [], "seconds": {"all": seconds}}
            for trainable, seconds in (("all", 90), ("router", 20))
        ]
        queue = driver.Queue(arms, rows, time.monotonic() + 60)
        self.assertEqual(queue.next().trainable, "router")
        self.assertIsNone(queue.next())

    def test_queue_knows_long_arms_from_short_ones(self):
        recipe = (FOLDER / "tune_a.yaml").read_text()
        self.assertEqual(driver.work_of([], recipe), 150 * 16)
        self.assertEqual(driver.work_of(["train.steps=9", "train.steps=600", "train.rows_per_batch=32"], recipe), 19200)

        def queue(seconds, taught, waiting):
            arms = [driver.Arm("python", "router", 1, "x", (f"train.steps={steps}",)) for steps in waiting]
            taken = {"finetune": taught / 10, "all": taught / 10 + 20}
            rows = [{"trainable": "router", "overrides": [f"train.steps={taught}"], "seconds": taken}]
            return driver.Queue(arms, rows, time.monotonic() + seconds, lambda words: driver.work_of(words, recipe))

        # 20 s to measure and a tenth of a second a step: a short arm after a long one, no long one after a short one.
        self.assertEqual(queue(60, 600, [600, 150]).next().overrides, ("train.steps=150",))
        self.assertIsNone(queue(60, 150, [600]).next())
        self.assertIsNotNone(queue(90, 150, [600]).next())


if __name__ == "__main__":
    unittest.main()
