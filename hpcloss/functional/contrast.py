"""The contrast by labels that most pixel losses are: three denominators over one set of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpcloss.pack import Rows
from hpcloss.pairs import pair_cross_entropy, pair_lse, pair_mean
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
        counted = pairs.counted(need_negatives=self.denominator != "all")
        if self.denominator == "all":
            loss = self._against_all(pairs, keys)
            return loss if multiplicity == 1 else torch.where(counted, loss + math.log(multiplicity), 0.0), counted
        lse = pair_lse(
            self.rows, pairs, "negatives", self.scale, keys=keys, scale_bound=self.scale_bound, backend=self.backend
        )
        bound = self.scale_bound
        if multiplicity > 1:  # which a bound of the denominators has to know
            lse = lse + math.log(multiplicity)
            bound = None if bound is None else bound + math.log(multiplicity)
        if self.denominator == "negatives":
            return torch.where(counted, lse - self._mean(pairs, keys, self.detach_weights), 0.0), counted
        mean, _ = pair_mean(
            self.rows, pairs, "own", self.scale, keys=keys, stat=lse, hardness=self.hardness, discount=self.discount,
            detach_weights=self.detach_weights, scale_bound=bound, backend=self.backend,
        )  # fmt: skip
        # Without a discount the mean is 0 where not counted: no positives is no mean, no negatives log(1 + 0).
        return torch.where(counted, mean, 0.0) if self.discount else mean, counted

    def _against_all(self, pairs: Pairs, keys: Rows | None) -> Tensor:
        """lse - mean of the positives [N], 0 where no positive is."""
        loss, _, _ = pair_cross_entropy(
            self.rows, pairs, self.scale, keys=keys, hardness=self.hardness, scale_bound=self.scale_bound,
            backend=self.backend,
        )  # fmt: skip
        if self.hardness and not self.detach_weights:
            # Both means have one value; their gradients differ by what flows through the weights.
            loss = loss - (self._mean(pairs, keys, False) - self._mean(pairs, keys, True))
        return loss

    def _mean(self, pairs: Pairs, keys: Rows | None, detach_weights: bool) -> Tensor:
        """Weighted mean of the positives' logits [N]."""
        return pair_mean(
            self.rows, pairs, "logit", self.scale, keys=keys, hardness=self.hardness, detach_weights=detach_weights,
            scale_bound=self.scale_bound, backend=self.backend,
        )[0]  # fmt: skip
