"""The problems: a loss on leaves, what it should be in float64, and its work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpcloss
from benchmarks.gpu.machine import BACKEND, DEVICE, size
from hpcloss import reference
from hpcloss.plan.regions import Grid

HALF, SINGLE = torch.float16, torch.float32
D = size(128, 16)
MANY = size(65536, 64)


class Case(NamedTuple):
    """A loss on leaves, what it should be in float64, and its work."""

    loss: Callable[..., Tensor]  # loss(*leaves, reduction=..., backend=...)
    leaves: list[Tensor]
    exact: Callable[..., Tensor]  # exact(chosen, *float64 leaves): losses of the chosen anchors
    flops: float  # F
    labels: Tensor

    def step(self) -> Tensor:
        return self.loss(*self.leaves)


def spread(labels: Tensor, dim: int, seed: int = 0) -> Tensor:
    """Rows around the centres of their classes, so that similarities spread as in training."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator, device=DEVICE)
    return torch.randn(labels.numel(), dim, generator=generator, device=DEVICE).add_(centres[labels], alpha=0.5)


def supcon(n: int, dim: int = D, dtype: torch.dtype = HALF, normalize: bool = True, learnable: bool = False) -> Case:
    """Vectors of four classes; un-normalised ones are of length about 1."""
    labels = torch.randperm(n, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) % 4
    rows = (spread(labels, dim) * (1 if normalize else 0.8 * dim**-0.5)).to(dtype).requires_grad_()
    leaves = [rows] + ([torch.tensor(0.1, device=DEVICE, requires_grad=True)] if learnable else [])

    def loss(rows: Tensor, temperature: Any = 0.1, **options: Any) -> Tensor:
        options = {"backend": BACKEND, "normalize": normalize, **options}
        return hpcloss.supcon_loss(rows, labels, temperature=temperature, **options)

    def exact(chosen: Tensor, rows: Tensor, temperature: Any = 0.1) -> Tensor:
        rows = torch.nn.functional.normalize(rows, dim=1) if normalize else rows
        others = chosen[:, None] != torch.arange(n, device=DEVICE)
        lse = reference.pair_lse(rows[chosen], rows, others, 1 / temperature)
        positive = others & (labels[chosen, None] == labels)
        return lse - reference.pair_mean(rows[chosen], rows, positive, 1 / temperature, 0.0, None, "logit")[0]

    return Case(loss, leaves, exact, 2.0 * dim * n**2, labels)


def infonce(n: int) -> Case:
    """Two views of n vectors."""
    labels = torch.arange(n, device=DEVICE) % 4
    leaves = [spread(labels, D, seed).to(HALF).requires_grad_() for seed in (0, 1)]

    def loss(query: Tensor, positive: Tensor, **options: Any) -> Tensor:
        return hpcloss.infonce_loss(query, positive, **{"backend": BACKEND, **options})

    def exact(chosen: Tensor, query: Tensor, positive: Tensor) -> Tensor:
        query, positive = (torch.nn.functional.normalize(x, dim=1) for x in (query[chosen], positive))
        logits = 10.0 * query @ positive.T
        return torch.logsumexp(logits, 1) - logits[torch.arange(len(chosen), device=DEVICE), chosen]

    return Case(loss, leaves, exact, 2.0 * D * n**2, labels)


def label_map(batch: int, height: int, width: int, background: float = 0.0) -> Tensor:
    """Square patches of four equal classes 1..4, and a share of background patches 0, in random places."""
    patch = size(8, 2)
    shape = (batch, height // patch, width // patch)
    place = torch.randperm(math.prod(shape), generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    coarse = torch.where(place < background * len(place), 0, 1 + place % 4).view(shape)
    return coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def region_phpc(
    batch: int, height: int, width: int, region: int | None = None, background: float = 0.0,
    dtype: torch.dtype = HALF, **options: Any,
) -> Case:  # fmt: skip
    """Hard-positive pixel contrast of a channels-first map; `background`: share of pixels that are keys alone."""
    labels = label_map(batch, height, width, background)
    flat = labels.reshape(-1)
    features = spread(flat, D).view(batch, height, width, D).permute(0, 3, 1, 2).contiguous().to(dtype).requires_grad_()
    cell = region or max(height, width)
    grid = Grid(batch, (height, width), (cell, cell))
    regions, count = grid.ids(flat.device), grid.num_regions()
    anchors, keys = (torch.bincount(regions[mask], minlength=count).double() for mask in (flat > 0, flat >= 0))
    options = {"region_size": region, "background": 0 if background else None, "backend": BACKEND, **options}

    def loss(features: Tensor, **changed: Any) -> Tensor:
        return hpcloss.region_phpc_loss(features, labels, **{**options, **changed})

    def exact(chosen: Tensor, features: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(rows_of(features), dim=1)
        inside = (regions[chosen, None] == regions) & (chosen[:, None] != torch.arange(len(flat), device=DEVICE))
        same = flat[chosen, None] == flat
        negative = reference.pair_lse(rows[chosen], rows, inside & ~same, 10.0)
        mean = reference.pair_mean(rows[chosen], rows, inside & same, 10.0, 1.0, negative, "own")[0]
        return torch.where(flat[chosen] > 0, mean, 0.0)

    return Case(loss, [features], exact, 2.0 * D * float((anchors * keys).sum()), labels)


def rows_of(x: Tensor) -> Tensor:
    """[N, D] of vectors or of a map."""
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])
