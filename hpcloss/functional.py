"""One function per loss: check once, say which pairs count, pack, compose the primitives, reduce.

Each loss is a recipe of a few lines over `pair_lse` and `pair_mean` on [N] vectors. The modules of `hpcloss.losses`
hold hyper-parameters and call these; `hpcloss.reference` writes the same losses out densely.

Common to all: `ignore_index` removes rows as anchors and as keys; an anchor that cannot be contrasted adds nothing
and is not counted; without any counted anchor the loss is 0, joined to the graph. Results are fp32, or float64
for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hpcloss.backends import resolve
from hpcloss.checks import (
    IGNORED,
    VECTORS_IGNORED,
    check_hard_negatives,
    check_label_values,
    check_region_options,
    check_vector_options,
    check_vectors,
    count,
    integers,
    labels_of_map,
    labels_of_vectors,
)
from hpcloss.pack import Rows, pack
from hpcloss.pairs import pair_lse, pair_lse_both, pair_mean
from hpcloss.partition import (
    Pairs,
    against_cells,
    class_sort,
    from_offsets,
    one_to_one,
    paired,
    partition,
    partition_against,
)
from hpcloss.regions import Grid, cells_of_regions, choose_regions, region_shape
from hpcloss.sampling import sample
from hpcloss.sorting import is_class, is_ignored, segment_bounds

# Groups of a memory bank's rows: one that holds nothing yet, one that belongs to no group.
UNFILLED, NO_GROUP = torch.iinfo(torch.int64).min + 1, torch.iinfo(torch.int64).min + 2
EXACT_SOFTPLUS = 40.0  # the default threshold of 20 is off by 2e-9

# ------------------------------------------------------------------------------------------------- pixel losses


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
    check_labels: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Region-based hard-positive pixel contrast; equations, arguments and sources in `RegionPHPCLoss`.

    `discount` is the published in-denominator weight exp(-discount s_ij) of a positive in its own denominator.
    """
    check_region_options(
        region_size, temperature, hardness, num_classes=num_classes, samples_per_class=samples_per_class,
        max_regions=max_regions, local_size=local_size, denominator=denominator, discount=discount,
        background=background, ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    labels = labels_of_map(features, labels)
    ignored = integers("ignore_index", ignore_index)
    num_classes = num_classes and count("num_classes", num_classes)
    samples_per_class = samples_per_class and count("samples_per_class", samples_per_class)
    max_regions = max_regions and count("max_regions", max_regions)
    if check_labels:
        check_label_values(labels, ignored, num_classes)
    backend = resolve(backend, features)
    size = region_shape(region_size, features.shape[2:])
    flat = labels.reshape(-1)
    pairs, region_ids, outside = _plan(
        labels, size, num_classes, samples_per_class, max_regions, background, ignored, per_image
    )
    whole = samples_per_class is None and pairs.order.numel() == flat.numel()
    rows = pack(features, pairs.order, pairs.live(), normalize=normalize, permutation=whole, backend=backend)
    scale, bound = _scale(temperature, rows, normalize)
    recipe = _Recipe(rows, denominator, hardness, discount, scale, bound, detach_weights, backend)
    loss, counted = recipe(pairs)
    if local_size is not None:
        local = region_shape(local_size, features.shape[2:], "local_size")
        loss = loss + _local_contrast(
            recipe, pairs, features, flat, region_ids, size, local, per_image, background, normalize
        )

    if reduction == "none":
        result = loss.new_zeros(flat.numel()).index_add(0, pairs.order, loss).view(labels.shape)
    else:
        group = {"class": lambda: flat[pairs.order], "region": pairs.region}.get(reduction)
        result = _reduce(loss, counted, reduction, group and group())
    if not return_stats:
        return result
    return result, _stats(recipe, pairs, counted, outside)


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
    check_labels: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Local supervised contrast of Hu et al. 2021; equation and arguments in `RegionSupConLoss`."""
    return region_phpc_loss(
        features, labels, region_size, temperature, 0.0, num_classes=num_classes, samples_per_class=samples_per_class,
        max_regions=max_regions, denominator="all", background=background, ignore_index=ignore_index,
        per_image=per_image, normalize=normalize, reduction=reduction, check_labels=check_labels,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip


def _plan(
    labels: Tensor,
    size: tuple[int, ...],
    num_classes: int | None,
    samples_per_class: int | None,
    max_regions: int | None,
    background: int | None,
    ignored: tuple[int, ...],
    per_image: bool,
) -> tuple[Pairs, Tensor | None, Tensor | None]:
    """Which pairs of a label map [B, *S] count; the number in the grid of each region [R], None where regions are the
    grid's; and with `num_classes` how many labels are no class and not ignored [].

    Shapes are static: of the regions chosen and the pixels sampled only the most there can be is known.
    """
    grid = Grid(labels.shape[0], tuple(labels.shape[1:]), size, per_image)
    flat, num_regions = labels.reshape(-1), grid.num_regions()
    regions: Tensor | Grid = grid
    region_ids = None
    cell = [min(along, extent) for along, extent in zip(size, grid.spatial)]
    region_pixels = math.prod(cell) * (1 if per_image else grid.batch)
    if max_regions is not None and max_regions < num_regions:
        alive = ~is_ignored(flat, ignored, num_classes)
        anchor = alive if background is None else alive & (flat != background)
        regions, region_ids = choose_regions(grid.ids(labels.device), num_regions, flat, alive, anchor, max_regions)
        num_regions = max_regions
    live = num_regions * region_pixels  # the rows that may not be dead, if there are so many
    if num_classes is None:
        pairs = partition(flat, regions, num_regions, background=background, ignore_index=ignored)
        return pairs.head(live), region_ids, None
    order, offsets, outside = class_sort(
        flat, regions, num_regions, background=background, ignore_index=ignored, num_classes=num_classes
    )
    if samples_per_class is not None and flat.numel():
        most = min(samples_per_class, region_pixels)
        order, offsets = sample(order, offsets, most, num_pixels=flat.numel())
    pairs = from_offsets(order, offsets, num_classes, is_class(background, num_classes))
    return pairs.head(live), region_ids, outside


class _Recipe:
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
        if multiplicity > 1:
            lse = lse + math.log(multiplicity)
        own = self.denominator == "own"
        mean, _ = pair_mean(
            self.rows, pairs, "own" if own else "logit", self.scale, keys=keys, stat=lse if own else None,
            hardness=self.hardness, discount=self.discount, detach_weights=self.detach_weights,
            scale_bound=self.scale_bound, backend=self.backend,
        )  # fmt: skip
        if own and not self.discount:
            return mean, counted  # 0 where not counted: no positives is no mean, no negatives log(1 + 0)
        return torch.where(counted, mean if own else lse - mean, 0.0), counted


def _local_contrast(
    recipe: _Recipe,
    pairs: Pairs,
    features: Tensor,
    labels: Tensor,
    region_ids: Tensor | None,
    size: tuple[int, ...],
    local: tuple[int, ...],
    per_image: bool,
    background: int | None,
    normalize: bool,
) -> Tensor:
    """Mean over the small cells of its region of each anchor's contrast against that cell alone [N]."""
    batch, spatial = features.shape[0], features.shape[2:]
    grid = Grid(batch, tuple(spatial), local, per_image)
    cells, num_cells = grid.ids(features.device), grid.num_regions()
    alive = torch.arange(pairs.order.numel(), device=features.device) < pairs.live()
    # Only pixels that are rows take part: the others (ignored, not sampled, region not chosen) get no cell.
    pixels = torch.where(alive, pairs.order.long(), labels.numel())
    taken = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=features.device).scatter_(0, pixels, True)[:-1]
    keys = partition(labels, torch.where(taken, cells, num_cells), num_cells, background=background)
    key_rows = pack(features, keys.order, keys.live(), normalize=normalize, backend=recipe.backend)
    multiplicity = math.prod([large // small for large, small in zip(size, local)])
    total = torch.zeros_like(recipe.rows.data[:, 0], dtype=recipe.scale.dtype)
    cells_met = torch.zeros_like(total)
    if region_ids is None:
        region_ids = torch.arange(pairs.key_end.numel(), device=features.device)
    for cell_of_region in cells_of_regions(region_ids, batch, spatial, size, local, per_image=per_image):
        cell_pairs = against_cells(pairs, keys, cell_of_region, labels, background)
        loss, counted = recipe(cell_pairs, key_rows, multiplicity)
        total, cells_met = total + loss, cells_met + counted
    return total / cells_met.clamp(min=1)


def _stats(recipe: _Recipe, pairs: Pairs, counted: Tensor, outside: Tensor | None) -> dict[str, Tensor]:
    """What a trainer logs, as 0-dim tensors without gradient; means over the counted anchors."""
    with torch.no_grad():
        rows, backend = recipe.rows.detach(), recipe.backend
        unit_scale = torch.ones_like(recipe.scale)
        positives, negatives = pairs.counts()
        region = pairs.region()
        whole_region = pairs.replace(pos_start=pairs.key_start[region], pos_end=pairs.key_end[region])
        positive_mean, _ = pair_mean(rows, pairs, "logit", unit_scale, backend=backend)
        others_mean, _ = pair_mean(rows, whole_region, "logit", unit_scale, backend=backend)
        others_sum = others_mean * (positives + negatives)
        negative_mean = (others_sum - positive_mean * positives) / negatives.clamp(min=1)
        effective = torch.ones_like(positive_mean)
        if recipe.hardness:
            # 1 / sum of squared weights, over the number of positives.
            mass, double_mass = (
                pair_lse(rows, pairs, "positives", -factor * recipe.hardness * unit_scale, backend=backend)
                for factor in (1, 2)
            )
            effective = torch.where(counted, torch.exp(2 * mass - double_mass) / positives.clamp(min=1), 0.0)
        weight = counted.to(positive_mean.dtype) / counted.sum().clamp(min=1)
        anchors = pairs.is_anchor().sum()

        def average(values: Tensor) -> Tensor:
            return (weight * values).sum()

        stats = {} if outside is None else {"labels_outside": outside}
        return stats | {
            "counted_anchors": counted.sum() / anchors.clamp(min=1),
            "positives_per_anchor": average(positives),
            "positive_similarity": average(positive_mean),
            "negative_similarity": average(negative_mean),
            "effective_positives": average(effective),
        }


# ------------------------------------------------------------------------------------------------ vector losses


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    ignore_index: int | Sequence[int] = VECTORS_IGNORED,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Supervised contrast of vectors; equations and arguments in `SupConLoss`."""
    check_vector_options(temperature, reduction, ("mean", "class", "sum", "none"), form=form)
    check_vectors("embeddings", embeddings)
    labels = labels_of_vectors("labels", embeddings, labels)
    ignored = integers("ignore_index", ignore_index)
    backend = resolve(backend, embeddings)
    key_rows = None
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels go together, got only one of them")
    if keys is not None and key_labels is not None:
        check_vectors("keys", keys, like=embeddings)
        key_labels = labels_of_vectors("key_labels", keys, key_labels)
        pairs, key_order = partition_against(labels, key_labels, ignore_index=ignored)
        key_rows = pack(keys, key_order, pairs.key_end, normalize=normalize, backend=backend)
    else:
        pairs = partition(labels, ignore_index=ignored)
    rows = pack(embeddings, pairs.order, pairs.live(), normalize=normalize, backend=backend)
    scale, bound = _scale(temperature, rows, normalize)
    positives, _ = pairs.counts()
    counted = positives > 0
    lse = pair_lse(rows, pairs, "others", scale, keys=key_rows, scale_bound=bound, backend=backend)
    if form == "out":
        loss = lse - pair_mean(rows, pairs, "logit", scale, keys=key_rows, backend=backend)[0]
    else:
        own = pair_lse(rows, pairs, "positives", scale, keys=key_rows, scale_bound=bound, backend=backend)
        # Not -inf minus -inf where there is no positive: that would be NaN in the gradient.
        loss = lse - torch.where(counted, own, 0.0) + positives.clamp(min=1).to(lse.dtype).log()
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss.new_zeros(labels.numel()).index_add(0, pairs.order, loss)
    return _reduce(loss, counted, reduction, labels[pairs.order] if reduction == "class" else None)


def ntxent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views; equation and arguments in `NTXentLoss`."""
    check_vector_options(temperature, reduction)
    check_vectors("view1", view1)
    images = torch.arange(view1.shape[0], device=view1.device)
    rows, by_image, own, backend = _two_views(view1, view2, images, normalize, backend)
    scale, bound = _scale(temperature, rows, normalize)
    lse = pair_lse(rows, own, "others", scale, scale_bound=bound, backend=backend)
    loss = lse - pair_mean(rows, own, "logit", scale, backend=backend)[0]
    if reduction == "none":
        return loss.new_zeros(loss.numel()).index_add(0, own.order, loss)
    return _reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


def ihpc_loss(
    view1: Tensor,
    view2: Tensor,
    groups: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    hardness: float = 1.0,
    *,
    beta: float | None = None,
    bank: Tensor | None = None,
    bank_groups: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Image-level hard-positive contrast of two views; equations and arguments in `IHPCLoss`.

    beta: the published form instead of the reweighted one; hardness then has no part. bank [M, D]: further negatives,
    not differentiated;
    bank_groups [M]: their groups, of which those equal to `UNFILLED` mark rows that do not exist yet.
    """
    check_vector_options(temperature, reduction, hardness=hardness, beta=beta)
    check_vectors("view1", view1)
    images = torch.arange(view1.shape[0], device=view1.device)
    owner = images if groups is None else labels_of_vectors("groups", view1, groups)
    rows, by_group, own, backend = _two_views(view1, view2, owner, normalize, backend)
    scale, bound = _scale(temperature, rows, normalize)
    negative = pair_lse(rows, by_group, "negatives", scale, scale_bound=bound, backend=backend)
    negatives = by_group.counts()[1]
    if bank is not None:
        check_vectors("bank", bank, like=view1)
        if bank_groups is None:
            bank_groups = torch.full_like(bank[:, 0], NO_GROUP, dtype=torch.int64)
        if groups is None:  # no image of the batch is in the bank, whatever its number
            bank_groups = torch.where(bank_groups == UNFILLED, UNFILLED, NO_GROUP)
        # Anchors in the order of `rows`: both partitions sort the same groups stably.
        bank_pairs, bank_order = partition_against(owner.repeat(2), bank_groups, ignore_index=(UNFILLED,))
        bank_rows = pack(bank.detach(), bank_order, bank_pairs.key_end, normalize=normalize, backend=backend)
        old = pair_lse(rows, bank_pairs, "negatives", scale, keys=bank_rows, scale_bound=bound, backend=backend)
        negative = _merge(negative, old)
        negatives = negatives + bank_pairs.counts()[1]
    positive, _ = pair_mean(rows, own, "logit", scale, backend=backend)
    counted = negatives > 0
    factor = 1.0 if beta is None else 1 - beta
    loss = softplus(negative - factor * positive, threshold=EXACT_SOFTPLUS)
    if beta is None and hardness:
        exponent = torch.where(counted, -hardness * positive.detach() / scale.detach(), -math.inf)
        # Softmax over no anchor at all is NaN; `where` below drops it, but only if it is finite.
        exponent = torch.where(counted.any(), exponent, 0.0)
        loss = loss * (torch.softmax(exponent, 0) * counted.sum())
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss.new_zeros(loss.numel()).index_add(0, own.order, loss)
    return _reduce(loss, counted, reduction)


def infonce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrast of each query with its positive key; equations and arguments in `InfoNCELoss`."""
    if symmetric and negatives is not None:
        raise ValueError("symmetric=True has no meaning with negatives of the queries' own")
    check_vector_options(temperature, reduction)
    check_vectors("query", query)
    check_vectors("positive", positive, like=query, same_length=True)
    backend = resolve(backend, query)
    pairs = one_to_one(query.shape[0], query.device)
    rows = pack(query, pairs.order, normalize=normalize, backend=backend)
    keys = pack(positive, pairs.order, normalize=normalize, backend=backend)
    scale, bound = _scale(temperature, rows, normalize)
    own, _ = pair_mean(rows, pairs, "logit", scale, keys=keys, backend=backend)
    if symmetric:
        of_query, of_key = pair_lse_both(rows, keys, pairs, scale, scale_bound=bound, backend=backend)
        loss = (of_query + of_key) / 2 - own
    elif negatives is None:
        loss = pair_lse(rows, pairs, "every", scale, keys=keys, scale_bound=bound, backend=backend) - own
    else:
        check_vectors("negatives", negatives, like=query)
        order = torch.arange(negatives.shape[0], device=query.device)
        others = pack(negatives, order, normalize=normalize, backend=backend)
        whole = pairs.replace(key_end=torch.full_like(pairs.key_end, negatives.shape[0]))
        lse = pair_lse(rows, whole, "every", scale, keys=others, scale_bound=bound, backend=backend)
        loss = softplus(lse - own, threshold=EXACT_SOFTPLUS)
    return _reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


def hard_negative_nce_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views with hard negatives; equation and arguments in `HardNegativeNCELoss`."""
    check_vector_options(temperature, reduction)
    check_hard_negatives(beta, tau_plus)
    check_vectors("view1", view1)
    images = torch.arange(view1.shape[0], device=view1.device)
    rows, by_image, own, backend = _two_views(view1, view2, images, normalize, backend)
    scale, bound = _scale(temperature, rows, normalize)
    positive = pair_mean(rows, own, "logit", scale, backend=backend)[0]

    def lse(factor: float) -> Tensor:
        most = None if bound is None else factor * bound
        return pair_lse(rows, by_image, "negatives", factor * scale, scale_bound=most, backend=backend)

    negatives = by_image.counts()[1]
    counted, log_count = negatives > 0, negatives.clamp(min=1).to(positive.dtype).log()
    # Σ v e^l = N Σ e^{(1 + beta) l} / Σ e^{beta l}; not -inf minus -inf where there is no negative.
    hard = torch.where(counted, lse(1 + beta), 0.0)
    negative = log_count + hard - torch.where(counted, lse(beta), 0.0) if beta else hard
    if tau_plus:
        # The share of false negatives, as a logarithm; from 1 on nothing is left, and the lowest value holds.
        share = math.log(tau_plus) + log_count + positive - negative
        some_left = share < -4 * torch.finfo(share.dtype).eps
        left = negative + torch.log1p(-torch.where(some_left, share, -1.0).exp()) - math.log1p(-tau_plus)
        lowest = log_count - scale
        negative = torch.where(some_left, torch.maximum(left, lowest), lowest)
    loss = torch.where(counted, softplus(negative - positive, threshold=EXACT_SOFTPLUS), 0.0)
    if reduction == "none":
        return loss.new_zeros(loss.numel()).index_add(0, own.order, loss)
    return _reduce(loss, counted, reduction)


def _two_views(
    view1: Tensor, view2: Tensor, groups: Tensor, normalize: bool, backend: str
) -> tuple[Rows, Pairs, Pairs, str]:
    """The rows of both views, sorted by group; pairs by group, and the same with the other view as only positive."""
    check_vectors("view2", view2, like=view1, same_length=True)
    backend = resolve(backend, view1)
    by_group = partition(groups.repeat(2))
    order, count = by_group.order.long(), view1.shape[0]
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(2 * count, device=order.device))
    own = paired(by_group, row_of[(order + count) % max(2 * count, 1)])
    rows = pack(torch.cat([view1, view2]), by_group.order, normalize=normalize, backend=backend)
    return rows, by_group, own, backend


# ------------------------------------------------------------------------------------------ reduction, helpers


def _reduce(loss: Tensor, counted: Tensor, reduction: str, group: Tensor | None = None) -> Tensor:
    """Weighted sum of the losses [N] of counted anchors; weights come from integer counts: deterministic.

    group [N]: where the reduction is a mean of the means of groups.
    """
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if group is None:
        return loss.sum() / counted.sum().clamp(min=1)
    return (loss * _group_weight(group, counted).to(loss.dtype)).sum()


def _group_weight(ids: Tensor, counted: Tensor) -> Tensor:
    """1 / (groups with a counted anchor x counted anchors of the own group), for a mean of group means [N]."""
    ids, order = torch.sort(ids)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    start, end = segment_bounds(first)
    seen = torch.nn.functional.pad(torch.cumsum(counted[order], 0), (1, 0))
    members = seen[end] - seen[start]
    present = (first & (members > 0)).sum()
    weight = torch.where(members > 0, 1.0 / (members * present).clamp(min=1).double(), 0.0)
    return torch.empty_like(weight).scatter_(0, order, weight)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is 0, not NaN, where both are -inf."""
    empty = (a == -math.inf) & (b == -math.inf)
    merged = torch.logaddexp(torch.where(empty, 0.0, a), torch.where(empty, 0.0, b))
    return torch.where(empty, -math.inf, merged)


def _scale(temperature: float | Tensor, rows: Rows, normalize: bool) -> tuple[Tensor, float | None]:
    """1 / temperature as a 0-dim tensor in the statistics' dtype, and a bound of |similarity / temperature|."""
    dtype = torch.float64 if rows.data.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return temperature.to(device=rows.data.device, dtype=dtype).reshape(()).reciprocal(), None
    scale = torch.full((), 1.0 / temperature, dtype=dtype, device=rows.data.device)
    return scale, 1.0 / temperature if normalize else None
