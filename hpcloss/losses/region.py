"""Contrast of pixels within regions: hard-positive (PHPC) and supervised (Hu et al.)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hpcloss.checks import at_least_zero, boolean, check_used
from hpcloss.distributed import agree, check_same_regions, distinct, gather_keys, has_peers
from hpcloss.losses.cells import contrast_with_cells
from hpcloss.losses.module import Loss
from hpcloss.losses.options import checked, unchecked
from hpcloss.losses.reduction import reduce, sum_of
from hpcloss.plan.labels import IGNORED, check_label_values, is_ignored, labels_of_map
from hpcloss.plan.partition import Pairs, class_sort, partition
from hpcloss.plan.regions import Grid, region_shape
from hpcloss.plan.sampling import choose_regions
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale


@checked
def region_phpc_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 16,
    temperature: float | Tensor = 0.1,
    hardness: float = 1.0,
    *,
    num_classes: int | None = None,
    samples_per_class: int | None = None,
    max_regions: int | None = None,
    local_size: int | Sequence[int] | None = None,
    denominator: str = "own",
    discount: float = 0.0,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    detach_weights: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_labels: bool = False,
    check_finite: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The function of `RegionPHPCLoss`: the inputs of its `forward`, then its options.

    Args:
        discount: β of `RegionPHPCLoss.published`: a positive counts as e^{l_ij - discount · s_ij} in its own
            denominator. Needs `denominator="own"`. 0: no discount.
    """
    labels, gather = labels_of_map(features, labels), has_peers(gather)
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
    if check_labels:
        check_label_values(labels, ignored, num_classes)
    pooled, flat = gather and not per_image, labels.reshape(-1)  # pooled: regions that reach across ranks
    grid = _grid(labels, region_size, per_image)
    pairs, region_ids, stray = _plan(
        labels, grid, num_classes, samples_per_class, max_regions, background, ignored, pooled
    )
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), features=features)
    whole = samples_per_class is None and pairs.order.numel() == flat.numel()
    rows = pack(features, pairs.order, pairs.live(), normalize=normalize, permutation=whole, backend=backend)
    scale, keys = Scale.of(temperature, rows, normalize), None
    if pooled:
        pairs, keys = gather_keys(rows, pairs, flat[pairs.order])
    recipe = functools.partial(
        contrast, rows, scale=scale, denominator=denominator, hardness=hardness, discount=discount,
        detach_weights=detach_weights,
    )  # fmt: skip
    loss, counted = recipe(pairs, keys=keys)
    if local_size is not None:
        cells = _grid(labels, local_size, per_image, "local_size")
        loss = loss + contrast_with_cells(
            recipe, rows, pairs, features, flat, grid, cells, region_ids, background, normalize, pooled
        )

    regions = _region_ids(pairs, distinct_by_rank=gather and per_image) if reduction == "region" else None
    result = reduce(loss, counted, reduction, pairs.order, labels, regions, gather=gather)
    return (result, _stats(rows, pairs, keys, hardness, counted, stray, gather)) if return_stats else result


