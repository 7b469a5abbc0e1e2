"""Feature maps as a network's layers see them: whole, or in strips where they are large.

`Whole` and `Strips` have the same methods, so that a network is written once for both. `Whole`
does at once what it is told. `Strips` only keeps a recipe, by which any rows can be computed when
they are needed, with exactly the same result: a convolution is given the rows beyond the strip's
edges that it looks at, and a group norm has the statistics of all strips.
"""

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.networks.layers import upsample

STRIP = 2**16  # pixels
ROOM = 3 * 2**28  # numbers, 3 GiB of fp32, for what `Strips.stored_if_room` keeps

Rows = Callable[[int, int], torch.Tensor]


class Whole:
    """A feature map in memory. tensor: (B, C, H, W)."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def to(self, dtype: torch.dtype) -> "Whole":
        return Whole(self.tensor.to(dtype))

    def activated(self, norm: nn.Module, silu: nn.Module) -> "Whole":
        """Through a GroupNorm32 and the SiLU after it, or what is in their places."""
        return Whole(silu(norm(self.tensor)))

    def convolved(self, conv: nn.Module, reach: int = 1) -> "Whole":
        """reach: how many rows up and down the convolution looks; it pads by as many zeros."""
        return Whole(conv(self.tensor))

    def halved(self, conv: nn.Module) -> "Whole":
        """Through a 3×3 convolution of stride 2, after a row and a column of zeros at the end."""
        return Whole(conv(F.pad(self.tensor, (0, 1, 0, 1))))

    def doubled(self) -> "Whole":
        """Each pixel becomes a 2×2 square."""
        return Whole(upsample(self.tensor))

    def plus(self, other: "Whole") -> "Whole":
        return Whole(self.tensor + other.tensor)

    def stored(self, over: Iterable["Whole"] = ()) -> "Whole":
        return self

    def stored_if_room(self, channels: int) -> "Whole":
        return self


class Strips:
    """A feature map whose rows are computed when they are asked for; without gradients.

    rows(first, end): those from first up to, not including, end, as (B, C, end - first, W).
    held: how many numbers are kept in memory for that, for each of B. tensor: (B, C, H, W), where
    they are the map itself; None: there is only the recipe.
    """

    def __init__(
        self, height: int, width: int, rows: Rows, held: int, tensor: torch.Tensor | None = None
    ):
        self.height, self.width, self.rows = height, width, rows
        self.held, self.tensor = held, tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> "Strips":
        """A feature map in memory. x: (B, C, H, W)."""
        return cls(*x.shape[2:], lambda first, end: x[:, :, first:end], x[0].numel(), x)

    def to(self, dtype: torch.dtype) -> "Strips":
        return self._with(lambda first, end: self.rows(first, end).to(dtype))

    def activated(self, norm: nn.Module, silu: nn.Module) -> "Strips":
        """As `Whole.activated`; all rows are computed once now, for the norm's statistics.

        silu: not used, for a SiLU follows in any case, be it in a module of its own or not.
        """
        scale, shift = self._scale_and_shift(group_norm(norm))

        def rows(first: int, end: int) -> torch.Tensor:
            x = self.rows(first, end)
            return F.silu(torch.addcmul(shift, x.float(), scale).to(x.dtype), inplace=True)

        return self._with(rows)

    def convolved(self, conv: nn.Module, reach: int = 1) -> "Strips":
        """As `Whole.convolved`."""

        def rows(first: int, end: int) -> torch.Tensor:
            top, bottom = max(first - reach, 0), min(end + reach, self.height)
            # Beyond the rows given, the convolution sees zeros; what comes of them is cut off.
            return conv(self.rows(top, bottom)).narrow(2, first - top, end - first)

        return self._with(rows)

    def halved(self, conv: nn.Module) -> "Strips":
        """As `Whole.halved`."""

        def rows(first: int, end: int) -> torch.Tensor:
            bottom = min(2 * end + 1, self.height)
            x = self.rows(2 * first, bottom)
            return conv(F.pad(x, (0, 1, 0, 2 * end + 1 - bottom)))

        return Strips(self.height // 2, self.width // 2, rows, self.held)

    def doubled(self) -> "Strips":
        """As `Whole.doubled`."""

        def rows(first: int, end: int) -> torch.Tensor:
            x = self.rows(first // 2, (end + 1) // 2)
            return upsample(x).narrow(2, first % 2, end - first)

        return Strips(2 * self.height, 2 * self.width, rows, self.held)

    def plus(self, other: "Strips") -> "Strips":
        return self._with(lambda first, end: self.rows(first, end) + other.rows(first, end))

    def stored(self, over: Iterable["Strips"] = ()) -> "Strips":
        """The same map, in memory.

        over: feature maps, of which the first stored one of the same shape gives its place to this.
        The recipe may use its rows, up to two rows beyond those asked for; nothing else may use
        it afterwards.
        """
        spans = self._spans()
        start, end = next(spans)
        waiting = self.rows(start, end)
        tensor = self._place(over, waiting)
        for first, end in spans:
            rows = self.rows(first, end)
            tensor[:, :, start:first] = waiting  # now, for these rows may have needed the old ones
            start, waiting = first, rows
        tensor[:, :, start:] = waiting
        return Strips.of(tensor)

    def stored_if_room(self, channels: int) -> "Strips":
        """The same map, of so many channels; in memory if that and `held` are within ROOM.

        If not, its rows are computed anew at each use.
        """
        return self.stored() if self.held + channels * self.height * self.width <= ROOM else self

    def _place(self, over: Iterable["Strips"], rows: torch.Tensor) -> torch.Tensor:
        """Memory for a feature map with such rows, see `stored`."""
        shape = torch.Size((*rows.shape[:2], self.height, self.width))
        places = [p.tensor for p in over if p.tensor is not None and p.tensor.shape == shape]
        return places[0] if places else _room(shape, rows)

    def _with(self, rows: Rows) -> "Strips":
        return Strips(self.height, self.width, rows, self.held)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each strip."""
        step = max(STRIP // self.width, 2)  # for what `stored` says
        for first in range(0, self.height, step):
            yield first, min(first + step, self.height)

    def _scale_and_shift(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """What a group norm multiplies by and then adds, each (B, C, 1, 1)."""
        mean, variance = self._statistics(norm.num_groups)
        scale = norm.weight.view(norm.num_groups, -1) * (variance + norm.eps).rsqrt()
        shift = norm.bias.view(norm.num_groups, -1) - mean * scale
        return scale.flatten(1)[:, :, None, None], shift.flatten(1)[:, :, None, None]

    def _statistics(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each group of channels, (B, groups, 1), in fp32."""
        parts = []
        for first, end in self._spans():
            x = self.rows(first, end).float()
            mean = x.mean(dim=(2, 3), keepdim=True)
            variance = (x - mean).square_().mean(dim=(2, 3))
            share = (end - first) / self.height
            parts.append((share, mean.view(len(x), groups, -1), variance.view(len(x), groups, -1)))
        mean = sum(share * m for share, m, _ in parts).mean(dim=2, keepdim=True)
        variance = sum(share * (v + (m - mean).square()) for share, m, v in parts)
        return mean, variance.mean(dim=2, keepdim=True)


FeatureMap = Whole | Strips


def group_norm(layer: nn.Module) -> nn.GroupNorm:
    """The norm itself, or the one inside a faster layer in its place."""
    return layer if isinstance(layer, nn.GroupNorm) else layer.norm


def _room(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Memory for a feature map of this shape and of the kind of another, channels_last.

    Pieces of memory that smaller tensors have left behind go back to the system first: the C
    library keeps what is below 32 MB, and a map fits in none of them.
    """
    if like.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    kind = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, **kind, memory_format=torch.channels_last)
