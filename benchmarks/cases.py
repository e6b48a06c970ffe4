"""Inputs and losses by name, so that a loss is timed here and its memory measured in a fresh process on the same input.

A case is built from numbers and strings alone. `reference_work` counts the multiply-adds of the algorithm's matmuls in
operations: each tile's similarities once per pass and used for both of its sides, and the gradients of both sides.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from torch import Tensor

import hpcloss
from hpcloss import reference

sys.path.append(str(Path(__file__).parents[1]))  # last: the package that is measured may be an installed one

from tests.tools import losses as tests  # noqa: E402


class Case(NamedTuple):
    loss: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    exact: Callable[..., Tensor] | None  # the same loss, dense, for float64; None: the value is the peer's own
    work: float = 0.0  # operations of the matmuls, forward and backward

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return tuple(x for x in self.arguments if x.requires_grad)

    def step(self) -> Tensor:
        """Forward and backward."""
        for leaf in self.leaves:
            leaf.grad = None
        loss = self.loss(*self.arguments)
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


# ---------------------------------------------------------------------------------------------------- of vectors


def supcon(count: int, dim: int = 128, classes: int = 4) -> Case:
    return Case(hpcloss.SupConLoss(), vectors(count, dim, classes), reference.supcon_loss, 4.0 * dim * count**2)


def eager_supcon(count: int, dim: int = 128, classes: int = 4) -> Case:
    return supcon(count, dim, classes)._replace(loss=peers.eager_supcon)


def compiled_supcon(count: int, dim: int = 128, classes: int = 4) -> Case:
    case = supcon(count, dim, classes)
    return case._replace(loss=peers.compiled(peers.eager_supcon, *case.arguments))


def pml_supcon(count: int, dim: int = 128, classes: int = 4) -> Case:
    return supcon(count, dim, classes)._replace(loss=peers.pml().SupConLoss(temperature=0.1))


def infonce(count: int, dim: int = 128) -> Case:
    views = vectors(count, dim)[0], vectors(count, dim, seed=1)[0]
    # S in either pass and the two gradients: nothing is shared between queries and keys.
    return Case(hpcloss.InfoNCELoss(), views, reference.infonce_loss, 8.0 * dim * count**2)


def eager_infonce(count: int, dim: int = 128) -> Case:
    return infonce(count, dim)._replace(loss=peers.eager_infonce)


def linear_cross_entropy(count: int, dim: int = 128) -> Case:
    return infonce(count, dim)._replace(loss=peers.chunked_infonce)


def info_nce_pytorch(count: int, dim: int = 128) -> Case:
    return infonce(count, dim)._replace(loss=peers.info_nce()(temperature=0.1))


def clip(count: int, dim: int = 128) -> Case:
    """Queries and keys in both directions; the second one shares S and adds no matmul."""
    exact = partial(reference.infonce_loss, symmetric=True)
    return infonce(count, dim)._replace(loss=hpcloss.InfoNCELoss(symmetric=True), exact=exact)


def eager_clip(count: int, dim: int = 128) -> Case:
    return clip(count, dim)._replace(loss=peers.eager_clip)


def ntxent(count: int, dim: int = 128) -> Case:
    """Two views of count / 2 images, so that count rows meet count rows."""
    return Case(hpcloss.NTXentLoss(), infonce(count // 2, dim).arguments, reference.ntxent_loss)


def eager_ntxent(count: int, dim: int = 128) -> Case:
    return ntxent(count, dim)._replace(loss=peers.eager_ntxent)


def lightly_ntxent(count: int, dim: int = 128) -> Case:
    return ntxent(count, dim)._replace(loss=peers.lightly_ntxent()(temperature=0.5))


def monai_contrastive(count: int, dim: int = 128) -> Case:
    return ntxent(count, dim)._replace(loss=peers.monai_contrastive()(temperature=0.5))


def pml_ntxent(count: int, dim: int = 128) -> Case:
    """Two rows of each label: its denominator of a positive and the negatives is then that of NT-Xent."""
    image, loss = torch.arange(count // 2).repeat(2), peers.pml().NTXentLoss(temperature=0.5)
    return ntxent(count, dim)._replace(loss=lambda *views: loss(torch.cat(views), image))


def hard_negative_nce(count: int, dim: int = 128) -> Case:
    return ntxent(count, dim)._replace(loss=hpcloss.HardNegativeNCELoss(), exact=reference.hard_negative_nce_loss)


def eager_hard_negative_nce(count: int, dim: int = 128) -> Case:
    return hard_negative_nce(count, dim)._replace(loss=peers.eager_hard_negative_nce)


def ihpc(count: int, dim: int = 128) -> Case:
    return ntxent(count, dim)._replace(loss=hpcloss.IHPCLoss(), exact=reference.ihpc_loss)


def eager_ihpc(count: int, dim: int = 128) -> Case:
    return ihpc(count, dim)._replace(loss=peers.eager_ihpc)


def prototype_contrast(count: int, dim: int = 128) -> Case:
    prototypes, labels = vectors(count, dim)
    arguments = prototypes, labels, _probabilities(count)
    return Case(hpcloss.PrototypeContrastLoss(), arguments, reference.prototype_contrast_loss)


def pccs(count: int, dim: int = 128) -> Case:
    """The contrast of prototypes without their class probabilities."""
    return prototype_contrast(count, dim)._replace(arguments=vectors(count, dim))


def eager_pccs(count: int, dim: int = 128) -> Case:
    return pccs(count, dim)._replace(loss=peers.eager_pccs)


def _probabilities(*shape: int) -> Tensor:
    """Of four classes [..., 4]."""
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(2)).softmax(-1)


# ------------------------------------------------------------------------------------------------------- of maps


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
    exact = partial(reference.region_phpc_loss, region_size=region_size, hardness=hardness)
    return Case(loss, (features, labels), exact, reference_work(anchors, keys, dim))


def published_phpc(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, region_size, background=background)
    form = {"region_size": region_size, "reduction": "region"}
    exact = partial(reference.region_phpc_loss, hardness=0.0, discount=0.1, **form)
    return case._replace(loss=hpcloss.RegionPHPCLoss.published(beta=0.1, **form), exact=exact)


def eager_phpc(batch: int, height: int, width: int, hardness: float = 1.0, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, None, hardness, background)
    return case._replace(
        loss=lambda features, labels: peers.eager_phpc(
            features.permute(0, 2, 3, 1).flatten(0, 2), labels.reshape(-1), hardness=hardness
        )
    )


def block_loop(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = published_phpc(batch, height, width, region_size, background)
    return case._replace(loss=partial(peers.block_loop, size=region_size))


def committed_block_loop(batch: int, height: int, width: int, region_size: int = 16, background: bool = False) -> Case:
    case = region_phpc(batch, height, width, region_size, background=background)
    features, labels = case.arguments
    # The second half of the batch is the other view of the first: the same labels, nearly the same features.
    half = batch // 2
    views = features.detach().clone()
    views[half:] = views[:half] + 0.1 * views[half:]
    arguments = views.requires_grad_(), labels[:half].repeat(2, 1, 1)
    return case._replace(loss=partial(peers.committed_block_loop, size=region_size), arguments=arguments, exact=None)


def region_supcon(batch: int, height: int, width: int, region_size: int = 32) -> Case:
    exact = partial(reference.region_supcon_loss, region_size=region_size)
    return Case(hpcloss.RegionSupConLoss(region_size), feature_map(batch, height, width), exact)


# Drawn of a class: of each image, or of the batch. All pixels of the small map that is checked are fewer.
OF_IMAGE, OF_BATCH = 100, 512


def _labelled(batch: int, height: int, width: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """A map and its labels 0..classes-1."""
    return feature_map(batch, height, width, classes=classes, background=True)


def pixel_contrast(batch: int, height: int, width: int, classes: int = 4) -> Case:
    """100 pixels of each class of each image, half of them wrongly predicted; three tenths of all are."""
    features, labels = _labelled(batch, height, width, classes)
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    return Case(
        hpcloss.PixelContrastLoss(num_classes=classes, samples_per_class=OF_IMAGE),
        (features, labels, torch.where(wrong, (labels + 1) % classes, labels)),
        lambda features, labels, _: reference.pixel_contrast_loss(features, labels, num_classes=classes),
    )


def contrastiveseg(batch: int, height: int, width: int, classes: int = 4) -> Case:
    """The same draw in the way of the paper's code; what it drew is checked as the map of all its pixels."""
    most = min(OF_IMAGE, height * width // (2 * classes))  # it leaves out classes with fewer

    def drawn(features: Tensor, labels: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return peers.hard_rows(features, labels, predictions != labels, classes, most)

    def exact(*arguments: Tensor) -> Tensor:
        rows, drawn_labels = drawn(*arguments)
        return reference.pixel_contrast_loss(rows.T[None], drawn_labels[None], num_classes=classes)

    def loss(*arguments: Tensor) -> Tensor:
        return peers.eager_phpc(*drawn(*arguments), temperature=0.07, hardness=0.0, background=None)

    return pixel_contrast(batch, height, width, classes)._replace(loss=loss, exact=exact)


def local_contrast(batch: int, height: int, width: int) -> Case:
    features, labels = _labelled(batch, height, width)
    arguments = features, labels, torch.arange(batch).roll(1)
    loss = hpcloss.LocalContrastLoss(num_classes=4, samples_per_class=OF_IMAGE)
    return Case(loss, arguments, partial(reference.local_contrast_loss, num_classes=4))


def entropy_guided_contrast(batch: int, height: int, width: int) -> Case:
    features, labels = _labelled(batch, height, width)
    arguments = features, _probabilities(batch, height, width).movedim(-1, 1).contiguous(), labels
    loss = hpcloss.EntropyGuidedContrastLoss(samples_per_class=OF_BATCH)
    return Case(loss, arguments, reference.entropy_guided_contrast_loss)


def multiscale_contrast(batch: int, height: int, width: int) -> Case:
    features, labels = _labelled(batch, height, width)
    other = feature_map(batch, height, width, seed=1)[0]
    loss = hpcloss.MultiscaleContrastLoss(num_classes=4, samples_per_class=OF_BATCH)
    return Case(loss, (features, other, labels), partial(reference.multiscale_contrast_loss, num_classes=4))


def prototype_assignment(batch: int, height: int, width: int) -> Case:
    features, labels = _labelled(batch, height, width)
    prototypes = vectors(4 * 3, features.shape[1], seed=1)[0].detach().view(4, 3, -1)
    loss = hpcloss.PrototypeAssignmentLoss()
    return Case(loss, (features, labels, prototypes), reference.prototype_assignment_loss)


# --------------------------------------------------------------------------------------------------------- samples


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


def _by_name(*makes: Callable[..., Case | Draw]) -> dict[str, Callable[..., Case | Draw]]:
    return {make.__name__: make for make in makes}


VECTORS, MAPS = {"count": 4096}, {"batch": 4, "height": 64, "width": 64}


def of_the_tests(name: str) -> Callable[..., Case]:
    """A loss without a case above, on larger inputs of the kind that its tests use."""
    loss = tests.LOSSES[name]

    def case(sizes: tests.Sizes) -> Case:
        first, *rest = loss.inputs(sizes).values()
        known = inspect.signature(tests.ORACLE[name]).parameters
        exact = partial(tests.ORACLE[name], **{key: x for key, x in loss.required.items() if key in known})
        return Case(loss.build(), (first.requires_grad_(), *rest), exact)

    def of_vectors(count: int, dim: int = 128) -> Case:
        return case(tests.Sizes(rows=count, channels=dim, dtype=torch.float32))

    def of_maps(batch: int, height: int, width: int, dim: int = 128) -> Case:
        return case(tests.Sizes(batch, (height, width), channels=dim, dtype=torch.float32))

    return of_maps if loss.kind == "map" else of_vectors


OURS = _by_name(
    supcon, infonce, clip, ntxent, hard_negative_nce, ihpc, prototype_contrast, pccs, region_phpc, published_phpc,
    region_supcon,
    pixel_contrast, local_contrast, entropy_guided_contrast, multiscale_contrast, prototype_assignment, anchors,
)  # fmt: skip
OURS |= {name: of_the_tests(name) for name in tests.NAMES if name not in OURS}
# Every public loss, and what it is measured on in `bench_every_loss`.
LOSSES = {name: MAPS if loss.kind == "map" else VECTORS for name, loss in tests.LOSSES.items()}
LOSSES["region_phpc"] = {**MAPS, "region_size": 16}
CASES = OURS | _by_name(
    eager_supcon, compiled_supcon, pml_supcon, eager_infonce, eager_clip, linear_cross_entropy, info_nce_pytorch,
    eager_ntxent, lightly_ntxent, monai_contrastive, pml_ntxent, eager_hard_negative_nce, eager_ihpc, eager_pccs,
    eager_phpc, block_loop, committed_block_loop, contrastiveseg,
)  # fmt: skip
