"""The denoiser and the classifier (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs").

Attribute names are those of the published checkpoints; shapes are (B, C, H, W).
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from guided_diffusion.networks.layers import (
    GroupNorm32,
    PointwiseConv,
    attention,
    downsample,
    timestep_embedding,
    upsample,
    zeroed,
)
from guided_diffusion.networks.params import ClassifierParams, UNetParams


class ResBlock(nn.Module):
    """Two convolutions, told the time by a scale and a shift, around a skip connection."""

    def __init__(
        self,
        p: UNetParams,
        channels: int,
        out_channels: int | None = None,
        resample: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        width = out_channels or channels
        self.use_scale_shift_norm = p.use_scale_shift_norm
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1)
        )
        emb_width = 2 * width if p.use_scale_shift_norm else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(p.emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(width),
            nn.SiLU(),
            nn.Dropout(p.dropout),
            zeroed(nn.Conv2d(width, width, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        emb = self.emb_layers(emb)
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            h = norm(h, *emb.chunk(2, dim=1))
        else:
            h = norm(h.add_(emb.to(h.dtype)[:, :, None, None]))
        for layer in rest:
            h = layer(h)
        return h.add_(self.skip_connection(self.resample(x)))  # last, since it may be the larger


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, around a skip connection."""

    def __init__(self, p: UNetParams, channels: int, num_heads: int):
        super().__init__()
        per_head = p.num_head_channels
        self.num_heads = num_heads if per_head == -1 else channels // per_head
        self.heads_first = not p.use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj_out = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        tokens = attention(self.qkv(tokens), self.num_heads, self.heads_first)
        return self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:]).add_(x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(upsample(x))


def picture_scale(layer: nn.Module) -> float:
    """How a layer of a block changes the side of the pictures: 2, 1/2 or 1 times."""
    resample = layer.resample if isinstance(layer, ResBlock) else None
    if resample is upsample or isinstance(layer, Upsample):
        return 2
    return 0.5 if resample is downsample or isinstance(layer, Downsample) else 1


class Block(nn.Sequential):
    """Layers in a row, of which the residual ones are told the time."""

    def __init__(self, *layers: nn.Module, use_checkpoint: bool = False):
        super().__init__(*layers)
        self.use_checkpoint = use_checkpoint

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, use_reentrant=False)
        return self._run(x, emb)

    def _run(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class TimedNetwork(nn.Module):
    """What denoiser and classifier share: the clock, the way down, the middle.

    The convolutions of the blocks may run in half precision (`convert_blocks`); norms, softmax,
    embeddings and the output layer stay in fp32.
    """

    def __init__(self, p: UNetParams):
        super().__init__()
        self.params = p
        self.blocks_dtype = torch.float32
        self.time_embed = nn.Sequential(
            nn.Linear(p.model_channels, p.emb_channels),
            nn.SiLU(),
            nn.Linear(p.emb_channels, p.emb_channels),
        )
        self.input_blocks = nn.ModuleList(_input_blocks(p))
        width = p.widths[-1]
        self.middle_block = Block(
            ResBlock(p, width),
            AttentionBlock(p, width, p.num_heads),
            ResBlock(p, width),
            use_checkpoint=p.use_checkpoint,
        )

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        return self.time_embed(timestep_embedding(t, self.params.model_channels))

    def blocks(self) -> Iterator[Block]:
        yield from self.input_blocks
        yield self.middle_block

    def convert_blocks(self, dtype: torch.dtype) -> None:
        """Run the convolutions of the blocks, those of the attention included, in this type."""
        self.blocks_dtype = dtype
        for block in self.blocks():
            for module in block.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)


