"""The figures of the losses: what the code gives, what the equations give and what the pictures show agree."""

import json
import math
import re
import runpy

import pytest
import torch

import hpcloss
from tests.tools.cases import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs/figures.py"))
FOLDER = ROOT / "docs/losses/figures"
COMMITTED = json.loads((FOLDER / "curves.json").read_text(encoding="utf-8"))
COSINES = COMMITTED.pop("cosines")
NAMES = sorted(SCRIPT["FIGURES"])
HALF_A_DIGIT = 6e-5  # curves are rounded to four digits
exp, log = math.exp, math.log


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_code(name):
    found = SCRIPT["rounded"](SCRIPT["FIGURES"][name]())
    assert {panel: list(lines) for panel, lines in found.items()} == {
        panel: list(lines) for panel, lines in COMMITTED[name].items()
    }
    for panel, lines in found.items():
        for line, values in lines.items():
            assert values == pytest.approx(COMMITTED[name][panel][line], abs=1.1e-4), (panel, line)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_drawn_from_the_numbers(name):
    picture = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert f"<dc:description>{SCRIPT['digest'](COMMITTED[name])}</dc:description>" in picture
    assert len(picture) < 25_000


def test_every_figure_is_shown_and_every_picture_has_its_function():
    pages = (ROOT / "docs/losses").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"\(figures/(\w+)\.svg\)", page.read_text(encoding="utf-8"))}
    assert shown == set(NAMES) == {path.stem for path in FOLDER.glob("*.svg")} == set(COMMITTED)
    assert SCRIPT["COSINES"] == COSINES


# ----------------------------------------------------------------------------------------------------- equations
# Derivatives by hand of the equations on the pages, in units of 1 / τ, and of 1 / (τ |P|) for the pull on one of four
# positives. Where it moves, the others are at 0.2, 0.5 and 0.8 (or 0.1, 0.2 and 0.3), and 256 negatives at 0.


def sigma(u):
    return 1 / (1 + exp(-u))


def weight(hardness, s, others):
    return exp(-hardness * s) / sum(exp(-hardness * t) for t in (s, *others))


THREE = (0.2, 0.5, 0.8)


def pull_own(s, hardness=0.0, tau=0.1, negatives=256, others=THREE):
    return 4 * weight(hardness, s, others) * sigma(log(negatives) - s / tau)


def pull_published(s, beta=0.9, tau=0.1):
    own = exp(s / tau - beta * s)
    return 1 - (1 - beta * tau) * own / (own + 256)


def pull_all(s, tau=0.1, others=THREE):
    return 1 - 4 * exp(s / tau) / (256 + sum(exp(t / tau) for t in (s, *others)))


def push_own(s, tau=0.1, others=THREE):
    total = 255 + exp(s / tau)
    return sum(sigma(log(total) - t / tau) for t in others) / len(others) * exp(s / tau) / total


def push_all(s, tau=0.1, others=THREE):
    return exp(s / tau) / (255 + sum(exp(t / tau) for t in (s, *others)))


def pull_in(s, tau=0.1, others=(0.1, 0.2, 0.3)):
    positives = sum(exp(t / tau) for t in (s, *others))
    return 4 * exp(s / tau) * (1 / positives - 1 / (positives + 256))


def pull_differentiated(s, tau=0.05, others=(0.1, 0.2, 0.3)):
    """Of w t with w_j proportional to e^{l_j}: the second part is the weights'."""
    four = (s, *others)
    t = [log(1 + 256 * exp(-a / tau)) for a in four]
    w = [weight(-1 / tau, a, four[:i] + four[i + 1 :]) for i, a in enumerate(four)]
    mean = sum(a * b for a, b in zip(w, t))
    return 4 * w[0] * (sigma(log(256) - s / tau) - (t[0] - mean))


def pull_ihpc(s, hardness):
    """128 rows: the anchor's image and 63 whose views agree."""
    v = 128 * exp(-hardness * s) / (2 * exp(-hardness * s) + 126 * exp(-hardness))
    return v * sigma(log(126) - s / 0.5)


def push_ihpc(s, hardness):
    """The anchor's views are at 0; so are those of the image whose view moves, 62 agree."""
    v = 128 / (4 + 124 * exp(-hardness))
    return v * exp(s / 0.5) / (1 + 125 + exp(s / 0.5))


def hard_negatives(l, beta, share, tau=0.5):  # noqa: E741
    """G of the loss, for 250 negatives, fifty each at five cosines; and whether it is above its lowest value."""
    at = (-0.4, -0.2, 0.0, 0.2, 0.4)
    total = 250 * sum(exp((1 + beta) * t / tau) for t in at) / sum(exp(beta * t / tau) for t in at)
    discounted = (total - share * 250 * exp(l)) / (1 - share)
    lowest = 250 * exp(-1 / tau) if share else 0.0
    return max(discounted, lowest), discounted > lowest


def pull_hard(s, beta, share, tau=0.5):
    own = exp(s / tau)
    found, above = hard_negatives(s / tau, beta, share)
    slope = -share * 250 * own / (1 - share) if above else 0.0
    return 1 - (own + slope) / (own + found)


