"""`LocalContrastLoss`: against the oracle and by hand, and what is particular to it."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

import hpcloss
from hpcloss import reference
from tests.tools.cases import LABELS, MAPS, assert_same, choice, integers, rows, value_and_grads
from tests.tools.numerics import assert_exact, assert_within_budget

e, log = math.exp, math.log
float64 = partial(torch.tensor, dtype=torch.float64)
REDUCTIONS = ("mean", "class", "sum", "none")


def fast(features, labels, partner=None, temperature=0.1, **options):
    options = {"num_classes": 4, "samples_per_class": None, **options}
    return hpcloss.local_contrast_loss(features, labels, partner, temperature, **options)


def oracle(features, labels, partner=None, temperature=0.1, **options):
    return reference.local_contrast_loss(features, labels, partner, temperature, **{"num_classes": 4, **options})


def assert_as_printed(labels, features, *args, **options):
    assert_same(lambda x: fast(x, labels, *args, **options), lambda x: oracle(x, labels, *args, **options), features)


# --------------------------------------------------------------------------------------------------------- by hand


def test_by_hand():
    """Four pixels of image 0: (2, 0) and (0, 2) of class 1, mean (1, 1); (0, 1) of class 2; background. τ = 1/2.

    Image 1: (0, 3) of class 1. Cosine logits over τ: 45 degrees sqrt(2), 0 degrees 2, 90 degrees 0.
    """
    features = torch.tensor(
        [[[2.0, 0.0, 0.0, 5.0], [0.0, 2.0, 1.0, 5.0]], [[0.0, 7.0, 7.0, 7.0], [3.0, 7.0, 7.0, 7.0]]]
    )
    features, labels = features.double(), torch.tensor([[1, 1, 2, 0], [1, 0, 0, 255]])
    r = math.sqrt(2)
    intra = [log(e(r) + e(0)) - r, log(e(r) + e(2)) - r, log(e(r) + e(2)) - 2, 0]
    intra += [0, 0, 0, 0]  # the only class of image 1
    assert_exact(fast(features, labels, temperature=0.5, reduction="none").reshape(-1), float64(intra))
    assert float(fast(features, labels, temperature=0.5)) == pytest.approx(sum(intra) / 4)
    # Image 0 meets (0, 1), the mean of class 1 in image 1; image 1 meets (1, 1) and (0, 1) of image 0.
    inter = [
        log(e(r) + e(0) + e(0)) - (r + 0) / 2,
        log(e(r) + e(2) + e(2)) - (r + 2) / 2,
        log(e(r) + e(2) + e(2)) - 2,
        0,
        log(e(2) + e(r) + e(2)) - (2 + r) / 2,
        0, 0, 0,
    ]  # fmt: skip
    for loss in (fast, oracle):
        value = loss(features, labels, torch.tensor([1, 0]), 0.5, reduction="none").reshape(-1)
        assert_exact(value, float64(inter))
    by_class = fast(features, labels, torch.tensor([1, 0]), 0.5, reduction="class")
    assert float(by_class) == pytest.approx(((inter[0] + inter[1] + inter[4]) / 3 + inter[2]) / 2)


def test_half_of_the_loss_of_a_pair():
    """The paper: both positives' terms added, over 2 P (C - 1); P pixels of each of C - 1 classes in both images."""
    x, labels, tau = rows(2, 3, 9), torch.tensor([[1, 2, 3] * 3, [3, 1, 2] * 3]), 0.3
    unit = F.normalize(x, dim=1)
    means = torch.stack([F.normalize(x[b][:, labels[b] == c].mean(1), dim=0) for b in (0, 1) for c in (1, 2, 3)])
    total = 0.0
    for b in (0, 1):
        for p in range(9):
            logits = (means @ unit[b, :, p] / tau).tolist()
            denominator = sum(math.exp(logit) for logit in logits)
            for image in (0, 1):
                total -= log(math.exp(logits[3 * image + int(labels[b, p]) - 1]) / denominator)
    pair = total / (2 * 3 * 3)
    assert float(fast(x, labels, torch.tensor([1, 0]), tau)) == pytest.approx(pair / 2, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- oracle

PARTNERS = {
    "none": lambda b: None,
    "next": lambda b: (torch.arange(b) + 1) % max(b, 1),
    "one for all": lambda b: torch.full((b,), b - 1),
    "itself": lambda b: torch.arange(b),
    "nobody": lambda b: torch.full((b,), -1),
    "outside": lambda b: torch.full((b,), b),
}


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", MAPS)
def test_degenerate_maps(shape, labels, partner):
    shape = MAPS[shape]
    labels = LABELS[labels]((shape[0], *shape[2:]), 0)
    for reduction in REDUCTIONS:
        for normalize in (True, False):
            options = {"reduction": reduction, "normalize": normalize}
            assert_as_printed(labels, rows(*shape), PARTNERS[partner](shape[0]), **options)


@pytest.mark.parametrize("background", [0, 2, None, 77])
@pytest.mark.parametrize("ignore_index", [(-100, -1, 255), (), 3, (1, -1)])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_options(normalize, temperature, ignore_index, background):
    labels = choice([0, 1, 2, 3, 4, 255, -1], 4, 6, 7)
    features, partner = rows(4, 5, 6, 7), torch.tensor([2, 2, 0, -1])
    options = {"temperature": temperature, "ignore_index": ignore_index, "background": background}
    for reduction in REDUCTIONS:
        options |= {"reduction": reduction, "normalize": normalize}
        assert_as_printed(labels, features, partner, num_classes=5, **options)


def test_gradient_of_the_temperature():
    labels, partner = choice([0, 1, 2, 255], 3, 6, 5), torch.tensor([1, 2, 0])
    for temperature in (0.05, 0.2, 3.0):
        inputs = rows(3, 4, 6, 5), float64(temperature)
        assert_same(lambda x, t: fast(x, labels, partner, t), lambda x, t: oracle(x, labels, partner, t), *inputs)


def test_gradcheck():
    labels, partner = torch.tensor([[[1, 1, 2], [0, 2, 1]], [[2, 2, 255], [3, 3, 1]]]), torch.tensor([1, 0])
    t = float64(0.4).requires_grad_()
    assert gradcheck(lambda x, t: fast(x, labels, partner, t), (rows(2, 3, 2, 3).requires_grad_(), t))


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
def test_empty_maps(shape):
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    partner = torch.zeros(shape[0], dtype=torch.int64)
    for reduction in REDUCTIONS:
        for samples in (None, 3):
            x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            loss = fast(x, labels, partner, samples_per_class=samples, reduction=reduction)
            assert loss.shape == (labels.shape if reduction == "none" else ()) and loss.sum() == 0
            loss.sum().backward()


def test_layouts_and_resolutions():
    base, labels, partner = rows(2, 5, 6, 6), choice([0, 1, 2, 255], 2, 6, 6), torch.tensor([1, 0])
    for view in (lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3)):
        assert_same(lambda x: fast(view(x), labels, partner), lambda x: oracle(view(x), labels, partner), base)  # noqa: B023
    assert_as_printed(choice([0, 1, 2], 2, 1, 12, 6), base, partner)
    assert_as_printed(labels.float()[:, None], base, partner)


