"""What rows know of those before them."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.measure import Bar


class Known(NamedTuple):
    """seconds: for a time. ceilings: rates of the machine. rows: the figures of earlier rows."""

    seconds: float
    ceilings: dict[str, float]
    rows: list[dict[str, Any]]

    def figure(self, name: str, key: str) -> Any:
        """A figure of an earlier row, or None."""
        return next((row.get(key) for row in self.rows if row["name"] == name), None)


def barred(figures: dict[str, Any], *bars: Bar) -> dict[str, Any]:
    return figures | {"bars": [bar.as_dict() for bar in bars]}
