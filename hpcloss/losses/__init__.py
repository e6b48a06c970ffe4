"""The losses as modules: hyper-parameters, documentation, nothing else."""

from hpcloss.losses.image import IHPCLoss
from hpcloss.losses.region import RegionPHPCLoss, RegionSupConLoss
from hpcloss.losses.supcon import InfoNCELoss, NTXentLoss, SupConLoss

__all__ = ["IHPCLoss", "InfoNCELoss", "NTXentLoss", "RegionPHPCLoss", "RegionSupConLoss", "SupConLoss"]
