"""What callers may get wrong: hyper-parameters, shapes and dtypes. Errors name the argument and its value.

Values of tensors are looked at only where that does not wait for a device, or where a caller asks for it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hpcloss.ops import plain
from hpcloss.sorting import is_ignored

IGNORED = (-100, -1, 255)  # label maps: what data sets and trainers use for "no label"
VECTORS_IGNORED = (-100, -1)  # labels of vectors: with many classes or instance ids 255 is a class
BACKEND_NAMES = ("auto", "blockwise", "triton")

Rule = Callable[[str, Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])


# ---- rules of one option: they take its name and its value, and raise TypeError or ValueError with both


def number(name: str, value: Any) -> float:
    """A real number. Not a bool, and not a string as configuration files bring them."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        if not isinstance(value, (str, bytes)) and not _is_bool(value):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def boolean(name: str, value: Any) -> None:
    """True or False, Python's or NumPy's."""
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or (str(getattr(value, "dtype", "")) == "bool" and value.shape == ())


def _number_that(holds: Callable[[float], bool], words: str) -> Rule:
    def rule(name: str, value: Any) -> None:
        """A number of the range that its message names."""
        if not holds(number(name, value)):
            raise ValueError(f"{name} must be {words}, got {value}")

    return rule


positive = _number_that(lambda x: 0 < x < math.inf, "positive")
finite = _number_that(lambda x: -math.inf < x < math.inf, "a finite number")
at_least_zero = _number_that(lambda x: 0 <= x < math.inf, "a finite number of at least 0")
below_one = _number_that(lambda x: 0 <= x < 1, "in [0, 1)")


