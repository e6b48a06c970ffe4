"""Contrast of vectors: supervised (SupCon), two views (NT-Xent), one positive key (InfoNCE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcloss.checks import VECTORS_IGNORED, check_options
from hpcloss.functional.supcon import hard_negative_nce_loss, infonce_loss, ntxent_loss, supcon_loss
from hpcloss.losses.base import Loss


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
        backend: "auto", "blockwise" or "triton".
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
        return supcon_loss(embeddings, labels, keys, key_labels, **self.options)


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
        return ntxent_loss(view1, view2, **self.options)


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
        return hard_negative_nce_loss(view1, view2, **self.options)


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
        check_options(infonce_loss, {"temperature": temperature, "learnable": learnable})
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
            check_options(infonce_loss, {name: value.item() if isinstance(value, Tensor) else value})
            with torch.no_grad():
                self.log_scale.fill_(-math.log(float(value)))
        else:
            super().__setattr__(name, value)

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        """query, positive [N, D]; negatives [M, D], shared by all queries."""
        options = self.options
        if self.learnable:
            options["temperature"] = torch.exp(-self.log_scale)
        return infonce_loss(query, positive, negatives, **options)

    def extra_repr(self) -> str:
        start = f"temperature={torch.exp(-self.log_scale).item():.4g}, " if self.learnable else ""
        return f"{start}{super().extra_repr()}, learnable={self.learnable}"
