"""What callers may get wrong: hyper-parameters, shapes and dtypes. Errors name the argument and its value.

Values of tensors are looked at only where that does not wait for a device, or where a caller asks for it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.ops import plain
from hpcloss.sorting import is_ignored

IGNORED = (-100, -1, 255)  # label maps: what data sets and trainers use for "no label"
VECTORS_IGNORED = (-100, -1)  # labels of vectors: with many classes or instance ids 255 is a class
BACKEND_NAMES = ("auto", "blockwise", "triton")
DENOMINATORS = ("own", "all", "negatives")


def check_region_options(
    region_size: int | Sequence[int] | None,
    temperature: float | Tensor,
    hardness: float,
    *,
    num_classes: int | None,
    samples_per_class: int | None,
    max_regions: int | None,
    local_size: int | Sequence[int] | None,
    denominator: str,
    discount: float,
    background: int | None,
    ignore_index: int | Sequence[int],
    reduction: str,
) -> None:
    """Raise ValueError for hyper-parameters of the pixel losses that cannot be meant."""
    _check_temperature(temperature)
    _check_number("hardness", hardness)
    if not -math.inf < hardness < math.inf:
        raise ValueError(f"hardness must be a finite number, got {hardness}")
    _check_choice("denominator", denominator, DENOMINATORS)
    _check_choice("reduction", reduction, ("mean", "class", "region", "sum", "none"))
    for name, number in (("samples_per_class", samples_per_class), ("max_regions", max_regions)):
        if number is not None:
            count(name, number)
    if num_classes is not None:
        check_classes_and_ignored(count("num_classes", num_classes), integers("ignore_index", ignore_index))
    if samples_per_class is not None and num_classes is None:
        raise ValueError(f"samples_per_class={samples_per_class} needs num_classes, got None")
    if discount and denominator != "own":
        raise ValueError(f"discount={discount} needs denominator 'own', got {denominator!r}")
    if background is not None and (
        isinstance(background, (tuple, list)) or len(integers("background", background)) != 1
    ):
        raise TypeError(f"background must be one label or None, got {background!r}")
    if background is not None and background in integers("ignore_index", ignore_index):
        raise ValueError(f"background {background} is also in ignore_index {ignore_index}; use background=None")
    if not 0 <= discount < math.inf:
        raise ValueError(f"the discount beta must be a finite number of at least 0, got {discount}")
    large, small = check_sizes("region_size", region_size), check_sizes("local_size", local_size)
    if local_size is not None:
        if region_size is None:
            raise ValueError(f"local_size={local_size!r} needs a region_size, got None")
        if len(large) != len(small):
            large, small = large * len(small), small * len(large)
        if any(whole % part for whole, part in zip(large, small)):
            raise ValueError(f"local_size must divide region_size {region_size!r} on every axis, got {local_size!r}")


def check_vector_options(
    temperature: float | Tensor,
    reduction: str,
    reductions: Sequence[str] = ("mean", "sum", "none"),
    *,
    form: str = "out",
    hardness: float = 0.0,
    beta: float | None = None,
) -> None:
    """Raise ValueError for hyper-parameters of the vector losses that cannot be meant."""
    _check_temperature(temperature)
    _check_choice("reduction", reduction, reductions)
    _check_choice("form", form, ("out", "in"))
    _check_number("hardness", hardness)
    if not -math.inf < hardness < math.inf:
        raise ValueError(f"hardness must be a finite number, got {hardness}")
    if beta is not None and not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")


def check_hard_negatives(beta: float, tau_plus: float) -> None:
    """Raise ValueError for weights of negatives that cannot be meant."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}")
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}")


def check_entropy_options(
    temperature: float | Tensor,
    *,
    threshold: float | str,
    entropy_classes: bool,
    denominator: str,
    symmetric: bool,
    samples_per_class: int | None,
    ignore_index: int | Sequence[int],
    reduction: str,
) -> None:
    """Raise ValueError for hyper-parameters of the entropy-guided loss that cannot be meant."""
    _check_temperature(temperature)
    _check_choice("denominator", denominator, ("own", "all"))
    _check_choice("reduction", reduction, ("mean", "class", "sum", "none"))
    integers("ignore_index", ignore_index)
    if isinstance(threshold, str):
        _check_choice("threshold", threshold, ("mean",))
    elif not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be 'mean' or a share of the largest entropy in [0, 1], got {threshold}")
    if samples_per_class is not None:
        count("samples_per_class", samples_per_class)
    if symmetric and entropy_classes:
        raise ValueError("symmetric=True has no meaning with entropy_classes=True, where every pixel is an anchor")


