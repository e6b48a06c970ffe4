"""Pairs that miners name, in hpcloss.compat.pml: few one by one, many as a matrix, whole or in pieces of anchors."""

import contextlib
import functools
import math

import pytest
import torch

from hpcloss.compat import named_pairs, pml
from tests.compat.test_compat import Largest, Subclass
from tests.tools.cases import assert_same, integers, rows, value_and_grads
from tests.tools.near_minimum import SPREADS, TEMPERATURES, Case, assert_near, labels, plain_by_label
from tests.tools.numerics import assert_exact

FORMS = {"few": (0, 50), "whole": (10**9, 10**6), "pieces": (10**9, 50)}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """How pairs are computed, whatever their number; 50 numbers of a matrix at once are two or three anchors."""
    few, chunk = FORMS[request.param]
    monkeypatch.setattr(named_pairs, "FEW", few)
    monkeypatch.setattr(named_pairs, "CHUNK", chunk)
    return request.param


# ------------------------------------------------------------------------------------------------- value and gradient

N, M, D = 13, 17, 5


def times(anchors, keys, count, number):
    """How often each pair is named."""
    found = torch.zeros(count, number, dtype=torch.float64)
    for anchor, key in zip(anchors.tolist(), keys.tolist()):
        found[anchor, key] += 1
    return found


def four(indices):
    return indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])


def dense(indices, x, keys, temperature, normalize):
    """Logits, and how often each pair is named as a positive and as a negative."""
    if normalize:
        x, keys = x / x.norm(dim=1, keepdim=True), keys / keys.norm(dim=1, keepdim=True)
    a, p, b, n = four(indices)
    return x @ keys.T / temperature, times(a, p, len(x), len(keys)), times(b, n, len(x), len(keys))


def dense_supcon(indices, x, keys, temperature, normalize=True):
    """Mean over the anchors with positives and a loss above 0."""
    logits, positive, negative = dense(indices, x, keys, temperature, normalize)
    positive, counted = positive > 0, positive + negative > 0
    some = positive.any(1)
    lse = logits[some].masked_fill(~counted[some], -torch.inf).logsumexp(1)
    losses = lse - (logits * positive).sum(1)[some] / positive.sum(1)[some]
    return losses[losses > 0].mean()


def dense_ntxent(indices, x, keys, temperature, normalize=True):
    logits, positive, negative = dense(indices, x, keys, temperature, normalize)
    shares = logits.exp() / (logits.exp() + (negative * logits.exp()).sum(1, keepdim=True))
    return -(positive * shares.log()).sum() / positive.sum()


LOSSES = {"SupConLoss": (pml.SupConLoss, dense_supcon), "NTXentLoss": (pml.NTXentLoss, dense_ntxent)}


def all_pairs(count, number, classes=3):
    same = (torch.arange(count) % classes)[:, None] == torch.arange(number) % classes
    return (*torch.where(same), *torch.where(~same))


def some_pairs(count, number):
    """Anchors 0 and 1 have no pair, 2 no positive and 3 no negative."""
    kind = integers(3, count, number)
    kind[:2], kind[2], kind[3] = 2, 1, 0
    return (*torch.where(kind == 0), *torch.where(kind == 1))


def repeated_pairs(count, number):
    """In no order, some of them up to three times."""
    found = []
    for seed, part in enumerate((some_pairs(count, number)[:2], some_pairs(count, number)[2:])):
        drawn = torch.cat([torch.arange(len(part[0])), integers(len(part[0]), len(part[0]), seed=seed)])
        found += [index[drawn[integers(len(drawn), len(drawn), seed=5)]] for index in part]
    return tuple(found)


def triplets(count, number):
    a, p, b, n = some_pairs(count, number)
    return tuple(torch.tensor([(i, j, k) for i, j in zip(a, p) for m, k in zip(b, n) if m == i]).T)


TUPLES = {"all": all_pairs, "some": some_pairs, "repeated": repeated_pairs, "triplets": triplets}


