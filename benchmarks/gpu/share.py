"""A pytest plugin (`-p benchmarks.gpu.share`): this process's share of the tests, and a line of JSON for each result.

HPCLOSS_SHARE is "part/parts". Part 0 takes the tests of large tensors, one after another; the others take every
so-manyth of the rest: those run the same kernels, which are then built once. HPCLOSS_RESULTS is the file.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from benchmarks.gpu import cache

LARGE = "beyond_two_to"


def chosen(items: list[Any], part: int, parts: int) -> list[Any]:
    """This part's tests. Of tests/kernels/test_gpu.py those for a GPU: the others repeat them in the interpreter."""
    wanted = [item for item in items if item.path.name != "test_gpu.py" or item.get_closest_marker("gpu")]
    large = [item for item in wanted if LARGE in item.name]
    small = [item for item in wanted if item not in large]
    if parts == 1:
        return large + small
    return small[part - 1 :: parts - 1] if part else large


class Share:
    def __init__(self, share: str, results: str) -> None:
        self.part, self.parts = map(int, share.split("/"))
        self.results = open(results, "a")  # noqa: SIM115  until the process ends
        self.began = 0.0

    def say(self, **line: Any) -> None:
        self.results.write(json.dumps(line) + "\n")
        self.results.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = chosen(items, self.part, self.parts)
        self.say(chosen=len(items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began = time.monotonic()
        self.say(begin=nodeid, at=time.time())

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One line a test: of its call, or of what ended it before or after."""
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome if report.when == "call" else self.before(report)}
            if report.outcome == "skipped":
                line["reason"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            if hasattr(report, "wasxfail"):
                line["outcome"] = "xfailed" if report.outcome == "skipped" else "failed"
            self.say(**line, seconds=round(time.monotonic() - self.began, 3), kernels=cache.counted())

    @staticmethod
    def before(report: Any) -> str:
        return "skipped" if report.outcome == "skipped" else "failed"


def pytest_configure(config: Any) -> None:
    cache.open_carried()
    config.pluginmanager.register(Share(os.environ["HPCLOSS_SHARE"], os.environ["HPCLOSS_RESULTS"]), "hpcloss-share")
