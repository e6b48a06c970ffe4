"""The losses under the signatures of other libraries: one module per library, one changed import in a training script.

Each takes its library's constructor and call (order, defaults, normalisation, reduction) and gives its value and
gradient, computed without an N x N matrix; results are fp32 (float64 for float64). What is a defect of the library is
not reproduced: `docs/differences.md` lists each with an example. No library is imported here.
"""

from hpcloss.compat import contrastiveseg, infonce, lightly, monai, open_clip, pml, supcontrast

__all__ = ["contrastiveseg", "infonce", "lightly", "monai", "open_clip", "pml", "supcontrast"]
