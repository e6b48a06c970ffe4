"""Every loss in lower precision, twice, without gradients; and what they raise."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tools.cases import (
    choice,
    integers,
    rows,
    value_and_grads,
)
from tests.tools.losses import FAST, ORACLE, both
from tests.tools.numerics import assert_within_budget

phpc, ref_phpc = FAST["region_phpc"], ORACLE["region_phpc"]
IGNORED = (-100, -1, 255)


# --------------------------------------------------------------------------------------------------------- precision


def calls(dtype):
    """One call of each loss with inputs in `dtype`: (fast, oracle, inputs)."""
    labels = choice([0, 1, 2, 255], 2, 16, 12)
    vector_labels = integers(4, 40)
    x = rows(2, 16, 16, 12, dtype=dtype)
    a, b, c = rows(40, 16, dtype=dtype), rows(40, 16, seed=1, dtype=dtype), rows(30, 16, seed=2, dtype=dtype)
    return {
        "region_phpc": (*both("region_phpc", labels, 8), (x,)),
        "region_phpc, two granularities": (
            *both("region_phpc", labels, 8, 0.07, local_size=4, detach_weights=False, reduction="class"),
            (x,),
        ),
        "region_phpc, published": (*both("region_phpc", labels, None, 0.1, 0.0, discount=0.1), (x,)),
        "region_phpc, cold": (*both("region_phpc", labels, None, 0.01), (x,)),
        "region_phpc, raw": (
            *both("region_phpc", labels, None, 1.0, 0.1, normalize=False, denominator="negatives"),
            (x,),
        ),
        "region_supcon": (*both("region_supcon", labels), (x,)),
        "supcon": (*both("supcon", vector_labels), (a,)),
        "supcon, in": (*both("supcon", vector_labels, form="in", temperature=0.01), (a,)),
        "ntxent": (*both("ntxent"), (a, b)),
        "ihpc": (*both("ihpc", integers(9, 40)), (a, b)),
        "infonce": (*both("infonce"), (a, b)),
        "infonce, negatives": (*both("infonce"), (a, b, c)),
        "entropy_guided_contrast": (
            *both("entropy_guided_contrast", torch.softmax(2 * rows(2, 4, 16, 12, seed=5), 1), labels),
            (x,),
        ),
        "multiscale_contrast": (*both("multiscale_contrast", None, (2, 5)), (x, x.flip(0).roll(1, 3))),
        "local_contrast": (
            lambda x: FAST["local_contrast"](x, labels, torch.tensor([1, 0]), num_classes=3, samples_per_class=None),
            lambda x: ORACLE["local_contrast"](x, labels, torch.tensor([1, 0]), num_classes=3),
            (x,),
        ),
        "prototype_contrast": (
            *both("prototype_contrast", vector_labels, torch.softmax(2 * b[:, :3].float(), 1)),
            (a,),
        ),
        "prototype_assignment": (*both("prototype_assignment", labels, rows(3, 2, 16, seed=3)), (x,)),
    }


CASES = list(calls(torch.float64))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_within_budget(case, dtype):
    """Half-precision rows are computed in fp32: the result is as good as that of the promoted inputs."""
    fast, oracle, inputs = calls(dtype)[case]
    exact, exact_grads = value_and_grads(oracle, *(x.double() for x in inputs))
    eager, eager_grads = value_and_grads(oracle, *(x.float() for x in inputs))
    value, grads = value_and_grads(fast, *inputs)
    assert value.dtype == torch.float32
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    for grad, eager_grad, exact_grad, x in zip(grads, eager_grads, exact_grads, inputs, strict=True):
        assert grad.dtype == dtype and grad.stride() == x.stride()
        assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case):
    fast, _, inputs = calls(torch.float32)[case]
    plain, plain_grads = value_and_grads(fast, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = value_and_grads(fast, *inputs)
    assert value.dtype == torch.float32 and torch.equal(value, plain)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, plain_grads, strict=True))


def test_result_dtype():
    labels = integers(3, 2, 7, 6)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):  # fmt: skip
        features = rows(2, 5, 7, 6, dtype=dtype)
        for reduction in ("mean", "class", "region", "sum", "none"):
            assert phpc(features, labels, 4, reduction=reduction).dtype == expected
        assert FAST["ntxent"](features[:, 0, 0], features[:, 0, 1]).dtype == expected


@pytest.mark.parametrize("case", CASES)
def test_differentiating_twice_raises(case):
    fast, _, inputs = calls(torch.float64)[case]
    inputs = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(fast(*inputs), inputs, create_graph=True)
    assert all(grad.requires_grad for grad in grads)  # a gradient penalty must not pass for a constant
    penalty = sum(grad.square().sum() for grad in grads)
    for inputs_of_it in (None, inputs):  # also where only some inputs are asked for, and not what an operator made
        with pytest.raises(RuntimeError, match="only once"):
            torch.autograd.backward(penalty, retain_graph=True, inputs=inputs_of_it)


@pytest.mark.parametrize("case", CASES)
def test_results_are_deterministic_to_the_bit(case):
    fast, _, inputs = calls(torch.float32)[case]
    first, second = value_and_grads(fast, *inputs), value_and_grads(fast, *inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_gradient_wanted():
    labels, features = integers(3, 2, 7, 6), rows(2, 5, 7, 6)
    loss = phpc(features, labels, 4)
    assert not loss.requires_grad
    with torch.no_grad():
        assert torch.equal(phpc(features.requires_grad_(), labels, 4), loss)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    phpc(features.detach(), labels, 4, temperature).backward()
    assert temperature.grad.abs() > 0
    keys, key_labels = rows(9, 4, seed=1).requires_grad_(), integers(3, 9)
    FAST["supcon"](rows(8, 4), integers(3, 8), keys, key_labels).backward()
    assert keys.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ errors


def bad(message, error=ValueError):
    return pytest.raises(error, match=message)


def test_errors_of_the_region_loss():
    x, y = rows(2, 5, 7, 6), integers(3, 2, 7, 6)
    with bad(r"features must have shape \[B, D, \*S\], got \(2, 5\).*SupConLoss"):
        phpc(x[:, :, 0, 0], y)
    with bad("features must be floating point, got torch.int64", TypeError):
        phpc(x.long(), y)
    with bad(r"one-hot.*argmax"):
        phpc(x, F.one_hot(y, 3).movedim(-1, 1))
    with bad("features must be a tensor, got a tuple; FeatureTap", TypeError):
        phpc((x, x), y)
    with bad("features must be a tensor, got ndarray", TypeError):
        phpc(x.numpy(), y)
    with bad(r"features must have at least one channel, got \(2, 0, 7, 6\)"):
        phpc(x[:, :0], y)
    with bad(
        r"got \(5, 7, 6\) with labels \(7, 6\), which have no batch axis; pass features\[None\] and labels\[None\]"
    ):
        phpc(x[0], y[0])
    with bad("temperature must be a number, got '0.1'", TypeError):
        phpc(x, y, 4, "0.1")
    with bad("hardness must be a number, got None", TypeError):
        phpc(x, y, 4, 0.1, None)
    for background in ([1], (1,)):
        with bad(r"background must be one label or None, got [\[(]1", TypeError):
            phpc(x, y, background=background)
    assert torch.equal(phpc(x, y, np.array([4, 3])), phpc(x, y, (4, 3)))
    assert torch.equal(phpc(x, y, np.int64(4)), phpc(x, y, 4))
    views, of_views = rows(2, 3, 8, 4, 4), integers(3, 2, 3, 4, 4)
    with bad(r"\(2, 3, 8, 4, 4\) with labels \(2, 3, 4, 4\), which look like views.*labels\[:, None\] for a volume"):
        phpc(views, of_views)
    assert phpc(views, of_views[:, None]) > 0 and phpc(views.flatten(0, 1), of_views.flatten(0, 1)) > 0
    with bad(r"labels must have shape \[B, \*S\]"):
        phpc(x, y[0])
    with bad(r"labels must have shape \[B, \*S\]"):
        phpc(x, y[:1])
    with bad("labels must be whole numbers, got 0.5"):
        phpc(x, torch.full((2, 7, 6), 0.5))
    with bad("labels must be integers", TypeError):
        phpc(x, y.to(torch.complex64))
    with bad("region_size must have one value per spatial axis"):
        phpc(x, y, (2, 2, 2))
    with bad(r"labels must be in \[0, 2\).*got 2"):
        phpc(x, y, num_classes=2, check_labels=True)
    with bad("num_classes must be given with check_labels=True, got None"):
        phpc(x, y, check_labels=True)
    with bad("triton", NotImplementedError):
        phpc(x, y, backend="triton")
    with bad("backend must be one of.*'cuda'"):
        phpc(x, y, backend="cuda")
    assert phpc(x, choice([0, 1, 255], 2, 7, 6), num_classes=2, check_labels=True) > 0
    assert torch.equal(phpc(x, y, backend="blockwise"), phpc(x, y))


def test_errors_of_the_vector_losses():
    x, y = rows(6, 4), integers(3, 6)
    supcon, ntxent, infonce, ihpc = (FAST[name] for name in ("supcon", "ntxent", "infonce", "ihpc"))
    with bad(r"embeddings must have shape \[N, D\], got \(1, 6, 4\)"):
        supcon(x[None], y)
    with bad(r"embeddings must have shape \[N, D\], got \(6, 0\)"):
        supcon(x[:, :0], y)
    with bad("embeddings must be floating point", TypeError):
        supcon(x.long(), y)
    with bad(r"labels must have shape \[6\], got \(5,\)"):
        supcon(x, y[:5])
    with bad("keys and key_labels must be given together, got one of them"):
        supcon(x, y, x)
    with bad(r"keys must have shape \[M, 4\], got \(6, 3\)"):
        supcon(x, y, x[:, :3], y)
    with bad(r"key_labels must have shape \[6\]"):
        supcon(x, y, x, y[:2])
    with bad(r"view2 must have shape \[6, 4\], got \(5, 4\)"):
        ntxent(x, x[:5])
    with bad(r"view1 must have shape \[N, D\]"):
        ihpc(x[0], x[0])
    with bad(r"groups must have shape \[6\]"):
        ihpc(x, x, y[:3])
    with bad(r"bank must have shape \[M, 4\]"):
        ihpc(x, x, bank=x[:, :2])
    with bad(r"positive must have shape \[6, 4\]"):
        infonce(x, x[:3])
    with bad("symmetric must be False where negatives are given, got True"):
        infonce(x, x, x, symmetric=True)
    with bad(r"negatives must have shape \[M, 4\]"):
        infonce(x, x, x[:, :3])
    with bad("triton", NotImplementedError):
        ntxent(x, x, backend="triton")
