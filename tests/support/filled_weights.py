"""Weights that follow from a key's name: the rule by which the golden networks were filled."""

import math
import zlib

import numpy as np
import torch


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A state dict of these keys and shapes, each tensor drawn from the CRC-32 of its key."""
    return {key: _fill(key, tuple(shape)) for key, shape in shapes.items()}


def _fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    values = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return values * 0.1 + (1 if key.endswith("weight") else 0)
