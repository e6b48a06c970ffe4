"""Every loss as its paper prints it: dense, readable, differentiated by autograd. The oracle of the package.

Nothing here is fast: all pairs are written out. Names and arguments are those of `hpcloss.functional` without the ones
that concern speed or checking; everything is computed in the dtype of the inputs, so pass float64 to measure against.

Notation: rows x_i, unit rows with `normalize`; s_ij = <x_i, x_j>; τ the temperature (a number or a 0-dim tensor);
l_ij = s_ij / τ; P(i), N(i) the positive and negative keys of anchor i; lse = log-sum-exp.
An anchor that is not counted has loss 0. Where none counts the result is 0, joined to the graph, its gradient zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = (-100, -1, 255)


# Masked pieces. Each has a defined value and a zero gradient for an empty mask, with no NaN on the way to it.
def _lse(x: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp of `x` over `mask` along the last axis, -inf where the mask is empty."""
    some = mask.any(-1)
    # An empty row takes a detour over zeros: the gradient of logsumexp at (-inf, ..., -inf) is NaN.
    x = torch.where(some.unsqueeze(-1), torch.where(mask, x, -math.inf), 0.0)
    return torch.where(some, torch.logsumexp(x, -1), -math.inf)


def _softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax of `x` over `mask` along the last axis, 0 outside it and in rows where it is empty."""
    some = mask.any(-1, keepdim=True)
    x = torch.where(some, torch.where(mask, x, -math.inf), 0.0)
    return torch.where(some, torch.softmax(x, -1), 0.0)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), 0 at -inf. `F.softplus` is not used: it becomes the identity at 20, an error of 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _unit(x: Tensor, normalize: bool = True) -> Tensor:
    """Rows divided by their norm; a row of norm at most 1e-12 becomes the zero row and gets no gradient."""
    if not normalize:
        return x
    keep = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) > 1e-12
    safe = torch.where(keep, x, 1.0)
    return torch.where(keep, safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), 0.0)


def _valid(labels: Tensor, ignore_index: int | Sequence[int]) -> Tensor:
    ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)
    valid = torch.ones_like(labels, dtype=torch.bool)
    for value in ignored:
        valid &= labels != value
    return valid


def _reduce(loss: Tensor, counted: Tensor, reduction: str, groups: dict[str, Tensor] | None = None) -> Tensor:
    """`loss` [N] is 0 where not `counted` [N]; `groups` names what else it may be averaged over: ids [N]."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum().clamp(min=1)
    groups = groups or {}
    if reduction not in groups:
        raise ValueError(f"reduction must be one of {', '.join(['mean', 'sum', 'none', *groups])}, got {reduction}")
    ids = groups[reduction]
    means = [loss[counted & (ids == g)].mean() for g in ids[counted].unique()]
    return torch.stack(means).mean() if means else loss.sum()


# The package's two primitives, dense.
def pair_lse(
    anchors: Tensor, keys: Tensor, allowed: Tensor, scale: float | Tensor, bias: Tensor | None = None
) -> Tensor:
    """lse_i = log Σ_{j: allowed_ij} exp(scale * s_ij + bias_j), shape [N]; -inf where nothing is allowed.

    anchors [N, D] and keys [M, D] are used as they are; allowed [N, M] boolean; bias [M].
    """
    logit = scale * (anchors @ keys.T)
    return _lse(logit if bias is None else logit + bias, allowed)