# ------------------------------------------------------------------------------------------------------ properties


def test_its_own_partner_changes_nothing():
    """Counted twice, its means would add log 2 to the denominator."""
    labels, x = choice([0, 1, 2, 3, 255], 3, 6, 7), rows(3, 4, 6, 7)
    for partner in (torch.arange(3), torch.tensor([-1, 3, -100])):
        assert_same(lambda x: fast(x, labels, partner), lambda x: fast(x, labels), x)  # noqa: B023


def test_images_meet_their_own_keys_alone():
    """Without partners the loss is that of the images one by one; with them, that of the pairs."""
    labels, x = choice([1, 2, 3], 4, 6, 7), rows(4, 4, 6, 7)
    options = {"reduction": "sum"}
    assert_same(lambda x: fast(x, labels, **options),
                lambda x: sum(fast(x[b : b + 1], labels[b : b + 1], **options) for b in range(4)), x)  # fmt: skip
    assert_same(lambda x: fast(x, labels, torch.tensor([1, 0, 3, 2]), **options),
                lambda x: sum(fast(x[b : b + 2], labels[b : b + 2], torch.tensor([1, 0]), **options) for b in (0, 2)),
                x)  # fmt: skip


def test_means_are_differentiated_over_all_pixels():
    """Pixels that are no anchors move the keys of those that are; with detached means they would have no gradient."""
    labels, x = torch.tensor([[1] * 8 + [2] * 8 + [0] * 4]), rows(1, 4, 20).requires_grad_()
    loss = hpcloss.local_contrast_loss(x, labels, num_classes=3, samples_per_class=1, reduction="none")
    assert int((loss != 0).sum()) == 2
    loss.sum().backward()
    assert (x.grad[0, :, :16].abs().sum(0) > 1e-6).all() and (x.grad[0, :, 16:] == 0).all()


