"""Every option of every loss has a rule: nonsense raises with its name and value, in the function and the module."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

import hpcloss
from hpcloss.losses.options import OF_ONE_LOSS, RULES, TOGETHER, check_each
from tests.losses.test_modules import INPUTS, MODULES, build
from tests.tools.losses import FAST, LOSSES


def options_of(function):
    """Parameters that are no tensors and nothing that holds any, with their annotations."""
    parameters = inspect.signature(function).parameters.items()
    inputs = {"self", "Tensor", "Tensor | None", "EmbeddingQueue | None"}
    return {name: one.annotation for name, one in parameters if name != "self" and one.annotation not in inputs}


OPTIONS = [(name, option) for name in MODULES for option in options_of(FAST[name])]
OF_MODULES = [(name, option) for name in MODULES for option in options_of(MODULES[name].__init__)]
ANNOTATION = {
    **{(name, option): one for name in MODULES for option, one in options_of(MODULES[name].__init__).items()},
    **{(name, option): one for name in MODULES for option, one in options_of(FAST[name]).items()},
}


def nonsense(name, option):
    """Values that no option takes, and those that its annotation excludes."""
    annotation = ANNOTATION[name, option]
    yield from ("nonsense", "", b"mean", math.nan, math.inf, -math.inf, ["x"], [0.5], {"a": 1}, object(), 1 + 2j)
    yield from (torch.tensor([0.5, 0.5]), np.array([0.5, 0.5]))
    if "None" not in annotation:
        yield None
    if "bool" in annotation:
        yield from (1, 0, 1.0, torch.tensor(True), np.array([True, False]), [True])
    else:
        yield from (True, False, [True])
    if "Sequence" not in annotation and "tuple" not in annotation:
        yield from ([], (1, 2))
    if "float" not in annotation:
        yield 0.5
    if option not in ("hardness", "background", "ignore_index"):
        yield from (-1, -0.5)
    if "int" in annotation and "float" not in annotation:
        yield 2**63


@pytest.mark.parametrize("name,option", sorted({*OPTIONS, *OF_MODULES}))
def test_nonsense_raises_with_its_name_and_value(name, option):
    values = list(nonsense(name, option))
    assert len(values) > 12
    for value in values:
        shown = {repr(value), str(value)} | ({str(tuple(value.shape))} if isinstance(value, torch.Tensor) else set())
        calls = [lambda value=value: build(name, **{option: value})] if (name, option) in OF_MODULES else []
        if (name, option) in OPTIONS:
            calls.append(lambda value=value: FAST[name](*INPUTS[name], **{**LOSSES[name].required, option: value}))
        for call in calls:
            with pytest.raises((TypeError, ValueError), match=rf"^{option} must ") as caught:
                call()
            assert any(text in str(caught.value) for text in shown), (value, str(caught.value))


@pytest.mark.parametrize("name", MODULES)
def test_every_option_has_a_rule(name):
    function = FAST[name]
    options = {*options_of(function), *options_of(MODULES[name].__init__)}
    assert {"temperature", "gather", "check_finite", "backend"} <= options <= set(RULES)
    assert set(OF_ONE_LOSS.get(function.__name__, {})) <= options
    inputs = set(inspect.signature(function).parameters) - options
    assert not inputs & set(RULES)


def test_every_rule_is_that_of_an_option():
    options = {option for _, option in [*OPTIONS, *OF_MODULES]}
    assert set(RULES) == options
    assert set(OF_ONE_LOSS) | set(TOGETHER) <= {function.__name__ for function in FAST.values()}


@pytest.mark.parametrize("name", MODULES)
def test_an_option_is_checked_wherever_it_stands(name):
    """By position and by name; and an attribute of the module, when it is set."""
    parameters = list(inspect.signature(FAST[name]).parameters.values())
    place = [one.name for one in parameters].index("temperature")
    if parameters[place].kind is not parameters[place].KEYWORD_ONLY:
        given = {one.name: value for one, value in zip(parameters, INPUTS[name], strict=False)}
        before = [given.get(one.name, LOSSES[name].required.get(one.name, one.default)) for one in parameters[:place]]
        rest = {
            key: value
            for key, value in LOSSES[name].required.items()
            if key not in [p.name for p in parameters[:place]]
        }
        with pytest.raises(ValueError, match="temperature must be positive, got -1"):
            FAST[name](*before, -1, **rest)
    module = build(name)
    with pytest.raises(TypeError, match="gather must be True or False, got 'nonsense'"):
        module.gather = "nonsense"
    module(*INPUTS[name])  # with the value it had


def test_options_that_depend_on_each_other_are_set_one_after_the_other():
    """In between they exclude each other: the module can be printed, and a call raises."""
    module = build("region_phpc", region_size=16, local_size=8)
    module.region_size = 12
    assert "region_size=12, " in repr(module)
    with pytest.raises(ValueError, match="local_size must divide region_size 12 on every axis, got 8"):
        module(*INPUTS["region_phpc"])
    module.local_size = 4
    module(*INPUTS["region_phpc"])


class Integer:
    """As configuration libraries wrap one."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def test_numbers_of_other_libraries():
    def equal(name, plain, *others):
        expected = FAST[name](*INPUTS[name], **{**LOSSES[name].required, **plain})
        for options in others:
            assert torch.equal(build(name, **options)(*INPUTS[name]), expected)

    for number in (np.int64, np.uint8, Integer, lambda value: torch.tensor(value)):
        plain = {"region_size": 4, "num_classes": 4, "background": 1, "ignore_index": 2}
        equal("region_phpc", plain, {option: number(value) for option, value in plain.items()})
        equal("multiscale_contrast", {"patch_size": (2, 3)}, {"patch_size": [number(2), number(3)]})
    for number in (np.float32, np.float64, np.array, torch.tensor):
        plain = {"temperature": 0.25, "hardness": 2.0}
        equal("region_phpc", plain, {option: number(value) for option, value in plain.items()})
    equal("region_phpc", {"temperature": 1, "hardness": 2}, {"temperature": np.int64(1), "hardness": np.int64(2)})
    equal("region_phpc", {"normalize": False}, {"normalize": np.bool_(False)})
    equal("region_phpc", {"ignore_index": (1, 2)}, {"ignore_index": torch.tensor([1, 2])}, {"ignore_index": {1, 2}})


def test_missing_and_unknown_arguments_are_those_of_the_function():
    x, labels = INPUTS["pixel_contrast"]
    with pytest.raises(
        TypeError, match=re.escape("pixel_contrast_loss() missing 1 required keyword-only argument: 'num")
    ):
        hpcloss.pixel_contrast_loss(x, labels)
    with pytest.raises(TypeError, match=re.escape("region_phpc_loss() got an unexpected keyword argument 'size'")):
        hpcloss.region_phpc_loss(x, labels, size=3)
    with pytest.raises(TypeError, match=r"supcon_loss\(\) takes from 2 to 5 positional arguments but 6 were given"):
        hpcloss.supcon_loss(x, labels, None, None, 0.1, "out")


def test_options_of_a_published_form():
    for beta in ("0.1", None, True, [0.1]):
        for module in (hpcloss.RegionPHPCLoss, hpcloss.IHPCLoss):
            with pytest.raises(TypeError, match="beta must be a number, got"):
                module.published(beta)


def test_an_input_has_no_rule():
    check_each("supcon_loss", {"embeddings": "anything"})
