"""Region-based pixel contrast: hard-positive (PHPC) and supervised (Hu et al.)."""

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
    """Region-based hard-positive pixel contrast; equations, arguments and sources in `RegionPHPCLoss`.

    `discount` is the published in-denominator weight exp(-discount s_ij) of a positive in its own denominator.
    """
    labels, gather = labels_of_map(features, labels), has_peers(gather)
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
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
        backend: "auto", "dense", "blockwise" or "triton".

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
        _ = loss.options  # raises where the denominator leaves a discount no part
        return loss

    def forward(
        self, features: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """features [B, D, *S], any float dtype and strides; labels [B, *S] or [B, 1, *S], resized by nearest neighbour.

        With `return_stats` also a dict of detached 0-dim tensors: the share of foreground pixels that count, positives
        per anchor, mean positive and negative similarity, and the effective over the actual number of positives.
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
    """Local supervised contrast of Hu et al. 2021; equation and arguments in `RegionSupConLoss`."""
    return unchecked(region_phpc_loss)(
        features, labels, region_size, temperature, 0.0, num_classes=num_classes, samples_per_class=samples_per_class,
        max_regions=max_regions, denominator="all", background=background, ignore_index=ignore_index,
        per_image=per_image, normalize=normalize, reduction=reduction, gather=gather, check_labels=check_labels,
        check_finite=check_finite, return_stats=return_stats, backend=backend,
    )  # fmt: skip


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
        return_stats = boolean("return_stats", return_stats)
        return unchecked(region_supcon_loss)(features, labels, **self.options, return_stats=return_stats)


def _grid(labels: Tensor, size: int | Sequence[int] | None, per_image: bool, name: str = "region_size") -> Grid:
    """The cells of this size of a label map [B, *S]."""
    spatial = tuple(labels.shape[1:])
    return Grid(labels.shape[0], spatial, region_shape(size, spatial, name), per_image)


def _region_ids(pairs: Pairs, distinct_by_rank: bool) -> Tensor:
    """The region of each row [N], by a number that no other rank has if asked."""
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
    """Which pairs of a label map [B, *S] count.

    Also the number in the grid of each region [R], None where regions are the grid's; and with `num_classes` the number
    of labels that are neither a class nor ignored []. pooled: regions reach across ranks, which draw the same ones.
    Shapes are static: of the regions chosen and the pixels sampled only the most there can be is known.
    """
    flat, num_regions = labels.reshape(-1), grid.num_regions()
    regions: Tensor | Grid = grid
    region_ids = None
    cell = [min(along, extent) for along, extent in zip(grid.size, grid.spatial)]
    region_pixels = math.prod(cell) * (1 if grid.per_image else grid.batch)
    if pooled and max_regions is not None:
        check_same_regions(labels.device, num_regions)  # before the ranks draw some: all of them do or none
    if max_regions is not None and max_regions < num_regions:
        alive = ~is_ignored(flat, ignored, num_classes)
        anchor = alive if background is None else alive & (flat != background)
        regions, region_ids = choose_regions(
            grid.ids(labels.device), num_regions, flat, alive, anchor, max_regions, agree if pooled else None
        )
        num_regions = max_regions
    live = num_regions * region_pixels  # the rows that may not be dead, if there are so many
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
    """What a trainer logs, as 0-dim tensors without gradient; means over the counted anchors, of all ranks with
    `gather`."""
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
            # 1 / sum of squared weights, over the number of positives.
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
