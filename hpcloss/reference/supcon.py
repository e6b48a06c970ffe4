"""Contrast of vectors, dense: by labels, of two views, of queries and keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import is_valid, lse, reduce, softplus, unit


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
    rows = is_valid(labels, ignore_index).nonzero().squeeze(1)
    x, y = unit(embeddings[rows], normalize), labels[rows]
    if keys is None or key_labels is None:
        k, key_y, others = x, y, ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    else:
        key_labels = key_labels.to(torch.int64)
        kept = is_valid(key_labels, ignore_index).nonzero().squeeze(1)
        k, key_y = unit(keys[kept], normalize), key_labels[kept]
        others = torch.ones(len(x), len(k), dtype=torch.bool, device=x.device)
    logit = x @ k.T / temperature
    positive = (y[:, None] == key_y) & others
    counts = positive.any(-1)
    number = positive.sum(-1).clamp(min=1).to(logit.dtype)
    if form == "out":
        pull = torch.where(positive, logit, 0.0).sum(-1) / number
    else:
        pull = torch.where(counts, lse(logit, positive), 0.0) - number.log()
    value = torch.where(counts, lse(logit, others) - pull, 0.0)
    loss = (torch.zeros_like(embeddings[:, 0]) + embeddings[:0].sum()).index_put((rows,), value)
    counted = torch.zeros_like(labels, dtype=torch.bool).index_put((rows,), counts)
    return reduce(loss, counted, reduction, {"class": labels})


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
    x = unit(torch.cat([view1, view2]), normalize)
    own = (x * x.roll(len(view1), 0)).sum(-1) / temperature
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return reduce(lse(x @ x.T / temperature, others) - own, others.any(-1), reduction)


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
    x = unit(torch.cat([view1, view2]), normalize)
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
    return reduce(torch.log1p(torch.where(counted, others, 0.0) / own.exp()), counted, reduction)


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
    q, k = unit(query, normalize), unit(positive, normalize)
    own = (q * k).sum(-1) / temperature
    keys = k if negatives is None else unit(negatives, normalize)
    logit = q @ keys.T / temperature
    total = lse(logit, torch.ones_like(logit, dtype=torch.bool))
    if symmetric:
        total = (total + lse(logit.T, torch.ones_like(logit.T, dtype=torch.bool))) / 2
    loss = total - own if negatives is None else softplus(total - own)
    return reduce(loss, torch.ones_like(own, dtype=torch.bool), reduction)
