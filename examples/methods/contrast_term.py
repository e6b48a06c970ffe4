"""A pixel contrast beside confident pseudo-labels: what `compare` asks about contrast as a further term."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.batches import Batch
from examples.methods.fixmatch import FixMatch, confident_cross_entropy
from examples.methods.mean_teacher import IGNORED, Outputs
from examples.networks import width_of
from hpcloss import EmbeddingQueue, FeatureTap, PixelContrastLoss, ProjectionHead, RegionPHPCLoss

SIZE = 1024  # embeddings of a class in the memory
STRIDES = {"upcat_1": 1, "upcat_2": 2, "upcat_3": 4, "upcat_4": 8}  # of the decoder's blocks


class ContrastTerm(FixMatch):
    """FixMatch and `weight` times a contrast of pixels of the whole batch by class, ramped up with the unlabelled term.

    * pixels: "pseudo", those of labelled images and those of unlabelled ones where the teacher is sure, or "labels";
    * layer: the decoder's block that the embeddings come from; its stride thins the labels;
    * samples: pixels of each class in a step, None for all;
    * hardness: of `RegionPHPCLoss`; "published" for the form of its authors' code;
    * hard: half of the pixels are ones that the network classifies wrongly, and memory: past embeddings are further
      keys, both by `PixelContrastLoss`;
    * head_lr: the learning rate of the projection head in those of the network;
    * background: a class whose pixels are keys and no anchors.
    """

    def __init__(
        self,
        *args: Any,
        weight: float = 0.1,
        pixels: str = "pseudo",
        layer: str = "upcat_2",
        samples: int | None = 128,
        hardness: float | str = 0.0,
        hard: bool = False,
        memory: bool = False,
        head_lr: float = 1.0,
        background: int | None = None,
    ):
        super().__init__(*args)
        self.weight, self.pixels, self.hard, self.head_lr = weight, pixels, hard, head_lr
        self.stride, classes, dim = STRIDES[layer], len(self.slices.classes), self.settings.embedding_dim
        object.__setattr__(self, "student_tap", FeatureTap(self.network, layer))
        self.projector = ProjectionHead(width_of(layer, self.settings.features), dim)
        shared: dict[str, Any] = {"num_classes": classes, "samples_per_class": samples, "background": background}
        self.contrast: nn.Module
        if hard or memory:
            of_an_image = samples and max(1, samples // (2 * self.settings.labelled_batch))  # it counts image by image
            self.contrast = PixelContrastLoss(0.1, **shared | {"samples_per_class": of_an_image}, reduction="class")
        elif hardness == "published":
            self.contrast = RegionPHPCLoss.published(region_size=None, **shared, reduction="class")
        else:
            self.contrast = RegionPHPCLoss(None, hardness=hardness, **shared, reduction="class")
        self.queue = EmbeddingQueue(classes, SIZE, dim) if memory else None
        self.fresh: tuple[Tensor, Tensor] | None = None  # what the queue takes after the step

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        labels, pseudo = batch["labels"], self.pseudo_labels(outputs.teacher_logits)
        of_unlabelled = pseudo if self.pixels == "pseudo" else torch.full_like(pseudo, IGNORED)
        known = torch.cat([labels, of_unlabelled])[:, :: self.stride, :: self.stride]
        embeddings = self.projector(outputs.features)
        if isinstance(self.contrast, PixelContrastLoss):
            predictions = outputs.logits.detach().argmax(1)[:, :: self.stride, :: self.stride] if self.hard else None
            contrast = self.contrast(embeddings, known, predictions, self.queue)
        else:
            contrast = self.contrast(embeddings, known)
        self.fresh = (embeddings.detach(), known)
        self.log("method/contrast", contrast)
        return confident_cross_entropy(outputs.logits[len(labels) :], pseudo) + self.weight * contrast

    def after_step(self) -> None:
        if self.queue is not None and self.fresh is not None:
            self.queue.enqueue(*self.fresh, samples_per_class=32)

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = list(self.projector.parameters())
        (whole,) = super().parameter_groups()
        body = [p for p in whole["params"] if not any(p is own for own in head)]
        return [whole | {"params": body}, {"params": head, "lr": self.head_lr * whole["lr"]}]
