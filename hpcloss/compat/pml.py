"""pytorch-metric-learning's `SupConLoss` and `NTXentLoss`: labels or miners' pairs, and reference embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcloss.checks import check_vectors
from hpcloss.compat import named_pairs
from hpcloss.compat.base import PeerLoss, check_vector_options
from hpcloss.compat.named_pairs import Named, Sides
from hpcloss.operators import plain
from hpcloss.plan.labels import labels_of_vectors
from hpcloss.plan.partition import Pairs, partition, partition_against
from hpcloss.primitives.pair_cross_entropy import pair_cross_entropy
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale


class PairLoss(PeerLoss):
    """Base class of `SupConLoss` and `NTXentLoss`: the options, and the pairs that count.

    Args:
        temperature: A positive number, or a tensor with one element.
        distance: The library's CosineSimilarity or DotProductSimilarity. None: cosine. Attributes that are set on it
            later take effect in the next call.
        reducer: A reducer of the library, copied as there. None: the default of the loss.
        embedding_regularizer: A regularizer of the library, added to the loss.
        embedding_reg_weight: Weight of the regularizer.
        collect_stats: No effect, as in the library. The distance and the reducer have their own.

    Raises:
        NotImplementedError: The distance is another one, or has another p, power or sign.
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.
    """

    lacks = ("loss_method",)
    kind: str  # what the losses belong to, in the words of the library's reducers

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ):
        super().__init__()
        check_vector_options(temperature)
        self.temperature = temperature
        self.distance = distance
        whole = type(reducer).__name__ in ("MultipleReducers", "DoNothingReducer")
        self.reducer = reducer if whole else copy.deepcopy(reducer)
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.collect_stats = collect_stats
        _normalizes(distance)

    @property
    def normalize(self) -> bool:
        """Whether rows are divided by their L2 norm, as the distance says at this moment."""
        return _normalizes(self.distance)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of labelled embeddings, or of given pairs.

        Args:
            embeddings: Anchors `[N, D]`, any float dtype.
            labels: `[N]`. Optional with `indices_tuple`, which then decides.
            indices_tuple: Pairs (anchors, positives, anchors, negatives) or triplets (anchors, positives, negatives),
                as miners return them. Positives and negatives index `ref_emb`, or the embeddings.
            ref_emb: Keys `[M, D]`. None: the embeddings are the keys, and no row is its own key.
            ref_labels: Labels of the keys `[M]`. None, or the object `labels`: the keys have the labels of the
                embeddings, and no row meets the key of its number.

        Returns:
            The loss in fp32 (float64 for float64 embeddings), as the reducer returns it.
        """
        check_vector_options(self.temperature)  # a script may have set another
        check_vectors("embeddings", embeddings)
        if ref_emb is not None:
            check_vectors("ref_emb", ref_emb, like=embeddings)
        if indices_tuple is not None:
            if labels is not None:
                labels_of_vectors("labels", embeddings, torch.as_tensor(labels))
            if ref_emb is not None and ref_labels is not None:
                labels_of_vectors("ref_labels", ref_emb, torch.as_tensor(ref_labels))
            losses, indices = self._of_named(*self._named(embeddings, indices_tuple, ref_emb))
        elif labels is not None:
            losses, indices = self._of_labels(*self._sorted(embeddings, labels, ref_emb, ref_labels))
        else:
            raise ValueError("labels and indices_tuple cannot both be None")
        if self.distance is not None and self.distance.collect_stats:
            self._collect(embeddings, embeddings if ref_emb is None else ref_emb)
        if losses.dim() == 0:
            loss = losses
        elif self.reducer is None:
            loss = self._reduce(losses)
        else:
            info = {"losses": losses, "indices": indices, "reduction_type": self.kind}
            own_labels = None if labels is None else torch.as_tensor(labels).to(embeddings.device)
            loss = self.reducer({"loss": info}, embeddings, own_labels)
        if self.embedding_regularizer is not None:
            more = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            if isinstance(loss, dict):  # of a reducer that does nothing
                loss["embedding_reg_loss"] = {"losses": more, "indices": None, "reduction_type": "already_reduced"}
            else:
                loss = loss + more
        return loss

    def _collect(self, embeddings: Tensor, keys: Tensor) -> None:
        """Update the statistics of the distance."""
        self.distance.reset_stats()
        unit, unit_keys = [self.distance.maybe_normalize(x) for x in (embeddings, keys)]
        self.distance.set_default_stats(embeddings, keys, unit, unit_keys)

    def _sorted(
        self, embeddings: Tensor, labels: Any, ref_emb: Tensor | None, ref_labels: Any
    ) -> tuple[Rows, Rows | None, Pairs]:
        """The rows by label, the keys if they are other vectors, and the pairs that count."""
        given, labels = labels, labels_of_vectors("labels", embeddings, torch.as_tensor(labels))
        if ref_emb is None:
            pairs = partition(labels)
            return self._pack(embeddings, pairs.order), None, pairs
        if ref_labels is None or ref_labels is given:
            check_vectors("ref_emb", ref_emb, like=embeddings, same_length=True)
            pairs = partition(labels)
            key_order = pairs.order
        else:
            ref_labels = labels_of_vectors("ref_labels", ref_emb, torch.as_tensor(ref_labels))
            pairs, key_order = partition_against(labels, ref_labels)
        rows = self._pack(embeddings, pairs.order)
        return rows, self._pack(ref_emb, key_order, rows), pairs

    def _named(
        self, embeddings: Tensor, indices: Sequence[Tensor], ref_emb: Tensor | None
    ) -> tuple[Sides, Named, Named]:
        """The anchors and keys, the positive pairs and the negative pairs."""
        if len(indices) not in (3, 4):
            raise ValueError(f"indices_tuple must hold 3 tensors (triplets) or 4 (pairs), got {len(indices)}")
        of_positive, positive, *rest = [plain(index).to(embeddings.device).long() for index in indices]
        of_negative, negative = rest if len(rest) == 2 else (of_positive, *rest)
        rows = self._pack(embeddings, torch.arange(len(embeddings), device=embeddings.device))
        keys = None
        if ref_emb is not None:
            keys = self._pack(ref_emb, torch.arange(len(ref_emb), device=ref_emb.device), rows)
        sides = Sides(rows, keys, Scale.of(self.temperature, rows, self.normalize))
        return sides, Named(of_positive, positive), Named(of_negative, negative)

    def _pack(self, vectors: Tensor, order: Tensor, anchors: Rows | None = None) -> Rows:
        """Packed vectors. With `anchors` they are packed as their keys, which may have another dtype."""
        rows = pack(vectors, order, normalize=self.normalize, permutation=True)
        return rows if anchors is None else Rows(rows.data, rows.companion, anchors.backend)

    # Losses and what each belongs to, or one number where they are not kept one by one.

    def _of_labels(self, rows: Rows, keys: Rows | None, pairs: Pairs) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _of_named(self, sides: Sides, positive: Named, negative: Named) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _reduce(self, losses: Tensor) -> Tensor:
        raise NotImplementedError


