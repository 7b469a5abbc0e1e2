"""Exponential moving averages of a network's weights."""

import torch
from torch import nn


class EMA:
    """The average of the weights at one rate, in fp32, by the network's own names."""

    def __init__(self, network: nn.Module, rate: float):
        """rate: share of the old average that each step keeps, in [0, 1)."""
        self.rate = rate
        self.weights = {
            name: value.detach().clone() for name, value in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """average ← rate · average + (1 − rate) · weights."""
        targets = list(self.weights.values())
        sources = [value.detach() for value in network.state_dict().values()]
        torch._foreach_lerp_(targets, sources, 1 - self.rate)

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(weights[name])
