"""The code of docs/recipes.md: each recipe against its equation written densely, and against arithmetic written out."""

import math

import pytest
import torch

from tests.tools import near_minimum
from tests.tools.cases import assert_same, choice, integers, rows, value_and_grads
from tests.tools.documents import blocks, names_of
from tests.tools.numerics import assert_exact

PAGE = "docs/recipes.md"
NAMES = ("balanced_loss", "confident_negatives_loss", "lifted_boundary_loss")
IGNORED = (-100, -1, 255)
e, log = math.exp, math.log


def recipe(name):
    return names_of(PAGE)[name]


def test_the_page_runs():
    """A block of inputs, then of each loss its code and a call; the last call ends in a finite loss with gradients."""
    assert len(blocks(PAGE)) == 1 + 2 * len(NAMES) and all(callable(recipe(name)) for name in NAMES)
    assert recipe("loss") > 0 and recipe("loss").isfinite()
    for name in ("features", "view1", "view2", "other"):
        grad = recipe(name).grad
        assert grad.isfinite().all() and grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------- equations


def unit(x):
    """[B, D, *S] or [N, D] as unit rows [N, D]."""
    x = x.movedim(1, -1).reshape(-1, x.shape[1])
    return x / x.norm(dim=1, keepdim=True)


def mean(losses, *inputs):
    """Of the anchors that count, one by one; 0 that knows its inputs where there is none."""
    return torch.stack(losses).mean() if losses else sum(x.sum() for x in inputs) * 0


def dense_balanced(features, labels, regions, temperature=0.1):
    x, y = unit(features), labels.reshape(-1)
    l, losses = x @ x.T / temperature, []  # noqa: E741
    for i in range(len(y)):
        others = (regions == regions[i]) & (torch.arange(len(y)) != i) & (y != 255)
        positives, negatives = others & (y == y[i]), others & (y != y[i])
        if y[i] == 255 or not positives.any() or not negatives.any():
            continue
        denominator = l[i, positives].exp().mean()
        for c in y[negatives].unique():
            denominator = denominator + l[i, negatives & (y == c)].exp().mean()
        losses.append(denominator.log() - l[i, positives].mean())
    return mean(losses, features)


def dense_confident_negatives(view1, view2, other, classes, other_classes, confidence, num_classes, k, temperature=0.1):
    q1, q2, keys = unit(view1), unit(view2), unit(other)
    key_class, score, losses = other_classes.reshape(-1), confidence.reshape(-1), []
    for i, c in enumerate(classes.reshape(-1).tolist()):
        different = (key_class != c) & (key_class >= 0) & (key_class < num_classes)
        chosen = torch.where(different)[0]
        chosen = chosen[score[chosen].argsort(descending=True)[:k]]
        if not 0 <= c < num_classes or not len(chosen):
            continue
        p = (q1[i] * q2[i]).sum() / temperature
        own = [(p.exp() + (keys[chosen] @ q[i] / temperature).exp().sum()).log() - p for q in (q1, q2)]
        losses.append(own[0] + own[1])
    return mean(losses, view1, view2, other)


def dense_lifted(features, labels, boundary, edge, edge_labels, inner, inner_labels, temperature=0.07):
    x, edge, inner = unit(features), unit(edge), unit(inner)
    losses = []
    for i, c in enumerate(labels.reshape(-1).tolist()):
        positive = edge[edge_labels == c] @ x[i] / temperature
        keys = [bank[(of != c) & (of != -1)] for bank, of in ((edge, edge_labels), (inner, inner_labels))]
        negative = torch.cat(keys) @ x[i] / temperature
        if c != 255 and boundary.reshape(-1)[i] and len(positive) and len(negative):
            losses.append(torch.log1p((-positive).exp().sum() * negative.exp().sum()))
    return mean(losses, features)


