"""Files that repeat a version, a list or a path of another file repeat it right."""

import re

import hpcloss
from tests.tools.cases import ROOT


def read(name):
    return (ROOT / name).read_text()


def test_citation_names_the_version():
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)[1] == hpcloss.__version__


def test_hooks_have_the_versions_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", read("constraints.txt"), re.MULTILINE))
    hooks = re.findall(r"repo: https://\S+/(\S+)\n    rev: v(\S+)", read(".pre-commit-config.yaml"))
    assert {name.removesuffix("-pre-commit") for name, _ in hooks} == {"ruff", "codespell", "validate-pyproject"}
    assert all(pinned[name.removesuffix("-pre-commit")] == version for name, version in hooks)


def test_windows_runs_the_quick_tests():
    quick = re.search(r"^QUICK := ((?:.*\\\n)*.*)", read("Makefile"), re.MULTILINE)[1]
    windows = read(".github/workflows/tests.yml").partition("python -m pytest -q ")[2].partition("\n\n")[0]
    assert windows.replace("\\\n", " ").split() == quick.replace("\\\n", " ").split()


def test_releases_compile_with_the_nvcc_of_the_makefile():
    folder = re.search(r"^NVCC := (\S+)$", read("Makefile"), re.MULTILINE)[1]
    settings = read("pyproject.toml")
    assert f"make {folder}/installed" in settings and f"/project/{folder}/nvidia/cu13" in settings
