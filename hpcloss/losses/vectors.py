"""Contrast of vectors: by labels, of two views, of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpcloss.arithmetic import softplus
from hpcloss.checks import check_used, check_vectors
from hpcloss.distributed import gather_keys, gather_labels, has_peers
from hpcloss.losses.module import Loss
from hpcloss.losses.options import check_each, checked, unchecked
from hpcloss.losses.reduction import reduce
from hpcloss.losses.views import gather_all, queries_and_keys, two_views
from hpcloss.plan.labels import VECTORS_IGNORED, labels_of_vectors
from hpcloss.plan.partition import one_to_one, partition, partition_against
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.one_positive import one_positive
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale


@checked
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
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Supervised contrast of vectors; equations and arguments in `SupConLoss`."""
    check_vectors("embeddings", embeddings)
    labels = labels_of_vectors("labels", embeddings, labels)
    ignored = cast(tuple[int, ...], ignore_index)  # by the rule of the option
    gather, key_rows = has_peers(gather), None
    if keys is not None:
        check_vectors("keys", keys, like=embeddings)
    if (keys is None) != (key_labels is None):
        raise ValueError("keys and key_labels must be given together, got one of them")
    if keys is not None and key_labels is not None:
        key_labels = labels_of_vectors("key_labels", keys, key_labels)
        pairs, key_order = partition_against(labels, key_labels, ignore_index=ignored)
        if check_finite:
            check_used(key_order, pairs.intervals.key_end, keys=keys)
    else:
        pairs = partition(labels, ignore_index=ignored)
    if check_finite:
        check_used(temperature=temperature)
        check_used(pairs.order, pairs.live(), embeddings=embeddings)
    rows = pack(embeddings, pairs.order, pairs.live(), normalize=normalize, permutation=True, backend=backend)
    if keys is not None and key_labels is not None:
        live = pairs.intervals.key_end
        key_rows = pack(keys, key_order, live, normalize=normalize, permutation=True, backend=rows.backend)
        if gather:
            alive = torch.arange(key_order.numel(), device=labels.device) < live
            everyone = gather_labels(key_labels[key_order], alive.long() - 1)
            pairs, key_order = partition_against(labels, everyone.labels, everyone.regions, ignore_index=ignored)
            key_rows = everyone.keys(key_rows, key_order)
    elif gather:
        pairs, key_rows = gather_keys(rows, pairs, labels[pairs.order])
    scale = Scale.of(temperature, rows, normalize)
    if form == "out":
        loss, counted = contrast(rows, pairs, keys=key_rows, scale=scale, denominator="all")
    else:
        counted = pairs.intervals.counted()
        own, negative = (pair_lse(rows, pairs, rule, scale, keys=key_rows) for rule in ("positives", "negatives"))
        positives, _ = pairs.intervals.counts()
        # log(P + N) - log(P / n), without a difference of two large numbers. Not -inf minus -inf where no positive is.
        loss = softplus(negative - torch.where(counted, own, 0.0)) + positives.clamp(min=1).to(own.dtype).log()
        loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