class RegionPHPCLoss(Loss):
    """Hard-positive contrast of pixels within regions of the feature map (PHPC).

        L_i = Σ_{j∈P(i)} w_ij [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        w_ij = softmax_{j∈P(i)}( -hardness · s_ij )

    s_ij is the cosine of pixels i and j. l_ij = s_ij / temperature is their logit. P(i), the positives of anchor i, are
    the other pixels of its region with its label. N(i), the negatives, are the pixels of its region with another label.

    The loss pulls an anchor to its positives, and the least similar ones most. It pushes the anchor away from its
    negatives. An anchor counts if it has a positive and a negative; `denominator="all"` needs no negative. If no anchor
    counts, the loss is 0 with zero gradients.

    Source: Tang et al., "Hard positives oriented contrastive learning" (ISBI 2023; Pattern Recognition 2024). Their
    printed equation was not available to us: the weights are our reading of the abstract and the figure, where
    dissimilar positives are "strongly weighted". The authors' code has a weight inside the denominator instead:
    `RegionPHPCLoss.published`.

    Args:
        region_size: Side of a region in pixels of the feature map: one number, or one per axis. A region is the same
            cell of all images of the batch. Cells at the border may be smaller. None: the whole map is one region.
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        hardness: Exponent of the weights. 0: all positives have the same weight. Positive: dissimilar positives weigh
            more, by at most e^{2 · hardness}. Negative: similar positives weigh more.
        num_classes: Number of classes C. Labels outside [0, C) are then ignored, and sorting is faster. None: any
            integer is a class.
        samples_per_class: Sample at most this many pixels per class and region, with torch's generator. Needs
            `num_classes`. None: all pixels.
        max_regions: Sample at most this many regions among those that hold an anchor and two labels. None: all regions.
        local_size: Also contrast each anchor with the small cells of this size in its region, one cell at a time. The
            mean over the cells in which the anchor counts is added to its loss. Each key of a cell counts as often as a
            region has cells. Must divide `region_size` on every axis. None: no small cells.
        denominator: "own": as in the equation. "all": log Σ_{a≠i} e^{l_ia} over the region (SupCon). "negatives": log
            Σ_{n∈N(i)} e^{l_in}.
        background: Label of pixels that are keys and never anchors. None: every class has anchors.
        ignore_index: Label or labels of pixels that are neither anchors nor keys. Default: -100, -1 and 255.
        per_image: Keep the images of a batch apart: a region is then a cell of one image.
        detach_weights: Treat the weights w_ij as constants in the gradient. False: differentiate them, which can push
            positives away.
        normalize: Divide each embedding by its L2 norm. Embeddings with a norm of at most 1e-12 become zero and get no
            gradient. False: s_ij is the inner product.
        reduction: "mean" over counted anchors, "class" (mean of class means), "region" (mean of region means, as in the
            papers), "sum", or "none" (a map `[B, *S]` with 0 where no anchor counts).
        gather: On several processes, contrast with the pixels of all ranks; value and gradient are those of the whole
            batch (`hpcloss.distributed`). On one process it changes nothing.
        check_labels: Raise ValueError for a label outside [0, num_classes) that is not in `ignore_index`. Synchronises
            with the device. Needs `num_classes`.
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
        >>> labels = torch.randint(4, (2, 32, 32))
        >>> loss = hpcloss.RegionPHPCLoss(region_size=16)(features, labels)
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([2, 16, 32, 32])
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
        """The form of the authors' code: uniform weights, and a discount for a positive in its own denominator.

            L_i = 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij - β s_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

        Source: the code of Tang et al. (ISBI 2023). Four of its defects are left out: the anchor among its own
        negatives, class ids as weights, misaligned quadrants, and a hardness that becomes NaN (here s_ij takes its
        place).

        Args:
            beta: β in the equation, at least 0.
            **options: Options of `RegionPHPCLoss`. Other defaults, as in the code: `hardness=0` and
                `reduction="region"`.

        Returns:
            The loss module.

        Raises:
            ValueError: beta is negative or not finite, or the denominator of a positive beta is not "own".
            TypeError: beta is not a number.
        """
        at_least_zero("beta", beta)
        loss = cls(**{"hardness": 0.0, "reduction": "region", **options})
        loss.discount = float(beta)
        _ = loss.options  # raises if the denominator takes no discount
        return loss

    def forward(
        self, features: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour.
            return_stats: Also return statistics for a logger.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`. With
                `return_stats` a pair of the loss and a dict of detached 0-dim tensors: `counted_anchors` (counted share
                of the anchors), `positives_per_anchor`, `positive_similarity` and `negative_similarity` (mean s_ij),
                `effective_positives` (effective share of the positives under the weights) and, with `num_classes`,
                `labels_outside` (number of labels that are neither a class nor ignored).
        """
        return_stats = boolean("return_stats", return_stats)
        return unchecked(region_phpc_loss)(features, labels, **self.options, return_stats=return_stats)


