"""Contrast of prototypes, and assignment of pixels to the prototypes of their class (PCCS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hpcloss.checks import check_used, check_vectors
from hpcloss.distributed import gather_keys, has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce, softmax, sum_of
from hpcloss.operators import differentiable_once, plain
from hpcloss.plan.labels import IGNORED, VECTORS_IGNORED, check_classes_and_ignored, labels_of_map, labels_of_vectors
from hpcloss.plan.partition import class_sort, partition
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale
from hpcloss.prototypes import sinkhorn, unit

ROWS = 1 << 12  # rows whose similarities to all prototypes are in memory at once


@checked
def prototype_contrast_loss(
    prototypes: Tensor,
    labels: Tensor,
    probs: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    hardness: float | None = None,
    *,
    detach_weights: bool = False,
    ignore_index: int | Sequence[int] = VECTORS_IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The function of `PrototypeContrastLoss`: the inputs of its `forward`, then its options."""
    check_vectors("prototypes", prototypes)
    labels = labels_of_vectors("labels", prototypes, labels)
    if probs is not None and (probs.dim() != 2 or probs.shape[0] != prototypes.shape[0]):
        raise ValueError(f"probs must have shape [{prototypes.shape[0]}, C], got {tuple(probs.shape)}")
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
    gather = has_peers(gather)
    pairs = partition(labels, ignore_index=ignored)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), prototypes=prototypes)
    rows = pack(prototypes, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
    if hardness is None:
        hardness = -1 / float(temperature)
    scale, keys = Scale.of(temperature, rows, normalize), None
    if gather:
        pairs, keys = gather_keys(rows, pairs, labels[pairs.order])
    loss, counted = contrast(rows, pairs, keys=keys, scale=scale, hardness=hardness, detach_weights=detach_weights)
    if probs is not None:
        if check_finite:
            check_used(pairs.order[counted], probs=probs)
        entropy = _entropy(plain(probs).index_select(0, pairs.order).to(loss.dtype), counted)
        loss = loss * softmax(entropy, counted, gather) * sum_of(counted, gather)
    return reduce(loss, counted, reduction, pairs.order, gather=gather)


class PrototypeContrastLoss(Loss):
    """Contrast of the prototypes of a batch, where similar positives and uncertain prototypes weigh more.

        L = Σ_i u_i Σ_{j∈P(i)} w_ij [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        w_ij = softmax_{j∈P(i)}( -hardness · s_ij )
        u_i = softmax_i( H(π_i) ),      H(π) = -Σ_c π_c log π_c

    s_ij is the cosine of prototypes i and j, and l_ij = s_ij / temperature. P(i), the positives, are the other
    prototypes of i's class. N(i), the negatives, are the prototypes of other classes. π_i are the mean class
    probabilities of i's pixels and H is the entropy. Without probabilities all u_i are equal.

    The loss pulls a prototype to those of its class and pushes it away from those of other classes. A prototype counts
    if it has a positive and a negative. If none counts, the loss is 0 with zero gradients.

    Source: He et al., PCCS (arXiv 2502.06650), and its code. The signs of both weights are those of the code; the
    paper's were not available to us. In the code a class with a single prototype makes the loss NaN; here that
    prototype does not count. The code's 1e-8 inside the logarithm is left out.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable; then
            `hardness` is required).
        hardness: Exponent of the weights w. None: -1 / temperature, the published weights, where similar positives
            weigh more. 0: all positives have the same weight. Positive: dissimilar positives weigh more.
        detach_weights: Treat the weights w as constants in the gradient. False, as published: differentiate them.
        ignore_index: Label or labels of rows that are neither anchors nor keys, such as prototypes without pixels.
            Default: -100 and -1.
        normalize: Divide each prototype by its L2 norm. Prototypes with a norm of at most 1e-12 become zero and get no
            gradient. False: s_ij is the inner product.
        reduction: "mean": as in the equation. "sum": n times that, with n counted prototypes. "none": `[M]`, n u_i
            times the loss of prototype i.
        gather: On several processes, contrast with the prototypes of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> prototypes, labels = torch.eye(4, requires_grad=True), torch.tensor([0, 0, 1, 1])
        >>> loss = hpcloss.PrototypeContrastLoss(temperature=1.0)(prototypes, labels)
        >>> round(loss.item(), 4)  # log(1 + 2), as all are orthogonal
        1.0986
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        hardness: float | None = None,
        *,
        detach_weights: bool = False,
        ignore_index: int | Sequence[int] = VECTORS_IGNORED,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            prototype_contrast_loss,
            temperature=temperature, hardness=hardness, detach_weights=detach_weights, ignore_index=ignore_index,
            normalize=normalize, reduction=reduction, gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, prototypes: Tensor, labels: Tensor, probs: Tensor | None = None) -> Tensor:
        """Compute the loss of prototypes, as `layer_prototypes` returns them.

        Args:
            prototypes: `[M, D]`, any float dtype.
            labels: Class of each prototype `[M]`, integers or whole-number floats.
            probs: Mean class probabilities of each prototype's pixels `[M, C]`. They are differentiated. None: all
                prototypes have the same weight.

        Returns:
            The loss in fp32 (float64 for float64 prototypes): 0-dim, or `[M]` for `reduction="none"`.
        """
        return unchecked(prototype_contrast_loss)(prototypes, labels, probs, **self.options)


def _entropy(probs: Tensor, counted: Tensor) -> Tensor:
    """Entropy of the probabilities of counted prototypes [N], with 0 log 0 = 0."""
    probs = torch.where(counted[:, None], probs, 0.0)
    probs = torch.where(probs < math.inf, probs, math.nan)  # inf would give entropy -inf and silently no weight
    return -(probs * torch.where(probs > 0, probs, 1.0).log()).sum(1)


@checked
def prototype_assignment_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    teacher_features: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    iterations: int = 4,
    epsilon: float = 0.05,
    ignore_index: int | Sequence[int] = IGNORED,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The function of `PrototypeAssignmentLoss`: the inputs of its `forward`, then its options."""
    labels = labels_of_map(features, labels)
    if not prototypes.is_floating_point():
        raise TypeError(f"prototypes must be floating point, got {prototypes.dtype}")
    if prototypes.dim() != 3 or prototypes.shape[2] != features.shape[1] or prototypes.shape[0] == 0:
        raise ValueError(f"prototypes must have shape [C, K, {features.shape[1]}], got {tuple(prototypes.shape)}")
    teacher = features if teacher_features is None else teacher_features
    if teacher.shape != features.shape:
        raise ValueError(
            f"teacher_features must have shape {tuple(features.shape)}, as features, got {tuple(teacher.shape)}"
        )
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
    num_classes = prototypes.shape[0]
    check_classes_and_ignored(num_classes, ignored)
    plan = class_sort(labels, ignore_index=ignored, num_classes=num_classes)
    order, offsets = plan.order, plan.offsets
    if check_finite:
        check_used(temperature=temperature, prototypes=prototypes)
        check_used(order, plan.live(), features=features, teacher_features=teacher)
    rows = pack(features, order, plan.live(), normalize=True, permutation=True, backend=backend)
    scale = Scale.of(temperature, rows, True).value

    directions = unit(plain(prototypes).detach().to(scale.dtype))
    there = (directions != 0).any(-1)
    row = torch.arange(order.numel(), device=labels.device)
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        judged = pack(teacher, order, plan.live(), normalize=True, backend=backend).data.to(scale.dtype)
        scores = torch.einsum("nd,ckd->cnk", judged, directions)
        scores = torch.where(there[:, None], scores, -math.inf)
        member = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
        share = sinkhorn(scores, member, iterations=iterations, epsilon=epsilon)
    by_row, absent = share.movedim(1, 0).flatten(1), ~there.flatten()
    with torch.autocast(labels.device.type, enabled=False):
        loss = _CrossEntropy.apply(rows.data, rows.companion, directions.flatten(0, 1), absent, by_row, scale)
    counted = (member & there.any(1, keepdim=True)).any(0)
    return reduce(torch.where(counted, loss, 0.0), counted, reduction, order, labels, gather=has_peers(gather))


class PrototypeAssignmentLoss(Loss):
    """Classification of pixels by prototypes, with a balanced assignment within each class.

        L_i = -Σ_k q_ik log( e^{l_i,ck} / Σ_{c',k'} e^{l_i,c'k'} )
        q = Sinkhorn( cos(t_i, p_ck) / epsilon ) over the pixels of class c

    c is the class of pixel i. p_ck is prototype k of class c. l_i,ck is the cosine of pixel i and p_ck, divided by the
    temperature. t_i is the teacher's embedding of the pixel, or its own. q, the assignment, is a constant in the
    gradient.

    The loss pulls a pixel to the prototypes of its class that it is assigned to, and pushes it away from all others.
    Sinkhorn iterations give all prototypes of a class equal shares of the pixels. A pixel counts if its class has a
    prototype. If none counts, the loss is 0 with zero gradients. Features and prototypes are always normalised. A
    prototype with a norm of at most 1e-12 is absent, for example one that a `PrototypeBank` has not filled.

    The assignment takes N C K numbers of memory, for N pixels and K prototypes per class.

    Source: He et al., PCCS (arXiv 2502.06650), the prototype-updating-prototype loss, and Zhou et al., "Rethinking
    semantic segmentation: a prototype view" (CVPR 2022). This is a reconstruction: the loss in PCCS's code has no
    gradient. Here the teacher gives the target and the student is classified. The assignment is soft; the Gumbel
    softmax of the published code is left out.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        iterations: Sinkhorn iterations.
        epsilon: Temperature of the assignment. It divides cosines. Smaller: closer to one prototype per pixel.
        ignore_index: Label or labels of pixels that take no part. Default: -100, -1 and 255. Labels outside [0, C) are
            ignored too.
        reduction: "mean" over counted pixels, "class" (mean of class means), "sum", or "none" (a map `[B, *S]`).
        gather: On several processes, reduce over the pixels of all ranks. Each rank balances the assignment of its own
            pixels (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> features = torch.eye(2).reshape(1, 2, 1, 2).requires_grad_()  # pixels (1, 0) and (0, 1)
        >>> labels, prototypes = torch.tensor([[[0, 1]]]), torch.eye(2).reshape(2, 1, 2)
        >>> loss = hpcloss.PrototypeAssignmentLoss(temperature=1.0)(features, labels, prototypes)
        >>> round(loss.item(), 4)  # log(e + 1) - 1
        0.3133
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        iterations: int = 4,
        epsilon: float = 0.05,
        ignore_index: int | Sequence[int] = IGNORED,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            prototype_assignment_loss,
            temperature=temperature, iterations=iterations, epsilon=epsilon, ignore_index=ignore_index,
            reduction=reduction, gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, labels: Tensor, prototypes: Tensor, teacher_features: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour.
            prototypes: `[C, K, D]`, K per class, for example `PrototypeBank.prototypes`. They get no gradient.
            teacher_features: `[B, D, *S]`, for the assignment. They get no gradient. None: the features.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`.
        """
        return unchecked(prototype_assignment_loss)(features, labels, prototypes, teacher_features, **self.options)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of an assignment and the softmax over all prototypes.

    Inputs are rows [N, D] and prototypes [P, D] of unit length; absent [P], whether a prototype is absent; share [N,
    P], the assignment, whose rows sum to 1, or to 0 for a row that takes no part. It is differentiable in the companion
    of the rows and in the scale. The forward pass computes both gradients, because the similarities are there: D
    numbers are saved per row instead of P.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, companion: Tensor, prototypes: Tensor, absent: Tensor, share: Tensor, scale: Tensor
    ) -> Tensor:
        losses, of_rows, of_scale = [], [], []
        for part, weight in zip(rows.split(ROWS), share.split(ROWS)):
            similarity = part.to(prototypes.dtype) @ prototypes.T
            log_p = torch.log_softmax((scale * similarity).masked_fill(absent, -math.inf), 1).masked_fill(absent, 0.0)
            losses.append(-(weight * log_p).sum(1))
            # p - share in one difference: a difference of two sums leaves rounding errors near the minimum.
            slope = log_p.exp().masked_fill(absent, 0.0) * weight.sum(1, keepdim=True) - weight
            of_rows.append(scale * (slope @ prototypes))
            of_scale.append((slope * similarity).sum(1))
        loss = torch.cat(losses)
        # The loss is saved because a second derivative must find the graph (`differentiable_once`).
        ctx.save_for_backward(loss, torch.cat(of_rows), torch.cat(of_scale))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, of_rows, of_scale = ctx.saved_tensors
        return None, grad[:, None] * of_rows, None, None, None, (grad * of_scale).sum()
