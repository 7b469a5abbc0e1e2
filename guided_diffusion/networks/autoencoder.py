"""The autoencoder of latent diffusion: pictures to latents and back (Rombach et al. 2022).

Its decoder was trained on latents that are vectors of a codebook (VQ: van den Oord et al. 2017,
"Neural Discrete Representation Learning"; Esser et al. 2021, "Taming Transformers"). Attribute
names are those of the published checkpoint, below `first_stage_model.`; shapes are (B, C, H, W).
"""

from collections.abc import Iterator

import torch
from torch import nn

from guided_diffusion.networks.layers import GroupNorm32
from guided_diffusion.networks.params import AutoencoderParams
from guided_diffusion.networks.strips import FeatureMap, Strips, Whole

# Pixels of the largest picture that is not computed in strips. Of 1024×1024 strips take less than
# half the memory and about the same time, and torch's group norm of the whole loses three digits.
LARGEST_WHOLE = 2**18
EPS = 1e-6
PLACES = 256  # of a latent, whose distances to all codes are computed at a time


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder.

    Pictures of more than LARGEST_WHOLE pixels are computed one at a time and in strips, with the
    same result, so that the memory of one and a half pictures of `ch` channels will do. The
    convolutions of encoder and decoder may run in half precision (`convert_blocks`), but not the
    last ones.
    """

    def __init__(self, p: AutoencoderParams):
        super().__init__()
        self.params = p
        self.blocks_dtype = torch.float32
        self.encoder = Encoder(p)
        self.decoder = Decoder(p)
        self.quantize = Codebook(p.n_embed, p.embed_dim)
        self.quant_conv = nn.Conv2d(p.z_channels, p.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(p.embed_dim, p.z_channels, 1)

    @property
    def factor(self) -> int:
        """Side of a picture / side of its latent."""
        return self.params.factor

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents, not rounded to codes; without gradients.

        x: (B, in_channels, H, W) in [-1, 1], sides multiples of `factor`.
        Returns (B, embed_dim, H / factor, W / factor) in fp32.
        """
        return self.quant_conv(self._run(self.encoder, x, x.shape[2:].numel()))

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Pictures of the codes that are nearest to the latents; without gradients.

        z: (B, embed_dim, h, w). Returns (B, out_ch, h · factor, w · factor) in fp32, about [-1, 1].
        """
        codes = self.post_quant_conv(self.quantize(z))
        return self._run(self.decoder, codes, z.shape[2:].numel() * self.factor**2)

    def _run(self, network: nn.Module, x: torch.Tensor, pixels: int) -> torch.Tensor:
        x = x.to(self.blocks_dtype, memory_format=torch.channels_last)
        if pixels <= LARGEST_WHOLE:
            return network(Whole(x)).tensor
        return torch.cat([network(Strips.of(one)).tensor for one in x.split(1)])

    def convert_blocks(self, dtype: torch.dtype) -> None:
        """Run the convolutions of encoder and decoder, but their last ones, in this type."""
        self.blocks_dtype = dtype
        for network in (self.encoder, self.decoder):
            for module in network.modules():
                if isinstance(module, nn.Conv2d) and module is not network.conv_out:
                    module.to(dtype)

    def convolution_sides(self, side: int) -> dict[nn.Conv2d, int]:
        """The side of what each convolution gets where pictures have this side."""
        latent = side // self.factor
        sides = {self.quant_conv: latent, self.post_quant_conv: latent}
        return sides | _sides(self.encoder, side) | _sides(self.decoder, latent)


class Codebook(nn.Module):
    """The vectors that latents are rounded to."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The nearest code at each place, by Euclidean distance. z: (B, channels, h, w)."""
        places = z.float().movedim(1, -1)  # (B, h, w, channels)
        pieces = places.flatten(0, 2).split(PLACES)
        codes = self.embedding.weight.T.contiguous()
        nearest = torch.cat([_nearest(piece.T, codes) for piece in pieces])
        return self.embedding(nearest).view_as(places).movedim(-1, 1)


