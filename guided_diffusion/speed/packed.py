"""A convolution whose weights are packed once for the CPU."""

from collections.abc import Sequence

import torch
from torch import nn


class PackedConv2d(nn.Module):
    """A convolution whose weights lie as oneDNN wants them; else it sorts them at every call.

    weight: (O, C / groups, k, k); bias: (O,); of any type, copied. input_shape: (B, C, H, W) that
    it will see; another B changes nothing, and another H or W is as if it sorted them at that call.
    dtype: of the input, the output and the products. On a CPU, without gradients.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        input_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        padding: int = 0,
        stride: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        self.bias = bias.to(dtype, copy=True)
        self.arguments = [padding, padding], [stride, stride], [1, 1], groups
        self._pack(weight.to(dtype), input_shape)

    def _pack(self, weight: torch.Tensor, input_shape: Sequence[int]) -> None:
        weight = weight.to(memory_format=torch.channels_last)  # which it sorts much faster
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, *self.arguments, list(input_shape)
        )
        self.packed_for = tuple(input_shape[2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), channels_last. Returns the same kind."""
        if x.shape[2:] != self.packed_for:  # it may want another order, and get there very slowly
            self._pack(self.weight.to_dense(), x.shape)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.arguments, "none", [], ""
        )
