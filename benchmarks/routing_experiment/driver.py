#!/usr/bin/env python3
"""The routing experiment: how many fewer expert loads, for how much quality, against which controls.

    driver.py corpus   --out FOLDER [--archive FILE.tar.xz]   text of the domains, out of Debian packages
    driver.py pretrain --seconds 560                          the model that every arm tunes
    driver.py run      --arms arms_a.txt --gpus 0 --jobs-per-gpu 3 --seconds 560
    driver.py table    [--domain python]                      loads against perplexity, Pareto front, targets
    driver.py table    --at 4                                 every arm at 4 times fewer loads, between its lambdas
    driver.py plot     --svg FILE                             the same as a picture

pretrain and run end within --seconds and go on where they stopped when they are called again. Every arm's figures are
appended to OUT/results.jsonl as they land; its run directory is then removed. What is compared: docs/experiments.md.
Nothing but Python's standard library is needed; the program must have been built (scripts/setup.sh, cmake).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

import corpus

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SETS = ("router", "router+lora", "all")
BASE_SET = "-"
QUESTIONS = "gsm8k_test"  # a corpus of prompts and answers that is only ever answered
FUNCTIONS = ("functions", "humaneval")  # measured where the first is among the tuned domains
SAVING_SECONDS = 45  # what an interrupted pretraining needs to write its checkpoint
NLL_PREFIX = "nll"
SHOWN_FACTORS = 4  # a rule with more factors by layer is shown with the least and the largest
KEEP = 0.95  # residency.scope.keep where nothing is said
NO_RULE = ["residency.in_loop=false", "residency.lambda=0", "residency.ramp_steps=0", "residency.train_slots=[]"]
NO_RULE += [f"residency.scope.{key}" for key in ("domains=[]", "elsewhere=0", "window=64", f"keep={KEEP}")]
BASE_NAME = "base"


# ---- Arms


@dataclasses.dataclass(frozen=True)
class Arm:
    """One tuning run, or the base model (set "-", nothing trains)."""

    domain: str
    trainable: str
    seed: int
    name: str
    overrides: tuple

    @property
    def id(self):
        return f"{self.domain}/{self.trainable}/{self.name}/seed{self.seed}"


def read_arms(path):
    """Arms in the order of the file; a line with several domains, sets or seeds stands for all their combinations."""
    arms = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) < 4 or any("=" in word for word in words[:4]) or any("=" not in word for word in words[4:]):
            sys.exit(f"{path}:{number}: want DOMAINS SETS SEEDS NAME [key=value ...], got '{line}'")
        domains, sets, seeds, name = words[0].split(","), words[1].split(","), words[2].split(","), words[3]
        known = all(word in (*SETS, BASE_SET) for word in sets) and all(word.isdigit() for word in seeds)
        if not known or (BASE_SET in sets) != (name == BASE_NAME):
            sys.exit(f"{path}:{number}: sets are {', '.join(SETS)}, or - for {BASE_NAME}; seeds numbers; got '{line}'")
        for seed in seeds:
            for trainable in sets:
                arms += [Arm(domain, trainable, int(seed), name, tuple(words[4:])) for domain in domains]
    names = [arm.id for arm in arms]
    for name in sorted({name for name in names if names.count(name) > 1}):
        sys.exit(f"{path}: {name} stands there twice; give one of them another name")
    return arms


# ---- Running the program


def domains_of(recipe, tuned):
    """Domains of text of the recipe's corpora that are measured, in their order."""
    left_out = (QUESTIONS, *(FUNCTIONS if FUNCTIONS[0] not in tuned else ()))
    return [domain for domain in corpora_of(recipe) if domain not in left_out]


def corpora_of(recipe):
    return re.findall(r"^ +- domain: (\S+)$", recipe.read_text(), flags=re.MULTILINE)


def corpus_overrides(recipe, folder):
    return [
        f"data.corpora.{number}.paths=[{folder}/{domain}.jsonl]" for number, domain in enumerate(corpora_of(recipe))
    ]


def task_overrides(problems, choices=None):
    """GSM8K's test problems as a task, laid out as its training text is, the first `problems` of them; and a task of
    likelihoods for each JSON-lines file of the folder `choices`, by its name."""
    tasks = []
    if problems > 0:
        task = {"name": "gsm8k", "kind": "exact_match", "domain": QUESTIONS, "split": "all", "answer_after": "####"}
        tasks.append(task | {"stop": ["\n\nQuestion:"], "max_new_tokens": 256, "limit": problems, "batch": problems})
    for path in sorted(choices.glob("*.jsonl")) if choices else []:
        tasks.append({"name": path.stem, "kind": "multiple_choice", "paths": [str(path)], "batch": 128})
    return [f"evaluate.tasks={json.dumps(tasks)}"] if tasks else []


def merged(*lists):
    """key=value words without repeated keys; the last of a key counts."""
    values = {}
    for words in lists:
        for word in words:
            key, _, value = word.partition("=")
            values.pop(key, None)
            values[key] = value
    return [f"{key}={value}" for key, value in values.items()]