class SupConLoss(Loss):
    r"""Supervised contrastive loss of vectors; same label, positive pair.

        form "out":  L_i = -1/|P(i)| Σ_{p∈P(i)} [ l_ip - log Σ_{j≠i} e^{l_ij} ]
        form "in":   L_i = -log( 1/|P(i)| Σ_{p∈P(i)} e^{l_ip} / Σ_{j≠i} e^{l_ij} )

    Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2 and 3. l_ij = cosine / temperature.
    Anchors without a positive add nothing and are not counted. With explicit keys, all of them form the denominator.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        form: "out" (positives averaged outside the logarithm, the better one in the paper) or "in".
        ignore_index: label or labels of rows that take no part, as anchors or keys.
        normalize: L2-normalise the rows.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum" or "none" ([N], 0 if not counted).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "dense", "blockwise" or "triton".
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: str = "out",
        ignore_index: int | Sequence[int] = VECTORS_IGNORED,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            supcon_loss,
            temperature=temperature, form=form, ignore_index=ignore_index, normalize=normalize, reduction=reduction,
            gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(
        self, embeddings: Tensor, labels: Tensor, keys: Tensor | None = None, key_labels: Tensor | None = None
    ) -> Tensor:
        """embeddings [N, D], labels [N]; optionally keys [M, D], key_labels [M] in place of the embeddings.

        Keys are other vectors (a queue, another encoder's): no key counts as an anchor itself, so do not repeat the
        embeddings among them. With `gather` those of every rank are joined: pass a rank's own part.
        """
        return unchecked(supcon_loss)(embeddings, labels, keys, key_labels, **self.options)


@checked
def ntxent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views; equation and arguments in `NTXentLoss`."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, _, own = two_views(view1, view2, None, normalize, backend, gather)
    scale = Scale.of(temperature, rows, normalize)
    loss, _ = contrast(rows, own, keys=keys, scale=scale, denominator="pair")
    return reduce(loss, None, reduction, own.order, gather=gather)


class NTXentLoss(Loss):
    r"""Normalised temperature-scaled cross-entropy of two views: each row's other view against the rest of the batch.

        L_i = -log( e^{l_i,pair(i)} / Σ_{j≠i} e^{l_ij} )       over all 2N rows

    Chen et al., "A simple framework for contrastive learning of visual representations" (ICML 2020), eq. 1.

    Args: temperature, normalize, gather, check_finite and backend as in `SupConLoss`; reduction "mean" over 2N rows,
    "sum" or "none" ([2N], the rows of view1 first).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            ntxent_loss,
            temperature=temperature, normalize=normalize, reduction=reduction, gather=gather,
            check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """view1, view2 [N, D]: row i of both shows image i."""
        return unchecked(ntxent_loss)(view1, view2, **self.options)


@checked
def infonce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of each query with its positive key; equations and arguments in `InfoNCELoss`."""
    if symmetric and negatives is not None:
        raise ValueError("symmetric must be False where negatives are given, got True")
    check_vectors("query", query)
    check_vectors("positive", positive, like=query, same_length=True)
    if check_finite:
        check_used(temperature=temperature, query=query, positive=positive, negatives=negatives)
    gather = has_peers(gather)
    pairs = one_to_one(query.shape[0], query.device)
    rows, keys = queries_and_keys(query, positive, pairs, normalize, backend)
    scale = Scale.of(temperature, rows, normalize)
    if negatives is not None:
        own, _ = pair_mean(rows, pairs, "logit", scale.unbounded(), keys=keys)
        check_vectors("negatives", negatives, like=query)
        order = torch.arange(negatives.shape[0], device=query.device)
        others = pack(negatives, order, normalize=normalize, backend=rows.backend)
        whole = pairs.replace(key_end=torch.full_like(pairs.intervals.key_end, negatives.shape[0]))
        if gather:
            met, others = gather_all(others)
            whole = pairs.replace(key_start=met.key_start, key_end=met.key_end)
        lse = pair_lse(rows, whole, "every", scale, keys=others)
        loss = softplus(lse - own)
    elif symmetric and not gather:
        own, of_both = one_positive(rows, pairs, scale, keys=keys, both=True)
        loss = softplus(of_both - own)
        if reduction != "mean":  # which is that of both directions at once
            loss = loss.mean(0)
    else:
        all_keys = keys
        if gather:
            met, all_keys = gather_all(keys)
            place = met.self_pos  # of the own positive among the keys of all ranks
            pairs = pairs.replace(pos_start=place, pos_end=place + 1, key_start=met.key_start, key_end=met.key_end)
        loss, _ = contrast(rows, pairs, keys=all_keys, scale=scale, denominator="pair")
        if symmetric:
            of_keys, _ = contrast(keys, pairs, keys=gather_all(rows)[1], scale=scale, denominator="pair")
            loss = (loss + of_keys) / 2
    return reduce(loss, None, reduction, gather=gather)


class InfoNCELoss(Loss):
    r"""Cross-entropy of each query's positive key against other keys.

        without negatives:  L_i = -log( e^{q_i·k_i/τ} / Σ_j e^{q_i·k_j/τ} )       the other positives are the negatives
        with negatives n:   L_i = -log( e^{q_i·k_i/τ} / ( e^{q_i·k_i/τ} + Σ_m e^{q_i·n_m/τ} ) )
        symmetric:          L_i = 1/2 [ the first line + -log( e^{q_i·k_i/τ} / Σ_j e^{q_j·k_i/τ} ) ]

    van den Oord et al., "Representation learning with contrastive predictive coding" (2018), eq. 4; symmetric: Radford
    et al., "Learning transferable visual models from natural language supervision" (2021), fig. 3.

    Args:
        temperature: positive number, or a 0-dim tensor.
        learnable: make log(1 / temperature) a parameter of the module, `log_scale` in fp32, that starts at
            `temperature` (CLIP's parametrisation, without its clamp). Setting `temperature` later sets the parameter.
        symmetric: each positive looks for its query as well (CLIP); ValueError with negatives.
        normalize, gather, check_finite, backend: as in `SupConLoss`. reduction: "mean", "sum" or "none" ([N]).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        learnable: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        check_each("infonce_loss", {"temperature": temperature, "learnable": learnable})
        fixed = {} if learnable else {"temperature": temperature}
        super().__init__(
            infonce_loss,
            **fixed, symmetric=symmetric, normalize=normalize, reduction=reduction, gather=gather,
            check_finite=check_finite, backend=backend,
        )  # fmt: skip
        self.learnable = learnable
        if learnable:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(float(temperature)), dtype=torch.float32))

    def __getattr__(self, name: str) -> Any:
        """A learnt temperature is read as a 0-dim tensor joined to the graph."""
        if name == "temperature" and "log_scale" in self.__dict__.get("_parameters", {}):
            return torch.exp(-self.log_scale)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """As of every loss an attribute that is changed later takes effect; a learnt temperature is in `log_scale`."""
        if name == "temperature" and "log_scale" in self.__dict__.get("_parameters", {}):
            check_each("infonce_loss", {name: value.item() if isinstance(value, Tensor) else value})
            with torch.no_grad():
                self.log_scale.fill_(-math.log(float(value)))
        else:
            super().__setattr__(name, value)

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        """query, positive [N, D]; negatives [M, D], shared by all queries."""
        options = self.options
        if self.learnable:
            options["temperature"] = torch.exp(-self.log_scale)
        return unchecked(infonce_loss)(query, positive, negatives, **options)

    def extra_repr(self) -> str:
        start = f"temperature={torch.exp(-self.log_scale).item():.4g}, " if self.learnable else ""
        return f"{start}{super().extra_repr()}, learnable={self.learnable}"


