"""Prototypes, their bank and their losses: against the oracle and by hand, and what is particular to them."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn import functional as F

import hpcloss
from hpcloss import PrototypeBank, layer_prototypes, reference, sinkhorn
from tests.tools.cases import LABELS, MAPS, assert_same, choice, integers, rows, runs, value_and_grads
from tests.tools.numerics import assert_exact, assert_within_budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]

e, log = math.exp, math.log
float64 = partial(torch.tensor, dtype=torch.float64)


def probabilities(*shape, seed=0):
    return torch.softmax(2 * rows(*shape, seed=seed), 1)


# ------------------------------------------------------------------------------------------------- layer_prototypes


def loop_prototypes(features, layers, labels, num_classes, num_layers, probs, ignored=()):
    """Means by a loop over images, classes and layers."""
    prototypes, classes, means = [], [], []
    for image, depth, y, pi in zip(features, layers, labels, probs, strict=True):
        for c in range(num_classes):
            for layer in range(num_layers):
                here = (y == c) & (depth == layer) & (c not in ignored)
                some = bool(here.any())
                prototypes.append(image[:, here].mean(1) if some else 0 * image[:, here].sum(1))
                means.append(pi[:, here].mean(1) if some else 0 * pi[:, here].sum(1))
                classes.append(c if some else -1)
    return torch.stack(prototypes), torch.tensor(classes), torch.stack(means)


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("labels", LABELS)
def test_layer_prototypes(shape, labels):
    shape = MAPS[shape]
    batch, *spatial = shape[0], *shape[2:]
    labels = LABELS[labels]((batch, *spatial), 0)
    layers = choice([0, 1, 2, 5, -1], batch, *spatial, seed=3)  # 5 and -1 are no layers
    x, probs = rows(*shape), probabilities(batch, 4, *spatial)
    expected = loop_prototypes(x, layers, labels, 4, 3, probs)
    actual = layer_prototypes(x, layers, labels, 4, 3, probs)
    assert torch.equal(actual.labels, expected[1])
    upstream = rows(*expected[0].shape, seed=4), rows(*expected[2].shape, seed=5)

    def weighted(prototypes, _, probs):
        return (prototypes * upstream[0]).sum() + (probs * upstream[1]).sum()

    for value, right in ((actual.prototypes, expected[0]), (actual.probs, expected[2])):
        assert_exact(value, right)
    assert_same(lambda x, pi: weighted(*layer_prototypes(x, layers, labels, 4, 3, pi)),
                lambda x, pi: weighted(*loop_prototypes(x, layers, labels, 4, 3, pi)), x, probs)  # fmt: skip


def test_layer_prototypes_leave_out_what_is_ignored():
    x, layers, labels = rows(2, 3, 6, 5), integers(2, 2, 6, 5), choice([0, 1, 2, 255], 2, 6, 5)
    expected = loop_prototypes(x, layers, labels, 3, 2, x, ignored=(1,))
    poisoned = torch.where(((labels == 1) | (labels == 255))[:, None], math.nan, x)
    actual = layer_prototypes(poisoned, layers, labels, 3, 2, ignore_index=(1, 255))
    assert_exact(actual.prototypes, expected[0])
    assert torch.equal(actual.labels, expected[1]) and actual.probs is None


def test_layer_prototypes_of_other_layouts():
    x, layers, labels = rows(2, 3, 6, 6), integers(2, 2, 6, 6), integers(3, 2, 6, 6)
    plain = layer_prototypes(x, layers, labels, 3, 2)
    for same in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_exact(layer_prototypes(same, layers[:, None], labels[:, None], 3, 2).prototypes, plain.prototypes)
    twice = [y.repeat_interleave(2, 1).repeat_interleave(2, 2) for y in (layers, labels)]
    assert_exact(layer_prototypes(x, *twice, 3, 2).prototypes, plain.prototypes)
    empty = layer_prototypes(x[:0], layers[:0], labels[:0], 3, 2, x[:0])
    assert empty.prototypes.shape == (0, 3) and empty.labels.shape == (0,) and empty.probs.shape == (0, 3)


@pytest.mark.parametrize("change,error,message", [
    ({"layers": torch.zeros(2, 3, 5)}, ValueError, r"layers must have shape \(2, 3, 4\), as labels, got \(2, 3, 5\)"),
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    ({"num_classes": 300}, ValueError, "num_classes must be at most 255 .*, got 300"),
    ({"layers": torch.full((2, 3, 4), 0.5)}, ValueError, "layers must be whole numbers, got 0.5"),
    ({"probs": torch.zeros(2, 3, 4)}, ValueError, "probs must have shape"),
    ({"probs": torch.zeros(2, 3, 3, 4).long()}, TypeError, "probs must be floating point, got torch.int64"),
])  # fmt: skip
def test_errors_of_layer_prototypes(change, error, message):
    arguments = {"layers": torch.zeros(2, 3, 4), "labels": torch.zeros(2, 3, 4), "num_classes": 2, "num_layers": 2}
    with pytest.raises(error, match=message):
        layer_prototypes(rows(2, 5, 3, 4), **arguments | change)


# --------------------------------------------------------------------------------------------------------- sinkhorn


def test_sinkhorn_by_hand():
    """exp(scores / epsilon) = [[1, 2], [3, 2]]: columns to 1/4, 3/4 and 1/2, 1/2; rows to 1/3, 2/3 and 3/5, 2/5."""
    scores = 0.5 * float64([[1.0, 2.0], [3.0, 2.0]]).log()
    expected = float64([[1 / 3, 2 / 3], [3 / 5, 2 / 5]])
    assert_exact(sinkhorn(scores, iterations=1, epsilon=0.5), expected)


def test_sinkhorn_is_balanced():
    scores = rows(2, 30, 3)
    share = sinkhorn(scores, iterations=200, epsilon=0.5)
    assert_exact(share.sum(-1), torch.ones(2, 30).double())
    assert_exact(share.sum(-2), torch.full((2, 3), 10.0).double())
    unbalanced = torch.softmax(scores / 0.5, -1).sum(-2)
    assert (unbalanced - 10).abs().max() > 1  # which a softmax alone is not


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_sinkhorn_shows_scores_that_are_not_finite(poison):
    scores = rows(20, 3)
    scores[4, 1] = poison
    assert sinkhorn(scores).isnan().all()


def test_sinkhorn_of_masked_rows_is_that_of_the_others():
    scores, mask = rows(20, 3), integers(2, 20).bool()
    share = sinkhorn(torch.where(mask[:, None], scores, math.nan), mask)
    assert_exact(share[mask], sinkhorn(scores[mask]))
    assert (share[~mask] == 0).all()
    assert (sinkhorn(scores, torch.zeros(20, dtype=torch.bool)) == 0).all()
    assert sinkhorn(scores[:0]).shape == (0, 3)
    absent = torch.cat([scores, torch.full((20, 1), -math.inf).double()], 1)
    assert_exact(sinkhorn(absent), F.pad(sinkhorn(scores), (0, 1)))


def test_sinkhorn_is_finite_and_constant():
    scores = (100 * rows(20, 3)).requires_grad_()
    share = sinkhorn(scores, epsilon=1e-3)
    assert share.isfinite().all() and not share.requires_grad
    assert sinkhorn(scores.half()).dtype == torch.float32
    for options, message in (({"iterations": 0}, "iterations must be at least 1, got 0"),
                             ({"epsilon": 0.0}, "epsilon must be positive, got 0.0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sinkhorn(scores, **options)


# ------------------------------------------------------------------------------------------------------------- bank


def test_bank_of_one_prototype():
    """First sight sets the value; then momentum 0.75 moves it a quarter of the way, and it stays of unit length."""
    bank = PrototypeBank(3, 2, momentum=0.75).double()
    assert not bank.filled.any() and (bank.prototypes == 0).all()
    bank.update(float64([[2.0, 0.0], [0.0, 5.0], [4.0, 0.0]]), torch.tensor([0, 1, 0]))
    expected = float64([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert_exact(bank.prototypes[:, 0], expected)
    assert bank.filled[:, 0].tolist() == [True, True, False]
    bank.update(float64([[0.0, 3.0], [9.0, 9.0]]), torch.tensor([0, -1]))
    length = math.hypot(0.75, 0.25)
    expected[0] = float64([0.75 / length, 0.25 / length])
    assert_exact(bank.prototypes[:, 0], expected)


def test_bank_follows_the_means_of_the_classes():
    torch.manual_seed(0)
    bank, centres = PrototypeBank(4, 6, momentum=0.9), F.normalize(rows(4, 6), dim=1).float()
    for step in range(60):
        labels = choice([0, 1, 2, 255], 30, seed=step)
        bank.update(centres[labels.clamp(max=3)] + 0.2 * torch.randn(30, 6), labels)
    cosine = (bank.prototypes[:, 0] * centres).sum(1)
    assert (cosine[:3] > 0.98).all() and not bank.filled[3] and (bank.prototypes[3] == 0).all()


def test_bank_of_several_prototypes_finds_the_modes_of_a_class():
    """Two modes of one class: with one prototype it stands between them, with two at each."""
    modes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    one, two = PrototypeBank(2, 3, 0.8), PrototypeBank(2, 3, 0.8, per_class=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        rows = modes[torch.randint(2, (40,), generator=generator)] + 0.1 * torch.randn(40, 3, generator=generator)
        for bank in (one, two):
            bank.update(rows, torch.ones(40))
    assert two.filled.tolist() == [[False, False], [True, True]]
    nearest = (two.prototypes[1] @ modes.T).max(0).values
    assert (nearest > 0.97).all()
    assert ((one.prototypes[1] @ modes.T).max() < 0.85).all()


def test_bank_without_data_stays_as_it_is():
    bank = PrototypeBank(3, 4, per_class=2)
    bank.update(torch.zeros(0, 4), torch.zeros(0))
    bank.update(torch.full((5, 4), math.nan), torch.ones(5))
    bank.update(torch.zeros(5, 4), torch.ones(5))  # rows without direction
    assert not bank.filled.any() and (bank.prototypes == 0).all()
    bank.update(rows(9, 4).half(), runs(3, 3, 3))
    before = copy.deepcopy(bank.state_dict())
    bank.update(rows(5, 4), choice([-1, 255, 7], 5))
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    poisoned, clean = copy.deepcopy(bank), copy.deepcopy(bank)
    x = rows(6, 4, dtype=torch.float32)
    clean.update(x, torch.ones(6))
    poisoned.update(torch.cat([x, torch.full((1, 4), math.inf)]), torch.ones(7))
    torch.testing.assert_close(poisoned.prototypes, clean.prototypes)


@pytest.mark.parametrize("of_bank,of_rows,factor", [
    (torch.float32, torch.float64, 1e100), (torch.float16, torch.float32, 1e5), (torch.float16, torch.float16, 1e4),
])  # fmt: skip
def test_bank_of_rows_its_dtype_cannot_hold(of_bank, of_rows, factor):
    """Once not finite, a prototype would stay so; only the direction of a row counts."""
    x, labels = rows(1000, 4, dtype=of_rows) + 1, torch.zeros(1000)
    plain, scaled = PrototypeBank(1, 4, momentum=0.5).to(of_bank), PrototypeBank(1, 4, momentum=0.5).to(of_bank)
    for half in (slice(0, 500), slice(500, 1000)):
        plain.update(x[half], labels[half])
        scaled.update(x[half] * factor, labels[half])
    expected = F.normalize(x.double(), dim=1)
    expected = sum(F.normalize(expected[half].mean(0), dim=0) for half in (slice(0, 500), slice(500, 1000)))
    for bank in (plain, scaled):
        assert bank.prototypes.dtype == of_bank
        tolerance = 4 * torch.finfo(of_bank).eps
        torch.testing.assert_close(bank.prototypes[0, 0].double(), F.normalize(expected, dim=0), rtol=0, atol=tolerance)


def test_bank_in_state_dict_and_without_gradient():
    bank, x = PrototypeBank(3, 4, per_class=2), rows(12, 4).float().requires_grad_()
    bank.update(x, integers(3, 12))
    assert not bank.prototypes.requires_grad and not list(bank.parameters())
    buffer = io.BytesIO()
    torch.save(bank.state_dict(), buffer)
    buffer.seek(0)
    other = PrototypeBank(3, 4, per_class=2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for one in (bank, other):
        one.update(x, integers(3, 12, seed=1))
    assert torch.equal(bank.prototypes, other.prototypes) and set(bank.state_dict()) == {"prototypes", "filled"}
    assert repr(bank) == "PrototypeBank(num_classes=3, dim=4, momentum=0.999, per_class=2)"


def test_bank_reads_no_device_data():
    """Fake tensors hold no values: what asked for one would raise."""
    bank = PrototypeBank(3, 4, per_class=2)
    with FakeTensorMode() as mode:
        for name, buffer in list(bank.named_buffers()):
            setattr(bank, name, mode.from_tensor(buffer))
        bank.update(mode.from_tensor(rows(12, 4).float()), mode.from_tensor(integers(3, 12)))
        layers = layer_prototypes(*(mode.from_tensor(x) for x in (rows(2, 4, 6), integers(2, 2, 6), integers(3, 2, 6))),
                                  3, 2)  # fmt: skip
    assert bank.prototypes.shape == (3, 2, 4) and layers.prototypes.shape == (12, 4)


@pytest.mark.parametrize("arguments,error,message", [
    ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": math.nan}, ValueError, "momentum must be in"),
    ({"per_class": 0}, ValueError, "per_class must be at least 1, got 0"),
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ({"dim": 2.5}, TypeError, "dim must be an integer, got 2.5"),
])  # fmt: skip
def test_errors_of_the_bank(arguments, error, message):
    with pytest.raises(error, match=message):
        PrototypeBank(**{"num_classes": 3, "dim": 4} | arguments)
    with pytest.raises(ValueError, match=r"embeddings must have shape \[N, 4\], got \(5, 3\)"):
        PrototypeBank(3, 4).update(rows(5, 3), torch.ones(5))
    with pytest.raises(ValueError, match=r"labels must have shape \[5\], got \(4,\)"):
        PrototypeBank(3, 4).update(rows(5, 4), torch.ones(4))


# -------------------------------------------------------------------------------------------- contrast of prototypes

contrast, ref_contrast = hpcloss.prototype_contrast_loss, reference.prototype_contrast_loss
# Prototypes A = (1, 0), (0.6, 0.8), (0, 1); B = (0, -1); C = (-1, 0): C has one prototype and is a negative alone.
FIVE = float64([[2.0, 0.0], [0.6, 0.8], [0.0, 3.0], [0.0, -1.0], [-5.0, 0.0], [0.8, -0.6]])
CLASSES = torch.tensor([0, 0, 0, 1, 2, 1])


def own(negatives, positive):
    return log(e(positive) + sum(map(e, negatives))) - positive


def test_contrast_by_hand():
    """τ = 1/2, l = 2 s. A0: positives 1.2, 0; negatives 0, -2, 1.6. A1: 1.2, 1.6; -1.6, -1.2, 0.

    A2: 0, 1.6; -2, 0, -1.2. B3: positive 1.2; negatives 0, -1.6, -2, 0. B5: 1.2; 1.6, 0, -1.2, -1.6.
    """
    sides = [
        ([1.2, 0], [0, -2, 1.6]),
        ([1.2, 1.6], [-1.6, -1.2, 0]),
        ([0, 1.6], [-2, 0, -1.2]),
        ([1.2], [0, -1.6, -2, 0]),
        None,  # class 2 has no positive
        ([1.2], [1.6, 0, -1.2, -1.6]),
    ]
    losses = []
    for side in sides:
        if side is None:
            losses.append(0.0)
            continue
        positives, negatives = side
        weights = [e(logit) / sum(map(e, positives)) for logit in positives]
        losses.append(sum(w * own(negatives, logit) for w, logit in zip(weights, positives, strict=True)))
    for loss in (contrast, ref_contrast):
        assert_exact(loss(FIVE, CLASSES, temperature=0.5, reduction="none"), float64(losses))
        assert float(loss(FIVE, CLASSES, temperature=0.5)) == pytest.approx(sum(losses) / 5)
        # Entropies of two even and three certain prototypes: log 2 and 0, so weights 2 and 1; the last, not counted,
        # has the highest.
        probs = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]])
        weights = [1, 2, 1, 2, 0, 1]
        expected = sum(w * value for w, value in zip(weights, losses, strict=True)) / 7
        assert float(loss(FIVE, CLASSES, probs.double(), temperature=0.5)) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("hardness", [None, 0.0, 2.0, -7.0])
@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_contrast_is_as_printed(normalize, temperature, hardness, reduction):
    options = {"temperature": temperature, "hardness": hardness, "reduction": reduction, "normalize": normalize}
    for index, make in enumerate(LABELS.values()):
        labels = make((17,), index)
        x, probs = rows(17, 4, seed=index), probabilities(17, 3, seed=index)
        for detach in (False, True):
            both = [
                lambda *inputs, loss=loss: loss(*inputs[:1], labels, *inputs[1:], **options, detach_weights=detach)  # noqa: B023
                for loss in (contrast, ref_contrast)
            ]
            assert_same(*both, x)
            assert_same(*both, x, probs)


@pytest.mark.parametrize("n", [0, 1, 2, 31, 600])
def test_contrast_at_odd_sizes(n):
    labels = choice([0, 1, 2, 3, -1], n)
    assert_same(lambda x, pi: contrast(x, labels, pi), lambda x, pi: ref_contrast(x, labels, pi),
                rows(n, 3), probabilities(n, 4))  # fmt: skip


def test_contrast_never_is_nan():
    """One prototype of a class, certain predictions, no negative, nothing at all: each NaN as published."""
    certain = F.one_hot(torch.arange(6) % 3, 4).double()
    for labels in (torch.arange(6), torch.zeros(6), torch.full((6,), -1), torch.tensor([0, 1, 1, 1, 1, 1])):
        for probs in (certain, torch.zeros_like(certain)):
            x, pi = FIVE.clone().requires_grad_(), probs.clone().requires_grad_()
            loss = contrast(x, labels, pi)
            loss.backward()
            assert loss.isfinite() and x.grad.isfinite().all() and pi.grad.isfinite().all()
            if len(labels.unique()) != 2:
                assert loss == 0 and (x.grad == 0).all() and (pi.grad == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_contrast_shows_probabilities_that_are_not_finite(poison):
    labels, x, probs = torch.tensor([0, 0, 1, 1, 2]), rows(5, 3), probabilities(5, 3)
    probs[4, 0] = poison  # not counted
    expected = contrast(x, labels, probs, reduction="none")
    assert expected.isfinite().all()
    probs[1, 0] = poison
    assert contrast(x, labels, probs).isnan() and contrast(x, labels, probs, reduction="none").isnan().any()


def test_contrast_single_prototype_is_a_negative_and_no_more():
    labels, x, probs = torch.tensor([0, 0, 1, 1, 2]), rows(5, 3), probabilities(5, 3)
    alone = contrast(x, labels, probs, reduction="none")
    assert alone[4] == 0 and (alone[:4] > 0).all()
    assert not torch.isclose(contrast(x, labels, probs), contrast(x[:4], labels[:4], probs[:4]), rtol=1e-3)
    # Its probabilities weigh nothing.
    other = probs.clone()
    other[4] = torch.tensor([1.0, 0, 0])
    assert torch.equal(contrast(x, labels, other), contrast(x, labels, probs))


def test_contrast_of_rows_that_are_not_there():
    labels, x, probs = choice([0, 1, 2, -1], 20), rows(20, 4), probabilities(20, 3)
    out = labels == -1
    poisoned = torch.where(out[:, None], math.nan, x), torch.where(out[:, None], math.nan, probs)
    expected, expected_grads = value_and_grads(lambda x, pi: contrast(x, labels, pi), x, probs)
    value, grads = value_and_grads(lambda x, pi: contrast(x, labels, pi), *poisoned)
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    kept = (x[~out], labels[~out], probs[~out])
    assert_exact(value, contrast(*kept))


def test_contrast_uncertain_prototypes_weigh_more():
    labels, x = torch.tensor([0, 0, 1, 1]), rows(4, 3)
    plain = contrast(x, labels, reduction="none")
    probs = float64([[0.5, 0.5], [0.99, 0.01], [0.9, 0.1], [0.9, 0.1]]).requires_grad_()
    weighted = contrast(x, labels, probs, reduction="none")
    share = (weighted / plain).detach()
    assert share[0] > share[2] > share[1] and torch.isclose(share.sum(), float64(4.0))
    weighted.mean().backward()
    assert probs.grad.abs().sum() > 0
    uniform = torch.full((4, 2), 0.5).double()
    assert_exact(contrast(x, labels, uniform), contrast(x, labels))


def test_contrast_weights_favour_similar_positives_and_are_differentiated():
    labels = torch.tensor([0, 0, 0, 1, 1])
    soft, hard = (contrast(FIVE[:5], labels, temperature=0.5, hardness=h) for h in (-2.0, 2.0))
    assert soft < contrast(FIVE[:5], labels, temperature=0.5, hardness=0.0) < hard
    assert torch.equal(soft, contrast(FIVE[:5], labels, temperature=0.5))
    gradients = [
        value_and_grads(lambda x: contrast(x, labels, temperature=0.5, detach_weights=d), FIVE[:5])  # noqa: B023
        for d in (False, True)
    ]
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1][0], gradients[1][1][0])


def test_contrast_gradcheck():
    labels, t = torch.tensor([0, 0, 1, 1, 2, -1]), float64(0.4).requires_grad_()
    x, probs = rows(6, 3).requires_grad_(), probabilities(6, 3).requires_grad_()
    assert gradcheck(lambda x, pi: contrast(x, labels, pi, 0.3), (x, probs))
    assert gradcheck(lambda x, pi, t: contrast(x, labels, pi, t, -2.0), (x, probs, t))
    assert_same(lambda x, t: contrast(x, labels, None, t, -2.0), lambda x, t: ref_contrast(x, labels, None, t, -2.0),
                x, t)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contrast_in_lower_precision(dtype):
    labels, x = choice([0, 1, 2, -1], 60), rows(60, 16, dtype=dtype)
    probs = probabilities(60, 3).to(dtype)
    exact, exact_grads = value_and_grads(lambda x, pi: ref_contrast(x, labels, pi), x.double(), probs.double())
    eager, eager_grads = value_and_grads(lambda x, pi: ref_contrast(x, labels, pi), x.float(), probs.float())
    value, grads = value_and_grads(lambda x, pi: contrast(x, labels, pi), x, probs)
    assert value.dtype == torch.float32
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    for grad, eager_grad, exact_grad in zip(grads, eager_grads, exact_grads, strict=True):
        assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)


@pytest.mark.parametrize("change,error,message", [
    ({"labels": torch.ones(5)}, ValueError, r"labels must have shape \[6\], got \(5,\)"),
    ({"probs": torch.ones(5, 2)}, ValueError, r"probs must have shape \[6, C\], got \(5, 2\)"),
    ({"prototypes": torch.ones(6, 2, 1)}, ValueError, r"prototypes must have shape \[N, D\]"),
    ({"prototypes": torch.ones(6, 2).long()}, TypeError, "prototypes must be floating point"),
    ({"temperature": torch.tensor(0.1)}, ValueError, "temperature must be a number with hardness=None"),
])  # fmt: skip
def test_errors_of_the_contrast(change, error, message):
    with pytest.raises(error, match=message):
        contrast(**{"prototypes": FIVE, "labels": CLASSES} | change)


def test_contrast_of_layers():
    """From a feature map to the loss: the gradient of the prototypes reaches every pixel of a counted layer."""
    x, probs = rows(2, 4, 6, 5).requires_grad_(), probabilities(2, 3, 6, 5).requires_grad_()
    layers, labels = integers(2, 2, 6, 5), choice([0, 1, 2, 255], 2, 6, 5)
    contrast(*layer_prototypes(x, layers, labels, 3, 2, probs)).backward()
    alive = labels < 255
    assert (x.grad.abs().sum(1)[alive] > 0).all() and (x.grad.movedim(1, -1)[~alive] == 0).all()
    assert (probs.grad.abs().sum(1)[alive] > 0).all()


# ------------------------------------------------------------------------------------------ assignment to prototypes

assign, ref_assign = hpcloss.prototype_assignment_loss, reference.prototype_assignment_loss


def assignments(*rest, **options):
    """The fast loss and the oracle with everything but the features bound."""
    return [lambda x, loss=loss: loss(x, *rest, **options) for loss in (assign, ref_assign)]


def test_assignment_by_hand():
    """Class 0: prototypes (1, 0), (0, 1); class 1: (0, -1). Pixels (1, 0), (0.6, 0.8), (0, 2), all of class 0; τ = 1/2.

    Teacher cosines over epsilon = 1, exp: [[e, 1], [e^0.6, e^0.8], [1, e]]; one turn of columns, then of rows.
    """
    prototypes = float64([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, 0.0]]])
    x = float64([[[1.0, 0.6, 0.0], [0.0, 0.8, 2.0]]])
    raw = [[e(1), 1], [e(0.6), e(0.8)], [1, e(1)]]
    columns = [sum(row[k] for row in raw) for k in (0, 1)]
    share = [[row[k] / columns[k] for k in (0, 1)] for row in raw]
    q = [row[0] / (row[0] + row[1]) for row in share]
    logits = [[2, 0, 0], [1.2, 1.6, -1.6], [0, 2, -2]]
    expected = [log(sum(map(e, a))) - share * a[0] - (1 - share) * a[1] for a, share in zip(logits, q, strict=True)]
    for loss in (assign, ref_assign):
        options = {"temperature": 0.5, "iterations": 1, "epsilon": 1.0}
        value = loss(x, torch.zeros(1, 3), prototypes, reduction="none", **options)
        assert_exact(value[0], float64(expected))
        assert float(loss(x, torch.zeros(1, 3), prototypes, **options)) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", MAPS)
def test_assignment_is_as_printed(shape, labels):
    shape = MAPS[shape]
    labels = LABELS[labels]((shape[0], *shape[2:]), 0)
    x, teacher, prototypes = rows(*shape), rows(*shape, seed=1), rows(4, 3, shape[1], seed=2)
    prototypes[1, 2] = 0  # not filled yet
    prototypes[3] = 0
    for reduction in ("mean", "class", "sum", "none"):
        for teach in (None, teacher):
            rest = (labels, prototypes, teach)
            assert_same(*assignments(*rest, reduction=reduction), x)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.02}, {"iterations": 1}, {"epsilon": 0.5}, {"ignore_index": (1,)}]
)
def test_assignment_options(options):
    labels, x, prototypes = integers(3, 2, 5, 6), rows(2, 4, 5, 6), rows(3, 2, 4, seed=1)
    assert_same(*assignments(labels, prototypes, **options), x)
    assert not torch.isclose(assign(x, labels, prototypes, **options), assign(x, labels, prototypes), rtol=1e-6)


def test_one_prototype_a_class_is_plain_classification():
    labels, x, prototypes = choice([0, 1, 2, 255], 2, 5, 6), rows(2, 4, 5, 6), rows(3, 1, 4, seed=1)

    def plain(x):
        logits = torch.einsum("bdhw,cd->bchw", F.normalize(x, dim=1), F.normalize(prototypes[:, 0], dim=1)) / 0.1
        return F.cross_entropy(logits, labels, ignore_index=255)

    for teacher in (None, rows(2, 4, 5, 6, seed=9)):
        assert_same(assignments(labels, prototypes, teacher)[0], plain, x)


def test_assignment_gradient_reaches_the_student_alone():
    labels, prototypes = integers(3, 2, 5, 6), rows(3, 2, 4, seed=1).requires_grad_()
    x, teacher = rows(2, 4, 5, 6).requires_grad_(), rows(2, 4, 5, 6, seed=2).requires_grad_()
    loss = assign(x, labels, prototypes, teacher)
    loss.backward()
    assert (x.grad.abs().sum(1) > 0).all() and teacher.grad is None and prototypes.grad is None
    assert not torch.isclose(loss, assign(x, labels, prototypes), rtol=1e-3)  # the teacher decides on the target


def test_assignment_follows_the_teacher():
    """The student learns to stand where the teacher's assignment puts each pixel."""
    torch.manual_seed(0)
    labels, prototypes = integers(2, 1, 8, 8), torch.eye(4).view(2, 2, 4).double()
    which = integers(2, 1, 8, 8, seed=1)
    teacher = prototypes[labels, which].movedim(-1, 1)
    x = rows(1, 4, 8, 8).requires_grad_()
    optimiser = torch.optim.Adam([x], 0.1)
    for _ in range(60):
        optimiser.zero_grad()
        assign(x, labels, prototypes, teacher).backward()
        optimiser.step()
    assert (x.argmax(1) == 2 * labels + which).float().mean() > 0.95


