"""Losses near their minimum: fp32 beside the same loss in plain PyTorch, both against float64.

    python -m tests.tools.near_minimum NT-Xent 'SupCon, 16 classes'      the table of hpcloss/DESIGN.md

The plain form is what a careful user writes: logits of all pairs, `log_softmax`, the mean over the positives. Its
gradient forms p - w per pair. A loss that subtracts two sums instead returns rounding errors where p is close to w.
The exact form is `-log p_ij = log(1 + sum of the others / e^{l_ij})` of each positive in float64, which never cancels.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss import functional

TEMPERATURES = (0.01, 0.02, 0.05, 0.1)
# How far rows lie from the centre of their class, and classes from each other.
SPREADS = {"random": 10.0, "0.3": 0.3, "0.03": 0.03, "0.001": 1e-3, "0": 0.0, "all one point": None}
ROWS, DIM = 128, 64
MAP = (2, 8, 8)  # batch and extents of a label map with as many pixels


class Case(NamedTuple):
    """loss(features, temperature, **options) and its plain form; features [ROWS, DIM] of `classes` classes."""

    loss: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    classes: int


def features(classes: int, spread: float | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of class i % classes; spread None: all classes in one point but for a little noise."""
    noise = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    if spread is None:
        return (centres(classes)[:1] + 1e-3 * noise).to(dtype)
    return (centres(classes)[torch.arange(ROWS) % classes] + spread * noise).to(dtype)


