"""Exact contrastive losses for dense prediction in O(N D) memory."""

from hpcloss.backends import info
from hpcloss.functional import (
    hard_negative_nce_loss,
    ihpc_loss,
    infonce_loss,
    ntxent_loss,
    region_phpc_loss,
    region_supcon_loss,
    supcon_loss,
)
from hpcloss.heads import FeatureTap, ProjectionHead
from hpcloss.losses import (
    HardNegativeNCELoss,
    IHPCLoss,
    InfoNCELoss,
    NTXentLoss,
    RegionPHPCLoss,
    RegionSupConLoss,
    SupConLoss,
)
from hpcloss.sampling import sample_anchors, sample_positives

__version__ = "0.1.0"

__all__ = [
    "FeatureTap",
    "HardNegativeNCELoss",
    "IHPCLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "ProjectionHead",
    "RegionPHPCLoss",
    "RegionSupConLoss",
    "SupConLoss",
    "__version__",
    "hard_negative_nce_loss",
    "ihpc_loss",
    "info",
    "infonce_loss",
    "ntxent_loss",
    "region_phpc_loss",
    "region_supcon_loss",
    "sample_anchors",
    "sample_positives",
    "supcon_loss",
]