def test_assignment_with_an_empty_bank():
    x, labels, bank = rows(2, 4, 5, 6).float().requires_grad_(), integers(3, 2, 5, 6), PrototypeBank(3, 4, per_class=2)
    loss = assign(x, labels, bank.prototypes)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()
    bank.update(x.detach()[0].flatten(1).T, labels[0].flatten())
    assert assign(x, labels, bank.prototypes) > 0


def test_assignment_of_poisoned_pixels():
    labels, x, prototypes = choice([0, 1, 2, 255], 2, 5, 6), rows(2, 4, 5, 6), rows(3, 2, 4, seed=1)
    poisoned = torch.where((labels == 255)[:, None], math.nan, x)
    expected, (expected_grad,) = value_and_grads(lambda x: assign(x, labels, prototypes), x)
    value, (grad,) = value_and_grads(lambda x: assign(x, labels, prototypes), poisoned)
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_assignment_gradcheck():
    """With the teacher's assignment, which the inputs do not change."""
    labels, teacher = choice([0, 1, 255], 1, 2, 3), rows(1, 3, 2, 3, seed=2)
    t = float64(0.4).requires_grad_()
    inputs = rows(1, 3, 2, 3).requires_grad_(), t
    prototypes = rows(2, 2, 3, seed=1)
    assert gradcheck(lambda x, t: assign(x, labels, prototypes, teacher, t), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assignment_in_lower_precision(dtype):
    labels, x, prototypes = choice([0, 1, 2, 255], 2, 16, 12), rows(2, 16, 16, 12, dtype=dtype), rows(3, 2, 16).float()
    exact, (exact_grad,) = value_and_grads(lambda x: ref_assign(x, labels, prototypes.double()), x.double())
    eager, (eager_grad,) = value_and_grads(lambda x: ref_assign(x, labels, prototypes), x.float())
    value, (grad,) = value_and_grads(lambda x: assign(x, labels, prototypes), x)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)


@pytest.mark.parametrize("change,error,message", [
    ({"prototypes": torch.ones(3, 4)}, ValueError, r"prototypes must have shape \[C, K, 4\], got \(3, 4\)"),
    ({"prototypes": torch.ones(3, 2, 5)}, ValueError, r"prototypes must have shape \[C, K, 4\], got \(3, 2, 5\)"),
    ({"prototypes": torch.ones(0, 2, 4)}, ValueError, r"prototypes must have shape \[C, K, 4\], got \(0, 2, 4\)"),
    ({"prototypes": torch.ones(300, 2, 4)}, ValueError, "num_classes must be at most 255 .*, got 300"),
    ({"prototypes": torch.ones(3, 2, 4).long()}, TypeError, "prototypes must be floating point"),
    ({"teacher_features": torch.ones(2, 4, 3, 3)}, ValueError, "teacher_features must have shape"),
    ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be positive, got -1.0"),
])  # fmt: skip
def test_errors_of_the_assignment(change, error, message):
    arguments = {"features": rows(2, 4, 3, 2), "labels": torch.ones(2, 3, 2), "prototypes": rows(3, 2, 4)}
    with pytest.raises(error, match=message):
        assign(**arguments | change)
