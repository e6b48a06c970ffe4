"""Writing so that a kill at any moment leaves either the old file or the new one, never half of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from examples.data.slices import DataError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls write(file) on a neighbouring temporary file and moves it to `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically. NaN is no JSON: pass None instead."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises DataError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error})") from error
