"""The options of the losses: one rule for each name, and rules of several together.

Options are checked once: when a module is built or an attribute is set, or when a function is called. A rule returns
the value that the loss uses: integers as ints, one ignored label as a tuple of one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor

from hpcloss.checks import (
    Rule,
    at_least_zero,
    backend_name,
    below_one,
    boolean,
    check_sizes,
    count,
    finite,
    integers,
    number_that,
    one_of,
    or_none,
    positive,
)
from hpcloss.plan.labels import check_classes_and_ignored

Function = TypeVar("Function", bound=Callable[..., Any])


# ---- rules of one option


def temperature(name: str, value: Any) -> Any:
    """A positive number, or a tensor with one element, whose value is not checked."""
    if not isinstance(value, Tensor):
        return positive(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    return value


_mean = one_of("mean")
_share = number_that(lambda x: 0 <= x <= 1, "'mean' or a share of the largest entropy in [0, 1]")


def _threshold(name: str, value: Any) -> Any:
    return _mean(name, value) if isinstance(value, str) else _share(name, value)


def _one_label(name: str, value: Any) -> int:
    if isinstance(value, (tuple, list)) or len(integers(name, value)) != 1:
        raise TypeError(f"{name} must be one label or None, got {value!r}")
    return integers(name, value)[0]


def _sizes(name: str, value: Any) -> Any:
    check_sizes(name, value)
    return value  # one number or one per axis; the number of axes is known from the features


def _some_sizes(name: str, value: Any) -> tuple[int, ...]:
    sizes = check_sizes(name, value)
    if not sizes:
        raise ValueError(f"{name} must be an integer or a sequence of at least one, got {value!r}")
    return sizes


of_pairs = one_of("mean", "sum", "none")
# Rules by name. `OF_ONE_LOSS` has the exceptions. A parameter without a rule is an input, which its loss checks.
RULES: dict[str, Rule] = {
    "background": or_none(_one_label),
    "backend": backend_name,
    "beta": at_least_zero,
    "check_finite": boolean,
    "check_labels": boolean,
    "denominator": one_of("own", "all", "negatives"),
    "detach_keys": boolean,
    "detach_weights": boolean,
    "discount": at_least_zero,
    "entropy_classes": boolean,
    "epsilon": positive,
    "form": one_of("out", "in"),
    "gather": boolean,
    "hardness": finite,
    "ignore_index": integers,
    "iterations": count,
    "learnable": boolean,
    "local_size": _sizes,
    "max_regions": or_none(count),
    "normalize": boolean,
    "num_classes": or_none(count),
    "patch_positives": one_of("instance", "majority"),
    "patch_size": _some_sizes,
    "patch_weight": at_least_zero,
    "per_image": boolean,
    "pixel_weight": at_least_zero,
    "reduction": one_of("mean", "class", "sum", "none"),
    "region_size": _sizes,
    "return_stats": boolean,
    "samples_per_class": or_none(count),
    "symmetric": boolean,
    "tau_plus": below_one,
    "temperature": temperature,
    "threshold": _threshold,
}
_OF_PAIRS = {"reduction": of_pairs}
_OF_REGIONS = {"reduction": one_of("mean", "class", "region", "sum", "none")}
OF_ONE_LOSS: dict[str, dict[str, Rule]] = {
    "entropy_guided_contrast_loss": {"denominator": one_of("own", "all")},
    "hard_negative_nce_loss": _OF_PAIRS,
    "ihpc_loss": {**_OF_PAIRS, "beta": or_none(below_one)},
    "infonce_loss": _OF_PAIRS,
    "local_contrast_loss": {"num_classes": count},
    "ntxent_loss": _OF_PAIRS,
    "pixel_contrast_loss": {"num_classes": count},
    "prototype_contrast_loss": {**_OF_PAIRS, "hardness": or_none(finite)},
    "region_phpc_loss": _OF_REGIONS,
    "region_supcon_loss": _OF_REGIONS,
}


def check_each(loss: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check each option of a loss by its own rule.

    Args:
        loss: Name of the function of the loss.
        options: The options by name.

    Returns:
        The options as the loss uses them.

    Raises:
        TypeError: An option has an invalid type.
        ValueError: An option has an invalid value.
    """
    own = OF_ONE_LOSS.get(loss, {})
    found = {}
    for name, value in options.items():
        rule = own.get(name, RULES.get(name))
        found[name] = value if rule is None else rule(name, value)
    return found


def check_together(loss: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if options that are valid by themselves exclude each other."""
    for rule in TOGETHER.get(loss, ()):
        rule(**options)


def checked(function: Function) -> Function:
    """Decorate the function of a loss: a call first checks its options."""
    parameters = inspect.signature(function).parameters
    names = tuple(name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD)
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}

    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        given = dict(zip(names, inputs))
        if len(inputs) > len(names) or any([name in options for name in given]):
            return function(*inputs, **options)  # Python's error names the surplus argument
        found = check_each(function.__name__, {**defaults, **given, **options})
        check_together(function.__name__, found)
        return function(**found)

    return cast(Function, call)


def unchecked(function: Function) -> Function:
    """The function of a loss without the check, for options that a module has checked."""
    # From `functools.wraps`. A module cannot keep the function: its pickle would name the checked one.
    return cast(Function, function.__wrapped__)  # type: ignore[attr-defined]


# ---- rules of several options


def _labels(
    *, ignore_index: tuple[int, ...], background: int | None = None, num_classes: int | None = None, **others: Any
) -> None:
    if num_classes is not None:
        check_classes_and_ignored(num_classes, ignore_index)
    if background is not None and background in ignore_index:
        raise ValueError(
            f"background must not be in ignore_index {ignore_index}, got {background}; use background=None"
        )


def _samples(*, samples_per_class: int | None, num_classes: int | None, **others: Any) -> None:
    if samples_per_class is not None and num_classes is None:
        raise ValueError(f"num_classes must be given with samples_per_class={samples_per_class}, got None")


def _discount(*, discount: float, denominator: str, **others: Any) -> None:
    if discount and denominator != "own":
        raise ValueError(f"denominator must be 'own' with discount={discount}, got {denominator!r}")


def _cells(*, region_size: Any, local_size: Any, **others: Any) -> None:
    if local_size is None:
        return
    if region_size is None:
        raise ValueError(f"region_size must be given with local_size={local_size!r}, got None")
    large, small = check_sizes("region_size", region_size), check_sizes("local_size", local_size)
    if len(large) != len(small):
        large, small = large * len(small), small * len(large)
    if any([whole % part for whole, part in zip(large, small)]):
        raise ValueError(f"local_size must divide region_size {region_size!r} on every axis, got {local_size!r}")


def _sides(*, symmetric: bool, entropy_classes: bool, **others: Any) -> None:
    if symmetric and entropy_classes:
        raise ValueError("symmetric must be False with entropy_classes=True, where every pixel is an anchor, got True")


def _published_hardness(*, hardness: float | None, temperature: float | Tensor, **others: Any) -> None:
    if hardness is None and isinstance(temperature, Tensor):
        raise ValueError("temperature must be a number with hardness=None, which means -1 / temperature, got a tensor")


TOGETHER: dict[str, tuple[Callable[..., None], ...]] = {
    "entropy_guided_contrast_loss": (_sides,),
    "local_contrast_loss": (_labels,),
    "multiscale_contrast_loss": (_labels,),
    "pixel_contrast_loss": (_labels,),
    "prototype_contrast_loss": (_published_hardness,),
    "region_phpc_loss": (_samples, _labels, _discount, _cells),
    "region_supcon_loss": (_samples, _labels),
}
