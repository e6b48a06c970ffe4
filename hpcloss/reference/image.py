"""Image-level contrast, dense."""

import torch
from torch import Tensor

from hpcloss.reference.masked import lse, reduce, softmax, softplus, unit


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
    x = unit(torch.cat([view1, view2]), normalize)
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
    loss = softplus(lse(x @ keys.T / temperature, negative) - own_logit)
    if beta is None:
        loss = loss * (softmax(-hardness * own, counted) * counted.sum()).detach()
    return reduce(torch.where(counted, loss, 0.0), counted, reduction)