SHAPES = [(2, 5, 7, 6), (2, 4, 3, 4, 5), (1, 3, 13)]


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("labels", ["mixed", "ignored", "one class", "one pixel", "singles", "all ignored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_balanced(shape, labels, temperature):
    size = (shape[0], *shape[2:])
    classes = {
        "mixed": integers(4, *size),
        "ignored": choice([0, 1, 2, 255], *size),
        "one class": torch.ones(size, dtype=torch.int64),
        "one pixel": torch.ones(size, dtype=torch.int64),
        "singles": 300 + torch.arange(math.prod(size)).view(size),
        "all ignored": torch.full(size, 255),
    }[labels]
    if labels == "one pixel":
        classes.view(-1)[5] = 2  # a class with one pixel: a key without a positive of its own
    regions, number = recipe("shuffled_blocks")(shape[0], shape[2:], 4)
    assert_same(
        lambda x: recipe("balanced_loss")(x, classes, regions, number, 300 + classes.numel(), temperature),
        lambda x: dense_balanced(x, classes, regions, temperature),
        rows(*shape),
    )


def test_shuffled_blocks():
    regions, number = recipe("shuffled_blocks")(6, (4, 6), 2)
    regions = regions.view(6, 4, 6)
    assert number == 6 and regions.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).diff().abs().sum() == 0  # blocks hold
    order = regions[:, ::2, ::2].flatten(1)
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(6, 6)) and len(order.unique(dim=0)) > 1