class UNet(TimedNetwork):
    """Predicts the noise in x_t (or x_0), and optionally its variance, from x_t and t."""

    def __init__(self, p: UNetParams):
        super().__init__(p)
        if p.num_classes is not None:
            self.label_emb = nn.Embedding(p.num_classes, p.emb_channels)
        self.output_blocks = nn.ModuleList(_output_blocks(p))
        self.out = nn.Sequential(
            GroupNorm32(p.widths[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(p.widths[0], p.out_channels, 3, padding=1)),
        )

    def blocks(self) -> Iterator[Block]:
        yield from super().blocks()
        yield from self.output_blocks

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (B, in_channels, H, W), about [-1, 1]. t: (B,) steps of the base process.
        y: (B,) classes, for a class-conditional network and only for it, else ValueError.
        Returns (B, out_channels, H, W).
        """
        if (y is None) != (self.params.num_classes is None):
            raise ValueError("y must be given to class-conditional networks, and to no others")
        emb = self.embed(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.blocks_dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # and so, the old one is given up
            h = block(h, emb)
        return self.out(h.to(x.dtype))


class Classifier(TimedNetwork):
    """Class logits of a noisy image: the encoder half of a U-Net and a pool."""

    def __init__(self, p: ClassifierParams):
        encoder = p.encoder
        super().__init__(encoder)
        self.pool = p.pool
        side = encoder.image_size // 2 ** (len(encoder.channel_mult) - 1)
        block_widths = [_out_width(block) for block in self.blocks()]
        make_pool = _POOLS[p.pool]
        self.out = make_pool(encoder, encoder.widths[-1], side, sum(block_widths), p.num_classes)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). t: (B,) steps of the base process. Returns (B, num_classes) logits."""
        emb = self.embed(t)
        h = x.to(self.blocks_dtype)
        features = []
        for block in self.blocks():
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                features.append(h.to(x.dtype).mean(dim=(2, 3)))
        return self.out(torch.cat(features, dim=1) if features else h.to(x.dtype))


class AttentionPool(nn.Module):
    """Attention of the mean over all pixels; heads of `num_head_channels` channels."""

    def __init__(self, side: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.num_heads = channels // head_channels
        tokens = side**2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens) / channels**0.5)
        self.qkv_proj = PointwiseConv(channels, 3 * channels)
        self.c_proj = PointwiseConv(channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1)
        tokens = tokens + self.positional_embedding.T
        tokens = attention(self.qkv_proj(tokens), self.num_heads, heads_first=False)
        return self.c_proj(tokens[:, 0])


def _attention_pool(p: UNetParams, width: int, side: int, _: int, classes: int) -> nn.Sequential:
    pool = AttentionPool(side, width, p.num_head_channels, classes)
    return nn.Sequential(GroupNorm32(width), nn.SiLU(), pool)


def _adaptive_pool(
    _p: UNetParams, width: int, _side: int, _features: int, classes: int
) -> nn.Sequential:
    return nn.Sequential(
        GroupNorm32(width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        zeroed(nn.Conv2d(width, classes, 1)),
        nn.Flatten(),
    )


def _spatial_pool(
    _p: UNetParams, _width: int, _side: int, features: int, classes: int
) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, classes))


def _spatial_v2_pool(
    _p: UNetParams, _width: int, _side: int, features: int, classes: int
) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 2048), GroupNorm32(2048), nn.SiLU(), nn.Linear(2048, classes)
    )


_POOLS = {
    "attention": _attention_pool,
    "adaptive": _adaptive_pool,
    "spatial": _spatial_pool,
    "spatial_v2": _spatial_v2_pool,
}


def _out_width(block: Block) -> int:
    """Channels that a block puts out: those of its last convolution."""
    return [m.out_channels for m in block.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))][-1]


def _input_blocks(p: UNetParams) -> Iterator[Block]:
    """The way down: levels from the finest, each but the last ending in a downsampling block."""
    width, rate = p.widths[0], 1
    yield Block(nn.Conv2d(p.in_channels, width, 3, padding=1))
    for level, level_width in enumerate(p.widths):
        for _ in range(p.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(p, width, level_width)]
            width = level_width
            if p.attends(rate):
                layers.append(AttentionBlock(p, width, p.num_heads))
            yield Block(*layers, use_checkpoint=p.use_checkpoint)
        if level < len(p.widths) - 1:
            down = ResBlock(p, width, resample=downsample) if p.resblock_updown else None
            yield Block(down or Downsample(width), use_checkpoint=p.use_checkpoint)
            rate *= 2


def _output_blocks(p: UNetParams) -> Iterator[Block]:
    """The way up: levels from the coarsest, each but the last ending with an upsampling."""
    skip_widths = _skip_widths(p)
    width, rate = p.widths[-1], 2 ** (len(p.widths) - 1)
    num_heads = p.num_heads if p.num_heads_upsample == -1 else p.num_heads_upsample
    for level, level_width in reversed(list(enumerate(p.widths))):
        for i in range(p.num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(p, width + skip_widths.pop(), level_width)]
            width = level_width
            if p.attends(rate):
                layers.append(AttentionBlock(p, width, num_heads))
            if level > 0 and i == p.num_res_blocks:
                up = ResBlock(p, width, resample=upsample) if p.resblock_updown else None
                layers.append(up or Upsample(width))
                rate //= 2
            yield Block(*layers, use_checkpoint=p.use_checkpoint)


def _skip_widths(p: UNetParams) -> list[int]:
    """Channels that each input block hands to its output block, in the order of the input."""
    widths = [p.widths[0]]
    for level, width in enumerate(p.widths):
        widths += [width] * p.num_res_blocks
        if level < len(p.widths) - 1:
            widths.append(width)
    return widths