@checked
def region_supcon_loss(
    features: Tensor,
    labels: Tensor,
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
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The function of `RegionSupConLoss`: the inputs of its `forward`, then its options."""
    return unchecked(region_phpc_loss)(
        features, labels, region_size, temperature, 0.0, num_classes=num_classes, samples_per_class=samples_per_class,
        max_regions=max_regions, denominator="all", background=background, ignore_index=ignore_index,
        per_image=per_image, normalize=normalize, reduction=reduction, gather=gather, check_labels=check_labels,
        check_finite=check_finite, return_stats=return_stats, backend=backend,
    )  # fmt: skip


class RegionSupConLoss(Loss):
    """Supervised contrast (SupCon) of pixels within regions of the feature map.

        L_i = log Σ_{a≠i} e^{l_ia} - 1/|P(i)| Σ_{j∈P(i)} l_ij

    l_ij is the cosine of pixels i and j, divided by the temperature. P(i), the positives of anchor i, are the other
    pixels of its region with its label. a runs over all other pixels of the region.

    The loss pulls an anchor to its positives. It pushes the anchor away from all keys in the denominator. An anchor
    counts if it has a positive. If no anchor counts, the loss is 0 with zero gradients. `RegionPHPCLoss` with
    `hardness=0` and `denominator="all"` is the same loss.

    Source: Hu et al., "Semi-supervised contrastive learning for label-efficient medical image segmentation" (MICCAI
    2021), block mode. The paper's code averages the means of blocks: use `reduction="region"`.

    Args:
        region_size: Side of a region in pixels of the feature map: one number, or one per axis. A region is the same
            cell of all images of the batch. None: the whole map is one region.
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        num_classes: Number of classes C. Labels outside [0, C) are then ignored. None: any integer is a class.
        samples_per_class: Sample at most this many pixels per class and region. Needs `num_classes`. None: all pixels.
        max_regions: Sample at most this many regions among those that hold an anchor and two labels. None: all regions.
        background: Label of pixels that are keys and never anchors. None: every class has anchors.
        ignore_index: Label or labels of pixels that are neither anchors nor keys. Default: -100, -1 and 255.
        per_image: Keep the images of a batch apart: a region is then a cell of one image.
        normalize: Divide each embedding by its L2 norm. False: l_ij is the inner product over the temperature.
        reduction: "mean" over counted anchors, "class" (mean of class means), "region" (mean of region means), "sum",
            or "none" (a map `[B, *S]` with 0 where no anchor counts).
        gather: On several processes, contrast with the pixels of all ranks (`hpcloss.distributed`).
        check_labels: Raise ValueError for a label outside [0, num_classes) that is not in `ignore_index`. Synchronises
            with the device. Needs `num_classes`.
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 1, 3)
        >>> labels = torch.tensor([[[1, 1, 2]]])
        >>> loss = hpcloss.RegionSupConLoss(temperature=1.0, reduction="none")(features, labels)
        >>> loss  # log(e + 1) - 1 twice; the pixel of label 2 has no positive
        tensor([[[0.3133, 0.3133, 0.0000]]])
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
        """Compute the loss of a feature map.

        Args:
            features: `[B, D, *S]`, any float dtype and strides; S has one or more axes.
            labels: `[B, *S]` or `[B, 1, *S]`, integers or whole-number floats. Another resolution is resized by nearest
                neighbour.
            return_stats: Also return the statistics of `RegionPHPCLoss.forward`, a dict of 0-dim tensors.

        Returns:
            The loss in fp32 (float64 for float64 features): 0-dim, or `[B, *S]` for `reduction="none"`. With
                `return_stats` a pair of the loss and the statistics.
        """
        return_stats = boolean("return_stats", return_stats)
        return unchecked(region_supcon_loss)(features, labels, **self.options, return_stats=return_stats)


def _grid(labels: Tensor, size: int | Sequence[int] | None, per_image: bool, name: str = "region_size") -> Grid:
    """The grid of regions of this size on a label map [B, *S]."""
    spatial = tuple(labels.shape[1:])
    return Grid(labels.shape[0], spatial, region_shape(size, spatial, name), per_image)


