"""Multiscale contrast of two branches: what is particular to it; the shared tables hold the rest."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import hpcloss
from hpcloss import reference
from tests.tools.cases import LABELS, MAPS, assert_same, choice, integers, rows, value_and_grads
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_exact

fast, oracle = FAST["multiscale_contrast"], ORACLE["multiscale_contrast"]
e, log = math.exp, math.log

FORMS = {
    "instance": {"patch_size": 3},
    "majority": {"patch_size": 3, "patch_positives": "majority"},
    "several sizes": {"patch_size": (1, 2, 4), "patch_weight": 0.3},
    "several sizes, majority": {"patch_size": (2, 100), "patch_positives": "majority", "pixel_weight": 0.4},
    "patches alone": {"patch_size": 2, "pixel_weight": 0.0},
    "inner products": {"patch_size": (2, 3), "normalize": False},
    "inner products, majority": {"patch_size": 3, "patch_positives": "majority", "normalize": False},
}


def branches(*shape, dtype=torch.float64):
    return rows(*shape, dtype=dtype), rows(*shape, seed=1, dtype=dtype)


def both(labels=None, **options):
    """The fast loss with all pixels and the oracle."""
    every = {} if labels is None else {"samples_per_class": None}
    return (
        lambda x, y, *t: fast(x, y, labels, options.get("patch_size", 8), *t, **every, **_rest(options)),
        lambda x, y, *t: oracle(x, y, labels, options.get("patch_size", 8), *t, **_rest(options)),
    )


def _rest(options):
    return {name: value for name, value in options.items() if name != "patch_size"}


# -------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", MAPS)
def test_equal_to_the_reference(shape, labels):
    shape = MAPS[shape]
    labels = LABELS[labels]((shape[0], *shape[2:]), 0)
    for options in FORMS.values():
        assert_same(*both(labels, num_classes=4, **options), *branches(*shape))


@pytest.mark.parametrize("shape", MAPS)
def test_equal_to_the_reference_without_labels(shape):
    for size in (1, 2, 3, (2, 5), 100):
        for normalize in (True, False):
            assert_same(*both(patch_size=size, normalize=normalize), *branches(*MAPS[shape]))


@pytest.mark.parametrize("form", FORMS)
def test_equal_to_the_reference_with_a_learnt_temperature(form):
    labels = choice([0, 1, 2, 3, 7, 255], 2, 1, 14, 12)  # of another resolution; 7 is no class
    loss = both(labels, num_classes=4, ignore_index=(2, 255), **FORMS[form])
    assert_same(*loss, *branches(2, 5, 7, 6), torch.tensor(0.2).double())


def test_beyond_one_tile():
    for options in ({"patch_size": 1}, {"patch_size": (1, 2), "patch_positives": "majority"}):
        labels = choice([0, 0, 0, 1, 2, 255], 2, 27, 20)
        assert_same(*both(labels, num_classes=3, **options), *branches(2, 3, 27, 20))


def test_views_of_the_features():
    labels, x, y = choice([0, 1, 255], 2, 7, 6), rows(2, 7, 6, 5), rows(2, 5, 6, 7, seed=1)
    fast_loss, oracle_loss = both(labels, num_classes=2, patch_size=2)
    assert_same(
        lambda x, y: fast_loss(x.movedim(-1, 1), y.transpose(2, 3)),
        lambda x, y: oracle_loss(x.movedim(-1, 1), y.transpose(2, 3)),
        x,
        y,
    )


def test_gradcheck():
    """Keys of "instance" are constants, which finite differences do not know; the oracle stands for them above."""
    labels = choice([0, 1, 1, 255], 1, 3, 4)
    leaves = *(x.requires_grad_() for x in branches(1, 2, 3, 4)), torch.tensor(0.4).double().requires_grad_()
    loss = both(labels, num_classes=2, patch_size=(1, 2), patch_positives="majority")[0]
    assert loss(*leaves) > 0 and torch.autograd.gradcheck(loss, leaves)


class TestByHand:
    """Two patches A, B of two pixels in each branch, with unit means x0 = 1A, x1 = 1B, x2 = 2A, x3 = 2B; τ = 1/2.

    l:      x1     x2     x3
      x0    0      1.2    -2
      x1           1.6    0
      x2                  -1.2
    """

    BRANCH1 = torch.tensor([[[[2, 0, 0, 0]], [[0, 0, 1, 3]]]], dtype=torch.float64)  # means (1, 0) and (0, 2)
    BRANCH2 = torch.tensor([[[[6, 12, -3, -1]], [[8, 16, 4, -4]]]], dtype=torch.float64)  # (9, 12) and (-2, 0)
    SUPERVISED = [
        log(e(1.2) + e(0) + e(-2)) - 1.2,  # x0: P x2; N x1, x3
        log(e(0) + e(0) + e(1.6)) - 0,  # x1: P x3; N x0, x2
        log(e(1.2) + e(1.6) + e(-1.2)) - 1.2,  # x2: P x0; N x1, x3
        log(e(0) + e(-2) + e(-1.2)) - 0,  # x3: P x1; N x0, x2
    ]

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_instance(self, loss):
        of_1 = [log(e(1.2) + e(-2)) - 1.2, log(e(0) + e(1.6)) - 0]
        of_2 = [log(e(1.2) + e(1.6)) - 1.2, log(e(0) + e(-2)) - 0]
        expected = torch.tensor(sum(of_1 + of_2) / 4, dtype=torch.float64)
        assert_exact(loss(self.BRANCH1, self.BRANCH2, None, 2, 0.5), expected)

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_majority(self, loss):
        """Of B one pixel is ignored: it neither votes nor is averaged, and the mean of B in branch 1 is (0, 1)."""
        labels, first = torch.tensor([[[0, 0, 1, -1]]]), self.BRANCH1
        second = self.BRANCH2.clone()
        second[0, :, 0, 2] = torch.tensor([-3.0, 0.0])
        options = {"patch_positives": "majority", "pixel_weight": 0.0, "num_classes": 2}
        expected = torch.tensor(sum(self.SUPERVISED) / 4, dtype=torch.float64)
        assert_exact(loss(first, second, labels, 2, 0.5, **options), expected)

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_pixels(self, loss):
        first, second = self.BRANCH1[..., [0, 3]], self.BRANCH2[..., [0, 2]]
        second[0, 1, 0, 1] = 0.0  # (-3, 0)
        options = {"patch_weight": 0.0, "pixel_weight": 3.0, "num_classes": 2}
        expected = torch.tensor(3 * sum(self.SUPERVISED) / 4, dtype=torch.float64)
        assert_exact(loss(first, second, torch.tensor([[[0, 1]]]), 1, 0.5, **options), expected)


# --------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("shape", [(2, 5, 8, 12), (2, 3, 4, 4, 8)])
def test_instance_is_infonce_of_pooled_maps(shape):
    """Image by image and branch by branch, by average pooling and a loss with tests of its own."""
    pool = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d

    def pooled(x, y):
        x, y = (pool(z, 4).flatten(2).transpose(1, 2) for z in (x, y))
        pairs = [*zip(x, y, strict=True), *zip(y, x, strict=True)]
        return torch.stack([reference.infonce_loss(query, key.detach()) for query, key in pairs]).mean()

    assert_same(lambda x, y: fast(x, y, None, 4), pooled, *branches(*shape))


def test_keys_of_instance_are_constants():
    """The opposite: were they not, the gradient would be that of the symmetric loss, which is another one."""
    x, y = branches(1, 5, 8, 8)

    def differentiated(x, y):
        x, y = (F.avg_pool2d(z, 4).flatten(2)[0].T for z in (x, y))
        return (reference.infonce_loss(x, y) + reference.infonce_loss(y, x)) / 2

    (value, grads), (expected, others) = (value_and_grads(f, x, y) for f in (lambda x, y: fast(x, y, None, 4),
                                                                              differentiated))  # fmt: skip
    assert_exact(value, expected)
    assert all((grad - other).abs().max() > 0.1 * other.abs().max() for grad, other in zip(grads, others, strict=True))


def test_instance_keeps_images_apart_and_majority_pools_them():
    (x, y), (other, _) = branches(2, 5, 8, 8), branches(2, 5, 8, 8)
    other[1] = rows(5, 8, 8, seed=9)
    labels = choice([0, 1, 2], 2, 8, 8)
    for positives, apart in (("instance", True), ("majority", False)):
        options = {"patch_positives": positives, "pixel_weight": 0.0, "num_classes": 3}
        grads = [value_and_grads(lambda x: fast(x, y, labels, 2, **options), z)[1][0][0] for z in (x, other)]  # noqa: B023
        assert torch.allclose(*grads, rtol=1e-9, atol=1e-12) == apart


def test_several_sizes_are_averaged():
    x, y, labels = *branches(2, 5, 8, 6), choice([0, 1, 2, 255], 2, 8, 6)
    for positives in ("instance", "majority"):
        one = partial(fast, x, y, labels, num_classes=3, patch_positives=positives, pixel_weight=0.0)
        assert_exact(one((2, 3)), (one(2) + one(3)) / 2)
        assert not torch.isclose(one(2), one(3))


def test_patches_of_one_pixel_are_pixels():
    x, y, labels = *branches(2, 5, 8, 6), choice([0, 1, 2, 255], 2, 8, 6)
    options = {"num_classes": 3, "samples_per_class": None, "patch_positives": "majority"}
    patches, pixels = (fast(x, y, labels, 1, **options, **{f"{other}_weight": 0.0}) for other in ("pixel", "patch"))
    assert pixels > 0
    assert_exact(patches, pixels)


def test_majority_of_several_is_the_lowest():
    """Patches (1, 2), (2, 2), (1, 1): the first is of the third's class, and of the second's with labels swapped."""
    x, y = branches(1, 4, 1, 6)
    options = {"num_classes": 4, "patch_positives": "majority", "pixel_weight": 0.0}
    value, same, swapped = (
        fast(x, y, torch.tensor([[labels]]), 2, **options)
        for labels in ([1, 2, 2, 2, 1, 1], [1, 1, 3, 3, 1, 1], [2, 1, 1, 1, 2, 2])
    )
    assert_exact(value, same)
    assert not torch.isclose(value, swapped)


@pytest.mark.parametrize("form", FORMS)
def test_what_an_ignored_pixel_holds_reaches_nothing(form):
    labels, (x, y) = choice([0, 1, 2, 255, 9], 2, 8, 6), branches(2, 5, 8, 6)
    labels[0, :4, :4] = 255  # whole patches as well
    ignored = (labels > 2)[:, None]
    loss = partial(both(labels, num_classes=3, **FORMS[form])[0])
    value, grads = value_and_grads(loss, x, y)
    poisoned, poisoned_grads = value_and_grads(loss, *(torch.where(ignored, math.nan, z) for z in (x, y)))
    assert value > 0 and torch.equal(value, poisoned)
    for grad, other in zip(grads, poisoned_grads, strict=True):
        assert torch.equal(grad, other) and not (grad * ignored).any()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_counted_is_zero_joined_to_the_graph(form):
    x, y = branches(1, 5, 2, 2)
    options = {**FORMS[form], "num_classes": 3, "patch_size": 2}
    for labels in (torch.full((1, 2, 2), 255), torch.full((1, 2, 2), 1)):  # everything ignored, one patch of one class
        value, grads = value_and_grads(lambda x, y: fast(x, y, labels, **options), x, y)  # noqa: B023
        assert value == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 4, 0, 6), (0, 3, 2, 2, 2)])
@pytest.mark.parametrize("positives", ["instance", "majority"])
def test_an_empty_map(shape, positives):
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    loss = fast(x, x.detach(), labels, (2, 4), num_classes=3, patch_positives=positives)
    loss.backward()
    assert loss == 0


def test_samples():
    """At most k pixels of each class in both branches together; the loss is that of those alone."""
    (x, y), labels, k = branches(2, 5, 12, 10), choice([0, 1, 2, 255], 2, 12, 10), 5
    options = {"num_classes": 3, "patch_weight": 0.0}
    value, grads = value_and_grads(lambda x, y: fast(x, y, labels, samples_per_class=k, **options), x, y)
    grad = torch.cat(grads)
    taken, twice = grad.abs().sum(1) > 0, torch.cat([labels, labels])
    assert [int((taken & (twice == c)).sum()) for c in range(3)] == [k] * 3 and not taken[twice == 255].any()
    kept = torch.where(taken, twice, -1)
    same = partial(reference.region_phpc_loss, labels=kept, region_size=None, hardness=0.0, background=None)
    expected, (expected_grad,) = value_and_grads(same, torch.cat([x, y]))
    assert_exact(value, expected)
    assert_exact(grad, expected_grad)
    whole = fast(x, y, labels, samples_per_class=1000, **options)
    assert_exact(whole, fast(x, y, labels, samples_per_class=None, **options))


# ------------------------------------------------------------------------------------------- precision and compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    labels, (x, y) = choice([0, 1, 2, 255], 2, 8, 6), branches(2, 5, 8, 6, dtype=dtype)
    for options in FORMS.values():
        loss = partial(fast, labels=labels, temperature=0.01, num_classes=3, **options)
        value, grads = value_and_grads(loss, 100 * x, 100 * y)
        assert value.dtype == torch.float32 and value.isfinite() and value > 0
        assert all(grad.dtype == dtype and grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compile_with_samples_without_a_graph_break(form):
    """Without samples in test_ops, where values are compared; random numbers of a compiled graph may differ."""
    labels, (x, y) = choice([0, 1, 2, 255], 2, 8, 6), branches(2, 5, 8, 6, dtype=torch.float32)
    loss = hpcloss.MultiscaleContrastLoss(num_classes=3, samples_per_class=4, **FORMS[form])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, grads = value_and_grads(lambda x, y: compiled(x, y, labels), x, y)
    assert value > 0 and all(grad.isfinite().all() and grad.any() for grad in grads)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("options", "message"), [
    ({"patch_size": 0}, "patch_size must be at least 1 on every axis, got 0"),
    ({"patch_size": ()}, r"patch_size must be an integer or a sequence of at least one, got \(\)"),
    ({"patch_positives": "class"}, "patch_positives must be one of 'instance', 'majority', got 'class'"),
    ({"patch_weight": -1.0}, "patch_weight must be a finite number of at least 0, got -1.0"),
    ({"pixel_weight": math.inf}, "pixel_weight must be a finite number of at least 0, got inf"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"num_classes": 300}, "num_classes must be at most 255 .*, got 300"),
    ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
])  # fmt: skip
def test_bad_hyper_parameters_raise(options, message):
    with pytest.raises(ValueError, match=message):
        hpcloss.MultiscaleContrastLoss(**options)
    with pytest.raises(ValueError, match=message):
        fast(*branches(2, 5, 8, 6), **options)


def test_bad_inputs_raise():
    (x, y), labels = branches(2, 5, 8, 6), integers(3, 2, 8, 6)
    with pytest.raises(ValueError, match=r"features2 must have shape \(2, 5, 8, 6\), as features1, got \(2, 5, 8, 5\)"):
        fast(x, y[..., :5])
    with pytest.raises(TypeError, match="features2 must be torch.float64, as features1, got torch.float32"):
        fast(x, y.float())
    with pytest.raises(ValueError, match=r"features must have shape \[B, D, \*S\]"):
        fast(x[..., 0, 0], y[..., 0, 0])
    with pytest.raises(ValueError, match="num_classes must be given with labels, got None"):
        fast(x, y, labels)
    with pytest.raises(ValueError, match="labels must be given with patch_positives='majority', got None"):
        fast(x, y, patch_positives="majority")
    with pytest.raises(ValueError, match=r"labels must have shape \[B, \*S\]"):
        fast(x, y, labels[:1], num_classes=3)
    with pytest.raises(TypeError, match="patch_size must be an integer or a sequence of integers, got 2.5"):
        fast(x, y, patch_size=2.5)
