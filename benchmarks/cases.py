"""Inputs and losses by name, so that a loss is timed here and its memory measured in a fresh process on the same input.

A case is built from numbers and strings alone. `reference_work` counts the multiply-adds of the algorithm's matmuls in
operations: each tile's similarities once per pass and used for both of its sides, and the gradients of both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import peers
import torch
from torch import Tensor

import hpcloss


class Case(NamedTuple):
    loss: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    work: float  # operations of the matmuls, forward and backward
    arguments: tuple[Tensor, ...]  # what the loss is given

    def step(self) -> Tensor:
        """Forward and backward."""
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss()
        loss.backward()
        return loss


class Draw(NamedTuple):
    """A sample of pixels, which has no backward pass."""

    step: Callable[[], object]
    leaves: tuple[Tensor, ...] = ()


def reference_work(anchors: Tensor, keys: Tensor, dim: int) -> float:
    """Self-contrast of regions with so many anchors among so many keys; 2F, F = 2 D pairs, where all keys are anchors.

    Pairs of two anchors share a tile: half of S in either pass. Keys that are no anchors need theirs twice, and both
    gradients; they have none among themselves.
    """
    anchors, keys = anchors.double(), keys.double()
    return float((2 * dim * (2 * anchors**2 + 4 * anchors * (keys - anchors))).sum())


def vectors(count: int, dim: int = 128, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around class centres, so that similarities spread as in training, and their labels 1..classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    rows = 0.5 * centres[labels] + torch.randn(count, dim, generator=generator)
    return rows.requires_grad_(), labels + 1


def feature_map(
    batch: int, height: int, width: int, dim: int = 128, classes: int = 4, background: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Channels-first map with mixed labels: 1..classes, or 0..classes-1 where one class is background."""
    rows, labels = vectors(batch * height * width, dim, classes, seed)
    features = rows.detach().view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
    return features.requires_grad_(), labels.view(batch, height, width) - int(background)


def supcon(count: int, dim: int = 128) -> Case:
    rows, labels = vectors(count, dim)
    return Case(lambda: hpcloss.supcon_loss(rows, labels), (rows,), 4.0 * dim * count**2, (rows, labels))


def eager_supcon(count: int, dim: int = 128) -> Case:
    case = supcon(count, dim)
    return case._replace(loss=lambda: peers.eager_supcon(*case.arguments))


def compiled_supcon(count: int, dim: int = 128) -> Case:
    case = supcon(count, dim)
    loss = peers.compiled(peers.eager_supcon, *case.arguments)
    return case._replace(loss=lambda: loss(*case.arguments))


def infonce(count: int, dim: int = 128) -> Case:
    query, positive = vectors(count, dim)[0], vectors(count, dim, seed=1)[0]
    loss = hpcloss.infonce_loss
    # S in either pass and the two gradients: nothing is shared between queries and keys.
    return Case(lambda: loss(query, positive), (query, positive), 8.0 * dim * count**2, (query, positive))


def eager_infonce(count: int, dim: int = 128) -> Case:
    case = infonce(count, dim)
    return case._replace(loss=lambda: peers.eager_infonce(*case.arguments))


def linear_cross_entropy(count: int, dim: int = 128) -> Case:
    case = infonce(count, dim)
    return case._replace(loss=lambda: peers.chunked_infonce(*case.arguments))


def region_phpc(
    batch: int,
    height: int,
    width: int,
    region_size: int | None = None,
    hardness: float = 1.0,
    background: bool = False,
    dim: int = 128,
    channels_last: bool = False,
) -> Case:
    features, labels = feature_map(batch, height, width, dim, background=background)
    if channels_last:
        features = features.detach().to(memory_format=torch.channels_last).requires_grad_()
    regions = peers.blocks(labels.unsqueeze(1), labels, region_size or max(height, width))
    keys = torch.tensor([label.numel() for _, label in regions])
    anchors = torch.tensor([int((label > 0).sum()) for _, label in regions])
    loss = hpcloss.RegionPHPCLoss(region_size, hardness=hardness)
    return Case(
        lambda: loss(features, labels), (features,), reference_work(anchors, keys, dim), (features, labels)
    )  # fmt: skip


def published_phpc(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, region_size, background=background)
    loss = hpcloss.RegionPHPCLoss.published(beta=0.1, region_size=region_size, reduction="region")
    return case._replace(loss=lambda: loss(*case.arguments))


def eager_phpc(batch: int, height: int, width: int, hardness: float = 1.0, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, None, hardness, background)
    features, labels = case.arguments
    dim = features.shape[1]
    return case._replace(
        loss=lambda: peers.eager_phpc(
            features.permute(0, 2, 3, 1).reshape(-1, dim), labels.reshape(-1), hardness=hardness
        )
    )


def block_loop(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, region_size, background=background)
    return case._replace(loss=lambda: peers.block_loop(*case.arguments, region_size))


def committed_block_loop(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, region_size, background=background)
    features, labels = case.arguments
    # The second half of the batch is the other view of the first: the same labels, nearly the same features.
    half = batch // 2
    views = features.detach().clone()
    views[half:] = views[:half] + 0.1 * views[half:]
    views, labels = views.requires_grad_(), labels[:half].repeat(2, 1, 1)
    return Case(
        lambda: peers.committed_block_loop(views, labels, region_size), (views,), case.work, (views, labels)
    )  # fmt: skip


def label_patches(batch: int, height: int, width: int, classes: int = 4, patch: int = 8) -> Tensor:
    """Labels [B, H, W] of patches of one class, as in a segmentation map."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(classes, (batch, height // patch, width // patch), generator=generator)
    return coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def anchors(batch: int, height: int, width: int, k: int = 256, rule: str = "uniform", patch: int = 8) -> Draw:
    """k pixels of each of 4 classes of each image, by one of the rules of `sample_anchors`."""
    labels, generator = label_patches(batch, height, width, patch=patch), torch.Generator().manual_seed(1)
    values, seed = torch.rand(labels.shape, generator=generator), torch.tensor(7)
    maps = {"weighted": {"weights": values}, "hardest": {"scores": values}, "half hard": {"wrong": values < 0.3}}
    return Draw(lambda: hpcloss.sample_anchors(labels, k, num_classes=4, seed=seed, **maps.get(rule, {})))


CASES: dict[str, Callable[..., Case | Draw]] = {
    make.__name__: make
    for make in (
        supcon, eager_supcon, compiled_supcon, infonce, eager_infonce, linear_cross_entropy,
        region_phpc, published_phpc, eager_phpc, block_loop, committed_block_loop, anchors,
    )
}  # fmt: skip
