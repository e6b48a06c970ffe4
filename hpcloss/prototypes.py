"""Prototypes: class and layer means of images, a bank of them, and balanced assignments."""

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
    """Prototypes of all images, classes and layers, M = B C L of them.

    The prototype of image b, class c and layer l is number (b * C + c) * L + l, whether it has pixels or not.

    Attributes:
        prototypes: Mean features `[M, D]`, fp32 (float64 for float64 features). Zero without pixels.
        labels: Class of each prototype `[M]`; -1 without pixels.
        probs: Mean probabilities `[M, C']`, zero without pixels. None if none were given.
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
    """Mean features of every layer of every class of every image.

    A layer is a set of pixels, for example those at one distance from the edge of their class. The result is
    differentiable with respect to `features` and `probs`.

    Args:
        features: `[B, D, *S]`, any float dtype.
        layers: Layer of each pixel, shaped like `labels`, integers. Values outside [0, num_layers): the pixel takes no
            part.
        labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
            neighbour.
        num_classes: Number of classes C. Labels outside [0, C) take no part.
        num_layers: Number of layers L.
        probs: Class probabilities `[B, C', *S]`, to be averaged too.
        ignore_index: Label or labels of pixels that take no part. Default: -100, -1 and 255.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton".

    Returns:
        `LayerPrototypes`, a named tuple of `prototypes` `[B C L, D]`, `labels` `[B C L]` and `probs` `[B C L, C']` or
            None. A prototype without pixels is zero and has label -1.

    Raises:
        ValueError: A shape or a number is invalid.
        TypeError: A dtype is invalid.

    Examples:
        >>> import torch, hpcloss
        >>> features = torch.tensor([1.0, 3.0, 5.0]).reshape(1, 1, 1, 3)
        >>> labels, layers = torch.tensor([[[0, 0, 1]]]), torch.zeros(1, 1, 3, dtype=torch.int64)
        >>> prototypes, classes, _ = hpcloss.layer_prototypes(features, layers, labels, num_classes=2, num_layers=1)
        >>> prototypes.tolist(), classes.tolist()
        ([[2.0], [5.0]], [0, 1])
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
    """Assignment of rows to columns that uses all columns alike.

        Q = diag(u) exp( scores / epsilon ) diag(v)

    u and v are computed in turn: v gives all columns equal shares, then u makes each row sum to 1. The computation uses
    logarithms, so it is finite for any epsilon. The result has no gradient.

    Source: Cuturi, "Sinkhorn distances" (NeurIPS 2013); Asano et al., "Self-labelling" (ICLR 2020).

    Args:
        scores: `[..., N, K]`, for example cosines. A column of -inf is absent.
        mask: `[..., N]`, bool. Rows with False take no part and are 0. None: all rows take part.
        iterations: Iterations, at least 1.
        epsilon: Temperature of the assignment, positive. Smaller: closer to one column per row.

    Returns:
        Q, `[..., N, K]`, fp32 (float64 for float64 scores).

    Raises:
        ValueError: `iterations` is below 1 or `epsilon` is not positive.

    Examples:
        >>> import torch, hpcloss
        >>> scores = torch.tensor([[1.0, 0.0], [0.9, 0.0]])  # both rows prefer column 0
        >>> hpcloss.sinkhorn(scores, iterations=50).argmax(1)
        tensor([0, 1])
    """
    iterations = count("iterations", iterations)
    positive("epsilon", epsilon)
    log_q = scores.to(statistics_dtype(scores.dtype)) / epsilon
    if mask is not None:
        log_q = torch.where(mask[..., None], log_q, -torch.inf)
    for _ in range(iterations):
        for axis in (-2, -1):
            total = torch.logsumexp(log_q, axis, keepdim=True)
            log_q = log_q - torch.where(total == -torch.inf, 0.0, total)  # an empty row or column stays empty
    return log_q.exp()


