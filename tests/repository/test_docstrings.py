"""Docstrings of the package: their examples run, and those of public things name every argument."""

import doctest
import importlib
import inspect
import re

import pytest

import hpcloss
from tests.tools.cases import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("hpcloss/**/*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
CLASSES = [name for name in hpcloss.__all__ if inspect.isclass(getattr(hpcloss, name))]
FUNCTIONS = [name for name in hpcloss.__all__ if inspect.isfunction(getattr(hpcloss, name))]
OF_A_LOSS = [name for name in FUNCTIONS if name.endswith("_loss")]  # documented in their classes


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", sorted({*CLASSES, *FUNCTIONS} - {*OF_A_LOSS}))
def test_there_is_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(hpcloss, name).__doc__)


@pytest.mark.parametrize("name", sorted({*CLASSES, *FUNCTIONS} - {*OF_A_LOSS}))
def test_every_argument_has_an_entry(name):
    thing = getattr(hpcloss, name)
    check_entries(thing)
    if inspect.isclass(thing):
        for method, body in vars(thing).items():
            if not method.startswith("_") and method != "extra_repr" and callable(getattr(thing, method)):
                check_entries(inspect.unwrap(getattr(body, "__func__", body)))


def check_entries(thing):
    entries = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", inspect.getdoc(thing), re.MULTILINE | re.DOTALL)
    documented = re.findall(r"^    \**(\w+): ", entries[1], re.MULTILINE) if entries else []
    expected = [one for one in inspect.signature(thing).parameters if one not in ("self", "cls")]
    assert documented == expected
