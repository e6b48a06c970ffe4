"""A memory of past embeddings as further keys: a ring of the newest of each class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpcloss.checks import boolean, check_vectors, count
from hpcloss.plan.labels import is_ignored, labels_of_map, labels_of_vectors
from hpcloss.plan.partition import Pairs, class_sort
from hpcloss.plan.regions import Grid, region_shape
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.segment_mean import segment_mean

NO_GROUP = torch.iinfo(torch.int64).min + 2  # the group of an embedding without a group


class Bank(NamedTuple):
    """An `EmbeddingQueue` as further keys of N anchors, K slots per class.

    Attributes:
        keys: The slots `[C * K, D]`.
        log_bias: Bias of the keys in a log-sum-exp `[C * K]`: 0, or -inf for an empty slot.
        pairs: The anchors against the slots. Positives are filled slots.
        positives: Number of positives of each anchor `[N]`.
        negatives: Number of negatives of each anchor `[N]`.
    """

    keys: Rows
    log_bias: Tensor
    pairs: Pairs
    positives: Tensor
    negatives: Tensor


class EmbeddingQueue(nn.Module):
    """A memory of the newest embeddings of each class, as keys without gradient.

    `PixelContrastLoss` and `IHPCLoss` take it as their `queue`. Enqueue after backward: the loss reads the slots in
    place, and the backward pass of `PixelContrastLoss` raises RuntimeError if they have changed. Embeddings are unit
    rows. Empty slots are no keys.

    The buffers are part of `state_dict`. `queue.half()` halves the memory; half-precision features on a GPU then need
    no conversion. Each process of a distributed run keeps its own queue: do not wrap it in `DistributedDataParallel`.

    Source: Wang et al., "Exploring cross-image pixel contrast for semantic segmentation" (ICCV 2021), the memory. Three
    defects of the authors' code are left out: slots here wrap around, pixels are stored under their own class, and
    empty slots are no keys.

    Args:
        num_classes: Number of classes C.
        size: Embeddings per class K.
        dim: Channels D.
        groups: Also keep an integer group of each embedding, for `IHPCLoss`.

    Attributes:
        embeddings: The slots `[C, K, D]`, fp32. Empty slots are zero.
        filled: Number of filled slots of each class `[C]`.
        next: Slot of each class that is written next `[C]`.
        groups: Group of each slot `[C, K]`, or None.

    Raises:
        ValueError: A number is below 1, or a shape or device does not fit. Never for values of embeddings.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch, hpcloss
        >>> features, labels = torch.randn(2, 16, 32, 32), torch.randint(4, (2, 32, 32))
        >>> queue = hpcloss.EmbeddingQueue(num_classes=4, size=100, dim=16)
        >>> queue.enqueue(features, labels, samples_per_class=10)
        >>> queue.filled
        tensor([10, 10, 10, 10])
    """

    embeddings: Tensor
    filled: Tensor
    next: Tensor
    groups: Tensor | None

    def __init__(self, num_classes: int, size: int, dim: int, *, groups: bool = False):
        super().__init__()
        boolean("groups", groups)
        self.num_classes, self.size = count("num_classes", num_classes), count("size", size)
        self.dim = count("dim", dim)
        count("num_classes * size", self.num_classes * self.size)
        slots = torch.zeros(self.num_classes, self.size, self.dim, dtype=torch.float32)
        self.register_buffer("embeddings", slots)
        self.register_buffer("filled", torch.zeros(self.num_classes, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(self.num_classes, dtype=torch.int64))
        of_slots = torch.full((self.num_classes, self.size), NO_GROUP, dtype=torch.int64)
        self.register_buffer("groups", of_slots if groups else None)

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        samples_per_class: int | None = None,
        *,
        groups: Tensor | None = None,
    ) -> None:
        """Write normalised embeddings over the oldest ones of their class.

        They are written in order. If a class has more than K of them, the last K remain. Embeddings that are not finite
        or have a norm of at most 1e-12 are skipped.

        Args:
            embeddings: Vectors `[N, D]`, or a map `[B, D, *S]`.
            labels: `[N]`, or `[B, *S]` of any resolution. Labels outside [0, C) are skipped. Optional for a queue of
                one class.
            samples_per_class: Sample at most this many embeddings per class, with torch's generator. None: all.
            groups: Group of each vector `[N]`, integers, for a queue that keeps groups. None: no group.

        Raises:
            ValueError: A shape or device does not fit, labels are missing, or groups are given to a queue without them.
            TypeError: A dtype or the type of an option is invalid.
        """
        if labels is None:
            if self.num_classes > 1:
                raise ValueError(f"labels must be given to a queue of {self.num_classes} classes, got None")
            labels = embeddings.new_zeros(embeddings.shape[:1] + embeddings.shape[2:], dtype=torch.int64)
        if embeddings.dim() == 2:
            check_vectors("embeddings", embeddings)
            labels = labels_of_vectors("labels", embeddings, labels)
        else:
            labels = labels_of_map(embeddings, labels).reshape(-1)
        self._check("embeddings", embeddings)
        if groups is not None and self.groups is None:
            raise ValueError("groups must be None for a queue that keeps none: use EmbeddingQueue(..., groups=True)")
        if groups is not None and embeddings.dim() != 2:
            raise ValueError(f"groups must come with embeddings [N, D], got embeddings {tuple(embeddings.shape)}")
        if groups is not None:
            groups = labels_of_vectors("groups", embeddings, groups)
        if labels.numel() == 0:
            return
        k = None if samples_per_class is None else count("samples_per_class", samples_per_class)
        drawn = class_sort(labels, num_classes=self.num_classes).sampled(k)
        rows = pack(embeddings, drawn.order, drawn.live(), normalize=True).data
        of_rows = None if groups is None else groups[drawn.order]
        self._write(rows.to(self.embeddings.dtype), drawn.offsets.long(), of_rows)

    @torch.no_grad()
    def enqueue_means(self, features: Tensor, labels: Tensor) -> None:
        """Write one embedding per class and image: the normalised mean of its unit rows (segment memory).

        A segment with a pixel that is not finite is skipped.

        Args:
            features: `[B, D, *S]`.
            labels: `[B, *S]` of any resolution. Labels outside [0, C) are skipped.
        """
        labels = labels_of_map(features, labels)
        self._check("features", features)
        if labels.numel() == 0:
            return
        spatial = tuple(labels.shape[1:])
        images = Grid(labels.shape[0], spatial, region_shape(None, spatial), per_image=True)
        plan = class_sort(labels, images, num_classes=self.num_classes)
        rows = pack(features, plan.order, plan.live(), normalize=True)
        # A class that is not in an image has a zero mean, which is skipped.
        means = segment_mean(rows, plan.offsets)
        self.enqueue(means, torch.arange(self.num_classes, device=means.device).repeat(labels.shape[0]))

    def keys(self, anchors: Rows) -> Rows:
        """The slots as keys `[C * K, D]` of these anchors, without gradient. With the queue's own dtype it is a view.

        Args:
            anchors: Packed anchors, which give the dtype and the backend.
        """
        data = self.embeddings.view(-1, self.dim).to(anchors.data.dtype)
        companion = torch.zeros((), dtype=anchors.companion.dtype, device=data.device).expand(data.shape)
        return Rows(data, companion, anchors.backend)

    def bank(self, anchors: Rows, pairs: Pairs, classes: Tensor, ignore_index: tuple[int, ...] = ()) -> Bank:
        """The slots as keys of given anchors.

        Args:
            anchors: Packed anchors `[N, D]`.
            pairs: Pairs whose anchors are taken. Their regions all meet all slots.
            classes: Class of each row `[N]`.
            ignore_index: Classes whose slots are no keys.
        """
        number = torch.arange(self.num_classes, device=self.filled.device)
        held = torch.where(is_ignored(number, ignore_index), 0, self.filled)
        slot = torch.arange(self.size, device=held.device)
        log_bias = torch.where(slot < held[:, None], 0.0, -torch.inf).reshape(-1).to(anchors.companion.dtype)
        classes = classes.clamp(0, self.num_classes - 1)  # dead rows may have any label
        first = classes * self.size
        against = pairs.replace(
            pos_start=first.to(pairs.order.dtype),
            pos_end=(first + held[classes]).to(pairs.order.dtype),
            self_pos=torch.full_like(pairs.order, -1),
            key_start=torch.zeros_like(pairs.intervals.key_start),
            key_end=torch.full_like(pairs.intervals.key_end, log_bias.numel()),
        )
        positives, others = against.intervals.counts()
        empty = log_bias.numel() - held.sum()
        return Bank(self.keys(anchors), log_bias, against, positives, (others - empty).clamp(min=0))

    def guard(self, loss: Tensor) -> Tensor:
        """Return the loss unchanged. Its backward pass raises RuntimeError if the queue has changed since.

        Args:
            loss: Any tensor that was computed from the slots.
        """
        # In a compiled graph autograd itself raises.
        if torch.compiler.is_compiling() or not loss.requires_grad:
            return loss
        return _Unchanged.apply(loss, self.embeddings)

    def extra_repr(self) -> str:
        kept = "" if self.groups is None else ", groups=True"
        return f"num_classes={self.num_classes}, size={self.size}, dim={self.dim}{kept}"

    def _check(self, name: str, vectors: Tensor) -> None:
        if vectors.shape[1] != self.dim:
            raise ValueError(f"{name} must have {self.dim} channels, as the queue, got {vectors.shape[1]}")
        if vectors.device != self.embeddings.device:
            raise ValueError(f"{name} must be on {self.embeddings.device}, as the queue, got {vectors.device}")

    def _write(self, rows: Tensor, offsets: Tensor, groups: Tensor | None) -> None:
        """Write unit rows [n, D] and their groups [n].

        Rows offsets[c] to offsets[c + 1] are those of class c. Rows that are zero or not finite are skipped.
        """
        number = torch.arange(rows.shape[0], device=rows.device)
        classes = torch.searchsorted(offsets[1:], number, right=True).clamp_(max=self.num_classes - 1)
        sound = rows.float().square().sum(1) > 0.5  # neither the zero row nor NaN
        before = torch.nn.functional.pad(sound.cumsum(0), (1, 0))
        arrived = before[offsets[1:]] - before[offsets[:-1]]
        place = before[:-1] - before[offsets[:-1]][classes]  # among the sound rows of its class
        kept = sound & (place >= (arrived - self.size)[classes])
        slots = classes * self.size + (self.next[classes] + place) % self.size
        # Shapes are static: a row that is not kept repeats the write of a kept row, or without any the old value.
        # Equal values may be written in any order.
        one = kept.int().argmax(0, keepdim=True)
        targets = torch.where(kept, slots, slots[one])

        def write(flat: Tensor, values: Tensor) -> None:
            again = torch.where(kept[one, None], values[one], flat[slots[one]])
            flat.index_copy_(0, targets, torch.where(kept[:, None], values, again))

        write(self.embeddings.view(-1, self.dim), rows)
        if self.groups is not None:
            groups = torch.full_like(slots, NO_GROUP) if groups is None else groups
            write(self.groups.view(-1, 1), groups[:, None])
        self.next.copy_((self.next + arrived) % self.size)
        self.filled.copy_((self.filled + arrived).clamp(max=self.size))


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, embeddings: Tensor) -> Tensor:
        ctx.embeddings, ctx.version = embeddings, embeddings._version
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.embeddings._version != ctx.version:
            raise RuntimeError("the EmbeddingQueue has changed since the loss was computed; enqueue after backward")
        return grad, None
