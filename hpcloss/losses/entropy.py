"""Contrast of uncertain pixels with certain ones (entropy-guided)."""

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
    """The function of `EntropyGuidedContrastLoss`: the inputs of its `forward`, then its options."""
    check_probs(features, probs)
    probs, known, gather = plain(probs), labels is not None, has_peers(gather)
    labels = labels_of_map(features, labels if labels is not None else probs.argmax(1))
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
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
    # Each pair of a class and a side of the threshold is one class of a single region.
    joint = by_entropy.replace(num_classes=2 * num_classes)
    segment = by_entropy.segment_of_row() if gather else None  # 2 C for dead rows
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
    """Contrast of pixels with a high prediction entropy with pixels of a low one.

        L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        H_i = -Σ_c p_ic log p_ic

    p_i is the predicted distribution of pixel i and H_i its entropy, high above a threshold. l_ij is the cosine of
    pixels i and j, divided by the temperature. Anchors are the high-entropy pixels. P(i), the positives of anchor i,
    are the low-entropy pixels of the whole batch with its label. N(i), the negatives, are the low-entropy pixels with
    another label.

    The loss pulls uncertain pixels to certain ones of their class and pushes them away from certain ones of other
    classes. An anchor counts if it has a positive and a negative; `denominator="all"` needs no negative. If no anchor
    counts, the loss is 0 with zero gradients. A negative or non-finite probability of a pixel that takes part makes the
    loss NaN.

    Source: Xie, Wu and Zhu, "EGCL-Net" (IET Image Processing 18(2), 2024). This is a reconstruction from the abstract;
    the paper's equations and code were not available. The abstract leaves open the threshold, the positives and the
    form: each is an option.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        threshold: "mean": the mean entropy of the pixels of the same image that take part. Or a number in `[0, 1]`, the
            share of the largest entropy ln C.
        entropy_classes: Contrast entropy too. Every pixel is an anchor and a key. Positives have the same label and the
            same side of the threshold.
        denominator: "own": as in the equation. "all": log Σ_{k∈P(i)∪N(i)} e^{l_ik} (SupCon).
        symmetric: Mean of this loss and the loss with high and low entropy exchanged. Invalid with `entropy_classes`.
        detach_keys: Keys get no gradient, so certain pixels are not pulled to uncertain ones.
        samples_per_class: Sample at most this many high-entropy and as many low-entropy pixels per class. None: all.
        ignore_index: Label or labels of pixels that are neither anchors nor keys. Default: -100, -1 and 255. Labels
            outside [0, C) are ignored too.
        normalize: Divide each embedding by its L2 norm. Embeddings with a norm of at most 1e-12 become zero and get no
            gradient. False: l_ij is the inner product over the temperature.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum", or "none" (a map `[B, *S]` with 0
            where no anchor counts).
        gather: On several processes, contrast with the pixels of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> features = torch.randn(2, 16, 32, 32, requires_grad=True)
        >>> probs = torch.randn(2, 4, 32, 32).softmax(1)  # the labels are its argmax
        >>> loss = hpcloss.EntropyGuidedContrastLoss(samples_per_class=64)(features, probs)
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([2, 16, 32, 32])
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
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            probs: Class probabilities `[B, C, *S]`, averaged over branches if there are several. They get no gradient.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour. None: the most probable class.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`.
        """
        return unchecked(entropy_guided_contrast_loss)(features, probs, labels, **self.options)


def _is_high(probs: Tensor, valid: Tensor, known: bool, threshold: float | str) -> tuple[Tensor, Tensor]:
    """Whether each pixel has high entropy [B, *S], and a factor of the loss [].

    The factor is NaN if an entropy is not finite, else 1. A comparison with NaN is False: without the factor such a
    pixel would pass for a certain one.

    Args:
        valid: Pixels that take part. Their mean entropy per image is the threshold "mean".
        known: Labels are given, so an entropy that is not finite matters only in valid pixels.
    """
    entropy = torch.special.entr(probs.detach().to(statistics_dtype(probs.dtype))).sum(1)
    unknown = ~entropy.isfinite() & (valid if known else True)
    visible = torch.where(unknown.any(), math.nan, entropy.new_ones(()))
    if not isinstance(threshold, str):
        return entropy > threshold * math.log(probs.shape[1]), visible
    axes = tuple(range(1, entropy.dim()))
    total = torch.where(valid, entropy, 0.0).sum(axes, keepdim=True)
    return entropy > total / valid.sum(axes, keepdim=True).clamp(min=1), visible
