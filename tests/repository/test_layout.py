"""The trees that CONTRIBUTING.md and hpcloss/DESIGN.md show under "Layout" are those of the repository."""

import re
from pathlib import Path

import pytest

from tests.tools.cases import ROOT

# What tools leave behind.
MADE = re.compile(r"^(\..*|__pycache__|build|dist|demo|runs|.*\.egg-info)$")


def shown(page):
    """Paths of a page's tree by the folder that they are in. A line: indentation, names, two blanks, words."""
    block = re.search(r"^## Layout\n.*?^```\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    found, parents = {}, {0: Path()}
    for line in block[1].splitlines():
        indent, names = re.match(r"( *)(\S+(?: \S+)*)", line).groups()
        parent = parents[len(indent)]
        for name in names.split():
            found.setdefault(parent, set()).add(parent / name)
            parents[len(indent) + 2] = parent / name
    return found


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "hpcloss/DESIGN.md"])
def test_the_tree_is_that_of_the_repository(page):
    """What is named exists. Where folders of a folder are named, all are, and so for its modules."""
    for parent, paths in shown(page).items():
        if parent == Path() and page != "CONTRIBUTING.md":
            continue  # a part of the repository
        there = [path for path in (ROOT / parent).iterdir() if not MADE.match(path.name)]
        folders = {path.relative_to(ROOT) for path in there if path.is_dir() and any(path.rglob("*.*"))}
        modules = {path.relative_to(ROOT) for path in there if path.suffix == ".py" and path.stem != "__init__"}
        assert all((ROOT / path).exists() for path in paths), [path for path in paths if not (ROOT / path).exists()]
        named = {path for path in paths if (ROOT / path).is_dir()}
        assert named == folders or not named, folders ^ named
        named = {path for path in paths if path.suffix == ".py" and path.stem != "__init__"}
        assert named == modules or not named, modules ^ named
