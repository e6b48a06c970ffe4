"""The loss of docs/adding_a_loss.md, added to a copy of the repository as the page says, passes the tests of all."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.tools.cases import ROOT
from tests.tools.documents import EXCERPT, blocks

PAGE = "docs/adding_a_loss.md"
FILES = dict(re.match(rf"{EXCERPT} of (\S+)\n(.*)", block, re.DOTALL).groups() for block in blocks(PAGE)[-6:])
ROW = re.search(r"^```\n(\| `DecoupledContrastLoss`.*\n)```$", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE)[
    1
]
LISTS = re.compile(r"^(\w+ = [\[{]\n)(.*)^[\]}]\n", re.MULTILINE | re.DOTALL)


def add(path, text):
    """A new file as it is; of an old one the imports and the entries of its list."""
    if not path.exists():
        path.write_text(text)
        return
    (head, entries), old = LISTS.search(text).groups(), path.read_text()
    imports = "".join(re.findall(r"^from .*\n", text, re.MULTILINE))
    first = re.search(r"^from hpcloss.*\n", old, re.MULTILINE).start()
    old = old[:first] + imports + old[first:]
    assert old.count(head) == 1
    path.write_text(in_order(old.replace(head, head + entries)))


def in_order(text):
    """The same module with its list of names sorted."""
    return re.sub(
        r"^(__all__ = \[\n)(.*?)^\]", lambda found: found[1] + "".join(sorted(found[2].splitlines(True))) + "]",
        text, flags=re.MULTILINE | re.DOTALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in ("hpcloss", "tests", "docs", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name, text in FILES.items():
        add(folder / name, text)
    readme = (folder / "README.md").read_text()
    # The row of SupConLoss names it, or links its page.
    readme, added = re.subn(r"^(?=\| \[?`SupConLoss`)", lambda _: ROW, readme, count=1, flags=re.MULTILINE)
    assert added == 1
    (folder / "README.md").write_text(readme)
    return folder


def test_it_touches_at_most_seven_files():
    assert len(FILES) + 1 <= 7
    assert {name for name in FILES if (ROOT / name).exists()} == {
        "hpcloss/functional.py", "hpcloss/losses/__init__.py", "tests/tools/losses.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    "tests",
    [
        ["losses/test_decoupled.py", "losses/test_every_loss.py", "losses/test_modules.py", "losses/test_options.py",
         "losses/test_trainers.py", "primitives/test_ops.py", "repository/test_stress.py"],
        ["kernels/test_every_loss.py"],
        ["compiled/test_launch_path.py"],
        ["repository/test_layers.py"],
        ["repository/test_docstrings.py"],
    ],
    ids=lambda tests: tests[-1],
)  # fmt: skip
def test_it_passes_the_tests_of_every_loss(repository, tests):
    if tests[0].startswith(("kernels", "compiled")):
        pytest.importorskip("triton")
    chosen = "decoupled or Decoupled or every_public_loss or random_configurations"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [] if tests[0] == "repository/test_layers.py" else ["-k", chosen]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in tests)], cwd=repository, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and " failed" not in done.stdout
