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
    """The function of `SupConLoss`: the inputs of its `forward`, then its options."""
    check_vectors("embeddings", embeddings)
    labels = labels_of_vectors("labels", embeddings, labels)
    ignored = cast(tuple[int, ...], ignore_index)  # a tuple by the rule of the option
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
        # log(P + N) - log(P / n), without a difference of two large numbers. No -inf - -inf without a positive.
        loss = softplus(negative - torch.where(counted, own, 0.0)) + positives.clamp(min=1).to(own.dtype).log()
        loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, pairs.order, labels, gather=gather)


class SupConLoss(Loss):
    """Supervised contrast of vectors (SupCon).

        form "out":  L_i = log Σ_{j≠i} e^{l_ij} - 1/|P(i)| Σ_{p∈P(i)} l_ip
        form "in":   L_i = log Σ_{j≠i} e^{l_ij} - log( 1/|P(i)| Σ_{p∈P(i)} e^{l_ip} )

    l_ij is the cosine of vectors i and j, divided by the temperature. P(i), the positives of anchor i, are the other
    vectors with its label. j runs over all other vectors of the batch, or over the keys if they are given.

    The loss pulls an anchor to its positives. It pushes the anchor away from all keys in the denominator. An anchor
    counts if it has a positive. If no anchor counts, the loss is 0 with zero gradients.

    Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2 ("out") and eq. 3 ("in"). Anchors
    without a positive do not count; the authors' code counts them. The factor temperature / base temperature of that
    code is left out (`hpcloss.compat.supcontrast` has both).

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        form: "out": the mean over positives is outside the logarithm, the better form in the paper. "in": inside.
        ignore_index: Label or labels of vectors that are neither anchors nor keys. Default: -100 and -1.
        normalize: Divide each vector by its L2 norm. Vectors with a norm of at most 1e-12 become zero and get no
            gradient. False: l_ij is the inner product over the temperature.
        reduction: "mean" over counted anchors, "class" (mean of class means), "sum", or "none" (`[N]`, 0 if not
            counted).
        gather: On several processes, contrast with the vectors of all ranks; value and gradient are those of the whole
            batch (`hpcloss.distributed`). On one process it changes nothing.
        check_finite: Raise ValueError for inf or NaN in the values that are used. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or labels on the CPU are not whole numbers.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> labels = torch.tensor([1, 1, 2])
        >>> hpcloss.SupConLoss(temperature=1.0, reduction="none")(embeddings, labels)  # log(e + 1) - 1 twice
        tensor([0.3133, 0.3133, 0.0000])
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
        """Compute the loss of a batch of vectors.

        Args:
            embeddings: Anchors `[N, D]`, any float dtype. Without `keys` they are the keys too.
            labels: `[N]` or `[N, 1]`, integers or whole-number floats.
            keys: Other vectors `[M, D]` as the only keys, for example of a queue or of another encoder. Do not repeat
                the embeddings among them. With `gather` pass the keys of this rank: all ranks' keys are used.
            key_labels: Labels of the keys `[M]`. Required with `keys`.

        Returns:
            The loss in fp32 (float64 for float64 embeddings): 0-dim, or `[N]` for `reduction="none"`.
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
    """The function of `NTXentLoss`: the inputs of its `forward`, then its options."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, _, own = two_views(view1, view2, None, normalize, backend, gather)
    scale = Scale.of(temperature, rows, normalize)
    loss, _ = contrast(rows, own, keys=keys, scale=scale, denominator="pair")
    return reduce(loss, None, reduction, own.order, gather=gather)


class NTXentLoss(Loss):
    """Normalised temperature-scaled cross-entropy of two views (NT-Xent, SimCLR).

        L_i = -log( e^{l_i,pair(i)} / Σ_{j≠i} e^{l_ij} )

    i runs over the 2N rows of both views. pair(i) is the other view of the same image. l_ij is the cosine of rows i and
    j, divided by the temperature. The loss pulls the two views of an image together and pushes the rows of other images
    away. Every row counts.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations" (ICML 2020), eq. 1. The
    value is that of the authors' formula.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        normalize: Divide each row by its L2 norm. Rows with a norm of at most 1e-12 become zero and get no gradient.
            False: l_ij is the inner product over the temperature.
        reduction: "mean" over the 2N rows, "sum", or "none" (`[2N]`, the rows of `view1` first).
        gather: On several processes, contrast with the rows of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the inputs. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> view1 = view2 = torch.eye(2)
        >>> loss = hpcloss.NTXentLoss(temperature=1.0)(view1, view2)
        >>> round(loss.item(), 4)  # log(e + 2) - 1
        0.5514
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
        """Compute the loss of two views.

        Args:
            view1: `[N, D]`, any float dtype. Row i shows image i.
            view2: `[N, D]`. Row i shows image i too.

        Returns:
            The loss in fp32 (float64 for float64 views): 0-dim, or `[2N]` for `reduction="none"`.
        """
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
    """The function of `InfoNCELoss`: the inputs of its `forward`, then its options but `learnable`."""
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
        if reduction != "mean":  # one mean over both directions
            loss = loss.mean(0)
    else:
        all_keys = keys
        if gather:
            met, all_keys = gather_all(keys)
            place = met.self_pos  # row of the own positive among the keys of all ranks
            pairs = pairs.replace(pos_start=place, pos_end=place + 1, key_start=met.key_start, key_end=met.key_end)
        loss, _ = contrast(rows, pairs, keys=all_keys, scale=scale, denominator="pair")
        if symmetric:
            of_keys, _ = contrast(keys, pairs, keys=gather_all(rows)[1], scale=scale, denominator="pair")
            loss = (loss + of_keys) / 2
    return reduce(loss, None, reduction, gather=gather)


