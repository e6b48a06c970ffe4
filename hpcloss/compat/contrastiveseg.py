"""ContrastiveSeg's `PixelContrastLoss`: sampled pixels of a batch, against each other or against a memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpcloss.checks import count
from hpcloss.compat.base import check_vector_options, times
from hpcloss.losses.reduction import reduce
from hpcloss.operators import statistics_dtype
from hpcloss.plan.labels import labels_of_map
from hpcloss.plan.partition import class_sort, partition, partition_against
from hpcloss.plan.regions import Grid, region_shape
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale

MOST_CLASSES = 1 << 16  # without num_classes


class PixelContrastLoss(nn.Module):
    """ContrastiveSeg's contrast of sampled pixels, with the signature of its `PixelContrastLoss`.

        L = T / T_base · mean_i 1/|P(i)| Σ_{j∈P(i)} [ log( e^{l_ij} + Σ_{n∈N(i)} e^{l_in} ) - l_ij ]

    l_ij = ⟨x_i, x_j⟩ / T is the logit of rows i and j, T the temperature and T_base the base temperature. Rows are not
    normalised. P(i) and N(i) are the other keys with the label of anchor i and with another label.

    Each class of each image gives the same number of pixels: max_samples divided by the number of these classes in the
    batch, at most max_views. Half of them are wrongly predicted, if there are enough. An anchor counts if it has a
    positive and a negative.

    Source: Wang et al., "Exploring cross-image pixel contrast for semantic segmentation" (ICCV 2021). Three defects of
    the authors' code are left out (`docs/differences.md`): it drops classes with few pixels, it mixes up the keys of a
    memory, and an anchor without a positive makes its loss NaN.

    Args:
        configer: Object with the authors' `get` and `exists`. It replaces the options below that it knows: those of
            "contrast", the ignored label and the number of classes. It is read here once.
        temperature: T. A positive number, or a tensor with one element.
        base_temperature: T_base.
        max_samples: Pixels of a batch.
        max_views: Most pixels of a class in an image.
        ignore_label: Label of pixels that take no part. Other negative labels take no part either.
        num_classes: Number of classes C; labels from C on take no part. None: the largest label plus 1, which
            synchronises with the device in each call.
        legacy_sampling: Leave out classes of at most `max_views` pixels in an image, as the authors' code does.

    Raises:
        ValueError: An option or a shape is invalid, or a label is too large to be a class.
        TypeError: The type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.contrastiveseg import PixelContrastLoss
        >>> features, labels = torch.randn(2, 16, 32, 32), torch.randint(4, (2, 32, 32))
        >>> PixelContrastLoss(num_classes=4)(features, labels).shape
        torch.Size([])
    """

    def __init__(
        self,
        configer: Any = None,
        *,
        temperature: float | Tensor = 0.07,
        base_temperature: float = 0.07,
        max_samples: int = 1024,
        max_views: int = 100,
        ignore_label: int = -1,
        num_classes: int | None = None,
        legacy_sampling: bool = False,
    ):
        super().__init__()
        if configer is not None:
            temperature, base_temperature, max_samples, max_views = [
                configer.get("contrast", name)
                for name in ("temperature", "base_temperature", "max_samples", "max_views")
            ]
            if configer.exists("loss", "params"):
                ignore_label = configer.get("loss", "params").get("ce_ignore_index", ignore_label)
            if configer.exists("data", "num_classes"):
                num_classes = configer.get("data", "num_classes")
        check_vector_options(temperature)
        self.configer = configer
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.max_samples = count("max_samples", max_samples)
        self.max_views = count("max_views", max_views)
        self.ignore_label = ignore_label
        self.num_classes = None if num_classes is None else count("num_classes", num_classes)
        self.legacy_sampling = legacy_sampling

    def forward(
        self,
        feats: Tensor,
        labels: Tensor | None = None,
        predict: Tensor | None = None,
        queue: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of a feature map.

        Args:
            feats: `[B, D, *S]`, any float dtype.
            labels: `[B, *S]` of any resolution. None: the loss is 0 with zero gradients.
            predict: Predicted classes `[B, *S]` of any resolution. Pixels with another prediction than label are hard.
            queue: Embeddings of past pixels of each class `[C, K, D]`, without gradient. They are then the only keys.

        Returns:
            The loss, 0-dim, in fp32 (float64 for float64 features).
        """
        check_vector_options(self.temperature)  # a script may have set another
        if labels is None:
            return feats.reshape(-1)[:0].sum().to(statistics_dtype(feats.dtype))
        labels = labels_of_map(feats, labels)
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        if predict is not None:
            wrong = labels_of_map(feats, predict, "predict") != labels
        num_classes = self.num_classes
        if num_classes is None:
            used = torch.where(labels == self.ignore_label, 0, labels)
            num_classes = max(int(used.max()) + 1, 1) if used.numel() else 1
            if num_classes > MOST_CLASSES:
                raise ValueError(
                    f"labels must be below {MOST_CLASSES} or ignore_label={self.ignore_label} without num_classes,"
                    f" got {num_classes - 1}; pass num_classes to ignore larger labels"
                )
        pixels, classes = self._draw(labels, wrong, count("num_classes", num_classes))
        key_order, keys = None, None
        if queue is None:
            pairs = partition(classes, ignore_index=(-1,))
        else:
            if queue.dim() != 3 or queue.shape[2] != feats.shape[1]:
                raise ValueError(f"queue must have shape [C, K, {feats.shape[1]}], got {tuple(queue.shape)}")
            key_classes = torch.arange(len(queue), device=feats.device).repeat_interleave(queue.shape[1])
            pairs, key_order = partition_against(classes, key_classes, ignore_index=(-1,))
        # The sampled pixels come first, and there are at most so many.
        pairs = pairs.head(max(self.max_samples, len(labels) * num_classes))
        rows = pack(feats, pixels[pairs.order], pairs.live(), normalize=False)
        if queue is not None and key_order is not None:
            old = queue.detach().to(rows.data).flatten(0, 1)
            keys = pack(old, key_order, normalize=False, backend=rows.backend)
        loss, counted = contrast(rows, pairs, keys=keys, scale=Scale.of(self.temperature, rows, False))
        return times(reduce(loss, counted, "mean"), self.temperature / self.base_temperature)

    def _draw(self, labels: Tensor, wrong: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Sampled pixels [K] as flat indices, and the class of each, -1 for one that was not sampled in the end."""
        max_samples, max_views = count("max_samples", self.max_samples), count("max_views", self.max_views)
        flat, spatial = labels.reshape(-1), tuple(labels.shape[1:])
        if flat.numel() == 0:
            return flat, flat
        kinds = torch.where(flat == self.ignore_label, -1, 2 * flat + ~wrong.reshape(-1))
        images = Grid(len(labels), spatial, region_shape(None, spatial), per_image=True)
        rows = class_sort(kinds, images, num_classes=2 * num_classes)
        hard, easy = rows.offsets.long().diff().view(-1, 2).unbind(1)
        present = hard + easy > (max_views if self.legacy_sampling else 0)
        each = (max_samples // present.sum().clamp(min=1)).clamp(1, max_views)
        each = torch.where(present, torch.minimum(hard + easy, each), 0)
        # Half of them are hard, or more of one kind if the other has too few.
        from_hard = torch.minimum(hard, torch.maximum(each // 2, each - easy))
        wanted = torch.stack([from_hard, each - from_hard], 1).reshape(-1)
        # The wanted number depends on the data. So the largest possible one is sampled, and a random rest left out.
        sampled = rows.sampled(max_views)
        drawn, ends = sampled.order, sampled.offsets
        place = torch.arange(drawn.numel(), device=drawn.device)
        kind = torch.searchsorted(ends[1:].contiguous(), place, right=True)
        lot = torch.sort(kind + torch.rand(kind.shape, dtype=torch.float32, device=kind.device).double()).indices
        rank = torch.empty_like(lot).scatter_(0, lot, place) - ends[kind]
        kept = rank < torch.nn.functional.pad(wanted, (0, 1))[kind]
        return drawn, torch.where(kept, flat[drawn], -1)
