"""Entropy-guided contrast: what is particular to it; test_modules, test_losses and test_reference hold the rest."""

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hpcloss
from tests.tools.cases import LABELS, MAPS, assert_same, choice, integers, rows, value_and_grads
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_exact

fast, oracle = FAST["entropy_guided_contrast"], ORACLE["entropy_guided_contrast"]
e, log = math.exp, math.log

FORMS = {
    "default": {},
    "share of ln C": {"threshold": 0.6},
    "all": {"denominator": "all"},
    "keys differentiated": {"detach_keys": False},
    "symmetric": {"symmetric": True},
    "symmetric, differentiated": {"symmetric": True, "detach_keys": False, "denominator": "all"},
    "entropy classes": {"entropy_classes": True},
    "entropy classes, differentiated": {"entropy_classes": True, "detach_keys": False},
    "inner products": {"normalize": False},
    "inner products, symmetric, differentiated": {"normalize": False, "symmetric": True, "detach_keys": False},
}


def probabilities(shape, classes=4, seed=5):
    return torch.softmax(2 * rows(shape[0], classes, *shape[2:], seed=seed), 1)


def high(probs, threshold="mean"):
    """Pixels of high entropy, no pixel ignored, written out."""
    entropy = -(probs * probs.log()).sum(1)
    if threshold == "mean":
        return torch.stack([image > image.mean() for image in entropy])
    return entropy > threshold * log(probs.shape[1])


def both(probs, labels=None, **options):
    return (lambda x, *t: fast(x, probs, labels, *t, **options)), (
        lambda x, *t: oracle(x, probs, labels, *t, **options)
    )


# -------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("labels", [None, *LABELS])
@pytest.mark.parametrize("shape", MAPS)
def test_equal_to_the_reference(shape, labels):
    shape = MAPS[shape]
    labels = None if labels is None else LABELS[labels]((shape[0], *shape[2:]), 0)
    for index, options in enumerate(FORMS.values()):
        reduction = ("mean", "class", "sum", "none")[index % 4]
        assert_same(*both(probabilities(shape), labels, reduction=reduction, **options), rows(*shape))