POSITIVE, NEGATIVE, VIEW = "Pull on a positive", "Push on a negative", "Pull on the other view"
OWN_MEAN, OTHER_MEAN = "Pull on a mean of the own class", "Push on a mean of another class"
OWN_PROTOTYPE, OTHER_PROTOTYPE = "Pull on a prototype of the own class", "Push on a prototype of another class"
BY_HAND = {
    **{("region_phpc", POSITIVE, f"hardness {h}"): lambda s, h=h: pull_own(s, h) for h in (0, 1, 2)},
    ("region_phpc", POSITIVE, "published(0.9)"): pull_published,
    ("region_phpc", NEGATIVE, "hardness 0"): push_own,
    ("denominators", POSITIVE, '"own"'): pull_own,
    ("denominators", POSITIVE, '"all"'): pull_all,
    ("denominators", POSITIVE, '"negatives"'): lambda s: 1.0,
    ("denominators", NEGATIVE, '"own"'): push_own,
    ("denominators", NEGATIVE, '"all"'): push_all,
    ("denominators", NEGATIVE, '"negatives"'): lambda s: exp(s / 0.1) / (255 + exp(s / 0.1)),
    ("pixel_contrast", POSITIVE, "no queue"): lambda s: pull_own(s, tau=0.07),
    ("pixel_contrast", POSITIVE, "queue of 500"): lambda s: pull_own(s, tau=0.07, negatives=756),
    ("pixel_contrast", POSITIVE, "queue of 5,000"): lambda s: pull_own(s, tau=0.07, negatives=5256),
    ("local_contrast", OWN_MEAN, "no partner"): lambda s: 1 - exp(10 * s) / (exp(10 * s) + 2),
    ("local_contrast", OWN_MEAN, "of a partner, own at 0.9"): lambda s: (
        1 - 2 * exp(10 * s) / (exp(10 * s) + exp(9) + 4)
    ),
    ("local_contrast", OTHER_MEAN, "no partner"): lambda s: exp(10 * s) / (exp(10 * s) + exp(9) + 1),
    **{
        ("multiscale", "Pull on the same patch", f"patches of {size}"): lambda s, n=n: sigma(log(n) - 10 * s)
        for size, n in ((16, 15), (8, 63), (4, 255))
    },
    ("prototype_contrast", POSITIVE, "published"): pull_differentiated,
    ("prototype_contrast", POSITIVE, "published, detached"): lambda s: pull_own(s, -20, 0.05, others=(0.1, 0.2, 0.3)),
    ("prototype_contrast", POSITIVE, "hardness 1, detached"): lambda s: pull_own(s, 1, 0.05, others=(0.1, 0.2, 0.3)),
    **{
        ("prototype_assignment", OWN_PROTOTYPE, f"assigned {q:g}"): lambda s, q=q: (
            q - exp(10 * s) / (exp(10 * s) + exp(5) + 6)
        )
        for q in (1, 0.5, 0)
    },
    ("prototype_assignment", OTHER_PROTOTYPE, "of another class"): lambda s: exp(10 * s) / (exp(10 * s) + exp(5) + 6),
    ("supcon", POSITIVE, 'form="out"'): lambda s: pull_all(s, others=(0.1, 0.2, 0.3)),
    ("supcon", POSITIVE, 'form="in"'): pull_in,
    ("supcon", NEGATIVE, 'form="in"'): lambda s: push_all(s, others=(0.1, 0.2, 0.3)),
    **{("ihpc", VIEW, f"hardness {h:g}"): lambda s, h=h: pull_ihpc(s, h) for h in (0, 0.5, 1)},
    **{("ihpc", NEGATIVE, f"hardness {h:g}"): lambda s, h=h: push_ihpc(s, h) for h in (0, 0.5, 1)},
    ("ihpc", VIEW, "published(0.1)"): lambda s: 0.9 * sigma(log(126) - 0.9 * s / 0.5),
    **{("one_positive", VIEW, f"τ = {t}"): lambda s, t=t: sigma(log(254) - s / t) for t in (0.07, 0.2, 0.5)},
    **{
        ("one_positive", NEGATIVE, f"τ = {t}"): lambda s, t=t: exp(s / t) / (exp(0.5 / t) + 253 + exp(s / t))
        for t in (0.07, 0.2, 0.5)
    },
    ("hard_negative_nce", VIEW, "NT-Xent"): lambda s: pull_hard(s, 0, 0),
    **{("hard_negative_nce", VIEW, f"β = {b}"): lambda s, b=b: pull_hard(s, b, 0.1) for b in (0, 1, 2)},
}


@pytest.mark.parametrize("curve", BY_HAND, ids="-".join)
def test_the_numbers_are_those_of_the_equation(curve):
    name, panel, line = curve
    assert COMMITTED[name][panel][line] == pytest.approx([BY_HAND[curve](s) for s in COSINES], abs=HALF_A_DIGIT)


def test_infonce_has_the_figure_of_ntxent():
    """A query, its key, and 254 other keys at 0."""
    for s, expected in zip(COSINES, COMMITTED["one_positive"][VIEW]["τ = 0.07"]):
        rows = SCRIPT["rows_at"](s, (0.0,) * 254).requires_grad_()
        query = torch.cat([rows[:1], rows[2:].detach()])
        loss = hpcloss.InfoNCELoss(0.07, reduction="none", backend="blockwise")(query, rows[1:].detach())[0]
        (grad,) = torch.autograd.grad(loss, rows)
        assert -0.07 * grad[0, 1].item() / math.sqrt(1 - s**2) == pytest.approx(expected, abs=HALF_A_DIGIT)
