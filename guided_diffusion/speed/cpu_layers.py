"""Layers for CPUs: which convolution is fastest where, fused norms, memory that is kept."""

import ctypes
import platform
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.checkpoints.loading import place_copies
from guided_diffusion.networks.layers import GroupNorm32
from guided_diffusion.networks.unet import Downsample, TimedNetwork, picture_scale
from guided_diffusion.speed.choice import has_matrix_units
from guided_diffusion.speed.packed import PackedConv2d

SMALL_PICTURE = 16 * 16  # pixels


def has_cpu_layers() -> bool:
    """Whether this torch and this CPU have what `CpuPlacement` builds on."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, where it is glibc.

    By default it hands them back, and the system then clears every page of the next one: about a
    sixth of an evaluation of a large network.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class FusedGroupNorm(nn.Module):
    """GroupNorm32, and SiLU after it, in fewer passes over memory; on a CPU, without gradients.

    Statistics are in fp32; what goes in and out may be in bf16.
    """

    def __init__(self, norm: GroupNorm32, silu: bool):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `GroupNorm32.forward`."""
        weight, bias = self.norm.weight, self.norm.bias
        if scale is not None and len(x) == 1:  # the norm's own weights can take them in
            weight, bias = weight * (1 + scale[0]), bias * (1 + scale[0]) + shift[0]
        # On small pictures torch's group norm is much slower in bf16 than in fp32.
        h = x.float() if x.shape[2:].numel() <= SMALL_PICTURE else x
        h = F.group_norm(h, self.norm.num_groups, weight, bias, self.norm.eps).to(x.dtype)
        if scale is not None and len(x) > 1:
            scale, shift = ((s.to(x.dtype)[:, :, None, None]) for s in (1 + scale, shift))
            torch.addcmul(shift, h, scale, out=h)
        return F.silu(h, inplace=True) if self.silu else h


class CpuPlacement:
    """Places a checkpoint's weights into layers for a CPU, see `load_weights`."""

    def __init__(self, network: nn.Module, sides: dict[nn.Conv2d, int]):
        """sides: of the pictures that each convolution sees."""
        self.network, self.sides = network, sides

    def __call__(self, name: str, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        if isinstance(module, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            side = self.sides[module]
            layer = fast_convolution(module, weights["weight"], weights["bias"], side)
            setattr(self.network.get_submodule(parent), child, layer)
        else:
            place_copies(name, module, weights)


def convolution_sides(network: TimedNetwork) -> dict[nn.Conv2d, int]:
    """The side of the pictures that each convolution works on; full outside of the blocks."""
    side = network.params.image_size
    sides = {conv: side for conv in network.modules() if isinstance(conv, nn.Conv2d)}
    for block in network.blocks():
        for layer in block:
            before, side = side, int(side * picture_scale(layer))
            seen = before if isinstance(layer, Downsample) else side  # there, the conv halves it
            sides |= {conv: seen for conv in layer.modules() if isinstance(conv, nn.Conv2d)}
    return sides


def fast_convolution(
    conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor, side: int
) -> nn.Module:
    """What computes this convolution fastest on a CPU, in its type. side: of its input."""
    dtype, shape = conv.weight.dtype, (1, conv.in_channels, side, side)
    if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
        m = winograd_tile(min(weight.shape[:2]), side, dtype)
        if m:
            from guided_diffusion.speed.winograd import WinogradConv2d  # large networks alone

            return WinogradConv2d(weight, bias, shape, dtype, m=m)
    return PackedConv2d(weight, bias, shape, dtype, padding=conv.padding[0], stride=conv.stride[0])


def winograd_tile(channels: int, side: int, dtype: torch.dtype) -> int:
    """The m of F(m×m, 3×3) where its transforms cost less than what they save, else 0.

    By measurement; where pictures are small, the transformed weights, which are (m + 2)² / 9 times
    as large, would take more memory than the time is worth.
    """
    if channels < 192 or side % 8 or (dtype != torch.float32 and has_matrix_units()):
        return 0
    if dtype == torch.float32:
        return 4 if side >= 64 else 2 if side >= 32 else 0
    return 2 if side >= 16 else 0


def fuse_norms(network: nn.Module) -> None:
    """Put `FusedGroupNorm` in the place of each GroupNorm32 and of the SiLU after it."""
    for parent in list(network.modules()):
        children = [*parent.named_children(), ("", None)]
        for (name, child), (next_name, following) in pairwise(children):
            if not isinstance(child, GroupNorm32):
                continue
            has_silu = isinstance(following, nn.SiLU)
            setattr(parent, name, FusedGroupNorm(child, silu=has_silu))
            if has_silu:
                setattr(parent, next_name, nn.Identity())
