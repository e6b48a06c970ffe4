"""Exact contrastive losses for dense prediction in O(N D) memory."""

# Star imports keep the names of a loss in two lists instead of three: `__all__` of these modules.
from hpcloss import functional, losses
from hpcloss.backends import info
from hpcloss.functional import *  # noqa: F403
from hpcloss.heads import FeatureTap, ProjectionHead
from hpcloss.losses import *  # noqa: F403
from hpcloss.memory import EmbeddingQueue
from hpcloss.plan.sampling import sample_anchors, sample_positives
from hpcloss.prototypes import PrototypeBank, layer_prototypes, sinkhorn

__version__ = "0.2.0"

__all__ = [
    "EmbeddingQueue",
    "FeatureTap",
    "ProjectionHead",
    "PrototypeBank",
    "__version__",
    "info",
    "layer_prototypes",
    "sample_anchors",
    "sample_positives",
    "sinkhorn",
]
__all__ += functional.__all__
__all__ += losses.__all__
