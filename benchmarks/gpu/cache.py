"""A cache of Triton's compiled kernels that is carried to another machine, and how many kernels a process compiled.

Triton finds a kernel under a key of: its source, constants and argument types; its options; the target; the version of
ptxas; some environment variables; and the files of its own installation. The last differ between wheels of one version
for different Pythons. A carried cache has Triton's version in their place. Triton's group files hold absolute paths,
so they are written anew where the cache is unpacked. The launchers in C are built on the machine that runs: they hold
the interface of one Python version.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

CARRIED = "HPCLOSS_CARRIED_CACHE"  # the environment variable that says that TRITON_CACHE_DIR is a carried cache
NEEDED = (".cubin", ".json")
MANIFEST = "prepared.json"

_counts: Counter[str] = Counter()  # and seconds
_lock = threading.Lock()


def open_carried() -> None:
    """Count kernels that are built or loaded; use the keys of a carried cache where the environment says so."""
    try:
        from triton import knobs
        from triton.runtime import build, cache
    except ImportError:
        return
    if os.environ.get(CARRIED):
        where = cache if hasattr(cache, "triton_key") else _compiler()
        key = f"carried {_version()}"
        where.triton_key = lambda: key
    before = knobs.compilation.listener

    def listener(**event: Any) -> None:
        with _lock:
            _counts["loaded" if event.get("cache_hit") else "compiled"] += 1
        if before is not None:
            before(**event)

    knobs.compilation.listener = listener
    make = build._build

    def timed(*arguments: Any, **options: Any) -> str:
        began = time.perf_counter()
        made = make(*arguments, **options)
        with _lock:
            _counts["launchers"] += 1
            _counts["launcher_seconds"] += time.perf_counter() - began
        return made

    build._build = timed


def _compiler() -> Any:
    from triton.compiler import compiler

    return compiler


def _version() -> str:
    import triton

    return triton.__version__


def counted() -> dict[str, float]:
    """Kernels that this process compiled, those that it loaded from a cache, and what it built in C to launch them."""
    with _lock:
        numbers = {name: _counts[name] for name in ("compiled", "loaded", "launchers")}
        return numbers | {"launcher_seconds": round(_counts["launcher_seconds"], 2)}


def pack(full: Path, carried: Path, manifest: dict[str, Any]) -> int:
    """Copy what loading needs of a cache; the bytes of the copy."""
    carried.mkdir(parents=True, exist_ok=True)
    for folder in sorted(path for path in full.iterdir() if path.is_dir()):
        files = [path for path in folder.iterdir() if path.suffix in NEEDED]
        if not any(path.suffix == ".cubin" for path in files):
            continue  # a launcher
        (carried / folder.name).mkdir(exist_ok=True)
        for path in files:
            if not path.name.startswith("__grp__"):
                shutil.copy(path, carried / folder.name / path.name)
    (carried / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return sum(path.stat().st_size for path in carried.rglob("*") if path.is_file())


def unpack(carried: Path, folder: Path) -> dict[str, Any]:
    """Copy a carried cache to where Triton may write, with group files for that place; what it was prepared for."""
    for kernel in sorted(path for path in carried.iterdir() if path.is_dir()):
        place = folder.resolve() / kernel.name
        place.mkdir(parents=True, exist_ok=True)
        children = {path.name: str(place / path.name) for path in kernel.iterdir()}
        for path in kernel.iterdir():
            shutil.copy(path, place / path.name)
        for name in children:
            if name.endswith(".json"):
                (place / f"__grp__{name}").write_text(json.dumps({"child_paths": children}))
    return json.loads((carried / MANIFEST).read_text())