def centres(classes: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(classes, DIM, generator=torch.Generator().manual_seed(4)).to(device)


def labels(classes: int) -> Tensor:
    return torch.arange(ROWS) % classes


def as_map(z: Tensor) -> Tensor:
    """Rows as pixels of a feature map."""
    return z.view(*MAP, DIM).movedim(-1, 1)


def normalize(z: Tensor) -> Tensor:
    """Unit rows; of `Halved` features the rows as the kernels pack them, in fp16, with the gradient of a unit row."""
    if not isinstance(z, Halved):
        return torch.nn.functional.normalize(z)
    z = z.as_subclass(Tensor)
    order = torch.arange(len(z))
    given = [x.to(_device) for x in (z.detach().half(), order, torch.tensor([len(z)]))]
    data, _ = torch.ops.hpcloss.pack(*given, True, "triton")
    data, direction = data.to(z), z / z.detach().norm(dim=1, keepdim=True)
    tangent = direction - data * (data * direction).sum(1, keepdim=True)
    return data + tangent - tangent.detach()


class Halved(Tensor):
    """Features that come in half precision, whatever the plain form computes in."""


def cross_entropy(logits: Tensor, positives: Tensor, others: Tensor, hardness: float = 0.0) -> Tensor:
    """Mean over the rows of -sum_j w_ij log p_ij."""
    if _round_slopes:
        logits.register_hook(_rounded)
    weight = torch.softmax(torch.where(positives, -hardness * logits.detach(), -torch.inf), 1)
    if logits.dtype == torch.float64:
        anchor, key = positives.nonzero(as_tuple=True)
        rest = torch.where(others, logits, -torch.inf)[anchor].scatter(1, key[:, None], -torch.inf)
        terms = torch.logaddexp(torch.logsumexp(rest, 1) - logits[anchor, key], torch.zeros(()).double())
        return (weight[anchor, key] * terms).sum() / len(logits)
    log_p = torch.log_softmax(torch.where(others, logits, -torch.inf), 1)
    return -(weight * torch.where(positives, log_p, 0.0)).sum(1).mean()


def plain_by_label(z: Tensor, temperature: float, classes: int, regions: Tensor | None = None, hardness: float = 0.0):
    x, y = normalize(z), labels(classes)
    others = ~torch.eye(ROWS, dtype=torch.bool)
    if regions is not None:
        others &= regions[:, None] == regions
    return cross_entropy(x @ x.T / temperature, (y[:, None] == y) & others, others, hardness * temperature)


def plain_in(z: Tensor, temperature: float, classes: int) -> Tensor:
    x, y = normalize(z), labels(classes)
    others = ~torch.eye(ROWS, dtype=torch.bool)
    positives = (y[:, None] == y) & others
    logits = x @ x.T / temperature
    if _round_slopes:
        logits.register_hook(_rounded)
    if z.dtype == torch.float64:
        of_positives, of_negatives = (
            torch.logsumexp(torch.where(mask, logits, -torch.inf), 1) for mask in (positives, others & ~positives)
        )
        ratio = torch.logaddexp(of_negatives - of_positives, torch.zeros(()).double())
        return (positives.sum(1).log().double() + ratio).mean()
    log_p = torch.log_softmax(torch.where(others, logits, -torch.inf), 1)
    return (positives.sum(1).log() - torch.logsumexp(torch.where(positives, log_p, -torch.inf), 1)).mean()


def plain_against(z: Tensor, temperature: float, classes: int) -> Tensor:
    """The first half of the rows against the second half as keys."""
    x, y = normalize(z), labels(classes)
    half = ROWS // 2
    positives = y[:half, None] == y[half:]
    return cross_entropy(x[:half] @ x[half:].T / temperature, positives, torch.ones_like(positives))


def plain_infonce(z: Tensor, temperature: float, symmetric: bool = False) -> Tensor:
    query, key = normalize(z[: ROWS // 2]), normalize(z[ROWS // 2 :])
    logits, own = query @ key.T / temperature, torch.eye(ROWS // 2, dtype=torch.bool)
    loss = cross_entropy(logits, own, torch.ones_like(own))
    return (loss + cross_entropy(logits.T, own, torch.ones_like(own))) / 2 if symmetric else loss


def plain_assignment(z: Tensor, temperature: float) -> Tensor:
    """One prototype for each of 16 classes: every pixel is assigned to that of its class."""
    own = torch.arange(16) == labels(16)[:, None]
    directions = torch.nn.functional.normalize(centres(16).to(z.dtype))
    return cross_entropy(normalize(z) @ directions.T / temperature, own, torch.ones_like(own))


def _regions() -> Tensor:
    """Region of each pixel of `MAP` with cells of 8 x 8, pooled over the batch."""
    _, height, width = MAP
    cell = torch.arange(height)[:, None] // 8 * (width // 8) + torch.arange(width) // 8
    return cell.expand(MAP).reshape(-1)


HALF = ROWS // 2
CASES = {
    "InfoNCE": Case(
        lambda z, t, **k: functional.infonce_loss(z[:HALF], z[HALF:], temperature=t, **k), plain_infonce, HALF
    ),
    "InfoNCE, symmetric": Case(
        lambda z, t, **k: functional.infonce_loss(z[:HALF], z[HALF:], temperature=t, symmetric=True, **k),
        lambda z, t: plain_infonce(z, t, symmetric=True),
        HALF,
    ),
    "NT-Xent": Case(
        lambda z, t, **k: functional.ntxent_loss(z[:HALF], z[HALF:], t, **k),
        lambda z, t: plain_by_label(z, t, HALF),
        HALF,
    ),
    "SupCon, classes of 2": Case(
        lambda z, t, **k: functional.supcon_loss(z, labels(HALF), temperature=t, **k),
        lambda z, t: plain_by_label(z, t, HALF),
        HALF,
    ),
    "SupCon, 16 classes": Case(
        lambda z, t, **k: functional.supcon_loss(z, labels(16), temperature=t, **k),
        lambda z, t: plain_by_label(z, t, 16),
        16,
    ),
    "SupCon, inside the log": Case(
        lambda z, t, **k: functional.supcon_loss(z, labels(16), temperature=t, form="in", **k),
        lambda z, t: plain_in(z, t, 16),
        16,
    ),
    "SupCon, other keys": Case(
        lambda z, t, **k: functional.supcon_loss(
            z[:HALF], labels(16)[:HALF], z[HALF:], labels(16)[HALF:], temperature=t, **k
        ),
        lambda z, t: plain_against(z, t, 16),
        16,
    ),
    "RegionSupCon": Case(
        lambda z, t, **k: functional.region_supcon_loss(
            as_map(z), labels(4).view(MAP), 8, temperature=t, background=None, **k
        ),
        lambda z, t: plain_by_label(z, t, 4, _regions()),
        4,
    ),
    'PHPC, denominator="all"': Case(
        lambda z, t, **k: functional.region_phpc_loss(
            as_map(z), labels(4).view(MAP), 8, temperature=t, denominator="all", background=None, **k
        ),
        lambda z, t: plain_by_label(z, t, 4, _regions(), hardness=1.0),
        4,
    ),
    "prototype assignment": Case(
        lambda z, t, **k: functional.prototype_assignment_loss(
            as_map(z), labels(16).view(MAP), centres(16, z.device)[:, None], temperature=t, **k
        ),
        plain_assignment,
        16,
    ),
}


class Errors(NamedTuple):
    """Value and gradient norm in float64, and the errors of a plain fp32 computation and of ours."""

    value: float
    norm: float
    plain_value: float
    plain_gradient: float
    our_value: float
    our_gradient: float
    lowest: float  # our loss itself
    half_gradient: float  # the error of a plain computation whose gradient of the logits is rounded to fp16


def value_and_gradient(
    loss: Callable[..., Tensor], z: Tensor, loss_scale: float, *args, **options
) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of loss_scale times it, divided by loss_scale: as in mixed precision."""
    z = z.detach().requires_grad_()
    value = loss(z, *args, **options)
    (gradient,) = torch.autograd.grad(value * loss_scale, z)
    return value.detach().double(), gradient.as_subclass(Tensor).double() / loss_scale


def errors(
    case: Case, spread: float | None, temperature: float, dtype: torch.dtype = torch.float32, **options
) -> Errors:
    z = features(case.classes, spread, dtype)
    as_packed = z.as_subclass(Halved if dtype == torch.float16 else Tensor)
    exact, exact_gradient = value_and_gradient(case.plain, as_packed.double(), 1.0, temperature)
    plain, plain_gradient = value_and_gradient(case.plain, as_packed.float(), 1.0, temperature)
    with half_precision_slopes():
        _, half_gradient = value_and_gradient(case.plain, as_packed.double(), 1.0, temperature)
    # Entries near 1: features in fp16 would round a gradient of 1e-10 to 0.
    norm = exact_gradient.norm().item()
    loss_scale = 2.0 ** round(-math.log2(max(norm, plain_gradient.norm().item(), 2.0**-60)))
    ours, gradient = value_and_gradient(case.loss, z.to(_device), loss_scale, temperature, **options)
    ours, gradient = ours.cpu(), gradient.cpu()
    return Errors(
        exact.item(),
        norm,
        (plain - exact).abs().item(),
        (plain_gradient - exact_gradient).norm().item(),
        (ours - exact).abs().item(),
        (gradient - exact_gradient).norm().item(),
        ours.item(),
        (half_gradient - exact_gradient).norm().item(),
    )


def assert_near(case: Case, spread: float | None, temperature: float, dtype: torch.dtype = torch.float32, **options):
    """The bar: the gradient is off by at most 10 times the error of plain fp32, plus 1e-3 of its norm.

    In half precision also by twice what rounding the slopes to fp16 does to an otherwise exact gradient. Where classes
    are points plain fp32 may be exact by luck: logits of equal rows are equal. Rounded, they give slopes of eps / t
    along the row itself, of which the projection to the sphere leaves eps.
    """
    found = errors(case, spread, temperature, dtype, **options)
    assert found.lowest >= 0
    allowed = 10 * found.plain_gradient + 1e-3 * found.norm + torch.finfo(torch.float32).eps ** 2 / temperature
    if dtype == torch.float16:
        allowed += 2 * found.half_gradient
    assert found.our_gradient <= allowed, found
    assert found.our_value <= 10 * found.plain_value + 1e-6 * max(found.value, 1), found


@contextlib.contextmanager
def half_precision_slopes():
    """Gradients of logits are rounded to fp16 before their product with the rows, as a matrix unit takes them."""
    global _round_slopes
    _round_slopes = True
    try:
        yield
    finally:
        _round_slopes = False


_round_slopes = False
_device = torch.device("cpu")  # of our losses; the plain forms are on the CPU


def run_on(device: torch.device) -> None:
    global _device
    _device = device


def _rounded(slopes: Tensor) -> Tensor:
    """fp16 with the largest slope there can be near 8192, 1 / ROWS for each row."""
    lift = 8192.0 * ROWS / 2
    return (slopes * lift).half().to(slopes) / lift


def main() -> None:
    """Print the table for the losses named, by default all."""
    print("| loss | temperature | spread | value | error, plain fp32 | ours | gradient | error, plain fp32 | ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        for temperature in TEMPERATURES:
            for spread, distance in SPREADS.items():
                e = errors(CASES[name], distance, temperature)
                numbers = (e.value, e.plain_value, e.our_value, e.norm, e.plain_gradient, e.our_gradient)
                print(f"| {name} | {temperature} | {spread} | {' | '.join(f'{number:.1e}' for number in numbers)} |")


if __name__ == "__main__":
    main()
