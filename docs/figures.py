"""Draws what each loss pulls and pushes, through the loss itself, into docs/losses/figures: python docs/figures.py

An anchor meets keys at given cosines. The cosine of one key runs from -1 to 1, the others stay. A curve is the
derivative of the anchor's loss with respect to that one cosine, by autograd through the public loss in float64.
`curves.json` holds the numbers, and each picture the digest of its numbers. `tests/repository/test_figures.py` compares
both. Needs matplotlib, which the extra "examples" installs.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import hpcloss

FOLDER = Path(__file__).with_name("losses") / "figures"
COSINES = [k / 40 for k in range(-39, 40, 2)]
POSITIVES = (0.2, 0.5, 0.8)  # cosines of the positives that stay, where a loss takes several
NEGATIVES = (0.0,) * 256
SPREAD = (-0.4, -0.2, 0.0, 0.2, 0.4) * 50  # negatives of different cosines
COMMON = {"reduction": "none", "backend": "blockwise"}
DIM = 4

Value = Callable[
    [Tensor], Tensor
]  # the loss of the anchor, from rows [N, DIM]: the anchor, the key that moves, the others


# -------------------------------------------------------------------------------------------------------- curves


def rows_at(moving: float, others: Sequence[float]) -> Tensor:
    """The anchor, a key at the cosine `moving` and keys at those of `others`: unit rows [2 + len(others), DIM].

    The moving key has an axis of its own. So its part of the anchor's gradient can be told from that of the others.
    """
    cosines = torch.tensor([1.0, moving, *others], dtype=torch.float64)
    rows = torch.zeros(len(cosines), DIM, dtype=torch.float64)
    rows[:, 0] = cosines
    rows[1, 1] = math.sqrt(1 - moving**2)
    rows[2:, 2] = (1 - cosines[2:] ** 2).sqrt()
    return rows


def slopes(value: Value, others: Sequence[float], unit: float, of_key: bool = False) -> list[float]:
    """Derivative of the anchor's loss by the moving key's cosine, at each of COSINES, times `unit`.

    of_key: from the gradient of the key instead of the anchor's, where the anchor is also part of other keys.
    """
    found = []
    for cosine in COSINES:
        rows = rows_at(cosine, others).requires_grad_()
        (grad,) = torch.autograd.grad(value(rows), rows)
        rows, sine = rows.detach(), math.sqrt(1 - cosine**2)
        slope = grad[1] @ (rows[0] - cosine * rows[1]) / sine**2 if of_key else grad[0, 1] / sine
        found.append(unit * slope.item())
    return found


def pulls(value: Value, others: Sequence[float], unit: float, **options: bool) -> list[float]:
    return slopes(value, others, -unit, **options)


def as_map(rows: Tensor) -> Tensor:
    return rows.T.reshape(1, rows.shape[1], 1, -1)


class Panel(NamedTuple):
    title: str
    lines: dict[str, list[float]]


Figure = tuple[Panel, Panel]
ON_POSITIVE, ON_NEGATIVE = "Pull on a positive", "Push on a negative"


def with_labels(
    lines: dict[str, Callable[[Tensor, Tensor], Tensor]], temperature: float, positives: Sequence[float] = POSITIVES
) -> Figure:
    """Losses of rows and labels: one positive moves beside three, then one negative among 256."""
    panels: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for moves, negatives in ((True, NEGATIVES), (False, NEGATIVES[1:])):
        labels = torch.tensor([1, 1 if moves else 2, *[1] * len(positives), *[2] * len(negatives)])
        for name, loss in lines.items():

            def value(rows: Tensor, loss=loss, labels=labels) -> Tensor:
                return loss(rows, labels).reshape(-1)[0]

            unit = -temperature * (1 + len(positives)) if moves else temperature
            panels[moves][name] = slopes(value, (*positives, *negatives), unit)
    return Panel(ON_POSITIVE, panels[True]), Panel(ON_NEGATIVE, panels[False])


def of_views(
    lines: dict[str, tuple[torch.nn.Module, float]], negatives: Sequence[float], agreement: float = 0.5
) -> Figure:
    """Losses of two views, each with its temperature: the other view moves, then one negative.

    agreement: cosine of the anchor's views where a negative moves. The views of the other images are one and the same.
    """

    def views(own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        half = len(others) // 2
        return torch.cat([own[:1], others[:half]]), torch.cat([own[1:], others[half:]])

    pull, push = {}, {}
    for name, (loss, temperature) in lines.items():
        pull[name] = pulls(lambda rows: loss(*views(rows[:2], rows[2:]))[0], negatives, temperature)  # noqa: B023
        # The first of the others is the anchor's other view then.
        push[name] = slopes(
            lambda rows: loss(*views(rows[[0, 2]], torch.cat([rows[1:2], rows[3:]])))[0],  # noqa: B023
            (agreement, *negatives[1:]),
            temperature,
        )
    return Panel("Pull on the other view", pull), Panel(ON_NEGATIVE, push)


def region(**options) -> Callable[[Tensor, Tensor], Tensor]:
    beta = options.pop("beta", None)
    make = hpcloss.RegionPHPCLoss if beta is None else hpcloss.RegionPHPCLoss.published
    options = options if beta is None else {"beta": beta, **options}
    loss = make(region_size=None, background=None, **COMMON, **options)
    return lambda rows, labels: loss(as_map(rows), labels.view(1, 1, -1))


def region_phpc() -> Figure:
    lines = {f"hardness {h}": region(hardness=float(h)) for h in (0, 1, 2)}
    return with_labels({**lines, "published(0.9)": region(beta=0.9)}, 0.1)


def denominators() -> Figure:
    return with_labels({f'"{d}"': region(hardness=0.0, denominator=d) for d in ("own", "all", "negatives")}, 0.1)


def pixel_contrast() -> Figure:
    loss = hpcloss.PixelContrastLoss(num_classes=3, samples_per_class=None, **COMMON)

    def with_queue(size: int) -> Callable[[Tensor, Tensor], Tensor]:
        queue = hpcloss.EmbeddingQueue(num_classes=3, size=max(size, 1), dim=DIM)
        if size:
            queue.enqueue(rows_at(0.0, (0.0,) * size)[2:], torch.full((size,), 2))
        return lambda rows, labels: loss(as_map(rows), labels.view(1, 1, -1), None, queue if size else None)

    sizes = {"no queue": 0, "queue of 500": 500, "queue of 5,000": 5000}
    return with_labels({name: with_queue(size) for name, size in sizes.items()}, 0.07)


def local_contrast() -> Figure:
    """Class means at cosine 0 but for that of the anchor's class, which is at 0.9 where it does not move."""
    loss = hpcloss.LocalContrastLoss(num_classes=4, **{**COMMON, "samples_per_class": None})
    at_09 = rows_at(0.0, (0.9,))[2:]
    # Pixels of an image: the anchor and one that brings the mean of its class to where it is to be, then other classes.
    labels = torch.tensor([[1, 1, 2, 3]])
    partner = torch.tensor([1, -1])

    def image(rows: Tensor, mean: Tensor, second: Tensor) -> Tensor:
        return torch.cat([rows[:1], 2 * mean - rows[:1].detach(), second, rows[-1:]])

    def alone(rows: Tensor, mean: Tensor, second: Tensor) -> Tensor:
        return loss(as_map(image(rows, mean, second)), labels.view(1, 1, -1)).reshape(-1)[0]

    def both(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        maps = [image(rows, at_09, rows[-1:]), torch.cat([first, first, second, rows[-1:]])]
        return loss(torch.cat([as_map(one) for one in maps]), labels.view(1, 1, -1).repeat(2, 1, 1), partner).reshape(
            -1
        )[0]

    def gives(function: Callable[..., Tensor], moves: bool, other: Tensor) -> Value:
        return lambda rows: function(rows, *((rows[1:2], other) if moves else (other, rows[1:2])))

    at_0 = rows_at(0.0, (0.0,))[2:]
    return (
        Panel(
            "Pull on a mean of the own class",
            {
                # Half of the mean's own gradient is that of the pixel: the mean is over two.
                "no partner": pulls(gives(alone, True, at_0), (0.0,), 0.1, of_key=True),
                "of a partner, own at 0.9": pulls(gives(both, True, at_0), (0.0,), 0.1 * 2, of_key=True),
            },
        ),
        Panel(
            "Push on a mean of another class",
            {
                "no partner": slopes(gives(alone, False, at_09), (0.0,), 0.1, of_key=True),
                "of a partner, own at 0.9": slopes(gives(both, False, at_09), (0.0,), 0.1, of_key=True),
            },
        ),
    )


def multiscale() -> Figure:
    side, pull, push = 64, {}, {}
    for size in (16, 8, 4):
        count = (side // size) ** 2
        loss = hpcloss.MultiscaleContrastLoss(patch_size=size, backend="blockwise")

        def enlarged(patches: Tensor, size=size) -> Tensor:
            along = side // size
            maps = patches.T.reshape(1, DIM, along, along)
            return maps.repeat_interleave(size, 2).repeat_interleave(size, 3)

        def value(rows: Tensor, same: int, loss=loss, count=count, enlarged=enlarged) -> Tensor:
            """The anchor is patch 0 of branch 1, the key `same` is that patch in branch 2. The other patches of branch
            1 have no gradient here. The anchor is one of `count`, and branch 1 is half of the loss."""
            keys = torch.cat([rows[same : same + 1], rows[1:same], rows[same + 1 :]])
            first = torch.cat([rows[:1], rows[2:].detach()])[:count]
            return loss(enlarged(first), enlarged(keys.detach())) * 2 * count

        name = f"patches of {size}"
        zeros = NEGATIVES[: count - 2]
        pull[name] = pulls(lambda rows: value(rows, 1), (*zeros, 0.0), 0.1)  # noqa: B023
        push[name] = slopes(lambda rows: value(rows, 2), (0.5, *zeros), 0.1)  # noqa: B023
    return Panel("Pull on the same patch", pull), Panel("Push on another patch", push)


def prototype_contrast() -> Figure:
    options = {
        "published": {},
        "published, detached": {"detach_weights": True},
        "hardness 0": {"hardness": 0.0},
        "hardness 1, detached": {"hardness": 1.0, "detach_weights": True},
    }
    losses = {name: hpcloss.PrototypeContrastLoss(**given, **COMMON) for name, given in options.items()}
    return with_labels(losses, 0.05, (0.1, 0.2, 0.3))


def prototype_assignment() -> Figure:
    """Two pixels of a class with two prototypes, one of them at cosine 0.5. Six of other classes are at 0."""
    loss = hpcloss.PrototypeAssignmentLoss(**COMMON)
    labels = torch.zeros(1, 1, 2, dtype=torch.int64)

    def value(rows: Tensor, share: float | None) -> Tensor:
        """share: what the teacher assigns of the anchor to the moving prototype; None: that one is of another class."""
        prototypes = rows[1:].detach()
        if share is None:
            prototypes = prototypes[[1, 2, 0, *range(3, len(prototypes))]]
        # The teacher's two pixels are as far apart as two can be, or the same.
        side = prototypes[0] - prototypes[1]
        teacher = {None: (side, -side), 1.0: (side, -side), 0.0: (-side, side), 0.5: (side, side)}[share]
        features = torch.stack([rows[0], rows[0].detach()])
        found = loss(as_map(features), labels, prototypes.view(4, 2, DIM), as_map(torch.stack(teacher)))
        return found.reshape(-1)[0]

    others = (0.5, *(0.0,) * 6)
    own = {f"assigned {s:g}": pulls(lambda rows: value(rows, s), others, 0.1) for s in (1.0, 0.5, 0.0)}  # noqa: B023
    # Of the own class one prototype at 0.5, to which the teacher assigns the pixel, and one at 0.
    other = {"of another class": slopes(lambda rows: value(rows, None), others, 0.1)}
    return Panel("Pull on a prototype of the own class", own), Panel("Push on a prototype of another class", other)


def supcon() -> Figure:
    losses = {f'form="{form}"': hpcloss.SupConLoss(form=form, **COMMON) for form in ("out", "in")}
    return with_labels(losses, 0.1, (0.1, 0.2, 0.3))


def ihpc() -> Figure:
    lines = {f"hardness {h:g}": (hpcloss.IHPCLoss(hardness=float(h), **COMMON), 0.5) for h in (0, 0.5, 1)}
    lines["published(0.1)"] = (hpcloss.IHPCLoss.published(0.1, **COMMON), 0.5)
    return of_views(lines, NEGATIVES[:126], agreement=0.0)


def one_positive() -> Figure:
    temperatures = (0.07, 0.2, 0.5)
    return of_views({f"τ = {t}": (hpcloss.NTXentLoss(t, **COMMON), t) for t in temperatures}, NEGATIVES[:254])


def hard_negative_nce() -> Figure:
    weights = {"NT-Xent": (0.0, 0.0), "β = 0": (0.0, 0.1), "β = 1": (1.0, 0.1), "β = 2": (2.0, 0.1)}
    losses = {name: (hpcloss.HardNegativeNCELoss(0.5, *both, **COMMON), 0.5) for name, both in weights.items()}
    return of_views(losses, SPREAD)


FIGURES: dict[str, Callable[[], Figure]] = {
    maker.__name__: maker
    for maker in (
        region_phpc, denominators, pixel_contrast, local_contrast, multiscale, prototype_contrast,
        prototype_assignment, supcon, ihpc, one_positive, hard_negative_nce,
    )
}  # fmt: skip


def rounded(figure: Figure) -> dict[str, dict[str, list[float]]]:
    return {
        panel.title: {name: [round(y, 4) + 0.0 for y in ys] for name, ys in panel.lines.items()} for panel in figure
    }


def digest(curves: dict[str, dict[str, list[float]]]) -> str:
    """Of the numbers of one figure, as the picture holds it."""
    return hashlib.sha256(json.dumps(curves).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- drawing

COLOURS = ("#1f4e9c", "#d1632a", "#2e8b57", "#8a4fa8")
STYLE = {
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "hpcloss",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "savefig.facecolor": "white",
}


def label_places(
    lines: list[list[tuple[float, float]]], texts: Sequence[str], zero: float
) -> list[tuple[float, float]]:
    """The centre of each line's text, in [0, 1]: near its own line, far from the others, on no line and no other text.

    zero: where the axis of 0 is, which no text crosses either.
    """
    height, boxes = 0.085, []

    def distance(line: list[tuple[float, float]], x: float, y: float, width: float) -> float:
        """From a box of this width around (x, y); 0 where the line crosses it."""
        between = [(a + t * (c - a), b + t * (d - b)) for (a, b), (c, d) in zip(line, line[1:]) for t in (0, 0.5)]
        return min(math.hypot(max(abs(a - x) - width / 2, 0), max(abs(b - y) - height / 2, 0)) for a, b in between)

    for own, text in zip(lines, texts):
        width, best = 0.028 * len(text), (math.inf, 0.5, 0.5)
        for x in [k / 40 for k in range(41) if width / 2 <= k / 40 <= 1 - width / 2]:
            for y in [k / 40 for k in range(2, 40)]:
                near = distance(own, x, y, width)
                far = min([distance(other, x, y, width) for other in lines if other is not own], default=1.0)
                hit = near < 0.012 or far < 0.012 or abs(y - zero) < height / 2
                hit |= any(abs(x - a) < (width + w) / 2 + 0.02 and abs(y - b) < height for a, b, w in boxes)
                best = min(best, (100 * hit + 2 * near - min(far, 0.15), x, y))
        boxes.append((best[1], best[2], width))
    return [(x, y) for x, y, _ in boxes]


def alike(lines: dict[str, list[float]], part: float) -> list[list[str]]:
    """Names of lines that differ by at most this part of the panel's range, in groups."""
    values = [y for ys in lines.values() for y in ys]
    groups: list[list[str]] = []
    for name, ys in lines.items():
        for group in groups:
            if max(abs(a - b) for a, b in zip(ys, lines[group[0]])) <= part * (max(values) - min(values)):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def draw(curves: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The picture of one figure's numbers, which depends on nothing else."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(curves), figsize=(6.6, 2.7))
        names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
        for axis, (title, lines) in zip(axes, curves.items()):
            values = [y for ys in lines.values() for y in ys]
            low, high = min(0.0, *values), max(0.0, *values)
            low, high = low - 0.06 * (high - low), high + 0.12 * (high - low)
            axis.set(title=title, xlim=(-1, 1), ylim=(low, high), xlabel="cosine", xticks=(-1, -0.5, 0, 0.5, 1))
            axis.axhline(0, color="#888888", linewidth=0.8)
            for name, ys in lines.items():
                axis.plot(COSINES, ys, color=COLOURS[names.index(name)], linewidth=1.6)
            groups = alike(lines, 0.03)
            texts = [", ".join(group) for group in groups]
            if len(lines) > 1 and len(alike(lines, 0.12)) == 1:
                groups, texts = groups[:1], ["all alike"]
            points = [[((x + 1) / 2, (y - low) / (high - low)) for x, y in zip(COSINES, lines[g[0]])] for g in groups]
            places = label_places(points, texts, -low / (high - low)) if len(lines) > 1 else []
            for group, text, (x, y) in zip(groups, texts, places):
                colour = COLOURS[names.index(group[0])] if text != "all alike" else "#333333"
                axis.text(x, y, text, color=colour, transform=axis.transAxes, ha="center", va="center")
        figure.tight_layout()
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(curves)})
        plt.close(figure)
    text = picture.getvalue()
    text = re.sub(r"font-family: [^;]*;", "font-family: sans-serif;", text)
    text = re.sub(r"(?<![>\d])\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    text = re.sub(r"<!--.*?-->\n|^\s+", "", text, flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    curves = {name: rounded(make()) for name, make in FIGURES.items()}
    text = json.dumps({"cosines": COSINES, **curves}, indent=1)
    text = re.sub(r"\n\s+(?=[-\d\]])", " ", text).replace("[ ", "[").replace(" ]", "]")  # a line of numbers on one line
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "curves.json").write_text(text + "\n", encoding="utf-8")
    for name, of_figure in curves.items():
        draw(of_figure, FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
