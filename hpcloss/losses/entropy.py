"""Contrast of uncertain pixels with certain ones: entropy-guided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hpcloss.checks import check_probs, check_used
from hpcloss.distributed import gather_keys, gather_labels, has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce
from hpcloss.operators import plain, statistics_dtype
from hpcloss.plan.labels import IGNORED, check_classes_and_ignored, is_ignored, labels_of_map
from hpcloss.plan.partition import Pairs, class_sort
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale


@checked
def entropy_guided_contrast_loss(
    features: Tensor,
    probs: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    threshold: float | str = "mean",
    entropy_classes: bool = False,
    denominator: str = "own",
    symmetric: bool = False,
    detach_keys: bool = True,
    samples_per_class: int | None = None,
    ignore_index: int | Sequence[int] = IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of high-entropy pixels with low-entropy ones; equations and arguments in `EntropyGuidedContrastLoss`."""
    check_probs(features, probs)
    probs, known, gather = plain(probs), labels is not None, has_peers(gather)
    labels = labels_of_map(features, labels if labels is not None else probs.argmax(1))
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
    num_classes = probs.shape[1]
    check_classes_and_ignored(num_classes, ignored)
    high, visible = _is_high(probs, ~is_ignored(labels, ignored, num_classes), known, threshold)
    # Sorted by (entropy, class): the low-entropy pixels are the first C segments, the others the last C.
    by_entropy = class_sort(labels, high.long(), 2, ignore_index=ignored, num_classes=num_classes)
    if check_finite:
        check_used(by_entropy.order, by_entropy.live(), probs=probs)
    by_entropy = by_entropy.sampled(samples_per_class)
    order, live, whole = by_entropy.order, by_entropy.live(), samples_per_class is None
    if check_finite:
        check_used(temperature=temperature)
        check_used(order, live, features=features)
    rows = pack(features, order, live, normalize=normalize, permutation=whole, backend=backend)
    scale = Scale.of(temperature, rows, normalize)

    def reduced(pairs: Pairs, keys: Rows | None) -> Tensor:
        loss, counted = contrast(rows, pairs, keys=keys, scale=scale, denominator=denominator)
        return reduce(loss * visible.to(loss.dtype), counted, reduction, order, labels, gather=gather)

    keys = rows.detach() if detach_keys else rows.view()
    # Every pair of a class and a side of the threshold as one class of a single region.
    joint = by_entropy.replace(num_classes=2 * num_classes)
    segment = by_entropy.segment_of_row() if gather else None  # 2 C for the dead
    if entropy_classes and segment is not None:
        return reduced(*gather_keys(keys, joint.pairs(), segment))
    if entropy_classes:
        return reduced(joint.pairs(), keys if detach_keys else None)
    of_keys = by_entropy
    if segment is not None:
        everyone = gather_labels(segment)
        sorted_keys = class_sort(everyone.labels, num_classes=2 * num_classes)
        keys, of_keys = everyone.keys(keys, sorted_keys.order), sorted_keys.replace(num_classes=num_classes)
    loss = reduced(by_entropy.region(1).against(of_keys.region(0)), keys)
    if not symmetric:
        return loss
    return (loss + reduced(by_entropy.region(0).against(of_keys.region(1)), keys)) / 2


class EntropyGuidedContrastLoss(Loss):
    r"""Pulls pixels of high entropy to those of low entropy of their class, away from those of other classes.

        H_i = -Σ_c p_ic log p_ic,   high where above the threshold
        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    p is the prediction, averaged over branches; l_ij = cosine / temperature. Anchors are the high-entropy pixels,
    P(i) and N(i) the low-entropy pixels of the whole batch with i's label and with another one.

    Source: Xie, Wu and Zhu, "EGCL-Net" (IET Image Processing 18(2), 2024). A reconstruction: only the abstract was
    available. What it leaves open is an option: where the entropy is cut (`threshold`), what a positive is
    (`entropy_classes`) and the form (`denominator`, `temperature`, `symmetric`, `detach_keys`).

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        threshold: "mean", the mean of H over the pixels of the same image that take part; or a share of ln C, the
            largest entropy there is, in [0, 1].
        entropy_classes: contrast entropy itself: positives are of one label and of one side of the threshold, every
            pixel is an anchor and every other one a key.
        denominator: "own" (above) or "all" (log Σ_{k∈P(i)∪N(i)} e^{l_ik}, SupCon).
        symmetric: the mean of L and of the same with high and low exchanged.
        detach_keys: gradients reach anchors alone, so that certain pixels are not pulled to uncertain ones.
        samples_per_class: draw at most this many high-entropy and as many low-entropy pixels per class.
        ignore_index: label or labels of pixels that take no part; labels outside [0, C) take none either.
        normalize: L2-normalise features; rows of norm up to 1e-12 become zero and get no gradient. False: the inner
            product takes the place of the cosine.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum", or "none" (a map [B, *S], 0 where
            not counted).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".

    Every class has anchors, the background as well. An anchor counts if it has a positive and (except for "all") a
    negative. No counted anchor: 0, joined to the graph. Probabilities of a pixel that takes part which are negative or
    not finite make the loss NaN. Raises ValueError for shapes and hyper-parameters, TypeError for dtypes,
    NotImplementedError for a backend that cannot run; never for data. Differentiating twice raises.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: float | str = "mean",
        entropy_classes: bool = False,
        denominator: str = "own",
        symmetric: bool = False,
        detach_keys: bool = True,
        samples_per_class: int | None = None,
        ignore_index: int | Sequence[int] = IGNORED,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            entropy_guided_contrast_loss,
            temperature=temperature, threshold=threshold, entropy_classes=entropy_classes, denominator=denominator,
            symmetric=symmetric, detach_keys=detach_keys, samples_per_class=samples_per_class,
            ignore_index=ignore_index, normalize=normalize, reduction=reduction, gather=gather,
            check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, probs: Tensor, labels: Tensor | None = None) -> Tensor:
        """features [B, D, *S]; probs [B, C, *S], not differentiated; labels [B, *S] or [B, 1, *S], resized by nearest
        neighbour; by default the most probable class."""
        return unchecked(entropy_guided_contrast_loss)(features, probs, labels, **self.options)


def _is_high(probs: Tensor, valid: Tensor, known: bool, threshold: float | str) -> tuple[Tensor, Tensor]:
    """Pixels of high entropy [B, *S]: above the mean of their image's valid pixels, or above a share of ln C.

    Also a factor of the loss [], which is NaN if an entropy is. Comparisons with NaN are False: without it such a pixel
    would pass for a certain one, and its image too. known: labels are given, so that only valid pixels matter.
    """
    entropy = torch.special.entr(probs.detach().to(statistics_dtype(probs.dtype))).sum(1)
    unknown = ~entropy.isfinite() & (valid if known else True)
    visible = torch.where(unknown.any(), math.nan, entropy.new_ones(()))
    if not isinstance(threshold, str):
        return entropy > threshold * math.log(probs.shape[1]), visible
    axes = tuple(range(1, entropy.dim()))
    total = torch.where(valid, entropy, 0.0).sum(axes, keepdim=True)
    return entropy > total / valid.sum(axes, keepdim=True).clamp(min=1), visible
