"""Prototypes of layers, contrasted and updated: PCCS (He et al., arXiv 2502.06650), with a teacher that is updated."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.batches import Batch
from examples.methods.mean_teacher import MeanTeacher, Outputs
from hpcloss import ProjectionHead, PrototypeAssignmentLoss, PrototypeBank, PrototypeContrastLoss, layer_prototypes
from hpcloss.prototypes import LayerPrototypes

IGNORED = 255


class PCCS(MeanTeacher):
    """The mean teacher with prototypes: contrast of those of layers, and a bank of them that classifies pixels.

    * contrast: the student's mean embeddings of every image, class and depth inside the class (signed distance), on
      unlabelled images, uncertain ones weighing more;
    * assignment: the student's pixels find the bank's prototypes of their class, as the teacher's are assigned;
    * uncertainty consistency: the student's probabilities agree with what the bank says of the teacher's embeddings,
      and are certain;
    * the bank follows the teacher's layer prototypes and the labelled pixels.

    A reconstruction of the paper's code with its teacher really averaged and a gradient where it meant one. Ours:
    the terms are added to the mean teacher's consistency, whose weight is the comparison's; probabilities are compared,
    not logits with scores; classes have one map of distances each, in whole pixels; embeddings at half resolution.
    """

    consistency_from, prototypes_from = 0.01, 0.025  # shares of the stage: the paper's 200 and 500 of 20 000 steps
    layers = 4  # deeper pixels count to the last

    def __init__(
        self,
        *args: Any,
        contrast_weight: float = 0.01,
        assignment_weight: float = 0.3,
        uncertainty_weight: float = 0.1,
        per_class: int = 2,
        momentum: float = 0.95,  # theirs, .999, is one for 20 000 steps
        temperature: float = 0.1,
    ):
        super().__init__(*args)
        settings, dim = self.settings, self.settings.embedding_dim
        self.weights = {"contrast": contrast_weight, "assignment": assignment_weight, "uncertainty": uncertainty_weight}
        self.temperature = temperature
        self.projector = ProjectionHead(settings.features[-1], dim)
        self.teacher_projector = AveragedModel(self.projector, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.teacher_projector.requires_grad_(False)
        self.bank = PrototypeBank(len(self.slices.classes), dim, momentum, per_class)
        self.contrast, self.assignment = PrototypeContrastLoss(), PrototypeAssignmentLoss(temperature)

    def after_step(self) -> None:
        self.teacher_projector.update_parameters(self.projector)

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        if self.progress < self.consistency_from:
            return outputs.logits.new_zeros(())
        count = len(batch["labels"])
        student = self.projector(halved(outputs.features))
        teacher = self.teacher_projector(halved(outputs.teacher_features))
        probabilities = halved(outputs.logits[count:].softmax(1))
        sureness, sure_of = halved(outputs.teacher_logits.softmax(1)).max(1)
        sure_of = torch.where(sureness > self.settings.confidence, sure_of, IGNORED)
        labels = torch.cat([batch["labels"][:, ::2, ::2], sure_of])
        terms = {"uncertainty": self.uncertainty_consistency(probabilities, teacher)}
        if self.progress >= self.prototypes_from:
            terms["contrast"] = self.contrast(*self.prototypes(student[count:], probabilities.argmax(1), probabilities))
            known = torch.cat([student[:count].detach(), teacher])
            terms["assignment"] = self.assignment(student, labels, self.bank.prototypes, known)
        self.update_bank(student[:count].detach(), teacher, labels, probabilities.detach())
        self.log_dict({f"method/{name}": term for name, term in terms.items()})
        return super().unlabelled_loss(batch, outputs) + sum(self.weights[name] * term for name, term in terms.items())

    def prototypes(self, embeddings: Tensor, labels: Tensor, probabilities: Tensor) -> LayerPrototypes:
        """Those of every layer of every class of every image; of the background near the classes and away from them,
        uncertain pixels alone."""
        layers = depths(labels, self.layers)
        sure = entropy(probabilities) < 0.25 + 0.25 * self.progress  # nats
        layers = torch.where((labels == 0) & sure, -1, layers)
        return layer_prototypes(embeddings, layers, labels, len(self.slices.classes), self.layers, probabilities)

    def uncertainty_consistency(self, probabilities: Tensor, teacher: Tensor) -> Tensor:
        """The mean squared difference of the student's probabilities from the bank's word on the teacher's embeddings,
        and a tenth of the student's mean entropy; nothing while a class has no prototype."""
        if not self.bank.filled.any(1).all():
            return probabilities.new_zeros(())
        scores = torch.einsum("bdhw,ckd->bckhw", F.normalize(teacher, dim=1), self.bank.prototypes) / self.temperature
        scores = torch.where(self.bank.filled[..., None, None], scores, -torch.inf).amax(2)
        return F.mse_loss(probabilities, scores.softmax(1)) + 0.1 * entropy(probabilities).mean()

    @torch.no_grad()
    def update_bank(self, labelled: Tensor, teacher: Tensor, labels: Tensor, probabilities: Tensor) -> None:
        """By the class means of labelled images, and by the teacher's layer prototypes where it is sure."""
        count, classes = len(labelled), len(self.slices.classes)
        whole = torch.zeros_like(labels[:count])
        means = layer_prototypes(labelled, whole, labels[:count], classes, 1)
        layers = self.prototypes(teacher, labels[count:], probabilities)
        self.bank.update(torch.cat([means.prototypes, layers.prototypes]), torch.cat([means.labels, layers.labels]))


def halved(maps: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return F.avg_pool2d(maps, 2)


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, over axis 1."""
    return -(probabilities * probabilities.clamp(min=1e-8).log()).sum(1)


def depths(labels: Tensor, layers: int) -> Tensor:
    """How deep each pixel lies in its class, 0 at the edge, at most layers - 1; labels [B, h, w].

    Background pixels: 0 in the half nearer to the classes, 1 in the other. Distances are found by SciPy on the host.
    """
    found = np.zeros(labels.shape, np.int64)
    for label, depth in zip(labels.cpu().numpy(), found, strict=True):
        for c in np.unique(label):
            inside = label == c
            distance = distance_transform_edt(inside)
            if c == 0:
                depth[inside] = distance[inside] > distance.max() / 2
            else:
                depth[inside] = np.clip(np.ceil(distance[inside]) - 1, 0, layers - 1)
    return torch.from_numpy(found).to(labels.device)
