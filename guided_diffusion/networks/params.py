"""The shapes of the networks, and their rules. Free of torch, so that a config is read at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_CLASSES = 1000  # of ImageNet, as published checkpoints know them

CHANNEL_MULT_BY_IMAGE_SIZE: dict[int, tuple[float, ...]] = {
    512: (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    256: (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    128: (1.0, 1.0, 2.0, 3.0, 4.0),
    64: (1.0, 2.0, 3.0, 4.0),
}


class ShapeError(ValueError):
    """A network that cannot be built. field: of its parameters; accepted: by it, in words."""

    def __init__(self, field: str, found: Any, accepted: str):
        super().__init__(f"{field}: found {found}; accepted: {accepted}")
        self.field = field
        self.accepted = accepted


@dataclass(frozen=True)
class UNetParams:
    """Shape of a denoiser. Raises ShapeError for what cannot be built."""

    image_size: int  # side of the square in pixels; decides where attention runs
    model_channels: int  # c: the width that channel_mult multiplies
    channel_mult: tuple[float, ...]  # width of each level / c, from the finest
    num_res_blocks: int  # per level
    attention_resolutions: tuple[int, ...]  # image sides at which attention runs
    out_channels: int = 3  # as in_channels: the prediction alone; twice as many: and its variance
    in_channels: int = 3
    num_heads: int = 4
    num_heads_upsample: int = -1  # -1: as num_heads
    num_head_channels: int = -1  # -1: num_heads counts; else width / this many heads
    num_classes: int | None = None  # None: unconditional
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False  # residual blocks resample, instead of a plain conv
    use_new_attention_order: bool = False  # q, k, v first, heads inside
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        accepted = f"multiples of 2**{levels - 1}, for {levels} levels of channel_mult"
        _require(self.image_size % 2 ** (levels - 1) == 0, self, "image_size", accepted)
        _require_widths(self, "model_channels", self.widths, 32)
        up = [width for level, width in enumerate(self.widths) if self.attends(2**level)]
        all_attended = [*up, self.widths[-1]]  # the middle block attends too
        if self.num_head_channels != -1:
            self._require_divisor("num_head_channels", all_attended)
        else:
            self._require_divisor("num_heads", all_attended)
            self._require_divisor("num_heads_upsample", up)

    def _require_divisor(self, field: str, widths: Sequence[int]) -> None:
        divisor = getattr(self, field)
        fits = divisor == -1 or not any(width % divisor for width in widths)
        accepted = f"divisors of {widths}, the widths of the levels with attention"
        _require(fits, self, field, accepted)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the finest."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    @property
    def emb_channels(self) -> int:
        return 4 * self.model_channels

    def attends(self, rate: int) -> bool:
        """Whether attention runs where an image's side is 1/rate of the full one."""
        return rate in [self.image_size // side for side in self.attention_resolutions]


@dataclass(frozen=True)
class ClassifierParams:
    """Shape of a noisy-image classifier. Raises ShapeError for what cannot be built."""

    image_size: int  # side of the square in pixels; decides the levels
    width: int  # that the levels multiply
    depth: int  # residual blocks per level
    attention_resolutions: tuple[int, ...]  # image sides at which attention runs
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False  # residual blocks resample, instead of a plain conv
    pool: str = "attention"  # attention | adaptive | spatial | spatial_v2
    in_channels: int = 3
    num_classes: int = NUM_CLASSES

    def __post_init__(self) -> None:
        accepted = "64, 128, 256 or 512, which the classifier can see"
        _require(self.image_size in CHANNEL_MULT_BY_IMAGE_SIZE, self, "image_size", accepted)
        widths = [int(mult * self.width) for mult in CHANNEL_MULT_BY_IMAGE_SIZE[self.image_size]]
        _require_widths(self, "width", widths, 32)
        rates = [self.image_size // side for side in self.attention_resolutions]
        attended = [width for level, width in enumerate(widths) if 2**level in rates]
        _require_widths(self, "width", [*attended, widths[-1]], _HEAD, " with attention")

    @property
    def encoder(self) -> UNetParams:
        """The way down and the middle."""
        return UNetParams(
            image_size=self.image_size,
            model_channels=self.width,
            channel_mult=CHANNEL_MULT_BY_IMAGE_SIZE[self.image_size],
            num_res_blocks=self.depth,
            attention_resolutions=self.attention_resolutions,
            in_channels=self.in_channels,
            num_head_channels=_HEAD,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
        )


_HEAD = 64  # channels of each attention head of a classifier


@dataclass(frozen=True)
class AutoencoderParams:
    """Shape of an autoencoder. Raises ShapeError for what cannot be built."""

    ch: int = 128  # the width that ch_mult multiplies, and that the encoder begins with
    ch_mult: tuple[int, ...] = (1, 2, 4)  # width of each level / ch, from the finest
    num_res_blocks: int = 2  # per level; the decoder has one more
    z_channels: int = 3  # what the encoder puts out and the decoder takes
    embed_dim: int = 3  # channels of a latent
    n_embed: int = 8192  # number of codes
    in_channels: int = 3
    out_ch: int = 3

    def __post_init__(self) -> None:
        _require(self.num_res_blocks >= 1, self, "num_res_blocks", "numbers >= 1")
        _require(all(mult >= 1 for mult in self.ch_mult), self, "ch_mult", "numbers >= 1")
        _require(_is_multiple(self.ch, 32), self, "ch", "multiples of 32")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the finest."""
        return [mult * self.ch for mult in self.ch_mult]

    @property
    def factor(self) -> int:
        """Side of a picture / side of its latent."""
        return 2 ** (len(self.ch_mult) - 1)


def _require(fits: bool, params: Any, field: str, accepted: str) -> None:
    if not fits:
        raise ShapeError(field, getattr(params, field), accepted)


def _require_widths(
    params: Any, field: str, widths: Sequence[int], divisor: int, where: str = ""
) -> None:
    accepted = f"what makes {widths}, the widths of the levels{where}, multiples of {divisor}"
    _require(all(_is_multiple(width, divisor) for width in widths), params, field, accepted)


def _is_multiple(width: int, divisor: int) -> bool:
    return width > 0 and width % divisor == 0
