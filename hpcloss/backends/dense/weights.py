"""The weights of an anchor's positives: a softmax of -hardness s_ij + log_weight_j over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpcloss.backends.arithmetic import LN2, LOG2E
from hpcloss.backends.dense.batches import Batch, softmax_terms


class Weights(NamedTuple):
    """The weights of the positives in a batch.

    shares [R, n, m]: the weights, 0 for pairs that are no positives. total [R, n, 1]: the sum before normalisation,
    relative to 2 to the power of `shift`.
    """

    shares: Tensor
    total: Tensor
    shift: Tensor | float = 0.0

    def there(self) -> Tensor:
        """Which anchors have a positive [R, n, 1]."""
        return self.total != 0

    def mass(self) -> Tensor:
        """The log-sum-exp of the exponents [R, n, 1], -inf without a positive."""
        return (self.total.log2() + self.shift) * LN2


def weights(batch: Batch, logits: Tensor, of_logits: Tensor | None, log_weight: Tensor | None = None) -> Weights:
    """Weights for the exponents of_logits * logits + log_weight_j; of_logits None: without the first term.

    logits [R, n, m], to base 2, of all pairs. Their exponents are to base 2 as well.
    """
    if of_logits is None and log_weight is None:
        inside = batch.inside()
        count = inside.sum(2, keepdim=True)
        return Weights(inside * count.clamp(min=1).reciprocal_(), count)
    exponent = torch.zeros_like(logits) if of_logits is None else logits * of_logits
    if log_weight is not None:
        exponent += batch.take_keys(log_weight.to(logits.dtype) * LOG2E)[:, None]
        exponent.clamp_(min=batch.lowest)  # -inf of a weight of zero
    softmax = softmax_terms(batch.exclude(exponent, "positives"), batch.lowest)
    return Weights(softmax.shares(), softmax.total, softmax.shift)
