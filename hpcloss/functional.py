"""The functions of the losses. Each is defined in `hpcloss.losses`, beside its module.

A function checks its options, sorts the pairs that count, packs the features, composes the primitives and reduces. A
module holds options and calls its function. `hpcloss.reference` has the same losses in dense form.

`ignore_index` removes rows as anchors and as keys. An anchor that does not count adds nothing to the loss. If no anchor
counts, the loss is 0 with zero gradients. Results are fp32, or float64 for float64 inputs.
"""

from __future__ import annotations

from hpcloss.losses.entropy import entropy_guided_contrast_loss
from hpcloss.losses.image import ihpc_loss
from hpcloss.losses.local import local_contrast_loss
from hpcloss.losses.multiscale import multiscale_contrast_loss
from hpcloss.losses.pixel import pixel_contrast_loss
from hpcloss.losses.prototype import prototype_assignment_loss, prototype_contrast_loss
from hpcloss.losses.region import region_phpc_loss, region_supcon_loss
from hpcloss.losses.vectors import hard_negative_nce_loss, infonce_loss, ntxent_loss, supcon_loss

__all__ = [
    "entropy_guided_contrast_loss",
    "hard_negative_nce_loss",
    "ihpc_loss",
    "infonce_loss",
    "local_contrast_loss",
    "multiscale_contrast_loss",
    "ntxent_loss",
    "pixel_contrast_loss",
    "prototype_assignment_loss",
    "prototype_contrast_loss",
    "region_phpc_loss",
    "region_supcon_loss",
    "supcon_loss",
]