def sha256_of(folder):
    """Of the model's files, names and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def gpu_name():
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


class Stopped(Exception):
    """The time is over, or somebody interrupted."""


class Programs:
    """Starts the program and ends what still runs once the time is over."""

    def __init__(self, program, deadline):
        self.program = program
        self.deadline = deadline
        self.running = set()
        self.lock = threading.Lock()
        self.stopping = False

    def run(self, arguments, environment=None):
        """The exit code and stderr. Raises Stopped when it had to be ended."""
        with self.lock:
            if self.stopping:
                raise Stopped
            process = subprocess.Popen(
                [self.program, *arguments],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.running.add(process)
        errors = process.communicate()[1]
        with self.lock:
            self.running.discard(process)
            if self.stopping and process.returncode != 0:
                raise Stopped
        return process.returncode, errors

    def stop(self, how=signal.SIGKILL):
        with self.lock:
            if self.stopping and how == signal.SIGINT:
                return  # told already; a second one would end the program before it has saved
            self.stopping = True
            for process in self.running:
                process.send_signal(how)


# ---- The base model


def pretrain(options):
    out = pathlib.Path(options.out)
    base = ROOT / out / "base"
    if (base / "report.json").exists():
        print(f"{base / 'model'}: there already, {sha256_of(base / 'model')[:12]}")
        return
    resume = any((base / "checkpoints").glob("step_*/DONE"))
    words = merged(corpus_overrides(options.recipe, options.corpus), [f"run_dir={out}/base"], options.overrides)
    arguments = ["pretrain", str(options.recipe), *words, "--resume" if resume else "--overwrite", "--quiet"]
    programs = Programs(options.program, time.monotonic() + options.seconds)
    timer = threading.Timer(max(1, options.seconds - SAVING_SECONDS), programs.stop, (signal.SIGINT,))
    timer.daemon = True
    timer.start()
    environment = {} if options.gpus == "cpu" else {"CUDA_VISIBLE_DEVICES": options.gpus.split(",")[0]}
    stopper = threading.Thread(target=programs.stop, args=(signal.SIGINT,), daemon=True)
    signal.signal(signal.SIGTERM, lambda *_: stopper.ident or stopper.start())
    try:
        code, errors = programs.run(arguments, environment)
    except KeyboardInterrupt:  # the terminal told the program, too
        for process in list(programs.running):
            process.communicate()
        print("interrupted; call again to go on")
        sys.exit(130)
    except Stopped:
        print("interrupted, saved; call again to go on")
        sys.exit(130)
    finally:
        timer.cancel()
    if code != 0:
        sys.exit(f"hestia pretrain exited with {code}\n{errors}")
    if not options.keep:
        shutil.rmtree(base / "checkpoints", ignore_errors=True)
    report = json.loads((base / "report.json").read_text())
    print(f"{base / 'model'}: {sha256_of(base / 'model')[:12]}, {report['parameters'] / 1e6:.0f} M parameters")
    for domain, figures in report["held_out"].items():
        print(
            f"  {domain:<12} perplexity {figures['perplexity']:.2f}, EOR {figures['expert_overlap_ratio']:.3f}, "
            f"usage entropy {figures['usage_entropy']:.3f}"
        )


# ---- Arms: figures


def figures_of(domain):
    """What a row keeps of one domain of results.json."""
    loads = {}
    for cell in domain["cache"]:
        loads.setdefault(cell["policy"], {})[str(cell["slots"])] = cell["loads_per_token_layer"]
    figures = {
        "tokens": domain["tokens"],
        "nll": domain["nll"],
        "perplexity": domain["perplexity"],
        "loads": loads,
        "expert_overlap_ratio": domain["expert_overlap_ratio"],
        "distinct_experts": domain["distinct_experts"],
        "usage_entropy": domain["usage_entropy"],
        "static_set": {str(cell["experts"]): cell["perplexity"] for cell in domain["static_set"]},
    }
    if "scope_share" in domain:
        figures["scope_share"] = domain["scope_share"]
    return figures


def points_of(results):
    """The arm served by plain Top-K, then under each residency rule: (rule or None, figures by domain)."""
    points = []
    for arm in results["arms"]:
        rule = arm["residency"] and {key: arm["residency"][key] for key in ("lambda", "always_keep", "slots")}
        if rule and arm["residency"].get("score", "logit") != "logit":  # points by logits do not name it
            rule["score"] = arm["residency"]["score"]
        if rule and arm["residency"].get("layer_factors"):
            rule["layer_factors"] = arm["residency"]["layer_factors"]
        if rule and arm["residency"].get("preserve_mass"):
            rule["preserve_mass"] = True
        if rule and arm["residency"].get("scope"):
            rule["scope"] = arm["residency"]["scope"]
        points.append({"residency": rule, "domains": {d["domain"]: figures_of(d) for d in arm["domains"]}})
        if arm.get("tasks"):
            points[-1]["tasks"] = arm["tasks"]
    return points


def training_figures(run_dir):
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["event"] == "step"]
    seconds = [step["seconds"] for step in steps]
    last = {key: value for key, value in steps[-1].items() if key not in ("event", "seconds", "tokens")}
    return {"last_step": last, "median_step_seconds": statistics.median(seconds)}


def run_arm(arm, options, programs, gpu, threads, facts):
    """Trains and measures one arm; its row of results.jsonl."""
    run_dir = pathlib.Path(options.out) / "arms" / arm.id.replace("/", "_")
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    words = merged(
        corpus_overrides(options.recipe, options.corpus),
        [f"run_dir={run_dir}", f"model.path={options.out}/base/model", f"model.threads={threads}", f"seed={arm.seed}"],
        [f"data.train=[{arm.domain}]"],
        [] if arm.trainable == BASE_SET else [f"train.trainable={arm.trainable}"],
        arm.overrides,
        options.overrides,
    )
    row = {"arm": arm.id, **dataclasses.asdict(arm), "overrides": merged(arm.overrides, options.overrides)}
    row |= {"recipe_sha256": facts["recipe"], "base_sha256": facts["base"]}
    row |= {"corpus_sha256": facts["corpus"], "gpu": facts["gpu"] if gpu is not None else "", "seconds": {}}
    begin = time.monotonic()

    def program(verb, *more):
        start = time.monotonic()
        code, errors = programs.run([verb, str(options.recipe), *more, "--quiet"], environment)
        if code != 0:
            raise RuntimeError(f"hestia {verb} exited with {code}\n{errors}")
        row["seconds"][verb] = round(row["seconds"].get(verb, 0) + time.monotonic() - start, 1)

    if arm.trainable != BASE_SET:
        program("finetune", *merged(words, [f"data.evaluate=[{arm.domain}]"]), "--overwrite")
        row["training"] = training_figures(ROOT / run_dir)
    # Domains that somebody tunes get more text and the static-set test; of the others the perplexity counts.
    measured = domains_of(options.recipe, options.tuned.split(","))
    tuned = [domain for domain in measured if domain in options.tuned.split(",")]
    others = [domain for domain in measured if domain not in options.tuned.split(",")]
    target = ["--only", "baseline"] if arm.trainable == BASE_SET else ["--only", "tuned", "--checkpoint"]
    points = []
    for domains, more in (
        (tuned, [f"evaluate.tokens_per_domain={options.tuned_tokens}", *task_overrides(options.problems, options.choices)]),
        (others, [f"evaluate.tokens_per_domain={options.other_tokens}", "evaluate.static_set=[]"]),
    ):
        program("evaluate", *merged(words, [f"data.evaluate=[{','.join(domains)}]"], more), *target)
        results = json.loads((ROOT / run_dir / "results.json").read_text())
        found = points_of(results)
        if not points:
            points = found
        else:
            for point, other in zip(points, found, strict=True):
                point["domains"] |= other["domains"]
    row |= {"commit": results["commit"], "machine": results["machine"], "device": results["device"]}
    row |= {"experts": results["model"]["experts"], "top_k": results["model"]["top_k"], "points": points}
    row["seconds"]["all"] = round(time.monotonic() - begin, 1)
    row["jobs_per_gpu"] = options.jobs_per_gpu
    if not options.keep:
        shutil.rmtree(ROOT / run_dir)
    return row


def is_json(text):
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def read_rows(path, mend=False):
    """Rows of a file of JSON lines. A last line that was cut off is left out, with a warning, and with `mend` cut from
    the file, so that rows can be appended."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text and is_json(text[len(whole) :]):  # whole but for its line break
        whole = text = text + "\n"
        if mend:
            path.write_text(text)
    elif whole != text:
        print(f"{path}: the last line was cut off and is left out", file=sys.stderr)
        if mend:
            os.truncate(path, len(whole.encode()))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            sys.exit(f"{path}:{number}: not JSON, got '{line[:60]}'; remove the line, its arm runs again")
    return rows


