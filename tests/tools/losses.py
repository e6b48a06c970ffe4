"""Every public loss, once: tests and benchmarks make their lists from this one.

A new loss is one more entry. It is then tested as a module, inside trainers, under torch.compile, across processes, in
random configurations, on the kernels and through the launch path, and it is measured. Tests of one loss alone are in
tests/losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpcloss
from hpcloss import functional, reference
from tests.tools.cases import choice, rows


class Sizes(NamedTuple):
    """How large the inputs of a call are, and pieces of them. `number` tells pieces of one call apart."""

    images: int = 3
    spatial: tuple[int, ...] = (8, 6)
    rows: int = 24
    channels: int = 4
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def features(self, number: int = 0) -> Tensor:
        return (1.5 * rows(self.images, self.channels, *self.spatial, seed=self.seed + number)).to(self.dtype)

    def labels(self) -> Tensor:
        """Background, three classes, and ignored pixels."""
        return choice([0, 1, 2, 3, 255], self.images, *self.spatial, seed=self.seed)

    def embeddings(self, number: int = 0) -> Tensor:
        return (1.5 * rows(self.rows, self.channels, seed=self.seed + number)).to(self.dtype)

    def row_labels(self) -> Tensor:
        return choice([0, 1, 2, 255], self.rows, seed=self.seed)

    def probabilities(self, *shape: int) -> Tensor:
        return torch.softmax(rows(*shape, seed=self.seed + 2), 1).to(self.dtype)


class Loss(NamedTuple):
    """A loss as its tests need it.

    inputs: the arguments of a call by name, in their order; the first one gets a gradient. kind: what the first inputs
    are: "map" (features [B, D, *S], labels), "rows" (embeddings [N, D], labels) or "views" (two times [N, D]).
    changed: for each option that changes the value, one that does. sampled: options that draw, or that keep something
    between calls. constants: inputs that get no gradient. required: options that these inputs need. oracle: the dense
    form, where `hpcloss.reference` does not name it.
    """

    module: type[torch.nn.Module]
    kind: str
    inputs: Callable[[Sizes], dict[str, Any]]
    changed: dict[str, Any]
    constants: tuple[str, ...] = ()
    required: dict[str, Any] = {}
    sampled: dict[str, Any] = {}
    oracle: Callable[..., Tensor] | None = None

    def build(self, **options: Any) -> torch.nn.Module:
        return self.module(**{**self.required, **options})


def of_map(at: Sizes) -> dict[str, Any]:
    return {"features": at.features(), "labels": at.labels()}


def of_rows(at: Sizes) -> dict[str, Any]:
    return {"embeddings": at.embeddings(), "labels": at.row_labels()}


def of_views(at: Sizes) -> dict[str, Any]:
    return {"view1": at.embeddings(), "view2": at.embeddings(1)}


def in_regions(**options: Any) -> dict[str, Any]:
    return {
        "region_size": 4, "temperature": 0.3, "num_classes": 2, "max_regions": 1, "background": None,
        "ignore_index": (2, 255), "per_image": True, "normalize": False, "reduction": "sum", **options,
    }  # fmt: skip


LOSSES = {
    "region_phpc": Loss(
        hpcloss.RegionPHPCLoss, "map", of_map,
        changed=in_regions(hardness=3.0, local_size=8, denominator="all"),
        sampled={"region_size": 2, "max_regions": 3, "num_classes": 4, "samples_per_class": 2},
    ),
    "region_supcon": Loss(
        hpcloss.RegionSupConLoss, "map", of_map,
        changed=in_regions(),
        sampled={"region_size": 2, "max_regions": 3},
    ),
    "supcon": Loss(
        hpcloss.SupConLoss, "rows", of_rows,
        changed={"temperature": 0.3, "form": "in", "ignore_index": 1, "normalize": False, "reduction": "class"},
    ),
    "ntxent": Loss(
        hpcloss.NTXentLoss, "views", of_views,
        changed={"temperature": 0.3, "normalize": False, "reduction": "sum"},
    ),
    "infonce": Loss(
        hpcloss.InfoNCELoss, "views", lambda at: {"query": at.embeddings(), "positive": at.embeddings(1)},
        changed={"temperature": 0.3, "symmetric": True, "normalize": False, "reduction": "sum"},
        sampled={"learnable": True},
    ),
    "ihpc": Loss(
        hpcloss.IHPCLoss, "views", of_views,
        changed={"temperature": 0.3, "hardness": 3.0, "normalize": False, "reduction": "sum"},
    ),
    "hard_negative_nce": Loss(
        hpcloss.HardNegativeNCELoss, "views", of_views,
        changed={"temperature": 0.3, "beta": 0.5, "tau_plus": 0.2, "normalize": False, "reduction": "sum"},
    ),
    "entropy_guided_contrast": Loss(
        hpcloss.EntropyGuidedContrastLoss, "map",
        lambda at: {
            "features": at.features(), "probs": at.probabilities(at.images, 4, *at.spatial), "labels": at.labels()
        },
        constants=("probs",),
        changed={
            "temperature": 0.3, "threshold": 0.9, "entropy_classes": True, "denominator": "all", "symmetric": True,
            "ignore_index": 1, "normalize": False, "reduction": "sum",
        },
        sampled={"samples_per_class": 3},
    ),
    "multiscale_contrast": Loss(
        hpcloss.MultiscaleContrastLoss, "map",
        lambda at: {"features1": at.features(), "features2": at.features(1), "labels": at.labels()},
        required={"patch_size": 3, "num_classes": 4, "samples_per_class": None},
        changed={
            "patch_size": (2, 4), "temperature": 0.3, "patch_positives": "majority", "patch_weight": 0.5,
            "pixel_weight": 0.5, "num_classes": 2, "ignore_index": (1, 255), "normalize": False,
        },
        sampled={"num_classes": 4, "samples_per_class": 3},
    ),
    "pixel_contrast": Loss(
        hpcloss.PixelContrastLoss, "map", of_map,
        required={"num_classes": 4},
        changed={
            "temperature": 0.3, "num_classes": 2, "background": 0, "ignore_index": 1, "normalize": False,
            "reduction": "sum",
        },
        sampled={"num_classes": 4, "samples_per_class": 3},
    ),
    "local_contrast": Loss(
        hpcloss.LocalContrastLoss, "map", lambda at: of_map(at) | {"partner": torch.arange(at.images).roll(-1)},
        required={"num_classes": 4, "samples_per_class": None},
        changed={
            "temperature": 0.3, "num_classes": 2, "background": 1, "ignore_index": (1, 255), "normalize": False,
            "reduction": "sum",
        },
        sampled={"num_classes": 4, "samples_per_class": 2},
    ),
    "prototype_contrast": Loss(
        hpcloss.PrototypeContrastLoss, "rows",
        lambda at: {
            "prototypes": at.embeddings(), "labels": at.row_labels(), "probs": at.probabilities(at.rows, 3)
        },
        required={"hardness": -4.0},  # a learnt temperature has no hardness of its own
        changed={"temperature": 0.3, "hardness": 3.0, "ignore_index": 1, "normalize": False, "reduction": "sum"},
    ),
    "prototype_assignment": Loss(
        hpcloss.PrototypeAssignmentLoss, "map",
        lambda at: of_map(at) | {"prototypes": rows(4, 2, at.channels, seed=at.seed + 3).to(at.dtype)},
        constants=("prototypes",),
        changed={"temperature": 0.3, "iterations": 1, "epsilon": 0.5, "ignore_index": (1, 255), "reduction": "sum"},
    ),
}  # fmt: skip
NAMES = tuple(LOSSES)
FAST = {name: getattr(functional, f"{name}_loss") for name in NAMES}
ORACLE = {name: loss.oracle or getattr(reference, f"{name}_loss") for name, loss in LOSSES.items()}


def both(name, *args, **options):
    """The fast loss and the oracle with everything but the features bound."""
    return (lambda *x: FAST[name](*x, *args, **options)), (lambda *x: ORACLE[name](*x, *args, **options))