def pair_mean(
    anchors: Tensor,
    keys: Tensor,
    positives: Tensor,
    scale: float | Tensor,
    hardness: float,
    stat: Tensor | None,
    term: str,
    discount: float = 0.0,
    log_weight: Tensor | None = None,
    detach_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """out_i = Σ_{j: positives_ij} w_ij t_ij and mass_i, the log-sum of the weights before they are normalised.

        w_ij = softmax over the positives of φ_ij = -hardness * s_ij + log_weight_j,   mass_i = lse over them of φ_ij
        t_ij = scale * s_ij                                                            term "logit"
        t_ij = softplus(stat_i - (scale - discount) * s_ij) - discount * s_ij          term "own"

    Shapes as in `pair_lse`; stat [N] is unused by "logit". Without positives out is 0 and mass -inf. The mass is
    never differentiated: it only merges the results of split keys, out = Σ_parts softmax(mass) out.
    """
    if term not in ("logit", "own") or (term == "own" and stat is None):
        raise ValueError(f"term must be logit, or own with a stat, got {term}")
    s = anchors @ keys.T
    score = -hardness * s if log_weight is None else -hardness * s + log_weight
    weight = _softmax(score, positives)
    value = scale * s
    if stat is not None and term == "own":
        value = _softplus(stat.unsqueeze(-1) - (scale - discount) * s) - discount * s
    out = ((weight.detach() if detach_weights else weight) * value).sum(-1)
    return out, _lse(score, positives).detach()


# Pixels, regions.
def _contrast(
    s: Tensor,
    positive: Tensor,
    negative: Tensor,
    temperature: float | Tensor,
    hardness: float,
    discount: float,
    denominator: str,
    detach_weights: bool,
    multiplicity: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss [N] of every row of the similarities `s` [N, M], and whether it counts; equations in `region_phpc_loss`.

    `multiplicity` is how often each key is summed in a denominator.
    """
    logit = s / temperature
    weight = _softmax(-hardness * s, positive)
    if detach_weights:
        weight = weight.detach()
    counted = positive.any(-1)
    if denominator == "all":
        loss = _lse(logit, positive | negative) + math.log(multiplicity) - (weight * logit).sum(-1)
    else:
        counted = counted & negative.any(-1)
        negatives = _lse(logit, negative) + math.log(multiplicity)
        if denominator == "negatives":
            loss = negatives - (weight * logit).sum(-1)
        else:  # log(e^d + e^lN) - l as softplus(lN - d) + (d - l), which keeps the digits of a small loss
            d = logit - discount * s
            loss = (weight * (_softplus(negatives.unsqueeze(-1) - d) - discount * s)).sum(-1)
    return torch.where(counted, loss, 0.0), counted


def _per_axis(size: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if len(sizes) != dims or min(sizes, default=1) < 1:
        raise ValueError(f"{name} must be a positive integer, or one for each of the {dims} axes, got {size}")
    return sizes


def _cells(spatial: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Number of the grid cell each pixel lies in, flat in row-major order; cells at the far edge may be smaller."""
    cell = torch.zeros(tuple(spatial), dtype=torch.int64)
    for axis, (length, size) in enumerate(zip(spatial, sizes, strict=True)):
        along = (torch.arange(length) // size).reshape([-1 if a == axis else 1 for a in range(len(spatial))])
        cell = cell * -(-length // size) + along
    return cell.reshape(-1)


def _labels_at(labels: Tensor, spatial: Sequence[int]) -> Tensor:
    """Labels [B, *S'] at the resolution `spatial` by nearest neighbour, source = floor(target * S' / S), as int64."""
    labels = labels.to(torch.int64)  # a comparison of uint8 with -1 would otherwise wrap around
    for axis, length in enumerate(spatial, start=1):
        labels = labels.index_select(axis, torch.arange(length, device=labels.device) * labels.shape[axis] // length)
    return labels


def region_phpc_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 16,
    temperature: float | Tensor = 0.1,
    hardness: float = 1.0,
    *,
    discount: float = 0.0,
    local_size: int | Sequence[int] | None = None,
    denominator: str = "own",
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    detach_weights: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Pixel-level contrast inside regions of the map, each anchor pulled hardest by its least similar positives.

        "own"        L_i = Σ_{j in P(i)} w_ij [ log( e^{l_ij - discount * s_ij} + Σ_{n in N(i)} e^{l_in} ) - l_ij ]
        "all"        L_i = log Σ_{k in P(i) or N(i)} e^{l_ik} - Σ_{j in P(i)} w_ij l_ij
        "negatives"  L_i = log Σ_{n in N(i)} e^{l_in}         - Σ_{j in P(i)} w_ij l_ij
        w_ij = e^{-hardness * s_ij} / Σ_{j' in P(i)} e^{-hardness * s_ij'}, a constant unless detach_weights=False

    P(i): other pixels of the region of i with its label; N(i): those of other labels. Background pixels are keys only.
    Counted: at least one positive and, but for "all", one negative. A region is one grid cell, of all images together
    or of each (`per_image`). With `local_size` a counted anchor adds the mean, over the small cells of its region
    where it counts, of the same L_i with the keys of that cell, each summed Π_axes region_size / local_size times.

    Tang et al., ISBI 2023 and Pattern Recognition 2024 (110020). Their printed equation was not available: this is a
    reconstruction. "own", foreground anchors and regions are those of the authors' code, which weights e^{l_ij} in the
    denominator by e^{-0.1 h_ij} (here `discount` 0.1 at hardness 0, with s_ij for their cross-view h_ij); the weights
    w_ij outside the logarithm are read from the abstract and the figure, `local_size` from the figure alone.

    features [B, D, *S]; labels [B, *S'] or [B, 1, *S']. Returns a scalar, or [B, *S] with reduction="none"; "class" and
    "region" average the means of classes and of regions. ValueError where the hyper-parameters contradict one another.
    """
    if denominator not in ("own", "all", "negatives"):
        raise ValueError(f"denominator must be own, all or negatives, got {denominator}")
    if discount and denominator != "own":
        raise ValueError(f"discount needs denominator own, got {denominator}")
    batch, dim, *spatial = features.shape
    whole = tuple(max(length, 1) for length in spatial)
    sizes = whole if region_size is None else _per_axis(region_size, len(spatial), "region_size")
    cell = _cells(spatial, sizes)
    image = torch.arange(batch).repeat_interleave(cell.numel())
    region = (cell.repeat(batch) + image * cell.numel() * per_image).to(features.device)
    small, multiplicity = None, 1
    if local_size is not None:
        small_sizes = _per_axis(local_size, len(spatial), "local_size")
        if region_size is None or any(size % part for size, part in zip(sizes, small_sizes, strict=True)):
            raise ValueError(f"local_size must divide region_size, got {local_size} and {region_size}")
        small = _cells(spatial, small_sizes).repeat(batch).to(features.device)
        multiplicity = math.prod(size // part for size, part in zip(sizes, small_sizes, strict=True))

    y = _labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(-1)
    pixels = features.movedim(1, -1).reshape(-1, dim)
    valid = _valid(y, ignore_index)
    loss = torch.zeros_like(pixels[:, 0]) + pixels[:0].sum()  # an empty sum: joined to the graph, whatever the pixels
    counted = torch.zeros_like(valid)
    for r in region[valid].unique():
        here = (valid & (region == r)).nonzero().squeeze(1)
        x, label = _unit(pixels[here], normalize), y[here]
        s = x @ x.T
        positive = (label[:, None] == label) & ~torch.eye(len(here), dtype=torch.bool, device=s.device)
        negative = label[:, None] != label
        if background is not None:  # keys only: without a positive a row does not count
            positive = positive & (label != background)[:, None]
        form = (temperature, hardness, discount, denominator, detach_weights)
        value, counts = _contrast(s, positive, negative, *form)
        if small is not None:
            parts, number = torch.zeros_like(value), torch.zeros_like(value)
            for c in small[here].unique():
                inside = small[here] == c
                part, part_counts = _contrast(s, positive & inside, negative & inside, *form, multiplicity)
                parts, number = parts + part, number + part_counts.to(s.dtype)
            value = value + parts / number.clamp(min=1)  # who counts in a cell counts in its region
        loss = loss.index_put((here,), value)
        counted[here] = counts
    loss = _reduce(loss, counted, reduction, {"class": y, "region": region})
    return loss.reshape(batch, *spatial) if reduction == "none" else loss


def region_supcon_loss(
    features: Tensor,
    labels: Tensor,
    region_size: int | Sequence[int] | None = 32,
    temperature: float | Tensor = 0.1,
    *,
    local_size: int | Sequence[int] | None = None,
    background: int | None = 0,
    ignore_index: int | Sequence[int] = IGNORED,
    per_image: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrast inside regions of the map, all positives alike.

        L_i = -1/|P(i)| Σ_{j in P(i)} log( e^{l_ij} / Σ_{k in P(i) or N(i)} e^{l_ik} )

    Hu et al., MICCAI 2021 (arXiv 2109.07407), the blocks of the authors' code: anchors are foreground, background is a
    key. They average the means of the blocks, here reduction="region"; `local_size` is not theirs. Regions, shapes and
    errors as in `region_phpc_loss`, of which this is denominator "all" at hardness 0.
    """
    return region_phpc_loss(
        features,
        labels,
        region_size,
        temperature,
        hardness=0.0,
        local_size=local_size,
        denominator="all",
        background=background,
        ignore_index=ignore_index,
        per_image=per_image,
        normalize=normalize,
        reduction=reduction,
    )


# Whole images, two views.
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
) -> Tensor:
    """Image-level contrast of two views, images with dissimilar views pulled hardest.

        L_i = -log( e^{l_i+} / ( e^{l_i+} + Σ_{n in N(i)} e^{l_in} ) ),   loss = 1/n Σ_i v_i L_i
        v_i = n e^{-hardness * s_i+} / Σ_k e^{-hardness * s_k+}, a constant; sums over the n counted rows
        published (`beta` a number): e^{(1 - beta) l_i+} for e^{l_i+}, and v_i = 1

    The 2N rows are view 1, then view 2; i+ is the other view of i; N(i): the rows of other images, with `groups` only
    those of other groups, and the rows of the bank under the same rule. Counted: at least one negative.

    Tang et al., ISBI 2023 and Pattern Recognition 2024 (110020). The published form is what the authors' compiled code
    does (beta 0.1, τ 0.5); the weights v_i, the groups and the bank are reconstructions.

    view1, view2 [N, D]; groups [N]; bank [M, D]: filled rows only, used as stored, not differentiated; bank_groups [M].
    Returns a scalar, or v_i L_i [2N] with reduction="none". ValueError unless 0 <= beta < 1.
    """
    if beta is not None and not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and less than 1, got {beta}")
    count = len(view1)
    x = _unit(torch.cat([view1, view2]), normalize)
    image = torch.arange(count, device=x.device).repeat(2)
    negative = image[:, None] != image
    if groups is not None:
        group = groups.repeat(2)
        negative &= group[:, None] != group
    keys = x
    if bank is not None:
        keys = torch.cat([x, bank.detach().to(x.dtype)])
        other = torch.ones(len(x), len(bank), dtype=torch.bool, device=x.device)
        if groups is not None and bank_groups is not None:
            other = group[:, None] != bank_groups
        negative = torch.cat([negative, other], dim=1)
    own = (x * x.roll(count, 0)).sum(-1)
    own_logit = own / temperature * (1 if beta is None else 1 - beta)
    counted = negative.any(-1)
    loss = _softplus(_lse(x @ keys.T / temperature, negative) - own_logit)
    if beta is None:
        loss = loss * (_softmax(-hardness * own, counted) * counted.sum()).detach()
    return _reduce(torch.where(counted, loss, 0.0), counted, reduction)


def ntxent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Each view finds the other view of its image among all rows but itself.

        L_i = -log( e^{l_i+} / Σ_{k != i} e^{l_ik} )

    Chen et al. 2020, eq. 1 (arXiv 2002.05709). The 2N rows are view 1, then view 2, and all count; a single image has
    loss 0.

    view1, view2 [N, D]. Returns a scalar, or [2N] with reduction="none".
    """
    x = _unit(torch.cat([view1, view2]), normalize)
    own = (x * x.roll(len(view1), 0)).sum(-1) / temperature
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return _reduce(_lse(x @ x.T / temperature, others) - own, others.any(-1), reduction)


def hard_negative_nce_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Contrast of two views in which similar negatives weigh more and false ones are discounted.

        L_i = -log( e^{l_i+} / ( e^{l_i+} + G_i ) )
        G_i = max( ( Σ_{n in N(i)} v_in e^{l_in} - τ⁺ N e^{l_i+} ) / (1 - τ⁺), N e^{-1 / temperature} )
        v_in = e^{beta l_in} / mean_{m in N(i)} e^{beta l_im};   N = |N(i)|;   with τ⁺ = 0: G_i = Σ_n v_in e^{l_in}

    The 2N rows are view 1, then view 2; i+ is the other view of i; N(i): the rows of other images. v is differentiated.
    Counted: at least one negative.

    Robinson et al., ICLR 2021 (arXiv 2010.04592), eq. 4; beta 0 is Chuang et al., NeurIPS 2020 (arXiv 2007.00224).

    view1, view2 [N, D]. Returns a scalar, or [2N] with reduction="none".
    """
    x = _unit(torch.cat([view1, view2]), normalize)
    image = torch.arange(len(view1), device=x.device).repeat(2)
    negative = image[:, None] != image
    count = negative.sum(-1).clamp(min=1).to(x.dtype)
    logits = x @ x.T / temperature
    own = (x * x.roll(len(view1), 0)).sum(-1) / temperature
    hardness = (beta * logits).exp() * negative
    mean = hardness.sum(-1, keepdim=True) / count[:, None]
    others = (hardness / torch.where(mean > 0, mean, 1.0) * logits.exp()).sum(-1)
    if tau_plus:
        lowest = count * torch.exp(-1 / torch.as_tensor(temperature, dtype=x.dtype))
        others = torch.maximum((others - tau_plus * count * own.exp()) / (1 - tau_plus), lowest)
    counted = negative.any(-1)
    return _reduce(torch.log1p(torch.where(counted, others, 0.0) / own.exp()), counted, reduction)


# Rows with labels, queries with keys.
def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    ignore_index: int | Sequence[int] = (-100, -1),
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrast: each anchor finds the keys of its label, averaged outside or inside the logarithm.

        "out"  L_i = -1/|P(i)| Σ_{j in P(i)} log( e^{l_ij} / Σ_{k != i} e^{l_ik} )
        "in"   L_i = -log( 1/|P(i)| Σ_{j in P(i)} e^{l_ij} / Σ_{k != i} e^{l_ik} )

    Khosla et al. 2020, eq. 2 and 3 (arXiv 2004.11362). P(i): the keys of the label of i, without i itself; where `keys`
    are given no key is an anchor itself. Counted: at least one positive.

    embeddings [N, D]; labels [N]; keys [M, D]; key_labels [M]. Returns a scalar, or [N] with reduction="none"; "class"
    averages the means of the classes.
    """
    if form not in ("out", "in"):
        raise ValueError(f"form must be out or in, got {form}")
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels must be given together, got one of them")
    labels = labels.to(torch.int64)
    rows = _valid(labels, ignore_index).nonzero().squeeze(1)
    x, y = _unit(embeddings[rows], normalize), labels[rows]
    if keys is None or key_labels is None:
        k, key_y, others = x, y, ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    else:
        key_labels = key_labels.to(torch.int64)
        kept = _valid(key_labels, ignore_index).nonzero().squeeze(1)
        k, key_y = _unit(keys[kept], normalize), key_labels[kept]
        others = torch.ones(len(x), len(k), dtype=torch.bool, device=x.device)
    logit = x @ k.T / temperature
    positive = (y[:, None] == key_y) & others
    counts = positive.any(-1)
    number = positive.sum(-1).clamp(min=1).to(logit.dtype)
    if form == "out":
        pull = torch.where(positive, logit, 0.0).sum(-1) / number
    else:
        pull = torch.where(counts, _lse(logit, positive), 0.0) - number.log()
    value = torch.where(counts, _lse(logit, others) - pull, 0.0)
    loss = (torch.zeros_like(embeddings[:, 0]) + embeddings[:0].sum()).index_put((rows,), value)
    counted = torch.zeros_like(labels, dtype=torch.bool).index_put((rows,), counts)
    return _reduce(loss, counted, reduction, {"class": labels})


def infonce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Each query finds its positive among the batch's positives, or among its own and shared negatives.

        L_i = -log( e^{q_i.k_i / τ} / Σ_j e^{q_i.k_j / τ} )                               negatives None
        L_i = -log( e^{q_i.k_i / τ} / ( e^{q_i.k_i / τ} + Σ_m e^{q_i.n_m / τ} ) )         negatives given

        L_i = 1/2 [ the first + -log( e^{q_i.k_i / τ} / Σ_j e^{q_j.k_i / τ} ) ]           symmetric

    van den Oord et al. 2018, eq. 4 (arXiv 1807.03748); with negatives He et al. 2020, eq. 1 (arXiv 1911.05722);
    symmetric Radford et al. 2021, fig. 3 (arXiv 2103.00020). Every query counts.

    query, positive [N, D]; negatives [M, D]. Returns a scalar, or [N] with reduction="none".
    """
    q, k = _unit(query, normalize), _unit(positive, normalize)
    own = (q * k).sum(-1) / temperature
    keys = k if negatives is None else _unit(negatives, normalize)
    logit = q @ keys.T / temperature
    lse = _lse(logit, torch.ones_like(logit, dtype=torch.bool))
    if symmetric:
        lse = (lse + _lse(logit.T, torch.ones_like(logit.T, dtype=torch.bool))) / 2
    loss = lse - own if negatives is None else _softplus(lse - own)
    return _reduce(loss, torch.ones_like(own, dtype=torch.bool), reduction)
