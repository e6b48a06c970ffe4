"""Contrast of uncertain pixels with certain ones: entropy-guided (EGCL-Net)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcloss.checks import IGNORED
from hpcloss.functional.entropy import entropy_guided_contrast_loss
from hpcloss.losses.base import Loss


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
        backend: "auto", "blockwise" or "triton".

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
        return entropy_guided_contrast_loss(features, probs, labels, **self.options)
