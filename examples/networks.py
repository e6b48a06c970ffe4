"""The U-Net (MONAI's, as it is), its encoder alone, and the exchange of decoder features between two flows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

BOTTLENECK = "down_4"
DECODER = ("upcat_4", "upcat_3", "upcat_2", "upcat_1")
LAST = DECODER[-1]  # its output is what the pixel losses and the linear head see
HEAD = "final_conv"
STRIDE = 16  # sides of an input must be multiples of it
SMALLEST = 32  # and at least this: InstanceNorm needs more than one pixel at the bottleneck


def build_network(in_channels: int, classes: int, features: tuple[int, ...], dims: int = 2) -> BasicUNet:
    """A small U-Net with InstanceNorm; the last decoder block has features[5] channels at full resolution."""
    return BasicUNet(
        spatial_dims=dims,
        in_channels=in_channels,
        out_channels=classes,
        features=features,
        act=("LeakyReLU", {"negative_slope": 0.1, "inplace": True}),
        norm=("instance", {"affine": True}),
    )


def width_of(layer: str, features: tuple[int, ...]) -> int:
    """The channels that a block of the decoder hands on."""
    return features[5] if layer == LAST else features[int(layer[-1]) - 1]


def encode(network: BasicUNet, images: Tensor) -> Tensor:
    """The bottleneck's features, without paying for the decoder."""
    x = network.conv_0(images)
    for block in (network.down_1, network.down_2, network.down_3, network.down_4):
        x = block(x)
    return x


class ImageProjector(nn.Module):
    """Mean and max over the bottleneck, then an MLP with BatchNorm: [N, C, *spatial] to [N, dim].

    With InstanceNorm and mean pooling alone every image has the same mean and the loss stays at chance; the maximum
    and the BatchNorm prevent that.
    """

    def __init__(self, channels: int, dim: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * channels, 128), nn.BatchNorm1d(128), nn.ReLU(inplace=True), nn.Linear(128, dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        spatial = tuple(range(2, features.ndim))
        return self.layers(torch.cat([features.mean(spatial), features.amax(spatial)], 1))


def swap_halves(features: Tensor) -> Tensor:
    """For a batch of two flows [a; b]: the lower halves of the maps change places (d^a = M d^a + (1 - M) d^b)."""
    a, b = features.chunk(2)
    half = features.shape[2] // 2
    return torch.cat([torch.cat([a[:, :, :half], b[:, :, half:]], 2), torch.cat([b[:, :, :half], a[:, :, half:]], 2)])


@contextmanager
def feature_swap(network: BasicUNet) -> Iterator[None]:
    """Inside it the batch is two flows of the same images and every decoder block hands on swapped halves.

    Both flows share their geometry, so the swapped maps keep their labels (Tang et al., third stage).
    """
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda module, args, output: swap_halves(output))
        for name in DECODER
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_body(network: BasicUNet, state: dict[str, Tensor]) -> None:
    """Copies every layer but the linear head, strictly: a name that does not fit is an error, not a silent skip."""
    own = network.state_dict()
    body = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    network.load_state_dict({**own, **body})