def work_of(overrides, recipe):
    """What an arm's training is proportional to: rows of text in all its steps."""
    words = merged(overrides)

    def number(key):
        found = [word.partition("=")[2] for word in words if word.startswith(f"train.{key}=")]
        return int((found or re.findall(rf"^  {key}: (\d+)", recipe, flags=re.MULTILINE) or ["1"])[-1])

    return number("steps") * number("rows_per_batch")


class Queue:
    """Hands out arms as long as they would end in time, by what arms of their set took so far: in training for each
    row of text, and in measuring."""

    def __init__(self, arms, rows, deadline, work=lambda overrides: 1):
        self.arms = list(arms)
        self.deadline = deadline
        self.work = work
        self.lock = threading.Lock()
        self.left_out = 0
        self.training = {}
        self.measuring = {}
        for row in rows:
            self.learn(row)

    def learn(self, row):
        trainable, training = row["trainable"], row["seconds"].get("finetune", 0)
        per_row = training / self.work(row["overrides"])
        self.training[trainable] = max(self.training.get(trainable, 0), per_row)
        self.measuring[trainable] = max(self.measuring.get(trainable, 0), row["seconds"]["all"] - training)

    def expected(self, arm):
        def longest(seconds):
            return seconds.get(arm.trainable, max(seconds.values(), default=0))

        return longest(self.measuring) + longest(self.training) * self.work(arm.overrides)

    def next(self):
        with self.lock:
            remaining = self.deadline - time.monotonic()
            for number, arm in enumerate(self.arms):
                if self.expected(arm) < remaining:
                    return self.arms.pop(number)
            return None


def run(options):
    model = ROOT / options.out / "base" / "model"
    if not (model / "config.json").exists():
        sys.exit(f"{model}: not there; make it with driver.py pretrain")
    results = ROOT / options.out / "results.jsonl"
    rows = read_rows(results, mend=True)
    manifest = ROOT / options.corpus / "manifest.json"
    facts = {
        "base": sha256_of(model),
        "recipe": hashlib.sha256(options.recipe.read_bytes()).hexdigest(),
        "corpus": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else "",
        "gpu": gpu_name(),
    }
    others = sorted({row["base_sha256"][:12] for row in rows if row["base_sha256"] != facts["base"]})
    if others:
        sys.exit(f"{results}: holds arms of another base model ({', '.join(others)}); use another --out")
    done = {row["arm"] for row in rows}
    arms = [arm for arm in read_arms(options.arms) if arm.id not in done and re.search(options.only, arm.id)]
    tuned = options.tuned.split(",")
    if strange := sorted({arm.domain for arm in arms} - set(tuned)):
        sys.exit(f"{options.arms}: arms tuned on {', '.join(strange)} need --tuned {','.join([*tuned, *strange])}, or --only")
    deadline = time.monotonic() + options.seconds
    programs = Programs(options.program, deadline)
    recipe = options.recipe.read_text()
    queue = Queue(arms, rows, deadline, lambda overrides: work_of([*overrides, *options.overrides], recipe))
    gpus = [None] if options.gpus == "cpu" else options.gpus.split(",")
    places = [gpu for _ in range(options.jobs_per_gpu) for gpu in gpus]
    threads = options.threads or max(1, (os.cpu_count() or 1) // len(places))
    failures = []
    finished = []
    lock = threading.Lock()

    def work(gpu):
        while (arm := queue.next()) is not None:
            try:
                row = run_arm(arm, options, programs, gpu, threads, facts)
            except Stopped:
                return
            except (RuntimeError, OSError, ValueError) as problem:  # the other arms go on
                with lock:
                    failures.append(arm.id)
                print(f"{arm.id}: {problem}", file=sys.stderr, flush=True)
                continue
            with lock:
                queue.learn(row)
                finished.append(arm.id)
                with results.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                left = deadline - time.monotonic()
                print(f"{arm.id}: {row['seconds']['all']} s; {left:.0f} s left", file=sys.stderr, flush=True)

    timer = threading.Timer(options.seconds, programs.stop)
    timer.daemon = True
    timer.start()
    workers = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in places]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        programs.stop()
        for worker in workers:
            worker.join()
    timer.cancel()
    if not options.keep:
        shutil.rmtree(ROOT / options.out / "arms", ignore_errors=True)
    waiting = len(arms) - len(finished) - len(failures)
    print(f"{len(finished)} arms done, {len(failures)} failed, {waiting} to go; {results}")
    if failures:
        sys.exit(1)


