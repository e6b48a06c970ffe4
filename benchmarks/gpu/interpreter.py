"""What Triton's interpreter needs on a machine with a newer numpy than its own.

Triton 3.6 turns a tensor of one element into a Python number by `int(data)`. numpy 2.4 takes that for arrays without an
axis alone, and loops whose bounds are read from memory raise. Triton 3.9 asks `int(data.squeeze())`.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any


def mend() -> bool:
    """Let the interpreter take its index from the array's only element; whether that was needed."""
    import numpy
    from triton.runtime import interpreter

    with warnings.catch_warnings(), contextlib.suppress(TypeError):
        warnings.simplefilter("ignore")  # of the versions that still take it
        int(numpy.zeros(1))
        return False
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:  # Triton 3.4 has no scope that restores what was there
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    return True