@pytest.mark.parametrize("kind", TUPLES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(form, name, kind):
    """Of rows, other keys and temperature, against each other and against themselves."""
    build, formula = LOSSES[name]
    t = torch.tensor(0.3, dtype=torch.float64)
    indices = TUPLES[kind](N, M)
    ours = lambda x, keys, t: build(t)(x, None, indices, keys)  # noqa: E731
    assert_same(ours, functools.partial(formula, indices), rows(N, D), rows(M, D, seed=1), t)
    itself = TUPLES[kind](N, N)
    ours = lambda x, t: build(t)(x, None, itself)  # noqa: E731
    assert_same(ours, lambda x, t: formula(itself, x, x, t), rows(N, D), t)


class SumReducer:
    """As the library's, known by its name."""

    def __call__(self, losses, embeddings, own_labels):
        self.losses, self.indices = losses["loss"]["losses"], losses["loss"]["indices"]
        return self.losses.sum()


@pytest.mark.parametrize("kind", TUPLES)
def test_losses_of_pairs_one_by_one(form, kind):
    """A reducer gets them in the order in which the positives are named."""
    indices, t = TUPLES[kind](N, M), torch.tensor(0.3, dtype=torch.float64)
    loss = pml.NTXentLoss(0.3, reducer=SumReducer())
    x, keys = rows(N, D), rows(M, D, seed=1)
    logits, _, negative = dense(indices, x, keys, 0.3, True)
    of_negatives = (negative * logits.exp()).sum(1)
    anchors, positives = indices[:2]
    own = logits[anchors, positives].exp()
    loss(x, None, indices, keys)
    assert_exact(loss.reducer.losses, -(own / (own + of_negatives[anchors])).log())
    assert all(torch.equal(*both) for both in zip(loss.reducer.indices, (anchors, positives), strict=True))
    ours = lambda x, keys, t: pml.NTXentLoss(t, reducer=SumReducer())(x, None, indices, keys)  # noqa: E731
    theirs = lambda x, keys, t: dense_ntxent(indices, x, keys, t) * len(anchors)  # noqa: E731
    assert_same(ours, theirs, x, keys, t)


@pytest.mark.parametrize("name", LOSSES)
def test_anchors_without_pairs(form, name):
    """No NaN on the way, and no gradient."""
    with torch.autograd.set_detect_anomaly(True):
        build = LOSSES[name][0]
        _, (grad, _) = value_and_grads(
            lambda x, keys: build(0.01)(x, None, some_pairs(N, M), keys), rows(N, D), rows(M, D, seed=1)
        )
    assert grad.isfinite().all() and (grad[:2] == 0).all() and (grad[4:] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_that_no_pair_names_has_no_part_in_the_value(form, name):
    keys, loss, indices = rows(M, D, seed=1), LOSSES[name][0](), some_pairs(N, M)
    a, p, b, n = indices
    indices = a[p > 0], p[p > 0], b[n > 0], n[n > 0]
    expected = loss(rows(N, D), None, indices, keys)
    keys[0] = torch.nan
    assert torch.equal(loss(rows(N, D), None, indices, keys), expected) and expected.isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_only_positives_or_only_negatives(form, name):
    anchors, keys, *_ = all_pairs(N, M)
    nothing = anchors[:0]
    for indices in ((anchors, keys, nothing, nothing), (nothing, nothing, anchors, keys), (nothing,) * 4):
        value, (grad,) = value_and_grads(lambda x, to=indices: LOSSES[name][0]()(x, None, to, rows(M, D)), rows(N, D))
        assert value == 0 and (grad == 0).all()


# ------------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_no_exponential_holds(form, name):
    """Products of rows up to 1e5, where float32 ends at e^88: what matters is their difference."""
    build, formula = LOSSES[name]
    x, keys, indices = (
        100 * rows(N, D, dtype=torch.float32),
        100 * rows(M, D, seed=1, dtype=torch.float32),
        some_pairs(N, M),
    )
    loss = build(0.1, distance=DotProductSimilarity(normalize_embeddings=False))
    value, grads = value_and_grads(lambda x, keys: loss(x, None, indices, keys), x, keys)
    logits, positive, negative = dense(indices, x.double(), keys.double(), 0.1, False)
    assert logits.abs().max() > 1e5
    if name == "SupConLoss":
        expected = dense_supcon(indices, x.double(), keys.double(), 0.1, False)
    else:
        others = (logits + negative.log()).logsumexp(1, keepdim=True)
        expected = (positive * torch.logaddexp(torch.zeros(()), others - logits)).sum() / positive.sum()
    assert abs(value - expected) < 1e-6 * expected
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads)


class DotProductSimilarity:
    """As much of the library's as is looked at."""

    p, power, is_inverted, collect_stats = 2, 1, True, False

    def __init__(self, normalize_embeddings):
        self.normalize_embeddings = normalize_embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(form, name, dtype):
    """Statistics in float32; gradients of the dtype of the embeddings, off by its rounding."""
    build, _ = LOSSES[name]
    x, keys, indices = rows(N, D, dtype=dtype), rows(M, D, seed=1, dtype=dtype), some_pairs(N, M)
    call = lambda x, keys: build(0.01)(x, None, indices, keys)  # noqa: E731
    value, grads = value_and_grads(call, x, keys)
    exact, exact_grads = value_and_grads(call, x.double(), keys.double())
    assert value.dtype == torch.float32 and abs(value - exact) < 2e-6 * exact
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - exact_grad).abs().max() < torch.finfo(dtype).eps * exact_grad.abs().max()