# ---- Arms: table and picture


@dataclasses.dataclass
class Point:
    """One arm under one residency rule, as the mean over its seeds, against the base and against plain tuning."""

    domain: str
    trainable: str
    name: str
    rule: str
    seeds: int
    loads: float  # per token and layer, LRU, E/4 slots
    loads_min: float  # the same under MIN
    factor: float  # base loads over these
    factor_spread: float  # largest less smallest over the seeds
    perplexity: float
    against_nll: float  # ratio less 1, to plain tuning of the same set and seeds at its best rate; NaN without one
    against_nll_spread: float
    same_seeds: bool  # False: plain tuning lacks one of these seeds, and all that it has count
    outside: float  # geometric mean over the domains not tuned of the ratio to the base, less 1
    outside_of_nll: float  # that of the plain tuning; NaN without one
    static: float  # perplexity with the E/4 most used experts only, over the unrestricted one, less 1
    overlap: float
    entropy: float
    front: bool = False

    def targets(self):
        return targets_met(self.trainable, self.factor, self.against_nll, self.outside, self.outside_of_nll)


@dataclasses.dataclass
class Crossing:
    """One arm under the rules that differ in lambda alone, at a number of times fewer loads: of every seed with a
    measured lambda on either side, between the two nearest."""

    trainable: str
    name: str
    rule: str  # with * for lambda
    seeds: int  # of the arm, also those that have no lambda on one side
    against_nll: list  # a value per seed, against plain tuning of that seed; NaN without one
    outside: list
    outside_of_nll: float
    same_seeds: bool


def targets_met(trainable, factor, against_nll, outside, outside_of_nll):
    """The issue's targets that these figures meet, as letters."""
    met = ""
    if trainable == "router" and factor >= 4 and against_nll <= 0.01:
        met += "AC" if outside <= 0.01 else "A"
    if trainable in ("router+lora", "all") and factor >= 10 and against_nll <= 0.05:
        met += "B"
    if trainable == "router" and factor >= 2 and against_nll <= 0.01:
        met += "D"
    if trainable in ("router+lora", "all") and factor >= 10 and against_nll <= 0:
        met += "E" if 1 + outside <= 1.01 * (1 + outside_of_nll) else ""
    return met


TARGETS = (
    "targets: A set router, at least 4x fewer loads at most 1 % over plain tuning; B router+lora or all, 10x at 5 %; "
    "C as A, and at most 1 % over the base out of domain; on subject B: D set router, 2x at 1 %; E router+lora or all, "
    "10x at 0 %, and at most 1 % over plain tuning out of domain"
)


def mean(values):
    return sum(values) / len(values)


def spread(values):
    return max(values) - min(values)


def rule_text(rule, quarter, strength=None):
    """The score where it is not the logit, lambda, its factors by layer where there are any, J, preserved mass and the
    scope where there is one, and C where the rule's cache is not the one that the table is about; strength stands for lambda
    where it is given."""
    if rule is None:
        return ""
    other = "" if rule["slots"] == quarter else f", C {rule['slots']}"
    score = f"{rule['score']} " if "score" in rule else ""
    factors = rule.get("layer_factors", [])
    if len(factors) > SHOWN_FACTORS:
        factors = f" x {min(factors):g}..{max(factors):g}"
    else:
        factors = " x " + "/".join(f"{factor:g}" for factor in factors) if factors else ""
    mass = ", mass" if rule.get("preserve_mass") else ""
    if scope := rule.get("scope"):
        keep = f", keep {scope['keep']:g}" if scope.get("keep", KEEP) != KEEP else ""
        mass += f", for {' and '.join(scope['domains'])} (elsewhere x {scope['elsewhere']:g}{keep})"
    strength = strength or f"{rule['lambda']:g}"
    return f"{score}{strength}{factors}, J {rule['always_keep']}{mass}{other}"


def override_of(row, key):
    return next((word.partition("=")[2] for word in reversed(row["overrides"]) if word.startswith(key + "=")), "")


def outside_of(figures, base, domain):
    """Mean over the domains not tuned of the negative log-likelihood, less that of the base."""
    return mean([figures[other]["nll"] - base[other]["nll"] for other in base if other != domain])


def best_plain(rows, domain, trainable, steps):
    """Figures by domain of every seed, {seed: figures}, of plain tuning for as many steps, on that domain alone, at the
    best of its learning rates; empty without any."""
    by_name = plain_by_name(rows, domain, trainable, steps)
    return by_name.get(best_plain_name(rows, domain, trainable, steps), {})


def of_seeds(by_seed, seeds):
    """What to compare with: the values of the same seeds where all are there, else of every seed; and which it was."""
    same = all(seed in by_seed for seed in seeds)
    return ([by_seed[seed] for seed in seeds] if same else list(by_seed.values())), same


