"""Every loss as its paper prints it: dense, readable, differentiated by autograd. The oracle of the package.

Nothing here is fast: all pairs are written out. Names and arguments are those of `hpcloss.functional` without the ones
that concern speed or checking; everything is computed in the dtype of the inputs, so pass float64 to measure against.

Notation: rows x_i, unit rows with `normalize`; s_ij = <x_i, x_j>; τ the temperature (a number or a 0-dim tensor);
l_ij = s_ij / τ; P(i), N(i) the positive and negative keys of anchor i; lse = log-sum-exp.
An anchor that is not counted has loss 0. Where none counts the result is 0, joined to the graph, its gradient zero.
"""

from hpcloss.reference.entropy import entropy_guided_contrast_loss
from hpcloss.reference.image import ihpc_loss
from hpcloss.reference.local import local_contrast_loss
from hpcloss.reference.multiscale import multiscale_contrast_loss
from hpcloss.reference.pixel import pixel_contrast_loss
from hpcloss.reference.primitives import pair_lse, pair_mean
from hpcloss.reference.prototype import prototype_assignment_loss, prototype_contrast_loss
from hpcloss.reference.region import region_phpc_loss, region_supcon_loss
from hpcloss.reference.supcon import hard_negative_nce_loss, infonce_loss, ntxent_loss, supcon_loss

__all__ = [
    "entropy_guided_contrast_loss",
    "hard_negative_nce_loss",
    "ihpc_loss",
    "infonce_loss",
    "local_contrast_loss",
    "multiscale_contrast_loss",
    "ntxent_loss",
    "pair_lse",
    "pair_mean",
    "pixel_contrast_loss",
    "prototype_assignment_loss",
    "prototype_contrast_loss",
    "region_phpc_loss",
    "region_supcon_loss",
    "supcon_loss",
]