@pytest.mark.parametrize("k", [1, 7, 400])
@pytest.mark.parametrize("keys", ["mixed", "one class", "one pixel", "ignored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_confident_negatives(shape, keys, k):
    size = (shape[0], *shape[2:])
    classes = choice([0, 1, 2, 3, 255, -1], *size)
    other_size = (1, *[extent + 1 for extent in size[1:]])
    key_classes = {
        "mixed": choice([0, 1, 2, 3, 255, -7], *other_size, seed=1),
        "one class": torch.full(other_size, 2),  # the pixels of class 2 have no negative and do not count
        "one pixel": torch.full(other_size, 2),
        "ignored": torch.full(other_size, 255),
    }[keys]
    if keys == "one pixel":
        key_classes.view(-1)[3] = 0
    confidence = rows(*other_size, seed=2).sigmoid()
    options = (classes, key_classes, confidence, 4, k)
    assert_same(
        lambda x, y, z: recipe("confident_negatives_loss")(x, y, classes, z, *options[1:]),
        lambda x, y, z: dense_confident_negatives(x, y, z, *options),
        rows(*shape), rows(*shape, seed=3), rows(1, shape[1], *other_size[1:], seed=4),
    )  # fmt: skip


BANKS = {
    "mixed": (choice([0, 1, 2, -1], 20, seed=1), choice([0, 1, 2, -1], 30, seed=2)),
    "one class": (torch.ones(20, dtype=torch.int64), torch.ones(30, dtype=torch.int64)),  # class 1 has no negative
    "one key": (torch.tensor([1] + [-1] * 19), torch.tensor([-1] * 29 + [0])),  # each negative stands in one bank
    "other key": (torch.tensor([0] * 10 + [1] * 10), torch.full((30,), -1)),
    "empty": (torch.full((20,), -1), torch.full((30,), -1)),
}


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("boundary", ["some", "none"])
@pytest.mark.parametrize("banks", BANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lifted(shape, banks, boundary, temperature):
    labels = choice([0, 1, 2, 255], shape[0], *shape[2:])
    mask = integers(2, *labels.shape, seed=5) == (1 if boundary == "some" else 2)
    edge_labels, inner_labels = BANKS[banks]
    edge, inner = rows(20, shape[1], seed=3), rows(30, shape[1], seed=4)
    options = (labels, mask, edge, edge_labels, inner, inner_labels, temperature)
    assert_same(
        lambda x: recipe("lifted_boundary_loss")(x, *options),
        lambda x: dense_lifted(x, *options),
        rows(*shape),
    )


def plain_balanced(z, temperature):
    """As a careful user writes it: `log_softmax` of all logits of a row, so that no two sums are subtracted."""
    x, y = torch.nn.functional.normalize(z), near_minimum.labels(16)
    others = ~torch.eye(len(z), dtype=torch.bool)
    positives = (y[:, None] == y) & others
    count = positives.sum(1, keepdim=True)
    bias = -torch.where(positives, count, count + 1).to(z).log()
    return near_minimum.cross_entropy(x @ x.T / temperature + bias, positives, others) - count.to(z).log().mean()


@pytest.mark.parametrize("temperature", near_minimum.TEMPERATURES)
@pytest.mark.parametrize("spread", near_minimum.SPREADS)
def test_balanced_near_its_minimum(spread, temperature):
    """fp32 against float64: the bars of test_near_minimum.py, but that the value is exact to 1e-6 below 0 too."""
    regions = torch.zeros(near_minimum.ROWS, dtype=torch.int64)
    labels = near_minimum.labels(16).view(near_minimum.MAP)
    case = near_minimum.Case(
        lambda z, t: recipe("balanced_loss")(near_minimum.as_map(z), labels, regions, 1, 16, t), plain_balanced, 16
    )
    z = near_minimum.features(16, near_minimum.SPREADS[spread]).double()
    torch.testing.assert_close(plain_balanced(z, temperature), dense_balanced(z, labels, regions, temperature))
    found = near_minimum.errors(case, near_minimum.SPREADS[spread], temperature)
    floor = torch.finfo(torch.float32).eps ** 2 / temperature
    assert found.our_gradient <= 10 * found.plain_gradient + 1e-3 * found.norm + floor, found
    assert found.our_value <= 10 * found.plain_value + 1e-6 * max(found.value, 1), found


# ------------------------------------------------------------------------------------------------------- by hand

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)


def as_map(x):
    return x.T.reshape(1, 2, 1, -1)


def assert_value(actual, expected):
    assert_exact(actual, torch.tensor(expected, dtype=torch.float64))


def test_balanced_by_hand():
    """τ = 1/2, so l = 2 s; two pixels of class 1, three of class 2.

    l:      x1     x2     x3     x4
      x0    0      1.2    -2     0
      x1           1.6    0      -2
      x2                  -1.2   -1.6
      x3                         0
    """
    expected = [
        log(e(0) + (e(1.2) + e(-2) + e(0)) / 3) - 0,
        log(e(0) + (e(1.6) + e(0) + e(-2)) / 3) - 0,
        log((e(-1.2) + e(-1.6)) / 2 + (e(1.2) + e(1.6)) / 2) - (-1.2 - 1.6) / 2,
        log((e(-1.2) + e(0)) / 2 + (e(-2) + e(0)) / 2) - (-1.2 + 0) / 2,
        log((e(-1.6) + e(0)) / 2 + (e(0) + e(-2)) / 2) - (-1.6 + 0) / 2,
    ]
    labels, regions = torch.tensor([[[1, 1, 2, 2, 2]]]), torch.zeros(5, dtype=torch.int64)
    actual = recipe("balanced_loss")(as_map(X), labels, regions, 1, 3, 0.5)
    assert_value(actual, sum(expected) / 5)


@pytest.mark.parametrize("k", [2, 3])
def test_confident_negatives_by_hand(k):
    """Two pixels of classes 0 and 1 in two views, four keys with their confidence falling; τ = 1/2."""
    view1, view2 = as_map(X[[0, 1]]), as_map(X[[2, 1]])  # p = 2 * 0.6 and 2 * 1
    other, classes = as_map(X[[3, 4, 2, 0]]), torch.tensor([[[0, 1, 1, 2]]])
    confidence = torch.tensor([[[0.9, 0.8, 0.7, 0.6]]])
    # Class 0 meets (0, -1), (0.6, 0.8) and, as third, (1, 0).
    first = [0, 1.2, 2], [-1.6, 2, 1.2]
    # Class 1 meets (-1, 0) and (1, 0); a third key of another class is not there.
    second = [0, 0], [0, 0]
    expected = sum(log(1 + sum(map(e, l[:k])) / e(1.2)) for l in first)  # noqa: E741
    expected += sum(log(1 + sum(map(e, l[:k])) / e(2)) for l in second)  # noqa: E741
    actual = recipe("confident_negatives_loss")(
        view1, view2, torch.tensor([[[0, 1]]]), other, classes, confidence, 3, k, 0.5
    )
    assert_value(actual, expected / 2)


def test_lifted_by_hand():
    """Four pixels, the last of which is inside its class; τ = 1/2."""
    labels, boundary = torch.tensor([[[0, 1, 0, 1]]]), torch.tensor([[[True, True, True, False]]])
    edge, edge_labels = X[[1, 2, 4]], torch.tensor([0, 0, 1])
    inner, inner_labels = X[[3, 0]], torch.tensor([0, 1])  # of class 0, x3 is neither
    expected = [
        log(1 + (e(-0) + e(-1.2)) * (e(0) + e(2))),  # x0 with x1, x2; x4, x0
        log(1 + e(2) * (e(2) + e(1.6) + e(0))),  # x1 with x4; x1, x2, x3
        log(1 + (e(-1.6) + e(-2)) * (e(-1.6) + e(1.2))),  # x2 with x1, x2; x4, x0
    ]
    actual = recipe("lifted_boundary_loss")(
        as_map(X[:4]), labels, boundary, edge, edge_labels, inner, inner_labels, 0.5
    )
    assert_value(actual, sum(expected) / 3)


# ---------------------------------------------------------------------------------------------------- degenerate

SIZE = (2, 6, 6)
IGNORE, ONE, MANY = torch.full(SIZE, 255), torch.ones(SIZE, dtype=torch.int64), integers(3, *SIZE)
SINGLES = torch.arange(72).view(SIZE)
REGION, EVERYWHERE = torch.zeros(72, dtype=torch.int64), torch.ones(SIZE, dtype=torch.bool)
CONFIDENCE = rows(*SIZE, seed=3).sigmoid()
KEYS, OF_ONE, UNFILLED = rows(5, 4, seed=6), torch.ones(5, dtype=torch.int64), torch.full((5,), -1)
NOTHING = {
    "balanced, all ignored": ("balanced_loss", (IGNORE, REGION, 1, 2)),
    "balanced, one class": ("balanced_loss", (ONE, REGION, 1, 2)),
    "balanced, one pixel each": ("balanced_loss", (SINGLES, REGION, 1, 72)),
    "negatives, all ignored": ("confident_negatives_loss", (IGNORE, MANY, CONFIDENCE, 3)),
    "negatives, keys ignored": ("confident_negatives_loss", (MANY, IGNORE, CONFIDENCE, 3)),
    "negatives, one class": ("confident_negatives_loss", (ONE, ONE, CONFIDENCE, 3)),
    "lifted, all ignored": ("lifted_boundary_loss", (IGNORE, EVERYWHERE, KEYS, OF_ONE, KEYS, OF_ONE * 2)),
    "lifted, no boundary": ("lifted_boundary_loss", (MANY, ~EVERYWHERE, KEYS, OF_ONE, KEYS, OF_ONE * 2)),
    "lifted, one class": ("lifted_boundary_loss", (ONE, EVERYWHERE, KEYS, OF_ONE, KEYS, OF_ONE)),
    "lifted, no positive": ("lifted_boundary_loss", (ONE, EVERYWHERE, KEYS, OF_ONE * 2, KEYS, OF_ONE * 2)),
    "lifted, empty banks": ("lifted_boundary_loss", (MANY, EVERYWHERE, KEYS, UNFILLED, KEYS, UNFILLED)),
}


def on_maps(name, arguments):
    """The loss as a function of its maps alone."""
    if name == "confident_negatives_loss":
        classes, *rest = arguments
        return lambda x, y, z: recipe(name)(x, y, classes, z, *rest)
    return lambda x: recipe(name)(x, *arguments)


def maps(name):
    return [rows(2, 4, 6, 6, seed=seed) for seed in range(3 if name == "confident_negatives_loss" else 1)]


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_counts(case):
    """0, joined to the graph, with zero gradients and no NaN on the way to them."""
    name, arguments = NOTHING[case]
    with torch.autograd.set_detect_anomaly(True):
        value, grads = value_and_grads(on_maps(name, arguments), *maps(name))
    assert value == 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


SOME = choice([0, 1, 2, 255], *SIZE, seed=8)


@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("balanced_loss", (SOME, REGION, 1, 3)),
        ("confident_negatives_loss", (SOME, SOME, CONFIDENCE, 3, 10)),
        ("lifted_boundary_loss", (SOME, EVERYWHERE, KEYS, OF_ONE, KEYS, OF_ONE * 2)),
    ],
)
def test_what_an_ignored_pixel_holds_reaches_nothing(name, arguments, held):
    dead = (SOME == 255).unsqueeze(1)
    clean = value_and_grads(on_maps(name, arguments), *maps(name))
    value, grads = value_and_grads(on_maps(name, arguments), *[x.masked_fill(dead, held) for x in maps(name)])
    assert value > 0 and torch.equal(value, clean[0])
    for grad, expected in zip(grads, clean[1], strict=True):
        assert torch.equal(grad, expected) and (grad.masked_select(dead) == 0).all()
