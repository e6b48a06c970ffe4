"""The figures of docs/losses: drawn from the code as it is, and what it draws is the derivative of the equations."""

import json
import math
import runpy

import pytest

from tests.tools.cases import ROOT

FIGURES = runpy.run_path(str(ROOT / "docs/figures.py"))
FOLDER = FIGURES["FOLDER"]
STORED = json.loads((FOLDER / "curves.json").read_text())
COSINES, POSITIVES, MANY = FIGURES["COSINES"], FIGURES["POSITIVES"], len(FIGURES["NEGATIVES"])
TAU = 0.1


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", FIGURES["FIGURES"])
def test_a_figure_is_that_of_the_code(name):
    found = FIGURES["rounded"](FIGURES["FIGURES"][name]())
    assert list(found) == list(STORED[name])
    for panel, lines in found.items():
        for line, values in lines.items():
            assert values == pytest.approx(STORED[name][panel][line], abs=2e-4), (panel, line)
    picture = (FOLDER / f"{name}.svg").read_text()
    assert all(line in picture for panel in found.values() if len(panel) > 1 for line in panel)


def own_pull(s, hardness=0.0):
    """4 w σ(n - l) of a positive at cosine s among those at POSITIVES: n = log of 256 negatives at cosine 0."""
    weight = math.exp(-hardness * s) / sum(math.exp(-hardness * one) for one in (s, *POSITIVES))
    return 4 * weight * sigmoid(math.log(MANY) - s / TAU)


def all_pull(s):
    """SupCon: 1 - 4 p, p the share of the positive in the one denominator."""
    share = math.exp(s / TAU) / (sum(math.exp(one / TAU) for one in (s, *POSITIVES)) + MANY)
    return 1 - 4 * share


def two_view_pull(s, tau, negatives):
    return sigmoid(math.log(negatives) - s / tau)


def in_pull(s):
    """Form "in": the share among the positives less that in the denominator, times 4."""
    positives = sum(math.exp(one / TAU) for one in (s, *POSITIVES))
    return 4 * (math.exp(s / TAU) / positives - math.exp(s / TAU) / (positives + MANY))


@pytest.mark.parametrize(
    "figure, panel, line, expected",
    [
        ("region_phpc", "Pull on a positive", "hardness 0", own_pull),
        ("region_phpc", "Pull on a positive", "hardness 1", lambda s: own_pull(s, 1.0)),
        ("region_phpc", "Pull on a positive", "hardness 2", lambda s: own_pull(s, 2.0)),
        ("denominators", "Pull on a positive", '"all"', all_pull),
        ("denominators", "Pull on a positive", '"negatives"', lambda s: 1.0),
        ("supcon", "Pull on a positive", '"in"', in_pull),
        ("one_positive", "Pull on the other view", "τ = 0.2", lambda s: two_view_pull(s, 0.2, 254)),
        ("hard_negative_nce", "Pull on the other view", "NT-Xent", None),
    ],
)
def test_a_curve_is_the_derivative_of_the_equation(figure, panel, line, expected):
    if expected is None:  # NT-Xent at temperature 0.5, against negatives of several cosines

        def expected(s):
            return sigmoid(math.log(sum(math.exp(n / 0.5) for n in FIGURES["SPREAD"])) - s / 0.5)

    assert STORED[figure][panel][line] == pytest.approx([expected(s) for s in COSINES], abs=2e-3)
