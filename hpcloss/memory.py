"""Embeddings of past batches as further keys: a ring of the newest of each class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpcloss.backends import resolve
from hpcloss.checks import check_vectors, count, labels_of_map, labels_of_vectors
from hpcloss.ops import statistics_dtype
from hpcloss.pack import Rows, pack
from hpcloss.partition import Pairs, class_sort
from hpcloss.regions import Grid, region_shape
from hpcloss.sampling import sample
from hpcloss.segments import segment_mean
from hpcloss.sorting import is_ignored


class Bank(NamedTuple):
    """An `EmbeddingQueue` as further keys of N anchors.

    keys: the slots [C * K, D]. log_bias [C * K]: of the keys in a log-sum-exp, -inf for a slot that holds nothing.
    pairs: the anchors against the slots; positives are filled slots alone. positives, negatives [N]: their numbers.
    """

    keys: Rows
    log_bias: Tensor
    pairs: Pairs
    positives: Tensor
    negatives: Tensor


class EmbeddingQueue(nn.Module):
    r"""The newest `size` embeddings of each class, as keys without gradient for `PixelContrastLoss`.

        loss = contrast(features, labels, predictions, queue)
        loss.backward()
        queue.enqueue(features, labels, samples_per_class=10)       # or queue.enqueue_means(features, labels)

    Enqueue after backward: the loss reads the slots in place, without a copy, and backward raises RuntimeError where
    they have changed since. Class c is the interval [c * size, (c + 1) * size) of the slots; nothing is sorted.

    The memory of Wang et al., "Exploring cross-image pixel contrast for semantic segmentation" (ICCV 2021), without the
    defects of the published code: slots wrap around, pixels are those of their class, empty slots are no keys.

    Buffers, in `state_dict`: embeddings [C, size, dim], fp32, unit rows in the slots that hold something; filled [C],
    how many do; next [C], the slot written next. `queue.half()` takes half the memory and needs no conversion for
    half-precision features on a GPU. Each process of a distributed run keeps its own: leave the queue out of what is
    wrapped.

    Args:
        num_classes: C. size: embeddings per class. dim: channels D.

    Raises ValueError for shapes, TypeError for dtypes; never for data.
    """

    embeddings: Tensor
    filled: Tensor
    next: Tensor

    def __init__(self, num_classes: int, size: int, dim: int):
        super().__init__()
        self.num_classes, self.size = count("num_classes", num_classes), count("size", size)
        self.dim = count("dim", dim)
        count("num_classes * size", self.num_classes * self.size)
        slots = torch.zeros(self.num_classes, self.size, self.dim, dtype=torch.float32)
        self.register_buffer("embeddings", slots)
        self.register_buffer("filled", torch.zeros(self.num_classes, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(self.num_classes, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, samples_per_class: int | None = None) -> None:
        """Write normalised embeddings over the oldest of their class, in order; of more than `size` the last remain.

        embeddings [N, D] with labels [N], or a map [B, D, *S] with labels [B, *S] of any resolution. Labels outside
        [0, num_classes) are skipped, and so are rows that are not finite or have no direction (norm up to 1e-12).
        samples_per_class: of each class draw at most this many, uniformly; None: take all (a map is gathered whole).
        """
        if embeddings.dim() == 2:
            check_vectors("embeddings", embeddings)
            labels = labels_of_vectors("labels", embeddings, labels)
        else:
            labels = labels_of_map(embeddings, labels).reshape(-1)
        self._check("embeddings", embeddings)
        if labels.numel() == 0:
            return
        order, offsets, _ = class_sort(labels, num_classes=self.num_classes)
        if samples_per_class is not None:
            most = min(count("samples_per_class", samples_per_class), labels.numel())
            order, offsets = sample(order, offsets, most, num_pixels=labels.numel())
        rows = pack(embeddings, order, offsets[-1:], normalize=True, backend=resolve("auto", embeddings)).data
        self._write(rows.to(self.embeddings.dtype), offsets.long())

    @torch.no_grad()
    def enqueue_means(self, features: Tensor, labels: Tensor) -> None:
        """Enqueue one embedding for each class of each image: the normalised mean of its unit rows (segment memory).

        features [B, D, *S]; labels [B, *S], as for `enqueue`. A segment with a pixel that is not finite is skipped.
        """
        labels = labels_of_map(features, labels)
        self._check("features", features)
        if labels.numel() == 0:
            return
        spatial = tuple(labels.shape[1:])
        images = Grid(labels.shape[0], spatial, region_shape(None, spatial), per_image=True)
        order, offsets, _ = class_sort(labels, images, num_classes=self.num_classes)
        backend = resolve("auto", features)
        rows = pack(features, order, offsets[-1:], normalize=True, backend=backend)
        # The mean of a class that an image does not show is a zero row, which is skipped.
        means = segment_mean(rows, offsets, backend=backend)
        self.enqueue(means, torch.arange(self.num_classes, device=means.device).repeat(labels.shape[0]))

    def rows(self, dtype: torch.dtype) -> Rows:
        """The slots as packed keys [C * size, D], without gradient; a view of the buffer if it has this dtype."""
        data = self.embeddings.view(-1, self.dim).to(dtype)
        return Rows(data, torch.zeros((), dtype=statistics_dtype(dtype), device=data.device).expand(data.shape))

    def bank(self, pairs: Pairs, classes: Tensor, dtype: torch.dtype, ignore_index: tuple[int, ...] = ()) -> Bank:
        """The slots as keys of the anchors of `pairs`, whose rows have `classes` [N]; ignored classes have none.

        Of `pairs` only the anchors matter: every region meets all slots.
        """
        number = torch.arange(self.num_classes, device=self.filled.device)
        held = torch.where(is_ignored(number, ignore_index), 0, self.filled)
        slot = torch.arange(self.size, device=held.device)
        log_bias = torch.where(slot < held[:, None], 0.0, -torch.inf).reshape(-1).to(statistics_dtype(dtype))
        classes = classes.clamp(0, self.num_classes - 1)  # dead rows have any label
        first = classes * self.size
        against = pairs.replace(
            pos_start=first.to(pairs.order.dtype),
            pos_end=(first + held[classes]).to(pairs.order.dtype),
            self_pos=torch.full_like(pairs.order, -1),
            key_start=torch.zeros_like(pairs.key_start),
            key_end=torch.full_like(pairs.key_end, log_bias.numel()),
        )
        positives, others = against.counts()
        empty = log_bias.numel() - held.sum()
        return Bank(self.rows(dtype), log_bias, against, positives, (others - empty).clamp(min=0))

    def guard(self, loss: Tensor) -> Tensor:
        """The same loss, whose backward pass says so if the slots are no longer those it was computed from."""
        # A compiled graph is told by autograd itself, in its own words.
        if torch.compiler.is_compiling() or not loss.requires_grad:
            return loss
        return _Unchanged.apply(loss, self.embeddings)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, size={self.size}, dim={self.dim}"

    def _check(self, name: str, vectors: Tensor) -> None:
        if vectors.shape[1] != self.dim:
            raise ValueError(f"{name} must have {self.dim} channels, as the queue, got {vectors.shape[1]}")
        if vectors.device != self.embeddings.device:
            raise ValueError(f"{name} must be on {self.embeddings.device}, as the queue, got {vectors.device}")

    def _write(self, rows: Tensor, offsets: Tensor) -> None:
        """Write unit rows [n, D], those of class c from offsets[c] to offsets[c + 1]; others are zero or not finite."""
        number = torch.arange(rows.shape[0], device=rows.device)
        classes = torch.searchsorted(offsets[1:], number, right=True).clamp_(max=self.num_classes - 1)
        sound = rows.float().square().sum(1) > 0.5  # neither the zero row nor NaN
        before = torch.nn.functional.pad(sound.cumsum(0), (1, 0))
        arrived = before[offsets[1:]] - before[offsets[:-1]]
        place = before[:-1] - before[offsets[:-1]][classes]  # among the sound rows of its class
        kept = sound & (place >= (arrived - self.size)[classes])
        slots = classes * self.size + (self.next[classes] + place) % self.size
        # Shapes are static: a row that is not kept repeats what a kept one writes or, without any, what stands there.
        # Equal values may be written in any order.
        flat = self.embeddings.view(-1, self.dim)
        one = kept.int().argmax(0, keepdim=True)
        again = torch.where(kept[one, None], rows[one], flat[slots[one]])
        flat.index_copy_(0, torch.where(kept, slots, slots[one]), torch.where(kept[:, None], rows, again))
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
