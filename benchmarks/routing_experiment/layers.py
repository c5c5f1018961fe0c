#!/usr/bin/env python3
"""Factors of lambda for the layers of the routing experiment's base model, in a minute of one GPU.

    layers.py --gpus 0 --jobs 2          after driver.py pretrain; OUT/layers.json, and the factors as an arm's override

By another score than the logit (--score) it is OUT/layers_SCORE.json.

One measurement per layer, on text of the training split: the others are routed plainly and this one under the rule, at
a few lambdas. Its cost is the NLL added, half of it the tuned domain's and half the other training domains' mean (all
of it the tuned domain's where there are none), taken as proportional to lambda^2 (what it is at small lambdas, and one
number is less noisy than three), moved a quarter of the way to the mean of all layers, and at least three tenths of that
mean. Its savings are loads per token of the tuned domain, between the measured points as an exponential approach to a
little over the largest. Both are taken as additive over layers. Then all layers get the lambda at which one more saved
load costs the same, and together save what the budget's lambda does in all.

benchmarks/residency_layers.py looks harder, without a model of cost and savings, on one domain, and takes longer.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import driver

SHRINK, LEAST = 0.25, 0.3  # of the cost towards the mean of all layers; of that mean
BEYOND = 1.06  # where savings lead to, over the largest measured
KEYS = {"logit": "lambdas", "weight": "weight_lambdas", "root": "root_lambdas"}
GRID = [0.4 + 0.01 * step for step in range(161)]  # times the budget: lambdas to choose from


def measure(layer, layers, options, domains):
    """The figures of one layer alone: for lambda 0 and each of the others, loads saved and NLL added."""
    run_dir = f"{options.out}/layers/{options.score}/{layer}"
    factors = [int(other == layer) for other in range(layers)]
    words = driver.merged(
        driver.corpus_overrides(options.recipe, options.corpus),
        [f"run_dir={run_dir}", f"model.path={options.out}/base/model", f"model.threads={options.threads}"],
        [f"data.train=[{options.domain}]", f"data.evaluate=[{','.join(domains)}]", "data.max_tokens_per_domain=60000"],
        ["evaluate.split=train", f"evaluate.tokens_per_domain={options.tokens}", "evaluate.policies=[lru]"],
        ["evaluate.static_set=[]", "evaluate.segments=[]", "evaluate.agreement=false"],
        [f"evaluate.residency_prior.{key}=[]" for key in KEYS.values()],
        [f"evaluate.residency_prior.always_keep=[{options.always_keep}]"],
        [f"evaluate.residency_prior.{KEYS[options.score]}={json.dumps(options.lambdas)}"],
        [f"evaluate.residency_prior.layer_factors={json.dumps(factors)}"],
        options.overrides,
        driver.NO_RULE,  # the recipe's own is no point of these
    )
    arguments = [options.program, "evaluate", options.recipe, *words, "--only", "baseline", "--quiet"]
    environment = {**os.environ, **({} if options.gpus == "cpu" else {"CUDA_VISIBLE_DEVICES": options.gpus})}
    done = subprocess.run(arguments, cwd=driver.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"layer {layer}: hestia evaluate exited with {done.returncode}\n{done.stderr}")
    results = json.loads((driver.ROOT / run_dir / "results.json").read_text())
    slots = results["arms"][1]["residency"]["slots"]
    figures = []
    for arm in results["arms"]:
        of_domain = {domain["domain"]: domain for domain in arm["domains"]}
        own = of_domain[options.domain]
        cell = next(c for c in own["cache"] if c["slots"] == slots and c["policy"] == "lru")
        others = [of_domain[domain]["nll"] for domain in domains if domain != options.domain] or [own["nll"]]
        strength = arm["residency"]["lambda"] if arm["residency"] else 0.0
        figures.append((strength, cell["loads_per_token_layer"] * layers, own["nll"], sum(others) / len(others)))
    plain = next(f for f in figures if f[0] == 0.0)
    points = [
        {"lambda": f[0], "saved": plain[1] - f[1], "nll": f[2] - plain[2], "nll_others": f[3] - plain[3]}
        for f in figures
        if f is not plain
    ]
    return points, {key: results[key] for key in ("version", "commit", "machine", "device", "model")}


def cost_of(points):
    """c of c * lambda^2, by least squares."""
    added = [(p["lambda"], 0.5 * (p["nll"] + p["nll_others"])) for p in points]
    return sum(x * x * y for x, y in added) / sum(x**4 for x, _ in added)


def saved_at(points, strength):
    """Loads saved at a lambda: between the points, 0 among them, log(1 - saved / top) is linear."""
    most = max(p["saved"] for p in points)
    if most <= 0.0:
        return 0.0  # a layer that the rule does not reach
    top = BEYOND * most
    corners = [(0.0, 0.0), *sorted((p["lambda"], math.log(1.0 - p["saved"] / top)) for p in points)]
    for (x0, y0), (x1, y1) in zip(corners, corners[1:]):
        if strength <= x1:
            return top * (1.0 - math.exp(y0 + (y1 - y0) * (strength - x0) / (x1 - x0)))
    return top * (1.0 - math.exp(corners[-1][1]))


def choose(measured, budget):
    """Factors of the budget's lambda, one per layer, and what was expected of them."""
    costs = [cost_of(points) for points in measured]
    mean = sum(costs) / len(costs)
    if mean <= 0.0:
        sys.exit(f"the rule costs nothing here (mean {mean:.3g} * lambda^2); raise --tokens or --lambdas")
    costs = [max((1.0 - SHRINK) * cost + SHRINK * mean, LEAST * mean) for cost in costs]
    grid = [budget * times for times in GRID]
    saved = [[saved_at(points, strength) for strength in grid] for points in measured]
    wanted = sum(saved_at(points, budget) for points in measured)

    def at(price):  # of one saved load, in nats: the best place of each layer on the grid
        places = range(len(grid))
        return [min(places, key=lambda n: c * grid[n] ** 2 - price * s[n]) for c, s in zip(costs, saved)]

    def total(places):
        return sum(s[n] for s, n in zip(saved, places))

    low, high = 1e-6, 1.0
    for _ in range(60):
        price = math.sqrt(low * high)
        low, high = (price, high) if total(at(price)) < wanted else (low, price)
    places = at(high)
    return {
        "budget_of_lambda": budget,
        "layer_factors": [round(GRID[n], 2) for n in places],
        "cost_of_lambda_squared": costs,
        "expected_saved": total(places),
        "expected_nll": sum(c * grid[n] ** 2 for c, n in zip(costs, places)),
        "expected_nll_of_uniform": sum(costs) * budget**2,
    }