def _nearest(places: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """places: (channels, N); codes: (channels, n). Returns (N,): the index of each one's code."""
    distances = codes.new_zeros(places.shape[1], codes.shape[1])
    # Not through the products |z|² - 2 z·c + |c|², which lose what tells near codes apart.
    for ours, theirs in zip(places, codes, strict=True):
        differences = ours[:, None] - theirs
        distances.addcmul_(differences, differences)
    return distances.min(dim=1).indices


class ResnetBlock(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = GroupNorm32(channels, EPS)
        self.silu1 = nn.SiLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm32(out_channels, EPS)
        self.silu2 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: FeatureMap) -> FeatureMap:
        h = x.activated(self.norm1, self.silu1).convolved(self.conv1)
        h = h.stored_if_room(self.out_channels)
        y = h.activated(self.norm2, self.silu2).convolved(self.conv2)
        return y.plus(x.convolved(self.nin_shortcut, reach=0)).stored(over=(h, x))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return x.halved(self.conv).stored()


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: FeatureMap) -> FeatureMap:
        return x.doubled().convolved(self.conv).stored_if_room(self.channels)


class Encoder(nn.Module):
    def __init__(self, p: AutoencoderParams):
        super().__init__()
        self.conv_in = nn.Conv2d(p.in_channels, p.ch, 3, padding=1)
        self.down = nn.ModuleList(_down_levels(p))
        self.mid = _middle(p.widths[-1])
        self.norm_out = GroupNorm32(p.widths[-1], EPS)
        self.silu_out = nn.SiLU(inplace=True)
        self.conv_out = nn.Conv2d(p.widths[-1], p.z_channels, 3, padding=1)

    def layers(self) -> Iterator[nn.Module]:
        """Between the first and the last convolution."""
        for level in self.down:
            yield from level["block"]
            yield level["downsample"]
        yield from self.mid.values()

    def forward(self, x: FeatureMap) -> FeatureMap:
        return _through(self, x)


class Decoder(nn.Module):
    def __init__(self, p: AutoencoderParams):
        super().__init__()
        self.conv_in = nn.Conv2d(p.z_channels, p.widths[-1], 3, padding=1)
        self.mid = _middle(p.widths[-1])
        self.up = nn.ModuleList(_up_levels(p))
        self.norm_out = GroupNorm32(p.widths[0], EPS)
        self.silu_out = nn.SiLU(inplace=True)
        self.conv_out = nn.Conv2d(p.widths[0], p.out_ch, 3, padding=1)

    def layers(self) -> Iterator[nn.Module]:
        """Between the first and the last convolution."""
        yield from self.mid.values()
        for level in reversed(self.up):
            yield from level["block"]
            yield level["upsample"]

    def forward(self, x: FeatureMap) -> FeatureMap:
        return _through(self, x)


def _through(network: Encoder | Decoder, x: FeatureMap) -> FeatureMap:
    h = x.convolved(network.conv_in).stored()
    for layer in network.layers():  # one loop, so that nothing refers to what is done with
        h = layer(h)
    h = h.to(torch.float32).activated(network.norm_out, network.silu_out)
    return h.convolved(network.conv_out).stored()


def _middle(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: ResnetBlock(width, width) for name in ("block_1", "block_2")})


def _down_levels(p: AutoencoderParams) -> Iterator[nn.ModuleDict]:
    """From the finest, each but the last ending in a downsampling."""
    finer = [p.ch, *p.widths]
    for level, width in enumerate(p.widths):
        last = level == len(p.widths) - 1
        downsample = nn.Identity() if last else Downsample(width)
        blocks = _blocks(finer[level], width, p.num_res_blocks)
        yield nn.ModuleDict({"block": blocks, "downsample": downsample})


def _up_levels(p: AutoencoderParams) -> Iterator[nn.ModuleDict]:
    """From the finest, which comes last in the computation; all others end in an upsampling."""
    coarser = [*p.widths[1:], p.widths[-1]]
    for level, width in enumerate(p.widths):
        upsample = Upsample(width) if level else nn.Identity()
        blocks = _blocks(coarser[level], width, p.num_res_blocks + 1)
        yield nn.ModuleDict({"block": blocks, "upsample": upsample})


def _blocks(channels: int, width: int, number: int) -> nn.ModuleList:
    inputs = [channels] + [width] * (number - 1)
    return nn.ModuleList(ResnetBlock(channels, width) for channels in inputs)


def _sides(network: Encoder | Decoder, side: int) -> dict[nn.Conv2d, int]:
    sides = {network.conv_in: side}
    for layer in network.layers():
        if isinstance(layer, Upsample):
            side *= 2
        seen = side + 1 if isinstance(layer, Downsample) else side  # with a border at the end
        sides |= {conv: seen for conv in layer.modules() if isinstance(conv, nn.Conv2d)}
        if isinstance(layer, Downsample):
            side //= 2
    return sides | {network.conv_out: side}