@checked
def hard_negative_nce_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    gather: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Contrast of two views with hard negatives; equation and arguments in `HardNegativeNCELoss`."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, by_image, own = two_views(view1, view2, None, normalize, backend, gather)
    scale = Scale.of(temperature, rows, normalize)
    factors = (1 + beta, beta) if beta else (1.0,)
    positive, found = one_positive(rows, own, scale, keys=keys, factors=factors)
    sums = list(found) if beta else [found]
    # Keys of one image are two, and all are of one region.
    negatives = own.intervals.key_end - own.intervals.key_start - 2
    counted = None
    if gather or view1.shape[0] < 2:  # else there is a negative; not -inf minus -inf where none is
        counted = (negatives > 0).expand_as(positive)
        sums = [torch.where(counted, one, 0.0) for one in sums]
    log_count = negatives.clamp(min=1).to(positive.dtype).log()
    # Σ v e^l = N Σ e^{(1 + beta) l} / Σ e^{beta l}. Here the logarithm of their ratio to N e^{l+}, without N.
    if beta:
        hard, weights = sums
        ratio = hard - weights - positive
    else:
        ratio = sums[0] - log_count - positive
    if tau_plus:
        # The share of false negatives, as a logarithm; from 1 on nothing is left, and the lowest value holds.
        left = -(math.log(tau_plus) - ratio).clamp(max=0.0).expm1()
        left = ratio + left.clamp(min=torch.finfo(left.dtype).tiny).log()
        ratio = torch.maximum(left - math.log1p(-tau_plus), -scale.value - positive)
    loss = softplus(ratio + log_count)
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, own.order, gather=gather)


class HardNegativeNCELoss(Loss):
    r"""Contrast of two views in which similar negatives weigh more, and false negatives are discounted.

        L_i = -log( e^{l_i+} / ( e^{l_i+} + G_i ) )       over all 2N rows
        G_i = max( ( Σ_{n∈N(i)} v_in e^{l_in} - τ⁺ |N| e^{l_i+} ) / (1 - τ⁺),  |N| e^{-1/temperature} )
        v_in = e^{beta l_in} / mean_{m∈N(i)} e^{beta l_im},  differentiated

    N(i): the rows of other images. Robinson et al., "Contrastive learning with hard negative samples" (ICLR 2021),
    eq. 4; beta = 0 is Chuang et al., "Debiased contrastive learning" (NeurIPS 2020); both 0 is NT-Xent.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        beta: how much similar negatives weigh; 0 weighs all alike.
        tau_plus: probability that a negative is of the row's own class, in [0, 1); 0 leaves the discount, and the
            lowest value, which is that of unit rows, out.
        normalize, gather, check_finite, backend: as in `SupConLoss`. reduction: "mean" over 2N rows, "sum" or "none"
            ([2N], view1 first).

    A single image has no negative and loss 0.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            hard_negative_nce_loss,
            temperature=temperature,
            beta=beta,
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            gather=gather,
            check_finite=check_finite,
            backend=backend,
        )

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """view1, view2 [N, D]: row i of both shows image i."""
        return unchecked(hard_negative_nce_loss)(view1, view2, **self.options)
