"""Contrast of prototypes and assignment to them (PCCS)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpcloss.checks import IGNORED, VECTORS_IGNORED
from hpcloss.functional.prototype import prototype_assignment_loss, prototype_contrast_loss
from hpcloss.losses.base import Loss


class PrototypeContrastLoss(Loss):
    r"""Prototypes of a batch contrasted with one another; similar positives and uncertain prototypes weigh more.

        L = Σ_i u_i Σ_{j∈P(i)} w_ij [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]
        w_ij = softmax_{j∈P(i)}( -hardness · s_ij ),      u_i = softmax_i( H(π_i) ),   H(π) = -Σ_c π_c log π_c

    s_ij is the cosine of prototypes i and j, l_ij = s_ij / temperature; P(i): the other prototypes of i's class, N(i):
    those of other classes; π_i: the mean class probabilities of i's pixels. Without them u is uniform.

    Source: He et al., PCCS (arXiv 2502.06650), and its code, from which the signs of both weights are read (the paper's
    own are unknown to us). There a class with a single prototype makes the loss NaN; here it does not count, as it has
    no positive, and u is a softmax over the prototypes that do.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable; needs a hardness).
        hardness: None: -1 / temperature, the published weights e^{l_ij}, which favour similar positives; 0 weighs all
            alike, positive numbers favour dissimilar ones.
        detach_weights: weights w are constants to the gradient. As published they are not.
        ignore_index: label or labels of rows that take no part, such as prototypes without pixels.
        normalize: L2-normalise the rows; those of norm up to 1e-12 become zero and get no gradient. False: the inner
            product takes the place of the cosine, in the weights too.
        reduction: "mean" (above), "sum" (times the number of counted prototypes n) or "none" ([M]: n u_i L_i).
        gather: contrast with the rows of every rank of a distributed run, exactly; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".

    A prototype counts if it has a positive and a negative. None counted: 0, joined to the graph. Raises ValueError for
    shapes and hyper-parameters, TypeError for dtypes, NotImplementedError for a backend that cannot run; never for
    data. Differentiating twice raises.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        hardness: float | None = None,
        *,
        detach_weights: bool = False,
        ignore_index: int | Sequence[int] = VECTORS_IGNORED,
        normalize: bool = True,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            prototype_contrast_loss,
            temperature=temperature, hardness=hardness, detach_weights=detach_weights, ignore_index=ignore_index,
            normalize=normalize, reduction=reduction, gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(self, prototypes: Tensor, labels: Tensor, probs: Tensor | None = None) -> Tensor:
        """prototypes [M, D], labels [M], probs [M, C], differentiated too; as `layer_prototypes` gives them."""
        return prototype_contrast_loss(prototypes, labels, probs, **self.options)


class PrototypeAssignmentLoss(Loss):
    r"""Each pixel finds its prototypes among all; which ones of its class is a balanced assignment.

        L_i = -Σ_k q_ik log( e^{l_i,ck} / Σ_{c',k'} e^{l_i,c'k'} ),      c the class of pixel i
        q = Sinkhorn( cos(t_i, p_ck) / epsilon ) over the pixels of class c, a constant

    l_i,ck is the cosine of pixel i and prototype k of class c over the temperature; t the teacher's embedding of the
    pixel, else its own. With one prototype per class this is plain classification by prototypes.

    Source: the prototype-updating-prototype loss of He et al., PCCS (arXiv 2502.06650), and Zhou et al., "Rethinking
    semantic segmentation: a prototype view" (CVPR 2022). A reconstruction: in PCCS's code teacher features meet a
    detached bank, so that no gradient reaches the student; here the student's features are classified, with the
    teacher's assignment as target. Their Gumbel softmax of the assignment is left out: it takes the soft one.

    Args:
        temperature: positive number, or a 0-dim tensor (learnable).
        iterations, epsilon: of `sinkhorn`.
        ignore_index: label or labels of pixels that take no part; nor do those outside [0, C).
        reduction: "mean" over counted pixels, "class" (mean of class means), "sum", or "none" (a map [B, *S]).
        gather: reduce over the pixels of every rank of a distributed run, each of which balances the assignment of its
            own; see `hpcloss.distributed`.
        check_finite: raise for inf and NaN in what takes part, with the name and the place (waits for the device).
        backend: "auto", "blockwise" or "triton".

    Features and prototypes are always normalised: a prototype is a direction, and the assignment balances cosines, of
    which `epsilon` is the scale. A prototype of norm up to 1e-12, such as one a `PrototypeBank` has not filled, is not
    there; a pixel counts if its class has a prototype. No pixel counted: 0, joined to the graph. The assignment holds a
    number for each pixel and prototype, N C K of them. Raises ValueError for shapes and hyper-parameters, TypeError for
    dtypes, NotImplementedError for a backend that cannot run; never for data. Differentiating twice raises.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        iterations: int = 4,
        epsilon: float = 0.05,
        ignore_index: int | Sequence[int] = IGNORED,
        reduction: str = "mean",
        gather: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            prototype_assignment_loss,
            temperature=temperature, iterations=iterations, epsilon=epsilon, ignore_index=ignore_index,
            reduction=reduction, gather=gather, check_finite=check_finite, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, labels: Tensor, prototypes: Tensor, teacher_features: Tensor | None = None
    ) -> Tensor:
        """features [B, D, *S]; labels [B, *S] or [B, 1, *S], resized by nearest neighbour; prototypes [C, K, D]
        and teacher_features [B, D, *S], both constants to the gradient."""
        return prototype_assignment_loss(features, labels, prototypes, teacher_features, **self.options)
