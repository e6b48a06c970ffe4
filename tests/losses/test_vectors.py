"""Losses of vectors against the reference, in float64, and the queue of IHPC."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import hpcloss
from hpcloss.losses.image import UNFILLED
from hpcloss.memory import NO_GROUP
from tests.tools.cases import (
    LABELS,
    assert_same,
    choice,
    integers,
    rows,
    value_and_grads,
)
from tests.tools.losses import FAST, ORACLE, both
from tests.tools.numerics import assert_exact

phpc, ref_phpc = FAST["region_phpc"], ORACLE["region_phpc"]
IGNORED = (-100, -1, 255)


# --------------------------------------------------------------------------------------------- vector losses: oracle


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "class", "sum", "none"])
@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss(form, reduction, temperature, normalize):
    options = {"form": form, "reduction": reduction, "temperature": temperature, "normalize": normalize}
    for index, make in enumerate(LABELS.values()):
        labels, key_labels = make((17,), index), choice([0, 1, 5, -100], 23, seed=index)
        assert_same(*both("supcon", labels, **options), rows(17, 4, seed=index))
        fast = lambda x, k: FAST["supcon"](x, labels, k, key_labels, **options)  # noqa: E731, B023
        oracle = lambda x, k: ORACLE["supcon"](x, labels, k, key_labels, **options)  # noqa: E731, B023
        assert_same(fast, oracle, rows(17, 4), rows(23, 4, seed=1))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss_at_odd_sizes(form):
    for n in (0, 1, 2, 31, 257):
        assert_same(*both("supcon", integers(3, n), form=form), rows(n, 1 if n == 31 else 7))
        assert_same(
            *both("supcon", integers(3, n)[:, None].float().squeeze(1), form=form, reduction="class"), rows(n, 7)
        )
    for n, m in ((0, 5), (5, 0), (1, 1), (600, 5), (5, 700)):
        key_labels = choice([0, 1, -100], m, seed=1)
        fast = lambda x, k: FAST["supcon"](x, integers(3, len(x)), k, key_labels, form=form)  # noqa: E731, B023
        oracle = lambda x, k: ORACLE["supcon"](x, integers(3, len(x)), k, key_labels, form=form)  # noqa: E731, B023
        assert_same(fast, oracle, rows(n, 3), rows(m, 3, seed=1))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss_beyond_one_tile(form):
    labels = choice([0, 0, 0, 0, 1, 2, 3, 4, 5, -100], 1100)
    assert_same(*both("supcon", labels, form=form), rows(1100, 3))
    key_labels = choice([0, 0, 0, 1, 2, 7, -100], 1300)
    fast = lambda x, k, t: FAST["supcon"](x, labels, k, key_labels, t, form=form)  # noqa: E731
    oracle = lambda x, k, t: ORACLE["supcon"](x, labels, k, key_labels, t, form=form)  # noqa: E731
    assert_same(fast, oracle, rows(1100, 3), rows(1300, 3, seed=1), torch.tensor(0.2).double())


def test_255_is_a_class_of_vectors():
    labels = torch.tensor([3, 255, 255, 3, 3, 0])
    renamed = torch.where(labels == 255, 7, labels)
    assert_same(lambda x: FAST["supcon"](x, labels), lambda x: FAST["supcon"](x, renamed), rows(6, 4))


def test_supcon_labels_of_shape_n_1():
    labels = integers(3, 9)
    assert_same(lambda x: FAST["supcon"](x, labels[:, None]), lambda x: FAST["supcon"](x, labels), rows(9, 4))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_rows_of_ignored_labels_reach_nothing(form):
    labels, key_labels = choice([1, 2, -100], 20), choice([1, 2, -1], 30)
    x, k = rows(20, 4), rows(30, 4, seed=1)
    for rest in ((), (k, key_labels)):
        keep = labels != -100
        short = (rest[0][key_labels != -1], key_labels[key_labels != -1]) if rest else ()
        clean = FAST["supcon"](x[keep], labels[keep], *short, form=form)
        poisoned = [torch.where((labels == -100)[:, None], float("nan"), x)]
        if rest:
            poisoned.append(torch.where((key_labels == -1)[:, None], float("inf"), k))
        fast = lambda x, k=None: FAST["supcon"](x, labels, k, key_labels if k is not None else None, form=form)  # noqa: E731, B023
        value, grads = value_and_grads(fast, *poisoned)
        assert_exact(value, clean)
        assert all(grad.isfinite().all() for grad in grads) and (grads[0][~keep] == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 100.0])
def test_two_view_losses(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n in (0, 1, 2, 5, 31):
        views = rows(n, 3), rows(n, 3, seed=1)
        assert_same(*both("ntxent", **options), *views)
        groups = integers(max(n // 3, 1), n)
        for hardness in (0.0, 1.0, -20.0, 50.0):
            assert_same(*both("ihpc", **options, hardness=hardness), *views)
        assert_same(*both("ihpc", groups, **options), *views)
        assert_same(*both("ihpc", torch.zeros(n), **options), *views)
        for beta in (0.0, 0.1, 0.99):
            assert_same(*both("ihpc", groups, **options, beta=beta), *views)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 100.0])
def test_hard_negative_nce_loss(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n in (0, 1, 2, 5, 31):
        views = rows(n, 3), rows(n, 3, seed=1)
        for beta, tau_plus in ((0.0, 0.0), (0.0, 0.1), (1.0, 0.1), (0.5, 0.7), (2.0, 0.0)):
            assert_same(*both("hard_negative_nce", **options, beta=beta, tau_plus=tau_plus), *views)
        plain = partial(FAST["hard_negative_nce"], **options, beta=0.0, tau_plus=0.0)
        assert_same(plain, partial(FAST["ntxent"], **options), *views)


def test_hard_negative_nce_at_its_edges():
    """Finite at any temperature; where the discount leaves nothing, the lowest value holds."""
    a, b = rows(6, 4), rows(6, 4, seed=1)
    for temperature in (0.005, 0.05, 10.0):
        for x, y in ((a, b), (a, a), (a[:1].expand(6, 4), a[:1].expand(6, 4))):
            value, grads = value_and_grads(partial(FAST["hard_negative_nce"], temperature=temperature), x, y)
            assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    corners = torch.eye(6).double()  # l+ = 2, l- = 0: 10 - 0.9 * 10 e^2 < 0, so 10 e^-2 stands for the negatives
    lowest = math.log1p(10 * math.exp(-2) / math.exp(2))
    assert float(FAST["hard_negative_nce"](corners, corners, 0.5, tau_plus=0.9)) == pytest.approx(lowest)


@pytest.mark.parametrize("name", ["ntxent", "ihpc", "infonce", "hard_negative_nce"])
@pytest.mark.parametrize("n", [257, 513, 700])
def test_two_view_losses_beyond_one_tile(name, n):
    fast = lambda a, b, t: FAST[name](a, b, temperature=t)  # noqa: E731
    oracle = lambda a, b, t: ORACLE[name](a, b, temperature=t)  # noqa: E731
    assert_same(fast, oracle, rows(n, 3), rows(n, 3, seed=1), torch.tensor(0.3).double())


def test_ihpc_loss_with_large_groups():
    """All first views of a group come before its second views, so a row and its positive lie in different tiles."""
    groups = choice([0, 0, 0, 1, 2], 900)
    assert_same(*both("ihpc", groups), rows(900, 3), rows(900, 3, seed=1))


@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"hardness": 0.0, "reduction": "none"}, {"normalize": False}])
def test_ihpc_loss_with_a_bank(options):
    for n, m in ((4, 9), (1, 3), (1, 1), (3, 600)):
        a, b = rows(n, 5), rows(n, 5, seed=1)
        bank = F.normalize(rows(m, 5, seed=2), dim=1)
        groups, bank_groups = integers(3, n), integers(3, m, seed=1)
        assert_same(*both("ihpc", bank=bank, **options), a, b)
        assert_same(*both("ihpc", groups, bank=bank, bank_groups=bank_groups, **options), a, b)
        # Without groups the groups of the bank mean nothing.
        with_groups = partial(FAST["ihpc"], bank=bank, bank_groups=bank_groups, **options)
        assert_same(with_groups, partial(ORACLE["ihpc"], bank=bank, **options), a, b)


def test_ihpc_unfilled_rows_of_the_bank_do_not_exist():
    a, b, bank = rows(4, 5), rows(4, 5, seed=1), F.normalize(rows(9, 5, seed=2), dim=1)
    groups, bank_groups = integers(3, 4), integers(3, 9, seed=1)
    filled = torch.arange(9) % 3 != 1
    empty = torch.where(filled, bank_groups, UNFILLED)
    torn = torch.where(filled[:, None], bank, float("nan"))
    rest = {"bank": bank[filled], "bank_groups": bank_groups[filled]}
    for some in ({"groups": groups}, {}):
        assert_same(
            partial(FAST["ihpc"], bank=torn, bank_groups=empty, **some), partial(ORACLE["ihpc"], **rest, **some), a, b
        )
    nothing = torch.full((9,), UNFILLED)
    assert_same(lambda a, b: FAST["ihpc"](a, b, bank=bank, bank_groups=nothing), ORACLE["ihpc"], a, b)
    assert_same(lambda a, b: FAST["ihpc"](a, b, bank=bank, bank_groups=nothing), ORACLE["ihpc"], a[:1], b[:1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
def test_infonce_loss(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n, m in ((0, 3), (1, 1), (3, 0), (1, 40), (31, 7), (520, 530)):
        query, positive, negatives = rows(n, 3), rows(n, 3, seed=1), rows(m, 3, seed=2)
        assert_same(*both("infonce", **options), query, positive)
        assert_same(*both("infonce", symmetric=True, **options), query, positive)
        assert_same(*both("infonce", **options), query, positive, negatives)


@pytest.mark.parametrize("name", ["supcon", "ntxent", "ihpc", "infonce"])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
def test_gradient_of_the_temperature_of_vector_losses(name, temperature):
    x, y, t = rows(12, 4), rows(12, 4, seed=1), torch.tensor(temperature).double()
    if name == "supcon":
        labels = choice([0, 1, 2, 255], 12)
        for form in ("out", "in"):
            for normalize in (True, False):
                options = {"form": form, "normalize": normalize}
                assert_same(lambda x, t: FAST[name](x, labels, temperature=t, **options),  # noqa: B023
                            lambda x, t: ORACLE[name](x, labels, temperature=t, **options), x, t)  # noqa: B023 # fmt: skip
        return
    fast = lambda *x: FAST[name](*x[:-1], temperature=x[-1])  # noqa: E731
    oracle = lambda *x: ORACLE[name](*x[:-1], temperature=x[-1])  # noqa: E731
    assert_same(fast, oracle, x, y, t)
    _, grads = value_and_grads(fast, x, y, t.reshape(1))
    assert grads[2].shape == (1,)
    if name == "infonce":
        assert_same(lambda q, k, n, t: FAST[name](q, k, n, t), lambda q, k, n, t: ORACLE[name](q, k, n, t),
                    x, y, rows(9, 4, seed=2), t)  # fmt: skip
    if name == "ihpc":
        for options in ({"beta": 0.2}, {"groups": integers(3, 12)}, {"bank": F.normalize(rows(9, 4, seed=2), dim=1)}):
            assert_same(lambda a, b, t: FAST[name](a, b, temperature=t, **options),  # noqa: B023
                        lambda a, b, t: ORACLE[name](a, b, temperature=t, **options), x, y, t)  # noqa: B023 # fmt: skip


# ----------------------------------------------------------------------------------------------------- queue of IHPC


def ihpc_queue(size, **options):
    return hpcloss.EmbeddingQueue(1, size, 4, **options)


def oldest_first(queue):
    """The slots of a full queue of one class, the oldest first."""
    return queue.embeddings[0][(torch.arange(queue.size) + int(queue.next)) % queue.size]


def test_queue_of_ihpc_wraps_around_and_holds_the_newest():
    loss, queue, seen = hpcloss.IHPCLoss(0.5), ihpc_queue(7), []
    for step in range(5):
        a, b = rows(3, 4, seed=2 * step), rows(3, 4, seed=2 * step + 1)
        value, grads = value_and_grads(partial(loss, queue=queue), a, b)
        bank = torch.cat(seen).float().double()[-7:] if seen else None
        expected, expected_grads = value_and_grads(partial(ORACLE["ihpc"], bank=bank), a, b)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)
        queue.enqueue(b)
        seen.append(F.normalize(b, dim=1))
    torch.testing.assert_close(oldest_first(queue), torch.cat(seen)[-7:].float())
    assert int(queue.next) == 15 % 7 and not queue.embeddings.requires_grad


def test_queue_of_ihpc_smaller_than_the_batch():
    queue = ihpc_queue(2)
    for step in range(2):
        b = rows(5, 4, seed=step)
        queue.enqueue(b)
        torch.testing.assert_close(oldest_first(queue), F.normalize(b, dim=1)[-2:].float())


def test_queue_of_ihpc_with_groups():
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b, groups = rows(3, 4), rows(3, 4, seed=1), torch.tensor([5, 6, 5])
    queue.enqueue(b, groups=groups)
    assert queue.groups[0, :3].tolist() == [5, 6, 5] and (queue.groups[0, 3:] == NO_GROUP).all()
    bank = F.normalize(b, dim=1).float().double()
    for later in (torch.tensor([5, 7, 6]), torch.tensor([5, 5, 5])):
        expected = ORACLE["ihpc"](a.flip(0), b, later, bank=bank, bank_groups=groups)
        torch.testing.assert_close(loss(a.flip(0), b, later, queue), expected, rtol=1e-6, atol=0)


def test_groups_in_a_queue_go_with_their_embeddings():
    """Over a wrap, rows that are skipped and rows that are too many."""
    queue = ihpc_queue(4, groups=True)
    broken = rows(3, 4)
    broken[1] = math.nan
    queue.enqueue(broken, groups=torch.tensor([1, 2, 3]))
    queue.enqueue(rows(3, 4, seed=1), groups=torch.tensor([4, 5, 6]))
    assert queue.groups[0].tolist() == [6, 3, 4, 5] and int(queue.filled) == 4
    queue.enqueue(rows(1, 4, seed=2))
    assert queue.groups[0].tolist() == [6, NO_GROUP, 4, 5]
    queue.enqueue(rows(6, 4, seed=3), groups=torch.arange(6))
    assert sorted(queue.groups[0].tolist()) == [2, 3, 4, 5]


def test_queue_without_groups_never_matches_a_group():
    """Rows enqueued without groups belong to no group, whatever numbers are given later."""
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b = rows(3, 4), rows(3, 4, seed=1)
    queue.enqueue(b)
    bank = F.normalize(b, dim=1).float().double()
    groups = torch.tensor([0, 1, 1])
    expected = ORACLE["ihpc"](a, b, groups, bank=bank)
    torch.testing.assert_close(loss(a, b, groups, queue), expected, rtol=1e-6, atol=0)


def test_queue_keeps_groups_of_any_number():
    """A group id, also a negative one, that stands in the queue is a group like any other."""
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b, groups = rows(3, 4), rows(3, 4, seed=1), torch.tensor([-100, -2, 255])
    queue.enqueue(b, groups=groups)
    bank = F.normalize(b, dim=1).float().double()
    expected = ORACLE["ihpc"](b, a, groups, bank=bank, bank_groups=groups)
    torch.testing.assert_close(loss(b, a, groups, queue), expected, rtol=1e-6, atol=0)


def test_queue_of_ihpc_is_read_and_never_written():
    loss, queue = hpcloss.IHPCLoss(), ihpc_queue(6, groups=True)
    a, b = rows(4, 4, dtype=torch.float32), rows(4, 4, seed=1, dtype=torch.float32)
    queue.enqueue(a, groups=torch.arange(4))
    frozen = copy.deepcopy(queue.state_dict())
    assert set(frozen) == {"embeddings", "filled", "next", "groups"} and not loss.state_dict()
    value = loss(a, b, torch.arange(4), queue)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in queue.state_dict().items())
    other = ihpc_queue(6, groups=True)
    other.load_state_dict(frozen)
    assert torch.equal(loss(a, b, torch.arange(4), other), value)
    assert not torch.equal(loss(a, b, torch.arange(4), ihpc_queue(6, groups=True)), value)


def test_backward_of_ihpc_after_the_queue_has_moved_on():
    loss, queue = hpcloss.IHPCLoss(), ihpc_queue(6)
    a, b = rows(4, 4).requires_grad_(), rows(4, 4, seed=1).requires_grad_()
    queue.enqueue(rows(6, 4, seed=2))
    expected = torch.autograd.grad(loss(a, b, queue=queue), (a, b))
    value = loss(a, b, queue=queue)
    queue.enqueue(b)
    for grad, right in zip(torch.autograd.grad(value, (a, b)), expected, strict=True):
        assert torch.equal(grad, right)


def test_queues_that_do_not_suit_ihpc():
    loss, a, groups = hpcloss.IHPCLoss(), rows(3, 4), torch.arange(3)
    with pytest.raises(TypeError, match="queue must be an EmbeddingQueue, got Tensor"):
        loss(a, a, None, a)
    with pytest.raises(ValueError, match="queue must have one class, got num_classes=3"):
        loss(a, a, queue=hpcloss.EmbeddingQueue(3, 5, 4))
    with pytest.raises(
        ValueError, match=r"queue must keep groups where groups are given: use EmbeddingQueue\(..., groups=True\)"
    ):
        loss(a, a, groups, ihpc_queue(5))
    with pytest.raises(ValueError, match="bank must have shape .*4.*got .*5, 6"):
        loss(a, a, queue=hpcloss.EmbeddingQueue(1, 5, 6))
    with pytest.raises(ValueError, match=r"groups must be None .*: use EmbeddingQueue\(..., groups=True\)"):
        ihpc_queue(5).enqueue(a, groups=groups)
    with pytest.raises(ValueError, match=r"groups must come with embeddings \[N, D\], got embeddings \(3, 4, 2\)"):
        ihpc_queue(5, groups=True).enqueue(rows(3, 4, 2), groups=groups)
    with pytest.raises(ValueError, match=r"features must have shape \[B, D, \*S\], got \(4,\)"):
        ihpc_queue(5).enqueue(rows(4))
    assert "groups=True" in repr(ihpc_queue(5, groups=True)) and "groups" not in repr(ihpc_queue(5))
    with pytest.raises(ValueError, match="labels must be given to a queue of 3 classes, got None"):
        hpcloss.EmbeddingQueue(3, 5, 4).enqueue(a)
    with pytest.raises(TypeError, match="groups must be True or False, got 1"):
        hpcloss.EmbeddingQueue(3, 5, 4, groups=1)


def test_a_checkpoint_with_a_memory_bank_loads_and_says_what_became_of_it():
    old = {"bank": torch.zeros(6, 4), "bank_groups": torch.zeros(6).long(), "bank_next": torch.tensor(2)}
    model = torch.nn.ModuleDict({"loss": hpcloss.IHPCLoss()})
    with pytest.warns(
        UserWarning, match="IHPCLoss ignores loss.bank, loss.bank_groups, loss.bank_next of the checkpoint"
    ):
        model.load_state_dict({f"loss.{name}": value for name, value in old.items()})
    with pytest.raises(RuntimeError, match="Unexpected key.*bank_of_another"):
        hpcloss.IHPCLoss().load_state_dict({"bank_of_another": torch.zeros(1)})