def test_means_are_taken_before_normalising():
    """A long embedding pulls its class mean; scaled to unit length first, it would not."""
    labels, x = torch.tensor([[1, 1, 2, 2]]), rows(1, 3, 4)
    longer = x.clone()
    longer[0, :, 0] *= 10
    assert not torch.isclose(fast(x, labels), fast(longer, labels), rtol=1e-3)
    assert_as_printed(labels, longer)


@pytest.mark.parametrize("k", [1, 3, 100])
def test_samples_are_pixels_of_the_whole(k):
    """k anchors of each class and image, each with the loss it has among all; the mean is over those drawn."""
    labels, x, partner = choice([0, 1, 2, 255], 3, 6, 7), rows(3, 4, 6, 7), torch.tensor([1, 2, 0])
    whole = fast(x, labels, partner, reduction="none")
    torch.manual_seed(3)
    some = fast(x, labels, partner, reduction="none", samples_per_class=k)
    drawn = some != 0
    assert_exact(some[drawn], whole[drawn])
    for b in range(3):
        for c in (1, 2):
            assert int(drawn[b][labels[b] == c].sum()) == min(k, int((labels[b] == c).sum()))
    torch.manual_seed(3)
    assert_exact(fast(x, labels, partner, samples_per_class=k), some.sum() / drawn.sum())


def test_numbers_of_other_kinds():
    """A 0-dim tensor is what NumPy's integers are to Python: an index, not an int."""
    labels, x = choice([0, 1, 2, 255], 2, 6, 7), rows(2, 4, 6, 7)
    numbers = {"num_classes": 3, "samples_per_class": 2, "background": 0}
    values = []
    for options in (numbers, {name: torch.tensor(number) for name, number in numbers.items()}):
        torch.manual_seed(0)
        values.append(hpcloss.local_contrast_loss(x, labels, **options))
    assert values[0] > 0 and torch.equal(*values)


def test_poisoned_pixels_reach_nothing():
    labels, x, partner = choice([0, 1, 2, 255], 2, 6, 7), rows(2, 4, 6, 7), torch.tensor([1, 0])
    out = (labels == 255) | (labels == 0)  # background pixels take no part either
    expected, (expected_grad,) = value_and_grads(lambda x: fast(x, labels, partner), x)
    for poison in (math.nan, math.inf):
        poisoned = torch.where(out[:, None], poison, x)
        value, (grad,) = value_and_grads(lambda x: fast(x, labels, partner), poisoned)
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_lowering_it_gathers_the_classes():
    torch.manual_seed(0)
    labels, x = integers(3, 2, 8, 8) + 1, rows(2, 8, 8, 8).requires_grad_()
    optimiser, partner = torch.optim.Adam([x], 0.1), torch.tensor([1, 0])
    start = fast(x, labels, partner).item()
    for _ in range(30):
        optimiser.zero_grad()
        loss = fast(x, labels, partner, samples_per_class=3)
        loss.backward()
        optimiser.step()
    # Two equal positives among six keys: never below log 2.
    assert fast(x, labels, partner).item() - math.log(2) < 0.2 * (start - math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype):
    labels, partner = choice([0, 1, 2, 255], 2, 16, 12), torch.tensor([1, 0])
    x = rows(2, 16, 16, 12, dtype=dtype)
    exact, (exact_grad,) = value_and_grads(lambda x: oracle(x, labels, partner), x.double())
    eager, (eager_grad,) = value_and_grads(lambda x: oracle(x, labels, partner), x.float())
    value, (grad,) = value_and_grads(lambda x: fast(x, labels, partner), x)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("change,error,message", [
    ({"partner": torch.zeros(3, dtype=torch.int64)}, ValueError, r"partner must have shape \[2\], got \(3,\)"),
    ({"partner": torch.tensor([0.5, 1.0])}, ValueError, "partner must be whole numbers, got 0.5"),
    ({"labels": torch.zeros(2, 3)}, ValueError, r"labels must have shape \[B, \*S\]"),
    ({"reduction": "region"}, ValueError, "reduction must be one of 'mean', 'class', 'sum', 'none', got 'region'"),
    ({"num_classes": None}, TypeError, "num_classes must be an integer, got None"),
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ({"samples_per_class": 0}, ValueError, "samples_per_class must be at least 1, got 0"),
    ({"background": 255}, ValueError, r"background must not be in ignore_index \(.*255\), got 255"),
])  # fmt: skip
def test_errors(change, error, message):
    arguments = {"labels": torch.ones(2, 3, 4), "num_classes": 3} | change
    with pytest.raises(error, match=message):
        hpcloss.local_contrast_loss(rows(2, 5, 3, 4), **arguments)