def check_multiscale_options(
    patch_size: int | Sequence[int],
    temperature: float | Tensor,
    *,
    patch_positives: str,
    patch_weight: float,
    pixel_weight: float,
    num_classes: int | None,
    samples_per_class: int | None,
    ignore_index: int | Sequence[int],
) -> None:
    """Raise ValueError for hyper-parameters of the multiscale loss that cannot be meant."""
    _check_temperature(temperature)
    _check_choice("patch_positives", patch_positives, ("instance", "majority"))
    if not check_sizes("patch_size", patch_size):
        raise ValueError(f"patch_size must be a size or several, got {patch_size!r}")
    for name, weight in (("patch_weight", patch_weight), ("pixel_weight", pixel_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {weight}")
    ignored = integers("ignore_index", ignore_index)
    if num_classes is not None:
        check_classes_and_ignored(count("num_classes", num_classes), ignored)
    if samples_per_class is not None:
        count("samples_per_class", samples_per_class)


def check_pixel_options(
    temperature: float | Tensor,
    *,
    num_classes: int,
    samples_per_class: int | None,
    background: int | None,
    ignore_index: int | Sequence[int],
    reduction: str,
) -> None:
    """Raise ValueError for hyper-parameters of the sampled pixel loss that cannot be meant."""
    count("num_classes", num_classes)
    _check_choice("reduction", reduction, ("mean", "class", "sum", "none"))
    check_region_options(
        None, temperature, 0.0, num_classes=num_classes, samples_per_class=samples_per_class, max_regions=None,
        local_size=None, denominator="own", discount=0.0, background=background, ignore_index=ignore_index,
        reduction=reduction,
    )  # fmt: skip


def check_local_options(
    temperature: float | Tensor,
    *,
    num_classes: int,
    samples_per_class: int | None,
    background: int | None,
    ignore_index: int | Sequence[int],
    reduction: str,
) -> None:
    """Raise ValueError for hyper-parameters of the local contrastive loss that cannot be meant."""
    check_region_options(
        None, temperature, 0.0, num_classes=count("num_classes", num_classes), samples_per_class=samples_per_class,
        max_regions=None, local_size=None, denominator="all", discount=0.0, background=background,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    _check_choice("reduction", reduction, ("mean", "class", "sum", "none"))


def check_prototype_options(temperature: float | Tensor, hardness: float | None, reduction: str) -> None:
    """Raise ValueError for hyper-parameters of the contrast of prototypes that cannot be meant."""
    check_vector_options(temperature, reduction, hardness=0.0 if hardness is None else hardness)
    if hardness is None and isinstance(temperature, Tensor):
        raise ValueError("hardness=None stands for -1 / temperature, which must be a number then, got a tensor")


def check_assignment_options(temperature: float | Tensor, iterations: int, epsilon: float, reduction: str) -> None:
    """Raise ValueError for hyper-parameters of the assignment loss that cannot be meant."""
    check_vector_options(temperature, reduction, ("mean", "class", "sum", "none"))
    check_sinkhorn(iterations, epsilon)


def check_sinkhorn(iterations: int, epsilon: float) -> None:
    """Raise ValueError for settings of a balanced assignment that cannot be meant."""
    count("iterations", iterations)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive, got {epsilon}")


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor):
        _check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature}")
    elif temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")


def _check_number(name: str, value: Any) -> None:
    if value is None or isinstance(value, str):  # what configuration files bring
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def integers(name: str, value: Any) -> tuple[int, ...]:
    """One integer, or several, as a tuple; of 64 bits."""
    found = _integers_of(name, value)
    if not all([-(2**63) <= one < 2**63 for one in found]):
        raise ValueError(f"{name} must fit in int64, got {value!r}")
    return found


def _integers_of(name: str, value: Any) -> tuple[int, ...]:
    # Plain integers first: older torch cannot trace the rest.
    if isinstance(value, int):
        return (value,)
    if isinstance(value, (tuple, list)) and all([isinstance(one, int) for one in value]):
        return tuple(value)
    try:
        return (operator.index(value),)
    except TypeError:
        pass
    try:
        return tuple([operator.index(one) for one in value])
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}") from None


def count(name: str, value: Any) -> int:
    """A number of things: an integer of at least 1, below 2^31."""
    if not isinstance(value, int):
        try:
            value = operator.index(value)
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


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that no backend has."""
    _check_choice("backend", backend, BACKEND_NAMES)


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
