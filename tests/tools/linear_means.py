"""The mean over positives of a linear term, on the kernels and by its dense form."""

import torch

from hpcloss import reference
from hpcloss.plan.partition import paired, partition
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, integers, rows, runs
from tests.tools.kernels import DEVICE
from tests.tools.numerics import assert_within_budget
from tests.tools.plans import Plan, allowed


def anywhere(n):
    """Each row with one positive anywhere, a symmetric relation; the last of an odd number is its own."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    partner = torch.arange(n)
    half = n // 2
    partner[order[:half]], partner[order[half : 2 * half]] = order[half : 2 * half], order[:half]
    return paired(partition(torch.zeros(n, dtype=torch.int64)), partner)


def runs_in_reverse(n):
    """Long intervals anywhere: class c has its positives in class -c; rows alike are not next to each other."""
    size = n // 6
    start = torch.tensor([5, 4, 3, 2, 1, 0]).repeat_interleave(size) * size
    start = torch.nn.functional.pad(start, (0, n - 6 * size), value=n).int()
    end = torch.where(start < n, start + size, start).int()
    pairs = partition(torch.zeros(n, dtype=torch.int64))
    return pairs.replace(pos_start=start, pos_end=end)


SIZED = {
    "mixed": lambda n: partition(
        choice([0, 1, 1, 1, 2, 3, 255], n), integers(4, n, seed=1), 3, background=0, ignore_index=(255,)
    ),
    "one class": lambda n: partition(torch.zeros(n, dtype=torch.int64)),
    "two classes": lambda n: partition((torch.arange(n) > 0.37 * n).long()),
    "singletons": lambda n: partition(torch.arange(n)),
    "twos": lambda n: partition(torch.arange(n) // 2),
    "around nine": lambda n: partition(runs(*[7, 8, 9, 10, 1] * (n // 35 + 1))[:n], background=2),
    "anywhere": anywhere,
    "reversed": runs_in_reverse,
}


def on_device(pairs):
    return pairs.to(DEVICE)


def linear(x, pairs, scale, upstream, backend="triton"):
    """out, mass, d rows, d scale of the primitive."""
    companion = x.to(DEVICE, torch.float32, copy=True).requires_grad_()
    scale = torch.tensor(scale, device=DEVICE, requires_grad=True)
    rows_of_x = Rows(x.to(DEVICE), companion, backend)
    out, mass = pair_mean(rows_of_x, on_device(pairs), "logit", Scale(scale))
    return out.detach(), mass, *torch.autograd.grad(out, (companion, scale), upstream.to(DEVICE, torch.float32))


def dense(x, pairs, scale, upstream, dtype):
    x = x.to(dtype).requires_grad_()
    mask = allowed(Plan(pairs, None), "positives")
    out, mass = reference.pair_mean(x, x, mask, scale, 0.0, None, "logit")
    (grad,) = torch.autograd.grad(out, x, upstream.to(dtype))
    return out.detach(), mass, grad


def check_linear(x, pairs, scale=3.0):
    upstream = rows(x.shape[0], seed=99).to(x.dtype)
    out, mass, grad, d_scale = linear(x, pairs, scale, upstream)
    exact, near = (dense(x, pairs, scale, upstream, dtype) for dtype in (torch.float64, torch.float32))
    assert out.dtype == mass.dtype == grad.dtype == torch.float32
    for actual, kind, plainly, expected in zip((out, mass, grad), ("loss", "lse", "grad"), near, exact, strict=True):
        assert_within_budget(actual, plainly, expected, kind)
    parts = upstream.double() * exact[0] / scale  # they may cancel
    assert abs(d_scale.double().item() - parts.sum().item()) <= 2e-6 * parts.abs().sum().item()
