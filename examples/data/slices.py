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
    noun = "slices"

    def __post_init__(self) -> None:
        count = len(self.images)
        if not all(len(column) == count for column in (self.labels, self.subjects, self.ids, self.planes, self.zones)):
            raise ValueError("every slice needs an image, a label, a subject, an id, a plane and a zone")
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

    def select(self, positions: list[int], parts: dict[str, str]) -> "Slices":
        """These positions alone, their subjects in these parts."""
        images, labels = self.take(positions)
        columns = {name: [getattr(self, name)[i] for i in positions] for name in ("subjects", "ids", "zones")}
        return replace(self, images=images, labels=labels, planes=self.planes[positions], parts=parts, **columns)

    def of_part(self, part: str) -> list[int]:
        """The positions of one part's slices."""
        return [i for i, subject in enumerate(self.subjects) if self.parts[subject] == part]

    def has_foreground(self) -> Tensor:
        """[N] bool: whether a slice holds any pixel that is not background."""
        return (self.labels > 0).flatten(1).any(1)
