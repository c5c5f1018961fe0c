#!/usr/bin/env python3
"""The choice of one lambda per layer: on random layers no mix of the same savings is cheaper, and a model whose layers
add up gets the factors that it should."""

import argparse
import importlib.util
import math
import pathlib
import random
import tempfile
import unittest
import unittest.mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "residency_layers.py"
SPEC = importlib.util.spec_from_file_location("residency_layers", SCRIPT)
layers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(layers)


class Choice(unittest.TestCase):
    def random_points(self):
        points = []
        saved = 0.0
        for strength in (0.1, 0.2, 0.4, 0.8):
            saved += random.random() - 0.1
            points.append((saved, random.random() * saved - 0.1, strength))
        return points

    def cost(self, corners, saved):
        return layers.interpolate(saved, [corner[:2] for corner in corners])

    def test_hull(self):
        for _ in range(200):
            points = self.random_points()
            corners = layers.lower_hull(points)
            self.assertEqual(corners[0], (0.0, 0.0, 0.0))
            slopes = [layers.slope(a, b) for a, b in zip(corners, corners[1:])]
            self.assertEqual(slopes, sorted(slopes))
            for saved, cost, _ in points:
                if 0.0 < saved:
                    self.assertLessEqual(self.cost(corners, saved), cost + 1e-12)

    def test_no_mix_is_cheaper(self):
        cheaper_than_even = 0
        for _ in range(200):
            hulls = [layers.lower_hull(self.random_points()) for _ in range(4)]
            most = [corners[-1][0] for corners in hulls]
            wanted = sum(most) * random.random()
            strengths, cost = layers.choose(hulls, wanted)
            self.assertTrue(all(0.0 <= strength <= 0.8 for strength in strengths))
            for _ in range(30):
                mix = [random.random() * of_layer for of_layer in most]
                mix = [saved * wanted / sum(mix) for saved in mix]
                if all(saved <= of_layer for saved, of_layer in zip(mix, most)):
                    of_mix = sum(self.cost(corners, saved) for corners, saved in zip(hulls, mix))
                    self.assertGreaterEqual(of_mix, cost - 1e-9)
                    cheaper_than_even += of_mix > cost + 1e-3
        self.assertGreater(cheaper_than_even, 100)

    def test_all_of_it_is_the_last_corner_of_every_layer(self):
        hulls = [layers.lower_hull(self.random_points()) for _ in range(5)]
        strengths, cost = layers.choose(hulls, sum(corners[-1][0] for corners in hulls) + 1.0)
        self.assertEqual(strengths, [corners[-1][2] for corners in hulls])
        self.assertAlmostEqual(cost, sum(corners[-1][1] for corners in hulls))

    def test_factors(self):
        mean, factors = layers.as_factors([0.1, 0.0, 0.2, 0.35])
        self.assertAlmostEqual(mean, 0.1625, places=4)
        for factor, strength in zip(factors, [0.1, 0.0, 0.2, 0.35]):
            self.assertAlmostEqual(mean * factor, strength, places=4)


class AdditiveProgram:
    """A model whose layers cost a * lambda^2 and save b * lambda, and add up."""

    costs = (4.0, 1.0, 0.25)
    savings = (1.0, 1.0, 2.0)

    def __init__(self, options):
        self.options = options
        self.out = options.out
        self.about = {"model": {"layers": 3}}

    def measure(self, split, lambdas, factors=()):
        figures = {(None, 0.0): self.figures([0.0] * 3)}
        for score, values in lambdas.items():
            for value in values:
                figures[(score, value)] = self.figures([value * factor for factor in factors or (1.0, 1.0, 1.0)])
        return figures

    def figures(self, strengths):
        nll = 1.0 + sum(cost * strength**2 for cost, strength in zip(self.costs, strengths))
        loads = 9.0 - sum(saved * strength for saved, strength in zip(self.savings, strengths))
        return {"nll": nll, "perplexity": math.exp(nll), "loads": loads}


class Whole(unittest.TestCase):
    def test_layers_that_add_up_get_equal_slopes(self):
        steps = [0.01 * number for number in range(1, 61)]
        with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(layers, "Program", AdditiveProgram):
            options = argparse.Namespace(
                out=pathlib.Path(folder), scores=["logit", "weight"], lambdas=steps, budgets=[steps[9]], jobs=2,
                domain="python", always_keep=0, tokens=1, held_out_tokens=1,
            )  # fmt: skip
            result = layers.run(options)
        self.assertEqual([row["others"] for row in result["budgets"]], ["plain", "at lambda"] * 2)
        for row in result["budgets"]:
            # As many loads as lambda .1 everywhere, for less.
            self.assertAlmostEqual(row["held_out"]["loads"], 9.0 - 0.4, places=3)
            self.assertAlmostEqual(row["uniform"]["lambda"], 0.1, places=3)
            self.assertLess(row["held_out"]["perplexity"], row["uniform"]["perplexity"])
            self.assertAlmostEqual(row["expected_nll_of_uniform"], 0.0525, places=6)
        # Slope 2 a lambda / b: lambdas are as 1/8, 1/2 and 4.
        whole = 0.4 / (1 / 8 + 1 / 2 + 2 * 4)
        fine = result["budgets"][0]
        for factor, share in zip(fine["layer_factors"], (1 / 8, 1 / 2, 4)):
            self.assertAlmostEqual(fine["lambda"] * factor, whole * share, delta=0.011)
        self.assertIn("gain", layers.report(result))


if __name__ == "__main__":
    random.seed(20261129)
    unittest.main()
