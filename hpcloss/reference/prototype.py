"""Contrast of prototypes and assignment to them, dense."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcloss.reference.masked import IGNORED, is_valid, reduce, softmax, unit
from hpcloss.reference.region import contrast, labels_at


def prototype_contrast_loss(
    prototypes: Tensor,
    labels: Tensor,
    probs: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    hardness: float | None = None,
    *,
    detach_weights: bool = False,
    ignore_index: int | Sequence[int] = (-100, -1),
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Contrast of prototypes; similar positives weigh more, and uncertain anchors.

        L = Σ_i u_i Σ_{j in P(i)} w_ij [ log( e^{l_ij} + Σ_{n in N(i)} e^{l_in} ) - l_ij ]
        w_ij = e^{-hardness * s_ij} / Σ_{j' in P(i)} e^{-hardness * s_ij'},   hardness None: -1 / τ, so w_ij ~ e^{l_ij}
        u_i  = e^{H(π_i)} / Σ_m e^{H(π_m)} over the counted m,   H = -Σ π log π;   without probs u_i = 1 / n

    P(i): other prototypes of the class of i; N(i): those of other classes. w is differentiated unless detach_weights,
    u always. Counted, n of them: at least one positive and one negative.

    He et al., arXiv 2502.06650, as the authors' code has it, less its 1e-8 inside the logarithm. Whether u grows with
    the entropy in the paper too could not be seen; restricting it to the counted prototypes is ours.

    prototypes [M, D]; labels [M]; probs [M, C]. Returns L, n L with reduction="sum", or n u_i L_i [M] with "none".
    """
    if hardness is None:
        hardness = -1 / float(temperature)
    labels = labels.to(torch.int64)
    valid = is_valid(labels, ignore_index)
    x = unit(torch.where(valid[:, None], prototypes, 0.0), normalize)
    both = valid[:, None] & valid
    same = labels[:, None] == labels
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    loss, counted = contrast(
        x @ x.T, both & same & others, both & ~same, temperature, hardness, 0.0, "own", detach_weights
    )
    if probs is not None:
        probs = torch.where(counted[:, None], probs, 0.0)
        entropy = -(probs * torch.where(probs > 0, probs, 1.0).log()).sum(1)
        loss = loss * softmax(entropy, counted) * counted.sum()
    return reduce(loss, counted, reduction)


def prototype_assignment_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    teacher_features: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    iterations: int = 4,
    epsilon: float = 0.05,
    ignore_index: int | Sequence[int] = IGNORED,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of pixels over all prototypes against a balanced assignment to those of their class.

        L_i = -Σ_k q_ik log( e^{cos(f_i, p_ck) / τ} / Σ_{c', k'} e^{cos(f_i, p_c'k') / τ} ),   c = y_i
        q: of Q = e^{cos(t_i, p_ck) / epsilon} over the pixels i of class c, columns and rows by turns divided by their
           sums, `iterations` times; a constant. t: the teacher's features, else f

    He et al., arXiv 2502.06650, and Zhou et al., CVPR 2022 (arXiv 2203.15102): a reconstruction, as the code of the
    former gives the student no gradient. Prototypes are constants; those that are zero are not there. Counted: the
    class has a prototype.

    features, teacher_features [B, D, *S]; labels [B, *S'] or [B, 1, *S']; prototypes [C, K, D]. Returns a scalar, or
    [B, *S] with reduction="none"; "class" averages the means of the classes.
    """
    batch, dim, *spatial = features.shape
    y = labels_at(labels.squeeze(1) if labels.dim() == features.dim() else labels, spatial).reshape(-1)
    valid = is_valid(y, ignore_index)
    f, t = (
        unit(torch.where(valid[:, None], maps.movedim(1, -1).reshape(-1, dim), 0.0))
        for maps in (features, features if teacher_features is None else teacher_features)
    )
    p = unit(prototypes.detach().to(features.dtype))
    there = torch.linalg.vector_norm(p, dim=-1) > 0
    loss = torch.zeros_like(f[:, 0]) + features.reshape(-1)[:0].sum()
    counted = torch.zeros_like(valid)
    if there.any():
        total = torch.logsumexp(f @ p[there].T / temperature, 1)
        for c in range(len(p)):
            here = (valid & (y == c)).nonzero().squeeze(1)
            own = p[c][there[c]]
            if not len(own):
                continue
            q = torch.exp(t[here].detach() @ own.T / epsilon)
            for _ in range(iterations):
                q = q / q.sum(0)
                q = q / q.sum(1, keepdim=True)
            loss = loss.index_put((here,), total[here] - (q * (f[here] @ own.T) / temperature).sum(1))
            counted[here] = True
    loss = reduce(loss, counted, reduction, {"class": y})
    return loss.reshape(batch, *spatial) if reduction == "none" else loss
