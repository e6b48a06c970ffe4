"""The competitors: those without a package written by us from the mathematics, the others where they are installed."""

import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_supcon(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast with the mean outside the logarithm, dense: every pair is written out."""
    rows = F.normalize(embeddings, dim=1)
    logits = rows @ rows.T / temperature
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    positive = (labels[:, None] == labels) & ~itself
    log_share = logits - torch.logsumexp(logits.masked_fill(itself, -math.inf), 1, keepdim=True)
    return -((log_share * positive).sum(1) / positive.sum(1)).mean()


def eager_phpc(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1, hardness: float = 1.0, background: int | None = 0
) -> Tensor:
    """Hard-positive pixel contrast of one region, each positive against its own denominator, dense."""
    rows = F.normalize(embeddings, dim=1)
    similarity = rows @ rows.T
    logits = similarity / temperature
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    with torch.no_grad():
        weights = torch.softmax((-hardness * similarity).masked_fill(~positive, -math.inf), 1)
    negatives = torch.logsumexp(logits.masked_fill(same, -math.inf), 1, keepdim=True)
    loss = (weights * F.softplus(negatives - logits)).sum(1)
    return loss.mean() if background is None else loss[labels != background].mean()


def eager_infonce(query: Tensor, positive: Tensor, temperature: float = 0.1) -> Tensor:
    """Each query against all positives of the batch, dense."""
    logits = F.normalize(query, dim=1) @ F.normalize(positive, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def eager_clip(query: Tensor, positive: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE in both directions, dense: the rows and the columns of one matrix of logits."""
    logits = F.normalize(query, dim=1) / temperature @ F.normalize(positive, dim=1).T
    target = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _logits_of_views(view1: Tensor, view2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of both views [2N, D], logits of each against every other one, and where its other view stands."""
    rows = F.normalize(torch.cat([view1, view2]), dim=1)
    logits = (rows / temperature @ rows.T).fill_diagonal_(-math.inf)
    return rows, logits, torch.arange(len(rows), device=rows.device).roll(len(view1))


def eager_ntxent(view1: Tensor, view2: Tensor, temperature: float = 0.5) -> Tensor:
    """Each row's other view against the rest of the batch, dense."""
    _, logits, other = _logits_of_views(view1, view2, temperature)
    return F.cross_entropy(logits, other)


def eager_ihpc(view1: Tensor, view2: Tensor, temperature: float = 0.5, hardness: float = 1.0) -> Tensor:
    """NT-Xent in which images whose views disagree weigh more, dense; the weights are constants."""
    rows, logits, other = _logits_of_views(view1, view2, temperature)
    with torch.no_grad():
        own = (rows[: len(view1)] * rows[len(view1) :]).sum(1)
        weights = torch.softmax(-hardness * own.repeat(2), 0)
    return weights @ F.cross_entropy(logits, other, reduction="none")


def eager_hard_negative_nce(
    view1: Tensor, view2: Tensor, temperature: float = 0.5, beta: float = 1.0, tau_plus: float = 0.1
) -> Tensor:
    """Two views with reweighted (beta > 0) and debiased negatives, dense, with the exponentials written out."""
    view1, view2 = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
    rows, count = torch.cat([view1, view2]), 2 * len(view1) - 2
    image = torch.arange(len(view1), device=rows.device).repeat(2)
    logits = (rows / temperature @ rows.T).masked_fill_(image[:, None] == image, -math.inf)
    positive = ((view1 * view2).sum(1) / temperature).exp().repeat(2)
    negative, weights = logits.exp(), (beta * logits).exp()
    mean = (weights * negative).sum(1) / weights.sum(1)
    left = (count * mean - tau_plus * count * positive) / (1 - tau_plus)
    return torch.log1p(left.clamp(min=count * math.exp(-1 / temperature)) / positive).mean()


def eager_pccs(prototypes: Tensor, labels: Tensor, temperature: float = 0.05) -> Tensor:
    """Prototypes against one another, similar positives weighing more, dense; each class has two or more of them."""
    rows = F.normalize(prototypes, dim=1)
    logits = rows / temperature @ rows.T
    same = labels[:, None] == labels
    weights = torch.softmax(logits.masked_fill(~same, -math.inf).fill_diagonal_(-math.inf), 1)
    negatives = torch.logsumexp(logits.masked_fill(same, -math.inf), 1, keepdim=True)
    return (weights * F.softplus(negatives - logits)).sum(1).mean()


def chunked_infonce(query: Tensor, positive: Tensor, temperature: float = 0.1) -> Tensor:
    """The same through `F.linear_cross_entropy` in the form that keeps no matrix of logits (torch 2.13 and later)."""
    target = torch.arange(len(query), device=query.device)
    query = F.normalize(query, dim=1) / temperature
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(query, F.normalize(positive, dim=1), target, options=options)


def random_anchors(labels: Tensor, num_classes: int, k: int) -> list[Tensor]:
    """k pixels of every class of every image [B, *S], as trainers draw them: nonzero, then a random permutation."""
    drawn = []
    for image in labels:
        for label in range(num_classes):
            pixels = (image.reshape(-1) == label).nonzero().reshape(-1)
            drawn.append(pixels[torch.randperm(pixels.numel(), device=labels.device)[:k]])
    return drawn


def hard_anchors(labels: Tensor, wrong: Tensor, num_classes: int, k: int) -> list[Tensor]:
    """The anchor sampler of ContrastiveSeg (Wang et al., ICCV 2021), in our words: of every class of every image with
    more than k pixels half wrongly predicted ones and half right ones, the quota filled from the other half."""
    drawn = []
    for image, failed in zip(labels.reshape(len(labels), -1), wrong.reshape(len(labels), -1)):
        classes = [label for label in torch.unique(image) if label < num_classes]
        classes = [label for label in classes if (image == label).nonzero().shape[0] > k]
        for label in classes:
            hard = ((image == label) & failed).nonzero().reshape(-1)
            easy = ((image == label) & ~failed).nonzero().reshape(-1)
            num_hard, num_easy = hard.shape[0], easy.shape[0]
            if num_hard >= k / 2 and num_easy >= k / 2:
                keep_hard = k // 2
            elif num_hard >= k / 2:
                keep_hard = k - num_easy
            else:
                keep_hard = num_hard
            hard = hard[torch.randperm(num_hard, device=labels.device)[:keep_hard]]
            easy = easy[torch.randperm(num_easy, device=labels.device)[: k - keep_hard]]
            drawn.append(torch.cat([hard, easy]))
    return drawn


def hard_rows(features: Tensor, labels: Tensor, wrong: Tensor, num_classes: int, k: int) -> tuple[Tensor, Tensor]:
    """The pixels that `hard_anchors` draws from a map [B, D, H, W], gathered class by class as there: rows, labels."""
    rows, drawn_labels = [], []
    for image, label, failed in zip(features, labels, wrong):
        for pixels in hard_anchors(label[None], failed[None], num_classes, k):
            rows.append(image.flatten(1).T[pixels])
            drawn_labels.append(label.reshape(-1)[pixels])
    return torch.cat(rows), torch.cat(drawn_labels)


def why_not(method: str) -> str | None:
    """Why a case of this name cannot run here, or None."""
    if method == "compiled_supcon" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler"
    if method == "linear_cross_entropy":
        return _why_no_linear_cross_entropy()
    package = PACKAGES.get(method)
    found = package is None or importlib.util.find_spec(package) is not None
    return None if found else f"{package} is not installed: `make bench` has it"


def _why_no_linear_cross_entropy() -> str | None:
    """Why `chunked_infonce` cannot run here, or None."""
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"F.linear_cross_entropy of torch {torch.__version__} has no chunked form"
    return None


def compiled(loss: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    """`torch.compile` of a loss, forward and backward built by running the example. Raises where it cannot be built."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiler processes beside the timing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.compile(loss, dynamic=False)
        fast(*example).backward()
    return fast


# ------------------------------------------------------------------------------------------- installed libraries

PACKAGES = {
    "pml_supcon": "pytorch_metric_learning",
    "pml_ntxent": "pytorch_metric_learning",
    "lightly_ntxent": "lightly",
    "monai_contrastive": "monai",
    "info_nce_pytorch": "info_nce",
}


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules without content: what lightly imports for its other parts, and what would bring another torch."""

    NAMES = ("torchvision", "pytorch_lightning", "hydra", "omegaconf", "PIL", "timm")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _stub
        return module

    def exec_module(self, module):
        pass


def _stub(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (torch.nn.Module,), {})


def pml() -> Any:
    from pytorch_metric_learning import losses

    return losses


def lightly_ntxent() -> Any:
    sys.meta_path.append(Stubs())
    from lightly.loss import NTXentLoss

    return NTXentLoss


def monai_contrastive() -> Any:
    from monai.losses import ContrastiveLoss

    return ContrastiveLoss


def info_nce() -> Any:
    from info_nce import InfoNCE

    return InfoNCE


# ------------------------------------------------------------------------------------- the published block loop


def blocks(features: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pixels of each block of the grid, of all images together: rows [n, D] and labels [n]."""
    height, width = features.shape[2:]
    found = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            cell = (..., slice(top, top + size), slice(left, left + size))
            found.append((features[cell].permute(0, 2, 3, 1).reshape(-1, features.shape[1]), labels[cell].reshape(-1)))
    return found


def block_loop(features: Tensor, labels: Tensor, size: int = 16, temperature: float = 0.1, beta: float = 0.1) -> Tensor:
    """The published pixel loss as it was meant: a loop over blocks, each with dense n x n matrices.

    Positive pairs weigh exp(-beta s_ij) in their own denominator; background is key only; mean over blocks of means.
    The committed code's defects are left out, so its value can be checked (and it does a quarter of the work of the
    committed form, see `committed_block_loop`).
    """
    losses = []
    for rows, label in blocks(F.normalize(features, dim=1), labels, size):
        if not (label > 0).any():
            continue
        similarity = rows @ rows.T
        logits = similarity / temperature
        same = (label[:, None] == label).to(logits.dtype)
        positive = same * (1 - torch.eye(len(rows), dtype=logits.dtype))
        exponential = torch.exp(logits)
        negatives = (exponential * (1 - same)).sum(1, keepdim=True)
        terms = torch.log(exponential * torch.exp(-beta * similarity * positive) + negatives) - logits
        mean = (positive * terms).sum(1) / positive.sum(1).clamp(min=1)
        counted = (label > 0) & (positive.sum(1) > 0) & (same.sum(1) < len(rows))
        losses.append(mean[counted].mean())
    return torch.stack(losses).mean()


def committed_block_loop(
    features: Tensor, labels: Tensor, size: int = 16, temperature: float = 0.1, beta: float = 0.1
) -> Tensor:
    """The work of the published pixel loss as its authors committed it: four view quadrants, each padded to n x n.

    The first half of the batch is view 1 and the second half view 2. Three of the four quadrants are mis-aligned, the
    anchor is among its negatives, and the class number weighs the loss; all of that is theirs, and its value is not
    compared with anything. NaN as soon as the views of a pixel disagree in sign.
    """
    losses = []
    for rows, label in blocks(F.normalize(features, dim=1), labels, size):
        if not (label > 0).any():
            continue
        half = len(rows) // 2
        logits = rows @ rows.T / temperature
        off_diagonal = 1 - torch.eye(len(rows))
        positive = (label[:, None] == label).float() * off_diagonal
        negative = 1 - positive
        agreement = (rows[:half] * rows[half:]).sum(1).repeat(2)
        hardness = positive * torch.sqrt(agreement[:, None] * agreement)
        exponential = torch.exp(logits) * off_diagonal * torch.exp(-beta * hardness)
        negatives = (negative * torch.exp(logits)).sum(1, keepdim=True)
        quadrants = []
        for own in (slice(0, half), slice(half, None)):
            for other in (slice(0, half), slice(half, None)):
                padded = torch.ones_like(exponential)
                padded[:half, :half] = exponential[own, other]
                terms = torch.log(padded + negatives) - logits
                mean = (positive * label[:, None] * terms).sum(1) / positive.sum(1).clamp(min=1)
                quadrants.append(mean.sum() / (label > 0).sum())
        losses.append(torch.stack(quadrants).mean())
    return torch.stack(losses).mean()
