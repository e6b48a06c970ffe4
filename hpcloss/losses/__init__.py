"""The losses, one file per family: the function and its module side by side.

This package exports the modules. `hpcloss.functional` exports the functions.
"""

from hpcloss.losses.entropy import EntropyGuidedContrastLoss
from hpcloss.losses.image import IHPCLoss
from hpcloss.losses.local import LocalContrastLoss
from hpcloss.losses.multiscale import MultiscaleContrastLoss
from hpcloss.losses.pixel import PixelContrastLoss
from hpcloss.losses.prototype import PrototypeAssignmentLoss, PrototypeContrastLoss
from hpcloss.losses.region import RegionPHPCLoss, RegionSupConLoss
from hpcloss.losses.vectors import HardNegativeNCELoss, InfoNCELoss, NTXentLoss, SupConLoss

__all__ = [
    "EntropyGuidedContrastLoss",
    "HardNegativeNCELoss",
    "IHPCLoss",
    "InfoNCELoss",
    "LocalContrastLoss",
    "MultiscaleContrastLoss",
    "NTXentLoss",
    "PixelContrastLoss",
    "PrototypeAssignmentLoss",
    "PrototypeContrastLoss",
    "RegionPHPCLoss",
    "RegionSupConLoss",
    "SupConLoss",
]
