"""Docstrings of the package: their examples run, and those of public things name every argument."""

import doctest
import importlib
import inspect
import re

import pytest

import hpcloss
from hpcloss import compat
from tests.tools.cases import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("hpcloss/**/*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
# What people write losses of, by module.
PARTS = {
    "hpcloss.losses.reduction": ["reduce"],
    "hpcloss.plan.partition": ["partition", "class_sort", "partition_against", "paired", "one_to_one", "two_by_two"],
    "hpcloss.plan.sampling": ["sample", "sample_hard_easy"],
    "hpcloss.primitives.contrast": ["contrast"],
    "hpcloss.primitives.one_positive": ["one_positive"],
    "hpcloss.primitives.pair_cross_entropy": ["pair_cross_entropy"],
    "hpcloss.primitives.pair_lse": ["pair_lse", "pair_lse_both"],
    "hpcloss.primitives.pair_mean": ["pair_mean"],
    "hpcloss.primitives.rows": ["pack"],
    "hpcloss.primitives.segment_mean": ["segment_mean"],
}


def is_documented(thing):
    """Functions of losses are documented in their classes."""
    return inspect.isclass(thing) or (inspect.isfunction(thing) and not thing.__name__.endswith("_loss"))


TOP = {name: getattr(hpcloss, name) for name in hpcloss.__all__ if is_documented(getattr(hpcloss, name))}
OF_PEERS = {
    f"{name}.{thing.__name__}": thing
    for name in compat.__all__
    for thing in vars(getattr(compat, name)).values()
    if getattr(thing, "__module__", None) == f"hpcloss.compat.{name}" and not thing.__name__.startswith("_")
}
OF_PARTS = {name: getattr(importlib.import_module(module), name) for module, names in PARTS.items() for name in names}
WITH_ENTRIES = {**TOP, **OF_PEERS, **OF_PARTS}


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", TOP)
def test_there_is_an_example(name):
    assert doctest.DocTestParser().get_examples(TOP[name].__doc__)


@pytest.mark.parametrize("name", WITH_ENTRIES)
def test_every_argument_has_an_entry(name):
    thing = WITH_ENTRIES[name]
    check_entries(thing)
    if inspect.isclass(thing):
        for method, body in vars(thing).items():
            if not method.startswith("_") and method != "extra_repr" and callable(getattr(thing, method)):
                check_entries(getattr(body, "__func__", body))


def check_entries(thing):
    entries = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", inspect.getdoc(thing), re.MULTILINE | re.DOTALL)
    documented = re.findall(r"^    \**(\w+): ", entries[1], re.MULTILINE) if entries else []
    assert documented == [one for one in inspect.signature(thing).parameters if one not in ("self", "cls")]
