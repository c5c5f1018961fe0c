#!/usr/bin/env python3
"""Sweeps the losses and learning rates of a fine-tuning recipe and prints the trade-off of loads against perplexity.

    python3 benchmarks/quickstart_sweep.py --out runs/sweep --jobs 2 --threads 1 --seed 1 SETTINGS.txt [key=value ...]

SETTINGS.txt has one arm per line: a name, then key=value overrides of recipes/quickstart.yaml; `#` starts a comment.
Arms whose name starts with `nll` are plain tuning runs: the best of them is what perplexity is compared with. Every
arm's figures are appended to OUT/results.jsonl as soon as it is done, and a second call skips what stands there.
Nothing but Python's standard library is needed; the program must have been built (scripts/quickstart.sh).
"""

import argparse
import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPE = "recipes/quickstart.yaml"


def read_settings(path):
    arms = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if any("=" not in word for word in words[1:]):
            sys.exit(f"{path}:{number}: after the name come key=value overrides, got '{line}'")
        arms.append((words[0], words[1:]))
    return arms


def run_arm(name, overrides, options):
    run_dir = pathlib.Path(options.out) / name
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    shared = [
        f"run_dir={run_dir}",
        f"seed={options.seed}",
        f"model.threads={options.threads}",
        "control.enabled=false",
        "export.tokens=1024",
        "evaluate.policies=[lru]",
        *options.overrides,
        *overrides,
    ]
    begin = time.monotonic()
    for verb in ("finetune", "export", "evaluate"):
        done = subprocess.run(
            [options.program, verb, RECIPE, *shared, "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{name}: hestia {verb} exited with {done.returncode}\n{done.stderr}")
    results = json.loads((ROOT / run_dir / "results.json").read_text())
    slots = results["model"]["experts"] // 4
    row = {"name": name, "overrides": overrides, "seconds": round(time.monotonic() - begin, 1)}
    row |= {"commit": results["commit"], "machine": results["machine"], "seed": options.seed, "arms": {}}
    for arm in results["arms"]:
        row["arms"][arm["name"]] = {
            domain["domain"]: {
                "perplexity": domain["perplexity"],
                "loads": next(c["loads_per_token_layer"] for c in domain["cache"] if c["slots"] == slots),
                "expert_overlap_ratio": domain["expert_overlap_ratio"],
                "distinct_experts": domain["distinct_experts"],
                "usage_entropy": domain["usage_entropy"],
            }
            for domain in arm["domains"]
        }
    shutil.rmtree(ROOT / run_dir)
    return row


def table(rows, domain):
    """Aligned lines: loads and entropy against the base router, perplexity against the best plain tuning run."""
    base = rows[0]["arms"]["baseline"][domain]
    plain = [row["arms"]["tuned"][domain]["perplexity"] for row in rows if row["name"].startswith("nll")]
    best = min(plain) if plain else base["perplexity"]
    lines = [
        f"{domain}: base perplexity {base['perplexity']:.3f}, loads {base['loads']:.3f}, EOR "
        f"{base['expert_overlap_ratio']:.3f}, usage entropy {base['usage_entropy']:.3f}; "
        f"{'best plain tuning' if plain else 'no plain tuning run, base'} {best:.3f}",
        f"{'arm':<34} {'loads':>8} {'ppl/nll':>9} {'ppl/base':>9} {'entropy':>8} {'EOR':>6}",
    ]
    for row in sorted(rows, key=lambda row: row["arms"]["tuned"][domain]["loads"]):
        arm = row["arms"]["tuned"][domain]
        lines.append(
            f"{row['name']:<34} {100 * (arm['loads'] / base['loads'] - 1):>+7.1f}% "
            f"{100 * (arm['perplexity'] / best - 1):>+8.2f}% {100 * (arm['perplexity'] / base['perplexity'] - 1):>+8.2f}% "
            f"{100 * arm['usage_entropy'] / base['usage_entropy']:>7.1f}% {arm['expert_overlap_ratio']:>6.3f}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=pathlib.Path)
    parser.add_argument("overrides", nargs="*", help="key=value for every arm")
    parser.add_argument("--out", default="runs/sweep", help="folder for results.jsonl, relative to the repository")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each arm")
    parser.add_argument("--program", type=pathlib.Path, default=ROOT / "build" / "bin" / "hestia")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not options.program.exists():
        sys.exit(f"{options.program}: not there; build it with scripts/quickstart.sh")
    results = ROOT / options.out / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if others := sorted({row["seed"] for row in rows} - {options.seed}):
        sys.exit(f"{results}: has rows of seed {', '.join(map(str, others))}; give seed {options.seed} another --out")
    done = {row["name"] for row in rows}
    arms = [arm for arm in read_settings(options.settings) if arm[0] not in done]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        pending = [pool.submit(run_arm, name, overrides, options) for name, overrides in arms]
        for future in concurrent.futures.as_completed(pending):
            row = future.result()
            rows.append(row)
            with results.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(f"{row['name']} done in {row['seconds']} s", file=sys.stderr, flush=True)
    for domain in rows[0]["arms"]["tuned"] if rows else []:
        print(table(rows, domain))


if __name__ == "__main__":
    main()
