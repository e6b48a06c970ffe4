"""What tf32 costs: errors of values and gradients, of the kernels beside eager PyTorch, emulated on the CPU.

    python -m tests.tools.tf32            the table of hpcloss/DESIGN.md

Operands of matrix products are rounded as each form rounds them; all else is float64, so that what is seen is the
operands alone. A matrix unit cuts the low 13 bits of fp32 off. PyTorch rounds to the nearest before (cuBLAS, as
triton-lang/triton#4574 found for an A100). tests/compiled/test_ptx.py compares the kernels' products with PTX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIM, CLASSES, REGIONS = 128, 16, 4
SPREADS = {"random": 10.0, "clustered": 0.3}  # how far rows lie from the centre of their class


def cut(x: Tensor) -> Tensor:
    """As a matrix unit reads fp32: tf32, without the low 13 bits."""
    return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def rounded(x: Tensor) -> Tensor:
    """The nearest tf32, as `cvt.rna.tf32.f32`; it has the bits of an fp32 that `cut` leaves alone."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def half(x: Tensor) -> Tensor:
    """fp16 after a lift to its range, by a power of two, as of slopes and of scaled losses."""
    lift = torch.exp2(torch.floor(torch.log2(8192 / x.abs().max())))
    return (x * lift).half().double() / lift


def single(x: Tensor) -> Tensor:
    return x.float().double()


def exactly(x: Tensor) -> Tensor:
    return x


class Form(NamedTuple):
    """How a form rounds: the rows it packs, operands of products that are rows, that are slopes, and the products."""

    rows: Callable[[Tensor], Tensor]
    operands: Callable[[Tensor], Tensor]
    slopes: Callable[[Tensor], Tensor]
    products: Callable[[Tensor], Tensor]
    fused: bool  # both directions of a pair are one slope


EXACT = Form(exactly, exactly, exactly, exactly, True)
KERNELS = "kernels, tf32"
FORMS = {
    "rows cut, not rounded": Form(single, cut, cut, exactly, True),  # before rows were rounded as they are packed
    KERNELS: Form(rounded, cut, cut, exactly, True),
    "eager, tf32": Form(single, rounded, rounded, exactly, False),
    "kernels, fp16": Form(lambda x: x.half().double(), exactly, half, exactly, True),
    "eager, fp16": Form(single, lambda x: x.half().double(), half, lambda x: x.half().double(), False),
}


class Unit(torch.autograd.Function):
    """Unit rows as they are packed; backward projects with them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        rows = form.rows(x / norm)
        ctx.save_for_backward(rows, norm)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, norm = ctx.saved_tensors
        return (grad - rows * (rows * grad).sum(1, keepdim=True)) / norm, None


class Similarities(torch.autograd.Function):
    """S = X Y^T, and the products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, form: Form) -> Tensor:
        ctx.save_for_backward(x, x if y is None else y)
        ctx.form, ctx.own = form, y is None
        return form.products(form.operands(x) @ form.operands(x if y is None else y).T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        form = ctx.form
        x, y = map(form.operands, ctx.saved_tensors)
        if ctx.own and form.fused:
            return form.slopes(grad + grad.T) @ x, None, None
        slopes = form.slopes(grad)
        return (slopes @ y + slopes.T @ x, None, None) if ctx.own else (slopes @ y, slopes.T @ x, None)


def supcon(s: Tensor, labels: Tensor, regions: Tensor, scale: float) -> Tensor:
    others = ~torch.eye(len(s), dtype=torch.bool)
    positives = (labels[:, None] == labels) & others
    lse = torch.where(others, scale * s, -torch.inf).logsumexp(1)
    return (lse - (positives * scale * s).sum(1) / positives.sum(1)).mean()


def region_phpc(s: Tensor, labels: Tensor, regions: Tensor, scale: float) -> Tensor:
    """With its default hardness, 1."""
    others = (regions[:, None] == regions) & ~torch.eye(len(s), dtype=torch.bool)
    positives = (labels[:, None] == labels) & others
    lse = torch.where(others & ~positives, scale * s, -torch.inf).logsumexp(1, keepdim=True)
    weight = torch.where(positives, -s.detach(), -torch.inf).softmax(1)
    return (weight * torch.nn.functional.softplus(lse - scale * s, threshold=700)).sum(1).mean()


def infonce(s: Tensor, labels: Tensor, regions: Tensor, scale: float) -> Tensor:
    rest = torch.where(torch.eye(len(s), dtype=torch.bool), -torch.inf, scale * s).logsumexp(1)
    return torch.nn.functional.softplus(rest - scale * s.diagonal(), threshold=700).mean()


LOSSES = {"SupCon": supcon, "region PHPC": region_phpc, "InfoNCE": infonce}


def inputs(name: str, n: int, spread: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features, of two views for InfoNCE, where each image is a class of its own; labels and regions."""
    generator = torch.Generator().manual_seed(5)
    labels, regions = torch.arange(n) % CLASSES, torch.arange(n) * REGIONS // n
    classes, views = (n, 2) if name == "InfoNCE" else (CLASSES, 1)
    centres = torch.randn(classes, DIM, generator=generator)
    noise = torch.randn(views, n, DIM, generator=generator)
    return list((centres[torch.arange(n) % classes] + spread * noise).double()), labels, regions


def evaluate(form: Form, name: str, n: int, spread: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Value, and the gradient of all features."""
    features, labels, regions = inputs(name, n, spread)
    leaves = [x.requires_grad_() for x in features]
    rows = [Unit.apply(x, form) for x in leaves]
    s = Similarities.apply(rows[0], rows[1] if len(rows) > 1 else None, form)
    value = LOSSES[name](s, labels, regions, 1 / temperature)
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


def main() -> None:
    print("| loss | rows | t | N | " + " | ".join(FORMS) + " |\n|" + "---|" * (4 + len(FORMS)))
    for name in LOSSES:
        for kind, spread in SPREADS.items():
            for temperature in (0.1, 0.05):
                for n in (512, 2048):
                    case = name, n, spread, temperature
                    exact = evaluate(EXACT, *case)
                    cells = []
                    for form in FORMS.values():
                        found = evaluate(form, *case)
                        cells.append(
                            " / ".join(f"{float((a - b).norm() / b.norm()):.1e}" for a, b in zip(found, exact))
                        )
                    print(f"| {name} | {kind} | {temperature} | {n} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
