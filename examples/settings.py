"""Every number of a run. The defaults are those of the built-in demonstration on two CPU cores (about 5 minutes)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Chosen on the validation subjects; the test subjects were not looked at. Batch sizes count images per step."""

    iterations: tuple[int, int, int] = (100, 250, 500)
    features: tuple[int, ...] = (16, 16, 32, 64, 128, 16)  # channels of the U-Net, the last at full resolution
    crop: tuple[int, ...] = (64, 64)  # of volumes three sides, the patch
    augmentation: str = "monai"  # image by image; "torch": drawn for a batch at once, simpler and ten times as fast
    image_batch: int = 24  # stage 1: two crops of each
    pixel_batch: int = 6  # stage 2: two intensity views of each
    labelled_batch: int = 3  # stage 3: two intensity views of each, and of as many unlabelled ones
    image_lr: float = 1e-3
    pixel_lr: float = 2e-3
    pretrained_lr: float = 4e-3  # stage 3's body; the fresh head learns `head_lr_factor` times as fast
    scratch_lr: float = 4e-3  # the supervised baselines
    head_lr_factor: float = 8.0
    weight_decay: float = 1e-2
    embedding_dim: int = 64
    region_size: int = 16
    samples_per_class: int = 32  # of each class in each region: 128 pixels a region with four classes
    ema: float = 0.97
    confidence: float = 0.9  # pseudo-labels below it do not count
    ramp: float = 0.3  # share of stage 3 over which the unlabelled terms grow to their weights
    pseudo_weight: float = 1.0
    output_weight: float = 0.1
    consistency_weight: float = 10.0  # the mean teacher of the comparison
    embedding_weight: float = 0.1
    validate_every: int = 100
    probe_iterations: int = 150
    checkpoint_every: int = 25  # steps; a killed run loses at most these
    devices: int = 1


# For volumes, whose patches of 48^3 hold as many voxels as 27 crops of 64^2 pixels.
VOLUME_BATCHES = {"image_batch": 6, "pixel_batch": 2, "labelled_batch": 1}