def _region_ids(pairs: Pairs, distinct_by_rank: bool) -> Tensor:
    """The region of each row [N], optionally as a number that no other rank uses."""
    regions = pairs.intervals.region()
    return distinct(regions) if distinct_by_rank else regions


def _plan(
    labels: Tensor,
    grid: Grid,
    num_classes: int | None,
    samples_per_class: int | None,
    max_regions: int | None,
    background: int | None,
    ignored: tuple[int, ...],
    pooled: bool,
) -> tuple[Pairs, Tensor | None, Tensor | None]:
    """The pairs of a label map [B, *S] that count.

    Shapes are static: they depend on the largest possible number of sampled pixels, not on the data.

    Args:
        pooled: Regions reach across ranks, and all ranks sample the same regions.

    Returns:
        The pairs; the number in the grid of each region [R], None if the regions are those of the grid; the number of
            labels that are neither a class nor ignored [], None without `num_classes`.
    """
    flat, num_regions = labels.reshape(-1), grid.num_regions()
    regions: Tensor | Grid = grid
    region_ids = None
    cell = [min(along, extent) for along, extent in zip(grid.size, grid.spatial)]
    region_pixels = math.prod(cell) * (1 if grid.per_image else grid.batch)
    if pooled and max_regions is not None:
        check_same_regions(labels.device, num_regions)  # before ranks sample regions, which all do or none
    if max_regions is not None and max_regions < num_regions:
        alive = ~is_ignored(flat, ignored, num_classes)
        anchor = alive if background is None else alive & (flat != background)
        regions, region_ids = choose_regions(
            grid.ids(labels.device), num_regions, flat, alive, anchor, max_regions, agree if pooled else None
        )
        num_regions = max_regions
    live = num_regions * region_pixels  # the most rows that can be live
    if num_classes is None:
        pairs = partition(flat, regions, num_regions, background=background, ignore_index=ignored)
        return pairs.head(live), region_ids, None
    rows = class_sort(
        flat, regions, num_regions, background=background, ignore_index=ignored, num_classes=num_classes
    ).sampled(samples_per_class, region_pixels)
    return rows.pairs().head(live), region_ids, rows.outside


def _stats(
    rows: Rows,
    pairs: Pairs,
    keys: Rows | None,
    hardness: float,
    counted: Tensor,
    stray: Tensor | None,
    gather: bool,
) -> dict[str, Tensor]:
    """Statistics for a logger, as detached 0-dim tensors: means over counted anchors, with `gather` over all ranks."""
    with torch.no_grad():
        rows, one = rows.detach(), Scale.of(1.0, rows, False)
        at = pairs.intervals
        positives, negatives = at.counts()
        region = at.region()
        whole_region = pairs.replace(pos_start=at.key_start[region], pos_end=at.key_end[region])
        positive_mean, _ = pair_mean(rows, pairs, "logit", one, keys=keys)
        others_mean, _ = pair_mean(rows, whole_region, "logit", one, keys=keys)
        others_sum = others_mean * (positives + negatives)
        negative_mean = (others_sum - positive_mean * positives) / negatives.clamp(min=1)
        effective = torch.ones_like(positive_mean)
        if hardness:
            # 1 / (sum of squared weights · number of positives).
            mass, double_mass = (
                pair_lse(rows, pairs, "positives", one.times(-factor * hardness), keys=keys) for factor in (1, 2)
            )
            effective = torch.where(counted, torch.exp(2 * mass - double_mass) / positives.clamp(min=1), 0.0)
        number, anchors = sum_of(counted, gather), sum_of(at.is_anchor(), gather)
        weight = counted.to(positive_mean.dtype) / number.clamp(min=1)

        def average(values: Tensor) -> Tensor:
            return sum_of(weight * values, gather)

        stats = {} if stray is None else {"labels_outside": sum_of(stray, gather)}
        return {
            **stats,
            "counted_anchors": number.to(weight.dtype) / anchors.clamp(min=1),
            "positives_per_anchor": average(positives),
            "positive_similarity": average(positive_mean),
            "negative_similarity": average(negative_mean),
            "effective_positives": average(effective),
        }