def run(options):
    model = driver.ROOT / options.out / "base" / "model"
    if not (model / "config.json").exists():
        sys.exit(f"{model}: not there; make it with driver.py pretrain")
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    domains = [options.domain, *(d for d in options.others.split(",") if d not in ("", options.domain))]
    try:
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            measured = list(pool.map(lambda layer: measure(layer, layers, options, domains), range(layers)))
    except RuntimeError as problem:
        sys.exit(str(problem))
    points = [of_layer for of_layer, _ in measured]
    result = {
        "format_version": 1,
        "kind": "residency factors by layer, one layer at a time",
        "command": shlex.join(["python3", "benchmarks/routing_experiment/layers.py", *sys.argv[1:]]),
        **measured[0][1],
        "base_sha256": driver.sha256_of(model),
        "domain": options.domain,
        "other_domains": domains[1:],
        "tokens_per_domain": options.tokens,
        "score": options.score,
        "always_keep": options.always_keep,
        "note": "training text; saved is loads per token of one layer, nll in nats per token",
        **choose(points, options.budget),
        "layers": points,
    }
    path = driver.ROOT / options.out / ("layers.json" if options.score == "logit" else f"layers_{options.score}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"residency.layer_factors={json.dumps(result['layer_factors']).replace(' ', '')}")
    print(f"{path}", file=sys.stderr)


def main():
    def numbers(text):
        return [float(word) for word in text.split(",")]

    general = "python,kernel,dictionary,prose,perl,go,rust,cpp,lisp,ruby,german,database"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value for every measurement")
    parser.add_argument("--out", default="runs/routing_experiment", help="folder, relative to the repository")
    parser.add_argument("--recipe", type=pathlib.Path, default=driver.HERE / "tune_a.yaml")
    parser.add_argument("--corpus", default="runs/routing_experiment/corpus", help="folder of driver.py corpus")
    parser.add_argument("--program", type=pathlib.Path, default=driver.ROOT / "build" / "bin" / "hestia")
    parser.add_argument("--gpus", default="0", help="the number of one; or cpu")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at a time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each")
    parser.add_argument("--domain", default="python", help="whose loads count, and half of the cost")
    parser.add_argument("--others", default=general, help="domains whose cost is the other half; empty: none")
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain")
    parser.add_argument("--score", choices=list(KEYS), default="logit", help="residency.score of the rule")
    parser.add_argument("--lambdas", type=numbers, help="default: .8, 1.2 and 2 times the budget")
    parser.add_argument("--always-keep", type=int, default=0, help="J")
    parser.add_argument("--budget", type=float, default=0.25, help="the lambda whose savings are aimed at")
    options = parser.parse_args()
    options.lambdas = options.lambdas or [round(times * options.budget, 6) for times in (0.8, 1.2, 2.0)]
    options.program, options.recipe = options.program.resolve(), options.recipe.resolve()
    if not options.program.exists():
        sys.exit(f"{options.program}: not there; build it (README.md)")
    run(options)


if __name__ == "__main__":
    main()
