"""Labels of vectors and of label maps: dtypes, shapes, ignored labels, the range of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcloss.checks import check_tensor
from hpcloss.operators import plain

IGNORED = (-100, -1, 255)  # label maps: values for "no label" in data sets and trainers
VECTORS_IGNORED = (-100, -1)  # labels of vectors: 255 may be a class or an instance id


def is_ignored(labels: Tensor, ignore_index: tuple[int, ...], num_classes: int | None = None) -> Tensor:
    """Whether each label removes its pixel: it is in `ignore_index`, or outside [0, num_classes) if that is given."""
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    for value in ignore_index:
        ignored = ignored | (labels == value)
    if num_classes is not None:
        ignored = ignored | (labels < 0) | (labels >= num_classes)
    return ignored


def is_class(label: int | None, num_classes: int) -> bool:
    """Whether the label is given and is one of the classes."""
    return label is not None and 0 <= label < num_classes


def check_classes_and_ignored(num_classes: int, ignored: tuple[int, ...]) -> None:
    """Raise ValueError if the default `ignore_index` contains one of the classes."""
    if ignored == IGNORED and num_classes > max(IGNORED):
        raise ValueError(
            f"num_classes must be at most {max(IGNORED)} with the default ignore_index, which removes label"
            f" {max(IGNORED)}, got {num_classes}; pass the labels to ignore, for example ignore_index=(-100, -1)"
        )


def _integers(name: str, labels: Tensor, device: torch.device) -> Tensor:
    """Labels of any integer dtype, or whole-number floats, as int64 on the device."""
    labels = plain(labels)
    if labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    # Values are read on the CPU only. Elsewhere the host would wait for the device.
    if labels.is_floating_point() and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        broken = ~((labels == labels.round()) & (labels.abs() < 2**53))
        if bool(broken.any()):
            raise ValueError(f"{name} must be whole numbers, got {labels[broken][0].item()}")
    return labels if labels.dtype == torch.int64 and labels.device == device else labels.to(device).long()


def labels_of_vectors(name: str, vectors: Tensor, labels: Tensor) -> Tensor:
    """Labels of vectors as int64 `[N]`.

    Args:
        name: Name of the argument for errors.
        vectors: `[N, D]`.
        labels: `[N]` or `[N, 1]`, integers or whole-number floats.

    Raises:
        ValueError: The shape does not fit, or labels on the CPU are not whole numbers.
        TypeError: The labels are no tensor or complex.
    """
    check_tensor(name, labels)
    if labels.shape not in ((vectors.shape[0],), (vectors.shape[0], 1)):
        square = labels.shape == (vectors.shape[0], vectors.shape[0])
        other = "; for a mask of pairs use hpcloss.compat.supcontrast.SupConLoss" if square else ""
        raise ValueError(f"{name} must have shape [{vectors.shape[0]}], got {tuple(labels.shape)}{other}")
    return _integers(name, labels.reshape(-1), vectors.device)


def _check_resolution(name: str, labels: Tensor, features: Tensor) -> None:
    """Raise ValueError unless labels [B, *S'] can be resized to features [B, D, *S]."""
    for extent, wanted in zip(labels.shape[1:], features.shape[2:]):
        if (extent == 0) != (wanted == 0):
            raise ValueError(
                f"{name} must be empty where features are and only there, got {tuple(labels.shape)} for"
                f" {tuple(features.shape)}"
            )
    finer = [extent > wanted for extent, wanted in zip(labels.shape[1:], features.shape[2:])]
    coarser = [extent < wanted for extent, wanted in zip(labels.shape[1:], features.shape[2:])]
    if any(finer) and any(coarser):
        raise ValueError(
            f"{name} must not be finer than features on one axis and coarser on another, got {tuple(labels.shape)} for"
            f" {tuple(features.shape)}; check the order of the axes"
        )


def labels_of_map(features: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Labels of a feature map as int64 `[B, *S]`, resized by nearest neighbour.

    Args:
        features: `[B, D, *S]`.
        labels: `[B, *S']` or `[B, 1, *S']` of any resolution, integers or whole-number floats.
        name: Name of the argument for errors.

    Raises:
        ValueError: A shape does not fit, or labels on the CPU are not whole numbers.
        TypeError: The features are not floating point, or the labels are no tensor or complex.
    """
    check_tensor(name, labels)
    if isinstance(features, (tuple, list)):
        raise TypeError(
            f"features must be a tensor, got a {type(features).__name__}; FeatureTap returns (output, features)"
        )
    check_tensor("features", features)
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
            f"{name} must be class indices [B, *S] or [B, 1, *S], got shape {tuple(labels.shape)}, which looks one-hot;"
            f" pass {name}.argmax(1)"
        )
    if labels.dim() != dims - 1 or labels.shape[0] != features.shape[0]:
        if labels.shape == features.shape[1:]:
            raise ValueError(
                f"features must have shape [B, D, *S], got {tuple(features.shape)} with {name} {tuple(labels.shape)},"
                f" which have no batch axis; pass features[None] and {name}[None]"
            )
        raise ValueError(
            f"{name} must have shape [B, *S] or [B, 1, *S] for features {tuple(features.shape)},"
            f" got {tuple(labels.shape)}"
        )
    # Labels of a volume that are coarser along its first axis alone, with as many planes as channels, are views.
    views = dims == 5 and not channel and labels.shape[1:] == (features.shape[1], *features.shape[3:])
    if views and labels.shape[1] < features.shape[2]:
        raise ValueError(
            f"features must have shape [B, D, *S], got {tuple(features.shape)} with {name} {tuple(labels.shape)}, which"
            f" look like views [B, V, D, H, W]; pass features.flatten(0, 1) and {name}.flatten(0, 1) for views,"
            f" {name}[:, None] for a volume"
        )
    _check_resolution(name, labels, features)
    labels = _integers(name, labels, features.device)
    for axis in range(1, labels.dim()):
        extent, wanted = labels.shape[axis], features.shape[axis + 1]
        if extent != wanted:
            nearest = torch.arange(wanted, device=labels.device) * extent // max(wanted, 1)
            labels = labels.index_select(axis, nearest)
    return labels


def check_label_values(labels: Tensor, ignored: tuple[int, ...], num_classes: int | None) -> None:
    """Raise ValueError for a label outside [0, num_classes) that is not ignored. Synchronises with the device."""
    if num_classes is None:
        raise ValueError("num_classes must be given with check_labels=True, got None")
    outside = is_ignored(labels, (), num_classes) & ~is_ignored(labels, ignored)
    if bool(outside.any()):
        value = labels[outside][0].item()
        raise ValueError(f"labels must be in [0, {num_classes}) or one of ignore_index {ignored}, got {value}")
