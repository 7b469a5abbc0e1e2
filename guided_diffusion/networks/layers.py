"""Layers that both networks are made of: norm, attention, timestep embedding, resampling."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm32(nn.GroupNorm):
    """Group norm with 32 groups, computed in fp32 whatever the input's type."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(32, channels, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: (B, C, ...). scale, shift: (B, C) in fp32; given, the norm is times 1 + scale, plus
        shift. Returns the shape and type of x.
        """
        h = super().forward(x.float())
        if scale is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return h.to(x.dtype)


class PointwiseConv(nn.Conv1d):
    """A 1×1 convolution of tokens (B, T, C): a matrix product with a conv1d's weight names."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens.to(self.weight.dtype), self.weight.squeeze(-1), self.bias)


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps.

    t: (B,), may be fractional. Returns (B, width) in fp32: [cos(t·f), sin(t·f)] with
    f_k = 10000^(−k/h), h = width // 2, zero-padded if the width is odd.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * k / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, width % 2))


def attention(qkv: torch.Tensor, num_heads: int, heads_first: bool) -> torch.Tensor:
    """Multi-head self-attention of tokens.

    qkv: (B, T, 3·C). heads_first: the 3·C channels are split into heads first, each head's own
    q, k, v in a row; otherwise into q, k, v first, heads inside. Returns (B, T, C).
    """
    batch, tokens, channels = qkv.shape
    if heads_first:
        q, k, v = qkv.view(batch, tokens, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    else:
        q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, C / heads)
    return out.transpose(1, 2).reshape(batch, tokens, channels // 3)


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour doubling of both sides."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x: torch.Tensor) -> torch.Tensor:
    """Mean of each 2×2 square."""
    return F.avg_pool2d(x, kernel_size=2)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters set to zero, so that training starts from the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
