"""Confident pseudo-labels on strong views (FixMatch: Sohn et al., NeurIPS 2020, arXiv 2001.07685)."""

import torch.nn.functional as F
from torch import Tensor

from examples.batches import Batch
from examples.methods.mean_teacher import IGNORED, MeanTeacher, Outputs


class FixMatch(MeanTeacher):
    """CE + Dice on labels; on unlabelled images the classes of a weak view are the labels of a strong one.

        L_u = mean over pixels of 1[max_c p_c > confidence] · CE(f(strong), argmax_c p_c),    p = softmax f'(weak)

    Difference: f' is the averaged network, not the network itself.
    """

    def unlabelled_loss(self, batch: Batch, outputs: Outputs) -> Tensor:
        labels = self.pseudo_labels(outputs.teacher_logits)
        return confident_cross_entropy(outputs.logits[len(batch["labels"]) :], labels)


def confident_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, averaged over all pixels: those that are `IGNORED` count as 0."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()
