"""Dice and 95 % Hausdorff distance by MONAI on whole volumes, per class, in per cent and in mm.

A class that neither the truth nor the prediction of a volume holds is not counted there. One that only one of them
holds has Dice 0 and the volume's diagonal as its distance.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor

from examples.data.slices import Slices

MEASURES = ("dice", "hd95")


def volume_scores(prediction: Tensor, truth: Tensor, classes: int, spacing: tuple[float, ...] | None) -> Tensor:
    """[2, classes - 1]: Dice and HD95 of one volume's class ids [H, W, Z]; distances are NaN without `spacing` (mm)."""
    ours, theirs = (F.one_hot(ids.long(), classes).movedim(-1, 0)[None, 1:] for ids in (prediction, truth))
    in_ours, in_theirs = ours.flatten(2).any(2)[0], theirs.flatten(2).any(2)[0]
    both, either = in_ours & in_theirs, in_ours | in_theirs
    scores = torch.full((2, classes - 1), torch.nan)
    scores[0, either] = 0.0
    if spacing is not None:
        scores[1, either] = math.dist([0] * truth.ndim, [n * mm for n, mm in zip(truth.shape, spacing, strict=True)])
    if both.any():
        ours, theirs = ours[:, both], theirs[:, both]
        scores[0, both] = 100 * compute_dice(ours, theirs)[0].float()
        if spacing is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 hands itself an argument it deprecates
                distance = compute_hausdorff_distance(
                    ours, theirs, include_background=True, percentile=95, spacing=[float(mm) for mm in spacing]
                )
            scores[1, both] = distance[0].float()
    return scores


def volume_table(prediction: list[Tensor], slices: Slices, positions: list[int]) -> dict[str, dict[str, dict]]:
    """{"dice" and "hd95": {zone: {class: mean over volumes, "mean": of the classes}}}, zone "all" first.

    `prediction`: what `segment` gives. A volume is the slices whose ids share what stands before "/"; its zone is
    theirs. None where nothing counts, and for every distance where the source names no "spacing_mm": {volume: mm along
    each axis, between slices last}.
    """
    spacing, truth = slices.source.get("spacing_mm", {}), slices.truth(positions)
    volumes: dict[tuple[str, str], list[int]] = {}
    for row, i in enumerate(positions):
        volumes.setdefault((slices.zones[i], slices.ids[i].rsplit("/", 1)[0]), []).append(row)
    scores = {
        key: volume_scores(
            *(torch.stack([maps[row] for row in rows], -1) for maps in (prediction, truth)),
            len(slices.classes),
            spacing.get(key[1]),
        )
        for key, rows in volumes.items()
    }
    table: dict[str, dict[str, dict]] = {measure: {} for measure in MEASURES}
    for zone in ["all", *sorted({zone for zone, _ in volumes} - {""})]:
        chosen = torch.stack([value for (where, _), value in scores.items() if zone in ("all", where)])
        for measure, per_class in zip(MEASURES, chosen.nanmean(0), strict=True):
            values = dict(zip(slices.classes[1:], per_class.tolist(), strict=True))
            values["mean"] = per_class.nanmean().item()
            table[measure][zone] = {name: None if math.isnan(v) else round(v, 3) for name, v in values.items()}
    return table
