"""Exact contrastive losses for dense prediction in O(N D) memory."""

from hpcloss.backends import info
from hpcloss.functional import (
    entropy_guided_contrast_loss,
    hard_negative_nce_loss,
    ihpc_loss,
    infonce_loss,
    local_contrast_loss,
    multiscale_contrast_loss,
    ntxent_loss,
    pixel_contrast_loss,
    prototype_assignment_loss,
    prototype_contrast_loss,
    region_phpc_loss,
    region_supcon_loss,
    supcon_loss,
)
from hpcloss.heads import FeatureTap, ProjectionHead
from hpcloss.losses import (
    EntropyGuidedContrastLoss,
    HardNegativeNCELoss,
    IHPCLoss,
    InfoNCELoss,
    LocalContrastLoss,
    MultiscaleContrastLoss,
    NTXentLoss,
    PixelContrastLoss,
    PrototypeAssignmentLoss,
    PrototypeContrastLoss,
    RegionPHPCLoss,
    RegionSupConLoss,
    SupConLoss,
)
from hpcloss.memory import EmbeddingQueue
from hpcloss.plan.sampling import sample_anchors, sample_positives
from hpcloss.prototypes import PrototypeBank, layer_prototypes, sinkhorn

__version__ = "0.1.0"

__all__ = [
    "EmbeddingQueue",
    "EntropyGuidedContrastLoss",
    "FeatureTap",
    "HardNegativeNCELoss",
    "IHPCLoss",
    "InfoNCELoss",
    "LocalContrastLoss",
    "MultiscaleContrastLoss",
    "NTXentLoss",
    "PixelContrastLoss",
    "ProjectionHead",
    "PrototypeAssignmentLoss",
    "PrototypeBank",
    "PrototypeContrastLoss",
    "RegionPHPCLoss",
    "RegionSupConLoss",
    "SupConLoss",
    "__version__",
    "entropy_guided_contrast_loss",
    "hard_negative_nce_loss",
    "ihpc_loss",
    "info",
    "infonce_loss",
    "layer_prototypes",
    "local_contrast_loss",
    "multiscale_contrast_loss",
    "ntxent_loss",
    "pixel_contrast_loss",
    "prototype_assignment_loss",
    "prototype_contrast_loss",
    "region_phpc_loss",
    "region_supcon_loss",
    "sample_anchors",
    "sample_positives",
    "sinkhorn",
    "supcon_loss",
]