class SupConLoss(PairLoss):
    """Supervised contrast with the signature of pytorch-metric-learning's `SupConLoss`.

        L_i = log Σ_{k∈P(i)∪N(i)} e^{l_ik} - 1/|P(i)| Σ_{p∈P(i)} l_ip

    l_ij is the cosine of rows i and j, divided by the temperature. P(i) and N(i) are the positives and negatives of
    anchor i, by label or by the given pairs. The loss is the mean over the anchors with L_i > 0. It is 0 if the batch
    has no positive pair, no negative pair, or one of each. The call is that of `PairLoss.forward`.

    Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), eq. 2. The value is that of the library.

    Args:
        temperature: A positive number, or a tensor with one element.
        **options: distance, reducer, embedding_regularizer, embedding_reg_weight and collect_stats, as in `PairLoss`. A
            reducer gets the loss of each anchor.

    Raises:
        NotImplementedError: The distance is not supported.
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.pml import SupConLoss
        >>> embeddings, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> round(SupConLoss(temperature=1.0)(embeddings, labels).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    kind = "element"

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any):
        super().__init__(temperature, **options)

    def _of_labels(self, rows: Rows, keys: Rows | None, pairs: Pairs) -> tuple[Tensor, Any]:
        loss, _, _ = pair_cross_entropy(rows, pairs, Scale.of(self.temperature, rows, self.normalize), keys=keys)
        positives, negatives = pairs.intervals.counts()
        loss = torch.where(_is_contrast(positives.sum(), negatives.sum()), loss, 0.0)
        return torch.zeros_like(loss).index_add(0, pairs.order, loss), torch.arange(len(loss), device=loss.device)

    def _of_named(self, sides: Sides, positive: Named, negative: Named) -> tuple[Tensor, Any]:
        active = _is_contrast(len(positive.keys), len(negative.keys))
        losses = named_pairs.supcon(sides, positive, negative)
        return losses if active else _nothing(losses), torch.arange(len(losses), device=losses.device)

    def _reduce(self, losses: Tensor) -> Tensor:
        return losses.clamp(min=0).sum() / (losses > 0).sum().clamp(min=1)


class NTXentLoss(PairLoss):
    """NT-Xent for any number of positives, with the signature of pytorch-metric-learning's `NTXentLoss`.

        L = 1/n Σ_i Σ_{p∈P(i)} [ log( e^{l_ip} + Σ_{n∈N(i)} e^{l_in} ) - l_ip ]

    l_ij is the cosine of rows i and j, divided by the temperature. P(i) and N(i) are the positives and negatives of
    anchor i, by label or by the given pairs; n in front is the number of positive pairs. The loss is 0 if the batch has
    no positive pair, no negative pair, or one of each. The call is that of `PairLoss.forward`.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations" (ICML 2020), eq. 1. The
    value is that of the library, without its smallest number inside the logarithm (`docs/differences.md`).

    Args:
        temperature: A positive number, or a tensor with one element.
        **options: distance, reducer, embedding_regularizer, embedding_reg_weight and collect_stats, as in `PairLoss`. A
            reducer other than MeanReducer gets the loss of each positive pair, and needs an `indices_tuple`.

    Raises:
        NotImplementedError: The distance is not supported, or the reducer needs an `indices_tuple`.
        ValueError: An option or a shape is invalid.
        TypeError: A dtype or the type of an option is invalid.

    Examples:
        >>> import torch
        >>> from hpcloss.compat.pml import NTXentLoss
        >>> embeddings, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> round(NTXentLoss(temperature=1.0)(embeddings, labels).item(), 4)  # log(e + 2) - 1
        0.5514
    """

    kind = "pos_pair"

    def __init__(self, temperature: float | Tensor = 0.07, **options: Any):
        super().__init__(temperature, **options)

    def _of_labels(self, rows: Rows, keys: Rows | None, pairs: Pairs) -> tuple[Tensor, Any]:
        if self._needs_each():
            raise NotImplementedError(
                "reducer must be MeanReducer without collect_stats where labels define the pairs, got"
                f" {type(self.reducer).__name__}; pass an indices_tuple to have the loss of each pair"
            )
        scale = Scale.of(self.temperature, rows, self.normalize)
        stat = pair_lse(rows, pairs, "negatives", scale, keys=keys)
        mean, _ = pair_mean(rows, pairs, "own", scale, keys=keys, stat=stat)
        positives, negatives = [count.to(mean.dtype) for count in pairs.intervals.counts()]
        share = positives / positives.sum().clamp(min=1)
        return torch.where(_is_contrast(positives.sum(), negatives.sum()), (share * mean).sum(), 0.0), None

    def _of_named(self, sides: Sides, positive: Named, negative: Named) -> tuple[Tensor, Any]:
        active = _is_contrast(len(positive.keys), len(negative.keys))
        if self._needs_each():
            losses = named_pairs.ntxent(sides, positive, negative)
            return losses if active else _nothing(losses), positive
        loss = named_pairs.ntxent_sum(sides, positive, negative) / max(len(positive.keys), 1)
        return loss if active else _nothing(loss), None

    def _needs_each(self) -> bool:
        """Whether the reducer needs the loss of each pair. A mean is computed without them."""
        name = type(self.reducer).__name__
        return self.reducer is not None and (name != "MeanReducer" or self.reducer.collect_stats)


def _normalizes(distance: Any) -> bool:
    """Whether a distance of the library, known by its name, normalises the rows."""
    name = type(distance).__name__
    if distance is None:
        return True
    if name in ("CosineSimilarity", "DotProductSimilarity"):
        if distance.p == 2 and distance.power == 1 and distance.is_inverted:
            return bool(distance.normalize_embeddings)
        name += f" with p={distance.p}, power={distance.power}, is_inverted={distance.is_inverted}"
    raise NotImplementedError(
        f"distance must be CosineSimilarity or DotProductSimilarity, with p=2, power=1 and is_inverted=True, got {name}"
    )


def _is_contrast(positives: Any, negatives: Any) -> Any:
    """Whether these numbers of pairs make a loss. One pair of each kind does not."""
    return (positives > 0) & (negatives > 0) & ((positives > 1) | (negatives > 1))


def _nothing(losses: Tensor) -> Tensor:
    """Zeros, joined to the graph, in the shape of the losses."""
    return losses.masked_fill(torch.ones_like(losses, dtype=torch.bool), 0.0)
