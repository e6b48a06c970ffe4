"""The two primitives of the package, dense."""

from torch import Tensor

from hpcloss.reference.masked import lse, softmax, softplus


def pair_lse(
    anchors: Tensor, keys: Tensor, allowed: Tensor, scale: float | Tensor, bias: Tensor | None = None
) -> Tensor:
    """lse_i = log Σ_{j: allowed_ij} exp(scale * s_ij + bias_j), shape [N]; -inf where nothing is allowed.

    anchors [N, D] and keys [M, D] are used as they are; allowed [N, M] boolean; bias [M].
    """
    logit = scale * (anchors @ keys.T)
    return lse(logit if bias is None else logit + bias, allowed)


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
    weight = softmax(score, positives)
    value = scale * s
    if stat is not None and term == "own":
        value = softplus(stat.unsqueeze(-1) - (scale - discount) * s) - discount * s
    out = ((weight.detach() if detach_weights else weight) * value).sum(-1)
    return out, lse(score, positives).detach()
