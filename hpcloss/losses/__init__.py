"""The losses as modules: hyper-parameters, documentation, nothing else."""

from hpcloss.losses.image import IHPCLoss
from hpcloss.losses.region import RegionPHPCLoss, RegionSupConLoss
from hpcloss.losses.supcon import HardNegativeNCELoss, InfoNCELoss, NTXentLoss, SupConLoss

__all__ = [
    "HardNegativeNCELoss",
    "IHPCLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "RegionPHPCLoss",
    "RegionSupConLoss",
    "SupConLoss",
]
