"""The contrast by labels that most pixel losses are: three denominators over one set of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.pack import Rows
from hpcloss.pairs import pair_lse, pair_mean
from hpcloss.partition import Pairs


class Contrast:
    """The three denominators of a label-driven contrast, for one set of anchors and any set of keys."""

    def __init__(
        self,
        rows: Rows,
        denominator: str,
        hardness: float,
        discount: float,
        scale: Tensor,
        scale_bound: float | None,
        detach_weights: bool,
        backend: str,
    ):
        self.rows, self.denominator, self.hardness, self.discount = rows, denominator, hardness, discount
        self.scale, self.scale_bound, self.detach_weights, self.backend = scale, scale_bound, detach_weights, backend

    def __call__(self, pairs: Pairs, keys: Rows | None = None, multiplicity: int = 1) -> tuple[Tensor, Tensor]:
        """Loss of each anchor [N], 0 where it is not counted, and which are counted.

        multiplicity: how often each key stands in the denominators.
        """
        positives, negatives = pairs.counts()
        counted = (positives if self.denominator == "all" else torch.minimum(positives, negatives)) > 0
        rule = "others" if self.denominator == "all" else "negatives"
        lse = pair_lse(
            self.rows, pairs, rule, self.scale, keys=keys, scale_bound=self.scale_bound, backend=self.backend
        )
        bound = self.scale_bound
        if multiplicity > 1:  # which a bound of the denominators has to know
            lse = lse + math.log(multiplicity)
            bound = None if bound is None else bound + math.log(multiplicity)
        own = self.denominator == "own"
        mean, _ = pair_mean(
            self.rows, pairs, "own" if own else "logit", self.scale, keys=keys, stat=lse if own else None,
            hardness=self.hardness, discount=self.discount, detach_weights=self.detach_weights,
            scale_bound=bound, backend=self.backend,
        )  # fmt: skip
        if own and not self.discount:
            return mean, counted  # 0 where not counted: no positives is no mean, no negatives log(1 + 0)
        return torch.where(counted, mean if own else lse - mean, 0.0), counted
