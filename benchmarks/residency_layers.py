#!/usr/bin/env python3
"""Finds factors of lambda for the layers of a model, without training, and says whether they beat one lambda for all.

    python3 benchmarks/residency_layers.py --out runs/residency_layers --jobs 2 --threads 1 RECIPE [key=value ...]

Residency-aware routing (docs/routing.md) costs perplexity and saves loads in every layer, and layers differ in both.
On text of the training split this measures what each layer adds to the NLL at a few lambdas, and how many loads per
token, over all layers, it saves: alone, the others routed plainly, and, for each budget, around it: the others at the
budget's lambda, the layer at 0, half, once and twice that. Taking costs and savings of layers as additive, the cheapest
way to a total of savings has the same slope, cost per load, in all layers: each layer's points are reduced to their
lower convex hull, and the pieces of all hulls are taken by rising slope until the total is reached, the last one in
part (lambda linear in between). The total of a budget is what its lambda in all layers saves by the same sum. Then both
are measured on held-out text, and compared where they load the same: a lambda for all is looked for that loads as much
as the factors do, and measured too.

Every measurement is one call of `hestia evaluate --only baseline` and is kept in OUT: a second call with the same
program, recipe path and overrides does not repeat it.
The result is one JSON file, OUT/residency_layers.json. Nothing but Python's standard library is needed.
"""

import argparse
import concurrent.futures
import hashlib
import json
import pathlib
import shlex
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEYS = {"logit": "lambdas", "weight": "weight_lambdas", "root": "root_lambdas"}


def listed(numbers):
    return "[" + ",".join(f"{number:g}" for number in numbers) + "]"


