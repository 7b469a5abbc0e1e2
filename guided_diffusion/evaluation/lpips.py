"""LPIPS: how different two pictures look to a network (Zhang et al. 2018).

Both pictures go through a network trained on ImageNet. At five of its layers the features of each
place are scaled to length 1 and subtracted, the squares are weighted with weights that were fitted
to what people see, and summed over channels. The distance is the mean over all places, summed over
the layers: 0 for equal pictures, higher for more different ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from guided_diffusion.checkpoints.loading import load_state_dict
from guided_diffusion.config import UserError
from guided_diffusion.evaluation.lpips_files import FOLDER, TITLES, how_to_get, missing, paths

Features = list[torch.Tensor]  # (C, h, w) of each layer, each place of length 1

# Mean and standard deviation of ImageNet's pictures, for pictures in [-1, 1].
SHIFT = torch.tensor([-0.030, -0.088, -0.188])
SCALE = torch.tensor([0.458, 0.448, 0.450])

EPSILON = 1e-10  # the length of features that are all zero


def _alexnet() -> nn.Sequential:
    """Krizhevsky 2014; the position of a layer is its number in the published file."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


def _vgg16() -> nn.Sequential:
    """Simonyan and Zisserman 2014, configuration D; numbered likewise."""
    layers: list[nn.Module] = []
    before = 3
    for level, (width, number) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        if level:
            layers.append(nn.MaxPool2d(2))
        for _ in range(number):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


# For each network its layers, the numbers of those that are compared, and the least side for them.
NETWORKS = {
    "alex": (_alexnet, (1, 4, 7, 9, 11), 31),
    "vgg": (_vgg16, (3, 8, 15, 22, 29), 16),
}


class Lpips:
    """A network, and the weights of its channels at the layers that are compared."""

    def __init__(self, name: str, layers: nn.Sequential, heads: Sequence[torch.Tensor]):
        """name: alex or vgg; heads: (C,) for each compared layer."""
        self.name = name
        self.heads = heads
        self._layers = layers
        _, self._compared, self._least_side = NETWORKS[name]

    @torch.inference_mode()
    def features(self, picture: np.ndarray) -> Features:
        """What the network sees in uint8 (H, W, 3). Raises UserError if that is too small."""
        height, width = picture.shape[:2]
        if min(height, width) < self._least_side:
            raise UserError(
                f"LPIPS ({TITLES[self.name]}) needs {self._least_side} or more pixels on each "
                f"side, found {width}x{height}; rename the folder {FOLDER} to measure without LPIPS"
            )
        x = torch.tensor(picture, dtype=torch.float32) / 127.5 - 1
        x = ((x - SHIFT) / SCALE).permute(2, 0, 1).contiguous()
        return [y / (y.norm(dim=0) + EPSILON) for y in self._activations(x[None])]

    def _activations(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for number, layer in enumerate(self._layers):
            x = layer(x)
            if number in self._compared:
                yield x[0]

    @torch.inference_mode()
    def distance(self, a: Features, b: Features) -> float:
        """LPIPS of two pictures of one size."""
        return sum(layer.mean().item() for layer in self._layer_maps(a, b))

    @torch.inference_mode()
    def distance_map(self, a: Features, b: Features, size: tuple[int, int]) -> np.ndarray:
        """LPIPS around each pixel, (H, W) = size: each layer's map, enlarged linearly, summed.

        Its mean is near `distance`, but not equal, since enlarging weights places differently.
        """
        maps = (
            functional.interpolate(layer[None, None], size, mode="bilinear", align_corners=False)
            for layer in self._layer_maps(a, b)
        )
        return sum(maps)[0, 0].numpy()

    def _layer_maps(self, a: Features, b: Features) -> Iterator[torch.Tensor]:
        """Each layer's weighted squared difference, (h, w)."""
        for of_a, of_b, head in zip(a, b, self.heads, strict=True):
            yield torch.einsum("c,chw->hw", head, (of_a - of_b).square())


def load(name: str, folder: str = FOLDER) -> Lpips:
    """LPIPS with the published weights. name: alex or vgg.

    Raises UserError if a file is missing or damaged, or holds other weights.
    """
    if name in missing(folder):
        raise UserError(f"LPIPS ({TITLES[name]}): {how_to_get(missing(folder)[name])}")
    network_path, heads_path = paths(name, folder)
    build, compared, _ = NETWORKS[name]
    with torch.device("meta"):
        layers = build()
    _fill(layers, network_path)
    widths = [layers[number - 1].out_channels for number in compared]
    return Lpips(name, layers, _read_heads(heads_path, widths))


def _fill(layers: nn.Sequential, path: str) -> None:
    """Give a network on the meta device its weights."""
    prefix = "features."  # the file has a classifier, too, which is of no use here
    shapes = {prefix + key: tuple(weight.shape) for key, weight in layers.state_dict().items()}
    weights = _read(path, shapes, prefix)
    own = {key.removeprefix(prefix): weight for key, weight in weights.items()}
    layers.load_state_dict(own, assign=True)
    layers.eval().requires_grad_(False)


def _read_heads(path: str, widths: Sequence[int]) -> list[torch.Tensor]:
    """The weights of each layer's channels, (C,)."""
    shapes = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}
    weights = _read(path, shapes)
    return [weights[key].flatten() for key in shapes]


def _read(
    path: str, shapes: dict[str, tuple[int, ...]], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """The weights of a file whose names begin with the prefix: just these names and shapes."""
    content = load_state_dict(path)
    content = content if isinstance(content, dict) else {}
    weights = {key: value for key, value in content.items() if str(key).startswith(prefix)}
    if {key: tuple(getattr(value, "shape", ())) for key, value in weights.items()} != shapes:
        raise UserError(
            f"{path}: these are not the weights of LPIPS; delete the file and run: "
            "bash download.sh lpips"
        )
    return {key: weight.to(torch.float32) for key, weight in weights.items()}
