"""The losses of other libraries, derived anew from their equations: dense, float64, anchor by anchor where plain.

Also the random cases that both `test_compat.py` and `parity_with_peers.py` go through. Each formula takes the inputs of
a call, then its keyword arguments and the constructor's.
"""

import math
import random
from typing import NamedTuple

import torch

from tests.tools.cases import integers, rows

# ---------------------------------------------------------------------------------------------------------- formulas


def unit(x):
    """Rows of length 1; a zero row stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def lse(logits, mask):
    """Log-sum-exp of each row over the entries of a mask; -inf for none, without gradient."""
    empty = ~mask.any(1)
    total = torch.logsumexp(logits.masked_fill(~mask, -math.inf).masked_fill(empty[:, None], 0.0), 1)
    return total.masked_fill(empty, -math.inf)


def cross_entropy(own, others, mask):
    """-log( e^own / (e^own + Σ over the mask of e^others) ) of each row."""
    return torch.logaddexp(own, lse(others, mask)) - own


def supcontrast(features, labels=None, mask=None, temperature=0.07, contrast_mode="all", base_temperature=0.07):
    images, views = features.shape[:2]
    x = torch.cat([features[:, view].reshape(images, -1) for view in range(views)])
    if mask is None:
        labels = torch.arange(images) if labels is None else labels.reshape(-1)
        mask = labels[:, None] == labels
    others = ~torch.eye(len(x), dtype=torch.bool)
    weight = mask.double().repeat(views, views) * others
    logits = x @ x.T / temperature
    denominator = lse(logits, others)
    losses = []
    for i in range(images if contrast_mode == "one" else len(x)):
        total = weight[i].sum()
        if total > 0:
            losses.append(-(weight[i] * (logits[i] - denominator[i]))[others[i]].sum() / total)
        else:
            losses.append(0 * x[i].sum())
    return torch.stack(losses).mean() * temperature / base_temperature


def pairs_of(embeddings, labels, indices_tuple, ref_emb, ref_labels):
    """Lists of positive and of negative pairs."""
    if indices_tuple is not None:
        a, p, *rest = [index.tolist() for index in indices_tuple]
        b, n = rest if len(rest) == 2 else (a, rest[0])
        return list(zip(a, p)), list(zip(b, n))
    itself = ref_emb is None or ref_labels is None or ref_labels is labels
    theirs = labels if itself else ref_labels
    every = [(i, j, bool(labels[i] == theirs[j])) for i in range(len(labels)) for j in range(len(theirs))]
    positive = [(i, j) for i, j, same in every if same and not (itself and i == j)]
    return positive, [(i, j) for i, j, same in every if not same]


def similarities(embeddings, ref_emb, normalize):
    ref_emb = embeddings if ref_emb is None else ref_emb
    return unit(embeddings) @ unit(ref_emb).T if normalize else embeddings @ ref_emb.T


def pml_supcon(
    embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, temperature=0.1, normalize=True
):
    logits = similarities(embeddings, ref_emb, normalize) / temperature
    positive, negative = pairs_of(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    losses = []
    if positive and negative and len(positive) + len(negative) > 2:
        for i in sorted({i for i, _ in positive}):
            own = sorted({j for a, j in positive if a == i})
            keys = sorted({*own, *(j for a, j in negative if a == i)})
            losses.append(torch.logsumexp(logits[i, keys], 0) - logits[i, own].mean())
    losses = [loss for loss in losses if loss > 0]
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def pml_ntxent(
    embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, temperature=0.07, normalize=True
):
    logits = similarities(embeddings, ref_emb, normalize) / temperature
    positive, negative = pairs_of(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if not positive or not negative or len(positive) + len(negative) <= 2:
        return logits.sum() * 0
    others = {i: [j for a, j in negative if a == i] for i, _ in positive}
    losses = [torch.logsumexp(logits[i, [p, *others[i]]], 0) - logits[i, p] for i, p in positive]
    return torch.stack(losses).mean()


def ntxent(view1, view2, temperature=0.5):
    x, n = unit(torch.cat([view1, view2])), len(view1)
    logits = x @ x.T / temperature
    own = logits[torch.arange(2 * n), torch.arange(2 * n).roll(-n)]
    return (lse(logits, ~torch.eye(2 * n, dtype=torch.bool)) - own).mean()


def info_nce(query, positive_key, negative_keys=None, temperature=0.1, reduction="mean", negative_mode="unpaired"):
    q, k = unit(query), unit(positive_key)
    own = (q * k).sum(1) / temperature
    if negative_keys is None:
        others, mask = q @ k.T / temperature, ~torch.eye(len(q), dtype=torch.bool)
    else:
        shared = negative_mode == "unpaired"
        others = torch.einsum("nd,md->nm" if shared else "nd,nmd->nm", q, unit(negative_keys)) / temperature
        mask = torch.ones_like(others, dtype=torch.bool)
    loss = cross_entropy(own, others, mask)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def clip(image_features, text_features, logit_scale):
    logits, n = logit_scale * image_features @ text_features.T, len(image_features)
    off = ~torch.eye(n, dtype=torch.bool)
    each = [cross_entropy(side.diagonal(), side, off).mean() for side in (logits, logits.T)]
    return sum(each) / 2


def pixel_contrast(x, classes, keys=None, key_classes=None, temperature=0.07, base_temperature=0.07):
    """Rows x [n, D] that were drawn, of these classes, against each other or against keys."""
    itself = keys is None
    keys, key_classes = (x, classes) if itself else (keys, key_classes)
    logits, losses = x @ keys.T / temperature, []
    for i in range(len(x)):
        positive = (key_classes == classes[i]) & ~(itself & (torch.arange(len(keys)) == i))
        negative = key_classes != classes[i]
        if positive.any() and negative.any():
            own = logits[i, positive]
            losses.append((torch.logaddexp(own, torch.logsumexp(logits[i, negative], 0)) - own).mean())
    return torch.stack(losses).mean() * temperature / base_temperature if losses else x.sum() * 0


# ------------------------------------------------------------------------------------------------------- random cases


class Case(NamedTuple):
    options: dict  # of the constructor
    inputs: tuple  # tensors whose gradients are compared
    rest: dict  # further arguments of the call


TEMPERATURES = (0.07, 0.1, 0.5, 1.0)


def size(rng, most=257):
    """Numbers of rows and channels; few large ones, which take long."""
    return min(rng.choice([1, 2, 3, 31, 31, 31] * 8 + [257]), most), rng.choice([1, 7, 64, 100])


def class_labels(rng, count, seed):
    """One to five classes; some rows in a class of their own."""
    labels = integers(rng.randint(1, 5), count, seed=seed)
    if rng.random() < 0.3:
        alone = integers(3, count, seed=seed + 1) == 0
        labels = torch.where(alone, 100 + torch.arange(count), labels)
    return labels - rng.choice([0, 0, 1])  # -1 is a class as any other


def draw_supcontrast(seed):
    rng = random.Random(seed)
    (n, d), views = size(rng), rng.choice([1, 2, 2, 3])
    shape = (n, views, d) if d < 64 else (n, views, 2, d // 2)
    rest = {}
    if rng.random() < 0.6:
        rest["labels"] = class_labels(rng, n, seed)
    elif rng.random() < 0.7:
        mask = integers(2, n, n, seed=seed).double() * (rows(n, n, seed=seed).abs() if rng.random() < 0.5 else 1)
        rest["mask"] = mask * integers(3, n, 1, seed=seed + 1).clamp(max=1)  # some images without a positive
    options = {"temperature": rng.choice(TEMPERATURES), "contrast_mode": rng.choice(["all", "all", "one"])}
    return Case({**options, "base_temperature": rng.choice([0.07, 1.0])}, (rows(*shape, seed=seed),), rest)


def draw_pml(seed):
    """Labels; others' labels; the object `labels` for others; pairs; triplets, some named twice."""
    rng = random.Random(seed)
    n, d = size(rng, most=97)  # the formulas list every pair
    labels = class_labels(rng, n, seed)
    inputs, rest, form = (rows(n, d, seed=seed),), {"labels": labels}, rng.choice(["labels"] * 3 + ["ref", "pairs"])
    if form == "ref" or rng.random() < 0.2:
        m = n if rng.random() < 0.4 else rng.choice([1, 2, 30])
        inputs += (rows(m, d, seed=seed + 2),)
        rest["ref_labels"] = labels if m == n and rng.random() < 0.7 else class_labels(rng, m, seed + 3)
    if form == "pairs":
        keys = len(inputs[-1])
        kind = integers(4, n, keys, seed=seed + 4)  # no pair, a positive, a negative one
        (a, p), (b, q) = torch.where(kind == 1), torch.where(kind > 1)
        if rng.random() < 0.3:
            a, p, b, q = a.repeat(2), p.repeat(2), b.repeat(2), q.repeat(2)
        rest["indices_tuple"] = (a, p, b, q)
        if rng.random() < 0.4:
            a, p, q = (
                integers(n, 200, seed=seed),
                integers(keys, 200, seed=seed + 1),
                integers(keys, 200, seed=seed + 5),
            )
            named = (kind[a, p] == 1) & (kind[a, q] > 1)
            rest["indices_tuple"] = (a[named], p[named], q[named])
        if rng.random() < 0.5:
            rest = {"indices_tuple": rest["indices_tuple"]}
    return Case({"temperature": rng.choice(TEMPERATURES)}, inputs, rest)