def pairs_by_label(classes):
    y = labels(classes)
    itself = torch.eye(len(y), dtype=torch.bool)
    return (*torch.where((y[:, None] == y) & ~itself), *torch.where(y[:, None] != y))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("name", "classes"), [("SupConLoss", 64), ("SupConLoss", 16), ("NTXentLoss", 64)])
def test_near_the_minimum(name, classes, spread, temperature):
    """As the losses by labels; with one positive an anchor both classes are the same loss."""
    loss = lambda z, t: LOSSES[name][0](t)(z, None, pairs_by_label(classes))  # noqa: E731
    case = Case(loss, lambda z, t: plain_by_label(z, t, classes), classes)
    assert_near(case, SPREADS[spread], temperature)


def test_a_single_positive_near_the_minimum():
    """A loss of 1e-13 and its gradient, whose parts of the positive and of the negatives are equally small."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).requires_grad_()
    same = torch.tensor([0, 0, 1, 1])[:, None] == torch.tensor([0, 0, 1, 1])
    indices = (*torch.where(same & ~torch.eye(4, dtype=torch.bool)), *torch.where(~same))
    value = pml.SupConLoss(1 / 30, distance=DotProductSimilarity(normalize_embeddings=False))(x, None, indices)
    (grad,) = torch.autograd.grad(value, x)
    rest = 2 * math.exp(-30)  # of the two negatives, relative to the positive
    within = 30 * torch.finfo(torch.float32).eps  # relative: as exactly as float32 holds the exponent
    assert abs(value.item() - math.log1p(rest)) < within * rest
    # As anchor and as key each row is pulled to its positive and pushed from two negatives, by a mean over 4 anchors.
    slope = 2 * 30 / 4 * rest / (1 + rest)
    direction = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, -1.0]])
    assert (grad - slope * direction).abs().max() < within * slope


# -------------------------------------------------------------------------------------------------- what it costs


class Operators(Largest):
    """Names of the operators, and the largest tensor of numbers; masks are of bytes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype != torch.bool:
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize(("name", "count"), [("SupConLoss", 1024), ("NTXentLoss", 1024), ("SupConLoss", 1300)])
def test_memory_of_all_pairs(name, count):
    """No tensor of numbers exceeds what is in memory at once; rows of each pair would be 8 times as large."""
    indices = all_pairs(count, count, classes=64)
    x = rows(count, 8, dtype=torch.float32).requires_grad_()
    loss = LOSSES[name][0]()
    with Operators() as seen:
        loss(x, None, indices).backward()
    assert count**2 // 2 < seen.numel <= named_pairs.CHUNK == 1 << 20
    assert "mm" in seen.names


