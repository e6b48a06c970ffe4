"""The losses under the signatures of other libraries: one module per library.

A class here takes the constructor and the call of its library, and gives its value and gradient without an N x N
matrix. A training script changes one import. Results are fp32 (float64 for float64). Defects of a library are left out;
`docs/differences.md` lists each with an example. No library is imported here.
"""

from hpcloss.compat import contrastiveseg, infonce, lightly, monai, open_clip, pml, supcontrast

__all__ = ["contrastiveseg", "infonce", "lightly", "monai", "open_clip", "pml", "supcontrast"]