class PrototypeBank(nn.Module):
    """Unit prototypes of every class that follow the embeddings of a training.

        p ← normalise( momentum · p + (1 - momentum) · m )

    m is the normalised mean of the embeddings that are assigned to prototype p. In a class with several prototypes
    `sinkhorn` assigns them. As long as one of these prototypes is empty, the embeddings of the class go to them in
    turn. The first m of a prototype becomes the prototype. Each process of a distributed run keeps its own bank.

    Source: Zhou et al., "Rethinking semantic segmentation: a prototype view" (CVPR 2022).

    Args:
        num_classes: Number of classes C.
        dim: Channels D.
        momentum: Share of the old prototype in an update, in [0, 1).
        per_class: Prototypes per class K.

    Attributes:
        prototypes: `[C, K, D]`, fp32, part of `state_dict`. Zero where not filled.
        filled: Whether the prototype has had an embedding `[C, K]`, bool, part of `state_dict`.

    Raises:
        ValueError: A number is out of its range.
        TypeError: A number has another type.

    Examples:
        >>> import torch, hpcloss
        >>> bank = hpcloss.PrototypeBank(num_classes=2, dim=2)
        >>> bank.update(torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1]))
        >>> bank.prototypes.tolist()
        [[[0.0, 0.0]], [[1.0, 0.0]]]
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
        """Move the prototypes towards the embeddings of their class.

        A class without embeddings does not change. Embeddings that are not finite are skipped: they come from steps
        that overflow in half precision.

        Args:
            embeddings: `[N, D]`.
            labels: `[N]`, integers or whole-number floats. Labels outside [0, C) are ignored.

        Raises:
            ValueError: A shape does not fit.
            TypeError: A dtype is invalid.
        """
        num_classes, per_class, dim = self.prototypes.shape
        check_vectors("embeddings", embeddings)
        if embeddings.shape[1] != dim:
            raise ValueError(f"embeddings must have shape [N, {dim}], got {tuple(embeddings.shape)}")
        labels = labels_of_vectors("labels", embeddings, labels)
        sound = embeddings.isfinite().all(1)
        # Rows may exceed the bank's dtype before they have unit length.
        dtype = torch.promote_types(self.prototypes.dtype, statistics_dtype(embeddings.dtype))
        held, rows = self.prototypes.to(dtype), unit(torch.where(sound[:, None], embeddings, 0.0).to(dtype))
        classes = torch.arange(num_classes, device=labels.device)
        member = (labels == classes[:, None]) & sound  # [C, N]
        with torch.autocast(rows.device.type, enabled=False):
            scores = torch.einsum("nd,ckd->cnk", rows, held)
            share = sinkhorn(scores, member)
            # Empty prototypes have no direction: until all are filled, the rows of a class are dealt in turn.
            turn = (member.cumsum(1) - 1)[..., None] % per_class == torch.arange(per_class, device=labels.device)
            dealt = (turn & member[..., None]).to(dtype)
            share = torch.where(self.filled.all(1)[:, None, None], share, dealt)
            mean = unit(torch.einsum("cnk,nd->ckd", share, rows))
        seen = (mean != 0).any(-1)
        # A prototype that is still zero takes the direction of its first mean.
        moved = unit(self.momentum * held + (1 - self.momentum) * mean)
        self.prototypes.copy_(torch.where(seen[..., None], moved, held))
        self.filled.logical_or_(seen)

    def extra_repr(self) -> str:
        num_classes, per_class, dim = self.prototypes.shape
        return f"num_classes={num_classes}, dim={dim}, momentum={self.momentum}, per_class={per_class}"


def unit(rows: Tensor, axis: int = -1) -> Tensor:
    """Vectors along an axis, divided by their norm. A norm of at most `NORM_EPS` gives zero without gradient."""
    norm = torch.linalg.vector_norm(rows, dim=axis, keepdim=True, dtype=torch.float64)
    short = norm <= NORM_EPS
    return torch.where(short, 0.0, rows / torch.where(short, 1.0, norm).to(rows.dtype))
