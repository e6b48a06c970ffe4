"""The one form in which every data source hands over its images: 2-D slices with their subject, plane and part."""

from dataclasses import dataclass, field, replace

from torch import Tensor

PARTS = ("train", "val", "test")


class DataError(Exception):
    """Input that cannot be used. The message is one line that names the file; the trainer then exits with 2."""


@dataclass
class Slices:
    """All slices of a data set, each normalised to mean 0 and standard deviation 1 where it was read.

    images [N, C, H, W] float32 (H to the right of a picture, W upwards, as NIfTI has its axes) and labels [N, H, W]
    uint8 (class ids from 0); per slice its subject, its id
    "subject/plane" and its plane (slices of one plane look alike across subjects, so they are no negatives of each
    other) and zone (part of the body reported apart; "" where there is none). `parts` gives each subject's part.
    `stored`: each slice's sides before it was padded on both sides to the size of all (None: none was padded).
    """

    images: Tensor
    labels: Tensor
    subjects: list[str]
    ids: list[str]
    planes: Tensor
    zones: list[str]
    parts: dict[str, str]
    classes: tuple[str, ...]
    source: dict = field(default_factory=dict)
    stored: list[tuple[int, ...]] | None = None
    noun = "slices"

    def __post_init__(self) -> None:
        count = len(self.images)
        if not all(len(column) == count for column in (self.labels, self.subjects, self.ids, self.planes, self.zones)):
            raise ValueError("every slice needs an image, a label, a subject, an id, a plane and a zone")
        if self.stored is not None and len(self.stored) != count:
            raise ValueError("every slice needs its stored sides, or none has them")
        if len(set(self.ids)) != count:
            raise ValueError("slice ids must be unique")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return len(self.images[0])

    @property
    def size(self) -> tuple[int, ...]:
        """The sides of what a network sees at once, two or three."""
        return tuple(self.images.shape[2:])

    def take(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """The images and labels at these positions."""
        return self.images[positions], self.labels[positions]

    def unpadded(self, maps: Tensor | list[Tensor], positions: list[int]) -> list[Tensor]:
        """Of one map [..., *sides] for each of these positions what is no padding."""
        if self.stored is None:
            return list(maps)
        inside = []
        for map_, i in zip(maps, positions, strict=True):
            sides = map_.shape[map_.ndim - len(self.stored[i]) :]
            begins = [(side - own) // 2 for side, own in zip(sides, self.stored[i], strict=True)]
            spans = (slice(begin, begin + own) for begin, own in zip(begins, self.stored[i], strict=True))
            inside.append(map_[(..., *spans)])
        return inside

    def truth(self, positions: list[int]) -> list[Tensor]:
        """The labels at these positions without padding: what predictions are compared with."""
        return self.unpadded(self.take(positions)[1], positions)

    def select(self, positions: list[int], parts: dict[str, str]) -> "Slices":
        """These positions alone, their subjects in these parts."""
        images, labels = self.take(positions)
        names = ("subjects", "ids", "zones", *(("stored",) if self.stored is not None else ()))
        columns = {name: [getattr(self, name)[i] for i in positions] for name in names}
        return replace(self, images=images, labels=labels, planes=self.planes[positions], parts=parts, **columns)

    def of_part(self, part: str) -> list[int]:
        """The positions of one part's slices."""
        return [i for i, subject in enumerate(self.subjects) if self.parts[subject] == part]

    def has_foreground(self) -> Tensor:
        """[N] bool: whether a slice holds any pixel that is not background."""
        return (self.labels > 0).flatten(1).any(1)
