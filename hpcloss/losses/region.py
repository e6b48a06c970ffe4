"""Region-based pixel contrast: hard-positive (PHPC) and supervised (Hu et al.)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hpcloss.checks import IGNORED, at_least_zero, check_options
from hpcloss.functional.region import region_phpc_loss, region_supcon_loss
from hpcloss.losses.base import Loss


class RegionPHPCLoss(Loss):
    r"""Pixel-level contrast within regions that pulls hard positives hardest.

        L_i = Σ_{j∈P(i)} w_ij [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        w_ij = softmax_{j∈P(i)}( -hardness · s_ij )

    s_ij is the cosine of pixels i and j, l_ij = s_ij / temperature; P(i) and N(i) are the other pixels of i's region
    with its label and with another one. Weights are constants to the gradient unless `detach_weights=False`.

    Source: Tang et al., "Hard positives oriented contrastive learning" (ISBI 2023; Pattern Recognition 2024). The
    weighting is our reading of their abstract and figure (dissimilar positives are "strongly weighted"), not a formula
    the authors committed; their published code puts exp(-β s) inside the denominator, where it does not emphasise hard
    positives: that form, without the code's defects, is `RegionPHPCLoss.published`.

    Args:
        region_size: pixels of the feature map per region and axis (int or one per axis); None: the whole map is one
            region. Cells are pooled over the batch, remainder pixels form smaller regions.
        temperature: positive number, or a 0-dim tensor (learnable).
        hardness: 0 weighs all positives alike; larger pulls dissimilar ones more (e^{2·hardness} between extremes).
        num_classes: labels outside [0, num_classes) are ignored; also makes sorting cheaper.
        samples_per_class: draw at most this many pixels per region and class (needs num_classes).
        max_regions: draw at most this many of the regions that hold an anchor and two labels.
        local_size: also contrast each pixel with the small cells of this size inside its region, one at a time, keys
            repeated to the number of pixels of region_size, also where the map ends before (the paper's large and small
            regions); must divide region_size.
        denominator: "own" (above), "all" (every other pixel of the region, SupCon) or "negatives".
        background: label that is a key but never an anchor; None: every class has anchors.
        ignore_index: label or labels of pixels that take no part.
        per_image: regions do not reach across images.
        normalize: L2-normalise features; rows of norm up to 1e-12 become zero and get no gradient.
        reduction: "mean" over counted anchors, "class" (mean of class means), "region" (mean of region means, as the
            papers), "sum", or "none" (a map [B, *S], 0 where not counted).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_labels: raise for labels outside [0, num_classes) that are not ignored (waits for the device).
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".

    An anchor counts if its region holds a positive and (except for "all") a negative. No counted anchor: 0, joined to
    the graph. Raises ValueError for shapes and hyper-parameters, TypeError for dtypes, NotImplementedError for a
    backend that cannot run; never for data. Differentiating twice raises.
    """

    discount: float  # β of the published form, else 0

    def __init__(
        self,
        region_size: int | Sequence[int] | None = 16,
        temperature: float | Tensor = 0.1,
        hardness: float = 1.0,
        *,
        num_classes: int | None = None,
        samples_per_class: int | None = None,
        max_regions: int | None = None,
        local_size: int | Sequence[int] | None = None,
        denominator: str = "own",
        background: int | None = 0,
        ignore_index: int | Sequence[int] = IGNORED,
        per_image: bool = False,
        detach_weights: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_labels: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            region_phpc_loss,
            region_size=region_size, temperature=temperature, hardness=hardness, num_classes=num_classes,
            samples_per_class=samples_per_class, max_regions=max_regions, local_size=local_size,
            denominator=denominator, discount=0.0, background=background, ignore_index=ignore_index,
            per_image=per_image, detach_weights=detach_weights, normalize=normalize, reduction=reduction,
            gather=gather, check_labels=check_labels, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    @classmethod
    def published(cls, beta: float = 0.1, **options: Any) -> RegionPHPCLoss:
        """The form of the authors' code, cleaned: uniform positives, each discounted in its own denominator.

        Options are the constructor's; as in their code the default is the mean of region means, and hardness 0.
        Raises ValueError unless beta is finite and at least 0.

            L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} e^{-β s_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

        Not reproduced: the anchor among its own negatives, class ids as weights, mis-aligned quadrants, the rank-1
        hardness whose square root of a product is NaN (the pair's own similarity stands in its place).
        """
        at_least_zero("beta", beta)
        loss = cls(**{"hardness": 0.0, "reduction": "region", **options})
        loss.discount = float(beta)
        check_options(region_phpc_loss, loss.options)
        return loss

    def forward(
        self, features: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """features [B, D, *S], any float dtype and strides; labels [B, *S] or [B, 1, *S], resized by nearest neighbour.

        With `return_stats` also a dict of detached 0-dim tensors: the share of foreground pixels that count, positives
        per anchor, mean positive and negative similarity, and the effective over the actual number of positives.
        """
        return region_phpc_loss(features, labels, **self.options, return_stats=return_stats)


class RegionSupConLoss(Loss):
    r"""Local supervised contrast: SupCon within blocks of pixels.

        L_i = -1/|P(i)| Σ_{j∈P(i)} [ l_ij - log Σ_{a≠i} e^{l_ia} ]

    Hu et al., "Semi-supervised contrastive learning for label-efficient medical image segmentation" (MICCAI 2021),
    block mode: all pixels of a block over the batch form one set, background pixels are keys but no anchors. The same
    as `RegionPHPCLoss(hardness=0, denominator="all")`, which documents the arguments; the paper's code averages block
    means (`reduction="region"`).
    """

    def __init__(
        self,
        region_size: int | Sequence[int] | None = 32,
        temperature: float | Tensor = 0.1,
        *,
        num_classes: int | None = None,
        samples_per_class: int | None = None,
        max_regions: int | None = None,
        background: int | None = 0,
        ignore_index: int | Sequence[int] = IGNORED,
        per_image: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_labels: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            region_supcon_loss,
            region_size=region_size, temperature=temperature, num_classes=num_classes,
            samples_per_class=samples_per_class, max_regions=max_regions, background=background,
            ignore_index=ignore_index, per_image=per_image, normalize=normalize, reduction=reduction,
            gather=gather, check_labels=check_labels, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """features [B, D, *S], labels [B, *S] or [B, 1, *S], as in `RegionPHPCLoss.forward`."""
        return region_supcon_loss(features, labels, **self.options, return_stats=return_stats)