@pytest.mark.parametrize("reduction", ["mean", "class", "sum", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_the_reference_with_a_learnt_temperature(form, reduction):
    shape, temperature = (2, 5, 7, 6), torch.tensor(0.2).double()
    labels = choice([0, 1, 2, 3, 7, 255], 2, 1, 14, 12)  # of another resolution; 7 is no class
    loss = both(probabilities(shape), labels, reduction=reduction, ignore_index=(2, 255), **FORMS[form])
    assert_same(*loss, rows(*shape), temperature)


def test_beyond_one_tile():
    shape = (3, 3, 25, 20)
    for options in FORMS.values():
        assert_same(*both(probabilities(shape, 3), temperature=0.3, **options), rows(*shape))


def test_a_view_of_the_features():
    x, probs = rows(2, 7, 6, 5), probabilities((2, 5, 7, 6))
    assert_same(lambda x: fast(x.movedim(-1, 1), probs), lambda x: oracle(x.movedim(-1, 1), probs), x)


def test_gradcheck():
    probs, labels = probabilities((1, 2, 3, 4), 2), choice([0, 1, 1, 255], 1, 3, 4)
    leaves = rows(1, 2, 3, 4).requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    for options in ({"detach_keys": False, "symmetric": True}, {"detach_keys": False, "denominator": "all"},
                    {"detach_keys": False, "entropy_classes": True, "reduction": "none"}):  # fmt: skip
        assert both(probs, labels, **options)[0](*leaves).abs().sum() > 0
        assert torch.autograd.gradcheck(both(probs, labels, **options)[0], leaves)


def exact(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestByHand:
    """The five unit vectors of test_reference at τ = 1/2, so l = 2 s; x0, x1 of high entropy, x2, x3, x4 of low.

    l:      x1     x2     x3     x4
      x0    0      1.2    -2     0
      x1           1.6    0      -2
      x2                  -1.2   -1.6
      x3                         0
    """

    X = torch.stack([exact(1.0, 0.0, 0.6, -1.0, 0.0), exact(0.0, 1.0, 0.8, 0.0, -1.0)]).view(1, 2, 1, 5)
    CERTAINTY = exact(0.6, 0.4, 0.95, 0.05, 0.9)  # of class 0: classes are 0 1 0 1 0
    PROBS = torch.stack([CERTAINTY, 1 - CERTAINTY]).reshape(1, 2, 1, 5)
    OF_HIGH = [
        ((log(e(1.2) + e(-2)) - 1.2) + (log(e(0) + e(-2)) - 0)) / 2,  # P: x2, x4; N: x3
        log(e(0) + e(1.6) + e(-2)) - 0,  # P: x3; N: x2, x4
    ]
    OF_LOW = [log(e(1.2) + e(1.6)) - 1.2, log(e(0) + e(-2)) - 0, log(e(0) + e(-2)) - 0]

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_default(self, loss):
        expected = exact(*self.OF_HIGH, 0, 0, 0).view(1, 1, 5)
        assert_exact(loss(self.X, self.PROBS, None, 0.5, reduction="none"), expected)
        assert_exact(loss(self.X, self.PROBS, None, 0.5), expected.sum() / 2)

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_all(self, loss):
        expected = log(e(1.2) + e(0) + e(-2)) - 1.2 / 2 + log(e(0) + e(1.6) + e(-2)) - 0
        actual = loss(self.X, self.PROBS, None, 0.5, denominator="all", reduction="sum")
        assert_exact(actual, exact(expected).view(()))

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_symmetric(self, loss):
        expected = (sum(self.OF_HIGH) / 2 + sum(self.OF_LOW) / 3) / 2
        assert_exact(loss(self.X, self.PROBS, None, 0.5, symmetric=True), exact(expected).view(()))

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_entropy_classes(self, loss):
        """Only x2 and x4 share class and side."""
        of_2 = log(e(-1.6) + e(1.2) + e(1.6) + e(-1.2)) + 1.6
        of_4 = log(e(-1.6) + e(0) + e(-2) + e(0)) + 1.6
        actual = loss(self.X, self.PROBS, None, 0.5, entropy_classes=True, reduction="none")
        assert_exact(actual, exact(0, 0, of_2, 0, of_4).view(1, 1, 5))

    @pytest.mark.parametrize("loss", [fast, oracle])
    def test_share_of_the_largest_entropy(self, loss):
        """H of 0.9 is 0.469 ln 2, of 0.95 0.286 ln 2: at a share of 0.4 x4 is high as well, and x0 loses a positive."""
        of_0, of_1 = log(e(1.2) + e(-2)) - 1.2, log(e(0) + e(1.6)) - 0
        of_4 = log(e(-1.6) + e(0)) + 1.6  # P: x2; N: x3
        actual = loss(self.X, self.PROBS, None, 0.5, threshold=0.4, reduction="none")
        assert_exact(actual, exact(of_0, of_1, 0, 0, of_4).view(1, 1, 5))


# --------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("threshold", ["mean", 0.7])
def test_anchors_are_the_pixels_of_high_entropy(threshold):
    """Each image has its own mean: the second is more certain everywhere, and half of it is high all the same."""
    shape = (2, 5, 8, 6)
    logits = 2 * rows(2, 3, 8, 6, seed=5)
    logits[1] *= 4
    probs = torch.softmax(logits, 1)
    expected = high(probs, threshold)
    assert (expected[1].sum() > 8) == (threshold == "mean") and expected[0].any()
    loss = fast(rows(*shape), probs, threshold=threshold, reduction="none")
    assert torch.equal(loss > 0, expected)


def test_gradients_reach_anchors_alone_unless_keys_are_differentiated():
    shape = (2, 5, 8, 6)
    probs = probabilities(shape, 3)
    for detach in (True, False):
        _, (grad,) = value_and_grads(lambda x: fast(x, probs, detach_keys=detach), rows(*shape))  # noqa: B023
        length = grad.norm(dim=1)
        assert (length[high(probs)] > 0).all() and (length[~high(probs)] == 0).all() == detach


def test_probabilities_get_no_gradient():
    x, probs = rows(2, 5, 8, 6).requires_grad_(), probabilities((2, 5, 8, 6)).requires_grad_()
    loss = fast(x, probs)
    assert torch.autograd.grad(loss, probs, allow_unused=True) == (None,)


def test_the_most_probable_class_is_the_default_label():
    shape = (2, 5, 8, 6)
    probs = probabilities(shape)
    assert torch.equal(fast(rows(*shape), probs), fast(rows(*shape), probs, probs.argmax(1)))
    assert not torch.isclose(fast(rows(*shape), probs), fast(rows(*shape), probs, integers(4, 2, 8, 6)))


def test_pairs_reach_across_images():
    """The first image has high-entropy pixels of a class whose certain pixels are in the second."""
    logits = torch.tensor([[[0.2, 0.1, 0.0, 9.0], [0.0, 0.0, 0.1, 0.0]], [[0.0, 0.1, 9.0, 0.0], [0.1, 0.0, 0.0, 9.0]]])
    x, probs = rows(2, 3, 4), torch.softmax(logits.double(), 1)
    together, apart = (fast(y, p, threshold=0.9, reduction="none") for y, p in ((x, probs), (x[:1], probs[:1])))
    assert together[0, 0] > 0 and not apart.any()


def test_ignored_pixels_are_dropped():
    """Also from the mean entropy of their image, whatever their features and probabilities hold."""
    shape = (1, 4, 1, 40)
    x, probs, labels = rows(*shape), probabilities(shape), choice([0, 1, 2, 3, 255, 4], 1, 1, 40)
    kept = (labels < 4).flatten()
    short = [t[..., kept] for t in (x, probs, labels)]
    x[..., ~kept], probs[..., ~kept] = math.nan, math.nan
    for options in FORMS.values():
        value, (grad,) = value_and_grads(lambda x: fast(x, probs, labels, **options), x)  # noqa: B023
        expected, (expected_grad,) = value_and_grads(lambda x: fast(x, *short[1:], **options), short[0])  # noqa: B023
        assert_exact(value, expected)
        assert_exact(grad[..., kept], expected_grad)
        assert not grad[..., ~kept].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, -0.1])
@pytest.mark.parametrize("form", FORMS)
def test_probabilities_without_an_entropy_stay_visible(form, poison):
    """One pixel that takes part, or all of them: a comparison with NaN is False, so the pixel would count as certain
    and, by the mean, its whole image too."""
    shape = (2, 5, 8, 6)
    x, labels = rows(*shape), choice([0, 1, 2, 3, 255], 2, 8, 6)
    for here in (labels == 2, torch.ones_like(labels, dtype=torch.bool)):
        probs = torch.where(here[:, None] & (torch.arange(4) == 2)[:, None, None], poison, probabilities(shape))
        for known in (labels, None):
            for reduction in ("mean", "class", "sum", "none"):
                value = fast(x, probs, known, reduction=reduction, **FORMS[form])
                assert value.isnan().any() and value.isnan().all() == value.isnan().any()
    one = probabilities(shape)
    one[0, 1, 0, 0] = poison
    value, (grad,) = value_and_grads(lambda x: fast(x, one, **FORMS[form]), x)
    assert value.isnan() and grad.isnan().any()
    # Nobody knows its class without labels: it is not ignored, whatever the largest probability is.
    assert fast(x, one, ignore_index=1, **FORMS[form]).isnan()
    nobody = torch.full(shape, poison)[:, :4].double()
    assert fast(x, nobody, **FORMS[form]).isnan() and fast(x, nobody, torch.full((2, 8, 6), 255), **FORMS[form]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_nothing_counted_is_zero_joined_to_the_graph(form):
    """Everything ignored, one pixel of each class, one class alone, or all on one side of the threshold."""
    shape = (1, 3, 2, 2)
    probs, even = torch.eye(4).double().reshape(1, 4, 2, 2) * 0.8 + 0.05, torch.full((1, 4, 2, 2), 0.25).double()
    halves = torch.tensor([[[0, 0], [1, 1]]])
    for labels, p in ((torch.full((1, 2, 2), 255), probs), (None, probs), (0 * halves, even), (halves, even)):
        if labels is halves and "entropy classes" in form:
            continue  # one side of the threshold is all that it needs
        loss = partial(fast, probs=p, labels=labels, **{**FORMS[form], "denominator": "own"})
        value, (grad,) = value_and_grads(loss, rows(*shape))
        assert value == 0 and not grad.any()


def test_no_threshold_is_passed_at_one():
    x, probs = rows(2, 5, 8, 6), probabilities((2, 5, 8, 6))
    assert fast(x, probs, threshold=1.0) == 0 and fast(x, probs, threshold=0.0) == 0  # all low; all high, no keys
    assert fast(x, probs, threshold=0.5) > 0


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
def test_an_empty_map(shape):
    for options in ({}, {"samples_per_class": 3}, {"entropy_classes": True, "reduction": "none"}):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        loss = fast(x, torch.zeros((shape[0], 3, *shape[2:])), **options)
        loss.sum().backward()
        assert loss.sum() == 0


@pytest.mark.parametrize("options", [{"symmetric": True}, {"entropy_classes": True}])
def test_samples(options):
    """At most k pixels of each class and side take part; with a fixed threshold that is the loss of those alone."""
    shape, k = (2, 5, 12, 10), 4
    x, probs = rows(*shape), probabilities(shape, 3)
    options = {"threshold": 0.6, "reduction": "none", **options}
    assert_exact(fast(x, probs, samples_per_class=1000, **options), fast(x, probs, **options))
    value, (grad,) = value_and_grads(lambda x: fast(x, probs, samples_per_class=k, **options), x)
    taken, labels, side = value != 0, probs.argmax(1), high(probs, 0.6)
    for c in range(3):
        for one in (side, ~side):
            assert (taken & (labels == c) & one).sum() == min(k, int(((labels == c) & one).sum())) > 0
    kept = torch.where(taken, labels, -1)
    expected, (expected_grad,) = value_and_grads(lambda x: oracle(x, probs, kept, **options), x)
    assert_exact(value, expected)
    assert_exact(grad, expected_grad)
    assert not torch.equal(taken, fast(x, probs, samples_per_class=k, **options) != 0)  # drawn afresh


# ------------------------------------------------------------------------------------------- precision and compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    x, probs = rows(2, 5, 8, 6, dtype=dtype), probabilities((2, 5, 8, 6)).to(dtype)
    probs[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # 0 log 0 is 0
    for options in FORMS.values():
        value, (grad,) = value_and_grads(partial(fast, probs=probs, temperature=0.01, **options), x)
        assert value.dtype == torch.float32 and value.isfinite() and value > 0
        assert grad.dtype == dtype and grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("options", [*FORMS.values(), {"samples_per_class": 5, "reduction": "class"}])
def test_compile_without_a_graph_break(options):
    x, probs = rows(2, 5, 8, 6, dtype=torch.float32), probabilities((2, 5, 8, 6)).float()
    loss = hpcloss.EntropyGuidedContrastLoss(**options)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (value, (grad,)) = value_and_grads(lambda x: compiled(x, probs), x)
    expected, (expected_grad,) = value_and_grads(lambda x: loss(x, probs), x)
    if "samples_per_class" in options:  # random numbers of a compiled graph may differ
        assert value > 0 and grad.isfinite().all() and grad.any()
        return
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [*FORMS.values(), {"samples_per_class": 5, "reduction": "class"}])
def test_nothing_reads_device_data(options):
    """Fake tensors have shapes and no values: what asks for a value raises."""
    with FakeTensorMode() as mode:
        x = mode.from_tensor(rows(2, 5, 8, 6)).requires_grad_()
        loss = fast(x, mode.from_tensor(probabilities((2, 5, 8, 6))), **options)
        (grad,) = torch.autograd.grad(loss, x)
    assert grad.shape == x.shape


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": "median"}, "threshold must be one of 'mean', got 'median'"),
    ({"threshold": 1.5}, r"threshold must be 'mean' or a share of the largest entropy in \[0, 1\], got 1.5"),
    ({"threshold": float("nan")}, "threshold must be 'mean' or a share.*got nan"),
    ({"denominator": "negatives"}, "denominator must be one of 'own', 'all', got 'negatives'"),
    ({"symmetric": True, "entropy_classes": True}, "symmetric must be False with entropy_classes=True"),
    ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
    ({"reduction": "region"}, "reduction must be one of 'mean', 'class', 'sum', 'none', got 'region'"),
])  # fmt: skip
def test_bad_hyper_parameters_raise(options, message):
    with pytest.raises(ValueError, match=message):
        hpcloss.EntropyGuidedContrastLoss(**options)
    with pytest.raises(ValueError, match=message):
        fast(rows(2, 5, 8, 6), probabilities((2, 5, 8, 6)), **options)


def test_bad_inputs_raise():
    x, probs = rows(2, 5, 8, 6), probabilities((2, 5, 8, 6))
    with pytest.raises(TypeError, match="probs must be floating point, got torch.int64"):
        fast(x, probs.long())
    for wrong in (probs[:1], probs[..., :5], probs[:, :, 0], probs[:, :0]):
        with pytest.raises(ValueError, match=r"probs must have shape \[B, C, \*S\] for features \(2, 5, 8, 6\), got"):
            fast(x, wrong)
    with pytest.raises(ValueError, match=r"labels must have shape \[B, \*S\]"):
        fast(x, probs, integers(4, 3, 8, 6))
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        fast(x, probs, ignore_index="no")
    with pytest.raises(
        ValueError,
        match="num_classes must be at most 255 .*, got 300",
    ):
        fast(x, probabilities((2, 5, 8, 6), 300))
