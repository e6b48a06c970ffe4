"""What stands between a network and a contrastive loss: a projection head, and a tap for an inner layer's features."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["FeatureTap", "ProjectionHead"]

_POINTWISE: dict[int, type[nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ProjectionHead(nn.Module):
    """Two pointwise layers from features to embeddings: z = W2 relu(W1 x + b1) + b2, at every pixel alone.

    The contrastive loss is taken on z and the head thrown away after training: what the loss makes invariant is then
    lost in z and not in x (Chen et al., SimCLR, ICML 2020). The output is not normalised, because the losses
    normalise (in one pass with their gather, and at full precision). There is no batch normalisation, so a pixel's
    embedding depends on that pixel alone, at any batch size, in training and evaluation alike; the papers that use one
    put `nn.BatchNorm2d` between the first two layers, which is a three-line `nn.Sequential` for who wants it.

    Args:
        in_channels: channels C of the features.
        dim: length D of an embedding.
        hidden: channels of the inner layer; default `in_channels`.
        spatial_dims: 0 for vectors, else the number of spatial axes (1, 2, 3).

    Shapes: x [B, C, *spatial] -> [B, D, *spatial]; with spatial_dims = 0, [..., C] -> [..., D].

    Raises:
        ValueError: a size below 1, spatial_dims not among 0, 1, 2, 3, or features of other than so many axes.
    """

    def __init__(self, in_channels: int, dim: int = 128, hidden: int | None = None, spatial_dims: int = 2) -> None:
        super().__init__()
        hidden = in_channels if hidden is None else hidden
        for name, value in (("in_channels", in_channels), ("dim", dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if spatial_dims not in _POINTWISE:
            raise ValueError(f"spatial_dims must be 0, 1, 2 or 3, got {spatial_dims}")
        self.spatial_dims = spatial_dims
        layer, size = _POINTWISE[spatial_dims], (1,) if spatial_dims else ()  # kernel size 1
        self.layers = nn.Sequential(layer(in_channels, hidden, *size), nn.ReLU(), layer(hidden, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions would take features of one axis less for one image without a batch axis.
        if self.spatial_dims and x.dim() != self.spatial_dims + 2:
            axes = ", ".join("DHW"[-self.spatial_dims :])
            raise ValueError(f"spatial_dims={self.spatial_dims} needs features [B, C, {axes}], got {tuple(x.shape)}")
        return self.layers(x)


class FeatureTap(nn.Module):
    """A network that also returns what one of its layers computed: `output, features = tapped(x)`.

        tapped = FeatureTap(network, "decoder.up3")
        logits, features = tapped(images)
        loss = cross_entropy(logits, labels) + criterion(head(features), labels)

    `features` is whatever the layer returned in this very call, joined to the graph (not detached, in the layer's
    dtype: half precision under autocast). If the layer runs several times in a call (shared weights), the last run
    counts; if the next layer works in place (`nn.ReLU(inplace=True)`), the features are what it made of them. Names
    are those of `network.named_modules()`.

    * The network is kept as `tapped.model`, the same object: it can be called, trained and saved as before, its
      `state_dict` is unchanged, and `tapped.model.load_state_dict(checkpoint)` loads its checkpoints. The tap has no
      parameters: keys of `tapped.state_dict()` are the network's behind "model.".
    * Distributed: `DistributedDataParallel(FeatureTap(network, name))`, so that the features are part of the output
      that DDP sees. `nn.DataParallel` and `torch.compile(..., fullgraph=True)` wrap it in the same way; copies and
      pickles work. Nothing is kept between calls.
    * Under reentrant activation checkpointing (`use_reentrant=True`) an inner layer's features have no gradient;
      use the non-reentrant kind, or tap a layer that is not inside the checkpoint.
    * Two threads must not call one tap at the same time (replicas of `nn.DataParallel` are separate, and safe).

    Args:
        model: any network. Arguments of a call are handed on to it.
        layer: dotted name of one of its layers.

    Raises:
        TypeError: the layer is no name. ValueError: the model has no such layer; the message names those it has.
        RuntimeError, in a call: the layer did not run.
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
        # The features pass through an attribute of the layer itself: a replica's layer is another object than the
        # original's, so each call finds its own. One attribute per tap, as a layer may be tapped twice.
        number = 0
        while hasattr(modules[layer], f"_tapped_output_{number}"):
            number += 1
        self._slot = f"_tapped_output_{number}"
        setattr(modules[layer], self._slot, None)
        modules[layer].register_forward_hook(partial(_keep_output, self._slot))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        layer = self.model.get_submodule(self.layer)
        # Only between these two lines does the hook keep anything: calls of the bare model, and layers run again in
        # the backward pass by activation checkpointing, leave no tensor behind.
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
    """Forward hook. A function of the module, not a closure, so that the network can be pickled."""
    if getattr(layer, slot) is not None:
        setattr(layer, slot, (output,))  # in a tuple: a bare Parameter or module would be registered


def _no_such_layer(layer: str, names: list[str]) -> str:
    close = difflib.get_close_matches(layer, names, n=3)
    shown = close + [name for name in names if name not in close]
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return f"the model has no layer {layer!r}; it has {', '.join(shown[:50]) or 'none'}{more}"