@pytest.mark.parametrize("name", LOSSES)
def test_few_pairs_make_no_matrix(name):
    x, indices = rows(200, 8).requires_grad_(), [index[::97] for index in all_pairs(200, 200)]
    assert named_pairs.FEW * (len(indices[0]) + len(indices[2])) < 200**2
    with Operators() as seen:
        LOSSES[name][0]()(x, None, indices).backward()
    assert "mm" not in seen.names and seen.numel < 200**2 // 2


@pytest.mark.parametrize("name", LOSSES)
def test_only_asked_gradients_are_computed(form, name, monkeypatch):
    asked = []

    def asking(rule, logits, first, second, slopes, moments):
        asked.append((slopes, moments))
        return rule(logits, first, second, slopes, moments)

    rules = {key: functools.partial(asking, rule) for key, rule in named_pairs.RULES.items()}
    monkeypatch.setattr(named_pairs, "RULES", rules)
    x, keys = rows(N, D).requires_grad_(), rows(M, D, seed=1)
    loss = LOSSES[name][0]()
    loss(x.detach(), None, some_pairs(N, M), keys)
    with torch.no_grad():
        loss(x, None, some_pairs(N, M), keys)
    assert set(asked) == ({(False, False)} if form != "few" else set())
    asked.clear()
    value = loss(x, None, some_pairs(N, M), keys)
    assert set(asked) == {"few": set(), "whole": {(True, False)}, "pieces": {(False, False)}}[form]
    pieces = len(asked)
    with Operators() as seen:
        value.backward()
    if form != "few":  # S again where it was in pieces, and the gradient of the rows, but none of the keys
        assert seen.names.count("mm") == {"whole": 1, "pieces": 2}[form] * pieces
        assert "addmm_" not in seen.names


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_raises(form, name):
    x = rows(N, D).requires_grad_()
    value = LOSSES[name][0]()(x, None, some_pairs(N, N))
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_the_graph_can_be_used_twice(form, name):
    x = rows(N, D).requires_grad_()
    value = LOSSES[name][0]()(x, None, some_pairs(N, N))
    first, second = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second) and (first != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_a_gpu(form, name, monkeypatch):
    """On the device without data whatever is read fails. It has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    x, indices = rows(N, D).to("meta").requires_grad_(), [index.to("meta") for index in some_pairs(N, N)]
    LOSSES[name][0]()(x, None, indices).backward()
    assert x.grad.shape == x.shape


# ------------------------------------------------------------------------------------- what else test_compat.py asks


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(form, name):
    found, loss = [], LOSSES[name][0]()
    for enabled in (False, True):
        x = rows(N, D, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(x, None, some_pairs(N, N))
            found.append((value, *torch.autograd.grad(value, x)))
    for plain, cast in zip(*found, strict=True):
        assert plain.dtype == cast.dtype == torch.float32 and torch.equal(plain, cast)


@pytest.mark.parametrize("name", LOSSES)
def test_subclasses_of_tensors(form, name):
    x, loss, indices = rows(N, D), LOSSES[name][0](), some_pairs(N, N)
    found = loss(x.as_subclass(Subclass), None, [index.as_subclass(Subclass) for index in indices])
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, loss(x, None, indices))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_compile(form, name):
    """One graph, the same numbers."""
    torch._dynamo.reset()
    x, keys, indices, loss = rows(N, D), rows(M, D, seed=1), some_pairs(N, M), LOSSES[name][0]()
    call = lambda x, keys: loss(x, None, indices, keys)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled, call, x, keys)