class InfoNCELoss(Loss):
    """Cross-entropy of the positive key of each query against other keys (InfoNCE, CLIP).

        without negatives:  L_i = -log( e^{q_i·k_i/τ} / Σ_j e^{q_i·k_j/τ} )
        with negatives n:   L_i = -log( e^{q_i·k_i/τ} / ( e^{q_i·k_i/τ} + Σ_m e^{q_i·n_m/τ} ) )
        symmetric:          L_i = 1/2 [ first line - log( e^{q_i·k_i/τ} / Σ_j e^{q_j·k_i/τ} ) ]

    q_i is query i, k_i its positive key and τ the temperature, all rows of unit length. The loss pulls a query to its
    positive key. It pushes the query away from the keys of the other queries, or from the given negatives. Every query
    counts.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding" (2018), eq. 4. Symmetric:
    Radford et al., "Learning transferable visual models from natural language supervision" (2021), fig. 3; the clamp of
    its learnt temperature is left out.

    Args:
        temperature: τ. A positive number, or a tensor with one element.
        learnable: Make log(1 / temperature) a parameter, `log_scale` in fp32 (CLIP). It starts at `temperature`. Later
            assignments to `temperature` set the parameter.
        symmetric: Each key also looks for its query (CLIP). Invalid with given negatives.
        normalize: Divide each row by its L2 norm. False: take the rows as they are.
        reduction: "mean", "sum", or "none" (`[N]`).
        gather: On several processes, contrast with the keys of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the inputs. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid, or negatives are given with `symmetric`.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> query = positive = torch.eye(3)
        >>> contrast = hpcloss.InfoNCELoss(temperature=1.0, learnable=True)
        >>> round(contrast(query, positive).item(), 4)  # log(e + 2) - 1
        0.5514
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
        """Read a learnt temperature as a 0-dim tensor joined to the graph."""
        if name == "temperature" and "log_scale" in self.__dict__.get("_parameters", {}):
            return torch.exp(-self.log_scale)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A learnt temperature is stored in `log_scale`."""
        if name == "temperature" and "log_scale" in self.__dict__.get("_parameters", {}):
            check_each("infonce_loss", {name: value.item() if isinstance(value, Tensor) else value})
            with torch.no_grad():
                self.log_scale.fill_(-math.log(float(value)))
        else:
            super().__setattr__(name, value)

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Compute the loss of queries and their positive keys.

        Args:
            query: `[N, D]`, any float dtype.
            positive: `[N, D]`. Row i is the positive key of query i.
            negatives: `[M, D]`, negative keys of all queries. None: the positive keys of the other queries are the
                negatives.

        Returns:
            The loss in fp32 (float64 for float64 queries): 0-dim, or `[N]` for `reduction="none"`.
        """
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
    """The function of `HardNegativeNCELoss`: the inputs of its `forward`, then its options."""
    check_vectors("view1", view1)
    if check_finite:
        check_used(temperature=temperature, view1=view1, view2=view2)
    gather = has_peers(gather)
    rows, keys, by_image, own = two_views(view1, view2, None, normalize, backend, gather)
    scale = Scale.of(temperature, rows, normalize)
    factors = (1 + beta, beta) if beta else (1.0,)
    positive, found = one_positive(rows, own, scale, keys=keys, factors=factors)
    sums = list(found) if beta else [found]
    # Each image has two keys, and all keys are in one region.
    negatives = own.intervals.key_end - own.intervals.key_start - 2
    counted = None
    if gather or view1.shape[0] < 2:  # otherwise every row has a negative; avoids -inf - -inf
        counted = (negatives > 0).expand_as(positive)
        sums = [torch.where(counted, one, 0.0) for one in sums]
    log_count = negatives.clamp(min=1).to(positive.dtype).log()
    # Σ v e^l = N Σ e^{(1 + beta) l} / Σ e^{beta l}. `ratio` is the logarithm of it over N e^{l+}.
    if beta:
        hard, weights = sums
        ratio = hard - weights - positive
    else:
        ratio = sums[0] - log_count - positive
    if tau_plus:
        # The remaining share without false negatives, as a logarithm. If none remains, the lowest value holds.
        left = -(math.log(tau_plus) - ratio).clamp(max=0.0).expm1()
        left = ratio + left.clamp(min=torch.finfo(left.dtype).tiny).log()
        ratio = torch.maximum(left - math.log1p(-tau_plus), -scale.value - positive)
    loss = softplus(ratio + log_count)
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    return reduce(loss, counted, reduction, own.order, gather=gather)


class HardNegativeNCELoss(Loss):
    """Contrast of two views with hard negatives and a correction for false negatives.

        L_i = -log( e^{l_i+} / ( e^{l_i+} + G_i ) )
        G_i = max( ( Σ_{n∈N(i)} v_in e^{l_in} - τ⁺ |N(i)| e^{l_i+} ) / (1 - τ⁺),  |N(i)| e^{-1/temperature} )
        v_in = e^{β l_in} / mean_{m∈N(i)} e^{β l_im}

    i runs over the 2N rows of both views. l_i+ is the logit of row i and the other view of its image, and l_in that of
    row i and row n: the cosine divided by the temperature. N(i), the negatives, are the rows of other images. β is
    `beta`, τ⁺ is `tau_plus`. The weights v are differentiated.

    The loss pulls the two views of an image together. It pushes rows of other images away, and the similar ones most.
    The correction takes the expected share of false negatives out of the sum. A row counts if it has a negative.

    Source: Robinson et al., "Contrastive learning with hard negative samples" (ICLR 2021), eq. 4. β = 0 is Chuang et
    al., "Debiased contrastive learning" (NeurIPS 2020). β = 0 and τ⁺ = 0 is `NTXentLoss`. The value is that of the
    authors' formula.

    Args:
        temperature: Divides the similarities. A positive number, or a tensor with one element (learnable).
        beta: Exponent of the weights, at least 0. 0: all negatives have the same weight.
        tau_plus: Probability that a negative is a false one, in [0, 1). 0: no correction and no lowest value of G_i.
        normalize: Divide each row by its L2 norm. The lowest value of G_i holds for rows of unit length.
        reduction: "mean" over counted rows, "sum", or "none" (`[2N]`, the rows of `view1` first).
        gather: On several processes, contrast with the rows of all ranks (`hpcloss.distributed`).
        check_finite: Raise ValueError for inf or NaN in the inputs. Synchronises with the device.
        backend: "auto" (the fastest that can run), "dense", "blockwise" or "triton". A named backend never falls back.

    Raises:
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.
        NotImplementedError: The backend cannot run the call.
        RuntimeError: The loss is differentiated twice.

    Examples:
        >>> import torch, hpcloss
        >>> view1 = view2 = torch.eye(2)
        >>> loss = hpcloss.HardNegativeNCELoss(temperature=1.0, beta=0.0, tau_plus=0.0)(view1, view2)
        >>> round(loss.item(), 4)  # log(e + 2) - 1, as NTXentLoss
        0.5514
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
        """Compute the loss of two views.

        Args:
            view1: `[N, D]`, any float dtype. Row i shows image i.
            view2: `[N, D]`. Row i shows image i too.

        Returns:
            The loss in fp32 (float64 for float64 views): 0-dim, or `[2N]` for `reduction="none"`.
        """
        return unchecked(hard_negative_nce_loss)(view1, view2, **self.options)
