"""The project's pages as tests see them: their Python blocks, which run, and their links."""

import functools
import re
from typing import Any

from tests.tools.cases import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
EXCERPT = "# excerpt"  # how a block begins that cannot run alone
ON_A_GPU = "# needs a GPU"  # and one that tests/kernels/test_compile_and_graphs.py runs


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, by its path in the repository."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def links(page: str) -> list[str]:
    """Where its links and pictures lead, those to the web left out."""
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in LINK.findall(prose) if "://" not in target]


def headings(page: str) -> set[str]:
    """The anchors of a page's headings, as repository hosts make them."""
    titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def run(page: str, **given: Any) -> dict[str, Any]:
    """Execute a page's blocks one after the other in one namespace, which begins with what is given."""
    names = dict(given)
    for number, block in enumerate(blocks(page), 1):
        code = compile(block, f"{page}, block {number}", "exec")
        if not block.startswith((EXCERPT, ON_A_GPU)):
            exec(code, names)
    return names


@functools.cache
def names_of(page: str) -> dict[str, Any]:
    """The names that a page's blocks define, executed once."""
    return run(page)