def draw_two_views(seed):
    rng = random.Random(seed)
    n, d = size(rng)
    first, second = rows(n, d, seed=seed), rows(n, d, seed=seed + 1)
    if rng.random() < 0.2:
        second = first.clone()  # views that are equal
    # MONAI rounds its temperature to float32: numbers which that leaves alone.
    return Case({"temperature": rng.choice([0.125, 0.25, 0.5, 1.0])}, (first, second), {})


def draw_infonce(seed):
    rng = random.Random(seed)
    n, d = size(rng)
    mode, form = rng.choice(["unpaired", "paired"]), rng.choice(["none", "some", "some"])
    inputs = (rows(n, d, seed=seed), rows(n, d, seed=seed + 1))
    if form == "some":
        m = rng.choice([1, 2, 31])
        inputs += (rows(*((m, d) if mode == "unpaired" else (n, m, d)), seed=seed + 2),)
    options = {"temperature": rng.choice(TEMPERATURES), "reduction": rng.choice(["mean", "sum", "none"])}
    return Case({**options, "negative_mode": mode}, inputs, {})


def draw_clip(seed):
    rng = random.Random(seed)
    n, d = size(rng)
    scale = torch.tensor(1 / rng.choice(TEMPERATURES), dtype=torch.float64)
    return Case({}, (unit(rows(n, d, seed=seed)), unit(rows(n, d, seed=seed + 1)), scale), {})


def draw_pixels(seed):
    """A map of which every pixel is taken; with a memory or without."""
    rng = random.Random(seed)
    n, d = size(rng, most=97)
    images = rng.choice([1, 1, 2, 3])
    labels = class_labels(rng, images * n, seed).view(images, n)
    labels = torch.where(labels > 6, labels % 7, labels)
    options = {"temperature": rng.choice(TEMPERATURES), "base_temperature": rng.choice([0.07, 1.0])}
    rest = {"labels": labels}
    if rng.random() < 0.4:
        rest["queue"] = rows(7, rng.choice([1, 5]), d, seed=seed + 1)
    return Case(options, (rows(images, d, n, seed=seed) / d**0.5,), rest)
