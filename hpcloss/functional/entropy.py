"""Contrast of uncertain pixels with certain ones: entropy-guided."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    check_classes_and_ignored,
    check_probs,
    check_used,
    checked,
    count,
    integers,
    labels_of_map,
)
from hpcloss.distributed import gather_keys, gather_labels, has_peers
from hpcloss.functional.arithmetic import inverse_temperature, reduce
from hpcloss.functional.contrast import Contrast
from hpcloss.ops import plain, statistics_dtype
from hpcloss.pack import Rows, pack
from hpcloss.partition import Pairs, class_sort, from_offsets, from_offsets_against
from hpcloss.sampling import sample
from hpcloss.sorting import is_ignored


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
    probs = plain(probs)
    known = labels is not None
    labels = labels_of_map(features, labels if labels is not None else probs.argmax(1))
    ignored = integers("ignore_index", ignore_index)
    num_classes, flat = probs.shape[1], labels.reshape(-1)
    check_classes_and_ignored(num_classes, ignored)
    backend, gather = resolve(backend, features), has_peers(gather)
    valid = ~is_ignored(labels, ignored, num_classes)
    entropy = torch.special.entr(probs.detach().to(statistics_dtype(probs.dtype))).sum(1)
    high = _is_high(entropy, valid, threshold, num_classes)
    # Comparisons with NaN are False: without this factor such a pixel would pass for a certain one, and its image too.
    unknown = ~entropy.isfinite() & (valid if known else True)
    visible = torch.where(unknown.any(), math.nan, entropy.new_ones(()))
    # Sorted by (entropy, class): the low-entropy pixels are the first C segments, the others the last C.
    order, offsets, _ = class_sort(flat, high.long(), 2, ignore_index=ignored, num_classes=num_classes)
    if check_finite:
        check_used(order, offsets[-1:], probs=probs)
    if samples_per_class is not None and flat.numel():
        most = min(count("samples_per_class", samples_per_class), flat.numel())
        order, offsets = sample(order, offsets, most, num_pixels=flat.numel())
    if check_finite:
        check_used(temperature=temperature)
        check_used(order, offsets[-1:], features=features)
    whole = samples_per_class is None
    rows = pack(features, order, offsets[-1:], normalize=normalize, permutation=whole, backend=backend)
    scale, bound = inverse_temperature(temperature, rows, normalize)
    recipe = Contrast(rows, denominator, 0.0, 0.0, scale, bound, True, backend)

    def reduced(pairs: Pairs, keys: Rows | None) -> Tensor:
        loss, counted = recipe(pairs, keys)
        return reduce(loss * visible.to(loss.dtype), counted, reduction, order, labels, gather=gather)

    # Views, as compilers want no tensor twice among the arguments of a primitive.
    keys = rows.detach() if detach_keys else Rows(rows.data.view_as(rows.data), rows.companion.view_as(rows.companion))
    if gather:  # the segment of each row, 2 C for the dead
        segment = torch.searchsorted(offsets[1:], torch.arange(order.numel(), device=order.device), right=True)
    if entropy_classes:
        pairs = from_offsets(order, offsets, 2 * num_classes, False)
        if gather:
            return reduced(*gather_keys(keys, pairs, segment))
        return reduced(pairs, keys if detach_keys else None)
    key_offsets = offsets
    if gather:
        everyone = gather_labels(segment)
        key_order, key_offsets, _ = class_sort(everyone.labels, num_classes=2 * num_classes)
        keys = everyone.keys(keys, key_order)
    (of_low, of_high), (low, high) = [(at[: num_classes + 1], at[num_classes:]) for at in (offsets, key_offsets)]
    loss = reduced(from_offsets_against(order, of_high, low, num_classes), keys)
    if not symmetric:
        return loss
    return (loss + reduced(from_offsets_against(order, of_low, high, num_classes), keys)) / 2


def _is_high(entropy: Tensor, valid: Tensor, threshold: float | str, num_classes: int) -> Tensor:
    """Pixels whose entropy [B, *S] is above the mean of their image's valid pixels, or above a share of ln C."""
    if not isinstance(threshold, str):
        return entropy > threshold * math.log(num_classes)
    axes = tuple(range(1, entropy.dim()))
    total = torch.where(valid, entropy, 0.0).sum(axes, keepdim=True)
    return entropy > total / valid.sum(axes, keepdim=True).clamp(min=1)