def best_plain_name(rows, domain, trainable, steps=""):
    """The name of that tuning; None without any."""
    by_name = plain_by_name(rows, domain, trainable, steps)
    return min(by_name, key=lambda name: mean_perplexity(by_name[name].values(), domain), default=None)


def plain_by_name(rows, domain, trainable, steps):
    by_name = {}
    for row in rows:
        plain = row["name"].startswith(NLL_PREFIX) and not override_of(row, "data.train")
        if plain and (row["domain"], row["trainable"], override_of(row, "train.steps")) == (domain, trainable, steps):
            by_name.setdefault(row["name"], {})[row["seed"]] = row["points"][0]["domains"]
    return by_name


def mean_perplexity(seeds, domain):
    return mean([figures[domain]["perplexity"] for figures in seeds])


def check_same_text(figures, base, arm):
    """Likelihoods of other held-out text cannot be compared with the base's."""
    for domain, of_base in base.items():
        tokens = figures.get(domain, {}).get("tokens")
        if domain not in figures or tokens != of_base.get("tokens"):
            sys.exit(
                f"{arm}: measured on {tokens or 0} tokens of {domain}, the base on {of_base.get('tokens')}; run both with the "
                "same --tuned and the same evaluate.* keys"
            )


def points_by_domain(rows, domain):
    """Every point of the arms tuned on a domain; the front is marked over all of a trainable set."""
    base_rows = [row for row in rows if row["domain"] == domain and row["trainable"] == BASE_SET]
    if not base_rows:
        return []
    base = base_rows[0]["points"][0]["domains"]
    slots = str(base_rows[0]["experts"] // 4)
    groups = {}
    for row in rows:
        if row["domain"] == domain:
            for point in row["points"]:
                rule = json.dumps(point["residency"], sort_keys=True)  # its text leaves things out
                key = (row["trainable"], row["name"], rule, override_of(row, "train.steps"))
                check_same_text(point["domains"], base, row["name"])
                groups.setdefault(key, {})[row["seed"]] = point["domains"]
    points = []
    for (trainable, name, rule, steps), by_seed in groups.items():
        seeds = list(by_seed.values())
        own = [figures[domain] for figures in seeds]
        base_only = trainable == BASE_SET
        plain_seeds, same_seeds = ([base], True) if base_only else of_seeds(best_plain(rows, domain, trainable, steps), by_seed)
        plain = mean_perplexity(plain_seeds, domain) if plain_seeds else math.nan
        plain_outside = [outside_of(figures, base, domain) for figures in plain_seeds]
        outside = [outside_of(figures, base, domain) for figures in seeds]
        loads = [figures["loads"]["lru"][slots] for figures in own]
        static = [f["static_set"][slots] / f["perplexity"] - 1 for f in own if slots in f["static_set"]]
        points.append(
            Point(
                domain=domain,
                trainable=trainable,
                name=name,
                rule=rule_text(json.loads(rule), base_rows[0]["experts"] // 4),
                seeds=len(seeds),
                loads=mean(loads),
                loads_min=mean([figures["loads"]["belady"][slots] for figures in own]),
                factor=base[domain]["loads"]["lru"][slots] / mean(loads),
                factor_spread=spread([base[domain]["loads"]["lru"][slots] / value for value in loads]),
                perplexity=mean([figures["perplexity"] for figures in own]),
                against_nll=mean([figures["perplexity"] for figures in own]) / plain - 1,
                against_nll_spread=spread([figures["perplexity"] / plain for figures in own]),
                same_seeds=same_seeds,
                outside=math.exp(mean(outside)) - 1,
                outside_of_nll=math.exp(mean(plain_outside)) - 1 if plain_outside else math.nan,
                static=mean(static) if static else math.nan,
                overlap=mean([figures["expert_overlap_ratio"] for figures in own]),
                entropy=mean([figures["usage_entropy"] for figures in own]),
            )
        )
    for point in points:
        point.front = not any(
            other.trainable == point.trainable
            and other.loads <= point.loads
            and other.perplexity <= point.perplexity
            and (other.loads, other.perplexity) != (point.loads, point.perplexity)
            for other in points
        )
    return points


def accuracies(rows, domain):
    """Of every arm that answered tasks, served by plain Top-K: {(set, name, steps): {seed: {task: accuracy}}}; of
    choices that by likelihood per byte."""
    found, counts = {}, {}
    for row in rows:
        if row["domain"] == domain and row["points"][0].get("tasks"):
            key = (row["trainable"], row["name"], override_of(row, "train.steps"))
            by_task = found.setdefault(key, {}).setdefault(row["seed"], {})
            for task in row["points"][0]["tasks"]:
                if counts.setdefault(task["task"], task["count"]) != task["count"]:
                    sys.exit(
                        f"{task['task']}: rows of {counts[task['task']]} and of {task['count']} questions cannot be compared"
                    )
                by_task[task["task"]] = task.get("accuracy_by_bytes", task["accuracy"])
    return found


def mean_accuracy(seeds, task):
    """NaN where no seed answered the task."""
    values = [by_task[task] for by_task in seeds if task in by_task]
    return mean(values) if values else math.nan


def tasks_text(rows, domain):
    """Accuracy in per cent, and in points against plain tuning of the same set at its best rate."""
    found = accuracies(rows, domain)
    tasks = list(dict.fromkeys(task for by_seed in found.values() for by_task in by_seed.values() for task in by_task))
    if not tasks:
        return ""
    names = max(len("arm"), *(len(name) for _, name, _ in found))
    lines = [f"{'set':<12} {'arm':<{names}} {'seeds':>5} " + " ".join(f"{task:>22}" for task in tasks)]
    order = {name: number for number, name in enumerate((BASE_SET, *SETS))}
    for (trainable, name, steps), by_seed in sorted(found.items(), key=lambda arm: order[arm[0][0]]):
        plain_name = best_plain_name(rows, domain, trainable, steps)
        plain, same_seeds = of_seeds(found.get((trainable, plain_name, steps), {}), by_seed)
        cells = []
        for task in tasks:
            right, of_plain = mean_accuracy(by_seed.values(), task), mean_accuracy(plain, task)
            cell = "-" if math.isnan(right) else f"{100 * right:.1f}"
            if not math.isnan(right - of_plain) and name != plain_name:
                cell += f" ({100 * (right - of_plain):+.1f}{'' if same_seeds else '~'})"
            cells.append(f"{cell:>22}")
        lines.append(f"{trainable:<12} {name:<{names}} {len(by_seed):>5} " + " ".join(cells))
    return "\n".join(["tasks, per cent right (points against plain tuning of the same set):", *lines])


def percent(value, digits=2):
    return "-" if math.isnan(value) else f"{100 * value:+.{digits}f}%"


def table_text(rows, domain, front_only=False):
    points = points_by_domain(rows, domain)
    if not points:
        return f"{domain}: no base row yet"
    base = next(point for point in points if point.trainable == BASE_SET and not point.rule)
    names = max(len("arm"), *(len(point.name) for point in points))
    rules = max(len("prior"), *(len(point.rule) for point in points))
    lines = [
        f"{domain}: base perplexity {base.perplexity:.3f}, loads {base.loads:.3f} under LRU and {base.loads_min:.3f} "
        f"under MIN at E/4 slots, EOR {base.overlap:.3f}, usage entropy {base.entropy:.3f}",
        f"{'set':<12} {'arm':<{names}} {'prior':<{rules}} {'seeds':>5} {'loads':>6} {'MIN':>6} {'fewer':>12} {'ppl':>8} "
        f"{'ppl/nll':>15} {'outside':>8} {'static':>8} {'EOR':>5} {'entropy':>7}",
    ]
    order = {name: number for number, name in enumerate((BASE_SET, *SETS))}
    for point in sorted(points, key=lambda point: (order[point.trainable], point.loads)):
        if front_only and not point.front and not point.name.startswith(NLL_PREFIX):
            continue
        several = point.seeds > 1
        fewer = f"{point.factor:.2f}x" + (f" ±{point.factor_spread / 2:.2f}" if several else "")
        against = percent(point.against_nll) + (f" ±{50 * point.against_nll_spread:.2f}" if several else "")
        against += "" if point.same_seeds else "~"
        lines.append(
            f"{point.trainable:<12} {point.name:<{names}} {point.rule:<{rules}} {point.seeds:>5} {point.loads:>6.3f} "
            f"{point.loads_min:>6.3f} {fewer:>12} {point.perplexity:>8.3f} {against:>15} {percent(point.outside):>8} "
            f"{percent(point.static, 1):>8} {point.overlap:>5.3f} {point.entropy:>7.3f}"
            f"{' *' if point.front else '  '} {point.targets()}".rstrip()
        )
    met = sorted({letter for point in points for letter in point.targets()})
    if any(not point.same_seeds for point in points):
        lines.append("~ plain tuning lacks a seed of this arm: against the mean of all that it has")
    lines.append(f"* on the Pareto front of its set. {TARGETS}. Met: {', '.join(met) if met else 'none'}")
    return "\n".join(lines)


def between(of_lambdas, factor):
    """(perplexity's and outside's logarithms) at so many times fewer loads, on the straight line between the nearest
    measured on either side; of (times fewer, the two)s. None without one on either side."""
    ordered = sorted(of_lambdas)
    for (low, *first), (high, *second) in zip(ordered, ordered[1:]):
        if low <= factor <= high:
            share = (factor - low) / (high - low) if high > low else 0.0
            return [(1 - share) * x + share * y for x, y in zip(first, second)]
    return None


def crossings(rows, domain, factor):
    """Every arm tuned on a domain, and the base, under rules that differ in lambda alone."""
    base_row = next((row for row in rows if row["domain"] == domain and row["trainable"] == BASE_SET), None)
    if base_row is None:
        return []
    base, slots = base_row["points"][0]["domains"], str(base_row["experts"] // 4)
    groups = {}
    for row in rows:
        for point in row["points"] if row["domain"] == domain else []:
            if point["residency"] is None:
                continue
            check_same_text(point["domains"], base, row["name"])
            own = point["domains"][domain]
            fewer = base[domain]["loads"]["lru"][slots] / own["loads"]["lru"][slots]
            rule = json.dumps({**point["residency"], "lambda": None}, sort_keys=True)
            # The base has no seeds: its rows differ in the rules that were measured.
            seed = row["seed"] if row["trainable"] != BASE_SET else None
            group = groups.setdefault((row["trainable"], row["name"], rule, override_of(row, "train.steps")), {})
            group.setdefault(seed, []).append((fewer, own["nll"], outside_of(point["domains"], base, domain)))
    found = []
    for (trainable, name, rule, steps), by_seed in groups.items():
        at = {seed: place for seed, points in by_seed.items() if (place := between(points, factor)) is not None}
        of_plain = {None: base} if trainable == BASE_SET else best_plain(rows, domain, trainable, steps)
        plain, same_seeds = of_seeds(of_plain, at)
        if not at:
            continue
        of_nll = {seed: figures[domain]["nll"] for seed, figures in of_plain.items()}
        all_nll = mean(list(of_nll.values())) if plain else math.nan
        found.append(
            Crossing(
                trainable=trainable,
                name=name,
                rule=rule_text(json.loads(rule) | {"lambda": 0}, base_row["experts"] // 4, "*"),
                seeds=len(by_seed),
                against_nll=[math.exp(v[0] - (of_nll[s] if same_seeds else all_nll)) - 1 for s, v in at.items()],
                outside=[math.exp(v[1]) - 1 for v in at.values()],
                outside_of_nll=math.exp(mean([outside_of(f, base, domain) for f in plain])) - 1 if plain else math.nan,
                same_seeds=same_seeds or not plain,
            )
        )
    return found


def of_several(values, mark=""):
    if math.isnan(values[0]):
        return "-"
    return percent(mean(values)) + (f" ±{50 * spread(values):.2f}" if len(values) > 1 else "") + mark


def crossings_text(rows, domain, factor):
    if not any(row["domain"] == domain and row["trainable"] == BASE_SET for row in rows):
        return f"{domain}: no base row yet"
    found = crossings(rows, domain, factor)
    if not found:
        return f"{domain}: no arm was measured on both sides of {factor:g} times fewer loads"
    names = max(len("arm"), *(len(arm.name) for arm in found))
    rules = max(len("prior"), *(len(arm.rule) for arm in found))
    lines = [
        f"{domain}: at {factor:g} times fewer loads than the base, between the two measured lambdas around it",
        f"{'set':<12} {'arm':<{names}} {'prior':<{rules}} {'seeds':>5} {'ppl/nll':>15} {'outside':>14}",
    ]
    order = {name: number for number, name in enumerate((BASE_SET, *SETS))}
    for arm in sorted(found, key=lambda arm: (order[arm.trainable], mean(arm.against_nll))):
        met = targets_met(arm.trainable, factor, mean(arm.against_nll), mean(arm.outside), arm.outside_of_nll)
        seeds = str(arm.seeds)
        if len(arm.outside) < arm.seeds:
            seeds, met = f"{len(arm.outside)}/{arm.seeds}", ""  # the others may be worse
        lines.append(
            f"{arm.trainable:<12} {arm.name:<{names}} {arm.rule:<{rules}} {seeds:>5} "
            f"{of_several(arm.against_nll, '' if arm.same_seeds else '~'):>15} {of_several(arm.outside):>14} {met}".rstrip()
        )
    if any(not arm.same_seeds for arm in found):
        lines.append("~ plain tuning lacks a seed of this arm: against the mean of all that it has")
    if any(len(arm.outside) < arm.seeds for arm in found):
        lines.append("1/3: one seed of three; the others were not measured on both sides, so that no target is told")
    lines.append(TARGETS)
    return "\n".join(lines)


def checked_rows(options):
    results = ROOT / options.out / "results.jsonl"
    rows = read_rows(results)
    if not rows:
        sys.exit(f"{results}: no arms yet; run driver.py run first")
    bases = sorted({row["base_sha256"][:12] for row in rows})
    if len(bases) > 1:
        sys.exit(f"{results}: arms of {len(bases)} base models ({', '.join(bases)}) cannot be compared; keep one's")
    return rows


def tuned_domains(rows, options):
    found = list(dict.fromkeys(row["domain"] for row in rows))
    return [options.domain] if options.domain else found


def table(options):
    rows = checked_rows(options)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    devices = ", ".join(sorted({row["gpu"] or row["device"] for row in rows}))
    print(f"base model {rows[0]['base_sha256'][:12]}, {len(rows)} arms, commit {commits}, {devices}")
    for domain in tuned_domains(rows, options):
        if options.at is not None:
            print("\n" + crossings_text(rows, domain, options.at))
            continue
        print("\n" + table_text(rows, domain, options.front))
        if tasks := tasks_text(rows, domain):
            print("\n" + tasks)


COLOURS = {BASE_SET: "#777777", "router": "#1b6ca8", "router+lora": "#d1741a", "all": "#2d8a4e"}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LEGEND_WIDTH = 520, 380, 60, 110
LARGEST_COST = 0.12  # of perplexity against plain tuning; what is worse stands at the edge


def panel(points, domain, left):
    """One domain: how many times fewer loads (logarithmic) against what that costs in perplexity."""
    largest = max(2.0, *(point.factor for point in points)) * 1.1
    gain = max(0.02, *(0.005 - point.against_nll for point in points if not math.isnan(point.against_nll)))

    def x(factor):
        return left + MARGIN + (PANEL_WIDTH - 2 * MARGIN) * math.log(max(factor, 0.8) / 0.8) / math.log(largest / 0.8)

    def y(cost):
        share = (min(cost, LARGEST_COST) + gain) / (LARGEST_COST + gain)
        return PANEL_HEIGHT - MARGIN - (PANEL_HEIGHT - 2 * MARGIN) * share

    bottom, right = PANEL_HEIGHT - MARGIN, left + PANEL_WIDTH - MARGIN
    parts = [
        f'<text x="{left + PANEL_WIDTH / 2}" y="24" text-anchor="middle" font-weight="bold">tuned on {domain}</text>',
        f'<text x="{left + PANEL_WIDTH / 2}" y="{PANEL_HEIGHT - 12}" text-anchor="middle">times fewer loads</text>',
        f'<path d="M{left + MARGIN} {MARGIN - 20}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    for factor in (1, 2, 4, 8, 16, 32, 64, 128):
        if factor <= largest:
            parts.append(f'<text x="{x(factor):.1f}" y="{bottom + 16}" text-anchor="middle">{factor}x</text>')
    for cost in (0, 0.01, 0.05, 0.1):
        parts.append(f'<text x="{left + MARGIN - 6}" y="{y(cost) + 4:.1f}" text-anchor="end">{100 * cost:+.0f}%</text>')
        parts.append(f'<path d="M{left + MARGIN} {y(cost):.1f}H{right}" stroke="#dddddd"/>')
    for trainable, colour in COLOURS.items():
        own = [point for point in points if point.trainable == trainable and not math.isnan(point.against_nll)]
        front = sorted((point for point in own if point.front), key=lambda point: point.factor)
        if len(front) > 1:
            line = " ".join(f"{x(point.factor):.1f},{y(point.against_nll):.1f}" for point in front)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for point in own:
            name = f"{point.name} {point.rule}: {point.factor:.2f}x, {percent(point.against_nll)}"
            fill = "white" if point.rule else colour
            parts.append(
                f'<circle cx="{x(point.factor):.1f}" cy="{y(point.against_nll):.1f}" r="4" fill="{fill}" '
                f'stroke="{colour}"><title>{html_text(name)}</title></circle>'
            )
    return parts


def html_text(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def plot(options):
    rows = checked_rows(options)
    domains = [domain for domain in tuned_domains(rows, options) if points_by_domain(rows, domain)]
    if not domains:
        sys.exit("no base row yet: nothing to compare with")
    parts = []
    for number, domain in enumerate(domains):
        parts += panel(points_by_domain(rows, domain), domain, number * PANEL_WIDTH)
    legend = {BASE_SET: "base", "router": "router", "router+lora": "router+lora", "all": "all parameters"}
    for number, (trainable, text) in enumerate(legend.items()):
        place = MARGIN + LEGEND_WIDTH * number
        parts.append(f'<circle cx="{place}" cy="{PANEL_HEIGHT + 10}" r="4" fill="{COLOURS[trainable]}"/>')
        parts.append(f'<text x="{place + 8}" y="{PANEL_HEIGHT + 14}">{text}</text>')
    notes = ("hollow: served with the residency prior", "up: perplexity against plain tuning of the same set (base: itself)")
    for number, note in enumerate(notes):
        parts.append(f'<text x="{MARGIN}" y="{PANEL_HEIGHT + 34 + 16 * number}">{note}</text>')
    width, height = PANEL_WIDTH * len(domains), PANEL_HEIGHT + 64
    options.svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
    print(options.svg)


# ---- Command line


def make_corpus(options):
    corpus.make(options.out, options.gsm8k, options.gsm8k_test, options.humaneval, options.packages)
    if options.archive:
        corpus.pack(options.out, options.archive)
        print(f"{options.archive}: {options.archive.stat().st_size / (1 << 20):.1f} MiB")


def positive(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, got {text}; 4 is four times fewer loads than the base")
    return value


def absolute_folder(text):
    path = pathlib.Path(text).resolve()
    if not any(path.glob("*.jsonl")):
        raise argparse.ArgumentTypeError(f"must be a folder with JSON-lines files, got '{text}'")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("corpus", help="make the text of all domains")
    verb.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/routing_experiment/corpus")
    verb.add_argument("--archive", type=pathlib.Path, help="also pack it as FILE.tar.xz")
    verb.add_argument("--gsm8k", type=pathlib.Path, required=True, help="GSM8K's train.jsonl")
    verb.add_argument("--gsm8k-test", type=pathlib.Path, required=True, help="its test.jsonl")
    verb.add_argument("--humaneval", type=pathlib.Path, required=True, help="HumanEval.jsonl")
    verb.add_argument("--packages", type=pathlib.Path, help="folder that keeps the Debian packages")
    verb.set_defaults(act=make_corpus)

    def add(name, act, text, recipe=None):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("--out", default="runs/routing_experiment", help="folder, relative to the repository")
        if recipe is not None:
            verb.add_argument("--recipe", type=pathlib.Path, default=HERE / recipe)
            verb.add_argument("--corpus", default="runs/routing_experiment/corpus", help="folder of driver.py corpus")
            verb.add_argument("--program", type=pathlib.Path, default=ROOT / "build" / "bin" / "hestia")
            verb.add_argument("--gpus", default="0", help="their numbers, with commas; or cpu")
            verb.add_argument("--seconds", type=float, default=560, help="when to be done")
            verb.add_argument("--keep", action="store_true", help="keep checkpoints and run directories")
            verb.add_argument("overrides", nargs="*", help="key=value for the recipe")
        verb.set_defaults(act=act)
        return verb

    add("pretrain", pretrain, "make the base model", "pretrain_a.yaml")
    verb = add("run", run, "tune and measure arms", "tune_a.yaml")
    verb.add_argument("--arms", type=pathlib.Path, default=HERE / "arms_a.txt")
    verb.add_argument("--only", default="", help="regular expression: arms whose DOMAIN/SET/NAME/seedN matches")
    verb.add_argument("--jobs-per-gpu", type=int, default=1, help="arms at a time on each GPU")
    verb.add_argument("--threads", type=int, default=0, help="CPU threads of each arm; 0: all cores, shared")
    verb.add_argument("--tuned", default="python,gsm8k", help="domains that get more text and the static-set test")
    verb.add_argument("--tuned-tokens", type=int, default=32768, help="held-out tokens of each of those")
    verb.add_argument("--other-tokens", type=int, default=8192, help="held-out tokens of each other domain")
    verb.add_argument("--problems", type=int, default=0, help="GSM8K test problems that every arm answers, at most 1319")
    verb.add_argument("--choices", type=absolute_folder, help="folder of multiple-choice tasks that every arm answers")
    for verb in (add("table", table, "print loads against perplexity"), add("plot", plot, "draw it")):
        verb.add_argument("--domain", help="of the tuned ones; all of them by default")
        if verb.get_default("act") is table:
            which = verb.add_mutually_exclusive_group()
            which.add_argument("--front", action="store_true", help="Pareto front and plain tuning only")
            which.add_argument("--at", type=positive, metavar="TIMES", help="every arm at so many times fewer loads")
        else:
            verb.add_argument("--svg", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if "program" in options:
        options.program, options.recipe = options.program.resolve(), options.recipe.resolve()
        if not options.program.exists():
            sys.exit(f"{options.program}: not there; build it (README.md)")
    options.act(options)


if __name__ == "__main__":
    main()