def _one_of(*choices: str) -> Rule:
    def rule(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return rule


def _or_none(other: Rule) -> Rule:
    def rule(name: str, value: Any) -> None:
        if value is not None:
            other(name, value)

    return rule


def _temperature(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        positive(name, value)
    elif value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")


_share = _number_that(lambda x: 0 <= x <= 1, "'mean' or a share of the largest entropy in [0, 1]")


def _threshold(name: str, value: Any) -> None:
    if isinstance(value, str):
        _one_of("mean")(name, value)
    else:
        _share(name, value)


def _one_label(name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)) or len(integers(name, value)) != 1:
        raise TypeError(f"{name} must be one label or None, got {value!r}")


def _some_sizes(name: str, value: Any) -> None:
    if not check_sizes(name, value):
        raise ValueError(f"{name} must be a size or several, got {value!r}")


def _rows_and_dim(name: str, value: Any) -> None:
    sizes = integers(name, value)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{name} must be (rows, dim), both at least 1, got {value!r}")


def integers(name: str, value: Any) -> tuple[int, ...]:
    """One integer, or several, as a tuple; of 64 bits."""
    found = _integers_of(name, value)
    if not all([-(2**63) <= one < 2**63 for one in found]):
        raise ValueError(f"{name} must fit in int64, got {value!r}")
    return found


def _integers_of(name: str, value: Any) -> tuple[int, ...]:
    # Plain integers first: older torch cannot trace the rest.
    if _is_integer(value):
        return (value,)
    if isinstance(value, (tuple, list)) and all([_is_integer(one) for one in value]):
        return tuple(value)
    try:
        return (_index(value),)
    except TypeError:
        pass
    try:
        if not isinstance(value, (str, bytes)):  # bytes are integers, one by one
            return tuple([_index(one) for one in value])
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _index(value: Any) -> int:
    """`operator.index`, for which a bool is an integer; TypeError here."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def count(name: str, value: Any) -> int:
    """A number of things: an integer of at least 1, below 2^31."""
    if not _is_integer(value):
        try:
            value = _index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be at least 1{'' if value < 1 else ' and below 2^31'}, got {value}")
    return value


def check_classes_and_ignored(num_classes: int, ignored: tuple[int, ...]) -> None:
    """Raise ValueError where the default `ignore_index` would swallow a class."""
    if ignored == IGNORED and num_classes > max(IGNORED):
        raise ValueError(
            f"num_classes={num_classes} has a class {max(IGNORED)}, which ignore_index removes by default; say which"
            " labels to ignore, for example ignore_index=(-100, -1)"
        )


def check_sizes(name: str, size: int | Sequence[int] | None) -> tuple[int, ...]:
    """Cell sizes as a tuple, empty for None. Raises for what is no size."""
    sizes = () if size is None else integers(name, size)
    if any([value < 1 for value in sizes]):
        raise ValueError(f"{name} must be at least 1 on every axis, got {size!r}")
    return sizes


# ---- the options of the losses

# By name. `OF_ONE_LOSS` says where a loss differs.
RULES: dict[str, Rule] = {
    "background": _or_none(_one_label),
    "backend": _one_of(*BACKEND_NAMES),
    "beta": at_least_zero,
    "check_finite": boolean,
    "check_labels": boolean,
    "denominator": _one_of("own", "all", "negatives"),
    "detach_keys": boolean,
    "detach_weights": boolean,
    "discount": at_least_zero,
    "entropy_classes": boolean,
    "epsilon": positive,
    "form": _one_of("out", "in"),
    "gather": boolean,
    "hardness": finite,
    "ignore_index": integers,
    "iterations": count,
    "learnable": boolean,
    "local_size": check_sizes,
    "max_regions": _or_none(count),
    "memory_bank": _or_none(_rows_and_dim),
    "normalize": boolean,
    "num_classes": _or_none(count),
    "patch_positives": _one_of("instance", "majority"),
    "patch_size": _some_sizes,
    "patch_weight": at_least_zero,
    "per_image": boolean,
    "pixel_weight": at_least_zero,
    "reduction": _one_of("mean", "class", "sum", "none"),
    "region_size": check_sizes,
    "return_stats": boolean,
    "samples_per_class": _or_none(count),
    "symmetric": boolean,
    "tau_plus": below_one,
    "temperature": _temperature,
    "threshold": _threshold,
}
_OF_PAIRS = {"reduction": _one_of("mean", "sum", "none")}
_OF_REGIONS = {"reduction": _one_of("mean", "class", "region", "sum", "none")}
OF_ONE_LOSS: dict[str, dict[str, Rule]] = {
    "entropy_guided_contrast_loss": {"denominator": _one_of("own", "all")},
    "hard_negative_nce_loss": _OF_PAIRS,
    "ihpc_loss": {**_OF_PAIRS, "beta": _or_none(below_one)},
    "infonce_loss": _OF_PAIRS,
    "local_contrast_loss": {"num_classes": count},
    "ntxent_loss": _OF_PAIRS,
    "pixel_contrast_loss": {"num_classes": count},
    "prototype_contrast_loss": {**_OF_PAIRS, "hardness": _or_none(finite)},
    "region_phpc_loss": _OF_REGIONS,
    "region_supcon_loss": _OF_REGIONS,
}


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for invalid options of the function of a loss, each by itself and all together.

    What has no rule is an input, and is checked where it is used.
    """
    own = OF_ONE_LOSS.get(function.__name__, {})
    for name, value in options.items():
        rule = own.get(name, RULES.get(name))
        if rule is not None:
            rule(name, value)
    for together in TOGETHER.get(function.__name__, ()):
        together(**options)


def checked(function: Function) -> Function:
    """Decorate the function of a loss: a call begins with `check_options`."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}

    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        check_options(function, {**defaults, **dict(zip(names, inputs)), **options})
        return function(*inputs, **options)

    return cast(Function, call)


def _labels(*, ignore_index: Any, background: int | None = None, num_classes: int | None = None, **others: Any) -> None:
    ignored = integers("ignore_index", ignore_index)
    if num_classes is not None:
        check_classes_and_ignored(num_classes, ignored)
    if background is not None and background in ignored:
        raise ValueError(f"background {background} is also in ignore_index {ignore_index}; use background=None")


def _samples(*, samples_per_class: int | None, num_classes: int | None, **others: Any) -> None:
    if samples_per_class is not None and num_classes is None:
        raise ValueError(f"samples_per_class={samples_per_class} needs num_classes, got None")


def _discount(*, discount: float, denominator: str, **others: Any) -> None:
    if discount and denominator != "own":
        raise ValueError(f"discount={discount} needs denominator 'own', got {denominator!r}")


def _cells(*, region_size: Any, local_size: Any, **others: Any) -> None:
    if local_size is None:
        return
    if region_size is None:
        raise ValueError(f"local_size={local_size!r} needs a region_size, got None")
    large, small = check_sizes("region_size", region_size), check_sizes("local_size", local_size)
    if len(large) != len(small):
        large, small = large * len(small), small * len(large)
    if any([whole % part for whole, part in zip(large, small)]):
        raise ValueError(f"local_size must divide region_size {region_size!r} on every axis, got {local_size!r}")


def _sides(*, symmetric: bool, entropy_classes: bool, **others: Any) -> None:
    if symmetric and entropy_classes:
        raise ValueError("symmetric=True has no meaning with entropy_classes=True, where every pixel is an anchor")


def _published_hardness(*, hardness: float | None, temperature: float | Tensor, **others: Any) -> None:
    if hardness is None and isinstance(temperature, Tensor):
        raise ValueError("hardness=None stands for -1 / temperature, which must be a number then, got a tensor")


TOGETHER: dict[str, tuple[Callable[..., None], ...]] = {
    "entropy_guided_contrast_loss": (_sides,),
    "local_contrast_loss": (_labels,),
    "multiscale_contrast_loss": (_labels,),
    "pixel_contrast_loss": (_labels,),
    "prototype_contrast_loss": (_published_hardness,),
    "region_phpc_loss": (_samples, _labels, _discount, _cells),
    "region_supcon_loss": (_samples, _labels),
}


def check_vector_options(temperature: float | Tensor, reduction: str) -> None:
    """Raise TypeError or ValueError for invalid options of `hpcloss.compat`."""
    _temperature("temperature", temperature)
    _OF_PAIRS["reduction"]("reduction", reduction)


# ---- tensors


def check_vectors(name: str, vectors: Tensor, like: Tensor | None = None, same_length: bool = False) -> None:
    """Raise TypeError or ValueError unless `vectors` are floating [N, D] and fit the argument `like`, if given."""
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vectors).__name__}{_elsewhere(name, None)}")
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {vectors.dtype}{_elsewhere(name, vectors.dim())}")
    if vectors.dim() != 2 or vectors.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D], got {tuple(vectors.shape)}{_elsewhere(name, vectors.dim())}")
    if like is None:
        return
    if vectors.shape[1] != like.shape[1] or (same_length and vectors.shape[0] != like.shape[0]):
        expected = f"[{like.shape[0] if same_length else 'M'}, {like.shape[1]}]"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(vectors.shape)}")
    if vectors.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {vectors.device}")


# The class for a call in the shape of another library: by argument and number of dimensions, None for no tensor.
_ELSEWHERE = {
    ("embeddings", 3): "views [N, views, D] are taken by hpcloss.compat.supcontrast.SupConLoss",
    ("keys", None): "the pairs of a miner are taken by hpcloss.compat.pml.SupConLoss",
    ("view2", 1): "embeddings and labels are taken by hpcloss.compat.pml.NTXentLoss",
    ("negatives", 3): "negatives of a query's own are taken by hpcloss.compat.infonce.InfoNCE(negative_mode='paired')",
    ("negatives", 0): "a logit_scale is taken by hpcloss.compat.open_clip.ClipLoss",
}


def _elsewhere(name: str, dims: int | None) -> str:
    return f"; {_ELSEWHERE[name, dims]}" if (name, dims) in _ELSEWHERE else ""


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _integers(name: str, labels: Tensor, device: torch.device) -> Tensor:
    """Labels of any integer dtype, or whole-number floats, as int64 on the device."""
    labels = plain(labels)
    if labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    # Looking at the values is free of waiting on the CPU only.
    if labels.is_floating_point() and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        broken = ~((labels == labels.round()) & (labels.abs() < 2**53))
        if bool(broken.any()):
            raise ValueError(f"{name} must be whole numbers, got {labels[broken][0].item()}")
    return labels.to(device).long()


def labels_of_vectors(name: str, vectors: Tensor, labels: Tensor) -> Tensor:
    """Labels of vectors [N, D], from [N] or [N, 1] of any integer dtype or whole-number floats, as int64."""
    _check_tensor(name, labels)
    if labels.shape not in ((vectors.shape[0],), (vectors.shape[0], 1)):
        square = labels.shape == (vectors.shape[0], vectors.shape[0])
        other = "; a mask of pairs is taken by hpcloss.compat.supcontrast.SupConLoss" if square else ""
        raise ValueError(f"{name} must have shape [{vectors.shape[0]}], got {tuple(labels.shape)}{other}")
    return _integers(name, labels.reshape(-1), vectors.device)


def labels_of_map(features: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Labels [B, *S] of a feature map [B, D, *S], from [B, *S'] or [B, 1, *S'] of any resolution."""
    _check_tensor(name, labels)
    if isinstance(features, (tuple, list)):
        raise TypeError("features must be a tensor, got several; FeatureTap and alike return (output, features)")
    _check_tensor("features", features)
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if features.dim() < 3:
        raise ValueError(
            f"features must have shape [B, D, *S], got {tuple(features.shape)}; for vectors [N, D] use SupConLoss"
        )
    if features.shape[1] == 0:
        raise ValueError(f"features must have at least one channel, got {tuple(features.shape)}")
    dims = features.dim()
    channel = labels.dim() == dims and labels.shape[1] == 1
    if channel:
        labels = labels.squeeze(1)
    elif labels.dim() == dims and labels.shape[0] == features.shape[0]:
        raise ValueError(
            f"{name} of shape {tuple(labels.shape)} look one-hot; pass class indices: {name}.argmax(1), shape [B, *S]"
        )
    if labels.dim() != dims - 1 or labels.shape[0] != features.shape[0]:
        if labels.shape == features.shape[1:]:
            raise ValueError(
                f"features {tuple(features.shape)} and {name} {tuple(labels.shape)} have no batch axis;"
                f" pass features[None] and {name}[None]"
            )
        raise ValueError(
            f"{name} must have shape [B, *S] or [B, 1, *S] for features {tuple(features.shape)},"
            f" got {tuple(labels.shape)}"
        )
    # As labels of this volume they would be coarser along its first axis alone, with as many planes as it has channels.
    views = dims == 5 and not channel and labels.shape[1:] == (features.shape[1], *features.shape[3:])
    if views and labels.shape[1] < features.shape[2]:
        raise ValueError(
            f"features {tuple(features.shape)} with {name} {tuple(labels.shape)} look like views [B, V, D, H, W];"
            f" pass features.flatten(0, 1) and {name}.flatten(0, 1), or {name}[:, None] of a volume"
        )
    for extent, wanted in zip(labels.shape[1:], features.shape[2:]):
        if (extent == 0) != (wanted == 0):
            raise ValueError(f"{name} {tuple(labels.shape)} and features {tuple(features.shape)}: one of them is empty")
    finer = [extent > wanted for extent, wanted in zip(labels.shape[1:], features.shape[2:])]
    coarser = [extent < wanted for extent, wanted in zip(labels.shape[1:], features.shape[2:])]
    if any(finer) and any(coarser):
        raise ValueError(
            f"{name} {tuple(labels.shape)} are finer than features {tuple(features.shape)} on one axis and coarser on"
            " another; are axes swapped?"
        )
    labels = _integers(name, labels, features.device)
    for axis in range(1, labels.dim()):
        extent, wanted = labels.shape[axis], features.shape[axis + 1]
        if extent != wanted:
            nearest = torch.arange(wanted, device=labels.device) * extent // max(wanted, 1)
            labels = labels.index_select(axis, nearest)
    return labels


def check_probs(features: Tensor, probs: Tensor) -> None:
    """Raise TypeError or ValueError unless `probs` are floating [B, C, *S] for features [B, D, *S]."""
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating point, got {probs.dtype}")
    fits = probs.dim() == features.dim() and probs.shape[1] > 0
    if not fits or probs.shape[:1] + probs.shape[2:] != features.shape[:1] + features.shape[2:]:
        raise ValueError(
            f"probs must have shape [B, C, *S] for features {tuple(features.shape)}, got {tuple(probs.shape)}"
        )
    if probs.device != features.device:
        raise ValueError(f"probs must be on {features.device}, got {probs.device}")


def check_same_maps(name: str, features: Tensor, like_name: str, like: Tensor) -> None:
    """Raise TypeError or ValueError unless two feature maps have one shape, dtype and device."""
    if features.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, as {like_name}, got {features.dtype}")
    if features.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, as {like_name}, got {tuple(features.shape)}")
    if features.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as {like_name}, got {features.device}")


def check_label_values(labels: Tensor, ignored: tuple[int, ...], num_classes: int | None) -> None:
    """Raise for a label outside [0, num_classes) that is not ignored. Waits for the device."""
    if num_classes is None:
        raise ValueError("check_labels=True needs num_classes, got None")
    outside = is_ignored(labels, (), num_classes) & ~is_ignored(labels, ignored)
    if bool(outside.any()):
        value = labels[outside][0].item()
        raise ValueError(f"labels must be in [0, {num_classes}) or one of ignore_index {ignored}, got {value}")


def check_used(order: Tensor | None = None, live: Tensor | None = None, **inputs: Tensor | float | None) -> None:
    """Raise ValueError for inf and NaN in what a loss reads of its inputs. Waits for the device, ends a compiled graph.

    inputs: [B, D, *S] or [N, D], of which the first `live` pixels or rows of `order` are read, by default all; without
    `order` any tensor.
    """
    for name, values in inputs.items():
        if not isinstance(values, Tensor):
            continue
        broken = ~plain(values).detach().isfinite()
        if order is not None:
            used = torch.zeros(values.shape[0], 1, *values.shape[2:], dtype=torch.bool, device=values.device)
            used.view(-1)[order[: None if live is None else int(live)].long()] = True
            broken &= used
        if bool(broken.any()):
            first = tuple(broken.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite, got {int(broken.sum())} values that take part and are not, the first of them"
                f" {plain(values)[first].item()} at {first}"
            )
