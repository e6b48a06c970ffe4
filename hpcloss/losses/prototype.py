"""Prototypes contrasted with one another, and pixels assigned to the prototypes of their class (PCCS)."""

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

ROWS = 1 << 12  # whose similarities to all prototypes are in memory at once


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
    """Contrast of prototypes, uncertain ones weighing more; equation and arguments in `PrototypeContrastLoss`."""
    check_vectors("prototypes", prototypes)
    labels = labels_of_vectors("labels", prototypes, labels)
    if probs is not None and (probs.dim() != 2 or probs.shape[0] != prototypes.shape[0]):
        raise ValueError(f"probs must have shape [{prototypes.shape[0]}, C], got {tuple(probs.shape)}")
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
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
    r"""Prototypes of a batch contrasted with one another; similar positives and uncertain prototypes weigh more.

        L = Σ_i u_i Σ_{j∈P(i)} w_ij [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        w_ij = softmax_{j∈P(i)}( -hardness · s_ij ),      u_i = softmax_i( H(π_i) ),   H(π) = -Σ_c π_c log π_c

    s_ij is the cosine of prototypes i and j, l_ij = s_ij / temperature; P(i): the other prototypes of i's class, N(i):
    those of other classes; π_i: the mean class probabilities of i's pixels. Without them u is uniform.

    Source: He et al., PCCS (arXiv 2502.06650), and its code, from which the signs of both weights are read (the paper's
    own are unknown to us). There a class with a single prototype makes the loss NaN; here it does not count, as it has
    no positive, and u is a softmax over the prototypes that do.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable; needs a hardness).
        hardness: None: -1 / temperature, the published weights e^{l_ij}, which favour similar positives; 0 weighs all
            alike, positive numbers favour dissimilar ones.
        detach_weights: weights w are constants to the gradient. As published they are not.
        ignore_index: label or labels of rows that take no part, such as prototypes without pixels.
        normalize: L2-normalise the rows; those of norm up to 1e-12 become zero and get no gradient. False: the inner
            product takes the place of the cosine, in the weights too.
        reduction: "mean" (above), "sum" (times the number of counted prototypes n) or "none" ([M]: n u_i L_i).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".

    A prototype counts if it has a positive and a negative. None counted: 0, joined to the graph. Raises ValueError for
    shapes and hyper-parameters, TypeError for dtypes, NotImplementedError for a backend that cannot run; never for
    data. Differentiating twice raises.
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
        """prototypes [M, D], labels [M], probs [M, C], differentiated too; as `layer_prototypes` gives them."""
        return unchecked(prototype_contrast_loss)(prototypes, labels, probs, **self.options)


def _entropy(probs: Tensor, counted: Tensor) -> Tensor:
    """Entropy of the probabilities of counted prototypes [N]; 0 log 0 = 0."""
    probs = torch.where(counted[:, None], probs, 0.0)
    probs = torch.where(probs < math.inf, probs, math.nan)  # its entropy would be -inf: no weight, and nobody would see
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
    """Classification by prototypes, balanced within a class; equation, arguments in `PrototypeAssignmentLoss`."""
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
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
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
    r"""Each pixel finds its prototypes among all; which ones of its class is a balanced assignment.

        L_i = -Σ_k q_ik log( e^{l_i,ck} / Σ_{c',k'} e^{l_i,c'k'} ),      c the class of pixel i
        q = Sinkhorn( cos(t_i, p_ck) / epsilon ) over the pixels of class c, a constant

    l_i,ck is the cosine of pixel i and prototype k of class c over the temperature; t the teacher's embedding of the
    pixel, else its own. With one prototype per class this is plain classification by prototypes.

    Source: the prototype-updating-prototype loss of He et al., PCCS (arXiv 2502.06650), and Zhou et al., "Rethinking
    semantic segmentation: a prototype view" (CVPR 2022). A reconstruction: in PCCS's code teacher features meet a
    detached bank, so that no gradient reaches the student; here the student's features are classified, with the
    teacher's assignment as target. Their Gumbel softmax of the assignment is left out: it takes the soft one.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        iterations, epsilon: of `sinkhorn`.
        ignore_index: label or labels of pixels that take no part; nor do those outside [0, C).
        reduction: "mean" over counted pixels, "class" (mean of class means), "sum", or "none" (a map [B, *S]).
        gather: reduce over the pixels of every rank of a distributed run, each of which balances the assignment of its
            own; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".

    Features and prototypes are always normalised: a prototype is a direction, and the assignment balances cosines, of
    which `epsilon` is the scale. A prototype of norm up to 1e-12, such as one a `PrototypeBank` has not filled, is not
    there; a pixel counts if its class has a prototype. No pixel counted: 0, joined to the graph. The assignment holds a
    number for each pixel and prototype, N C K of them. Raises ValueError for shapes and hyper-parameters, TypeError for
    dtypes, NotImplementedError for a backend that cannot run; never for data. Differentiating twice raises.
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
        """features [B, D, *S]; labels [B, *S] or [B, 1, *S], resized by nearest neighbour; prototypes [C, K, D]
        and teacher_features [B, D, *S], both constants to the gradient."""
        return unchecked(prototype_assignment_loss)(features, labels, prototypes, teacher_features, **self.options)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [N] of the softmax over all prototypes and an assignment to them.

    rows [N, D], prototypes [P, D], both of unit length; absent [P]: prototypes that are not there; share [N, P]: the
    assignment, whose sum is 1, or 0 for a row that takes no part. Differentiable in the rows' companion and the scale.
    Both gradients are made in the forward pass, where the similarities are: D numbers are saved for a row, not P.
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
            # p - share, in one difference: two sums that are subtracted leave rounding errors near the minimum.
            slope = log_p.exp().masked_fill(absent, 0.0) * weight.sum(1, keepdim=True) - weight
            of_rows.append(scale * (slope @ prototypes))
            of_scale.append((slope * similarity).sum(1))
        loss = torch.cat(losses)
        # The loss because second derivatives must find the graph in what is saved (`differentiable_once`).
        ctx.save_for_backward(loss, torch.cat(of_rows), torch.cat(of_scale))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, of_rows, of_scale = ctx.saved_tensors
        return None, grad[:, None] * of_rows, None, None, None, (grad * of_scale).sum()
