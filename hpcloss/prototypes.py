"""Prototypes: means of classes and layers of images, their bank over a training, and balanced assignments to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcloss.checks import below_one, check_probs, check_vectors, count, integers, positive
from hpcloss.operators import NORM_EPS, statistics_dtype
from hpcloss.plan.labels import IGNORED, check_classes_and_ignored, is_ignored, labels_of_map, labels_of_vectors
from hpcloss.plan.partition import class_sort
from hpcloss.plan.regions import Grid, region_shape
from hpcloss.primitives.rows import pack
from hpcloss.primitives.segment_mean import segment_mean

ABSENT = -1  # label of a prototype without pixels


class LayerPrototypes(NamedTuple):
    """Prototype b * C * L + c * L + l is that of image b, class c and layer l; M = B C L of them, whatever is there.

    prototypes [M, D]   mean features, fp32 (float64); zero without pixels.
    labels [M]          class, or `ABSENT` without pixels.
    probs [M, C']       mean probabilities, zero without pixels; None if none were given.
    """

    prototypes: Tensor
    labels: Tensor
    probs: Tensor | None


def layer_prototypes(
    features: Tensor,
    layers: Tensor,
    labels: Tensor,
    num_classes: int,
    num_layers: int,
    probs: Tensor | None = None,
    *,
    ignore_index: int | Sequence[int] = IGNORED,
    backend: str = "auto",
) -> LayerPrototypes:
    """Mean feature of every layer of every class of every image, such as pixels equally far from the class's edge.

    features [B, D, *S]; labels, layers [B, *S] or [B, 1, *S], integers, resized by nearest neighbour; probs
    [B, C', *S]. Pixels whose label is outside [0, num_classes) or in `ignore_index`, or whose layer is outside
    [0, num_layers), take no part. Differentiable with respect to features and probs.

    Raises ValueError for shapes and numbers, TypeError for dtypes.
    """
    num_classes, num_layers = count("num_classes", num_classes), count("num_layers", num_layers)
    ignored = integers("ignore_index", ignore_index)
    check_classes_and_ignored(num_classes, ignored)
    if layers.shape != labels.shape:
        raise ValueError(f"layers must have shape {tuple(labels.shape)}, as labels, got {tuple(layers.shape)}")
    labels, layers = labels_of_map(features, labels), labels_of_map(features, layers, "layers")
    if probs is not None:
        check_probs(features, probs)
    away = is_ignored(labels, ignored, num_classes) | is_ignored(layers, (), num_layers)
    segments = torch.where(away, ABSENT, labels * num_layers + layers)
    spatial = tuple(labels.shape[1:])
    grid = Grid(labels.shape[0], spatial, region_shape(None, spatial), per_image=True)
    rows = class_sort(segments, grid, num_classes=num_classes * num_layers)

    def means(of: Tensor) -> Tensor:
        packed = pack(of, rows.order, rows.live(), normalize=False, permutation=True, backend=backend)
        return segment_mean(packed, rows.offsets)

    # An empty batch still has a grid of one image.
    total = labels.shape[0] * num_classes * num_layers
    classes = torch.arange(total, device=labels.device) // num_layers % num_classes
    classes = torch.where(rows.offsets.diff()[:total] > 0, classes, ABSENT)
    return LayerPrototypes(means(features)[:total], classes, None if probs is None else means(probs)[:total])


@torch.no_grad()
def sinkhorn(scores: Tensor, mask: Tensor | None = None, *, iterations: int = 4, epsilon: float = 0.05) -> Tensor:
    """Assignment of rows to columns that uses all columns alike: Q [..., N, K], each row of it sums to 1.

        Q = diag(u) exp(scores / epsilon) diag(v),   u and v by turns so that columns hold equal shares and rows 1

    Cuturi, "Sinkhorn distances" (NeurIPS 2013); Asano et al., "Self-labelling" (ICLR 2020). In logarithms, so finite at
    any epsilon; a constant to the gradient.

    scores [..., N, K]; a column of -inf is not there. mask [..., N]: rows where it is False take no part and are 0.
    Raises ValueError unless iterations is at least 1 and epsilon positive.
    """
    iterations = count("iterations", iterations)
    positive("epsilon", epsilon)
    log_q = scores.to(statistics_dtype(scores.dtype)) / epsilon
    if mask is not None:
        log_q = torch.where(mask[..., None], log_q, -torch.inf)
    for _ in range(iterations):
        for axis in (-2, -1):
            total = torch.logsumexp(log_q, axis, keepdim=True)
            log_q = log_q - torch.where(total == -torch.inf, 0.0, total)  # nothing in it: nothing to share
    return log_q.exp()


class PrototypeBank(nn.Module):
    """Unit prototypes of every class that follow the embeddings of a training: P = momentum P + (1 - momentum) mean.

    Of a class with several prototypes each embedding moves those that `sinkhorn` assigns it to, as in Zhou et al.,
    "Rethinking semantic segmentation: a prototype view" (CVPR 2022); a prototype takes the first mean it sees as it is.

    prototypes [C, K, D], fp32: zero where `filled` [C, K] is False. Both are buffers and part of `state_dict`; each
    process of a distributed run keeps its own.

    Args: num_classes C, dim D, per_class K; momentum in [0, 1). ValueError for other values.
    """

    prototypes: Tensor
    filled: Tensor

    def __init__(self, num_classes: int, dim: int, momentum: float = 0.999, per_class: int = 1):
        super().__init__()
        below_one("momentum", momentum)
        shape = count("num_classes", num_classes), count("per_class", per_class)
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(*shape, count("dim", dim), dtype=torch.float32))
        self.register_buffer("filled", torch.zeros(shape, dtype=torch.bool))

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Move the prototypes of the classes of embeddings [N, D] with labels [N]; labels outside [0, C) are ignored.

        A class without embeddings stays as it is. Rows that are not finite are left out: a step that overflowed in
        half precision is skipped by its scaler and must not stay here.
        """
        num_classes, per_class, dim = self.prototypes.shape
        check_vectors("embeddings", embeddings)
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings must have shape [N, {dim}], got {tuple(embeddings.shape)}")
        labels = labels_of_vectors("labels", embeddings, labels)
        sound = embeddings.isfinite().all(1)
        # Rows that the dtype of the bank cannot hold, it can once they are of unit length.
        dtype = torch.promote_types(self.prototypes.dtype, statistics_dtype(embeddings.dtype))
        held, rows = self.prototypes.to(dtype), unit(torch.where(sound[:, None], embeddings, 0.0).to(dtype))
        classes = torch.arange(num_classes, device=labels.device)
        member = (labels == classes[:, None]) & sound  # [C, N]
        with torch.autocast(rows.device.type, enabled=False):
            scores = torch.einsum("nd,ckd->cnk", rows, held)
            share = sinkhorn(scores, member)
            # Prototypes that are not there yet resemble nothing: a class starts with its rows dealt in turn.
            turn = (member.cumsum(1) - 1)[..., None] % per_class == torch.arange(per_class, device=labels.device)
            dealt = (turn & member[..., None]).to(dtype)
            share = torch.where(self.filled.all(1)[:, None, None], share, dealt)
            mean = unit(torch.einsum("cnk,nd->ckd", share, rows))
        seen = (mean != 0).any(-1)
        # One that is still zero takes the direction of its first mean.
        moved = unit(self.momentum * held + (1 - self.momentum) * mean)
        self.prototypes.copy_(torch.where(seen[..., None], moved, held))
        self.filled.logical_or_(seen)

    def extra_repr(self) -> str:
        num_classes, per_class, dim = self.prototypes.shape
        return f"num_classes={num_classes}, dim={dim}, momentum={self.momentum}, per_class={per_class}"


def unit(rows: Tensor, axis: int = -1) -> Tensor:
    """Vectors along an axis divided by their norm; those of norm up to `NORM_EPS` become zero and get no gradient."""
    norm = torch.linalg.vector_norm(rows, dim=axis, keepdim=True, dtype=torch.float64)
    short = norm <= NORM_EPS
    return torch.where(short, 0.0, rows / torch.where(short, 1.0, norm).to(rows.dtype))