class Program:
    """hestia evaluate, each call once."""

    def __init__(self, options):
        self.options = options
        self.out = ROOT / options.out
        self.about = {}
        self.locks = {}
        self.version = self.call(["version"])

    def call(self, arguments):
        done = subprocess.run(
            [self.options.program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"hestia {shlex.join(arguments)} exited with {done.returncode}\n{done.stderr}")
        return done.stdout

    def measure(self, split, lambdas, factors=()):
        """lambdas: by score. Returns by (score or None, lambda) the NLL, the perplexity and the loads per token."""
        options = self.options
        tokens = options.tokens if split == "train" else options.held_out_tokens
        overrides = [
            f"model.threads={options.threads}",
            f"data.train=[{options.domain}]",
            f"data.evaluate=[{options.domain}]",
            f"evaluate.split={split}",
            f"evaluate.tokens_per_domain={tokens}",
            "evaluate.policies=[lru]",
            "evaluate.segments=[]",
            "evaluate.static_set=[]",
            "evaluate.agreement=false",
            f"evaluate.residency_prior.always_keep=[{options.always_keep}]",
            f"evaluate.residency_prior.layer_factors={listed(factors)}",
            *(f"evaluate.residency_prior.{KEYS[score]}={listed(values)}" for score, values in lambdas.items()),
            *options.overrides,
            "residency.in_loop=false",  # the recipe's own rule is no point of these
            "residency.lambda=0",
            "residency.ramp_steps=0",
            "residency.train_slots=[]",
            *(f"residency.scope.{key}" for key in ("domains=[]", "elsewhere=0", "window=64", "keep=0.95")),
        ]
        key = "\n".join([self.version, options.recipe, *overrides])
        run_dir = self.out / hashlib.sha256(key.encode()).hexdigest()[:16]
        kept = run_dir / "results.json"
        arguments = ["evaluate", options.recipe, *overrides, f"run_dir={run_dir}", "--only", "baseline", "--quiet"]
        with self.locks.setdefault(run_dir, threading.Lock()):  # two budgets may come to the same factors
            if not kept.exists():
                self.call(arguments)
                print(f"measured: {split} {lambdas} x {list(factors)}", file=sys.stderr, flush=True)
        results = json.loads(kept.read_text())
        self.about = {key: results[key] for key in ("version", "commit", "machine", "device", "model")}
        figures = {}
        for arm in results["arms"]:
            rule = arm["residency"]
            domain = arm["domains"][0]
            slots = rule["slots"] if rule else results["arms"][1]["residency"]["slots"]
            cell = next(c for c in domain["cache"] if c["slots"] == slots and c["policy"] == "lru")
            figures[(rule["score"], rule["lambda"]) if rule else (None, 0.0)] = {
                "nll": domain["nll"],
                "perplexity": domain["perplexity"],
                "loads": cell["loads_per_token_layer"] * results["model"]["layers"],
            }
            if rule:
                self.about["slots"] = slots
                self.about["logit_range"] = rule["logit_range"]
        return figures


def lower_hull(points):
    """Of (saved, cost, lambda), with (0, 0, 0): the corners of the lower convex hull, by rising savings."""
    corners = []
    for point in sorted([(0.0, 0.0, 0.0), *(p for p in points if p[0] > 0.0)]):
        if corners and point[0] == corners[-1][0]:
            continue  # the same savings for more
        while len(corners) > 1 and slope(corners[-2], corners[-1]) >= slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return corners


def slope(a, b):
    return (b[1] - a[1]) / (b[0] - a[0])


def choose(hulls, wanted):
    """One lambda per layer that saves `wanted` loads per token in all for the least cost, and that cost."""
    pieces = []
    for layer, corners in enumerate(hulls):
        pieces += [(slope(a, b), layer, a, b) for a, b in zip(corners, corners[1:])]
    lambdas = [0.0] * len(hulls)
    cost = 0.0
    # Rising slope takes the pieces of a layer in their order.
    for steepness, layer, begin, end in sorted(pieces):
        part = min(1.0, wanted / (end[0] - begin[0]))
        if part < 1e-9:
            break
        lambdas[layer] = begin[2] + part * (end[2] - begin[2])
        wanted -= part * (end[0] - begin[0])
        cost += part * (end[0] - begin[0]) * steepness
    return lambdas, cost


def interpolate(x, points):
    """Linear through (x, y), clamped to the outermost points."""
    points = sorted(points)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return points[-1][1]


def as_factors(lambdas):
    """Their mean, and each over it; of few digits, for what is measured to be what is written."""
    mean = float(f"{sum(lambdas) / len(lambdas):.4g}")
    return mean, [float(f"{value / mean:.4g}") for value in lambdas]


def points_of(origin, figures):
    """Of figures by lambda: (loads saved per token, NLL added, lambda) against `origin`."""
    return [(origin["loads"] - f["loads"], f["nll"] - origin["nll"], strength) for strength, f in figures]


def layers_alone(program, pool, num_layers):
    """The base, and by score a list of points per layer, all other layers routed plainly."""
    options = program.options
    lambdas = {score: options.lambdas for score in options.scores}
    alone = [[float(other == layer) for other in range(num_layers)] for layer in range(num_layers)]
    measured = list(pool.map(lambda factors: program.measure("train", lambdas, factors), alone))
    base = measured[0][(None, 0.0)]
    return base, {
        score: [points_of(base, [(x, f[(score, x)]) for x in options.lambdas]) for f in measured]
        for score in options.scores
    }


def layers_around(program, pool, num_layers, strength):
    """By score a list of points per layer, all other layers at lambda `strength`."""
    parts = (0.0, 0.5, 1.0, 2.0)
    cases = [
        [part if other == layer else 1.0 for other in range(num_layers)]
        for layer in range(num_layers)
        for part in parts
    ]
    distinct = [list(case) for case in dict.fromkeys(map(tuple, cases))]  # once the budget's own
    asked = {score: [strength] for score in program.options.scores}
    measured = dict(
        zip(map(tuple, distinct), pool.map(lambda factors: program.measure("train", asked, factors), distinct))
    )
    points = {}
    for score in program.options.scores:
        figures = [measured[tuple(case)][(score, strength)] for case in cases]
        of_layers = [figures[i : i + len(parts)] for i in range(0, len(figures), len(parts))]
        points[score] = [
            points_of(f[0], [(part * strength, f[i]) for i, part in enumerate(parts) if i > 0]) for f in of_layers
        ]
    return points


def budget(score, strength, others, points):
    """Factors that save what lambda `strength` in all layers saves, by the sum over `points`."""
    at_strength = [next(point for point in of_layer if point[2] == strength) for of_layer in points]
    wanted = sum(point[0] for point in at_strength)
    if wanted <= 0.0:
        sys.exit(f"{score} {strength:g}: saves no loads by the sum over layers, got {wanted:.3g}; raise it")
    lambdas, cost = choose([lower_hull(of_layer) for of_layer in points], wanted)
    mean, factors = as_factors(lambdas)
    return {
        "score": score,
        "others": others,
        "budget_of_lambda": strength,
        "lambda": mean,
        "layer_factors": factors,
        "expected_saved": wanted,
        "expected_nll": cost,
        "expected_nll_of_uniform": sum(point[1] for point in at_strength),
    }


def as_json(points):
    """By score, one list per layer."""
    return {
        score: [[dict(zip(("saved", "nll", "lambda"), point)) for point in of_layer] for of_layer in of_score]
        for score, of_score in points.items()
    }


def report(result):
    """Aligned lines, one per budget."""
    base = result["held_out"]["base"]
    lines = [
        f"held out: base perplexity {base['perplexity']:.3f}, {base['loads']:.3f} loads per token",
        f"{'score':<7} {'others':<9} {'loads':>7} {'fewer':>6} {'by layer':>9} {'uniform':>9} {'gain':>8}  factors of lambda",
    ]
    for row in result["budgets"]:
        lines.append(
            f"{row['score']:<7} {row['others']:<9} {row['held_out']['loads']:>7.3f} {base['loads'] / row['held_out']['loads']:>5.2f}x "
            f"{100 * (row['held_out']['perplexity'] / base['perplexity'] - 1):>+8.2f}% "
            f"{100 * (row['uniform']['perplexity'] / base['perplexity'] - 1):>+8.2f}% "
            f"{100 * (1 - row['held_out']['perplexity'] / row['uniform']['perplexity']):>+7.2f}%  "
            f"{row['lambda']:g} x {' '.join(f'{factor:.2f}' for factor in row['layer_factors'])}"
        )
    return "\n".join(lines)


def run(options):
    program = Program(options)
    program.out.mkdir(parents=True, exist_ok=True)
    scores = options.scores
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        grid = {score: options.lambdas for score in scores}
        uniform = program.measure("held_out", grid)
        num_layers = program.about["model"]["layers"]
        base_train, alone = layers_alone(program, pool, num_layers)
        around = {value: layers_around(program, pool, num_layers, value) for value in options.budgets}
        budgets = [
            budget(score, value, others, points[score])
            for score in scores
            for value in options.budgets
            for others, points in (("plain", alone), ("at lambda", around[value]))
        ]
        measured = pool.map(
            lambda row: program.measure("held_out", {row["score"]: [row["lambda"]]}, row["layer_factors"]), budgets
        )
        for row, figures in zip(budgets, measured):
            row["held_out"] = figures[(row["score"], row["lambda"])]
        # One lambda that loads as much, so that little is left to interpolate.
        matched = {score: [] for score in scores}
        for row in budgets:
            curve = [(f["loads"], x) for (score, x), f in uniform.items() if score in (None, row["score"])]
            matched[row["score"]].append(float(f"{interpolate(row['held_out']['loads'], curve):.3g}"))
        uniform |= program.measure("held_out", {score: sorted(set(values)) for score, values in matched.items()})
    for row in budgets:
        of_score = {x: f for (score, x), f in uniform.items() if score in (None, row["score"])}
        loads = row["held_out"]["loads"]
        row["uniform"] = {
            "lambda": interpolate(loads, [(f["loads"], x) for x, f in of_score.items()]),
            "perplexity": interpolate(loads, [(f["loads"], f["perplexity"]) for f in of_score.values()]),
            "nearest_measured_loads": min((f["loads"] for f in of_score.values()), key=lambda x: abs(x - loads)),
        }
    command = ["python3", "benchmarks/residency_layers.py", *sys.argv[1:]]
    return {
        "format_version": 1,
        "kind": "residency factors by layer",
        "command": shlex.join(command),
        **program.about,
        "domain": options.domain,
        "always_keep": options.always_keep,
        "note": "loads are per token, summed over layers, under LRU and simulated; nll in nats per token",
        "training": {
            "tokens": options.tokens,
            "base": base_train,
            "layers_alone": as_json(alone),
            "layers_around": {f"{value:g}": as_json(points) for value, points in around.items()},
        },
        "held_out": {
            "tokens": options.held_out_tokens,
            "base": uniform[(None, 0.0)],
            "uniform": [
                {"score": score, "lambda": x, **uniform[(score, x)]}
                for score, x in sorted(key for key in uniform if key[0])
            ],
        },
        "budgets": budgets,
    }


def main():
    def numbers(text):
        return [float(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a fine-tuning recipe: its model, its data, its cache (residency.slots)")
    parser.add_argument("overrides", nargs="*", help="key=value for every measurement")
    parser.add_argument("--out", default="runs/residency_layers", help="folder, relative to the repository")
    parser.add_argument("--domain", default="python")
    parser.add_argument("--scores", type=lambda text: text.split(","), default=["logit", "weight"])
    parser.add_argument("--lambdas", type=numbers, default=[0.05, 0.1, 0.2, 0.4, 0.7], help="of each layer alone")
    parser.add_argument("--budgets", type=numbers, default=[0.1, 0.2], help="those whose savings are aimed at")
    parser.add_argument("--always-keep", type=int, default=0, help="J")
    parser.add_argument("--tokens", type=int, default=16384, help="training tokens of a measurement")
    parser.add_argument("--held-out-tokens", type=int, default=32768)
    parser.add_argument("--jobs", type=int, default=1, help="measurements at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "build" / "bin" / "hestia")
    options = parser.parse_args()
    if not options.program.exists():
        sys.exit(f"{options.program}: not there; build it with scripts/quickstart.sh")
    if any(score not in KEYS for score in options.scores):
        parser.error(f"--scores: must be of {', '.join(KEYS)}, got {','.join(options.scores)}")
    if any(value not in options.lambdas for value in options.budgets):
        parser.error("--budgets: must be among --lambdas")
    result = run(options)
    path = ROOT / options.out / "residency_layers.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    print(f"{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
