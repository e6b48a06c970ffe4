"""The evidence for the Triton kernels on each compute capability. `tests/compiled/test_evidence.py` compares it."""

from __future__ import annotations

SEEN: dict[str, tuple[int, ...]] = {
    "compiled": (75, 80, 86, 89, 90, 100, 120),  # registers, spills, shared memory: tests/compiled/test_budgets_*.py
    "executed (PTX interpreter)": (80, 90, 120),  # whole losses against float64: tests/compiled/test_ptx.py
    "launched (stand-in driver)": (80, 90, 120),  # Triton's binder and launcher: tests/compiled/test_launch_path.py
    "measured on a GPU": (),  # benchmarks/results
}
AMD = "kernels on AMD devices: compiled for gfx90a and gfx942; never run"


def of(capability: int, part: str, is_known: bool) -> str:
    """One line of text. `part` names the tile shapes of the capability; is_known: they are made for it."""
    if not any(capability in seen for seen in SEEN.values()):
        shapes = f"tile shapes of {part!r}" if is_known else "smallest tile shapes"
        return f"kernels on sm_{capability}: {shapes}, compiled for none"
    done, missing = (
        ", ".join(what for what, seen in SEEN.items() if (capability in seen) == wanted) for wanted in (True, False)
    )
    return f"kernels on sm_{capability}: {done}" + (f"; not {missing.replace(', ', ', not ')}" if missing else "")
