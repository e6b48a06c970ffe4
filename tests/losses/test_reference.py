"""The oracle against arithmetic written out, plain loops over pairs, and what must hold of any input."""

import itertools
import math
from functools import partial

import pytest
import torch

from hpcloss import reference
from tests.tools.numerics import assert_exact

IGNORED = (-100, -1, 255)
LOSSES = {
    name: getattr(reference, f"{name}_loss")
    for name in ("region_phpc", "region_supcon", "supcon", "ntxent", "infonce", "ihpc", "hard_negative_nce")
}
region_phpc, region_supcon, supcon, ntxent, infonce, ihpc, hard_negative_nce = LOSSES.values()
pixel_contrast = reference.pixel_contrast_loss
entropy_guided, multiscale = reference.entropy_guided_contrast_loss, reference.multiscale_contrast_loss
local_contrast = reference.local_contrast_loss
prototype_contrast = reference.prototype_contrast_loss
prototype_assignment = reference.prototype_assignment_loss


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def value_and_grads(loss, *inputs):
    """The value of `loss(*inputs)` and its gradient for every input, all float64."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


def assert_value(actual, expected):
    assert_exact(actual, torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape))


def assert_same(loss, other, *inputs):
    """Two functions of the same inputs have the same value and gradients."""
    (a, a_grads), (b, b_grads) = value_and_grads(loss, *inputs), value_and_grads(other, *inputs)
    assert_exact(a, b)
    for a_grad, b_grad in zip(a_grads, b_grads, strict=True):
        assert_exact(a_grad, b_grad, floor=1e-14)  # gradients that cancel exactly leave rounding


# (a) Small cases with the arithmetic written out. exp and log only, no torch in an expected value.
e, log = math.exp, math.log


class TestByHand:
    """Five unit vectors at τ = 1/2, so l = 2 s.

    s:      x1     x2     x3     x4
      x0    0      0.6    -1     0
      x1           0.8    0      -1
      x2                  -0.6   -0.8
      x3                         0
    """

    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    MAP = X.T.reshape(1, 2, 1, 5)
    LABELS = torch.tensor([[[1, 1, 1, 2, 0]]])  # x3 has no positive, x4 is background: both are keys only

    def test_region_phpc(self):
        # weight numerators e^{-2 s}, then log(own + negatives) - l for each positive
        neg0, neg1, neg2 = e(-2) + e(0), e(0) + e(-2), e(-1.2) + e(-1.6)
        loss0 = (e(0) * (log(e(0) + neg0) - 0) + e(-1.2) * (log(e(1.2) + neg0) - 1.2)) / (e(0) + e(-1.2))
        loss1 = (e(0) * (log(e(0) + neg1) - 0) + e(-1.6) * (log(e(1.6) + neg1) - 1.6)) / (e(0) + e(-1.6))
        loss2 = e(-1.2) * (log(e(1.2) + neg2) - 1.2) + e(-1.6) * (log(e(1.6) + neg2) - 1.6)
        loss2 /= e(-1.2) + e(-1.6)
        actual = partial(region_phpc, self.MAP, self.LABELS, None, 0.5, 2.0)
        assert_value(actual(reduction="none"), [loss0, loss1, loss2, 0, 0])
        assert_value(actual(), (loss0 + loss1 + loss2) / 3)

    def test_region_phpc_published(self):
        # hardness 0, own term e^{l - 0.5 s} = e^{1.5 s}
        neg0, neg1, neg2 = e(-2) + e(0), e(0) + e(-2), e(-1.2) + e(-1.6)
        loss0 = ((log(e(0) + neg0) - 0) + (log(e(0.9) + neg0) - 1.2)) / 2
        loss1 = ((log(e(0) + neg1) - 0) + (log(e(1.2) + neg1) - 1.6)) / 2
        loss2 = ((log(e(0.9) + neg2) - 1.2) + (log(e(1.2) + neg2) - 1.6)) / 2
        assert_value(
            region_phpc(self.MAP, self.LABELS, None, 0.5, 0.0, discount=0.5, reduction="none"),
            [loss0, loss1, loss2, 0, 0],
        )

    def test_region_supcon(self):
        loss0 = log(e(0) + e(1.2) + e(-2) + e(0)) - (0 + 1.2) / 2
        loss1 = log(e(0) + e(1.6) + e(0) + e(-2)) - (0 + 1.6) / 2
        loss2 = log(e(1.2) + e(1.6) + e(-1.2) + e(-1.6)) - (1.2 + 1.6) / 2
        assert_value(region_supcon(self.MAP, self.LABELS, None, 0.5), (loss0 + loss1 + loss2) / 3)

    def test_negatives(self):
        loss0 = log(e(-2) + e(0)) - (e(0) * 0 + e(-1.2) * 1.2) / (e(0) + e(-1.2))
        loss1 = log(e(0) + e(-2)) - (e(0) * 0 + e(-1.6) * 1.6) / (e(0) + e(-1.6))
        loss2 = log(e(-1.2) + e(-1.6)) - (e(-1.2) * 1.2 + e(-1.6) * 1.6) / (e(-1.2) + e(-1.6))
        assert_value(
            region_phpc(self.MAP, self.LABELS, None, 0.5, 2.0, denominator="negatives", reduction="sum"),
            loss0 + loss1 + loss2,
        )

    def test_local(self):
        # x0 .. x3 with labels 1 2 1 2; the cell {x0, x1} holds the positives of x2 and x3, {x2, x3} those of x0 and x1
        def large(positive, negatives):
            return log(e(positive) + sum(map(e, negatives))) - positive

        def small(positive, negative):  # the one negative stands for two
            return log(e(positive) + 2 * e(negative)) - positive

        loss0 = large(1.2, [0, -2]) + small(1.2, -2)
        loss1 = large(0, [0, 1.6]) + small(0, 1.6)
        loss2 = large(1.2, [1.6, -1.2]) + small(1.2, 1.6)
        loss3 = large(0, [-2, -1.2]) + small(0, -2)
        labels = torch.tensor([[[1, 2, 1, 2]]])
        actual = region_phpc(self.MAP[..., :4], labels, (1, 4), 0.5, 1.0, local_size=(1, 2), reduction="none")
        assert_value(actual, [loss0, loss1, loss2, loss3])

    def test_supcon(self):
        labels = torch.tensor([1, 1, 1, 2])
        all0, all1, all2 = e(0) + e(1.2) + e(-2), e(0) + e(1.6) + e(0), e(1.2) + e(1.6) + e(-1.2)
        out = [log(all0) - (0 + 1.2) / 2, log(all1) - (0 + 1.6) / 2, log(all2) - (1.2 + 1.6) / 2]
        inside = [
            -log((e(0) + e(1.2)) / 2 / all0),
            -log((e(0) + e(1.6)) / 2 / all1),
            -log((e(1.2) + e(1.6)) / 2 / all2),
        ]
        assert_value(supcon(self.X[:4], labels, temperature=0.5), sum(out) / 3)
        assert_value(supcon(self.X[:4], labels, temperature=0.5, form="in"), sum(inside) / 3)

    def test_supcon_with_keys(self):
        # x0 (label 1), x1 (label 2: no key of it) against x2 (1), x3 (3), x4 (ignored)
        actual = supcon(self.X[:2], torch.tensor([1, 2]), self.X[2:], torch.tensor([1, 3, -100]), 0.5, reduction="none")
        assert_value(actual, [log(e(1.2) + e(-2)) - 1.2, 0])

    def test_ntxent(self):
        # images (x0, x2) and (x1, x3)
        loss0 = log(e(0) + e(1.2) + e(-2)) - 1.2
        loss1 = log(e(0) + e(1.6) + e(0)) - 0
        loss2 = log(e(1.2) + e(1.6) + e(-1.2)) - 1.2
        loss3 = log(e(-2) + e(0) + e(-1.2)) - 0
        assert_value(ntxent(self.X[:2], self.X[2:4], reduction="none"), [loss0, loss1, loss2, loss3])
        assert_value(ntxent(self.X[:2], self.X[2:4]), (loss0 + loss1 + loss2 + loss3) / 4)

    def test_hard_negative_nce(self):
        # the NT-Xent rows: l+ and the two negatives of each; N = 2, the lowest value 2 e^-2
        expected = []
        for own, a, b in ((1.2, 0, -2), (0, 0, 1.6), (1.2, 1.6, -1.2), (0, -2, -1.2)):
            weighted = 2 * (e(a) * e(a) + e(b) * e(b)) / (e(a) + e(b))
            expected.append(log(1 + max((weighted - 0.1 * 2 * e(own)) / 0.9, 2 * e(-2)) / e(own)))
        assert_value(hard_negative_nce(self.X[:2], self.X[2:4], reduction="none"), expected)
        debiased = log(1 + max((e(0) + e(-2) - 0.3 * 2 * e(1.2)) / 0.7, 2 * e(-2)) / e(1.2))
        first = hard_negative_nce(self.X[:2], self.X[2:4], 0.5, 0.0, 0.3, reduction="none")[0]
        assert_value(first, debiased)
        assert_value(first, log(1 + 2 * e(-2) / e(1.2)))  # nothing is left of the negatives

    def test_ihpc(self):
        # the NT-Xent rows; s+ = 0.6, 0, 0.6, 0; hardness 2, so weights ∝ e^{-1.2} and 1
        loss = [
            log(e(1.2) + e(0) + e(-2)) - 1.2,
            log(e(0) + e(0) + e(1.6)) - 0,
            log(e(1.2) + e(1.6) + e(-1.2)) - 1.2,
            log(e(0) + e(-2) + e(-1.2)) - 0,
        ]
        total = 2 * e(-1.2) + 2
        weight = [4 * e(-1.2) / total, 4 / total, 4 * e(-1.2) / total, 4 / total]
        weighted = [v * t for v, t in zip(weight, loss, strict=True)]
        assert_value(ihpc(self.X[:2], self.X[2:4], None, 0.5, 2.0, reduction="none"), weighted)
        assert_value(ihpc(self.X[:2], self.X[2:4], None, 0.5, 2.0), sum(weighted) / 4)

    def test_ihpc_published_with_bank(self):
        # beta 0.5: own logit 0.6 or 0; the bank x4 is one more negative
        loss0 = log(e(0.6) + e(0) + e(-2) + e(0)) - 0.6
        loss1 = log(e(0) + e(0) + e(1.6) + e(-2)) - 0
        loss2 = log(e(0.6) + e(1.6) + e(-1.2) + e(-1.6)) - 0.6
        loss3 = log(e(0) + e(-2) + e(-1.2) + e(0)) - 0
        actual = ihpc(self.X[:2], self.X[2:4], beta=0.5, bank=self.X[4:])
        assert_value(actual, (loss0 + loss1 + loss2 + loss3) / 4)

    def test_infonce(self):
        q, k = self.X[:2], self.X[2:4]
        in_batch = (log(e(1.2) + e(-2)) - 1.2 + log(e(1.6) + e(0)) - 0) / 2
        assert_value(infonce(q, k, None, 0.5), in_batch)
        with_negatives = (log(e(1.2) + e(0)) - 1.2 + log(e(0) + e(-2)) - 0) / 2
        assert_value(infonce(q, k, self.X[4:], 0.5), with_negatives)
        # columns: k0 against q0 1.2, q1 1.6; k1 against q0 -2, q1 0
        exchanged = (log(e(1.2) + e(1.6)) - 1.2 + log(e(-2) + e(0)) - 0) / 2
        assert_value(infonce(q, k, None, 0.5, symmetric=True), (in_batch + exchanged) / 2)


# (b) The definitions as plain loops over pairs of plain numbers.
def unit(x, normalize=True):
    norm = math.sqrt(sum(v * v for v in x))
    return x if not normalize else [v / norm for v in x] if norm > 1e-12 else [0.0] * len(x)


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def sum_exp(values):
    return sum(math.exp(v) for v in values)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def loop_contrast(i, keys, label, x, fixed, temperature, hardness, discount, denominator, multiple=1.0):
    """Loss of anchor i against `keys` (without i), or None where it does not count. `fixed`: vectors of the weights."""
    positives = [j for j in keys if label[j] == label[i]]
    negatives = [j for j in keys if label[j] != label[i]]
    if not positives or (denominator != "all" and not negatives):
        return None
    weights = [math.exp(-hardness * dot(fixed[i], fixed[j])) for j in positives]
    from_negatives = multiple * sum_exp(dot(x[i], x[j]) / temperature for j in negatives)
    from_positives = multiple * sum_exp(dot(x[i], x[j]) / temperature for j in positives)
    total = 0.0
    for j, w in zip(positives, weights, strict=True):
        s = dot(x[i], x[j])
        summed = {
            "own": math.exp(s / temperature - discount * s) + from_negatives,
            "all": from_positives + from_negatives,
            "negatives": from_negatives,
        }[denominator]
        total += w / sum(weights) * (math.log(summed) - s / temperature)
    return total


def loop_region(
    features, labels, region_size=16, temperature=0.1, hardness=1.0, *, discount=0.0, local_size=None,
    denominator="own", background=0, ignore_index=IGNORED, per_image=False, normalize=True, reduction="mean",
    detach_weights=True, weights_from=None,
):  # fmt: skip
    batch, dim, *spatial = features.shape
    axes = len(spatial)
    size = spatial if region_size is None else [region_size] * axes if isinstance(region_size, int) else region_size
    part = [local_size] * axes if isinstance(local_size, int) else local_size
    at = [(b, c) for b in range(batch) for c in itertools.product(*map(range, spatial))]
    label = [labels[(b, *c)].item() for b, c in at]
    x = [unit([features[(b, d, *c)].item() for d in range(dim)], normalize) for b, c in at]
    fixed = x
    if weights_from is not None:
        fixed = [unit([weights_from[(b, d, *c)].item() for d in range(dim)], normalize) for b, c in at]
    region = [(b if per_image else 0, *(v // s for v, s in zip(c, size, strict=True))) for b, c in at]
    form = (label, x, fixed, temperature, hardness, discount, denominator)
    ignored = ignore_index if isinstance(ignore_index, tuple) else (ignore_index,)

    losses, counted = [0.0] * len(at), []
    for i in range(len(at)):
        if label[i] in ignored or label[i] == background:
            continue
        keys = [j for j in range(len(at)) if j != i and region[j] == region[i] and label[j] not in ignored]
        loss = loop_contrast(i, keys, *form)
        if loss is None:
            continue
        if part is not None:
            multiple = math.prod(s / p for s, p in zip(size, part, strict=True))
            cells = {}
            for j in keys:
                inside = tuple(v % s // p for v, s, p in zip(at[j][1], size, part, strict=True))
                cells.setdefault(inside, []).append(j)
            found = [loop_contrast(i, cell, *form, multiple) for cell in cells.values()]
            loss += mean([f for f in found if f is not None])
        losses[i] = loss
        counted.append(i)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return sum(losses)
    if reduction == "mean":
        return mean([losses[i] for i in counted])
    group = label if reduction == "class" else region
    return mean([mean([losses[i] for i in counted if group[i] == g]) for g in {group[i] for i in counted}])


def loop_supcon(
    embeddings, labels, keys=None, key_labels=None, temperature=0.1, *, form="out", ignore_index=IGNORED,
    normalize=True, reduction="mean",
):  # fmt: skip
    x = [unit(v, normalize) for v in embeddings.tolist()]
    y = labels.tolist()
    k = x if keys is None else [unit(v, normalize) for v in keys.tolist()]
    key_y = y if keys is None else key_labels.tolist()
    losses, counted = [0.0] * len(x), []
    for i in range(len(x)):
        allowed = [j for j in range(len(k)) if key_y[j] not in ignore_index and not (keys is None and j == i)]
        positives = [dot(x[i], k[j]) / temperature for j in allowed if key_y[j] == y[i]]
        if y[i] in ignore_index or not positives:
            continue
        whole = sum_exp(dot(x[i], k[j]) / temperature for j in allowed)
        shares = [math.exp(v) / whole for v in positives]
        losses[i] = -mean([math.log(p) for p in shares]) if form == "out" else -math.log(mean(shares))
        counted.append(i)
    if reduction == "class":
        return mean([mean([losses[i] for i in counted if y[i] == c]) for c in {y[i] for i in counted}])
    return {"none": losses, "sum": sum(losses), "mean": mean([losses[i] for i in counted])}[reduction]


def loop_ntxent(view1, view2, temperature=0.5, *, normalize=True, reduction="mean"):
    x = [unit(v, normalize) for v in (*view1.tolist(), *view2.tolist())]
    losses = []
    for i in range(len(x)):
        other = (i + len(view1)) % len(x)
        whole = sum_exp(dot(x[i], x[j]) / temperature for j in range(len(x)) if j != i)
        losses.append(math.log(whole) - dot(x[i], x[other]) / temperature)
    return {"none": losses, "sum": sum(losses), "mean": mean(losses)}[reduction]


def loop_ihpc(
    view1, view2, groups=None, temperature=0.5, hardness=1.0, *, beta=None, bank=None, bank_groups=None,
    normalize=True, reduction="mean", weights_from=None,
):  # fmt: skip
    n = len(view1)
    x = [unit(v, normalize) for v in (*view1.tolist(), *view2.tolist())]
    fixed = x if weights_from is None else [unit(v, normalize) for view in weights_from for v in view.tolist()]
    group = [None if groups is None else groups[i % n].item() for i in range(2 * n)]
    losses, weights, counted = [0.0] * len(x), [0.0] * len(x), []
    for i in range(2 * n):
        negatives = [x[j] for j in range(2 * n) if j % n != i % n and (groups is None or group[j] != group[i])]
        for m, key in enumerate([] if bank is None else bank.tolist()):
            if groups is None or bank_groups is None or bank_groups[m].item() != group[i]:
                negatives.append(key)
        if not negatives:
            continue
        other = (i + n) % (2 * n)
        own = dot(x[i], x[other]) / temperature * (1 if beta is None else 1 - beta)
        losses[i] = math.log(math.exp(own) + sum_exp(dot(x[i], key) / temperature for key in negatives)) - own
        weights[i] = math.exp(-hardness * dot(fixed[i], fixed[other])) if beta is None else 1.0
        counted.append(i)
    losses = [v * loss * len(counted) / sum(weights) if v else 0.0 for v, loss in zip(weights, losses, strict=True)]
    return {"none": losses, "sum": sum(losses), "mean": mean([losses[i] for i in counted])}[reduction]


def loop_infonce(query, positive, negatives=None, temperature=0.1, *, normalize=True, reduction="mean"):
    q, k = ([unit(v, normalize) for v in t.tolist()] for t in (query, positive))
    keys = k if negatives is None else [unit(v, normalize) for v in negatives.tolist()]
    losses = []
    for i in range(len(q)):
        own = math.exp(dot(q[i], k[i]) / temperature)
        whole = sum_exp(dot(q[i], key) / temperature for key in keys) + (0.0 if negatives is None else own)
        losses.append(-math.log(own / whole))
    return {"none": losses, "sum": sum(losses), "mean": mean(losses)}[reduction]


FORMS = {
    "own": dict(),
    "uniform": dict(hardness=0.0),
    "easy positives": dict(hardness=-10.0),
    "all": dict(denominator="all"),
    "negatives": dict(denominator="negatives", hardness=2.0),
    "published": dict(discount=0.3, hardness=0.0),
    "discount and hardness": dict(discount=0.3, hardness=1.5),
}
SCOPES = {
    "one region": dict(region_size=None),
    "remainder": dict(region_size=3),
    "per axis": dict(region_size=(2, 5)),
    "larger than the map": dict(region_size=64),
    "per image": dict(region_size=3, per_image=True),
    "no background": dict(region_size=3, background=None),
    "other background, ignore": dict(region_size=4, background=2, ignore_index=1),
    "local": dict(region_size=4, local_size=2),
    "local per axis": dict(region_size=(4, 6), local_size=(2, 1), per_image=True),
    "local is the region": dict(region_size=2, local_size=2),
    "raw features": dict(region_size=4, temperature=1.0, normalize=False),
}


def label_map(*shape, seed=1):
    """Four classes, class 3 a single pixel, and one pixel of each ignored label."""
    labels = integers(3, *shape, seed=seed)
    flat = labels.reshape(-1)
    flat[0], flat[len(flat) // 2], flat[len(flat) // 3], flat[len(flat) // 5] = 3, -1, 255, -100
    return labels


class TestLoops:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("form", FORMS)
    def test_region(self, form, scope):
        features, labels, options = rows(2, 3, 4, 7), label_map(2, 4, 7), FORMS[form] | SCOPES[scope]
        for reduction in ("none", "mean") if scope != "remainder" else ("none", "mean", "sum", "class", "region"):
            expected = loop_region(features, labels, reduction=reduction, **options)
            assert_value(region_phpc(features, labels, reduction=reduction, **options), expected)
            assert_value(region_phpc(features, labels, reduction=reduction, detach_weights=False, **options), expected)

    @pytest.mark.parametrize("options", [dict(), dict(local_size=(2, 1, 1)), dict(per_image=True, denominator="all")])
    def test_region_3d(self, options):
        features, labels = rows(2, 3, 3, 4, 3), label_map(2, 3, 4, 3)
        expected = loop_region(features, labels, (2, 2, 3), **options)
        assert_value(region_phpc(features, labels, (2, 2, 3), **options), expected)
        assert_value(region_phpc(features, labels[:, None], (2, 2, 3), **options), expected)

    @pytest.mark.parametrize("options", [dict(), dict(local_size=2, reduction="class"), dict(per_image=True)])
    def test_region_supcon(self, options):
        features, labels = rows(2, 3, 4, 7), label_map(2, 4, 7)
        expected = loop_region(features, labels, 4, 0.1, 0.0, denominator="all", **options)
        assert_value(region_supcon(features, labels, 4, **options), expected)

    def test_region_resizes_labels_by_nearest_neighbour(self):
        features, labels = rows(2, 3, 4, 6), label_map(2, 6, 4)
        resized = [[[image[y * 6 // 4, x * 4 // 6].item() for x in range(6)] for y in range(4)] for image in labels]
        assert_value(region_phpc(features, labels, 3), loop_region(features, torch.tensor(resized), 3))

    def test_region_unsigned_labels(self):
        features, labels = rows(1, 3, 4, 4), integers(3, 1, 4, 4)
        labels[0, 0] = 255
        for ignored in (IGNORED, -1):  # 255 is no -1
            expected = loop_region(features, labels, 4, ignore_index=ignored, background=None)
            actual = region_phpc(features, labels.to(torch.uint8), 4, ignore_index=ignored, background=None)
            assert_value(actual, expected)

    def test_detached_weights_are_constants(self):
        """The gradient is that of the loops with their weights held at the starting point."""
        features, labels = rows(1, 2, 2, 4), torch.tensor([[[1, 1, 2, 0], [1, 2, 1, 2]]])
        for options in (dict(), dict(denominator="all"), dict(local_size=2, discount=0.1)):
            options = dict(region_size=(2, 4), temperature=0.5, hardness=3.0) | options
            _, (grad,) = value_and_grads(lambda f, o=options: region_phpc(f, labels, **o), features)
            expected = torch.zeros_like(features)
            for k in range(features.numel()):
                step = torch.zeros_like(features)
                step.view(-1)[k] = 1e-5
                up, down = (
                    loop_region(f, labels, weights_from=features, **options) for f in (features + step, features - step)
                )
                expected.view(-1)[k] = (up - down) / 2e-5
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)
            options["detach_weights"] = False
            _, (other,) = value_and_grads(lambda f, o=options: region_phpc(f, labels, **o), features)
            assert not torch.allclose(grad, other, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("form", ["out", "in"])
    @pytest.mark.parametrize("reduction", ["mean", "class", "sum", "none"])
    def test_supcon(self, form, reduction):
        x, y, options = rows(12, 4), label_map(12), dict(form=form, reduction=reduction)
        y[y == 255] = -100  # 255 is a class of vectors
        assert_value(supcon(x, y, **options), loop_supcon(x, y, **options))
        k, key_y = rows(7, 4, seed=2), torch.tensor([0, 1, 1, -100, 3, 0, 7])
        assert_value(supcon(x, y, k, key_y, **options), loop_supcon(x, y, k, key_y, **options))
        options |= dict(temperature=1.5, normalize=False, ignore_index=(0,))
        assert_value(supcon(x, y, k, key_y, **options), loop_supcon(x, y, k, key_y, **options))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_ntxent_and_infonce(self, reduction):
        a, b, c = rows(5, 3), rows(5, 3, seed=2), rows(7, 3, seed=3)
        for options in (dict(reduction=reduction), dict(reduction=reduction, temperature=1.5, normalize=False)):
            assert_value(ntxent(a, b, **options), loop_ntxent(a, b, **options))
            assert_value(infonce(a, b, **options), loop_infonce(a, b, **options))
            assert_value(infonce(a, b, c, **options), loop_infonce(a, b, c, **options))
            sides = [torch.tensor(loop_infonce(*pair, **options), dtype=torch.float64) for pair in ((a, b), (b, a))]
            assert_value(infonce(a, b, symmetric=True, **options), (sum(sides) / 2).tolist())

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("form", [dict(), dict(hardness=0.0), dict(hardness=5.0, temperature=0.1), dict(beta=0.3)])
    def test_ihpc(self, form, reduction):
        a, b, bank = rows(5, 3), rows(5, 3, seed=2), unit_rows(4, 3, seed=3)
        groups, bank_groups = torch.tensor([4, 4, 9, 4, 9]), torch.tensor([9, 2, 4, 4])
        one_group = torch.ones(5, dtype=torch.int64)  # nobody counts without a bank
        for scope in (
            dict(),
            dict(groups=groups),
            dict(bank=bank),
            dict(groups=groups, bank=bank),
            dict(groups=groups, bank=bank, bank_groups=bank_groups),
            dict(groups=torch.tensor([1, 1, 1, 1, 2]), bank=bank, bank_groups=torch.ones(4)),
            dict(groups=one_group, bank=bank, bank_groups=bank_groups),
            dict(groups=one_group),
        ):
            options = form | scope | dict(reduction=reduction)
            assert_value(ihpc(a, b, **options), loop_ihpc(a, b, **options))

    def test_ihpc_weights_are_constants(self):
        views = rows(2, 3, 2)
        _, (grad,) = value_and_grads(lambda v: ihpc(v[0], v[1], None, 0.5, 3.0), views)
        expected = torch.zeros_like(views)
        for k in range(views.numel()):
            step = torch.zeros_like(views)
            step.view(-1)[k] = 1e-5
            up, down = (loop_ihpc(*v, None, 0.5, 3.0, weights_from=views) for v in (views + step, views - step))
            expected.view(-1)[k] = (up - down) / 2e-5
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)

    def test_ihpc_bank_gets_no_gradient(self):
        bank = unit_rows(4, 3).requires_grad_()
        value = ihpc(rows(3, 3).requires_grad_(), rows(3, 3, seed=2), bank=bank)
        assert torch.autograd.grad(value, bank, allow_unused=True) == (None,)


def unit_rows(*shape, seed=0):
    return torch.nn.functional.normalize(rows(*shape, seed=seed), dim=-1)


class TestPrimitives:
    def setup_method(self):
        self.anchors, self.keys = rows(6, 3), rows(9, 3, seed=2)
        self.allowed = integers(2, 6, 9).bool()
        self.allowed[2] = False
        self.allowed[3] = True
        self.bias, self.stat = rows(9, seed=3), rows(6, seed=4)

    def logits(self, i):
        s = [dot(self.anchors[i].tolist(), k) for k in self.keys.tolist()]
        return [(j, v) for j, v in enumerate(s) if self.allowed[i, j]]

    def test_pair_lse(self):
        for bias in (torch.zeros(9, dtype=torch.float64), self.bias):
            sums = [sum_exp(4.0 * s + bias[j].item() for j, s in self.logits(i)) for i in range(6)]
            expected = [math.log(v) if v else -math.inf for v in sums]
            assert_value(reference.pair_lse(self.anchors, self.keys, self.allowed, 4.0, bias), expected)
        assert_exact(
            reference.pair_lse(self.anchors, self.keys, self.allowed, 4.0),
            reference.pair_lse(self.anchors, self.keys, self.allowed, 4.0, torch.zeros(9, dtype=torch.float64)),
        )

    @pytest.mark.parametrize("term", ["logit", "own"])
    @pytest.mark.parametrize("discount, log_weight", [(0.0, False), (0.7, True)])
    def test_pair_mean(self, term, discount, log_weight):
        self.stat[1] = -math.inf  # an anchor without negatives: softplus(-inf) = 0
        outs, masses = [], []
        for i in range(6):
            total = out = 0.0
            for j, s in self.logits(i):
                w = math.exp(-1.3 * s + (self.bias[j].item() if log_weight else 0.0))
                own = math.log(math.exp((4.0 - discount) * s) + math.exp(self.stat[i].item())) - 4.0 * s
                out, total = out + w * (4.0 * s if term == "logit" else own), total + w
            outs.append(out / total if total else 0.0)
            masses.append(math.log(total) if total else -math.inf)
        weight = self.bias if log_weight else None
        out, mass = reference.pair_mean(
            self.anchors, self.keys, self.allowed, 4.0, 1.3, self.stat, term, discount, weight
        )
        assert_value(out, outs)
        assert_value(mass, masses)

    def test_parts_of_the_keys_merge(self):
        call = partial(reference.pair_mean, scale=4.0, hardness=1.3, stat=self.stat, term="own")
        parts = [call(self.anchors, self.keys[p], self.allowed[:, p]) for p in (slice(0, 4), slice(4, 9))]
        out, mass = call(self.anchors, self.keys, self.allowed)
        masses = torch.stack([m for _, m in parts])
        assert_exact(torch.logsumexp(masses, 0), mass)
        shares = torch.softmax(masses, 0).nan_to_num(0.0)
        assert_exact((shares * torch.stack([o for o, _ in parts])).sum(0), out)

    @pytest.mark.parametrize("term", ["logit", "own"])
    def test_gradients(self, term):
        scale, hardness = torch.tensor(4.0, dtype=torch.float64), 1.3
        inputs = [t.clone().requires_grad_() for t in (self.anchors, self.keys, scale, self.stat)]

        def mean_of(q, k, c, stat):
            return reference.pair_mean(q, k, self.allowed, c, hardness, stat, term, 0.3, None, False)[0]

        def lse_of(q, k, c, _):
            return reference.pair_lse(q, k, self.allowed, c)[[0, 1, 3, 4, 5]]  # 2 is empty, -inf

        assert torch.autograd.gradcheck(mean_of, inputs if term == "own" else [*inputs[:3], self.stat])
        assert torch.autograd.gradcheck(lse_of, [*inputs[:3], self.stat])

    def test_empty_rows_and_no_keys(self):
        for keys, allowed in ((self.keys, torch.zeros(6, 9).bool()), (self.keys[:0], torch.zeros(6, 0).bool())):
            q, k = self.anchors.clone().requires_grad_(), keys.clone().requires_grad_()
            lse = reference.pair_lse(q, k, allowed, 4.0)  # differentiable statistic of an empty set
            assert_value(lse, [-math.inf] * 6)
            out, mass = reference.pair_mean(q, k, allowed, 4.0, 1.0, lse, "own", 0.1, None, False)
            assert_value(out, [0.0] * 6)
            assert_value(mass, [-math.inf] * 6)
            assert out.requires_grad and not mass.requires_grad
            with torch.autograd.set_detect_anomaly(True):
                grads = torch.autograd.grad(out.sum() + torch.nn.functional.softplus(lse).sum(), (q, k))
            for grad in grads:
                assert_exact(grad, torch.zeros_like(grad))


# (c) What holds of any input.
REGION_FORMS = [partial(region_phpc, **form) for form in FORMS.values()] + [region_supcon]


@pytest.mark.parametrize("loss", REGION_FORMS, ids=[*FORMS, "region_supcon"])
class TestRegionProperties:
    features, labels = rows(2, 3, 4, 6), label_map(2, 4, 6)

    def test_classes_may_be_renamed(self, loss):
        renamed = self.labels.clone()
        for old, new in {0: 4, 1: 300, 2: -7, 3: 0}.items():
            renamed[self.labels == old] = new
        for reduction in ("mean", "class"):
            assert_same(
                lambda f, r=reduction: loss(f, self.labels, 3, reduction=r),
                lambda f, r=reduction: loss(f, renamed, 3, background=4, reduction=r),
                self.features,
            )

    def test_order_of_pixels_and_images(self, loss):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(5))

        def shuffled(f):
            return loss(f.flip(0).flatten(2)[..., order], self.labels.flip(0).flatten(1)[..., order], None)

        assert_same(lambda f: loss(f, self.labels, None), shuffled, self.features)
        assert_same(lambda f: loss(f, self.labels, 3), lambda f: loss(f.flip(0), self.labels.flip(0), 3), self.features)

    def test_ignored_pixels_are_dropped_rows(self, loss):
        kept = torch.ones(2, 4, 6, dtype=torch.bool)
        for value in IGNORED:
            kept &= self.labels != value

        def dropped(f):
            f = f.movedim(1, -1)[kept].T.unsqueeze(0)  # [1, D, rows]
            return loss(f, self.labels[kept].unsqueeze(0), None)

        assert_same(lambda f: loss(f, self.labels, None), dropped, self.features)

    def test_regions_are_a_loop_over_regions(self, loss):
        def looped(f):
            total = f.new_zeros(())
            for y, x in itertools.product((0, 3), (0, 3)):
                cell = (..., slice(y, y + 3), slice(x, x + 3))
                total = total + loss(f[cell], self.labels[cell], None, reduction="sum")
            return total

        assert_same(lambda f: loss(f, self.labels, 3, reduction="sum"), looped, self.features)

    def test_per_image_is_a_loop_over_images(self, loss):
        assert_same(
            lambda f: loss(f, self.labels, 3, per_image=True, reduction="sum"),
            lambda f: sum(loss(f[b : b + 1], self.labels[b : b + 1], 3, reduction="sum") for b in range(2)),
            self.features,
        )

    def test_a_pure_region_adds_nothing(self, loss):
        """Its anchors have no negatives. Only denominator "all" has something to say of them."""
        wide, wide_labels = rows(2, 3, 4, 9, seed=9), torch.ones(2, 4, 9, dtype=torch.int64)
        wide[..., :6], wide_labels[..., :6] = self.features, self.labels
        value, (grad,) = value_and_grads(lambda f: loss(f, wide_labels, (4, 3)), wide)
        before, (before_grad,) = value_and_grads(lambda f: loss(f, self.labels, (4, 3)), self.features)
        if loss is region_supcon or loss.keywords.get("denominator") == "all":
            assert abs(value - before) > 1e-3
            return
        assert_exact(value, before)
        assert_exact(grad[..., :6], before_grad)
        assert_exact(grad[..., 6:], torch.zeros_like(grad[..., 6:]))

    def test_temperature_may_be_a_tensor(self, loss):
        assert_value(loss(self.features, self.labels, 3, torch.tensor(0.25)), loss(self.features, self.labels, 3, 0.25))

    def test_length_of_a_pixel_does_not_matter(self, loss):
        scaled = self.features * rows(2, 1, 4, 6, seed=6).exp()
        assert_exact(loss(scaled, self.labels, 3), loss(self.features, self.labels, 3))


class TestProperties:
    def test_own_is_all_at_a_single_positive(self):
        features, labels = rows(1, 3, 1, 9), torch.tensor([[[1, 2, 3, 1, 2, 3, 0, 0, 0]]])
        assert_same(lambda f: region_phpc(f, labels), lambda f: region_phpc(f, labels, denominator="all"), features)
        x, y = rows(8, 3), torch.arange(4).repeat(2)  # two views of four images
        assert_same(lambda v: supcon(v, y), lambda v: supcon(v, y, form="in"), x)
        assert_same(lambda v: supcon(v, y, temperature=0.5), lambda v: ntxent(v[:4], v[4:]), x)
        assert_same(lambda v: ntxent(v[:4], v[4:]), lambda v: ihpc(v[:4], v[4:], hardness=0.0), x)
        assert_same(lambda v: ntxent(v[:4], v[4:]), lambda v: ihpc(v[:4], v[4:], beta=0.0), x)

    def test_supcon_is_the_region_loss_of_one_region(self):
        x, y = rows(10, 3), integers(3, 10)
        assert_same(lambda v: supcon(v, y), lambda v: region_supcon(v.T[None], y[None], None, background=None), x)

    def test_hardness_is_continuous_at_zero(self):
        features, labels = rows(2, 3, 4, 6), label_map(2, 4, 6)
        a, b = rows(5, 3), rows(5, 3, seed=2)
        cases = [
            partial(region_phpc, features, labels, 3, 0.1, denominator=d, local_size=s)
            for d in ("own", "all", "negatives")
            for s in (None, 1)
        ]
        for loss in [*cases, partial(ihpc, a, b, None, 0.5)]:
            at_zero, near, far = loss(hardness=0.0), loss(hardness=1e-7), loss(hardness=1.0)
            assert abs(near - at_zero) < 1e-5
            if getattr(loss, "keywords", {}).get("local_size") != 1:  # cells of one pixel hold no pair
                assert abs(far - at_zero) > 1e-3

    def test_in_is_at_most_out(self):
        for seed in range(5):
            x, y = rows(20, 4, seed=seed), integers(4, 20, seed=seed)
            inside, out = (supcon(x, y, form=form, reduction="none") for form in ("in", "out"))
            assert (inside <= out + 1e-12).all() and (inside < out - 1e-3).any()

    def test_harder_positives_get_more_of_the_pull(self):
        """hardness > 0 moves the gradient towards the least similar positive, the reason for the loss."""
        angles = torch.tensor([0.0, 0.3, 1.2, 2.5, 4.0], dtype=torch.float64)
        features = torch.stack([angles.cos(), angles.sin()])[None]
        labels = torch.tensor([[1, 1, 1, 2, 2]])

        def pulls(hardness):
            def first(f):
                return region_phpc(f, labels, None, 1.0, hardness, normalize=False, reduction="none")[0, 0]

            _, (grad,) = value_and_grads(first, features)
            return grad[0, :, 1:3].norm(dim=0)

        (easy0, hard0), (easy2, hard2) = pulls(0.0), pulls(2.0)
        assert hard2 / easy2 > 1.5 * hard0 / easy0

    def test_small_losses_keep_their_digits(self):
        """Positives at s = 1, negatives at s = -1, τ = 0.05: a loss of 3 e^{-40}, far below the rounding of l = 20."""
        x = torch.tensor([[1.0, 0.0]] * 2 + [[-1.0, 0.0]] * 3, dtype=torch.float64)
        labels = torch.tensor([[1, 1, 0, 0, 0]])
        assert_value(region_phpc(x.T[None], labels, None, 0.05), math.log1p(3 * math.exp(-40)))
        assert_value(infonce(x[:2], x[:2], x[2:], 0.05), math.log1p(3 * math.exp(-40)))

    def test_large_losses_keep_theirs(self):
        """softplus(21) is not 21: the gradient differs by e^{-21} = 7.6e-10, which a thresholded softplus drops."""
        one = torch.ones(1, 1, dtype=torch.float64)

        def loss(k):
            return infonce(21 * one, k, one, 1.0, normalize=False)

        value, (grad,) = value_and_grads(loss, 0 * one)
        assert_value(value, 21 + math.log1p(math.exp(-21)))
        assert_value(grad, -21 / (1 + math.exp(-21)))

    def test_sharp_temperature_is_finite(self):
        features, labels = rows(2, 3, 4, 6), label_map(2, 4, 6)
        for loss in REGION_FORMS:
            value, (grad,) = value_and_grads(lambda f, loss=loss: loss(f, labels, 3, 0.001), features)
            assert value.isfinite() and grad.isfinite().all() and grad.abs().max() > 0

    @pytest.mark.parametrize(
        "call",
        [
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), 4, denominator="all", discount=0.1),
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), 4, denominator="both"),
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), 4, local_size=3),
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), None, local_size=2),
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), (4, 4, 4)),
            lambda: region_phpc(rows(1, 3, 4, 4), label_map(1, 4, 4), 4, reduction="median"),
            lambda: supcon(rows(4, 3), integers(2, 4), form="both"),
            lambda: supcon(rows(4, 3), integers(2, 4), rows(4, 3)),
            lambda: ihpc(rows(4, 3), rows(4, 3), beta=1.0),
            lambda: ihpc(rows(4, 3), rows(4, 3), beta=-0.1),
            lambda: ntxent(rows(4, 3), rows(4, 3), reduction="class"),
        ],
    )
    def test_contradictions_raise(self, call):
        with pytest.raises(ValueError, match="got|divide"):
            call()


class TestDegenerate:
    """No anchor counts: 0, joined to the graph, zero gradients; never NaN."""

    def assert_zero(self, loss, *inputs):
        with torch.autograd.set_detect_anomaly(True):  # nor on the way to the gradient
            value, grads = value_and_grads(loss, *inputs)
        assert_exact(value, torch.zeros_like(value))
        for grad in grads:
            assert_exact(grad, torch.zeros_like(grad))

    MAPS = {
        "all ignored": torch.full((2, 3, 4), 255),
        "all background": torch.zeros(2, 3, 4, dtype=torch.int64),
        "all singletons": torch.arange(1, 25).reshape(2, 3, 4),
        "one pixel of foreground": torch.zeros(2, 3, 4, dtype=torch.int64).index_fill(2, torch.tensor([0]), -1),
    }
    MAPS["one pixel of foreground"][0, 1, 2] = 5

    @pytest.mark.parametrize("reduction", ["mean", "class", "region", "sum", "none"])
    @pytest.mark.parametrize("labels", MAPS.values(), ids=MAPS)
    @pytest.mark.parametrize("loss", REGION_FORMS, ids=[*FORMS, "region_supcon"])
    def test_region(self, loss, labels, reduction):
        self.assert_zero(lambda f: loss(f, labels, 4, local_size=2, reduction=reduction), rows(2, 3, 3, 4))

    @pytest.mark.parametrize("loss", REGION_FORMS[:3] + REGION_FORMS[4:-1], ids=[f for f in FORMS if f != "all"])
    def test_region_of_one_class(self, loss):
        self.assert_zero(lambda f: loss(f, torch.ones(2, 3, 4, dtype=torch.int64), 2), rows(2, 3, 3, 4))

    @pytest.mark.parametrize("shape", [(1, 3, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4), (1, 1, 1)])
    def test_region_of_one_or_no_pixel(self, shape):
        labels = torch.ones(shape[0], *shape[2:], dtype=torch.int64)
        for loss in REGION_FORMS:
            self.assert_zero(lambda f, loss=loss: loss(f, labels), rows(*shape))

    @pytest.mark.parametrize("form", ["out", "in"])
    @pytest.mark.parametrize("reduction", ["mean", "class", "sum", "none"])
    def test_supcon(self, form, reduction):
        loss = partial(supcon, form=form, reduction=reduction)
        for y in (torch.full((4,), -100), torch.arange(4), torch.tensor([2])):
            self.assert_zero(lambda x, y=y: loss(x, y), rows(len(y), 3))
        self.assert_zero(lambda x: loss(x, integers(2, 0)), rows(0, 3))
        for key_y in (torch.tensor([8, 9]), torch.tensor([-100, -1]), integers(2, 0)):
            self.assert_zero(lambda x, k, y=key_y: loss(x, integers(2, 4), k, y), rows(4, 3), rows(len(key_y), 3))

    @pytest.mark.parametrize("n", [0, 1])
    def test_views(self, n):
        a, b = rows(n, 3), rows(n, 3, seed=2)
        self.assert_zero(ntxent, a, b)
        self.assert_zero(ihpc, a, b)
        self.assert_zero(partial(ihpc, beta=0.1), a, b)
        self.assert_zero(infonce, a, b)
        self.assert_zero(lambda q, k: infonce(q, k, rows(0, 3)), a, b)
        self.assert_zero(lambda v, w: ihpc(v, w, bank=rows(0, 3), reduction="none"), a, b)

    def test_views_of_one_group(self):
        self.assert_zero(lambda v, w: ihpc(v, w, torch.ones(4)), rows(4, 3), rows(4, 3, seed=2))

    def test_zero_rows_get_no_gradient(self):
        """A pixel of zeros has no direction: similarity 0 to all, gradient 0 rather than 1e12."""
        features, labels = rows(1, 3, 4, 4), label_map(1, 4, 4)
        features[0, :, 2, 2], features[0, :, 3, 3] = 0.0, 1e-13
        value, (grad,) = value_and_grads(lambda f: region_phpc(f, labels, None), features)
        assert_value(value, loop_region(features, labels, None))
        assert grad.isfinite().all() and grad.abs().max() < 100
        assert_exact(grad[0, :, [2, 3], [2, 3]], torch.zeros(3, 2, dtype=torch.float64))
        views = rows(2, 4, 3)
        views[:, 1] = 0.0
        for loss in (ntxent, ihpc, infonce, partial(infonce, negatives=torch.zeros(2, 3, dtype=torch.float64))):
            _, (grad,) = value_and_grads(lambda v, loss=loss: loss(v[0], v[1]), views)
            assert grad.isfinite().all() and not grad[:, 1].any() and grad[:, 0].any()


# (d) Literal values: a change of meaning shows here even when reference and package change together.
def waves(*shape, phase=0.0):
    count = math.prod(shape)
    return torch.tensor([math.sin(1.7 * i + phase) for i in range(count)], dtype=torch.float64).reshape(shape)


PINNED_LABELS = torch.tensor([[[0, 1, 1, 2], [2, 1, 255, 0], [1, 2, 2, 0]]])
WAVE_PROBS = torch.softmax(waves(1, 3, 3, 4, phase=1.0), 1)
PINNED = {
    "region_phpc": (lambda: region_phpc(waves(1, 3, 3, 4), PINNED_LABELS), 10.523625559571),
    "region_phpc, two granularities": (
        lambda: region_phpc(waves(1, 3, 3, 4), PINNED_LABELS, 4, local_size=2),
        15.352452159684,
    ),
    "region_phpc, published": (
        lambda: region_phpc(waves(1, 3, 3, 4), PINNED_LABELS, hardness=0.0, discount=0.1),
        8.4203920628507,
    ),
    "region_phpc, negatives": (
        lambda: region_phpc(waves(1, 3, 3, 4), PINNED_LABELS, denominator="negatives"),
        10.310026007404,
    ),
    "region_supcon": (lambda: region_supcon(waves(1, 3, 3, 4), PINNED_LABELS), 9.0426074564665),
    "supcon, out": (lambda: supcon(waves(6, 3), torch.tensor([0, 0, 1, 1, 1, 2])), 5.9214375544026),
    "supcon, in": (lambda: supcon(waves(6, 3), torch.tensor([0, 0, 1, 1, 1, 2]), form="in"), 3.7942784412725),
    "ntxent": (lambda: ntxent(waves(4, 3), waves(4, 3, phase=0.5)), 0.85670555061897),
    "pixel_contrast": (lambda: pixel_contrast(waves(1, 3, 3, 4), PINNED_LABELS, num_classes=3), 8.93483624981669),
    "pixel_contrast, bank": (
        lambda: pixel_contrast(
            waves(1, 3, 3, 4), PINNED_LABELS, waves(4, 3), torch.tensor([0, 1, 2, 2]), num_classes=3
        ),
        11.728676955869872,
    ),
    "local_contrast": (lambda: local_contrast(waves(1, 3, 3, 4), PINNED_LABELS, num_classes=3), 3.2147699956542146),
    "local_contrast, partner": (
        lambda: local_contrast(waves(2, 3, 3, 4), torch.cat([PINNED_LABELS] * 2), torch.tensor([1, 0]), num_classes=3),
        6.873295511008965,
    ),
    "prototype_contrast": (
        lambda: prototype_contrast(waves(6, 3), torch.tensor([0, 0, 1, 1, 1, 2]), waves(6, 3).softmax(1)),
        6.64265568751369,
    ),
    "prototype_assignment": (
        lambda: prototype_assignment(waves(1, 3, 3, 4), PINNED_LABELS, waves(3, 2, 3)),
        5.075621762590726,
    ),
    "hard_negative_nce": (lambda: hard_negative_nce(waves(4, 3), waves(4, 3, phase=0.5)), 1.116685075494442),
    "ihpc": (lambda: ihpc(waves(4, 3), waves(4, 3, phase=0.5)), 0.84747001909736),
    "ihpc, published": (lambda: ihpc(waves(4, 3), waves(4, 3, phase=0.5), beta=0.1), 0.95653824782065),
    "infonce": (lambda: infonce(waves(4, 3), waves(4, 3, phase=0.5)), 0.22243965364964),
    "infonce, negatives": (
        lambda: infonce(waves(4, 3), waves(4, 3, phase=0.5), waves(5, 3, phase=1.0)),
        1.5514490113587,
    ),
    "entropy_guided": (lambda: entropy_guided(waves(1, 3, 3, 4), WAVE_PROBS, PINNED_LABELS), 6.599345145195),
    "entropy_guided, classes": (
        lambda: entropy_guided(waves(1, 3, 3, 4), WAVE_PROBS, PINNED_LABELS, entropy_classes=True),
        5.35406378444,
    ),
    "multiscale": (
        lambda: multiscale(waves(2, 3, 3, 4), waves(2, 3, 3, 4, phase=0.5), None, (1, 2)),
        1.179392588319,
    ),
    "multiscale, majority and pixels": (
        lambda: multiscale(
            waves(1, 3, 3, 4), waves(1, 3, 3, 4, phase=0.5), PINNED_LABELS, 2, patch_positives="majority", num_classes=3
        ),
        7.018474074781,
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_value(name):
    loss, expected = PINNED[name]
    assert_value(loss(), expected)


# (e) Every loss differentiates to what finite differences say. Weights are differentiated or absent here; that detached
# weights are constants is tested above.
TEMPERATURE = torch.tensor(0.4, dtype=torch.float64)
SMALL = torch.tensor([[[1, 1, 2], [0, 2, 1]]])
SMALL_PROBS = torch.softmax(rows(1, 3, 2, 3, seed=3), 1)
GRADCHECKS = {
    "own, hardness 0": (lambda f, t: region_phpc(f, SMALL, 3, t, 0.0), (1, 2, 2, 3)),
    "own": (lambda f, t: region_phpc(f, SMALL, 3, t, 2.0, detach_weights=False), (1, 2, 2, 3)),
    "discount": (lambda f, t: region_phpc(f, SMALL, 3, t, 2.0, discount=0.3, detach_weights=False), (1, 2, 2, 3)),
    "all": (lambda f, t: region_phpc(f, SMALL, 3, t, 2.0, denominator="all", detach_weights=False), (1, 2, 2, 3)),
    "negatives": (
        lambda f, t: region_phpc(f, SMALL, 3, t, 2.0, denominator="negatives", detach_weights=False, reduction="class"),
        (1, 2, 2, 3),
    ),
    "local": (
        lambda f, t: region_phpc(f, SMALL, (2, 4), t, 2.0, local_size=2, detach_weights=False, reduction="none"),
        (1, 2, 2, 3),
    ),
    "region_supcon": (lambda f, t: region_supcon(f, SMALL, 3, t, reduction="region"), (1, 2, 2, 3)),
    "raw features": (lambda f, t: region_phpc(f, SMALL, 3, t, 0.0, normalize=False), (1, 2, 2, 3)),
    "supcon, out": (lambda x, t: supcon(x, SMALL.flatten(), temperature=t), (6, 2)),
    "supcon, in": (lambda x, t: supcon(x, SMALL.flatten(), temperature=t, form="in"), (6, 2)),
    "supcon, keys": (lambda x, t: supcon(x[:3], SMALL[0, 0], x[3:], SMALL[0, 1], t, form="in"), (6, 2)),
    "ntxent": (lambda x, t: ntxent(x[:3], x[3:], t), (6, 2)),
    "pixel_contrast": (lambda f, t: pixel_contrast(f, SMALL, None, None, t, num_classes=3), (1, 2, 2, 3)),
    "pixel_contrast, bank": (
        lambda f, t: pixel_contrast(
            f, SMALL, unit_rows(4, 2), torch.tensor([0, 1, 1, 2]), t, num_classes=3, background=0
        ),
        (1, 2, 2, 3),
    ),
    "local_contrast": (
        lambda f, t: local_contrast(
            torch.cat([f, f.flip(3).sin()]), torch.cat([SMALL] * 2), torch.tensor([1, 0]), t, num_classes=3
        ),
        (1, 2, 2, 3),
    ),
    "prototype_contrast": (lambda x, t: prototype_contrast(x, SMALL.flatten(), x.softmax(1), t, -2.0), (6, 2)),
    "prototype_assignment": (
        lambda f, t: prototype_assignment(f, SMALL, unit_rows(3, 2, 2), unit_rows(1, 2, 2, 3), t),
        (1, 2, 2, 3),
    ),
    "hard_negative_nce": (lambda x, t: hard_negative_nce(x[:3], x[3:], t, 0.7, 0.1), (6, 2)),
    "hard_negative_nce, no discount": (lambda x, t: hard_negative_nce(x[:3], x[3:], t, 2.0, 0.0), (6, 2)),
    "ihpc": (lambda x, t: ihpc(x[:3], x[3:], None, t, 0.0), (6, 2)),
    "ihpc, groups and bank": (
        lambda x, t: ihpc(x[:3], x[3:], torch.tensor([1, 1, 2]), t, 0.0, bank=unit_rows(3, 2)),
        (6, 2),
    ),
    "ihpc, published": (lambda x, t: ihpc(x[:3], x[3:], None, t, beta=0.1, reduction="none"), (6, 2)),
    "infonce": (lambda x, t: infonce(x[:3], x[3:], None, t), (6, 2)),
    "infonce, negatives": (lambda x, t: infonce(x[:2], x[2:4], x[4:], t), (6, 2)),
    "entropy_guided": (
        lambda f, t: entropy_guided(f, SMALL_PROBS, SMALL, t, symmetric=True, detach_keys=False),
        (1, 2, 2, 3),
    ),
    "multiscale": (
        lambda f, t: multiscale(f[:1], f[1:], SMALL, (1, 2), t, patch_positives="majority", num_classes=3),
        (2, 2, 2, 3),
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    loss, shape = GRADCHECKS[name]
    inputs = [rows(*shape).requires_grad_(), TEMPERATURE.clone().requires_grad_()]
    assert loss(*inputs).abs().max() > 1e-3  # the small labels do hold anchors
    assert torch.autograd.gradcheck(loss, inputs)
