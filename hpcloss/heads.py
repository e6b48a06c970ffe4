"""A projection head, and a tap for the features of an inner layer of a network."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["FeatureTap", "ProjectionHead"]

_POINTWISE: dict[int, type[nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ProjectionHead(nn.Module):
    """Two pointwise layers from features to embeddings.

        z = W₂ relu( W₁ x + b₁ ) + b₂      at every pixel

    The contrastive loss is computed on z. Discard the head after training: information that the loss removes is then
    missing in z and still in x (Chen et al., SimCLR, ICML 2020). The output is not normalised, because the losses
    normalise. There is no batch normalisation: the embedding of a pixel depends on that pixel alone, in training and in
    evaluation.

    Args:
        in_channels: Channels C of the features.
        dim: Channels D of an embedding.
        hidden: Channels of the inner layer. None: `in_channels`.
        spatial_dims: Number of spatial axes: 1, 2 or 3; 0 for vectors.

    Raises:
        ValueError: A size is below 1, or `spatial_dims` is not 0, 1, 2 or 3.

    Examples:
        >>> import torch, hpcloss
        >>> head = hpcloss.ProjectionHead(in_channels=32, dim=64)
        >>> head(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, in_channels: int, dim: int = 128, hidden: int | None = None, spatial_dims: int = 2) -> None:
        super().__init__()
        hidden = in_channels if hidden is None else hidden
        for name, value in (("in_channels", in_channels), ("dim", dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if spatial_dims not in _POINTWISE:
            raise ValueError(f"spatial_dims must be 0, 1, 2 or 3, got {spatial_dims}")
        self.in_channels, self.spatial_dims = in_channels, spatial_dims
        layer, size = _POINTWISE[spatial_dims], (1,) if spatial_dims else ()  # kernel size 1
        self.layers = nn.Sequential(layer(in_channels, hidden, *size), nn.ReLU(), layer(hidden, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        # A convolution takes features with one axis less as one image without a batch axis.
        """Compute the embeddings.

        Args:
            x: `[B, C, *S]`, or `[..., C]` with `spatial_dims=0`.

        Returns:
            `[B, D, *S]`, or `[..., D]`.

        Raises:
            ValueError: x has another number of axes or channels.
        """
        if self.spatial_dims and x.dim() != self.spatial_dims + 2:
            axes = ", ".join("DHW"[-self.spatial_dims :])
            raise ValueError(f"spatial_dims={self.spatial_dims} needs features [B, C, {axes}], got {tuple(x.shape)}")
        channels = x.shape[1 if self.spatial_dims else -1]
        if channels != self.in_channels:
            raise ValueError(f"features must have in_channels={self.in_channels} channels, got {channels}")
        return self.layers(x)


class FeatureTap(nn.Module):
    """A network that also returns the output of one of its layers.

    `output, features = tapped(x)`. The features are joined to the graph and keep the layer's dtype (half precision
    under autocast).

    * The network is `tapped.model`, the same object, and can be used and saved as before. The tap has no parameters;
      keys of `tapped.state_dict()` begin with "model.".
    * If the layer runs several times in a call, the last output is returned. If the next layer works in place, the
      features are its result.
    * Wrap the tap, not the network: `DistributedDataParallel(FeatureTap(...))`, `nn.DataParallel` and `torch.compile`
      see the features as an output. Copies and pickles work.
    * Reentrant activation checkpointing (`use_reentrant=True`) gives inner features no gradient. Use the other kind.
    * Two threads must not call one tap at the same time. Replicas of `nn.DataParallel` are separate.

    Args:
        model: Any network.
        layer: Name of the layer, as in `model.named_modules()`, for example "decoder.up3".

    Raises:
        TypeError: `layer` is not a string.
        ValueError: The model has no such layer. The message names its layers.

    Examples:
        >>> import torch, hpcloss
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> logits, features = hpcloss.FeatureTap(network, "1")(torch.randn(2, 1, 16, 16))
        >>> logits.shape, features.shape
        (torch.Size([2, 4, 14, 14]), torch.Size([2, 8, 14, 14]))
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        if not isinstance(layer, str):
            raise TypeError(f"layer must be the name of a layer, got {layer!r}")
        modules = dict(model.named_modules(remove_duplicate=False))
        if layer == "" or layer not in modules:
            raise ValueError(_no_such_layer(layer, [name for name in modules if name]))
        self.model = model
        self.layer = layer
        # The features pass through an attribute of the layer itself. A replica has its own layer, so each call finds
        # its own features. There is one attribute per tap, because a layer may be tapped twice.
        number = 0
        while hasattr(modules[layer], f"_tapped_output_{number}"):
            number += 1
        self._slot = f"_tapped_output_{number}"
        setattr(modules[layer], self._slot, None)
        modules[layer].register_forward_hook(partial(_keep_output, self._slot))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Call the network.

        Args:
            *args: Arguments of the network.
            **kwargs: Keyword arguments of the network.

        Returns:
            The output of the network, and the output of the layer in this call.

        Raises:
            RuntimeError: The layer did not run.
        """
        layer = self.model.get_submodule(self.layer)
        # The hook keeps a tensor between these two lines only. Calls of the bare model, and layers that activation
        # checkpointing runs again in backward, leave no tensor behind.
        setattr(layer, self._slot, ())
        try:
            output = self.model(*args, **kwargs)
            kept = getattr(layer, self._slot)
        finally:
            setattr(layer, self._slot, None)
        if not kept:
            raise RuntimeError(f"layer {self.layer!r} did not run in this call of {type(self.model).__name__}")
        return output, kept[0]

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}"


def _keep_output(slot: str, layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook. A function of the module, because a closure would not pickle."""
    if getattr(layer, slot) is not None:
        setattr(layer, slot, (output,))  # a tuple, because a bare Parameter or module would be registered


def _no_such_layer(layer: str, names: list[str]) -> str:
    close = difflib.get_close_matches(layer, names, n=3)
    shown = close + [name for name in names if name not in close]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return f"the model has no layer {layer!r}; it has {', '.join(shown[:50]) or 'none'}{more}"
