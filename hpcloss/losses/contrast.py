"""The contrast by labels that most losses of pixels are: three denominators over one set of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.plan.partition import Pairs
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows
from hpcloss.primitives.scale import Scale


def contrast(
    rows: Rows,
    pairs: Pairs,
    *,
    scale: Scale,
    keys: Rows | None = None,
    denominator: str = "own",
    hardness: float = 0.0,
    discount: float = 0.0,
    detach_weights: bool = True,
    multiplicity: int = 1,
) -> tuple[Tensor, Tensor]:
    """Loss of each anchor [N], 0 where it is not counted, and which are counted.

        "own":        L_i = sum_j w_ij [ log( e^{l_ij} e^{-discount s_ij} + D_i ) - l_ij ],  D_i = sum over negatives
        "negatives":  L_i = log D_i - sum_j w_ij l_ij
        "all":        L_i = log sum over positives and negatives - sum_j w_ij l_ij

    over the positives j of anchor i, with l = scale s and w = softmax over the positives of (-hardness s_ij).

    An anchor is counted if it has a positive and, except for "all", a negative. multiplicity: how often each key stands
    in the denominators.
    """
    counted = pairs.intervals.counted(need_negatives=denominator != "all")
    if denominator == "all":
        loss = _against_all(rows, pairs, scale, keys, hardness, detach_weights)
        return loss if multiplicity == 1 else torch.where(counted, loss + math.log(multiplicity), 0.0), counted
    lse = pair_lse(rows, pairs, "negatives", scale, keys=keys)
    if denominator == "negatives":
        lse = lse + math.log(multiplicity) if multiplicity > 1 else lse
        mean, _ = pair_mean(rows, pairs, "logit", scale, keys=keys, hardness=hardness, detach_weights=detach_weights)
        return torch.where(counted, lse - mean, 0.0), counted
    if multiplicity > 1:
        lse, scale = lse + math.log(multiplicity), scale.raised(math.log(multiplicity))
    mean, _ = pair_mean(
        rows, pairs, "own", scale, keys=keys, stat=lse, hardness=hardness, discount=discount,
        detach_weights=detach_weights,
    )  # fmt: skip
    # Without a discount the mean is 0 where not counted: no positives is no mean, no negatives log(1 + 0).
    return torch.where(counted, mean, 0.0) if discount else mean, counted


def _against_all(
    rows: Rows, pairs: Pairs, scale: Scale, keys: Rows | None, hardness: float, detach_weights: bool
) -> Tensor:
    """The log-sum-exp less the positives' mean [N], 0 where no positive is."""
    loss, _, _ = pair_cross_entropy(rows, pairs, scale, keys=keys, hardness=hardness)
    if not hardness or detach_weights:
        return loss
    # Both means have one value; their gradients differ by what flows through the weights.
    differentiated, detached = (
        pair_mean(rows, pairs, "logit", scale, keys=keys, hardness=hardness, detach_weights=detach)[0]
        for detach in (False, True)
    )
    return loss - (differentiated - detached)
